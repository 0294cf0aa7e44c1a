"""A scale and a shift of its own for each task and shared unit, by least squares; what is shared has a common size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from taskzip.algebra import SAME, LayerStatistics, checked_fit, own_scale
from taskzip.zipping.alignment import JointInputs
from taskzip.zipping.joining import JointLayer
from taskzip.zipping.members import Member
from taskzip.zipping.shared_rows import shared_rows
from taskzip.zipping.spaces import Part
from taskzip.zipping.steps import where

_NO_ROWS = np.empty(0, np.int64)


def own_scales(
    members: Sequence[Member],
    inputs: JointInputs,
    parts: Sequence[Part],
    joints: Sequence[JointLayer],
    statistics: Mapping[int, LayerStatistics | None],
    weights: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """By what each task multiplies its rows, 1 where they are its own; its biases are written into the weights.

    What is shared, so far of size 1, gets the geometric mean of its owners' sizes.
    """
    found: dict[int, Tensor] = {}
    sizes = {t: members[t].sizes(layer) for t, layer in inputs.layers.items()}
    common = _common_sizes(sizes, parts, joints)
    for t, layer in inputs.layers.items():
        rows = np.concatenate([_NO_ROWS, *shared_rows(t, parts, joints).values()])
        shared, seen = torch.from_numpy(rows).to(weights[t].device), statistics[t]
        assert seen is not None
        size, mean = (torch.from_numpy(each[t][rows]).to(weights[t]) for each in (sizes, common))
        weights[t][shared] *= mean[:, None]
        size = torch.where((size / mean - 1).abs() > SAME, size / mean, 1)
        present, units = size[:, None] * weights[t][shared], seen.of_units(shared)
        scale, shift = own_scale(units, present, bias=layer.bias is not None)
        scaled = scale[:, None] * present
        scaled[:, -1] += shift
        better = (checked_fit(where(members[t], layer), units, present, scaled) == scaled).all(1)
        scale = torch.where(better, scale, 1) * size
        found[t] = torch.ones_like(weights[t][:, 0]).index_copy(0, shared, scale)
        weights[t][shared, -1] = torch.where(better, scaled[:, -1], present[:, -1])
    return found


def _common_sizes(
    sizes: Mapping[int, np.ndarray], parts: Sequence[Part], joints: Sequence[JointLayer]
) -> dict[int, np.ndarray]:
    """Per task, of each row the geometric mean of the sizes that it has in all tasks that share it."""
    found = {t: each.copy() for t, each in sizes.items()}
    for part, joint in zip(parts, joints, strict=True):
        for owners, group in joint.groups.items():
            rows = {t: part.rows[t][group.units[:, k].cpu().numpy()].ravel() for k, t in enumerate(owners)}
            mean = np.exp(np.mean([np.log(sizes[t][each]) for t, each in rows.items()], axis=0))
            for t, each in rows.items():
                found[t][each] = mean
    return found
