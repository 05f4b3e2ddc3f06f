"""Networks on a CUDA device against themselves on the CPU: on a real one, where there is one, and on one pretended."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import pytest
import torch
import yaml
from lipconvert_plugins.aol import AOLNetwork
from lipconvert_plugins.cpl import CPLNetwork
from lipconvert_plugins.g_mondeq import GMonDEQ
from lipconvert_plugins.mondeq import MonDEQ, MonDEQConv2d
from lipconvert_plugins.sandwich import SandwichNetwork
from lipconvert_plugins.sll import SLLNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lipconvert as lc
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import Bounds
from lipconvert.data import load as load_data
from lipconvert.experiments import demo, recipes
from lipconvert.interop.hub import write_folder
from lipconvert.training.augment import Augmentation
from lipconvert.training.documents import AugmentConfig

pytestmark = pytest.mark.usefixtures("device")

MODELS = {
    "dense": lambda: SLLNetwork(inputs=6, classes=3, features=9, dense_depth=3),
    "convolutions": lambda: SLLNetwork(image=(8, 7), pool=1, in_channels=2, channels=3, classes=3, dense_depth=1),
    "sandwich": lambda: SandwichNetwork(image=(6, 8), pool=2, in_channels=2, channels=3, classes=3, dense_depth=1),
    "equilibrium": lambda: nn.Sequential(MonDEQConv2d(2, 3, 2, m=0.5), lc.MeanPool(2), nn.Flatten()),
}
# Of the other plugins.
OTHERS = {
    "cpl": lambda: CPLNetwork(image=(8, 6), pool=2, in_channels=1, channels=3, classes=3, dense_depth=1),
    "aol": lambda: AOLNetwork(image=(8, 6), pool=2, in_channels=1, channels=3, classes=3, dense_depth=1),
    "g_mondeq": lambda: GMonDEQ(5, 4, 3),
    "mondeq": lambda: MonDEQ(5, 4, 3, m=0.3),
    "lben": lambda: nn.Sequential(lc.LBEN(2, 3, 2, image=(4, 4)), lc.MeanPool(2), nn.Flatten()),
}
SHAPES = {"equilibrium": (2, 4, 6), "g_mondeq": (5,), "mondeq": (5,), "lben": (2, 4, 4)}


def network(name: str) -> tuple[nn.Module, lc.Network, Tensor]:
    model = (MODELS | OTHERS)[name]().double()
    shape = SHAPES.get(name) or model.input_shape
    return model, lc.convert(model, shape, check=False), torch.randn(7, *shape)


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


def plain(result: Any) -> Any:
    """What a function returns, with tensors in float64 on the CPU and numbers as such tensors."""
    if isinstance(result, Tensor):
        return (result.real if result.is_complex() else result).detach().cpu().double()
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [plain(value) for value in result]
    return torch.tensor(float(result)) if isinstance(result, int | float) else result


def saved(net: lc.Network, path: Path) -> lc.Network:
    lc.save(net, path / "net.onnx")
    assert lc.verify(path / "net.onnx").passed
    loaded, x = lc.load(path / "net.onnx"), torch.ones(2, *net.input_shape, device=net.device)
    assert torch.equal(loaded.to(net.device)(x), net(x))
    return loaded


def pickled(net: lc.Network, path: Path) -> lc.Network:
    torch.save(net.state_dict(), path / "net.pt")
    copied = copy.deepcopy(net)
    copied.load_state_dict(torch.load(path / "net.pt"))
    return copied


def run_elsewhere(net: lc.Network, x: Tensor, path: Path) -> Tensor:
    """The output of the feed-forward graph in onnxruntime."""
    (path / "explicit.onnx").write_bytes(lc.explicit(net).SerializeToString())
    session = onnxruntime.InferenceSession(path / "explicit.onnx")
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.cpu().float().numpy()})[0])


def trained(net: lc.Network, x: Tensor, labels: Tensor, path: Path, **config: Any) -> Tensor:
    """The output after an epoch that begins on the device of the network, which it does not leave."""
    config = {"epochs": 1, "batch_size": 4, "precision": "64-true", "tolerance": 1e-12, "keep": "last", **config}
    before, net = net.device, copy.deepcopy(net).double()
    lc.finetune(net, TensorDataset(x, labels), TensorDataset(x, labels), lc.TrainingConfig(**config))
    assert net.device == before
    return net(x.to(before))


# What is public and takes a network (N), a batch (x), its labels (t) and a folder (p), or a DAE of the network.
FUNCTIONS: dict[str, Callable[[lc.Network, Tensor, Tensor, Path], Any]] = {
    "certify": lambda N, x, t, p: lc.certify(N, TensorDataset(x, t)).sample_radii,
    "certify and attack": lambda N, x, t, p: (
        lc.certify(N, DataLoader(TensorDataset(x, t), 4), attack=lc.AttackConfig(steps=3)).attack.attacked_accuracy
    ),
    "certify into a folder": lambda N, x, t, p: lc.certify(N, TensorDataset(x, t), folder=p, shard_size=3).margins,
    "certified_radii": lambda N, x, t, p: lc.certified_radii(N, x, t),
    "Certifier": lambda N, x, t, p: lc.Certifier(N, "pairwise")(x, t),
    "pgd": lambda N, x, t, p: lc.pgd(N, x, t, 0.3, steps=4, restarts=2, box=(-5.0, 5.0)),
    "pgd, radii": lambda N, x, t, p: lc.pgd(N, x, t, torch.linspace(0.1, 0.7, len(x)), steps=4, loss="dlr"),
    "apgd": lambda N, x, t, p: lc.apgd(N, x, t, 0.3, steps=4, restarts=2, loss="cross_entropy"),
    "attack": lambda N, x, t, p: lc.attack(N, x, t, [0.2, 2.0, 0.0], steps=4, method="apgd", restarts=3),
    "empirical_lipschitz": lambda N, x, t, p: lc.empirical_lipschitz(N, x, steps=3),
    "empirical_lipschitz, pair": lambda N, x, t, p: lc.empirical_lipschitz(N, x, steps=3, pair=(1, 0)),
    "lipschitz_bound": lambda N, x, t, p: lc.lipschitz_bound(N).pairs,
    "save, verify, load": lambda N, x, t, p: saved(N, p)(x.to(N.device, N.dtype)),
    "torch.save": lambda N, x, t, p: pickled(N, p)(x.to(N.device)),
    "methods": lambda N, x, t, p: N.methods(x.to(N.device)),
    "info": lambda N, x, t, p: N.info().model_dump_json(),
    "check": lambda N, x, t, p: vars(lc.check(N.stages[0].dae())),
    "check a multiplier": lambda N, x, t, p: vars(
        lc.check(dae := N.stages[0].dae(), lc.strict_multiplier(dae, 1e-3), 1.001 * dae.lipschitz)
    ),
    "X and H": lambda N, x, t, p: [M(N.stages[0].dae()).abs() for M in (lc.X_matrix, lc.H_matrix)],
    "prove_constant": lambda N, x, t, p: vars(lc.prove_constant(N.stages[0].dae())),
    "prove_lmi": lambda N, x, t, p: vars(lc.prove_lmi(dae := N.stages[0].dae(), dae.Lambda, 1.01 * dae.lipschitz)),
    "prove_monotone": lambda N, x, t, p: lc.prove_monotone(dae := N.stages[0].dae(), dae.Lambda),
    "solve": lambda N, x, t, p: N.stages[0].solve(x.new_ones(2, 9).to(N.device)).value,
    "compose": lambda N, x, t, p: list(lc.compose(dae := N.stages[0].dae(), lc.scale(lc.affine(dae.G.mT), 2.0))),
    "new layers": lambda N, x, t, p: list(
        lc.compose(
            lc.to_dae(copy.deepcopy(N.stages[0]).cpu()),
            lc.elementwise("relu", 9),
            lc.affine(torch.eye(8, 9, device="cpu")),
            lc.max_min(8),
        )
    ),
    "parts": lambda N, x, t, p: [
        lc.spectral_norm(M := N.stages[0].dae().W),
        lc.psd_sqrt(M @ M.mT, "M"),
        lc.psd_factor(M @ M.mT, "M").mT @ lc.psd_factor(M @ M.mT, "M"),
        lc.linear_solve(torch.eye(len(M), device=M.device) - M, M),
        lc.conv2d_same(K := M[:8, :8].reshape(2, 2, 4, 4), M[:2, :8].reshape(1, 2, 2, 4), padding_mode="zeros"),
        lc.conv2d_adjoint(K[:, :1], M[:2, :8].reshape(1, 2, 2, 4)),
        lc.strided_weight(K, 2)[0],
        lc.MaxMin()(M[:, :8]),
        lc.equilibrium(M, M.new_ones(2, len(M)), N.stages[0].sigma),
    ],
    "write_folder": lambda N, x, t, p: write_folder(N, p / "hub", lc.certify(N, TensorDataset(x, t))),
    "eliminate": lambda N, x, t, p: list(lc.eliminate(N.stages[0].dae())),
    "gauge": lambda N, x, t, p: list(lc.gauge(N.stages[0].dae())),
    "absorb": lambda N, x, t, p: list(lc.absorb(dae := N.stages[0].dae(), 0.5 * dae.U.mT @ dae.U)),
    "densify": lambda N, x, t, p: list(lc.densify(N.stages[0].dae())),
    "from_dae": lambda N, x, t, p: lc.LBEN.from_dae(N.stages[0].dae(), delta=1e-3)(x.new_ones(2, 9).to(N.device)),
    "finetune": trained,
    "explicit": lambda N, x, t, p: run_elsewhere(N, x, p),
    "export_vnnlib": lambda N, x, t, p: [
        f.read_text() for f in lc.export_vnnlib(N, p / "vnn", TensorDataset(x, t), 0.1, box=(-1.0, 1.0))
    ],
}


# (where the network is, where the data are, the default device)
PLACES = {
    "data on the CPU": ("cuda", "cpu", "cpu"),
    "data there": ("cuda", "cuda", "cpu"),
    "all there": ("cuda", "cuda", "cuda"),
    "nothing there": ("cpu", "cpu", "cuda"),
}


@cache
def on_the_cpu(function: str) -> tuple[lc.Network, Tensor, Tensor, Any]:
    """A network, a batch, its labels but for one that is wrong, and what comes out of a function there."""
    torch.manual_seed(0)
    _, net, x = network("dense")
    labels = net(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    with TemporaryDirectory() as folder:
        return net, x, labels, plain(FUNCTIONS[function](net, x, labels, Path(folder)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions_take_a_network_on_the_device(function, place, tmp_path):
    """Wherever network and data are and new tensors go, what comes out is what comes out on the CPU."""
    where, data, default = PLACES[place]
    net, x, labels, expected = on_the_cpu(function)
    there = copy.deepcopy(net).to(where)
    with torch.device(default):
        found = FUNCTIONS[function](there, x.to(data), labels.to(data), tmp_path)
    assert there.device.type == where
    if function in ("methods", "info", "export_vnnlib", "write_folder"):  # words, or nothing
        assert found == expected
    else:
        torch.testing.assert_close(plain(found), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_models_where_the_device_is_the_default(name):
    """New models are there, as torch's own layers are; those made before stay where they are; both convert and train."""
    here, net, x = network(name)
    y = net(x)
    with torch.device("cuda"):
        there = (MODELS | OTHERS)[name]().double()
        assert {p.device.type for p in there.parameters()} == {"cuda"}
        for model, inputs in ((here, x), (there, x.to("cuda"))):
            before = next(model.parameters()).device
            converted = lc.convert(model, x.shape[1:], check=False)
            assert converted.device == before
            model(inputs).square().mean().backward()
            converted(inputs).square().mean().backward()
            assert {p.grad.device.type for p in converted.parameters() if p.grad is not None} == {before.type}
            assert float((converted(inputs) - model(inputs)).detach().abs().max()) <= 1e-10
            assert lc.to_dae(here, x.shape[1:]).W.device.type == "cpu"
        assert float((here(x) - y).detach().abs().max()) <= 1e-10
        there.load_state_dict(here.state_dict())
        assert float((there(x.to("cuda")).cpu() - y).detach().abs().max()) <= 1e-10


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


OPTIONS: dict[str, dict[str, Any]] = {
    "penalty": {"penalty": {"weight": 0.1}},
    "penalty, l2": {"penalty": {"weight": 0.1, "norm": "l2"}, "clip": 1.0},
    "freeze": {"penalty": {"freeze": True}, "roots": 1e-3},
    "freeze, no gauge": {"penalty": {"freeze": True}, "balance": False, "learning_rates": {"Psi": 0.5}},
    "muon": {"optimizer": "muon", "schedule": {"kind": "one_cycle"}, "stages": [1]},
    "epsilon": {"epsilon": 0.01, "roots": 1e-3, "weight_decay": 1e-3},
    "best": {"keep": "best", "held_out": 4, "patience": 1, "augment": {"crop": 1, "flip": True}},
}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_network_on_the_device_is_fine_tuned_there_and_stays(option, accelerator):
    """With every option, and also where the training itself is on the CPU: the weights of a run on the CPU alone."""
    if accelerator == "cpu" and not option.startswith(("penalty", "freeze")):
        pytest.skip("nothing that this option does depends on where the network was before")
    config = {"epochs": 1, "batch_size": 6, "precision": "64-true", "tolerance": 1e-12, "keep": "last", "radii": [0.1]}
    start, data = network("convolutions")[1], images()[:12]
    found = []
    for device, where in (("cpu", "cpu"), ("cuda", accelerator)):
        net = copy.deepcopy(start).to(device)
        placed = [(x.to(device), label) for x, label in data]
        lc.finetune(net, placed, config=lc.TrainingConfig(**{**config, **OPTIONS[option]}, accelerator=where))
        assert net.device.type == device
        found.append([p.detach().cpu() for p in net.parameters()])
    changed = 0.0
    for ours, theirs, before in zip(*found, start.parameters(), strict=True):
        # Muon's orthogonal factor is computed in bfloat16, from sums in any order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4 if option == "muon" else 1e-7)
        changed = max(changed, float((ours - before.detach()).abs().max()))
    assert changed > 1e-4


def test_a_network_on_the_device_is_validated():
    """Against a source on either device, with inputs on either."""
    for name in ("dense", "convolutions"):
        model, net, x = network(name)
        expected = lc.validate(model, net, x)
        for source in (model, copy.deepcopy(model).to("cuda")):
            for inputs in (x, x.to("cuda"), None):
                report = lc.validate(source, copy.deepcopy(net).to("cuda"), inputs)
                assert report.passed
                assert [check.name for check in report.checks] == [check.name for check in expected.checks]
        moved = copy.deepcopy(net).to("cuda")
        with torch.no_grad():
            moved.stages[0].b_y.add_(1e-3)
        with pytest.raises(lc.EquivalenceError):
            lc.validate(model, moved)


def test_a_certifier_refuses_a_network_that_was_moved():
    _, net, x = network("dense")
    labels = net(x).argmax(1)
    certifier = lc.Certifier(net, "prescribed")
    certifier(x, labels)
    net.to("cuda")
    with pytest.raises(lc.NoCertificateError, match="moved"):
        certifier(x, labels)
    there = lc.Certifier(net, "prescribed")
    there(x, labels)
    net.to("cpu")
    with pytest.raises(lc.NoCertificateError, match="moved"):
        there(x, labels)


def test_fine_tuning_on_the_device_goes_on_where_it_was_saved(tmp_path):
    """Masks of frozen entries, optimisers and the weights kept come back from the CPU, where a state is read to."""
    options = {"penalty": {"weight": 0.1, "freeze": True}, "clip": 1.0, "epochs": 2, "batch_size": 6, "held_out": 4}
    config = lc.TrainingConfig(accelerator="cuda", precision="bf16-mixed", **options)

    def stop(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    start, data = network("convolutions")[1].to("cuda"), images()[:14]
    whole, halves = copy.deepcopy(start), copy.deepcopy(start)
    lc.finetune(whole, data, config=config)
    with pytest.raises(KeyboardInterrupt):
        lc.finetune(copy.deepcopy(start), data, config=config, folder=tmp_path, save_seconds=0.0, on_step=stop)
    lc.finetune(halves, data, config=config, folder=tmp_path)
    for ours, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        assert ours.device.type == "cuda"
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_recipes_run_on_the_device(default, tmp_path, monkeypatch):
    """From a source network to a fine-tuned one; the numbers are those of the CPU."""
    monkeypatch.chdir(tmp_path)
    training = {"epochs": 1, "batch_size": 32, "held_out": 30, "keep": "last", "precision": "64-true"}
    model = {"factory": "lipconvert_plugins.aol:AOLLinear", "arguments": {"in_features": 64, "out_features": 10}}
    found = []
    for accelerator in ("cpu", "cuda"):
        settings = {"data": "digits", "method": "pairwise", "training": {**training, "accelerator": accelerator}}
        Path("source.yaml").write_text(yaml.safe_dump({"title": "source", "model": model, **settings}))
        Path("fine.yaml").write_text(yaml.safe_dump({"title": "fine", "start": "source.yaml", **settings}))
        with torch.device(default):
            result = recipes.run("fine.yaml", recipes.Order(accelerator, limit=60))
        net = lc.load(recipes.folder_of("fine.yaml", accelerator, 0) / recipes.NETWORK)
        found.append((result.certified_accuracy, net(torch.ones(1, 64))))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_the_demo_runs_on_the_device(default):
    config = lc.TrainingConfig(epochs=1, batch_size=16, accelerator="cuda", keep="last")
    x, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    with torch.device(default):
        row = demo.run_one("sll", config, (x.float(), labels), (x[:9].float(), labels[:9]))
    assert row.max_output_difference <= 1e-10
    assert row.validation.passed


@pytest.mark.parametrize("default", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["digits"])
def test_data_are_read_to_the_cpu(name, default):
    with torch.device(default):
        found = load_data(name, "test")
        x, label = found.spread(7)[3]
    assert x.device.type == "cpu"
    assert isinstance(label, int)


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


@pytest.mark.parametrize("default", ["cpu", "cuda"])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_augmentation_is_that_of_the_cpu(padding, default):
    colours = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": 0.1}
    augment = Augmentation(AugmentConfig(crop=2, flip=True, padding=padding, **colours), (3, 12, 10))
    x, draws = torch.rand(20, 3, 12, 10), augment.draw(20, torch.Generator().manual_seed(1))
    with torch.device(default):
        draws_again = augment.draw(20, torch.Generator("cpu").manual_seed(1))
        there = augment(x.to("cuda"), draws_again)
    assert there.device.type == "cuda"
    torch.testing.assert_close(there.cpu(), augment(x, draws), rtol=0.0, atol=1e-12)
