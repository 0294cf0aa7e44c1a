"""`taskzip demo`: train two small networks on handwritten digits, zip them, and show what was gained and lost."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import taskzip as tz
from taskzip.cli.leaving import exit_codes
from taskzip.datasets import batches, digits, quarter_turns
from taskzip.models import SmallCNN
from taskzip.report import plot_zip

# Chosen by the errors on 300 of the training images, with networks trained on the others: never on the test images.
EPOCHS = {"digit": 30, "turn": 20}
BATCH = {"digit": 64, "turn": 128}
PEAK_LEARNING_RATE = 2e-2
WEIGHT_DECAY = 0.05

CLASSES = {"digit": 10, "turn": 4}
QUESTIONS = {"digit": "which digit is it?", "turn": "which way up is it?"}
Data = dict[str, tuple[Tensor, Tensor]]
"""Per task, images and labels."""


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for joint.safetensors and demo.png.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same numbers.")] = 0,
    share: Annotated[float, typer.Option(min=0, max=1, help="Fraction of each hidden layer's units to share.")] = 1.0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of light retraining.")] = 200,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Zip two small networks and show the result: half a minute, no download.

    Both see the handwritten digits of scikit-learn: one tells the digit, the other by which quarter turn it is rotated.
    """
    quiet = quiet or bool(context.obj)
    with exit_codes(), _reproducible(seed):
        _run(out, seed, share, steps, Console(quiet=quiet, highlight=False), progress=not quiet and sys.stderr.isatty())


def _run(out: Path, seed: int, share: float, steps: int, console: Console, *, progress: bool) -> None:
    started = time.perf_counter()
    _check_extras()
    _check_writable(out)
    train, test = _data("train"), _data("test")
    models = {name: SmallCNN(classes) for name, classes in CLASSES.items()}
    _introduce(console, models, train, test)
    for name, model in models.items():
        _train(name, model, *train[name], progress=progress)
    errors = {"before": _errors(models, test)}
    sizes = {name: len(safetensors.torch.save(model.state_dict())) for name, model in models.items()}

    tasks = [tz.Task(name, models[name], batches(*train[name], size=128, shuffle=True)) for name in CLASSES]
    zipped = tz.zip(tasks, share=share, progress=progress, seed=seed)
    errors["zipped"] = _errors(zipped.tasks, test)
    if steps:
        tz.retrain(zipped, tasks, steps, loss="distill", progress=progress, seed=seed)
        errors[f"after {steps} steps"] = _errors(zipped.tasks, test)
    _show_errors(console, errors)
    console.print(zipped.summary(), markup=False, soft_wrap=True)

    out.mkdir(parents=True, exist_ok=True)
    checkpoint, picture = out / "joint.safetensors", out / "demo.png"
    zipped.save(checkpoint)
    plot_zip(zipped, picture, errors=errors)
    _show_sizes(console, sizes, checkpoint)
    _check_checkpoint(checkpoint, zipped, test)
    console.print(f"{checkpoint}, loaded into fresh networks, gives identical outputs.", soft_wrap=True)
    console.print(f"The picture is {picture}. {time.perf_counter() - started:.0f} seconds in all.", soft_wrap=True)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, and compute on one thread: more are slower here, and would change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _check_extras() -> None:
    """Fail before the training rather than after it."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise tz.InputError(
            f"the demo needs scikit-learn and matplotlib, and {error.name} is absent: pip install 'taskzip[demo]'"
        ) from error


def _check_writable(out: Path) -> None:
    """Fail before the training rather than after it, without leaving anything behind."""
    nearest = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise tz.InputError(
            f"cannot write to {out} ({nearest}: {error.strerror}): choose another folder with --out."
        ) from error


def _data(split: str) -> Data:
    images, labels = digits(split)  # type: ignore[arg-type]
    return {"digit": (images, labels), "turn": quarter_turns(images)}


def _train(name: str, model: SmallCNN, images: Tensor, labels: Tensor, *, progress: bool) -> None:
    """Train with AdamW and a one-cycle learning rate; the network is left in eval mode."""
    # Convolutions train 1.4 times as fast on a CPU in this format.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = batches(images, labels, size=BATCH[name], shuffle=True)
    steps = EPOCHS[name] * len(data)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        todo = bar.add_task(f"training {name}", total=steps)
        for _ in range(EPOCHS[name]):
            for x, y in data:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                schedule.step()
                bar.advance(todo)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()


@torch.no_grad()
def _errors(models: dict[str, SmallCNN] | nn.ModuleDict, test: Data) -> dict[str, float]:
    """Per task, the share of wrong answers in percent."""
    return {
        name: 100 * (models[name](images).argmax(1) != labels).double().mean().item()
        for name, (images, labels) in test.items()
    }


@torch.no_grad()
def _check_checkpoint(path: Path, zipped: tz.ZippedModel, test: Data) -> None:
    loaded = tz.load(path, {name: SmallCNN(classes) for name, classes in CLASSES.items()})
    for name, (images, _) in test.items():
        if not torch.equal(loaded[name](images), zipped[name](images)):
            raise tz.CheckpointError(f"{path}, loaded again, gives other outputs for {name!r}: please report this.")


def _introduce(console: Console, models: dict[str, SmallCNN], train: Data, test: Data) -> None:
    table = Table("task", "question", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("parameters", "train", "test images"):
        table.add_column(title, justify="right")
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        table.add_row(name, QUESTIONS[name], *(f"{n:,}" for n in (count, len(train[name][1]), len(test[name][1]))))
    console.print("Two networks, trained apart on the handwritten digits of scikit-learn:")
    console.print(table)


def _show_errors(console: Console, errors: dict[str, dict[str, float]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("wrong on test images (%)")
    for stage in errors:
        table.add_column(stage, justify="right")
    for name in CLASSES:
        table.add_row(name, *(f"{error[name]:.2f}" for error in errors.values()))
    console.print(table)


def _show_sizes(console: Console, sizes: dict[str, int], checkpoint: Path) -> None:
    apart, together = sum(sizes.values()), checkpoint.stat().st_size
    each = " + ".join(f"{size:,}" for size in sizes.values())
    console.print(
        f"\nAs safetensors files: {apart:,} bytes apart ({each}), {together:,} together ({together / apart:.0%})."
    )
