"""Two published MNIST models, opened from their authors' weight files, converted and measured.

    python benchmarks/public_weights.py --mondeq FILE --lben FILE --mnist DIR [--json FILE]

* ``--mondeq``: mnist_fc_model_trained.pt of https://github.com/locuslab/monotone_op_net (87 states, m = 1, relu);
* ``--lben``: models/fc_lip1.0_w80.params of https://github.com/mrevay/LipschitzBoundedEquilibriumModels (80 states,
  γ = 1, ε = 1, relu);
* ``--mnist``: the folder that torchvision's MNIST was downloaded to.

Both take images normalised with mean 0.1307 and deviation 0.3081, and a constant printed for them holds there; what
certifies an image is the constant for its pixels, larger by 1/0.3081. Each file is optional. The files are weights only:
m, γ, ε and σ are said here. Exit status 1 when a published figure is not met.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lipconvert as lc
from lipconvert import data

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import CONSOLE, Floor, command_line, facts, machine, show, timed, use_threads, verdict, write_json

MEAN, STD = 0.1307, 0.3081


@dataclass(frozen=True)
class Published:
    """A model as its authors describe it; ``error`` in %, ``lipschitz`` on normalised inputs."""

    name: str
    options: Mapping[str, Any]
    error: float
    lipschitz: float


PUBLISHED = {
    "mondeq": Published("MonDEQ", {"m": 1.0, "activation": "relu"}, 1.81, 13.40),
    "lben": Published("LBEN", {"lipschitz": 1.0, "epsilon": 1.0, "activation": "relu"}, 2.36, 1.0),
}


def on_images(model: nn.Module) -> nn.Sequential:
    """A model of flat normalised inputs as one of pixels in [0, 1]."""
    return nn.Sequential(lc.Normalize(MEAN, STD), nn.Flatten(), model)


def error_rate(net: lc.Network, images: Tensor, labels: Tensor, batch: int = 1000) -> float:
    """Test error in %."""
    with torch.no_grad():
        guesses = [net(part).argmax(1).to(labels) for part in images.split(batch)]
    return 100.0 * float((torch.cat(guesses) != labels).double().mean())


def measure(path: str, published: Published, images: Tensor | None, labels: Tensor | None) -> dict[str, Any]:
    """Open, convert, validate, and test where there are images."""
    model = on_images(lc.from_state_dict(lc.read_weights(path), published.options, path=path))
    shape = (1, 28, 28)
    net = lc.convert(model, shape, check=False)
    inputs = None if images is None else images[:64].double()
    report = lc.validate(model, net, inputs, throw=False)
    values = {check.name: check.value for check in report.checks if check.name != "L of the glue - L of its source"}
    result: dict[str, Any] = {
        "model": published.name,
        "file": Path(path).name,
        "states": len(net.stages[0].b_z),
        "lipschitz_normalised": net.stages[0].lipschitz,
        "lipschitz_pixels": net.lipschitz,
        "validated": report.passed,
        "checks": values,
        "solver": report.methods[0],
        "test_error": None,
        "seconds": None,
        "published_error": published.error,
        "published_lipschitz": published.lipschitz,
    }
    if images is not None and labels is not None:
        errors: list[float] = []
        result["seconds"] = timed(lambda: errors.append(error_rate(net, images, labels)))
        result["test_error"] = errors[0]
    return result


def floors(result: Mapping[str, Any]) -> list[Floor]:
    """The published figures, to the digits they are given with."""
    name = result["model"]
    error = None if result["test_error"] is None else abs(result["test_error"] - result["published_error"])
    lipschitz = abs(result["lipschitz_normalised"] - result["published_lipschitz"])
    return [
        Floor(f"{name}, test error - published", error, 0.005 + 1e-9),
        Floor(f"{name}, L on normalised inputs - published", lipschitz, 0.005 + 1e-9),
        Floor(f"{name}, checks of the conversion failed", float(not result["validated"]), 0.0),
    ]


def two_digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, device=False)
    parser.add_argument("--mondeq", metavar="FILE", help="mnist_fc_model_trained.pt")
    parser.add_argument("--lben", metavar="FILE", help="fc_lip1.0_w80.params")
    parser.add_argument("--mnist", metavar="DIR", help="folder with MNIST as torchvision keeps it")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    CONSOLE.print(facts())
    images = labels = None
    if options.mnist:
        images, labels = data.load("mnist", "test", options.mnist).tensors()
    else:
        CONSOLE.print("no --mnist: test errors are not measured")
    results = []
    for key, published in PUBLISHED.items():
        path = getattr(options, key)
        if path:
            results.append(measure(path, published, images, labels))
        else:
            CONSOLE.print(f"no --{key}: {published.name} is skipped")
    write_json(options.json, {"machine": machine(), "dtype": "float64", "results": results})
    if not results:
        return 0
    header = ("model", "states", "test error (%)", "published", "L, normalised", "published", "L, pixels", "solver")
    numbers = ("test_error", "published_error", "lipschitz_normalised", "published_lipschitz", "lipschitz_pixels")
    rows = [[r["model"], r["states"], *(two_digits(r[k]) for k in numbers), r["solver"]] for r in results]
    show("Published MNIST models, converted, float64", header, rows)
    for result in results:
        size = {name: value for name, value in result["checks"].items() if name != "L of the stage - L of its DAE"}
        line = ", ".join(f"{name} {'not finite' if value is None else f'{value:.1e}'}" for name, value in size.items())
        CONSOLE.print(f"{result['model']}: {line}", highlight=False)
    return verdict([floor for result in results for floor in floors(result)])


if __name__ == "__main__":
    sys.exit(main())
