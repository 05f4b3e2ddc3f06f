"""What is walked, what is refused, and what becomes one stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.cpl import CPLLinear
from lipconvert_plugins.sandwich import SandwichLinear
from lipconvert_plugins.sll import SLLConv2d, SLLLinear, SLLNetwork
from torch import nn

import lipconvert as lc
from lipconvert.certification.accuracy import Accuracy
from lipconvert.certification.bounds import Bounds
from lipconvert.conversion.validate import jacobian


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def same(model: nn.Module, net: lc.Network, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=1e-12, atol=1e-12)


def test_neighbours_of_one_plugin_become_one_stage():
    model = nn.Sequential(
        lc.Normalize(0.5, 0.5),
        nn.Sequential(SLLLinear(4), SLLLinear(4)),
        AOLLinear(4, 5),
        nn.ReLU(),
        AOLLinear(5, 3),
        lc.FirstFeatures(2),
    )
    net = lc.convert(model, (4,))
    assert [type(step) for step in net.steps] == [lc.Normalize, lc.LBEN, lc.LBEN, lc.FirstFeatures]
    assert net.step_lipschitz == [2.0, 1.0, 1.0, 1.0]
    assert [stage.blocks for stage in net.stages] == [(4, 4, 4), (5,)]
    same(model, net, torch.randn(7, 4))


def test_activations_on_images_join_the_layer_beside_them_and_stay_glue_alone():
    layer = SLLConv2d(2)
    for parts, kinds in (
        ([layer, nn.ReLU()], [lc.LBEN]),
        ([nn.ReLU(), layer], [lc.LBEN]),
        ([layer, nn.Tanh(), layer], [lc.LBEN]),
        ([nn.ReLU(), lc.MeanPool(2), layer], [nn.ReLU, lc.MeanPool, lc.LBEN]),
        ([lc.MeanPool(2), nn.Tanh(), lc.MaxMin(), nn.Flatten()], [lc.MeanPool, nn.Tanh, lc.MaxMin, nn.Flatten]),
        ([layer, nn.Flatten(), nn.ReLU(), SLLLinear(32)], [lc.LBEN, nn.Flatten, lc.LBEN]),
    ):
        model = nn.Sequential(*parts)
        net = lc.convert(model, (2, 4, 4))
        assert [type(step) for step in net.steps] == kinds
        same(model, net, torch.randn(5, 2, 4, 4))


@pytest.mark.parametrize("layer", [nn.ReLU(), SandwichLinear(4, 3, activation=nn.ReLU())])
def test_a_single_layer_with_H_zero(layer):
    model = nn.Sequential(layer).double()
    same(model, lc.convert(model, (4,)), torch.randn(5, 4))


class Kinked(SLLLinear):
    """Another function far from the origin, where few random inputs fall."""

    def forward(self, x):
        y = super().forward(x)
        return torch.where(y.abs() > 1e3, 10.0 * y, y)


class KinkedLinear(nn.Linear):
    def forward(self, x):
        return 3.0 * super().forward(x)


@pytest.mark.parametrize("layer", [Kinked(4), KinkedLinear(4, 4)])
def test_a_forward_of_its_own_is_refused(layer):
    for model in (layer, nn.Sequential(SLLLinear(4), layer)):
        for convert in (lc.to_dae, lc.convert):
            with pytest.raises(lc.UnsupportedModuleError, match="Kinked"):
                convert(model, (4,))


def test_a_constraint_of_its_own_is_taken():
    class Loose(SLLLinear):
        def T(self, image=()):
            return 2.0 * super().T(image)

    model = nn.Sequential(Loose(4), SLLLinear(4))
    same(model, lc.convert(model), torch.randn(5, 4))


def test_hooks_are_refused():
    layer = SLLLinear(4)
    layer.register_forward_hook(lambda module, args, out: 3.0 * out)
    with pytest.raises(lc.UnsupportedModuleError, match="forward hook"):
        lc.convert(nn.Sequential(layer))


def test_a_claim_is_tried():
    """A plugin that says the wrong thing is found before anything is built on it."""

    class Doubled(nn.Module):
        def forward(self, x):
            return torch.relu(2.0 * x)

    class Wrong:
        @staticmethod
        @lc.hookimpl
        def to_dae(model):
            eye = torch.eye(3)
            return (0.0 * eye, eye, eye, torch.ones(3)) if isinstance(model, Doubled) else None

    lc.registry().register(Wrong, "wrong")
    try:
        with pytest.raises(lc.PluginError, match="not what the module computes") as caught:
            lc.to_dae(nn.Sequential(Doubled()))
        assert caught.value.plugin == "wrong"
    finally:
        lc.registry().unregister("wrong")


def test_a_converted_network_converts_again():
    model = SLLNetwork(inputs=4, classes=2, features=5, dense_depth=2).double()
    once = lc.convert(model)
    twice = lc.convert(once)
    assert twice.lipschitz == once.lipschitz
    same(model, twice, torch.randn(6, 4))
    same(model, lc.convert(nn.Sequential(once, nn.Identity()), (4,)), torch.randn(6, 4))


def test_dropout_is_the_identity_of_eval_mode():
    model = nn.Sequential(SLLLinear(4), nn.Dropout(0.9), SLLLinear(4))
    net = lc.convert(model)
    assert len(net.steps) == 1
    same(model.eval(), net.train(), torch.randn(6, 4))


@pytest.mark.parametrize("bad", [0, (0, 3), (4.0,), "4", (-1,)])
def test_input_shapes_that_are_none(bad):
    with pytest.raises(lc.ShapeError):
        lc.convert(SLLLinear(4), bad)


def test_one_size_is_a_shape():
    assert lc.convert(SLLLinear(4), 4).input_shape == (4,)


def test_what_is_no_model():
    for thing in (None, SLLLinear, "model.pt"):
        with pytest.raises(lc.UnsupportedModuleError):
            lc.convert(thing)


def test_outputs_of_any_shape():
    """The Jacobian is that of the flattened output, against numpy's own differences."""
    layer = AOLLinear(4, 4)
    model = nn.Sequential(layer, nn.Unflatten(1, (2, 2)))
    net = lc.convert(model, (4,))
    x = torch.randn(3, 4)
    expected = np.linalg.svd(layer.P().detach().numpy())[1][0]
    np.testing.assert_allclose(torch.linalg.matrix_norm(jacobian(net, x), 2).detach(), expected, rtol=1e-12)


def test_inputs_are_cast_but_integers_are_not_pixels():
    net = lc.convert(SLLLinear(4))
    x = torch.rand(3, 4, dtype=torch.float32)
    assert torch.equal(net(x), net(x.double()))
    with pytest.raises(lc.InvalidParameterError, match="float"):
        net(torch.zeros(3, 4, dtype=torch.uint8))


@pytest.mark.parametrize("write", [torch.Tensor.mul_, torch.Tensor.add_])
def test_weights_written_through_data_are_seen(write):
    net = lc.convert(SLLNetwork(inputs=4, classes=3, dense_depth=2).double())
    x = torch.randn(5, 4)
    with torch.no_grad():
        net(x)
    for parameter in net.parameters():
        write(parameter.data, 0.7)
    with torch.no_grad():
        inference = net(x)
    torch.testing.assert_close(inference, net(x).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [SLLLinear, CPLLinear])
def test_deep_chains_have_an_error_bound(kind):
    """At ε = 0 the network's own metric has no margin; the falling weights give one at any depth."""
    layers = [kind(8) for _ in range(25)]
    with torch.no_grad():
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
    net = lc.convert(nn.Sequential(*layers))
    assert lc.check(net.stages[0].dae()).mu < 1e-9
    evaluation = Accuracy(Bounds(net)).evaluate(torch.randn(4, 8))
    assert float(evaluation.error.max()) < 1e-4


def test_training_that_exhausts_the_margin_still_solves():
    """Pushing every direction to L leaves (3) a margin of 1e-2 and less: splitting alone stalls, Newton ends it."""
    torch.manual_seed(0)
    net = lc.convert(SLLNetwork(inputs=12, classes=5, features=20, dense_depth=4).double(), check=False)
    x = torch.randn(16, 12)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-net(x).square().mean()).backward()
        optimizer.step()
    norms = torch.linalg.matrix_norm(jacobian(net, x), 2)
    assert float(norms.max()) <= 1.0 + 1e-6


class Sorted(nn.Module):
    """1-Lipschitz, not affine; on flat samples."""

    def forward(self, x):
        return x.sort(dim=1).values


class Folded(nn.Module):
    """Flat samples as images of two channels."""

    def forward(self, x):
        return x.reshape(len(x), 2, 2, -1)


class Strange:
    @staticmethod
    @lc.hookimpl
    def to_dae(model):
        return None

    @staticmethod
    @lc.hookimpl
    def glue_lipschitz(module):
        return 1.0 if isinstance(module, Sorted | Folded) else None


def test_merging_leaves_what_a_stranger_keeps_as_glue():
    lc.registry().register(Strange, "strange")
    try:
        for parts, kinds in (
            ([SLLLinear(8), Sorted(), SLLLinear(8)], [lc.LBEN, Sorted, lc.LBEN]),
            ([SLLLinear(8), Folded()], [lc.LBEN, Folded]),
        ):
            model = nn.Sequential(*parts)
            net = lc.convert(model, (8,), merge=True)
            assert [type(step) for step in net.steps] == kinds
            same(model, net, torch.randn(5, 8))
    finally:
        lc.registry().unregister("strange")


def test_a_users_own_detour_stays():
    model = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(12, 3))
    net = lc.convert(model, (4, 3))
    assert net.input_shape == (4, 3)
    same(model, net, torch.randn(5, 4, 3))


@pytest.mark.parametrize("merge", [False, True])
def test_unshuffling_behind_glue(merge):
    """The case in which unshuffling twice would not show on smaller images."""
    for parts, shape in (
        ([nn.ReLU(), nn.PixelUnshuffle(2), nn.Flatten(), nn.Linear(64, 3)], (1, 8, 8)),
        ([lc.Normalize(0.5, 0.5), nn.PixelUnshuffle(2), nn.Flatten(), nn.Linear(64, 3)], (1, 8, 8)),
        ([SLLConv2d(2), nn.PixelUnshuffle(2), SLLConv2d(8), nn.PixelUnshuffle(2), nn.Flatten()], (2, 8, 8)),
    ):
        model = nn.Sequential(*parts)
        same(model, lc.convert(model, shape, merge=merge), torch.randn(5, *shape))


def test_a_forward_put_on_an_instance_is_seen():
    model = nn.Sequential(SLLLinear(4))
    model.forward = lambda x: 2.0 * x
    with pytest.raises(lc.UnsupportedModuleError, match="its forward was set on this one module"):
        lc.convert(model, (4,))


def test_a_pointwise_convolution_needs_no_padding():
    for padding in (0, "valid", "same"):
        model = nn.Sequential(nn.Conv2d(2, 3, 1, padding=padding))
        same(model, lc.convert(model, (2, 4, 3)), torch.randn(5, 2, 4, 3))
