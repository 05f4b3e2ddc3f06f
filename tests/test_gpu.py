"""Networks on a CUDA device against themselves on the CPU; skipped where there is none."""

import copy

import pytest
import torch
from lipconvert_plugins.mondeq import MonDEQConv2d
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLNetwork
from torch import Tensor, nn

import lipconvert as lc
from lipconvert.accuracy import Accuracy
from lipconvert.bounds import Bounds

pytestmark = pytest.mark.gpu

MODELS = {
    "dense": lambda: SLLNetwork(inputs=6, classes=3, features=9, dense_depth=3),
    "convolutions": lambda: SLLNetwork(image=(8, 7), pool=1, in_channels=2, channels=3, classes=3, dense_depth=1),
    "sandwich": lambda: SandwichNetwork(image=(6, 8), pool=2, in_channels=2, channels=3, classes=3, dense_depth=1),
    "equilibrium": lambda: nn.Sequential(MonDEQConv2d(2, 3, 2, m=0.5), nn.Flatten()),
}
SHAPES = {"equilibrium": (2, 5, 6)}


def network(name: str) -> tuple[nn.Module, lc.Network, Tensor]:
    model = MODELS[name]().double()
    shape = SHAPES.get(name) or model.input_shape
    return model, lc.convert(model, shape), torch.randn(7, *shape)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return [p.grad.cpu() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_cpu(name, perturbed):
    _, net, x = network(name)
    if perturbed:  # no longer triangular: sweeps and splitting
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    there = copy.deepcopy(net).to("cuda")
    with torch.no_grad():
        y = there(x.to("cuda"))
        assert y.device.type == "cuda"
        assert float((y.cpu() - net(x)).abs().max()) <= 1e-11
    for ours, theirs in zip(gradients(there, x.to("cuda")), gradients(net, x), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    _, net, x = network(name)
    single = copy.deepcopy(net).float().to("cuda")
    with torch.no_grad():
        y, expected = single(x.float().to("cuda")).double().cpu(), net(x)
    assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_the_device_converts_and_its_network_stays_there(name):
    model, net, x = network(name)
    there = lc.convert(model.to("cuda"), x.shape[1:])
    assert there.device.type == "cuda"
    with torch.no_grad():
        assert float((there(x.to("cuda")).cpu() - net(x)).abs().max()) <= 1e-12


def test_certification_counts_the_same():
    _, net, _ = network("convolutions")
    data = [(torch.randn(net.input_shape), k % 3) for k in range(40)]
    here, there = lc.certify(net, data), lc.certify(copy.deepcopy(net).to("cuda"), data)
    assert (here.natural_accuracy, here.certified_accuracy) == (there.natural_accuracy, there.certified_accuracy)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", MODELS)
def test_the_errors_of_float32_on_the_device_are_bounded(name, precision):
    """Also where products round to ten bits: the bound knows what they are set to."""
    net = network(name)[1].float()
    there, x = copy.deepcopy(net).to("cuda"), torch.randn(20, *net.input_shape).float()
    there.set_options(lc.SolverOptions(tolerance=1e-2 if precision == "tf32" else None))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        accuracy = Accuracy(Bounds(there))
        found, close = accuracy.evaluate(x.to("cuda")), accuracy.evaluate(x, double=True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    off = (found.value.cpu().double() - close.value).flatten(1).norm(dim=1)
    known = found.converged.cpu()
    assert precision == "tf32" or bool(known.all())
    assert bool((off <= found.error[:, 0].cpu() + close.error[:, 0])[known].all())
