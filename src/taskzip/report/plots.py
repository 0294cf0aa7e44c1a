"""Plots of a joint network: what each layer shares, what that saves, and what it costs (extra `plot`).

Figures are drawn with matplotlib's object interface on the Agg canvas, so that neither pyplot nor the user's settings
of a backend are touched. Colours differ in lightness too: the plots can be read in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taskzip.errors import InputError
from taskzip.files import replacing
from taskzip.zipped import LayerRecord, ZippedModel, installed, separate_parameters, spec_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Errors = Mapping[str, Mapping[str, float]]
"""Per stage ("before", "zipped", ...), the error of each task in percent."""

FIRST, SECOND, SHARED = "#e39f3b", "#cfe2f6", "#27496d"
"""Units of the first task alone, of the second alone, and of all tasks."""

OTHERS = ("#a8cfa0", "#e6bcd6", "#d9d2a6", "#b9b3dd")
"""Units of a third, fourth, ... task alone."""

PARTLY = "#7391b0"
"""Units that several tasks share, but not all."""

APART = "#c9c9c9"
DOTS = 150


def plot_zip(zipped: ZippedModel, path: str | Path, *, errors: Errors | None = None) -> None:
    """Write one PNG: units shared per layer, parameters per layer before and after, and the tasks' errors.

    Args:
        zipped: a joint network.
        path: the file to write; whole or not at all.
        errors: per stage, the error of each task in percent; without it there is no third panel.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    records = zipped.history.layers
    widths = [3.2, 3.2] if errors is None else [3.2, 3.2, 3.6]
    figure = blank_figure(1.2 * sum(widths), 1.4 + 0.62 * max(len(records), 4))
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    draw_sharing(axes[0], zipped)
    draw_parameters(axes[1], records, (separate_parameters(zipped), zipped.parameter_count()))
    axes[1].tick_params(labelleft=False)
    if errors is not None:
        draw_errors(axes[2], errors)
    save_figure(figure, path)


def draw_sharing(axes: Axes, zipped: ZippedModel) -> None:
    """One bar per layer: units of the first task alone, those shared, units of the others alone; together 100%."""
    first, *others = zipped
    some = f"shared by 2 to {len(others)}" if len(others) > 2 else "shared by 2"
    colours = {f"only {first}": FIRST, "shared": SHARED, some: PARTLY}
    colours |= {f"only {name}": (SECOND, *OTHERS)[i % (1 + len(OTHERS))] for i, name in enumerate(others)}
    if len(others) == 1:
        del colours[some]
    for row, record in enumerate(zipped.history.layers):
        parts = dict.fromkeys(colours, 0)
        for owners, units in owned_units(zipped, record).items():
            shared = "shared" if len(owners) == len(zipped) else some
            parts[f"only {owners[0]}" if len(owners) == 1 else shared] += units
        left = 0.0
        for owner, units in parts.items():
            width = 100 * units / sum(parts.values())
            axes.barh(row, width, left=left, height=0.62, color=colours[owner], edgecolor="white", linewidth=0.8)
            if width >= 6:
                ink = "white" if colours[owner] in (SHARED, PARTLY) else "black"
                axes.text(left + width / 2, row, str(units), ha="center", va="center", color=ink, fontsize=9)
            left += width
    _rows(axes, zipped.history.layers)
    axes.set(xlim=(0, 100), xlabel="units of the joint layer (%)")
    _legend(axes, colours, "Who owns the units")


def owned_units(zipped: ZippedModel, record: LayerRecord) -> dict[tuple[str, ...], int]:
    """How many units of a joint layer each set of tasks owns."""
    found = {}
    for task, name, alone in zip(zipped, record.names, record.units, strict=True):
        blocks = installed(zipped[task]).get(f"{name}.weight")
        for row in spec_of(blocks).rows if blocks else ():
            owners = tuple(row.blocks[0].name.partition("@")[0].split("+"))
            if len(owners) > 1:
                found[owners] = row.blocks[0].shape[0]
                alone -= row.blocks[0].shape[0]
        found[task,] = alone
    return found


def draw_parameters(axes: Axes, records: Sequence[LayerRecord], totals: tuple[int, int]) -> None:
    """Two bars per layer: the parameters of the separate networks together, and those of the joint layer.

    Args:
        axes: to draw on.
        records: one per layer.
        totals: of the whole networks, apart and together, for the legend; more than the layers' where there is
            batch-norm.
    """
    most = max((record.before for record in records), default=1)
    for row, record in enumerate(records):
        for offset, count, colour in ((-0.17, record.before, APART), (0.17, record.after, SHARED)):
            axes.barh(row + offset, count, height=0.32, color=colour)
            axes.text(count + 0.02 * most, row + offset, f"{count:,}", va="center", fontsize=8)
    _rows(axes, records)
    axes.set(xlim=(0, 1.22 * most), xlabel="parameters")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=4)
    _legend(axes, {f"apart {totals[0]:,}": APART, f"together {totals[1]:,}": SHARED}, "Parameters")


def draw_errors(axes: Axes, errors: Errors) -> None:
    """A group of bars per task, one bar per stage."""
    stages = list(errors)
    tasks = list(dict.fromkeys(task for stage in stages for task in errors[stage]))
    colours = _shades(len(stages))
    width = 0.8 / len(stages)
    for index, stage in enumerate(stages):
        for group, task in enumerate(tasks):
            x, value = group + (index - (len(stages) - 1) / 2) * width, errors[stage][task]
            axes.bar(x, value, width=0.92 * width, color=colours[index])
            axes.annotate(f"{value:.1f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("wrong on test data (%)")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    plain(axes)
    _legend(axes, dict(zip(stages, colours, strict=True)), "Test error")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written; whatever stood at `path` before still stands.
    """
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=DOTS)


def blank_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise InputError("plots need matplotlib, which is absent: pip install 'taskzip[plot]'") from error
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(width, height), layout=engine, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _rows(axes: Axes, records: Sequence[LayerRecord]) -> None:
    """Layers from top to bottom, named at the left."""
    axes.set_yticks(range(len(records)), [record.name for record in records])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    plain(axes)


def plain(axes: Axes) -> None:
    """Take the frame off at the top and at the right."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Axes, colours: Mapping[str, str], title: str) -> None:
    """The title, and below it, above the plot, what the colours mean."""
    from matplotlib.patches import Patch

    columns = min(len(colours), 3)
    lines = -(-len(colours) // columns)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8 + 16 * lines)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.985),
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=1,
        handletextpad=0.5,
        columnspacing=1.2,
        borderpad=0.2,
    )


def _shades(count: int) -> list[str]:
    """From light grey through to the colour of what is shared, as many as there are stages."""
    shades = [APART, "#7d9cbd", SHARED]
    if count <= 2:
        return [shades[0], SHARED][:count]
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("stages", shades)
    return [to_hex(ramp(i / (count - 1))) for i in range(count)]
