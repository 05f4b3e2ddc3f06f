"""The training loop against training steps, losses, penalties and certificates written out by hand.

Nearly everything runs in float64 with the equilibria solved to 1e-13, so that two roads to a number agree to round-off.
"""

import contextlib
import copy
import csv
import errno
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lipconvert_plugins.sll import SLLNetwork
from plain import circulant
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipconvert as lc
from lipconvert.data import Images, Shaped
from lipconvert.reports.plotting import radius_name
from lipconvert.training.documents import FinetuneReport, ScheduleConfig, TrainingConfig
from lipconvert.training.finetune import Samples, _Support, margin_loss, require_fit, schedule_factor

NAMES = ("log_psi", "G", "U", "V", "S", "b_z", "b_y")
SIZE, CLASSES = 5, 3


class StopError(Exception):
    """What a test stops a run with."""


def network(seed: int = 0, **options) -> lc.Network:
    """One dense stage, no entry of it zero."""
    torch.manual_seed(seed)
    model = lc.LBEN(SIZE, 6, CLASSES, **{"lipschitz": 1.5, "epsilon": 0.2, **options})
    with torch.no_grad():
        for parameter in (model.log_psi, model.b_z, model.b_y):
            parameter.normal_(std=0.3)
    return lc.convert(model.double(), check=False)


def image_source(seed: int = 0) -> nn.Module:
    """Convolutions, pooling and a dense layer."""
    torch.manual_seed(seed)
    sizes = {"image": (4, 6), "in_channels": 3, "channels": 4, "inner": 3, "conv_depth": 2, "kernel_size": 3}
    return SLLNetwork(**sizes, pool=2, dense_depth=1, dense_inner=5, classes=CLASSES).double()


def image_network(seed: int = 0) -> lc.Network:
    return lc.convert(image_source(seed), check=False)


def labelled(shape, count: int, seed: int = 0) -> TensorDataset:
    """Inputs in [0, 1] that a linear map labels, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    teacher = torch.randn(math.prod(shape), CLASSES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return TensorDataset(x, ((x.flatten(1) - 0.5) @ teacher).argmax(1))


def configured(**options) -> TrainingConfig:
    plain = {
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "schedule": {"kind": "constant"},
        "precision": "64-true",
        "tolerance": 1e-13,
        "loss": {"offset": 0.1, "temperature": 0.5},
        "radii": [0.01, 0.03, 0.1],
        "balance": False,  # steps are followed on the weights as they were given
    }
    return TrainingConfig.model_validate(plain | options)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit."""
    there, here = first.state_dict(), second.state_dict()
    assert list(there) == list(here)
    for name, value in there.items():
        same = torch.equal(value, here[name]) if isinstance(value, torch.Tensor) else value == here[name]
        assert same, name


def timeless(report: FinetuneReport) -> list[dict]:
    return [record.model_dump(exclude={"seconds"}) for record in report.history]


@pytest.fixture
def batches_of(monkeypatch):
    """``batches_of(net, see)``: ``see`` is called with what goes through a network while it is trained; hooks are refused."""
    lookers = []

    def passed(step: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for net, see in lookers:
            if step is net.steps[0] and net.training:
                see(x.detach().clone())
        return step(x)

    monkeypatch.setattr("lipconvert.networks.network.passed", passed)
    return lambda net, see: lookers.append((net, see))


def rows_of(batch: torch.Tensor, data: TensorDataset) -> list[int]:
    """The numbers of the samples of a batch."""
    distances = torch.cdist(batch.flatten(1).double(), data.tensors[0].flatten(1))
    assert float(distances.amin(1).max()) < 1e-6
    return distances.argmin(1).tolist()


# The loss and the schedule.


@pytest.mark.parametrize(("margin", "temperature"), [(0.0, 1.0), (0.7, 0.25), (2.0, 3.0)])
def test_the_margin_loss_is_a_sum_written_by_hand(margin, temperature):
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    terms = []
    for y, label in zip(logits.tolist(), labels.tolist(), strict=True):
        shifted = [(value - margin * (j == label)) / temperature for j, value in enumerate(y)]
        terms.append(temperature * (math.log(sum(math.exp(value) for value in shifted)) - shifted[label]))
    # a few operations on numbers of size 1 to 10
    assert float(margin_loss(logits, labels, margin, temperature, "sum")) == pytest.approx(sum(terms), rel=1e-13)
    assert float(margin_loss(logits, labels, margin, temperature)) == pytest.approx(sum(terms) / 7, rel=1e-13)


def test_the_margin_loss_is_small_only_where_the_label_leads_by_the_margin():
    label = torch.tensor([0])
    losses = [float(margin_loss(torch.tensor([[lead, 0.0]]), label, 1.0, 0.01)) for lead in (0.0, 0.9, 1.1, 2.0)]
    # a hinge max(0, 1 − lead), smooth over a width of T = 0.01: e^-10 is what is left of it a tenth away
    np.testing.assert_allclose(losses, [1.0, 0.1, 0.0, 0.0], atol=1e-6)


def factors(total: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """(place of each step in the run, its factor)."""
    schedule = ScheduleConfig(**options)
    return (np.arange(total) + 0.5) / total, np.array([schedule_factor(schedule, k, total) for k in range(total)])


@pytest.mark.parametrize("total", [1, 2, 7, 10, 1000])
def test_the_triangular_schedule_interpolates_its_corners(total):
    places, found = factors(total, kind="triangular")
    np.testing.assert_allclose(found, np.interp(places, [0.0, 0.4, 0.8, 1.0], [0.0, 1.0, 0.05, 0.0]), atol=1e-14)


@pytest.mark.parametrize("total", [1, 2, 7, 10, 1000])
@pytest.mark.parametrize("warm_up", [0.0, 0.15, 0.5, 0.999])
def test_linear_and_one_cycle_go_up_and_down(total, warm_up):
    places, found = factors(total, kind="linear", warm_up=warm_up)
    corners = ([0.0, warm_up, 1.0], [0.0, 1.0, 0.0]) if warm_up else ([0.0, 1.0], [1.0, 0.0])
    share = np.interp(places, *corners)
    np.testing.assert_allclose(found, share, atol=1e-12)  # 1/(1 − 0.999) times round-off
    _, found = factors(total, kind="one_cycle", warm_up=warm_up)
    np.testing.assert_allclose(found, np.sin(0.5 * np.pi * share) ** 2, atol=1e-12)


@pytest.mark.parametrize("kind", ["triangular", "linear", "one_cycle", "constant"])
def test_every_schedule_is_continuous_positive_and_peaks_at_one(kind):
    total = 2000
    _, found = factors(total, kind=kind, warm_up=0.15)
    assert np.abs(np.diff(found)).max() <= 7 / 0.6 / total  # steepest is 1/0.15, and π/2 of it along a cosine
    assert found.min() > 0.0
    assert found.max() <= 1.0
    assert found.max() >= 1.0 - 7 / total
    if kind != "constant":
        assert found[-1] < 7 / total
        peak = {"triangular": 0.4}.get(kind, 0.15)
        assert abs((found.argmax() + 0.5) / total - peak) <= 1 / total
    else:
        assert (found == 1.0).all()


# Data.


def test_samples_are_the_same_of_every_kind_of_data():
    pixels = torch.randint(0, 256, (13, 1, 2, 3), dtype=torch.uint8)
    labels = torch.randint(4, (13,))
    images = Images(pixels, labels, 255.0, "images")
    x, expected = pixels.double() / 255, labels.tolist()
    rows = [(x[k], int(labels[k])) for k in range(13)]
    kinds = {
        "Images": images,
        "Shaped": Shaped(images, (6,)),
        "TensorDataset": TensorDataset(x, labels),
        "int32 labels": TensorDataset(x, labels.int()),
        "list": rows,
        "list of numpy": [(part.numpy(), label) for part, label in rows],
        "loader": DataLoader(TensorDataset(x, labels), batch_size=5),
        "loader of a list": DataLoader(rows, batch_size=4),
    }
    for name, data in kinds.items():
        samples = Samples.of(data, "the data")
        assert len(samples) == 13, name
        assert samples.shape == (1, 2, 3), name
        assert samples.labels.tolist() == expected, name
        assert samples.labels.dtype == torch.int64
        picked = torch.tensor([12, 0, 0, 5])
        for dtype in (torch.float32, torch.float64):
            inputs, there = samples.batch(picked, dtype)
            assert inputs.dtype == dtype
            assert there.tolist() == labels[picked].tolist()
            # one division, and the rounding of the pixels to float32
            torch.testing.assert_close(inputs.double(), x[picked], atol=1e-7, rtol=0.0)
        assert [float(y) for _, y in samples.dataset((6,), torch.float64)] == expected
        assert samples.dataset((6,), torch.float64).tensors[0].shape == (13, 6)


def test_the_limit_of_shaped_images_is_kept():
    images = Images(torch.rand(9, 1, 2, 2), torch.arange(9), 1.0, "images")
    assert Samples.of(Shaped(images, (4,), limit=4), "the data").labels.tolist() == [0, 1, 2, 3]


def test_samples_of_a_dataset_that_changes_what_a_tensor_dataset_gives_are_what_it_gives():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            x, label = super().__getitem__(index)
            return x / 2, label

    x = torch.rand(5, 3)
    samples = Samples.of(Doubled(x, torch.arange(5)), "the data")
    assert torch.equal(samples.batch(torch.arange(5), torch.float64)[0], x / 2)


def test_a_part_of_the_samples_is_those_rows():
    data = labelled((4,), 10)
    part = Samples.of(data, "the data").part(torch.tensor([7, 1]))
    x, labels = part.batch(torch.arange(2), torch.float64)
    assert torch.equal(x, data.tensors[0][[7, 1]])
    assert torch.equal(labels, data.tensors[1][[7, 1]])


X, Y = torch.rand(6, SIZE), torch.zeros(6, dtype=torch.long)
BAD_DATA = {
    "a number": 3,
    "a generator": ((x, 0) for x in X),
    "nothing": None,
    "an empty list": [],
    "an empty TensorDataset": TensorDataset(X[:0], Y[:0]),
    "inputs alone": TensorDataset(X),
    "a tensor": X,
    "triples": TensorDataset(X, Y, Y),
    "integers as pixels": TensorDataset((X * 255).byte(), Y),
    "integers in a list": [(torch.zeros(SIZE, dtype=torch.int64), 0)],
    "labels that are floats": TensorDataset(X, Y.double()),
    "labels with two numbers": TensorDataset(X, torch.zeros(6, 2, dtype=torch.long)),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_what_is_no_data_set_is_refused(name):
    net = network()
    before = copy.deepcopy(net)
    with pytest.raises(lc.InvalidParameterError, match="the training data"):
        lc.finetune(net, BAD_DATA[name])
    assert_same(net, before)
    if BAD_DATA[name] is not None:  # which means that there are no validation data
        with pytest.raises(lc.InvalidParameterError, match="the validation data"):
            lc.finetune(net, TensorDataset(X, Y), BAD_DATA[name])


# One step, and several, by hand.


def states_by_hand(W, u):
    """z = tanh(Wz + u) by small steps, then Newton's."""
    z = torch.zeros_like(u)
    for _ in range(400):
        z = 0.8 * z + 0.2 * torch.tanh(z @ W.T + u)
    eye = torch.eye(len(W))
    for _ in range(5):
        value = torch.tanh(z @ W.T + u)
        slope = 1.0 - value**2
        z = z + torch.linalg.solve(eye - slope.unsqueeze(2) * W, (value - z).unsqueeze(2)).squeeze(2)
    return z


def network_by_hand(p: dict[str, torch.Tensor], L: float, epsilon: float, x: torch.Tensor) -> torch.Tensor:
    """The logits of a dense stage, differentiable by implicit differentiation of one Newton step."""
    Psi, eye = p["log_psi"].exp(), torch.eye(len(p["b_z"]))
    inverse = torch.diag(1.0 / Psi)
    UU = inverse @ p["U"] @ p["U"].T @ inverse
    inner = (p["G"].T @ p["G"] + UU) / (2 * L) + p["V"].T @ p["V"] + p["S"] - p["S"].T + epsilon * eye
    W = eye - torch.diag(Psi) @ inner
    u = x @ p["U"].T + p["b_z"]
    with torch.no_grad():
        z = states_by_hand(W, u)
        slope = 1.0 - torch.tanh(z @ W.T + u) ** 2
        jacobian = eye - slope.unsqueeze(2) * W
    z = z + torch.linalg.solve(jacobian, (torch.tanh(z @ W.T + u) - z).unsqueeze(2)).squeeze(2)
    return z @ p["G"].T + p["b_y"]


def loss_by_hand(y, labels, margin, T):
    shifted = y.clone()
    shifted[torch.arange(len(y)), labels] -= margin
    leads = torch.logsumexp(shifted / T, 1) - shifted[torch.arange(len(y)), labels] / T
    return T * leads.mean()


PLAIN_STEPS = {}
ALL_OF_IT = {
    "betas": (0.8, 0.95),
    "weight_decay": 0.02,
    "clip": 0.05,
    "schedule": {"kind": "triangular"},
    "learning_rates": {"Psi": 0.5, "G": 2.0, "b": 0.1, "S": 0.0},
    "loss": {"offset": 0.3, "temperature": 0.25},
}


@pytest.mark.parametrize("options", [PLAIN_STEPS, ALL_OF_IT, {"clip": 1e3}, {"epsilon": 0.1}])
def test_the_steps_of_the_loop_are_adams_written_by_hand(options, batches_of):
    net, data = network(activation="tanh"), labelled((SIZE,), 11)
    config = configured(epochs=2, batch_size=4, **options)
    stage = net.stages[0]
    epsilon = config.epsilon if config.epsilon is not None else stage.epsilon
    p = {name: getattr(stage, name).detach().clone().requires_grad_(True) for name in NAMES}
    seen, losses = [], []
    batches_of(net, seen.append)
    report = lc.finetune(net, data, config=config, on_step=lambda step, total, loss: losses.append((step, total, loss)))
    assert len(seen) == 6  # batches of 4, 4 and 3
    rates = config.learning_rates
    factor = {
        "log_psi": rates.Psi,
        "G": rates.G,
        "U": rates.U,
        "V": rates.V,
        "S": rates.S,
        "b_z": rates.b,
        "b_y": rates.b,
    }
    m, v = ({name: torch.zeros_like(p[name]) for name in NAMES} for _ in range(2))
    b1, b2 = config.betas
    by_hand = []
    for k, x in enumerate(seen):
        margin = math.sqrt(2.0) * 1.5 * config.loss.offset
        logits = network_by_hand(p, 1.5, epsilon, x)
        loss = loss_by_hand(logits, data.tensors[1][rows_of(x, data)], margin, config.loss.temperature)
        moving = [name for name in NAMES if factor[name] > 0.0]
        grads = dict(zip(moving, torch.autograd.grad(loss, [p[name] for name in moving]), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        shrink = 1.0 if config.clip is None else min(1.0, config.clip / (norm + 1e-6))
        place = (k + 0.5) / 6
        peak = 1.0 if config.schedule.kind == "constant" else np.interp(place, [0, 0.4, 0.8, 1], [0, 1, 0.05, 0])
        by_hand.append(float(loss.detach()))
        assert losses[k][:2] == (k + 1, 6)
        assert losses[k][2] == pytest.approx(by_hand[k], rel=1e-11)
        with torch.no_grad():
            for name in moving:
                g = shrink * grads[name] + config.weight_decay * p[name]
                m[name] = b1 * m[name] + (1 - b1) * g
                v[name] = b2 * v[name] + (1 - b2) * g**2
                step = m[name] / (1 - b1 ** (k + 1)) / ((v[name] / (1 - b2 ** (k + 1))).sqrt() + 1e-8)
                p[name] -= config.learning_rate * peak * factor[name] * step
    for name in NAMES:
        # Equilibria to 1e-13; g/√(g²) makes more of the error of a small gradient, of which none is below 1e-5.
        torch.testing.assert_close(getattr(stage, name).detach(), p[name].detach(), atol=1e-9, rtol=0.0)
    # the mean over the samples of an epoch, whose last batch is smaller
    means = [np.average(by_hand[3 * e : 3 * e + 3], weights=[4, 4, 3]) for e in range(2)]
    np.testing.assert_allclose([record.loss for record in report.history[1:]], means, rtol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_of_muon_turns_the_gradient_of_a_matrix_into_its_orthogonal_factor(decay, batches_of):
    """Against singular vectors: Newton and Schulz's values are within 0.6 to 1.3 of 1 where the gradient's are not tiny."""
    net, data = network(activation="tanh"), labelled((SIZE,), 8)
    rates, config = {"G": 2.0}, configured(epochs=1, optimizer="muon", learning_rates={"G": 2.0}, weight_decay=decay)
    stage, seen = net.stages[0], []
    p = {name: getattr(stage, name).detach().clone().requires_grad_(True) for name in NAMES}
    batches_of(net, seen.append)
    lc.finetune(net, data, config=config)
    logits = network_by_hand(p, 1.5, 0.2, seen[0])
    loss = loss_by_hand(logits, data.tensors[1][rows_of(seen[0], data)], math.sqrt(2.0) * 1.5 * 0.1, 0.5)
    grads = dict(zip(NAMES, torch.autograd.grad(loss, list(p.values())), strict=True))
    for name, gradient in grads.items():
        rate = 1e-2 * rates.get(name, 1.0)
        moved = p[name].detach() - getattr(stage, name).detach()
        if name in ("log_psi", "b_z", "b_y"):  # Adam's first step, the decay in its gradient
            expected = rate * (gradient + decay * p[name].detach()).sign()
            torch.testing.assert_close(moved, expected, atol=1e-7, rtol=0.0)  # 1e-8 beside gradients of 1e-3
            continue
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        step = (moved - rate * decay * p[name].detach()) / (0.2 * math.sqrt(max(gradient.shape)) * rate)
        large = values > 0.2 * values.norm()
        found = (left.T @ step @ right.T)[large][:, large]
        torch.testing.assert_close(found, found.diagonal().diag(), atol=0.1, rtol=0.0)  # it computes in bfloat16
        assert len(found) > 0
        assert float(found.diagonal().min()) > 0.6
        assert float(found.diagonal().max()) < 1.3


def test_muon_is_for_matrices_and_leaves_what_is_frozen():
    net = network()
    before, epsilon = weights_of(net), net.stages[0].epsilon
    rates = dict.fromkeys(("G", "U", "V", "S"), 0.0)
    config = configured(optimizer="muon", learning_rates=rates, epsilon=0.7)
    with pytest.raises(lc.InvalidParameterError, match="no matrix is trained"):
        require_fit(net, labelled((SIZE,), 8), config)
    with pytest.raises(lc.InvalidParameterError, match="no matrix is trained"):
        lc.finetune(net, labelled((SIZE,), 8), config=config)
    assert net.stages[0].epsilon == epsilon  # what is refused stays as it was
    lc.finetune(net, labelled((SIZE,), 8), config=configured(optimizer="muon", learning_rates={"V": 0.0, "Psi": 0.0}))
    after = weights_of(net)
    assert {name.split(".")[-1] for name in before if torch.equal(before[name], after[name])} == {"V", "log_psi"}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_gradient_is_clipped_over_all_optimisers_together(optimizer, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(parameters, limit):
        parameters = list(parameters)
        clip(parameters, limit)
        norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    lc.finetune(network(), labelled((SIZE,), 8), config=configured(epochs=1, optimizer=optimizer, clip=1e-3))
    assert norms == [pytest.approx(1e-3, rel=1e-2)]  # torch divides by the norm + 1e-6


def test_a_flat_network_is_trained_on_images():
    data = labelled((1, 1, SIZE), 9)
    flat = TensorDataset(data.tensors[0].flatten(1), data.tensors[1])
    nets = [network(), network()]
    for net, given in zip(nets, (data, flat), strict=True):
        lc.finetune(net, given, given, configured())
    assert_same(*nets)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_every_sample_is_taken_exactly_once_an_epoch(batch_size, batches_of):
    net, data, seen = network(), labelled((SIZE,), 11), []
    batches_of(net, seen.append)
    report = lc.finetune(net, data, config=configured(epochs=3, batch_size=batch_size))
    per_epoch = math.ceil(11 / batch_size)
    assert len(seen) == 3 * per_epoch
    orders = []
    for epoch in range(3):
        batches = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert all(len(batch) == min(batch_size, 11) for batch in batches[:-1])
        orders.append([row for batch in batches for row in rows_of(batch, data)])
        assert sorted(orders[-1]) == list(range(11))
        assert report.history[1 + epoch].step == (1 + epoch) * per_epoch
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]


def test_images_are_augmented_sample_by_sample_and_otherwise_left_alone(batches_of):
    net, data, seen = image_network(), labelled((3, 4, 6), 40), []
    batches_of(net, seen.append)
    lc.finetune(net, data, config=configured(epochs=2, batch_size=20, augment={"flip": True}, tolerance=1e-3))
    originals, patterns = data.tensors[0], set()
    for batch in seen:
        flipped = []
        for image in batch:
            plain = (originals == image).flatten(1).all(1)
            mirrored = (originals.flip(3) == image).flatten(1).all(1)
            assert int(plain.sum()) + int(mirrored.sum()) == 1
            flipped.append(bool(mirrored.any()))
        assert 0 < sum(flipped) < 20
        patterns.add(tuple(flipped))
    assert len(patterns) == 4  # every step has draws of its own, alike with probability 2^-20


def test_images_are_augmented_by_the_very_draws_of_their_rows_and_colours_by_factors_within_the_range(batches_of):
    net, data, seen = image_network(), labelled((3, 4, 6), 12), []
    data.tensors[0].mul_(0.5)  # so that nothing is clamped
    batches_of(net, seen.append)
    augment = {"brightness": (0.5, 1.5)}
    lc.finetune(net, data, config=configured(epochs=1, batch_size=4, augment=augment, tolerance=1e-3))
    factors = []
    for image in torch.cat(seen):
        ratios = image / data.tensors[0]
        spread = ratios.flatten(1).std(1)
        assert float(spread.min()) < 1e-12  # one of the images, times a number
        factors.append(float(ratios[spread.argmin()].mean()))
    assert 0.5 <= min(factors) < 0.9 < 1.1 < max(factors) <= 1.5
    assert len(set(factors)) == 12


# Which parameters move.

GROUPS = {"Psi": ["log_psi"], "G": ["G"], "U": ["U"], "V": ["V"], "S": ["S"], "b": ["b_z", "b_y"]}


@pytest.mark.parametrize("group", GROUPS)
def test_a_factor_of_0_freezes_exactly_its_group(group):
    net = network()
    before = weights_of(net)
    lc.finetune(net, labelled((SIZE,), 11), config=configured(weight_decay=0.1, learning_rates={group: 0.0}))
    for name, parameter in net.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == (name.rsplit(".", 1)[-1] in GROUPS[group]), name
        assert parameter.requires_grad


def test_nothing_left_to_train_is_refused():
    net = network()
    with pytest.raises(lc.InvalidParameterError, match="learning_rates"):
        lc.finetune(net, labelled((SIZE,), 4), config=configured(learning_rates=dict.fromkeys(GROUPS, 0.0)))
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("k", [0, 1])
def test_only_the_stages_asked_for_are_trained(k):
    net = image_network()
    before, epsilons = weights_of(net), [stage.epsilon for stage in net.stages]
    config = configured(balance=True, stages=[k], epsilon=0.01, roots=0.1)
    lc.finetune(net, labelled(net.input_shape, 11), config=config)
    for j, stage in enumerate(net.stages):
        names = [name for name, p in net.named_parameters() if any(p is q for q in stage.parameters())]
        same = [torch.equal(before[name], dict(net.named_parameters())[name]) for name in names]
        assert (not any(same)) if j == k else all(same)
        assert stage.epsilon == (0.01 if j == k else epsilons[j])
        assert all(p.requires_grad for p in stage.parameters())


@pytest.mark.parametrize("stages", [[2], [0, 5]])
def test_stages_that_are_not_there_are_refused(stages):
    with pytest.raises(lc.InvalidParameterError, match=r"stages.*2, from 0"):
        lc.finetune(image_network(), labelled((3, 4, 6), 11), config=configured(stages=stages))


@pytest.mark.parametrize("balance", [False, True])
def test_parameters_frozen_by_the_caller_stay_and_keep_being_frozen(balance):
    net = network()
    net.stages[0].V.requires_grad_(False)
    before = weights_of(net)
    lc.finetune(net, labelled((SIZE,), 11), config=configured(balance=balance))
    assert torch.equal(net.stages[0].V, before["steps.0.V"])
    assert not net.stages[0].V.requires_grad
    assert not torch.equal(net.stages[0].S, before["steps.0.S"])


@pytest.mark.parametrize("stopped", [False, True])
def test_options_hooks_and_modes_are_as_before_afterwards(stopped):
    net = image_network()
    options = lc.SolverOptions(tolerance=1e-5)
    net.set_options(options)

    def stop(step, total, loss):
        assert all(stage.options.tolerance == 1e-3 for stage in net.stages)
        if stopped and step == 2:
            raise StopError

    config = configured(tolerance=1e-3, penalty={"weight": 0.1, "freeze": True}, learning_rates={"U": 0.0})
    try:
        lc.finetune(net, labelled((3, 4, 6), 20), config=config, on_step=stop)
    except StopError:
        assert stopped
    assert all(stage.options is options for stage in net.stages)
    stages = [parameter for stage in net.stages for parameter in stage.parameters()]
    assert all(parameter.requires_grad for parameter in stages)
    assert not any(parameter._backward_hooks for parameter in stages)
    if not stopped:
        assert not net.training


@pytest.mark.parametrize("options", [{"data": [1, 2]}, {"model": nn.Linear(2, 2)}])
def test_what_is_no_label_is_refused_before_anything_is_trained(options):
    net = network()
    before = weights_of(net)
    with pytest.raises(lc.InvalidParameterError, match="a word for the report"):
        lc.finetune(net, labelled((SIZE,), 8), config=configured(), **options)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(net).items())


def test_a_data_set_in_a_shape_that_its_samples_do_not_have_is_refused():
    with pytest.raises(lc.ShapeError, match="a sample of the data"):
        Samples.of(labelled((3, 4, 6), 2), "the test data").dataset((71,), torch.float64)


def test_epsilon_takes_epsilon_psi_off_W_and_keeps_L():
    for start in (0.0, 0.2):
        net = network()
        stage = net.stages[0]
        stage.epsilon = start
        W, Psi, L = stage.W.detach(), stage.Psi.detach(), net.lipschitz
        rates = dict.fromkeys(GROUPS, 0.0) | {"b": 1.0}
        report = lc.finetune(net, labelled((SIZE,), 8), config=configured(epsilon=0.3, learning_rates=rates))
        # two roads of a few operations on numbers of size 1
        torch.testing.assert_close(stage.W.detach(), W - (0.3 - start) * torch.diag(Psi), atol=1e-14, rtol=0.0)
        assert stage.epsilon == 0.3
        assert net.lipschitz == L
        assert {record.lipschitz for record in report.history} == {L}
        H = np.linalg.eigvalsh(H_of(stage))
        assert H[0] >= 2 * 0.3 * float(Psi.min()) - 1e-12


def rescaled(net: lc.Network, seed: int = 0) -> lc.Network:
    """The same function with states Dz, D random: the gauge of FORMULAS L4, by `lipconvert.gauge` of each stage."""
    result = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    for k, step in enumerate(net.steps):
        if isinstance(step, lc.LBEN):
            dae = step.dae()
            D = torch.rand(dae.states, generator=generator, dtype=torch.float64).mul(6.0).sub(3.0).exp()
            result.steps[k] = lc.LBEN.from_dae(lc.gauge(dae, D), epsilon=step.epsilon)
    return result


@pytest.mark.parametrize("start", [lambda: network(epsilon=0.0), image_network], ids=["dense", "images"])
def test_a_balanced_run_does_not_depend_on_the_scale_of_the_states_it_starts_from(start):
    plain, other = start(), rescaled(start())
    assert max(float(stage.Psi.detach().max() / stage.Psi.detach().min()) for stage in other.stages) > 100.0
    data = labelled(plain.input_shape, 40)
    config = configured(balance=True, epochs=1, held_out=8, learning_rates={"V": 0.0})  # V: any root of H/2 − εI
    found = [lc.finetune(net, data, config=config) for net in (plain, other)]
    assert abs(found[0].history[-1].loss - found[1].history[-1].loss) < 1e-7
    x = labelled(plain.input_shape, 10, seed=3).tensors[0]
    with torch.no_grad():
        assert float((plain(x) - other(x)).abs().max()) < 1e-6  # Adam divides by roots of squares: some digits go
    for stage in (*plain.stages, *other.stages):
        assert torch.equal(stage.Psi, torch.ones_like(stage.Psi))
        assert stage.log_psi.requires_grad


def test_a_rate_of_psi_that_stays_is_refused():
    with pytest.raises(lc.InvalidParameterError, match=r"Psi.*balance"):
        lc.finetune(
            network(epsilon=0.0), labelled((SIZE,), 11), config=configured(balance=True, learning_rates={"Psi": 2.0})
        )
    only = {"Psi": 1.0} | dict.fromkeys("GUVSb", 0.0)
    net = network(epsilon=0.0)
    before = weights_of(net)
    with pytest.raises(lc.InvalidParameterError, match=r"nothing is left to train: with balance"):
        lc.finetune(net, labelled((SIZE,), 11), config=configured(balance=True, learning_rates=only))
    lc.finetune(net, labelled((SIZE,), 11), config=configured(learning_rates=only))
    assert not torch.equal(net.stages[0].log_psi, before["steps.0.log_psi"])


def test_where_activations_are_not_homogeneous_psi_is_trained():
    torch.manual_seed(0)
    net = lc.convert(lc.LBEN(SIZE, 6, CLASSES, epsilon=0.2, activation="tanh").double(), check=False)
    lc.finetune(net, labelled(net.input_shape, 40), config=configured(balance=True, epochs=1))
    assert bool((net.stages[0].Psi != 1.0).all())


def test_without_it_the_scale_of_the_states_is_the_scale_of_the_steps():
    plain, other = network(epsilon=0.0), rescaled(network(epsilon=0.0))
    data = labelled(plain.input_shape, 40)
    config = configured(epochs=1, learning_rates={"V": 0.0})
    losses = [lc.finetune(net, data, config=config).history[-1].loss for net in (plain, other)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_roots_fill_rows_of_V_that_are_zero_and_nothing_else():
    torch.manual_seed(0)
    source = SLLNetwork(inputs=SIZE, classes=CLASSES, features=40, dense_depth=2).double()
    net, again, other = (lc.convert(source, check=False) for _ in range(3))
    before = weights_of(net)
    rates = dict.fromkeys(GROUPS, 0.0) | {"b": 1.0}
    lc.finetune(net, labelled((SIZE,), 8), config=configured(roots=0.01, learning_rates=rates))
    found, count = [], 0
    for name, parameter in net.named_parameters():
        if name.endswith(".V"):
            zero = (before[name] == 0).all(1)
            assert torch.equal(parameter[~zero], before[name][~zero])
            found.append(parameter.detach()[zero].flatten() * parameter.shape[1] ** 0.5)
            count += int(zero.sum())
        elif not name.endswith((".b_z", ".b_y")):
            assert torch.equal(parameter, before[name]), name
    entries = torch.cat(found)
    assert count > 5
    assert bool((entries != 0).all())
    # rows of norm 0.01 about: mean and deviation of so many normal numbers, within five standard deviations
    assert abs(float(entries.mean())) < 5 * 0.01 / len(entries) ** 0.5
    assert abs(float(entries.std()) / 0.01 - 1.0) < 5 / (2 * len(entries)) ** 0.5
    # they are a function of the seed
    for seed, same in ((0, True), (1, False)):
        twin = copy.deepcopy(again)
        torch.rand(3)
        config = configured(roots=0.01, learning_rates=rates, seed=seed)
        lc.finetune(twin, labelled((SIZE,), 8), config=config)
        assert torch.equal(twin.stages[0].V, net.stages[0].V) == same
    # without roots no gradient moves them
    lc.finetune(other, labelled((SIZE,), 8), config=configured())
    for name, parameter in other.named_parameters():
        if name.endswith(".V"):
            zero = (before[name] == 0).all(1)
            assert torch.equal(parameter[zero], before[name][zero])
            assert not torch.equal(parameter[~zero], before[name][~zero])


# The penalty on images.


def numbers_of(stage: lc.LBEN) -> dict[str, np.ndarray]:
    return {name: getattr(stage, name).detach().double().numpy().copy() for name in NAMES}


def dense_W(p: dict[str, np.ndarray], L: float, epsilon: float) -> np.ndarray:
    """W of equation (2) from the numbers of a stage, as one matrix on flattened images."""
    flat = {k: circulant(torch.from_numpy(p[k])).numpy() if p[k].ndim == 4 else p[k] for k in ("G", "U", "V", "S")}
    G, U, V, S = (flat[k] for k in ("G", "U", "V", "S"))
    psi = np.exp(p["log_psi"]).repeat(len(S) // len(p["log_psi"]))
    scaled = U / psi[:, None]
    inner = (G.T @ G + scaled @ scaled.T) / (2 * L) + V.T @ V + S - S.T + epsilon * np.eye(len(S))
    return np.eye(len(S)) - psi[:, None] * inner


def kernels_of(stage: lc.LBEN, p: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """The kernels of W: what the first pixel of each channel sees of every pixel."""
    W = dense_W(numbers_of(stage) if p is None else p, stage.lipschitz, stage.epsilon)
    n, (h, w) = len(stage.b_z), stage.grid.image
    return W.reshape(n, h, w, n, h, w)[:, 0, 0]


def H_of(stage: lc.LBEN, gauge: bool = True) -> np.ndarray:
    """H(Ψ⁻¹, L) of a stage from its definition, by W of equation (2); in the gauge Ψ = I, or as it is."""
    p = numbers_of(stage)
    W = dense_W(p, stage.lipschitz, stage.epsilon)
    G, U = (circulant(torch.from_numpy(p[k])).numpy() if p[k].ndim == 4 else p[k] for k in ("G", "U"))
    Lambda = np.diag(np.exp(-p["log_psi"]).repeat(len(W) // len(p["log_psi"])))
    H = 2 * Lambda - Lambda @ W - W.T @ Lambda - (G.T @ G + Lambda @ U @ U.T @ Lambda) / stage.lipschitz
    root = np.sqrt(np.diag(Lambda)) if gauge else np.ones(len(W))
    return 0.5 * (H + H.T) / np.outer(root, root)


def gauged_W(stage: lc.LBEN) -> np.ndarray:
    """Λ^{1/2} W Λ^{-1/2} as one matrix."""
    p = numbers_of(stage)
    W = dense_W(p, stage.lipschitz, stage.epsilon)
    root = np.exp(-0.5 * p["log_psi"]).repeat(len(W) // len(p["log_psi"]))
    return root[:, None] * W / root


def outside_of(stage: lc.LBEN) -> np.ndarray:
    """Where the kernels of W are zero but for round-off, without the diagonal, where −εΨ is."""
    kernels = np.abs(kernels_of(stage))
    outside = kernels <= 1e-9 * kernels.max()
    outside[range(len(outside)), range(len(outside)), 0, 0] = False
    assert 0.1 < outside.mean() < 0.95
    return outside


def norm_of(entries: np.ndarray, norm: str) -> float:
    return float(np.abs(entries).sum() if norm == "l1" else np.sqrt((entries**2).sum()))


@pytest.mark.parametrize(("norm", "precision"), [("l1", "64-true"), ("l2", "64-true"), ("l1", "32-true")])
def test_the_penalty_is_the_norm_of_W_outside_its_support(norm, precision):
    net, kernels = image_network(), []
    staged = [stage for stage in net.stages if stage.grid]
    assert staged
    outside = [outside_of(stage) for stage in staged]

    def look(record):
        kernels.append([kernels_of(stage) for stage in staged])

    tolerance = {"64-true": 1e-13, "32-true": 1e-5}[precision]
    penalty = {"weight": 0.3, "norm": norm}
    config = configured(epochs=4, batch_size=100, penalty=penalty, precision=precision, tolerance=tolerance)
    # entries at round-off at the start; sums of a thousand entries of size 1e-2 in the precision of the run
    relative, start = {"64-true": (1e-10, 1e-12), "32-true": (1e-4, 1e-3)}[precision]
    losses = []
    report = lc.finetune(
        net,
        labelled((3, 4, 6), 10),
        config=config,
        on_epoch=look,
        on_step=lambda step, total, loss: losses.append(loss),
    )
    assert report.history[0].penalty is None
    for epoch in range(1, 5):
        # one step an epoch: what it cost is that of the weights at the end of the epoch before
        parts = [norm_of(K[mask], norm) for K, mask in zip(kernels[epoch - 1], outside, strict=True)]
        assert report.history[epoch].penalty == pytest.approx(0.3 * sum(parts), rel=relative, abs=start)
        assert losses[epoch - 1] == pytest.approx(report.history[epoch].loss + report.history[epoch].penalty, rel=1e-12)
    assert report.history[2].penalty > 0.1


def test_a_larger_penalty_leaves_less_outside_the_support():
    left = []
    for weight in (0.0, 1.0):
        net = image_network()
        staged = [stage for stage in net.stages if stage.grid]
        outside = [outside_of(stage) for stage in staged]
        penalty = {"weight": weight, "norm": "l1"}
        options = {"epochs": 10, "batch_size": 10, "learning_rate": 3e-3, "tolerance": 1e-4, "penalty": penalty}
        config = configured(schedule={"kind": "linear"}, **options)
        lc.finetune(net, labelled((3, 4, 6), 10), config=config)
        left.append(sum(norm_of(kernels_of(s)[mask], "l1") for s, mask in zip(staged, outside, strict=True)))
    assert left[1] < 0.5 * left[0]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_of_the_penalty_is_its_difference_quotient(norm):
    stage = next(stage for stage in image_network().stages if stage.grid)
    support, outside = _Support(stage), outside_of(stage)
    with torch.no_grad():
        for name in NAMES:
            getattr(stage, name).add_(0.05 * torch.randn_like(getattr(stage, name)))
    cost = support.cost(norm)
    assert float(cost.detach()) == pytest.approx(norm_of(kernels_of(stage)[outside], norm), rel=1e-11)
    cost.backward()
    p = numbers_of(stage)
    for name in ("log_psi", "G", "U", "V", "S"):
        direction, size = np.random.default_rng(0).standard_normal(p[name].shape), 1e-6
        ends = []
        for sign in (1.0, -1.0):
            moved = p | {name: p[name] + sign * size * direction}
            ends.append(norm_of(kernels_of(stage, moved)[outside], norm))
        slope = (ends[0] - ends[1]) / (2 * size)
        # central differences: round-off 1e-14/1e-6, curvature 1e-12, and a corner of |·| met once in 1e4 entries
        assert float((getattr(stage, name).grad * torch.from_numpy(direction)).sum()) == pytest.approx(slope, rel=1e-5)


def test_the_loop_steps_along_the_gradient_of_loss_and_penalty(batches_of):
    net, data, grads, weights = image_network(), labelled((3, 4, 6), 6), [], []
    supports = [_Support(copy.deepcopy(stage)) for stage in net.stages if stage.grid]
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda q, n=name: grads.append((n, q.grad.clone())))
    batches_of(net, lambda x: weights.append(weights_of(net)))
    config = configured(epochs=2, batch_size=6, penalty={"weight": 0.3, "norm": "l2"}, loss={"offset": 0.2})
    other = copy.deepcopy(net)
    lc.finetune(net, data, config=config)
    other.load_state_dict(other.state_dict() | weights[1])
    other.set_options(lc.SolverOptions())
    loss = margin_loss(other(data.tensors[0]), data.tensors[1], math.sqrt(2.0) * other.lipschitz * 0.2, 0.25)
    staged = [stage for stage in other.stages if stage.grid]
    for support, stage in zip(supports, staged, strict=True):
        kernels = stage.grid.kernels(stage.W)
        loss = loss + 0.3 * torch.linalg.vector_norm(kernels[support.outside])
    loss.backward()
    found = dict(grads[len(grads) // 2 :])
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            # equilibria and adjoints to 1e-13, gradients of size 1
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"precision": "32-true", "tolerance": 1e-5}, {"learning_rates": {"U": 0.0}}, {"roots": 0.01}]
)
def test_frozen_entries_outside_the_support_stay_bit_for_bit(options):
    net, before = image_network(), {}
    # What is zero but for the round-off of a transform, 1e-17: in float64, before anything is cast.
    given = {k: numbers_of(stage) for k, stage in enumerate(net.stages)}
    nothing = {k: {name: np.abs(p[name]) <= 1e-9 * np.abs(p[name]).max() for name in NAMES} for k, p in given.items()}
    outside = {k: outside_of(stage) for k, stage in enumerate(net.stages) if stage.grid}
    assert outside

    def start(record):  # the numbers in the precision of the run, roots and all
        before.update({} if record.epoch else {k: numbers_of(stage) for k, stage in enumerate(net.stages)})

    config = configured(epochs=2, penalty={"weight": 0.1, "freeze": True}, **options)
    lc.finetune(net, labelled((3, 4, 6), 20), config=config, on_epoch=start)
    for k, stage in enumerate(net.stages):
        after = numbers_of(stage)
        if k not in outside:
            assert (after["V"] != before[k]["V"]).any()
            continue
        inside = ~outside[k]
        for name in ("G", "U", "S"):
            zero = nothing[k][name]
            assert 0.1 < zero.mean() < 1.0
            np.testing.assert_array_equal(after[name][zero], before[k][name][zero])
        # V′V is symmetric: its own support is that of W, of its transpose, whose taps are mirrored, and the diagonal
        n, h, w = len(inside), *inside.shape[2:]
        free = inside.copy()
        for i, j, a, b in np.argwhere(inside):
            free[j, i, -a % h, -b % w] = True
        free[np.arange(n), np.arange(n), 0, 0] = True
        assert 0.0 < free.mean() < 1.0
        np.testing.assert_array_equal(after["V"][~free], before[k]["V"][~free])
        # and roots grow on the support alone: the numbers given, but for a cast to float32
        np.testing.assert_allclose(after["V"][~free], given[k]["V"][~free], rtol=1e-6, atol=1e-9)
        for name in ("G", "S"):
            used = ~nothing[k][name]
            assert (after[name][used] != before[k][name][used]).mean() > 0.9, name


# What is recorded, and what is kept.


def snapshots(net_of):
    """(function to call after every epoch, what it saw): a float64 copy of the network each time."""
    found = []
    return lambda record: found.append(copy.deepcopy(net_of()).double()), found


def measured(net: lc.Network, data: TensorDataset, radii=(0.01, 0.03, 0.1)) -> tuple[float, list[float]]:
    """Natural and certified accuracy, from logits and radii."""
    x, labels = data.tensors
    with torch.no_grad():
        natural = float((net(x).argmax(1) == labels).double().mean())
    reach = lc.certified_radii(net, x, labels, "prescribed")
    return natural, [float((reach > radius).double().mean()) for radius in radii]


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_a_record_is_what_certify_says_of_the_network_of_that_epoch(precision):
    net, train, held = network(), labelled((SIZE,), 60), labelled((SIZE,), 37, seed=1)
    net.set_options(lc.SolverOptions(tolerance=1e-12))
    look, found = snapshots(lambda: net)
    config = configured(epochs=2, batch_size=20, precision=precision, radii=[0.2, 0.01, 0.05], tolerance=1e-3)
    report = lc.finetune(net, train, held, config, on_epoch=look)
    assert len(found) == len(report.history) == 3
    changed = set()
    for record, then in zip(report.history, found, strict=True):
        then.set_options(lc.SolverOptions())  # what is recorded is never solved loosely
        assert (record.natural_accuracy, record.certified_accuracy) == measured(then, held, config.radii)
        assert record.lipschitz == 1.5
        changed.add(tuple(record.certified_accuracy))
    expected = lc.certify(found[-1], held, sorted(config.radii), method="prescribed")
    assert record.natural_accuracy == expected.natural_accuracy
    by_radius = dict(zip(config.radii, record.certified_accuracy, strict=True))
    assert [by_radius[r] for r in expected.radii] == expected.certified_accuracy
    assert record.proved_lipschitz == expected.proved_lipschitz
    assert record.delta == expected.delta
    assert len(changed) > 1


def test_the_record_of_epoch_0_is_of_before_training():
    net, held = network(), labelled((SIZE,), 40, seed=1)
    before = measured(net, held)
    report = lc.finetune(net, labelled((SIZE,), 30), held, configured())
    record = report.history[0]
    assert (record.epoch, record.step, record.loss, record.penalty, record.seconds) == (0, 0, None, None, 0.0)
    assert (record.natural_accuracy, record.certified_accuracy) == before
    assert [r.epoch for r in report.history] == [0, 1, 2]
    assert [r.step for r in report.history] == [0, 4, 8]


def test_the_records_of_a_source_network_are_of_its_conversion():
    source, held = image_source(), labelled((3, 4, 6), 20, seed=1)
    found = []
    report = lc.train(
        source,
        labelled((3, 4, 6), 20),
        held,
        configured(),
        on_epoch=lambda record: found.append(lc.convert(copy.deepcopy(source), check=False)),
    )
    for record, net in zip(report.history, found, strict=True):
        assert (record.natural_accuracy, record.certified_accuracy) == measured(net, held)
        # converted in float64 once here, once there: the same operations
        assert record.proved_lipschitz == lc.Certifier(net, "prescribed").bounds[0].lipschitz


def test_learning_rates_in_the_records_are_those_of_the_next_step():
    config = configured(epochs=4, learning_rate=0.02, schedule={"kind": "triangular"})
    report = lc.finetune(network(), labelled((SIZE,), 16), config=config)
    expected = [0.02 * np.interp((2 * e + 0.5) / 8, [0, 0.4, 0.8, 1], [0, 1, 0.05, 0]) for e in range(4)]
    np.testing.assert_allclose([record.learning_rate for record in report.history], [*expected, 0.0], rtol=1e-13)


def wild(**options) -> TrainingConfig:
    """Large steps: certified accuracy goes up and down."""
    return configured(epochs=6, batch_size=10, learning_rate=0.3, **options)


def test_the_weights_kept_are_those_of_the_best_epoch():
    kept = set()
    for seed in range(4):
        net = network(seed)
        look, found = snapshots(lambda net=net: net)
        config = wild(seed=seed)
        report = lc.finetune(net, labelled((SIZE,), 30), labelled((SIZE,), 50, seed=1), config, on_epoch=look)
        means = [np.mean(record.certified_accuracy) for record in report.history]
        assert report.kept == int(np.argmax(means))  # the first of equals
        assert_same(net, found[report.kept])
        assert net.training_summary.epochs == report.kept
        kept.add(report.kept)
    assert len(kept) > 1


@pytest.mark.parametrize("learning_rate", [0.3, 1e-12])
def test_of_equally_certified_epochs_the_most_accurate_is_kept_and_patience_counts_from_it(learning_rate):
    net = network()
    look, found = snapshots(lambda: net)
    config = wild(radii=[1e3], patience=3).model_copy(update={"learning_rate": learning_rate})  # certified: nothing
    report = lc.finetune(net, labelled((SIZE,), 30), labelled((SIZE,), 20, seed=1), config, on_epoch=look)
    assert {record.certified_accuracy[0] for record in report.history} == {0.0}
    natural = [record.natural_accuracy for record in report.history]
    best = int(np.argmax(natural))  # the first of equals
    assert (report.kept, report.stopped_early) == (best, len(natural) - 1 == best + 3)
    assert len(set(natural)) == 1 if learning_rate < 1e-9 else best > 0
    assert_same(net, found[best])


LAST_IS_NOT_BEST = 1  # a seed


@pytest.mark.parametrize("validated", [False, True])
def test_the_last_weights_are_kept_where_they_are_asked_for_or_nothing_is_known_of_them(validated):
    net = network()
    look, found = snapshots(lambda: net)
    held = labelled((SIZE,), 50, seed=1) if validated else None
    config = wild(keep="last" if validated else "best", seed=LAST_IS_NOT_BEST)
    report = lc.finetune(net, labelled((SIZE,), 30), held, config, on_epoch=look)
    assert report.kept == 6
    assert_same(net, found[6])
    if validated:
        assert int(np.argmax([np.mean(r.certified_accuracy) for r in report.history])) != 6  # it would not be the best
    else:
        assert all(r.natural_accuracy is None and r.certified_accuracy == [] for r in report.history)


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_patience_stops_so_many_epochs_after_the_best(patience):
    train, held = labelled((SIZE,), 30), labelled((SIZE,), 50, seed=1)
    config = {"epochs": 9, "batch_size": 10, "learning_rate": 0.3, "tolerance": 1e-6}
    whole = lc.finetune(network(), train, held, configured(**config))
    means = [np.mean(record.certified_accuracy) for record in whole.history]
    best, expected = 0, 9
    for epoch in range(1, 10):
        best = epoch if means[epoch] > means[best] else best
        if epoch - best >= patience:
            expected = epoch
            break
    report = lc.finetune(network(), train, held, configured(**config, patience=patience))
    assert len(report.history) - 1 == expected
    assert report.stopped_early == (expected < 9)
    assert report.kept == best
    for record, there in zip(timeless(report), timeless(whole), strict=False):
        assert record == there


def test_samples_held_out_are_disjoint_from_the_others_and_fixed_by_the_seed(batches_of):
    data, held_rows = labelled((SIZE,), 40), {}
    for name, options in {"a": {}, "b": {"epochs": 1, "batch_size": 5, "learning_rate": 1.0}, "c": {"seed": 1}}.items():
        net, seen = network(), []
        batches_of(net, seen.append)
        look, found = snapshots(lambda net=net: net)
        report = lc.finetune(net, data, config=configured(held_out=13, **options), on_epoch=look)
        trained = {row for batch in seen for row in rows_of(batch, data)}
        assert len(trained) == report.train_samples == 27
        assert report.validation_samples == 13
        held = sorted(set(range(40)) - trained)
        # the accuracies are of exactly those that were never trained on
        rest = TensorDataset(data.tensors[0][held], data.tensors[1][held])
        for record, then in zip(report.history, found, strict=True):
            assert (record.natural_accuracy, record.certified_accuracy) == measured(then, rest)
        held_rows[name] = held
    assert held_rows["a"] == held_rows["b"] != held_rows["c"]


def test_only_so_many_validation_samples_are_used_as_asked_for():
    net, held = network(), labelled((SIZE,), 30, seed=1)
    expected = measured(net, TensorDataset(*(part[:11] for part in held.tensors)), [0.01])
    config = configured(validation_samples=11, radii=[0.01])
    report = lc.finetune(net, labelled((SIZE,), 8), held, config)
    assert report.validation_samples == 11
    assert (report.history[0].natural_accuracy, report.history[0].certified_accuracy) == expected


def test_training_raises_certified_accuracy():
    net = network()
    config = configured(epochs=10, batch_size=20, learning_rate=0.02, schedule={"kind": "one_cycle"}, tolerance=1e-3)
    report = lc.finetune(net, labelled((SIZE,), 200), labelled((SIZE,), 100, seed=1), config)
    first, last = report.history[0], report.history[-1]
    assert last.certified_accuracy[0] > first.certified_accuracy[0] + 0.3
    assert last.loss < report.history[1].loss


def test_files_say_what_is_returned(tmp_path):
    net = network()
    report = lc.finetune(
        net,
        labelled((SIZE,), 20),
        labelled((SIZE,), 10, seed=1),
        configured(),
        folder=tmp_path,
        model="a network",
        data="random numbers",
    )
    assert FinetuneReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    assert (report.model, report.data, report.processes) == ("a network", "random numbers", 1)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))
    rows = table(tmp_path)
    assert len(rows) == 3
    for row, record in zip(rows, report.history, strict=True):
        for name in ("step", "loss", "natural_accuracy", "least_eigenvalue", "proved_lipschitz", "seconds"):
            value = getattr(record, name)
            assert row[name] == ("" if value is None else str(value)), name
        for radius, value in zip(report.config.radii, record.certified_accuracy, strict=True):
            assert row[f"certified_accuracy at {radius_name(radius)}"] == str(value)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# The constant.

EXAMPLES = [(name, k) for name in lc.registry().names() for k in range(len(lc.registry().example_models(name, seed=0)))]
# These end in equilibria that do not converge, and say so after 5,000 steps of each solver.
SLOW = {("mondeq", 2, "train", 10.0), ("mondeq", 2, "train", 1e3), ("lben", 1, "train", 10.0)}
LOST = (lc.NotFiniteError, lc.NotConvergedError, lc.NotPSDError, lc.NoCertificateError)


def example(name: str, k: int) -> nn.Module:
    return lc.registry().example_models(name, seed=0)[k].double()


def steepest(model: nn.Module, shape: tuple[int, ...]) -> float:
    """The largest 2-norm of the Jacobian at a few points."""
    x = torch.randn(8, *shape).requires_grad_(True)
    y = model(x)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(y.shape[1])]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())


@pytest.mark.parametrize("kind", ["train", "finetune"])
@pytest.mark.parametrize(("name", "k"), EXAMPLES)
def test_every_architecture_keeps_its_constant_at_any_learning_rate_or_says_that_it_is_lost(name, k, kind):
    net = lc.convert(example(name, k), check=False)
    with torch.no_grad():
        logits = net(torch.rand(2, *net.input_shape))
    data = TensorDataset(torch.rand(6, *net.input_shape), torch.arange(6) % logits.shape[1])
    if logits.dim() != 2:
        with pytest.raises(lc.ShapeError, match="logits"):
            lc.finetune(net, data)
        return
    # At 10 it must be one of the errors that say what is lost, with weights of 1e3 anything may be refused.
    refused = {1e-3: (), 10.0: LOST, 1e3: lc.LipconvertError}
    for rate in refused:
        if (name, k, kind, rate) in SLOW:
            continue
        model = example(name, k) if kind == "train" else lc.convert(example(name, k), check=False)
        config = configured(epochs=1, batch_size=6, learning_rate=rate, tolerance=1e-6)
        try:
            report = (lc.train if kind == "train" else lc.finetune)(model, data, config=config)
        except refused[rate]:
            continue
        net = lc.convert(model, check=False) if kind == "train" else model
        L = net.lipschitz
        for record in report.history:
            assert record.lipschitz <= record.proved_lipschitz
            # δ is the largest of the stages; their constants multiply
            assert record.proved_lipschitz <= record.lipschitz * (1.0 + record.delta) ** len(net.stages) * (1.0 + 1e-9)
            assert record.delta <= 1e-2
        assert report.history[-1].lipschitz == L
        scale = max(1.0, *(np.linalg.norm(gauged_W(stage), 2) for stage in net.stages))
        assert report.history[-1].least_eigenvalue >= -1e-12 * scale  # round-off of a few dozen states
        if rate == 1e-3:
            # equilibria to 1e-13, a norm of a few thousand numbers
            assert steepest(model, net.input_shape) <= L * (1.0 + 1e-6)


@pytest.mark.parametrize("name", ["aol", "cpl", "sandwich", "sll"])
def test_source_networks_keep_their_constant_for_epochs_at_an_absurd_learning_rate(name):
    model = lc.registry().new_model(name, SIZE, CLASSES, seed=0).double()
    config = configured(epochs=3, learning_rate=10.0)
    report = lc.train(model, labelled((SIZE,), 16), config=config)
    assert report.history[-1].step == 6
    # δ is at most 1e-2 for every network (lipconvert.certification.proofs), 1e-6 where the proof is at L itself
    assert all(record.proved_lipschitz <= record.lipschitz * (1.0 + 1.1e-2) for record in report.history)
    assert steepest(model, (SIZE,)) <= report.history[-1].lipschitz * (1.0 + 1e-9)


@pytest.mark.parametrize("name", ["g_mondeq", "lben", "mondeq", "sandwich", "aol"])
def test_the_least_eigenvalue_recorded_is_that_of_H_in_the_gauge_of_Psi_1(name):
    net = lc.convert(example(name, 0), check=False)
    data = TensorDataset(torch.rand(6, *net.input_shape), torch.arange(6) % 3)
    report = lc.finetune(net, data, config=configured(epochs=1))
    expected = min(float(np.linalg.eigvalsh(H_of(stage))[0]) for stage in net.stages)
    assert report.history[-1].least_eigenvalue == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("name", ["cpl", "g_mondeq", "mondeq"])
def test_large_entries_of_Psi_are_no_loss_of_the_constant(name):
    # H = 2V′V + 2εI whatever the numbers are: only its round-off, of size Λ, can be negative.
    net = lc.convert(example(name, 0), check=False)
    data = TensorDataset(torch.rand(6, *net.input_shape), torch.arange(6) % 3)
    with torch.no_grad():
        for stage in net.stages:
            stage.log_psi.add_(torch.linspace(-12.0, 12.0, len(stage.log_psi)))
    stage = net.stages[0]
    floor = 1e-13 * max(1.0, float(np.abs(H_of(stage)).max()))
    assert np.linalg.eigvalsh(H_of(stage))[0] >= -floor
    # a proof may need more room than there is, and an equilibrium more steps, but they say so
    with contextlib.suppress(lc.NotConvergedError, lc.NoCertificateError):
        lc.finetune(net, data, config=configured(epochs=1, learning_rate=1e-9))


# NaN.


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_finite_are_named(name):
    for value in (float("nan"), float("inf")):
        net = network()
        with torch.no_grad():
            getattr(net.stages[0], name).flatten()[0] = value
        with pytest.raises(lc.NotFiniteError, match=rf"steps\.0\.{name} after step 0: 1 of"):
            lc.finetune(net, labelled((SIZE,), 8), config=configured())


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    torch.manual_seed(0)
    source = nn.Sequential(lc.registry().new_model("aol", SIZE, CLASSES, seed=0).double())

    def spoil(step, total, loss):
        if step == 3:
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.fill_(math.inf)

    with pytest.raises(lc.NotFiniteError, match=r"the loss.* at learning rate 0\.01") as error:
        lc.train(
            source,
            labelled((SIZE,), 12),
            config=configured(batch_size=3),
            input_shape=(SIZE,),
            on_step=spoil,
        )
    assert error.value.step == 3  # counted from 0
    assert "[step 3 of the training]" in str(error.value)


def test_an_equilibrium_that_cannot_be_solved_is_named_with_its_step():
    net = network()

    def spoil(step, total, loss):
        if step == 3:
            with torch.no_grad():
                net.stages[0].log_psi[1] = float("inf")

    with pytest.raises(lc.NotFiniteError, match=r"stage .*\[step 3 of the training\]"):  # counted from 0
        lc.finetune(net, labelled((SIZE,), 32), config=configured(), on_step=spoil)


def test_weights_that_become_infinite_are_named_with_their_step():
    net = network()

    def spoil(step, total, loss):
        if step == 2:
            with torch.no_grad():
                net.stages[0].b_y[1] = float("inf")

    with pytest.raises(lc.NotFiniteError, match=r"steps\.0\.b_y after step 2: 1 of 3"):
        lc.finetune(net, labelled((SIZE,), 16), config=configured(), on_step=spoil)


# Going on after a kill.


def flat_run(**given):
    net = network()
    options = {"schedule": {"kind": "one_cycle"}, "clip": 0.5, "roots": 0.01, "precision": "32-true", "tolerance": 1e-3}
    config = configured(epochs=3, batch_size=8, held_out=10, keep="last", **options)
    return net, lc.finetune(net, labelled((SIZE,), 37), config=config, save_seconds=0.0, **given)


def image_run(**given):
    net = image_network()
    options = {
        "augment": {"crop": 1, "flip": True, "brightness": (0.8, 1.2), "hue": 0.1},
        "penalty": {"weight": 0.1, "freeze": True},
        "epsilon": 1e-3,
        "schedule": {"kind": "linear"},
    }
    config = configured(epochs=3, batch_size=8, tolerance=1e-6, **options)
    held = labelled((3, 4, 6), 12, seed=1)
    return net, lc.finetune(net, labelled((3, 4, 6), 27), held, config, save_seconds=0.0, **given)


def source_run(**given):
    model = lc.registry().new_model("mondeq", SIZE, CLASSES, seed=0)
    model.double()
    config = configured(epochs=3, batch_size=8, held_out=10, precision="32-true", tolerance=1e-3, keep="last")
    return model, lc.train(model, labelled((SIZE,), 37), config=config, save_seconds=0.0, **given)


RUNS = {"flat": flat_run, "image": image_run, "source": source_run}


def untimed(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table(folder)]


def stopping(*moments):
    """For ``on_step``: raises after these steps, one for each run."""
    left = list(moments)

    def stop(step, total, loss):
        if left and step >= left[0]:
            del left[0]
            raise StopError

    return stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each kind of run in one go: (model, report, folder), made when it is first asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (*RUNS[kind](folder=folder), folder)
        return made[kind]

    return of


# Four steps an epoch, three epochs: the first step, the last of an epoch, the first of one, the very last, several.
KILLS = [("flat", (k,)) for k in (1, 4, 5, 11, 12)] + [
    ("flat", (3, 6, 7, 10)),
    ("image", (1,)),
    ("image", (4, 9)),
    ("image", (6, 12)),
    ("source", (3, 8)),
    ("source", (5,)),
]


@pytest.mark.parametrize(("kind", "moments"), KILLS)
def test_a_run_that_is_stopped_and_goes_on_is_the_run_in_one_go(kind, moments, tmp_path, whole):
    expected, report, folder = whole(kind)
    stop, steps = stopping(*moments), []
    for _ in moments:
        with pytest.raises(StopError):
            RUNS[kind](folder=tmp_path, on_step=stop)
    model, found = RUNS[kind](folder=tmp_path, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == max(moments[-1], 1)  # the step it was stopped after was not saved, those before were
    assert len(steps) == 12 - (steps[0] - 1)
    assert_same(model, expected)
    assert timeless(found) == timeless(report)
    assert (found.kept, found.stopped_early) == (report.kept, report.stopped_early)
    assert untimed(tmp_path) == untimed(folder)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_without_a_folder_is_the_same_run(kind, whole):
    expected, report, _ = whole(kind)
    model, found = RUNS[kind]()
    assert_same(model, expected)
    assert timeless(found) == timeless(report)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_run_that_is_stopped_at_the_end_of_an_epoch_goes_on_to_the_same_files(epoch, tmp_path, whole):
    expected, report, folder = whole("flat")

    def stop(record):
        if record.epoch == epoch:
            raise StopError

    with pytest.raises(StopError):
        flat_run(folder=tmp_path, on_epoch=stop)
    model, found = flat_run(folder=tmp_path)
    assert_same(model, expected)
    assert timeless(found) == timeless(report)
    assert untimed(tmp_path) == untimed(folder)


def test_a_finished_run_is_found_again(tmp_path):
    model, report = flat_run(folder=tmp_path)
    steps = []
    again, found = flat_run(folder=tmp_path, on_step=lambda *given: steps.append(given))
    assert steps == []
    assert_same(again, model)
    assert found == report


def test_nothing_is_saved_between_steps_before_the_time_has_come(tmp_path):
    net, data, config = network(), labelled((SIZE,), 40), configured(epochs=1, batch_size=4)
    states = []

    def look(step, total, loss):
        states.append((tmp_path / "state.pt").read_bytes())

    lc.finetune(net, data, config=config, folder=tmp_path, save_seconds=1e9, on_step=look)
    assert len(set(states)) == 1  # that of before the first step
    assert (tmp_path / "state.pt").read_bytes() != states[0]


OTHERS = {  # what is another, and how the message names it
    "learning_rate": {"config": {"learning_rate": 0.02}},
    "seed": {"config": {"seed": 1}},
    "epochs": {"config": {"epochs": 3}},
    "loss": {"config": {"loss": {"offset": 0.2}}},
    "start": {"seed": 1},
    "training data": {"train": 21},
    "validation data": {"validation": 9},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_run_is_refused_with_what_differs(name, tmp_path):
    def go(config=None, seed=0, train=20, validation=10):
        return lc.finetune(
            network(seed),
            labelled((SIZE,), train),
            labelled((SIZE,), validation, seed=1),
            configured(**(config or {})),
            folder=tmp_path,
        )

    go()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(lc.InvalidParameterError, match=rf"folder.*\({name}: .* there, .* here"):
        go(**OTHERS[name])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
def test_a_folder_of_another_version_is_refused_with_the_option_that_only_one_of_them_has(here, there, tmp_path):
    """Also where that option is null, as it would be by default."""

    def go():
        lc.finetune(network(), labelled((SIZE,), 20), config=configured(), folder=tmp_path)

    go()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if here:
        assert state["key"].pop("clip") is None
    if there:
        state["key"]["other"] = None
    torch.save(state, tmp_path / "state.pt")
    expected = r"\(clip: nothing there, None here\)" if here else r"\(other: None there, nothing here\)"
    with pytest.raises(lc.InvalidParameterError, match=expected):
        go()


def test_a_folder_of_a_run_on_other_data_is_refused(tmp_path):
    with pytest.raises(StopError):
        lc.finetune(
            network(),
            labelled((SIZE,), 20),
            config=configured(),
            folder=tmp_path,
            save_seconds=0.0,
            on_step=stopping(3),
        )
    with pytest.raises(lc.InvalidParameterError, match="folder"):
        lc.finetune(network(), labelled((SIZE,), 20, seed=5), config=configured(), folder=tmp_path)


def test_a_state_that_is_cut_short_is_never_found(tmp_path, monkeypatch):
    """What interrupts the writing of a state leaves the one before."""
    real = torch.save

    at = []

    def save(state, file):
        at.append(state["step"])
        real(state, file)

    def cut(path, content, write=Path.write_bytes):
        write(path, content if at[-1] != 3 else content[:100])
        if at[-1] == 3:
            raise StopError

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(Path, "write_bytes", cut)
    with pytest.raises(StopError):
        flat_run(folder=tmp_path)
    monkeypatch.undo()
    steps = []
    model, _ = flat_run(folder=tmp_path, on_step=lambda step, total, loss: steps.append(step))
    assert steps[0] == 3
    assert_same(model, flat_run()[0])


def test_the_seed_says_it_all():
    nets, reports = zip(*(seeded_run(seed) for seed in (0, 0, 1)), strict=True)
    assert_same(nets[0], nets[1])
    assert timeless(reports[0]) == timeless(reports[1])
    assert not torch.equal(nets[0].stages[0].S, nets[2].stages[0].S)


def seeded_run(seed):
    net = network()
    torch.rand(random.randrange(5))  # the global generators have no say
    return net, lc.finetune(net, labelled((SIZE,), 20), config=configured(seed=seed, held_out=5, keep="last"))


# Processes.

COMMON = """
import torch
import lipconvert as lc
from lipconvert_plugins.sll import SLLNetwork
from torch.utils.data import TensorDataset

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


def start(kind):
    torch.manual_seed(3)
    if kind == "flat":
        return lc.convert(lc.LBEN(5, 6, 3, epsilon=0.2, activation="tanh").double(), check=False)
    sizes = {"image": (4, 4), "in_channels": 3, "channels": 4, "inner": 3, "conv_depth": 1, "kernel_size": 3}
    source = SLLNetwork(**sizes, pool=2, dense_depth=1, classes=3).double()
    return source if kind == "source" else lc.convert(source, check=False)


def data(kind, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *((5,) if kind == "flat" else (3, 4, 4)), generator=generator)
    return TensorDataset(x, torch.randint(3, (count,), generator=generator))


def go(kind, folder=None, batch_size=8, **given):
    more = {
        "flat": {"clip": 0.05, "optimizer": "muon"},
        "source": {},
        "image": {"penalty": {"weight": 0.05, "freeze": True}},
    }[kind]
    augment = {} if kind == "flat" else {"crop": 1, "flip": True, "contrast": (0.5, 1.5), "hue": 0.2}
    config = lc.TrainingConfig.model_validate(
        {"epochs": 3, "batch_size": batch_size, "learning_rate": 0.01, "precision": "64-true", "tolerance": 1e-13,
         "radii": [0.01, 0.05], "keep": "last", "loss": {"offset": 0.1}, "augment": augment, **more}
    )
    model = start(kind)
    run = lc.train if kind == "source" else lc.finetune
    report = run(model, data(kind, 17, 0), data(kind, 12, 1), config, folder=folder, save_seconds=0.0, **given)
    return model, report
"""

SHARED = """
import os, sys

for kind in ("flat", "image", "source"):
    folder = os.path.join(sys.argv[1], kind)
    model, report = go(kind, folder)
    numbers = {name: value.detach().clone() for name, value in model.named_parameters()}
    out = f"{folder}/found{os.environ['RANK']}.pt"
    torch.save({"weights": numbers, "report": report.model_dump_json()}, out)
"""

KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import lightning.fabric
import lipconvert.reports.plotting

folder, moments = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
state = folder / "state.pt"


def written():
    return state.stat().st_mtime_ns if state.exists() else 0


def child():
    model, report = go("flat", folder, on_step=lambda *given: time.sleep(0.01))
    torch.save({name: value.detach().clone() for name, value in model.named_parameters()}, folder / "found.pt")


killed = 0
while True:
    before, pid = written(), os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    if killed < 3:
        done = 0
        while written() == before and not done:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)
        if not done:
            time.sleep(moments.uniform(0.0, 0.15))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            continue
    else:
        _, status = os.waitpid(pid, 0)
    print(killed)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def defined() -> dict:
    names = {}
    exec(COMMON, names)
    return names


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def test_two_processes_give_what_one_does(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(COMMON + SHARED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=environment(**torchrun, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    names = defined()
    for kind in ("flat", "image", "source"):
        model, report = names["go"](kind)
        found = [torch.load(tmp_path / kind / f"found{rank}.pt") for rank in range(2)]
        for name, value in found[0]["weights"].items():
            assert torch.equal(value, found[1]["weights"][name]), name
            # 17 samples in batches of 8: the last one holds a single sample, less than there are processes. Sums in another
            # order, made more of where Adam divides by a small gradient.
            torch.testing.assert_close(value, dict(model.named_parameters())[name].detach(), rtol=1e-6, atol=1e-7)
        reports = [FinetuneReport.model_validate_json(entry["report"]) for entry in found]
        for there in reports:
            assert there.processes == 2
            for record, expected in zip(there.history, report.history, strict=True):
                assert record.step == expected.step
                assert record.certified_accuracy == expected.certified_accuracy
                for number in ("loss", "penalty", "least_eigenvalue", "proved_lipschitz"):
                    here = getattr(expected, number)
                    assert (getattr(record, number) is None) == (here is None)
                    assert here is None or getattr(record, number) == pytest.approx(here, rel=1e-6, abs=1e-9)
        rows = table(tmp_path / kind)
        assert [json.loads(row["step"]) for row in rows] == [0, 3, 6, 9]
        assert FinetuneReport.model_validate_json((tmp_path / kind / "report.json").read_text()) == reports[0]


def test_a_run_killed_at_random_moments_goes_on_bit_for_bit(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(COMMON + KILLED)
    folder = tmp_path / "run"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(script), str(folder), "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    model, report = defined()["go"]("flat")
    for name, value in torch.load(folder / "found.pt").items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    assert len(FinetuneReport.model_validate_json((folder / "report.json").read_text()).history) == 4
    rows = untimed(folder)
    assert [row["loss"] for row in rows] == ["" if r.loss is None else str(r.loss) for r in report.history]


# Precision.


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}


@pytest.mark.parametrize("name", ["sll", "aol"])
def test_bf16_trains_source_networks_and_keeps_parameters_and_certificates_in_float32(name):
    ends = {}
    for precision in ("bf16-mixed", "32-true"):
        model = lc.registry().new_model(name, SIZE, CLASSES, seed=0)
        kinds, certified = [], []
        train, held = labelled((SIZE,), 120), labelled((SIZE,), 40, seed=1)
        config = configured(epochs=6, precision=precision, learning_rate=0.02, tolerance=1e-3)

        def look(record, model=model, kinds=kinds, certified=certified, held=held):
            kinds.append(dtypes_of(model))
            net = lc.convert(copy.deepcopy(model), check=False).double()
            certified.append(measured(net, held)[1])

        report = lc.train(model, train, held, config, on_epoch=look)
        assert all(kind == {torch.float32} for kind in kinds)
        assert [record.certified_accuracy for record in report.history] == certified
        assert all(record.proved_lipschitz <= record.lipschitz * 1.011 for record in report.history)
        assert report.history[-1].loss < report.history[1].loss
        assert max(r.natural_accuracy for r in report.history) > report.history[0].natural_accuracy + 0.1
        ends[precision] = report.history[-1].loss
    assert ends["bf16-mixed"] != ends["32-true"]
    assert ends["bf16-mixed"] == pytest.approx(ends["32-true"], rel=0.2)  # eight bits, ninety steps


def test_equilibria_are_not_solved_in_bf16():
    nets = [network(), network()]
    for net, precision in zip(nets, ("bf16-mixed", "32-true"), strict=True):
        config = configured(precision=precision, tolerance=1e-4)
        report = lc.finetune(net, labelled((SIZE,), 20), labelled((SIZE,), 20, seed=1), config)
        assert dtypes_of(net) == {torch.float32}
        assert report.history[-1].certified_accuracy is not None
    assert_same(*nets)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # of torch's own compiler, which differ from version to version
def test_a_compiled_run_is_the_run(tmp_path):
    data = labelled((3, 4, 6), 17)  # in batches of 8: two shapes

    def run(compiled, **given):
        model = image_source()
        report = lc.train(model, data, config=configured(augment={"flip": True}, compile=compiled), **given)
        return model, [record.loss for record in report.history[1:]]

    def stop(step, *_):
        if step == 4:
            raise StopError

    plain, losses = run(False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, found = run(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert found == pytest.approx(losses, rel=1e-12)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(dict(compiled.named_parameters())[name].detach(), value, rtol=1e-8, atol=1e-9)
    with pytest.raises(StopError):
        run(True, folder=tmp_path, save_seconds=0.0, on_step=stop)
    assert_same(run(True, folder=tmp_path)[0], compiled)


class Uncompilable(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        raise torch._dynamo.exc.TorchDynamoException("no compiler here")


def test_what_cannot_be_compiled_is_named(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: Uncompilable(model))
    with pytest.raises(lc.InvalidParameterError, match=r"compile.*no compiler here.*set it to false"):
        lc.train(image_source(), labelled((3, 4, 6), 17), config=configured(compile=True))


def test_equilibria_are_not_compiled():
    with pytest.raises(lc.InvalidParameterError, match=r"compile.*equilibria"):
        lc.finetune(network(), labelled((SIZE,), 20), config=configured(compile=True))


def test_float64_is_float64_all_the_way(batches_of):
    seen = []
    net = network().float()
    batches_of(net, lambda x: seen.append(x.dtype))
    lc.finetune(net, labelled((SIZE,), 20), config=configured())
    assert dtypes_of(net) == {torch.float64}
    assert set(seen) == {torch.float64}


# What is refused.


def test_what_is_no_network_is_refused():
    for model in (image_source(), nn.Linear(SIZE, CLASSES), network().stages[0]):
        with pytest.raises(lc.InvalidParameterError, match=r"lipconvert\.convert"):
            lc.finetune(model, labelled((SIZE,), 8))


@pytest.mark.parametrize("shape", [(SIZE + 1,), (1, SIZE + 1), (SIZE, 2), (2, 2, 2), ()])
def test_samples_of_another_shape_are_refused(shape):
    wrong = TensorDataset(torch.rand(8, *shape), torch.arange(8) % CLASSES)
    with pytest.raises(lc.ShapeError, match="a sample of the training data"):
        lc.finetune(network(), wrong)
    with pytest.raises(lc.ShapeError, match="a sample of the validation data"):
        lc.finetune(network(), labelled((SIZE,), 8), wrong)


def test_flat_samples_for_a_network_of_images_are_refused():
    with pytest.raises(lc.ShapeError, match="a sample of the training data"):
        lc.finetune(image_network(), labelled((72,), 8))


@pytest.mark.parametrize("label", [-1, CLASSES, 100])
def test_labels_out_of_range_are_refused(label):
    good, bad = labelled((SIZE,), 8), labelled((SIZE,), 8)
    bad.tensors[1][5] = label
    for train, held in ((bad, good), (good, bad), (bad, None)):
        net = network()
        before = weights_of(net)
        with pytest.raises(lc.InvalidParameterError, match=f"a label.*{label}"):
            lc.finetune(net, train, held, configured())
        assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


@pytest.mark.parametrize("held_out", [8, 9, 1000])
def test_holding_out_all_samples_is_refused(held_out):
    with pytest.raises(lc.InvalidParameterError, match="held_out"):
        lc.finetune(network(), labelled((SIZE,), 8), config=configured(held_out=held_out))
    lc.finetune(network(), labelled((SIZE,), 8), config=configured(held_out=7, epochs=1))


def test_patience_without_validation_is_refused():
    with pytest.raises(lc.InvalidParameterError, match="patience"):
        lc.finetune(network(), labelled((SIZE,), 8), config=configured(patience=2))
    lc.finetune(network(), labelled((SIZE,), 8), config=configured(patience=2, held_out=4))


@pytest.mark.parametrize("options", [{"learning_rates": {"Psi": 0.5}}, {"epsilon": 0.1}, {"roots": 0.1}])
def test_options_of_stages_are_refused_for_an_explicit_source_network(options):
    with pytest.raises(lc.InvalidParameterError, match=next(iter(options))):
        lc.train(image_source(), labelled((3, 4, 6), 8), config=configured(**options))
    # an LBEN is a stage of its own
    lc.train(network().stages[0], labelled((SIZE,), 8), config=configured(epochs=1, **options))


@pytest.mark.parametrize("penalty", [{"weight": 0.1}, {"freeze": True}])
def test_a_penalty_without_stages_on_images_is_refused(penalty):
    with pytest.raises(lc.InvalidParameterError, match="penalty"):
        lc.finetune(network(), labelled((SIZE,), 8), config=configured(penalty=penalty))
    with pytest.raises(lc.InvalidParameterError, match="penalty"):
        lc.train(image_source(), labelled((3, 4, 6), 8), config=configured(penalty=penalty))


def test_weight_decay_of_frozen_entries_is_refused():
    # it would move them, whatever their gradient is
    config = configured(penalty={"freeze": True}, weight_decay=0.1)
    with pytest.raises(lc.InvalidParameterError, match="weight_decay"):
        lc.finetune(image_network(), labelled((3, 4, 6), 8), config=config)


def test_augmentation_of_what_is_no_image_is_refused():
    with pytest.raises(lc.ShapeError):
        lc.finetune(network(), labelled((SIZE,), 8), config=configured(augment={"flip": True}))


def test_events_without_a_folder_are_refused():
    with pytest.raises(lc.InvalidParameterError, match="folder"):
        lc.finetune(network(), labelled((SIZE,), 8), config=configured(), tensorboard=True)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"betas": (0.9, 1.0)},
        {"clip": 0.0},
        {"weight_decay": -1.0},
        {"schedule": {"kind": "cosine"}},
        {"schedule": {"warm_up": 1.0}},
        {"learning_rates": {"V": -1.0}},
        {"loss": {"temperature": 0.0}},
        {"penalty": {"norm": "l3"}},
        {"radii": []},
        {"radii": [-0.1]},
        {"precision": "16-mixed"},
        {"patience": 0},
        {"held_out": -1},
        {"seed": -1},
        {"devices": 0},
        {"lr": 1.0},
    ],
)
def test_the_schema_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match="validation error"):
        TrainingConfig.model_validate(options)


def test_the_penalty_does_not_count_epsilon():
    """W − εΨ has entries on the diagonal, whatever the support of W."""
    costs = []
    for epsilon in (0.0, 0.1):
        penalty = {"weight": 1.0}
        config = configured(epochs=1, batch_size=100, epsilon=epsilon, penalty=penalty, tolerance=1e-12)
        costs.append(lc.finetune(image_network(), labelled((3, 4, 6), 10), config=config).history[1].penalty)
    assert costs == pytest.approx([0.0, 0.0], abs=1e-9)


# What users do.


def refusals():
    x, y = torch.rand(6, SIZE), torch.arange(6) % CLASSES
    ragged = [(torch.rand(SIZE + k), 0) for k in range(3)]
    return {
        "NaN": (TensorDataset(x.where(x < x.max(), math.nan), y), lc.NotFiniteError, "the training data.*1 of"),
        "infinity": (TensorDataset(x / 0.0, y), lc.NotFiniteError, "the training data"),
        "a dict": ({"x": x, "y": y}, lc.InvalidParameterError, "dict.*data set or loader"),
        "a string": ("digits", lc.InvalidParameterError, "str.*data set or loader"),
        "a number": (3, lc.InvalidParameterError, "int.*data set or loader"),
        "no pairs": ([x[0], x[1], x[2]], lc.InvalidParameterError, "sample 0 of the training data is Tensor"),
        "samples of several sizes": (ragged, lc.ShapeError, "sample 1 of the training data"),
        "lists": ([([0.0] * SIZE, 1)], lc.InvalidParameterError, "sample 0.*list.*tensor"),
        "words as labels": ([(x[0], "cat")], lc.InvalidParameterError, "sample 0.*str.*integer"),
        "a loader of samples": (
            DataLoader(TensorDataset(x, y), batch_size=None),
            lc.ShapeError,
            r"batch 0.*\(B, \.\.\.\)",
        ),
        "empty": ([], lc.InvalidParameterError, "empty"),
    }


@pytest.mark.parametrize("kind", refusals())
def test_data_of_another_kind_are_refused_in_words(kind):
    data, error, message = refusals()[kind]
    with pytest.raises(error, match=message):
        lc.finetune(network(), data, config=configured())


def test_validation_data_must_be_numbers_too():
    x = torch.rand(6, SIZE)
    x[2, 1] = math.nan
    with pytest.raises(lc.NotFiniteError, match=f"the validation data.*1 of {6 * SIZE}"):
        lc.finetune(network(), labelled((SIZE,), 9), TensorDataset(x, torch.zeros(6).long()), configured())


def test_a_pair_of_tensors_or_arrays_is_a_data_set():
    x, y = labelled((SIZE,), 12).tensors
    for pair in ((x, y), [x, y], (x.numpy(), y.numpy())):
        samples = Samples.of(pair, "the data")
        assert torch.equal(samples.x, x)
        assert torch.equal(samples.labels, y)


def test_a_configuration_is_no_dict():
    with pytest.raises(lc.InvalidParameterError, match=r"config is dict.*TrainingConfig"):
        lc.finetune(network(), labelled((SIZE,), 9), config={"epochs": 1})


def test_a_seed_too_large_is_refused():
    with pytest.raises(ValidationError, match="seed"):
        lc.TrainingConfig(seed=2**63)


@pytest.mark.parametrize("reason", ["another run", "nothing to train", "damaged"])
def test_what_is_refused_leaves_the_network_as_it_was(reason, tmp_path):
    config = {"epsilon": 0.1, "precision": "32-true"}
    if reason == "another run":
        lc.finetune(network(1), labelled((SIZE,), 9), config=configured(), folder=tmp_path)
    elif reason == "damaged":
        (tmp_path / "state.pt").write_bytes(b"junk")
    else:
        config["learning_rates"] = dict.fromkeys(("Psi", "G", "U", "V", "S", "b"), 0.0)
    net = network()
    before, epsilon = copy.deepcopy(net), net.stages[0].epsilon
    with pytest.raises(lc.LipconvertError):
        lc.finetune(net, labelled((SIZE,), 9), config=configured(**config), folder=tmp_path)
    assert_same(net, before)
    assert net.dtype == before.dtype
    assert net.stages[0].epsilon == epsilon


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "junk": lambda content: b"no state at all",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "a list", "without its step"])
def test_a_damaged_state_says_so(damage, tmp_path):
    lc.finetune(network(), labelled((SIZE,), 9), config=configured(), folder=tmp_path)
    path = tmp_path / "state.pt"
    if damage in DAMAGES:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    else:
        state = torch.load(path, weights_only=True)
        state.pop("step")
        torch.save([1, 2] if damage == "a list" else state, path)
    with pytest.raises(lc.WeightsError, match=r"state\.pt: .*remove it to begin the run again"):
        lc.finetune(network(), labelled((SIZE,), 9), config=configured(), folder=tmp_path)


def test_an_interrupted_network_is_told_from_the_start_of_its_run(tmp_path):
    net = network()
    with pytest.raises(StopError):
        lc.finetune(
            net, labelled((SIZE,), 20), config=configured(), folder=tmp_path, save_seconds=0.0, on_step=stopping(3)
        )
    with pytest.raises(lc.InvalidParameterError, match="give the weights that run began with"):
        lc.finetune(net, labelled((SIZE,), 20), config=configured(), folder=tmp_path)


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    met = []

    def second(step, total, loss):
        if step == 2:
            with pytest.raises(lc.InvalidParameterError, match="another process is running in it") as error:
                lc.finetune(network(), labelled((SIZE,), 20), config=configured(), folder=tmp_path)
            met.append(error)

    lc.finetune(network(), labelled((SIZE,), 20), config=configured(), folder=tmp_path, on_step=second)
    assert len(met) == 1
    assert ".lock" not in {path.name for path in tmp_path.iterdir()}


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_state_before(tmp_path, monkeypatch):
    write, states = Path.write_bytes, []

    def full(path, content):
        states.append(path)
        if len(states) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        lc.finetune(network(), labelled((SIZE,), 20), config=configured(), folder=tmp_path, save_seconds=0.0)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] > 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_device_that_is_not_here_is_named():
    if torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(lc.InvalidParameterError, match="accelerator is cuda, but 0 CUDA devices"):
        lc.finetune(network(), labelled((SIZE,), 9), config=configured(accelerator="cuda"))


def test_several_processes_need_a_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["-c"])
    with pytest.raises(lc.InvalidParameterError, match=r"devices is 2.*put it into one"):
        lc.finetune(network(), labelled((SIZE,), 9), config=configured(devices=2))


def test_training_solves_by_the_method_a_caller_chose_and_gives_it_back():
    net = network()
    options = lc.SolverOptions("peaceman_rachford", tolerance=1e-9, max_steps=2, throw=False)
    net.set_options(options)
    with pytest.raises(lc.NotConvergedError, match="2 steps"):
        lc.finetune(net, labelled((SIZE,), 9), config=configured())
    assert {stage.options for stage in net.stages} == {options}
