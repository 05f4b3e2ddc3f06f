"""Other people's weights files, none of them ever unpickled as code, and the models that plugins recognise in them."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import WeightsError
from ..foundation.arguments import isolated
from .registry import registry

EXTRA = "_extra_state"
# Under which of these names a training script keeps the state dict, beside its epoch and optimiser.
NESTS = ("model_state_dict", "state_dict", "model", "backbone")


def opened(path: str | Path) -> Any:
    """What a torch file holds, tensors and plain data, on the CPU; raises `WeightsError` for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle protocol torch does not know, before it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
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
            str(path),
            f"it is not a file of plain weights ({type(error).__name__} while reading it). Files that would have to run "
            "code to be read are not opened: save a state_dict, or safetensors.",
        ) from error


@isolated
def read_weights(path: str | Path) -> dict[str, Any]:
    """The state dict in a ``.safetensors`` file or a torch file opened with ``weights_only=True``.

    Entries that hold a module's extra state (plain data) are kept.
    A nest such as ``{"model_state_dict": ...}``, ``state_dict``, ``model`` or ``backbone`` is opened; prefixes ``module.``
    are stripped.
    Raises `WeightsError` for a file that is missing, is not a weights file, or would have to run code to be read.
    """
    name = str(path)
    if not Path(path).is_file():
        raise WeightsError(name, "there is no such file")
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                found: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise WeightsError(name, f"it cannot be read as safetensors ({error})") from error
    else:
        found = opened(path)
    for nest in NESTS:
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


@isolated
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
