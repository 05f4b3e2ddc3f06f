"""SDP-based Lipschitz layers (Araujo et al. 2023): T_ii = Σ_j |W′W|_ij q_j/q_i, q free and positive (paper eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._residual import ResidualLinear, ResidualNetwork, residual_dae, residual_from_state_dict


class SLLLinear(ResidualLinear):
    """x → x − 2WT⁻¹σ(W′x + b) with T_ii = Σ_j |W′W|_ij q_j/q_i, 1-Lipschitz. (paper eq. 9)

    ``SLLLinear(features, inner=None, bias=True, activation=None)``. q = exp(``log_q``) as in the authors' later code; the
    paper's own uses |q|. A zero column of W makes T_ii = 0: the neuron is dead, and T_ii = 1 stands for it (FORMULAS 2).
    """

    def __init__(
        self, features: int, inner: int | None = None, bias: bool = True, activation: nn.Module | None = None
    ) -> None:
        super().__init__(features, inner, bias, activation)
        self.log_q = nn.Parameter(torch.zeros(self.inner))

    def T(self) -> Tensor:
        # The differences, not q itself: T does not change when q is scaled, and no q underflows to 0/0. Where a column is
        # orthogonal to another one, their ratio does not matter, however large.
        gram = (self.weight @ self.weight.mT).abs()
        ratio = (self.log_q - self.log_q.unsqueeze(-1)).masked_fill(gram == 0, 0.0).exp()
        T = (gram * ratio).sum(-1)
        return torch.where(T > 0, T, torch.ones_like(T))


class SLLNetwork(ResidualNetwork):
    """``SLLNetwork(inputs=64, classes=10, features=64, dense_depth=2)``: pad, SLL layers, first logits; 1-Lipschitz."""

    layer, prefix = SLLLinear, "sll"


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    return residual_dae(model) if computes_as(model, SLLLinear) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    return residual_from_state_dict(SLLNetwork, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        SLLNetwork(inputs=5, classes=3, features=7, dense_depth=3, dense_inner=9),
        SLLNetwork(inputs=4, classes=2, dense_depth=1, activation=nn.Tanh()),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SLLNetwork(inputs=inputs, classes=classes, dense_depth=3)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("SLL", "Araujo et al. 2023, arXiv:2303.03169", "1", "SLLLinear, SLLNetwork")
