"""Layers computed block by block: the same outputs, and no runtime that makes copies of what is shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.export.splitting import split_layers
from taskzip.models import LeNet5


class Residual(nn.Module):
    """A residual stream with a layer that reads it in the order of another, batch-norm, no biases."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.third, self.out = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(x + self.norm1(self.second(x)))
        return self.out((x + self.third(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers that read three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 10, bias=False)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).relu()).relu())


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "LeNet5": (lambda _: LeNet5(widths=(8, 12, 40)), (1, 28, 28), {}),
    "residual": (lambda _: Residual(), (2, 5, 5), {}),
    "residual, two widths": (lambda i: Residual(8 + 2 * i), (2, 5, 5), {}),
    "residual, folded": (lambda _: Residual(), (2, 5, 5), {"batch_norm": "fold"}),
    "tokens": (lambda _: Tokens(), (3, 4), {}),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_shared_weights_stay_shared_in_the_runtime(tmp_path: Path, network: str, share: float) -> None:
    make, shape, options = NETWORKS[network]
    tasks = []
    for i in range(3):
        torch.manual_seed(i)
        tasks.append(tz.Task("abc"[i], with_statistics(make(i)).eval(), [torch.randn(20, *shape)]))
    joint = tz.zip(tasks, share=share, progress=False, compensate=False, **options)
    path, example = tmp_path / "joint.onnx", torch.randn(2, *shape)
    tz.export_onnx(joint, path, example, by_block=True)
    x = torch.randn(5, *shape)
    wanted = [joint[name](x).detach().numpy() for name in joint]
    for each in (path, optimized(path)):
        found = onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})
        for given, right in zip(found, wanted, strict=True):
            assert np.abs(given - right).max() <= 1e-4 * np.abs(right).max()
    assert weights(path) == weights(optimized(path)) == matrices(joint)


def test_a_task_with_fewer_inputs_reads_a_part_of_a_block(tmp_path: Path) -> None:
    x, y = torch.randn(20, 6), torch.randn(20, 4)
    nets = [nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 2)) for inputs in (6, 4)]
    tasks = [tz.Task(name, net.eval(), [each]) for name, net, each in zip("ab", nets, (x, y), strict=True)]
    joint = tz.zip(tasks, share=0.5, progress=False, compensate=False)
    path = tmp_path / "joint.onnx"
    tz.export_onnx(joint, path, {"a": x[:2], "b": y[:2]}, by_block=True)
    assert weights(path) == matrices(joint)
    assert weights(optimized(path)) == matrices(joint) + 4 * 4  # the part, of which the runtime makes a copy


def with_statistics(network: nn.Module) -> nn.Module:
    for norm in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return network


def matrices(joint: tz.ZippedModel) -> int:
    return sum(p.numel() for p in joint.parameters() if p.dim() > 1)


def optimized(path: Path) -> Path:
    """What the runtime makes of a file where it folds constants; batch-norm too would be folded into shared kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ConvBNFusion")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return path.with_suffix(".optimized.onnx")


def weights(path: Path) -> int:
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return sum(tensor.size for tensor in tensors if tensor.dtype == np.float32 and tensor.ndim > 1)


def test_without_it_the_runtime_makes_copies(tmp_path: Path) -> None:
    tasks = [tz.Task(name, Tokens().eval(), [torch.randn(20, 3, 4)]) for name in "ab"]
    joint = tz.zip(tasks, share=0.5, progress=False, compensate=False)
    tz.export_onnx(joint, tmp_path / "joint.onnx", torch.randn(2, 3, 4))
    assert weights(optimized(tmp_path / "joint.onnx")) > matrices(joint)


HEAD = '<ir_version: 10, opset_import: ["": 20]>\n'


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm <transB=1, alpha=2.0> (x, w)",
        "y = Gemm (x, w)",
        "half = Constant <value = float {0.5}> ()  v = Mul (w, half)  y = Gemm <transB=1> (x, v)",
        "half = Constant <value = float {0.5}> ()  v = Mul (w, half)  u = Concat <axis=0> (v, w)  "
        "y = Gemm <transB=1> (x, u)",
        "y = MatMul (x, w)",
    ],
)
def test_other_layers_are_left_alone(body: str) -> None:
    text = f"agraph (float[N, 2] x) => (float[N, M] y) <float[2, 2] w = {{1, 2, 3, 4}}> {{ {body} }}"
    model = onnx_ir.from_onnx_text(HEAD + text)
    before = [(node.op_type, len(node.inputs)) for node in model.graph]
    split_layers(model)
    assert [(node.op_type, len(node.inputs)) for node in model.graph] == before


def test_a_bias_of_other_parts_than_the_weight(tmp_path: Path) -> None:
    """And an order that is computed when it runs leaves the layer as it is."""
    text = """agraph (float[N, 2] x, int64[2] order) => (float[N, 2] y, float[N, 2] z)
    <float[1, 2] v = {1, 2}, float[1, 2] w = {3, 4}, float[2] b = {5, 6}> {
        u = Concat <axis=0> (v, w)
        y = Gemm <transB=1> (x, u, b)
        t = Gather <axis=0> (u, order)
        z = Gemm <transB=1> (x, t, b)
    }"""
    model = onnx_ir.from_onnx_text(HEAD + text)
    inputs = {"x": np.array([[1, 10], [2, 20]], "f"), "order": np.array([1, 0])}
    wanted = ran(model, inputs)
    split_layers(model)
    assert sum(node.op_type == "Gemm" for node in model.graph) == 3
    for given, right in zip(ran(model, inputs), wanted, strict=True):
        np.testing.assert_allclose(given, right)


def ran(model: onnx_ir.Model, inputs: dict[str, Any]) -> list[Any]:
    file = onnx_ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, inputs)


class OwnWeights(nn.Module):
    """A layer whose weight the network itself puts together, and not as blocks are."""

    def __init__(self, weight: Callable[[Tensor], Tensor], convolution: bool = False) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.randn(8, 4, 1, 2) if convolution else torch.randn(8, 4))
        self.weight, self.convolution = weight, convolution

    def forward(self, x: Tensor) -> Tensor:
        return (F.conv2d if self.convolution else F.linear)(x, self.weight(self.block))


def chosen(*units: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w.index_select(0, torch.tensor(units))


@pytest.mark.parametrize(
    "weight, shape",
    [
        (chosen(0, 2, 5), (4,)),
        (chosen(0, 0, 1, 1, 2, 2, 3, 3), (4,)),
        (chosen(7, 6, 5, 4, 3, 2, 1, 0), (4,)),
        (lambda w: torch.cat([w, w + 1], -2), (4,)),
        (lambda w: torch.cat([torch.cat([w[:3], w[3:]]), w], 1), (8,)),
        (lambda w: torch.cat([w, w], 2), (4, 5, 5)),
        (lambda w: torch.cat([w, w], -1), (4, 5, 5)),
        (lambda w: torch.cat([w, w], -4), (4, 5, 5)),
        (lambda w: torch.cat([w, 2 * w], 1), (8, 5, 5)),
    ],
)
def test_weights_that_are_put_together_otherwise(
    tmp_path: Path, weight: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    joint = tz.ZippedModel({"a": OwnWeights(weight, len(shape) > 1)}).eval()
    tz.export_onnx(joint, tmp_path / "joint.onnx", torch.randn(2, *shape), by_block=True)  # compares the outputs
