"""Units of all tasks are given equal sizes before they are zipped, and the sizes back that they had when they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn

from taskzip.graph import multiply
from taskzip.zipped import along, installed, spec_of
from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.equalising import restored
from taskzip.zipping.members import Member

Spaces = list[tuple[int, int]]
"""Tasks, and a space of each."""


def equal_sizes(members: Sequence[Member], layers: Sequence[JointLayers], seed: int) -> None:
    """Give the units of all tasks equal sizes, in place (`equalising`).

    What the networks are given varies as much as it does in the mean of those tasks whose layers correspond, so that
    equal networks stay equal on different data.
    """
    own = [member.input_variances(seed) for member in members]
    joint: list[dict[str, np.ndarray]] = [{} for _ in members]
    for each in layers:
        given = {t: own[t][layer.name] for t, layer in each.items() if layer.name in own[t]}
        for t, variance in given.items():
            alike = [other for other in given.values() if len(other) == len(variance)]
            joint[t][each[t].name] = np.mean(alike, axis=0)
    for member, variances in zip(members, joint, strict=True):
        member.equalise(variances)


def restore_scales(members: Sequence[Member], paired_anew: Collection[int]) -> None:
    """Undo what gave units equal sizes, in place; shared units become as large as the geometric mean of theirs.

    Args:
        members: the tasks, all of whose layers are zipped.
        paired_anew: the joint spaces whose layers have pairs of their own, so that one weight is that of units in
            several slots: all units of these are scaled alike.
    """
    scales: list[dict[int, np.ndarray]] = [{} for _ in members]
    for joint, spaces in _together(members):
        if all(space in members[t].known.scales for t, space in spaces):  # else one of them has a size of its own
            slots = [_slots(members[t], space, joint in paired_anew) for t, space in spaces]
            sizes = [members[t].known.scales[space] for t, space in spaces]
            for (t, space), scale in zip(spaces, restored(sizes, slots), strict=True):
                scales[t][space] = scale
    _rescale(members, scales)


def _together(members: Sequence[Member]) -> list[tuple[int, Spaces]]:
    """The spaces that were put into order, by joint space, and every other one by itself (-1)."""
    found: dict[int, Spaces] = {}
    alone = []
    for t, member in enumerate(members):
        for space in member.known.scales.keys() | member.slots.keys():
            if space in member.slots:
                found.setdefault(member.slots[space][0], []).append((t, space))
            else:
                alone.append((-1, [(t, space)]))
    return [*found.items(), *alone]


def _slots(member: Member, space: int, one: bool) -> np.ndarray:
    units = np.arange(len(member.known.scales[space]))
    if one:
        return np.zeros_like(units)
    return member.slots[space][1] if space in member.slots else units


def _rescale(members: Sequence[Member], scales: Sequence[dict[int, np.ndarray]]) -> None:
    """Every tensor once, though several tasks may use it; a task may use some of its inputs only."""
    shared: dict[nn.Parameter, tuple[np.ndarray, np.ndarray]] = {}
    for member, each in zip(members, scales, strict=True):
        blocks = installed(member.network)
        tensors = dict(member.network.named_parameters()) | dict(member.network.named_buffers())
        for name, factors in member.structure.factors(each, tensors).items():
            if name not in blocks:
                multiply(tensors[name], factors)
                continue
            shape, device = spec_of(blocks[name]).dense_shape, next(blocks[name].parameters()).device
            whole = [np.ones(n) if factor is None else factor for n, factor in zip(shape, factors, strict=True)]
            units, inputs = (torch.from_numpy(factor).to(device) for factor in (*whole, np.empty(0))[:2])
            for parameter, rows, columns in along(blocks[name], units, inputs):
                if parameter not in shared or len(columns) > len(shared[parameter][1]):
                    shared[parameter] = (rows.cpu().numpy(), columns.cpu().numpy())
    for parameter, pair in shared.items():
        multiply(parameter, (*pair, *(None,) * parameter.dim())[: parameter.dim()])
