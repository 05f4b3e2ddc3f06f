"""The l2 balls that attacks stay in: a perturbed input lies in its ball as the floats it consists of, not to round-off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import number, plain_tensor
from ..linalg.rounding import gamma
from ..linalg.spectrum import require_finite_samples
from ..networks.network import Network

# Rounds in which the entries that stop at the box are found. On MNIST the third changes margins by 1e-14, a fourth nothing.
ROUNDS = 3


@dataclass(frozen=True)
class Ball:
    """What an attack may give the network: ‖x′ − x‖₂ ≤ radius, entries in the box; samples are flat."""

    x: Tensor  # (B, p)
    radius: Tensor  # (B,), float64
    box: tuple[float, float] | None

    def take(self, samples: Tensor | slice) -> Ball:
        return replace(self, x=self.x[samples], radius=self.radius[samples])

    def project(self, z: Tensor) -> Tensor:
        """The point of the ball and the box next to z (B, p); ‖x′ − x‖₂ ≤ radius holds in exact arithmetic."""
        # The squares of smaller numbers underflow: such a ball is taken as its centre.
        x, wide = self.x.double(), (self.radius > 1e-100)[:, None]
        d = torch.where(wide, z.double() - x, 0.0)
        reach = self.radius * (1.0 - _norm_error(d))
        if self.box is not None:
            d = self._boxed(x, d, reach)
        d = d * _shrink(norm(d), reach)[:, None]
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
        t = _shrink(norm(d), reach)
        for _ in range(ROUNDS):
            held = t[:, None] * length >= room
            rest = (reach.square() - torch.where(held, room, 0.0).square().sum(1)).clamp(min=0.0)
            t = _shrink(norm(torch.where(held, 0.0, length)), rest.sqrt())
        return torch.minimum(t[:, None] * length, room).copysign(d)


def ball_around(
    net: Network, x: Tensor, radius: float | Tensor, box: tuple[float, float] | None
) -> tuple[Ball, Tensor]:
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
    return Ball(x, radius_of(radius, x), box), y


def radius_of(radius: float | Tensor, x: Tensor) -> Tensor:
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


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ of each sample, (B, p) → (B,)."""
    return torch.linalg.vector_norm(x, dim=1)


def unit(x: Tensor) -> Tensor:
    """Each row over its norm; a row of zeros stays."""
    return x / norm(x).clamp(min=torch.finfo(x.dtype).tiny)[:, None]


def gaussian(index: Tensor, size: int, key: tuple[int, ...]) -> Tensor:
    """Standard normal rows (B, size), float64, each drawn from the key and its sample's place in the data alone."""
    rows = [np.random.default_rng((*map(int, key), i)).standard_normal(size) for i in index.tolist()]
    return torch.from_numpy(np.array(rows).reshape(-1, size))


def _shrink(size: Tensor, reach: Tensor) -> Tensor:
    """min(1, reach/size), 1 where both are 0."""
    return torch.where(size > reach, reach / size, 1.0)


def _norm_error(x: Tensor) -> float:
    """What rounding may have done, relatively, to the float64 norm of a difference (B, p) and a few operations on it."""
    return gamma(x.shape[1] + 8)
