"""Forwards that wait at layers read what new ones would read, run everything once, and leave nothing behind."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from greenlet import greenlet
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import Structure, analyse
from taskzip.observing.suspension import MEMORY, Forward, Forwards
from taskzip.tasks.batches import Kept
from taskzip.zipping.members import Member

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Whatever a test does, it leaves torch's state as it was."""
    yield
    assert torch.is_grad_enabled()


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4),
        nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip


class Twice(nn.Module):
    """A layer that runs twice, one that runs before layers that were made before it, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.twice, self.first = nn.Linear(7, 3), nn.Linear(7, 7), nn.Linear(4, 7)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = x + self.act(self.twice(x))
        return self.out(x - self.act(self.twice(1 - x)))


class Attention(nn.Module):
    """Inside `nn.MultiheadAttention` functions of torch run with function modes off."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act = nn.Linear(4, 8), nn.ReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x.unflatten(1, (2, 2)).repeat(1, 1, 2))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(self.act(x).mean(1))


class Remembers(nn.Module):
    """What a layer gives lies in an attribute of the network until a later one takes it, as fastai's U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(12, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x).relu()
        x = self.second(self.kept).relu()
        return self.out(self.third(torch.cat([x, self.kept], 1)).relu())


class Clears(Remembers):
    """It also takes away what lay there."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.first(x).relu()
        x = self.third(torch.cat([self.second(self.kept).relu(), self.kept], 1)).relu()
        del self.kept
        return self.out(x)


class Sizes(Remembers):
    """What it keeps is the same for batches of one size, and another one for the last."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = len(x)
        x = self.second(self.first(x).relu()).relu()
        return self.out(self.third(torch.cat([x, x * self.kept], 1)).relu())


class Draws(Remembers):
    """It draws from a generator of its own, which each forward begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        self.generator.manual_seed(1)
        x = self.second(self.first(x).relu()).relu()
        x = x + torch.rand(6, generator=self.generator, dtype=x.dtype)
        return self.out(self.third(torch.cat([x, x], 1)).relu())


class Buffers(Remembers):
    """What it keeps is a buffer, which is put back to what it was behind every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.mean = x.mean(0)
        x = self.second(x).relu()
        return self.out(self.third(torch.cat([x, x - self.mean], 1)).relu())


AROUND: contextvars.ContextVar[float] = contextvars.ContextVar("around", default=0.0)


class Asks(Remembers):
    """It asks for what the caller has set."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu() * AROUND.get()).relu()
        return self.out(self.third(torch.cat([x, x], 1)).relu())


class Opens(nn.Module):
    """Some of its layers run inside of what it opens."""

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.out = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        with self.what():
            x = self.third(self.second(x).relu()).relu()
        return self.out(x)


def opened(what: Callable[[], Any]) -> Callable[[], nn.Module]:
    return partial(Opens, what)


VECTORS, IMAGES = (4,), (1, 6, 6)
FORMS: list[tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (mlp, VECTORS, {}),
    (mlp, VECTORS, {"compensate": False, "retrain": 3}),
    (mlp, VECTORS, {"cross": False}),
    (cnn, IMAGES, {}),
    (cnn, IMAGES, {"batch_norm": "fold"}),
    (Twice, VECTORS, {}),
    (Twice, VECTORS, {"residual": "independent"}),
    (Attention, VECTORS, {}),
    (Remembers, VECTORS, {}),
    (Clears, VECTORS, {}),
    (Sizes, VECTORS, {}),
    (Draws, VECTORS, {}),
    (opened(torch.no_grad), VECTORS, {}),
    (opened(warnings.catch_warnings), VECTORS, {}),
    (opened(partial(contextlib.redirect_stdout, io.StringIO())), VECTORS, {}),
]


def tasks(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[tz.Task]:
    """Two networks, and five batches for each, the last one smaller."""
    mixed = [some(46, *shape).flatten(1) @ some(torch.Size(shape).numel(), torch.Size(shape).numel()) for _ in "ab"]
    labels = torch.arange(46) % 3
    data = [list(zip(x.reshape(46, *shape).split(10), labels.split(10), strict=True)) for x in mixed]
    return [tz.Task(name, make().to(DOUBLE).eval(), each) for name, each in zip("ab", data, strict=True)]


def zipped_with(memory: int, given: list[tz.Task], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tz.ZippedModel:
    monkeypatch.setattr("taskzip.zipping.members.MEMORY", memory)
    return tz.zip(given, **{"share": 0.7, "progress": False, "max_rows": 20, **options})


@pytest.mark.parametrize("make, shape, options", FORMS)
def test_forwards_that_wait_give_what_new_ones_give(
    make: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, stdout, linear = tasks(make, shape), sys.stdout, F.linear
    wanted = zipped_with(0, given, monkeypatch, **options)
    found = zipped_with(MEMORY, given, monkeypatch, **options)
    assert list(found.state_dict()) == list(wanted.state_dict())
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-9, atol=1e-9)
    assert sys.stdout is stdout and F.linear is linear


def test_buffers_that_a_forward_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks(Buffers, VECTORS)[0]
    found = []
    for memory in (0, MEMORY):
        monkeypatch.setattr("taskzip.zipping.members.MEMORY", memory)
        found.append(tz.prune(task, keep=0.7, progress=False).state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-9)


# --- how often things run ---------------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches on which forwards that may wait have begun."""
    seen: list[int] = []
    run = Forward._run

    def counted(forward: Forward) -> Any:
        seen.append(len(forward.batch[0]))
        return run(forward)

    monkeypatch.setattr(Forward, "_run", counted)
    return seen


CHECK = 2  # forwards of a few samples by which each network shows that its forwards can wait


@pytest.mark.parametrize(
    "make, shape, rounds",
    [
        (mlp, VECTORS, 1),
        (cnn, IMAGES, 1),
        (Attention, VECTORS, 1),
        (Twice, VECTORS, 2),
        (opened(torch.no_grad), VECTORS, 1),
    ],
)
def test_every_network_runs_once(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    rounds: int,
    begun: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But once more behind a layer that ran twice: its first call was made with the old weights."""
    zipped_with(MEMORY, tasks(make, shape), monkeypatch)
    assert len(begun) == 2 * (CHECK + 5 * rounds)


@pytest.mark.parametrize("make", [Remembers, Clears, opened(warnings.catch_warnings)])
def test_where_forwards_cannot_wait_each_layer_begins_anew(
    make: Callable[[], nn.Module], begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the one that ran last finds what it has left."""
    zipped_with(MEMORY, tasks(make, VECTORS), monkeypatch)
    assert 2 * (CHECK + 1 + 4 * 4) <= len(begun) <= 2 * (CHECK + 5 * 4)


def test_every_layer_runs_once_in_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where torch computes them, on all samples; checks and the first batch by itself are smaller."""
    rows: dict[tuple[int, ...], int] = {}
    linear = F.linear

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(input) == 40:
            rows[tuple(weight.shape)] = rows.get(tuple(weight.shape), 0) + 1
        return linear(input, weight, bias)

    given = [tz.Task(name, mlp().to(DOUBLE).eval(), [some(4, 4), some(40, 4)]) for name in "ab"]
    calls = Forward._call

    def call(forward: Forward, of: Any) -> Tensor:
        return calls(forward, of._replace(func=counted))

    monkeypatch.setattr(Forward, "_call", call)
    tz.zip(given, share=1.0, progress=False)
    assert rows == {(8, 4): 2, (7, 8): 2, (6, 7): 2}  # and the last one need not run at all


class Loader:
    """Says how often it was read."""

    def __init__(self, data: list[Tensor]) -> None:
        self._data, self.passes = data, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        yield from self._data


@pytest.mark.parametrize("memory, passes", [(3 * 160, 1), (3 * 160 - 1, 3)])
def test_a_loader_is_read_once_if_its_batches_can_be_kept(memory: int, passes: int) -> None:
    loader = Loader([some(5, 4) for _ in range(3)])
    kept = Kept(loader, memory + 1)
    for _ in range(3):
        assert all(map(torch.equal, kept, loader._data))
    assert loader.passes == passes


def test_what_a_loader_writes_over_is_kept() -> None:
    class Refills:
        def __iter__(self) -> Iterator[Tensor]:
            batch = torch.empty(3)
            for k in range(4):
                yield batch.fill_(k)

    kept = Kept(Refills())
    list(kept)
    assert [float(batch[0]) for batch in kept] == [0, 1, 2, 3]


def test_forwards_see_the_callers_context() -> None:
    AROUND.set(2.0)
    given = tasks(Asks, VECTORS)
    zipped = tz.zip(given, share=0.0, progress=False)
    x = given[0].data[0][0]
    with torch.no_grad():
        torch.testing.assert_close(zipped["a"](x), given[0].model(x))


def test_a_pass_that_is_broken_off_keeps_nothing() -> None:
    loader = Loader([some(5, 4) for _ in range(3)])
    kept = Kept(loader)
    next(iter(kept))
    assert len(list(kept)) == len(list(kept)) == 3
    assert loader.passes == 2


# --- what a forward may use -------------------------------------------------------------------------------------------


def structure_of(task: tz.Task, model: nn.Module) -> Structure:
    return analyse(model, next(iter(task.data)), task.run)


@pytest.mark.parametrize("make, shape", [(mlp, VECTORS), (cnn, IMAGES), (Twice, VECTORS), (Attention, VECTORS)])
def test_whatever_is_changed_meanwhile_reads_are_those_of_a_new_forward(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        (task, _), rolls = tasks(make, shape), torch.Generator().manual_seed(seed)
        model = task.model
        structure = structure_of(task, model)
        waiting, new = (Forwards(task, model, model.get_parameter, memory) for memory in (MEMORY, 0))
        for _ in range(10):
            layer = structure.layers[int(torch.randint(len(structure.layers), (), generator=rolls))]
            given, fresh = (list(each.reads(layer, outputs=True)) for each in (waiting, new))
            for (_, reads), (_, wanted) in zip(given, fresh, strict=True):
                for read, other in zip(reads, wanted, strict=True):
                    assert torch.equal(read.x, other.x) and torch.equal(read.z, other.z)
            tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
            tensor = tensors[int(torch.randint(len(tensors), (), generator=rolls))]
            match int(torch.randint(4, (), generator=rolls)):
                case 0:
                    with torch.no_grad():
                        tensor.mul_(1.5)
                case 1:
                    tensor.data = tensor.data * 1.5
                case 2:
                    space = int(torch.randint(len(structure.spaces), (), generator=rolls))
                    order = torch.randperm(len(structure.spaces[space].units), generator=rolls).numpy()
                    structure.reorder(model, space, order)
        waiting.close()


def test_no_more_is_held_than_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (task, _) = tasks(cnn, IMAGES)
    layers = structure_of(task, task.model).layers
    for memory in (0, 10_000, 40_000, 10**6):
        forwards, most = Forwards(task, task.model, task.model.get_parameter, memory), 0
        for layer in layers:
            for _ in forwards.reads(layer, outputs=False):
                most = max(most, sum(each.nbytes for each in forwards._waiting.values()))
            most = max(most, sum(each.nbytes for each in forwards._waiting.values()))
        assert most <= memory
        assert (most > 0) == (memory > 0)
        forwards.close()


def test_what_is_alive_in_a_forward_counts() -> None:
    """Of a stream the sum and the branch, not what is gone, nor the network's own tensors."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 100, dtype=DOUBLE), nn.Linear(100, 100, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.first(x)
            return stream + self.second(stream.relu().relu())

    task = tz.Task("a", Stream(), [some(10, 4)])
    forwards = Forwards(task, task.model, task.model.get_parameter)
    list(forwards.reads(structure_of(task, task.model).layers[1], outputs=False))
    (forward,) = forwards._waiting.values()
    inputs, hidden = 10 * 4 * 8, 10 * 100 * 8
    assert 2 * hidden <= forward.nbytes <= 2 * hidden + 2 * inputs
    forwards.close()


# --- nothing is left behind -------------------------------------------------------------------------------------------


def waiting_greenlets() -> int:
    return sum(type(each) is greenlet and bool(each) for each in gc.get_objects())


class Stops(nn.Module):
    """Raises an error the n-th time that it runs."""

    left = 0
    error: type[BaseException] = KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        Stops.left -= 1
        if Stops.left == 0:
            raise Stops.error
        return x.relu()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("runs", [21, 26, 32])
def test_an_interrupted_zip_leaves_nothing_behind(runs: int, error: type[BaseException]) -> None:
    before = waiting_greenlets()
    make = lambda: nn.Sequential(nn.Linear(4, 8), Stops(), nn.Linear(8, 7), Stops(), nn.Linear(7, 3))  # noqa: E731
    given, linear = tasks(make, VECTORS), F.linear
    Stops.left, Stops.error = runs + 24, error
    with pytest.raises(error):
        tz.zip(given, share=1.0, progress=False)
    assert waiting_greenlets() == before
    assert torch.is_grad_enabled() and F.linear is linear
    Stops.left = 0
    tz.zip(given, share=1.0, progress=False)


def test_what_a_forward_has_opened_is_closed_when_it_ends_early() -> None:
    closed: list[int] = []

    class Tidy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(4, 6, dtype=DOUBLE), nn.Linear(6, 3, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            try:
                with torch.no_grad():
                    return self.out(self.first(x).relu())
            finally:
                closed.append(len(x))

    task = tz.Task("a", Tidy(), [some(5, 4), some(3, 4)])
    first = structure_of(task, task.model).layers[0]
    closed.clear()
    forwards = Forwards(task, task.model, task.model.get_parameter)
    list(forwards.reads(first, outputs=False))
    assert closed == []
    forwards.close()
    assert sorted(closed) == [3, 5]
    assert torch.is_grad_enabled()


def test_a_network_whose_forwards_cannot_wait_is_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "taskzip"):
        member = Member(tasks(opened(warnings.catch_warnings), VECTORS)[0], 0)
    assert "cannot wait for each other" in caplog.text
    assert member.forwards._memory == 0
    assert Member(tasks(mlp, VECTORS)[0], 0).forwards._memory == MEMORY
