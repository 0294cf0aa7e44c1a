"""One file with a method for each task and one for all: the same outputs, every block once, or one clear sentence."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.export import executorch as exporting
from taskzip.export.quiet import quietly

pytest.importorskip("executorch")


def zipped(nets: Sequence[nn.Module], inputs: Sequence[Tensor] | Tensor, share: Any = 1.0, **options: Any) -> Any:
    inputs = [inputs] * len(nets) if isinstance(inputs, Tensor) else inputs
    tasks = [tz.Task("abc"[i], net.eval(), [x]) for i, (net, x) in enumerate(zip(nets, inputs, strict=True))]
    return tz.zip(tasks, share=share, progress=False, compensate=False, **options).eval()


def made(make: Callable[[], nn.Module], count: int = 2) -> list[nn.Module]:
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        nets.append(make())
    return nets


def run(path: Path, method: str, *inputs: Tensor) -> list[Tensor]:
    with quietly():
        from executorch.runtime import Runtime
    program = Runtime.get().load_program(path)
    return list(program.load_method(method).execute(inputs))


def assert_same(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for value, right in zip(given, wanted, strict=True):
        right = right.detach()
        assert value.shape == right.shape and value.dtype == right.dtype
        assert (value - right).abs().max() <= 1e-4 * right.abs().max()


def weights(path: Path) -> int:
    """Numbers that XNNPACK reads from the file, without the zeros that are the bias of layers without one."""
    with quietly():
        from executorch.exir._serialize._program import deserialize_pte_binary
    return sum(len(data) for data in deserialize_pte_binary(path.read_bytes()).named_data.buffers if any(data)) // 4


class Small(nn.Module):
    """Convolutions and linear layers, as in the demonstration."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 4, 12), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def test_fully_shared_trunks_are_one(tmp_path: Path) -> None:
    """In a process that knows nothing of taskzip, from another folder."""
    nets = made(Small)
    joint, path, x = zipped(nets, torch.randn(8, 1, 8, 8)), tmp_path / "joint.pte", torch.randn(2, 1, 8, 8)
    joint.train()
    assert tz.export_executorch(joint, path, x) == {"a": "a", "b": "b"}
    assert joint["b"].fc1.training
    assert [p.name for p in tmp_path.iterdir()] == ["joint.pte"]
    assert weights(path) == joint.parameter_count()
    assert path.stat().st_size < 4 * joint.parameter_count() + 16_000  # three descriptions of the network
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "from executorch.runtime import Runtime\n"
        "program = Runtime.get().load_program('joint.pte')\n"
        "x = torch.load('x.pt')\n"
        "torch.save([program.load_method(name).execute([x]) for name in ('a', 'b', 'forward')], 'y.pt')\n"
        "assert 'taskzip' not in sys.modules\n"
    )
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=bare, capture_output=True)
    joint.eval()
    a, b, both = torch.load(tmp_path / "y.pt")
    assert_same([*a, *b, *both], [joint["a"](x), joint["b"](x), joint["a"](x), joint["b"](x)])


@pytest.fixture(scope="module")
def half() -> tz.ZippedModel:
    return zipped([*made(Small, 1), Small(width=6, classes=2)], torch.randn(8, 1, 8, 8), share=0.5)


def test_partly_shared_layers_from_blocks_or_weights(tmp_path: Path, half: Any, monkeypatch: Any) -> None:
    """And of any size of batch, in pieces."""
    x = torch.randn(1, 1, 8, 8)
    blocks, whole = tmp_path / "blocks.pte", tmp_path / "whole.pte"
    monkeypatch.setattr(exporting, "PIECE", 1000)
    tz.export_executorch(half, blocks, x, max_batch=4)
    monkeypatch.undo()
    tz.export_executorch(half, whole, x, partly_shared="weights")
    assert weights(blocks) == half.parameter_count()
    dense = sum(p.numel() for name in half for p in half.materialize(name).parameters())
    assert weights(whole) == dense > weights(blocks)
    for samples in (1, 3, 4):
        x = torch.randn(samples, 1, 8, 8)
        wanted = [half["a"](x), half["b"](x)]
        assert_same(run(blocks, "forward", x), wanted)
        assert_same([*run(blocks, "a", x), *run(blocks, "b", x)], wanted)
    assert_same(run(whole, "forward", x[:1]), [half["a"](x[:1]), half["b"](x[:1])])


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


@pytest.mark.parametrize("batch_norm, share, beyond", [("private", 1.0, 2 + 3 * 12), ("fold", 0.5, 2)])
def test_residual_streams_and_batch_norm(tmp_path: Path, batch_norm: Any, share: float, beyond: int) -> None:
    nets = made(Residual)
    for net in nets:
        for norm in (net.norm, net.norm1):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    joint = zipped(nets, torch.randn(20, 2, 5, 5), share=share, batch_norm=batch_norm)
    path, x = tmp_path / "joint.pte", torch.randn(3, 2, 5, 5)
    tz.export_executorch(joint, str(path), x)
    answers = {name: [joint[name](x)[0], joint[name](x)[1]["chances"]] for name in joint}
    assert_same(run(path, "b", x), answers["b"])
    assert_same(run(path, "forward", x), [*answers["a"], *answers["b"]])
    assert weights(path) <= joint.parameter_count() + beyond


class Several(nn.Module):
    """Keyword arguments, and outputs that are an input, a weight, a number, and the same for all tasks."""

    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(inputs, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, ...]:
        features = self.first(x).relu()
        return features, x, self.first.bias, features.mean(), self.out(features if shift is None else features + shift)


def test_outputs_that_are_common_or_not_computed(tmp_path: Path, caplog: Any) -> None:
    a, b = made(Several)
    b.first = a.first
    joint, path, x = tz.ZippedModel({"a": a, "b": b}).eval(), tmp_path / "joint.pte", torch.randn(3, 4)
    tz.export_executorch(joint, path, x)
    assert not [record for record in caplog.records if record.levelno > 20]
    assert_same(run(path, "forward", x), [*a(x), *b(x)])


def test_tasks_with_names_and_inputs_of_their_own(tmp_path: Path) -> None:
    nets, path = [Several(4), Several(6), Several(4)], tmp_path / "joint.pte"
    x, y, shift = torch.randn(3, 4), torch.randn(2, 6), torch.randn(8)
    joint = tz.ZippedModel({"one-two": nets[0], "3": nets[1], "left": nets[2]}).double().eval()
    x, y, shift = x.double(), y.double(), shift.double()
    given = {"one-two": {"x": x, "shift": shift}, "3": (y,)}
    assert tz.export_executorch(joint, path, given, tasks=list(given)) == {"one-two": "one_two", "3": "_3"}
    assert_same(run(path, "one_two", x, shift), nets[0](x, shift))
    assert_same(run(path, "_3", y), nets[1](y))
    assert_same(run(path, "forward", x, shift, y), [*nets[0](x, shift), *nets[1](y)])


class OneAxis(nn.Module):
    """Convolutions along one axis, with batch-norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, width, 3, padding="same"), nn.BatchNorm1d(width)
        self.second, self.out = nn.Conv1d(width, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.out(F.relu(self.second(x)).mean(2))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("form", ["blocks", "weights"])
def test_convolutions_along_one_axis_whose_weights_are_used_twice(tmp_path: Path, share: float, form: Any) -> None:
    nets, path = made(OneAxis), tmp_path / "joint.pte"
    tasks = [tz.Task(name, net.eval(), [torch.randn(20, 2, 9)]) for name, net in zip(("a", "b"), nets, strict=True)]
    joint = tz.zip(tasks, share=share, progress=False, compensate=False).eval()
    x, y = torch.randn(1, 2, 9), torch.randn(2, 2, 9)
    tz.export_executorch(joint, path, {"a": x, "b": y}, partly_shared=form)
    assert_same(run(path, "forward", x, y), [joint["a"](x), joint["b"](y)])
    if form == "blocks":
        assert weights(path) <= joint.parameter_count() + 4 * 8  # a scale and a shift of each task's batch-norm


def test_an_example_with_channels_last(tmp_path: Path) -> None:
    joint, path, x = tz.ZippedModel({"a": Small()}).eval(), tmp_path / "joint.pte", torch.randn(2, 1, 8, 8)
    tz.export_executorch(joint, path, x.to(memory_format=torch.channels_last))
    assert_same(run(path, "a", x), [joint["a"](x)])


class OfTheData(nn.Module):
    """Batch-norm whose scale depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("mean", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.batch_norm(y, self.mean, self.mean.square() + 1, self.first(x + 1).mean(0), None)


def test_batch_norm_that_depends_on_the_data(tmp_path: Path) -> None:
    joint, path, x = tz.ZippedModel({"a": OfTheData()}).eval(), tmp_path / "joint.pte", torch.randn(3, 4)
    tz.export_executorch(joint, path, x)
    assert_same(run(path, "a", x), [joint["a"](x)])


def test_names_of_methods() -> None:
    tasks = ["a-b", "a_b", "1st", "class", "1-2", "_1_2"]
    names = ["a_b_", "a_b", "_1st", "class", "_1_2_", "_1_2"]
    assert exporting._methods(tasks) == dict(zip(tasks, names, strict=True))


# --- one clear sentence ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tz.ZippedModel:
    return zipped(made(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(20, 4))


def refused(tmp_path: Path, error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message) as found:
        tz.export_executorch(*args, **kwargs)
    assert "\n" not in str(found.value)
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


@pytest.mark.parametrize(
    "error, message, options",
    [
        (tz.InputError, "no task 'x': this network has a, b", {"tasks": ["a", "x"]}),
        (tz.InputError, "example has inputs for a, but the tasks are a, b", {"example": {"a": torch.randn(2, 4)}}),
        (tz.InputError, r"does not fit task 'a': Sequential does not take input of float32\[2, 5\]",
         {"example": torch.randn(2, 5)}),
        (tz.InputError, "'blocks' or 'weights', not 'all'", {"partly_shared": "all"}),
        (tz.InputError, "from 2 on, or None .*, not 1", {"max_batch": 1}),
        (tz.InputError, "from 2 on, or None .*, not True", {"max_batch": True}),
        (tz.InputError, "example has 3 samples, more than max_batch=2", {"example": torch.randn(3, 4), "max_batch": 2}),
        (tz.ExportError, "there is no folder", {"path": "no/such/folder/joint.pte"}),
        (tz.ExportError, "it is a folder", {"path": "."}),
        (tz.InputError, "task 'a' has weights without values", {"device": "meta"}),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: Path, small: Any, error: Any, message: str, options: dict[str, Any]) -> None:
    path = tmp_path / options.pop("path", "joint.pte")
    if "device" in options:
        small = copy.deepcopy(small).to(options.pop("device"))
    refused(tmp_path, error, message, small, path, options.pop("example", torch.randn(2, 4)), **options)


def test_a_network_that_is_not_zipped(tmp_path: Path) -> None:
    message = "is a joint network, as tz.zip gives it, not a Linear"
    refused(tmp_path, tz.InputError, message, nn.Linear(4, 2), tmp_path / "a.pte", torch.randn(2, 4))


def test_packages_that_are_not_there(tmp_path: Path, small: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    message = r"writing ExecuTorch files needs executorch, .* pip install 'taskzip\[executorch\]'"
    refused(tmp_path, tz.ExportError, message, small, tmp_path / "joint.pte", torch.randn(2, 4))


def test_a_package_for_another_torch(tmp_path: Path, small: Any, monkeypatch: Any) -> None:
    def broken() -> None:
        raise ImportError("libtorch.so: undefined symbol")

    import executorch.runtime

    monkeypatch.setattr(executorch.runtime.Runtime, "get", broken)
    message = r"ExecuTorch, which cannot be imported \(libtorch.so: undefined symbol\): pip install"
    refused(tmp_path, tz.ExportError, message, small, tmp_path / "joint.pte", torch.randn(2, 4))


class Choosing(nn.Module):
    """Data decide what happens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Unknown(nn.Module):
    """Not among the operators to which exporters bring all others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Sorting(nn.Module):
    """Among these, and not in the runtime."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(-1).values


class Ranking(nn.Module):
    """Becomes an operator that is not in the runtime."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argsort(1)


class OneSize(nn.Module):
    """Made for one size of batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 2, 2).sum(1)


@pytest.mark.parametrize(
    "net, message, options",
    [
        (Choosing, r"Choosing: .*, at \"if x.sum\(\) > 0:\" \(.*test_executorch.py:\d+\)\.$", {}),
        (
            Unknown,
            r"special_bessel_j0.default is not in Core ATen opset, at \"return torch.special.bessel_j0\(x\)\" ",
            {},
        ),
        (Sorting, r"Sorting: ExecuTorch's runtime has no aten::sort, at \"return x.sort\(-1\).values\" ", {}),
        (Ranking, r"Ranking: ExecuTorch's runtime has no aten::sort, at \"return x.argsort\(1\)\" ", {}),
        (OneSize, "For the example's size of batch alone it can: leave max_batch away", {"max_batch": 4}),
    ],
)
def test_networks_that_cannot_be_exported(tmp_path: Path, net: Any, message: str, options: dict[str, Any]) -> None:
    joint = tz.ZippedModel({"bad": net(), "good": nn.Identity()})
    message = f"task 'bad' cannot be exported: .*{message}"
    refused(tmp_path, tz.ExportError, message, joint, tmp_path / "joint.pte", torch.randn(2, 4), **options)


@pytest.mark.usefixtures("task_b_gives_more")
def test_a_file_that_gives_other_outputs(tmp_path: Path, small: Any) -> None:
    refused(
        tmp_path,
        tz.ExportError,
        "task 'b' cannot be exported: .* 'b' differs",
        small,
        tmp_path / "joint.pte",
        torch.randn(2, 4),
    )


@pytest.mark.parametrize(
    "most, message",
    [
        (60_000, r"cannot write .*joint.pte: File too large\. Has it room\?"),
        (100, r"cannot be exported: File too large, in temporary files\. Is .* writable, and has it room\?"),
    ],
)
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, most: int, message: str) -> None:
    (tmp_path / "joint.pte").write_bytes(b"old")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, kept[1]))  # the nearest thing to a full disk
    try:
        with pytest.raises(tz.ExportError, match=message):
            joint = tz.ZippedModel({"a": nn.Linear(4, 4000)})
            tz.export_executorch(joint, tmp_path / "joint.pte", torch.randn(2, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
