"""Curves side by side, one panel each (extra `plot`); lines differ in shade and dash, so that they read in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from taskzip.report.plots import blank_figure, plain, save_figure

Curve = Sequence[tuple[float, float]]
"""Points (x, y) in ascending order of x."""

STYLES = (("#9a9a9a", ":"), ("#e39f3b", "--"), ("#27496d", "-"))
"""Colour and dash of the first, second, ... line; from the lightest to the darkest."""


def plot_curves(panels: Mapping[str, Mapping[str, Curve]], path: str | Path, *, x: str, y: str) -> None:
    """Write one PNG with a panel per title, each with its lines by name.

    Args:
        panels: per title, per line, its points; every panel has the same lines, three at most.
        path: the file; whole or not at all.
        x, y: what the axes say.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = blank_figure(4.6 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for (name, curve), (colour, dash) in zip(lines.items(), STYLES, strict=False):
            axis.plot(*zip(*curve, strict=True), dash, color=colour, label=name, linewidth=1.8)
        axis.set(xlabel=x, ylabel=y)
        axis.set_ylim(bottom=0)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        plain(axis)
    axes[0].legend(frameon=False)
    save_figure(figure, path)
