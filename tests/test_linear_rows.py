"""Linear rows taken out of enclosures: in exact arithmetic, for matrices anywhere within the radii."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from lipconvert.certification.linear_rows import without_linear_rows
from lipconvert.certification.proofs import Enclosure, prove_gains
from lipconvert.linalg.spectrum import DENSE

Matrix = list[list[Fraction]]


def fractions(M: Tensor) -> Matrix:
    return [[Fraction(v) for v in row] for row in M.tolist()]


def times(A: Matrix, B: Matrix) -> Matrix:
    return [
        [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in zip(*B, strict=True)]
        for row in A
    ]


def plus(A: Matrix, B: Matrix, sign: int = 1) -> Matrix:
    return [[a + sign * b for a, b in zip(x, y, strict=True)] for x, y in zip(A, B, strict=True)]


def solved(M: Matrix, right: Matrix) -> Matrix:
    """M⁻¹ times the columns on the right, by Gauss and Jordan."""
    n = len(M)
    rows = [[*row, *other] for row, other in zip(M, right, strict=True)]
    for k in range(n):
        pivot = next(i for i in range(k, n) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [v / rows[k][k] for v in rows[k]]
        rows = [
            row if i == k else [v - row[k] * w for v, w in zip(row, rows[k], strict=True)] for i, row in enumerate(rows)
        ]
    return [row[n:] for row in rows]


def within(value: Matrix, centre: Tensor, radius: Tensor | None) -> bool:
    radius = torch.zeros_like(centre) if radius is None else radius
    pairs = zip(value, fractions(centre), fractions(radius), strict=True)
    return all(abs(v - c) <= r for row in pairs for v, c, r in zip(*row, strict=True))


@pytest.mark.parametrize("radii", [0.0, 1e-9, 1e-3])
@pytest.mark.parametrize(
    ("linear", "p", "q"),
    [("10", 2, 2), ("1101001", 3, 2), ("0110", 2, 4), ("00111", 6, 2), ("11", 3, 2), ("100100", 4, 1)],
)
@pytest.mark.parametrize("cyclic", [False, True])
def test_all_networks_of_the_enclosure_are_within_the_reduced_one(
    linear: str, p: int, q: int, cyclic: bool, radii: float
) -> None:
    """A, B, C and D in fractions at corners of the enclosure; with z₀ = Tx they are what the reduced enclosure encloses."""
    torch.manual_seed(len(linear) + p + q)
    n = len(linear)
    mask = torch.tensor([c == "1" for c in linear])
    W, U, G = 0.4 * torch.randn(n, n), torch.randn(n, p), torch.randn(q, n)
    if not cyclic:
        W = W.tril(-1)
    U[n // 2 :] = 0.0
    spread = [radii * torch.rand_like(M) if radii else None for M in (W, U, G)]
    taken = without_linear_rows(Enclosure(W, U, G, DENSE, *spread), mask)
    assert taken is not None
    E, k = taken.enclosure, taken.known
    e, s = mask.nonzero().flatten().tolist(), (~mask).nonzero().flatten().tolist()
    assert taken.rows.tolist() == s
    assert E.states == k + len(s)
    T = fractions(E.U[:k])
    for _ in range(3):
        W_, U_, G_ = (
            fractions(M if r is None else M + 0.999 * r * torch.sign(torch.randn_like(M)))
            for M, r in zip((W, U, G), spread, strict=True)
        )

        def part(M: Matrix, rows: list[int], columns: list[int]) -> Matrix:
            return [[M[i][j] for j in columns] for i in rows]

        every, out = list(range(p)), list(range(q))
        eye = [[Fraction(int(i == j)) for j in e] for i in e]
        regular = plus(eye, part(W_, e, e), -1)
        from_states, from_input = solved(regular, part(W_, e, s)), solved(regular, part(U_, e, every))
        A = plus(part(W_, s, s), times(part(W_, s, e), from_states)) if s else []
        B = plus(part(U_, s, every), times(part(W_, s, e), from_input)) if s else []
        C = plus(part(G_, out, s), times(part(G_, out, e), from_states)) if s else [[] for _ in out]
        D = times(part(G_, out, e), from_input)
        through = times(fractions(E.W[k:, :k]), T) if k and s else [[Fraction(0)] * p for _ in s]
        assert E.radius_W is not None
        assert within(A, E.W[k:, k:], E.radius_W[k:, k:])
        assert within(plus(B, through, -1) if s else [], E.U[k:], None if E.radius_U is None else E.radius_U[k:])
        assert within(C, E.G[:, k:], None if E.radius_G is None else E.radius_G[:, k:])
        left = plus(D, times(fractions(E.G[:, :k]), T), -1) if k else D
        for row, bound in zip(left, taken.rest.tolist(), strict=True):
            assert sum(v * v for v in row) <= Fraction(bound) ** 2
    # what is known of the first rows holds: they read T alone, as it is, and nothing else
    for M, r in ((E.W[:k], E.radius_W[:k]), (torch.zeros(0), None if E.radius_U is None else E.radius_U[:k])):
        assert not bool(M.any())
        assert r is None or not bool(r.any())
    torch.testing.assert_close(E.U[:k] @ E.U[:k].T, torch.eye(k))
    assert k <= min(p, q)
    assert float(taken.rest.max()) <= (1e-12 if not radii else 300.0 * radii)


def test_the_square_of_a_linear_network_is_that_of_its_matrix() -> None:
    """All rows linear, in a cycle: g′R⁻¹g at the known multipliers is |g′(I − W)⁻¹U|²."""
    torch.manual_seed(0)
    W, U, G = 0.3 * torch.randn(5, 5), torch.randn(5, 4), torch.randn(3, 5)
    taken = without_linear_rows(Enclosure(W, U, G), torch.ones(5, dtype=torch.bool))
    assert taken is not None
    E = taken.enclosure
    rho, _ = prove_gains(E, taken.multiplier(torch.rand(5)), E.G, E.radius_G)
    J = G.numpy() @ np.linalg.solve(np.eye(5) - W.numpy(), U.numpy())
    np.testing.assert_allclose(rho.numpy(), (J**2).sum(1), rtol=1e-12)
    assert bool((rho.numpy() >= (J**2).sum(1)).all())


@pytest.mark.parametrize("close", [0.0, 1e-16])
def test_linear_rows_without_an_inverse_stay(close: float) -> None:
    """z₁ = z₂ + x₁, z₂ = (1 − ε)z₁ + x₂."""
    W = torch.tensor([[0.0, 1.0], [1.0 - close, 0.0]])
    assert without_linear_rows(Enclosure(W, torch.eye(2), torch.eye(2)), torch.ones(2, dtype=torch.bool)) is None


@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_numbers_whose_products_leave_the_range_of_floats_stay(size: float) -> None:
    E = Enclosure(torch.tensor([[0.0, 0.0], [size, 0.0]]), torch.eye(2), torch.eye(2))
    assert without_linear_rows(E, torch.tensor([True, False])) is None
