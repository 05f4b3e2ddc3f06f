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
    activation_module,
    activation_of,
    affine,
    computes_as,
    hookimpl,
    linear_solve,
    required_option,
)

from ._convolution import Front, front_arguments, image_of, kernel_shape, small_images, split_layers


def cayley(M: Tensor) -> Tensor:
    """Matrices with orthonormal columns from any tall M = [X; Y], X (c, c): (..., r, c) → (..., r, c), r ≥ c.

    Z = X − X′ + Y′Y,  [ (I + Z)⁻¹(I − Z);  −2Y(I + Z)⁻¹ ]                                             (FORMULAS 4)
    """
    c = M.shape[-1]
    X, Y = M[..., :c, :], M[..., c:, :]
    eye = torch.eye(c, dtype=M.dtype, device=M.device).expand_as(X)
    Z = X - X.mH + Y.mH @ Y
    stacked = linear_solve(eye + Z, torch.cat([eye - Z, eye], -1))
    return torch.cat([stacked[..., :c], -2.0 * Y @ stacked[..., c:]], -2)


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
        if not 0.0 < scale < float("inf"):
            raise InvalidParameterError("scale", scale, "it is the layer's Lipschitz constant, which must be positive")
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
        if not 0.0 < scale < float("inf"):
            raise InvalidParameterError("scale", scale, "it is the layer's Lipschitz constant, which must be positive")
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

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.stride or x.shape[3] % self.stride:
            expected = f"(B, {self.in_channels}, h, w), h and w multiples of {self.stride}"
            raise ShapeError("the input of SandwichConv2d", expected, tuple(x.shape))
        x = functional.pixel_unshuffle(x, self.stride)
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
        if not 0.0 < lipschitz < float("inf"):
            raise InvalidParameterError("lipschitz", lipschitz, "a prescribed constant must be positive")
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
    layers = split_layers(state_dict, "sandwich")
    if layers is None or "sandwich0.alpha" not in state_dict:
        return None
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
