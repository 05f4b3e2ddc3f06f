"""The figure of the demo: certified accuracy against the radius, one curve for each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .certify import RADII
from .files import whole
from .schema import DemoRow

# Okabe & Ito's palette, distinct for colour-blind readers; the line style says it once more, in print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)), ":")


def plot_certified_accuracy(rows: Sequence[DemoRow], path: str | Path, title: str) -> None:
    """Write a PNG, whole or not at all; dotted uprights mark the radii of the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for radius, label in zip(RADII, ("36/255", "72/255", "108/255", "1"), strict=True):
        axes.axvline(radius, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
        axes.text(radius, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color="0.35")
    ranked = sorted(rows, key=lambda row: sum(row.curve_accuracy), reverse=True)  # the legend reads as the curves lie
    order = {row.architecture: k for k, row in enumerate(rows)}
    for row in ranked:
        k = order[row.architecture]
        axes.plot(
            row.curve_radii,
            [100.0 * accuracy for accuracy in row.curve_accuracy],
            color=COLOURS[k % len(COLOURS)],
            linestyle=STYLES[k % len(STYLES)],
            linewidth=1.7,
            label=row.architecture,
        )
    axes.set_xlim(0.0, max(max(row.curve_radii) for row in rows))
    axes.set_ylim(0.0, 100.0)
    axes.set_xlabel("radius ε (l2, pixels in [0, 1])")
    axes.set_ylabel("certified accuracy (%)")
    axes.set_title(title, fontsize=11, pad=18)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(framealpha=1.0, edgecolor="none", fontsize=9, handlelength=3.2)
    with whole(path) as partial:
        figure.savefig(partial, format="png")
