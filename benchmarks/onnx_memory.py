"""Joint ONNX files outside of taskzip: are they right and small, and how much memory does ONNX Runtime take for them?

`python benchmarks/onnx_memory.py [pairs ...]` prints two Markdown tables; it needs taskzip[demo,onnx], and for VGG-16
11 GB of memory. The files are run by benchmarks/onnx_alone.py, in processes that know only ONNX Runtime and NumPy, and
their outputs are compared with PyTorch's. Networks are untrained, or for "demo" those of `taskzip demo`: neither size
nor memory depend on what they know.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from architectures import drawn
from onnx_alone import SETTINGS
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import VGG16, LeNet5, ResNet18, ResNet20, SmallCNN

ALONE = Path(__file__).with_name("onnx_alone.py")


def resnet18() -> nn.Module:
    """With drawn statistics of batch-norm."""
    return drawn(ResNet18(), torch.randn(32, 3, 32, 32))


@dataclass(frozen=True)
class Pair:
    """Two networks: how they are made, the shape of what they read, and how much they share."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    share: float

    def zipped(self) -> tuple[tz.ZippedModel, tz.ZippedModel]:
        """Apart and together."""
        nets = {}
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            nets[name] = self.make().eval()
        data = torch.randn(32, *self.shape)
        tasks = [tz.Task(name, net, [data]) for name, net in nets.items()]
        together = tz.zip(tasks, share=self.share, compensate=False, progress=False)
        return tz.ZippedModel(nets).eval(), together.eval()


class Demo(Pair):
    """The networks of `taskzip demo`."""

    def zipped(self) -> tuple[tz.ZippedModel, tz.ZippedModel]:
        """Apart and together."""
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", "import taskzip.cli as c; c.main()", "demo", "--out", folder]
            subprocess.run([*command, "--share", str(self.share)], check=True, capture_output=True)
            (file,) = Path(folder).glob("*.safetensors")
            together = tz.load(file, {"digit": SmallCNN(10), "turn": SmallCNN(4)})
        apart = {name: together.materialize(name) for name in together}
        return tz.ZippedModel(apart).eval(), together.eval()


PAIRS = {
    "demo, 1.0": Demo(SmallCNN, (1, 8, 8), 1.0),
    "LeNet-5, 0.5": Pair(LeNet5, (1, 28, 28), 0.5),
    "ResNet-20, 0.9": Pair(ResNet20, (3, 32, 32), 0.9),
    "VGG-16, 1.0": Pair(lambda: VGG16(10), (3, 32, 32), 1.0),
    "ResNet-18, 1.0": Pair(resnet18, (3, 32, 32), 1.0),
    "ResNet-18, 0.9": Pair(resnet18, (3, 32, 32), 0.9),
    "ResNet-18, 0.5": Pair(resnet18, (3, 32, 32), 0.5),
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", help=f"default {', '.join(PAIRS)}")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables: list[list[str]] = [[], []]
    for name in asked.pairs or PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            apart, together = PAIRS[name].zipped()
            x = torch.randn(3, *PAIRS[name].shape)
            files = written(apart, together, PAIRS[name], x, Path(folder))
            tables[0] += file_rows(name, together, x, files)
            del apart, together
            tables[1] += memory_rows(name, files)
        print(f"{name}: done", file=sys.stderr, flush=True)
    print("| networks, share | form | parameters | bytes | of 4 per parameter | difference |")
    print("|---|---|---|---|---|---|", *tables[0], sep="\n")
    print("\n| networks, share | settings | form | at the start | peak | after | peak, of two files | ms |")
    print("|---|---|---|---|---|---|---|---|", *tables[1], sep="\n")


Files = dict[str, list[Path]]


def written(apart: tz.ZippedModel, together: tz.ZippedModel, pair: Pair, x: Tensor, folder: Path) -> Files:
    """The two separate files, the joint one, and a variant of it."""
    files = {"two files": [folder / f"{name}.onnx" for name in apart], "joint": [folder / "joint.onnx"]}
    for name, path in zip(apart, files["two files"], strict=True):
        tz.export_onnx(apart, path, x[:1], tasks=[name])
    tz.export_onnx(together, files["joint"][0], x[:1])
    if pair.share < 1:
        files["by block"] = [folder / "block.onnx"]
        tz.export_onnx(together, files["by block"][0], x[:1], by_block=True)
    else:
        files["own images"] = [folder / "own.onnx"]
        tz.export_onnx(together, files["own images"][0], dict.fromkeys(together, x[:1]))
    return files


def file_rows(name: str, together: tz.ZippedModel, x: Tensor, files: Files) -> list[str]:
    """How large the joint files are, and how far from PyTorch their outputs."""
    right = outputs(together, x)
    rows, parameters = [], together.parameter_count()
    for form in [form for form in files if form != "two files"]:
        (path,) = files[form]
        given, found = path.with_suffix(".x.npz"), path.with_suffix(".y.npz")
        np.savez(given, input=x.numpy(), **{f"input.{task}": x.numpy() for task in right})
        alone([path], "--input", given, "--output", found)
        with np.load(found) as arrays:
            far = max(float(np.abs(arrays[task] - y).max() / np.abs(y).max()) for task, y in right.items())
        size = path.stat().st_size
        rows.append(f"| {name} | {form} | {parameters:,} | {size:,} | {size / parameters / 4:.3f} | {far:.0e} |")
    return rows


def outputs(zipped: tz.ZippedModel, x: Tensor) -> dict[str, Any]:
    """What PyTorch gives."""
    with torch.no_grad():
        return {name: zipped[name](x).numpy() for name in zipped}


def memory_rows(name: str, files: Files) -> list[str]:
    """A row for each of the settings and forms; for `small` the weights lie in a file of their own."""
    rows = []
    for settings in SETTINGS:
        separate = 0.0
        for form, paths in files.items():
            paths = [beside(path) for path in paths] if settings == "small" else paths
            found = alone(paths, "--settings", settings)
            separate = separate or found["peak"]
            memory = f"{found['before']:.0f} | {found['peak']:.0f} | {found['after']:.0f}"
            rows.append(
                f"| {name} | {settings} | {form} | {memory} | {found['peak'] / separate:.2f} | {found['ms']:.2f} |"
            )
    return rows


def beside(path: Path) -> Path:
    """The same network with its weights in a file beside it, which the runtime maps into memory."""
    target = path.with_suffix(".small.onnx")
    onnx.save(onnx.load(path), target, save_as_external_data=True, location=f"{target.name}.data")
    return target


def alone(paths: Sequence[Path], *more: object) -> dict[str, float]:
    """What benchmarks/onnx_alone.py says of the files."""
    command = [sys.executable, "-I", ALONE, *paths, *more]
    done = subprocess.run([str(each) for each in command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
