"""Conditions (3), (4), (10) against their definitions in numpy; the strict multipliers against Cholesky."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear
from plain import circulant, matrices
from torch import nn

import lipconvert as lc
from lipconvert import DAE, Activations, Grid, InvalidParameterError, ShapeError

KINDS = ["sll", "cpl", "aol", "sandwich", "mondeq", "g_mondeq"]
DELTAS = [1e-1, 1e-3, 1e-6]
Models = Callable[..., nn.Module]


def arrays(dae: DAE) -> list[np.ndarray]:
    return [t.numpy() for t in dae]


def X(dae: DAE, Lambda: np.ndarray | None = None) -> np.ndarray:
    W, _, _, own = arrays(dae)
    D = np.diag(own if Lambda is None else Lambda)
    return 2 * D - D @ W - W.T @ D


def H(dae: DAE, Lambda: np.ndarray | None = None, L: float | None = None) -> np.ndarray:
    _, U, G, own = arrays(dae)
    D = np.diag(own if Lambda is None else Lambda)
    L = dae.lipschitz if L is None else L
    return X(dae, Lambda) - G.T @ G / L - D @ U @ U.T @ D / L


def least(M: np.ndarray, Lambda: np.ndarray) -> float:
    # A generalised eigenproblem: no matrix square root of Λ is formed here.
    return float(scipy.linalg.eigh(M, np.diag(Lambda), eigvals_only=True)[0])


def generic(seed: int = 0, n: int = 6, **changes: Any) -> DAE:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    values: dict[str, Any] = {
        "W": normal(n, n),
        "U": normal(n, 3),
        "G": normal(2, n),
        "Lambda": torch.rand(n, generator=g) + 0.2,
        "lipschitz": 1.3,
    }
    return DAE(**values | changes)


@pytest.mark.parametrize("seed", range(5))
def test_X_and_H_are_what_they_are_called(seed: int) -> None:
    dae = generic(seed)
    other, L = torch.rand(6) + 0.5, 0.7
    # Sums of about ten products of O(1).
    close = {"rtol": 1e-13, "atol": 1e-13}
    np.testing.assert_allclose(lc.X_matrix(dae).numpy(), X(dae), **close)
    np.testing.assert_allclose(lc.X_matrix(dae, other).numpy(), X(dae, other.numpy()), **close)
    np.testing.assert_allclose(lc.H_matrix(dae).numpy(), H(dae), **close)
    np.testing.assert_allclose(lc.H_matrix(dae, other, L).numpy(), H(dae, other.numpy(), L), **close)
    # (0.7)
    _, U, G, Lambda = arrays(dae)
    square = G.T @ G + np.diag(Lambda) @ U @ U.T @ np.diag(Lambda)
    np.testing.assert_allclose(lc.X_matrix(dae).numpy(), lc.H_matrix(dae).numpy() + square / 1.3, **close)


def test_frequencies_go_through_the_same_lines() -> None:
    """A circulant DAE: its dense H is block-diagonalised by the DFT into the H of each frequency."""
    c, size = 2, 4
    kernels = {"W": torch.randn(size, c, c), "U": torch.randn(size, c, 3), "G": torch.randn(size, 2, c)}
    per_channel = torch.rand(c) + 0.3

    def dense(kernel: torch.Tensor) -> torch.Tensor:
        # Block (i, j) of a block circulant matrix is the tap at (i − j) mod size.
        rows = [torch.cat([kernel[(i - j) % size] for j in range(size)], 1) for i in range(size)]
        return torch.cat(rows)

    flat = DAE(*(dense(kernels[k]) for k in ("W", "U", "G")), per_channel.repeat(size))
    spectra = [torch.fft.fft(kernels[k], dim=0) for k in ("W", "U", "G")]
    frequencies = DAE(*spectra, per_channel, grid=Grid((size, 1)))  # one column: its half spectrum is the whole one
    spectrum = np.sort(np.linalg.eigvalsh(H(flat)))
    batch = torch.linalg.eigvalsh(lc.H_matrix(frequencies)).flatten().sort().values
    np.testing.assert_allclose(batch.numpy(), spectrum, rtol=1e-12, atol=1e-12)
    assert lc.check(frequencies).margin_10 == pytest.approx(lc.check(flat).margin_10, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_check_reports_least_eigenvalues(seed: int) -> None:
    dae = generic(seed)
    Lambda, L = torch.rand(6) + 0.5, 2.1
    for given in ((None, None), (Lambda, L)):
        report = lc.check(dae, *given)
        own = dae.Lambda if given[0] is None else given[0]
        constant = dae.lipschitz if given[1] is None else L
        assert report.lipschitz == constant
        assert report.margin_3 == pytest.approx(least(X(dae, own.numpy()), own.numpy()), rel=1e-12, abs=1e-12)
        assert report.margin_10 == pytest.approx(
            least(H(dae, own.numpy(), constant), own.numpy()), rel=1e-12, abs=1e-12
        )
        assert report.least_eigenvalue == pytest.approx(
            float(np.linalg.eigvalsh(H(dae, own.numpy(), constant))[0]), rel=1e-12, abs=1e-12
        )
        assert report.mu == max(report.margin_3 / 2.0, 0.0)
        assert 0.0 < report.tolerance < 1e-11


def test_margins_do_not_see_the_scaling_of_the_states() -> None:
    dae = generic(3)
    before = lc.check(dae)
    after = lc.check(lc.gauge(dae, torch.logspace(-4, 4, 6)))
    assert after.margin_3 == pytest.approx(before.margin_3, rel=1e-12)
    assert after.margin_10 == pytest.approx(before.margin_10, rel=1e-12)
    # The matrix itself does see it.
    assert after.least_eigenvalue != pytest.approx(before.least_eigenvalue, rel=1e-2)


def flags(dae: DAE) -> tuple[bool, bool, bool, bool]:
    report = lc.check(dae)
    return report.condition_3, report.condition_4, report.condition_10, report.well_posed


def test_verdicts() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    Lambda = torch.ones(1)
    # z = relu(x/2), y = z/2 is 1/4-Lipschitz: strict at L = 1.
    assert flags(DAE(zero, one / 2, one / 2, Lambda)) == (True, True, True, True)
    # y = relu(x): H = 0 exactly.
    assert flags(DAE(zero, one, one, Lambda)) == (True, False, True, True)
    # y = 2 relu(x) is not 1-Lipschitz for any Λ, and explicit all the same.
    assert flags(DAE(zero, one, 2 * one, Lambda)) == (True, False, False, True)
    # W = 1, U = G = 0: H = 0, but z = relu(z) has infinitely many solutions.
    assert flags(DAE(one, zero, zero, Lambda)) == (False, False, True, False)
    # W = 2 is not monotone.
    assert flags(DAE(2 * one, zero, zero, Lambda)) == (False, False, False, False)
    # Strictly triangular with a large entry: (3) fails for Λ = I, and z is explicit.
    report = lc.check(DAE(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.ones(2, 1), torch.ones(1, 2), torch.ones(2)))
    assert not report.condition_3
    assert report.contracting
    assert report.well_posed
    assert report.mu == 0.0


@pytest.mark.parametrize("radius", [0.5, 0.999, 1.001, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_contracting_is_the_spectral_radius_of_the_entrywise_sizes(radius: float, seed: int) -> None:
    W = generic(seed).W
    W = W * radius / float(np.abs(np.linalg.eigvals(np.abs(W.numpy()))).max())
    assert lc.check(generic(seed, W=W)).contracting == (radius < 1.0)


def test_check_refuses_what_is_not_a_multiplier_or_a_constant() -> None:
    dae = generic()
    for Lambda in (torch.zeros(6), torch.tensor([1.0] * 5 + [-1.0]), torch.full((6,), float("nan"))):
        with pytest.raises(InvalidParameterError):
            lc.check(dae, Lambda)
    for L in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidParameterError):
            lc.check(dae, lipschitz=L)
    for delta in (0.0, -1e-3, float("nan")):
        with pytest.raises(InvalidParameterError):
            lc.strict_multiplier(dae, delta)


@pytest.mark.parametrize("size", [1, 5])
def test_check_refuses_a_Lambda_of_the_wrong_size(size: int) -> None:
    with pytest.raises(ShapeError):
        lc.check(generic(), torch.ones(size))


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("kind", KINDS)
def test_H_is_singular_or_positive_at_L_and_strict_just_above(kind: str, size: int, random_model: Models) -> None:
    for seed in range(3):
        dae = lc.to_dae(random_model(kind, size, seed, nn.Tanh()))
        at_L = lc.check(dae)
        assert at_L.condition_10
        if kind in ("sll", "cpl"):
            # The block of x_0 is zero at L, whatever the weights.
            assert not at_L.condition_4
            assert abs(at_L.margin_10) <= at_L.tolerance
        for delta in DELTAS:
            L = dae.lipschitz * (1.0 + delta)
            Lambda = lc.strict_multiplier(dae, delta).numpy()
            assert Lambda.shape == (dae.states,)
            assert (Lambda > 0.0).all()
            root = Lambda**-0.5
            np.linalg.cholesky(root[:, None] * H(dae, Lambda, L) * root)  # raises unless positive definite
            # Not by a hair: about δ/N for chains (N = 6 here, so δ/60 is safe), δ times the monotonicity otherwise.
            margin = least(H(dae, Lambda, L), Lambda)
            assert margin > delta / 60.0
            assert lc.check(dae, torch.from_numpy(Lambda), L).margin_10 == pytest.approx(margin, abs=1e-12, rel=1e-9)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("N", range(1, 7))
@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
def test_strict_multiplier_of_residual_networks(kind: type[Any], N: int, delta: float) -> None:
    """Λ_δ and its H from the closed form of FORMULAS 3; d = 2, so N > 2 is deeper than wide."""
    torch.manual_seed(N)
    d, h = 2, 3
    layers = [kind(d, h) for _ in range(N)]
    alpha, beta = 0.7, 2.0
    dae = lc.scale(lc.to_dae(nn.Sequential(*layers)), alpha, beta)
    W = [layer.weight.detach().numpy().T for layer in layers]
    T = [layer.T().detach().numpy() for layer in layers]
    weight = [(1 + delta) ** (1 - 2 * (k + 1) / (N + 1)) for k in range(N)]
    expected = (
        beta / alpha * np.concatenate([np.full(d, 1 + delta)] + [2 * w / t for w, t in zip(weight, T, strict=True)])
    )
    Lambda = lc.strict_multiplier(dae, delta).numpy()
    np.testing.assert_allclose(Lambda, expected, rtol=1e-14)
    n = d + N * h
    Gam = [np.hstack([np.eye(d), np.zeros((d, N * h))])]
    for k in range(N):
        step = np.zeros((d, n))
        step[:, d + k * h : d + (k + 1) * h] = 2 * W[k] / T[k]
        Gam.append(Gam[-1] - step)
    closed = (1 + delta - weight[0]) * Gam[0].T @ Gam[0] + (weight[-1] - 1 / (1 + delta)) * Gam[N].T @ Gam[N]
    for k in range(1, N):
        closed += (weight[k - 1] - weight[k]) * Gam[k].T @ Gam[k]
    for k in range(N):
        rows = slice(d + k * h, d + (k + 1) * h)
        closed[rows, rows] += 4 * weight[k] * (np.diag(1 / T[k]) - (W[k] / T[k]).T @ (W[k] / T[k]))
    closed *= beta / alpha
    actual = H(dae, Lambda, alpha * beta * (1 + delta))
    np.testing.assert_allclose(actual, closed, rtol=0.0, atol=1e-13 * max(1.0, float(Lambda.max())))
    # 0.168 δ is what random nets of up to five layers were measured at; here up to six.
    assert least(actual, Lambda) > 0.1 * delta
    if kind is CPLLinear and d < N:
        # Deeper than wide, X is singular at L, so a larger L alone cannot make H definite.
        assert not lc.check(dae).condition_3
        assert not lc.check(dae, lipschitz=dae.lipschitz * 1.1).condition_4


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("N", range(1, 7))
def test_strict_multiplier_of_sandwich_networks(N: int, delta: float) -> None:
    torch.manual_seed(N)
    layers = [SandwichLinear(3, 3, activation=nn.ReLU() if k < N else None) for k in range(N + 1)]
    for layer in layers[:-1]:
        nn.init.normal_(layer.psi, std=0.5)
    dae = lc.to_dae(nn.Sequential(*layers))
    Phi = [np.exp(layer.psi.detach().numpy()) for layer in layers[:-1]]
    weight = [(1 + delta) ** (1 - 2 * (k + 1) / (N + 1)) for k in range(N)]
    Lambda = lc.strict_multiplier(dae, delta).numpy()
    np.testing.assert_allclose(Lambda, np.concatenate([w * p**2 for w, p in zip(weight, Phi, strict=True)]), rtol=1e-14)
    A, B = zip(*[[t.detach().numpy() for t in layer.AB()] for layer in layers], strict=True)
    u = np.random.default_rng(N).standard_normal(3 * N)
    part = [p * u[3 * k : 3 * k + 3] for k, p in enumerate(Phi)]  # Φ_k u_k
    x = [2**0.5 * A[k].T @ part[k] for k in range(N)]  # x_{k+1}
    total = 2 * weight[0] * (1 + delta - weight[0]) / (1 + delta) * np.sum((B[0].T @ part[0]) ** 2)
    for k in range(1, N):
        gap = x[k - 1] - 2**0.5 * B[k].T @ part[k]
        total += (weight[k - 1] - weight[k]) * np.sum(x[k - 1] ** 2) + weight[k] * np.sum(gap**2)
    total += weight[-1] * np.sum(x[-1] ** 2) - np.sum((B[N] @ x[-1]) ** 2) / (1 + delta)
    assert u @ H(dae, Lambda, 1 + delta) @ u == pytest.approx(total, rel=1e-12, abs=1e-13)
    assert least(H(dae, Lambda, 1 + delta), Lambda) > 0.05 * delta


@pytest.mark.parametrize("kind", ["mondeq", "g_mondeq"])
def test_equilibrium_models_keep_Lambda(kind: str, random_model: Models) -> None:
    dae = lc.to_dae(random_model(kind, 5, 0))
    np.testing.assert_allclose(lc.strict_multiplier(dae, 0.1).numpy(), dae.Lambda.numpy(), rtol=1e-15)
    # H grows by δ/(1+δ) (G'G + ΛUU'Λ)/L.
    _, U, G, Lambda = arrays(dae)
    grown = (G.T @ G + np.diag(Lambda) @ U @ U.T @ np.diag(Lambda)) * 0.1 / 1.1 / dae.lipschitz
    np.testing.assert_allclose(H(dae, L=dae.lipschitz * 1.1), H(dae) + grown, atol=1e-13)


@pytest.mark.parametrize("kind", ["sll", "cpl", "aol", "sandwich"])
def test_strict_with_linear_layers_around(kind: str, random_model: Models) -> None:
    """A head and a padding of norm 1 are eliminated or absorbed; the multiplier of the blocks left is strict too."""
    inner = lc.to_dae(random_model(kind, 4, 1))
    pad = lc.affine(torch.eye(inner.inputs)[:, :1], None, 1.0)
    head = lc.affine(torch.eye(inner.outputs)[:1], torch.ones(1), 1.0)
    dae = lc.eliminate(lc.compose(pad, inner, head))
    for delta in DELTAS:
        Lambda = lc.strict_multiplier(dae, delta).numpy()
        assert least(H(dae, Lambda, dae.lipschitz * (1 + delta)), Lambda) > delta / 60.0


def test_blocks_decide_the_weights() -> None:
    dae = generic(n=6, activations=Activations.of([("identity", 1), ("relu", 5)]), blocks=(1, 2, 3))
    delta = 0.21
    # States that all read each other are one layer, whatever the blocks say.
    assert torch.equal(lc.strict_multiplier(dae, delta), dae.Lambda)
    dae = replace(dae, W=torch.block_diag(*(torch.ones(k, k) for k in dae.blocks)).mT * dae.W + dae.W.tril(-1))
    ratio = (lc.strict_multiplier(dae, delta) / dae.Lambda).numpy()
    # N = 2: 1.21^{1 − 2/3}, 1.21^{1 − 4/3}.
    np.testing.assert_allclose(ratio, [1.21] + [1.21 ** (1 / 3)] * 2 + [1.21 ** (-1 / 3)] * 3, rtol=1e-14)


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 4), (4, 3)]


def pair(
    image: tuple[int, int], seed: int = 0, n: int = 4, triangular: bool = False, **changes: Any
) -> tuple[DAE, DAE]:
    """A generic DAE on a grid and the same on flattened images."""
    g, pixels = torch.Generator().manual_seed(seed), image[0] * image[1]
    K = [torch.randn(*s, *image, generator=g) / pixels**0.5 for s in ((n, n), (n, 3), (2, n))]
    if triangular:
        K[0] = K[0] * torch.ones(n, n).tril(-1)[:, :, None, None]
    Lambda = torch.rand(n, generator=g) + 0.2
    on_grid = DAE(*map(matrices, K), Lambda, lipschitz=1.3, grid=Grid(image), **changes)
    flat = DAE(*map(circulant, K), Lambda.repeat_interleave(pixels), lipschitz=1.3)
    return on_grid, flat


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("seed", range(3))
def test_check_on_a_grid_is_that_of_the_dense_form(image: tuple[int, int], seed: int) -> None:
    on_grid, flat = pair(image, seed, triangular=seed == 2)
    other, L = torch.rand(4) + 0.5, 2.1
    for Lambda, constant in ((on_grid.Lambda, 1.3), (other, L)):
        report = lc.check(on_grid, Lambda, constant)
        wide = Lambda.repeat_interleave(image[0] * image[1]).numpy()
        close = {"rel": 1e-12, "abs": 1e-12}
        assert report.margin_3 == pytest.approx(least(X(flat, wide), wide), **close)
        assert report.margin_10 == pytest.approx(least(H(flat, wide, constant), wide), **close)
        assert report.least_eigenvalue == pytest.approx(float(np.linalg.eigvalsh(H(flat, wide, constant))[0]), **close)
        assert report.lipschitz == constant
        assert 0.0 < report.tolerance < 1e-11
    assert lc.check(on_grid).contracting == (seed == 2)


@pytest.mark.parametrize("image", IMAGES)
def test_H_on_a_grid_is_the_dense_one_block_diagonalised(image: tuple[int, int]) -> None:
    """The dense spectrum is that of the frequencies, each counted with its conjugate."""
    on_grid, flat = pair(image)
    h, w = image
    twice = torch.tensor([1 if m == 0 or 2 * m == w else 2 for _ in range(h) for m in range(w // 2 + 1)])
    for matrix, dense in ((lc.H_matrix(on_grid), H(flat)), (lc.X_matrix(on_grid), X(flat))):
        spectrum = torch.linalg.eigvalsh(matrix).repeat_interleave(twice, 0).flatten().sort().values
        np.testing.assert_allclose(spectrum.numpy(), np.linalg.eigvalsh(dense), rtol=1e-12, atol=1e-12)


def test_check_on_a_grid_takes_one_entry_a_channel() -> None:
    on_grid, _ = pair((2, 2))
    for Lambda in (torch.ones(16), torch.ones(4, 2, 2), torch.ones(1)):
        with pytest.raises(ShapeError):
            lc.check(on_grid, Lambda)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("image", [(1, 3), (3, 4)])
def test_strict_multiplier_of_a_chain_on_a_grid(image: tuple[int, int], delta: float) -> None:
    """Conv, ReLU, conv, ReLU, conv, each of norm 1: strict just above L, in the dense form too."""
    g, grid = torch.Generator().manual_seed(1), Grid(image)
    parts = []
    for _ in range(3):
        K = torch.randn(3, 3, *image, generator=g)
        K = K * (1.0 - 1e-14) / np.linalg.norm(circulant(K).numpy(), 2)
        parts += [lc.affine(matrices(K), None, 1.0, grid=grid), lc.elementwise("relu", 3, grid=grid)]
    dae = lc.eliminate(lc.compose(*parts[:-1]))
    assert dae.blocks == (3, 3)
    Lambda = lc.strict_multiplier(dae, delta)
    ratio = (Lambda / dae.Lambda).numpy()
    np.testing.assert_allclose(ratio, np.repeat([(1 + delta) ** (1 / 3), (1 + delta) ** (-1 / 3)], 3), rtol=1e-14)
    flat = lc.densify(dae)  # entry by entry in test_compose.py
    wide = Lambda.repeat_interleave(grid.pixels)
    margin = least(H(flat, wide.numpy(), 1 + delta), wide.numpy())
    assert margin > delta / 60.0
    assert lc.check(dae, Lambda, 1 + delta).margin_10 == pytest.approx(margin, abs=1e-12, rel=1e-9)


def test_blocks_that_read_each_other_at_one_frequency_share_a_weight() -> None:
    on_grid, _ = pair((3, 4), triangular=True, blocks=(1, 1, 2))
    assert len(set((lc.strict_multiplier(on_grid, 0.1) / on_grid.Lambda).tolist())) > 1
    W = on_grid.W.clone()
    W[5, 0, 3] = 1e-3
    W[2, 1, 2] = 1e-3j
    merged = lc.strict_multiplier(replace(on_grid, W=W), 0.1)
    np.testing.assert_allclose((merged / on_grid.Lambda).numpy(), 1.0, rtol=1e-14)
