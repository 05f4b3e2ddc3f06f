"""Residual layers x − 2WT⁻¹σ(W′x + b) with W′W ⪯ T: what SLL and CPL share (FORMULAS 1.1, paper section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    Activations,
    FirstFeatures,
    Grid,
    InvalidParameterError,
    PadChannels,
    ShapeError,
    activation_module,
    activation_of,
    conv2d_adjoint,
    conv2d_same,
    dense_operator,
    psd_factor,
    required_option,
    spectral_norm,
)

from ._convolution import (
    Front,
    front_arguments,
    image_of,
    kernel_shape,
    require_circular,
    split_layers,
    whole,
)
from ._layouts import (
    Layer,
    LayerSequence,
    asked_activation,
    asked_front,
    asked_padding,
    fill,
    layers_of,
    require_shape,
    split_head,
    tensor,
    vector,
)


class Residual(nn.Module):
    """x → x − 2 W T⁻¹ σ(W′x + b), 1-Lipschitz for any positive diagonal T ⪰ W′W.

    ``weight`` holds W′. Subclasses say what `T` is (SLL, CPL) and what W′ is (a matrix, a convolution). ``activation`` is
    elementwise with slope in [0, 1], ReLU by default.
    """

    def __init__(
        self, features: int, inner: int | None, kernel: tuple[int, ...], bias: bool, activation: nn.Module | None
    ) -> None:
        super().__init__()
        self.features, self.inner = features, features if inner is None else inner
        self.weight = nn.Parameter(torch.empty(self.inner, features, *kernel))
        self.bias = nn.Parameter(torch.zeros(self.inner)) if bias else None
        self.activation = nn.ReLU() if activation is None else activation
        nn.init.xavier_normal_(self.weight)

    def T(self, image: tuple[int, ...] = ()) -> Tensor:
        """The diagonal of T, (inner,), positive; on images of a size for convolutions."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """Σ_s |W′W|_ij over all shifts s, (inner, inner): what Gershgorin's theorem needs."""
        raise NotImplementedError

    def norm(self, image: tuple[int, ...]) -> Tensor:
        """An upper bound of ‖W‖."""
        raise NotImplementedError

    def inward(self, x: Tensor) -> Tensor:
        """W′x + b."""
        raise NotImplementedError

    def outward(self, s: Tensor) -> Tensor:
        """W s."""
        raise NotImplementedError

    def operator(self, input_shape: tuple[int, ...] | None, dense: bool) -> tuple[Grid, tuple[int, ...], Tensor]:
        """The grid, the image and W′ as matrices."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.inward(x))
        T = self.T(tuple(x.shape[2:]) if self.weight.dim() == 4 else ())
        return x - 2.0 * self.outward(s / T.reshape(-1, *[1] * (self.weight.dim() - 2)))

    def extra_repr(self) -> str:
        return f"features={self.features}, inner={self.inner}, bias={self.bias is not None}"


class ResidualLinear(Residual):
    """The dense layer, (..., features) → (..., features); ``weight`` (inner, features), as ``nn.Linear(features, inner)``."""

    def __init__(
        self, features: int, inner: int | None = None, bias: bool = True, activation: nn.Module | None = None
    ) -> None:
        super().__init__(features, inner, (), bias, activation)

    def gram(self) -> Tensor:
        return (self.weight @ self.weight.mT).abs()

    def norm(self, image: tuple[int, ...]) -> Tensor:
        return spectral_norm(self.weight)

    def inward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def outward(self, s: Tensor) -> Tensor:
        return functional.linear(s, self.weight.mT)

    def operator(self, input_shape: tuple[int, ...] | None, dense: bool) -> tuple[Grid, tuple[int, ...], Tensor]:
        return Grid(), (), self.weight.detach()


class ResidualConv2d(Residual):
    """The convolutional layer, (B, features, h, w) → (B, features, h, w); ``weight`` (inner, features, k, k).

    Any kernel size, also larger than the image; T is the same in every pixel. ``padding_mode="zeros"`` is 1-Lipschitz with
    the same T, but is converted only densely: zero padding has no form per frequency.
    """

    def __init__(
        self,
        features: int,
        inner: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        bias: bool = True,
        activation: nn.Module | None = None,
        padding_mode: str = "circular",
    ) -> None:
        super().__init__(features, inner, kernel_shape(kernel_size, padding_mode), bias, activation)
        self.padding_mode = padding_mode

    def gram(self) -> Tensor:
        # The linear autocorrelation, for images of any size; on small ones, where shifts meet, it is an upper bound.
        kh, kw = self.weight.shape[2:]
        return functional.conv2d(self.weight, self.weight, padding=(kh - 1, kw - 1)).abs().sum((2, 3))

    def norm(self, image: tuple[int, ...]) -> Tensor:
        if self.padding_mode == "zeros":  # a corner of the circular convolution on a larger image
            image = (image[0] + self.weight.shape[2] - 1, image[1] + self.weight.shape[3] - 1)
        return spectral_norm(Grid(image).convolution(self.weight))

    def inward(self, x: Tensor) -> Tensor:
        return conv2d_same(x, self.weight, self.bias, padding_mode=self.padding_mode)

    def outward(self, s: Tensor) -> Tensor:
        return conv2d_adjoint(s, self.weight, self.padding_mode)

    def operator(self, input_shape: tuple[int, ...] | None, dense: bool) -> tuple[Grid, tuple[int, ...], Tensor]:
        image = image_of(self, input_shape)
        require_circular(self, self.padding_mode, dense)
        weight = self.weight.detach()
        if self.padding_mode == "zeros":
            linear = dense_operator(lambda x: conv2d_same(x, weight, padding_mode="zeros"), (self.features, *image))
            return Grid(), image, linear
        return Grid(image), image, Grid(image).convolution(weight)

    def extra_repr(self) -> str:
        kernel = "x".join(map(str, self.weight.shape[2:]))
        return f"{super().extra_repr()}, kernel_size={kernel}, padding_mode={self.padding_mode}"


def residual_states(layer: Residual) -> int:
    """The rows s of `residual_dae`, 0 where σ is the identity."""
    return 0 if isinstance(layer.activation, nn.Identity) else layer.inner


def residual_dae(layer: Residual, input_shape: tuple[int, ...] | None = None, dense: bool = False) -> DAE:
    """One layer as a DAE: z = [x; s], R = 2WT⁻¹,

        W = [[0, 0], [W′, 0]],  U = [I; 0],  G = [I, −R],  Λ = blkdiag(I, 2T⁻¹),  L = 1,
        H = blkdiag(0, 4T⁻¹ − 4T⁻¹W′WT⁻¹),  V = [0, √2 F T⁻¹],  F′F = T − W′W                         (FORMULAS 1.1)

    F = RT^{1/2} with R′R = I − T^{-1/2}W′WT^{-1/2}, a matrix between 0 and I whatever the scale of T.
    Raises `NotPSDError` when W′W ⋠ T: the layer is then not 1-Lipschitz.
    """
    grid, image, weight = layer.operator(input_shape, dense)
    h, d = weight.shape[-2:]
    pixels = h // layer.inner  # of a dense form of images; 1 otherwise
    T = layer.T(image).detach().repeat_interleave(pixels)
    bias = T.new_zeros(h) if layer.bias is None else layer.bias.detach().repeat_interleave(pixels)
    eye_d, eye_h = (torch.eye(n, dtype=weight.dtype).expand(*grid.batch, n, n) for n in (d, h))
    scaled = weight / T.sqrt().unsqueeze(-1)
    root = psd_factor(eye_h - scaled @ scaled.mH, "I - T^{-1/2} W'W T^{-1/2} (W'W must not exceed T)", scale=1.0)

    def zero(*shape: int) -> Tensor:
        return weight.new_zeros(*grid.batch, *shape)

    W, U, G, V = zero(d + h, d + h), zero(d + h, d), zero(d, d + h), zero(h, d + h)
    W[..., d:, :d] = weight
    U[..., :d, :] = G[..., :d] = eye_d
    G[..., d:] = -2.0 * weight.mH / T
    V[..., d:] = 2.0**0.5 * root / T.sqrt()
    return DAE.own(
        W=W,
        U=U,
        G=G,
        V=V,
        Lambda=torch.cat([T.new_ones(d), 2.0 / T]),
        b_z=torch.cat([T.new_zeros(d), bias]),
        activations=Activations("identity", d) + Activations(activation_of(layer.activation), h),
        blocks=(d, h),
        grid=grid,
    )


class ResidualNetwork(nn.Sequential):
    """The network of the paper's experiments: zero-pad the channels, convolutions, mean pooling, dense layers, first logits.

    ``image``: h = w of the input, or (h, w); without it inputs are flat, and ``inputs`` is their number. On images:
    ``in_channels`` are padded to ``channels``, ``conv_depth`` layers of ``inner`` channels and ``kernel_size`` follow, then
    pooling by ``pool`` (`MeanPool`) and ``Flatten``. Then, with or without images: pad to ``features`` (by default as many as
    there are), ``dense_depth`` layers of ``dense_inner`` neurons, and the first ``classes`` features as logits. 1-Lipschitz.
    """

    linear: type[ResidualLinear]
    conv: type[ResidualConv2d]
    prefix: str

    def __init__(
        self,
        *,
        inputs: int | None = None,
        classes: int = 10,
        image: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        channels: int = 8,
        inner: int | None = None,
        conv_depth: int = 4,
        kernel_size: int | tuple[int, int] = 3,
        pool: int = 4,
        features: int | None = None,
        dense_depth: int = 2,
        dense_inner: int | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if image is not None and channels < in_channels:
            raise InvalidParameterError("channels", channels, f"there are {in_channels} input channels")
        front = Front(inputs, image, channels if image is not None else in_channels, channels, conv_depth, pool)
        self.input_shape = front.input_shape if image is None else (in_channels, *front.input_shape[1:])
        if image is not None and channels != in_channels:
            self.add_module("pad_channels", PadChannels(channels))
        for k in range(len(front.widths)):
            self.add_module(f"conv{k}", self.conv(channels, inner, kernel_size, activation=activation))
        for name, module in front.joint():
            self.add_module(name, module)
        width = max(front.features, classes) if features is None else features
        if width < max(front.features, classes):
            raise InvalidParameterError(
                "features", width, f"{front.features} reach the dense layers, and {classes} leave"
            )
        if width != front.features:
            self.add_module("pad", PadChannels(width))
        for k in range(dense_depth):
            self.add_module(f"{self.prefix}{k}", self.linear(width, dense_inner, activation=activation))
        self.add_module("head", FirstFeatures(classes))


def residual_from_state_dict(
    network: type[ResidualNetwork], state_dict: Mapping[str, Tensor], options: Mapping[str, Any]
) -> nn.Module | None:
    """A `ResidualNetwork` from its own state dict, None if it is not one.

    ``inputs`` (or, with convolutions, ``image``, ``in_channels`` and ``pool``), ``classes`` and ``activation`` must be
    given: the tensors do not say them.
    """
    layers = split_layers(state_dict, network.prefix)
    if layers is None:
        return None
    convolutions, depth = layers
    arguments = front_arguments(state_dict, options, network.prefix, convolutions)
    if convolutions:
        arguments |= {"inner": len(state_dict["conv0.weight"]), "channels": state_dict["conv0.weight"].shape[1]}
    else:
        meaning = "size of the flat input before padding"
        arguments["inputs"] = required_option(options, "inputs", network.prefix, meaning, whole)
    weight = state_dict[f"{network.prefix}0.weight"]
    model = network(
        **arguments,
        classes=required_option(options, "classes", network.prefix, "number of logits", whole),
        features=weight.shape[1],
        dense_depth=depth,
        dense_inner=len(weight),
        activation=activation_module(
            required_option(options, "activation", network.prefix, "relu, leaky_relu(0.1), ...")
        ),
    )
    model.to(weight.dtype).load_state_dict(state_dict)
    return model


def residual_from_layers(
    linear: type[ResidualLinear],
    conv: type[ResidualConv2d],
    plugin: str,
    mark: str,
    others: set[str],
    parameters: Callable[[Layer, str, int], Mapping[str, Tensor]],
    state_dict: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> nn.Module | None:
    """A network of the public layouts: convolutions, mean pooling, dense layers, the first logits or a normalised head.

    Layers have ``kernel`` (convolutions), ``weights`` or ``weight``, all or none a ``bias``, and ``mark``, by which they are
    known; ``others`` are names that carry nothing. ``parameters(layer, path, inner)`` gives what a layer has beside weight
    and bias. None if no layer has the mark.
    """
    layers = layers_of(state_dict)
    layers = {path: layer for path, layer in layers.items() if not path.endswith(".pm")}  # a power iteration's vectors
    names = {name for layer in layers.values() for name in layer}
    if mark not in names or names - {"kernel", "weights", "weight", "bias", mark} - others:
        return None
    layers, head = split_head(layers)
    weights = dict[str, Tensor]()
    for path, layer in layers.items():
        weights[path] = tensor(layer, path, "kernel", "weights", "weight")
        tensor(layer, path, mark)
        if weights[path].dim() not in (2, 4):
            expected = "(inner, features) or (inner, features, k, k)"
            raise ShapeError(f"the weight of {path!r}", expected, tuple(weights[path].shape))
    kernels = {path: weight for path, weight in weights.items() if weight.dim() == 4}
    dense = {path: weight for path, weight in weights.items() if weight.dim() == 2}
    biased = any("bias" in layer for layer in layers.values())
    activation = asked_activation(options, plugin)

    def filled(layer: Residual, path: str) -> nn.Module:
        values = {"weight": weights[path], **parameters(layers[path], path, layer.inner)}
        if layer.bias is not None:
            values["bias"] = vector(layers[path], path, "bias", layer.inner)
        return fill(layer, values)

    modules: list[nn.Module] = []
    if kernels:
        channels = next(iter(kernels.values())).shape[1]
        front, padding = asked_front(options, plugin, channels, len(kernels))
        padding_mode = asked_padding(options, plugin)
        modules += padding
        for path, kernel in kernels.items():
            inner, _, kh, kw = kernel.shape
            require_shape(kernel, path, (inner, channels, kh, kw))
            if not kh % 2 or not kw % 2:
                raise ShapeError(
                    f"the kernel of {path!r}", "an odd size: otherwise the public code is no residual layer", (kh, kw)
                )
            layer = conv(channels, inner, (kh, kw), biased, activation(), padding_mode)
            modules.append(filled(layer, path))
        modules += [module for _, module in front.joint()]
        shape, features = front.input_shape, front.features
    else:
        features = required_option(options, "inputs", plugin, "size of the flat input before padding", whole)
        shape = (features,)
    width = next(iter(dense.values())).shape[1] if dense else features if head is None else head.in_features
    if width < features or (kernels and width != features):
        hint = "Other values of image and pool may be meant." if kernels else "Another value of inputs may be meant."
        raise ShapeError(f"the weight of {next(iter(dense), 'the head')!r}", f"(..., {features})", (..., width), hint)
    modules += [PadChannels(width)] * (features < width)
    for path, weight in dense.items():
        require_shape(weight, path, (len(weight), width))
        modules.append(filled(linear(width, len(weight), biased, activation()), path))
    if head is not None:
        require_shape(head.weight, "the head", (head.out_features, width))
        modules.append(head)
    else:
        classes = required_option(options, "classes", plugin, "number of logits", whole)
        if classes > width:
            raise InvalidParameterError("option 'classes'", classes, f"there are {width} features")
        modules.append(FirstFeatures(classes))
    return LayerSequence(modules, shape)
