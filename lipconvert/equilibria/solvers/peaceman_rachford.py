"""Peaceman-Rachford splitting: the method for a true equilibrium."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InvalidParameterError
from ...linalg.state_map import StateMap
from .iteration import Elementwise, State


class PeacemanRachford:
    """0 ∈ (I − W)z − u + ∂f(z), f with prox_f = σ, by reflecting through both operators.

        z = (I + α(I − W))⁻¹ (t + αu),   t ← t + 2λ( prox_{αf}(2z − t) − z )

    λ = 1 is Peaceman-Rachford; it converges when I − W is strongly monotone in some diagonal metric (condition (3)).
    λ = 1/2 is Douglas-Rachford, which needs monotonicity only and is slower. Since (I + α(I − W))z = t + αu,
    Wz + u = ((1 + α)z − t)/α comes for free and with it the exact residual of z. α defaults to the map's own
    fast step. (Winston & Kolter 2020)
    """

    name = "peaceman_rachford"

    def __init__(self, alpha: float | None = None, relaxation: float = 1.0) -> None:
        if not ((alpha is None or alpha > 0.0) and 0.0 < relaxation <= 1.0):
            raise InvalidParameterError("alpha, relaxation", (alpha, relaxation), "α must be positive and λ in (0, 1]")
        self.alpha, self.relaxation = alpha, relaxation

    def start(self, map: StateMap, u: Tensor, z: Tensor) -> State:
        alpha = self._alpha(map)
        return z, map.resolvent(u, alpha).mul_(alpha)

    def _alpha(self, map: StateMap) -> float:
        return map.splitting_steps[0] if self.alpha is None else self.alpha

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        t, driven = state  # driven = α(I + α(I − W))⁻¹u
        alpha = self._alpha(map)
        z = map.resolvent(t, alpha, driven)
        difference = sigma.prox(torch.sub(2.0 * z, t), alpha).sub_(z)
        if alpha == 1.0:  # 2z − t = Wz + u and prox_f = σ: the reflection is the residual as well
            residual = map.norm(difference)
        else:
            residual = map.norm(z - sigma(torch.sub(z, t, alpha=1.0 / (1.0 + alpha)).mul_((1.0 + alpha) / alpha)))
        t = torch.add(t, difference, alpha=2.0 * self.relaxation)
        return (t, driven), z, residual
