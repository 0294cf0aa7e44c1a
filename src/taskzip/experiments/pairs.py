"""Two trained networks with their data: what is zipped, retrained and measured in the experiments."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

import taskzip as tz
from taskzip.datasets import batches
from taskzip.experiments.networks import READ, Data, Dataset, error_of
from taskzip.training import Loss

IMAGES = 4_000
"""For calibration, drawn at random from the 60,000 training images."""


@dataclass(frozen=True)
class Pair:
    """Two networks, A and B, each trained on a dataset.

    Args:
        networks: in eval mode.
        datasets: of each.
    """

    networks: tuple[nn.Module, nn.Module]
    datasets: tuple[Dataset, Dataset]

    @cached_property
    def train(self) -> list[Data]:
        """Training images and labels of each."""
        return [READ[dataset](split="train") for dataset in self.datasets]

    @cached_property
    def test(self) -> list[Data]:
        """Test images and labels of each."""
        return [READ[dataset](split="test") for dataset in self.datasets]

    def calibration(self, seed: int) -> list[tz.Task]:
        """The tasks with some training images."""
        fewest = min(len(x) for x, _ in self.train)
        chosen = torch.randperm(fewest, generator=torch.Generator().manual_seed(seed))[:IMAGES]
        data = [batches(x[chosen], y[chosen], size=500) for x, y in self.train]
        return [tz.Task(name, net, each) for name, net, each in zip("AB", self.networks, data, strict=True)]

    def retrained(
        self,
        zipped: tz.ZippedModel,
        steps: int,
        loss: Loss,
        seed: int,
        *,
        batch: int = 128,
        step_size: float = 1e-2,
    ) -> tz.ZippedModel:
        """A copy, retrained lightly on all training images, so many of each task in one step."""
        zipped = copy.deepcopy(zipped)
        for network in (zipped, *self.networks):  # convolutions train faster on a CPU in this format
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = [batches(*each, size=batch, shuffle=True) for each in self.train]
        tasks = [tz.Task(name, net, each) for name, net, each in zip("AB", self.networks, data, strict=True)]
        tz.retrain(zipped, tasks, steps, loss=loss, step_size=step_size, progress=False, seed=seed)
        return zipped

    def before(self) -> tuple[float, float]:
        """Test errors of the networks by themselves, in percent."""
        return error_of(self.networks[0], self.test[0]), error_of(self.networks[1], self.test[1])

    def errors(self, zipped: tz.ZippedModel) -> tuple[float, float]:
        """Test errors of its networks A and B, in percent."""
        return error_of(zipped["A"], self.test[0]), error_of(zipped["B"], self.test[1])
