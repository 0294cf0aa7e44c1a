"""The curves of a zip (`curves`), written down layer by layer while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from taskzip.planning import Curve, PartSize, Place, Quota, Read
from taskzip.zipping.alignment import JointInputs
from taskzip.zipping.joining import JointLayer
from taskzip.zipping.members import Member
from taskzip.zipping.spaces import Part


class Recorder:
    """Curves of what was shared, up to as many pairs as were made: of all units after `zip(share=1.0)`.

    Attributes:
        curves: of the layers that could share, in the order in which they ran.
    """

    def __init__(self, members: Sequence[Member], *, adapt: bool) -> None:
        self._adapt = adapt
        self.curves: list[Curve] = []
        self._members = members
        self._writers: dict[int, Place] = {}

    def record(
        self,
        layer: str,
        inputs: JointInputs,
        parts: Sequence[Part],
        joints: Sequence[JointLayer],
        aligned: Sequence[bool],
        *,
        scaled: bool,
    ) -> float:
        """Write down one layer, after its units were paired and before anything is written or put into order.

        Args:
            layer: its name.
            inputs: what it reads in common.
            parts: its units by joint space.
            joints: per part, what became of it.
            aligned: per part, whether later layers read all of its units in common, whether they are shared or not.
            scaled: whether every task has a scale and a shift of its own for each shared row.

        Returns:
            What all of its pairs cost, relative to the layer's energy.
        """
        sizes = [PartSize(part.units, next(iter(part.rows.values())).shape[1], part.pairable()) for part in parts]
        bias = -len(inputs.layers) if scaled else max(len(inputs.bias) - 1, 0)
        cost = _relative_cost(sizes, joints)
        self.curves.append(Curve(layer, cost, sizes, bias, self._reads(inputs), self._adapt and inputs.cross))
        for number, (part, whole) in enumerate(zip(parts, aligned, strict=True)):
            placed = any(space in self._members[t].slots for t, space in part.spaces.items())
            if not whole and not placed:
                self._writers[part.joint] = (layer, number)
        return self.curves[-1].cost[-1]

    def _reads(self, inputs: JointInputs) -> list[Read]:
        taps = next(iter(inputs.layers.values())).taps
        columns: dict[int | None, int] = {}
        once: dict[int | None, int] = {}
        for segment in inputs.segments:
            alone = sum(map(len, segment.channels.values()))
            columns[segment.source] = columns.get(segment.source, 0) + (alone - segment.size) * taps
            once[segment.source] = once.get(segment.source, 0) + (0 if inputs.cross else alone * taps)
        return [Read(n, _writer(self._writers, source), once[source]) for source, n in columns.items()]


def _writer(writers: Mapping[int, Place], source: int | None) -> Place | None:
    return None if source is None else writers.get(source)


def _relative_cost(parts: Sequence[PartSize], joints: Sequence[JointLayer]) -> list[float]:
    """Of k = 0, 1, ... pairs, the cheapest of every part and every added task; what has no energy costs nothing."""
    energy = sum(joint.energy() for joint in joints)
    sums = [[np.cumsum([0.0, *np.sort(d.cpu().numpy())]) for d in joint.costs] for joint in joints]
    total = []
    for k in range(sum(part.units for part in parts) + 1):
        pairs = [quota.pairs for quota in Quota(k).divided([part.units for part in parts])]
        cost = sum(each[min(n, len(each) - 1)] for n, of in zip(pairs, sums, strict=True) for each in of)
        total.append(float(cost) / energy if energy > 0 else 0.0)
    return total
