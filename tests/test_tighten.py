"""The search of multipliers against other roads: automatic derivatives of objectives written out densely, minima known in
closed form, one-dimensional minimisers, and what symmetries and convexity say.

Networks on a grid are compared with their dense form on flattened images, whose matrices know nothing of frequencies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

import lipconvert as lc
from lipconvert import Grid
from lipconvert.certification.bounds import class_pairs
from lipconvert.certification.proofs import Enclosure, prove_gains, prove_lmi
from lipconvert.certification.tighten import (
    MIDDLE,
    _derivatives,
    _evaluate,
    _Problem,
    best_gains,
    best_outputs,
    best_scales,
    least_gains,
    least_output,
)
from lipconvert.linalg.spectrum import DENSE

IMAGES = [(2, 2), (3, 3), (2, 3), (1, 4), (4, 1)]
# ρ of what was found, relative to the minimum: the gap of the central path at its end, 1/LAST, and what centring leaves.
CLOSE = 5e-6


@dataclass
class Case:
    """A network with a start: R(start) ≻ 0."""

    W: Tensor
    U: Tensor
    G: Tensor
    start: Tensor
    grid: Grid = DENSE

    @property
    def enclosure(self) -> Enclosure:
        return Enclosure(self.W, self.U, self.G, self.grid)


def feasible(W: Tensor, U: Tensor, G: Tensor, grid: Grid = DENSE) -> Case:
    """With a start τ·1, inside by half: R = τ(2I − W − W′) − τ²UU′ ≻ 0."""
    X = 2.0 * torch.eye(W.shape[-1]) - W - W.mH
    least, largest = float(torch.linalg.eigvalsh(X).min()), float(torch.linalg.matrix_norm(U, 2).amax()) ** 2
    assert least > 0.0
    return Case(W, U, G, torch.full((W.shape[-1],), 0.5 * least / max(largest, 1e-12)), grid)


def dense(n: int, p: int, q: int, seed: int, spread: float = 0.0) -> Case:
    """Random matrices in a random gauge D, the logarithms of whose entries are within ±spread."""
    torch.manual_seed(seed)
    case = feasible(torch.randn(n, n) * 0.5 / n**0.5 - 0.1 * torch.eye(n), torch.randn(n, p), torch.randn(q, n))
    D = 10.0 ** (spread * (2.0 * torch.rand(n) - 1.0))
    return gauged(case, D)


def gauged(case: Case, D: Tensor) -> Case:
    """W → DWD⁻¹, U → DU, G → GD⁻¹, Q → D⁻²Q."""
    return Case(D.unsqueeze(-1) * case.W / D, D.unsqueeze(-1) * case.U, case.G / D, case.start / D.square(), case.grid)


def on_grid(image: tuple[int, int], n: int = 3, p: int = 2, q: int = 2, seed: int = 0) -> tuple[Case, Case]:
    """Random real kernels as matrices for each frequency, and on flattened images: the states of a channel side by side."""
    torch.manual_seed(100 + seed)
    grid, size = Grid(image), math.prod(image)
    kernels = [
        torch.randn(n, n, *image) * 0.4 / (n * size) ** 0.5,
        torch.randn(n, p, *image),
        torch.randn(q, n, *image),
    ]
    W, U, G = (grid.matrices(K) for K in kernels)
    case = feasible(W, U, G, grid)
    flat = lc.densify(lc.DAE(W, U, G, torch.ones(n), grid=grid))
    return case, Case(flat.W, flat.U, flat.G, case.start.repeat_interleave(size))


def functionals(image: tuple[int, int], n: int, count: int) -> tuple[Tensor, Tensor]:
    """Random functionals of pixels: (count, F, n) of coordinates, and (count, n·h·w) of flattened images."""
    x = torch.randn(count, n, *image)
    return Grid(image).coordinates(x).transpose(1, 2), x.flatten(1)


def R(case: Case, Q: Tensor) -> Tensor:
    """2Q − QW − W′Q − QUU′Q with diagonal matrices written out."""
    D = torch.diag_embed(Q).to(case.W.dtype)
    return 2.0 * D - D @ case.W - case.W.mH @ D - D @ case.U @ case.U.mH @ D


def gain(case: Case, Q: Tensor, g: Tensor) -> Tensor:
    """Σ g′R(Q)⁻¹g over functionals (k, n) of a dense network."""
    return (g * torch.linalg.solve(R(case, Q), g.mT).mT).sum()


def largest(case: Case, Q: Tensor) -> float:
    """λ_max(GR(Q)⁻¹G′) over all frequencies."""
    M = case.G @ torch.linalg.solve(R(case, Q), case.G.mH)
    return float(torch.linalg.eigvalsh(0.5 * (M + M.mH)).max())


def inside(case: Case, Q: Tensor) -> bool:
    return bool((Q > 0.0).all()) and float(torch.linalg.eigvalsh(R(case, Q)).min()) > 0.0


def nearby(case: Case, count: int, seed: int = 0) -> Tensor:
    """Other multipliers with R ≻ 0, (count, n)."""
    torch.manual_seed(200 + seed)
    size = 0.3
    Q = case.start * (1.0 + size * (2.0 * torch.rand(count, len(case.start)) - 1.0))
    while not all(inside(case, row) for row in Q):
        size *= 0.5
        Q = case.start * (1.0 + size * (2.0 * torch.rand(count, len(case.start)) - 1.0))
    return Q


# Derivatives


def computed(case: Case, Q: Tensor, g: Tensor, t: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, gradient and Hessian of the code for (P, n) multipliers and (P, F, n, k) functionals."""
    problem = _Problem.of(case.enclosure)
    point = _evaluate(problem, Q, g, t, s is not None, s)
    return point.objective, *_derivatives(problem, point, t, s is not None)


def written_out(flat: Case, t: float, g: Tensor, outputs: bool) -> Callable[[Tensor], Tensor]:
    """tρ − log det R, or ts − log det R − log det(sI − GR⁻¹G′), of (a channel's q repeated over its pixels, s)."""

    def objective(x: Tensor) -> Tensor:
        n = len(x) - outputs
        q = x[:n].repeat_interleave(len(flat.start) // n)
        M = 2.0 * torch.diag(q) - q[:, None] * flat.W - flat.W.T * q - q[:, None] * (flat.U @ flat.U.T) * q
        if not outputs:
            return t * torch.trace(g @ torch.linalg.solve(M, g.T)) - torch.logdet(M)
        inner = x[n] * torch.eye(len(flat.G)) - flat.G @ torch.linalg.solve(M, flat.G.T)
        return t * x[n] - torch.logdet(M) - torch.logdet(inner)

    return objective


def slope(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def check_derivatives(case: Case, flat: Case, g: Tensor, g_flat: Tensor, outputs: bool) -> None:
    """The code on P = 3 problems against autograd on each. ``g`` (3, F, n, k), ``g_flat`` (3, k, states of flat)."""
    Q, t = nearby(case, 3), torch.tensor([0.7, 3.0, 20.0])
    s = torch.tensor([1.2 * largest(case, q) for q in Q]) if outputs else None
    objective, gradient, hessian = computed(case, Q, g, t, s)
    for k in range(3):
        f = written_out(flat, float(t[k]), g_flat[k], outputs)
        x = Q[k] if s is None else torch.cat([Q[k], s[k : k + 1]])
        torch.testing.assert_close(objective[k], f(x), rtol=1e-10, atol=1e-10)
        first, second = slope(f, x), torch.autograd.functional.hessian(f, x)
        torch.testing.assert_close(gradient[k], first, rtol=1e-9, atol=1e-9 * float(first.abs().max()))
        torch.testing.assert_close(hessian[k], second, rtol=1e-8, atol=1e-9 * float(second.abs().max()))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_derivatives_of_gains_are_those_of_autograd(n: int, k: int) -> None:
    case = dense(n, 3, 2, seed=n)
    g = torch.randn(3, k, n)
    check_derivatives(case, case, g.mT.unsqueeze(1), g, outputs=False)


@pytest.mark.parametrize("q", [1, 4])
def test_derivatives_of_outputs_are_those_of_autograd(q: int) -> None:
    case = dense(6, 3, q, seed=q)
    g = case.G.T.expand(3, 1, -1, -1)
    check_derivatives(case, case, g, case.G.expand(3, -1, -1), outputs=True)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("image", IMAGES)
def test_derivatives_of_gains_on_a_grid_are_those_of_the_dense_form(image: tuple[int, int], k: int) -> None:
    case, flat = on_grid(image)
    g, g_flat = functionals(image, 3, 3 * k)
    check_derivatives(
        case, flat, g.unflatten(0, (3, k)).permute(0, 2, 3, 1), g_flat.unflatten(0, (3, k)), outputs=False
    )


@pytest.mark.parametrize("image", IMAGES)
def test_derivatives_of_outputs_on_a_grid_are_those_of_the_dense_form(image: tuple[int, int]) -> None:
    case, flat = on_grid(image)
    g = case.G.mH.expand(3, -1, -1, -1)
    check_derivatives(case, flat, g, flat.G.expand(3, -1, -1), outputs=True)


# Minima that are known


def reached(case: Case, g: Tensor, **options: float) -> float:
    """ρ of the multiplier found for one functional (n,) of a dense network, which is proved as well."""
    Q = best_gains(case.enclosure, case.start, g.reshape(1, 1, -1), **options)[0]
    rho = float(gain(case, Q, g.reshape(1, -1)))
    proved, _ = prove_gains(case.enclosure, Q, g.reshape(1, -1))
    assert rho * (1.0 - 1e-9) <= float(proved[0]) <= rho * (1.0 + 1e-6)
    return rho


@pytest.mark.parametrize(("u", "g"), [(1.0, 1.0), (3.0, -0.2), (1e-5, 1e4)])
def test_one_neuron(u: float, g: float) -> None:
    """g²/(2q − q²u²) is least at q = 1/u²: ρ = g²u²."""
    case = feasible(torch.zeros(1, 1), torch.tensor([[u]]), torch.tensor([[g]]))
    assert reached(case, case.G[0]) == pytest.approx((g * u) ** 2, rel=CLOSE)
    assert largest(case, best_outputs(case.enclosure, case.start)) == pytest.approx((g * u) ** 2, rel=CLOSE)


def test_neurons_that_read_orthogonal_directions() -> None:
    """W = 0, UU′ = diag(u²): R is diagonal and ρ = Σ g_k²/(2q_k − q_k²u_k²), least at q = 1/u²: ρ = Σ g_k²u_k²."""
    torch.manual_seed(1)
    u, g = torch.rand(5) + 0.2, torch.randn(5)
    U = u.unsqueeze(-1) * torch.linalg.qr(torch.randn(8, 5)).Q.T
    case = feasible(torch.zeros(5, 5), U, g.reshape(1, -1))
    Q = best_gains(case.enclosure, case.start, g.reshape(1, 1, -1), last=1e8)[0]
    assert float(gain(case, Q, g.reshape(1, -1))) == pytest.approx(float((g * u).square().sum()), rel=1e-6)
    torch.testing.assert_close(Q, u.square().reciprocal(), rtol=1e-2, atol=0.0)
    assert reached(case, g) == pytest.approx(float((g * u).square().sum()), rel=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_neurons_that_read_one_number(seed: int) -> None:
    """W = 0, one input: with a = Σ|g_ku_k|, b = |Σg_ku_k| the least ρ is ((a + b)/2)², what slopes 0 or 1 reach.

    R = 2Q − Quu′Q has R⁻¹ = Q⁻¹/2 + uu′/(4 − 2u′Qu), and the derivatives vanish at q_k = 2|g_k/u_k|/(a + b).
    """
    torch.manual_seed(seed)
    u, g = torch.randn(6), torch.randn(6)
    case = feasible(torch.zeros(6, 6), u.unsqueeze(-1), g.reshape(1, -1))
    a, b = float((g * u).abs().sum()), abs(float((g * u).sum()))
    steepest = max(float((g * u).clamp(min=0.0).sum()), float((g * u).clamp(max=0.0).sum().abs()))
    assert steepest == pytest.approx((a + b) / 2.0)
    assert reached(case, g, last=1e8) == pytest.approx(steepest**2, rel=1e-6)
    assert reached(case, g) == pytest.approx(steepest**2, rel=CLOSE)


def test_a_chain_of_single_neurons() -> None:
    """z₁ = σ(u x), z₂ = σ(w z₁), ...: the product of the weights, whatever they are; nothing is lost on the way."""
    weights = [3.0, -0.01, 50.0, 2.0, -0.5]
    W, U = torch.diag(torch.tensor(weights[1:]), -1), torch.zeros(5, 1)
    U[0, 0] = weights[0]
    # any λ_k that falls fast enough along the chain is feasible; in its gauge the start is a multiple of 1
    product = math.prod(weights)
    sizes = torch.tensor([math.prod(weights[: k + 1]) for k in range(5)]).abs()
    start = 0.9 ** torch.arange(5.0) / sizes.square() / 5.0
    case = Case(W, U, torch.eye(5)[4:], start)
    assert inside(case, start)
    assert reached(case, case.G[0], last=1e7) == pytest.approx(product**2, rel=1e-5)
    assert largest(case, best_outputs(case.enclosure, start)) == pytest.approx(product**2, rel=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_within_the_promise_of_the_minimum(seed: int) -> None:
    case = dense(9, 4, 3, seed)
    for g in case.G:
        assert reached(case, g) <= reached(case, g, last=1e8) * (1.0 + CLOSE)


def test_the_minimum_is_stationary() -> None:
    """At the minimum no small change of Q is better, by the formula itself."""
    case = dense(6, 3, 1, seed=4)
    Q = best_gains(case.enclosure, case.start, case.G.unsqueeze(0), last=1e9)[0]
    gradient = slope(lambda x: gain(case, x, case.G), Q)
    assert float((Q * gradient).abs().max()) < 1e-4 * float(gain(case, Q, case.G))


# Batches, starts and deadlines


def test_a_batch_gives_what_each_problem_gives_alone() -> None:
    case = dense(8, 4, 6, seed=1)
    together = best_gains(case.enclosure, case.start, case.G.unsqueeze(1))
    for k, g in enumerate(case.G):
        alone = best_gains(case.enclosure, case.start, g.reshape(1, 1, -1))[0]
        rho = float(gain(case, alone, g.reshape(1, -1)))
        assert float(gain(case, together[k], g.reshape(1, -1))) == pytest.approx(rho, rel=CLOSE)


def test_a_batch_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dense(5, 4, 7, seed=1)
    whole = best_gains(case.enclosure, case.start, case.G.unsqueeze(1))
    monkeypatch.setattr("lipconvert.certification.tighten.BATCH", 2 * 25 * 8)
    for k, Q in enumerate(best_gains(case.enclosure, case.start, case.G.unsqueeze(1))):
        g = case.G[k : k + 1]
        assert float(gain(case, Q, g)) == pytest.approx(float(gain(case, whole[k], g)), rel=CLOSE)


def test_a_group_minimises_the_sum() -> None:
    """The sum at the multiplier of the group is no more than at those of its members."""
    case = dense(7, 4, 4, seed=2)
    Q = best_gains(case.enclosure, case.start, case.G.unsqueeze(0))[0]
    deep = best_gains(case.enclosure, case.start, case.G.unsqueeze(0), last=1e8)[0]
    assert float(gain(case, Q, case.G)) <= float(gain(case, deep, case.G)) * (1.0 + CLOSE)
    for other in best_gains(case.enclosure, case.start, case.G.unsqueeze(1)):
        assert float(gain(case, deep, case.G)) <= float(gain(case, other, case.G)) * (1.0 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_warm_and_cold_starts_end_at_the_same_value(seed: int) -> None:
    """From the multiplier of all functionals together, as the pairs of a network are searched."""
    case = dense(10, 5, 4, seed, spread=1.0)
    common = best_gains(case.enclosure, case.start, case.G.unsqueeze(0), last=MIDDLE)[0]
    rows = case.G[:3].unsqueeze(1)
    cold, warm = (best_gains(case.enclosure, Q, rows) for Q in (case.start, common))
    mixed = best_gains(case.enclosure, torch.stack([case.start, common, common]), rows)
    for k in range(3):
        g = case.G[k : k + 1]
        value = float(gain(case, cold[k], g))
        assert float(gain(case, warm[k], g)) == pytest.approx(value, rel=CLOSE)
        assert float(gain(case, mixed[k], g)) == pytest.approx(value, rel=CLOSE)


@pytest.mark.parametrize("seed", range(4))
def test_from_the_minimum_of_another_functional(seed: int) -> None:
    """There R is next to singular, and t far too large."""
    case = dense(10, 5, 4, seed, spread=1.0)
    far = best_gains(case.enclosure, case.start, case.G[-1:].unsqueeze(0), last=1e6)[0]
    rows = case.G[:3].unsqueeze(1)
    cold, warm = (best_gains(case.enclosure, Q, rows) for Q in (case.start, far))
    for k in range(3):
        g = case.G[k : k + 1]
        assert float(gain(case, warm[k], g)) == pytest.approx(float(gain(case, cold[k], g)), rel=CLOSE)


def test_a_deadline_in_the_past_returns_the_start() -> None:
    case = dense(6, 3, 3, seed=3)
    past = time.monotonic() - 1.0
    Q = best_gains(case.enclosure, case.start, case.G.unsqueeze(1), deadline=past)
    assert torch.equal(Q, case.start.expand(3, -1))
    assert torch.equal(best_outputs(case.enclosure, case.start, deadline=past), case.start)


def struck_after(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """A clock on which a deadline at 1 is over after so many looks at it."""
    clock = iter([0.0] * looks)
    monkeypatch.setattr("lipconvert.certification.tighten.time.monotonic", lambda: next(clock, 2.0))


def test_every_deadline_leaves_a_multiplier_that_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that strikes after k looks at it: what is returned is inside and never above the start."""
    case = dense(6, 3, 3, seed=3, spread=2.0)
    g, values = case.G[:1], []
    for looks in range(8):
        struck_after(monkeypatch, looks)
        Q = best_gains(case.enclosure, case.start, g.unsqueeze(0), deadline=1.0)[0]
        assert bool(torch.isfinite(prove_gains(case.enclosure, Q, g)[0]).all())
        values.append(float(gain(case, Q, g)))
    assert values == sorted(values, reverse=True)
    assert values[0] == float(gain(case, case.start, g))
    assert values[-1] < values[0]


@pytest.mark.parametrize("seed", range(4))
def test_every_deadline_leaves_outputs_no_worse_than_the_start(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a start that is the best already, and s above λ_max at first."""
    case = dense(6, 3, 3, seed)
    for start in (case.start, best_outputs(case.enclosure, case.start)):
        for looks in range(12):
            struck_after(monkeypatch, looks)
            Q = best_outputs(case.enclosure, start, deadline=1.0)
            assert largest(case, Q) <= largest(case, start) * (1.0 + 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_never_above_the_start(seed: int) -> None:
    case = dense(8, 4, 3, seed, spread=1.0)
    Q = best_gains(case.enclosure, case.start, case.G.unsqueeze(1))
    for k in range(3):
        g = case.G[k : k + 1]
        assert float(gain(case, Q[k], g)) <= float(gain(case, case.start, g))
    for start in (case.start, best_outputs(case.enclosure, case.start)):  # also from what is already the best
        Q = best_outputs(case.enclosure, start)
        assert largest(case, Q) <= largest(case, start) * (1.0 + 1e-12)


def test_a_start_that_is_not_inside_is_returned() -> None:
    case = dense(5, 3, 2, seed=5)
    outside = 100.0 * case.start
    assert not inside(case, outside)
    assert torch.equal(best_gains(case.enclosure, outside, case.G.unsqueeze(1)), outside.expand(2, -1))
    assert torch.equal(best_outputs(case.enclosure, outside), outside)


def test_the_default_dtype_does_not_matter() -> None:
    case = dense(6, 3, 3, seed=6)
    grid, _ = on_grid((2, 3))
    rows = grid.G[:, :1].movedim(0, 1).unsqueeze(1)
    expected = [best_gains(case.enclosure, case.start, case.G.unsqueeze(1)), best_outputs(case.enclosure, case.start)]
    expected += [best_gains(grid.enclosure, grid.start, rows), best_outputs(grid.enclosure, grid.start)]
    expected += [best_scales(case.enclosure, case.start, case.G), least_gains(case.enclosure, case.G)]
    torch.set_default_dtype(torch.float32)
    found = [best_gains(case.enclosure, case.start, case.G.unsqueeze(1)), best_outputs(case.enclosure, case.start)]
    found += [best_gains(grid.enclosure, grid.start, rows), best_outputs(grid.enclosure, grid.start)]
    found += [best_scales(case.enclosure, case.start, case.G), least_gains(case.enclosure, case.G)]
    for a, b in zip(expected, found, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b)


# Symmetries


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_gauge_does_not_matter(spread: float) -> None:
    """W → DWD⁻¹, U → DU, g → gD⁻¹ leaves every ρ, with Q → D⁻²Q."""
    case = dense(8, 4, 3, seed=7)
    D = 10.0 ** (spread * (2.0 * torch.rand(8) - 1.0))
    other = gauged(case, D)
    for g, h in zip(case.G, other.G, strict=True):
        assert reached(other, h) == pytest.approx(reached(case, g), rel=CLOSE)
    a, b = best_outputs(case.enclosure, case.start), best_outputs(other.enclosure, other.start)
    assert largest(other, b) == pytest.approx(largest(case, a), rel=CLOSE)


@pytest.mark.parametrize("alpha", [1e-5, 0.3, 1e6])
def test_the_scale_of_inputs_and_outputs_does_not_matter(alpha: float) -> None:
    """x → αx multiplies ρ by α² with Q → Q/α²; g → αg does so with the same Q."""
    case = dense(8, 4, 3, seed=8)
    inputs = Case(case.W, alpha * case.U, case.G, case.start / alpha**2)
    outputs = Case(case.W, case.U, alpha * case.G, case.start)
    rho, value = reached(case, case.G[0]), largest(case, best_outputs(case.enclosure, case.start))
    for other in (inputs, outputs):
        assert reached(other, other.G[0]) == pytest.approx(alpha**2 * rho, rel=CLOSE)
        found = largest(other, best_outputs(other.enclosure, other.start))
        assert found == pytest.approx(alpha**2 * value, rel=CLOSE)


def test_the_order_of_neurons_and_rotations_of_inputs_do_not_matter() -> None:
    case = dense(7, 5, 2, seed=9)
    p, V = torch.randperm(7), torch.linalg.qr(torch.randn(5, 5)).Q
    other = Case(case.W[p][:, p], case.U[p] @ V, case.G[:, p], case.start[p])
    assert reached(other, other.G[0]) == pytest.approx(reached(case, case.G[0]), rel=CLOSE)


def enlarged(case: Case, count: int, reads: bool, is_read: bool) -> Case:
    """More neurons: with ``reads`` they read old states, with ``is_read`` old states and outputs read them."""
    n, q = len(case.start), len(case.G)
    W = torch.zeros(n + count, n + count)
    W[:n, :n] = case.W
    if reads:
        W[n:, :n] = 0.1 * torch.randn(count, n)
    if is_read:
        W[:n, n:] = 0.1 * torch.randn(n, count)
    G = torch.cat([case.G, torch.randn(q, count) if is_read else torch.zeros(q, count)], 1)
    start = torch.cat([case.start, torch.full((count,), float(case.start.mean()))])
    larger = Case(W, torch.cat([case.U, torch.zeros(count, case.U.shape[1])]), G, start)
    idle = torch.arange(n + count) >= n
    while not inside(larger, larger.start):  # what is not driven may have any size, what is not read any small one
        larger.start = torch.where(idle, larger.start * (0.1 if reads else 10.0), larger.start)
    return larger


def test_neurons_that_nobody_reads_cost_nothing() -> None:
    case = dense(6, 4, 3, seed=10)
    larger = enlarged(case, 4, reads=True, is_read=False)
    for k in range(3):
        assert reached(larger, larger.G[k]) == pytest.approx(reached(case, case.G[k]), rel=CLOSE)
    value = largest(case, best_outputs(case.enclosure, case.start))
    assert largest(larger, best_outputs(larger.enclosure, larger.start)) == pytest.approx(value, rel=CLOSE)


def test_neurons_that_read_nothing_cost_nothing() -> None:
    """Padded channels, dead rows: constants. Their multipliers may be of any size, and must not hold up the others."""
    case = dense(6, 4, 3, seed=10)
    larger = enlarged(case, 4, reads=False, is_read=True)
    for k in range(3):
        assert reached(larger, larger.G[k]) == pytest.approx(reached(case, case.G[k]), rel=CLOSE)
    value = largest(case, best_outputs(case.enclosure, case.start))
    assert largest(larger, best_outputs(larger.enclosure, larger.start)) == pytest.approx(value, rel=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_two_stages_as_one_are_never_worse_than_the_product(seed: int) -> None:
    """L(f₂ ∘ f₁) found jointly ≤ L(f₂) L(f₁), each as found alone: with Λ = blkdiag(L₂Λ₁, Λ₂/L₁) it is feasible."""
    first, second = dense(5, 3, 4, seed), dense(6, 4, 2, seed + 50)
    Q1, Q2 = (best_outputs(case.enclosure, case.start) for case in (first, second))
    rho1, rho2 = largest(first, Q1), largest(second, Q2)
    W = torch.zeros(11, 11)
    W[:5, :5], W[5:, :5], W[5:, 5:] = first.W, second.U @ first.G, second.W
    U, G = torch.cat([first.U, torch.zeros(6, 3)]), torch.cat([torch.zeros(2, 5), second.G], 1)
    # Λ₁ = ρ₁^½Q₁, L₁ = ρ₁^½ and so on: Q = Λ/(L₁L₂) = (Q₁, Q₂/ρ₁), with a little room
    joint = Case(W, U, G, torch.cat([Q1, Q2 / (1.001 * rho1)]))
    assert inside(joint, joint.start)
    assert largest(joint, best_outputs(joint.enclosure, joint.start)) <= rho1 * rho2 * (1.0 + 1e-6)
    for k, g in enumerate(joint.G):
        alone = best_gains(second.enclosure, second.start, second.G[k].reshape(1, 1, -1))[0]
        assert reached(joint, g) <= rho1 * float(gain(second, alone, second.G[k : k + 1])) * (1.0 + CLOSE)


# Grids


@pytest.mark.parametrize("image", IMAGES)
def test_on_a_grid_the_gain_is_the_dense_one(image: tuple[int, int]) -> None:
    """For channel-constant Q both are the same number; over all Q the dense minimum is no more."""
    case, flat = on_grid(image)
    g, g_flat = functionals(image, 3, 2)
    found = best_gains(case.enclosure, case.start, g.unsqueeze(1))
    proved = torch.cat([prove_gains(case.enclosure, Q, row.unsqueeze(0))[0] for Q, row in zip(found, g, strict=True)])
    free = best_gains(flat.enclosure, flat.start, g_flat.unsqueeze(1))
    for k in range(2):
        row, repeated = g_flat[k : k + 1], found[k].repeat_interleave(math.prod(image))
        rho = float(gain(flat, repeated, row))
        assert float(proved[k]) == pytest.approx(rho, rel=1e-9)
        assert float(gain(flat, free[k], row)) <= rho * (1.0 + CLOSE)
        # no other channel-constant multiplier is better: convex, so a neighbourhood is enough
        for Q in found[k] * (1.0 + 0.05 * (2.0 * torch.rand(20, 3) - 1.0)):
            if inside(case, Q):
                repeated = Q.repeat_interleave(math.prod(image))
                assert float(gain(flat, repeated, row)) >= rho * (1.0 - CLOSE)


@pytest.mark.parametrize("image", IMAGES)
def test_what_shifts_leave_alone_needs_one_multiplier_for_each_channel(image: tuple[int, int]) -> None:
    """Averaged over all shifts a multiplier is no worse (ρ is convex): for means over pixels and for the output as a vector
    the minimum over all Q is that over channel-constant ones."""
    case, flat = on_grid(image)
    means = torch.randn(2, 3, 1, 1).expand(-1, -1, *image)
    g = Grid(image).coordinates(means).transpose(1, 2)
    found = best_gains(case.enclosure, case.start, g.unsqueeze(1))
    free = best_gains(flat.enclosure, flat.start, means.reshape(2, 1, -1))
    for k in range(2):
        row = means[k].reshape(1, -1)
        rho = float(gain(flat, found[k].repeat_interleave(math.prod(image)), row))
        assert float(gain(flat, free[k], row)) == pytest.approx(rho, rel=CLOSE)
    a, b = best_outputs(case.enclosure, case.start), best_outputs(flat.enclosure, flat.start)
    assert largest(case, a) == pytest.approx(largest(flat, a.repeat_interleave(math.prod(image))), rel=1e-9)
    assert largest(flat, b) == pytest.approx(largest(case, a), rel=CLOSE)
    assert prove_lmi(case.enclosure, a * largest(case, a) ** 0.5, (1.0 + 1e-6) * largest(case, a) ** 0.5)


def test_one_pixel_is_a_dense_network() -> None:
    case = dense(5, 3, 2, seed=11)
    pixel = Case(*(M.to(torch.complex128).unsqueeze(0) for M in (case.W, case.U, case.G)), case.start, Grid((1, 1)))
    rows = case.G.unsqueeze(1)
    one = best_gains(pixel.enclosure, case.start, rows.to(torch.complex128).unsqueeze(2))
    torch.testing.assert_close(one, best_gains(case.enclosure, case.start, rows), rtol=1e-6, atol=0.0)
    scales = best_scales(pixel.enclosure, case.start, case.G.to(torch.complex128).unsqueeze(1))
    torch.testing.assert_close(scales, best_scales(case.enclosure, case.start, case.G))


# Convexity, as the docstring has it


@pytest.mark.parametrize("seed", range(5))
def test_the_functions_are_convex(seed: int) -> None:
    """R is concave in Q; g′R⁻¹g, λ_max(GR⁻¹G′) and −log det R are convex; R ↦ g′R⁻¹g decreases."""
    case = dense(6, 3, 2, seed)
    for a, b in nearby(case, 10, seed).split(5)[0].unsqueeze(1).expand(-1, 2, -1) * torch.tensor([[[1.0], [0.6]]]):
        b = b * (1.0 + 0.2 * torch.rand(6))
        middle = 0.5 * (a + b)
        if not inside(case, b):
            continue
        concave = R(case, middle) - 0.5 * (R(case, a) + R(case, b))
        assert float(torch.linalg.eigvalsh(concave).min()) > -1e-12
        assert gain(case, middle, case.G) <= 0.5 * (gain(case, a, case.G) + gain(case, b, case.G)) * (1.0 + 1e-12)
        assert largest(case, middle) <= 0.5 * (largest(case, a) + largest(case, b)) * (1.0 + 1e-12)
        assert torch.logdet(R(case, middle)) >= 0.5 * (torch.logdet(R(case, a)) + torch.logdet(R(case, b))) - 1e-12


# Multiples of one Λ


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_best_multiple_of_a_multiplier(spread: float) -> None:
    case = dense(7, 4, 5, seed=12, spread=spread)
    Lambda = 3.0 * case.start
    quadratic = Lambda.unsqueeze(-1) * (case.U @ case.U.T) * Lambda
    kappa = torch.linalg.eigvals(torch.linalg.solve(R(case, Lambda) + quadratic, quadratic)).real.max()
    for g, s in zip(case.G, best_scales(case.enclosure, Lambda, case.G).tolist(), strict=True):

        def rho(x: float, g: Tensor = g) -> float:
            return float(gain(case, math.exp(x) * Lambda, g.reshape(1, -1)))

        limits = (-12.0 - float(kappa.log()), -1e-9 - float(kappa.log()))
        best = minimize_scalar(rho, bounds=limits, method="bounded", options={"xatol": 1e-9})
        assert rho(math.log(s)) == pytest.approx(best.fun, rel=1e-9)
        assert s == pytest.approx(math.exp(best.x), rel=1e-3)


@pytest.mark.parametrize("image", [(2, 2), (3, 3), (2, 3)])
def test_the_best_multiple_on_a_grid_is_that_of_the_dense_form(image: tuple[int, int]) -> None:
    case, flat = on_grid(image)
    g, g_flat = functionals(image, 3, 4)
    scales = best_scales(case.enclosure, case.start, g)
    torch.testing.assert_close(scales, best_scales(flat.enclosure, flat.start, g_flat), rtol=1e-9, atol=0.0)
    for k, s in enumerate(scales):
        values = [float(gain(flat, x * s * flat.start, g_flat[k : k + 1])) for x in (0.99, 1.0, 1.01)]
        assert values[1] == min(values)


def test_the_best_multiple_where_nothing_is_read_is_valid() -> None:
    """UU′ = 0: every multiple is valid, the larger the better; what is returned is a number to compute with."""
    case = Case(torch.zeros(3, 3), torch.zeros(3, 2), torch.eye(3), torch.ones(3))
    scales = best_scales(case.enclosure, case.start, case.G)
    assert bool(((scales > 1e-3) & (scales < 1e150)).all())


# What no multiplier goes below


@pytest.mark.parametrize("seed", range(4))
def test_slopes_that_are_covered_are_below_every_multiplier(seed: int) -> None:
    """D with entries 0 or 1 makes a linear network: ‖g′(I − DW)⁻¹DU‖² ≤ ρ for all D; two of them are what the code tries."""
    case = dense(5, 3, 2, seed)
    best = torch.tensor([reached(case, g, last=1e7) for g in case.G])
    least = torch.zeros(2)
    for bits in range(32):
        D = torch.diag(torch.tensor([float(bits >> k & 1) for k in range(5)]))
        T = torch.linalg.solve(torch.eye(5) - D @ case.W, D @ case.U)
        least = torch.maximum(least, (case.G @ T).square().sum(1))
        assert float(torch.linalg.matrix_norm(case.G @ T, 2)) ** 2 <= largest(case, case.start)
    found = least_gains(case.enclosure, case.G)
    assert bool((least <= best * (1.0 + 1e-6)).all())
    assert bool((found <= least * (1.0 + 1e-12)).all())
    T = torch.linalg.solve(torch.eye(5) - case.W, case.U)
    assert bool((found >= (case.G @ T).square().sum(1) * (1.0 - 1e-12)).all())
    assert least_output(case.enclosure) >= float(torch.linalg.matrix_norm(case.G @ T, 2)) * (1.0 - 1e-12)
    assert least_output(case.enclosure) ** 2 <= largest(case, best_outputs(case.enclosure, case.start)) * (1.0 + 1e-9)


def test_the_identity_in_a_residual_network_is_found() -> None:
    """z₁ = x, z₂ = σ(Az₁), y = z₁ − Bz₂: rows that read the input with slope 1, the others 0, give y = x."""
    torch.manual_seed(0)
    W, U = torch.zeros(7, 7), torch.cat([torch.eye(3), torch.zeros(4, 3)])
    W[3:, :3] = 0.1 * torch.randn(4, 3)
    G = torch.cat([torch.eye(3), -0.1 * torch.randn(3, 4)], 1)
    E = Enclosure(W, U, G)
    assert float(least_gains(E, G[:1])[0]) >= 1.0
    assert least_output(E) >= 1.0 - 1e-12


@pytest.mark.parametrize("image", [(2, 2), (3, 3), (2, 3)])
def test_what_no_multiplier_goes_below_on_a_grid_is_that_of_the_dense_form(image: tuple[int, int]) -> None:
    case, flat = on_grid(image)
    g, g_flat = functionals(image, 3, 4)
    torch.testing.assert_close(least_gains(case.enclosure, g), least_gains(flat.enclosure, g_flat))
    assert least_output(case.enclosure) == pytest.approx(least_output(flat.enclosure), rel=1e-12)


# Extremes


def proved_at(case: Case, Q: Tensor) -> bool:
    bounds, _ = prove_gains(case.enclosure, Q, case.G)
    return bool(torch.isfinite(bounds).all())


@pytest.mark.parametrize("spread", [3.0, 6.0])
def test_multipliers_of_all_sizes(spread: float) -> None:
    """Λ from 10^−spread to 10^spread twice over: as good as in the gauge in which it is all about 1."""
    plain, case = dense(12, 4, 2, seed=13), dense(12, 4, 2, seed=13, spread=spread)
    assert float(case.start.max() / case.start.min()) > 10.0 ** (2.0 * spread)
    for k in range(2):
        assert reached(case, case.G[k]) == pytest.approx(reached(plain, plain.G[k]), rel=1e-4)
    Q = best_outputs(case.enclosure, case.start)
    assert proved_at(case, Q)
    in_gauge = largest(gauged(case, Q.sqrt()), torch.ones_like(Q))  # where R is of size 1
    assert in_gauge == pytest.approx(largest(plain, best_outputs(plain.enclosure, plain.start)), rel=1e-3)


def test_a_large_skew_part() -> None:
    """W = −cS with S = −S′: X(1) = 2I whatever c."""
    torch.manual_seed(14)
    S = torch.randn(8, 8)
    case = feasible(1e4 * (S - S.T), torch.randn(8, 3), torch.randn(2, 8))
    for Q in (*best_gains(case.enclosure, case.start, case.G.unsqueeze(1)), best_outputs(case.enclosure, case.start)):
        assert proved_at(case, Q)


@pytest.mark.parametrize("margin", [1e-3, 1e-6, 1e-9])
def test_a_start_next_to_a_singular_matrix(margin: float) -> None:
    """τ·1 at 1 − margin of where R becomes singular: the minimum is found from there, too."""
    case = dense(8, 4, 2, seed=15)
    low, high = 1.0, 100.0
    while high - low > 1e-15 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if inside(case, middle * case.start) else (low, middle)
        if middle in (low, high) and high - low < 1e-14 * high:
            break
    close = Case(case.W, case.U, case.G, (1.0 - margin) * low * case.start)
    assert inside(close, close.start)
    for g in case.G:
        assert reached(close, g) == pytest.approx(reached(case, g), rel=1e-3)


def test_more_functionals_than_states_and_none_that_matter() -> None:
    case = dense(4, 3, 2, seed=16)
    Q = best_gains(case.enclosure, case.start, torch.randn(1, 9, 4))[0]
    assert inside(case, Q)
    zero = best_gains(case.enclosure, case.start, torch.zeros(1, 1, 4))[0]
    assert inside(case, zero)
    assert float(best_scales(case.enclosure, case.start, torch.zeros(1, 4))[0]) > 0.0


def test_networks_of_some_size_reach_the_minimum() -> None:
    """Forty pairs of a network with 96 states, from the multiplier of all together: none stays behind, all are proved."""
    case = dense(96, 16, 5, seed=17)
    i, j = torch.tensor(class_pairs(5)).T
    rows = case.G[i] - case.G[j]
    common = best_gains(case.enclosure, case.start, rows.unsqueeze(0), last=100.0)[0]
    found = best_gains(case.enclosure, common, rows.unsqueeze(1))
    for k in (0, 4, 9):
        g = rows[k : k + 1]
        proved = float(prove_gains(case.enclosure, found[k], g)[0])
        assert proved <= reached(case, rows[k], last=1e5) * (1.0 + CLOSE)
