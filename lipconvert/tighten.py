"""The multipliers Λ that prove the least constants, for W, U and G as they are: no training.

With Q = Λ/ρ and R(Q) = 2Q − QW − W′Q − QUU′Q ≻ 0, condition (10) for the single output g′z says (Schur complement)

    |g′z(x) − g′z(x′)|² ≤ ρ ‖x − x′‖²   as soon as   ρ ≥ g′R(Q)⁻¹g.

R is concave in Q and g′R⁻¹g convex and decreasing in R: the best diagonal multiplier of a logit difference minimises a smooth
convex function of n positive numbers, the dual of LipSDP (Fazlyab et al. 2019, arXiv:1906.04893) without its linear matrix
inequality. For all outputs at once it is λ_max(GR⁻¹G′). Both are solved by Newton's method along the central path of

    t ρ − log det R(Q),     t s − log det R(Q) − log det(sI − GR⁻¹G′),

self-concordant functions, so a dozen steps from any strictly feasible Q are enough, and every iterate is a valid
multiplier. Networks on a grid have one R for each frequency and one Q for all of them. Nothing here is proved: the
multipliers are handed to `lipconvert.proofs`, which does not care where they come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .proofs import Enclosure
from .spectrum import hermitian, linear_solve

# How far along the central path, t = factor·n/ρ from 1: at the end ρ is within a factor 1 + 1/LAST of its minimum.
# What is only a start for others need not go so far.
MIDDLE, LAST, GROWTH = 100.0, 1000.0, 10.0
STEPS = 100  # Newton steps, at most
# Newton decrement below which t grows. Next to a singular R it is 1 however far the centre is, so it must be well below that.
CENTRED = 0.5
# Multipliers of rows that read nothing, over the largest of the others: what is left is lost as 1/HELD.
HELD = 1e6
# Bytes of R in one batch of problems: what stays in the cache is four times faster than all at once.
BATCH = 2**20


@dataclass(frozen=True, eq=False)
class _Problem:
    """W (F, n, n), K = UU′ (F, n, n), and how often each frequency counts, (F,); F = 1 for a dense network.

    ``held`` (n,): rows that read neither states nor inputs. Their multipliers only gain by growing, without end.
    """

    W: Tensor
    K: Tensor
    count: Tensor
    weights: Tensor
    held: Tensor

    @classmethod
    def of(cls, enclosure: Enclosure) -> _Problem:
        weights = enclosure.grid.weights(torch.ones((), dtype=torch.float64)).reshape(-1)
        W, K = (M if enclosure.grid else M.unsqueeze(0) for M in (enclosure.W, enclosure.gram_U))
        held = ~((W != 0).any(-1) | (K != 0).any(-1)).any(0)
        return cls(W, K, weights * enclosure.grid.pixels, weights, held)

    @property
    def size(self) -> float:
        """The parameter of the barrier: n for every pixel."""
        return float(self.count.sum()) * self.W.shape[-1]

    def R(self, Q: Tensor) -> Tensor:
        """(P, n) → (P, F, n, n)."""
        q = Q[:, None, :]
        left = q.unsqueeze(-1) * self.W
        R = -(left + left.mH)
        R -= q.unsqueeze(-1) * self.K * q.unsqueeze(-2)
        R.diagonal(dim1=-2, dim2=-1).add_(2.0 * q)
        return R


@dataclass
class _Point:
    """R = CC′ at Q and h = R⁻¹g; ``value`` (P,) is ρ, or s, with N the Cholesky factor of sI − GR⁻¹G′; ``objective`` (P,)."""

    Q: Tensor
    C: Tensor
    h: Tensor
    value: Tensor
    objective: Tensor
    N: Tensor | None = None


def best_gains(
    enclosure: Enclosure,
    start: Tensor,
    rows: Tensor,
    *,
    deadline: float | None = None,
    last: float = LAST,
) -> Tensor:
    """Multipliers Q (P, n) that (nearly) minimise g′R(Q)⁻¹g for P groups of functionals, from a ``start`` with R ≻ 0.

    ``rows`` (P, k, n), on a grid (P, k, F, n): the sum over the k functionals of a group is minimised; one of each is a logit
    difference, all of them in one group a good start for each. ``start`` (n,) or (P, n). ``deadline``: of
    `time.monotonic`; multipliers are valid whenever it strikes. Returns ``start`` where no step was possible.
    """
    problem, groups = _Problem.of(enclosure), len(rows)
    g = rows.movedim(1, -1) if enclosure.grid else rows.movedim(1, -1).unsqueeze(1)  # (P, F, n, k)
    Q = start.expand(groups, -1).clone()
    chunk = max(1, BATCH // max(1, problem.W.numel() * problem.W.element_size()))
    for part in torch.arange(groups).split(chunk):
        Q[part] = _follow(problem, Q[part], g[part], False, deadline, last)
    return Q


def best_outputs(enclosure: Enclosure, start: Tensor, *, deadline: float | None = None) -> Tensor:
    """A multiplier Q (n,) that (nearly) minimises λ_max(GR(Q)⁻¹G′) over all frequencies; `best_gains`' twin for vectors."""
    problem = _Problem.of(enclosure)
    g = (enclosure.G if enclosure.grid else enclosure.G.unsqueeze(0)).mH.unsqueeze(0)
    return _follow(problem, start.unsqueeze(0).clone(), g, True, deadline, LAST)[0]


def best_scales(enclosure: Enclosure, Lambda: Tensor, rows: Tensor) -> Tensor:
    """s (m,) > 0 for which Q = sΛ is the best multiple of a given Λ (n,), for functionals (m, n) or (m, F, n).

    With X(Λ) = CC′ and C⁻¹ΛUU′ΛC⁻′ = E diag(κ) E′:  g′R(sΛ)⁻¹g = Σ |E′C⁻¹g|² / (s − s²κ), convex on (0, 1/max κ).
    """
    problem = _Problem.of(enclosure)
    if not bool(problem.K.any()):  # nothing is read: any multiple will do
        return torch.ones(len(rows), dtype=torch.float64)
    left = Lambda.unsqueeze(-1) * problem.W
    X = -(left + left.mH)
    X.diagonal(dim1=-2, dim2=-1).add_(2.0 * Lambda)
    C = torch.linalg.cholesky(X)
    inner = torch.linalg.solve_triangular(C, Lambda.unsqueeze(-1) * problem.K * Lambda, upper=False)
    kappa, E = torch.linalg.eigh(hermitian(torch.linalg.solve_triangular(C, inner.mH, upper=False)))
    g = (rows if enclosure.grid else rows.unsqueeze(1)).permute(1, 2, 0)  # (F, n, m)
    share = (E.mH @ torch.linalg.solve_triangular(C, g.to(C.dtype), upper=False)).abs().square()
    share = (share * problem.weights[:, None, None]).flatten(0, 1)  # (F n, m)
    kappa = kappa.flatten().clamp(min=0.0).unsqueeze(-1)
    low = torch.zeros(rows.shape[0], dtype=torch.float64)
    high = torch.full_like(low, 1.0 / float(kappa.max()))
    for _ in range(60):  # bisection on the derivative, which increases
        s = 0.5 * (low + high)
        slope = (share * (2.0 * s * kappa - 1.0) / (s - s.square() * kappa).square()).sum(0)
        low, high = torch.where(slope < 0, s, low), torch.where(slope < 0, high, s)
    return low.clamp(min=1e-300)


def least_gains(enclosure: Enclosure, rows: Tensor) -> Tensor:
    """What no multiplier can go below, (m,): g′R⁻¹g ≥ ‖g′(I − DW)⁻¹DU‖² for every diagonal 0 ≤ D ≤ I.

    Condition (10) covers all slopes in [0, 1], so in particular constant ones; tried are D = I, and D = I on the
    rows that read the input and 0 elsewhere, the identity inside a residual network. An estimate in float64, to
    know when to stop.
    """
    weights = _Problem.of(enclosure).weights
    least = torch.zeros(len(rows), dtype=torch.float64)
    g = rows if enclosure.grid else rows.unsqueeze(1)  # (m, F, n)
    for T in _linear_parts(enclosure):
        T = T if enclosure.grid else T.unsqueeze(0)
        least = torch.maximum(least, torch.einsum("mfn,fnp->mfp", g.conj(), T).abs().square().sum(-1) @ weights)
    return least


def least_output(enclosure: Enclosure) -> float:
    """The same for the output as a vector: max ‖G(I − DW)⁻¹DU‖₂."""
    norms = [torch.linalg.matrix_norm(enclosure.G @ T, 2).amax() for T in _linear_parts(enclosure)]
    return float(max(norms))


def _linear_parts(enclosure: Enclosure) -> Iterator[Tensor]:
    """(I − DW)⁻¹DU, (..., n, p), for the two D of `least_gains`."""
    U, n = enclosure.U, enclosure.states
    reads = (U != 0).any(-1)
    reads = reads.any(0) if enclosure.grid else reads
    for slopes in (torch.ones(n, dtype=torch.float64), reads.double()):
        A = torch.eye(n, dtype=U.dtype) - slopes.unsqueeze(-1) * enclosure.W
        yield linear_solve(A, slopes.unsqueeze(-1) * U)


def _follow(problem: _Problem, Q: Tensor, g: Tensor, outputs: bool, deadline: float | None, last: float) -> Tensor:
    """Newton along the central path from Q (P, n), each problem at its own t; the best multiplier met for each."""
    Q = Q.clone()
    Q[:, problem.held] = HELD * Q.amax(-1, keepdim=True)
    best, t = Q.clone(), torch.ones(len(Q), dtype=torch.float64)
    point = _evaluate(problem, Q, g, t, outputs, None)
    if not bool(torch.isfinite(point.objective).all()):
        return best
    least = _largest(point) if outputs else point.value
    start = problem.size / least
    end = last * start
    # A start from elsewhere may be far along its path: the t for which it is most central.
    flat, _ = _derivatives(problem, point, torch.zeros_like(t), outputs)
    steep, hessian = _derivatives(problem, point, start, outputs)
    inward = linear_solve(hessian, flat.unsqueeze(-1)).squeeze(-1)
    slope = (steep - flat) / start.unsqueeze(-1)
    along = linear_solve(hessian, slope.unsqueeze(-1)).squeeze(-1)
    central = -(slope * inward).sum(-1) / (slope * along).sum(-1)
    t = torch.where(torch.isfinite(central), torch.minimum(torch.maximum(central, start), end), start)
    point = _evaluate(problem, Q, g, t, outputs, point.value if outputs else None)
    for _ in range(STEPS):
        if deadline is not None and time.monotonic() > deadline:
            return best
        point, decrement = _step(problem, point, g, t, outputs)
        reached = _largest(point) if outputs else point.value
        better = reached < least
        best[better], least = point.Q[better], torch.where(better, reached, least)
        end = last * problem.size / least
        centred = decrement < CENTRED
        if bool((centred & (t >= end)).all()):
            break
        following = torch.where(centred, torch.minimum(GROWTH * t, end), t)
        point.objective = point.objective + (following - t) * point.value
        t = following
    return best


def _evaluate(problem: _Problem, Q: Tensor, g: Tensor, t: Tensor, outputs: bool, s: Tensor | None) -> _Point:
    """The objective at Q; ∞ where R (or sI − GR⁻¹G′) is not positive definite. s None: a little above λ_max(GR⁻¹G′)."""
    C, info = torch.linalg.cholesky_ex(problem.R(Q))
    bad = (info != 0).any(-1)
    h = torch.cholesky_solve(g.to(C.dtype).expand(len(Q), *g.shape[1:]), C)
    barrier = -2.0 * (C.diagonal(dim1=-2, dim2=-1).real.log().sum(-1) @ problem.count)
    if not outputs:
        value = ((g.conj() * h).real.sum((-2, -1))) @ problem.weights
        objective = torch.where(bad, float("inf"), t * value + barrier)
        return _Point(Q, C, h, value, objective)
    B = g.mH @ h
    top: Tensor = 1.1 * torch.linalg.eigvalsh(hermitian(B)).amax((-2, -1)) if s is None else s
    eye = torch.eye(B.shape[-1], dtype=B.dtype)
    N, worse = torch.linalg.cholesky_ex(top[:, None, None, None] * eye - hermitian(B))
    barrier = barrier - 2.0 * (N.diagonal(dim1=-2, dim2=-1).real.log().sum(-1) @ problem.count)
    bad = bad | (worse != 0).any(-1)
    return _Point(Q, C, h, top, torch.where(bad, float("inf"), t * top + barrier), N)


def _largest(point: _Point) -> Tensor:
    """λ_max(GR⁻¹G′) at a point of the vector problem, from NN′ = sI − GR⁻¹G′."""
    assert point.N is not None
    return point.value - torch.linalg.eigvalsh(point.N @ point.N.mH).amin((-2, -1))


def _step(problem: _Problem, point: _Point, g: Tensor, t: Tensor, outputs: bool) -> tuple[_Point, Tensor]:
    """One damped Newton step for every problem of the batch: the new point and the Newton decrement (P,)."""
    gradient, hessian = _derivatives(problem, point, t, outputs)
    n = point.Q.shape[-1]
    gradient[:, :n][:, problem.held] = 0.0
    hessian[:, :n][:, problem.held] = 0.0
    hessian[..., :n][..., problem.held] = 0.0
    hessian.diagonal(dim1=-2, dim2=-1)[:, :n][:, problem.held] = 1.0
    factor, info = torch.linalg.cholesky_ex(hessian)
    direction = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    # Where round-off has spoilt the Hessian there is nothing left to gain.
    usable = (info == 0) & torch.isfinite(direction).all(-1)
    direction = torch.where(usable.unsqueeze(-1), direction, 0.0)
    decrement = (-(gradient * direction).sum(-1)).clamp(min=0.0).sqrt()

    def at(length: Tensor) -> _Point:
        s = point.value + length * direction[:, n] if outputs else None
        return _evaluate(problem, point.Q + length.unsqueeze(-1) * direction[:, :n], g, t, outputs, s)

    length = torch.ones_like(decrement)
    new = at(length)
    for halvings in range(1, 41):
        # the objective is known to about 1e-12 of its size
        enough = point.objective - 1e-4 * length * decrement.square() + 1e-12 * point.objective.abs()
        good = (new.objective <= enough) & (new.Q > 0.0).all(-1)
        if bool(good.all()):
            break
        length = torch.where(good, length, 0.5 * length if halvings < 40 else 0.0)
        new = at(length)
    return new, torch.where(length > 0.0, decrement, 0.0)


def _derivatives(problem: _Problem, point: _Point, t: Tensor, outputs: bool) -> tuple[Tensor, Tensor]:
    """Gradient (P, m) and Hessian (P, m, m) of the objective, m = n, and one more for s.

    ∂R/∂q_k = e_k v_k′ + v_k e_k′ with the columns v_k of V = I − W′ − QUU′, and ∂²R/∂q_k∂q_l = −(E_k UU′ E_l + E_l
    UU′ E_k), so all second derivatives are entrywise products of Z = R⁻¹, ZV, V′ZV and Gram matrices of the rows
    of h and p = V′h.
    """
    Z = torch.cholesky_inverse(point.C)
    V = -(problem.W.mH + point.Q[:, None, :, None] * problem.K)
    V.diagonal(dim1=-2, dim2=-1).add_(1.0)
    ZV = Z @ V
    VZV = V.mH @ ZV
    count = problem.count
    gradient = -2.0 * torch.einsum("f,pfn->pn", count, ZV.diagonal(dim1=-2, dim2=-1).real)
    hessian = _total(count, 2.0 * (ZV * ZV.mT + Z * (VZV + problem.K).conj()))
    if not outputs:
        grad, hess = _curvature(problem, Z, ZV, VZV, V, point.h, problem.weights)
        return gradient + t.unsqueeze(-1) * grad, hessian + t[:, None, None] * hess
    assert point.N is not None
    inverse = torch.cholesky_inverse(point.N)
    h = point.h @ torch.linalg.cholesky(inverse)
    grad, hess = _curvature(problem, Z, ZV, VZV, V, h, count)
    p = V.mH @ h
    PP, PH, HH = p.conj() @ p.mT, p.conj() @ h.mT, h.conj() @ h.mT
    hessian = hessian + hess + _total(count, 2.0 * (PH * PH.mT + PP * HH.conj()))
    hN = point.h @ inverse
    cross = 2.0 * torch.einsum("f,pfn->pn", count, ((V.mH @ hN) * hN.conj()).real.sum(-1))
    traces = inverse.diagonal(dim1=-2, dim2=-1).real.sum(-1) @ count
    squares = inverse.abs().square().sum((-2, -1)) @ count
    top = torch.cat([hessian, cross.unsqueeze(-1)], dim=-1)
    bottom = torch.cat([cross, squares.unsqueeze(-1)], dim=-1).unsqueeze(-2)
    return torch.cat([gradient + grad, (t - traces).unsqueeze(-1)], dim=-1), torch.cat([top, bottom], dim=-2)


def _curvature(
    problem: _Problem, Z: Tensor, ZV: Tensor, VZV: Tensor, V: Tensor, h: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian by Q of Σ_F weight tr(g′R⁻¹g), h = R⁻¹g (P, F, n, k)."""
    p = V.mH @ h
    PP, PH, HH = p.conj() @ p.mT, p.conj() @ h.mT, h.conj() @ h.mT
    gradient = -2.0 * torch.einsum("f,pfn->pn", weights, (h.conj() * p).real.sum(-1))
    mixed = ZV * PH
    return gradient, _total(weights, 2.0 * (Z * PP + mixed + mixed.mT + (VZV + problem.K) * HH))


def _total(weights: Tensor, M: Tensor) -> Tensor:
    """Σ_F weight Re M: (P, F, n, n) → (P, n, n)."""
    return M.real.squeeze(1) * weights if M.shape[1] == 1 else torch.einsum("f,pfkl->pkl", weights, M.real)
