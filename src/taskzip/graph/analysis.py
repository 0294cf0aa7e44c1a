"""Read a network: torch.export -> units along every axis -> layers and spaces (design 2.2).

Nothing of the network is rewritten: the graph is for understanding only, execution stays with the user's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from taskzip.errors import GraphError
from taskzip.graph._rules import apply_rule, arguments, none_of
from taskzip.graph._units import PINNED, Ids
from taskzip.graph._values import Call, Context, Value, shape_of
from taskzip.graph.structure import BatchNormNames, Layer, Space, Structure

Forward = Callable[[nn.Module, Any], Any]


class _Called(nn.Module):
    """The network as the task calls it, one argument in, whatever it returns out."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return self._forward(self.model, batch)


def analyse(model: nn.Module, batch: Any, forward: Forward) -> Structure:
    """Find the layers of `model` and the spaces of units that may be re-ordered.

    Args:
        model: the network, in eval mode.
        batch: one batch of data, as `forward(model, batch)` takes it.
        forward: how the network is called.

    Raises:
        GraphError: torch.export cannot follow the network; the message holds its reason.
    """
    program = _exported(model, batch, forward)
    names = _canonical_names(model)
    c = Context()
    sources = _sources(program, names)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in sources:
                c.add_parameter(node, sources[node.name])
            else:
                c.values[node] = Value(none_of(node), raw=True)  # type: ignore[arg-type]
        elif node.op == "call_function":
            raw = all(v.raw for n in node.all_input_nodes for v in _flat(c.values[n]))
            found = len(c.calls)
            out = apply_rule(c, node)
            raw = raw and len(c.calls) == found
            c.values[node] = [Value(v, raw) for v in out] if isinstance(out, list) else Value(out, raw)
        elif node.op == "get_attr":
            c.values[node] = Value(none_of(node), raw=True)  # type: ignore[arg-type]
        elif node.op == "output":
            for result in node.all_input_nodes:
                c.pin_value(result, "an output of the network")
    return _structure(c, c.parameters, sources)


def _exported(model: nn.Module, batch: Any, forward: Forward) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(_Called(model, forward), (batch,), strict=False)
    except Exception as error:  # torch.export raises whatever the network raises, and a dozen classes of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"{type(model).__name__} cannot be followed by torch.export on a batch of {_shapes(batch)}: {reason[0]} "
            f"(data-dependent control flow and inputs of the wrong shape are the usual causes)."
        ) from error


def _shapes(batch: Any) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "no tensors"


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or persistent buffer -> the first name of the same tensor (tied weights)."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[name] = first.setdefault(id(tensor), name)
    return names


def _sources(program: Any, names: dict[str, str]) -> dict[str, str]:
    """Placeholder -> canonical name, for what can be re-ordered: parameters, and buffers that checkpoints keep."""
    signature = program.graph_signature
    known = signature.inputs_to_parameters | signature.inputs_to_buffers
    names = {f"model.{name}": canonical for name, canonical in names.items()}
    return {place: names[name] for place, name in known.items() if name in names}


def _flat(value: Value | list[Value]) -> list[Value]:
    return value if isinstance(value, list) else [value]


def _structure(c: Context, axes: Mapping[str, Sequence[Ids | None]], sources: dict[str, str]) -> Structure:
    _same_occurrences(c, axes)
    rooted = {name: tuple(None if a is None else c.units.roots(a) for a in each) for name, each in axes.items()}
    calls: dict[str, list[Call]] = {}
    for call in c.calls:
        if call.weight.name in sources:
            calls.setdefault(sources[call.weight.name], []).append(call)
    spaces, space_of_class = _spaces(c, rooted, list(calls))
    writers: dict[int, list[str]] = {}
    for weight, uses in calls.items():
        if uses[0].groups == 1:
            for k in set(c.units.classes(_rows(rooted, weight)).tolist()):
                writers.setdefault(k, []).append(weight)
    layers = []
    for weight, uses in calls.items():
        rows = _rows(rooted, weight)
        kinds = set(c.units.classes(rows).tolist())
        pinned = _pinned(c, rows, uses, [w for k in kinds for w in writers.get(k, ()) if w != weight])
        kind = kinds.pop()
        first = uses[0]
        columns = None if first.reads is None else c.units.roots(first.reads)
        shape = shape_of(first.weight)
        layers.append(
            Layer(
                name=weight.removesuffix(".weight"),
                weight=weight,
                bias=None if first.bias is None else sources.get(first.bias.name),
                kind=first.kind,
                units=shape[0],
                inputs=shape[1],
                kernel=shape[2:],
                calls=len(uses),
                space=None if pinned else space_of_class[kind],
                columns=columns,
                reads_input=all(call.raw for call in uses) and columns is None,
                pinned=pinned,
                solvable=first.groups == 1,
                batch_norm=_batch_norm(c, uses, sources),
            )
        )
    return Structure(tuple(layers), spaces, rooted)


def _rows(axes: Mapping[str, Sequence[Ids | None]], weight: str) -> Ids:
    rows = axes[weight][0]
    return np.empty(0, np.int64) if rows is None else rows


def _same_occurrences(c: Context, axes: Mapping[str, Sequence[Ids | None]]) -> None:
    """Units are alike only if they occur equally often along every axis."""
    for each in axes.values():
        for ids in each:
            if ids is not None:
                units, counts = np.unique(c.units.roots(ids), return_counts=True)
                c.units.split(units, counts.tolist())


def _spaces(
    c: Context, axes: Mapping[str, Sequence[Ids | None]], weights: list[str]
) -> tuple[tuple[Space, ...], dict[int, int]]:
    """The classes of more than one unit that can move, numbered in the order of the layers that compute them."""
    members: dict[int, dict[int, None]] = {}
    rows = [axes[w][0] for w in weights]
    others = [ids for each in axes.values() for ids in each]
    for ids in rows + others:
        if ids is not None:
            for unit, k in zip(ids.tolist(), c.units.classes(ids).tolist(), strict=True):
                if k != PINNED:
                    members.setdefault(k, {})[unit] = None
    movable = {k: units for k, units in members.items() if len(units) > 1}
    return tuple(Space(np.array(list(units))) for units in movable.values()), {k: i for i, k in enumerate(movable)}


def _pinned(c: Context, rows: Ids, uses: list[Call], other_writers: list[str]) -> str:
    """Why the units of a layer cannot be paired with another network's, or ""."""
    if len(rows) < 2:
        return "a single unit"
    classes = set(c.units.classes(rows).tolist())
    if uses[0].groups > 1:
        return "a grouped convolution"
    if PINNED in classes:
        return next((c.units.reasons[r] for r in rows.tolist() if r in c.units.reasons), "fixed order")
    if len(classes) > 1:
        return "its units are used in different ways"
    if other_writers:
        return f"adds to the units of {other_writers[0].removesuffix('.weight')}"
    return ""


def _batch_norm(c: Context, uses: list[Call], sources: dict[str, str]) -> BatchNormNames | None:
    """The batch-norm on the layer's output, if that is all that reads it and its statistics can be set."""
    node: Node = uses[0].node
    after = c.followed_by.get(node)
    if len(uses) > 1 or after is None or len(node.users) > 1:
        return None
    a = arguments(after)
    if a["running_mean"] is None or a["training"]:
        return None
    return BatchNormNames(sources[a["running_mean"].name], sources[a["running_var"].name], float(a["eps"]))
