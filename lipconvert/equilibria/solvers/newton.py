"""Semismooth Newton: a few dense solves for the samples that splitting leaves far from done."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.state_map import StateMap
from .iteration import Elementwise, State

# Entries of the per-sample matrices held at a time: half a gigabyte in float64.
CHUNK = 2**26


class Newton:
    """z ← z + (I − DW)⁻¹( σ(Wz + u) − z ), D = σ′(Wz + u), one n×n solve for each sample and step.

    I − DW is regular for every slope D in [0, 1] when (3) holds. Near the solution it converges at least quadratically,
    for piecewise linear σ in finitely many steps, however small the margin of (3), where splitting needs ℓ/μ steps a digit.
    Far from it nothing is guaranteed, so it follows a splitting method.
    """

    name = "newton"

    def start(self, map: StateMap, u: Tensor, z: Tensor) -> State:
        del map, u
        return (z,)

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        (z,) = state
        v = map.apply(z) + u
        r = sigma(v) - z
        size = max(1, CHUNK // max(1, map.states**2))
        steps = [map.newton_step(D, part) for D, part in zip(sigma.slope(v).split(size), r.split(size), strict=True)]
        return (z + torch.cat(steps),), z, map.norm(r)
