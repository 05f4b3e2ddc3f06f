"""Attacks: what a network does not withstand, an upper bound beside the certified lower one.

An attack that fails proves nothing; one that succeeds is a counterexample. So a perturbed input lies in its ball as the
floats it consists of, not to round-off. Likewise `empirical_lipschitz` is a lower bound beside the constant L.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..certification.accuracy import Accuracy
from ..certification.bounds import Bounds
from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import count, isolated, number, plain_tensor, radii_of
from ..foundation.integrity import require_own
from ..linalg.rounding import SLACK, gamma
from ..linalg.spectrum import require_finite_samples
from ..networks.network import Network

METHODS = ("pgd", "apgd", "ensemble")
# Below, the toolbox's Square attack has tiles without pixels.
LEAST_SQUARE = 10
# Rounds in which the entries that stop at the box are found. On MNIST the third changes margins by 1e-14, a fourth nothing.
ROUNDS = 3
# Rivals that an ensemble aims at one by one, as AutoAttack does.
MOST_RIVALS = 9


@isolated
def pgd(
    net: Network,
    x: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 50,
    restarts: int = 1,
    loss: str = "margin",
    box: tuple[float, float] | None = None,
    seed: int = 0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent in the l2 ball: (x′, margin), x′ (B, *input_shape) and margin (B,) in the network's dtype.

        x_{k+1} = P( x_k + s_k g/‖g‖ ),   s_k = radius·(1 + cos(πk/steps)),   P into ‖x′ − x‖₂ ≤ radius and the box

    ``x`` (B, *input_shape), cast to the network's dtype first; ``labels`` (B,) integers; ``radius`` one number, or one for
    each sample (B,); ``box``: least and largest entry of x and x′. g is the gradient of ``loss``: ``"margin"``, which is
    max_{j≠label} y_j − y_label and does not saturate; ``"cross_entropy"``; or ``"dlr"``, that margin divided by
    y_π1 − y_π3 (Croce and Hein 2020), with two classes the margin. Each of the ``restarts`` begins at a random point of the
    ball. With the margin, the k-th after the first aims at one rival, the (k+1)-th best at x, in turn (Gowal et al. 2019,
    arXiv:1910.09338): as many restarts as classes try them all.

    The margin is y_label − max_{j≠label} y_j at x′, the least found, x among what is tried. At ≤ 0 the sample is broken, as
    `lipconvert.certify` counts, and leaves the batch. ‖x′ − x‖₂ ≤ radius holds exactly. A random start depends on ``seed``
    and on the sample's place in the data, ``first`` + its row: the result is that of any other batch, to round-off.

    Raises `InvalidParameterError`, `ShapeError` and `NotFiniteError` for arguments that do not fit; `ModifiedModuleError` for
    hooks and other ways in which the network is not what its class says (`foundation.integrity`); `NotConvergedError`, even
    if the stages' options say not to throw: where the equilibrium is not known, a sample is neither right nor broken.
    """
    _require_counts(steps=steps, restarts=restarts)
    return _attacked(_PGD(steps), net, x, labels, radius, restarts, loss, box, seed, first)


@isolated
def apgd(
    net: Network,
    x: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 50,
    restarts: int = 1,
    loss: str = "margin",
    box: tuple[float, float] | None = None,
    seed: int = 0,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Auto-PGD in the l2 ball (Croce and Hein 2020, arXiv:2003.01690, Algorithm 1); arguments, result, errors as for `pgd`.

        z = P( x_k + η g/‖g‖ ),   x_{k+1} = P( x_k + ¾(z − x_k) + ¼(x_k − x_{k−1}) ),   η = 2·radius at first

    At checkpoints, a sample whose loss rose in fewer than three steps of four, or whose best loss stayed though η was not
    halved at the one before, halves η and goes on from its best point.
    """
    _require_counts(steps=steps, restarts=restarts)
    return _attacked(_APGD(steps), net, x, labels, radius, restarts, loss, box, seed, first)


@isolated
def attack(
    net: Network,
    x: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    *,
    method: str = "pgd",
    steps: int = 50,
    restarts: int = 1,
    box: tuple[float, float] | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Which samples are still right after an attack: (len(radii), B) bool, a row for each of the ``radii`` in their order.

    The mean of a row is an upper bound of the robust accuracy at its radius. Balls are nested: going up, only samples that
    still stand are attacked; what breaks one is drawn back into the smaller balls and tried there. A sample that is wrong
    or tied at x itself is broken at every radius.

    ``method``: `pgd`; `apgd`; or ``"ensemble"``, in the manner of AutoAttack: `apgd` aimed at every rival (9 at most),
    then Auto-PGD of the Adversarial Robustness Toolbox with cross entropy and DLR and, on images of 10×10 pixels or more in
    a box, its Square attack with 10·``steps`` queries. The toolbox is the extra ``attack``; it works in float32 and draws
    for a batch at a time, so there a result may depend on the batch. Other arguments and errors are those of `pgd`; a
    missing extra is an `InvalidParameterError`.
    """
    if method not in METHODS:
        raise InvalidParameterError("method", repr(method), f"it must be one of {', '.join(METHODS)}")
    radii = radii_of(radii)
    _require_counts(steps=steps, restarts=restarts)
    toolbox = _toolbox() if method == "ensemble" else None
    ascent = _PGD(steps) if method == "pgd" else _APGD(steps)
    with _frozen(net):
        center, y = _ball(net, x, 0.0, box)
        balls = [replace(center, radius=_radius(radius, center.x)) for radius in sorted(radii)]
        labels, index = class_labels(labels, y), _index(x, seed, first)
        if toolbox is not None:
            restarts = max(restarts, min(y.shape[1], MOST_RIVALS + 1))
        attempts = [partial(_climb, net, ascent, "margin", (seed, k)) for k in range(restarts)]
        if toolbox is not None:
            attempts += _foreign(net, toolbox, y.shape[1], box, steps, seed)
        # Of the ascending radii, how many the sample withstands.
        withstood = torch.where(_margin(y, labels) > 0, len(balls), 0)
        for k, ball in enumerate(balls):
            if not bool((ball.radius > 0).any()):  # x alone
                continue
            standing = (withstood > k).nonzero().flatten()
            found, margin = _in_turn(net, attempts, ball.take(standing), labels[standing], index[standing.cpu()])
            rows, found = standing[margin <= 0], found[margin <= 0]
            withstood[rows] = k
            for smaller in range(k - 1, -1, -1):
                found = balls[smaller].take(rows).project(found)
                still = _margin(_logits(net, found), labels[rows]) <= 0
                rows, found = rows[still], found[still]
                withstood[rows] = smaller
    order = sorted(radii)
    place = torch.tensor([order.index(radius) for radius in radii], device=withstood.device)
    return withstood > place.unsqueeze(-1)


@isolated
def empirical_lipschitz(
    net: Network,
    x: Tensor,
    *,
    steps: int = 50,
    pair: tuple[int, int] | None = None,
    seed: int = 0,
    accuracy: Accuracy | None = None,
) -> float:
    """A lower bound of the network's Lipschitz constant, or with ``pair=(i, j)`` of that of the logit difference y_i − y_j.

        max ( ‖f(a) − f(b)‖ − e(a) − e(b) ) / ‖a − b‖

    over the best pair (a, b) found around each sample of x (B, *input_shape).

    *Rigorous*: a difference quotient is a lower bound wherever a and b come from. f is the exact network of the floats in
    use, evaluated in float64; e bounds what solver and rounding leave (`Accuracy`), times √2 for a pair; ‖a − b‖ is rounded
    up. ``accuracy``: of this network, where there is one already.

    *Heuristic*: the pairs. From each sample a segment a, b = c ± hv/2 climbs, by first derivatives (an equilibrium has no
    others):

        w = (f(a) − f(b))/‖·‖,   v ← (J(a)′w + J(b)′w)/‖·‖,   c ← c + ½h (J(a)′w − J(b)′w)/‖·‖

    The first is a power iteration of J′J, the second goes where the quotient is larger. For a quarter of the steps c stays at
    the sample, with h a thousandth of the typical ‖x‖; then h falls from that to a hundredth. Nothing says how close to the
    constant it comes. Segments may leave the range of pixels, as the constant does.

    Raises `InvalidParameterError`, `ShapeError` and `NotFiniteError` for arguments that do not fit, `NotConvergedError`, and
    `NoCertificateError` where no e is proved.
    """
    _require_counts(steps=steps)
    x = _network(net).checked(x)
    if not len(x):
        raise InvalidParameterError("x", "empty", "at least one sample is needed to start from")
    with _frozen(net):
        ball, y = _ball(net, x, 0.0, None)
        center, outputs = ball.x, y.shape[1]
        if pair is not None and (len(set(pair)) != 2 or not all(0 <= k < outputs for k in pair)):
            raise InvalidParameterError("pair", pair, f"it must be two of the outputs 0..{outputs - 1}")

        def rise(y: Tensor) -> Tensor:  # of a batch of all a, then all b
            difference = (y[: len(center)] - y[len(center) :]).flatten(1)
            return _norm(difference) if pair is None else (difference[:, pair[0]] - difference[:, pair[1]]).abs()

        size = float(_norm(center).square().mean().sqrt()) or 1.0
        direction = _unit(_gaussian(_index(x, seed, 0), center.shape[1], (seed,)).to(center))
        best, ends = torch.full_like(center[:, 0], -math.inf), torch.cat([center, center])
        still = steps // 4
        for k in range(steps):
            h = size * (1e-3 if k < still else 0.01 ** ((k - still) / (steps - still)))
            points = torch.cat([center + 0.5 * h * direction, center - 0.5 * h * direction])
            _, found, slopes = _derived(net, points, rise)
            quotient = found / _norm(points[: len(center)] - points[len(center) :])
            better = quotient > best
            best, ends = torch.where(better, quotient, best), torch.where(better.repeat(2)[:, None], points, ends)
            up, down = slopes[: len(center)], slopes[len(center) :]
            turned = _norm(up - down) > 0  # else a sees what b sees, and the next, longer segment may see more
            direction = torch.where(turned[:, None], _unit(up - down), direction)
            # Where a and b have one derivative, the difference is round-off and leads nowhere.
            differ = _norm(up + down) > 1e3 * torch.finfo(up.dtype).eps * _norm(up - down)
            if k >= still:
                center = torch.where(differ[:, None], center + 0.5 * h * _unit(up + down), center)
        accuracy = accuracy or Accuracy(Bounds(net))
        evaluation = accuracy.evaluate(ends.reshape(-1, *net.input_shape), double=True)
    error = (1.0 if pair is None else math.sqrt(2.0)) * evaluation.error[:, 0]
    a, b = ends.double().cpu().chunk(2)
    slack = (error[: len(a)] + error[len(a) :]) * SLACK
    bound = (rise(evaluation.value) - slack) / (_norm(a - b) * SLACK)
    known = evaluation.converged[: len(a)] & evaluation.converged[len(a) :]
    return max(0.0, float(torch.where(known, bound, 0.0).max()))


@contextmanager
def _frozen(net: Network) -> Iterator[None]:
    """Inside, parameters take no gradient and unconverged solves raise; afterwards the network is as it was."""
    require_own(_network(net))
    trained = [p for p in net.parameters() if p.requires_grad]
    options = [stage.options for stage in net.stages]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for stage in net.stages:
            stage.options = replace(stage.options, throw=True)
        # Gradients are taken inside also when the caller wants none.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for stage, before in zip(net.stages, options, strict=True):
            stage.options = before


@dataclass(frozen=True)
class _Ball:
    """What an attack may give the network: ‖x′ − x‖₂ ≤ radius, entries in the box; samples are flat."""

    x: Tensor  # (B, p)
    radius: Tensor  # (B,), float64
    box: tuple[float, float] | None

    def take(self, samples: Tensor | slice) -> _Ball:
        return replace(self, x=self.x[samples], radius=self.radius[samples])

    def project(self, z: Tensor) -> Tensor:
        """The point of the ball and the box next to z (B, p); ‖x′ − x‖₂ ≤ radius holds in exact arithmetic."""
        # The squares of smaller numbers underflow: such a ball is taken as its centre.
        x, wide = self.x.double(), (self.radius > 1e-100)[:, None]
        d = torch.where(wide, z.double() - x, 0.0)
        reach = self.radius * (1.0 - _norm_error(d))
        if self.box is not None:
            d = self._boxed(x, d, reach)
        d = d * _shrink(_norm(d), reach)[:, None]
        near = (x + d).to(self.x.dtype)
        # Rounding may carry an entry past its d; the float before it lies within.
        near = torch.where((near.double() - x).abs() > d.abs(), torch.nextafter(near, self.x), near)
        return near if self.box is None else near.clamp(*self.box)

    def _boxed(self, x: Tensor, d: Tensor, reach: Tensor) -> Tensor:
        """min(t|d|, room to the box) with the signs of d, and t ≤ 1 for which its norm is ``reach``: the projection of d.

        From the t without a box, entries that stop at it are found in turn; t grows, and the norm never passes ``reach``.
        """
        assert self.box is not None
        low, high = self.box
        room, length = torch.where(d > 0, high - x, x - low), d.abs()
        t = _shrink(_norm(d), reach)
        for _ in range(ROUNDS):
            held = t[:, None] * length >= room
            rest = (reach.square() - torch.where(held, room, 0.0).square().sum(1)).clamp(min=0.0)
            t = _shrink(_norm(torch.where(held, 0.0, length)), rest.sqrt())
        return torch.minimum(t[:, None] * length, room).copysign(d)


def _norm(x: Tensor) -> Tensor:  # (B, p) -> (B,)
    return torch.linalg.vector_norm(x, dim=1)


def _shrink(size: Tensor, reach: Tensor) -> Tensor:
    """min(1, reach/size), 1 where both are 0."""
    return torch.where(size > reach, reach / size, 1.0)


def _norm_error(x: Tensor) -> float:
    """What rounding may have done, relatively, to the float64 norm of a difference (B, p) and a few operations on it."""
    return gamma(x.shape[1] + 8)


def _unit(x: Tensor) -> Tensor:
    """Each row over its norm; a row of zeros stays."""
    return x / _norm(x).clamp(min=torch.finfo(x.dtype).tiny)[:, None]


def _gaussian(index: Tensor, size: int, key: tuple[int, ...]) -> Tensor:
    """Standard normal rows (B, size), float64, each drawn from the key and its sample's place in the data alone."""
    rows = [np.random.default_rng((*map(int, key), i)).standard_normal(size) for i in index.tolist()]
    return torch.from_numpy(np.array(rows).reshape(-1, size))


def _network(net: Network) -> Network:
    if not isinstance(net, Network):
        raise InvalidParameterError(
            "net", type(net).__name__, "it must be a converted network: lipconvert.convert(model)"
        )
    return net


def _require_counts(**counts: int) -> None:
    for name, given in counts.items():
        count(given, name, "at least one is needed, a whole number")


def _index(x: Tensor, seed: int, first: int) -> Tensor:
    """The places (B,) of the samples in the data, on the CPU."""
    _, first = (
        count(value, name, "it must be a whole number, not negative", least=0)
        for name, value in (("seed", seed), ("first", first))
    )
    return torch.arange(first, first + len(x))


def _ball(net: Network, x: Tensor, radius: float | Tensor, box: tuple[float, float] | None) -> tuple[_Ball, Tensor]:
    """The ball around x, and the logits at x; the network itself says whether x fits."""
    x = net.checked(x).detach().to(net.device)
    require_finite_samples(x, "x")
    y = net(x)
    x = x.flatten(1).clone()
    if box is not None:
        requirement = "it must be two numbers, the least and the largest entry"
        if not isinstance(box, tuple | list) or len(box) != 2:
            raise InvalidParameterError("box", repr(box), requirement)
        numbers = [number(end, "an end of box", requirement, finite=False) for end in box]
        low, high = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(x.dtype).tolist()  # rounded as x is
        if not low < high:
            raise InvalidParameterError("box", box, "its least entry must be below its largest")
        if x.numel() and not low <= float(x.min()) <= float(x.max()) <= high:
            raise InvalidParameterError("box", box, f"x has entries from {float(x.min()):g} to {float(x.max()):g}")
        box = low, high
    return _Ball(x, _radius(radius, x), box), y


def _radius(radius: float | Tensor, x: Tensor) -> Tensor:
    """(B,), float64."""
    if isinstance(radius, Tensor | np.ndarray) and radius.ndim:
        r = plain_tensor(radius, "radius").detach()
        if r.is_complex() or r.dtype == torch.bool:
            raise InvalidParameterError("the dtype of radius", r.dtype, "it must be real numbers")
        r = r.to(x.device, torch.float64)
    else:
        requirement = "it must be a number, finite and not negative, or a tensor of one for each sample"
        r = torch.tensor(number(radius, "radius", requirement, least=0.0), dtype=torch.float64, device=x.device)
    if r.shape not in ((), x.shape[:1]):
        raise ShapeError("radius", f"one number or ({len(x)},)", tuple(r.shape))
    bad = r[~(torch.isfinite(r) & (r >= 0))]
    if bad.numel():
        raise InvalidParameterError("a radius", float(bad.flatten()[0]), "it must be finite and not negative")
    return r.expand(len(x))


def class_labels(labels: Tensor, y: Tensor) -> Tensor:
    """Labels (B,) of logits y (B, at least 2) as int64, on their device; `ShapeError`, `InvalidParameterError` for others."""
    if y.dim() != 2 or y.shape[1] < 2:
        raise ShapeError("the logits", "(B, at least 2)", tuple(y.shape))
    labels = plain_tensor(labels, "labels")
    if labels.shape != y.shape[:1]:
        raise ShapeError("labels", (len(y),), tuple(labels.shape))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidParameterError("the dtype of the labels", labels.dtype, "labels must be integers: labels.long()")
    labels = labels.to(y.device).long()
    wrong = labels[(labels < 0) | (labels >= y.shape[1])]
    if len(wrong):
        raise InvalidParameterError("a label", int(wrong[0]), f"the network has the classes 0..{y.shape[1] - 1}")
    return labels


def _logits(net: Network, x: Tensor) -> Tensor:
    """y (B, q) of flat samples (B, p)."""
    return net(x.reshape(-1, *net.input_shape))


def _derived(net: Network, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(y, v, g) at flat samples (B, p): the logits, v = value(y), and the gradient (B, p) of Σv."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = _logits(net, x)
        v = value(y)
        (g,) = torch.autograd.grad(v.sum(), x)
    return y.detach(), v.detach(), g


def _rivals(y: Tensor, labels: Tensor) -> Tensor:
    """The logits without that of the label: −∞ in its place."""
    return y.scatter(1, labels[:, None], -math.inf)


def _own(y: Tensor, labels: Tensor) -> Tensor:
    return y.gather(1, labels[:, None]).squeeze(1)


def _margin(y: Tensor, labels: Tensor) -> Tensor:
    """y_label − max_{j≠label} y_j, (B,); in floats it is positive exactly where the label is strictly the largest."""
    return _own(y, labels) - _rivals(y, labels).amax(1)


def _margin_loss(y: Tensor, labels: Tensor) -> Tensor:
    return -_margin(y, labels)


def _cross_entropy(y: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(y, labels, reduction="none")


def _dlr(y: Tensor, labels: Tensor) -> Tensor:
    if y.shape[1] < 3:  # there is no third logit
        return -_margin(y, labels)
    top = y.topk(3, dim=1).values
    return -_margin(y, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": _margin_loss,
    "cross_entropy": _cross_entropy,
    "dlr": _dlr,
}


class _Ascent(Protocol):
    """How a climb goes on: a state of tensors, sample by sample, the first of them the point to look at next."""

    @property
    def steps(self) -> int: ...

    def start(self, point: Tensor, ball: _Ball) -> tuple[Tensor, ...]: ...

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: _Ball
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class _PGD:
    """See `pgd`. The steps begin at the diameter, which reaches the best point of a half-space at once, and fall to 0."""

    steps: int

    def start(self, point: Tensor, ball: _Ball) -> tuple[Tensor, ...]:
        del ball
        return (point,)

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: _Ball
    ) -> tuple[Tensor, ...]:
        del value
        size = ball.radius * (1.0 + math.cos(math.pi * k / self.steps))
        return (ball.project(state[0] + size.to(gradient)[:, None] * _unit(gradient)),)


@dataclass(frozen=True)
class _APGD:
    """See `apgd`. State: the point and the one before, its loss then; the best point, loss and gradient; η; the rises since
    the last checkpoint; η and best loss there."""

    steps: int

    @property
    def checkpoints(self) -> list[int]:
        """⌈p_j·steps⌉ with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)."""
        parts = [0.0, 0.22]
        while parts[-1] < 1.0:
            parts.append(parts[-1] + max(parts[-1] - parts[-2] - 0.03, 0.06))
        return [math.ceil(part * self.steps) for part in parts]

    def start(self, point: Tensor, ball: _Ball) -> tuple[Tensor, ...]:
        eta = (2.0 * ball.radius).to(point)
        low = torch.full_like(eta, -math.inf)
        return point, point, -low, point, low, point, eta, torch.zeros_like(eta), torch.zeros_like(eta), low

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: _Ball
    ) -> tuple[Tensor, ...]:
        point, before, last, best, best_value, best_gradient, eta, rises, eta_then, best_then = state
        rises = rises + (value > last)
        better = value > best_value
        best, best_value = torch.where(better[:, None], point, best), torch.where(better, value, best_value)
        best_gradient = torch.where(better[:, None], gradient, best_gradient)
        if k in self.checkpoints[1:]:
            window = k - max(c for c in self.checkpoints if c < k)
            halve = (rises < 0.75 * window) | ((eta == eta_then) & (best_value == best_then))
            eta_then, best_then, rises = eta, best_value, torch.zeros_like(rises)
            eta, value = torch.where(halve, eta / 2, eta), torch.where(halve, best_value, value)
            point, before, gradient = (
                torch.where(halve[:, None], there, here)
                for there, here in ((best, point), (best, before), (best_gradient, gradient))
            )
        z = ball.project(point + eta[:, None] * _unit(gradient))
        if k:
            z = ball.project(point + 0.75 * (z - point) + 0.25 * (point - before))
        return z, point, value, best, best_value, best_gradient, eta, rises, eta_then, best_then


class _Attempt(Protocol):
    """One attack on samples that stand: x′ (B, p) and its margin (B,)."""

    def __call__(self, ball: _Ball, labels: Tensor, index: Tensor, /) -> tuple[Tensor, Tensor]: ...


def _attacked(
    ascent: _Ascent,
    net: Network,
    x: Tensor,
    labels: Tensor,
    radius: float | Tensor,
    restarts: int,
    loss: str,
    box: tuple[float, float] | None,
    seed: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    if loss not in LOSSES:
        raise InvalidParameterError("loss", repr(loss), f"it must be one of {', '.join(LOSSES)}")
    with _frozen(net):
        ball, y = _ball(net, x, radius, box)
        labels, index = class_labels(labels, y), _index(x, seed, first)
        attempts = [partial(_climb, net, ascent, loss, (seed, k)) for k in range(restarts)]
        found, margin = _in_turn(net, attempts, ball, labels, index)
        return found.reshape(-1, *net.input_shape), margin


def _in_turn(
    net: Network, attempts: Sequence[_Attempt], ball: _Ball, labels: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The worst of x itself and of all attempts, each made on the samples that the ones before left standing."""
    worst, margin = ball.x.clone(), _margin(_logits(net, ball.x), labels)
    for attempt in attempts:
        rows = (margin > 0).nonzero().flatten()
        if not len(rows):
            break
        found, least = attempt(ball.take(rows), labels[rows], index[rows.cpu()])
        better = least < margin[rows]
        worst[rows[better]], margin[rows[better]] = found[better], least[better]
    return worst, margin


def _climb(
    net: Network, ascent: _Ascent, loss: str, key: tuple[int, int], ball: _Ball, labels: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """One ascent from a random point; ``key``: the seed and which restart it is. A sample stops where it is broken."""
    _, restart = key
    target = None
    if restart and loss == "margin":
        order = _rivals(_logits(net, ball.x), labels).argsort(dim=1, descending=True)
        target = order[:, restart % (order.shape[1] - 1)]
    # Uniform in the ball: the first p coordinates of a point that is uniform on the sphere of p + 2.
    offset = _unit(_gaussian(index, ball.x.shape[1] + 2, key))[:, :-2].to(ball.x)
    state = ascent.start(ball.project(ball.x + ball.radius.to(offset)[:, None] * offset), ball)
    worst, margin = ball.x.clone(), torch.full_like(ball.x[:, 0], math.inf)
    rows = torch.arange(len(worst), device=worst.device)
    for k in range(ascent.steps + 1):
        point, own = state[0], labels[rows]
        if k == ascent.steps:
            y, value, gradient = _logits(net, point), margin, point
        else:
            aim = None if target is None else target[rows]
            y, value, gradient = _derived(net, point, partial(_objective, LOSSES[loss], own, aim))
        found = _margin(y, own)
        better = found < margin[rows]
        worst[rows[better]], margin[rows[better]] = point[better], found[better]
        go = found > 0
        if k == ascent.steps or not bool(go.any()):
            break
        if not bool(go.all()):
            rows, value, gradient, ball = rows[go], value[go], gradient[go], ball.take(go)
            state = tuple(part[go] for part in state)
        state = ascent.step(k, state, value, gradient, ball)
    return worst, margin


def _objective(loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor, target: Tensor | None, y: Tensor) -> Tensor:
    return loss(y, labels) if target is None else _own(y, target) - _own(y, labels)


def _toolbox() -> tuple[Any, Any]:
    """The attacks and the classifiers of the Adversarial Robustness Toolbox."""
    try:
        return import_module("art.attacks.evasion"), import_module("art.estimators.classification")
    except ImportError as error:
        raise InvalidParameterError(
            "method", "'ensemble'", f"it needs the extra: pip install 'lipconvert[attack]' ({error})"
        ) from error


class _Logits(nn.Module):
    """A network for the toolbox, which puts the modules it is given into training mode: this one holds none."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.logits = [net]

    def forward(self, x: Tensor) -> Tensor:
        net = self.logits[0]
        # Its Square attack divides by the norms of tiles, some of them 0.
        return net(torch.nan_to_num(x).to(net.device)).to(x)


def _foreign(
    net: Network, toolbox: tuple[Any, Any], classes: int, box: tuple[float, float] | None, steps: int, seed: int
) -> list[_Attempt]:
    """The toolbox's attacks that have a meaning for this network."""
    attacks, _ = toolbox

    def auto(loss: str) -> Callable[..., Any]:
        return lambda classifier, eps, **options: attacks.AutoProjectedGradientDescent(
            classifier, eps=eps, eps_step=2.0 * eps, max_iter=steps, nb_random_init=1, loss_type=loss, **options
        )

    makers = [auto("cross_entropy")]
    if classes > 2:
        makers.append(auto("difference_logits_ratio"))
    if box is not None and len(net.input_shape) == 3 and min(net.input_shape[1:]) >= LEAST_SQUARE:
        makers.append(partial(attacks.SquareAttack, max_iter=10 * steps))
    return [partial(_by_toolbox, net, toolbox, make, classes, seed) for make in makers]


def _by_toolbox(
    net: Network,
    toolbox: tuple[Any, Any],
    make: Callable[..., Any],
    classes: int,
    seed: int,
    ball: _Ball,
    labels: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """An attack of the toolbox on a batch with one radius; what it returns is drawn into the ball."""
    del index
    _, classifiers = toolbox
    classifier = classifiers.PyTorchClassifier(
        _Logits(net),
        nn.CrossEntropyLoss(),
        net.input_shape,
        classes,
        clip_values=ball.box or (-math.inf, math.inf),
        device_type="cpu",
    )
    images = ball.x.reshape(-1, *net.input_shape).float().cpu().numpy()
    with _seeded(seed), torch.enable_grad(), np.errstate(all="ignore"):
        attempt = make(classifier, eps=float(ball.radius[0]), norm=2, batch_size=len(images), verbose=False)
        found = torch.from_numpy(attempt.generate(images, labels.cpu().numpy())).to(ball.x).flatten(1)
    point = ball.project(torch.where(torch.isfinite(found), found, ball.x))
    return point, _margin(_logits(net, point), labels)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that the toolbox draws from, seeded inside and as they were afterwards."""
    state, state_of_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(state_of_numpy)
