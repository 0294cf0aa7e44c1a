"""Residual streams that an embedding or a learned token begins, and no layer: nothing is known of their order there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net
from torch import Tensor, nn

import taskzip as tz
from taskzip.zipping.members import Member
from taskzip.zipping.starts import unlikeness

DOUBLE = torch.float64
WORDS, PLACES, WIDTH = 20, 6, 12


class Block(nn.Module):
    """A feed-forward block and, where wanted, attention before it, as the networks of this kind have them."""

    def __init__(self, norm: Callable[[], nn.Module], heads: int, keys: int) -> None:
        super().__init__()
        self.norm, self.heads, self.keys = norm(), heads, keys
        self.up, self.down = nn.Linear(WIDTH, 20, bias=False), nn.Linear(20, WIDTH, bias=False)
        if heads:
            self.norm_before = norm()
            self.q, self.o = nn.Linear(WIDTH, 3 * heads, bias=False), nn.Linear(3 * heads, WIDTH, bias=False)
            self.k, self.v = (nn.Linear(WIDTH, 3 * keys, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.heads:
            x = x + self.attention(self.norm_before(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def attention(self, x: Tensor) -> Tensor:
        """Grouped queries: several heads of queries read one head of keys and values."""
        q = self.q(x).unflatten(-1, (self.keys, self.heads // self.keys, 3)).permute(0, 2, 3, 1, 4)
        k, v = (each(x).unflatten(-1, (self.keys, 1, 3)).permute(0, 2, 3, 1, 4) for each in (self.k, self.v))
        scores = (q @ k.expand(q.shape).mT).softmax(-1)
        return self.o((scores @ v.expand(q.shape)).permute(0, 3, 1, 2, 4).flatten(2))


def network(
    norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(WIDTH),
    *,
    heads: int = 0,
    keys: int = 0,
    blocks: int = 2,
    words: int = WORDS,
    tied: bool = False,
    begin: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m.table(x),
    **parts: Any,
) -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.blocks(begin(m, x))
        return F.linear(x, m.table.weight) if tied else m.out(x.mean(1))

    parts |= {} if tied else {"out": nn.Linear(WIDTH, 5, bias=False)}
    stack = nn.Sequential(*(Block(norm, heads, keys) for _ in range(blocks)))
    model = Net(do, table=nn.Embedding(words, WIDTH), blocks=stack, **parts).to(DOUBLE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
    return model


def placed(m: nn.Module, x: Tensor) -> Tensor:
    return m.table(x) + m.places(torch.arange(PLACES))


def typed(m: nn.Module, x: Tensor) -> Tensor:
    return m.start(m.table(x) + m.places + m.types((x > WORDS // 2).long()))


def with_a_token(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(len(x), 1, WIDTH), m.table(x)], 1)


def tokens() -> Tensor:
    return torch.randn(1, 1, WIDTH)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "one block": lambda: network(blocks=1),
    "several blocks": network,
    "heads": lambda: network(heads=2, keys=2),
    "grouped queries": lambda: network(heads=4, keys=2),
    "one head of keys": lambda: network(heads=4, keys=1),
    "norms without weights": lambda: network(lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), heads=4, keys=2),
    "layer norms": lambda: network(lambda: nn.LayerNorm(WIDTH), heads=4, keys=2),
    "layer norms without biases": lambda: network(lambda: nn.LayerNorm(WIDTH, bias=False)),
    "places": lambda: network(begin=placed, places=nn.Embedding(PLACES, WIDTH)),
    "types of words": lambda: network(
        begin=typed, places=torch.randn(PLACES, WIDTH), types=nn.Embedding(2, WIDTH), start=nn.LayerNorm(WIDTH)
    ),
    "a learned token": lambda: network(begin=with_a_token, token=tokens()),
    "tied to the output": lambda: network(tied=True, heads=4, keys=2),
    "no norms": lambda: network(nn.Identity),
}


def reordered(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    structure, rng, other = tz.inspect(model, x), np.random.default_rng(seed), copy.deepcopy(model)
    for index, space in enumerate(structure.spaces):
        structure.reorder(other, index, rng.permutation(len(space.units)))
    return other


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reordered_copy_is_found(name: str) -> None:
    model, data = ARCHITECTURES[name](), [torch.randint(WORDS, (16, PLACES)) for _ in range(3)]
    others = [reordered(model, data[0], seed) for seed in ((1, 2) if name == "grouped queries" else (1,))]
    tasks = [tz.Task(str(k), each, data) for k, each in enumerate([model, *others])]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    assert sum(record.cost for record in zipped.history.layers) < 1e-9
    with torch.no_grad():
        for task in zipped:
            torch.testing.assert_close(zipped[task](data[0]), model(data[0]), rtol=1e-7, atol=1e-7)


def test_a_copy_of_other_words_is_told_by_what_no_order_changes() -> None:
    """Tables of other sizes say nothing, but every layer has the same numbers, in some order."""
    model, data = network(), [torch.randint(WORDS - 4, (16, PLACES)) for _ in range(3)]
    other = network(words=WORDS - 4)
    state = model.state_dict()
    other.load_state_dict(state | {"table.weight": state["table.weight"][: WORDS - 4]})
    other = reordered(other, data[0], 4)
    zipped = tz.zip([tz.Task("a", model, data), tz.Task("b", other, data)], share=1.0, progress=False)
    assert sum(record.cost for record in zipped.history.layers) < 1e-9


def member(model: nn.Module) -> Member:
    return Member(tz.Task("a", model, [torch.randint(WORDS, (4, PLACES))]), 0)


def stream(of: Member) -> int:
    return int(of.structure.space_of(of.structure.axes["table.weight"][1])[0])  # type: ignore[arg-type]


def test_unlikeness_by_hand() -> None:
    """Tables and norms are compared number by number, relative to their mean squares; layers, which move, are not."""
    one, other = member(network(blocks=1)), member(network(blocks=1))
    wanted = np.zeros((WIDTH, WIDTH))
    for name in ("table.weight", "blocks.0.norm.weight", "out.weight"):
        a, b = (each.network.get_parameter(name).detach().numpy().reshape(-1, WIDTH).T for each in (one, other))
        wanted += ((a[:, None] - b[None]) ** 2).sum(2) / ((np.sum(a**2) + np.sum(b**2)) / (2 * WIDTH))
    np.testing.assert_allclose(unlikeness(one, stream(one), other, stream(other)), wanted, rtol=1e-9)


def test_nothing_to_compare() -> None:
    one, other = member(network(nn.Identity, blocks=1, tied=True)), member(network(blocks=1))
    space = next(layer.spaces[0] for layer in other.structure.layers if layer.name == "blocks.0.up")
    assert unlikeness(one, stream(one), other, space) is None
