"""What the original networks answered is remembered, and nothing but the time that it takes depends on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.observing.answers import MEMORY, Answers
from taskzip.observing.layer_calls import run_to
from taskzip.tasks.batches import Kept
from taskzip.tasks.task import samples_in

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


# --- the memory -------------------------------------------------------------------------------------------------------


def filled(memory: int, batches: list[Any], chunks: dict[str, list[list[Tensor]]]) -> Answers:
    """Answers by layer, batch and chunk, kept in the order in which a survey keeps them: all layers of a batch."""
    answers = Answers(memory)
    for index, batch in enumerate(batches):
        answers.start(batch)
        for layer, kept in chunks.items():
            for chunk in kept[index]:
                answers.keep(layer, chunk)
    return answers


def same(found: list[Tensor] | None, wanted: list[Tensor]) -> bool:
    return found is not None and len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_every_chunk_comes_back_in_its_place() -> None:
    batches = [some(3, 4), (some(5, 4), torch.arange(5)), {"x": some(2, 4), "scale": some(2)}]
    chunks = {"one": [[some(2, 3), some(1, 3)], [some(5, 3)], [some(2, 3)]], "two": [[some(3, 2)], [], [some(1, 2)]]}
    answers = filled(MEMORY, batches, chunks)
    for layer, index in itertools.product(("one", "two"), (2, 0, 1, 0)):
        found = answers.recall(layer, batches[index], index)
        if chunks[layer][index]:
            assert same(found, chunks[layer][index])
        else:
            assert found is None
    assert answers.recall("three", batches[0], 0) is None


def test_no_more_batches_than_there_were() -> None:
    batch = some(3, 4)
    answers = filled(MEMORY, [batch], {"one": [[some(3, 2)]]})
    assert answers.recall("one", batch, 1) is None
    assert Answers().recall("one", batch, 0) is None


@pytest.mark.parametrize(
    "batch, changed",
    [
        (torch.zeros(3, 4), lambda x: x.index_fill(0, torch.tensor(2), 1e-30)),
        (torch.arange(12.0).reshape(3, 4), lambda x: x[[1, 0, 2]]),
        (torch.arange(12.0).reshape(3, 4), lambda x: x.mT.reshape(3, 4)),
        (torch.arange(12).reshape(3, 4), lambda x: x + 1),
        (torch.zeros(3, 4, dtype=torch.bool), lambda x: ~x),
        (torch.zeros(3, 4, dtype=torch.bfloat16), lambda x: x + 1),
        ((some(3, 4), some(3, 4)), lambda pair: (pair[0] + 1, pair[1])),
        (((some(3, 4), some(3, 4)), None), lambda pair: ((pair[0][0], pair[0][1] + 1), None)),
        (((some(3, 4), some(3, 4)), None), lambda pair: ((pair[0][0] + 1, pair[0][1]), None)),
        ({"x": some(3, 4), "y": some(3, 4)}, lambda each: {**each, "y": each["y"] + 1}),
    ],
)
def test_another_batch_is_not_mistaken_for_the_same(batch: Any, changed: Callable[[Any], Any]) -> None:
    answer = [some(3, 2)]
    answers = filled(MEMORY, [batch], {"one": [answer]})
    assert answers.recall("one", changed(batch), 0) is None
    assert same(answers.recall("one", batch, 0), answer)


def test_the_targets_of_a_batch_do_not_matter_nor_how_its_inputs_lie() -> None:
    x = some(3, 4)
    answers = filled(MEMORY, [(x, torch.zeros(3))], {"one": [[some(3, 2)]]})
    assert answers.recall("one", (x.clone(), torch.ones(3)), 0) is not None
    assert answers.recall("one", [x.mT.contiguous().mT], 0) is not None
    assert answers.recall("one", x.requires_grad_(), 0) is not None


def test_batches_are_told_apart_by_their_place() -> None:
    """A loader that gives the same batches in another order gives others."""
    one, other = some(3, 4), some(3, 4)
    first, second = [some(3, 2)], [some(3, 2)]
    answers = filled(MEMORY, [one, other], {"one": [first, second]})
    assert answers.recall("one", other, 0) is None
    assert answers.recall("one", one, 1) is None
    assert same(answers.recall("one", other, 1), second)


def test_a_layer_that_is_too_large_is_not_kept_and_leaves_its_place_to_others() -> None:
    """Chunks of 80 bytes: the large layer has 3 per batch, the small ones 1. The first batch takes all the memory."""
    small, batches = ("one", "two", "three"), [some(2, 4), some(2, 4)]
    chunks = {"large": [[some(2, 5) for _ in range(3)] for _ in batches]}
    chunks |= {name: [[some(2, 5)] for _ in batches] for name in small}
    answers = filled(6 * 80, batches, chunks)
    for index, batch in enumerate(batches):
        assert answers.recall("large", batch, index) is None
        for name in small:
            assert same(answers.recall(name, batch, index), chunks[name][index])


@pytest.mark.parametrize("memory, kept", [(0, False), (79, False), (80, True), (81, True)])
def test_the_budget_is_kept_to_the_byte(memory: int, kept: bool) -> None:
    batch = some(2, 4)
    answers = filled(memory, [batch], {"one": [[some(2, 5)]]})
    assert (answers.recall("one", batch, 0) is not None) == kept


def test_a_layer_that_is_forgotten_leaves_its_place_to_others() -> None:
    batch = some(2, 4)
    answers = filled(80, [batch], {"one": [[some(2, 5)]]})
    answers.forget("one")
    answers.forget("never known")
    assert answers.recall("one", batch, 0) is None
    wanted = some(2, 5)
    answers.keep("other", wanted)
    assert same(answers.recall("other", batch, 0), [wanted])
    answers.keep("third", some(1, 1))  # full
    assert answers.recall("third", batch, 0) is None
    assert same(answers.recall("other", batch, 0), [wanted])


def test_after_any_history_no_more_is_held_than_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    for memory in (0, 200, 1000, 3000):
        answers, batches = Answers(memory), []
        for _ in range(6):
            batches.append(some(2, 2))
            answers.start(batches[-1])
            for layer in "abcd":
                for _ in range(int(torch.randint(3, (), generator=generator))):
                    answers.keep(layer, some(int(torch.randint(1, 6, (), generator=generator)), 3))
            answers.forget("abcd"[int(torch.randint(4, (), generator=generator))])
            held = [
                answers.recall(layer, batch, index) or []
                for layer, (index, batch) in itertools.product("abcd", enumerate(batches))
            ]
            assert sum(chunk.nbytes for chunks in held for chunk in chunks) <= memory


# --- zipping with and without it --------------------------------------------------------------------------------------


class Sums(nn.Module):
    """A layer that runs twice, in-place activations, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(4, 7), nn.Linear(7, 7)
        self.act, self.out = nn.ReLU(inplace=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = x + self.act(self.twice(x))
        return self.out(x - self.act(self.twice(1 - x)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(45, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def vectors() -> Tensor:
    return some(50, 4) @ some(4, 4) + 0.3


def images() -> Tensor:
    return some(23, 1, 6, 6)


def run_zip(models: list[nn.Module], data: list[Any], **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task("ab"[i], m, d) for i, (m, d) in enumerate(zip(models, data, strict=True))]
    return tz.zip(tasks, **{"share": 0.6, "progress": False, "max_rows": None, **options})


def assert_same(zipped: tz.ZippedModel, wanted: tz.ZippedModel) -> None:
    state = wanted.state_dict()
    assert list(zipped.state_dict()) == list(state)
    for key, value in zipped.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-12, atol=1e-12)


def forget_all(monkeypatch: pytest.MonkeyPatch, memory: int = 0) -> None:
    monkeypatch.setattr("taskzip.zipping.members.Answers", partial(Answers, memory))


@pytest.mark.parametrize(
    "make, inputs, memory, options",
    [
        (mlp, vectors, 3000, {"max_rows": 20}),
        (cnn, images, 3000, {"batch_norm": "fold", "max_rows": 30}),
        (cnn, images, 0, {"compensate": False, "share": 1.0}),
        (Sums, vectors, 0, {"max_rows": 25, "residual": "independent"}),
    ],
)
def test_remembered_answers_are_those_that_the_network_gives_again(
    make: Callable[[], nn.Module],
    inputs: Callable[[], Tensor],
    memory: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, data = [make().to(DOUBLE).eval() for _ in "ab"], [list(inputs().split(9)) for _ in "ab"]
    remembered = run_zip(models, data, **options)
    forget_all(monkeypatch, memory)  # all of them, or some layers
    assert_same(run_zip(models, data, **options), remembered)


def test_the_two_budgets_differ_in_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above compares what it says."""
    recalled = []
    recall = Answers.recall

    def watched(self: Answers, *args: Any) -> list[Tensor] | None:
        found = recall(self, *args)
        recalled.append(found is not None)
        return found

    monkeypatch.setattr(Answers, "recall", watched)
    models, data = [mlp().to(DOUBLE) for _ in "ab"], [list(vectors().split(9)) for _ in "ab"]
    seen = []
    for memory in (MEMORY, 3000):
        recalled.clear()
        forget_all(monkeypatch, memory)
        run_zip(models, data)
        seen.append(set(recalled))
    assert seen == [{True}, {True, False}]


class Shuffled:
    """Other batches on every pass, drawn from torch's global generator; some begin with the same, some add noise."""

    def __init__(self, x: Tensor, size: int, *, fixed: int = 0, noise: float = 0.0) -> None:
        self._x, self._size, self._fixed, self._noise = x, size, fixed, noise

    def __iter__(self) -> Iterator[Tensor]:
        rest = torch.randperm(len(self._x) - self._fixed) + self._fixed
        x = self._x[torch.cat([torch.arange(self._fixed), rest])]
        x[self._fixed :] += self._noise * torch.randn_like(x[self._fixed :])
        yield from x.split(self._size)


@pytest.mark.parametrize("make, inputs, fixed, noise", [(Sums, vectors, 0, 0.0), (cnn, images, 9, 0.1)])
def test_a_loader_that_gives_other_batches_on_every_pass(
    make: Callable[[], nn.Module],
    inputs: Callable[[], Tensor],
    fixed: int,
    noise: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, data = [make().to(DOUBLE).eval() for _ in "ab"], [inputs() for _ in "ab"]
    loaders = [Shuffled(x, 9, fixed=fixed, noise=noise) for x in data]
    monkeypatch.setattr("taskzip.zipping.members.Kept", partial(Kept, memory=0))
    remembered = run_zip(models, loaders, ridge=0.1)
    forget_all(monkeypatch)
    assert_same(run_zip(models, loaders, ridge=0.1), remembered)
    if not noise:  # all rows are read, so that their order does not matter
        still = run_zip(models, [[x] for x in data], ridge=0.1)
        for name, x in zip("ab", data, strict=True):
            torch.testing.assert_close(remembered[name](x), still[name](x), rtol=1e-8, atol=1e-10)


# --- how often the original networks run ------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many samples of each task's data the network runs on that the joint one is compared with, run by run.

    What looks at the network's first inputs alone runs no layer.
    """
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def counted(
        task: tz.Task, model: nn.Module, layers: Any, take: Any, batch: Any, *more: Any, **of: Any
    ) -> Mapping[str, int]:
        if of.get("outputs", True):
            seen[task.name].append(samples_in(batch))
        return run_to(task, model, layers, take, batch, *more, **of)

    monkeypatch.setattr("taskzip.observing.observation.run_to", counted)
    return seen


def long_mlp(layers: int) -> nn.Module:
    hidden = [layer for _ in range(layers) for layer in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *hidden, nn.Linear(6, 3)).to(DOUBLE)


@pytest.mark.parametrize("layers, options", [(1, {}), (4, {"aligned": True, "max_rows": 10})])
def test_the_original_network_runs_once_however_many_layers_there_are(
    layers: int, options: dict[str, Any], passes: dict[str, list[int]]
) -> None:
    models, data = [long_mlp(layers) for _ in "ab"], [list(vectors().split(9)) for _ in "ab"]
    run_zip(models, data, **options)
    assert passes["a"] == passes["b"] == [9, 9, 9, 9, 9, 5]


def test_without_memory_it_runs_once_per_layer(monkeypatch: pytest.MonkeyPatch, passes: dict[str, list[int]]) -> None:
    forget_all(monkeypatch)
    models, data = [long_mlp(3) for _ in "ab"], [list(vectors().split(9)) for _ in "ab"]
    run_zip(models, data)
    assert len(passes["a"]) == 6 * (1 + 4)  # once for all, and again for every layer behind the first


def test_where_residual_streams_are_put_into_order_it_runs_no_more_often(passes: dict[str, list[int]]) -> None:
    models, data = [Sums().to(DOUBLE) for _ in "ab"], [list(vectors().split(9)) for _ in "ab"]
    run_zip(models, data)
    assert len(passes["b"]) == 6


def test_a_loader_that_shuffles_and_is_too_large_makes_it_run_again(
    monkeypatch: pytest.MonkeyPatch, passes: dict[str, list[int]]
) -> None:
    monkeypatch.setattr("taskzip.zipping.members.Kept", partial(Kept, memory=0))
    models, data = [long_mlp(2) for _ in "ab"], [vectors(), vectors()]
    run_zip(models, [Shuffled(data[0], 9), [data[1]]])
    assert len(passes["a"]) == 6 * (1 + 4)  # once for all, and again for every layer


def test_where_nothing_is_asked_of_it_it_never_runs(passes: dict[str, list[int]]) -> None:
    """Without compensation and batch-norm, and where nothing is shared."""
    models, data = [long_mlp(2) for _ in "ab"], [[vectors()], [vectors()]]
    run_zip(models, data, compensate=False)
    run_zip(models, data, share=0.0)
    assert passes["a"] == []
