"""Rules for views and copies: what splits, moves, cuts, joins and repeats axes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from taskzip.graph._nodes import Arguments, at, first, op_name, unify_all, unknown
from taskzip.graph._units import Ids
from taskzip.graph._values import Axes, Context, Strand, Strands, flat, shape_of
from taskzip.graph._views import cut, reshaped


def view(c: Context, node: Node, a: Arguments) -> Strands:
    source = first(a)
    return reshaped(c, c.strands(source), shape_of(source), shape_of(node), f"{op_name(node)} mixes units")


def permute(c: Context, node: Node, a: Arguments) -> Strands:
    """The op itself says where each axis goes, by what it does to a tensor whose axes all differ in size."""
    assert callable(node.target)
    axes = c.strands(first(a))
    probe = torch.empty([2 + i for i in range(len(axes))], device="meta")
    return tuple(axes[size - 2] for size in node.target(probe, *node.args[1:], **node.kwargs).shape)


def expand(c: Context, node: Node, a: Arguments) -> Axes:
    """Where one element is spread over an axis, its copies may change places."""
    source, shape = a["self"], shape_of(node)
    before = (1,) * (len(shape) - len(shape_of(source))) + shape_of(source)
    axes = (None,) * (len(shape) - len(shape_of(source))) + c.axes(source)
    if all(value.raw for value in flat(c.values[source])):  # inputs stay in a fixed order
        return axes
    spread = (s == 1 < t for s, t in zip(before, shape, strict=True))
    return tuple(_copies(c, t) if new else ids for new, ids, t in zip(spread, axes, shape, strict=True))


def _copies(c: Context, count: int) -> Ids:
    ids = c.units.fresh(count)
    c.copies.update(ids.tolist())
    return ids


def repeat(c: Context, node: Node, a: Arguments) -> Axes:
    axes, repeats = c.axes(a["self"]), a["repeats"]
    new = len(repeats) - len(axes)
    kept = (None if ids is None else np.tile(ids, n) for ids, n in zip(axes, repeats[new:], strict=True))
    return (None,) * new + tuple(kept)


def sliced(c: Context, node: Node, a: Arguments) -> Strands:
    axes, dim = _strands_at(c, a)
    return cut(c, axes, dim, slice(a["start"], a["end"], a["step"]))


def select(c: Context, node: Node, a: Arguments) -> Strands:
    axes, dim = _strands_at(c, a)
    return cut(c, axes, dim, a["index"])


def unbind(c: Context, node: Node, a: Arguments) -> list[Strands]:
    axes, dim = _strands_at(c, a)
    if not isinstance(axes[dim], Strand):
        c.pin((axes[dim],), "unbind takes units one by one")
    return [cut(c, axes, dim, i) for i in range(len(node.meta["val"]))]


def split(c: Context, node: Node, a: Arguments) -> list[Strands]:
    axes, dim = _strands_at(c, a)
    stops = np.cumsum([0, *(int(part.shape[dim]) for part in node.meta["val"])]).tolist()
    return [cut(c, axes, dim, slice(start, stop)) for start, stop in pairwise(stops)]


def index(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Chosen by number: the axes of the numbers take the place of those along which they count."""
    axes, numbers = c.axes(a["self"]), {dim: n for dim, n in enumerate(a["indices"]) if n is not None}
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in numbers.values()):
        return unknown(c, node, "index with a mask")
    place, *others = numbers
    if not others and (known := _constant(c, numbers[place])) is not None and known.dim() == 1:
        return (*axes[:place], _taken(c, axes[place], known.cpu().numpy()), *axes[place + 1 :])
    c.pin(tuple(axes[dim] for dim in numbers), "units are chosen by number")
    each = [(c.axes(n), shape_of(n)) for n in numbers.values()]
    shape = np.broadcast_shapes(*(size for _, size in each))
    chosen = c.broadcast(each, shape, "numbers in a fixed order")
    if list(numbers) != list(range(place, place + len(numbers))):  # torch puts the new axes in front
        place = 0
    kept = tuple(ids for dim, ids in enumerate(axes) if dim not in numbers)
    return (*kept[:place], *chosen, *kept[place:])


def index_select(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    numbers: list[Node | None] = [None] * len(shape_of(a["self"]))
    numbers[a["dim"]] = a["index"]
    return index(c, node, {"self": a["self"], "indices": numbers})


def gather(c: Context, node: Node, a: Arguments) -> Axes:
    axes, dim = at(c, a)
    c.pin((axes[dim],), "units are chosen by number")
    sizes, out = shape_of(a["self"]), list(c.axes(a["index"]))
    for i, (size, taken) in enumerate(zip(sizes, shape_of(node), strict=True)):
        if i != dim and size == taken:
            out[i] = c.unify(out[i], axes[i], "gather with a fixed order")
        elif i != dim:
            c.pin((out[i], axes[i]), "gather from a part of the units")
            out[i] = None
    return tuple(out)


def channel_shuffle(c: Context, node: Node, a: Arguments) -> Axes:
    axes = c.axes(first(a))
    order = np.arange(shape_of(node)[1]).reshape(a["groups"], -1).T.ravel()
    return (axes[0], _taken(c, axes[1], order), *axes[2:])


def pixel_shuffle(c: Context, node: Node, a: Arguments) -> Axes:
    """Units become wholes of as many as there are places in a square of the new image."""
    *kept, units, height, width = c.axes(a["self"])
    c.pin((height, width), "pixel_shuffle along units")
    return (*kept, None if units is None else c.units.fuse(units, shape_of(node)[-3]), None, None)


def pixel_unshuffle(c: Context, node: Node, a: Arguments) -> Axes:
    *kept, units, height, width = c.axes(a["self"])
    c.pin((height, width), "pixel_unshuffle along units")
    return (*kept, None if units is None else units.repeat(a["downscale_factor"] ** 2), None, None)


def cat(c: Context, node: Node, a: Arguments) -> Axes:
    sources: Sequence[Node] = [source for source in a["tensors"] if shape_of(source) != (0,)]  # torch skips these too
    axes = [c.axes(source) for source in sources]
    dim = a["dim"] % len(axes[0])
    out = unify_all(c, [(*each[:dim], None, *each[dim + 1 :]) for each in axes], "concatenated with a fixed order")
    sizes = [shape_of(source)[dim] for source in sources]
    whole = c.join([each[dim] for each in axes], sizes, "a fixed part of an axis")
    return (*out[:dim], whole, *out[dim + 1 :])


def stack(c: Context, node: Node, a: Arguments) -> Axes:
    out = unify_all(c, [c.axes(source) for source in a["tensors"]], "stacked with a fixed order")
    dim = a["dim"] % (len(out) + 1)
    return (*out[:dim], None, *out[dim:])


def pad(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["self"]))
    before, pads = shape_of(a["self"]), a["pad"]
    constant = a.get("mode", "constant") == "constant" and min(pads) >= 0
    for i, low, high in zip(reversed(range(len(axes))), pads[::2], pads[1::2], strict=False):
        if low == high == 0:
            continue
        if constant:
            axes[i] = c.join([None, axes[i], None], [low, before[i], high], "padding")
        else:
            c.pin((axes[i],), "padding along units")
            axes[i] = None
    return tuple(axes)


def _strands_at(c: Context, a: Arguments) -> tuple[Strands, int]:
    """The axes of the first argument, strands among them, and the one that `dim` names."""
    axes = c.strands(first(a))
    return axes, a["dim"] % len(axes)


def _taken(c: Context, ids: Ids | None, index: np.ndarray) -> Ids | None:
    taken = None if ids is None else c.units.take(ids, index % len(ids))
    return taken if len(index) > 1 else None


_COPIES = ("lift_fresh_copy", "detach", "detach_", "clone")


def _constant(c: Context, node: Node) -> Tensor | None:
    """What a node holds in every run: a tensor that is written into the graph and only ever copied and indexed with."""
    while node not in c.constants:
        if node.op != "call_function" or op_name(node) not in _COPIES:
            return None
        (node,) = node.all_input_nodes
    return c.constants[node] if _only_read(node) else None


def _only_read(node: Node) -> bool:
    """Whether neither it nor a view of it is written to."""
    ops = [(user, op_name(user)) for user in node.users]
    return all(op in ("index", "index_select") or (op in _COPIES and _only_read(user)) for user, op in ops)
