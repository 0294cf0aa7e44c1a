"""The trained networks that the experiments start from (Sec. 4.1), cached as safetensors.

Two networks of one kind differ in their first weights and in the order of the training images, and at the end the
hidden units of each are put into a random order. A training that was killed goes on where its last epoch ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from taskzip.datasets import batches, fashion_mnist, mnist
from taskzip.files import replacing
from taskzip.graph import analyse
from taskzip.models import LeNet5, LeNet300
from taskzip.pruning import prune
from taskzip.randomness import seeded
from taskzip.tasks import Task
from taskzip.training import Retraining

Kind = Literal["lenet300", "lenet5"]
Dataset = Literal["mnist", "fashion"]
Data = tuple[Tensor, Tensor]
"""Images and labels."""
Say = Callable[[str], None]

BUILD: dict[Kind, type[nn.Module]] = {"lenet300": LeNet300, "lenet5": LeNet5}
READ = {"mnist": mnist, "fashion": fashion_mnist}

ITERATIONS: dict[Kind, int] = {"lenet300": 10_500, "lenet5": 11_000}
"""Those of the paper."""

KEEP: dict[Kind, float] = {"lenet300": 0.07, "lenet5": 0.07}
"""Share of the weights that pruning leaves."""

PRUNED_RETRAINING = Retraining(1000, loss="distill", step_size=1e-2)
PRUNING_BATCH = 128

BATCH = 64
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Shelf:
    """Where trained networks are kept, and who is told what is being done.

    Args:
        folder: for the files.
        say: is told in a line what takes long.
    """

    folder: Path
    say: Say

    def trained(self, kind: Kind, dataset: Dataset, seed: int) -> nn.Module:
        """A trained network in eval mode, from its file if that is there."""
        return self.kept(f"{kind}-{dataset}-{seed}", BUILD[kind], lambda path: self._train(kind, dataset, seed, path))

    def pruned(self, kind: Kind, dataset: Dataset, seed: int) -> nn.Module:
        """The same network pruned by L-OBS and lightly retrained, zeros kept; from its file if that is there."""

        def make(_: Path) -> nn.Module:
            model = self.trained(kind, dataset, seed)
            self.say(f"pruning {kind} number {seed} on {dataset} to {KEEP[kind]:.0%} of its weights")
            task = Task(kind, model, batches(*READ[dataset](split="train"), size=PRUNING_BATCH, shuffle=True))
            return prune(task, keep=KEEP[kind], retrain=PRUNED_RETRAINING, progress=False, seed=seed)

        return self.kept(f"{kind}-{dataset}-{seed}-sparse", BUILD[kind], make)

    def kept(self, name: str, build: Callable[[], nn.Module], make: Callable[[Path], nn.Module]) -> nn.Module:
        """What `make` gives, made once; it may leave something at the path that it is given until it is done."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            model = build()
            model.load_state_dict(load_file(path))
            return model.eval()
        self.folder.mkdir(parents=True, exist_ok=True)
        half_way = self.folder / f"{name}.unfinished.safetensors"
        model = make(half_way)
        with replacing(path) as part:
            save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, part)
        half_way.unlink(missing_ok=True)
        return model.eval()

    def _train(self, kind: Kind, dataset: Dataset, seed: int, half_way: Path) -> nn.Module:
        images, labels = READ[dataset](split="train")
        iterations = ITERATIONS[kind]
        self.say(f"training {kind} number {seed} on {dataset}: {iterations:,} iterations")
        with seeded(seed):
            model = BUILD[kind]()
            Training(model, iterations, seed, half_way).run(images, labels)
        shuffle_units(model.eval(), images[:2], seed)
        return model


class Training:
    """Training with AdamW and a one-cycle learning rate, which begins again where it was left at the end of an epoch.

    Both were chosen on the last 10,000 training images, see `benchmarks/base_networks.py`.
    """

    def __init__(self, model: nn.Module, iterations: int, seed: int, half_way: Path) -> None:
        self.model, self.iterations, self.seed, self.half_way = model, iterations, seed, half_way
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
        self.schedule = OneCycleLR(self.optimizer, PEAK_LEARNING_RATE, total_steps=iterations)
        self.done = 0

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Train to the end."""
        epoch = -(-len(images) // BATCH)
        if self.half_way.exists():
            self._resume()
        # Convolutions train 1.6 times as fast on a CPU in this format.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        while self.done < self.iterations:
            shuffle = torch.Generator().manual_seed(1000 * self.seed + self.done // epoch)
            order = torch.randperm(len(images), generator=shuffle).split(BATCH)
            for rows in order[: self.iterations - self.done]:
                self._step(images[rows], labels[rows])
            self._save()
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1

    def _save(self) -> None:
        state = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            state |= {f"{key}.{name}": self.optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")}
        with replacing(self.half_way) as part:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, part)

    def _resume(self) -> None:
        state = load_file(self.half_way)
        for name, p in self.model.named_parameters():
            p.data.copy_(state[f"model.{name}"])
            self.optimizer.state[p] = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.done = int(state[f"step.{name}"])
        self.optimizer.step()  # there are no gradients, so it does nothing; the schedule wants to have seen one
        for _ in range(self.done):
            self.schedule.step()


def shuffle_units(model: nn.Module, example: Tensor, seed: int) -> None:
    """Put the units of every hidden layer into a random order, in place; the network computes what it did."""
    structure = analyse(model, example, lambda network, batch: network(batch))
    rng = np.random.default_rng(seed)
    for space in range(len(structure.spaces)):
        structure.reorder(model, space, rng.permutation(len(structure.spaces[space].units)))


@torch.no_grad()
def error_of(model: nn.Module, data: Data) -> float:
    """Wrong answers in percent."""
    images, labels = data
    batches = zip(images.split(2000), labels.split(2000), strict=True)
    return 100 * sum(int((model(x).argmax(1) != y).sum()) for x, y in batches) / len(labels)
