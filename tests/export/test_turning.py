"""Weights of linear layers where quantisers look for them: joint files in 8 bits are as small as what they share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

import taskzip as tz
from taskzip.export.turning import turn_weights

WIDTH = 48


class Layer(nn.Module):
    """Plain attention, whose queries, keys and values one linear layer gives, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm1(x))))


class Transformer(nn.Module):
    """Of numbers or tokens, with layers of its own or of torch."""

    def __init__(self, layer: nn.Module, tokens: bool, classes: int) -> None:
        super().__init__()
        self.first = nn.Embedding(50, WIDTH) if tokens else nn.Linear(8, WIDTH)
        self.layer, self.out = layer, nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.first(x)))


def networks(kind: str) -> dict[str, nn.Module]:
    found = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        layer = Layer() if kind == "own" else nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        found[name] = Transformer(layer, kind == "own", 5 + seed).eval()
    return found


def inputs(kind: str, count: int) -> Tensor:
    return torch.randint(50, (count, 6)) if kind == "own" else torch.randn(count, 6, 8)


def quantised(path: Path) -> Path:
    logging.getLogger().setLevel(logging.ERROR)  # it advises to run its own optimisations before
    # Of 7 bits, for products of 8 overflow on processors without instructions for them.
    quantize_dynamic(path, path.with_suffix(".int8.onnx"), weight_type=QuantType.QInt8, reduce_range=True)
    logging.getLogger().setLevel(logging.WARNING)
    return path.with_suffix(".int8.onnx")


def tensors(path: Path) -> list[Any]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


def numbers(path: Path, *kinds: Any) -> int:
    """In matrices of these types."""
    return sum(tensor.size for tensor in tensors(path) if tensor.ndim > 1 and tensor.dtype in kinds)


def matrices(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.dim() > 1)


def run(path: Path, x: Tensor) -> list[Any]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})


@pytest.mark.parametrize("kind", ["own", "torch"])
@pytest.mark.parametrize("share, by_block", [(1.0, False), (0.5, True)])
def test_transformers_in_8_bits(tmp_path: Path, kind: str, share: float, by_block: bool) -> None:
    nets, x = networks(kind), inputs(kind, 16)
    tasks = [tz.Task(name, net, [inputs(kind, 40)]) for name, net in nets.items()]
    joint = tz.zip(tasks, share=share, progress=False).eval()
    path = tmp_path / "joint.onnx"
    tz.export_onnx(joint, path, x[:2], by_block=by_block)
    assert numbers(path, np.float32) == matrices(joint)
    small = quantised(path)
    assert numbers(small, np.int8, np.uint8) == matrices(joint)
    assert numbers(small, np.float32) == 0
    if share == 1.0:  # less than the two originals, and not much more than one
        alone = []
        for name in nets:
            tz.export_onnx(
                tz.zip(tasks, share=0.0, progress=False).eval(), tmp_path / "alone.onnx", x[:2], tasks=[name]
            )
            alone.append(quantised(tmp_path / "alone.onnx").stat().st_size)
        assert small.stat().st_size < 0.75 * sum(alone)
    for given, right in zip(run(small, x), run(path, x), strict=True):
        assert np.square(given - right).mean() < 0.1**2 * np.square(right).mean()


HEAD = '<ir_version: 10, opset_import: ["": 20]>\n'
WEIGHT = "<float[2, 2] w = {1, 2, 3, 4}, float[2] b = {5, 6}>"


@pytest.mark.parametrize(
    "body, left",
    [
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  z = Gemm <transB=1> (x, w, b)", 0),
        ("t = Transpose (w)  y = MatMul (x, t)  z = Gemm (x, t, b)", 0),
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  z = MatMul (x, w)", 1),
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  z = Gemm <transB=0> (x, w)", 1),
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  z = Gemm <transB=1> (w, w)", 1),
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  z = Gemm <transB=1> (x, w, w)", 1),
        ("t = Transpose <perm=[1, 0]> (w)  y = MatMul (x, t)  i = Constant <value = int64[2] {1, 0}> ()  "
         "z = Gather (w, i)", 1),
        ("y = Transpose <perm=[1, 0]> (w)  z = MatMul (x, y)", 1),
        ("y = MatMul (x, w)  z = Gemm <transB=1> (x, w, b)", 0),
    ],
)  # fmt: skip
def test_matrices_that_are_read_in_both_ways(body: str, left: int) -> None:
    text = f"agraph (float[2, 2] x) => (float[2, 2] y, float[2, 2] z) {WEIGHT} {{ {body} }}"
    model = onnx_ir.from_onnx_text(HEAD + text)
    wanted = ran(model)
    turn_weights(model)
    assert sum(node.op_type == "Transpose" for node in model.graph) == left
    for given, right in zip(ran(model), wanted, strict=True):
        np.testing.assert_array_equal(given, right)


def ran(model: onnx_ir.Model) -> list[Any]:
    file = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([[1, 10], [2, 20]], "f")})
