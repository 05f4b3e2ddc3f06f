"""Conditions (3), (4) and (10) proved for given floats, and constants of single outputs with them.

H is formed in float64 from W, U, G and Λ as they are; how far rounding may have moved it is bounded (`Enclosure`), and what
is left is shown to be positive definite by a Cholesky factorisation (`linalg.rounding.exceeds`). "Proved" then holds
in exact arithmetic. H ≻ 0 also gives (3), so a unique equilibrium exists (Propositions 2.1 and 2.2 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dae.conditions import strict_multiplier
from ..dae.dae import DAE
from ..errors import InvalidParameterError, ShapeError
from ..foundation.arguments import isolated, number
from ..linalg.rounding import SLACK, UNDERFLOW, exceeds, gamma, operations, root_power
from ..linalg.spectrum import DENSE, Grid, hermitian, least_eigenvalue

if TYPE_CHECKING:
    from ..networks.lben import LBEN

# The inflations at which a constant is tried: 0 for networks strictly inside (10), then 10⁻⁶ as DESIGN has it; float32
# weights, whose rounding violates (10) by 10⁻⁷, need one or two more.
DELTAS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

# Lower bounds c of λ_min(R), in its gauge, that are tried: a gain costs (residual)²/c. Residuals are 10⁻¹³, or what rounded
# kernels in float32 leave, 10⁻⁷.
MARGINS = (1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 1e-10)


@dataclass(frozen=True)
class Proof:
    """H(Λ, L) ≻ 0, proved: every network with these W, U, G is well-posed and L-Lipschitz.

    ``Lambda`` (n,), ``lipschitz`` L; ``delta``: L is that of the DAE times 1 + δ; ``rounding``: the bound of ‖Ĥ − H‖₂ that
    was allowed for, in a gauge where Λ is within [1/2, 2].
    """

    Lambda: Tensor
    lipschitz: float
    rounding: float
    delta: float = 0.0


@dataclass(frozen=True)
class NotProved:
    """No proof was found; false in a condition. ``least_eigenvalue`` of the computed H in its gauge, and ``reason``."""

    lipschitz: float
    least_eigenvalue: float
    rounding: float
    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class Enclosure:
    """All W (n, n), U (n, p), G (q, n) within entrywise radii of given floats; complex (F, ...) on a grid.

    A radius is a tensor of the same shape, None for 0. Between the frequencies a grid holds twice, the network is the mean of
    both (its kernels are real): H is concave in (W, U, G), so what is proved of each holds for the mean.
    """

    W: Tensor
    U: Tensor
    G: Tensor
    grid: Grid = DENSE
    radius_W: Tensor | None = None
    radius_U: Tensor | None = None
    radius_G: Tensor | None = None

    @classmethod
    @isolated
    def of(cls, dae: DAE) -> Enclosure:
        """The DAE's own floats, nothing around them; on the CPU, where proofs are made."""
        return cls(dae.W.cpu(), dae.U.cpu(), dae.G.cpu(), dae.grid)

    @classmethod
    def of_stage(cls, stage: LBEN) -> Enclosure:
        """The floats that a stage runs; with an image also the exact spectra of its kernels U and G, and of a given W.

        Those are within the radii of the spectra in use (`Grid.matrices_error`).
        """
        E = cls.of(stage.running())
        if not stage.grid:
            return E
        radius_U, radius_G = (stage.grid.matrices_error(K, M) for K, M in ((stage.U, E.U), (stage.G, E.G)))
        radius_W = None if stage.given is None else stage.grid.matrices_error(stage.given, E.W)
        return replace(E, radius_W=radius_W, radius_U=radius_U, radius_G=radius_G)

    @property
    def states(self) -> int:
        """n."""
        return self.W.shape[-1]

    @cached_property
    def gram_U(self) -> Tensor:
        """UU′, (..., n, n), as computed."""
        return self.U @ self.U.mH

    @cached_property
    def gram_G(self) -> Tensor:
        """G′G, (..., n, n), as computed."""
        return self.G.mH @ self.G

    @cached_property
    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """|W|, |U|, |G|, entry by entry."""
        return self.W.abs(), self.U.abs(), self.G.abs()

    @cached_property
    def in_range(self) -> bool:
        """Whether no product of entries can underflow or overflow unseen: all are 0 or of sizes within [1e-140, 1e140]."""
        return in_range(*self.sizes, *(r for r in (self.radius_W, self.radius_U, self.radius_G) if r is not None))

    @cached_property
    def mean(self) -> Enclosure:
        """The mean of both where the grid holds a frequency twice, itself elsewhere. The one rounding is counted in `lmi`."""

        def mean(M: Tensor) -> Tensor:
            return 0.5 * (M + self.grid.mirrored(M))

        radii = [None if r is None else mean(r) for r in (self.radius_W, self.radius_U, self.radius_G)]
        return Enclosure(mean(self.W), mean(self.U), mean(self.G), self.grid, *radii)

    def lmi(self, Lambda: Tensor, lipschitz: float | None, parts: str = "UG") -> tuple[Tensor, Tensor, float]:
        """(Ĥ, d, e): DĤD is H(Λ, L) up to ‖error‖₂ ≤ e, in the gauge D = diag(1/d), d powers of two next to Λ^{1/2}.

        ``parts``: which of UU′ and G′G belong to it; "" gives X(Λ), "U" gives X − ΛUU′Λ/L.
        """
        d = root_power(Lambda)
        inverse = d.reciprocal()
        lam = Lambda * inverse * inverse  # in [1/2, 2]; the scaling rounds nothing
        left = lam * d
        abs_W, abs_U, abs_G = self.sizes

        def rows(*factors: Tensor) -> Tensor:
            """The row sums of a product of nonnegative matrices and diagonals (vectors)."""
            total = factors[-1].unsqueeze(-1) if factors[-1].dim() == 1 else factors[-1].sum(-1, keepdim=True)
            for factor in reversed(factors[:-1]):
                total = factor.unsqueeze(-1) * total if factor.dim() == 1 else factor @ total
            return total.squeeze(-1)

        LW = left.unsqueeze(-1) * self.W * inverse
        H = -(LW + LW.mH)
        H.diagonal(dim1=-2, dim2=-1).add_(2.0 * lam)
        terms = 2.0 * lam + rows(left, abs_W, inverse) + rows(inverse, abs_W.mT, left)
        radius = torch.zeros_like(terms)
        if self.radius_W is not None:
            radius = radius + rows(left, self.radius_W, inverse) + rows(inverse, self.radius_W.mT, left)
        count = 12
        L = 1.0 if lipschitz is None else lipschitz
        if "U" in parts and self.U.shape[-1]:
            H -= left.unsqueeze(-1) * self.gram_U * left / L
            terms = terms + rows(left, abs_U, abs_U.mT, left) / L
            count += self.U.shape[-1]
            if (r := self.radius_U) is not None:
                cross = rows(left, abs_U, r.mT, left) + rows(left, r, abs_U.mT, left) + rows(left, r, r.mT, left)
                radius = radius + cross / L
        if "G" in parts and self.G.shape[-2]:
            H -= inverse.unsqueeze(-1) * self.gram_G * inverse / L
            terms = terms + rows(inverse, abs_G.mT, abs_G, inverse) / L
            count += self.G.shape[-2]
            if (r := self.radius_G) is not None:
                cross = rows(inverse, abs_G.mT, r, inverse) + rows(inverse, r.mT, abs_G, inverse)
                radius = radius + (cross + rows(inverse, r.mT, r, inverse)) / L
        worst = gamma(operations(count, self.W)) * terms + radius * SLACK
        error = float(worst.amax()) * SLACK + self.states * UNDERFLOW if self.states else 0.0
        # The gauge multiplies by up to max d / min d.
        if not self.in_range or (self.states and not 1e-70 <= float(d.min()) <= float(d.max()) <= 1e70):
            error = float("inf")
        return H, d, error


def in_range(*matrices: Tensor) -> bool:
    """Whether all entries are 0 or of sizes within [1e-140, 1e140]: their squares and products cannot underflow unseen."""
    sizes = (M.abs() for M in matrices)
    return all(bool((((M >= 1e-140) & (M <= 1e140)) | (M == 0)).all()) for M in sizes)


@isolated
def prove_lmi(dae: DAE | Enclosure, Lambda: Tensor | None = None, lipschitz: float | None = None) -> Proof | NotProved:
    """Prove H(Λ, L) ≻ 0, condition (4), for these very floats; Λ and L default to the DAE's own.

        H(Λ, L) = 2Λ − ΛW − W′Λ − G′G/L − ΛUU′Λ/L                                                    (FORMULAS 0.1)

    A `Proof` (true) holds in exact arithmetic for every W, U, G of the enclosure; on a grid at every frequency. `NotProved`
    (false) says why not: most converted networks have a singular H at their own L, and are proved at L(1 + δ) with
    `strict_multiplier` (`prove_constant`). Λ (n,) positive, float64.

    Raises `ShapeError`, `InvalidParameterError` for Λ ≤ 0, L ≤ 0, or an `Enclosure` without Λ and L.
    """
    enclosure, Lambda, L = _arguments(dae, Lambda, lipschitz)
    H, _, error = enclosure.lmi(Lambda, L)
    if exceeds(H, error):
        return Proof(Lambda, L, error)
    return _not_proved(H, error, L, f"H(Λ, L) at L = {L:.9g}")


@isolated
def prove_constant(dae: DAE, enclosure: Enclosure | None = None) -> Proof | NotProved:
    """The DAE's own L, proved at L(1 + δ) for the least δ of `DELTAS` that has a proof, by Λ or the strict multiplier Λ_δ.

    ``enclosure``: of the floats in use, by default the DAE's own. (FORMULAS 3)
    """
    enclosure = Enclosure.of(dae) if enclosure is None else enclosure
    Lambda, L = dae.Lambda.cpu(), dae.lipschitz
    for delta in DELTAS:
        L = dae.lipschitz * (1.0 + delta)
        for multiplier in [Lambda] if delta == 0.0 else [Lambda, strict_multiplier(dae, delta).cpu()]:
            H, _, error = enclosure.lmi(multiplier, L)
            if exceeds(H, error):
                return Proof(multiplier, L, error, delta)
    H, _, error = enclosure.lmi(Lambda, L)
    return _not_proved(H, error, L, f"H(Λ, L) of {dae.name!r}, up to L = {L:.9g}")


@isolated
def prove_monotone(dae: DAE | Enclosure, metric: Tensor) -> float:
    """A proved μ ≥ 0 with X(P) = 2P − PW − W′P ⪰ 2μP for a diagonal metric P (n,); 0 where there is no proof.

    μ > 0 is condition (3): a unique equilibrium exists, and inexact ones are near it (FORMULAS 6).
    """
    enclosure, P, _ = _arguments(dae, metric, 1.0)
    X, d, error = enclosure.lmi(P, None, "")
    if not enclosure.states:
        return 1.0
    gauged = P / d / d
    root = gauged.rsqrt()
    estimate = 0.5 * _least_of_definite(root.unsqueeze(-1) * X * root)
    shares = (share * estimate for share in (0.999, 0.9, 0.5))
    return next((mu for mu in shares if mu > 0.0 and _exceeds_in(X, gauged, error, mu)), 0.0)


def proves_monotone(dae: DAE | Enclosure, metric: Tensor, mu: float) -> bool:
    """Whether X(P) ⪰ 2μP is proved for a given μ > 0 and diagonal metric P (n,); see `prove_monotone`."""
    enclosure, P, _ = _arguments(dae, metric, 1.0)
    X, d, error = enclosure.lmi(P, None, "")
    return 0.0 < mu < float("inf") and _exceeds_in(X, P / d / d, error, mu)


def _exceeds_in(X: Tensor, P: Tensor, error: float, mu: float) -> bool:
    """Whether every matrix within ``error`` of X is ≻ 2μP: proved, or False. In the gauge of `Enclosure.lmi`."""
    if 0 in X.shape:
        return True
    shifted = X.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(2.0 * mu * P)
    # the subtraction and the product before it round
    return exceeds(shifted, error + 2.0**-50 * (float(X.abs().amax()) + 4.0 * mu))


def _least_of_definite(A: Tensor) -> float:
    """λ_min of A ≻ 0 (..., n, n), the least over the leading dimensions, from above; 0 where A has no Cholesky factor.

    Inverse iteration on a few vectors, a fraction of the time of all eigenvalues: an estimate, nothing is proved by it.
    """
    R, info = torch.linalg.cholesky_ex(A)
    if bool(info.any()) or not bool(torch.isfinite(R).all()):
        return 0.0
    places = torch.arange(A.shape[-1], dtype=torch.float64).unsqueeze(-1)
    V = torch.cos(places * torch.arange(1.0, 9.0, dtype=torch.float64).sqrt() + 0.3).to(A.dtype)
    V = V[:, : A.shape[-1]].expand(*A.shape[:-2], -1, -1)
    for _ in range(6):
        V = torch.linalg.qr(torch.cholesky_solve(V, R)).Q
    return float(torch.linalg.eigvalsh(V.mH @ A @ V).amin())


@isolated
def prove_gains(
    enclosure: Enclosure, Q: Tensor, rows: Tensor, radius: Tensor | None = None, parts: str = "U"
) -> tuple[Tensor, Tensor]:
    """Proved bounds (ρ, |h|), each (m,), of g′R⁻¹g and ‖Q^{1/2} R⁻¹g‖₂ for functionals g; ∞ where there is no proof.

        R(Q) = 2Q − QW − W′Q − QUU′Q,   ρ = g′R⁻¹g

    By a Schur complement H(ρQ, √ρ·√ρ) restricted to the output g′z is ⪰ 0 exactly when g′R⁻¹g ≤ ρ: x ↦ g′z has the Lipschitz
    constant √ρ. ``rows`` (m, n), on a grid (m, F, n): functionals are then Σ_F weight Re(g′z) (`Grid.weights`). ``radius``:
    of their entries. With ``parts=""`` R is X(Q). For any h, with r = g − Rh and R ⪰ cI,

        g′R⁻¹g ≤ Re h′(g + r) + ‖r‖²/c,

    so an approximate solve is enough. R⁻¹g of a mean of two frequencies is not within theirs: it is solved for by itself, and
    the larger |h| counts. Everything is taken in the gauge of `Enclosure.lmi`.
    """
    R, d, error = enclosure.lmi(Q, None, parts)
    count, inverse = len(rows), d.reciprocal()
    infinite = torch.full((count,), float("inf"), dtype=torch.float64)
    sane = in_range(rows) and (radius is None or in_range(radius))
    margin = next((c for c in MARGINS if exceeds(R, error, c)), None) if sane else None
    if margin is None:
        return infinite, infinite.clone()
    grid = enclosure.grid
    # columns: (F, n, m) or (n, m)
    g = (rows * inverse).movedim(0, -1).contiguous()
    spread = torch.zeros_like(g.real) if radius is None else (radius * inverse).movedim(0, -1)
    metric = Q * inverse * inverse  # at most 2
    bound, size = _solved(R, g, spread, error, margin, metric, grid)
    if grid.asymmetry(R) or grid.asymmetry(g):
        R, _, error = enclosure.mean.lmi(
            Q, None, parts
        )  # at least as definite: R of a mean is no less than the mean of R
        g, spread = (0.5 * (M + grid.mirrored(M)) for M in (g, spread))
        size = torch.maximum(size, _solved(R, g, spread, error, margin, metric, grid)[1])
    return bound, size


def _solved(
    R: Tensor, g: Tensor, spread: Tensor, error: float, margin: float, metric: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """`prove_gains` for R ⪰ ``margin``·I within ``error`` of what is meant, g within ``spread``, all in the gauge."""
    weights = grid.weights(torch.ones((), dtype=torch.float64))
    lower = torch.linalg.cholesky(R)
    h = torch.cholesky_solve(g, lower)
    for _ in range(2):
        h = h + torch.cholesky_solve(g - R @ h, lower)
    r = g - R @ h
    k = gamma(operations(R.shape[-1] + 4, R))

    def total(x: Tensor) -> Tensor:
        """Σ over states, and over frequencies with their weights: (..., n, m) → (m,)."""
        x = x.sum(-2)
        return (weights.unsqueeze(-1) * x).sum(0) if grid else x

    size_h, size_g = h.abs(), g.abs()
    norm_h = total(size_h.square()).sqrt()
    slips = total((k * (size_g + R.abs() @ size_h) + spread).square()).sqrt() + error * norm_h
    residual = (total(r.abs().square()).sqrt() + slips) * SLACK
    dot = total((h.conj() * (g + r)).real)
    blur = total(size_h * (k * (size_g + r.abs()) + 2.0 * spread)) + norm_h * slips
    bound = dot + (blur + residual.square() / margin) * SLACK
    # the final sums over n and F of terms of both signs round by γ of their sizes, counted in k
    longest = operations(R.shape[-1] * max(1, len(weights.flatten())), R)
    bound = bound + gamma(longest) * total(size_h * (size_g + r.abs()))
    in_metric = total(metric.unsqueeze(-1) * size_h.square()).sqrt()
    return bound, (in_metric + 2.0**0.5 * residual / margin) * SLACK


def _arguments(dae: DAE | Enclosure, Lambda: Tensor | None, lipschitz: float | None) -> tuple[Enclosure, Tensor, float]:
    if isinstance(dae, DAE):
        Lambda = dae.Lambda if Lambda is None else Lambda
        L = (
            dae.lipschitz
            if lipschitz is None
            else number(lipschitz, "lipschitz", "it must be positive and finite", above=0.0)
        )
        enclosure = Enclosure.of(dae)
    elif not isinstance(dae, Enclosure):
        raise InvalidParameterError(
            "what is to be proved", type(dae).__name__, "it must be a DAE: stage.running() of an LBEN"
        )
    else:
        if Lambda is None or lipschitz is None:
            raise InvalidParameterError("Lambda, L", None, "an Enclosure has none of its own")
        enclosure, L = (
            dae,
            number(lipschitz, "lipschitz", "it must be positive and finite", above=0.0),
        )
    if not isinstance(Lambda, Tensor):
        raise InvalidParameterError("Lambda", type(Lambda).__name__, "it must be a tensor (n,)")
    Lambda = Lambda.detach().to("cpu", torch.float64)
    if tuple(Lambda.shape) != (enclosure.states,):
        raise ShapeError("Lambda", (enclosure.states,), tuple(Lambda.shape))
    if not bool(((Lambda > 0.0) & torch.isfinite(Lambda)).all()):
        raise InvalidParameterError("Lambda", Lambda.tolist()[:8], "every entry of Λ must be positive and finite")
    if not 0.0 < L < float("inf"):
        raise InvalidParameterError("lipschitz", L, "a Lipschitz constant must be positive and finite")
    return enclosure, Lambda, L


def _not_proved(H: Tensor, error: float, L: float, what: str) -> NotProved:
    least = least_eigenvalue(hermitian(H)) if bool(torch.isfinite(H).all()) else float("nan")
    if least < -error:
        reason = (
            f"{what} has the eigenvalue {least:.3e}, below 0 by more than rounding ({error:.1e}): with this Λ the constant "
            "is not true of these weights, or not provable. Usual causes: weights fine-tuned or rounded without the "
            "constraint; a network that is not Lipschitz-bounded at all; norms estimated from below"
        )
    else:
        reason = (
            f"{what} has the least eigenvalue {least:.3e}, within what rounding may have done ({error:.1e}, and the "
            "factorisation's own): singular there, as for most converted networks. State it at L(1 + δ), "
            "with a strict multiplier"
        )
    return NotProved(L, least, error, reason)
