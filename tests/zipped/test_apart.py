"""Groups of units computed one by one: the same outputs, and what tasks share in part is computed once."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import taskzip as tz
from taskzip.models import LeNet5, ResNet20


class Counting(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def fc(*widths: int) -> nn.Sequential:
    layers = [layer for reads, units in itertools.pairwise(widths) for layer in (nn.Linear(reads, units), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Net(nn.Module):
    """Three convolutions; what happens between them is up to the tests."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.third, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        x = self.between(self.second(x))
        return self.out(self.between(self.third(x)).mean((2, 3)))


def zipped(make: Callable[[], nn.Module], x: Tensor, tasks: str = "ab", **options: Any) -> tz.ZippedModel:
    nets = []
    for seed, _ in enumerate(tasks):
        torch.manual_seed(seed)
        nets.append(make().eval())
    given = [tz.Task(name, net, [x]) for name, net in zip(tasks, nets, strict=True)]
    options = {"share": 0.5, "cross": False, "compensate": False, "progress": False, **options}
    return tz.zip(given, **options)


def small_images(samples: int = 4) -> Tensor:
    return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def counts(joint: tz.ZippedModel, x: Tensor) -> Counter[str]:
    """Operators of one call, whose outputs are those of the tasks by themselves to the last bit."""
    with torch.no_grad():
        apart = {name: joint[name](x) for name in joint}
        with Counting() as counting:
            together = joint(x)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)
    return counting.calls


@pytest.mark.parametrize("tasks", ["ab", "abc"])
@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_every_weight_is_multiplied_once(tasks: str, share: float) -> None:
    """With linear layers FLOPs are 2 for each weight: of a task those that it has, together each once."""
    joint = zipped(lambda: fc(9, 12, 10, 8, 3), torch.randn(50, 9), tasks, share=share)
    flops = joint.history.settings["flops"]
    for name in joint:
        assert flops["tasks"][name] == 2 * sum(p.numel() for p in joint[name].parameters() if p.dim() == 2)
    assert flops["together"] == 2 * sum(p.numel() for p in joint.parameters() if p.dim() == 2)
    counts(joint, torch.randn(5, 9))


def test_layers_shared_in_part_run_once_for_what_is_shared() -> None:
    joint = zipped(LeNet5, torch.randn(8, 1, 28, 28), share=0.9)
    calls = counts(joint, torch.randn(2, 1, 28, 28))
    assert calls["convolution"] == 2 * (1 + 2) and calls["addmm"] == (1 + 2) + 2
    crossed = zipped(LeNet5, torch.randn(8, 1, 28, 28), share=0.9, cross=True)
    assert counts(crossed, torch.randn(2, 1, 28, 28))["convolution"] == 2 * 2


@pytest.mark.parametrize("batch_norm, times", [("fold", 1), ("private", 2)])
def test_residual_streams(batch_norm: str, times: int) -> None:
    """Private batch-norm makes other values of what is shared, but for what the first layer gives."""
    make, x = lambda: ResNet20(widths=(4, 6, 8)), torch.randn(4, 3, 16, 16)
    joint = zipped(make, x, batch_norm=batch_norm)
    if batch_norm == "private":  # calibrated on the same data, networks that were never trained have equal statistics
        with torch.no_grad():
            for name, buffer in joint["b"].named_buffers():
                buffer.mul_(2 if "running" in name else 1)
    assert counts(joint, x)["convolution"] == 21 * 2 + 1 + 20 * times


@pytest.mark.parametrize("between", [F.relu, F.relu_, F.gelu, lambda x: x * x.sigmoid()])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_happens_between_layers(between: Callable[[Tensor], Tensor], mode: Any) -> None:
    x = small_images()
    joint = zipped(lambda: Net(between), x)
    assert counts(joint, x)["convolution"] == 3 * (1 + 2)
    with mode():
        torch.testing.assert_close(joint(x), {name: joint[name](x) for name in joint}, rtol=0, atol=0)


def test_what_mixes_units_is_not_common() -> None:
    joint = zipped(lambda: Net(lambda x: x.softmax(1)), small_images())
    assert counts(joint, small_images())["convolution"] == 1 + 2 + 2 * (2 + 2)


def test_a_network_that_writes_into_what_it_read() -> None:
    """What is compared is what was read, not what became of it."""

    class Adding(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.second(x)
            x.add_(1)
            return self.out(self.third(y.relu() + self.second(x)).mean((2, 3)))

    joint = zipped(Adding, small_images())
    assert counts(joint, small_images())["convolution"] >= 4 + 8


def gradients(joint: tz.ZippedModel, outputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    joint.zero_grad()
    sum(y.square().sum() for y in outputs.values()).backward()
    return {name: p.grad for name, p in joint.named_parameters()}


def test_gradients_reach_every_task() -> None:
    """Equal values that came about from other parameters do not stand for each other."""

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(self.scaled)
            self.scale = nn.Parameter(torch.ones(()))

        def scaled(self, x: Tensor) -> Tensor:
            return (x * self.scale).relu()

    x = small_images()
    joint = zipped(Scaled, x)
    wanted = gradients(joint, {name: joint[name](x) for name in joint})
    torch.testing.assert_close(gradients(joint, joint(x)), wanted)
    assert all(each is not None and each.any() for name, each in wanted.items() if "scale" in name)


def test_nothing_is_kept_afterwards() -> None:
    seen: list[weakref.ref[Tensor]] = []
    joint = zipped(Net, small_images(), tasks="abc")
    for network in joint.tasks.values():
        for layer in (network.first, network.second, network.third):
            layer.register_forward_hook(lambda _module, _args, output: seen.append(weakref.ref(output)))
    gc.disable()
    try:
        with torch.no_grad():
            joint(small_images())
        assert len(seen) == 9 and not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_inputs_without_a_batch_and_with_more_axes() -> None:
    joint = zipped(Net, small_images())
    for name in joint:
        torch.testing.assert_close(joint[name].first(small_images()[0])[None], joint[name].first(small_images()[:1]))
    joint = zipped(lambda: fc(5, 8, 6, 2), torch.randn(30, 5))
    x = torch.randn(4, 3, 5)
    for name in joint:
        torch.testing.assert_close(joint[name](x), joint.materialize(name)(x))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_padding(padding_mode: str) -> None:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3, padding=1, padding_mode=padding_mode), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode=padding_mode), nn.Flatten(), nn.Linear(216, 2),
    )  # fmt: skip
    joint = zipped(make, small_images())
    for name in joint:
        torch.testing.assert_close(joint[name](small_images()), joint.materialize(name)(small_images()))
