from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from taskzip.errors import InputError
from taskzip.tasks.task import Task, device_of, input_tensors, samples_in


class Echo(nn.Module):
    """Answers with what it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def task(data: Any, **options: Any) -> Task:
    return Task("digits", Echo(), data, **options)


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


# --- how a network is called --------------------------------------------------------------------------------------


def test_a_batch_that_is_a_tensor() -> None:
    (given,), kwargs = task([X]).run(Echo(), X)
    assert torch.equal(given, X) and not kwargs
    assert task([X]).targets(X) is None


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_inputs_and_targets(kind: type) -> None:
    batch = kind([X, Y])
    args, kwargs = task([batch]).run(Echo(), batch)
    assert len(args) == 1 and torch.equal(args[0], X) and not kwargs
    assert task([batch]).targets(batch) is Y


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs(kind: type) -> None:
    batch = (kind([X, 2 * X]), Y)
    args, _ = task([batch]).run(Echo(), batch)
    assert torch.equal(args[0], X) and torch.equal(args[1], 2 * X)
    assert task([batch]).targets(batch) is Y


def test_inputs_without_targets() -> None:
    args, _ = task([(X,)]).run(Echo(), (X,))
    assert torch.equal(args[0], X)
    assert task([(X,)]).targets((X,)) is None


def test_a_dict_is_keywords() -> None:
    batch = {"pixels": X, "labels": Y}
    args, kwargs = task([batch]).run(Echo(), batch)
    assert args == () and list(kwargs) == list(batch)
    assert all(torch.equal(kwargs[name], batch[name]) for name in batch)
    assert task([batch]).targets(batch) is Y
    assert task([batch]).targets({"pixels": X}) is None


def test_a_forward_of_its_own_comes_first() -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"] * 2)

    args, _ = task([{"x": X}], forward=forward).run(Echo(), {"x": X})
    assert torch.equal(args[0], 2 * X)


class Writes(nn.Module):
    """Normalises its input in place, as preprocessing does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1.0).div_(2.0)


@pytest.mark.parametrize("batch", [X, (X, Y), [X], ([X], Y), {"x": X}, UserDict(x=X)])
def test_a_network_gets_a_copy_of_its_input(batch: Any) -> None:
    before = X.clone()
    assert torch.equal(task([batch]).run(Writes(), batch), (X - 1) / 2)
    assert torch.equal(X, before)


def test_a_forward_of_its_own_gets_a_copy_too() -> None:
    before = X.clone()
    run = task([X], forward=lambda model, batch: model(batch.mul_(2))).run
    assert torch.equal(run(Writes(), X), X - 0.5)
    assert torch.equal(X, before)


def test_inputs_of_inference_mode_can_be_learned_from() -> None:
    with torch.inference_mode():
        x = torch.ones(2, 3)
    layer = nn.Linear(3, 1)
    task([x]).run(layer, x).sum().backward()
    assert layer.weight.grad is not None


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, wanted",
    [
        (X, [X]),
        ((X, Y), [X]),
        ([X, Y], [X]),
        (((X, Y), Y), [X, Y]),
        ({"a": X, "b": Y}, [X, Y]),
        (OrderedDict(a=X), [X]),
        ("text", []),
    ],
)
def test_the_inputs_of_a_batch(batch: Any, wanted: list[Tensor]) -> None:
    found = input_tensors(batch)
    assert [t.data_ptr() for t in found] == [t.data_ptr() for t in wanted]
    if wanted:
        assert samples_in(batch) == 6


def test_samples_are_counted() -> None:
    assert task([X, (X[:2], Y[:2]), {"a": X[:1]}]).check_data() == 9
    assert task(DataLoader(TensorDataset(X, Y), batch_size=4)).check_data() == 6


def test_data_can_be_read_again_and_again() -> None:
    mine = task(DataLoader(TensorDataset(X, Y), batch_size=4))
    for _ in range(2):
        assert [len(batch[0]) for batch in mine.batches()] == [4, 2]


def test_batches_go_to_the_device_of_the_model() -> None:
    model = nn.Linear(2, 1, device="meta")
    (batch,) = Task("digits", model, [{"x": X, "more": (Y, "text")}]).batches()
    assert batch["x"].device.type == batch["more"][0].device.type == "meta"
    assert batch["more"][1] == "text"


def test_any_mapping_is_a_dict() -> None:
    """Tokenisers and collators give mappings that are no dict (transformers' BatchEncoding is a UserDict)."""
    mine = Task("digits", Echo(), [UserDict(x=X)])
    assert mine.check_data() == 6
    (batch,) = mine.batches()
    assert torch.equal(mine.run(Echo(), batch)[1]["x"], X)


def test_device_of_a_model() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a+b", "a@b", "ä", "a/b", None, 3, "a\n", "_modules"])
def test_a_name_that_cannot_be_used(name: Any) -> None:
    with pytest.raises(InputError, match=r"task name .* cannot be used"):
        Task(name, Echo(), [X])


@pytest.mark.parametrize("name", ["keys", "forward", "items", "train", "training", "class", "None"])
def test_a_name_that_torch_needs(name: str) -> None:
    with pytest.raises(InputError, match=f"task name '{name}' is .*: choose another name"):
        Task(name, Echo(), [X])


@pytest.mark.parametrize("name", ["digits", "Digits-2", "a_b", "0", "spec", "order0"])
def test_a_name_that_can_be_used(name: str) -> None:
    assert Task(name, Echo(), [X]).name == name


@pytest.mark.parametrize("model", [None, lambda x: x, nn.Linear, "resnet18"])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(InputError, match=r"task 'digits': model must be a torch nn\.Module, got"):
        Task("digits", model, [X])


def test_one_tensor_as_data() -> None:
    with pytest.raises(InputError, match=r"data is one tensor of shape \(6, 2\), not batches"):
        task(X)


@pytest.mark.parametrize("data", [5, None, "mnist", lambda: [X]])
def test_data_that_cannot_be_read(data: Any) -> None:
    with pytest.raises(InputError, match="data must be a re-iterable of batches, got"):
        task(data)


@pytest.mark.parametrize("data", [iter([X]), (x for x in [X]), map(len, [X]), zip([X], [Y], strict=True)])
def test_data_that_can_be_read_only_once(data: Any) -> None:
    with pytest.raises(InputError, match="can be read only once, and zipping reads it several times"):
        task(data)


@pytest.mark.parametrize("data", [[], [X[:0]], [(X[:0], Y[:0]), (X[:0], Y[:0])]])
def test_no_data(data: Any) -> None:
    with pytest.raises(InputError, match="task 'digits': the calibration data are empty"):
        task(data).check_data()


@pytest.mark.parametrize("bad", ["text", 3, {"a": "text"}, ("text", Y), torch.tensor(3.0), [], X.numpy()])
def test_a_batch_without_samples(bad: Any) -> None:
    kind = type(bad).__name__
    with pytest.raises(InputError, match=f"task 'digits': batch 1 is a {kind} without a tensor of samples"):
        task([X, bad]).check_data()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value: float) -> None:
    bad = X.clone()
    bad[2, 1] = value
    with pytest.raises(InputError, match="task 'digits': batch 1 of the calibration data has NaN or infinite values"):
        task([X, {"x": X, "y": bad}]).check_data()
    assert task([(X, bad)]).check_data() == 6  # targets are none of zipping's business
