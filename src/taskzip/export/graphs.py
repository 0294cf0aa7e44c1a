"""All tasks as one graph of pure functions and constants, in which what is equal is one; and parts of it as modules."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from taskzip.errors import ExportError

aten = torch.ops.aten


class JointGraph:
    """A graph with flat inputs and outputs, whose operators write nowhere.

    Attributes:
        graph: of placeholders, constants (`get_attr`), operators and the output.
        inputs: the placeholders by the name of the input.

    Raises:
        ExportError: the network writes into its buffers, so that the graph would not be one of pure functions.
    """

    def __init__(self, program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        program = program.run_decompositions({})  # nothing is decomposed, but writing in place becomes pure
        written = list(program.graph_signature.buffers_to_mutate.values())
        if written:
            raise ExportError(f"while it runs it writes into its buffer {written[0].split('.', 2)[-1]!r}")
        module: Any = program.module(check_guards=False)
        self.graph, self.inputs = Graph(), dict[str, Node]()
        self._outputs = list(outputs)
        self._constants: dict[str, Tensor] = {}
        self._variable: dict[Node, bool] = {}
        copies: dict[Node, Node] = {}
        names = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                name = next(names)
                copies[node] = self.inputs[name] = self.graph.placeholder(f"input_{len(self.inputs)}")
                copies[node].meta = node.meta
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(module)
                if not isinstance(value, Tensor):
                    raise ExportError("it has parts that run or not as the data decide (torch.cond and its kind)")
                copies[node] = self.constant(node.target, value)
            elif node.target == aten.clone.default and not node.kwargs and node.args[0].op == "placeholder":
                copies[node] = copies[node.args[0]]  # where nothing is written, a copy of an input is the input itself
            else:
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
        self._compute_vectors()
        self.unite()

    @property
    def outputs(self) -> dict[str, Node]:
        """The nodes by the name of the output."""
        return dict(zip(self._outputs, arguments(self.graph.output_node())[0], strict=True))

    def operators(self) -> list[Node]:
        """The nodes of operators, in the order in which they run."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def constant(self, name: str, value: Tensor) -> Node:
        """A node for a constant: where there is one of the same values, that."""
        for node in self.graph.find_nodes(op="get_attr"):
            if _same(self._constants[node.target], value):
                return node
        return self._new_constant(name, _compact(value))

    def copied(self, constant: Node) -> Node:
        """Another node for what is constant, of the same values all the same."""
        value = self.value(constant)
        assert value is not None
        return self._new_constant(constant.name, value.detach().clone())

    def _new_constant(self, name: str, value: Tensor) -> Node:
        name = _identifier(name)
        while name in self._constants:
            name += "_"
        self._constants[name] = value
        start = next((node for node in self.graph.nodes if node.op not in ("placeholder", "get_attr")), None)
        with self.graph.inserting_before(start):
            node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def call(self, like: Node, target: OpOverload, *args: Any) -> Node:
        """An operator in front of the node for which it stands, or for a part of it."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args)
        node.meta = {key: value for key, value in like.meta.items() if key != "val"}
        return node

    def replace(self, node: Node, new: Node) -> None:
        """Put a node that gives the same in the place of another one."""
        if "val" in node.meta:  # of what is new in between, nobody asks
            new.meta.setdefault("val", node.meta["val"])
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _compute_vectors(self) -> None:
        """Vectors that products and sums take from constants, such as scales and biases of units, become constants."""
        for node in self.operators():
            for given in node.all_input_nodes if node.target in (aten.mul.Tensor, aten.add.Tensor) else ():
                value = self.value(given) if given.op == "call_function" and self._depends(node) else None
                if value is not None and value.numel() == max(value.shape, default=1):
                    self.replace(given, self.constant(given.name, value))

    def value(self, argument: Any) -> Tensor | None:
        """What a node gives that depends on constants only; None for others, and for what is no node."""
        if not isinstance(argument, Node) or self._depends(argument):
            return None
        known: dict[Node, Any] = {}

        def found(node: Node) -> Any:
            if node not in known:
                if node.op == "get_attr":
                    known[node] = self._constants[str(node.target)]
                else:
                    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), found)
                    function: Any = node.target
                    known[node] = function(*args, **kwargs)
            return known[node]

        with torch.no_grad():
            return found(argument)

    def _depends(self, node: Node) -> bool:
        """Whether it depends on more than constants; found once, for what takes its place gives the same."""
        if node not in self._variable:
            for each in self.graph.nodes:
                if each not in self._variable:
                    read = each.all_input_nodes
                    pure = each.op == "call_function" and _is_pure(each.target) and bool(read)
                    constant = each.op == "get_attr" or (pure and not any(self._variable[other] for other in read))
                    self._variable[each] = not constant
        return self._variable[node]

    def unite(self) -> None:
        """Compute once what is computed twice: common-subexpression elimination by value numbering."""
        known: dict[Hashable, Node] = {}
        for node in self.operators():
            if _is_pure(node.target):
                same = known.setdefault(_key((node.target, node.args, node.kwargs)), node)
                if same is not node:
                    self.replace(node, same)
        self.graph.eliminate_dead_code()

    def part(self, inputs: Collection[str], outputs: Collection[str]) -> GraphModule:
        """What computes some outputs, as a function of some inputs, in the order in which the graph has them."""
        wanted = [node for name, node in self.outputs.items() if name in outputs]
        needed = set(wanted)
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        graph, copies = Graph(), dict[Node, Node]()
        kept = [node for name, node in self.inputs.items() if name in inputs]
        for node in [*kept, *(node for node in self.graph.nodes if node in needed and node not in kept)]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        constants = {node.target: self._constants[node.target] for node in graph.find_nodes(op="get_attr")}
        given = [copies[node] for node in wanted]
        for i, node in enumerate(given):  # XNNPACK gives nothing but what it computes
            if node.op == "placeholder":
                given[i] = graph.call_function(aten.clone.default, (node,))
            elif node.op == "get_attr":
                constants[f"output_{i}"] = self._constants[str(node.target)].clone()
                given[i] = graph.get_attr(f"output_{i}")
        graph.output(tuple(given))
        return GraphModule(constants, graph)


def arguments(node: Node) -> list[Any]:
    """What an operator is called with, by place: nodes, numbers, lists of them."""
    return list(node.args)


def _identifier(name: str) -> str:
    return "_" + re.sub(r"\W", "_", name)


def _compact(value: Tensor) -> Tensor:
    """With its numbers one after another and nothing around them, for exporters write all of the memory of a tensor."""
    if value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes:
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return one is other or (alike and torch.equal(one, other))


def _is_pure(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return getattr(target, "__module__", None) == "_operator"  # on sizes, and of the parts of a result


def _key(value: Any) -> Hashable:
    """Equal for equal arguments, where 1, 1.0 and True are not."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(value[name])) for name in sorted(value))
    return type(value), repr(value) if isinstance(value, (float, slice)) else value
