"""The summary of a joint network: one line per layer, one per task, in at most 100 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from taskzip.zipped.blocks import installed, spec_of
from taskzip.zipped.folding import listed
from taskzip.zipped.network import JointNetwork, LayerRecord
from taskzip.zipped.sizes import bytes_apart, bytes_together

WIDTH = 100

COST = "Cost: what sharing changes of a layer's outputs at least, in percent of their variance, before own scales."


def summary_table(zipped: JointNetwork) -> str:
    """Per layer: units of each task, shared units, cost, parameters before and after; the totals; FLOPs and bytes."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    before, after = separate_parameters(zipped), zipped.parameter_count()
    columns = (
        ("layer", "all parameters"),
        ("units", ""),
        ("shared", ""),
        ("cost", ""),
        ("before", f"{before:,}"),
        ("after", _amount(after, before)),
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
    lines = _lines(table)
    if any(record.relative_cost is not None for record in zipped.history.layers if record.shared):
        lines.append(_wrapped(COST))
    notes = [_wrapped(f"{r.name} stays private ({r.note}).") for r in zipped.history.layers if r.note]
    notes += [
        _wrapped(f"{name} keeps batch-norm private: {listed(private)}.")
        for name, private in zipped.history.settings.get("unfolded", {}).items()
        if private
    ]
    notes[:0] = [_wrapped(text) for text in (*_together(zipped), *_who_shares(zipped)) if text]
    weights = {p for weight in zipped.layer_weights() for p in weight}
    missing = sum(p.numel() for p in weights) - zipped.connection_count()
    if missing:
        apart = sum(zipped.history.settings["connections"].values())
        notes.insert(
            0, _wrapped(f"{apart:,} connections apart, {zipped.connection_count():,} together (weights not 0).")
        )
    notes[:0] = [_wrapped(_measured(step["measured"])) for step in zipped.history.later[-1:] if "measured" in step]
    answers = zipped.history.settings.get("answers")  # checkpoints of before do not have them
    if answers:
        notes.insert(0, _wrapped(_answered(answers)))
    search = zipped.history.settings.get("search")
    if search:
        notes.insert(0, _wrapped(certificate(search)))
    head = _wrapped(f"{' + '.join(zipped)}: {before:,} parameters apart, {after:,} together")
    return "\n".join([head, *lines, *_costs(zipped), *notes])


def _together(zipped: JointNetwork) -> Iterator[str]:
    """Which layers were put together, where tasks call them differently."""
    pairs = []
    for record in zipped.history.layers:
        others = [
            f"{name} ({task})" if len(zipped) > 2 else name
            for task, name in zip(zipped, record.names, strict=True)
            if name not in ("", record.name)
        ]
        if others and record.shared:
            pairs.append(f"{record.name} with {' and '.join(others)}")
    if pairs:
        yield f"Put together: {', '.join(pairs)}."


def _who_shares(zipped: JointNetwork) -> Iterator[str]:
    """Per layer, which of three or more tasks share how many units; alike layers are said once."""
    found: dict[str, list[str]] = {}
    for record in zipped.history.layers if len(zipped) > 2 else ():
        if record.groups:
            said = ", ".join(f"{'+'.join(tasks)} {units}" for tasks, units in record.groups)
            found.setdefault(said, []).append(record.name)
    if found:
        each = (f"{said} in {', '.join(names)}" for said, names in found.items())
        yield f"Shared units: {'; '.join(each)}."


def _costs(zipped: JointNetwork) -> list[str]:
    """FLOPs and bytes of each task's original network, of all of these, and together; FLOPs of each zipped task."""
    flops = zipped.history.settings.get("flops")  # checkpoints of before do not have them
    apart = {name: bytes_apart(network) for name, network in zipped.tasks.items()}
    columns = [("bytes", [*apart.values(), sum(apart.values())], bytes_together(zipped))]
    if flops:
        alone = [flops["tasks"][name] for name in zipped]
        given = [flops_apart(flops)[name] for name in zipped]
        columns.insert(0, ("FLOPs", [*given, sum(given)], flops_together(flops)))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for index, name in enumerate([*zipped, "all, apart"]):
        table.add_row(name, *(f"{numbers[index]:,}" for _, numbers, _ in columns))
    table.add_row("all, together", *(_amount(together, numbers[-1]) for _, numbers, together in columns))
    if not flops:
        return _lines(table)
    of = "each on its own input" if flops["together"] is None else "of zipped(x), one input for all tasks"
    notes = [_wrapped(f"FLOPs for one sample, a multiply-add is 2; together: {of}.")]
    if alone != given:
        by_itself = ", ".join(f"{name} {n:,}" for name, n in zip(zipped, alone, strict=True))
        notes.append(_wrapped(f"FLOPs of one task of the joint network by itself: {by_itself}."))
    return [*_lines(table), *notes]


def flops_apart(flops: Mapping[str, Any]) -> dict[str, int]:
    """Per task, FLOPs of the network that it was given as; of its zipped one where a checkpoint has no other."""
    return dict(flops.get("originals", flops["tasks"]))


def flops_together(flops: Mapping[str, Any]) -> int:
    """FLOPs of all tasks of the joint network: one input for all, or each on its own."""
    return int(sum(flops["tasks"].values()) if flops["together"] is None else flops["together"])


def _amount(amount: int, whole: int) -> str:
    return f"{amount:,} ({part_of(amount, whole)})" if whole else "0"


def part_of(amount: int, whole: int) -> str:
    """In percent."""
    return f"{amount / whole:.0%}" if whole else "0%"


def _lines(table: Table) -> list[str]:
    out = StringIO()
    Console(file=out, width=WIDTH).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


def certificate(search: Mapping[str, Any]) -> str:
    """What the share plan was searched for, and what was measured."""
    if "budget" in search:
        return f"Budget({search['budget']}): {search['parameters']:,} of at most {search['most']:,} parameters."
    measured = ", ".join(
        f"{name} {m['before']:.2f} to {m['after']:.2f} "
        f"({m['lost']:.2f} lost, at most {m['at_most']:.2f}; {m['samples']:,} samples)"
        for name, m in search["tasks"].items()
    )
    sure = "as measured" if search["confidence"] is None else f"{search['confidence']:.0%} sure"
    return f"MaxDrop({search['max_drop']:g}), {sure}, {search['evaluations']} evaluations: {measured}."


def _measured(measured: Mapping[str, Any]) -> str:
    """What `measure` found; it is said as long as nothing was done to the network since."""
    found = (
        f"{name} {m['before']:.2f} to {m['after']:.2f} ({m['metric']}; {m['samples']:,} samples)"
        for name, m in measured.items()
    )
    return f"Measured on held-out data: {', '.join(found)}."


def _answered(answers: Mapping[str, Any]) -> str:
    """How far the tasks' answers were from their own networks' when they were zipped."""
    found = ", ".join(f"{name} {how_far(each)}" for name, each in answers.items())
    samples = max(each["samples"] for each in answers.values())
    return f"Error on {samples:,} calibration samples when zipped, a constant answer's being 1: {found}."


def how_far(answers: Mapping[str, Any]) -> str:
    """The squared error relative to that of a constant answer, and how many classes are the same."""
    if answers["error"] is None:
        return "unknown, as its answers are constant"
    alike = "" if answers["alike"] is None else f" ({answers['alike']:.1%} of the classes alike)"
    return f"{answers['error']:.2g}{alike}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def separate_parameters(zipped: JointNetwork) -> int:
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
    return record.name, units, str(record.shared), cost_of(record), f"{record.before:,}", f"{record.after:,}"


def cost_of(record: LayerRecord) -> str:
    """What sharing a layer cost, in percent of the variance of its outputs; the bare sum in checkpoints of before."""
    if not record.shared:
        return "-"
    return f"{record.cost:.3g}" if record.relative_cost is None else f"{record.relative_cost:.1%}"
