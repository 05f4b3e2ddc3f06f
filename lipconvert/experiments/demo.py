"""The demonstration: small networks of every architecture, dense and convolutional, trained on digits, converted,
validated and certified.

Each row of the result is a different architecture that ends in the same form, with its constant and its certificate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .. import data
from ..certification.certify import RADII, certify
from ..certification.documents import RobustnessReport
from ..conversion.convert import convert
from ..conversion.validate import validate
from ..errors import InvalidParameterError
from ..escaping import markdown as escaped
from ..foundation.arguments import isolated
from ..foundation.files import alone, whole
from ..linalg.spectrum import one_thread
from ..plugin_api.registry import registry
from ..training.documents import LossConfig, ScheduleConfig, TrainingConfig
from ..training.finetune import train, versions
from .curves import plot_certified_accuracy
from .documents import DemoReport, DemoRow

TRAINING = TrainingConfig(
    epochs=24,
    batch_size=128,
    learning_rate=3e-2,
    schedule=ScheduleConfig(kind="one_cycle", warm_up=0.25),
    loss=LossConfig(offset=0.6, temperature=0.12),
)
VALIDATED = 128  # test samples whose gradients and Jacobians are compared; outputs are compared on all of them
HEADINGS = (
    "architecture",
    "parameters",
    "L",
    "max output difference",
    "least eigenvalue of H",
    "natural",
    "36/255",
    "72/255",
    "108/255",
    "1",
)

CONVOLUTIONAL = "-conv2d"
DIGIT = (1, 8, 8)

Progress = Callable[[str, str, int, int], None]
"""(architecture, what is being done, steps done, steps in all)."""


def architectures() -> list[str]:
    """The plugins that offer a new model for flat inputs, in order of name, then ``NAME-conv2d`` for images."""
    flat = [plugin.name for plugin in registry().plugins() if plugin.error is None and "new_model" in plugin.hooks]
    return flat + [name + CONVOLUTIONAL for name in flat if new_model(name + CONVOLUTIONAL, DIGIT, 10, 0) is not None]


def new_model(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module | None:
    """The untrained model of one of `architectures` for samples of a shape, flattened but for a convolutional one."""
    image = (shape[0], shape[1], shape[2]) if name.endswith(CONVOLUTIONAL) else None
    return registry().new_model(name.removesuffix(CONVOLUTIONAL), math.prod(shape), classes, seed, image)


@isolated
def run_one(
    name: str,
    config: TrainingConfig,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    progress: Progress = lambda *_: None,
) -> DemoRow:
    """Train in float32, convert in float64, validate on the test set, certify: one row. Raises `EquivalenceError`.

    ``training``, ``test``: images (N, c, h, w) and labels (N,).
    """
    (x, labels), (x_test, labels_test) = training, test
    classes = int(max(labels.max(), labels_test.max())) + 1
    model = new_model(name, tuple(x.shape[1:]), classes, config.seed)
    if model is None:
        raise InvalidParameterError("architecture", repr(name), f"it must be one of {', '.join(architectures())}")
    model = model.float()
    if not name.endswith(CONVOLUTIONAL):
        x, x_test = x.flatten(1), x_test.flatten(1)
    shape = tuple(x.shape[1:])
    started = time.perf_counter()
    samples = TensorDataset(x, labels)
    train(model, samples, None, config, on_step=lambda done, total, _: progress(name, "training", done, total))
    trained = time.perf_counter()
    progress(name, "converting", 0, 1)
    net = convert(model, shape, check=False)
    converted = time.perf_counter()
    progress(name, "validating", 0, 1)
    report = validate(model, net, x_test[:VALIDATED].double())
    with torch.no_grad():
        difference = float((model.double()(x_test.double()) - net(x_test.double())).abs().max())
    progress(name, "certifying", 0, 1)
    pairs = TensorDataset(x_test.double(), labels_test)
    robustness = certify(net, pairs, RADII, model=name, name="digits, test")
    return DemoRow(
        architecture=name,
        parameters=sum(p.numel() for p in model.parameters()),
        lipschitz=net.lipschitz,
        max_output_difference=difference,
        least_eigenvalue=report.value("least eigenvalue of H"),
        train_seconds=trained - started,
        convert_seconds=converted - trained,
        validation=report,
        robustness=robustness,
    )


@isolated
def run(
    out: str | Path,
    config: TrainingConfig | None = None,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Progress = lambda *_: None,
) -> DemoReport:
    """All architectures on digits; writes report.json, report.md and certified-accuracy.png into ``out`` at the end.

    ``names``: some of `architectures` (default all); ``limit``: of training and test samples each, for a quick look.
    Raises `EquivalenceError` when a converted network is not its source, `InvalidParameterError` for an unknown name.
    """
    config = config or TRAINING
    known = architectures()
    chosen = known if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise InvalidParameterError("architecture", repr(name), f"it must be one of {', '.join(known)}")
    if not chosen:
        raise InvalidParameterError("architectures", "none", "no loaded plugin offers a new model")
    if limit is not None and limit < 10:
        raise InvalidParameterError("limit", limit, "the demo needs ten samples or more")
    parts = []
    for split in data.SPLITS:
        x, labels = data.load("digits", split).tensors()
        parts.append((x[:limit], labels[:limit]))
    training, test = parts
    # Matrices of 64 rows gain nothing from more, and sums do not depend on the machine's cores.
    with one_thread():
        rows = [run_one(name, config, training, test, progress) for name in chosen]
    report = DemoReport(
        data="digits",
        train_samples=len(training[1]),
        test_samples=len(test[1]),
        config=config,
        versions=versions("lipconvert", "torch"),
        rows=rows,
    )
    folder = Path(out)
    title = f"Certified accuracy on digits ({len(test[1])} test images)"
    with alone(folder, patient=True):  # the three belong together
        plot_certified_accuracy(rows, folder / "certified-accuracy.png", title)
        with whole(folder / "report.md") as partial:
            partial.write_text(markdown(report), encoding="utf-8")
        report.write(folder / "report.json")
    return report


def cells(row: DemoRow) -> list[str]:
    """A row of the table, as text under `HEADINGS`."""
    robust: RobustnessReport = row.robustness
    return [
        row.architecture,
        f"{row.parameters}",
        f"{row.lipschitz:.4g}",
        f"{row.max_output_difference:.1e}",
        f"{row.least_eigenvalue:.1e}",
        f"{100 * robust.natural_accuracy:.1f}",
        *(
            f"{100 * least:.1f} → {100 * best:.1f}"
            if f"{100 * least:.1f}" != f"{100 * best:.1f}"
            else f"{100 * best:.1f}"
            for least, best in zip(robust.methods[0].certified_accuracy, robust.certified_accuracy, strict=True)
        ),
    ]


def markdown(report: DemoReport) -> str:
    """The report for reading: the table, what its columns mean, how it was made."""
    c = report.config
    lines = [
        "# lipconvert demo",
        "",
        f"{len(report.rows)} small networks trained on {report.data} ({report.train_samples} training and "
        f"{report.test_samples} test images of 8x8 pixels in [0, 1]), each converted to a Lipschitz-bounded equilibrium "
        "network (LBEN), compared with its source, and certified: with its own constant L, and, behind the arrow where that "
        "is more, with the best multiplier for each pair of classes (tightened).",
        "",
        "| " + " | ".join((*HEADINGS[:6], *(f"certified at {r}" for r in HEADINGS[6:]))) + " |",
        "|:--|" + "--:|" * (len(HEADINGS) - 1),
        *("| " + " | ".join(map(escaped, cells(row))) + " |" for row in report.rows),
        "",
        "Accuracies in %; radii are l2. *Max output difference*: the largest entry of |source - LBEN| over the test set, "
        "in float64. *Least eigenvalue of H*: of condition (10), 0 up to round-off for most converted networks.",
        "",
        "![Certified accuracy against the radius](certified-accuracy.png)",
        "",
        "| architecture | training (s) | conversion (s) | solver |",
        "|:--|--:|--:|:--|",
        *(
            f"| {escaped(row.architecture)} | {row.train_seconds:.1f} | {row.convert_seconds:.2f} "
            f"| {', '.join(row.validation.methods)} |"
            for row in report.rows
        ),
        "",
        f"Training: {c.optimizer.capitalize()}, {c.epochs} epochs, batches of {c.batch_size}, "
        f"learning rate {c.learning_rate:g}, offset {c.loss.offset:g}, temperature {c.loss.temperature:g}, seed {c.seed}. "
        + ", ".join(f"{name} {number}" for name, number in report.versions.items())
        + ".",
        "",
    ]
    return "\n".join(lines)
