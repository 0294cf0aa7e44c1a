"""ResNets zipped: pairs at several shares, and five tasks in one network. Prints the tables of docs/results.

    TASKZIP_DATA=... python benchmarks/resnet_zip.py [garment] [digits] [five] [wide]

The first three tables are of ResNet-20; `wide` is of five ResNet-8 with the widths of ResNet-28, on images of 16x16.

Networks are calibrated with 500 training images each, chosen at random, and retrained lightly with 300 steps (`wide`:
600) of distillation on training images, batches of 32. Nothing is chosen by the 10,000 test images that the errors are
of; the step size was by 3,000 training images, where 1e-3 and 3e-3 did alike, and the default 1e-2 moves more than is
gained. What is measured goes into runs/resnet-*.csv at once, so that a run that was killed goes on where it was.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from base_networks import ResNetTask, Split, resnet8, resnet8_data, resnet20, resnet20_data, test_error
from torch import Tensor, nn

import taskzip as tz
from taskzip.datasets import batches
from taskzip.experiments.results import Results
from taskzip.zipped import History

IMAGES, STEPS, BATCH, STEP_SIZE = 500, 300, 32, 1e-3
WIDE_STEPS = 600
RESULTS = Path(__file__).resolve().parents[1] / "runs"

Row = tuple[str, dict[str, Any]]
ROWS: list[Row] = [
    *((f"coupled, {share:.0%}", {"share": share}) for share in (1.0, 0.9, 0.5)),
    *((f"independent, {share:.0%}", {"share": share, "residual": "independent"}) for share in (1.0, 0.9, 0.5)),
    *((f"random pairs, {share:.0%}", {"share": share, "matching": "random"}) for share in (1.0, 0.9, 0.5)),
    ("coupled, 100%, no compensation", {"share": 1.0, "compensate": False}),
]


class Trained:
    """A trained network with its data."""

    def __init__(self, task: ResNetTask, seed: int, *, wide: bool = False) -> None:
        def data(split: Split) -> tuple[Tensor, Tensor]:
            return (resnet8_data if wide else resnet20_data)(task, split)

        self.name = f"{task}-{seed}"
        self.network = (resnet8 if wide else resnet20)(seed, task)
        self.images, self.labels = data("train")
        self.test = data("test")
        self.test = fast(self.test[0]), self.test[1]

    def task(self, images: int | None, size: int) -> tz.Task:
        """Its task, with some of its training images, or all of them in a new order on every pass."""
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:images]
        data = batches(self.images[chosen], self.labels[chosen], size=size, shuffle=images is None)
        return tz.Task(self.name, self.network, data, forward=run)

    def error(self, network: nn.Module) -> float:
        """Wrong answers on the test images, in percent."""
        return test_error(network, *self.test)


def run(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    """Convolutions are twice as fast on a CPU in this format."""
    return network(fast(batch[0]))


def fast(images: Tensor) -> Tensor:
    """Channels last in memory."""
    return images.contiguous(memory_format=torch.channels_last)


def main(wanted: Sequence[str]) -> None:
    """Run the tables that are wanted, or all."""
    if not wanted or "garment" in wanted:
        table("garment", [Trained("digit", 0), Trained("garment", 0)], with_ridge(ROWS))
    if not wanted or "digits" in wanted:
        table("digits", [Trained("digit", 0), Trained("digit", 1)], with_ridge(ROWS[:3]))
    for title in ("five", "wide"):
        if not wanted or title in wanted:
            tasks: list[ResNetTask] = ["digit", "garment", "digit-turn", "garment-turn", "kind"]
            wide = title == "wide"
            trained = [Trained(task, 0, wide=wide) for task in tasks]
            table(title, trained, ROWS[1:2] if wide else with_ridge(ROWS[1:2]), WIDE_STEPS if wide else STEPS)


def with_ridge(rows: Sequence[Row]) -> list[Row]:
    """ResNet-20 was measured with this ridge; on 4,000 training images 0.1, the default, did alike at 90%."""
    return [(name, {"ridge": 1e-3, **options}) for name, options in rows]


def table(title: str, trained: Sequence[Trained], rows: Sequence[Row], steps: int = STEPS) -> None:
    """Print one table: errors before, after zipping and after light retraining."""
    columns = ["parameters", "seconds", *(f"{each.name}, {n} steps" for n in (0, steps) for each in trained)]
    results = Results(RESULTS / f"resnet-{title}.csv", ["method"], columns)
    names = " | ".join(each.name for each in trained)
    print(f"\n### {title}: {' + '.join(each.name for each in trained)}\n")
    print(f"| | parameters | {names} | mean rise | {names} | mean rise | zip, s |")
    print(f"|---|---|{'---|' * (2 * len(trained) + 3)}", flush=True)
    alone = [each.error(each.network) for each in trained]
    sizes = [sum(p.numel() for p in each.network.parameters()) for each in trained]
    print(f"| apart | {sum(sizes):,} | {_listed(alone)} | | {'| ' * len(trained)}| |", flush=True)
    tasks = [each.task(IMAGES, 250) for each in trained]
    ways: dict[str, Callable[[], tz.ZippedModel]] = {
        name: partial(tz.zip, tasks, progress=False, **options) for name, options in rows
    }
    if len(trained) == 2:
        ways["plain averaging"] = partial(averaged, tasks)
    for name, make in ways.items():
        parameters, seconds, *errors = results.of((name,), partial(measured, trained, make, steps))
        cells = []
        for found in (errors[: len(trained)], errors[len(trained) :]):
            cells += [_listed(found), f"{(sum(found) - sum(alone)) / len(alone):+.2f}"]
        count = f"{parameters:,.0f} ({parameters / sizes[0]:.2f}x)"
        print(f"| {name} | {count} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def measured(trained: Sequence[Trained], make: Callable[[], tz.ZippedModel], steps: int) -> tuple[float, ...]:
    """Parameters, seconds of zipping, errors of all tasks, and those after light retraining."""
    start = time.perf_counter()
    zipped = make()
    seconds = time.perf_counter() - start
    before = [each.error(zipped[each.name]) for each in trained]
    tasks = [each.task(None, BATCH) for each in trained]
    tz.retrain(zipped, tasks, steps, loss="distill", step_size=STEP_SIZE, progress=False)
    return (zipped.parameter_count(), seconds, *before, *(each.error(zipped[each.name]) for each in trained))


def averaged(tasks: Sequence[tz.Task]) -> tz.ZippedModel:
    """The means of all weights but those of the last layer, unit k with unit k, in one network."""
    networks = [copy.deepcopy(task.model) for task in tasks]
    states = [network.state_dict() for network in networks]
    with torch.no_grad():
        for key, tensor in states[0].items():
            if tensor.is_floating_point() and not key.startswith("fc") and key not in ("mean", "std"):
                mean = torch.stack([state[key] for state in states]).mean(0)
                for state in states:
                    state[key].copy_(mean)
    named = {task.name: network for task, network in zip(tasks, networks, strict=True)}
    joint = tz.ZippedModel(named, History({"balance": [1 / len(named)] * len(named)}))
    first = networks[0]
    for network in networks[1:]:
        for name, parameter in first.named_parameters():
            if not name.startswith("fc"):
                path, _, attribute = name.rpartition(".")
                network.get_submodule(path)._parameters[attribute] = parameter
    return joint.eval()


def _listed(errors: Sequence[float]) -> str:
    return " | ".join(f"{error:.2f}" for error in errors)


if __name__ == "__main__":
    main(sys.argv[1:])
