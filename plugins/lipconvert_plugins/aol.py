"""Almost-orthogonal layers (Prach & Lampert 2022): P = W̃D, D_ii = (Σ_j |W̃′W̃|_ij)^{-1/2} (paper eq. 8)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    FirstFeatures,
    Grid,
    InvalidParameterError,
    MaxMin,
    MissingOptionError,
    Normalize,
    PadChannels,
    PluginInfo,
    ShapeError,
    WeightsError,
    activation_module,
    affine,
    computes_as,
    conv2d_same,
    dense_operator,
    hookimpl,
    pixel_unshuffle,
    required_option,
    strided_weight,
)

from ._convolution import (
    Front,
    front_arguments,
    image_of,
    kernel_shape,
    require_circular,
    small_images,
    split_layers,
    whole,
)
from ._layouts import (
    FILE,
    LayerSequence,
    asked_activation,
    dotted,
    fill,
    layers_of,
    require_shape,
    tensor,
    unwrapped,
    vector,
)


def almost_orthogonal(weight: Tensor) -> Tensor:
    """P = W̃D for a weight (out, in) or a kernel (out, in, k, k): columns, or input channels, divided so that ‖P‖ ≤ 1.

    D_i = (Σ_j Σ_s |C_ij[s]|)^{-1/2}, C the autocorrelation over input channels; on images smaller than 2k − 1, where shifts
    meet, the sum is an upper bound. Zero padding only takes a corner of the operator. (FORMULAS 4)
    """
    if weight.dim() == 2:
        sums = (weight.mT @ weight).abs().sum(1)
    else:
        columns, (kh, kw) = weight.transpose(0, 1), weight.shape[2:]
        sums = functional.conv2d(columns, columns, padding=(kh - 1, kw - 1)).abs().sum((1, 2, 3))
    D = torch.where(sums > 0, sums, torch.ones_like(sums)).rsqrt()
    return weight * D.reshape(1, -1, *[1] * (weight.dim() - 2))


class AOLLinear(nn.Module):
    """x → W̃Dx + b, (..., in_features) → (..., out_features), ‖W̃D‖ ≤ 1. Activations between layers are the user's own.

    ``AOLLinear(in_features, out_features, bias=True)``; ``weight`` (out, in) is W̃. A zero column of W̃ stays zero
    whatever its D_ii is; 1 is taken (the paper's footnote 2 says 0).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.orthogonal_(self.weight)

    def P(self) -> Tensor:
        """W̃D, (out, in), of norm at most 1."""
        return almost_orthogonal(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.P(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class AOLConv2d(nn.Module):
    """The same layer with a convolution, (B, in_channels, h, w) → (B, out_channels, h/stride, w/stride), of norm at most 1.

    ``AOLConv2d(in_channels, out_channels, kernel_size, stride=1, bias=True, padding_mode="circular")``; any kernel size. With
    a stride D is that of the polyphase kernel, (out, in·stride², k′, k′): a strided layer is an ordinary one behind
    ``PixelUnshuffle(stride)``. ``padding_mode="zeros"`` is 1-Lipschitz too, but converted only densely.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        bias: bool = True,
        padding_mode: str = "circular",
    ) -> None:
        super().__init__()
        if stride < 1:
            raise InvalidParameterError("stride", stride, "it must be at least 1")
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, int(stride)
        self.padding_mode = padding_mode
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel_shape(kernel_size, padding_mode)))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.dirac_(self.weight)
        with torch.no_grad():
            self.weight += torch.randn_like(self.weight) * 0.5 * self.weight[0].numel() ** -0.5

    def P(self) -> tuple[Tensor, tuple[int, int]]:
        """W̃D as a kernel (out, in·stride², k′, k′) on unshuffled images, and its origin."""
        weight, origin = strided_weight(self.weight, self.stride)
        return almost_orthogonal(weight), origin

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W̃D x + bias."""
        h, w = x.shape[-2:]
        if h % self.stride or w % self.stride:
            raise ShapeError("the input of AOLConv2d", f"(B, c, h, w), multiples of {self.stride}", tuple(x.shape))
        kernel, origin = self.P()
        x = pixel_unshuffle(x, self.stride)
        return conv2d_same(x, kernel, bias, origin=origin, padding_mode=self.padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.bias)

    def extra_repr(self) -> str:
        kernel = "x".join(map(str, self.weight.shape[2:]))
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={kernel}, stride={self.stride}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode}"
        )


class AOLNetwork(nn.Sequential):
    """``dense_depth`` times AOLLinear and ReLU, then an AOLLinear to the logits; 1-Lipschitz.

    With ``image`` (h = w, or (h, w)) in place of ``inputs``, first ``conv_depth`` times AOLConv2d and ReLU on ``channels``
    channels, `MeanPool` by ``pool``, and ``Flatten``.
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
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        front = Front(inputs, image, in_channels, channels, conv_depth, pool)
        self.input_shape = front.input_shape

        def act() -> nn.Module:
            return nn.ReLU() if activation is None else activation

        for k, (before, after) in enumerate(front.widths):
            self.add_module(f"conv{k}", AOLConv2d(before, after, kernel_size))
            self.add_module(f"conv_activation{k}", act())
        for name, module in front.joint():
            self.add_module(name, module)
        widths = [front.features, *[front.features if features is None else features] * dense_depth, classes]
        for k in range(dense_depth + 1):
            self.add_module(f"aol{k}", AOLLinear(widths[k], widths[k + 1]))
            if k < dense_depth:
                self.add_module(f"activation{k}", act())


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None, dense: bool) -> DAE | None:
    """One linear layer with Λ = I, L = 1; a chain of them is appendix D.1 (FORMULAS 1.2)."""
    if computes_as(model, AOLLinear):
        return affine(model.P(), model.bias, lipschitz=1.0)
    if not computes_as(model, AOLConv2d):
        return None
    h, w = image_of(model, input_shape, model.stride)
    require_circular(model, model.padding_mode, dense)
    coarse = (h // model.stride, w // model.stride)
    if model.padding_mode == "zeros":
        linear = dense_operator(model.linear, (model.in_channels, h, w))
        bias = None if model.bias is None else model.bias.repeat_interleave(coarse[0] * coarse[1])
        return affine(linear, bias, lipschitz=1.0)
    kernel, origin = model.P()
    grid = Grid(coarse)
    return affine(grid.convolution(kernel, origin), model.bias, lipschitz=1.0, grid=grid)


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or the dense one of Wang & Manchester's code: ``weights`` and ``bias`` in sequence, the last one
    linear, √γ before the first and the last (``lipschitz`` = γ; the file cannot tell that it is wrong).

    Its convolutions (``kernel``) divide the output channels, not the input channels: another layer, which is refused.
    Or the networks of Prach et al.'s comparison, ``FirstConv``, ``BlockN.M`` and ``ClassificationHead.0`` with MaxMin of
    neighbouring channels; they add 1e-6 to the sums of D, and the outputs differ by about as much.
    """
    layers = split_layers(state_dict, "aol")
    if layers is None:
        return _compared(state_dict, options) or _from_layers(state_dict, options)
    convolutions, depth = layers
    arguments = front_arguments(state_dict, options, "aol", convolutions)
    kernels = [state_dict[f"conv{k}.weight"].shape for k in range(convolutions)]
    shapes = [state_dict[f"aol{k}.weight"].shape for k in range(depth)]
    if any(shape[0] != shapes[0][0] for shape in shapes[:-1]) or any(shape[0] != kernels[0][0] for shape in kernels):
        widths = [tuple(shape) for shape in (*kernels, *shapes)]
        raise MissingOptionError(
            "aol", "a model", f"hidden layers of different widths {widths}: build it and load into it"
        )
    model = AOLNetwork(
        **(arguments | {"channels": kernels[0][0]} if kernels else {"inputs": shapes[0][1]}),
        classes=shapes[-1][0],
        features=shapes[0][0],
        dense_depth=depth - 1,
        activation=activation_module(required_option(options, "activation", "aol", "relu, tanh, leaky_relu(0.1), ...")),
    ).to(state_dict["aol0.weight"].dtype)
    model.load_state_dict(state_dict)
    return model


def _compared(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """The network of the comparison, None if it is another one; with channels in the order of `MaxMin`, which pairs halves.

    A block drops the second half of its channels before ``PixelUnshuffle``: here the next weight has zeros for them.
    """
    tensors = unwrapped(state_dict)
    layers = layers_of(tensors)
    blocks = [path for path in layers if re.fullmatch(r"Block\d+\.\d+", path)]
    if set(layers) != {"FirstConv", *blocks, "ClassificationHead.0"} or not blocks:
        return None
    if not all(f"{path}.parametrizations.weight.original" in tensors for path in layers):
        return None
    inputs = required_option(options, "in_channels", "aol", "channels of the input", whole)
    classes = required_option(options, "classes", "aol", "number of logits", whole)
    modules: list[nn.Module] = []
    block, width, place = "", 0, torch.arange(0)  # of the layers so far: channels, and where each of the file's stands
    for path in ("FirstConv", *blocks, "ClassificationHead.0"):
        weight = tensor(layers[path], path, "weight")
        if weight.dim() != 4:
            raise ShapeError(f"tensor {dotted(path, 'weight')!r}", "(out, in, k, k)", tuple(weight.shape))
        out, before, kh, kw = weight.shape
        bias = vector(layers[path], path, "bias", out)
        if path == "FirstConv":
            require_shape(weight, dotted(path, "weight"), (out, out, kh, kw))
            if inputs > before:
                raise InvalidParameterError("option 'in_channels'", inputs, f"the network pads to {before}")
            modules += [PadChannels(before)] * (inputs < before)
            width, place = before, torch.arange(before)
        elif (now := path.split(".")[0]) != block:
            if block:  # half of the file's channels, and the four pixels of each
                modules.append(nn.PixelUnshuffle(2))
                width, place = 4 * width, (4 * place[: len(place) // 2, None] + torch.arange(4)).flatten()
            block = now
        require_shape(weight, dotted(path, "weight"), (out, len(place), kh, kw))
        last = path == "ClassificationHead.0"
        if out % 2 and not last:
            raise ShapeError(f"tensor {dotted(path, 'weight')!r}", "an even number of rows, for MaxMin", (out, before))
        wide = weight.new_zeros(out, width, kh, kw)
        wide[:, place] = weight
        order = torch.arange(out) if last else torch.arange(out).reshape(-1, 2).T.flatten()
        modules.append(fill(AOLConv2d(width, out, (kh, kw)), {"weight": wide[order], "bias": bias[order]}))
        modules += [] if last else [MaxMin()]
        width, place = out, order.argsort()
    if classes > width:
        raise InvalidParameterError("option 'classes'", classes, f"there are {width} features")
    # one pixel is left, which the max pooling of its code keeps
    size = 2 ** len({path.split(".")[0] for path in blocks})
    return LayerSequence([*modules, nn.Flatten(), FirstFeatures(classes)], (inputs, size, size))


def _from_layers(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """A network from the public dense layout, None if it is another one."""
    layers = layers_of(state_dict)
    names = {frozenset(layer) for layer in layers.values()}
    if frozenset({"weights", "bias"}) not in names or names - {
        frozenset({name, "bias"}) for name in ("weights", "kernel")
    }:
        return None
    if len(names) > 1:
        path = next(path for path, layer in layers.items() if "kernel" in layer)
        reason = "is of a convolution whose output channels are divided, not its input channels: that is no AOLConv2d"
        raise WeightsError(FILE, f"{dotted(path, 'kernel')!r} {reason}")
    activation = asked_activation(options, "aol")
    gamma = required_option(options, "lipschitz", "aol", "the constant γ of the network, 1 where there is none", float)
    if not 0.0 < gamma < float("inf"):
        raise InvalidParameterError("option 'lipschitz'", gamma, "γ must be positive")
    modules: list[nn.Module] = []
    ends, width = (next(iter(layers)), next(reversed(layers))), 0
    for k, (path, layer) in enumerate(layers.items()):
        weight = tensor(layer, path, "weights")
        require_shape(weight, dotted(path, "weights"), (len(weight), width if k else weight.shape[-1]))
        power = 0.5 * ends.count(path)
        modules += [Normalize(std=gamma**-power)] * (power > 0.0 and gamma != 1.0)
        width = len(weight)
        values = {"weight": weight, "bias": vector(layer, path, "bias", width)}
        modules.append(fill(AOLLinear(weight.shape[1], width), values))
        modules += [] if path == ends[1] else [activation()]
    return LayerSequence(modules, (layers[ends[0]]["weights"].shape[1],))


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        AOLNetwork(inputs=5, classes=3, features=8, dense_depth=3),
        AOLNetwork(inputs=6, classes=4, features=3, dense_depth=1, activation=nn.Softplus(2.0)),
        AOLNetwork(image=(4, 6), in_channels=2, channels=3, conv_depth=2, pool=2, features=5, dense_depth=1, classes=3),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None) -> nn.Module:
    torch.manual_seed(seed)
    if image is not None:
        return AOLNetwork(**small_images(image), classes=classes)
    return AOLNetwork(inputs=inputs, classes=classes, dense_depth=2)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("AOL", "Prach & Lampert 2022, arXiv:2208.03160", "1", "AOLLinear, AOLConv2d, AOLNetwork")
