"""One file per method. An iterative method is a class with ``start`` and ``step``; `lipconvert.equilibrium` drives it.

A method keeps its state as tensors whose first dimension is the batch, so that samples that are done can be dropped
from it. It sees σ only through ``sigma(v)``, ``sigma[rows](v)``, ``sigma.prox(v, α)`` and ``sigma.slope(v)``: the
activations of a forward solve, or the fixed slopes of an adjoint one.
"""

from __future__ import annotations

from .forward_backward import ForwardBackward
from .forward_substitution import forward_substitution
from .iteration import Elementwise, Iteration, State
from .newton import Newton
from .peaceman_rachford import PeacemanRachford
from .sweep import Sweep

__all__ = [
    "Elementwise",
    "ForwardBackward",
    "Iteration",
    "Newton",
    "PeacemanRachford",
    "State",
    "Sweep",
    "forward_substitution",
]
