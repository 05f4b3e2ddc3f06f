"""Labelled images with pixels in [0, 1]: scikit-learn's digits, and the torchvision sets where their files are on disk.

Nothing is ever downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError, InvalidParameterError, ShapeError

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

NAMES = ("digits", *_TORCHVISION)


def load(name: str, split: str = "test", data_dir: str | Path = "data") -> Images:
    """A data set of `NAMES`, its ``"train"`` or ``"test"`` part.

    ``digits`` (8x8, 1437 + 360 samples) comes with scikit-learn; the others are read from ``data_dir``.
    Raises `InvalidParameterError` for an unknown name or part, `DataError` for files that are missing or damaged.
    """
    if name not in NAMES:
        raise InvalidParameterError("data", repr(name), f"it must be one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise InvalidParameterError("split", repr(split), f"it must be one of {', '.join(SPLITS)}")
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
