"""For other tools: a plain feed-forward ONNX graph of a triangular network, and VNN-LIB properties for verifiers.

Verifiers of the VNN-COMP family read ONNX without functions or loops, in float32, and properties that are boxes and linear
inequalities (VNN-LIB 1.0). There is no l2 ball in it, so the largest l∞ box in the ball is written, and said to be that:
robust in the ball is robust in the box, a counterexample in the box is one in the ball, and the converse of neither is true.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from ..certification.bounds import output_shape
from ..errors import CheckpointError, DataError, InvalidParameterError, NotFiniteError, ShapeError
from ..foundation.arguments import count, inputs_of, isolated, number
from ..foundation.files import alone, whole
from ..foundation.integrity import require_own
from ..linalg.spectrum import Grid
from ..networks.lben import LBEN
from ..networks.network import Network
from ..onnx_export.onnx_author import DTYPES, OPSET, Author
from ..onnx_export.onnx_graph import INPUT, IR_VERSION, LOGITS, convolutions, glue, on_channels
from ..onnx_export.onnx_plan import STRAIGHT, Plan, plan, slices, stored_W

# The share of a radius that the corners of the box keep from the sphere, for the rounding of its sides.
INWARD = 1e-9


@isolated
def explicit(net: Network) -> onnx.ModelProto:
    """The network as a plain feed-forward graph in float32: one ``Gemm`` for each block of states, no functions, no loops.

    Convolutional stages are ``Conv`` of images with slices of themselves around them. Raises `CheckpointError` for a stage
    that is a true equilibrium: its W is not triangular, and no feed-forward graph computes it; `ModifiedModuleError` for
    hooks and the like.
    """
    if not isinstance(net, Network):
        raise InvalidParameterError("net", type(net).__name__, "only a converted network is exported")
    require_own(net)
    net = copy.deepcopy(net).cpu().float()
    a = _Author(torch.float32)
    shape = net.input_shape
    entry = x = ir.Value(name=INPUT, type=ir.TensorType(DTYPES[torch.float32]), shape=ir.Shape(["batch", *shape]))
    used: list[ir.Value] = []

    def weight(name: str, tensor: Tensor) -> ir.Value:
        value = ir.tensor(tensor.detach().contiguous().numpy(), name=name)
        used.append(
            ir.Value(name=name, type=ir.TensorType(value.dtype), shape=ir.Shape(list(tensor.shape)), const_value=value)
        )
        return used[-1]

    for k, step in enumerate(net.steps):
        if isinstance(step, LBEN):
            chosen = plan(step, f"stage_{k}", *stored_W(step))
            if chosen.how.method not in STRAIGHT:
                reason = (
                    "W is not triangular: it is a true equilibrium, and has no feed-forward form. Export it without"
                )
                raise CheckpointError("the graph", f"step {k}, {step.name}", f"{reason} --explicit")
            a.prefix = f"stage_{k}_"
            write = _images if step.grid else _dense
            x = write(a, chosen, x, lambda name, tensor, k=k: weight(f"{name}_{k}", tensor))
        else:
            buffers = dict(step.named_buffers())
            x = glue(a, step, x, shape, lambda name, k=k, found=buffers: weight(f"{name}_{k}", found[name]))
        shape = output_shape(step, shape)
    if x is entry:
        x = a("Identity", x)
    x.name, x.type, x.shape = LOGITS, ir.TensorType(DTYPES[torch.float32]), ir.Shape(["batch", *shape])
    graph = ir.Graph(
        [entry], [x], nodes=a.tape.nodes, initializers=used, opset_imports={"": OPSET}, name="feed-forward network"
    )
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="lipconvert"))


class _Author(Author):
    """For verifiers: what every one of them reads, and what runs on a batch of 0 as it is."""

    def wrap(self, x: ir.Value, around: Sequence[tuple[int, int]], grid: Grid) -> ir.Value:
        for axis, size, (before, after) in zip((2, 3), grid.image, around, strict=True):
            ends = [slice(size - before, size)] * (before > 0), [slice(0, after)] * (after > 0)
            first, last = ([self.part(x, pixels, axis) for pixels in end] for end in ends)
            x = self.concat([*first, x, *last], axis)
        return x


Weight = Callable[[str, Tensor], ir.Value]


def _dense(a: Author, chosen: Plan, x: ir.Value, weight: Weight) -> ir.Value:
    """z_k = σ([U_k W_k,·] [x; z_·] + b_k), y = Gz + b_y, of what is read only; rows that copy x are x."""
    stage, W = chosen.stage, chosen.W * chosen.kept
    U, G, b_z = (t.detach() for t in (stage.U, stage.G, stage.b_z))
    states: list[ir.Value] = []
    parts = slices(stage.blocks)

    def read(M: Tensor, first: tuple[Tensor, ir.Value] | None, upto: int) -> tuple[list[Tensor], list[ir.Value]]:
        found = [first] if first is not None and bool(first[0].any()) else []
        found += [(M[:, parts[j]], states[j]) for j in range(upto) if bool(M[:, parts[j]].any())]
        return [M for M, _ in found], [z for _, z in found]

    for k, block in enumerate(parts):
        identity = (
            torch.equal(U[block], torch.eye(U.shape[1], dtype=U.dtype)[: len(U[block])]) and len(U[block]) == U.shape[1]
        )
        linear = all(activation.name == "identity" for activation, _ in stage.sigma[block])
        matrices, inputs = read(W[block], (U[block], x), k)
        if identity and linear and len(inputs) == 1 and not bool(b_z[block].any()):
            states.append(x)
            continue
        if not inputs:  # constants
            matrices, inputs = [U[block]], [x]
        M = weight(f"W{k}", torch.cat(matrices, 1))
        v = a("Gemm", a.concat(inputs, 1), M, weight(f"b{k}", b_z[block]), transB=1)
        states.append(on_channels(a, stage.sigma[block], v))
        a.call(**{f"v_{k}": v})
        a.call(**{f"z_{k}": states[-1]})
    matrices, inputs = read(G, None, len(parts))
    if not inputs:
        matrices, inputs = [G[:, parts[0]]], [states[0]]
    return a("Gemm", a.concat(inputs, 1), weight("G", torch.cat(matrices, 1)), weight("b_y", stage.b_y), transB=1)


def _images(a: Author, chosen: Plan, x: ir.Value, weight: Weight) -> ir.Value:
    stage = chosen.stage
    inputs = {name: weight(name, getattr(stage, name)) for name in ("U", "G", "b_z", "b_y")}
    return convolutions(a, chosen, inputs | {"x": x, "W": weight("W", chosen.W)})


@isolated
def write_vnnlib(
    path: str | Path, x: Tensor, label: int, classes: int, radius: float, box: tuple[float, float] | None = None
) -> None:
    """A VNN-LIB 1.0 property: is there an input in the box where another class has at least the logit of ``label``?

    ``x`` one sample (any shape, flattened as the graph's input is); ``radius`` r of the l2 ball around it. The box is
    |x′_i − x_i| ≤ r/√p, whose corners are on the sphere, within ``box`` if given. *sat* is a counterexample, *unsat* robust.

    Raises `InvalidParameterError` for a negative or infinite radius, or a label that is none of the classes.
    """
    radius = number(radius, "radius", "it must be finite and not negative", least=0.0)
    classes, label = count(classes, "the number of classes of a label", least=2), count(label, "label", least=0)
    if label >= classes:
        raise InvalidParameterError("label", label, f"there are {classes} classes")
    pixels = inputs_of(x, "the sample").detach().double().flatten()
    if not pixels.numel() or not bool(torch.isfinite(pixels).all()):
        raise ShapeError("the sample", "finite pixels", tuple(x.shape))
    half = radius / math.sqrt(len(pixels)) * (1.0 - INWARD)
    low, high = pixels - half, pixels + half
    if box is not None:
        low, high = low.clamp(min=box[0]), high.clamp(max=box[1])
    lines = [
        f"; Is class {label} left anywhere in this box? sat: yes, a counterexample. unsat: robust in the box.",
        f"; The box is the l-infinity one of half-width {half!r}, inscribed in the l2 ball of radius {radius!r}:",
        "; robust in the ball implies robust in the box, a counterexample in the box is one in the ball, not conversely.",
        *(f"(declare-const X_{i} Real)" for i in range(len(pixels))),
        *(f"(declare-const Y_{j} Real)" for j in range(classes)),
    ]
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_decimal(a)}))", f"(assert (<= X_{i} {_decimal(b)}))"]
    rivals = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    lines.append(f"(assert (or {rivals}))")
    with whole(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="ascii")


def _decimal(value: float) -> str:
    """A float exactly, as the standard wants numbers: digits and a point, no exponent."""
    return np.format_float_positional(value, trim="0", unique=True)


@isolated
def export_vnnlib(
    net: Network,
    folder: str | Path,
    data: Any,
    radius: float,
    *,
    samples: int | None = None,
    box: tuple[float, float] | None = None,
    timeout: int = 300,
) -> list[Path]:
    """A folder as VNN-COMP has it: ``network.onnx`` (`explicit`), ``property_k.vnnlib`` of each sample that is classified
    correctly, and ``instances.csv`` with them; returns the properties.

    ``data``: a map-style data set of (input, label); ``samples``: stop after so many properties. Raises `DataError` where no
    sample is classified correctly, `CheckpointError` for a network without feed-forward form, `ShapeError` where the output
    is no vector of logits, `NotFiniteError` for a sample that is not numbers, `InvalidParameterError` where another process
    that writes to the folder does not end.
    """
    model = explicit(net)
    with alone(folder, patient=True):
        return _export(net, model, Path(folder), data, radius, samples, box, timeout)


def _export(
    net: Network,
    model: onnx.ModelProto,
    target: Path,
    data: Any,
    radius: float,
    samples: int | None,
    box: tuple[float, float] | None,
    timeout: int,
) -> list[Path]:
    single = copy.deepcopy(net).cpu().float()
    written: list[Path] = []
    for k in range(len(data)):
        if len(written) == samples:
            break
        x, label = data[k]
        if bad := int((~torch.isfinite(x)).sum()):
            raise NotFiniteError("the data", bad, x.numel(), [k])
        with torch.no_grad():
            logits = single(x.unsqueeze(0).to("cpu", torch.float32))[0]
        if logits.dim() != 1:
            raise ShapeError("the output", "(B, classes)", ("B", *logits.shape), "A property is about classes.")
        if int(logits.argmax()) != int(label):
            continue  # wrong already: nothing to ask
        written.append(target / f"property_{k}.vnnlib")
        write_vnnlib(written[-1], x, int(label), len(logits), radius, box)
    if not written:
        raise DataError(
            "of properties", f"none of {len(data)} samples is classified correctly: there is nothing to ask"
        )
    with whole(target / "network.onnx") as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
    with whole(target / "instances.csv") as partial:
        partial.write_text("".join(f"network.onnx,{path.name},{timeout}\n" for path in written), encoding="ascii")
    return written
