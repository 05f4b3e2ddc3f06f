"""Convex potential layers (Meunier et al. 2022): T = ‖W‖² I (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl, spectral_norm

from ._residual import ResidualLinear, ResidualNetwork, residual_dae, residual_from_state_dict


class CPLLinear(ResidualLinear):
    """x → x − (2/‖W‖²) W σ(W′x + b), 1-Lipschitz.

    ``CPLLinear(features, inner=None, bias=True, activation=None)``. ‖W‖ is an upper bound from a singular value
    decomposition, not a power iteration. For W = 0 the layer is the identity and T = I stands for it.
    """

    def T(self) -> Tensor:
        square = spectral_norm(self.weight) ** 2
        return torch.where(square > 0, square, torch.ones_like(square)).expand(self.inner)


class CPLNetwork(ResidualNetwork):
    """``CPLNetwork(inputs=64, classes=10, features=64, dense_depth=2)``: pad, CPL layers, first logits; 1-Lipschitz."""

    layer, prefix = CPLLinear, "cpl"


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    return residual_dae(model) if computes_as(model, CPLLinear) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    return residual_from_state_dict(CPLNetwork, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        CPLNetwork(inputs=5, classes=3, features=6, dense_depth=3, dense_inner=4),
        CPLNetwork(inputs=2, classes=2, dense_depth=4, activation=nn.LeakyReLU(0.1)),  # deeper than wide
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return CPLNetwork(inputs=inputs, classes=classes, dense_depth=3)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("CPL", "Meunier et al. 2022, arXiv:2110.12690", "1", "CPLLinear, CPLNetwork")
