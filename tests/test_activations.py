"""Activations against torch's modules, autograd, and a scalar root finder for the proximal maps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn

from lipconvert import (
    Activation,
    Activations,
    InvalidParameterError,
    ShapeError,
    UnsupportedActivationError,
    activation_module,
)
from lipconvert import activation_of as read

# torch's Softplus turns into v beyond its threshold; a threshold never reached is the function itself.
MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu(0.0)": nn.LeakyReLU(0.0),
    "leaky_relu(0.3)": nn.LeakyReLU(0.3),
    "leaky_relu(1.0)": nn.LeakyReLU(1.0),
    "elu(0.0)": nn.ELU(0.0),
    "elu(0.4)": nn.ELU(0.4),
    "elu(1.0)": nn.ELU(1.0),
    "softplus(1.0)": nn.Softplus(1.0, threshold=88.0),
    "softplus(5.0)": nn.Softplus(5.0, threshold=88.0),
    "softplus(0.2)": nn.Softplus(0.2, threshold=88.0),
}
NAMES = sorted(MODULES)


def grid() -> torch.Tensor:
    # Kinks (0, ±1, 6), their neighbourhoods, and both tails.
    kinks = torch.tensor([-1.0, 0.0, 1.0, 6.0])
    return torch.cat([kinks, kinks - 1e-9, kinks + 1e-9, torch.linspace(-12.0, 12.0, 241)])


@pytest.mark.parametrize("name", NAMES)
def test_value_is_torchs(name: str) -> None:
    v = grid()
    # One or two units in the last place between two ways to evaluate exp and log1p.
    torch.testing.assert_close(read(MODULES[name])(v), MODULES[name](v), rtol=8e-15, atol=1e-15)
    assert read(MODULES[name]) == Activation.parse(name)


@pytest.mark.parametrize("name", NAMES)
def test_module_of_an_activation_computes_the_same(name: str) -> None:
    module, v = activation_module(name), grid()
    assert type(module) is type(MODULES[name])
    # torch's Softplus is v beyond its threshold, a step of exp(−20).
    torch.testing.assert_close(module(v), MODULES[name](v), rtol=0.0, atol=1.1e-8 if "softplus" in name else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_autograds_also_at_the_kinks(name: str) -> None:
    v = grid().requires_grad_(True)
    (expected,) = torch.autograd.grad(MODULES[name](v).sum(), v)
    slope = read(name).slope(v.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_lie_between_0_and_1(name: str) -> None:
    activation = read(name)
    v = torch.cat([grid(), torch.linspace(-1e3, 1e3, 4001), torch.tensor([-1e300, -1e30, 1e30, 1e300])])
    slope = activation.slope(v)
    assert bool(((slope >= 0.0) & (slope <= 1.0)).all())
    v = v.sort().values
    step, rise = v.diff(), activation(v).diff()
    # Quotients too, for a slope that lies: monotone and 1-Lipschitz up to rounding of the values.
    assert bool((rise >= 0.0).all())
    assert bool((rise <= step * (1.0 + 1e-12) + 1e-14).all())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_prox_solves_its_scalar_equation(name: str, alpha: float) -> None:
    """prox(v) = σ(t) where αt + (1 − α)σ(t) = v, found by bracketing."""
    module = MODULES[name]

    def sigma(t: float) -> float:
        return float(module(torch.tensor(t)))

    # α sets the size of the equation; t lies within (|v| + |σ(0)|)/min(α, 1), here below 400.
    points = [-20.0, -6.0, -1.5, -1.0, -0.7, -0.1, 0.0, 1e-6, 0.1, 0.5, 0.9, 1.0, 1.7, 3.0, 6.0, 7.5, 20.0]
    values = read(name).prox(torch.tensor(points), alpha)
    for v, z in zip(points, values.tolist(), strict=True):

        def equation(t: float, v: float = v) -> float:
            return alpha * t + (1.0 - alpha) * sigma(t) - v

        t = brentq(equation, -400.0, 400.0, xtol=1e-14, rtol=4 * 2.3e-16, maxiter=300)
        # σ is 1-Lipschitz: the error of z is at most that of t, 1e-14 plus 1e-15 |t|, |t| <= 200.
        assert z == pytest.approx(sigma(t), abs=1e-12, rel=0.0)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    v=st.floats(-1e6, 1e6),
    w=st.floats(-1e6, 1e6),
    alpha=st.floats(1e-2, 1e2),
)
def test_prox_is_firmly_nonexpansive(name: str, v: float, w: float, alpha: float) -> None:
    a, b = (float(read(name).prox(torch.tensor(p, dtype=torch.float64), alpha)) for p in (v, w))
    # (a − b)² <= (a − b)(v − w); rounding of a and b is relative to their size, amplified by at most 1/α on the way.
    slack = 1e-9 * (1.0 + abs(v) + abs(w)) ** 2
    assert (a - b) ** 2 <= (a - b) * (v - w) + slack


class MaxMin(nn.Module):
    pass


class GroupSort(nn.Module):
    pass


class Abs(nn.Module):
    pass


class MyReLU(nn.ReLU):
    pass


@pytest.mark.parametrize(
    "module",
    [
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.Hardswish(),
        nn.PReLU(),
        nn.SELU(),
        nn.CELU(),
        nn.Softmax(-1),
        nn.LogSoftmax(-1),
        MaxMin(),
        GroupSort(),
        Abs(),
        MyReLU(),  # a subclass may compute anything
        nn.Linear(1, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(UnsupportedActivationError) as caught:
        read(module, "blocks.3.act")
    assert caught.value.path == "blocks.3.act"
    assert caught.value.activation == type(module).__name__
    assert "blocks.3.act" in str(caught.value)
    assert type(module).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(1.5), nn.LeakyReLU(-0.1), nn.ELU(2.0), nn.ELU(-0.5), nn.Softplus(0.0), nn.Softplus(-1.0)],
    ids=repr,
)
def test_parameters_that_push_a_slope_out_of_0_1_are_refused(module: nn.Module) -> None:
    with pytest.raises(UnsupportedActivationError) as caught:
        read(module, "here")
    assert caught.value.path == "here"


def test_hardtanh_with_another_range_is_refused() -> None:
    with pytest.raises(UnsupportedActivationError, match="-2"):
        read(nn.Hardtanh(-2.0, 2.0))


@pytest.mark.parametrize("name", ["gelu", "", "relu7", "ReLU", "leaky_relu(x)", "leaky_relu()"])
def test_unreadable_text_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedActivationError):
        Activation.parse(name)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("relu", 0.5), ("leaky_relu", 1.1), ("leaky_relu", math.nan), ("softplus", 0.0), ("elu", -1.0), ("tanh", 1.0)],
)
def test_parameter_range(name: str, parameter: float) -> None:
    with pytest.raises(InvalidParameterError):
        Activation(name, parameter)


def test_text_without_a_parameter_takes_torchs_default() -> None:
    assert Activation.parse("leaky_relu").parameter == nn.LeakyReLU().negative_slope
    assert Activation.parse("elu").parameter == nn.ELU().alpha
    assert Activation.parse("softplus").parameter == nn.Softplus().beta
    assert Activation.parse("relu").parameter == 0.0


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.one_of(
        st.sampled_from(["identity", "relu", "relu6", "hardtanh", "tanh", "sigmoid"]).map(Activation),
        st.builds(Activation, st.sampled_from(["leaky_relu", "elu"]), st.floats(0.0, 1.0)),
        st.builds(Activation, st.just("softplus"), st.floats(1e-6, 1e6)),
    )
)
def test_text_round_trip_is_exact(activation: Activation) -> None:
    assert Activation.parse(str(activation)) == activation


@pytest.mark.parametrize("name", NAMES)
def test_homogeneous_is_what_it_says(name: str) -> None:
    v = torch.linspace(-3.0, 3.0, 61)
    scaled = MODULES[name](3.7 * v)
    homogeneous = bool(torch.allclose(scaled, 3.7 * MODULES[name](v), rtol=1e-13, atol=1e-13))
    # elu(0) is ReLU under another name; saying no there is safe.
    assert read(name).homogeneous == homogeneous or name == "elu(0.0)"


runs = st.lists(
    st.tuples(st.sampled_from(["relu", "tanh", "identity", "leaky_relu(0.5)"]), st.integers(0, 4)), max_size=5
)


def expanded(activations: Activations) -> list[str]:
    return [str(activation) for activation, size in activations for _ in range(size)]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(runs, runs, st.integers(-12, 12), st.integers(-12, 12))
def test_activations_behave_like_a_list_of_rows(
    a: list[tuple[str, int]], b: list[tuple[str, int]], start: int, stop: int
) -> None:
    first, second = Activations.of(a), Activations.of(b)
    rows_a, rows_b = ([str(read(name)) for name, size in part for _ in range(size)] for part in (a, b))
    rows = rows_a + rows_b
    both = first + second
    assert expanded(first) == rows_a
    assert expanded(both) == rows
    assert len(both) == len(rows)
    assert expanded(both[start:stop]) == rows[start:stop]
    assert expanded(both[start:]) == rows[start:]
    assert expanded(both[:stop]) == rows[:stop]
    # Runs are merged, so two ways to the same rows are equal and hash alike.
    again = Activations.of((name, 1) for name in rows)
    assert again == both
    assert hash(again) == hash(both)
    assert all(left[0] != right[0] for left, right in zip(both.runs, both.runs[1:], strict=False))


@pytest.mark.parametrize("shape", [(8,), (4, 8), (4, 8, 3), (2, 8, 3, 8), (0, 8, 2, 2)], ids=str)
def test_activations_act_row_by_row(shape: tuple[int, ...]) -> None:
    sigma = Activations.of([("relu", 2), ("tanh", 1), ("identity", 2), ("leaky_relu(0.3)", 3)])
    names = ["relu"] * 2 + ["tanh"] + ["identity"] * 2 + ["leaky_relu(0.3)"] * 3
    v = torch.randn(shape)
    rows = min(1, len(shape) - 1)  # a single state is its rows
    parts = [MODULES[name](v.select(rows, k)) for k, name in enumerate(names)]
    assert torch.equal(sigma(v), torch.stack(parts, rows))
    prox = torch.stack([read(name).prox(v.select(rows, k), 0.7) for k, name in enumerate(names)], rows)
    assert torch.equal(sigma.prox(v, 0.7), prox)
    w = v.clone().requires_grad_(True)
    total = torch.stack([MODULES[name](w.select(rows, k)) for k, name in enumerate(names)]).sum()
    torch.testing.assert_close(sigma.slope(v), torch.autograd.grad(total, w)[0], rtol=1e-14, atol=1e-15)
    assert not sigma.homogeneous
    assert sigma[3:].homogeneous
    assert sigma != "relu"
    assert "tanh x 1" in repr(sigma)
    assert sigma.take(torch.tensor([0])) == sigma


def test_a_state_of_the_wrong_size_is_refused() -> None:
    # The last one has 3 in its last dimension: that is the width of an image, not the rows.
    for shape in ((4,), (2, 4), (3, 4), (2, 4, 3)):
        with pytest.raises(ShapeError) as caught:
            Activations("relu", 3)(torch.zeros(shape))
        assert caught.value.actual == shape
