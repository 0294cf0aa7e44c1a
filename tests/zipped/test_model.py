"""The joint network behaves as any nn.Module, and each task as its original."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import taskzip as tz


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    return {"a": small_net(0), "b": small_net(1)}


def small_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def images(n: int = 20) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def zipped(nets: dict[str, nn.Module]) -> tz.ZippedModel:
    tasks = [tz.Task(name, net, [images(40)]) for name, net in nets.items()]
    return tz.zip(tasks, share=0.5, progress=False)


def test_a_task_is_called_like_its_original_and_all_tasks_at_once(zipped: tz.ZippedModel) -> None:
    x = images()
    outputs = zipped(x)
    assert list(outputs) == list(zipped) == ["a", "b"]
    for name in zipped:
        assert isinstance(zipped[name], nn.Sequential)
        assert torch.equal(zipped[name](x), outputs[name])
    with pytest.raises(KeyError, match="no task 'c' in this network: it has a, b"):
        zipped["c"]


def test_shared_blocks_are_single_parameters_with_the_gradients_of_all_tasks(zipped: tz.ZippedModel) -> None:
    names = [name for name, _ in zipped.named_parameters(remove_duplicate=False)]
    assert len(names) > len(list(zipped.parameters()))
    shared = zipped["a"][0].get_parameter("weight_blocks.a+b")
    assert shared is zipped["b"][0].get_parameter("weight_blocks.a+b")
    gradients = []
    for name in zipped:
        zipped.zero_grad()
        zipped[name](images()).square().sum().backward()
        gradients.append(shared.grad.clone())
    zipped.zero_grad()
    sum(y.square().sum() for y in zipped(images()).values()).backward()
    torch.testing.assert_close(shared.grad, gradients[0] + gradients[1])
    own = zipped["a"][0].get_parameter("weight_blocks.a")
    assert own.grad is not None


def test_a_task_does_not_touch_the_blocks_of_others(zipped: tz.ZippedModel) -> None:
    before = zipped["a"](images())
    with torch.no_grad():
        mine = set(zipped["a"].parameters())
        for parameter in set(zipped["b"].parameters()) - mine:
            parameter.fill_(torch.nan)
    assert torch.equal(zipped["a"](images()), before)


def test_moves_modes_and_state_like_any_module(zipped: tz.ZippedModel) -> None:
    x = images()
    before = zipped["a"](x)
    count = zipped.parameter_count()
    zipped.double()
    assert zipped["a"](x.double()).dtype == torch.float64
    zipped.float()
    assert zipped.parameter_count() == count
    assert torch.equal(zipped["a"](x), before)
    zipped.train()
    assert zipped["b"][1].training
    zipped.eval()
    state = {key: value.clone() for key, value in zipped.state_dict().items()}
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter.zero_()
    assert not torch.equal(zipped["a"](x), before)
    zipped.load_state_dict(state)
    assert torch.equal(zipped["a"](x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda z: pickle.loads(pickle.dumps(z))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_ties(zipped: tz.ZippedModel, copied) -> None:
    other = copied(zipped)
    assert other.parameter_count() == zipped.parameter_count()
    assert torch.equal(other["b"](images()), zipped["b"](images()))
    assert not set(other.parameters()) & set(zipped.parameters())


def test_one_task_alone_can_be_copied_and_exported(zipped: tz.ZippedModel) -> None:
    x = images()
    alone = copy.deepcopy(zipped["a"])
    assert torch.equal(alone(x), zipped["a"](x))
    program = torch.export.export(alone, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), zipped["a"](x))


def test_materialize_gives_a_plain_network(zipped: tz.ZippedModel, nets: dict[str, nn.Module]) -> None:
    x = images()
    for name, net in nets.items():
        plain = zipped.materialize(name)
        torch.testing.assert_close(plain(x), zipped[name](x))
        assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in net.named_parameters()]
        for module in plain.modules():
            assert "taskzip" not in type(module).__module__
        fresh = small_net(9)
        fresh.load_state_dict(plain.state_dict())
        assert torch.equal(fresh(x), plain(x))
    assert not set(plain.parameters()) & set(zipped.parameters())


def test_modules_keep_their_class_and_show_their_blocks(zipped: tz.ZippedModel) -> None:
    assert isinstance(zipped["a"][0], nn.Conv2d)
    assert "ZippedConv2d" in repr(zipped) and "a+b: 3x1x3x3" in repr(zipped)
    assert inspect.signature(zipped["a"].forward) == inspect.signature(nn.Sequential.forward).replace(
        parameters=list(inspect.signature(nn.Sequential.forward).parameters.values())[1:]
    )


def test_torch_save_round_trip(zipped: tz.ZippedModel) -> None:
    buffer = io.BytesIO()
    torch.save(zipped.state_dict(), buffer)
    buffer.seek(0)
    zipped.load_state_dict(torch.load(buffer, weights_only=True))


def test_parameter_counts(zipped: tz.ZippedModel) -> None:
    apart = sum(zipped.parameter_count([name]) for name in zipped)
    assert zipped.parameter_count() == apart - zipped.shared_parameter_count()
    # 3 of 6 kernels of 9 + bias, which batch-norm follows; 6 of 12 units over 3 of 6 channels of 16 columns
    assert zipped.shared_parameter_count() == 3 * 10 + 6 * 3 * 16
    assert apart == 2 * 6 + sum(p.numel() for net in zipped for p in zipped.materialize(net).parameters())
    with pytest.raises(tz.InputError, match="no task 'x'"):
        zipped.parameter_count(["x"])
