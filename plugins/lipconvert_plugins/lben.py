"""A Lipschitz-bounded equilibrium network trained from scratch: the paper's baseline (Revay et al. 2020; paper eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, LBEN, PluginInfo, computes_as, hookimpl, required_option

from ._layouts import diagonal_of, log_of, require_shape, unwrapped

KEYS = {"log_psi", "G", "U", "V", "S", "b_z", "b_y"}
PUBLIC = {"B.weight", "B.bias", "V.weight", "S.weight", "G.weight", "G.bias"}


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    """Λ = Ψ⁻¹, for which H = 2V′V + 2εI (FORMULAS 0.6)."""
    return model.dae() if computes_as(model, LBEN) else None


@hookimpl
def nonlinear_states(model: nn.Module) -> int | None:
    if not computes_as(model, LBEN):
        return None
    return sum(count for activation, count in model.sigma if activation.name != "identity")


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or those of Revay et al.'s code: ``B`` = (U, b_z), ``V``, ``S``, ``G`` = (G, b_y), and

    * ``psi`` = log Ψ with W = I − Ψ(G′G/2γ + Ψ⁻¹BB′Ψ⁻¹/2γ + V′V + mI + S′ − S); its m is our ``epsilon``;
    * ``Lambda`` = Λ, older, with W = ½Λ⁻¹(2Λ − G′G/γ − ΛBB′Λ/γ − V′V − mI + S′ − S); ``m`` is asked for, 2ε.

    W is rebuilt so that condition (10) holds for *any* γ and ε > 0: a wrong one is another network, which nothing in
    the file can tell. Compare with its authors' test error.
    """
    tensors, epsilon = state_dict, "epsilon"
    public = unwrapped(state_dict, "V.weight")
    if diagonal := diagonal_of(public, PUBLIC, "lben"):
        tensors = _from_public(public, diagonal)
        epsilon = "m" if diagonal == "Lambda" else epsilon
    if not KEYS <= set(tensors) <= KEYS | {"_extra_state"}:
        return None
    U = tensors["U"]
    given: dict[str, Any] = {}
    if "_extra_state" not in tensors:  # written as safetensors, or by other code: L and ε are not there
        given["lipschitz"] = required_option(options, "lipschitz", "lben", "the prescribed constant γ", float)
        meaning = "ε of eq. 2" if epsilon == "epsilon" else "m of W = ½Λ⁻¹(2Λ − ... − V'V − mI + S' − S)"
        given["epsilon"] = required_option(options, epsilon, "lben", meaning, float) / (1.0 if epsilon != "m" else 2.0)
        given["activation"] = required_option(options, "activation", "lben", "relu, tanh, ...")
    model = LBEN(U.shape[1], len(U), len(tensors["b_y"]), **given, image=tuple(U.shape[2:])).to(U.dtype)
    model.load_state_dict(tensors, strict=not given)
    return model


def _from_public(tensors: Mapping[str, Tensor], diagonal: str) -> dict[str, Tensor]:
    """A public layout as ours, which has S − S′ where these have S′ − S or, with Λ, (S − S′)/2."""
    n, q = tensors[diagonal].numel(), len(tensors["G.bias"])
    shapes = {diagonal: (n,), "B.bias": (n,), "V.weight": (n, n), "S.weight": (n, n), "G.weight": (q, n)}
    for name, shape in shapes.items():
        require_shape(tensors[name], name, shape)
    require_shape(tensors["B.weight"], "B.weight", (n, tensors["B.weight"].shape[-1]))
    V, S = tensors["V.weight"], tensors["S.weight"]
    return {
        "log_psi": tensors["psi"] if diagonal == "psi" else -log_of(tensors, "Lambda"),
        "G": tensors["G.weight"],
        "U": tensors["B.weight"],
        "V": V if diagonal == "psi" else V / 2.0**0.5,
        "S": S.mT.contiguous() if diagonal == "psi" else S / 2.0,
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
