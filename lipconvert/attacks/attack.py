"""Attacks: what a network does not withstand, an upper bound beside the certified lower one.

An attack that fails proves nothing; one that succeeds is a counterexample. So a perturbed input lies in its ball as the
floats it consists of, not to round-off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import InvalidParameterError
from ..foundation.arguments import class_labels, isolated, radii_of
from ..networks.network import Network
from .ascent import APGD, PGD, Ascent, Attempt
from .ball import Ball, ball_around, gaussian, radius_of, unit
from .logits import derived, logits, places, require_counts, standing_still
from .losses import LOSSES, logit_of, margin_of, rivals
from .toolbox import toolbox_attempts, toolbox_modules

METHODS = ("pgd", "apgd", "ensemble")
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
    require_counts(steps=steps, restarts=restarts)
    return _attacked(PGD(steps), net, x, labels, radius, restarts, loss, box, seed, first)


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
    require_counts(steps=steps, restarts=restarts)
    return _attacked(APGD(steps), net, x, labels, radius, restarts, loss, box, seed, first)


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
    require_counts(steps=steps, restarts=restarts)
    toolbox = toolbox_modules() if method == "ensemble" else None
    ascent = PGD(steps) if method == "pgd" else APGD(steps)
    with standing_still(net):
        center, y = ball_around(net, x, 0.0, box)
        balls = [replace(center, radius=radius_of(radius, center.x)) for radius in sorted(radii)]
        labels, index = class_labels(labels, y), places(x, seed, first)
        if toolbox is not None:
            restarts = max(restarts, min(y.shape[1], MOST_RIVALS + 1))
        attempts = [partial(_climb, net, ascent, "margin", (seed, k)) for k in range(restarts)]
        if toolbox is not None:
            attempts += toolbox_attempts(net, toolbox, y.shape[1], box, steps, seed)
        # Of the ascending radii, how many the sample withstands.
        withstood = torch.where(margin_of(y, labels) > 0, len(balls), 0)
        for k, ball in enumerate(balls):
            if not bool((ball.radius > 0).any()):  # x alone
                continue
            standing = (withstood > k).nonzero().flatten()
            found, margin = _in_turn(net, attempts, ball.take(standing), labels[standing], index[standing.cpu()])
            rows, found = standing[margin <= 0], found[margin <= 0]
            withstood[rows] = k
            for smaller in range(k - 1, -1, -1):
                found = balls[smaller].take(rows).project(found)
                still = margin_of(logits(net, found), labels[rows]) <= 0
                rows, found = rows[still], found[still]
                withstood[rows] = smaller
    order = sorted(radii)
    place = torch.tensor([order.index(radius) for radius in radii], device=withstood.device)
    return withstood > place.unsqueeze(-1)


def _attacked(
    ascent: Ascent,
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
    with standing_still(net):
        ball, y = ball_around(net, x, radius, box)
        labels, index = class_labels(labels, y), places(x, seed, first)
        attempts = [partial(_climb, net, ascent, loss, (seed, k)) for k in range(restarts)]
        found, margin = _in_turn(net, attempts, ball, labels, index)
        return found.reshape(-1, *net.input_shape), margin


def _in_turn(
    net: Network, attempts: Sequence[Attempt], ball: Ball, labels: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The worst of x itself and of all attempts, each made on the samples that the ones before left standing."""
    worst, margin = ball.x.clone(), margin_of(logits(net, ball.x), labels)
    for attempt in attempts:
        rows = (margin > 0).nonzero().flatten()
        if not len(rows):
            break
        found, least = attempt(ball.take(rows), labels[rows], index[rows.cpu()])
        better = least < margin[rows]
        worst[rows[better]], margin[rows[better]] = found[better], least[better]
    return worst, margin


def _climb(
    net: Network, ascent: Ascent, loss: str, key: tuple[int, int], ball: Ball, labels: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """One ascent from a random point; ``key``: the seed and which restart it is. A sample stops where it is broken."""
    _, restart = key
    target = None
    if restart and loss == "margin":
        order = rivals(logits(net, ball.x), labels).argsort(dim=1, descending=True)
        target = order[:, restart % (order.shape[1] - 1)]
    # Uniform in the ball: the first p coordinates of a point that is uniform on the sphere of p + 2.
    offset = unit(gaussian(index, ball.x.shape[1] + 2, key))[:, :-2].to(ball.x)
    state = ascent.start(ball.project(ball.x + ball.radius.to(offset)[:, None] * offset), ball)
    worst, margin = ball.x.clone(), torch.full_like(ball.x[:, 0], math.inf)
    rows = torch.arange(len(worst), device=worst.device)
    for k in range(ascent.steps + 1):
        point, own = state[0], labels[rows]
        if k == ascent.steps:
            y, value, gradient = logits(net, point), margin, point
        else:
            aim = None if target is None else target[rows]
            y, value, gradient = derived(net, point, partial(_objective, LOSSES[loss], own, aim))
        found = margin_of(y, own)
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
    return loss(y, labels) if target is None else logit_of(y, target) - logit_of(y, labels)
