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
    assert len(lines) == 5 and "conv2d 5x5" in lines[1] and lines[1].endswith("yes")
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
