"""The linear algebra: upper bounds against exact arithmetic, roots against their definitions."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.linalg import sqrtm

import lipconvert as lc
from lipconvert import NotFiniteError, NotPSDError
from lipconvert.spectrum import hermitian, least_eigenvalue, require_finite, roundoff, triangular_factor


def exactly_bounded(M: list[list[float]], s: float) -> bool:
    """Whether ‖M‖₂ <= s: s²I − M'M ⪰ 0 by elimination in rational arithmetic, without any rounding."""
    A = [[Fraction(entry) for entry in row] for row in M]
    n = len(A[0])
    K = [[-sum(row[i] * row[j] for row in A) + (Fraction(s) ** 2 if i == j else 0) for j in range(n)] for i in range(n)]
    for k in range(n):
        if K[k][k] < 0:
            return False
        if K[k][k] == 0:
            if any(K[i][k] != 0 for i in range(k + 1, n)):
                return False
            continue
        for i in range(k + 1, n):
            factor = K[i][k] / K[k][k]
            for j in range(k + 1, n):
                K[i][j] -= factor * K[k][j]
    return True


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (6, 2), (2, 6), (5, 5)])
@pytest.mark.parametrize("seed", range(8))
def test_spectral_norm_is_an_upper_bound_in_exact_arithmetic(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    M = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, size=(1, shape[1]))
    if seed % 2:
        M = np.outer(M[:, 0], M[0])  # rank one up to rounding
    bound = float(lc.spectral_norm(torch.from_numpy(M)))
    assert exactly_bounded(M.tolist(), bound)
    # And tight: 1e-13 below it is no bound any more.
    assert not exactly_bounded(M.tolist(), bound * (1.0 - 1e-13))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(hnp.arrays(np.int64, (2, 2), elements=st.integers(-(10**6), 10**6)))
def test_spectral_norm_of_2x2_integers_to_fifty_digits(M: np.ndarray) -> None:
    a, b, c, d = (int(v) for v in M.flatten())
    with localcontext() as context:
        context.prec = 60
        t, determinant = Decimal(a * a + b * b + c * c + d * d), Decimal(a * d - b * c)
        norm = ((t + (t * t - 4 * determinant**2).sqrt()) / 2).sqrt()
        bound = Decimal(float(lc.spectral_norm(torch.from_numpy(M).double())))
        assert norm <= bound <= norm * (1 + Decimal("1e-13"))


def test_spectral_norm_of_a_rank_one_integer_matrix_is_exact() -> None:
    u, v = np.array([3.0, 4.0, 12.0]), np.array([8.0, 15.0])  # norms 13 and 17
    bound = float(lc.spectral_norm(torch.from_numpy(np.outer(u, v))))
    assert 221.0 <= bound <= 221.0 * (1.0 + 1e-14)


def test_spectral_norm_of_other_shapes() -> None:
    assert float(lc.spectral_norm(torch.zeros(3, 2))) == 0.0
    assert float(lc.spectral_norm(torch.zeros(0, 2))) == 0.0
    batch = torch.randn(5, 3, 4, dtype=torch.complex128)
    largest = max(np.linalg.norm(m, 2) for m in batch.numpy())
    assert largest <= float(lc.spectral_norm(batch)) <= largest * (1.0 + 1e-13)
    assert lc.spectral_norm(batch).dtype == torch.float64
    M = torch.randn(4, 3).float()
    assert lc.spectral_norm(M).dtype == torch.float32
    assert exactly_bounded(M.tolist(), float(lc.spectral_norm(M)))


def test_spectral_norm_has_the_gradient_of_the_largest_singular_value() -> None:
    M = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(lc.spectral_norm(M), M)
    u, _, vt = np.linalg.svd(M.detach().numpy())
    np.testing.assert_allclose(gradient.numpy(), np.outer(u[:, 0], vt[0]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@pytest.mark.parametrize("kind", ["real", "complex", "batch"])
def test_psd_sqrt(rank: int, kind: str) -> None:
    shape = (4, rank, 5) if kind == "batch" else (rank, 5)
    F = torch.randn(*shape, dtype=torch.float64 if kind == "real" else torch.complex128)
    H = F.mH @ F
    root = lc.psd_sqrt(H, "H")
    # √(round-off) of a zero eigenvalue does not enter F'F.
    assert float((root.mH @ root - H).abs().max()) <= 1e-13 * max(1.0, float(H.abs().max()))
    assert float((root - root.mH).abs().max()) <= 1e-13 * max(1.0, float(root.abs().max()))
    assert float(torch.linalg.eigvalsh(root).min()) >= -1e-13 * max(1.0, float(root.abs().max()))


def test_psd_sqrt_is_scipys() -> None:
    F = torch.randn(7, 5)
    H = F.mT @ F + 0.1 * torch.eye(5)
    # The root of a matrix with condition number about 1e2.
    np.testing.assert_allclose(lc.psd_sqrt(H, "H").numpy(), sqrtm(H.numpy()), rtol=1e-11, atol=1e-12)


def test_psd_sqrt_reports_how_far_from_psd() -> None:
    H = torch.diag(torch.tensor([2.0, -1e-6, 1.0]))
    with pytest.raises(NotPSDError) as caught:
        lc.psd_sqrt(H, "T − W'W of 'layer 3'")
    assert caught.value.where == "T − W'W of 'layer 3'"
    assert caught.value.least_eigenvalue == pytest.approx(-1e-6, rel=1e-9)
    assert 0.0 < caught.value.tolerance < 1e-6
    # Round-off is zero: the root is PSD and F'F differs from H by no more than the allowance.
    H = torch.diag(torch.tensor([2.0, -1e-15, 1.0]))
    root = lc.psd_sqrt(H, "H")
    assert float((root @ root - H).abs().max()) <= 2e-15
    # What is left after terms of size 1e6 cancelled may miss by their round-off, and is refused without being told.
    H = torch.diag(torch.tensor([1e-3, -1e-10]))
    with pytest.raises(NotPSDError):
        lc.psd_sqrt(H, "H")
    assert lc.psd_sqrt(H, "H", scale=1e6).shape == (2, 2)
    assert lc.psd_sqrt(torch.zeros(0, 0), "empty").shape == (0, 0)


@pytest.mark.parametrize("shape", [(7, 4), (4, 4), (2, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_triangular_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randn(*shape, dtype=dtype)
    R = triangular_factor(rows)
    assert R.shape == (min(shape), 4)
    assert bool((R.tril(-1) == 0).all())
    assert float((R.mH @ R - rows.mH @ rows).abs().max()) <= 1e-14 * max(1.0, float(shape[0]))


def test_triangular_factor_does_not_square_the_condition_number() -> None:
    """Läuchli's matrix: ε² is lost in rows'rows, so its Cholesky fails, but not in R."""
    epsilon = 1e-9
    rows = torch.cat([torch.ones(1, 2), epsilon * torch.eye(2)])
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(rows.mT @ rows)
    R = triangular_factor(rows)
    # det(rows'rows) = 2ε² + ε⁴.
    assert abs(float(R[0, 0] * R[1, 1])) == pytest.approx((2.0 * epsilon**2 + epsilon**4) ** 0.5, rel=1e-6)


def test_least_eigenvalue_and_hermitian() -> None:
    M = torch.randn(3, 4, 4, dtype=torch.complex128)
    H = (M + M.conj().transpose(1, 2)) / 2
    assert torch.equal(hermitian(M), H)
    assert least_eigenvalue(M) == pytest.approx(min(np.linalg.eigvalsh(h)[0] for h in H.numpy()), rel=1e-12)
    assert least_eigenvalue(torch.zeros(0, 0)) == float("inf")


@pytest.mark.parametrize("n", [2, 20, 200])
def test_roundoff_covers_lapack(n: int) -> None:
    """λ_min of Q diag(0, ..) Q' computed is within the allowance of 0, and the allowance is small."""
    Q, _ = torch.linalg.qr(torch.randn(n, n))
    H = (Q * torch.linspace(0.0, 1.0, n)) @ Q.mT
    allowance = roundoff(H)
    assert abs(least_eigenvalue(H)) <= allowance <= 1e-10
    assert roundoff(H, 1e6) == pytest.approx(32 * n * 2.0**-52 * 1e6, rel=1e-12)


def test_require_finite() -> None:
    require_finite(torch.ones(3), "t")
    with pytest.raises(NotFiniteError) as caught:
        require_finite(torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]), "weight of 'a'")
    assert (caught.value.where, caught.value.count, caught.value.total) == ("weight of 'a'", 3, 4)
    with pytest.raises(NotFiniteError):
        require_finite(torch.tensor([complex(0.0, float("nan"))]), "c")
