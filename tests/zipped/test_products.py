"""Products with blocks one by one give what the whole weight gives, where they are faster, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import taskzip as tz
from taskzip.zipped import products
from taskzip.zipped.blocks import Blocks, BlockSpec, BlocksSpec, RowSpec, densify, install, zipped_class


class Watching(TorchDispatchMode):
    """The operators that ran, and the largest tensor that was put together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ in ("cat", "index_select", "index_copy_"):
            self.largest = max(self.largest, result.numel())
        return result


def shuffled(n: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist())


def install_blocks(module: nn.Module, orders: bool = False) -> None:
    """Two groups of rows, the first in two blocks of which one is wider than what this module reads."""
    units, inputs, *kernel = module.weight.shape
    shared, read = units // 3 + 1, inputs // 2
    first = (BlockSpec("a+b", (shared, read, *kernel)), BlockSpec("a+b@a", (shared, inputs, *kernel), inputs - read))
    rows = (
        RowSpec(first, shuffled(inputs) if orders else None),
        RowSpec((BlockSpec("a", (units - shared, inputs, *kernel)),)),
    )
    order = shuffled(units) if orders else None
    for name, spec in {
        "weight": BlocksSpec(rows, order),
        "bias": BlocksSpec(
            (RowSpec((BlockSpec("a+b", (shared,)),)), RowSpec((BlockSpec("a", (units - shared,)),))), order
        ),
    }.items():
        if getattr(module, name) is not None:
            blocks = {b.name: nn.Parameter(torch.randn(b.shape)) for row in spec.rows for b in row.blocks}
            install(module, name, Blocks(spec, blocks))


def plain(module: nn.Module) -> nn.Module:
    """The same with its weight put together."""
    dense = {name: getattr(module, name) for name in ("weight", "bias")}
    densify(module)
    for name, value in dense.items():
        if value is not None:
            assert torch.equal(getattr(module, name), value)
    return module


@pytest.fixture
def everything_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in {"LARGE_LINEAR": 0, "LARGE": 0, "_FEW": 10**9, "_MANY": 10**9}.items():
        monkeypatch.setattr(products, name, limit)


CASES = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear of one sample": (lambda: nn.Linear(12, 9, bias=False), (12,)),
    "linear of a sequence": (lambda: nn.Linear(12, 9), (2, 7, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 5, 7)),
    "conv2d of one sample": (lambda: nn.Conv2d(6, 8, (3, 1), stride=(2, 1)), (6, 5, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", dilation=1), (1, 6, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding="same"), (2, 4, 3, 4, 5)),
    "no samples": (lambda: nn.Linear(12, 9), (0, 12)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.usefixtures("everything_splits")
def test_the_same_as_with_the_whole_weight(case: str, orders: bool) -> None:
    make, shape = CASES[case]
    module, x = make().double(), torch.randn(shape, dtype=torch.float64)
    install_blocks(module, orders)
    module.double()
    whole = module.weight.numel()
    with torch.no_grad(), Watching() as watching:
        found = module(x)
    with torch.no_grad():
        torch.testing.assert_close(found, plain(module)(x))
    products_of_blocks = [call for call in watching.calls if call in ("addmm", "mm", "mv", "addmv", "convolution")]
    assert len(products_of_blocks) == 3 or not x.numel()
    assert watching.largest < max(whole, 1 + found.numel(), 1 + x.numel())


def linear(units: int = 300) -> nn.Module:
    module = nn.Linear(300, units)
    install_blocks(module)
    return module


@pytest.mark.parametrize(
    "samples, units, blocks", [(1, 300, True), (128, 300, True), (129, 300, False), (1, 200, False)]
)
def test_blocks_are_used_where_they_are_faster(samples: int, units: int, blocks: bool) -> None:
    module = linear(units)
    with torch.no_grad(), Watching() as watching:
        module(torch.randn(samples, 300))
    assert (watching.largest < module.weight.numel()) == blocks


@pytest.mark.parametrize("width, blocks", [(32, True), (33, False)])
def test_convolutions_too(width: int, blocks: bool) -> None:
    module = nn.Conv2d(1024, 1024, 1)
    install_blocks(module)
    with torch.no_grad(), Watching() as watching:
        module(torch.randn(1, 1024, 32, width))
    assert (watching.calls.count("convolution") == 3) == blocks


def test_with_gradients_the_weight_is_put_together() -> None:
    module, x = linear(), torch.randn(4, 300)
    found = module(x)
    found.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert all(g is not None for g in gradients.values())
    assert torch.equal(found, plain(module)(x))


def test_low_precision_is_not_summed_twice() -> None:
    module, x = linear(), torch.randn(4, 300)
    with torch.no_grad(), Watching() as watching, torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert watching.largest == module.weight.numel()
    module.bfloat16()
    with torch.no_grad(), Watching() as watching:
        module(x.bfloat16())
    assert watching.largest == module.weight.numel()


def test_exported_graphs_hold_the_whole_layer() -> None:
    module, x = linear(), torch.randn(4, 300)
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=False)
    called = [str(node.target) for node in program.graph.nodes]
    assert called.count("aten.linear.default") == 1


def test_a_forward_of_the_user_stays() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, 2 * self.weight, self.bias)

    class Shifted(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight, bias) + 1

    for module, shape in ((Scaled(300, 300), (2, 300)), (Shifted(1024, 1024, 1), (1, 1024, 3, 3))):
        install_blocks(module)
        x = torch.randn(shape)
        with torch.no_grad():
            found = module(x)
            assert torch.equal(found, plain(module)(x))


def test_a_bias_that_is_not_in_blocks() -> None:
    module = nn.Linear(300, 300)
    kept = module.bias
    install_blocks(module)
    del module._modules["bias_blocks"]
    module.__class__ = zipped_class(nn.Linear, ("weight",))
    module.bias = kept
    x = torch.randn(2, 300)
    with torch.no_grad():
        assert torch.equal(module(x), F.linear(x, module.weight, kept))


def test_tasks_joint_and_materialized() -> None:
    """Through zipping: the same path alone and together, and a plain copy up to rounding."""
    nets = [nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3))] * 2
    joint = tz.zip([tz.Task(n, net, [torch.randn(60, 40)]) for n, net in zip("ab", nets, strict=True)], share=0.5)
    x = torch.randn(3, 40)
    with torch.no_grad(), Watching() as watching:
        together = joint(x)
    assert watching.largest < 300 * 300
    with torch.no_grad():
        for name in joint:
            assert torch.equal(joint[name](x), together[name])
            torch.testing.assert_close(joint.materialize(name)(x), together[name])
