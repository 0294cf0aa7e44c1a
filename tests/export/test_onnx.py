"""One file for all tasks: the same outputs, every block once, what is common computed once, or one clear sentence."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.models import LeNet5, LeNet300, ResNet20


def zipped(nets: Sequence[nn.Module], inputs: Sequence[Tensor] | Tensor, share: Any = 1.0, **options: Any) -> Any:
    inputs = [inputs] * len(nets) if isinstance(inputs, Tensor) else inputs
    tasks = [tz.Task("abc"[i], net.eval(), [x]) for i, (net, x) in enumerate(zip(nets, inputs, strict=True))]
    return tz.zip(tasks, share=share, progress=False, compensate=False, **options)


def made(make: Callable[[], nn.Module], count: int = 2) -> list[nn.Module]:
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        nets.append(make())
    return nets


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    given = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, given, strict=True)}


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(given) == list(wanted)
    for name, right in wanted.items():
        right = right.detach()
        assert given[name].shape == right.shape and given[name].dtype == right.dtype
        assert (given[name] - right).abs().max() <= 1e-4 * right.abs().max()


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def weights(path: Path) -> int:
    """Numbers in all initializers and constants of floats, which no weight is in twice."""
    graph = onnx.load(path).graph
    constants = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    tensors = [onnx.numpy_helper.to_array(t) for t in [*graph.initializer, *constants]]
    return sum(t.size for t in tensors if t.dtype == np.float32)


def weighs_what_it_should(path: Path, joint: tz.ZippedModel, buffers: int = 0) -> None:
    assert weights(path) == joint.parameter_count() + buffers
    assert path.stat().st_size < 1.05 * 4 * (joint.parameter_count() + buffers) + 10_000  # the nodes themselves


def test_fully_shared_trunks_are_one(tmp_path: Path) -> None:
    joint = zipped(made(lambda: LeNet5(widths=(10, 20, 200)), 3), torch.randn(8, 1, 28, 28))
    joint.train()
    path = tmp_path / "joint.onnx"
    tz.export_onnx(joint, path, torch.randn(1, 1, 28, 28))
    assert joint["b"].fc1.training
    assert [p.name for p in tmp_path.iterdir()] == ["joint.onnx"]
    found = operators(path)
    assert found["Conv"] == 2 and found["MaxPool"] == 2 and found["Gemm"] + found["MatMul"] == 1 + 3
    assert found["Concat"] <= 1  # of the shape to which `flatten` brings
    assert path.stat().st_size < 1.05 * 4 * joint.parameter_count()
    weighs_what_it_should(path, joint)
    joint.eval()
    for samples in (1, 7):
        x = torch.randn(samples, 1, 28, 28)
        assert_same(run(path, input=x), joint(x))


def test_half_shared_weights_are_put_together_in_the_graph(tmp_path: Path) -> None:
    """In a process that knows nothing of torch, from another folder."""
    joint = zipped(made(LeNet300), torch.randn(8, 784), share=0.5).eval()
    path, x = tmp_path / "joint.onnx", torch.randn(7, 784)
    tz.export_onnx(joint, path, x[:2])
    assert operators(path)["Concat"] >= 8
    weighs_what_it_should(path, joint)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('joint.onnx')\n"
        "a, b = session.run(['a', 'b'], {'input': numpy.load('x.npy')})\n"
        "assert 'torch' not in sys.modules and 'taskzip' not in sys.modules\n"
        "numpy.savez('y.npz', a=a, b=b)\n"
    )
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=bare)
    with np.load(tmp_path / "y.npz") as y:
        assert_same({name: torch.from_numpy(y[name]) for name in y.files}, joint(x))


class Residual(nn.Module):
    """A residual stream, batch-norm, a normalised input, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 3)
        self.register_buffer("mean", torch.full((2, 1, 1), 0.3))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu(self.norm(self.first(x - self.mean)))
        x = F.relu(x + self.norm1(self.second(x)))
        logits = self.out(x.mean((2, 3)))
        return logits, {"chances": logits.softmax(1)}


@pytest.mark.parametrize("batch_norm, share", [("fold", 1.0), ("private", 0.5)])
def test_residual_streams_batch_norm_and_several_outputs(tmp_path: Path, batch_norm: Any, share: float) -> None:
    nets = made(Residual)
    for net in nets:
        for norm in (net.norm, net.norm1):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    joint = zipped(nets, torch.randn(20, 2, 5, 5), share=share, batch_norm=batch_norm).eval()
    path, x = tmp_path / "joint.onnx", torch.randn(3, 2, 5, 5)
    tz.export_onnx(joint, str(path), x)
    wanted = {}
    for name in joint:
        logits, others = joint[name](x)
        wanted |= {f"{name}.0": logits, f"{name}.1.chances": others["chances"]}
    assert_same(run(path, input=x), wanted)
    if batch_norm == "fold":
        assert operators(path)["Conv"] == 2 and operators(path)["Sub"] == 1
        weighs_what_it_should(path, joint, buffers=2)
    else:
        assert weights(path) <= joint.parameter_count() + 2 + 4 * 12 + 10


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Answer)


class TwoInputs(nn.Module):
    """Keyword arguments, a dataclass, and a middle layer that is used twice."""

    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(inputs, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.again = self.middle

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Answer:
        x = self.first(x).relu()
        x = self.again(self.middle(x).relu()).relu()
        return Answer(self.head(x if shift is None else x + shift))


def test_keywords_tied_weights_and_one_size_of_batch(tmp_path: Path) -> None:
    joint = zipped(made(TwoInputs), torch.randn(20, 4)).eval()
    path = tmp_path / "joint.onnx"
    inputs = {"x": torch.randn(5, 4), "shift": torch.randn(8)}
    tz.export_onnx(joint, path, inputs, dynamic_batch=False)
    assert_same(run(path, **inputs), {f"{name}.logits": joint[name](**inputs).logits for name in joint})
    assert operators(path)["Gemm"] == 3 + 2
    weighs_what_it_should(path, joint)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 5


def test_tasks_with_inputs_of_their_own(tmp_path: Path) -> None:
    x, y, z = torch.randn(20, 4), torch.randn(20, 6), torch.randn(20, 4)
    joint = zipped([TwoInputs(4), TwoInputs(6), TwoInputs(4)], [x, y, z], share=0.5).eval()
    path = tmp_path / "joint.onnx"
    tz.export_onnx(joint, path, {"a": x[:3], "b": (y[:2], torch.randn(8)), "c": {"x": z[:4]}})
    given = {"input.a": x[:1], "input.b.0": y[:7], "input.b.1": torch.randn(8), "input.c.x": z[:2]}
    wanted = {"a": joint["a"](x[:1]), "b": joint["b"](y[:7], given["input.b.1"]), "c": joint["c"](x=z[:2])}
    assert_same(run(path, **given), {f"{name}.logits": answer.logits for name, answer in wanted.items()})
    tz.export_onnx(joint, path, {"c": z, "a": x}, tasks=["c", "a"])
    found = run(path, **{"input.c": z, "input.a": x})
    assert_same(found, {"c.logits": joint["c"](z).logits, "a.logits": joint["a"](x).logits})


class Common(nn.Module):
    """Outputs that are an input, a weight, a number, and the same for all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.first(x).relu()
        return features, x, self.first.bias, features.mean(), self.out(features)


def test_outputs_that_are_common_or_not_computed(tmp_path: Path, caplog: Any) -> None:
    a, b = made(Common)
    b.first = a.first
    joint = tz.ZippedModel({"a": a, "b": b}).eval()
    path, x = tmp_path / "joint.onnx", torch.randn(3, 4)
    tz.export_onnx(joint, path, x)
    assert not [record for record in caplog.records if record.levelno > 20]
    wanted = {f"{name}.{i}": y for name in joint for i, y in enumerate(joint[name](x))}
    assert_same(run(path, input=x), wanted)
    weighs_what_it_should(path, joint)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_other_precisions(tmp_path: Path, kind: torch.dtype) -> None:
    joint = zipped(made(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(20, 4))
    path, x = tmp_path / "joint.onnx", torch.randn(3, 4).to(kind)
    tz.export_onnx(joint.to(kind), path, x)
    assert run(path, input=x)["a"].dtype == kind


def test_weights_in_another_order_of_memory(tmp_path: Path) -> None:
    """Convolutions are faster on a CPU with channels last."""
    joint = zipped(made(Residual), torch.randn(20, 2, 5, 5), share=0.5).to(memory_format=torch.channels_last).eval()
    joint["a"].out.weight = nn.Parameter(torch.randn(6, 3).t())
    path, x = tmp_path / "joint.onnx", torch.randn(3, 2, 5, 5)
    tz.export_onnx(joint, path, x)
    assert_same({"a.0": run(path, input=x)["a.0"]}, {"a.0": joint["a"](x)[0]})


class Writing(nn.Module):
    """Writes into what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace, self.out = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inplace(x))


def test_a_network_that_writes_into_its_input_spoils_that_of_no_other(tmp_path: Path) -> None:
    joint = tz.ZippedModel({"a": Writing(), "b": nn.Linear(4, 2)}).eval()
    path, x = tmp_path / "joint.onnx", torch.randn(3, 4)
    kept = x.clone()
    tz.export_onnx(joint, path, x)
    assert torch.equal(x, kept)
    assert_same(run(path, input=x), {name: joint[name](x.clone()) for name in joint})


def test_tensors_inside_of_arguments(tmp_path: Path) -> None:
    class Summing(nn.Linear):
        def forward(self, parts: list[Tensor], scale: dict[str, float]) -> Tensor:  # type: ignore[override]
            return super().forward(parts[0] + parts[1]) * scale["by"]

    joint = tz.ZippedModel({"a": Summing(4, 2)}).eval()
    path, parts = tmp_path / "joint.onnx", [torch.randn(3, 4), torch.randn(3, 4)]
    tz.export_onnx(joint, path, (parts, {"by": 2.0}))
    parts = [torch.randn(5, 4), torch.randn(5, 4)]
    given = run(path, **{"input.0.0": parts[0], "input.0.1": parts[1]})
    assert_same(given, {"a": joint["a"](parts, {"by": 2.0})})


def test_deep_narrow_networks_weigh_what_they_should(tmp_path: Path) -> None:
    joint = zipped(made(ResNet20, 3), torch.randn(8, 3, 16, 16), share=0.5, cross=False, batch_norm="fold")
    path = tmp_path / "joint.onnx"
    tz.export_onnx(joint, path, torch.randn(1, 3, 16, 16))
    buffers = sum(b.numel() for b in {b for net in joint.tasks.values() for b in net.buffers()})
    assert joint.parameter_count() > 300_000
    assert path.stat().st_size < 1.05 * 4 * (joint.parameter_count() + buffers)


class Unrolled(nn.Module):
    """Hundreds of operators between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(300):
            x = x + 0.01 * torch.tanh(x)
        return self.out(torch.relu(self.second(x)))


def test_hundreds_of_operators_between_two_layers(tmp_path: Path) -> None:
    joint = zipped(made(Unrolled), torch.randn(20, 4), share=0.5, cross=False).eval()
    path, x = tmp_path / "joint.onnx", torch.randn(3, 4)
    tz.export_onnx(joint, path, x, dynamic_batch=False)
    assert_same(run(path, input=x), joint(x))


# --- one clear sentence ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tz.ZippedModel:
    return zipped(made(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(20, 4))


def refused(tmp_path: Path, error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message) as found:
        tz.export_onnx(*args, **kwargs)
    assert "\n" not in str(found.value)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


@pytest.mark.parametrize(
    "error, message, options",
    [
        (tz.InputError, "no task 'x': this network has a, b", {"tasks": ["a", "x"]}),
        (tz.InputError, "no task was chosen", {"tasks": []}),
        (tz.InputError, "without a tensor", {"example": "images"}),
        (tz.InputError, "example has inputs for a, but the tasks are a, b", {"example": {"a": torch.randn(2, 4)}}),
        (tz.InputError, r"does not fit task 'a': Sequential does not take input of float32\[2, 5\]",
         {"example": torch.randn(2, 5)}),
        (tz.ExportError, "task 'a' gives NaN or infinite values", {"example": torch.full((2, 4), torch.nan)}),
        (tz.ExportError, "there is no folder", {"path": "no/such/folder/joint.onnx"}),
        (tz.ExportError, "it is a folder", {"path": "."}),
        (tz.InputError, "tasks is a list of their names, not 5", {"tasks": 5}),
        (tz.ExportError, "cannot write .*embedded null", {"path": "a\0b"}),
        (tz.ExportError, "it is a device and no file", {"path": "/dev/null"}),
        (tz.ExportError, "File name too long", {"path": "n" * 300}),
        (tz.InputError, "example is empty: input has no sample", {"example": torch.randn(0, 4)}),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, small: Any, error: Any, message: str, options: dict[str, Any]) -> None:
    path = tmp_path / options.pop("path", "joint.onnx")
    refused(tmp_path, error, message, small, path, options.pop("example", torch.randn(2, 4)), **options)


def test_a_folder_that_is_not_writable(tmp_path: Path, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # to root, which may run the tests, every folder is
    refused(tmp_path, tz.ExportError, "folder .* is not writable", small, tmp_path / "a.onnx", torch.randn(2, 4))


def test_a_network_that_is_not_zipped(tmp_path: Path) -> None:
    message = "is a joint network, as tz.zip gives it, not a Linear"
    refused(tmp_path, tz.InputError, message, nn.Linear(4, 2), tmp_path / "a.onnx", torch.randn(2, 4))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_packages_that_are_not_there(tmp_path: Path, small: Any, package: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"writing ONNX needs {package}, .* pip install 'taskzip\[onnx\]'"
    refused(tmp_path, tz.ExportError, message, small, tmp_path / "joint.onnx", torch.randn(2, 4))


class Choosing(nn.Module):
    """Data decide what happens."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.out(x)
        return self.out(-x)


def test_a_network_that_cannot_be_followed(tmp_path: Path, capfd: Any, recwarn: Any) -> None:
    joint = tz.ZippedModel({"good": nn.Linear(4, 2), "bad": Choosing()})
    message = r"task 'bad' cannot be exported: Choosing: .*, at \"if x.sum\(\) > 0:\" \(.*test_onnx.py:\d+\)"
    refused(tmp_path, tz.ExportError, message, joint, tmp_path / "joint.onnx", torch.randn(2, 4))
    assert not capfd.readouterr().err


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("weights")


class OneSample(nn.Linear):
    """One sample is another thing than several."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] == 1 else super().forward(-x)


class TwiceTheSame(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"b.c": y, "b": {"c": 2 * y}}


class Narrow(nn.Linear):
    """Of a precision for which ONNX Runtime has hardly any operators."""

    def __init__(self) -> None:
        super().__init__(4, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16())


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (Failing(), tz.InputError, r"not fit task 'bad'.*KeyError: 'weights', at .raise KeyError.*test_onnx.py:\d+\)"),
        (OneSample(4, 2), tz.ExportError, r"task 'bad' .* with batches of 1: .* alone it can: dynamic_batch=False"),
        (TwiceTheSame(4, 2), tz.InputError, r"'bad.b.c' would be the name of two outputs"),
        (Narrow(), tz.ExportError, r"task 'bad' .*ONNX Runtime, .* for bfloat16 \(take zipped.float\(\)\)"),
    ],
)
def test_networks_that_cannot_be(tmp_path: Path, bad: Any, error: Any, message: str, capfd: Any) -> None:
    joint = tz.ZippedModel({"good": nn.Linear(4, 2), "bad": bad}).eval()
    refused(tmp_path, error, message, joint, tmp_path / "joint.onnx", torch.randn(2, 4))
    assert not capfd.readouterr().err


class Unknown(nn.Module):
    """ONNX has no such function."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return torch.special.bessel_j0(x)


class OneSize(nn.Module):
    """Made for one size of batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 2).sum(1)


def test_operators_that_onnx_does_not_have_and_one_size_of_batch(tmp_path: Path) -> None:
    joint = tz.ZippedModel({"good": nn.Linear(4, 2), "bad": Unknown()})
    message = (
        r"task 'bad' cannot be exported: Unknown: No ONNX function found for .*bessel_j0.*, "
        r"at \"return torch.special.bessel_j0\(x\)\" \(.*test_onnx.py:\d+\)\.$"
    )
    refused(tmp_path, tz.ExportError, message, joint, tmp_path / "joint.onnx", torch.randn(2, 4))
    joint = tz.ZippedModel({"good": nn.Linear(4, 2), "bad": OneSize()})
    message = "task 'bad' cannot be exported: OneSize: .* For the example's size of batch alone it can: dynamic_batch"
    refused(tmp_path, tz.ExportError, message, joint, tmp_path / "joint.onnx", torch.randn(2, 4))
    tz.export_onnx(joint, tmp_path / "joint.onnx", torch.randn(2, 4), dynamic_batch=False)


@pytest.mark.usefixtures("task_b_gives_more")
def test_a_file_that_gives_other_outputs(tmp_path: Path, small: Any) -> None:
    refused(
        tmp_path,
        tz.ExportError,
        "task 'b' cannot be exported: .* 'b' differs",
        small,
        tmp_path / "joint.onnx",
        torch.randn(2, 4),
    )


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, small: Any) -> None:
    (tmp_path / "joint.onnx").write_bytes(b"old")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, kept[1]))  # the nearest thing to a full disk
    try:
        with pytest.raises(tz.ExportError, match=r"cannot write .*: File too large"):
            tz.export_onnx(small, tmp_path / "joint.onnx", torch.randn(2, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
