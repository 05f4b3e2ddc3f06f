"""A batch of no samples gives no answers, of the right shape, or an error by name; so does a V of no rows.

Every public name is either walked here or says that it takes no batch: a new one cannot be forgotten. Gradients with
respect to parameters are those of an empty sum, exactly 0.
"""

import inspect

import pytest
import torch
from lipconvert_plugins.aol import AOLConv2d, AOLLinear
from lipconvert_plugins.cpl import CPLConv2d
from lipconvert_plugins.sandwich import SandwichConv2d
from lipconvert_plugins.sll import SLLConv2d
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipconvert as lc
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import METHODS as BOUNDS
from lipconvert.certification.bounds import Bounds
from lipconvert.conversion.validate import jacobian
from lipconvert.dae.activations import _TABLE
from lipconvert.equilibria.equilibrium import METHODS, evaluate
from lipconvert.networks.glue import KNOWN
from lipconvert.training.augment import Augmentation
from lipconvert.training.documents import AugmentConfig
from lipconvert.training.finetune import Samples, margin_loss

NONE = torch.zeros(0, dtype=torch.long)


def shape_of(model):
    return getattr(model, "input_shape", None) or (lc.to_dae(model).inputs,)


def example(name, index):
    return lc.registry().example_models(name, 0)[index].double().eval()


def made(kind):
    """(source, network): every way of solving, dense and on images, strided, with glue that moves pixels."""
    torch.manual_seed(0)
    name, _, how = kind.partition(", ")
    if name == "strided":
        model = nn.Sequential(
            AOLConv2d(1, 2, 3, stride=2), nn.PixelUnshuffle(2), nn.PixelShuffle(2), SLLConv2d(2), nn.Flatten()
        ).double()
        return model, lc.convert(model, (1, 4, 4), check=False)
    model = example(name, -1 if "images" in how else 0)
    model = nn.Sequential(lc.Normalize(0.3, 0.5), model, nn.Flatten())
    options = {"epsilon": 1e-3, "delta": 1e-1} if "tuned" in how else {}
    net = lc.convert(model, shape_of(model[1]), check=False, **options)
    if "tuned" in how:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 1e-2 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    return model, net


KINDS = ["aol", "sll, tuned", "mondeq", "sandwich, images", "sll, images tuned", "g_mondeq, images", "strided, images"]


class Case:
    """A source, its network and a batch of no samples."""

    def __init__(self, kind, dtype):
        self.kind, (self.model, net) = kind, made(kind)
        self.net = net.to(dtype)
        self.x = torch.zeros(0, *net.input_shape, dtype=dtype)
        with torch.no_grad():
            self.classes = net(torch.zeros(1, *net.input_shape, dtype=dtype)).shape[1]
        self.one = torch.rand(1, *net.input_shape, dtype=dtype)
        self.tuned = kind.endswith("tuned")


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"], scope="module")
def dtype(request):
    return request.param


@pytest.fixture(params=KINDS, scope="module")
def case(request, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield Case(request.param, dtype)
    torch.set_default_dtype(before)


def is_none(y, *shape, dtype=None):
    """A tensor of no samples."""
    assert tuple(y.shape) == (0, *shape)
    assert dtype is None or y.dtype == dtype


def without_gradients(module, x, *shape):
    """Forward and backward of no samples: as many gradients as inputs, and exactly nothing for the parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    is_none(y, *shape, dtype=x.dtype)
    trained = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.sum(), [x, *trained], allow_unused=True)
    is_none(found[0], *x.shape[1:], dtype=x.dtype)
    assert all(g is None or not bool(g.any()) for g in found[1:])


def in_both_modes(case, module, x, *shape):
    without_gradients(module, x, *shape)
    with torch.no_grad():
        is_none(module(x), *shape, dtype=x.dtype)


def walk_network(case, folder):
    in_both_modes(case, case.net, case.x, case.classes)
    assert case.net.methods(case.x) == case.net.methods(case.one)
    is_none(jacobian(case.net, case.x), case.classes, case.one.numel())


def walk_lben(case, folder):
    for stage in case.net.stages:
        x = case.x.new_zeros(0, *stage.input_shape)
        outputs = (len(stage.b_y), *stage.grid.image)
        in_both_modes(case, stage, x, *outputs)
        in_both_modes(case, stage, x.reshape(0, 2, *stage.input_shape), 2, *outputs)
        states = (len(stage.b_z), *stage.grid.batch)
        solution = stage.solve(x)
        is_none(solution.value, *states)
        for each in (solution.residual, solution.scale, solution.steps, solution.status, solution.converged):
            is_none(each)
        is_none(solution.relative_residual)
        is_none(stage.drive(x), *states)
        is_none(stage.readout(solution.value), *outputs, dtype=x.dtype)
        if x.dtype == torch.float64:
            is_none(evaluate(stage.dae(), x), *outputs)


def walk_solve(case, folder):
    for stage in case.net.stages:
        u = stage.drive(case.x.new_zeros(0, *stage.input_shape))
        for method in METHODS:
            if method == "newton" and stage.grid:
                continue
            found = lc.solve(stage.state_map(), stage.sigma, u, lc.SolverOptions(method=method))
            is_none(found.value, *u.shape[1:], dtype=u.dtype)
            assert found.method


def walk_equilibrium(case, folder):
    for stage in case.net.stages:
        u = stage.drive(case.x.new_zeros(0, *stage.input_shape)).requires_grad_()
        W = stage.state_map().W.clone().requires_grad_()
        z = lc.equilibrium(W, u, stage.sigma, lc.StateMap(W, grid=stage.grid))
        is_none(z, *u.shape[1:], dtype=u.dtype)
        dW, du = torch.autograd.grad(z.abs().sum(), (W, u))
        is_none(du, *u.shape[1:], dtype=u.dtype)
        assert dW.shape == W.shape
        assert not bool(dW.any())


def walk_state_map(case, folder):
    for stage in case.net.stages:
        map = stage.state_map()
        z = stage.drive(case.x.new_zeros(0, *stage.input_shape))
        for y in (map.apply(z), map.adjoint.apply(z), map.resolvent(z, 1.0), map.resolvent(z, 1.0, z)):
            is_none(y, *z.shape[1:], dtype=z.dtype)
        is_none(map.norm(z), dtype=z.real.dtype)
        if not stage.grid:
            is_none(map.newton_step(z, z), *z.shape[1:])
        for block in map.order:
            size = block.stop - block.start
            is_none(map.rows(block, z, z), size, *z.shape[2:])
            is_none(map.rows_below(block, z, z), size, *z.shape[2:])


def walk_grid(case, folder):
    for image in ((), (4, 3), (1, 1)):
        grid = lc.Grid(image)
        x = torch.zeros(0, 2, *image, dtype=case.x.dtype, requires_grad=True)
        X = grid.coordinates(x)
        is_none(X, 2, *grid.batch, dtype=x.dtype.to_complex() if image else x.dtype)
        back = grid.values(X)
        is_none(back, 2, *image, dtype=x.dtype)
        is_none(torch.autograd.grad(back.sum(), x)[0], 2, *image, dtype=x.dtype)
        M = grid.convolution(torch.ones(3, 2, *image, dtype=x.dtype) if image else torch.ones(3, 2, dtype=x.dtype))
        is_none(grid.apply(M, X), 3, *grid.batch)
        is_none(grid.affine(M, X, x.new_zeros(3)), 3, *grid.batch)
        is_none(grid.apply_onto(grid.apply(M, X), M, X), 3, *grid.batch)
        is_none(grid.constant(x.new_zeros(3), 0), 3, *grid.batch)
        is_none(grid.norm(X))
        is_none(grid.channel_norms(X), 2)
        is_none(grid.samples(grid.columns(X)), 2, *grid.batch)
        # operators of no rows and of no columns, there and back
        for rows, columns in ((0, 2), (2, 0)):
            K = torch.zeros(rows, columns, *image, dtype=x.dtype, requires_grad=True)
            N = grid.matrices(K)
            assert tuple(N.shape) == (*grid.batch, rows, columns)
            again = grid.kernels(N)
            assert (again.shape, again.dtype) == (K.shape, K.dtype)
            assert torch.autograd.grad(again.sum(), K)[0].shape == K.shape


def walk_certifier(case, folder):
    certifier = lc.Certifier(case.net, "pairwise")
    for x in (case.x, case.x.double()):
        found = certifier(x, NONE)
        assert set(found) == set(certifier(case.one, torch.tensor([0])))
        is_none(found.pop("radius"), 2, dtype=torch.float64)
        for value in found.values():
            is_none(value)
    error = Accuracy(Bounds(case.net)).evaluate(case.x)
    is_none(error.value, case.classes, dtype=case.x.dtype)
    is_none(error.error, 2)
    is_none(error.converged)


def walk_certified_radii(case, folder):
    for method in BOUNDS:
        is_none(lc.certified_radii(case.net, case.x, NONE, method), dtype=torch.float64)


def walk_certify(case, folder):
    for data in ([], TensorDataset(case.x, NONE), DataLoader(TensorDataset(case.x, NONE)), DataLoader([])):
        with pytest.raises(lc.InvalidParameterError, match="data is empty"):
            lc.certify(case.net, data, method="pairwise")
    # batches of a loader some of which are empty
    label = torch.tensor([1])
    batches = [(case.x, NONE), (case.one, label), (case.x, NONE)]
    report = lc.certify(
        case.net, DataLoader(batches, batch_size=None), method="pairwise", attack=lc.AttackConfig(steps=1)
    )
    alone = lc.certify(case.net, [(case.one[0], 1)], method="pairwise", attack=lc.AttackConfig(steps=1))
    assert report.samples == 1
    assert (report.margins, report.sample_radii) == (alone.margins, alone.sample_radii)


def walk_ascent(case, ascend):
    for box in (None, (0.0, 1.0)):
        for radius in (0.1, torch.zeros(0)):
            for loss in ("margin", "cross_entropy", "dlr"):
                x, margin = ascend(case.net, case.x, NONE, radius, steps=2, restarts=2, loss=loss, box=box)
                is_none(x, *case.x.shape[1:], dtype=case.x.dtype)
                is_none(margin, dtype=case.x.dtype)


def walk_attack(case, folder):
    for method in ("pgd", "apgd"):
        found = lc.attack(case.net, case.x, NONE, [0.2, 0.1], method=method, steps=2, restarts=2)
        assert tuple(found.shape) == (2, 0)
        assert found.dtype == torch.bool
        # a radius that breaks nothing new, and one that breaks all
        label = case.net(case.one).argmax(1)
        found = lc.attack(case.net, case.one, label, [0.0, 1e-9, 2e-9, 1e3], method=method, steps=8, restarts=2)
        assert found[:3].all()


def walk_empirical_lipschitz(case, folder):
    with pytest.raises(lc.InvalidParameterError, match="x is empty"):
        lc.empirical_lipschitz(case.net, case.x)


def walk_validate(case, folder):
    if case.tuned:
        return
    with pytest.raises(lc.InvalidParameterError, match="inputs is empty"):
        lc.validate(case.model, case.net, case.x.double())


def walk_finetune(case, folder):
    config = lc.TrainingConfig(epochs=1, batch_size=4)
    for data in ([], TensorDataset(case.x, NONE), (case.x, NONE), DataLoader([])):
        with pytest.raises(lc.InvalidParameterError, match="the training data is empty"):
            lc.finetune(case.net, data, config=config)
        with pytest.raises(lc.InvalidParameterError, match="the training data is empty"):
            lc.train(case.model, data, config=config)
    x, labels = case.one.repeat(3, *[1] * (case.one.dim() - 1)), torch.tensor([0, 1, 0])
    assert len(Samples.of(DataLoader([(case.x, NONE), (x, labels)], batch_size=None), "the data")) == 3
    for reduction in ("sum", "none"):
        y = margin_loss(case.net(case.x), NONE, 0.1, 1.0, reduction)
        assert not bool(y.any())


def walk_explicit(case, folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    if set(case.net.methods(case.one)) != {"forward_substitution"}:
        with pytest.raises(lc.CheckpointError, match="no feed-forward form"):
            lc.explicit(case.net)
        return
    graph = lc.explicit(case.net)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    is_none(session.run(None, {"input": case.x.float().numpy()})[0], case.classes)


def walk_save(case, folder):
    """The graph beside the weights, and the network that is loaded."""
    onnxruntime = pytest.importorskip("onnxruntime")
    for inline in (False, True):
        path = folder / f"net{inline}.onnx"
        certifier = lc.Certifier(case.net, "pairwise")
        lc.save(case.net, path, outputs=("residual", "radius"), certifier=certifier, inline=inline, embed=inline)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits, residual, radius = session.run(None, {"input": case.x.numpy()})
        is_none(logits, case.classes, dtype=case.x.numpy().dtype)
        is_none(residual)
        is_none(radius)
        is_none(lc.load(path)(case.x), case.classes, dtype=case.x.dtype)


def walk_export_vnnlib(case, folder):
    if case.kind in ("aol", "sandwich, images"):
        with pytest.raises(lc.DataError, match="none of 0 samples"):
            lc.export_vnnlib(case.net, folder, [], 0.1)
    with pytest.raises(lc.ShapeError, match="the sample"):
        lc.write_vnnlib(folder / "p.vnnlib", torch.zeros(0), 0, 2, 0.1)


def walk_convolutions(case, folder):
    x = torch.zeros(0, 3, 6, 4, dtype=case.x.dtype, requires_grad=True)
    weight = torch.ones(5, 3, 3, 2, dtype=case.x.dtype, requires_grad=True)
    for padding_mode in ("circular", "zeros"):
        for stride in (1, 2):
            y = lc.conv2d_same(x, weight, stride=stride, padding_mode=padding_mode)
            is_none(y, 5, 6 // stride, 4 // stride, dtype=x.dtype)
            dx, dw = torch.autograd.grad(y.sum(), (x, weight))
            is_none(dx, 3, 6, 4)
            assert dw.shape == weight.shape
            assert not bool(dw.any())
        is_none(lc.conv2d_adjoint(torch.zeros(0, 5, 6, 4, dtype=x.dtype), weight, padding_mode), 3, 6, 4, dtype=x.dtype)
    y = lc.pixel_unshuffle(x, 2)
    is_none(y, 12, 3, 2, dtype=x.dtype)
    is_none(torch.autograd.grad(y.sum(), x)[0], 3, 6, 4)
    with torch.no_grad():
        torch.testing.assert_close(lc.pixel_unshuffle(case.x.new_ones(1, 3, 6, 4), 2), case.x.new_ones(1, 12, 3, 2))


def walk_linear_solve(case, folder):
    assert lc.linear_solve(torch.eye(3), torch.zeros(3, 0)).shape == (3, 0)
    assert lc.linear_solve(torch.zeros(0, 3, 3), torch.zeros(0, 3, 2)).shape == (0, 3, 2)


def walk_glue(case, folder):
    x, flat = torch.zeros(0, 4, 6, 2, dtype=case.x.dtype), torch.zeros(0, 4, dtype=case.x.dtype)
    for module, expected in (
        (lc.Normalize([0.0] * 4, [1.0] * 4), (4, 6, 2)),
        (lc.PadChannels(7), (7, 6, 2)),
        (lc.FirstFeatures(3), (3,)),
        (lc.MeanPool(2), (4, 3, 1)),
        (lc.MaxMin(), (4, 6, 2)),
    ):
        given = flat if isinstance(module, lc.FirstFeatures) else x
        without_gradients(module.to(x.dtype), given, *expected)


def walk_activations(case, folder):
    for name in _TABLE:
        sigma = lc.Activations(name, 4)
        v = torch.zeros(0, 4, dtype=case.x.dtype)
        for y in (sigma(v), sigma.slope(v), sigma.prox(v, 1.0), lc.activation_module(name)(v)):
            is_none(y, 4, dtype=v.dtype)


def walk_full_precision(case, folder):
    class Layer(nn.Linear):
        forward = lc.full_precision(nn.Linear.forward)

    layer = Layer(3, 2).to(case.x.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        is_none(layer(torch.zeros(0, 3, dtype=case.x.dtype)), 2, dtype=case.x.dtype)


def walk_psd(case, folder):
    """Matrices of no rows, and a batch of none."""
    none = torch.zeros(0, 0)
    assert lc.psd_sqrt(none, "H").shape == lc.psd_factor(none, "H").shape == (0, 0)
    assert lc.psd_sqrt(torch.zeros(0, 3, 3), "H").shape == lc.psd_factor(torch.zeros(0, 3, 3), "H").shape == (0, 3, 3)
    for M in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(0, 3, 2)):
        assert float(lc.spectral_norm(M)) == 0.0


WALKED = {
    "Network": walk_network,
    "LBEN": walk_lben,
    "Solution": walk_lben,
    "solve": walk_solve,
    "SolverOptions": walk_solve,
    "equilibrium": walk_equilibrium,
    "StateMap": walk_state_map,
    "Grid": walk_grid,
    "Certifier": walk_certifier,
    "certified_radii": walk_certified_radii,
    "certify": walk_certify,
    "AttackConfig": walk_certify,
    "pgd": lambda case, folder: walk_ascent(case, lc.pgd),
    "apgd": lambda case, folder: walk_ascent(case, lc.apgd),
    "attack": walk_attack,
    "empirical_lipschitz": walk_empirical_lipschitz,
    "validate": walk_validate,
    "finetune": walk_finetune,
    "train": walk_finetune,
    "explicit": walk_explicit,
    "save": walk_save,
    "load": walk_save,
    "export_vnnlib": walk_export_vnnlib,
    "write_vnnlib": walk_export_vnnlib,
    "conv2d_same": walk_convolutions,
    "conv2d_adjoint": walk_convolutions,
    "pixel_unshuffle": walk_convolutions,
    "linear_solve": walk_linear_solve,
    "Normalize": walk_glue,
    "PadChannels": walk_glue,
    "FirstFeatures": walk_glue,
    "MeanPool": walk_glue,
    "MaxMin": walk_glue,
    "Activations": walk_activations,
    "activation_module": walk_activations,
    "full_precision": walk_full_precision,
    "psd_sqrt": walk_psd,
    "psd_factor": walk_psd,
    "spectral_norm": walk_psd,
}

# What takes a model, a DAE, a file, weights or words, and makes its own samples if it needs any.
TAKE_NO_BATCH = """
DAE Activation Conditions Enclosure FinetuneReport H_matrix LipschitzBound Manifest NotProved Plugin
count number PluginInfo Proof
Provenance Registry RobustnessReport Status TrainingConfig TrainingSummary ValidationReport VerificationReport X_matrix
absorb activation_of affine check coarsen compose computes_as convert dense_operator densify elementwise eliminate from_hub
from_state_dict gauge hookimpl lipschitz_bound max_min plugins prove_constant prove_gains prove_lmi prove_monotone
push_to_hub read_manifest read_weights registry required_option scale strict_multiplier strided_weight to_dae verify
write_report
"""
NO_BATCH = set(TAKE_NO_BATCH.split())
REPORTS = {"RobustnessReport", "FinetuneReport", "TrainingSummary"}  # there ``data`` is a word


def test_no_public_name_is_forgotten():
    errors = {
        name for name in lc.__all__ if inspect.isclass(getattr(lc, name)) and issubclass(getattr(lc, name), Exception)
    }
    assert not set(WALKED) & NO_BATCH
    assert set(WALKED) | NO_BATCH | errors == set(lc.__all__)
    # A tensor called x, u or inputs is a batch.
    for name in NO_BATCH:
        parameters = inspect.signature(getattr(lc, name)).parameters if name != "Status" else {}
        assert not {"x", "u", "inputs", "labels", "data"} & set(parameters) or name in REPORTS


@pytest.mark.parametrize("name", {walk: name for name, walk in reversed(WALKED.items())}.values())
def test_no_samples(name, case, tmp_path):
    WALKED[name](case, tmp_path)


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n in lc.registry().names() for i in range(len(lc.registry().example_models(n, 0)))]
)
def test_models_of_every_architecture(name, index, dtype):
    model = example(name, index).to(dtype)
    shape = shape_of(model)
    with torch.no_grad():
        outputs = model(torch.zeros(1, *shape, dtype=dtype)).shape[1:]
    in_both_modes(None, model, torch.zeros(0, *shape, dtype=dtype), *outputs)
    net = lc.convert(model, shape, check=False).to(dtype)
    in_both_modes(None, net, torch.zeros(0, *shape, dtype=dtype), *outputs)


LAYERS = {
    "AOLLinear": (lambda: AOLLinear(3, 2), (3,)),
    "AOLConv2d, strided": (lambda: AOLConv2d(2, 3, 3, stride=2), (2, 4, 6)),
    "AOLConv2d, zeros": (lambda: AOLConv2d(2, 3, 3, padding_mode="zeros"), (2, 4, 6)),
    "SandwichConv2d": (lambda: SandwichConv2d(2, 3, 3), (2, 4, 5)),
    "SandwichConv2d, strided": (lambda: SandwichConv2d(2, 3, 2, stride=2), (2, 4, 6)),
    "SLLConv2d": (lambda: SLLConv2d(2, 3), (2, 4, 5)),
    "CPLConv2d": (lambda: CPLConv2d(2, 3), (2, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_layer_converts_and_takes_no_samples(name):
    """V of 0 rows, where the layer keeps its constant exactly; on images every transform of it is of nothing."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.rand(3, *shape)
    for dense in (False, True):
        if "zeros" in name and not dense:
            continue
        net = lc.convert(layer, shape, check=False, dense=dense)
        with torch.no_grad():
            expected = layer(x)
            torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
        without_gradients(layer, x[:0], *expected.shape[1:])
        without_gradients(net, x[:0], *expected.shape[1:])


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Softplus(), nn.ELU(), nn.LeakyReLU(), nn.Hardtanh()])
def test_dense_form_of_images_with_any_activation(activation):
    torch.manual_seed(0)
    model = nn.Sequential(AOLConv2d(1, 2, 3), activation, AOLConv2d(2, 1, 3)).double()
    net = lc.convert(model, (1, 3, 4), dense=True)
    x = torch.rand(4, 1, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-10, atol=1e-10)
        is_none(net(x[:0]), 1, 3, 4)


def test_all_glue_of_the_core_takes_no_samples():
    """Also torch's own, of which PixelUnshuffle leaves the shape of no samples as it was."""
    modules = {
        nn.Flatten: (nn.Flatten(), (4, 6, 2)),
        nn.Unflatten: (nn.Unflatten(1, (2, 2)), (4, 6, 2)),
        nn.Identity: (nn.Identity(), (4, 6, 2)),
        nn.AvgPool2d: (nn.AvgPool2d(2), (4, 6, 2)),
        nn.PixelShuffle: (nn.PixelShuffle(2), (4, 6, 2)),
        nn.PixelUnshuffle: (nn.PixelUnshuffle(2), (4, 6, 2)),
        lc.Normalize: (lc.Normalize(0.0, 0.5), (4, 6, 2)),
        lc.PadChannels: (lc.PadChannels(5), (4, 6, 2)),
        lc.FirstFeatures: (lc.FirstFeatures(2), (4,)),
        lc.MeanPool: (lc.MeanPool(2), (4, 6, 2)),
        lc.MaxMin: (lc.MaxMin(), (4, 6, 2)),
    }
    assert set(modules) == set(KNOWN)
    for module, shape in modules.values():
        net = lc.Network([module], [None], shape)
        expected = module(torch.zeros(1, *shape)).shape[1:]
        in_both_modes(None, net, torch.zeros(0, *shape), *expected)
        accuracy = Accuracy(Bounds(net))
        is_none(accuracy.evaluate(torch.zeros(0, *shape)).value, *expected)


def test_no_samples_are_augmented_to_none():
    config = AugmentConfig(
        crop=2, flip=True, brightness=(0.5, 1.5), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=0.1
    )
    augment = Augmentation(config, (3, 8, 8))
    is_none(augment(torch.zeros(0, 3, 8, 8), augment.draw(0, torch.Generator())), 3, 8, 8)
