"""What a solve reports, and the implicit gradient against finite differences and the dense formula.

On images against finite differences in pixels and kernels, an unrolled iteration, and the dense circulant form.
"""

import importlib
import math

import numpy as np
import pytest
import torch
from lipconvert_plugins.sll import SLLConv2d
from plain import circulant, correlate, matrices
from torch import Tensor, nn

import lipconvert as lc
from lipconvert import (
    DAE,
    LBEN,
    Activations,
    Grid,
    InvalidParameterError,
    LipconvertError,
    NotConvergedError,
    ShapeError,
    SolverOptions,
    StateMap,
    Status,
    check,
    equilibrium,
    solve,
)
from lipconvert.equilibria.equilibrium import evaluate

N = 6
ITERATIVE = ("sweep", "peaceman_rachford", "forward_backward")


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def contraction(norm: float = 0.6) -> Tensor:
    W = torch.randn(N, N, generator=torch.Generator().manual_seed(2))
    return W * (norm / torch.linalg.matrix_norm(W, 2))


def near_triangular() -> Tensor:
    W = contraction()
    return W.tril(-1) + 0.05 * W


def test_options_are_checked():
    for bad in ({"method": "anderson"}, {"tolerance": 0.0}, {"tolerance": math.nan}, {"max_steps": 0}):
        with pytest.raises(InvalidParameterError):
            SolverOptions(**bad)


def test_u_of_a_wrong_shape_is_named():
    for u in (torch.zeros(N), torch.zeros(2, N + 1), torch.zeros(1, 2, N)):
        with pytest.raises(ShapeError):
            solve(StateMap(contraction()), Activations("relu", N), u)


@pytest.mark.parametrize("method", ITERATIVE)
def test_not_converged_carries_its_numbers(method):
    W = near_triangular()
    map, sigma, u = StateMap(W, (1,) * N, torch.ones(N)), Activations("tanh", N), torch.randn(5, N)
    u[3] = 0.0  # this one is solved by z = 0
    with pytest.raises(NotConvergedError) as caught:
        solve(map, sigma, u, SolverOptions(method, max_steps=2))
    error = caught.value
    assert isinstance(error, LipconvertError)
    assert (error.method, error.unconverged, error.steps, error.tolerance) == (method, 4, 2, 1e-13)
    z = error.solution.value.numpy()
    residual = np.linalg.norm(z - np.tanh(z @ W.numpy().T + u.numpy()), axis=1)
    scale = sum(np.linalg.norm(term, axis=1) for term in (z, u.numpy(), z @ W.numpy().T))
    assert error.worst_residual == pytest.approx(
        max(r / s for r, s in zip(residual, scale, strict=True) if s), rel=1e-6
    )
    assert f"{error.worst_residual:.3e}" in str(error)

    kept = solve(map, sigma, u, SolverOptions(method, max_steps=2, throw=False))
    assert torch.equal(kept.value, error.solution.value)
    expected = [Status.MAX_STEPS] * 3 + [Status.CONVERGED] + [Status.MAX_STEPS]
    assert kept.status.tolist() == expected
    assert kept.converged.tolist() == [s == Status.CONVERGED for s in expected]
    assert kept.steps.tolist() == [2, 2, 2, 1, 2]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize("method", ["auto", *ITERATIVE])
def test_converged_means_the_recomputed_residual_meets_the_tolerance(method, tolerance):
    map, sigma, u = StateMap(contraction(), Lambda=torch.ones(N)), Activations("tanh", N), torch.randn(20, N)
    solution = solve(map, sigma, u, SolverOptions(method, tolerance))
    z = solution.value.numpy()
    residual = np.linalg.norm(z - np.tanh(z @ map.W.numpy().T + u.numpy()), axis=1)
    scale = sum(np.linalg.norm(term, axis=1) for term in (z, u.numpy(), z @ map.W.numpy().T))
    assert np.all(residual <= tolerance * scale)
    np.testing.assert_allclose(solution.residual.numpy(), residual, atol=1e-15)
    np.testing.assert_allclose(solution.relative_residual.numpy(), residual / scale, atol=1e-15)


def test_divergence_is_reported():
    map, sigma = StateMap(torch.tensor([[3.0]])), Activations("identity", 1)
    options = SolverOptions("sweep", throw=False, max_steps=2000)
    solution = solve(map, sigma, torch.ones(1, 1), options)  # z <- 3z + 1
    assert solution.status.tolist() == [Status.DIVERGED]
    assert not math.isfinite(float(solution.residual))
    assert int(solution.steps) < 2000  # stopped when it overflowed
    with pytest.raises(NotConvergedError):
        solve(map, sigma, torch.ones(1, 1), SolverOptions("sweep", max_steps=2000))


@pytest.mark.parametrize("method", ["auto", "forward_substitution", *ITERATIVE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_reported(method, bad):
    W = torch.zeros(N, N) if method == "forward_substitution" else contraction()
    u = torch.zeros(2, N)
    u[1, 0] = bad
    map = StateMap(W, Lambda=torch.ones(N))
    solution = solve(map, Activations("relu", N), u, SolverOptions(method, throw=False))
    assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    assert int(solution.steps.max()) < 10  # given up at once


@pytest.mark.parametrize("u", [1.0, -1.0])
@pytest.mark.parametrize("method", ["auto", "sweep", "forward_substitution"])
def test_an_ill_posed_map_is_not_solved_quietly(method, u):
    # W = 1: z = relu(z + 1) has no solution; z = relu(z - 1) has z = 0, which is the only answer that may be given.
    map = StateMap(torch.ones(1, 1), Lambda=torch.ones(1))
    solution = solve(map, Activations("relu", 1), torch.tensor([[u]]), SolverOptions(method, throw=False))
    if bool(solution.converged):
        assert u < 0
        assert float(solution.value) == 0.0
    else:
        assert solution.status.tolist() == [Status.MAX_STEPS]
    conditions = check(DAE(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1)))
    assert not conditions.well_posed
    assert conditions.condition_10


def test_a_singular_resolvent_is_a_named_failure():
    # W = 2 makes I + (I − W) = 0.
    solution = solve(
        StateMap(2.0 * torch.ones(1, 1)), Activations("relu", 1), torch.ones(1, 1), SolverOptions(throw=False)
    )
    assert not bool(solution.converged)


def test_no_samples():
    solution = solve(StateMap(contraction()), Activations("relu", N), torch.zeros(0, N))
    assert solution.value.shape == (0, N)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(
    ("method", "activation"),
    [
        *[(method, activation) for method in ("auto", "sweep") for activation in ("tanh", "softplus(2.0)", "relu")],
        ("peaceman_rachford", "tanh"),
        ("peaceman_rachford", "leaky_relu(0.1)"),
        ("forward_backward", "relu"),
    ],
)
def test_gradcheck_in_W_and_u(method, activation):
    W = near_triangular().requires_grad_(True)
    u = (2.0 * torch.randn(2, N)).requires_grad_(True)
    sigma = Activations(activation, N)
    with torch.no_grad():  # kinks are further away than the difference step
        z = equilibrium(W, u, sigma)
        assert float((z @ W.mT + u).abs().min()) > 1e-3

    def function(W: Tensor, u: Tensor) -> Tensor:
        return equilibrium(W, u, sigma, StateMap(W, (2, 2, 2), torch.ones(N)), SolverOptions(method))

    # Solved to 1e-13, differenced by 1e-6: the quotient is good to 1e-7.
    assert torch.autograd.gradcheck(function, (W, u), atol=1e-6, rtol=1e-5)


def test_gradcheck_of_forward_substitution():
    free = torch.randn(N, N).requires_grad_(True)
    u = torch.randn(2, N).requires_grad_(True)
    mask = torch.ones(N, N).tril(-1)

    def function(free: Tensor, u: Tensor) -> Tensor:
        return equilibrium(free * mask, u, Activations("tanh", N), None, SolverOptions("forward_substitution"))

    assert torch.autograd.gradcheck(function, (free, u), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["auto", *ITERATIVE])
def test_gradient_is_the_implicit_function_theorem_written_out(method):
    W, u, g = contraction(), torch.randn(3, N), torch.randn(3, N)
    W.requires_grad_(True)
    u.requires_grad_(True)
    sigma = Activations.of([("identity", 2), ("relu", 4)])
    z = equilibrium(W, u, sigma, StateMap(W, Lambda=torch.ones(N)), SolverOptions(method))
    dW, du = torch.autograd.grad((z * g).sum(), (W, u))
    Wn, zn = W.detach().numpy(), z.detach().numpy()
    expected_W = np.zeros((N, N))
    for b in range(3):
        v = Wn @ zn[b] + u.detach().numpy()[b]
        D = np.diag(np.where((np.arange(N) < 2) | (v > 0), 1.0, 0.0))
        p = np.linalg.solve((np.eye(N) - D @ Wn).T, g.numpy()[b])  # (I − DW)⁻ᵀ g, then D
        np.testing.assert_allclose(du[b].numpy(), D @ p, atol=1e-11)
        expected_W += np.outer(D @ p, zn[b])
    np.testing.assert_allclose(dW.numpy(), expected_W, atol=1e-11)


def test_gradient_equals_that_of_an_unrolled_iteration():
    W, u = contraction(0.5).requires_grad_(True), torch.randn(4, N).requires_grad_(True)
    z = equilibrium(W, u, Activations("tanh", N))
    unrolled = torch.zeros(4, N)
    for _ in range(80):  # 0.5^80 is below round-off
        unrolled = torch.tanh(unrolled @ W.mT + u)
    for ours, theirs in zip(
        torch.autograd.grad(z.square().sum(), (W, u)), torch.autograd.grad(unrolled.square().sum(), (W, u)), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-11)


@pytest.mark.parametrize("method", ITERATIVE)
def test_memory_does_not_depend_on_the_number_of_steps(method):
    u = torch.randn(7, N).requires_grad_(True)
    steps, kept = [], []
    for norm in (0.2, 0.95):
        W = contraction(norm).requires_grad_(True)
        saved: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, saved: list[tuple[int, ...]] = saved) -> Tensor:
            saved.append(tuple(tensor.shape))
            return tensor

        map, options = StateMap(W, Lambda=torch.ones(N)), SolverOptions(method, max_steps=50_000)
        steps.append(int(solve(map, Activations("tanh", N), u, options).steps.max()))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            equilibrium(W, u, Activations("tanh", N), map, options)
        kept.append(saved)
    assert steps[1] > 2 * steps[0]
    assert kept[0] == kept[1] == [(7, N), (7, N)]  # z and u


def test_a_second_derivative_raises():
    W, u = contraction().requires_grad_(True), torch.randn(2, N).requires_grad_(True)
    z = equilibrium(W, u, Activations("tanh", N))
    (du,) = torch.autograd.grad(z.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        du.square().sum().backward()


def test_a_second_derivative_raises_for_a_linear_readout_too():
    W, u = contraction(), torch.randn(2, N).requires_grad_(True)
    z = equilibrium(W, u, Activations("tanh", N))
    (du,) = torch.autograd.grad(z.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError):  # the true second derivative is not zero
        torch.autograd.grad(du.square().sum() + 0.0 * u.sum(), u)


def test_an_adjoint_that_does_not_converge_raises():
    # The forward solve of a dead sample takes a step; its neighbour's adjoint needs more than the two allowed.
    W = contraction(0.9).requires_grad_(True)
    options = SolverOptions("peaceman_rachford", tolerance=1e-13, max_steps=2)
    u = torch.zeros(1, N).requires_grad_(True)
    z = equilibrium(W, u, Activations("tanh", N), None, options)  # z = 0 at once, slope 1 everywhere
    with pytest.raises(NotConvergedError):
        z.sum().backward()


def test_frozen_weights_still_give_input_gradients():
    W, u = contraction(), torch.randn(2, N).requires_grad_(True)
    (du,) = torch.autograd.grad(equilibrium(W, u, Activations("tanh", N)).sum(), u)
    assert du.shape == u.shape
    with torch.no_grad():
        assert not equilibrium(W, u, Activations("tanh", N)).requires_grad


def test_a_strongly_monotone_stiff_model_is_solved():
    # μ is above 0.1; only the skew part of I − W is large (about 50), for which the fast step is too long.
    lben = LBEN(5, 8, 3).requires_grad_(False)
    lben.S.mul_(30.0)
    assert check(lben.dae()).mu > 0.1
    assert bool(lben.solve(torch.randn(64, 5)).converged.all())


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3), (3, 4)]
C = 3  # channels


def contracting_kernels(image: tuple[int, int], norm: float = 0.6) -> Tensor:
    """Kernels of a W of a norm, nearly triangular in the channels, not symmetric in anything."""
    K = torch.randn(C, C, *image, generator=torch.Generator().manual_seed(4))
    K = K * (torch.ones(C, C).tril(-1) + 0.1)[:, :, None, None]
    return K * (norm / float(np.linalg.norm(circulant(K).numpy(), 2)))


def states(K: Tensor, u: Tensor, sigma: Activations, options: SolverOptions) -> Tensor:
    """z on pixels, from kernels and u on pixels."""
    grid = Grid(tuple(K.shape[2:]))
    W = grid.matrices(K)
    map = StateMap(W, (1, 1, 1), torch.ones(C), grid=grid)
    return grid.values(equilibrium(W, grid.coordinates(u), sigma, map, options))


@pytest.mark.parametrize("image", [(1, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize(
    ("method", "runs"),
    [
        ("auto", [("tanh", 3)]),
        ("sweep", [("relu", 1), ("identity", 1), ("softplus(2.0)", 1)]),
        ("peaceman_rachford", [("tanh", 1), ("leaky_relu(0.1)", 2)]),
        ("forward_backward", [("relu", 3)]),
    ],
)
def test_gradcheck_in_kernels_and_pixels(method, runs, image):
    """Odd and even widths and heights: a wrong weight of a column of the half spectrum would be a factor of two."""
    K, u = contracting_kernels(image).requires_grad_(True), (2.0 * torch.randn(2, C, *image)).requires_grad_(True)
    sigma, options = Activations.of(runs), SolverOptions(method)
    with torch.no_grad():
        v = correlate(states(K, u, sigma, options), K) + u
        u[v.abs() < 1e-3] += 0.1  # kinks are further away than the difference step
        assert float((correlate(states(K, u, sigma, options), K) + u).abs().min()) > 1e-3

    def function(K: Tensor, u: Tensor) -> Tensor:
        return states(K, u, sigma, options)

    # In random directions: the whole Jacobians have up to 72 × 180 entries.
    whole = method == "auto" and image == (1, 3)
    assert torch.autograd.gradcheck(function, (K, u), atol=1e-6, rtol=1e-5, fast_mode=not whole)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("method", ["auto", *ITERATIVE])
def test_gradient_on_images_equals_that_of_an_unrolled_iteration(method, image):
    K, u = contracting_kernels(image, 0.4).requires_grad_(True), torch.randn(4, C, *image).requires_grad_(True)
    sigma, g = Activations.of([("tanh", 1), ("identity", 1), ("tanh", 1)]), torch.randn(4, C, *image)
    unrolled = torch.zeros(4, C, *image)
    for _ in range(45):  # 0.4^45 is below round-off
        v = correlate(unrolled, K) + u
        unrolled = torch.stack([v[:, 0].tanh(), v[:, 1], v[:, 2].tanh()], 1)
    z = states(K, u, sigma, SolverOptions(method))
    np.testing.assert_allclose(z.detach().numpy(), unrolled.detach().numpy(), atol=1e-12)
    expected = torch.autograd.grad((unrolled * g).sum(), (K, u))
    for ours, theirs in zip(torch.autograd.grad((z * g).sum(), (K, u)), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-11)


@pytest.mark.parametrize("image", IMAGES)
def test_gradient_on_images_is_the_implicit_function_theorem_of_the_dense_form(image):
    """dℓ/du = (I − DW)⁻ᵀ-solve, then D; dℓ/dK[a] sums dℓ/dW over the pixels that a tap connects."""
    K, u, g = contracting_kernels(image), torch.randn(2, C, *image), torch.randn(2, C, *image)
    K.requires_grad_(True)
    u.requires_grad_(True)
    z = states(K, u, Activations("relu", C), SolverOptions())
    dK, du = torch.autograd.grad((z * g).sum(), (K, u))
    W, n = circulant(K).detach(), C * image[0] * image[1]
    dW = torch.zeros(n, n)
    for zb, ub, gb, dub in zip(*(t.detach().flatten(1) for t in (z, u, g, du)), strict=True):
        D = torch.diag((W @ zb + ub > 0).double())
        p = D @ torch.linalg.solve((torch.eye(n) - D @ W).mT, gb)
        np.testing.assert_allclose(dub.numpy(), p.numpy(), atol=1e-11)
        dW += torch.outer(p, zb)
    (expected,) = torch.autograd.grad((circulant(K) * dW).sum(), K)
    np.testing.assert_allclose(dK.numpy(), expected.numpy(), atol=1e-11)


def test_frozen_kernels_still_give_image_gradients():
    K, u = contracting_kernels((2, 3)), torch.randn(2, C, 2, 3).requires_grad_(True)
    (du,) = torch.autograd.grad(states(K, u, Activations("tanh", C), SolverOptions()).sum(), u)
    assert du.shape == u.shape
    with torch.no_grad():
        assert not states(K, u, Activations("tanh", C), SolverOptions()).requires_grad


def test_a_second_derivative_on_images_raises():
    K, u = contracting_kernels((2, 3)).requires_grad_(True), torch.randn(2, C, 2, 3).requires_grad_(True)
    z = states(K, u, Activations("tanh", C), SolverOptions())
    (dK,) = torch.autograd.grad(z.square().sum(), K, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dK.square().sum().backward()


def test_u_that_does_not_fit_a_grid_is_named():
    grid = Grid((2, 3))
    map, sigma = StateMap(grid.matrices(contracting_kernels((2, 3))), grid=grid), Activations("relu", C)
    good = grid.coordinates(torch.randn(2, C, 2, 3))
    assert solve(map, sigma, good).value.shape == good.shape
    pixels = torch.randn(2, C, 2, 3)
    for u in (pixels, pixels.flatten(2), good.real, good[:, :2], good[:, :, :3], good[0], good.flatten(1)):
        with pytest.raises(ShapeError):
            solve(map, sigma, u)
    with pytest.raises(ShapeError):  # and images do not fit a dense map
        solve(StateMap(torch.zeros(C, C)), sigma, torch.zeros(2, C, dtype=torch.complex128))


@pytest.mark.parametrize("method", ["auto", "forward_substitution", *ITERATIVE])
def test_no_images(method):
    grid = Grid((2, 3))
    K = contracting_kernels((2, 3)) * torch.ones(C, C).tril(-1)[:, :, None, None]
    map = StateMap(grid.matrices(K), Lambda=torch.ones(C), grid=grid)
    u = grid.coordinates(torch.zeros(0, C, 2, 3))
    assert solve(map, Activations("relu", C), u, SolverOptions(method)).value.shape == (0, C, 4)


def test_images_that_are_not_finite_are_reported():
    grid = Grid((2, 2))
    map = StateMap(grid.matrices(contracting_kernels((2, 2))), Lambda=torch.ones(C), grid=grid)
    u = torch.zeros(2, C, 2, 2)
    u[1, 0, 1, 1] = math.nan
    solution = solve(map, Activations("relu", C), grid.coordinates(u), SolverOptions(throw=False))
    assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    with pytest.raises(LipconvertError):
        solve(map, Activations("relu", C), grid.coordinates(u))


@pytest.mark.parametrize("image", IMAGES)
def test_evaluate_on_images(image):
    """y and its derivative in x, against plain convolutions iterated to the equilibrium."""
    grid, K = Grid(image), contracting_kernels(image, 0.4)
    U, G = torch.randn(C, 2, *image), torch.randn(4, C, *image)
    b_z, b_y, x = torch.randn(C), torch.randn(4), torch.randn(3, 2, *image).requires_grad_(True)
    sigma = Activations.of([("tanh", 2), ("identity", 1)])
    dae = DAE(matrices(K), matrices(U), matrices(G), torch.ones(C), b_z, b_y, sigma, grid=grid)
    y, z = evaluate(dae, x), torch.zeros(3, C, *image)
    for _ in range(45):
        v = correlate(z, K) + correlate(x, U) + b_z[:, None, None]
        z = torch.cat([v[:, :2].tanh(), v[:, 2:]], 1)
    expected = correlate(z, G) + b_y[:, None, None]
    np.testing.assert_allclose(y.detach().numpy(), expected.detach().numpy(), atol=1e-11)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-10, atol=1e-10)


# ---- memory ---------------------------------------------------------------------------------------------------------


def kept_for_backward(net: nn.Module, x: Tensor) -> int:
    """Bytes of distinct tensors that autograd keeps of a forward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(kept.values())


@pytest.mark.parametrize("image", [(), (6, 5)])
def test_memory_of_gradients_does_not_depend_on_the_number_of_steps(image: tuple[int, ...]) -> None:
    net = lc.LBEN(2, 3, 2, image=image)
    x = torch.randn(50, 2, *image)
    bytes_kept, steps = [], []
    for tolerance in (1e-2, 1e-13):
        net.options = lc.SolverOptions(tolerance=tolerance)
        bytes_kept.append(kept_for_backward(net, x))
        steps.append(int(net.solve(x).steps.max()))
    assert steps[1] > 3 * steps[0]
    assert bytes_kept[1] == bytes_kept[0]
    # z and u in coordinates, the input and the output, and what is small beside them
    state = 50 * net.grid.pixels * 8 * (1.0 if not image else 6 * 3 * 2 / 30)
    assert bytes_kept[0] <= (2 * 3 + 2 + 2 + 3) * state + 100_000


def test_a_forward_pass_without_gradients_holds_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward substitution writes the states over the drive."""
    net = lc.LBEN.from_dae(lc.densify(lc.to_dae(SLLConv2d(2, 3), (2, 3, 3))))
    seen = []
    original = lc.equilibrium.__globals__["forward_substitution"]

    def spy(map, sigma, u, out=None):  # type: ignore[no-untyped-def]
        z = original(map, sigma, u, out)
        seen.append(z.data_ptr() == u.data_ptr())
        return z

    monkeypatch.setitem(lc.equilibrium.__globals__, "forward_substitution", spy)
    with torch.no_grad():
        net(torch.randn(4, 18))
    assert seen == [True]


@pytest.mark.parametrize("method", ["auto", "sweep", "peaceman_rachford", "forward_backward"])
@pytest.mark.parametrize("image", [(), (4, 5)])
def test_samples_are_solved_in_portions_that_fit_a_cache(method, image, monkeypatch):
    """Outputs, gradients and reports are those of all samples at once; a forward substitution may overwrite what it read."""
    engine = importlib.import_module("lipconvert.equilibria.equilibrium")
    W = 0.3 * contraction()
    if image:
        W = lc.Grid(image).matrices(0.02 * torch.randn(N, N, *image)) + W
    map = StateMap(W.to(torch.complex128) if image else W, Lambda=torch.ones(N), grid=lc.Grid(image))
    sigma, options = Activations.of([("relu", N)]), SolverOptions(method)
    x = map.grid.coordinates(torch.randn(7, N, *image))

    def solved(portion: int) -> tuple[lc.Solution, Tensor, Tensor]:
        monkeypatch.setattr(engine, "PORTION", portion)
        leaf, u = map.W.clone().requires_grad_(), x.clone().requires_grad_()
        (map.grid.values(equilibrium(leaf, u, sigma, map, options)) ** 3).sum().backward()
        return solve(map, sigma, x, options), leaf.grad, u.grad

    together, dW, du = solved(2**40)
    for portion in (1, 2 * x[0].nbytes, 3 * x[0].nbytes + 1):
        parts, dW_parts, du_parts = solved(portion)
        for name in ("value", "residual", "scale"):
            torch.testing.assert_close(getattr(parts, name), getattr(together, name), rtol=0.0, atol=1e-11)
        assert torch.equal(parts.status, together.status)
        assert parts.steps.shape == (7,)
        assert parts.method == together.method
        torch.testing.assert_close(dW_parts, dW, rtol=0.0, atol=1e-10)
        torch.testing.assert_close(du_parts, du, rtol=0.0, atol=1e-10)


def test_of_several_portions_the_method_is_that_of_the_longest_way(monkeypatch):
    lben = LBEN(5, 8, 3).requires_grad_(False)
    lben.S.mul_(30.0)  # the fast step is too long: some samples are left to another method
    x = torch.randn(64, 5)
    x[:8] = 0.0  # the equilibrium of no input is found at once
    together = lben.solve(x)
    monkeypatch.setattr(importlib.import_module("lipconvert.equilibria.equilibrium"), "PORTION", 8 * 8 * 8)
    parts = lben.solve(x)
    assert "," in parts.method
    assert parts.method == together.method
    assert lben.solve(x[:8]).method != parts.method
