"""One SLL network through the paper's own code, as an explicit network, and converted by lipconvert, all in one run.

    git clone https://github.com/AaronHavens/ExploitingLipschitzDEQ CHECKOUT     # once; it has no licence: nothing is copied
    python benchmarks/against_reference.py --reference CHECKOUT [--device cuda] [--json FILE]
    python benchmarks/against_reference.py                                        # without the paper's code

The paper's CIFAR-10 network (8 channels, four 3×3 circular SLL convolutions of inner width 5, pooling, two dense SLL
layers of 512 features, ten logits), with the same random weights everywhere, in float32:

* *reference*: the paper's equilibrium network, built and solved by the paper's code (to its own tolerance, 1e-2);
* *explicit*: the network it came from, in the paper's code where it is given; *our explicit*: lipconvert's own module;
* *lipconvert*: `lipconvert.convert` of it.

A *step* is zero_grad, forward, and backward to all parameters. *Perturbed*: every entry of every parameter is multiplied
by 1 + 1e-3 N(0, 1), or moved by 1e-3 N(0, 1) times the rms of its tensor, so that W is triangular no more, and solved to a
relative residual of 1e-6 within 300 steps. *While training*: moved by the rms, equilibria solved as `lipconvert.finetune`
does. Memory is the peak beyond what was held before. Exit status 1 when a floor is missed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lipconvert_plugins.sll import SLLNetwork
from torch import Tensor, nn

import lipconvert as lc

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import (
    CONSOLE,
    MB,
    Floor,
    command_line,
    facts,
    inference,
    interleaved,
    machine,
    max_difference,
    peak_memory,
    show,
    timed,
    training_step,
    use_threads,
    verdict,
    write_json,
)

HEADER = ("what", "reference", "explicit", "our explicit", "lipconvert")
RATIOS = ("× reference", "× explicit", "× our explicit")
MOST_STEPS = 300  # of a perturbed network: more would miss any floor worth having
SAME = 1e-4  # outputs of the same network in float32, logits of size 1


@dataclass(frozen=True)
class Size:
    """The network; the paper's code takes 32×32 images and as many dense features as the pooling leaves."""

    channels: int = 8
    inner: int = 5
    conv_depth: int = 4
    dense_depth: int = 2
    image: int = 32
    classes: int = 10

    @property
    def features(self) -> int:
        return self.channels * (self.image // 4) ** 2


PAPER, QUICK = Size(), Size(channels=4, inner=3, conv_depth=2, dense_depth=1)


@dataclass(frozen=True)
class Limits:
    """The floors, as the most that a ratio may be."""

    conversion: float = 0.1
    forward: float = 2.0
    step: float = 12.0
    training: float = 0.04
    perturbed: float = 8.0


LIMITS = Limits()


class Reference:
    """The paper's two networks with one set of weights, from a checkout of its code."""

    def __init__(self, checkout: str, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        sys.path.insert(0, checkout)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.code = importlib.import_module("core.models.model")
        finally:
            sys.path.remove(checkout)
        self.config = types.SimpleNamespace(
            conv_depth=size.conv_depth,
            num_channels=size.channels,
            dense_depth=size.dense_depth,
            n_features=size.features,
            conv_size=size.inner,  # what that code passes on as the width
            mon_alpha=1.0,
            mon_max_iter=200,
            mon_tol=1e-2,
            mon_eps=1e-8,
            mon_checks=False,
        )
        self.explicit: nn.Module = self.code.SLLNetwork(self.config, size.classes)
        self.converted: nn.Module | None = None

    def convert(self) -> None:
        """Its constructor reads a checkpoint and computes M, V, U, Λ, G."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.config.ckpt_path = str(Path(folder) / "explicit.pth")
            torch.save({"model_state_dict": self.explicit.state_dict()}, self.config.ckpt_path)
            self.converted = self.code.LipschitzNetworkDEQ(self.config, self.size.classes)

    def to_device(self) -> nn.Module:
        assert self.converted is not None
        self.explicit = self.explicit.to(self.device)
        return self.converted.to(self.device)


def our_explicit(size: Size) -> SLLNetwork:
    """lipconvert's network of a size with weights, biases and q drawn as the paper's code draws them."""
    model = SLLNetwork(
        channels=size.channels,
        inner=size.inner,
        conv_depth=size.conv_depth,
        features=size.features,
        dense_depth=size.dense_depth,
        image=size.image,
        classes=size.classes,
    ).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_q"):
                parameter.copy_(torch.rand_like(parameter).log())
            else:
                parameter.normal_()
    return model.eval()


def copy_weights(state: Mapping[str, Tensor], model: SLLNetwork) -> None:
    """The paper's weights into ours: it divides by |q|, ours keeps log q."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        kind, index, name = key.split(".")
        layer = {"convs": "conv", "denses": "sll"}[kind] + index
        if name == "q":
            renamed[f"{layer}.log_q"] = value.abs().log()
        else:
            renamed[f"{layer}.{'bias' if name == 'bias' else 'weight'}"] = value
    model.load_state_dict(renamed)


def perturbed(net: lc.Network, relative_to: str, size: float = 1e-3) -> lc.Network:
    """A copy with all parameters moved, to the entries or to the rms of their tensors, solved to 1e-6."""
    torch.manual_seed(1)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in moved.parameters():
            scale = parameter if relative_to == "entry" else parameter.square().mean().sqrt()
            parameter += size * scale * torch.randn_like(parameter)
    return moved.set_options(lc.SolverOptions(tolerance=1e-6, max_steps=MOST_STEPS))


def solvers(net: lc.Network, x: Tensor) -> list[str]:
    """The method of each stage, none where a stage is not solved within the steps it has."""
    try:
        return net.methods(x)
    except lc.NotConvergedError as error:
        CONSOLE.print(f"[red]not solved:[/] {error}", highlight=False)
        return []


def count(model: nn.Module | None) -> int | None:
    return None if model is None else sum(p.numel() for p in model.parameters())


def megabytes(peak: int | None) -> float | None:
    return None if peak is None else peak / MB


def run(options: argparse.Namespace, size: Size) -> dict[str, Any]:
    """All measurements; ``rows`` as the table has them."""
    device, repeats = options.device, options.repeats
    torch.manual_seed(0)
    reference = Reference(options.reference, size, device) if options.reference else None
    ours = our_explicit(size)
    if reference:
        copy_weights(reference.explicit.state_dict(), ours)
    x = (torch.rand(options.batch, 3, size.image, size.image) - 0.45).to(device)
    rows: list[dict[str, Any]] = []

    def record(what: str, unit: str, values: Mapping[str, float | None]) -> dict[str, Any]:
        rows.append({"what": what, "unit": unit, **{name: values.get(name) for name in HEADER[1:]}})
        return rows[-1]

    def both(what: str, contestants: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
        for name in contestants:
            say(f"{what}: {name}")
        row = record(what, "s", interleaved(contestants, repeats, device, options.budget))
        if memory:
            peaks = {name: megabytes(peak_memory(function, device)) for name, function in contestants.items()}
            record(f"{what}, memory", "MB", peaks)
        return row

    def say(line: str) -> None:
        CONSOLE.print(f"[dim]{line} ...[/]")

    memory = not options.skip_memory
    say("conversion")
    made: list[lc.Network] = []

    def convert() -> None:
        made[:] = [lc.convert(ours, check=False)]

    conversions: dict[str, Callable[[], object]] = {"lipconvert": convert}
    if reference:
        conversions = {"reference": reference.convert, **conversions}
    record("conversion", "s", interleaved(conversions, min(repeats, 3), budget=options.budget))
    net = made.pop()
    if not options.skip_validation:
        say("validation")
        record("conversion, validated", "s", {"lipconvert": timed(lambda: lc.convert(ours))})
    if memory:
        made.clear()
        record("conversion, memory", "MB", {name: megabytes(peak_memory(f)) for name, f in conversions.items()})

    net, ours = net.float().to(device), ours.to(device)
    models: dict[str, nn.Module] = {"our explicit": ours, "lipconvert": net}
    if reference:
        models = {"reference": reference.to_device(), "explicit": reference.explicit, **models}
    outputs = {name: inference(model, x)() for name, model in models.items()}
    true = outputs["explicit" if reference else "our explicit"]
    differences = {name: max_difference(y, true) for name, y in outputs.items()}
    record("max output difference", "", differences)
    record("parameters", "", {name: count(model) for name, model in models.items()})

    variants = {f"perturbed by {kind}": perturbed(net, kind) for kind in ("entry", "rms")}
    methods = {"converted": solvers(net, x), **{name: solvers(variant, x) for name, variant in variants.items()}}
    forward = both("forward", {name: inference(model, x) for name, model in models.items()})
    moved = {}
    for name, variant in variants.items():
        if methods[name]:
            contestants = {name: inference(model, x) for name, model in models.items() if "explicit" in name}
            moved[name] = both(f"forward, {name}", {**contestants, "lipconvert": inference(variant, x)})
        else:
            moved[name] = record(f"forward, {name}", "s", {**forward, "reference": None, "lipconvert": math.inf})
    step = training = None
    if not options.skip_step:
        step = both("step", {name: training_step(model, x) for name, model in models.items()})
        # W is triangular no more once training has begun; equilibria are solved as `lipconvert.finetune` solves them.
        variant = variants["perturbed by rms"].set_options(lc.SolverOptions(tolerance=lc.TrainingConfig().tolerance))
        others = {name: step[name] for name in HEADER[1:-1]}
        training = both("step while training", {"lipconvert": training_step(variant, x)})
        training.update(others)
    for row in rows:
        against(row)
    floors = [
        Floor("conversion × reference", rows[0]["× reference"], LIMITS.conversion),
        Floor("forward × explicit", explicit_ratio(forward), LIMITS.forward),
        Floor("step × explicit", explicit_ratio(step), LIMITS.step),
        Floor(
            "step while training × reference",
            training["× reference"] if training is not None else None,
            LIMITS.training,
        ),
        *(Floor(f"forward, {name}, × explicit", explicit_ratio(row), LIMITS.perturbed) for name, row in moved.items()),
        Floor("max output difference of lipconvert", differences["lipconvert"], SAME),
        Floor("max output difference of our explicit", differences["our explicit"], SAME),
    ]
    return {
        "machine": machine(device),
        "dtype": "float32",
        "batch": options.batch,
        "repeats": repeats,
        "network": asdict(size),
        "reference": bool(reference),
        "methods": methods,
        "rows": rows,
        "floors": [asdict(floor) | {"passed": floor.passed} for floor in floors],
    }


def against(row: dict[str, Any]) -> None:
    """Ratios of lipconvert to the others, where they mean something."""
    ours = row["lipconvert"]
    for ratio in RATIOS:
        other = row[ratio.removeprefix("× ")]
        row[ratio] = ours / other if row["unit"] and other else None


def explicit_ratio(row: Mapping[str, Any] | None) -> float | None:
    """To the paper's explicit network, or to ours without it."""
    return None if row is None else row["× explicit"] or row["× our explicit"]


def report(result: Mapping[str, Any]) -> None:
    """The table."""
    limits = {floor["name"]: floor["limit"] for floor in result["floors"]}

    def floor(row: Mapping[str, Any]) -> str:
        for ratio in ("reference", "explicit"):
            name = next((n for n in limits if n.replace(", ×", " ×") == f"{row['what']} × {ratio}"), None)
            if name:
                return f"≤ {limits[name]:g} × {ratio}"
        return ""

    rows = [
        [f"{r['what']} ({r['unit']})" if r["unit"] else r["what"], *(r[k] for k in (*HEADER[1:], *RATIOS)), floor(r)]
        for r in result["rows"]
    ]
    network = ", ".join(f"{name} {value}" for name, value in result["network"].items())
    show(f"SLL network ({network}), float32, batch {result['batch']}", (*HEADER, *RATIOS, "floor"), rows)
    for name, methods in result["methods"].items():
        CONSOLE.print(f"solvers, {name}: {'; '.join(methods) or 'not solved'}")
    if not result["reference"]:
        CONSOLE.print("no --reference: the paper's code was not run, and explicit means lipconvert's own module")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, repeats=7)
    parser.add_argument("--reference", metavar="CHECKOUT", help="folder with the paper's code; left out without it")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which a contestant is done (120)")
    parser.add_argument("--skip-step", action="store_true", help="no training step")
    parser.add_argument("--skip-memory", action="store_true", help="no peak memory, which runs everything once more")
    parser.add_argument("--skip-validation", action="store_true", help="no validated conversion")
    parser.add_argument("--quick", action="store_true", help="a small network: does it run at all? Floors mean nothing")
    parser.set_defaults(threads=2)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    size = QUICK if options.quick else PAPER
    CONSOLE.print(facts(options.device))
    result = run(options, size)
    report(result)
    write_json(options.json, result)
    return verdict([Floor(floor["name"], floor["value"], floor["limit"]) for floor in result["floors"]])


if __name__ == "__main__":
    sys.exit(main())
