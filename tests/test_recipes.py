"""Recipes and the commands that train: what is run and what is not, where it ends up, and numbers found by two roads."""

import csv
import io
import json
import math
import shlex
import statistics
import subprocess
import sys
import types
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import lipconvert as lc
from lipconvert import cli, data
from lipconvert.errors import DataError, InvalidParameterError, LipconvertError, ShapeError
from lipconvert.experiments import demo, recipes
from lipconvert.experiments.documents import Recipe, RecipeResult
from lipconvert.training.documents import FinetuneReport, TrainingConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
SHAPES["cifar100"] = SHAPES["cifar10"]
LIMIT = 90

MONDEQ = {
    "factory": "lipconvert_plugins.mondeq:MonDEQ",
    "arguments": {"in_features": 64, "hidden": 12, "out_features": 10, "m": 1.0, "lipschitz": 1.0},
}
LINEAR = {"factory": "lipconvert_plugins.aol:AOLLinear", "arguments": {"in_features": 64, "out_features": 10}}
TRAINING = {"epochs": 1, "batch_size": 32, "learning_rate": 0.03, "held_out": 30, "keep": "last"}
PAPER = {"model": "LBEN", "natural": 0.9, "certified": [0.8, 0.7, 0.6, 0.5]}


def write(name, text=None, **entries):
    """A recipe in the current folder: a linear layer from scratch, unless entries say something else. None: without it."""
    content = {"title": name, "data": "digits", "method": "prescribed", "training": TRAINING, **entries}
    if "start" not in entries and "model" not in entries:
        content["model"] = LINEAR
    kept = {key: value for key, value in content.items() if value is not None}
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        path.write_text(yaml.safe_dump(kept) if text is None else text, encoding="utf-8")
    return path


class Told:
    """What was done, as it is told; ``trained``: the recipes that took steps."""

    def __init__(self, results="results", stop=None, limit=LIMIT, **options):
        self.done, self.trained, self.stop = [], {}, stop
        self.order = recipes.Order(
            results, limit=limit, told=lambda name, what: self.done.append((name, what)), on_step=self.step, **options
        )

    def step(self, step, total, loss):
        name = self.done[-1][0]
        self.trained[name] = self.trained.get(name, 0) + 1
        if self.stop is not None and sum(self.trained.values()) == self.stop:
            raise KeyboardInterrupt


def run(path, seed=None, changes=None, **options):
    return recipes.run(path, Told(**options).order, seed=seed, changes=changes)


def command(*arguments, code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*arguments):
    """The one line on stderr of a command that ends with 2, and says nothing on stdout."""
    result = command(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def digits(split="test", limit=LIMIT, flat=True):
    """By a road of our own: scikit-learn's digits, divided by 16."""
    found = load_digits()
    rows = train_test_split(range(1797), test_size=360, stratify=found.target, random_state=0)[split == "test"]
    rows = [rows[k * len(rows) // limit] for k in range(limit)]  # evenly
    x = torch.from_numpy(found.images[rows] / 16.0)
    return x.flatten(1) if flat else x[:, None], torch.from_numpy(found.target[rows])


def accuracies(net, radii, x, labels):
    """Natural and certified accuracy by the definition: the lead of the label over √2·L."""
    with torch.no_grad():
        logits = net(x)
    label = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    radius = (label - others) / (math.sqrt(2.0) * net.lipschitz)
    return float((radius > 0).double().mean()), [float((radius > r).double().mean()) for r in radii]


def new(model, seed):
    """The model of a recipe, untrained."""
    return recipes.built(recipes.ModelConfig(**model), seed)


def weights(folder):
    """All numbers of the network that was written."""
    state = lc.load(Path(folder) / "net.onnx").state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def report_of(folder):
    return FinetuneReport.model_validate_json((Path(folder) / "report.json").read_text())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, and an import path that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        "lipconvert.training.finetune.plot_training", lambda report, path: path.touch()
    )  # drawn once, below
    return tmp_path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A chain of three recipes that has been run once: (its folder, what was told)."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write("base.yaml", model=MONDEQ)
        write("fine.yaml", start="base.yaml", method="tightened", training={**TRAINING, "epochs": 2})
        write("finer.yaml", start="fine.yaml")
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        told = Told()
        recipes.run("finer.yaml", told.order)
        torch.set_default_dtype(dtype)
    return folder, told


@pytest.fixture
def chain(ran, monkeypatch):
    """That folder as the current one, to read."""
    monkeypatch.chdir(ran[0])
    return ran[0] / "results"


# The recipes of this repository.


@cache
def converted(model, seed, how):
    """Recipes share networks, and those of CIFAR take seconds."""
    source = recipes.built(recipes.ModelConfig.model_validate_json(model), seed).float()
    return source, lc.convert(source, **json.loads(how), check=False)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_builds_converts_and_takes_its_data(path):
    recipe = recipes.read(path, Recipe)
    first, seen = path, []
    while recipe.model is None:
        seen.append(recipe)
        first = first.parent / recipe.start
        assert len(seen) < 10
        recipe = recipes.read(first, Recipe)
        assert recipe.data == seen[0].data
    how = (seen[-1] if seen else recipe).convert
    model, net = converted(recipe.model.model_dump_json(), recipe.training.seed, how.model_dump_json())
    shape = SHAPES[recipe.data.partition(":")[0]]
    assert tuple(net.input_shape) in (shape, (math.prod(shape),))
    x = torch.rand(3, *net.input_shape)
    with torch.no_grad():
        logits = net(x)
    assert logits.shape == (3, 100 if recipe.data == "cifar100" else 10)
    torch.testing.assert_close(logits, model.double()(x).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_is_read_as_it_is_written(path):
    def leaves(value, name=()):
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, (*name, key))]
        return [(name, value)]

    read = recipes.read(path, Recipe).model_dump(mode="json")
    for name, value in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        found = read
        for key in name:
            found = found[key]
        assert found == value, name
    if read["paper"] is not None:
        row = [read["paper"]["natural"], *read["paper"]["certified"]]
        assert len(row) == 5
        assert row == sorted(row, reverse=True)


# One that starts from another.


def test_what_a_recipe_starts_from_is_run_first(ran):
    what = ("training", "writing", "certifying")
    assert ran[1].done == [(name, step) for name in ("base", "fine", "finer") for step in what]
    assert ran[1].trained == {"base": 2, "fine": 4, "finer": 2}  # 60 samples in batches of 32
    for name in ("base", "fine", "finer"):
        files = {p.name for p in (ran[0] / "results" / name / "seed-0").iterdir()}
        expected = {
            "result.json",
            "report.json",
            "metrics.csv",
            "curves.png",
            "net.onnx",
            "net.safetensors",
            "state.pt",
        }
        assert files == expected | ({"model.pt"} if name == "base" else set())


def test_what_is_there_is_not_run_again():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    told = Told()
    recipes.run("fine.yaml", told.order)
    before = {p: p.stat().st_mtime_ns for p in Path("results/base/seed-0").iterdir()}
    again = Told()
    write("other.yaml", start="base.yaml")
    recipes.run("other.yaml", again.order)
    assert {name for name, _ in again.done} == {"other"}
    assert {p: p.stat().st_mtime_ns for p in Path("results/base/seed-0").iterdir()} == before


@pytest.mark.parametrize("name", ["base", "fine", "finer"])
def test_a_result_is_what_certify_and_the_definition_find_for_the_network_that_was_written(chain, name):
    folder = chain / name / "seed-0"
    result = RecipeResult.model_validate_json((folder / "result.json").read_text())
    net = lc.load(folder / "net.onnx")
    assert lc.verify(folder / "net.onnx").passed
    assert {p.dtype for p in net.parameters()} == {torch.float64}  # what is certified, whatever it was trained in
    x, labels = digits()
    report = lc.certify(net, TensorDataset(x, labels), result.radii, result.recipe.method)
    assert result.methods == [found.method for found in report.methods]
    assert result.methods[-1] == result.recipe.method
    assert result.certified_accuracy == [found.certified_accuracy for found in report.methods]
    assert result.natural_accuracy == report.natural_accuracy
    assert result.samples == report.samples == LIMIT
    assert result.proved_lipschitz == report.proved_lipschitz
    assert (result.natural_accuracy, result.certified_accuracy[0]) == accuracies(net, result.radii, x, labels)
    strongest = np.maximum.accumulate(np.array(result.certified_accuracy), axis=0)
    assert np.array_equal(strongest, np.array(result.certified_accuracy))
    assert result.name == name
    assert result.epochs == report_of(folder).history[-1].epoch == (2 if name == "fine" else 1)
    assert result.recipe == recipes.read(f"{name}.yaml", Recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": [7]}, "stages is [7]"),
        ({"penalty": {"weight": 0.1}}, "no stage that is trained is on images"),
        ({"augment": {"crop": 9}}, "reflect 7 pixels at most"),
        ({"held_out": 31}, "keeps 30 back, so that it has been trained on the others"),
        ({"learning_rates": dict.fromkeys(("Psi", "G", "U", "V", "S", "b"), 0.0)}, "nothing is left to train"),
    ],
)
@pytest.mark.parametrize("between", [False, True])
def test_what_does_not_fit_is_said_before_the_start_is_trained(changes, words, between):
    """Also two recipes before it; the start's shapes are known without its weights."""
    start = write("a.yaml", model=MONDEQ).name
    if between:
        start = write("b.yaml", start=start).name
    told = Told()
    with pytest.raises(LipconvertError) as caught:
        recipes.run(write("c.yaml", start=start, training={**TRAINING, **changes}), told.order)
    assert words in str(caught.value)
    assert not told.done
    assert not Path("results").exists()


@pytest.mark.parametrize(("first", "second"), [("base", "fine"), ("fine", "finer")])
def test_what_one_ends_with_is_what_the_next_begins_with(chain, first, second):
    # The seed is the same, so the samples held out are.
    last, start = report_of(chain / first / "seed-0").history[-1], report_of(chain / second / "seed-0").history[0]
    assert start.loss is None
    assert start.natural_accuracy == last.natural_accuracy
    assert start.certified_accuracy == last.certified_accuracy
    assert start.lipschitz == last.lipschitz
    # And by hand: the held-out samples are some of the 90, and the accuracy of the written network on them.
    order = torch.randperm(LIMIT, generator=_generator_of_seed_0())
    x, labels = digits("train")
    net = lc.load(chain / first / "seed-0" / "net.onnx").double()
    rows = order[-TRAINING["held_out"] :]
    natural, certified = accuracies(net, TrainingConfig().radii, x[rows], labels[rows])
    assert (natural, certified) == (last.natural_accuracy, last.certified_accuracy)


def _generator_of_seed_0():
    return torch.Generator().manual_seed(0)


def test_the_source_weights_that_are_kept_are_those_of_the_network_that_is_written(chain):
    model = new(MONDEQ, 5).float()
    model.load_state_dict(torch.load(chain / "base" / "seed-0" / "model.pt", weights_only=True))
    x, _ = digits()
    net = lc.load(chain / "base" / "seed-0" / "net.onnx").double()
    with torch.no_grad():
        torch.testing.assert_close(model.double()(x), net(x), rtol=0, atol=1e-4)
    result = RecipeResult.model_validate_json((chain / "base" / "seed-0" / "result.json").read_text())
    assert result.parameters == sum(value.numel() for value in model.parameters())
    # Of a recipe with a start it is the converted network that is trained.
    result = RecipeResult.model_validate_json((chain / "fine" / "seed-0" / "result.json").read_text())
    trained = lc.load(chain / "fine" / "seed-0" / "net.onnx")
    assert result.parameters == sum(value.numel() for value in trained.parameters())
    assert result.parameters != sum(value.numel() for value in model.parameters())


def test_metrics_have_a_row_for_each_record_of_the_report(chain):
    history = report_of(chain / "fine" / "seed-0").history
    rows = list(csv.DictReader(io.StringIO((chain / "fine" / "seed-0" / "metrics.csv").read_text())))
    assert [int(row["epoch"]) for row in rows] == [record.epoch for record in history] == [0, 1, 2]
    assert [float(row["natural_accuracy"]) for row in rows] == [record.natural_accuracy for record in history]


def test_a_start_tried_out_on_a_few_samples_is_not_taken_for_the_real_one():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml", limit=50)
    with pytest.raises(LipconvertError):
        run("fine.yaml")


def test_a_start_that_was_run_on_other_data_is_not_taken(digits_in_files):
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml", source=digits_in_files[0])
    with pytest.raises(LipconvertError):
        run("fine.yaml")


def test_a_start_that_was_edited_since_is_not_taken():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml")
    write("base.yaml", training={**TRAINING, "learning_rate": 0.01})
    with pytest.raises(LipconvertError):
        run("fine.yaml")


@pytest.mark.parametrize("links", [("a.yaml", "a.yaml"), ("a.yaml", "b.yaml", "a.yaml"), ("a.yaml", "./a.yaml")])
def test_recipes_that_start_from_each_other_in_a_circle_are_refused(links):
    for name, start in pairwise(links):
        write(name, start=start)
    message = refused("finetune", "a.yaml", "--limit", LIMIT)
    assert "a.yaml" in message


def test_two_recipes_of_one_chain_do_not_share_a_folder():
    write("other/same.yaml")
    write("same.yaml", start="other/same.yaml")
    with pytest.raises(InvalidParameterError):
        run("same.yaml")


def test_a_start_is_looked_for_beside_the_recipe_that_names_it():
    write("sub/base.yaml")
    write("sub/fine.yaml", start="base.yaml")
    assert run("sub/fine.yaml").name == "fine"
    assert Path("results/base/seed-0/result.json").is_file()


def test_a_damaged_result_of_the_start_is_bad_input(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml")
    Path("results/base/seed-0/result.json").write_text("{}")
    assert "base" in refused("finetune", "fine.yaml", "--limit", LIMIT)


def test_a_start_without_its_source_weights_is_run_again_or_refused():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml")
    Path("results/base/seed-0/model.pt").unlink()
    result = CliRunner().invoke(cli.app, ["finetune", "fine.yaml", "--limit", str(LIMIT)])
    assert result.exit_code in (0, 2)
    assert result.exit_code == 0 or "model.pt" in result.stderr


def test_convert_says_how_what_is_fine_tuned_is_made():
    write("base.yaml")
    write("fine.yaml", start="base.yaml", convert={"epsilon": 0.01, "delta": 0.02})
    result = run("fine.yaml")
    net = lc.load("results/fine/seed-0/net.onnx")
    assert net.stages[0].epsilon == 0.01
    assert net.lipschitz == pytest.approx(1.02, rel=1e-9)
    assert result.recipe.convert.delta == 0.02


def test_a_recipe_in_float64_keeps_float64():
    training = {**TRAINING, "precision": "64-true"}
    write("base.yaml", training=training)
    write("fine.yaml", start="base.yaml", training=training)
    run("fine.yaml")
    for name in ("base", "fine"):
        assert {p.dtype for p in lc.load(f"results/{name}/seed-0/net.onnx").parameters()} == {torch.float64}


# Seeds.


def test_seeds_have_folders_of_their_own_down_to_the_start():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    assert run("fine.yaml", seed=3).seed == 3
    assert run("fine.yaml", changes={"training.seed": 4}).seed == 4
    for name in ("base", "fine"):
        assert sorted(p.name for p in Path("results", name).iterdir()) == ["seed-3", "seed-4"]
        assert not equal(weights(f"results/{name}/seed-3"), weights(f"results/{name}/seed-4"))
    again = run("fine.yaml", seed=3, results="elsewhere")
    assert equal(weights("results/fine/seed-3"), weights("elsewhere/fine/seed-3"))
    stored = RecipeResult.model_validate_json(Path("results/fine/seed-3/result.json").read_text())
    assert again.model_dump(exclude={"seconds"}) == stored.model_dump(exclude={"seconds"})


def test_the_seed_of_a_recipe_is_that_of_its_start():
    write("base.yaml")
    write("fine.yaml", start="base.yaml", training={**TRAINING, "seed": 2})
    run("fine.yaml")
    assert [p.name for p in Path("results/base").iterdir()] == ["seed-2"]


def test_a_negative_seed_is_refused():
    write("base.yaml")
    assert "seed" in command("train", "base.yaml", "--seed", -1, code=2).stderr
    assert "training.seed" in refused("train", "base.yaml", "--set", "seed=-1")


# Changes.


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("loss.offset=0.5", ("loss", "offset"), 0.5),
        ("clip=null", ("clip",), None),
        ("clip=3", ("clip",), 3.0),
        ("radii=[0.25, 0.5]", ("radii",), [0.25, 0.5]),
        ("radii=[0.25,0.5,]", ("radii",), [0.25, 0.5]),
        ("learning_rate=1e-3", ("learning_rate",), 0.001),
        ("learning_rate=2.5e-3", ("learning_rate",), 0.0025),
        ("schedule={kind: linear, warm_up: 0.5}", ("schedule",), {"kind": "linear", "warm_up": 0.5}),
        ("betas=[0.5, 0.75]", ("betas",), (0.5, 0.75)),
        ("keep=best", ("keep",), "best"),
        (" batch_size = 45", ("batch_size",), 45),
    ],
)
def test_set_changes_one_training_option(setting, name, value):
    write("base.yaml", training={**TRAINING, "clip": 1.0, "radii": [0.1], "schedule": {"warm_up": 0.25}})
    document = json.loads(command("train", "base.yaml", "--limit", LIMIT, "--set", setting, "--json").stdout)
    found = Recipe.model_validate(document["recipe"]).training.model_dump()
    before = recipes.read("base.yaml", Recipe).training.model_dump()
    for part in name[:-1]:
        found, before = found[part], before[part]
    assert found.pop(name[-1]) == value
    before.pop(name[-1])
    assert found == before


def test_several_settings_of_one_entry_add_up():
    write("base.yaml", training={**TRAINING, "loss": {"offset": 0.5, "temperature": 0.3}})
    options = [o for s in ("loss.offset=0.75", "schedule.kind=linear", "schedule.warm_up=0.5") for o in ("--set", s)]
    document = json.loads(command("train", "base.yaml", "--limit", LIMIT, *options, "--json").stdout)
    training = document["recipe"]["training"]
    assert training["loss"] == {"offset": 0.75, "temperature": 0.3}
    assert training["schedule"] == {"kind": "linear", "warm_up": 0.5}


def test_settings_do_not_change_what_they_are_given():
    content = {"loss": {"offset": 0.5}}
    assert recipes.checked(content, TrainingConfig, "here", {"loss.offset": 2.0}).loss.offset == 2.0
    assert content == {"loss": {"offset": 0.5}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("nope=1", ("training.nope", "unknown", "batch_size")),
        ("loss.nope=1", ("training.loss.nope", "unknown", "offset, temperature")),
        ("loss={nope: 1}", ("training.loss.nope", "unknown", "offset, temperature")),
        ("epochs=soon", ("training.epochs", "soon", "integer")),
        ("epochs=1.5", ("training.epochs", "1.5")),
        ("epochs=0", ("training.epochs", "0", "greater than or equal to 1")),
        ("epochs=true", ("training", "epochs")),
        ("epochs.x=1", ("training.epochs", "no parts")),
        ("seed.x=1", ("training.seed",)),
        ("radii=null", ("training.radii", "list")),
        ("radii=[]", ("training.radii",)),
        ("clip=.nan", ("training.clip", ".nan")),
        ("learning_rate=.inf", ("training.learning_rate", ".inf")),
        ("keep=worst", ("training.keep", "worst", "'best' or 'last'")),
        ("augment.brightness=[2, 1]", ("training.augment", "smaller first")),
        ("loss=3", ("training.loss", "3")),
        ("epochs=", ("--set", "NAME=VALUE")),
        ("=3", ("--set", "NAME=VALUE")),
        ("epochs", ("--set", "NAME=VALUE")),
        ("radii=[0.5", ("--set radii", "YAML")),
        ("seed=2020-13-45", ("seed", "2020-13-45")),
        ("loss.=1", ("training.loss.", "unknown")),
        ("epochs=!!python/object:os.system {}", ("--set epochs",)),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_in_words(setting, words):
    write("base.yaml")
    message = refused("train", "base.yaml", "--limit", LIMIT, "--set", setting)
    assert all(word in message for word in words), message
    assert not Path("results").exists()


# Data.


@pytest.fixture(scope="session")
def digits_in_files(tmp_path_factory):
    """The first digits of each part as a folder of PNG files and as a Parquet file: (folder:..., parquet:...)."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        x, labels = digits(split, 60, flat=False)
        files = []
        for k, (image, label) in enumerate(zip((x[:, 0] * 255).round().byte().numpy(), labels.tolist(), strict=True)):
            path = root / "folder" / split / f"{label}" / f"{k:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            files.append(path.read_bytes())
        (root / "parquet").mkdir(exist_ok=True)
        table = pyarrow.table({"image": files, "label": labels.tolist()})
        parquet.write_table(table, root / "parquet" / f"{split}.parquet")
    return f"folder:{root / 'folder'}", f"parquet:{root / 'parquet'}"


@pytest.mark.parametrize("kind", [0, 1], ids=["folder", "parquet"])
def test_other_data_take_the_place_of_the_recipes_down_to_the_start(digits_in_files, kind):
    write("base.yaml", data="mnist")
    write("fine.yaml", start="base.yaml", data="cifar10")
    source = digits_in_files[kind]
    document = json.loads(command("finetune", "fine.yaml", "--data", source, "--json").stdout)
    result = RecipeResult.model_validate(document)
    assert result.recipe.data == source
    assert result.samples == 60
    x, labels = digits("test", 60)
    x = (x * 255).round() / 255
    net = lc.load("results/fine/seed-0/net.onnx").double()
    assert (result.natural_accuracy, result.certified_accuracy[0]) == accuracies(net, result.radii, x, labels)
    first = RecipeResult.model_validate_json(Path("results/base/seed-0/result.json").read_text())
    assert first.recipe.data == source
    shown = command("table", "fine.yaml").stdout
    assert source.partition(":")[0] in shown


def test_data_that_are_missing_say_how_they_are_had():
    write("base.yaml", data="mnist")
    message = refused("train", "base.yaml", "--data-dir", "there")
    for words in ("'mnist'", "there/MNIST/raw", "MNIST('there', download=True)", "--data-dir"):
        assert words in message
    assert "nothing is downloaded" in message.lower()
    with pytest.raises(DataError):
        run("base.yaml", data_dir="there")
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("mnisst", "fashion-mnist"), ("folder:/nope", "CLASS/*.png"), ("parquet:/nope", "train.parquet"), ("", "digits")],
)
def test_data_of_an_unknown_name_are_refused(name, words):
    write("base.yaml")
    assert words in refused("train", "base.yaml", "--data", name)
    write("base.yaml", data=name)
    assert words in refused("train", "base.yaml")


def test_data_of_another_shape_are_refused():
    write("base.yaml", model={**LINEAR, "arguments": {"in_features": 65, "out_features": 10}})
    with pytest.raises(ShapeError):
        run("base.yaml")


def test_limit_is_of_training_and_of_test_samples():
    write("base.yaml")
    result = run("base.yaml", limit=50)
    assert result.samples == 50
    report = report_of("results/base/seed-0")
    assert (report.train_samples, report.validation_samples) == (20, 30)
    # Fewer than are held out, of this recipe and of what it starts from: half of them then.
    write("fine.yaml", start="base.yaml")
    run("fine.yaml", limit=30, results="less")
    for name in ("base", "fine"):
        report = report_of(f"less/{name}/seed-0")
        assert (report.train_samples, report.validation_samples) == (15, 15)
    message = refused("train", "base.yaml", "--limit", 60)
    assert "training data" in message


# Going on.


def test_a_finished_recipe_is_read():
    write("base.yaml")
    first = run("base.yaml")
    before = weights("results/base/seed-0")
    told = Told()
    second = recipes.run("base.yaml", told.order)
    assert told.trained == {}
    assert second == first
    assert equal(weights("results/base/seed-0"), before)


@pytest.mark.parametrize("stop", [4, 7])
def test_a_recipe_that_was_interrupted_goes_on_to_the_same_weights(stop):
    training = {**TRAINING, "epochs": 2}
    write("base.yaml", training=training)
    write("fine.yaml", start="base.yaml", training=training)
    expected = run("fine.yaml", results="whole")
    told = Told(stop=stop)  # of eight steps
    with pytest.raises(KeyboardInterrupt):
        recipes.run("fine.yaml", told.order)
    assert not Path("results/fine/seed-0/result.json").exists()
    again = Told()
    found = recipes.run("fine.yaml", again.order)
    # The state is saved at the ends of epochs of two steps (and every minute).
    assert again.trained.get("base", 0) == (0 if stop > 4 else 4 - (stop - 1) // 2 * 2)
    assert again.trained.get("fine", 0) == (4 if stop <= 4 else 4 - (stop - 5) // 2 * 2)
    for name in ("base", "fine"):
        assert equal(weights(f"results/{name}/seed-0"), weights(f"whole/{name}/seed-0"))
    assert found.model_dump(exclude={"seconds"}) == expected.model_dump(exclude={"seconds"})


def test_control_c_leaves_a_run_that_goes_on(monkeypatch):
    write("base.yaml", training={**TRAINING, "epochs": 3})
    command("train", "base.yaml", "--limit", LIMIT, "--out", "whole")
    steps = []

    def interrupted(self, step, total, loss):
        steps.append(step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Training, "on_step", interrupted)
        result = command("train", "base.yaml", "--limit", LIMIT, code=130)
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert steps == [1, 2, 3, 4, 5]
    assert result.stdout == ""
    steps.clear()
    monkeypatch.setattr(cli._Training, "on_step", lambda self, step, total, loss: steps.append(step))
    command("train", "base.yaml", "--limit", LIMIT)
    assert steps == [5, 6]
    assert equal(weights("results/base/seed-0"), weights("whole/base/seed-0"))


@pytest.mark.parametrize("name", ["base", "fine"])
def test_another_configuration_in_the_same_folder_is_refused_with_the_entry_that_differs(name):
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("fine.yaml")
    before = Path(f"results/{name}/seed-0/result.json").read_text()
    message = refused("train", f"{name}.yaml", "--limit", LIMIT, "--set", "learning_rate=0.5")
    assert "learning_rate: 0.03 there, 0.5 here" in message
    assert Path(f"results/{name}/seed-0/result.json").read_text() == before


# Recipes that cannot be run.


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model": None}, ("either model or start",)),
        ({"model": MONDEQ, "start": "base.yaml"}, ("either model or start", "not both")),
        ({"convert": {"epsilon": 0.1}}, ("convert goes with start",)),
        ({"start": "gone.yaml"}, ("gone.yaml",)),
        ({"title": None}, ("title", "required")),
        ({"data": None}, ("data", "required")),
        ({"papers": 1}, ("papers", "unknown", "title, data, model")),
        ({"training": {"nope": 1}}, ("training.nope", "unknown", "epochs")),
        ({"model": {**MONDEQ, "means": [0.5]}}, ("model.means", "unknown", "mean, std")),
        ({"paper": {**PAPER, "nope": 1}}, ("paper.nope", "unknown", "natural, certified")),
        ({"paper": {**PAPER, "certified": [0.5]}}, ("paper.certified",)),
        ({"method": "guessed"}, ("method", "guessed", "tightened")),
        ({"seconds": 0.0}, ("seconds", "greater than 0")),
        ({"model": "sll"}, ("model", "sll")),
        ({"model": {**MONDEQ, "std": [0.0]}}, ("model.std", "greater than 0")),
        ({"model": {**MONDEQ, "mean": [0.1, 0.2], "std": [1.0, 1.0, 1.0]}}, ("mean", "std")),
        ({"model": {"factory": "nocolon"}}, ("nocolon", "package.module:factory")),
        ({"model": {"factory": ":name"}}, (":name",)),
        ({"model": {"factory": "..up:name"}}, ("..up:name",)),
        ({"model": {"factory": "no_such_module:x"}}, ("no_such_module",)),
        ({"model": {"factory": "lipconvert:Nope"}}, ("lipconvert", "Nope")),
        ({"model": {"factory": "lipconvert:"}}, ("lipconvert:",)),
        ({"model": {"factory": "math:pi"}}, ("math:pi",)),
        ({"model": {"factory": "builtins:dict"}}, ("builtins:dict", "dict, not a torch.nn.Module")),
        ({"model": {"factory": "broken_models:failing"}}, ("broken_models:failing", "one over nothing")),
        ({"model": {"factory": "broken_models:leaving"}}, ("broken_models:leaving",)),
        ({"model": {"factory": "torch.nn:GELU"}}, ("GELU",)),
        ({"model": {**MONDEQ, "arguments": {**MONDEQ["arguments"], "q": 1}}}, ("MonDEQ", "'q'")),
        ({"model": {**MONDEQ, "arguments": {"in_features": 64}}}, ("MonDEQ", "hidden")),
        ({"model": {**MONDEQ, "arguments": {**MONDEQ["arguments"], "m": -1.0}}}, ("m is -1",)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else "",
)
def test_a_recipe_that_cannot_be_run_says_why(entries, words, monkeypatch):
    def failing():
        raise ZeroDivisionError("one over nothing")

    module = types.ModuleType("broken_models")
    module.failing, module.leaving = failing, lambda: sys.exit("bye")
    monkeypatch.setitem(sys.modules, "broken_models", module)
    write("base.yaml")
    write("bad.yaml", **entries)
    message = refused("train", "bad.yaml", "--limit", LIMIT)
    assert all(word in message for word in words), message
    assert "known: ." not in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "- a\n- list\n",
        "just words\n",
        "a: [1, 2\nb: }\n",
        "\0\1\2",
        bytes(range(256)),
        "title: café\n".encode("latin-1"),
        "title: a\ndata: digits\nstart: 2020-13-45\n",
        "1: 2\n",
        "? [1, 2]\n: 3\n",
        "title: !!python/object/apply:os.getcwd []\n",
        "title: a\ndata: digits\nmodel: {factory: 'a:b', arguments: &a {x: *a}}\n",
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "how", [("train", "bad.yaml"), ("table", "bad.yaml"), ("train", "sll", "--config", "bad.yaml")]
)
def test_a_file_that_is_no_recipe_is_refused(text, how):
    write("bad.yaml", text)
    message = refused(*how, *(("--data", "digits") if "sll" in how else ()))
    assert "bad.yaml" in message


@pytest.mark.parametrize("name", ["gone.yaml", "folder.yaml"])
def test_a_recipe_that_is_no_file_is_refused(name):
    Path("folder.yaml").mkdir()
    for verb in ("train", "finetune", "table"):
        assert name in refused(verb, name)


@pytest.mark.parametrize(
    "options",
    [("--config", "base.yaml"), ("--tensorboard",), ("--argument", "x=1")],
)
def test_train_refuses_what_a_recipe_says_itself(options):
    write("base.yaml")
    assert options[0] in refused("train", "base.yaml", *options)


@pytest.mark.parametrize(
    "options", [("--option", "m=1"), ("--weights", "base.yaml"), ("--epsilon", "0.1"), ("--merge",)]
)
def test_finetune_refuses_what_a_recipe_says_itself(options):
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    assert "recipe" in refused("finetune", "fine.yaml", *options)


# A Normalize in front.


@pytest.mark.parametrize(
    ("mean", "std", "L"), [([0.25], [0.5], 2.0), (None, [0.25], 4.0), ([0.5], None, 1.0), ([0.0], [2.0], 0.5)]
)
def test_mean_and_std_put_a_normalize_in_front_and_its_constant_into_L(mean, std, L):
    write("base.yaml", model={**MONDEQ, "mean": mean, "std": std})
    run("base.yaml")
    net = lc.load("results/base/seed-0/net.onnx").double()
    assert net.lipschitz == pytest.approx(L, rel=1e-9)
    model = new(MONDEQ, 9).float()
    state = torch.load("results/base/seed-0/model.pt", weights_only=True)
    model.load_state_dict({name[2:]: value for name, value in state.items() if name.startswith("1.")})
    x, _ = digits()
    shifted = (x - (mean or [0.0])[0]) / (std or [1.0])[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), model.double()(shifted), rtol=0, atol=1e-4)
    if mean and std:
        write("fine.yaml", start="base.yaml")
        run("fine.yaml")
        assert lc.load("results/fine/seed-0/net.onnx").lipschitz == pytest.approx(L, rel=1e-9)


CONVOLUTION = {
    "factory": "lipconvert_plugins.sll:SLLNetwork",
    "arguments": {
        "image": 4,
        "in_channels": 4,
        "channels": 4,
        "inner": 4,
        "conv_depth": 1,
        "dense_depth": 1,
        "pool": 2,
        "features": 16,
    },
}


def test_unshuffle_moves_pixels_into_channels_in_front():
    model = new({**CONVOLUTION, "unshuffle": 2, "mean": [0.25], "std": [0.5]}, 3)
    net = lc.convert(model, check=False)
    x, _ = digits(flat=False)
    blocks = x.reshape(-1, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).reshape(-1, 4, 4, 4)  # (row, column) in the block
    assert tuple(net.input_shape) == (1, 8, 8)
    assert net.lipschitz == pytest.approx(2.0, rel=1e-9)
    with torch.no_grad():
        expected = new(CONVOLUTION, 3).eval()((blocks - 0.25) / 0.5)
        torch.testing.assert_close(model.eval()(x), expected)
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model", [LINEAR, MONDEQ, {**CONVOLUTION, "unshuffle": 3}, {**CONVOLUTION, "unshuffle": 4}])
def test_unshuffle_of_what_does_not_fit_is_refused(model):
    write("base.yaml", model={"unshuffle": 2, **model})
    refused("train", "base.yaml", "--limit", LIMIT)


def test_mean_and_std_go_in_front_of_a_layer_that_does_not_say_its_shape():
    write("base.yaml", model={**LINEAR, "mean": [0.25], "std": [0.5]})
    run("base.yaml")  # as it would without them
    assert lc.load("results/base/seed-0/net.onnx").lipschitz == pytest.approx(2.0, rel=1e-9)


def test_mean_and_std_of_the_wrong_number_of_channels_are_refused():
    write("base.yaml", model={**MONDEQ, "mean": [0.1, 0.2, 0.3]})
    with pytest.raises(LipconvertError):
        run("base.yaml")


# The table.


def rows_of(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def test_the_table_has_what_was_run_and_how_to_run_the_rest():
    Path("recipes").mkdir()
    write("recipes/a.yaml", paper=PAPER)
    write("recipes/b.yaml", start="a.yaml")
    write("recipes/c.yml")
    Path("recipes/notes.txt").write_text("not a recipe")
    results = [run("recipes/a.yaml", seed=seed) for seed in (0, 1, 2)]
    shown = command("table", "--out", "sub/table.md").stdout
    rows = rows_of(Path("sub/table.md").read_text(encoding="utf-8"))
    assert len({len(row) for row in rows}) == 1
    assert rows[0] == [
        *("recipe", "data", "method", "seeds", "epochs", "minutes", "natural"),
        *("36/255", "72/255", "108/255", "1"),
    ]
    assert rows[2] == ["LBEN, the paper", "", "", "", "", "", "90.0", "80.0", "70.0", "60.0", "50.0"]
    natural = [100 * result.natural_accuracy for result in results]
    columns = np.array([result.certified_accuracy[0] for result in results]).T * 100
    assert rows[3][:5] == [f"a (--limit {LIMIT})", "digits", "prescribed", "3", "1"]
    for cell, values in zip(rows[3][6:], [natural, *columns], strict=True):
        mean, spread = (float(part) for part in cell.split("±"))
        assert mean == pytest.approx(sum(values) / 3, abs=0.006)
        assert spread == pytest.approx(np.std(values, ddof=1), abs=0.006)
    # What starts from another stands behind it.
    assert rows[4][:3] == ["c", "digits", "not run"]
    assert rows[5][:3] == ["b", "digits", "not run"]
    assert len(rows) == 6
    assert f"{statistics.mean(natural):.2f}" in shown
    commands = [line.strip() for line in shown.splitlines() if line.strip().startswith("lipconvert")]
    assert commands == ["lipconvert train recipes/c.yml", "lipconvert finetune recipes/b.yaml"]


@pytest.mark.parametrize(
    ("folder", "results"), [("mine", ()), ("recipes of mine", ()), ("mine", ("--results", "there"))]
)
def test_what_the_table_says_of_a_recipe_that_is_not_run_runs_it(folder, results):
    write(f"{folder}/a.yaml")
    write(f"{folder}/b.yaml", start="a.yaml")
    lines = [line.strip() for line in command("table", folder, *results).stdout.splitlines()]
    for line in lines:
        if line.startswith("lipconvert "):
            command(*shlex.split(line)[1:], "--limit", LIMIT)
    assert "not run" not in command("table", folder, *results).stdout


def test_the_table_as_json_is_the_results():
    write("a.yaml")
    write("b.yaml")
    expected = [run("a.yaml", seed=seed) for seed in (11, 2)]
    found = [RecipeResult.model_validate(d) for d in json.loads(command("table", ".", "--json").stdout)]
    assert found == expected[::-1]
    assert json.loads(command("table", "b.yaml", "--json").stdout) == []


def test_the_table_of_one_recipe_has_its_rows_alone():
    write("a.yaml")
    write("b.yaml")
    shown = command("table", "a.yaml").stdout
    assert "lipconvert train a.yaml" in shown
    assert "b.yaml" not in shown


def test_the_search_for_multipliers_may_be_given_a_time(monkeypatch):
    given = []

    def certify(*arguments, seconds, **about):
        given.append(seconds)
        return lc.certify(*arguments, seconds=seconds, **about)

    monkeypatch.setattr(recipes, "certify", certify)
    write("a.yaml", model=MONDEQ, method="tightened", seconds=0.001)
    short = recipes.run("a.yaml", Told().order)
    assert given == [0.001]
    # No time at all is still a certificate, at least as strong as the pairwise one.
    assert all(a >= b for a, b in zip(short.certified_accuracy[2], short.certified_accuracy[1], strict=True))


def test_methods_have_a_row_each_but_for_pairwise(chain):
    found = recipes.results_of("fine.yaml", chain)
    (result,) = found[Path("fine.yaml")]
    assert result.methods == ["prescribed", "pairwise", "tightened"]
    _, rows = recipes.rows_of(found)
    assert [row[2] for row in rows] == ["prescribed", "tightened"]
    for row, m in zip(rows, (0, 2), strict=True):
        assert row[7:] == [f"{100 * value:.2f}" for value in result.certified_accuracy[m]]
    assert rows[1][:2] == ["", ""]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "\0"])
def test_a_damaged_result_is_named(text):
    write("a.yaml")
    path = Path("results/a/seed-0/result.json")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert str(path) in refused("table", "a.yaml")


def test_a_result_that_is_no_text_is_named():
    write("a.yaml")
    path = Path("results/a/seed-0/result.json")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe")
    assert "result.json" in refused("table", "a.yaml")


def test_a_table_of_nothing_is_refused():
    Path("empty").mkdir()
    assert ".yaml" in refused("table", "empty")
    assert "no such file" in refused("table", "gone")
    assert "recipes" in refused("table")


def test_recipes_with_radii_of_their_own_stand_below_them():
    write("r/a.yaml", training={**TRAINING, "radii": [0.1, 0.2]}, paper=PAPER)
    write("r/b.yaml", training={**TRAINING, "radii": [0.3, 0.4, 0.5]})
    for name in ("a", "b"):
        result = run(f"r/{name}.yaml")
        headings, rows = recipes.rows_of(recipes.results_of(f"r/{name}.yaml"))
        assert headings[7:] == [f"{radius:g}" for radius in result.radii]
        assert rows[-1][7:] == [f"{100 * value:.2f}" for value in result.certified_accuracy[0]]
        assert not any("paper" in row[0] for row in rows)  # its numbers are at other radii
    # In one table of both, numbers would stand below the radii of others.
    headings, rows = recipes.rows_of(recipes.results_of("r"))
    assert headings[7:] == ["0.1", "0.2"]
    assert rows[0][2] == "prescribed"
    assert rows[-1] == [f"b (--limit {LIMIT})", rows[0][1], "other radii or methods", "1", *[""] * 5]
    write("r/c.yaml")  # with the default radii, which then are those of the table
    run("r/c.yaml")
    headings, rows = recipes.rows_of(recipes.results_of("r"))
    assert len(headings) == 7 + len(TrainingConfig().radii)
    assert [row[2] for row in rows if row[0][0] in "abc"].count("other radii or methods") == 2


def test_seeds_of_one_recipe_with_other_radii_do_not_break_the_table():
    write("a.yaml")
    run("a.yaml", seed=0)
    run("a.yaml", seed=1, changes={"training.radii": [0.5]})
    result = CliRunner().invoke(cli.app, ["table", "a.yaml"])
    assert result.exit_code == 0, result.exception


def test_seeds_of_one_recipe_with_other_methods_do_not_break_the_table():
    write("a.yaml", method="tightened")
    run("a.yaml", seed=0)
    write("a.yaml", method="prescribed")
    run("a.yaml", seed=1)
    result = CliRunner().invoke(cli.app, ["table", "a.yaml"])
    assert result.exit_code == 0, result.exception


# The commit.


def git(*arguments):
    options = ("-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *options, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_result_says_at_which_commit_its_recipe_was(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    Path("repository").mkdir()
    monkeypatch.chdir("repository")
    write("sub/a.yaml")
    assert run("sub/a.yaml", results="../0").commit == ""
    git("init", "-q")
    assert run("sub/a.yaml", results="../1").commit == ""  # nothing is committed yet
    git("add", "sub")
    git("commit", "-q", "-m", "a")
    head = git("rev-parse", "HEAD")[:12]
    assert run("sub/a.yaml", results="../2").commit == head
    git("tag", "-a", "v1", "-m", "v1")
    assert run("sub/a.yaml", results="../3").commit == head
    with Path("sub/a.yaml").open("a") as file:
        file.write("# changed\n")
    assert run("sub/a.yaml", results="../4").commit == head + "+"


def test_a_finished_recipe_keeps_the_commit_it_was_trained_at(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git("init", "-q")
    write("a.yaml")
    git("add", "a.yaml")
    git("commit", "-q", "-m", "a")
    trained = run("a.yaml")
    git("commit", "-q", "-m", "b", "--allow-empty")
    assert run("a.yaml").commit == trained.commit


def test_a_recipe_that_is_not_in_the_commit_is_not_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git("init", "-q")
    Path("other").write_text("tracked")
    git("add", "other")
    git("commit", "-q", "-m", "a")
    write("a.yaml")
    assert run("a.yaml").commit == git("rev-parse", "HEAD")[:12] + "+"


# Training without a recipe.


@pytest.mark.parametrize("name", demo.architectures())
def test_train_trains_a_new_model_of_every_architecture(name):
    options = ("--limit", 40, "--set", "epochs=1", "--set", "learning_rate=0.01", "--json")
    document = json.loads(command("train", name, "--data", "digits", *options).stdout)
    report = FinetuneReport.model_validate(document)
    folder = Path("runs", name)
    assert report == report_of(folder)
    assert (report.train_samples, report.validation_samples) == (
        36,
        4,
    )  # a tenth is held out, the test set is not touched
    assert report.data == "digits"
    net = lc.load(folder / "net.onnx").double()
    x, labels = digits("train", 40, flat=len(net.input_shape) == 1)
    rows = torch.randperm(40, generator=_generator_of_seed_0())[-4:]
    natural, certified = accuracies(net, report.config.radii, x[rows], labels[rows])
    kept = report.history[report.kept]
    assert natural == kept.natural_accuracy
    assert certified == kept.certified_accuracy
    assert net.lipschitz == pytest.approx(kept.lipschitz, rel=1e-6)
    model = demo.new_model(name, (1, 8, 8), 10, 7).float()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model.double().eval()(x), net(x), rtol=0, atol=1e-4)


def test_train_takes_a_factory_with_arguments():
    given = [f"{name}={value}" for name, value in LINEAR["arguments"].items()]
    options = [o for text in given for o in ("--argument", text)]
    settings = [o for k, v in TRAINING.items() for o in ("--set", f"{k}={v}")]
    command("train", LINEAR["factory"], "--data", "digits", "--limit", LIMIT, *options, *settings, "--out", "here")
    write("base.yaml")
    run("base.yaml")
    assert equal(weights("here"), weights("results/base/seed-0"))  # the same as the recipe that says so


@pytest.mark.parametrize("value", ["1e-1", "1E-1", "1e0", "0.1", "+.5"])
def test_a_number_in_an_argument_is_a_number(value):
    base = [o for text in ("in_features=64", "hidden=12", "out_features=10") for o in ("--argument", text)]
    options = ("--data", "digits", "--limit", 20, "--set", "epochs=1", "--out", "here")
    command("train", MONDEQ["factory"], *base, "--argument", f"m={value}", *options)
    text = f"in_features: 64, hidden: 12, out_features: 10, m: {value}"
    model = f"{{factory: '{MONDEQ['factory']}', arguments: {{{text}}}}}"
    write("a.yaml", f"title: a\ndata: digits\nmodel: {model}\ntraining: {{epochs: 1}}\nmethod: prescribed\n")
    assert recipes.read("a.yaml", Recipe).model.arguments["m"] == float(value)
    assert recipes.built(recipes.read("a.yaml", Recipe).model, 0).m == float(value)


def test_train_finds_a_factory_in_the_current_folder():
    Path("models_of_mine.py").write_text(
        "from lipconvert_plugins.mondeq import MonDEQ\n"
        "def small(hidden=12):\n    print('a factory that talks')\n    return MonDEQ(64, hidden, 10, m=1.0)\n"
    )
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".", str(Path.cwd()))]
    options = ("--data", "digits", "--limit", 20, "--set", "epochs=1", "--json")
    result = command("train", "models_of_mine:small", "--argument", "hidden=14", *options)
    FinetuneReport.model_validate(json.loads(result.stdout))
    assert len(lc.load("runs/small/net.onnx").stages[0].dae().W) == 14
    sys.modules.pop("models_of_mine", None)


def test_what_a_factory_prints_is_not_in_the_document(monkeypatch):
    def chatty():
        print("a factory that talks")
        return new(LINEAR, 0)

    module = types.ModuleType("chatty_models")
    module.chatty = chatty
    monkeypatch.setitem(sys.modules, "chatty_models", module)
    options = ("--data", "digits", "--limit", 20, "--set", "epochs=1", "--json")
    result = command("train", "chatty_models:chatty", *options)
    FinetuneReport.model_validate(json.loads(result.stdout))


def test_train_takes_a_sequential_that_does_not_say_its_shape(monkeypatch):
    module = types.ModuleType("plain_models")
    module.image = lambda: nn.Sequential(nn.Flatten(), lc.PadChannels(70), nn.Linear(70, 10))
    monkeypatch.setitem(sys.modules, "plain_models", module)
    options = ("--data", "digits", "--limit", 20, "--set", "epochs=1")
    command("train", "plain_models:image", *options)
    assert tuple(lc.load("runs/image/net.onnx").input_shape) in ((1, 8, 8), (64,))


def test_arguments_for_a_plugins_name_are_refused():
    options = ("--data", "digits", "--limit", 20, "--set", "epochs=1")
    assert "--argument" in refused("train", "sll", "--argument", "depth=3", *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "sll"), ("--data", "digits")),
        (("train", "slll", "--data", "digits"), ("slll", "sandwich")),
        (("train", "no_module:x", "--data", "digits"), ("no_module",)),
        (("train", "sll", "--data", "digits", "--config", "gone.yaml"), ("gone.yaml",)),
        (("train", "sll", "--data", "digits", "--set", "epsilon=0.1", "--limit", "30"), ("epsilon",)),
        (("train", "sll", "--data", "digits", "--set", "held_out=30", "--limit", "30"), ("held_out",)),
        (("train", "sll", "--data", "digits", "--set", "penalty.weight=1", "--limit", "30"), ("penalty",)),
        (("finetune", "gone.onnx", "--data", "digits"), ("gone.onnx",)),
        (("finetune", "sll", "--data", "digits"), ("sll",)),
        (("train", "sll", "--data", "digits", "--limit", "30", "--out", "file"), ("file",)),
    ],
)
def test_bad_input_of_the_commands_is_said_on_stderr(arguments, words):
    Path("file").write_text("in the way")
    message = refused(*arguments)
    assert all(word in message for word in words), message


def test_config_is_a_yaml_file_and_set_goes_before_it():
    Path("training.yml").write_text(yaml.safe_dump({**TRAINING, "seed": 5, "loss": {"offset": 0.5}}))
    how = ("--config", "training.yml", "--set", "loss.temperature=0.5", "--seed", 6, "--limit", LIMIT)
    command("train", "mondeq", "--data", "digits", *how, "--out", "a")
    config = report_of("a").config
    expected = TrainingConfig.model_validate({**TRAINING, "seed": 6, "loss": {"offset": 0.5, "temperature": 0.5}})
    assert config == expected
    assert (report_of("a").train_samples, report_of("a").validation_samples) == (60, 30)
    command("finetune", "a/net.onnx", "--data", "digits", *how, "--out", "b")
    assert report_of("b").config == expected
    Path("training.yml").write_text(yaml.safe_dump({"title": "a recipe", "data": "digits", "training": {}}))
    assert "unknown" in refused("train", "mondeq", "--data", "digits", "--config", "training.yml")


# Fine-tuning without a recipe.

SHORT = ("--data", "digits", "--limit", LIMIT, "--set", "epochs=1", "--set", "held_out=30", "--set", "keep=last")


def test_finetune_takes_a_checkpoint_as_it_is():
    net = lc.convert(new(LINEAR, 0), epsilon=0.01)
    lc.save(net, "net.onnx")
    before = weights(".")
    document = json.loads(command("finetune", "net.onnx", *SHORT, "--json").stdout)
    report = FinetuneReport.model_validate(document)
    assert equal(weights("."), before)  # the file itself stays
    assert not equal(weights("runs/finetuned"), before)
    x, labels = digits("train")
    rows = torch.randperm(LIMIT, generator=_generator_of_seed_0())[-30:]
    for record, network in (
        (report.history[0], net),
        (report.history[-1], lc.load("runs/finetuned/net.onnx").double()),
    ):
        natural, certified = accuracies(network, report.config.radii, x[rows], labels[rows])
        assert natural == pytest.approx(record.natural_accuracy, abs=0.034)  # the start in float32: one sample of 30
        assert certified == pytest.approx(record.certified_accuracy, abs=0.034)
    assert "checkpoint" in refused("finetune", "net.onnx", *SHORT, "--epsilon", "0.1")
    assert lc.verify("runs/finetuned/net.onnx").passed


def test_finetune_converts_a_source_model_with_its_weights(monkeypatch):
    model = new(LINEAR, 4)
    torch.save(model.state_dict(), "weights.pt")
    module = types.ModuleType("linear_models")
    module.other = lambda: new(LINEAR, 5)
    monkeypatch.setitem(sys.modules, "linear_models", module)
    how = ("linear_models:other", "--weights", "weights.pt", "--epsilon", 0.01)
    command("finetune", *how, *SHORT, "--out", "a")
    lc.save(lc.convert(model, epsilon=0.01), "net.onnx")
    command("finetune", "net.onnx", *SHORT, "--out", "b")
    assert equal(weights("a"), weights("b"))
    # The weights file alone says the same, with m and the constant by name.
    command("finetune", "linear_models:other", *SHORT, "--out", "c")
    assert not equal(weights("a"), weights("c"))


def test_a_second_run_in_the_folder_of_another_is_refused_with_the_entry_that_differs():
    options = ("--data", "digits", "--limit", 40, "--out", "a", "--set", "epochs=1")
    command("train", "mondeq", *options)
    before = weights("a")
    message = refused("train", "mondeq", *options, "--set", "loss.offset=0.25")
    assert "loss" in message
    assert "0.25" in message
    message = refused("train", "sll", *options)
    assert "start" in message
    assert equal(weights("a"), before)
    command("train", "mondeq", *options)  # the same one is finished
    assert equal(weights("a"), before)


@pytest.mark.parametrize("how", [("train", "mondeq"), ("finetune", "net.onnx")])
def test_without_tensorboard_its_events_are_refused_with_what_to_install(how, monkeypatch):
    from lightning.fabric.loggers import tensorboard

    lc.save(lc.convert(new(LINEAR, 0)), "net.onnx")
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    message = refused(*how, *SHORT, "--tensorboard")
    assert "lipconvert[tensorboard]" in message


def test_a_run_without_json_prints_a_table_and_where_it_is():
    result = command("train", "mondeq", *SHORT, "--out", "a")
    report = report_of("a")
    assert "wrote a: model.pt, net.onnx, report.json, metrics.csv, curves.png" in result.stdout
    assert f"{100 * report.history[1].natural_accuracy:.2f}" in result.stdout
    assert [line.partition(",")[0] for line in result.stderr.splitlines()] == ["a: epoch 0", "a: epoch 1"]


@pytest.mark.parametrize(
    "how", [("train", "base.yaml"), ("finetune", "fine.yaml"), ("train", "mondeq", "--data", "digits")]
)
def test_json_is_one_document_and_nothing_else(how):
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    result = command(*how, "--limit", 40, "--set", "epochs=1", "--json")
    kind = FinetuneReport if "mondeq" in how else RecipeResult
    document = kind.model_validate(json.loads(result.stdout))
    assert result.stderr == ""
    where = {"base.yaml": "results/base/seed-0/result.json", "fine.yaml": "results/fine/seed-0/result.json"}
    path = where.get(how[1], "runs/mondeq/report.json")
    assert kind.model_validate_json(Path(path).read_text()) == document


# What is of a recipe as it was.


def test_what_starts_from_a_recipe_that_has_changed_is_not_taken_for_its_result():
    write("base.yaml", model=MONDEQ)
    write("mid.yaml", start="base.yaml")
    write("top.yaml", start="mid.yaml")
    result = run("top.yaml")
    assert [start.title for start in result.starts] == ["mid.yaml", "base.yaml"]
    assert run("top.yaml") == result
    write("base.yaml", model=MONDEQ, training={**TRAINING, "learning_rate": 0.02})
    for name in ("mid", "top"):
        with pytest.raises(InvalidParameterError, match=r"made with another (training|recipe to start from)"):
            run(f"{name}.yaml")
    shown = command("table", "top.yaml").stdout
    assert "another recipe" in shown
    assert f"{100 * result.certified_accuracy[0][0]:.2f}" not in shown


def test_the_table_does_not_average_over_several_recipes():
    write("a.yaml")
    run("a.yaml", seed=0)
    write("a.yaml", training={**TRAINING, "epochs": 2})
    new = run("a.yaml", seed=1)
    _, rows = recipes.rows_of(recipes.results_of("a.yaml"), recipes.stale)
    assert [row[2:5] for row in rows] == [["another recipe", "1", ""], ["prescribed", "1", "2"]]
    assert rows[1][6] == f"{100 * new.natural_accuracy:.2f}"


def test_a_part_of_the_samples_has_a_row_of_its_own():
    write("a.yaml")
    for seed, limit in ((0, LIMIT), (1, LIMIT - 10)):
        recipes.run("a.yaml", Told(limit=limit).order, seed=seed)
    _, rows = recipes.rows_of(recipes.results_of("a.yaml"))
    assert [row[0] for row in rows] == [f"a (--limit {LIMIT})", f"a (--limit {LIMIT - 10})"]


def test_other_words_are_written_without_doing_anything_again():
    write("base.yaml", model=MONDEQ)
    write("fine.yaml", start="base.yaml")
    before = run("fine.yaml")
    write("base.yaml", model=MONDEQ, title="better", paper=PAPER)
    again = Told()
    after = recipes.run("fine.yaml", again.order)
    assert again.done == []
    assert after.starts[0].title == "better"
    assert after.certified_accuracy == before.certified_accuracy
    assert recipes.results_of("fine.yaml")[Path("fine.yaml")] == [after]


def test_another_method_certifies_again_without_training():
    write("a.yaml", model=MONDEQ)
    run("a.yaml")
    write("a.yaml", model=MONDEQ, method="tightened")
    again = Told()
    assert recipes.run("a.yaml", again.order).methods[-1] == "tightened"
    assert again.trained == {}


def test_how_to_convert_belongs_to_the_recipe_that_converts():
    write("base.yaml", model=MONDEQ)
    write("mid.yaml", start="base.yaml", convert={"epsilon": 0.01})
    write("top.yaml", start="mid.yaml", convert={"epsilon": 0.01})
    with pytest.raises(InvalidParameterError, match=r"convert of top\.yaml.*mid\.yaml ends with a converted network"):
        run("top.yaml")
    assert not Path("results").exists()


def test_processes_start_once_for_a_chain():
    write("base.yaml", model=MONDEQ, training={**TRAINING, "devices": 2})
    write("fine.yaml", start="base.yaml")
    with pytest.raises(InvalidParameterError, match=r"training\.devices of base\.yaml is 2.*run base\.yaml by itself"):
        run("fine.yaml")


@pytest.mark.parametrize("text", ["title: a\ntitle: b\n", "training:\n  epochs: 1\n  epochs: 2\n"])
def test_a_name_that_stands_twice_is_refused(text):
    write("a.yaml", text)
    name = "epochs" if "epochs" in text else "title"
    assert f"'{name}' stands here twice" in " ".join(refused("train", "a.yaml").split())


def test_seeds_on_other_data_stand_in_a_row_of_their_own(digits_in_files):
    path = write("a.yaml")
    results = [run("a.yaml", seed=seed) for seed in (0, 1)]
    other = run("a.yaml", seed=2, source=digits_in_files[1], limit=50)
    other = other.model_copy(update={"limit": LIMIT})
    _, rows = recipes.rows_of({path: [results[0], other, results[1]]}, recipes.stale)
    assert [(row[1], row[3]) for row in rows] == [("digits", "2"), (digits_in_files[1], "1")]
    assert rows[1][6] == f"{100 * other.natural_accuracy:.2f}"


def test_a_limit_takes_all_classes_of_a_folder_that_is_sorted_by_them(digits_in_files):
    everything = data.load(digits_in_files[0], "train")
    assert bool((everything.labels.diff() >= 0).all())
    some = recipes.Order(limit=20).data(digits_in_files[0], "train")
    assert (len(some), set(some.labels.tolist())) == (20, set(range(10)))


def test_test_images_of_other_channels_are_refused_before_anything_is_trained(tmp_path):
    for split, colour in (("train", 4), ("test", (4, 5, 6))):
        for label in range(10):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for k in range(9):
                Image.new("L" if split == "train" else "RGB", (8, 8), colour).save(
                    tmp_path / split / str(label) / f"{k}.png"
                )
    write("a.yaml", data=f"folder:{tmp_path}")
    assert "a sample of the test data" in refused("train", "a.yaml", "--limit", LIMIT)
    assert not Path("results").exists()


def test_source_weights_that_were_removed_are_made_again():
    write("base.yaml")
    write("fine.yaml", start="base.yaml")
    run("base.yaml")
    Path("results/base/seed-0/model.pt").unlink()
    run("fine.yaml")
    assert Path("results/base/seed-0/model.pt").is_file()


@pytest.mark.parametrize(("asked", "held"), [(0, 0), (7, 7), (None, 9)])
def test_a_tenth_is_held_out_unless_it_is_said_how_many(asked, held):
    settings = [] if asked is None else ["--set", f"held_out={asked}"]
    document = json.loads(
        command("train", "sll", "--data", "digits", "--limit", LIMIT, "--set", "epochs=1", *settings, "--json").stdout
    )
    report = FinetuneReport.model_validate(document)
    assert (report.train_samples, report.validation_samples) == (LIMIT - held, held)


def test_a_damaged_result_is_to_be_removed():
    write("a.yaml")
    run("a.yaml")
    Path("results/a/seed-0/result.json").write_text("{}")
    assert "remove it, and run its recipe again" in " ".join(refused("train", "a.yaml").split())


def test_patience_without_validation_is_refused_before_anything_is_trained():
    write("base.yaml", model=MONDEQ)
    write("fine.yaml", start="base.yaml", training={"epochs": 1, "patience": 2})
    assert "training.held_out" in refused("finetune", "fine.yaml")
    assert not Path("results").exists()


def test_a_network_is_not_replaced_by_what_is_trained_of_it():
    command("train", "lben", "--data", "digits", "--set", "epochs=1", "--limit", LIMIT, "--out", "a")
    Path("a/state.pt").unlink()
    before = Path("a/net.onnx").read_bytes()
    message = refused("finetune", "a/net.onnx", "--data", "digits", "--limit", LIMIT, "--out", "a")
    assert "take the place of MODEL" in " ".join(message.split())
    assert Path("a/net.onnx").read_bytes() == before
