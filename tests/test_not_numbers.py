"""NaN and infinity in a batch: torch says which samples hold them, onnxruntime and a certifier leave the others alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lipconvert as lc

onnxruntime = pytest.importorskip("onnxruntime")

BAD = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}
COUNT, ROWS = 9, (2, 5, 6, 8)
SAID = r"samples 2, 5, 6 and 1 more \(counted from 0\), \d+ of \d+ entries, are NaN or infinite"


def network(kind):
    name, _, how = kind.partition(", ")
    torch.manual_seed(0)
    model = lc.registry().example_models(name, 0)[-1 if "images" in how else 0].double().eval()
    shape = getattr(model, "input_shape", None) or (lc.to_dae(model).inputs,)
    model = nn.Sequential(lc.Normalize(0.3, 0.5), model, nn.Flatten())
    options = {"epsilon": 1e-3, "delta": 1e-1} if "tuned" in how else {}
    net = lc.convert(model, shape, check=False, **options)
    if "tuned" in how:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 1e-2 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    return model, net


KINDS = ["aol", "sll, tuned", "mondeq", "sandwich, images", "sll, images tuned", "lben, images"]
kinds = pytest.mark.parametrize("kind", KINDS)
bad = pytest.mark.parametrize("value", BAD.values(), ids=BAD)


def batch(net, *values):
    """A batch, the same with a bad entry in some samples, of these values in turn, and which are good."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(COUNT, *net.input_shape, generator=generator, dtype=torch.float64).to(net.dtype)
    spoiled, good = x.clone(), torch.ones(COUNT, dtype=torch.bool)
    for k, row in enumerate(ROWS):
        spoiled[row].view(-1)[k % x[0].numel()] = values[k % len(values)]
        good[row] = False
    return x, spoiled, good


@bad
@kinds
def test_a_network_says_which_samples(kind, value):
    _, net = network(kind)
    _, x, _ = batch(net, value)
    for run in (
        lambda: net(x),
        lambda: torch.no_grad()(net)(x),
        lambda: net(x.requires_grad_()),
        lambda: net.float()(x),
    ):
        with pytest.raises(lc.NotFiniteError, match=f"^the input of the network: {SAID}") as caught:
            run()
        assert caught.value.samples == ROWS
        assert (caught.value.count, caught.value.total) == (len(ROWS), x.numel())
        assert "training" not in str(caught.value)
        assert "weights" not in str(caught.value)
    stage = net.double().stages[0]
    given = torch.zeros(4, *stage.input_shape)
    given[3] = value
    for run in (lambda: stage(given), lambda: torch.no_grad()(stage)(given), lambda: stage.solve(given)):
        with pytest.raises(lc.NotFiniteError, match=f"^the input of {stage.name!r}: sample 3 ") as caught:
            run()
        assert caught.value.samples == (3,)


@kinds
def test_weights_are_still_blamed_where_it_is_they(kind):
    _, net = network(kind)
    with torch.no_grad():
        net.stages[0].b_z[0] = float("nan")
    with pytest.raises(lc.NotFiniteError, match="nothing can be proved about these weights") as caught:
        net(torch.zeros(2, *net.input_shape))
    assert caught.value.samples == ()


@kinds
def test_what_takes_a_batch_refuses_it_by_name(kind):
    model, net = network(kind)
    _, x, _ = batch(net, *BAD.values())
    labels = torch.zeros(COUNT, dtype=torch.long)
    for run in (
        lambda: lc.pgd(net, x, labels, 0.1),
        lambda: lc.apgd(net, x, labels, 0.1),
        lambda: lc.attack(net, x, labels, [0.1]),
        lambda: lc.empirical_lipschitz(net, x),
    ):
        with pytest.raises(lc.NotFiniteError, match=f"^x: {SAID}"):
            run()
    if "tuned" not in kind:
        with pytest.raises(lc.NotFiniteError, match=f"^inputs: {SAID}"):
            lc.validate(model, net, x)
    for run in (lambda: lc.finetune(net, (x, labels)), lambda: lc.train(model, (x, labels))):
        with pytest.raises(lc.NotFiniteError, match=f"^the inputs of the training data: {SAID}"):
            run()


def test_an_export_of_properties_names_the_sample_of_the_data(tmp_path):
    _, net = network("aol")
    x, spoiled, _ = batch(net, *BAD.values())
    with torch.no_grad():
        labels = net(x).argmax(1).tolist()
    with pytest.raises(lc.NotFiniteError, match=r"^the data: sample 2 "):
        lc.export_vnnlib(net, tmp_path / "folder", list(zip(spoiled, labels, strict=True)), 0.1)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_certificates_of_the_others_are_their_own(kind, dtype):
    net = network(kind)[1].to(dtype)
    x, spoiled, good = batch(net, *BAD.values())
    with torch.no_grad():
        labels = net(x).argmax(1)
    certifier = lc.Certifier(net, "pairwise")
    found, alone = certifier(spoiled, labels), certifier(x[good], labels[good])
    assert not bool(found["converged"][~good].any())
    assert not bool(found["correct"][~good].any())
    assert bool((found["radius"][~good] == -float("inf")).all())
    assert bool(found["converged"][good].all())
    torch.testing.assert_close(found["radius"][good], alone["radius"], rtol=1e-5, atol=1e-7)
    report = lc.certify(net, TensorDataset(spoiled, labels), method="pairwise", attack=lc.AttackConfig(steps=2))
    assert report.unconverged == len(ROWS)
    assert report.natural_accuracy == (COUNT - len(ROWS)) / COUNT


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_onnxruntime_answers_nan_for_those_alone(kind, dtype, tmp_path):
    net = network(kind)[1].to(dtype)
    x, spoiled, good = batch(net, *BAD.values())
    certifier = lc.Certifier(net, "pairwise")
    lc.save(net, tmp_path / "net.onnx", outputs=("residual", "radius"), certifier=certifier)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    logits, _, radius = session.run(None, {"input": spoiled.numpy()})
    with torch.no_grad():
        expected = net(x[good]).numpy()
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    np.testing.assert_allclose(logits[good], expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert not np.isfinite(logits[~good]).all(1).any()
    assert (radius[~good] == 0.0).all()
    assert np.isfinite(radius).all()
