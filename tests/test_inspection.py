"""`inspect` says what can be shared and why the rest cannot, and leaves the network alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import LeNet5


def test_a_chain_can_be_shared_up_to_its_output() -> None:
    model = LeNet5().train()
    structure = tz.inspect(model, torch.rand(2, 1, 28, 28))
    assert [layer.name for layer in structure.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert [layer.pinned for layer in structure.layers] == ["", "", "", "an output of the network"]
    lines = str(structure).splitlines()
    assert len(lines) == 6 and "conv2d 5x5" in lines[1] and lines[1].endswith("yes")
    assert all(module.training for module in model.modules())


def test_inputs_as_batches_and_as_keyword_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, *, values: Tensor) -> Tensor:
            return self.out(self.hidden(values).relu())

    assert tz.inspect(Named(), {"values": torch.rand(3, 4)}).layers[0].pinned == ""
    pair = (torch.rand(3, 4), torch.zeros(3))
    assert len(tz.inspect(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), pair).layers) == 2


def test_a_network_that_cannot_be_followed_is_refused_with_its_shapes() -> None:
    with pytest.raises(tz.GraphError, match=r"Linear cannot be followed .* float32\[2, 9\]"):
        tz.inspect(nn.Linear(4, 5), torch.rand(2, 9))


def test_flops_and_bytes_by_hand() -> None:
    model = LeNet5()
    # Multiply-adds: places x kernels x what a kernel reads. A multiply-add is two FLOPs; a parameter is four bytes.
    multiply_adds = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10
    parameters = 20 * 26 + 50 * (20 * 25 + 1) + 500 * 801 + 10 * 501
    found = tz.inspect(model, torch.rand(3, 1, 28, 28))
    assert (found.flops, found.bytes) == (2 * multiply_adds, 4 * parameters)
    last = str(found).splitlines()[-1]
    assert last == "4,586,000 FLOPs per sample (a multiply-add is 2), 1,724,320 bytes"


def test_values_that_the_network_does_not_take_are_refused() -> None:
    words = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    with pytest.raises(tz.InputError, match=r"Sequential fails on inputs \(2, 3\): index out of range"):
        tz.inspect(words, torch.full((2, 3), 10))
    assert tz.inspect(words, torch.full((2, 3), 9)).flops == 2 * 3 * 4 * 2


def test_a_scalar_beside_the_samples() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 5)

        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return self.out(scale * x)

    assert tz.inspect(Scaled(), {"scale": torch.tensor(2.0), "x": torch.rand(3, 4)}).flops == 2 * 4 * 5
