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
    assert len(lines) == 7 and "conv2d 5x5" in lines[1] and lines[1].endswith("yes")
    assert lines[5].startswith(
        "can be shared with a network of its own kind: 570 of 580 (98%) rows, 426,070 of 431,080"
    )
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


class Several(nn.Module):
    """Kinds of layers that zipping does not share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.recurrent = nn.LSTM(6, 4, batch_first=True)
        self.scaled, self.scaled_bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.mixes, self.out = nn.Parameter(torch.randn(5, 7)), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(self.norm(self.words(x)))[0].mean(1)
        return self.out(nn.functional.linear(h, self.scaled.tanh(), self.scaled_bias).relu() @ self.mixes)


def test_there_is_a_line_for_every_parameter() -> None:
    model = Several()
    found = tz.inspect(model, torch.randint(9, (4, 5)))
    said = {each.name: each.said for each in found.rest}
    layers = {name for layer in found.layers for name in (layer.weight, layer.bias)}
    assert layers | said.keys() == {name for name, _ in model.named_parameters()}
    assert said["words.weight"] == "private: an embedding" and said["norm.bias"] == "private: of a norm"
    assert said["recurrent.weight_hh_l0"] == "private: recurrent: not shared yet"
    assert said["scaled"].endswith("private: the weight that a layer reads is computed as it runs")
    assert said["scaled_bias"].endswith("private: the bias of a layer whose weight is computed as it runs")
    assert said["mixes"].endswith("private: a matrix product outside of layers: not shared yet")
    table = str(found)
    assert all(name in table for name in said) and max(map(len, table.splitlines())) <= 100


def test_a_forward_of_its_own() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 5), "out": nn.Linear(5, 2)})
    with pytest.raises(tz.GraphError):
        tz.inspect(model, torch.rand(3, 4))
    found = tz.inspect(model, torch.rand(3, 4), forward=lambda m, x: m["out"](m["first"](x).relu()))
    assert [layer.pinned for layer in found.layers] == ["", "an output of the network"]
    assert found.flops == 2 * (4 * 5 + 5 * 2)


def test_an_example_is_left_as_it_is() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x.sub_(0.5))

    example = torch.rand(3, 4)
    before = example.clone()
    tz.inspect(Writes(), example)
    assert torch.equal(example, before)


class Scaled(nn.Linear):
    """Its weight is computed as it runs."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * 0.5, self.bias)


def test_nothing_to_zip_says_why() -> None:
    data = [torch.randn(8, 6)]
    tasks = [tz.Task(n, nn.Sequential(Scaled(6, 8), nn.ReLU(), Scaled(8, 3)).eval(), data) for n in "ab"]
    with pytest.raises(tz.InputError, match=r"0\.weight \(.*the weight that a layer reads is computed as it runs\)"):
        tz.zip(tasks, share=1.0, progress=False)


def test_all_of_nothing_is_a_warning() -> None:
    data = [torch.randn(8, 6)]
    tasks = [tz.Task(n, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Scaled(8, 3)).eval(), data) for n in "ab"]
    assert tz.zip(tasks, share=1.0, progress=False).history.layers[0].shared == 8
    alone = [tz.Task(n, nn.Linear(6, 8), data) for n in "ab"]
    with pytest.warns(tz.TaskzipWarning, match="nothing could be shared: all layers are output layers"):
        tz.zip(alone, share=1.0, progress=False)
