"""All tasks at once give what each gives by itself, and compute once what they have in common."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import taskzip as tz
from taskzip.models import LeNet5, LeNet300


class Counting(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two convolutions; how the activations are called is up to the tests."""

    def __init__(self, seed: int, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Any:
        x = self.activation(self.first(x))
        x = self.activation(self.second(x))
        return self.out(x.mean((2, 3)))


def small_images(samples: int = 5) -> Tensor:
    return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def tied(*networks: nn.Module, private: str = "out") -> tz.ZippedModel:
    """Networks whose parameters are those of the first one, but for the output layer."""
    for network in networks[1:]:
        for name, parameter in networks[0].named_parameters():
            if not name.startswith(private):
                path, _, attribute = name.rpartition(".")
                setattr(network.get_submodule(path), attribute, parameter)
    return tz.ZippedModel(dict(zip("abc", networks, strict=False))).eval()


def zipped(make: Callable[[], nn.Module], x: Tensor, share: float = 1.0, tasks: str = "ab", **options: Any) -> Any:
    nets = []
    for seed, _ in enumerate(tasks):
        torch.manual_seed(seed)
        nets.append(make())
    given = [tz.Task(name, net, [x]) for name, net in zip(tasks, nets, strict=True)]
    return tz.zip(given, share=share, progress=False, compensate=False, **options).eval()


def counts(joint: tz.ZippedModel, *args: Any, **kwargs: Any) -> Counter[str]:
    """Operators of one call, whose outputs are those of the tasks by themselves."""
    with torch.no_grad():
        apart = {name: joint[name](*args, **kwargs) for name in joint}
        with Counting() as counting:
            together = joint(*args, **kwargs)
    same(together, apart)
    return counting.calls


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("tasks", ["ab", "abc"])
def test_a_fully_shared_trunk_runs_once(tasks: str) -> None:
    joint = zipped(LeNet5, torch.randn(8, 1, 28, 28), tasks=tasks)
    calls = counts(joint, torch.randn(2, 1, 28, 28))
    assert calls["convolution"] == 2
    assert calls["max_pool2d_with_indices"] == 2
    assert calls["addmm"] == 1 + len(tasks)


def test_layers_are_common_up_to_the_first_that_is_not() -> None:
    joint = zipped(LeNet300, torch.randn(8, 784), share={"fc1": 1.0, "fc2": 0.5})
    assert counts(joint, torch.randn(2, 784))["addmm"] == 1 + 2 + 2


def test_what_is_shared_in_part_runs_for_each_task() -> None:
    joint = zipped(LeNet5, torch.randn(8, 1, 28, 28), share=0.5)
    assert counts(joint, torch.randn(2, 1, 28, 28))["convolution"] == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("activation", [F.relu, F.relu_, lambda x: F.relu(x, inplace=True), torch.Tensor.relu_])
def test_activations_in_place(mode: Any, activation: Any) -> None:
    joint = tied(*(Net(seed, activation) for seed in range(3)))
    x = small_images()
    apart = {name: joint[name](x) for name in joint}
    with mode(), Counting() as counting:
        same(joint(x.clone()), apart)
    assert counting.calls["convolution"] == 2


def test_a_task_that_writes_where_another_one_does_not() -> None:
    """The second one must neither spoil what the first has given out, nor read what the first has written."""

    class Keeping(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return x, self.out(self.second(self.activation(x)).mean((2, 3)))

    for activations in ([F.relu, F.relu_], [F.relu_, F.relu], [F.relu, F.relu_, F.relu]):
        joint = tied(*(Keeping(seed, each) for seed, each in enumerate(activations)))
        x = small_images()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                same(joint(x), {name: joint[name](x) for name in joint})


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.view(-1).relu_(),
        lambda x: x[:, 0].mul_(2),
        lambda x: x.detach().mul_(2),
        lambda x: x.data.mul_(2),
        lambda x: x.numpy().__imul__(2),
        lambda x: x.__setitem__((slice(None), 0), 0.0),
        lambda x: torch.add(x, 1, out=x),
        lambda x: F.threshold(x, 0.1, 0.0, True),
        lambda x: F.dropout(x, 0.5, False, True).mul_(2),
        lambda x: torch.ops.aten.mul_(x, 2),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_in_roundabout_ways(write: Callable[[Tensor], Any], mode: Any) -> None:
    def writing(x: Tensor) -> Tensor:
        write(x)
        return x

    x = small_images()
    for activations in ([writing, writing], [F.relu, writing], [writing, F.relu]):
        joint = tied(*(Net(seed, each) for seed, each in enumerate(activations)))
        with mode():
            same(joint(x.clone()), {name: joint[name](x) for name in joint})


def test_an_input_that_is_written_into() -> None:
    class Scaling(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    joint = tied(Scaling(0), Scaling(1))
    x, y = small_images(), small_images()
    with torch.no_grad():
        same(joint(x), {name: joint[name](y.clone()) for name in joint})
    assert torch.equal(x, y)


@pytest.mark.parametrize("write", [lambda x: x.data.mul_(2), lambda x: x.numpy().__imul__(2), lambda x: x[:2].zero_()])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1)])
def test_an_input_that_is_written_into_in_roundabout_ways(write: Any, order: tuple[int, int]) -> None:
    class Scaling(Net):
        def forward(self, x: Tensor) -> Tensor:
            write(x)
            return super().forward(x)

    joint = tied(*((Net, Scaling)[which](seed) for seed, which in enumerate(order)))
    x, y = small_images(), small_images()
    with torch.no_grad():
        same(joint(x), {name: joint[name](y.clone()) for name in joint})
        same(joint(dict.fromkeys(joint, x)), {name: joint[name](y.clone()) for name in joint})
    assert torch.equal(x, y)


def test_one_input_for_each_task() -> None:
    joint = tied(Net(0), Net(1))
    x, y = small_images(), small_images() + 1
    same(joint({"a": x, "b": y}), {"a": joint["a"](x), "b": joint["b"](y)})
    same(joint({"b": {"x": y}, "a": (x,)}), {"a": joint["a"](x), "b": joint["b"](y)})
    for inputs, convolutions in (({"a": x, "b": y}, 4), ({"a": x, "b": x}, 2)):
        with torch.no_grad(), Counting() as counting:
            joint(inputs)
        assert counting.calls["convolution"] == convolutions
    with pytest.raises(tz.InputError, match=r"zipped\(\.\.\.\) has inputs for a, but the tasks are a, b"):
        joint({"a": x})


def test_a_dict_that_is_no_input_by_task_goes_to_every_network() -> None:
    class Reading(Net):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["pixels"])

    joint = tied(Reading(0), Reading(1))
    batch = {"pixels": small_images()}
    same(joint(batch), {name: joint[name](batch) for name in joint})


def test_what_was_written_into_is_done_again_apart() -> None:
    class Features(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return x, self.out(self.second(self.activation(x)).mean((2, 3)))

    class Spoiling(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            x.mul_(0.5)
            return y

    joint = tied(Features(0), Spoiling(1, F.relu_))
    with torch.no_grad():
        same(joint(small_images()), {name: joint[name](small_images()) for name in joint})


def _register(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: gradient * 0)
    return x.relu()


def _assign(x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x.relu()


def _by_way_of_a_view(x: Tensor) -> Tensor:
    x.view(-1).data.mul_(2)
    return x.relu()


def _by_way_of_numpy(x: Tensor) -> Tensor:
    x.detach().numpy().__imul__(2)
    return x.relu()


def _require(x: Tensor) -> Tensor:
    return x.detach().requires_grad_().relu()


@pytest.mark.parametrize("activation", [_register, _assign, _by_way_of_a_view, _by_way_of_numpy, _require])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1), (0, 1, 0), (1, 0, 0)])
def test_what_torch_does_not_count(activation: Callable[[Tensor], Tensor], order: tuple[int, ...]) -> None:
    """Values and gradients, where what happens to a tensor leaves its version as it was."""

    class Keeping(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return x, self.out(self.second(self.activation(x)).relu().mean((2, 3)))

    joint = tied(*(Keeping(seed, [F.relu, activation][which]) for seed, which in enumerate(order)))
    found = []
    for run in (lambda x: {name: joint[name](x) for name in joint}, joint):
        joint.zero_grad()
        outputs = run(small_images())
        sum(y.square().sum() for _, y in outputs.values()).backward()
        found.append((outputs, {name: p.grad for name, p in joint.named_parameters()}))
    torch.testing.assert_close(*found)
    same(found[1][0], found[0][0])


def test_a_detached_result_that_another_task_writes_into() -> None:
    class Detaching(Net):
        def forward(self, x: Tensor) -> Any:
            return self.first(x).detach(), self.out(self.second(self.first(x).relu()).mean((2, 3)))

    class Writing(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x).detach()
            return x.mul_(2), self.out(self.second(x).mean((2, 3)))

    for mode in (torch.no_grad, torch.enable_grad):
        joint = tied(Detaching(0), Writing(1))
        with mode():
            same(joint(small_images()), {name: joint[name](small_images()) for name in joint})


def test_batch_norm_that_follows_the_batches_in_eval_mode() -> None:
    """It writes its statistics, which torch does not count."""

    class Following(Net):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Any:
            x = F.batch_norm(self.first(x), self.mean, self.var, training=True)
            return self.out(self.second(x).mean((2, 3)))

    joint = tied(Following(0), Following(1))
    with torch.no_grad():
        joint(small_images())
    assert torch.equal(joint["a"].mean, joint["b"].mean) and joint["b"].mean.any()


def test_results_in_several_parts() -> None:
    class Gated(Net):
        def forward(self, x: Tensor) -> Any:
            value, gate = self.first(x).chunk(2, dim=1)
            value, _ = torch.cat([value * gate.sigmoid(), value], dim=1).sort(dim=1)
            return self.out(self.second(value).mean((2, 3)))

    calls = counts(tied(Gated(0), Gated(1)), small_images())
    assert calls["convolution"] == 2 and calls["sigmoid"] == 1


@pytest.mark.parametrize("activation, in_use", [(F.relu, 0), (F.relu_, 1)])  # what a network still calls x
@pytest.mark.parametrize("tasks", [2, 3])
def test_nothing_is_kept_longer_than_needed(activation: Callable[[Tensor], Tensor], in_use: int, tasks: int) -> None:
    """What the last task is past is gone while it still runs, and everything afterwards."""
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    joint = tied(*(Net(seed, activation) for seed in range(tasks)))
    for network in joint.tasks.values():
        for layer in (network.first, network.second):
            layer.register_forward_hook(lambda _module, _args, output: outputs.append(weakref.ref(output)))
    network.out.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in outputs)))
    gc.disable()
    try:
        with torch.no_grad():
            joint(small_images())
        assert len(outputs) == 2 * tasks and alive == [in_use]
        assert not any(ref() is not None for ref in outputs)
    finally:
        gc.enable()


def test_hooks_run_for_every_task() -> None:
    joint = tied(Net(0), Net(1))
    seen: list[str] = []
    joint["a"].first.register_forward_hook(lambda *_: seen.append("a"))
    joint["b"].first.register_forward_hook(lambda *_: seen.append("b"))
    joint["b"].second.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    calls = counts(joint, small_images())
    assert seen == ["a", "b", "a", "b"]  # one by one, then together
    assert calls["convolution"] == 3
    joint["b"].second.register_full_backward_hook(lambda *_: seen.append("backward"))
    sum(y.sum() for y in joint(small_images()).values()).backward()
    assert seen[-1] == "backward"


def test_settings_count() -> None:
    class Own(Net):
        def __init__(self, seed: int, slope: float, amp: bool = False) -> None:
            super().__init__(seed, lambda x: F.leaky_relu(x, slope))
            self.amp = amp

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                return super().forward(x)

    calls = counts(tied(Own(0, 0.1), Own(1, 0.2)), small_images())
    assert calls["convolution"] == 1 + 2 and calls["leaky_relu"] == 4
    assert counts(tied(Own(0, 0.1), Own(1, 0.1, amp=True)), small_images())["convolution"] == 4


def test_gradients_add_up_and_no_grad_inside_one_task_is_its_own() -> None:
    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.first(x).relu()
            return self.out(self.second(x).relu().mean((2, 3)))

    for make in (Net, Frozen):
        joint = tied(Net(0), make(1)) if make is Net else tied(Frozen(0), Net(1))
        found = []
        for outputs in ({name: joint[name](small_images()) for name in joint}, joint(small_images())):
            joint.zero_grad()
            sum(y.square().sum() for y in outputs.values()).backward()
            found.append({name: p.grad.clone() for name, p in joint.named_parameters()})
        torch.testing.assert_close(*found)


def test_training_mode_runs_apart() -> None:
    joint = tied(*(Net(seed, lambda x: F.relu(x)) for seed in range(2)))
    joint["b"].second.train()
    assert counts(joint, small_images())["convolution"] == 4


def test_dropout_and_batch_statistics_in_training_mode() -> None:
    def make() -> nn.Module:
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(True), nn.Flatten(), nn.Linear(64, 3)
        return nn.Sequential(*layers)

    joint = zipped(make, small_images(30), batch_norm="fold").train()
    other = copy.deepcopy(joint)
    torch.manual_seed(5)
    together = joint(small_images())
    torch.manual_seed(5)
    same(together, {name: other[name](small_images()) for name in other})
    same(dict(joint.named_buffers()), dict(other.named_buffers()))


def test_dropout_and_noise_in_eval_mode() -> None:
    noise = lambda x: F.dropout(x, 0.5)  # noqa: E731
    joint = tied(Net(0, noise), Net(1, noise))
    with torch.no_grad():
        torch.manual_seed(5)
        together = joint(small_images())
        torch.manual_seed(5)
        same(together, {name: joint[name](small_images()) for name in joint})
    for off in (lambda x: F.dropout(x, 0.5, False).relu(), lambda x: nn.Dropout2d().eval()(x).relu()):
        assert counts(tied(Net(0, off), Net(1, off)), small_images())["convolution"] == 2


def test_outputs_of_their_own() -> None:
    """What is common and given out can be written to afterwards."""

    class Features(Net):
        def forward(self, x: Tensor) -> dict[str, Any]:
            x = self.first(x).relu()
            return {"features": x, "more": [x.flatten(1)], "logits": self.out(self.second(x).mean((2, 3)))}

    joint = tied(Features(0), Features(1))
    x = small_images()
    with torch.no_grad():
        outputs = joint(x)
        assert counts(joint, x)["convolution"] == 2
        outputs["b"]["features"].zero_()
        same(outputs["a"], joint["a"](x))
        same(outputs["b"]["more"], joint["b"](x)["more"])


def test_equal_buffers_are_common_and_others_are_not() -> None:
    class Normalising(Net):
        def __init__(self, seed: int, mean: float) -> None:
            super().__init__(seed)
            self.register_buffer("mean", torch.tensor(mean))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - self.mean)

    assert counts(tied(Normalising(0, 0.5), Normalising(1, 0.5)), small_images())["convolution"] == 2
    assert counts(tied(Normalising(0, 0.5), Normalising(1, 0.6)), small_images())["convolution"] == 4


def test_keyword_arguments_other_inputs_and_attention() -> None:
    joint = tied(Net(0), Net(1))
    assert counts(joint, x=small_images())["convolution"] == 2
    attention = tied(Attention(), Attention(), private="none")
    counts(attention, torch.randn(2, 5, 4))


def test_exported_and_compiled_graphs_hold_plain_operators() -> None:
    joint = tied(Net(0), Net(1))
    x = small_images()
    program = torch.export.export(joint, (x,), strict=False)
    same(program.module()(x), joint(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated
        same(torch.jit.trace(joint, x, strict=False)(x), joint(x))


def test_compiled_parts_run_as_ever() -> None:
    joint = tied(Net(0), Net(1))
    right = {name: joint[name](small_images()).detach() for name in joint}
    joint["b"].second.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(joint(small_images()), right)
        joint["a"].second = torch.compile(joint["a"].second, backend="eager")
        torch.testing.assert_close(joint(small_images()), right)


def test_tensors_without_values_and_of_inference_mode() -> None:
    assert tied(Net(0), Net(1)).to("meta")(small_images().to("meta"))["b"].shape == (5, 3)
    with torch.inference_mode():
        made = tied(Net(0, F.relu_), Net(1, F.relu_))
        x = small_images()
        same(made(x), {name: made[name](x) for name in made})
    with torch.no_grad():
        same(made(x), {name: made[name](x) for name in made})


def test_under_torch_func() -> None:
    joint = tied(Net(0), Net(1))
    x = small_images()
    parameters = dict(joint.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return sum(y.sum() for y in torch.func.functional_call(joint, values, (x,)).values())

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    torch.testing.assert_close(gradients, {name: p.grad for name, p in parameters.items()})
    rows = torch.func.vmap(lambda row: joint(row[None])["a"][0])(x)
    torch.testing.assert_close(rows, joint["a"](x))


def test_folded_batch_norm_is_common() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
            nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3),
        ).eval()  # fmt: skip

    joint = zipped(make, small_images(30), batch_norm="fold")
    calls = counts(joint, small_images())
    assert calls["convolution"] == 2 and calls["addmm"] == 2
