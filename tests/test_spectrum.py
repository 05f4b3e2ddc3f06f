"""The linear algebra: upper bounds against exact arithmetic, roots against their definitions.

Circular convolutions against sums over shifted images, circulant matrices built index by index, and torch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lipconvert_plugins.sll import SLLConv2d
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc
from lipconvert import Grid, InvalidParameterError, NotFiniteError, NotPSDError, ShapeError
from lipconvert.linalg.spectrum import (
    add_gram,
    fold,
    gram,
    hermitian,
    least_eigenvalue,
    linear_solve,
    lu_factor,
    psd_factor,
    require_finite,
    roundoff,
    triangular_factor,
)

IMAGES = [(1, 1), (1, 3), (2, 2), (2, 1), (5, 4), (7, 8), (8, 7), (33, 17)]
SMALL = IMAGES[:5]  # where a dense matrix is built


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


# ---- circular convolutions ------------------------------------------------------------------------------------------


def shifted(x: Tensor, a: int, b: int) -> Tensor:
    """x[..., s + a, t + b] modulo the image."""
    return torch.roll(x, (-a, -b), (-2, -1))


def correlate(x: Tensor, K: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """y_i[s, t] = Σ_j Σ_ab K_ij[a, b] x_j[s + a − p, t + b − r], tap by tap; K of any size."""
    taps = np.ndindex(*K.shape[2:])
    parts = [torch.einsum("ij,bjst->bist", K[:, :, a, b], shifted(x, a - origin[0], b - origin[1])) for a, b in taps]
    return torch.stack(parts).sum(0)


def circulant(K: Tensor) -> Tensor:
    """The matrix of `correlate` on flattened images, by its indices: kernels (q, p, h, w) → (q·hw, p·hw)."""
    q, p, h, w = K.shape
    s, t = torch.arange(h * w) // w, torch.arange(h * w) % w
    blocks = K[:, :, (s[None, :] - s[:, None]) % h, (t[None, :] - t[:, None]) % w]
    return blocks.permute(0, 2, 1, 3).reshape(q * h * w, p * h * w)


def transform(K: Tensor) -> Tensor:
    """K̂(ω) = Σ_ab K[a, b] exp(2πi(ka/h + lb/w)) at the frequencies of rfft2, by the sum itself: (F, q, p)."""
    h, w = K.shape[2:]
    k, a = torch.meshgrid(torch.arange(h), torch.arange(h), indexing="ij")
    m, b = torch.meshgrid(torch.arange(w // 2 + 1), torch.arange(w), indexing="ij")
    rows, columns = torch.exp(2j * torch.pi * k * a / h), torch.exp(2j * torch.pi * m * b / w)
    return torch.einsum("ijab,ka,mb->kmij", K.to(torch.complex128), rows, columns).flatten(0, 1)


@pytest.mark.parametrize("image", IMAGES)
def test_matrices_are_the_sum_of_their_taps(image: tuple[int, int]) -> None:
    K = torch.randn(2, 3, *image)
    M = Grid(image).matrices(K)
    assert M.shape == (*Grid(image).batch, 2, 3)
    torch.testing.assert_close(M, transform(K), rtol=0.0, atol=1e-11)  # hw terms of size 1


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 3), st.integers(1, 3))
def test_round_trips(image: tuple[int, int], count: int, channels: int) -> None:
    grid = Grid(image)
    x, K = torch.randn(count, channels, *image, dtype=torch.float64), torch.randn(2, channels, *image).double()
    X, M = grid.coordinates(x), grid.matrices(K)
    assert X.shape == (count, channels, *grid.batch)
    assert M.shape == (*grid.batch, 2, channels)
    torch.testing.assert_close(grid.values(X), x, rtol=0.0, atol=1e-14)
    torch.testing.assert_close(grid.kernels(M), K, rtol=0.0, atol=1e-14)
    assert torch.equal(grid.samples(grid.columns(X)), X)
    assert torch.equal(grid.columns(grid.samples(M)), M)


def test_a_dense_grid_changes_nothing() -> None:
    grid, x, M, b = Grid(), torch.randn(4, 3), torch.randn(2, 3), torch.randn(2)
    assert not grid
    assert (grid.batch, grid.pixels) == ((), 1)
    for same in (grid.coordinates, grid.values, grid.matrices, grid.kernels):
        assert same(x) is x
    assert grid.convolution(M) is M
    assert float(grid.weights(x)) == 1.0
    torch.testing.assert_close(grid.apply(M, x), x @ M.T)
    torch.testing.assert_close(grid.affine(M, x, b), x @ M.T + b)
    torch.testing.assert_close(grid.apply_onto(torch.ones(4, 2), M, x), x @ M.T + 1.0)
    torch.testing.assert_close(grid.constant(b, 4), torch.stack([b] * 4))
    grid.constant(b, 4)[0] = 7.0  # memory of its own
    assert float(b.abs().max()) < 7.0
    torch.testing.assert_close(grid.norm(x), x.square().sum(1).sqrt())
    assert torch.equal(grid.channel_norms(x), x.abs())


@pytest.mark.parametrize("image", [(3,), (1, 2, 3), (0, 4), (3, -1)])
def test_a_grid_has_two_positive_sizes(image: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError):
        Grid(image)


def test_grids_are_compared_by_their_image() -> None:
    sizes: list[int] = torch.tensor([3, 4]).tolist()
    assert Grid((3, 4)) == Grid(tuple(sizes)) != Grid((4, 3))
    assert hash(Grid((3, 4))) == hash(Grid((3, 4)))
    with pytest.raises(ShapeError):
        Grid((3, 4)).matrices(torch.zeros(2, 2, 4, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex128])
def test_images_are_float32_or_float64(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidParameterError):
        Grid((2, 3)).coordinates(torch.ones(1, 2, 2, 3).to(dtype))


def test_weights_first_used_in_inference_mode_can_be_differentiated_through_later() -> None:
    grid, x = Grid((3, 29)), torch.randn(2, 2, 3, 29)  # a size of its own: nothing is kept of it yet
    with torch.inference_mode():
        grid.norm(grid.coordinates(x))
    x.requires_grad_(True)
    (found,) = torch.autograd.grad(grid.norm(grid.coordinates(x)).sum(), x)
    expected = x.detach() / x.detach().flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("image", IMAGES)
def test_operators_are_convolutions(image: tuple[int, int]) -> None:
    grid, K, b = Grid(image), torch.randn(2, 3, *image), torch.randn(2)
    x, u = torch.randn(4, 3, *image), torch.randn(4, 2, *image)
    M, X, expected = grid.matrices(K), grid.coordinates(x), correlate(x, K)
    bias = b[:, None, None]
    for found, wanted in (
        (grid.apply(M, X), expected),
        (grid.affine(M, X, b), expected + bias),
        (grid.apply_onto(grid.coordinates(u), M, X), expected + u),
        (grid.constant(b, 4), bias.expand(4, 2, *image)),
    ):
        # hw·3 products of size 1.
        torch.testing.assert_close(grid.values(found), wanted, rtol=0.0, atol=1e-11)
    own = grid.constant(b, 4)
    own[0] = 7.0
    torch.testing.assert_close(grid.values(own)[1:], bias.expand(3, 2, *image))


def test_operators_take_inputs_in_any_memory_layout() -> None:
    grid, K = Grid((3, 4)), torch.randn(2, 3, 3, 4)
    x = torch.randn(5, 3, 3, 4)
    X = grid.coordinates(x)
    for same in (X, X.contiguous(), X.clone(), X[[0, 1, 2, 3, 4]]):
        assert torch.equal(same, X)
        torch.testing.assert_close(grid.values(grid.apply(grid.matrices(K), same)), correlate(x, K))
    torch.testing.assert_close(grid.values(grid.apply(grid.matrices(K), X[1:3])), correlate(x[1:3], K))


@pytest.mark.parametrize("image", SMALL)
def test_the_circulant_matrix_is_the_convolution(image: tuple[int, int]) -> None:
    """The helper other tests rest on."""
    K, x = torch.randn(2, 3, *image), torch.randn(4, 3, *image)
    torch.testing.assert_close((x.flatten(1) @ circulant(K).T).reshape(4, 2, *image), correlate(x, K))


@pytest.mark.parametrize("image", IMAGES)
def test_half_spectrum_weights(image: tuple[int, int]) -> None:
    h, w = image
    grid, x, K = Grid(image), torch.randn(4, 3, *image), torch.randn(2, 3, *image)
    X = grid.coordinates(x)
    expected = [(1.0 if m == 0 or 2 * m == w else 2.0) / (h * w) for _ in range(h) for m in range(w // 2 + 1)]
    np.testing.assert_allclose(grid.weights(X).numpy(), expected, rtol=1e-15)
    assert grid.weights(X.to(torch.complex64)).dtype == torch.float32
    torch.testing.assert_close(grid.norm(X), x.flatten(1).norm(dim=1))
    torch.testing.assert_close(grid.channel_norms(X), x.flatten(2).norm(dim=2))
    # ‖dense K‖_F² = hw Σ_s K[s]² = hw Σ_ω weight ‖K̂‖_F².
    spectrum = grid.matrices(K).abs().square().sum((1, 2))
    assert float(grid.weights(spectrum) @ spectrum) == pytest.approx(float(K.square().sum()), rel=1e-13)


def test_weights_follow_the_precision_not_the_last_use() -> None:
    grid = Grid((3, 4))
    single, double = grid.weights(torch.zeros(1).float()), grid.weights(torch.zeros(1))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert float(double[0]) == 1.0 / 12.0


@pytest.mark.parametrize("image", SMALL)
def test_spectral_norm_over_frequencies_is_that_of_the_circulant_matrix(image: tuple[int, int]) -> None:
    K = torch.randn(2, 3, *image)
    exact = float(np.linalg.norm(circulant(K).numpy(), 2))
    assert exact * (1.0 - 1e-14) <= float(lc.spectral_norm(Grid(image).matrices(K))) <= exact * (1.0 + 1e-13)


@pytest.mark.parametrize("image", SMALL)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_principal_root_of_a_convolution_is_a_real_convolution(image: tuple[int, int], rank: int) -> None:
    grid, K = Grid(image), torch.randn(rank, 3, *image)
    M = grid.matrices(K)
    H = M.mH @ M
    V = grid.kernels(lc.psd_sqrt(H, "H"))
    dense = circulant(K)
    size = float((dense.T @ dense).abs().max())
    torch.testing.assert_close(circulant(V).T @ circulant(V), dense.T @ dense, rtol=0.0, atol=1e-13 * size)
    values = np.linalg.eigvalsh((dense.T @ dense).numpy())
    assert least_eigenvalue(H) == pytest.approx(values[0], abs=1e-13 * size)
    rows = torch.randn(5, 3, *image)
    R = grid.kernels(triangular_factor(grid.matrices(rows)))
    dense = circulant(rows)
    torch.testing.assert_close(circulant(R).T @ circulant(R), dense.T @ dense, rtol=0.0, atol=1e-13 * 5 * 20)


KERNELS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 4), (5, 2)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_conv2d_same(kernel: tuple[int, int], image: tuple[int, int]) -> None:
    """Direct sums, torch's own layer, the folded kernel and the frequencies: no symmetry in weight or image."""
    (h, w), (kh, kw) = image, kernel
    weight, bias, x = torch.randn(2, 3, *kernel), torch.randn(2), torch.randn(4, 3, h, w)
    origin = ((kh - 1) // 2, (kw - 1) // 2)
    expected = correlate(x, weight, origin)
    tolerance = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(lc.conv2d_same(x, weight), expected, **tolerance)
    torch.testing.assert_close(lc.conv2d_same(x, weight, bias), expected + bias[:, None, None], **tolerance)
    folded = torch.zeros(2, 3, h, w)
    for a, b in np.ndindex(kh, kw):
        folded[:, :, (a - origin[0]) % h, (b - origin[1]) % w] += weight[:, :, a, b]
    torch.testing.assert_close(fold(weight, image), folded, **tolerance)
    grid = Grid(image)
    in_frequencies = grid.values(grid.apply(grid.convolution(weight), grid.coordinates(x)))
    torch.testing.assert_close(in_frequencies, expected, rtol=0.0, atol=1e-11)
    for mode in ("zeros", "circular"):
        if mode == "circular" and (kh // 2 > h or kw // 2 > w):
            continue  # torch pads once around at most
        layer = nn.Conv2d(3, 2, kernel, padding="same", padding_mode=mode)
        layer.weight.data, layer.bias = weight, nn.Parameter(bias)
        found = lc.conv2d_same(x, weight, bias, padding_mode=mode)
        torch.testing.assert_close(found, layer(x).detach(), **tolerance)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    origin=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    seed=st.integers(0, 10**6),
)
def test_conv2d_same_with_any_origin(
    image: tuple[int, int], kernel: tuple[int, int], origin: tuple[int, int], seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    origin = (min(origin[0], kernel[0] - 1), min(origin[1], kernel[1] - 1))
    weight = torch.randn(2, 2, *kernel, generator=g, dtype=torch.float64)
    x = torch.randn(3, 2, *image, generator=g, dtype=torch.float64)
    expected = correlate(x, weight, origin)
    torch.testing.assert_close(lc.conv2d_same(x, weight, origin=origin), expected, rtol=0.0, atol=1e-12)
    grid = Grid(image)
    found = grid.values(grid.apply(grid.convolution(weight, origin), grid.coordinates(x)))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    coarse=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_a_strided_convolution_in_its_polyphase_form(
    coarse: tuple[int, int], kernel: tuple[int, int], stride: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(3, 2, *kernel, generator=g).double(), torch.randn(3, generator=g).double()
    x = torch.randn(2, 2, stride * coarse[0], stride * coarse[1], generator=g).double()
    origin = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    expected = correlate(x, weight, origin)[:, :, ::stride, ::stride] + bias[:, None, None]
    torch.testing.assert_close(lc.conv2d_same(x, weight, bias, stride), expected, rtol=0.0, atol=1e-12)
    phases = functional.pixel_unshuffle(x, stride)
    polyphase, place = lc.strided_weight(weight, stride)
    assert polyphase.shape[:2] == (3, 2 * stride**2)
    found = lc.conv2d_same(phases, polyphase, bias, 1, place)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_conv2d_adjoint(kernel: tuple[int, int], image: tuple[int, int], mode: str) -> None:
    """⟨y, Kx⟩ = ⟨K′y, x⟩, and K′ is what autograd makes of K."""
    weight, x, y = torch.randn(2, 3, *kernel), torch.randn(4, 3, *image), torch.randn(4, 2, *image)
    x.requires_grad_(True)
    Kx = lc.conv2d_same(x, weight, padding_mode=mode)
    adjoint = lc.conv2d_adjoint(y, weight, mode)
    left, right = (y * Kx).sum((1, 2, 3)), (adjoint * x).sum((1, 2, 3))
    torch.testing.assert_close(left, right, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(adjoint, torch.autograd.grad((y * Kx).sum(), x)[0], rtol=0.0, atol=1e-12)
    if mode == "circular":
        grid = Grid(image)
        by_frequency = grid.values(grid.apply(grid.convolution(weight).mH, grid.coordinates(y)))
        torch.testing.assert_close(by_frequency, adjoint.detach(), rtol=0.0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # of torch's own forward mode
@pytest.mark.parametrize("image", SMALL)
@pytest.mark.parametrize(("kernel", "origin"), [((3, 3), (1, 1)), ((2, 4), (1, 0)), ((5, 2), (4, 1))])
def test_derivatives_of_conv2d_same(kernel: tuple[int, int], origin: tuple[int, int], image: tuple[int, int]) -> None:
    """Those of the direct sums, in x, in the weight and in both, backwards, forwards and for many at once."""
    given = (torch.randn(3, 3, *image), torch.randn(2, 3, *kernel), torch.randn(2))
    y = torch.randn(3, 2, *image)

    def found(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lc.conv2d_same(x, weight, bias, origin=origin)

    def direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return correlate(x, weight, origin) + bias[:, None, None]

    for each in range(3):  # one at a time: the others need no derivative
        jacobians = [torch.func.jacrev(f, each)(*given) for f in (found, direct)]
        torch.testing.assert_close(*jacobians, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(torch.func.jacfwd(found, each)(*given), jacobians[1], rtol=0.0, atol=1e-12)
    tangents = tuple(torch.randn_like(t) for t in given)
    moved = [torch.func.jvp(f, given, tangents)[1] for f in (found, direct)]
    torch.testing.assert_close(*moved, rtol=0.0, atol=1e-11)
    second = [torch.func.hessian(lambda *a, f=f: (y * f(*a)).square().sum(), (0, 1))(*given) for f in (found, direct)]
    torch.testing.assert_close(*second, rtol=0.0, atol=1e-10)
    each_weight = torch.stack([given[1], -2.0 * given[1]])
    many = [torch.func.vmap(lambda w, f=f: f(given[0], w, given[2]))(each_weight) for f in (found, direct)]
    torch.testing.assert_close(*many, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "cast"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)])
def test_circular_convolutions_under_autocast(dtype: torch.dtype, cast: torch.dtype) -> None:
    """The dtypes and values of torch's own layer, forwards and backwards."""
    own = nn.Conv2d(3, 2, 3, padding="same", padding_mode="circular").to(dtype)
    x = torch.randn(4, 3, 5, 4, dtype=dtype)
    found = []
    for layer in (own, lambda x: lc.conv2d_same(x, own.weight, own.bias)):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
        assert y.dtype == cast
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [given, own.weight, own.bias])])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    tolerance = 0.02 if cast == torch.bfloat16 else 1e-12  # bfloat16 has 8 bits; sums are in another order
    torch.testing.assert_close(*found, rtol=tolerance, atol=4.0 * tolerance)


@pytest.mark.filterwarnings("default")  # of torch's own compiler, which differ from version to version
@pytest.mark.parametrize(
    "how",
    [
        lambda layer, x: torch.export.export(layer, (x,)).module(),
        lambda layer, x: torch.export.export(layer, (x,), strict=True).module(),
        torch.jit.trace,
    ],
    ids=["export", "strict export", "trace"],
)
def test_circular_convolutions_can_be_taken_apart(how: Callable[..., nn.Module]) -> None:
    layer = SLLConv2d(3, 2, kernel_size=3)
    x = torch.randn(4, 3, 5, 4)
    torch.testing.assert_close(how(layer, x)(x), layer(x), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "stride"), [((2, 4, 4, 4), 1), ((3, 4, 4), 1), ((2, 3, 4, 5), 2), ((2, 3, 5, 4), 2), ((2, 3, 4, 4), 3)]
)
def test_inputs_a_convolution_does_not_take(shape: tuple[int, ...], stride: int) -> None:
    with pytest.raises(ShapeError) as caught:
        lc.conv2d_same(torch.zeros(shape), torch.zeros(2, 3, 3, 3), stride=stride)
    assert caught.value.actual == shape


@pytest.mark.parametrize("image", [(1, 1), (2, 3), (3, 2), (3, 4)])
def test_everything_on_a_grid_is_differentiable(image: tuple[int, int]) -> None:
    """By finite differences in real images and kernels: what a parameter sees."""
    grid = Grid(image)
    x, K, b = (torch.randn(s).requires_grad_() for s in ((2, 2, *image), (3, 2, *image), (3,)))
    weight, u = torch.randn(3, 2, 3, 2).requires_grad_(), torch.randn(2, 3, *image)

    def affine(x: Tensor, K: Tensor, b: Tensor) -> Tensor:
        return grid.values(grid.affine(grid.matrices(K), grid.coordinates(x), b))

    def onto(x: Tensor, weight: Tensor) -> Tensor:
        return grid.values(grid.apply_onto(grid.coordinates(u), grid.convolution(weight), grid.coordinates(x)))

    def norms(x: Tensor, K: Tensor) -> Tensor:
        return grid.norm(grid.apply(grid.matrices(K), grid.coordinates(x)))

    def squared(K: Tensor) -> Tensor:
        return grid.kernels(gram(grid.matrices(K), 0.5 * grid.matrices(K[:2])))

    for function, inputs in ((affine, (x, K, b)), (onto, (x, weight)), (norms, (x, K)), (squared, (K,))):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_gram_and_its_derivative(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = [torch.randn(*batch, r, 3, dtype=dtype).requires_grad_() for r in (2, 0, 5)]
    expected = sum(np.swapaxes(R.detach().numpy().conj(), -1, -2) @ R.detach().numpy() for R in rows)
    np.testing.assert_allclose(gram(*rows).detach().numpy(), expected, atol=1e-14)
    assert torch.autograd.gradcheck(gram, (rows[0], rows[2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_add_gram(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """M + αR′R in place, with zero columns at the ends, in the middle, everywhere, and without rows."""
    for alive in ([0, 1, 2, 3, 4], [1, 3], [4], []):
        for rows in (0, 2, 7):
            M, R = torch.randn(*batch, 5, 5, dtype=dtype), torch.zeros(*batch, rows, 5, dtype=dtype)
            R[..., alive] = torch.randn(*batch, rows, len(alive), dtype=dtype)
            expected = M.numpy() - 1.5 * np.swapaxes(R.numpy(), -1, -2).conj() @ R.numpy()
            result = add_gram(M, R, -1.5)
            assert result is M
            np.testing.assert_allclose(result.numpy(), expected, atol=1e-14)


def test_psd_factor_is_a_factor() -> None:
    """Positive definite, singular (no Cholesky factor), a batch in which one is singular; indefinite is refused."""
    R = torch.randn(6, 4, 5, dtype=torch.complex128)
    singular, definite = R.mH @ R, R.mH @ R + torch.eye(5)
    for H in (definite, singular, torch.cat([definite, singular]), torch.zeros(3, 3), torch.ones(2, 2)):
        F = psd_factor(H, "H")
        assert float((F.mH @ F - H).abs().max()) <= 1e-13
    with pytest.raises(NotPSDError, match="H of layer 3"):
        psd_factor(torch.diag(torch.tensor([1.0, -1e-3])), "H of layer 3")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_lu_of_batches_on_several_threads(dtype: torch.dtype) -> None:
    """torch's own is wrong there above n = 150 or so; one matrix at a time it is right."""
    torch.set_num_threads(2)  # the fixture of conftest puts it back
    A, B = torch.randn(3, 192, 192, dtype=dtype) + 20.0 * torch.eye(192), torch.randn(3, 192, 2, dtype=dtype)
    A.requires_grad_()
    X = linear_solve(A, B)
    one_by_one = torch.stack([torch.linalg.solve(a, b) for a, b in zip(A.detach(), B, strict=True)])
    assert float((X.detach() - one_by_one).abs().max()) <= 1e-12
    (gradient,) = torch.autograd.grad(X.real.sum(), A)
    adjoint = torch.stack([torch.linalg.solve(a.mH, torch.ones_like(b)) for a, b in zip(A.detach(), B, strict=True)])
    assert float((gradient + adjoint @ one_by_one.mH).abs().max()) <= 1e-12
    LU, pivots, info = lu_factor(A.detach())
    assert not bool(info.any())
    assert float((torch.linalg.lu_solve(LU, pivots, B) - one_by_one).abs().max()) <= 1e-12
