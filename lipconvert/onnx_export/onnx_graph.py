"""A network as an ONNX graph that means something: each stage is a function of the domain ``lipconvert``.

Standard operators at opset 20, dynamic batch. A stage z = σ(Wz + Ux + b_z), y = Gz + b_y is written in one of four ways:

    substitution   W strictly block lower triangular: straight-line, block after block (FORMULAS 5)
    convolutions   the same on images with small kernels in float32: ``Conv`` of circularly padded images
    sweeps         W close to triangular, as after fine-tuning, and sweeps contract: a ``Loop`` of them
    splitting      any other true equilibrium: a ``Loop`` of Peaceman-Rachford steps

In a loop each sample stops by itself.

All but convolutions work on columns: (n, B) for a dense stage, (F, 2n, B) for images, a row for the real and one for the
imaginary part of each state at each of F frequencies. An operator is then a product of real matrices, and so are the
transforms, with cosines and sines: onnxruntime has no inverse of a real DFT, and no Conv in float64.

What must be known to write a graph is a `Plan` for each stage; error bounds and the checkpoint's manifest read it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..certification.accuracy import FARTHEST, REACH
from ..certification.bounds import output_shape
from ..dae.activations import Activations, MaxMin, activation_of, is_activation
from ..errors import CheckpointError
from ..linalg.spectrum import Grid
from ..networks.documents import GraphMethod
from ..networks.glue import FirstFeatures, MeanPool, Normalize, PadChannels, pair
from ..networks.lben import LBEN
from ..networks.network import Network
from .onnx_author import DOMAIN, DTYPES, OPSET, Author, Columns, Frequencies, Kernel, next_to_one
from .onnx_plan import STOP, Plan, slices

IR_VERSION = 10

INPUT, LOGITS, RESIDUAL, RADIUS = "input", "logits", "residual", "radius"

# Names of functions beside those of stages: what refines an inverse, and what certifies.
REFINE, RADIUS_FUNCTION = "refined_inverse", "certified_radius"


@dataclass(frozen=True)
class _Stage:
    """What a function of one stage is written from: its inputs as values, beside the weights they hold."""

    stage: LBEN
    plan: Plan
    x: ir.Value
    W: Kernel
    U: Kernel
    G: Kernel
    b_z: ir.Value
    b_y: ir.Value

    @classmethod
    def of(cls, plan: Plan, stage: LBEN, inputs: Mapping[str, ir.Value]) -> _Stage:
        """From values under the names x, W, U, G, b_z and b_y."""
        offsets = ()
        if stage.grid:
            offsets = (tuple(range(o, o + k)) for o, k in zip(plan.origin, plan.W.shape[2:], strict=True))
        W = Kernel(inputs["W"], plan.W, *offsets)
        U, G = (Kernel.full(inputs[name], getattr(stage, name), stage.grid) for name in ("U", "G"))
        return cls(stage, plan, inputs["x"], W, U, G, inputs["b_z"], inputs["b_y"])

    @property
    def blocks(self) -> list[slice]:
        return slices(self.stage.blocks)

    def kept(self, block: slice, other: slice) -> bool:
        """Whether the states of ``block`` read any of ``other``."""
        return bool(self.plan.kept[block, other].any())


@dataclass(frozen=True)
class _Written:
    """What a function returns: y, the residual (B,) where it is asked for, what is false where there is no answer or None."""

    y: ir.Value
    residual: Callable[[], ir.Value]
    ok: ir.Value | None = None


def _substitution(a: Author, frame: Columns, s: _Stage) -> _Written:
    """Block after block: z_k = σ(Σ_{j<k} W_kj z_j + U_k x + b_k)."""
    n, p = s.stage.U.shape[:2]
    X, W, U, b = frame.lift(s.x), frame.operator(s.W), frame.operator(s.U), frame.constant(s.b_z)
    states: list[ir.Value] = []
    for k, block in enumerate(s.blocks):
        terms, own = [frame.rows(b, block, n)], s.U.weight[block]
        if s.U.is_identity(block, slice(0, p)):
            terms.append(X)
        elif bool(own.any()):
            terms.append(a("MatMul", frame.block(U, block, slice(0, p), (n, p)), X))
        reads = [j for j, other in enumerate(s.blocks[:k]) if s.kept(block, other)]
        if reads:
            first, last = reads[0], reads[-1]
            before = slice(s.blocks[first].start, s.blocks[last].stop)
            terms.append(a("MatMul", frame.block(W, block, before, (n, n)), a.concat(states[first : last + 1], -2)))
        v = a.total(terms) if len(terms) > 1 else frame.like(terms[0], X)
        a.call(**{f"v_{k}": v})
        states.append(frame.activate(s.stage.sigma[block], v))
        a.call(**{f"z_{k}": states[-1]})
    y = _readout(a, frame, s, list(zip(s.blocks, states, strict=True)))
    return _Written(y, lambda: a.times(frame.norm(a.concat(states, -2)), s.plan.how.skipped))


def _readout(a: Author, frame: Columns, s: _Stage, states: Sequence[tuple[slice, ir.Value]]) -> ir.Value:
    """y = Gz + b_y; what G copies is not multiplied."""
    q, n = s.G.weight.shape[:2]
    terms: list[ir.Value] = []
    others: list[tuple[slice, ir.Value]] = []
    for block, Z in states:
        own = s.G.weight[:, block]
        if s.G.is_identity(slice(0, q), block):
            terms.append(Z)
        elif bool(own.any()):
            others.append((block, Z))
    if others:
        G = frame.operator(s.G)
        columns = [frame.block(G, slice(0, q), block, (q, n)) for block in _runs([block for block, _ in others])]
        terms.append(a("MatMul", a.concat(columns, -1), a.concat([Z for _, Z in others], -2)))
    constant = frame.constant(s.b_y)
    return frame.lower(a.total([*terms, constant]) if terms else frame.like(constant, states[0][1]))


def _runs(slices: Sequence[slice]) -> list[slice]:
    """Neighbouring slices joined."""
    joined = [slices[0]]
    for part in slices[1:]:
        if part.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined


def _convolutions(a: Author, s: _Stage) -> _Written:
    """The same on pixels: what each block is read by is one convolution for every shape of kernels."""
    sums: dict[int, list[ir.Value]] = {k: [] for k in range(len(s.blocks))}

    def spread(x: ir.Value, kernel: Kernel, columns: slice, targets: Sequence[int]) -> None:
        shapes: dict[tuple[range, range], list[int]] = {}
        for k in targets:
            own = kernel.weight[s.blocks[k], columns]
            if kernel.is_identity(s.blocks[k], columns):
                sums[k].append(x)
            elif bool(own.any()):
                shapes.setdefault(kernel.window(s.blocks[k], columns), []).append(k)
        for shape, readers in shapes.items():
            rows = [s.blocks[k] for k in readers]
            y = _convolved(a, x, kernel, rows, [columns], shape, s.stage.grid)
            offset = 0
            for k, block in zip(readers, rows, strict=True):
                size = block.stop - block.start
                sums[k].append(a.part(y, slice(offset, offset + size), 1, sum(r.stop - r.start for r in rows)))
                offset += size

    spread(s.x, s.U, slice(0, s.stage.U.shape[1]), range(len(s.blocks)))
    states: list[ir.Value] = []
    for k, block in enumerate(s.blocks):
        b = a.reshape(a.part(s.b_z, block, 0, len(s.stage.b_z)), 1, -1, 1, 1)
        if sums[k]:
            v = a.total([*sums[k], b])
        else:
            shape = a.concat([a("Shape", s.x, end=1), a.ints(block.stop - block.start, *s.stage.grid.image)], 0)
            v = a("Expand", b, shape)
        a.call(**{f"v_{k}": v})
        states.append(on_channels(a, s.stage.sigma[block], v))
        a.call(**{f"z_{k}": states[-1]})
        spread(states[-1], s.W, block, [j for j in range(k + 1, len(s.blocks)) if s.kept(s.blocks[j], block)])
    everything, terms = slice(0, len(s.stage.b_y)), [a.reshape(s.b_y, 1, -1, 1, 1)]
    shapes: dict[tuple[range, range], list[int]] = {}
    for k, block in enumerate(s.blocks):
        if s.G.is_identity(everything, block):
            terms.append(states[k])
        elif bool(s.G.weight[:, block].any()):
            shapes.setdefault(s.G.window(everything, block), []).append(k)
    for shape, read in shapes.items():
        x = a.concat([states[k] for k in read], 1)
        terms.append(_convolved(a, x, s.G, [everything], [s.blocks[k] for k in read], shape, s.stage.grid))
    if len(terms) == 1:
        shape_y = a.concat([a("Shape", s.x, end=1), a.ints(len(s.stage.b_y), *s.stage.grid.image)], 0)
        y = a("Expand", terms[0], shape_y)
    else:
        y = a.total([*terms[1:], terms[0]])

    def residual() -> ir.Value:
        norm = a("ReduceL2", a.concat(states, 1), a.ints(1, 2, 3), keepdims=0)
        return a.times(norm, s.plan.how.skipped)

    return _Written(y, residual)


def _convolved(
    a: Author,
    x: ir.Value,
    kernel: Kernel,
    rows: Sequence[slice],
    columns: Sequence[slice],
    shape: tuple[range, range],
    grid: Grid,
) -> ir.Value:
    """Some rows and columns of an operator on images, by the taps of a window, on circularly padded images."""
    size = kernel.weight.shape
    K = a.concat([a.part(kernel.value, part, 0, size[0]) for part in _runs(rows)], 0)
    K = a.concat([a.part(K, part, 1, size[1]) for part in _runs(columns)], 1)
    for axis, wanted, stored in ((2, shape[0], kernel.rows), (3, shape[1], kernel.columns)):
        if tuple(wanted) != tuple(stored):
            K = a("Gather", K, a.ints(*(stored.index(offset) for offset in wanted)), axis=axis)
    around = [(-offsets.start, offsets.stop - 1) for offsets in shape]
    return a("Conv", a.wrap(x, around, grid) if any(map(any, around)) else x, K)


def on_channels(a: Author, sigma: Activations, v: ir.Value) -> ir.Value:
    """σ(v) for v (B, n, ...)."""
    parts, offset = [], 0
    for activation, size in sigma:
        parts.append(a.activate(activation, a.part(v, slice(offset, offset + size), 1, len(sigma))))
        offset += size
    return a.concat(parts, 1)


def _splitting(a: Author, frame: Columns, s: _Stage) -> _Written:
    """Peaceman-Rachford (`lipconvert.equilibria.solvers.PeacemanRachford`):

        z = A⁻¹(t + αu),  A = I + α(I − W),   t ← t + 2(prox_{αf}(2z − t) − z),   Wz + u = ((1 + α)z − t)/α

    A⁻¹ is refined by Newton and Schulz, once, and each product with it once more. A sample stops at half the tolerance; the
    residual is evaluated afresh at the end, and outputs are NaN where it is not met.
    """
    alpha, sigma, n = s.plan.how.alpha, s.stage.sigma, len(s.stage.b_z)
    X, W = frame.lift(s.x), frame.operator(s.W)
    u = a("Add", a("MatMul", frame.operator(s.U), X), frame.constant(s.b_z))
    A = a("Sub", a.times(frame.identity(n), 1.0 + alpha), a.times(W, alpha))
    a.call(u=u, A=A)
    size = a("Abs", A)
    sums = [
        a("ReduceMax", a("ReduceSum", size, a.ints(axis), keepdims=1), a.ints(-1, -2), keepdims=1) for axis in (-1, -2)
    ]
    transposed = a("Transpose", A, perm=[1, 0] if frame.width == 1 else [0, 2, 1])
    R = a("Div", transposed, a("Mul", *sums))
    for _ in range(s.plan.how.inverse_steps):
        R = a(REFINE, A, R, domain=DOMAIN)

    def resolvent(a: Author, t: ir.Value) -> ir.Value:
        r = a("Add", t, a.times(u, alpha))
        z = a("MatMul", R, r)
        return a("Add", z, a("MatMul", R, a("Sub", r, a("MatMul", A, z))))

    def step(loop: Author, body: Columns, t: ir.Value) -> tuple[ir.Value, ir.Value]:
        z = resolvent(loop, t)
        v = loop.times(loop("Sub", loop.times(z, 1.0 + alpha), t), 1.0 / alpha)
        residual = body.norm(loop("Sub", z, body.activate(sigma, v)))
        stop = _small(loop, residual, [body.norm(z), body.norm(u)], STOP * s.plan.how.tolerance)
        forth = loop("Sub", body.prox(sigma, loop("Sub", loop("Add", z, z), t), alpha), z)
        return loop("Where", stop, t, loop("Add", t, loop("Add", forth, forth))), stop

    return _settled(a, frame, s, W, u, resolvent(a, _loop(a, frame, s.plan, u, step)))


def _sweeps(a: Author, frame: Columns, s: _Stage) -> _Written:
    """Block Gauss-Seidel (`equilibria.solvers.Sweep`): the residual of a sweep is at most ‖W − T‖ times its change."""
    n = len(s.stage.b_z)
    X, W = frame.lift(s.x), frame.operator(s.W)
    u = a("Add", a("MatMul", frame.operator(s.U), X), frame.constant(s.b_z))
    a.call(u=u)
    rows = [frame.rows(W, block, n) for block in s.blocks]

    def step(loop: Author, body: Columns, old: ir.Value) -> tuple[ir.Value, ir.Value]:
        z = old
        for block, W_k in zip(s.blocks, rows, strict=True):
            v = loop("Add", loop("MatMul", W_k, z), body.rows(u, block, n))
            own = body.activate(s.stage.sigma[block], v)
            parts = [
                body.rows(z, part, n)
                for part in (slice(0, block.start), slice(block.stop, n))
                if part.start < part.stop
            ]
            z = loop.concat([*parts[: block.start > 0], own, *parts[block.start > 0 :]], -2)
        change = loop.times(body.norm(loop("Sub", z, old)), s.plan.how.skipped)
        return z, _small(loop, change, [body.norm(z), body.norm(u)], STOP * s.plan.how.tolerance)

    return _settled(a, frame, s, W, u, _loop(a, frame, s.plan, u, step))


def _small(a: Author, residual: ir.Value, sizes: Sequence[ir.Value], tolerance: float) -> ir.Value:
    """Whether a residual (B,) is within tolerance, or no longer a number: then it never will be."""
    return a("Not", a("Greater", residual, a.times(a.total(sizes), tolerance)))


def _loop(
    a: Author,
    frame: Columns,
    plan: Plan,
    like: ir.Value,
    step: Callable[[Author, Columns, ir.Value], tuple[ir.Value, ir.Value]],
) -> ir.Value:
    """What a step (values → next values, whether to stop (B,)) leaves, from 0; samples that have stopped are not changed."""
    zero = a.times(like, 0.0)
    none = a("Expand", a.constant(np.asarray(False)), a("Shape", like, start=-1))
    loop = Author(a.dtype, a)
    iteration = ir.Value(name="iteration", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    running = ir.Value(name="running", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    state = ir.Value(name="state", type=ir.TensorType(DTYPES[a.dtype]))
    stopped = ir.Value(name="stopped", type=ir.TensorType(ir.DataType.BOOL))
    following, stop = step(loop, frame.within(loop), state)
    following = loop("Where", stopped, state, following)
    now = loop("Or", stopped, stop)
    least = loop("ReduceMin", loop("Cast", now, to=ir.DataType.INT32), loop.ints(0), keepdims=0)
    left = loop("Equal", least, loop.constant(np.asarray(0, dtype=np.int32)))
    body = ir.Graph(
        [iteration, running, state, stopped],
        [left, following, now],
        nodes=loop.tape.nodes,
        name=f"a step of {plan.how.method}",
    )
    bounds = a.constant(np.asarray(plan.how.max_steps)), a.constant(np.asarray(True))
    result, _ = a.tape.op_multi_out("Loop", [*bounds, zero, none], {"body": body}, num_outputs=2)
    result.name = a._name("loop")
    return result


def _settled(a: Author, frame: Columns, s: _Stage, W: ir.Value, u: ir.Value, z: ir.Value) -> _Written:
    """The output for states z, its residual evaluated afresh, and whether that is within tolerance."""
    Wz = a("MatMul", W, z)
    a.call(z=z, Wz=Wz)
    residual = frame.norm(a("Sub", z, frame.activate(s.stage.sigma, a("Add", Wz, u))))
    scale = a.total([frame.norm(z), frame.norm(u), frame.norm(Wz)])
    small = a("LessOrEqual", residual, a.times(scale, s.plan.how.tolerance))
    ok = a("And", small, a("Less", residual, a.real(math.inf)))  # norms may overflow, and then say nothing
    return _Written(_readout(a, frame, s, [(slice(0, len(s.stage.b_z)), z)]), lambda: residual, ok)


def convolutions(a: Author, plan: Plan, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """y of a triangular stage on images, by convolutions, for a graph without functions; ``inputs``: x, W, U, G, b_z, b_y."""
    return _convolutions(a, _Stage.of(plan, plan.stage, inputs)).y


WRITERS: dict[GraphMethod, Callable[[Author, _Stage], _Written]] = {
    "substitution": lambda a, s: _substitution(a, _frame(a, s.stage.grid), s),
    "convolutions": _convolutions,
    "sweeps": lambda a, s: _sweeps(a, _frame(a, s.stage.grid), s),
    "splitting": lambda a, s: _splitting(a, _frame(a, s.stage.grid), s),
}


def _frame(a: Author, grid: Grid) -> Columns:
    return Frequencies(a, grid) if grid else Columns(a)


def _function(
    name: str, inputs: Sequence[ir.Value], outputs: Mapping[str, ir.Value], a: Author, doc: str
) -> ir.Function:
    opsets = _opsets(a)
    for label, value in outputs.items():
        value.name = label
    graph = ir.Graph(
        inputs, list(outputs.values()), nodes=a.tape.nodes, opset_imports=opsets, name=name, doc_string=doc
    )
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    function.doc_string = doc
    return function


def _opsets(a: Author) -> dict[str, int]:
    """The operator sets of what was written, none that it does not use: functions are called outside loops."""
    return {domain: {"": OPSET, DOMAIN: 1}[domain] for domain in sorted({"", *(node.domain for node in a.tape.nodes)})}


def _refine(dtype: torch.dtype) -> ir.Function:
    """R ← R(2I − AR)."""
    a = Author(dtype)
    A, R = (ir.Value(name=name) for name in ("A", "R"))
    y = a("Sub", a("Add", R, R), a("MatMul", R, a("MatMul", A, R)))
    return _function(
        REFINE, [A, R], {"refined": y}, a, "2R - RAR: twice as many digits of the inverse of A (Newton, Schulz)"
    )


def _stage_function(stage: LBEN, plan: Plan, with_residual: bool) -> ir.Function:
    a = Author(stage.b_z.dtype)
    inputs = {name: ir.Value(name=name) for name in ("x", "W", "U", "G", "b_z", "b_y")}
    s = _Stage.of(plan, stage, inputs)
    written = WRITERS[plan.how.method](a, s)
    y = written.y
    if written.ok is not None:
        ok = a.reshape(written.ok, -1, *[1] * len(stage.input_shape))
        y = a("Where", ok, y, a.real(math.nan))
    return _function(
        plan.how.function,
        list(inputs.values()),
        {"y": y} | ({"residual": written.residual()} if with_residual else {}),
        a,
        describe(stage, plan),
    )


def describe(stage: LBEN, plan: Plan) -> str:
    """What a stage is, in words."""
    n, p, q = len(stage.b_z), stage.U.shape[1], len(stage.b_y)
    where = f" on circular images of {stage.grid.image[0]}x{stage.grid.image[1]} pixels" if stage.grid else ""
    triangular = "W is strictly block lower triangular: one block after the other"
    until = (
        f"to a relative residual of {plan.how.tolerance:g} in {plan.how.max_steps} steps, else NaN, sample by sample"
    )
    how = {
        "substitution": triangular,
        "convolutions": f"{triangular}, by circular convolutions",
        "sweeps": f"W is nearly block lower triangular: sweeps {until}",
        "splitting": f"a true equilibrium: Peaceman-Rachford splitting with alpha = {plan.how.alpha:g} {until}",
    }[plan.how.method]
    return (
        f"{stage.name}: z = s(Wz + Ux + b_z), y = Gz + b_y; {n} states, {p} inputs, {q} outputs{where}. "
        f"{stage.lipschitz:g}-Lipschitz, s: {', '.join(f'{a} x {k}' for a, k in stage.sigma)}. {how}."
    )


def _radius_function(dtype: torch.dtype) -> ir.Function:
    """min_j (y_i − y_j − 2(a_ij + b_ij‖x‖)) / (K_ij + b_ij) for the largest y_i, in float64; 0 where nothing is certified.

    a + b‖x‖ is what y_i − y_j may be off at x, b r more within r of it (`certification.accuracy.Accuracy.everywhere`).
    """
    a = Author(torch.float64)
    x, y, pairs, errors = (ir.Value(name=name) for name in ("x", "y", "pairs", "errors"))
    z = a("Cast", y, to=ir.DataType.DOUBLE)
    flat = a("Cast", a("Flatten", x, axis=1), to=ir.DataType.DOUBLE)
    norm = a.times(a("ReduceL2", flat, a.ints(1), keepdims=1), 1.0 + 1e-9)  # sums of 10^6 squares round less
    top = a("ArgMax", z, axis=1, keepdims=0)
    first, second = (a("Gather", errors, a.constant(np.asarray(k)), axis=0) for k in (0, 1))
    K, at, growth = (a("Gather", table, top, axis=0) for table in (pairs, first, second))
    largest = a("ReduceMax", z, a.ints(1), keepdims=1)
    rounding = a.times(a("Add", a("Abs", largest), a("Abs", z)), 2.0**-50)
    off = a("Add", a.times(a("Add", at, a("Mul", growth, norm)), 2.0), rounding)
    left, zero = a("Sub", a("Sub", largest, z), off), a.real(0.0)
    # What is not a number is not greater than 0, and counts as nothing: least values would pass it over.
    radii = a("Where", a("Greater", left, zero), a("Div", left, a("Add", K, growth)), zero)
    first, step = a.constant(np.asarray(0)), a.constant(np.asarray(1))
    classes = a("Range", first, a("Squeeze", a("Shape", y, start=1, end=2)), step)
    own = a("Equal", classes, a("Unsqueeze", top, a.ints(1)))
    least = a("ReduceMin", a("Where", own, a.real(FARTHEST), radii), a.ints(1), keepdims=0)
    least = a("Min", least, a("Squeeze", a("Sub", a.real(REACH[dtype]), norm), a.ints(1)))
    least = a("Max", least, zero)
    finite = a("Cast", a("Less", a("Abs", z), a.real(math.inf)), to=ir.DataType.INT32)
    known = a("Cast", a("ReduceMin", finite, a.ints(1), keepdims=0), to=ir.DataType.BOOL)
    radius = a("Where", known, a.times(a("Min", least, a.real(FARTHEST)), 1.0 - 1e-9), zero)
    doc = (
        "The l2 radius within which no input gets another class from this graph: the least (y_i - y_j - 2(a + b|x|))/(K + b) "
        "over j, K = pairs_ij proved, (a, b) = errors_ij bounds of solver and rounding (IEEE sums in any order)."
    )
    return _function(RADIUS_FUNCTION, [x, y, pairs, errors], {"radius": radius}, a, doc)


def glue(
    a: Author, step: nn.Module, x: ir.Value, shape: tuple[int, ...], buffers: Callable[[str], ir.Value]
) -> ir.Value:
    """A step that is no stage, on inputs (B, *shape)."""
    if is_activation(step):
        return a.activate(activation_of(step), x)
    if isinstance(step, nn.Identity):
        return x
    if isinstance(step, Normalize):
        each = (1, -1, *[1] * (len(shape) - 1))
        shifted = a("Sub", x, a.reshape(buffers("mean"), *each))
        if step.std.numel() == 1 and next_to_one(step.std.item()):  # see `Author.times`
            return a.times(shifted, 1.0 / step.std.item())
        return a("Div", shifted, a.reshape(buffers("std"), *each))
    if isinstance(step, PadChannels):
        missing = step.channels - shape[0]
        return a("Pad", x, a.ints(*[0] * (len(shape) + 2), missing, *[0] * (len(shape) - 1))) if missing else x
    if isinstance(step, FirstFeatures):
        return a.part(x, slice(0, step.features), 1, shape[0])
    if isinstance(step, MaxMin):
        half = shape[0] // 2
        top, bottom = a.part(x, slice(0, half), 1), a.part(x, slice(half, 2 * half), 1)
        return a.concat([a("Max", top, bottom), a("Min", top, bottom)], 1)
    if isinstance(step, nn.Flatten | nn.Unflatten):
        return a.reshape(x, 0, *output_shape(step, shape))
    if isinstance(step, MeanPool | nn.AvgPool2d):
        c, h, w = shape
        kh, kw = pair(step.kernel_size)
        divisor = kh if isinstance(step, MeanPool) else step.divisor_override or kh * kw
        h_out, w_out = output_shape(step, shape)[1:]
        if (h_out * kh, w_out * kw) != (h, w):  # torch leaves out what does not fill a window
            x = a.part(a.part(x, slice(0, h_out * kh), 2), slice(0, w_out * kw), 3)
        windows = a("ReduceSum", a.reshape(x, 0, c, h_out, kh, w_out, kw), a.ints(3, 5), keepdims=0)
        return a.times(windows, 1.0 / divisor)
    if isinstance(step, nn.PixelUnshuffle):
        c, h, w = shape
        r = step.downscale_factor
        phases = a("Transpose", a.reshape(x, 0, c, h // r, r, w // r, r), perm=[0, 1, 3, 5, 2, 4])
        return a.reshape(phases, 0, c * r * r, h // r, w // r)
    if isinstance(step, nn.PixelShuffle):
        c, h, w = shape
        r = step.upscale_factor
        pixels = a("Transpose", a.reshape(x, 0, c // r**2, r, r, h, w), perm=[0, 1, 4, 2, 5, 3])
        return a.reshape(pixels, 0, c // r**2, h * r, w * r)
    raise CheckpointError("the graph", f"glue {type(step).__name__}", "it is not the core's own, and has no ONNX form")


def build(
    net: Network, plans: Mapping[int, Plan], tensors: Mapping[str, ir.TensorProtocol], outputs: Sequence[str] = ()
) -> ir.Model:
    """The model of a network, its initialisers being ``tensors`` (state dict names, and ``steps.k.W``).

    ``outputs`` beside the network's own: ``"residual"`` (B,), the largest of the stages, and ``"radius"`` (B,), float64,
    the certified radius of each sample, which takes the tensors ``pairs`` and ``errors``.
    """
    a = Author(net.dtype)
    shape = net.input_shape
    used: dict[str, ir.Value] = {}

    def initializer(name: str) -> ir.Value:
        if name not in used:
            tensor = tensors[name]
            used[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return used[name]

    x = entry = ir.Value(name=INPUT, type=ir.TensorType(DTYPES[net.dtype]), shape=ir.Shape(["batch", *shape]))
    functions, residuals = [], []
    # Images where B = 0 are neither wrapped nor transformed by onnxruntime, and a Reshape takes its 0 for another size: an
    # image of zeros takes their place, and is cut from what comes out.
    count = None
    if any(stage.grid for stage in net.stages):
        none = np.zeros(2 * len(shape) + 2, dtype=np.int64)
        count, one = a("Shape", entry, end=1), none.copy()
        one[len(shape) + 1] = 1
        x = a("Pad", entry, a("Where", a("Equal", count, a.ints(0)), a.constant(one), a.constant(none)))

    if any(plan.how.method == "splitting" for plan in plans.values()):
        functions.append(_refine(net.dtype))  # before what calls it, for runtimes that read in order
    for k, step in enumerate(net.steps):
        following = output_shape(step, shape)
        if isinstance(step, LBEN):
            plan = plans[k]
            arguments = [x, *(initializer(f"steps.{k}.{name}") for name in ("W", "U", "G", "b_z", "b_y"))]
            wanted = RESIDUAL in outputs
            functions.append(_stage_function(step, plan, wanted))
            x, *rest = a.tape.op_multi_out(
                plan.how.function,
                arguments,
                num_outputs=1 + wanted,
                domain=DOMAIN,
                name=plan.how.function,
                doc_string=describe(step, plan),
            )
            residuals += rest
        else:
            x = glue(a, step, x, shape, lambda name, k=k: initializer(f"steps.{k}.{name}"))
        shape = following
    if count is not None:
        x = a("Slice", x, a.ints(0), count, a.ints(0))
    if x is entry or x.producer() is None:
        x = a("Identity", x)
    x.name, x.type, x.shape = LOGITS, ir.TensorType(DTYPES[net.dtype]), ir.Shape(["batch", *shape])
    results = [x]
    if RESIDUAL in outputs:
        columns = [a("Unsqueeze", r, a.ints(1)) for r in residuals]
        worst = a("ReduceMax", a.concat(columns, 1), a.ints(1), keepdims=0)
        if count is not None:
            worst = a("Slice", worst, a.ints(0), count, a.ints(0))
        worst.name, worst.type, worst.shape = RESIDUAL, ir.TensorType(DTYPES[net.dtype]), ir.Shape(["batch"])
        results.append(worst)
    if RADIUS in outputs:
        tables = [initializer(name) for name in ("pairs", "errors")]
        radius = a(RADIUS_FUNCTION, entry, x, *tables, domain=DOMAIN)
        radius.name, radius.type, radius.shape = RADIUS, ir.TensorType(ir.DataType.DOUBLE), ir.Shape(["batch"])
        results.append(radius)
        functions.append(_radius_function(net.dtype))
    graph = ir.Graph(
        [entry],
        results,
        nodes=a.tape.nodes,
        initializers=list(used.values()),
        opset_imports=_opsets(a),
        name="network",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="lipconvert", functions=functions)
