"""Layers computed block by block give what they gave, from constants that are parts of nothing but their own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from joint_graphs import graph_of
from torch import Tensor, nn

from taskzip.export.blockwise import LAYERS, join_weights, split_layers


class Assembled(nn.Module):
    """A layer whose weight is put together from blocks as zipping does it."""

    def __init__(
        self, layer: nn.Module, groups: Sequence[tuple[int, ...]], order: bool, narrow: bool, permuted: bool
    ) -> None:
        super().__init__()
        self.layer, weight = layer, layer.weight.detach()
        del layer.weight
        self.blocks = nn.ParameterList()
        self.groups, self.narrow = groups, narrow
        for i, (rows, *columns) in enumerate(groups):
            self.register_buffer(f"columns{i}", torch.randperm(sum(columns)) if permuted else None)
            for width in columns:
                self.blocks.append(nn.Parameter(torch.randn(rows, width + 2 * narrow, *weight.shape[2:])))
        self.register_buffer("order", torch.randperm(len(weight)) if order else None)

    def weight(self) -> Tensor:
        blocks, rows = iter(self.blocks), []
        for i, (_, *columns) in enumerate(self.groups):
            parts = [next(blocks)[:, :width] if self.narrow else next(blocks) for width in columns]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            place = getattr(self, f"columns{i}")
            rows.append(whole if place is None else whole.index_select(1, place))
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return whole if self.order is None else whole.index_select(0, self.order)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight = self.weight()
        try:
            return self.layer(x)
        finally:
            del self.layer.weight


@pytest.mark.parametrize(
    "layer, shape, groups, hazards",
    [
        (nn.Linear, (3, 6), [(3, 2, 4), (2, 6)], ""),
        (partial(nn.Linear, bias=False), (6,), [(3, 1, 2, 3), (2, 6)], "order permuted"),
        (partial(nn.Conv1d, kernel_size=3, stride=2), (2, 6, 9), [(3, 2, 4), (2, 4, 2)], "order narrow"),
        (partial(nn.Conv2d, kernel_size=3, padding="same"), (2, 6, 5, 5), [(4, 6), (1, 6)], "order permuted narrow"),
        (partial(nn.Conv2d, kernel_size=(1, 3), padding=1, dilation=2), (6, 7, 7), [(4, 1, 5)], "narrow permuted"),
        (partial(nn.Conv3d, kernel_size=2, bias=False), (1, 6, 3, 3, 3), [(1, 6), (1, 6), (2, 6)], "order"),
    ],
)
def test_split_and_joined(layer: Any, shape: tuple[int, ...], groups: list[tuple[int, ...]], hazards: str) -> None:
    """Linear layers and convolutions with and without an axis for the batch and a bias."""
    switches = {name: name in hazards for name in ("order", "narrow", "permuted")}
    net = Assembled(layer(6, sum(rows for rows, *_ in groups)), groups, **switches).double()
    x = torch.randn(shape, dtype=torch.float64)
    for change in (partial(split_layers, largest=2**20), join_weights):
        graph = graph_of({"a": net}, x)
        change(graph)
        torch.testing.assert_close(graph.part(["input"], ["a"])(x)[0], net(x))
        weights = [node.args[1] for node in graph.operators() if node.target in LAYERS]
        assert all(weight.op == "get_attr" for weight in weights)
        sizes = sorted(weight.meta["val"].numel() for weight in weights)
        whole = [net.weight().numel()]
        assert sizes == (whole if change is join_weights else sorted(block.numel() for block in net.blocks))


class Twice(nn.Module):
    """A layer with a weight of its own, and one with a weight that is computed in a way that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.one(x), self.other.tril())


def test_large_weights_are_cut_and_unknown_ones_left() -> None:
    net, x = Twice(), torch.randn(3, 6)
    graph = graph_of({"a": net}, x)
    split_layers(graph, 3 * 6 * 4)
    torch.testing.assert_close(graph.part(["input"], ["a"])(x)[0], net(x))
    shapes = [list(node.args[1].meta["val"].shape) for node in graph.operators() if node.target in LAYERS]
    assert shapes == [[3, 6], [3, 6], [2, 6], [8, 8]]
    join_weights(graph)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tril.default)
    torch.testing.assert_close(graph.part(["input"], ["a"])(x)[0], net(x))


class Crossed(nn.Module):
    """Parts side by side, of which one lies in another order of units."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 3))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.cat([self.left.index_select(0, self.order), self.right], 1))


def test_parts_in_different_orders_are_left_alone() -> None:
    net, x = Crossed(), torch.randn(3, 5)
    graph = graph_of({"a": net}, x)
    split_layers(graph, 2**20)
    torch.testing.assert_close(graph.part(["input"], ["a"])(x)[0], net(x))
