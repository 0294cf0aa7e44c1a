"""Axes of any size besides the batch: what was exported runs on other sizes, or one clear sentence says which axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import taskzip as tz
from taskzip.export.dynamic import chosen_axes, one_by_one, other_shapes, traceable
from taskzip.export.example import Example


class Encoder(nn.Module):
    """Tokens, plain attention, and a mean over those that a mask leaves."""

    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(20, width), nn.Linear(width, 3 * width)
        self.proj, self.out = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None])
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return {"logits": self.out((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))}


class OfTorch(nn.Module):
    """The layers of torch."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x).mean(1))


class Convolutions(nn.Module):
    """Images of any size, and one output of the same size."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.out, self.up = nn.Linear(6, classes), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        features = self.second(x).relu()
        return self.out(features.mean((2, 3))), F.interpolate(self.up(features), x.shape[2:], mode="nearest")


class Mean(nn.Linear):
    """Over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def zipped(make: Any, data: Any, share: float = 0.5, **options: Any) -> tz.ZippedModel:
    torch.manual_seed(0)
    tasks = [tz.Task(name, make(3 + i).eval(), [data], **options) for i, name in enumerate("ab")]
    return tz.zip(tasks, share=share, progress=False, compensate=False).eval()


def tokens(samples: int, length: int) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(1, length + 1, (samples, 1))).float()
    return {"ids": torch.randint(20, (samples, length)), "mask": mask}


@pytest.fixture(scope="module")
def encoders() -> tz.ZippedModel:
    return zipped(Encoder, tokens(16, 6), forward=lambda net, given: net(**given)["logits"])


def run(path: Path, **inputs: Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def assert_same(given: Any, wanted: Any) -> None:
    for value, right in zip(given, wanted, strict=True):
        assert value.shape == right.shape
        assert np.abs(np.asarray(value) - right.detach().numpy()).max() <= 1e-4 * right.abs().max()


def axes(path: Path) -> list[list[Any]]:
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input]


@pytest.mark.parametrize("by_block", [False, True])
def test_sequences_of_any_length(tmp_path: Path, encoders: Any, by_block: bool) -> None:
    path, batch, length = tmp_path / "joint.onnx", Dim("batch"), Dim("length", min=2, max=40)
    shapes = {name: {0: batch, 1: length} for name in ("ids", "mask")}
    tz.export_onnx(encoders, path, tokens(1, 6), by_block=by_block, dynamic_shapes=shapes)
    assert axes(path) == [["batch", "length"]] * 2
    for samples, many in ((1, 3), (4, 17), (2, 40)):
        given = tokens(samples, many)
        assert_same(run(path, **given), [encoders[name](**given)["logits"] for name in encoders])


@pytest.mark.parametrize("by_block", [False, True])
def test_layers_of_torch(tmp_path: Path, by_block: bool) -> None:
    joint, path = zipped(OfTorch, torch.randn(16, 5, 8)), tmp_path / "joint.onnx"
    shapes = {0: Dim("batch"), 1: Dim("length", max=64)}
    tz.export_onnx(joint, path, torch.randn(2, 5, 8), by_block=by_block, dynamic_shapes=shapes)
    for shape in ((1, 1, 8), (3, 11, 8)):
        x = torch.randn(shape)
        assert_same(run(path, input=x), [joint[name](x) for name in joint])


def test_images_of_any_size_and_one_for_each_task(tmp_path: Path) -> None:
    joint, path = zipped(Convolutions, torch.randn(8, 2, 9, 9)), tmp_path / "joint.onnx"
    example = {name: torch.randn(2, 2, 8, 8) for name in "ab"}
    shapes = {
        "a": {2: Dim("height", min=4), 3: Dim("width", min=4)},
        "b": ({0: Dim("batch"), 2: Dim("side", min=3, max=20), 3: Dim.AUTO},),
    }
    tz.export_onnx(joint, path, example, by_block=True, dynamic_shapes=shapes)
    given = {"input.a": torch.randn(2, 2, 11, 6), "input.b": torch.randn(5, 2, 7, 13)}
    assert_same(run(path, **given), [*joint["a"](given["input.a"]), *joint["b"](given["input.b"])])
    assert axes(path)[0] == [2, 2, "height", "width"]
    graph = tz.export_graph(joint, example, dynamic_shapes=shapes)
    assert_same(graph(*given.values()).values(), [*joint["a"](given["input.a"]), *joint["b"](given["input.b"])])


def test_dynamic_shapes_take_the_place_of_the_batch(encoders: Any) -> None:
    given, length = tokens(3, 6), Dim("length")
    graph = tz.export_graph(encoders, given, tasks=["b"], dynamic_shapes={"ids": {1: length}, "mask": {1: length}})
    sizes = [node.meta["val"].shape for node in graph.graph.find_nodes(op="placeholder")]
    assert all(size[0] == 3 and isinstance(size[1], torch.SymInt) for size in sizes)
    more = tokens(3, 13)
    assert_same(graph(**more).values(), [encoders["b"](**more)["logits"]])


def test_executorch_within_bounds(tmp_path: Path) -> None:
    runtime = pytest.importorskip("executorch.runtime")
    joint, path = tz.ZippedModel({"a": Mean(8, 3), "b": Mean(8, 2)}).eval(), tmp_path / "joint.pte"
    tz.export_executorch(joint, path, torch.randn(2, 5, 8), dynamic_shapes={1: Dim("length", min=2, max=12)})
    x = torch.randn(2, 12, 8)
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    assert_same(method.execute([x]), [joint[name](x) for name in joint])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dynamic_shapes": {1: Dim("length")}}, r"no largest size for axis 1 of input \('length'\)"),
        ({"dynamic_shapes": {1: Dim.AUTO}}, r"no largest size for axis 1 of input, .* give Dim\(\.\.\., max"),
        ({"dynamic_shapes": {1: Dim("l", max=9)}, "max_batch": 4}, "takes the place of max_batch"),
    ],
)
def test_executorch_without_bounds(tmp_path: Path, options: Any, message: str) -> None:
    pytest.importorskip("executorch")
    joint = tz.ZippedModel({"a": OfTorch()}).eval()
    with pytest.raises(tz.InputError, match=message):
        tz.export_executorch(joint, tmp_path / "joint.pte", torch.randn(2, 5, 8), **options)


class Places(nn.Module):
    """As many places as were learned."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.out = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.places).mean(1)


class Long(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 4:] if x.shape[1] > 4 else x)


class Strided(nn.Module):
    """For which torch wants a least length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).contiguous().mean(1)


class Single(nn.Linear):
    """One is another thing than several, and nothing in the graph tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.shape[1] == 1 else x)


@pytest.mark.parametrize(
    "bad, dims, message",
    [
        (
            Places(),
            {0: Dim("batch"), 1: Dim("length")},
            r"sizes only \(length = 6\).* axis 1 of input \('length'\) out of",
        ),
        (Places(), {0: Dim("batch"), 1: Dim.DYNAMIC}, r"constant \(6\)\).* leave axis 1 of input out of"),
        (Long(8, 3), {1: Dim("length")}, r"length = Dim\('length', min=6\)\).* or give its Dim the min and max"),
        (Strided(), {1: Dim("length")}, r"\(Not all values of length in .* guard .*\(-1\) \+ length.* axis 1 of input"),
        (Single(8, 3), {1: Dim("length")}, r"with 1 along axis 1 of input: 'bad' .* give its Dim the min"),
    ],
)
def test_axes_that_cannot_change(bad: nn.Module, dims: Any, message: str) -> None:
    joint = tz.ZippedModel({"good": nn.Linear(8, 2), "bad": bad}).eval()
    with pytest.raises(
        tz.ExportError, match=rf"task 'bad' cannot be exported: {type(bad).__name__}: .*{message}"
    ) as found:
        tz.export_graph(joint, torch.randn(2, 6, 8), dynamic_shapes=dims)
    assert "\n" not in str(found.value)


X, Y = torch.randn(3, 4), torch.randn(3, 1)
N, L = Dim("n"), Dim("l", min=2, max=9)


@pytest.mark.parametrize(
    "example, shapes, wanted",
    [
        (X, {1: L}, {"input": {1: L}}),
        (X, (None, L), {"input": {1: L}}),
        (X, ({0: N, 1: None},), {"input": {0: N}}),
        (X, {"x": (N, L)}, {"input": {0: N, 1: L}}),
        (X, ((N, 4),), {"input": {0: N}}),
        (X, {}, {}),
        ((X, 2, Y), ({1: L}, None, {0: Dim.STATIC}), {"input.0": {1: L}}),
        ((X, [Y, {"y": X}]), (None, [None, {"y": {1: L}}]), {"input.1.1.y": {1: L}}),
        ({"x": X, "y": Y}, {"x": {0: N}, "y": {0: N}}, {"x": {0: N}, "y": {0: N}}),
        ({"x": X, "y": Y}, {"y": {0: Dim.AUTO}}, {"y": {0: Dim.AUTO}}),
        ({"a": X, "b": (Y, X)}, {"b": ({}, {1: 2 * N})}, {"input.b.1": {1: 2 * N}}),
    ],
)  # fmt: skip
def test_forms(example: Any, shapes: Any, wanted: Any) -> None:
    found = chosen_axes(Example(example, ["a", "b"], X.device), shapes)
    assert str(found) == str(wanted)


@pytest.mark.parametrize(
    "example, shapes, message",
    [
        (X, {2: L}, r"axis 2 for input, which is of \[3, 4\]"),
        (X, {1: "l"}, "'l' for axis 1 of input, which is no Dim"),
        (X, {1: 7}, "7 for axis 1 of input, which is no Dim"),
        (X, L, "not a dict of axes"),
        (X, {1: Dim("l", min=5)}, "input has 4 along axis 1, and 'l' is of 5 to int_oo"),
        ((X, Y), ({1: L},), "not in the form of the example, with 2 parts"),
        ((X, Y), {"x": {1: L}}, "dynamic_shapes has 'x', but the example has 0, 1"),
        ({"x": X}, {"z": {1: L}}, "dynamic_shapes has 'z', but the example has x"),
        ({"a": X, "b": X}, {"c": {1: L}}, "dynamic_shapes has 'c', but the example has a, b"),
        ({"a": X, "b": (X,)}, {"b": (L, L)}, "dynamic_shapes b is"),
    ],
)
def test_other_forms(example: Any, shapes: Any, message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        chosen_axes(Example(example, ["a", "b"], X.device), shapes)


def test_sizes_that_are_tried() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum() + y.sum()

    example = Example((torch.randn(3, 4), torch.randn(1, 8)), ["a"], X.device)
    half = Dim("half", min=3, max=6)
    axes = chosen_axes(example, ({0: N, 1: half}, {1: 2 * half}))
    program = torch.export.export(Sum(), tuple(traceable(example, axes).values()), dynamic_shapes=tuple(axes.values()))
    assert other_shapes(program, list(axes)) == [
        {"input.0": {0: 1}}, {"input.0": {0: 4}}, {"input.0": {0: 6}},
        {"input.0": {1: 3}, "input.1": {1: 6}}, {"input.0": {1: 5}, "input.1": {1: 10}},
        {"input.0": {1: 6}, "input.1": {1: 12}},
    ]  # fmt: skip
    assert [list(each) for each in one_by_one(axes)] == [["input.0"], ["input.0", "input.1"]]
    assert traceable(example, {"input.1": {0: N}})["input.1"].shape == (2, 8)
