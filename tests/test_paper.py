"""Composed layers against the paper's matrices, entry by entry.

Every matrix of a whole network is written out here from its formula: (14), (15), (21) for residual networks, appendix
D.1 for AOL, (22) for Sandwich, (5), (6), (11) for monotone models. The formulas are the corrected ones (FORMULAS 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.g_mondeq import GMonDEQ
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor, nn

import lipconvert as lc
from lipconvert import DAE, Activations
from lipconvert.networks.construction import construct

DEPTHS = range(1, 7)
ReLU = nn.ReLU()


def equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-14) -> None:
    """Entry by entry to 1e-14 of max(1, the entry): sums of at most a dozen products, taken in another order."""
    assert actual.shape == expected.shape
    assert bool(((actual - expected).abs() <= tolerance * expected.abs().clamp(min=1.0)).all())


def equal_dae(dae: DAE, W: Tensor, U: Tensor, G: Tensor, Lambda: Tensor, b_z: Tensor, b_y: Tensor, L: float) -> None:
    equal(dae.W, W)
    equal(dae.U, U)
    equal(dae.G, G)
    equal(dae.Lambda, Lambda)
    equal(dae.bias_z, b_z)
    equal(dae.bias_y, b_y)
    assert dae.lipschitz == pytest.approx(L, rel=1e-14)


def equal_H(dae: DAE, H: Tensor) -> None:
    """H(Λ, L) as defined, its closed form, and twice the Gram matrix of the carried rows."""
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    equal(2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L, H, 1e-13)
    equal(lc.H_matrix(dae), H, 1e-13)
    assert dae.V is not None
    # The rows come from square roots and QR factors of a whole chain: a few more units round-off.
    equal(2.0 * dae.V.T @ dae.V, H, 1e-13)


def normal(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def contraction(rows: int, columns: int) -> Tensor:
    M = torch.randn(rows, columns)
    return 0.9 * M / torch.linalg.matrix_norm(M, 2)


def blocks(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, 1) for row in rows])


# ---- residual networks ----------------------------------------------------------------------------------------------


def residual(kind: type[SLLLinear] | type[CPLLinear], N: int) -> tuple[list[nn.Module], int, list[int]]:
    torch.manual_seed(N)
    d = 3 + N % 2
    widths = [1 + (2 * n + N) % 6 for n in range(N)]  # narrower and wider than d
    return [normal(kind(d, h)) for h in widths], d, widths


def T_of(layer: nn.Module) -> Tensor:
    W = layer.weight.detach().T
    if isinstance(layer, SLLLinear):
        q = layer.log_q.detach().exp()  # (9)
        T = torch.stack([sum((W.T @ W)[i, j].abs() * q[j] / q[i] for j in range(len(q))) for i in range(len(q))])
        equal(layer.T().detach(), T)
    else:
        T = torch.full((W.shape[1],), float(np.linalg.norm(W.numpy(), 2)) ** 2)
        # An upper bound of ‖W‖² that is loose by round-off; the exact square would be off by its inflation.
        assert bool((layer.T() >= T).all())
        equal(layer.T().detach(), T, 1e-13)
    return layer.T().detach()


@pytest.mark.parametrize("N", DEPTHS)
@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.6, 2.5)])
def test_residual_networks_are_14_15_and_21(
    kind: type[SLLLinear] | type[CPLLinear], N: int, alpha: float, beta: float
) -> None:
    layers, d, widths = residual(kind, N)
    dae = lc.to_dae(nn.Sequential(*layers))
    dae = lc.scale(dae, alpha, beta)
    W = [layer.weight.detach().T for layer in layers]
    T = [T_of(layer) for layer in layers]
    R = [2.0 * w @ torch.diag(1.0 / t) for w, t in zip(W, T, strict=True)]
    zero = torch.zeros
    sizes = [d, *widths]
    rows = [[zero(d, size) for size in sizes]]
    for n in range(N):
        seen = [W[n].T] + [-W[n].T @ R[k] for k in range(n)]
        rows.append(seen + [zero(widths[n], size) for size in sizes[n + 1 :]])
    ratio = beta / alpha
    equal_dae(
        dae,
        blocks(rows),
        alpha * torch.cat([torch.eye(d), zero(sum(widths), d)]),
        beta * torch.cat([torch.eye(d)] + [-r for r in R], 1),
        ratio * torch.cat([torch.ones(d)] + [2.0 / t for t in T]),
        torch.cat([zero(d)] + [layer.bias.detach() for layer in layers]),
        zero(d),
        alpha * beta,
    )
    assert dae.blocks == (d, *widths)
    assert dae.sigma == Activations.of([("identity", d), ("relu", sum(widths))])
    H = [4.0 * torch.diag(1.0 / t) - 4.0 * (w / t).T @ (w / t) for w, t in zip(W, T, strict=True)]
    equal_H(dae, ratio * torch.block_diag(zero(d, d), *H))


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
def test_residual_networks_with_padding_and_a_linear_head(kind: type[SLLLinear] | type[CPLLinear], N: int) -> None:
    layers, d, _ = residual(kind, N)
    P, C, c = contraction(d, 2), contraction(5, d), torch.randn(5)
    first, last = lc.affine(P, None, 1.0), lc.affine(C, c, 1.0)
    inner = lc.to_dae(nn.Sequential(*layers))
    dae = lc.eliminate(lc.compose(first, inner, last))
    absorbed = lc.absorb(inner, P, C)
    equal_dae(dae, inner.W, inner.U @ P, C @ inner.G, inner.Lambda, inner.bias_z, c, 1.0)
    for a, b in zip(dae, absorbed, strict=True):  # two roads of the library to the same matrices
        equal(a, b)
    W = [layer.weight.detach().T for layer in layers]
    T = [layer.T().detach() for layer in layers]
    H = [4.0 * torch.diag(1.0 / t) - 4.0 * (w / t).T @ (w / t) for w, t in zip(W, T, strict=True)]
    G1 = torch.cat([torch.eye(d)] + [-2.0 * w / t for w, t in zip(W, T, strict=True)], 1)
    expected = torch.block_diag(torch.eye(d) - P @ P.T, *H) + G1.T @ (torch.eye(d) - C.T @ C) @ G1
    equal_H(dae, expected)
    equal_H(replace(absorbed, b_y=c), expected)


def test_SLL_pair_rows_are_a_square_root() -> None:
    """Σ over pairs i < j of v v' with v = √(|a_ij| q_j/q_i) e_i − sgn(a_ij) √(|a_ij| q_i/q_j) e_j is T − W'W. (16)"""
    h = 6
    layer = normal(SLLLinear(3, h))
    A, q = (layer.weight @ layer.weight.T).detach(), layer.log_q.detach().exp()
    rows = []
    for j in range(h):
        for i in range(j):
            row = torch.zeros(h)
            row[i] = (A[i, j].abs() * q[j] / q[i]).sqrt()
            row[j] = -A[i, j].sign() * (A[i, j].abs() * q[i] / q[j]).sqrt()
            rows.append(row)
    F = torch.stack(rows)
    T = layer.T().detach()
    equal(F.T @ F, torch.diag(T) - A, 1e-13)
    dae = lc.to_dae(layer)
    V = torch.cat([torch.zeros(len(F), 3), 2.0**0.5 * F / T], 1)
    assert dae.V is not None
    equal(dae.V.T @ dae.V, V.T @ V, 1e-13)
    # They are accepted in the place of the library's own.
    assert construct(replace(dae, V=V)).closed_form


def test_dead_neurons_stay_legal() -> None:
    """A zero column of W: T_ii = 0 is replaced, and the function, Λ > 0 and (10) survive. (FORMULAS 2)"""
    layer = normal(SLLLinear(3, 4))
    with torch.no_grad():
        layer.weight[1] = 0.0
    for dead in (layer, CPLLinear(3, 4)):
        if dead is not layer:
            nn.init.zeros_(dead.weight)
        dae = lc.to_dae(dead)
        assert bool((dae.Lambda > 0).all())
        alive = [i for i in range(4) if bool(dead.weight[i].any())]
        x = torch.randn(5, 3)
        W, T, b = dead.weight.detach()[alive], dead.T().detach()[alive], dead.bias.detach()[alive]
        equal(dead(x).detach(), x - 2.0 * ((x @ W.T + b).relu() / T) @ W)
        H = (
            4.0 * torch.diag(1.0 / dead.T().detach())
            - 4.0 * (dead.weight.T / dead.T()).T.detach() @ (dead.weight.T / dead.T()).detach()
        )
        equal_H(dae, torch.block_diag(torch.zeros(3, 3), H))


# ---- AOL ------------------------------------------------------------------------------------------------------------


def P_of(layer: AOLLinear) -> Tensor:
    W = layer.weight.detach()
    gram = (W.T @ W).abs()
    D = torch.diag(torch.stack([sum(gram[i, j] for j in range(len(gram))) ** -0.5 for i in range(len(gram))]))  # (8)
    return W @ D


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.6, 2.5)])
def test_AOL_is_appendix_D1(depth: int, alpha: float, beta: float) -> None:
    torch.manual_seed(depth)
    widths = [1 + (3 * k + depth) % 5 for k in range(depth + 2)]
    layers = [normal(AOLLinear(a, b)) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(layers[0])
    for layer in layers[1:]:
        model.append(nn.ReLU())
        model.append(layer)
    dae = lc.scale(lc.to_dae(model), alpha, beta)
    P, sizes = [P_of(layer) for layer in layers], widths[1:-1]
    n = sum(sizes)
    W = torch.zeros(n, n)
    U, G = torch.zeros(n, widths[0]), torch.zeros(widths[-1], n)
    at = np.cumsum([0, *sizes])
    for j in range(1, depth):
        W[at[j] : at[j + 1], at[j - 1] : at[j]] = P[j]
    U[: sizes[0]], G[:, at[-2] :] = alpha * P[0], beta * P[-1]
    ratio = beta / alpha
    b = [layer.bias.detach() for layer in layers]
    equal_dae(dae, W, U, G, ratio * torch.ones(n), torch.cat(b[:-1]), beta * b[-1], alpha * beta)
    assert dae.sigma == Activations("relu", n)
    assert dae.blocks == tuple(sizes)
    first, last = torch.zeros(n, n), torch.zeros(n, n)
    first[: sizes[0], : sizes[0]] = P[0] @ P[0].T
    last[at[-2] :, at[-2] :] = P[-1].T @ P[-1]
    equal_H(dae, ratio * (2.0 * torch.eye(n) - W - W.T - first - last))
    # The sum of squares of FORMULAS 1.2.
    if depth > 1:
        u = torch.randn(n)
        parts = [u[a:b] for a, b in itertools.pairwise(at)]
        squares = float(parts[0] @ (torch.eye(sizes[0]) - P[0] @ P[0].T) @ parts[0])
        for j in range(1, depth):
            squares += float((parts[j] - P[j] @ parts[j - 1]).square().sum())
            squares += float(parts[j - 1].square().sum() - (P[j] @ parts[j - 1]).square().sum())
        squares += float(parts[-1].square().sum() - (P[-1] @ parts[-1]).square().sum())
        assert float(u @ lc.H_matrix(dae) @ u) == pytest.approx(ratio * squares, rel=1e-13)


def test_AOL_without_hidden_layers_is_one_identity_block() -> None:
    layers = [normal(AOLLinear(3, 5)), normal(AOLLinear(5, 2))]
    dae = lc.to_dae(nn.Sequential(*layers))
    P = [P_of(layer) for layer in layers]
    b = [layer.bias.detach() for layer in layers]
    assert len(dae.blocks) == 1
    assert dae.sigma.runs[0][0].name == "identity"
    assert bool((dae.W == 0).all())
    equal(dae.G @ dae.U, P[1] @ P[0])
    equal(dae.G @ dae.bias_z + dae.bias_y, P[1] @ b[0] + b[1])
    assert dae.lipschitz == 1.0


def test_one_activation_module_may_stand_between_all_layers() -> None:
    layers = [normal(AOLLinear(3, 3)) for _ in range(3)]
    relu = nn.ReLU()
    shared = lc.to_dae(nn.Sequential(layers[0], relu, layers[1], relu, layers[2]))
    separate = lc.to_dae(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
    for a, b in zip(shared, separate, strict=True):
        equal(a, b, 0.0)


def test_AOL_zero_column() -> None:
    layer = normal(AOLLinear(4, 3))
    with torch.no_grad():
        layer.weight[:, 2] = 0.0
    P = layer.P().detach()
    assert bool(torch.isfinite(P).all())
    assert bool((P[:, 2] == 0).all())
    gram = (layer.weight.T @ layer.weight).abs().sum(1).detach()
    alive = [0, 1, 3]
    equal(P[:, alive], layer.weight.detach()[:, alive] / gram[alive].sqrt())
    assert lc.check(lc.to_dae(layer)).condition_10


# ---- Sandwich -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", DEPTHS)
@pytest.mark.parametrize("L", [1.0, 2.5])
def test_Sandwich_is_22(N: int, L: float) -> None:
    torch.manual_seed(N)
    widths = [1 + (3 * k + N) % 5 for k in range(N + 2)]
    root = L**0.5
    layers = [
        normal(
            SandwichLinear(
                widths[k], widths[k + 1], activation=ReLU if k < N else None, scale=root if k in (0, N) else 1.0
            )
        )
        for k in range(N + 1)
    ]
    dae = lc.to_dae(nn.Sequential(*layers))
    pairs = [tuple(t.detach() for t in layer.AB()) for layer in layers]
    A, B = [a for a, _ in pairs], [b for _, b in pairs]
    for a, b in pairs:
        equal(a @ a.T + b @ b.T, torch.eye(len(a)))
    Phi = [torch.diag(layer.psi.detach().exp()) for layer in layers[:-1]]
    sizes = widths[1:-1]
    n, at = sum(sizes), np.cumsum([0, *sizes])
    block = [slice(a, b) for a, b in itertools.pairwise(at)]
    W, U, G, H = torch.zeros(n, n), torch.zeros(n, widths[0]), torch.zeros(widths[-1], n), torch.zeros(n, n)
    U[block[0]] = (2.0 * L) ** 0.5 * torch.linalg.inv(Phi[0]) @ B[0]
    G[:, block[-1]] = (2.0 * L) ** 0.5 * B[N] @ A[N - 1].T @ Phi[N - 1]
    for k in range(N):
        inner = torch.eye(sizes[k])
        if k == 0:
            inner = inner - B[0] @ B[0].T
        if k == N - 1:
            inner = inner - A[k] @ B[N].T @ B[N] @ A[k].T
        H[block[k], block[k]] = 2.0 * Phi[k] @ inner @ Phi[k]
        if k:
            link = Phi[k] @ B[k] @ A[k - 1].T @ Phi[k - 1]
            W[block[k], block[k - 1]] = 2.0 * torch.linalg.inv(Phi[k]) @ B[k] @ A[k - 1].T @ Phi[k - 1]
            H[block[k], block[k - 1]], H[block[k - 1], block[k]] = -2.0 * link, -2.0 * link.T
    b = [layer.bias.detach() for layer in layers]
    # Λ = blkdiag(Φ_n²) whatever L is.
    Lambda = torch.cat([phi.diagonal() ** 2 for phi in Phi])
    equal_dae(dae, W, U, G, Lambda, torch.cat(b[:-1]), b[-1], L)
    assert dae.blocks == tuple(sizes)
    equal_H(dae, H)
    # The corrected (23): the second block of a row carries a minus sign, the last row a square root.
    rows = [torch.zeros(widths[k], n) for k in range(1, N)]
    for k in range(1, N):
        rows[k - 1][:, block[k - 1]], rows[k - 1][:, block[k]] = A[k - 1].T @ Phi[k - 1], -B[k].T @ Phi[k]
    V = torch.cat([*rows, torch.zeros(0, n)])
    rest = torch.zeros(n, n)
    rest[block[-1], block[-1]] = Phi[-1] @ A[-2] @ (torch.eye(widths[N]) - B[N].T @ B[N]) @ A[-2].T @ Phi[-1]
    equal(2.0 * (V.T @ V + rest), H, 1e-13)


# ---- monotone equilibrium models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MonDEQ, GMonDEQ])
@pytest.mark.parametrize("readout", [None, 2, 7])
@pytest.mark.parametrize("m", [0.4, 1.5])
def test_monotone_models_are_5_6_and_11(kind: type[MonDEQ] | type[GMonDEQ], readout: int | None, m: float) -> None:
    n, p = 5, 3
    model = normal(kind(p, n, readout, m=m))
    dae = lc.to_dae(model)
    A, B, U = (t.weight.detach() for t in (model.A, model.B, model.U))
    Phi = torch.diag(model.log_phi.detach().exp()) if isinstance(model, GMonDEQ) else torch.eye(n)
    G = torch.eye(n) if readout is None else model.Wout.weight.detach()
    inverse = torch.linalg.inv(Phi)
    n_U, n_G = (float(np.linalg.norm(M.numpy(), 2)) for M in (inverse @ U, G))
    L, lam = n_U * n_G / m, n_G / n_U
    W = torch.eye(n) - Phi @ (A.T @ A + B.T - B + m * torch.eye(n))
    equal(dae.W, W)
    equal(dae.U, U)
    equal(dae.G, G)
    # The two norms are upper bounds, loose by round-off.
    equal(dae.Lambda, lam * inverse.diagonal(), 1e-13)
    assert L <= dae.lipschitz <= L * (1.0 + 1e-13)
    assert torch.equal(dae.bias_z, model.U.bias.detach())
    equal(dae.bias_y, torch.zeros(n) if readout is None else model.Wout.bias.detach())
    eye, PU = torch.eye(n), inverse @ U
    equal_H(dae, 2.0 * lam * (m * eye + A.T @ A) - G.T @ G / L - lam**2 * PU @ PU.T / L)
    equal_H(
        dae,
        2.0 * lam * A.T @ A + (n_G**2 * eye - G.T @ G) / L + lam**2 * (n_U**2 * eye - PU @ PU.T) / L,
    )


@pytest.mark.parametrize("kind", [MonDEQ, GMonDEQ])
def test_prescribed_constant(kind: type[MonDEQ] | type[GMonDEQ]) -> None:
    """U = mLΦQ and an orthogonal readout: ‖Φ⁻¹U‖‖G‖/m is the prescribed L, not 1/√m. (FORMULAS P14)"""
    model = kind(3, 6, 2, m=0.1, lipschitz=1.5)
    if isinstance(model, GMonDEQ):
        nn.init.normal_(model.log_phi, std=0.5)
    dae = lc.to_dae(model)
    PU = dae.U / model.phi().detach().unsqueeze(1)
    assert float(np.linalg.norm(PU.numpy(), 2)) == pytest.approx(0.1 * 1.5, rel=1e-13)
    assert float(np.linalg.norm(dae.G.numpy(), 2)) == pytest.approx(1.0, rel=1e-13)
    assert dae.lipschitz == 1.5
    assert lc.check(dae).condition_10


@pytest.mark.parametrize("which", ["U", "Wout"])
def test_constant_functions_have_a_certificate(which: str) -> None:
    model = normal(MonDEQ(3, 4, 2, m=0.7))
    nn.init.zeros_(getattr(model, which).weight)
    dae = lc.to_dae(model)
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    H = 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L
    assert L > 0.0
    assert float(torch.linalg.eigvalsh(H)[0]) >= -1e-13
    assert dae.V is not None
    equal(2.0 * dae.V.T @ dae.V, H, 1e-13)


# ---- the two sign conventions ---------------------------------------------------------------------------------------


def rebuilt(dae: DAE, S: Tensor, sign: float = 1.0) -> Tensor:
    """W from (2) for sign = 1, from (7) for sign = −1, with V'V = H/2 and ε = 0."""
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    H = 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L
    inner = G.T @ G / (2 * L) + D @ U @ U.T @ D / (2 * L) + H / 2 + sign * (S - S.T)
    return torch.eye(len(W)) - torch.diag(1.0 / Lambda) @ inner


@pytest.mark.parametrize("kind", ["sll", "cpl", "aol", "sandwich", "mondeq", "g_mondeq"])
def test_sign_conventions(kind: str, random_model: Callable[..., nn.Module]) -> None:
    """Ours is (2): S = −ΛW/2 and the paper's S = M/2 rebuild W there, their negatives only in (7). (FORMULAS P1)"""
    dae = lc.to_dae(random_model(kind, 4, 2))
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    M = D @ (torch.eye(len(W)) - W) - (G.T @ G + D @ U @ U.T @ D) / (2 * L)
    P = construct(dae)
    equal(P.S, -D @ W / 2)
    for S in (P.S, M / 2, (M - M.T) / 4):
        equal(rebuilt(dae, S), W, 1e-13)
        equal(rebuilt(dae, -S, sign=-1.0), W, 1e-13)
        wrong = rebuilt(dae, -S) - W
        # (2) with the wrong sign misses by 2Ψ(S − S'), nothing like round-off.
        equal(wrong, 2.0 * torch.diag(1.0 / Lambda) @ (S - S.T), 1e-13)
        assert float(wrong.abs().max()) > 0.1
    lben = lc.LBEN.from_dae(dae)
    equal(lben.W.detach(), W, 1e-13)
    with torch.no_grad():
        lben.S.neg_()
    assert float((lben.W.detach() - W).abs().max()) > 0.1
    with torch.no_grad():
        lben.S.copy_(M / 2)
    equal(lben.W.detach(), W, 1e-13)


def test_Theorem_3_2_belongs_to_7() -> None:
    """S = B/‖U‖ rebuilds MonDEQ's W in (7), S = −B/‖U‖ in (2); G = I."""
    model = normal(MonDEQ(3, 5, m=0.8))
    dae = lc.to_dae(model)
    S = model.B.weight.detach() / float(np.linalg.norm(dae.U.numpy(), 2))
    equal(rebuilt(dae, S, sign=-1.0), dae.W, 1e-13)
    equal(rebuilt(dae, -S), dae.W, 1e-13)
    assert float((rebuilt(dae, S) - dae.W).abs().max()) > 0.1
