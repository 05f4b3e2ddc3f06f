"""The files of a checkpoint: their layout, their hashes, and what is refused (`lipconvert.checkpoint` says what is in them).

The header of the data file, a safetensors file, carries the manifest and its SHA-256; the manifest has the SHA-256 of each
tensor. The graph carries the same manifest and ends with the SHA-256 of all its bytes before. Sizes are checked before
anything of them is made, hashes before anything is believed, and nothing but the two files is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import safetensors.torch
import torch
from google.protobuf.message import DecodeError
from onnx import StringStringEntryProto, TensorProto
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError, InvalidParameterError
from .files import only_writer, partial_of
from .schema import FORMAT_VERSION, Manifest, TensorEntry

KEY = "lipconvert"
DIGEST = "lipconvert.sha256"
MANIFEST = "lipconvert.manifest"
GRAPH, DATA = ".onnx", ".safetensors"

# A header holds a few hundred bytes for each tensor, a graph a few thousand for each stage. More is refused unread.
MOST_HEADER, MOST_GRAPH = 100_000_000, 2_000_000_000

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

    The library writes its metadata in random order, and through a file of its own that a kill leaves behind.
    """
    text = manifest.model_dump_json()
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


def _trailer(text: bytes) -> bytes:
    entry = StringStringEntryProto(key=DIGEST, value=hashlib.sha256(text).hexdigest())
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


TRAILER = len(_trailer(b""))


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its data: metadata, and where each tensor's bytes are in the file."""

    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]
    entries: dict[str, tuple[str, list[int]]]  # dtype as safetensors has it, shape

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read and check the header alone. Raises `CheckpointError` where it is absurd, before anything of it is made."""
        name, size = str(path), _size(path)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MOST_HEADER):
                    reason = (
                        f"it cannot be read: its length is said to be {length} bytes, in a file of {size}. It is no "
                    )
                    reason += "safetensors file, or it was cut off"
                    raise CheckpointError(name, "header", reason)
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(name, "file", f"it cannot be read ({error})") from error
        try:
            found = json.loads(text)
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
        for key, (start, stop) in places.items():
            if not 8 + length <= start <= stop <= size:
                raise CheckpointError(
                    name,
                    f"tensor {key!r}",
                    f"it cannot be read: its bytes {start} to {stop} are not in a file of {size}",
                )
        return cls(metadata, places, entries)


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise CheckpointError(str(path), "file", "it cannot be read: there is no such file")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), "file", f"it cannot be read ({error})") from error


@dataclass(frozen=True)
class Stored:
    """What is in a checkpoint, each byte of it checked: its manifest, its tensors, and the graph if there is one."""

    manifest: Manifest
    tensors: dict[str, Tensor]
    graph: onnx.ModelProto | None


def read(path: str | Path) -> Stored:
    """Everything in a checkpoint, its sizes and hashes checked. Raises `CheckpointError` naming what is wrong.

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
    if target.suffix != GRAPH:
        header = Header.read(target)
        manifest = _manifest(str(target), _data_text(target, header))
        return Stored(manifest, _tensors(target, header, manifest), None)
    model, text = _read_graph(target)
    manifest = _manifest(str(target), text)
    initializers = [*model.graph.initializer, *(t for info in model.training_info for t in info.algorithm.initializer)]
    if all(t.data_location != TensorProto.EXTERNAL for t in initializers):
        return Stored(manifest, _embedded(str(target), initializers, manifest), model)
    data = _data_of(target, initializers)
    if data == target.with_suffix(DATA):
        data = recover(target)
    if not os.path.isfile(data):  # False for a name that no file can have
        reason = f"it cannot be read: there is no such file. It holds the numbers of {target.name}"
        raise CheckpointError(str(data), "file", f"{reason}: keep both together, under the names they were saved by")
    header = Header.read(data)
    if _data_text(data, header) != text:
        reason = (
            f"these are not the data of {target.name}: their manifests differ. One of them was saved alone, or replaced"
        )
        raise CheckpointError(str(data), f"metadata {KEY!r}", reason)
    _require_places(target, initializers, header)
    return Stored(manifest, _tensors(data, header, manifest), model)


def read_manifest(path: str | Path) -> Manifest:
    """What a checkpoint says about itself; its tensors are not read. Raises `CheckpointError`."""
    target = Path(path)
    if target.suffix == GRAPH:
        return _manifest(str(target), _read_graph(target)[1])
    return _manifest(str(target), _data_text(target, Header.read(target)))


def _read_graph(path: Path) -> tuple[onnx.ModelProto, str]:
    """The graph and the text of its manifest, after its hash."""
    name, size = str(path), _size(path)
    if size > MOST_GRAPH:
        raise CheckpointError(name, "graph", f"{size} bytes are more than any ONNX file may have")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(name, "file", f"it cannot be read ({error})") from error
    body, trailer = text[:-TRAILER], text[-TRAILER:]
    if DIGEST.encode() not in trailer:
        raise CheckpointError(
            name,
            f"metadata {DIGEST!r}",
            "it is not at the end of the file: this is no lipconvert graph, or it was cut off, or "
            "another program has written it anew",
        )
    if trailer != _trailer(body):
        raise CheckpointError(
            name, "graph", f"it is not what was saved: its SHA-256 is {hashlib.sha256(body).hexdigest()}"
        )
    try:
        model = onnx.ModelProto.FromString(text)
    except DecodeError as error:
        raise CheckpointError(name, "graph", f"it is no ONNX ({error})") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if not isinstance(metadata.get(MANIFEST, ""), str):
        raise CheckpointError(name, f"metadata {MANIFEST!r}", "it is not text")
    if MANIFEST not in metadata:
        raise CheckpointError(name, f"metadata {MANIFEST!r}", "missing: this is not a lipconvert checkpoint")
    return model, metadata[MANIFEST]


def _data_text(path: Path, header: Header) -> str:
    """The text of the manifest in a data file, after its hash."""
    if KEY not in header.metadata:
        raise CheckpointError(str(path), f"metadata {KEY!r}", "missing: this is not a lipconvert checkpoint")
    text = header.metadata[KEY]
    if header.metadata.get(DIGEST) != hashlib.sha256(text.encode()).hexdigest():
        # of another version, perhaps: that is said first
        _manifest(str(path), text)
        raise CheckpointError(str(path), f"metadata {KEY!r}", "it is not what was saved: its SHA-256 is another one")
    return text


def _manifest(path: str, text: str) -> Manifest:
    try:
        given = json.loads(text)
        json.dumps(given, ensure_ascii=False).encode()  # no halves of characters
        if not isinstance(given, dict):
            raise CheckpointError(path, f"metadata {KEY!r}", f"it is no manifest, but a {type(given).__name__}")
        found = given.get("format_version")
        if found != FORMAT_VERSION:
            raise CheckpointError(
                path,
                "format_version",
                f"it is {found!r}, and this lipconvert reads {FORMAT_VERSION}: save it again with the "
                "version that wrote it, or read it with that",
            )
        manifest = Manifest.model_validate(given)
    except (ValueError, RecursionError) as error:  # JSON and pydantic raise ValueErrors
        raise CheckpointError(path, f"metadata {KEY!r}", str(error)) from error
    seen = set[str]()
    for entry in manifest.tensors:
        if entry.name in seen:
            raise CheckpointError(path, f"tensor {entry.name!r}", "the manifest has it twice")
        seen.add(entry.name)
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


def _tensors(path: Path, header: Header, manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a data file, each as the manifest says it is."""
    name, expected = str(path), {entry.name: entry for entry in manifest.tensors}
    for key in sorted(expected.keys() ^ header.entries.keys()):
        raise CheckpointError(name, f"tensor {key!r}", "missing" if key in expected else "unexpected")
    for key, (dtype, shape) in header.entries.items():
        wanted = expected[key]
        if (kind_of(wanted).safetensors, wanted.shape) != (dtype, shape):
            found = WORDS.get(dtype, dtype)
            reason = f"it is {found} {shape}, the manifest says {wanted.dtype} {wanted.shape}"
            raise CheckpointError(name, f"tensor {key!r}", reason)
    try:  # into memory: a file that is mapped may change after its hash was checked
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(name, "file", f"it cannot be read as safetensors ({error})") from error
    for key, tensor in tensors.items():
        _require_hash(name, tensor, expected[key])
    return tensors


def _embedded(path: str, initializers: Sequence[TensorProto], manifest: Manifest) -> dict[str, Tensor]:
    """All tensors of a single file."""
    expected = {entry.name: entry for entry in manifest.tensors}
    found = {tensor.name: tensor for tensor in initializers}
    for tensor in initializers:  # what runs and what is loaded must be one
        if found[tensor.name] is not tensor:
            raise CheckpointError(path, f"tensor {tensor.name!r}", "the graph has it twice")
    for key in sorted(expected.keys() ^ found.keys()):
        raise CheckpointError(path, f"tensor {key!r}", "missing" if key in expected else "unexpected")
    tensors = {}
    for key, proto in found.items():
        entry = expected[key]
        kind, sizes = kind_of(entry), list(proto.dims)
        if (proto.data_type, sizes) != (kind.onnx, entry.shape) or min(sizes, default=0) < 0:
            reason = f"the graph has another dtype or shape than {entry.dtype} {entry.shape}"
            raise CheckpointError(path, f"tensor {key!r}", reason)
        if len(proto.raw_data) != kind.size * math.prod(sizes):
            reason = f"it has {len(proto.raw_data)} bytes, not {kind.size * math.prod(sizes)}"
            raise CheckpointError(path, f"tensor {key!r}", reason)
        numbers = torch.frombuffer(bytearray(proto.raw_data), dtype=kind.torch) if proto.raw_data else torch.empty(0)
        tensors[key] = numbers.to(kind.torch).reshape(sizes)
        _require_hash(path, tensors[key], entry)
    return tensors


def _require_hash(path: str, tensor: Tensor, entry: TensorEntry) -> None:
    if (actual := sha256(tensor)) != entry.sha256:
        raise CheckpointError(path, f"tensor {entry.name!r}", f"it is not what was saved: its SHA-256 is {actual}")


def left_over(path: Path) -> Path | None:
    """The data of a graph where a save was interrupted between replacing the one and the other: not yet in their place."""
    data = path.with_suffix(DATA)
    left = partial_of(data)
    if not (path.is_file() and left.is_file()):
        return None
    try:
        text = _read_graph(path)[1]
        if _data_text(left, Header.read(left)) != text:
            return None
        if data.is_file() and _data_text(data, Header.read(data)) == text:
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
