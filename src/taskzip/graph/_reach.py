"""What the traced call does not reach: parameters that nothing in the graph reads, and the units that they may read.

Nobody can see what such a part reads when it is called in another way, but how wide it is: a linear layer with 16
inputs can read whatever has 16 units. Those units stay in their order. Only what comes into such a part from outside,
or leaves it, counts: what its own layers hand on to each other is no part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from taskzip.graph._values import Context, Strand, flat

UNREACHED = "which no call reaches"
"""How the reason ends why units stay that such a part may read."""


def read_names(program: Any, names: dict[str, str]) -> set[str]:
    """The tensors of a network that anything in the graph reads, of those in `names` (by placeholder)."""
    return {names[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.users and n.name in names}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point tensors of a network by the first of their names."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True).items()
    return {
        name: tensor
        for name, tensor in state
        if isinstance(tensor, Tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and first.setdefault(id(tensor), name) == name
    }


def keep_what_may_be_read(c: Context, model: nn.Module, unreached: Collection[str]) -> None:
    """Pin the units of the graph that a part of the network may read, or add to, which no call reaches."""
    widths: dict[int, str] = {}
    for part, names in _parts(model, unreached).items():
        for width in _open_ends(model, names):
            widths.setdefault(width, part)
    for node, value in c.values.items():
        if node.op != "call_function":
            continue
        for each in flat(value):
            for i, axis in enumerate(each.axes):
                if axis is None:
                    continue
                ids = axis.grid.ravel() if isinstance(axis, Strand) else axis
                shape = _shape(node, each, value)
                for width in (ids.size, shape[i], math.prod(shape[i:])):
                    if width in widths:
                        c.units.pin(ids, f"may be read by {widths[width]}, {UNREACHED}")


def _shape(node: Any, each: Any, value: Any) -> list[int]:
    given = node.meta["val"]
    tensor = given[next(i for i, v in enumerate(value) if v is each)] if isinstance(value, list) else given
    return [int(size) for size in tensor.shape]


def _parts(model: nn.Module, unreached: Collection[str]) -> dict[str, list[str]]:
    """The largest modules of which nothing is reached, with their tensors; lists and dicts of modules are no parts."""
    reached = {path for name in state_of(model) if name not in unreached for path in _above(name)}
    parts: dict[str, list[str]] = {}
    for name in unreached:
        whole = (
            path
            for path in _above(name)
            if path not in reached and not isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict))
        )
        parts.setdefault(next(whole, name), []).append(name)
    return parts


def _above(name: str) -> Iterator[str]:
    """The paths of the modules that hold a tensor, the outermost first, without the network itself."""
    pieces = name.split(".")[:-1]
    return (".".join(pieces[: i + 1]) for i in range(len(pieces)))


def _open_ends(model: nn.Module, names: Collection[str]) -> set[int]:
    """Widths that a part reads and no layer before writes, or that it writes and no layer behind reads."""
    written: set[int] = set()
    ends: set[int] = set()
    for name in names:
        reads, writes = _widths(model, name)
        ends |= reads - written
        written = (written - reads) | writes
    return {width for width in ends | written if width > 1}


def _widths(model: nn.Module, name: str) -> tuple[set[int], set[int]]:
    """How many units a tensor reads, and how many it gives."""
    path, _, attribute = name.rpartition(".")
    module, tensor = model.get_submodule(path), state_of(model)[name]
    if attribute == "bias" and isinstance(module, (nn.Linear, _ConvNd)):
        return set(), set()
    if isinstance(module, nn.Linear):
        return {module.in_features}, {module.out_features}
    if isinstance(module, _ConvNd):
        return {module.in_channels}, {module.out_channels}
    if isinstance(module, nn.Embedding):
        return set(), {module.embedding_dim}
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)):
        return set(tensor.shape), set(tensor.shape)
    if isinstance(module, nn.RNNBase):
        return {module.input_size}, {module.hidden_size * (2 if module.bidirectional else 1)}
    return set(tensor.shape), set()
