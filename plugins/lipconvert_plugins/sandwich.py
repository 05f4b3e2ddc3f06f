"""Sandwich layers (Wang & Manchester 2023): √2 A′Φσ(√2 Φ⁻¹Bx + b), [A B] from a Cayley transform (paper section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipconvert import (
    DAE,
    Activations,
    InvalidParameterError,
    PluginInfo,
    activation_module,
    activation_of,
    affine,
    computes_as,
    hookimpl,
    required_option,
)


def cayley(M: Tensor) -> Tensor:
    """A matrix with orthonormal columns from any tall M = [X; Y], X (c, c): (r, c) → (r, c), r ≥ c.

    Z = X − X′ + Y′Y,  [ (I + Z)⁻¹(I − Z);  −2Y(I + Z)⁻¹ ]                                             (FORMULAS 4)
    """
    c = M.shape[1]
    X, Y = M[:c], M[c:]
    eye = torch.eye(c, dtype=M.dtype, device=M.device)
    Z = X - X.mT + Y.mT @ Y
    stacked = torch.linalg.solve(eye + Z, torch.cat([eye - Z, eye], 1))
    return torch.cat([stacked[:, :c], -2.0 * Y @ stacked[:, c:]])


class SandwichLinear(nn.Module):
    """x → √2 A′Φσ(√2 Φ⁻¹B·scale·x + b), or x → scale·Bx + b without activation; Lipschitz constant ``scale``.

    ``SandwichLinear(in_features, out_features, bias=True, activation=nn.ReLU(), scale=1.0)``; ``activation=None`` is the
    linear last layer of a network. AA′ + BB′ = I from the Cayley transform of ``weight`` (out, out + in), rescaled to
    Frobenius norm ``alpha``; Φ = exp(``psi``) > 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 < scale < float("inf"):
            raise InvalidParameterError("scale", scale, "it is the layer's Lipschitz constant, which must be positive")
        self.in_features, self.out_features, self.scale = in_features, out_features, float(scale)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_features, out_features + in_features))
        nn.init.xavier_normal_(self.weight)
        self.alpha = nn.Parameter(torch.linalg.vector_norm(self.weight.detach()))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if activation is not None:
            self.psi = nn.Parameter(torch.zeros(out_features))

    def AB(self) -> tuple[Tensor, Tensor]:
        """A (out, out) and B (out, in) with AA′ + BB′ = I."""
        size = torch.linalg.vector_norm(self.weight)
        Q = cayley((self.alpha / torch.where(size > 0, size, torch.ones_like(size)) * self.weight).mT)
        return Q[: self.out_features].mT, Q[self.out_features :].mT

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.AB()
        if self.activation is None:
            return functional.linear(x, self.scale * B, self.bias)
        phi = self.psi.exp()
        v = functional.linear(x, 2.0**0.5 * self.scale * B / phi.unsqueeze(-1), self.bias)
        return functional.linear(self.activation(v), 2.0**0.5 * A.mT * phi)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"


class SandwichNetwork(nn.Sequential):
    """``dense_depth`` sandwich layers and a linear one, of prescribed Lipschitz constant L: √L in front, √L behind."""

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        features: int | None = None,
        dense_depth: int = 2,
        lipschitz: float = 1.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < lipschitz < float("inf"):
            raise InvalidParameterError("lipschitz", lipschitz, "a prescribed constant must be positive")
        self.input_shape = (inputs,)
        widths = [inputs, *[inputs if features is None else features] * dense_depth, classes]
        root = lipschitz**0.5
        for k in range(dense_depth + 1):
            last = k == dense_depth
            act = None if last else (nn.ReLU() if activation is None else activation)
            scale = lipschitz if dense_depth == 0 else root if k == 0 or last else 1.0
            self.add_module(f"sandwich{k}", SandwichLinear(widths[k], widths[k + 1], activation=act, scale=scale))


@hookimpl
def to_dae(model: nn.Module) -> DAE | None:
    """With an activation: U = √2·scale·Φ⁻¹B, G = √2A′Φ, Λ = Φ²/scale, for which H = 0; a chain is (22) (FORMULAS 1.3)."""
    if not computes_as(model, SandwichLinear):
        return None
    A, B = model.AB()
    if model.activation is None:
        return affine(model.scale * B, model.bias, lipschitz=model.scale)
    phi, n = model.psi.exp(), model.out_features
    return DAE(
        W=A.new_zeros(n, n),
        U=2.0**0.5 * model.scale * B / phi.unsqueeze(-1),
        G=2.0**0.5 * A.mT * phi,
        Lambda=phi**2 / model.scale,
        b_z=model.bias,
        activations=Activations(activation_of(model.activation), n),
        lipschitz=model.scale,
        V=A.new_zeros(0, n),
    )


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    layers = {key.split(".")[0] for key in state_dict}
    if layers != {f"sandwich{k}" for k in range(len(layers))} or "sandwich0.alpha" not in state_dict:
        return None
    lipschitz = required_option(options, "lipschitz", "sandwich", "the prescribed constant γ of the network")
    shapes = [tuple(state_dict[f"sandwich{k}.weight"].shape) for k in range(len(layers))]
    model = SandwichNetwork(
        inputs=shapes[0][1] - shapes[0][0],
        classes=shapes[-1][0],
        features=shapes[0][0],
        dense_depth=len(layers) - 1,
        lipschitz=float(lipschitz),
        activation=activation_module(
            required_option(options, "activation", "sandwich", "relu, tanh, leaky_relu(0.1), ...")
        ),
    ).to(state_dict["sandwich0.weight"].dtype)
    model.load_state_dict(state_dict)
    return model


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        SandwichNetwork(inputs=5, classes=3, features=8, dense_depth=3, lipschitz=2.5),
        SandwichNetwork(inputs=6, classes=4, features=3, dense_depth=1, activation=nn.Tanh()),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SandwichNetwork(inputs=inputs, classes=classes, dense_depth=2)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo(
        "Sandwich", "Wang & Manchester 2023, arXiv:2301.11526", "prescribed", "SandwichLinear, SandwichNetwork"
    )
