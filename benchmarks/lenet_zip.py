"""LeNet-5 for MNIST and for Fashion-MNIST, fully shared: errors after light retraining, and how long zipping takes.

`TASKZIP_DATA=... python benchmarks/lenet_zip.py` prints the tables of docs/results/lenet.md as Markdown. Calibration
and retraining use training images only, the errors are those of the 10,000 test images. The networks are those of
`taskzip reproduce`, trained here if that did not do it yet. Batch and step size were chosen on networks that learnt
from the first 50,000 training images, by their errors on the others.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from base_networks import BATCH
from torch import Tensor, nn, optim

import taskzip as tz
from taskzip.datasets import batches
from taskzip.experiments.networks import Shelf
from taskzip.experiments.pairs import Pair
from taskzip.models import LeNet5

STEPS, RETRAINING_BATCH, STEP_SIZE = 600, 256, 3e-2


def main() -> None:
    """Retrain MNIST and Fashion-MNIST, then time zipping two MNIST networks against one epoch of training."""
    shelf = Shelf(Path("runs/reproduce/networks"), print)
    digits = [shelf.trained("lenet5", "mnist", seed) for seed in (0, 1)]
    retraining(Pair((digits[0], shelf.trained("lenet5", "fashion", 0)), ("mnist", "fashion")))
    speed(Pair((digits[0], digits[1]), ("mnist", "mnist")))


def retraining(pair: Pair) -> None:
    """Light retraining after the default zip, on all training images."""
    print("| | digit | garment |\n|---|---|---|")
    row("apart", pair.before())
    zipped = tz.zip(pair.calibration(seed=0), share=1.0, progress=False)
    row("zipped", pair.errors(zipped))
    for loss in ("distill", "labels"):
        retrained = pair.retrained(zipped, STEPS, loss, seed=0, batch=RETRAINING_BATCH, step_size=STEP_SIZE)
        row(f"+ {STEPS} steps, {loss}", pair.errors(retrained))


def row(title: str, errors: tuple[float, float]) -> None:
    """Errors in percent."""
    print(f"| {title} | {errors[0]:.2f} | {errors[1]:.2f} |", flush=True)


def speed(pair: Pair) -> None:
    """One epoch of plain training of one LeNet-5 against zipping two, in turn, three times."""
    print("\n| run | one epoch, s | zip, s | ratio |\n|---|---|---|---|")
    tasks = pair.calibration(seed=0)
    for run in range(3):
        epoch = seconds_of(lambda: train_one_epoch(*pair.train[0]))
        zipping = seconds_of(lambda: tz.zip(tasks, share=1.0, progress=False))
        print(f"| {run + 1} | {epoch:.1f} | {zipping:.1f} | {zipping / epoch:.2f} |", flush=True)


def train_one_epoch(images: Tensor, labels: Tensor) -> None:
    """The cheapest honest epoch: channels-last, as the networks are trained."""
    model: nn.Module = LeNet5().to(memory_format=torch.channels_last)
    optimizer = optim.AdamW(model.parameters())
    for x, y in batches(images, labels, size=BATCH, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
