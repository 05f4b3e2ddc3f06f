"""The command line: exit codes, what stands where, and numbers that agree with the Python API and with plain torch."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLConv2d, SLLNetwork
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert import cli, data
from lipconvert.certification.documents import AttackConfig, LipschitzReport, RobustnessReport
from lipconvert.conversion.documents import ValidationReport
from lipconvert.experiments import demo
from lipconvert.experiments.documents import DemoReport
from lipconvert.networks.documents import NetworkInfo
from lipconvert.plugin_api.documents import PluginList


def flat():
    torch.manual_seed(0)
    return SLLNetwork(inputs=64, classes=10)


def image():
    torch.manual_seed(0)
    model = nn.Sequential(lc.Normalize([0.5], [0.25]), nn.Flatten(), SLLNetwork(inputs=64, classes=10))
    model.input_shape = (1, 8, 8)
    return model


def convolution():
    torch.manual_seed(0)
    return SLLNetwork(image=8, in_channels=1, channels=2, inner=3, conv_depth=2, dense_depth=1)


def padded():
    torch.manual_seed(0)
    layer = SLLConv2d(1, 2, padding_mode="zeros")
    model = nn.Sequential(layer, lc.MeanPool(2), nn.Flatten(), lc.FirstFeatures(10))
    model.input_shape = (1, 8, 8)
    return model


def chatty():
    print("a factory that talks")
    return flat()


def failing():
    raise ZeroDivisionError("one over nothing")


def leaving():
    sys.exit("bye")


def nothing():
    return None


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A module ``my_models`` of factories, and an empty current folder."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("my_models")
    for factory in (flat, image, convolution, padded, chatty, failing, leaving, nothing):
        setattr(module, factory.__name__, factory)
    module.built, module.number = flat(), 3
    monkeypatch.setitem(sys.modules, "my_models", module)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command line puts the current folder there
    return module


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def test_plugins_lists_what_is_registered():
    listed = PluginList.model_validate(as_json("plugins"))
    assert [p.name for p in listed.plugins] == [p.name for p in lc.plugins()]
    shown = run("plugins").stdout
    assert all(p.name in shown for p in lc.plugins())


def test_a_refused_plugin_is_listed_with_its_reason(monkeypatch):
    broken = lc.Plugin("broken", "broken-dist", "9.9", "broken.module", error="ImportError: no such thing")
    monkeypatch.setattr(cli, "registered", lambda: [*lc.plugins(), broken])
    assert "not loaded: broken (broken-dist 9.9): ImportError: no such thing" in run("plugins").stdout
    assert as_json("plugins")["plugins"][-1]["error"] == "ImportError: no such thing"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_convert_writes_the_same_function(tmp_path, dtype):
    document = as_json("convert", "my_models:flat", "--out", "sub/net.safetensors", "--dtype", dtype)
    net = lc.load(tmp_path / "sub" / "net.safetensors")
    x = torch.randn(20, 64)
    with torch.no_grad():
        expected, found = flat()(x), net(x.to(getattr(torch, dtype)))
    assert found.dtype is getattr(torch, dtype)
    tolerance = 1e-12 if dtype == "float64" else 1e-5  # what a conversion promises, or better
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["net.safetensors"]
    assert NetworkInfo.model_validate(document["network"]) == net.info()
    assert ValidationReport.model_validate(document["validation"]).passed
    assert document["out"] == os.path.join("sub", "net.safetensors")


def test_convert_prints_steps_constant_and_checks():
    shown = run("convert", "my_models:image", "--out", "net.safetensors").stdout
    for text in (
        "Normalize",
        "sll0 > 2.sll1",
        "L = 4",
        "least eigenvalue of H",
        "validation passed",
        "wrote net.safetensors",
    ):
        assert text in shown


def different(monkeypatch):
    """Conversions go wrong by 1e-6 in one bias."""
    right = cli.convert_model

    def wrong(*arguments, **options):
        net = right(*arguments, **options)
        with torch.no_grad():
            net.stages[0].b_y[0] += 1e-6
        return net

    monkeypatch.setattr(cli, "convert_model", wrong)


@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_network_that_is_not_its_source_is_exit_code_1_and_never_written(tmp_path, monkeypatch, before):
    different(monkeypatch)
    target = tmp_path / "net.safetensors"
    if before is not None:
        target.write_bytes(before)
    result = run("convert", "my_models:flat", "--out", target, code=1)
    assert "FAILED" in result.stdout
    assert "error: validation failed: output: LBEN - source (network)" in result.stderr
    assert (target.read_bytes() if target.exists() else None) == before
    document = as_json("convert", "my_models:flat", "--out", target, code=1)
    assert document["out"] is None
    assert not document["validation"]["passed"]
    assert (target.read_bytes() if target.exists() else None) == before


def test_validate_compares_a_checkpoint_with_its_own_source_only(models):
    assert ValidationReport.model_validate(as_json("validate", "my_models:flat")).passed
    run("convert", "my_models:flat", "--out", "net.safetensors")
    assert as_json("validate", "my_models:flat", "--net", "net.safetensors")["passed"]
    run("convert", "my_models:flat", "--delta", "1e-3", "--out", "inflated.safetensors")
    assert as_json("validate", "my_models:flat", "--net", "inflated.safetensors")["passed"]  # it knows its own delta
    assert not as_json("validate", "my_models:flat", "--net", "inflated.safetensors", "--delta", "1e-2", code=1)[
        "passed"
    ]
    other = flat()
    with torch.no_grad():
        other.sll1.bias[0] += 0.5
    models.other = lambda: other
    result = run("validate", "my_models:other", "--net", "net.safetensors", code=1)
    assert "FAILED" in result.stdout
    assert result.stderr.startswith("error: validation failed")
    assert not as_json("validate", "my_models:other", "--net", "net.safetensors", code=1)["passed"]


def test_epsilon_and_delta_reach_the_network():
    document = as_json("info", "my_models:flat", "--epsilon", "1e-3", "--delta", "0.1")
    assert document["steps"][0]["epsilon"] == 1e-3
    assert document["lipschitz"] == pytest.approx(1.1, rel=1e-14)  # one product


def plain_accuracies(model, x, labels, L, radii):
    """Natural and certified accuracy of the explicit network, by its definition."""
    with torch.no_grad():
        y = model(x).tolist()
    margins = [row[k] - max(v for j, v in enumerate(row) if j != k) for row, k in zip(y, labels.tolist(), strict=True)]
    return [sum(m > math.sqrt(2) * L * r for m in margins) / len(margins) for r in (0.0, *radii)]


@pytest.mark.parametrize("factory", ["flat", "image", "convolution"])
def test_certify_counts_margins(factory, models):
    model = getattr(models, factory)()
    L = 4.0 if factory == "image" else 1.0
    x, labels = data.load("digits").tensors()
    x = (x.flatten(1) if factory == "flat" else x)[:100].double()
    expected = plain_accuracies(model, x, labels[:100], L, (0.01, 36 / 255))
    arguments = ("certify", f"my_models:{factory}", "--data", "digits", "--limit", 100, "--radii", "36/255, 0.01")
    report = RobustnessReport.model_validate(as_json(*arguments))
    assert report.samples == 100
    assert report.lipschitz == pytest.approx(L, rel=1e-14)  # one product
    assert report.radii == [0.01, 36 / 255]
    # Counts out of 100: margins are equal to 1e-14, δ is 1e-6, and none lies that close to a threshold.
    assert [report.natural_accuracy, *report.methods[0].certified_accuracy] == expected
    assert all(best >= least for best, least in zip(report.certified_accuracy, expected[1:], strict=True))
    assert expected[0] > 0.0
    run("convert", f"my_models:{factory}", "--out", "net.safetensors")
    again = RobustnessReport.model_validate(as_json("certify", "net.safetensors", *arguments[2:]))
    assert (again.certified_accuracy, again.margins) == (report.certified_accuracy, report.margins)
    assert f"{100 * expected[0]:.2f}" in run(*arguments).stdout


def test_certify_beside_an_attack(models, tmp_path):
    """The numbers are those of the Python API on the same data; the page is written; the second time nothing is computed."""
    arguments = (
        "certify",
        "my_models:flat",
        "--data",
        "digits",
        "--limit",
        40,
        "--radii",
        "0.05,36/255",
        "--batch-size",
        16,
    )
    options = ("--attack", "apgd", "--steps", 5, "--restarts", 2, "--box", "0,1", "--attack-samples", 30)
    files = ("--report", "out/page.html", "--resume", "parts")
    report = RobustnessReport.model_validate(as_json(*arguments, *options, *files))
    samples = data.Shaped(data.load("digits"), (64,), 40)
    config = AttackConfig(method="apgd", steps=5, restarts=2, box=(0.0, 1.0), samples=30)
    expected = lc.certify(lc.convert(flat()), samples, [0.05, 36 / 255], batch_size=16, attack=config)
    assert (report.attack.method, report.attack.samples, report.attack.box) == ("apgd", 30, (0.0, 1.0))
    assert report.attack.attacked_accuracy == expected.attack.attacked_accuracy
    assert report.certified_accuracy == expected.certified_accuracy
    assert report.sample_radii == pytest.approx(expected.sample_radii, rel=1e-9)
    assert report.attack.broken == 0
    assert (report.model, report.data) == ("my_models:flat", "digits, test")
    assert (tmp_path / "out" / "page.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["shard-00000.safetensors"]
    written = (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns
    shown = run(*arguments, *options, *files).stdout
    assert (tmp_path / "parts" / "shard-00000.safetensors").stat().st_mtime_ns == written
    assert f"{100 * report.attack.attacked_accuracy[0]:.2f}" in shown
    assert "apgd-5" in shown
    assert "the attack saw the first 30 samples" in shown
    assert "folder" in run(*arguments, "--resume", "parts", "--method", "prescribed", code=2).stderr


@pytest.mark.parametrize("method", ["prescribed", "pairwise"])
def test_certify_by_a_weaker_method(method):
    arguments = ("certify", "my_models:flat", "--data", "digits", "--limit", 20, "--method", method)
    report = RobustnessReport.model_validate(as_json(*arguments))
    assert (report.method, report.methods[-1].method) == (method, method)
    assert "tightened" not in run(*arguments).stdout


@pytest.mark.parametrize("factory", ["flat", "convolution"])
def test_tighten_prints_what_is_proved(factory, models):
    found = LipschitzReport.model_validate(as_json("tighten", f"my_models:{factory}"))
    net = lc.convert(getattr(models, factory)())
    expected = lc.lipschitz_bound(net)
    assert found.lipschitz == pytest.approx(expected.lipschitz, rel=1e-9)
    assert found.prescribed == pytest.approx(1.0, rel=1e-14)
    assert len(found.pairs) == 45
    assert all(p.lipschitz == pytest.approx(float(expected.pairs[p.i, p.j]), rel=1e-9) for p in found.pairs)
    shown = run("tighten", f"my_models:{factory}").stdout
    assert f"{found.lipschitz:.7g}" in shown
    assert all(stage.name in shown for stage in found.stages if stage.kind == "lben")
    run("convert", f"my_models:{factory}", "--out", "net.safetensors")
    again = LipschitzReport.model_validate(as_json("tighten", "net.safetensors", "--method", "pairwise"))
    assert (again.method, again.prescribed) == ("pairwise", found.prescribed)
    assert all(p.lipschitz >= q.lipschitz * (1 - 1e-9) for p, q in zip(again.pairs, found.pairs, strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("certify", "my_models:flat", "--data", "digits", "--method", "hope"), "method"),
        (("certify", "my_models:flat", "--data", "digits", "--seconds", "-1"), "seconds"),
        (("certify", "my_models:flat", "--data", "digits", "--batch-size", "0"), "batch_size"),
        (
            ("certify", "my_models:flat", "--data", "digits", "--attack", "hope"),
            "--attack is hope, but it must be one of pgd, apgd, ensemble",
        ),
        (("certify", "my_models:flat", "--data", "digits", "--attack", "pgd", "--steps", "0"), "--steps is 0"),
        (
            ("certify", "my_models:flat", "--data", "digits", "--attack", "pgd", "--attack-samples", "-1"),
            "--attack-samples",
        ),
        (("certify", "my_models:flat", "--data", "digits", "--steps", "3"), "--attack pgd is missing"),
        (("certify", "my_models:flat", "--data", "digits", "--box", "0,1"), "--attack pgd is missing"),
        (("certify", "my_models:flat", "--data", "digits", "--report", "out.pdf"), "NAME.html"),
        (("certify", "my_models:flat", "--data", "digits", "--attack", "pgd", "--box", "1"), "--box is 1, but"),
        (("certify", "my_models:flat", "--data", "digits", "--attack", "pgd", "--box", "1,0"), "box"),
        (("tighten", "my_models:flat", "--method", "hope"), "method"),
        (("tighten", "my_models:flat", "--seconds", "0"), "seconds"),
    ],
)
def test_what_a_certificate_cannot_be_asked_for(arguments, said):
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_a_report_that_is_a_folder_is_noticed_first():
    Path("pages.html").mkdir()
    result = run("certify", "my_models:flat", "--data", "imagenet", "--report", "pages.html", code=2)
    assert "that is a folder" in result.stderr


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--data", "imagenet"), "digits, mnist"),
        (("--data", "mnist", "--data-dir", "nowhere"), "download=True"),
        (("--data", "digits", "--limit", "0"), "limit"),
        (("--data", "digits", "--radii", "a"), "--radii"),
        (("--data", "digits", "--radii", "1/0"), "--radii"),
        (("--data", "digits", "--radii=-1"), "negative"),
        (("--data", "digits", "--split", "all"), "train, test"),
    ],
)
def test_certify_on_what_is_not_there(extra, said):
    result = run("certify", "my_models:flat", *extra, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr


def test_certify_with_images_of_another_size(models):
    models.small = lambda: SLLNetwork(inputs=5, classes=3)
    assert "(1, 8, 8)" in run("certify", "my_models:small", "--data", "digits", code=2).stderr


def without_proofs(info):
    """What ``info`` says of a checkpoint, but for what only a checkpoint has: every stage has been proved."""
    for step in info["steps"]:
        proved = step["certificate"]
        assert (proved is None) == (step["kind"] == "glue")
        if proved is not None:
            assert step["lipschitz"] <= proved["lipschitz"] == pytest.approx(step["lipschitz"], rel=1e-2)
        step["certificate"] = None
    return info


def test_info_of_a_checkpoint_and_of_a_model_agree():
    run("convert", "my_models:flat", "--out", "net.safetensors")
    of_checkpoint = without_proofs(as_json("info", "net.safetensors"))
    assert of_checkpoint == as_json("info", "my_models:flat")
    assert of_checkpoint["steps"][0]["states"] == 64 + 2 * 64  # one identity block, a block for each layer
    assert "L = 1" in run("info", "net.safetensors").stdout


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_convolutional_network(tmp_path, dtype):
    document = as_json("convert", "my_models:convolution", "--out", "net.safetensors", "--dtype", dtype)
    assert document["validation"]["passed"]
    stages = [step for step in document["network"]["steps"] if step["kind"] == "lben"]
    assert [stage["image"] for stage in stages] == [[8, 8], []]
    assert [stage["states"] for stage in stages] == [2 + 2 * 3, 10 + 10]  # 2·(8/4)² features, padded to the 10 classes
    net = lc.load(tmp_path / "net.safetensors")
    x = torch.rand(20, 1, 8, 8)
    with torch.no_grad():
        expected, found = convolution()(x), net(x.to(net.dtype)).double()
    tolerance = 1e-12 if dtype == "float64" else 1e-5  # what a conversion promises, or better
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    of_checkpoint = without_proofs(as_json("info", "net.safetensors"))
    assert of_checkpoint == document["network"] == as_json("info", "my_models:convolution", "--dtype", dtype)
    assert as_json("validate", "my_models:convolution", "--net", "net.safetensors")["passed"]
    shown = run("info", "net.safetensors").stdout
    assert "MeanPool" in shown
    assert "2x8x8" in shown  # channels, height, width
    bent = convolution()
    with torch.no_grad():
        bent.conv1.bias[0] += 0.5
    sys.modules["my_models"].bent = lambda: bent
    result = run("validate", "my_models:bent", "--net", "net.safetensors", code=1)
    assert "error: validation failed" in result.stderr


def test_zero_padding_needs_the_dense_form(tmp_path):
    refused = run("convert", "my_models:padded", "--out", "net.safetensors", code=2)
    assert "circular" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    document = as_json("convert", "my_models:padded", "--dense", "--out", "net.safetensors")
    assert all(step["image"] == [] for step in document["network"]["steps"])
    assert as_json("validate", "my_models:padded", "--dense", "--net", "net.safetensors")["passed"]
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(lc.load("net.safetensors")(x), padded()(x), rtol=0, atol=1e-12)  # logits of size 1


def test_recognised_convolutional_weights(tmp_path):
    torch.manual_seed(5)
    model = SLLNetwork(image=(8, 4), in_channels=2, channels=3, conv_depth=1, pool=2, dense_depth=1, classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    given = {"image": "8x4", "in_channels": 2, "pool": 2, "classes": 3, "activation": "relu"}
    options = [f"--option={key}={value}" for key, value in given.items()]
    for k, missing in enumerate(given):
        assert f"--option {missing}=" in run("info", "w.pt", *options[:k], code=2).stderr
    run("convert", "w.pt", *options, "--out", "net.safetensors")
    x = torch.randn(5, 2, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(lc.load("net.safetensors")(x), model(x), rtol=0, atol=1e-12)  # logits of size 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("my_models:absent", "my_models has no 'absent'"),
        ("my_models:number", "number is of type int, not a function"),
        ("my_models:nothing", "nothing() returned NoneType, not a torch.nn.Module"),
        ("my_models:failing", "failing() failed with ZeroDivisionError: one over nothing"),
        ("my_models:leaving", "leaving() failed with SystemExit: bye"),
        ("my_models:", "it does not read package.module:factory"),
        (":flat", "it does not read package.module:factory"),
        ("my_models", "there is no such file"),
    ],
)
def test_factories_that_give_no_model(spec, said):
    result = run("info", spec, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: model {spec!r}: ")
    assert said in result.stderr


def test_a_module_that_cannot_be_imported_says_which_line(tmp_path):
    (tmp_path / "broken_on_import.py").write_text("import torch\nimport surely_not_installed\n")
    assert "No module named 'surely_not_installed'" in run("info", "broken_on_import:f", code=2).stderr
    (tmp_path / "raising_on_import.py").write_text("x = 1\n\nraise RuntimeError('not today')\n")
    shown = run("info", "raising_on_import:f", code=2).stderr
    assert "RuntimeError: not today" in shown
    assert "line 3" in shown


def test_a_model_instance_is_taken_as_it_is():
    assert as_json("info", "my_models:built") == as_json("info", "my_models:flat")


def test_what_a_factory_prints_does_not_reach_stdout():
    result = run("info", "my_models:chatty", "--json")
    assert json.loads(result.stdout)["lipschitz"] == 1.0
    assert "a factory that talks" in result.stderr


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_are_loaded_into_the_factory(tmp_path, suffix):
    torch.manual_seed(7)
    trained = SLLNetwork(inputs=64, classes=10)
    path = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pt" else save_file)(trained.state_dict(), path)
    run("convert", "my_models:flat", "--weights", path, "--out", "net.safetensors")
    x = torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(lc.load("net.safetensors")(x), trained(x), rtol=0, atol=1e-12)  # |logits| below 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("sll1.log_q"), "tensor 'sll1.log_q' is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "tensor 'extra' is not one of SLLNetwork's"),
        (lambda s: s.update({"sll0.weight": torch.zeros(3, 64)}), "tensor 'sll0.weight' has shape (3, 64)"),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(tmp_path, change, said):
    state = flat().state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    result = run("convert", "my_models:flat", "--weights", "w.pt", "--out", "net.safetensors", code=2)
    assert said in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_a_recognised_weights_file_with_options(tmp_path):
    torch.manual_seed(0)
    model = MonDEQ(6, 7, 3, m=0.6)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    run("convert", "w.pt", "--option", "m=0.6", "--option", "activation=relu", "--out", "net.safetensors")
    x = torch.randn(5, 6)
    net = lc.load("net.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-10, atol=1e-11)  # two solves to 1e-13
    norms = torch.linalg.svdvals(model.U.weight)[0] * torch.linalg.svdvals(model.Wout.weight)[0]
    assert net.lipschitz == pytest.approx(float(norms.detach()) / 0.6, rel=1e-12)


def test_options_are_numbers_where_they_read_as_such():
    found = cli._options(["m=1.5", "classes=10", "kind=deep", "path=a=b"])
    assert found == {"m": 1.5, "classes": 10, "kind": "deep", "path": "a=b"}
    assert type(found["classes"]) is int


def test_what_does_not_go_together(tmp_path):
    run("convert", "my_models:flat", "--out", "net.safetensors")
    torch.save(flat().state_dict(), tmp_path / "w.pt")
    for arguments in (
        ("convert", "net.safetensors", "--out", "two.safetensors"),
        ("validate", "net.safetensors"),
        ("info", "net.safetensors", "--weights", "w.pt"),
        ("info", "w.pt", "--weights", "w.pt"),
        ("info", "my_models:flat", "--option", "m=1"),
        ("convert", "my_models:flat", "--out", "net.pt"),
        ("info", "my_models:flat", "--plugin", "absent"),
        ("info", "my_models:flat", "--dtype", "float16"),
    ):
        result = run(*arguments, code=2)
        assert result.stderr.startswith("error: ")
        assert result.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "w.pt"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run("convert", "my_models:flat", "--out", "file/net.safetensors", code=2)
    assert result.stderr.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_damaged_checkpoint(tmp_path):
    run("convert", "my_models:flat", "--out", "net.safetensors")
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "net.safetensors" in run("certify", "net.safetensors", "--data", "digits", code=2).stderr
    save_file({"a": torch.zeros(2)}, tmp_path / "net.safetensors", metadata={"lipconvert": "{}"})
    assert "format_version" in run("info", "net.safetensors", code=2).stderr


def test_an_interruption_is_exit_code_130_and_leaves_nothing(tmp_path, models):
    def interrupted():
        raise KeyboardInterrupt

    models.interrupted = interrupted
    assert "interrupted" in run("convert", "my_models:interrupted", "--out", "net.safetensors", code=130).stderr
    assert list(tmp_path.iterdir()) == []


def test_demo_prints_one_table_and_writes_three_files(tmp_path):
    arguments = (
        "demo",
        "--out",
        "runs/x",
        "--epochs",
        1,
        "--limit",
        40,
        "--architecture",
        "aol",
        "--architecture",
        "sll",
    )
    result = run(*arguments)
    lines = result.stdout.splitlines()
    assert sum(line.split()[:1] in (["aol"], ["sll"]) for line in lines) == 2
    assert sorted(p.name for p in (tmp_path / "runs" / "x").iterdir()) == [
        "certified-accuracy.png",
        "report.json",
        "report.md",
    ]
    document = as_json(*arguments)
    assert [row.architecture for row in DemoReport.model_validate(document).rows] == ["aol", "sll"]
    assert json.loads((tmp_path / "runs" / "x" / "report.json").read_text(encoding="utf-8")) == document


def test_demo_with_a_wrong_conversion_is_exit_code_1(tmp_path, monkeypatch):
    right = demo.convert

    def wrong(*arguments, **options):
        net = right(*arguments, **options)
        with torch.no_grad():
            net.stages[0].b_y[0] += 1e-6
        return net

    monkeypatch.setattr(demo, "convert", wrong)
    result = run("demo", "--out", "x", "--epochs", 1, "--limit", 20, "--architecture", "aol", code=1)
    assert result.stderr.startswith("error: validation failed")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture():
    assert "resnet" in run("demo", "--architecture", "resnet", code=2).stderr


@pytest.mark.parametrize("command", ["plugins", "demo", "convert", "validate", "certify", "tighten", "info"])
def test_every_command_has_help_and_json(command):
    assert "--json" in run(command, "--help").stdout


def test_as_a_program_in_an_empty_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lipconvert_plugins.sll import SLLNetwork\n\n\ndef net():\n    return SLLNetwork(inputs=4, classes=2)\n"
    )

    def program(*arguments):
        command = [sys.executable, "-m", "lipconvert", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    good = program("convert", "mine:net", "--out", "net.safetensors", "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["validation"]["passed"]
    bad = program("info", "mine:absent")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "error: model 'mine:absent': mine has no 'absent'; it has net\n"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["mine.py", "net.safetensors"]


class TestCheckpoints:
    def test_export_verify_and_info(self, tmp_path):
        said = run(
            "export",
            "my_models:flat",
            "--out",
            "a/net.onnx",
            "--output",
            "radius",
            "--class-names",
            "a, b,2,3,4,5,6,7,8,9",
        ).stdout
        assert "wrote" in said
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["net.onnx", "net.safetensors"]
        verified = run("verify", "a/net.onnx").stdout
        assert "none of them false" in verified
        assert verified.count("ok    ") == len(as_json("verify", "a/net.onnx")["claims"]) == 9
        assert all(
            word in verified for word in ("condition (10)", "condition (3)", "onnxruntime", "SHA-256", "differences")
        )
        for name in ("a/net.onnx", "a/net.safetensors"):
            shown = run("info", name).stdout
            assert all(
                word in shown
                for word in ("proved L", "substitution", "SLLNetwork", "sll (lipconvert", "classes: a, b, 2")
            )
        info = as_json("info", "a/net.onnx")
        assert info["bound"]["method"] == "tightened"
        assert info["class_names"] == ["a", "b", *"23456789"]
        assert info["pairs"][0] <= info["pairs"][1] <= 2**0.5 * (1 + 1e-5)
        assert "certified accuracy" in run("certify", "a/net.onnx", "--data", "digits", "--limit", "5").stdout

    def test_a_false_claim_is_exit_code_1_and_named(self, tmp_path):
        run("export", "my_models:flat", "--out", "net.onnx")
        data = bytearray((tmp_path / "net.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "net.safetensors").write_bytes(data)
        said = run("verify", "net.onnx", code=1).stdout
        assert "FAILED" in said
        assert "SHA-256" in said
        report = json.loads(run("verify", "net.onnx", "--json", code=1).stdout)
        assert report["passed"] is False
        assert "SHA-256" in run("info", "net.onnx", code=2).stderr
        assert "there is no such file" in run("verify", "nothing.onnx", code=2).stderr

    def test_other_forms(self, tmp_path):
        run("export", "my_models:flat", "--out", "one.onnx", "--embed", "--inline", "--dtype", "float32")
        assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]
        assert "none of them false" in run("verify", "one.onnx").stdout
        assert "nodes" in run("export", "one.onnx", "--out", "plain.onnx", "--explicit").stdout
        said = run(
            "export", "one.onnx", "--out", "vnn", "--vnnlib", "digits", "--radius", "36/255", "--samples", "6"
        ).stdout
        assert "half-width 0.0176471" in said
        assert {path.suffix for path in (tmp_path / "vnn").iterdir()} == {".onnx", ".vnnlib", ".csv"}
        assert len((tmp_path / "vnn" / "instances.csv").read_text().splitlines()) == 6
        assert "do not go with" in run("export", "one.onnx", "--out", "x.onnx", "--explicit", "--embed", code=2).stderr
        assert "the suffix must be" in run("export", "one.onnx", "--out", "x.pt", code=2).stderr
        assert "none of" in run("export", "one.onnx", "--out", "x.onnx", "--output", "radii", code=2).stderr
