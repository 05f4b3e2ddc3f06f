"""Names and messages that strangers wrote, wherever they are shown: on terminals, in model cards, in pages, tables, figures.

What may reach a terminal is decided here by Unicode's categories, not by the code under test; Markdown is read by
markdown-it, HTML by Python's parser, YAML and JSON by theirs.
"""

import html
import io
import json
import os
import re
import subprocess
import sys
import types
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from lipconvert_plugins.sll import SLLNetwork
from markdown_it import MarkdownIt
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert import cli
from lipconvert.checkpoints import container
from lipconvert.escaping import markdown, paragraph, printable
from lipconvert.experiments import demo, recipes
from lipconvert.foundation.documents import json_text
from lipconvert.interop import hub
from lipconvert.networks.documents import PluginSource, Provenance, TrainingSummary

VERDICTS = re.compile(r"\d+ claims, (none|\d+) of them false")
VERDICT = "7 claims, none of them false"
ARSENAL = {
    "screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "repaint": f"x\r{VERDICT}",
    "line up": f"x\x1b[1A\x1b[2K{VERDICT}",
    "C1": "\x9b2J\x9d0;owned\x9c",
    "back": "FAILED\b\b\b\b\b\bok",
    "newline": f"x\n{VERDICT}",
    "other lines": f"x\x0b\x0c\x85\u2028\u2029{VERDICT}",
    "bidi": "\u202efailed\u202c \u2066a\u2069 \u200f",
    "no width": "a\u200bb\u200dc\ufeffd\u2060e\u00ad",
    "tags": "a\U000e0041\U000e007f",
    "rich": "[red]x[/red] [link=http://evil.example]y[/link] [/] [bold :warning: \\[x",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)> &lt; \" ' -->",
    "Markdown": "](http://evil.example) `x` | y | **z** ![p](http://evil.example/p.png) <b> \\| \\` https://evil.example",
    "YAML": "---\nlicense: evil\n---",
    "formula": "$\\frac{$ _x $x_{$",
    "format": "%s {0} {x} %n $title",
    "null": "a\x00b\x7f",
}
EVERYTHING = " ".join(ARSENAL.values())
# Of a folder or a file, which no "/" and no NUL may be in, and of a module, in which there is no dot.
FILE = "".join(c for c in EVERYTHING if c not in "/\x00.\\")[:80] + "\x1b[2J\x9b\u202e$\n"
ORDINARY = "λ-Netz Ψ″ 网络 ネット сеть é e\u0301 👩 🦊 ½ ‖·‖ \u3000x\u00a0y"


def clean(text, newline=True):
    """Whether nothing in a text does anything but being printed in its place."""
    odd = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return not [c for c in text if unicodedata.category(c) in odd and not (newline and c == "\n")]


def run(*arguments, code=0):
    """The two streams of a command, as they are in bytes."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    for stream in (result.stdout_bytes, result.stderr_bytes):
        assert clean(stream.decode()), stream
    return result.stdout_bytes.decode(), result.stderr_bytes.decode()


def small(seed=0):
    torch.manual_seed(seed)
    return SLLNetwork(inputs=64, classes=10, dense_depth=1, dense_inner=3)


def named(name):
    """A network with a name in every field that takes one."""
    net = lc.convert(small(), (64,), check=False)
    net.stages[0].name = name
    net.class_names = tuple(f"{name} {k}" for k in range(10))
    plugin = PluginSource(name=name, distribution=name, version=name)
    net.provenance = Provenance(model=name, sha256=name, plugins=[plugin], versions={name: name})
    net.training_summary = TrainingSummary(data=name, epochs=1, notes={name: name})
    return net


class TestPrintable:
    @pytest.mark.parametrize("text", ARSENAL.values(), ids=list(ARSENAL))
    def test_nothing_odd_is_left_and_it_can_be_seen(self, text):
        shown = printable(text)
        assert clean(shown, newline=False)
        assert printable(shown) == shown

    def test_every_character_alone(self):
        for number in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0200)):
            c = chr(number)
            shown = printable(c)
            assert clean(shown, newline=False), hex(number)
            assert shown == c or shown.encode("ascii").decode("unicode_escape") == c

    def test_ordinary_text_stays(self):
        assert printable(ORDINARY) == ORDINARY
        assert printable("") == ""

    def test_halves_of_characters(self):
        assert printable("a\udcffb") == "a\\udcffb"

    def test_a_line_within_a_message_is_no_line_of_ours(self):
        text = f"two errors\n{VERDICT}\n    so\rthere"
        assert paragraph(text).split("\n") == ["two errors", f"    {VERDICT}", "    so\\rthere"]
        assert paragraph(paragraph(text)) == paragraph(text)

    @pytest.mark.parametrize("text", [*ARSENAL.values(), EVERYTHING], ids=[*ARSENAL, "all"])
    def test_errors_of_the_library(self, text):
        errors = [
            lc.CheckpointError(text, text, text),
            lc.InvalidParameterError(text, text, text),
            lc.ShapeError(text, text, text),
            lc.PluginError(text, text),
            lc.UnsupportedModuleError(text, text, text),
        ]
        for error in errors:
            error.layer = text
            assert clean(str(error))
            assert not any(line.startswith(VERDICT) for line in str(error).split("\n"))
        assert errors[0].path == text


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def rendered(text):
    """Markdown as GitHub and the Hub read it, with tables and HTML."""
    return Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


class TestMarkdown:
    @pytest.mark.parametrize("text", [*ARSENAL.values(), ORDINARY, EVERYTHING], ids=[*ARSENAL, "ordinary", "all"])
    def test_it_reads_as_it_is_shown_on_a_terminal(self, text):
        page = rendered(f"before {markdown(text)} behind")
        assert [tag for tag, _ in page.tags] == ["p"]
        assert page.text.split() == f"before {printable(text)} behind".split()
        table = rendered(f"| a | b |\n|:--|--:|\n| {markdown(text)} | 1 |\n")
        assert [tag for tag, _ in table.tags] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
        assert "".join(table.text.split()) == "".join(f"ab{printable(text)}1".split())

    def test_addresses_are_no_links(self):
        for text in ("https://evil.example", "www.evil.example", "WWW.evil.example", "a@evil.example", "mailto:a@b.c"):
            assert not re.search(r"https?://|www\.|\w@\w|\w:\w", markdown(text), re.IGNORECASE)

    def test_the_card(self, tmp_path):
        net = named(EVERYTHING)
        x = torch.rand(6, 64)
        with torch.no_grad():
            data = list(zip(x, net(x).argmax(1), strict=True))
        report = lc.certify(net, data, (0.01,), "prescribed", name=EVERYTHING, model=EVERYTHING)
        hub.write_folder(net, tmp_path, report)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert clean(text)
        _, front, body = text.split("---\n", 2)
        assert set(yaml.safe_load(front)) == {"library_name", "tags"}
        plain = hub.card(named("x").info(), report.model_copy(update={"data": "x"})).split("---\n", 2)[2]
        assert [tag for tag, _ in rendered(body).tags][:12] == [tag for tag, _ in rendered(plain).tags][:12]
        assert {tag for tag, _ in rendered(body).tags} <= {
            *("h1", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"),
        }
        assert "onerror" in rendered(body).text
        json.loads((tmp_path / "config.json").read_text(encoding="ascii"))
        assert lc.from_hub(tmp_path).stages[0].name == EVERYTHING

    def test_tables_of_recipes(self):
        table = rendered(recipes.markdown(["recipe", "data"], [[EVERYTHING, EVERYTHING], ["a_b", "1"]], left=1))
        assert [tag for tag, _ in table.tags].count("td") == 4
        assert {tag for tag, _ in table.tags} == {"table", "thead", "tbody", "tr", "th", "td"}


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))

    @pytest.mark.parametrize("text", [*ARSENAL.values(), EVERYTHING], ids=[*ARSENAL, "all"])
    def test_names_in_a_file(self, text, tmp_path):
        lc.save(named(text), "net.onnx")
        shown, _ = run("info", "net.onnx")
        assert f"classes: {printable(text)} 0," in shown
        assert f"from {printable(text)}, {printable(text)} (" in shown
        assert f"trained on: {printable(text)}, 1 epochs" in shown
        document = run("info", "net.onnx", "--json")[0]
        assert document.isascii()
        assert json.loads(document)["class_names"][0] == f"{text} 0"
        shown, _ = run("verify", "net.onnx")
        assert len(shown.splitlines()) == 8
        assert shown.splitlines()[-1] == VERDICT
        assert all(line.startswith("ok      ") for line in shown.splitlines()[:-1])
        # a false one, by whatever name, is called false
        content = bytearray(Path("net.safetensors").read_bytes())
        content[-1] ^= 1
        Path("net.safetensors").write_bytes(content)
        shown, _ = run("verify", "net.onnx", code=1)
        assert shown.splitlines()[-1] == "1 claims, 1 of them false"
        assert json.loads(run("verify", "net.onnx", "--json", code=1)[0])["passed"] is False

    def test_every_other_command_on_such_a_file(self, monkeypatch):
        net = named(EVERYTHING)
        lc.save(net, "net.onnx")
        module = types.ModuleType("my_models")
        module.small = small
        monkeypatch.setitem(sys.modules, "my_models", module)
        options = ("--data", "digits", "--limit", 12, "--method", "prescribed", "--radii", "0.1")
        run("certify", "net.onnx", *options, "--report", "page.html")
        page = Path("page.html").read_text(encoding="utf-8")
        assert clean(page)
        assert html.escape(printable(EVERYTHING)) in page
        assert not [tag for tag, _ in Tags(page).tags if tag in ("script", "img", "b")]
        run("tighten", "net.onnx", "--method", "prescribed")
        run("validate", "my_models:small", "--net", "net.onnx")
        run(
            "export",
            "net.onnx",
            "--out",
            "out.onnx",
            "--embed",
            "--class-names",
            ",".join(f"\x1b[{k}" for k in range(10)),
        )
        run("export", "net.onnx", "--out", "plain.onnx", "--explicit")
        run("finetune", "net.onnx", "--data", "digits", "--limit", 20, "--set", "epochs=1", "--out", FILE)
        assert lc.load(Path(FILE, "net.onnx")).stages[0].name == EVERYTHING

    def strings(self, part, path=()):
        """The place of every text in a manifest."""
        if isinstance(part, str):
            yield path
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            yield from self.strings(value, (*path, key))

    def test_every_text_of_a_manifest_forged(self, tmp_path):
        """Signed anew, with any text in any field: refused or not, nothing but text is printed."""
        path = tmp_path / "net.safetensors"
        lc.save(named("x"), path)
        stored = container.read(path)
        places = list(self.strings(json.loads(stored.manifest.model_dump_json())))
        assert len(places) > 50
        for place in places:
            forged = json.loads(stored.manifest.model_dump_json())
            inner = forged
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = EVERYTHING
            # what `write_data` asks of a manifest, with a text that no `Manifest` would take
            text = types.SimpleNamespace(model_dump_json=lambda forged=forged: json.dumps(forged, ensure_ascii=False))
            container.write_data(path, stored.tensors, text)
            for command in ("info", "verify"):
                result = CliRunner().invoke(cli.app, [command, str(path)])
                assert result.exit_code in (0, 1, 2), (place, result.exception)
                assert clean(result.stdout_bytes.decode()), place
                assert clean(result.stderr_bytes.decode()), place
                verdicts = [bool(VERDICTS.fullmatch(line)) for line in result.stdout.splitlines()]
                assert sum(verdicts) == (command == "verify"), (place, result.stdout)
                assert command == "info" or verdicts[-1], place
        # names of tensors that nobody asked for, and what else is in a header
        container.write_data(path, {**stored.tensors, EVERYTHING: torch.zeros(2)}, stored.manifest)
        run("info", path, code=2)
        run("verify", path, code=1)

    def test_texts_of_a_graph_forged(self, tmp_path):
        path = tmp_path / "net.onnx"
        lc.save(named("x"), path, embed=True)
        model = onnx.ModelProto.FromString(path.read_bytes())
        del model.metadata_props[-1]  # its hash, which is written anew
        text = "".join(c for c in EVERYTHING if c != "\x00")
        model.doc_string = model.graph.doc_string = model.producer_name = model.graph.name = text
        model.graph.node[0].name = model.graph.node[0].doc_string = model.graph.node[0].op_type = text
        model.graph.output[0].name = model.functions[0].name = model.opset_import.add(version=1).domain = text
        model.training_info[0].algorithm.initializer[0].name = text
        container.write_graph(path, model)
        run("info", path, code=2)
        run("verify", path, code=1)

    def test_names_of_files_and_arguments(self, tmp_path):
        folder = tmp_path / FILE
        folder.mkdir()
        net = named("x")
        for name in ("net.onnx", "alone.safetensors", " two  spaces.onnx", "\"quoted'.onnx", "[red]x.onnx", "-x.onnx"):
            lc.save(net, folder / name)
            shown, _ = run("verify", folder / name)
            assert shown.splitlines()[-1].endswith("claims, none of them false")
            run("info", folder / name)
            run("verify", folder / ("no" + name), code=2)
            (folder / f"bad{name}").write_bytes(b"x")
            run("info", folder / f"bad{name}", code=2)
        run("info", folder, code=2)
        run("info", EVERYTHING.replace("\x00", ""), code=2)
        run("info", f"{FILE.replace(' ', '')}:x", code=2)
        run(EVERYTHING, code=2)
        run("verify", "x.onnx", EVERYTHING, code=2)
        run("verify", f"--{EVERYTHING}", code=2)
        run("verify", "x.onnx", "--seed", EVERYTHING, code=2)
        run("certify", folder / "net.onnx", "--data", EVERYTHING, code=2)
        run("convert", "x:y", "--out", folder / "x.pt", code=2)
        run("finetune", folder / "x.yaml", code=2)
        (folder / "x.yaml").write_text("title: [\x1b[2J\n", encoding="utf-8")
        run("finetune", folder / "x.yaml", code=2)
        run("table", folder, code=2)
        run("info", "x" * 300 + ".onnx", code=2)
        run("info", "x/" * 3000 + "net.onnx", code=2)

    @pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are a matter of POSIX")
    def test_names_that_are_no_text(self, tmp_path):
        name = os.fsdecode(b"p\xff\xe4d")
        with pytest.raises(lc.CheckpointError, match="no text"):
            lc.save(named("x"), tmp_path / f"{name}.onnx")
        with pytest.raises(lc.CheckpointError, match="backslash"):
            lc.save(named("x"), tmp_path / "a\\b.onnx")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(lc.CheckpointError, match=r"class_names\.0"):
            lc.save(named("\udcff"), tmp_path / "net.onnx")
        (tmp_path / name).mkdir()
        lc.save(named("x"), tmp_path / name / f"{name}.safetensors")
        lc.save(named("x"), tmp_path / name / f"{name}.onnx", embed=True)
        shown, _ = run("info", tmp_path / name / f"{name}.onnx")
        assert run("info", tmp_path / name / f"{name}.safetensors", "--json")[0].isascii()
        shown, _ = run("verify", tmp_path / name / f"{name}.safetensors")
        assert shown.splitlines()[-1].endswith("none of them false")
        assert "p\\udcff\\udce4d" in shown
        document = json.loads(run("verify", tmp_path / name / f"{name}.safetensors", "--json")[0])
        assert document["path"] == str(tmp_path / name / f"{name}.safetensors")
        options = ("--data", "digits", "--limit", 5, "--method", "prescribed", "--report", tmp_path / name / "x.html")
        run("certify", tmp_path / name / f"{name}.safetensors", *options)
        run("verify", tmp_path / f"{name}.onnx", code=2)

    def test_models_of_strangers(self, monkeypatch):
        layer = type("\x1b[2JLayer\u202e", (nn.Module,), {"forward": lambda self, x: x})
        text = EVERYTHING.replace(".", "")

        def layers(*, known):
            model = nn.Sequential()
            model.add_module(text, small() if known else layer())
            model.input_shape = (64,)
            return type(text.replace("\x00", ""), (nn.Sequential,), {})(model)

        def failing():
            raise RuntimeError(EVERYTHING)

        module = types.ModuleType("my_models")
        module.known, module.unknown, module.failing = lambda: layers(known=True), lambda: layers(known=False), failing
        setattr(module, "\x1b[2J", 1)
        monkeypatch.setitem(sys.modules, "my_models", module)
        shape = ("--input-shape", 64)
        shown, _ = run("convert", "my_models:known", "--out", "net.onnx", *shape)
        assert "validation passed" in shown
        run("validate", "my_models:known", *shape)
        run("info", "my_models:known", *shape)
        assert run("info", "my_models:known", *shape, "--json")[0].isascii()
        run("verify", "net.onnx")
        assert "\\x1b[2JLayer\\u202e" in run("info", "my_models:unknown", *shape, code=2)[1]
        assert "RuntimeError: \\x1b[2J" in run("info", "my_models:failing", code=2)[1]
        run("info", "my_models:nothing", code=2)
        torch.save({f"{EVERYTHING}": torch.zeros(2)}, "weights.pt")
        run("info", "weights.pt", code=2)
        run("info", "my_models:known", "--weights", "weights.pt", *shape, code=2)

    def test_plugins_of_strangers(self, monkeypatch):
        said = lc.PluginInfo(EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING)
        strange = [
            lc.Plugin(EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING, info=said),
            lc.Plugin(EVERYTHING, EVERYTHING, EVERYTHING, EVERYTHING, error=EVERYTHING),
        ]
        monkeypatch.setattr(cli, "registered", lambda: [*lc.plugins(), *strange])
        shown, _ = run("plugins")
        assert "not loaded: \\x1b[2J\\x1b[H" in shown
        assert json.loads(run("plugins", "--json")[0])["plugins"][-1]["error"] == EVERYTHING

    @pytest.mark.parametrize("said", ["text", lc.PluginInfo("a", None, "c", "d"), lc.PluginInfo("a", "b", 1.0, "d")])
    def test_a_plugin_that_says_no_text_is_refused(self, said):
        class Strange:
            @lc.hookimpl
            def to_dae(self, model):
                return None

            @lc.hookimpl
            def describe(self):
                return said

        with pytest.raises(lc.PluginError, match="PluginInfo of texts"):
            lc.registry().register(Strange(), "strange")
        assert "strange" not in lc.registry().names()

    def test_the_demo_of_a_plugin_of_strangers(self, tmp_path):
        class Strange:
            @lc.hookimpl
            def to_dae(self, model):
                return None

            @lc.hookimpl
            def new_model(self, inputs, classes, seed):
                return small(seed)

        names = [EVERYTHING, "_x"]
        for name in names:
            lc.registry().register(Strange(), name)
        try:
            chosen = [part for name in names for part in ("--architecture", name)]
            shown, _ = run("demo", "--out", FILE, "--epochs", 1, "--limit", 20, *chosen)
        finally:
            for name in names:
                lc.registry().unregister(name)
        assert shown.splitlines()[-1].startswith("wrote ")
        text = (tmp_path / FILE / "report.md").read_text(encoding="utf-8")
        assert clean(text)
        page = rendered(text)
        assert [tag for tag, _ in page.tags].count("td") == 2 * (len(demo.HEADINGS) + 4)
        assert [entry["src"] for tag, entry in page.tags if tag == "img"] == ["certified-accuracy.png"]
        assert (tmp_path / FILE / "report.json").read_text(encoding="utf-8").isascii()

    def test_a_terminal_gets_the_controls_of_rich_alone(self, monkeypatch):
        files = []

        def console(*, stderr=False):
            files.append(io.StringIO())
            return Console(file=files[-1], force_terminal=True, width=200, highlight=False)

        monkeypatch.setattr(cli, "_console", console)
        lc.save(named(EVERYTHING), "net.onnx")
        assert CliRunner().invoke(cli.app, ["verify", "net.onnx"]).exit_code == 0
        assert CliRunner().invoke(cli.app, ["info", "net.onnx"]).exit_code == 0
        with cli._progress() as bars:
            bars.add_task(f"[red]{EVERYTHING}", total=3)
            bars.refresh()
        text = "".join(file.getvalue() for file in files)
        assert "[red]\\x1b[2J" in text
        for text_of_ours in ("\x1b[2J", "\x1b]", "\x9b", "\u202e", "\x1b[H", "\b", "\x07", "\x1b[31m"):
            assert text_of_ours not in text


def test_figures_name_what_is_drawn(tmp_path, monkeypatch):
    """No name is a formula or left out, whatever it begins with."""
    from matplotlib.figure import Figure

    from lipconvert.experiments import curves

    net = lc.convert(small(), (64,), check=False)
    x = torch.rand(6, 64)
    with torch.no_grad():
        data = list(zip(x, net(x).argmax(1), strict=True))
    report = lc.certify(net, data, (0.01,), "prescribed")
    names = [*ARSENAL.values(), "_x", ""]
    rows = [types.SimpleNamespace(architecture=name, robustness=report) for name in names]
    seen, real = [], Figure.savefig

    def saved(figure, *arguments, **options):
        seen.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    curves.plot_certified_accuracy(rows, tmp_path / "x.png", "title")
    assert len(seen) == len(names)
    for found, name in zip(seen, names, strict=True):
        assert found == printable(name) or (len(found) == 40 and printable(name).startswith(found[:39]))
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_json_is_ascii_and_reads_back():
    for text in (*ARSENAL.values(), ORDINARY, "\udcff"):
        written = json_text({"a": text})
        assert written.isascii()
        assert clean(written)
        assert json.loads(written) == {"a": text}


# Every command in one process whose locale and streams know ASCII alone.
ASCII = """
import json, sys, traceback
import torch
sys.path.insert(0, {models!r})
from lipconvert import cli
codes = []
for arguments in json.loads({commands!r}):
    try:
        cli.app([a.encode("utf-8").decode(sys.getfilesystemencoding(), "surrogateescape") for a in arguments])
    except SystemExit as left:
        codes.append(left.code)
    except Exception:
        traceback.print_exc()
        codes.append(99)
    print("code", codes[-1], flush=True)
assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
"""


@pytest.fixture(scope="module")
def in_ascii(tmp_path_factory):
    """The exit codes of commands on paths that are not ASCII, and what they have printed."""
    folder = tmp_path_factory.mktemp("ascii") / "pfäd λ"
    folder.mkdir()
    models = "import torch\nfrom lipconvert_plugins.sll import SLLNetwork\ndef small():\n    torch.manual_seed(0)\n"
    models += "    return SLLNetwork(inputs=64, classes=10, dense_depth=1, dense_inner=3)\n"
    (folder.parent / "my_ascii_models.py").write_text(models, encoding="utf-8")
    torch.manual_seed(0)
    torch.save(small().state_dict(), folder / "wä.pt")
    lc.save(named(ORDINARY), folder / "nämes.safetensors", prove=False)
    pair, names, quickly = f"{folder}/nλt.onnx", f"{folder}/nämes.safetensors", ("--method", "prescribed")
    report = ("--data", "digits", "--limit", "10", "--report", f"{folder}/ré.html", "--resume", f"{folder}/sö")
    commands = {
        "convert": ("convert", "my_ascii_models:small", "--out", pair, "--weights", f"{folder}/wä.pt"),
        "info": ("info", pair),
        "info of names": ("info", names),
        "info as JSON": ("info", names, "--json"),
        "tighten": ("tighten", pair, *quickly),
        "certify": ("certify", pair, *quickly, *report),
        "export": ("export", pair, "--out", f"{folder}/ö.onnx", "--embed"),
        "verify the data": ("verify", names),
        "verify": ("verify", pair),
        "verify one file": ("verify", f"{folder}/ö.onnx"),
    }
    code = ASCII.format(models=str(folder.parent), commands=json.dumps(list(commands.values())))
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=300)
    printed = done.stdout.decode("ascii")
    parts = re.split(r"^code (\d+)\n", printed, flags=re.MULTILINE)
    found = dict(zip(commands, zip(map(int, parts[1::2]), parts[0::2], strict=False), strict=False))
    return found, done.stderr.decode(errors="replace")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system's names are UTF-8 in any locale")
@pytest.mark.parametrize(
    "command",
    [
        *("convert", "info", "info of names", "info as JSON", "tighten", "certify", "export"),
        *("verify the data", "verify", "verify one file"),
    ],
)
def test_where_everything_is_ascii(command, in_ascii):
    """An honest file has exit code 0, whatever it is called and whatever the streams can write."""
    found, errors = in_ascii
    assert command in found, errors
    code, printed = found[command]
    assert code == 0, (printed, errors)
    if command.startswith("verify"):
        assert "none of them false" in printed
    if command == "info as JSON":
        assert json.loads(printed)["class_names"][0] == f"{ORDINARY} 0"
    if command == "info of names":
        assert "\\u03bb-Netz" in printed
