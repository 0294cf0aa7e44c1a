"""The memory of a process that runs two VGG-16 from ExecuTorch files: a joint one, or one for each network.

`python benchmarks/executorch_memory.py [--width 1.0] [--piece 64]` prints a Markdown table: peak and resident memory
after each network has answered once, in Python by benchmarks/executorch_alone.py (which takes several hundred MB for
torch alone: also given without what it has before the first file is loaded), and, where there is a C++ compiler, in a
program that links ExecuTorch's runtime from the same package and nothing else, with and without XNNPACK's weight cache.

The networks are untrained and share all hidden layers: memory does not depend on what they know. Images are of 32x32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import executorch.runtime
import torch
from torch import nn

import taskzip as tz
from taskzip.export import executorch as exporting
from taskzip.models import VGG16
from taskzip.models.vgg import WIDTHS

IMAGE = (3, 32)
HERE = Path(__file__).parent
ALONE = HERE / "executorch_alone.py"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=1.0, help="of all layers, relative to VGG-16")
    parser.add_argument("--piece", type=int, default=exporting.PIECE >> 20, help="MB that XNNPACK loads at once")
    options = parser.parse_args()
    exporting.PIECE = options.piece << 20
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.width)
        table(Path(folder))


def write(folder: Path, width: float) -> None:
    """The files: joint, one for each network, and one for each as ExecuTorch's own documentation does it."""
    widths, hidden = [round(each * width) for each in WIDTHS], round(4096 * width)
    nets = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        nets[name] = VGG16(10, widths=widths, hidden=hidden).eval()
    example = torch.randn(1, IMAGE[0], IMAGE[1], IMAGE[1])
    for name, net in nets.items():
        plain(net, folder / f"plain_{name}.pte", example)
        tz.export_executorch(tz.ZippedModel({name: net}), folder / f"{name}.pte", example)
    tie(nets["first"], nets["second"])
    joint = tz.ZippedModel(nets)
    tz.export_executorch(joint, folder / "joint.pte", example)
    size, numbers = (folder / "joint.pte").stat().st_size, joint.parameter_count()
    print(f"{numbers:,} parameters, joint.pte {size:,} bytes: {size / 4 / numbers:.4f} of 4 bytes per parameter\n")


def tie(one: nn.Module, other: nn.Module) -> None:
    """Give the second network the hidden layers of the first."""
    other.features = one.features
    for hidden in (0, 3):
        other.classifier[hidden] = one.classifier[hidden]


def plain(net: nn.Module, path: Path, example: torch.Tensor) -> None:
    """Export without taskzip."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(torch.export.export(net, (example,)), partitioner=[XnnpackPartitioner()])
    with path.open("wb") as file:
        program.to_executorch().write_to_file(file)


def table(folder: Path) -> None:
    """A line for each way to load the files, the first of which is 1."""
    two, ours = (
        [f"plain_{n}.pte:forward" for n in ("first", "second")],
        [f"{n}.pte:forward" for n in ("first", "second")],
    )
    both = ["joint.pte:first", "joint.pte:second"]
    print("| run by | files | peak | resident | peak, relative | resident, relative |")
    print("|---|---|---|---|---|---|")
    ways = [("two files, exported without taskzip", two), ("two files", ours), ("joint file, a method for each", both)]
    ways.append(("joint file, `forward`", ["joint.pte:forward"]))
    for runner, measure in runners(folder):
        first: list[int] | None = None
        for title, calls in ways:
            found = measure(calls)
            first = first or found
            ratios = (f"{now / then:.2f}" for now, then in zip(found, first, strict=True))
            print(
                f"| {runner} | {title} | {' | '.join(f'{kb >> 10:,} MB' for kb in found)} | {' | '.join(ratios)} |",
                flush=True,
            )


def runners(folder: Path) -> Iterator[tuple[str, Callable[[list[str]], list[int]]]]:
    """What runs the files, and a function that gives peak and resident memory in kB."""
    image = [str(number) for number in IMAGE]

    torch.save([torch.ones(1, IMAGE[0], IMAGE[1], IMAGE[1])], folder / "image.pt")

    def python(calls: list[str], net: bool) -> list[int]:
        found = json.loads(run([sys.executable, ALONE, "image.pt", *calls], folder))
        return [found[when] - found["before"] * net for when in ("peak", "after")]

    yield "Python", lambda calls: python(calls, net=False)
    yield "Python, without what it has before", lambda calls: python(calls, net=True)
    compiler = shutil.which("c++")
    if compiler is None:
        return
    program = compiled(compiler, folder)
    for cache in ("no-cache", "cache"):
        title = f"C++, {'with' if cache == 'cache' else 'without'} weight cache"
        yield title, lambda calls, cache=cache: numbers(run([program, cache, *image, *calls], folder))


def numbers(status: str) -> list[int]:
    """Of the lines of /proc/self/status."""
    return [int(line.split()[1]) for line in status.splitlines()]


def compiled(compiler: str, folder: Path) -> str:
    """The C++ program."""
    package = Path(next(iter(executorch.__path__)))
    include, lib, program = package / "include", package / "lib", folder / "executorch_memory"
    parts = ("", "_kernels_optimized", "_backend_xnnpack", "_threadpool")
    flags = ["-std=c++20", "-DC10_USING_CUSTOM_GENERATED_MACROS", f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed"]
    paths = [f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10"]
    source = HERE / "executorch_memory.cpp"
    run([compiler, *flags, *paths, source, *(f"-lexecutorch{part}" for part in parts), "-o", program], folder)
    return str(program)


def run(command: list[str | Path], folder: Path) -> str:
    """The standard output of a program."""
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
