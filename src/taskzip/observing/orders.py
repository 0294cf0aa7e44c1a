"""Whether what a layer answers can be compared, row by row and unit by unit, once hidden units were re-ordered.

Least squares pairs what a network reads as zipped so far with what the original one answered. Sums do not show whether
the two lie in one order; a copy that is only re-ordered does, because it must answer exactly the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taskzip.graph import Layer
from taskzip.observing.layer_calls import Read, run_to
from taskzip.observing.rows import outputs_of
from taskzip.tasks import Batch, Task, evaluating

_PLACES = 64
"""So many rows of each call are compared, drawn at random."""


class Order(NamedTuple):
    """What of a layer's answers is in another order than it is taken to be.

    Attributes:
        units: the units: their means over the whole batch belong to others.
        rows: the rows that one sample makes.
    """

    units: bool
    rows: bool


def misread(
    task: Task,
    original: nn.Module,
    reordered: nn.Module,
    layers: Sequence[Layer],
    rows: Mapping[str, Tensor | None],
    batch: Batch,
    tolerance: Mapping[torch.dtype, float],
) -> dict[str, Order]:
    """The layers whose answers are not in the order that zipping takes them to be in.

    Args:
        task: how the networks are called.
        original: the network.
        reordered: a copy of it, its units in another order.
        layers: of the networks.
        rows: by layer name, which of the original's units each unit of the copy is; None where none has moved.
        batch: of the task's data.
        tolerance: by dtype, the rounding of answers relative to the largest.
    """
    seen = []
    for model in (original, reordered):
        with evaluating(model):
            seen.append(_glimpses(task, model, layers, batch))
    found = {}
    for layer in layers:
        before, after = (each.get(layer.name, []) for each in seen)
        if len(before) != layer.calls or len(after) != layer.calls:
            continue
        order = rows[layer.name]
        units = all(_alike(a.means, b.means, order, tolerance) for a, b in zip(before, after, strict=True))
        alike = all(_alike(a.rows, b.rows, order, tolerance) for a, b in zip(before, after, strict=True))
        if not (units and alike):
            found[layer.name] = Order(not units, not alike)
    return found


class _Glimpse(NamedTuple):
    """What a layer answers in one call, in little.

    Attributes:
        rows: [places, units], at some places.
        means: [2, units], mean and root mean square over all places.
    """

    rows: Tensor
    means: Tensor


def _glimpses(task: Task, model: nn.Module, layers: Sequence[Layer], batch: Batch) -> dict[str, list[_Glimpse]]:
    """What layers answer to one batch, call by call, at the same places for any model of the same layers."""
    found: dict[str, list[_Glimpse]] = {}

    def take(layer: Layer, read: Read) -> None:
        z = outputs_of(read, layer)
        shape = z.shape[:-1]
        generator = torch.Generator().manual_seed(len(found.setdefault(layer.name, [])))
        chosen = torch.randint(max(math.prod(shape), 1), (min(_PLACES, math.prod(shape)),), generator=generator)
        over = tuple(range(z.dim() - 1))
        means = torch.stack([z.mean(over), torch.linalg.vector_norm(z, dim=over) / math.prod(shape) ** 0.5])
        found[layer.name].append(_Glimpse(z[torch.unravel_index(chosen.to(z.device), shape)], means))

    run_to(task, model, layers, take, batch, 0)
    return found


def _alike(before: Tensor, after: Tensor, order: Tensor | None, tolerance: Mapping[torch.dtype, float]) -> bool:
    if order is not None:
        before = before[:, order.to(before.device)]
    if before.shape != after.shape:
        return False
    largest = before.abs().max() if before.numel() else 0
    apart = (before - after).abs()
    return not apart.numel() or bool(apart.nan_to_num(0).max() <= tolerance.get(before.dtype, 5e-2) * largest)
