"""What becomes of the parameters that are no weight or bias of a layer, for the person who asks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch.fx import Node

from taskzip.graph._nodes import op_name
from taskzip.graph._values import Context

_KINDS = {
    "conv_transpose": "a transposed convolution: not shared yet",
    "gru": "recurrent: not shared yet",
    "lstm": "recurrent: not shared yet",
    "rnn_": "recurrent: not shared yet",
    "embedding": "an embedding",
    "matmul": "a matrix product outside of layers: not shared yet",
    "mm": "a matrix product outside of layers: not shared yet",
    "bmm": "a matrix product outside of layers: not shared yet",
    "addmm": "a matrix product outside of layers: not shared yet",
    "baddbmm": "a matrix product outside of layers: not shared yet",
    "einsum": "a matrix product outside of layers: not shared yet",
    "bilinear": "a bilinear layer: not shared yet",
}
"""By how the name of an op that reads it begins."""


class Uses:
    """Who reads the parameters in a graph.

    Args:
        c: what was collected on the walk.
    """

    def __init__(self, c: Context) -> None:
        self._readers: dict[str, list[Node]] = {}
        for node, name in c.names.items():
            self._readers.setdefault(name, []).extend(node.users)
        self._made_of = {name for call in c.calls for given in (call.weight, call.bias) for name in _sources(c, given)}
        self._beside = {c.names[call.bias] for call in c.calls if call.bias in c.names and call.weight not in c.names}

    def said(self, name: str, unreached: Collection[str]) -> str:
        """What a parameter is, or why it is not shared."""
        if name in unreached:
            return "no call reached it"
        if name in self._made_of:
            return "the weight that a layer reads is computed as it runs"
        if name in self._beside:
            return "the bias of a layer whose weight is computed as it runs"
        ops = [op_name(node) for node in self._readers.get(name, ())]
        for op in ops:
            kind = next((kind for begins, kind in _KINDS.items() if op.startswith(begins)), None)
            if kind:
                return kind
        if any("norm" in op for op in ops):
            return "of a norm"
        return f"read by {', '.join(dict.fromkeys(ops))}" if ops else "only training reached it"


def _sources(c: Context, given: Node | None) -> Iterator[str]:
    """The tensors of the network from which a weight is computed; none for one that is read as it is."""
    todo: list[Node] = [] if given is None or given in c.names else [given]
    seen: set[Node] = set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in c.names:
            yield c.names[node]
        todo.extend(node.all_input_nodes)


def words(spaces: Iterable[int], said: str) -> str:
    """What becomes of a tensor that no two tasks share."""
    moves = " ".join(f"s{space}" for space in spaces)
    return f"moves along with {moves}; private: {said}" if moves else f"private: {said}"
