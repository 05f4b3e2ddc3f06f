"""The demo's figure: certified accuracy against the radius, a curve for each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..certification.certify import RADII
from ..escaping import printable
from ..reports.plotting import COLOURS, LONGEST, STYLES, WIDE, axes_of, look, percent, radius_name, uprights, write_png
from .documents import DemoRow


def plot_certified_accuracy(rows: Sequence[DemoRow], path: str | Path, title: str) -> None:
    """The demo's figure, one curve for each architecture; dotted uprights mark the radii of the table.

    Writes a PNG, whole or not at all.
    """
    with look():
        figure, axes = axes_of(WIDE, "radius ε (l2, pixels in [0, 1])", "certified accuracy (%)")
        # The legend reads as the curves lie.
        ranked = sorted(
            enumerate(rows), key=lambda pair: sum(pair[1].robustness.methods[-1].curve_accuracy), reverse=True
        )
        lines = []
        for k, row in ranked:
            lines += axes.plot(
                row.robustness.curve_radii,
                percent(row.robustness.methods[-1].curve_accuracy),
                color=COLOURS[k % len(COLOURS)],
                linestyle=STYLES[k % len(STYLES)],
                linewidth=1.7,
            )
        axes.set_xlim(0.0, max(max(row.robustness.curve_radii) for row in rows))
        axes.set_ylim(0.0, 100.0)
        uprights(axes, WIDE, {radius: radius_name(radius) for radius in RADII})
        axes.set_title(title, fontsize=11, pad=18)
        names = [row.architecture for _, row in ranked]
        # As they are: by themselves, labels from "_" on are left out, and what is between two $ is a formula.
        names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in map(printable, names)]
        legend = axes.legend(lines, names, framealpha=1.0, edgecolor="none", fontsize=9, handlelength=3.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        write_png(figure, path)
