"""Steps in order and the product of constants, against a tight solve by Newton's method in numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipconvert as lc


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
    assert not any(p.requires_grad for p in glue.parameters())  # its constant is fixed
    assert net.methods(x) == ["peaceman_rachford", "peaceman_rachford"]


class Foreign(nn.Module):
    """Glue the core does not know."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("known", [None, 0.0, float("inf"), float("nan")])
def test_foreign_glue_needs_a_constant(known):
    with pytest.raises((lc.NoCertificateError, lc.InvalidParameterError)):
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
        with pytest.raises(lc.ShapeError):
            net(x)


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


def test_a_network_of_glue_alone_has_the_dtype_of_its_numbers(tmp_path):
    net = lc.convert(torch.nn.Sequential(lc.Normalize([0.1, 0.2], [0.25, 0.3])).double(), (2, 3, 4), check=False)
    for dtype in (torch.float64, torch.float32):
        net = net.to(dtype)
        assert net.dtype == dtype == net(torch.rand(2, 2, 3, 4)).dtype
        lc.save(net, tmp_path / "net.onnx")
        assert lc.verify(tmp_path / "net.onnx", seed=0).passed
    assert lc.convert(torch.nn.Flatten(), (2, 3), check=False).dtype == torch.float64  # there are no numbers in it


def test_where_it_comes_from():
    """Provenance names the plugins that described it, and the very numbers of the source."""
    models = lc.registry().example_models("aol", 0)[0], lc.registry().example_models("aol", 1)[0]
    nets = [lc.convert(model, check=False) for model in (models[0], copy.deepcopy(models[0]).float(), models[1])]
    found = [net.provenance for net in nets]
    assert all(p is not None for p in found)
    assert [[source.name for source in p.plugins] for p in found if p is not None] == [["aol"]] * 3
    assert len({p.sha256 for p in found if p is not None}) == 3  # another dtype is other numbers, too
    again = lc.convert(copy.deepcopy(models[0]), check=False).provenance
    assert again is not None
    assert found[0] is not None
    assert again.sha256 == found[0].sha256
