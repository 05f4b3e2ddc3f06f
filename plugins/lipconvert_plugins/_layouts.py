"""How other people's code names its tensors: what is in front of a name, the layers of a network, and what they must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    InvalidParameterError,
    NotFiniteError,
    PadChannels,
    ShapeError,
    WeightsError,
    activation_module,
    required_option,
)

from ._convolution import Front, image_size, whole

FILE = "the weights"
Layer = dict[str, Tensor]


class LayerSequence(nn.Sequential):
    """The layers of a public network in order, for inputs of ``input_shape``."""

    def __init__(self, layers: Iterable[nn.Module], input_shape: tuple[int, ...]) -> None:
        super().__init__(*layers)
        self.input_shape = input_shape


def unwrapped(state_dict: Mapping[str, Any], anchor: str = "") -> dict[str, Any]:
    """The tensors without what all their names begin with (``module.``, ``model.``, ...), and without what is in front of
    ``anchor`` (``mon.linear_module.`` in front of ``A.weight``); empty where two would then have one name."""
    tensors = dict(state_dict)
    while len(tensors) > 1 and len({key.split(".")[0] for key in tensors}) == 1 and all("." in key for key in tensors):
        tensors = {key.split(".", 1)[1]: value for key, value in tensors.items()}
    prefix = next((key.removesuffix(anchor) for key in tensors if anchor and f".{key}".endswith(f".{anchor}")), "")
    found = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return found if len(found) == len(tensors) else {}


def layers_of(state_dict: Mapping[str, Any]) -> dict[str, Layer]:
    """The tensors of each layer by path, in the order of the numbers in the paths: a file may be sorted by text."""
    found: dict[str, Layer] = {}
    for key, value in state_dict.items():
        path, _, name = key.replace("parametrizations.weight.original", "weight").rpartition(".")
        if isinstance(value, Tensor):
            found.setdefault(path, {})[name] = value
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def tensor(layer: Layer, path: str, *names: str) -> Tensor:
    """The tensor of a layer under one of its names; raises `WeightsError` where it is missing or there are two of them,
    `NotFiniteError` for NaN and infinity."""
    found = [name for name in names if name in layer]
    if len(found) != 1:
        wanted = " or ".join(repr(dotted(path, name)) for name in names)
        raise WeightsError(
            FILE, f"{wanted} is missing" if not found else f"{wanted}: one of them is expected, not both"
        )
    value = layer[found[0]]
    if bad := int((~torch.isfinite(value)).sum()):
        raise NotFiniteError(f"tensor {dotted(path, found[0])!r}", bad, value.numel())
    return value


def vector(layer: Layer, path: str, name: str, size: int) -> Tensor:
    """A tensor of so many numbers, (size,), whatever dimensions of 1 it is kept with."""
    value = tensor(layer, path, name)
    if value.numel() != size or max(value.shape, default=1) != size:
        raise ShapeError(f"tensor {dotted(path, name)!r}", f"({size},)", tuple(value.shape))
    return value.reshape(size)


def dotted(path: str, name: str) -> str:
    """The name of a tensor in its file."""
    return f"{path}.{name}" if path else name


def require_shape(value: Tensor, path: str, expected: tuple[int, ...]) -> None:
    """Raises `ShapeError` for a tensor of another shape."""
    if tuple(value.shape) != expected:
        raise ShapeError(f"tensor {path!r}", expected, tuple(value.shape))


def fill(layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The layer itself, with these tensors as its parameters, in the dtype of the first."""
    layer.to(next(iter(values.values())).dtype).load_state_dict(dict(values))
    return layer


def diagonal_of(tensors: Mapping[str, Tensor], names: set[str], plugin: str) -> str:
    """``psi`` or ``Lambda``, whichever stands beside tensors of these names (Revay et al.); "" if it is another layout.

    Raises `WeightsError` where only one of the names is missing, or where both diagonals are there.
    """
    found = {"psi", "Lambda"} & set(tensors)
    missing = names - set(tensors)
    if not found or len(missing) > 1 or set(tensors) - found - names:
        return ""
    if missing:
        raise WeightsError(FILE, f"these look like {plugin} weights, but {missing.pop()!r} is missing")
    if len(found) > 1:
        raise WeightsError(FILE, "both 'psi' (log Ψ) and 'Lambda' are there: delete the one that is not in use")
    return found.pop()


def log_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """log of a diagonal; raises `InvalidParameterError` unless it is positive."""
    if not bool((tensors[name] > 0).all()):
        raise InvalidParameterError(f"the least entry of {name!r}", float(tensors[name].min()), "it must be positive")
    return tensors[name].log()


def split_head(layers: dict[str, Layer]) -> tuple[dict[str, Layer], nn.Linear | None]:
    """The other layers and the one of ``weight`` and ``bias`` alone, with its rows normalised (None: there is none).

    A head of this kind (last-layer normalisation) has rows of norm 1 and need not be 1-Lipschitz: its norm enters L.
    """
    # layers of other kinds have more tensors, or (where one is missing) a bias that is kept as (1, n)
    heads = [
        path
        for path, layer in layers.items()
        if set(layer) <= {"weight", "bias"} and layer.get("bias", torch.empty(0)).dim() == 1
    ]
    if len(heads) != 1 or len(layers) < 2:
        return layers, None
    path, layer = heads[0], layers[heads[0]]
    weight = tensor(layer, path, "weight")
    if weight.dim() != 2:
        raise ShapeError(f"tensor {dotted(path, 'weight')!r}", "(classes, features)", tuple(weight.shape))
    bias = vector(layer, path, "bias", len(weight))
    head = nn.Linear(weight.shape[1], len(weight))
    fill(head, {"weight": functional.normalize(weight, dim=1), "bias": bias})
    return {key: value for key, value in layers.items() if key != path}, head


def asked_activation(options: Mapping[str, Any], plugin: str) -> Callable[[], nn.Module]:
    """The option ``activation``, as a new module at each call."""
    value = required_option(options, "activation", plugin, "relu, tanh, leaky_relu(0.1), ...")
    activation_module(value)
    return lambda: activation_module(value)


def asked_padding(options: Mapping[str, Any], plugin: str) -> str:
    """The option ``padding_mode``: ``circular`` (Havens et al.) or ``zeros`` (most other code)."""
    return str(required_option(options, "padding_mode", plugin, "circular or zeros: what is around an image"))


def asked_front(options: Mapping[str, Any], plugin: str, channels: int, depth: int) -> tuple[Front, list[nn.Module]]:
    """The front of a network of ``depth`` convolutions that keep their channels, and the padding to these."""
    image = required_option(options, "image", plugin, "height and width of the input: 32, or 28x20", image_size)
    inputs = required_option(options, "in_channels", plugin, "channels of the input", whole)
    meaning = "window of the mean pooling before the dense layers, 1 for none"
    pool = required_option(options, "pool", plugin, meaning, whole)
    if inputs > channels:
        raise InvalidParameterError("option 'in_channels'", inputs, f"the convolutions have {channels} channels")
    front = Front(None, image, channels, channels, depth, pool)
    front.input_shape = (inputs, *front.input_shape[1:])
    return front, [PadChannels(channels)] * (inputs < channels)
