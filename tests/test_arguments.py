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
from typing import Any

import numpy as np
import pytest
import torch
from lipconvert_plugins.aol import AOLConv2d, AOLLinear
from lipconvert_plugins.sll import SLLLinear
from torch import Tensor, nn

import lipconvert as lc


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
    found["info"] = lc.checkpoint.info(folder / "net.onnx").lipschitz
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
