"""The figure of a training run: loss and accuracies, epoch by epoch."""

from __future__ import annotations

from pathlib import Path

from ..reports.plotting import COLOURS, INK, RULE, STYLES, WIDE, bare, figure_of, look, percent, radius_name, write_png
from .documents import FinetuneReport


def plot_training(report: FinetuneReport, path: str | Path) -> None:
    """Loss, and natural and certified accuracy of the validation samples, epoch by epoch, as a PNG; the kept epoch marked."""
    from matplotlib.ticker import MaxNLocator

    with look():
        figure = figure_of(WIDE)
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
            style = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
            accuracy.plot(epochs, percent(values), label=label, linewidth=1.5, **style)
        accuracy.set_ylabel("validation accuracy (%)" if measured else "no validation data")
        accuracy.set_xlabel("epoch")
        accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (loss, accuracy):
            bare(axes)
            axes.axvline(report.kept, color=RULE, linewidth=0.8, linestyle=":", zorder=1)
        handles, labels = accuracy.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.0)
        write_png(figure, path)
