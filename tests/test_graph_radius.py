"""The radius a graph returns is true of what onnxruntime computes, and no larger than what lipconvert certifies."""

import dataclasses

import onnxruntime
import pytest
import torch
from lipconvert_plugins.aol import AOLNetwork
from torch import nn

import lipconvert as lc
from lipconvert.certification.bounds import Bounds
from lipconvert.checkpoints.checkpoint import ERRORS, errors_of
from lipconvert.checkpoints.container import read
from lipconvert.onnx_export.onnx_plan import plan, road, stored_W

OUTPUTS = ("residual", "radius")


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path, x):
    logits, residual, radius = session(path).run(["logits", *OUTPUTS], {"input": x.numpy()})
    return torch.from_numpy(logits), torch.from_numpy(residual), torch.from_numpy(radius)


def trained(net, seed):
    """A few steps away from where W is triangular."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                size = parameter.square().mean().sqrt()
                parameter += 1e-2 * size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


def network(name):
    kind, _, how = name.partition(", ")
    index = 0 if how.startswith("dense") else -1
    model = lc.registry().example_models(kind, 0)[index].double()
    shape = getattr(model, "input_shape", None) or (lc.to_dae(model).inputs,)
    options = {"epsilon": 1e-3, "delta": 1e-1} if how.endswith("tuned") else {}
    net = lc.convert(nn.Sequential(lc.Normalize(0.3, 0.5), model, nn.Flatten()), shape, check=False, **options)
    return trained(net, 1) if how.endswith("tuned") else net


NAMES = [
    "aol, dense",
    "aol, images",
    "sll, dense tuned",
    "sll, images",
    "sll, images tuned",
    "sandwich, images",
    "cpl, dense",
    "mondeq, dense",
    "mondeq, images",
    "g_mondeq, dense",
    "lben, dense",
    "lben, images",
]
METHODS = {"substitution", "convolutions", "sweeps", "splitting"}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"], scope="module")
def dtype(request):
    return request.param


@pytest.fixture(params=NAMES, scope="module")
def saved(request, dtype, tmp_path_factory):
    """(network, certifier, path) with graph and radius."""
    net = network(request.param).to(dtype)
    certifier = lc.Certifier(net, "pairwise")
    path = tmp_path_factory.mktemp("saved") / "net.onnx"
    lc.save(net, path, outputs=OUTPUTS, certifier=certifier)
    return net, certifier, path


def test_all_methods_are_tried():
    found = set()
    for name in NAMES:
        for dtype in (torch.float32, torch.float64):
            found |= {plan(stage, "s", *stored_W(stage)).how.method for stage in network(name).to(dtype).stages}
    assert found == METHODS


@pytest.mark.parametrize("scale", [1e-42, 1e-3, 1.0, 1e2])
def test_outputs_are_within_the_error_bound(saved, dtype, scale):
    net, certifier, path = saved
    generator = torch.Generator().manual_seed(2)
    x = (scale * torch.rand(40, *net.input_shape, generator=generator, dtype=torch.float64)).to(dtype)
    logits, _, _ = run(path, x)
    close = certifier.accuracy.evaluate(x, double=True)
    errors = read(path).tensors[ERRORS]
    size = torch.linalg.vector_norm(x.double().flatten(1), dim=1)
    bound = errors[0] + errors[1] * size[:, None, None]
    y = logits.double()
    off = ((y.unsqueeze(2) - y.unsqueeze(1)) - (close.value.unsqueeze(2) - close.value.unsqueeze(1))).abs()
    own = 2.0**0.5 * close.error[:, 0][:, None, None]  # of the evaluation it is compared with
    assert bool((off <= bound + own).all())
    if scale == 1.0 and dtype == torch.float32:  # a bound that says something: not more than 10⁵ times what happens
        assert float(bound.max()) < 1e5 * float(off.max())


def test_no_samples(saved, dtype):
    net, _, path = saved
    x = torch.rand(2, *net.input_shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    both, none = run(path, x), run(path, x[:0])
    assert [y.dtype for y in none] == [y.dtype for y in both]
    assert [tuple(y.shape) for y in none] == [(0, *y.shape[1:]) for y in both]


def test_no_radius_is_larger_than_what_is_certified(saved, dtype):
    net, certifier, path = saved
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(30, *net.input_shape, generator=generator, dtype=torch.float64).to(dtype)
    logits, _, radius = run(path, x)
    # in float64, of the same floats: the smallest errors that can be subtracted
    ours = certifier(x, logits.argmax(1))["radius"][:, -1]
    assert radius.dtype == torch.float64
    assert bool((radius <= ours.clamp(min=0.0) * (1.0 + 1e-6) + 1e-12).all())
    assert bool((radius >= 0.0).all())
    if dtype == torch.float64:
        assert bool((radius > 0.0).any())
        # a loop stops at 1e-12, which a margin of (3) of 1e-2 or so makes more of
        torch.testing.assert_close(radius, ours.clamp(min=0.0), rtol=1e-4, atol=1e-8)


def test_no_class_changes_within_the_radius(saved, dtype):
    """Attacked in torch, judged by onnxruntime: at the radius itself, towards each rival, and beyond it some do change."""
    net, _, path = saved
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(30, *net.input_shape, generator=generator, dtype=torch.float64).to(dtype)
    logits, _, radius = run(path, x)
    labels = logits.argmax(1)
    worst, _ = lc.pgd(net, x, labels, radius, steps=20, restarts=3)
    after, _, _ = run(path, worst)
    distance = torch.linalg.vector_norm((worst.double() - x.double()).flatten(1), dim=1)
    assert bool((distance <= radius * (1.0 + 1e-12) + 1e-300).all())
    certified = radius > 0.0
    assert bool((after.argmax(1) == labels)[certified].all())
    far, _ = lc.pgd(net, x, labels, 30.0 * radius + 0.1, steps=20)
    assert bool((run(path, far)[0].argmax(1) != labels).any())


def test_what_has_no_answer_has_no_radius(saved, dtype):
    net, _, path = saved
    x = torch.rand(4, *net.input_shape, dtype=torch.float64).to(dtype)
    x[1].view(-1)[0] = float("nan")
    x[2].view(-1)[0] = float("inf")
    logits, _, radius = run(path, x)
    assert radius[1] == 0.0
    assert radius[2] == 0.0
    assert bool(torch.isfinite(radius).all())
    alone, _, own = run(path, x[:1])
    torch.testing.assert_close(alone, logits[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, radius[:1], rtol=1e-3, atol=1e-5)


def test_nothing_is_certified_where_numbers_vanish(tmp_path):
    """Among numbers of 1e-43 float32 has one digit: differences of logits say nothing."""
    torch.manual_seed(0)
    net = lc.convert(AOLNetwork(inputs=6, classes=3, features=8, dense_depth=1), check=False).float()
    with torch.no_grad():
        for stage in net.stages:
            stage.b_z.zero_()
            stage.b_y.zero_()
    lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    x = (1e-43 * torch.rand(200, 6)).float()
    assert not bool(run(tmp_path / "net.onnx", x)[2].any())
    assert not bool((lc.certified_radii(net, x, torch.zeros(200, dtype=torch.long)) > 0).any())


def test_normalisation_out_of_range_has_no_certificate(tmp_path):
    model = nn.Sequential(lc.Normalize(0.0, 1e38), AOLNetwork(inputs=6, classes=3))
    net = lc.convert(model, (6,), check=False).float()
    with pytest.raises(lc.NoCertificateError, match="std of Normalize"):
        lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(3))
def test_factors_next_to_one_are_not_dropped(tmp_path, seed):
    """onnxruntime drops factors that are 1 in float32: steps α, slopes and standard deviations in float64 are others."""
    torch.manual_seed(seed)
    near = 1.0 - 5e-9
    layers = AOLNetwork(inputs=6, classes=3, features=8, dense_depth=1, activation=nn.LeakyReLU(near))
    net = lc.convert(nn.Sequential(lc.Normalize(0.3, 1.0), layers).double(), (6,), check=False).float().double()
    with torch.no_grad():
        net.steps[0].std.fill_(1.0 + 3e-9)
        net.stages[0].b_z.add_(torch.randn(net.stages[0].b_z.shape, dtype=torch.float64))
    lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    x = torch.randn(20, 6, dtype=torch.float64)
    logits, residual, _ = run(tmp_path / "net.onnx", x)
    with torch.no_grad():
        expected = net(x)
    assert float((logits - expected).abs().max()) < 1e-11
    assert float(residual.max()) < 1e-11


def test_equal_logits_have_no_radius(tmp_path):
    linear = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3))
    net = lc.convert(nn.Sequential(linear, nn.ReLU()), check=False)
    lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    _, _, radius = run(tmp_path / "net.onnx", torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=torch.float64))
    assert radius[0] == 0.0
    assert float(radius[1]) == pytest.approx(0.5**0.5, rel=1e-5)  # |x₀ − x₁|/√2, exactly


def test_a_constant_network_is_certified_as_far_as_numbers_go(tmp_path):
    net = lc.convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).double(), check=False)
    with torch.no_grad():
        net.stages[0].U.zero_()
        net.stages[0].b_y.copy_(torch.tensor([1.0, 2.0]))
    lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    _, _, radius = run(tmp_path / "net.onnx", torch.zeros(2, 3, dtype=torch.float64))
    assert bool((radius > 1e3).all())
    assert bool(torch.isfinite(radius).all())


def planned(net, **update):
    plans = {k: plan(s, "s", *stored_W(s)) for k, s in enumerate(net.steps) if isinstance(s, lc.LBEN)}
    return {k: dataclasses.replace(p, how=p.how.model_copy(update=update)) for k, p in plans.items()}


def test_errors_grow_with_what_the_road_leaves_out():
    """A graph that solves loosely has larger error bounds by about as much; one that skips much of W has none."""
    net = network("mondeq, dense")
    certifier = lc.Certifier(net, "prescribed")
    before, loose = (errors_of(certifier, planned(net, tolerance=tolerance)) for tolerance in (1e-12, 1e-8))
    off = ~torch.eye(before.shape[-1], dtype=torch.bool)
    ratio = (loose[1] / before[1])[off]
    assert 1e3 < float(ratio.min()) <= float(ratio.max()) < 1e5
    net = network("sll, dense tuned")
    with pytest.raises(lc.NoCertificateError, match="no bound"):
        errors_of(lc.Certifier(net, "prescribed"), planned(net, method="substitution", tolerance=0.0))


def test_a_road_of_convolutions_counts_its_taps():
    net = network("sll, images").float()
    stage = net.stages[0]
    chosen = plan(stage, "s", *stored_W(stage))
    assert chosen.how.method == "convolutions"
    found = road(chosen, stage.running())
    assert found.pixels
    taps = (chosen.W != 0).flatten(2).sum((1, 2)) + (stage.U != 0).flatten(2).sum((1, 2))
    assert bool((found.counts[0] >= taps).all())
    assert bool((found.T[0] >= found.T[1] - 1e-15).all())  # Σ|K|, the same at every frequency
    spectra = stage.running().W.abs()
    assert bool((found.T + found.blurs[0] >= spectra - 1e-12).all())


def test_a_radius_needs_logits_and_proofs(tmp_path):
    images = lc.convert(lc.registry().example_models("lben", 0)[2].double(), check=False)
    with pytest.raises(lc.ShapeError):
        lc.save(images, tmp_path / "net.onnx", outputs=("radius",))
    with pytest.raises(lc.CheckpointError, match="'radii' is none of"):
        lc.save(images, tmp_path / "net.onnx", outputs=("radii",))
    other = lc.convert(lc.registry().example_models("aol", 0)[0].double(), check=False)
    certifier = lc.Certifier(other)
    with torch.no_grad():
        other.stages[0].V.mul_(1.01)
    with pytest.raises(lc.NoCertificateError, match="changed"):
        lc.save(other, tmp_path / "net.onnx", outputs=("radius",), certifier=certifier)
    with pytest.raises(lc.CheckpointError, match="another network"):
        lc.save(lc.convert(lc.registry().example_models("aol", 0)[0]), tmp_path / "net.onnx", certifier=certifier)
    assert list(tmp_path.iterdir()) == []
    assert Bounds(other).classes is not None


def test_class_names_are_as_many_as_classes(tmp_path):
    net = lc.convert(AOLNetwork(inputs=6, classes=3), check=False)
    net.class_names = ("a", "b")
    with pytest.raises(lc.CheckpointError, match="there are 2, and 3 outputs"):
        lc.save(net, tmp_path / "net.onnx")
    net.class_names = ("a", "b", "c")
    lc.save(net, tmp_path / "net.onnx")
    assert lc.load(tmp_path / "net.onnx").class_names == ("a", "b", "c")


def test_weights_that_are_no_numbers_are_not_written(tmp_path):
    net = lc.convert(AOLNetwork(inputs=6, classes=3), check=False)
    with torch.no_grad():
        net.stages[0].V[0, 0] = float("nan")
    for name in ("net.onnx", "net.safetensors"):
        with pytest.raises(lc.CheckpointError, match=r"steps\.0\.V.*NaN"):
            lc.save(net, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", [0.5, 0.97])
def test_smaller_errors_or_pairs_are_found_out(tmp_path, factor):
    net = network("aol, dense").float()
    lc.save(net, tmp_path / "net.onnx", outputs=OUTPUTS)
    assert lc.verify(tmp_path / "net.onnx", seed=0).passed
    for key in (ERRORS, "pairs"):
        stored = read(tmp_path / "net.onnx")
        tensors = dict(stored.tensors) | {key: factor * stored.tensors[key]}
        forge(tmp_path / "forged.onnx", net, stored.manifest, tensors)
        report = lc.verify(tmp_path / "forged.onnx", seed=0)
        assert not report.passed
        assert len(report.failures()) == 1


def forge(path, net, manifest, tensors):
    """A single file with other tensors, and the hashes that belong to them."""
    from lipconvert.checkpoints.checkpoint import embedded, graph_of
    from lipconvert.checkpoints.container import entry_of, write_graph

    entries = [entry_of(name, tensor) for name, tensor in sorted(tensors.items())]
    manifest = manifest.model_copy(update={"tensors": entries})
    plans = {k: plan(s, f"stage_{k}", *stored_W(s)) for k, s in enumerate(net.steps) if isinstance(s, lc.LBEN)}
    write_graph(path, graph_of(net, plans, embedded(tensors), OUTPUTS, manifest))
