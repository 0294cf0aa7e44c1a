"""Test errors of pruned LeNets on MNIST: before, pruned without a training step, and after light retraining.

`TASKZIP_DATA=... python benchmarks/prune.py` prints a Markdown table; a fraction, such as `0.05`, may follow. Curvature
and retraining use the 60,000 training images, the errors are those of the 10,000 test images. `--held-out` uses the
last 10,000 training images in place of the test images and leaves them out of all else: settings were chosen there.
"""

import sys
import time
from collections.abc import Iterable

from base_networks import lenet5, lenet300, test_error
from torch import nn

import taskzip as tz
from taskzip.datasets import batches, mnist
from taskzip.tasks.task import Batch

STEPS = (100, 500)
NETWORKS = {"LeNet-300-100": lenet300, "LeNet-5": lenet5}


def main(keep: float, held_out: bool) -> None:
    """One row per network: parts of the weights kept, errors in percent, seconds of pruning without retraining."""
    images, labels = mnist(split="train")
    test = (images[50_000:], labels[50_000:]) if held_out else mnist(split="test")
    train = (images[:50_000], labels[:50_000]) if held_out else (images, labels)
    shuffled = batches(*train, size=128, shuffle=True)
    after = " | ".join(f"+ {steps} steps" for steps in STEPS)
    print(f"| network | kept | before | pruned | {after} | seconds |\n|{'---|' * (len(STEPS) + 5)}")
    for name, base in NETWORKS.items():
        task = tz.Task("digit", base(0), batches(*train, size=500))
        start = time.perf_counter()
        pruned = tz.prune(task, keep=keep, progress=False)
        seconds = time.perf_counter() - start
        nets = [retrained(pruned, shuffled, steps) for steps in STEPS]
        errors = " | ".join(f"{test_error(net, *test):.2f}" for net in (task.model, pruned, *nets))
        weights = [p for p in pruned.parameters() if p.dim() > 1]
        kept = sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)
        print(f"| {name} | {kept:.2%} | {errors} | {seconds:.0f} |", flush=True)


def retrained(pruned: nn.Module, train: Iterable[Batch], steps: int) -> nn.Module:
    """With keep=1.0 nothing is pruned further, so that each number of steps starts from the same network."""
    return tz.prune(tz.Task("digit", pruned, train), keep=1.0, retrain=steps, progress=False)


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--held-out"]
    main(float(given[0]) if given else 0.07, "--held-out" in sys.argv)
