"""Elementwise activations σ with slope in [0, 1], and the vector of them that a DAE applies to its rows.

Theorem 3.1 of the paper needs exactly this class: each coordinate monotone and 1-Lipschitz. Every such σ is the
proximal map of a convex f, which is what the splitting solvers use: for α > 0

    prox_{αf}(v) = z   ⟺   z = σ(t)  with  α t + (1 − α) σ(t) = v,

so α = 1 gives σ itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InvalidParameterError, ShapeError, UnsupportedActivationError
from ..foundation.arguments import number
from ..foundation.integrity import recorded


@dataclass(frozen=True)
class Activation:
    """One scalar activation: a name of the table below and its parameter (0 for those that have none).

    Piecewise linear ones have their prox in closed form; that of the smooth ones is found by Newton's method on a
    strictly monotone scalar equation. ``str(activation)`` is read back by `Activation.parse`.

    Raises `UnsupportedActivationError` for an unknown name and `InvalidParameterError` when the parameter puts a slope
    outside [0, 1].
    """

    name: str
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _TABLE:
            raise UnsupportedActivationError("", self.name, f"known names are {', '.join(sorted(_TABLE))}.")
        low, high = _TABLE[self.name].valid
        requirement = f"slopes stay in [0, 1] only for values in [{low:g}, {high:g}]"
        where = f"the parameter of activation {self.name}"
        object.__setattr__(self, "parameter", number(self.parameter, where, requirement, least=low, most=high))

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Read ``"relu"``, ``"leaky_relu(0.1)"``, ...; without a parameter torch's default is taken."""
        name, _, rest = text.partition("(")
        if name not in _TABLE:
            return cls(name)  # raises with the list of names
        try:
            return cls(name, float(rest.rstrip(")")) if rest else _TABLE[name].default)
        except ValueError as error:
            raise UnsupportedActivationError("", text, "the parameter in brackets is not a number.") from error

    def __str__(self) -> str:
        return f"{self.name}({self.parameter!r})" if _TABLE[self.name].valid != (0.0, 0.0) else self.name

    def __call__(self, v: Tensor) -> Tensor:
        """σ(v), elementwise."""
        return _TABLE[self.name].value(v, self.parameter)

    def slope(self, v: Tensor) -> Tensor:
        """σ′(v), elementwise, in [0, 1]; at a kink the derivative torch's own autograd takes."""
        return _TABLE[self.name].slope(v, self.parameter)

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        """prox_{αf}(v) for the convex f with prox_f = σ (module docstring), elementwise; α > 0."""
        if alpha == 1.0:
            return self(v)
        closed = _TABLE[self.name].prox
        return closed(v, self.parameter, alpha) if closed is not None else self._prox_newton(v, alpha)

    @property
    def linear(self) -> bool:
        """σ(v) = v: the identity, and LeakyReLU of slope 1."""
        return self.name == "identity" or (self.name == "leaky_relu" and self.parameter == 1.0)

    @property
    def homogeneous(self) -> bool:
        """σ(c v) = c σ(v) for all c > 0: what the diagonal gauge (FORMULAS L4) needs."""
        return self.name in ("identity", "relu", "leaky_relu")

    def _prox_newton(self, v: Tensor, alpha: float) -> Tensor:
        # φ(t) = αt + (1−α)σ(t) − v increases with slope between min(α, 1) and max(α, 1): bracket, safeguarded Newton.
        offset = v - (1.0 - alpha) * self(torch.zeros_like(v))
        ends = torch.stack([offset / min(alpha, 1.0), offset / max(alpha, 1.0)])
        low, high = ends.amin(0), ends.amax(0)
        t = 0.5 * (low + high)
        for _ in range(60):  # halving alone reaches the last bit of float64; Newton usually needs five
            value = alpha * t + (1.0 - alpha) * self(t) - v
            low, high = torch.where(value < 0, t, low), torch.where(value > 0, t, high)
            newton = t - value / (alpha + (1.0 - alpha) * self.slope(t))
            following = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
            step, t = (following - t).abs(), following
            if bool((step <= 4.0 * torch.finfo(v.dtype).eps * (1.0 + t.abs())).all()):
                break
        return self(t)


def _is_number(value: object) -> TypeGuard[float | int]:
    """Not a truth value, tensor or string, which a comparison may take for one."""
    return isinstance(value, float | int) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Rule:
    """value(v, a), slope(v, a), prox(v, a, alpha) or None, the range of a that keeps slopes in [0, 1], torch's default a."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]
    prox: Callable[[Tensor, float, float], Tensor] | None = None
    valid: tuple[float, float] = (0.0, 0.0)
    default: float = 0.0


def _clamp(low: float | None, high: float | None) -> _Rule:
    # A projection: f is the indicator of [low, high], so prox_{αf} is the projection for every α.
    low_, high_ = -math.inf if low is None else low, math.inf if high is None else high
    return _Rule(
        lambda v, a: v.clamp(low, high),
        lambda v, a: ((v > low_) & (v < high_)).to(v.dtype),
        lambda v, a, alpha: v.clamp(low, high),
    )


_TABLE: dict[str, _Rule] = {
    "identity": _Rule(lambda v, a: v, lambda v, a: torch.ones_like(v), lambda v, a, alpha: v),
    "relu": _clamp(0.0, None),
    "relu6": _clamp(0.0, 6.0),
    "hardtanh": _clamp(-1.0, 1.0),
    "leaky_relu": _Rule(
        lambda v, a: functional.leaky_relu(v, a),
        lambda v, a: torch.where(v > 0, torch.ones_like(v), a),
        lambda v, a, alpha: torch.where(v >= 0, v, v * (a / (a + alpha * (1.0 - a)))),
        valid=(0.0, 1.0),
        default=0.01,
    ),
    "elu": _Rule(
        lambda v, a: functional.elu(v, alpha=a),
        lambda v, a: torch.where(v > 0, torch.ones_like(v), a * torch.exp(v.clamp(max=0.0))),
        valid=(0.0, 1.0),
        default=1.0,
    ),
    # log(1 + exp(a v)) / a: slope sigmoid(a v), in (0, 1) for every a > 0
    "softplus": _Rule(
        lambda v, a: torch.logaddexp(a * v, torch.zeros_like(v)) / a,
        lambda v, a: torch.sigmoid(a * v),
        valid=(1e-6, 1e6),
        default=1.0,
    ),
    "tanh": _Rule(lambda v, a: torch.tanh(v), lambda v, a: 1.0 - torch.tanh(v) ** 2),
    "sigmoid": _Rule(lambda v, a: torch.sigmoid(v), lambda v, a: torch.sigmoid(v) * torch.sigmoid(-v)),
}


# exp of it is finite in float32.
MOST_THRESHOLD = 88.0

_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.Softplus: "softplus",
}
_PARAMETERS = {nn.LeakyReLU: "negative_slope", nn.ELU: "alpha", nn.Softplus: "beta"}
# The least and greatest value of attributes that are no parameter here. Softplus becomes linear beyond its threshold, with a
# step of exp(−threshold)/beta; beyond 88, exp overflows in float32 before it does.
_FIXED: dict[type[nn.Module], dict[str, tuple[float, float]]] = {
    nn.ReLU6: {"min_val": (0.0, 0.0), "max_val": (6.0, 6.0)},
    nn.Hardtanh: {"min_val": (-1.0, -1.0), "max_val": (1.0, 1.0)},
    nn.Softplus: {"threshold": (20.0, MOST_THRESHOLD)},
}
_REFUSED = {
    "GELU": "its slope is negative below -0.75 and above 1 beyond 0.84.",
    "SiLU": "its slope leaves [0, 1].",
    "Mish": "its slope leaves [0, 1].",
    "Hardswish": "its slope leaves [0, 1].",
    "PReLU": "its slope is a free parameter; replace it by LeakyReLU once it is trained.",
    "SELU": "its slope is 1.05 right of 0 and up to 1.76 left of it.",
    "CELU": "it is not in the table; ELU is.",
    "Softmax": "it is not elementwise.",
    "LogSoftmax": "it is not elementwise.",
    "MaxMin": "it mixes pairs of coordinates. lipconvert.MaxMin, with pairs (i, i + c/2), is converted exactly.",
    "GroupSort": "it mixes groups of coordinates. For groups of two lipconvert.MaxMin is converted exactly.",
    "Abs": "its slope is -1 left of 0.",
}


@recorded()
class MaxMin(nn.Module):
    """(a, b) ↦ (max(a, b), min(a, b)) on the halves of the channels, (B, c, ...) → (B, c, ...), c even; 1-Lipschitz.

    Not elementwise, but exactly one residual step of ReLUs (`lipconvert.max_min`).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] % 2:
            raise ShapeError("the input of MaxMin", "(B, an even number of channels, ...)", tuple(x.shape))
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise activation: in the table, the identity apart, or refused by name."""
    known = type(module) in _MODULES or (type(module).__name__ in _REFUSED and type(module) is not MaxMin)
    return known and not isinstance(module, nn.Identity)


def activation_of(module: nn.Module | str | Activation, path: str = "") -> Activation:
    """The `Activation` that a torch module (or a name such as ``"leaky_relu(0.1)"``) applies; ``path`` is for the message.

    Raises `UnsupportedActivationError` for anything that is not elementwise with slope in [0, 1]: GELU and SiLU have
    negative slopes, |x| has slope −1, MaxMin and GroupSort mix coordinates, PReLU's slope is free.

    A parameter is a Python number: NaN, tensors and truth values are refused, and so is a ReLU6 or Hardtanh of another range.

    torch's Softplus switches to v beyond its threshold (a step of exp(−threshold)/beta, 2e-9 by default); ours does not.
    """
    if isinstance(module, Activation):
        return module
    if isinstance(module, str):
        return Activation.parse(module)
    kind = type(module)
    if kind not in _MODULES:
        raise UnsupportedActivationError(path, kind.__name__, _REFUSED.get(kind.__name__, "it is not in the table."))
    parameter = _PARAMETERS.get(kind)
    for name in (*_FIXED.get(kind, ()), *((parameter,) if parameter else ())):
        value, (low, high) = getattr(module, name), _FIXED.get(kind, {}).get(name, (-math.inf, math.inf))
        if not _is_number(value):
            reason = f"its {name} is {value!r} ({type(value).__name__}), not a Python number."
            raise UnsupportedActivationError(path, kind.__name__, reason)
        if not low <= value <= high and name != parameter:
            wanted = f"{low:g}" if low == high else f"within [{low:g}, {high:g}]"
            raise UnsupportedActivationError(path, kind.__name__, f"its {name} is {value!r}, and must be {wanted}.")
    value = getattr(module, parameter) if parameter else 0.0
    try:
        return Activation(_MODULES[kind], value)
    except InvalidParameterError as error:
        raise UnsupportedActivationError(path, f"{kind.__name__}({value!r})", str(error)) from error


def without_writing(module: nn.Module) -> nn.Module:
    """An activation that leaves its input as it is: the module itself, or a copy of one in place."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module


def activation_module(activation: Activation | str) -> nn.Module:
    """The torch module of an activation (the inverse of `activation_of`)."""
    activation = activation_of(activation)
    kind = next(kind for kind, name in _MODULES.items() if name == activation.name)
    return kind(**{_PARAMETERS[kind]: activation.parameter}) if kind in _PARAMETERS else kind()


class Activations:
    """σ of a whole state: runs of `Activation`, one per row (channel), applied along dimension 1 of a batch.

    ``Activations("relu", 5)`` is ReLU on five rows; ``a + b`` stacks; ``a[i:j]`` restricts; iteration gives the runs as
    ``(activation, size)``. Shapes: (B, n, ...) → (B, n, ...); a single state (n,) is taken too.
    """

    def __init__(self, activation: Activation | str, size: int) -> None:
        if size < 0:
            raise InvalidParameterError("the number of rows of an activation", size, "it must not be negative")
        self.runs: tuple[tuple[Activation, int], ...] = ((activation_of(activation), int(size)),) if size else ()

    @classmethod
    def of(cls, runs: Iterable[tuple[Activation | str, int]]) -> Activations:
        """Stack runs, merging neighbours that agree."""
        merged: list[tuple[Activation, int]] = []
        for activation, size in runs:
            activation = activation_of(activation)
            if size < 0:
                raise InvalidParameterError("the number of rows of an activation", size, "it must not be negative")
            if size == 0:
                continue
            if merged and merged[-1][0] == activation:
                merged[-1] = (activation, merged[-1][1] + size)
            else:
                merged.append((activation, int(size)))
        self = cls("identity", 0)
        self.runs = tuple(merged)
        return self

    @property
    def homogeneous(self) -> bool:
        """Whether every row is positively homogeneous."""
        return all(activation.homogeneous for activation, _ in self.runs)

    def __len__(self) -> int:
        return sum(size for _, size in self.runs)

    def __iter__(self) -> Iterator[tuple[Activation, int]]:
        return iter(self.runs)

    def __add__(self, other: Activations) -> Activations:
        return Activations.of((*self.runs, *other.runs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activations) and self.runs == other.runs

    def __hash__(self) -> int:
        return hash(self.runs)

    def __repr__(self) -> str:
        return "Activations(" + ", ".join(f"{activation} x {size}" for activation, size in self.runs) + ")"

    def __getitem__(self, rows: slice) -> Activations:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise InvalidParameterError("the step of a slice of activations", step, "only consecutive rows are taken")
        picked, offset = [], 0
        for activation, size in self.runs:
            low, high = max(start, offset), min(stop, offset + size)
            picked.append((activation, max(high - low, 0)))
            offset += size
        return Activations.of(picked)

    def take(self, samples: Tensor | slice) -> Activations:
        """The activations of some samples of a batch: the same for all (solvers ask; see `lipconvert.equilibria.solvers`)."""
        del samples
        return self

    def __call__(self, v: Tensor) -> Tensor:
        """σ(v), (B, n, ...) → (B, n, ...)."""
        return self._apply(v, lambda activation, part: activation(part))

    def slope(self, v: Tensor) -> Tensor:
        """σ′(v), (B, n, ...) → (B, n, ...)."""
        return self._apply(v, lambda activation, part: activation.slope(part))

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        """prox_{αf}(v), (B, n, ...) → (B, n, ...)."""
        return self._apply(v, lambda activation, part: activation.prox(part, alpha))

    def _apply(self, v: Tensor, function: Callable[[Activation, Tensor], Tensor]) -> Tensor:
        rows = min(1, v.dim() - 1)
        if v.shape[rows] != len(self):
            raise ShapeError("state", f"(B, {len(self)}, ...)", tuple(v.shape))
        if len(self.runs) == 1:
            return function(self.runs[0][0], v)
        parts = v.split([size for _, size in self.runs], dim=rows)
        return torch.cat([function(a, part) for (a, _), part in zip(self.runs, parts, strict=True)], dim=rows)
