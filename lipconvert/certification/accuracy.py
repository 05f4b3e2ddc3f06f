"""How far the floats that run may be from the exact network, at an input and at everything within a radius of it.

The exact network is the one whose W, U, G, biases and glue are the floats in use, its equilibria solved exactly. Running it
errs by what the solver leaves (its tolerance) and by rounding. For any diagonal metric P = D² with X(P) ⪰ 2μP, proved, the
states s = σ(v) of a run with the residual d = v − Ws − Ux − b_z obey

    |s − z*|_P ≤ |d|_P/μ                                                                            (FORMULAS f1)
    |g′(s − z*)| ≤ (‖h‖ + √(g′X⁻¹g / 2μ)) |d|_P,   h = D X⁻¹g                                       (FORMULAS f7, uniform)

and |d|_P is bounded: by the tolerance for which the solver reports convergence (for a forward substitution by what it
leaves out), and by γ_k Σ|terms| for sums of k products that are not 0, in the dtype in use, in any order. The terms are
those at the input, and what they may grow with r, by norms. So all bounds are affine in the radius r, a pair (at the
input, growth per unit of r), and hold for the perturbed inputs an attack tries, not only where they are computed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dae.activations import MaxMin, activation_of, is_activation
from ..dae.dae import DAE
from ..equilibria.equilibrium import TOLERANCE, SolverOptions, solve
from ..errors import NoCertificateError
from ..foundation.arguments import isolated, require_no_autocast
from ..linalg.rounding import SLACK, gamma, nonnegative_norm, norm_bound, operations, transform_growth, unit_roundoff
from ..linalg.spectrum import Grid
from ..linalg.state_map import StateMap
from ..networks.glue import FirstFeatures, Normalize, PadChannels, core_lipschitz, pair
from ..networks.lben import LBEN
from ..networks.network import passed
from .bounds import Bounds
from .proofs import Enclosure, prove_gains

# Glue that only moves numbers, or compares them.
EXACT = (PadChannels, FirstFeatures, MaxMin, nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle)

# Inputs larger than this, in l2, may overflow somewhere (no step multiplies by more than 10²⁰): nothing is certified there.
REACH = {torch.float32: 1e10, torch.float64: 1e100}

# A radius where nothing changes anywhere: so large that no pixel is further away.
FARTHEST = 1e12

# σ written with sums whose terms do not vanish with the argument.
ABSOLUTE = ("elu", "softplus", "sigmoid")

# ulps of a library's tanh, exp or log1p, and of what is done with it.
ELEMENTARY = 8.0


@dataclass(frozen=True)
class Evaluation:
    """Logits of a batch and what they may be off.

    ``value`` (B, q, ...) as the network runs; ``error`` (B, 2): ‖value − exact output‖₂ is at most error[:, 0] at
    the input, and error[:, 0] + error[:, 1] r at any input within r of it; ``pair_error`` (B, m, 2): the same for
    the m logit differences of `Bounds.functionals`, None without them; ``converged`` (B,).
    """

    value: Tensor
    error: Tensor
    pair_error: Tensor | None
    converged: Tensor


@dataclass(frozen=True)
class _Metric:
    """The constants of one stage in one metric P = D²; all upper bounds in float64."""

    d: Tensor  # (n,) the diagonal of D
    mu: float
    U: float  # ‖DU‖₂
    leak: float  # ‖DW‖₂: what an error of the states in l2 does to the residual
    G: float  # ‖G D⁻¹‖
    pairs: _PairMetric | None

    @property
    def most(self) -> float:
        """max D."""
        return float(self.d.max()) if len(self.d) else 0.0

    @property
    def least(self) -> float:
        """min D."""
        return float(self.d.min()) if len(self.d) else 1.0


@dataclass(frozen=True)
class _PairMetric:
    """The same for the logit differences g = G_i − G_j of the last stage, each (m,)."""

    residual: Tensor  # the factor of f7
    slip: Tensor  # ‖g D⁻¹‖


@dataclass(frozen=True)
class Road:
    """By which road a stage is run, where that is not lipconvert's own: what its sums add up.

    ``T`` (n, n), ``U`` (n, p), ``G`` (q, n), with frequencies first on a grid: sizes of the operators in them; ``counts``: k
    for which γ_k covers the sums of σ's argument (n,) and of the output (q,). ``blurs``: entrywise bounds of what the
    operators that run are off those of the exact network (`Accuracy.dae`). ``skipped``: ‖W − T‖. ``eta``: relative error of
    one transform. ``tolerance`` of a loop, 0 without one. ``absolute``: of σ, in l2. ``pixels``: sums are over taps, pixel by
    pixel; T, U and G then are Σ_taps |K|, the same at all frequencies.
    """

    T: Tensor
    U: Tensor
    G: Tensor
    counts: tuple[Tensor, Tensor]
    blurs: tuple[Tensor, Tensor, Tensor]
    skipped: float
    eta: float
    tolerance: float
    absolute: float = 0.0
    pixels: bool = False


@dataclass(frozen=True)
class _Sums:
    """How the sums of one stage round, in one dtype and by one road: κ_i Σ|terms|, κ_i = γ of the terms that are not 0.

    ``T``, ``U``, ``b_z``, of σ's argument transformed to pixels, and ``G``, ``b_y``, of the output's coordinates: κ times the
    sizes of what is summed over, with what operators are off added. ``abs_G``, ``abs_b_y``: the sizes alone; ``outputs``: the
    largest κ of the output.
    """

    outputs: float
    eta: float  # of one transform
    elementary: float  # of σ
    absolute: float  # of σ, in l2
    under: float  # what numbers that vanish may add up to, in l2
    tolerance: float  # of an iterative solver, 0 for substitution, which is exact but for
    skipped: float  # ‖W − T‖, what it leaves out
    pixels: bool
    T: Tensor
    U: Tensor
    b_z: Tensor
    G: Tensor
    b_y: Tensor
    abs_G: Tensor
    abs_b_y: Tensor
    scale: tuple[float, float, float]  # ‖z‖ + ‖Ux + b_z‖ + ‖Wz‖ by ‖z‖, ‖x‖ and 1
    growth: list[_Growth]  # for each metric


@dataclass(frozen=True)
class _Growth:
    """The same by norms, in one metric."""

    states: float  # ‖DTD⁻¹‖
    inputs: float  # ‖DU‖
    outputs: float  # ‖GD⁻¹‖
    size: float  # ‖|G|D⁻¹‖
    pairs: Tensor | None  # ‖(|c_i| + |c_j|)GD⁻¹‖, (m,)


@dataclass(frozen=True)
class _Stage:
    dae: DAE
    enclosure: Enclosure
    metrics: list[_Metric]
    map: StateMap  # of the same floats in float64 on the CPU


class Accuracy:
    """Error bounds for one network, built once from its `Bounds`.

    Raises `NoCertificateError` where no metric makes a stage's I − W strongly monotone with proof.
    """

    @isolated
    def __init__(self, bounds: Bounds) -> None:
        self.net = net = bounds.net
        self._bounds = bounds
        self.require_unchanged()
        self._constants = [L * (1.0 + 2.0**-44) for L in net.step_lipschitz]
        for k, (step, stage) in enumerate(zip(net.steps, bounds.stages, strict=True)):
            if isinstance(step, LBEN) and stage.proved is not None:
                self._constants[k] = stage.proved
            if not isinstance(step, LBEN) and core_lipschitz(step) is None and net.glue_rounding[k] is None:
                raise NoCertificateError(
                    f"step {k}, {type(step).__name__}",
                    "what rounding does in it is not known, as it is a plugin's glue: x -> (x + 4096) - 4096 has constant 1 "
                    "and loses digits that a margin may need. A plugin says it with the hook glue_rounding",
                )
            if not 1e-20 < self._constants[k] < 1e20:
                reason = f"its constant is {self._constants[k]:g}: what overflows or vanishes on the way is not bounded"
                raise NoCertificateError(stage.name, f"{reason}. Usual cause: a std of Normalize far from 1")
        self._functionals, self._readout = bounds.functionals, bounds.readout_rows()
        last = max((k for k, step in enumerate(net.steps) if isinstance(step, LBEN)), default=-1)
        # |c_i| + |c_j| (m, [F,] q) and ‖c_i − c_j‖ (m,), c the logits as functionals of the last stage's output
        self._both = self._carried = torch.zeros(0, dtype=torch.float64)
        if self._functionals is not None and self._readout is not None:
            i, j = torch.tensor(self._functionals[2]).T
            M, sizes = self._readout
            self._both = sizes[i] + sizes[j]
            grid = net.stages[-1].grid
            self._carried = _rows_norm(grid, (M[i] - M[j]).abs() + 2.0**-40 * self._both)
        self._sums: dict[tuple[int, str, float, float, torch.device], _Sums] = {}
        lbens = [(k, step) for k, step in enumerate(net.steps) if isinstance(step, LBEN)]
        self._stages = {
            k: self._read(step, proved, k == last) for (k, step), proved in zip(lbens, bounds.monotone, strict=True)
        }

    def require_unchanged(self) -> None:
        """Raise `NoCertificateError` where the network is no longer the one that was proved, or may stop quietly."""
        for stage in self.net.stages:
            if not stage.options.throw:
                reason = "its solver may stop quietly (SolverOptions(throw=False)): at an input nearby, anything may come out"
                raise NoCertificateError(f"stage {stage.name!r}", reason)
        self._bounds.require_unchanged()

    def _read(self, stage: LBEN, proved: list[tuple[Tensor, float]], last: bool) -> _Stage:
        dae = stage.running()
        E = Enclosure.of(dae)
        dae = replace(dae, W=E.W, U=E.U, G=E.G, Lambda=dae.Lambda.cpu(), b_z=dae.bias_z.cpu(), b_y=dae.bias_y.cpu())
        found = []
        for P, mu in proved:
            if mu == 0.0:
                continue
            d = P.sqrt()
            D = d.unsqueeze(-1)
            pairs = self._pairs(E, P, mu) if last else None
            found.append(_Metric(d, mu, norm_bound(D * E.U), norm_bound(D * E.W), norm_bound(E.G / d), pairs))
        if not found:
            raise NoCertificateError(
                f"stage {stage.name!r}",
                "no diagonal metric at hand makes I - W strongly monotone, so an inexact solve may be anywhere. Usual cause: "
                "training at epsilon = 0 has used up the margin of condition (3). Convert with epsilon > 0 or delta > 0.",
            )
        return _Stage(dae, E, found, StateMap(dae.W, dae.blocks, dae.Lambda, grid=dae.grid))

    def _sums_of(self, k: int, double: bool) -> _Sums:
        """How the sums of stage k round as it is set to run now, or in float64 on the CPU."""
        step, stage = self.net.steps[k], self._stages[k]
        assert isinstance(step, LBEN)
        options, map = (SolverOptions(), stage.map) if double else (step.options, step.state_map())
        device = map.W.device
        dtype = torch.float64 if double else step.b_z.dtype
        u, tolerance = unit_roundoff(dtype, device), options.tolerance or TOLERANCE[dtype]
        key = (k, options.method, tolerance, u, device)
        if key not in self._sums:
            self._sums[key] = self._rounding(
                stage, _own(stage, map, options.method, tolerance, u), u, device, torch.finfo(dtype).tiny
            )
        return self._sums[key]

    def _pairs(self, E: Enclosure, P: Tensor, mu: float) -> _PairMetric | None:
        if self._functionals is None:
            return None
        # of a joined segment the last stage's states are the last
        rows, radius = (M[..., -E.states :] for M in self._functionals[:2])
        gain, size = prove_gains(E, P, rows, radius, parts="")
        slip = _rows_norm(E.grid, (rows.abs() + radius) / P.sqrt())
        return _PairMetric(residual=(size + (gain / (2.0 * mu)).sqrt()) * SLACK, slip=slip)

    def _rounding(self, stage: _Stage, road: Road, u: float, device: torch.device, tiny: float) -> _Sums:
        """``tiny``: the smallest normal number of the dtype that runs."""
        dae, E = stage.dae, stage.enclosure
        # A norm does not see what has squares below the smallest number; products that underflow are far less.
        under = (dae.states * dae.grid.pixels * tiny) ** 0.5
        grid, eta = dae.grid, road.eta
        kappa = [
            torch.tensor([gamma(k, u) for k in count.tolist()], dtype=torch.float64).clamp(max=1e300)
            for count in road.counts  # where nothing is known: no 0·∞
        ]
        states, outputs = (kappa[0] + eta * (1.0 + kappa[0])) * SLACK, kappa[1]
        row = states.unsqueeze(-1)
        T, U, G = (
            k * (M + blur) + blur
            for k, M, blur in zip((row, row, outputs.unsqueeze(-1)), (road.T, road.U, road.G), road.blurs, strict=True)
        )
        growth = []
        for m in stage.metrics:
            D, rounded, pairs = m.d.unsqueeze(-1), G / m.d, None
            if m.pairs is not None:
                both = _collapsed(grid, self._both.mT).mT if road.pixels else self._both
                pairs = _rows_norm(grid, torch.einsum("fqn,mfq->mfn" if grid else "qn,mq->mn", rounded, both))
            growth.append(
                _Growth(
                    nonnegative_norm(D * T / m.d),
                    nonnegative_norm(D * U),
                    nonnegative_norm(rounded),
                    nonnegative_norm(road.G / m.d),
                    pairs,
                )
            )
        b_z, b_y = dae.bias_z.abs(), dae.bias_y.abs()
        size_b = float(torch.linalg.vector_norm(b_z)) * grid.pixels**0.5
        most = float(states.amax()) if len(states) else 0.0
        scale = (
            1.0 + norm_bound(E.W) + nonnegative_norm(T),
            norm_bound(E.U) + nonnegative_norm(U),
            size_b * (1.0 + most),
        )
        return _Sums(
            outputs=float(outputs.amax()) if len(outputs) else 0.0,
            eta=eta,
            elementary=0.0 if all(a.name in ("identity", "relu") for a, _ in dae.sigma) else ELEMENTARY * u,
            absolute=road.absolute + under,
            under=under,
            tolerance=road.tolerance * (1.0 + 1e-2),
            skipped=road.skipped,
            pixels=road.pixels,
            T=T.to(device),
            U=U.to(device),
            b_z=(states * b_z).to(device),
            G=G.to(device),
            b_y=(outputs * b_y).to(device),
            abs_G=road.G.to(device),
            abs_b_y=b_y.to(device),
            scale=scale,
            growth=growth,
        )

    @isolated
    def evaluate(self, x: Tensor, *, double: bool = False) -> Evaluation:
        """Run the network on a batch in its own floats, with bounds of its errors; no gradient.

        ``double``: run the same network, the same weights to the last bit, in float64 on the CPU. That is far
        closer to the exact one, where a network in float32 is to be judged at an input. Raises `NoCertificateError` where the
        network has changed.
        """
        net = self.net
        self.require_unchanged()
        require_no_autocast(net.device)
        with torch.no_grad():
            x = net.checked(x)
            if double:
                x = x.to("cpu", torch.float64)
            sums = {k: self._sums_of(k, double) for k in self._stages}
            return self._walk(x, sums, unit_roundoff(x.dtype, x.device), torch.finfo(x.dtype).tiny, double)

    def dae(self, k: int) -> DAE:
        """The exact stage at step k: its W, U, G and biases in float64, which errors are measured from."""
        return self._stages[k].dae

    @isolated
    def everywhere(self, roads: Mapping[int, Road], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(error (2,), pair_error (m, 2)) at any input x, affine in ‖x‖, of the network run by other roads in a dtype.

        The bounds at 0 and around it. ``roads``: of every stage, by the number of its step. Where a road rounds less than
        lipconvert's own evaluation in float64 does, it counts as rounding as much: that is how the states at 0 are found.
        """
        self.require_unchanged()
        u, tiny = unit_roundoff(dtype), torch.finfo(dtype).tiny
        cpu = torch.device("cpu")
        sums = {}
        for k, road in roads.items():
            stage = self._stages[k]
            own = transform_growth(stage.dae.grid.image) * unit_roundoff(torch.float64)
            loop = 0.0 if stage.map.remainder <= TOLERANCE[torch.float64] else TOLERANCE[torch.float64]
            worst = replace(
                road,
                eta=max(road.eta, own),
                tolerance=max(road.tolerance, loop),
                skipped=max(road.skipped, 0.0 if loop else stage.map.remainder),
            )
            sums[k] = self._rounding(stage, worst, u, cpu, tiny)
        with torch.no_grad():
            zero = torch.zeros(1, *self.net.input_shape, dtype=torch.float64)
            found = self._walk(zero, sums, u, tiny, double=True)
        return found.error[0], None if found.pair_error is None else found.pair_error[0]

    def _walk(self, x: Tensor, all_sums: Mapping[int, _Sums], u: float, tiny: float, double: bool) -> Evaluation:
        """All steps in order, with what each adds to the bounds."""
        net = self.net
        error = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)
        moved = torch.zeros_like(error)  # how far the exact input of a step moves with r
        moved[:, 1] = 1.0
        converged = torch.ones(len(x), dtype=torch.bool, device=x.device)
        pairs: Tensor | None = None
        for k, (step, L) in enumerate(zip(net.steps, self._constants, strict=True)):
            size = _norm(x)
            # any running input within r: this far from the one that was run, and this large
            distance = moved + error
            distance[:, 0] += error[:, 0]
            largest = _affine(size) + distance
            if isinstance(step, LBEN):
                y, z, converged_here = self._run(k, step, x, double)
                converged &= converged_here
                local, local_pairs = self._stage(k, x, z, largest, distance, all_sums[k])
                if local_pairs is not None:
                    # what the input of the last stage was off goes through its constant
                    carried = self._carried.to(error.device)[None, :, None] * (L * error).unsqueeze(1)
                    pairs = (local_pairs + carried) * SLACK
            else:
                step = copy.deepcopy(step).cpu().double() if double else step
                y = passed(step, x)
                local = self._glue(step, L, net.glue_rounding[k], x, largest, u, tiny)
                if pairs is not None:
                    behind = math.prod(self._constants[k + 1 :])
                    pairs = pairs + 2.0**0.5 * behind * local.unsqueeze(1)
            error, moved, x = (L * error + local) * SLACK, L * moved * SLACK, y
        return Evaluation(x, error, pairs, converged & torch.isfinite(error).all(-1))

    def _run(self, k: int, stage: LBEN, x: Tensor, double: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(output, states in coordinates, converged) of one stage."""
        if not double:
            solution = stage.solve(x, replace(stage.options, throw=False))
            return stage.readout(solution.value), solution.value, solution.converged
        dae, map = self._stages[k].dae, self._stages[k].map
        grid = dae.grid
        u = grid.affine(dae.U, grid.coordinates(x), dae.bias_z)
        solution = solve(map, dae.sigma, u, SolverOptions(throw=False), f"the equilibrium of {dae.name!r}")
        return grid.values(grid.affine(dae.G, solution.value, dae.bias_y)), solution.value, solution.converged

    def _stage(
        self, k: int, x: Tensor, z: Tensor, largest: Tensor, distance: Tensor, sums: _Sums
    ) -> tuple[Tensor, Tensor | None]:
        """Bounds of one stage's own error: of its output in l2 (B, 2), and of the functionals (B, m, 2).

        For running inputs x′ within ``distance`` (B, 2) of x, of norms at most ``largest``; z are the running states at x.
        What sums round is bounded by their terms at x, Σ|terms| there, and by norms in what moves with x′.
        """
        found = self._stages[k].metrics
        grid = self._stages[k].dae.grid
        # Σ|terms| at x, of σ's argument and of the output
        zs, xs = _sizes(z), _sizes(grid.coordinates(x))
        if sums.pixels:
            zs, xs = _collapsed(grid, zs), _collapsed(grid, xs)
        terms = grid.apply(sums.T, zs) + _with_constant(grid, grid.apply(sums.U, xs), sums.b_z)
        terms = _channel_norms(grid, terms)
        y = _with_constant(grid, grid.apply(sums.abs_G, zs), sums.abs_b_y)
        size_y = torch.linalg.vector_norm(_channel_norms(grid, y), dim=-1)
        terms_y = _with_constant(grid, grid.apply(sums.G, zs), sums.b_y)
        rounded_y = torch.linalg.vector_norm(_channel_norms(grid, terms_y), dim=-1)
        flat = _affine(torch.linalg.vector_norm(_channel_norms(grid, zs), dim=-1))
        moved_x = distance + 2.0 * sums.eta * largest  # of its coordinates, as they are computed
        by_z, by_x, by_1 = sums.scale
        tail = sums.tolerance + sums.elementary
        # σ's values are transformed once: ‖z′ − s′‖ ≤ tail·scale + η‖s′‖, ‖s′‖ ≤ ‖z′‖ + ‖z′ − s′‖
        per_z = (tail * by_z + sums.eta) / (1.0 - sums.eta)  # of the slip, per ‖z′‖
        slip = _plus(tail * by_x * largest, tail * by_1 + sums.absolute) / (1.0 - sums.eta)
        outputs, functionals = [], []
        for m, growth in zip(found, sums.growth, strict=True):
            # e bounds ‖D(z′ − z*(x′))‖, so ‖D(z′ − z)‖ is at most K·distance + 2e. The residual |d|_P and the slip ‖z′ − s′‖
            # grow with it, and e = |d|_P/μ + max D·slip is solved for.
            K, least, most = m.U / m.mu, m.least, m.most
            d_z = m.leak * per_z + most * sums.skipped
            start = _affine(torch.linalg.vector_norm(terms * m.d.to(terms.device), dim=-1))
            d = start + growth.inputs * moved_x + sums.eta * m.U * largest + m.leak * slip
            alpha = 2.0 * ((growth.states + d_z / least) / m.mu + most * per_z / least)
            if not alpha < 0.5:
                continue
            moved = K * distance
            size = flat + moved / least  # ‖z′‖
            e = (d + growth.states * moved + d_z * size) / m.mu + most * (slip + per_z * size)
            e = e * (SLACK / (1.0 - alpha))
            moved, size = moved + 2.0 * e, size + (2.0 / least) * e
            residual = (d + growth.states * moved + d_z * size) * SLACK
            slipped = most * (slip + per_z * size) * SLACK
            rounded = _plus((_affine(rounded_y) + growth.outputs * moved) * SLACK, sums.under)
            # the transform to pixels, of what was rounded
            back = sums.eta * ((1.0 + sums.outputs) * (_affine(size_y) + growth.size * moved) + rounded) * SLACK
            outputs.append((m.G / m.mu) * residual + m.G * slipped + rounded + back)
            if (q := m.pairs) is not None and growth.pairs is not None:
                functionals.append(
                    _outer(q.residual, residual)
                    + _outer(q.slip, slipped)
                    + _affine(self._paired(grid, terms_y, sums.pixels))
                    + _outer(growth.pairs, moved)
                    + _outer(self._carried, _affine(torch.full_like(rounded_y, sums.under)))
                    + _outer(self._carried, back)
                )
        if not outputs:
            return torch.full_like(largest, math.inf), None
        return _smaller(outputs), _smaller(functionals) if functionals else None

    def _paired(self, grid: Grid, terms: Tensor, pixels: bool) -> Tensor:
        """(B, m): what logit differences see of sizes (B, q[, F]) of errors of the last stage's output."""
        both = (_collapsed(grid, self._both.mT).mT if pixels else self._both).to(terms.device)
        if not grid:
            return terms @ both.mT * SLACK
        return torch.einsum("bqf,f,mfq->bm", terms, grid.weights(terms), both) * SLACK

    def _glue(
        self,
        step: nn.Module,
        L: float,
        given: tuple[float, float] | None,
        x: Tensor,
        largest: Tensor,
        u: float,
        tiny: float,
    ) -> Tensor:
        """The rounding of glue, (B, 2). ``given``: (a, b) of a plugin's glue, u(a + b‖x‖). ``tiny``: the smallest normal
        number, below which digits are lost."""
        if type(step) in EXACT:
            return torch.zeros_like(largest)
        numel = math.prod(x.shape[1:])
        if given is not None:
            a, b = given
            u = max(u, unit_roundoff(x.dtype, x.device, convolutions=True))  # there may be some in it
            return _plus(u * b * largest * SLACK, u * a * SLACK + numel**0.5 * tiny)
        jump = 0.0
        if isinstance(step, Normalize):
            count, constant = 4, float(step.mean.double().abs().max()) * numel**0.5
        elif is_activation(step):
            count, constant = int(ELEMENTARY), float(step(x.new_zeros(1)).abs()) * numel**0.5
            if activation_of(step).name in ABSOLUTE:  # graphs have exp(v) − 1, and errors of size u near 0
                constant = max(constant, numel**0.5)
            if isinstance(step, nn.Softplus):  # torch's jumps where it becomes linear
                jump = math.exp(-step.threshold) / step.beta * numel**0.5 * SLACK
        else:
            count, constant = 8 + _window(step), 0.0
        rounded = gamma(count, u) * L * _plus(largest, constant) * SLACK
        return _plus(rounded, jump + count * numel**0.5 * tiny)


def _own(stage: _Stage, map: StateMap, method: str, tolerance: float, u: float) -> Road:
    """The road of `lipconvert.equilibrium`."""
    E, dae = stage.enclosure, stage.dae
    direct = method == "forward_substitution" or (method == "auto" and map.remainder <= tolerance)
    abs_W, abs_U, abs_G = E.sizes
    T, rest = abs_W, torch.zeros_like(E.W)
    if direct:
        below = map.below.cpu()
        T, rest = abs_W * below, E.W.masked_fill(below, 0.0)

    def terms(*operators: Tensor) -> Tensor:
        """The terms of every row that are not 0, the most over the frequencies."""
        count = torch.stack([(M != 0).sum(-1) for M in operators]).sum(0)
        return operations(1, E.W) * ((count.amax(0) if dae.grid else count) + 8)

    none = torch.zeros((), dtype=torch.float64)
    return Road(
        T=T,
        U=abs_U,
        G=abs_G,
        counts=(terms(T, abs_U), terms(abs_G)),
        blurs=(none, none, none),
        skipped=norm_bound(rest),
        eta=transform_growth(dae.grid.image) * u,
        tolerance=0.0 if direct else tolerance,
    )


def _collapsed(grid: Grid, sizes: Tensor) -> Tensor:
    """Sizes (k, n, F) of images that are constant on each channel, of the same norms: what bounds of sums over taps see."""
    constant = torch.zeros_like(sizes)
    constant[..., 0] = _channel_norms(grid, sizes) * grid.pixels**0.5
    return constant


def _window(pool: Any) -> int:
    """Pixels that are added up."""
    return math.prod(pair(pool.kernel_size))


def _rows_norm(grid: Grid, rows: Tensor) -> Tensor:
    """The norms (m,) of functionals (m, [F,] n) of states or outputs."""
    squares = rows.abs().square().sum(-1)
    return (squares @ grid.weights(squares) if grid else squares).sqrt() * SLACK


def _sizes(coordinates: Tensor) -> Tensor:
    """|·| of coordinates, in float64."""
    return coordinates.to(torch.complex128 if coordinates.is_complex() else torch.float64).abs()


def _with_constant(grid: Grid, terms: Tensor, b: Tensor) -> Tensor:
    """Sizes of coordinates (B, n[, F]), and of those of images that are b (n,) in every pixel: all at frequency 0."""
    if not grid:
        return terms + b
    return torch.cat([terms[..., :1] + grid.pixels * b.unsqueeze(-1), terms[..., 1:]], dim=-1)


def _channel_norms(grid: Grid, sizes: Tensor) -> Tensor:
    """(B, n): the l2 norms of channels, from the sizes of their coordinates."""
    squares = sizes.square()
    return (squares @ grid.weights(squares)).sqrt() * SLACK if grid else sizes


def _affine(value: Tensor) -> Tensor:
    """(B,) → (B, 2), the same at every radius."""
    return torch.stack([value, torch.zeros_like(value)], dim=-1)


def _plus(bound: Tensor, constant: float) -> Tensor:
    """A bound (B, 2) and a constant."""
    return torch.stack([bound[..., 0] + constant, bound[..., 1]], dim=-1)


def _outer(factors: Tensor, bound: Tensor) -> Tensor:
    """(m,), (B, 2) → (B, m, 2)."""
    return factors.to(bound.device)[None, :, None] * bound.unsqueeze(1) * SLACK


def _smaller(options: list[Tensor]) -> Tensor:
    """For each sample the option that is smallest at its input: every one of them is a bound."""
    best = options[0]
    for other in options[1:]:
        best = torch.where((other[..., :1] < best[..., :1]), other, best)
    return best


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1) * SLACK
