"""Generalised monotone equilibrium models (Revay et al. 2020): W = I − Φ(A′A + B′ − B + mI) (paper eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, PluginInfo, computes_as, hookimpl

from ._layouts import diagonal_of, log_of, require_shape, unwrapped
from ._monotone import Monotone, MonotoneDEQ, MonotoneDEQConv2d, monotone_dae, monotone_from_state_dict, monotone_states


class _GMonDEQ(Monotone):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log_phi = nn.Parameter(torch.zeros(len(self.U.weight)))

    def phi(self) -> Tensor:
        return self.log_phi.exp()


class GMonDEQ(_GMonDEQ, MonotoneDEQ):
    """z = σ(Wz + Ux + b), W = I − Φ(A′A + B′ − B + mI), Φ = exp(``log_phi``). (paper eq. 6; see `MonotoneDEQ`)

    L = ‖Φ⁻¹U‖‖G‖/m with a free U (Theorem 3.3 has G = I), or prescribed.
    """


class GMonDEQConv2d(_GMonDEQ, MonotoneDEQConv2d):
    """The same model with circular convolutions A, B and U on images, Φ per channel. (see `MonotoneDEQConv2d`)"""


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None) -> DAE | None:
    return monotone_dae(model, input_shape) if computes_as(model, _GMonDEQ) else None


@hookimpl
def nonlinear_states(model: nn.Module) -> int | None:
    return monotone_states(model) if computes_as(model, _GMonDEQ) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or that of Revay et al.'s models without γ (``ode_*.params``): ``U``, ``Wout``, ``V`` = A, ``S`` = B,
    and ``psi`` = log Φ or, older, ``Lambda`` = Φ itself.

    Any m > 0 gives a monotone W: a wrong one is another network, which nothing in the file can tell.
    """
    public = unwrapped(state_dict, "V.weight")
    names = {"U.weight", "U.bias", "V.weight", "S.weight", *({"Wout.weight", "Wout.bias"} & set(public))}
    if diagonal := diagonal_of(public, names, "g_mondeq"):
        states = public[diagonal].numel()
        for name in ("V.weight", "S.weight"):
            require_shape(public[name], name, (states, states))
        renamed = {"V.weight": "A.weight", "S.weight": "B.weight", diagonal: "log_phi"}
        state_dict = {renamed.get(name, name): value for name, value in public.items()}
        state_dict["log_phi"] = public["psi"] if diagonal == "psi" else log_of(public, "Lambda")
    return monotone_from_state_dict(GMonDEQ, GMonDEQConv2d, "g_mondeq", {"log_phi"}, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    image = GMonDEQConv2d(2, 3, 2, m=0.5)
    image.input_shape = (2, 3, 4)
    models: list[nn.Module] = [GMonDEQ(5, 8, 3, m=0.5), GMonDEQ(6, 7, 3, m=0.3, lipschitz=2.0), image]
    for model in models:
        nn.init.normal_(model.log_phi, std=0.3)  # type: ignore[arg-type]
    return models


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GMonDEQ(inputs, inputs, classes, lipschitz=1.0)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo(
        "G-MonDEQ", "Revay et al. 2020, arXiv:2010.01732", "‖Φ⁻¹U‖‖G‖/m, or prescribed", "GMonDEQ, GMonDEQConv2d"
    )
