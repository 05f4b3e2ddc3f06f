"""Every method against semismooth Newton in numpy; which method ran; samples that do not see each other.

On images Newton goes by the dense circulant matrix of the same W.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from plain import circulant, matrices
from torch import Tensor

from lipconvert import Activations, Grid, InvalidParameterError, SolverOptions, StateMap, Status, solve
from lipconvert.equilibria.solvers import ForwardBackward, PeacemanRachford, Sweep, forward_substitution

N = 12
ITERATIVE = ("sweep", "peaceman_rachford", "forward_backward")


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


# name -> (runs for lipconvert, [(size, value, slope)] in numpy)
def _sigmoid(v):
    return 0.5 * (1.0 + np.tanh(0.5 * v))


RULES = {
    "relu": (lambda v: np.maximum(v, 0.0), lambda v: (v > 0) * 1.0),
    "tanh": (np.tanh, lambda v: 1.0 - np.tanh(v) ** 2),
    "leaky_relu(0.1)": (lambda v: np.where(v > 0, v, 0.1 * v), lambda v: np.where(v > 0, 1.0, 0.1)),
    "softplus(2.0)": (lambda v: np.logaddexp(2.0 * v, 0.0) / 2.0, lambda v: _sigmoid(2.0 * v)),
    "identity": (lambda v: v, np.ones_like),
}
SIGMAS = {
    "relu": [("relu", N)],
    "tanh": [("tanh", N)],
    "leaky": [("leaky_relu(0.1)", N)],
    "softplus": [("softplus(2.0)", N)],
    "mixed": [("identity", 4), ("relu", 3), ("identity", 1), ("tanh", 4)],
}


def rule(runs, v: np.ndarray, which: int) -> np.ndarray:
    """σ(v) (which = 0) or σ′(v) (which = 1)."""
    parts, start = [], 0
    for name, size in runs:
        parts.append(RULES[name][which](v[start : start + size]))
        start += size
    return np.concatenate(parts)


def reference(W: np.ndarray, u: np.ndarray, runs) -> np.ndarray:
    """z = σ(Wz + u) of one sample by Newton's method along τW, τ = 0..1 (I − τW stays monotone)."""
    z = rule(runs, u, 0)
    for tau in np.linspace(0.0, 1.0, 21):
        for _ in range(60):
            v = tau * W @ z + u
            residual = z - rule(runs, v, 0)
            if np.linalg.norm(residual) <= 1e-14 * (1.0 + np.linalg.norm(z)):
                break
            z = z - np.linalg.solve(np.eye(len(z)) - rule(runs, v, 1)[:, None] * tau * W, residual)
    assert np.linalg.norm(z - rule(runs, W @ z + u, 0)) <= 1e-13 * (1.0 + np.linalg.norm(z) + np.linalg.norm(u))
    return z


def mapping(kind: str) -> StateMap:
    """W with a diagonal metric in which I − W is monotone with μ of at least 0.2."""
    g = torch.Generator().manual_seed(11)
    A, B, M = (0.4 * torch.randn(N, N, generator=g) / N**0.5 for _ in range(3))
    one = torch.ones(N)
    if kind == "mondeq":
        return StateMap(torch.eye(N) - (A.mT @ A + B.mT - B + 0.8 * torch.eye(N)), Lambda=one)
    if kind == "lben":  # Ψ far from I
        psi = torch.exp(0.4 * torch.randn(N, generator=g))
        inner = A.mT @ A + B - B.mT + M @ M.mT + 0.7 * torch.eye(N)
        return StateMap(torch.eye(N) - psi[:, None] * inner, Lambda=psi.reciprocal())
    index = torch.arange(N) // 3
    T = A * (index[:, None] > index[None, :])
    T = T * (0.5 / torch.linalg.matrix_norm(T, 2))
    if kind == "triangular":
        return StateMap(T, Lambda=one)
    noise = M / torch.linalg.matrix_norm(M, 2)
    if kind == "triangular to round-off":
        return StateMap(T + 1e-15 * noise, (3, 3, 3, 3), one)
    assert kind == "perturbed triangular"
    return StateMap(T + 0.05 * noise, (3, 3, 3, 3), one)


KINDS = {
    "mondeq": "peaceman_rachford",
    "lben": "peaceman_rachford",
    "triangular": "forward_substitution",
    "triangular to round-off": "forward_substitution",
    "perturbed triangular": "sweep",
}


def methods(kind: str) -> list[str]:
    """The methods that must solve this kind."""
    close = [] if kind in ("mondeq", "lben") else ["sweep"]
    exact = ["forward_substitution"] if KINDS[kind] == "forward_substitution" else []
    return ["auto", "peaceman_rachford", "forward_backward", *close, *exact]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_reach_the_newton_solution(kind, sigma):
    map, runs = mapping(kind), SIGMAS[sigma]
    u = torch.randn(4, N) * torch.tensor([[0.1], [1.0], [3.0], [10.0]])
    expected = np.stack([reference(map.W.numpy(), row, runs) for row in u.numpy()])
    for method in methods(kind):
        solution = solve(map, Activations.of(runs), u, SolverOptions(method))
        assert solution.method == (KINDS[kind] if method == "auto" else method)
        # residual <= 1e-13 (|z| + |u|) <= 1e-11, over mu >= 0.2 in a metric of condition number below 10
        np.testing.assert_allclose(solution.value.numpy(), expected, atol=1e-10, err_msg=method)
        fresh = [
            np.linalg.norm(z - rule(runs, map.W.numpy() @ z + v, 0))
            for z, v in zip(solution.value.numpy(), u.numpy(), strict=True)
        ]
        # Both evaluations carry round-off of about N units.
        assert np.all(np.array(fresh) <= solution.residual.numpy() + 1e-15 * (1.0 + solution.scale.numpy()))
        z = solution.value.numpy()
        terms = [z] if solution.method == "forward_substitution" else [z, u.numpy(), z @ map.W.numpy().T]
        expected_scale = sum(np.linalg.norm(term, axis=1) for term in terms)
        np.testing.assert_allclose(solution.scale.numpy(), expected_scale, rtol=1e-14)
        assert bool((solution.residual <= 1e-13 * solution.scale).all())
        assert solution.status.tolist() == [Status.CONVERGED] * 4
        if method == "forward_substitution":
            assert solution.steps.tolist() == [1] * 4


class Counting(StateMap):
    """Counts what a solver asks of W."""

    calls: dict[str, int]

    def _count(self, name: str) -> None:
        self.calls = getattr(self, "calls", {})
        self.calls[name] = self.calls.get(name, 0) + 1

    def apply(self, z: Tensor) -> Tensor:
        self._count("apply")
        return super().apply(z)

    def rows(self, block: slice, z: Tensor, u: Tensor) -> Tensor:
        self._count("rows")
        return super().rows(block, z, u)

    def rows_below(self, block: slice, z: Tensor, u: Tensor) -> Tensor:
        self._count("rows_below")
        return super().rows_below(block, z, u)

    def resolvent(self, v: Tensor, alpha: float, onto: Tensor | None = None) -> Tensor:
        self._count("resolvent")
        return super().resolvent(v, alpha, onto)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_path_it_names(kind):
    plain = mapping(kind)
    map = Counting(plain.W, plain.blocks, plain.Lambda)
    solution = solve(map, Activations("relu", N), torch.randn(3, N))
    assert solution.method == KINDS[kind]
    if kind.startswith("triangular"):
        assert map.calls == {"rows_below": 4}  # one pass over four blocks, and nothing else
    elif kind == "perturbed triangular":
        assert "resolvent" not in map.calls
        assert map.calls["rows"] == 4 * int(solution.steps.max())
    else:
        assert set(map.calls) == {"resolvent", "apply"}
        assert map.calls == {"resolvent": 1 + int(solution.steps.max()), "apply": 1}  # once of u


def test_auto_hands_what_sweeps_leave_to_peaceman_rachford():
    # |W - T| = 0.45 is tried by sweeps, but the round trip through block 1 has gain 0.45 * 4 > 1: they diverge.
    W = torch.tensor([[0.0, -0.45], [4.0, 0.0]])
    map = StateMap(W, (1, 1), torch.tensor([4.0, 0.45]))  # skew in this metric: mu = 1
    u = torch.tensor([[1.0, 1.0], [-5.0, -5.0]])
    runs = [("identity", 2)]
    expected = np.linalg.solve(np.eye(2) - W.numpy(), u.numpy().T).T
    first = solve(map, Activations.of(runs), u, SolverOptions("sweep", throw=False, max_steps=100))
    assert not bool(first.converged.any())
    solution = solve(map, Activations.of(runs), u)
    assert solution.method == "sweep, peaceman_rachford"
    assert bool((solution.steps > 100).all())
    np.testing.assert_allclose(solution.value.numpy(), expected, atol=1e-12)


def test_mixed_samples_only_the_hard_ones_change_method():
    # With ReLU and u very negative every state is 0 at once; the others take the second method.
    map = StateMap(torch.tensor([[0.0, -0.45], [4.0, 0.0]]), (1, 1), torch.tensor([4.0, 0.45]))
    sigma = Activations.of([("leaky_relu(0.9)", 2)])
    easy, hard = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
    both = solve(map, sigma, torch.cat([easy, hard]))
    assert both.method == "sweep, peaceman_rachford"
    assert int(both.steps[0]) == 1
    assert int(both.steps[1]) > 100
    alone = solve(map, sigma, easy)
    assert alone.method == "sweep"
    assert torch.equal(alone.value[0], both.value[0])


def test_a_general_W_is_refused_by_forward_substitution_with_a_true_residual():
    map = mapping("lben")
    map = StateMap(map.W, (3, 3, 3, 3), map.Lambda)
    u = torch.randn(5, N)
    solution = solve(map, Activations("tanh", N), u, SolverOptions("forward_substitution", throw=False))
    z = solution.value.numpy()
    fresh = np.linalg.norm(z - np.tanh(z @ map.W.numpy().T + u.numpy()), axis=1)
    assert solution.status.tolist() == [Status.MAX_STEPS] * 5
    assert np.all(fresh <= solution.residual.numpy())
    assert fresh.max() > 1e-3


@pytest.mark.parametrize("iteration", [Sweep(), PeacemanRachford(), PeacemanRachford(0.3, 0.5), ForwardBackward()])
@pytest.mark.parametrize("kind", ["lben", "perturbed triangular"])
def test_the_residual_a_step_returns_bounds_the_true_one(iteration, kind):
    map, runs = mapping(kind), SIGMAS["mixed"]
    sigma, u = Activations.of(runs), torch.randn(6, N)
    state = iteration.start(map, u, torch.randn(6, N))
    for _ in range(8):
        state, z, residual = iteration.step(map, sigma, u, state)
        for row, drive, claimed in zip(z.numpy(), u.numpy(), residual.numpy(), strict=True):
            fresh = np.linalg.norm(row - rule(runs, map.W.numpy() @ row + drive, 0))
            assert fresh <= claimed + 1e-13 * (1.0 + np.linalg.norm(row))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("relaxation", [0.5, 1.0])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_peaceman_rachford_has_the_equilibrium_as_fixed_point_for_every_alpha(alpha, relaxation, sigma):
    map, runs = mapping("lben"), SIGMAS[sigma]
    u = torch.randn(2, N)
    iteration = PeacemanRachford(alpha, relaxation)
    state = iteration.start(map, u, torch.zeros(2, N))
    z = residual = torch.zeros(2, N)
    for _ in range(3000):
        state, z, residual = iteration.step(map, Activations.of(runs), u, state)
        if float(residual.max()) < 1e-13:
            break
    expected = np.stack([reference(map.W.numpy(), row, runs) for row in u.numpy()])
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "alpha"), [("peaceman_rachford", 0.05), ("peaceman_rachford", 3.0), ("forward_backward", 0.02)]
)
def test_a_step_can_be_prescribed(method, alpha):
    W = torch.randn(N, N)
    W = W - W.T - 0.5 * torch.eye(N)
    map, u = StateMap(W, Lambda=torch.ones(N)), torch.randn(5, N)
    sigma = Activations("relu", N)
    own, given = (solve(map, sigma, u, SolverOptions(method, alpha=step, max_steps=20000)) for step in (None, alpha))
    assert float((own.value - given.value).abs().max()) < 1e-11
    assert bool((own.steps != given.steps).any())


@pytest.mark.parametrize(
    ("method", "alpha", "reason"),
    [
        ("auto", 1.0, "no step of its own"),
        ("sweep", 1.0, "no step"),
        ("peaceman_rachford", 0.0, "positive"),
        ("forward_backward", -1.0, "positive"),
    ],
)
def test_steps_that_make_no_sense(method, alpha, reason):
    with pytest.raises(InvalidParameterError, match=reason):
        SolverOptions(method, alpha=alpha)


def test_forward_backward_contracts_at_its_rate():
    map, runs = mapping("lben"), SIGMAS["relu"]
    assert map.Lambda is not None
    u = torch.randn(1, N)
    exact = torch.from_numpy(reference(map.W.numpy(), u[0].numpy(), runs))
    mu, ell = map.monotonicity
    iteration = ForwardBackward()
    state = iteration.start(map, u, torch.randn(1, N))
    distance = [float(((state[0] - exact) ** 2 * map.Lambda).sum() ** 0.5)]
    for _ in range(30):
        state, _, _ = iteration.step(map, Activations.of(runs), u, state)
        distance.append(float(((state[0] - exact) ** 2 * map.Lambda).sum() ** 0.5))
    rate = (1.0 - (mu / ell) ** 2) ** 0.5
    assert all(b <= rate * a + 1e-12 for a, b in pairwise(distance))


def test_forward_substitution_is_the_explicit_recursion():
    map = mapping("triangular")
    u = torch.randn(5, N)
    z = forward_substitution(map, Activations("tanh", N), u)
    rows = []
    for k in range(N):  # state by state, whatever the blocks
        before = torch.stack([*rows, *[torch.zeros(5)] * (N - k)], 1)
        rows.append(torch.tanh(before @ map.W[k] + u[:, k]))
    np.testing.assert_allclose(z.numpy(), torch.stack(rows, 1).numpy(), atol=1e-14)
    solution = solve(map, Activations("tanh", N), u, SolverOptions("forward_substitution"))
    assert torch.equal(solution.value, z)
    assert solution.residual.tolist() == [0.0] * 5


@pytest.mark.parametrize("image", [(), (2, 3)])
@pytest.mark.parametrize("method", ["auto", "forward_substitution", *ITERATIVE])
@pytest.mark.parametrize("kind", ["triangular", "perturbed triangular"])
def test_u_is_overwritten_only_when_that_is_allowed(kind, method, image):
    map = conv_mapping(kind, image)[1] if image else mapping(kind)
    sigma = Activations.of([("identity", 1), ("tanh", 2), ("relu", map.states - 3)])
    u = map.grid.coordinates(torch.randn(5, map.states, *image))
    kept, options = u.clone(), SolverOptions(method, throw=False)
    expected = solve(map, sigma, u, options)
    assert torch.equal(u, kept)
    consumed = solve(map, sigma, u, options, consume=True)
    assert torch.equal(consumed.value, expected.value)
    assert torch.equal(consumed.residual, expected.residual)
    out = torch.empty_like(kept)
    assert forward_substitution(map, ThroughPixels(map.grid, sigma), kept, out) is out
    if method == "forward_substitution":
        torch.testing.assert_close(out, expected.value)


def test_bad_steps_are_refused():
    with pytest.raises(InvalidParameterError):
        ForwardBackward(alpha=0.0)
    with pytest.raises(InvalidParameterError):
        PeacemanRachford(alpha=-1.0)
    with pytest.raises(InvalidParameterError):
        PeacemanRachford(relaxation=1.5)
    ill = StateMap(torch.eye(2), Lambda=torch.ones(2))
    with pytest.raises(InvalidParameterError, match="μ"):
        solve(ill, Activations("relu", 2), torch.ones(1, 2), SolverOptions("forward_backward"))
    with pytest.raises(InvalidParameterError, match="Lambda"):
        solve(StateMap(torch.zeros(2, 2)), Activations("relu", 2), torch.ones(1, 2), SolverOptions("forward_backward"))


@pytest.mark.parametrize("sigma", ["relu", "mixed"])
@pytest.mark.parametrize("method", ["auto", "forward_substitution", *ITERATIVE])
def test_a_sample_does_not_see_its_batch(method, sigma):
    kind = {"auto": "lben", "peaceman_rachford": "lben", "forward_backward": "mondeq"}.get(
        method, "perturbed triangular"
    )
    kind = "triangular" if method == "forward_substitution" else kind
    map, activations = mapping(kind), Activations.of(SIGMAS[sigma])
    # Easy and hard samples side by side: sizes from 1e-3 to 1e3, some far in the dead region.
    u = torch.randn(256, N) * torch.logspace(-3, 3, 256)[torch.randperm(256)][:, None]
    u[::5] = -u[::5].abs()
    u[7] = 0.0
    options = SolverOptions(method)
    whole = solve(map, activations, u, options)
    spread = int(whole.steps.max()) - int(whole.steps.min())
    assert spread > (0 if method == "forward_substitution" else 3) or method == "forward_substitution"
    order = torch.randperm(256)
    shuffled = solve(map, activations, u[order], options)
    runs = [(order, shuffled)]
    runs += [(torch.arange(k, k + 7), solve(map, activations, u[k : k + 7], options)) for k in range(0, 70, 7)]
    runs += [(torch.tensor([k]), solve(map, activations, u[k : k + 1], options)) for k in range(0, 256, 16)]
    for samples, solution in runs:
        difference = (solution.value - whole.value[samples]).abs().amax(1)
        assert bool((difference <= 1e-12 * whole.scale[samples]).all())
        # A matrix product may round differently in another batch size: at most a step more or less.
        assert bool(((solution.steps - whole.steps[samples]).abs() <= 1).all())


@pytest.mark.parametrize("method", ["auto", *ITERATIVE])
def test_a_diverging_neighbour_changes_nothing(method):
    kind = "mondeq" if method in ("auto", "peaceman_rachford", "forward_backward") else "perturbed triangular"
    map, sigma = mapping(kind), Activations("relu", N)
    u = torch.randn(5, N)
    options = SolverOptions(method, throw=False)
    alone = solve(map, sigma, u, options)
    poisoned = u.clone()
    poisoned[2, 3] = float("nan")
    solution = solve(map, sigma, poisoned, options)
    good = torch.tensor([0, 1, 3, 4])
    assert solution.status.tolist() == [0, 0, Status.DIVERGED, 0, 0]
    assert bool((solution.value[good] - alone.value[good]).abs().max() <= 1e-12 * alone.scale.max())


# ---- on a grid ------------------------------------------------------------------------------------------------------

IMAGES = [(1, 3), (2, 2), (3, 4)]
C = 4  # channels
CHANNELS = {
    "relu": [("relu", C)],
    "mixed": [("identity", 1), ("softplus(2.0)", 1), ("relu", 2)],
}


def conv_mapping(kind: str, image: tuple[int, int]) -> tuple[np.ndarray, StateMap]:
    """W on flattened images, built there, and the map on the grid; I − W has a margin of at least 0.2 in its metric."""
    g = torch.Generator().manual_seed(11)
    pixels = image[0] * image[1]
    A, B, M = (circulant(0.4 * torch.randn(C, C, *image, generator=g) / (C * pixels) ** 0.5) for _ in range(3))
    eye, one, blocks = torch.eye(C * pixels), torch.ones(C), None
    Psi = torch.exp(0.4 * torch.randn(C, generator=g)) if kind == "lben" else one
    if kind in ("mondeq", "lben"):
        inner = A.mT @ A + B.mT - B + M.mT @ M * (kind == "lben") + 0.8 * eye
        W = eye - Psi.repeat_interleave(pixels)[:, None] * inner
    else:
        index = torch.arange(C * pixels) // pixels
        T = A * (index[:, None] > index[None, :])
        T = T * (0.5 / torch.linalg.matrix_norm(T, 2))
        size = {"triangular": 0.0, "triangular to round-off": 1e-15, "perturbed triangular": 0.05}[kind]
        W = T + size * M / torch.linalg.matrix_norm(M, 2)
        blocks = (1,) * C
    kernels = W.reshape(C, pixels, C, pixels)[:, 0].reshape(C, C, *image)  # what pixel 0 reads
    assert torch.allclose(circulant(kernels), W, atol=1e-13)
    return W.numpy(), StateMap(matrices(kernels), blocks, Psi.reciprocal(), grid=Grid(image))


def flat_runs(sigma: str, pixels: int) -> list[tuple[str, int]]:
    return [(name, size * pixels) for name, size in CHANNELS[sigma]]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("sigma", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_methods_reach_the_newton_solution_on_images(kind, sigma, image):
    W, map = conv_mapping(kind, image)
    grid, pixels = map.grid, map.grid.pixels
    runs = flat_runs(sigma, pixels)
    u = torch.randn(3, C * pixels) * torch.tensor([[0.1], [1.0], [10.0]])
    expected = np.stack([reference(W, row, runs) for row in u.numpy()])
    for method in methods(kind):
        U = grid.coordinates(u.reshape(3, C, *image))
        solution = solve(map, Activations.of(CHANNELS[sigma]), U, SolverOptions(method))
        assert solution.method == (KINDS[kind] if method == "auto" else method)
        z = grid.values(solution.value).flatten(1).numpy()
        np.testing.assert_allclose(z, expected, atol=1e-10, err_msg=method)
        # What is reported is about pixels: norms of flattened images.
        terms = [z] if solution.method == "forward_substitution" else [z, u.numpy(), z @ W.T]
        scale = sum(np.linalg.norm(term, axis=1) for term in terms)
        np.testing.assert_allclose(solution.scale.numpy(), scale, rtol=1e-12)
        fresh = np.array([np.linalg.norm(a - rule(runs, W @ a + b, 0)) for a, b in zip(z, u.numpy(), strict=True)])
        assert np.all(fresh <= solution.residual.numpy() + 3e-15 * (1.0 + scale))
        assert bool((solution.residual <= 1e-13 * solution.scale).all())
        assert solution.status.tolist() == [Status.CONVERGED] * 3
        if method == "forward_substitution":
            assert solution.steps.tolist() == [1] * 3


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("relaxation", [0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_peaceman_rachford_on_images_for_other_steps(alpha, relaxation, image):
    W, map = conv_mapping("lben", image)
    grid, pixels = map.grid, map.grid.pixels
    u = torch.randn(2, C * pixels)
    iteration, sigma = PeacemanRachford(alpha, relaxation), Activations.of(CHANNELS["relu"])
    on_pixels = ThroughPixels(grid, sigma)
    drive = grid.coordinates(u.reshape(2, C, *image))
    state = iteration.start(map, drive, torch.zeros_like(drive))
    z = state[0]
    for _ in range(400):
        state, z, _ = iteration.step(map, on_pixels, drive, state)
    expected = np.stack([reference(W, row, flat_runs("relu", pixels)) for row in u.numpy()])
    np.testing.assert_allclose(grid.values(z).flatten(1).numpy(), expected, atol=1e-11)


class ThroughPixels:
    """σ as a function of coordinates."""

    def __init__(self, grid: Grid, sigma: Activations) -> None:
        self.grid, self.sigma = grid, sigma

    def __call__(self, v: Tensor) -> Tensor:
        return self.grid.coordinates(self.sigma(self.grid.values(v)))

    def __getitem__(self, rows: slice) -> "ThroughPixels":
        return ThroughPixels(self.grid, self.sigma[rows])

    def prox(self, v: Tensor, alpha: float) -> Tensor:
        return self.grid.coordinates(self.sigma.prox(self.grid.values(v), alpha))


def test_newton_is_refused_on_images_and_never_tried():
    _, map = conv_mapping("lben", (2, 2))
    u = map.grid.coordinates(torch.randn(3, C, 2, 2))
    with pytest.raises(InvalidParameterError, match="newton"):
        solve(map, Activations("relu", C), u, SolverOptions("newton"))
    # A stiff map, on which splitting is slow: densely Newton takes over, on images the safe step does.
    stiff = StateMap(1e3 * (map.W - torch.eye(C)) + torch.eye(C), Lambda=map.Lambda, grid=map.grid)
    solution = solve(stiff, Activations("relu", C), u, SolverOptions(throw=False, max_steps=400))
    assert "newton" not in solution.method


@pytest.mark.parametrize("method", ["auto", "forward_substitution", *ITERATIVE])
def test_an_image_does_not_see_its_batch(method):
    kind = {
        "auto": "lben",
        "peaceman_rachford": "lben",
        "forward_backward": "mondeq",
        "forward_substitution": "triangular",
    }
    _, map = conv_mapping(kind.get(method, "perturbed triangular"), (3, 4))
    activations, options = Activations("relu", C), SolverOptions(method)
    u = torch.randn(24, C, 3, 4) * torch.logspace(-3, 3, 24)[torch.randperm(24)][:, None, None, None]
    u[::5] = -u[::5].abs()
    u[7] = 0.0
    U = map.grid.coordinates(u)
    whole = solve(map, activations, U, options)
    if method != "forward_substitution":  # each stops by itself
        assert int(whole.steps.max()) - int(whole.steps.min()) > 3
        assert int(whole.steps[7]) <= 1
    order = torch.randperm(24)
    for samples in (order, *torch.arange(24).split(7), *torch.arange(24).split(1)[::6]):
        solution = solve(map, activations, map.grid.coordinates(u[samples]), options)
        difference = map.grid.norm(solution.value - whole.value[samples])
        assert bool((difference <= 1e-12 * whole.scale[samples]).all())
        assert bool(((solution.steps - whole.steps[samples]).abs() <= 1).all())


@pytest.mark.parametrize("method", ["auto", *ITERATIVE])
def test_a_diverging_neighbour_changes_nothing_on_images(method):
    _, map = conv_mapping("perturbed triangular" if method == "sweep" else "mondeq", (2, 2))
    sigma, u = Activations.of(CHANNELS["mixed"]), torch.randn(5, C, 2, 2)
    options = SolverOptions(method, throw=False)
    alone = solve(map, sigma, map.grid.coordinates(u), options)
    u[2, 3, 1, 0] = float("nan")
    solution = solve(map, sigma, map.grid.coordinates(u), options)
    good = torch.tensor([0, 1, 3, 4])
    assert solution.status.tolist() == [0, 0, Status.DIVERGED, 0, 0]
    assert float((solution.value[good] - alone.value[good]).abs().max()) <= 1e-12 * float(alone.scale.max())


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_on_images(kind):
    W, map = conv_mapping(kind, (3, 4))
    runs, u = flat_runs("mixed", 12), torch.randn(3, C, 3, 4)
    single = StateMap(map.W.to(torch.complex64), map.blocks, map.Lambda, grid=map.grid)
    U = map.grid.coordinates(u.float())
    assert U.dtype == torch.complex64
    solution = solve(single, Activations.of(CHANNELS["mixed"]), U)
    assert (solution.value.dtype, solution.residual.dtype) == (torch.complex64, torch.float32)
    expected = np.stack([reference(W, row, runs) for row in u.flatten(1).numpy()])
    np.testing.assert_allclose(map.grid.values(solution.value).flatten(1).numpy(), expected, atol=1e-4)
