"""Every registered architecture keeps its constant while it is trained: converted (H and Jacobian) and at its source."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipconvert as lc

CASES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]
STEPS = {False: 100, True: 15}  # flat, and on images, where a step takes several times as long
POINTS = {False: 200, True: 50}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def example(name: str, k: int) -> nn.Module:
    return lc.registry().example_models(name, seed=0)[k].double()


def train(model: nn.Module, shape: tuple[int, ...], classify: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, *shape, generator=generator)
    with torch.no_grad():
        outputs = model(x).flatten(1).shape[1]
    target = torch.randn(8, outputs, generator=generator)
    labels = torch.randint(outputs, (8,), generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS[len(shape) == 3]):
        y = model(x).flatten(1)
        loss = nn.functional.cross_entropy(10.0 * y, labels) if classify else (y - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def jacobian_norm(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest 2-norm of ∂y/∂x over 200 points (50 images), by one backward pass for each output."""
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(POINTS[len(shape) == 3], *shape, generator=generator) * 2.0).requires_grad_(True)
    y = model(x).flatten(1)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(y.shape[1])]
    return float(np.linalg.norm(torch.stack(rows, 1).numpy(), 2, axis=(1, 2)).max())


def circulant(K: np.ndarray) -> np.ndarray:
    """Kernels (r, c, h, w) as the matrix of y_i[s, t] = Σ_j Σ_ab K_ij[a, b] x_j[s + a, t + b] on flattened images."""
    if K.ndim == 2:
        return K
    h, w = K.shape[2:]
    s, t, u, v = np.ogrid[:h, :w, :h, :w]
    M = K[:, :, (u - s) % h, (v - t) % w]
    return M.transpose(0, 2, 3, 1, 4, 5).reshape(K.shape[0] * h * w, K.shape[1] * h * w)


def assert_H(stage: lc.LBEN) -> None:
    """λ_min of H(Ψ⁻¹, L) from the module's numbers and equation (2), all in numpy; on images as one dense matrix, whose
    eigenvalues are those of every frequency."""
    log_psi = stage.log_psi.detach().numpy()
    G, U, V, S = (circulant(getattr(stage, k).detach().numpy()) for k in ("G", "U", "V", "S"))
    L, n, pixels, image = stage.lipschitz, len(log_psi), len(S) // len(log_psi), tuple(stage.S.shape[2:])
    log_psi = log_psi.repeat(pixels)
    Psi, Lambda = np.diag(np.exp(log_psi)), np.diag(np.exp(-log_psi))
    LU = Lambda @ U
    W = np.eye(n * pixels) - Psi @ (
        (G.T @ G + LU @ LU.T) / (2 * L) + V.T @ V + S - S.T + stage.epsilon * np.eye(n * pixels)
    )
    used = W
    if image:  # the first pixel's rows are the kernels; torch's convolution is a correlation, hence the conjugate
        kernels = W.reshape(n, *image, n, *image)[:, 0, 0]
        used = np.fft.rfft2(kernels).conj().reshape(n, n, -1).transpose(2, 0, 1)
    np.testing.assert_allclose(stage.state_map().W.numpy(), used, atol=1e-12 * max(1.0, np.abs(used).max()))
    H = 2 * Lambda - Lambda @ W - W.T @ Lambda - (G.T @ G + LU @ LU.T) / L
    assert np.linalg.eigvalsh(0.5 * (H + H.T))[0] >= -1e-10 * max(1.0, Lambda.max())


@pytest.mark.parametrize(("name", "k"), CASES)
def test_a_converted_network_keeps_its_constant(name, k):
    net = lc.convert(example(name, k), check=False)
    L = net.lipschitz
    before = [parameter.detach().clone() for parameter in net.parameters()]
    # Training gradients need no thirteen digits; the measurements below are solved to the default tolerance.
    net.set_options(lc.SolverOptions(tolerance=1e-7))
    train(net, net.input_shape, classify=k % 2 == 1)
    net.set_options(lc.SolverOptions())
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert net.lipschitz == L
    for stage in net.stages:
        assert_H(stage)
    assert jacobian_norm(net, net.input_shape) <= L * (1.0 + 1e-6)


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
    if isinstance(model, lc.LBEN):
        model.options = lc.SolverOptions(tolerance=1e-7)
    train(model, model.input_shape, classify=k % 2 == 0)
    if isinstance(model, lc.LBEN):
        model.options = lc.SolverOptions()
    dae = lc.to_dae(model)  # refuses a layer whose constraint does not hold
    assert jacobian_norm(model, model.input_shape) <= dae.lipschitz * (1.0 + 1e-6)
    assert lc.check(dae).condition_10


def test_the_jacobian_test_sees_one_per_cent_too_much():
    # A linear chain of orthogonal layers has Jacobian norm exactly L.
    model = lc.registry().example_models("cpl", seed=0)[0].double()
    for layer in model:
        if hasattr(layer, "weight"):
            with torch.no_grad():
                layer.bias.fill_(-1e3)  # every neuron dead: the identity, cut to three features
    assert jacobian_norm(model, (5,)) == pytest.approx(1.0, abs=1e-12)
    assert jacobian_norm(Widened(model), (5,)) > 1.0 + 1e-6
