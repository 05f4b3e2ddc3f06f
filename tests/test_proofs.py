"""Proofs against exact arithmetic (FLINT): what is proved is true, and what is true by a margin is proved.

All floats are rationals. H, X and R are formed from them as the paper has them, not in the gauge of the code, and are
positive definite when all leading minors are positive. Complex matrices are taken as real ones of twice the size. Balls of
256 bits decide first where matrices are large, rationals where balls do not.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from flint import arb, ctx, fmpq, fmpq_mat
from torch import Tensor

import lipconvert as lc
from lipconvert.certification.proofs import (
    DELTAS,
    Enclosure,
    NotProved,
    Proof,
    prove_constant,
    prove_gains,
    prove_lmi,
    prove_monotone,
)
from lipconvert.linalg.spectrum import DENSE, Grid

# Beyond this order balls come first.
SMALL = 8


def rational(x: float) -> fmpq:
    return fmpq(*float(x).as_integer_ratio())


def rationals(A: Tensor) -> fmpq_mat:
    """A matrix, exactly; a complex one as [[Re, −Im], [Im, Re]]."""
    if A.is_complex():
        A = torch.cat([torch.cat([A.real, -A.imag], -1), torch.cat([A.imag, A.real], -1)], -2)
    return fmpq_mat(*A.shape, [rational(x) for x in A.flatten().tolist()])


def diagonal(values: Sequence[fmpq]) -> fmpq_mat:
    D = fmpq_mat(len(values), len(values))
    for i, value in enumerate(values):
        D[i, i] = value
    return D


def by_balls(A: fmpq_mat) -> bool | None:
    """Whether A ≻ 0 by LDL′ in balls of 256 bits; None where they do not decide."""
    with ctx.workprec(256):
        M = [[arb(x) for x in row] for row in A.tolist()]
        for k, row in enumerate(M):
            if not row[k] > 0:
                return False if row[k] <= 0 else None
            for i in range(k + 1, len(M)):
                factor = row[i] / row[k]
                for j in range(i, len(M)):
                    M[i][j] -= factor * row[j]
    return True


def by_minors(A: fmpq_mat) -> bool:
    """Whether A ≻ 0 by its leading minors: elimination without fractions (Bareiss)."""
    M, previous = A.numer_denom()[0].tolist(), 1
    for k in range(len(M)):
        pivot = M[k][k]
        if pivot <= 0:
            return False
        for i, j in itertools.combinations_with_replacement(range(k + 1, len(M)), 2):
            M[i][j] = (pivot * M[i][j] - M[k][i] * M[k][j]) // previous
        previous = pivot
    return True


def positive(A: fmpq_mat) -> bool:
    answer = by_balls(A) if A.nrows() > SMALL else None
    return by_minors(A) if answer is None else answer


@dataclass(frozen=True)
class Exact:
    """W, U, G of one frequency, and the matrices of the paper they make."""

    W: fmpq_mat
    U: fmpq_mat
    G: fmpq_mat

    @classmethod
    def of(cls, W: Tensor, U: Tensor, G: Tensor) -> list[Exact]:
        if W.dim() == 2:
            W, U, G = (M.unsqueeze(0) for M in (W, U, G))
        return [cls(*map(rationals, triple)) for triple in zip(W, U, G, strict=True)]

    def diagonal(self, Lambda: Tensor) -> fmpq_mat:
        return diagonal([rational(x) for x in Lambda.tolist()] * (self.W.nrows() // len(Lambda)))

    def X(self, Lambda: fmpq_mat) -> fmpq_mat:
        LW = Lambda * self.W
        return Lambda * fmpq(2) - LW - LW.transpose()

    def R(self, Q: fmpq_mat, inputs: bool = True) -> fmpq_mat:
        QU = Q * self.U
        return self.X(Q) - QU * QU.transpose() if inputs else self.X(Q)

    def H(self, Lambda: fmpq_mat, L: float) -> fmpq_mat:
        LU = Lambda * self.U
        return self.X(Lambda) - (self.G.transpose() * self.G + LU * LU.transpose()) * (1 / rational(L))


def holds(E: Enclosure | lc.DAE, Lambda: Tensor, L: float, reserve: float = 0.0) -> bool:
    """H(Λ, L) ≻ reserve·Λ, exactly, at every frequency and for the middle of all radii."""
    share = rational(reserve)
    return all(
        positive(exact.H(exact.diagonal(Lambda), L) - exact.diagonal(Lambda) * share)
        for exact in Exact.of(E.W, E.U, E.G)
    )


def gauged(E: Enclosure, Lambda: Tensor, L: float) -> tuple[Tensor, Tensor, float]:
    """(eigenvalues, vectors, size of what was added up) of Λ^{-1/2}HΛ^{-1/2}, in float64 and for orientation only."""
    root = Lambda.sqrt()
    W, U, G = root[:, None] * E.W / root, root[:, None] * E.U / L**0.5, E.G / root / L**0.5
    H = 2.0 * torch.eye(len(root), dtype=W.dtype) - W - W.mH - U @ U.mH - G.mH @ G
    values, vectors = torch.linalg.eigh(0.5 * (H + H.mH))
    norms = [float(torch.linalg.matrix_norm(M).amax()) if M.numel() else 0.0 for M in (W, U, G)]
    return values, vectors, 2.0 + 2.0 * norms[0] + norms[1] ** 2 + norms[2] ** 2


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape)


def whole(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


@dataclass(frozen=True)
class Flavour:
    """How a random problem is made hard."""

    name: str
    spread: float = 1.0  # decades of Λ
    scale: float = 0.0  # decades of all of Λ, and of L
    heavy: float = 0.5  # size of G and U: large ones cancel against W
    skew: float = 1.0


FLAVOURS = (
    Flavour("plain"),
    Flavour("multipliers over 16 decades", spread=8.0),
    Flavour("large and cancelling", heavy=300.0),
    Flavour("large skew parts", skew=1e6),
    Flavour("everything", spread=6.0, heavy=30.0, skew=1e3),
    Flavour("far from 1", spread=2.0, scale=40.0),
    Flavour("at the ends of the range", spread=1.0, scale=140.0),
)


def problem(
    flavour: Flavour, n: int, p: int, q: int, target: float, grid: Grid = DENSE
) -> tuple[Enclosure, Tensor, float]:
    """(W, U, G), Λ, L whose H has the least eigenvalue ``target``, relative and in the gauge Λ = I, up to rounding."""
    kind = torch.complex128 if grid else torch.float64
    batch = grid.batch
    scale = 10.0 ** float(uniform(-flavour.scale, flavour.scale))
    Lambda = scale * 10.0 ** uniform(-flavour.spread, flavour.spread, n)
    L = 10.0 ** float(uniform(-flavour.scale, flavour.scale)) * float(uniform(0.5, 2.0))
    heavy = flavour.heavy if flavour.heavy < 1.0 else flavour.heavy ** float(torch.rand(()))
    G, U = heavy * torch.randn(*batch, q, n, dtype=kind), heavy * torch.randn(*batch, n, p, dtype=kind)
    K = flavour.skew * torch.randn(*batch, n, n, dtype=kind)
    size = 2.0 + float(torch.linalg.matrix_norm(G).amax()) ** 2 + float(torch.linalg.matrix_norm(U).amax()) ** 2
    values = uniform(0.05, 1.0, *batch, n)
    values.view(-1, n)[whole(0, max(1, math.prod(batch)) - 1), 0] = target
    Q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=kind))[0]
    T = (Q * (size * values).unsqueeze(-2)) @ Q.mH
    W = torch.eye(n, dtype=kind) - 0.5 * (G.mH @ G + U @ U.mH + T) + (K - K.mH)
    root = Lambda.sqrt()
    return Enclosure(W * root / root[:, None], U / root[:, None] * L**0.5, G * root * L**0.5, grid), Lambda, L


# Least eigenvalues that problems are made with.
TARGETS = (*(sign * 10.0**-k for k in range(2, 13) for sign in (1.0, -1.0)), 0.0, 1e-14, -1e-14, 1e-16, -1e-16)

# What a true H must have beyond 0 to be proved, of the size of what it is added up from: n u and a little.
POWER = 1e-11


def tally(found: Counter[tuple[bool, bool]]) -> str:
    return ", ".join(
        f"{'proved' if proved else 'refused'} and {'true' if true else 'false'}: {found[proved, true]}"
        for proved, true in itertools.product((True, False), repeat=2)
    )


def judge(E: Enclosure, Lambda: Tensor, L: float, found: Counter[tuple[bool, bool]]) -> tuple[bool, bool]:
    """(proved, true); a false proof fails the test at once, a true one by ``POWER`` must be proved."""
    proved, true = bool(prove_lmi(E, Lambda, L)), holds(E, Lambda, L)
    found[proved, true] += 1
    assert true or not proved, (
        f"proved, and false: W={E.W.tolist()} U={E.U.tolist()} G={E.G.tolist()} {Lambda.tolist()} {L}"
    )
    if not proved and true:
        reserve = POWER * gauged(E, Lambda, L)[2] * E.states
        assert not holds(E, Lambda, L, reserve), f"true by {reserve:.1e} of Λ, and not proved"
    return proved, true


def test_the_two_exact_roads_agree():
    decided = 0
    for trial in range(60):
        E, Lambda, L = problem(FLAVOURS[trial % 5], 1 + trial % 6, 2, 2, TARGETS[trial % len(TARGETS)])
        (exact,) = Exact.of(E.W, E.U, E.G)
        H = exact.H(exact.diagonal(Lambda), L)
        balls = by_balls(H)
        decided += balls is not None
        assert balls in (None, by_minors(H))
    assert decided == 60
    singular = fmpq_mat(2, 2, [1, 2, 2, 4])
    assert by_balls(singular) in (None, False)
    assert not by_minors(singular)
    assert not by_minors(fmpq_mat(2, 2, [0, 0, 0, 1]))
    assert by_minors(fmpq_mat(2, 2, [2, 1, 1, 2]))


def test_the_exact_matrix_is_that_of_the_conditions():
    for trial in range(10):
        E, Lambda, L = problem(FLAVOURS[0], 4, 2, 3, 0.1, Grid((2, 3)) if trial % 2 else DENSE)
        dae = lc.DAE(E.W, E.U, E.G, Lambda, lipschitz=L, grid=E.grid)
        H = lc.H_matrix(dae).reshape(-1, 4, 4)
        for exact, computed in zip(Exact.of(E.W, E.U, E.G), H, strict=True):
            values = exact.H(exact.diagonal(Lambda), L).tolist()
            dense = torch.tensor([[float(x.p) / float(x.q) for x in row] for row in values])
            computed = (
                torch.cat([torch.cat([computed.real, -computed.imag], 1), torch.cat([computed.imag, computed.real], 1)])
                if E.grid
                else computed
            )
            assert float((dense - computed).abs().max()) < 1e-13 * float(computed.abs().max())


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda f: f.name)
def test_dense_proofs(flavour):
    found: Counter[tuple[bool, bool]] = Counter()
    for trial in range(120):
        n = 1 + trial % 8 if trial < 112 else whole(10, 24)
        E, Lambda, L = problem(flavour, n, whole(0, 5), whole(0, 5), TARGETS[trial % len(TARGETS)])
        judge(E, Lambda, L, found)
    print(tally(found))
    assert found[True, True] > 15
    assert found[False, False] > 25


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda f: f.name)
def test_proofs_on_grids(flavour):
    found: Counter[tuple[bool, bool]] = Counter()
    for trial in range(60):
        grid = Grid((whole(1, 3), whole(1, 4)))
        n = 1 + trial % 4 if trial < 55 else whole(5, 7)
        E, Lambda, L = problem(flavour, n, whole(0, 3), whole(0, 3), TARGETS[trial % len(TARGETS)], grid)
        judge(E, Lambda, L, found)
    print(tally(found))
    assert found[True, True] > 8
    assert found[False, False] > 15


def phase(x: Tensor) -> Tensor:
    """x/|x|, 0 for 0; a complex one by a hair less, so that a radius times it is within the radius."""
    size = x.abs()
    unit = torch.where(size > 0, x / torch.where(size > 0, size, torch.ones_like(size)), torch.zeros_like(x))
    return unit * (1.0 - 1e-14) if x.is_complex() else unit


def corner(E: Enclosure, Lambda: Tensor, v: Tensor | None = None) -> list[Exact]:
    """W, U, G moved by their radii in some direction, exactly: where v′Hv, (F, n, 1), falls most, or anywhere."""
    moves = []
    for M, radius in ((E.W, E.radius_W), (E.U, E.radius_U), (E.G, E.radius_G)):
        if radius is None:
            moves.append(torch.zeros_like(M))
        elif v is None:
            moves.append(radius * phase(torch.randn_like(M)))
        elif M is E.W:
            moves.append(radius * phase(v * v.mH))
        elif M is E.U:
            moves.append(radius * phase(v * (E.U.mH @ (Lambda[:, None] * v)).mH))
        else:
            moves.append(radius * phase((E.G @ v) * v.mH))
    return [
        Exact(a.W + b.W, a.U + b.U, a.G + b.G) for a, b in zip(Exact.of(E.W, E.U, E.G), Exact.of(*moves), strict=True)
    ]


def corners(E: Enclosure, Lambda: Tensor, L: float) -> list[list[Exact]]:
    """The corner that is the worst to first order, and others."""
    _, vectors, _ = gauged(E, Lambda, L)
    v = vectors[..., :1] / Lambda.sqrt()[:, None]
    return [corner(E, Lambda, v), *(corner(E, Lambda) for _ in range(3))]


def reach(E: Enclosure, Lambda: Tensor, L: float) -> float:
    """How far the radii may move Λ^{-1/2}HΛ^{-1/2}, by row sums of a bound of its entries."""
    root, none = Lambda.sqrt(), torch.zeros(())
    W, U, G = (none if r is None else r for r in (E.radius_W, E.radius_U, E.radius_G))
    moved = root[:, None] * W / root
    moved = moved + moved.mT if W.dim() else torch.zeros(E.W.shape)
    if U.dim():
        A, r = E.U.mT.abs() * root, U.mT * root
        moved = moved + (A.mT @ r + r.mT @ A + r.mT @ r) / L
    if G.dim():
        A, r = E.G.abs() / root, G / root
        moved = moved + (A.mT @ r + r.mT @ A + r.mT @ r) / L
    return float(moved.sum(-1).amax())


@pytest.mark.parametrize("grid", [DENSE, Grid((2, 2)), Grid((1, 3))], ids=["dense", "2x2", "1x3"])
@pytest.mark.parametrize("which", ["W", "U", "G", "WUG"])
def test_proofs_hold_in_every_corner_of_the_radii(which, grid):
    found: Counter[tuple[bool, bool]] = Counter()
    powerful = 0
    for trial in range(60):
        n = 1 + trial % (3 if grid else 6)
        target = 10.0 ** -whole(1, 7)
        E, Lambda, L = problem(FLAVOURS[(0, 1, 2, 5)[trial % 4]], n, whole(1, 3), whole(1, 3), target, grid)
        radii = {
            f"radius_{name}": M.abs() * torch.rand(M.shape) + 0.1 * torch.rand(M.shape) * M.abs().amax()
            for name, M in (("W", E.W), ("U", E.U), ("G", E.G))
            if name in which
        }
        least = float(gauged(E, Lambda, L)[0].min())
        # around the size at which the worst corner turns false
        unit = reach(replace(E, **{key: 1e-9 * r for key, r in radii.items()}), Lambda, L) / 1e-9
        size = least / unit * 10.0 ** float(uniform(-1.0, 1.0))
        E = replace(E, **{key: size * r for key, r in radii.items()})
        proved = bool(prove_lmi(E, Lambda, L))
        true = all(positive(f.H(f.diagonal(Lambda), L)) for exact in corners(E, Lambda, L) for f in exact)
        found[proved, true] += 1
        assert true or not proved
        if reach(E, Lambda, L) < least / 5.0 and least > 1e-9 * gauged(E, Lambda, L)[2]:
            assert proved
            powerful += 1
    print(tally(found))
    assert found[True, True] > 10
    assert found[False, False] > 3
    assert powerful > 3


@pytest.mark.parametrize("which", ["U", "G"])
def test_radii_around_zero_count_by_their_squares(which):
    found: Counter[tuple[bool, bool]] = Counter()
    for _ in range(60):
        n, L = whole(1, 3), 10.0 ** float(uniform(-4.0, 4.0))
        Lambda = 10.0 ** uniform(-3.0, 3.0, n)
        scale = (Lambda if which == "G" else Lambda.reciprocal()) * L
        E = Enclosure(torch.zeros(n, n), torch.zeros(n, 1), torch.zeros(1, n))
        radius = 10.0 ** float(uniform(-0.6, 0.6)) * scale.sqrt()
        E = replace(E, radius_U=radius[:, None]) if which == "U" else replace(E, radius_G=radius[None])
        places = [corner(E, Lambda) for _ in range(4)]
        proved = bool(prove_lmi(E, Lambda, L))
        true = all(positive(f.H(f.diagonal(Lambda), L)) for exact in places for f in exact)
        found[proved, true] += 1
        assert true or not proved
    print(tally(found))
    assert found[True, True] > 10
    assert found[False, False] > 10


def test_the_bound_of_rounding_covers_it_and_sums_of_many_terms_reach_half_of_it():
    worst = 0.0

    def ratio(E: Enclosure, Lambda: Tensor, L: float) -> float:
        """‖D⁻¹H D⁻¹ − Ĥ‖ against its bound: the largest row sum of the exact difference."""
        H, d, error = E.lmi(Lambda, L)
        most = fmpq(0)
        for computed, exact in zip(H if E.grid else [H], Exact.of(E.W, E.U, E.G), strict=True):
            inverse = diagonal([1 / rational(x) for x in d.tolist()] * (1 + bool(E.grid)))
            gap = inverse * exact.H(exact.diagonal(Lambda), L) * inverse - rationals(computed)
            most = max([most, *(sum(map(abs, row), fmpq(0)) for row in gap.tolist())])
        assert most <= rational(error) * (2 if E.grid else 1)  # |Re| + |Im| of the larger matrix
        return float(most.p) / float(most.q) / error if most else 0.0

    for trial in range(120):
        flavour = FLAVOURS[trial % len(FLAVOURS)]
        E, Lambda, L = problem(
            flavour, 1 + trial % 5, whole(0, 6), whole(0, 6), 0.1, Grid((1, 2)) if trial % 3 == 0 else DENSE
        )
        worst = max(worst, ratio(E, Lambda, L))
    assert worst < 0.5
    # 1 + s² + s² + ... with s² below half an ulp: every one of the terms is lost where a kernel adds them one by one
    for n, k in ((1, 300), (2, 1000), (16, 1000)):
        lost = torch.zeros(n, k)
        lost[0] = (2.0**-53 * (1.0 - 1e-9)) ** 0.5
        lost[0, 0] = 1.0
        for U, G in (
            (lost, torch.zeros(1, n)),
            (torch.zeros(n, 1), lost.mT.contiguous()),
            (lost, lost.mT.contiguous()),
        ):
            worst = max(worst, ratio(Enclosure(torch.zeros(n, n), U, G), torch.ones(n), 0.5))
    assert 0.3 < worst < 0.6


def test_proofs_with_sums_that_lose_all_they_can():
    found: Counter[tuple[bool, bool]] = Counter()
    n, k = 16, 1000
    lost = torch.zeros(n, k)
    lost[0] = (2.0**-53 * (1.0 - 1e-9)) ** 0.5
    lost[0, 0] = 1.0
    zero = torch.zeros(n, n)
    for U, G, L in ((lost, zero[:1], 0.5), (zero[:, :1], lost.mT.contiguous(), 0.5), (lost, lost.mT.contiguous(), 1.0)):
        for share in torch.linspace(-0.2, 5.0, 27).tolist():
            E, larger = Enclosure(zero, U, G), L * (1.0 + share * k * 2.0**-53)
            found[bool(prove_lmi(E, torch.ones(n), larger)), holds(E, torch.ones(n), larger)] += 1
    assert found[True, False] == 0
    assert found[True, True] > 3
    assert found[False, False] > 10


def monotone(E: Enclosure, P: Tensor, mu: float, where: list[Exact]) -> bool:
    """X(P) ⪰ 2μP, exactly."""
    return all(positive(f.X(f.diagonal(P)) - f.diagonal(P) * (2 * rational(mu))) for f in where)


@pytest.mark.parametrize("grid", [DENSE, Grid((2, 2)), Grid((3, 1))], ids=["dense", "2x2", "3x1"])
@pytest.mark.parametrize("radii", [False, True])
def test_monotonicity(grid, radii):
    proved = false = 0
    for trial in range(120):
        flavour = FLAVOURS[trial % len(FLAVOURS)]
        target = TARGETS[trial % len(TARGETS)]
        E, P, _ = problem(flavour, 1 + trial % (3 if grid else 7), 0, 0, target, grid)
        if radii:
            E = replace(E, radius_W=abs(target) * E.W.abs() * 10.0 ** float(uniform(-4.0, 0.0)))
        places = [Exact.of(E.W, E.U, E.G), *(corners(E, P, 1.0) if radii else [])]
        mu = prove_monotone(E, P)
        values, _, size = gauged(E, P, 1.0)
        true = 0.5 * float(values.min())
        proved += mu > 0.0
        assert 0.0 <= mu <= max(true + 1e-14 * size, 0.0)
        if mu > 0.0:
            assert all(monotone(E, P, mu, place) for place in places)
        elif not all(monotone(E, P, 0.0, place) for place in places):
            false += 1
        if not radii and true > 1e-9 * size:
            assert mu > 0.99 * true
    assert proved > 20
    assert false > 40


def gains(where: list[Exact], Q: Tensor, rows: Sequence[fmpq_mat], grid: Grid, inputs: bool) -> tuple[fmpq, fmpq]:
    """(g′R⁻¹g, ‖Q^{1/2}R⁻¹g‖²), summed over the frequencies with their weights, exactly."""
    half = grid.image[1] // 2 + 1 if grid else 1
    rho = size = fmpq(0)
    for k, (exact, g) in enumerate(zip(where, rows, strict=True)):
        D = exact.diagonal(Q)
        h = exact.R(D, inputs).solve(g)
        alone = not grid or k % half == 0 or (grid.image[1] % 2 == 0 and k % half == half - 1)
        weight = fmpq(1 if alone else 2, grid.pixels)
        rho += weight * (g.transpose() * h)[0, 0]
        size += weight * (h.transpose() * D * h)[0, 0]
    return rho, size


def column(g: Tensor) -> fmpq_mat:
    values = torch.cat([g.real, g.imag]) if g.is_complex() else g
    return fmpq_mat(len(values), 1, [rational(x) for x in values.tolist()])


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("grid", [DENSE, Grid((2, 2)), Grid((1, 5)), Grid((3, 2))], ids=["dense", "2x2", "1x5", "3x2"])
def test_gains(grid, inputs):
    finite = sharp = refused = 0
    for trial in range(60):
        n, m = 1 + trial % (3 if grid else 6), 3
        flavour = FLAVOURS[(trial // 6) % 3]
        target = TARGETS[trial % len(TARGETS)] if trial % 2 else 0.05
        E, Q, L = problem(flavour, n, 2 if inputs else 0, 0, target, grid)
        E = replace(E, U=E.U / L**0.5)
        rows = (
            torch.randn(m, *grid.batch, n, dtype=E.W.dtype)
            * Q.sqrt()
            * 10.0 ** uniform(-6.0, 6.0, m).view(-1, *[1] * E.W.dim())[..., 0]
        )
        radius = None if trial % 4 < 2 else rows.abs() * 10.0 ** float(uniform(-14.0, -2.0)) * torch.rand(rows.shape)
        if trial % 8 > 5:
            E = replace(E, radius_W=1e-3 * abs(target) * E.W.abs(), radius_U=1e-3 * abs(target) * E.U.abs())
        rho, size = prove_gains(E, Q, rows, radius, parts="U" if inputs else "")
        exact = Exact.of(E.W, E.U, E.G)
        definite = all(positive(f.R(f.diagonal(Q), inputs)) for f in exact)
        assert definite or bool(torch.isinf(rho).all())
        values, vectors, scale = gauged(E, Q, 1.0)
        least, v = float(values.min()), vectors[..., :1] / Q.sqrt()[:, None]
        if not definite or bool(torch.isinf(rho).all()):
            refused += 1
            assert least < 1e-8 * scale or E.radius_W is not None
            continue
        finite += 1
        places = [exact] if E.radius_W is None else [exact, corner(E, Q, v), corner(E, Q)]
        for k in range(m):
            X = E.W if grid else E.W.unsqueeze(0)
            middle = rows[k] if grid else rows[k].unsqueeze(0)
            shifts = [torch.zeros_like(middle)]
            if radius is not None:
                spread = radius[k] if grid else radius[k].unsqueeze(0)
                h = torch.linalg.solve(torch.eye(n).expand(X.shape) - X, middle.unsqueeze(-1)).squeeze(-1)
                shifts += [spread * phase(h), spread * phase(middle), spread * phase(torch.randn_like(middle))]
            for place, shift in itertools.product(places, shifts):
                g = [column(a) + column(b) for a, b in zip(middle, shift, strict=True)]
                exact_rho, exact_size = gains(place, Q, g, grid, inputs)
                assert rational(float(rho[k])) >= exact_rho
                assert rational(float(size[k])) ** 2 >= exact_size
            if target == 0.05 and radius is None and E.radius_W is None and flavour.heavy < 1.0:
                sharp += 1
                centre, norm = gains(exact, Q, [column(a) for a in middle], grid, inputs)
                assert rational(float(rho[k])) <= centre * (1 + fmpq(1, 10**9))
                assert rational(float(size[k])) ** 2 <= norm * (1 + fmpq(1, 10)) ** 2
    assert finite > 30
    assert refused > 8
    assert sharp > 8


def mirrored(E: Enclosure) -> list[Exact]:
    """What the network does whose coordinates become real images: the mean of M(ω) and conj M(−ω), where both are held."""
    h, w = E.grid.image
    half = w // 2 + 1
    found = []
    plain, conjugate = Exact.of(E.W, E.U, E.G), Exact.of(E.W.conj(), E.U.conj(), E.G.conj())
    for k, exact in enumerate(plain):
        row, kx = divmod(k, half)
        if kx == 0 or 2 * kx == w:
            other = conjugate[(-row % h) * half + kx]
            mean = [(a + b) * fmpq(1, 2) for a, b in ((exact.W, other.W), (exact.U, other.U), (exact.G, other.G))]
            found.append(Exact(*mean))
        else:
            found.append(exact)
    return found


def test_a_real_network_is_the_mean_of_frequencies_held_twice():
    grid = Grid((3, 4))
    E, _, _ = problem(FLAVOURS[0], 2, 2, 1, 0.1, grid)
    x = torch.randn(5, 2, 3, 4)
    W = torch.stack([torch.tensor([[float(v.p) / float(v.q) for v in r] for r in f.W.tolist()]) for f in mirrored(E)])
    mean = torch.complex(W[:, :2, :2], W[:, 2:, :2])
    runs, means = (grid.values(grid.apply(M, grid.coordinates(x))) for M in (E.W, mean))
    assert float((runs - means).abs().max()) < 1e-14
    assert float((E.W - mean).abs().max()) > 0.1


@pytest.mark.parametrize("image", [(3, 4), (4, 1), (2, 3), (1, 1)])
def test_what_is_proved_of_frequencies_held_twice_holds_for_their_mean(image):
    grid, proved = Grid(image), 0
    for trial in range(30):
        E, Lambda, L = problem(FLAVOURS[trial % 3], 1 + trial % 3, 2, 2, 10.0 ** -whole(1, 9), grid)
        if prove_lmi(E, Lambda, L):
            proved += 1
            assert all(positive(f.H(f.diagonal(Lambda), L)) for f in mirrored(E))
        mu = prove_monotone(E, Lambda)
        assert mu == 0.0 or monotone(E, Lambda, mu, mirrored(E))
        E = replace(E, U=E.U / L**0.5)
        rows = torch.randn(2, *grid.batch, E.states, dtype=torch.complex128) * Lambda.sqrt()
        rho, _ = prove_gains(E, Lambda, rows)
        for k in range(2):
            if rho[k] < math.inf:
                functional = replace(E, G=rows[k].conj().unsqueeze(-2))  # G z = g′z
                g = [f.G.transpose() for f in mirrored(functional)]
                g = [fmpq_mat(M.nrows(), 1, [row[0] for row in M.tolist()]) for M in g]
                assert rational(float(rho[k])) >= gains(mirrored(E), Lambda, g, grid, True)[0]
    assert proved > 15


@dataclass(frozen=True, eq=False)
class Certificate:
    """Matrices, Λ and L, proved."""

    E: Enclosure
    Lambda: Tensor
    L: float

    def __post_init__(self) -> None:
        assert prove_lmi(self.E, self.Lambda, self.L)

    @cached_property
    def singular(self) -> float:
        """The L at which float64 eigenvalues of H vanish."""
        low, high = 0.0, self.L
        for _ in range(60):
            middle = 0.5 * (low + high)
            positive = middle > 0.0 and float(gauged(self.E, self.Lambda, middle)[0].min()) > 0.0
            low, high = (low, middle) if positive else (middle, high)
        return high

    def worsened(self, seed: int) -> tuple[Enclosure, Tensor, float]:
        """Moved the wrong way by 10⁻¹⁶ to 10⁻³: L shrunk, W against λ_min, Λ against it; or to where H is singular, and by as
        little to either side of it."""
        step = 10.0 ** float(uniform(-16.0, -3.0))
        E, Lambda, L = self.E, self.Lambda, self.L
        values, vectors, size = gauged(E, Lambda, L)
        place = int(values.reshape(-1, E.states)[:, 0].argmin())
        v = vectors.reshape(-1, E.states, E.states)[place, :, :1] / Lambda.sqrt()[:, None]
        how, side = (0, 1, 1, 2, 3, 3, 4, 5)[seed % 8], 1.0 if seed // 8 % 2 else -1.0
        if how == 0:
            L = min(L * (1.0 - step), math.nextafter(L, 0.0))
        elif how == 1:
            L = self.singular * (1.0 + side * step)
        elif how in (2, 3):
            least = float(values.min())
            far = step * size if how == 2 else 0.5 * least * (1.0 + side * step)
            W = E.W.reshape(-1, E.states, E.states).clone()
            W[place] += far * v @ v.mH * Lambda
            E = replace(E, W=W.reshape(E.W.shape))
        else:
            W, U = E.W.reshape(-1, E.states, E.states)[place], E.U.reshape(-1, *E.U.shape[-2:])[place]
            slope = 2.0 * v - 2.0 * W @ v - 2.0 * U @ (U.mH @ (Lambda[:, None] * v)) / L
            sign = (v.conj() * slope).real.sign()[:, 0]
            Lambda = Lambda * (1.0 - step * sign)
            if how == 5:
                L = L * (1.0 - step)
        return E, Lambda, L


def worsen(certificates: Sequence[Certificate], count: int) -> Counter[tuple[bool, bool]]:
    found: Counter[tuple[bool, bool]] = Counter()
    for trial in range(count):
        E, Lambda, L = certificates[trial % len(certificates)].worsened(trial // len(certificates))
        proved, true = bool(prove_lmi(E, Lambda, L)), holds(E, Lambda, L)
        found[proved, true] += 1
        assert true or not proved, f"proved, and false: {E} {Lambda.tolist()} {L}"
    print(tally(found))
    return found


@pytest.mark.parametrize("name", lc.registry().names())
def test_worsened_certificates_of_converted_networks(name):
    small, large = [], []
    for seed in (3, 4):
        for model in lc.registry().example_models(name, seed):
            for stage in lc.convert(model.double(), check=False).stages:
                dae = stage.running()
                size = dae.states * math.prod(dae.grid.batch) ** 0.5
                if size > 26.0:
                    continue
                proof = prove_constant(dae)
                assert isinstance(proof, Proof)
                assert proof.delta in DELTAS
                certificate = Certificate(Enclosure.of(dae), proof.Lambda, proof.lipschitz)
                (small if size < 11.0 else large).append(certificate)
    assert len(small) >= 2
    found = worsen(small, 870)
    assert found[False, False] > 150
    assert found[True, True] > 150
    if large:
        worsen(large, 60)


def test_worsened_certificates_that_are_tight():
    certificates = []
    for trial in range(60):
        grid = Grid((1, 2)) if trial % 5 == 0 else DENSE
        E, Lambda, L = problem(
            FLAVOURS[trial % 5], 1 + trial % (3 if grid else 6), 2, 2, 10.0 ** -(1 + trial % 9), grid
        )
        if prove_lmi(E, Lambda, L):
            certificates.append(Certificate(E, Lambda, L))
    assert len(certificates) > 40
    found = worsen(certificates, 4000)
    assert found[False, False] > 800
    assert found[True, True] > 800


def test_networks_without_states_inputs_or_outputs():
    zeros = torch.zeros
    nothing = Enclosure(zeros(0, 0), zeros(0, 2), zeros(3, 0))
    assert prove_lmi(nothing, zeros(0), 1.0)
    rho, size = prove_gains(nothing, zeros(0), zeros(2, 0))
    assert float(rho.max()) <= float(size.max()) < 1e-100
    closed = Enclosure(zeros(2, 2), zeros(2, 0), zeros(0, 2))
    assert prove_lmi(closed, torch.ones(2), 1e-9)
    assert prove_monotone(closed, torch.ones(2)) == pytest.approx(1.0, rel=2e-3)
    assert [len(x) for x in prove_gains(closed, torch.ones(2), zeros(0, 2))] == [0, 0]
    spectra = Enclosure(*(zeros(2, *shape, dtype=torch.complex128) for shape in ((1, 1), (1, 0), (0, 1))), Grid((2, 1)))
    assert prove_lmi(spectra, torch.ones(1), 1.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.7e308])
@pytest.mark.parametrize("which", ["W", "U", "G", "radius_W", "radius_U", "radius_G"])
def test_nothing_is_proved_of_what_is_not_finite_or_overflows(which, value):
    E = Enclosure(torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(1, 2))
    shape = getattr(E, which.removeprefix("radius_")).shape
    M = torch.zeros(shape)
    M[0, -1] = abs(value) if which.startswith("radius") else value
    E = replace(E, **{which: M})
    answer = prove_lmi(E, torch.tensor([1.0, 2.0]), 0.25)
    assert isinstance(answer, NotProved)
    assert not answer
    if which.endswith("W"):
        assert prove_monotone(E, torch.ones(2)) == 0.0
    if not which.endswith("G"):
        rho, size = prove_gains(E, torch.ones(2), torch.ones(1, 2))
        assert math.isinf(float(rho)) == math.isinf(float(size)) == True  # noqa: E712


def test_nothing_is_proved_with_multipliers_or_constants_that_are_none():
    E = Enclosure(torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(1, 2))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(lc.InvalidParameterError, match="positive and finite"):
            prove_lmi(E, torch.tensor([1.0, bad]), 1.0)
        with pytest.raises(lc.InvalidParameterError, match="positive and finite"):
            prove_lmi(E, torch.ones(2), bad)
        with pytest.raises(lc.InvalidParameterError, match="positive and finite"):
            prove_monotone(E, torch.tensor([1.0, bad]))
        assert bool(torch.isinf(prove_gains(E, torch.tensor([1.0, bad]), torch.ones(1, 2))[0]).all())
    with pytest.raises(lc.ShapeError):
        prove_lmi(E, torch.ones(3), 1.0)
    with pytest.raises(lc.InvalidParameterError, match="none of its own"):
        prove_lmi(E)


def test_a_proof_says_what_was_proved():
    E, Lambda, L = problem(FLAVOURS[0], 4, 2, 2, 1e-4)
    dae = lc.DAE(E.W, E.U, E.G, Lambda, lipschitz=L)
    proof = prove_lmi(dae)
    assert isinstance(proof, Proof)
    assert torch.equal(proof.Lambda, Lambda)
    assert (proof.lipschitz, proof.delta) == (L, 0.0)
    assert holds(dae, proof.Lambda, proof.lipschitz)
    refusal = prove_lmi(dae, lipschitz=0.5 * L)
    assert isinstance(refusal, NotProved)
    assert refusal.least_eigenvalue < -refusal.rounding < 0.0
    assert "has the eigenvalue" in refusal.reason


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("which", ["U", "G"])
def test_products_that_underflow_are_not_lost(which, kind):
    grid = Grid((1, 1)) if kind.is_complex else DENSE
    zero, tiny = torch.zeros(*grid.batch, 1, 1, dtype=kind), torch.full((*grid.batch, 1, 1), 1e-170, dtype=kind)
    E = Enclosure(zero, tiny, zero, grid) if which == "U" else Enclosure(zero, zero, tiny, grid)
    Lambda, L = torch.tensor([1e300 if which == "U" else 1e-300]), 1e-54
    assert not holds(E, Lambda, L)  # H = (2 − 10¹⁴)Λ
    assert not prove_lmi(E, Lambda, L)


@pytest.mark.parametrize("size", [1e-160, 1e-162, 1e-170, 1e-300])
def test_nothing_is_said_of_functionals_whose_squares_underflow(size):
    E = Enclosure(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
    rho, norm = prove_gains(E, torch.ones(1), torch.tensor([[size]]))
    assert math.isinf(float(rho))
    assert math.isinf(float(norm))


def test_a_network_without_states_is_monotone():
    assert prove_monotone(Enclosure(torch.zeros(0, 0), torch.zeros(0, 2), torch.zeros(3, 0)), torch.zeros(0)) >= 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_functionals_that_are_not_finite_have_no_gain(value):
    E = Enclosure(torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(1, 2))
    rho, size = prove_gains(E, torch.ones(2), torch.tensor([[1.0, value]]))
    assert float(rho) == float(size) == math.inf


def test_negative_radii_prove_nothing():
    W, zero = torch.tensor([[0.0, 1.5], [1.5, 0.0]]), torch.zeros(2, 1)
    try:
        E = Enclosure(W, zero, zero.mT, radius_W=-torch.ones(2, 2))
        assert not prove_lmi(E, torch.ones(2), 1.0)
    except lc.LipconvertError:
        pass


def test_sizes_of_solutions_hold_for_the_mean_of_frequencies_held_twice():
    K = 1.9 * torch.tensor([[0.0, 1j], [-1j, 0.0]], dtype=torch.complex128)
    E = Enclosure(-0.5 * K[None], torch.zeros(1, 2, 0) + 0j, torch.zeros(1, 0, 2) + 0j, Grid((1, 1)))
    rows = torch.tensor([[[1.0, 1j]], [[1.0, -1j]]], dtype=torch.complex128)  # one of them the first eigenvector of X
    _, size = prove_gains(E, torch.ones(2), rows, parts="")
    for k in range(2):
        g = [column(rows[k, 0].real.to(torch.complex128))]
        assert rational(float(size[k])) ** 2 >= gains(mirrored(E), torch.ones(2), g, E.grid, False)[1]
