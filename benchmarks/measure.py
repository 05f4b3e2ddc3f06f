"""What the benchmarks share: interleaved timings, peak memory, facts about the machine, tables and floors.

A module, not a benchmark. Seconds are medians of interleaved runs (A B A B ...), so that whatever else the machine does
hits all contestants alike: within one run ratios mean something, seconds hardly.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

CPU = torch.device("cpu")
MB = 2**20
CONSOLE = Console(width=None if Console().is_terminal else 150)


def synchronise(device: torch.device = CPU) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device = CPU,
    budget: float = float("inf"),
) -> dict[str, float]:
    """Median seconds of each contestant, run in turn after one warm-up each.

    A contestant that has used up ``budget`` seconds drops out; one that did so while it warmed up keeps that one value.
    """
    warm_up = {name: timed(function, device) for name, function in contestants.items()}
    spent, seconds = dict(warm_up), {name: list[float]() for name in contestants}
    for _ in range(repeats):
        for name, function in contestants.items():
            if spent[name] < budget:
                seconds[name].append(timed(function, device))
                spent[name] += seconds[name][-1]
    return {name: statistics.median(times or [warm_up[name]]) for name, times in seconds.items()}


def peak_memory(function: Callable[[], object], device: torch.device = CPU) -> int | None:
    """Bytes that a call needed at its peak beyond what was held before it.

    On a GPU what torch allocated. On the CPU the resident set of the process, whose high-water mark Linux resets on
    demand; what the allocator kept of earlier calls is handed back first. None where that is not possible.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError, TypeError, StopIteration):  # not Linux, or not glibc
        function()
        return None
    function()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward to all parameters."""

    def step() -> None:
        model.zero_grad()
        model(x).square().sum().backward()

    return step


def inference(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Forward without gradient."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    return forward


def max_difference(a: Tensor, b: Tensor) -> float:
    """max|a − b|."""
    return float((a - b).abs().max())


@dataclass(frozen=True)
class Floor:
    """What must not be missed: ``value`` ≤ ``limit``. A value of None was not measured, and misses nothing."""

    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.value is None or self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured"
        return f"{self.name}: {self.value:.3g}, at most {self.limit:.3g} allowed"


def verdict(floors: Sequence[Floor], console: Console = CONSOLE) -> int:
    """Say which floors are missed; the exit status."""
    missed = [floor for floor in floors if not floor.passed]
    for floor in missed:
        console.print(f"[bold red]missed[/] {floor}")
    if not missed:
        console.print(f"{sum(floor.value is not None for floor in floors)} of {len(floors)} floors measured, all met")
    return 1 if missed else 0


def machine(device: torch.device = CPU) -> dict[str, str | int]:
    """What a number depends on besides the code."""
    return {
        "lipconvert": version("lipconvert"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def facts(device: torch.device = CPU) -> str:
    """`machine` in a line."""
    return ", ".join(f"{name} {value}" for name, value in machine(device).items())


def cell(value: object) -> str:
    """A number with three digits, a missing one as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)


def show(title: str, header: Iterable[str], rows: Iterable[Sequence[object]], console: Console = CONSOLE) -> None:
    """Print a table, its first column to the left and the others to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(header):
        table.add_column(name, justify="right" if k else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    console.print(table)


def write_json(path: str | Path | None, content: Any) -> None:
    """Write a file where a path is given; what is not finite has no number in JSON and becomes a string."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")


def command_line(description: str | None, repeats: int | None = None, device: bool = True) -> argparse.ArgumentParser:
    """A parser with --json, --threads and, where they apply, --repeats and --device; a docstring's first line above them."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--threads", type=int, help="threads of torch (as torch has it)")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each contestant (%(default)s)")
    if device:
        parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda (%(default)s)")
    return parser


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
