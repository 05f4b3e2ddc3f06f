"""How an attack climbs: projected gradient steps of a set length (PGD), or of one that adapts (Auto-PGD)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .ball import Ball, unit


@dataclass(frozen=True)
class PGD:
    """See `pgd`. The steps begin at the diameter, which reaches the best point of a half-space at once, and fall to 0."""

    steps: int

    def start(self, point: Tensor, ball: Ball) -> tuple[Tensor, ...]:
        del ball
        return (point,)

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: Ball
    ) -> tuple[Tensor, ...]:
        del value
        size = ball.radius * (1.0 + math.cos(math.pi * k / self.steps))
        return (ball.project(state[0] + size.to(gradient)[:, None] * unit(gradient)),)


@dataclass(frozen=True)
class APGD:
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

    def start(self, point: Tensor, ball: Ball) -> tuple[Tensor, ...]:
        eta = (2.0 * ball.radius).to(point)
        low = torch.full_like(eta, -math.inf)
        return point, point, -low, point, low, point, eta, torch.zeros_like(eta), torch.zeros_like(eta), low

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: Ball
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
        z = ball.project(point + eta[:, None] * unit(gradient))
        if k:
            z = ball.project(point + 0.75 * (z - point) + 0.25 * (point - before))
        return z, point, value, best, best_value, best_gradient, eta, rises, eta_then, best_then


class Ascent(Protocol):
    """How a climb goes on: a state of tensors, sample by sample, the first of them the point to look at next."""

    @property
    def steps(self) -> int: ...

    def start(self, point: Tensor, ball: Ball) -> tuple[Tensor, ...]: ...

    def step(
        self, k: int, state: tuple[Tensor, ...], value: Tensor, gradient: Tensor, ball: Ball
    ) -> tuple[Tensor, ...]: ...


class Attempt(Protocol):
    """One attack on samples that stand: x′ (B, p) and its margin (B,)."""

    def __call__(self, ball: Ball, labels: Tensor, index: Tensor, /) -> tuple[Tensor, Tensor]: ...
