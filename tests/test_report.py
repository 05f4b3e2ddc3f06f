"""The report page: its numbers are the report's, it needs nothing else, and a browser shows it whole on any screen."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import matplotlib
import pytest

from lipconvert.certification.documents import AttackResult, MethodResult, RobustnessReport, StageProof
from lipconvert.reports import plotting, report

RADII = [36 / 255, 72 / 255, 108 / 255, 1.0]
CONSTANTS = {"prescribed": 1.0, "pairwise": 0.83, "tightened": 0.71}
STAGES = [
    StageProof(name="normalise", kind="glue", prescribed=1.0, proved=1.0 + 2.0**-44),
    StageProof(
        name="blocks", kind="lben", states=28672, prescribed=1.0, proved=0.97, delta=1e-6, mu=0.0131, rounding=3.2e-13
    ),
    StageProof(name="head", kind="lben", states=1034, prescribed=1.0, proved=0.88, delta=0.0, mu=0.24, rounding=8e-14),
]
NASTY = """<script>alert("1")</script> & 'it' $model </style> {x} %s"""


def share(values):
    return sum(values) / len(values)


def made(
    samples=400, methods=3, radii=RADII, attacked=None, unconverged=0, box=None, broken=0, stages=STAGES, **changes
) -> RobustnessReport:
    """A report whose lists agree with one another, the attack as if the true constant were 0.55."""
    draw = random.Random(7)
    margins = [draw.gammavariate(3.0, 0.9) - 1.1 for _ in range(samples)]
    margins[:unconverged] = [0.0] * unconverged
    names = list(CONSTANTS)[:methods]
    curve = [k * 1.1 * max(radii) / 100 for k in range(101)] if max(radii) else [0.0]
    certified = {name: [max(m, 0.0) / (math.sqrt(2) * CONSTANTS[name]) for m in margins] for name in names}
    results = [
        MethodResult(
            method=name,
            certified_accuracy=[share([c > r for c in certified[name]]) for r in radii],
            curve_accuracy=[share([c > r for c in certified[name]]) for r in curve],
            lipschitz=CONSTANTS[name],
            least_pair=1.1 * CONSTANTS[name],
            greatest_pair=1.4 * CONSTANTS[name],
            seconds=12.34,
        )
        for name in names
    ]
    attack = None
    if attacked is not None:
        left = [share([m > 0 and m / (math.sqrt(2) * 0.55) > r for m in margins[:attacked]]) for r in radii]
        gaps = []
        for r, a in zip(radii, left, strict=True):
            low, high = (share([c > r for c in certified[n][:attacked]]) for n in (names[0], names[-1]))
            gaps.append((high - low) / (a - low) if a > low else None)
        attack = AttackResult(
            method="pgd",
            steps=50,
            restarts=3,
            box=box,
            samples=attacked,
            attacked_accuracy=left,
            gap_closed=gaps,
            broken=broken,
            seconds=41.6,
        )
    values = {
        "model": "net.safetensors",
        "data": "digits, test",
        "dtype": "float32",
        "method": names[-1],
        "lipschitz": 1.0,
        "proved_lipschitz": CONSTANTS[names[-1]],
        "empirical_lipschitz": 0.61,
        "delta": 1e-6,
        "samples": samples,
        "natural_accuracy": share([m > 0 for m in margins]),
        "radii": radii,
        "certified_accuracy": results[-1].certified_accuracy,
        "unconverged": unconverged,
        "worst_error": 3.14e-6,
        "methods": results,
        "curve_radii": curve,
        "sample_radii": certified[names[-1]],
        "margins": margins,
        "stages": stages,
        "attack": attack,
    }
    return RobustnessReport(**(values | changes))


LONG = "layer." + "x" * 200
HUNDRED = [
    StageProof(
        name=LONG if k % 9 == 0 else f"layer {k}",
        kind="lben",
        states=k + 1,
        prescribed=1.0,
        proved=None if k == 50 else 0.9,
        delta=None if k == 50 else 1e-6,
        reason="the least eigenvalue of H is -1.2e-04" if k == 50 else "",
    )
    for k in range(100)
]
NOTHING = [StageProof(name="all", kind="lben", states=9, prescribed=1.0, proved=None, reason="H is not positive <def>")]
CASES = {
    "full": lambda: made(attacked=400),
    "many samples": lambda: made(samples=1500, attacked=1500, box=(0.0, 1.0)),
    "attack in part": lambda: made(attacked=100),
    "no attack": lambda: made(empirical_lipschitz=None),
    "prescribed only": lambda: made(methods=1, model="", data=""),
    "nothing proved": lambda: made(stages=NOTHING, attacked=400, broken=2),
    "none converged": lambda: made(samples=30, methods=1, unconverged=30, natural_accuracy=0.0),
    "one radius": lambda: made(radii=[0.5], attacked=400),
    "radius zero": lambda: made(radii=[0.0]),
    "many radii": lambda: made(radii=[k / 7 for k in range(30)], attacked=100, lipschitz=40.0),
    "hundred stages": lambda: made(stages=HUNDRED, model=LONG * 2, data=LONG),
    "one sample": lambda: made(samples=1, attacked=1, stages=[]),
    "nasty names": lambda: made(model=NASTY, data=NASTY, dtype=NASTY, stages=[StageProof(
        name=NASTY, kind="lben", prescribed=1.0, proved=None, reason=NASTY)]),
}  # fmt: skip
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes and text; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs), []))
        if tag == "tr":
            table = next(attributes["id"] for name, attributes, _ in reversed(self.open) if name == "table")
            self.tables.setdefault(table, []).append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def handle_endtag(self, tag):
        name, attributes, texts = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        text = " ".join("".join(texts).split())
        self.texts.setdefault(tag, []).append(text)
        if tag in ("th", "td"):
            list(self.tables.values())[-1][-1].append(text)
            assert tag == "td" or attributes["scope"] in ("row", "col")
        if attributes.get("class") == "warning":
            self.warnings.append(text)

    def all(self, attribute: str) -> list[str]:
        return [a[attribute] or "" for _, a in self.tags if attribute in a]


@pytest.fixture(scope="module")
def pages():
    made_once: dict[str, tuple[RobustnessReport, str, Page]] = {}

    def page(case: str) -> tuple[RobustnessReport, str, Page]:
        if case not in made_once:
            found = CASES[case]()
            text = report.render(found)
            made_once[case] = found, text, Page(text)
        return made_once[case]

    return page


class TestNumbers:
    def test_accuracies_are_those_of_the_report(self, pages):
        found, _, page = pages("full")
        heading, *rows = page.tables["accuracy-table"]
        assert heading == ["radius ε", "prescribed", "pairwise", "tightened", "attacked", "gap closed"]
        assert [row[0] for row in rows] == ["36/255 0.1412", "72/255 0.2824", "108/255 0.4235", "1"]
        for k, row in enumerate(rows):
            accuracies = [m.certified_accuracy[k] for m in found.methods] + [found.attack.attacked_accuracy[k]]
            assert row[1:-1] == [f"{100 * a:.1f}" for a in accuracies]
            gap = found.attack.gap_closed[k]
            assert row[-1] == ("–" if gap is None else f"{100 * gap:.0f}")

    def test_two_digits_where_there_are_samples_enough(self, pages):
        found, _, page = pages("many samples")
        for k, row in enumerate(page.tables["accuracy-table"][1:]):
            assert row[1:4] == [f"{100 * m.certified_accuracy[k]:.2f}" for m in found.methods]

    def test_an_attack_in_part_stands_beside_what_is_certified_of_that_part(self, pages):
        found, text, page = pages("attack in part")
        heading, *rows = page.tables["accuracy-table"]
        assert heading[4] == "tightened, of the first 100"
        for radius, row in zip(RADII, rows, strict=True):
            certified = sum(m / (math.sqrt(2) * 0.71) > radius for m in found.margins[:100])
            assert row[4] == f"{certified:.1f}"
            assert float(row[4]) <= float(row[5])
        assert f"leaves {100 * found.attack.attacked_accuracy[-1]:.1f}\u00a0% of the first 100." in text

    def test_the_headline(self, pages):
        found, text, _ = pages("full")
        assert (
            f'<p class="headline">At l2 radius 1, {100 * found.methods[2].certified_accuracy[3]:.1f}\u00a0% of 400 samples '
            f"are certified (prescribed constant: {100 * found.methods[0].certified_accuracy[3]:.1f}\u00a0%); an attack "
            f"(PGD, 50 steps, 3 restarts) leaves {100 * found.attack.attacked_accuracy[3]:.1f}\u00a0%.</p>"
        ) in text
        found, text, _ = pages("prescribed only")
        accuracy = 100 * found.certified_accuracy[-1]
        assert (
            f"At l2 radius 1, {accuracy:.1f}\u00a0% of 400 samples are certified with the prescribed constant.</p>"
            in text
        )

    @pytest.mark.parametrize(("certified", "spoken_of"), [((0.5, 0.2, 0.0, 0.0), "72/255"), ((0.0,) * 4, "36/255")])
    def test_the_headline_is_of_a_radius_at_which_anything_is_certified(self, certified, spoken_of, pages):
        found, _, _ = pages("prescribed only")
        text = report.render(found.model_copy(update={"certified_accuracy": list(certified)}))
        assert f"At l2 radius {spoken_of}, {100 * max(certified[1], 0):.1f}\u00a0% of 400" in text

    @pytest.mark.parametrize("case", CASES)
    def test_the_parts_of_the_bar_are_all_samples(self, case, pages):
        _, _, page = pages(case)
        parts = [float(s[6:-1]) for tag, a in page.tags if tag == "span" and (s := a.get("style", ""))]
        assert sum(parts) == pytest.approx(100.0, abs=1e-3)  # four digits each

    def test_constants_and_methods(self, pages):
        found, text, page = pages("full")
        assert re.findall(r'<p class="value">(.*?)</p>', text) == ["1", "0.71", "0.61"]
        assert f"at most {0.71 / 0.61:.3g} times too large" in text
        rows = page.tables["methods-table"][1:]
        assert [row[:5] for row in rows] == [
            [m.method, *(f"{v:.6g}" for v in (m.lipschitz, m.least_pair, m.greatest_pair)), "12.3"]
            for m in found.methods
        ]
        _, text, _ = pages("no attack")
        assert re.findall(r'<p class="value">(.*?)</p>', text) == ["1", "0.71", "–"]
        assert "Not measured." in text

    def test_proofs_of_the_stages(self, pages):
        _, _, page = pages("full")
        assert page.tables["proof-table"] == [
            ["step", "kind", "states", "prescribed", "proved", "δ", "μ", "rounding"],
            ["normalise", "glue", "–", "1", "1", "–", "–", "–"],
            ["blocks", "LBEN", "28,672", "1", "0.97", "1e-06", "0.0131", "3.2e-13"],
            ["head", "LBEN", "1,034", "1", "0.88", "0", "0.24", "8.0e-14"],
        ]
        assert "A constant was proved for each of the 3 steps, for the floats in use." in page.texts["p"]

    def test_a_stage_without_a_proof_says_why_and_warns(self, pages):
        _, text, page = pages("nothing proved")
        assert page.tables["proof-table"][1] == ["all", "LBEN", "9", "1", "–", "–", "–", "–", "H is not positive <def>"]
        assert [w.split(".")[0] for w in page.warnings] == [
            "The attack broke 2 certified samples",
            "Nothing could be proved about the only step",
        ]
        assert "Proved for its floats" not in text
        assert "It broke no certified sample" not in text
        _, text, page = pages("hundred stages")
        assert len(page.tables["proof-table"]) == 101
        assert page.warnings[0].startswith("Nothing could be proved about 1 of 100 steps.")
        assert "A constant was proved for 99 of 100 steps, for the floats in use." in text

    def test_a_prescribed_constant_is_called_proved_only_where_every_step_was(self):
        weak = StageProof(name="weak", kind="lben", states=3, prescribed=1.0, proved=1.3)
        assert "Not proved at every step." in report.render(made(stages=[*STAGES, weak]))
        text = report.render(made(samples=3, proved_lipschitz=0.6099, empirical_lipschitz=0.61))
        assert "Proved for its floats, each step at L(1\u00a0+\u00a0δ), δ\u00a0≤\u00a01·10⁻⁶." in text
        assert "exceeds the proved constant by 1.6·10⁻⁴ of it" in text

    def test_unconverged_samples_and_the_worst_error(self, pages):
        _, text, page = pages("none converged")
        assert page.warnings == ["No solve converged, so nothing is known about any sample and none is certified."]
        assert "30 of 30 samples did not converge and count as not certified." in text
        assert "Not shown: 30 samples without a margin" in text
        _, text, _ = pages("full")
        assert "the largest of all samples is 3.1·10⁻⁶." in text
        assert "Every solve converged." in text

    @pytest.mark.parametrize(
        ("value", "digits", "expected"),
        [(0.0, 1, "0.0"), (1.0, 1, "100.0"), (0.9999, 1, "99.99"), (1e-4, 1, "0.01"), (1 - 2e-16, 1, "100.0"),
         (0.99996, 2, "99.996"), (0.641, 1, "64.1"), (3e-17, 1, "0.0"), (0.004, 0, "0.4")],
    )  # fmt: skip
    def test_what_is_not_all_or_nothing_does_not_read_so(self, value, digits, expected):
        assert report._percent(value, digits) == expected

    @pytest.mark.parametrize(
        ("radius", "name"),
        [(0.0, "0"), (1.0, "1"), (36 / 255, "36/255"), (0.2, "0.2"), (0.125, "0.125"), (1 / 3, "85/255"),
         (0.1234567, "0.123457"), (8.0, "8"), (300 / 255, "300/255")],
    )  # fmt: skip
    def test_names_of_radii(self, radius, name):
        assert plotting.radius_name(radius) == name

    @pytest.mark.parametrize("limit", [10**9, 10])
    def test_the_report_itself_is_in_the_page(self, limit, monkeypatch, pages):
        found, _, page = pages("nasty names")
        if limit == 10:
            monkeypatch.setattr(report, "LONGEST_LINK", limit)
            page = Page(report.render(found))
            link = page.texts["pre"][0]
        else:
            assert [a["download"] for _, a in page.tags if "download" in a] == ["robustness-report.json"]
            link = next(unquote(h.split(",", 1)[1]) for h in page.all("href") if h.startswith("data:application/json;"))
        assert RobustnessReport.model_validate_json(link) == found


class TestMarkup:
    @pytest.mark.parametrize("case", CASES)
    def test_nothing_is_loaded_and_every_reference_is_met(self, case, pages):
        _, text, page = pages(case)
        assert not {tag for tag, _ in page.tags} & {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "base",
            "form",
        }
        assert page.all("src") == []
        assert all(href.startswith(("#", "data:application/json;")) for href in page.all("href"))
        assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r'href="data:[^"]*"', "", text))
        ids = page.all("id")
        assert len(ids) == len(set(ids))
        wanted = {h[1:] for h in page.all("href") if h[0] == "#"} | set(page.all("aria-labelledby"))
        assert wanted | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]

    @pytest.mark.parametrize("case", CASES)
    def test_structure_for_who_does_not_see_it(self, case, pages):
        _, _, page = pages(case)
        tags = [tag for tag, _ in page.tags]
        assert (tags.count("h1"), tags.count("main"), tags.count("title")) == (1, 1, 1)
        assert page.tags[0] == ("html", {"lang": "en"})
        levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
        assert all(b - a <= 1 for a, b in pairwise(levels))
        figures = [a for tag, a in page.tags if tag == "svg"]
        assert len(figures) == 4  # two, for wide and narrow screens
        assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in figures)
        assert tags.count("table") == tags.count("caption") == sum(c == "scroll" for c in page.all("class"))

    def test_text_of_the_report_is_escaped(self, pages):
        _, text, page = pages("nasty names")
        assert page.texts["h1"] == [NASTY]
        assert page.texts["title"] == [f"{NASTY}: robustness report"]
        assert page.texts["dd"][0] == page.texts["dd"][3] == NASTY
        assert (page.tables["proof-table"][1][0], page.tables["proof-table"][1][-1]) == (NASTY, NASTY)
        assert "<script" not in text
        assert text.count("</style>") == 1

    def test_without_names(self, pages):
        _, _, page = pages("prescribed only")
        assert page.texts["h1"] == ["A network"]
        assert page.texts["dd"][0] == "not named"

    def test_the_same_report_is_the_same_page(self, pages, tmp_path):
        found, text, _ = pages("full")
        assert report.render(found) == text
        (tmp_path / "report.json").write_text(found.model_dump_json())
        code = (
            "import sys, matplotlib; matplotlib.rcParams['lines.linewidth'] = 9\n"
            "from lipconvert.reports.report import write\n"
            "from lipconvert.certification.documents import RobustnessReport as R\n"
            "write(R.model_validate_json(open(sys.argv[1]).read()), sys.argv[2])"
        )
        arguments = [sys.executable, "-c", code, tmp_path / "report.json", tmp_path / "page.html"]
        subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"})
        assert (tmp_path / "page.html").read_bytes() == text.encode()

    def test_it_is_written_whole_or_not_at_all(self, tmp_path, monkeypatch):
        target = tmp_path / "new" / "page.html"
        report.write(made(samples=5), target)
        before = target.read_bytes()
        assert before == report.render(made(samples=5)).encode()
        monkeypatch.setattr(report, "draw_margins", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report.write(made(samples=6), target)
        assert target.read_bytes() == before
        assert [p.name for p in target.parent.iterdir()] == ["page.html"]

    def test_lists_that_do_not_fit_are_refused(self):
        found = made(attacked=400)
        for changes in ({"radii": RADII[:3]}, {"curve_radii": found.curve_radii[:-1]}):
            with pytest.raises(ValueError, match=r"shorter|longer|same"):
                report.render(found.model_copy(update=changes))


class TestFigures:
    def test_lines_are_the_report_s(self):
        found = made(attacked=400)
        figure = plotting.draw_robustness(found, plotting.WIDE)
        axes = figure.axes[0]
        lines = {line.get_label(): line for line in axes.lines}
        for method in found.methods:
            x, y = lines[f"certified, {method.method}"].get_data()
            assert list(x) == found.curve_radii
            assert list(y) == [100 * a for a in method.curve_accuracy]
        x, y = lines["attacked"].get_data()
        assert (list(x), list(y)) == (RADII, [100 * a for a in found.attack.attacked_accuracy])
        assert [list(v) for v in lines["natural"].get_data()] == [[0.0], [100 * found.natural_accuracy]]
        uprights = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert uprights == RADII
        texts = [text.get_text() for text in axes.texts]
        assert texts == ["36/255", "72/255", "108/255", "1"]

    @pytest.mark.parametrize(
        ("radii", "curve", "end"),
        [
            ([0.5, 1.0], 12.0, 1.5),
            ([0.5, 1.0], 1.02, 1.02),
            ([0.5, 1.0], 0.2, 1.0),
            ([0.0], 3.0, 3.0),
            ([0.0], 0.0, 1.0),
        ],
    )
    def test_the_view_is_about_the_radii_asked_for(self, radii, curve, end):
        found = made(samples=20, attacked=20, radii=radii)
        accuracies = {"curve_accuracy": [0.9, 0.2]}
        far = {"curve_radii": [0.0, curve], "methods": [m.model_copy(update=accuracies) for m in found.methods]}
        axes = plotting.draw_robustness(found.model_copy(update=far), plotting.WIDE).axes[0]
        assert axes.get_xlim() == (0.0, end)

    @pytest.mark.parametrize("attacked", [400, 100])
    def test_what_is_not_known_lies_between_certificate_and_attack(self, attacked):
        found = made(attacked=attacked)
        axes = plotting.draw_robustness(found, plotting.WIDE).axes[0]
        band = next(c for c in axes.collections if str(c.get_label()).startswith("not known"))
        corners = band.get_paths()[0].vertices
        for radius in found.curve_radii[1:-1]:
            heights = [y for x, y in corners if x == radius]
            certified = share([m / (math.sqrt(2) * 0.71) > radius for m in found.margins[:attacked]])
            # What the attack had broken at the last radius it was run at; nothing but errors before the first.
            run = max((r for r in RADII if r <= radius), default=0.0)
            left = share([m > 0 and m / (math.sqrt(2) * 0.55) > run for m in found.margins[:attacked]])
            assert min(heights) == pytest.approx(100 * certified, abs=1e-9)
            assert max(heights) == pytest.approx(100 * left, abs=1e-9)
        natural = share([m > 0 for m in found.margins[:attacked]])
        left = found.attack.attacked_accuracy
        assert plotting.attacked_bounds(found) == [(0.0, natural), *zip(RADII, left, strict=True)]

    @pytest.mark.parametrize("case", ["full", "many radii", "none converged"])
    def test_bars_count_every_margin_once(self, case):
        found = CASES[case]()
        axes = plotting.draw_margins(found, plotting.WIDE).axes[0]
        bars = {patch.get_label(): patch.get_data() for patch in axes.patches}
        for name, sign in (("right", 1), ("wrong", -1)):
            chosen = [m for m in found.margins if m * sign > 0]
            assert (name in bars) == bool(chosen)
            if chosen:
                counts, edges, _ = bars[name]
                assert counts.sum() == len(chosen)
                for count, (low, high) in zip(counts, pairwise(edges), strict=True):
                    assert count == sum(low <= m < high for m in chosen)
                    assert count == 0 or (low >= 0 if sign > 0 else high <= 0)
        right_end = axes.get_xlim()[1]
        needed = [math.sqrt(2) * found.lipschitz * r for r in found.radii if r > 0]
        uprights = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert uprights == pytest.approx([m for m in needed if m <= right_end], rel=1e-15)
        assert axes.get_xlim()[0] < 0 < right_end

    def test_pngs_and_the_user_s_settings(self, tmp_path):
        before = dict(matplotlib.rcParams)
        for plot in (plotting.plot_robustness, plotting.plot_margins):
            plot(made(samples=50, attacked=50), tmp_path / "a" / "figure.png")
            png = (tmp_path / "a" / "figure.png").read_bytes()
            assert (png[:8], png[-8:-4]) == (b"\x89PNG\r\n\x1a\n", b"IEND")
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["figure.png"]
        assert dict(matplotlib.rcParams) == before

    @pytest.mark.parametrize("case", CASES)
    def test_every_colour_follows_the_reader_s_scheme(self, case, pages):
        _, text, _ = pages(case)
        for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            used = set(re.findall(r"var\((--[a-z]+), #[0-9a-f]{6}\)", svg))
            assert {"--ink"} < used <= set(report.LIGHT)
            assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", svg))

    @pytest.mark.parametrize("scheme", [report.LIGHT, report.DARK], ids=["light", "dark"])
    def test_contrast(self, scheme):
        """WCAG 2.1: 4.5 for text, 3 for lines that mean something."""

        def luminance(colour):
            parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
            parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

        def contrast(one, other):
            low, high = sorted((luminance(scheme[one]), luminance(scheme[other])))
            return (high + 0.05) / (low + 0.05)

        for text in ("--ink", "--muted", "--label", "--alarm", "--blue"):
            assert contrast(text, "--paper") >= 4.5, text
        for line in ("--blue", "--vermilion", "--green", "--ink"):
            assert contrast(line, "--paper") >= 3, line
        assert contrast("--ink", "--panel") >= 4.5
        assert contrast("--blue", "--band") >= 3

    def test_both_schemes_have_every_colour(self):
        assert set(plotting.VARIABLES.values()) <= set(report.LIGHT) == set(report.DARK)


# Runs first in a copy of the page and writes what the browser made of it into the title of the page around.
PROBE = """<script>
const complaints = [];
addEventListener("error", e => complaints.push(String(e.message || e.target.tagName)), true);
addEventListener("securitypolicyviolation", e => complaints.push(e.violatedDirective + " " + e.blockedURI));
console.error = console.warn = (...a) => complaints.push(a.join(" "));
addEventListener("load", () => {
  const root = document.documentElement, box = e => e.getBoundingClientRect();
  const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const drawn = [...document.querySelectorAll("figure svg")].filter(s => box(s).width > 0 && box(s).height > 0);
  const shown = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg") && box(e).width > 0);
  const named = svg => [...svg.querySelectorAll("text")];
  const meets = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
  parent.document.title = JSON.stringify({
    complaints, width: innerWidth, overflow: root.scrollWidth - root.clientWidth,
    outside: shown.filter(e => box(e).right > innerWidth + 1 || box(e).left < -1).map(e => e.tagName + "." + e.className),
    images: [...document.images].filter(i => !i.naturalWidth).length,
    figures: drawn.map(s => [box(s).width, box(s).height]),
    cut: drawn.flatMap(s => named(s).filter(t => !inside(box(t), box(s))).map(t => t.textContent)),
    smallest: Math.min(...drawn.flatMap(s => named(s).map(t => box(t).height))),
    overlapping: drawn.flatMap(s => named(s).flatMap((t, k) => named(s).slice(k + 1).filter(u => meets(box(t), box(u)))
      .map(u => t.textContent + " on " + u.textContent))),
    scrolling: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(drawn[0].querySelector("text")).fill,
  });
});
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """``browser(page, width, dark)``: what a headless Chromium reports of it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    if subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode:
        pytest.skip(f"{program} does not start")  # a stub that asks for another package manager

    def look(text: str, width: int, dark: bool = False) -> dict:
        folder = tmp_path_factory.mktemp("browser")
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        assert policy in text
        text = text.replace(policy, policy + "; script-src 'unsafe-inline'").replace("<head>", "<head>" + PROBE)
        if dark:
            text = text.replace("@media screen and (prefers-color-scheme: dark)", "@media screen")
        # A window is never narrower than 500 pixels, a frame is.
        frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(text)}"></iframe>'
        (folder / "page.html").write_text(f'<meta charset="utf-8"><title></title>{frame}', encoding="utf-8")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        arguments += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--no-first-run"]
        done = subprocess.run(
            [program, *arguments, "--dump-dom", (folder / "page.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        shutil.rmtree(folder / "profile", ignore_errors=True)
        found = re.search("<title>(.*?)</title>", done.stdout)
        assert found is not None, done.stderr
        assert found[1], "the page was not loaded"
        return json.loads(unescape(found[1]))

    return look


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("case", ["full", "attack in part", "none converged", "many radii", "hundred stages"])
def test_in_a_browser(case, width, pages, browser):
    _, text, _ = pages(case)
    seen = browser(text, width)
    assert seen["width"] == width
    assert seen["complaints"] == []
    assert seen["overflow"] <= 0
    assert seen["outside"] == []
    assert seen["images"] == 0
    assert len(seen["figures"]) == 2  # of the wide and the narrow ones, those for this width
    assert all(w >= 0.85 * min(width, 800) and h >= 0.4 * w for w, h in seen["figures"])
    assert seen["cut"] == []
    assert seen["overlapping"] == []
    assert seen["smallest"] >= 9  # CSS pixels, of a line of text
    if width == 1280 and case != "hundred stages":
        assert seen["scrolling"] == 0


def test_the_browser_would_have_seen_it(pages, browser):
    _, text, _ = pages("one sample")
    broken = text.replace("<main>", '<main><div style="width:500px">x</div><img src="https://example.org/x.png">')
    seen = browser(broken, 390)
    assert seen["overflow"] >= 100
    assert "DIV." in seen["outside"]
    assert seen["images"] == 1
    assert any("img-src" in complaint for complaint in seen["complaints"])


def test_in_the_dark(pages, browser):
    _, text, _ = pages("full")
    light, dark = browser(text, 390), browser(text, 390, dark=True)

    def rgb(colour):
        return "rgb({}, {}, {})".format(*(int(colour[k : k + 2], 16) for k in (1, 3, 5)))

    assert (light["paper"], light["ink"]) == (rgb(report.LIGHT["--paper"]), rgb(report.LIGHT["--ink"]))
    assert (dark["paper"], dark["ink"]) == (rgb(report.DARK["--paper"]), rgb(report.DARK["--ink"]))
    assert dark["complaints"] == []


def test_the_page_is_small():
    """A page of ten thousand samples is mostly its JSON."""
    text = report.render(made(samples=10_000, attacked=1000))
    assert len(text) - len(next(h for h in Page(text).all("href") if h.startswith("data:"))) < 200_000
