"""Networks as training scripts leave them: compiled, wrapped, scripted, exported, without values, with histories."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.copying import borrowing, copy_of, uncompiled

DATA = [torch.randn(16, 6) for _ in range(3)]


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    )


def zipped_of(models: Any, share: float = 0.5, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, model, DATA, **options) for name, model in zip("ab", models, strict=True)]
    return tz.zip(tasks, share=share, progress=False)


# --- torch.compile ------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def a_part(model: nn.Sequential) -> nn.Module:
    model[0] = compiled(model[0])
    return model


def a_part_in_place(model: nn.Sequential) -> nn.Module:
    model[1].compile(backend="eager")
    return model


def nested(model: nn.Sequential) -> Any:
    model[1][0] = compiled(model[1][0])
    model[1] = compiled(model[1])
    return compiled(model)


def its_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


COMPILED = [compiled, in_place, a_part, a_part_in_place, nested, its_forward]


@pytest.mark.parametrize("make", COMPILED)
def test_compiled_networks_are_zipped_like_any_other(make: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    plain = [chain().eval() for _ in "ab"]
    wanted = zipped_of([copy.deepcopy(model) for model in plain])
    models = [make(model) for model in plain]
    zipped = zipped_of(models)
    assert wanted.shared_parameter_count() == zipped.shared_parameter_count() > 0
    for name in "ab":
        assert list(zipped[name].state_dict()) == list(wanted[name].state_dict())
        assert torch.equal(zipped[name](DATA[0]), wanted[name](DATA[0]))
    assert len(tz.inspect(models[0], DATA[0]).layers) == 3
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {name: make(chain()) for name in "ab"})
    assert torch.equal(loaded["a"](DATA[0]), wanted["a"](DATA[0]))


def test_what_is_not_compiled_is_left_alone() -> None:
    model = chain()
    assert uncompiled(model) is model
    inner = compiled(model)
    assert uncompiled(inner) is model


@pytest.mark.parametrize("make", [a_part, nested, its_forward])
def test_without_compilation_it_has_the_very_same_tensors(make: Callable[[Any], nn.Module]) -> None:
    model = chain()
    tensors = [id(p) for p in model.parameters()]
    made = make(model)
    plain = uncompiled(made)
    assert [id(p) for p in plain.parameters()] == tensors
    assert not any(key.startswith("_orig_mod") or "._orig_mod" in key for key in plain.state_dict())
    assert torch.equal(plain(DATA[0]), made(DATA[0]))


# --- what has to be refused ---------------------------------------------------------------------------------------


def scripted() -> Any:
    return torch.jit.script(chain().eval())


def traced() -> Any:
    return torch.jit.trace(chain().eval(), DATA[0])


def a_scripted_part() -> Any:
    model = chain().eval()
    model[0] = torch.jit.script(model[0])
    return model


def exported() -> Any:
    return torch.export.export(chain().eval(), (DATA[0],)).module()


def without_values() -> Any:
    return chain().to("meta").eval()


def partly_without_values() -> Any:
    model = chain().eval()
    model[1].to("meta")
    return model


def for_several_devices() -> Any:
    return nn.DataParallel(chain().eval())


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "make, says",
    [
        (scripted, r"task 'a': the network is a program of torch\.jit .* give the module that it was made from"),
        (traced, r"task 'a': the network is a program of torch\.jit"),
        (a_scripted_part, r"task 'a': module '0' is a program of torch\.jit"),
        (exported, r"task 'a': the network is a program of torch\.export: give the module from which it was exported"),
        (without_values, r"task 'a': '0\.0\.weight' is on the meta device and has no values"),
        (partly_without_values, r"'1\.0\.weight' is on the meta device"),
        (for_several_devices, r"task 'a': the network is wrapped in DataParallel: give the network inside"),
    ],
)
def test_what_cannot_be_zipped_is_refused_in_one_sentence(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(tz.InputError, match=says):
        zipped_of([make(), make()])
    with pytest.raises(tz.InputError, match=says.replace("task 'a': ", "")):
        tz.inspect(make(), DATA[0])


def test_a_program_instead_of_a_network() -> None:
    program = torch.export.export(chain().eval(), (DATA[0],))
    with pytest.raises(tz.InputError, match=r"model must be a torch nn\.Module, got ExportedProgram"):
        tz.Task("a", program, DATA)  # type: ignore[arg-type]


def test_a_graph_of_torch_fx_is_a_network() -> None:
    models = [torch.fx.symbolic_trace(chain().eval()) for _ in "ab"]
    assert zipped_of(models).shared_parameter_count() > 0


# --- tensors with a gradient history ------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Remembers its features, as hooks for Grad-CAM or perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.last: Any = None
        self.features: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        self.last, self.features, self.by_name = h, [h, h * 2], {"h": h.sum()}
        return self.out(self.second(h).relu())


def weight_norm() -> nn.Module:
    normed = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), normed, nn.ReLU(), nn.Linear(8, 3))


def spectral_norm() -> nn.Module:
    normed = torch.nn.utils.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), normed, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("make", [Keeps, weight_norm, spectral_norm])
def test_networks_that_hold_tensors_with_a_history(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    models = [make().eval() for _ in "ab"]
    for model in models:
        model(DATA[0]).sum().backward()
    zipped = zipped_of(models)
    assert zipped.shared_parameter_count() > 0
    wanted = {name: zipped[name](DATA[0]) for name in "ab"}  # from here on the joint network holds such tensors
    assert wanted["a"].requires_grad
    twin = copy.deepcopy(zipped)
    assert torch.equal(twin["a"](DATA[0]), wanted["a"])
    assert twin.shared_parameter_count() == zipped.shared_parameter_count()
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in zipped.parameters()}
    assert twin.history.as_dict() == zipped.history.as_dict() and twin.history is not zipped.history
    torch.testing.assert_close(zipped.materialize("b")(DATA[0]), wanted["b"])
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", dict(zip("ab", models, strict=True)))
    assert torch.equal(loaded["b"](DATA[0]), wanted["b"])


def test_looking_at_a_network_leaves_what_it_keeps() -> None:
    model = Keeps()
    model(DATA[0])
    kept = model.last
    tz.inspect(model, DATA[0])
    assert type(model.last) is Tensor
    torch.testing.assert_close(model.last[0], kept[0])


def test_a_copy_with_a_history_has_the_values_and_no_history() -> None:
    model = Keeps()
    model(DATA[0])
    made = copy_of(model)
    assert torch.equal(made.last, model.last) and not made.last.requires_grad
    assert made.features[0] is made.last  # one tensor stays one
    assert made.first.weight.requires_grad


def test_borrowed_tensors_are_the_same_in_other_modules() -> None:
    model = chain()
    made = borrowing(model)
    assert made[0] is not model[0] and made[0][0].weight is model[0][0].weight


# --- other modes --------------------------------------------------------------------------------------------------


def test_frozen_networks_and_data_of_inference_mode() -> None:
    models = [chain().eval().requires_grad_(False) for _ in "ab"]
    with torch.inference_mode():
        data = [torch.randn(16, 6) for _ in range(3)]
    zipped = tz.zip(
        [tz.Task(name, model, data) for name, model in zip("ab", models, strict=True)], share=1.0, progress=False
    )
    assert not any(p.requires_grad for p in zipped.parameters())
    assert torch.isfinite(zipped["a"](data[0])).all()


def test_networks_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        models = [chain().eval() for _ in "ab"]
    assert zipped_of(models, share=1.0).shared_parameter_count() > 0
