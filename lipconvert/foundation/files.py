"""Files that appear whole or not at all, however many processes write them at a time."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from ..errors import InvalidParameterError

# In a folder while a process writes to it, and behind the name of a file while it is written.
LOCK = ".lock"

# Seconds to wait for another writer of the same file before giving up, and between two looks at it.
WAIT, LOOK = 60.0, 0.05


def partial_of(path: str | Path) -> Path:
    """Where what will be ``path`` is written to."""
    target = Path(path)
    return target.with_name(target.name + ".partial")


@contextmanager
def replaced(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Paths beside ``paths`` to write to: they take their places, in this order, when the block ends, and go if it raises.

    Folders on the way are made. An existing file is replaced at once, never left half-written, and not before all of what
    replaces it is on the disk. What interrupts it between two of them leaves the later ones where they were written: whoever
    reads the first can find them there (`partial_of`). Two writers of one file, threads or processes, write one after the
    other. Raises what `only_writer` raises.
    """
    targets = [Path(path) for path in paths]
    partials = tuple(partial_of(target) for target in targets)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the file", str(target))
    with ExitStack() as stack:
        for target in sorted(targets):  # in one order, so that two writers of the same files do not wait for each other
            stack.enter_context(only_writer(target))
        replacing = False
        try:
            yield partials
            for partial in partials:
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
            replacing = True
            for partial, target in zip(partials, targets, strict=True):
                partial.replace(target)
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
def only_writer(path: str | Path, seconds: float | None = None) -> Iterator[None]:
    """The right to write a file, and what is written beside it, until the block ends; ``seconds`` to wait for it (`WAIT`).

    It is a lock on ``path`` + ".lock", which is there only meanwhile; the system frees it when a process is killed, and the
    next writer removes the empty file. Raises `InvalidParameterError` where another writer does not end, and `OSError` where
    the folder cannot be written to or its file system has no locks.
    """
    target = Path(path)
    wait = WAIT if seconds is None else seconds
    with _locked(target.with_name(target.name + LOCK), wait) as free:
        if not free:
            reason = f"another process or thread has been writing it for {wait:g} s: wait for that one, or take another"
            raise InvalidParameterError("the file", str(target), reason)
        yield


@contextmanager
def alone(folder: str | Path, *, patient: bool = False) -> Iterator[None]:
    """A folder, made if there is none, in which no other process or thread writes inside the block.

    Where another is at it, ``patient`` waits for it (`WAIT`). Raises `InvalidParameterError` where that does not help, and
    `OSError` as `only_writer`. A process that is killed leaves no lock behind.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    with _locked(where / LOCK, WAIT if patient else 0.0) as free:
        if not free:
            reason = "another process is running in it: wait for that one, or take another folder"
            raise InvalidParameterError("folder", str(where), reason)
        yield


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[bool]:
    """Whether ``path``, made for it and removed afterwards, was locked against other processes and threads in this time."""
    end = time.monotonic() + seconds
    while (descriptor := _lock(path)) is None and time.monotonic() < end:
        time.sleep(LOOK)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(PermissionError):  # of another user, whose process was killed: it may stay
                path.unlink(missing_ok=True)  # before it is free: who opened it meanwhile sees that it has no name
            unlock_descriptor(descriptor)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A descriptor of the file that has this name, locked; None where another has locked it."""
    while True:
        descriptor, locked = _opened(path), False
        try:
            if not lock_descriptor(descriptor, blocking=False):
                return None
            locked = _is_named(descriptor, path)
        except OSError as error:
            if error.errno != errno.ESTALE:  # removed by another machine
                reason = "its file system has no locks, so that two writers could destroy each other's files: write to "
                reason += f"another folder, and copy from there ({error.strerror})"
                raise OSError(error.errno, reason, str(path)) from error
        finally:
            if not locked:
                os.close(descriptor)
        if locked:
            return descriptor


def _opened(path: Path) -> int:
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | safe, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | safe)  # another user's; most file systems lock it all the same


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether a file has this name still: who had locked it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
