"""Attacks against closed forms, exhaustive search and certificates."""

import importlib
import math
import random
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lipconvert as lc
from lipconvert.attacks.attack import apgd, attack, pgd
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import Bounds
from lipconvert.certification.certify import certified_radii
from lipconvert.certification.empirical import empirical_lipschitz

SEARCHES = pytest.mark.parametrize("search", [pgd, apgd])


def linear(M, b=None) -> lc.Network:
    """y = Mx + b."""
    return lc.Network([lc.LBEN.from_dae(lc.affine(M, b))], [None], (M.shape[1],))


def relu_network(p: int = 6, q: int = 4, seed: int = 0) -> lc.Network:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(p, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, q))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return lc.convert(model, check=False)


def equilibrium_network() -> lc.Network:
    return lc.convert(lc.registry().example_models("mondeq", seed=0)[0].double())


def predictions(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def prescribed(net, x, labels):
    """margin/(√2·L), by hand."""
    with torch.no_grad():
        y = net(x)
    margins = [min(float(y[i, k] - y[i, j]) for j in rivals_of(k, y.shape[1])) for i, k in enumerate(labels.tolist())]
    return torch.tensor(margins) / (math.sqrt(2.0) * net.lipschitz)


def rivals_of(label: int, classes: int) -> list[int]:
    return [j for j in range(classes) if j != label]


def by_hand(M, b, x, label: int, radius: float) -> float:
    """The least margin of y = Mx + b in the ball: over each rival, its value at x less radius·‖m_label − m_j‖."""
    y = M @ x + b
    return min(float(y[label] - y[j] - radius * (M[label] - M[j]).norm()) for j in rivals_of(label, len(M)))


def exact_square(a, b) -> Fraction:
    """‖a − b‖² of floats, without rounding."""
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return sum(((Fraction(s) - Fraction(t)) ** 2 for s, t in pairs), Fraction(0))


@SEARCHES
@pytest.mark.parametrize("loss", ["margin", "cross_entropy", "dlr"])
def test_two_classes_of_a_linear_network(search, loss):
    M, b = torch.randn(2, 30), torch.randn(2)
    net, x = linear(M, b), torch.randn(40, 30)
    labels = predictions(net, x)
    radius = torch.rand(40)
    found, margin = search(net, x, labels, radius, loss=loss)
    y = net(found).detach()
    for i in range(40):
        own = int(labels[i])
        assert float(margin[i]) == pytest.approx(float(y[i, own] - y[i, 1 - own]), abs=1e-12)
        optimum = by_hand(M, b, x[i], own, float(radius[i]))
        if optimum > 0:
            # cross entropy has a gradient of the same direction while e^(−margin) is more than round-off
            assert float(margin[i]) == pytest.approx(optimum, rel=1e-6)
        else:
            assert float(margin[i]) <= 0
    assert bool((margin > 0).any())
    assert bool((margin <= 0).any())


@SEARCHES
def test_every_rival_of_a_linear_network(search):
    M, b = torch.randn(5, 20), 2.0 * torch.randn(5)
    net, x = linear(M, b), torch.randn(30, 20)
    labels = predictions(net, x)
    radius = 0.5 * prescribed(net, x, labels).clamp(min=0.01)
    optimum = torch.tensor([by_hand(M, b, x[i], int(labels[i]), float(radius[i])) for i in range(30)])
    standing = optimum > 0
    assert int(standing.sum()) > 20
    _, once = search(net, x, labels, radius)
    assert bool((once[standing] >= optimum[standing] * (1 - 1e-9)).all())
    _, all_rivals = search(net, x, labels, radius, restarts=5)
    assert torch.allclose(all_rivals[standing], optimum[standing], rtol=1e-6, atol=0)
    assert bool((once > all_rivals * (1 + 1e-6)).any())  # the nearest boundary is not always that of the second best


@SEARCHES
def test_a_box_against_exhaustive_search(search):
    M = torch.tensor([[1.0, 0.4], [0.0, 0.0]])
    net, x = linear(M), torch.tensor([[0.9, 0.9], [0.2, 0.7], [0.1, 0.5]])
    labels, radius = torch.zeros(3, dtype=torch.long), 0.25
    found, margin = search(net, x, labels, radius, box=(0.0, 1.0), steps=200)
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    side = torch.linspace(0.0, 1.0, 1001)
    grid = torch.cartesian_prod(side, side)
    for i in range(3):
        near = grid[(grid - x[i]).norm(dim=1) <= radius]
        least = float((near @ M[0]).min())
        assert least - 2e-3 <= float(margin[i]) <= least + 1e-5
    # the third is held by the box: two thirds of its way are free
    assert float(margin[2]) > by_hand(M, torch.zeros(2), x[2], 0, radius) + 0.01


@SEARCHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_a_ball_is_kept_exactly(search, dtype, box):
    net = relu_network().to(dtype)
    x = torch.rand(12, 6).to(dtype)
    x[0] = 0.0
    x[1, :3] = 1.0
    x[10] = 0.0
    labels = predictions(net, x)
    # down to radii at which floats next to each other lie further apart than the ball is wide
    radius = torch.tensor([3.0, 1.0, 0.5, 0.3, 0.1, 0.1, 1e-3, 1e-6, 1e-8, 1e-17, 1e-200, 0.0], dtype=torch.float64)
    found, _ = search(net, x, labels, radius, box=box, steps=12)
    assert found.dtype == dtype
    for i in range(12):
        assert exact_square(found[i], x[i]) <= Fraction(float(radius[i])) ** 2
    moved = (found.double() - x.double()).norm(dim=1) / radius
    assert torch.equal(found[-1], x[-1])
    assert bool((moved[2:7] > 0.2).all())
    if box is not None:
        assert bool(((found >= 0) & (found <= 1)).all())


@SEARCHES
def test_a_ball_too_small_to_square(search):
    net = linear(torch.eye(2))  # (t, 0) is broken at a distance of t/√2
    found, margin = search(net, torch.tensor([[1e-190, 0.0]]), torch.tensor([0]), 0.5e-190)
    assert math.hypot(float(found[0, 0]) - 1e-190, float(found[0, 1])) <= 0.5e-190
    assert float(margin[0]) > 0


@SEARCHES
@pytest.mark.parametrize("make", [relu_network, equilibrium_network])
def test_what_is_certified_is_never_broken(search, make):
    net = make()
    x = 2.0 * torch.randn(25, *net.input_shape)
    labels = predictions(net, x)
    radius = certified_radii(net, x, labels)
    assert float(radius.min()) > 0
    _, margin = search(net, x, labels, radius, steps=25, restarts=2)
    assert bool((margin > 0).all())
    _, margin = search(net, x, labels, 40.0 * radius, steps=10)
    assert bool((margin <= 0).any())  # and the attack is not blunt


def plain_apgd(model, x, label: int, radius: float, start, steps: int) -> float:
    """Algorithm 1 of Croce and Hein for one sample, line by line; the largest loss found."""

    def f(point):
        y = model(point)
        return max(y[j] for j in rivals_of(label, len(y))) - y[label]

    def gradient(point):
        point = point.clone().requires_grad_()
        return torch.autograd.grad(f(point), point)[0]

    def P(point):
        d = point - x
        return x + d * min(1.0, radius / float(d.norm())) if float(d.norm()) else point

    def ascend(point, eta):
        g = gradient(point)
        return P(point + eta * g / g.norm())

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    w = [math.ceil(part * steps) for part in p]
    xs, eta, etas, bests = [start], 2 * radius, [2 * radius], []
    xs.append(ascend(start, eta))
    best = max(xs, key=f)
    bests.append(f(start))
    rises = [bool(f(xs[1]) > f(xs[0]))]
    for k in range(1, steps):
        if k in w[1:]:
            j = w.index(k)
            first = sum(rises[w[j - 1] : k]) < 0.75 * (k - w[j - 1])
            second = j > 1 and etas[-1] == eta and bool(bests[-1] == f(best))
            etas.append(eta)
            bests.append(f(best))
            if first or second:
                eta, xs[-1], xs[-2] = eta / 2, best, best
        z = ascend(xs[-1], eta)
        xs.append(P(xs[-1] + 0.75 * (z - xs[-1]) + 0.25 * (xs[-1] - xs[-2])))
        rises.append(bool(f(xs[-1]) > f(xs[-2])))
        if f(xs[-1]) > f(best):
            best = xs[-1]
    return float(f(best).detach())


@pytest.mark.parametrize("steps", [2, 9, 24])
def test_apgd_line_by_line(steps):
    torch.manual_seed(27)  # a draw in which each of the two conditions for halving decides somewhere
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        model[4].bias[0] += 100.0  # nothing is broken, so nothing leaves; a landscape with hills, far from linear
    net, x = lc.convert(model, check=False), torch.randn(20, 5)
    labels, radius = torch.zeros(20, dtype=torch.long), 0.2 + 2.0 * torch.rand(20)
    _, margin = apgd(net, x, labels, radius, steps=steps, seed=3, first=10)
    for i in range(20):
        draw = torch.from_numpy(np.random.default_rng((3, 0, 10 + i)).standard_normal(7))
        start = x[i] + radius[i] * (draw / draw.norm())[:5]
        plain = plain_apgd(model.double(), x[i], 0, float(radius[i]), start, steps)
        with torch.no_grad():
            y = model(x[i])
        assert float(margin[i]) == pytest.approx(min(-plain, float(y[0] - y[1:].max())), abs=1e-8)


def test_an_attack_is_monotone_in_the_radius():
    net = relu_network()
    x, labels = 2.0 * torch.randn(80, 6), torch.randint(4, (80,))
    right = predictions(net, x) == labels
    labels[:60] = torch.where(torch.arange(60) % 3 > 0, predictions(net, x[:60]), labels[:60])
    right = predictions(net, x) == labels
    radii = [1.5, 0.0, 0.5, 3.0, 0.5, 1.0]
    assert torch.equal(attack(net, x, labels, [0.0])[0], right)
    for method in ("pgd", "apgd"):
        standing = attack(net, x, labels, radii, method=method, steps=20)
        assert standing.shape == (6, 80)
        assert standing.dtype == torch.bool
        assert torch.equal(standing[1], right)  # radius 0 is x itself
        assert torch.equal(standing[2], standing[4])
        rising = standing[[1, 2, 5, 0, 3]].int()
        assert bool((rising.diff(dim=0) <= 0).all())
        counts = rising.sum(1).tolist()
        assert len(set(counts)) >= 4
        # one radius by itself: the same search, without what was found in other balls
        for k, radius in ((2, 0.5), (0, 1.5)):
            alone = attack(net, x, labels, [radius], method=method, steps=20)[0]
            assert bool((standing[k] <= alone).all())
            assert int((standing[k] != alone).sum()) <= 8


def test_what_breaks_a_large_ball_is_tried_in_smaller_ones(monkeypatch):
    """With a search that finds nothing in small balls, the way back from the largest is what breaks there."""
    module = importlib.import_module("lipconvert.attacks.attack")
    M = torch.randn(3, 8)
    net, x = linear(M), torch.randn(50, 8)
    labels = predictions(net, x)
    radii = [0.1, 0.2, 0.4, 0.8, 5.0]
    exact = torch.tensor([[by_hand(M, torch.zeros(3), x[i], int(labels[i]), r) > 0 for i in range(50)] for r in radii])
    climb = module._climb

    def blunt(net, ascent, loss, key, ball, labels, index):
        if float(ball.radius[0]) < 5.0:
            return ball.x, torch.full_like(ball.x[:, 0], math.inf)
        return climb(net, ascent, loss, key, ball, labels, index)

    monkeypatch.setattr(module, "_climb", blunt)
    standing = attack(net, x, labels, radii)
    assert bool((standing >= exact).all())
    assert not bool(standing[-1].any())
    agreeing = (standing == exact).double().mean(1)
    assert bool((agreeing[:-1] > 0.6).all())
    assert not bool(standing[3].all())


@SEARCHES
def test_a_result_does_not_depend_on_the_batch(search):
    net = relu_network()
    x = 2.0 * torch.randn(30, 6)
    labels = predictions(net, x)
    radius = torch.rand(30)
    whole, margin = search(net, x, labels, radius, steps=15, restarts=2, seed=7)
    for size in (1, 7):
        parts = [
            search(
                net, x[i : i + size], labels[i : i + size], radius[i : i + size], steps=15, restarts=2, seed=7, first=i
            )
            for i in range(0, 30, size)
        ]
        assert torch.allclose(torch.cat([part for part, _ in parts]), whole, atol=1e-9)
        assert torch.allclose(torch.cat([least for _, least in parts]), margin, atol=1e-9)
    again, _ = search(net, x, labels, radius, steps=15, restarts=2, seed=7)
    assert torch.equal(again, whole)
    other, _ = search(net, x, labels, radius, steps=15, restarts=2, seed=8)
    assert not torch.equal(other, whole)
    moved, _ = search(net, x, labels, radius, steps=15, restarts=2, seed=7, first=1)
    assert not torch.allclose(moved, whole, atol=1e-9)


def test_a_broken_sample_leaves_the_batch(monkeypatch):
    net = relu_network()
    x = 2.0 * torch.randn(50, 6)
    labels = predictions(net, x)
    sizes = []
    monkeypatch.setattr("lipconvert.networks.network.passed", lambda step, x: sizes.append(len(x)) or step(x))
    _, margin = pgd(net, x, labels, 1.0, steps=10)
    standing = int((margin > 0).sum())
    assert 0 < standing < 50
    assert sizes[-1] >= standing
    assert sizes[2:] == sorted(sizes[2:], reverse=True)
    assert sum(sizes) < 12 * 50
    sizes.clear()
    pgd(net, x, (labels + 1) % 4, 1.0, restarts=3)  # all wrong: looked at, and left alone
    assert max(sizes) == 50
    assert len(sizes) <= 2


def test_the_network_is_left_as_it_was():
    net = relu_network()
    stage = net.stages[0]
    stage.V.requires_grad_(False)
    net(torch.randn(3, 6)).sum().backward()
    options = lc.SolverOptions("peaceman_rachford", throw=False)
    net.set_options(options)
    x, labels = torch.randn(5, 6), torch.zeros(5, dtype=torch.long)

    def state():
        return [
            (name, p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
            for name, p in net.named_parameters()
        ]

    def unchanged(before):
        assert stage.options is options
        for (_, *old), (_, *new) in zip(before, state(), strict=True):
            for a, b in zip(old, new, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b

    before = state()
    pgd(net, x, labels, 0.1, steps=3)
    apgd(net, x, labels, 0.1, steps=3)
    attack(net, x, labels, [0.1, 0.2], steps=3)
    empirical_lipschitz(net, x, steps=3)
    unchanged(before)
    for bad in (x[:, :3], torch.full_like(x, math.nan)):
        with pytest.raises(lc.LipconvertError):
            pgd(net, bad, labels, 0.1)
    with pytest.raises(lc.InvalidParameterError):
        attack(net, x, labels + 9, [0.1])
    unchanged(before)


def test_an_unconverged_solve_is_neither_right_nor_broken():
    net = equilibrium_network()
    x = torch.randn(5, *net.input_shape)
    labels = predictions(net, x)
    for throw in (True, False):
        net.set_options(lc.SolverOptions("forward_backward", max_steps=2, throw=throw))
        for search in (pgd, apgd):
            with pytest.raises(lc.NotConvergedError):
                search(net, x, labels, 0.1)
        with pytest.raises(lc.NotConvergedError):
            attack(net, x, labels, [0.1])
        with pytest.raises(lc.NotConvergedError):
            empirical_lipschitz(net, x)
        assert net.stages[0].options.throw is throw


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_wants_none(mode):
    net = relu_network()
    x = torch.randn(8, 6)
    labels = predictions(net, x)
    expected, _ = pgd(net, x, labels, 0.2, steps=5)
    with mode():
        inside = torch.cat([x[:4], x[4:]])
        found, margin = pgd(net, inside, labels, 0.2, steps=5)
        lower = empirical_lipschitz(net, inside, steps=5)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not margin.requires_grad
    assert lower == empirical_lipschitz(net, x, steps=5)


def test_images_and_other_dtypes():
    from lipconvert_plugins.aol import AOLConv2d, AOLLinear

    model = nn.Sequential(AOLConv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), AOLLinear(48, 3))
    net = lc.convert(model, input_shape=(2, 4, 4)).float()
    x = torch.rand(6, 2, 4, 4)  # float64, cast
    labels = predictions(net, x).int()
    found, margin = apgd(net, x, labels, 0.5, box=(0.0, 1.0), steps=10)
    assert (found.shape, found.dtype, margin.dtype) == (x.shape, torch.float32, torch.float32)
    y = net(found).detach()
    for i in range(6):
        own = int(labels[i])
        assert float(margin[i]) == pytest.approx(min(float(y[i, own] - y[i, j]) for j in rivals_of(own, 3)), abs=1e-6)
    assert attack(net, x[:0], labels[:0], [0.1]).shape == (1, 0)
    assert pgd(net, x[:0], labels[:0], 0.1)[0].shape == (0, 2, 4, 4)


def test_lower_bounds_of_a_linear_network():
    M, b = torch.randn(7, 12), torch.randn(7)
    norm = float(torch.linalg.matrix_norm(M, 2))
    net = linear(M, b)
    x = torch.randn(5, 12)
    lower = empirical_lipschitz(net, x)
    assert 0.999 * norm <= lower <= norm
    # with the norm itself as its constant, nothing may pass it by round-off either
    tight = lc.Network([lc.LBEN.from_dae(lc.affine(M / norm * (1 - 1e-15), b, lipschitz=1.0))], [None], (12,))
    assert 0.999 <= empirical_lipschitz(tight, 1e3 * x, steps=200) <= 1.0
    for i, j in ((0, 1), (6, 2)):
        exact = float((M[i] - M[j]).norm())
        assert exact * (1 - 1e-6) <= empirical_lipschitz(net, x, pair=(i, j)) <= exact
    assert empirical_lipschitz(net.float(), x.float()) == pytest.approx(norm, rel=1e-3)
    assert empirical_lipschitz(linear(torch.zeros(2, 3)), torch.zeros(4, 3)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_lower_bounds_against_jacobians(seed):
    net = relu_network(p=2, q=3, seed=seed)
    side = torch.linspace(-2.0, 2.0, 41)
    x = torch.cartesian_prod(side, side)

    def jacobians(points):
        points = points.clone().requires_grad_()
        y = net(points)
        return torch.stack([torch.autograd.grad(y[:, k].sum(), points, retain_graph=True)[0] for k in range(3)], 1)

    J = jacobians(x)
    largest = float(torch.linalg.matrix_norm(J, 2).max())
    assert 0.99 * largest <= empirical_lipschitz(net, x) <= net.lipschitz
    pair = float((J[:, 0] - J[:, 2]).norm(dim=1).max())
    assert 0.99 * pair <= empirical_lipschitz(net, x, pair=(0, 2)) <= math.sqrt(2.0) * net.lipschitz
    assert empirical_lipschitz(net, x[:50], seed=5) == empirical_lipschitz(net, x[:50], seed=5)


def test_a_lower_bound_climbs_to_where_the_slope_is_larger():
    M = torch.randn(3, 4)
    net = lc.convert(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    with torch.no_grad():
        net.stages[0].b_z.copy_(torch.zeros(3))
    M = net.stages[0].dae().U
    norm = float(torch.linalg.matrix_norm(M, 2))  # the Jacobian at 0, where no unit is saturated
    x = torch.tensor([[2.0, -1.0, 1.5, 0.5]])
    slope = 1.0 / torch.cosh(M @ x[0]) ** 2
    assert float(torch.linalg.matrix_norm(slope[:, None] * M, 2)) < 0.9 * norm
    assert 0.99 * norm <= empirical_lipschitz(net, x, steps=100) <= norm


def test_lower_bounds_of_every_architecture():
    for name in ("sll", "cpl", "aol", "sandwich", "mondeq", "lben"):
        net = lc.convert(lc.registry().example_models(name, seed=1)[0].double(), check=False)
        x = torch.randn(4, *net.input_shape)
        assert 0.0 < empirical_lipschitz(net, x, steps=15) <= net.lipschitz


def test_what_the_evaluation_may_be_off_is_subtracted():
    net, x = equilibrium_network(), torch.randn(6, 5)
    real = Accuracy(Bounds(net))

    def told(error, converged=True, pair=None):
        seen = []

        def evaluate(points, double):
            found = real.evaluate(points, double=double)
            seen.append(points)
            off = torch.full_like(found.error, error)
            return SimpleNamespace(value=found.value, error=off, converged=found.converged & converged)

        lower = empirical_lipschitz(net, x, steps=10, pair=pair, accuracy=SimpleNamespace(evaluate=evaluate))
        return lower, seen[0].detach()

    for pair, factor in ((None, 1.0), ((0, 2), math.sqrt(2.0))):
        exact, ends = told(0.0, pair=pair)
        a, b = ends.chunk(2)
        with torch.no_grad():
            difference = net(a) - net(b)
        if pair is not None:
            difference = difference[:, 0] - difference[:, 2]
            difference = difference[:, None]
        rise, length = difference.norm(dim=1), (a - b).norm(dim=1)
        assert exact == pytest.approx(float((rise / length).max()), rel=1e-7)
        by_hand = float(((rise - 2.0 * factor * 1e-3) / length).max())
        assert told(1e-3, pair=pair)[0] == pytest.approx(by_hand, rel=1e-7)
        assert empirical_lipschitz(net, x, steps=10, pair=pair) <= exact * (1 + 1e-12)
    assert told(0.0, converged=False)[0] == 0.0
    assert told(math.inf)[0] == 0.0
    assert told(10.0)[0] == 0.0


@SEARCHES
def test_bad_arguments_are_named(search):
    net = relu_network()
    x, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
    for radius in (-0.1, math.nan, math.inf, torch.tensor([0.1, 0.1, -1.0, 0.1])):
        with pytest.raises(lc.InvalidParameterError, match="radius"):
            search(net, x, labels, radius)
    with pytest.raises(lc.ShapeError, match="radius"):
        search(net, x, labels, torch.ones(3))
    for wrong in ({"steps": 0}, {"restarts": 0}, {"loss": "hinge"}, {"seed": -1}, {"first": -1}):
        with pytest.raises(lc.InvalidParameterError, match=next(iter(wrong))):
            search(net, x, labels, 0.1, **wrong)
    for box in ((1.0, 0.0), (0.0, 0.0), (0.0, math.nan), (0.5, 1.0)):
        with pytest.raises(lc.InvalidParameterError, match="box"):
            search(net, x, labels, 0.1, box=box)
    for bad in (torch.tensor([0, 1, 2, 4]), torch.tensor([0, -1, 2, 3]), labels.double(), labels > 1, labels[:3]):
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError), match="label"):
            search(net, x, bad, 0.1)
    with pytest.raises(lc.ShapeError):
        search(net, x[:, :5], labels, 0.1)
    with pytest.raises(lc.InvalidParameterError, match=r"0\.\.255"):
        search(net, (255 * x).byte(), labels, 0.1)
    x[2, 1] = math.nan
    with pytest.raises(lc.NotFiniteError, match=r"^x: "):
        search(net, x, labels, 0.1)
    with pytest.raises(lc.InvalidParameterError, match="convert"):
        search(nn.Linear(6, 4), x, labels, 0.1)
    with pytest.raises(lc.ShapeError, match="logits"):
        search(linear(torch.ones(1, 6)), torch.rand(4, 6), torch.zeros(4, dtype=torch.long), 0.1)


def test_bad_arguments_of_the_others():
    net = relu_network()
    x, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
    for radii in ([], [0.1, -0.1], [math.nan], [math.inf]):
        with pytest.raises(lc.InvalidParameterError, match="radi"):
            attack(net, x, labels, radii)
    with pytest.raises(lc.InvalidParameterError, match="radii"):
        attack(net, x, labels, 0.1)
    with pytest.raises(lc.InvalidParameterError, match="method"):
        attack(net, x, labels, [0.1], method="fgsm")
    for wrong in ({"steps": 0}, {"restarts": 0}, {"seed": -1}, {"first": -1}):
        with pytest.raises(lc.InvalidParameterError, match=next(iter(wrong))):
            attack(net, x, labels, [0.1], **wrong)
    for pair in ((0, 0), (0, 4), (-1, 2), (0, 1, 2)):
        with pytest.raises(lc.InvalidParameterError, match="pair"):
            empirical_lipschitz(net, x, pair=pair)
    for wrong in ({"steps": 0}, {"seed": -1}):
        with pytest.raises(lc.InvalidParameterError, match=next(iter(wrong))):
            empirical_lipschitz(net, x, **wrong)
    with pytest.raises(lc.InvalidParameterError, match="empty"):
        empirical_lipschitz(net, x[:0])
    with pytest.raises(lc.ShapeError):
        empirical_lipschitz(net, x[:, :2])
    with pytest.raises(lc.NotFiniteError):
        empirical_lipschitz(net, x / 0.0)
    with pytest.raises(lc.InvalidParameterError, match="convert"):
        empirical_lipschitz(nn.Linear(6, 4), x)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    net = relu_network()
    with pytest.raises(lc.InvalidParameterError, match=r"pip install 'lipconvert\[attack\]'"):
        attack(net, torch.rand(4, 6), torch.zeros(4, dtype=torch.long), [0.1], method="ensemble")


def stand_in(found):
    """A toolbox whose attacks hand back ``found(images, eps)``."""
    made = []

    class Attack:
        def __init__(self, classifier, *, eps, norm, batch_size, verbose, **options):
            made.append((options.get("loss_type", "square"), eps))
            self.classifier, self.eps = classifier, eps
            assert (norm, verbose) == (2, False)

        def generate(self, images, labels):
            assert images.dtype == np.float32
            assert labels.shape == (len(images),)
            assert torch.is_grad_enabled()
            random.random()
            np.random.rand(3)
            return found(images, self.eps)

    evasion = SimpleNamespace(AutoProjectedGradientDescent=Attack, SquareAttack=Attack)
    classification = SimpleNamespace(PyTorchClassifier=lambda model, *args, **kwargs: model)
    return made, {"art.attacks.evasion": evasion, "art.estimators.classification": classification}


def test_what_the_toolbox_finds_is_drawn_into_the_ball(monkeypatch):
    net = relu_network()
    x = 2.0 * torch.randn(40, 6)
    labels = predictions(net, x)
    least = float(certified_radii(net, x, labels).min())
    radii = [least, 2.0 * least]
    states = random.getstate(), np.random.get_state()[1].copy()

    def too_far(images, eps):
        images = images + 10.0 * np.sign(np.random.randn(*images.shape)).astype(np.float32)
        images[0] = np.nan
        return images

    made, modules = stand_in(too_far)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    standing = attack(net, x, labels, radii, method="ensemble", steps=5)
    assert bool(standing[0].all())  # certified: nothing within that radius breaks them, only what lies outside
    assert made[:2] == [("cross_entropy", radii[0]), ("difference_logits_ratio", radii[0])]
    assert (random.getstate(), list(np.random.get_state()[1])) == (states[0], list(states[1]))

    # what only the toolbox finds counts
    module = importlib.import_module("lipconvert.attacks.attack")
    monkeypatch.setattr(module, "_climb", lambda *args: (args[-3].x, torch.full_like(args[-3].x[:, 0], math.inf)))
    exact, _ = apgd(net, x, labels, 0.0)
    assert torch.equal(exact, x)
    M = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    flat, x = linear(M), torch.tensor([[1.0, 0.9], [1.0, -1.0]])
    made, modules = stand_in(lambda images, eps: images + eps * np.array([-1.0, 1.0], np.float32) / np.sqrt(2.0))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    standing = attack(flat, x, torch.zeros(2, dtype=torch.long), [0.0, 0.08, 0.05], method="ensemble", steps=5)
    assert standing.tolist() == [[True, True], [False, True], [True, True]]
    assert {loss for loss, _ in made} == {
        "cross_entropy"
    }  # with two classes there is no DLR, without images no squares


def test_the_toolbox_itself():
    pytest.importorskip("art", reason="the extra [attack] is not installed")
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3))
    net = lc.convert(model, input_shape=(1, 12, 12))
    x = torch.rand(10, 1, 12, 12)
    labels = predictions(net, x)
    radii = [0.0, float(certified_radii(net, x, labels).min()) * (1 - 1e-6), 0.2, 1.0]
    for box in (None, (0.0, 1.0)):
        ensemble = attack(net, x, labels, radii, method="ensemble", steps=10, box=box)
        assert bool(ensemble[:2].all())
        assert bool((ensemble <= attack(net, x, labels, radii, method="apgd", steps=10, box=box)).all())
