"""Recipes: a training run in one YAML file, and the table of what came of several, beside the paper's.

A run lives in RESULTS/NAME/seed-K: ``result.json``, ``report.json``, ``metrics.csv`` and ``curves.png``, small enough to
keep; and the network, ``net.onnx`` with ``net.safetensors``, and the state of the run, which are not.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from .. import data
from ..certification.certify import certify
from ..checkpoints import checkpoint
from ..conversion.convert import convert
from ..data import Images
from ..errors import InvalidParameterError, ShapeError
from ..escaping import markdown as escaped
from ..foundation.arguments import isolated
from ..foundation.factory import build
from ..foundation.shards import place
from ..networks.glue import Normalize
from ..networks.network import Network
from ..plugin_api.weights import opened
from ..reports.plotting import radius_name
from ..training.documents import TrainingConfig
from ..training.finetune import OnEpoch, OnStep, Samples, finetune, input_shape_of, keep, require_fit, train, versions
from .documents import ConversionConfig, ModelConfig, Recipe, RecipeResult

RESULT, NETWORK, SOURCE = "result.json", "net.onnx", "model.pt"
SUFFIXES = (".yaml", ".yml")
DEFAULT = "results"

Told = Callable[[str, str], object]
"""(recipe, what is being done)."""

M = TypeVar("M", Recipe, TrainingConfig)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, as people mean them: 1e-3 is a number; yes, no, on, off, dates and 12:30 are words.

    A name stands once in a mapping: of two, one would be lost.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does; raises `yaml.YAMLError` for a name that is there twice."""
        names: set[str] = set()
        for name, mark in ((str(key.value), key.start_mark) for key, _ in node.value):
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands here twice", mark)
            names.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"null|Null|NULL|~|", "nN~"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""])
for _kind in (int, float):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind.__name__}", lambda _, node, kind=_kind: kind(node.value))


def plain(text: str, where: str) -> Any:
    """YAML text as plain data; raises `InvalidParameterError` for what is none."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidParameterError(where, "not YAML", f"it must be readable: {' '.join(str(error).split())}") from None


def read(path: str | Path, kind: type[M], changes: Mapping[str, Any] | None = None) -> M:
    """A YAML file as a `Recipe` or a `TrainingConfig`; ``changes``: entries in place of its own, by dotted names.

    Raises `InvalidParameterError` for what is no YAML, unknown names and values that do not fit; `OSError`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidParameterError(str(path), "not UTF-8", "a recipe is a text file") from None
    content = plain(text, str(path))
    if not isinstance(content, dict):
        what = "empty" if content is None else f"a {type(content).__name__}"
        raise InvalidParameterError(str(path), what, "it must hold names and values")
    return checked(content, kind, str(path), changes)


def checked(content: Mapping[str, Any], kind: type[M], where: str, changes: Mapping[str, Any] | None = None) -> M:
    """A document from plain data, with ``changes`` by dotted names; raises `InvalidParameterError` in words."""
    merged = dict(content)
    for name, value in (changes or {}).items():
        *path, last = name.split(".")
        place = merged
        for part in path:
            inner = place.get(part) or {}
            if not isinstance(inner, dict):
                raise InvalidParameterError(name, value, f"{part} of {where} has no parts")
            place[part] = dict(inner)
            place = place[part]
        place[last] = value
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise _in_words(error, kind, where, changes or {}) from None


def _in_words(
    error: ValidationError, kind: type[BaseModel], where: str, changes: Mapping[str, Any]
) -> InvalidParameterError:
    """The first thing that is wrong, in the names a user writes."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    changed = any(name == given or name.startswith(given + ".") for given in changes)
    label = f"{name} of {'--set' if changed else where}" if name else where
    if first["type"] == "extra_forbidden":
        known = ", ".join(_parts_of(kind, path[:-1]))
        return InvalidParameterError(label, "unknown", f"these are known: {known}")
    if first["type"] in ("model_type", "model_attributes_type"):
        known = ", ".join(f"{name}.{part}" for part in _parts_of(kind, path))
        return InvalidParameterError(label, first["input"], f"it has parts: {known}")
    message = str(first["msg"]).removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        return InvalidParameterError(label, "not as it should be", message)
    return InvalidParameterError(label, first["input"], message)


def _parts_of(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The names a part of a document has, by its path."""
    found: Any = kind
    for part in path:
        annotation = found.model_fields[part].annotation if part in getattr(found, "model_fields", {}) else None
        options = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
        found = options[0] if options else None
    return list(getattr(found, "model_fields", {}))


def built(model: ModelConfig, seed: int) -> nn.Module:
    """The network a factory returns for its arguments, with random weights of a seed. Raises `ModelError`."""
    torch.manual_seed(seed)
    network = build(model.factory, model.arguments)
    front: list[nn.Module] = []
    if model.mean is not None or model.std is not None:
        front.append(Normalize([0.0] if model.mean is None else model.mean, [1.0] if model.std is None else model.std))
    if (s := model.unshuffle) > 1:
        front.append(nn.PixelUnshuffle(s))
    if not front:
        return network
    shape = convert(network, check=False).input_shape
    if s > 1:
        if len(shape) != 3 or shape[0] % s**2:
            reason = f"{model.factory} takes {shape}, not a multiple of {s**2} channels of images"
            raise InvalidParameterError("model.unshuffle", s, reason)
        shape = (shape[0] // s**2, s * shape[1], s * shape[2])
    behind = nn.Sequential(*front, network)
    behind.input_shape = shape  # type: ignore[assignment]
    return behind


def folder_of(path: str | Path, results: str | Path, seed: int) -> Path:
    """Where a recipe's run with a seed lives."""
    return Path(results) / Path(path).stem / f"seed-{seed}"


@dataclass(frozen=True)
class Order:
    """What a run of recipes is told besides them.

    ``results``: where to; ``source``: data in place of theirs, as `data.load` names them; ``data_dir``: where the files of
    the torchvision sets are; ``limit``: of training and test samples, to try it out; half of them are held out
    where a recipe holds out more than there are. ``told``, ``on_step`` and ``on_epoch`` are called as it goes.
    """

    results: str | Path = DEFAULT
    source: str | None = None
    data_dir: str | Path = "data"
    limit: int | None = None
    told: Told = lambda recipe, what: None
    on_step: OnStep | None = None
    on_epoch: OnEpoch | None = None

    def data(self, name: str, split: str) -> Images:
        """A part of a data set, as `data.load` names them."""
        return data.load(name, split, self.data_dir).spread(self.limit)

    def training(self, config: TrainingConfig) -> TrainingConfig:
        """A recipe's own, for as many samples."""
        if self.limit is None or config.held_out < self.limit:
            return config
        return config.model_copy(update={"held_out": self.limit // 2})

    def changes(self, seed: int | None) -> dict[str, Any]:
        """What takes the place of a recipe's own entries, by dotted names."""
        seeded = {} if seed is None else {"training.seed": seed}
        return seeded if self.source is None else {**seeded, "data": self.source}


@isolated
def run(
    path: str | Path, order: Order | None = None, *, seed: int | None = None, changes: Mapping[str, Any] | None = None
) -> RecipeResult:
    """Train or fine-tune as a recipe says, certify on the test set, write it down; what it starts from is run first.

    A run that was killed goes on where it was, one that is finished is read. ``seed`` in place of the recipe's, also for what
    it starts from; ``changes``: other entries, by dotted names.
    Raises what `finetune`, `train` and `certify` raise, and `InvalidParameterError` and `ModelError` for a recipe.
    """
    path, order = Path(path), order or Order()
    recipe = read(path, Recipe, {**(changes or {}), **order.changes(seed)})
    seed = recipe.training.seed
    starts = _starts(path, order.changes(seed))
    if starts and starts[0].model is None and recipe.convert != ConversionConfig():
        reason = f"{recipe.start} ends with a converted network: convert belongs to the first recipe that fine-tunes"
        raise InvalidParameterError(f"convert of {path}", "given", reason)
    for first, before in zip(chain(path)[1:], starts, strict=True):
        if (kept := before.training.held_out) < recipe.training.held_out:
            reason = f"{first.name} keeps {kept} back, so that it has been trained on the others"
            raise InvalidParameterError(f"training.held_out of {path}", recipe.training.held_out, reason)
    folder = folder_of(path, order.results, seed)
    stored = _stored(folder, recipe)
    if stored is not None and stored.limit == order.limit and _made_by(stored, recipe, starts):
        if (stored.recipe, stored.starts) == (recipe, starts):
            return stored
        if (stored.recipe.method, stored.recipe.seconds) == (recipe.method, recipe.seconds):  # other words alone
            result = stored.model_copy(update={"recipe": recipe, "starts": starts})
            if place()[0] == 0:
                result.write(folder / RESULT)
            return result
    samples, tests = order.data(recipe.data, "train"), Samples.of(order.data(recipe.data, "test"), "the test data")
    if tests.shape != samples.shape:
        raise ShapeError("a sample of the test data", samples.shape, tests.shape, "Training data have the other shape.")
    training = order.training(recipe.training)
    source = _start(path, recipe, starts, order, samples)
    order.told(path.stem, "training")
    about: dict[str, Any] = {
        "folder": folder,
        "data": recipe.data,
        "on_step": order.on_step,
        "on_epoch": order.on_epoch,
    }
    if recipe.model is not None:
        report = train(source, samples, None, training, name=recipe.title, **about)
        net = _converted(source, samples)
        if place()[0] == 0:
            keep_source(source, folder)
    else:
        net = source if isinstance(source, Network) else _converted(source, samples, recipe.convert)
        report = finetune(net, samples, None, training, model=recipe.title, **about)
    order.told(path.stem, "writing")
    net = net.double()  # what is kept is what is certified
    if place()[0] == 0:
        checkpoint.save(net, folder / NETWORK)
    order.told(path.stem, "certifying")
    robustness = certify(
        net,
        tests.dataset(net.input_shape, torch.float64),
        recipe.training.radii,
        recipe.method,
        seconds=recipe.seconds,
        model=recipe.title,
        name=recipe.data,
    )
    result = RecipeResult(
        name=path.stem,
        recipe=recipe,
        starts=starts,
        seed=seed,
        limit=order.limit,
        samples=robustness.samples,
        natural_accuracy=robustness.natural_accuracy,
        radii=robustness.radii,
        methods=[found.method for found in robustness.methods],
        certified_accuracy=[found.certified_accuracy for found in robustness.methods],
        proved_lipschitz=robustness.proved_lipschitz,
        parameters=sum(p.numel() for p in (net if recipe.model is None else source).parameters()),
        epochs=len(report.history) - 1,
        seconds=report.seconds,
        threads=torch.get_num_threads(),
        device=report.device,
        versions=versions("lipconvert", "torch"),
        commit=_commit(path),
    )
    if place()[0] == 0:
        result.write(folder / RESULT)
    return result


def keep_source(source: nn.Module, folder: Path) -> None:
    """The state dict of a source network into the folder of its run."""
    keep(source.state_dict(), folder / SOURCE)


def _start(path: Path, recipe: Recipe, starts: list[Recipe], order: Order, samples: Images) -> nn.Module:
    """What a recipe begins with: a new model, or what another recipe ends with, which is run now if it has not been."""
    seed = recipe.training.seed
    if recipe.model is not None:
        return built(recipe.model, seed)
    first, before = path.parent / str(recipe.start), starts[0]
    folder = folder_of(first, order.results, seed)
    stored = _stored(folder, before)
    if stored is None and before.training.devices != recipe.training.devices:
        reason = (
            f"{path.name} has {recipe.training.devices}, and processes start once: run {first.name} by itself first"
        )
        raise InvalidParameterError(f"training.devices of {first}", before.training.devices, reason)
    if stored is not None and (stored.limit != order.limit or not _made_by(stored, before, starts[1:])):
        kept, now = stored.recipe.makes(), before.makes()
        differ = [n for n in Recipe.model_fields if getattr(kept, n) != getattr(now, n)]
        if not differ:
            differ = ["--limit"] if stored.limit != order.limit else ["recipe to start from"]
        reason = (
            f"it was made with another {' and '.join(differ)} than {first} has now: take another --out, or remove it"
        )
        raise InvalidParameterError(f"what {path.name} starts from, {folder}", "there", reason)
    if stored is None:
        _require_fit([recipe, *starts], order, samples)
    run(first, order, seed=seed)
    if before.model is None:
        return checkpoint.load(folder / NETWORK)
    source = built(before.model, seed)
    source.to(torch.float64 if before.training.precision == "64-true" else torch.float32)
    source.load_state_dict(opened(folder / SOURCE))
    return source.eval()


def _require_fit(recipes: Sequence[Recipe], order: Order, samples: Images) -> None:
    """Raises what a recipe cannot do with what it starts from, which has its shapes before it is trained."""
    recipe, (second, first) = recipes[0], recipes[-2:]
    assert first.model is not None
    start = _converted(built(first.model, recipe.training.seed), samples, second.convert)
    require_fit(start, samples, order.training(recipe.training))


def _converted(source: nn.Module, samples: Images, how: ConversionConfig | None = None) -> Network:
    options = {} if how is None else how.model_dump()
    return convert(source, input_shape_of(source, samples.shape), **options, check=False)


def _starts(path: str | Path, changes: Mapping[str, Any]) -> list[Recipe]:
    """What a recipe starts from, what that starts from, and so on, the first of them last."""
    return [read(first, Recipe, changes) for first in chain(path)[1:]]


def _made_by(result: RecipeResult, recipe: Recipe, starts: Sequence[Recipe]) -> bool:
    """Whether a result has the weights that a recipe gives, from what it starts from now."""
    return [r.makes() for r in (result.recipe, *result.starts)] == [r.makes() for r in (recipe, *starts)]


def stale(path: Path, result: RecipeResult) -> str:
    """Why a result is not what a recipe gives as it is now, "" where it is: its data and its seed may differ."""
    changes = {"data": result.recipe.data, "training.seed": result.seed}
    return "" if _made_by(result, read(path, Recipe, changes), _starts(path, changes)) else "another recipe"


def _commit(path: Path) -> str:
    """The commit a recipe's repository is at, with a + where files differ from it; empty outside of one."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=path.parent, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        found = git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
        return found if git("ls-files", path.name) or found.endswith("+") else found + "+"
    except (OSError, subprocess.CalledProcessError):
        return ""


def results_of(recipes: str | Path, results: str | Path = DEFAULT) -> dict[Path, list[RecipeResult]]:
    """Every recipe of a folder (or one file) and what came of it, in order of seeds.

    Recipes stand in the order of their data (as `data.NAMES` has them), each behind what it starts from.
    Raises `InvalidParameterError` for recipes that cannot be read, or where there are none.
    """
    where = Path(recipes)
    paths = [p for p in where.iterdir() if p.suffix in SUFFIXES] if where.is_dir() else [where]
    if not paths:
        raise InvalidParameterError("recipes", str(where), f"it must hold files ending in {' or '.join(SUFFIXES)}")
    read_recipes = {path: read(path, Recipe) for path in paths}

    def place(path: Path) -> tuple[int, int, str]:
        recipe = read_recipes[path]
        number = data.NAMES.index(recipe.data) if recipe.data in data.NAMES else len(data.NAMES)
        return number, len(chain(path)), path.stem

    found: dict[Path, list[RecipeResult]] = {}
    for path in sorted(paths, key=place):
        files = (Path(results) / path.stem).glob(f"seed-*/{RESULT}")
        found[path] = sorted((_read_result(file) for file in files), key=lambda result: result.seed)
    return found


def chain(path: str | Path) -> list[Path]:
    """A recipe and those it starts from, the first of them last.

    Raises `InvalidParameterError` where one starts from itself, and as `read`.
    """
    found = [Path(path)]
    while (start := read(found[-1], Recipe).start) is not None:
        first = found[-1].parent / start
        if not first.is_file():
            raise InvalidParameterError(f"start of {found[-1]}", start, "there is no such file beside it")
        if first.resolve() in {p.resolve() for p in found}:
            raise InvalidParameterError(f"start of {found[-1]}", start, "a recipe cannot start from itself")
        if first.stem in {p.stem for p in found}:
            raise InvalidParameterError(f"start of {found[-1]}", start, "its results would share a folder: rename one")
        found.append(first)
    return found


def _stored(folder: Path, recipe: Recipe) -> RecipeResult | None:
    """What came of a run of a recipe that is finished, None where it is not."""
    files = [RESULT, NETWORK] if recipe.model is None else [RESULT, NETWORK, SOURCE]
    return _read_result(folder / RESULT) if all((folder / file).is_file() for file in files) else None


def _read_result(file: Path) -> RecipeResult:
    try:
        return RecipeResult.model_validate_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InvalidParameterError(
            str(file), "no result", "it is not UTF-8; remove it, and run its recipe again"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidParameterError(
            str(file), "no result", f"{name}: {first['msg']}; remove it, and run its recipe again"
        ) from None


def rows_of(
    found: Mapping[Path, Sequence[RecipeResult]], why_not: Callable[[Path, RecipeResult], str] = lambda path, result: ""
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table: the paper's row of each recipe where it has one, then ours by each method, in %.

    Over several seeds, on one set of data: the mean ± the sample standard deviation. The radii are the default ones where
    any result has them; of a recipe with others the row only says so, as it does of results for which ``why_not`` (`stale`)
    has a reason.
    """
    default = list(TrainingConfig().radii)
    present = [r.radii for results in found.values() for r in results]
    radii = default if default in present or not present else present[0]
    headings = ["recipe", "data", "method", "seeds", "epochs", "minutes", "natural", *map(radius_name, radii)]
    rows = []
    for path, given in found.items():
        recipe = given[0].recipe if given else read(path, Recipe)
        reasons = [why_not(path, result) for result in given]
        results = [result for result, reason in zip(given, reasons, strict=True) if not reason]
        if recipe.paper is not None and radii == default:
            numbers = [f"{100 * value:.1f}" for value in (recipe.paper.natural, *recipe.paper.certified)]
            rows.append([f"{recipe.paper.model}, the paper", "", "", "", "", "", *numbers])
        for reason in dict.fromkeys(filter(None, reasons)):
            rows.append([path.stem, recipe.data, reason, str(reasons.count(reason)), *[""] * (3 + len(radii))])
        if not given:
            rows.append([path.stem, recipe.data, "not run", *[""] * (4 + len(radii))])
        groups: dict[tuple[float, str], list[RecipeResult]] = {}
        for result in results:
            groups.setdefault((-(result.limit or math.inf), result.recipe.data), []).append(result)
        for (limit, _), group in sorted(groups.items(), key=lambda item: item[0]):
            name = path.stem if limit == -math.inf else f"{path.stem} (--limit {-limit:.0f})"
            rows += _rows_of_one(name, group[0].recipe, group, radii)
    return headings, rows


def _rows_of_one(name: str, recipe: Recipe, results: Sequence[RecipeResult], radii: Sequence[float]) -> list[list[str]]:
    """The rows of one recipe over its seeds, a row for each method."""
    if any(r.radii != radii or r.methods != results[0].methods for r in results):
        # Its numbers would stand below the radii of others.
        return [[name, recipe.data, "other radii or methods", str(len(results)), *[""] * (3 + len(radii))]]
    natural = spread([r.natural_accuracy for r in results])
    minutes = f"{statistics.mean(r.seconds for r in results) / 60:.1f}"
    epochs = f"{statistics.mean(r.epochs for r in results):g}"
    about = [name, recipe.data, "", str(len(results)), epochs, minutes, natural]
    rows = []
    for m, method in enumerate(results[0].methods):
        if method == "pairwise":
            continue
        columns = [spread([r.certified_accuracy[m][k] for r in results]) for k in range(len(radii))]
        rows.append(
            [*about[:2], method, *about[3:], *columns] if m == 0 else ["", "", method, "", "", "", "", *columns]
        )
    return rows


def commands_of(found: Mapping[Path, Sequence[RecipeResult]], results: str | Path = DEFAULT) -> list[str]:
    """What runs the recipes that have no result."""
    where = [] if str(results) == DEFAULT else ["--out", str(results)]
    return [
        shlex.join(["lipconvert", "train" if read(path, Recipe).model is not None else "finetune", str(path), *where])
        for path, results in found.items()
        if not results
    ]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± sample standard deviation, in %; the mean alone of a single value. ``sign``: as in format strings."""
    percent = [100.0 * value for value in values]
    deviation = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{sign}.2f}{deviation}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 3) -> str:
    """A table for reading, its first columns to the left and the others to the right."""
    lines = ["| " + " | ".join(headings) + " |", "|" + ":--|" * left + "--:|" * (len(headings) - left)]
    return "\n".join([*lines, *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)]) + "\n"
