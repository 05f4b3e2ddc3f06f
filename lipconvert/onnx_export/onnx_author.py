"""What ONNX graphs are written with: nodes in order, and states in the coordinates in which an operator is a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..dae.activations import Activation, Activations
from ..errors import InvalidParameterError
from ..linalg.spectrum import Grid

OPSET, DOMAIN = 20, "lipconvert"

DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.DOUBLE}

# Taps of a kernel below this share of the largest are what transforms in float64 have left: they are not stored, or not read.
NOISE = 64.0 * 2.0**-52


def next_to_one(factor: float) -> bool:
    """Whether a number is 1 in float32, but not in float64."""
    return 0.0 < abs(factor - 1.0) <= 2.0**-23


class Author:
    """Nodes in the order in which they are written, in one dtype."""

    def __init__(self, dtype: torch.dtype, outer: Author | None = None) -> None:
        self.dtype, self.numpy = dtype, np.float32 if dtype is torch.float32 else np.float64
        self.tape = ir.tape.Tape()
        self._outer, self._constants = outer, dict[tuple[str, tuple[int, ...], bytes], ir.Value]()
        self._count = 0
        self.prefix = ""

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self.tape.op(op, inputs, attributes, domain=domain, output=ir.Value(name=self._name(op)))

    def _name(self, op: str) -> str:
        """A name that is new, in a loop too."""
        if self._outer is not None:
            return self._outer._name(f"{op}_in_loop")
        self._count += 1
        return f"{op.lower()}_{self._count}"

    def call(self, **values: ir.Value) -> None:
        """Give values names, which readers of the graph see."""
        for name, value in values.items():
            value.name = self.prefix + name

    def constant(self, values: np.ndarray[Any, Any]) -> ir.Value:
        """A constant, written once; inside a loop it is written before the loop."""
        if self._outer is not None:
            return self._outer.constant(values)
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=ir.tensor(values))
        return self._constants[key]

    def real(self, values: Any) -> ir.Value:
        """A constant in the dtype of the graph."""
        return self.constant(np.asarray(values, dtype=self.numpy))

    def times(self, x: ir.Value, factor: float) -> ir.Value:
        """x times a constant. onnxruntime drops a factor that is 1 in float32, also where it is another number in float64."""
        if factor == 1.0:
            return x
        if next_to_one(factor):
            return self("Add", x, self("Mul", x, self.real(factor - 1.0)))
        return self("Mul", x, self.real(factor))

    def ints(self, *values: int) -> ir.Value:
        """A constant list of integers."""
        return self.constant(np.asarray(values, dtype=np.int64))

    def part(self, M: ir.Value, places: slice, axis: int, size: int | None = None) -> ir.Value:
        """A slice along one axis; all of it as it is, where its ``size`` is known to be that."""
        if size is not None and (places.start, places.stop) == (0, size):
            return M
        return self("Slice", M, self.ints(places.start), self.ints(places.stop), self.ints(axis))

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """Parts side by side."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=axis)

    def total(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The sum of some values."""
        result = parts[0]
        for other in parts[1:]:
            result = self("Add", result, other)
        return result

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """The values in another shape; −1: what is left, 0: as it is."""
        return self("Reshape", x, self.ints(*shape))

    def wrap(self, x: ir.Value, around: Sequence[tuple[int, int]], grid: Grid) -> ir.Value:
        """Images with pixels of the opposite side (before, after) them in both directions.

        onnxruntime refuses B = 0 here (see `onnx_export.onnx_graph.build`); a Concat of slices would take it, and more time.
        """
        del grid
        (top, bottom), (left, right) = around
        return self("Pad", x, self.ints(0, 0, top, left, 0, 0, bottom, right), mode="wrap")

    def activate(self, activation: Activation, v: ir.Value) -> ir.Value:
        """σ(v), of operators that onnxruntime has in float64 too."""
        a = activation.parameter
        match activation.name:
            case "identity":
                return v
            case "relu":
                return self("Relu", v)
            case "relu6":
                return self("Clip", v, self.real(0.0), self.real(6.0))
            case "hardtanh":
                return self("Clip", v, self.real(-1.0), self.real(1.0))
            case "leaky_relu":
                return self._leaky(v, a)
            case "elu":  # exp where it is not taken may overflow, and is not taken
                below = self("Sub", self("Exp", self("Min", v, self.real(0.0))), self.real(1.0))
                return self("Where", self("Greater", v, self.real(0.0)), v, self.times(below, a))
            case "softplus":  # max(v, 0) + log(1 + exp(−|av|))/a
                small = self("Exp", self("Neg", self("Abs", self.times(v, a))))
                tail = self.times(self("Log", self("Add", small, self.real(1.0))), 1.0 / a)
                return self("Add", self("Relu", v), tail)
            case "tanh":
                return self("Tanh", v)
            case "sigmoid":
                return self("Sigmoid", v)
        raise InvalidParameterError("activation", activation.name, "it has no ONNX form")

    def prox(self, activation: Activation, v: ir.Value, alpha: float) -> ir.Value:
        """prox_{αf}(v), f with prox_f = σ; α = 1 but for those that are `CLOSED`."""
        if activation.name == "leaky_relu":
            a = activation.parameter
            return self._leaky(v, a / (a + alpha * (1.0 - a)))
        return self.activate(activation, v)

    def _leaky(self, v: ir.Value, slope: float) -> ir.Value:
        return self("Max", v, self.times(v, slope))  # a slope of at most 1


def centred(size: int) -> list[int]:
    """The offsets of the taps 0 .. size − 1 of a circular kernel: up to size/2, then what is left of 0."""
    return [k if k <= size // 2 else k - size for k in range(size)]


def noise(K: Tensor) -> float:
    """What entries of a kernel may be by rounding alone."""
    return NOISE * float(K.abs().max()) if K.numel() else 0.0


def window(K: Tensor, rows: Sequence[int], columns: Sequence[int], floor: float) -> tuple[range, range]:
    """The offsets (of rows, of columns) of the taps of kernels that are more than noise, 0 among them."""
    significant = (K.abs() > floor).flatten(0, 1).any(0)
    found = []
    for axis, places in ((1, rows), (0, columns)):
        offsets = [0, *(place for place, there in zip(places, significant.any(axis).tolist(), strict=True) if there)]
        found.append(range(min(offsets), max(offsets) + 1))
    return found[0], found[1]


@dataclass(frozen=True, eq=False)
class Kernel:
    """An operator in the file: a matrix, or kernels (rows, cols, kh, kw) with taps at these offsets, modulo the image."""

    value: ir.Value
    weight: Tensor  # what it holds, to see what is zero
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @classmethod
    def full(cls, value: ir.Value, weight: Tensor, grid: Grid) -> Kernel:
        """Kernels of the image's size (`Grid.kernels`)."""
        rows, columns = (tuple(centred(size)) for size in grid.image) if grid else ((), ())
        return cls(value, weight.detach().cpu(), rows, columns)

    def window(self, rows: slice, columns: slice) -> tuple[range, range]:
        """The offsets of the taps of a block that are more than noise."""
        return window(self.weight[rows, columns], self.rows, self.columns, noise(self.weight))

    def is_identity(self, rows: slice, columns: slice) -> bool:
        """Whether a block is I, but for noise: its only tap in place, of ones on the diagonal."""
        block = self.weight[rows, columns]
        if block.shape[0] != block.shape[1]:
            return False
        if not self.rows:
            return torch.equal(block, torch.eye(len(block)).to(block))
        eye = torch.zeros_like(block)
        eye[range(len(block)), range(len(block)), self.rows.index(0), self.columns.index(0)] = 1.0
        return float((block - eye).abs().max()) <= noise(self.weight)


class Columns:
    """States as columns (n, B): what a dense stage is written in."""

    width = 1  # rows for each state

    def __init__(self, author: Author) -> None:
        self.author = author

    def within(self, author: Author) -> Columns:
        """The same, written in a loop."""
        return Columns(author)

    def lift(self, x: ir.Value) -> ir.Value:
        """(B, n) → columns."""
        return self.author("Transpose", x, perm=[1, 0])

    def lower(self, Z: ir.Value) -> ir.Value:
        """Columns → (B, n)."""
        return self.author("Transpose", Z, perm=[1, 0])

    def operator(self, kernel: Kernel) -> ir.Value:
        """What columns are multiplied by."""
        return kernel.value

    def constant(self, b: ir.Value) -> ir.Value:
        """b (n,) as one column."""
        return self.author("Unsqueeze", b, self.author.ints(1))

    def norm(self, Z: ir.Value) -> ir.Value:
        """The l2 norm of each sample, (B,)."""
        return self.author("ReduceL2", Z, self.author.ints(0), keepdims=0)

    def identity(self, states: int) -> ir.Value:
        """I on columns of some states."""
        size = self.author.ints(self.width * states, self.width * states)
        zeros = self.author("ConstantOfShape", size, value=ir.tensor(np.zeros(1, dtype=self.author.numpy)))
        return self.author("EyeLike", zeros)

    def rows(self, Z: ir.Value, part: slice, size: int | None = None) -> ir.Value:
        """Some states' rows, of a column or an operator."""
        k = self.width
        return self.author.part(Z, slice(k * part.start, k * part.stop), -2, None if size is None else k * size)

    def block(self, M: ir.Value, rows: slice, columns: slice, shape: tuple[int, int]) -> ir.Value:
        """A block of an operator."""
        k = self.width
        part = self.rows(M, rows, shape[0])
        return self.author.part(part, slice(k * columns.start, k * columns.stop), -1, k * shape[1])

    def like(self, v: ir.Value, Z: ir.Value) -> ir.Value:
        """A column repeated for each sample of Z."""
        a = self.author
        size = a("Shape", v, end=-1)
        return a("Expand", v, a.concat([size, a("Shape", Z, start=-1)], 0))

    def each(self, sigma: Activations, v: ir.Value, function: Callable[[Activation, ir.Value], ir.Value]) -> ir.Value:
        """A function of (activation, pixels) on the rows of every run."""
        parts, offset = [], 0
        for activation, size in sigma:
            part = self.rows(v, slice(offset, offset + size), len(sigma))
            parts.append(part if activation.name == "identity" else self._on_pixels(function, activation, part))
            offset += size
        return self.author.concat(parts, -2)

    def _on_pixels(
        self, function: Callable[[Activation, ir.Value], ir.Value], activation: Activation, v: ir.Value
    ) -> ir.Value:
        return function(activation, v)

    def activate(self, sigma: Activations, v: ir.Value) -> ir.Value:
        """σ(v)."""
        return self.each(sigma, v, self.author.activate)

    def prox(self, sigma: Activations, v: ir.Value, alpha: float) -> ir.Value:
        """prox_{αf}(v)."""
        return self.each(sigma, v, lambda activation, part: self.author.prox(activation, part, alpha))


class Frequencies(Columns):
    """States of images as (F, 2n, B): for each frequency of the half spectrum real and imaginary parts, one below the other.

    Coordinates and operators are those of `Grid`; the transforms are exact but for the rounding of products.
    """

    width = 2

    def __init__(self, author: Author, grid: Grid) -> None:
        super().__init__(author)
        self.grid = grid
        self.h, self.w = grid.image
        self.half = self.w // 2 + 1

    def within(self, author: Author) -> Columns:
        return Frequencies(author, self.grid)

    def _waves(self, size: int, places: Sequence[int], count: int) -> tuple[Any, Any]:
        """(cos, sin) of 2π j k/size, j in ``places`` and k < ``count``; angles reduced in integers."""
        product = np.outer(np.asarray(places), np.arange(count)) % size
        product = np.where(2 * product > size, product - size, product)
        angle = product * (2.0 * math.pi / size)
        exact = (4 * product) % size == 0  # multiples of a right angle
        return np.where(exact, np.round(np.cos(angle)), np.cos(angle)), np.where(
            exact, np.round(np.sin(angle)), np.sin(angle)
        )

    def _transform(self, x: ir.Value, rows: Sequence[int], columns: Sequence[int]) -> ir.Value:
        """Sums with exp(−iωs) of values at places s: (k, c, rows, columns) → (k, c, 2, F)."""
        a = self.author
        cos, sin = self._waves(self.w, columns, self.half)
        x = a("MatMul", x, a.real(np.concatenate([cos, -sin], 1)))
        x = a.reshape(x, 0, 0, len(rows), 2, self.half)
        x = a.reshape(a("Transpose", x, perm=[0, 1, 3, 2, 4]), 0, 0, 2 * len(rows), self.half)
        cos, sin = (M.T for M in self._waves(self.h, rows, self.h))
        x = a("MatMul", a.real(np.block([[cos, sin], [-sin, cos]])), x)
        return a.reshape(x, 0, 0, 2, self.h * self.half)

    def lift(self, x: ir.Value) -> ir.Value:
        """(B, n, h, w) → columns."""
        X = self._transform(x, range(self.h), range(self.w))
        return self._stacked(self.author("Transpose", X, perm=[3, 1, 2, 0]))

    def _stacked(self, X: ir.Value) -> ir.Value:
        """(F, n, 2, k) → (F, 2n, k)."""
        a = self.author
        rows = a("Mul", a("Shape", X, start=1, end=2), a.ints(2))
        return a("Reshape", X, a.concat([a("Shape", X, end=1), rows, a("Shape", X, start=-1)], 0))

    def lower(self, Z: ir.Value) -> ir.Value:
        """Columns → (B, n, h, w)."""
        a, h, half = self.author, self.h, self.half
        states = a("Div", a("Shape", Z, start=1, end=2), a.ints(2))
        shape = a.concat([a.ints(h * half), states, a.ints(2), a("Shape", Z, start=-1)], 0)
        x = a("Transpose", a("Reshape", Z, shape), perm=[3, 1, 2, 0])
        x = a.reshape(x, 0, 0, 2 * h, half)
        cos, sin = self._waves(h, range(h), h)
        x = a("MatMul", a.real(np.block([[cos, -sin], [sin, cos]]) / h), x)
        x = a("Transpose", a.reshape(x, 0, 0, 2, h, half), perm=[0, 1, 3, 2, 4])
        x = a.reshape(x, 0, 0, h, 2 * half)
        twice = np.full((half, 1), 2.0)
        twice[0] = 1.0
        if self.w % 2 == 0:
            twice[-1] = 1.0
        cos, sin = (M.T * twice / self.w for M in self._waves(self.w, range(self.w), half))
        return a("MatMul", x, a.real(np.concatenate([cos, -sin])))

    def operator(self, kernel: Kernel) -> ir.Value:
        """K̂(ω) = conj(rfft2(K)) as real matrices (F, 2 rows, 2 cols) of blocks [[Re, −Im], [Im, Re]]."""
        a = self.author
        K = self._transform(kernel.value, kernel.rows, kernel.columns)  # (r, c, 2, F), conjugate
        K = a("Transpose", K, perm=[3, 0, 1, 2])
        re, im = a.part(K, slice(0, 1), -1), a.part(K, slice(1, 2), -1)
        above = a.concat([re, im], -1)
        below = a.concat([a("Neg", im), re], -1)
        both = a.concat([a("Unsqueeze", above, a.ints(2)), a("Unsqueeze", below, a.ints(2))], 2)  # (F, r, 2, c, 2)
        rows, columns = kernel.weight.shape[:2]
        return a.reshape(both, self.h * self.half, 2 * rows, 2 * columns)

    def constant(self, b: ir.Value) -> ir.Value:
        """Images that are b (n,) in every pixel: all at frequency 0."""
        a = self.author
        column = a("Unsqueeze", a.times(b, float(self.h * self.w)), a.ints(1))
        column = a.reshape(a("Pad", column, a.ints(0, 0, 0, 1)), 1, -1, 1)
        return a("Pad", column, a.ints(0, 0, 0, self.h * self.half - 1, 0, 0))

    def norm(self, Z: ir.Value) -> ir.Value:
        a = self.author
        weights = self.grid.weights(torch.zeros((), dtype=torch.float64)).unsqueeze(-1).numpy()
        power = a("Mul", a("ReduceSumSquare", Z, a.ints(1), keepdims=0), a.real(weights))
        return a("Sqrt", a("ReduceSum", power, a.ints(0), keepdims=0))

    def _on_pixels(
        self, function: Callable[[Activation, ir.Value], ir.Value], activation: Activation, v: ir.Value
    ) -> ir.Value:
        return self.lift(function(activation, self.lower(v)))
