"""What sharing costs and saves: a curve per layer, and the plan of least cost that saves a given number of parameters.

The cost of a plan is the sum over layers of the functional differences (eq. 12) of their pairs, each relative to the
layer's energy, so that layers are comparable. What it saves follows from the block rule (design 2.1): a pair of units
saves its incoming weights from shared inputs, so that layers that follow one another gain from each other's sharing.
Where the other weights follow these, a pair costs less, too, the fewer inputs are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskzip.planning.plan import Quota

Counts = dict[str, int]
"""A plan: how many pairs each layer shares."""

Place = tuple[str, int]
"""A layer and the number of one of its parts."""

_HALVINGS = 50
_PASSES = 5

_TRIES = 12

_POWER = 4
"""A pair costs this power of the fraction of inputs that are shared: private weights follow the shared ones, and the
best pairs of the layer before are shared first. Inputs that do not tell of each other would give the first; between
the fourth and the sixth was measured on trained perceptrons."""


class Read(NamedTuple):
    """Inputs that several tasks read in common.

    Attributes:
        columns: weights that one shared row saves here if all these inputs are shared.
        writer: the part of a layer whose sharing decides how many of them are; None where all are in any case.
        lost: weights that one shared row loses, and saves on top of these, without `cross` if none of them are shared.
    """

    columns: int
    writer: Place | None
    lost: int = 0


class PartSize(NamedTuple):
    """The units of a layer that lie in one joint space.

    Attributes:
        units: how many pairs there can be at most when a task is added.
        rows: of a unit.
        added: per task that is added, how many of its units can be paired; none where all can be.
    """

    units: int
    rows: int
    added: Sequence[int] = ()

    def pairs(self, count: int) -> float:
        """How many pairs a count makes, as the mean over the tasks that are added."""
        return sum(min(count, most) for most in self.added) / len(self.added) if self.added else count


class Curve(NamedTuple):
    """What sharing more and more units of one layer costs, and what it saves.

    Attributes:
        layer: its name.
        cost: of k = 0, 1, ... pairs, the cheapest first: their d (eq. 12) relative to the layer's energy, summed.
        parts: its units by joint space.
        bias: parameters that a shared row saves without any input: its bias, once for each further task; or less than
            none, where it has a scale and a bias for each task.
        reads: the inputs that are common.
        follows: whether weights of inputs that are not common follow the shared ones.
    """

    layer: str
    cost: Sequence[float]
    parts: Sequence[PartSize]
    bias: int
    reads: Sequence[Read]
    follows: bool = False

    @property
    def units(self) -> int:
        """How many pairs the layer can share at most."""
        return len(self.cost) - 1


class Tradeoff:
    """The curves of all layers together, in the order in which these run.

    Exact for two tasks; with more, which units meet in one group is not known before, and the saving is an estimate.
    With `cross=False` it is the least that is saved: weights from private to shared units, which then do not exist, are
    left out, for their saving grows as earlier layers share less, while the costs of doing without them are not known.
    `expected` counts them.
    """

    def __init__(self, curves: Iterable[Curve]) -> None:
        self._curves = list(curves)
        self._cost = {curve.layer: np.asarray(curve.cost) for curve in self._curves}
        self.everything: Counts = {curve.layer: curve.units for curve in self._curves}
        self._readers: dict[str, list[Curve]] = {curve.layer: [] for curve in self._curves}
        for curve in self._curves:
            for writer in {read.writer[0] for read in curve.reads if read.writer} if curve.follows else ():
                self._readers[writer].append(curve)

    def cost(self, plan: Mapping[str, int]) -> float:
        """The relative cost of a plan."""
        return float(sum(self._cost[c.layer][plan[c.layer]] * self._weight(c, plan) for c in self._curves))

    def saving(self, plan: Mapping[str, int]) -> int:
        """How many parameters a plan saves."""
        return self._walked(plan)[1]

    def expected(self, plan: Mapping[str, int]) -> int:
        """The same, with the weights that shared units lose."""
        return self._walked(plan)[2]

    def possible(self, plan: Mapping[str, int]) -> Counts:
        """The plan without layers that read nothing in common, which cannot share."""
        return self._walked(plan)[0]

    def paying(self) -> Counts:
        """Everything but layers in which sharing costs more than it saves: units of few weights have scales, too."""
        plan = self.everything
        while loss := [layer for layer, gain in self._gains(plan).items() if plan[layer] and gain < 0]:
            plan = self.possible({**plan, **dict.fromkeys(loss, 0)})
        return plan

    def cheapest(self, saving: float) -> Counts:
        """The plan of least cost that saves at least so many parameters; everything where none does."""
        starts = [self._smallest(saving, self._at_price), self._smallest(saving, self._in_proportion)]
        return min((self._improved(start, saving) for start in starts), key=self.cost)

    def fitting(self, expected: float) -> Counts:
        """The plan of least cost that is expected to save at least so many parameters."""
        plan, low, high = self.cheapest(expected), 0.0, expected
        for _ in range(_TRIES if self.expected(plan) > self.saving(plan) else 0):
            other = self.cheapest((low + high) / 2)
            if self.expected(other) >= expected:
                plan, high = other, (low + high) / 2
            else:
                low = (low + high) / 2
        return self._pared(plan, expected) if self.expected(plan) > self.saving(plan) else plan

    def _pared(self, plan: Counts, expected: float) -> Counts:
        """Give pairs back one by one, most cost first, as long as enough is expected to be saved."""
        while True:
            fewer = [self.possible({**plan, layer: count - 1}) for layer, count in plan.items() if count]
            fewer = [each for each in fewer if self.expected(each) >= expected and self.cost(each) < self.cost(plan)]
            if not fewer:
                return plan
            plan = min(fewer, key=self.cost)

    def _walked(self, plan: Mapping[str, int]) -> tuple[Counts, int, int]:
        shared: dict[Place, float] = {}
        counts: Counts = {}
        total = lost = 0.0
        for layer, _, parts, bias, reads, _ in self._curves:
            inputs = sum(columns * (1 if writer is None else shared[writer]) for columns, writer, _ in reads)
            counts[layer] = count = plan[layer] if inputs else 0
            more = sum(each * (0 if writer is None else 1 - shared[writer]) for _, writer, each in reads)
            for k, (part, n) in enumerate(zip(parts, _pairs(count, parts), strict=True)):
                pairs = part.pairs(n)
                shared[layer, k] = pairs / part.pairs(part.units)
                total += pairs * part.rows * (bias + inputs)
                lost += pairs * part.rows * more
        return counts, round(total), round(total + lost)

    def _weight(self, curve: Curve, plan: Mapping[str, int | np.ndarray]) -> Any:
        """What pairs of a layer cost with a plan, relative to what they do with everything shared before it."""
        columns = sum(read.columns for read in curve.reads)
        if not curve.follows or not columns:
            return 1.0
        shared = sum(n * (1 if w is None else plan[w[0]] / max(self.everything[w[0]], 1)) for n, w, _ in curve.reads)
        return (shared / columns) ** _POWER

    def _costs(self, plan: Mapping[str, int], layer: str) -> np.ndarray:
        """What up to as many pairs of a layer as the plan has cost there and in the layers that read it."""
        counts = np.arange(plan[layer] + 1)
        curve = next(curve for curve in self._curves if curve.layer == layer)
        total: np.ndarray = self._cost[layer][counts] * self._weight(curve, plan)
        for reader in self._readers[layer]:
            total = total + self._cost[reader.layer][plan[reader.layer]] * self._weight(reader, {**plan, layer: counts})
        return total

    def _gains(self, plan: Mapping[str, int]) -> dict[str, float]:
        """What one more pair of each layer saves: its own weights, and those of later layers that read it."""
        inputs: dict[str, float] = {}
        read: dict[Place, float] = {}
        for layer, _, parts, _, reads, _ in self._curves:
            rows = sum(part.pairs(n) * part.rows for part, n in zip(parts, _pairs(plan[layer], parts), strict=True))
            inputs[layer] = 0.0
            for columns, writer, _ in reads:
                if writer is None:
                    inputs[layer] += columns
                else:
                    inputs[layer] += columns * plan[writer[0]] / self.everything[writer[0]]
                    read[writer] = read.get(writer, 0.0) + columns * rows
        return {
            layer: sum(
                part.pairs(part.units) * part.rows * (bias + inputs[layer]) + read.get((layer, k), 0.0)
                for k, part in enumerate(parts)
            )
            / max(self.everything[layer], 1)
            for layer, _, parts, bias, _, _ in self._curves
        }

    def _smallest(self, saving: float, plan_at: Callable[[float], Counts]) -> Counts:
        """Of plans that grow as a number goes from 0 to 1, the first that saves enough."""
        if self.saving(plan_at(0)) >= saving:
            return plan_at(0)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.saving(plan_at(middle)) >= saving else (middle, high)
        return plan_at(high)

    def _in_proportion(self, fraction: float) -> Counts:
        return self.possible({layer: round(fraction * units) for layer, units in self.everything.items()})

    def _at_price(self, level: float) -> Counts:
        """Every pair that costs less than what it saves, its parameters counted at one price each.

        What a pair saves depends on the other layers: begun with everything, counts only ever fall, and settle at the
        largest plan that no single layer can better. A higher price gives no smaller plan in any layer.
        """
        if level >= 1:
            return self.everything
        price, plan = level / (1 - level) / max(self.saving(self.everything), 1), self.everything
        while True:
            before = plan
            for layer, gain in self._gains(plan).items():
                profit = price * gain * np.arange(plan[layer] + 1) - self._costs(plan, layer)
                plan = {**plan, layer: len(profit) - 1 - int(np.argmax(profit[::-1]))}  # the larger of equals
            plan = self.possible(plan)
            if plan == before:
                return plan

    def _improved(self, plan: Counts, saving: float) -> Counts:
        """Give pairs back as long as enough is saved; then raise a layer where another can give back more for it."""
        plan = self._trimmed(plan, saving)
        for _ in range(_PASSES):
            before = plan
            for layer, units in self.everything.items():
                for count in {plan[layer] + 1, plan[layer] + max(1, units // 16), units}:
                    if plan[layer] < count <= units:
                        other = self._given_back({**plan, layer: count}, saving)
                        plan = other if self.cost(other) < self.cost(plan) * (1 - 1e-9) else plan
            plan = self._trimmed(plan, saving)
            if plan == before:
                break
        return plan

    def _trimmed(self, plan: Counts, saving: float) -> Counts:
        """Give back pairs that cost anything, until one more would save too little."""
        while (fewer := self._given_back(plan, saving)) != plan:
            plan = fewer
        return plan

    def _given_back(self, plan: Counts, saving: float) -> Counts:
        """Give back pairs of that one layer where most cost can go; the plan itself where none can."""
        spare, gains = self.saving(plan) - saving, self._gains(plan)
        fewer = {
            layer: count - min(count, int(spare / gains[layer])) if gains[layer] > 0 else 0
            for layer, count in plan.items()
            if count and spare >= 0
        }
        drops = {layer: (costs := self._costs(plan, layer))[-1] - costs[count] for layer, count in fewer.items()}
        for layer in sorted((layer for layer in drops if drops[layer] > 0), key=lambda layer: -drops[layer]):
            for count in range(fewer[layer], min(fewer[layer] + 2, plan[layer])):  # parts are divided by rounding
                smaller = self.possible({**plan, layer: count})
                if self.saving(smaller) >= saving:
                    return smaller
        return plan


def _pairs(count: int, parts: Sequence[PartSize]) -> list[int]:
    """So many pairs over the parts of a layer."""
    if len(parts) == 1:
        return [count]
    return [quota.pairs for quota in Quota(count).divided([part.units for part in parts])]
