"""What rounding may have done, against rational and ball arithmetic (FLINT) that shares nothing with it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from flint import acb, acb_mat, arb, arb_mat, ctx, fmpq, fmpq_mat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipconvert.errors import InvalidParameterError
from lipconvert.linalg import rounding
from lipconvert.linalg.rounding import (
    SLACK,
    exceeds,
    gamma,
    nonnegative_norm,
    norm_bound,
    operations,
    root_power,
    transform_growth,
    unit_roundoff,
)
from lipconvert.linalg.spectrum import Grid, _fourier

U32, U64 = 2.0**-24, 2.0**-53


def rational(x: float) -> fmpq:
    return fmpq(*float(x).as_integer_ratio())


def rationals(A: Tensor) -> fmpq_mat:
    """A real or complex (m, n) matrix, exactly; a complex one as [[Re, −Im], [Im, Re]], which has its eigenvalues twice."""
    if A.is_complex():
        A = torch.cat([torch.cat([A.real, -A.imag], 1), torch.cat([A.imag, A.real], 1)])
    return fmpq_mat(*A.shape, [rational(x) for x in A.flatten().tolist()])


def positive(A: fmpq_mat) -> bool:
    """Whether a symmetric matrix is positive definite: all leading minors, by elimination without fractions (Bareiss)."""
    M, previous = A.numer_denom()[0].tolist(), 1
    for k in range(len(M)):
        pivot = M[k][k]
        if pivot <= 0:
            return False
        for i, j in itertools.combinations_with_replacement(range(k + 1, len(M)), 2):
            M[i][j] = (pivot * M[i][j] - M[k][i] * M[k][j]) // previous
        previous = pivot
    return True


def above(A: Tensor, bound: fmpq) -> bool:
    """λ_min > bound, exactly."""
    M = rationals(A)
    for i in range(M.nrows()):
        M[i, i] = M[i, i] - bound
    return positive(M)


def with_spectrum(values: Tensor, kind: torch.dtype) -> Tensor:
    """A Hermitian matrix, to the last bit, whose eigenvalues are these up to rounding."""
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=kind))[0]
    A = (Q * values) @ Q.mH
    A = torch.tril(A) + torch.tril(A, -1).mH
    A.diagonal().copy_(A.diagonal().real.clone())
    return A


def test_the_gauge_is_made_of_powers_of_two_and_rounds_nothing():
    every = torch.tensor([math.ldexp(m, e) for e in range(-1074, 1023) for m in (1.0, 1.3, 1.99)])
    every = torch.cat([every[every > 0], torch.tensor([5e-324, torch.finfo(torch.float64).max])])
    d = root_power(every)
    mantissas, _ = torch.frexp(d)
    assert bool((mantissas == 0.5).all())
    inside = every * d.reciprocal() * d.reciprocal()
    assert bool((inside >= 0.5).all())
    assert float(inside.max()) <= 2.0 * SLACK
    assert torch.equal(inside * d * d, every)


def test_gamma_is_the_standard_one():
    for k, u in itertools.product((1, 7, 1000), (U64, U32, 2.0**-11)):
        assert rational(gamma(k, u)) * fmpq(1) >= (k * rational(u) / (1 - k * rational(u))) * rational(1.0 - 2.0**-51)
        assert gamma(k, u) <= k * u / (1.0 - k * u)
    assert gamma(2**53) == gamma(2**60) == gamma(3, 0.5) == float("inf")
    assert operations(7, torch.zeros(1)) == 7


def sequential(a: np.ndarray, b: np.ndarray) -> complex:
    """Σ a_k b_k in float32, one product and one sum after the other."""
    re = im = np.float32(0)
    for x, y in zip(a, b, strict=True):
        re = np.float32(np.float32(re + np.float32(x.real * y.real)) - np.float32(x.imag * y.imag))
        im = np.float32(np.float32(im + np.float32(x.real * y.imag)) + np.float32(x.imag * y.real))
    return complex(re, im)


def off(computed: complex, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(the error of a sum of products, the sum of their sizes), both to 200 bits."""
    with ctx.workprec(200):
        pairs = [(acb(complex(x)), acb(complex(y))) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        exact = sum((x * y for x, y in pairs), acb(0))
        size = sum((abs(x) * abs(y) for x, y in pairs), arb(0))
        return float(abs(acb(computed) - exact).mid()), float(size.mid())


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64])
def test_sums_of_products_err_by_gamma_at_most(kind):
    for trial in range(120):
        m = int(torch.randint(1, 60, ()))
        a, b = torch.randn(2, m, dtype=kind) * 10.0 ** (6.0 * torch.rand(2, m) - 3.0).to(torch.float32)
        if trial % 2:  # nothing left but errors
            b[m // 2 :] = -b[: m - m // 2]
            a[m // 2 :] = a[: m - m // 2] * (1.0 + 1e-6)
        results = [torch.dot(a, b), (a[None] @ b[:, None])[0, 0], torch.einsum("i,i", a, b), (a * b).sum()]
        for result in [*map(complex, results), sequential(a.numpy(), b.numpy())]:
            error, size = off(result, a.numpy(), b.numpy())
            assert error <= gamma(operations(m, a), U32) * size


def test_gamma_is_reached_and_complex_sums_need_more_than_real_ones():
    m = 400
    tail = np.float32((U32 * (1.0 - 1e-6)) ** 0.5)  # each product vanishes beside 1, by half an ulp
    real = np.full(m, tail, dtype=np.float32)
    real[0] = 1.0
    error, size = off(sequential(real, real), real, real)
    assert 0.99 * gamma(m, U32) < error / size <= gamma(m, U32)
    a, b = np.full(m, tail * (1 + 1j), dtype=np.complex64), np.full(m, tail * (1 - 1j), dtype=np.complex64)
    a[0] = b[0] = 1.0
    error, size = off(sequential(a, b), a, b)
    assert 1.9 * gamma(m, U32) < error / size <= gamma(operations(m, torch.from_numpy(a)), U32)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_exceeds_never_says_more_than_is_true(kind):
    accepted = false = 0
    for trial in range(700):
        n = 1 + trial % 7
        scale = 10.0 ** int(torch.randint(-6, 7, ()))
        error, margin = (0.0 if torch.rand(()) < 0.5 else scale * 10.0 ** float(-8 * torch.rand(())) for _ in range(2))
        gap = 10.0 ** -int(torch.randint(1, 18, ())) * (1 if trial % 3 else -1)
        values = error + margin + scale * torch.cat([torch.rand(n - 1), torch.tensor([gap])])
        A = with_spectrum(values, kind)
        bound = rational(error) + rational(margin)
        size = max(float(A.abs().sum(-1).max()), error + margin)
        said = exceeds(A, error, margin)
        accepted, false = accepted + said, false + (not above(A, bound))
        assert not said or above(A, bound), (trial, n, gap)
        # the theorem asks for (n + 2) u tr(A), SLACK for 2·10⁻⁹ of what is subtracted
        assert said or not above(A, bound + rational(n * n * 1e-14 * size + 3e-9 * (error + margin))), (trial, n, gap)
    assert accepted > 250
    assert false > 200


def test_exceeds_on_matrices_singular_to_round_off():
    # the factorisation of about half of these runs to its end: only what is subtracted keeps them out
    ran = 0
    for trial in range(300):
        n = 2 + trial % 5
        R = torch.randint(-9, 10, (n, n - 1), dtype=torch.float64) * 2.0 ** torch.randint(-8, 9, (n, 1))
        A = R @ R.mT  # in integers: exactly singular
        if trial % 2:
            A[-1, -1] = torch.nextafter(A[-1, -1], torch.tensor(-1.0))
        if bool((A.diagonal() <= 0).any()):
            continue
        ran += not bool(torch.linalg.cholesky_ex(A)[1])
        assert not exceeds(A, 0.0)
        assert not exceeds(A.to(torch.complex128), 0.0)
    assert ran > 50


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_exceeds_reserves_what_the_theorem_asks_for(kind):
    # LAPACK does better on a diagonal matrix, the theorem knows nothing of that
    for n in (5, 20, 100):
        A = torch.eye(n, dtype=kind)
        reserve = gamma(operations(n + 1, A)) * (n - 1)
        A[-1, -1] = 0.99 * reserve
        assert not exceeds(A, 0.0)
        A[-1, -1] = 1.5 * reserve + 2.0**-49
        assert exceeds(A, 0.0)
        assert exceeds(A[None].expand(3, n, n), 0.0)
        # of every matrix of a batch, the largest one's
        A[-1, -1] = 0.99 * reserve
        assert not exceeds(torch.stack([1e-3 * torch.eye(n, dtype=kind), A]), 0.0)
        assert not exceeds(torch.stack([A, 1e-3 * torch.eye(n, dtype=kind)]), 0.0)


def test_exceeds_reads_the_lower_triangle_of_every_matrix():
    good = with_spectrum(torch.tensor([1.0, 2.0, 3.0]), torch.complex128)
    junk = torch.triu(torch.randn(3, 3, dtype=torch.complex128), 1)
    assert exceeds(torch.tril(good) + 100.0 * junk, 0.0, 0.5)
    bad = with_spectrum(torch.tensor([-1e-9, 2.0, 3.0]), torch.complex128)
    batch = torch.stack([good, good, bad, good]).reshape(2, 2, 3, 3)
    assert exceeds(batch[:1], 0.0)
    assert not exceeds(batch, 0.0)
    assert exceeds(batch, 0.0) == exceeds(batch.flip(0, 1), 0.0)


def test_exceeds_refuses_what_is_not_finite_or_not_double():
    A = torch.eye(3)
    for error, margin in ((math.inf, 0.0), (math.nan, 0.0), (0.0, math.inf), (0.0, math.nan), (1e308, 1e308)):
        assert not exceeds(A, error, margin)
    for value in (math.inf, -math.inf, math.nan, 0.0, -1.0, -0.0):
        B = A.clone()
        B[1, 1] = value
        assert not exceeds(B, 0.0)
    C = A.clone()
    C[2, 0] = math.nan
    assert not exceeds(C, 0.0)
    assert exceeds(torch.zeros(0, 0), 0.0)
    for B in (A.float(), A.to(torch.complex64), A.to("meta")):
        with pytest.raises(InvalidParameterError, match="proofs run in float64 on the CPU"):
            exceeds(B, 0.0)


@pytest.mark.parametrize(("error", "margin"), [(0.0, -1.0), (-1.0, 0.0)])
def test_exceeds_with_negative_margins(error, margin):
    A = torch.tensor([[1.0, 2.0 + 1e-9], [2.0 + 1e-9, 1.0]])
    assert not above(A, fmpq(-1))
    with contextlib.suppress(InvalidParameterError):
        assert not exceeds(A, error, margin)


@pytest.mark.parametrize("exponent", [-1000, -900, -500, 500, 900, 1000])
def test_exceeds_at_the_ends_of_the_range(exponent):
    for n, gap in itertools.product((1, 3, 6), (1e-3, 1e-9, 1e-14, -1e-16, -1e-12)):
        A = with_spectrum(torch.cat([torch.ones(n - 1), torch.tensor([gap])]), torch.float64) * 2.0**exponent
        assert not exceeds(A, 0.0) or above(A, fmpq(0))


def test_a_factorisation_that_went_wrong_is_not_believed(monkeypatch):
    A = with_spectrum(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.float64)
    assert exceeds(A, 0.0, 0.5)
    factor = torch.linalg.cholesky_ex
    for spoil in (lambda R: 1.001 * R, lambda R: R + 1e-6, lambda R: torch.eye(4), lambda R: R * math.nan):

        def wrong(M: Tensor, spoil=spoil) -> tuple[Tensor, Tensor]:
            R, info = factor(M)
            return spoil(R), info

        monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
        assert not exceeds(A, 0.0, 0.5)


def graded(rows: int, columns: int, kind: torch.dtype) -> Tensor:
    """Rows and columns of very different sizes: where a product is not a plain sum, its small entries show it."""
    scales = [2.0 ** torch.randint(-60, 60, shape, dtype=torch.float64) for shape in ((rows, 1), (1, columns))]
    return torch.randn(rows, columns, dtype=kind) * scales[0] * scales[1]


def balls(A: Tensor) -> arb_mat | acb_mat:
    kind = acb_mat if A.is_complex() else arb_mat
    return kind(*A.shape, A.flatten().tolist())


def classical(difference: acb_mat | arb_mat, sizes: Tensor, count: int) -> bool:
    """Whether |difference| ≤ γ sizes, entry by entry."""
    limit = (gamma(count) * sizes * SLACK).flatten().tolist()
    return all(abs(x) <= y for x, y in zip(difference.entries(), limit, strict=True))


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [3, 17, 70, 150])
def test_products_and_factorisations_are_of_the_classical_kind(n, kind):
    # not Strassen's, no inverses of blocks: what the bounds assume of BLAS and LAPACK
    A, B = graded(n, n + 5, kind), graded(n + 5, n, kind)
    with ctx.workprec(200):
        for C in (A @ B, (A[None] @ B[None])[0], (B.mH @ A.mH).mH):
            assert classical(balls(C) - balls(A) * balls(B), A.abs() @ B.abs(), operations(n + 5, A))
        values = torch.logspace(0, -9, n)
        M = with_spectrum(values, kind) * (d := 2.0 ** torch.randint(-40, 40, (n,), dtype=torch.float64)) * d[:, None]
        for R in (torch.linalg.cholesky_ex(M)[0], torch.linalg.cholesky_ex(M.expand(2, n, n))[0][1]):
            product = balls(R) * balls(R.mH.resolve_conj())
            assert classical(balls(M) - product, R.abs() @ R.mT.abs(), operations(n + 2, R))


def covers(bound: float, A: Tensor) -> bool:
    """‖A‖₂ ≤ bound, exactly: bound²I − A′A ⪰ 0."""
    M = rationals(A)
    gap = M.transpose() * M * fmpq(-1)
    for i in range(gap.nrows()):
        gap[i, i] = gap[i, i] + rational(bound) ** 2
    return positive(gap)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([0, 1, 2, 6]), st.floats(-100, 100))
def test_norms_are_upper_bounds(rows, columns, seed, spread, exponent):
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(rows, columns, generator=generator) ** (spread + 1)
    A = A * (torch.rand(rows, columns, generator=generator) < 0.7) * 10.0**exponent
    assert covers(nonnegative_norm(A), A) or not A.any()
    signs = torch.rand(rows, columns, generator=generator) - 0.5
    phases = torch.polar(torch.ones_like(A), 7.0 * signs)
    for M in (A * signs, A * phases):
        assert covers(norm_bound(M), M) or not M.any()


def test_norms_are_sharp():
    for trial in range(60):
        rows, columns = torch.randint(1, 60, (2,)).tolist()
        batch = (3,) if trial % 2 else ()
        A = torch.rand(*batch, rows, columns) ** 3
        if trial % 3 == 0:
            A = torch.tril(A)
        if trial % 5 == 0:
            A = A * 10.0 ** (2.0 * torch.rand(rows, 1) - 1.0)
        true = float(torch.linalg.matrix_norm(A, 2).amax())
        assert true <= nonnegative_norm(A) <= 1.01 * true
        M = torch.randn_like(A) * A
        true = float(torch.linalg.matrix_norm(M, 2).amax())
        assert true <= norm_bound(M) <= 1.21 * true


def test_norms_of_nothing_and_of_what_is_not_finite():
    for norm in (nonnegative_norm, norm_bound):
        assert norm(torch.zeros(3, 0)) == norm(torch.zeros(0, 3)) == norm(torch.zeros(2, 3)) == 0.0
        assert norm(torch.full((2, 2), 1e200)) >= 2e200
        assert norm(torch.tensor([[math.inf, 1.0]])) == math.inf
        assert not norm(torch.tensor([[math.nan, 1.0]])) < math.inf
    batch = torch.zeros(3, 2, 2)
    batch[1, 0, 1] = 2.0
    assert 2.0 <= nonnegative_norm(batch) < 2.0001
    assert 2.0 <= norm_bound(batch) < 2.01


@pytest.mark.parametrize("norm", [nonnegative_norm, norm_bound])
@pytest.mark.parametrize("size", [1e-158, 1e-160, 1e-161, 1e-170, 1e-300])
def test_norms_of_very_small_matrices(norm, size):
    for A in (torch.tensor([[size]]), torch.full((2, 3), size)):
        assert covers(norm(A), A)


@pytest.mark.parametrize("inverse", [False, True])
def test_transforms_in_float32_err_by_less_than_their_growth(inverse):
    assert transform_growth(()) == transform_growth((1, 1)) == 0.0
    worst = 0.0
    for h, w in itertools.product(range(1, 41), repeat=2):
        x = torch.randn(4, h, w, dtype=torch.float32)
        # an impulse, a single wave, and a constant beside a whisper: the sharpest for a relative bound
        x[1] = 0.0
        x[1, -1, -1] = 1.0
        x[2] = torch.cos(torch.arange(h)[:, None] * (2.0 * math.pi * (h // 2) / h) + torch.arange(w) * 2.0)
        x[3] = 1.0 + 1e-3 * x[3]
        if inverse:
            X = torch.fft.rfft2(x.double()).to(torch.complex64)
            computed, exact = torch.fft.irfft2(X, s=(h, w)), torch.fft.irfft2(X.to(torch.complex128), s=(h, w))
        else:
            computed, exact = torch.fft.rfft2(x), torch.fft.rfft2(x.double())
        error = torch.linalg.vector_norm((computed - exact).flatten(1), dim=1)
        size = torch.linalg.vector_norm(exact.flatten(1), dim=1)
        growth = transform_growth((h, w)) * U32
        assert bool((error <= growth * size + 1e-14 * size).all()), (h, w)
        if growth:
            worst = max(worst, float((error / size).max()) / growth)
    assert 0.02 < worst < 0.5  # neither broken nor near


@pytest.fixture
def _settings_restored() -> Iterator[None]:
    precision, allowed = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("_settings_restored")
def test_unit_roundoff_follows_how_float32_is_multiplied():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for precision, u in (("highest", 2.0**-24), ("high", 2.0**-11), ("medium", 2.0**-8)):
        torch.set_float32_matmul_precision(precision)
        for device in (None, cpu):
            assert unit_roundoff(torch.float32, device) == u
        assert unit_roundoff(torch.float32, cuda) >= min(u, 2.0**-11)  # bfloat16 is TF32 there
        assert all(unit_roundoff(torch.float64, device) == 2.0**-53 for device in (None, cpu, cuda))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert unit_roundoff(torch.float32, cuda) == 2.0**-11
    assert unit_roundoff(torch.float32, cpu) >= 2.0**-24
    for dtype in (torch.float16, torch.bfloat16, torch.complex64, torch.int64):
        with pytest.raises(InvalidParameterError, match="float32 and float64 have proofs"):
            unit_roundoff(dtype)


EXACT, TF32, BF16 = 2.0**-24, 2.0**-11, 2.0**-8
# What is set -> u of float32 products on the CPU, on CUDA, and of convolutions on both; None: refused.
# By what torch documents: a setting of a backend, or of all; its conv is TF32 on CUDA unless it is switched off.
SETTINGS = {
    "pass": (EXACT, EXACT, EXACT, TF32),
    "torch.set_float32_matmul_precision('high')": (TF32, TF32, TF32, TF32),
    "torch.set_float32_matmul_precision('medium')": (BF16, TF32, BF16, TF32),
    "b.cuda.matmul.allow_tf32 = True": (EXACT, TF32, EXACT, TF32),
    "b.cudnn.allow_tf32 = False": (EXACT, EXACT, EXACT, EXACT),
    "b.cudnn.conv.fp32_precision = 'ieee'": (EXACT, EXACT, EXACT, EXACT),
    "b.fp32_precision = 'ieee'": (EXACT, EXACT, EXACT, EXACT),
    "b.fp32_precision = 'tf32'": (TF32, TF32, TF32, TF32),
    "b.fp32_precision = 'bf16'": (BF16, EXACT, BF16, EXACT),  # which no product on CUDA has: more may be claimed
    "b.cuda.matmul.fp32_precision = 'tf32'": (EXACT, TF32, EXACT, TF32),
    "b.cudnn.fp32_precision = 'tf32'": (EXACT, TF32, EXACT, TF32),
    "b.mkldnn.fp32_precision = 'bf16'": (BF16, EXACT, BF16, EXACT),
    "b.mkldnn.matmul.fp32_precision = 'bf16'": (BF16, EXACT, BF16, TF32),
    "b.mkldnn.matmul.fp32_precision = 'tf32'": (TF32, EXACT, TF32, TF32),
    "b.mkldnn.conv.fp32_precision = 'bf16'": (EXACT, EXACT, BF16, TF32),
    "b.cuda.matmul.allow_bf16_reduced_precision_reduction = False": (EXACT, EXACT, EXACT, TF32),
    "os.environ['NVIDIA_TF32_OVERRIDE'] = '1'": (EXACT, TF32, EXACT, TF32),
    "os.environ['NVIDIA_TF32_OVERRIDE'] = '7'": (EXACT, TF32, EXACT, TF32),  # reserved
    "os.environ['NVIDIA_TF32_OVERRIDE'] = '0'": (EXACT, EXACT, EXACT, TF32),  # it may have been set too late
    "os.environ['CUBLAS_EMULATE_SINGLE_PRECISION'] = '1'": (EXACT, None, EXACT, None),
    "os.environ['DNNL_DEFAULT_FPMATH_MODE'] = 'BF16'": (BF16, EXACT, BF16, TF32),
    "os.environ['ONEDNN_DEFAULT_FPMATH_MODE'] = 'tf32'": (TF32, EXACT, TF32, TF32),
    "os.environ['ONEDNN_DEFAULT_FPMATH_MODE'] = 'ANY'": (None, EXACT, None, TF32),
    "os.environ['ONEDNN_DEFAULT_FPMATH_MODE'] = 'strict'": (EXACT, EXACT, EXACT, TF32),
}
ASKED = """
import json, os, sys, torch
from lipconvert.errors import InvalidParameterError
from lipconvert.linalg.rounding import unit_roundoff

def unit(device, convolutions):
    try:
        return unit_roundoff(torch.float32, torch.device(device), convolutions=convolutions)
    except InvalidParameterError as error:
        return str(error)

b = torch.backends
for setting in json.load(sys.stdin):
    if os.fork() == 0:  # such settings cannot be taken back
        exec(setting)
        found = [unit(device, convolutions) for convolutions in (False, True) for device in ("cpu", "cuda")]
        print(json.dumps([setting, found]), flush=True)
        os._exit(0)
    os.wait()
"""


def asked(settings: list[str], **environment: str) -> dict[str, list[float | str]]:
    done = subprocess.run(
        [sys.executable, "-c", ASKED],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_unit_roundoff_sees_every_setting_and_variable():
    found = asked(list(SETTINGS))
    assert found.keys() == SETTINGS.keys()
    for setting, expected in SETTINGS.items():
        for u, v in zip(found[setting], expected, strict=True):
            if v is None:
                assert setting.split("'")[1] in str(u), (setting, u)
            elif "fp32_precision = 'bf16'" in setting:
                assert isinstance(u, float), (setting, u)
                assert u >= v, setting
            else:
                assert u == v, (setting, found[setting])


def test_a_variable_counts_though_it_is_taken_away_again():
    gone = "os.environ.pop('NVIDIA_TF32_OVERRIDE')"  # cuBLAS read it when the process began
    assert asked(["pass", gone], NVIDIA_TF32_OVERRIDE="1") == dict.fromkeys(["pass", gone], [EXACT, TF32] * 2)


def test_unit_roundoff_of_float64_and_of_other_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert unit_roundoff(torch.float64, cuda) == unit_roundoff(torch.float64) == 2.0**-53
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    assert unit_roundoff(torch.float64) == 2.0**-53
    with pytest.raises(InvalidParameterError, match="CUBLAS_EMULATE_DOUBLE_PRECISION"):
        unit_roundoff(torch.float64, cuda)
    for kind in ("meta", "mps", "xpu"):
        with pytest.raises(InvalidParameterError, match="CPU and CUDA"):
            unit_roundoff(torch.float32, torch.device(kind))


@pytest.mark.usefixtures("_settings_restored")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_in_float32_err_as_unit_roundoff_says(precision):
    torch.set_float32_matmul_precision(precision)
    u = unit_roundoff(torch.float32)
    for n in (3, 64, 300):
        A, B = torch.randn(2, n, n, dtype=torch.float32)
        error = ((A @ B).double() - A.double() @ B.double()).abs()
        assert bool((error <= gamma(n + 8, u) * (A.double().abs() @ B.double().abs())).all())


def exact_spectra(K: Tensor) -> list[acb]:
    """K̂(ω) = Σ_ab K[a, b] exp(2πi(ka/h + lb/w)) at the frequencies of rfft2, in balls, in the order (F, rows, cols)."""
    rows, cols, h, w = K.shape
    waves = {(x, n): acb(fmpq(2 * x, n)).exp_pi_i() for n in {h, w} for x in range(n)}
    return [
        sum(
            (arb(float(K[i, j, a, b])) * waves[k * a % h, h] * waves[m * b % w, w] for a in range(h) for b in range(w)),
            acb(0),
        )
        for k in range(h)
        for m in range(w // 2 + 1)
        for i in range(rows)
        for j in range(cols)
    ]


@pytest.mark.parametrize("size", [*range(1, 18), 31, 64, 224, 331])
def test_waves_are_as_exact_as_the_bound_of_spectra_counts_on(size):
    waves = _fourier(size, size)
    assert torch.equal(waves, waves.mT)
    with ctx.workprec(200):
        exact = [acb(fmpq(-2 * x, size)).exp_pi_i() for x in range(size)]
        for j in {0, 1 % size, size // 3, size - 1}:
            for k, wave in enumerate(waves[j].tolist()):
                assert abs(acb(wave) - exact[j * k % size]) <= 16 * U64


@pytest.mark.parametrize("image", [(1, 1), (1, 5), (4, 1), (3, 4), (5, 5), (2, 7), (6, 3), (8, 8)])
def test_errors_of_spectra_cover_the_exact_ones(image):
    grid = Grid(image)
    K = torch.randn(2, 3, *image)
    K[0, 0] *= 1e6
    K[1, 1] *= 1e-6
    K[1, 2] = 1.0
    K[0, 2] = 0.0
    K[0, 1] = torch.tensor(1e150)
    M = grid.matrices(K)
    single = grid.matrices(K.clamp(max=1e30).float())
    with ctx.workprec(200):
        for kernels, spectra in ((K, M), (K, M * (1.0 + 1e-9j)), (K.clamp(max=1e30).float(), single), (K, M.conj())):
            bounds = grid.matrices_error(kernels, spectra)
            assert bounds.shape == spectra.shape
            sizes = kernels.double().abs().sum((2, 3)).expand(bounds.shape)
            values = zip(
                exact_spectra(kernels.double()),
                spectra.flatten().tolist(),
                bounds.flatten().tolist(),
                sizes.flatten().tolist(),
                strict=False,
            )
            for exact, computed, bound, size in values:
                gap = abs(acb(computed) - exact)
                assert gap <= arb(bound)  # for certain: balls compare so
                assert arb(bound) <= gap * 1.0001 + 60 * (sum(image) + 10) * U64 * size + 1e-290


@pytest.mark.parametrize("size", [1e-280, 1e-306, 1e-318])
def test_errors_of_spectra_of_very_small_kernels(size):
    grid = Grid((2, 3))
    K = torch.rand(1, 1, 2, 3) * size
    M = grid.matrices(K)
    with ctx.workprec(200):
        bounds = grid.matrices_error(K, M).flatten().tolist()
        for exact, computed, bound in zip(exact_spectra(K), M.flatten().tolist(), bounds, strict=True):
            assert abs(acb(computed) - exact) <= arb(bound)


def test_the_allowance_for_sums_is_an_allowance():
    assert 1.0 + gamma(10**7) < SLACK < 1.0 + 1e-8
    assert 0.0 < rounding.UNDERFLOW < 1e-280
