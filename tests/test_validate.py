"""validate agrees for every example and says which number is wrong for every kind of tampering."""

import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from torch import nn

import lipconvert as lc

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]
OUTPUT, GRADIENT = "output: LBEN - source", "input gradient: LBEN - source"
NORM, W, L = "Jacobian 2-norm / L", "W rebuilt - W", "L of the stage - L of its DAE"


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def pair(name: str = "sll") -> tuple[nn.Module, lc.Network]:
    model = lc.registry().example_models(name, seed=0)[0].double()
    return model, lc.convert(model, check=False)


def failed(model: nn.Module, net: lc.Network, **options) -> set[str]:
    """The names of the checks that failed; the error and the report agree about them."""
    with pytest.raises(lc.EquivalenceError) as caught:
        lc.validate(model, net, **options)
    report = caught.value.report
    assert isinstance(report, lc.ValidationReport)
    assert not report.passed
    names = {c.name for c in report.checks if not c.passed}
    for check in report.checks:  # the verdict is what its own numbers say
        ok = check.value is not None and (
            check.value <= check.bound if check.relation == "<=" else check.value >= check.bound
        )
        assert ok == check.passed
    assert all(any(name in line for line in caught.value.failed) for name in names)
    quiet = lc.validate(model, net, throw=False, **options)
    assert {c.name for c in quiet.checks if not c.passed} == names
    return names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_every_example_passes_and_the_reported_difference_is_the_real_one(name, k, dtype):
    model = lc.registry().example_models(name, seed=1)[k].double()
    net = lc.convert(model, check=False).to(dtype)
    x = torch.randn(16, *net.input_shape).to(dtype).double()
    report = lc.validate(model, net, x)
    assert report.passed
    assert report.dtype == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        expected = model(x)
        difference = float((net(x.to(dtype)).double() - expected).abs().max() / expected.abs().max())
    # Solves that stop a step apart: twice the solver's tolerance.
    assert report.value(OUTPUT) == pytest.approx(difference, rel=0.5, abs=1e-11 if dtype is torch.float64 else 4e-6)
    assert difference <= (1e-10 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize("parameter", ["log_psi", "G", "U", "V", "S"])
def test_a_changed_weight_is_found(parameter):
    model, net = pair()
    with torch.no_grad():
        weight = getattr(net.stages[0], parameter)
        weight += 1e-5 * torch.randn_like(weight)
    names = failed(model, net)
    assert W in names
    if parameter != "log_psi":  # without biases Ψ only rescales a fixed-point equation, to first order
        assert {OUTPUT, GRADIENT} <= names
    assert "output: DAE - source" not in names


def test_a_changed_bias_is_an_output_difference_only():
    model, net = pair()
    with torch.no_grad():
        net.stages[0].b_y[0] += 1e-8
    assert failed(model, net) == {OUTPUT}


@pytest.mark.parametrize("factor", [1.0 + 1e-9, 0.5])
def test_a_changed_L_is_found(factor):
    model, net = pair("mondeq")
    net.stages[0].lipschitz *= factor
    names = failed(model, net)
    assert {L, W} <= names


def test_a_changed_source_is_found():
    model, net = pair()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-4
    names = failed(model, net)
    assert {OUTPUT, GRADIENT, W} <= names
    assert "output: DAE - source" not in names


def test_a_constant_below_the_jacobian_is_found(monkeypatch):
    model = nn.Sequential(lc.Normalize(0.5, 0.25), AOLLinear(4, 4))
    model.input_shape = (4,)
    net = lc.convert(model)
    assert net.lipschitz == 4.0
    monkeypatch.setattr("lipconvert.networks.network.core_lipschitz", lambda module: 0.01)
    assert failed(model, net) >= {NORM}


def test_a_slightly_lowered_glue_constant_is_found(monkeypatch):
    model = nn.Sequential(lc.Normalize(0.5, 0.25), *[AOLLinear(4, 4) for _ in range(3)])
    model.input_shape = (4,)
    with torch.no_grad():
        for layer in model[1:]:
            layer.weight.normal_()  # far from orthogonal: the Jacobian stays well below L
    net = lc.convert(model)
    monkeypatch.setattr("lipconvert.networks.network.core_lipschitz", lambda module: 3.9)
    assert not lc.validate(model, net, throw=False).passed


def test_a_difference_on_one_sample_is_not_averaged_away():
    # A neuron that only the last sample wakes up.
    model, net = pair()
    stage = net.stages[0]
    with torch.no_grad():
        inputs = torch.randn(200, 5)
        inputs[-1] *= 50.0
        z = stage.solve(torch.nn.functional.pad(inputs, (0, stage.U.shape[1] - 5))).value
        stage.G[0, int(z[-1].abs().argmax())] += 1e-6
    assert OUTPUT in failed(model, net, inputs=inputs)


def test_numbers_that_are_not_finite_never_pass():
    model, net = pair()
    inputs = torch.randn(4, 5)
    inputs[2, 0] = float("nan")
    with pytest.raises(lc.LipconvertError):
        lc.validate(model, net, inputs)
    with torch.no_grad():
        net.stages[0].b_y[0] = float("nan")
    with pytest.raises(lc.LipconvertError):
        lc.validate(model, net)


def test_delta_must_be_the_one_of_the_conversion():
    model, _ = pair()
    net = lc.convert(model, delta=1e-3)
    assert net.lipschitz == pytest.approx(1.001, rel=1e-14)
    assert lc.validate(model, net, delta=1e-3).passed
    assert lc.validate(model, net, delta=None).passed
    assert failed(model, net) == {L}


def test_inputs_and_structure_that_do_not_fit_are_named():
    model, net = pair()
    for inputs in (torch.zeros(3, 4), torch.zeros(5)):
        with pytest.raises(lc.ShapeError):
            lc.validate(model, net, inputs)
    other, _ = pair("aol")
    with pytest.raises(lc.ShapeError):
        lc.validate(other, net)


def test_nothing_is_changed_by_validating():
    model, net = pair()
    before = [p.detach().clone() for p in (*model.parameters(), *net.parameters())]
    lc.validate(model, net)
    after = [*model.parameters(), *net.parameters()]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, after, strict=True))
