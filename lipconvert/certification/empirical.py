"""A lower bound of a network's Lipschitz constant, the best difference quotient that a search finds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attacks.ball import ball_around, gaussian, norm, unit
from ..attacks.logits import derived, places, require_counts, require_network, standing_still
from ..errors import InvalidParameterError
from ..foundation.arguments import isolated
from ..linalg.rounding import SLACK
from ..networks.network import Network
from .accuracy import Accuracy
from .bounds import Bounds


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
    require_counts(steps=steps)
    x = require_network(net).checked(x)
    if not len(x):
        raise InvalidParameterError("x", "empty", "at least one sample is needed to start from")
    with standing_still(net):
        ball, y = ball_around(net, x, 0.0, None)
        center, outputs = ball.x, y.shape[1]
        if pair is not None and (len(set(pair)) != 2 or not all(0 <= k < outputs for k in pair)):
            raise InvalidParameterError("pair", pair, f"it must be two of the outputs 0..{outputs - 1}")

        def rise(y: Tensor) -> Tensor:  # of a batch of all a, then all b
            difference = (y[: len(center)] - y[len(center) :]).flatten(1)
            return norm(difference) if pair is None else (difference[:, pair[0]] - difference[:, pair[1]]).abs()

        size = float(norm(center).square().mean().sqrt()) or 1.0
        direction = unit(gaussian(places(x, seed, 0), center.shape[1], (seed,)).to(center))
        best, ends = torch.full_like(center[:, 0], -math.inf), torch.cat([center, center])
        still = steps // 4
        for k in range(steps):
            h = size * (1e-3 if k < still else 0.01 ** ((k - still) / (steps - still)))
            points = torch.cat([center + 0.5 * h * direction, center - 0.5 * h * direction])
            _, found, slopes = derived(net, points, rise)
            quotient = found / norm(points[: len(center)] - points[len(center) :])
            better = quotient > best
            best, ends = torch.where(better, quotient, best), torch.where(better.repeat(2)[:, None], points, ends)
            up, down = slopes[: len(center)], slopes[len(center) :]
            turned = norm(up - down) > 0  # else a sees what b sees, and the next, longer segment may see more
            direction = torch.where(turned[:, None], unit(up - down), direction)
            # Where a and b have one derivative, the difference is round-off and leads nowhere.
            differ = norm(up + down) > 1e3 * torch.finfo(up.dtype).eps * norm(up - down)
            if k >= still:
                center = torch.where(differ[:, None], center + 0.5 * h * unit(up + down), center)
        accuracy = accuracy or Accuracy(Bounds(net))
        evaluation = accuracy.evaluate(ends.reshape(-1, *net.input_shape), double=True)
    error = (1.0 if pair is None else math.sqrt(2.0)) * evaluation.error[:, 0]
    a, b = ends.double().cpu().chunk(2)
    slack = (error[: len(a)] + error[len(a) :]) * SLACK
    bound = (rise(evaluation.value) - slack) / (norm(a - b) * SLACK)
    known = evaluation.converged[: len(a)] & evaluation.converged[len(a) :]
    return max(0.0, float(torch.where(known, bound, 0.0).max()))
