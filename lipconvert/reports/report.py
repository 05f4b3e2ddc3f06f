"""A `RobustnessReport` as one HTML page that needs nothing else: no script, no network, the same bytes for the same report.

What is text in the report (names, reasons) is escaped; `Markup` is what already is HTML.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from urllib.parse import quote

from ..certification.documents import AttackResult, RobustnessReport, StageProof
from ..errors import InvalidParameterError
from ..escaping import printable
from ..foundation.documents import json_text
from ..foundation.files import whole
from .plotting import (
    NARROW,
    WIDE,
    Draw,
    attacked_bounds,
    certified_of_first,
    draw_margins,
    draw_robustness,
    inline_svg,
    radius_name,
)

# Chromium follows no link longer than 2 MiB; with more samples than that the JSON stands in the page itself.
LONGEST_LINK = 2_000_000
MOST_NAMED = 6  # radii in a sentence
NONE = "–"
ATTACKS = {"pgd": "PGD", "apgd": "APGD", "ensemble": "ensemble"}
METHODS = {
    "prescribed": "the L the network was built with, √2·L for every pair of logits",
    "pairwise": "a constant of its own for every pair of logits, with the Λ at hand",
    "tightened": "the same with the best Λ that was found for each pair",
}


class Markup(str):
    """HTML as it stands; every other string is text."""


def render(report: RobustnessReport) -> str:
    """The page: headline, accuracies, constants, what is and is not certified, margins, proofs, the report itself as JSON.

    Figures are inline SVG, once for wide and once for narrow screens; colours follow the reader's light or dark scheme.
    Raises `ValueError` where lists of the report that belong together differ in length.
    """
    return Template(PAGE).substitute(
        title=_html(f"{_model(report)}: robustness report"),
        style=STYLE,
        version=_html(version("lipconvert")),
        heading=_element("h1", _model(report), **({"class_": "long"} if len(_model(report)) > 60 else {})),
        facts=_facts(report),
        warnings="\n".join(_element("p", text, role="note", class_="warning") for text in _warnings(report)),
        headline=_html(_headline(report)),
        bar=_bar(report),
        accuracy_figure=_figure("accuracy", draw_robustness, report, _accuracy_alt(report), _accuracy_caption(report)),
        accuracy_table=_accuracy_table(report),
        accuracy_notes=_html(_accuracy_notes(report)),
        constants=_constants(report),
        methods=_methods(report),
        says=_list(_says(report)),
        says_not=_list(_says_not(report)),
        margin_figure=_figure("margins", draw_margins, report, _margin_alt(report), _margin_caption(report)),
        proof=_html(_proof(report)),
        stages=_stages(report.stages),
        json=_json(report),
        none=NONE,
    )


def write(report: RobustnessReport, path: str | Path) -> None:
    """`render` into a file, whole or not at all; folders on the way are made. Raises `OSError`, and `InvalidParameterError`
    for what is no report, or a path that is none of a page."""
    if not isinstance(report, RobustnessReport):
        raise InvalidParameterError("report", type(report).__name__, "it must be what lipconvert.certify returns")
    require_page(path)
    page = render(report)
    with whole(path) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")


def require_page(path: str | Path) -> None:
    """Raise `InvalidParameterError` where no page can be written: another suffix than .html or .htm, or a folder."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InvalidParameterError("the path of the report", repr(str(path)), "it is an HTML page: NAME.html")
    if Path(path).is_dir():
        raise InvalidParameterError("the path of the report", repr(str(path)), "that is a folder: give a file in it")


# Numbers and names


def _percent(share: float, digits: int = 1) -> str:
    """In %, with more digits where it would read as all or nothing and is not; 1e-12 is the round-off of a difference."""
    share = round(share, 12)
    text = f"{100.0 * share:.{digits}f}"
    while 0.0 < share < 1.0 and float(text) in (0.0, 100.0):
        digits += 1
        text = f"{100.0 * share:.{digits}f}"
    return text


def _share(share: float, digits: int = 1) -> str:
    return f"{_percent(share, digits)}\u00a0%"


def _number(value: float | None, form: str = ".6g") -> str:
    return NONE if value is None else format(value, form) if value else "0"


def _power(value: float) -> str:
    """For prose, where 1e-06 could be broken at its hyphen: 1·10⁻⁶."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    if value == 0.0 or -3 <= int(exponent) <= 3:
        return f"{value:.2g}"
    return f"{float(digits):g}·10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _count(number: int, one: str) -> str:
    return f"{number:,} {one}{'' if number == 1 else 's'}"


def _model(report: RobustnessReport) -> str:
    return report.model.strip() or "A network"


def _attack(attack: AttackResult) -> str:
    restarts = f", {attack.restarts} restarts" if attack.restarts > 1 else ""
    return f"{ATTACKS[attack.method]}, {_count(attack.steps, 'step')}{restarts}"


def _in_part(report: RobustnessReport) -> bool:
    return report.attack is not None and report.attack.samples < report.samples


def _unproved(report: RobustnessReport) -> list[StageProof]:
    return [stage for stage in report.stages if stage.proved is None]


def _prescribed_is_proved(report: RobustnessReport) -> bool:
    """Of every step; a product rounded upwards may exceed what it is the product of by some units in the last place."""
    return bool(report.stages) and all(
        stage.proved is not None and (stage.delta is not None or stage.proved <= stage.prescribed * (1.0 + 1e-12))
        for stage in report.stages
    )


# What the page says


def _told(report: RobustnessReport) -> int:
    """The radius to speak of, its number: the greatest at which anything is certified, else the smallest."""
    shares = zip(report.radii, report.certified_accuracy, strict=False)
    return max((k for k, (_, share) in enumerate(shares) if share > 0.0), default=0)


def _headline(report: RobustnessReport) -> str:
    at = _told(report)
    sentence = (
        f"At l2 radius {radius_name(report.radii[at])}, {_share(report.certified_accuracy[at])} of "
        f"{_count(report.samples, 'sample')} are certified"
    )
    if report.method == "prescribed":
        sentence += " with the prescribed constant"
    else:
        sentence += f" (prescribed constant: {_share(report.methods[0].certified_accuracy[at])})"
    if report.attack is not None:
        sentence += f"; an attack ({_attack(report.attack)}) leaves {_share(report.attack.attacked_accuracy[at])}"
        sentence += f" of the first {report.attack.samples:,}" if _in_part(report) else ""
    return sentence + "."


def _warnings(report: RobustnessReport) -> list[str]:
    found = []
    if report.attack is not None and report.attack.broken:
        found.append(
            f"The attack broke {_count(report.attack.broken, 'certified sample')}. A certificate excludes that: something "
            "is wrong with lipconvert or with this machine. Do not rely on the numbers below, and please report it."
        )
    unproved = _unproved(report)
    if unproved:
        found.append(
            f"Nothing could be proved about {_of(len(unproved), len(report.stages), 'step')}. There the numbers below hold "
            "only as far as the prescribed constants do. The reasons stand under “Proof, step by step”."
        )
    if report.unconverged == report.samples:
        found.append("No solve converged, so nothing is known about any sample and none is certified.")
    return found


def _accuracy_caption(report: RobustnessReport) -> str:
    text = (
        "Certified accuracy against the radius, higher is better; the dots are those of the table. Dotted lines mark 36/255, "
        "72/255, 108/255 and 1."
    )
    if report.attack is None:
        return f"{text} No attack was run: what lies above the highest curve is not known."
    part = (
        f" The attack took the first {report.attack.samples:,} samples only, and the grey is about those."
        if _in_part(report)
        else ""
    )
    return (
        f"{text} Above the staircase the attack succeeded, below the grey none can; the grey itself is not known. The attack "
        f"was run at the rings only, and what it broke at one radius is broken at every greater one.{part}"
    )


def _accuracy_notes(report: RobustnessReport) -> str:
    attack = report.attack
    text = (
        f"In %, of {_count(report.samples, 'sample')}; {_share(report.natural_accuracy, 2)} are classified correctly."
    )
    if attack is None:
        return f"{text} No attack was run, so how much of the rest could be broken is not known."
    box = (
        "within the whole l2 ball"
        if attack.box is None
        else f"with pixels kept in [{attack.box[0]:g}, {attack.box[1]:g}]"
    )
    part = f" on the first {_count(attack.samples, 'sample')}" if _in_part(report) else ""
    time = f", {attack.seconds:,.0f}\u00a0s" if attack.seconds else ""
    none = "" if attack.broken else " It broke no certified sample."
    return (
        f"{text} Attack: {_attack(attack)}, {box}{part}{time}.{none} Gap closed: of what lies "
        f"between the prescribed certificate and the attack, the part that is certified by {report.method}, in\u00a0%."
    )


def _says(report: RobustnessReport) -> list[str]:
    verb = "counts" if report.unconverged == 1 else "count"
    unconverged = (
        f"{report.unconverged:,} of {_count(report.samples, 'sample')} did not converge and {verb} as not certified."
    )
    return [
        "For a certified sample no input within l2 distance ε gets another class, as the network evaluates it in its own "
        f"{report.dtype} arithmetic, not as an ideal network in real numbers would.",
        "Certified at ε means: classified correctly, and margin − error > K ε for every other class, strictly, where K is a "
        "constant proved for the difference of the two logits. Equality does not count.",
        "The error is a bound of what the solver and rounding may have done to that difference; the largest of all samples "
        f"is {_power(report.worst_error)}.",
        "The l2 ball is meant whole: inputs are not clipped to the range of pixels, so what holds in the ball also holds "
        "in the part of it that is made of images.",
        unconverged if report.unconverged else "Every solve converged.",
    ]


def _says_not(report: RobustnessReport) -> list[str]:
    found = [
        "A sample that is not certified need not be breakable, and one that an attack left need not be safe.",
        f"It is about {'this sample' if report.samples == 1 else f'these {report.samples:,} samples'}, not about others from "
        "the same source, and it takes their labels as they are.",
        "Other changes of the input (another norm, a rotation, another camera) are not covered beyond the l2 distance they "
        "amount to.",
        "The same weights in another dtype, and weights after more training, are another network with a certificate of "
        "their own.",
    ]
    if report.attack is not None and report.attack.box is not None:
        found.append(
            "The attack kept to the range of pixels and the certificate does not: some of the gap between them may be "
            "inputs that are no images."
        )
    return found


def _between(report: RobustnessReport) -> str:
    low, high = report.empirical_lipschitz, report.proved_lipschitz
    if low is None:
        return "How much smaller than the proved constant the true one is, is not known."
    if low > high:
        return (
            f"The quotient that was met exceeds the proved constant by {_power(low / high - 1)} of it: by its own round-off, "
            "or one of the two is wrong."
        )
    factor = f"{high / low:.3g} times too large"
    return f"The true constant lies between {low:.6g} and {high:.6g}: the proved one is at most {factor}."


def _proof(report: RobustnessReport) -> str:
    unproved = len(_unproved(report))
    if not report.stages:
        return "The report holds no proof of a step."
    if unproved == len(report.stages):
        return f"No constant was proved for {_of(unproved, unproved, 'step')}."
    proved = _of(len(report.stages) - unproved, len(report.stages), "step")
    return f"A constant was proved for {proved}, for the floats in use."


def _of(some: int, all_: int, one: str) -> str:
    if some < all_:
        return f"{some:,} of {all_:,} {one}s"
    return f"the only {one}" if all_ == 1 else f"each of the {all_:,} {one}s"


def _accuracy_alt(report: RobustnessReport) -> str:
    lines = [(f"certified, {result.method}", result.certified_accuracy) for result in reversed(report.methods)]
    if report.attack is not None:
        lines.insert(0, ("attacked", report.attack.attacked_accuracy))
    named = [
        f"{name}: "
        + ", ".join(f"{_share(a)} at {radius_name(r)}" for r, a in zip(report.radii, accuracies, strict=True))
        for name, accuracies in lines
    ]
    return f"Accuracy against l2 radius. Natural: {_share(report.natural_accuracy)}; " + "; ".join(named) + "."


def _needed(report: RobustnessReport) -> str:
    factor = math.sqrt(2.0) * report.lipschitz
    named = [f"{factor * radius:.3g} for {radius_name(radius)}" for radius in report.radii if radius > 0.0]
    if len(named) > MOST_NAMED:
        return f"from {named[0]} to {named[-1]}"
    return ", ".join(named) or "nothing for radius 0"


def _margin_alt(report: RobustnessReport) -> str:
    right, wrong = sorted(m for m in report.margins if m > 0.0), sum(m < 0.0 for m in report.margins)
    middle = f", half of them above {right[len(right) // 2]:.3g}" if right else ""
    return f"Histogram of margins: {len(right):,} right{middle}; {wrong:,} wrong, left of 0. Needed: {_needed(report)}."


def _margin_caption(report: RobustnessReport) -> str:
    zero = sum(margin == 0.0 for margin in report.margins)
    left_out = (
        f" Not shown: {_count(zero, 'sample')} without a margin (a tie, or a solve that did not converge)." * bool(zero)
    )
    return (
        "The margin is the logit of the label less the largest other; left of 0 the class is wrong. With the prescribed "
        f"constant a radius ε needs a margin above √2·L·ε, the dotted lines: {_needed(report)}.{left_out}"
    )


# Parts of the page


def _html(text: str) -> str:
    return text if isinstance(text, Markup) else escape(printable(text))


def _element(tag: str, content: str, **attributes: str) -> Markup:
    named = {name.rstrip("_").replace("_", "-"): escape(printable(value)) for name, value in attributes.items()}
    given = "".join(f' {name}="{value}"' for name, value in named.items())
    return Markup(f"<{tag}{given}>{_html(content)}</{tag}>")


def _join(parts: Iterable[str]) -> Markup:
    return Markup("\n".join(map(_html, parts)))


def _list(items: Sequence[str]) -> Markup:
    return _element("ul", _join(_element("li", item) for item in items))


def _facts(report: RobustnessReport) -> Markup:
    pairs = [
        ("data", report.data.strip() or "not named"),
        ("samples", f"{report.samples:,}"),
        ("natural accuracy", _share(report.natural_accuracy)),
        ("dtype", report.dtype),
        ("method", report.method),
        ("lipconvert", version("lipconvert")),
    ]
    return _join(_element("div", _join([_element("dt", name), _element("dd", value)])) for name, value in pairs)


def _bar(report: RobustnessReport) -> Markup:
    """The samples at one radius in four parts that add up to all of them."""
    at = _told(report)
    natural, certified, attacked = report.natural_accuracy, report.certified_accuracy[at], None
    where = f"At radius {radius_name(report.radii[at])}"
    if report.attack is not None:
        natural, attacked = attacked_bounds(report)[0][1], report.attack.attacked_accuracy[at]
        if _in_part(report):
            certified = certified_of_first(report, report.attack.samples, [report.radii[at]])[0]
            where += f", of the first {report.attack.samples:,}"
    upper = natural if attacked is None else attacked
    parts = [("certified", certified), ("not known", upper - certified)]
    if attacked is not None:
        parts.append(("broken by the attack", natural - attacked))
    parts.append(("wrong or unconverged" if report.unconverged else "wrong", 1.0 - natural))
    shown = [(f"{name} {_share(max(share, 0.0))}", share, name.split()[0]) for name, share in parts]
    bar = _join(
        _element("span", "", class_=look, style=f"width:{100.0 * share:.4f}%")
        for _, share, look in shown
        if round(share, 12) > 0.0
    )
    key = [_element("li", _join([_element("i", "", class_=look), text])) for text, _, look in shown]
    label = f"{where}: {', '.join(text for text, _, _ in shown)}"
    return _join(
        [
            _element("div", bar, class_="bar", role="img", aria_label=label),
            _element("ul", _join([_element("li", f"{where}:"), *key]), class_="key"),
        ]
    )


def _figure(name: str, draw: Draw, report: RobustnessReport, label: str, caption: str) -> Markup:
    drawn = [
        _element("div", Markup(inline_svg(draw, report, layout, f"{name}-{size}", label)), class_=size)
        for size, layout in (("wide", WIDE), ("narrow", NARROW))
    ]
    return _element("figure", _join([*drawn, _element("figcaption", caption)]))


def _table(name: str, caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> Markup:
    """A table that scrolls in a box of its own; the first cell of a row heads it, and so many of the last hold words."""
    numbers = len(headings) - words
    head = _join(
        _element("th", heading, scope="col", **({} if 0 < k < numbers else {"class_": "words"}))
        for k, heading in enumerate(headings)
    )
    body = [
        _join(
            _element("th", cell, scope="row")
            if k == 0
            else _element("td", cell, **({} if k < numbers else {"class_": "words"}))
            for k, cell in enumerate(row)
        )
        for row in rows
    ]
    parts = [
        _element("caption", _element("span", caption)),
        _element("thead", _element("tr", head)),
        _element("tbody", _join(_element("tr", row) for row in body)),
    ]
    table = _element("table", _join(parts), id=f"{name}-table")
    return _element("div", table, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _accuracy_table(report: RobustnessReport) -> Markup:
    """Accuracies in %: one digit, or two where there are samples enough for them."""
    digits = 2 if report.samples >= 1000 else 1
    headings = ["radius ε", *(result.method for result in report.methods)]
    columns = [[_percent(a, digits) for a in result.certified_accuracy] for result in report.methods]
    if report.attack is not None:
        if _in_part(report):
            first = report.attack.samples
            headings.append(f"{report.method}, of the first {first:,}")
            columns.append([_percent(a, digits) for a in certified_of_first(report, first, report.radii)])
        headings += ["attacked", "gap closed"]
        columns.append([_percent(a, digits) for a in report.attack.attacked_accuracy])
        columns.append([NONE if share is None else _percent(share, 0) for share in report.attack.gap_closed])
    names = [_radius(radius) for radius in report.radii]
    caption = "Accuracy in %: certified by each method" + (
        ", and left by the attack" if report.attack is not None else ""
    )
    return _table("accuracy", caption, headings, zip(names, *columns, strict=True))


def _radius(radius: float) -> Markup:
    name = radius_name(radius)
    return _join([_html(name)] if "/" not in name else [_html(name), _element("small", f"{radius:.4f}")])


def _constants(report: RobustnessReport) -> Markup:
    at = f", each step at L(1\u00a0+\u00a0δ), δ\u00a0≤\u00a0{_power(report.delta)}" if report.delta else ""
    proved = f"Proved for its floats{at}." if _prescribed_is_proved(report) else "Not proved at every step."
    with_prescribed = ", together with the prescribed ones where nothing was proved" if _unproved(report) else ""
    cards = [
        (
            "Prescribed",
            report.lipschitz,
            f"The L the network was built with, from the input to the logits. {proved}",
        ),
        (
            "Proved",
            report.proved_lipschitz,
            f"The least constant proved for the floats in use{with_prescribed}: the logits never move more than this times "
            "as far as the input does.",
        ),
        (
            "Empirical lower bound",
            report.empirical_lipschitz,
            "Not measured."
            if report.empirical_lipschitz is None
            else "A quotient ‖f(x)\u00a0−\u00a0f(x′)‖\u00a0/\u00a0‖x\u00a0−\u00a0x′‖ that was met: "
            "no smaller constant can be true.",
        ),
    ]
    greatest = max(value for _, value, _ in cards if value is not None)
    found = []
    for name, value, meaning in cards:
        gauge = _element("i", "", style=f"width:{100.0 * (value or 0.0) / greatest:.2f}%")
        parts = [
            _element("h3", name),
            _element("p", _number(value), class_="value"),
            _element("div", gauge, class_="gauge", aria_hidden="true"),
            _element("p", meaning),
        ]
        found.append(_element("div", _join(parts), class_="card"))
    return _join([_element("div", _join(found), class_="cards"), _element("p", _between(report))])


def _methods(report: RobustnessReport) -> Markup:
    headings = ["method", "logits", "least pair", "greatest pair", "seconds", "constants used"]
    rows = [
        [
            result.method,
            _number(result.lipschitz),
            _number(result.least_pair),
            _number(result.greatest_pair),
            f"{result.seconds:,.1f}",
            METHODS[result.method],
        ]
        for result in report.methods
    ]
    caption = "Constants by method: of the logits as a vector, and of the difference of two logits"
    return _table("methods", caption, headings, rows, words=1)


def _stages(stages: Sequence[StageProof]) -> Markup:
    headings = ["step", "kind", "states", "prescribed", "proved", "δ", "μ", "rounding", "remark"]
    remarks = [stage.reason or ("" if stage.proved is not None else "nothing proved") for stage in stages]
    rows = [
        [
            stage.name,
            "LBEN" if stage.kind == "lben" else stage.kind,
            _number(stage.states, ","),
            _number(stage.prescribed),
            _number(stage.proved),
            _number(stage.delta, ".1g"),
            _number(stage.mu, ".3g"),
            _number(stage.rounding, ".1e"),
            remark,
        ]
        for stage, remark in zip(stages, remarks, strict=True)
    ]
    caption = "Constants of the steps, in the order of evaluation"
    if any(remarks):
        return _table("proof", caption, headings, rows, words=1)
    return _table("proof", caption, headings[:-1], [row[:-1] for row in rows])


def _json(report: RobustnessReport) -> Markup:
    text = json_text(report.model_dump(mode="json"))
    link = "data:application/json;charset=utf-8," + quote(text, safe=",:[]{}")
    if len(link) <= LONGEST_LINK:
        return _element("p", _element("a", "robustness-report.json", href=link, download="robustness-report.json"))
    summary = _element("summary", f"robustness-report.json, {len(text) / 1e6:.1f} MB")
    return _element("details", _join([summary, _element("pre", text, id="json")]))


# What a reader's browser gets

LIGHT = {
    "--paper": "#ffffff",
    "--ink": "#1c2126",
    "--muted": "#59636e",
    "--rule": "#d3d9df",
    "--panel": "#f5f7f9",
    "--blue": "#0072b2",
    "--vermilion": "#d55e00",
    "--green": "#009e73",
    "--label": "#59636e",
    "--upright": "#b4bcc4",
    "--grid": "#e6e9ec",
    "--band": "#dadee2",
    "--alarm": "#a40e26",
}
DARK = {
    "--paper": "#14181c",
    "--ink": "#e9ecef",
    "--muted": "#a2acb6",
    "--rule": "#3a424a",
    "--panel": "#1d2328",
    "--blue": "#5cb3ec",
    "--vermilion": "#f58f45",
    "--green": "#35c79a",
    "--label": "#a2acb6",
    "--upright": "#59636d",
    "--grid": "#2a3138",
    "--band": "#3d464e",
    "--alarm": "#ff8a94",
}
STYLE = Template("""
:root { color-scheme: light dark; $light }
@media screen and (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 50rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.25rem); line-height: 1.2; margin: 0 0 1rem; }
h1.long { font-size: 1.15rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 0.95rem; margin: 0 0 0.25rem; }
p, ul { margin: 0.75rem 0; max-width: 44rem; }
ul { padding-left: 1.2rem; }
li + li { margin-top: 0.4rem; }
a { color: var(--blue); }
.kicker { margin: 0 0 0.25rem; color: var(--muted); font-size: 0.85rem; letter-spacing: 0.06em; text-transform: uppercase; }
.headline { font-size: clamp(1.15rem, 1rem + 1vw, 1.5rem); line-height: 1.4; margin: 1.75rem 0 1.25rem; }
.warning { border: 2px solid var(--alarm); border-radius: 0.4rem; padding: 0.75rem 1rem; color: var(--alarm);
  font-weight: 600; max-width: none; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 1.75rem; margin: 0; }
.facts div { min-width: 0; }
dt { color: var(--muted); font-size: 0.85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1.75rem; border-radius: 0.3rem; overflow: hidden; gap: 2px; }
.bar span { min-width: 2px; }
.bar span, .key i, .gauge, .gauge i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.certified { background: var(--blue); }
.not { background: var(--band); }
.broken { background: var(--vermilion); }
.wrong { background: repeating-linear-gradient(135deg, var(--label) 0 2px, var(--panel) 2px 6px); }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem; padding: 0; font-size: 0.9rem; max-width: none; }
.key li { margin: 0; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 0.9em; height: 0.9em; border-radius: 0.15em; margin-right: 0.45em;
  vertical-align: -0.08em; border: 1px solid var(--upright); }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; height: auto; fill: var(--ink); }
figure svg * { stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
figcaption, .notes { color: var(--muted); font-size: 0.9rem; line-height: 1.5; }
.narrow { display: none; }
.scroll { overflow-x: auto; margin: 1.25rem 0; border: 1px solid var(--rule); border-radius: 0.4rem; }
.scroll:focus-visible, a:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.92rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0.6rem 0.75rem; color: var(--muted); font-size: 0.9rem; }
caption span { position: sticky; left: 0.75rem; display: inline-block; max-width: calc(100vw - 4rem); }
th, td { padding: 0.45rem 0.75rem; text-align: right; vertical-align: top; overflow-wrap: normal; }
thead th { border-bottom: 1px solid var(--rule); vertical-align: bottom; font-weight: 600; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody th, .words { text-align: left; overflow-wrap: anywhere; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; min-width: 7.5rem; max-width: 16rem; }
thead th:first-child { position: sticky; left: 0; background: var(--paper); }
#proof-table tbody th { min-width: 11rem; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 12rem; }
th small { color: var(--muted); font-weight: 400; margin-left: 0.3rem; }
#accuracy-table th:first-child { white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
.card { background: var(--panel); border: 1px solid var(--rule); border-radius: 0.4rem; padding: 0.9rem 1rem; }
.card p { margin: 0.5rem 0 0; font-size: 0.9rem; }
.card .value { font-size: 1.6rem; line-height: 1.2; margin: 0 0 0.6rem; font-variant-numeric: tabular-nums; }
.gauge { height: 0.4rem; border-radius: 0.2rem; background: var(--band); overflow: hidden; }
.gauge i { display: block; height: 100%; background: var(--blue); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2.5rem; }
.columns h3 { margin-top: 0.5rem; font-size: 1rem; }
pre { white-space: pre-wrap; font-size: 0.8rem; }
footer { margin-top: 3rem; padding-top: 0.75rem; border-top: 1px solid var(--rule); color: var(--muted); font-size: 0.85rem; }
@media screen and (max-width: 36rem) {
  main { padding: 1.5rem 1rem 2rem; }
  .wide { display: none; }
  .narrow { display: block; }
  table { font-size: 0.88rem; }
  caption { padding: 0.6rem 0.5rem; }
  th, td { padding: 0.4rem 0.5rem; }
  tbody th { min-width: 6.5rem; max-width: 9rem; }
  #accuracy-table tbody th { min-width: 0; }
  #proof-table tbody th { min-width: 7.5rem; }
  th small { display: block; margin: 0; }
}
@media print {
  html { font-size: 12.5px; }
  main { max-width: none; padding: 0; }
  h1, h2, h3, caption { break-after: avoid; }
  figure, tr, .card, .bar, .key { break-inside: avoid; }
  .scroll { overflow: visible; border: none; }
  caption, caption span { padding-left: 0; max-width: none; position: static; }
  figure { max-width: 38rem; }
  h2 { margin-top: 2rem; }
  th, td { padding: 0.25rem 0.5rem; }
  td.words { min-width: 0; }
  tbody th, thead th:first-child { position: static; }
  .screen { display: none; }
}
""").substitute(
    light=" ".join(f"{name}: {colour};" for name, colour in LIGHT.items()),
    dark=" ".join(f"{name}: {colour};" for name, colour in DARK.items()),
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="lipconvert $version">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header>
<p class="kicker">Robustness report</p>
$heading
<dl class="facts">
$facts
</dl>
</header>
$warnings
<p class="headline">$headline</p>
$bar

<section aria-labelledby="accuracy">
<h2 id="accuracy">Accuracy within a radius</h2>
$accuracy_figure
$accuracy_table
<p class="notes">$accuracy_notes</p>
</section>

<section aria-labelledby="constants">
<h2 id="constants">Three Lipschitz constants</h2>
$constants
$methods
</section>

<section aria-labelledby="meaning">
<h2 id="meaning">What is certified</h2>
<div class="columns">
<div>
<h3>The certificate says</h3>
$says
</div>
<div>
<h3>It does not say</h3>
$says_not
</div>
</div>
</section>

<section aria-labelledby="margins">
<h2 id="margins">Margins</h2>
$margin_figure
</section>

<section aria-labelledby="proof">
<h2 id="proof">Proof, step by step</h2>
<p>$proof</p>
$stages
<p class="notes">All constants are l2 to l2. δ: the prescribed constant L was proved at L(1 + δ). μ: proved, X(P) ⪰ 2μP in
some diagonal metric P, so the equilibrium exists and is unique. Rounding: the bound of the rounding error of H that the
proof allows for. “$none”: not proved, or not needed for this kind of step.</p>
</section>

<section class="screen" aria-labelledby="data">
<h2 id="data">The report as data</h2>
<p>Everything above, with the certified radius and the margin of every sample.</p>
$json
</section>

<footer>
<p>Written by lipconvert $version. Certified radii after Tsuzuku, Sato and Sugiyama, <cite>Lipschitz-Margin Training</cite>,
NeurIPS 2018; the networks’ common form after Havens, Araujo, Garg, Khorrami and Hu, <cite>Exploiting Connections between
Lipschitz Structures for Certifiably Robust Deep Equilibrium Models</cite>, NeurIPS 2023.</p>
</footer>
</main>
</body>
</html>
"""
