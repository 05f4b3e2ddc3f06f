"""Proved constants against difference quotients, Jacobians, closed forms and the matrices of glue; and what has no proof."""

import copy
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import torch
from exact import linear, pair_distances
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLConv2d, SLLLinear, SLLNetwork
from torch import Tensor, nn

import lipconvert as lc
from lipconvert.certification import bounds as bounds_module
from lipconvert.certification.bounds import METHODS, Bounds, Segment, class_pairs
from lipconvert.certification.documents import LipschitzReport
from lipconvert.networks.construction import assemble

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def example(name: str, k: int, **how) -> tuple[nn.Module, lc.Network]:
    model = lc.registry().example_models(name, seed=0)[k].double()
    return model, lc.convert(model, getattr(model, "input_shape", None), check=False, **how)


def by_method(net: lc.Network) -> list[lc.LipschitzBound]:
    bounds = Bounds(net)
    return [bounds.bound(method) for method in METHODS]


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """(B, q, p) by autograd, output by output."""
    x = x.clone().requires_grad_()
    y = model(x).flatten(1)
    rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(y.shape[1])]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_each_method_is_at_least_as_strong_as_the_one_before_and_none_says_too_much(name, k, dtype):
    """No difference quotient, and no Jacobian of the source network, is above what any method says."""
    model, net = example(name, k)
    net = net.to(dtype)
    found = by_method(net)
    assert [bound.method for bound in found] == list(METHODS)
    assert found[0].lipschitz >= net.lipschitz
    assert found[0].lipschitz <= net.lipschitz * (1.0 + (3e-6 if dtype == torch.float64 else 1e-2))
    x = torch.cat([size * torch.randn(16, *net.input_shape) for size in (0.1, 1.0, 5.0)])
    J = jacobians(model, x)
    places = 1.0 + (1e-9 if dtype == torch.float64 else 1e-4)  # the source is not the network of the rounded weights
    slopes = float(torch.linalg.matrix_norm(J, 2).amax())
    quotient = lc.empirical_lipschitz(net, x[16:28].to(dtype), steps=16)
    assert quotient >= 0.9 * slopes / places
    for weaker, stronger in zip([None, *found[:-1]], found, strict=True):
        assert stronger.lipschitz >= max(slopes / places, quotient)
        if stronger.pairs is None:
            assert len(net(x[:1]).shape) > 2
            continue
        pairs, off = stronger.pairs, ~torch.eye(len(stronger.pairs), dtype=torch.bool)
        assert torch.equal(pairs, pairs.mT)
        assert not bool(pairs.diagonal().any())
        assert bool((pairs <= 2.0**0.5 * stronger.lipschitz * (1.0 + 1e-12)).all())
        assert bool((pairs[off] >= pair_distances(J).amax(0)[off] / places).all())
        if weaker is not None:
            assert bool((pairs <= weaker.pairs).all())
            assert stronger.lipschitz <= weaker.lipschitz
    if found[-1].pairs is not None:
        for i, j in class_pairs(len(found[-1].pairs))[:2]:
            assert lc.empirical_lipschitz(net, x[16:28].to(dtype), steps=12, pair=(i, j)) <= float(
                found[-1].pairs[i, j]
            )


@pytest.mark.parametrize(("name", "k"), [(name, k) for name, k in CASES if name in ("cpl", "sll", "aol", "sandwich")])
def test_merging_does_not_make_constants_worse(name, k):
    apart, merged = (by_method(example(name, k, merge=merge)[1]) for merge in (False, True))
    for one, other in zip(apart, merged, strict=True):
        assert other.lipschitz <= one.lipschitz * (1.0 + 1e-4)
        if one.method == "tightened":
            assert bool((other.pairs <= one.pairs * (1.0 + 1e-5)).all())


def test_a_linear_network_has_the_distances_of_its_rows():
    for seed in range(5):
        torch.manual_seed(seed)
        M = torch.randn(4, 6) * torch.logspace(-1, 1, 4)[:, None]
        prescribed, _, tightened = by_method(linear(M))
        norm = float(torch.linalg.matrix_norm(M, 2))
        assert prescribed.lipschitz == pytest.approx(norm, rel=2e-6)
        assert tightened.lipschitz == pytest.approx(norm, rel=2e-6)
        np.testing.assert_allclose(tightened.pairs.numpy(), pair_distances(M).numpy(), rtol=2e-6, atol=1e-12)
        assert bool((tightened.pairs >= pair_distances(M)).all())


def test_a_linear_layer_has_the_distances_of_its_rows():
    layer = nn.Linear(6, 4)
    found = lc.lipschitz_bound(lc.convert(nn.Sequential(layer), (6,)))
    np.testing.assert_allclose(found.pairs.numpy(), pair_distances(layer.weight.detach()).numpy(), rtol=2e-6)


def test_what_the_last_segment_is_given_by_the_others_counts():
    """Two stages that no matrix joins, the first stretching by 3: the constants of pairs are those of the second, times 3."""
    M = torch.randn(3, 5)
    stretch = linear(3.0 * torch.eye(5)).steps[0]
    net = lc.Network([stretch, Foreign(), linear(M).steps[0]], [None, 1.0, None], (5,))
    for bound in by_method(net):
        assert len(bound.segments) == 3
        assert bool((bound.pairs >= 3.0 * pair_distances(M)).all())
    np.testing.assert_allclose(bound.pairs.numpy(), 3.0 * pair_distances(M).numpy(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("name", ["aol", "mondeq", "sandwich"])
def test_a_search_that_goes_wrong_can_only_lose(name, factor, monkeypatch):
    """Multipliers from anywhere: what is not proved with them does not count."""
    model, net = example(name, 0)
    weaker = Bounds(net).bound("pairwise")

    def astray(E, start, rows=None, **options):
        Q = start * factor * torch.exp(torch.randn(start.shape[-1]))
        return Q if rows is None else Q.expand(len(rows), -1)

    monkeypatch.setattr("lipconvert.certification.bounds.best_gains", astray)
    monkeypatch.setattr("lipconvert.certification.bounds.best_outputs", astray)
    found = Bounds(net).bound("tightened")
    J = jacobians(model, torch.randn(64, *net.input_shape))
    assert float(torch.linalg.matrix_norm(J, 2).amax()) <= found.lipschitz <= weaker.lipschitz
    assert bool((found.pairs >= pair_distances(J).amax(0)).all())
    assert bool((found.pairs <= weaker.pairs).all())


def averages() -> lc.Network:
    """The sums of two channels of 2×2 images, one of them less: y_0 − y_1 has the constant √(1 + 1/16), below √2."""
    stage = lc.LBEN(2, 2, 2, image=(2, 2), lipschitz=2.0, epsilon=0.5, fill=False).double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.zero_()
        stage.U[:, :, 0, 0] = stage.G[:, :, 0, 0] = torch.eye(2)
    scale = lc.Normalize([0.0, 0.0], [1.0, 4.0]).double()
    return lc.Network([stage, lc.MeanPool(2), scale, nn.Flatten()], [None] * 4, (2, 2, 2))


@pytest.mark.parametrize("which", ["transforms", "glue"])
def test_what_matrices_may_be_off_reaches_the_constants(which, monkeypatch):
    """With radii of 1e-3, as if a transform, or the matrix of glue, were no better."""
    before = Bounds(averages()).bound("tightened").pairs[0, 1]
    if which == "transforms":
        monkeypatch.setattr(lc.Grid, "matrices_error", lambda grid, K, M: torch.full(M.shape, 1e-3))
    else:
        matrix = bounds_module._matrix
        monkeypatch.setattr(
            "lipconvert.certification.bounds._matrix",
            lambda *arguments, **options: (M := matrix(*arguments, **options)) and (M[0], M[1] + 1e-3),
        )
    after = Bounds(averages()).bound("tightened").pairs[0, 1]
    assert float(before) == pytest.approx((1.0 + 1.0 / 16.0) ** 0.5, rel=1e-3)
    # U and G may be larger by 1e-3 of an entry 1; the functional (2, −1/2) at frequency 0 by 1e-3 in each
    grown = float(after) / float(before) - 1.0
    assert (6e-3 if which == "transforms" else 2e-3) <= grown <= 1e-2


def test_the_search_starts_away_from_where_the_condition_is_singular():
    """In float64 H of a Sandwich network is singular to 1e-8 at its Λ; in float32, rounded, L and Λ are less tight."""
    model = SandwichNetwork(inputs=60, classes=10, features=60, dense_depth=2).double()
    net = lc.convert(model, check=False)
    assert abs(lc.check(net.stages[-1].dae()).margin_10) < 1e-7
    least = float(
        torch.linalg.eigvalsh(Bounds(net)._chain[-1].enclosure.lmi(Bounds(net)._chain[-1].start, None, "U")[0]).min()
    )
    assert least > 1e-2
    double, single = (lc.lipschitz_bound(n).pairs for n in (net, copy.deepcopy(net).float()))
    np.testing.assert_allclose(double.numpy(), single.numpy(), rtol=2e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_a_linear_layer_in_front_of_a_residual_network_counts_as_what_it_is(merge):
    """Where slopes of its rows were free in [0, 1], differences of its rows could count as one of both alone."""
    torch.manual_seed(3)
    first = torch.nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(9, 6), SLLLinear(6), SLLLinear(6), first).double()
    net = lc.convert(model, (9,), merge=merge)
    bounds = Bounds(net)
    found = bounds.bound()
    free = Bounds(net)
    for k, part in enumerate(free._chain):
        assert isinstance(part, Segment)
        assert part.linear.tolist() == [True] * 6 + [False] * (len(part.linear) - 6)
        free._chain[k] = replace(part, linear=torch.zeros_like(part.linear))
    weaker = free.bound()
    assert bool((found.pairs <= weaker.pairs * (1.0 + 1e-6)).all())
    assert float(found.pairs.sum()) < 0.999 * float(weaker.pairs.sum())
    J = jacobians(model, 3.0 * torch.randn(200, 9))
    assert bool((found.pairs >= pair_distances(J).amax(0)).all())


def matrix_of(glue: list[nn.Module], shape: tuple[int, ...]) -> Tensor:
    """(q, p) of affine modules on flattened samples, from their values at 0 and the units."""
    size = math.prod(shape)
    points = torch.cat([torch.zeros(1, size), torch.eye(size)]).reshape(-1, *shape)
    with torch.no_grad():
        values = nn.Sequential(*glue)(points).flatten(1)
    return (values[1:] - values[0]).mT


STDS = (0.5, 1.0, 2.0, 0.25)
TAILS: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "first": ((6,), [lc.FirstFeatures(3)]),
    "normalize": ((4,), [lc.Normalize((0.1, 0.2, 0.3, 0.4), STDS)]),
    "normalize, then first": ((4,), [lc.Normalize((0.1, 0.2, 0.3, 0.4), STDS), lc.FirstFeatures(2)]),
    "padded": ((3,), [lc.PadChannels(5)]),
    "images": ((2, 4, 2), [lc.MeanPool(2), nn.Flatten()]),
    "mean of images": ((3, 2, 4), [nn.AvgPool2d(2), lc.Normalize(0.0, (0.5, 1.0, 2.0)), nn.Flatten()]),
    "own divisor": ((2, 2, 2), [nn.AvgPool2d(2, divisor_override=3), nn.Flatten()]),
    "unshuffled": ((1, 4, 4), [nn.PixelUnshuffle(2), lc.MeanPool(2), lc.Normalize(0.0, STDS), nn.Flatten()]),
    "shuffled": ((4, 1, 2), [nn.PixelShuffle(2), nn.Identity(), nn.Flatten(), lc.FirstFeatures(5)]),
    "reshaped": ((6,), [nn.Unflatten(1, (3, 1, 2)), nn.AvgPool2d((1, 2)), nn.Flatten()]),
}


def identity_of(shape: tuple[int, ...], sign: float = 1.0) -> lc.LBEN:
    """x ↦ ±x on samples of a shape, images as a stage on their grid."""
    grid = lc.Grid(shape[1:]) if len(shape) == 3 else lc.Grid()
    eye = grid.convolution(torch.eye(shape[0]))
    sigma = lc.Activations("identity", shape[0])
    dae = lc.DAE(0.0 * eye, eye, sign * eye, torch.ones(shape[0]), activations=sigma, grid=grid, name="identity")
    return lc.LBEN.from_dae(dae)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TAILS)
def test_affine_glue_at_the_end_counts_as_the_matrix_that_it_is(name, dtype):
    shape, glue = TAILS[name]
    net = lc.Network([identity_of(shape), *glue], [None] * (1 + len(glue)), shape).to(dtype)
    M = matrix_of(glue, shape)
    prescribed, _, tightened = by_method(net)
    inflated = 1.0 + 3e-6 if dtype == torch.float64 else 1.0 + 2e-4
    distances = pair_distances(M)
    assert bool((tightened.pairs >= distances).all())
    assert bool((tightened.pairs <= distances * inflated + 1e-12).all())
    if len(shape) == 1:  # behind a stage on images only the product of the norms is known of the logits as a vector
        norm = float(torch.linalg.matrix_norm(M, 2))
        assert norm <= tightened.lipschitz <= norm * inflated
    product = math.prod(
        float(torch.linalg.matrix_norm(matrix_of([step], s), 2)) for step, s in _with_shapes(glue, shape)
    )
    assert prescribed.lipschitz == pytest.approx(product, rel=inflated - 1.0 + 1e-7)


def _with_shapes(glue: list[nn.Module], shape: tuple[int, ...]) -> list[tuple[nn.Module, tuple[int, ...]]]:
    found = []
    for step in glue:
        found.append((step, shape))
        shape = tuple(step(torch.zeros(1, *shape)).shape[1:])
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TAILS)
def test_affine_glue_before_a_dense_stage_and_between_two(name, dtype):
    """In front: it is taken into U. Between: into the joined W, and the constant is that of the product."""
    shape, glue = TAILS[name]
    M = matrix_of(glue, shape)
    if len(M) != math.prod(_output_shape(glue, shape)):
        raise AssertionError
    size = len(M)
    head = torch.randn(3, size)
    inflated = 1.0 + 3e-5 if dtype == torch.float64 else 1.0 + 2e-3
    stage = linear(head).steps[0]
    for first in ([], [identity_of(shape)] if len(shape) == 1 else []):
        net = lc.Network([*first, *glue, stage], [None] * (len(first) + len(glue) + 1), shape).to(dtype)
        prescribed, _, tightened = by_method(net)
        whole = head @ M
        assert len(tightened.segments) == 1  # all of it is one
        assert bool((tightened.pairs >= pair_distances(whole) / (1.0 + 1e-6)).all())
        assert tightened.lipschitz >= float(torch.linalg.matrix_norm(whole, 2)) / (1.0 + 1e-6)
        if first == [] and name in ("first", "padded", "images", "shuffled"):  # M has entries 0 and c only
            assert bool((tightened.pairs <= pair_distances(whole) * inflated + 1e-12).all())
        assert prescribed.lipschitz <= net.lipschitz * inflated
        empirical = lc.empirical_lipschitz(net, torch.randn(4, *shape, dtype=dtype), steps=20)
        assert empirical <= tightened.lipschitz


def _output_shape(glue: list[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(nn.Sequential(*glue)(torch.zeros(1, *shape)).shape[1:])


def test_two_dense_stages_have_the_constant_of_their_product():
    """diag(1, 0.1, 0.5) and then diag(0.1, 1, 0.5): each of norm 1, together 0.25; also with a shift and scale between."""
    first, second = torch.tensor([1.0, 0.1, 0.5]), torch.tensor([0.1, 1.0, 0.5])
    for glue, stds in (((), torch.ones(3)), ((lc.Normalize(0.3, (1.0, 2.0, 0.5)),), torch.tensor([1.0, 2.0, 0.5]))):
        prescribed, _, tightened = by_method(linear(torch.diag(first), torch.diag(second), glue=glue))
        whole = torch.diag(first * second / stds)
        assert prescribed.lipschitz == pytest.approx(1.0 / float(stds.min()), rel=1e-5)
        assert tightened.segments == (("M0 > M1", tightened.segments[0][1]),)
        assert tightened.lipschitz == pytest.approx(float(whole.max()), rel=1e-5)
        np.testing.assert_allclose(tightened.pairs.numpy(), pair_distances(whole).numpy(), rtol=1e-5)
        assert bool((tightened.pairs >= pair_distances(whole)).all())


def test_more_stages_than_two_are_joined_and_what_the_core_does_not_know_between_them_is_not():
    stages = [SLLLinear(4) for _ in range(3)]
    joined = lc.Network([lc.convert(s).steps[0] for s in stages], [None] * 3, (4,))
    assert len(lc.lipschitz_bound(joined, "prescribed").segments) == 1
    steps = [joined.steps[0], nn.Tanh(), joined.steps[1], Foreign(), joined.steps[2]]
    apart = lc.lipschitz_bound(lc.Network(steps, [None, None, None, 2.0, None], (4,)), "prescribed")
    first, second, third = (step.name for step in joined.steps)
    assert [name for name, _ in apart.segments] == [f"{first} > Tanh() > {second}", "Foreign()", third]
    assert apart.lipschitz == pytest.approx(2.0, rel=1e-5)
    assert apart.pairs is not None


def test_activations_between_stages_count_as_rows():
    """W₂σ(W₁x): a chain of three affine maps has the constants it has where the activation is a stage's own."""
    model = nn.Sequential(nn.Linear(4, 6), lc.MaxMin(), nn.Linear(6, 3)).double()
    whole = lc.lipschitz_bound(lc.convert(model, (4,)))
    first, last = (lc.convert(nn.Sequential(model[k]), (n,)).steps[0] for k, n in ((0, 4), (2, 6)))
    apart = lc.lipschitz_bound(lc.Network([first, lc.MaxMin(), last], [None] * 3, (4,)))
    assert len(whole.segments) == len(apart.segments) == 1
    np.testing.assert_allclose(apart.pairs.numpy(), whole.pairs.numpy(), rtol=1e-6, atol=1e-12)
    assert apart.lipschitz == pytest.approx(whole.lipschitz, rel=1e-6)
    norms = [float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2)]
    assert apart.lipschitz < 0.999 * math.prod(norms)


class Foreign(nn.Module):
    """Glue the core does not know."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_channels_padded_before_a_stage_on_images(dtype):
    """Its columns of U do nothing: a kernel of norm 1 on the channels that are there and of norm 10 on those that are not."""
    image, grid = (3, 4), lc.Grid((3, 4))
    K = torch.zeros(3, 3, 1, 1)
    K[0, 0], K[1, 1], K[2, 2] = 1.0, 0.5, 10.0
    stage = lc.LBEN.from_dae(lc.affine(grid.convolution(K), lipschitz=10.0, grid=grid))
    net = lc.Network([lc.PadChannels(3), stage, lc.MeanPool(3), nn.Flatten()][:2], [None, None], (2, *image)).to(dtype)
    prescribed, _, tightened = by_method(net)
    assert prescribed.lipschitz == pytest.approx(10.0, rel=1e-4)
    assert prescribed.pairs is None
    assert tightened.lipschitz == pytest.approx(1.0, rel=1e-5)
    assert tightened.lipschitz >= 1.0


def test_an_activation_at_the_end_leaves_the_vector_constant():
    M = torch.diag(torch.tensor([2.0, 0.1, 0.5]))
    for end in (nn.Tanh(), nn.ReLU(), lc.MaxMin()):
        matrix = torch.diag(torch.tensor([2.0, 0.1, 0.5, 0.2])) if isinstance(end, lc.MaxMin) else M
        inner = linear(matrix)
        net = lc.Network([inner.steps[0], end], [None, None], inner.input_shape)
        bounds = Bounds(net)
        for method in METHODS:
            found = bounds.bound(method)
            off = found.pairs[~torch.eye(len(matrix), dtype=torch.bool)]
            np.testing.assert_allclose(off.numpy(), 2.0**0.5 * found.lipschitz, rtol=1e-9)
        assert bounds.functionals is None


def test_networks_without_stages():
    for steps, shape, constant in (
        ([nn.Flatten()], (4,), 1.0),
        ([lc.Normalize(0.0, 0.25), lc.FirstFeatures(2)], (4,), 4.0),
        ([nn.ReLU(), lc.MeanPool(2), nn.Flatten()], (1, 4, 4), 1.0),
    ):
        net = lc.Network(steps, [None] * len(steps), shape)
        for found in by_method(net):
            assert found.lipschitz == pytest.approx(constant, rel=1e-12)
            assert float(found.pairs.max()) == pytest.approx(2.0**0.5 * constant, rel=1e-12)


def test_outputs_that_are_no_logits():
    for net in (lc.convert(SLLConv2d(2), (2, 3, 4)), lc.convert(nn.Sequential(SLLLinear(4), lc.FirstFeatures(1)))):
        bounds = Bounds(net)
        assert bounds.classes is None
        assert bounds.functionals is None
        for method in METHODS:
            found = bounds.bound(method)
            assert found.pairs is None
            assert found.report(net).pairs == []


def numpy_H(stage: lc.LBEN, L: float) -> np.ndarray:
    W, U, G, Lambda = (np.asarray(part) for part in stage.running())
    D = np.diag(Lambda)
    return 2 * D - D @ W - W.T @ D - G.T @ G / L - D @ U @ U.T @ D / L


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_floats_that_do_not_satisfy_the_condition_are_refused(dtype, monkeypatch):
    """(10) is about the floats in use: W of the module bent by 0.3 has no proof, by 1e-9 has one at L(1 + δ)."""
    bend = [0.0]

    def bent(Psi, G, U, V, S, epsilon, L):
        """W that is not that of its parameters, of one of the stages."""
        W = assemble(Psi, G, U, V, S, epsilon, L)
        return W + (bend[0] if epsilon == 0.05 else 0.0) * torch.eye(W.shape[-1], dtype=W.dtype)

    monkeypatch.setattr("lipconvert.networks.lben.assemble", bent)
    good = lc.LBEN(4, 6, 3, epsilon=0.01, name="first")
    stage = lc.LBEN(4, 6, 3, epsilon=0.05, name="bent").to(dtype)
    net = lc.Network([good.to(dtype), lc.FirstFeatures(3), lc.PadChannels(4), stage], [None] * 4, (4,))
    assert Bounds(net).delta == 0.0
    bend[0] = 0.3
    stage.refresh()
    least = np.linalg.eigvalsh(numpy_H(stage, 1.01 * stage.lipschitz))[0]  # Λ = I: so is the gauge of the message
    with pytest.raises(lc.NoCertificateError, match=rf"stage 'bent'.*L = 1\.01 has the eigenvalue {least:.2e}"[:-4]):
        Bounds(net)
    with pytest.raises(lc.NoCertificateError, match="bent"):
        lc.certify(net, [(torch.zeros(4), 0)])


def proved_or_refused(net: lc.Network, method: str) -> lc.LipschitzBound | None:
    try:
        return lc.lipschitz_bound(net, method)
    except lc.NoCertificateError:
        with pytest.raises(lc.NoCertificateError, match=net.stages[0].name):
            Bounds(net)
        return None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_written_through_data_are_those_that_are_proved(dtype):
    """Whatever is written, W is rebuilt from it: what is proved is true of the network that runs then."""
    net = lc.convert(SLLNetwork(inputs=4, classes=3, features=6, dense_depth=2).double(), check=False).to(dtype)
    before = lc.lipschitz_bound(net)
    stage = net.stages[0]
    for value in (10.0, -3.0, 0.0):
        stage.U.data[0, 1] = value
        stage.refresh()
        found = proved_or_refused(net, "tightened")
        if found is None:
            continue
        x = torch.randn(50, 4, dtype=dtype)
        assert float(torch.linalg.matrix_norm(jacobians(net, x).double(), 2).max()) <= found.lipschitz * (1.0 + 1e-5)
    assert before.lipschitz <= 1.01


def test_a_constant_lowered_by_hand_is_another_network_for_which_it_holds():
    """W depends on L: what was 2-Lipschitz before becomes a network with the constant that it claims."""
    stage = lc.LBEN(4, 8, 3, lipschitz=2.0, epsilon=1e-2)
    net, x = lc.Network([stage], [None], (4,)), 3.0 * torch.randn(200, 4)
    with torch.no_grad():
        stage.G *= 3.0
    before = float(torch.linalg.matrix_norm(jacobians(net, x), 2).max())
    stage.lipschitz = 0.25
    found = lc.lipschitz_bound(net, "prescribed")
    after = float(torch.linalg.matrix_norm(jacobians(net, x), 2).max())
    assert after <= found.lipschitz <= 0.25 * (1.0 + 2e-6)
    assert after < before


def test_networks_that_are_not_what_they_claim_are_refused_at_conversion():
    """A plain layer as an equilibrium network, and a matrix of norm 2 that claims 1."""
    W = torch.randn(5, 5)
    plain = lc.DAE(W, torch.randn(5, 3), torch.randn(2, 5), torch.ones(5))
    doubled = lc.DAE(torch.zeros(3, 3), 2.0 * torch.eye(3), torch.eye(3), torch.ones(3), lipschitz=1.0)
    for dae in (plain, doubled):
        with pytest.raises(lc.NotPSDError):
            lc.LBEN.from_dae(dae)
        assert not lc.prove_constant(dae)
    assert lc.prove_lmi(doubled, torch.full((3,), 0.5), 2.0 * (1.0 + 1e-6))


def test_training_at_epsilon_0_ends_in_a_proof_or_a_refusal():
    """Pushing every direction to L leaves (3) little margin; nothing false is proved on the way."""
    net = lc.convert(SLLNetwork(inputs=6, classes=3, features=8, dense_depth=3).double(), check=False)
    x = torch.randn(32, 6)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=2e-2)
    outcomes = []
    for _ in range(6):
        for _ in range(8):
            optimizer.zero_grad()
            (-net(x).square().mean()).backward()
            optimizer.step()
        found = proved_or_refused(net, "pairwise")
        outcomes.append(found)
        if found is None:
            continue
        assert float(torch.linalg.matrix_norm(jacobians(net, x), 2).max()) <= found.lipschitz * (1.0 + 1e-12)
        assert max(stage.delta for stage in found.stages if stage.kind == "lben") <= 1e-2
    assert outcomes[0] is not None


@pytest.mark.parametrize(("name", "k"), [("sll", 2), ("cpl", 0), ("lben", 0), ("g_mondeq", 0), ("aol", 2)])
def test_what_is_said_of_each_stage(name, k):
    _, net = example(name, k)
    found = lc.lipschitz_bound(net, "prescribed")
    assert [stage.kind for stage in found.stages] == [
        "lben" if isinstance(step, lc.LBEN) else "glue" for step in net.steps
    ]
    for proof, step, L in zip(found.stages, net.steps, net.step_lipschitz, strict=True):
        assert proof.prescribed == L
        assert L <= proof.proved <= L * (1.0 + 1.1e-6)
        if proof.kind == "glue":
            assert proof.name == repr(step)
            continue
        assert (proof.name, proof.states, proof.reason) == (step.name, len(step.b_z), "")
        assert proof.proved == pytest.approx(L * (1.0 + proof.delta), rel=1e-14)
        assert 0.0 <= proof.rounding < 1e-11
        # μ is that of some diagonal metric, proved: at most (I − W)'s real part allows, and 1 + ‖W‖ in any
        dae = step.running()
        least = min(
            scipy.linalg.eigvals(np.eye(dae.states) - W).real.min()
            for W in (dae.W.numpy() if dae.grid else [dae.W.numpy()])
        )
        assert 0.0 < proof.mu <= least + 1e-9
    assert found.prescribed == net.lipschitz
    assert Bounds(net).delta == max(stage.delta or 0.0 for stage in found.stages)


def test_a_report_of_a_bound():
    _, net = example("mondeq", 0)
    found = lc.lipschitz_bound(net)
    report = found.report(net.float(), 0.5)
    assert (report.dtype, report.method, report.empirical) == ("float32", "tightened", 0.5)
    assert {(p.i, p.j): p.lipschitz for p in report.pairs} == {
        (j, i): float(found.pairs[i, j]) for i, j in combinations(range(len(found.pairs)), 2)
    }
    assert LipschitzReport.model_validate_json(report.model_dump_json()) == report


def test_a_search_that_has_no_time_is_still_proved():
    model, net = example("sandwich", 0)
    J = jacobians(model, torch.randn(100, 5))
    rushed, rested = lc.lipschitz_bound(net, seconds=1e-9), lc.lipschitz_bound(net)
    assert bool((rushed.pairs >= rested.pairs * (1.0 - 1e-9)).all())
    assert bool((rushed.pairs * (1.0 + 1e-9) >= pair_distances(J).amax(0)).all())
    seen = []
    lc.lipschitz_bound(net, seen=lambda *what: seen.append(what))
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)


def test_bad_arguments_are_named():
    _, net = example("mondeq", 0)
    for method in ("sampling", "", None):
        with pytest.raises(lc.InvalidParameterError, match="method"):
            lc.lipschitz_bound(net, method)
    for seconds in (0.0, -1.0, math.nan):
        with pytest.raises(lc.InvalidParameterError, match="seconds"):
            lc.lipschitz_bound(net, seconds=seconds)
    with pytest.raises(lc.InvalidParameterError, match="convert"):
        lc.lipschitz_bound(nn.Linear(3, 3))


@pytest.mark.parametrize("method", METHODS)
def test_logits_that_are_the_same_and_logits_that_are_constant(method):
    """Their difference has the constant 0, and no certificate needs more."""
    stage = lc.LBEN(4, 5, 3, epsilon=0.1)
    with torch.no_grad():
        stage.G[1] = stage.G[0]
        stage.G[2] = 0.0
    found = lc.lipschitz_bound(lc.Network([stage], [None], (4,)), method)
    assert bool((found.pairs >= 0.0).all())
    if method == "tightened":
        assert float(found.pairs[0, 1]) <= 1e-6
        assert float(found.pairs[0, 2]) > 1e-3
