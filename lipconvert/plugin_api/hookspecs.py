"""The whole plugin contract. Register a module of `hookimpl` functions under the entry-point group ``lipconvert``.

A model is brought to z = σ(Wz + Ux + b_z), y = Gz + b_y with a positive diagonal Λ such that
2Λ − ΛW − W′Λ − G′G/L − ΛUU′Λ/L ⪰ 0; then it is L-Lipschitz. Everything else is done by the core.
An implementation names only the arguments it needs. Only ``to_dae`` and ``example_models`` are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy
from torch import Tensor, nn

from ..dae.dae import DAE

hookspec = pluggy.HookspecMarker("lipconvert")
hookimpl = pluggy.HookimplMarker("lipconvert")


@dataclass(frozen=True)
class PluginInfo:
    """What a plugin says of itself: ``name``, ``paper``, ``lipschitz`` (formula of L), ``covers`` (layers and models)."""

    name: str
    paper: str
    lipschitz: str
    covers: str


@hookspec
def to_dae(  # type: ignore[empty-body]
    model: nn.Module, input_shape: tuple[int, ...] | None, dense: bool
) -> DAE | tuple[Tensor, ...] | None:
    """(W, U, G, Λ) of one layer or one model, or None: not mine. A tuple means zero biases, ReLU everywhere, L = 1.

    The model is float64 and in eval mode. ``input_shape``: of one sample, where known. A circular convolution on images
    returns a DAE on their grid; one with stride s a DAE on the coarse grid, for inputs after ``pixel_unshuffle(x, s)``.
    ``dense``: a DAE on flattened images is welcome, for layers that have no other (zero padding). Grids are expanded by the
    core, so most plugins need not look at it.
    """


@hookspec
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:  # type: ignore[empty-body]
    """A model with these weights, or None: not mine. Raise `MissingOptionError` for what the file does not hold."""


@hookspec
def glue_lipschitz(module: nn.Module) -> float | None:  # type: ignore[empty-body]
    """An upper bound of the l2 Lipschitz constant of a module that is kept as it is, or None: not mine."""


@hookspec
def nonlinear_states(model: nn.Module, input_shape: tuple[int, ...]) -> int | None:  # type: ignore[empty-body]
    """How many states of ``to_dae``'s answer have another σ than the identity, from shapes alone; None: not mine.

    A conversion that cannot fit into memory is then refused before it starts. The model has no numbers (meta device).
    """


@hookspec
def glue_rounding(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, float] | None:  # type: ignore[empty-body]
    """(a, b): in arithmetic of unit roundoff u ≤ 2⁻⁸, a module kept as it is errs by at most u(a + b‖x‖₂) in l2.

    ``input_shape``: of a sample x. None: not mine, or nothing is known: constants are proved, and no sample is certified.

    For ``(x + c) - c`` on n entries, |error| ≤ u(2|x| + 3|c|) of each: (3|c|√n, 2), a little more for what is of order u².
    """


@hookspec
def example_models(seed: int) -> Sequence[nn.Module]:  # type: ignore[empty-body]
    """Small instances for the conformance suite, each with ``input_shape``; the same for the same seed."""


@hookspec
def new_model(  # type: ignore[empty-body]
    inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None
) -> nn.Module | None:
    """A small untrained classifier of flat inputs, for the demo and for training from scratch.

    ``image``: (c, h, w) where a convolutional one is asked for; its ``input_shape`` is then ``image``.
    """


@hookspec
def describe() -> PluginInfo:  # type: ignore[empty-body]
    """Name, paper, formula of L, what is covered: the rows of ``lipconvert plugins``."""
