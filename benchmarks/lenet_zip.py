"""Error after fully sharing LeNets on MNIST, without retraining and without labels, and how long zipping takes.

`TASKZIP_DATA=... python benchmarks/lenet_zip.py` prints the tables of docs/results/lenet.md as Markdown. Calibration
uses training images only, the errors are those of the 10,000 test images.
"""

import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from base_networks import BATCH, lenet5, lenet300, test_error
from torch import Tensor, nn

import taskzip as tz
from taskzip.datasets import batches, fashion_mnist, mnist
from taskzip.models import LeNet5

METHODS = {
    "greedy, no compensation (the paper)": {"matching": "greedy", "compensate": False},
    "optimal, no compensation": {"compensate": False},
    "optimal + compensation (default)": {},
}


def main() -> None:
    """Run every pair and method, then time zipping against one epoch of training."""
    digits, clothes = mnist(split="train"), fashion_mnist(split="train")
    digits_test, clothes_test = mnist(split="test"), fashion_mnist(split="test")
    table(
        "LeNet-300-100, MNIST twice, 60,000 calibration images",
        [lenet300(0), lenet300(1)],
        [digits] * 2,
        [digits_test] * 2,
        60_000,
    )
    table(
        "LeNet-5, MNIST twice, 4,000 calibration images", [lenet5(0), lenet5(1)], [digits] * 2, [digits_test] * 2, 4_000
    )
    both = [lenet5(0), lenet5(0, "fashion")]
    table(
        "LeNet-5, MNIST and Fashion-MNIST, 4,000 calibration images",
        both,
        [digits, clothes],
        [digits_test, clothes_test],
        4_000,
    )
    retraining(both, [digits, clothes], [digits_test, clothes_test])
    speed(*digits)


def retraining(
    nets: Sequence[nn.Module], train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """300 steps of light retraining after the default zip of MNIST and Fashion-MNIST, on all training images."""
    print("\n### The last pair after 300 steps of `tz.retrain` (batches of 128)\n")
    print("| loss | error A | error B |\n|---|---|---|")
    zipped = tz.zip(tasks_of(nets, train, 4_000), share=1.0, progress=False)
    tasks = [
        tz.Task(name, net, batches(*data, size=128, shuffle=True))
        for name, net, data in zip("AB", nets, train, strict=True)
    ]
    for loss in ("labels", "distill"):
        retrained = copy.deepcopy(zipped)
        tz.retrain(retrained, tasks, steps=300, loss=loss, progress=False)
        errors = [test_error(retrained[task.name], *data) for task, data in zip(tasks, test, strict=True)]
        print(f"| {loss} | {errors[0]:.2f} | {errors[1]:.2f} |", flush=True)


def table(
    title: str,
    nets: Sequence[nn.Module],
    train: Sequence[tuple[Tensor, Tensor]],
    test: Sequence[tuple[Tensor, Tensor]],
    images: int,
) -> None:
    """Print one Markdown table: test errors in percent, and the mean rise in points."""
    print(f"\n### {title}\n\n| all hidden units shared, no retraining | error A | error B | mean rise | seconds |")
    print("|---|---|---|---|---|")
    before = [test_error(net, *data) for net, data in zip(nets, test, strict=True)]
    print(f"| the networks by themselves | {before[0]:.2f} | {before[1]:.2f} | | |")
    tasks = tasks_of(nets, train, images)
    for name, settings in METHODS.items():
        start = time.perf_counter()
        zipped = tz.zip(tasks, share=1.0, progress=False, **settings)
        seconds = time.perf_counter() - start
        after = [test_error(zipped[task.name], *data) for task, data in zip(tasks, test, strict=True)]
        rise = (sum(after) - sum(before)) / 2
        print(f"| {name} | {after[0]:.2f} | {after[1]:.2f} | {rise:+.2f} | {seconds:.1f} |", flush=True)


def tasks_of(nets: Sequence[nn.Module], train: Sequence[tuple[Tensor, Tensor]], images: int) -> list[tz.Task]:
    """Tasks A and B, calibrated on the same number of randomly drawn training images each."""
    chosen = torch.randperm(len(train[0][0]), generator=torch.Generator().manual_seed(0))[:images]
    return [
        tz.Task(name, net, batches(x[chosen], y[chosen], size=500))
        for name, net, (x, y) in zip("AB", nets, train, strict=True)
    ]


def speed(images: Tensor, labels: Tensor) -> None:
    """One epoch of plain training of one LeNet-5 against zipping two, in turn, three times."""
    print("\n### Zipping two LeNet-5 (4,000 images) against training one of them for one epoch (60,000 images)\n")
    print("| run | one epoch, s | zip, s | ratio |\n|---|---|---|---|")
    tasks = tasks_of([lenet5(0), lenet5(1)], [(images, labels)] * 2, 4_000)
    for run in range(3):
        epoch = seconds_of(lambda: train_one_epoch(images, labels))
        zipping = seconds_of(lambda: tz.zip(tasks, share=1.0, progress=False))
        print(f"| {run + 1} | {epoch:.1f} | {zipping:.1f} | {zipping / epoch:.2f} |", flush=True)


def train_one_epoch(images: Tensor, labels: Tensor) -> None:
    """The cheapest honest epoch: channels-last, as base_networks trains."""
    model = LeNet5().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    for x, y in batches(images, labels, size=BATCH, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def seconds_of(work) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
