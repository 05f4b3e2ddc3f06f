"""What convolutional layers of several architectures share: their arguments, and their operator as matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lipconvert import InvalidParameterError, MeanPool, ShapeError, UnsupportedModuleError, count, required_option

PADDING = ("circular", "zeros")


def kernel_shape(kernel_size: int | tuple[int, int], padding_mode: str = "circular") -> tuple[int, int]:
    """(kh, kw); raises `InvalidParameterError` for sizes below 1 or an unknown padding mode."""
    given = tuple(kernel_size) if isinstance(kernel_size, tuple | list) else (kernel_size, kernel_size)
    if len(given) != 2:
        raise InvalidParameterError("kernel_size", kernel_size, "it must be one size or two")
    kh, kw = (count(size, "kernel_size") for size in given)
    if padding_mode not in PADDING:
        raise InvalidParameterError("padding_mode", repr(padding_mode), f"it must be one of {', '.join(PADDING)}")
    return kh, kw


def image_of(layer: nn.Module, input_shape: tuple[int, ...] | None, stride: int = 1) -> tuple[int, int]:
    """(h, w) of the images a layer is given; raises `ShapeError` where they are not known, not images, or not multiples of
    its stride."""
    if input_shape is None or len(input_shape) != 3:
        found = "unknown" if input_shape is None else input_shape
        raise ShapeError(f"the input of {type(layer).__name__}", "(c, h, w)", found, "Give input_shape=(c, h, w).")
    h, w = input_shape[1:]
    if h % stride or w % stride:
        raise ShapeError(f"the input of {type(layer).__name__}", f"(c, h, w), multiples of {stride}", input_shape)
    return h, w


def require_circular(layer: nn.Module, padding_mode: str, dense: bool) -> None:
    """Raises `UnsupportedModuleError` for zero padding, unless a dense form is asked for."""
    if padding_mode != "circular" and not dense:
        raise UnsupportedModuleError(
            "",
            type(layer).__name__,
            f'its padding_mode is "{padding_mode}". Only circular padding turns into one small matrix for each frequency. '
            "Train with circular padding, or, for small images, convert(model, dense=True) on flattened images.",
        )


class Front:
    """The convolutional half of a network, or nothing: what stands between the input and the first dense layer.

    Exactly one of ``inputs`` (flat) and ``image`` (h = w, or (h, w)) is given. ``input_shape`` of the network; ``widths``:
    (in, out) channels of each convolution; ``features`` that reach the dense layers after pooling by ``pool``.
    Raises `InvalidParameterError` and, where ``pool`` does not divide the image, `ShapeError`.
    """

    def __init__(
        self,
        inputs: int | None,
        image: int | tuple[int, int] | None,
        in_channels: int,
        channels: int,
        conv_depth: int,
        pool: int,
    ) -> None:
        if inputs is not None and image is None:
            self.input_shape: tuple[int, ...] = (inputs,)
            self.features, self.widths, self.pool = inputs, list[tuple[int, int]](), 0
        elif image is not None and inputs is None:
            h, w = (image, image) if isinstance(image, int) else image
            if pool < 1 or h % pool or w % pool:
                raise ShapeError("the image", f"(h, w), multiples of pool = {pool}", (h, w))
            self.input_shape = (in_channels, h, w)
            self.widths = [(channels if k else in_channels, channels) for k in range(conv_depth)]
            self.features = (channels if conv_depth else in_channels) * (h // pool) * (w // pool)
            self.pool = pool
        else:
            raise InvalidParameterError("inputs, image", (inputs, image), "exactly one of them says what the input is")

    def joint(self) -> Iterator[tuple[str, nn.Module]]:
        """Pooling and flattening, by name, between convolutions and dense layers."""
        if self.pool > 1:
            yield "pool", MeanPool(self.pool)
        if self.pool:
            yield "flatten", nn.Flatten()


def small_images(image: tuple[int, int, int]) -> dict[str, Any]:
    """The arguments of a small network for images (c, h, w): what the plugins offer as a new model."""
    c, h, w = image
    pool = 2 if h % 2 == 0 and w % 2 == 0 else 1
    sizes = {"in_channels": c, "channels": max(8, c), "conv_depth": 2, "pool": pool, "dense_depth": 1}
    return {"image": (h, w), **sizes}


def whole(value: object) -> int:
    """A positive whole number, as text too."""
    number = int(str(value))
    if number < 1:
        raise ValueError(value)
    return number


def image_size(value: object) -> tuple[int, int]:
    """(h, w) from 32, "32", "28x20" or (28, 20)."""
    sizes = [whole(part) for part in str(value).strip("()").replace(",", "x").split("x")]
    if len(sizes) > 2:
        raise ValueError(value)
    return sizes[0], sizes[-1]


def front_arguments(
    state_dict: Mapping[str, Tensor], options: Mapping[str, Any], plugin: str, convolutions: int
) -> dict[str, Any]:
    """The arguments of a `Front` and ``conv_depth`` from a network's tensors and, for what they do not say, options."""
    if not convolutions:
        return {}
    needed: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "image": ("height and width of the input: 32, or 28x20", image_size),
        "in_channels": ("channels of the input", whole),
        "pool": ("window of the mean pooling before the dense layers, 1 for none", whole),
    }
    given = {name: required_option(options, name, plugin, *needed[name]) for name in needed}
    kernel = state_dict["conv0.weight"].shape
    if len(kernel) != 4:
        raise ShapeError("tensor 'conv0.weight'", "(out, in, k, k)", tuple(kernel))
    return {
        **given,
        "conv_depth": convolutions,
        "kernel_size": (kernel[2], kernel[3]),
    }


def split_layers(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[int, int] | None:
    """How many layers ``conv0``, ``conv1``, ... and ``prefix0``, ... a network has; None if there are others."""
    layers = {key.split(".")[0] for key in state_dict}
    dense = sum(key.startswith(prefix) for key in layers)
    convolutions = len(layers) - dense
    expected = {f"{prefix}{k}" for k in range(dense)} | {f"conv{k}" for k in range(convolutions)}
    return (convolutions, dense) if dense and layers == expected else None
