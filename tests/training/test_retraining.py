"""Light retraining lowers the balanced loss, in place, repeatably, and refuses what it cannot use."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskzip as tz
from taskzip.training.course import relative_adam
from taskzip.training.distillation import distillation_loss


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).eval()


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=g)
    return [(a, (a[:, :3]).argmax(1)) for a in x.split(16)]


@pytest.fixture(scope="module")
def tasks() -> list[tz.Task]:
    return [tz.Task("a", net(0), batches(0)), tz.Task("b", net(1), batches(1))]


@pytest.fixture
def zipped(tasks: list[tz.Task]) -> tz.ZippedModel:
    return tz.zip(tasks, share=1.0, balance={"a": 0.75, "b": 0.25}, progress=False)


@pytest.mark.parametrize("loss", ["labels", "distill"])
def test_losses_fall_and_the_originals_stay(zipped: tz.ZippedModel, tasks: list[tz.Task], loss) -> None:
    before = {task.name: copy.deepcopy(task.model.state_dict()) for task in tasks}
    statistics = zipped["a"][1].running_mean.clone()
    zipped["a"][3].train()
    losses = tz.retrain(zipped, tasks, steps=40, loss=loss, progress=False)
    assert len(losses) == 40
    for task in tasks:
        assert sum(step[task.name] for step in losses[-4:]) < sum(step[task.name] for step in losses[:4])
        assert all(torch.equal(v, before[task.name][k]) for k, v in task.model.state_dict().items())
        assert all(p.grad is None for p in task.model.parameters())
    assert torch.equal(zipped["a"][1].running_mean, statistics)
    assert zipped["a"][3].training and not zipped["a"].training  # modes are as they were
    assert all(p.grad is None for p in zipped.parameters())
    assert zipped.history.later[-1]["retrained"] == 40


def test_is_repeatable_and_leaves_the_global_generator_alone(zipped: tz.ZippedModel, tasks: list[tz.Task]) -> None:
    other = copy.deepcopy(zipped)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = tz.retrain(zipped, tasks, steps=5, progress=False, seed=4)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(99)
    assert tz.retrain(other, tasks, steps=5, progress=False, seed=4) == first
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in zipped.state_dict().items())


def test_steps_on_the_balanced_sum(zipped: tz.ZippedModel, tasks: list[tz.Task]) -> None:
    reference = copy.deepcopy(zipped)
    loss = sum(
        w * F.cross_entropy(reference[t.name](t.data[0][0]), t.data[0][1])
        for w, t in zip((0.75, 0.25), tasks, strict=True)
    )
    loss.backward()
    tz.retrain(zipped, tasks, steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), progress=False)
    for ours, theirs in zip(zipped.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_the_default_step_is_relative_to_each_tensor() -> None:
    large, small, zero = (nn.Parameter(torch.full((4,), v)) for v in (100.0, 0.1, 0.0))
    optimizer = relative_adam([large, small, zero], 1e-2)
    (large.sum() + small.sum() + zero.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(large.detach(), torch.full((4,), 99.0))
    torch.testing.assert_close(small.detach(), torch.full((4,), 0.099))
    assert (zero != 0).all()


def test_batch_norm_update_follows_the_batches(zipped: tz.ZippedModel, tasks: list[tz.Task]) -> None:
    statistics = zipped["a"][1].running_mean.clone()
    tz.retrain(zipped, tasks, steps=3, batch_norm="update", progress=False)
    assert not torch.equal(zipped["a"][1].running_mean, statistics)


def test_distillation_without_cross_entropy_is_relative() -> None:
    task = tz.Task("r", nn.Linear(2, 2), [torch.zeros(1, 2)], loss=F.mse_loss)
    taught = torch.randn(50, 2) * 10
    output = (taught + 1).requires_grad_()
    expected = 1 / taught.var(correction=0)
    torch.testing.assert_close(distillation_loss(task, output, taught), expected)
    with pytest.raises(tz.InputError, match="no floating-point tensor to distil"):
        distillation_loss(task, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))


def test_zip_retrains_after_each_layer(tasks: list[tz.Task]) -> None:
    zipped = tz.zip(tasks, share=1.0, retrain={"0": 3}, progress=False)
    assert [entry["retrained"] for entry in zipped.history.later] == [3]
    zipped = tz.zip(tasks, share=1.0, retrain=tz.Retraining(2, loss="distill"), progress=False)
    assert [(e["retrained"], e["loss"]) for e in zipped.history.later] == [(2, "distill")]
    with pytest.raises(tz.InputError, match="retrain names layer 'x'"):
        tz.zip(tasks, share=1.0, retrain={"x": 3}, progress=False)
    with pytest.raises(tz.InputError, match="steps=-1 must be a whole number"):
        tz.zip(tasks, share=1.0, retrain=-1, progress=False)


def test_bad_input_is_refused(zipped: tz.ZippedModel, tasks: list[tz.Task]) -> None:
    unlabelled = [tz.Task(t.name, t.model, [x for x, _ in t.data]) for t in tasks]
    for given, settings, message in (
        (tasks[:1], {}, "has the tasks a, b, but a were given"),
        (tasks, {"steps": -1}, "steps=-1 must be a whole number"),
        (tasks, {"steps": 1.5}, "steps=1.5 must be a whole number"),
        (tasks, {"step_size": float("nan")}, "step_size=nan must be a number above 0"),
        (tasks, {"step_size": -1}, "step_size=-1 must be a number above 0"),
        (tasks, {"optimizer": "adam"}, "must be a function from parameters"),
        (tasks, {"seed": -1}, "seed=-1"),
        (tasks, {"loss": "magic"}, "loss='magic' is not known"),
        (tasks, {"batch_norm": "maybe"}, "batch_norm='maybe' is not known"),
        (unlabelled, {}, "task 'a': its batches have no targets; pass loss='distill'"),
        (tasks, {"optimizer": lambda p: torch.optim.SGD(p, lr=1e30), "steps": 5}, "the loss is (nan|inf)"),
        (tasks, {"optimizer": lambda p: torch.optim.SGD(p, lr=float("inf")), "steps": 1}, "weights became NaN"),
    ):
        with pytest.raises(tz.InputError, match=message):
            tz.retrain(copy.deepcopy(zipped), given, progress=False, **settings)


def test_frozen_networks_and_missing_targets_are_refused_before_any_work(
    zipped: tz.ZippedModel, tasks: list[tz.Task]
) -> None:
    for parameter in zipped.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(tz.InputError, match="all parameters of the joint network are frozen"):
        tz.retrain(zipped, tasks, steps=1, progress=False)
    unlabelled = [tz.Task(t.name, t.model, [x for x, _ in t.data]) for t in tasks]
    with pytest.raises(tz.InputError, match="task 'a': its batches have no targets"):
        tz.zip(unlabelled, share=1.0, retrain=5, progress=False)


def test_a_cross_entropy_module_teaches_probabilities() -> None:
    output, taught = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    losses = [
        distillation_loss(tz.Task("r", nn.Linear(2, 2), [torch.zeros(1, 2)], loss=loss), output, taught)
        for loss in (F.cross_entropy, nn.CrossEntropyLoss())
    ]
    assert losses[0] == losses[1]
    shifted = taught + 5.0  # the same probabilities
    torch.testing.assert_close(
        distillation_loss(tz.Task("r", nn.Linear(2, 2), [torch.zeros(1, 2)], teach=1), output, shifted), losses[0]
    )
