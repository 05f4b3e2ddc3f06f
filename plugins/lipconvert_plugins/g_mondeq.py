"""Generalised monotone equilibrium models (Revay et al. 2020): W = I − Φ(A′A + B′ − B + mI) (paper eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._monotone import MonotoneDEQ, monotone_dae, monotone_from_state_dict


class GMonDEQ(MonotoneDEQ):
    """z = σ(Wz + Ux + b), W = I − Φ(A′A + B′ − B + mI), Φ = exp(``log_phi``). (paper eq. 6; see `MonotoneDEQ`)

    L = ‖Φ⁻¹U‖‖G‖/m with a free U (Theorem 3.3 has G = I), or prescribed.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int | None = None, **options: Any) -> None:
        super().__init__(in_features, hidden, out_features, **options)
        self.log_phi = nn.Parameter(torch.zeros(hidden))

    def phi(self) -> Tensor:
        return self.log_phi.exp()


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    return monotone_dae(model) if computes_as(model, GMonDEQ) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    return monotone_from_state_dict(GMonDEQ, "g_mondeq", {"log_phi"}, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    models: list[nn.Module] = [GMonDEQ(5, 8, 3, m=0.5), GMonDEQ(6, 7, 3, m=0.3, lipschitz=2.0)]
    for model in models:
        nn.init.normal_(model.log_phi, std=0.3)  # type: ignore[arg-type]
    return models


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GMonDEQ(inputs, inputs, classes, lipschitz=1.0)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("G-MonDEQ", "Revay et al. 2020, arXiv:2010.01732", "‖Φ⁻¹U‖‖G‖/m, or prescribed", "GMonDEQ")
