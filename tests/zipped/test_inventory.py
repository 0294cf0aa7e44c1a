"""What networks have in common is found once, and found again when the networks have changed."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import taskzip as tz
from taskzip.zipped.inventory import Inventory


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.first(x - self.mean)).relu().mean((2, 3)))


def pair() -> list[nn.Module]:
    a, b = Net(), Net()
    b.first = a.first
    return [a.eval(), b.eval()]


def test_shared_weights_and_equal_buffers() -> None:
    a, b = pair()
    inventory = Inventory([a, b])
    assert {id(w) for w in inventory.weights} == {id(a.first.weight), id(a.first.bias)}
    assert [[id(x) for x in group] for group in inventory.equal_buffers()] == [[id(a.mean), id(b.mean)]]
    b.mean = torch.tensor(0.6)
    assert inventory.holds([a, b]) and not list(inventory.equal_buffers())


@pytest.mark.parametrize("own_scale", [False, True])
def test_blocks_count_where_all_of_the_weight_is_shared(own_scale: bool) -> None:
    nets = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    tasks = [tz.Task(name, net, [torch.randn(30, 6)]) for name, net in zip("ab", nets, strict=True)]
    joint = tz.zip(tasks, share={"0": 1.0, "2": 0.5}, progress=False, own_scale=own_scale)
    names = ("weight_blocks.a+b",) if own_scale else ("weight_blocks.a+b", "bias_blocks.a+b")
    shared = {id(joint["a"][0].get_parameter(name)) for name in names}
    assert {id(w) for w in Inventory(list(joint.tasks.values())).weights} == shared


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: setattr(b, "first", copy.deepcopy(b.first)),
        lambda a, b: setattr(b.first, "weight", nn.Parameter(b.first.weight.detach().clone())),
        lambda a, b: b.add_module("more", nn.ReLU()),
        lambda a, b: setattr(b, "norm", torch.compile(b.norm, backend="eager")),
    ],
)
def test_changes_that_are_seen(change: Callable[[nn.Module, nn.Module], None]) -> None:
    a, b = pair()
    inventory = Inventory([a, b])
    assert inventory.holds([a, b])
    change(a, b)
    assert not inventory.holds([a, b])


def test_other_networks() -> None:
    a, b = pair()
    inventory = Inventory([a, b])
    assert not inventory.holds([a]) and not inventory.holds([b, a]) and not inventory.holds([a, pair()[1]])


@pytest.mark.parametrize(
    "change", [lambda b: b.norm.train(), lambda b: b.norm.compile(backend="eager"), lambda b: b.to("meta")]
)
def test_networks_that_run_apart(change: Callable[[nn.Module], None]) -> None:
    a, b = pair()
    assert not Inventory([a, b]).runs_apart()
    inventory = Inventory([a, b])
    change(b)
    assert not inventory.holds([a, b]) or inventory.runs_apart()
    assert Inventory([Net().eval(), Net().eval()]).runs_apart()


def test_a_joint_network_follows_its_changes() -> None:
    """Called, changed and called again."""
    a, b = pair()
    joint = tz.ZippedModel({"a": a, "b": b})
    x = torch.randn(2, 1, 5, 5)

    def right() -> None:
        with torch.no_grad():
            together = joint(x)
            for name in joint:
                assert torch.equal(together[name], joint[name](x))

    right()
    with torch.no_grad():
        a.first.weight.mul_(2)
    right()
    a.first.weight.data = a.first.weight.data + 1
    right()
    joint.load_state_dict({key: torch.randn_like(value.float()).abs() for key, value in joint.state_dict().items()})
    right()
    b.mean.fill_(0.1)
    right()
    b.first = copy.deepcopy(b.first)
    with torch.no_grad():
        b.first.bias.add_(1)
    right()
    b.first = a.first
    right()
    joint.load_state_dict({k: torch.rand(v.shape) for k, v in joint.state_dict().items()}, assign=True)
    right()
    joint.double()
    x = x.double()
    right()
    joint.tasks["b"] = copy.deepcopy(a)
    right()


def test_nothing_is_kept_alive_or_written_with_the_network() -> None:
    a, b = pair()
    joint = tz.ZippedModel({"a": a, "b": b})
    joint(torch.randn(2, 1, 5, 5))
    again = copy.deepcopy(joint)
    written = io.BytesIO()
    torch.save(joint, written)
    assert again(torch.ones(1, 1, 5, 5))["b"].equal(joint(torch.ones(1, 1, 5, 5))["b"])
    written.seek(0)
    assert torch.load(written, weights_only=False)(torch.ones(1, 1, 5, 5)).keys() == {"a", "b"}
    references = [weakref.ref(module) for module in (joint, a, b, a.first)]
    del joint, a, b
    gc.collect()
    assert not any(reference() is not None for reference in references)
