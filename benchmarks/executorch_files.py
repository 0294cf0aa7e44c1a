"""ExecuTorch files of two networks outside of taskzip: are they right, how large are they, how long do methods take?

`python benchmarks/executorch_files.py [NETWORK ...]` prints a Markdown table for pairs of untrained networks: bytes of
the joint file relative to 4 for each parameter, and to the two files that ExecuTorch's own export makes of the original
networks; the largest difference of an output from PyTorch's, relative to the largest output; CPU time of one task and
of both relative to the two files, medians of calls that take turns; seconds of CPU that the export took. The files are
run by benchmarks/executorch_alone.py, in a process that knows only ExecuTorch and torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from executorch_memory import ALONE, plain
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import VGG16, LeNet5, ResNet18, ResNet20, SmallCNN

QUARTER = (16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128)
FOLDED = {"batch_norm": "fold"}
Network = tuple[Callable[[int], nn.Module], tuple[int, ...], tuple[float, ...], dict[str, Any]]
NETWORKS: dict[str, Network] = {
    "demo": (SmallCNN, (1, 8, 8), (0.75, 1.0), {}),
    "LeNet-5": (lambda classes: LeNet5(classes=classes), (1, 28, 28), (0.5, 1.0), {}),
    "VGG-16": (VGG16, (3, 32, 32), (1.0,), {"max_rows": 1000}),
    "ResNet-18": (lambda classes: ResNet18(classes=classes), (3, 32, 32), (0.9, 1.0), {"max_rows": 1000}),
    "ResNet-18, folded": (lambda classes: ResNet18(classes=classes), (3, 32, 32), (0.9, 1.0), FOLDED),
}
OTHERS: dict[str, Network] = {
    "VGG-16 / 4": (lambda classes: VGG16(classes, widths=QUARTER, hidden=256), (3, 32, 32), (0.5, 1.0), {}),
    "ResNet-20, folded": (lambda classes: ResNet20(classes=classes), (3, 32, 32), (0.9, 1.0), FOLDED),
}
"""Only where they are asked for."""

CLASSES = {"a": 10, "b": 4}
"""Of the tasks, as of those of `taskzip demo`."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default {', '.join(NETWORKS)}; also {', '.join(OTHERS)}")
    parser.add_argument("--runs", type=int, default=30, help="calls of each, default 30")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| networks | share | partly shared | parameters | bytes, of 4 each | of the two | difference", end=" ")
    print("| one task | both | export |\n|---|---|---|---|---|---|---|---|---|---|")
    for name in options.networks or NETWORKS:
        rows(name, options.runs)


def rows(title: str, runs: int) -> None:
    """A row for each share and form."""
    make, shape, shares, settings = (NETWORKS | OTHERS)[title]
    x = torch.randn(1, *shape)
    nets = {name: drawn(make(classes), shape) for name, classes in CLASSES.items()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, net in nets.items():
            plain(net, folder / f"{name}.pte", x)
        apart = sum((folder / f"{name}.pte").stat().st_size for name in nets)
        for share in shares:
            tasks = [tz.Task(name, net, [torch.randn(16, *shape)]) for name, net in nets.items()]
            joint = tz.zip(tasks, share=share, compensate=False, progress=False, **settings).eval()
            for form in ("blocks", "weights") if share < 1 else ("",):
                start = time.process_time()
                tz.export_executorch(joint, folder / "joint.pte", x, **({"partly_shared": form} if form else {}))
                took = time.process_time() - start
                size, numbers = (folder / "joint.pte").stat().st_size, joint.parameter_count()
                far, one, both = compared(joint, folder, x, runs)
                figures = [f"{numbers:,}", f"{size / 4 / numbers:.3f}", f"{size / apart:.2f}", f"{far:.0e}"]
                figures += [f"{one:.2f}", f"{both:.2f}", f"{took:.0f} s"]
                print(f"| {title} | {share} | {form} | {' | '.join(figures)} |", flush=True)


def drawn(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """With statistics of batch-norm that some images gave, for with those of a new network outputs hardly differ."""
    with torch.no_grad():
        net.train()(torch.randn(32, *shape))
    return net.eval()


def compared(joint: tz.ZippedModel, folder: Path, x: Tensor, runs: int) -> tuple[float, float, float]:
    """How far the outputs are from PyTorch's, and the CPU time of one task, and of both, relative to the two files."""
    torch.save([x], folder / "x.pt")
    calls = ["a.pte:forward", "b.pte:forward", "joint.pte:a", "joint.pte:b", "joint.pte:forward"]
    command = [sys.executable, ALONE, "x.pt", *calls, "--calls", str(runs), "--output", "y.pt"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    a, b, one, _, both = json.loads(done.stdout)["seconds"].values()
    outputs = torch.load(folder / "y.pt", weights_only=True)
    with torch.no_grad():
        right = [joint[name](x) for name in CLASSES]
    given = outputs["joint.pte:a"] + outputs["joint.pte:b"], outputs["joint.pte:forward"]
    far = max(float((y - r).abs().max() / r.abs().max()) for each in given for y, r in zip(each, right, strict=True))
    return far, one / a, both / (a + b)


if __name__ == "__main__":
    main()
