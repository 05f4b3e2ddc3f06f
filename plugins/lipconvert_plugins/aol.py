"""Almost-orthogonal layers (Prach & Lampert 2022): P = W̃D, D_ii = (Σ_j |W̃′W̃|_ij)^{-1/2} (paper eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    MissingOptionError,
    PluginInfo,
    activation_module,
    affine,
    computes_as,
    hookimpl,
    required_option,
)


class AOLLinear(nn.Module):
    """x → W̃Dx + b, (..., in_features) → (..., out_features), ‖W̃D‖ ≤ 1. Activations between layers are the user's own.

    ``AOLLinear(in_features, out_features, bias=True)``; ``weight`` (out, in) is W̃. A zero column of W̃ stays zero
    whatever its D_ii is; 1 is taken (the paper's footnote 2 says 0).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        nn.init.orthogonal_(self.weight)

    def P(self) -> Tensor:
        """W̃D, (out, in), of norm at most 1."""
        sums = (self.weight.mT @ self.weight).abs().sum(1)
        return self.weight * torch.where(sums > 0, sums, torch.ones_like(sums)).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.P(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class AOLNetwork(nn.Sequential):
    """``dense_depth`` times AOLLinear and ReLU, then an AOLLinear to the logits; 1-Lipschitz."""

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        features: int | None = None,
        dense_depth: int = 2,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = (inputs,)
        widths = [inputs, *[inputs if features is None else features] * dense_depth, classes]
        for k in range(dense_depth + 1):
            self.add_module(f"aol{k}", AOLLinear(widths[k], widths[k + 1]))
            if k < dense_depth:
                self.add_module(f"activation{k}", nn.ReLU() if activation is None else activation)


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    """One linear layer with Λ = I, L = 1; a chain of them is appendix D.1 (FORMULAS 1.2)."""
    return affine(model.P(), model.bias, lipschitz=1.0) if computes_as(model, AOLLinear) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    layers = {key.split(".")[0] for key in state_dict}
    if layers != {f"aol{k}" for k in range(len(layers))} or "aol0.weight" not in state_dict:
        return None
    shapes = [tuple(state_dict[f"aol{k}.weight"].shape) for k in range(len(layers))]
    if any(shape[0] != shapes[0][0] for shape in shapes[:-1]):
        raise MissingOptionError(
            "aol", "a model", f"hidden layers of different widths {shapes}: build it and load into it"
        )
    model = AOLNetwork(
        inputs=shapes[0][1],
        classes=shapes[-1][0],
        features=shapes[0][0],
        dense_depth=len(layers) - 1,
        activation=activation_module(required_option(options, "activation", "aol", "relu, tanh, leaky_relu(0.1), ...")),
    ).to(state_dict["aol0.weight"].dtype)
    model.load_state_dict(state_dict)
    return model


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        AOLNetwork(inputs=5, classes=3, features=8, dense_depth=3),
        AOLNetwork(inputs=6, classes=4, features=3, dense_depth=1, activation=nn.Softplus(2.0)),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return AOLNetwork(inputs=inputs, classes=classes, dense_depth=2)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("AOL", "Prach & Lampert 2022, arXiv:2208.03160", "1", "AOLLinear, AOLNetwork")
