"""Modules that are kept as they are beside the LBEN stages, each with a known l2 Lipschitz constant.

All act on a batch: the first dimension is the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dae.activations import MaxMin, activation_of, is_activation
from ..dae.compose import require_small
from ..errors import InvalidParameterError, ShapeError, UnsupportedModuleError
from ..foundation.arguments import count, number, sizes
from ..foundation.integrity import recorded
from ..linalg.spectrum import pixel_unshuffle


def applied(step: nn.Module, x: Tensor) -> Tensor:
    """Glue on a batch. Of no samples torch's ``PixelUnshuffle``, and the gradient of ``PixelShuffle``, leave the shape."""
    if len(x) or not isinstance(step, nn.PixelUnshuffle | nn.PixelShuffle):
        return step(x)
    if isinstance(step, nn.PixelUnshuffle):
        return pixel_unshuffle(x, step.downscale_factor)
    r = step.upscale_factor
    return x.reshape(0, x.shape[1] // r**2, x.shape[2] * r, x.shape[3] * r)


@recorded()
class Normalize(nn.Module):
    """(x − mean)/std per channel (dimension 1), (B, C, ...) → (B, C, ...); Lipschitz constant 1/min(std).

    Part of the network, so that radii refer to the pixels the user perturbs. Numbers or one value per channel.
    Raises `InvalidParameterError` for std ≤ 0, `ShapeError` for a wrong number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        m, s = _channels(mean, "mean"), _channels(std, "std")
        if m.numel() != s.numel() and 1 not in (m.numel(), s.numel()):
            raise InvalidParameterError("Normalize(mean, std)", (mean, std), "they must be of as many channels")
        m, s = torch.broadcast_tensors(m.to(torch.get_default_dtype()), s.to(torch.get_default_dtype()))
        self.register_buffer("mean", m.clone())
        self.register_buffer("std", s.clone())
        if (
            m.dim() != 1
            or m.numel() == 0
            or not bool(torch.isfinite(m).all())
            or not bool((torch.isfinite(s) & (s > 0)).all())
        ):
            raise InvalidParameterError("Normalize(mean, std)", (mean, std), "std must be positive, one per channel")

    @property
    def lipschitz(self) -> float:
        """1/min|std|."""
        return float(1.0 / self.std.double().abs().min())

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.mean)
        if x.dim() < 2 or channels not in (1, x.shape[1]):
            raise ShapeError("the input of Normalize", f"(B, {channels}, ...)", tuple(x.shape))
        shape = (1, channels, *[1] * (x.dim() - 2))
        return (x - self.mean.reshape(shape)) / self.std.reshape(shape)


def _channels(values: Any, name: str) -> Tensor:
    """Numbers, one or several, as a float64 tensor (C,)."""
    requirement = f"{name} must be a finite number, or one for each channel"
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    several = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    numbers = [number(value, "Normalize(mean, std)", requirement) for value in several]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").to(torch.get_default_device())


@recorded()
class PadChannels(nn.Module):
    """Append zero channels (or features): (B, c, ...) → (B, channels, ...); Lipschitz constant 1."""

    lipschitz = 1.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = count(channels, "channels")

    def forward(self, x: Tensor) -> Tensor:
        missing = self.channels - x.shape[1] if x.dim() > 1 else -1
        if missing < 0:
            raise ShapeError("the input of PadChannels", f"(B, at most {self.channels} channels, ...)", tuple(x.shape))
        return functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


@recorded()
class FirstFeatures(nn.Module):
    """The first k features as the output: (B, n) → (B, k); Lipschitz constant 1."""

    lipschitz = 1.0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = count(features, "features")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] < self.features:
            raise ShapeError("the input of FirstFeatures", f"(B, at least {self.features})", tuple(x.shape))
        return x[:, : self.features]

    def extra_repr(self) -> str:
        return f"features={self.features}"


@recorded()
class MeanPool(nn.Module):
    """Non-overlapping k×k pooling scaled to norm 1: the sum over a window divided by k (not k²), so ‖MeanPool‖ = 1.

    (B, c, h, w) → (B, c, h/k, w/k); the mean of a window times k. Raises `ShapeError` when k does not divide h and w.
    """

    lipschitz = 1.0

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = count(kernel_size, "kernel_size")

    def forward(self, x: Tensor) -> Tensor:
        k = self.kernel_size
        if x.dim() != 4 or x.shape[2] % k or x.shape[3] % k:
            raise ShapeError("the input of MeanPool", f"(B, c, h, w) with h and w multiples of {k}", tuple(x.shape))
        return functional.avg_pool2d(x, k, divisor_override=k)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


# The glue the core knows: type, and the constructor arguments (attributes of the same name) that rebuild it.
# By exact type: the forward of a subclass may be another one.
KNOWN: dict[type[nn.Module], tuple[str, ...]] = {
    Normalize: ("mean", "std"),
    PadChannels: ("channels",),
    FirstFeatures: ("features",),
    MeanPool: ("kernel_size",),
    nn.AvgPool2d: ("kernel_size", "divisor_override"),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.PixelShuffle: ("upscale_factor",),
    MaxMin: (),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Identity: (),
}


def may_write(module: nn.Module) -> bool:
    """Whether glue may write into its input: activations in place, and whatever the core does not know."""
    return bool(getattr(module, "inplace", False)) if is_activation(module) else type(module) not in KNOWN


def core_lipschitz(module: nn.Module) -> float | None:
    """The Lipschitz constant of glue the core knows, from its values as they are; None for any other module.

    Activations count as glue where no layer stands beside them; those with slopes outside [0, 1] raise
    `UnsupportedActivationError`. ``AvgPool2d`` with windows that do not overlap: √(kh·kw)/divisor.
    """
    if is_activation(module):
        activation_of(module)
        return 1.0
    if type(module) is nn.AvgPool2d:
        return _pooling_lipschitz(module)
    if type(module) not in KNOWN:
        return None
    if (type(module) is nn.Flatten and module.start_dim == 0) or (type(module) is nn.Unflatten and module.dim == 0):
        return None  # it mixes the samples of a batch
    # as its class has it: an attribute of that name put on an nn.Flatten says nothing
    return float(module.lipschitz) if isinstance(module, Normalize) else 1.0


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size of torch's pooling or convolution as (vertical, horizontal): of a number, or one or two in a tuple or list.

    Raises `ShapeError` for others.
    """
    found = sizes(size, "a size of a window", "one or two whole numbers", least=0)
    if len(found) not in (1, 2):
        raise ShapeError("a size of a window", "one or two whole numbers", found)
    return found[0], found[-1]


def _pooling_lipschitz(pool: nn.AvgPool2d) -> float | None:
    kh, kw = pair(pool.kernel_size)
    if pair(pool.stride) != (kh, kw) or pair(pool.padding) != (0, 0) or pool.ceil_mode:
        return None  # overlapping windows count a pixel more than once
    return (kh * kw) ** 0.5 / abs(float(pool.divisor_override or kh * kw))


def dense_operator(function: Callable[[Tensor], Tensor], input_shape: tuple[int, ...]) -> Tensor:
    """The matrix (q, p) of a linear map of batches, on flattened samples: read off its values at the units, float64.

    Raises `ShapeError` for more than `lipconvert.dae.compose.MOST_DENSE` inputs.
    """
    size = torch.Size(input_shape).numel()
    require_small(size, "the matrix of a linear map of images")
    units = torch.eye(size, dtype=torch.float64)
    with torch.no_grad():
        return function(units.reshape(-1, *input_shape)).flatten(1).mT.contiguous()


def affine_image(module: nn.Module, input_shape: tuple[int, ...], path: str = "") -> tuple[Tensor, Tensor]:
    """(M, b) of an affine module on flattened inputs, M (q, p), b (q,), float64: its derivative and value at 0.

    Differences of values would lose what a large b has before M: a mean of 10⁴, say. Raises `UnsupportedModuleError` when its
    values at further points of sizes 1e-4 to 1e6 show that it is not affine.
    """
    size = torch.Size(input_shape).numel()
    require_small(size, f"the matrix of {path or type(module).__name__!r}")
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6], dtype=torch.float64).unsqueeze(-1)
    probes = scales * torch.randn(len(scales), size, generator=generator, dtype=torch.float64)
    points = torch.cat([torch.zeros(1, size, dtype=torch.float64), probes]).reshape(-1, *input_shape)
    with torch.no_grad():
        images = module(points.clone()).flatten(1)
    b, images = images[0], images[1:]
    with torch.enable_grad():
        at = torch.zeros(len(b), *input_shape, dtype=torch.float64, requires_grad=True)
        y = module(at.clone())
        M = at.new_zeros(len(b), size)  # of a constant
        if y.requires_grad:
            M = torch.autograd.grad(y, at, torch.eye(len(b), dtype=torch.float64).reshape(y.shape))[0].flatten(1)
    predicted = points[1:].flatten(1) @ M.mT + b
    # Round-off of a sum of `size` terms; a module that is not affine misses by far more at one scale or another.
    error = (predicted - images).abs().amax(1)
    if bool((error > 1e-9 * (predicted.abs().amax(1) + b.abs().amax())).any()):
        raise UnsupportedModuleError(
            path, type(module).__name__, "it is not affine, so it has no place in a single DAE."
        )
    return M, b
