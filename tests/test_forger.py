"""A forger with every hash at hand: `verify` refuses what he writes, or what he writes changes no answer and no bound.

Each case changes one thing or several of a checkpoint, signs everything anew (`forgery.Files`, without lipconvert) and asks
`verify`. What it passes is searched: onnxruntime against numpy in float64, along gradients, to the edge of stated radii
(`forgery.lost`). The cases go through the schema of the manifest, through all tensors, nodes and attributes, by program, so
that what is added to a checkpoint is forged too.
"""

import functools
import itertools
import re
import tempfile
import typing
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from forgery import DATA, DERIVED, FORMS, GRAPH, Files, Honest, Truth, lost
from lipconvert_plugins.mondeq import MonDEQ
from lipconvert_plugins.sll import SLLConv2d, SLLLinear
from onnx import AttributeProto, StringStringEntryProto, TensorProto, helper
from pydantic import BaseModel
from torch import nn

import lipconvert as lc
from lipconvert.checkpoints import checkpoint
from lipconvert.checkpoints.documents import Manifest, StageEntry
from lipconvert.dae.activations import Activations, activation_of
from lipconvert.linalg.spectrum import Grid
from lipconvert.networks.documents import TrainingSummary
from lipconvert.networks.network import Network
from lipconvert.onnx_export.onnx_plan import Plan

F64, F32 = "float64", "float32"

# ---- the networks


def shaken(net: lc.Network) -> lc.Network:
    """A few steps away from where W is triangular."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            size = parameter.square().mean().sqrt()
            parameter += 5e-3 * size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


def triangular() -> lc.Network:
    """Orthogonal layers with all states active on [0, 1]⁴: there the proved constants of differences are attained."""
    layers = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer, bias in zip(layers, (3.0, 8.0), strict=True):
        nn.init.orthogonal_(layer.weight)
        nn.init.constant_(layer.bias, bias)
    first, second = layers
    last = nn.Linear(4, 3)
    model = nn.Sequential(lc.Normalize([0.5] * 4, [0.5] * 4), first, nn.ReLU(), second, nn.ReLU(), last)
    with torch.no_grad():  # margins, and radii with them, are small: states stay active within
        last.bias.copy_(last.bias - model(torch.full((1, 4), 0.5))[0] + torch.tensor([0.1, 0.0, -0.1]))
    return lc.convert(model, (4,), check=False)


def biased(model: nn.Module) -> nn.Module:
    """Biases are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def tuned() -> lc.Network:
    model = biased(nn.Sequential(SLLLinear(4, 3), SLLLinear(4, 3), nn.Linear(4, 3)))
    return shaken(lc.convert(model, (4,), check=False, epsilon=1e-3, delta=1e-1))


def equilibrium() -> lc.Network:
    return lc.convert(MonDEQ(4, 5, 3, m=0.5), (4,), check=False)


def images(of: Callable[..., lc.Network] = lc.convert) -> lc.Network:
    layers = SLLConv2d(2, 2, kernel_size=3), SLLConv2d(2, 1, kernel_size=3), lc.MeanPool(2), nn.Flatten()
    return of(biased(nn.Sequential(*layers, SLLLinear(18, 3), nn.Linear(18, 3))), (2, 6, 6), check=False)


def tuned_images() -> lc.Network:
    return shaken(images(functools.partial(lc.convert, epsilon=1e-3, delta=1e-1)))


def hidden(image: tuple[int, ...] = ()) -> lc.Network:
    """Where its last states are 0, W is triangular: they act on inputs alone that are larger than any at random."""
    grid, visible, n = Grid(image), 4, 7
    generator = torch.Generator().manual_seed(2)

    def kernels(rows: int, columns: int) -> torch.Tensor:
        K = torch.zeros(rows, columns, *image)
        taps = ((..., 0, 0), (..., 0, 1)) if image else (...,)
        for tap in taps:
            K[tap] = torch.randn(rows, columns, generator=generator) / (2.0 * (rows * columns) ** 0.5)
        return K

    W = torch.zeros(n, n, *image)
    W[:visible, visible:], W[visible:, :visible] = kernels(visible, n - visible), kernels(n - visible, visible)
    b_z = torch.tensor([0.5] * visible + [-8.0] * (n - visible))
    W, U, G = (grid.matrices(K) for K in (W, 2.0 * kernels(n, 2), 2.0 * kernels(3, n)))
    b_y = torch.zeros(3)
    dae = lc.DAE(W, U, G, torch.ones(n), b_z, b_y, Activations(activation_of("relu"), n), 2.0, name="hidden", grid=grid)
    stage = lc.LBEN.from_dae(dae, epsilon=1e-3)
    stage.blocks = (visible, n - visible)
    steps = [stage, lc.MeanPool(6), nn.Flatten()] if image else [stage]
    return Network(steps, [None] * len(steps), stage.input_shape)


NETWORKS: dict[str, tuple[Callable[[], lc.Network], dict[str, list[str]]]] = {
    "triangular": (triangular, {F64: ["substitution"], F32: ["substitution"]}),
    "tuned": (tuned, {F64: ["sweeps"], F32: ["sweeps"]}),
    "equilibrium": (equilibrium, {F64: ["splitting"], F32: ["splitting"]}),
    "images": (images, {F64: ["substitution"] * 2, F32: ["convolutions", "substitution"]}),
    "tuned images": (tuned_images, {F64: ["sweeps"] * 2, F32: ["sweeps"] * 2}),
    "hidden": (hidden, {F64: ["sweeps"], F32: ["sweeps"]}),
    "hidden images": (lambda: hidden((6, 6)), {F64: ["sweeps"], F32: ["sweeps"]}),
}


@functools.cache
def network(name: str, dtype: str) -> lc.Network:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = NETWORKS[name][0]().to(getattr(torch, dtype))
    finally:
        torch.set_default_dtype(before)
    net.class_names = ("cat", "dog", "bird")
    net.training_summary = TrainingSummary(data="none", epochs=3, notes={"seed": 0, "rate": 0.5})
    return net


@functools.cache
def honest(name: str, dtype: str, radius: bool, form: str) -> Honest:
    """A checkpoint as it is saved, in memory; with ``radius``, and its constants, or with the residual alone."""
    net = network(name, dtype)
    certifier = lc.Certifier(net, "pairwise") if radius else None
    with tempfile.TemporaryDirectory() as folder:
        if form == "data":
            path = Path(folder, DATA)
            lc.save(net, path, certifier=certifier)
        else:
            path = Path(folder, GRAPH)
            outputs = ("residual", "radius") if radius else ("residual",)
            lc.save(net, path, certifier=certifier, outputs=outputs, embed=form == "embedded")
        files = Files.read(path, form)
    errors = files.tensors.get("errors")
    return Honest(files, honest(name, dtype, True, "pair").errors if errors is None else errors)


# ---- cases

Forge = Callable[[Files], None]
Key = tuple[str, str, bool, str]


@dataclass(frozen=True)
class Case:
    what: str
    key: Key
    forge: Forge

    def __str__(self) -> str:
        name, dtype, radius, form = self.key
        return f"{name}, {dtype}{', radius' if radius else ''}, {form}: {self.what}"


def keys(what: str, name: str, graph: bool = False, radius: bool | None = None) -> Key:
    """One of the files of a network that has what is forged, another one for each case."""
    found = [
        (name, dtype, with_radius, form)
        for dtype in (F64, F32)
        for with_radius in ((True, False) if radius is None else (radius,))
        for form in (FORMS[:2] if graph else FORMS)
    ]
    return found[zlib.crc32(f"{name} {what}".encode()) % len(found)]


def in_both(what: str, name: str) -> Iterator[Key]:
    """Files with a graph and radii, in float64 and float32."""
    for dtype in (F64, F32):
        yield name, dtype, True, FORMS[zlib.crc32(f"{name} {what} {dtype}".encode()) % 2]


class UnwritableError(Exception):
    """There is no graph of what a manifest says: nobody can write it."""


def rewritten(files: Files) -> None:
    """The graph is written anew for what the manifest now says, by lipconvert itself: the forger has it too."""
    assert files.model is not None
    try:
        manifest = Manifest.model_validate({**files.manifest, "tensors": files.described()})
    except ValueError as error:
        raise UnwritableError from error
    tensors = {name: torch.from_numpy(M.copy()) for name, M in files.tensors.items()}
    outputs = [value.name for value in files.model.graph.output][1:]
    plans = {}
    try:
        net = checkpoint.network_of(manifest, tensors, "forgery")
        for k, entry in enumerate(manifest.steps):
            if isinstance(entry, StageEntry):
                if entry.graph is None:
                    raise ValueError("no plan")
                origin = (entry.origin[0], entry.origin[1]) if entry.origin else (0, 0)
                plans[k] = Plan(entry.graph, net.steps[k], tensors[f"steps.{k}.W"], origin)
        files.model = checkpoint.graph_of(net, plans, checkpoint.embedded(tensors), outputs, manifest)
    except (lc.LipconvertError, ValueError, KeyError, IndexError) as error:
        raise UnwritableError from error


def coordinated(forge: Forge) -> Forge:
    def change(files: Files) -> None:
        forge(files)
        rewritten(files)

    return change


# ---- the manifest, field by field

Path_ = tuple[str | int, ...]
MISSING = object()


def fields(annotation: Any, value: Any, path: Path_) -> Iterator[tuple[Path_, str, Any]]:
    """(place, in words, another value) for everything that a value of this type may be instead."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from fields(arguments[0], value, path)
    elif origin in (typing.Union, UnionType):
        if value is not None and NoneType in arguments:
            yield path, "null", None
        models = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
        if isinstance(value, dict) and models:
            kind = next(m for m in models if "kind" not in value or m.model_fields["kind"].default == value["kind"])
            yield from fields(kind, value, path)
        elif value is not None:
            fitting = [a for a in arguments if isinstance(a, type) and type(value) is a]
            yield from fields(fitting[0] if fitting else type(value), value, path)
    elif origin is Literal:
        yield path, "unknown", "something" if isinstance(value, str) else 99
        for other in arguments:
            yield path, str(other), other
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield path, "more", value | {"more": 1}
        for name, info in annotation.model_fields.items():
            if name in value:
                yield (*path, name), "missing", MISSING
                yield from fields(info.annotation, value[name], (*path, name))
    elif isinstance(value, dict):
        yield path, "empty", {}
        yield path, "one more", value | {"one more": 1.0}
        for name in list(value)[:3]:
            yield from fields(type(value[name]), value[name], (*path, name))
    elif isinstance(value, list | tuple):
        for words, other in (("empty", []), ("backwards", value[::-1]), ("cut", value[:-1])):
            yield path, words, other
        if value:
            yield path, "the last twice", [*value, value[-1]]
        inner = arguments[0] if arguments else Any
        if path[-1] != "tensors":  # of which there are many of a kind: `ENTRIES`
            for k, item in enumerate(value):
                own = arguments[k] if origin is tuple else inner
                yield from fields(own if own is not Any else type(item), item, (*path, k))
    elif annotation is float or (annotation is Any and isinstance(value, float)):
        for words, factor in LESS_AND_MORE.items():
            yield path, words, value * factor if value else abs(factor - 1.0)
        yield path, "0", 0.0
        yield path, "negative", -1.0 - value
    elif annotation is int:
        for words, other in (("one more", value + 1), ("one less", value - 1), ("1", 1), ("0", 0), ("10⁹", 10**9)):
            yield path, words, other
    elif annotation is str:
        yield path, "other words", "other words"
        yield path, "no words", ""
    else:
        raise AssertionError(f"no forgeries of {annotation} at {path}")


LESS_AND_MORE = {  # of 0 as much is added as is multiplied
    "a millionth less": 1.0 - 1.9e-6,
    "a millionth more": 1.0 + 1.9e-6,
    "a tenth": 0.1,
    "ten times": 10.0,
}


def at(path: Path_, value: Any) -> Forge:
    """The manifest has another value in a place, or none."""

    def change(files: Files) -> None:
        place: Any = files.manifest
        for key in path[:-1]:
            place = place[key]
        if value is MISSING:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        files.entries = files.entries and path[0] != "tensors"

    return change


def words_of(path: Path_) -> str:
    return ".".join(map(str, path))


def value_at(manifest: dict[str, Any], path: Path_) -> Any:
    for key in path:
        manifest = manifest[key]  # type: ignore[index]
    return manifest


# Changes of a number that are in the forger's favour for most claims: they are tried in float32 and in float64.
LESS = ("a millionth less", "a tenth", "0")
CLAIMS = ("certificate", "graph", "bound")
WRITTEN = ("name", "blocks", "activations", "origin", "lipschitz", "epsilon")
FOUR = ("triangular", "tuned", "equilibrium", "images")


def manifest_cases() -> Iterator[Case]:
    for number, name in enumerate(FOUR):
        manifest = honest(name, F64, True, "pair").files.manifest
        count = 0
        for path, words, value in fields(Manifest, manifest, ()):
            if not path or (value is not MISSING and value == value_at(manifest, path)):
                continue
            count += 1
            what = f"{words_of(path)}: {words}"
            claim = any(key in CLAIMS for key in path)
            change = at(path, value)
            if claim and value is not MISSING and words not in ("more", "unknown"):
                found = [*in_both(what, name)]
                for key in found if words in LESS else found[count % 2 :][:1]:
                    if words in LESS_AND_MORE or value_at(honest(*key).files.manifest, path) != value:
                        yield Case(what, key, relative(path, words, value))
                if "graph" in path and (count % 2 or name in ("tuned", "equilibrium")):
                    plain = (name, keys(what, name)[1], False, "pair")
                    yield Case(f"{what}, and the graph", plain, coordinated(relative(path, words, value)))
            elif (count + number) % (3 if len(path) > 1 else 2) == 0:
                graph, radius = "graph" in path, True if "bound" in path else None
                yield Case(what, keys(what, name, graph, radius), change)
                if path[0] == "steps" and len(path) > 2 and path[2] in WRITTEN and value is not MISSING:
                    yield Case(f"{what}, and the graph", keys(what, name, True, radius), coordinated(change))


def relative(path: Path_, words: str, value: Any) -> Forge:
    """The number in the file times a factor, whatever it is there."""
    if words not in LESS_AND_MORE:
        return at(path, value)

    def change(files: Files) -> None:
        number, factor = value_at(files.manifest, path), LESS_AND_MORE[words]
        at(path, number * factor if number else abs(factor - 1.0))(files)

    return change


def entry_cases() -> Iterator[Case]:
    """What the manifest says of one tensor, and not of the others."""
    places = (
        (0, "name", "other"),
        (1, "shape", [1]),
        (2, "dtype", F32),
        (3, "sha256", "0" * 64),
        (4, "shape", [-1, -4]),
    )
    for name in FOUR:
        for k, field, value in places:
            what = f"tensors.{k}.{field}: {value}"
            yield Case(what, keys(what, name), at(("tensors", k, field), value))


# ---- the tensors


def moved(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Forge:
    def change(files: Files) -> None:
        M = files.tensors[name]
        files.tensors[name] = np.ascontiguousarray(function(M.copy()).astype(M.dtype))

    return change


def one(M: np.ndarray, factor: float, add: float = 0.0) -> np.ndarray:
    """The largest entry is changed; of zeros, the first."""
    place = np.unravel_index(np.abs(M).argmax(), M.shape)
    M[place] = M[place] * factor + add if M[place] else factor - 1.0
    return M


TENSORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one entry a millionth less": lambda M: one(M, 1.0 - 1.9e-6),
    "one entry a millionth more": lambda M: one(M, 1.0 + 1.9e-6),
    "one entry a thousandth more": lambda M: one(M, 1.0 + 1e-3, 1e-3),
    "one entry with another sign": lambda M: one(M, -1.0),
    "a millionth less": lambda M: M * (1.0 - 1.9e-6) - 1.9e-6 * (0.0 if M.any() else 1.0),
    "a tenth": lambda M: M * 0.1,
    "ten times": lambda M: M * 10.0,
    "another sign": lambda M: -M - (M == 0.0),
    "zero": lambda M: M * 0.0 + (0.0 if M.any() else 1.0),
    "backwards": lambda M: M.reshape(-1)[::-1].reshape(M.shape) if M.size > 1 else M + 1.0,
}


def tensor_cases() -> Iterator[Case]:
    for number, name in enumerate(FOUR):
        files = honest(name, F64, True, "pair").files
        for k, tensor in enumerate(sorted(files.tensors)):
            for m, (words, function) in enumerate(TENSORS.items()):
                what = f"{tensor}: {words}"
                change = moved(tensor, function)
                short = tensor.rsplit(".", 1)[-1]
                if short in ("pairs", "errors", "W", "multiplier", "metric"):
                    if np.array_equal(function(files.tensors[tensor].copy()), files.tensors[tensor]):
                        continue
                    dtypes = in_both(what, name) if short in ("pairs", "errors") else [keys(what, name)]
                    yield from (Case(what, key, change) for key in dtypes if short != "metric" or m % 2)
                elif (k + m + number) % 5 == 0:
                    yield Case(what, keys(what, name), change)
            if "W" in tensor or tensor in ("pairs", "errors") or "me" in tensor:
                what = f"{tensor}: none"
                yield Case(what, keys(what, name, True, True), lambda f, tensor=tensor: f.remove(tensor))
        yield Case("a tensor more", keys("a tensor more", name, True), lambda f: f.add("more", np.ones(3)))


def assembled(files: Files, k: int) -> np.ndarray:
    """W of dense parameters by paper eq. (2), in the dtype of the file."""
    stage = Truth(files).stages[files.stages.index(k)]
    return stage.rebuilt.astype(files.manifest["dtype"])


def consistent(name: str, size: float) -> Forge:
    """Parameters are changed and W with them; the certificate stays as it was."""

    def change(files: Files) -> None:
        k = files.stages[-1]
        key = f"steps.{k}.{name}"
        M = files.tensors[key]
        noise = np.random.default_rng(0).standard_normal(M.shape)
        files.tensors[key] = (M + size * noise).astype(M.dtype)
        files.tensors[f"steps.{k}.W"] = assembled(files, k)

    return change


def uphill(share: float, everywhere: bool) -> Forge:
    """W moves by a share of what verify has taken for rounding, (64 + 4n) units of the largest entry, so that the
    difference of the first two logits grows; ``everywhere``: also where W is zero."""

    def change(files: Files) -> None:
        k = files.stages[-1]
        key = f"steps.{k}.W"
        W = files.tensors[key]
        stage = Truth(files).stages[-1]
        n, eye = len(W), np.eye(len(W))
        g = stage.G[1] - stage.G[0]
        back = np.linalg.solve(eye - stage.W.T, g)
        direction = np.outer(back, np.linalg.solve(eye - stage.W, stage.U @ (back @ stage.U)))
        allowed = share * (64 + 4 * n) * np.finfo(W.dtype).eps * max(1.0, float(np.abs(W).max()))
        step = allowed * np.sign(direction) * (1.0 if everywhere else W != 0.0)
        files.tensors[key] = (W + step).astype(W.dtype)

    return change


def weight_cases() -> Iterator[Case]:
    for name in FOUR:
        for parameter in ("V", "S", "U", "G", "log_psi"):
            for size in (1e-8, 1e-3, 0.1):
                what = f"{parameter} and W off by {size:g}"
                key = keys(what, name, True)
                yield Case(what, key, consistent(parameter, size))
                if size > 1e-8 and parameter in ("V", "S"):
                    yield Case(f"{what}, and the graph", key, coordinated(consistent(parameter, size)))
        for share in (0.1, 0.9):
            for everywhere in (False, True):
                what = f"W off by {share:g} of what rounding allows, {'everywhere' if everywhere else 'where it is'}"
                for key in in_both(what, name):
                    yield Case(what, key, uphill(share, everywhere))


# ---- the plan, with the graph written for it


def planned(stage: int = 0, more: Forge = lambda files: None, **update: Any) -> Forge:
    """The manifest's plan of one stage, and the graph."""

    def change(files: Files) -> None:
        files.manifest["steps"][files.stages[stage]]["graph"].update(update)
        more(files)
        rewritten(files)

    return change


STRAIGHT = {"tolerance": 0.0, "max_steps": 0, "alpha": 1.0, "inverse_steps": 0}


def of_errors(factor: float) -> Forge:
    def change(files: Files) -> None:
        if "errors" in files.tensors:
            files.tensors["errors"] *= factor

    return change


def blocks(sizes: list[int]) -> Forge:
    def change(files: Files) -> None:
        files.manifest["steps"][files.stages[0]]["blocks"] = sizes

    return change


def renamed(files: Files) -> None:
    """A version of the writer that nobody knows."""
    files.manifest["versions"] = {"lipconvert": "9.9.9", "onnx": "9.9.9", "onnx-ir": "9.9.9"}


def several(*changes: Forge) -> Forge:
    def change(files: Files) -> None:
        for each in changes:
            each(files)

    return change


# For a stage that needs sweeps.
LOOSE: dict[str, Forge] = {
    "substitution": planned(method="substitution", **STRAIGHT),
    "substitution, nothing skipped": planned(method="substitution", **STRAIGHT, skipped=0.0),
    "substitution, by another version": planned(more=renamed, method="substitution", **STRAIGHT),
    "substitution, large errors": planned(more=of_errors(1e9), method="substitution", **STRAIGHT),
    "convolutions": planned(method="convolutions", **STRAIGHT),
    "a tolerance of a half": planned(tolerance=0.5),
    "a tolerance of a half, large errors": planned(more=of_errors(1e12), tolerance=0.5),
    "a tolerance of 1e-3": planned(tolerance=1e-3),
    "a tolerance of 1e-6, by another version": planned(more=renamed, tolerance=1e-6),
    "nothing skipped": planned(skipped=0.0),
    "nothing skipped, a tolerance of a half": planned(skipped=0.0, tolerance=0.5),
    "a thousandth skipped": planned(skipped=1e-5),
    "one step": planned(max_steps=1),
    "one step, a tolerance of 1": planned(max_steps=1, tolerance=1.0),
    "no step": planned(max_steps=0),
    "two steps": planned(max_steps=2),
    "splitting": planned(method="splitting", alpha=1.0, inverse_steps=10),
    "splitting without an inverse": planned(method="splitting", inverse_steps=0),
}

PLANS: dict[str, dict[str, Forge]] = {
    "hidden": LOOSE,
    "hidden images": LOOSE,
    "triangular": {
        "sweeps": planned(method="sweeps", tolerance=1e-3, max_steps=100),
        "sweeps to a half": planned(method="sweeps", tolerance=0.5, max_steps=100),
        "splitting to a half": planned(method="splitting", tolerance=0.5, max_steps=100, inverse_steps=20),
        "nothing skipped": planned(skipped=0.0),
        "blocks of one": planned(more=blocks([1] * 8)),
        "one block": planned(more=blocks([8])),
        "blocks that overlap": planned(more=blocks([6, 2])),
    },
    "tuned": {
        **LOOSE,
        "one block": planned(more=blocks([10])),
        "blocks of one": planned(more=blocks([1] * 10)),
        "substitution, one block": planned(more=blocks([10]), method="substitution", **STRAIGHT),
    },
    "equilibrium": {
        "substitution": planned(method="substitution", **STRAIGHT),
        "substitution, by another version": planned(more=renamed, method="substitution", **STRAIGHT),
        "substitution in blocks of one": planned(more=blocks([1] * 5), method="substitution", **STRAIGHT),
        "substitution, large errors": planned(more=of_errors(1e9), method="substitution", **STRAIGHT),
        "sweeps": planned(method="sweeps", skipped=1.0),
        "sweeps, nothing skipped": planned(method="sweeps", skipped=0.0),
        "sweeps to a half": planned(method="sweeps", skipped=0.0, tolerance=0.5),
        "a tolerance of a half": planned(tolerance=0.5),
        "a tolerance of 1e-3": planned(tolerance=1e-3),
        "a tolerance of 1e-3, large errors": planned(more=of_errors(1e12), tolerance=1e-3),
        "a tolerance of 1e-9": planned(tolerance=1e-9),
        "no tolerance": planned(tolerance=0.0),
        "one step": planned(max_steps=1),
        "one step to a half": planned(max_steps=1, tolerance=0.5),
        "no step": planned(max_steps=0),
        "ten steps": planned(max_steps=10),
        "twice the step": coordinated(lambda f: f.manifest["steps"][f.stages[0]]["graph"].update(alpha=2.0)),
        "a step of 1e9": planned(alpha=1e9),
        "a step of 1e-9": planned(alpha=1e-9),
        "no steps for the inverse": planned(inverse_steps=0),
        "two steps for the inverse": planned(inverse_steps=2),
        "two steps for the inverse, to a half": planned(inverse_steps=2, tolerance=0.5),
    },
    "images": {
        "substitution": planned(method="substitution"),
        "convolutions": planned(method="convolutions"),
        "sweeps to a half": planned(method="sweeps", tolerance=0.5, max_steps=100),
        "splitting": planned(method="splitting", tolerance=1e-3, max_steps=100, inverse_steps=10),
        "nothing skipped": planned(skipped=0.0),
        "one block": planned(more=blocks([5])),
        "the dense stage by sweeps": planned(stage=-1, method="sweeps", tolerance=0.5, max_steps=100),
        "the dense stage skips nothing": planned(stage=-1, skipped=0.0),
    },
    "tuned images": {
        "substitution": planned(method="substitution", **STRAIGHT),
        "convolutions": planned(method="convolutions", **STRAIGHT),
        "convolutions, nothing skipped": planned(method="convolutions", **STRAIGHT, skipped=0.0),
        "convolutions, by another version": planned(more=renamed, method="convolutions", **STRAIGHT),
        "a tolerance of a half": planned(tolerance=0.5),
        "nothing skipped": planned(skipped=0.0),
        "one step": planned(max_steps=1),
        "the dense stage by substitution": planned(stage=-1, method="substitution", **STRAIGHT),
        "the dense stage to a half": planned(stage=-1, tolerance=0.5),
    },
}


def plan_cases() -> Iterator[Case]:
    for name, plans in PLANS.items():
        for words, forge in plans.items():
            what = f"plan: {words}"
            form = FORMS[zlib.crc32(what.encode()) % 2]
            dtype = keys(what, name)[1]
            for key in ((name, F64, False, form), (name, F32, False, form), (name, dtype, True, form)):
                if key[2] or key[1] == dtype or name.startswith("hidden"):
                    yield Case(what, key, forge)


# ---- the claims together


def claim_cases() -> Iterator[Case]:
    def bounds_of(factor: float) -> Forge:
        def change(files: Files) -> None:
            files.manifest["bound"]["lipschitz"] *= factor
            files.tensors["pairs"] *= factor

        return change

    def certified(L: float, delta: float) -> Forge:
        def change(files: Files) -> None:
            entry = files.manifest["steps"][files.stages[0]]
            entry["certificate"].update(lipschitz=L * entry["lipschitz"], delta=delta)

        return change

    def unproved(files: Files) -> None:
        """No multiplier and no metric: what is claimed has to be proved anew."""
        for k in files.stages:
            files.manifest["steps"][k]["certificate"] = None
            files.remove(f"steps.{k}.multiplier")
            files.remove(f"steps.{k}.metric")

    def proofs(*names: str) -> Forge:
        def change(files: Files) -> None:
            for key in [f"steps.{k}.{name}" for k in files.stages for name in names]:
                files.remove(key)

        return change

    def scaled(factor: float) -> Forge:
        """A multiplier that is another one, and a metric that is the same."""

        def change(files: Files) -> None:
            for k in files.stages:
                files.tensors[f"steps.{k}.multiplier"] *= factor
                files.tensors[f"steps.{k}.metric"] *= factor

        return change

    def one_pair(factor: float) -> Forge:
        def change(files: Files) -> None:
            files.tensors["pairs"][0, 1] *= factor

        return change

    def one_error(factor: float) -> Forge:
        def change(files: Files) -> None:
            files.tensors["errors"][1, 2, 0] *= factor

        return change

    claims = {
        "constants a millionth less": bounds_of(1.0 - 1.9e-6),
        "constants 1e-9 less": bounds_of(1.0 - 1e-9),
        "constants a tenth": bounds_of(0.1),
        "constants ten times": bounds_of(10.0),
        "one pair a millionth less": one_pair(1.0 - 1.9e-6),
        "one pair and errors a millionth less": several(one_pair(1.0 - 1.9e-6), one_error(1.0 - 1.9e-6)),
        "one error of ‖x‖ a tenth": one_error(0.1),
        "no errors at all": lambda f: f.tensors["errors"].fill(0.0),
        "negative errors": lambda f: np.negative(f.tensors["errors"], out=f.tensors["errors"]),
        "large errors": lambda f: f.tensors["errors"].fill(1e6),
        "pairs on the diagonal": lambda f: np.fill_diagonal(f.tensors["pairs"], 1.0),
        "negative pairs on the diagonal": lambda f: np.fill_diagonal(f.tensors["pairs"], -1.0),
        "certified a little below the prescribed L": certified(1.0 - 1e-9, 0.0),
        "certified at 0.9 L": certified(0.9, 0.0),
        "certified at 2 L, and said": certified(2.0, 1.0),
        "certified at 2 L, and not said": certified(2.0, 0.0),
        "unproved": unproved,
        "unproved, and constants a millionth less": several(unproved, bounds_of(1.0 - 1.9e-6)),
        "no multiplier": proofs("multiplier"),
        "no metric": proofs("metric"),
        "proofs scaled by 2": scaled(2.0),
        "metric scaled by 1e6": lambda f: f.tensors[f"steps.{f.stages[0]}.metric"].__imul__(1e6),
        "three class names too many": lambda f: f.manifest["class_names"].extend(["a", "b", "c"]),
        "a million class names": lambda f: f.manifest.update(class_names=["x"] * 10**6),
        "names that are control characters": lambda f: f.manifest.update(class_names=["\x1b[2J", "\u202e", "\x00"]),
        "another dtype": lambda f: f.manifest.update(dtype=F32 if f.manifest["dtype"] == F64 else F64),
        "prescribed L of less, certified anew": lambda f: several(
            lambda g: g.manifest["steps"][g.stages[0]].update(
                lipschitz=0.9 * g.manifest["steps"][g.stages[0]]["lipschitz"]
            ),
            certified(1.0, 0.0),
        )(f),
    }
    for name in FOUR:
        for words, forge in claims.items():
            if words == "a million class names" and name != "triangular":
                continue
            both = [*in_both(words, name)]
            for key in both if "less" in words or "W" in words else both[len(words) % 2 :][:1]:
                yield Case(words, key, forge)


# ---- the graph


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """All nodes, of the graph, of functions, and of what is inside loops."""

    def inside(nodes: Any) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    yield from inside(attribute.g.node)

    return [*inside(model.graph.node), *(node for f in model.functions for node in inside(f.node))]


def remove_node(model: onnx.ModelProto, number: int) -> None:
    """Whoever reads what a node gives reads its first input instead."""
    gone = nodes_of(model)[number]
    source = next((name for name in gone.input if name), "")
    outputs = set(gone.output)
    for node in nodes_of(model):
        for k, name in enumerate(node.input):
            if name in outputs and source:
                node.input[k] = source
    for holder in [model.graph, *model.functions, *(a.g for n in nodes_of(model) for a in n.attribute)]:
        for k, node in enumerate(holder.node):
            if node is gone or node == gone:
                del holder.node[k]
                return


OPERATORS = {
    "Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "MatMul": "Add", "Relu": "Identity", "Max": "Min",
    "Min": "Max", "ReduceMax": "ReduceMin", "ReduceMin": "ReduceMax", "ReduceL2": "ReduceL1", "ReduceSum": "ReduceMax",
    "Greater": "Less", "Less": "Greater", "LessOrEqual": "GreaterOrEqual", "And": "Or", "Or": "And", "ArgMax": "ArgMin",
    "Where": "Where", "Not": "Identity", "Conv": "ConvTranspose", "ReduceSumSquare": "ReduceSum", "Sqrt": "Identity",
}  # fmt: skip


def change_node(number: int, how: int) -> Forge:
    def change(files: Files) -> None:
        assert files.model is not None
        node = nodes_of(files.model)[number]
        if how == 0:
            remove_node(files.model, number)
        elif how == 1 and len(set(node.input)) > 1:
            node.input[:] = list(node.input)[::-1]
        else:
            node.op_type = OPERATORS.get(node.op_type, "Neg")
            if node.op_type == "Where":
                node.input[1], node.input[2] = node.input[2], node.input[1]

    return change


def change_attribute(number: int, place: int) -> Forge:
    def change(files: Files) -> None:
        assert files.model is not None
        attribute = nodes_of(files.model)[number].attribute[place]
        match attribute.type:
            case AttributeProto.TENSOR:
                values = onnx.numpy_helper.to_array(attribute.t)
                if values.dtype == bool:
                    values = ~values
                elif values.dtype.kind == "f":
                    values = (
                        values * (1.0 + 1e-3) + (values == 0) * 1e-3
                        if np.isfinite(values).all()
                        else np.ones_like(values)
                    )
                else:
                    values = values + 1
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))
            case AttributeProto.INT:
                attribute.i = 1 - attribute.i
            case AttributeProto.INTS:
                attribute.ints[:] = list(attribute.ints)[::-1]
            case AttributeProto.FLOAT:
                attribute.f = 2.0 * attribute.f + 1.0
            case AttributeProto.STRING:
                attribute.s = b"edge" if attribute.s != b"edge" else b"wrap"
            case AttributeProto.GRAPH:
                attribute.g.node.pop()

    return change


NODES = {"triangular": (F64, 5), "tuned": (F64, 7), "equilibrium": (F64, 8), "images": (F64, 14), "images ": (F32, 7)}


def node_cases() -> Iterator[Case]:
    for label, (dtype, stride) in NODES.items():
        name = label.strip()
        found = nodes_of(honest(name, dtype, True, "pair").files.model)
        for number in range(0, len(found), stride):
            words = ("removed", "read backwards", "another operator")[number // stride % 3]
            what = f"node {number}, {found[number].op_type}: {words}"
            yield Case(what, (name, dtype, True, FORMS[number % 2]), change_node(number, number // stride % 3))
        attributes = [(number, place) for number, node in enumerate(found) for place in range(len(node.attribute))]
        for number, place in attributes[::stride]:
            node = found[number]
            what = f"node {number}, {node.op_type}: another {node.attribute[place].name}"
            yield Case(what, (name, dtype, True, FORMS[number % 2]), change_attribute(number, place))


def graph(change: Callable[[onnx.ModelProto], Any]) -> Forge:
    def forge(files: Files) -> None:
        assert files.model is not None
        change(files.model)

    return forge


def in_front(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Nodes before the others."""
    following = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *following])


def behind(model: onnx.ModelProto, output: str, write: Callable[[str, int], list[onnx.NodeProto]]) -> None:
    """Nodes that make another output of the honest one; they are told its name and the type of the input."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                if name == output:
                    names[k] = f"honest_{output}"
    model.graph.node.extend(write(f"honest_{output}", model.graph.input[0].type.tensor_type.elem_type))


def number(kind: int, value: float, name: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, [], [value]))


def exchanged(model: onnx.ModelProto, one: str, other: str) -> None:
    """Two initialisers under each other's names, as far as a call is concerned."""
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            suffix = name.rsplit(".", 1)[-1]
            if suffix in (one, other):
                node.input[k] = name.removesuffix(suffix) + (other if suffix == one else one)


def function_like(name: str, operator: str) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function("lipconvert", name, ["x"], ["y"], [helper.make_node(operator, ["x"], ["y"])], opsets)


GRAPHS: dict[str, Forge] = {
    "the logits scaled": graph(
        lambda m: behind(
            m, "logits", lambda y, kind: [number(kind, 1.001, "c"), helper.make_node("Mul", [y, "c"], ["logits"])]
        )
    ),
    "logits that are negative": graph(lambda m: behind(m, "logits", lambda y, _: [helper.make_node("Neg", [y], ["logits"])])),
    "logits as they are, by one node more": graph(
        lambda m: behind(m, "logits", lambda y, _: [helper.make_node("Identity", [y], ["logits"])])
    ),
    "twice the radius": graph(
        lambda m: behind(
            m,
            "radius",
            lambda r, _: [number(TensorProto.DOUBLE, 2.0, "two"), helper.make_node("Mul", [r, "two"], ["radius"])],
        )
    ),
    "an output less": graph(lambda m: m.graph.output.pop()),
    "an output twice": graph(lambda m: m.graph.output.append(m.graph.output[0])),
    "outputs backwards": graph(
        lambda m: (outs := list(m.graph.output), m.graph.ClearField("output"), m.graph.output.extend(outs[::-1]))
    ),
    "an output of another name": graph(lambda m: setattr(m.graph.output[-1], "name", "other")),
    "residual and radius under each other's names": graph(
        lambda m: (setattr(m.graph.output[1], "name", "radius"), setattr(m.graph.output[2], "name", "residual"))
    ),
    "no logits": graph(lambda m: m.graph.output.__delitem__(0)),
    "an input of another name": graph(lambda m: setattr(m.graph.input[0], "name", "x")),
    "an input more": graph(lambda m: m.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, []))),
    "an initialiser that is an input": graph(
        lambda m: m.graph.input.append(
            helper.make_tensor_value_info(
                m.graph.initializer[0].name, m.graph.initializer[0].data_type, m.graph.initializer[0].dims
            )
        )
    ),
    "a fixed batch": graph(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)),
    "another size of the input": graph(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 7)),
    "another type of the input": graph(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 10)),
    "another type of the output": graph(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 10)),
    "another order of functions": graph(
        lambda m: (fs := list(m.functions), m.ClearField("functions"), m.functions.extend(fs[::-1]))
    ),
    "a function more": graph(lambda m: m.functions.append(function_like("more", "Relu"))),
    "a function twice": graph(lambda m: m.functions.append(m.functions[0])),
    "a function of the name again, another one": graph(
        lambda m: m.functions.append(function_like(m.functions[0].name, "Relu"))
    ),
    "a function less": graph(lambda m: m.functions.pop()),
    "a function that is called by another name": graph(lambda m: setattr(m.functions[0], "name", "other")),
    "a function of another domain": graph(lambda m: setattr(m.functions[0], "domain", "other")),
    "a function in place of an operator": graph(
        lambda m: (
            m.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], []))
        )
    ),
    "an overload": graph(lambda m: setattr(m.functions[0], "overload", "other")),
    "a function with its inputs in another order": graph(
        lambda m: (ins := list(m.functions[0].input), m.functions[0].input.__setitem__(slice(None), ins[::-1]))
    ),
    "a function with an attribute": graph(lambda m: m.functions[0].attribute.append("more")),
    "a function of another operator set": graph(lambda m: setattr(m.functions[0].opset_import[0], "version", 13)),
    "another operator set": graph(lambda m: setattr(m.opset_import[0], "version", 19)),
    "a newer operator set": graph(lambda m: setattr(m.opset_import[0], "version", 21)),
    "an operator set of a domain more": graph(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))),
    "another version of the format": graph(lambda m: setattr(m, "ir_version", 9)),
    "no version of the format": graph(lambda m: m.ClearField("ir_version")),
    "W and U exchanged": graph(lambda m: exchanged(m, "W", "U")),
    "b_z and b_y exchanged": graph(lambda m: exchanged(m, "b_z", "b_y")),
    "pairs and errors exchanged": graph(lambda m: exchanged(m, "pairs", "errors")),
    "the metric for the bias": graph(lambda m: exchanged(m, "b_z", "metric")),
    "V for W": graph(lambda m: exchanged(m, "W", "V")),
    "a bias that is another one": graph(lambda m: exchanged(m, "b_z", "log_psi")),
    "an initialiser more": graph(
        lambda m: m.graph.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [], [1.0]))
    ),
    "a sparse initialiser": graph(
        lambda m: m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                helper.make_tensor(m.graph.initializer[0].name, m.graph.initializer[0].data_type, [1], [1.0]),
                helper.make_tensor("places", TensorProto.INT64, [1], [0]),
                list(m.graph.initializer[0].dims),
            )
        )
    ),
    "an initialiser that is hidden in training": graph(
        lambda m: (
            m.training_info[0].algorithm.initializer.append(m.graph.initializer[0]),
            m.graph.initializer.__delitem__(0),
        )
    ),
    "an initialiser that is both": graph(
        lambda m: m.training_info[0].algorithm.initializer.append(m.graph.initializer[0])
    ),
    "no training information": graph(lambda m: m.ClearField("training_info")),
    "another piece of training information": graph(lambda m: m.training_info.add().algorithm.node.add()),
    "a constant in front": graph(lambda m: in_front(m, number(TensorProto.FLOAT, 1.0, "unused"))),
    "a constant that shadows an initialiser": graph(
        lambda m: in_front(m, number(m.graph.initializer[0].data_type, 1.0, m.graph.initializer[0].name))
    ),
    "words of the graph": graph(lambda m: setattr(m.graph, "doc_string", "something else")),
    "words of a function": graph(lambda m: setattr(m.functions[0], "doc_string", "something else")),
    "another producer": graph(lambda m: setattr(m, "producer_name", "other")),
    "more metadata": graph(lambda m: m.metadata_props.append(StringStringEntryProto(key="more", value="words"))),
    "another format in the metadata": graph(
        lambda m: next(e for e in m.metadata_props if e.key == "lipconvert.format_version").__setattr__("value", "1")
    ),
    "a value of another shape": graph(
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("x", TensorProto.INT64, [3]))
    ),
    "quantised": graph(lambda m: m.graph.quantization_annotation.add().__setattr__("tensor_name", "logits")),
}  # fmt: skip


def elsewhere(tensor: str, **where: Any) -> Forge:
    """One initialiser says that its bytes are in another place."""

    def change(files: Files) -> None:
        files.places[f"steps.{files.stages[0]}.{tensor}"] = where

    return change


PLACES: dict[str, Forge] = {
    "a path": elsewhere("U", location=f"./{DATA}"),
    "a folder above": elsewhere("U", location=f"../{DATA}"),
    "another file": elsewhere("U", location="other.safetensors"),
    "no file": elsewhere("U", location=""),
    "from the start": elsewhere("b_z", offset=0),
    "later": elsewhere("b_z", offset=8 + 64),
    "behind the end": elsewhere("U", offset=10**12),
    "negative": elsewhere("U", offset=-8),
    "shorter": elsewhere("U", length=4),
    "of no length": elsewhere("U", length=0),
    "words for a number": elsewhere("U", offset="ten"),
    "a checksum more": elsewhere("U", checksum="0"),
    "every initialiser elsewhere": lambda f: f.places.update(
        {name: {"location": "other.safetensors"} for name in f.tensors}
    ),
}


def graph_cases() -> Iterator[Case]:
    for number, name in enumerate(FOUR):
        for k, (words, forge) in enumerate(GRAPHS.items()):
            if (k + number) % 2 == 0:
                yield Case(f"graph: {words}", keys(words, name, True, True), forge)
    for k, (words, forge) in enumerate(PLACES.items()):
        name = FOUR[k % 4]
        yield Case(f"external data: {words}", (name, F64 if k % 2 else F32, True, "pair"), forge)


def some(cases: Iterator[Case]) -> Iterator[Case]:
    """Of many alike a twelfth, by their names, and the first of each place: the suite takes about a minute."""
    seen = set()
    for case in cases:
        place = re.sub(r"node \d+", "", case.what.partition(":")[0].removesuffix(", and the graph"))
        if place not in seen or zlib.crc32(str(case).encode()) % 12 == 0:
            yield case
        seen.add(place)


def _cases() -> list[Case]:
    made = [
        *some(manifest_cases()),
        *entry_cases(),
        *some(tensor_cases()),
        *some(weight_cases()),
        *plan_cases(),
        *claim_cases(),
        *some(node_cases()),
        *graph_cases(),
    ]
    return list({str(case): case for case in made}.values())


CASES = _cases()


KEYS = [(name, dtype, form) for name in NETWORKS for dtype in (F64, F32) for form in FORMS]


def models(manifest: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The parts of the schema that a manifest is made of."""
    yield manifest
    for info in manifest.model_fields.values():
        pending = [info.annotation]
        while pending:
            annotation = pending.pop()
            pending += typing.get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from models(annotation)


def test_every_field_and_every_tensor_is_forged():
    whats = [case.what for case in CASES]
    for name in {name for model in models(Manifest) for name in model.model_fields}:
        assert any(f".{name}" in f".{what.partition(':')[0]}" for what in whats), name
    forged = {what.partition(":")[0] for what in whats}
    for name in FOUR:
        assert set(honest(name, F64, True, "pair").files.tensors) <= forged
    assert len(CASES) == len({str(case) for case in CASES}) > 300
    kinds = itertools.product(FOUR, (F64, F32), (True, False), FORMS)
    assert {case.key for case in CASES} >= set(kinds)


@pytest.mark.parametrize(("name", "dtype", "form"), KEYS)
def test_honest_files(name, dtype, form, tmp_path):
    """What is saved is verified and nothing is lost, whoever has written the files, wherever they lie, and saved again."""
    for radius in (True, False) if form == "pair" else (True,):
        given = honest(name, dtype, radius, form)
        methods = [given.files.manifest["steps"][k]["graph"] for k in given.files.stages]
        if form != "data":
            assert [how["method"] for how in methods] == NETWORKS[name][1][dtype]
        folder = tmp_path / f"{radius}"
        folder.mkdir()
        files = given.files.copy()
        path = files.write(folder)
        report = lc.verify(path, seed=0)
        assert report.passed, report.failures()
        if form == "pair":  # the same graph and numbers as embedded
            assert lost(path, files, given) == []
        moved_to = folder.rename(tmp_path / f"elsewhere {radius}") / path.name
        net = lc.load(moved_to)
        assert lc.verify(moved_to, seed=0).passed
        again = tmp_path / f"again {radius}" / path.name
        lc.save(net, again, embed=form == "embedded")
        assert lc.verify(again, seed=0).passed
        for key, M in Files.read(again, form).tensors.items():
            derived = key.rsplit(".", 1)[-1] in DERIVED  # products and transforms may be added up in another order
            size = np.finfo(M.dtype).eps * float(np.abs(M).max()) if M.size else 0.0
            np.testing.assert_allclose(M, files.tensors[key], rtol=1e-6 * derived, atol=64.0 * size * derived)


@pytest.mark.parametrize("name", NETWORKS)
def test_numpy_evaluates_the_same_network(name):
    """`Truth` against torch, W against paper eq. (2), and its gradients against differences."""
    generator = np.random.default_rng(0)
    files = honest(name, F64, False, "pair").files
    truth = Truth(files)
    x = generator.random((5, *truth.shape))
    with torch.no_grad():
        y = network(name, F64)(torch.from_numpy(x)).numpy()
    for which in ("W", "rebuilt"):
        np.testing.assert_allclose(truth.logits(x, which), y, rtol=1e-9, atol=1e-10)
    g, d = generator.standard_normal(y.shape), generator.standard_normal(x.shape)
    slope = ((truth.logits(x + 1e-6 * d) - truth.logits(x - 1e-6 * d)) * g).sum(1) / 2e-6
    np.testing.assert_allclose((truth.gradient(x, g) * d).reshape(5, -1).sum(1), slope, rtol=1e-6, atol=1e-8)


def test_the_search_finds_what_is_lost(tmp_path):
    """Each kind of loss, of files that are only written and not verified."""

    def found(name: str, dtype: str, forge: Forge, folder: str) -> list[str]:
        given = honest(name, dtype, True, "pair")
        files = given.files.copy()
        forge(files)
        (tmp_path / folder).mkdir()
        return lost(files.write(tmp_path / folder), files, given)

    def less(files: Files) -> None:
        files.tensors["pairs"] *= 1.0 - 1.9e-6

    losses = found("triangular", F64, less, "less")
    assert "pairs less than was proved" in losses
    assert any("points within a stated radius" in loss for loss in losses), losses
    for k, (name, dtype, forge) in enumerate(
        [
            ("tuned", F64, PLANS["tuned"]["substitution"]),
            ("tuned", F32, PLANS["tuned"]["a tolerance of a half"]),
            ("equilibrium", F64, PLANS["equilibrium"]["one step"]),
            ("equilibrium", F32, PLANS["equilibrium"]["a tolerance of 1e-3"]),
            ("tuned images", F32, PLANS["tuned images"]["convolutions"]),
            ("triangular", F64, uphill(0.9, False)),
        ]
    ):
        losses = found(name, dtype, forge, f"answers {k}")
        assert any("answers are off" in loss for loss in losses), (name, losses)

    def certificate(**update: Any) -> Forge:
        return lambda files: files.manifest["steps"][files.stages[0]]["certificate"].update(update)

    for k, (forge, words) in enumerate(
        [
            (certificate(lipschitz=0.7, delta=0.0), "condition (10)"),
            (certificate(delta=0.0), "the prescribed one"),
            (certificate(mu=2.0), "condition (3)"),
            (moved("steps.1.V", lambda V: V + 1e-3), "W is not what"),
        ]
    ):
        losses = found("triangular", F64, forge, f"claims {k}")
        assert any(words in loss for loss in losses), (words, losses)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forgeries(case, tmp_path):
    given = honest(*case.key)
    files = given.files.copy()
    try:
        case.forge(files)
    except UnwritableError:
        return
    assert files.differs(given.files), "nothing is forged"
    path = files.write(tmp_path)
    report = lc.verify(path, seed=0)
    try:
        lc.load(path)
    except lc.CheckpointError:
        assert not report.passed
    if report.passed:
        assert lost(path, files, given) == []
