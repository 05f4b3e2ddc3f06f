"""Solve z = σ(Wz + u), say how it went, and differentiate through the solution.

``solve`` is the solver with its report; ``equilibrium`` is the differentiable function of (W, u). Every sample of a
batch stops on its own residual, so no prediction depends on the samples beside it.

States are given and returned in coordinates (`Grid`): (B, n), or the half spectrum (B, n, F) of images, where W is block
diagonal. σ acts on pixels; that is the only place where anything is transformed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..dae.activations import Activations
from ..dae.dae import DAE
from ..errors import InvalidParameterError, NotConvergedError, ShapeError
from ..foundation import arguments
from ..linalg.spectrum import Grid, autocasts, require_finite
from ..linalg.state_map import StateMap
from .solvers import Elementwise, ForwardBackward, Iteration, Newton, PeacemanRachford, Sweep, forward_substitution

METHODS = ("auto", "forward_substitution", "sweep", "peaceman_rachford", "forward_backward", "newton")

# Relative to `Solution.scale`. About 500 and 20 units round-off: evaluating σ(Wz + u) with a few hundred states errs by
# less, and two runs of one sample that stop a step apart still agree to 1e-12 in float64.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


class Status(IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2


@dataclass(frozen=True)
class Solution:
    """The states found and how it went, sample by sample.

    ``value`` (B, n), or (B, n, F) on a grid; ``residual`` (B,): ‖z − σ(Wz + u)‖₂ or an upper bound of it; ``scale`` (B,):
    ‖z‖ + ‖u‖ + ‖Wz‖ (‖z‖ alone after forward substitution), which the tolerance refers to; ``steps`` (B,) iterations (1 for
    forward substitution); ``status`` (B,) of `Status`; ``method``: the method that ran, ``"sweep, peaceman_rachford"`` when
    a second one took over.
    """

    value: Tensor
    residual: Tensor
    scale: Tensor
    steps: Tensor
    status: Tensor
    method: str

    @property
    def converged(self) -> Tensor:
        """(B,) bool."""
        return self.status == Status.CONVERGED

    @property
    def relative_residual(self) -> Tensor:
        """(B,) residual / scale, 0 where both are 0."""
        return torch.where(self.residual == 0, self.residual, self.residual / self.scale)


@dataclass(frozen=True)
class SolverOptions:
    """How to solve. ``method``: one of `METHODS`; ``tolerance``: relative residual, None for the dtype's default (1e-13
    in float64, 2e-6 in float32); ``max_steps``: of one sample, in all; ``throw``: raise `NotConvergedError` rather
    than hand back an unconverged `Solution`. ``alpha``: the step of ``peaceman_rachford`` and ``forward_backward``, None for
    the map's own.

    ``auto`` takes forward substitution when one pass meets the tolerance (a triangular W, exactly or to round-off), block
    sweeps when W is close to triangular (then Peaceman-Rachford for the samples they leave), else Peaceman-Rachford, at
    first with its fast step; samples that stall go to Newton, and if that fails to the safe step
    (`StateMap.splitting_steps`).
    """

    method: str = "auto"
    tolerance: float | None = None
    max_steps: int = 5000
    throw: bool = True
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidParameterError("method", repr(self.method), f"it must be one of {', '.join(METHODS)}")
        if self.tolerance is not None:
            object.__setattr__(
                self, "tolerance", arguments.number(self.tolerance, "tolerance", "it must be positive", above=0.0)
            )
        object.__setattr__(
            self, "max_steps", arguments.count(self.max_steps, "max_steps", "at least one step is needed")
        )
        if self.alpha is not None:
            if self.method not in ("peaceman_rachford", "forward_backward"):
                raise InvalidParameterError("alpha", self.alpha, f"{self.method} has no step of its own")
            object.__setattr__(
                self, "alpha", arguments.number(self.alpha, "alpha", "a step must be positive", above=0.0)
            )


DEFAULT = SolverOptions()

# Bytes of states solved for at a time on a CPU: what outgrows the cache, and what an allocator keeps, takes three
# times as long.
PORTION = 2**22

# ‖W − T‖ up to which sweeps are tried first: they gain about a digit for each factor of ten below 1.
NEARLY_TRIANGULAR = 0.5


M = TypeVar("M", bound=nn.Module)


def full_precision(forward: Callable[[M, Tensor], Tensor]) -> Callable[[M, Tensor], Tensor]:
    """For a ``forward(self, x)`` that autocast must not reach into: it runs in the dtype of the module's parameters.

    Equilibria, and what makes W monotone or a weight orthogonal, do not bear eight bits of mantissa.
    """

    @functools.wraps(forward)
    def wrapped(self: M, x: Tensor) -> Tensor:
        if not autocasts(x.device):
            return forward(self, x)
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x.to(next(self.parameters()).dtype))

    return wrapped


def solve(
    map: StateMap,
    sigma: Elementwise,
    u: Tensor,
    options: SolverOptions = DEFAULT,
    where: str = "equilibrium",
    *,
    consume: bool = False,
) -> Solution:
    """Solve z = σ(Wz + u) for a batch u (B, n), or (B, n, F) on the map's grid; see `SolverOptions` and `Solution`. Not
    differentiable by itself.

    ``where`` names the equilibrium in messages. ``consume``: u may be overwritten, which saves the memory of one state.
    Raises `NotConvergedError` (with the solution so far) unless
    ``options.throw`` is False, `ShapeError` for a u that does not fit, `InvalidParameterError` for a dtype below float32.
    """
    if u.shape[1:] != (map.states, *map.grid.batch) or u.is_complex() != bool(map.grid):
        raise ShapeError("u", ("B", map.states, *map.grid.batch), f"{tuple(u.shape)}, {u.dtype}")
    if u.real.dtype not in TOLERANCE:
        raise InvalidParameterError(f"the dtype of {where}", u.dtype, "equilibria are solved in float32 or float64")
    tolerance = options.tolerance or TOLERANCE[u.real.dtype]
    if options.method == "newton" and map.grid:
        raise InvalidParameterError(
            "method", "'newton'", "on images its linear systems couple all pixels; take another"
        )
    with torch.no_grad():
        u = u.detach()
        solution = _in_portions(map, _in_coordinates(map.grid, sigma), u, options, tolerance, consume)
    if options.throw and not bool(solution.converged.all()):
        require_finite(map.W, f"W of {where}")
        require_finite(u, f"the input Ux + b_z of {where}")
        raise NotConvergedError(solution, tolerance, where)
    return solution


def _in_portions(
    map: StateMap, sigma: Elementwise, u: Tensor, options: SolverOptions, tolerance: float, consume: bool
) -> Solution:
    """Some samples after others, where all of them together are more than a `PORTION`."""
    size = max(1, PORTION // max(1, u[:1].nbytes)) if u.device.type == "cpu" else len(u)
    if len(u) <= size:
        return _dispatch(map, sigma, u, options, tolerance, consume)
    value, parts = u if consume else torch.empty_like(u), []
    for first in range(0, len(u), size):
        rows = slice(first, first + size)
        parts.append(_dispatch(map, sigma.take(rows), u[rows], options, tolerance, consume))
        value[rows] = parts[-1].value
    return Solution(
        value,
        *(torch.cat(each) for each in zip(*((p.residual, p.scale, p.steps, p.status) for p in parts), strict=True)),
        method=max((p.method for p in parts), key=len),  # the longest chain has all that ran
    )


def _dispatch(
    map: StateMap, sigma: Elementwise, u: Tensor, options: SolverOptions, tolerance: float, consume: bool
) -> Solution:
    method = options.method
    solution: Solution | None = None
    if method == "forward_substitution" or (method == "auto" and map.remainder <= tolerance):
        z = forward_substitution(map, sigma, u, u if consume else None)
        size = map.norm(z)
        return _report(z, map.remainder * size, size, torch.ones_like(size).long(), tolerance, "forward_substitution")
    near = method in ("auto", "sweep") and map.remainder <= NEARLY_TRIANGULAR
    start = forward_substitution(map, sigma, u) if near else torch.zeros_like(u)
    if method == "auto" and map.remainder <= 100.0 * tolerance:  # it may do, though the bound does not say so
        steps = torch.ones(len(u), dtype=torch.long, device=u.device)
        solution = _evaluated(map, sigma, u, start, steps, tolerance, "forward_substitution")
    plan = _plan(options, map)
    while solution is None or not bool(solution.converged.all()):
        iteration, max_steps = next(plan, (None, 0))
        if iteration is None:
            break
        if solution is None:
            solution = _iterate(iteration, map, sigma, u, start, max_steps, tolerance)
        else:
            solution = _retry(solution, iteration, map, sigma, u, max_steps, tolerance)
    assert solution is not None
    return solution


def _plan(options: SolverOptions, map: StateMap) -> Iterator[tuple[Iteration, int]]:
    """What to run in turn, each on the samples that the one before left. Step sizes are estimated when they are needed."""
    single: dict[str, Callable[[], Iteration]] = {
        "sweep": Sweep,
        "forward_backward": lambda: ForwardBackward(options.alpha),
        "peaceman_rachford": lambda: PeacemanRachford(options.alpha),
        "newton": Newton,
    }
    max_steps = options.max_steps
    if options.method in single:
        yield single[options.method](), max_steps
        return
    if map.remainder <= NEARLY_TRIANGULAR:
        steps = min(100, max_steps)
        max_steps -= steps
        yield Sweep(), steps
    # A Newton step costs about n steps of splitting; by then it is close enough for Newton, or Newton gives up early.
    plan: list[tuple[Callable[[], Iteration], int]] = [
        (lambda: PeacemanRachford(map.splitting_steps[0]), 200 + map.states),
        (Newton, 0 if map.grid else 30),
        (lambda: PeacemanRachford(map.splitting_steps[1]), max_steps),
    ]
    for make, most in plan:
        steps = min(most, max_steps)
        max_steps -= steps
        if steps:
            yield make(), steps


def _retry(
    first: Solution,
    iteration: Iteration,
    map: StateMap,
    sigma: Elementwise,
    u: Tensor,
    max_steps: int,
    tolerance: float,
) -> Solution:
    """Run another method on the samples that are left, from where they are."""
    left = (~first.converged).nonzero().flatten()
    start = torch.nan_to_num(first.value[left], nan=0.0, posinf=0.0, neginf=0.0)
    second = _iterate(iteration, map, sigma.take(left), u[left], start, max_steps, tolerance)
    return Solution(
        first.value.index_copy(0, left, second.value),
        first.residual.index_copy(0, left, second.residual),
        first.scale.index_copy(0, left, second.scale),
        first.steps.index_add(0, left, second.steps),
        first.status.index_copy(0, left, second.status),
        first.method if first.method.endswith(second.method) else f"{first.method}, {second.method}",
    )


def _iterate(
    iteration: Iteration,
    map: StateMap,
    sigma: Elementwise,
    u: Tensor,
    start: Tensor,
    max_steps: int,
    tolerance: float,
) -> Solution:
    """Run a method; each sample stops by itself and leaves the batch."""
    value = torch.empty_like(u)
    steps = torch.full((len(u),), max_steps, dtype=torch.long, device=u.device)
    samples = torch.arange(len(u), device=u.device)
    state, active, active_sigma, z = iteration.start(map, u, start), u, sigma, start
    driven = map.norm(u)
    for count in range(1, max_steps + 1):
        if samples.numel() == 0:
            break
        state, z, residual = iteration.step(map, active_sigma, active, state)
        size = map.norm(z) + driven
        # Half the tolerance: the residual is evaluated afresh at the end, and must still meet it. A residual that is no
        # longer finite never recovers.
        stop = (residual <= 0.5 * tolerance * size) | ~torch.isfinite(residual)
        if len(stop) == len(u) and bool(stop.all()):  # nothing to pick out
            value, samples = z, samples[:0]
            steps.fill_(count)
        elif bool(stop.any()):
            value[samples[stop]], steps[samples[stop]] = z[stop], count
            go = (~stop).nonzero().flatten()
            samples, active, driven, z = samples[go], active[go], driven[go], z[go]
            state, active_sigma = tuple(part[go] for part in state), active_sigma.take(go)
    if samples.numel():
        value[samples] = z
    return _evaluated(map, sigma, u, value, steps, tolerance, iteration.name)


def _evaluated(
    map: StateMap, sigma: Elementwise, u: Tensor, value: Tensor, steps: Tensor, tolerance: float, method: str
) -> Solution:
    """A solution with its residual, evaluated afresh."""
    Wz = map.apply(value)
    residual = map.norm(value - sigma(Wz + u))
    # ‖Wz‖ belongs to the scale: the round-off of evaluating Wz + u is proportional to it.
    scale = map.norm(value) + map.norm(u) + map.norm(Wz)
    return _report(value, residual, scale, steps, tolerance, method)


def _report(z: Tensor, residual: Tensor, scale: Tensor, steps: Tensor, tolerance: float, method: str) -> Solution:
    status = torch.where(residual <= tolerance * scale, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(torch.isfinite(residual), status, int(Status.DIVERGED))
    return Solution(z, residual, scale, steps, status, method)


class _Slopes:
    """v ↦ D v with fixed slopes D (B, n, ...) in [0, 1]: what stands for σ in an adjoint solve."""

    def __init__(self, D: Tensor, proximal: tuple[float, Tensor] | None = None) -> None:
        self.D, self._proximal = D, proximal

    def __call__(self, v: Tensor) -> Tensor:
        return self.D * v

    def __getitem__(self, rows: slice) -> _Slopes:
        return _Slopes(self.D[:, rows])

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        if self._proximal is None or self._proximal[0] != alpha:
            self._proximal = alpha, self.D / (alpha + (1.0 - alpha) * self.D)
        return v * self._proximal[1]

    def slope(self, v: Tensor) -> Tensor:
        return self.D.expand_as(v)

    def take(self, samples: Tensor | slice) -> _Slopes:
        kept = self._proximal
        return _Slopes(self.D[samples], None if kept is None else (kept[0], kept[1][samples]))


class _OnPixels:
    """σ as a function of coordinates: to pixels, σ, and back. Rows on which it is the identity (None) need neither."""

    def __init__(self, grid: Grid, parts: Sequence[tuple[int, Elementwise | None]]) -> None:
        self.grid, self.parts = grid, parts

    def __getitem__(self, rows: slice) -> _OnPixels:
        picked, offset = [], 0
        for size, sigma in self.parts:
            low, high = max(rows.start - offset, 0), min(rows.stop - offset, size)
            if low < high:
                picked.append((high - low, None if sigma is None else sigma[low:high]))
            offset += size
        return _OnPixels(self.grid, picked)

    def _each(self, v: Tensor, function: Callable[[Elementwise, Tensor], Tensor]) -> Tensor:
        def image(sigma: Elementwise | None, part: Tensor) -> Tensor:
            return part if sigma is None else self.grid.coordinates(function(sigma, self.grid.values(part)))

        if len(self.parts) == 1:
            return image(self.parts[0][1], v)
        result = torch.empty_like(v)
        offset = 0
        for size, sigma in self.parts:
            result[:, offset : offset + size] = image(sigma, v[:, offset : offset + size])
            offset += size
        return result

    def __call__(self, v: Tensor) -> Tensor:
        return self._each(v, lambda sigma, pixels: sigma(pixels))

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self._each(v, lambda sigma, pixels: sigma.prox(pixels, alpha))

    def slope(self, v: Tensor) -> Tensor:
        raise NotImplementedError("slopes differ from pixel to pixel: they have no coordinates")

    def take(self, samples: Tensor | slice) -> _OnPixels:
        return _OnPixels(self.grid, [(n, None if sigma is None else sigma.take(samples)) for n, sigma in self.parts])

    def slopes(self, v: Tensor) -> _OnPixels:
        """v ↦ Dv with the slopes D at the coordinates v."""
        parts: list[tuple[int, Elementwise | None]] = []
        offset = 0
        for size, sigma in self.parts:
            rows = v[:, offset : offset + size]
            parts.append((size, None if sigma is None else _Slopes(sigma.slope(self.grid.values(rows)))))
            offset += size
        return _OnPixels(self.grid, parts)


def _in_coordinates(grid: Grid, sigma: Elementwise) -> Elementwise:
    """σ as the solvers see it."""
    if not grid or not isinstance(sigma, Activations):
        return sigma
    return _OnPixels(grid, [(n, None if a.name == "identity" else Activations(a, n)) for a, n in sigma])


class _Equilibrium(torch.autograd.Function):
    """z(W, u) with the implicit function theorem as its derivative.

    dz = (I − DW)⁻¹ D (dW z + du), D = σ′(Wz + u). For g = ∂ℓ/∂z the adjoint p = D(W′p + g) is an equilibrium of the same
    form, monotone in the metric Λ⁻¹, solved by the same solver; ∂ℓ/∂u = p, ∂ℓ/∂W = Σ_b p_b z_b′. Only z and u are kept.

    On a grid a derivative by coordinates is weight · rfft2 of the derivative by pixels (`Grid.weights`): g is divided by
    the weights before the solve, and p multiplied by them after it.
    """

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, u: Tensor, map: StateMap, sigma: Activations, options: SolverOptions, where: str
    ) -> Tensor:
        z = solve(map, sigma, u, options, where).value
        ctx.save_for_backward(z, u)
        ctx.map, ctx.sigma, ctx.options, ctx.where = map, sigma, options, where
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor, None, None, None, None]:
        z, u = ctx.saved_tensors
        (g,) = grad_outputs
        grid: Grid = ctx.map.grid
        with torch.no_grad():
            v, sigma = grid.apply_onto(u, ctx.map.W, z), _in_coordinates(grid, ctx.sigma)
            slopes = sigma.slopes(v) if isinstance(sigma, _OnPixels) else _Slopes(sigma.slope(v))
            del v
            where = f"the adjoint of {ctx.where}"
            if grid:
                weights = grid.weights(z)
                p = solve(ctx.map.adjoint, slopes, g / weights, ctx.options, where, consume=True).value.mul_(weights)
            else:
                p = solve(ctx.map.adjoint, slopes, g, ctx.options, where).value
            dW = grid.columns(p) @ grid.columns(z).mH if ctx.needs_input_grad[0] else None
        if torch.is_grad_enabled():  # create_graph=True: D and the adjoint depend on W and u, which is not followed
            p = _Final.apply(p, z, u, g)
            dW = None if dW is None else _Final.apply(dW, z, u, g)
        return dW, p, None, None, None, None  # type: ignore[return-value]


class _Final(torch.autograd.Function):
    """A first derivative that refuses to be differentiated again, rather than pass for a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        del ctx, sources
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:
        del ctx, grad_outputs
        raise RuntimeError("second derivatives of an equilibrium are not available")


def equilibrium(
    W: Tensor,
    u: Tensor,
    sigma: Activations,
    map: StateMap | None = None,
    options: SolverOptions = DEFAULT,
    where: str = "equilibrium",
) -> Tensor:
    """The equilibrium z = σ(Wz + u) as a differentiable function of W (n, n) and u (B, n); returns z (B, n).

    On the grid of ``map`` W is (F, n, n), u and z are coordinates (B, n, F). ``map``: a `StateMap` of the same W, to reuse
    its factorisations; built when None, dense. The backward pass is one adjoint solve, so memory does not depend on the
    number of steps; second derivatives are not available and raise.
    Raises `NotConvergedError` (forward or adjoint) and `ShapeError`.
    """
    return _Equilibrium.apply(W, u, StateMap(W) if map is None else map, sigma, options, where)  # type: ignore[no-any-return]


def evaluate(dae: DAE, x: Tensor) -> Tensor:
    """y = Gz + b_y with z = σ(Wz + Ux + b_z), float64, differentiable in x (B, p) → (B, q); images on the DAE's grid."""
    map = StateMap(dae.W, Lambda=dae.Lambda, grid=dae.grid)
    u = dae.grid.affine(dae.U, dae.grid.coordinates(x), dae.bias_z)
    z = equilibrium(dae.W, u, dae.sigma, map, where=f"the equilibrium of {dae.name!r}")
    return dae.grid.values(dae.grid.affine(dae.G, z, dae.bias_y))
