"""Networks to files and back, and other people's weights files, none of them ever unpickled as code."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .activations import Activations, activation_module, activation_of, is_activation
from .errors import CheckpointError, LipconvertError, WeightsError
from .files import whole
from .glue import KNOWN
from .lben import LBEN
from .network import Network
from .registry import registry
from .schema import GlueEntry, Manifest, StageEntry

KEY = "lipconvert"
EXTRA = "_extra_state"
SUFFIX = ".safetensors"


def save(net: Network, path: str | Path) -> None:
    """Write a network as safetensors with a manifest (`lipconvert.schema.Manifest`) in its metadata.

    The file appears whole or not at all. ``path`` must end in ``.safetensors``.
    Raises `CheckpointError` for another suffix or for glue that cannot be rebuilt from numbers.
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise CheckpointError(str(target), "path", f"the suffix must be {SUFFIX}")
    if not isinstance(net, Network):
        raise CheckpointError(
            str(target), "net", f"a converted network is saved, not a {type(net).__name__}: convert it first"
        )
    entries: list[StageEntry | GlueEntry] = []
    for step in net.steps:
        entries.append(_stage_entry(step) if isinstance(step, LBEN) else _glue_entry(step, str(target)))
    if net.dtype not in (torch.float32, torch.float64):
        raise CheckpointError(str(target), "dtype", f"{net.dtype} is not written; only float32 and float64 are")
    manifest = Manifest(
        lipconvert_version=version("lipconvert"),
        input_shape=list(net.input_shape),
        dtype="float32" if net.dtype is torch.float32 else "float64",
        steps=entries,
    )
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in net.state_dict().items() if isinstance(value, Tensor)
    }
    try:
        with whole(target) as partial:
            save_file(tensors, partial, metadata={KEY: manifest.model_dump_json()})
    except SafetensorError as error:
        raise CheckpointError(str(target), "file", f"it cannot be written ({error})") from error


def load(path: str | Path) -> Network:
    """Read a network written by `save`: the same tensors bit for bit, the same dtype.

    Raises `CheckpointError` naming the tensor or manifest entry that is missing, misshapen, not finite or unknown.
    """
    name = str(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(name, "file", f"it cannot be read as safetensors ({error})") from error
    if text is None:
        raise CheckpointError(name, f"metadata {KEY!r}", "missing: this is not a lipconvert checkpoint")
    try:
        manifest = Manifest.model_validate(json.loads(text))
    except (json.JSONDecodeError, pydantic.ValidationError) as error:
        raise CheckpointError(name, f"metadata {KEY!r}", str(error)) from error
    dtype = getattr(torch, manifest.dtype)
    steps: list[nn.Module] = []
    for index, entry in enumerate(manifest.steps):
        if isinstance(entry, StageEntry):
            _require_sizes(entry, index, tensors, name)  # before anything of the size it claims is made
        try:
            steps.append(_stage(entry, dtype) if isinstance(entry, StageEntry) else _glue(entry))
        except (LipconvertError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(name, f"manifest step {index}", str(error)) from error
    try:
        net = Network(steps, [None] * len(steps), manifest.input_shape).to(dtype).eval()
    except (LipconvertError, TypeError, ValueError) as error:  # the constant of glue whose arguments make no sense
        raise CheckpointError(name, "manifest steps", str(error)) from error
    _fill(net, tensors, name)
    return net


def _require_sizes(entry: StageEntry, index: int, tensors: Mapping[str, Tensor], path: str) -> None:
    n, p, q = entry.states, entry.inputs, entry.outputs
    for key, sizes in (("U", (n, p)), ("G", (q, n)), ("V", (n, n)), ("S", (n, n))):
        found, shape = tensors.get(f"steps.{index}.{key}"), (*sizes, *entry.image)
        if found is None or tuple(found.shape) != shape:
            actual = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise CheckpointError(path, f"tensor 'steps.{index}.{key}'", f"{actual}, the manifest says {shape}")


def _fill(net: Network, tensors: Mapping[str, Tensor], path: str) -> None:
    wanted = {key: value for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    for key in sorted(wanted.keys() ^ tensors.keys()):
        raise CheckpointError(path, f"tensor {key!r}", "missing" if key in wanted else "unexpected")
    for key, value in tensors.items():
        if value.shape != wanted[key].shape or value.dtype != wanted[key].dtype:
            expected, actual = (f"{t.dtype} {tuple(t.shape)}" for t in (wanted[key], value))
            raise CheckpointError(path, f"tensor {key!r}", f"it is {actual}, the manifest says {expected}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(path, f"tensor {key!r}", "it holds NaN or infinity")
        with torch.no_grad():
            wanted[key].copy_(value)


def _stage_entry(stage: LBEN) -> StageEntry:
    return StageEntry(
        name=stage.name,
        inputs=stage.U.shape[1],
        states=len(stage.b_z),
        outputs=len(stage.b_y),
        lipschitz=stage.lipschitz,
        epsilon=stage.epsilon,
        activations=[(str(activation), size) for activation, size in stage.sigma],
        blocks=list(stage.blocks),
        image=list(stage.grid.image),
    )


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
        fill=False,
    )


_KINDS = {kind.__name__: kind for kind in KNOWN}


def _glue_entry(module: nn.Module, path: str) -> GlueEntry:
    if is_activation(module):
        return GlueEntry(type="Activation", arguments={"name": str(activation_of(module))})
    if type(module) not in KNOWN:
        kind = type(module).__name__
        raise CheckpointError(path, f"glue {kind}", "it is not the core's own, so a file cannot rebuild it")
    arguments: dict[str, Any] = {}
    for name in KNOWN[type(module)]:
        value = getattr(module, name)
        arguments[name] = value.tolist() if isinstance(value, Tensor) else value
        if isinstance(value, tuple):
            arguments[name] = list(value)
    return GlueEntry(type=type(module).__name__, arguments=arguments)


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


def read_weights(path: str | Path) -> dict[str, Any]:
    """The state dict in a ``.safetensors`` file or a torch file opened with ``weights_only=True``.

    Entries that hold a module's extra state (plain data) are kept.
    A nest such as ``{"model_state_dict": ...}`` or ``{"state_dict": ...}`` is opened; prefixes ``module.`` are stripped.
    Raises `WeightsError` for a file that is missing, is not a weights file, or would have to run code to be read.
    """
    name = str(path)
    if not Path(path).is_file():
        raise WeightsError(name, "there is no such file")
    if Path(path).suffix == SUFFIX:
        try:
            with safe_open(path, framework="pt") as file:
                found: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise WeightsError(name, f"it cannot be read as safetensors ({error})") from error
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # of a pickle protocol torch does not know, before it refuses
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            AssertionError,
            struct.error,
        ) as error:  # what torch's reader of untrusted pickles raises for bytes that are none
            raise WeightsError(
                name,
                f"it is not a file of plain weights ({type(error).__name__} while reading it). Files that would have to run "
                "code to be read are not opened: save a state_dict, or safetensors.",
            ) from error
    for nest in ("model_state_dict", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(nest), Mapping):
            found = found[nest]
            break
    if not isinstance(found, Mapping) or not found:
        raise WeightsError(name, f"it holds a {type(found).__name__}, not a state dict")
    # What a module keeps beside its tensors (L and ε of an LBEN) belongs to them; `weights_only` leaves only plain data.
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor) or str(k).endswith(EXTRA)}
    if not any(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(name, "there are no tensors in it")
    while all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
    plugin: str | None = None,
    path: str = "",
) -> nn.Module:
    """The model that some plugin recognises in a state dict; ``options`` supply what the tensors do not say.

    Raises `WeightsError` when no plugin does, `MissingOptionError`, `AmbiguousModelError`.
    """
    return registry().from_state_dict(state_dict, options or {}, plugin, path or "the state dict")[1]
