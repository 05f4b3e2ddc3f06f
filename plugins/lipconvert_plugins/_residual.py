"""Residual layers x − 2WT⁻¹σ(W′x + b) with W′W ⪯ T: what SLL and CPL share (FORMULAS 1.1, paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    Activations,
    FirstFeatures,
    PadChannels,
    activation_module,
    activation_of,
    psd_sqrt,
    required_option,
)


class ResidualLinear(nn.Module):
    """x → x − 2 W T⁻¹ σ(W′x + b), (..., features) → (..., features), 1-Lipschitz for any positive diagonal T ⪰ W′W.

    ``weight`` (inner, features) holds W′, as in ``nn.Linear(features, inner)``. Subclasses say what `T` is. ``activation``
    is elementwise with slope in [0, 1], ReLU by default.
    """

    def __init__(
        self, features: int, inner: int | None = None, bias: bool = True, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.features, self.inner = features, features if inner is None else inner
        self.weight = nn.Parameter(torch.empty(self.inner, features))
        self.bias = nn.Parameter(torch.zeros(self.inner)) if bias else None
        self.activation = nn.ReLU() if activation is None else activation
        nn.init.xavier_normal_(self.weight)

    def T(self) -> Tensor:
        """The diagonal of T, (inner,), positive."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(functional.linear(x, self.weight, self.bias))
        return x - 2.0 * functional.linear(s / self.T(), self.weight.mT)

    def extra_repr(self) -> str:
        return f"features={self.features}, inner={self.inner}, bias={self.bias is not None}"


def residual_dae(layer: ResidualLinear) -> DAE:
    """One layer as a DAE: z = [x; s], R = 2WT⁻¹,

        W = [[0, 0], [W′, 0]],  U = [I; 0],  G = [I, −R],  Λ = blkdiag(I, 2T⁻¹),  L = 1,
        H = blkdiag(0, 4T⁻¹ − 4T⁻¹W′WT⁻¹),  V = [0, √2 F T⁻¹],  F′F = T − W′W                         (FORMULAS 1.1)

    F = (I − T^{-1/2}W′WT^{-1/2})^{1/2} T^{1/2}: the root is taken of a matrix between 0 and I, whatever the scale of T.
    Raises `NotPSDError` when W′W ⋠ T: the layer is then not 1-Lipschitz.
    """
    weight, T = layer.weight.detach(), layer.T().detach()
    h, d = weight.shape
    eye_d, eye_h = torch.eye(d, dtype=weight.dtype), torch.eye(h, dtype=weight.dtype)
    scaled = weight / T.sqrt().unsqueeze(-1)
    root = psd_sqrt(eye_h - scaled @ scaled.mT, "I - T^{-1/2} W'W T^{-1/2} (W'W must not exceed T)", scale=1.0)
    zero = weight.new_zeros
    return DAE(
        W=torch.cat([zero(d, d + h), torch.cat([weight, zero(h, h)], 1)]),
        U=torch.cat([eye_d, zero(h, d)]),
        G=torch.cat([eye_d, -2.0 * weight.mT / T], 1),
        Lambda=torch.cat([zero(d) + 1.0, 2.0 / T]),
        b_z=torch.cat([zero(d), zero(h) if layer.bias is None else layer.bias.detach()]),
        activations=Activations("identity", d) + Activations(activation_of(layer.activation), h),
        V=torch.cat([zero(h, d), 2.0**0.5 * root / T.sqrt()], 1),
        blocks=(d, h),
    )


class ResidualNetwork(nn.Sequential):
    """Zero-pad the flat input to ``features``, ``dense_depth`` residual layers, the first ``classes`` features as logits."""

    layer: type[ResidualLinear]
    prefix: str

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        features: int | None = None,
        dense_depth: int = 2,
        dense_inner: int | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width = max(inputs, classes) if features is None else features
        self.input_shape = (inputs,)
        if width != inputs:
            self.add_module("pad", PadChannels(width))
        for k in range(dense_depth):
            self.add_module(f"{self.prefix}{k}", self.layer(width, dense_inner, activation=activation))
        self.add_module("head", FirstFeatures(classes))


def residual_from_state_dict(
    network: type[ResidualNetwork], state_dict: Mapping[str, Tensor], options: Mapping[str, Any]
) -> nn.Module | None:
    """A `ResidualNetwork` from its own state dict, None if it is not one.

    ``inputs``, ``classes`` and ``activation`` must be given: the tensors do not say them."""
    layers = {key.split(".")[0] for key in state_dict}
    if layers != {f"{network.prefix}{k}" for k in range(len(layers))} or f"{network.prefix}0.weight" not in state_dict:
        return None
    needed = {
        "inputs": "size of the flat input before padding",
        "classes": "number of logits",
        "activation": "relu, tanh, leaky_relu(0.1), ...",
    }
    given = {name: required_option(options, name, network.prefix, meaning) for name, meaning in needed.items()}
    inner, features = state_dict[f"{network.prefix}0.weight"].shape
    model = network(
        inputs=int(given["inputs"]),
        classes=int(given["classes"]),
        features=features,
        dense_depth=len(layers),
        dense_inner=inner,
        activation=activation_module(given["activation"]),
    )
    model.to(state_dict[f"{network.prefix}0.weight"].dtype).load_state_dict(state_dict)
    return model
