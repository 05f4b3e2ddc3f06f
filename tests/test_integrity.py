"""What is certified, attacked, converted and saved is what ``module(x)`` runs: hooks, replaced methods, in-place modules.

Right values: which class a network gives at points that an attack on its hooked form finds, the same network without
``inplace``, torch's own activations in float64, differences of values.
"""

import copy
import functools
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLLinear, SLLNetwork
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import TensorDataset

import lipconvert as lc
from lipconvert.certification.bounds import Bounds
from lipconvert.dae.activations import _MODULES, is_activation
from lipconvert.foundation.integrity import computes_as
from lipconvert.foundation.shards import fingerprint
from lipconvert.interop import hub

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def source(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(lc.Normalize(0.5, 2.0), SLLLinear(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@functools.cache
def _converted(seed: int, dtype: torch.dtype) -> lc.Network:
    return lc.convert(source(seed), (6,))


def network(seed: int = 0) -> lc.Network:
    return copy.deepcopy(_converted(seed, torch.get_default_dtype()))


def inputs(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Every public function that speaks of a converted network, after whatever was done to it.

X = inputs()
LABELS = torch.zeros(len(X), dtype=torch.long)
DATA = TensorDataset(X, LABELS)
TINY = lc.TrainingConfig(epochs=1, batch_size=6, held_out=0)

ENTRIES = {
    "certify": lambda net, path: lc.certify(net, DATA),
    "certified_radii": lambda net, path: lc.certified_radii(net, X, LABELS),
    "Certifier": lambda net, path: lc.Certifier(net),
    "lipschitz_bound": lambda net, path: lc.lipschitz_bound(net, "prescribed"),
    "pgd": lambda net, path: lc.pgd(net, X, LABELS, 0.1, steps=2),
    "apgd": lambda net, path: lc.apgd(net, X, LABELS, 0.1, steps=2),
    "attack": lambda net, path: lc.attack(net, X, LABELS, [0.1], steps=2),
    "empirical_lipschitz": lambda net, path: lc.empirical_lipschitz(net, X, steps=2),
    "save": lambda net, path: lc.save(net, path / "net.safetensors", prove=False),
    "save without a graph": lambda net, path: lc.save(net, path / "net.onnx"),
    "push_to_hub": lambda net, path: hub.write_folder(net, path),
    "validate": lambda net, path: lc.validate(source(), net),
    "finetune": lambda net, path: lc.finetune(net, DATA, config=TINY),
    "explicit": lambda net, path: lc.explicit(net),
    "export_vnnlib": lambda net, path: lc.export_vnnlib(net, path, DATA, 0.1),
    "convert": lambda net, path: lc.convert(net),
    "to_dae": lambda net, path: lc.to_dae(net),
}
STAGE_ENTRIES = {
    "prove_constant": lambda stage: lc.prove_constant(stage.running()),
    "prove_lmi": lambda stage: lc.prove_lmi(lc.Enclosure.of(stage.running()), stage.running().Lambda, 1.0),
    "check": lambda stage: lc.check(stage.dae()),
    "a DAE": lambda stage: lc.to_dae(stage),
}


def triple(module, args, output):
    return output * 3.0


HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(triple),
    "forward hook with keywords": lambda m: m.register_forward_hook(lambda m, a, k, o: o * 3.0, with_kwargs=True),
    "forward hook that is always called": lambda m: m.register_forward_hook(triple, always_call=True),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 3.0,)),
    "forward pre-hook with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 3.0,), kwargs), with_kwargs=True
    ),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, gi, go: tuple(0 * g for g in gi)),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, go: tuple(0 * g for g in go)),
}
PLACES = {
    "the network (Network)": lambda net: net,
    "steps (ModuleList)": lambda net: net.steps,
    "steps.0 (Normalize)": lambda net: net.steps[0],
    "steps.1 (LBEN)": lambda net: net.steps[1],
}


def test_a_hook_would_break_certificates(monkeypatch):
    """What is at stake, without the guard: points strictly inside certified radii at which ``net(x)`` gives another class."""
    monkeypatch.setattr("lipconvert.networks.lben.require_own", lambda *args: None)
    monkeypatch.setattr("lipconvert.certification.bounds.require_own", lambda *args: None)
    monkeypatch.setattr(sys.modules["lipconvert.attacks.logits"], "require_own", lambda *args: None)
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    net = lc.convert(nn.Sequential(layer))
    net.register_forward_hook(lambda m, args, y: y - torch.tensor([0.05, 0.0]))
    x = torch.rand(50, 2)
    labels = net(x).argmax(1)
    radius = lc.certified_radii(net, x, labels)
    found, margin = lc.pgd(net, x, labels, radius.clamp(min=0.0) * 0.999, steps=50)
    broken = (radius > 0) & (margin <= 0)
    assert int(broken.sum()) >= 15  # nearly all of the first class
    inside = torch.linalg.vector_norm(found - x, dim=1) < radius
    assert bool((net(found).argmax(1) != labels)[broken].any())
    assert bool(inside[broken].all())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("hook", ["forward hook", "forward pre-hook", "backward hook"])
def test_hooks_are_refused_by_name_in_every_function(entry, hook, tmp_path):
    for place, module in PLACES.items():
        net = network()
        handle = HOOKS[hook](module(net))
        with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match=hook) as caught:
            ENTRIES[entry](net, tmp_path)
        assert place.split(" (")[1][:-1] in str(caught.value)
        assert caught.value.path == place.split(" (")[0].replace("the network", "")
        handle.remove()
    ENTRIES[entry](net, tmp_path)  # and without it there is nothing to refuse


@pytest.mark.parametrize("hook", HOOKS)
def test_every_kind_of_hook_is_seen_before_and_after_a_certifier_was_made(hook):
    for place, module in PLACES.items():
        net = network()
        certifier = lc.Certifier(net)
        certifier(X, LABELS)
        handle = HOOKS[hook](module(net))
        for refuse in (lambda net=net: lc.Certifier(net), lambda c=certifier: c(X, LABELS)):
            with pytest.raises(lc.ModifiedModuleError, match=place.replace("(", r"\(").replace(")", r"\)")):
                refuse()
        handle.remove()
        certifier(X, LABELS)


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_global_hooks_are_refused(register, tmp_path):
    net, model = network(), source()
    certifier = lc.Certifier(net)
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda *args: None)
    try:
        for entry in ENTRIES.values():
            with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match="a global"):
                entry(net, tmp_path)
        for entry in STAGE_ENTRIES.values():
            with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match="a global"):
                entry(net.stages[0])
        with pytest.raises(lc.ModifiedModuleError, match="a global"):
            certifier(X, LABELS)
        with pytest.raises(lc.UnsupportedModuleError, match="a global"):
            lc.convert(model, (6,))
    finally:
        handle.remove()
    certifier(X, LABELS)


@pytest.mark.parametrize("entry", STAGE_ENTRIES)
def test_proofs_of_one_stage_refuse_as_well(entry):
    stage = network().stages[0]
    STAGE_ENTRIES[entry](stage)
    handle = stage.register_forward_hook(triple)
    with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match="forward hook"):
        STAGE_ENTRIES[entry](stage)
    handle.remove()
    stage.solve = functools.partial(lc.LBEN.solve, stage)
    with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match="its solve was set on this one"):
        STAGE_ENTRIES[entry](stage)


# Methods that are not the class's own.

STAGE_METHODS = (
    "forward",
    "_call_impl",
    "readout",
    "solve",
    "drive",
    "running",
    "state_map",
    "matrices",
    "assembled",
    "dae",
)
GLUE_METHODS = ("forward", "_call_impl", "_wrapped_call_impl", "_slow_forward", "train", "state_dict")


@pytest.mark.parametrize(
    ("step", "name"), [*((1, name) for name in STAGE_METHODS), *((0, name) for name in (*GLUE_METHODS, "lipschitz_"))]
)
def test_methods_set_on_an_instance_are_refused_before_and_after(step, name):
    name = name.rstrip("_")
    net = network()
    certifier = lc.Certifier(net)
    module = net.steps[step]
    if name == "lipschitz":  # a property of Normalize cannot be hidden; the number of PadChannels could
        net = lc.Network([lc.PadChannels(6), *net.steps], [None] * 3, (6,)).eval()
        certifier, module = lc.Certifier(net), net.steps[0]
        module.lipschitz = 0.1
    else:
        setattr(module, name, functools.partial(getattr(type(module), name), module))
    for refuse in (lambda: certifier(X, LABELS), lambda: lc.Certifier(net), lambda: lc.pgd(net, X, LABELS, 0.1)):
        with pytest.raises(lc.ModifiedModuleError, match=f"its {name} was set on this one module"):
            refuse()


@pytest.mark.parametrize("name", ["forward", "checked", "set_options"])
def test_methods_set_on_the_network_are_refused(name):
    net = network()
    setattr(net, name, lambda *args: 3.0 * lc.Network.forward(net, *args))
    with pytest.raises(lc.ModifiedModuleError, match=f"the network.*its {name} was set"):
        lc.certified_radii(net, X, LABELS)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (nn.ReLU, "forward"),
        (nn.Module, "_call_impl"),
        (nn.ModuleList, "__iter__"),
        (lc.Normalize, "forward"),
        (lc.Network, "forward"),
        (lc.LBEN, "readout"),
        (lc.LBEN, "_solve"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_methods_replaced_on_a_class_are_seen(kind, name, monkeypatch):
    net = network()
    net = lc.Network([nn.ReLU(), *net.steps], [None] * 3, (6,)).eval()
    certifier = lc.Certifier(net)
    own = getattr(kind, name)
    monkeypatch.setattr(kind, name, functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs)))
    for refuse in (lambda: certifier(X, LABELS), lambda: lc.Certifier(net), lambda: lc.attack(net, X, LABELS, [0.1])):
        with pytest.raises(lc.ModifiedModuleError, match=name):
            refuse()


def test_numbers_and_properties_put_on_a_class_are_seen(monkeypatch):
    net = lc.Network([lc.PadChannels(6), nn.Flatten(), *network().steps], [None] * 4, (6,)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(lc.PadChannels, "lipschitz", 0.1)
        with pytest.raises(lc.ModifiedModuleError, match=r"PadChannels\.lipschitz"):
            Bounds(net)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Flatten, "start_dim", property(lambda self: 1), raising=False)
        with pytest.raises(lc.ModifiedModuleError, match=r"Flatten\.start_dim was added"):
            Bounds(net)
    net.steps[1].lipschitz = 0.01  # of Flatten, which has none: it does not count
    assert lc.lipschitz_bound(net).prescribed == pytest.approx(lc.lipschitz_bound(network()).prescribed, rel=1e-12)


class Loud(lc.LBEN):
    def readout(self, z, assembled=None):
        return 3.0 * super().readout(z, assembled)


class Called(lc.LBEN):
    def __call__(self, x):
        return 3.0 * super().__call__(x)


class Found(lc.LBEN):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Hidden(lc.LBEN):
    @property
    def G(self):
        return 3.0 * self._parameters["G"]


class Named(lc.Network):
    """Nothing of what it computes is its own."""

    def words(self):
        return "named"


class Tripled(lc.Network):
    def forward(self, x):
        return 3.0 * super().forward(x)


@pytest.mark.parametrize("kind", [Loud, Called, Found, Hidden], ids=lambda kind: kind.__name__)
def test_subclasses_of_a_stage_are_held_to_its_methods(kind):
    net = network()
    net.stages[0].__class__ = kind
    with pytest.raises(lc.ModifiedModuleError, match=rf"steps\.1 \({kind.__name__}\)"):
        lc.Certifier(net)


def test_subclasses_of_a_network():
    net = network()
    expected = lc.certified_radii(net, X, LABELS)
    net.__class__ = Named
    assert torch.equal(lc.certified_radii(net, X, LABELS), expected)
    net.__class__ = Tripled
    with pytest.raises(lc.ModifiedModuleError, match=r"Tripled.*has a forward of its own"):
        lc.certified_radii(net, X, LABELS)


def test_compiled_calls_are_refused_and_a_copy_has_none(tmp_path):
    for place in PLACES.values():
        net = network()
        expected = lc.certified_radii(net, X, LABELS)
        place(net)._compiled_call_impl = lambda x: 3.0 * x
        for entry in ENTRIES.values():
            with pytest.raises((lc.ModifiedModuleError, lc.UnsupportedModuleError), match=r"compiled.*copy\.deepcopy"):
                entry(net, tmp_path)
        assert torch.equal(lc.certified_radii(copy.deepcopy(net), X, LABELS), expected)


def test_attributes_in_front_of_parameters_and_steps():
    for hide in (
        lambda net: vars(net.stages[0]).update(G=3.0 * net.stages[0].G.detach()),
        lambda net: vars(net.steps[0]).update(std=0.1 * net.steps[0].std),
        lambda net: vars(net).update(steps=[*net.steps, nn.Tanh()]),
    ):
        net = network()
        certifier = lc.Certifier(net)
        hide(net)
        for refuse in (lambda c=certifier: c(X, LABELS), lambda net=net: lc.Certifier(net)):
            with pytest.raises(lc.ModifiedModuleError, match="an attribute stands in front of its"):
                refuse()


def test_parameters_that_compute_as_they_like():
    class Tripling(torch.Tensor):
        pass

    net = network()
    net.stages[0]._parameters["G"] = nn.Parameter(net.stages[0].G.detach().as_subclass(Tripling))
    with pytest.raises(lc.ModifiedModuleError, match="its G is a Tripling"):
        lc.Certifier(net)


def test_matrices_left_from_a_training_step_are_not_what_runs():
    """With gradients a stage would read matrices that are held; a certificate is of what it assembles."""
    net, x = network(), inputs()
    W, U, G = (M.detach() for M in net.stages[0].matrices())
    net.stages[0]._held = (0.5 * W, U, 3.0 * G)
    certifier = lc.Certifier(net)
    assert net(x).requires_grad
    torch.testing.assert_close(net(x), network()(x), rtol=1e-12, atol=1e-12)
    net.stages[0]._held = (0.5 * W, U, 3.0 * G)
    with pytest.raises(lc.NoCertificateError, match="has changed"):
        certifier(x, LABELS)


# Models that are to be converted: everything the core knows, and children of what plugins claim.

CORE = {
    **{kind.__name__: (kind(), (6,)) for kind in _MODULES},
    "MaxMin": (lc.MaxMin(), (6,)),
    "Dropout": (nn.Dropout(), (6,)),
    "Dropout1d": (nn.Dropout1d(), (6,)),
    "Dropout2d": (nn.Dropout2d(), (6,)),
    "Dropout3d": (nn.Dropout3d(), (6,)),
    "AlphaDropout": (nn.AlphaDropout(), (6,)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout(), (6,)),
    "Sequential": (nn.Sequential(nn.Identity()), (6,)),
    "Linear": (nn.Linear(6, 6), (6,)),
    "Normalize": (lc.Normalize(0.5, 2.0), (6,)),
    "PadChannels": (lc.PadChannels(6), (6,)),
    "FirstFeatures": (lc.FirstFeatures(6), (6,)),
    "LBEN": (lc.LBEN(6, 3, 6, epsilon=0.1), (6,)),
    "SLLLinear": (SLLLinear(6), (6,)),
    "Network": (network(), (6,)),
    "Flatten": (nn.Flatten(), (2, 4, 4)),
    "Unflatten": (nn.Unflatten(1, (1, 2)), (2, 4, 4)),
    "Conv2d": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "AvgPool2d": (nn.AvgPool2d(2), (2, 4, 4)),
    "MeanPool": (lc.MeanPool(2), (2, 4, 4)),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), (2, 4, 4)),
    "PixelShuffle": (nn.PixelShuffle(1), (2, 4, 4)),
}


@pytest.mark.parametrize("name", CORE)
def test_every_module_of_the_core_is_guarded_before_conversion(name):
    module, shape = CORE[name]
    lc.convert(nn.Sequential(copy.deepcopy(module), nn.Identity()), shape, check=False)
    changes = (
        lambda m: m.register_forward_hook(triple),
        lambda m: m.register_forward_pre_hook(lambda m, args: args),
        lambda m: setattr(m, "forward", lambda x: torch.where(x.abs() > 8, 5 * x - 32 * x.sign(), x)),
        lambda m: setattr(m, "_call_impl", lambda x: x),
        lambda m: setattr(m, "_compiled_call_impl", lambda x: x),
        lambda m: setattr(m, "train", lambda mode=True: m),
    )
    for change in changes:
        changed = copy.deepcopy(module)
        change(changed)
        for model, path in (
            (nn.Sequential(changed, nn.Identity()), "0"),
            (nn.Sequential(nn.Sequential(changed)), r"0\.0"),
        ):
            with pytest.raises(lc.UnsupportedModuleError, match=rf"^{path} \({name}\) cannot be converted: "):
                lc.convert(model, shape, check=False)


@pytest.mark.parametrize(
    "name", ["ReLU", "Sigmoid", "Dropout", "Identity", "Flatten", "Sequential", "Linear", "AvgPool2d"]
)
def test_classes_of_torch_that_are_replaced_are_seen_before_conversion(name, monkeypatch):
    module, shape = CORE[name]
    monkeypatch.setattr(type(module), "forward", lambda self, x: 3.0 * x)
    with pytest.raises(lc.UnsupportedModuleError, match=f"{name}.forward is not the one"):
        lc.convert(nn.Sequential(module), shape, check=False)


def test_a_convolution_with_standardised_weights_is_no_convolution():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight / weight.std(), bias)

    conv = Standardised(2, 2, 3, padding=1, padding_mode="circular")
    assert not computes_as(conv, nn.Conv2d)
    with pytest.raises(lc.UnsupportedModuleError, match="Standardised"):
        lc.convert(nn.Sequential(conv), (2, 4, 4), check=False)


def test_children_of_a_layer_that_a_plugin_claims():
    model = nn.Sequential(SLLLinear(6), SLLLinear(6))
    model[1].activation.forward = lambda v: 2.0 * torch.relu(v)
    with pytest.raises(lc.UnsupportedModuleError, match=r"^1\.activation \(ReLU\)"):
        lc.convert(model, check=False)


def test_parametrized_layers_convert_and_old_ones_are_refused():
    new = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(6, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
    ).eval()
    net = lc.convert(new)
    expected = new(X)
    torch.testing.assert_close(net(X), expected, rtol=1e-10, atol=1e-12)
    pruned = nn.Linear(6, 4)
    prune.l1_unstructured(pruned, "weight", 2)
    for old in (nn.utils.spectral_norm(nn.Linear(6, 4)), nn.utils.weight_norm(nn.Linear(6, 4)), pruned):
        with pytest.raises(lc.UnsupportedModuleError, match=r"a forward pre-hook .* Remove hooks first"):
            lc.convert(nn.Sequential(old))
    prune.remove(pruned, "weight")
    lc.convert(nn.Sequential(pruned))


def test_a_method_that_was_replaced_before_the_import_is_seen():
    code = (
        "import functools, torch; from torch import nn; own = nn.Tanh.forward\n"
        "nn.Tanh.forward = functools.wraps(own)(lambda self, x: 2 * own(self, x))\n"
        "import lipconvert as lc\n"
        "try: lc.convert(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), check=False)\n"
        "except lc.UnsupportedModuleError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Tanh.forward had been replaced before lipconvert was imported" in found.stdout


# Settings that change after a certifier was made: exactly.


def test_settings_that_no_representation_shows_are_seen():
    def glue(module, shape=(4,)):
        return lc.Network([module, nn.Flatten()], [None] * 2, shape)

    cases = (
        (glue(nn.AvgPool2d(2), (1, 4, 4)), lambda n: setattr(n.steps[0], "divisor_override", 1)),
        (glue(nn.LeakyReLU(0.1)), lambda n: setattr(n.steps[0], "negative_slope", 0.1 + 2**-56)),
        (glue(nn.ReLU6()), lambda n: setattr(n.steps[0], "max_val", 5.9)),
        (glue(nn.Softplus()), lambda n: setattr(n.steps[0], "threshold", math.nan)),
        (network(), lambda n: n.stages[0].state_map().W.mul_(1.01)),
        (network(), lambda n: n.stages[0].assembled()[2].mul_(1.01)),
        (network(), lambda n: object.__setattr__(n.stages[0].sigma.runs[-1][0], "name", "tanh")),
        (network(), lambda n: n.steps[0].std.data.mul_(0.999)),
    )
    for net, change in cases:
        net.eval()
        shape = net.input_shape
        x, labels = torch.rand(3, *shape), torch.zeros(3, dtype=torch.long)
        certifier, before = lc.Certifier(net), fingerprint(net)
        for _ in range(2):  # and nothing is seen where nothing changes
            certifier(x, labels)
        net.train().eval()
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        net.set_options(lc.SolverOptions(tolerance=1e-9))
        certifier(x, labels)
        change(net)
        with pytest.raises(lc.NoCertificateError, match="changed since"):
            certifier(x, labels)
        if isinstance(net.steps[0], nn.AvgPool2d):
            assert fingerprint(net) != before  # results kept in a folder are not those of the other one


def test_glue_is_in_eval_mode_whatever_the_network(monkeypatch):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 100.0 * torch.randn_like(x) if self.training else x

    net = lc.Network([Noisy(), *network().steps], [1.0, None, None], (6,), [(0.0, 0.0), None, None])
    x = X
    assert torch.equal(net(x), net(x))
    assert torch.equal(net.train()(x), net(x))
    assert net.stages[0].training
    certifier = lc.Certifier(net)
    certifier(X, LABELS)
    net.steps[0].train()
    for refuse in (lambda: certifier(X, LABELS), lambda: lc.Certifier(net)):
        with pytest.raises(lc.ModifiedModuleError, match=r"Noisy.*training mode.*net\.eval\(\)"):
            refuse()


# Parameters of activations.

NOT_NUMBERS = (math.nan, 0.5j, torch.tensor(0.5), "0.5", True, None, np.float32(0.5), [0.5])


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.LeakyReLU(), "negative_slope"),
        (nn.ELU(), "alpha"),
        (nn.Softplus(), "beta"),
        (nn.Softplus(), "threshold"),
        (nn.ReLU6(), "max_val"),
        (nn.ReLU6(), "min_val"),
        (nn.Hardtanh(), "max_val"),
        (nn.Hardtanh(), "min_val"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_parameters_that_are_no_numbers_are_refused_by_name(module, name, value):
    module = copy.deepcopy(module)
    setattr(module, name, value)
    images = nn.Sequential(module, nn.Conv2d(2, 2, 1))
    for model, shape, path in ((nn.Sequential(nn.Linear(4, 4), module), (4,), "1"), (images, (2, 4, 4), "0")):
        with pytest.raises(lc.UnsupportedActivationError, match=rf"^{path}: activation {type(module).__name__}"):
            lc.convert(model, shape)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (nn.LeakyReLU, (-0.1, 1.0 + 2**-52, math.inf, -math.inf, 10**400)),
        (nn.ELU, (-0.1, 1.0 + 2**-52, math.inf, 10**400)),
        (nn.Softplus, (0.0, -1.0, math.inf, 10**400, 1e-7)),
        (lambda t: nn.Softplus(1.0, t), (19.9, 89.0, math.inf, -math.inf, 0.0, 10**400)),
        (lambda t: nn.Hardtanh(-1.0, t), (0.9, 1.1, math.inf)),
        (lambda t: nn.Hardtanh(t, 1.0), (-0.9, -1.1, -math.inf)),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(make, values):
    for value in values:
        with pytest.raises(lc.UnsupportedActivationError):
            lc.activation_of(make(value))


def test_ranges_of_relu6():
    for name, value in (("max_val", 5.9), ("min_val", -1e-300), ("max_val", 10**400)):
        relu6 = nn.ReLU6()
        setattr(relu6, name, value)
        with pytest.raises(lc.UnsupportedActivationError, match=f"ReLU6.*{name}"):
            lc.convert(nn.Sequential(nn.Linear(4, 4), relu6, nn.Linear(4, 3)), (4,))


@pytest.mark.parametrize("value", [math.nan, "0.5", True, 0.5j, torch.tensor([0.5]), None], ids=repr)
def test_an_activation_takes_numbers_only(value):
    for name in ("elu", "leaky_relu", "softplus", "relu"):
        with pytest.raises(lc.InvalidParameterError):
            lc.Activation(name, value)


TAKEN = [
    *(nn.LeakyReLU(slope) for slope in (0.0, 1e-300, 0.01, 0.5, 1.0, 1, 0)),
    *(nn.ELU(alpha) for alpha in (0.0, 1e-300, 0.3, 1.0, 1)),
    *(nn.Softplus(beta, threshold) for beta in (1e-6, 0.3, 1, 7.0, 1e6) for threshold in (20, 35.5, 88.0)),
    nn.Hardtanh(-1, 1),
    nn.ReLU6(),
    nn.ReLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Identity(),
]


def dense_points(module: nn.Module) -> torch.Tensor:
    """All scales of both signs, and the neighbours of every kink and of Softplus' threshold, sorted."""
    kinks = [0.0, 1.0, -1.0, 6.0]
    if isinstance(module, nn.Softplus):
        kinks += [module.threshold / module.beta, -module.threshold / module.beta, 1.0 / module.beta]
    sizes = np.concatenate(
        [np.geomspace(1e-12, 1e3, 2000), np.geomspace(1e-3, 1e2, 2000) / getattr(module, "beta", 1.0)]
    )
    near = [k + s * d for k in kinks for d in np.geomspace(1e-9, 1e-1, 40) * max(1.0, abs(k)) for s in (-1, 1)]
    around = [np.nextafter(k, s * np.inf) for k in kinks for s in (-1, 1)]
    return torch.from_numpy(np.unique(np.concatenate([sizes, -sizes, near, around, kinks])))


@pytest.mark.parametrize("module", TAKEN, ids=repr)
def test_slopes_of_what_is_taken_stay_within_the_unit_interval(module):
    """Of the torch module itself: difference quotients in float64, and its autograd against ours."""
    v = dense_points(module)
    y = module(v)
    activation = lc.activation_of(module)
    jump = 0.0
    if isinstance(module, nn.Softplus):  # torch's step at the threshold
        jump = math.exp(-module.threshold) / module.beta
    rise, run = y.diff(), v.diff()
    noise = 8.0 * 2.0**-53 * (y[1:].abs() + y[:-1].abs() + (1.0 if not y.isinf().any() else math.inf))
    noise = noise + (8.0 * 2.0**-53 / module.beta if isinstance(module, nn.Softplus) else 0.0)
    assert bool((rise <= run + noise + jump).all())
    assert bool((rise >= -noise - jump).all())
    slack = 1e-14 * (1.0 + v.abs()) + (1e-14 / module.beta if isinstance(module, nn.Softplus) else 0.0) + 1.01 * jump
    assert bool(((activation(v) - y).abs() <= slack).all())
    at = v.clone().requires_grad_(True)
    slope = torch.autograd.grad(module(at).sum(), at)[0] if not isinstance(module, nn.Identity) else torch.ones_like(v)
    ours = activation.slope(v)
    assert bool(((ours >= 0.0) & (ours <= 1.0)).all())
    assert bool(((ours - slope).abs() <= 1e-14 + jump * getattr(module, "beta", 0.0) * 1.01).all())


def test_parameters_changed_after_conversion_are_refused():
    net = lc.convert(nn.Sequential(nn.LeakyReLU(0.2), lc.Normalize(0.5, 2.0), nn.Flatten()), (2, 3, 3))
    x, labels = torch.rand(4, 2, 3, 3), torch.zeros(4, dtype=torch.long)
    assert is_activation(net.steps[0])
    certifier = lc.Certifier(net)
    for value in (-3.0, math.nan):
        net.steps[0].negative_slope = value
        with pytest.raises(lc.NoCertificateError, match=r"negative_slope.*changed"):
            certifier(x, labels)
        with pytest.raises(lc.UnsupportedActivationError, match="LeakyReLU"):
            lc.lipschitz_bound(net)


# In place.

IN_PLACE = [kind(inplace=True) for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU)]


def in_place_model(activation: nn.Module, images: bool, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    if images:
        sll = SLLNetwork(channels=3, inner=2, conv_depth=1, features=12, dense_depth=1, image=4, classes=3)
        return nn.Sequential(copy.deepcopy(activation), sll), (3, 4, 4)
    return nn.Sequential(copy.deepcopy(activation), nn.Linear(6, 5), copy.deepcopy(activation), nn.Linear(5, 3)), (6,)


def apart(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


@pytest.mark.parametrize("images", [False, True], ids=["dense", "images"])
@pytest.mark.parametrize("activation", IN_PLACE, ids=lambda module: type(module).__name__)
def test_in_place_activations_are_ordinary(activation, images, tmp_path):
    model, shape = in_place_model(activation, images)
    x = 2.0 * torch.randn(8, *shape, generator=torch.Generator().manual_seed(3))
    kept = x.clone()
    expected = apart(model)(x)
    net = lc.convert(model, shape)
    assert torch.equal(x, kept)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    assert lc.validate(model, net, x).passed
    assert not any(getattr(module, "inplace", False) for module in net.modules())
    assert model[0].inplace  # the model itself stays as it is
    other = lc.convert(apart(model), shape)
    lc.save(net, tmp_path / "net.onnx")
    torch.testing.assert_close(lc.load(tmp_path / "net.onnx")(x), expected, rtol=1e-10, atol=1e-12)
    data, config = TensorDataset(x, torch.arange(8) % 3), lc.TrainingConfig(epochs=1, batch_size=4, held_out=0)
    lc.finetune(net, data, config=config)
    lc.finetune(other, data, config=config)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x, kept)


class Clipped(nn.Module):
    """Glue of somebody else that works in place, also where torch does not count it."""

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent

    def forward(self, x):
        return x.data.clamp_(min=0.3) if self.silent else x.clamp_(min=0.3)


def in_place_networks(dtype: torch.dtype) -> list[tuple[lc.Network, lc.Network]]:
    """Networks whose first step works in place, also behind a view, and the same without it."""
    stages = lc.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)).steps
    found = []
    for glue in ([nn.LeakyReLU(0.1, inplace=True)], [nn.Flatten(), nn.ELU(inplace=True)], [Clipped()], [Clipped(True)]):
        constants = [1.0 if isinstance(module, Clipped) else None for module in glue] + [None] * len(stages)
        rounding = [None if constant is None else (0.0, 0.0) for constant in constants]
        net = lc.Network(copy.deepcopy([*glue, *stages]), constants, (6,), rounding).to(dtype).eval()

        class Apart(nn.Module):
            def forward(self, x):
                return x.clamp(min=0.3)

        other = [Apart() if isinstance(module, Clipped) else apart(module) for module in glue]
        found.append((net, lc.Network(copy.deepcopy([*other, *stages]), constants, (6,), rounding).to(dtype).eval()))
    return found


def functions_of(x: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[lc.Network], torch.Tensor]]:
    """Public functions that look at a network at inputs, each with something of its result."""
    return {
        "call": lambda net: net(x),
        "methods": lambda net: net.methods(x) and x,
        "radii": lambda net: lc.certified_radii(net, x, labels),
        "certify": lambda net: torch.tensor(lc.certify(net, TensorDataset(x, labels), radii=[0.1]).sample_radii),
        "pgd": lambda net: lc.pgd(net, x, labels, 0.3, steps=3)[1],
        "apgd": lambda net: lc.apgd(net, x, labels, 0.3, steps=3)[1],
        "attack": lambda net: lc.attack(net, x, labels, [0.3], steps=3),
        "empirical": lambda net: torch.tensor(lc.empirical_lipschitz(net, x, steps=3)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_margins_are_those_of_the_callers_input(dtype):
    """By the networks without in-place glue, function by function; x stays bitwise what it was."""
    torch.manual_seed(0)
    for net, other in in_place_networks(dtype):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
        kept = x.clone()
        labels = other(x).argmax(1)
        silent = isinstance(net.steps[0], Clipped) and net.steps[0].silent  # it has no gradient either
        for name, function in functions_of(x, labels).items():
            if silent and name in ("pgd", "apgd", "attack", "empirical", "certify"):
                continue
            found = function(net)
            assert torch.equal(x, kept), (name, net.steps[0])
            # torch differentiates an ELU in place from its value, not from its argument: round-off
            size = 1e3 * torch.finfo(dtype).eps if name == "empirical" else 0.0
            torch.testing.assert_close(found, function(other), rtol=size, atol=0.0)
        assert bool((lc.certified_radii(net, x, labels) > 0).any())
        if not silent:
            at = x.clone().requires_grad_(True)  # a leaf
            net(at).sum().backward()
            there = x.clone().requires_grad_(True)
            other(there).sum().backward()
            torch.testing.assert_close(at.grad, there.grad)


@pytest.mark.parametrize("make", [SLLLinear, SandwichLinear, MonDEQ], ids=lambda make: make.__name__)
def test_an_activation_in_place_inside_a_layer(make):
    sizes = {SLLLinear: (6,), SandwichLinear: (6, 5), MonDEQ: (6, 4, 3)}[make]
    torch.manual_seed(0)
    layer = make(*sizes, activation=nn.ReLU(inplace=True))
    x, expected = X.clone(), apart(layer)(X)
    torch.testing.assert_close(lc.convert(nn.Sequential(layer))(x), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(x, X)


def test_what_a_layer_does_in_place_is_what_its_claim_is_compared_with():
    """x + σ(x) with σ in place is 2σ(x): switched off inside a layer, another function would be converted, unseen."""

    class Folded(SLLLinear):
        def inward(self, x):
            return super().inward(self.activation(x))

    layer = Folded(6, activation=nn.ReLU(inplace=True))
    with pytest.raises(lc.PluginError, match="is not what the module computes"):
        lc.convert(nn.Sequential(layer), check=False)
