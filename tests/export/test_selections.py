"""Selections of units move up to where the units came together, and no further; the outputs stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.export import onnx as exporting
from taskzip.models import LeNet5, ResNet20


def exported(make: Callable[[], nn.Module], x: Tensor, folder: Path, tasks: str = "ab", **options: Any) -> Any:
    """The graph of a joint network, which ONNX Runtime was seen to run with the right outputs."""
    nets = []
    for seed, _ in enumerate(tasks):
        torch.manual_seed(seed)
        nets.append(make().eval())
    given = [tz.Task(name, net, [x]) for name, net in zip(tasks, nets, strict=True)]
    options = {"share": 0.5, "cross": False, "compensate": False, "progress": False, **options}
    joint = tz.zip(given, **options)
    tz.export_onnx(joint, folder / "joint.onnx", x[:2])
    model = onnx.load(folder / "joint.onnx")
    onnx.checker.check_model(model, full_check=True)
    return model.graph, joint


def uses(graph: Any, kind: str) -> dict[str, int]:
    """How many nodes of a kind use each weight."""
    found: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == kind:
            found[node.input[1]] = found.get(node.input[1], 0) + 1
    return found


@pytest.mark.parametrize("tasks", ["ab", "abc"])
def test_a_partly_shared_trunk_runs_once(tmp_path: Path, tasks: str) -> None:
    graph, joint = exported(lambda: LeNet5(widths=(8, 12, 20)), torch.randn(12, 1, 28, 28), tmp_path, tasks, share=0.75)
    for kind, layers in (("Conv", ("conv1", "conv2")), ("Gemm", ("fc1",))):
        found = uses(graph, kind)
        blocks = {
            id(p) for layer in layers for name in joint for p in getattr(joint[name], layer).weight_blocks.parameters()
        }
        assert len([each for each in found if "fc2" not in each]) == len(blocks)
        assert set(found.values()) == {1}
    sizes = sum(torch.Size(each.dims).numel() for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
    assert sizes == joint.parameter_count()


def test_residual_streams(tmp_path: Path) -> None:
    graph, _ = exported(lambda: ResNet20(widths=(4, 6, 8)), torch.randn(4, 3, 16, 16), tmp_path, batch_norm="fold")
    found = uses(graph, "Conv")
    assert set(found.values()) == {1} and len(found) == 21 * 3


class Between(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.LazyLinear(2)
        self.between = between
        self(torch.zeros(1, 1, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.between(self.first(x))).flatten(1).relu())


def everything(x: Tensor) -> Tensor:
    """What leaves units apart."""
    x = F.gelu(F.leaky_relu(x, 0.2)) + F.silu(x) * 0.5 - x.clamp(-1, 1) / 3
    x = F.avg_pool2d(F.hardswish(F.elu(x)), 2, 1) + F.max_pool2d(x.tanh(), 2, 1)
    return torch.maximum(x, -x.abs().sqrt()) * x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    "between, times",
    [
        (everything, 1),
        (lambda x: x.softmax(1), 2),
        (lambda x: x / x.norm(dim=1, keepdim=True), 2),
        (lambda x: x + x.mean(1, keepdim=True), 2),
        (lambda x: F.interpolate(x, scale_factor=2.0), 2),  # not known to leave them apart
    ],
)
def test_through_what_selections_move(tmp_path: Path, between: Callable[[Tensor], Tensor], times: int) -> None:
    graph, _ = exported(lambda: Between(between), torch.randn(30, 1, 12, 12), tmp_path)
    found = uses(graph, "Conv")
    assert sorted(found.values()) == sorted([1, 1, 1, times, 1, 1])


def test_where_nothing_is_apart_a_networks_own_selections_stay(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(exporting, "move_selections", lambda _: pytest.fail("moved"))
    for options in ({"cross": True}, {"share": 1.0}):
        exported(lambda: Between(F.relu), torch.randn(30, 1, 12, 12), tmp_path, **options)
