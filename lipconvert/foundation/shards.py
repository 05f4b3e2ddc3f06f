"""A function over a whole data set, batch by batch: a run can be killed and goes on, and spreads over processes.

The data are cut into batches and runs of batches (shards) in one way only, so that a sample always meets the same batch
mates: results are bitwise the same in one go, after any number of interruptions, and on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, default_collate

from ..errors import InvalidParameterError, ProcessError, ShapeError
from .arguments import count, plain_tensor
from .files import whole
from .integrity import unshown

Work = Callable[[Tensor, Tensor, int], Mapping[str, Tensor]]
Seen = Callable[[int, int | None], object]
T = TypeVar("T")

PATIENCE = timedelta(days=1)  # how long a process that is done waits for the others
_NAME = re.compile(r"shard-(\d{5,})\.safetensors")
_TORCHRUN = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def over(
    data: Any,
    work: Work,
    *,
    batch_size: int = 256,
    shard_size: int = 1024,
    folder: str | Path | None = None,
    key: str = "",
    seen: Seen | None = None,
) -> dict[str, Tensor]:
    """Everything ``work`` gives for a data set, in the order of the data, on the CPU, the same on every process.

    ``data``: a map-style data set of (input, label), cut into batches of ``batch_size``, or a `DataLoader`, whose batches are
    taken as they are. ``work``: inputs (B, ...), labels (B,) and the index of the first sample to tensors (B, ...), on any
    device, with the same names, dtypes and further sizes for every batch. A shard ends with the batch that brings it to
    ``shard_size`` samples. Under torch.distributed process r of w takes the shards r, r + w, ...; samples of other
    processes' shards are not asked for (a loader's batches pass by), and all processes must call with the same arguments.

    ``folder`` keeps every finished shard (`InvalidParameterError` if it was made with another ``key``, batches or data); what
    is found there is not computed again. ``key`` stands for all that the results depend on besides the data (`fingerprint`);
    of keys that are JSON objects a refusal names the entries that differ.
    Its samples are read again, to see that the data are the same. A shard that is cut short or damaged is computed again.

    ``seen`` is called with (samples known to be done, all samples or None) after each batch and each shard found.

    Raises `InvalidParameterError` for data that are empty, no pairs, or a loader whose order may change where it matters
    (with a folder, or on several processes); `ShapeError` for results that have not one row per sample; on several processes,
    whatever one of them raised, and `ProcessError` on the others.
    """
    rank, world = place()
    with _together(world) as each:
        run = _Run(data, work, batch_size, shard_size, None if folder is None else Path(folder), key, seen, rank, world)
        # What is wrong from the start is known to all before the first of them computes, or writes into the folder.
        _require_same(each(run.open), "the arguments (key, samples, batch and shard size)")
        results = each(run.shards)
    _require_same([samples for samples, _ in results], "the number of samples")
    samples = results[0][0]
    if samples == 0:
        raise InvalidParameterError("data", "empty", "at least one sample is needed")
    found = {index: shard for _, shards in results for index, shard in shards.items()}
    if seen is not None and (run.done, run.total) != (samples, samples):
        seen(samples, samples)
    return _joined([found[index] for index in sorted(found)])


def fingerprint(*parts: nn.Module | Tensor, **options: Any) -> str:
    """SHA-256 of modules, tensors and options, in hexadecimal: what the ``key`` of `over` is made from.

    Of a module: its representation (sizes and settings that no tensor holds), what no representation of torch's or our own
    modules shows (the divisor of a pooling), and its state dict, with names, dtypes, shapes, bytes and extra state. Options
    and extra state must be tensors or plain data (`InvalidParameterError`); what else the module's output depends on, such as
    the options of a solver, has to be given as an option.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            _hash(digest, repr(part), unshown(part))
            for name, value in sorted(part.state_dict().items()):
                _hash(digest, name, value)
        else:
            _hash(digest, part)
    _hash(digest, options)
    return digest.hexdigest()


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(rank, number of processes), with a gloo group for the block if torchrun started this process as one of several.

    A group that is there already is left alone. Without torchrun and without a group: (0, 1).
    """
    ours = (
        dist.is_available()
        and not dist.is_initialized()
        and os.environ.keys() >= _TORCHRUN
        and int(os.environ["WORLD_SIZE"]) > 1
    )
    if ours:
        dist.init_process_group("gloo")
    try:
        yield place()
    finally:
        if ours:
            dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, number of processes) of this process in the default group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def _together(world: int) -> Iterator[Callable[[Callable[[], T]], list[T]]]:
    """A function that takes a step on every process and gives all their results, by rank, or raises on all of them."""
    if world == 1:
        yield lambda step: [step()]
        return
    # Not the default group: nccl would need a device of its own for each process, and gives up on a slower one too soon.
    group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    def each(step: Callable[[], T]) -> list[T]:
        result, error = None, None
        try:
            result = step()
        except Exception as caught:  # noqa: BLE001 (raised below, once the others know)
            error = caught
        found: list[Any] = [None] * world
        try:
            dist.all_gather_object(found, (result, error and f"{type(error).__name__}: {error}"), group=group)
        except RuntimeError as lost:
            if error is None:
                raise ProcessError(None, f"the connection to it is lost ({lost})") from lost
        if error is not None:
            raise error
        for process, (_, reason) in enumerate(found):
            if reason is not None:
                raise ProcessError(process, reason)
        return [result for result, _ in found]

    try:
        yield each
    finally:
        dist.destroy_process_group(group)


def _require_same(values: Sequence[object], what: str) -> None:
    for process, value in enumerate(values):
        if value != values[0]:
            requirement = f"process 0 has {values[0]}: all processes of a run need the same data and arguments"
            raise InvalidParameterError(f"{what} of process {process}", value, requirement)


class _Batch(NamedTuple):
    """A batch, not read yet: its shard, its first sample, their number, and what reads (inputs, labels)."""

    shard: int
    start: int
    size: int
    read: Callable[[], tuple[Tensor, Tensor]]


class _Source:
    """What a shard is made from: where its batches end, and SHA-256 of its samples."""

    def __init__(self) -> None:
        self.bounds: list[int] = []
        self.all = hashlib.sha256()

    def add(self, batch: _Batch, x: Tensor, labels: Tensor) -> None:
        self.bounds = [*(self.bounds or [batch.start]), batch.start + batch.size]
        _hash(self.all, x, labels)

    def metadata(self) -> dict[str, str]:
        return {
            "samples": " ".join(map(str, self.bounds)),
            "inputs": self.all.hexdigest(),
        }


@dataclass
class _Run:
    """One process's part of `over`; ``found``: metadata and results of all the shards in the folder that are whole."""

    data: Any
    work: Work
    batch_size: int
    shard_size: int
    folder: Path | None
    key: str
    seen: Seen | None
    rank: int
    world: int
    samples: int = 0
    done: int = 0
    total: int | None = None
    found: dict[int, tuple[dict[str, str], dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def loader(self) -> bool:
        return isinstance(self.data, DataLoader)

    def open(self) -> tuple[object, ...]:
        """Check all that can be before anything is computed; what every process must agree on."""
        for name, size in (("batch_size", self.batch_size), ("shard_size", self.shard_size)):
            count(size, name)
        if not self.loader and (
            isinstance(self.data, str) or not hasattr(self.data, "__getitem__") or not hasattr(self.data, "__len__")
        ):
            kind = type(self.data).__name__
            raise InvalidParameterError("data", kind, "it must be a map-style data set or a DataLoader")
        if self.loader and not _in_order(self.data) and (self.folder is not None or self.world > 1):
            raise InvalidParameterError(
                "data",
                "a DataLoader whose order is not known to be the same each time (shuffled, iterable, a sampler of its own)",
                "a folder and several processes need one order: give the data set itself, or DataLoader(..., shuffle=False)",
            )
        self.total = _total(self.data)
        if self.folder is not None:
            self.look(self.folder)
        if not self.loader:
            for index, batches in self.runs():
                if index % self.world == self.rank and index in self.found:
                    self.check(index, batches)
        return self.key, self.total, self.batch_size, self.shard_size

    def look(self, folder: Path) -> None:
        """Read the shards in the folder; those that cannot be read, or do not hold what was written, are left out."""
        if folder.exists() and not folder.is_dir():
            raise InvalidParameterError("folder", folder, "it must be a folder, or not be there yet")
        for path in sorted(folder.glob("shard-*.safetensors")):
            name = _NAME.fullmatch(path.name)
            if name is None:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    # Clones: the file is mapped into memory, and another process may write it anew.
                    results = {entry: file.get_tensor(entry).clone() for entry in file.keys()}  # noqa: SIM118 (not a dict)
            except (OSError, SafetensorError):
                continue
            index = int(name[1])
            if metadata.get("key") != self.key:
                self.refuse(index, f"was made with {_difference(metadata.get('key'), self.key)}")
            if metadata.pop("seal", None) == _seal(metadata, results):
                self.found[index] = metadata, results

    def runs(self) -> Iterator[tuple[int, Iterator[_Batch]]]:
        """The shards in order, each with its batches."""
        return groupby(self.batches(), key=lambda batch: batch.shard)

    def batches(self) -> Iterator[_Batch]:
        """All batches in order; those of a map-style set are read only when they are asked for."""
        shard = start = begun = 0
        for size, read in self.cut():
            yield _Batch(shard, start, size, read)
            start += size
            if start - begun >= self.shard_size:
                shard, begun = shard + 1, start
        self.samples = start

    def cut(self) -> Iterator[tuple[int, Callable[[], tuple[Tensor, Tensor]]]]:
        if self.loader:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers when it begins
                loaded = iter(self.data)
            for batch in loaded:
                pair = _pair(batch)
                yield len(pair[1]), partial(tuple, pair)
        else:
            for start in range(0, len(self.data), self.batch_size):
                size = min(self.batch_size, len(self.data) - start)
                yield size, partial(_collated, self.data, start, size)

    def shards(self) -> tuple[int, dict[int, dict[str, Tensor]]]:
        """The number of all samples, and the results of this process's shards: found, or computed and written."""
        results = {}
        for index, batches in self.runs():
            mine = index % self.world == self.rank
            if index in self.found:
                if mine and self.loader:
                    self.check(index, batches)
                metadata, known = self.found[index]
                if mine:
                    results[index] = known
                bounds = metadata["samples"].split()
                self.tell(int(bounds[-1]) - int(bounds[0]))
            elif mine:
                results[index] = self.compute(index, batches)
        return self.samples, results

    def compute(self, index: int, batches: Iterable[_Batch]) -> dict[str, Tensor]:
        """Results of a shard, written if there is a folder."""
        source, parts = _Source(), []
        for batch in batches:
            x, labels = batch.read()
            if self.folder is not None:
                source.add(batch, x, labels)
            parts.append(_rows(self.work(x, labels, batch.start), batch.size))
            self.tell(batch.size)
        results = _joined(parts)
        if self.folder is not None:
            metadata = {"key": self.key, **source.metadata()}
            # Not save_file: it writes to a name of its own, which a kill would leave behind.
            content = save(results, {**metadata, "seal": _seal(metadata, results)})
            with whole(self.folder / _name(index)) as path, path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before it takes its name: no empty shard after a power cut
        return results

    def check(self, index: int, batches: Iterable[_Batch]) -> None:
        """Refuse a shard that was found if it was not made from these batches."""
        found, source = self.found[index][0], _Source()
        for batch in batches:
            source.add(batch, *batch.read())
        here = source.metadata()
        if found["samples"] != here["samples"]:
            ends = f"batches end at samples {found['samples']}, here at {here['samples']}"
            self.refuse(index, f"was cut otherwise ({ends}: another batch_size, shard_size or number of samples)")
        if found["inputs"] != here["inputs"]:
            self.refuse(index, f"was made from other data in samples {source.bounds[0]} to {source.bounds[-1] - 1}")

    def refuse(self, index: int, what: str) -> NoReturn:
        requirement = f"its {_name(index)} {what}: use another folder, or delete this one"
        raise InvalidParameterError("folder", self.folder, requirement)

    def tell(self, samples: int) -> None:
        self.done += samples
        if self.seen is not None:
            self.seen(self.done, self.total)


def _difference(found: str | None, here: str) -> str:
    """Where two keys differ: the entries, for keys that are JSON objects."""
    try:
        there, own = json.loads(found or ""), json.loads(here)
    except json.JSONDecodeError:
        there, own = None, None
    if not isinstance(there, dict) or not isinstance(own, dict):
        return f"the key {found!r}, not {here!r} (other weights or options)"
    names = [name for name in {**there, **own} if there.get(name) != own.get(name)]
    return ", ".join(f"another {name} ({there.get(name)}, here {own.get(name)})" for name in names)


def _name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _in_order(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives the same batches in the same order each time, as far as can be known."""
    if isinstance(loader.dataset, IterableDataset) or not loader.in_order:
        return False
    batched: Any = loader.batch_sampler
    cutter = loader.sampler if batched is None or type(batched) is BatchSampler else batched
    return isinstance(cutter, SequentialSampler | list | tuple | range)


def _total(data: Any) -> int | None:
    if not isinstance(data, DataLoader):
        return len(data)
    if isinstance(data.dataset, IterableDataset) or type(data.batch_sampler) is not BatchSampler or data.drop_last:
        return None
    sampler: Any = data.sampler
    return len(sampler) if hasattr(sampler, "__len__") else None


def _collated(data: Any, start: int, size: int) -> tuple[Tensor, Tensor]:
    samples = [data[index] for index in range(start, start + size)]
    try:
        if not all(isinstance(sample, tuple | list) for sample in samples):
            raise TypeError("no pair")
        inputs = torch.stack([plain_tensor(x, "data: the input of a sample") for x, _ in samples])
        return _pair((inputs, default_collate([label for _, label in samples])))
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        where = f"data (samples {start} to {start + size - 1})"
        requirement = f"its samples must be pairs (input tensor, label) of one shape ({type(error).__name__}: {error})"
        raise InvalidParameterError(where, type(samples[0]).__name__, requirement) from error


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise InvalidParameterError("data", type(batch).__name__, "its samples must be pairs (input tensor, label)")
    x, labels = (plain_tensor(part, "a batch of the data") for part in batch)
    if labels.dim() != 1 or x.shape[:1] != labels.shape:
        raise ShapeError("the labels of a batch", tuple(x.shape[:1]), tuple(labels.shape))
    return x, labels


def _rows(results: Any, size: int) -> dict[str, Tensor]:
    if not isinstance(results, Mapping) or not all(isinstance(value, Tensor) for value in results.values()):
        raise InvalidParameterError("what work gives", type(results).__name__, "it must be tensors by name")
    for name, value in results.items():
        if value.shape[:1] != (size,):
            raise ShapeError(f"what work gives as {name!r}", f"({size}, ...)", tuple(value.shape), "A row per sample.")
    # A copy: a view would keep the inputs, and work may use its buffers again.
    return {name: value.detach().to("cpu", copy=True) for name, value in results.items()}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    layouts = [{name: (value.dtype, *value.shape[1:]) for name, value in part.items()} for part in parts]
    for layout in layouts:
        if layout != layouts[0]:
            raise InvalidParameterError("what work gives", layout, f"for another batch it is {layouts[0]}")
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in sorted(parts[0])}


def _seal(metadata: Mapping[str, str], results: Mapping[str, Tensor]) -> str:
    """By which a file that is damaged is known."""
    digest = hashlib.sha256()
    _hash(digest, metadata)
    for name in sorted(results):
        _hash(digest, name, results[name])
    return digest.hexdigest()


def _hash(digest: Any, *values: Any) -> None:
    """Add tensors (dtype, shape, bytes) and plain data (as JSON) to a digest."""

    def plain(value: object) -> object:
        if not isinstance(value, Tensor):
            raise TypeError(f"a {type(value).__name__}")
        own = hashlib.sha256()
        _hash(own, value)
        return {"tensor": own.hexdigest()}

    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(json.dumps([str(value.dtype), list(value.shape)]).encode())
            digest.update(flat.view(torch.uint8).numpy())
        else:
            try:
                text = json.dumps(value, sort_keys=True, default=plain).encode()
            except (TypeError, ValueError) as error:
                requirement = f"only plain data and tensors have a fingerprint ({error})"
                raise InvalidParameterError("an option or extra state", repr(value), requirement) from error
            digest.update(f"{len(text)} ".encode() + text)
