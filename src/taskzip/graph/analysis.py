"""Read a network: torch.export -> units along every axis -> layers and spaces (design 2.2).

Nothing of the network is rewritten: the graph is for understanding only, execution stays with the user's modules.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from taskzip.errors import GraphError
from taskzip.graph._rules import apply_rule, arguments, none_of, op_name
from taskzip.graph._units import PINNED, Ids, SettledUnits
from taskzip.graph._values import Axes, Call, Context, Value, flat, shape_of
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
        GraphError: torch.export cannot follow the network; the message holds its reason and the line.
    """
    program = _exported(model, batch, forward)
    names = _sources(program, model)
    return _Reading(_read(program, names), names, {name for name, _ in model.named_parameters()}).structure()


def _exported(model: nn.Module, batch: Any, forward: Forward) -> Any:
    try:
        with torch.no_grad():
            return torch.export.export(_Called(model, forward), (batch,), strict=False)
    except Exception as error:  # torch.export raises whatever the network raises, and a dozen classes of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"{type(model).__name__} cannot be followed by torch.export on a batch of {_shapes(batch)}: "
            f"{reason[0].rstrip('.')}{_place(error)}. Data-dependent control flow and inputs of the wrong shape are the "
            f"usual causes."
        ) from error


def _shapes(batch: Any) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "no tensors"


def _place(error: Exception) -> str:
    """The line of the user's own code where an error came up."""
    libraries = [Path(torch.__file__).parent, Path(__file__).parents[1]]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.line and not any(library in Path(frame.filename).parents for library in libraries):
            return f', at "{frame.line}" ({frame.filename}:{frame.lineno})'
    return ""


def _sources(program: Any, model: nn.Module) -> dict[str, str]:
    """Placeholder -> name, for what can be re-ordered: parameters, and buffers that checkpoints keep.

    Tied weights go by the first of their names.
    """
    first: dict[int, str] = {}
    names = {f"model.{k}": first.setdefault(id(t), k) for k, t in model.state_dict(keep_vars=True).items()}
    signature = program.graph_signature
    known = signature.inputs_to_parameters | signature.inputs_to_buffers
    return {place: names[name] for place, name in known.items() if name in names}


def _read(program: Any, names: dict[str, str]) -> Context:
    """Walk the graph in the order of execution and collect what it says of units."""
    c = Context()
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            c.add_parameter(node, names[node.name])
        elif node.op in ("placeholder", "get_attr"):
            c.values[node] = _value(none_of(node), raw=True)
        elif node.op == "call_function":
            calls = len(c.calls)
            axes = apply_rule(c, node)
            raw = all(v.raw for n in node.all_input_nodes for v in flat(c.values[n]))
            c.values[node] = _value(axes, raw and len(c.calls) == calls)
        elif node.op == "output":
            for result in node.all_input_nodes:
                c.pin_value(result, "an output of the network")
    return c


def _value(axes: Axes | list[Axes], raw: bool) -> Value | list[Value]:
    return [Value(each, raw) for each in axes] if isinstance(axes, list) else Value(axes, raw)


class _Reading:
    """From what the graph said to layers and spaces.

    Attributes:
        names: placeholder -> name.
        axes: per tensor, per axis, the units, or None where the order is fixed.
        uses: per weight, every call that reads it, in the order in which the layers run.
    """

    def __init__(self, c: Context, names: dict[str, str], parameters: set[str]) -> None:
        self.c = c
        self.names = names
        self.parameters = parameters
        self.units: SettledUnits = c.units.settle()
        self.axes = {
            name: tuple(None if ids is None else self.units.roots(ids) for ids in each)
            for name, each in c.parameters.items()
        }
        self.uses: dict[str, list[Call]] = {}
        for call in c.calls:
            weight = self.parameter(call.weight)
            if weight is not None:
                self.uses.setdefault(weight, []).append(call)

    def structure(self) -> Structure:
        spaces, space_of = self.spaces()
        layers = (self.layer(weight, uses, space_of) for weight, uses in self.uses.items())
        return Structure(tuple(layers), spaces, self.axes)

    def spaces(self) -> tuple[tuple[Space, ...], dict[int, int]]:
        """The classes of more than one unit that can move, numbered in the order of the layers that compute them."""
        spaces: list[Space] = []
        space_of: dict[int, int] = {}
        rows = [self.rows(weight) for weight in self.uses]
        for ids in rows + [ids for each in self.axes.values() for ids in each if ids is not None]:
            kinds = self.units.classes(ids)
            for kind in dict.fromkeys(kinds.tolist()):
                if kind != PINNED and kind not in space_of:
                    here = ids[kinds == kind]
                    units = here[np.sort(np.unique(here, return_index=True)[1])]
                    if len(units) > 1:
                        space_of[kind] = len(spaces)
                        spaces.append(Space(units))
        return tuple(spaces), space_of

    def layer(self, weight: str, uses: list[Call], space_of: dict[int, int]) -> Layer:
        first = uses[0]
        units, inputs, *kernel = shape_of(first.weight)
        columns = None if first.reads is None else self.units.roots(first.reads)
        entangled = self.entangled(weight, uses)
        pinned = self.pinned(weight, uses, entangled)
        return Layer(
            name=weight.removesuffix(".weight"),
            weight=weight,
            bias=self.parameter(first.bias),
            kind=first.kind,
            units=units,
            inputs=inputs,
            kernel=tuple(kernel),
            calls=len(uses),
            space=None if pinned else space_of[self.kinds(weight)[0]],
            columns=columns,
            reads_input=all(call.raw for call in uses) and columns is None,
            pinned=pinned,
            solvable=first.groups == 1 and not entangled,
            batch_norm=self.batch_norm(uses),
        )

    def pinned(self, weight: str, uses: list[Call], entangled: str) -> str:
        """Why the units of a layer cannot be paired with another network's, or ""."""
        rows, kinds = self.rows(weight), self.kinds(weight)
        if shape_of(uses[0].weight)[0] == 1:
            return "a single unit"
        if uses[0].groups > 1:
            return "a grouped convolution"
        if entangled:
            return entangled
        if PINNED in kinds:
            return self.units.reason(rows)
        if len(np.unique(rows)) < len(rows):
            return "its units move only together"
        if len(kinds) > 1:
            return "its units are used in different ways"
        weights = list(self.uses)
        for other in weights:
            if other != weight and self.uses[other][0].groups == 1 and kinds[0] in self.kinds(other):
                return f"adds to the units of {other.removesuffix('.weight')}"
        for other in weights[: weights.index(weight)]:
            reads = self.uses[other][0].reads
            if reads is not None and kinds[0] in self.units.classes(reads):
                return f"{other.removesuffix('.weight')} reads its units before it has run"
        return ""

    def entangled(self, weight: str, uses: list[Call]) -> str:
        """Whether changing a layer's weights would change more than its own outputs, or ""."""
        biases = {None if call.bias is None else self.parameter(call.bias) or call.bias.name for call in uses}
        if len(biases) > 1:
            return "its calls add different biases"
        bias = self.parameter(uses[0].bias)
        if uses[0].bias is not None and bias is None:
            return "its bias is not a parameter"
        for node, name in self.names_by_node():
            if name in (weight, bias):
                for user in node.users:
                    if not any(user is call.node for call in uses):
                        role = "weight" if name == weight else "bias"
                        return f"its {role} is also read by {self.describe(user)}"
        return ""

    def describe(self, user: Node) -> str:
        """A reader of a tensor: the layer that it belongs to, or the op."""
        for weight, uses in self.uses.items():
            if any(user is call.node for call in uses):
                return weight.removesuffix(".weight")
        return op_name(user)

    def batch_norm(self, uses: list[Call]) -> BatchNormNames | None:
        """The batch-norm on the layer's units, if that is all that reads them and its statistics can be set."""
        node = uses[0].node
        norms = self.c.norms.get(node, [])
        channel = node.meta["val"].dim() - 1 - len(shape_of(uses[0].weight)[2:])
        if len(uses) > 1 or len(norms) != 1 or len(node.users) > 1 or channel != 1:
            return None
        a = arguments(norms[0])
        statistics = [self.buffer(a["running_mean"]), self.buffer(a["running_var"])]
        if a["training"] or None in statistics:
            return None
        mean, variance = statistics
        return BatchNormNames(str(mean), str(variance), float(a["eps"]))
