"""A lipconvert plugin: networks of linear layers kept orthogonal by torch's own parametrisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import is_parametrized

import lipconvert as lc

__all__ = ["OrthogonalNetwork"]

# torch does not export the class of its parametrisation: read it off a layer.
_ORTHOGONAL = type(orthogonal(nn.Linear(1, 1)).parametrizations.weight[0])  # type: ignore[union-attr, index]


class OrthogonalNetwork(nn.Sequential):
    """Linear layers with orthonormal rows or columns, and activations between them; 1-Lipschitz.

    ``OrthogonalNetwork(inputs=64, classes=10, features=64, depth=2)`` has ``depth`` hidden layers. ``activation`` is
    elementwise with slope in [0, 1], ReLU by default.
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        features: int | None = None,
        depth: int = 2,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = (inputs,)
        widths = [inputs, *[inputs if features is None else features] * depth, classes]
        for k in range(depth + 1):
            # Without trivialisation the weight is computed from the parameters alone, so it is orthogonal to the
            # precision they are cast to, not to the one they were created in.
            self.add_module(f"linear{k}", orthogonal(nn.Linear(widths[k], widths[k + 1]), use_trivialization=False))
            if k < depth:
                self.add_module(f"activation{k}", nn.ReLU() if activation is None else activation)


def _orthogonal_weight(model: nn.Module) -> Tensor | None:
    """The weight of an orthogonally parametrised linear layer, None for anything else."""
    if not isinstance(model, nn.Linear) or not is_parametrized(model, "weight"):
        return None
    chain = model.parametrizations["weight"]  # type: ignore[index]
    # A second parametrisation behind it may have undone orthogonality.
    return model.weight if len(chain) == 1 and isinstance(chain[0], _ORTHOGONAL) else None  # type: ignore[arg-type]


@lc.hookimpl
def to_dae(model: nn.Module) -> lc.DAE | None:
    """One layer as identity rows. `lc.affine` states an upper bound of the norm: weights trained in float32 are orthogonal
    to 1e-7 only, and 1 would not be their constant."""
    weight = _orthogonal_weight(model)
    return None if weight is None else lc.affine(weight, model.bias)  # type: ignore[arg-type]


@lc.hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        OrthogonalNetwork(inputs=5, classes=3, features=7, depth=3),
        OrthogonalNetwork(inputs=4, classes=2, activation=nn.Tanh()),  # one module, used twice
    ]


@lc.hookimpl
def new_model(inputs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return OrthogonalNetwork(inputs=inputs, classes=classes)


@lc.hookimpl
def describe() -> lc.PluginInfo:
    return lc.PluginInfo(
        name="Orthogonal",
        paper="Lezcano-Casado & Martinez-Rubio 2019, arXiv:1901.08428",
        lipschitz="Π‖Wₖ‖ (1 up to round-off)",
        covers="nn.Linear under torch.nn.utils.parametrizations.orthogonal, OrthogonalNetwork",
    )
