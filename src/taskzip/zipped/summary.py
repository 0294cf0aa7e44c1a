"""The summary of a joint network: one line per layer, in at most 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from taskzip.zipped.blocks import installed, spec_of
from taskzip.zipped.model import LayerRecord, ZippedModel

WIDTH = 100


def summary_table(zipped: ZippedModel) -> str:
    """Per layer: units of each task, shared units, cost, parameters before and after; then the totals."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    before, after = separate_parameters(zipped), zipped.parameter_count()
    saved = f"{after:,} ({after / before:.0%})" if before else "0"
    columns = (
        ("layer", "all parameters"),
        ("units", ""),
        ("shared", ""),
        ("cost", ""),
        ("before", f"{before:,}"),
        ("after", saved),
    )
    for title, footer in columns:
        left = title == "layer"
        table.add_column(
            title,
            footer,
            justify="left" if left else "right",
            overflow="fold" if left else "ellipsis",
            no_wrap=not left,
        )
    for record in zipped.history.layers:
        table.add_row(*_row(record))
    out = StringIO()
    Console(file=out, width=WIDTH).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    notes = [_wrapped(f"{r.name} stays private ({r.note}).") for r in zipped.history.layers if r.note]
    weights = {p for weight in zipped.layer_weights() for p in weight}
    missing = sum(p.numel() for p in weights) - zipped.connection_count()
    if missing:
        apart = sum(zipped.history.settings["connections"].values())
        notes.insert(
            0, _wrapped(f"{apart:,} connections apart, {zipped.connection_count():,} together (weights not 0).")
        )
    search = zipped.history.settings.get("search")
    if search:
        notes.insert(0, _wrapped(_certificate(search)))
    head = _wrapped(f"{' + '.join(zipped)}: {before:,} parameters apart, {after:,} together")
    return "\n".join([head, *[line for line in lines if line], *notes])


def _certificate(search: Mapping[str, Any]) -> str:
    """What the share plan was searched for, and what was measured."""
    if "budget" in search:
        return f"Budget({search['budget']}): {search['parameters']:,} of at most {search['most']:,} parameters."
    measured = ", ".join(
        f"{name} {m['before']:.2f} to {m['after']:.2f} "
        f"({m['lost']:.2f} lost, at most {m['at_most']:.2f}; {m['samples']:,} samples)"
        for name, m in search["tasks"].items()
    )
    sure = f"{search['confidence']:.0%} sure"
    return f"MaxDrop({search['max_drop']:g}), {sure}, {search['evaluations']} evaluations: {measured}."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def separate_parameters(zipped: ZippedModel) -> int:
    """Parameters of all tasks' networks if each had its own, dense ones."""
    total = 0
    for network in zipped.tasks.values():
        blocks = installed(network)
        inside = {p for b in blocks.values() for p in b.parameters()}
        total += sum(p.numel() for p in set(network.parameters()) - inside)
        total += sum(math.prod(spec_of(b).dense_shape) for b in blocks.values())
    return total


def _row(record: LayerRecord) -> tuple[str, ...]:
    units = " / ".join(map(str, dict.fromkeys(record.units)))
    cost = f"{record.cost:.3g}" if record.shared else "-"
    return record.name, units, str(record.shared), cost, f"{record.before:,}", f"{record.after:,}"
