"""What each step of the method is worth: rivals, the paper's own, and what taskzip adds, one row each.

Every hidden unit is shared, and then three quarters of them, for which private weights can follow; where all are, the
main methods are retrained too. Mean and standard deviation over five seeds: of calibration images, random pairs and
retraining.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import taskzip as tz
from taskzip.experiments.networks import Kind, Shelf
from taskzip.experiments.pairs import Pair
from taskzip.experiments.results import Results
from taskzip.experiments.rivals import averaged
from taskzip.training import Loss

Case = Literal["lenet300", "lenet300-sparse", "lenet5", "lenet5-sparse", "mnist-fashion"]
CASES: tuple[Case, ...] = get_args(Case)

SEEDS = 5

_PLAIN: dict[str, Any] = {"compensate": False}
STEPS: dict[str, dict[str, Any]] = {
    "random pairs": {"matching": "random", **_PLAIN},
    "greedy MTZ (the paper)": {"matching": "greedy", **_PLAIN},
    "optimal pairs": _PLAIN,
    "+ output layers re-solved": {"compensate": "output"},
    "+ compensation": {"adapt": False, "spread": False, "own_scale": False},
    "+ spread": {"adapt": False, "own_scale": False},
    "+ private weights follow": {"own_scale": False},
    "+ own scale and shift": {},
    "the same, weak ridge": {"ridge": 1e-3},
}
PRUNED_STEPS: dict[str, dict[str, Any]] = {"connections of both": {"connections": "any"}}
"""Of pruned networks only; otherwise the default."""
RIVALS: dict[str, dict[str, bool]] = {
    "plain average": {"matched": False},
    "matched by correlation, averaged": {"matched": True},
    "the same, output layers re-solved": {"matched": True, "resolved": True},
}
SHARES = (1.0, 0.75)
BATCH = 64
"""Images of each task in one step of retraining."""

LATER: list[tuple[int, Loss]] = [(100, "labels"), (100, "distill"), (600, "labels"), (600, "distill")]
"""Retraining: steps and loss."""
RETRAINED = (
    "the same, output layers re-solved",
    "greedy MTZ (the paper)",
    "optimal pairs",
    "+ output layers re-solved",
    "+ private weights follow",
    "+ own scale and shift",
    "the same, weak ridge",
    "connections of both",
)
"""What is retrained, where all units are shared."""


class Measured(NamedTuple):
    """What one number is of."""

    share: float
    method: str
    steps: int
    loss: Loss | Literal[""]
    seed: int

    def key(self) -> tuple[str, ...]:
        """As columns of a file."""
        return tuple(map(str, self))


def run(shelf: Shelf, out: Path, case: Case) -> str:
    """Write methods-<case>.csv and methods-<case>.md, and return what stands in the latter.

    Args:
        shelf: for the trained and the pruned networks.
        out: folder of both files, made where it is absent.
        case: which networks.

    Raises:
        InputError: MNIST or Fashion-MNIST is absent.
        OSError: a file cannot be written.
    """
    bench = Bench(shelf, out, case)
    for seed in range(SEEDS):
        bench.measure(seed)
    text = "\n\n".join(table(bench.results, share) for share in SHARES)
    (out / f"methods-{case}.md").write_text(text + "\n")
    return text


def table(results: Results, share: float) -> str:
    """One Markdown table: mean errors, and the rise of the mean of both with its deviation over the seeds."""
    later = LATER if share == 1 else []
    titles = [
        f"{share:.0%} of the units shared",
        "A",
        "B",
        "rise",
        *(f"{steps} steps, {loss}" for steps, loss in later),
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for method in ([*RIVALS] if share == 1 else []) + [*STEPS, *PRUNED_STEPS]:
        first = _found(results, Measured(share, method, 0, "", 0))
        if not first:
            continue
        errors = [statistics.mean(values[k] for values in first) for k in (2, 3)]
        cells = [f"{errors[0]:.2f}", f"{errors[1]:.2f}", _rise(first)]
        cells += [_rise(_found(results, Measured(share, method, steps, loss, 0))) for steps, loss in later]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Bench:
    """All rows of one kind of networks."""

    def __init__(self, shelf: Shelf, out: Path, case: Case) -> None:
        self.shelf, self.case = shelf, case
        self.results = Results(
            out / f"methods-{case}.csv", Measured._fields, ["before_a", "before_b", "error_a", "error_b"]
        )

    @cached_property
    def pair(self) -> Pair:
        """The two networks."""
        get = self.shelf.pruned if self.case.endswith("sparse") else self.shelf.trained
        if self.case == "mnist-fashion":
            return Pair((get("lenet5", "mnist", 0), get("lenet5", "fashion", 0)), ("mnist", "fashion"))
        kind: Kind = "lenet300" if self.case.startswith("lenet300") else "lenet5"
        return Pair((get(kind, "mnist", 0), get(kind, "mnist", 1)), ("mnist", "mnist"))

    @cached_property
    def before(self) -> tuple[float, float]:
        """Their errors."""
        return self.pair.before()

    def measure(self, seed: int) -> None:
        """All numbers of one seed."""
        tasks = self.pair.calibration(seed)
        for share in SHARES:
            for method, make in self._ways(tasks, share, seed).items():
                self._row(Measured(share, method, 0, "", seed), make)

    def _ways(self, tasks: Sequence[tz.Task], share: float, seed: int) -> dict[str, Callable[[], tz.ZippedModel]]:
        zips: dict[str, Callable[[], tz.ZippedModel]] = {
            name: partial(tz.zip, tasks, share=share, progress=False, seed=seed, **options)
            for name, options in (STEPS | PRUNED_STEPS if self.case.endswith("sparse") else STEPS).items()
        }
        rivals: dict[str, Callable[[], tz.ZippedModel]] = {
            name: partial(averaged, tasks, **options) for name, options in RIVALS.items()
        }
        return (rivals | zips) if share == 1 else zips

    def _row(self, what: Measured, make: Callable[[], tz.ZippedModel]) -> None:
        retrained = what.share == 1 and what.method in RETRAINED
        later = [what._replace(steps=n, loss=loss) for n, loss in LATER if retrained]
        if all(each.key() in self.results.found for each in (what, *later)):
            return
        zipped = make()
        self.results.of(what.key(), lambda: (*self.before, *self.pair.errors(zipped)))
        for each in later:
            self.results.of(each.key(), partial(self._retrained, zipped, each))
        self.shelf.say(f"{self.case}, seed {what.seed}, {what.share:.0%}: {what.method}")

    def _retrained(self, zipped: tz.ZippedModel, what: Measured) -> tuple[float, ...]:
        assert what.loss
        retrained = self.pair.retrained(zipped, what.steps, what.loss, what.seed, batch=BATCH)
        return (*self.before, *self.pair.errors(retrained))


def _found(results: Results, what: Measured) -> list[tuple[float, ...]]:
    """The numbers of all seeds."""
    keys = [what._replace(seed=seed).key() for seed in range(SEEDS)]
    return [results.found[key] for key in keys if key in results.found]


def _rise(found: Sequence[tuple[float, ...]]) -> str:
    """Mean and standard deviation of the rise of both errors, in points."""
    rises = [(a + b - before_a - before_b) / 2 for before_a, before_b, a, b in found]
    return f"{statistics.mean(rises):+.2f} ± {statistics.stdev(rises):.2f}" if rises else ""
