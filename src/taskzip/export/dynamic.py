"""Which axes of the example may have other sizes than there, and which of these sizes are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from taskzip.errors import InputError
from taskzip.export.example import Example, Sizes, parts

Axes = dict[str, dict[int, Any]]
"""Dimensions of torch.export, by the name of a tensor and the axis."""

_KINDS = (Dim, type(Dim.AUTO))


def batch_axes(example: Example, least: int, most: int | None = None) -> Axes:
    """Batches of so many samples: a dimension for each batch that the example has."""
    dims = {name: Dim(name, min=least, max=most) for name in set(example.batches.values())}
    return {name: {0: dims[batch]} for name, batch in example.batches.items()}


def axes_of(example: Example, dynamic_batch: bool, dynamic_shapes: Any) -> Axes:
    """Batches of any size or one, unless the user says which axes.

    Raises:
        InputError: as `chosen_axes`.
    """
    if dynamic_shapes is not None:
        return chosen_axes(example, dynamic_shapes)
    return batch_axes(example, 0) if dynamic_batch else {}


def chosen_axes(example: Example, shapes: Any) -> Axes:
    """What the user says, in the form of the example, with what torch.export takes for each tensor.

    Raises:
        InputError: another form, an axis that a tensor does not have, or an example outside of the bounds.
    """
    return {name: axes for name, given in _specified(example, shapes) if (axes := _axes(example, name, given))}


def _specified(example: Example, shapes: Any) -> Iterator[tuple[str, Any]]:
    """What is given for each tensor, and the name of the tensor."""
    forms = dict.fromkeys(example.given, shapes)
    if "" not in forms:
        _refuse_others(shapes, list(forms), "dynamic_shapes")
        forms = {task: shapes.get(task) for task in forms}
    for task, value in example.given.items():
        form = forms[task]
        if isinstance(value, torch.Tensor) and _is_call(form):  # as torch.export writes it
            (form,) = form.values() if isinstance(form, Mapping) else form
        names = iter(example.names(task))
        yield from ((next(names), each) for each in _inside(value, form, f"dynamic_shapes {task}".strip()))


def _is_call(form: Any) -> bool:
    """Whether it is for the arguments of a call with one tensor, and not for the tensor."""
    if not isinstance(form, (Mapping, tuple, list)) or len(form) != 1:
        return False
    return all(isinstance(key, str) for key in form) if isinstance(form, Mapping) else not isinstance(form[0], Dim)


def _inside(value: Any, form: Any, called: str) -> Iterator[Any]:
    """What is given for each tensor in a value, in the order of the example."""
    if isinstance(value, torch.Tensor):
        yield form
        return
    inner = parts(value)
    if form is not None and not isinstance(form, Mapping):
        if not isinstance(form, (tuple, list)) or len(form) != len(inner):
            raise InputError(f"{called} is {form!r}, not in the form of the example, with {len(inner)} parts.")
        form = dict(zip(inner, form, strict=True))
    _refuse_others(form or {}, list(inner), called)
    for key, part in inner.items():
        yield from _inside(part, (form or {}).get(key), f"{called}.{key}")


def _refuse_others(form: Any, keys: Sequence[Any], called: str) -> None:
    unknown = [key for key in form if key not in keys] if isinstance(form, Mapping) else [form]
    if unknown:
        raise InputError(
            f"{called} has {unknown[0]!r}, but the example has {', '.join(map(str, keys)) or 'no such part'}: give it "
            f"in the form of the example."
        )


def _axes(example: Example, name: str, form: Any) -> dict[int, Any]:
    shape = example.tensors[name].shape
    if isinstance(form, (tuple, list)) and len(form) == len(shape):
        form = dict(enumerate(form))
    if form is not None and not isinstance(form, Mapping):
        raise InputError(f"dynamic_shapes gives {form!r} for {name}, not a dict of axes, as {{1: Dim('length')}}.")
    found = {}
    for axis, dim in (form or {}).items():
        if not isinstance(axis, int) or not 0 <= axis < len(shape):
            raise InputError(f"dynamic_shapes has axis {axis!r} for {name}, which is of {list(shape)}.")
        if dim is None or dim == Dim.STATIC or dim == shape[axis]:
            continue
        if not isinstance(dim, _KINDS):
            raise InputError(
                f"dynamic_shapes gives {dim!r} for axis {axis} of {name}, which is no Dim of torch.export."
            )
        if isinstance(dim, Dim) and not dim.min <= shape[axis] <= dim.max:
            raise InputError(
                f"example: {name} has {shape[axis]} along axis {axis}, and {dim.__name__!r} is of {dim.min} to "
                f"{dim.max}: give another example, or other bounds."
            )
        found[axis] = dim
    return found


def traceable(example: Example, axes: Axes) -> dict[str, torch.Tensor]:
    """The tensors, without an axis of size 1 among those of any size: torch takes it for one that never changes."""
    tensors = example.tensors
    return example.resized(
        {name: {axis: max(2, tensors[name].shape[axis]) for axis in each} for name, each in axes.items()}
    )


def one_by_one(axes: Axes) -> list[Axes]:
    """Each dimension by itself, with all axes that have it."""
    found: dict[Any, Axes] = {}
    for name, each in axes.items():
        for axis, dim in each.items():
            key = getattr(dim, "root", dim).__name__ if isinstance(dim, Dim) else (name, axis)
            found.setdefault(key, {}).setdefault(name, {})[axis] = dim
    return list(found.values())


def described(axes: Axes) -> str:
    """In words: "axis 1 of input ('length')"."""
    return " and ".join(
        f"axis {axis} of {name}" + (f" ({dim.__name__!r})" if isinstance(dim, Dim) else "")
        for name, each in axes.items()
        for axis, dim in each.items()
    )


def other_shapes(program: ExportedProgram, names: Sequence[str]) -> list[Sizes]:
    """What is to be tried, too, one dimension at a time: the least size, one more, and twice as many, where allowed.

    Args:
        program: in which torch found the axes that may change, and how far.
        names: of the tensors that it reads.
    """
    inputs = {node.name: node.meta["val"].shape for node in program.graph.find_nodes(op="placeholder")}
    shapes = {name: inputs[each] for name, each in zip(names, program.graph_signature.user_inputs, strict=True)}
    changing = [
        (name, axis, size.node.expr, size.node.hint)
        for name, shape in shapes.items()
        for axis, size in enumerate(shape)
        if isinstance(size, torch.SymInt)
    ]
    own: dict[Any, int] = {}
    for *_, expression, hint in changing:
        for symbol in expression.free_symbols:
            own.setdefault(symbol, hint)
    found: list[Sizes] = []
    for symbol, size in own.items():
        bounds = program.range_constraints[symbol]
        for other in sorted({int(max(bounds.lower, 1)), *(int(min(bounds.upper, n)) for n in (size + 1, 2 * size))}):
            sizes: dict[str, dict[int, int]] = {}
            for name, axis, expression, hint in changing:
                if symbol in expression.free_symbols:
                    new = int(expression.subs({**own, symbol: other}))
                    if new != hint:
                        sizes.setdefault(name, {})[axis] = new
            if sizes:
                found.append(sizes)
    return found
