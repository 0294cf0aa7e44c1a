"""The model card of a joint network: what was merged, from what, how, and what that was measured to cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from taskzip.zipped.blocks import original_class
from taskzip.zipped.network import JointNetwork
from taskzip.zipped.sizes import bytes_apart, bytes_together
from taskzip.zipped.summary import COST, certificate, cost_of, flops_apart, flops_together, part_of, separate_parameters

_FRONT = """\
---
library_name: taskzip
tags:
- taskzip
- merge
- multi-task
- pytorch
---
"""

_FOUND = ("samples", "folded", "unfolded", "pruned", "connections", "flops", "search")
"""What `zip` found out; the other settings are those that it was given."""


def model_card(zipped: JointNetwork, source: str) -> str:
    """Markdown with the YAML that the Hugging Face Hub reads; `source` is where the network is loaded from."""
    before, after = separate_parameters(zipped), zipped.parameter_count()
    sections = [
        f"{_FRONT}\n# {' + '.join(zipped)}",
        f"One network for {len(zipped)} tasks, made of {len(zipped)} trained networks by taskzip {version('taskzip')}: "
        f"{after:,} parameters instead of {before:,} ({part_of(after, before)}).",
        f"## What was merged\n\n{_merged(zipped)}",
        f"## What it costs\n\n{_cost(zipped)}",
        f"## How\n\n{_how(zipped)}",
        f"## Layers\n\n{_layers(zipped)}",
        f"## Use\n\n{_use(zipped, source)}",
    ]
    return "\n\n".join(sections) + "\n"


def _merged(zipped: JointNetwork) -> str:
    """Tasks, the classes of their networks, sizes, and how much data they were calibrated on."""
    settings = zipped.history.settings
    samples, flops = settings.get("samples", {}), settings.get("flops")
    apart = {name: bytes_apart(network) for name, network in zipped.tasks.items()}
    rows = []
    for name, network in zipped.tasks.items():
        counted = f"{flops_apart(flops)[name]:,}" if flops else "not counted"
        seen = f"{samples[name]:,}" if name in samples else "not known"
        rows.append([name, f"`{class_name(network)}`", f"{apart[name]:,}", counted, seen])
    whole = sum(apart.values())
    joint = bytes_together(zipped)
    rows.append(["together", "", f"{joint:,} ({part_of(joint, whole)})", _flops_together(flops), ""])
    table = _table(["task", "network", "bytes", "FLOPs", "calibration samples"], rows)
    return (
        f"{table}\n\nFLOPs are those of one sample's forward pass; a multiply-add is 2. A task's are those of the "
        f"network that was merged."
    )


def _flops_together(flops: Mapping[str, Any] | None) -> str:
    if not flops:
        return "not counted"
    together, apart = flops_together(flops), sum(flops_apart(flops).values())
    on = "each on its own input" if flops["together"] is None else "one input for all"
    return f"{together:,} ({part_of(together, apart)}), {on}"


def _cost(zipped: JointNetwork) -> str:
    """The last measurement, or that there is none; and whether the weights have changed since."""
    history = zipped.history
    last = max((i for i, step in enumerate(history.later) if "measured" in step), default=-1)
    search = history.settings.get("search", {})
    if last >= 0:
        rows = [
            [name, m["metric"], f"{m['samples']:,}", *(f"{m[k]:.2f}" for k in ("before", "after")), _lost(m)]
            for name, m in history.later[last]["measured"].items()
        ]
        said = _table(["task", "metric", "held-out samples", "own network", "joint network", "lost"], rows)
    elif "tasks" in search:
        said = f"Measured on held-out data while the sharing was searched for. {certificate(search)}"
    else:
        return "Not measured. (`taskzip.measure` measures it, and the next card says what it found.)"
    if any("retrained" in step for step in history.later[last + 1 :]):
        said += "\n\nThis was measured before the network was retrained for the last time."
    return said


def _lost(measured: Mapping[str, Any]) -> str:
    return f"{round(measured['before'] - measured['after'], 2) + 0.0:.2f}"  # + 0.0 turns -0.0 into 0.0


def _how(zipped: JointNetwork) -> str:
    """The settings of `zip`, what was searched for, and what was done afterwards."""
    settings = zipped.history.settings
    given = {k: v for k, v in settings.items() if k not in _FOUND}
    parts = [_table(["`tz.zip`", ""], [[f"`{k}`", f"`{json.dumps(v)}`"] for k, v in given.items()])]
    if "search" in settings:
        parts.append(f"The sharing was searched for. {certificate(settings['search'])}")
    for step in zipped.history.later:
        (what, amount), *more = step.items()
        if what != "measured":
            parts.append(f"Then {what}: {amount} ({', '.join(f'{k}: {json.dumps(v)}' for k, v in more)}).")
    return "\n\n".join(parts)


def _layers(zipped: JointNetwork) -> str:
    rows = []
    for r in zipped.history.layers:
        units = " / ".join(map(str, dict.fromkeys(r.units)))
        rows.append([r.name, units, str(r.shared), cost_of(r), f"{r.before:,}", f"{r.after:,}", r.note])
    head = ["layer", "units", "shared", "cost", "parameters apart", "together", "private because"]
    return f"{_table(head, rows)}\n\n{COST}"


def _use(zipped: JointNetwork, source: str) -> str:
    names = {name: class_name(network).rpartition(".")[2] for name, network in zipped.tasks.items()}
    models = ", ".join(f'"{name}": {cls}(...)' for name, cls in names.items())
    first = next(iter(zipped))
    return "\n".join(
        (
            "The networks are read for their structure only: make them as they were made before training.",
            "",
            "```python",
            "import taskzip as tz",
            "",
            f"zipped = tz.from_pretrained({json.dumps(source)}, {{{models}}})",
            f'output = zipped["{first}"](x)  # the same call and output as the original network',
            "```",
        )
    )


def class_name(network: Any) -> str:
    """The class that a network had before zipping, with its module."""
    original = original_class(network)
    return f"{original.__module__}.{original.__qualname__}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_table_lines([titles, ["---"] * len(titles), *rows]))


def _table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
