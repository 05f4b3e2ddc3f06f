"""Steps in order, the product of constants, and the error bound against a tight solve by Newton's method in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipconvert as lc

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def newton(stage: lc.LBEN, x: np.ndarray) -> np.ndarray:
    """y of a stage with ReLU or tanh rows: z = σ(Wz + u) by Newton along τW, sample by sample."""
    W = stage.W.detach().numpy()
    U, G, b_z, b_y = (getattr(stage, k).detach().numpy() for k in ("U", "G", "b_z", "b_y"))
    ((activation, _),) = stage.sigma.runs
    value, slope = {
        "relu": (lambda v: np.maximum(v, 0.0), lambda v: (v > 0) * 1.0),
        "tanh": (np.tanh, lambda v: 1.0 - np.tanh(v) ** 2),
    }[activation.name]
    rows = []
    for sample in x:
        u = U @ sample + b_z
        z = value(u)
        for tau in np.linspace(0.0, 1.0, 21):
            for _ in range(60):
                v = tau * W @ z + u
                residual = z - value(v)
                if np.linalg.norm(residual) <= 1e-14 * (1.0 + np.linalg.norm(z)):
                    break
                z = z - np.linalg.solve(np.eye(len(z)) - slope(v)[:, None] * tau * W, residual)
        assert np.linalg.norm(z - value(W @ z + u)) <= 1e-12 * (1.0 + np.linalg.norm(z))
        rows.append(G @ z + b_y)
    return np.stack(rows)


def two_stages() -> lc.Network:
    """LBEN, a linear map of norm 3, a shift, LBEN."""
    first = lc.LBEN(4, 7, 5, lipschitz=1.5, epsilon=0.05)
    second = lc.LBEN(5, 6, 3, lipschitz=0.7, epsilon=0.02, activation="tanh")
    glue = nn.Linear(5, 5)
    with torch.no_grad():
        glue.weight *= 3.0 / torch.linalg.matrix_norm(glue.weight, 2)
    return lc.Network([first, glue, lc.Normalize(0.3, 0.5), second], [None, 3.0, 2.0, None], (4,))


def test_order_and_product():
    net = two_stages()
    assert net.step_lipschitz == [1.5, 3.0, 2.0, 0.7]
    assert net.lipschitz == pytest.approx(1.5 * 3.0 * 2.0 * 0.7, rel=1e-15)
    assert net.stages == [net.steps[0], net.steps[3]]
    x = torch.randn(6, 4)
    glue = net.steps[1]
    hidden = newton(net.stages[0], x.numpy()) @ glue.weight.detach().numpy().T + glue.bias.detach().numpy()
    expected = newton(net.stages[1], (hidden - 0.3) / 0.5)
    np.testing.assert_allclose(net(x).detach().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(net.evaluate(x).value.numpy(), expected, atol=1e-10)
    assert not any(p.requires_grad for p in glue.parameters())  # its constant is fixed
    assert net.methods(x) == ["peaceman_rachford", "peaceman_rachford"]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("method", ["peaceman_rachford", "forward_backward"])
def test_error_bounds_what_a_loose_solve_leaves_in_two_stages(method, tolerance):
    net, x = two_stages(), 3.0 * torch.randn(12, 4)
    glue = net.steps[1]
    hidden = newton(net.stages[0], x.numpy()) @ glue.weight.detach().numpy().T + glue.bias.detach().numpy()
    exact = newton(net.stages[1], (hidden - 0.3) / 0.5)
    evaluation = net.set_options(lc.SolverOptions(method, tolerance, max_steps=50_000)).evaluate(x)
    assert bool(evaluation.converged.all())
    actual = np.linalg.norm(evaluation.value.numpy() - exact, axis=1)
    assert np.all(actual <= evaluation.error.numpy() + 1e-11)  # the reference is good to 1e-12
    assert actual.max() > 1e-4 * tolerance  # the solve really was loose


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_error_bounds_the_distance_to_the_source(name, k, tolerance):
    model = lc.registry().example_models(name, seed=3)[k].double()
    net = lc.convert(model, check=False)
    x = 2.0 * torch.randn(32, *net.input_shape)
    with torch.no_grad():
        exact = model(x)
    for method in ("auto", "sweep", "peaceman_rachford"):
        evaluation = net.set_options(lc.SolverOptions(method, tolerance, max_steps=300)).evaluate(x)
        actual = torch.linalg.vector_norm((evaluation.value - exact).flatten(1), dim=1)
        good = evaluation.converged
        if method != "sweep" or name in ("aol", "cpl", "sll", "sandwich"):
            assert bool(good.all())
        # The source itself is exact to about 1e-13 (an equilibrium model is solved to that tolerance).
        assert bool((actual <= evaluation.error + 1e-11)[good].all())


@pytest.mark.parametrize("name", ["cpl", "sll"])
def test_error_of_a_moved_network(name):
    """After its weights have moved a chain is a true equilibrium, with a small μ."""
    net = lc.convert(lc.registry().example_models(name, seed=0)[0].double(), check=False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x = torch.randn(32, *net.input_shape)
    tight = net.evaluate(x)
    assert tight.methods != ("forward_substitution",)
    for tolerance in (1e-2, 1e-4, 1e-6):
        loose = net.set_options(lc.SolverOptions("auto", tolerance)).evaluate(x)
        actual = torch.linalg.vector_norm(loose.value - tight.value, dim=1)
        assert bool((actual <= loose.error + tight.error + 1e-12).all())


def test_error_grows_by_the_constant_of_what_follows():
    stage = lc.LBEN(4, 7, 5, options=lc.SolverOptions(tolerance=1e-3))
    thousand = lc.LBEN.from_dae(lc.affine(1000.0 * torch.eye(5), lipschitz=1000.0))
    x = torch.randn(6, 4)
    alone = lc.Network([stage], [None], (4,)).evaluate(x).error
    assert float(alone.min()) > 0.0
    for follower, given in ((thousand, None), (lc.Normalize(0.0, 1e-3), None), (Foreign(), 1000.0)):
        error = lc.Network([stage, follower], [None, given], (4,)).evaluate(x).error
        np.testing.assert_allclose(error.numpy(), 1000.0 * alone.numpy(), rtol=1e-9)


def test_unconverged_samples_are_marked_not_raised():
    net = two_stages().set_options(lc.SolverOptions("peaceman_rachford", max_steps=1))
    evaluation = net.evaluate(torch.randn(3, 4))
    assert not bool(evaluation.converged.any())
    with pytest.raises(lc.NotConvergedError):
        net(torch.randn(3, 4))


def test_no_bound_no_certificate():
    zero = torch.zeros(1, 1)
    stage = lc.LBEN.from_dae(lc.DAE(torch.ones(1, 1), zero, zero, torch.ones(1)))
    net = lc.Network([stage], [None], (1,))
    with pytest.raises(lc.NoCertificateError):
        net.evaluate(torch.zeros(2, 1))


class Foreign(nn.Module):
    """Glue the core does not know."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("known", [None, 0.0, float("inf"), float("nan")])
def test_foreign_glue_needs_a_constant(known):
    with pytest.raises(lc.NoCertificateError):
        lc.Network([Foreign()], [known], (2,))


def test_the_constant_of_known_glue_is_read_off_its_values():
    first, second = (lc.Network([lc.Normalize(0.0, std)], [1.0], (3,)) for std in (1.0, 0.1))
    first.load_state_dict(second.state_dict())
    assert first.lipschitz == pytest.approx(10.0, rel=1e-12)
    rounded = lc.Network([lc.Normalize(0.0, 1.0 / 3.0)], [None], (3,)).float()
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float32)
    quotient = float((rounded(x)[1] - rounded(x)[0]).double().norm())
    assert rounded.lipschitz >= quotient * (1.0 - 1e-7)  # one division in float32


def test_shapes_are_named():
    with pytest.raises(lc.ShapeError):
        lc.Network([nn.Flatten()], [], (2,))
    net = two_stages()
    for x in (torch.zeros(2, 5), torch.zeros(4), torch.zeros(2, 2, 4)):
        for call in (net, net.evaluate):
            with pytest.raises(lc.ShapeError):
                call(x)


def test_info_counts_what_is_there():
    info = two_stages().info()
    assert info.parameters == sum(p.numel() for p in two_stages().parameters())
    assert [s.kind for s in info.steps] == ["lben", "glue", "glue", "lben"]
    assert [s.lipschitz for s in info.steps] == [1.5, 3.0, 2.0, 0.7]
    assert (info.steps[0].inputs, info.steps[0].states, info.steps[0].outputs) == (4, 7, 5)


def test_a_network_is_one_torch_module():
    net, x = two_stages(), torch.randn(3, 4)
    other = two_stages()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        expected: Tensor = net(x)
        assert torch.equal(other(x), expected)
        assert float((net.float()(x.float()).double() - expected).abs().max()) < 1e-3
