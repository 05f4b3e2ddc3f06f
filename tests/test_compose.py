"""The algebra of DAEs: H of every result from its written-out identity, the function by plain evaluation.

On a grid everything is compared through circulant matrices that are built here index by index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipconvert_plugins.sll import SLLConv2d, SLLLinear
from plain import circulant, correlate
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc
from lipconvert import (
    DAE,
    Activations,
    Grid,
    InvalidParameterError,
    NotFiniteError,
    NotPSDError,
    ShapeError,
    UnsupportedActivationError,
)

Evaluate = Callable[[DAE, Tensor], Tensor]
EXPLICIT = ["sll", "cpl", "aol", "sandwich"]


def H(dae: DAE) -> Tensor:
    """2Λ − ΛW − W'Λ − G'G/L − ΛUU'Λ/L, written out."""
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    return 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    # Products of at most 40 terms of size O(1): a few dozen units round-off, relative to the largest entry.
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def carried(dae: DAE) -> Tensor:
    assert dae.V is not None
    assert len(dae.V) <= dae.states  # V of an LBEN is square
    return 2.0 * dae.V.T @ dae.V


def generic(n: int, p: int, q: int, **changes: Any) -> DAE:
    """No certificate, no structure: enough for an identity."""
    names = ["identity", "relu", "leaky_relu(0.2)"]
    values: dict[str, Any] = {
        "W": torch.randn(n, n),
        "U": torch.randn(n, p),
        "G": torch.randn(q, n),
        "Lambda": torch.rand(n) + 0.2,
        "b_z": torch.randn(n),
        "b_y": torch.randn(q),
        "activations": Activations.of((names[i % 3], 1) for i in range(n)),
        "lipschitz": 1.7,
    }
    return DAE(**values | changes)


def triangular(n: int, p: int, q: int) -> DAE:
    return generic(n, p, q, W=torch.randn(n, n).tril(-1))


def contraction(rows: int, columns: int, norm: float = 1.0) -> Tensor:
    M = torch.randn(rows, columns)
    return M * norm / torch.linalg.matrix_norm(M, 2) * (1.0 - 1e-15)


# ---- scale, absorb, gauge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, 2.0), (5.0, 0.1), (7.0, 3.0)])
def test_scale(alpha: float, beta: float, evaluate: Evaluate) -> None:
    dae = triangular(7, 3, 4)
    scaled = lc.scale(dae, alpha, beta)
    x = torch.randn(20, 3)
    close(evaluate(scaled, x), beta * evaluate(dae, alpha * x))
    close(H(scaled), beta / alpha * H(dae))  # L1
    assert scaled.lipschitz == pytest.approx(alpha * beta * dae.lipschitz, rel=1e-15)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, float("nan"))])
def test_scale_must_be_positive(alpha: float, beta: float) -> None:
    with pytest.raises(InvalidParameterError):
        lc.scale(generic(2, 2, 2), alpha, beta)


@pytest.mark.parametrize(("inner", "outer"), [(2, 5), (6, 1), (3, 4)])
def test_absorb(inner: int, outer: int, evaluate: Evaluate) -> None:
    dae = triangular(7, 3, 4)
    P, C = contraction(3, inner), contraction(outer, 4, 0.9)
    D, L = torch.diag(dae.Lambda), dae.lipschitz
    from_P = D @ dae.U @ (torch.eye(3) - P @ P.T) @ dae.U.T @ D / L
    from_C = dae.G.T @ (torch.eye(4) - C.T @ C) @ dae.G / L
    x = torch.randn(20, inner)
    both, before, behind = lc.absorb(dae, P, C), lc.absorb(dae, P), lc.absorb(dae, C=C)
    close(evaluate(both, x), evaluate(dae, x @ P.T) @ C.T)
    close(evaluate(before, x), evaluate(dae, x @ P.T))
    close(evaluate(behind, torch.ones(2, 3)), evaluate(dae, torch.ones(2, 3)) @ C.T)
    close(H(both), H(dae) + from_P + from_C)  # L2
    close(H(before), H(dae) + from_P)
    close(H(behind), H(dae) + from_C)
    for result in (both, before, behind):
        assert result.lipschitz == dae.lipschitz
        assert torch.equal(result.Lambda, dae.Lambda)


@pytest.mark.parametrize("side", ["P", "C"])
def test_absorb_refuses_expansions_and_misfits(side: str) -> None:
    dae = generic(5, 3, 3)
    with pytest.raises(NotPSDError) as caught:
        lc.absorb(dae, **{side: contraction(3, 3, 1.001)})
    # The least eigenvalue of I − PP' is 1 − 1.001².
    assert caught.value.least_eigenvalue == pytest.approx(1.0 - 1.001**2, rel=1e-9)
    with pytest.raises(ShapeError):
        lc.absorb(dae, **{side: contraction(4, 4)})


@pytest.mark.parametrize("default", [True, False])
def test_gauge(default: bool, evaluate: Evaluate) -> None:
    dae = triangular(7, 3, 4)
    D = dae.Lambda.sqrt() if default else torch.logspace(-3, 3, 7)
    result = lc.gauge(dae, None if default else D)
    inverse = torch.diag(1.0 / D)
    x = torch.randn(20, 3)
    close(evaluate(result, x), evaluate(dae, x), 1e-11 if not default else 1e-13)  # D spans six decades
    close(H(result), inverse @ H(dae) @ inverse)  # L4
    assert result.lipschitz == dae.lipschitz
    if default:
        close(result.Lambda, torch.ones(7), 1e-15)


def test_gauge_needs_homogeneous_activations_and_positive_D() -> None:
    dae = generic(4, 2, 2)
    with pytest.raises(UnsupportedActivationError, match="tanh"):
        lc.gauge(generic(4, 2, 2, activations=Activations.of([("relu", 3), ("tanh", 1)])))
    for D in (torch.ones(3), torch.tensor([1.0, 1.0, 0.0, 1.0]), -torch.ones(4), torch.full((4,), float("nan"))):
        with pytest.raises(InvalidParameterError):
            lc.gauge(dae, D)


@pytest.mark.parametrize("kind", EXPLICIT)
def test_closed_form_rows_follow_every_operation(kind: str, random_model: Callable[..., nn.Module]) -> None:
    dae = lc.to_dae(random_model(kind, 3, 1))
    close(carried(dae), H(dae))
    scaled = lc.scale(dae, 0.7, 2.3)
    close(carried(scaled), H(scaled))
    absorbed = lc.absorb(scaled, contraction(dae.inputs, dae.inputs + 2), contraction(1, dae.outputs, 0.5))
    close(carried(absorbed), H(absorbed))
    turned = lc.gauge(absorbed)
    close(carried(turned), H(turned))
    assert lc.scale(generic(2, 2, 2)).V is None
    assert lc.absorb(generic(2, 2, 2), torch.eye(2)).V is None


# ---- elementwise, affine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh", "identity", "softplus(3.0)"])
def test_elementwise(name: str, evaluate: Evaluate) -> None:
    dae = lc.elementwise(name, 5)
    x = torch.randn(9, 5)
    expected = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda v: v, "softplus(3.0)": nn.Softplus(3.0)}
    close(evaluate(dae, x), expected[name](x), 1e-15)
    assert dae.lipschitz == 1.0
    assert torch.equal(H(dae), torch.zeros(5, 5))
    assert torch.equal(carried(dae), torch.zeros(5, 5))


@pytest.mark.parametrize(("q", "p"), [(1, 1), (3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("slack", [None, 1.0, 1.8])
def test_affine(q: int, p: int, slack: float | None, evaluate: Evaluate) -> None:
    M, b = torch.randn(q, p), torch.randn(q)
    norm = float(np.linalg.norm(M.numpy(), 2))
    dae = lc.affine(M, b) if slack is None else lc.affine(M, b, norm * slack * (1.0 + 1e-15))
    L = dae.lipschitz
    x = torch.randn(9, p)
    close(evaluate(dae, x), x @ M.T + b, 1e-15)
    close(H(dae), (torch.eye(q) - M @ M.T / L**2) / L)
    close(carried(dae), H(dae))
    if slack is None:
        # An upper bound, and no looser than round-off.
        assert norm <= L <= norm * (1.0 + 1e-13)


def test_affine_edge_cases(evaluate: Evaluate) -> None:
    zero = lc.affine(torch.zeros(2, 3))
    assert zero.lipschitz == 1.0
    close(evaluate(zero, torch.randn(4, 3)), torch.zeros(4, 2))
    M = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    with pytest.raises(NotPSDError) as caught:
        lc.affine(M, lipschitz=2.0, name="head")
    # I − MM'/L² has least eigenvalue 1 − 9/4.
    assert caught.value.least_eigenvalue == pytest.approx(-1.25, rel=1e-12)
    assert "'head'" in str(caught.value)
    single = lc.affine(M.float())
    assert single.U.dtype == torch.float64


def test_affine_refuses_nan_by_name() -> None:
    with pytest.raises(NotFiniteError):
        lc.affine(torch.full((2, 2), float("nan")))


# ---- compose --------------------------------------------------------------------------------------------------------


def test_compose_is_the_cascade(evaluate: Evaluate) -> None:
    f, g = triangular(4, 3, 2), triangular(5, 2, 6)
    c = lc.compose(f, g)
    x = torch.randn(20, 3)
    close(evaluate(c, x), evaluate(g, evaluate(f, x)))
    zero = torch.zeros
    # L3, block by block.
    assert torch.equal(c.W, torch.cat([torch.cat([f.W, zero(4, 5)], 1), torch.cat([g.U @ f.G, g.W], 1)]))
    assert torch.equal(c.U, torch.cat([f.U, zero(5, 3)]))
    assert torch.equal(c.G, torch.cat([zero(6, 4), g.G], 1))
    close(c.Lambda, torch.cat([g.lipschitz * f.Lambda, g.Lambda / f.lipschitz]), 1e-15)
    close(c.bias_z, torch.cat([f.bias_z, g.bias_z + g.U @ f.bias_y]), 1e-15)
    assert torch.equal(c.bias_y, g.bias_y)
    assert c.lipschitz == f.lipschitz * g.lipschitz
    assert c.blocks == f.blocks + g.blocks
    assert c.sigma == f.sigma + g.sigma
    # (10) is inherited because H of the cascade is the two H's and a square.
    link = torch.cat([g.lipschitz * f.G, -(torch.diag(g.Lambda) @ g.U).T], 1) / c.lipschitz**0.5
    close(H(c), torch.block_diag(g.lipschitz * H(f), H(g) / f.lipschitz) + link.T @ link)


def test_compose_of_one_and_of_many(evaluate: Evaluate) -> None:
    f, g, h = triangular(4, 3, 2), triangular(5, 2, 6), triangular(3, 6, 1)
    assert lc.compose(f) is f
    left, at_once, right = lc.compose(lc.compose(f, g), h), lc.compose(f, g, h), lc.compose(f, lc.compose(g, h))
    for other in (at_once, right):
        for a, b in zip(left, other, strict=True):
            close(a, b, 1e-14)
    x = torch.randn(8, 3)
    close(evaluate(at_once, x), evaluate(h, evaluate(g, evaluate(f, x))))


def test_compose_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError) as caught:
        lc.compose(generic(4, 3, 2, name="first"), generic(4, 3, 2, name="second"))
    assert "'first'" in str(caught.value)
    assert "'second'" in str(caught.value)
    with pytest.raises(InvalidParameterError):
        lc.compose()


def test_rows_of_a_cascade_without_closed_form_are_dropped() -> None:
    with_rows, without = lc.elementwise("relu", 2), generic(3, 2, 2)
    assert lc.compose(with_rows, without).V is None
    assert lc.compose(without, with_rows).V is None


# ---- eliminate ------------------------------------------------------------------------------------------------------


def identity_blocks(dae: DAE) -> int:
    start, found = 0, 0
    for size in dae.blocks:
        found += all(a.name == "identity" for a, _ in dae.sigma[start : start + size])
        start += size
    return found


def test_a_linear_chain_keeps_one_block(evaluate: Evaluate) -> None:
    M = [torch.randn(4, 3), torch.randn(2, 4), torch.randn(5, 2)]
    b = [torch.randn(len(m)) for m in M]
    chain = lc.compose(*[lc.affine(m, c) for m, c in zip(M, b, strict=True)])
    thin = lc.eliminate(chain)
    assert len(thin.blocks) == 1
    assert thin.lipschitz == chain.lipschitz
    x = torch.randn(7, 3)
    close(evaluate(thin, x), ((x @ M[0].T + b[0]) @ M[1].T + b[1]) @ M[2].T + b[2])
    close(carried(thin), H(thin))


def test_linear_rows_around_an_activation_all_go(evaluate: Evaluate) -> None:
    M, N = contraction(4, 3), contraction(2, 4)
    chain = lc.compose(lc.affine(M, torch.ones(4), 1.0), lc.elementwise("tanh", 4), lc.affine(N, torch.ones(2), 1.0))
    thin = lc.eliminate(chain)
    assert thin.blocks == (4,)
    assert identity_blocks(thin) == 0
    x = torch.randn(7, 3)
    close(evaluate(thin, x), torch.tanh(x @ M.T + 1.0) @ N.T + 1.0)
    close(carried(thin), H(thin))


def test_a_block_that_feeds_through_is_kept(evaluate: Evaluate) -> None:
    layer = SLLLinear(3, 5)
    dae = lc.to_dae(layer)
    kept = lc.eliminate(dae)
    assert kept.blocks == (3, 5)
    assert torch.equal(kept.W, dae.W)
    # Two layers: the second identity block goes, the first carries x to y.
    two = lc.eliminate(lc.compose(dae, dae))
    assert two.blocks == (3, 5, 5)
    assert two.sigma == Activations.of([("identity", 3), ("relu", 10)])
    x = torch.randn(6, 3)
    close(evaluate(two, x), layer(layer(x)).detach())


def test_rows_that_read_each_other_are_kept() -> None:
    loop = generic(
        4,
        2,
        2,
        activations=Activations.of([("identity", 2), ("relu", 2)]),
        G=torch.cat([torch.zeros(2, 2), torch.randn(2, 2)], 1),
    )
    assert lc.eliminate(loop).blocks == (2, 2)
    free = generic(4, 2, 2, activations=loop.sigma, G=loop.G, W=loop.W * torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert lc.eliminate(free).blocks == (2,)


def test_a_single_block_is_kept() -> None:
    dae = lc.elementwise("identity", 3)
    assert lc.eliminate(dae) is dae


def test_elimination_in_an_implicit_network() -> None:
    """An identity block that both reads and drives an equilibrium: checked by substituting by hand."""
    sigma = Activations.of([("identity", 2), ("relu", 3)])
    W = 0.3 * torch.randn(5, 5)
    W[:2, :2] = 0.0
    G = torch.cat([torch.randn(2, 2), torch.randn(2, 3)], 1)
    U = torch.cat([torch.zeros(2, 4), torch.randn(3, 4)])
    dae = generic(5, 4, 2, W=W, U=U, G=G, activations=sigma)
    thin = lc.eliminate(dae)
    assert thin.states == 3
    x, z = torch.randn(4), torch.zeros(5)
    for _ in range(4000):  # a damped iteration; whether it converged is checked below
        v = W @ z + U @ x + dae.bias_z
        z = 0.9 * z + 0.1 * torch.cat([v[:2], v[2:].relu()])
    v = W @ z + U @ x + dae.bias_z
    close(z, torch.cat([v[:2], v[2:].relu()]))
    close(z[2:], (thin.W @ z[2:] + thin.U @ x + thin.bias_z).relu(), 1e-12)
    close(thin.G @ z[2:] + thin.bias_y, G @ z + dae.bias_y, 1e-12)


links = st.lists(
    st.sampled_from(["affine", "contraction", "relu", "tanh", "identity", "sll", "scale", "absorb"]),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(links, st.integers(0, 10**6))
def test_random_chains(evaluate: Evaluate, kinds: list[str], seed: int) -> None:
    """Function, L, closed-form rows and (10) of any mixture, thinned after each layer or only at the end."""
    torch.manual_seed(seed)
    width = p = int(torch.randint(1, 5, ()))
    x = y = torch.randn(6, p)
    parts: list[DAE] = []
    L = 1.0
    for kind in kinds:
        if kind in ("affine", "contraction"):
            M, b = torch.randn(int(torch.randint(1, 5, ())), width), torch.randn(1)
            M = M if kind == "affine" else contraction(*M.shape)
            b = b.expand(len(M))
            part = lc.affine(M, b, None if kind == "affine" else 1.0)
            y, width = y @ M.T + b, len(M)
        elif kind == "sll":
            layer = SLLLinear(width, 3, activation=nn.Tanh())
            nn.init.normal_(layer.bias)
            part, y = lc.to_dae(layer), layer(y).detach()
        elif kind == "scale":
            part, y = lc.scale(lc.elementwise("identity", width), 0.5, 3.0), 1.5 * y
        elif kind == "absorb":
            C = contraction(2, width, 0.8)
            part, y, width = lc.absorb(lc.elementwise("relu", width), C=C), y.relu() @ C.T, 2
        else:
            part = lc.elementwise(kind, width)
            y = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda v: v}[kind](y)
        L *= part.lipschitz
        parts.append(part)
    step_by_step = parts[0]
    for part in parts[1:]:
        step_by_step = lc.eliminate(lc.compose(step_by_step, part))
    full = lc.compose(*parts)
    scale = max(1.0, float(y.abs().max()), L)
    for dae in (full, lc.eliminate(full), lc.eliminate(step_by_step)):
        assert dae.lipschitz == pytest.approx(L, rel=1e-14)
        assert float((evaluate(dae, x) - y).abs().max()) <= 1e-12 * scale
        # In the gauge Λ = I the terms of H are at most about 2(1 + |W|): absolute round-off of V'V and of H.
        root = dae.Lambda.rsqrt()
        gauged = root[:, None] * H(dae) * root
        size = max(1.0, float((root[:, None] * (torch.diag(dae.Lambda) @ dae.W) * root).abs().max()) ** 2)
        assert float((root[:, None] * carried(dae) * root - gauged).abs().max()) <= 1e-12 * size
        assert float(torch.linalg.eigvalsh(gauged)[0]) >= -1e-12 * size
    thin = lc.eliminate(step_by_step)
    # Every identity block that is left carries x to y, and is needed: at most the first of the chain.
    assert identity_blocks(thin) <= 1
    if identity_blocks(thin) == 1 and len(thin.blocks) > 1:
        rows = slice(0, thin.blocks[0])
        assert bool((thin.G[:, rows] @ thin.U[rows] != 0).any())


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 2), (2, 4)]


def waves(image: tuple[int, ...]) -> Tensor:
    """exp(2πi ω·s) for the frequencies ω of rfft2 and the pixels s: (F, h, w)."""
    h, w = image
    rows = torch.exp(2j * torch.pi * torch.outer(torch.arange(h), torch.arange(h)) / h)
    columns = torch.exp(2j * torch.pi * torch.outer(torch.arange(w // 2 + 1), torch.arange(w)) / w)
    return torch.einsum("ka,mb->kmab", rows, columns).flatten(0, 1)


def matrices(K: Tensor) -> Tensor:
    """K̂(ω) = Σ_s K[s] exp(2πi ω·s), (F, q, p)."""
    return torch.einsum("ijab,fab->fij", K.to(torch.complex128), waves(K.shape[2:]))


def kernels(M: Tensor, image: tuple[int, ...], tolerance: float = 1e-12) -> Tensor:
    """The real kernels with these matrices, each frequency counted with its conjugate; fails if there are none."""
    h, w = image
    twice = torch.tensor([1.0 if m == 0 or 2 * m == w else 2.0 for _ in range(h) for m in range(w // 2 + 1)])
    K = torch.einsum("fij,fab,f->ijab", M, waves(image).conj(), twice.to(torch.complex128)).real / (h * w)
    close(torch.view_as_real(matrices(K)), torch.view_as_real(M), tolerance)
    return K


def expand(dae: DAE) -> DAE:
    """The same DAE on flattened images."""
    image, pixels = dae.grid.image, dae.grid.pixels
    W, U, G = (circulant(kernels(M, image)) for M in (dae.W, dae.U, dae.G))
    # a principal root of round-off is √u: so far may V be from symmetric (`lipconvert.psd_sqrt`)
    V = None if dae.V is None else circulant(kernels(dae.V, image, 1e-7))
    assert W is not None
    assert U is not None
    assert G is not None
    Lambda, b_z, b_y = (v.repeat_interleave(pixels) for v in (dae.Lambda, dae.bias_z, dae.bias_y))
    sigma = Activations.of((a, size * pixels) for a, size in dae.sigma)
    return DAE(W, U, G, Lambda, b_z, b_y, sigma, dae.lipschitz, V, tuple(size * pixels for size in dae.blocks))


def plane(b: Tensor) -> Tensor:
    return b[:, None, None]


def on_images(image: tuple[int, int], n: int = 5, p: int = 2, q: int = 3) -> tuple[DAE, dict[str, Tensor]]:
    """A generic explicit DAE and its kernels."""
    K = {
        "W": torch.randn(n, n, *image) * plane(torch.ones(n, n).tril(-1).flatten()).reshape(n, n, 1, 1),
        "U": torch.randn(n, p, *image),
        "G": torch.randn(q, n, *image),
        "V": torch.randn(4, n, *image),
    }
    dense = triangular(n, p, q)
    spectra = {name: matrices(kernel) for name, kernel in K.items()}
    return DAE(**{**vars(dense), **spectra, "grid": Grid(image)}), K


def certified(dae: DAE, tolerance: float = 1e-12) -> DAE:
    """The dense form, after a look at H: 2V'V densely and at every frequency, and PSD."""
    dense = expand(dae)
    size = max(1.0, float(H(dense).abs().max()), float((dense.Lambda[:, None] * dense.W).abs().max()))
    assert dense.V is not None
    close(2.0 * dense.V.T @ dense.V / size, H(dense) / size, tolerance)
    assert dae.V is not None
    assert dae.V.shape[-2] <= dae.states
    L, D = dae.lipschitz, np.diag(dae.Lambda.numpy())
    for W, U, G, V in zip(*(M.numpy() for M in (dae.W, dae.U, dae.G, dae.V)), strict=True):
        DW, DU = D @ W, D @ U
        at = 2 * D - DW - DW.conj().T - G.conj().T @ G / L - DU @ DU.conj().T / L
        np.testing.assert_allclose(2 * V.conj().T @ V / size, at / size, rtol=0.0, atol=tolerance)
    assert float(torch.linalg.eigvalsh(H(dense))[0]) >= -tolerance * size
    return dense


def same_on_images(evaluate: Evaluate, dae: DAE, x: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert dae.output_shape == tuple(expected.shape[1:])
    close(evaluate(expand(dae), x.flatten(1)), expected.flatten(1), tolerance)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("slack", [None, 1.0, 1.8])
def test_affine_on_a_grid(image: tuple[int, int], slack: float | None, evaluate: Evaluate) -> None:
    K, b, x = torch.randn(3, 2, *image), torch.randn(3), torch.randn(4, 2, *image)
    norm = float(np.linalg.norm(circulant(K).numpy(), 2))
    given = None if slack is None else norm * slack * (1.0 + 1e-14)
    dae = lc.affine(matrices(K), b, given, grid=Grid(image))
    same_on_images(evaluate, dae, x, correlate(x, K) + plane(b))
    dense, M, L = certified(dae), circulant(K), dae.lipschitz
    close(H(dense), (torch.eye(len(M)) - M @ M.T / L**2) / L)
    if slack is None:
        assert norm * (1.0 - 1e-14) <= L <= norm * (1.0 + 1e-13)
        with pytest.raises(NotPSDError):
            lc.affine(matrices(K), b, 0.99 * norm, grid=Grid(image))


@pytest.mark.parametrize("image", IMAGES)
def test_elementwise_and_max_min_on_a_grid(image: tuple[int, int], evaluate: Evaluate) -> None:
    x = torch.randn(4, 6, *image)
    tanh = lc.elementwise("tanh", 6, grid=Grid(image))
    same_on_images(evaluate, tanh, x, torch.tanh(x), 1e-13)
    pairs = lc.max_min(6, grid=Grid(image))
    a, b = x[:, :3], x[:, 3:]
    same_on_images(evaluate, pairs, x, torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1), 1e-13)
    for dae in (tanh, pairs):
        assert dae.lipschitz == 1.0
        dense = expand(dae)
        close(H(dense), torch.zeros_like(dense.W), 1e-14)
        assert dae.V is not None
        assert dae.V.shape == (*dae.grid.batch, 0, dae.states)


def test_max_min_densely(evaluate: Evaluate) -> None:
    dae, x = lc.max_min(6), torch.randn(9, 6)
    a, b = x[:, :3], x[:, 3:]
    expected = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)
    close(evaluate(dae, x), expected, 1e-15)
    close(H(dae), torch.zeros(9, 9), 1e-15)
    assert torch.equal(lc.MaxMin()(x), expected)
    # Between layers the rows of v go, and (10) is inherited.
    M, N = contraction(6, 4), contraction(2, 6)
    thin = lc.eliminate(lc.compose(lc.affine(M, None, 1.0), lc.max_min(6), lc.affine(N, None, 1.0)))
    y = torch.randn(5, 4)
    close(evaluate(thin, y), lc.MaxMin()(y @ M.T) @ N.T)
    close(carried(thin), H(thin))
    assert float(torch.linalg.eigvalsh(H(thin))[0]) >= -1e-14


@pytest.mark.parametrize("grid", [Grid(), Grid((2, 2))], ids=["dense", "grid"])
@pytest.mark.parametrize("size", [1, 5])
def test_max_min_needs_pairs(grid: Grid, size: int) -> None:
    with pytest.raises(ShapeError):
        lc.max_min(size, grid=grid)


@pytest.mark.parametrize("image", IMAGES)
def test_densify_entry_by_entry(image: tuple[int, int], evaluate: Evaluate) -> None:
    dae, K = on_images(image)
    dense, pixels = lc.densify(dae), image[0] * image[1]
    for field, kernel in K.items():
        M = getattr(dense, field)
        assert M.dtype == torch.float64
        close(M, circulant(kernel), 1e-14)
    for field in ("Lambda", "b_z", "b_y"):
        assert torch.equal(getattr(dense, field), getattr(dae, field).repeat_interleave(pixels))
    assert dense.sigma == Activations.of((a, size * pixels) for a, size in dae.sigma)
    assert dense.blocks == tuple(size * pixels for size in dae.blocks)
    assert (dense.grid, dense.lipschitz, dense.name) == (Grid(), dae.lipschitz, dae.name)
    assert lc.densify(dense) is dense
    x = torch.randn(3, 2, *image)
    z = torch.zeros(3, 5, *image)
    for i, (activation, _) in enumerate(dae.sigma):  # one channel after the other
        z[:, i] = activation((correlate(z, K["W"]) + correlate(x, K["U"]) + plane(dae.bias_z))[:, i])
    same_on_images(evaluate, dae, x, correlate(z, K["G"]) + plane(dae.bias_y))


def test_densify_refuses_too_many_states() -> None:
    dae = lc.elementwise("relu", 5, grid=Grid((32, 32)))
    with pytest.raises(ShapeError) as caught:
        lc.densify(dae)
    assert "5120" in str(caught.value)


def unshuffled(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, c, h, w) → (B, c·rows·columns, h/rows, w/columns), phase by phase."""
    phases = [x[..., a::rows, b::columns] for a in range(rows) for b in range(columns)]
    return torch.stack(phases, 2).flatten(1, 2)


@pytest.mark.parametrize(
    ("image", "rows", "columns"),
    [((2, 4), 1, 1), ((2, 4), 2, 2), ((6, 3), 3, 3), ((4, 6), 2, 3), ((3, 4), 1, 2), ((4, 3), 2, 1), ((2, 3), 2, 3)],
)
def test_coarsen(image: tuple[int, int], rows: int, columns: int) -> None:
    """Unshuffling the images permutes the rows and columns of the dense matrices, and nothing else."""
    dae, K = on_images(image)
    coarse = lc.coarsen(dae, rows, columns)
    assert coarse.grid == Grid((image[0] // rows, image[1] // columns))
    assert coarse.blocks == tuple(size * rows * columns for size in dae.blocks)

    def order(channels: int) -> Tensor:
        index = torch.arange(channels * image[0] * image[1]).reshape(1, channels, *image)
        if rows == columns:
            assert torch.equal(unshuffled(index, rows, columns), functional.pixel_unshuffle(index, rows))
        return unshuffled(index, rows, columns).flatten()

    dense, (states, inputs, outputs, V_rows) = expand(coarse), (order(size) for size in (5, 2, 3, 4))
    for field, left, right in (
        ("W", states, states),
        ("U", states, inputs),
        ("G", outputs, states),
        ("V", V_rows, states),
    ):
        close(getattr(dense, field), circulant(K[field])[left][:, right], 1e-14)
    pixels = image[0] * image[1]
    for field, index in (("Lambda", states), ("b_z", states), ("b_y", outputs)):
        assert torch.equal(getattr(dense, field), getattr(dae, field).repeat_interleave(pixels)[index])
    rows_of_sigma = [str(a) for a, size in dae.sigma for _ in range(size * pixels)]
    assert [str(a) for a, size in dense.sigma for _ in range(size)] == [rows_of_sigma[i] for i in states]


@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (1, 2), (8, 3), (2, 2)])
def test_coarsen_needs_factors_that_divide(rows: int, columns: int) -> None:
    dae = lc.elementwise("relu", 2, name="layer 3", grid=Grid((4, 3)))
    with pytest.raises(ShapeError) as caught:
        lc.coarsen(dae, rows, columns)
    assert "'layer 3'" in str(caught.value)
    with pytest.raises(ShapeError):
        lc.coarsen(lc.elementwise("relu", 2), 1, 1)


@pytest.mark.parametrize("image", IMAGES)
def test_scale_absorb_and_gauge_on_a_grid(image: tuple[int, int], evaluate: Evaluate) -> None:
    dae, _ = on_images(image)
    x = torch.randn(4, 2, *image)
    y = evaluate(expand(dae), x.flatten(1)).reshape(4, 3, *image)
    assert (lc.scale(dae, 0.3, 2.0).lipschitz, lc.gauge(dae).lipschitz) == (0.6 * dae.lipschitz, dae.lipschitz)
    same_on_images(evaluate, lc.scale(dae, 0.3, 2.0), x / 0.3, 2.0 * y)
    same_on_images(evaluate, lc.gauge(dae), x, y)
    close(H(expand(lc.scale(dae, 0.3, 2.0))), 2.0 / 0.3 * H(expand(dae)))  # L1
    D = torch.logspace(-1, 1, 5)
    inverse = D.reciprocal().repeat_interleave(image[0] * image[1])
    same_on_images(evaluate, lc.gauge(dae, D), x, y)
    close(H(expand(lc.gauge(dae, D))), inverse[:, None] * H(expand(dae)) * inverse)  # L4
    P, C = torch.randn(2, 3, *image), torch.randn(1, 3, *image)
    P, C = P / np.linalg.norm(circulant(P).numpy(), 2), 0.8 * C / np.linalg.norm(circulant(C).numpy(), 2)
    P = P * (1.0 - 1e-15)
    absorbed = lc.absorb(dae, matrices(P), matrices(C))
    x = torch.randn(4, 3, *image)
    inner = evaluate(expand(dae), correlate(x, P).flatten(1)).reshape(4, 3, *image)
    same_on_images(evaluate, absorbed, x, correlate(inner, C))
    before, p, c = expand(dae), circulant(P), circulant(C)
    U, G, D, L = before.U, before.G, torch.diag(before.Lambda), dae.lipschitz
    gain = G.T @ (torch.eye(len(G)) - c.T @ c) @ G / L + D @ U @ (torch.eye(len(p)) - p @ p.T) @ U.T @ D / L
    close(H(expand(absorbed)), H(before) + gain)  # L2
    for bad in ({"P": 1.01 * matrices(P)}, {"C": 1.3 * matrices(C)}):
        with pytest.raises(NotPSDError):
            lc.absorb(dae, **bad)


def test_composing_what_lives_elsewhere_is_refused() -> None:
    fine, turned = (lc.elementwise("relu", 2, name=str(image), grid=Grid(image)) for image in ((2, 3), (3, 2)))
    flat, wide = lc.elementwise("relu", 12), lc.elementwise("relu", 3, grid=Grid((2, 3)))
    for f, g in ((fine, turned), (fine, flat), (flat, fine), (fine, wide), (lc.densify(fine), fine)):
        with pytest.raises(ShapeError):
            lc.compose(f, g)
    assert lc.compose(lc.densify(fine), lc.densify(turned)).states == 24


def residual(channels: int, image: tuple[int, int]) -> tuple[DAE, Callable[[Tensor], Tensor]]:
    """An SLL layer with kernels of any size, and the layer in plain torch."""
    layer = SLLConv2d(channels, 2, kernel_size=(3, 2), activation=nn.Tanh())
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.log_q)
    K, b, T = layer.weight.detach(), layer.bias.detach(), layer.T(image).detach()
    full = torch.zeros(2, channels, *image)
    for i, j in np.ndindex(3, 2):
        full[:, :, (i - 1) % image[0], j % image[1]] += K[:, :, i, j]
    transposed = torch.roll(full.flip(2, 3), (1, 1), (2, 3)).transpose(0, 1)

    def plain(x: Tensor) -> Tensor:
        return x - 2.0 * correlate(torch.tanh(correlate(x, full) + plane(b)) / plane(T), transposed)

    return lc.to_dae(layer, input_shape=(channels, *image)), plain


@pytest.mark.parametrize("image", IMAGES)
def test_closed_form_rows_follow_every_operation_on_a_grid(image: tuple[int, int]) -> None:
    one, _ = residual(2, image)
    dae = lc.eliminate(lc.compose(one, residual(2, image)[0]))
    P, C = torch.randn(2, 3, *image), torch.randn(1, 2, *image)
    P, C = (K * (1.0 - 1e-14) / np.linalg.norm(circulant(K).numpy(), 2) for K in (P, C))
    scaled = lc.scale(dae, 0.7, 2.3)
    absorbed = lc.absorb(scaled, matrices(P), 0.5 * matrices(C))
    relu = lc.compose(lc.affine(matrices(P), None, 1.0, grid=Grid(image)), lc.elementwise("relu", 2, grid=Grid(image)))
    for step in (dae, scaled, absorbed, lc.gauge(relu), lc.gauge(lc.scale(relu, 3.0, 0.2), torch.logspace(-1, 1, 4))):
        certified(step)
    if min(image) > 1:
        certified(lc.coarsen(absorbed, 1, image[1]))
    bare, _ = on_images(image)
    assert lc.absorb(bare.derive(V=None), matrices(P)).V is None


def test_rows_that_live_at_one_frequency_are_kept() -> None:
    """Half of the mean is taken away: H is 0 at every other frequency, exactly."""
    grid = Grid((3, 4))
    M = torch.eye(2, dtype=torch.complex128).repeat(*grid.batch, 1, 1)
    M[0] *= 0.5
    dae = lc.compose(lc.affine(M, None, 1.0, grid=grid), lc.elementwise("relu", 2, grid=grid))
    for step in (dae, lc.eliminate(dae), lc.absorb(lc.eliminate(dae), C=M)):
        dense = certified(step)
        assert float(H(dense).abs().max()) > 1e-2


@pytest.mark.parametrize("image", [(), *IMAGES])
def test_closed_form_rows_where_a_block_reads_states_and_inputs(image: tuple[int, ...]) -> None:
    """relu, identity, relu: the middle block reads the first one and x, and is read by the last one."""
    kernel = {name: torch.randn(*s, *(image or (1, 1))) for name, s in (("W", (6, 6)), ("U", (6, 2)), ("G", (3, 6)))}
    kernel["W"] = kernel["W"] * torch.ones(6, 6).tril(-1)[:, :, None, None]
    kernel["W"][3, 2] = kernel["G"][:, 2:4] = 0.0
    kernel = {name: 0.5 * K / np.linalg.norm(circulant(K).numpy(), 2) for name, K in kernel.items()}
    sigma = Activations.of([("relu", 2), ("identity", 2), ("relu", 2)])
    spectra = {name: matrices(K) if image else K[:, :, 0, 0] for name, K in kernel.items()}
    dae = DAE(**spectra, Lambda=torch.rand(6) / 4 + 0.8, activations=sigma, grid=Grid(image))
    dae = dae.derive(V=lc.psd_sqrt(lc.H_matrix(dae) / 2, "H"))
    thin = lc.eliminate(dae)
    assert thin.blocks == (2, 2)
    if image:
        certified(dae)
        certified(thin)
    else:
        close(carried(thin), H(thin))
    W, U = dae.W, dae.U
    close(
        torch.view_as_real(thin.U[..., 2:, :] + 0j),
        torch.view_as_real(U[..., 4:, :] + W[..., 4:, 2:4] @ U[..., 2:4, :] + 0j),
    )


image_links = st.lists(
    st.sampled_from(["affine", "contraction", "relu", "tanh", "identity", "sll", "maxmin", "scale", "absorb"]),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(image_links, st.sampled_from(IMAGES), st.integers(0, 10**6))
def test_random_chains_on_a_grid(evaluate: Evaluate, kinds: list[str], image: tuple[int, int], seed: int) -> None:
    """Function, L, closed-form rows and (10) of any mixture, thinned after each layer or only at the end, then coarsened."""
    torch.manual_seed(seed)
    grid, width = Grid(image), 2
    x = y = torch.randn(3, width, *image)
    parts: list[DAE] = []
    L = 1.0
    for kind in kinds:
        if kind in ("affine", "contraction"):
            K, b = torch.randn(int(torch.randint(1, 4, ())), width, *image), torch.randn(1)
            if kind == "contraction":
                K = K * (1.0 - 1e-14) / np.linalg.norm(circulant(K).numpy(), 2)
            b = b.expand(len(K))
            part = lc.affine(matrices(K), b, None if kind == "affine" else 1.0, grid=grid)
            y, width = correlate(y, K) + plane(b), len(K)
        elif kind == "sll":
            part, plain = residual(width, image)
            y = plain(y)
        elif kind == "maxmin" and width % 2 == 0:
            part = lc.max_min(width, grid=grid)
            a, b = y[:, : width // 2], y[:, width // 2 :]
            y = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)
        elif kind == "scale":
            part, y = lc.scale(lc.elementwise("identity", width, grid=grid), 0.5, 3.0), 1.5 * y
        elif kind == "absorb":
            C = torch.randn(2, width, *image)
            C = 0.8 * C / np.linalg.norm(circulant(C).numpy(), 2)
            part = lc.absorb(lc.elementwise("relu", width, grid=grid), C=matrices(C))
            y, width = correlate(y.relu(), C), 2
        else:
            kind = "relu" if kind == "maxmin" else kind
            part = lc.elementwise(kind, width, grid=grid)
            y = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda v: v}[kind](y)
        L *= part.lipschitz
        parts.append(part)
    step_by_step = parts[0]
    for part in parts[1:]:
        step_by_step = lc.eliminate(lc.compose(step_by_step, part))
    full = lc.compose(*parts)
    thin = lc.eliminate(full)
    for dae in (full, thin, lc.eliminate(step_by_step)):
        assert dae.lipschitz == pytest.approx(L, rel=1e-14)
        same_on_images(evaluate, dae, x, y, 1e-11)
        # The gauge Λ = I, where the terms of H are of size 1.
        certified(lc.gauge(dae) if dae.sigma.homogeneous else dae)
    coarse = lc.coarsen(thin, *image)
    certified(coarse if not coarse.sigma.homogeneous else lc.gauge(coarse))
    dense = lc.densify(thin)
    close(evaluate(dense, x.flatten(1)), y.flatten(1), 1e-11)


def test_elimination_on_a_grid_is_substitution_by_hand() -> None:
    image, rest = (2, 3), slice(2 * 6, 5 * 6)
    rows = slice(0, 12)
    K = {"W": 0.3 * torch.randn(5, 5, *image), "U": torch.randn(5, 2, *image), "G": torch.randn(2, 5, *image)}
    K["W"][:2, :2] = K["U"][:2] = 0.0
    sigma = Activations.of([("identity", 2), ("relu", 3)])
    Lambda, b_z, b_y = torch.rand(5) + 0.3, torch.randn(5), torch.randn(2)
    spectra = {name: matrices(kernel) for name, kernel in K.items()}
    dae = DAE(**spectra, Lambda=Lambda, b_z=b_z, b_y=b_y, activations=sigma, grid=Grid(image))
    thin = expand(lc.eliminate(dae))
    W, U, G = (circulant(K[name]) for name in ("W", "U", "G"))
    b = b_z.repeat_interleave(6)
    close(thin.W, W[rest, rest] + W[rest, rows] @ W[rows, rest])
    close(thin.U, U[rest])
    close(thin.G, G[:, rest] + G[:, rows] @ W[rows, rest])
    close(thin.bias_z, b[rest] + W[rest, rows] @ b[rows])
    close(thin.bias_y, b_y.repeat_interleave(6) + G[:, rows] @ b[rows])
    # Rows that read x go too, unless they carry it to y.
    K["U"][:2] = torch.randn(2, 2, *image)
    assert lc.eliminate(dae.derive(U=matrices(K["U"]))).blocks == (2, 3)
    K["G"][:, :2] = 0.0
    driven = expand(lc.eliminate(dae.derive(U=matrices(K["U"]), G=matrices(K["G"]))))
    close(driven.U, U[rest] + W[rest, rows] @ circulant(K["U"])[rows])
