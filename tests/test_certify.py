"""Certified accuracy counted by hand and by brute force."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lipconvert as lc
from lipconvert.certify import RADII, certified_radii


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def identity_network(L: float = 1.0, size: int = 3) -> lc.Network:
    """y = L x, constant L, exactly."""
    return lc.Network([lc.LBEN.from_dae(lc.affine(L * torch.eye(size), lipschitz=L))], [None], (size,))


def source(name: str = "cpl"):
    model = lc.registry().example_models(name, seed=0)[0].double()
    return model, lc.convert(model, check=False)


def brute_force(logits: np.ndarray, labels: np.ndarray, L: float, radius: float) -> int:
    """Samples whose label beats every other logit by more than √2·L·ε."""
    count = 0
    for row, label in zip(logits, labels, strict=True):
        margin = row[label] - max(value for k, value in enumerate(row) if k != label)
        count += bool(margin > 0 and margin > math.sqrt(2.0) * L * radius)
    return count


def test_by_hand():
    # Margins 2, 0.5, 0 (a tie), -1; with L = 2 they are doubled, and so is √2·L.
    x = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 0])
    for L in (1.0, 2.0):
        report = lc.certify(identity_network(L), TensorDataset(x, labels), [1.5, 0.0, 0.3, 1.4])
        assert report.radii == [0.0, 0.3, 1.4, 1.5]
        # 2/√2 = 1.414, 0.5/√2 = 0.354; the tie is not certified at radius 0
        assert report.certified_accuracy == [0.5, 0.5, 0.25, 0.0]
        assert report.natural_accuracy == 0.5
        assert (report.samples, report.unconverged, report.lipschitz, report.method) == (4, 0, L, "prescribed")
        assert report.worst_error <= 1e-15  # W = 0 is rebuilt to round-off


def test_strictly_greater():
    net = identity_network()
    x, labels = torch.tensor([[0.7, 0.1, 0.0]]), torch.tensor([0])
    radius = float(certified_radii(net, x, labels)[0])
    assert radius == pytest.approx(0.6 / math.sqrt(2.0), rel=1e-14)
    data = TensorDataset(x, labels)
    assert lc.certify(net, data, [radius]).certified_accuracy == [0.0]
    assert lc.certify(net, data, [math.nextafter(radius, 0.0)]).certified_accuracy == [1.0]


@pytest.mark.parametrize("name", ["cpl", "sandwich", "mondeq"])
def test_counts_are_those_of_the_source_logits(name):
    model, net = source(name)
    x = 3.0 * torch.randn(300, 5)
    labels = torch.randint(3, (300,))
    with torch.no_grad():
        logits = model(x).numpy()
    radii = [0.0, *RADII, *torch.linspace(0.01, 0.9, 7).tolist()]
    report = lc.certify(net, TensorDataset(x, labels), radii, batch_size=77)
    for radius, accuracy in zip(report.radii, report.certified_accuracy, strict=True):
        assert round(accuracy * 300) == brute_force(logits, labels.numpy(), net.lipschitz, radius)
    assert round(report.natural_accuracy * 300) == brute_force(logits, labels.numpy(), net.lipschitz, 0.0)
    assert 0.0 < report.natural_accuracy < 1.0
    assert report.certified_accuracy == sorted(report.certified_accuracy, reverse=True)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_error_of_the_solve_is_subtracted(tolerance):
    model, net = source("g_mondeq")
    x, labels = 3.0 * torch.randn(200, 5), torch.randint(3, (200,))
    with torch.no_grad():
        logits = model(x)
    net.set_options(lc.SolverOptions("peaceman_rachford", tolerance))
    radius, correct, converged, error = certified_radii(net, x, labels)
    evaluation = net.evaluate(x)
    assert float(error.min()) > 0.0
    for i in range(200):
        others = [k for k in range(3) if k != int(labels[i])]
        y = evaluation.value[i]
        margin = float(y[labels[i]] - y[others].max())
        by_hand = (margin - math.sqrt(2.0) * float(evaluation.error[i])) / (math.sqrt(2.0) * net.lipschitz)
        assert float(radius[i]) == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
        exact = float(logits[i, labels[i]] - logits[i, others].max()) / (math.sqrt(2.0) * net.lipschitz)
        assert float(radius[i]) <= exact + 1e-11  # never more than the exact network allows
    assert bool(converged.all())
    assert torch.equal(correct, evaluation.value.argmax(1) == labels)
    assert lc.certify(net, TensorDataset(x, labels), [0.1]).worst_error == pytest.approx(float(error.max()))


def test_no_attack_within_a_certified_radius_changes_the_label():
    model, net = source("sll")
    x = 2.0 * torch.randn(100, 5)
    with torch.no_grad():
        labels = model(x).argmax(1)
    radius, _, _, _ = certified_radii(net, x, labels)
    for _ in range(20):
        direction = torch.randn(100, 5)
        step = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True) * radius[:, None] * (1 - 1e-9)
        with torch.no_grad():
            assert torch.equal(model(x + step).argmax(1), labels)
    # and the way that changes the margin fastest
    moved = x.clone().requires_grad_(True)
    y = model(moved)
    top = y.topk(2, dim=1).values
    (gradient,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), moved)
    step = gradient / torch.linalg.vector_norm(gradient, dim=1, keepdim=True) * radius[:, None] * (1 - 1e-9)
    with torch.no_grad():
        assert torch.equal(model(x - step).argmax(1), labels)


def test_unconverged_samples_count_as_wrong():
    _, net = source("mondeq")
    x, labels = torch.randn(20, 5), torch.randint(3, (20,))
    net.set_options(lc.SolverOptions("peaceman_rachford", max_steps=1))
    report = lc.certify(net, TensorDataset(x, labels), [0.0])
    assert (report.unconverged, report.natural_accuracy, report.certified_accuracy) == (20, 0.0, [0.0])
    net.set_options(lc.SolverOptions())
    x[3, 0] = float("nan")
    report = lc.certify(net, TensorDataset(x, labels), [0.0])
    assert report.unconverged == 1
    assert certified_radii(net, x, labels)[0][3] == -math.inf


def test_the_same_numbers_from_every_kind_of_data():
    _, net = source()
    x, labels = torch.randn(25, 5), torch.randint(3, (25,))
    expected = lc.certify(net, TensorDataset(x, labels))
    assert expected.radii == list(RADII)
    pairs = [(row, int(label)) for row, label in zip(x, labels, strict=True)]
    for data in (pairs, DataLoader(TensorDataset(x, labels), batch_size=4), [(r.float(), y) for r, y in pairs]):
        report = lc.certify(net, data)
        assert report.certified_accuracy == expected.certified_accuracy
        assert report.natural_accuracy == expected.natural_accuracy


def test_bad_arguments_are_named():
    net = identity_network()
    good = TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    for radii in ([], [-0.1], [math.inf], [math.nan]):
        with pytest.raises(lc.InvalidParameterError):
            lc.certify(net, good, radii)
    with pytest.raises(lc.InvalidParameterError, match="method"):
        lc.certify(net, good, method="sampling")
    with pytest.raises(lc.InvalidParameterError, match="empty"):
        lc.certify(net, TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    for labels in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 0, 0]), torch.zeros(4, 3)):
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError), match="label"):
            lc.certify(net, TensorDataset(torch.randn(4, 3), labels))
    with pytest.raises(lc.InvalidParameterError, match=r"0\.\.255"):  # a forgotten ToTensor
        lc.certify(net, TensorDataset(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)))
    for data in (None, "digits", [torch.zeros(3)], [{"x": 1}]):
        with pytest.raises(lc.InvalidParameterError, match="data"):
            lc.certify(net, data)
    with pytest.raises(lc.InvalidParameterError, match="convert"):
        lc.certify(torch.nn.Linear(3, 3), good)
    with pytest.raises(lc.InvalidParameterError, match="radii"):
        lc.certify(net, good, 0.1)
    with pytest.raises(lc.ShapeError):
        lc.certify(net, TensorDataset(torch.randn(4, 2), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(lc.ShapeError):  # one logit has no margin
        lc.certify(identity_network(size=1), TensorDataset(torch.randn(4, 1), torch.zeros(4, dtype=torch.long)))


def test_nothing_is_certified_without_a_bound():
    zero = torch.zeros(2, 2)
    stage = lc.LBEN.from_dae(lc.DAE(torch.eye(2), zero, zero, torch.ones(2)))
    net = lc.Network([stage], [None], (2,))
    with pytest.raises(lc.NoCertificateError):
        lc.certify(net, TensorDataset(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)))
