"""Certified radii against closed forms and loops written out, reports counted by hand, and attacks aimed at every radius."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact import exact, linear, pair_distances
from lipconvert_plugins.sandwich import SandwichNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lipconvert as lc
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import METHODS, Bounds
from lipconvert.certification.certify import RADII
from lipconvert.certification.documents import AttackConfig, RobustnessReport


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def identity_network(L: float = 1.0, size: int = 3) -> lc.Network:
    """y = L x, constant L, exactly."""
    return lc.Network([lc.LBEN.from_dae(lc.affine(L * torch.eye(size), lipschitz=L))], [None], (size,))


def source(name: str = "cpl", k: int = 0) -> tuple[nn.Module, lc.Network]:
    model = lc.registry().example_models(name, seed=0)[k].double()
    return model, lc.convert(model, getattr(model, "input_shape", None), check=False)


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """y_label − y_j for every other class j, ∞ for the label itself; sample by sample."""
    rows = []
    for y, label in zip(logits.tolist(), labels.tolist(), strict=True):
        rows.append([math.inf if j == label else y[label] - v for j, v in enumerate(y)])
    return torch.tensor(rows)


def norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double().flatten(1), dim=1)


# ---- radii ----------------------------------------------------------------------------------------------------------


def test_by_hand():
    # Margins 2, 0.5, 0 (a tie), -1; with L = 2 they are doubled, and so is √2·L.
    x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 0])
    for L in (1.0, 2.0):
        report = lc.certify(identity_network(L), TensorDataset(x, labels), [1.5, 0.0, 0.3, 1.4], model="m", name="d")
        assert report.radii == [0.0, 0.3, 1.4, 1.5]
        # 2/√2 = 1.414, 0.5/√2 = 0.354; the tie is not certified at radius 0
        assert report.certified_accuracy == [0.5, 0.5, 0.25, 0.0]
        assert report.natural_accuracy == 0.5
        assert report.margins == [2.0 * L, 0.5 * L, 0.0, -L]
        assert report.sample_radii[2:] == [0.0, 0.0]
        np.testing.assert_allclose(report.sample_radii[:2], [2.0 / 2**0.5, 0.5 / 2**0.5], rtol=1e-5)
        assert (report.samples, report.unconverged, report.lipschitz, report.method) == (4, 0, L, "tightened")
        assert (report.model, report.data, report.dtype) == ("m", "d", "float64")
        assert L * (1.0 - 1e-6) <= report.empirical_lipschitz <= report.proved_lipschitz <= L * (1.0 + 2e-6)
        assert report.worst_error <= 1e-11 * L  # W = 0 is rebuilt to round-off, and solved to 1e-13


def test_a_radius_is_rounded_down():
    """One logit is 0, so that subtracting it rounds nothing; in exact arithmetic the quotient is never below the radius."""
    net = identity_network(size=2)
    x = torch.cat([torch.rand(500, 1) * torch.logspace(-3, 3, 500)[:, None], torch.zeros(500, 1)], 1)
    certifier = lc.Certifier(net, "prescribed")
    found, labels = certifier.accuracy.evaluate(x), torch.zeros(500, dtype=torch.long)
    radius, K = certifier(x, labels)["radius"][:, 0], Fraction(float(certifier.bounds[0].pairs[0, 1]))
    for r, y, (at, slope) in zip(radius.tolist(), found.value.tolist(), found.pair_error[:, 0].tolist(), strict=True):
        assert Fraction(r) <= (Fraction(y[0]) - Fraction(y[1]) - 2 * Fraction(at)) / (K + Fraction(slope))


def test_strictly_greater():
    net = identity_network()
    x, labels = torch.tensor([[0.7, 0.1, 0.0]]), torch.tensor([0])
    radius = float(lc.certified_radii(net, x, labels)[0])
    assert radius == pytest.approx(0.6 / math.sqrt(2.0), rel=2e-6)
    assert radius < 0.6 / math.sqrt(2.0)
    data = TensorDataset(x, labels)
    assert lc.certify(net, data, [radius]).certified_accuracy == [0.0]
    assert lc.certify(net, data, [math.nextafter(radius, 0.0)]).certified_accuracy == [1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_radius_of_a_linear_network_is_its_distance_to_the_nearest_boundary(dtype):
    """y = Mx: the least m_j/‖w_l − w_j‖ over all classes, which is not that of the second largest logit."""
    M = torch.randn(5, 6) * torch.tensor([4.0, 1.0, 0.3, 2.0, 0.1])[:, None]
    net = linear(M).to(dtype)
    M = net.stages[0].G.detach().double()
    x = torch.randn(400, 6, dtype=dtype)
    logits = x.double() @ M.mT
    labels = torch.randint(5, (400,))
    labels[:300] = logits[:300].argmax(1)
    margins, distances = margins_of(logits, labels), pair_distances(M)
    expected, nearest = (margins / distances[labels]).min(1)
    radius = lc.certified_radii(net, x, labels)
    right = margins.amin(1) > 0
    assert bool((radius[right] <= expected[right]).all())
    slack = 1e-5 if dtype == torch.float64 else 1e-3
    np.testing.assert_allclose(radius[right].numpy(), expected[right].numpy(), rtol=slack, atol=slack)
    assert bool((radius[~right] <= 0.0).all())
    assert bool(
        (nearest != margins.min(1).indices)[right].float().mean() > 0.1
    )  # the runner-up is often not the nearest
    # and one step over the boundary that is meant changes the class
    i = torch.arange(400)
    away = M[nearest] - M[labels]
    over = x + (away / norms(away)[:, None] * (expected * (1 + 1e-6))[:, None]).to(dtype)
    y = over.double() @ M.mT
    assert bool((y[i, nearest] >= y[i, labels])[right].float().mean() > 0.95)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "k"), [("g_mondeq", 0), ("sll", 2), ("lben", 0), ("sandwich", 0)])
def test_the_rule_written_out(name, k, dtype):
    """min_j (m_j − e_j − e′_j)/(K_j + e″_j), with loops, from what the two modules below give."""
    net = source(name, k)[1].to(dtype)
    net.set_options(lc.SolverOptions("peaceman_rachford", 1e-5))
    x = 3.0 * torch.randn(60, *net.input_shape, dtype=dtype)
    certifier = lc.Certifier(net)
    y = certifier.accuracy.evaluate(x).value
    labels = torch.randint(y.shape[1], (60,))
    labels[:40] = y[:40].argmax(1)
    found = certifier(x, labels)
    bounds = Bounds(net)
    accuracy = Accuracy(bounds)
    run = accuracy.evaluate(x)
    close = run if dtype == torch.float64 else accuracy.evaluate(x, double=True)
    number = {}  # of a pair, counted here
    for i in range(y.shape[1]):
        for j in range(i):
            number[i, j] = number[j, i] = len(number) // 2
    for row, label in enumerate(labels.tolist()):
        logits, others = close.value[row].tolist(), [j for j in range(y.shape[1]) if j != label]
        own = float(run.value[row, label] - max(run.value[row, j] for j in others))
        assert float(found["margin"][row]) == pytest.approx(own, rel=1e-6, abs=1e-6)
        assert bool(found["correct"][row]) == (own > 0)
        for column, method in enumerate(METHODS):
            K = bounds.bound(method).pairs
            radii, errors = [], []
            for j in others:
                pair = number[label, j]
                at, (running, slope) = float(close.pair_error[row, pair, 0]), run.pair_error[row, pair].tolist()
                above = Fraction(logits[label]) - Fraction(logits[j]) - Fraction(at) - Fraction(running)
                radii.append(above / (Fraction(float(K[label, j])) + Fraction(slope)))
                errors.append(at + running)
            if own > 0:
                assert Fraction(float(found["radius"][row, column])) <= min(radii)  # not a place more
                assert float(found["radius"][row, column]) == pytest.approx(float(min(radii)), rel=1e-9, abs=1e-12)
            else:
                assert found["radius"][row, column] == -math.inf
        assert float(found["error"][row]) == pytest.approx(max(errors), rel=1e-9)
    assert torch.equal(lc.certified_radii(net, x, labels), found["radius"][:, -1])
    assert torch.equal(lc.certified_radii(net, x, labels, "prescribed"), found["radius"][:, 0])


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_runs_that_err_as_far_as_they_may_change_no_class(tolerance, monkeypatch):
    """At the input for the label, and at the end of the radius against it: both errors, and their growth, are taken off."""
    sigma = lc.Activations("identity", 2)
    dae = lc.DAE(torch.zeros(2, 2), torch.eye(2), torch.eye(2), torch.ones(2), activations=sigma)
    net = lc.Network([lc.LBEN.from_dae(dae, options=lc.SolverOptions(tolerance=tolerance))], [None], (2,))
    x, labels = torch.tensor([[1.5, 1.0], [0.1, 0.0], [40.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    certifier = lc.Certifier(net)
    monkeypatch.setattr(
        Bounds, "require_unchanged", lambda bounds: None
    )  # replaced methods stand for worse hardware here
    error = certifier.accuracy.evaluate(x).pair_error[:, 0]
    readout, against = lc.LBEN.readout, torch.tensor([0.5, -0.5])

    def shifted(size: Tensor):
        return lambda self, z, assembled=None: readout(self, z, assembled) + size[:, None] * against

    with monkeypatch.context() as patch:
        patch.setattr(lc.LBEN, "readout", shifted(0.999 * error[:, 0]))
        radius = certifier(x, labels)["radius"][:, -1]
    assert bool((radius > 0).all())
    moved = x + (radius * (1.0 - 1e-12))[:, None] * torch.tensor([-1.0, 1.0]) / 2**0.5
    monkeypatch.setattr(lc.LBEN, "readout", shifted(-0.999 * (error[:, 0] + error[:, 1] * radius)))
    with torch.no_grad():
        y = net(moved)
    assert bool((y[:, 0] > y[:, 1]).all())
    # and little more is taken off: three times the error, which has grown a little at the shifted run
    exact_radius = (x[:, 0] - x[:, 1]) / 2**0.5
    least = exact_radius - (3.0 * error[:, 0] + error[:, 1] * radius) / 2**0.5 - 3e-6 * exact_radius
    assert bool((radius >= least).all())


@pytest.mark.parametrize("method", ["peaceman_rachford", "newton"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_a_loose_solve_certifies_no_more_than_the_exact_network(method, tolerance):
    _, net = source("g_mondeq")
    x, labels = 3.0 * torch.randn(100, 5), torch.randint(3, (100,))
    truth = margins_of(exact(net, x), labels)
    tight = lc.Certifier(net)(x, labels)
    loose = lc.Certifier(net.set_options(lc.SolverOptions(method, tolerance)))(x, labels)
    assert bool(loose["converged"].all())
    assert float(loose["error"].min()) > 1e3 * float(tight["error"].max())
    for k, name in enumerate(METHODS):
        K = lc.lipschitz_bound(net, name).pairs
        allowed = (truth / K[labels]).amin(1)
        for found in (tight, loose):
            assert bool((found["radius"][:, k] <= allowed.where(found["correct"], torch.tensor(math.inf))).all())
        close = allowed[tight["correct"]]
        np.testing.assert_allclose(tight["radius"][tight["correct"], k].numpy(), close.numpy(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["cpl", "sandwich", "mondeq"])
def test_counts_are_those_of_the_source_logits(name):
    model, net = source(name)
    x, labels = 3.0 * torch.randn(300, 5), torch.randint(3, (300,))
    with torch.no_grad():
        margins = margins_of(model(x), labels).amin(1)
    radii = [0.0, *RADII, *torch.linspace(0.01, 0.9, 7).tolist()]
    report = lc.certify(net, TensorDataset(x, labels), radii, batch_size=77)
    for k, radius in enumerate(report.radii):
        # margins, where none lies within 1e-6 of a threshold
        count = int((margins > math.sqrt(2.0) * net.lipschitz * radius).sum())
        assert round(report.methods[0].certified_accuracy[k] * 300) == count
        assert report.certified_accuracy[k] * 300 >= count - 1e-9
    assert round(report.natural_accuracy * 300) == int((margins > 0).sum())
    assert 0.0 < report.natural_accuracy < 1.0
    assert report.certified_accuracy == sorted(report.certified_accuracy, reverse=True)
    if name != "cpl":  # where the identity leaves nothing to gain
        assert sum(report.certified_accuracy) > sum(report.methods[0].certified_accuracy)


def test_a_radius_is_that_of_the_pixels_before_normalisation():
    inner = identity_network(size=4)
    net = lc.Network([lc.Normalize(0.5, 0.25), nn.Flatten(), *inner.steps], [None] * 3, (1, 2, 2))
    x, labels = torch.tensor([[[[0.9, 0.3], [0.1, 0.2]]]]), torch.tensor([0])
    assert float(lc.certified_radii(net, x, labels)[0]) == pytest.approx(0.6 / 2**0.5, rel=1e-4)


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_that_are_no_numbers_are_not_certified_and_leave_the_others_alone(dtype):
    for name in ("mondeq", "sll"):
        net = source(name)[1].to(dtype)
        x = torch.randn(8, 5, dtype=dtype)
        certifier = lc.Certifier(net)
        labels = certifier.accuracy.evaluate(x).value.argmax(1)
        clean = certifier(x, labels)
        x[1, 0], x[4, 2], x[6] = math.nan, -math.inf, torch.finfo(dtype).max
        found = certifier(x, labels)
        bad = torch.tensor([1, 4, 6])
        assert found["radius"][bad].tolist() == [[-math.inf] * 3] * 3
        assert not bool(found["correct"][bad].any() or found["converged"][bad].any())
        assert bool((found["margin"][bad] == 0).all() and (found["error"][bad] == 0).all())
        good = torch.tensor([0, 2, 3, 5, 7])
        np.testing.assert_allclose(found["radius"][good].numpy(), clean["radius"][good].numpy(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found["correct"][good], clean["correct"][good])


def test_samples_that_are_no_numbers_are_counted():
    _, net = source("mondeq")
    x, labels = torch.randn(20, 5), torch.randint(3, (20,))
    x[3, 0] = math.nan
    report = lc.certify(net, TensorDataset(x, labels), [0.0])
    assert report.unconverged == 1
    assert report.sample_radii[3] == report.margins[3] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_attack_passes_over_samples_that_are_no_numbers(value):
    _, net = source("mondeq")
    x, labels = torch.randn(20, 5), torch.randint(3, (20,))
    clean = lc.certify(net, TensorDataset(x, labels), [0.0, 0.3], attack=AttackConfig(steps=5))
    spoilt = x.clone()
    spoilt[0, 1] = spoilt[13, 0] = value
    report = lc.certify(net, TensorDataset(spoilt, labels), [0.0, 0.3], attack=AttackConfig(steps=5))
    right = [clean.margins[k] > 0 for k in (0, 13)]
    lost = sum(right) / 20
    assert report.unconverged == 2
    assert report.attack.attacked_accuracy[0] == pytest.approx(clean.attack.attacked_accuracy[0] - lost)
    assert report.attack.attacked_accuracy[0] == report.natural_accuracy


def changed_by_training(net):
    with torch.no_grad():
        net.stages[0].S[0, 1] += 1e-12


def changed_glue(net):
    net.steps[0].std.mul_(0.5)


def changed_quietly(net):
    net.stages[0].G.data.view(-1)[:2] = net.stages[0].G.data.view(-1)[:2].flip(0).clone()


def changed_epsilon(net):
    net.stages[0].epsilon = 0.0
    net.stages[0].refresh()


def changed_constant(net):
    net.stages[0].lipschitz = 3.0
    net.stages[0].refresh()


def changed_given_constant(net):
    net.glue_lipschitz = (4.0, None)


CHANGES = {
    "trained": changed_by_training,
    "glue": changed_glue,
    "quietly": changed_quietly,
    "epsilon": changed_epsilon,
    "constant": changed_constant,
    "given constant": changed_given_constant,
    "cast": lambda net: net.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_network_that_has_changed_is_not_certified_by_what_was_proved_before(change):
    stage = lc.LBEN(6, 5, 3, epsilon=0.1).double()
    net = lc.Network([lc.Normalize(0.5, 0.25).double(), stage], [None, None], (6,))
    x, labels = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
    certifier = lc.Certifier(net)
    certifier(x, labels)
    net.train().eval()
    certifier(x, labels)
    change(net)
    with pytest.raises(lc.NoCertificateError, match=r"has changed since its constants were proved.*new Certifier"):
        certifier(x, labels)
    lc.Certifier(net)(x, labels)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_error_bounds_are_of_the_network_whose_constants_were_proved(change):
    net = lc.Network([lc.Normalize(0.5, 0.25).double(), lc.LBEN(6, 5, 3, epsilon=0.1).double()], [None, None], (6,))
    bounds = Bounds(net)
    Accuracy(bounds)
    change(net)
    with pytest.raises(lc.NoCertificateError, match=r"has changed since its constants were proved.*new Certifier"):
        Accuracy(bounds)


def test_a_solver_that_may_stop_quietly_is_noticed_later_too():
    _, net = source("mondeq")
    certifier = lc.Certifier(net)
    net.set_options(lc.SolverOptions(throw=False))
    with pytest.raises(lc.NoCertificateError, match="may stop quietly"):
        certifier(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))


def test_unconverged_samples_count_as_wrong():
    _, net = source("mondeq")
    x, labels = torch.randn(20, 5), torch.randint(3, (20,))
    net.set_options(lc.SolverOptions("peaceman_rachford", max_steps=1))
    report = lc.certify(net, TensorDataset(x, labels), [0.0])
    assert (report.unconverged, report.natural_accuracy, report.certified_accuracy) == (20, 0.0, [0.0])


def test_a_sample_whose_solve_does_not_converge_is_not_certified():
    _, net = source("mondeq")
    x, labels = torch.randn(20, 5), torch.randint(3, (20,))
    net.set_options(lc.SolverOptions("peaceman_rachford", max_steps=1))
    found = lc.Certifier(net, "prescribed")(x, labels)
    assert not bool(found["converged"].any() or found["correct"].any())
    assert bool((found["radius"] == -math.inf).all())


def test_samples_that_are_exactly_tied():
    net = identity_network()
    x = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, math.nextafter(1.0, 0.0), 0.0]])
    for labels in (torch.tensor([0, 0, 0, 0]), torch.tensor([1, 2, 1, 1])):
        found = lc.Certifier(net)(x, labels)
        assert not bool(found["correct"][:3].any())
        assert not bool((found["radius"] > 0).any())  # the last is right by one place, which the error eats
        report = lc.certify(net, TensorDataset(x, labels), [0.0])
        assert report.certified_accuracy == [0.0]


def test_bad_arguments_are_named():
    net = identity_network()
    good = TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    for radii in ([], [-0.1], [math.inf], [math.nan]):
        with pytest.raises(lc.InvalidParameterError):
            lc.certify(net, good, radii)
    with pytest.raises(lc.InvalidParameterError, match="radii"):
        lc.certify(net, good, 0.1)
    for method in ("sampling", "sdp", ""):
        for call in (lambda m: lc.certify(net, good, method=m), lambda m: lc.Certifier(net, m)):
            with pytest.raises(lc.InvalidParameterError, match="method"):
                call(method)
    with pytest.raises(lc.InvalidParameterError, match="empty"):
        lc.certify(net, TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    for labels in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 0, 0]), torch.zeros(4, 3), torch.zeros(4)):
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError), match="label"):
            lc.certify(net, TensorDataset(torch.randn(4, 3), labels))
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError), match="label"):
            lc.certified_radii(net, torch.randn(4, 3), labels)
    with pytest.raises(lc.ShapeError, match="labels"):
        lc.certified_radii(net, torch.randn(4, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(lc.InvalidParameterError, match=r"0\.\.255"):  # a forgotten ToTensor
        lc.certify(net, TensorDataset(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)))
    for data in (None, "digits", [torch.zeros(3)], [{"x": 1}], [(1, 2)], iter([])):
        with pytest.raises(lc.InvalidParameterError, match="data"):
            lc.certify(net, data)
    for call in (lc.certify, lc.Certifier):
        with pytest.raises(lc.InvalidParameterError, match="convert"):
            call(nn.Linear(3, 3), good)
    with pytest.raises(lc.ShapeError):
        lc.certify(net, TensorDataset(torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(lc.ShapeError):  # one logit has no margin
        lc.certify(identity_network(size=1), TensorDataset(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(lc.ShapeError):  # images are no logits
        lc.Certifier(lc.Network([nn.ReLU()], [None], (1, 2, 2)))
    for option in ({"batch_size": 0}, {"shard_size": 0}, {"seconds": 0.0}):
        with pytest.raises(lc.InvalidParameterError, match=next(iter(option))):
            lc.certify(net, good, **option)


def test_nothing_is_certified_without_a_bound():
    zero = torch.zeros(2, 2)
    stage = lc.LBEN.from_dae(lc.DAE(torch.eye(2), zero, zero, torch.ones(2)))
    net = lc.Network([stage], [None], (2,))
    with pytest.raises(lc.NoCertificateError):
        lc.certify(net, TensorDataset(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_samples_of_a_batch(dtype):
    net = source("mondeq")[1].to(dtype)
    assert lc.certified_radii(net, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_a_network_that_says_always_the_same():
    stage = lc.LBEN(4, 5, 3, epsilon=0.1)
    with torch.no_grad():
        stage.G.zero_()
        stage.b_y.copy_(torch.tensor([1.0, 0.0, -1.0]))
    net = lc.Network([stage], [None], (4,))
    report = lc.certify(net, TensorDataset(torch.randn(5, 4), torch.zeros(5, dtype=torch.long)), [1.0])
    assert report.certified_accuracy == [1.0]
    assert RobustnessReport.model_validate_json(report.model_dump_json()) == report


# ---- reports --------------------------------------------------------------------------------------------------------


def test_the_same_numbers_from_every_kind_of_data():
    _, net = source()
    x, labels = torch.randn(25, 5), torch.randint(3, (25,))
    expected = lc.certify(net, TensorDataset(x, labels), method="pairwise")
    assert expected.radii == list(RADII)
    pairs = [(row, int(label)) for row, label in zip(x, labels, strict=True)]
    loader = DataLoader(TensorDataset(x, labels), batch_size=4)
    for data, batch_size in (
        (pairs, 256),
        (loader, 256),
        (pairs, 1),
        (pairs, 7),
        ([(r.float(), y) for r, y in pairs], 5),
    ):
        report = lc.certify(net, data, method="pairwise", batch_size=batch_size)
        assert report.certified_accuracy == expected.certified_accuracy
        assert report.natural_accuracy == expected.natural_accuracy
        np.testing.assert_allclose(report.sample_radii, expected.sample_radii, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def attacked():
    """A network, 60 samples and two reports of them, one with an attack on the first 40."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    net = lc.convert(SandwichNetwork(inputs=6, classes=4, features=8, dense_depth=2).double(), check=False)
    x = torch.randn(60, 6)
    with torch.no_grad():
        labels = net(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4
    config = AttackConfig(steps=15, restarts=3, samples=40)
    report = lc.certify(net, TensorDataset(x, labels), [0.02, 0.2, 0.6, 3.0], batch_size=16, attack=config)
    torch.set_default_dtype(before)
    return net, TensorDataset(x, labels), config, report


def test_all_that_a_report_says_is_counted_from_its_samples(attacked):
    net, data, _, report = attacked
    x, labels = data.tensors
    radius, margin = np.array(report.sample_radii), np.array(report.margins)
    certifier = lc.Certifier(net)
    found = certifier(x, labels)
    np.testing.assert_allclose(radius, found["radius"][:, -1].clamp(min=0).numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(margin, found["margin"].numpy(), rtol=1e-9, atol=1e-12)
    assert (len(radius), len(margin), report.samples) == (60, 60, 60)
    assert report.natural_accuracy == (margin > 0).mean()
    assert report.certified_accuracy == [(radius > r).mean() for r in report.radii]
    assert report.worst_error == pytest.approx(float(found["error"].max()), rel=1e-9)
    assert report.unconverged == 0
    assert [result.method for result in report.methods] == list(METHODS)
    curve = report.curve_radii
    assert curve == sorted(curve)
    assert (curve[0], len(curve)) == (0.0, 201)
    assert curve[-1] >= report.radii[-1]
    for k, result in enumerate(report.methods):
        own = found["radius"][:, k].numpy()
        assert result.certified_accuracy == [(own > r).mean() for r in report.radii]
        assert result.curve_accuracy == [(own > r).mean() for r in curve]
        bound = lc.lipschitz_bound(net, result.method)
        off = bound.pairs[~torch.eye(4, dtype=torch.bool)]
        assert (result.lipschitz, result.least_pair) == pytest.approx((bound.lipschitz, float(off.min())), rel=1e-9)
        assert result.greatest_pair == pytest.approx(float(off.max()), rel=1e-9)
    for weaker, stronger in itertools.pairwise(report.methods):
        for key in ("certified_accuracy", "curve_accuracy"):
            assert all(a <= b for a, b in zip(getattr(weaker, key), getattr(stronger, key), strict=True))
        assert stronger.lipschitz <= weaker.lipschitz
        assert stronger.greatest_pair <= weaker.greatest_pair
    assert report.methods[-1].certified_accuracy == report.certified_accuracy
    assert report.proved_lipschitz == report.methods[-1].lipschitz >= report.empirical_lipschitz
    assert report.lipschitz == net.lipschitz
    assert report.delta == Bounds(net).delta
    assert [stage.name for stage in report.stages] == [s.name for s in lc.lipschitz_bound(net, "prescribed").stages]
    assert RobustnessReport.model_validate_json(report.model_dump_json()) == report
    assert sum(report.certified_accuracy) > sum(report.methods[0].certified_accuracy)


def test_the_columns_of_an_attack(attacked):
    net, data, _, report = attacked
    x, labels = data.tensors
    attack = report.attack
    assert (attack.samples, attack.steps, attack.restarts, attack.box, attack.broken) == (40, 15, 3, None, 0)
    radius = np.array(report.sample_radii[:40])
    prescribed = lc.Certifier(net)(x[:40], labels[:40])["radius"][:, 0].numpy()
    for k, r in enumerate(report.radii):
        certified, stands = (radius > r).mean(), attack.attacked_accuracy[k]
        assert certified <= stands <= (np.array(report.margins[:40]) > 0).mean()
        gap = stands - (prescribed > r).mean()
        if gap <= 0:
            assert attack.gap_closed[k] is None
        else:
            assert attack.gap_closed[k] == pytest.approx((certified - (prescribed > r).mean()) / gap, abs=1e-12)
        stands_here = lc.attack(net, x[:40], labels[:40], [r], steps=15, restarts=3).double().mean()
        assert stands == pytest.approx(
            float(stands_here), abs=1.5 / 40
        )  # the larger balls' finds are tried in smaller ones
    assert attack.attacked_accuracy == sorted(attack.attacked_accuracy, reverse=True)
    assert attack.attacked_accuracy[-1] < 0.5 < attack.attacked_accuracy[0]


def test_a_sample_that_a_false_certificate_covers_is_reported_as_broken(monkeypatch):
    """With constants ten times too small an attack finds counterexamples, and the report says so."""
    net = identity_network()
    x, labels = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.0, 0.0], [9.0, 0.0, 0.0]]), torch.zeros(3, dtype=torch.long)
    config = AttackConfig(steps=10)
    honest = lc.certify(net, TensorDataset(x, labels), [0.5, 1.0], "prescribed", attack=config)
    assert honest.attack.broken == 0
    bound = Bounds.bound

    def wrong(self, method="tightened", **options):
        found = bound(self, method, **options)
        found.pairs.mul_(0.1) if float(found.pairs.max()) > 1.0 else None
        return found

    monkeypatch.setattr(Bounds, "bound", wrong)
    report = lc.certify(net, TensorDataset(x, labels), [0.5, 1.0], "prescribed", attack=config)
    assert report.certified_accuracy == [1.0, 1.0]
    assert report.attack.broken == 2


def without_seconds(report: RobustnessReport) -> dict:
    document = report.model_dump(mode="json")
    for part in (*document["methods"], *([document["attack"]] if document["attack"] else [])):
        part["seconds"] = 0.0
    return document


def same(found, expected) -> bool:
    """Equal, and floats within 1e-12: products round by where their operands lie in memory, also in one process."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-12, abs=1e-12) if isinstance(expected, float) else expected)


def test_resuming_gives_the_same_report(attacked, tmp_path, monkeypatch):
    net, data, config, expected = attacked
    arguments = {"radii": expected.radii, "batch_size": 16, "attack": config, "folder": tmp_path, "shard_size": 16}
    calls, call = [], lc.Certifier.__call__

    def counted(self, x, labels):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(x))
        return call(self, x, labels)

    with monkeypatch.context() as patch:
        patch.setattr(lc.Certifier, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            lc.certify(net, data, **arguments)
    assert len(list(tmp_path.iterdir())) == 2
    resumed = lc.certify(net, data, **arguments)
    assert same(without_seconds(resumed), without_seconds(expected))
    again = lc.certify(net, data, **arguments)  # nothing is left to do
    assert same(without_seconds(again), without_seconds(expected))
    # another network, other data or another method are not mixed in
    other = lc.convert(SandwichNetwork(inputs=6, classes=4, features=8, dense_depth=2).double(), check=False)
    for wrong in (
        {"net": other},
        {"method": "pairwise"},
        {"attack": AttackConfig(steps=16)},
        {"radii": [0.5]},
        {"batch_size": 8},
        {"data": TensorDataset(data.tensors[0] + 1.0, data.tensors[1])},
    ):
        given = {"net": net, "data": data, **arguments, **wrong}
        with pytest.raises(lc.InvalidParameterError, match="folder"):
            lc.certify(given.pop("net"), given.pop("data"), **given)


def test_one_folder_serves_all_radii_without_an_attack(attacked, tmp_path, monkeypatch):
    net, data, _, _ = attacked
    first = lc.certify(net, data, [0.1], "pairwise", folder=tmp_path)
    monkeypatch.setattr(lc.Certifier, "__call__", None)
    second = lc.certify(net, data, [0.3, 0.2], "pairwise", folder=tmp_path)
    assert second.sample_radii == first.sample_radii
    assert second.certified_accuracy == [float((np.array(first.sample_radii) > r).mean()) for r in (0.2, 0.3)]


MEMBER = """
import sys
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

import lipconvert as lc
from lipconvert.schema import AttackConfig

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = TensorDataset(*torch.load(folder / "data.pt", weights_only=True))
attack = AttackConfig(steps=15, restarts=3, samples=40)
options = {"batch_size": 16, "shard_size": 16, "attack": attack}
report = lc.certify(lc.load(folder / "net.safetensors"), data, [0.02, 0.2, 0.6, 3.0], **options)
report.write(folder / f"{rank}.json")
dist.destroy_process_group()
"""


def test_two_processes_give_the_same_report(attacked, tmp_path):
    net, data, _, expected = attacked
    lc.save(net, tmp_path / "net.safetensors")
    torch.save(data.tensors, tmp_path / "data.pt")
    commands = [[sys.executable, "-W", "error", "-c", MEMBER, str(tmp_path), str(rank)] for rank in range(2)]
    members = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for member in members:
        _, said = member.communicate(timeout=120)
        assert member.returncode == 0, said
    for rank in range(2):
        found = RobustnessReport.model_validate_json((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert same(without_seconds(found), without_seconds(expected))


def test_methods_up_to_the_one_that_is_asked_for():
    _, net = source("sandwich")
    data = TensorDataset(torch.randn(20, 5), torch.randint(3, (20,)))
    for k, method in enumerate(METHODS):
        report = lc.certify(net, data, method=method)
        assert report.method == method
        assert [result.method for result in report.methods] == list(METHODS[: k + 1])
        assert report.certified_accuracy == report.methods[-1].certified_accuracy


def test_a_search_without_time_certifies_less_but_soundly():
    model, net = source("sandwich")
    x = torch.randn(100, 5)
    with torch.no_grad():
        labels = model(x).argmax(1)
    data = TensorDataset(x, labels)
    rushed, rested = lc.certify(net, data, seconds=1e-9), lc.certify(net, data)
    assert all(a <= b for a, b in zip(rushed.sample_radii, np.array(rested.sample_radii) * (1 + 1e-9), strict=True))
    assert all(a >= b for a, b in zip(rushed.sample_radii, _radii(net, x, labels, "prescribed"), strict=True))


def _radii(net: lc.Network, x: Tensor, labels: Tensor, method: str) -> list[float]:
    return (lc.certified_radii(net, x, labels, method).clamp(min=0.0) * (1 - 1e-9)).tolist()


def test_progress_is_told():
    _, net = source("mondeq")
    seen = []
    lc.certify(
        net, TensorDataset(torch.randn(30, 5), torch.randint(3, (30,))), batch_size=8, seen=lambda *s: seen.append(s)
    )
    assert [done for what, done, total in seen if what == "samples"][-1] == 30
    assert {total for what, _, total in seen if what == "samples"} == {30}


# ---- attacks --------------------------------------------------------------------------------------------------------


def inside(x: Tensor, moved: Tensor, radius: Tensor) -> Tensor:
    """Whether x′, as the float that it is, lies within the radius: exactly."""
    return norms(moved.double() - x.double()) <= radius


def attempts(net: lc.Network, x: Tensor, labels: Tensor, radius: Tensor):
    """Points at the edge of certified balls: PGD just inside and up to the last places, and random directions."""
    for share in (0.999999, 1.0 - 1e-12):
        yield lc.pgd(net, x, labels, radius * share, steps=8, restarts=2)[0]
    for share in (0.999999, 1.0 - 1e-12):
        direction = torch.randn_like(x)
        scale = (radius * share / norms(direction)).reshape(-1, *[1] * (x.dim() - 1))
        yield (x.double() + scale * direction.double()).to(x.dtype)


def broken(net: lc.Network, x: Tensor) -> tuple[int, int]:
    """(points tried, certified samples that changed class): in the network's own dtype and forward, in several batches."""
    certifier = lc.Certifier(net)
    with torch.no_grad():
        labels = torch.cat([net(part) for part in x.split(5)]).argmax(1)
    radius = certifier(x, labels)["radius"][:, -1]  # those of weaker methods lie inside
    sure = radius > 0
    if not bool(sure.any()):
        return 0, 0
    x, labels, radius = x[sure], labels[sure], radius[sure]
    tried = flipped = 0
    for moved in attempts(net, x, labels, radius):
        keep = inside(x, moved, radius)
        with torch.no_grad():
            for y in (net(moved), torch.cat([net(part) for part in moved.split(3)])):
                flipped += int((y.argmax(1) != labels)[keep].sum())
        tried += int(keep.sum())
    return tried, flipped


FUZZ = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "k"), FUZZ)
def test_no_attack_within_a_certified_radius_changes_the_class(name, k, dtype):
    model = lc.registry().example_models(name, seed=11 + k)[k].double()
    net = lc.convert(model, getattr(model, "input_shape", None), check=False).to(dtype)
    if Bounds(net).classes is None:  # images
        ends = [nn.Flatten(), lc.FirstFeatures(4)]
        net = lc.Network([*net.steps, *ends], [*net.glue_lipschitz, None, None], net.input_shape)
    options = {"cpl": 1e-7, "sandwich": 1e-7, "mondeq": 1e-4, "g_mondeq": 1e-5}.get(name)
    net.set_options(lc.SolverOptions(tolerance=options if dtype == torch.float64 else None))
    tried, flipped = broken(net, 2.0 * torch.randn(14, *net.input_shape, dtype=dtype))
    assert flipped == 0
    assert tried > 0 or (name, k, dtype) == (
        "lben",
        2,
        torch.float32,
    )  # 36 logits, and errors as large as their margins
