"""Figures of one report: certified accuracy with its attack, margins against what is needed; and what other figures share.

Each is written as a PNG, those of a report also as SVG to stand inside a page, where CSS variables give the colours.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..certification.certify import RADII
from ..certification.documents import RobustnessReport
from ..foundation.files import whole

if TYPE_CHECKING:  # matplotlib is slow to import and most commands draw nothing
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, distinct for colour-blind readers; the line style says it once more, in print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), ":")
BLUE, VERMILION, GREEN, INK = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[6]
METHOD_LOOKS = {"prescribed": (VERMILION, "--"), "pairwise": (GREEN, "-."), "tightened": (BLUE, "-")}
PAPER, LABEL, RULE, GRID, BAND = "#FFFFFF", "#595959", "#BFBFBF", "#E6E6E6", "#DEDEDE"

# What a colour is for, and the name of the CSS variable that takes its place in a page.
VARIABLES = {
    BLUE: "--blue",
    VERMILION: "--vermilion",
    GREEN: "--green",
    INK: "--ink",
    LABEL: "--label",
    RULE: "--upright",
    GRID: "--grid",
    BAND: "--band",
    PAPER: "--paper",
}

BINS = 60
LONGEST = 40  # characters of a name in a legend
VIEW = 1.5  # what a curve does far beyond the radii asked for is not shown: up to this times the greatest


@dataclass(frozen=True)
class Layout:
    """``width`` and ``height`` in inches, ``text`` the size of labels in points, ``columns`` of a legend below."""

    width: float
    height: float
    text: float
    columns: int


WIDE = Layout(7.2, 4.5, 8.0, 3)
NARROW = Layout(4.6, 4.3, 7.5, 2)  # for a phone, where the wide one would be too small to read

Draw = Callable[["RobustnessReport", Layout], "Figure"]


def radius_name(radius: float) -> str:
    """A radius as it is usually written: 0.25, 1, 36/255; six digits if it is neither short nor a number of grey levels."""
    levels = 255.0 * radius
    if float(f"{radius:.3g}") != radius and abs(levels - round(levels)) < 1e-9 * max(levels, 1.0):
        return f"{round(levels)}/255"
    return f"{radius:.6g}"


def attacked_bounds(report: RobustnessReport) -> list[tuple[float, float]]:
    """[(r, a)]: from radius r on, robust accuracy is at most a; ascending from radius 0, empty without an attack.

    Robust accuracy cannot grow with the radius, so what an attack left at one radius bounds it at every greater one.
    At 0 it is the natural accuracy, of the attacked samples.
    """
    if report.attack is None:
        return []
    natural = report.natural_accuracy
    if report.attack.samples < report.samples:
        natural = sum(margin > 0.0 for margin in report.margins[: report.attack.samples]) / report.attack.samples
    return [(0.0, natural), *zip(report.radii, report.attack.attacked_accuracy, strict=True)]


def certified_of_first(report: RobustnessReport, samples: int, radii: Sequence[float]) -> list[float]:
    """Certified accuracy by the strongest method at some radii, of the first so many samples (an attack may take no more)."""
    chosen = report.sample_radii[:samples]
    return [sum(certified > radius for certified in chosen) / samples for radius in radii]


def plot_robustness(report: RobustnessReport, path: str | Path) -> None:
    """Certified accuracy against the radius by every method, what an attack left, and between them what is not known.

    The attack's line is a staircase: nothing is claimed between the radii it was run at (`attacked_bounds`). Dotted uprights
    mark the radii of the field. Writes a PNG, whole or not at all.
    """
    with look():
        write_png(draw_robustness(report, WIDE), path)


def plot_margins(report: RobustnessReport, path: str | Path) -> None:
    """Histogram of the margins; uprights mark the margin √2·L·ε that radius ε needs with the prescribed L.

    Margins of exactly 0 (ties, and solves that did not converge) are left out. Writes a PNG, whole or not at all.
    """
    with look():
        write_png(draw_margins(report, WIDE), path)


def inline_svg(draw: Draw, report: RobustnessReport, layout: Layout, name: str, label: str) -> str:
    """A figure as an <svg> element for an HTML page: the same for the same report, on a transparent ground.

    ``draw``: `draw_robustness` or `draw_margins`; ``name``: starts every id in it, so several figures can share a page;
    ``label``: the text for who does not see it. Colours are CSS variables (`VARIABLES`), with the PNG's for a default.
    """
    from html import escape

    with look({"svg.hashsalt": name, "svg.fonttype": "none"}), io.StringIO() as buffer:
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(report, layout).savefig(buffer, format="svg", transparent=True, metadata=nothing)
        svg = buffer.getvalue()
    width, height = 72.0 * layout.width, 72.0 * layout.height
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    svg = opening + svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    variables = {colour.lower(): variable for colour, variable in VARIABLES.items()}
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: f"var({variables[found[0]]}, {found[0]})", svg)


def draw_robustness(report: RobustnessReport, layout: Layout) -> Figure:
    """What `plot_robustness` writes."""
    figure, axes = axes_of(layout, "radius ε (l2, pixels in [0, 1])", "accuracy (%)")
    asked, known = max(report.radii), max(report.curve_radii)
    end = max(asked, min(known, VIEW * asked)) or known or 1.0
    bounds = attacked_bounds(report)
    if report.attack is not None:
        part = f" (first {report.attack.samples:,})" if report.attack.samples < report.samples else ""
        steps = [*bounds, (end, bounds[-1][1])]
        axes.plot(*_columns(steps), color=INK, linewidth=0.9, drawstyle="steps-post")
        marks = _columns(bounds[1:])
        # Rings, so that a certified point just below stays visible.
        axes.plot(
            *marks, "o", color=INK, fillstyle="none", markersize=7, clip_on=False, label=f"attacked{part}", zorder=4
        )
        radii, lower, upper = _unknown(report, report.attack.samples, steps)
        axes.fill_between(radii, lower, upper, color=BAND, linewidth=0.0, zorder=0.5, label=f"not known{part}")
    at_zero = [100.0 * report.natural_accuracy]
    axes.plot([0.0], at_zero, "D", color=INK, mfc=PAPER, markersize=6, clip_on=False, zorder=4, label="natural")
    for result in reversed(report.methods):  # the legend reads as the curves lie
        colour, style = METHOD_LOOKS[result.method]
        strongest = result is report.methods[-1]
        axes.plot(
            report.curve_radii,
            percent(result.curve_accuracy),
            color=colour,
            linestyle=style,
            linewidth=2.2 if strongest else 1.5,
            label=f"certified, {result.method}",
        )
        if strongest:
            dots = percent(result.certified_accuracy)
            axes.plot(report.radii, dots, "o", color=colour, markersize=4, clip_on=False)
    axes.set_xlim(0.0, end)
    axes.set_ylim(0.0, 100.0)
    uprights(axes, layout, {radius: radius_name(radius) for radius in RADII})
    _legend_below(figure, layout)
    return figure


def draw_margins(report: RobustnessReport, layout: Layout) -> Figure:
    """What `plot_margins` writes."""
    import numpy as np

    figure, axes = axes_of(layout, "margin: logit of the label less the largest other", "samples")
    known = np.array([margin for margin in report.margins if margin != 0.0])
    needed = {
        math.sqrt(2.0) * report.lipschitz * radius: radius_name(radius) for radius in report.radii if radius > 0.0
    }
    low, high = min(known.min(initial=0.0), 0.0), max(known.max(initial=0.0), 0.0)
    end = max([high, *(margin for margin in needed if margin <= 1.5 * high)])
    width = (end - low) / BINS or 1.0
    # Zero is an edge, so that no bar holds right and wrong ones; one more bin at either end, whatever width·k rounds to.
    edges = width * np.arange(math.floor(low / width) - 1, math.ceil(high / width) + 2)
    for chosen, colour, label in ((known > 0.0, BLUE, "right"), (known < 0.0, VERMILION, "wrong")):
        if chosen.any():
            axes.stairs(np.histogram(known[chosen], edges)[0], edges, fill=True, color=colour, label=label, zorder=2)
    axes.axvline(0.0, color=INK, linewidth=0.9, zorder=3)
    axes.set_xlim(low - 2.0 * width, end + 2.0 * width)
    axes.set_ylim(bottom=0.0)
    if not len(known):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no margins", transform=axes.transAxes, ha="center", va="center", color=LABEL)
    uprights(axes, layout, needed, INK, zorder=3)
    beyond = [name for margin, name in needed.items() if margin > axes.get_xlim()[1]]
    if beyond and len(known):
        axes.set_ylim(top=1.12 * axes.get_ylim()[1])  # room above the bars
        text = f"further right: {', '.join(beyond[:4])}{', …' if len(beyond) > 4 else ''} →"
        axes.text(1.0, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=layout.text, color=LABEL)
    _legend_below(figure, layout)
    return figure


def look(more: Mapping[str, str] | None = None) -> AbstractContextManager[None]:
    """matplotlib's own defaults, whatever the user's settings are, and some more."""
    from matplotlib import style

    return style.context(["default", dict(more or {})])


def figure_of(layout: Layout) -> Figure:
    """An empty figure, which no window is opened for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width, layout.height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_of(layout: Layout, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, named."""
    figure = figure_of(layout)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    bare(axes)
    return figure, axes


def bare(axes: Axes) -> None:
    """Horizontal lines behind what is drawn, and no frame above and to the right."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def uprights(axes: Axes, layout: Layout, places: Mapping[float, str], colour: str = RULE, zorder: float = 1) -> None:
    """Dotted lines within the limits, named above; a name that would run into another goes higher, or is left out."""
    left, right = axes.get_xlim()
    rows: list[float] = [-math.inf] * 3  # where the last name of each row ends, in points
    for place, name in sorted(places.items()):
        if not left <= place <= right:
            continue
        axes.axvline(place, color=colour, linewidth=0.8, linestyle=":", zorder=zorder)
        middle = (place - left) / (right - left) * 0.86 * 72.0 * layout.width
        half = 0.32 * layout.text * (len(name) + 0.5)
        free = [k for k, end in enumerate(rows) if middle - half >= end]
        if free:
            rows[free[0]] = middle + half
            axes.annotate(
                name,
                (place, 1.0),
                xytext=(0.0, 3.0 + 1.25 * layout.text * free[0]),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                fontsize=layout.text,
                color=LABEL,
            )


def _legend_below(figure: Figure, layout: Layout) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(layout.columns, len(handles) if len(handles) < 4 else (len(handles) + 1) // 2),
            frameon=False,
            fontsize=layout.text + 1.0,
            handlelength=3.0,
        )


def _unknown(
    report: RobustnessReport, attacked: int, steps: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float], list[float]]:
    """(radii, lower, upper), in %: what is certified of the attacked samples, and the staircase above, never crossing."""
    import numpy as np

    radii, upper = [], []
    for (start, accuracy), (stop, _) in pairwise(steps):
        inside = [start, *(radius for radius in report.curve_radii if start < radius < stop), stop]
        radii += inside
        upper += [accuracy] * len(inside)
    if attacked < report.samples:
        lower = certified_of_first(report, attacked, radii)
    else:
        lower = np.interp(radii, report.curve_radii, report.methods[-1].curve_accuracy).tolist()
    return radii, percent(lower), percent(max(pair) for pair in zip(lower, upper, strict=True))


def percent(accuracies: Iterable[float]) -> list[float]:
    """Accuracies in [0, 1] in %."""
    return [100.0 * accuracy for accuracy in accuracies]


def _columns(bounds: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [radius for radius, _ in bounds], percent(accuracy for _, accuracy in bounds)


def write_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with whole(path) as partial:
        figure.savefig(partial, format="png")
