"""Networks on a CUDA device against themselves on the CPU: on a real one, where there is one, and on one pretended."""

import copy

import pytest
import torch
from lipconvert_plugins.mondeq import MonDEQConv2d
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLNetwork
from torch import Tensor, nn

import lipconvert as lc
from lipconvert.accuracy import Accuracy
from lipconvert.augment import Augmentation
from lipconvert.bounds import Bounds
from lipconvert.schema import AugmentConfig

pytestmark = pytest.mark.usefixtures("device")

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


def images() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(2, 8, 7, generator=generator), k % 3) for k in range(40)]


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_fine_tuning_gives_the_weights_it_gives_on_the_cpu(epsilon):
    config = {
        "epochs": 2,
        "batch_size": 16,
        "precision": "64-true",
        "epsilon": epsilon,
        "tolerance": 1e-12,  # both solve to the same equilibria, by whatever steps
        "augment": {"crop": 1, "flip": True},
        "held_out": 10,
        "keep": "last",
    }
    start = network("convolutions")[1]
    trained = {}
    for accelerator in ("cpu", "cuda"):
        net = copy.deepcopy(start)
        report = lc.finetune(net, images(), config=lc.TrainingConfig(accelerator=accelerator, **config))
        assert all(record.proved_lipschitz <= 1.01 * net.lipschitz for record in report.history)
        trained[accelerator] = {name: value.detach().cpu() for name, value in net.named_parameters()}
    for name, value in trained["cpu"].items():
        # Adam divides by the root of squares: round-off of 1e-15 grows where gradients are small.
        torch.testing.assert_close(trained["cuda"][name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_the_device_goes_on_where_it_was_saved(precision, tmp_path):
    config = lc.TrainingConfig(epochs=2, batch_size=16, precision=precision, accelerator="cuda", keep="last")

    def stop(step: int, total: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    start, data = MODELS["dense"]().float(), [(torch.randn(6).float(), k % 3) for k in range(40)]
    whole, killed, halves = (copy.deepcopy(start) for _ in range(3))
    lc.train(whole, data, config=config)
    with pytest.raises(KeyboardInterrupt):
        lc.train(killed, data, config=config, folder=tmp_path, save_seconds=0.0, on_step=stop)
    lc.train(halves, data, config=config, folder=tmp_path)
    for ours, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours.cpu(), theirs.cpu())


def test_augmentation_is_that_of_the_cpu():
    colours = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": 0.1}
    augment = Augmentation(AugmentConfig(crop=2, flip=True, **colours), (3, 12, 10))
    x, draws = torch.rand(20, 3, 12, 10), augment.draw(20, torch.Generator().manual_seed(1))
    there = augment(x.to("cuda"), draws)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), augment(x, draws), rtol=0.0, atol=1e-12)
