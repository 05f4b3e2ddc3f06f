"""Figures: certified accuracy of the demo's architectures, and of one report with its attack; margins against what is needed;
the epochs of a training run.

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
from ..escaping import printable
from ..foundation.files import whole
from ..schema import DemoRow, FinetuneReport, RobustnessReport

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


def plot_certified_accuracy(rows: Sequence[DemoRow], path: str | Path, title: str) -> None:
    """The demo's figure, one curve for each architecture; dotted uprights mark the radii of the table.

    Writes a PNG, whole or not at all.
    """
    with _look():
        figure, axes = _axes(WIDE, "radius ε (l2, pixels in [0, 1])", "certified accuracy (%)")
        # The legend reads as the curves lie.
        ranked = sorted(
            enumerate(rows), key=lambda pair: sum(pair[1].robustness.methods[-1].curve_accuracy), reverse=True
        )
        lines = []
        for k, row in ranked:
            lines += axes.plot(
                row.robustness.curve_radii,
                _percent(row.robustness.methods[-1].curve_accuracy),
                color=COLOURS[k % len(COLOURS)],
                linestyle=STYLES[k % len(STYLES)],
                linewidth=1.7,
            )
        axes.set_xlim(0.0, max(max(row.robustness.curve_radii) for row in rows))
        axes.set_ylim(0.0, 100.0)
        _uprights(axes, WIDE, {radius: radius_name(radius) for radius in RADII})
        axes.set_title(title, fontsize=11, pad=18)
        names = [row.architecture for _, row in ranked]
        # As they are: by themselves, labels from "_" on are left out, and what is between two $ is a formula.
        names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in map(printable, names)]
        legend = axes.legend(lines, names, framealpha=1.0, edgecolor="none", fontsize=9, handlelength=3.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        _write(figure, path)


def plot_robustness(report: RobustnessReport, path: str | Path) -> None:
    """Certified accuracy against the radius by every method, what an attack left, and between them what is not known.

    The attack's line is a staircase: nothing is claimed between the radii it was run at (`attacked_bounds`). Dotted uprights
    mark the radii of the field. Writes a PNG, whole or not at all.
    """
    with _look():
        _write(draw_robustness(report, WIDE), path)


def plot_margins(report: RobustnessReport, path: str | Path) -> None:
    """Histogram of the margins; uprights mark the margin √2·L·ε that radius ε needs with the prescribed L.

    Margins of exactly 0 (ties, and solves that did not converge) are left out. Writes a PNG, whole or not at all.
    """
    with _look():
        _write(draw_margins(report, WIDE), path)


def plot_training(report: FinetuneReport, path: str | Path) -> None:
    """Loss, and natural and certified accuracy of the validation samples, epoch by epoch, as a PNG; the kept epoch marked."""
    from matplotlib.ticker import MaxNLocator

    with _look():
        figure = _figure(WIDE)
        loss, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        trained = [record for record in report.history if record.loss is not None]
        loss.plot([r.epoch for r in trained], [r.loss for r in trained], color=INK, marker=".", linewidth=1.2)
        loss.set_ylabel("loss")
        # As many ticks whatever the height: labels that get wider with the layout would push this one off the figure.
        loss.yaxis.set_major_locator(MaxNLocator(4))
        measured = [record for record in report.history if record.natural_accuracy is not None]
        epochs = [record.epoch for record in measured]
        lines = {"natural": [record.natural_accuracy or 0.0 for record in measured]}
        for k, radius in enumerate(report.config.radii):
            lines[f"certified at {radius_name(radius)}"] = [record.certified_accuracy[k] for record in measured]
        for k, (label, values) in enumerate(lines.items()):
            look = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
            accuracy.plot(epochs, _percent(values), label=label, linewidth=1.5, **look)
        accuracy.set_ylabel("validation accuracy (%)" if measured else "no validation data")
        accuracy.set_xlabel("epoch")
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (loss, accuracy):
            _bare(axes)
            axes.axvline(report.kept, color=RULE, linewidth=0.8, linestyle=":", zorder=1)
        handles, labels = accuracy.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.0)
        _write(figure, path)


def inline_svg(draw: Draw, report: RobustnessReport, layout: Layout, name: str, label: str) -> str:
    """A figure as an <svg> element for an HTML page: the same for the same report, on a transparent ground.

    ``draw``: `draw_robustness` or `draw_margins`; ``name``: starts every id in it, so several figures can share a page;
    ``label``: the text for who does not see it. Colours are CSS variables (`VARIABLES`), with the PNG's for a default.
    """
    from html import escape

    with _look({"svg.hashsalt": name, "svg.fonttype": "none"}), io.StringIO() as buffer:
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
    figure, axes = _axes(layout, "radius ε (l2, pixels in [0, 1])", "accuracy (%)")
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
            _percent(result.curve_accuracy),
            color=colour,
            linestyle=style,
            linewidth=2.2 if strongest else 1.5,
            label=f"certified, {result.method}",
        )
        if strongest:
            dots = _percent(result.certified_accuracy)
            axes.plot(report.radii, dots, "o", color=colour, markersize=4, clip_on=False)
    axes.set_xlim(0.0, end)
    axes.set_ylim(0.0, 100.0)
    _uprights(axes, layout, {radius: radius_name(radius) for radius in RADII})
    _legend_below(figure, layout)
    return figure


def draw_margins(report: RobustnessReport, layout: Layout) -> Figure:
    """What `plot_margins` writes."""
    import numpy as np

    figure, axes = _axes(layout, "margin: logit of the label less the largest other", "samples")
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
    _uprights(axes, layout, needed, INK, zorder=3)
    beyond = [name for margin, name in needed.items() if margin > axes.get_xlim()[1]]
    if beyond and len(known):
        axes.set_ylim(top=1.12 * axes.get_ylim()[1])  # room above the bars
        text = f"further right: {', '.join(beyond[:4])}{', …' if len(beyond) > 4 else ''} →"
        axes.text(1.0, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=layout.text, color=LABEL)
    _legend_below(figure, layout)
    return figure


def _look(more: Mapping[str, str] | None = None) -> AbstractContextManager[None]:
    """matplotlib's own defaults, whatever the user's settings are, and some more."""
    from matplotlib import style

    return style.context(["default", dict(more or {})])


def _figure(layout: Layout) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width, layout.height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(layout: Layout, x: str, y: str) -> tuple[Figure, Axes]:
    figure = _figure(layout)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _bare(axes)
    return figure, axes


def _bare(axes: Axes) -> None:
    """Horizontal lines behind what is drawn, and no frame above and to the right."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _uprights(axes: Axes, layout: Layout, places: Mapping[float, str], colour: str = RULE, zorder: float = 1) -> None:
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
    return radii, _percent(lower), _percent(max(pair) for pair in zip(lower, upper, strict=True))


def _percent(accuracies: Iterable[float]) -> list[float]:
    return [100.0 * accuracy for accuracy in accuracies]


def _columns(bounds: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [radius for radius, _ in bounds], _percent(accuracy for _, accuracy in bounds)


def _write(figure: Figure, path: str | Path) -> None:
    with whole(path) as partial:
        figure.savefig(partial, format="png")
