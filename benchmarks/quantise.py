"""Joint networks in int8: test errors and sizes with torchao and with ONNX Runtime. Prints the tables of docs/results.

    TASKZIP_DATA=... python benchmarks/quantise.py [--networks runs/reproduce/networks]
    OMP_NUM_THREADS=1 python benchmarks/quantise.py --times

Two LeNet-5, of MNIST and of Fashion-MNIST, are zipped with 2,000 training images each, and not retrained; they are
trained where the folder does not have them, which takes some minutes. Errors are in percent on all 10,000 test images
of each; static quantisation is calibrated with 256 training images. Times are those of untrained networks, one input
for both tasks, a thread. It needs taskzip[onnx] and torchao.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import taskzip as tz
from taskzip.datasets import batches, fashion_mnist, mnist
from taskzip.experiments.networks import Shelf, error_of
from taskzip.models import LeNet5

READ = {"digits": mnist, "clothes": fashion_mnist}
KEPT = {"digits": "mnist", "clothes": "fashion"}
Data = dict[str, tuple[Tensor, Tensor]]
CALIBRATION, STATIC_CALIBRATION, CHUNK = 2000, 256, 500


def quantize_shared(zipped: tz.ZippedModel, config: Any) -> None:
    """Quantise the weights of linear layers in place: a block that several tasks share once, for all of them."""
    done = {}
    for layer in [module for module in zipped.modules() if isinstance(module, nn.Linear)]:
        owner = getattr(layer, "weight_blocks", layer)
        for name, block in list(owner.named_parameters()):
            if block.dim() == 2:
                if block not in done:
                    plain = nn.Linear(1, 1)
                    plain.weight = block
                    quantize_(plain, config)
                    done[block] = plain.weight
                owner.register_parameter(name, done[block])


class Images(CalibrationDataReader):
    """Training images for both tasks, 16 at a time."""

    def __init__(self, train: Data) -> None:
        chosen = {f"input.{name}": images[:STATIC_CALIBRATION].split(16) for name, (images, _) in train.items()}
        self.batches = iter([dict(zip(chosen, each, strict=True)) for each in zip(*chosen.values(), strict=True)])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None at the end."""
        batch = next(self.batches, None)
        return batch and {name: images.numpy() for name, images in batch.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=Path, default=Path("runs/reproduce/networks"))
    parser.add_argument("--times", action="store_true", help="print the table of times")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime advises to run its own optimisations before
    if asked.times:
        times()
        return
    shelf = Shelf(asked.networks, print)
    nets = {name: shelf.trained("lenet5", dataset, 0) for name, dataset in KEPT.items()}  # type: ignore[arg-type]
    train, test = ({name: read(split=split) for name, read in READ.items()} for split in ("train", "test"))
    print("| share | form | digits | clothes | bytes | of two networks |\n|---|---|---|---|---|---|")
    for share in (1.0, 0.5):
        apart = 0
        for form, errors, size in rows(nets, train, test, share):
            apart = apart or size
            cells = " | ".join(f"{error:.2f}" for error in errors)
            print(f"| {share} | {form} | {cells} | {size:,} | {size / apart:.2f} |", flush=True)


Row = tuple[str, list[float], int]


def rows(nets: dict[str, nn.Module], train: Data, test: Data, share: float) -> Iterator[Row]:
    """Every form of a joint network, with its errors and bytes."""
    chosen = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    data = {name: batches(x[chosen], y[chosen], size=500) for name, (x, y) in train.items()}
    zipped = tz.zip([tz.Task(name, nets[name], data[name]) for name in nets], share=share, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        yield "two networks", in_torch(nets, test), saved(nets, folder)
        yield "joint", in_torch(zipped, test), saved(zipped, folder)
        yield from with_onnx_runtime(zipped, train, test, Path(folder), share)
        plain = {name: zipped.materialize(name) for name in zipped}
        for network in plain.values():
            quantize_(network, Int8WeightOnlyConfig())
        yield "torchao, two plain networks", in_torch(plain, test), saved(plain, folder)
        quantize_shared(zipped, Int8WeightOnlyConfig())
        yield "torchao, shared blocks", in_torch(zipped, test), saved(zipped, folder)
        path = Path(folder) / "torchao.onnx"
        tz.export_onnx(zipped, path, {name: x[:1] for name, (x, _) in test.items()})
        yield "torchao, then ONNX", in_onnx(path, test), path.stat().st_size


def with_onnx_runtime(zipped: tz.ZippedModel, train: Data, test: Data, folder: Path, share: float) -> Iterator[Row]:
    """The joint file and what ONNX Runtime's quantisers make of it."""
    example = {name: x[:1] for name, (x, _) in test.items()}
    for form, by_block in (("ONNX", False), *([("ONNX by block", True)] if share < 1 else [])):
        path, target = folder / "joint.onnx", folder / "int8.onnx"
        tz.export_onnx(zipped, path, example, by_block=by_block)
        yield form, in_onnx(path, test), path.stat().st_size
        ways: dict[str, Callable[[], None]] = {
            "static": lambda path=path, target=target: quantize_static(path, target, Images(train), per_channel=True)
        }
        if share == 1 or by_block:  # convolutions whose weights are put together are refused
            ways["dynamic"] = lambda path=path, target=target: quantize_dynamic(
                path, target, weight_type=QuantType.QInt8
            )
        for way, quantise in ways.items():
            quantise()
            yield f"{form}, {way} int8", in_onnx(target, test), target.stat().st_size


class Transformer(nn.Module):
    """Four layers of torch, over 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(128, 4, 512, batch_first=True) for _ in range(4)]
        self.layers, self.out = nn.Sequential(nn.Linear(16, 128), *layers), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores: [samples, 10]."""
        return self.out(self.layers(x).mean(1))


def times() -> None:
    """Print how long files of both tasks take, and how large they are, relative to two files of floats."""
    print("| networks | share | weights | form | bytes | ms | of two | of two in floats |\n" + "|---" * 8 + "|")
    for called, make, shape in (("LeNet-5", LeNet5, (1, 28, 28)), ("transformer", Transformer, (32, 16))):
        nets = {}
        for seed, name in enumerate(READ):
            torch.manual_seed(seed)
            nets[name] = make().eval()
        for share, by_block in ((1.0, False), (0.5, True)):
            tasks = [tz.Task(name, net, [torch.randn(64, *shape)]) for name, net in nets.items()]
            joint = tz.zip(tasks, share=share, progress=False, compensate=False).eval()
            with tempfile.TemporaryDirectory() as folder:
                files = written(joint, torch.randn(1, *shape), Path(folder), by_block, share == 1)
                measured = dict(zip(files, medians(list(files.values()), shape), strict=True))
                first = measured["floats", "two files"]
                for (weights, form), paths in files.items():
                    size, took = sum(path.stat().st_size for path in paths), measured[weights, form]
                    ratios = f"{took / measured[weights, 'two files']:.2f} | {took / first:.2f}"
                    form += ", by block" if by_block and form == "joint" else ""
                    print(
                        f"| {called} | {share} | {weights} | {form} | {size:,} | {1e3 * took:.2f} | {ratios} |",
                        flush=True,
                    )


def written(
    joint: tz.ZippedModel, x: Tensor, folder: Path, by_block: bool, whole: bool
) -> dict[tuple[str, str], list[Path]]:
    """Files by weights and form."""
    alone = [tz.ZippedModel({name: joint.materialize(name)}).eval() for name in joint]
    forms = {"two files": alone, "joint": [joint]}
    found: dict[tuple[str, str], list[Path]] = {}
    for form, networks in forms.items():
        for i, network in enumerate(networks):
            path = folder / f"{form}{i}.onnx"
            tz.export_onnx(network, path, x, by_block=by_block)
            found.setdefault(("floats", form), []).append(path)
    for form, paths in [(form, paths) for (_, form), paths in found.items()]:
        if form == "two files" or by_block or whole:
            found["dynamic int8", form] = [path.with_suffix(".int8.onnx") for path in paths]
            for path, target in zip(paths, found["dynamic int8", form], strict=True):
                quantize_dynamic(path, target, weight_type=QuantType.QInt8)
    return found


def medians(files: list[list[Path]], shape: tuple[int, ...], rounds: int = 60) -> list[float]:
    """Seconds of CPU that one input takes in all of some files; all take turns, for the machine has other work."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = [
        [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in each]
        for each in files
    ]
    given, taken = {"input": np.random.default_rng(0).normal(size=(1, *shape)).astype("f")}, []
    for _ in range(rounds):
        taken.append([])
        for each in sessions:
            start = time.process_time()
            for session in each:
                session.run(None, given)
            taken[-1].append(time.process_time() - start)
    return list(np.median(taken, 0))


def in_torch(networks: Any, test: Data) -> list[float]:
    """Errors in PyTorch."""
    return [error_of(networks[name], data) for name, data in test.items()]


def in_onnx(path: Path, test: Data) -> list[float]:
    """Errors in ONNX Runtime, each task with its own images."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wrong = dict.fromkeys(test, 0)
    samples = len(next(iter(test.values()))[0])
    for start in range(0, samples, CHUNK):
        part = slice(start, start + CHUNK)
        given = {f"input.{name}": images[part].numpy() for name, (images, _) in test.items()}
        for name, logits in zip(test, session.run(list(test), given), strict=True):
            wrong[name] += int((np.argmax(logits, 1) != test[name][1][part].numpy()).sum())
    return [100 * count / samples for count in wrong.values()]


def saved(networks: Any, folder: str) -> int:
    """Bytes of all weights as torch saves them, what is shared once."""
    path = Path(folder) / "networks.pt"
    torch.save([networks[name].state_dict() for name in networks], path)
    return path.stat().st_size


if __name__ == "__main__":
    main()
