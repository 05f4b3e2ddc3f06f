"""The command line: ``lipconvert plugins | demo | convert | validate | train | finetune | table | certify | ...``.

Exit codes: 0 done; 1 the claim does not hold (`EquivalenceError`, a failed validation or verification); 2 bad input (any
other `LipconvertError`, or a file that cannot be read or written); 130 interrupted. Results go to stdout, progress and
errors to stderr. With ``--json`` stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.table import box as frames
from rich.text import Text
from torch import Tensor, nn
from typer.core import TyperGroup

from . import data
from .attacks.attack import METHODS as ATTACKS
from .certification.bounds import lipschitz_bound
from .certification.certify import CLIMB, CLIMBERS, Certifier
from .certification.certify import certify as certify_network
from .certification.documents import AttackConfig, RobustnessReport, StageProof
from .certification.empirical import empirical_lipschitz
from .checkpoints import checkpoint, container
from .checkpoints.verify import verify as verify_checkpoint
from .conversion.convert import convert as convert_model
from .conversion.documents import ConversionReport, ValidationReport
from .conversion.validate import validate as validate_network
from .errors import (
    CheckpointError,
    EquivalenceError,
    InvalidParameterError,
    LipconvertError,
    ModelError,
    UnreadableError,
    WeightsError,
)
from .escaping import paragraph, printable
from .experiments import demo, recipes
from .experiments.documents import ModelConfig
from .foundation.arguments import radii_of
from .foundation.documents import json_text
from .foundation.factory import build
from .foundation.files import whole
from .foundation.shards import place, processes
from .interop import interchange
from .networks.documents import GraphEntry, NetworkInfo
from .networks.network import Network
from .plugin_api.documents import PluginList, PluginRecord
from .plugin_api.registry import plugins as registered
from .plugin_api.weights import from_state_dict, read_weights
from .reports.plotting import radius_name
from .reports.report import require_page
from .reports.report import write as write_report
from .training.documents import EpochRecord, FinetuneReport, TrainingConfig
from .training.finetune import CURVES, METRICS, REPORT, input_shape_of
from .training.finetune import finetune as finetune_network
from .training.finetune import train as train_network


class _Commands(TyperGroup):
    """The commands, on streams that take any text; errors of usage, which quote arguments, are fit for a terminal."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(
                    errors="backslashreplace"
                )  # ASCII has no √, and a name of undecodable bytes no UTF-8
        with _printable_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage():
            return super().invoke(ctx)


# The base of all errors in how a command is called: typer has no name of its own for it.
_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = paragraph(error.message)
        raise


app = typer.Typer(
    name="lipconvert",
    cls=_Commands,
    help="Bring any 1-Lipschitz or equilibrium network into one form (LBEN), keep its Lipschitz constant, certify it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODEL_HELP = "package.module:factory, or a weights file that a plugin recognises"
MODEL_OR_CHECKPOINT_HELP = MODEL_HELP + ", or a checkpoint written by convert"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
PIPE_WIDTH = 120  # columns where there is no terminal to ask

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOrCheckpoint = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_OR_CHECKPOINT_HELP)]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="state dict to load into what the factory returns (strict)")
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="what a weights file does not say, e.g. m=1.0; repeatable"),
]
PluginOption = Annotated[str | None, typer.Option("--plugin", help="who has the first word where two plugins claim")]
ShapeOption = Annotated[
    str | None, typer.Option("--input-shape", metavar="1,28,28", help="of one sample, where the model does not say it")
]
EpsilonOption = Annotated[float, typer.Option("--epsilon", help="epsilon of every stage; 0 is exact")]
DeltaOption = Annotated[float, typer.Option("--delta", help="state each stage's constant at L(1 + delta)")]
MergeOption = Annotated[bool, typer.Option("--merge", help="join neighbouring stages, and the glue beside them")]
DenseOption = Annotated[
    bool, typer.Option("--dense", help="state layers on images densely, on flattened ones: any padding, small images")
]
MethodOption = Annotated[
    str, typer.Option("--method", help="prescribed, pairwise or tightened; weaker ones are reported too")
]
SecondsOption = Annotated[
    float | None, typer.Option("--seconds", help="for the search of multipliers; what is found by then is proved")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float64 or float32, of the converted network")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")]


P = ParamSpec("P")


def _answers(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one line on stderr and the exit code of the module's docstring."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except EquivalenceError as error:
            raise _exit(error, 1) from None
        except (LipconvertError, OSError) as error:
            raise _exit(error, 2) from None
        except KeyboardInterrupt:
            raise _exit("interrupted", 130) from None

    return wrapped


def _exit(reason: object, code: int) -> typer.Exit:
    typer.echo(f"error: {paragraph(str(reason))}", err=True)
    return typer.Exit(code)


def _console(*, stderr: bool = False) -> Console:
    # Made when used: the streams may have been replaced since import. Without a terminal nothing is folded at 80.
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PIPE_WIDTH)


def _print_json(document: Any) -> None:
    typer.echo(json_text(document, indent=2))


def _say(console: Console, *lines: str, style: str = "") -> None:
    """Text as it is, each line of it on one of its own however long it is: nothing is markup, and nothing moves a cursor."""
    for line in lines:
        console.print(Text(printable(line), style), soft_wrap=True)


def _row(table: Table, *cells: str) -> None:
    """A row of cells of such text."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


class _Description(TextColumn):
    """What a bar is about, in which names of folders and plugins stand."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description))


@contextmanager
def _progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Bars on stderr; nothing where stderr is no terminal."""
    console = _console(stderr=True)
    columns = (
        SpinnerColumn("line" if console.options.ascii_only else "dots"),
        _Description(""),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bars:
        yield bars


def _numbers(text: str, where: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise InvalidParameterError(where, repr(text), "it must be numbers separated by commas") from None


def _fraction(text: str) -> float:
    """``0.5`` or ``36/255``."""
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = tuple(_numbers(text, "--input-shape", int))
    if any(size < 1 for size in sizes):
        raise InvalidParameterError("--input-shape", repr(text), "every size must be at least 1")
    return sizes


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InvalidParameterError("--dtype", repr(name), f"it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _options(given: Sequence[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InvalidParameterError("--option", repr(text), "it must read NAME=VALUE, such as m=1.0")
        options[name.strip()] = _value(value.strip())
    return options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _model(spec: str, weights: Path | None, given: Sequence[str] | None, plugin: str | None) -> nn.Module:
    """The model a command line names. What the user's own code prints goes to stderr."""
    options = _options(given)
    if Path(spec).is_file():
        if weights is not None:
            raise ModelError(spec, "it is a weights file already; --weights goes with package.module:factory")
        if _is_checkpoint(Path(spec)):
            raise ModelError(spec, "it is a network lipconvert has converted already; a source model is needed here")
        return from_state_dict(read_weights(spec), options, plugin, spec)
    if Path(spec).is_dir():
        raise ModelError(spec, f"it is a folder; the network in it is meant, such as {Path(spec) / recipes.NETWORK}")
    if ":" not in spec:
        raise ModelError(spec, "there is no such file, and it does not read package.module:factory")
    if options:
        raise ModelError(spec, "--option goes with a weights file; a factory takes no arguments")
    model = build(spec)
    if weights is not None:
        _fill(model, read_weights(weights), str(weights))
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Any], path: str) -> None:
    """``load_state_dict``, strict, with an error that names the tensor."""
    state = model.state_dict()
    wanted = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key in sorted(wanted.keys() - tensors.keys()):
        raise WeightsError(path, f"tensor {key!r} is missing; {type(model).__name__} needs it")
    for key in sorted(tensors.keys() - state.keys()):
        raise WeightsError(path, f"tensor {key!r} is not one of {type(model).__name__}'s")
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            raise WeightsError(
                path,
                f"tensor {key!r} has shape {tuple(tensors[key].shape)}, "
                f"{type(model).__name__} needs {tuple(value.shape)}",
            )
    # In the precision of the file: a float64 file must not be rounded to a float32 factory's dtype.
    wide = next((tensors[key].dtype for key in wanted if tensors[key].dtype is torch.float64), None)
    if wide is not None:
        model.to(wide)
    # Every tensor has been compared, so what may be missing is extra state, which a safetensors file does not hold.
    model.load_state_dict(dict(tensors), strict=False)


def _is_checkpoint(path: Path) -> bool:
    if path.suffix == container.GRAPH:
        return True
    if path.suffix != container.DATA:
        return False
    try:
        return container.KEY in container.Header.read(path).metadata
    except CheckpointError:
        return False


@dataclass(frozen=True)
class _Conversion:
    """What the common options ask for."""

    shape: tuple[int, ...] | None = None
    epsilon: float = 0.0
    delta: float = 0.0
    dtype: torch.dtype = torch.float64
    plugin: str | None = None
    merge: bool = False
    dense: bool = False

    def convert(self, model: nn.Module) -> Network:
        """Converted and cast, not yet compared with its source."""
        how = {"delta": self.delta, "plugin": self.plugin, "merge": self.merge, "dense": self.dense}
        return convert_model(model, self.shape, self.epsilon, **how, check=False).to(self.dtype)

    def validate(self, model: nn.Module, net: Network, *, made_here: bool = True) -> ValidationReport:
        """Against its source; a network from a file says itself at which L(1 + delta) it was made, unless --delta does."""
        delta = self.delta if made_here else self.delta or None
        how = {"plugin": self.plugin, "merge": self.merge, "dense": self.dense}
        return validate_network(model, net, delta=delta, **how, throw=False)


def _asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a conversion; it receives them as ``asked``."""

    def wrapped(
        *args: Any,
        plugin: PluginOption = None,
        input_shape: ShapeOption = None,
        epsilon: EpsilonOption = 0.0,
        delta: DeltaOption = 0.0,
        merge: MergeOption = False,
        dense: DenseOption = False,
        dtype: DtypeOption = "float64",
        **kwargs: Any,
    ) -> None:
        asked = _Conversion(_shape(input_shape), epsilon, delta, _dtype(dtype), plugin, merge, dense)
        command(*args, asked=asked, **kwargs)

    # What typer reads: the command's own parameters, then these, the types resolved.
    own = inspect.signature(command, eval_str=True).parameters
    added = inspect.signature(wrapped, eval_str=True).parameters
    keep = [p for name, p in own.items() if name != "asked"]
    keep += [p for p in added.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in keep]
    functools.update_wrapper(wrapped, command)
    vars(wrapped).pop("__wrapped__")
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _step_table(info: NetworkInfo) -> Table:
    table = Table(box=frames.SIMPLE_HEAD)
    for heading in ("step", "in", "states", "out", "activations", "epsilon", "L", "parameters"):
        left = heading in ("step", "activations")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for step in info.steps:
        _row(
            table,
            step.name,
            *(
                "" if size is None else "x".join(map(str, (size, *step.image)))
                for size in (step.inputs, step.states, step.outputs)
            ),
            step.activations if step.kind == "lben" else "(kept as it is)",
            "" if step.epsilon is None else f"{step.epsilon:g}",
            f"{step.lipschitz:.7g}",
            str(step.parameters),
        )
    return table


def _print_network(console: Console, info: NetworkInfo) -> None:
    console.print(_step_table(info))
    shape = ", ".join(map(str, info.input_shape))
    _say(console, f"L = {info.lipschitz:.7g}, input ({shape}), {info.parameters} parameters in {info.dtype}")


def _print_validation(console: Console, report: ValidationReport) -> None:
    table = Table(box=frames.SIMPLE_HEAD)
    for heading, justify in (("check", "left"), ("where", "left"), ("value", "right"), ("", "left"), ("bound", "left")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("")
    for check in report.checks:
        _row(
            table,
            check.name,
            check.where,
            "not finite" if check.value is None else f"{check.value:.3e}",
            check.relation,
            f"{check.bound:.7g}",
            "ok" if check.passed else "FAILED",
        )
    console.print(table)
    verdict = "passed" if report.passed else "FAILED"
    methods = ", ".join(report.methods) or "none"
    _say(
        console,
        f"validation {verdict}: {report.model}, {report.samples} samples, {report.dtype}, solver {methods}",
    )


def _require_passed(report: ValidationReport) -> None:
    if not report.passed:
        raise EquivalenceError(report, report.failures())


def _version(value: bool) -> None:
    if value:
        typer.echo(version("lipconvert"))
        raise typer.Exit


@app.callback()
def _main(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    del show


@app.command()
@_answers
def plugins(as_json: JsonOption = False) -> None:
    """List the registered plugins, where they come from, and those that failed to load."""
    records = [
        PluginRecord(
            name=plugin.name,
            distribution=plugin.distribution,
            version=plugin.version,
            module=plugin.module,
            hooks=list(plugin.hooks),
            paper=plugin.info.paper if plugin.info else "",
            lipschitz=plugin.info.lipschitz if plugin.info else "",
            covers=plugin.info.covers if plugin.info else "",
            error=plugin.error,
        )
        for plugin in registered()
    ]
    if as_json:
        _print_json(PluginList(plugins=records).model_dump(mode="json"))
        return
    console = _console()
    table = Table(box=frames.SIMPLE_HEAD)
    for heading in ("plugin", "from", "L", "covers", "paper"):
        table.add_column(heading, overflow="fold")
    for record in records:
        if record.error is None:
            cells = (
                record.name,
                f"{record.distribution} {record.version}",
                record.lipschitz,
                record.covers,
                record.paper,
            )
            _row(table, *cells)
    console.print(table)
    for record in records:
        if record.error is not None:
            source = f"{record.distribution} {record.version}".strip()
            _say(console, f"not loaded: {record.name} ({source}): {record.error}")


@app.command()
@_answers
@_asks
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="checkpoint to write, NAME.onnx or NAME.safetensors")],
    weights: WeightsOption = None,
    option: OptionOption = None,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Convert a model, compare it with its source, and write it only if it is the same function."""
    if out.suffix not in (container.GRAPH, container.DATA):
        raise CheckpointError(str(out), "path", f"the suffix must be {container.GRAPH} or {container.DATA}")
    source = _model(model, weights, option, asked.plugin)
    with _progress() as bars:
        bars.add_task("converting", total=None)
        net = asked.convert(source)
        report = asked.validate(source, net)
    if report.passed:
        checkpoint.save(net, out)
    info = net.info()
    if as_json:
        done = ConversionReport(out=str(out) if report.passed else None, network=info, validation=report)
        _print_json(done.model_dump(mode="json"))
    else:
        console = _console()
        _print_network(console, info)
        _print_validation(console, report)
    _require_passed(report)
    if not as_json:
        _say(_console(), f"wrote {out}")


@app.command()
@_answers
@_asks
def validate(
    model: ModelArgument,
    net: Annotated[
        Path | None, typer.Option("--net", help="a checkpoint of this model; without it the model is converted first")
    ] = None,
    weights: WeightsOption = None,
    option: OptionOption = None,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Compare a model with its converted form: outputs, gradients, W, H, L. Exit code 1 if they differ."""
    source = _model(model, weights, option, asked.plugin)
    with _progress() as bars:
        bars.add_task("validating", total=None)
        network = asked.convert(source) if net is None else checkpoint.load(net)
        report = asked.validate(source, network, made_here=net is None)
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        _print_validation(_console(), report)
    _require_passed(report)


@app.command()
@_answers
@_asks
def certify(
    model: ModelOrCheckpoint,
    data_name: Annotated[str, typer.Option("--data", help=" | ".join(data.NAMES))],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="where the files of the torchvision sets are")] = Path(
        "data"
    ),
    split: Annotated[str, typer.Option("--split", help="train or test")] = "test",
    radii: Annotated[
        str, typer.Option("--radii", help="l2 radii, pixels in [0, 1], separated by commas; fractions are read")
    ] = "36/255,72/255,108/255,1",
    method: MethodOption = "tightened",
    limit: Annotated[int | None, typer.Option("--limit", help="only the first N samples")] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="OUT.html", help="write a page with figures, table and proofs")
    ] = None,
    attack: Annotated[
        str | None, typer.Option("--attack", help="pgd, apgd or ensemble: an upper bound beside the certificate")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help=f"of the attack, by default {AttackConfig().steps}")
    ] = None,
    restarts: Annotated[
        int | None, typer.Option("--restarts", help=f"of the attack, by default {AttackConfig().restarts}")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", metavar="0,1", help="the attack keeps pixels inside; else the whole l2 ball")
    ] = None,
    attack_samples: Annotated[int | None, typer.Option("--attack-samples", help="attack only the first N")] = None,
    seconds: SecondsOption = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="keep finished shards there, and go on from them")
    ] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", help="samples after which --resume can go on")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", help="samples evaluated at once")] = 256,
    weights: WeightsOption = None,
    option: OptionOption = None,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Natural and certified accuracy on a data set, proved for the floats that run. Under torchrun on several processes."""
    wanted = radii_of(_numbers(radii, "--radii", _fraction))
    config = _attack(attack, steps, restarts, box, attack_samples)
    if report_file is not None:
        require_page(report_file)  # before hours are spent
    images = data.load(data_name, split, data_dir)
    with processes() as (rank, _):
        net = _network(model, weights, option, asked)
        with _progress(quiet=rank > 0) as bars:
            samples = data.Shaped(images, net.input_shape, limit)
            report = certify_network(
                net,
                samples,
                wanted,
                method,
                batch_size=batch_size,
                attack=config,
                seconds=seconds,
                folder=resume,
                shard_size=shard_size,
                seen=_shown(bars),
                model=model,
                name=f"{data_name}, {split}",
            )
        if rank > 0:
            return
        if as_json:
            _print_json(report.model_dump(mode="json"))
        else:
            _print_robustness(_console(), report)
        if report_file is not None:  # last: what cannot be written must not take the numbers with it
            write_report(report, report_file)


@app.command()
@_answers
@_asks
def tighten(
    model: ModelOrCheckpoint,
    method: Annotated[
        str, typer.Option("--method", help="prescribed, pairwise, tightened, or sdp (small dense networks)")
    ] = "tightened",
    seconds: SecondsOption = None,
    weights: WeightsOption = None,
    option: OptionOption = None,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """The best Lipschitz constants that can be proved for a network: of its output, and of every difference of two logits."""
    net = _network(model, weights, option, asked)
    with _progress() as bars:
        bound = lipschitz_bound(net, method, seconds=seconds, seen=_shown(bars))
        bars.add_task("an empirical Lipschitz constant", total=None)
        start = torch.rand(CLIMBERS, *net.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        report = bound.report(net, empirical_lipschitz(net, start, steps=CLIMB))
    if as_json:
        _print_json(report.model_dump(mode="json"))
        return
    console = _console()
    _say(
        console,
        f"L prescribed {report.prescribed:.7g}, proved {report.lipschitz:.7g} ({report.method}), "
        f"met by a search: {report.empirical:.7g}",
    )
    if report.pairs:
        constants = [pair.lipschitz for pair in report.pairs]
        least, mean, most = min(constants), sum(constants) / len(constants), max(constants)
        _say(
            console,
            f"differences of two logits: {least:.6g} to {most:.6g}, mean {mean:.6g}; "
            f"√2·L prescribed: {2**0.5 * report.prescribed:.6g}",
        )
    _print_stages(console, report.stages)


def _attack(
    method: str | None, steps: int | None, restarts: int | None, box: str | None, samples: int | None
) -> AttackConfig | None:
    bounds = None if box is None else tuple(_numbers(box, "--box", _fraction))
    given = {"method": method, "steps": steps, "restarts": restarts, "box": bounds, "samples": samples}
    given = {name: value for name, value in given.items() if value is not None}
    if method is None:
        for name in given:
            raise InvalidParameterError(_OF_THE_ATTACK[name], "given", "it says how to attack: --attack pgd is missing")
        return None
    try:
        return AttackConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        needed = {
            "method": f"it must be one of {', '.join(ATTACKS)}",
            "box": "it must be two numbers, the least and the largest pixel, the smaller first",
        }
        value = box if name == "box" else given[name]
        raise InvalidParameterError(_OF_THE_ATTACK[name], value, needed.get(name, "it must be at least 1")) from None


_OF_THE_ATTACK = {
    "method": "--attack",
    "steps": "--steps",
    "restarts": "--restarts",
    "box": "--box",
    "samples": "--attack-samples",
}


def _shown(bars: Progress) -> Callable[[str, int, int | None], None]:
    """One bar for each thing that is being done, in turn."""
    tasks: dict[str, Any] = {}

    def seen(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            for task in tasks.values():
                bars.remove_task(task)
            tasks.clear()
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return seen


def _network(model: str, weights: Path | None, option: Sequence[str] | None, asked: _Conversion) -> Network:
    """A checkpoint as it is, or a model converted and validated; raises `EquivalenceError`."""
    path = Path(model)
    if path.is_file() and _is_checkpoint(path):
        if weights is not None or option or asked != _Conversion():
            raise ModelError(
                model,
                "it is a checkpoint, taken as it is: --weights, --option and what belongs to converting do not go with it",
            )
        return checkpoint.load(path)
    source = _model(model, weights, option, asked.plugin)
    net = asked.convert(source)
    _require_passed(asked.validate(source, net))
    return net


def _print_robustness(console: Console, report: RobustnessReport) -> None:
    _say(console, f"{report.data}: {report.samples} samples, {report.dtype}")
    empirical = "" if report.empirical_lipschitz is None else f", met by a search: {report.empirical_lipschitz:.7g}"
    inflated = f" (at L(1 + {report.delta:g}))" if report.delta else ""
    _say(console, f"L prescribed {report.lipschitz:.7g}{inflated}, proved {report.proved_lipschitz:.7g}{empirical}")
    table = Table(box=frames.SIMPLE_HEAD, title="certified accuracy (%)", title_justify="left")
    table.add_column("radius", justify="right")
    for result in report.methods:
        table.add_column(result.method, justify="right")
    attack = report.attack
    if attack is not None:
        table.add_column(f"{attack.method}-{attack.steps}", justify="right")
        table.add_column("gap closed", justify="right")
    natural = f"{100 * report.natural_accuracy:.2f}"
    _row(table, "natural", *[natural] * len(report.methods))
    for k, radius in enumerate(report.radii):
        row = [f"{radius:.4f}", *(f"{100 * result.certified_accuracy[k]:.2f}" for result in report.methods)]
        if attack is not None:
            closed = attack.gap_closed[k]
            row += [f"{100 * attack.attacked_accuracy[k]:.2f}", "" if closed is None else f"{100 * closed:.0f} %"]
        _row(table, *row)
    console.print(table)
    if attack is not None and attack.samples < report.samples:
        _say(console, f"the attack saw the first {attack.samples} samples")
    if report.unconverged:
        _say(console, f"{report.unconverged} samples did not converge and count as not certified")
    _say(console, f"largest error bound of a logit difference that was subtracted: {report.worst_error:.1e}")


def _print_stages(console: Console, stages: Sequence[StageProof]) -> None:
    table = Table(box=frames.SIMPLE_HEAD)
    table.add_column("step")
    for heading in ("states", "L", "proved at", "delta", "mu", "rounding of H"):
        table.add_column(heading, justify="right")
    for stage in stages:
        _row(
            table,
            stage.name,
            "" if stage.states is None else str(stage.states),
            f"{stage.prescribed:.7g}",
            "-" if stage.proved is None else f"{stage.proved:.7g}",
            "" if stage.delta is None else f"{stage.delta:g}",
            "" if stage.mu is None else f"{stage.mu:.2e}",
            "" if stage.rounding is None else f"{stage.rounding:.1e}",
        )
    console.print(table)


@app.command()
@_answers
@_asks
def info(
    model: ModelOrCheckpoint,
    weights: WeightsOption = None,
    option: OptionOption = None,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Steps, sizes, activations, constants, certificate and provenance of a checkpoint, or of what a model would become."""
    path = Path(model)
    stored = path.is_file() and _is_checkpoint(path) and weights is None and not option and asked == _Conversion()
    found = checkpoint.info(path) if stored else _network(model, weights, option, asked).info()
    if as_json:
        _print_json(found.model_dump(mode="json"))
        return
    console = _console()
    _print_network(console, found)
    if stored:
        _print_certificate(console, found)


def _print_certificate(console: Console, found: NetworkInfo) -> None:
    table = Table(box=frames.SIMPLE_HEAD)
    table.add_column("stage")
    for heading in ("proved L", "delta", "mu"):
        table.add_column(heading, justify="right")
    table.add_column("graph")
    for step in found.steps:
        if step.kind == "lben":
            proof = step.certificate
            cells = (
                ("-", "", "") if proof is None else (f"{proof.lipschitz:.7g}", f"{proof.delta:g}", f"{proof.mu:.3g}")
            )
            _row(table, step.name, *cells, "-" if step.graph is None else _written(step.graph))
    console.print(table)
    if found.bound is not None:
        pairs = "" if found.pairs is None else f"; of logit differences {found.pairs[0]:.5g} to {found.pairs[1]:.5g}"
        _say(console, f"proved by {found.bound.method}: L = {found.bound.lipschitz:.7g}{pairs}")
    if found.class_names:
        _say(console, f"classes: {', '.join(found.class_names)}")
    if (source := found.provenance) is not None:
        plugins = ", ".join(f"{p.name} ({p.distribution} {p.version})" for p in source.plugins) or "no plugin"
        versions = ", ".join(f"{name} {number}" for name, number in source.versions.items())
        _say(console, f"from {source.model}, {plugins}; {versions}; SHA-256 {source.sha256[:16]}")
    if (training := found.training) is not None:
        said = [training.data, "" if training.epochs is None else f"{training.epochs} epochs"]
        said += [f"{name} {value}" for name, value in training.notes.items()]
        _say(console, "trained on: " + ", ".join(filter(None, said)))


def _written(graph: GraphEntry) -> str:
    loop = f", at most {graph.max_steps} steps to {graph.tolerance:g}" if graph.max_steps else ""
    return f"{graph.method}{loop}"


@app.command()
@_answers
@_asks
def export(
    model: ModelOrCheckpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.onnx; NAME.safetensors beside it holds the numbers")],
    weights: WeightsOption = None,
    option: OptionOption = None,
    output: Annotated[
        list[str] | None,
        typer.Option("--output", help="residual or radius: what the graph returns beside the logits; repeatable"),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="prove constants of the logits by it, and keep them: tightened, ...")
    ] = None,
    embed: Annotated[bool, typer.Option("--embed", help="one file")] = False,
    inline: Annotated[bool, typer.Option("--inline", help="no functions, for runtimes that have none")] = False,
    class_names: Annotated[str | None, typer.Option("--class-names", metavar="A,B,...")] = None,
    explicit: Annotated[
        bool,
        typer.Option("--explicit", help="a plain feed-forward graph in float32 for other tools, and nothing beside it"),
    ] = False,
    vnnlib: Annotated[
        str | None,
        typer.Option(
            "--vnnlib", metavar="DATA", help="for verifiers: --out is a folder, of that graph and properties of DATA"
        ),
    ] = None,
    radius: Annotated[str, typer.Option("--radius", help="of the l2 balls of --vnnlib; fractions are read")] = "36/255",
    samples: Annotated[int, typer.Option("--samples", min=1, help="how many of the data --vnnlib takes")] = 10,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="where the files of the torchvision sets are")] = Path(
        "data"
    ),
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Write a checkpoint with an ONNX graph that onnxruntime runs, and what was proved of it."""
    if vnnlib is None and out.suffix != container.GRAPH:
        raise CheckpointError(str(out), "path", f"the suffix must be {container.GRAPH}")
    if explicit or vnnlib is not None:
        if output or method or embed or inline or class_names:
            reason = "--output, --method, --embed, --inline and --class-names do not go with --explicit or --vnnlib"
            raise CheckpointError(str(out), "options", reason)
        (reach,) = _numbers(radius, "--radius", _fraction)[:1]
        _export_plain(_network(model, weights, option, asked), out, vnnlib, reach, samples, data_dir)
        return
    with _progress() as bars:
        task = bars.add_task("reading", total=None)
        net = _network(model, weights, option, asked)
        if class_names is not None:
            net.class_names = tuple(name.strip() for name in class_names.split(","))
        certifier = None
        if method is not None or "radius" in (output or ()):
            bars.update(task, description="proving")
            certifier = Certifier(net, method or "tightened")
        bars.update(task, description="writing")
        checkpoint.save(net, out, embed=embed, outputs=output or (), inline=inline, certifier=certifier)
        found = checkpoint.info(out)
    if as_json:
        _print_json(found.model_dump(mode="json"))
        return
    console = _console()
    _print_network(console, found)
    _print_certificate(console, found)
    names = [out] if embed else [out, out.with_suffix(container.DATA)]
    _say(console, f"wrote {', '.join(f'{name} ({name.stat().st_size:,} bytes)' for name in names)}")


def _export_plain(net: Network, out: Path, vnnlib: str | None, radius: float, samples: int, data_dir: Path) -> None:
    console = _console()
    if vnnlib is None:
        model = interchange.explicit(net)
        with whole(out) as partial:
            partial.write_bytes(model.SerializeToString(deterministic=True))
        _say(console, f"wrote {out} ({out.stat().st_size:,} bytes, {len(model.graph.node)} nodes)")
        return
    found = data.Shaped(data.load(vnnlib, "test", data_dir), net.input_shape, None)
    written = interchange.export_vnnlib(net, out, found, radius, samples=samples)
    half = radius / math.prod(net.input_shape) ** 0.5
    _say(
        console,
        f"wrote {out / 'network.onnx'} and properties of {len(written)} samples that are classified correctly:",
        f"l-infinity boxes of half-width {half:.6g}, inscribed in l2 balls of radius {radius:g}",
    )


@app.command()
@_answers
def verify(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="NAME.onnx or NAME.safetensors")],
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="of the inputs the graph is tried on; fresh ones by default")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything a checkpoint claims, afresh from its files alone.

    Exit code 1 when any claim does not hold, 2 when none is false but some could not be checked.
    """
    if not path.is_file():
        raise UnreadableError(str(path), "there is no such file")
    with _progress() as bars:
        bars.add_task("verifying", total=None)
        report = verify_checkpoint(path, seed)
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        _say(_console(), *str(report).split("\n"))
    if not report.passed:
        raise typer.Exit(1 if report.refuted else 2)


DataOption = Annotated[str | None, typer.Option("--data", help=f"{', '.join(data.NAMES)}; in place of a recipe's own")]
DataDirOption = Annotated[Path, typer.Option("--data-dir", help="where the files of the torchvision sets are")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="a YAML file of training options")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="a training option, such as loss.offset=0.5; repeatable"),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="in place of the recipe's or the config's")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="only so many training and test samples, to try it out")
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="folder of the run, which goes on there after a kill; of all results, for a recipe"
    ),
]
TensorboardOption = Annotated[bool, typer.Option("--tensorboard", help="write events for it, besides metrics.csv")]


def _settings(given: Sequence[str] | None, option: str = "set") -> dict[str, Any]:
    """``--set`` or ``--argument`` as plain data, by dotted names."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InvalidParameterError(f"--{option}", repr(text), "it must read NAME=VALUE, such as loss.offset=0.5")
        found[name.strip()] = recipes.plain(value, f"--{option} {name}")
    return found


class _Training:
    """Bars and one line for each epoch, on stderr."""

    def __init__(self, bars: Progress, quiet: bool) -> None:
        self.bars, self.quiet, self.name = bars, quiet, ""
        self.task = bars.add_task("reading", total=None)

    def told(self, name: str, what: str) -> None:
        self.name = name
        self.bars.update(self.task, description=f"{name}: {what}", total=None, completed=0)

    def run(self, folder: Path, data_name: str | None, tensorboard: bool) -> dict[str, Any]:
        """Say that a run begins; what `finetune` and `train` are told of it alike."""
        self.told(folder.name, "training")
        about = {"folder": folder, "data": data_name or "", "tensorboard": tensorboard}
        return {**about, "on_step": self.on_step, "on_epoch": self.on_epoch}

    def on_step(self, step: int, total: int, loss: float) -> None:
        self.bars.update(self.task, description=f"{self.name}: loss {loss:.4f}", completed=step, total=total)

    def on_epoch(self, record: EpochRecord) -> None:
        if self.quiet:
            return
        parts = [f"{self.name}: epoch {record.epoch}"]
        if record.loss is not None:
            parts.append(f"loss {record.loss:.4f}")
        if record.natural_accuracy is not None:
            certified = " / ".join(f"{100 * value:.1f}" for value in record.certified_accuracy)
            parts.append(f"natural {100 * record.natural_accuracy:.1f}, certified {certified}")
        parts.append(f"L proved {record.proved_lipschitz:.9g}, least eigenvalue of H {record.least_eigenvalue:.1e}")
        _say(self.bars.console, ", ".join(parts))


def _is_recipe(model: str) -> bool:
    return Path(model).suffix in recipes.SUFFIXES


def _run_recipe(
    path: str,
    out: Path | None,
    seed: int | None,
    source: str | None,
    data_dir: Path,
    given: dict[str, Any],
    limit: int | None,
    as_json: bool,
) -> None:
    changes = {f"training.{name}": value for name, value in given.items()}
    with _progress(quiet=place()[0] > 0) as bars:
        shown = _Training(bars, as_json)
        order = recipes.Order(
            out or recipes.DEFAULT, source, data_dir, limit, shown.told, shown.on_step, shown.on_epoch
        )
        result = recipes.run(path, order, seed=seed, changes=changes)
    if place()[0] > 0:
        return
    if as_json:
        _print_json(result.model_dump(mode="json"))
        return
    _print_table(*recipes.rows_of({Path(path): [result]}))
    folder = recipes.folder_of(path, out or recipes.DEFAULT, result.seed)
    _say(_console(), f"wrote {folder}: {recipes.RESULT}, {recipes.NETWORK}, and the run's files")


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The rows of `recipes.rows_of`; a recipe's name and data stand above its numbers, for which they leave no room."""
    lines: list[list[str]] = []
    paper: list[list[str]] = []
    for name, source, method, *numbers in rows:
        if name and not (source or method):
            paper = [[name, *numbers]]  # of the recipe that comes next
            continue
        if name:
            lines += [[f"{name}, {source}"], *paper]
            paper = []
        lines.append([method, *numbers])
    cells = [headings[2:], *(line for line in lines if len(line) > 1)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def shown(cells: Sequence[str], style: str = "") -> None:
        padded = [
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        _say(_console(), "  " + "  ".join(padded).rstrip(), style=style)

    _say(_console(), "accuracy (%), certified at l2 radii", "", style="italic")
    shown(headings[2:], "bold")
    for line in lines:
        if len(line) > 1:
            shown(line)
        else:
            _say(_console(), line[0])


def _training_config(config: Path | None, given: dict[str, Any], seed: int | None) -> TrainingConfig:
    changes = given | ({} if seed is None else {"seed": seed})
    if config is not None:
        return recipes.read(config, TrainingConfig, changes)
    return recipes.checked({}, TrainingConfig, "--set", changes)


def _training_data(
    model: str, name: str | None, data_dir: Path, limit: int | None, config: TrainingConfig
) -> tuple[data.Images, TrainingConfig]:
    """Training samples, and the config with some of them held out by default: the test set is not for choosing epochs."""
    if name is None:
        if Path(model).is_dir():
            raise InvalidParameterError("MODEL", model, "it is a folder; one recipe of it (NAME.yaml) is meant")
        raise InvalidParameterError("--data", "missing", f"it must say what to train on: {', '.join(data.NAMES)}")
    images = recipes.Order(data_dir=data_dir, limit=limit).data(name, "train")
    if "held_out" not in config.model_fields_set:
        config = config.model_copy(update={"held_out": max(1, len(images) // 10)})
    return images, config


def _print_run(report: FinetuneReport, out: Path, as_json: bool, what: str) -> None:
    if place()[0] > 0:
        return
    if as_json:
        _print_json(report.model_dump(mode="json"))
        return
    table = Table(box=frames.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="validation accuracy (%), certified at l2 radii")
    for heading in ("epoch", "loss", "natural", *map(radius_name, report.config.radii), "L proved", "seconds"):
        table.add_column(heading, justify="right")
    for record in report.history:
        accuracies = [record.natural_accuracy, *record.certified_accuracy]
        measured = [] if record.natural_accuracy is None else [f"{100 * (value or 0.0):.2f}" for value in accuracies]
        _row(
            table,
            f"{record.epoch}{' (kept)' if record.epoch == report.kept else ''}",
            "" if record.loss is None else f"{record.loss:.4f}",
            *(measured or ["-"] * (1 + len(report.config.radii))),
            f"{record.proved_lipschitz:.7g}",
            f"{record.seconds:.1f}",
        )
    console = _console()
    console.print(table)
    _say(console, f"wrote {out}: {what}, {REPORT}, {METRICS}, {CURVES}")


@app.command("train")
@_answers
def train_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:factory, a plugin's name, or a recipe (NAME.yaml)")
    ],
    data_name: DataOption = None,
    out: FolderOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    argument: Annotated[
        list[str] | None, typer.Option("--argument", metavar="NAME=VALUE", help="of the factory; repeatable")
    ] = None,
    seed: SeedOption = None,
    data_dir: DataDirOption = Path("data"),
    limit: LimitOption = None,
    tensorboard: TensorboardOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a source network from scratch: any plugin's, for what its constant certifies; its constant proved every epoch."""
    if _is_recipe(model):
        _only_recipe({"--config": config, "--argument": argument, "--tensorboard": tensorboard})
        _run_recipe(model, out, seed, data_name, data_dir, _settings(settings), limit, as_json)
        return
    asked = _training_config(config, _settings(settings), seed)
    images, asked = _training_data(model, data_name, data_dir, limit, asked)
    folder = out or Path("runs") / model.rpartition(":")[2]
    if ":" in model:
        source = recipes.built(ModelConfig(factory=model, arguments=_settings(argument, "argument")), asked.seed)
    else:
        if argument:
            raise InvalidParameterError("--argument", argument[0], "it goes with package.module:factory")
        classes = int(images.labels.max()) + 1
        new = demo.new_model(model, images.shape, classes, asked.seed) if model in demo.architectures() else None
        if new is None:
            known = ", ".join(demo.architectures())
            reason = f"it is no recipe (NAME.yaml), no package.module:factory, and no plugin with a new model: {known}"
            raise ModelError(model, reason)
        source = new
    with _progress(quiet=place()[0] > 0) as bars:
        shown = _Training(bars, as_json)
        report = train_network(
            source,
            images,
            None,
            asked,
            name=model,
            **shown.run(folder, data_name, tensorboard),
        )
        if place()[0] == 0:
            recipes.keep_source(source, folder)
            shape = input_shape_of(source, images.shape)
            checkpoint.save(convert_model(source, shape, check=False), folder / recipes.NETWORK)
    _print_run(report, folder, as_json, f"{recipes.SOURCE}, {recipes.NETWORK}")


def _only_recipe(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value:
            raise InvalidParameterError(name, "given", "it does not go with a recipe; --set changes training options")


@app.command("finetune")
@_answers
@_asks
def finetune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_OR_CHECKPOINT_HELP + ", or a recipe (NAME.yaml)")],
    data_name: DataOption = None,
    out: FolderOption = None,
    weights: WeightsOption = None,
    option: OptionOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    seed: SeedOption = None,
    data_dir: DataDirOption = Path("data"),
    limit: LimitOption = None,
    tensorboard: TensorboardOption = False,
    as_json: JsonOption = False,
    *,
    asked: _Conversion,
) -> None:
    """Make a converted network more robust: its constant stays, proved after every epoch. Goes on after a kill."""
    if _is_recipe(model):
        only = {"--config": config, "--weights": weights, "--option": option}
        _only_recipe({**only, "--tensorboard": tensorboard, "an option of the conversion": asked != _Conversion()})
        _run_recipe(model, out, seed, data_name, data_dir, _settings(settings), limit, as_json)
        return
    training = _training_config(config, _settings(settings), seed)
    images, training = _training_data(model, data_name, data_dir, limit, training)
    folder = out or Path("runs") / "finetuned"
    if Path(model).resolve() == (folder / recipes.NETWORK).resolve():
        raise InvalidParameterError("--out", str(folder), "its network would take the place of MODEL: take another")
    with _progress(quiet=place()[0] > 0) as bars:
        shown = _Training(bars, as_json)
        net = _network(model, weights, option, asked)
        report = finetune_network(
            net,
            images,
            None,
            training,
            model=model,
            **shown.run(folder, data_name, tensorboard),
        )
        if place()[0] == 0:
            checkpoint.save(net, folder / recipes.NETWORK)
    _print_run(report, folder, as_json, recipes.NETWORK)


@app.command("table")
@_answers
def table_command(
    folder: Annotated[Path, typer.Argument(metavar="RECIPES", help="a folder of recipes, or one")] = Path("recipes"),
    results: Annotated[Path, typer.Option("--results", help="where their results are")] = Path(recipes.DEFAULT),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the table there too, as Markdown")] = None,
    as_json: JsonOption = False,
) -> None:
    """What came of the recipes, beside the paper's Table 1: natural and certified accuracy, prescribed and tightened."""
    if not folder.exists():
        raise InvalidParameterError("RECIPES", str(folder), "there is no such file or folder")
    found = recipes.results_of(folder, results)
    headings, rows = recipes.rows_of(found, recipes.stale)
    if out is not None:
        with whole(out) as partial:
            partial.write_text(recipes.markdown(headings, rows), encoding="utf-8")
    if as_json:
        _print_json([result.model_dump(mode="json") for each in found.values() for result in each])
        return
    _print_table(headings, rows)
    if missing := recipes.commands_of(found, results):
        _say(_console(), "not run yet:", *(f"  {command}" for command in missing))


@app.command("demo")
@_answers
def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for report.json, report.md and the figure")] = Path(
        "runs/demo"
    ),
    architecture: Annotated[
        list[str] | None, typer.Option("--architecture", help="only this plugin; repeatable")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = demo.TRAINING.epochs,
    seed: Annotated[int, typer.Option("--seed", min=0)] = demo.TRAINING.seed,
    limit: Annotated[int | None, typer.Option("--limit", hidden=True, min=10)] = None,
    as_json: JsonOption = False,
) -> None:
    """Train one small network of every architecture on digits, convert, validate and certify each: one table."""
    names = architecture or demo.architectures()
    with _progress() as bars:
        overall = bars.add_task("architectures", total=len(names))
        tasks: dict[str, Any] = {}

        def show(name: str, what: str, done: int, total: int) -> None:
            if name not in tasks:
                bars.update(overall, completed=len(tasks))
                tasks[name] = bars.add_task(name, total=total)
            if what == "training":
                bars.update(tasks[name], description=f"{name}: {what}", completed=done, total=total)
            else:
                bars.update(tasks[name], description=f"{name}: {what}")

        report = demo.run(out, demo.TRAINING.model_copy(update={"epochs": epochs, "seed": seed}), names, limit, show)
    if as_json:
        _print_json(report.model_dump(mode="json"))
        return
    console = _console()
    table = Table(box=frames.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="certified accuracy (%) at l2 radii, digits")
    rows = [demo.cells(row) for row in report.rows]
    for k, heading in enumerate(demo.HEADINGS):
        # In a narrow terminal headings are folded, numbers never.
        least = max(len(row[k]) for row in rows)
        table.add_column(heading, justify="left" if k == 0 else "right", min_width=least, overflow="fold")
    for row in rows:
        _row(table, *row)
    console.print(table)
    files = ", ".join(str(out / name) for name in ("report.json", "report.md", "certified-accuracy.png"))
    _say(console, f"wrote {files}")


if __name__ == "__main__":
    app(prog_name="lipconvert")
