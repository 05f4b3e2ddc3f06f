"""A Lipschitz-bounded equilibrium network trained from scratch: the paper's baseline (Revay et al. 2020; paper eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, LBEN, PluginInfo, computes_as, hookimpl, required_option

KEYS = {"log_psi", "G", "U", "V", "S", "b_z", "b_y"}
PUBLIC = {"psi", "B.weight", "B.bias", "V.weight", "S.weight", "G.weight", "G.bias"}


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    """Λ = Ψ⁻¹, for which H = 2V′V + 2εI (FORMULAS 0.6)."""
    return model.dae() if computes_as(model, LBEN) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or that of Revay et al.'s code: ``psi`` = log Ψ, ``B`` = (U, b_z), ``V``, ``S``, ``G`` = (G, b_y)."""
    prefix = next((key.removesuffix("psi") for key in state_dict if key.endswith("psi")), None)
    if prefix is not None and {key.removeprefix(prefix) for key in state_dict} == PUBLIC:
        state_dict = _from_public({key.removeprefix(prefix): value for key, value in state_dict.items()})
    if not KEYS <= set(state_dict) <= KEYS | {"_extra_state"}:
        return None
    U = state_dict["U"]
    given: dict[str, Any] = {}
    if "_extra_state" not in state_dict:  # written as safetensors, or by other code: L and ε are not there
        needed = {"lipschitz": "the prescribed constant γ", "epsilon": "ε of eq. 2", "activation": "relu, tanh, ..."}
        given = {name: required_option(options, name, "lben", meaning) for name, meaning in needed.items()}
        given |= {name: float(given[name]) for name in ("lipschitz", "epsilon")}
    model = LBEN(U.shape[1], len(U), len(state_dict["b_y"]), **given, image=tuple(U.shape[2:])).to(U.dtype)
    model.load_state_dict(state_dict, strict=not given)
    return model


def _from_public(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public layout as ours. It adds S′ − S where paper eq. (2) has S − S′; its m is our ε."""
    return {
        "log_psi": tensors["psi"],
        "G": tensors["G.weight"],
        "U": tensors["B.weight"],
        "V": tensors["V.weight"],
        "S": tensors["S.weight"].mT.contiguous(),
        "b_z": tensors["B.bias"],
        "b_y": tensors["G.bias"],
    }


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        LBEN(5, 8, 3),
        LBEN(4, 6, 2, lipschitz=2.0, epsilon=0.1, activation="tanh"),
        LBEN(2, 3, 2, image=(4, 3)),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LBEN(inputs, inputs, classes)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("LBEN", "Revay et al. 2020, arXiv:2010.01732", "prescribed", "LBEN")
