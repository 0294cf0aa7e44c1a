"""Which rows of a task's layer are shared with whom, once the units of all joint spaces were joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskzip.zipping.joining import JointLayer
from taskzip.zipping.members import Owners
from taskzip.zipping.spaces import Part


def shared_rows(task: int, parts: Sequence[Part], joints: Sequence[JointLayer]) -> dict[Owners, np.ndarray]:
    """Which rows of a task's layer, as they lie now, it shares with whom."""
    found: dict[Owners, list[np.ndarray]] = {}
    for part, joint in zip(parts, joints, strict=True):
        for owners, units in joint.units_of(task).items() if task in part.rows else ():
            if len(owners) > 1:
                found.setdefault(owners, []).append(part.rows[task][units.cpu().numpy()].ravel())
    return {owners: np.concatenate(rows) for owners, rows in found.items()}
