"""What compensation leaves for retraining: the start, the size of the weights, and the errors after 600 steps.

`TASKZIP_DATA=... python benchmarks/ridge.py [name ...]` prints a Markdown table for LeNet-5 on MNIST and Fashion-MNIST,
all hidden units shared. The networks learnt from the first 50,000 training images, from which 4,000 are drawn for
calibration; errors are of the last 10,000, for it is here that the default of `ridge` was chosen.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from base_networks import lenet5, test_error

import taskzip as tz
from taskzip.datasets import batches, fashion_mnist, mnist

TRAINED, CALIBRATION = 50_000, 4_000
STEPS, BATCH, STEP_SIZE = 600, 128, 3e-2

STARTS: dict[str, dict[str, Any]] = {
    "no compensation": {"compensate": False},
    "output layers only": {"compensate": "output", "ridge": 1e-3},
    **{f"ridge {ridge:g}": {"ridge": ridge} for ridge in (1e-3, 1e-2, 0.1, 1.0)},
}


def main(names: Sequence[str]) -> None:
    """Print a row for each of these, or for all."""
    nets = {"digit": lenet5(0, "mnist", TRAINED), "garment": lenet5(0, "fashion", TRAINED)}
    data = dict(zip(nets, (mnist(split="train"), fashion_mnist(split="train")), strict=True))
    held_out = {name: (x[TRAINED:], y[TRAINED:]) for name, (x, y) in data.items()}
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    calibration = [tz.Task(n, net, batches(*(each[chosen] for each in data[n]), size=500)) for n, net in nets.items()]
    training = [
        tz.Task(n, net, batches(*(each[:TRAINED] for each in data[n]), size=BATCH, shuffle=True))
        for n, net in nets.items()
    ]
    print("| | digit | garment | rms of output weights | digit, retrained | garment, retrained |")
    print("|---|---|---|---|---|---|")
    alone = [f"{test_error(net, *held_out[n]):.2f}" for n, net in nets.items()]
    print(f"| apart | {' | '.join(alone)} | {rms(nets['garment'].fc2.weight):.3f} | | |", flush=True)
    for name in names or STARTS:
        zipped = tz.zip(calibration, share=1.0, progress=False, **STARTS[name])
        cells = [f"{test_error(zipped[n], *held_out[n]):.2f}" for n in nets]
        cells.append(f"{rms(zipped['garment'].fc2.weight):.3f}")
        tz.retrain(zipped, training, STEPS, loss="distill", step_size=STEP_SIZE, progress=False)
        cells += [f"{test_error(zipped[n], *held_out[n]):.2f}" for n in nets]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def rms(weight: torch.Tensor) -> float:
    """Root mean square."""
    return float(weight.detach().square().mean().sqrt())


if __name__ == "__main__":
    main(sys.argv[1:])
