"""Monotone equilibrium models (Winston & Kolter 2020): W = (1 − m)I − A′A + B − B′ (paper eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._monotone import MonotoneDEQ, monotone_dae, monotone_from_state_dict


class MonDEQ(MonotoneDEQ):
    """z = σ(Wz + Ux + b), W = (1 − m)I − A′A + B − B′. (paper eq. 5; see `MonotoneDEQ` for the arguments)

    L = ‖U‖‖G‖/m with a free U (Theorem 3.2 has G = I), or prescribed (Lip-MonDEQ).
    """

    def phi(self) -> Tensor:
        return torch.ones_like(self.U.bias)


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    return monotone_dae(model) if computes_as(model, MonDEQ) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    return monotone_from_state_dict(MonDEQ, "mondeq", set(), state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        MonDEQ(5, 8, 3, m=0.5),
        MonDEQ(6, 7, 3, m=0.3, lipschitz=1.0),
        MonDEQ(4, 5, activation=nn.Tanh()),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MonDEQ(inputs, inputs, classes, lipschitz=1.0)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("MonDEQ", "Winston & Kolter 2020, arXiv:2006.08591", "‖U‖‖G‖/m, or prescribed", "MonDEQ")
