"""Fig. 2 of the paper: test error against the number of shared units, for LeNet-300-100 twice on MNIST.

First the units of the first layer are shared one after another, then those of the second with the first fully shared;
nothing is retrained. Every point is one call of `tz.zip`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import taskzip as tz
from taskzip.experiments.networks import Shelf
from taskzip.experiments.pairs import Pair
from taskzip.experiments.results import Results
from taskzip.report import plot_curves

METHODS: dict[str, dict[str, Any]] = {
    "random pairs": {"matching": "random", "compensate": False},
    "MTZ as in the paper": {"matching": "greedy", "compensate": False},
    "taskzip's default": {},
}
UNITS = {"fc1": 300, "fc2": 100}
_TITLES = {"fc1": "(a) first layer", "fc2": "(b) second layer, the first fully shared"}


def run(shelf: Shelf, out: Path, every: int = 4) -> str:
    """Write fig2.csv and fig2.png, with a point for every so many units of the first layer, half as many of the second.

    Args:
        shelf: for the trained networks.
        out: folder of both files, made where it is absent.
        every: units from point to point.

    Returns:
        The ends of the curves as a Markdown table.

    Raises:
        InputError: MNIST is absent, or matplotlib.
        OSError: a file cannot be written.
    """
    pair = Pair((shelf.trained("lenet300", "mnist", 0), shelf.trained("lenet300", "mnist", 1)), ("mnist", "mnist"))
    tasks = pair.calibration(seed=0)
    results = Results(out / "fig2.csv", ["layer", "shared", "method"], ["error_a", "error_b"])
    for layer, shared in counts(every):
        share = {"fc1": shared} if layer == "fc1" else {"fc1": UNITS["fc1"], "fc2": shared}
        found = {
            method: results.of((layer, str(shared), method), partial(_errors, pair, tasks, share, options))
            for method, options in METHODS.items()
        }
        shelf.say(f"{layer}, {shared} shared: " + ", ".join(f"{m} {sum(e) / 2:.2f}" for m, e in found.items()))
    plot(results, out / "fig2.png")
    return table(results, pair.before())


def _errors(
    pair: Pair, tasks: Sequence[tz.Task], share: Mapping[str, int], options: Mapping[str, Any]
) -> tuple[float, float]:
    return pair.errors(tz.zip(tasks, share=share, progress=False, **options))


def counts(every: int) -> Iterator[tuple[str, int]]:
    """The points of the figure, the ends of both curves among them."""
    for layer, units in UNITS.items():
        step = every if layer == "fc1" else max(1, every // 2)
        yield from ((layer, shared) for shared in sorted({*range(0, units, step), units}))


def plot(results: Results, path: Path) -> None:
    """Both layers side by side, laid out as in the paper."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (layer, shared, method), errors in results.found.items():
        lines = panels.setdefault(_TITLES[layer], {m: [] for m in METHODS})
        lines[method].append((float(shared), sum(errors) / 2))
    ordered = {title: {name: sorted(line) for name, line in lines.items()} for title, lines in panels.items()}
    plot_curves(ordered, path, x="shared units", y="test error, mean of both (%)")


def table(results: Results, before: tuple[float, float]) -> str:
    """The rise of the mean error, in points, where a layer is fully shared."""
    lines = ["| mean rise, no retraining | first layer | both layers |", "|---|---|---|"]
    for method in METHODS:
        ends = [sum(results.found[layer, str(units), method]) / 2 for layer, units in UNITS.items()]
        lines.append(f"| {method} | " + " | ".join(f"{end - sum(before) / 2:+.2f}" for end in ends) + " |")
    return "\n".join([*lines, "| the paper | +0.95 | +1.50 |"])
