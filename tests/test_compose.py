"""The algebra of DAEs: H of every result from its written-out identity, the function by plain evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor, nn

import lipconvert as lc
from lipconvert import (
    DAE,
    Activations,
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
