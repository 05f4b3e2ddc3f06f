"""What a converted convolutional network costs, in time and memory, as channels, depth, image and batch grow.

    python benchmarks/scaling.py [--out DIR] [--device cuda] [--memory-limit GB] [--axes channels depth]
    python benchmarks/scaling.py --quick        # seconds: does it run at all?

Circular 3×3 SLL convolutions of inner width 5/8 of the channels, float32; one axis at a time around 8 channels, depth 4,
32×32 images, batch 64. Forward and training step (forward and backward to all parameters) are compared with the explicit
convolutions, interleaved; *peak* memory is what a call needs beyond the network itself, also in multiples of one batch of
states, B·n·h·w numbers. Conversion runs in float64. Writes scaling.json and scaling.png to --out. What is estimated to need
more memory than the limit is skipped, and said to be.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lipconvert_plugins.sll import SLLConv2d
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from torch import nn

import lipconvert as lc

sys.path.insert(0, str(Path(__file__).parent))  # which `python -P` leaves out

from measure import (
    CONSOLE,
    CPU,
    MB,
    command_line,
    facts,
    inference,
    interleaved,
    machine,
    max_difference,
    peak_memory,
    show,
    timed,
    training_step,
    use_threads,
    write_json,
)

ITEM = 4  # bytes of a float32
FORWARD, STEP, GREY = "#1f6fb4", "#d1602b", "#777777"


@dataclass(frozen=True)
class Point:
    """One network and batch."""

    channels: int = 8
    depth: int = 4
    image: int = 32
    batch: int = 64

    @property
    def inner(self) -> int:
        return max(1, round(5 * self.channels / 8))

    @property
    def states(self) -> int:
        """n per pixel: the first layer's input and every layer's inner channels."""
        return self.channels + self.depth * self.inner

    @property
    def state_bytes(self) -> int:
        """One batch of states."""
        return self.batch * self.states * self.image**2 * ITEM

    @property
    def estimate(self) -> int:
        """Bytes: a dozen complex128 (F, n, n) while W, V and S are made, or as many batches of states."""
        frequencies = self.image * (self.image // 2 + 1)
        return 12 * max(16 * frequencies * self.states**2, self.state_bytes)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


BASE = Point()
AXES = {"channels": (8, 16, 32, 64), "depth": (2, 4, 8, 12), "image": (16, 32, 48, 64), "batch": (16, 64, 256)}
QUICK_BASE = Point(4, 2, 8, 4)
QUICK_AXES = {"channels": (4, 8), "depth": (1, 2), "image": (4, 8), "batch": (2, 4)}
COLUMNS = {
    "convert_s": "convert (s)",
    "forward_s": "forward (s)",
    "forward_ratio": "× explicit",
    "step_s": "step (s)",
    "step_ratio": "× explicit",
    "forward_mb": "forward peak (MB)",
    "forward_states": "× states",
    "step_mb": "step peak (MB)",
    "step_states": "× states",
}


def measure(point: Point, repeats: int, budget: float, device: torch.device = CPU) -> dict[str, Any]:
    """All numbers of one point."""
    torch.manual_seed(0)
    layers = [SLLConv2d(point.channels, point.inner).float() for _ in range(point.depth)]
    explicit = nn.Sequential(*layers).eval()
    shape = (point.channels, point.image, point.image)
    made: list[lc.Network] = []
    seconds = timed(lambda: made.append(lc.convert(explicit, shape, check=False)))
    net = made.pop().float().to(device)
    explicit = explicit.to(device)
    x = torch.randn(point.batch, *shape, dtype=torch.float32, device=device)
    forward = {"explicit": inference(explicit, x), "lben": inference(net, x)}
    step = {"explicit": training_step(explicit, x), "lben": training_step(net, x)}
    result: dict[str, Any] = {
        **asdict(point),
        "states": point.states,
        "states_mb": point.state_bytes / MB,
        "convert_s": seconds,
        "method": net.methods(x)[0],
        "max_difference": max_difference(forward["lben"](), forward["explicit"]()),
    }
    for name, contestants in (("forward", forward), ("step", step)):
        median = interleaved(contestants, repeats, device, budget)
        peak = {kind: peak_memory(function, device) for kind, function in contestants.items()}
        ours = peak["lben"]
        result |= {
            f"{name}_s": median["lben"],
            f"{name}_explicit_s": median["explicit"],
            f"{name}_ratio": median["lben"] / median["explicit"],
            f"{name}_mb": None if ours is None else ours / MB,
            f"{name}_explicit_mb": None if peak["explicit"] is None else peak["explicit"] / MB,
            f"{name}_states": None if ours is None else ours / point.state_bytes,
        }
    return result


def sweep(
    axes: Mapping[str, Sequence[int]], base: Point, limit: float, repeats: int, budget: float, device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """The points of each axis that fit in ``limit`` bytes, each measured once."""
    lc.convert(SLLConv2d(2).float(), (2, 4, 4), check=False)  # what is loaded on first use is no part of a point
    known: dict[Point, dict[str, Any] | None] = {}
    for axis, values in axes.items():
        for value in values:
            point = replace(base, **{axis: value})
            if point in known:
                continue
            gigabytes = point.estimate / 1e9
            if point.estimate > limit:
                CONSOLE.print(f"skipped {point}: about {gigabytes:.1f} GB needed, --memory-limit is {limit / 1e9:.1f}")
                known[point] = None
            else:
                CONSOLE.print(f"[dim]{point}: at most about {gigabytes:.2f} GB ...[/]", highlight=False)
                known[point] = measure(point, repeats, budget, device)
    points = {axis: [known[replace(base, **{axis: value})] for value in values] for axis, values in axes.items()}
    return {axis: [p for p in measured if p is not None] for axis, measured in points.items()}


def figure(axes: dict[str, list[dict[str, Any]]], base: Point, title: str) -> Figure:
    """Time ratios above, memory below, one column for each axis."""
    names = [axis for axis in axes if axes[axis]]
    fig = Figure(figsize=(3.2 * len(names) + 0.8, 6.8), layout="constrained")
    panels = fig.subplots(2, len(names), sharey="row", sharex="col", squeeze=False)
    units = {"channels": "channels", "depth": "layers", "image": "image side (pixels)", "batch": "batch (images)"}
    for column, axis in enumerate(names):
        points, (top, bottom) = axes[axis], panels[:, column]
        x = [point[axis] for point in points]
        for kind, colour, marker in (("forward", FORWARD, "o"), ("step", STEP, "s")):
            name = "forward" if kind == "forward" else "training step"
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
            top.plot(x, [point[f"{kind}_ratio"] for point in points], label=name, **style)
            for suffix, more in (("mb", style), ("explicit_mb", style | {"linewidth": 1.0, "linestyle": ":"})):
                if all(point[f"{kind}_{suffix}"] is not None for point in points):
                    label = name if suffix == "mb" else f"{name}, explicit"
                    bottom.plot(x, [max(point[f"{kind}_{suffix}"], 0.01) for point in points], label=label, **more)
        grey: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
        top.axhline(1.0, label="explicit convolutions", **grey)
        bottom.plot(x, [point["states_mb"] for point in points], label="one batch of states", **grey)
        fixed = ", ".join(f"{k} {v}" for k, v in asdict(base).items() if k != axis)
        top.set_title(f"against {axis}", fontsize=11, fontweight="bold", pad=17)
        top.annotate(fixed, (0.5, 1.025), xycoords="axes fraction", ha="center", fontsize=8, color=GREY)
        bottom.set_xlabel(units[axis])
        for panel in (top, bottom):
            _logarithmic(panel, x)
    for row, (what, unit) in enumerate((("time", "÷ explicit convolutions"), ("peak memory", "MB"))):
        panels[row, 0].set_ylabel(f"{what} ({unit})")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    fig.suptitle(title, fontsize=10)
    return fig


def _logarithmic(panel: Axes, ticks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.margins(x=0.08)
    panel.xaxis.set_major_locator(FixedLocator(list(ticks)))
    panel.xaxis.set_minor_locator(NullLocator())
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100.0 * low else (1.0,)))
    panel.yaxis.set_minor_locator(NullLocator())
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(which="major", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__, repeats=5)
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder (%(default)s)")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="which axes (all)")
    parser.add_argument("--memory-limit", type=float, default=8.0, metavar="GB", help="skip what needs more (8)")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds after which a contestant is done (30)")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    base, available = (QUICK_BASE, QUICK_AXES) if options.quick else (BASE, AXES)
    CONSOLE.print(facts(options.device))
    wanted = {axis: available[axis] for axis in options.axes}
    axes = sweep(wanted, base, 1e9 * options.memory_limit, options.repeats, options.budget, options.device)
    rows = [[f"{axis} {p[axis]}", p["states"], *(p[k] for k in COLUMNS)] for axis in axes for p in axes[axis]]
    show(f"SLL convolutions, float32, around {base}", ("point", "states", *COLUMNS.values()), rows)
    for method in sorted({p["method"] for points in axes.values() for p in points}):
        CONSOLE.print(f"solver: {method}")
    facts_of_run = machine(options.device)
    content = {"machine": facts_of_run, "dtype": "float32", "base": asdict(base), "axes": axes}
    write_json(options.json or options.out / "scaling.json", content)
    if any(axes.values()):
        matplotlib.use("Agg")
        where = f"{facts_of_run['device']}, {facts_of_run['threads']} threads, torch {facts_of_run['torch']}"
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / "scaling.png"
        figure(axes, base, f"Converted SLL convolutions against the explicit ones, float32 ({where})").savefig(
            target, dpi=150
        )
        CONSOLE.print(f"wrote {target}")


if __name__ == "__main__":
    main()
