"""What a method sees of σ, and what an iterative method is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...linalg.state_map import StateMap

State = tuple[Tensor, ...]


class Elementwise(Protocol):
    """What stands for σ in a solve."""

    def __call__(self, v: Tensor) -> Tensor: ...
    def __getitem__(self, rows: slice) -> Elementwise: ...
    def prox(self, v: Tensor, alpha: float) -> Tensor: ...
    def slope(self, v: Tensor) -> Tensor: ...
    def take(self, samples: Tensor | slice) -> Elementwise: ...


class Iteration(Protocol):
    """An iterative method for z = σ(Wz + u)."""

    name: str

    def start(self, map: StateMap, u: Tensor, z: Tensor) -> State:
        """The state to begin with, from a first guess z (B, n); also what each step would compute of u again."""
        ...

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        """(next state, candidate z (B, n), ‖z − σ(Wz + u)‖ (B,) or an estimate of it that comes for free).

        It decides when to stop; the residual that is reported is evaluated afresh.
        """
        ...
