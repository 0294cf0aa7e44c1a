"""Which units may be made larger or smaller: the network computes the same, if what reads them makes up for it.

That holds where all ops that a unit goes through are positively homogeneous, f(s x) = s f(x) for s > 0: ReLU, pooling,
sums, views. A unit that meets any other op, or that is added to something of a fixed size, is *rigid*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Node

from taskzip.graph._nodes import arguments, first, named_dims, op_name
from taskzip.graph._values import Context, Strands, flat, shape_of

Powers = Mapping[str, tuple[int, ...]]
"""Per tensor of a network, per axis: by which power of its units' scales it is multiplied."""

Rule = Callable[[Context, Node], Iterator[Strands]]
"""Gives the axes on which units become rigid."""


class Norm(NamedTuple):
    """A batch-norm with a scale and a shift of its own."""

    weight: str
    variance: str
    eps: float


def note_scale(c: Context, node: Node) -> None:
    """Write down which units a node makes rigid: all that it touches, unless its op is known to be homogeneous."""
    name = op_name(node)
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"), _nothing_kept)
    if any(_is_tensor(each) and each.meta["val"].is_complex() for each in (node, *node.all_input_nodes)):
        rule = _nothing_kept
    for axes in rule(c, node):
        c.make_rigid(axes)


def _all_kept(c: Context, node: Node) -> Iterator[Strands]:
    yield from ()


def _nothing_kept(c: Context, node: Node) -> Iterator[Strands]:
    for each in (node, *node.all_input_nodes):
        yield from (value.axes for value in flat(c.values[each]))


def _pad(c: Context, node: Node) -> Iterator[Strands]:
    a = arguments(node)
    yield from () if a.get("mode", "constant") == "constant" and not a.get("value") else _nothing_kept(c, node)


def _reduction(c: Context, node: Node) -> Iterator[Strands]:
    """Units may be of different sizes only where they are not summed or compared with each other."""
    a = arguments(node)
    if a.get("other") is not None:  # torch.max(x, y)
        yield from _nothing_kept(c, node)
    else:
        axes = _axes(c, first(a))
        yield tuple(axes[i] for i in named_dims(a.get("dim"), len(axes)))


def _sum(c: Context, node: Node) -> Iterator[Strands]:
    """Both summands have the units of the sum."""
    a = arguments(node)
    terms = [a["self"], a["other"]]
    where = _carrying(c, node)
    if not all(_is_tensor(term) and _carrying(c, term) == where for term in terms) or all(t in c.names for t in terms):
        yield from _nothing_kept(c, node)


def _product(c: Context, node: Node) -> Iterator[Strands]:
    """Units times a number, times a parameter, or times something without units."""
    a = arguments(node)
    factors = [t for t in (a["self"], a["other"]) if _is_tensor(t)]
    moving = [t for t in factors if t not in c.names and _carrying(c, t)]
    divided = op_name(node).startswith("div") and a["other"] in moving
    if len(moving) != 1 or divided or a.get("rounding_mode") is not None:
        yield from _nothing_kept(c, node)


def _layer(c: Context, node: Node) -> Iterator[Strands]:
    """Only along the axis of its inputs: what it adds to units that lie along another one has a size of its own."""
    a = arguments(node)
    if any(t is not None and t not in c.names for t in (a["weight"], a["bias"])):
        yield from _nothing_kept(c, node)
        return
    axes, taps = _axes(c, a["input"]), len(shape_of(a["weight"])) - 2
    reads = len(axes) - taps - 1
    yield (*axes[:reads], *axes[reads + 1 :])


def _batch_norm(c: Context, node: Node) -> Iterator[Strands]:
    a = arguments(node)
    own = all(a[name] in c.names for name in ("weight", "bias", "running_mean", "running_var"))
    if a["training"] or not own:
        yield from _nothing_kept(c, node)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_table(_all_kept, "relu leaky_relu prelu abs dropout feature_dropout embedding getitem"),
    **_table(
        _all_kept, "contiguous clone detach alias to _to_copy type_as _assert_tensor_metadata zeros_like new_zeros"
    ),
    **_table(_all_kept, "view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel _unsafe_view"),
    **_table(_all_kept, "permute transpose t mT swapaxes swapdims movedim moveaxis"),
    **_table(_all_kept, "slice select unbind split split_with_sizes chunk tensor_split index_select"),
    **_table(_all_kept, "cat concat concatenate channel_shuffle native_channel_shuffle"),
    **_table(_all_kept, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices"),
    **_table(_all_kept, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_table(_all_kept, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_table(
        _all_kept, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d"
    ),
    **_table(_pad, "pad constant_pad_nd"),
    **_table(_reduction, "mean sum amax amin max min"),
    **_table(_sum, "add sub subtract"),
    **_table(_product, "mul multiply div divide"),
    **_table(_layer, "linear conv1d conv2d conv3d"),
    **_table(_batch_norm, "batch_norm"),
}


def powers(c: Context) -> tuple[Powers, list[Norm]]:
    """How the tensors of the network scale with the units along their axes.

    The units of a tensor that is used in ways that cannot be made up for become rigid.
    """
    uses: dict[str, list[tuple[Node, str]]] = {name: [] for name in c.parameters}
    for node, name in c.names.items():
        uses[name] += [(user, argument) for user in node.users for argument in _arguments_that_are(node, user)]
    found: dict[str, tuple[int, ...]] = {}
    norms: list[Norm] = []
    for name, axes in c.parameters.items():
        each = {_powers_in(c, user, argument, len(axes)) for user, argument in uses[name]}
        only = each.pop() if len(each) == 1 else None
        normed = [user for user, argument in uses[name] if op_name(user) == "batch_norm" and argument == "weight"]
        if only is None or len(normed) > 1 or any(arguments(user)["running_var"] not in c.names for user in normed):
            c.make_rigid(axes)
            continue
        found[name] = only
        if normed:
            a = arguments(normed[0])
            norms.append(Norm(name, c.names[a["running_var"]], float(a["eps"])))
    return found, norms


def _arguments_that_are(node: Node, user: Node) -> list[str]:
    return [name for name, value in arguments(user).items() if value is node] or [""] if _has_schema(user) else [""]


def _has_schema(node: Node) -> bool:
    return hasattr(node.target, "_schema")


def _powers_in(c: Context, user: Node, argument: str, rank: int) -> tuple[int, ...] | None:
    """The powers of a tensor by what it is to one of its users, or None where it is nothing known."""
    name = op_name(user).removesuffix("_")
    if name in ("linear", "conv1d", "conv2d", "conv3d"):
        grouped = arguments(user).get("groups", 1) > 1  # it reads the units that it computes
        return {"weight": (0,) * rank if grouped else (1, -1, *(0,) * (rank - 2)), "bias": (1,)}.get(argument)
    if name == "batch_norm":
        return {"weight": (0,), "bias": (1,), "running_mean": (1,), "running_var": (2,)}.get(argument)
    if name == "embedding":
        return {"weight": (0, 1)}.get(argument)
    if name in ("prelu", "mul", "multiply", "div", "divide"):
        return (0,) * rank
    return (1,) * rank if name in ("add", "sub", "subtract") else None


def _axes(c: Context, node: Any) -> Strands:
    (value,) = flat(c.values[node])
    return value.axes


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def _carrying(c: Context, node: Any) -> set[int]:
    """The axes on which units lie, counted from the end."""
    axes = _axes(c, node)
    return {i - len(axes) for i, ids in enumerate(axes) if ids is not None}
