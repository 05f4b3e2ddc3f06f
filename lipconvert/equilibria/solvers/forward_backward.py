"""Forward-backward splitting: no linear solve, only products with W; many cheap steps."""

from __future__ import annotations

from torch import Tensor

from ...errors import InvalidParameterError
from ...linalg.state_map import StateMap
from .iteration import Elementwise, State


class ForwardBackward:
    """z ← prox_{αf}( z − α((I − W)z − u) ), a contraction in the metric Λ for α < 2μ/ℓ².

    μ and ℓ: monotonicity and Lipschitz constant of I − W in the metric Λ (`StateMap.monotonicity`). α = μ/ℓ² by default,
    for which the error falls by √(1 − μ²/ℓ²) a step.
    Raises `InvalidParameterError` when no α is given and (3) does not hold with the map's Λ.
    """

    name = "forward_backward"

    def __init__(self, alpha: float | None = None) -> None:
        if alpha is not None and not alpha > 0.0:
            raise InvalidParameterError("alpha", alpha, "the step of forward-backward must be positive")
        self.alpha = alpha

    def start(self, map: StateMap, u: Tensor, z: Tensor) -> State:
        del map, u
        return (z,)

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        (z,) = state
        v = map.apply(z) + u
        residual = map.norm(z - sigma(v))
        alpha = self.alpha if self.alpha is not None else self._safe_step(map)
        return (sigma.prox((1.0 - alpha) * z + alpha * v, alpha),), z, residual

    @staticmethod
    def _safe_step(map: StateMap) -> float:
        mu, ell = map.monotonicity
        if not mu > 0.0:
            raise InvalidParameterError(
                "μ", mu, "forward-backward needs (3) to hold with margin; use peaceman_rachford or give alpha"
            )
        return mu / ell**2
