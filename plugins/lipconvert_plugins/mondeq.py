"""Monotone equilibrium models (Winston & Kolter 2020): W = (1 − m)I − A′A + B − B′ (paper eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._monotone import Monotone, MonotoneDEQ, MonotoneDEQConv2d, monotone_dae, monotone_from_state_dict, monotone_states


class _MonDEQ(Monotone):
    def phi(self) -> Tensor:
        return self.A.weight.new_ones(len(self.A.weight))


class MonDEQ(_MonDEQ, MonotoneDEQ):
    """z = σ(Wz + Ux + b), W = (1 − m)I − A′A + B − B′. (paper eq. 5; see `MonotoneDEQ` for the arguments)

    L = ‖U‖‖G‖/m with a free U (Theorem 3.2 has G = I), or prescribed (Lip-MonDEQ).
    """


class MonDEQConv2d(_MonDEQ, MonotoneDEQConv2d):
    """The same model with circular convolutions A, B and U on images. (see `MonotoneDEQConv2d` for the arguments)"""


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None) -> DAE | None:
    return monotone_dae(model, input_shape) if computes_as(model, _MonDEQ) else None


@hookimpl
def nonlinear_states(model: nn.Module) -> int | None:
    return monotone_states(model) if computes_as(model, _MonDEQ) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    return monotone_from_state_dict(MonDEQ, MonDEQConv2d, "mondeq", set(), state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    images = [MonDEQConv2d(2, 3, 2, m=0.5), MonDEQConv2d(2, 3, lipschitz=1.0, kernel_size=2)]
    for model in images:
        model.input_shape = (2, 4, 3)
    return [
        MonDEQ(5, 8, 3, m=0.5),
        MonDEQ(6, 7, 3, m=0.3, lipschitz=1.0),
        MonDEQ(4, 5, activation=nn.Tanh()),
        *images,
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MonDEQ(inputs, inputs, classes, lipschitz=1.0)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo(
        "MonDEQ", "Winston & Kolter 2020, arXiv:2006.08591", "‖U‖‖G‖/m, or prescribed", "MonDEQ, MonDEQConv2d"
    )
