"""Share plans that are found: the cheapest that fits a `Budget`, the largest within a `MaxDrop`.

Both begin with everything shared, which tells what sharing costs and saves in each layer (`curves`), and then zip anew
with plans that these curves suggest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn

from taskzip.errors import InputError
from taskzip.planning.curves import Counts, Curve, Tradeoff
from taskzip.planning.held_out import Values, judges
from taskzip.planning.plan import Budget, MaxDrop, SearchPlan, Share
from taskzip.randomness import seeded
from taskzip.tasks import Task
from taskzip.zipped import ZippedModel, separate_parameters

log = logging.getLogger("taskzip")

Zip = Callable[[Share], tuple[ZippedModel, list[Curve]]]
"""Zips with a plan, and tells the curves of what was shared."""

_ZIPS = 3
"""With a budget, so many zips after the first where the size cannot be told before."""

_CLOSE = 0.002
"""A budget is met when no more than this part of the separate networks is left of it."""

_HALVINGS = 5
"""So often the family of plans is halved, down to 1/32 of what everything shared saves."""

_LAYER_TRIES = 3
"""So many counts of one layer are tried after that."""

_WORTH = 0.005
"""A layer is not raised for less than this part of what everything shared saves."""


def search(wanted: SearchPlan, tasks: Sequence[Task], zip_with: Zip, *, seed: int, progress: bool) -> ZippedModel:
    """Zip with the plan that `wanted` asks for; `history.settings` says which one that was, and what it was found by.

    Raises:
        InputError: a budget that nothing fits, or held-out data or a metric that cannot be used.
    """
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[seen]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        if isinstance(wanted, Budget):
            return _Fitting(wanted, zip_with, bar).run()
        return _Dropping(wanted, tasks, zip_with, seed, bar).run()


class _Display:
    """What is being tried, on the progress bar and in the log."""

    def __init__(self, bar: Progress, most: int) -> None:
        self._bar = bar
        self._todo = bar.add_task("everything shared", total=most, seen="")
        self.zips = 0

    def say(self, saving: float | None) -> None:
        """A plan that saves this part of all parameters is about to be zipped; None where everything is shared."""
        self.zips += 1
        what = "everything shared" if saving is None else f"saves {saving:.0%}"
        self._bar.update(self._todo, description=f"evaluation {self.zips}: {what}")

    def saw(self, seen: str) -> None:
        """What came of it."""
        log.info("evaluation %d: %s", self.zips, seen)
        self._bar.update(self._todo, advance=1, seen=seen)


class _Fitting:
    """The search for a `Budget`."""

    def __init__(self, wanted: Budget, zip_with: Zip, bar: Progress) -> None:
        self._wanted = wanted
        self._zip_with = zip_with
        self._display = _Display(bar, 1 + _ZIPS)

    def run(self) -> ZippedModel:
        """Everything shared, then the cheapest plan that saves what must be saved, until that is met."""
        best, curves = self._zipped(Share(1.0), None)
        separate, limit = separate_parameters(best), self._limit(best)
        needed, tradeoff = separate - limit, Tradeoff(curves)
        plan = tradeoff.paying()
        if plan != tradeoff.everything:
            best, _ = self._zipped(Share(plan), tradeoff.expected(plan) / separate)
        smallest = best.parameter_count()
        if smallest > limit:
            raise self._too_small(best, smallest, separate)
        # What plans were expected to save that saved too little, and enough.
        low, high = 0.0, float(tradeoff.expected(plan))
        ask, tried, factor = float(needed), [plan], 1
        for _ in range(_ZIPS):
            found = tradeoff.fitting(ask)
            if found in tried:
                break
            tried.append(found)
            expected = tradeoff.expected(found)
            zipped, _ = self._zipped(Share(found), expected / separate)
            size = zipped.parameter_count()
            if size > limit:
                low = max(low, expected)
                ask, factor = expected + factor * (size - limit), 2 * factor  # what saved too little may do so again
            else:
                high, ask = min(high, expected), expected - (limit - size)
                if size >= best.parameter_count():
                    best, plan = zipped, found
                if size == separate - expected or limit - size <= _CLOSE * separate:
                    break
            ask = ask if low < ask <= high else (low + high) / 2
        size = best.parameter_count()
        _write(best, plan, self._wanted.as_dict() | {"parameters": size, "most": limit, "zips": self._display.zips})
        return best

    def _zipped(self, plan: Share, saving: float | None) -> tuple[ZippedModel, list[Curve]]:
        self._display.say(saving)
        zipped, curves = self._zip_with(plan)
        self._display.saw(f"{zipped.parameter_count():,} parameters")
        return zipped, curves

    def _limit(self, zipped: ZippedModel) -> int:
        size = self._wanted.size
        return int(size // _element_size(zipped) if isinstance(size, Integral) else size * separate_parameters(zipped))

    def _too_small(self, zipped: ZippedModel, smallest: int, separate: int) -> InputError:
        part, size = math.ceil(1e4 * smallest / separate) / 1e4, smallest * _element_size(zipped)
        return InputError(
            f"{self._wanted!r} cannot be met: however much is shared, the joint network still has {smallest:,} "
            f"parameters, so that Budget({part}) or Budget({size}) is the smallest possible."
        )


@dataclass(frozen=True)
class _Found:
    """A joint network within the limit."""

    zipped: ZippedModel
    plan: Counts
    reached: dict[str, Values]


class _Dropping:
    """The search for a `MaxDrop`."""

    def __init__(self, wanted: MaxDrop, tasks: Sequence[Task], zip_with: Zip, seed: int, bar: Progress) -> None:
        self._wanted = wanted
        self._points, self._quantile, self._most = wanted.points, wanted.quantile, wanted.evaluations
        self._zip_with = zip_with
        self._seed = seed
        with seeded(seed):
            self._judges = judges(tasks, wanted)
        self._display = _Display(bar, wanted.evaluations)
        self._separate = sum(p.numel() for task in tasks for p in task.model.parameters())
        self._too_much: list[Counts] = []
        self._best: _Found | None = None

    def run(self) -> ZippedModel:
        """Everything shared; if that loses too much, the family of cheapest plans; then layer by layer."""
        curves = self._evaluate({}, Share(1.0))
        # Here small savings are tried, too, and what a layer costs on few common inputs is not known well enough.
        tradeoff = Tradeoff(curve._replace(follows=False) for curve in curves)
        if self._best is None:
            self._too_much = [tradeoff.everything]
            self._family(tradeoff)
            self._refine(tradeoff)
        else:
            self._best = _Found(self._best.zipped, tradeoff.everything, self._best.reached)
        if self._best is None:
            nothing = dict.fromkeys(tradeoff.everything, 0)
            self._evaluate(nothing, Share(nothing), 0.0, anyway=True)
        assert self._best is not None
        return self._certified(self._best)

    @property
    def _left(self) -> int:
        """Evaluations that may still be made; one is kept for nothing shared as long as nothing else is found."""
        return self._most - self._display.zips - (self._best is None)

    def _family(self, tradeoff: Tradeoff) -> None:
        """Halve the range of savings: the plan of least cost that saves so much."""
        low, high = 0.0, float(tradeoff.saving(tradeoff.everything))
        for _ in range(_HALVINGS):
            plan = tradeoff.cheapest((low + high) / 2)
            if self._left < 1 or (self._best is not None and plan == self._best.plan):
                return
            low, high = ((low + high) / 2, high) if self._try(tradeoff, plan) else (low, (low + high) / 2)

    def _refine(self, tradeoff: Tradeoff) -> None:
        """Raise one layer after another as far as it goes, first where most is to be saved."""
        while self._best is not None and self._left > 0:
            before = self._best
            whole = [before.plan | {layer: units} for layer, units in tradeoff.everything.items()]
            for _, layer in sorted(zip(map(tradeoff.saving, whole), tradeoff.everything, strict=True), reverse=True):
                self._raise(tradeoff, layer)
            if self._best is before:
                return

    def _raise(self, tradeoff: Tradeoff, layer: str) -> None:
        """The largest count of a layer, to be found in few tries."""
        assert self._best is not None
        plan, high = self._best.plan, tradeoff.everything[layer] + 1
        count = high - 1
        for _ in range(_LAYER_TRIES):
            raised = plan | {layer: count}
            if self._left < 1 or tradeoff.possible(raised) != raised or not self._is_worth_it(tradeoff, plan, raised):
                return
            if self._try(tradeoff, raised):
                plan = raised
            else:
                high = count
            count = (plan[layer] + high) // 2

    def _is_worth_it(self, tradeoff: Tradeoff, plan: Counts, raised: Counts) -> bool:
        gain = tradeoff.saving(raised) - tradeoff.saving(plan)
        return gain > _WORTH * tradeoff.saving(tradeoff.everything)

    def _try(self, tradeoff: Tradeoff, plan: Counts) -> bool:
        """Whether a plan is within the limit; one that shares as much as another that was not, is not either."""
        if any(all(plan[layer] >= count for layer, count in other.items()) for other in self._too_much):
            return False
        self._evaluate(plan, Share(plan), tradeoff.saving(plan) / self._separate)
        if self._best is not None and self._best.plan == plan:
            return True
        self._too_much.append(plan)
        return False

    def _evaluate(
        self, plan: Counts, share: Share, saving: float | None = None, *, anyway: bool = False
    ) -> list[Curve]:
        """Zip with a plan and measure it; keep it where it is within the limit and smaller than the best so far."""
        self._display.say(saving)
        zipped, curves = self._zip_with(share)
        with seeded(self._seed):
            reached = {name: judge.measure(zipped[name]) for name, judge in self._judges.items()}
        found = _Found(zipped, plan, reached)
        worst = max(self._lost(found, self._quantile).values())
        self._display.saw(f"{zipped.parameter_count():,} parameters, {worst:.3g} lost of {self._points:g}")
        within = anyway or worst <= self._points
        if within and (self._best is None or zipped.parameter_count() < self._best.zipped.parameter_count()):
            self._best = found
        return curves

    def _lost(self, found: _Found, quantile: float) -> dict[str, float]:
        """Per task, without the rounding of the subtraction."""
        return {name: round(judge.loss(found.reached[name], quantile), 9) for name, judge in self._judges.items()}

    def _certified(self, found: _Found) -> ZippedModel:
        lost, most = self._lost(found, 0.0), self._lost(found, self._quantile)
        tasks = {
            name: {
                "before": judge.original.mean,
                "after": found.reached[name].mean,
                "lost": lost[name],
                "at_most": most[name],
                "samples": judge.samples,
            }
            for name, judge in self._judges.items()
        }
        about = self._wanted.as_dict() | {"tasks": tasks, "evaluations": self._display.zips}
        _write(found.zipped, found.plan, about)
        return found.zipped


def _write(zipped: ZippedModel, plan: Counts, about: dict[str, Any]) -> None:
    """What was found, and how, into the history."""
    zipped.history.settings |= {"share": Share(plan).as_dict(), "search": about}
    log.info("found: %s", ", ".join(f"{layer} {count}" for layer, count in plan.items()) or "nothing to share")


def _element_size(zipped: ZippedModel) -> int:
    """Bytes of a parameter; `zip` takes only networks in which all have one type."""
    return next(p for p in zipped.parameters() if p.is_floating_point()).element_size()
