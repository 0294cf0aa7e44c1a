"""How many calibration samples are enough: test errors and the work of zipping two LeNet-5 of two tasks.

`TASKZIP_DATA=... python benchmarks/calibration.py [folder of trained networks]` prints a Markdown table for LeNet-5 on
MNIST and Fashion-MNIST, right after zipping: means over three draws of so many training images, which each task has of
its own data set. The networks are those of `taskzip reproduce`, trained if they are not in the folder.
"""

import sys
import time
from pathlib import Path
from statistics import mean

import torch

import taskzip as tz
from taskzip.datasets import batches
from taskzip.experiments.networks import Shelf
from taskzip.experiments.pairs import Pair

SAMPLES = (64, 128, 256, 512, 1024, 2048, 4096)
SHARES = (1.0, 0.75)
SEEDS = (0, 1, 2)


def main(folder: Path) -> None:
    """Print the table."""
    shelf = Shelf(folder, lambda said: print(said, file=sys.stderr))
    nets = shelf.trained("lenet5", "mnist", 0), shelf.trained("lenet5", "fashion", 0)
    pair = Pair(nets, ("mnist", "fashion"))
    found = ("digit", "garment", "worst garment", "CPU seconds")
    columns = [f"{what}, {share:.0%}" for share in SHARES for what in found]
    print(f"| samples | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|", flush=True)
    for samples in SAMPLES:
        cells = [cell for share in SHARES for cell in row(pair, share, samples)]
        print(f"| {samples:,} | {' | '.join(cells)} |", flush=True)
    print(f"Apart: {pair.before()[0]:.2f} and {pair.before()[1]:.2f}%.")


def row(pair: Pair, share: float, samples: int) -> list[str]:
    """Mean errors of both tasks, the worst of the second, and the seconds of CPU time of a zip."""
    errors, seconds = [], []
    for seed in SEEDS:
        tasks = drawn(pair, samples, seed)
        start = time.process_time()
        zipped = tz.zip(tasks, share=share, progress=False, seed=seed)
        seconds.append(time.process_time() - start)
        errors.append(pair.errors(zipped))
    digit, garment = zip(*errors, strict=True)
    return [f"{mean(digit):.2f}", f"{mean(garment):.2f}", f"{max(garment):.2f}", f"{mean(seconds):.1f}"]


def drawn(pair: Pair, samples: int, seed: int) -> list[tz.Task]:
    """The tasks with so many training images, drawn at random for each."""
    tasks = []
    for name, network, (x, y) in zip("AB", pair.networks, pair.train, strict=True):
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:samples]
        tasks.append(tz.Task(name, network, batches(x[chosen], y[chosen], size=256)))
    return tasks


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reproduce/networks"))
