"""How far the floats that run may be from the exact network, at an input and at everything within a radius of it.

The exact network is the one whose W, U, G, biases and glue are the floats in use, its equilibria solved exactly. Running it
errs by what the solver leaves (its tolerance) and by rounding. For any diagonal metric P = D² with X(P) ⪰ 2μP, proved, the
states s = σ(v) of a run with the residual d = v − Ws − Ux − b_z obey

    |s − z*|_P ≤ |d|_P/μ                                                                            (FORMULAS f1)
    |g′(s − z*)| ≤ (‖h‖ + √(g′X⁻¹g / 2μ)) |d|_P,   h = D X⁻¹g                                       (FORMULAS f7, uniform)

and |d|_P is bounded beforehand: by the tolerance for which the solver reports convergence, and by γ_k for sums of
k products in the dtype in use, in any order. All bounds are affine in the radius r, because norms of inputs and
states are: a bound is a pair (at the input, growth per unit of r). So they hold for the perturbed inputs an attack
tries, not only where they are computed.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .activations import MaxMin, is_activation
from .bounds import Bounds, metrics
from .dae import DAE
from .equilibrium import TOLERANCE, SolverOptions, solve
from .errors import InvalidParameterError, NoCertificateError
from .glue import FirstFeatures, Normalize, PadChannels
from .lben import LBEN
from .proofs import Enclosure, prove_gains, prove_monotone
from .rounding import SLACK, gamma, nonnegative_norm, norm_bound, operations, transform_growth, unit_roundoff
from .spectrum import Grid
from .state_map import StateMap

# Glue that only moves numbers, or compares them.
EXACT = (PadChannels, FirstFeatures, MaxMin, nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle)

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
    W: float  # ‖D|W|D⁻¹‖
    U: float  # ‖D|U|‖
    b: float  # ‖D b_z‖, over all pixels
    leak: float  # ‖DW‖₂: what an error of the states in l2 does to d
    most: float  # max D
    G: float  # ‖G D⁻¹‖
    abs_G: float  # ‖|G| D⁻¹‖
    pairs: _PairMetric | None


@dataclass(frozen=True)
class _PairMetric:
    """The same for the logit differences g = G_i − G_j of the last stage, each (m,)."""

    residual: Tensor  # the factor of f7
    slip: Tensor  # ‖g D⁻¹‖
    rounding: Tensor  # ‖(|G_i| + |G_j|) D⁻¹‖, and of the output's own rounding
    bias: Tensor  # |b_y| as |c_i| + |c_j| see it
    carried: Tensor  # ‖c_i − c_j‖, c the glue behind the last stage


class Accuracy:
    """Error bounds for one network, built once from its `Bounds`.

    Raises `NoCertificateError` where no metric makes a stage's I − W strongly monotone with proof.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.net = net = bounds.net
        self._constants = [L * (1.0 + 2.0**-44) for L in net.step_lipschitz]
        for k, (step, stage) in enumerate(zip(net.steps, bounds.stages, strict=True)):
            if isinstance(step, LBEN) and stage.proved is not None:
                self._constants[k] = stage.proved
        self._functionals, self._readout = bounds.functionals, bounds.readout_rows()
        last = max((k for k, step in enumerate(net.steps) if isinstance(step, LBEN)), default=-1)
        self._stages: dict[int, tuple[DAE, list[_Metric]]] = {}
        self._maps: dict[int, StateMap] = {}
        for k, step in enumerate(net.steps):
            if isinstance(step, LBEN):
                self._stages[k] = self._read(step, k == last)
        carried = [m.pairs.carried for m in self._stages.get(last, (None, []))[1] if m.pairs is not None]
        self._carried = carried[0] if carried else torch.zeros(0, dtype=torch.float64)

    def _read(self, stage: LBEN, last: bool) -> tuple[DAE, list[_Metric]]:
        if not stage.options.throw:
            reason = (
                "its solver may stop quietly (SolverOptions(throw=False)): at an input nearby, anything may come out"
            )
            raise NoCertificateError(f"stage {stage.name!r}", reason)
        dae = stage.running()
        E = Enclosure.of(dae)
        dae = replace(dae, W=E.W, U=E.U, G=E.G, Lambda=dae.Lambda.cpu(), b_z=dae.bias_z.cpu(), b_y=dae.bias_y.cpu())
        abs_W, abs_U, abs_G = E.sizes
        pixels = dae.grid.pixels**0.5
        found = []
        for P in metrics(dae):
            mu = prove_monotone(E, P)
            if mu == 0.0:
                continue
            d = P.sqrt()
            D = d.unsqueeze(-1)
            found.append(
                _Metric(
                    d,
                    mu,
                    nonnegative_norm(D * abs_W / d),
                    nonnegative_norm(D * abs_U),
                    float(torch.linalg.vector_norm(d * dae.bias_z)) * pixels * SLACK,
                    norm_bound(D * E.W),
                    float(d.max()) if len(d) else 0.0,
                    norm_bound(E.G / d),
                    nonnegative_norm(abs_G / d),
                    self._pairs(E, P, mu, dae) if last else None,
                )
            )
        if not found:
            raise NoCertificateError(
                f"stage {stage.name!r}",
                "no diagonal metric at hand makes I - W strongly monotone, so an inexact solve may be anywhere. Usual cause: "
                "training at epsilon = 0 has used up the margin of condition (3). Convert with epsilon > 0 or delta > 0.",
            )
        return dae, found

    def _pairs(self, E: Enclosure, P: Tensor, mu: float, dae: DAE) -> _PairMetric | None:
        if self._functionals is None or self._readout is None:
            return None
        d, grid, states = P.sqrt(), dae.grid, dae.states
        rows, radius, pairs = self._functionals
        rows, radius = (
            rows[..., -states:],
            radius[..., -states:],
        )  # of a joined segment the last stage's states are the last
        gain, size = prove_gains(E, P, rows, radius, parts="")
        i, j = torch.tensor(pairs).T
        M, sizes = self._readout
        both = sizes[i] + sizes[j]
        contract = "fqn,mfq->mfn" if grid else "qn,mq->mn"

        def norm(x: Tensor) -> Tensor:
            """Over states or outputs, and pixels: (m, [F,] n) → (m,)."""
            squares = x.abs().square().sum(-1)
            return (squares @ grid.weights(squares) if grid else squares).sqrt() * SLACK

        bias = float(torch.linalg.vector_norm(dae.bias_y)) * grid.pixels**0.5
        return _PairMetric(
            residual=(size + (gain / (2.0 * mu)).sqrt()) * SLACK,
            slip=norm((rows.abs() + radius) / d),
            rounding=norm(torch.einsum(contract, E.G.abs(), both) / d),
            bias=norm(both) * bias,
            carried=norm((M[i] - M[j]).abs() + 2.0**-40 * both),
        )

    def evaluate(self, x: Tensor, *, double: bool = False) -> Evaluation:
        """Run the network on a batch in its own floats, with bounds of its errors; no gradient.

        ``double``: run the same network, the same weights to the last bit, in float64 on the CPU. That is far
        closer to the exact one, where a network in float32 is to be judged at an input.
        """
        net = self.net
        if torch.is_autocast_enabled(net.device.type):
            raise InvalidParameterError(
                "autocast", "enabled", "a certificate is about one dtype; leave the autocast block"
            )
        with torch.no_grad():
            x = net.checked(x)
            if double:
                x = x.to("cpu", torch.float64)
            u = unit_roundoff(x.dtype, x.device)
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
                    y, z, done, tolerance = self._run(k, step, x, double)
                    converged &= done
                    local, local_pairs = self._stage(k, step, z, tolerance, largest, distance, u)
                    if local_pairs is not None:
                        # what the input of the last stage was off goes through its constant
                        carried = self._carried.to(error.device)[None, :, None] * (L * error).unsqueeze(1)
                        pairs = (local_pairs + carried) * SLACK
                else:
                    step = copy.deepcopy(step).cpu().double() if double else step
                    y = step(x)
                    local = self._glue(step, L, x, largest, u)
                    if pairs is not None:
                        behind = math.prod(self._constants[k + 1 :])
                        pairs = pairs + 2.0**0.5 * behind * local.unsqueeze(1)
                error, moved, x = (L * error + local) * SLACK, L * moved * SLACK, y
            return Evaluation(x, error, pairs, converged & torch.isfinite(error).all(-1))

    def _run(self, k: int, stage: LBEN, x: Tensor, double: bool) -> tuple[Tensor, Tensor, Tensor, float]:
        """(output, states in coordinates, converged, tolerance met) of one stage."""
        if not double:
            options = replace(stage.options, throw=False)
            solution = stage.solve(x, options)
            tolerance = options.tolerance or TOLERANCE[stage.b_z.dtype]
            return stage.readout(solution.value), solution.value, solution.converged, tolerance
        dae, _ = self._stages[k]
        grid = dae.grid
        map = self._maps.setdefault(k, StateMap(dae.W, dae.blocks, dae.Lambda, grid=grid))
        u = grid.affine(dae.U, grid.coordinates(x), dae.bias_z)
        solution = solve(map, dae.sigma, u, SolverOptions(throw=False), f"the equilibrium of {dae.name!r}")
        y = grid.values(grid.affine(dae.G, solution.value, dae.bias_y))
        return y, solution.value, solution.converged, TOLERANCE[torch.float64]

    def _stage(
        self, k: int, stage: LBEN, z: Tensor, tolerance: float, largest: Tensor, distance: Tensor, u: float
    ) -> tuple[Tensor, Tensor | None]:
        """Bounds of one stage's own error: of its output in l2 (B, 2), and of the functionals (B, m, 2)."""
        dae, found = self._stages[k]
        grid = stage.grid
        n, p = dae.states, dae.inputs
        g, g_U = (gamma(operations(count + 8, dae.W), u) for count in (n, n + p))
        eta = transform_growth(grid.image) * u
        sizes = _channel_norms(grid, z)  # (B, n) float64
        # A norm in the dtype in use does not see what has squares below its smallest number.
        under = (n * grid.pixels * torch.finfo(z.dtype).tiny) ** 0.5
        flat = torch.linalg.vector_norm(sizes, dim=-1)
        b_y = float(torch.linalg.vector_norm(dae.bias_y)) * grid.pixels**0.5
        outputs, functionals = [], []
        for m in found:
            center = torch.linalg.vector_norm(sizes * m.d.to(sizes.device), dim=-1)
            # |d|_P and ‖z − s‖₂ are at most A Z + A2 ‖z‖₂ + B X + C, for any running input of norm X with states Z
            # = ‖Dz‖, ‖z‖₂
            # σ itself is off by a few ulps of what it is given and what it gives, and goes through two transforms
            tail, ulps = tolerance * (1.0 + 1e-2) + ELEMENTARY * u, 2.0 * eta * SLACK
            least = float(m.d.min()) if n else 1.0
            # scale = ‖z‖ + ‖u‖ + ‖Wz‖ ≤ ‖z‖ + (‖D|U|‖X + b)/min D + ‖D|W|D⁻¹‖Z/min D
            slip = {"Z": tail * m.W / least, "z": tail + ulps, "X": tail * m.U / least, "1": tail * m.b / least + under}
            skipped = m.most * tolerance * (1.0 + 1e-2)  # forward substitution leaves out W − T, ‖W − T‖ ≤ tolerance
            d = {
                "Z": (g + eta) * m.W + m.leak * slip["Z"],
                "z": skipped + m.leak * slip["z"],
                "X": (g_U + 2.0 * eta) * m.U + m.leak * slip["X"],
                "1": (g_U + eta) * m.b + m.leak * slip["1"],
            }
            # e = ‖D(z − z*)‖ ≤ |d|_P/μ + max D·slip, itself in terms of Z ≤ Z₀ + K·distance + 2e
            e = {key: d[key] / m.mu + m.most * slip[key] for key in d}
            K = m.U / m.mu
            alpha = 2.0 * (e["Z"] + e["z"] / least)
            if alpha >= 0.5:
                continue
            base_Z, base_z = _affine(center) + K * distance, _affine(flat) + (K / least) * distance
            fixed = e["Z"] * base_Z + e["z"] * base_z + e["X"] * largest
            fixed = _plus(fixed, e["1"])
            off = fixed / (1.0 - alpha)
            Z, z2 = base_Z + 2.0 * off, base_z + (2.0 / least) * off

            def total(c: dict[str, float], Z: Tensor = Z, z2: Tensor = z2) -> Tensor:
                return _plus(c["Z"] * Z + c["z"] * z2 + c["X"] * largest, c["1"]) * SLACK

            residual, slipped = total(d), total(slip)
            g_G = gamma(operations(n + 4, dae.W), u)
            outputs.append(
                (m.G / m.mu) * residual + m.G * m.most * slipped + (g_G + eta) * _plus(m.abs_G * Z, b_y) * SLACK
            )
            if (q := m.pairs) is not None:
                back = _plus(m.abs_G * Z, b_y) * (eta * SLACK)  # the transform to pixels
                functionals.append(
                    _outer(q.residual, residual)
                    + _outer(q.slip, m.most * slipped)
                    + g_G * (_outer(q.rounding, Z) + _outer(q.bias, _affine(torch.ones_like(flat))))
                    + _outer(q.carried, back)
                )
        if not outputs:
            return torch.full_like(largest, math.inf), None
        return _smaller(outputs), _smaller(functionals) if functionals else None

    def _glue(self, step: nn.Module, L: float, x: Tensor, largest: Tensor, u: float) -> Tensor:
        """The rounding of glue, (B, 2)."""
        if type(step) in EXACT:
            return torch.zeros_like(largest)
        numel = math.prod(x.shape[1:])
        if isinstance(step, Normalize):
            count, constant = 4, float(step.mean.double().abs().max()) * numel**0.5
        elif is_activation(step):
            count, constant = int(ELEMENTARY), float(step(x.new_zeros(1)).abs()) * numel**0.5
            if isinstance(step, nn.Softplus):  # torch's jumps where it becomes linear
                jump = math.exp(-step.threshold) / step.beta * numel**0.5 * SLACK
                return _plus(gamma(count, u) * L * _plus(largest, constant) * SLACK, jump)
        else:
            # pooling, or a third party's own: sums of no more terms than there are entries
            count = numel + 8
            zero = step(x.new_zeros(1, *x.shape[1:]))
            constant = float(_norm(zero)) / L
        return gamma(count, u) * L * _plus(largest, constant) * SLACK


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


def _channel_norms(grid: Grid, z: Tensor) -> Tensor:
    return grid.channel_norms(z.to(torch.complex128 if z.is_complex() else torch.float64)) * SLACK
