"""What moves certified accuracy in fine-tuning: learning rate, free parameters, loss, epsilon, start, kernel penalty.

    python benchmarks/constraints.py --study mnist --data-dir DIR [--seeds 3] [--out results/constraints]
    python benchmarks/constraints.py --study digits [--seeds 3] [--out results/constraints]

Each variant changes one thing of the same run, for the same seeds, from the same starts: a Lip-MonDEQ on MNIST (the first
20,000 training images, 128 states) fine-tuned as an LBEN; and, for the penalty, an SLL network of 3x3 convolutions on
scikit-learn's digits. Certified accuracies are of the test images, with the prescribed L, in float64. Written are a .json
and a .md for each study: mean and sample standard deviation over the seeds, of each variant and of its difference from the
first one, seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLNetwork
from torch import nn

import lipconvert as lc
from lipconvert import data
from lipconvert.certification.tighten import best_outputs
from lipconvert.experiments.recipes import checked, markdown, spread
from lipconvert.training.finetune import Samples

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import CONSOLE, command_line, facts, machine, show, use_threads, write_json

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"

MNIST = {
    "epochs": 6,
    "batch_size": 256,
    "learning_rate": 4e-3,
    "schedule": {"kind": "one_cycle", "warm_up": 0.15},
    "loss": {"offset": 1.2, "temperature": 0.15},
    "augment": {"crop": 1, "padding": "zeros"},
    "epsilon": 0.01,
}
DIGITS = {
    "epochs": 10,
    "batch_size": 64,
    "learning_rate": 3e-4,
    "loss": {"offset": 0.6, "temperature": 0.12},
    "epsilon": 1e-3,
}
FROZEN = dict.fromkeys(("Psi", "G", "U", "V", "S", "b"), 0.0)


@dataclass(frozen=True)
class Variant:
    """One change of a run; ``start``: of what it begins with; ``reoptimise``: Λ after every epoch."""

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    start: str = "lip"
    reoptimise: bool = False


def only(*groups: str) -> dict[str, Any]:
    return {"learning_rates": FROZEN | dict.fromkeys(groups, 1.0)}


def reoptimise(net: lc.Network) -> float:
    """Make the most of L, in place: the network's one dense stage gets the multiplier that proves the least constant L* of
    its function, and its outputs grow by L/L*, which is returned.

    V is rebuilt as a root of H at the new Λ. H is nearly singular there, so that ε is less than it was.
    """
    (stage,) = net.stages
    dae = stage.dae()
    Q = best_outputs(lc.Enclosure.of(dae), dae.Lambda / dae.lipschitz)
    R = lc.H_matrix(dae.derive(Lambda=Q, lipschitz=1.0, V=None)) + dae.G.mH @ dae.G  # of R(Q): without G
    least = float(torch.linalg.eigvalsh(dae.G @ torch.linalg.solve(R, dae.G.mH)).amax()) ** 0.5
    least *= 1.0 + 1e-3  # strictly inside, so that there is an ε > 0
    if least >= dae.lipschitz:
        return 1.0
    best = lc.scale(dae.derive(Lambda=least * Q, lipschitz=least, V=None), 1.0, dae.lipschitz / least)
    best = lc.gauge(best) if best.sigma.homogeneous else best
    epsilon = min(stage.epsilon, 0.49 * float(torch.linalg.eigvalsh(lc.H_matrix(best)).amin()))
    rebuilt = lc.LBEN.from_dae(best, epsilon=epsilon)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(getattr(rebuilt, name))
    stage.epsilon = epsilon
    stage.refresh()
    return dae.lipschitz / least


def reoptimise_at_epsilon(net: lc.Network) -> None:
    """`reoptimise`, and ε as it was: W − (ε − ε′)Ψ has the same L."""
    (stage,) = net.stages
    epsilon = stage.epsilon
    reoptimise(net)
    stage.epsilon = epsilon
    stage.refresh()


ON_MNIST = (
    Variant("default"),
    Variant("learning rate 1e-7, the paper's", {"learning_rate": 1e-7}),
    Variant("learning rate 1e-4", {"learning_rate": 1e-4}),
    Variant("learning rate 1e-3", {"learning_rate": 1e-3}),
    Variant("learning rate 2e-2", {"learning_rate": 2e-2}),
    Variant("offset 0.5", {"loss.offset": 0.5}),
    Variant("offset 2", {"loss.offset": 2.0}),
    Variant("temperature 0.05", {"loss.temperature": 0.05}),
    Variant("temperature 0.5", {"loss.temperature": 0.5}),
    Variant("not in the gauge Psi = I", {"balance": False}),
    Variant("not in the gauge, Psi fixed", {"balance": False, "learning_rates.Psi": 0.0}),
    Variant("not in the gauge, Psi ten times as fast", {"balance": False, "learning_rates.Psi": 10.0}),
    Variant("Lambda re-optimised every epoch", reoptimise=True),
    Variant("only G, b", only("G", "b")),
    Variant("only U, G, b", only("U", "G", "b")),
    Variant("only V, S", only("V", "S")),
    Variant("V fixed", {"learning_rates.V": 0.0}),
    Variant("S fixed", {"learning_rates.S": 0.0}),
    Variant("epsilon 1e-4", {"epsilon": 1e-4}),
    Variant("epsilon 0.1", {"epsilon": 0.1}),
    Variant("betas 0.5, 0.9", {"betas": [0.5, 0.9]}),
    Variant("Muon", {"optimizer": "muon"}),
    Variant("Muon, learning rate 2e-2", {"optimizer": "muon", "learning_rate": 2e-2}),
    Variant("no augmentation", {"augment": {}}),
    Variant("from random weights", start="random"),
    Variant("from random weights, as long as both", {"epochs": 12}, start="random"),
    Variant(
        "Muon, 2e-2, from random weights, as long as both",
        {"optimizer": "muon", "learning_rate": 2e-2, "epochs": 12},
        start="random",
    ),
    Variant("Lip-MonDEQ trained on", {"epsilon": None}, start="source"),
)
ON_DIGITS = (
    Variant("default"),
    Variant("penalty 0.001", {"penalty.weight": 1e-3}),
    Variant("penalty 0.1, the paper's", {"penalty.weight": 0.1}),
    Variant("penalty 0.1, l2", {"penalty": {"weight": 0.1, "norm": "l2"}}),
    Variant("support fixed", {"penalty.freeze": True}),
    Variant("roots 0.1", {"roots": 0.1}),
    Variant("not in the gauge Psi = I", {"balance": False}),
    Variant("learning rate 3e-5", {"learning_rate": 3e-5}),
    Variant("learning rate 1e-3", {"learning_rate": 1e-3}),
)


@dataclass(frozen=True)
class Study:
    """A start, a run, and its variants."""

    name: str
    title: str
    base: Mapping[str, Any]
    variants: Sequence[Variant]
    train: data.Images
    test: data.Images
    source: Callable[[], nn.Module]
    random: Callable[[], nn.Module] | None
    before: Mapping[str, Any]

    def config(self, variant: Variant, seed: int) -> lc.TrainingConfig:
        return checked(self.base, lc.TrainingConfig, variant.name, {**variant.changes, "seed": seed})

    def run(self, variants: Sequence[Variant], seed: int) -> dict[str, list[float]]:
        """Natural and certified accuracy of each variant with a seed."""
        torch.manual_seed(seed)
        source = self.source()
        lc.train(source, self.train, None, checked(self.before, lc.TrainingConfig, "start", {"seed": seed}))
        found = {"the start": self.accuracies(lc.convert(source, check=False))}
        for variant in variants:
            config, begun = self.config(variant, seed), time.perf_counter()
            if variant.start == "source":
                trained = copy.deepcopy(source)
                lc.train(trained, self.train, None, config.model_copy(update={"epsilon": None}))
                net = lc.convert(trained, check=False)
            else:
                torch.manual_seed(seed)
                assert variant.start != "random" or self.random is not None
                start = self.random() if variant.start == "random" and self.random is not None else source
                net = lc.convert(start, check=False)
                if not variant.reoptimise:
                    lc.finetune(net, self.train, None, config)
                else:
                    lc.finetune(net, self.train, None, config, on_epoch=lambda _, net=net: reoptimise_at_epsilon(net))
                    reoptimise(net)  # what is kept is from before the last one
            found[variant.name] = self.accuracies(net)
            text = ", ".join(f"{100 * value:.2f}" for value in found[variant.name])
            CONSOLE.print(f"seed {seed}, {variant.name}: {text} ({time.perf_counter() - begun:.0f} s)", highlight=False)
        return found

    def accuracies(self, net: lc.Network) -> list[float]:
        pairs = Samples.of(self.test, "test").dataset(net.input_shape, torch.float64)
        report = lc.certify(net.double(), pairs, method="prescribed")
        return [report.natural_accuracy, *report.certified_accuracy]


def studies(options: argparse.Namespace) -> list[Study]:
    digits = {split: data.load("digits", split) for split in data.SPLITS}
    found = []
    if options.data_dir is not None and options.study in (None, "mnist"):
        mnist = {split: data.load("mnist", split, options.data_dir) for split in data.SPLITS}
        n = options.states
        found.append(
            Study(
                "mnist",
                f"MNIST, LBEN of {n} states from Lip-MonDEQ",
                MNIST,
                ON_MNIST,
                mnist["train"].first(options.samples),
                mnist["test"],
                lambda: MonDEQ(784, n, 10, lipschitz=1.0).float(),
                lambda: lc.LBEN(784, n, 10, epsilon=0.01).float(),
                {key: value for key, value in MNIST.items() if key != "epsilon"},
            )
        )
    found.append(
        Study(
            "digits",
            "digits, LBEN from SLL with 3x3 convolutions",
            DIGITS,
            ON_DIGITS,
            digits["train"],
            digits["test"],
            lambda: SLLNetwork(
                channels=8, in_channels=1, inner=8, conv_depth=2, dense_depth=1, image=8, pool=2, classes=10
            ).float(),
            None,
            {key: value for key, value in DIGITS.items() if key != "epsilon"} | {"epochs": 20, "learning_rate": 1e-2},
        )
    )
    return [study for study in found if options.study in (None, study.name)]


def table(study: Study, runs: Sequence[Mapping[str, Sequence[float]]]) -> tuple[list[str], list[list[str]]]:
    """Mean ± standard deviation over the seeds in %, and of the difference from the default of the same seed, at radius 1."""
    headings = ["variant", "natural", "36/255", "72/255", "108/255", "1", "mean certified - default"]
    rows = []
    for name in runs[0]:
        columns = [spread([run[name][k] for run in runs]) for k in range(5)]
        gains = [statistics.mean(run[name][1:]) - statistics.mean(run["default"][1:]) for run in runs]
        rows.append([name, *columns, spread(gains, sign="+")])
    return headings, rows


def page(study: Study, options: argparse.Namespace, headings: list[str], rows: list[list[str]]) -> str:
    """The table, with what it is of and the command that makes it again."""
    size = f" --samples {options.samples} --states {options.states} --data-dir DIR" if study.name == "mnist" else ""
    before, base = study.before, study.base
    return f"""# What moves certified accuracy: {study.title}

    python benchmarks/constraints.py --study {study.name}{size} --seeds {options.seeds} --out results/constraints

The start is trained for {before["epochs"]} epochs on {len(study.train):,} images, then fine-tuned for {base["epochs"]},
with one thing changed at a time. Accuracy on the {len(study.test):,} test images in %, certified with the
prescribed L = 1 at four l2 radii; mean and sample standard deviation over {options.seeds} seeds, in the last
column of the difference seed by seed.

{markdown(headings, rows, left=1)}"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, device=False)
    parser.add_argument("--study", choices=("mnist", "digits"), help="one of them")
    parser.add_argument("--data-dir", type=Path, default=DATA if DATA.is_dir() else None, help="where MNIST is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=20_000, help="training images of MNIST")
    parser.add_argument("--states", type=int, default=128)
    parser.add_argument("--epochs", type=int, help="of every run: does it work at all?")
    parser.add_argument("--only", metavar="TEXT", help="variants whose name holds it, and the default")
    parser.add_argument("--out", metavar="DIR", help="write a .json and a .md for each study there")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    CONSOLE.print(facts())
    content = {}
    for study in studies(options):
        if options.epochs is not None:
            short = {"epochs": options.epochs}
            study = Study(**{**vars(study), "base": {**study.base, **short}, "before": {**study.before, **short}})
        variants = [v for v in study.variants if not options.only or options.only in v.name or v.name == "default"]
        runs = [study.run(variants, seed) for seed in range(options.seeds)]
        headings, rows = table(study, runs)
        show(study.title, headings, rows)
        content[study.name] = {"runs": runs, "base": dict(study.base), "start": dict(study.before)}
        if options.out:  # after each study: they take their time
            folder = Path(options.out)
            written = {"machine": machine(), "seeds": options.seeds, **content[study.name]}
            write_json(folder / f"{study.name}.json", written)
            (folder / f"{study.name}.md").write_text(page(study, options, headings, rows), encoding="utf-8")
    write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
