"""Each network by itself at a part of its size: `tz.compress`, and what each of its choices is worth.

`TASKZIP_DATA=data python benchmarks/alone.py [--pairs mnist-fashion lenet5 lenet300] [--sizes 0.1 0.25] [--draws 3]`

The networks of `taskzip reproduce methods` (trained into `--runs` if they are not there), nothing retrained, no labels.
Rise of the test error in points over the network's own, mean over draws of calibration images, for both networks of a
pair. "metric": errors count by what they do to the outputs, in all directions of a layer's answers; "by unit": by unit
only; "by layer": every unit of a layer alike; "uniform": all layers alike too, each with one part of its parameters.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import taskzip as tz
from taskzip.experiments import Shelf
from taskzip.experiments.methods import Bench
from taskzip.factoring import compressing
from taskzip.observing import Sensitivity


def diagonal(found: Sensitivity) -> Sensitivity:
    """What each unit matters, without what they have to do with each other."""
    return found._replace(metric=found.metric.diagonal().diag())


def one_number(found: Sensitivity) -> Sensitivity:
    """What the layer matters."""
    return found._replace(metric=found.metric.diagonal().mean() * torch.eye(len(found.metric), dtype=torch.float64))


def uniform(layers, parameters: int) -> list[int | None]:
    """The same part of its parameters for each layer; one whose every rank is larger stays whole."""
    part = parameters / sum(layer.whole for layer in layers)
    return [max(1, int(part * layer.whole / layer.each)) if layer.most else None for layer in layers]


METHODS: dict[str, tuple[Callable[[Sensitivity], Sensitivity], Callable]] = {
    "metric": (lambda found: found, compressing.choose_ranks),
    "by unit": (diagonal, compressing.choose_ranks),
    "by layer": (one_number, compressing.choose_ranks),
    "uniform": (one_number, uniform),
}


def compressed(task: tz.Task, size: float, method: str, seed: int) -> nn.Module:
    """`tz.compress` with other choices."""
    change, choose = METHODS[method]
    known, ranks = compressing.sensitivities, compressing.choose_ranks
    compressing.sensitivities = lambda *args: {name: change(found) for name, found in known(*args).items()}
    compressing.choose_ranks = choose
    try:
        return tz.compress(task, size, progress=False, seed=seed)
    finally:
        compressing.sensitivities, compressing.choose_ranks = known, ranks


@torch.no_grad()
def error(network: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Percent wrong."""
    x, y = test
    return 100 * float((torch.cat([network(part) for part in x.split(2000)]).argmax(1) != y).float().mean())


def main() -> None:
    """Print one row for each pair, size and method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", nargs="+", default=["mnist-fashion", "lenet5", "lenet300"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.1, 0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| pair | size | method | rise of both | mean |\n|---|---|---|---|---|")
    for name in options.pairs:
        pair = Bench(Shelf(options.runs / "networks", print), options.runs / "alone", name).pair
        drawn = [pair.calibration(seed) for seed in range(options.draws)]
        own = [error(task.model, test) for task, test in zip(drawn[0], pair.test, strict=True)]
        for size in options.sizes:
            for method in options.methods:
                rises = [
                    statistics.mean(
                        error(compressed(tasks[k], size, method, seed), pair.test[k]) - own[k]
                        for seed, tasks in enumerate(drawn)
                    )
                    for k in range(2)
                ]
                both = " / ".join(f"{rise:+.2f}" for rise in rises)
                print(f"| {name} | {size:g} | {method} | {both} | {statistics.mean(rises):+.2f} |", flush=True)


if __name__ == "__main__":
    main()
