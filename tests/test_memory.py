"""What cannot fit is refused from shapes alone; the estimate is at most what a conversion makes."""

from __future__ import annotations

import sys

import pytest
import torch
from lipconvert_plugins.aol import AOLLinear
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLConv2d, SLLLinear
from torch import nn

import lipconvert as lc
from lipconvert.conversion import memory
from lipconvert.conversion.memory import sizes_of

GIB = 2**30


def published() -> nn.Module:
    """SLL-small: 20 convolutions of 45 channels, 7 dense layers of 2,880 features and 2,048 inner ones."""
    convolutions = [SLLConv2d(45, 45, 5) for _ in range(20)]
    dense = [SLLLinear(2880, 2048) for _ in range(7)]
    return nn.Sequential(lc.PadChannels(45), *convolutions, lc.MeanPool(4), nn.Flatten(), *dense, lc.FirstFeatures(10))


def made_nothing(*args: object) -> None:
    raise AssertionError("a layer was converted")


def test_a_network_of_published_size_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 16 * GIB)
    monkeypatch.setattr(sys.modules[lc.convert.__module__], "trace", made_nothing)
    with pytest.raises(
        lc.InsufficientMemoryError, match=r"'1 to 20' does not fit.*900 states on 32x32 pixels"
    ) as caught:
        lc.convert(published(), (3, 32, 32))
    # 13 complex matrices of 900 x 900 for each of 32 * 17 frequencies
    assert caught.value.needed == 13 * 900**2 * 32 * 17 * 16
    assert caught.value.available == 16 * GIB
    assert "nn.Identity()" in str(caught.value)
    with pytest.raises(lc.InsufficientMemoryError, match=r"'1 to 20'"):
        lc.to_dae(published(), (3, 32, 32))


def test_the_remedy_that_is_named_helps(monkeypatch):
    layers = [SLLLinear(8, 200) for _ in range(4)]
    apart = [part for layer in layers for part in (layer, nn.Identity())]
    monkeypatch.setattr(memory, "available", lambda: 2**28)
    monkeypatch.setattr(memory, "VALIDATING", 200.0)
    with pytest.raises(lc.InsufficientMemoryError, match=r"'0 to 3'.*800 states"):
        lc.convert(nn.Sequential(*layers), (8,))
    net, x = lc.convert(nn.Sequential(*apart), (8,)), torch.randn(4, 8)
    assert len(net.stages) == 4
    torch.testing.assert_close(net(x), nn.Sequential(*layers).double()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "shape", "dense"),
    [
        (nn.Sequential(SLLLinear(6, 9), SLLLinear(6, 5)), (6,), False),
        (nn.Sequential(SLLConv2d(2, 3), SLLConv2d(2, 4), nn.Flatten(), SLLLinear(40, 7)), (2, 4, 5), False),
        (nn.Sequential(SLLConv2d(2, 3, padding_mode="zeros")), (2, 4, 5), True),
        (nn.Sequential(AOLLinear(6, 9), nn.ReLU(), AOLLinear(9, 8), lc.MaxMin(), AOLLinear(8, 3)), (6,), False),
        (MonDEQ(5, 8, 3, m=0.5), (5,), False),
        (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)), (5,), False),
        (nn.Sequential(SLLLinear(6, 9, activation=nn.Identity()), SLLLinear(6, 5)), (6,), False),
    ],
    ids=["dense", "images", "dense images", "aol", "mondeq", "linear", "identity"],
)
def test_sizes_are_the_states_of_what_is_made(model, shape, dense):
    """Identity rows apart, of which some are eliminated; by what `convert` makes of it."""
    found = sizes_of(model, shape, None, dense)
    stages = lc.convert(model, shape, dense=dense).stages
    assert len(found) == len(stages)
    for size, stage in zip(found, stages, strict=True):
        nonlinear = sum(count for activation, count in stage.sigma if activation.name != "identity")
        assert size.states == nonlinear
        assert size.grid == stage.grid
        assert size.matrix == stage.state_map().W.nbytes * nonlinear**2 // len(stage.b_z) ** 2


@pytest.mark.parametrize("name", sorted(lc.registry().names()))
def test_every_plugin_counts_its_states_right(name):
    """`nonlinear_states` of a model without numbers against `to_dae` of the model."""
    for model in lc.registry().example_models(name, 0):
        for module in model.modules():
            shape = getattr(module, "input_shape", None)
            if shape is None or (claimed := lc.registry().nonlinear_states(module, shape, name)) is None:
                continue
            dae = lc.to_dae(module, shape)
            assert claimed == sum(count for activation, count in dae.sigma if activation.name != "identity")


def test_what_cannot_run_without_numbers_ends_the_list():
    model = nn.Sequential(SLLLinear(5, 6), MonDEQ(5, 8, 4, m=0.5), SLLLinear(4, 7))
    assert [size.states for size in sizes_of(model, (5,), None, False)][:1] == [
        14
    ]  # the rest is counted once it is made


def test_what_is_free_is_a_number_of_bytes():
    assert 2**20 < memory.available() < 2**50
