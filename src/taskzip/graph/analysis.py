"""Read a network: torch.export -> units along every axis -> layers and spaces (design 2.2).

Nothing of the network is rewritten: the graph is for understanding only, execution stays with the user's modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.copying import borrowing
from taskzip.errors import GraphError, first_line, place_in_code
from taskzip.graph._layers import Reading
from taskzip.graph._nodes import none_of
from taskzip.graph._reach import keep_what_may_be_read, read_names, state_of
from taskzip.graph._rules import apply_rule
from taskzip.graph._scales import note_scale
from taskzip.graph._values import Context, Strands, Value, flat
from taskzip.graph.structure import OUTPUT, Structure
from taskzip.tasks import tensors

Forward = Callable[[nn.Module, Any], Any]


class _Called(nn.Module):
    """The network as the task calls it, one argument in, the tensors that it returns out."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Any) -> Any:
        return tensors(self._forward(self.model, batch))  # torch.export does not know every class of outputs


def analyse(model: nn.Module, batch: Any, forward: Forward) -> Structure:
    """Find the layers of `model` and the spaces of units that may be re-ordered.

    Args:
        model: the network, in eval mode.
        batch: one batch of data, as `forward(model, batch)` takes it.
        forward: how the network is called.

    Raises:
        GraphError: torch.export cannot follow the network; the message holds its reason and the line.
    """
    program = _exported(borrowing(model), batch, forward)
    names = _sources(program, model)
    c = _read(Context(), program, names)
    reached = read_names(program, names)
    if unreached := [name for name in state_of(model) if name not in reached]:
        unreached = _followed_in_training(c, model, batch, forward, unreached)
        keep_what_may_be_read(c, model, unreached)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Reading(c, parameters).structure(unreached)


def _followed_in_training(
    c: Context, model: nn.Module, batch: Any, forward: Forward, unreached: Sequence[str]
) -> list[str]:
    """Learn from the network in training mode what parts read that only train, such as auxiliary heads.

    Returns:
        What is not reached in training either.
    """
    try:
        program = _exported(borrowing(model).train(), batch, forward)
    except GraphError:  # there is no need that it can be trained on this batch, nor that this can be followed
        return list(unreached)
    names = _sources(program, model)
    left = [name for name in unreached if name not in read_names(program, names)]
    if len(left) < len(unreached):
        _read(c.further(), program, names)
    return left


def _exported(model: nn.Module, batch: Any, forward: Forward) -> Any:
    """What torch.export makes of a network; features that this keeps are left behind as fakes."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
            return torch.export.export(_Called(model, forward), (batch,), strict=False)
    except Exception as error:  # torch.export raises whatever the network raises, and a dozen classes of its own
        raise GraphError(
            f"{type(model).__name__} cannot be followed by torch.export on a batch of {_shapes(batch)}: "
            f"{first_line(error)}{place_in_code(error)}. Data-dependent control flow and inputs of the wrong shape are "
            f"the usual causes."
        ) from error


def _shapes(batch: Any) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "no tensors"


def _sources(program: Any, model: nn.Module) -> dict[str, str]:
    """Placeholder -> name, for what can be re-ordered: parameters, and buffers that checkpoints keep.

    Tied weights go by the first of their names.
    """
    first: dict[int, str] = {}
    names = {f"model.{k}": first.setdefault(id(t), k) for k, t in model.state_dict(keep_vars=True).items()}
    signature = program.graph_signature
    known = signature.inputs_to_parameters | signature.inputs_to_buffers
    return {place: names[name] for place, name in known.items() if name in names}


def _read(c: Context, program: Any, names: dict[str, str]) -> Context:
    """Walk the graph in the order of execution and collect what it says of units."""
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            c.add_parameter(node, names[node.name])
        elif node.op in ("placeholder", "get_attr"):
            c.values[node] = _value(none_of(node), raw=True)
            if node.name in constants:
                c.constants[node] = program.constants[constants[node.name]]
        elif node.op == "call_function":
            calls = len(c.calls)
            axes = apply_rule(c, node)
            raw = all(v.raw for n in node.all_input_nodes for v in flat(c.values[n]))
            c.values[node] = _value(axes, raw and len(c.calls) == calls)
            note_scale(c, node)
        elif node.op == "output":
            for result in node.all_input_nodes:
                c.pin_value(result, OUTPUT)
    return c


def _value(axes: Strands | list[Strands], raw: bool) -> Value | list[Value]:
    return [Value(each, raw) for each in axes] if isinstance(axes, list) else Value(axes, raw)
