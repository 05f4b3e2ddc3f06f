"""A Lipschitz-bounded equilibrium network trained from scratch: the paper's baseline (Revay et al. 2020; paper eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, LBEN, PluginInfo, computes_as, hookimpl, required_option

KEYS = {"log_psi", "G", "U", "V", "S", "b_z", "b_y"}


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    """Λ = Ψ⁻¹, for which H = 2V′V + 2εI (FORMULAS 0.6)."""
    return model.dae() if computes_as(model, LBEN) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    if not KEYS <= set(state_dict) <= KEYS | {"_extra_state"}:
        return None
    n, p = state_dict["U"].shape
    given: dict[str, Any] = {}
    if "_extra_state" not in state_dict:  # written as safetensors, or by other code: L and ε are not there
        needed = {"lipschitz": "the prescribed constant γ", "epsilon": "ε of eq. 2", "activation": "relu, tanh, ..."}
        given = {name: required_option(options, name, "lben", meaning) for name, meaning in needed.items()}
        given |= {name: float(given[name]) for name in ("lipschitz", "epsilon")}
    model = LBEN(p, n, len(state_dict["b_y"]), **given).to(state_dict["U"].dtype)
    model.load_state_dict(state_dict, strict=not given)
    return model


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [LBEN(5, 8, 3), LBEN(4, 6, 2, lipschitz=2.0, epsilon=0.1, activation="tanh")]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LBEN(inputs, inputs, classes)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("LBEN", "Revay et al. 2020, arXiv:2010.01732", "prescribed", "LBEN")
