"""Every registered architecture keeps its constant while it is trained: converted (H and Jacobian) and at its source."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipconvert as lc

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]
STEPS = 100


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def example(name: str, k: int) -> nn.Module:
    return lc.registry().example_models(name, seed=0)[k].double()


def train(model: nn.Module, inputs: int, classify: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, inputs, generator=generator)
    with torch.no_grad():
        outputs = model(x).shape[1]
    target = torch.randn(8, outputs, generator=generator)
    labels = torch.randint(outputs, (8,), generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        y = model(x)
        loss = nn.functional.cross_entropy(10.0 * y, labels) if classify else (y - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def jacobian_norm(model: nn.Module, inputs: int) -> float:
    """The largest 2-norm of ∂y/∂x over 200 points, by one backward pass for each output."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(200, inputs, generator=generator) * 2.0).requires_grad_(True)
    y = model(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(y.shape[1])]
    return float(np.linalg.norm(torch.stack(rows, 1).numpy(), 2, axis=(1, 2)).max())


def assert_H(stage: lc.LBEN) -> None:
    """λ_min of H(Ψ⁻¹, L) from the module's numbers and equation (2), all in numpy."""
    log_psi, G, U, V, S = (getattr(stage, k).detach().numpy() for k in ("log_psi", "G", "U", "V", "S"))
    L, n = stage.lipschitz, len(log_psi)
    Psi, Lambda = np.diag(np.exp(log_psi)), np.diag(np.exp(-log_psi))
    LU = Lambda @ U
    W = np.eye(n) - Psi @ ((G.T @ G + LU @ LU.T) / (2 * L) + V.T @ V + S - S.T + stage.epsilon * np.eye(n))
    np.testing.assert_allclose(stage.state_map().W.numpy(), W, atol=1e-12 * max(1.0, np.abs(W).max()))
    H = 2 * Lambda - Lambda @ W - W.T @ Lambda - (G.T @ G + LU @ LU.T) / L
    assert np.linalg.eigvalsh(0.5 * (H + H.T))[0] >= -1e-10 * max(1.0, Lambda.max())


@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_converted_network_keeps_its_constant(name, k):
    net = lc.convert(example(name, k), check=False)
    (inputs,) = net.input_shape
    L = net.lipschitz
    before = [parameter.detach().clone() for parameter in net.parameters()]
    # Training gradients need no thirteen digits; the measurements below are solved to the default tolerance.
    net.set_options(lc.SolverOptions(tolerance=1e-7))
    train(net, inputs, classify=k % 2 == 1)
    net.set_options(lc.SolverOptions())
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert net.lipschitz == L
    for stage in net.stages:
        assert_H(stage)
    assert jacobian_norm(net, inputs) <= L * (1.0 + 1e-6)


class Widened(nn.Module):
    """A parameter that a source architecture constrains, moved without its constraint."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * self.net(x)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_source_network_stays_within_its_constant(name, k):
    model = example(name, k)
    inputs = lc.to_dae(model).inputs
    if isinstance(model, lc.LBEN):
        model.options = lc.SolverOptions(tolerance=1e-7)
    train(model, inputs, classify=k % 2 == 0)
    if isinstance(model, lc.LBEN):
        model.options = lc.SolverOptions()
    dae = lc.to_dae(model)  # refuses a layer whose constraint does not hold
    assert jacobian_norm(model, inputs) <= dae.lipschitz * (1.0 + 1e-6)
    assert lc.check(dae).condition_10


def test_the_jacobian_test_sees_one_per_cent_too_much():
    # A linear chain of orthogonal layers has Jacobian norm exactly L.
    model = lc.registry().example_models("cpl", seed=0)[0].double()
    for layer in model:
        if hasattr(layer, "weight"):
            with torch.no_grad():
                layer.bias.fill_(-1e3)  # every neuron dead: the identity, cut to three features
    assert jacobian_norm(model, 5) == pytest.approx(1.0, abs=1e-12)
    assert jacobian_norm(Widened(model), 5) > 1.0 + 1e-6
