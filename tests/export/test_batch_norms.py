"""Batch-norm behind weights that others use too is a scale and a shift; behind others it stays, to be folded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from joint_graphs import count, graph_of
from torch import nn

from taskzip.export.batch_norms import keep_apart
from taskzip.export.graphs import aten

NORM = aten._native_batch_norm_legit_no_training.default


def normed(layer: nn.Module, norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return nn.Sequential(layer, norm).eval()


@pytest.mark.parametrize(
    "layer, norm, shape",
    [
        (lambda: nn.Conv2d(2, 4, 3), nn.BatchNorm2d, (3, 2, 5, 5)),
        (lambda: nn.Conv2d(2, 4, 3, bias=False), lambda n: nn.BatchNorm2d(n, affine=False), (3, 2, 5, 5)),
        (lambda: nn.Conv1d(2, 4, 3), nn.BatchNorm1d, (3, 2, 5)),
        (lambda: nn.Linear(2, 4), nn.BatchNorm1d, (3, 2)),
    ],
)
def test_shared_and_private_layers(
    layer: Callable[[], nn.Module], norm: Callable[[int], nn.Module], shape: tuple[int, ...]
) -> None:
    shared, x = layer(), torch.randn(shape)
    for left, layers in ((0, (shared, shared)), (2, (layer(), layer()))):
        networks = {name: normed(each, norm(4)) for name, each in zip("ab", layers, strict=True)}
        graph = graph_of(networks, x)
        keep_apart(graph)
        assert count(graph, NORM) == left
        for given, net in zip(graph.part(["input"], ["a", "b"])(x), networks.values(), strict=True):
            torch.testing.assert_close(given, net(x), rtol=1e-4, atol=1e-5)
