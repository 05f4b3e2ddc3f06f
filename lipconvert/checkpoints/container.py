"""The files of a checkpoint: their layout, their hashes, and what is refused (`checkpoints.checkpoint` says what is in them).

The header of the data file, a safetensors file, carries the manifest and its SHA-256; the manifest has the SHA-256 of each
tensor. The graph carries the same manifest and ends with the SHA-256 of all its bytes before. Sizes are checked before
anything of them is made, hashes before anything is believed, and nothing but the two files is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from onnx import StringStringEntryProto, TensorProto
from pydantic import BaseModel, JsonValue, ValidationError
from torch import Tensor

from ..errors import CheckpointError, InvalidParameterError, UnreadableError
from ..foundation.files import only_writer, partial_of
from .documents import FORMAT_VERSION, Manifest, StageEntry, TensorEntry
from .skeleton import skeleton
from .wire import Field, fields, of_memory

KEY = "lipconvert"
DIGEST = "lipconvert.sha256"
MANIFEST = "lipconvert.manifest"
GRAPH, DATA = ".onnx", ".safetensors"

# Bytes of a manifest: an honest one has about 200 for each tensor, 600 for each step and the name of each class, a thousandth
# of this for the networks of the tests. A header has it again, in the escapes of JSON, with 100 for each tensor.
MOST_MANIFEST, MOST_HEADER = 2_000_000, 6_000_000

# Lists and objects in such a text: an honest one has three for each tensor and for each step, and one for each run of
# activations. Python's objects take a hundred times the two bytes that "[]" has in a file.
MOST_BRACKETS = 100_000

# Bytes of a graph beside its tensors and the transforms of its images: nodes, at about 150 bytes each.
MOST_GRAPH = 32_000_000

# Fields of a model (functions, metadata), of a graph in it (nodes, tensors), and of a tensor; tensors, as in a manifest.
MOST_PARTS, MOST_NODES, MOST_WORDS, MOST_TENSORS = 10_000, 50_000, 100, 10_000

# Bytes of a tensor beside its numbers: its name, its shape, where its numbers are.
MOST_ABOUT = 20_000

# What is told of what is wrong with a manifest.
MOST_ERRORS = 20


def _number(message: type[Message], field: str) -> int:
    return message.DESCRIPTOR.fields_by_name[field].number


# Numbers of the fields that are read of a graph.
IN_MODEL, METADATA, TRAINING = (_number(onnx.ModelProto, name) for name in ("graph", "metadata_props", "training_info"))
ALGORITHM, INITIALIZER = _number(onnx.TrainingInfoProto, "algorithm"), _number(onnx.GraphProto, "initializer")
RAW = _number(TensorProto, "raw_data")

# How often files that are saved anew while they are read are read again.
READINGS = 100


@dataclass(frozen=True)
class Kind:
    """A dtype in the manifest, in torch, in safetensors and in ONNX."""

    name: Literal["float32", "float64"]
    torch: torch.dtype
    safetensors: str
    onnx: int

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.torch.itemsize


KINDS = (
    Kind("float32", torch.float32, "F32", TensorProto.FLOAT),
    Kind("float64", torch.float64, "F64", TensorProto.DOUBLE),
)


# safetensors' names of dtypes, in torch's words.
WORDS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64", "BOOL": "bool"}


def entry_of(name: str, tensor: Tensor) -> TensorEntry:
    """What the manifest says of a tensor. Raises `CheckpointError` for a dtype that is not written."""
    for kind in KINDS:
        if kind.torch is tensor.dtype:
            return TensorEntry(name=name, dtype=kind.name, shape=list(tensor.shape), sha256=sha256(tensor))
    raise CheckpointError(name, "dtype", f"{tensor.dtype} is not written; only float32 and float64 are")


def kind_of(entry: TensorEntry) -> Kind:
    """The dtype that the manifest says."""
    return next(kind for kind in KINDS if kind.name == entry.dtype)


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, little-endian, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def sha256(tensor: Tensor) -> str:
    """Of the bytes of a tensor."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def write_data(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
    """The data file, with its manifest: a safetensors file of the same bytes whenever the same is saved.

    The library writes its metadata in random order, and through a file of its own that a kill leaves behind. Raises
    `CheckpointError` for a manifest that `read` would refuse.
    """
    text = manifest.model_dump_json()
    _require_weight(str(path), text)
    header: dict[str, object] = {"__metadata__": {KEY: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every number is aligned
    stop = 0
    for name in order:
        tensor, start = tensors[name], stop
        stop = start + tensor.numel() * tensor.element_size()
        kind = next(kind for kind in KINDS if kind.torch is tensor.dtype)
        header[name] = {"dtype": kind.safetensors, "shape": list(tensor.shape), "data_offsets": [start, stop]}
    words = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 64)
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            file.write(_bytes(tensors[name]))


def write_graph(path: Path, model: onnx.ModelProto) -> None:
    """The model, and behind it, as one more entry of its metadata, the SHA-256 of its bytes."""
    text = model.SerializeToString(deterministic=True)
    path.write_bytes(text + _trailer(text))


def _trailer(text: bytes | memoryview) -> bytes:
    entry = StringStringEntryProto(key=DIGEST, value=hashlib.sha256(text).hexdigest())
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


TRAILER = len(_trailer(b""))


def _require_weight(name: str, text: str) -> None:
    """Raise `CheckpointError` for the text of a manifest that is heavier than any honest one, before it is parsed."""
    if (size := len(text.encode())) > MOST_MANIFEST:
        _refuse_weight(name, size)
    _require_few(name, f"metadata {KEY!r}", text)


def _refuse_weight(name: str, size: int) -> NoReturn:
    reason = f"the manifest has {size} bytes, and at most {MOST_MANIFEST} are written or read"
    raise CheckpointError(name, f"metadata {KEY!r}", f"{reason}: usual causes are long names, notes or class names")


def _require_few(name: str, where: str, text: str | bytes | bytearray) -> None:
    marks = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    count = sum(text.count(mark) for mark in marks)  # type: ignore[arg-type]
    if count > MOST_BRACKETS:
        raise CheckpointError(name, where, f"it has {count} lists and objects, and at most {MOST_BRACKETS} are read")


class RegularFile:
    """A regular file, open: its size when it was opened, and its bytes at any place. Nothing else is ever opened.

    Links are followed; a pipe or a device, which may have no end, is refused. Raises `UnreadableError`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            if not path.exists():
                raise UnreadableError(self.name, "there is no such file")
            if not path.is_file():  # a pipe would be waited for
                raise UnreadableError(self.name, "it is no regular file")
            self._file = path.open("rb", buffering=0)
            status = os.fstat(self._file.fileno())
        except (OSError, ValueError) as error:
            raise UnreadableError(self.name, str(error)) from error
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise UnreadableError(self.name, "it is no regular file")
        self.size = status.st_size

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def at(self, start: int, length: int) -> bytearray:
        """Some bytes of the file. Raises `CheckpointError` where it ends before, or there is no memory for them."""
        try:
            text = bytearray(length)
        except MemoryError as error:
            raise CheckpointError(self.name, "file", f"there is no memory for {length} bytes of it") from error
        self.into(start, memoryview(text))
        return text

    def into(self, start: int, memory: memoryview) -> None:
        """Fill some memory with the bytes from a place on."""
        done, length = 0, len(memory)
        try:
            self._file.seek(start)
            while done < length:
                count = self._file.readinto(memory[done : done + (1 << 30)])
                if not count:
                    raise CheckpointError(self.name, "file", "it cannot be read: it has become shorter meanwhile")
                done += count
        except OSError as error:
            raise UnreadableError(self.name, str(error)) from error


def read_text(path: Path, most: int) -> bytes:
    """A file of JSON, whole. Raises `CheckpointError` for more bytes, or more lists and objects, than are read."""
    with RegularFile(path) as file:
        if file.size > most:
            raise CheckpointError(file.name, "file", f"it has {file.size} bytes, and at most {most} are read")
        text = bytes(file.at(0, file.size))
    _require_few(str(path), "file", text)
    return text


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: metadata, and where each tensor's bytes are in the file."""

    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]
    entries: dict[str, tuple[str, list[int]]]  # dtype as safetensors has it, shape

    @classmethod
    def read(cls, path: Path) -> Header:
        """The header alone. Raises `CheckpointError` where it is absurd, before anything of it is made."""
        with RegularFile(path) as file:
            return cls.of(file)

    @classmethod
    def of(cls, file: RegularFile) -> Header:
        """That of an open file: the tensors' bytes lie side by side, and the last one ends where the file does."""
        name, size = file.name, file.size
        length = int.from_bytes(file.at(0, 8), "little") if size >= 8 else 0
        if size < 8 or length > min(size - 8, MOST_HEADER):
            reason = f"it cannot be read: its length is said to be {length} bytes, in a file of {size}"
            reason += (
                f", where at most {MOST_HEADER} are read. It is no safetensors file of lipconvert, or it was cut off"
            )
            raise CheckpointError(name, "header", reason)
        text = file.at(8, length)
        _require_few(name, "header", text)
        try:
            found = json.loads(text)
            if not isinstance(found, dict):
                raise TypeError(f"it is no object, but a {type(found).__name__}")
            metadata = found.pop("__metadata__", {})
            places, entries = {}, {}
            for key, entry in found.items():
                start, stop = entry["data_offsets"]
                shape = list(entry["shape"])
                if not all(type(k) is int for k in (start, stop, *shape)):
                    raise TypeError("offsets and sizes are whole numbers")
                places[key] = (8 + length + start, 8 + length + stop)
                entries[key] = (str(entry["dtype"]), shape)
            for word in (*metadata, *metadata.values()):
                word.encode()  # strings, and proper ones
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(name, "header", f"it cannot be read ({type(error).__name__}: {error})") from error
        end = 8 + length
        for key, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
            if start != end or stop < start or stop > size:
                reason = (
                    f"it cannot be read: its bytes are said to be {start} to {stop} in a file of {size}, and what is"
                )
                raise CheckpointError(name, f"tensor {key!r}", f"{reason} before it ends at {end}")
            end = stop
        if end != size:
            raise CheckpointError(
                name, "file", f"it has {size} bytes, and its header tells of {end}: who wrote the rest?"
            )
        return cls(metadata, places, entries)


@dataclass(frozen=True)
class Graph:
    """A graph by its bytes: nothing of it is parsed that is not small, so that it costs no more than reading it.

    ``parts``: the bytes of the entries of each part, in their order, under ONNX's names ("graph.node", "functions"). Of
    tensors there are the names, of metadata the keys. ``tensors``: every initialiser without its numbers, and where those
    are in the file. ``metadata``: keys and texts. Two graphs whose parts are the same compute the same of the same tensors.
    """

    parts: dict[str, list[bytes]]
    tensors: list[tuple[TensorProto, slice]]
    metadata: dict[str, str]

    @classmethod
    def of(cls, text: bytes | memoryview) -> Graph:
        """Raises `ValueError` for what is no ONNX, and for more fields than are ever written."""
        self, view = cls({}, [], {}), memoryview(text)
        at = of_memory(view)
        for field in fields(at, 0, len(view), MOST_PARTS):
            if field.number == METADATA:
                self._note(bytes(view[field.start : field.stop]))
            elif field.number == IN_MODEL:
                self._scan(view, "graph", field)
            elif field.number == TRAINING:
                for part in fields(at, field.start, field.stop, MOST_PARTS):
                    if part.number == ALGORITHM:
                        self._scan(view, "training_info.algorithm", part)
                    else:
                        self._add(view, onnx.TrainingInfoProto, "training_info.", part)
            else:
                self._add(view, onnx.ModelProto, "", field)
        return self

    @property
    def outputs(self) -> list[str]:
        """The names of what it returns. Raises `ValueError` where they cannot be read."""
        entries = self.parts.get("graph.output", [])
        try:
            found = [onnx.GraphProto.FromString(entry).output[0].name for entry in entries[:MOST_WORDS]]
        except DecodeError as error:
            raise ValueError(f"its outputs cannot be read ({error})") from error
        return found

    def _add(self, view: memoryview, message: type[Message], where: str, field: Field) -> None:
        known = message.DESCRIPTOR.fields_by_number.get(field.number)
        name = where + (f"field {field.number}" if known is None else known.name)
        self.parts.setdefault(name, []).append(bytes(view[field.begin : field.stop]))

    def _note(self, content: bytes) -> None:
        key, value = _entry(content)
        if key in self.metadata:
            raise ValueError(f"its metadata have {key!r} twice")
        self.metadata[key] = value
        self.parts.setdefault("metadata_props", []).append(key.encode())

    def _scan(self, view: memoryview, where: str, graph: Field) -> None:
        at = of_memory(view)
        for field in fields(at, graph.start, graph.stop, MOST_NODES):
            if field.number != INITIALIZER:
                self._add(view, onnx.GraphProto, f"{where}.", field)
                continue
            if len(self.tensors) == MOST_TENSORS:
                raise ValueError(f"it has more than {MOST_TENSORS} tensors")
            words, numbers = b"", None
            for part in fields(at, field.start, field.stop, MOST_WORDS):
                if part.number != RAW:
                    if len(words) + part.stop - part.begin > MOST_ABOUT:
                        raise ValueError(f"a tensor has more than {MOST_ABOUT} bytes beside its numbers")
                    words += view[part.begin : part.stop]
                elif numbers is None:
                    numbers = slice(part.start, part.stop)
                else:
                    raise ValueError("a tensor has its numbers twice")
            try:
                tensor = TensorProto.FromString(words)
                name = tensor.name.encode()
            except (DecodeError, AttributeError) as error:  # a name that is no UTF-8 stays bytes
                raise ValueError(f"a tensor cannot be read ({error})") from error
            self.parts.setdefault(f"{where}.initializer", []).append(name)
            self.tensors.append((tensor, numbers or slice(0, 0)))


def _entry(content: bytes) -> tuple[str, str]:
    """(key, text) of an entry of a graph's metadata. Raises `ValueError`."""
    try:
        entry = StringStringEntryProto.FromString(content)
    except DecodeError as error:
        raise ValueError(f"its metadata cannot be read ({error})") from error
    if not (isinstance(entry.key, str) and isinstance(entry.value, str)):  # bytes that are no UTF-8
        raise ValueError("its metadata are not text")
    return entry.key, entry.value


@dataclass(frozen=True)
class Stored:
    """What is in a checkpoint, each byte of it checked: its manifest, its tensors, and the graph if there is one."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    graph: Graph | None


def read(path: str | Path) -> Stored:
    """Everything in a checkpoint, its sizes and hashes checked. Raises `CheckpointError` naming what is wrong.

    Nothing is read before it is known to be no more than its manifest accounts for, and that to be what its steps take.
    A pair that is saved anew meanwhile is read again, so that it is the old one or the new one.
    """
    target = Path(path)
    for _ in range(READINGS):
        before = _state(target)
        try:
            return _read(target)
        except CheckpointError:
            if _state(target) == before:
                raise
    return _read(target)


def _state(path: Path) -> list[tuple[int, ...] | None]:
    """What is another one as soon as a checkpoint has been saved anew."""
    found: list[tuple[int, ...] | None] = []
    others = [path.with_suffix(DATA), partial_of(path.with_suffix(DATA))] if path.suffix == GRAPH else []
    for file in (path, *others):
        try:
            status = file.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except (OSError, ValueError):
            found.append(None)
    return found


def _read(target: Path) -> Stored:
    with RegularFile(target) as file:
        if target.suffix != GRAPH:
            header = Header.of(file)
            manifest = _manifest(file.name, _data_text(file.name, header))
            return Stored(manifest, _tensors(file, header, manifest), None)
        graph, manifest, text, content = _read_graph(file)
    tensors = [tensor for tensor, _ in graph.tensors]
    if all(tensor.data_location != TensorProto.EXTERNAL for tensor in tensors):
        return Stored(manifest, _embedded(file.name, graph, content, manifest), graph)
    data = _data_of(target, tensors)
    if data == target.with_suffix(DATA):
        data = recover(target)
    try:
        found = RegularFile(data)
    except UnreadableError as error:
        reason = f"{error.reason}. It holds the numbers of {target.name}: keep both together, under the names they were"
        raise UnreadableError(str(data), f"{reason} saved by") from error
    with found as file:
        header = Header.of(file)
        if _data_text(file.name, header) != text:
            reason = f"these are not the data of {target.name}: their manifests differ. One of them was saved alone, or"
            raise CheckpointError(file.name, f"metadata {KEY!r}", f"{reason} replaced")
        _require_places(target, tensors, header)
        return Stored(manifest, _tensors(file, header, manifest), graph)


def read_manifest(path: str | Path) -> Manifest:
    """What a checkpoint says about itself; its tensors are not read. Raises `CheckpointError`."""
    target = Path(path)
    with RegularFile(target) as file:
        if target.suffix == GRAPH:
            return _read_graph(file)[1]
        return _manifest(file.name, _data_text(file.name, Header.of(file)))


def _read_graph(file: RegularFile) -> tuple[Graph, Manifest, str, memoryview]:
    """The graph, the manifest and its text, and the bytes of the file, after their hash.

    In the order of what it costs: the hash at the end of the file must be there; the fields of the model are found by
    seeking; the manifest among them is read; the file must be as large as that and its tensors take; then it is read.
    """
    name, end = file.name, file.size - TRAILER
    trailer = file.at(end, TRAILER) if end >= 0 else bytearray()
    if DIGEST.encode() not in trailer:
        reason = (
            "it is not at the end of the file: this is no lipconvert graph, or it was cut off, or another program has"
        )
        raise CheckpointError(name, f"metadata {DIGEST!r}", f"{reason} written it anew")
    metadata, weight = dict[str, str](), 0
    try:
        for field in fields(file.at, 0, file.size, MOST_PARTS):
            if field.number == METADATA:
                weight += (size := field.stop - field.start)
                if weight > MOST_MANIFEST + 4 * TRAILER:
                    _refuse_weight(name, weight)
                metadata |= [_entry(bytes(file.at(field.start, size)))]
    except ValueError as error:
        raise CheckpointError(name, "graph", f"it is no ONNX ({error})") from error
    if MANIFEST not in metadata:
        raise CheckpointError(name, f"metadata {MANIFEST!r}", "missing: this is not a lipconvert checkpoint")
    manifest = _manifest(name, metadata[MANIFEST])
    most = MOST_GRAPH + _held(manifest) + _transforms(manifest)
    if file.size > most:
        reason = f"it has {file.size} bytes, and a graph of these tensors and images has at most {most}"
        raise CheckpointError(name, "graph", reason)
    content = memoryview(file.at(0, file.size))
    if content[end:] != _trailer(content[:end]):
        actual = hashlib.sha256(content[:end]).hexdigest()
        raise CheckpointError(name, "graph", f"it is not what was saved: its SHA-256 is {actual}")
    try:
        graph = Graph.of(content)
    except ValueError as error:
        raise CheckpointError(name, "graph", f"it is no ONNX ({error})") from error
    if graph.metadata.get(MANIFEST) != metadata[MANIFEST]:
        raise CheckpointError(name, f"metadata {MANIFEST!r}", "it has changed while it was read")
    return graph, manifest, metadata[MANIFEST], content


def _held(manifest: Manifest) -> int:
    """Bytes of all tensors."""
    return sum(kind_of(entry).size * math.prod(entry.shape) for entry in manifest.tensors)


def _transforms(manifest: Manifest) -> int:
    """Bytes, at most, of the matrices of cosines and sines that the stages on images have: (w, w + 2) and (2h, 2h), for
    images, W, U and G and back, twice as many to be sure."""
    sizes = (entry.image for entry in manifest.steps if isinstance(entry, StageEntry) and entry.image)
    return sum(2 * 5 * 8 * (w * (w + 2) + 4 * h * h) for h, w in sizes)


def _data_text(name: str, header: Header) -> str:
    """The text of the manifest in a data file, after its hash."""
    if KEY not in header.metadata:
        raise CheckpointError(name, f"metadata {KEY!r}", "missing: this is not a lipconvert checkpoint")
    text = header.metadata[KEY]
    if header.metadata.get(DIGEST) != hashlib.sha256(text.encode()).hexdigest():
        # of another version, perhaps: that is said first
        _manifest(name, text)
        raise CheckpointError(name, f"metadata {KEY!r}", "it is not what was saved: its SHA-256 is another one")
    return text


class _Versioned(BaseModel):
    """What every manifest says, of whatever version."""

    format_version: JsonValue = None


def _manifest(name: str, text: str) -> Manifest:
    """The manifest of a text, which makes sense: what its steps take are its tensors (`skeleton`)."""
    _require_weight(name, text)
    try:
        found = _Versioned.model_validate_json(text).format_version
        if found != FORMAT_VERSION:
            reason = f"it is {found!r}, and this lipconvert reads {FORMAT_VERSION}: save it again with the version that"
            raise CheckpointError(name, "format_version", f"{reason} wrote it, or read it with that")
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        count = error.error_count()  # told one by one, they would take a hundred times what the text does
        reason = str(error) if count <= MOST_ERRORS else f"{count} of its entries are not what a manifest has there"
        raise CheckpointError(name, f"metadata {KEY!r}", reason) from error
    skeleton(manifest, name)
    return manifest


def location_of(data: Path) -> str:
    """The name of a data file as a graph has it, in Unicode whatever the locale. Raises `CheckpointError` where it cannot."""
    try:
        name = os.fsencode(data.name).decode()
    except UnicodeDecodeError:
        reason = "its bytes are no text (UTF-8), so that no graph can name it"
        raise CheckpointError(str(data), "path", f"{reason}: take another name, or embed the data") from None
    if "\\" in name:
        reason = "there is a backslash in it, which parts folders elsewhere"
        raise CheckpointError(str(data), "path", f"{reason}: take another name, or embed the data")
    return name


def _data_of(path: Path, initializers: Sequence[TensorProto]) -> Path:
    """The one data file of a graph: beside it, under a bare name. Anything else is refused unopened."""
    locations = {_external(path, t)[0] for t in initializers}
    for location in locations:
        if (
            len(locations) > 1
            or location != os.path.basename(location)
            or not location.endswith(DATA)
            or "\\" in location
        ):
            raise CheckpointError(
                str(path), "external data", f"its locations {sorted(locations)} are not one file beside it"
            )
    return path.with_name(os.fsdecode(locations.pop().encode()))


def _external(path: Path, tensor: TensorProto) -> tuple[str, int, int]:
    """(location, start, stop) of an initialiser."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    try:
        if not all(isinstance(word, str) for word in (*given, *given.values())):  # bytes that are no UTF-8
            raise ValueError("not text")
        start, length = int(given["offset"]), int(given["length"])
        if tensor.data_location != TensorProto.EXTERNAL or set(given) != {"location", "offset", "length"}:
            raise ValueError(f"external data {sorted(given)}")
        return given["location"], start, start + length
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            str(path), f"tensor {tensor.name!r}", f"it does not say where its data are ({error})"
        ) from error


def _require_places(path: Path, initializers: Sequence[TensorProto], header: Header) -> None:
    """The graph reads what the data file says: every tensor under its name, of its dtype and shape, from its place."""
    seen = set()
    for tensor in initializers:
        where = f"tensor {tensor.name!r}"
        if tensor.name in seen or tensor.name not in header.places:
            raise CheckpointError(
                str(path), where, "the graph has it twice" if tensor.name in seen else "there are no data"
            )
        seen.add(tensor.name)
        if _external(path, tensor)[1:] != header.places[tensor.name]:
            raise CheckpointError(str(path), where, "the graph reads it from another place than where it is")
        dtype, shape = header.entries[tensor.name]
        kind = next((kind.safetensors for kind in KINDS if kind.onnx == tensor.data_type), None)
        if (kind, list(tensor.dims)) != (dtype, shape):
            raise CheckpointError(
                str(path), where, f"the graph has another dtype or shape than the data, {dtype} {shape}"
            )
    for name in header.places.keys() - seen:
        raise CheckpointError(str(path), f"tensor {name!r}", "the graph does not have it")


def _require_entries(name: str, actual: Iterable[str], manifest: Manifest) -> dict[str, TensorEntry]:
    """The tensors of the manifest by name, which are those that are there."""
    expected = {entry.name: entry for entry in manifest.tensors}
    for key in sorted(expected.keys() ^ set(actual)):
        raise CheckpointError(name, f"tensor {key!r}", "missing" if key in expected else "unexpected")
    return expected


def _tensors(file: RegularFile, header: Header, manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a data file, each as the manifest says it is: read into memory, as a file may change meanwhile."""
    name, expected = file.name, _require_entries(file.name, header.entries, manifest)
    for key, (dtype, shape) in header.entries.items():
        wanted, (start, stop) = expected[key], header.places[key]
        if (kind_of(wanted).safetensors, wanted.shape) != (dtype, shape):
            found = WORDS.get(dtype, dtype)
            reason = f"it is {found} {shape}, the manifest says {wanted.dtype} {wanted.shape}"
            raise CheckpointError(name, f"tensor {key!r}", reason)
        _require_bytes(name, wanted, stop - start)
    tensors = {}
    for key, (start, _) in header.places.items():
        tensors[key] = _empty(name, expected[key])
        file.into(start, _bytes(tensors[key]))
        _require_hash(name, _bytes(tensors[key]), expected[key])
    return tensors


def _embedded(name: str, graph: Graph, content: memoryview, manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a single file."""
    found = {tensor.name: (tensor, content[place]) for tensor, place in graph.tensors}
    for tensor, _ in graph.tensors:  # what runs and what is loaded must be one
        if found[tensor.name][0] is not tensor:
            raise CheckpointError(name, f"tensor {tensor.name!r}", "the graph has it twice")
    expected = _require_entries(name, found, manifest)
    for key, (tensor, numbers) in found.items():
        entry = expected[key]
        if (tensor.data_type, list(tensor.dims)) != (kind_of(entry).onnx, entry.shape):
            reason = f"the graph has another dtype or shape than {entry.dtype} {entry.shape}"
            raise CheckpointError(name, f"tensor {key!r}", reason)
        _require_bytes(name, entry, len(numbers))
        _require_hash(name, numbers, entry)
    tensors = {}
    for key, (_, numbers) in found.items():
        tensors[key] = _empty(name, expected[key])
        _bytes(tensors[key])[:] = numbers
    return tensors


def _require_bytes(name: str, entry: TensorEntry, actual: int) -> None:
    if actual != (size := kind_of(entry).size * math.prod(entry.shape)):
        raise CheckpointError(name, f"tensor {entry.name!r}", f"it has {actual} bytes, not {size}")


def _empty(name: str, entry: TensorEntry) -> Tensor:
    """Memory for a tensor. Raises `CheckpointError` where there is none."""
    try:
        return torch.empty(entry.shape, dtype=kind_of(entry).torch, device="cpu")
    except RuntimeError as error:
        raise CheckpointError(name, f"tensor {entry.name!r}", f"there is no memory for {entry.shape}") from error


def _require_hash(name: str, content: memoryview, entry: TensorEntry) -> None:
    if (actual := hashlib.sha256(content).hexdigest()) != entry.sha256:
        raise CheckpointError(name, f"tensor {entry.name!r}", f"it is not what was saved: its SHA-256 is {actual}")


def left_over(path: Path) -> Path | None:
    """The data of a graph where a save was interrupted between replacing the one and the other: not yet in their place."""
    data = path.with_suffix(DATA)
    left = partial_of(data)
    if not (path.is_file() and left.is_file()):
        return None
    try:
        with RegularFile(path) as file:
            text = _read_graph(file)[2]
        if _text_of(left) != text or (data.is_file() and _text_of(data) == text):
            return None
    except CheckpointError:
        # what is left over is of no use: whoever reads the files themselves says what is wrong with them
        return None
    return left


def finish(path: Path) -> None:
    """Put the data of a graph that are `left_over` in their place; for who is their `only_writer`."""
    if (left := left_over(path)) is not None:
        left.replace(path.with_suffix(DATA))


def recover(path: Path) -> Path:
    """Where the data of a graph are: beside it. Finishes a save that was killed between replacing the one and the other."""
    data = path.with_suffix(DATA)
    if (left := left_over(path)) is None:
        return data
    try:
        with only_writer(data, 0.0):
            finish(path)
    except (InvalidParameterError, OSError):  # they are being saved, or nothing may be written: read where they are
        return left
    return data


def _text_of(data: Path) -> str:
    return _data_text(str(data), Header.read(data))
