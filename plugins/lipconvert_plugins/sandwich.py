"""Sandwich layers (Wang & Manchester 2023): √2 A′Φσ(√2 Φ⁻¹Bx + b), [A B] from a Cayley transform (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    Activations,
    Grid,
    InvalidParameterError,
    PluginInfo,
    ShapeError,
    WeightsError,
    activation_module,
    activation_of,
    affine,
    computes_as,
    full_precision,
    hookimpl,
    number,
    pixel_unshuffle,
    required_option,
)

from ._convolution import (
    Front,
    front_arguments,
    image_of,
    image_size,
    kernel_shape,
    small_images,
    split_layers,
    whole,
)
from ._layouts import (
    FILE,
    Layer,
    LayerSequence,
    asked_activation,
    dotted,
    fill,
    layers_of,
    require_shape,
    split_head,
    tensor,
    vector,
)
from ._orthogonal import cayley


def _pair(weight: Tensor, alpha: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """A (out, out) and B (out, in), AA′ + BB′ = I, from ``weight`` at norm ``alpha``; for each frequency of a grid."""
    size = torch.linalg.vector_norm(weight)
    matrices = grid.convolution(alpha / torch.where(size > 0, size, torch.ones_like(size)) * weight)
    Q = cayley(matrices.mH)
    out = len(weight)
    return Q[..., :out, :].mH, Q[..., out:, :].mH


class SandwichLinear(nn.Module):
    """x → √2 A′Φσ(√2 Φ⁻¹B·scale·x + b), or x → scale·Bx + b without activation; Lipschitz constant ``scale``.

    ``SandwichLinear(in_features, out_features, bias=True, activation=None, scale=1.0)``; without activation it is the linear
    last layer of a network. AA′ + BB′ = I from the Cayley transform of ``weight`` (out, out + in), rescaled to
    Frobenius norm ``alpha``; Φ = exp(``psi``) > 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        scale = number(scale, "scale", "it is the layer's Lipschitz constant, which must be positive", above=0.0)
        self.in_features, self.out_features, self.scale = in_features, out_features, float(scale)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, out_features + in_features))
        nn.init.xavier_normal_(self.weight)
        self.alpha = nn.Parameter(torch.linalg.vector_norm(self.weight.detach()))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if activation is not None:
            self.psi = nn.Parameter(torch.zeros(out_features))

    def AB(self) -> tuple[Tensor, Tensor]:
        """A (out, out) and B (out, in) with AA′ + BB′ = I."""
        return _pair(self.weight, self.alpha, Grid())

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        A, B = self.AB()
        if self.activation is None:
            return functional.linear(x, self.scale * B, self.bias)
        phi = self.psi.exp()
        v = functional.linear(x, 2.0**0.5 * self.scale * B / phi.unsqueeze(-1), self.bias)
        return functional.linear(self.activation(v), 2.0**0.5 * A.mT * phi)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"


class SandwichConv2d(nn.Module):
    """The same layer with circular convolutions, (B, in_channels, h, w) → (B, out_channels, h/stride, w/stride).

    ``SandwichConv2d(in_channels, out_channels, kernel_size, stride=1, bias=True, activation=None, scale=1.0)``, ReLU where no
    activation is given. The
    Cayley transform is taken for each frequency of the image at hand: its kernels are as large as the image, and the layer
    depends on its size. ``weight`` (out, out + in·stride², k, k); with a stride it acts behind ``PixelUnshuffle(stride)``, so
    that k counts coarse pixels. Φ = exp(``psi``) per channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        bias: bool = True,
        activation: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        scale = number(scale, "scale", "it is the layer's Lipschitz constant, which must be positive", above=0.0)
        if stride < 1:
            raise InvalidParameterError("stride", stride, "it must be at least 1")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.scale = int(stride), float(scale)
        self.activation = nn.ReLU() if activation is None else activation
        width = out_channels + in_channels * self.stride**2
        self.weight = nn.Parameter(torch.empty(out_channels, width, *kernel_shape(kernel_size)))
        nn.init.xavier_normal_(self.weight)
        self.alpha = nn.Parameter(torch.linalg.vector_norm(self.weight.detach()))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.psi = nn.Parameter(torch.zeros(out_channels))

    def AB(self, image: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A (F, out, out) and B (F, out, in·stride²) with AA′ + BB′ = I on (coarse) images of a size."""
        return _pair(self.weight, self.alpha, Grid(image))

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.stride or x.shape[3] % self.stride:
            expected = f"(B, {self.in_channels}, h, w), h and w multiples of {self.stride}"
            raise ShapeError("the input of SandwichConv2d", expected, tuple(x.shape))
        x = pixel_unshuffle(x, self.stride)
        grid = Grid(tuple(x.shape[2:]))
        A, B = self.AB((x.shape[2], x.shape[3]))
        phi = self.psi.exp()
        bias = torch.zeros_like(phi) if self.bias is None else self.bias
        v = grid.affine(2.0**0.5 * self.scale * B / phi.unsqueeze(-1), grid.coordinates(x), bias)
        s = self.activation(grid.values(v))
        return grid.values(grid.apply(2.0**0.5 * A.mH * phi, grid.coordinates(s)))

    def extra_repr(self) -> str:
        kernel = "x".join(map(str, self.weight.shape[2:]))
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={kernel}, stride={self.stride}, scale={self.scale:g}"
        )


class SandwichNetwork(nn.Sequential):
    """``dense_depth`` sandwich layers and a linear one, of prescribed Lipschitz constant L: √L in front, √L behind.

    With ``image`` (h = w, or (h, w)) in place of ``inputs``, first ``conv_depth`` SandwichConv2d of ``channels`` channels,
    `MeanPool` by ``pool``, and ``Flatten``.
    """

    def __init__(
        self,
        *,
        inputs: int | None = None,
        classes: int = 10,
        image: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        channels: int = 8,
        conv_depth: int = 2,
        kernel_size: int | tuple[int, int] = 3,
        pool: int = 4,
        features: int | None = None,
        dense_depth: int = 2,
        lipschitz: float = 1.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        lipschitz = number(lipschitz, "lipschitz", "a prescribed constant must be positive", above=0.0)
        front = Front(inputs, image, in_channels, channels, conv_depth, pool)
        self.input_shape = front.input_shape
        widths = [front.features, *[front.features if features is None else features] * dense_depth, classes]
        root = lipschitz**0.5
        for k, (before, after) in enumerate(front.widths):
            scale = root if k == 0 else 1.0
            self.add_module(f"conv{k}", SandwichConv2d(before, after, kernel_size, activation=activation, scale=scale))
        for name, module in front.joint():
            self.add_module(name, module)
        for k in range(dense_depth + 1):
            last, first = k == dense_depth, k == 0 and not front.widths
            act = None if last else (nn.ReLU() if activation is None else activation)
            scale = (root if first else 1.0) * (root if last else 1.0)
            self.add_module(f"sandwich{k}", SandwichLinear(widths[k], widths[k + 1], activation=act, scale=scale))


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None) -> DAE | None:
    """With an activation: U = √2·scale·Φ⁻¹B, G = √2A′Φ, Λ = Φ²/scale, for which H = 0; a chain is (22) (FORMULAS 1.3)."""
    grid = Grid()
    if computes_as(model, SandwichLinear):
        A, B = model.AB()
        if model.activation is None:
            return affine(model.scale * B, model.bias, lipschitz=model.scale)
        activation = activation_of(model.activation)
    elif computes_as(model, SandwichConv2d):
        h, w = image_of(model, input_shape, model.stride)
        grid = Grid((h // model.stride, w // model.stride))
        A, B = model.AB((h // model.stride, w // model.stride))
        activation = activation_of(model.activation)
    else:
        return None
    phi, n = model.psi.exp(), len(model.psi)
    return DAE(
        W=A.new_zeros(*grid.batch, n, n),
        U=2.0**0.5 * model.scale * B / phi.unsqueeze(-1),
        G=2.0**0.5 * A.mH * phi,
        Lambda=phi**2 / model.scale,
        b_z=model.bias,
        activations=Activations(activation, n),
        lipschitz=model.scale,
        V=A.new_zeros(*grid.batch, 0, n),
        grid=grid,
    )


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or that of Wang & Manchester's code: ``weight`` = [A B] before the Cayley transform, ``alpha``,
    ``psi``, ``bias``; a last layer without ``psi`` is linear, or one of ``weight`` and ``bias`` has normalised rows.

    √γ stands before the first and the last sandwich layer (``lipschitz`` = γ; the file cannot tell that it is wrong). A kept
    transform ``Q`` is compared with that of ``weight``. The norm of a convolution is that of its half spectrum on the
    images it was made on, which are square; strides are told from the channels.
    """
    layers = split_layers(state_dict, "sandwich")
    if layers is None or "sandwich0.alpha" not in state_dict:
        return _from_layers(state_dict, options)
    convolutions, depth = layers
    arguments = front_arguments(state_dict, options, "sandwich", convolutions)
    shapes = [tuple(state_dict[f"sandwich{k}.weight"].shape) for k in range(depth)]
    if convolutions:
        arguments["channels"] = len(state_dict["conv0.weight"])
    else:
        arguments["inputs"] = shapes[0][1] - shapes[0][0]
    model = SandwichNetwork(
        **arguments,
        classes=shapes[-1][0],
        features=shapes[0][0],
        dense_depth=depth - 1,
        lipschitz=required_option(options, "lipschitz", "sandwich", "the prescribed constant γ of the network", float),
        activation=activation_module(
            required_option(options, "activation", "sandwich", "relu, tanh, leaky_relu(0.1), ...")
        ),
    ).to(state_dict["sandwich0.weight"].dtype)
    model.load_state_dict(state_dict)
    return model


TRANSFORMS = {"Q", "Qfft", "shift_matrix"}  # what a forward pass leaves behind


def _from_layers(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """A network from the public layout, None if no layer has ``psi`` beside ``weight``."""
    layers = layers_of(state_dict)
    names = {name for layer in layers.values() for name in layer}
    known = {"weight", "alpha", "psi", "bias"} | TRANSFORMS
    if names - known or not any({"weight", "psi"} <= set(layer) for layer in layers.values()):
        return None
    layers, head = split_head(layers)
    biased = any("bias" in layer for layer in layers.values())
    for path, layer in layers.items():
        weight = tensor(layer, path, "weight")
        if biased:
            vector(layer, path, "bias", len(weight))
        if weight.dim() not in (2, 4):
            raise ShapeError(
                f"tensor {dotted(path, 'weight')!r}", "(out, out + in) or with (k, k)", tuple(weight.shape)
            )
        if "alpha" not in layer:
            reason = "is missing. Convolutions have it only after a first forward pass: save the weights then"
            raise WeightsError(FILE, f"{dotted(path, 'alpha')!r} {reason}")
    last = next(reversed(layers))
    linear = [path for path, layer in layers.items() if "psi" not in layer]
    if linear != ([last] if head is None else []) or layers[last]["weight"].dim() != 2:
        missing = next((path for path in linear if path != last or head is not None), last)
        reason = f"{dotted(missing, 'psi')!r} is missing" if missing in linear else "its last layer is not linear"
        raise WeightsError(FILE, f"{reason}: only the last layer of a sandwich network, a dense one, is without psi")
    activation = asked_activation(options, "sandwich")
    gamma = required_option(options, "lipschitz", "sandwich", "the prescribed constant γ of the network", float)
    if not 0.0 < gamma < float("inf"):
        raise InvalidParameterError("option 'lipschitz'", gamma, "γ must be positive")
    first = next(iter(layers.values()))["weight"]
    width, image = first.shape[1] - first.shape[0], (0, 0)
    if first.dim() == 4:
        image = required_option(options, "image", "sandwich", "height and width of the input: 32", image_size)
        width = required_option(options, "in_channels", "sandwich", "channels of the input", whole)
        if image[0] != image[1]:
            raise InvalidParameterError("option 'image'", image, "the public convolutions are for square images")
    shape = (width, *image) if first.dim() == 4 else (width,)
    modules: list[nn.Module] = []
    for k, (path, layer) in enumerate(layers.items()):
        scale = (gamma**0.5 if k == 0 else 1.0) * (gamma**0.5 if path == last else 1.0)
        weight = tensor(layer, path, "weight")
        if weight.dim() == 2 and image[0]:
            modules.append(nn.Flatten())
            width, image = width * image[0] * image[1], (0, 0)
        if weight.dim() == 4 and image[0]:
            module, image = _convolution(layer, path, width, image, activation(), scale)
        else:
            module = _dense(layer, path, width, activation() if "psi" in layer else None, scale)
        modules.append(module)
        width = len(weight)
    if head is not None:
        if head.in_features == width + head.out_features:
            raise WeightsError(FILE, "'alpha' of the last layer is missing")
        require_shape(head.weight, "the head", (head.out_features, width))
        modules.append(head)
    return LayerSequence(modules, shape)


def _values(layer: Layer, path: str) -> dict[str, Tensor]:
    out = len(layer["weight"])
    names = [name for name in ("bias", "psi") if name in layer]
    return {"weight": layer["weight"], "alpha": vector(layer, path, "alpha", 1).reshape(())} | {
        name: vector(layer, path, name, out) for name in names
    }


def _dense(layer: Layer, path: str, width: int, activation: nn.Module | None, scale: float) -> nn.Module:
    """One dense layer of the public layout."""
    weight = layer["weight"]
    require_shape(weight, dotted(path, "weight"), (len(weight), len(weight) + width))
    module = SandwichLinear(width, len(weight), "bias" in layer, activation, scale)
    fill(module, _values(layer, path))
    if "Q" in layer:
        Q = torch.cat(module.AB(), 1).detach()
        require_shape(layer["Q"], dotted(path, "Q"), tuple(Q.shape))
        if not (gap := float((layer["Q"] - Q).abs().max())) <= 10.0 * torch.finfo(weight.dtype).eps ** 0.5:
            reason = f"is not the Cayley transform of weight and alpha (largest difference {gap:.1e}): it is of other weights"
            raise WeightsError(FILE, f"{dotted(path, 'Q')!r} {reason}")
    return module


def _convolution(
    layer: Layer, path: str, width: int, image: tuple[int, int], activation: nn.Module, scale: float
) -> tuple[nn.Module, tuple[int, int]]:
    """One convolution of the public layout, for images of a size, and the size of what it returns."""
    weight = layer["weight"]
    out, kernel = len(weight), (weight.shape[2], weight.shape[3])
    stride = 2 if weight.shape[1] == out + 4 * width else 1
    require_shape(weight, dotted(path, "weight"), (out, out + stride**2 * width, *kernel))
    if image[0] % stride:
        raise ShapeError("the image", f"(h, w), multiples of {stride} at {path!r}", image)
    image = (image[0] // stride, image[1] // stride)
    if max(kernel) > image[0]:
        raise ShapeError(f"tensor {dotted(path, 'weight')!r}", f"a kernel within the image {image}", kernel)
    values = _values(layer, path)
    half = Grid(image).convolution(weight)  # the public code normalises these, we the kernel
    values["alpha"] = values["alpha"] * torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(half)
    module = SandwichConv2d(width, out, kernel, stride, "bias" in layer, activation, scale)
    return fill(module, values), image


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        SandwichNetwork(inputs=5, classes=3, features=8, dense_depth=3, lipschitz=2.5),
        SandwichNetwork(inputs=6, classes=4, features=3, dense_depth=1, activation=nn.Tanh()),
        SandwichNetwork(
            image=(4, 6), in_channels=2, channels=3, pool=2, features=5, dense_depth=1, classes=3, lipschitz=1.5
        ),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None) -> nn.Module:
    torch.manual_seed(seed)
    if image is not None:
        return SandwichNetwork(**small_images(image), classes=classes)
    return SandwichNetwork(inputs=inputs, classes=classes, dense_depth=2)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo(
        "Sandwich",
        "Wang & Manchester 2023, arXiv:2301.11526",
        "prescribed",
        "SandwichLinear, SandwichConv2d, SandwichNetwork",
    )
