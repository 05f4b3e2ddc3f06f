"""The frozen form every supported network is brought into.

    z = σ(W z + U x + b_z),   y = G z + b_y                                                       (paper eq. 1)

with a positive diagonal Λ such that H(Λ, L) ⪰ 0 (paper eq. 10, `lipconvert.dae.conditions`): the map x → y is L-Lipschitz.
A skip connection is a row whose activation is the identity, so no feed-through term exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import number
from ..linalg.spectrum import DENSE, Grid, require_finite
from .activations import Activations

_TENSORS = ("W", "U", "G", "Lambda", "b_z", "b_y", "V")


@dataclass(frozen=True, eq=False)
class DAE:
    """(W, U, G, Λ) with biases, activations and L; checked and made float64 when constructed.

    ``DAE(W, U, G, Lambda)`` means zero biases, ReLU on every row and L = 1. It unpacks as ``W, U, G, Lambda = dae``.

    Shapes: ``W`` (n, n), ``U`` (n, p), ``G`` (q, n), ``Lambda`` (n,) (an (n, n) diagonal matrix is taken too), ``b_z`` (n,),
    ``b_y`` (q,); n states, p inputs, q outputs. ``activations`` has n rows. ``lipschitz`` is L.

    ``grid``: ``Grid((h, w))`` for a network of circular convolutions on h×w images. States, inputs and outputs are then
    channels, W, U, G and V complex matrices for each frequency, (F, n, n) and so on (`Grid.matrices`), and Λ and the biases
    the same in every pixel of a channel: ΛW would not be circular otherwise. (FORMULAS 4)

    ``V`` (r, n), optional: rows in closed form with V′V = H(Λ, L)/2. Where an architecture knows them, no square
    root of a large singular matrix is needed. They are checked against H when an LBEN is built from them.

    ``blocks``: sizes of the consecutive groups of rows, in the order of the layers they come from; by default the runs
    of ``activations``. `eliminate` and `strict_multiplier` go by them.

    All tensors are detached copies in float64 (complex128 for frequencies), whatever the dtype they come in.

    Raises `ShapeError`, `NotFiniteError`, `InvalidParameterError` (Λ ≤ 0, L ≤ 0, a slope outside [0, 1]).
    """

    W: Tensor
    U: Tensor
    G: Tensor
    Lambda: Tensor
    b_z: Tensor | None = None
    b_y: Tensor | None = None
    activations: Activations | None = None
    lipschitz: float = 1.0
    V: Tensor | None = None
    blocks: tuple[int, ...] = ()
    name: str = "dae"
    grid: Grid = DENSE

    def __post_init__(self) -> None:
        self._admit(_TENSORS, copy=True)

    def derive(self, **changes: Any) -> DAE:
        """This DAE with other values in some fields, checked like a new one, without copies: the tensors are given away."""
        new = object.__new__(DAE)
        for field in fields(DAE):
            object.__setattr__(new, field.name, changes.get(field.name, getattr(self, field.name)))
        new._admit(tuple(name for name in _TENSORS if name in changes), copy=False)
        return new

    @classmethod
    def own(cls, **values: Any) -> DAE:
        """``DAE(**values)`` without copies of tensors in double precision: they are given away, and may be expanded views."""
        new = object.__new__(cls)
        for field in fields(cls):
            object.__setattr__(new, field.name, values.get(field.name, field.default))
        new._admit(_TENSORS, copy=False)
        return new

    def _admit(self, names: tuple[str, ...], copy: bool) -> None:
        """Bring the named tensors to double precision and check everything."""

        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        for field in names:
            tensor = getattr(self, field)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ShapeError(self._at(field), "a torch.Tensor", type(tensor).__name__)
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            put(field, tensor.detach().to(wide, copy=copy))
            require_finite(tensor, self._at(field))
            spectral = bool(self.grid) and field in ("W", "U", "G", "V")
            if tensor.is_complex() != spectral:
                kind = "complex entries, one matrix for each frequency" if spectral else "real entries"
                hint = "grid.convolution(...) makes them." if spectral else "For images give grid=Grid((h, w)) as well."
                raise ShapeError(self._at(field), kind, tensor.dtype, hint)
        W, batch = self.W, self.grid.batch
        if W.dim() < 2 or W.shape != (*batch, W.shape[-1], W.shape[-1]):
            raise ShapeError(self._at("W"), (*batch, "n", "n"), tuple(W.shape))
        n = W.shape[-1]
        if self.U.dim() < 2 or self.U.shape[:-1] != (*batch, n):
            raise ShapeError(self._at("U"), (*batch, n, "p"), tuple(self.U.shape))
        if self.G.dim() < 2 or (*self.G.shape[:-2], self.G.shape[-1]) != (*batch, n):
            raise ShapeError(self._at("G"), (*batch, "q", n), tuple(self.G.shape))
        put("Lambda", self._diagonal(n))
        for field, size in (("b_z", n), ("b_y", self.G.shape[-2])):
            bias = getattr(self, field)
            if bias is None:
                put(field, W.new_zeros(size, dtype=torch.float64))
            elif tuple(bias.shape) != (size,):
                raise ShapeError(self._at(field), (size,), tuple(bias.shape))
        if self.activations is None:
            put("activations", Activations("relu", n))
        if len(self.sigma) != n:
            raise ShapeError(self._at("activations"), f"{n} rows", f"{len(self.sigma)} rows")
        if self.V is not None and (self.V.dim() < 2 or (*self.V.shape[:-2], self.V.shape[-1]) != (*batch, n)):
            raise ShapeError(self._at("V"), (*batch, "r", n), tuple(self.V.shape))
        put(
            "lipschitz",
            number(self.lipschitz, self._at("L"), "a Lipschitz constant must be positive and finite", above=0.0),
        )
        put("blocks", tuple(self.blocks) or tuple(size for _, size in self.sigma))
        if sum(self.blocks) != n or any(size <= 0 for size in self.blocks):
            raise ShapeError(self._at("blocks"), f"positive sizes that add up to {n}", self.blocks)

    def _at(self, tensor: str) -> str:
        return f"{tensor} of {self.name!r}"

    def _diagonal(self, n: int) -> Tensor:
        Lambda = self.Lambda
        if self.grid and tuple(Lambda.shape) == (n, *self.grid.image):
            first = Lambda[:, :1, :1]
            if not torch.equal(Lambda, first.expand_as(Lambda)):
                spread = float((Lambda / first - 1.0).abs().max())
                raise InvalidParameterError(
                    self._at("Lambda"),
                    f"varying inside a channel (by {spread:.1e} relative)",
                    "with it ΛW is no circular convolution, so (10) has no form per frequency. The mean over the pixels of a "
                    "channel satisfies (10) too if any Λ does; or state the layer densely, on flattened images",
                )
            Lambda = first.flatten().clone()
        if tuple(Lambda.shape) == (n, n) and torch.equal(Lambda, torch.diag(Lambda.diagonal())):
            Lambda = Lambda.diagonal().clone()
        if tuple(Lambda.shape) != (n,) or Lambda.is_complex():
            raise ShapeError(self._at("Lambda"), f"({n},) real, or diagonal ({n}, {n})", tuple(Lambda.shape))
        if n and not bool((Lambda > 0).all()):
            raise InvalidParameterError(self._at("Lambda"), float(Lambda.min()), "every entry of Λ must be positive")
        return Lambda

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.W, self.U, self.G, self.Lambda))

    @property
    def sigma(self) -> Activations:
        """σ, one activation per row (never None, unlike the constructor's argument)."""
        assert self.activations is not None
        return self.activations

    @property
    def bias_z(self) -> Tensor:
        """b_z, (n,) (never None)."""
        assert self.b_z is not None
        return self.b_z

    @property
    def bias_y(self) -> Tensor:
        """b_y, (q,) (never None)."""
        assert self.b_y is not None
        return self.b_y

    @property
    def states(self) -> int:
        """n, the number of rows of z."""
        return self.W.shape[-1]

    @property
    def inputs(self) -> int:
        """p, the number of inputs."""
        return self.U.shape[-1]

    @property
    def outputs(self) -> int:
        """q, the number of outputs."""
        return self.G.shape[-2]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (p,), or (p, h, w) on a grid."""
        return (self.inputs, *self.grid.image)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output: (q,), or (q, h, w) on a grid."""
        return (self.outputs, *self.grid.image)

    def __repr__(self) -> str:
        return (
            f"DAE({self.name!r}: {self.inputs} inputs, {self.states} states in {len(self.blocks)} blocks, "
            f"{self.outputs} outputs, {self.sigma!r}, L={self.lipschitz:g}"
            + (f", {self.grid.image[0]}x{self.grid.image[1]} pixels)" if self.grid else ")")
        )
