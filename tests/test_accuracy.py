"""Bounds of the error of a run against the network of the same floats in extended precision, and against the source."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import exact
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor, nn

import lipconvert as lc
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import Bounds, class_pairs
from lipconvert.linalg.rounding import transform_growth
from lipconvert.linalg.state_map import StateMap

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]
DTYPES = [torch.float64, torch.float32]
EXPLICIT = ("aol", "cpl", "sandwich", "sll")


@pytest.fixture
def in_other_floats(monkeypatch):
    """Methods that are replaced stand for other hardware here, whose floats are as bad as they may be: none is refused."""
    monkeypatch.setattr("lipconvert.networks.lben.require_own", lambda stage, where: None)
    monkeypatch.setattr(Bounds, "require_unchanged", lambda bounds: None)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def example(name: str, k: int, seed: int = 0, **how) -> tuple[nn.Module, lc.Network]:
    model = lc.registry().example_models(name, seed=seed)[k].double()
    return model, lc.convert(model, getattr(model, "input_shape", None), check=False, **how)


def accuracy_of(net: lc.Network) -> Accuracy:
    return Accuracy(Bounds(net))


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)


def rescaled(x: Tensor, size: float) -> Tensor:
    return x * (size / norms(x).clamp(min=1e-300)).reshape(-1, *[1] * (x.dim() - 1))


def steepest(net: lc.Network, x: Tensor) -> Tensor:
    """The direction in which the output grows fastest, where states and so the errors are large."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x)
    return gradient + 1e-30 * torch.randn_like(gradient)


def around(net: lc.Network, x: Tensor, radii: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(points, the row of x each belongs to, their exact distances from it): random, and in the steepest direction."""
    rows = [x]
    for r in radii:
        for direction in (torch.randn_like(x), torch.randn_like(x), steepest(net, x), -steepest(net, x)):
            rows.append(x + rescaled(direction, r))
    points, row = torch.cat(rows), torch.arange(len(x)).repeat(len(rows))
    return points, row, norms(points.double() - x[row].double())


def pair_differences(y: Tensor) -> Tensor:
    i, j = torch.tensor(class_pairs(y.shape[1])).T
    return y[:, i] - y[:, j]


def ratios(net: lc.Network, accuracy: Accuracy, x: Tensor, points: Tensor, row: Tensor, r: Tensor, truth: Tensor):
    """|run − exact| over its bound, for the output and for every pair: at most 1, of the samples that have a bound."""
    found = accuracy.evaluate(x)
    with torch.no_grad():
        off = net(points).double() - truth  # in one batch, with others beside it
    places = 4e-16 * truth.flatten(1).norm(dim=1)  # truth is rounded once
    bound = found.error[row, 0] + found.error[row, 1] * r
    known = found.converged[row]
    shares = [((norms(off) - places) / bound)[known]]
    if found.pair_error is not None:
        bound = found.pair_error[row, :, 0] + found.pair_error[row, :, 1] * r[:, None]
        shares.append(((pair_differences(off).abs() - places[:, None]) / bound)[known].flatten())
    return torch.cat(shares), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_run_is_as_close_to_the_exact_network_as_the_bound_says(name, k, dtype):
    """At an input and at points within 2 of it, by every solver, converged tightly and loosely."""
    steps = []
    for merge in (False, True):
        net = example(name, k, merge=merge)[1].to(dtype)
        if [repr(step) for step in net.steps] == steps:
            continue  # nothing to merge
        steps = [repr(step) for step in net.steps]
        x = 2.0 * torch.randn(6, *net.input_shape, dtype=dtype)
        points, row, r = around(net, x, (0.3, 2.0))
        truth, accuracy = exact(net, points), accuracy_of(net)
        share, found = ratios(net, accuracy, x, points, row, r, truth)
        assert bool(found.converged.all())
        assert float(share.max()) <= 1.0
        assert float(found.error.max()) <= (1e-8 if dtype == torch.float64 else 0.1)
        assert (found.pair_error is None) == (len(truth.shape) > 2)
        # What converges at all, and soon. Newton's method is not for images.
        methods = ["peaceman_rachford", "sweep" if name in EXPLICIT else "newton"]
        methods += ["forward_backward"] * ("mondeq" in name)
        for method, tolerance in ((method, 1e-5) for method in methods if method != "newton" or not net.stages[0].grid):
            net.set_options(lc.SolverOptions(method, tolerance, max_steps=20_000))
            share, found = ratios(net, accuracy, x, points, row, r, truth)
            assert bool(found.converged.all())
            assert float(share.max()) <= 1.0


@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_loose_solve_is_as_close_to_the_source_as_the_bound_says(name, k):
    """Explicit layers, or an equilibrium solved by the plugin's own module."""
    model, net = example(name, k, seed=3)
    x = 2.0 * torch.randn(32, *net.input_shape)
    with torch.no_grad():
        y = model(x)
    accuracy = accuracy_of(net)
    for tolerance in (1e-2, 1e-5, 1e-8):
        for method in ("auto", "sweep", "peaceman_rachford"):
            found = net.set_options(lc.SolverOptions(method, tolerance, max_steps=300)) and accuracy.evaluate(x)
            good = found.converged
            if tolerance < 1e-3 and (method != "sweep" or name in EXPLICIT):
                assert bool(good.all())
            # The source itself is exact to about 1e-13 (an equilibrium model is solved to that tolerance).
            assert bool((norms(found.value - y) <= found.error[:, 0] + 1e-11)[good].all())
            if found.pair_error is not None:
                off = pair_differences(found.value - y).abs()
                assert bool((off <= found.pair_error[..., 0] + 1e-11)[good].all())


def scalar(w: float, bias: float, tolerance: float, dtype: torch.dtype = torch.float64) -> lc.Network:
    """z = relu(wz + x + b), y = (z, −z): one state, solved by plain iteration, which stops at the tolerance."""
    U, G = torch.ones(1, 1), torch.tensor([[1.0], [-1.0]])
    # H(Λ, L) = 2Λ(1 − w) − 2/L − Λ²/L is largest, 0, for Λ = L(1 − w) and L = √2/(1 − w)
    L = 1.01 * math.sqrt(2.0) / (1.0 - w)
    dae = lc.DAE(torch.full((1, 1), w), U, G, torch.full((1,), L * (1.0 - w)), torch.full((1,), bias), lipschitz=L)
    stage = lc.LBEN.from_dae(dae, options=lc.SolverOptions("sweep", tolerance))
    return lc.Network([stage], [None], (1,)).to(dtype)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("w", [0.9, -0.5])
def test_the_bound_is_nearly_attained(w, tolerance):
    """Where plain iteration stops just below its tolerance, a one-dimensional error is |d|/μ itself."""
    net, x = scalar(w, 0.3, tolerance), torch.linspace(0.01, 3.0, 100)[:, None]
    found = accuracy_of(net).evaluate(x)
    z = (0.3 + x) / (1.0 - w)
    off = (found.value - torch.cat([z, -z], 1)).abs()
    assert bool(found.converged.all())
    for share in (norms(off) / found.error[:, 0], 2.0 * off[:, 0] / found.pair_error[:, 0, 0]):
        assert float(share.max()) <= 1.0
        assert float(share.max()) >= (0.15 if w > 0 else 0.05)
    # And far from the input that the bound was computed at: what grows with r is attained as well.
    at, r = accuracy_of(net).evaluate(torch.tensor([[0.01]])), x[:, 0] - 0.01
    share = norms(off) / (at.error[0, 0] + at.error[0, 1] * r)
    assert float(share.max()) <= 1.0
    assert float(share[50:].max()) >= (0.15 if w > 0 else 0.05)


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("w", [0.9, 0.5, -0.5])
def test_a_solver_that_stops_as_early_as_it_may(w, tolerance, monkeypatch):
    """Its residual is the tolerance times the scale: in one dimension the bound is little more than the error."""
    net, x = scalar(w, 0.3, tolerance), torch.linspace(0.01, 3.0, 50)[:, None]
    bounds, stage = Bounds(net), net.stages[0]

    def stopped(self, x, options=None):
        u = x + 0.3
        z = u / (1.0 - w)
        # (1 − w) off = tolerance (|z + off| + |u| + |w (z + off)|)
        off = tolerance * ((1.0 + abs(w)) * z + u) / ((1.0 - w) - tolerance * (1.0 + abs(w)))
        solution = lc.Solution(z + off, off, z, torch.ones(len(x)).long(), torch.zeros(len(x)).long(), "stopped")
        assert bool(solution.converged.all())
        return solution

    monkeypatch.setattr(lc.LBEN, "solve", stopped)
    found, at = Accuracy(bounds).evaluate(x), Accuracy(bounds).evaluate(x[:1])
    z = (x[:, 0] + 0.3) / (1.0 - w)
    off, r = found.value[:, 0] - z, x[:, 0] - 0.01
    assert bool((off > 0).all())
    least = 0.6 if w > 0 else 0.4  # of −w only |w| is known; substitution could have left W − T out as well
    for bound, size in (
        (found.error[:, 0], 2.0**0.5 * off),
        (found.pair_error[:, 0, 0], 2.0 * off),
        (at.error[0, 0] + at.error[0, 1] * r, 2.0**0.5 * off),
        (at.pair_error[0, 0, 0] + at.pair_error[0, 0, 1] * r, 2.0 * off),
    ):
        assert bool((size <= bound).all())
        assert bool((size >= least * bound).all())
    assert stage.options.tolerance == tolerance


def test_what_substitution_leaves_out():
    """W is triangular but for an entry just below the tolerance, which one pass does not read."""
    tolerance, entry = 1e-2, 0.99e-2
    W = torch.tensor([[0.0, entry], [0.5, 0.0]])
    options = lc.SolverOptions("forward_substitution", tolerance)
    stage = lc.LBEN.from_dae(lc.DAE(W, torch.ones(2, 1), torch.eye(2), torch.ones(2), lipschitz=4.0), options=options)
    stage.blocks = (1, 1)
    net, x = lc.Network([stage], [None], (1,)), torch.linspace(0.1, 2.0, 20)[:, None]
    assert net.methods(x) == ["forward_substitution"]
    found, truth = accuracy_of(net).evaluate(x), exact(net, x)
    share = norms(found.value - truth) / found.error[:, 0]
    assert 0.1 <= float(share.max()) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerances_of_each_dtype(dtype):
    """At the default tolerance the solver's error is what counts, in either precision."""
    for w in (0.99, 0.5):
        net = scalar(w, 0.3, None, dtype)
        x = torch.linspace(0.01, 3.0, 200, dtype=dtype)[:, None]
        found = accuracy_of(net).evaluate(x)
        share = norms(found.value.double() - exact(net, x)) / found.error[:, 0]
        assert 0.05 <= float(share.max()) <= 1.0


def identity_stage(size: int, image: tuple[int, ...] = (), bias: float = 0.0) -> lc.LBEN:
    """y = relu(Px + b) + b with a cyclic permutation P: (2)'s W = I − (I/4 + PP′/4 + I/2) is 0 without any rounding."""
    stage = lc.LBEN(size, size, size, image=image, lipschitz=2.0, epsilon=0.5, fill=False)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
        places = (slice(None),) * 2 + (0,) * len(image)
        stage.U[places] = torch.eye(size).roll(1, 0)
        stage.G[places] = torch.eye(size)
        stage.b_z.fill_(bias)
        stage.b_y.fill_(bias)
    assert not bool(stage.W.any())
    stage.options = lc.SolverOptions(tolerance=1e-30)
    return stage


def worst(function, growth):
    """The function with a relative error of ``growth``, in the direction of its value: within any bound of that size."""
    return lambda *arguments, **options: function(*arguments, **options) * (1.0 + growth)


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_round_as_badly_as_they_may(dtype, monkeypatch):
    """Nonnegative sums of k products, each off by k u: what γ_k allows in any order of summation."""
    u, n = torch.finfo(dtype).eps / 2, 64
    U, G = torch.rand(n, n) / n, torch.rand(n, n) / n  # of norms below 1
    dae = lc.DAE(torch.zeros(n, n), U, G, torch.ones(n), torch.ones(n) / n, torch.ones(n) / n)
    stage = lc.LBEN.from_dae(dae).to(dtype)
    net, x = lc.Network([stage], [None], (n,)), torch.rand(5, n, dtype=dtype)
    truth, accuracy = exact(net, x), accuracy_of(net)
    monkeypatch.setattr(lc.LBEN, "drive", worst(lc.LBEN.drive, n * u))
    monkeypatch.setattr(lc.LBEN, "readout", worst(lc.LBEN.readout, n * u))
    found = accuracy.evaluate(x)
    off = found.value.double() - truth
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((norms(off) >= 0.2 * found.error[:, 0]).all())
    assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_that_are_zero_do_not_round(dtype):
    """A permutation of 64 inputs is exact but for the constants, as is the bound: 9 operations, not 72."""
    u, n = torch.finfo(dtype).eps / 2, 64
    net, x = lc.Network([identity_stage(n, bias=0.5).to(dtype)], [None], (n,)), torch.rand(5, n, dtype=dtype)
    found = accuracy_of(net).evaluate(x)
    assert bool((norms(found.value.double() - exact(net, x)) <= found.error[:, 0]).all())
    assert bool((found.error[:, 0] <= 25.0 * u * norms(1.0 + x.double())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transforms_that_are_as_bad_as_they_may_be(dtype, monkeypatch):
    """Each of the four transforms of a stage off by η: to frequencies, to pixels for σ, back, and to pixels again."""
    image = (8, 4)
    stage = identity_stage(2, image, bias=0.5).to(dtype)
    net, x = lc.Network([stage, nn.Flatten()], [None, None], (2, *image)), torch.rand(5, 2, *image, dtype=dtype)
    truth, accuracy = exact(net, x), accuracy_of(net)
    eta = transform_growth(image) * torch.finfo(dtype).eps / 2
    for transform in ("rfft2", "irfft2"):
        monkeypatch.setattr(torch.fft, transform, worst(getattr(torch.fft, transform), eta))
    found = accuracy.evaluate(x)
    off = found.value.double() - truth
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((norms(off) >= 0.2 * found.error[:, 0]).all())
    assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


def signed(function, growth):
    """The function with errors of ``growth`` of its values, up in the first entry, down in the second, and so on."""

    def wrapped(*arguments, **options):
        values = function(*arguments, **options)
        signs = torch.ones(values.shape[1]).to(values)
        signs[1::2] = -1.0
        return values * (1.0 + growth * signs.reshape(-1, *[1] * (values.dim() - 2)))

    return wrapped


def fan_in(scale: float = 1.0, n: int = 512, q: int = 4) -> lc.LBEN:
    """y = relu(x)·1′/(2√n) in each of q outputs: U = I rounds nothing, G sums n terms."""
    eye, G = torch.eye(n), torch.full((q, n), 0.5 * scale / n**0.5)
    return lc.LBEN.from_dae(lc.DAE(torch.zeros(n, n), eye, G, torch.full((n,), scale), lipschitz=scale))


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_readout_that_rounds_as_badly_as_it_may(at, monkeypatch):
    """At x, and at x′ far from an x where all is 0; in opposite directions for two logits."""
    u, n = 2.0**-53, 512
    net, accuracy = lc.Network([fan_in()], [None], (n,)), None
    accuracy = accuracy_of(net)
    x, step = at * torch.rand(3, n), torch.rand(3, n)
    near = x + step
    truth = {0: exact(net, x), 1: exact(net, near)}
    monkeypatch.setattr(lc.LBEN, "readout", signed(lc.LBEN.readout, n * u))
    found = accuracy.evaluate(x)
    for k, (place, r) in enumerate(((x, torch.zeros(3)), (near, norms(step)))):
        with torch.no_grad():
            off = net(place) - truth[k]
        bound, pairs = (
            e[..., 0] + e[..., 1] * r.reshape(-1, *[1] * (e.dim() - 2)) for e in (found.error, found.pair_error)
        )
        assert bool((norms(off) <= bound).all())
        assert bool((pair_differences(off).abs() <= pairs).all())
        if at or k:
            assert bool((norms(off) >= 0.3 * bound).all())
            assert bool((pair_differences(off)[:, 0].abs() >= 0.3 * pairs[:, 0]).all())


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("layers", [1, 2])
def test_states_that_round_as_badly_as_they_may_at_perturbed_inputs(layers, monkeypatch):
    """x = 0 is exact; at x′ sums of n products of the first block, and of the second, are off by n u."""
    u, n = 2.0**-53, 256
    blocks = [torch.rand(n, n) / n for _ in range(layers)]
    zero, eye = torch.zeros(n, n), torch.eye(n)
    W = torch.zeros(layers * n, layers * n)
    if layers == 2:
        W[n:, :n] = blocks[1]
    U = torch.cat([blocks[0] if layers == 1 else eye, zero][:layers])
    G = torch.cat([zero, eye], 1)[:, -layers * n :]
    stage = lc.LBEN.from_dae(lc.DAE(W, U, G, torch.ones(layers * n), blocks=(n,) * layers))
    net = lc.Network([stage, nn.Unflatten(1, (1, n))], [None, None], (n,))  # no logits: no 32,640 pairs
    accuracy, x = accuracy_of(net), torch.rand(5, n)
    truth = exact(lc.Network([stage], [None], (n,)), x).unsqueeze(1)
    if layers == 1:
        monkeypatch.setattr(lc.LBEN, "drive", worst(lc.LBEN.drive, n * u))
    else:
        monkeypatch.setattr(StateMap, "rows_below", worst(StateMap.rows_below, n * u))
    found = accuracy.evaluate(torch.zeros(5, n))
    with torch.no_grad():
        off = net(x) - truth
    r = norms(x)
    assert bool((found.error[:, 0] < 1e-20).all())
    assert bool((norms(off) <= found.error[:, 1] * r).all())
    assert bool((norms(off) >= 0.1 * found.error[:, 1] * r).all())


class Rough(nn.Module):
    """A third party's glue that is the identity, but for errors of as many units as there are entries."""

    lipschitz = 1.0

    def forward(self, x):
        return signed(lambda x: x, x.shape[1] * 2.0**-53)(x)


def test_glue_behind_the_last_stage_that_rounds_as_badly_as_it_may():
    n = 200
    stage = lc.LBEN.from_dae(lc.DAE(torch.zeros(n, n), torch.eye(n), torch.eye(n), torch.ones(n)))
    net, x = lc.Network([stage, Rough()], [None, 1.0], (n,), [None, (0.0, float(n))]), torch.rand(3, n)
    x[:, 2:] *= 1e-3
    found = accuracy_of(net).evaluate(x)
    off = found.value - x
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((norms(off) >= 0.5 * found.error[:, 0]).all())
    assert found.pair_error is None  # what it does to single logits is not known


@pytest.mark.usefixtures("in_other_floats")
def test_pooling_behind_the_last_stage_that_rounds_as_badly_as_it_may(monkeypatch):
    """Its windows of 256 pixels, in opposite directions for two logits; the bound without what transforms may do."""
    image = (16, 16)
    monkeypatch.setattr("lipconvert.certification.accuracy.transform_growth", lambda image: 0.0)
    net = lc.Network([identity_stage(2, image), lc.MeanPool(16), nn.Flatten()], [None] * 3, (2, *image))
    x = torch.ones(1, 2, *image) * torch.tensor([1.0, 2.0])[:, None, None]
    truth, accuracy = exact(net, x), accuracy_of(net)
    monkeypatch.setattr(lc.MeanPool, "forward", signed(lc.MeanPool.forward, 256 * 2.0**-53))
    found = accuracy.evaluate(x)
    off = pair_differences(found.value - truth)
    assert bool((off.abs() <= found.pair_error[..., 0]).all())
    assert bool((off.abs() >= 0.5 * found.pair_error[..., 0]).all())


@pytest.mark.usefixtures("in_other_floats")
def test_what_a_first_stage_stretches_rounds_more_in_the_second(monkeypatch):
    u, n, L = 2.0**-53, 512, 3.0
    first = lc.LBEN.from_dae(
        lc.DAE(torch.zeros(n, n), torch.eye(n), L * torch.eye(n), torch.full((n,), L), lipschitz=L)
    )
    net = lc.Network([first, nn.ReLU(), fan_in()], [None, None, None], (n,))
    accuracy, x = accuracy_of(net), torch.rand(3, n)
    truth = exact(net, x)
    readout = lc.LBEN.readout
    monkeypatch.setattr(
        lc.LBEN,
        "readout",
        lambda stage, *rest: (readout if len(stage.b_y) == n else signed(readout, n * u))(stage, *rest),
    )
    found = accuracy.evaluate(torch.zeros(3, n))
    with torch.no_grad():
        off = net(x) - truth
    assert bool((norms(off) <= found.error[:, 0] + found.error[:, 1] * norms(x)).all())
    assert bool((norms(off) >= 0.35 * found.error[:, 1] * norms(x)).all())
    pairs = found.pair_error[:, 0, 0] + found.pair_error[:, 0, 1] * norms(x)
    assert bool((pair_differences(off)[:, 0].abs() <= pairs).all())


@pytest.mark.parametrize("pair", [False, True], ids=["output", "difference"])
def test_the_bound_of_four_transforms_is_reached(pair, monkeypatch):
    """With η so large that nothing else counts, each of the four off by η of its norm, where the output, or the difference of
    two logits, sees it best: the bound is met, so none of its terms can be left out."""
    image, eta = (4, 4), 1e-6
    monkeypatch.setattr("lipconvert.certification.accuracy.transform_growth", lambda image: eta * 2.0**53)
    net = lc.Network([identity_stage(2, image), nn.Flatten()], [None, None], (2, *image))
    x = 1.0 + torch.rand(3, 2, *image)
    truth, accuracy = exact(net, x), accuracy_of(net)
    direction = torch.zeros(2, *image)
    direction[0, 0, 0], direction[1, 2, 1] = 0.5**0.5, -(0.5**0.5)
    turned = iter([direction.roll(-1, 0), direction, direction, direction])  # the permutation comes behind the first

    def adversarial(values):
        size = torch.linalg.vector_norm(values.flatten(1), dim=1)[:, None, None, None]
        along = next(turned, torch.zeros_like(direction)) if pair else values / size
        return values + eta * size * along

    to_coordinates, to_values = lc.Grid.coordinates, lc.Grid.values
    monkeypatch.setattr(lc.Grid, "coordinates", lambda grid, x: to_coordinates(grid, adversarial(x)))
    monkeypatch.setattr(lc.Grid, "values", lambda grid, X: adversarial(to_values(grid, X)))
    found = accuracy.evaluate(x)
    off = found.value - truth
    if pair:
        k = class_pairs(32).index((2 * 4 + 1 + 16, 0))
        off, bound = (off[:, 25] - off[:, 0]).abs(), found.pair_error[:, k, 0]
    else:
        off, bound = norms(off), found.error[:, 0]
    assert bool((off <= bound).all())
    assert bool((off >= 0.9 * bound).all())


def test_an_elementary_function_may_be_off_by_what_is_said(monkeypatch):
    ulps = 1e7
    monkeypatch.setattr("lipconvert.certification.accuracy.ELEMENTARY", ulps)
    n = 4
    dae = lc.DAE(torch.zeros(n, n), torch.eye(n), torch.eye(n), torch.ones(n), activations=lc.Activations("tanh", n))
    net, x = lc.Network([lc.LBEN.from_dae(dae)], [None], (n,)), torch.randn(5, n)
    truth, accuracy = exact(net, x), accuracy_of(net)
    monkeypatch.setattr(torch, "tanh", worst(torch.tanh, ulps * 2.0**-53))
    found = accuracy.evaluate(x)
    off = found.value - truth
    assert bool((norms(off) > 0.5 * ulps * 2.0**-53 * norms(truth)).all())
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_complex_products_that_round_as_badly_as_they_may(dtype, monkeypatch):
    """Of n complex products: two sums of 2n real ones, off by 2n u of Σ|a||b| each."""
    u, n, image = torch.finfo(dtype).eps / 2, 64, (1, 1)
    grid = lc.Grid(image)
    U, G = (grid.matrices((torch.rand(n, n) / n)[:, :, None, None]) for _ in range(2))
    dae = lc.DAE(torch.zeros_like(U), U, G, torch.ones(n), torch.ones(n) / n, torch.ones(n) / n, grid=grid)
    net = lc.Network([lc.LBEN.from_dae(dae), nn.Flatten()], [None, None], (n, *image)).to(dtype)
    x = torch.rand(5, n, *image, dtype=dtype)
    truth, accuracy = exact(net, x), accuracy_of(net)
    monkeypatch.setattr(lc.LBEN, "drive", worst(lc.LBEN.drive, 2.8 * n * u))
    monkeypatch.setattr(lc.LBEN, "readout", worst(lc.LBEN.readout, 2.8 * n * u))
    found = accuracy.evaluate(x)
    off = found.value.double() - truth
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


@pytest.mark.usefixtures("in_other_floats")
@pytest.mark.parametrize("where", ["alone", "before", "behind"])
@pytest.mark.parametrize("glue", [lc.Normalize(0.5, 0.01), lc.MeanPool(2), nn.AvgPool2d(2), nn.Tanh()], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glue_that_rounds_as_badly_as_it_may(dtype, glue, where, monkeypatch):
    """Off by 2 u of what it adds up, before a stage or behind one."""
    if where == "alone" and dtype != torch.float64:
        pytest.skip("a network without parameters is in float64")
    u, pools = torch.finfo(dtype).eps / 2, isinstance(glue, lc.MeanPool | nn.AvgPool2d)
    stage = identity_stage(1, (2, 2) if where == "before" and pools else (4, 4))
    steps = {"alone": [glue], "before": [glue, stage], "behind": [stage, glue]}[where]
    net = lc.Network([*steps, nn.Flatten()], [None] * (len(steps) + 1), (1, 4, 4)).to(dtype)
    x = torch.rand(5, 1, 4, 4, dtype=dtype)
    truth, accuracy, forward = exact(net, x), accuracy_of(net), type(glue).forward
    # (x − mean)/std loses u of x and of the mean, and twice u of the result; a mean of k² pixels a few u of itself
    constant = 0.5 / 0.01 if isinstance(glue, lc.Normalize) else 0.0
    monkeypatch.setattr(type(glue), "forward", lambda m, x: forward(m, x) + 2 * u * (forward(m, x).abs() + constant))
    found = accuracy.evaluate(x)
    off = found.value.double() - truth
    assert float(norms(off).min()) > 0.0
    assert bool((norms(off) <= found.error[:, 0]).all())
    if found.pair_error is not None:  # an activation at the end is no linear functional
        assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


class Foreign(nn.Module):
    """Glue the core does not know."""

    def forward(self, x):
        return x


def test_an_error_grows_by_the_constant_of_what_follows():
    tight = lc.SolverOptions(tolerance=1e-14)
    stage = lc.LBEN(4, 7, 5, options=lc.SolverOptions(tolerance=1e-3))
    thousand = lc.LBEN.from_dae(lc.affine(1000.0 * torch.eye(5), lipschitz=1000.0), options=tight)
    x = torch.randn(6, 4)
    alone = accuracy_of(lc.Network([stage], [None], (4,))).evaluate(x)
    assert float(alone.error.min()) > 0.0
    for follower, given in ((thousand, None), (lc.Normalize(0.0, 1e-3), None), (Foreign(), 1000.0)):
        rounding = None if given is None else (0.0, 0.0)
        found = accuracy_of(lc.Network([stage, follower], [None, given], (4,), [None, rounding])).evaluate(x)
        # proved at L(1 + 1e-6) where L itself has no proof
        np.testing.assert_allclose(found.error.numpy(), 1000.0 * alone.error.numpy(), rtol=2e-6)
    # of a pair, through the last stage's constant and √2
    found = accuracy_of(lc.Network([stage, thousand], [None, None], (4,))).evaluate(x)
    expected = 2.0**0.5 * 1000.0 * alone.error
    np.testing.assert_allclose(found.pair_error.numpy(), expected.unsqueeze(1).expand(-1, 10, -1).numpy(), rtol=2e-6)


def test_the_bound_of_a_chain_of_stages_and_glue_holds():
    """LBEN, a linear map of norm 3, a shift, LBEN: each solved loosely by its own tolerance."""
    glue = nn.Linear(5, 5)
    with torch.no_grad():
        glue.weight *= 3.0 / torch.linalg.matrix_norm(glue.weight, 2)
        rounding = 7.0 * float(glue.bias.norm()), 7.0 * float(torch.linalg.matrix_norm(glue.weight.abs(), 2))
    for seed in range(6):
        torch.manual_seed(seed)
        first = lc.LBEN(4, 7, 5, lipschitz=1.5, epsilon=0.3)
        second = lc.LBEN(5, 6, 3, lipschitz=0.7, epsilon=0.2, activation="tanh")
        steps = [first, glue, lc.Normalize(0.3, 0.5), second]
        net = lc.Network(steps, [None, 3.0, None, None], (4,), [None, rounding, None, None])
        x = 3.0 * torch.randn(12, 4)
        points, row, r = around(net, x, (0.5, 2.0))
        truth, accuracy = exact(net, points), accuracy_of(net)
        for a, b in ((1e-3, 1e-6), (1e-7, 1e-3), (1e-4, 1e-4)):
            for stage, tolerance in ((first, a), (second, b)):
                stage.options = lc.SolverOptions("peaceman_rachford", tolerance, max_steps=100_000)
            share, found = ratios(net, accuracy, x, points, row, r, truth)
            assert bool(found.converged.all())
            assert 1e-5 < float(share.max()) <= 1.0


@pytest.mark.parametrize("depth", [15, 40])
@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear, AOLLinear, SandwichLinear])
def test_deep_chains_have_a_bound(kind, depth):
    """At ε = 0 the network's own metric has no margin; the falling weights give one at any depth."""
    layers = [kind(8) if kind in (SLLLinear, CPLLinear) else kind(8, 8) for _ in range(depth)]
    with torch.no_grad():
        for layer in layers:
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*layers)
    net, x = lc.convert(model, (8,), check=False), torch.randn(16, 8)
    found = accuracy_of(net).evaluate(x)
    with torch.no_grad():
        off = found.value - model(x)
    assert bool(found.converged.all())
    assert float(found.error.max()) < 1e-3
    assert bool((norms(off) <= found.error[:, 0]).all())
    assert bool((pair_differences(off).abs() <= found.pair_error[..., 0]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cpl", "sll", "aol", "sandwich"])
def test_a_network_whose_weights_have_moved(name, dtype):
    """A chain is then a true equilibrium: sweeps and splitting, not one pass."""
    net = lc.convert(example(name, 0)[0], check=False, epsilon=1e-3, delta=1e-2).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    x = torch.randn(8, *net.input_shape, dtype=dtype)
    assert "forward_substitution" not in net.methods(x)
    points, row, r = around(net, x, (0.3, 2.0))
    truth, accuracy = exact(net, points), accuracy_of(net)
    for tolerance in (None, 1e-4, 1e-6):
        net.set_options(lc.SolverOptions("auto", tolerance))
        share, found = ratios(net, accuracy, x, points, row, r, truth)
        assert bool(found.converged.all() or tolerance == 1e-4)
        assert share.numel() == 0 or float(share.max()) <= 1.0


@pytest.mark.parametrize(("name", "k"), [("sll", 2), ("mondeq", 1), ("lben", 2), ("aol", 0)])
def test_the_same_floats_in_float64_are_much_closer(name, k):
    net = example(name, k)[1].float()
    x = torch.randn(8, *net.input_shape, dtype=torch.float32)
    truth, accuracy = exact(net, x), accuracy_of(net)
    single, double = accuracy.evaluate(x), accuracy.evaluate(x, double=True)
    assert (single.value.dtype, double.value.dtype) == (torch.float32, torch.float64)
    assert bool((norms(double.value - truth) <= double.error[:, 0]).all())
    assert bool((double.error[:, 0] <= 1e-4 * single.error[:, 0]).all())
    assert float(norms(single.value.double() - truth).max()) > float(double.error[:, 0].max())


@pytest.mark.parametrize(("name", "k"), [("sll", 2), ("mondeq", 4)])
def test_a_bound_does_not_depend_on_the_batch_or_the_threads(name, k):
    net = example(name, k)[1]
    x, accuracy = torch.randn(7, *net.input_shape), accuracy_of(net)
    whole = accuracy.evaluate(x)
    parts = [accuracy.evaluate(part) for part in x.split(3)]
    torch.set_num_threads(2)
    parts.append(accuracy_of(net).evaluate(x))
    for found, rows in zip(parts, [*torch.arange(7).split(3), torch.arange(7)], strict=True):
        np.testing.assert_allclose(found.error.numpy(), whole.error[rows].numpy(), rtol=1e-6)
        assert bool((norms(found.value - whole.value[rows]) <= 2.0 * whole.error[rows, 0]).all())
        if whole.pair_error is not None:
            np.testing.assert_allclose(found.pair_error.numpy(), whole.pair_error[rows].numpy(), rtol=1e-6)


def test_what_cannot_be_bounded_is_marked_and_leaves_its_neighbours_alone():
    _, net = example("mondeq", 1)
    x, accuracy = torch.randn(6, *net.input_shape), accuracy_of(net)
    clean = accuracy.evaluate(x)
    x[1, 0], x[3, 1], x[4] = math.nan, math.inf, 1e308
    found = accuracy.evaluate(x)
    assert found.converged.tolist() == [True, False, True, False, False, True]
    for rows in ([0], [2], [5]):
        np.testing.assert_allclose(found.error[rows].numpy(), clean.error[rows].numpy(), rtol=1e-12)
        np.testing.assert_allclose(found.pair_error[rows].numpy(), clean.pair_error[rows].numpy(), rtol=1e-12)
    net.set_options(lc.SolverOptions("peaceman_rachford", max_steps=1))
    assert not bool(accuracy.evaluate(torch.randn(3, *net.input_shape)).converged.any())


def test_a_tolerance_that_says_nothing_gives_no_bound():
    _, net = example("cpl", 0)
    found = accuracy_of(net.set_options(lc.SolverOptions("sweep", 0.5))).evaluate(torch.randn(3, *net.input_shape))
    assert not bool(torch.isfinite(found.error).any())
    assert not bool(found.converged.any())


def test_where_there_is_no_bound_at_all():
    zero = torch.zeros(1, 1)
    stage = lc.LBEN.from_dae(lc.DAE(torch.ones(1, 1), zero, zero, torch.ones(1), name="singular"))
    with pytest.raises(lc.NoCertificateError, match="singular"):
        accuracy_of(lc.Network([stage], [None], (1,)))
    _, net = example("mondeq", 0)
    accuracy = accuracy_of(net)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(lc.InvalidParameterError, match="autocast"):
        accuracy.evaluate(torch.zeros(1, 5))
    net.set_options(replace(net.stages[0].options, throw=False))
    with pytest.raises(lc.NoCertificateError, match="quietly"):
        accuracy_of(net)


def test_shapes_are_named():
    _, net = example("mondeq", 0)
    accuracy = accuracy_of(net)
    for x in (torch.zeros(2, 4), torch.zeros(5), torch.zeros(2, 2, 5)):
        with pytest.raises(lc.ShapeError):
            accuracy.evaluate(x)
    with pytest.raises(lc.InvalidParameterError, match="float"):
        accuracy.evaluate(torch.zeros(2, 5, dtype=torch.uint8))


def test_no_samples():
    for name, k in (("mondeq", 0), ("sll", 2), ("lben", 2)):
        _, net = example(name, k)
        found = accuracy_of(net).evaluate(torch.zeros(0, *net.input_shape))
        assert (found.value.shape[0], found.error.shape, found.converged.shape) == (0, (0, 2), (0,))


def test_softplus_as_glue_jumps():
    identity = lc.LBEN.from_dae(lc.affine(torch.eye(2)))
    net = lc.Network([identity, nn.Softplus()], [None, None], (2,))
    x = torch.tensor([[20.0 - 1e-6, 0.0], [20.0 + 1e-6, 0.0]])
    found = accuracy_of(net).evaluate(x)
    assert bool((norms(found.value - exact(net, x)) <= found.error[:, 0]).all())


def test_inputs_so_small_that_their_norms_underflow():
    stage = lc.LBEN(4, 8, 3, epsilon=0.3)
    net = lc.Network([stage], [None], (4,)).float()
    x = 1e-22 * torch.randn(64, 4).float()
    found = accuracy_of(net).evaluate(x)
    assert bool((norms(found.value.double() - exact(net, x)) <= found.error[:, 0])[found.converged].all())


class Doubled(nn.Identity):
    """A subclass of exact glue that computes."""

    def forward(self, x):
        return x / 3.0


def test_a_subclass_of_exact_glue_may_round():
    net = lc.Network([lc.LBEN(3, 4, 3), Doubled()], [None, 1.0], (3,), [None, (0.0, 0.5)])
    alone = accuracy_of(lc.Network([net.steps[0]], [None], (3,))).evaluate(torch.ones(1, 3))
    assert float(accuracy_of(net).evaluate(torch.ones(1, 3)).error[0, 0]) > float(alone.error[0, 0]) * (1 + 1e-6)


def test_the_reference_itself():
    """Extended precision against a series that converges: z = tanh(Wz + u) with ‖W‖ = 1/2."""
    W = torch.randn(4, 4)
    W = 0.5 * W / torch.linalg.matrix_norm(W, 2)
    dae = lc.DAE(W, 0.3 * torch.eye(4), 0.3 * torch.eye(4), torch.ones(4), activations=lc.Activations("tanh", 4))
    net = lc.Network([lc.LBEN.from_dae(dae)], [None], (4,))
    x = torch.randn(5, 4)
    running, z = net.stages[0].running(), np.zeros((5, 4), dtype=np.longdouble)
    for _ in range(200):
        z = np.tanh(z @ running.W.numpy().T + x.numpy() @ running.U.numpy().T)
    expected = (z @ running.G.numpy().T).astype(float)
    np.testing.assert_allclose(exact(net, x).numpy(), expected, rtol=0, atol=4e-16)
    assert isinstance(net.stages[0].state_map(), StateMap)
