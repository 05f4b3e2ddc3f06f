"""Every kind of input at every public function: the value of the plain float64 tensor, or a refusal by name.

Values are compared with the source network, layer by layer, which knows nothing of lipconvert; radii with the rule of
Tsuzuku et al. from those logits; attacks by the distance and the margin of what they found.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLConv2d, AOLLinear
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor, nn
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert.checkpoints.checkpoint import info
from lipconvert.cli import app
from lipconvert.foundation.arguments import count, number, radii_of


def dense() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(lc.Normalize(0.25, 0.5), SLLLinear(6, 8), AOLLinear(6, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


def images() -> nn.Sequential:
    torch.manual_seed(4)
    layers = AOLConv2d(2, 3, 3), nn.ReLU(), lc.MeanPool(2), nn.Flatten(), AOLLinear(12, 3)
    model = nn.Sequential(lc.Normalize(0.5, 0.25), *layers)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double()


SHAPES = {"dense": (6,), "images": (2, 4, 4)}
SOURCES = {"dense": dense(), "images": images()}
NETS = {kind: lc.convert(SOURCES[kind], SHAPES[kind], check=False) for kind in SHAPES}
COUNT = 5


def pixels(kind: str) -> Tensor:
    """A batch in [0, 1], exact in every precision that is tried: multiples of 1/8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 9, (COUNT, *SHAPES[kind]), generator=generator).double() / 8.0


def logits(kind: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        return SOURCES[kind](x)


def bent(x: Tensor) -> Tensor:
    """The same values, in memory turned round."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def read_only(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


def negated(x: Tensor) -> Tensor:
    """A view whose entries torch negates when it reads them."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


class Named(Tensor):
    """A subclass that computes as a tensor does."""


class Doubling(Tensor):
    """A subclass with operations of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nobody may compute with it")


def doubling(x: Tensor) -> Tensor:
    return Tensor._make_wrapper_subclass(Doubling, x.shape, dtype=x.dtype)


TAKEN: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x,
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "no leaf": lambda x: x.clone().requires_grad_() * 1.0,
    "parameter": lambda x: nn.Parameter(x.clone()),
    "turned strides": bent,
    "every other row": lambda x: torch.stack([x, 0.0 * x], 1).flatten(0, 1)[::2],
    "inference tensor": inference,
    "negative bit": negated,
    "subclass": lambda x: x.as_subclass(Named),
    "numpy": lambda x: x.numpy().copy(),
    "numpy float32": lambda x: x.numpy().astype(np.float32),
    "numpy float16": lambda x: x.numpy().astype(np.float16),
    "numpy read-only": read_only,
    "numpy big-endian": lambda x: x.numpy().astype(">f8"),
    "numpy backwards": lambda x: x.numpy()[::-1].copy()[::-1],
    "numpy Fortran": lambda x: np.asfortranarray(x.numpy()),
}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda x: x.tolist(),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x > 0.5,
    "complex": lambda x: x.to(torch.complex128),
    "numpy ints": lambda x: x.numpy().astype(np.int32),
    "numpy complex": lambda x: x.numpy().astype(complex),
    "numpy objects": lambda x: x.numpy().astype(object),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.125, 0, torch.quint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "meta": lambda x: x.to("meta"),
    "own operations": doubling,
    "string": lambda x: "pixels",
    "None": lambda x: None,
}


class Pairs:
    """A data set of samples as they are."""

    def __init__(self, x: Any, labels: Any) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.x[index], self.labels[index]


def labels_of(kind: str) -> Tensor:
    """Right but for the last one."""
    labels = logits(kind, pixels(kind)).argmax(1)
    labels[-1] = (labels[-1] + 1) % 3
    return labels


def expected_radii(kind: str) -> Tensor:
    """margin/(√2 L) from the source's logits, L its product of constants: for the right ones."""
    y, labels = logits(kind, pixels(kind)), labels_of(kind)
    others = y.scatter(1, labels[:, None], -math.inf).amax(1)
    return (y.gather(1, labels[:, None])[:, 0] - others) / (math.sqrt(2.0) * (2.0 if kind == "dense" else 4.0))


def calls(kind: str, x: Any) -> None:
    net = NETS[kind]
    y = net(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.detach(), logits(kind, pixels(kind)), rtol=1e-10, atol=1e-12)
    if isinstance(x, Tensor) and x.requires_grad:
        (g,) = torch.autograd.grad(y.sum(), x)
        at = pixels(kind).requires_grad_()
        torch.testing.assert_close(g, torch.autograd.grad(SOURCES[kind](at).sum(), at)[0], rtol=1e-8, atol=1e-10)


def names_methods(kind: str, x: Any) -> None:
    assert NETS[kind].methods(x) == NETS[kind].methods(pixels(kind))


CERTIFIERS = {kind: lc.Certifier(NETS[kind], "prescribed") for kind in NETS}


def certifies_a_batch(kind: str, x: Any) -> None:
    found = CERTIFIERS[kind](x, labels_of(kind))
    wrong, radius = expected_radii(kind) <= 0, found["radius"][:, 0]
    assert bool((radius[wrong] == -math.inf).all())
    # δ, and what rounding takes off
    torch.testing.assert_close(radius[~wrong], expected_radii(kind)[~wrong], rtol=1e-4, atol=1e-9)
    assert bool((radius[~wrong] <= expected_radii(kind)[~wrong]).all())
    assert not radius.requires_grad


def certifies_a_data_set(kind: str, x: Any) -> None:
    report = lc.certify(NETS[kind], Pairs(x, labels_of(kind).tolist()), [0.0, 0.05], "prescribed", batch_size=2)
    assert report.natural_accuracy == (COUNT - 1) / COUNT
    assert report.certified_accuracy[1] == float((expected_radii(kind) > 0.05).double().mean())


def attacks(kind: str, x: Any) -> None:
    stands = lc.attack(NETS[kind], x, labels_of(kind), [0.0, 20.0], steps=5)
    assert stands[0].tolist() == (expected_radii(kind) > 0).tolist()
    assert not stands[1].all()


def climbs(kind: str, x: Any) -> None:
    for ascent in (lc.pgd, lc.apgd):
        found, margin = ascent(NETS[kind], x, labels_of(kind), 0.3, steps=3)
        assert bool(((found - pixels(kind)).flatten(1).norm(dim=1) <= 0.3 + 1e-12).all())
        y, labels = logits(kind, found), labels_of(kind)
        others = y.scatter(1, labels[:, None], -math.inf).amax(1)
        torch.testing.assert_close(margin, y.gather(1, labels[:, None])[:, 0] - others, rtol=1e-9, atol=1e-10)


def measures(kind: str, x: Any) -> None:
    found = lc.empirical_lipschitz(NETS[kind], x, steps=3)
    assert 0.0 < found <= NETS[kind].lipschitz
    assert found == lc.empirical_lipschitz(NETS[kind], pixels(kind), steps=3)


def validates(kind: str, x: Any) -> None:
    report = lc.validate(SOURCES[kind], NETS[kind], x)
    assert report.passed
    assert report.samples == COUNT


def trains(kind: str, x: Any) -> None:
    config = lc.TrainingConfig(epochs=1, batch_size=2, keep="last", precision="64-true", held_out=0)
    net, plain = copy.deepcopy(NETS[kind]), copy.deepcopy(NETS[kind])
    lc.finetune(net, (x, labels_of(kind)), config=config)
    lc.finetune(plain, (pixels(kind), labels_of(kind)), config=config)
    for ours, theirs, before in zip(net.parameters(), plain.parameters(), NETS[kind].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.is_inference()
        assert before.numel() < 20 or not torch.equal(ours, before)


ENTRIES: dict[str, Callable[[str, Any], None]] = {
    "net(x)": calls,
    "Network.methods": names_methods,
    "Certifier": certifies_a_batch,
    "certify": certifies_a_data_set,
    "attack": attacks,
    "pgd, apgd": climbs,
    "empirical_lipschitz": measures,
    "validate": validates,
    "finetune": trains,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_input_gives_the_value_of_the_plain_tensor(entry, kind):
    for name, make in TAKEN.items():
        if entry == "finetune" and name not in (
            "float64",
            "float16",
            "no leaf",
            "inference tensor",
            "numpy big-endian",
        ):
            continue  # a second each
        if entry == "certify" and name == "turned strides":
            continue
        x = make(pixels(kind))
        before = x.detach().clone() if isinstance(x, Tensor) else x.copy()
        try:
            ENTRIES[entry](kind, x)
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
        same = torch.equal(x.detach(), before) if isinstance(x, Tensor) else np.array_equal(x, before)
        assert same, f"{name} was changed"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_input_are_refused_by_name(entry, name):
    if (entry, name) == ("validate", "None"):
        return  # its default
    with warnings.catch_warnings():  # of torch, about kinds that are new or old
        warnings.simplefilter("ignore")
        x = REFUSED[name](pixels("dense"))
    if entry == "certify" and name in ("nested", "own operations", "string", "None", "sparse rows"):
        x = [x] * COUNT  # there are no samples in it: it is one
    with pytest.raises((lc.InvalidParameterError, lc.ShapeError)) as caught:
        ENTRIES[entry]("dense", x)
    assert len(str(caught.value)) > 30


@pytest.mark.parametrize("entry", ENTRIES)
def test_shapes_that_do_not_fit(entry):
    for x in (torch.zeros(()), torch.zeros(6), torch.zeros(COUNT, 7), torch.zeros(COUNT, 1, 6)):
        if entry == "finetune" and x.numel() == COUNT * 6:
            continue  # flattened there
        if entry == "certify" and x.shape != (6,):
            x = [x] * COUNT
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError)):
            ENTRIES[entry]("dense", x)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients disabled": lambda: torch.set_grad_enabled(False),
    "default device meta": lambda: default_device("meta"),
    "in a device meta": lambda: torch.device("meta"),
    "default float16": lambda: default_dtype(torch.float16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float32": lambda: default_dtype(torch.float32),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
CONFIG = lc.TrainingConfig(epochs=1, batch_size=2, keep="last", precision="64-true", held_out=0)


def a_day(kind: str, folder: Any, autocast: bool) -> dict[str, Any]:
    """Everything a user does, with numbers of it."""
    # by name, as a data set on the CPU is: these are the caller's own tensors
    x, labels = pixels(kind).to("cpu"), labels_of(kind)
    net = lc.convert(SOURCES[kind], SHAPES[kind])
    found: dict[str, Any] = {"L": net.lipschitz, "y": net(x).detach().clone()}
    found["validated"] = lc.validate(SOURCES[kind], net).passed
    lc.save(net, folder / "net.onnx")
    again = lc.load(folder / "net.onnx")
    found["loaded"] = again(x).detach().clone()
    found["verified"] = lc.verify(folder / "net.onnx").passed
    found["info"] = info(folder / "net.onnx").lipschitz
    found["dae"] = lc.to_dae(SOURCES[kind], SHAPES[kind]).W
    found["proved"] = lc.lipschitz_bound(again).lipschitz if hasattr(lc, "lipschitz_bound") else None
    if not autocast:
        found["radii"] = lc.certified_radii(again, x, labels, "pairwise")
        report = lc.certify(again, Pairs(x, labels.tolist()), [0.05], "prescribed")
        found["certified"] = report.certified_accuracy
    found["stands"] = lc.attack(again, x, labels, [0.0, 20.0], steps=3)
    found["met"] = None if autocast else lc.empirical_lipschitz(again, x, steps=2)
    lc.finetune(again, (x, labels), config=CONFIG)
    found["trained"] = torch.cat([p.detach().flatten() for p in again.parameters()])
    found["kept"] = net
    found["grown"] = again
    return found


ORDINARY: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_day_under_any_setting_of_torch_gives_what_it_gives_without(setting, kind, tmp_path, monkeypatch):
    """The source's logits without the setting are the reference; the rest is compared with a day without it."""
    if kind not in ORDINARY:
        (tmp_path / "plain").mkdir()
        ORDINARY[kind] = a_day(kind, tmp_path / "plain", False)
    plain = ORDINARY[kind]
    reference, autocast = logits(kind, pixels(kind)), setting == "autocast"
    # the caller's own values are made outside
    values = pixels(kind), labels_of(kind)
    monkeypatch.setitem(globals(), "pixels", lambda kind: values[0])
    monkeypatch.setitem(globals(), "labels_of", lambda kind: values[1])
    with SETTINGS[setting]():
        found = a_day(kind, tmp_path, autocast)
    torch.testing.assert_close(found["y"], reference, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["loaded"], reference, rtol=1e-10, atol=1e-12)
    for name in ("L", "validated", "verified", "info"):
        assert found[name] == plain[name], name
    assert found["verified"]
    for name in ("dae", "trained", "radii", "stands"):
        if name in found:
            assert found[name].dtype == plain[name].dtype
            torch.testing.assert_close(found[name], plain[name], rtol=1e-12, atol=1e-12)
    if not autocast:
        assert found["certified"] == plain["certified"]
        assert found["met"] == plain["met"]
    # outside, both go on as any network does
    for net in (found["kept"], found["grown"]):
        assert not any(p.is_inference() or p.device.type != "cpu" for p in net.parameters())
        assert all(p.requires_grad for stage in net.stages for p in stage.parameters())
        at = values[0].clone().requires_grad_()
        net(at).square().sum().backward()
        assert all(p.grad is not None for stage in net.stages for p in (stage.U, stage.b_z))


def test_a_network_cast_in_inference_mode_is_trained_and_certified_outside():
    with torch.inference_mode():
        net = copy.deepcopy(NETS["dense"]).float()
        copied = copy.deepcopy(net)
    assert not any(p.is_inference() for p in net.parameters())
    assert any(p.is_inference() for p in copied.parameters())
    x, labels = pixels("dense"), labels_of("dense")
    torch.testing.assert_close(net(x.float()).double(), logits("dense", x), rtol=1e-4, atol=1e-5)
    assert bool((lc.certified_radii(net, x, labels, "prescribed")[:-1] > 0).any())
    assert lc.attack(net, x, labels, [0.0], steps=2).shape == (1, COUNT)
    lc.finetune(net, (x, labels), config=CONFIG)
    with pytest.raises(lc.InvalidParameterError, match="inference tensor"):
        copied(x)
    with torch.no_grad():
        torch.testing.assert_close(copied(x).double(), logits("dense", x), rtol=1e-4, atol=1e-5)
    lc.finetune(copied, (x, labels), config=CONFIG)
    assert not any(p.is_inference() for p in copied.parameters())
    copied(x).sum().backward()


def test_a_radius_belongs_to_the_input_before_it_is_rounded():
    """Float64 pixels at a network in float32: the ball of the input it runs has its centre elsewhere."""
    net = copy.deepcopy(NETS["dense"]).float()
    x = 1e4 * (pixels("dense") + torch.rand(COUNT, 6, dtype=torch.float64))
    labels = net(x).argmax(1)
    certifier = lc.Certifier(net, "prescribed")
    here, there = certifier(x, labels)["radius"][:, 0], certifier(x.float(), labels)["radius"][:, 0]
    moved = (x.float().double() - x).norm(dim=1)
    assert bool((moved > 1e-5).all())
    assert bool((here <= there - moved).all())
    torch.testing.assert_close(here, there - moved, rtol=1e-12, atol=1e-12)


HUGE = 10**5000
MODEL = SLLLinear(6)
X, Y = pixels("dense"), labels_of("dense")

# What takes a number -> an example it takes.
NUMBERS: dict[str, tuple[Callable[[Any], Any], float | int]] = {
    "radii": (lambda v: lc.certify(NETS["dense"], [(X[0], 0)], [v], "prescribed"), 0.5),
    "radii of an attack": (lambda v: lc.attack(NETS["dense"], X, Y, [v], steps=1), 0.5),
    "radius": (lambda v: lc.pgd(NETS["dense"], X, Y, v, steps=1), 0.5),
    "box": (lambda v: lc.pgd(NETS["dense"], X, Y, 0.1, steps=1, box=(0.0, v)), 2.0),
    "seconds": (lambda v: lc.lipschitz_bound(NETS["dense"], "prescribed", seconds=v), 0.5),
    "epsilon": (lambda v: lc.LBEN(2, 3, 2, epsilon=v), 0.5),
    "lipschitz": (lambda v: lc.LBEN(2, 3, 2, lipschitz=v), 0.5),
    "delta": (lambda v: lc.convert(MODEL, delta=v), 0.5),
    "std": (lambda v: lc.Normalize(0.0, v), 0.5),
    "mean": (lambda v: lc.Normalize(v), 0.5),
    "tolerance": (lambda v: lc.SolverOptions(tolerance=v), 0.5),
    "alpha": (lambda v: lc.SolverOptions(method="forward_backward", alpha=v), 0.5),
    "L of a DAE": (lambda v: lc.to_dae(MODEL).derive(lipschitz=v), 2.0),
    "L of a proof": (lambda v: lc.prove_lmi(lc.to_dae(MODEL), lipschitz=v), 2.0),
    "L of a check": (lambda v: lc.check(lc.to_dae(MODEL), lipschitz=v), 2.0),
    "scale": (lambda v: lc.scale(lc.to_dae(MODEL), v), 0.5),
    "a slope": (lambda v: lc.Activation("leaky_relu", v), 0.5),
    "m": (lambda v: MonDEQ(2, 3, 2, m=v), 0.5),
    "constant of glue": (lambda v: lc.Network([nn.Identity()], [v], (2,)), 0.5),
    "states": (lambda v: lc.LBEN(2, v, 2), 3),
    "an image": (lambda v: lc.LBEN(2, 3, 2, image=v), 3),
    "blocks": (lambda v: lc.LBEN(2, 3, 2, blocks=[v]), 3),
    "channels": (lc.PadChannels, 3),
    "features": (lc.FirstFeatures, 3),
    "kernel_size": (lc.MeanPool, 3),
    "kernel_size of AOL": (lambda v: AOLConv2d(2, 3, v), 3),
    "max_steps": (lambda v: lc.SolverOptions(max_steps=v), 3),
    "steps": (lambda v: lc.pgd(NETS["dense"], X, Y, 0.1, steps=v), 3),
    "seed": (lambda v: lc.pgd(NETS["dense"], X, Y, 0.1, steps=1, seed=v), 3),
    "batch_size": (lambda v: lc.certify(NETS["dense"], [(X[0], 0)], [0.1], "prescribed", batch_size=v), 3),
    "input_shape": (lambda v: lc.convert(nn.Flatten(), (v, 2), check=False), 3),
}


@pytest.mark.parametrize("where", NUMBERS)
def test_numbers_of_every_kind_are_taken_or_refused(where):
    take, example = NUMBERS[where]
    whole = isinstance(example, int)
    kinds: list[Any] = [example, torch.tensor(example), np.array(example)]
    kinds += [np.int64(example), np.uint8(example)] if whole else [np.float32(example), Fraction(example)]
    for value in kinds:
        take(value)
    wrong = [10**400, -(10**400), HUGE, -HUGE, math.nan, -1.5e300, True, np.bool_(True), "a", torch.tensor([1.0, 2.0])]
    wrong += [1j, [example], {}]
    wrong += [2.5, np.float32(3.0), 0.0, -1] if whole else []
    wrong += [math.inf] if where not in ("box", "seconds") else []
    for value in wrong:
        if (where in ("mean", "std") and isinstance(value, list | Tensor)) or (
            where == "radius" and isinstance(value, Tensor)
        ):
            continue  # one for each channel, or sample
        if where in ("mean", "constant of glue") and isinstance(value, float) and value < 0.0:
            continue
        with pytest.raises((lc.InvalidParameterError, lc.ShapeError)) as caught:
            take(value)
        assert len(str(caught.value)) < 700


def test_radii_in_every_form():
    for given in ([0, 0.5, Fraction(3, 4)], (0.0, np.float32(0.5), torch.tensor(0.75)), np.array([0.0, 0.5, 0.75])):
        assert radii_of(given) == [0.0, 0.5, 0.75]
    assert radii_of(torch.tensor([0.0, 0.5])) == [0.0, 0.5]
    assert radii_of(range(2)) == [0.0, 1.0]
    assert radii_of([5e-324]) == [5e-324]
    for wrong in (
        (r for r in (0.1,)),
        {0.1},
        "0.1",
        b"1",
        0.1,
        None,
        [],
        (),
        np.array(0.1),
        np.eye(2),
        torch.tensor([math.nan]),
    ):
        with pytest.raises(lc.InvalidParameterError):
            radii_of(wrong)
    assert number(np.float16(0.5), "it") == 0.5
    assert count(np.int8(3), "it") == 3


LABELS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "int64": (lambda y: y, True),
    "int32": (lambda y: y.int(), True),
    "uint8": (lambda y: y.to(torch.uint8), True),
    "numpy": (lambda y: y.numpy().copy(), True),
    "numpy big-endian": (lambda y: y.numpy().astype(">i4"), True),
    "inference tensor": (inference, True),
    "list": (lambda y: y.tolist(), False),
    "float": (lambda y: y.float(), False),
    "bool": (lambda y: y > 0, False),
    "complex": (lambda y: y.to(torch.complex64), False),
    "one hot": (lambda y: nn.functional.one_hot(y, 3), False),
    "sparse": (lambda y: y.to_sparse(), False),
    "too few": (lambda y: y[:-1], False),
    "negative": (lambda y: y - 3, False),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_every_kind(name):
    make, taken = LABELS[name]
    labels, net = make(Y), NETS["dense"]
    uses = {
        "Certifier": lambda: CERTIFIERS["dense"](X, labels)["correct"].tolist(),
        "attack": lambda: lc.attack(net, X, labels, [0.0])[0].tolist(),
        "pgd": lambda: (lc.pgd(net, X, labels, 0.0, steps=1)[1] > 0).tolist(),
        "finetune": lambda: (
            lc.finetune(copy.deepcopy(net), (X, labels), config=CONFIG) and (expected_radii("dense") > 0).tolist()
        ),
    }
    for where, use in uses.items():
        if taken:
            assert use() == (expected_radii("dense") > 0).tolist(), where
        else:
            with pytest.raises((lc.InvalidParameterError, lc.ShapeError)):
                use()


@pytest.mark.parametrize("sizes", [[2, 2], (2, 2), [2], 2])
def test_sizes_of_pooling_may_be_lists(sizes, tmp_path):
    model = nn.Sequential(nn.AvgPool2d(sizes, stride=sizes), nn.Flatten(), AOLLinear(8, 3)).double()
    net, x = lc.convert(model, (2, 4, 4)), pixels("images")
    expected = model[2](x.reshape(COUNT, 2, 2, 2, 2, 2).mean((3, 5)).flatten(1))
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    assert net.step_lipschitz[0] == 0.5  # of a mean over four
    assert bool(torch.isfinite(lc.Certifier(net, "prescribed")(x, Y)["error"]).all())
    lc.save(net, tmp_path / "net.onnx")
    assert lc.verify(tmp_path / "net.onnx", seed=0).passed
    torch.testing.assert_close(lc.load(tmp_path / "net.onnx")(x), expected, rtol=1e-10, atol=1e-12)


def test_sizes_of_convolutions_may_be_lists():
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    y = conv(pixels("images"))
    for name in ("kernel_size", "stride", "padding", "dilation"):
        setattr(conv, name, list(getattr(conv, name)))
    torch.testing.assert_close(lc.convert(conv, (2, 4, 4))(pixels("images")), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Flatten(0), (6,)),
        (nn.Flatten(-2), (6,)),
        (nn.Flatten(0, 1), (6,)),
        (nn.Flatten(2), (6,)),
        (nn.Flatten(-4), (2, 4, 4)),
        (nn.Flatten(1, 0), (6,)),
        (nn.Unflatten(0, (1, -1)), (6,)),
        (nn.Unflatten(-2, (1, -1)), (6,)),
        (nn.Unflatten(1, (2, 4)), (6,)),
        (nn.Unflatten(3, (2, 3)), (6,)),
        (nn.LazyLinear(3), (6,)),
        (nn.LazyConv2d(3, 3), (2, 4, 4)),
        (nn.LazyBatchNorm2d(), (2, 4, 4)),
        (nn.AvgPool2d([2, 2], stride=[1, 1]), (2, 4, 4)),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_layers_that_mix_samples_or_have_no_shape_are_refused_by_name(layer, shape, last):
    front = [nn.ReLU(), layer] if last else [layer, nn.ReLU()]
    with pytest.raises((lc.UnsupportedModuleError, lc.ShapeError), match=type(layer).__name__):
        lc.convert(nn.Sequential(*front), shape)


@pytest.mark.parametrize("layer", [nn.Flatten(-1), nn.Flatten(1, -1), nn.Flatten(-3), nn.Flatten(2)])
def test_layers_that_keep_the_batch_are_converted(layer):
    model = nn.Sequential(layer, nn.Flatten(), AOLLinear(32, 3)).double()
    net = lc.convert(model, (2, 4, 4))
    torch.testing.assert_close(net(pixels("images")), model(pixels("images")), rtol=1e-10, atol=1e-12)


def test_a_network_that_mixes_samples_is_refused():
    with pytest.raises(lc.NoCertificateError, match="Flatten"):
        lc.Network([nn.Flatten(0)], [None], (6,))
    with pytest.raises(lc.ShapeError, match="mixes the samples"):
        lc.Network([nn.Flatten(-2)], [None], (6,))(torch.zeros(4, 6))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_steps_of_different_dtypes_are_refused_by_the_step(step, tmp_path):
    net = copy.deepcopy(NETS["dense"])
    net.steps[step].float()
    uses: list[Callable[[], Any]] = [
        lambda: net(X),
        lambda: net.methods(X),
        lambda: lc.Certifier(net),
        lambda: lc.lipschitz_bound(net),
        lambda: lc.certified_radii(net, X, Y),
        lambda: lc.attack(net, X, Y, [0.1]),
        lambda: lc.empirical_lipschitz(net, X),
        lambda: lc.save(net, tmp_path / "net.onnx"),
        lambda: lc.validate(SOURCES["dense"], net),
    ]
    if step < len(net.steps):
        for use in uses:
            with pytest.raises(lc.InvalidParameterError, match=r"the dtype of step [12] .*as by net.float"):
                use()
        torch.testing.assert_close(net.double()(X), logits("dense", X), rtol=1e-4, atol=1e-5)


COMMANDS = {
    "certify": (["--radii"], ["1e999", "nan", "-1", "", "a", "1/0", "1" + "0" * 400, "1" + "0" * 5000]),
    "convert": (["--epsilon", "--delta"], ["nan", "inf", "-1", "1e999", "a"]),
    "tighten": (["--seconds"], ["nan", "0", "-1"]),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("arguments") / "net.onnx"
    lc.save(NETS["dense"], path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_of_the_command_line_that_are_none(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(MonDEQ(4, 5, 3).state_dict(), "w.pt")
    options, values = COMMANDS[command]
    for option in options:
        for value in values:
            if command == "convert":
                arguments = ["convert", "w.pt", "--option", "m=1.0", "--option", "activation=relu", "--out", "n.onnx"]
            else:
                arguments = [command, str(checkpoint)] + (["--data", "digits"] if command == "certify" else [])
            result = CliRunner().invoke(app, [*arguments, f"{option}={value}"])
            assert result.exit_code == 2, (option, value[:20], result.output[-300:], result.exception)
            assert result.exception is None or isinstance(result.exception, SystemExit)
            said = "radi" if command == "certify" else option.strip("-")
            assert said in result.stderr, result.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1", "0", "a", "1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("option", ["m", "lipschitz"])
def test_options_of_weights_that_are_no_numbers(option, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(MonDEQ(4, 5, 3, lipschitz=2.0).state_dict(), "w.pt")
    given = {"m": "1.0", "lipschitz": "2.0", "activation": "relu", option: value}
    arguments = [text for name, text in given.items() for text in ("--option", f"{name}={text}")]
    result = CliRunner().invoke(app, ["convert", "w.pt", *arguments, "--out", "n.onnx"])
    assert result.exit_code == 2, (result.output[-300:], result.exception)
    assert result.stderr.startswith("error: ")
    assert len(result.stderr) < 500


def test_gradients_of_parameters_at_an_inference_tensor():
    stage = copy.deepcopy(NETS["dense"].stages[0])
    stage(inference(X)).sum().backward()
    ours = stage.U.grad
    stage.U.grad = None
    stage(X).sum().backward()
    assert torch.equal(ours, stage.U.grad)
    with pytest.raises(lc.InvalidParameterError, match=r"float32, but its parameters are torch.float64"):
        stage(X.float())
