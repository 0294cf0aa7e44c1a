"""Parts that the traced call does not reach: what they may read stays, what only trains moves along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import Structure, analyse
from taskzip.tasks.task import call


class Routed(nn.Module):
    """Heads that are chosen by name."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.own = nn.Linear(6, 16), nn.Linear(16, 9)
        self.heads = nn.ModuleDict({"x": nn.Linear(9, 3), "y": nn.Linear(16, 3)})

    def forward(self, x: Tensor, head: str = "x") -> Tensor:
        h = self.trunk(x).relu()
        return self.heads["x"](self.own(h).relu()) if head == "x" else self.heads[head](h)


class Auxiliary(nn.Module):
    """A head that runs in training only, behind a pooling and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.next = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)
        self.auxiliary = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).relu()
        out = self.out(self.next(h).relu().mean((2, 3)))
        return (out, self.auxiliary(h)) if self.training else out


class Autoencoder(nn.Module):
    """A decoder that only a method of its own calls; its layers hand 10 units on to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.encode_, self.wide = nn.Linear(6, 12), nn.Linear(12, 10)
        self.decoder = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.wide(self.encode_(x).relu()).relu())

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode_(x).relu())


class Skips(nn.Module):
    """Blocks of a residual stream, of which the setting leaves some out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.stem(x)
        for block in self.blocks[:depth]:
            x = x + block(x)
        return self.out(x)


class Flattened(nn.Module):
    """A second head behind a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.other, self.out = nn.Conv2d(2, 8, 3), nn.Linear(8 * 16, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        h = self.trunk(x).relu()
        return self.other(h.flatten(1)) if other else self.out(h.mean((2, 3)))


class Conditioned(nn.Module):
    """What comes from elsewhere is added to hidden units, where there is any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kinds, self.shift = nn.Linear(6, 8), nn.Embedding(4, 8), nn.Parameter(torch.randn(12))
        self.second, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, kind: Tensor | None = None) -> Tensor:
        h = self.first(x) if kind is None else self.first(x) + self.kinds(kind)
        h = self.second(h.relu())
        return self.out((h if kind is None else h + self.shift).relu())


class Nested(nn.Module):
    """A routed network inside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.routed, self.out = nn.Linear(6, 6), Routed(), nn.Linear(3, 3)

    def forward(self, x: Tensor, head: str = "x") -> Tensor:
        return self.out(self.routed(self.stem(x).relu(), head))


VECTORS, IMAGES = torch.randn(32, 6), torch.randn(8, 2, 6, 6)

# In the nested one, `heads.y` might also be added to the other head's three units: they stay, too.
# For each: its inputs, what is not reached, the layers that stay, and the other ways in which it is called.
KINDS: dict[type[nn.Module], tuple[Tensor, str, set[str], Callable[[Any, Tensor], Any]]] = {
    Routed: (VECTORS, "heads.y", {"trunk"}, lambda m, x: m(x, "y")),
    Autoencoder: (VECTORS, "decoder.2", {"encode_"}, lambda m, x: m.decode(x)),
    Skips: (VECTORS, "blocks.2.1", {"stem", "blocks.0.3", "blocks.1.3"}, lambda m, x: m(x, 3)),
    Flattened: (IMAGES, "other", {"trunk"}, lambda m, x: m(x, True)),
    Conditioned: (VECTORS, "shift", {"first", "second"}, lambda m, x: m(x, torch.arange(len(x)) % 4)),
    Nested: (VECTORS, "routed.heads.y", {"routed.trunk", "routed.heads.x"}, lambda m, x: m(x, "y")),
}


def reordered(model: nn.Module, structure: Structure) -> Iterator[nn.Module]:
    for space, each in enumerate(structure.spaces):
        copied = copy.deepcopy(model)
        structure.reorder(copied, space, torch.randperm(len(each.units)).tolist())
        yield copied


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_may_be_read_elsewhere_stay(kind: type[nn.Module]) -> None:
    x, unreached, stays, other = KINDS[kind]
    model = kind().eval()
    structure = analyse(model, x, call)
    assert any(name.startswith(unreached) for name in structure.unreached)
    assert {layer.name for layer in structure.layers if "which no call reaches" in layer.pinned} == stays
    with torch.no_grad():
        for copied in reordered(model, structure):
            torch.testing.assert_close(copied(x), model(x))
            torch.testing.assert_close(other(copied, x), other(model, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_warning_names_what_no_call_reached(kind: type[nn.Module]) -> None:
    x, unreached, stays, _ = KINDS[kind]
    tasks = [tz.Task(name, kind().eval(), [x]) for name in "ab"]
    with pytest.warns(tz.TaskzipWarning) as caught:
        tz.zip(tasks, share=0.5, progress=False)
    said = [str(each.message) for each in caught]
    assert [each[:8] for each in said] == ["task 'a'", "task 'b'"]
    assert all(unreached in each and all(name in each for name in stays) for each in said)
    table = str(tz.inspect(kind().eval(), x))
    assert "private: no call reached it" in table and unreached in table


def test_what_is_reached_after_all_moves() -> None:
    """The way out that the warning names."""

    def both(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, "x"), model(x, "y")

    model = Routed().eval()
    found = tz.inspect(model, VECTORS, forward=both)
    assert not found.unreached and found.layer("trunk").pinned == ""
    tasks = [tz.Task(name, Routed().eval(), [VECTORS], forward=both) for name in "ab"]
    assert tz.zip(tasks, share=0.5, progress=False).history.layers[0].shared == 8
    with torch.no_grad():
        for copied in reordered(model, found):
            torch.testing.assert_close(copied(VECTORS, "y"), model(VECTORS, "y"))


def test_what_only_trains_moves_along() -> None:
    model = Auxiliary().eval()
    structure = analyse(model, IMAGES, call)
    assert not structure.unreached and all(layer.pinned == "" for layer in structure.layers[:-1])
    with torch.no_grad():
        for copied in reordered(model, structure):
            for wanted, given in zip(model.train()(IMAGES), copied.train()(IMAGES), strict=True):
                torch.testing.assert_close(given, wanted)
    assert "moves along with s0" in str(tz.inspect(model.eval(), IMAGES))
    assert "auxiliary.0" not in {layer.name for layer in structure.layers}


def test_training_that_cannot_be_followed_leaves_widths() -> None:
    class Fussy(Auxiliary):
        def forward(self, x: Tensor) -> Any:
            if self.training and float(x.sum()) > 0:
                return super().forward(-x)
            return super().forward(x)

    structure = analyse(Fussy().eval(), IMAGES, call)
    assert structure.layer("trunk").pinned == "may be read by auxiliary, which no call reaches"


def test_counters_and_numbers_are_no_unreached_parts() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
            self.register_buffer("positions", torch.arange(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.first(x)).relu())

    structure = analyse(Counts().eval(), VECTORS, call)
    assert structure.unreached == () and structure.layers[0].pinned == ""
