"""Where to begin with the order of a stream that layers read before any of them writes it.

An embedding begins such a stream, or a learned token. The first layer that reads it reads units of which no partner is
known yet, so that nothing can be compared there. But tensors of the networks lie along the stream, too: the rows of a
table and the weights of a norm are in an order that both networks have, so that units can be told by their numbers in
them. Where that is little, the numbers along an axis that moves by itself help, sorted: no order changes these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taskzip.zipping.members import Member

_ENOUGH = 16
"""So many numbers of a unit in a fixed order tell it apart from the others."""

_MOST = 4096
"""Of a table with more numbers for each unit so many are looked at."""


@dataclass(frozen=True)
class _Trait:
    """What a tensor says of each unit of a space.

    Attributes:
        values: [units, numbers in a fixed order, sorted numbers]; a single sorted number where none had to be sorted.
        place: along which axis of the tensor the space lies, and how many axes it has.
    """

    values: Tensor
    place: tuple[int, int]


def unlikeness(one: Member, space: int, other: Member, other_space: int) -> np.ndarray | None:
    """How far units of two networks are apart in the tensors that lie along both spaces.

    Args:
        one, space: a task and its space.
        other, other_space: another one, and its space.

    Returns:
        [units of one, units of the other], the summed squared difference relative to the mean square in each tensor;
        None where no tensor of one can be compared with any of the other.
    """
    found = _told(one, space, other, other_space, ordered=True)
    if sum(a.shape[1] for a, _ in found) < _ENOUGH:
        found += _told(one, space, other, other_space, ordered=False)
    return sum(_distance(a, b) for a, b in found).cpu().numpy() if found else None  # type: ignore[union-attr]


def _told(one: Member, space: int, other: Member, other_space: int, *, ordered: bool) -> list[tuple[Tensor, Tensor]]:
    """What tensors say of both networks' units, [units, numbers]; those of the same name go together, or in turn."""
    traits, others = (dict(_traits(m, s, ordered=ordered)) for m, s in ((one, space), (other, other_space)))
    pairs = [(traits[name], others[name]) for name in traits if name in others]
    if not pairs:
        pairs = list(zip(traits.values(), others.values(), strict=False))
    able = [(a, b) for a, b in pairs if a.place == b.place and a.values.shape[1] == b.values.shape[1]]
    return [_levelled(a.values, b.values) for a, b in able]


def _traits(member: Member, space: int, *, ordered: bool) -> Iterator[tuple[tuple[str, int], _Trait]]:
    """Of the tensors along a space, those whose other axes are in a fixed order, or the rest."""
    structure = member.structure
    tensors = dict(member.network.named_parameters()) | dict(member.network.named_buffers())
    for name, axes in structure.axes.items():
        moving = [ids is not None and bool((structure.space_of(ids) >= 0).any()) for ids in axes]
        for dim, ids in enumerate(axes):
            sorts = [k for k in range(len(axes)) if k != dim and moving[k]]
            if ids is None or name not in tensors or ordered == bool(sorts):
                continue
            places = structure.spaces[space].positions(ids)
            if places.size:
                stays = [k for k in range(len(axes)) if k != dim and not moving[k]]
                tensor = tensors[name].detach().double().permute(dim, *stays, *sorts)
                values = tensor[torch.from_numpy(places).to(tensor.device)].flatten(1, 1 + len(stays))
                values = values.flatten(2).sort(dim=2).values if sorts else values[..., None]
                yield (name, dim), _Trait(values, (dim, len(axes)))


def _levelled(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """As many sorted numbers of both: of the longer ones those that stand at the same parts of the way."""
    count = min(one.shape[2], other.shape[2])
    a, b = (_spaced(_spaced(each, count).flatten(1), _MOST) for each in (one, other))
    return a, b


def _spaced(values: Tensor, count: int) -> Tensor:
    """Along the last axis at most `count` of the values, at equal distances."""
    size = values.shape[-1]
    return values if size <= count else values[..., torch.linspace(0, size - 1, count).round().long().to(values.device)]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Squared differences between rows, relative to the mean square of all."""
    size = (one.square().sum() + other.square().sum()) / (len(one) + len(other))
    squares = one.square().sum(1)[:, None] + other.square().sum(1)[None, :] - 2 * one @ other.mT
    return squares.clamp_min(0) / size.clamp_min(1e-300)
