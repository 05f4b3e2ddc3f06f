"""What a manifest describes, made without a number: a network whose stages are on the device "meta".

Whatever a file says of sizes is compared here, before anything of these sizes is read or made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dae.activations import Activations, activation_module
from ..errors import CheckpointError, LipconvertError
from ..foundation.arguments import default_dtype
from ..networks.glue import KNOWN
from ..networks.lben import LBEN
from ..networks.network import Network
from .documents import GlueEntry, Manifest, StageEntry

# Values of one sample between steps: ten times those of any network here.
MOST_VALUES = 10**7

# Tensors of a stage beside its parameters, and of the whole network.
DERIVED, PAIRS, ERRORS = ("W", "multiplier", "metric"), "pairs", "errors"

Shapes = Mapping[str, tuple[int, ...]]


def skeleton(manifest: Manifest, name: str) -> Network:
    """The network with stages of the right sizes and no numbers; ``name`` is that of the file.

    Raises `CheckpointError` where steps do not fit together, where the tensors of the manifest are not those that the steps
    take, in name, dtype and shape, and for class names that are not as many as the outputs.
    """
    dtype = getattr(torch, manifest.dtype)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in manifest.tensors:
        if tensor.name in shapes:
            raise CheckpointError(name, f"tensor {tensor.name!r}", "the manifest has it twice")
        shapes[tensor.name] = tuple(tensor.shape)
    steps: list[nn.Module] = []
    for index, entry in enumerate(manifest.steps):
        if isinstance(entry, StageEntry):
            _require_sizes(entry, index, shapes, name)
        try:
            with default_dtype(torch.float64):  # of numbers of glue, which are cast with the network
                steps.append(_stage(entry, dtype) if isinstance(entry, StageEntry) else _glue(entry))
        except (LipconvertError, ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(name, f"manifest step {index}", str(error)) from error
    try:
        net = Network(steps, [None] * len(steps), manifest.input_shape).to(dtype).eval()
    except (LipconvertError, ArithmeticError, TypeError, ValueError) as error:  # of glue whose arguments make no sense
        raise CheckpointError(name, "manifest steps", str(error)) from error
    outputs = math.prod(_output_shape(net, name))
    _require_tensors(net, manifest, shapes, outputs, name)
    if manifest.class_names and len(manifest.class_names) != outputs:
        reason = f"there are {len(manifest.class_names)}, and {outputs} outputs"
        raise CheckpointError(name, "class_names", reason)
    return net


def _require_sizes(entry: StageEntry, index: int, shapes: Shapes, path: str) -> None:
    """The tensors of a stage are of the sizes that it claims, and lists about its states are no longer than those."""
    n, p, q = entry.states, entry.inputs, entry.outputs
    for key, sizes in (("U", (n, p)), ("G", (q, n)), ("V", (n, n)), ("S", (n, n))):
        found, shape = shapes.get(f"steps.{index}.{key}"), (*sizes, *entry.image)
        if found != shape:
            actual = "missing" if found is None else f"of shape {found}"
            raise CheckpointError(path, f"tensor 'steps.{index}.{key}'", f"{actual}, the manifest says {shape}")
    W = shapes.get(f"steps.{index}.W")
    taps = () if W is None else W[2:]
    fits = W is not None and W[:2] == (n, n) and len(taps) == len(entry.image) == len(entry.origin)
    # the taps of W are no more than the image has, and the one in place is among them
    if not fits or any(
        not 0 < k <= size or not -k < o <= 0 for k, size, o in zip(taps, entry.image, entry.origin, strict=True)
    ):
        actual = "missing" if W is None else f"of shape {W} from {entry.origin}"
        wanted = f"({n}, {n}) and windows of {entry.image}" if entry.image else f"({n}, {n})"
        raise CheckpointError(path, f"tensor 'steps.{index}.W'", f"{actual}, the manifest says {wanted}")
    for what, parts in (("blocks", entry.blocks), ("activations", [size for _, size in entry.activations])):
        if sum(parts) != n or min(parts) < 1:
            reason = (
                f"the {what} are {len(parts)} groups of {sum(parts)} states in all: they must be positive and make {n}"
            )
            raise CheckpointError(path, f"manifest step {index}", reason)


def _output_shape(net: Network, path: str) -> tuple[int, ...]:
    """Of one sample, where every step takes what the one before gives; nothing of these sizes is made."""
    shape = net.input_shape
    for index, step in enumerate(net.steps):
        where = f"manifest step {index}"
        if isinstance(step, LBEN):
            if shape != step.input_shape:
                raise CheckpointError(
                    path, where, f"its input is {step.input_shape}, and what comes before gives {shape}"
                )
            shape = (len(step.b_y), *step.grid.image)
            continue
        try:
            like = next(iter(step.buffers()), torch.zeros((), dtype=torch.float32, device="cpu"))
            shape = tuple(copy.deepcopy(step).to("meta")(torch.zeros(2, *shape, dtype=like.dtype, device="meta")).shape)
            if shape[:1] != (2,):
                raise ValueError("it mixes the samples of a batch")
            shape = shape[1:]
        except (LipconvertError, ArithmeticError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(path, where, f"it does not take inputs of {shape}: {error}") from error
        if math.prod(shape) > MOST_VALUES:
            raise CheckpointError(path, where, f"its output would be {shape}")
    return shape


def _require_tensors(net: Network, manifest: Manifest, shapes: Shapes, outputs: int, path: str) -> None:
    """The tensors that the manifest lists are those of the network, and what was derived or proved of it, in their sizes."""
    wanted = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    sizes = {key: tuple(value.shape) for key, value in wanted.items()}
    kinds = {key: value.dtype for key, value in wanted.items()}
    for index, step in enumerate(net.steps):
        if isinstance(step, LBEN):
            sizes[f"steps.{index}.W"] = shapes[f"steps.{index}.W"]
            kinds[f"steps.{index}.W"] = step.b_z.dtype  # the graph runs it with the others
            sizes |= {f"steps.{index}.{key}": (len(step.b_z),) for key in ("multiplier", "metric")}
    sizes |= {PAIRS: (outputs, outputs), ERRORS: (2, outputs, outputs)}
    for entry in manifest.tensors:
        where, kind = f"tensor {entry.name!r}", getattr(torch, entry.dtype)
        if entry.name not in sizes:
            raise CheckpointError(path, where, "unexpected: no step of the manifest has it")
        if sizes[entry.name] != shapes[entry.name]:
            raise CheckpointError(path, where, f"it is {shapes[entry.name]}, the steps make it {sizes[entry.name]}")
        if kinds.get(entry.name, kind) is not kind:
            raise CheckpointError(path, where, f"it is {kind}, the network is in {kinds[entry.name]}")
    for key in sorted(wanted.keys() - shapes.keys()):
        raise CheckpointError(path, f"tensor {key!r}", "missing")


def _stage(entry: StageEntry, dtype: torch.dtype) -> LBEN:
    return LBEN(
        entry.inputs,
        entry.states,
        entry.outputs,
        lipschitz=entry.lipschitz,
        epsilon=entry.epsilon,
        activation=Activations.of((name, size) for name, size in entry.activations),
        blocks=entry.blocks,
        name=entry.name,
        image=entry.image,
        dtype=dtype,
        device=torch.device("meta"),
        fill=False,
    )


_KINDS = {kind.__name__: kind for kind in KNOWN}


def _glue(entry: GlueEntry) -> nn.Module:
    arguments: dict[str, Any] = dict(entry.arguments)
    if entry.type == "Activation" and set(arguments) == {"name"}:
        return activation_module(str(arguments["name"]))
    if entry.type not in _KINDS:
        raise ValueError(f"unknown glue {entry.type!r}")
    kind = _KINDS[entry.type]
    if set(arguments) != set(KNOWN[kind]):
        raise ValueError(f"{entry.type} needs the arguments {sorted(KNOWN[kind])}, not {sorted(arguments)}")
    return kind(
        **{name: tuple(v) if kind is nn.Unflatten and isinstance(v, list) else v for name, v in arguments.items()}
    )
