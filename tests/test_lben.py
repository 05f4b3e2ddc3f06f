"""The LBEN module: its W against equation (2) in numpy, caching, state, shapes, dtypes, gradients.

With an image, equation (2) is that of the circulant matrices of the module's kernels, built here index by index.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from lipconvert_plugins.sll import SLLNetwork
from plain import circulant, matrices
from torch import Tensor, nn
from torch.func import functional_call

from lipconvert import (
    DAE,
    LBEN,
    Activations,
    Grid,
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


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 2), (2, 4)]


def image_lben(image: tuple[int, int], p: int = 2, n: int = 3, q: int = 2, **options) -> LBEN:
    return random_lben(p, n, q, image=image, **options)


def dense_parts(lben: LBEN) -> tuple[np.ndarray, ...]:
    """(W, U, G, b_z, b_y) on flattened images, W by equation (2) of the circulant matrices, float64."""
    pixels, L = lben.grid.pixels, lben.lipschitz
    log_psi, b_z, b_y = (getattr(lben, k).detach().double().numpy().repeat(pixels) for k in ("log_psi", "b_z", "b_y"))
    G, U, V, S = (circulant(getattr(lben, k).detach().double()).numpy() for k in ("G", "U", "V", "S"))
    Psi, inverse, eye = np.diag(np.exp(log_psi)), np.diag(np.exp(-log_psi)), np.eye(len(log_psi))
    inner = G.T @ G / (2 * L) + inverse @ U @ U.T @ inverse / (2 * L) + V.T @ V + S - S.T + lben.epsilon * eye
    return eye - Psi @ inner, U, G, b_z, b_y


def kernels_of(W: np.ndarray, lben: LBEN) -> Tensor:
    """The kernels of a circulant matrix: what the first pixel of each channel reads."""
    n, pixels = len(lben.log_psi), lben.grid.pixels
    K = torch.from_numpy(W).reshape(n, pixels, n, pixels)[:, 0].reshape(n, n, *lben.grid.image)
    np.testing.assert_allclose(circulant(K).numpy(), W, atol=1e-13 * max(1.0, np.abs(W).max()))
    return K


def assert_image_cache_is_current(lben: LBEN, tolerance: float = 1e-12) -> None:
    expected = matrices(kernels_of(dense_parts(lben)[0], lben))
    found = lben.state_map().W.to(torch.complex128)
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def newton(W: np.ndarray, u: np.ndarray) -> np.ndarray:
    """z = tanh(Wz + u) for each row of u, along τW, τ = 0..1."""
    rows = []
    for drive in u:
        z = np.zeros_like(drive)
        for tau in np.linspace(0.0, 1.0, 11):
            for _ in range(60):
                value = np.tanh(tau * W @ z + drive)
                if np.linalg.norm(z - value) <= 1e-14 * (1.0 + np.linalg.norm(z)):
                    break
                slope = 1.0 - value**2
                z = z - np.linalg.solve(np.eye(len(z)) - slope[:, None] * tau * W, z - value)
        assert np.linalg.norm(z - value) <= 1e-13 * (1.0 + np.linalg.norm(z)), "the reference did not converge"
        rows.append(z)
    return np.stack(rows)


@pytest.mark.parametrize("image", IMAGES)
def test_W_on_images_is_equation_2_of_the_circulant_matrices(image):
    for seed in range(4):
        torch.manual_seed(seed)
        lben = image_lben(image, lipschitz=0.3 + seed, epsilon=0.1 * (seed % 3))
        W, U, G, _, _ = dense_parts(lben)
        assert_image_cache_is_current(lben)
        expected = matrices(kernels_of(W, lben))
        for found in (lben.W.detach(), lben.dae().W):
            np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-12 * max(1.0, np.abs(W).max()))
        assert lben.dae().input_shape == lben.input_shape == (2, *image)
        # (0.6) densely, at every value of the parameters.
        V, L, Lambda = (
            circulant(lben.V.detach()).numpy(),
            lben.lipschitz,
            np.diag(np.exp(-lben.log_psi.detach().numpy())),
        )
        Lambda = np.kron(Lambda, np.eye(lben.grid.pixels))
        W = circulant(lben.grid.kernels(lben.W.detach())).numpy()
        H = 2 * Lambda - Lambda @ W - W.T @ Lambda - G.T @ G / L - Lambda @ U @ U.T @ Lambda / L
        size = max(1.0, np.abs(Lambda @ W).max())
        np.testing.assert_allclose(H, 2 * V.T @ V + 2 * lben.epsilon * np.eye(len(W)), atol=1e-12 * size)
        assert np.linalg.eigvalsh(H)[0] >= 2 * lben.epsilon - 1e-12 * size


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("method", ["auto", "peaceman_rachford"])
def test_output_on_images_is_that_of_the_dense_form(image, method):
    lben, x = image_lben(image, options=SolverOptions(method)), torch.randn(4, 2, *image)
    W, U, G, b_z, b_y = dense_parts(lben)
    expected = (newton(W, x.flatten(1).numpy() @ U.T + b_z) @ G.T + b_y).reshape(4, 2, *image)
    with torch.no_grad():
        without_grad = lben(x)
    for y in (lben(x).detach(), without_grad, copy.deepcopy(lben).requires_grad_(False)(x)):
        np.testing.assert_allclose(y.numpy(), expected, atol=1e-11)
    np.testing.assert_allclose(lben.drive(x).shape, (4, 3, *lben.grid.batch))
    drive = lben.grid.values(lben.drive(x)).detach().flatten(1).numpy()
    np.testing.assert_allclose(drive, x.flatten(1).numpy() @ U.T + b_z, atol=1e-13)


def test_rows_of_U_that_are_zero_on_images_are_left_out_and_nothing_else():
    lben, x = image_lben((2, 3), p=2, n=4), torch.randn(4, 2, 2, 3)
    unit = torch.zeros(2, 2, 2, 3)
    unit[0, 0, 0, 0] = unit[1, 1, 0, 0] = 1.0
    fillings = [torch.randn(4, 2, 2, 3) for _ in range(4)]
    fillings[1][:2] = fillings[2][3] = 0.0
    fillings[3][:, :, 0, 1] = 1.0
    for start in range(3):  # U = I on two of the rows, where nothing is multiplied
        fillings.append(torch.zeros(4, 2, 2, 3))
        fillings[-1][start : start + 2] = unit
    nearly = fillings[-1].clone()
    nearly[2, 0, 1, 1] = 1e-9
    shifted = fillings[-1].roll(1, 3)
    for U in (*fillings, nearly, shifted, torch.zeros(4, 2, 2, 3)):
        with torch.no_grad():
            lben.U.copy_(U)
        expected = x.flatten(1) @ circulant(U).T + lben.b_z.detach().repeat_interleave(6)
        found = lben.grid.values(lben.drive(x)).detach().flatten(1)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-13)


@pytest.mark.parametrize("image", [(1, 1), (1, 3), (3, 2)])
def test_a_random_network_on_images_keeps_its_constant(image):
    """The 2-norm of the dense Jacobian at random points, before and after the parameters are moved at random."""
    lben = LBEN(2, 3, 2, image=image, lipschitz=0.8, epsilon=0.05, activation="relu")
    for _ in range(3):
        x = (3.0 * torch.randn(2, 2, *image)).requires_grad_(True)
        y = lben(x).flatten(1)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(y.shape[1])]
        assert float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max()) <= 0.8 * (1.0 + 1e-9)
        a, b = 3.0 * torch.randn(2, 20, 2, *image)
        with torch.no_grad():
            ratio = (lben(a) - lben(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
            assert float(ratio.max()) <= 0.8 * (1.0 + 1e-9)
            assert float(ratio.max()) > 1e-3
            for parameter in lben.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("method", "activation"), [("auto", "tanh"), ("peaceman_rachford", "relu")])
def test_gradients_to_every_parameter_on_images_by_differences(method, activation, image):
    lben = image_lben(image, epsilon=0.6, activation=activation, options=SolverOptions(method))
    with torch.no_grad():
        for weight in (lben.G, lben.U, lben.V, lben.S):
            weight *= 0.3
        lben.log_psi *= 0.3
        x = torch.randn(2, 2, *image)
        W, U, _, b_z, _ = dense_parts(lben)
        z = lben.grid.values(lben.solve(x).value).flatten(1).numpy()
        assert np.abs(z @ W.T + x.flatten(1).numpy() @ U.T + b_z).min() > 1e-4  # kinks are further than the step
    values = tuple(getattr(lben, name).detach().clone().requires_grad_(True) for name in PARAMETERS)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(lben, dict(zip(PARAMETERS, values, strict=True)), (x,))

    # Each by itself, in one direction: a wrong factor cannot hide behind the others.
    inputs, g = (x.requires_grad_(True), *values), torch.randn(2, 2, *image)
    gradients = torch.autograd.grad((function(*inputs) * g).sum(), inputs)
    for k, gradient in enumerate(gradients):
        step = torch.randn_like(inputs[k])
        moved = [[v + t * step if i == k else v for i, v in enumerate(inputs)] for t in (1e-6, -1e-6)]
        with torch.no_grad():
            up, down = (float((function(*v) * g).sum()) for v in moved)
        assert float((gradient * step).sum()) == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-7)


def test_gradients_on_images_of_frozen_parameters():
    lben, x = image_lben((2, 3)), torch.randn(2, 2, 2, 3).requires_grad_(True)
    (expected,) = torch.autograd.grad(lben(x).square().sum(), x)
    for frozen in (("V", "S"), ("log_psi", "G", "U", "V", "S"), PARAMETERS):
        twin = copy.deepcopy(lben)
        for name in frozen:
            getattr(twin, name).requires_grad_(False)
        (found,) = torch.autograd.grad(twin(x).square().sum(), x)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-11)


def test_cached_W_on_images_follows_every_change_of_the_weights():
    lben, x = image_lben((2, 3)), torch.randn(4, 2, 2, 3)
    assert lben.state_map() is lben.state_map()
    optimiser = torch.optim.Adam(lben.parameters(), lr=1e-2)
    for _ in range(3):
        assert_image_cache_is_current(lben)
        lben(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    for name in PARAMETERS[:5]:
        with torch.no_grad():
            getattr(lben, name)[0] += 0.01
        assert_image_cache_is_current(lben)
    lben.load_state_dict(image_lben((2, 3)).state_dict())
    assert_image_cache_is_current(lben)
    lben.V.data.view(-1)[5] += 0.3  # a few entries, not counted by torch
    lben.refresh()
    assert_image_cache_is_current(lben)
    lben.float()
    assert_image_cache_is_current(lben, 1e-5)
    assert lben.state_map().W.dtype == torch.complex64
    lben.double()
    lben.epsilon = 0.7
    assert_image_cache_is_current(lben)
    with torch.no_grad():
        before = lben(x)
        lben.G.add_(0.1)
        W, U, G, b_z, b_y = dense_parts(lben)
        expected = newton(W, x.flatten(1).numpy() @ U.T + b_z) @ G.T + b_y
        np.testing.assert_allclose(lben(x).flatten(1).numpy(), expected, atol=1e-11)
        assert not torch.allclose(lben(x), before)


def test_state_dict_round_trip_on_images():
    sigma = Activations.of([("identity", 1), ("leaky_relu(0.25)", 1), ("tanh", 1)])
    source = image_lben((2, 3), lipschitz=2.5, epsilon=0.3, activation=sigma)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target, x = LBEN(2, 3, 2, image=(2, 3)), torch.randn(4, 2, 2, 3)
    target.state_map()
    target.load_state_dict(torch.load(file, weights_only=True))
    assert (target.lipschitz, target.epsilon, target.sigma) == (2.5, 0.3, sigma)
    with torch.no_grad():
        assert torch.equal(target(x), source(x))
        assert torch.equal(copy.deepcopy(source)(x), source(x))
    for other in ((3, 2), (1, 6), ()):
        with pytest.raises(RuntimeError, match="size mismatch"):
            LBEN(2, 3, 2, image=other).load_state_dict(source.state_dict())


@pytest.mark.parametrize("image", IMAGES)
def test_float32_on_images_agrees_with_float64(image):
    lben, x = image_lben(image, epsilon=0.5), torch.randn(8, 2, *image)
    single = copy.deepcopy(lben).float()
    with torch.no_grad():
        y = lben(x)
        assert float((single(x.float()).double() - y).abs().max()) <= 1e-5 * float(y.abs().max())
    single(x.float()).sum().backward()
    lben(x).sum().backward()
    for name in PARAMETERS:
        actual, expected = getattr(single, name).grad, getattr(lben, name).grad
        assert actual.dtype == torch.float32
        assert float((actual.double() - expected).abs().max()) < 1e-4 * max(float(expected.abs().max()), 1.0)


def test_leading_dimensions_of_images():
    lben, x = image_lben((2, 3)), torch.randn(2, 3, 2, 2, 3)
    y = lben(x)
    assert y.shape == (2, 3, 2, 2, 3)
    for i, j in np.ndindex(2, 3):
        assert lben(x[i, j]).shape == (2, 2, 3)
        np.testing.assert_allclose(lben(x[i, j]).detach().numpy(), y[i, j].detach().numpy(), atol=1e-12)
    for empty in ((0, 2, 2, 3), (3, 0, 2, 2, 3)):
        assert lben(torch.zeros(empty)).shape == empty
        with torch.no_grad():
            assert lben(torch.zeros(empty)).shape == empty


@pytest.mark.parametrize("shape", [(4, 2, 3, 2), (4, 3, 2, 3), (2, 3), (4, 12), (4, 2, 2, 4), ()])
def test_images_that_do_not_fit_are_named(shape):
    lben = image_lben((2, 3))
    for call in (lben, lben.solve):
        with pytest.raises(ShapeError) as caught:
            call(torch.zeros(shape))
        assert caught.value.actual == shape
        assert "2, 2, 3" in str(caught.value)


@pytest.mark.parametrize("image", [(3,), (0, 2), (1, 2, 3)])
def test_an_image_has_two_sizes(image):
    with pytest.raises(ShapeError):
        LBEN(2, 3, 2, image=image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("image", [(), *IMAGES])
def test_running_holds_the_floats_in_use(image, dtype):
    """Widening rounds nothing: W, U and G of ``running`` are those that a solve multiplies with, to the last bit."""
    lben = (image_lben(image, epsilon=0.3) if image else random_lben(2, 3, 2, epsilon=0.3)).to(dtype)
    dae = lben.running()
    x = torch.randn(4, 2, *image, dtype=dtype)
    u = lben.drive(x)
    expected = lben.grid.affine(dae.U.to(u.dtype), lben.grid.coordinates(x), lben.b_z)
    np.testing.assert_allclose(u.detach().numpy(), expected.detach().numpy(), rtol=2e-6, atol=1e-5)
    assert torch.equal(dae.W, lben.state_map().W.to(dae.W.dtype))
    assert torch.equal(dae.G.to(u.dtype).to(dae.G.dtype), dae.G)
    rebuilt = lben.dae()
    assert float((dae.W - rebuilt.W).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-14)
    assert torch.equal(dae.bias_z, lben.b_z.detach().double())
    assert (dae.lipschitz, dae.blocks, dae.grid) == (rebuilt.lipschitz, rebuilt.blocks, rebuilt.grid)


@pytest.mark.parametrize("image", IMAGES)
def test_from_dae_on_images_writes_real_kernels(image):
    dae = image_lben(image, epsilon=0.1).dae()
    lben = LBEN.from_dae(dae)
    assert (lben.grid, lben.input_shape, lben.lipschitz) == (Grid(image), (2, *image), dae.lipschitz)
    assert all(parameter.dtype == torch.float64 for parameter in lben.parameters())
    np.testing.assert_allclose(lben.W.detach().numpy(), dae.W.numpy(), atol=1e-12)
    assert_image_cache_is_current(lben)


def test_fill_false_leaves_the_parameters_to_the_caller():
    dtypes = {"dtype": torch.float32, "fill": False}
    lben = LBEN(2, 3, 2, image=(2, 3), **dtypes)
    assert {parameter.dtype for parameter in lben.parameters()} == {torch.float32}
    assert lben.V.shape == (3, 3, 2, 3)
    lben.reset_parameters()
    assert bool((lben.log_psi == 0).all())
    source = LBEN(2, 3, 2, image=(2, 3), dtype=torch.float32)
    lben.load_state_dict(source.state_dict())
    x = torch.randn(3, 2, 2, 3).float()
    with torch.no_grad():
        assert torch.equal(lben(x), source(x))


def test_evaluating_in_inference_mode_leaves_gradients_possible() -> None:
    for image in ((), (6, 5)):
        net = LBEN(3, 4, 2, image=image).requires_grad_(False)
        x = torch.randn(2, 3, *image)
        with torch.inference_mode():
            expected = net(x).clone()
        x.requires_grad_()
        y = net(x)
        y.sum().backward()
        assert float((y.detach() - expected).abs().max()) <= 1e-13
        assert x.grad is not None


def test_copies_do_not_carry_the_assembled_W() -> None:
    net = LBEN(3, 8, 2, image=(6, 5))
    fresh = len(pickle.dumps(net))
    with torch.no_grad():
        net(torch.randn(1, 3, 6, 5))
    assert len(pickle.dumps(net)) == fresh
    assert copy.deepcopy(net)._inference is None
    assert net._inference is not None


# The gauge Ψ = I.


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("image", [(), (4, 6), (3, 5)], ids=["dense", "4x6", "3x5"])
def test_balance_is_the_gauge_of_the_dae_and_keeps_function_and_constant(image, epsilon):
    lben = random_lben(activation="relu", epsilon=epsilon, image=image)
    if epsilon:
        with torch.no_grad():
            lben.log_psi.fill_(0.7)
    x = torch.randn(4, 3, *image)
    with torch.no_grad():
        lben.V.view(-1)[::3] = 0.0
        before = lben.dae()
        y = lben(x)
        assert lben.balance()
        assert torch.equal(lben.Psi, torch.ones(6))
        assert bool((lben.V.flatten()[::3] == 0).all())
        assert float((lben(x) - y).abs().max()) <= 1e-12 * float(y.abs().max())
    D = before.Lambda.sqrt()
    W = D.unsqueeze(-1) * before.W / D  # by hand, from equation (2) in the old gauge
    assert float((lben.W.detach() - W).abs().max()) <= 1e-12 * float(W.abs().max())
    assert lben.lipschitz == 1.7
    assert lben.epsilon == pytest.approx(epsilon * np.exp(0.7), rel=1e-14)
    again = {name: value.clone() for name, value in lben.named_parameters()}
    assert lben.balance()
    assert all(torch.equal(again[name], value) for name, value in lben.named_parameters())


def test_outputs_are_contiguous():
    for image in ((), (4, 6)):
        lben, x = random_lben(image=image), torch.randn(5, 3, *image)
        assert lben(x).is_contiguous()
        with torch.no_grad():
            assert lben(x).is_contiguous()


@pytest.mark.parametrize(
    "options", [{"activation": "tanh"}, {"activation": "relu", "epsilon": 0.2}], ids=["tanh", "epsilon"]
)
def test_what_cannot_be_balanced_is_left_alone(options):
    """σ that is not homogeneous; and ε > 0 with a Ψ that is no multiple of I."""
    lben = random_lben(**options)
    before = {name: value.clone() for name, value in lben.named_parameters()}
    assert not lben.scalable
    assert not lben.balance()
    assert all(torch.equal(before[name], value) for name, value in lben.named_parameters())


def test_balance_keeps_the_precision_of_the_module():
    lben = random_lben(activation="relu", epsilon=0.0).float()
    x = torch.randn(4, 3, dtype=torch.float32)
    with torch.no_grad():
        y = lben(x)
        assert lben.balance()
        assert lben.V.dtype == torch.float32
        assert float((lben(x) - y).abs().max()) <= 1e-5 * float(y.abs().max())
