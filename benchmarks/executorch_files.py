"""How large ExecuTorch files of two networks are, and how long their methods take.

`python benchmarks/executorch_files.py [NETWORK ...]` prints a Markdown table for pairs of untrained networks: the bytes
of the joint file relative to 4 for each parameter, and to the two files that ExecuTorch's own export makes of the
original networks; CPU time of one task and of both tasks relative to these files, medians of calls that take turns;
seconds of CPU that the export took. ResNet-18 needs torchvision.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import import_torchvision
from executorch_memory import plain
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import VGG16, LeNet5, ResNet20, SmallCNN

QUARTER = (16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128)


def resnet18() -> nn.Module:
    """Of torchvision."""
    import_torchvision()
    from torchvision import models

    return models.resnet18(num_classes=100)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[float, ...]]] = {
    "demo": (lambda: SmallCNN(10), (1, 8, 8), (0.75, 1.0)),
    "LeNet-5": (LeNet5, (1, 28, 28), (0.5, 1.0)),
    "VGG-16 / 4": (lambda: VGG16(10, widths=QUARTER, hidden=256), (3, 32, 32), (0.5, 1.0)),
    "ResNet-20": (ResNet20, (3, 32, 32), (0.9, 1.0)),
    "ResNet-18": (resnet18, (3, 224, 224), (0.9,)),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default {', '.join(NETWORKS)}")
    parser.add_argument("--runs", type=int, default=30, help="calls of each, default 30")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        "| networks | share | partly shared | parameters | bytes, of 4 each | of the two | one task | both | export |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.networks or NETWORKS:
        rows(name, options.runs)


def rows(title: str, runs: int) -> None:
    """A row for each share and form."""
    make, shape, shares = NETWORKS[title]
    x = torch.randn(1, *shape)
    nets = {name: make().eval() for name in "ab"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, net in nets.items():
            plain(net, folder / f"{name}.pte", x)
        apart = sum((folder / f"{name}.pte").stat().st_size for name in nets)
        for share in shares:
            tasks = [tz.Task(name, net, [torch.randn(4, *shape)]) for name, net in nets.items()]
            joint = tz.zip(tasks, share=share, batch_norm="fold", compensate=False, progress=False)
            for form in ("blocks", "weights") if share < 1 else ("",):
                start = time.process_time()
                tz.export_executorch(joint, folder / "joint.pte", x, **({"partly_shared": form} if form else {}))
                took = time.process_time() - start
                size, numbers = (folder / "joint.pte").stat().st_size, joint.parameter_count()
                figures = [f"{numbers:,}", f"{size / 4 / numbers:.3f}", f"{size / apart:.2f}"]
                figures += [f"{ratio:.2f}" for ratio in compared(folder, x, runs)] + [f"{took:.0f} s"]
                print(f"| {title} | {share} | {form} | {' | '.join(figures)} |", flush=True)


def compared(folder: Path, x: Tensor, runs: int) -> list[float]:
    """CPU time of one task, and of both, relative to the original networks'."""
    calls = {
        (file, method): loaded(folder / f"{file}.pte", method)
        for file, method in (("a", "forward"), ("b", "forward"), ("joint", "a"), ("joint", "forward"))
    }
    took: dict[Any, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call([x])
            if run:  # the first call warms up
                took[name].append(time.process_time() - start)
    a, b, one, both = (statistics.median(each) for each in took.values())
    return [one / a, both / (a + b)]


def loaded(path: Path, method: str) -> Callable[[list[Tensor]], object]:
    """A method of a file."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    function = program.load_method(method)
    return lambda inputs: (function.execute(inputs), program)  # which the method needs


if __name__ == "__main__":
    main()
