"""The five pairs of docs/results/methods.md, zipped with the defaults and not retrained.

`TASKZIP_DATA=... python benchmarks/default_zip.py` prints the table at the top of that page as Markdown: test errors in
percent, and the rise of the mean of both tasks, over five draws of calibration images. With another version of taskzip
on PYTHONPATH it prints what that one reaches, with the same networks.
"""

import statistics
from pathlib import Path

import torch

import taskzip as tz
from taskzip.experiments.methods import CASES, SEEDS, SHARES, Bench, Case
from taskzip.experiments.networks import Shelf

RUNS = Path("runs/reproduce")


def main() -> None:
    """Print a row for each pair and share."""
    torch.set_num_threads(1)
    shelf = Shelf(RUNS / "networks", print)
    print("| pair | shared | A | B | rise |\n|---|---|---|---|---|")
    for case in CASES:
        for share in SHARES:
            print(f"| {case} | {share:.0%} | {' | '.join(errors(shelf, case, share))} |", flush=True)


def errors(shelf: Shelf, case: Case, share: float) -> tuple[str, str, str]:
    """Mean errors of both tasks, and the rise of their mean with its deviation."""
    pair = Bench(shelf, RUNS, case).pair
    before, found = pair.before(), []
    for seed in range(SEEDS):
        found.append(pair.errors(tz.zip(pair.calibration(seed), share=share, seed=seed, progress=False)))
    rises = [(a + b - sum(before)) / 2 for a, b in found]
    a, b = (f"{statistics.mean(each):.2f}" for each in zip(*found, strict=True))
    return a, b, f"{statistics.mean(rises):+.2f} ± {statistics.stdev(rises):.2f}"


if __name__ == "__main__":
    main()
