"""Labelled images with pixels in [0, 1]: scikit-learn's digits, and what is on disk: the torchvision sets where their files
are, Parquet files as Hugging Face lays them out, and folders of images as torchvision's ImageFolder does.

Nothing is ever downloaded.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError, InvalidParameterError, ShapeError
from .foundation.arguments import isolated

SPLITS = ("train", "test")
DIGITS_TEST = 360  # a fifth of the 1797 digits
DIGITS_SEED = 0


class Images(Dataset[tuple[Tensor, int]]):
    """Images and labels in memory: ``data[i]`` is (float32 (C, H, W) with entries in [0, 1], int).

    ``pixels`` (N, C, H, W) in 0..``top``, kept in their own dtype; ``labels`` (N,).
    """

    def __init__(self, pixels: Tensor, labels: Tensor, top: float, name: str) -> None:
        if pixels.dim() != 4 or len(pixels) != len(labels) or len(pixels) == 0:
            shapes = f"{tuple(pixels.shape)} and {tuple(labels.shape)}"
            raise DataError(name, f"images and labels have shapes {shapes}, expected (N, C, H, W) and (N,) with N > 0")
        self.pixels, self.labels, self.top, self.name = pixels, labels.long(), float(top), name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].float() / self.top, int(self.labels[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.pixels.shape[1:])

    def first(self, count: int | None) -> Images:
        """The first of them, all for None."""
        if count is None:
            return self
        return Images(self.pixels[:count], self.labels[:count], self.top, self.name)

    def spread(self, count: int | None) -> Images:
        """So many of them, evenly from the first to the last (a folder is in order of classes), all for None."""
        if count is None or count >= len(self):
            return self
        rows = torch.arange(count, device="cpu") * len(self) // count
        return Images(self.pixels[rows], self.labels[rows], self.top, self.name)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images (N, C, H, W), float32 in [0, 1], and all labels (N,)."""
        return self.pixels.float() / self.top, self.labels


class Shaped(Dataset[tuple[Tensor, int]]):
    """The first ``limit`` images in the shape a network takes; flat networks get them flattened (an isometry).

    ``seen`` is called after each sample, for a progress bar. Raises `ShapeError` when the sizes differ.
    """

    def __init__(
        self,
        images: Images,
        shape: Sequence[int],
        limit: int | None = None,
        seen: Callable[[], object] | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise InvalidParameterError("limit", limit, "at least one sample is needed")
        wanted = tuple(shape)
        if wanted != images.shape and wanted != (math.prod(images.shape),):
            raise ShapeError(f"the input of the network for {images.name}", images.shape, wanted)
        self.images, self.shape, self.seen = images, wanted, seen
        self.size = len(images) if limit is None else min(limit, len(images))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        x, label = self.images[index]
        if self.seen is not None:
            self.seen()
        return x.reshape(self.shape), label


@dataclass(frozen=True)
class _Torchvision:
    """A torchvision set: its class, the folder it looks in, and the files it wants there."""

    kind: str
    folder: str
    files: tuple[str, ...]


_IDX = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
_TORCHVISION = {
    "mnist": _Torchvision("MNIST", "MNIST/raw", _IDX),
    "fashion-mnist": _Torchvision("FashionMNIST", "FashionMNIST/raw", _IDX),
    "cifar10": _Torchvision(
        "CIFAR10", "cifar-10-batches-py", (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
    ),
    "cifar100": _Torchvision("CIFAR100", "cifar-100-python", ("train", "test", "meta")),
}

# Columns of a Parquet file, one of each.
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)")

NAMES = ("digits", *_TORCHVISION, "parquet:DIR", "folder:DIR")


@isolated
def load(name: str, split: str = "test", data_dir: str | Path = "data") -> Images:
    """A data set of `NAMES`, its ``"train"`` or ``"test"`` part.

    * ``digits`` (8x8, 1437 + 360 samples) comes with scikit-learn;
    * ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100`` are read from ``data_dir``, as torchvision keeps them;
    * ``parquet:DIR`` reads DIR/test.parquet, or all of DIR/test-*.parquet: an image column (PNG or JPEG as bytes, or a struct
      with ``bytes``; `IMAGE_COLUMNS`) and one of integer labels (`LABEL_COLUMNS`). It needs the extra ``parquet``;
    * ``folder:DIR`` reads DIR/test/CLASS/*.png, *.jpg, ...: the labels count the classes in the order of their names.

    The images of the last two must be of one size, with 8 bits per channel. They are grey if all of them are, else RGB.

    Raises `InvalidParameterError` for an unknown name or part, `DataError` for files that are missing or damaged.
    """
    kind, _, folder = name.partition(":")
    reader = _READERS.get(kind) if folder else None
    if reader is None and name not in NAMES:
        raise InvalidParameterError("data", repr(name), f"it must be one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise InvalidParameterError("split", repr(split), f"it must be one of {', '.join(SPLITS)}")
    if reader is not None:
        return reader(name, split, Path(folder))
    return _digits(split) if name == "digits" else _torchvision(name, split, Path(data_dir))


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    train, test = train_test_split(
        range(len(digits.target)), test_size=DIGITS_TEST, stratify=digits.target, random_state=DIGITS_SEED
    )
    rows = train if split == "train" else test
    pixels = torch.as_tensor(digits.images[rows], dtype=torch.uint8).unsqueeze(1)
    return Images(pixels, torch.as_tensor(digits.target[rows]), 16.0, "digits")


def _torchvision(name: str, split: str, root: Path) -> Images:
    from torchvision import datasets

    source = _TORCHVISION[name]
    missing = [file for file in source.files if not (root / source.folder / file).is_file()]
    if missing:
        raise DataError(
            name,
            f"{', '.join(missing)} not found in {root / source.folder}. Nothing is downloaded here; fetch the set once "
            f'with: python -c "from torchvision.datasets import {source.kind}; '
            f'{source.kind}({str(root)!r}, download=True)", or name another folder with --data-dir.',
        )
    try:
        found: Any = getattr(datasets, source.kind)(root, train=split == "train", download=False)
    except (RuntimeError, ValueError, AssertionError, OSError, EOFError, KeyError, TypeError) as error:
        folder = root / source.folder
        raise DataError(name, f"the files in {folder} cannot be read ({type(error).__name__}: {error})") from error
    pixels = torch.as_tensor(found.data)
    # MNIST has (N, H, W), CIFAR (N, H, W, C).
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.as_tensor(found.targets), 255.0, name)


def _parquet(name: str, split: str, root: Path) -> Images:
    try:
        pyarrow, parquet = (import_module(module) for module in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise DataError(name, f"it needs the extra: pip install 'lipconvert[parquet]' ({error})") from error
    labels: list[int] = []

    def rows() -> Iterator[tuple[str, bytes]]:
        for path in _shards(name, split, root):
            try:
                with parquet.ParquetFile(path) as file:
                    image, label = _columns(name, path, file.schema_arrow, pyarrow.types)
                    row = 0
                    for batch in file.iter_batches(batch_size=1024, columns=[image, label]):
                        for content, number in zip(*(batch.column(c).to_pylist() for c in (image, label)), strict=True):
                            where = f"row {row} of {path}"
                            if number is None or number < 0:
                                raise DataError(name, f"{where} has no label: {number}")
                            content = content["bytes"] if isinstance(content, dict) else content
                            if content is None:
                                raise DataError(name, f"{where} holds no image")
                            labels.append(number)
                            yield where, content
                            row += 1
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(name, f"{path} cannot be read ({type(error).__name__}: {error})") from error

    pixels = _decoded(name, rows())
    return Images(pixels, torch.tensor(labels), 255.0, name)


def _shards(name: str, split: str, root: Path) -> list[Path]:
    """The Parquet files of a part, in order, and all of them where their names say how many there are."""
    whole = root / f"{split}.parquet"
    files = [whole] if whole.is_file() else sorted(root.glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(name, f"neither {whole.name} nor {split}-*.parquet found in {root}")
    for path in files:
        numbered = _NUMBERED.search(path.name)
        if numbered and int(numbered[2]) != len(files):
            raise DataError(name, f"{path.name} says {int(numbered[2])} files, but {root} holds {len(files)} of them")
    return files


def _columns(name: str, path: Path, schema: Any, types: Any) -> tuple[str, str]:
    """The names of the image and of the label column of a file."""
    found = []
    for what, columns in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS)):
        there = [column for column in columns if column in schema.names]
        if len(there) != 1:
            has = f"{', '.join(there) or 'none'}, of the columns {', '.join(schema.names)}"
            raise DataError(name, f"{path} must have one {what} column ({' or '.join(columns)}), but it has {has}")
        found.append(there[0])
    image, label = (schema.field(column).type for column in found)
    if types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else None
    if image is None or not (types.is_binary(image) or types.is_large_binary(image)):
        wanted = "it must hold PNG or JPEG files as bytes, or structs with such 'bytes'"
        raise DataError(name, f"column {found[0]!r} of {path} has type {schema.field(found[0]).type}, but {wanted}")
    if not types.is_integer(label):
        several = ": more than one label for an image" if types.is_list(label) or types.is_large_list(label) else ""
        raise DataError(name, f"column {found[1]!r} of {path} has type {label}, but it must be an integer{several}")
    return found[0], found[1]


def _folder(name: str, split: str, root: Path) -> Images:
    from torchvision import datasets

    try:
        found = datasets.ImageFolder(root / split)
        for other in SPLITS:  # a class that one part lacks would shift the labels of those behind it
            classes = found.find_classes(root / other)[0] if (root / other).is_dir() else found.classes
            if odd := sorted(set(classes) ^ set(found.classes)):
                raise DataError(name, f"{', '.join(odd)} is in one of {', '.join(SPLITS)} only: labels would not agree")
    except OSError as error:
        raise DataError(
            name, f"images are looked for in {root / split}/CLASS/*.png, *.jpg, ... ({type(error).__name__}: {error})"
        ) from error
    pixels = _decoded(name, ((path, _content(name, path)) for path, _ in found.samples))
    return Images(pixels, torch.tensor(found.targets), 255.0, name)


def _content(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(name, f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _decoded(name: str, files: Iterable[tuple[str, bytes]]) -> Tensor:
    """Image files, each with words for where it is, as uint8 (N, C, H, W)."""
    images: list[Tensor] = []
    first = ""
    for where, content in files:
        images.append(_decode(name, where, content))
        first = first or where
        sizes = [f"{w}x{h}" for h, w in (images[0].shape[1:], images[-1].shape[1:])]
        if sizes[0] != sizes[1]:
            raise DataError(name, f"{where} has {sizes[1]} pixels, but {first} has {sizes[0]}: all must be of one size")
    if not images:
        raise DataError(name, "there are no images")
    channels = max(len(image) for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _decode(name: str, where: str, content: bytes) -> Tensor:
    """An image file as uint8 (1, H, W) or (3, H, W)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(name, f"{where} is an image of mode {image.mode}, but 8 bits per channel are needed")
            grey = image.mode in ("1", "L", "LA")
            opaque = image.convert("RGBA") if image.mode == "P" else image
            pixels = np.array(opaque.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(
            name, f"{where} is not an image that can be decoded ({type(error).__name__}: {error})"
        ) from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


_READERS: dict[str, Callable[[str, str, Path], Images]] = {"parquet": _parquet, "folder": _folder}
