"""Layers of unrelated networks are put together by what they are, and the summary says which."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz


class Stages(nn.Module):
    """A small residual network: stages of blocks, wider from stage to stage; `prefix` changes all names."""

    def __init__(self, blocks: tuple[int, ...], width: int = 4, prefix: str = "") -> None:
        super().__init__()
        widths = [width * 2**k for k in range(len(blocks))]
        self.net = nn.ModuleDict({f"{prefix}stem": nn.Conv2d(1, width, 3, padding=1)})
        self.order: list[tuple[str, str, str | None]] = []
        for k, count in enumerate(blocks):
            for b in range(count):
                reads = widths[max(k - 1, 0)] if b == 0 else widths[k]
                first, second = f"{prefix}{k}_{b}_first", f"{prefix}{k}_{b}_second"
                self.net[first] = nn.Conv2d(reads, widths[k], 3, 1 if reads == widths[k] else 2, padding=1)
                self.net[second] = nn.Conv2d(widths[k], widths[k], 3, padding=1)
                skip = None if reads == widths[k] else f"{prefix}{k}_{b}_skip"
                if skip:
                    self.net[skip] = nn.Conv2d(reads, widths[k], 1, 2)
                self.order.append((first, second, skip))
        self.head = nn.Linear(widths[-1], 3)
        self.stem = f"{prefix}stem"

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[self.stem](x)
        for first, second, skip in self.order:
            h = F.relu(x)
            x = (self.net[skip](h) if skip else x) + self.net[second](F.relu(self.net[first](h)))
        return self.head(F.relu(x).mean((2, 3)))


def found(models: list[nn.Module], x: Tensor, **options: object) -> tz.ZippedModel:
    tasks = [tz.Task("abc"[t], model.eval(), [x]) for t, model in enumerate(models)]
    return tz.zip(tasks, **{"share": 1.0, "progress": False, **options})  # type: ignore[arg-type]


def pairs(zipped: tz.ZippedModel) -> set[tuple[str, ...]]:
    return {record.names for record in zipped.history.layers if "" not in record.names}


def test_residual_networks_of_different_depth_under_other_names() -> None:
    """Stage with stage, the layers of a block with those of one block."""
    shallow, deep = Stages((1, 1, 1)), Stages((2, 2, 2), prefix="x")
    zipped = found([shallow, deep], torch.randn(9, 1, 8, 8))
    together = dict(pairs(zipped))
    assert together["stem"[:0] + "net.stem"] == "net.xstem" and together["head"] == "head"
    for name, other in together.items():
        if name.startswith("net.") and "stem" not in name:
            stage, _, layer = name[4:].split("_")
            assert other[5:].split("_")[0] == stage and other.endswith(layer)
    assert len(together) == len(shallow.net) + 1
    assert all(record.shared for record in zipped.history.layers if "" not in record.names and record.name != "head")
    by_order = found([shallow, deep], torch.randn(9, 1, 8, 8), layers="order")
    assert zipped.parameter_count() < by_order.parameter_count()


def test_what_the_names_of_blocks_say_counts() -> None:
    names = pairs(found([Stages((3,)), Stages((2,))], torch.randn(9, 1, 6, 6)))
    assert {("net.0_1_first", "net.0_1_first"), ("net.0_0_second", "net.0_0_second")} <= names


def test_a_convolution_is_not_put_together_with_a_head() -> None:
    """As many layers on both sides, of other kinds: by order a 1 x 1 convolution would meet a head."""

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
            self.c, self.head = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x).relu()).relu()).relu()).mean((2, 3))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
            self.three, self.out = nn.Linear(8, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.three(self.two(self.one(x).relu()).relu().mean((2, 3))).relu())

    zipped = found([Bottleneck(), Plain()], torch.randn(9, 1, 6, 6))
    assert ("a", "one") in pairs(zipped) and not {("b", "two"), ("head", "out"), ("c", "three")} & pairs(zipped)
    assert "Put together: a with one." in zipped.summary()
    shared = {record.names: record.shared for record in zipped.history.layers}
    assert shared["a", "one"] == 5


def test_what_was_put_together_does_not_depend_on_the_order_of_the_tasks() -> None:
    models = [Stages((1, 2)), Stages((2, 1), prefix="x"), Stages((1, 1), prefix="y")]
    x = torch.randn(6, 1, 8, 8)
    seen = set()
    for order in itertools.permutations(range(3)):
        zipped = found([models[t] for t in order], x, share=0.5)
        place = [order.index(t) for t in range(3)]
        names = frozenset(tuple(record.names[k] for k in place) for record in zipped.history.layers)
        seen.add((names, zipped.parameter_count()))
    assert len(seen) == 1


def test_the_same_architecture_is_put_together_layer_by_layer() -> None:
    for names in pairs(found([Stages((2, 1)), Stages((2, 1), width=6)], torch.randn(6, 1, 8, 8))):
        assert names[0] == names[1]


def test_inspect_says_of_tasks_what_zip_puts_together() -> None:
    models, x = [Stages((1, 1)), Stages((2, 1), prefix="x")], torch.randn(6, 1, 8, 8)
    seen = tz.inspect([tz.Task(name, model.eval(), [x]) for name, model in zip("ab", models, strict=True)])
    lines = [line.split() for line in str(seen).splitlines()]
    assert lines[0] == ["a", "b"] and ["net.stem", "net.xstem"] in lines
    records = found(models, x).history.layers
    assert [tuple(line) for line in lines[1:]] == [tuple(name or "-" for name in record.names) for record in records]
    for wrong in (3, [models[0]], "ab"):
        with pytest.raises(tz.InputError, match="a network and an example input, or a list of"):
            tz.inspect(wrong)  # type: ignore[call-overload]
