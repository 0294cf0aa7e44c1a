"""One graph in PyTorch: the same outputs, what tasks have in common computed once, and the network's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import taskzip as tz
from taskzip.export.graphs import aten
from taskzip.models import LeNet5, ResNet20


def zipped(nets: list[nn.Module], x: Tensor, share: Any = 1.0, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, net.eval(), [x]) for name, net in zip("abc", nets, strict=False)]
    return tz.zip(tasks, share=share, progress=False, compensate=False, **options).eval()


def count(graph: GraphModule, target: object) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def check(graph: GraphModule, joint: tz.ZippedModel, *inputs: Tensor) -> None:
    with torch.no_grad():
        wanted = {name: joint[name](*inputs) for name in joint}
    torch.testing.assert_close(graph(*inputs), wanted)


def small_images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def small_resnets(share: float, **options: Any) -> tz.ZippedModel:
    nets: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        # Both have a mean of their own with the same values.
        nets.append(ResNet20(widths=(4, 6, 8), blocks=1, mean=0.25))
    return zipped(nets, small_images(30), share, **options)


def test_a_fully_shared_trunk_is_there_once() -> None:
    joint = zipped([LeNet5(), LeNet5(), LeNet5()], torch.randn(8, 1, 28, 28)).train()
    before = {name: p.requires_grad for name, p in joint.named_parameters()}
    graph = tz.export_graph(joint, torch.randn(1, 1, 28, 28))
    assert joint["b"].fc1.training
    joint.eval()
    for samples in (1, 2, 5):
        check(graph, joint, torch.randn(samples, 1, 28, 28))
    assert count(graph, aten.conv2d.default) == 2
    assert count(graph, aten.linear.default) == 1 + 3
    memory = {p.untyped_storage().data_ptr() for p in joint.parameters()}
    assert {b.untyped_storage().data_ptr() for b in graph.buffers()} == memory
    assert not list(graph.parameters())
    assert {name: p.requires_grad for name, p in joint.named_parameters()} == before
    assert not graph(torch.randn(1, 1, 28, 28))["a"].requires_grad


@pytest.mark.parametrize(
    "share, options, convolutions",
    [(1.0, {"batch_norm": "fold"}, 9), (1.0, {}, 1 + 2 * 8), (0.5, {}, 2 * 9), (0.5, {"cross": False}, 0)],
)
def test_what_is_shared_in_part(share: float, options: Any, convolutions: int) -> None:
    joint = small_resnets(share, **options)
    graph = tz.export_graph(joint, small_images(1))
    check(graph, joint, small_images(4))
    assert not convolutions or count(graph, aten.conv2d.default) == convolutions


def test_weights_of_their_own_for_layers_that_are_shared_in_part() -> None:
    joint = small_resnets(0.5, batch_norm="fold")
    blocks, weights = (tz.export_graph(joint, small_images(1), partly_shared=form) for form in ("blocks", "weights"))
    check(weights, joint, small_images(4))
    half = zipped([LeNet5(), LeNet5()], torch.randn(8, 1, 28, 28), 0.5)
    large = tz.export_graph(half, torch.randn(1, 1, 28, 28))
    check(large, half, torch.randn(2, 1, 28, 28))
    assert count(large, aten.conv2d.default) == 4 < count(large, aten.linear.default)  # which are large enough
    assert count(weights, aten.cat.default) == 0 < count(blocks, aten.cat.default)
    sizes = [sum(b.numel() for b in graph.buffers() if b.is_floating_point()) for graph in (blocks, weights)]
    assert sizes[0] <= joint.parameter_count() + 2 * 3 < sizes[1]  # of mean and std


def test_programs_of_torch_hold_every_block_once(tmp_path: Path) -> None:
    joint, x = zipped([LeNet5(), LeNet5()], torch.randn(8, 1, 28, 28)), torch.randn(3, 1, 28, 28)
    graph = tz.export_graph(joint, x)
    program = torch.export.export(graph, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "joint.pt2")
    assert (tmp_path / "joint.pt2").stat().st_size < 1.05 * 4 * joint.parameter_count()
    loaded = torch.export.load(tmp_path / "joint.pt2").module()
    torch.testing.assert_close(loaded(x[:2]), joint(x[:2]))


class Pair(nn.Module):
    """Two inputs, of which the second has no batch, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor, times: int = 1) -> dict[str, Any]:
        hidden = torch.relu(self.hidden(x)) * scale
        return {"logits": self.out(hidden) * times, "parts": (hidden.sum(1), None)}


@pytest.mark.parametrize(
    "example, names",
    [
        ((torch.randn(3, 4), torch.tensor(2.0), 3), ["input_0", "input_1"]),
        ({"x": torch.randn(3, 4), "scale": torch.tensor(2.0), "times": 3}, ["x", "scale"]),
    ],
)
def test_names_of_inputs_and_outputs(example: Any, names: list[str]) -> None:
    tasks = [tz.Task(name, Pair(), [torch.randn(9, 4)], forward=lambda net, x: net(x, x.mean())) for name in "ab"]
    joint = tz.zip(tasks, share=1.0, progress=False).eval()
    graph = tz.export_graph(joint, example, tasks=["b"])
    assert [node.target for node in graph.graph.find_nodes(op="placeholder")] == names
    x, scale = torch.randn(5, 4), torch.tensor(-1.0)
    right = joint["b"](x, scale, 3)
    given = graph(**{names[1]: scale, names[0]: x})
    assert list(given) == ["b.logits", "b.parts.0"]
    torch.testing.assert_close(given["b.logits"], right["logits"].detach())
    torch.testing.assert_close(given["b.parts.0"], right["parts"][0].detach())


def test_an_input_for_each_task() -> None:
    nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (2, 3)]
    joint = zipped(nets, torch.randn(9, 4), share=0.5)
    graph = tz.export_graph(joint, {"a": torch.randn(1, 4), "b": torch.randn(2, 4)})
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    given = graph(input_b=y, input_a=x)
    torch.testing.assert_close(given["a"], joint["a"](x).detach())
    torch.testing.assert_close(given["b"], joint["b"](y).detach())


class Sharing(nn.Module):
    """Gives what others give too, and its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, torch: Tensor) -> tuple[Tensor, ...]:
        y = self.out(torch)
        return y, y.t(), self.out.bias, self.out.weight.t()


def test_whoever_gets_outputs_may_write_into_them() -> None:
    net, x = Sharing(), torch.randn(3, 4)
    joint = tz.ZippedModel({"a": net, "b": net}).eval()
    graph = tz.export_graph(joint, {"torch": x})
    assert count(graph, aten.linear.default) == 1
    right = [y.detach().clone() for y in net(x)]
    for output in (each for _ in range(2) for each in graph(torch_=x)):
        given = graph(torch_=x)
        given[output].zero_()
        for name, y in given.items():
            assert name == output or torch.equal(y, right[int(name[-1])])
    assert net.out.weight.abs().sum() > 0


class Cutting(nn.Module):
    """A copy of a part, which a view needs."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)[:, :2].clone().view(-1)


def test_copies_that_are_needed_and_names_that_become_the_same() -> None:
    joint, x = tz.ZippedModel({"a-b": Cutting(), "a_b": Cutting()}).eval(), torch.randn(3, 4)
    graph = tz.export_graph(joint, {"a-b": x, "a_b": x + 1})
    given = graph(input_a_b=x, input_a_b_=x + 1)
    torch.testing.assert_close(given["a-b"], joint["a-b"](x).detach())
    torch.testing.assert_close(given["a_b"], joint["a_b"](x + 1).detach())


class Refusing(nn.Module):
    """Chooses by the data, or by the size of the batch."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.out, self.by_data = nn.Linear(4, 2), by_data

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.sum() > 0 if self.by_data else len(x) == 5
        return self.out(x) if chosen else self.out(-x)


def test_networks_that_cannot_be_exported_are_named() -> None:
    joint, x = tz.ZippedModel({"a": nn.Linear(4, 2), "b": Refusing(True)}), torch.randn(5, 4)
    with pytest.raises(tz.ExportError, match=r"task 'b' cannot be exported: Refusing: .*x\) if chosen else"):
        tz.export_graph(joint, x)
    joint = tz.ZippedModel({"a": nn.Linear(4, 2), "b": Refusing(False)})
    with pytest.raises(tz.ExportError, match=r"task 'b' .*size of batch alone it can: dynamic_batch=False"):
        tz.export_graph(joint, x)
    check(tz.export_graph(joint, x, dynamic_batch=False), joint, x)


def test_wrong_arguments() -> None:
    joint = tz.ZippedModel({"a": nn.Linear(4, 2)})
    with pytest.raises(tz.InputError, match="joint network"):
        tz.export_graph(nn.Linear(4, 2), torch.randn(1, 4))  # type: ignore[arg-type]
    with pytest.raises(tz.InputError, match="'blocks' or 'weights', not 'all'"):
        tz.export_graph(joint, torch.randn(1, 4), partly_shared="all")  # type: ignore[arg-type]
    with pytest.raises(tz.InputError, match="no task 'c'"):
        tz.export_graph(joint, torch.randn(1, 4), tasks=["c"])
    with pytest.raises(tz.InputError, match=r"example does not fit task 'a'"):
        tz.export_graph(joint, torch.randn(1, 5))
