"""From a DAE to an LBEN: two hundred random networks of every architecture and depth, and what is refused.

The source is written out here layer by layer from the parameters; an equilibrium is found by Newton's method in numpy.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from lipconvert_plugins import aol, cpl, g_mondeq, mondeq, sandwich, sll
from plain import circulant, matrices
from torch import Tensor, nn
from torch.nn import functional

import lipconvert as lc
from lipconvert import DAE, LBEN, Activations, Grid, InvalidParameterError, LipconvertError, NotPSDError
from lipconvert.networks.construction import assemble, construct

INSTANCES = 200
DEPTHS = range(1, 7)
Models = Callable[..., nn.Module]
Case = tuple[DAE, Tensor, Tensor, float]  # a DAE, inputs, the source's outputs, its constant


def contraction(rows: int, columns: int) -> Tensor:
    M = torch.randn(rows, columns)
    return M / torch.linalg.vector_norm(M)  # Frobenius, so at most 1 in norm


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


ACTIVATIONS: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (nn.ReLU(), torch.relu),
    (nn.Tanh(), torch.tanh),
    (nn.LeakyReLU(0.2), lambda v: torch.where(v > 0, v, 0.2 * v)),
    (nn.Softplus(2.0), lambda v: torch.logaddexp(2.0 * v, torch.zeros_like(v)) / 2.0),
]


def stated(plugin: ModuleType, layer: nn.Module) -> DAE:
    """What the hook of a plugin says of a dense layer; an implementation names only the arguments it needs."""
    given = {"model": layer, "input_shape": None, "dense": False}
    dae = plugin.to_dae(**{name: given[name] for name in inspect.signature(plugin.to_dae).parameters})
    assert isinstance(dae, DAE)
    return dae


def residual_networks(kind: str) -> Iterator[list[Case]]:
    """Chains of six random layers, read off after each: padding in front and a linear head behind in every other one."""
    for instance in range(INSTANCES):
        module, sigma = ACTIVATIONS[instance % 4]
        d, p = number(1, 4), number(1, 4)
        x = torch.randn(3, p)
        bare = instance % 2 == 0
        if bare:
            chain, state, x = None, x[:, :1].expand(3, d).contiguous(), x[:, :1].expand(3, d).contiguous()
        else:
            P = contraction(d, p)
            chain, state = lc.affine(P, None, 1.0), x @ P.T
        cases: list[Case] = []
        for _ in DEPTHS:
            h = number(1, 5)
            layer = (sll.SLLLinear if kind == "sll" else cpl.CPLLinear)(d, h, activation=module)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.7)
            weight, bias = layer.weight.detach(), layer.bias.detach()
            if kind == "sll":
                q = layer.log_q.detach().exp()
                T = ((weight @ weight.T).abs() * (q[None, :] / q[:, None])).sum(1)
            else:
                T = torch.linalg.svdvals(weight)[0] ** 2 * torch.ones(h)
            state = state - 2.0 * (sigma(state @ weight.T + bias) / T) @ weight
            one = stated(sll if kind == "sll" else cpl, layer)
            chain = one if chain is None else lc.eliminate(lc.compose(chain, one))
            if bare:
                cases.append((chain, x, state, 1.0))
            else:
                C, c = contraction(number(1, 3), d), torch.randn(1)
                headed = lc.eliminate(lc.compose(chain, lc.affine(C, c.expand(len(C)), 1.0)))
                cases.append((headed, x, state @ C.T + c, 1.0))
        yield cases


def aol_networks() -> Iterator[list[Case]]:
    for instance in range(INSTANCES):
        module, sigma = ACTIVATIONS[instance % 4]
        width = number(1, 4)
        x = state = torch.randn(3, width)
        chain = None
        cases: list[Case] = []
        for _ in range(len(DEPTHS) + 1):
            layer = aol.AOLLinear(width, number(1, 4))
            for parameter in layer.parameters():
                nn.init.normal_(parameter)
            weight, bias = layer.weight.detach(), layer.bias.detach()
            linear = state @ (weight / (weight.T @ weight).abs().sum(0).sqrt()).T + bias
            one = stated(aol, layer)
            chain = one if chain is None else lc.eliminate(lc.compose(chain, one))
            if chain.sigma.runs[0][0].name != "identity":
                cases.append((chain, x, linear, 1.0))
            width, state = len(weight), sigma(linear)
            chain = lc.eliminate(lc.compose(chain, lc.elementwise(lc.activation_of(module), width)))
        yield cases


def sandwich_networks() -> Iterator[list[Case]]:
    for instance in range(INSTANCES):
        module, sigma = ACTIVATIONS[instance % 4]
        width, L = number(1, 4), 0.5 + 2.0 * float(torch.rand(()))
        x = state = torch.randn(3, width)
        chain = None
        cases: list[Case] = []
        for depth in DEPTHS:
            h, q = number(1, 4), number(1, 4)
            scale = L**0.5 if depth == 1 else 1.0
            layer = sandwich.SandwichLinear(width, h, activation=module, scale=scale)
            last = sandwich.SandwichLinear(h, q, scale=L**0.5)
            for parameter in (*layer.parameters(), *last.parameters()):
                nn.init.normal_(parameter, std=0.7)
            A, B = (t.detach() for t in layer.AB())
            phi = layer.psi.detach().exp()
            v = 2.0**0.5 * scale * (state @ B.T) / phi + layer.bias.detach()
            width, state = h, 2.0**0.5 * (sigma(v) * phi) @ A
            one = stated(sandwich, layer)
            chain = one if chain is None else lc.eliminate(lc.compose(chain, one))
            y = L**0.5 * state @ last.AB()[1].detach().T + last.bias.detach()
            cases.append((lc.eliminate(lc.compose(chain, stated(sandwich, last))), x, y, L))
        yield cases


def newton(W: np.ndarray, u: np.ndarray, kind: str) -> np.ndarray:
    """z = σ(Wz + u) for each row of u: Newton on z − σ(Wz + u) with backtracking. I − DW is regular for every slope D."""

    def sigma(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if kind == "relu":
            return np.maximum(v, 0.0), (v > 0.0).astype(float)
        if kind == "leaky_relu":
            return np.where(v > 0.0, v, 0.2 * v), np.where(v > 0.0, 1.0, 0.2)
        return np.tanh(v), 1.0 - np.tanh(v) ** 2

    rows = []
    for drive in u:
        z = np.zeros(len(drive))
        for _ in range(200):
            value, slope = sigma(W @ z + drive)
            residual = z - value
            size = np.linalg.norm(residual)
            if size <= 1e-15 * (1.0 + np.linalg.norm(z)):
                break
            step = np.linalg.solve(np.eye(len(z)) - slope[:, None] * W, residual)
            t = 1.0
            while t > 1e-6 and np.linalg.norm(z - t * step - sigma(W @ (z - t * step) + drive)[0]) > size:
                t *= 0.5
            if t <= 1e-6:
                break
            z = z - t * step
        assert size <= 1e-13 * (1.0 + np.linalg.norm(z)), "the reference did not converge"
        rows.append(z)
    return np.stack(rows)


def equilibrium_networks(kind: str) -> Iterator[list[Case]]:
    """One model of each size: free U with a readout, free U reading the states, and a prescribed constant, in turn."""
    activations = [(nn.ReLU(), "relu"), (nn.Tanh(), "tanh"), (nn.ReLU(), "relu"), (nn.LeakyReLU(0.2), "leaky_relu")]
    build, plugin = (mondeq.MonDEQ, mondeq) if kind == "mondeq" else (g_mondeq.GMonDEQ, g_mondeq)
    for instance in range(INSTANCES):
        module, name = activations[instance % 4]
        cases: list[Case] = []
        for n in DEPTHS:
            p, m = number(1, 4), 0.5 + float(torch.rand(()))
            flavour = (instance // 4) % 3
            q = None if flavour == 1 else number(1, n if flavour == 2 else 4)
            prescribed = 1.5 if flavour == 2 else None
            model = build(p, n, q, m=m, lipschitz=prescribed, activation=module)
            nn.init.normal_(model.U.bias)
            if kind == "g_mondeq":
                nn.init.normal_(model.log_phi, std=0.3)
            A, B = (t.weight.detach().numpy() for t in (model.A, model.B))
            phi = model.log_phi.detach().exp().numpy() if kind == "g_mondeq" else np.ones(n)
            U = model.U.weight.detach().numpy()
            G = np.eye(n) if q is None else model.Wout.weight.detach().numpy()
            c = np.zeros(n) if q is None else model.Wout.bias.detach().numpy()
            if prescribed is not None:
                U = prescribed * m * phi[:, None] * U
            W = np.eye(n) - phi[:, None] * (A.T @ A + B.T - B + m * np.eye(n))
            L = float(np.linalg.norm(U / phi[:, None], 2) * np.linalg.norm(G, 2) / m)
            x = torch.randn(3, p)
            z = newton(W, x.numpy() @ U.T + model.U.bias.detach().numpy(), name)
            cases.append((stated(plugin, model), x, torch.from_numpy(z @ G.T + c), L))
        yield cases


NETWORKS: dict[str, Callable[[], Iterator[list[Case]]]] = {
    "sll": lambda: residual_networks("sll"),
    "cpl": lambda: residual_networks("cpl"),
    "aol": aol_networks,
    "sandwich": sandwich_networks,
    "mondeq": lambda: equilibrium_networks("mondeq"),
    "g_mondeq": lambda: equilibrium_networks("g_mondeq"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_architecture_at_every_depth(kind: str) -> None:
    """W rebuilt, outputs, H and L of 200 random networks at each of the depths (numbers of states) 1 to 6."""
    counts = np.zeros(len(DEPTHS), int)
    for cases in NETWORKS[kind]():
        for k, (dae, x, expected, L) in enumerate(cases):
            lben = LBEN.from_dae(dae)
            y = lben(x)
            # An architecture's constant is a number or an upper bound of a norm, loose by round-off.
            assert lben.lipschitz == dae.lipschitz == pytest.approx(L, rel=1e-13)
            # With every ReLU off and no bias behind, the output is exactly 0: then the difference itself counts.
            assert float((y - expected).abs().max()) <= 1e-10 * (float(expected.abs().max()) or 1.0)
            W, U, G, V, S = (t.detach().numpy() for t in (dae.W, lben.U, lben.G, lben.V, lben.S))
            Psi = np.exp(lben.log_psi.detach().numpy())
            # (2) written out, and H from it.
            inner = G.T @ G / (2 * L) + (U / Psi[:, None]) @ (U / Psi[:, None]).T / (2 * L) + V.T @ V + S - S.T
            rebuilt = np.eye(len(W)) - Psi[:, None] * inner
            # Absolute in the gauge Λ = I, where every term is of size 1. In the states' own scale a nearly dead neuron (a
            # weight of 1e-4, R = 2/w of 1e4) leaves the round-off of the terms that cancel.
            root = Psi**-0.5
            terms = max(1.0, np.linalg.norm(W), np.linalg.norm(Psi[:, None] * (G.T @ G)) / (2 * L))
            for found in (rebuilt, lben.W.detach().numpy()):
                assert np.linalg.norm(root[:, None] * (found - W) / root) <= 1e-12
                assert np.linalg.norm(found - W) <= 1e-12 * terms
            Lambda = np.diag(1 / Psi)
            H = 2 * Lambda - Lambda @ rebuilt - rebuilt.T @ Lambda
            H -= G.T @ G / L + Lambda @ U @ U.T @ Lambda / L
            assert np.linalg.eigvalsh(H)[0] >= -1e-12 * max(1.0, Lambda.max())
            counts[k] += 1
    assert counts.tolist() == [INSTANCES] * len(DEPTHS)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", DEPTHS)
def test_whole_models_through_the_registry(kind: str, size: int, random_model: Models) -> None:
    """The same promises for models as a user holds them, against their own forward, also in float32."""
    for seed in range(2):
        model = random_model(kind, size, seed)
        dae = lc.to_dae(model)
        lben = LBEN.from_dae(dae)
        x = torch.randn(4, dae.inputs)
        with torch.no_grad():
            expected = model(x)
            assert float((lben(x) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
            assert float((lben.float()(x.float()) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert torch.linalg.matrix_norm(assemble_of(dae) - dae.W) <= 1e-12


def assemble_of(dae: DAE, epsilon: float = 0.0, delta: float = 0.0) -> Tensor:
    P = construct(dae, epsilon, delta)
    return assemble(P.Psi, P.G, P.U, P.V, P.S, P.epsilon, P.lipschitz)


# ---- the parameters -------------------------------------------------------------------------------------------------


def random_lben(n: int = 6, p: int = 3, q: int = 4, rank: int = 6, L: float = 1.4, epsilon: float = 0.2) -> DAE:
    """W from (0.4), written out; H(Ψ⁻¹, L) = 2V'V + 2εI is then known without computing it."""
    Psi = torch.diag(torch.rand(n) + 0.4)
    inverse = torch.linalg.inv(Psi)
    U, G, V, S = torch.randn(n, p), torch.randn(q, n), torch.randn(rank, n), torch.randn(n, n)
    inner = G.T @ G / (2 * L) + inverse @ U @ U.T @ inverse / (2 * L) + V.T @ V + S - S.T + epsilon * torch.eye(n)
    W = torch.eye(n) - Psi @ inner
    return DAE(W, U, G, inverse.diagonal(), torch.randn(n), torch.randn(q), lipschitz=L)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_H_of_an_LBEN_is_twice_VV_and_epsilon(seed: int, epsilon: float) -> None:
    """(0.6) for the module with any parameters, W rebuilt by it."""
    torch.manual_seed(seed)
    lben = LBEN(3, 6, 4, lipschitz=0.7, epsilon=epsilon)
    for parameter in lben.parameters():
        nn.init.normal_(parameter)
    U, G, V, W = (t.detach() for t in (lben.U, lben.G, lben.V, lben.W))
    D = torch.diag((-lben.log_psi.detach()).exp())
    H = 2 * D - D @ W - W.T @ D - G.T @ G / 0.7 - D @ U @ U.T @ D / 0.7
    expected = 2 * V.T @ V + 2 * epsilon * torch.eye(6)
    # Terms of size ΛUU'Λ/L, up to about 1e2.
    size = float((D @ U @ U.T @ D / 0.7).abs().max()) + float(H.abs().max()) + 10.0
    assert float((H - expected).abs().max()) <= 1e-13 * size
    assert lc.check(lben.dae()).least_eigenvalue >= 2 * epsilon - 1e-13 * size


@pytest.mark.parametrize("rank", [0, 2, 6, 9])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.2])
def test_parameters_without_closed_form(rank: int, epsilon: float) -> None:
    """V of the square root, for H of full and of deficient rank; any ε up to λ_min(H)/2 rebuilds the same W."""
    dae = random_lben(rank=rank, epsilon=0.2)
    P = construct(dae, epsilon)
    assert not P.closed_form
    assert P.epsilon == epsilon
    assert P.lipschitz == dae.lipschitz
    W, U, G, Lambda = dae
    D, L = torch.diag(Lambda), dae.lipschitz
    H = 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L
    scale = 1e-13 * max(1.0, float((D @ W).abs().max()))
    assert float((P.V.T @ P.V - (H / 2 - epsilon * torch.eye(6))).abs().max()) <= scale
    assert torch.equal(P.G, G)
    assert torch.equal(P.U, U)
    np.testing.assert_allclose(P.Psi.numpy(), 1.0 / Lambda.numpy(), rtol=1e-15)
    np.testing.assert_allclose(P.S.numpy(), (-D @ W / 2).numpy(), rtol=1e-15)
    np.testing.assert_allclose(
        P.margin, np.linalg.eigvalsh((Lambda.rsqrt()[:, None] * H * Lambda.rsqrt()).numpy())[0], atol=1e-12
    )
    assert float(torch.linalg.matrix_norm(assemble_of(dae, epsilon) - W)) <= 1e-12


def test_epsilon_beyond_the_margin_is_refused() -> None:
    dae = random_lben(rank=2, epsilon=0.2)  # λ_min(H) = 0.4: ε up to 0.2
    with pytest.raises(NotPSDError) as caught:
        construct(dae, 0.21)
    # The least eigenvalue is that in the gauge Λ = I: −0.01 over an entry of Λ in (0.7, 2.5).
    assert -0.01 / 0.7 < caught.value.least_eigenvalue < -0.01 / 2.5
    assert "2.00e-01" in str(caught.value)
    for bad in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(InvalidParameterError):
            construct(dae, bad)
        with pytest.raises(InvalidParameterError):
            construct(dae, 0.0, bad)


@pytest.mark.parametrize("kind", ["sll", "cpl"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_epsilon_needs_delta_where_H_is_singular(kind: str, size: int, random_model: Models) -> None:
    dae = lc.to_dae(random_model(kind, size, 1))
    for epsilon in (1e-8, 1e-3):
        with pytest.raises(NotPSDError) as caught:
            construct(dae, epsilon)
        assert caught.value.least_eigenvalue < 0.0
        assert "delta" in str(caught.value)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("epsilon", "delta"), [(1e-3, 1e-1), (0.0, 1e-1), (1e-5, 1e-3), (1e-8, 1e-6)])
def test_delta_allows_epsilon_and_keeps_W(kind: str, epsilon: float, delta: float, random_model: Models) -> None:
    model = random_model(kind, 3, 1)
    dae = lc.to_dae(model)
    # ε up to about δ/10 is promised in the gauge Λ = I; H scales with Λ, so the smallest entry counts.
    epsilon *= min(1.0, float(dae.Lambda.min()))
    P = construct(dae, epsilon, delta)
    assert P.lipschitz == pytest.approx(dae.lipschitz * (1.0 + delta), rel=1e-15)
    assert not P.closed_form
    assert float(torch.linalg.matrix_norm(assemble_of(dae, epsilon, delta) - dae.W)) <= 1e-12
    lben = LBEN.from_dae(dae, epsilon, delta)
    assert lben.lipschitz == P.lipschitz
    assert lben.epsilon == epsilon
    x = torch.randn(5, dae.inputs)
    with torch.no_grad():
        expected = model(x)
        assert float((lben(x) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
    # (0.6) at the inflated constant: strictly positive by 2ε.
    W, U, G, L = lben.W.detach(), lben.U.detach(), lben.G.detach(), lben.lipschitz
    D = torch.diag(1.0 / lben.Psi.detach())
    H = 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L
    assert float(torch.linalg.eigvalsh(H)[0]) >= 2.0 * epsilon - 1e-12


def test_H_that_is_not_psd_is_refused_with_its_eigenvalue() -> None:
    one = torch.ones(1, 1)
    dae = DAE(0.0 * one, one, 1.5 * one, torch.ones(1), name="tail")  # H = 2 − 2.25 − 1
    with pytest.raises(NotPSDError) as caught:
        construct(dae)
    assert caught.value.least_eigenvalue == pytest.approx(-1.25, rel=1e-14)
    assert "'tail'" in caught.value.where
    # 1e-6 too large a weight is seen, and named for what it is whether rows are given or not.
    for V in (None, 0.0 * one):
        with pytest.raises(NotPSDError) as caught:
            construct(DAE(0.0 * one, one, (1.0 + 1e-6) * one, torch.ones(1), V=V))
        assert "H(Λ, L)" in caught.value.where
    construct(DAE(0.0 * one, one, one, torch.ones(1)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_closed_form_rows_that_do_not_belong_to_H_are_refused(kind: str, random_model: Models) -> None:
    dae = lc.to_dae(random_model(kind, 4, 2))
    assert dae.V is not None
    assert construct(dae).closed_form
    other = dae.V.clone(memory_format=torch.contiguous_format)
    other.view(-1)[other.abs().argmax()] += 1e-6
    for wrong in (other, 1.001 * dae.V, torch.zeros(1, dae.states)):
        with pytest.raises(InvalidParameterError) as caught:
            construct(replace(dae, V=wrong))
        assert dae.name in caught.value.where
    # More rows with the same V'V are fine, and so is none: then it is the square root.
    turn, _ = torch.linalg.qr(torch.randn(len(dae.V) + 3, len(dae.V)))
    assert construct(replace(dae, V=turn @ dae.V)).closed_form
    plain = replace(dae, V=None)
    assert not construct(plain).closed_form
    assert float(torch.linalg.matrix_norm(assemble_of(plain) - dae.W)) <= 1e-12


def test_no_rows_say_that_H_is_zero(random_model: Models) -> None:
    dae = lc.to_dae(random_model("sll", 2, 1))
    assert dae.V is not None
    assert bool((dae.V != 0).any())
    with pytest.raises(InvalidParameterError):
        construct(replace(dae, V=dae.V[:0]))


def test_the_printed_23_is_refused() -> None:
    """The paper's rows for Sandwich with + B_n'Φ_n: their V'V has the wrong sign off the diagonal. (FORMULAS P10)"""
    layers = [sandwich.SandwichLinear(3, 3, activation=nn.ReLU()) for _ in range(2)]
    layers.append(sandwich.SandwichLinear(3, 3))
    dae = lc.to_dae(nn.Sequential(*layers))
    (A0, B1), (A1, B2) = ((a.AB()[0].detach(), b.AB()[1].detach()) for a, b in itertools.pairwise(layers))
    rest = torch.eye(3) - B2.T @ B2
    values, vectors = torch.linalg.eigh(rest)
    last = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T @ A1.T  # Φ = I
    for sign in (-1.0, 1.0):
        V = torch.cat([torch.cat([A0.T, sign * B1.T], 1), torch.cat([torch.zeros(3, 3), last], 1)])
        if sign < 0:
            assert construct(replace(dae, V=V)).closed_form
        else:
            with pytest.raises(InvalidParameterError):
                construct(replace(dae, V=V))


@pytest.mark.parametrize("kind", NETWORKS)
def test_bad_scaling_costs_no_digits(kind: str, random_model: Models) -> None:
    """States scaled over twelve decades: W is rebuilt to round-off of its entries, and the closed form still passes."""
    dae = lc.to_dae(random_model(kind, 4, 1))
    D = torch.logspace(-6, 6, dae.states)
    scaled = lc.gauge(dae, D)
    for candidate in (scaled, replace(scaled, V=None)):
        back = assemble_of(candidate) * D / D.unsqueeze(1)
        assert float((back - dae.W).abs().max()) <= 1e-12


def test_assemble_is_equation_2() -> None:
    Psi, G, U, V, S = torch.rand(4) + 0.5, torch.randn(2, 4), torch.randn(4, 3), torch.randn(5, 4), torch.randn(4, 4)
    P = torch.diag(Psi)
    inverse = torch.linalg.inv(P)
    inner = G.T @ G / 1.6 + inverse @ U @ U.T @ inverse / 1.6 + V.T @ V + S - S.T + 0.3 * torch.eye(4)
    # Sums of a dozen products of O(1) to O(10).
    np.testing.assert_allclose(
        assemble(Psi, G, U, V, S, 0.3, 0.8).numpy(), (torch.eye(4) - P @ inner).numpy(), atol=1e-13, rtol=1e-13
    )
    single = assemble(*(t.float() for t in (Psi, G, U, V, S)), 0.3, 0.8)
    assert single.dtype == torch.float32


def test_zero_pattern_survives() -> None:
    """S = −ΛW/2 keeps the zeros of W, and with them the blocks that substitution goes by."""
    torch.manual_seed(3)
    layers = [sll.SLLLinear(2, 3) for _ in range(3)]
    dae = lc.to_dae(nn.Sequential(*layers))
    P = construct(dae)
    assert bool((P.S[dae.W == 0] == 0).all())
    lben = LBEN.from_dae(dae)
    assert sum(lben.blocks) == dae.states
    assert lben.sigma == Activations.of([("identity", 2), ("relu", 9)])
    with torch.no_grad():
        assert lben.solve(torch.randn(4, 2)).method == "forward_substitution"
        x = torch.randn(4, 2)
        y = x
        for layer in layers:
            s = functional.relu(y @ layer.weight.T + layer.bias)
            y = y - 2.0 * (s / layer.T()) @ layer.weight
        assert float((lben(x) - y).abs().max()) <= 1e-13


@pytest.mark.parametrize("grid", [Grid(), Grid((2, 3))], ids=["dense", "grid"])
@pytest.mark.parametrize("kind", ["relu", "maxmin"])
def test_an_activation_by_itself(kind: str, grid: Grid) -> None:
    """H = 0: V has no rows."""
    dae = lc.elementwise("relu", 4, grid=grid) if kind == "relu" else lc.max_min(4, grid=grid)
    x = torch.randn(3, 4, *grid.image)
    with torch.no_grad():
        y = LBEN.from_dae(dae)(x)
    expected = x.relu() if kind == "relu" else torch.cat([x[:, :2].maximum(x[:, 2:]), x[:, :2].minimum(x[:, 2:])], 1)
    np.testing.assert_allclose(y.numpy(), expected.numpy(), atol=1e-14)


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 2), (2, 4)]


def first_rows(M: Tensor, rows: int, columns: int, image: tuple[int, ...]) -> Tensor:
    """The kernels of a circulant matrix: what the first pixel of each channel reads."""
    pixels = image[0] * image[1]
    return M.reshape(rows, pixels, columns, pixels)[:, 0].reshape(rows, columns, *image)


def dense_W(lben: LBEN) -> Tensor:
    """Equation (2) with the circulant matrices of the module's kernels."""
    pixels, L = lben.grid.pixels, lben.lipschitz
    G, U, V, S = (circulant(t.detach()) for t in (lben.G, lben.U, lben.V, lben.S))
    Psi = torch.diag(lben.Psi.detach().repeat_interleave(pixels))
    inverse, eye = torch.diag(1.0 / Psi.diagonal()), torch.eye(len(Psi))
    inner = G.T @ G / (2 * L) + inverse @ U @ U.T @ inverse / (2 * L) + V.T @ V + S - S.T + lben.epsilon * eye
    return eye - Psi @ inner


def dense_H(dae: DAE) -> Tensor:
    """H(Λ, L) of the dense form (`densify` is held to entry by entry in test_compose.py)."""
    W, U, G, Lambda = lc.densify(dae)
    D, L = torch.diag(Lambda), dae.lipschitz
    return 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L


def random_image_lben(
    image: tuple[int, int], rank: int = 4, L: float = 1.4, epsilon: float = 0.2
) -> tuple[DAE, Tensor]:
    """W of four channels from (0.4) written out on flattened images, and H(Ψ⁻¹, L) = 2V'V + 2εI."""
    n, pixels = 4, image[0] * image[1]
    K = [torch.randn(*s, *image) / pixels**0.5 for s in ((n, 3), (2, n), (rank, n), (n, n))]
    U, G, V, S = map(circulant, K)
    psi = torch.rand(n) + 0.4
    Psi = torch.diag(psi.repeat_interleave(pixels))
    inverse, eye = torch.diag(1.0 / Psi.diagonal()), torch.eye(n * pixels)
    inner = G.T @ G / (2 * L) + inverse @ U @ U.T @ inverse / (2 * L) + V.T @ V + S - S.T + epsilon * eye
    W = matrices(first_rows(eye - Psi @ inner, n, n, image))
    dae = DAE(
        W, matrices(K[0]), matrices(K[1]), 1.0 / psi, torch.randn(n), torch.randn(2), lipschitz=L, grid=Grid(image)
    )
    return dae, 2.0 * V.T @ V + 2.0 * epsilon * eye


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.2])
def test_parameters_without_closed_form_on_images(image: tuple[int, int], rank: int, epsilon: float) -> None:
    dae, H = random_image_lben(image, rank)
    P = construct(dae, epsilon)
    assert not P.closed_form
    scale = max(1.0, float(H.abs().max()))
    # V is a real convolution with V'V = H/2 − εI on flattened images; where that is 0, V is √(round-off) of any phase.
    V = dae.grid.kernels(P.V)
    singular = rank == 1 and epsilon == 0.2
    np.testing.assert_allclose(matrices(V).numpy(), P.V.numpy(), atol=1e-7 if singular else 1e-12 * scale)
    half = H / 2 - epsilon * torch.eye(len(H))
    assert float((circulant(V).T @ circulant(V) - half).abs().max()) <= 1e-12 * scale
    root = dae.Lambda.rsqrt().repeat_interleave(dae.grid.pixels)
    margin = np.linalg.eigvalsh((root[:, None] * H * root).numpy())[0]
    np.testing.assert_allclose(P.margin, margin, atol=1e-12 * scale)
    np.testing.assert_allclose(P.S.numpy(), (-0.5 * dae.Lambda[:, None] * dae.W).numpy(), rtol=1e-14)
    assert float(torch.linalg.matrix_norm(assemble_of(dae, epsilon) - dae.W).max()) <= 1e-12
    lben = LBEN.from_dae(dae, epsilon)
    W = lc.densify(dae).W
    assert float(torch.linalg.matrix_norm(dense_W(lben) - W)) <= 1e-12 * scale
    with pytest.raises(NotPSDError):
        construct(dae, float(np.linalg.eigvalsh(H.numpy())[0]) / 2.0 + 0.01)


def conv_chain(image: tuple[int, int], seed: int) -> tuple[nn.Module, DAE]:
    """Three residual convolutions with kernels of several sizes, deeper than wide."""
    torch.manual_seed(seed)
    kind = sll.SLLConv2d if seed % 2 else cpl.CPLConv2d
    sigma = [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.2)]
    layers = [kind(2, h, kernel_size=k, activation=sigma[seed % 3]) for h, k in ((3, 3), (1, (2, 3)), (2, 1))]
    for layer in layers:
        nn.init.normal_(layer.bias)
    model = nn.Sequential(*layers)
    return model, lc.to_dae(model, input_shape=(2, *image))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_convolutions(image: tuple[int, int], seed: int) -> None:
    """W rebuilt, outputs, zero pattern, H ⪰ 0 and float32, on the grid and through equation (2) on flattened images."""
    model, dae = conv_chain(image, seed)
    assert dae.grid == Grid(image)
    assert construct(dae).closed_form
    lben, x = LBEN.from_dae(dae), 2.0 * torch.randn(4, 2, *image)
    with torch.no_grad():
        y, expected = lben(x), model(x)
        assert float((y - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
        assert lben.solve(x).method == "forward_substitution"
    assert lben.lipschitz == dae.lipschitz == 1.0
    root = dae.Lambda.sqrt()
    gauged = root[:, None] * (lben.W.detach() - dae.W) / root
    assert float(torch.linalg.matrix_norm(gauged).max()) <= 1e-12
    wide = root.repeat_interleave(dae.grid.pixels)
    assert float(torch.linalg.matrix_norm(wide[:, None] * (dense_W(lben) - lc.densify(dae).W) / wide)) <= 1e-12
    P = construct(dae)
    assert bool((P.S[dae.W == 0] == 0).all())
    H = dense_H(lben.dae()) / wide[:, None] / wide
    assert float(torch.linalg.eigvalsh(H)[0]) >= -1e-12
    with torch.no_grad():
        single = lben.float()(x.float())
        assert float((single - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("image", [(1, 3), (3, 2)])
@pytest.mark.parametrize(("epsilon", "delta"), [(1e-3, 1e-1), (0.0, 1e-1), (1e-5, 1e-3)])
def test_delta_allows_epsilon_on_images(image: tuple[int, int], epsilon: float, delta: float) -> None:
    model, dae = conv_chain(image, 1)
    epsilon *= min(1.0, float(dae.Lambda.min()))
    if epsilon:
        with pytest.raises(NotPSDError):
            construct(dae, epsilon)
    lben, x = LBEN.from_dae(dae, epsilon, delta), torch.randn(4, 2, *image)
    assert lben.lipschitz == pytest.approx(1.0 + delta, rel=1e-15)
    with torch.no_grad():
        expected = model(x)
        assert float((lben(x) - expected).abs().max()) <= 1e-10 * float(expected.abs().max())
        for parameter in lben.parameters():  # 2ε is a floor that no step of an optimiser moves
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert float(torch.linalg.eigvalsh(dense_H(lben.dae()))[0]) >= 2.0 * epsilon - 1e-11


@pytest.mark.parametrize("image", [(1, 3), (3, 2)])
def test_closed_form_rows_that_are_wrong_at_one_frequency_are_refused(image: tuple[int, int]) -> None:
    _, dae = conv_chain(image, 1)
    assert dae.V is not None
    for frequency in range(len(dae.V)):
        wrong = dae.V.clone()
        wrong[frequency, 0, int(wrong[frequency, 0].abs().argmax())] += 1e-6
        with pytest.raises(InvalidParameterError):
            construct(replace(dae, V=wrong))
    # More rows with the same V'V, and none at all.
    turn, _ = torch.linalg.qr(torch.randn(dae.V.shape[-2] + 3, dae.V.shape[-2]))
    assert construct(replace(dae, V=turn.to(torch.complex128) @ dae.V)).closed_form
    plain = replace(dae, V=None)
    assert not construct(plain).closed_form
    assert float(torch.linalg.matrix_norm(assemble_of(plain) - dae.W).max()) <= 1e-12


@pytest.mark.parametrize("field", ["U", "G", "V"])
def test_a_spectrum_that_no_real_kernel_has_is_not_replaced_by_another(field: str) -> None:
    """At frequency 0 a real convolution is real. A phase there leaves H as it is, but no kernel has it. (FORMULAS 4)"""
    _, dae = conv_chain((3, 2), 1)
    turned = getattr(dae, field).clone()
    turned[0] *= 1j
    try:
        lben = LBEN.from_dae(replace(dae, **{field: turned}))
    except LipconvertError:
        return
    found = dict(zip(("W", "U", "G"), lben.matrices(), strict=True))["W" if field == "V" else field]
    expected = dae.W if field == "V" else turned
    np.testing.assert_allclose(found.detach().numpy(), expected.numpy(), atol=1e-12 * float(expected.abs().max()))


def test_H_that_is_not_psd_at_one_frequency_is_refused() -> None:
    K = torch.zeros(1, 1, 1, 4)
    K[0, 0, 0, 0], K[0, 0, 0, 1] = 1.0, 0.5  # |K̂| = 1.5 at frequency 0, 0.5 at the highest
    eye = torch.eye(1, dtype=torch.complex128).expand(3, 1, 1)
    dae = DAE(0.0 * eye, eye, matrices(K), torch.ones(1), grid=Grid((1, 4)), name="tail")
    with pytest.raises(NotPSDError) as caught:
        construct(dae)
    assert caught.value.least_eigenvalue == pytest.approx(2.0 - 2.25 - 1.0, rel=1e-14)
    construct(dae.derive(G=dae.G / 1.5))


def test_assemble_is_equation_2_at_every_frequency() -> None:
    Psi = torch.rand(4) + 0.5
    G, U, V, S = (torch.randn(6, *s, dtype=torch.complex128) for s in ((2, 4), (4, 3), (5, 4), (4, 4)))
    W = assemble(Psi, G, U, V, S, 0.3, 0.8)
    P, inverse, eye = np.diag(Psi.numpy()), np.diag(1.0 / Psi.numpy()), np.eye(4)
    for found, g, u, v, s in zip(*(t.numpy() for t in (W, G, U, V, S)), strict=True):
        u = inverse @ u
        inner = (g.conj().T @ g + u @ u.conj().T) / 1.6 + v.conj().T @ v + s - s.conj().T + 0.3 * eye
        np.testing.assert_allclose(found, eye - P @ inner, atol=1e-13, rtol=1e-13)
