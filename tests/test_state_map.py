"""StateMap and triangular_blocks against dense numpy; on a grid against circulant matrices built index by index."""

from itertools import product

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import circulant, matrices
from torch import Tensor

from lipconvert import Grid, InvalidParameterError, ShapeError, StateMap
from lipconvert.linalg.state_map import triangular_blocks


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def lower_blocks(blocks: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A dense strictly block lower triangular matrix."""
    n = sum(blocks)
    index = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    return torch.randn(n, n, generator=generator) * (index[:, None] > index[None, :])


def strictly_lower(mask: np.ndarray, blocks: tuple[int, ...]) -> bool:
    index = np.repeat(np.arange(len(blocks)), blocks)
    return not bool((mask & ~(index[:, None] > index[None, :])).any())


def compositions(n: int):
    """All ways to cut 0..n-1 into consecutive blocks."""
    for cuts in product((False, True), repeat=n - 1):
        sizes, size = [], 1
        for cut in cuts:
            if cut:
                sizes.append(size)
                size = 1
            else:
                size += 1
        yield (*sizes, size)


@st.composite
def masks(draw):
    n = draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))
    mask = np.array(bits).reshape(n, n)
    # Mostly lower triangular ones: a random mask hardly ever is.
    return np.tril(mask, -1) if draw(st.integers(0, 3)) else mask


@settings(deadline=None, derandomize=True, max_examples=150)
@given(masks())
def test_triangular_blocks_is_the_coarsest_valid_cut(mask):
    n = len(mask)
    valid = [blocks for blocks in compositions(n) if strictly_lower(mask, blocks)]
    found = triangular_blocks(torch.from_numpy(mask).to(torch.float64))
    if not valid:
        assert found is None
    else:
        assert found in valid
        assert len(found) == min(map(len, valid))


def test_triangular_blocks_of_a_batch_fit_every_member():
    W = torch.zeros(2, 4, 4)
    W[0, 1, 0] = 1.0
    W[1, 3, 2] = 1.0
    assert triangular_blocks(W[0]) == (1, 3)
    assert triangular_blocks(W[1]) == (3, 1)
    assert triangular_blocks(W) == (1, 2, 1)
    assert triangular_blocks(torch.zeros(0, 0)) == ()
    assert triangular_blocks(torch.zeros(3, 3)) == (3,)


def test_bad_shapes_are_named():
    with pytest.raises(ShapeError):
        StateMap(torch.zeros(2, 3))
    with pytest.raises(ShapeError):
        StateMap(torch.zeros(4, 4), blocks=(2, 1))


CASES = {
    "triangular": ((3, 2, 4), 0.0),
    "round-off above the diagonal": ((3, 2, 4), 1e-15),
    "perturbed": ((3, 2, 4), 1e-2),
    "general": ((9,), 1.0),
    "single states": ((1,) * 9, 1e-5),
}


def case(name: str) -> tuple[Tensor, StateMap]:
    blocks, noise = CASES[name]
    generator = torch.Generator().manual_seed(3)
    W = lower_blocks(blocks, generator)
    if len(blocks) > 2:
        W[-blocks[-1] :, : blocks[0]] = 0.0  # a chain: the last block does not read the first
    W = W + noise * torch.randn(9, 9, generator=generator)
    Lambda = torch.rand(9, generator=generator) + 0.3
    return W, StateMap(W, blocks, Lambda)


def strict_part(map: StateMap) -> Tensor:
    """T, column by column, from what rows_below applies."""
    eye = torch.eye(map.states)
    T = torch.zeros(map.states, map.states)
    for block in map.order:
        T[block] = map.rows_below(block, eye, torch.zeros_like(eye)).mT
    return T


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_apply_rows_and_strict_part(name, adjoint):
    W, map = case(name)
    blocks = CASES[name][0]
    if adjoint:
        W, map = W.mT, map.adjoint
    z, u = torch.randn(5, 9), torch.randn(5, 9)
    dense = z.numpy() @ W.numpy().T
    # Nine terms of size 10: round-off is below 1e-13.
    np.testing.assert_allclose(map.apply(z).numpy(), dense, atol=1e-13)
    covered = torch.zeros(9)
    for block in map.order:
        np.testing.assert_allclose(map.rows(block, z, u).numpy(), (dense + u.numpy())[:, block], atol=1e-13)
        covered[block] += 1
    assert bool((covered == 1).all())

    T = strict_part(map)
    index = np.repeat(np.arange(len(blocks)), blocks)
    below = index[:, None] < index[None, :] if adjoint else index[:, None] > index[None, :]
    assert not T.numpy()[~below].any()
    # What T leaves out below the diagonal is round-off of the largest entry.
    left_out = np.where(below, (W - T).numpy(), 0.0)
    assert np.abs(left_out).max(initial=0.0) <= 1e-14 * float(W.abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_remainder_bounds_the_norm_of_what_is_not_triangular(name, adjoint):
    W, map = case(name)
    if adjoint:
        W, map = W.mT, map.adjoint
    exact = np.linalg.norm((W - strict_part(map)).numpy(), 2)
    # The Frobenius norm is at most 3 times the 2-norm for rank 9; refined it is within rank^(1/4) = 1.74.
    assert exact * (1 - 1e-12) <= map.remainder <= 3.0 * exact
    if name == "triangular":
        assert map.remainder == 0.0
    if 0.0 < exact < 1e-4:
        assert map.remainder <= 1.75 * exact


@settings(deadline=None, derandomize=True, max_examples=100)
@given(seed=st.integers(0, 10_000), exponent=st.floats(-14.0, 1.0), rank=st.integers(1, 6))
def test_remainder_is_an_upper_bound_for_any_size_and_rank(seed, exponent, rank):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(6, rank, generator=generator) @ torch.randn(rank, 6, generator=generator)
    W = lower_blocks((2, 2, 2), generator) + 10.0**exponent * noise
    map = StateMap(W, (2, 2, 2))
    exact = np.linalg.norm((W - strict_part(map)).numpy(), 2)
    assert map.remainder >= exact * (1 - 1e-12)  # equal for rank one, up to the round-off of both


def test_adjoint_is_the_transpose_and_runs_backwards():
    W, map = case("triangular")
    z, p = torch.randn(4, 9), torch.randn(4, 9)
    np.testing.assert_allclose((map.apply(z) * p).sum(1).numpy(), (z * map.adjoint.apply(p)).sum(1).numpy(), atol=1e-12)
    assert map.adjoint.order == map.order[::-1]
    assert map.adjoint.remainder == 0.0
    assert torch.equal(map.adjoint.adjoint.W, W)
    assert map.adjoint.adjoint.order == map.order
    assert map.Lambda is not None
    assert map.adjoint.Lambda is not None
    np.testing.assert_allclose((map.adjoint.Lambda * map.Lambda).numpy(), 1.0, rtol=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 7.0])
def test_resolvent(alpha):
    W, map = case("general")
    W = W / 4.0
    map = StateMap(W)
    v = torch.randn(6, 9)
    A = np.eye(9) + alpha * (np.eye(9) - W.numpy())
    np.testing.assert_allclose(map.resolvent(v, alpha).numpy(), np.linalg.solve(A, v.numpy().T).T, atol=1e-12)
    B = np.eye(9) + alpha * (np.eye(9) - W.numpy().T)
    np.testing.assert_allclose(map.adjoint.resolvent(v, alpha).numpy(), np.linalg.solve(B, v.numpy().T).T, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_monotonicity_is_a_generalised_eigenvalue(name, adjoint):
    W, map = case(name)
    if adjoint:
        W, map = W.mT, map.adjoint
    assert map.Lambda is not None
    Lambda, A = np.diag(map.Lambda.numpy()), np.eye(9) - W.numpy()
    mu = scipy.linalg.eigh(Lambda @ A + A.T @ Lambda, 2.0 * Lambda, eigvals_only=True)[0]
    ell = scipy.linalg.eigh(A.T @ Lambda @ A, Lambda, eigvals_only=True)[-1] ** 0.5
    np.testing.assert_allclose(map.monotonicity, (mu, ell), rtol=1e-11, atol=1e-12)


def test_monotonicity_needs_a_metric():
    with pytest.raises(InvalidParameterError):
        _ = StateMap(torch.zeros(2, 2)).monotonicity


@settings(deadline=None, derandomize=True, max_examples=100)
@given(seed=st.integers(0, 10_000), size=st.floats(0.05, 3.0), n=st.integers(1, 7))
def test_comparison_exists_exactly_when_the_radius_is_below_one(seed, size, n):
    W = size * torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) / n
    radius = np.abs(np.linalg.eigvals(np.abs(W.numpy()))).max()
    N = StateMap(W).comparison
    if radius < 1.0 - 1e-9:
        assert N is not None
        series, term = np.zeros((n, n)), np.eye(n)
        while term.max() > 1e-17 * max(series.max(), 1.0):
            series, term = series + term, term @ np.abs(W.numpy())
        np.testing.assert_allclose(N.numpy(), series, rtol=1e-8 / (1.0 - radius), atol=1e-12)
    elif radius > 1.0 + 1e-9:
        assert N is None


def test_comparison_bounds_the_distance_to_the_equilibrium():
    generator = torch.Generator().manual_seed(5)
    for W in (lower_blocks((3, 3, 3), generator) * 3.0, 0.1 * torch.randn(9, 9, generator=generator)):
        N = StateMap(W).comparison
        assert N is not None
        u = torch.randn(20, 9, generator=generator)
        exact = torch.zeros(20, 9)
        for _ in range(400):  # |W| has radius below 1, so plain iteration converges
            exact = torch.tanh(exact @ W.mT + u)
        z = exact + torch.randn(20, 9, generator=generator)
        s = torch.tanh(z @ W.mT + u)
        bound = (z - s).abs() @ W.abs().mT @ N.mT
        assert bool(((s - exact).abs() <= bound + 1e-12).all())


def test_comparison_of_an_ill_posed_map_is_none():
    assert StateMap(torch.eye(1)).comparison is None
    assert StateMap(torch.tensor([[0.0, 2.0], [0.5, 0.0]])).comparison is None


def test_newton_step_is_the_solve_of_each_sample():
    rng = np.random.default_rng(0)
    W, D, r = rng.normal(size=(5, 5)), rng.uniform(size=(3, 5)), rng.normal(size=(3, 5))
    found = StateMap(torch.from_numpy(W)).newton_step(torch.from_numpy(D), torch.from_numpy(r)).numpy()
    for slopes, residual, step in zip(D, r, found, strict=True):
        np.testing.assert_allclose(step, np.linalg.solve(np.eye(5) - np.diag(slopes) @ W, residual), rtol=1e-10)


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 4), (4, 3)]
C = 5  # channels


def conv_case(name: str, image: tuple[int, int]) -> tuple[Tensor, StateMap]:
    """Kernels of W, strictly lower triangular in the channels but for noise, and the map."""
    blocks, noise = {
        "triangular": ((2, 1, 2), 0.0),
        "round-off above the diagonal": ((2, 1, 2), 1e-16),
        "perturbed": ((2, 1, 2), 1e-2),
        "general": ((5,), 1.0),
    }[name]
    g = torch.Generator().manual_seed(3)
    index = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    K = torch.randn(C, C, *image, generator=g) * (index[:, None] > index[None, :])[:, :, None, None]
    if len(blocks) > 2:
        K[-2:, :2] = 0.0  # a chain: the last block does not read the first
    K = (K + noise * torch.randn(C, C, *image, generator=g)) / (image[0] * image[1]) ** 0.5
    return K, StateMap(matrices(K), blocks, torch.rand(C, generator=g) + 0.3, grid=Grid(image))


CONV_CASES = ["triangular", "round-off above the diagonal", "perturbed", "general"]


def dense_strict_part(map: StateMap) -> Tensor:
    """T on flattened images, column by column, from what rows_below applies to unit images."""
    image, size = map.grid.image, C * map.grid.pixels
    X = map.grid.coordinates(torch.eye(size).reshape(size, C, *image))
    T = torch.zeros_like(X)
    for block in map.order:
        T[:, block] = map.rows_below(block, X, torch.zeros_like(X))
    return map.grid.values(T).flatten(1).mT


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", CONV_CASES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_everything_a_solver_asks_of_a_convolution(name, image, adjoint):
    K, map = conv_case(name, image)
    W, blocks, grid, pixels = circulant(K), map.blocks, map.grid, image[0] * image[1]
    if adjoint:
        W, map = W.mT, map.adjoint
    z, u = torch.randn(5, C, *image), torch.randn(5, C, *image)
    Z, dense = grid.coordinates(z), (z.flatten(1) @ W.mT).reshape(5, C, *image)
    np.testing.assert_allclose(grid.values(map.apply(Z)).numpy(), dense.numpy(), atol=1e-13)
    np.testing.assert_allclose(map.norm(Z).numpy(), z.flatten(1).norm(dim=1).numpy(), rtol=1e-13)
    covered = torch.zeros(C)
    for block in map.order:
        rows = grid.values(map.rows(block, Z, grid.coordinates(u)))
        np.testing.assert_allclose(rows.numpy(), (dense + u)[:, block].numpy(), atol=1e-13)
        covered[block] += 1
    assert bool((covered == 1).all())
    v = torch.randn(5, C * pixels)
    for alpha in (0.1, 1.0, 7.0):
        A = (1.0 + alpha) * np.eye(C * pixels) - alpha * W.numpy()
        solved = grid.values(map.resolvent(grid.coordinates(v.reshape(5, C, *image)), alpha)).flatten(1)
        np.testing.assert_allclose(solved.numpy(), np.linalg.solve(A, v.numpy().T).T, rtol=1e-10, atol=1e-10)

    T = dense_strict_part(map)
    index = np.repeat(np.arange(len(blocks)), np.array(blocks) * pixels)
    below = index[:, None] < index[None, :] if adjoint else index[:, None] > index[None, :]
    assert np.abs(T.numpy()[~below]).max(initial=0.0) <= 1e-15
    left_out = np.where(below, (W - T).numpy(), 0.0)
    assert np.abs(left_out).max(initial=0.0) <= 1e-14 * float(W.abs().max())
    exact = np.linalg.norm(np.where(below, 0.0, W.numpy()), 2)
    # ‖E‖_F of the worst frequency is at most √5 times its 2-norm; windows leave round-off of W out.
    assert exact * (1.0 - 1e-12) <= map.remainder <= 2.3 * exact + 1e-14
    if name == "triangular":
        assert map.remainder == 0.0


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", CONV_CASES)
@pytest.mark.parametrize("adjoint", [False, True])
def test_monotonicity_of_a_convolution_is_that_of_its_dense_form(name, image, adjoint):
    K, map = conv_case(name, image)
    W = circulant(K)
    if adjoint:
        W, map = W.mT, map.adjoint
    assert map.Lambda is not None
    n = len(W)
    Lambda = np.diag(map.Lambda.repeat_interleave(image[0] * image[1]).numpy())
    A = np.eye(n) - W.numpy()
    mu = scipy.linalg.eigh(Lambda @ A + A.T @ Lambda, 2.0 * Lambda, eigvals_only=True)[0]
    ell = scipy.linalg.eigh(A.T @ Lambda @ A, Lambda, eigvals_only=True)[-1] ** 0.5
    np.testing.assert_allclose(map.monotonicity, (mu, ell), rtol=1e-11, atol=1e-12)


def test_shapes_on_a_grid_are_named():
    W = torch.zeros(9, 2, 2, dtype=torch.complex128)
    assert StateMap(W, grid=Grid((3, 4))).blocks == (2,)
    for grid in (Grid(), Grid((3, 3)), Grid((4, 3)), Grid((2, 2))):
        with pytest.raises(ShapeError):
            StateMap(W, grid=grid)
    with pytest.raises(ShapeError):
        StateMap(torch.zeros(2, 2), grid=Grid((1, 1)))


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1.0])
def test_remainder_of_what_lives_at_one_frequency(size):
    """A constant kernel acts on the mean only: all of the remainder is at frequency 0."""
    K = (torch.randn(C, C) * torch.ones(C, C).triu())[:, :, None, None].expand(C, C, 3, 4) * size
    map = StateMap(matrices(K), (1,) * C, grid=Grid((3, 4)))
    exact = np.linalg.norm(circulant(K).numpy(), 2)
    assert exact * (1.0 - 1e-12) <= map.remainder <= 2.3 * exact


def test_blocks_are_found_in_the_frequencies():
    K = torch.zeros(4, 4, 3, 3)
    K[1, 0, 2, 1] = K[3, 2, 0, 2] = 1.0
    assert StateMap(matrices(K), grid=Grid((3, 3))).blocks == (1, 2, 1)
    K[2, 3, 1, 1] = 1.0
    assert StateMap(matrices(K), grid=Grid((3, 3))).blocks == (4,)


@pytest.mark.parametrize("image", IMAGES)
def test_comparison_bounds_every_channel_of_a_convolution(image):
    """|W| is the largest over the frequencies, |z| the norm of a channel: checked on pixels, against an exact equilibrium."""
    pixels = image[0] * image[1]
    g = torch.Generator().manual_seed(5)
    # With few channels the norms over the frequencies are small enough for the radius of |W| to be below one.
    for K in (conv_case("triangular", image)[0], 0.15 * torch.randn(C, C, *image, generator=g) / pixels):
        W, map = circulant(K), StateMap(matrices(K), grid=Grid(image))
        size = torch.stack([torch.linalg.matrix_norm(circulant(K[i : i + 1, j : j + 1]), 2)
                            for i in range(C) for j in range(C)]).reshape(C, C)  # fmt: skip
        N = map.comparison
        assert N is not None
        np.testing.assert_allclose((N @ (torch.eye(C) - size)).numpy(), np.eye(C), atol=1e-10)
        u, exact = torch.randn(6, C * pixels, generator=g), torch.zeros(6, C * pixels)
        for _ in range(300):
            exact = torch.tanh(exact @ W.mT + u)
        z = exact + torch.randn(6, C * pixels, generator=g)
        s = torch.tanh(z @ W.mT + u)

        def channels(v):
            return v.reshape(len(v), C, pixels).norm(dim=2)

        assert bool((channels(s - exact) <= channels(z - s) @ size.mT @ N.mT + 1e-12).all())


def test_comparison_of_a_convolution_whose_sum_of_frequencies_is_too_large_is_none():
    K = torch.zeros(1, 1, 2, 2)
    K[0, 0, 0, 1] = -1.0  # |K̂| = 1 at every frequency
    assert StateMap(matrices(K), grid=Grid((2, 2))).comparison is None
    assert StateMap(0.99 * matrices(K), grid=Grid((2, 2))).comparison is not None
