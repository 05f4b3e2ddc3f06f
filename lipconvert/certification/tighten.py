"""The multipliers Λ that prove the least constants, for W, U and G as they are: no training.

With Q = Λ/ρ and R(Q) = 2Q − QW − W′Q − QUU′Q ≻ 0, condition (10) for the single output g′z says (Schur complement)

    |g′z(x) − g′z(x′)|² ≤ ρ ‖x − x′‖²   as soon as   ρ ≥ g′R(Q)⁻¹g.

R is concave in Q and g′R⁻¹g convex and decreasing in R: the best diagonal multiplier of a logit difference minimises a smooth
convex function of n positive numbers, the dual of LipSDP (Fazlyab et al. 2019, arXiv:1906.04893) without its linear matrix
inequality. For all outputs at once it is λ_max(GR⁻¹G′). Both are solved by Newton's method along the central path of

    t ρ − log det R(Q),     t s − log det R(Q) − log det(sI − GR⁻¹G′),

self-concordant functions, so two dozen steps from any strictly feasible Q are enough, and every iterate is a valid
multiplier. Networks on a grid have one R for each frequency and one Q for all of them. Nothing here is proved: the
multipliers are handed to `lipconvert.certification.proofs`, which does not care where they come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.spectrum import hermitian, linear_solve
from .proofs import Enclosure

# How far along the central path, t = factor·n/ρ from 1: at the end ρ is within a factor 1 + 1/LAST of its minimum, its root
# within 1 + 1/(2 LAST). What is only a start for others need not go so far.
MIDDLE, LAST, GROWTH = 100.0, 1e6, 10.0
STEPS = 100  # Newton steps, at most
# Newton decrement below which t grows. Next to a singular R it is 1 however far the centre is, so it must be well below that.
CENTRED = 0.5
ENDED = 0.9  # share of its last value from which t is left as it is: that value moves with the best ρ
# Multipliers of rows that read nothing, over the largest of the others: what is left is lost as 1/HELD.
HELD = 1e10
# Bytes of R in one batch of problems: what stays in the cache is four times faster than all at once.
BATCH = 2**20


@dataclass(frozen=True, eq=False)
class _Problem:
    """W (F, n, n), K = UU′ (F, n, n), and how often each frequency counts, (F,), ``pixels`` times
    its weight in a sum over pixels; F = 1 for a dense network.

    ``held`` (n,): rows whose multipliers are not searched for: the first ``known`` have theirs; ``idle`` ones read neither
    states nor inputs, and theirs only gain by growing, without end.
    """

    W: Tensor
    K: Tensor
    count: Tensor
    weights: Tensor
    pixels: int
    idle: Tensor
    held: Tensor

    @classmethod
    def of(cls, enclosure: Enclosure, known: int = 0) -> _Problem:
        weights = enclosure.grid.weights(torch.ones((), dtype=torch.float64)).reshape(-1)
        W, K = (M if enclosure.grid else M.unsqueeze(0) for M in (enclosure.W, enclosure.gram_U))
        idle = ~((W != 0).any(-1) | (K != 0).any(-1)).any(0)
        idle[:known] = False
        held = idle.clone()
        held[:known] = True
        pixels = enclosure.grid.pixels
        return cls(W, K, weights * pixels, weights, pixels, idle, held)

    @property
    def size(self) -> float:
        """The parameter of the barrier: n for every pixel."""
        return float(self.count.sum()) * self.W.shape[-1]

    def R(self, Q: Tensor) -> Tensor:
        """(P, n) → (P, F, n, n)."""
        half = self.K * (0.5 * Q[:, None, None, :])
        half += self.W
        half *= Q[:, None, :, None]
        R = half + half.mH
        R.neg_().diagonal(dim1=-2, dim2=-1).add_(2.0 * Q[:, None, :])
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

    def at(self, which: Tensor) -> _Point:
        """Some problems of a batch."""
        return _Point(*(None if x is None else x[which] for x in self.parts))  # type: ignore[arg-type]

    def put(self, which: Tensor, other: _Point) -> None:
        """Other points for some problems of a batch."""
        for mine, its in zip(self.parts, other.parts, strict=True):
            if mine is not None and its is not None:
                mine[which] = its

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return self.Q, self.C, self.h, self.value, self.objective, self.N


def best_gains(
    enclosure: Enclosure,
    start: Tensor,
    rows: Tensor,
    *,
    known: int = 0,
    deadline: float | None = None,
    last: float = LAST,
) -> Tensor:
    """Multipliers Q (P, n) that (nearly) minimise g′R(Q)⁻¹g for P groups of functionals, from a ``start`` with R ≻ 0.

    ``rows`` (P, k, n), on a grid (P, k, F, n): the sum over the k functionals of a group is minimised; one of each is a logit
    difference, all of them in one group a good start for each. ``start`` (n,) or (P, n), of which the first ``known`` stay:
    linear rows (`certification.linear_rows`). ``deadline``: of `time.monotonic`; multipliers are valid whenever it strikes.
    Returns ``start`` where no step was possible.
    """
    problem, groups = _Problem.of(enclosure, known), len(rows)
    g = rows.movedim(1, -1) if enclosure.grid else rows.movedim(1, -1).unsqueeze(1)  # (P, F, n, k)
    Q = start.expand(groups, -1).clone()
    chunk = max(1, BATCH // max(1, problem.W.numel() * problem.W.element_size()))
    for part in torch.arange(groups).split(chunk):
        Q[part] = _follow(problem, Q[part], g[part], False, deadline, last)
    return Q


def best_outputs(enclosure: Enclosure, start: Tensor, *, known: int = 0, deadline: float | None = None) -> Tensor:
    """A multiplier Q (n,) that (nearly) minimises λ_max(GR(Q)⁻¹G′) over all frequencies; `best_gains`' twin for vectors."""
    problem = _Problem.of(enclosure, known)
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


def least_gains(enclosure: Enclosure, rows: Tensor, known: int = 0) -> Tensor:
    """What no multiplier can go below, (m,): g′R⁻¹g ≥ ‖g′(I − DW)⁻¹DU‖² for every diagonal 0 ≤ D ≤ I.

    Condition (10) covers all slopes in [0, 1], so in particular constant ones; tried are D = I, D = I on the rows that read
    the input and 0 elsewhere, and D = I on the first ``known`` rows alone, which are linear: the identity inside a residual
    network. An estimate in float64, to know when to stop.
    """
    weights = _Problem.of(enclosure).weights
    least = torch.zeros(len(rows), dtype=torch.float64)
    g = rows if enclosure.grid else rows.unsqueeze(1)  # (m, F, n)
    for T in _linear_parts(enclosure, known):
        T = T if enclosure.grid else T.unsqueeze(0)
        least = torch.maximum(least, torch.einsum("mfn,fnp->mfp", g.conj(), T).abs().square().sum(-1) @ weights)
    return least


def least_output(enclosure: Enclosure, known: int = 0) -> float:
    """The same for the output as a vector: max ‖G(I − DW)⁻¹DU‖₂."""
    norms = [torch.linalg.matrix_norm(enclosure.G @ T, 2).amax() for T in _linear_parts(enclosure, known)]
    return float(max(norms))


def _linear_parts(enclosure: Enclosure, known: int) -> Iterator[Tensor]:
    """(I − DW)⁻¹DU, (..., n, p), for the D of `least_gains`."""
    U, n = enclosure.U, enclosure.states
    reads = (U != 0).any(-1)
    reads = reads.any(0) if enclosure.grid else reads
    first = torch.arange(n) < known
    for slopes in (torch.ones(n, dtype=torch.float64), reads.double(), first.double())[: 3 if known else 2]:
        A = torch.eye(n, dtype=U.dtype) - slopes.unsqueeze(-1) * enclosure.W
        yield linear_solve(A, slopes.unsqueeze(-1) * U)


def _follow(problem: _Problem, Q: Tensor, g: Tensor, outputs: bool, deadline: float | None, last: float) -> Tensor:
    """Newton along the central path from Q (P, n), each problem at its own t; the best multiplier met for each."""
    Q = Q.clone()
    Q[:, problem.idle] = HELD * Q.amax(-1, keepdim=True)
    best, t = Q.clone(), torch.ones(len(Q), dtype=torch.float64)
    point = _evaluate(problem, Q, g, t, outputs, None)
    if not bool(torch.isfinite(point.objective).all()):
        return best
    least = _largest(point) if outputs else point.value
    start = problem.size / least
    end = last * start
    # A start from elsewhere may be far along its path: the t for which it is most central.
    steep, hessian = _derivatives(problem, point, start, outputs)
    slope = _slope(problem, point, outputs)
    flat = steep - start.unsqueeze(-1) * slope
    factor, _ = torch.linalg.cholesky_ex(hessian)
    inward, along = torch.cholesky_solve(torch.stack([flat, slope], -1), factor).unbind(-1)
    central = -(slope * inward).sum(-1) / (slope * along).sum(-1)
    t = torch.where(torch.isfinite(central), torch.minimum(torch.maximum(central, start), end), start)
    point = _evaluate(problem, Q, g, t, outputs, point.value if outputs else None)
    left = torch.arange(len(Q))
    for _ in range(STEPS):
        if deadline is not None and time.monotonic() > deadline:
            return best
        before = t
        point, t, decrement = _step(problem, point, g, t, end, outputs)
        reached = _largest(point) if outputs else point.value
        better = reached < least
        best[left[better]], least = point.Q[better], torch.where(better, reached, least)
        going = ((decrement >= CENTRED) | (before < ENDED * end)).nonzero().flatten()
        if not len(going):
            break
        if len(going) < len(left):
            left, point, g, t, least = left[going], point.at(going), g[going], t[going], least[going]
        end = last * problem.size / least
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


def _step(
    problem: _Problem, point: _Point, g: Tensor, t: Tensor, end: Tensor, outputs: bool
) -> tuple[_Point, Tensor, Tensor]:
    """One damped step for every problem of the batch: the new point, the t it is for, and Newton's decrement before it (P,).

    Newton's where a point is not centred at its t. Where it is, t grows to t⁺, and the step also goes along the central path:
    the path is smooth in 1/t down to 0, dQ/d(1/t) = t²H⁻¹∇ρ, which for t⁺ is −(1 − t/t⁺) H⁻¹ t∇ρ.
    """
    gradient, hessian = _derivatives(problem, point, t, outputs)
    n = point.Q.shape[-1]
    slope = t.unsqueeze(-1) * _slope(problem, point, outputs)
    for vector in (gradient, slope):
        vector[:, :n][:, problem.held] = 0.0
    hessian[:, :n][:, problem.held] = 0.0
    hessian[..., :n][..., problem.held] = 0.0
    hessian.diagonal(dim1=-2, dim2=-1)[:, :n][:, problem.held] = 1.0
    factor, info = torch.linalg.cholesky_ex(hessian)
    newton, tangent = (-torch.cholesky_solve(torch.stack([gradient, slope], -1), factor)).unbind(-1)
    # Where round-off has spoilt the Hessian there is nothing left to gain.
    usable = (info == 0) & torch.isfinite(newton).all(-1) & torch.isfinite(tangent).all(-1)
    newton, tangent = (torch.where(usable.unsqueeze(-1), x, 0.0) for x in (newton, tangent))
    decrement = (-(gradient * newton).sum(-1)).clamp(min=0.0).sqrt()
    grows = (decrement < CENTRED) & (t < ENDED * end)
    following = torch.where(grows, torch.minimum(GROWTH * t, end), t)
    share = (1.0 - t / following).unsqueeze(-1)
    direction = newton + share * tangent
    steepness = -((gradient + (following / t - 1.0).unsqueeze(-1) * slope) * direction).sum(-1)
    before = point.objective + (following - t) * point.value

    def at(which: Tensor) -> _Point:
        along = length[which]
        s = point.value[which] + along * direction[which, n] if outputs else None
        Q = point.Q[which] + along.unsqueeze(-1) * direction[which, :n]
        return _evaluate(problem, Q, g[which], following[which], outputs, s)

    length = torch.ones_like(decrement)
    new = at(torch.arange(len(length)))
    for halvings in range(1, 41):
        # the objective is known to about 1e-12 of its size
        enough = before - 1e-4 * length * steepness + 1e-12 * before.abs()
        good = (new.objective <= enough) & (new.Q > 0.0).all(-1)
        if bool(good.all()):
            break
        which = (~good).nonzero().flatten()
        length[which] = 0.5 * length[which] if halvings < 40 else 0.0
        new.put(which, at(which))
    return new, following, torch.where(length > 0.0, decrement, 0.0)


def _slope(problem: _Problem, point: _Point, outputs: bool) -> Tensor:
    """What the gradient of the objective grows by with t, (P, m): ∇ρ, or that of s."""
    if outputs:
        slope = point.Q.new_zeros(len(point.Q), point.Q.shape[-1] + 1)
        slope[:, -1] = 1.0
        return slope
    h = point.h
    p = h - problem.W @ h - problem.K @ (point.Q[:, None, :, None] * h)
    return -2.0 * torch.einsum("f,pfn->pn", problem.weights, (h.conj() * p).real.sum(-1))


def _derivatives(problem: _Problem, point: _Point, t: Tensor, outputs: bool) -> tuple[Tensor, Tensor]:
    """Gradient (P, m) and Hessian (P, m, m) of the objective, m = n, and one more for s.

    ∂R/∂q_k = e_k v_k′ + v_k e_k′ with the columns v_k of V = I − W′ − QUU′, and ∂²R/∂q_k∂q_l = −(E_k UU′ E_l + E_l
    UU′ E_k), so all second derivatives are entrywise products of Z = R⁻¹, ZV, V′ZV and Gram matrices of the rows
    of h and p = V′h.
    """
    Z = torch.cholesky_inverse(point.C)
    V = problem.K * point.Q[:, None, :, None]
    V += problem.W.mH
    V.neg_().diagonal(dim1=-2, dim2=-1).add_(1.0)
    ZV = Z @ V
    S = V.mH @ ZV
    S += problem.K
    gradient = -2.0 * torch.einsum("f,pfn->pn", problem.count, ZV.diagonal(dim1=-2, dim2=-1).real)
    if not outputs:
        grad, hessian = _curvature(problem, Z, ZV, V, S, point.h, t)
        return gradient + t.unsqueeze(-1) * grad, hessian
    assert point.N is not None
    inverse, count = torch.cholesky_inverse(point.N), problem.count
    h = point.h @ torch.linalg.cholesky(inverse)
    pixels = torch.full_like(t, problem.pixels)
    grad, hessian = _curvature(problem, Z, ZV, V, S, h, pixels)
    p = V.mH @ h
    PP, PH, HH = p.conj() @ p.mT, p.conj() @ h.mT, h.conj() @ h.mT
    hessian = hessian + _total(count, 2.0 * (PH * PH.mT + PP * HH.conj()))
    hN = point.h @ inverse
    cross = 2.0 * torch.einsum("f,pfn->pn", count, ((V.mH @ hN) * hN.conj()).real.sum(-1))
    traces = inverse.diagonal(dim1=-2, dim2=-1).real.sum(-1) @ count
    squares = inverse.abs().square().sum((-2, -1)) @ count
    top = torch.cat([hessian, cross.unsqueeze(-1)], dim=-1)
    bottom = torch.cat([cross, squares.unsqueeze(-1)], dim=-1).unsqueeze(-2)
    gradient = gradient + problem.pixels * grad
    return torch.cat([gradient, (t - traces).unsqueeze(-1)], dim=-1), torch.cat([top, bottom], dim=-2)


def _curvature(
    problem: _Problem, Z: Tensor, ZV: Tensor, V: Tensor, S: Tensor, h: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of Σ_F weight tr(g′R⁻¹g), Hessian of ``share`` (P,) times it − log det R).

    With h = R⁻¹g (P, F, n, k), p = V′h, S = V′ZV + K, PP = p̄pᵀ, PH = p̄hᵀ, HH = h̄hᵀ, the Hessian is
    Re Σ_F 2 weight (pixels (ZV∘(ZV)ᵀ + Z∘S̄) + share (Z∘PP + S∘HH + ZV∘PH + (ZV∘PH)ᵀ)),

    ∘ entry by entry. Passes over memory are what it costs, so terms are gathered in place.
    """
    p = V.mH @ h
    gradient = -2.0 * torch.einsum("f,pfn->pn", problem.weights, (h.conj() * p).real.sum(-1))
    tau = share[:, None, None, None]
    hessian = (tau * p.conj()) @ p.mT
    hessian += problem.pixels * S.conj() if problem.pixels != 1 else S
    hessian *= Z
    HH = (tau * h.conj()) @ h.mT
    hessian += HH.mul_(S)
    mixed = (tau * p.conj()) @ h.mT
    mixed.add_(ZV.mT, alpha=0.5 * problem.pixels)
    mixed *= ZV
    hessian += mixed
    hessian += mixed.mT
    return gradient, _total(2.0 * problem.weights, hessian)


def _total(weights: Tensor, M: Tensor) -> Tensor:
    """Σ_F weight Re M: (P, F, n, n) → (P, n, n)."""
    return M.real.squeeze(1) * weights if M.shape[1] == 1 else torch.einsum("f,pfkl->pkl", weights, M.real)
