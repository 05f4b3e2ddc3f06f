"""Convex potential layers (Meunier et al. 2022): T = ‖W‖² I (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._convolution import small_images
from ._layouts import Layer, layers_of
from ._residual import (
    Residual,
    ResidualConv2d,
    ResidualLinear,
    ResidualNetwork,
    residual_dae,
    residual_from_layers,
    residual_from_state_dict,
    residual_states,
)


class _CPL(Residual):
    def T(self, image: tuple[int, ...] = ()) -> Tensor:
        square = self.norm(image) ** 2
        return torch.where(square > 0, square, torch.ones_like(square)).expand(self.inner)


class CPLLinear(_CPL, ResidualLinear):
    """x → x − (2/‖W‖²) W σ(W′x + b), 1-Lipschitz.

    ``CPLLinear(features, inner=None, bias=True, activation=None)``. ‖W‖ is an upper bound from a singular value
    decomposition, not a power iteration. For W = 0 the layer is the identity and T = I stands for it.
    """


class CPLConv2d(_CPL, ResidualConv2d):
    """The same layer with a circular convolution W′, (B, features, h, w) → (B, features, h, w), 1-Lipschitz.

    ``CPLConv2d(features, inner=None, kernel_size=3, bias=True, activation=None, padding_mode="circular")``. ‖W‖ is the
    largest norm over the frequencies, exact for the images at hand: the layer depends on their size.
    """


class CPLNetwork(ResidualNetwork):
    """``CPLNetwork(inputs=64, classes=10, features=64, dense_depth=2)``: pad, CPL layers, first logits; 1-Lipschitz.

    With convolutions: ``CPLNetwork(image=32, channels=8, inner=5, conv_depth=4, ...)``, see `ResidualNetwork`.
    """

    linear, conv, prefix = CPLLinear, CPLConv2d, "cpl"


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None, dense: bool) -> DAE | None:
    return residual_dae(model, input_shape, dense) if computes_as(model, _CPL) else None


@hookimpl
def nonlinear_states(model: nn.Module) -> int | None:
    return residual_states(model) if computes_as(model, _CPL) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or the sequences of layers of public code: ``kernel`` or ``weights``, ``bias``, and ``eval_sv_max``
    (Meunier et al.) or ``u`` (Prach et al.).

    Public layers divide by an estimate of ‖W‖² from a power iteration, with 1e-6 or 1e-4 added; ours by an upper bound. So
    the outputs differ by as much as the estimate falls short, and ours is the one that is 1-Lipschitz. The estimate is not
    read. With zero padding the bound is that of circular images larger by a kernel: the difference may then be percents.
    """
    own = residual_from_state_dict(CPLNetwork, state_dict, options)
    if own is not None:
        return own
    layers = layers_of(state_dict).values()
    mark = "eval_sv_max" if any("eval_sv_max" in layer for layer in layers) else "u"
    if mark == "u" and any(not {"kernel", "weights", "weight"} & set(layer) for layer in layers):
        return None

    def nothing(layer: Layer, path: str, inner: int) -> dict[str, Tensor]:
        return {}

    return residual_from_layers(CPLLinear, CPLConv2d, "cpl", mark, {"alpha"}, nothing, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        CPLNetwork(inputs=5, classes=3, features=6, dense_depth=3, dense_inner=4),
        CPLNetwork(inputs=2, classes=2, dense_depth=4, activation=nn.LeakyReLU(0.1)),  # deeper than wide
        CPLNetwork(
            image=(5, 4), in_channels=2, channels=2, conv_depth=2, pool=1, features=40, dense_depth=1, classes=3
        ),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None) -> nn.Module:
    torch.manual_seed(seed)
    if image is not None:
        return CPLNetwork(**small_images(image), classes=classes, inner=8)
    return CPLNetwork(inputs=inputs, classes=classes, dense_depth=3)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("CPL", "Meunier et al. 2022, arXiv:2110.12690", "1", "CPLLinear, CPLConv2d, CPLNetwork")
