"""The demo: its numbers against roads of their own, its files, and that it leaves no half of them."""

import json
import math

import pytest
import torch
from torch.utils.data import TensorDataset

import lipconvert as lc
from lipconvert import data, schema
from lipconvert.experiments import demo
from lipconvert.experiments.documents import DemoReport

SMALL = demo.TRAINING.model_copy(update={"epochs": 1, "seed": 3})
FAST = ["aol", "sll"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    calls = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(
        torch.float64
    )  # the same initial weights as in a test: module fixtures come before its dtype
    report = demo.run(folder, SMALL, FAST, limit=60, progress=lambda *call: calls.append(call))
    torch.set_default_dtype(before)
    return folder, report, calls


def test_every_built_in_architecture_is_in_it():
    built_in = {"aol", "cpl", "g_mondeq", "lben", "mondeq", "sandwich", "sll"}
    assert built_in <= set(demo.architectures())


def test_the_numbers_of_a_row_are_those_of_the_trained_network(small):
    _, report, _ = small
    (x, labels), (x_test, labels_test) = [
        (pixels.flatten(1)[:60], y[:60]) for pixels, y in (data.load("digits", s).tensors() for s in ("train", "test"))
    ]
    row = next(row for row in report.rows if row.architecture == "sll")
    model = lc.registry().new_model("sll", 64, 10, SMALL.seed).float()
    lc.train(model, TensorDataset(x, labels), None, SMALL)
    model = model.double()
    with torch.no_grad():
        y = model(x_test.double())  # the explicit network, layer by layer
    top = y.topk(2).values
    margin = torch.where(y.argmax(1) == labels_test, top[:, 0] - top[:, 1], torch.tensor(-1.0, dtype=torch.float64))
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.robustness.natural_accuracy == pytest.approx(float((y.argmax(1) == labels_test).double().mean()), abs=0)
    # Counts out of 60: round-off of 1e-15 in a margin moves none of them.
    robustness = row.robustness
    for radius, accuracy in zip(robustness.curve_radii, robustness.methods[0].curve_accuracy, strict=True):
        inflated = 1.0 + robustness.delta  # L is proved at L(1 + δ); radii are less by rounding, of 1e-8 at the most
        assert accuracy == pytest.approx(
            float((margin > math.sqrt(2) * inflated * radius + 1e-8).double().mean()), abs=1e-12
        )
    assert row.max_output_difference <= 1e-12
    assert row.least_eigenvalue >= -1e-12
    assert row.lipschitz == 1.0
    assert row.validation.passed


def test_files_are_complete_and_agree(small):
    folder, report, calls = small
    assert sorted(p.name for p in folder.iterdir()) == ["certified-accuracy.png", "report.json", "report.md"]
    assert DemoReport.model_validate_json((folder / "report.json").read_text(encoding="utf-8")) == report
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(document) == set(json.loads(schema.schema_text("demo-report"))["properties"])
    assert (report.train_samples, report.test_samples) == (60, 60)
    text = (folder / "report.md").read_text(encoding="utf-8")
    for row in report.rows:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row.architecture} |"))
        assert f"| {100 * row.robustness.natural_accuracy:.1f} |" in line
    png = (folder / "certified-accuracy.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-8:-4] == b"IEND"
    steps = [call for call in calls if call[:2] == ("sll", "training")]
    assert steps == [("sll", "training", 1, 1)]  # 60 samples are one batch


def test_nothing_is_written_when_it_is_interrupted(tmp_path):
    def stop(name, what, done, total):
        if what == "certifying":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "out", SMALL, ["aol"], limit=20, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_lists_those_there_are(tmp_path):
    with pytest.raises(lc.InvalidParameterError, match="aol, cpl"):
        demo.run(tmp_path / "out", SMALL, ["resnet"])
    with pytest.raises(lc.InvalidParameterError, match="ten samples"):
        demo.run(tmp_path / "out", SMALL, ["aol"], limit=3)
    assert list(tmp_path.iterdir()) == []
