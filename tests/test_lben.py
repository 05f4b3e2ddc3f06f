"""The LBEN module: its W against equation (2) in numpy, caching, state, shapes, dtypes, gradients."""

import copy
import io

import numpy as np
import pytest
import torch
from lipconvert_plugins.sll import SLLNetwork
from torch import Tensor, nn
from torch.func import functional_call

from lipconvert import (
    DAE,
    LBEN,
    Activations,
    InvalidParameterError,
    NotConvergedError,
    ShapeError,
    SolverOptions,
    convert,
    to_dae,
)

PARAMETERS = ("log_psi", "G", "U", "V", "S", "b_z", "b_y")


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def random_lben(p: int = 3, n: int = 6, q: int = 2, **options) -> LBEN:
    lben = LBEN(p, n, q, **{"lipschitz": 1.7, "epsilon": 0.2, "activation": "tanh", **options})
    with torch.no_grad():
        lben.log_psi.normal_(std=0.4)
        lben.b_z.normal_()
        lben.b_y.normal_()
    return lben


def equation_2(lben: LBEN) -> np.ndarray:
    """W = I − Ψ( G′G/2L + Ψ⁻¹UU′Ψ⁻¹/2L + V′V + S − S′ + εI ), entry by entry from the module's numbers, float64."""
    log_psi, G, U, V, S = (getattr(lben, k).detach().double().numpy() for k in PARAMETERS[:5])
    L, n = lben.lipschitz, len(log_psi)
    Psi = np.diag(np.exp(log_psi))
    inverse = np.diag(np.exp(-log_psi))
    inner = G.T @ G / (2 * L) + inverse @ U @ U.T @ inverse / (2 * L) + V.T @ V + S - S.T + lben.epsilon * np.eye(n)
    return np.eye(n) - Psi @ inner


def assert_cache_is_current(lben: LBEN, tolerance: float = 1e-13) -> None:
    expected = equation_2(lben)
    np.testing.assert_allclose(lben.state_map().W.double().numpy(), expected, atol=tolerance * np.abs(expected).max())


def test_W_is_equation_2():
    for seed in range(20):
        torch.manual_seed(seed)
        lben = random_lben(n=5 + seed % 4, lipschitz=0.3 + seed, epsilon=0.1 * (seed % 3))
        np.testing.assert_allclose(lben.W.detach().numpy(), equation_2(lben), atol=1e-13)
        assert_cache_is_current(lben)
        np.testing.assert_allclose(lben.dae().W.numpy(), equation_2(lben), atol=1e-13)


def test_H_is_2VV_plus_2eps_whatever_the_parameters():
    for seed in range(20):
        torch.manual_seed(seed)
        lben = random_lben()
        W, L = equation_2(lben), lben.lipschitz
        G, U, V = (getattr(lben, k).detach().numpy() for k in ("G", "U", "V"))
        Lambda = np.diag(np.exp(-lben.log_psi.detach().numpy()))
        H = 2 * Lambda - Lambda @ W - W.T @ Lambda - G.T @ G / L - Lambda @ U @ U.T @ Lambda / L
        np.testing.assert_allclose(H, 2 * V.T @ V + 2 * lben.epsilon * np.eye(6), atol=1e-12)


def test_output_is_a_fixed_point_read_out():
    lben, x = random_lben(), torch.randn(5, 3)
    z, W = lben.solve(x).value.numpy(), equation_2(lben)
    U, G, b_z, b_y = (getattr(lben, k).detach().numpy() for k in ("U", "G", "b_z", "b_y"))
    np.testing.assert_allclose(z, np.tanh(z @ W.T + x.numpy() @ U.T + b_z), atol=1e-12)
    with torch.no_grad():
        without_grad = lben(x)
    for y in (lben(x).detach(), without_grad, copy.deepcopy(lben).requires_grad_(False)(x)):
        np.testing.assert_allclose(y.numpy(), z @ G.T + b_y, atol=1e-12)


def test_rows_of_U_that_are_zero_are_left_out_and_nothing_else():
    lben, x = random_lben(), torch.randn(4, 3)
    for zero in (slice(0, 0), slice(0, 2), slice(4, 6), slice(2, 4), slice(0, 6)):
        with torch.no_grad():
            lben.U.normal_()
            lben.U[zero] = 0.0
        expected = x.numpy() @ lben.U.detach().numpy().T + lben.b_z.detach().numpy()
        np.testing.assert_allclose(lben.drive(x).detach().numpy(), expected, atol=1e-14)


def test_cached_W_follows_every_change_of_the_weights():
    lben, x = random_lben(), torch.randn(8, 3)
    assert lben.state_map() is lben.state_map()
    for optimiser in (torch.optim.Adam(lben.parameters(), lr=1e-2), torch.optim.SGD(lben.parameters(), lr=1e-2)):
        for _ in range(3):
            assert_cache_is_current(lben)
            lben(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert_cache_is_current(lben)
    for name in PARAMETERS[:5]:
        with torch.no_grad():
            getattr(lben, name)[0] += 0.01
        assert_cache_is_current(lben)
    lben.load_state_dict(random_lben().state_dict())
    assert_cache_is_current(lben)
    lben.S.data.add_(torch.randn(6, 6))  # not counted by torch
    lben.refresh()
    assert_cache_is_current(lben)
    lben.V = nn.Parameter(torch.randn(6, 6))
    assert_cache_is_current(lben)


def test_cached_W_follows_a_round_trip_through_float32():
    for seed in range(20):
        torch.manual_seed(seed)
        lben = random_lben()
        lben.state_map()
        lben.float()
        if seed % 2:
            assert_cache_is_current(lben, 1e-6)
            assert lben.state_map().W.dtype == torch.float32
        lben.double()  # the allocator may hand back the very addresses of before
        assert_cache_is_current(lben)


@pytest.mark.parametrize(("attribute", "value"), [("lipschitz", 3.0), ("epsilon", 1.0)])
def test_cached_W_follows_L_and_epsilon(attribute, value):
    lben = random_lben()
    lben.state_map()
    setattr(lben, attribute, value)
    assert_cache_is_current(lben)


def test_deepcopy_is_independent():
    lben, x = random_lben(), torch.randn(4, 3)
    with torch.no_grad():
        before = lben(x)
        twin = copy.deepcopy(lben)
        assert torch.equal(twin(x), before)
        twin.V.add_(0.5)
        assert_cache_is_current(twin)
        assert_cache_is_current(lben)
        assert torch.equal(lben(x), before)
        assert not torch.allclose(twin(x), before)


def test_state_dict_round_trip_brings_L_epsilon_and_activations():
    sigma = Activations.of([("identity", 2), ("leaky_relu(0.25)", 3), ("tanh", 1)])
    source = random_lben(lipschitz=2.5, epsilon=0.3, activation=sigma)
    source.blocks = (2, 4)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target = LBEN(3, 6, 2, lipschitz=1.0, epsilon=0.01)
    target.state_map()
    target.load_state_dict(torch.load(file, weights_only=True))
    assert (target.lipschitz, target.epsilon, target.blocks) == (2.5, 0.3, (2, 4))
    assert target.sigma == sigma
    assert_cache_is_current(target)
    x = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(target(x), source(x))


def test_float32_agrees_with_float64():
    lben, x = random_lben(), torch.randn(32, 3)
    single = copy.deepcopy(lben).float()
    with torch.no_grad():
        difference = single(x.float()).double() - lben(x)
    # Tolerance 2e-6 relative, μ of about 0.2.
    assert float(difference.abs().max()) < 1e-4 * float(lben(x).detach().abs().max())
    y = single(x.float())
    assert y.dtype == torch.float32
    y.sum().backward()
    lben(x).sum().backward()
    for name in PARAMETERS:
        actual, expected = getattr(single, name).grad, getattr(lben, name).grad
        assert actual is not None
        assert expected is not None
        assert float((actual.double() - expected).abs().max()) < 1e-3 * max(float(expected.abs().max()), 1.0)


def test_leading_dimensions():
    lben, x = random_lben(), torch.randn(2, 5, 3)
    y = lben(x)
    assert y.shape == (2, 5, 2)
    for i in range(2):
        for j in range(5):
            single = lben(x[i, j])
            assert single.shape == (2,)
            np.testing.assert_allclose(single.detach().numpy(), y[i, j].detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_samples(shape):
    assert random_lben()(torch.zeros(shape)).shape == (*shape[:-1], 2)


def test_inputs_that_do_not_fit_are_named():
    lben = random_lben()
    for x in (torch.zeros(4, 2), torch.zeros(()), torch.zeros(3, 4)):
        with pytest.raises(ShapeError) as caught:
            lben(x)
        assert caught.value.actual == tuple(x.shape)
        with pytest.raises(ShapeError):
            lben.solve(x)


def test_constructor_arguments_are_checked():
    for bad in ({"lipschitz": 0.0}, {"lipschitz": float("inf")}, {"epsilon": -1.0}, {"epsilon": float("nan")}):
        with pytest.raises(InvalidParameterError):
            LBEN(2, 3, 2, **bad)
    with pytest.raises(InvalidParameterError):
        LBEN(2, 0, 2)
    with pytest.raises(ShapeError):
        LBEN(2, 3, 2, activation=Activations("relu", 4))


def test_not_converged_is_raised_and_can_be_handed_back():
    lben, x = random_lben(options=SolverOptions("peaceman_rachford", max_steps=1)), torch.randn(4, 3)
    with pytest.raises(NotConvergedError):
        lben(x)
    with torch.no_grad(), pytest.raises(NotConvergedError):
        lben(x)
    kept = lben.solve(x, SolverOptions("peaceman_rachford", max_steps=1, throw=False))
    assert not bool(kept.converged.any())


def test_a_converted_chain_solves_by_one_pass():
    model = SLLNetwork(inputs=3, classes=2, dense_depth=3).double()
    (lben,) = convert(model).stages
    assert lben.solve(torch.randn(3, 3)).method == "forward_substitution"
    with torch.no_grad():
        lben.V += 1e-4 * torch.randn_like(lben.V)
    assert lben.solve(torch.randn(3, 3)).method == "sweep"


def gradcheck(lben: LBEN, names: tuple[str, ...], x: Tensor) -> bool:
    values = tuple(getattr(lben, name).detach().clone().requires_grad_(True) for name in names)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(lben, dict(zip(names, values, strict=True)), (x,))

    # Solved to 1e-13, differenced by 1e-6: the quotient is good to 1e-7.
    return torch.autograd.gradcheck(function, (x.requires_grad_(True), *values), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "activation"), [("auto", "tanh"), ("peaceman_rachford", "relu"), ("forward_backward", "relu")]
)
def test_gradcheck_in_every_parameter(method, activation):
    lben = random_lben(n=4, epsilon=0.6, activation=activation, options=SolverOptions(method))
    with torch.no_grad():
        for weight in (lben.G, lben.U, lben.V, lben.S):
            weight *= 0.4
        lben.log_psi *= 0.3
    x = torch.randn(2, 3)
    z = lben.solve(x).value
    v = z @ lben.W.detach().mT + lben.drive(x).detach()
    assert float(v.abs().min()) > 1e-3  # kinks are further away than the difference step
    assert gradcheck(lben, PARAMETERS, x)


@pytest.mark.parametrize("method", ["auto", "sweep"])
def test_gradcheck_of_a_converted_chain(method):
    model = SLLNetwork(inputs=2, classes=2, features=2, dense_depth=2, activation=nn.Tanh()).double()
    lben = LBEN.from_dae(to_dae(model), options=SolverOptions(method))
    assert gradcheck(lben, PARAMETERS, torch.randn(2, 2))
    lben.options = SolverOptions("forward_substitution")
    assert gradcheck(lben, ("b_z", "b_y"), torch.randn(2, 2))


def test_an_ill_posed_dae_is_reported():
    # H = 0 at W = 1, yet z = relu(z + b) has no solution for b > 0 (FORMULAS 0).
    lben = LBEN.from_dae(DAE(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), torch.ones(1)))
    with pytest.raises(NotConvergedError):
        lben(torch.zeros(1, 1))
