"""Block sweeps (block Gauss-Seidel): for a W close to triangular, such as a fine-tuned explicit network."""

from __future__ import annotations

from torch import Tensor

from ...linalg.state_map import StateMap
from .iteration import Elementwise, State


class Sweep:
    """z_k ← σ_k(Σ_j W_kj z_j + u_k), block after block with the newest values.

    With z̃ the previous sweep, the residual of the new z is about ‖W − T‖ ‖z − z̃‖ at most: exact after one sweep when W is
    triangular, and falling by about that factor otherwise. Not guaranteed to converge for a general W.
    """

    name = "sweep"

    def start(self, map: StateMap, u: Tensor, z: Tensor) -> State:
        del map, u
        return (z,)

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        (old,) = state
        z = old.clone()
        for block in map.order:
            z[:, block] = sigma[block](map.rows(block, z, u))
        return (z,), z, map.remainder * map.norm(z - old)
