"""SDP-based Lipschitz layers (Araujo et al. 2023): T_ii = Σ_j |W′W|_ij q_j/q_i, q free and positive (paper eq. 9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipconvert import DAE, InvalidParameterError, PluginInfo, computes_as, hookimpl, required_option

from ._convolution import small_images
from ._layouts import Layer, dotted, vector
from ._residual import (
    Residual,
    ResidualConv2d,
    ResidualLinear,
    ResidualNetwork,
    residual_dae,
    residual_from_layers,
    residual_from_state_dict,
    residual_states,
)


class _SLL(Residual):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log_q = nn.Parameter(torch.zeros(self.inner))

    def T(self, image: tuple[int, ...] = ()) -> Tensor:
        # The differences, not q itself: T does not change when q is scaled, and no q underflows to 0/0. Where a column is
        # orthogonal to another one, their ratio does not matter, however large.
        gram = self.gram()
        ratio = (self.log_q - self.log_q.unsqueeze(-1)).masked_fill(gram == 0, 0.0).exp()
        T = (gram * ratio).sum(-1)
        return torch.where(T > 0, T, torch.ones_like(T))


class SLLLinear(_SLL, ResidualLinear):
    """x → x − 2WT⁻¹σ(W′x + b) with T_ii = Σ_j |W′W|_ij q_j/q_i, 1-Lipschitz. (paper eq. 9)

    ``SLLLinear(features, inner=None, bias=True, activation=None)``. q = exp(``log_q``) as in the authors' later code; the
    paper's own uses |q|. A zero column of W makes T_ii = 0: the neuron is dead, and T_ii = 1 stands for it (FORMULAS 2).
    """


class SLLConv2d(_SLL, ResidualConv2d):
    """The same layer with a circular convolution W′, (B, features, h, w) → (B, features, h, w), 1-Lipschitz.

    ``SLLConv2d(features, inner=None, kernel_size=3, bias=True, activation=None, padding_mode="circular")``.
    T_i = Σ_j q_j/q_i Σ_s |C_ij[s]| for the autocorrelation C of the kernel, q per channel: independent of the image's size.
    """


class SLLNetwork(ResidualNetwork):
    """``SLLNetwork(inputs=64, classes=10, features=64, dense_depth=2)``: pad, SLL layers, first logits; 1-Lipschitz.

    The paper's CIFAR-10 network: ``SLLNetwork(channels=8, inner=5, conv_depth=4, features=512, dense_depth=2, image=32,
    classes=10)``; see `ResidualNetwork` for the arguments.
    """

    linear, conv, prefix = SLLLinear, SLLConv2d, "sll"


@hookimpl
def to_dae(model: nn.Module, input_shape: tuple[int, ...] | None, dense: bool) -> DAE | None:
    return residual_dae(model, input_shape, dense) if computes_as(model, _SLL) else None


@hookimpl
def nonlinear_states(model: nn.Module) -> int | None:
    return residual_states(model) if computes_as(model, _SLL) else None


@hookimpl
def from_state_dict(state_dict: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module | None:
    """Our own layout, or the sequences of layers of public code: ``kernel`` or ``weights``/``weight``, ``bias``, ``q``.

    The files do not say what ``q`` means: option ``q`` is ``abs`` for T with |q| (Havens et al., and everything before
    October 2023), ``exp`` for exp(q) (Araujo et al. since then). Code that adds 1e-6 to |q| or T gives outputs that differ
    by about as much. A zero q divides by zero with ``abs``, and is refused. Where √γ stands before and behind the layers
    (Wang & Manchester), it has to be put there.
    """
    own = residual_from_state_dict(SLLNetwork, state_dict, options)
    if own is not None:
        return own

    def log_q(layer: Layer, path: str, inner: int) -> dict[str, Tensor]:
        rule = required_option(options, "q", "sll", "abs where T is made of |q|, exp where it is made of exp(q)")
        if rule not in ("abs", "exp"):
            raise InvalidParameterError("option 'q'", repr(rule), "it must be abs or exp")
        q = vector(layer, path, "q", inner)
        if rule == "abs" and (zeros := int((q == 0).sum())):
            reason = "T divides by |q|, which must not be zero"
            raise InvalidParameterError(f"tensor {dotted(path, 'q')!r}", f"0 in {zeros} of {inner} entries", reason)
        return {"log_q": q.abs().log() if rule == "abs" else q}

    return residual_from_layers(SLLLinear, SLLConv2d, "sll", "q", set(), log_q, state_dict, options)


@hookimpl
def example_models(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [
        SLLNetwork(inputs=5, classes=3, features=7, dense_depth=3, dense_inner=9),
        SLLNetwork(inputs=4, classes=2, dense_depth=1, activation=nn.Tanh()),
        SLLNetwork(
            image=(6, 4),
            in_channels=2,
            channels=3,
            inner=2,
            conv_depth=2,
            pool=2,
            dense_depth=1,
            dense_inner=5,
            classes=3,
        ),
    ]


@hookimpl
def new_model(inputs: int, classes: int, seed: int, image: tuple[int, int, int] | None) -> nn.Module:
    torch.manual_seed(seed)
    if image is not None:
        return SLLNetwork(**small_images(image), classes=classes, inner=8)
    return SLLNetwork(inputs=inputs, classes=classes, dense_depth=3)


@hookimpl
def describe() -> PluginInfo:
    return PluginInfo("SLL", "Araujo et al. 2023, arXiv:2303.03169", "1", "SLLLinear, SLLConv2d, SLLNetwork")
