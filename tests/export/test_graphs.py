"""Graphs of several tasks: what is equal is one, and every part gives what the whole gives."""

from __future__ import annotations

import pytest
import torch
from joint_graphs import count, graph_of
from torch import Tensor, nn

import taskzip as tz
from taskzip.export.graphs import aten


class Net(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.out = first, nn.Linear(8, 3)
        self.register_buffer("mean", torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x - self.mean).relu_() * 2)


def test_what_tasks_have_in_common_is_one() -> None:
    first, x = nn.Linear(4, 8), torch.randn(5, 4)
    networks = {"a": Net(first), "b": Net(first)}
    graph = graph_of(networks, x)
    assert count(graph, aten.linear.default) == 1 + 2
    assert count(graph, aten.sub.Tensor) == count(graph, aten.relu.default) == count(graph, aten.mul.Tensor) == 1
    assert len(graph.graph.find_nodes(op="get_attr")) == 3 + 2 * 2  # the mean, too
    for outputs in (["a"], ["b"], ["a", "b"]):
        for given, name in zip(graph.part(["input"], outputs)(x), outputs, strict=True):
            assert torch.equal(given, networks[name](x))


class Numbers(nn.Module):
    """Equal arguments of other types are not the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * x.sum(0, keepdim=True) + x.mul(-0.0) + x.mul(0.0) + x.div(True).add(x.div(1))


def test_arguments_that_are_equal_but_not_the_same() -> None:
    x = torch.randn(3, 3)
    graph = graph_of({"a": Numbers()}, x)
    assert count(graph, aten.sum.dim_IntList) == 2
    assert torch.equal(graph.part(["input"], ["a"])(x)[0], Numbers()(x))


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x)


def test_random_numbers_stay_apart() -> None:
    x = torch.randn(3, 3)
    assert graph_of({"a": Random()}, x).part(["input"], ["a"])(x)[0].abs().sum() > 0


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(x) / self.calls


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))


@pytest.mark.parametrize(
    "net, message", [(Counting(), "writes into its buffer 'calls'"), (Deciding(), "run or not as the data decide")]
)
def test_what_is_no_graph_of_pure_functions(net: nn.Module, message: str) -> None:
    with pytest.raises(tz.ExportError, match=message):
        graph_of({"a": net}, torch.randn(2, 4))


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("part", torch.randn(5, 4)[1:3])
        self.turned = nn.Parameter(torch.randn(3, 4).T)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.turned + self.part.sum()


def test_constants_that_are_parts_of_others() -> None:
    net, x = Views(), torch.randn(2, 4)
    part = graph_of({"a": net}, x).part(["input"], ["a"])
    for value in part.state_dict().values():
        assert value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    torch.testing.assert_close(
        part(x)[0], net(x).detach()
    )  # the product of a matrix in another layout may round otherwise


def test_what_depends_on_the_input_is_found_in_one_walk() -> None:
    """Not along every path from the input, of which there are as many as can be."""

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(60):
                x = x + x.relu()
            return torch.nn.functional.linear(x, x)

    graph = graph_of({"a": Doubling()}, torch.randn(3, 3))
    assert graph.value(graph.outputs["a"]) is None

    class OfWeights(Doubling):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.zeros(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(self.own)

    graph = graph_of({"a": OfWeights()}, torch.randn(3, 3))
    (weight,) = [graph.value(node) for node in graph.operators() if node.target is aten.linear.default]
    assert weight is not None and torch.equal(weight, torch.zeros(3, 3))
