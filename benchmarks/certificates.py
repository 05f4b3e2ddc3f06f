"""Certified accuracy by every method for trained networks of each architecture, beside an attack: what tightening is worth.

    python benchmarks/certificates.py [--quick] [--only aol ...] [--threads 2] [--markdown]

Networks of each architecture are trained on MNIST, and the paper's convolutional one on CIFAR-10 (JPEG q75); each is
converted and certified on its test images with the prescribed, the pairwise and the tightened constants, and attacked with
PGD over the whole l2 ball. Then points are aimed at certified samples, from random starts, at the certified radius itself
and at the radii of the table: none may change the class. Trained weights are kept in benchmarks/out; with them a run repeats
itself.

Data sets that are not there are skipped: MNIST as torchvision keeps it in --data-dir, CIFAR-10 as test.parquet and
train.parquet (columns img, label) in --cifar, by default its folder cifar10-jpeg. Exit status 1 when a floor is missed.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.g_mondeq import GMonDEQ
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLLinear, SLLNetwork
from rich.markup import escape
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lipconvert as lc
from lipconvert import data
from lipconvert.certification.certify import RADII
from lipconvert.training.documents import LossConfig, ScheduleConfig

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import CONSOLE, Floor, command_line, facts, machine, show, use_threads, verdict, write_json

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"
NAMES_OF_RADII = ("36/255", "72/255", "108/255", "1")
FLOAT32 = ("aol", "sandwich")  # certified on all test images in float32 too; the others on a few, to be aimed at
FIRST = 1000  # images that are attacked in float64, and that are certified where not all are
INSIDE = 1.0 - 1e-9  # aimed at this much of a certified radius
BATCH = 250
EVERY = 60.0  # seconds between lines of progress where there is no terminal

MNIST, CIFAR = "MNIST", "CIFAR-10 (JPEG q75)"


@dataclass(frozen=True)
class Budget:
    """How much of everything: images, epochs, attacked and aimed-at samples, restarts and steps of the aiming."""

    training: int | None
    test: int | None
    epochs: int
    attacked: int
    aimed: int
    restarts: int
    steps: int = 20
    seconds: float | None = None  # for the search of multipliers

    def quick(self) -> Budget:
        return replace(self, training=256, test=40, epochs=1, attacked=10, aimed=10, restarts=2, steps=5)


@dataclass(frozen=True)
class Network:
    """One row of the benchmark. ``build`` takes whether it should be tiny; ``why``: what its numbers should be read with."""

    name: str
    data: str
    build: Callable[[bool], nn.Module]
    budget: Budget
    learning_rate: float = 1e-3
    batch: int = 256
    offset: float = 1.0
    temperature: float = 0.25
    merge: bool = False
    why: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 28, 28) if self.data == MNIST else (3, 32, 32)


def aol(tiny: bool) -> nn.Module:
    n = 8 if tiny else 128
    return nn.Sequential(nn.Flatten(), AOLLinear(784, n), nn.ReLU(), AOLLinear(n, n), nn.ReLU(), AOLLinear(n, 10))


def residual(layer: type[CPLLinear] | type[SLLLinear]) -> Callable[[bool], nn.Module]:
    """Two residual layers between a linear layer in front and a linear readout, both trained, of norm at most 1."""

    def build(tiny: bool) -> nn.Module:
        n = 12 if tiny else 64
        return nn.Sequential(nn.Flatten(), AOLLinear(784, n), layer(n), layer(n), AOLLinear(n, 10))

    return build


def equilibrium(layer: type[MonDEQ] | type[GMonDEQ]) -> Callable[[bool], nn.Module]:
    """Behind pooling to 14 x 14 pixels: the gradient of an orthogonal U of 784 columns would take most of the time."""

    def build(tiny: bool) -> nn.Module:
        return nn.Sequential(lc.MeanPool(2), nn.Flatten(), layer(196, 12 if tiny else 128, 10, lipschitz=1.0))

    return build


def lben(tiny: bool) -> nn.Module:
    return nn.Sequential(nn.Flatten(), lc.LBEN(784, 12 if tiny else 128, 10))


def sandwich(tiny: bool) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *SandwichNetwork(inputs=784, features=12 if tiny else 128, dense_depth=2))


def paper(tiny: bool) -> nn.Module:
    """The paper's CIFAR-10 network behind a shift of the pixels, which is an isometry."""
    sizes = {"channels": 8, "inner": 5, "conv_depth": 4, "features": 512, "dense_depth": 2}
    small = {"channels": 4, "inner": 2, "conv_depth": 1, "dense_depth": 1, "pool": 16}
    return nn.Sequential(lc.Normalize(0.45, 1.0), SLLNetwork(**(small if tiny else sizes), image=32, classes=10))


IDENTITY = (
    "a residual network is the identity where its activations are off: with the first features as logits y_i - y_j then is "
    "the difference of two pixels, of norm √2, and no multiplier can prove less"
)
FULL = Budget(training=None, test=None, epochs=4, attacked=FIRST, aimed=600, restarts=9)
NETWORKS = (
    Network("aol", MNIST, aol, replace(FULL, epochs=8, attacked=10_000)),
    Network("cpl", MNIST, residual(CPLLinear), FULL, merge=True),
    Network("g_mondeq", MNIST, equilibrium(GMonDEQ), FULL),
    Network("lben", MNIST, lben, FULL),
    Network("mondeq", MNIST, equilibrium(MonDEQ), FULL),
    Network("sandwich", MNIST, sandwich, FULL),
    Network("sll", MNIST, residual(SLLLinear), FULL, merge=True),
    Network(
        "sll-conv",
        CIFAR,
        paper,
        Budget(training=None, test=None, epochs=4, attacked=200, aimed=100, restarts=9, seconds=60.0),
        learning_rate=5e-3,
        batch=64,
        offset=0.5,
        why=IDENTITY,
    ),
)


@dataclass(frozen=True)
class AtLeast(Floor):
    """What must be reached: ``value`` ≥ ``limit``."""

    @property
    def passed(self) -> bool:
        return self.value is None or self.value >= self.limit

    def __str__(self) -> str:
        return (
            f"{self.name}: not measured"
            if self.value is None
            else f"{self.name}: {self.value:.3g}, at least {self.limit:.3g}"
        )


@dataclass(frozen=True)
class Split:
    """The images and labels of one part of a data set."""

    x: Tensor
    labels: Tensor

    def first(self, count: int | None) -> Split:
        return Split(self.x[:count], self.labels[:count])

    @property
    def samples(self) -> TensorDataset:
        return TensorDataset(self.x, self.labels)


class Run:
    """What all networks share: options, the data sets that are there, where weights are kept, and who is told."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.out = Path(options.out)
        self.sets: dict[tuple[str, str], Split] = {}
        self.status, self.told = CONSOLE.status(""), time.monotonic()

    def split(self, name: str, part: str) -> Split:
        """Raises `DataError` where the files are missing."""
        if (name, part) not in self.sets:
            folder = Path(self.options.data_dir)
            cifar = self.options.cifar or folder / "cifar10-jpeg"
            images = data.load("mnist", part, folder) if name == MNIST else data.load(f"parquet:{cifar}", part)
            self.sets[name, part] = Split(*images.tensors())
        return self.sets[name, part]

    def tell(self, network: str, what: str, done: int = 0, total: int | None = None) -> None:
        """What is being done: a line that changes, or in a log a new one now and then."""
        text = escape(f"{network}: {what}" + (f", {done} of {total}" if total else ""))
        self.status.update(text)
        if not CONSOLE.is_terminal and time.monotonic() > self.told + EVERY:
            CONSOLE.print(text, highlight=False)
            self.told = time.monotonic()

    def said(self, text: str) -> None:
        CONSOLE.print(escape(text), highlight=False)


def train(network: Network, budget: Budget, model: nn.Module, part: Split, run: Run) -> None:
    """Adam at a constant rate on the margin loss, in float32; the same for the same seed."""
    config = lc.TrainingConfig(
        epochs=budget.epochs,
        batch_size=network.batch,
        learning_rate=network.learning_rate,
        schedule=ScheduleConfig(kind="constant"),
        loss=LossConfig(offset=network.offset, temperature=network.temperature),
    )
    lc.train(
        model,
        TensorDataset(part.x, part.labels),
        None,
        config,
        input_shape=part.x.shape[1:],
        on_step=lambda done, total, _: run.tell(network.name, "training", done, total),
    )


def trained(network: Network, budget: Budget, run: Run) -> tuple[nn.Module, float]:
    """The model with trained weights, from the cache where they are, and the seconds its training took."""
    tiny = run.options.quick
    torch.manual_seed(0)
    model = network.build(tiny)
    recipe = (budget.training, budget.epochs, network.learning_rate, network.batch, network.offset, network.temperature)
    key = hashlib.sha256(repr((network.data, str(model), recipe)).encode()).hexdigest()[:12]
    file = run.out / f"{network.name}-{key}.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["weights"])
    else:
        part = run.split(network.data, "train").first(budget.training)
        begun = time.perf_counter()
        train(network, budget, model, part, run)
        kept = {"weights": model.state_dict(), "seconds": time.perf_counter() - begun}
        run.out.mkdir(parents=True, exist_ok=True)
        torch.save(kept, file)
        run.said(f"{network.name}: trained in {kept['seconds']:.0f} s")
    return model.eval(), kept["seconds"]


def certificate(
    network: Network, net: lc.Network, part: Split, budget: Budget, attacked: int, run: Run
) -> tuple[dict[str, Any], Tensor]:
    """Numbers of one report, and the certified radius of every sample."""
    label = f"{network.name}, {str(net.dtype).removeprefix('torch.')}"
    attack = lc.AttackConfig(steps=50, samples=attacked) if attacked else None
    begun = time.perf_counter()
    report = lc.certify(
        net, part.samples, attack=attack, seconds=budget.seconds, seen=lambda *what: run.tell(label, *what)
    )
    seconds = time.perf_counter() - begun
    run.said(f"{label}: certified {report.samples} samples in {seconds:.0f} s")
    methods = [entry.model_dump(exclude={"curve_accuracy"}) for entry in report.methods]
    for entry in methods:
        entry["mean_pair"] = entry["greatest_pair"] if entry["least_pair"] == entry["greatest_pair"] else None
    return {
        "network": network.name,
        "data": network.data,
        "dtype": report.dtype,
        "states": [stage.states for stage in report.stages if stage.states],
        "samples": report.samples,
        "natural_accuracy": report.natural_accuracy,
        "radii": report.radii,
        "prescribed": report.lipschitz,
        "proved": report.proved_lipschitz,
        "met": report.empirical_lipschitz,
        "delta": report.delta,
        "worst_error": report.worst_error,
        "unconverged": report.unconverged,
        "methods": methods,
        "stages": [stage.model_dump() for stage in report.stages],
        "attack": None if report.attack is None else report.attack.model_dump(),
        "seconds": seconds,
        "load": list(os.getloadavg()),
    }, torch.tensor(report.sample_radii, dtype=torch.float64)


def mean_pairs(result: dict[str, Any], net: lc.Network, budget: Budget, run: Run) -> None:
    """The means of the constants of all pairs, by finding them once more; and the shorter time of both."""
    if all(entry["mean_pair"] is not None for entry in result["methods"]):
        return
    run.tell(result["network"], "the constants of all pairs")
    for entry, bound in zip(result["methods"], lc.Certifier(net, seconds=budget.seconds).bounds, strict=True):
        assert bound.pairs is not None
        entry["mean_pair"] = float(bound.pairs.sum()) / (len(bound.pairs) * (len(bound.pairs) - 1))
        entry["seconds"] = min(entry["seconds"], bound.seconds)


def aim(network: Network, net: lc.Network, part: Split, radius: Tensor, budget: Budget, run: Run) -> dict[str, Any]:
    """Points aimed at certified samples: how many, how near the nearest came, and those that changed the class."""
    rows = (radius > 0).nonzero().flatten()[: budget.aimed]
    label = f"{network.name}, {str(net.dtype).removeprefix('torch.')}"
    points, nearest, broken = 0, 1.0, []
    begun = time.perf_counter()
    for done, chunk in enumerate(rows.split(BATCH)):
        run.tell(label, "aimed at", done * BATCH, len(rows))
        own = [(radius[chunk] * INSIDE, budget.restarts, chunk)]
        fixed = [(torch.full((int((radius[chunk] > r).sum()),), r), 1, chunk[radius[chunk] > r]) for r in RADII]
        for seed, (reach, restarts, samples) in enumerate(own + fixed):
            if not len(samples):
                continue
            x, labels = part.x[samples], part.labels[samples]
            found, margin = lc.pgd(net, x, labels, reach, steps=budget.steps, restarts=restarts, seed=seed)
            again, before = (least_margin(net, at, labels) for at in (found, x))
            points += len(samples) * restarts
            nearest = min(nearest, float((torch.minimum(margin, again) / before).min()))
            for k in (torch.minimum(margin, again) <= 0).nonzero().flatten().tolist():
                broken.append(
                    {"sample": int(samples[k]), "radius": float(reach[k]), "seed": seed, "margin": float(again[k])}
                )
    return {
        "network": network.name,
        "dtype": str(net.dtype).removeprefix("torch."),
        "samples": len(rows),
        "points": points,
        "nearest": nearest,
        "broken": broken,
        "seconds": time.perf_counter() - begun,
    }


def least_margin(net: lc.Network, x: Tensor, labels: Tensor) -> Tensor:
    """y_label − max_{j≠label} y_j by the network's own forward, (B,)."""
    with torch.no_grad():
        y = net(x)
    own = labels.unsqueeze(1)
    return y.gather(1, own).squeeze(1) - y.scatter(1, own, -math.inf).amax(1)


def measure(network: Network, run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The reports of one network in both dtypes, and what was aimed at it."""
    budget = network.budget.quick() if run.options.quick else network.budget
    model, seconds = trained(network, budget, run)
    part = run.split(network.data, "test").first(budget.test)
    net = lc.convert(model, network.shape, check=False, merge=network.merge)
    x = part.x[:64].double()
    with torch.no_grad():
        difference = float((model.double()(x) - net(x)).abs().max())
    results, aimed = [], []
    for dtype in (torch.float64, torch.float32):
        net = net.to(dtype)
        whole = dtype == torch.float64 or network.name in FLOAT32
        seen = part if whole else part.first(FIRST)
        attacked = min(FIRST if dtype == torch.float64 else budget.attacked, budget.attacked) if whole else 0
        attacked = min(attacked, run.options.attack_samples or attacked)
        result, radius = certificate(network, net, seen, budget, attacked, run)
        result |= {"train_seconds": seconds, "max_difference": difference, "why": network.why, "epochs": budget.epochs}
        if whole:
            mean_pairs(result, net, budget, run)
        results.append(result)
        aimed.append(aim(network, net, seen, radius, budget, run))
        run.said(
            "{network}, {dtype}: {points} points aimed at {samples} samples, ".format(**aimed[-1])
            + f"{len(aimed[-1]['broken'])} changed the class"
        )
    return results, aimed


def floors(results: Sequence[Mapping[str, Any]], aimed: Sequence[Mapping[str, Any]], quick: bool) -> list[Floor]:
    found = [r for r in results if r["network"] == "aol" and r["dtype"] == "float32"] if not quick else []
    points = gap = seconds = None
    gains: list[float | None] = [None, None]
    if found:
        first, last = found[0]["methods"][0], found[0]["methods"][-1]
        gains = [100.0 * (last["certified_accuracy"][k] - first["certified_accuracy"][k]) for k in (2, 3)]
        gap, seconds = found[0]["attack"]["gap_closed"][3], last["seconds"]
    if not quick and {r["network"] for r in results} == {network.name for network in NETWORKS}:
        points = float(sum(a["points"] for a in aimed))
    broken = sum(len(a["broken"]) for a in aimed) + sum(r["attack"]["broken"] for r in results if r["attack"])
    return [
        AtLeast("aol, float32: tightened - prescribed at 1, in points", gains[1], 6.0),
        AtLeast("aol, float32: tightened - prescribed at 108/255, in points", gains[0], 1.3),
        AtLeast("aol, float32: share of attacked - prescribed that is certified at 1", gap, 0.6),
        Floor("aol, float32: seconds of search and proofs of 45 pairs", seconds, 15.0),
        AtLeast("points aimed at certified samples", points, 1e5),
        Floor("certified samples that changed their class", float(broken), 0.0),
    ]


NETWORK_HEADER = (
    "network", "data", "floats", "states", "images", "natural (%)", "L prescribed", "L proved", "L met", "δ", "worst error",
    "unconverged", "trained (s)",
)  # fmt: skip
METHOD_HEADER = (
    "network", "floats", "method", *NAMES_OF_RADII, "L", "least pair", "mean pair", "greatest pair", "seconds"
)  # fmt: skip
AIMED_HEADER = ("network", "floats", "samples", "points", "least margin left (%)", "changed class", "seconds")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100.0 * share:.2f}"


def constant(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def network_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            r["network"], r["data"], r["dtype"], " + ".join(map(str, r["states"])), str(r["samples"]),
            percent(r["natural_accuracy"]), f"{r['prescribed']:.4g}", constant(r["proved"]), constant(r["met"]),
            f"{r['delta']:.0e}", f"{r['worst_error']:.1e}", str(r["unconverged"]), f"{r['train_seconds']:.0f}",
        ]
        for r in results
    ]  # fmt: skip


def method_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for r in results:
        if r["attack"] is None:
            continue
        for m in r["methods"]:
            pairs = [constant(m[key]) for key in ("lipschitz", "least_pair", "mean_pair", "greatest_pair")]
            accuracy = [percent(a) for a in m["certified_accuracy"]]
            rows.append([r["network"], r["dtype"], m["method"], *accuracy, *pairs, f"{m['seconds']:.2f}"])
        a = r["attack"]
        attacked, closed = ([percent(v) for v in a[key]] for key in ("attacked_accuracy", "gap_closed"))
        what = f"PGD-{a['steps']}, first {a['samples']}"
        rows.append(
            [r["network"], r["dtype"], what, *attacked, constant(r["met"]), "–", "–", "–", f"{a['seconds']:.0f}"]
        )
        rows.append([r["network"], r["dtype"], "gap closed (%)", *closed, *["–"] * 5])
    return rows


def aimed_rows(aimed: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [a["network"], a["dtype"], str(a["samples"]), str(a["points"]), percent(a["nearest"]), str(len(a["broken"])),
         f"{a['seconds']:.0f}"]
        for a in aimed
    ]  # fmt: skip


def markdown(content: Mapping[str, Any], budget: str) -> str:
    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [
            "| " + " | ".join(header) + " |",
            "|:--|" + "--:|" * (len(header) - 1),
            *("| " + " | ".join(r) + " |" for r in rows),
        ]

    results, aimed = content["results"], content["aimed"]
    whole = [r for r in results if r["attack"] is not None]
    why = dict.fromkeys((r["network"], r["why"]) for r in results if r["why"])
    lines = [
        "# Certificates",
        "",
        f"`python benchmarks/certificates.py --markdown`: {budget}",
        "",
        "Certified accuracy in % at l2 radii on [0, 1] pixels, by each method; PGD-50 over the whole ball, an upper bound, "
        "on the first images; the share of attacked - prescribed that the tightened method certifies, on the same images. "
        "L: of the logits as a vector, in the row of the attack the largest quotient that a search met, a lower bound. "
        "Pairs: constants of y_i - y_j. Seconds: to find and prove the constants, and of the attack.",
        "",
        *table(METHOD_HEADER, method_rows(whole)),
        "",
        "## Networks",
        "",
        *table(NETWORK_HEADER, network_rows(whole)),
        "",
        "*δ*: L was proved at L(1 + δ). *Worst error*: the largest bound of the error of a logit difference at an image, "
        "subtracted from its margin. *L met*: a lower bound.",
        "",
        *(f"{name}: {reason}." for name, reason in why),
        *([""] if why else []),
        "## Points aimed at certified samples",
        "",
        "PGD from random starts at the certified radius itself (less one part in 10⁹), aimed at each rival in turn, and at "
        "the radii of the table below it; counted where the class of the network's own forward changed.",
        "",
        *table(AIMED_HEADER, aimed_rows(aimed)),
        "",
        f"{sum(a['points'] for a in aimed)} points, {sum(len(a['broken']) for a in aimed)} changed the class.",
        "",
        "## Floors",
        "",
        *(f"- {'met' if f['passed'] else 'missed'}: {f['text']}" for f in content["floors"] if f["value"] is not None),
        "",
    ]
    return "\n".join(lines)


def budget_in_words() -> str:
    """What a full run spends, from the networks themselves."""
    parts = []
    for name in (MNIST, CIFAR):
        members = [network for network in NETWORKS if network.data == name]
        epochs = ", ".join(f"{n.name} {n.budget.epochs}" for n in members)
        n = members[0]
        limit = "" if n.budget.seconds is None else f", the search for multipliers limited to {n.budget.seconds:g} s"
        parts.append(
            f"{name}: all training images, epochs: {epochs}; Adam {n.learning_rate:g}, batch {n.batch}, "
            f"margin √2·{n.offset:g}, temperature {n.temperature:g}{limit}"
        )
    return ". ".join(parts) + "."


def processor() -> str:
    """The model of the CPU where Linux says it, and the number of its cores here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {os.cpu_count()} cores"


def report(content: Mapping[str, Any]) -> None:
    """The tables, on the console."""
    results = content["results"]
    show("Networks", NETWORK_HEADER, network_rows(results))
    show("Certified accuracy in %, and constants", METHOD_HEADER, method_rows(results))
    show("Points aimed at certified samples", AIMED_HEADER, aimed_rows(content["aimed"]))
    for name, reason in dict.fromkeys((r["network"], r["why"]) for r in results if r["why"]):
        CONSOLE.print(f"{name}: {reason}", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, device=False)
    names = [network.name for network in NETWORKS]
    parser.add_argument("--quick", action="store_true", help="tiny networks and few images: shows that it runs")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--attack-samples", type=int, metavar="N", help="attack no more than the first N images")
    parser.add_argument("--data-dir", default=DATA, metavar="DIR", help="where MNIST is (%(default)s)")
    parser.add_argument(
        "--cifar", metavar="DIR", help="where CIFAR-10's Parquet files are (cifar10-jpeg in --data-dir)"
    )
    parser.add_argument("--out", default=HERE / "out", metavar="DIR", help="where weights are kept")
    parser.add_argument(
        "--markdown", nargs="?", const=HERE / "certificates.md", metavar="FILE", help="write tables there"
    )
    parser.set_defaults(json=HERE / "out" / "certificates.json")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    run = Run(options)
    run.said(f"{facts()}, {processor()}, load {os.getloadavg()[0]:.1f}")
    content: dict[str, Any] = {"machine": machine() | {"processor": processor()}, "quick": options.quick}
    content |= {"results": [], "aimed": []}
    begun = time.perf_counter()
    with run.status:
        for network in NETWORKS:
            if network.name not in options.only:
                continue
            try:
                for part in ("train", "test"):
                    run.split(network.data, part)
            except lc.DataError as error:
                run.said(f"{network.name} is skipped: {error}")
                continue
            results, aimed = measure(network, run)
            content["results"] += results
            content["aimed"] += aimed
            write_json(options.json, content)  # what there is, should the run be cut short
    content["seconds"] = time.perf_counter() - begun
    found = floors(content["results"], content["aimed"], options.quick)
    content["floors"] = [asdict(floor) | {"passed": floor.passed, "text": str(floor)} for floor in found]
    write_json(options.json, content)
    report(content)
    for a in content["aimed"]:
        for point in a["broken"]:
            run.said(f"{a['network']}, {a['dtype']}: {point}")
    if options.markdown:
        where = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        words = f"{where}, {content['seconds'] / 60:.0f} minutes. {budget_in_words()}"
        Path(options.markdown).write_text(markdown(content, words), encoding="utf-8")
    for floor in found:
        run.said(f"{'not measured' if floor.value is None else 'met' if floor.passed else 'missed'}: {floor}")
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
