"""One file per method. An iterative method is a class with ``start`` and ``step``; `lipconvert.equilibrium` drives it.

A method keeps its state as tensors whose first dimension is the batch, so that samples that are done can be dropped
from it. It sees σ only through ``sigma(v)``, ``sigma[rows](v)`` and ``sigma.prox(v, α)``: the activations of a forward
solve, or the fixed slopes of an adjoint one.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..state_map import StateMap
from .forward_backward import ForwardBackward
from .forward_substitution import forward_substitution
from .peaceman_rachford import PeacemanRachford
from .sweep import Sweep

State = tuple[Tensor, ...]


class Elementwise(Protocol):
    """What stands for σ in a solve."""

    def __call__(self, v: Tensor) -> Tensor: ...
    def __getitem__(self, rows: slice) -> Elementwise: ...
    def prox(self, v: Tensor, alpha: float) -> Tensor: ...
    def take(self, samples: Tensor) -> Elementwise: ...


class Iteration(Protocol):
    """An iterative method for z = σ(Wz + u)."""

    name: str

    def start(self, z: Tensor) -> State:
        """The state to begin with, from a first guess z (B, n)."""
        ...

    def step(self, map: StateMap, sigma: Elementwise, u: Tensor, state: State) -> tuple[State, Tensor, Tensor]:
        """(next state, candidate z (B, n), an upper bound of ‖z − σ(Wz + u)‖ (B,) that comes for free)."""
        ...


__all__ = [
    "Elementwise",
    "ForwardBackward",
    "Iteration",
    "PeacemanRachford",
    "State",
    "Sweep",
    "forward_substitution",
]
