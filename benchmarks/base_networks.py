"""The trained networks that the experiments start from, cached under ``runs/base`` as safetensors.

``python benchmarks/base_networks.py`` trains those that are absent and prints the test error of all; with arguments,
such as ``resnet20-digit lenet``, of those whose names begin with one of them. They are

- LeNet-300-100 on MNIST (seeds 0, 1), LeNet-5 on MNIST (seeds 0, 1) and LeNet-5 on Fashion-MNIST (seed 0);
- ResNet-20 for five tasks on 32x32 images of three channels, see `resnet20_data`: ``digit`` and ``garment`` (seeds
  0, 1), ``digit-turn``, ``garment-turn`` and ``kind`` (seed 0);
- ResNet-8 of ResNet-28's widths (64, 128 and 256 channels, one block in each group) for the same five tasks, on these
  images at half the resolution, 16x16.

Learning rate and weight decay were chosen with LeNet-300-100 on the last 10,000 training images of MNIST
(1.5 to 1.9% wrong for all that was tried), never on a test set; the networks then learn from all 60,000.
ResNet-20 keeps both: after 125 steps on garments it had 15.4% of the last 5,000 training images wrong, with peaks of
0.002 and 0.015 it had 14.8 and 16.4%. Its epochs, one to three, are what one CPU core does in an hour for all seven.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from taskzip.datasets import fashion_mnist, mnist
from taskzip.models import LeNet5, LeNet300, ResNet20
from taskzip.models.resnet import ResNet

Dataset = Literal["mnist", "fashion"]
ResNetTask = Literal["digit", "garment", "digit-turn", "garment-turn", "kind"]
Split = Literal["train", "test"]
Data = tuple[Tensor, Tensor]
Network = TypeVar("Network", bound=nn.Module)

CACHE = Path(__file__).resolve().parents[1] / "runs" / "base"
BATCH = 128
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 0.1
_READERS = {"mnist": mnist, "fashion": fashion_mnist}
_KIND_IMAGES = {"train": 30_000, "test": 10_000}


@dataclass(frozen=True)
class _Recipe:
    """How a ResNet-20 is trained; ``mean`` and ``std`` are those of the task's training images."""

    classes: int
    epochs: int
    mean: float
    std: float


_RECIPES: dict[ResNetTask, _Recipe] = {
    "digit": _Recipe(classes=10, epochs=1, mean=0.1000, std=0.2752),
    "garment": _Recipe(classes=10, epochs=3, mean=0.2190, std=0.3318),
    "digit-turn": _Recipe(classes=4, epochs=1, mean=0.1000, std=0.2752),
    "garment-turn": _Recipe(classes=4, epochs=1, mean=0.2190, std=0.3318),
    "kind": _Recipe(classes=3, epochs=1, mean=0.3859, std=0.4468),
}


def lenet300(seed: int) -> LeNet300:
    """Return LeNet-300-100 trained on MNIST, in eval mode; from the cache where it is there."""
    return _cached(f"lenet300-mnist-{seed}", LeNet300, lambda: mnist(split="train"), seed, epochs=20)


def lenet5(seed: int, dataset: Dataset = "mnist", images: int = 60_000) -> LeNet5:
    """Return LeNet-5 trained on MNIST or Fashion-MNIST, on the first images of it; in eval mode, cached likewise."""

    def training_data() -> Data:
        x, y = _READERS[dataset](split="train")
        return x[:images], y[:images]

    name = f"lenet5-{dataset}-{seed}" + ("" if images == 60_000 else f"-of-{images}")
    return _cached(name, LeNet5, training_data, seed, epochs=12)


def resnet20(seed: int, task: ResNetTask) -> ResNet20:
    """Return ResNet-20 trained for a task of `resnet20_data`, in eval mode; from the cache where it is there."""
    recipe = _RECIPES[task]

    def build() -> ResNet20:
        return ResNet20(classes=recipe.classes, mean=recipe.mean, std=recipe.std)

    return _cached(f"resnet20-{task}-{seed}", build, lambda: resnet20_data(task, "train"), seed, recipe.epochs)


def resnet8(seed: int, task: ResNetTask) -> ResNet:
    """Return ResNet-8 of ResNet-28's widths trained for a task of `resnet8_data`, likewise."""
    recipe = _RECIPES[task]

    def build() -> ResNet:
        return ResNet(3, recipe.classes, widths=(64, 128, 256), blocks=1, mean=recipe.mean, std=recipe.std)

    return _cached(f"resnet8-{task}-{seed}", build, lambda: resnet8_data(task, "train"), seed, recipe.epochs)


def resnet8_data(task: ResNetTask, split: Split) -> Data:
    """Return the images of `resnet20_data` at half the resolution, ``[n, 3, 16, 16]``, and the labels ``[n]``."""
    images, labels = resnet20_data(task, split)
    return F.avg_pool2d(images, 2), labels


def resnet20_data(task: ResNetTask, split: Split) -> Data:
    """Return images ``[n, 3, 32, 32]`` and labels ``[n]`` of a task, the same on every call.

    ``digit`` and ``garment`` are MNIST and Fashion-MNIST with their ten classes. ``digit-turn`` and ``garment-turn``
    tell by how many quarter turns each of their images was rotated. ``kind`` mixes images of both: 0 is a digit, 1 a
    garment, and 2 a negative of either; 30,000 images to train on and 10,000 to test with. The images of a split are
    made from the same split of the data sets alone.
    """
    if task == "kind":
        return _kinds(split)
    images, labels = (mnist if task.startswith("digit") else fashion_mnist)(split=split)
    if task.endswith("turn"):
        images, labels = _randomly_turned(images)
    return as_rgb32(images), labels


def as_rgb32(images: Tensor) -> Tensor:
    """Return 28x28 grey images, ``[n, 1, 28, 28]``, as ``[n, 3, 32, 32]``: framed by zeros, three equal channels."""
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)


@torch.no_grad()
def test_error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of wrong answers in percent; the model is left in the mode that it was in."""
    was_training = model.training
    model.eval()
    batches = zip(images.split(1000), labels.split(1000), strict=True)
    wrong = sum(int((model(x).argmax(1) != y).sum()) for x, y in batches)
    model.train(was_training)
    return 100.0 * wrong / len(labels)


# pytest collects functions of this name where a test imports them.
test_error.__test__ = False  # type: ignore[attr-defined]


def _randomly_turned(images: Tensor) -> Data:
    """Every image once, rotated by 0 to 3 quarter turns, and by how many."""
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(0))
    turned = images.clone()
    for turn in range(1, 4):
        turned[turns == turn] = images[turns == turn].rot90(turn, (2, 3))
    return turned, turns


def _kinds(split: Split) -> Data:
    """Digits and garments in random order; every third image is a negative."""
    digits, garments = mnist(split=split)[0], fashion_mnist(split=split)[0]
    order = torch.randperm(len(digits) + len(garments), generator=torch.Generator().manual_seed(0))
    chosen = order[: _KIND_IMAGES[split]]
    images = as_rgb32(torch.cat([digits, garments])[chosen])
    kinds = (chosen >= len(digits)).long()
    images[2::3] = 1 - images[2::3]
    kinds[2::3] = 2
    return images, kinds


def _cached(
    name: str, build: Callable[[], Network], training_data: Callable[[], Data], seed: int, epochs: int
) -> Network:
    path = CACHE / f"{name}.safetensors"
    torch.manual_seed(seed)
    model = build()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images, labels = training_data()
    started = time.perf_counter()
    _train(model, images, labels, seed, epochs)
    _save(model, path, seconds=time.perf_counter() - started)
    return model.eval()


def _train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int) -> None:
    """Train with AdamW and a one-cycle learning rate, on the images as they are."""
    # Convolutions train 1.6 times as fast on a CPU in this format.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    batches = -(-len(images) // BATCH)
    schedule = OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=shuffle).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _save(model: nn.Module, path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a killed run leaves no torn network behind.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(model.state_dict(), part, metadata={"training_seconds": f"{seconds:.0f}"})
    os.replace(part, path)


def _all_networks() -> list[tuple[str, Callable[[], nn.Module], Callable[[], Data]]]:
    """The name, the network and the test images of each, in the order of training."""
    digits, garments = (lambda: mnist(split="test")), (lambda: fashion_mnist(split="test"))
    resnets: list[tuple[ResNetTask, int]] = [
        ("digit", 0),
        ("garment", 0),
        ("digit", 1),
        ("digit-turn", 0),
        ("garment-turn", 0),
        ("kind", 0),
        ("garment", 1),
    ]
    return [
        ("lenet300-mnist-0", lambda: lenet300(0), digits),
        ("lenet300-mnist-1", lambda: lenet300(1), digits),
        ("lenet5-mnist-0", lambda: lenet5(0), digits),
        ("lenet5-mnist-1", lambda: lenet5(1), digits),
        ("lenet5-fashion-0", lambda: lenet5(0, "fashion"), garments),
        *(
            (f"resnet20-{task}-{seed}", partial(resnet20, seed, task), partial(resnet20_data, task, "test"))
            for task, seed in resnets
        ),
        *((f"resnet8-{task}-0", partial(resnet8, 0, task), partial(resnet8_data, task, "test")) for task in _RECIPES),
    ]


def main(beginnings: Sequence[str]) -> None:
    """Train what is absent and print the test error of every network whose name has one of the beginnings."""
    for name, get, test_data in _all_networks():
        if not name.startswith(tuple(beginnings)):
            continue
        started = time.perf_counter()
        model = get()
        seconds = time.perf_counter() - started
        error = test_error(model, *test_data())
        print(f"{name:23} {error:5.2f}% wrong, {seconds:5.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [""])
