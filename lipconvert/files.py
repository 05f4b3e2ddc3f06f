"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InvalidParameterError

# In a folder while a process writes to it.
LOCK = ".lock"


def partial_of(path: str | Path) -> Path:
    """Where what will be ``path`` is written to."""
    target = Path(path)
    return target.with_name(target.name + ".partial")


@contextmanager
def replaced(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Paths beside ``paths`` to write to: they take their places, in this order, when the block ends, and go if it raises.

    Folders on the way are made. An existing file is replaced at once, never left half-written, and not before all of what
    replaces it is on the disk. What interrupts it between two of them leaves the later ones where they were written: whoever
    reads the first can find them there (`partial_of`).
    """
    targets = [Path(path) for path in paths]
    partials = tuple(partial_of(target) for target in targets)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the file", str(target))
    replacing = False
    try:
        yield partials
        for partial in partials:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        replacing = True
        for k, (partial, target) in enumerate(zip(partials, targets, strict=True)):
            try:
                partial.replace(target)
            except FileNotFoundError:
                if k == 0:  # a reader may have put the others in their places
                    raise
    finally:
        if not replacing or partials[0].exists():  # else the first is in its place, and the others must follow it
            for partial in partials:
                partial.unlink(missing_ok=True)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """`replaced` for one file."""
    with replaced(path) as (partial,):
        yield partial


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """A folder, made if there is none, in which no other process writes inside the block.

    Raises `InvalidParameterError` where another is at it. A process that is killed leaves no lock behind.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    lock = FileLock(where / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        reason = "another process is running in it: wait for that one, or take another folder"
        raise InvalidParameterError("folder", str(where), reason) from None
    try:
        yield
    finally:
        (where / LOCK).unlink(missing_ok=True)
        lock.release()
