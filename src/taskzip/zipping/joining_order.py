"""In which order tasks are added to the joint network."""

from __future__ import annotations

from collections.abc import Sequence

from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.members import Member


def joining_order(members: Sequence[Member], layers: Sequence[JointLayers]) -> list[int]:
    """The numbers of the tasks, the one with most units in common layers first.

    So that every unit of a later task finds a partner. It does not depend on the order in which tasks were given:
    networks of equal widths come in the order of the sizes of their weights, which is arbitrary. Of two tasks it does
    not matter which one comes first.
    """
    given = range(len(members))
    if len(members) == 2:
        return list(given)
    units = [
        sum(layer[t].units for layer in layers if t in layer and len(layer) > 1 and not layer[t].pinned) for t in given
    ]
    weights = [sum(float(p.detach().abs().double().sum()) for p in m.network.parameters()) for m in members]
    return sorted(given, key=lambda t: (-units[t], -weights[t]))
