"""Averaging: of a network and its own shuffled copy, of any two, and output layers solved again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import taskzip as tz
from taskzip.datasets import batches, mnist
from taskzip.experiments.networks import shuffle_units
from taskzip.experiments.rivals import averaged
from taskzip.models import LeNet5, LeNet300


def tasks_of(one: nn.Module, other: nn.Module, images: int = 640) -> list[tz.Task]:
    x, y = mnist(split="train")
    return [tz.Task(name, net, batches(x[:images], y[:images], size=25)) for name, net in (("A", one), ("B", other))]


@pytest.mark.parametrize("build", [LeNet300, LeNet5])
def test_a_shuffled_copy_is_recognised(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    copied = copy.deepcopy(model)
    shuffle_units(copied, torch.rand(2, 1, 28, 28), seed=1)
    x = mnist(split="train")[0][:20]
    joint = averaged(tasks_of(model, copied), matched=True)
    for name in "AB":
        torch.testing.assert_close(joint[name](x), model(x), atol=1e-5, rtol=1e-4)
    assert (averaged(tasks_of(model, copied), matched=False)["A"](x) - model(x)).abs().max() > 1e-2


def test_all_but_the_output_layers_is_one_and_the_mean() -> None:
    one, other = LeNet300().eval(), LeNet300().eval()
    joint = averaged(tasks_of(one, other), matched=False)
    assert joint["A"].fc1.weight is joint["B"].fc1.weight and joint["A"].fc2.bias is joint["B"].fc2.bias
    torch.testing.assert_close(joint["A"].fc1.weight, (one.fc1.weight + other.fc1.weight) / 2)
    assert torch.equal(joint["B"].fc3.weight, other.fc3.weight)
    assert not torch.equal(one.fc1.weight, joint["A"].fc1.weight)  # the given networks stay as they are


def test_solved_output_layers_answer_more_like_the_original_ones() -> None:
    one, other = LeNet300().eval(), LeNet300().eval()
    tasks = tasks_of(one, other, images=600)
    x = mnist(split="train")[0][:600]
    apart = []
    for resolved in (False, True):
        joint = averaged(tasks, matched=True, resolved=resolved)
        apart.append(float((joint["B"](x) - other(x)).square().mean().detach()))
    assert apart[1] < apart[0] / 3
