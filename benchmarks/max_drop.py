"""`tz.MaxDrop` on LeNet-5 for MNIST and Fashion-MNIST: how much is shared, and what each task loses.

`TASKZIP_DATA=... python benchmarks/max_drop.py [points ...]` prints a Markdown table. The networks are trained on the
first 50,000 training images, from which 4,000 are drawn for calibration; the last 10,000 are held out for the search.
The test images serve for nothing but the last column. With `--aligned` shared weights read aligned inputs.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from base_networks import BATCH, Data, lenet5, test_error
from torch import nn

import taskzip as tz
from taskzip.datasets import batches, fashion_mnist, mnist

TRAINED = 50_000
CALIBRATION = 4_000
HIDDEN = ("conv1", "conv2", "fc1")


def main() -> None:
    """Search for every number of points, and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("points", nargs="*", type=float, default=[0.25, 0.5, 1.0])
    parser.add_argument("--aligned", action="store_true", default=None)
    parser.add_argument("--retrain", type=int, default=0, help="steps of distillation after each layer")
    options = parser.parse_args()
    readers = {"digit": mnist, "garment": fashion_mnist}
    nets = {"digit": lenet5(0, "mnist", TRAINED), "garment": lenet5(0, "fashion", TRAINED)}
    train = {name: reader(split="train") for name, reader in readers.items()}
    test = {name: reader(split="test") for name, reader in readers.items()}
    held_out = {name: batches(x[TRAINED:], y[TRAINED:], size=1000) for name, (x, y) in train.items()}
    tasks = [calibrated(name, nets[name], train[name], retrained=bool(options.retrain)) for name in nets]
    before = [test_error(nets[name], *test[name]) for name in nets]
    retrain = tz.Retraining(options.retrain, loss="distill") if options.retrain else None

    print("| points | evaluations | pairs shared | hidden weights shared | lost, held out | lost, test | seconds |")
    print("|---|---|---|---|---|---|---|")
    for points in options.points:
        start = time.perf_counter()
        plan = tz.MaxDrop(points, held_out)
        zipped = tz.zip(tasks, share=plan, aligned=options.aligned, retrain=retrain)
        seconds = time.perf_counter() - start
        after = [test_error(zipped[name], *test[name]) for name in nets]
        lost = listed([new - old for new, old in zip(after, before, strict=True)])
        search, counts = zipped.history.settings["search"], zipped.history.settings["share"]["share"]
        print(
            f"| {points:g} | {search['evaluations']} | {' / '.join(str(counts[layer]) for layer in HIDDEN)} "
            f"| {shared_fraction(zipped, nets['digit']):.1%} "
            f"| {listed([each['lost'] for each in search['tasks'].values()])} | {lost} | {seconds:.0f} |",
            flush=True,
        )


def calibrated(name: str, net: nn.Module, data: Data, *, retrained: bool) -> tz.Task:
    """A task with calibration images drawn from those that its network learnt from."""
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    size = BATCH if retrained else 500
    return tz.Task(name, net, batches(data[0][chosen], data[1][chosen], size=size, shuffle=retrained))


def shared_fraction(zipped: tz.ZippedModel, net: nn.Module) -> float:
    """Parameters of hidden layers that both tasks use, relative to those of one network."""
    hidden = sum(p.numel() for layer in HIDDEN for p in net.get_submodule(layer).parameters())
    return zipped.shared_parameter_count() / hidden


def listed(points: Sequence[float]) -> str:
    """Percentage points of every task."""
    return ", ".join(f"{each:+.2f}" for each in points)


if __name__ == "__main__":
    main()
