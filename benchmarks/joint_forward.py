"""How long two networks take as one: per task, and both tasks on one input, in PyTorch and in ONNX Runtime.

`python benchmarks/joint_forward.py` prints a Markdown table for pairs of LeNet-5, VGG-16 without batch-norm, and
ResNet-18 with batch-norm folded in, these two on images of 32x32. All figures are ratios to the original networks in
the same run: the calls take turns, on one thread, and the medians of their CPU time are compared, in which other work
on the machine counts little. The networks are untrained: how fast they run does not depend on what they know. The
files are exported to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import VGG16, LeNet5, ResNet18, ResNet20

SHARES = (0.5, 0.9, 1.0)
BATCHES = (1, 32)
QUARTER = (16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128)
Network = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]
NETWORKS: dict[str, Network] = {
    "LeNet-5": (LeNet5, (1, 28, 28), {}),
    "VGG-16": (lambda: VGG16(10), (3, 32, 32), {"max_rows": 1000}),
    "ResNet-18": (ResNet18, (3, 32, 32), {"batch_norm": "fold", "max_rows": 1000}),
}
OTHERS: dict[str, Network] = {
    "VGG-16 / 4": (lambda: VGG16(10, widths=QUARTER, hidden=256), (3, 32, 32), {}),
    "VGG-16 / 2": (lambda: VGG16(10, widths=[2 * w for w in QUARTER], hidden=512), (3, 32, 32), {"max_rows": 500}),
    "ResNet-20": (ResNet20, (3, 32, 32), {"batch_norm": "fold"}),
}
"""Only where they are asked for."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"default {', '.join(NETWORKS)}; also {', '.join(OTHERS)}")
    parser.add_argument("--runs", type=int, default=50, help="calls of each at most, default 50")
    parser.add_argument("--seconds", type=float, default=30, help="for each row, but 5 calls in any case; default 30")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help=f"default {SHARES}")
    parser.add_argument("--no-cross", action="store_true", help="without weights from private to shared units")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| networks | share | batch | one task | both tasks | both, as a graph | one task, ONNX ", end="")
    print("| both tasks, ONNX | size of the file |\n|---|---|---|---|---|---|---|---|---|")
    for name in options.networks or NETWORKS:
        make, shape, settings = (NETWORKS | OTHERS)[name]
        settings = settings | {"cross": not options.no_cross}
        rows(name, make, shape, settings, options.shares, (options.runs, options.seconds))


def rows(
    title: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    settings: dict[str, Any],
    shares: Sequence[float],
    limits: tuple[int, float],
) -> None:
    """A row for each share and size of batch."""
    nets = [make().eval() for _ in range(2)]
    example = torch.randn(1, *shape)
    originals = tz.ZippedModel(dict(zip("ab", nets, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("a", "b", "task", "joint")}
        for name in "ab":
            tz.export_onnx(originals, files[name], example, tasks=[name])
        for share in shares:
            tasks = [tz.Task(name, net, [torch.randn(64, *shape)]) for name, net in zip("ab", nets, strict=True)]
            zipped = tz.zip(tasks, share=share, compensate=False, progress=False, **settings).eval()
            tz.export_onnx(zipped, files["task"], example, tasks=["a"])
            tz.export_onnx(zipped, files["joint"], example)
            size = files["joint"].stat().st_size / sum(files[name].stat().st_size for name in "ab")
            for batch in BATCHES:
                ratios = [*compared(zipped, nets, files, torch.randn(batch, *shape), limits), size]
                print(f"| {title} | {share} | {batch} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)


def compared(
    zipped: tz.ZippedModel, nets: list[nn.Module], files: dict[str, Path], x: Tensor, limits: tuple[int, float]
) -> list[float]:
    """Times of one task, of both, of both as a graph, and of one and both in ONNX Runtime, relative to originals."""
    graph = tz.export_graph(zipped, x)
    onnx = {name: running(path, x) for name, path in files.items()}
    with torch.no_grad():
        took = medians(
            {
                "original": lambda: nets[0](x),
                "originals": lambda: [net(x) for net in nets],
                "task": lambda: zipped["a"](x),
                "joint": lambda: zipped(x),
                "graph": lambda: graph(x),
                "onnx original": onnx["a"],
                "onnx originals": lambda: [onnx["a"](), onnx["b"]()],
                "onnx task": onnx["task"],
                "onnx joint": onnx["joint"],
            },
            *limits,
        )
    ratios = [("task", "original"), ("joint", "originals"), ("graph", "originals")]
    ratios += [("onnx task", "onnx original"), ("onnx joint", "onnx originals")]
    return [took[ours] / took[theirs] for ours, theirs in ratios]


def running(path: Path, x: Tensor) -> Callable[[], object]:
    """A call of ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"input": x.numpy()})


def medians(calls: dict[str, Callable[[], object]], runs: int, seconds: float) -> dict[str, float]:
    """Median CPU seconds of each, in turns so that what else the machine does meets all of them."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.process_time() + seconds
    for run in range(runs + 1):
        if run > 5 and time.process_time() > end:
            break
        for name, call in calls.items():
            start = time.process_time()
            call()
            if run:  # the first call warms up
                took[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in took.items()}


if __name__ == "__main__":
    main()
