"""The benchmarks run and say what they mean; no durations are asserted."""

from __future__ import annotations

import importlib
import io
import json
import struct
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lipconvert_plugins.mondeq import MonDEQ
from PIL import Image
from torch import nn

import lipconvert as lc
from lipconvert.experiments.recipes import checked

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    *("measure", "against_reference", "certificates", "checkpoints", "constraints", "forward", "public_weights"),
    "scaling",
)

# What the paper's code promises to against_reference: two classes, one configuration, a state dict of these names.
STAND_IN = """
import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        name = "kernel" if len(shape) == 4 else "weights"
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.q = nn.Parameter(torch.rand(shape[0]) - 0.5)

    def forward(self, x):
        W = dict(self.named_parameters()).get("kernel", None)
        q = self.q.abs()
        if W is None:
            T = ((self.weights @ self.weights.T).abs() * q / q[:, None]).sum(1)
            return x - functional.linear(functional.linear(x, self.weights, self.bias).relu() * 2 / T, self.weights.T)
        gram = functional.conv2d(W, W, padding=2).abs().sum((2, 3))
        T = (gram * q / q[:, None]).sum(1)
        s = functional.conv2d(functional.pad(x, (1, 1, 1, 1), "circular"), W, self.bias).relu()
        s = functional.pad(s * (2 / T)[:, None, None], (1, 1, 1, 1), "circular")
        return x - functional.conv2d(s, W.transpose(0, 1).flip(2, 3))


class SLLNetwork(nn.Module):
    def __init__(self, config, classes):
        super().__init__()
        c, h, n = config.num_channels, config.conv_size, config.n_features
        self.c, self.classes = c, classes
        self.convs = nn.Sequential(*[Layer((h, c, 3, 3)) for _ in range(config.conv_depth)])
        self.denses = nn.Sequential(*[Layer((n, c * 64)) for _ in range(config.dense_depth)])

    def forward(self, x):
        x = self.convs(functional.pad(x, (0, 0, 0, 0, 0, self.c - 3)))
        return self.denses(functional.avg_pool2d(x, 4, divisor_override=4).flatten(1))[:, : self.classes]


class LipschitzNetworkDEQ(SLLNetwork):
    def __init__(self, config, classes):
        super().__init__(config, classes)
        self.load_state_dict(torch.load(config.ckpt_path)["model_state_dict"])
"""


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def benchmark_module(monkeypatch):
    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).parent == FOLDER
        return module

    yield load
    for name in [*NAMES, *(name for name in sys.modules if name.split(".")[0] == "core")]:
        sys.modules.pop(name, None)


@pytest.fixture
def measure(benchmark_module):
    return benchmark_module("measure")


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout" / "core" / "models"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(STAND_IN, encoding="utf-8")
    return tmp_path / "checkout"


def test_interleaved_runs_in_turn_and_takes_medians(measure, monkeypatch):
    calls: list[str] = []
    clock = iter([0.0, 9.0, 0.0, 9.0, 0.0, 1.0, 0.0, 10.0, 0.0, 5.0, 0.0, 30.0, 0.0, 2.0, 0.0, 20.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    medians = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" * 4  # a warm-up and three rounds
    assert medians == {"a": 2.0, "b": 20.0}


def test_interleaved_lets_a_slow_contestant_drop_out(measure, monkeypatch):
    calls: list[str] = []
    clock = iter([0.0, 1.0, 0.0, 50.0] + [0.0, 1.0] * 3)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    contestants = {"quick": lambda: calls.append("q"), "slow": lambda: calls.append("s")}
    assert measure.interleaved(contestants, repeats=3, budget=40.0) == {"quick": 1.0, "slow": 50.0}
    assert "".join(calls) == "qsqqq"


def test_peak_memory_sees_an_allocation_and_not_what_was_there_before(measure):
    kept = torch.ones(2**23)  # 32 MB
    size = 96 * measure.MB

    def allocate() -> None:
        torch.ones(size // 4)

    peaks = [measure.peak_memory(allocate), measure.peak_memory(lambda: None), measure.peak_memory(allocate)]
    if peaks[0] is None:
        pytest.skip("this platform does not reset its high-water mark")
    assert len(kept) == 2**23
    assert 0.98 * size < peaks[0] < 1.3 * size  # the kernel counts pages in bundles
    assert peaks[1] < 0.1 * size
    assert 0.98 * size < peaks[2] < 1.3 * size


def test_peak_memory_is_none_where_it_cannot_be_measured(measure, monkeypatch):
    called = []
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: None)
    assert measure.peak_memory(lambda: called.append(1)) is None
    assert called == [1]


def test_floors_decide_the_exit_status(measure, capsys):
    met, missed, unmeasured = (
        measure.Floor("x", 1.0, 2.0),
        measure.Floor("speed of y", 3.0, 2.0),
        measure.Floor("z", None, 1.0),
    )
    assert measure.verdict([met, unmeasured]) == 0
    assert "1 of 2 floors measured" in capsys.readouterr().out
    assert measure.verdict([met, missed, unmeasured]) == 1
    assert "speed of y: 3, at most 2" in capsys.readouterr().out
    assert not measure.Floor("never", float("inf"), 8.0).passed


def test_write_json_is_strict(measure, tmp_path):
    measure.write_json(tmp_path / "new" / "file.json", {"a": [float("inf"), 1.5, (2,)]})
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == {"a": ["inf", 1.5, [2]]}
    measure.write_json(None, {})


def test_machine_says_what_numbers_depend_on(measure):
    assert {"torch", "threads", "device", "lipconvert"} <= set(measure.machine())


def test_training_step_reaches_all_parameters(measure):
    model = nn.Linear(3, 2)
    step = measure.training_step(model, torch.randn(4, 3))
    step()
    first = [p.grad.clone() for p in model.parameters()]
    step()  # gradients do not add up
    for parameter, gradient in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_forward(benchmark_module, tmp_path):
    target = tmp_path / "forward.json"
    benchmark_module("forward").main(
        ["--features", "8", "--depth", "2", "--batch", "4", "--repeats", "1", "--json", str(target)]
    )
    rows = json.loads(target.read_text())
    assert [row["dtype"] for row in rows] == ["float64", "float32"]
    assert rows[0]["max_difference"] < 1e-12
    assert rows[0]["method"] == "forward_substitution"


@pytest.fixture
def small(benchmark_module, monkeypatch):
    module = benchmark_module("against_reference")
    monkeypatch.setattr(module, "QUICK", module.Size(3, 2, 1, 1))
    monkeypatch.setattr(module, "LIMITS", module.Limits(1e9, 1e9, 1e9, 1e9))
    return module


QUICK = ["--quick", "--batch", "2", "--repeats", "1", "--threads", "1"]


def test_against_reference_without_one(small, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    status = small.main([*QUICK, "--skip-validation", "--json", str(target)])
    result = json.loads(target.read_text())
    assert "no --reference" in capsys.readouterr().out
    assert {"machine", "dtype", "batch", "network", "methods", "rows", "floors"} <= set(result)
    rows = {row["what"]: row for row in result["rows"]}
    assert {"conversion", "forward", "step", "forward, memory", "parameters", "max output difference"} <= set(rows)
    assert all(row["reference"] is None and row["explicit"] is None for row in rows.values())
    assert rows["max output difference"]["lipconvert"] < small.SAME
    assert rows["forward"]["× our explicit"] == rows["forward"]["lipconvert"] / rows["forward"]["our explicit"]
    assert result["methods"]["converted"] == ["forward_substitution"] * 2
    unmeasured = [floor["name"] for floor in result["floors"] if floor["value"] is None]
    assert unmeasured == ["conversion × reference", "step while training × reference"]
    assert status == (0 if all(floor["passed"] for floor in result["floors"]) else 1)


def test_against_reference_shares_its_weights(small, checkout, tmp_path):
    target = tmp_path / "numbers.json"
    arguments = [*QUICK, "--skip-validation", "--skip-memory", "--skip-step", "--json", str(target)]
    small.main([*arguments, "--reference", str(checkout)])
    assert str(checkout) not in sys.path
    rows = {row["what"]: row for row in json.loads(target.read_text())["rows"]}
    differences = rows["max output difference"]
    assert differences["explicit"] == 0.0
    assert max(differences["our explicit"], differences["lipconvert"], differences["reference"]) < 1e-5
    assert rows["parameters"]["explicit"] == rows["parameters"]["our explicit"]
    assert rows["conversion"]["× reference"] is not None
    assert "step" not in rows


def test_against_reference_misses_a_floor(small, monkeypatch, capsys):
    monkeypatch.setattr(small, "LIMITS", small.Limits(1e9, 1e-9, 1e9, 1e9))
    assert small.main([*QUICK, "--skip-validation", "--skip-memory", "--skip-step"]) == 1
    assert "missed forward × explicit" in " ".join(capsys.readouterr().out.split())


def test_what_is_not_solved_is_said(small, capsys):
    torch.manual_seed(0)
    net = lc.convert(MonDEQ(4, 6, 2), check=False).float()
    x = torch.randn(3, 4)
    assert small.solvers(net, x) == ["peaceman_rachford"]
    assert small.solvers(net.set_options(lc.SolverOptions(max_steps=1)), x) == []
    assert "not solved" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["entry", "rms"])
def test_perturbed_moves_a_copy(small, kind):
    net = lc.convert(small.our_explicit(small.Size(3, 2, 1, 1, 8, 2)), check=False).float()
    before = [p.detach().clone() for p in net.parameters()]
    moved = [p.detach() for p in small.perturbed(net, kind).parameters()]
    for old, kept, new in zip(before, net.parameters(), moved, strict=True):
        assert torch.equal(old, kept)
        change = float(torch.linalg.vector_norm(new - old))
        assert change <= 3e-3 * float(torch.linalg.vector_norm(old))
        if float(old.abs().max()) > 0.0:
            assert change > 0.0


def test_scaling(benchmark_module, tmp_path, capsys):
    module = benchmark_module("scaling")
    arguments = ["--quick", "--repeats", "1", "--threads", "1", "--out", str(tmp_path), "--axes", "channels"]
    module.main(arguments)
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [p["channels"] for p in result["axes"]["channels"]] == [4, 8]
    point = result["axes"]["channels"][0]
    assert point["max_difference"] < 1e-5
    assert {"convert_s", "forward_ratio", "step_ratio", "forward_mb", "step_states"} <= set(point)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    capsys.readouterr()
    module.main([*arguments, "--memory-limit", "0.0001"])
    assert "skipped channels 8" in capsys.readouterr().out


def test_scaling_knows_the_number_of_states(benchmark_module):
    module = benchmark_module("scaling")
    point = module.Point(channels=5, depth=3, image=4, batch=2)
    layers = [module.SLLConv2d(point.channels, point.inner) for _ in range(point.depth)]
    net = lc.convert(nn.Sequential(*layers), (5, 4, 4), check=False)
    assert net.stages[0].b_z.numel() == point.states


def test_public_weights_skips_what_is_not_given(benchmark_module, capsys):
    assert benchmark_module("public_weights").main([]) == 0
    output = capsys.readouterr().out
    for name in ("--mnist", "--mondeq", "--lben"):
        assert f"no {name}" in output


def test_public_weights_of_other_weights(benchmark_module, tmp_path, capsys):
    torch.manual_seed(0)
    source, target = tmp_path / "weights.pt", tmp_path / "numbers.json"
    torch.save(MonDEQ(784, 6, 10).state_dict(), source)
    assert benchmark_module("public_weights").main(["--mondeq", str(source), "--json", str(target)]) == 1
    (result,) = json.loads(target.read_text())["results"]
    assert result["validated"] is True
    assert result["test_error"] is None
    assert result["lipschitz_pixels"] == pytest.approx(result["lipschitz_normalised"] / 0.3081, rel=1e-6)
    assert "L on normalised inputs" in capsys.readouterr().out


def test_error_rate(benchmark_module):
    module = benchmark_module("public_weights")
    net = lc.convert(lc.LBEN(2, 3, 2), check=False)
    x = torch.randn(7, 2)
    with torch.no_grad():
        guesses = net(x).argmax(1)
    labels = guesses.clone()
    labels[:2] = 1 - labels[:2]
    assert module.error_rate(net, x, labels, batch=3) == pytest.approx(200 / 7)


def test_timed(measure):
    assert measure.timed(lambda: time.sleep(0.002)) >= 0.002


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def few_images(tmp_path):
    """Stripes instead of MNIST, as many as there are classes and wide as the class: some are certified after one epoch."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 30)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] = 220
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


def certificates(module, folder, *arguments):
    """The exit status, what was written, and the markdown."""
    target, table = folder / "numbers.json", folder / "numbers.md"
    common = ["--quick", "--threads", "1", "--data-dir", str(folder), "--out", str(folder / "out")]
    status = module.main([*common, "--json", str(target), "--markdown", str(table), *arguments])
    return status, json.loads(target.read_text()), table.read_text(encoding="utf-8")


def test_certificates(benchmark_module, few_images, capsys):
    module = benchmark_module("certificates")
    status, found, table = certificates(module, few_images, "--only", "aol", "cpl", "sll-conv")
    output = " ".join(capsys.readouterr().out.split())
    assert "sll-conv is skipped" in output
    assert status == 0
    assert [(r["network"], r["dtype"]) for r in found["results"]] == [
        (name, dtype) for name in ("aol", "cpl") for dtype in ("float64", "float32")
    ]
    for result in found["results"]:
        assert result["max_difference"] < 1e-10
        weaker = result["methods"][0]["certified_accuracy"]
        for entry in result["methods"]:
            assert all(a >= b for a, b in zip(entry["certified_accuracy"], weaker, strict=True))
            if entry["mean_pair"] is not None:
                assert entry["least_pair"] <= entry["mean_pair"] * (1 + 1e-12)
                assert entry["mean_pair"] <= entry["greatest_pair"] * (1 + 1e-12)
            weaker = entry["certified_accuracy"]
    floors = {floor["name"]: floor for floor in found["floors"]}
    assert [name for name, floor in floors.items() if floor["value"] is not None] == [
        "certified samples that changed their class"
    ]
    assert "met: certified samples that changed their class: 0" in table
    assert "| aol | float32 | tightened |" in table
    assert str(few_images) not in table
    # trained once: with its weights at hand a run gives the same numbers
    _, again, _ = certificates(module, few_images, "--only", "aol")
    assert "trained in" not in capsys.readouterr().out
    assert [r["methods"][-1]["certified_accuracy"] for r in again["results"]] == [
        r["methods"][-1]["certified_accuracy"] for r in found["results"][:2]
    ]


def test_certificates_of_the_papers_network(benchmark_module, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        labels = [k % 10 for k in range(count)]
        parquet.write_table(pyarrow.table({"img": images, "label": labels}), tmp_path / f"{split}.parquet")
    _, found, table = certificates(
        benchmark_module("certificates"), tmp_path, "--only", "sll-conv", "--cifar", str(tmp_path)
    )
    assert "CIFAR-10 (JPEG q75)" in table
    for result in found["results"]:  # first features of a residual network: the one constant that cannot be better
        assert result["methods"][-1]["least_pair"] == pytest.approx(2**0.5, rel=1e-5)


def test_certificates_count_what_changes_its_class(benchmark_module, few_images, monkeypatch):
    module = benchmark_module("certificates")
    monkeypatch.setattr(module, "INSIDE", 50.0)  # aimed far outside of what is certified
    status, found, _ = certificates(module, few_images, "--only", "aol")
    (broken,) = [floor for floor in found["floors"] if floor["name"].startswith("certified samples that")]
    assert status == 1
    assert broken["value"] >= 1
    assert not broken["passed"]


def test_certificates_without_data(benchmark_module, tmp_path, capsys):
    module = benchmark_module("certificates")
    status, found, _ = certificates(module, tmp_path)
    assert status == 0
    assert found["results"] == []
    assert capsys.readouterr().out.count("is skipped") == len(module.NETWORKS)


def test_a_floor_from_below(benchmark_module):
    AtLeast = benchmark_module("certificates").AtLeast
    assert AtLeast("x", 2.0, 1.0).passed
    assert AtLeast("x", None, 1.0).passed
    assert not AtLeast("x", 0.5, 1.0).passed
    assert str(AtLeast("x", 0.5, 1.0)) == "x: 0.5, at least 1"


def test_checkpoints_of_two_networks(benchmark_module, tmp_path, monkeypatch, capsys):
    """The figures are of the files it wrote, and a floor that is missed is said."""
    bench = benchmark_module("checkpoints")
    found = [pair for pair in bench.networks(quick=True) if pair[0] in ("aol", "mondeq")]
    monkeypatch.setattr(bench, "networks", lambda quick: found)
    assert bench.main(["--quick", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["aol", "aol", "aol, moved", "aol, moved"] + ["mondeq"] * 2 + [
        "mondeq, moved"
    ] * 2
    assert [row["methods"] for row in rows[:3]] == ["substitution", "substitution", "sweeps"]
    assert all(
        row["passed"] and 0.0 < row["agreement"] < 1e-5 and row["to_parameters"] > row["to_stored"] > 1.0
        for row in rows
    )
    monkeypatch.setattr(bench, "agreement", lambda net, path: 1.0)
    assert bench.main(["--quick"]) == 1
    assert "missed" in capsys.readouterr().out


def test_every_variant_of_the_constraints_is_a_run(benchmark_module):
    constraints = benchmark_module("constraints")
    for base, variants in ((constraints.MNIST, constraints.ON_MNIST), (constraints.DIGITS, constraints.ON_DIGITS)):
        configs = [checked(base, lc.TrainingConfig, v.name, {**v.changes, "seed": 1}) for v in variants]
        starts = [v.start for v in variants]
        assert len({v.name for v in variants}) == len(variants)
        assert variants[0].name == "default"
        for k, config in enumerate(configs[1:], 1):  # each changes one thing
            assert config != configs[0] or starts[k] != starts[0] or variants[k].reoptimise


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_reoptimised_multipliers_scale_the_function_by_what_tightening_gains(benchmark_module, activation):
    torch.manual_seed(0)
    net = lc.convert(lc.LBEN(5, 8, 3, epsilon=0.05, activation=activation).double(), check=False)
    x = torch.randn(20, 5, dtype=torch.float64)
    before, known = net(x).detach(), lc.lipschitz_bound(net, method="tightened").lipschitz
    factor = benchmark_module("constraints").reoptimise(net)
    assert factor == pytest.approx(net.lipschitz / known, rel=5e-3)
    assert factor > 1.05
    assert float((net(x).detach() - factor * before).abs().max()) < 1e-9
    report = lc.lipschitz_bound(net, method="prescribed")
    assert report.lipschitz <= 1.0 + 1e-5
    assert lc.lipschitz_bound(net, method="tightened").lipschitz > 0.995


def test_the_table_of_constraints_compares_seed_by_seed(benchmark_module):
    constraints = benchmark_module("constraints")
    runs = [
        {"default": [0.9, 0.8, 0.7, 0.6, 0.5], "other": [0.91, 0.82, 0.72, 0.62, 0.52]},
        {"default": [0.8, 0.7, 0.6, 0.5, 0.4], "other": [0.81, 0.72, 0.62, 0.52, 0.42]},
    ]
    headings, rows = constraints.table(None, runs)
    assert len(headings) == len(rows[0]) == len(rows[1])
    assert rows[1] == ["other", *[f"{m}.00 ± 7.07" for m in (86, 77, 67, 57, 47)], "+2.00 ± 0.00"]
