"""Blocks that another library has replaced by quantised tensors, which can do little more than be dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz


class Rounded(Tensor):
    """Hundredths as whole numbers, of which all that torch can do is a linear layer."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Rounded:
        return Tensor._make_wrapper_subclass(cls, numbers.shape)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def dequantize(self) -> Tensor:
        return self.numbers / 100

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers)
        raise NotImplementedError(func)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})


def rounded(zipped: tz.ZippedModel) -> None:
    """The weights of all linear layers, blocks that tasks share once."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for layer in [module for module in zipped.modules() if isinstance(module, nn.Linear)]:
        owner = getattr(layer, "weight_blocks", layer)
        for name, block in list(owner.named_parameters()):
            if block.dim() == 2:
                if block not in done:
                    done[block] = nn.Parameter(Rounded((100 * block.detach()).round()), requires_grad=False)
                owner.register_parameter(name, done[block])


def made(share: float) -> tz.ZippedModel:
    nets = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        nets[name] = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    tasks = [tz.Task(name, net, [torch.randn(40, 5)]) for name, net in nets.items()]
    return tz.zip(tasks, share=share, progress=False)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_quantised_blocks_stay_shared_and_are_put_together(share: float) -> None:
    joint, x = made(share), torch.randn(7, 5)
    with torch.no_grad():
        before = {name: joint[name](x) for name in joint}
        rounded(joint)
        after, together = {name: joint[name](x) for name in joint}, joint(x)
    for name, right in before.items():
        assert 0 < (after[name] - right).abs().max() < 0.1 * right.abs().max()
        assert torch.equal(together[name], after[name])
    blocks = [p for p in joint.parameters() if isinstance(p, Rounded)]
    shared = sum(p.numel() for p in blocks if all(p in set(joint[name].parameters()) for name in joint))
    assert shared == {1.0: 5 * 12 + 12 * 9, 0.5: 5 * 6 + 6 * 4}[share]


def test_a_checkpoint_does_not_keep_quantised_blocks(tmp_path: Path) -> None:
    joint = made(1.0)
    rounded(joint)
    with pytest.raises(tz.CheckpointError, match=r"weight_blocks\.a\+b is a Rounded, .* before it is quantised\.$"):
        joint.save(tmp_path / "joint.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_would_never_be_used_is_refused() -> None:
    """Quantisers set the weight of a module, and torch would keep it beside the blocks."""
    joint = made(1.0)
    layer = joint["a"][0]
    with pytest.raises(
        tz.InputError, match=r"the weight of this Linear is put together .* weight_blocks, .*materialize"
    ):
        layer.weight = nn.Parameter(torch.zeros(12, 5))
    layer.label = "other attributes can be set"
    plain, zeros = joint.materialize("a"), torch.zeros(12, 5)
    plain[0].weight = nn.Parameter(zeros)
    assert torch.equal(plain[0](torch.randn(3, 5)), plain[0].bias.expand(3, -1))
