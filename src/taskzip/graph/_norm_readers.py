"""What reads a batch-norm: layers that can take its scale and shift over, or something that stands in the way.

From the batch-norm on, every tensor is followed by a tensor of labels of the same shape: which channel of the
batch-norm an element comes from. Ops that only move elements move the labels alike; averages keep a scale and a shift
as long as they stay within a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from taskzip.graph._nodes import Arguments, arguments, named_dims, op_name
from taskzip.graph._values import Call, Context, shape_of
from taskzip.graph.structure import OUTPUT, NormReader, NormReaders

_OTHER = -1
"""The label of what does not come from the batch-norm."""


def _ops(names: str) -> frozenset[str]:
    return frozenset(names.split())


_VIEWS = _ops("view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel _unsafe_view")
_MOVES = _ops(
    "permute transpose t mT numpy_T swapaxes swapdims movedim moveaxis expand repeat flip roll slice select unbind "
    "split split_with_sizes chunk tensor_split cat concat concatenate stack"
)
_COPIES = _ops("contiguous clone detach alias")
_DROPOUTS = _ops("dropout feature_dropout alpha_dropout feature_alpha_dropout")
_POOLS = _ops(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d "
    "max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices"
)
_RESIZES = _ops(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d"
)
_REDUCTIONS = _ops("mean amax amin")


class _ObstacleError(Exception):
    """Why the walk cannot go on."""


def norm_readers(c: Context, parameters: set[str]) -> tuple[NormReaders, ...]:
    """Every batch-norm of a network, in the order in which they run."""
    nodes = [node for node in c.values if node.op == "call_function" and op_name(node) == "batch_norm"]
    return tuple(_Walk(c, parameters, node).result() for node in nodes)


class _Walk:
    """From one batch-norm to all that reads it."""

    def __init__(self, c: Context, parameters: set[str], norm: Node) -> None:
        self._c, self._parameters, self._norm = c, parameters, norm
        self._calls = {call.node: call for call in c.calls}
        self._labels: dict[Node, Any] = {}
        self._readers: list[NormReader] = []
        self._no_shift = self._positive = ""

    def result(self) -> NormReaders:
        name, obstacle = self._name(), self._own_obstacle()
        try:
            if not obstacle:
                self._follow()
        except _ObstacleError as error:
            obstacle = str(error)
        if not (obstacle or self._readers):
            obstacle = "read by nothing"
        return NormReaders(name, tuple(self._readers), obstacle, self._no_shift, self._positive)

    def _name(self) -> str:
        mean = self._c.names.get(arguments(self._norm)["running_mean"])
        return mean.rpartition(".")[0] if mean else _module_of(self._norm)

    def _own_obstacle(self) -> str:
        """Why the batch-norm is no fixed scale and shift of a module that is called once."""
        a = arguments(self._norm)
        if a["training"] or a["running_mean"] not in self._c.names or a["running_var"] not in self._c.names:
            return "without running statistics"
        own = {self._c.names[n] for n in map(a.get, ("running_mean", "running_var", "weight", "bias")) if n is not None}
        if any(user is not self._norm for n, name in self._c.names.items() if name in own for user in n.users):
            return "used more than once"
        if _module_of(self._norm) != self._name():
            return "used without a call of its module"
        writers = [user for user in a["input"].users if op_name(user).endswith("_")]
        return f"behind a tensor that {op_name(writers[0])} writes into" if writers else ""

    def _follow(self) -> None:
        count = shape_of(self._norm)[1]
        ones = [1] * (len(shape_of(self._norm)) - 2)
        labels = torch.arange(count, dtype=torch.int32).reshape(1, count, *ones)
        self._labels[self._norm] = labels.expand(shape_of(self._norm))
        for node in self._norm.graph.nodes:
            if any(source in self._labels for source in node.all_input_nodes):
                self._read(node)

    def _read(self, node: Node) -> None:
        name = op_name(node)
        if node.op == "output":
            raise _ObstacleError(OUTPUT)
        if name == "getitem":
            source, index = node.args
            several = self._labels[source]  # type: ignore[index]
            if index < len(several):  # type: ignore[operator]
                self._labels[node] = several[index]
        elif node in self._calls:
            self._readers.append(self._reader(self._calls[node]))
        elif name in _VIEWS:
            self._labels[node] = self._of(node).reshape(shape_of(node))
        elif name in _MOVES:
            self._labels[node] = self._moved(node)
        elif name in _COPIES or (name in _DROPOUTS and not arguments(node)["train"]):
            self._labels[node] = self._of(node)
        elif name in _POOLS | _RESIZES | _REDUCTIONS or name == "pad":
            averaged = self._averaged(node, name)
            # Of what also gives the places of the largest, these do not change with a positive scale.
            self._labels[node] = averaged if isinstance(node.meta["val"], Tensor) else [averaged]
        else:
            raise _ObstacleError(f"read by {name}")

    def _of(self, node: Node) -> Tensor:
        source = node.all_input_nodes[0]
        if source not in self._labels:
            raise _ObstacleError(f"read by {op_name(node)}")
        return self._labels[source]

    def _moved(self, node: Node) -> Any:
        """What an op does to labels is what it does to elements."""
        assert callable(node.target)
        args: Any = map_arg(node.args, self._labels_or_other)
        kwargs: Any = map_arg(node.kwargs, self._labels_or_other)
        return node.target(*args, **kwargs)

    def _labels_or_other(self, source: Node) -> Tensor:
        if source in self._labels:
            return self._labels[source]
        return torch.tensor(_OTHER, dtype=torch.int32).expand(shape_of(source))

    def _averaged(self, node: Node, name: str) -> Tensor:
        """Pooling, resizing, padding and reductions, which must not mix channels."""
        a, labels = arguments(node), self._of(node)
        if "max" in name or name == "amin":
            self._positive = self._positive or f"read by {name}"
        if _counts_zeros(name, a):
            self._no_shift = self._no_shift or f"read by {name}, which counts zeros in"
        if name in _REDUCTIONS:
            return _first(labels, named_dims(a.get("dim"), labels.dim()), name).reshape(shape_of(node))
        if a.get("value"):
            raise _ObstacleError("padded with numbers")
        places = len(a["pad"]) // 2 if name == "pad" else int(next(ch for ch in name if ch.isdigit()))
        out, *_ = _tensors(node)
        return _first(labels, set(range(labels.dim() - places, labels.dim())), name).expand(out.shape)

    def _reader(self, call: Call) -> NormReader:
        weight = self._c.names.get(call.weight, "")
        layer = weight.rpartition(".")[0]
        if weight not in self._parameters or _module_of(call.node) != layer:
            raise _ObstacleError(f"read by {op_name(call.node)} outside of a layer of torch")
        a = arguments(call.node)
        bias = None if call.bias is None else self._c.names.get(call.bias, "")
        if a["input"] not in self._labels or bias not in (None, f"{layer}.bias"):
            raise _ObstacleError(f"read by {layer}, whose weights are computed")
        uses = {u for n, name in self._c.names.items() if name in (weight, f"{layer}.bias") for u in n.users}
        if uses != {call.node}:
            raise _ObstacleError(f"read by {layer}, whose weights are read elsewhere too")
        labels = self._labels[a["input"]]
        axis = -1 if call.kind == "linear" else labels.dim() - len(shape_of(call.weight)) + 1
        others = set(range(labels.dim())) - {axis % labels.dim()}
        if call.kind != "linear" and _pads(a["padding"], shape_of(call.weight)[2:]):
            self._no_shift = self._no_shift or f"read by {layer}, which pads with zeros"
        return NormReader(layer, _first(labels, others, layer).flatten().numpy().astype(np.int64))


def _first(labels: Tensor, dims: set[int], name: str) -> Tensor:
    """The labels along all other axes, if they are the same everywhere along these."""
    index = [slice(0, 1) if i in dims else slice(None) for i in range(labels.dim())]
    found = labels[tuple(index)]
    if not bool((labels == found).all()):
        raise _ObstacleError(f"read by {name}, which mixes channels")
    return found


def _tensors(node: Node) -> Sequence[Tensor]:
    value = node.meta["val"]
    return [value] if isinstance(value, Tensor) else value


def _counts_zeros(name: str, a: Arguments) -> bool:
    """Whether zeros from outside, or a divisor of its own, make a shift something else at some places."""
    if name == "pad":
        return a["mode"] == "constant"
    if name.startswith("avg_pool"):
        return bool((any(_listed(a["padding"])) and a["count_include_pad"]) or a.get("divisor_override"))
    return False


def _pads(padding: Any, kernel: Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in kernel)
    return any(_listed(padding))


def _listed(numbers: int | Sequence[int]) -> Sequence[int]:
    return [numbers] if isinstance(numbers, int) else numbers


def _module_of(node: Node) -> str:
    """The path of the module in whose forward an op stands, as the network calls it; "" for the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""
