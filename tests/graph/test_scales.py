"""Which units may be made larger or smaller, and that the network then computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net, call
from torch import Tensor, nn

from taskzip.graph import Structure, analyse
from taskzip.models import ResNet20


def between(do: Callable[..., Tensor], **more: nn.Module | Tensor) -> tuple[nn.Module, tuple[int, ...]]:
    return Net(do, **{"a": nn.Linear(6, 8), "b": nn.Linear(8, 3)} | more), VECTORS


IMAGES, VECTORS = (3, 2, 8, 8), (5, 6)


def check(model: nn.Module, shape: tuple[int, ...]) -> Structure:
    """Scale all units that are free at random, in float64, and compare the outputs."""
    model = model.double().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn_like(tensor)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 1e-4, 2)
    x, rng = torch.randn(shape, dtype=torch.float64), np.random.default_rng(0)
    structure, other = analyse(model, x, call), copy.deepcopy(model)
    for space, free in enumerate(structure.scales.free):
        if free:
            structure.rescale(other, {space: np.exp(rng.normal(size=len(structure.spaces[space].units)))})
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-9)
    return structure


def chain(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3))


FREE: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "relu": lambda: (chain(nn.ReLU()), VECTORS),
    "in place": lambda: (chain(nn.ReLU(inplace=True)), VECTORS),
    "nothing": lambda: (chain(), VECTORS),
    "leaky relu": lambda: (chain(nn.LeakyReLU()), VECTORS),
    "prelu": lambda: (chain(nn.PReLU(8)), VECTORS),
    "batch-norm": lambda: (chain(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout()), VECTORS),
    "batch-norm behind": lambda: (chain(nn.ReLU(), nn.BatchNorm1d(8)), VECTORS),
    "a scale": lambda: between(lambda m, x: m.b(m.a(x) * m.s / 3), s=torch.rand(8)),
    "a bias of its own": lambda: between(lambda m, x: m.b((m.a(x) + m.s).relu()), s=torch.rand(8)),
    "a sum": lambda: (
        Net(lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(8, 3)),
        VECTORS,
    ),
    "called twice": lambda: between(lambda m, x: m.b(m.a(x) - m.a(x.flip(0)))),
    "halves": lambda: (
        Net(
            lambda m, x: m.b(torch.cat([y.relu() for y in m.a(x).chunk(2, 1)], 1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        VECTORS,
    ),
    "flattened": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)),
        IMAGES,
    ),
    "pooled": lambda: (
        Net(lambda m, x: m.b(F.pad(m.a(x), [1, 2]).mean((2, 3))), a=nn.Conv2d(2, 4, 3), b=nn.Linear(4, 3)),
        IMAGES,
    ),
    "depthwise": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        IMAGES,
    ),
}

RIGID: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "gelu": lambda: (chain(nn.GELU()), VECTORS),
    "relu6": lambda: (chain(nn.ReLU6()), VECTORS),
    "tanh": lambda: (chain(nn.Tanh()), VECTORS),
    "softmax": lambda: (chain(nn.Softmax(1)), VECTORS),
    "layer-norm": lambda: (chain(nn.LayerNorm(8)), VECTORS),
    "batch-norm without a scale": lambda: (chain(nn.BatchNorm1d(8, affine=False)), VECTORS),
    "a constant": lambda: between(lambda m, x: m.b((m.a(x) + 1).relu())),
    "its square": lambda: between(lambda m, x: m.b(m.a(x) * m.a(x))),
    "a gate": lambda: between(lambda m, x: m.b(m.a(x) * m.a(x).sigmoid())),
    "the mean over units": lambda: (
        Net(lambda m, x: m.b(m.a(x) - m.a(x).mean(1, keepdim=True)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        VECTORS,
    ),
    "a divisor": lambda: between(lambda m, x: m.b(x.sum() / m.a(x))),
    "a weight made as it runs": lambda: (
        Net(lambda m, x: F.linear(m.a(x).relu(), m.w * m.s), a=nn.Linear(6, 8), w=torch.rand(3, 8), s=torch.rand(3, 1)),
        VECTORS,
    ),
    "a product of matrices": lambda: (
        Net(lambda m, x: m.a(x).relu() @ m.w, a=nn.Linear(6, 8), w=torch.rand(8, 3)),
        VECTORS,
    ),
    "a layer along another axis": lambda: (
        Net(
            lambda m, x: m.c(m.b(m.a(x).flatten(2)).mean(2)),
            a=nn.Conv2d(2, 4, 1),
            b=nn.Linear(64, 5),
            c=nn.Linear(4, 3),
        ),
        IMAGES,
    ),
    "something broadcast": lambda: (
        Net(lambda m, x: m.b(m.a(x) + x[:, :1]), a=nn.Linear(6, 8), b=nn.Linear(8, 3)),
        VECTORS,
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_positively_homogeneous(name: str) -> None:
    assert all(check(*FREE[name]()).scales.free)


@pytest.mark.parametrize("name", RIGID)
def test_rigid(name: str) -> None:
    structure = check(*RIGID[name]())
    for layer in structure.layers:
        assert not any(structure.scales.free[space] for space in layer.spaces if layer.name == "a" or layer.name == "0")


def test_a_stream_scales_as_one() -> None:
    structure = check(ResNet20(), (2, 3, 16, 16))
    assert structure.scales.free
    assert all(structure.scales.free)


def test_an_embedding_begins_a_stream() -> None:
    """Its columns scale with the units, its rows do not."""

    def run(m: Any, x: Tensor) -> Tensor:
        words = m.table(x.argmax(1))
        return m.out((words + m.layer(words.relu())).relu())

    check(Net(run, table=nn.Embedding(6, 8), layer=nn.Linear(8, 8), out=nn.Linear(8, 3)), VECTORS)


def test_half_precision_stays() -> None:
    model = chain(nn.ReLU()).to(torch.bfloat16)
    structure = analyse(model, torch.randn(VECTORS, dtype=torch.bfloat16), call)
    structure.rescale(model, {0: np.full(8, 2.0)})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
