"""Certified accuracy: how many samples are right, and provably stay right within a radius, in the floats that run.

For a sample with label l, margins m_j = y_l − y_j and constants K_j of y_l − y_j (`lipconvert.certification.bounds`), the
network, run in its own floats, gives no other class at any input within

    r = min_j ( m_j − e_j − e′_j ) / ( K_j + e″_j ),

where e_j bounds the error of m_j as evaluated, and e′_j + e″_j r that of the same difference at inputs within r
(`certification.accuracy`): solver, rounding, normalisation and glue. With K_j = √2·L and no errors it is the rule of
Tsuzuku et al. 2018 (Proposition 1, arXiv:1802.04034).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..attacks.attack import attack as withstands
from ..errors import InvalidParameterError, NotConvergedError, ShapeError
from ..foundation.arguments import class_labels, inputs_of, isolated, plain_tensor, radii_of
from ..foundation.shards import fingerprint, over
from ..linalg.rounding import SLACK, unit_roundoff
from ..networks.documents import Method
from ..networks.network import Network
from .accuracy import FARTHEST, REACH, Accuracy
from .bounds import METHODS, Bounds, LipschitzBound, class_pairs, extremes
from .documents import AttackConfig, AttackResult, MethodResult, RobustnessReport
from .empirical import empirical_lipschitz

RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)

# Samples from which the empirical Lipschitz constant climbs, and steps of the climb.
CLIMBERS, CLIMB = 32, 50

# Points of the certified-accuracy curves.
CURVE = 201

Seen = Callable[[str, int, int | None], object]


def _ignore(what: str, done: int, total: int | None) -> None:
    """Nobody looks."""


class Certifier:
    """A network with what was proved about it, ready to certify batches.

    ``method``: the strongest of `certification.bounds.METHODS` to use; the weaker ones come along. ``seconds``: for
    the search of multipliers. ``bounds``: a `LipschitzBound` of each method, weakest first.

    Raises `InvalidParameterError` for what is not a converted network of at least two logits, `NoCertificateError` where
    nothing is proved (`Bounds`, `Accuracy`).
    """

    @isolated
    def __init__(
        self, net: Network, method: str = "tightened", *, seconds: float | None = None, seen: Seen = _ignore
    ) -> None:
        if not isinstance(net, Network):
            hint = "only a converted network has a constant to certify with: lipconvert.convert(model)"
            raise InvalidParameterError("net", type(net).__name__, hint)
        if method not in METHODS:
            raise InvalidParameterError("method", repr(method), f"it must be one of {', '.join(METHODS)}")
        unit_roundoff(net.dtype, net.device)  # refuses what no radius can be proved for
        proved = Bounds(net)
        if proved.classes is None:
            hint = "Only a vector of logits, one for each class, can be certified: flatten the output, or read off features."
            raise ShapeError("the output", "(B, at least 2)", ("B", *proved.shape), hint)
        proved.bound(method, seconds=seconds, seen=seen)
        names = METHODS[: METHODS.index(method) + 1]  # type: ignore[arg-type]
        self.net, self.delta, self.classes = net, proved.delta, proved.classes
        self.method: Method = names[-1]
        self.bounds: list[LipschitzBound] = [proved.bound(name) for name in names]
        self.accuracy = Accuracy(proved)
        # pair[l, j]: the number of the pair {l, j}; the label against itself takes any
        pair = torch.zeros(proved.classes, proved.classes, dtype=torch.long)
        i, j = torch.tensor(class_pairs(proved.classes)).T
        pair[i, j] = pair[j, i] = torch.arange(len(i))
        self._pair = pair

    @isolated
    def __call__(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Per sample of a batch, on the CPU: ``radius`` (B, methods), −∞ where nothing is known, negative where
        nothing is certified; ``margin`` (B,) as evaluated; ``correct``, ``converged`` (B,) bool; ``error`` (B,):
        the largest e_j + e′_j.

        ``x`` (B, *input_shape), ``labels`` (B,) integers. Raises `ShapeError` and `InvalidParameterError` for others.
        """
        given = inputs_of(x, "the input of the network").detach()
        x = self.net.checked(given).to(self.net.device)
        found = self.accuracy.evaluate(x)
        y = found.value.double().cpu()
        labels = class_labels(labels, y)
        running = self._errors(found.pair_error, found.error, labels)
        exact, converged = y, found.converged.cpu()
        at_input = running[..., 0]
        if self.net.dtype != torch.float64:
            closer = self.accuracy.evaluate(x, double=True)
            exact, converged = closer.value, converged & closer.converged
            at_input = self._errors(closer.pair_error, closer.error, labels)[..., 0]
        own = labels.unsqueeze(1)
        differences = exact.gather(1, own) - exact
        at_input = at_input + 2.0**-51 * (exact.gather(1, own).abs() + exact.abs())  # the subtraction, and what follows
        converged &= torch.isfinite(running).all((1, 2)) & torch.isfinite(at_input).all(1) & torch.isfinite(y).all(1)
        slack = differences - at_input - running[..., 0]
        radii = []
        for bound in self.bounds:
            assert bound.pairs is not None
            radius = slack / (
                bound.pairs[labels] + running[..., 1]
            )  # 0/0 where nothing changes, and nothing is sure: 0
            radius = radius.nan_to_num(nan=0.0, posinf=FARTHEST, neginf=-math.inf).clamp(max=FARTHEST)
            radii.append(radius.scatter(1, own, math.inf).amin(1))
        radius = torch.stack(radii, dim=1)
        radius = radius - 2.0**-50 * radius.abs()
        ran, given = x.double().cpu().flatten(1), given.double().cpu().flatten(1)
        # the ball is around the caller's input, not around the float it was rounded to
        rounded = torch.linalg.vector_norm(ran - given, dim=1) * SLACK
        radius = radius - torch.where(rounded > 0, rounded, 0.0).unsqueeze(1) * SLACK
        size = torch.linalg.vector_norm(ran, dim=1)
        radius = torch.minimum(radius, (REACH[self.net.dtype] - size).unsqueeze(1))
        others = y.scatter(1, own, -math.inf).amax(1)
        margin = y.gather(1, own).squeeze(1) - others
        error = (at_input + running[..., 0]).scatter(1, own, 0.0).amax(1)
        return {
            "radius": torch.where(converged.unsqueeze(1) & (margin > 0).unsqueeze(1), radius, -math.inf),
            "margin": torch.where(converged, margin, 0.0),
            "correct": (margin > 0) & converged,
            "converged": converged,
            "error": torch.where(converged, error, 0.0),
        }

    def _errors(self, pairs: Tensor | None, error: Tensor, labels: Tensor) -> Tensor:
        """(B, q, 2): the bounds of the differences y_label − y_j."""
        if pairs is None:
            return (2.0**0.5 * error.cpu()).unsqueeze(1).expand(-1, len(self._pair), -1)
        return pairs.cpu().gather(1, self._pair[labels].unsqueeze(-1).expand(-1, -1, 2))


@isolated
def certified_radii(net: Network, x: Tensor, labels: Tensor, method: str = "tightened") -> Tensor:
    """The radius (B,), float64, within which each sample of a batch is certified; ≤ 0 or −∞: at none.

    To certify many batches make one `Certifier`. Errors are those of `certify`.
    """
    return Certifier(net, method)(x, labels)["radius"][:, -1]


@isolated
def certify(
    net: Network,
    data: Any,
    radii: Sequence[float] = RADII,
    method: str = "tightened",
    *,
    batch_size: int = 256,
    attack: AttackConfig | None = None,
    seconds: float | None = None,
    folder: str | Path | None = None,
    shard_size: int = 1024,
    seen: Seen = _ignore,
    model: str = "",
    name: str = "",
) -> RobustnessReport:
    """Natural and certified accuracy of a network on a data set, proved for the floats that run.

    ``data``: a map-style data set of (input, label), or a data loader of batches. ``radii``: l2, in the units of the input
    ([0, 1] pixels), by default 36/255, 72/255, 108/255 and 1. ``method``: ``"prescribed"`` (√2·L), ``"pairwise"`` or
    ``"tightened"``; the weaker ones are reported as well, and none certifies more than a stronger one. ``seconds`` limits the
    search for multipliers. A sample counts as certified at ε when it is classified correctly, its solve converged, and its
    certified radius is strictly greater than ε (module docstring).

    ``attack``: run one beside it, an upper bound. ``folder``: keep finished shards of ``shard_size`` samples
    there, and go on from them after a kill. In a process group (torchrun, Fabric) every process takes a share, and
    all return the same report. ``seen``: called with what is being done, done and total. ``model``, ``name``:
    words for the report.

    Raises `InvalidParameterError` for a negative radius, an unknown method or an empty data set, `ShapeError` for inputs or
    labels that do not fit, `NoCertificateError` where a stage has no proof: it names the stage and says why.
    """
    radii = radii_of(radii)
    if attack is not None and not isinstance(attack, AttackConfig):
        raise InvalidParameterError("attack", repr(attack), "it must be an AttackConfig, as AttackConfig(method='pgd')")
    thresholds = torch.tensor(sorted(radii), dtype=torch.float64)
    first = _first(data, CLIMBERS)
    certifier = Certifier(net, method, seconds=seconds, seen=seen)
    seen("an empirical Lipschitz constant", 0, None)
    empirical = _met(certifier, first)

    spent = [0.0]  # by this process on attacks

    def work(x: Tensor, labels: Tensor, start: int) -> dict[str, Tensor]:
        result = certifier(x, labels)
        if attack is not None:
            most = len(x) if attack.samples is None else max(0, min(len(x), attack.samples - start))
            stands = torch.zeros(len(x), len(thresholds), dtype=torch.bool)
            begun = time.perf_counter()
            # What is wrong or has no answer at the input itself needs no attack; NaN among the pixels would stop one.
            if bool((right := result["correct"][:most]).any()):
                rows = slice(0, most)
                tried = x[rows].cpu()
                stands[rows] = withstands(
                    net,
                    torch.where(right.reshape(-1, *[1] * (x.dim() - 1)), tried, tried[right][:1]),
                    labels[rows],
                    thresholds.tolist(),
                    method=attack.method,
                    steps=attack.steps,
                    restarts=attack.restarts,
                    box=attack.box,
                    seed=attack.seed,
                    first=start,
                ).T.cpu() & right.unsqueeze(1)
            result["stands"] = stands
            spent[0] += time.perf_counter() - begun
        return result

    key = {
        "network": fingerprint(net, glue=[*net.glue_lipschitz, *net.glue_rounding]),
        "dtype": str(net.dtype),
        "solver": [repr(stage.options) for stage in net.stages],
        "method": method,
        "seconds": seconds,
        "attack": None if attack is None else attack.model_dump(mode="json"),
        "radii": None if attack is None else thresholds.tolist(),  # without an attack one folder serves all radii
        "versions": [torch.__version__, version("lipconvert")],
    }
    found = over(
        data,
        work,
        batch_size=batch_size,
        shard_size=shard_size,
        folder=folder,
        key=json.dumps(key),
        seen=lambda done, total: seen("samples", done, total),
    )
    report = _report(certifier, found, thresholds, attack, empirical, model, name)
    if report.attack is not None:
        report = report.model_copy(update={"attack": report.attack.model_copy(update={"seconds": spent[0]})})
    return report


def _met(certifier: Certifier, x: Tensor) -> float | None:
    """An empirical Lipschitz constant from the inputs that are numbers; None where their solves do not converge."""
    x = certifier.net.checked(x)
    x = x[torch.isfinite(x).flatten(1).all(1)]
    if not len(x):
        return None
    try:
        return empirical_lipschitz(certifier.net, x, steps=CLIMB, accuracy=certifier.accuracy)
    except NotConvergedError:  # counted, sample by sample, below
        return None


def _first(data: Any, count: int) -> Tensor:
    """The first inputs of a data set or loader, (B, ...)."""
    samples: list[Any] = []
    if isinstance(data, DataLoader):
        with torch.random.fork_rng(devices=[]):
            for batch in data:
                samples = list(zip(*batch, strict=True)) if isinstance(batch, list | tuple) else [batch]
                if samples:  # a batch may be of none
                    break
    elif isinstance(data, str) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InvalidParameterError("data", type(data).__name__, "it must be a map-style data set or a DataLoader")
    else:
        samples = [data[k] for k in range(min(count, len(data)))]
    if not samples:
        raise InvalidParameterError("data", "empty", "at least one sample is needed")
    for sample in samples:
        if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], Tensor | np.ndarray):
            raise InvalidParameterError(
                "data", type(sample).__name__, "its samples must be pairs (input tensor, label)"
            )
    inputs = [plain_tensor(x, "an input of the data") for x, _ in islice(samples, count)]
    for k, x in enumerate(inputs):
        if x.shape != inputs[0].shape:
            raise ShapeError(
                f"input {k} of the data", tuple(inputs[0].shape), tuple(x.shape), "All must have one shape."
            )
    return torch.stack(inputs)


def _report(
    certifier: Certifier,
    found: dict[str, Tensor],
    thresholds: Tensor,
    attack: AttackConfig | None,
    empirical: float | None,
    model: str,
    name: str,
) -> RobustnessReport:
    net, radius, samples = certifier.net, found["radius"], len(found["margin"])
    # as far as the figure goes: half as far again as the radii asked for, or to where nothing is certified any more
    furthest = min(1.02 * max(float(radius.amax()), 0.0), 1.5 * float(thresholds[-1])) or 1.0
    curve = torch.linspace(0.0, max(furthest, float(thresholds[-1])), CURVE, dtype=torch.float64)

    def share(r: Tensor, at: Tensor) -> list[float]:
        return [int((r > threshold).sum()) / len(r) for threshold in at]

    methods = []
    for k, bound in enumerate(certifier.bounds):
        assert bound.pairs is not None
        least, greatest = extremes(bound.pairs)
        methods.append(
            MethodResult(
                method=METHODS[k],
                certified_accuracy=share(radius[:, k], thresholds),
                curve_accuracy=share(radius[:, k], curve),
                lipschitz=bound.lipschitz,
                least_pair=least,
                greatest_pair=greatest,
                seconds=bound.seconds,
            )
        )
    return RobustnessReport(
        model=model,
        data=name,
        dtype=str(net.dtype).removeprefix("torch."),
        method=methods[-1].method,
        lipschitz=net.lipschitz,
        proved_lipschitz=methods[-1].lipschitz,
        empirical_lipschitz=empirical,
        delta=certifier.delta,
        samples=samples,
        natural_accuracy=int(found["correct"].sum()) / samples,
        radii=thresholds.tolist(),
        certified_accuracy=methods[-1].certified_accuracy,
        unconverged=int((~found["converged"]).sum()),
        worst_error=float(found["error"].max()),
        methods=methods,
        curve_radii=curve.tolist(),
        sample_radii=radius[:, -1].clamp(min=0.0).tolist(),
        margins=found["margin"].tolist(),
        stages=list(certifier.bounds[-1].stages),
        attack=None if attack is None else _attacked(found, thresholds, attack),
    )


def _attacked(found: dict[str, Tensor], thresholds: Tensor, attack: AttackConfig) -> AttackResult:
    count = len(found["stands"]) if attack.samples is None else min(attack.samples, len(found["stands"]))
    stands, radius = found["stands"][:count], found["radius"][:count]
    closed: list[float | None] = []
    for k, threshold in enumerate(thresholds):
        prescribed, certified = (int((radius[:, m] > threshold).sum()) for m in (0, -1))
        gap = int(stands[:, k].sum()) - prescribed
        closed.append((certified - prescribed) / gap if gap > 0 else None)
    return AttackResult(
        method=attack.method,
        steps=attack.steps,
        restarts=attack.restarts,
        box=attack.box,
        samples=count,
        attacked_accuracy=[int(column.sum()) / count for column in stands.T],
        gap_closed=closed,
        broken=int(((radius[:, -1:] > thresholds) & ~stands).any(1).sum()),
        seconds=0.0,
    )
