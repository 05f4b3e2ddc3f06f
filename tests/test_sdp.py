"""LipSDP by an interior-point solver: the least constants by another road, and what `tighten` finds next to them.

The solver is on cvxpy's side of the fence: what is compared is its optimum, and what its multiplier proves.
"""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor

import lipconvert as lc
from lipconvert import Grid, InvalidParameterError, NoCertificateError, ShapeError
from lipconvert.certification import sdp
from lipconvert.certification.bounds import class_pairs
from lipconvert.certification.proofs import Enclosure, Proof, prove_constant, prove_gains, prove_lmi
from lipconvert.certification.sdp import sdp_gain, sdp_output
from lipconvert.certification.tighten import LAST, best_gains, best_outputs

solver = pytest.mark.skipif(
    find_spec("cvxpy") is None or find_spec("clarabel") is None,
    reason="the extra sdp (cvxpy, clarabel) is not installed",
)

# ρ by the solver against the minimum, relative: its own tolerance, and what a network that is tight everywhere costs.
SOLVED = 2e-5
# ... and of what Newton finds: the gap of the central path at its end, 1/LAST, and what centring leaves.
CLOSE = 3e-5
MOST = 40  # states of the examples compared: a program with n of them costs n⁶ or so
NAMES = [p.name for p in lc.registry().plugins() if p.error is None]

Function = Callable[[Tensor], Tensor]
Network = tuple[lc.DAE, Function]


def examples(name: str) -> Iterator[Network]:
    """The dense stages of a plugin's example models, as DAEs and as modules."""
    for seed in (0, 1):
        for model in lc.registry().example_models(name, seed):
            for stage in lc.convert(model.double().eval(), check=False).stages:
                dae = stage.running()
                if not dae.grid and dae.states <= MOST:
                    yield dae, stage


def random_dae(states: int, inputs: int, outputs: int, seed: int, spread: float) -> Network:
    """An LBEN with random weights, its states in a gauge of sizes between 10^−spread and 10^spread."""
    torch.manual_seed(seed)
    net = lc.LBEN(inputs, states, outputs, lipschitz=0.5 + seed, epsilon=0.05).double()
    dae = lc.gauge(net.dae(), 10.0 ** (spread * (2.0 * torch.rand(states) - 1.0)))
    return dae, net


def quotient(f: Function, g: Tensor, inputs: int, points: int = 4) -> float:
    """The largest ‖g′J‖₂ of a function's central differences at random points: no Lipschitz constant of g′f is below it.

    A piecewise linear function has its exact slope there, unless a kink lies within the step.
    """
    torch.manual_seed(3)
    steepest, step = 0.0, 1e-5 * torch.eye(inputs)
    with torch.no_grad():
        for x in torch.randn(points, inputs):
            J = (f(x + step) - f(x - step)) / 2e-5  # (inputs, outputs)
            steepest = max(steepest, float(torch.linalg.matrix_norm(J @ g.mT, 2)))
    return steepest


def largest(E: Enclosure, Q: Tensor) -> float:
    """λ_max(GR(Q)⁻¹G′) with R in the gauge Q = I."""
    root = Q.sqrt()
    W, U, G = root.unsqueeze(-1) * E.W / root, root.unsqueeze(-1) * E.U, E.G / root
    R = 2.0 * torch.eye(len(Q)) - W - W.T - U @ U.T
    return float(torch.linalg.eigvalsh(G @ torch.linalg.solve(R, G.T)).max())


def start_of(dae: lc.DAE) -> Tensor:
    proof = prove_constant(dae)
    assert isinstance(proof, Proof)
    return proof.Lambda / proof.lipschitz


def compare_gains(dae: lc.DAE, f: Function) -> None:
    """One functional of the output: Newton finds the optimum of the program, both are proved and above true slopes."""
    E, weights = Enclosure.of(dae), torch.zeros(1, dae.outputs)
    weights[0, 0] = 1.0
    weights[0, -1] -= float(dae.outputs > 1)
    g = weights @ dae.G
    Q, rho = sdp_gain(E, g[0])
    least = float(prove_gains(E, Q, g)[0])
    assert least == pytest.approx(rho, rel=SOLVED)
    rough, close = (best_gains(E, start_of(dae), g.unsqueeze(0), last=last)[0] for last in (LAST, 1e6))
    tightened, limit = (float(prove_gains(E, Q, g)[0]) for Q in (rough, close))
    assert limit == pytest.approx(rho, rel=2.0 * SOLVED)
    assert rho * (1.0 - SOLVED) <= tightened <= rho * (1.0 + CLOSE)
    assert 0.0 < quotient(f, weights, dae.inputs) <= min(least, tightened) ** 0.5 * (1.0 + 1e-6)


def compare_outputs(dae: lc.DAE, f: Function) -> None:
    """The same for the output as a vector."""
    E = Enclosure.of(dae)
    Q, rho = sdp_output(E)
    assert largest(E, Q) == pytest.approx(rho, rel=SOLVED)
    L = rho**0.5 * (1.0 + SOLVED)
    assert prove_lmi(E, Q * L, L)
    assert rho**0.5 <= dae.lipschitz * (1.0 + SOLVED)
    assert quotient(f, torch.eye(dae.outputs), dae.inputs) <= rho**0.5 * (1.0 + SOLVED)
    found = best_outputs(E, start_of(dae))
    tightened = largest(E, found)
    L = tightened**0.5 * (1.0 + 1e-7)
    assert prove_lmi(E, found * L, L)
    assert rho * (1.0 - SOLVED) <= tightened <= rho * (1.0 + CLOSE)


@solver
@pytest.mark.parametrize("compare", [compare_gains, compare_outputs])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, compare: Callable[[lc.DAE, Function], None]) -> None:
    compared = 0
    for dae, f in examples(name):
        compare(dae, f)
        compared += 1
    assert compared >= 4


@solver
@pytest.mark.parametrize("compare", [compare_gains, compare_outputs])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 1), (6, 3, 4), (11, 4, 3), (16, 20, 2)])
def test_random_networks_in_any_gauge(
    shape: tuple[int, int, int], spread: float, compare: Callable[[lc.DAE, Function], None]
) -> None:
    compare(*random_dae(*shape, seed=sum(shape), spread=spread))


@solver
def test_a_grid_in_its_dense_form() -> None:
    torch.manual_seed(0)
    net = lc.LBEN(2, 2, 1, image=(2, 3), epsilon=0.05).double()
    for compare in (compare_gains, compare_outputs):
        compare(lc.densify(net.dae()), lambda x: net(x.reshape(-1, 2, 2, 3)).flatten(1))


@solver
@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_read_one_number(seed: int) -> None:
    """W = 0, one input: ρ = ((a + b)/2)² with a = Σ|g_ku_k|, b = |Σg_ku_k|, which a choice of slopes reaches."""
    torch.manual_seed(seed)
    u, g = torch.randn(5), torch.randn(5)
    a, b = (g * u).abs().sum(), (g * u).sum().abs()
    _, rho = sdp_gain(Enclosure(torch.zeros(5, 5), u.unsqueeze(-1), torch.zeros(1, 5)), g)
    assert rho == pytest.approx(float(((a + b) / 2.0).square()), rel=SOLVED)


@solver
def test_neurons_that_read_orthogonal_directions() -> None:
    """W = 0, UU′ = diag(u²), G = diag(g): ρ = Σ g_k²u_k² for their sum, max |g_ku_k|² for the vector."""
    torch.manual_seed(0)
    u, g = torch.rand(4) + 0.5, torch.randn(4)
    E = Enclosure(torch.zeros(4, 4), u.unsqueeze(-1) * torch.linalg.qr(torch.randn(6, 4)).Q.T, torch.diag(g))
    assert sdp_gain(E, g)[1] == pytest.approx(float((g * u).square().sum()), rel=SOLVED)
    assert sdp_output(E)[1] == pytest.approx(float((g * u).square().max()), rel=SOLVED)


@solver
def test_scales_of_inputs_and_outputs() -> None:
    dae, _ = random_dae(6, 3, 2, seed=1, spread=0.0)
    _, rho = sdp_gain(Enclosure.of(dae), dae.G[0])
    for alpha, beta in ((1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1e4, 1e4)):
        E = Enclosure(dae.W, alpha * dae.U, beta * dae.G)
        Q, scaled = sdp_gain(E, E.G[0])
        assert scaled == pytest.approx((alpha * beta) ** 2 * rho, rel=SOLVED)
        assert float(prove_gains(E, Q, E.G[:1])[0]) == pytest.approx(scaled, rel=SOLVED)


@solver
def test_states_that_read_nothing_and_states_that_nobody_reads() -> None:
    dae, _ = random_dae(6, 3, 2, seed=2, spread=0.0)
    _, rho = sdp_gain(Enclosure.of(dae), dae.G[0])
    n = dae.states
    W, U, G = torch.zeros(n + 2, n + 2), torch.zeros(n + 2, 3), torch.zeros(2, n + 2)
    W[:n, :n], U[:n], G[:, :n] = dae.W, dae.U, dae.G
    W[:n, n], G[:, n] = torch.randn(n), torch.randn(2)  # read, reads nothing
    W[n + 1, :n] = torch.randn(n)  # reads, not read
    E = Enclosure(W, U, G)
    Q, found = sdp_gain(E, G[0])
    assert found == pytest.approx(rho, rel=1e-4)
    assert float(prove_gains(E, Q, G[:1])[0]) == pytest.approx(rho, rel=1e-4)


@solver
def test_constant_functions() -> None:
    """g = 0 or U = 0: ρ = 0, with a multiplier that is valid for other functionals, too."""
    dae, _ = random_dae(5, 3, 2, seed=3, spread=0.0)
    Q, rho = sdp_gain(Enclosure.of(dae), torch.zeros(5))
    assert rho == 0.0
    assert bool(torch.isfinite(prove_gains(Enclosure.of(dae), Q, dae.G)[0]).all())
    still = Enclosure(dae.W, torch.zeros(5, 3), dae.G)
    for Q, rho in (sdp_gain(still, dae.G[0]), sdp_output(still)):
        assert rho == 0.0
        assert float(prove_gains(still, Q, dae.G)[0].max()) < 1e-9
    empty = Enclosure(torch.zeros(0, 0), torch.zeros(0, 3), torch.zeros(2, 0))
    assert sdp_output(empty)[1] == 0.0


def mixture(seed: int) -> tuple[torch.nn.Module, int]:
    """Layers of all architectures, glue and activations in random order, and the number of inputs."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    width = inputs = pick.randint(2, 4)
    layers: list[torch.nn.Module] = []
    for kind in pick.choices(KINDS, k=pick.randint(2, 4)) + ["linear"] * pick.randint(0, 1):
        following, inner = pick.randint(2, 4), pick.randint(1, 3)
        if kind == "maxmin" and width % 2:
            layers.append(torch.nn.Linear(width, width + 1))
            width += 1
        layer, resized = {
            "lben": (lc.LBEN(width, inner, following, epsilon=0.05), True),
            "some linear": (some_linear(width, following, pick), True),
            "mondeq": (MonDEQ(width, inner, following), True),
            "sll": (SLLLinear(width, inner), False),
            "cpl": (CPLLinear(width, inner), False),
            "aol": (torch.nn.Sequential(AOLLinear(width, following), torch.nn.ReLU()), True),
            "sandwich": (SandwichLinear(width, following), True),
            "linear": (torch.nn.Linear(width, following), True),
            "normalize": (lc.Normalize(0.5, (0.5 + torch.rand(width)).tolist()), False),
            "maxmin": (lc.MaxMin(), False),
            "relu": (torch.nn.ReLU(), False),
            "identity": (torch.nn.LeakyReLU(1.0), False),
            "tanh": (torch.nn.Tanh(), False),
        }[kind]
        layers.append(layer)
        width = following if resized else width
    return torch.nn.Sequential(*layers).double().eval(), inputs


KINDS = ("lben", "some linear", "mondeq", "sll", "cpl", "aol", "sandwich", "linear", "linear", "normalize", "normalize")
KINDS += ("maxmin", "relu", "identity", "tanh")


def some_linear(inputs: int, outputs: int, pick: random.Random) -> lc.LBEN:
    """A true equilibrium of which some rows are linear, which read one another."""
    dae = lc.LBEN(inputs, 4, outputs, epsilon=0.05).double().dae()
    rows = [(pick.choice(["identity", "identity", "relu", "tanh"]), 1) for _ in range(4)]
    return lc.LBEN.from_dae(dae.derive(activations=lc.Activations.of(rows), blocks=(4,)))


def feed_through(net: lc.Network) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(A, B, C, D) with v = As + Bx, y = Cs + Dx up to biases, s the neurons whose activation is not linear."""
    p = net.input_shape[0]
    rows: list[tuple[np.ndarray, np.ndarray]] = []  # what each row reads of the rows before and beside it, and of x
    linear: list[bool] = []
    of_z, of_x = np.zeros((p, 0)), np.eye(p)  # the signal between two steps
    for step in net.steps:
        if type(step) is lc.Normalize:
            scale = 1.0 / step.std.numpy().reshape(-1, 1)
            of_z, of_x = scale * of_z, scale * of_x
            continue
        dae = step.running() if isinstance(step, lc.LBEN) else lc.max_min(len(of_x))
        assert isinstance(step, lc.LBEN | lc.MaxMin)
        W, U, G = dae.W.numpy(), dae.U.numpy(), dae.G.numpy()
        before = len(linear)
        for k in range(len(W)):
            rows.append((np.concatenate([np.pad(U[k] @ of_z, (0, before - of_z.shape[1])), W[k]]), U[k] @ of_x))
        linear += [str(a) in ("identity", "leaky_relu(1.0)") for a, size in dae.sigma for _ in range(size)]
        of_z, of_x = np.concatenate([np.zeros((len(G), before)), G], 1), np.zeros((len(G), p))
    n, e = len(linear), np.array(linear, dtype=bool)
    W = np.stack([np.pad(row, (0, n - len(row))) for row, _ in rows])
    U, s = np.stack([row for _, row in rows]), ~e
    G = np.pad(of_z, ((0, 0), (0, n - of_z.shape[1])))
    regular = np.eye(e.sum()) - W[np.ix_(e, e)]
    E, F = np.linalg.solve(regular, W[np.ix_(e, s)]), np.linalg.solve(regular, U[e])
    into = W[np.ix_(s, e)]
    return W[np.ix_(s, s)] + into @ E, U[s] + into @ F, G[:, s] + G[:, e] @ E, of_x + G[:, e] @ F


def lipsdp(A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray) -> float:
    """√ρ, the least with ρ|x|² − |Cs + Dx|² − 2⟨As + Bx − s, s⟩_Λ ≥ 0 for all s, x and a diagonal Λ ≥ 0."""
    import cvxpy

    n = len(A)
    if not n:
        return float(np.linalg.norm(D, 2))
    B, D = np.split(np.linalg.qr(np.concatenate([B, D]).T, mode="r").T, [n])  # x where it is seen
    weights, rho = cvxpy.Variable(n, nonneg=True), cvxpy.Variable()
    half = cvxpy.diag(weights) @ (np.eye(n) - A)
    corner = -(cvxpy.diag(weights) @ B) - C.T @ D
    M = cvxpy.bmat([[half + half.T - C.T @ C, corner], [corner.T, rho * np.eye(D.shape[1]) - D.T @ D]])
    problem = cvxpy.Problem(cvxpy.Minimize(rho), [M >> 0])
    for equilibrate, tolerance in itertools.product((True, False), (1e-10, 1e-9, 1e-8, 1e-7)):
        options = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it would warn of is in the status
            problem.solve(solver=cvxpy.CLARABEL, equilibrate_enable=equilibrate, **options)
        if problem.status == cvxpy.OPTIMAL:
            return float(problem.value) ** 0.5
    return float("nan")


# Constants next to the optimum of LipSDP, relative.
OPTIMAL = 1e-6


@solver
@pytest.mark.parametrize("seed", range(30))
def test_linear_rows_count_as_linear_wherever_they_are(seed: int) -> None:
    """The optimum of LipSDP stated for the neurons alone, for all pairs of outputs and for their vector."""
    model, inputs = mixture(seed)
    net = lc.convert(model, (inputs,), merge=bool(seed % 2), check=False)
    found = lc.lipschitz_bound(net)
    A, B, C, D = feed_through(net)
    assert found.pairs is not None
    for i, j in class_pairs(len(found.pairs)):
        least = lipsdp(A, B, C[[i]] - C[[j]], D[[i]] - D[[j]])
        assert least * (1.0 - OPTIMAL) <= float(found.pairs[i, j]) <= least * (1.0 + OPTIMAL)
    assert found.lipschitz == pytest.approx(lipsdp(A, B, C, D), rel=OPTIMAL)


@solver
@pytest.mark.parametrize("seed", range(0, 30, 10))
def test_the_solver_finds_the_same_of_mixtures(seed: int) -> None:
    model, inputs = mixture(seed)
    net = lc.convert(model, (inputs,), check=False)
    tightened, by_solver = lc.lipschitz_bound(net), lc.lipschitz_bound(net, "sdp")
    assert by_solver.lipschitz == pytest.approx(tightened.lipschitz, rel=SOLVED)
    assert tightened.pairs is not None
    assert by_solver.pairs is not None
    torch.testing.assert_close(by_solver.pairs, tightened.pairs, rtol=SOLVED, atol=1e-9)


@solver
def test_a_whole_network() -> None:
    """``method="sdp"`` agrees with the search, for the vector and for every pair of classes."""
    torch.manual_seed(0)
    net = lc.convert(torch.nn.Sequential(lc.LBEN(5, 9, 4, epsilon=0.05).double()))
    tightened, by_solver = lc.lipschitz_bound(net), lc.lipschitz_bound(net, "sdp")
    assert by_solver.lipschitz == pytest.approx(tightened.lipschitz, rel=CLOSE)
    assert tightened.pairs is not None
    assert by_solver.pairs is not None
    torch.testing.assert_close(by_solver.pairs, tightened.pairs, rtol=CLOSE, atol=0.0)


# Errors


@solver
def test_no_multiplier() -> None:
    """z = σ(2z + x) is not well-posed, nor is z₁ = σ(3z₂ + x₁), z₂ = σ(3z₁ + x₂): X(Λ) ≻ 0 for no Λ > 0."""
    E = Enclosure(2.0 * torch.eye(2), torch.eye(2), torch.eye(2))
    crossed = Enclosure(3.0 * torch.eye(2).flip(0), torch.eye(2), torch.eye(2))
    for find in (lambda E: sdp_gain(E, torch.ones(2)), sdp_output):
        with pytest.raises(NoCertificateError, match=r"W has 1 or more on its diagonal"):
            find(E)
        with pytest.raises(NoCertificateError, match=r"no diagonal multiplier .*'infeasible"):
            find(crossed)


@solver
@pytest.mark.parametrize("status", ["optimal_inaccurate", "user_limit", "unbounded"])
def test_a_solver_that_does_not_end_well(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cvxpy

    tolerances: list[float] = []
    dae, _ = random_dae(3, 2, 1, seed=0, spread=0.0)
    monkeypatch.setattr(cvxpy.Problem, "solve", lambda *args, **options: tolerances.append(options["tol_gap_rel"]))
    monkeypatch.setattr(cvxpy.Problem, "status", status)
    with pytest.raises(NoCertificateError, match=f"status '{status}'"):
        sdp_output(Enclosure.of(dae))
    assert tolerances == list(sdp.TOLERANCES)


@solver
def test_a_solver_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import cvxpy

    def fail(*args: object, **options: object) -> None:
        raise cvxpy.error.SolverError("it fell over")

    dae, _ = random_dae(3, 2, 1, seed=0, spread=0.0)
    monkeypatch.setattr(cvxpy.Problem, "solve", fail)
    with pytest.raises(NoCertificateError, match="it fell over"):
        sdp_output(Enclosure.of(dae))


@solver
def test_a_multiplier_on_the_boundary_is_asked_for_again_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins grow until there is a proof; without one at the last, an error."""
    dae, _ = random_dae(4, 3, 2, seed=1, spread=0.0)
    E = Enclosure.of(dae)
    margins: list[float] = []
    solve = sdp._solve

    def watched(cvxpy: object, W: Tensor, U: Tensor, G: Tensor, margin: float, where: str) -> tuple[Tensor, float]:
        margins.append(margin)
        return solve(cvxpy, W, U, G, margin, where)

    monkeypatch.setattr(sdp, "_solve", watched)
    proofs = iter([torch.tensor([float("inf")])] * 3)
    monkeypatch.setattr(sdp, "prove_gains", lambda *args: (next(proofs, torch.ones(1)), None))
    Q, rho = sdp_gain(E, dae.G[0])
    assert margins == list(sdp.MARGINS[:4])
    R = 2.0 * torch.diag(Q) - Q[:, None] * E.W - E.W.T * Q - Q[:, None] * (E.U @ E.U.T) * Q
    assert float(torch.linalg.eigvalsh(R - 1.9 * margins[-1] * torch.diag(Q)).min()) >= 0.0
    assert float(dae.G[0] @ torch.linalg.solve(R, dae.G[0])) == pytest.approx(rho, rel=1e-3)
    monkeypatch.setattr(sdp, "prove_gains", lambda *args: (torch.tensor([float("inf")]), None))
    with pytest.raises(NoCertificateError, match="has no proof"):
        sdp_gain(E, dae.G[0])


@solver
def test_what_it_does_not_take() -> None:
    E = Enclosure.of(lc.LBEN(2, 3, 2, image=(2, 3)).double().dae())
    with pytest.raises(InvalidParameterError, match="densify"):
        sdp_output(E)
    with pytest.raises(ShapeError, match="functional"):
        sdp_gain(Enclosure(torch.eye(3), torch.eye(3), torch.eye(3), Grid()), torch.ones(2))


@pytest.mark.parametrize("missing", ["cvxpy", "clarabel"])
def test_without_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidParameterError, match=r"pip install 'lipconvert\[sdp\]'"):
        sdp_output(Enclosure(torch.zeros(1, 1), torch.eye(1), torch.eye(1)))
