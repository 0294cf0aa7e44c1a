from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from networks import Attention
from torch import Tensor, nn
from twin import zip_twin

import taskzip as tz

DOUBLE = torch.float64


def fc(*widths: int, bias: bool = True, dtype: torch.dtype = DOUBLE) -> nn.Sequential:
    layers: list[nn.Module] = []
    for reads, units in itertools.pairwise(widths):
        layers += [nn.Linear(reads, units, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def cnn(
    channels: int = 1, kernels: tuple[int, int] = (4, 5), units: int = 6, classes: int = 3, *, bias: bool = True
) -> nn.Sequential:
    """For images of 9 x 9: a strided, padded convolution, one with pooling behind it, and two linear layers."""
    first, second = kernels
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(first, second, 2, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 4, units, bias=bias),
        nn.ReLU(),
        nn.Linear(units, classes),
    ).to(DOUBLE)


def batch_normed() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 49, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).to(DOUBLE)
    with torch.no_grad():
        for _ in range(20):
            model(1 + images(16))
        for module in model:
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model


def vectors(samples: int, width: int) -> Tensor:
    """Correlated, not centred, like what layers read."""
    return torch.randn(samples, width, dtype=DOUBLE) @ torch.randn(width, width, dtype=DOUBLE) / width**0.5 + 0.3


def images(samples: int, channels: int = 1) -> Tensor:
    return torch.randn(samples, channels, 9, 9, dtype=DOUBLE)


def run_zip(models: Sequence[nn.Module], data: Sequence[Any], **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, m, d) for name, m, d in zip("ab", models, data, strict=True)]
    return tz.zip(tasks, **{"share": 1.0, "progress": False, "max_rows": None, **options})


def fc_tasks() -> list[tz.Task]:
    return [tz.Task(name, fc(4, 6, 5, 3), [vectors(16, 4)]) for name in "ab"]


def assert_close(given: Tensor, wanted: Tensor | np.ndarray, tolerance: float = 1e-6) -> None:
    wanted = torch.as_tensor(wanted)
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()


# --- against the literal twin -------------------------------------------------------------------------------------


Case = Callable[[], tuple[list[nn.Sequential], list[Tensor], list[int]]]


def same_fc() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    return [fc(5, 8, 7, 3), fc(5, 8, 7, 3)], [vectors(40, 5), vectors(40, 5)], [40, 40]


def uneven_fc() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    """Other input sizes, widths, outputs, sample numbers and batch sizes."""
    return [fc(4, 8, 5, 6, 2), fc(6, 7, 7, 5, 3)], [vectors(37, 4), vectors(50, 6)], [10, 16]


def wider_first() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    return [fc(6, 7, 7, 3), fc(3, 5, 8, 4)], [vectors(30, 6), vectors(41, 3)], [30, 7]


def uneven_cnn() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    return [cnn(1, (4, 5), 6, 3), cnn(1, (5, 4), 7, 2)], [images(13), images(20)], [5, 8]


def rgb_and_grey() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    return [cnn(3, (5, 4), 5, 3), cnn(1, (4, 6), 6, 4)], [images(12, 3), images(15)], [12, 4]


def no_bias() -> tuple[list[nn.Sequential], list[Tensor], list[int]]:
    """One network without biases, and one with them: the biases stay private."""
    return [cnn(1, bias=False), cnn(1)], [images(14), images(18)], [6, 9]


CASES = [uneven_fc, wider_first, uneven_cnn, rgb_and_grey, no_bias]


def assert_is_twin(zipped: tz.ZippedModel, twin: Any, data: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Two tasks share as many units for the same cost, and answer the same; on which inputs, by task."""
    for record, turn in zip(zipped.history.layers, twin.turns, strict=False):
        assert record.shared == len(turn.pairs) > 0
        assert record.cost == pytest.approx(turn.cost, rel=1e-6)
    asked = [(task, x) for task, seen in enumerate(data) for x in (seen, torch.randn(9, *seen.shape[1:], dtype=DOUBLE))]
    for task, x in asked:
        assert_close(zipped["ab"[task]](x), twin(task, x.numpy()))
    return asked


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("matching", ["greedy", "optimal"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_literal_twin(case: Case, matching: str, compensate: bool, share: float) -> None:
    models, data, sizes = case()
    batches = [list(each.split(size)) for each, size in zip(data, sizes, strict=True)]
    options = {"share": share, "matching": matching, "compensate": compensate, "balance": 0.3, "ridge": 0.1}

    zipped = run_zip(models, batches, **options)
    twin = zip_twin(models, [each.numpy() for each in data], **options)

    for task, x in assert_is_twin(zipped, twin, data):
        assert not torch.allclose(models[task](x), zipped["ab"[task]](x), rtol=1e-3)  # something did change


@pytest.mark.parametrize("damping, ridge", [(1e-4, 1e-1), (0.5, 1e-6)])
def test_damping_and_ridge_mean_what_the_twin_says(damping: float, ridge: float) -> None:
    models, data, _ = uneven_fc()
    options = {"share": 0.75, "matching": "optimal", "compensate": True, "damping": damping, "ridge": ridge}
    zipped = run_zip(models, [[each] for each in data], **options)
    twin = zip_twin(models, [each.numpy() for each in data], **options)
    for task, name in enumerate("ab"):
        assert_close(zipped[name](data[task]), twin(task, data[task].numpy()))


def test_batches_do_not_matter() -> None:
    models, data, _ = uneven_cnn()
    whole = run_zip(models, [[each] for each in data])
    cut = run_zip(models, [list(each.split(3)) for each in data])
    for name, x in zip("ab", data, strict=True):
        assert_close(cut[name](x), whole[name](x), 1e-9)


def test_threshold_agrees_with_the_twin() -> None:
    models, data, _ = uneven_fc()
    inputs = [each.numpy() for each in data]
    options = {"matching": "greedy", "compensate": False}
    eps = float(np.median([turn.difference for turn in zip_twin(models, inputs, share=1.0, **options).turns[:1]]))
    zipped = run_zip(models, [[each] for each in data], share=tz.Threshold(eps), **options)
    twin = zip_twin(models, inputs, share=1.0, threshold=eps, **options)
    shared = [record.shared for record in zipped.history.layers]
    assert shared == [len(turn.pairs) for turn in twin.turns] + [0]
    for task, name in enumerate("ab"):
        assert_close(zipped[name](data[task]), twin(task, inputs[task]))


# --- properties ---------------------------------------------------------------------------------------------------


def permuted(model: nn.Sequential) -> nn.Sequential:
    """The same function with the hidden units of every layer in another order."""
    model = copy.deepcopy(model)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        for writer, reader in itertools.pairwise(layers):
            order = torch.randperm(len(writer.weight))
            writer.weight.copy_(writer.weight[order])
            if writer.bias is not None:
                writer.bias.copy_(writer.bias[order])
            run = reader.weight.shape[1] // len(order)
            columns = (order[:, None] * run + torch.arange(run)).ravel()
            reader.weight.copy_(reader.weight[:, columns])
    return model


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("make, inputs", [(lambda: fc(5, 9, 8, 3), lambda: vectors(60, 5)), (cnn, lambda: images(25))])
def test_a_permuted_copy_is_found_unit_by_unit(
    make: Callable[[], nn.Sequential], inputs: Callable[[], Tensor], compensate: bool, matching: str
) -> None:
    model, x = make(), inputs()
    copy_ = permuted(model)
    assert_close(copy_(x), model(x), 1e-12)
    zipped = run_zip([model, copy_], [[x], [x]], matching=matching, compensate=compensate)
    for record in zipped.history.layers[:-1]:
        assert record.shared == min(record.units)
        assert record.cost < 1e-10
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-7)
        assert_close(zipped[name](2 * x + 1), model(2 * x + 1), 1e-7)


@pytest.mark.parametrize("make", [lambda: fc(81, 6, 5, 3), cnn, batch_normed, lambda: cnn(bias=False)])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_merging_with_itself_changes_nothing(make: Callable[[], nn.Sequential], share: float) -> None:
    model, x = make().eval(), images(30)
    x = x.flatten(1) if isinstance(model[0], nn.Linear) else x
    zipped = run_zip([model, copy.deepcopy(model)], [[x], [x]], share=share)
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-8)


class Twice(nn.Module):
    """Its hidden layers run twice."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)
        self.act = nn.ReLU(inplace)
        self.out = nn.Linear(10, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.body(x), self.body(1 - x)], dim=1))


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: Twice(inplace=False), vectors(30, 4)),
        (lambda: Twice(inplace=True), vectors(30, 4)),
        (Attention, vectors(60, 4).reshape(12, 5, 4)),
    ],
)
def test_merging_with_itself_changes_nothing_in_other_networks(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make().to(DOUBLE)
    zipped = run_zip([model, copy.deepcopy(model)], [[x], [x]])
    assert zipped.history.layers[0].shared == zipped.history.layers[0].units[0]
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-8)


def test_both_tasks_may_be_one_model_object() -> None:
    model, x = cnn(), images(10)
    zipped = run_zip([model, model], [[x], [x]])
    assert_close(zipped["a"](x), model(x), 1e-8)
    assert_close(zipped["b"](x), model(x), 1e-8)


@pytest.mark.parametrize("compensate", [False, True])
def test_nothing_shared_changes_nothing(compensate: bool) -> None:
    models, data, _ = uneven_cnn()
    zipped = run_zip(models, [[each] for each in data], share=0.0, compensate=compensate)
    for name, model, x in zip("ab", models, data, strict=True):
        assert torch.equal(zipped[name](x), model(x))
    assert zipped.parameter_count() == count(*models)


def count(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


@pytest.mark.parametrize("share, first, second", [(0.25, 2, 2), (0.5, 4, 4), (1.0, 8, 7)])
def test_parameters_of_linear_layers(share: float, first: int, second: int) -> None:
    """Saved per layer (design 2.1): shared inputs times shared units, and the shared units' biases."""
    models = [fc(4, 8, 9, 2), fc(6, 10, 7, 3)]
    zipped = run_zip(models, [[vectors(20, 4)], [vectors(20, 6)]], share=share, own_scale=False)
    saved = [4 * first + first, first * second + second, 0]
    assert [r.before - r.after for r in zipped.history.layers] == saved
    assert zipped.parameter_count() == count(*models) - sum(saved)
    # The fictive connections of the smaller input are A's only in name: a block as wide as B's input serves both.
    assert zipped.shared_parameter_count() == 6 * first + first + first * second + second
    assert zipped.parameter_count(["b"]) == count(models[1])


@pytest.mark.parametrize("share, kernels, units", [(0.25, (1, 1), 2), (0.5, (2, 2), 3), (1.0, (4, 4), 6)])
def test_parameters_of_convolutions(share: float, kernels: tuple[int, int], units: int) -> None:
    models = [cnn(1, (4, 5), 6), cnn(1, (5, 4), 7)]
    zipped = run_zip(models, [[images(10)], [images(10)]], share=share, own_scale=False)
    first, second = kernels
    saved = [
        1 * first * 9 + first,
        first * second * 4 + second,
        second * 4 * units + units,  # 4 pixels of each kernel behind the flatten
        0,
    ]
    assert [r.before - r.after for r in zipped.history.layers] == saved
    assert zipped.parameter_count() == count(*models) - sum(saved)
    assert zipped.shared_parameter_count() == sum(saved)


def test_parameters_without_biases() -> None:
    models = [fc(4, 6, 5, 3, bias=False), fc(4, 6, 5, 3)]
    zipped = run_zip(models, [[vectors(20, 4)], [vectors(20, 4)]], own_scale=False)
    assert [r.before - r.after for r in zipped.history.layers] == [4 * 6, 6 * 5, 0]


def partly_equal() -> tuple[nn.Sequential, nn.Sequential]:
    """B is A with its units in another order; then 3 of 8 and 2 of 6 units of B are made quite different."""
    model = fc(5, 8, 6, 3)
    other = permuted(model)
    with torch.no_grad():
        other[0].weight[:3] += 10 * torch.randn(3, 5)
        other[2].weight[:2] += 10 * torch.randn(2, 8)
    return model, other


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_threshold_shares_exactly_the_pairs_below_it(matching: str) -> None:
    models, x = partly_equal(), vectors(50, 5)
    data = [[x], [x]]
    everywhere = run_zip(models, data, share=tz.Threshold(1e-8), matching=matching, compensate=False)
    assert [r.shared for r in everywhere.history.layers] == [5, 4, 0]
    for name, model in zip("ab", models, strict=True):
        assert_close(everywhere[name](x), model(x), 1e-6)
    second = run_zip(models, data, share=tz.Threshold({"0": 1e-8}), matching=matching)
    assert [r.shared for r in second.history.layers] == [5, 0, 0]
    nothing = run_zip(models, data, share=tz.Threshold({}), matching=matching)
    assert [r.shared for r in nothing.history.layers] == [0, 0, 0]
    large = run_zip(models, data, share=tz.Threshold({"0": 1e-8, "2": 1e9}), matching=matching)
    assert [r.shared for r in large.history.layers] == [5, 6, 0]


def test_share_by_layer() -> None:
    models, data = [fc(4, 8, 7, 3), fc(4, 9, 5, 3)], [[vectors(20, 4)], [vectors(20, 4)]]

    def shared(share: Any) -> list[int]:
        return [r.shared for r in run_zip(models, data, share=share).history.layers]

    assert shared({"0": 3, "2": 0.4}) == [3, 2, 0]
    with pytest.warns(tz.TaskzipWarning, match="1 is a count"):
        assert shared({"0": 1, "2": 1.0}) == [1, 5, 0]
    assert shared({"0": 0.5}) == [4, 0, 0]
    assert shared({"0": 8, "2": 0}) == [8, 0, 0]
    assert shared({}) == [0, 0, 0]
    assert shared({"4": 0}) == [0, 0, 0]  # the output layer may be named, with nothing to share


def test_a_layer_may_be_shared_behind_one_that_is_not() -> None:
    """With no shared units to read from, only the bias is left to compare: nothing in common but no fault either."""
    models, data = [fc(4, 6, 5, 3), fc(4, 6, 5, 3)], [[vectors(20, 4)], [vectors(20, 4)]]
    zipped = run_zip(models, data, share={"0": 0.5, "2": 3})
    assert [r.shared for r in zipped.history.layers] == [3, 3, 0]
    with pytest.raises(tz.InputError, match=r"layer .2. cannot be shared .no inputs in common"):
        run_zip(models, data, share={"2": 3})


@pytest.mark.parametrize("matching", ["optimal", "random"])
def test_the_same_seed_gives_the_same_result(matching: str) -> None:
    models, data, _ = uneven_cnn()
    options = {"matching": matching, "max_rows": 40, "share": 0.6}

    def outputs(seed: int) -> Tensor:
        zipped = run_zip(models, [list(each.split(4)) for each in data], seed=seed, **options)
        return torch.cat([zipped[name](x).flatten() for name, x in zip("ab", data, strict=True)])

    first, again, other = outputs(1), outputs(1), outputs(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_layers_of_different_shape_stay_private() -> None:
    one = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5), nn.ReLU(), nn.Linear(5, 2))
    other = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 5), nn.ReLU(), nn.Linear(5, 2))
    models, data = [one.to(DOUBLE), other.to(DOUBLE)], [[images(9)], [images(8)]]
    with pytest.warns(tz.TaskzipWarning, match="nothing could be shared"):
        zipped = run_zip(models, data)
    notes = {record.names: record.note for record in zipped.history.layers}
    assert notes["0", ""] == notes["", "0"] == "no other network has such a layer"
    assert "no inputs in common" in notes["3", "3"]
    assert not any(r.shared for r in zipped.history.layers)
    for name, model, (x,) in zip("ab", models, data, strict=True):
        assert_close(zipped[name](x), model(x), 1e-12)


def test_networks_may_differ_in_depth() -> None:
    """Layers correspond by what they are; more in test_correspondence."""
    models, data = [fc(4, 6, 5, 3), fc(4, 7, 3)], [[vectors(20, 4)], [vectors(20, 4)]]
    zipped = run_zip(models, data, own_scale=False)
    assert [(r.names, r.shared) for r in zipped.history.layers] == [(("0", "0"), 6), (("2", ""), 0), (("4", "2"), 0)]
    assert zipped.parameter_count() == count(*models) - 6 * 5
    for name, (x,) in zip("ab", data, strict=True):
        assert torch.isfinite(zipped[name](x)).all()


def test_half_the_pixels_behind_the_flatten_differ() -> None:
    """Kernels read 4 times by one network and 9 times by the other have no common columns behind the flatten."""
    other = nn.Sequential(*cnn())
    other[6] = nn.Linear(5 * 9, 6, dtype=DOUBLE)
    large = torch.randn(9, 1, 13, 13, dtype=DOUBLE)
    zipped = run_zip([cnn(), other], [[images(9)], [large]])
    assert [r.shared for r in zipped.history.layers] == [4, 5, 0, 0]
    assert torch.isfinite(zipped["b"](large)).all()


def test_dead_inputs_are_no_fault() -> None:
    x, y = vectors(20, 5), vectors(3, 5)  # fewer rows than columns, too
    x[:, 1] = 0
    y[:, 2] = 0
    models = [fc(5, 6, 5, 3), fc(5, 6, 5, 3)]
    with torch.no_grad():
        models[0][0].bias[2] = -1e3  # a unit that never fires
    for damping, ridge in ((1e-2, 1e-3), (0.0, 0.0)):
        zipped = run_zip(models, [[x], [y]], damping=damping, ridge=ridge)
        assert torch.isfinite(zipped["a"](x)).all()
        assert torch.isfinite(zipped["b"](y)).all()


# --- how networks are called, and that they are left alone -----------------------------------------------------------


class TwoInputs(nn.Module):
    """Called with keywords, answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = left if right is None else left + right
        return {"logits": self.out(self.hidden(x).relu())}


def as_sequential(model: TwoInputs) -> nn.Sequential:
    return nn.Sequential(model.hidden, nn.ReLU(), model.out)


def test_dict_batches_and_a_custom_forward() -> None:
    models = [TwoInputs().to(DOUBLE), TwoInputs().to(DOUBLE)]
    x, y = vectors(24, 4), vectors(30, 4)
    dicts = [{"left": part - 1, "right": torch.ones_like(part)} for part in x.split(10)]
    records = [[part, "a comment"] for part in y.split(8)]
    tasks = [
        tz.Task("a", models[0], dicts),
        tz.Task("b", models[1], records, forward=lambda model, batch: model(batch[0])["logits"]),
    ]
    zipped = tz.zip(tasks, share=0.5, max_rows=None, progress=False)
    plain = run_zip([as_sequential(m) for m in models], [[x], [y]], share=0.5)
    assert_close(zipped["a"](left=x)["logits"], plain["a"](x), 1e-9)
    assert_close(zipped["b"](y)["logits"], plain["b"](y), 1e-9)


class Masked(nn.Module):
    """Answers -inf for what is ruled out, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = fc(4, 6, 3)
        self.register_buffer("ruled_out", torch.tensor([False, True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(self.ruled_out, float("-inf"))


def test_outputs_may_be_infinite_on_purpose() -> None:
    model, x = Masked(), vectors(20, 4)
    zipped = run_zip([model, copy.deepcopy(model)], [[x], [x]])
    assert_close(zipped["a"](x)[:, ::2], model(x)[:, ::2])


class Watched(nn.Module):
    """A network with all that could be disturbed: batch-norm, dropout, a frozen layer, hooks, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            OrderedDict(first=nn.Linear(5, 6), norm=nn.BatchNorm1d(6), relu=nn.ReLU(), drop=nn.Dropout(0.5))
        )
        self.second = nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.body(x)).relu())


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: t.clone() for name, t in model.state_dict().items()},
        "objects": {name: (id(p), p.data_ptr(), type(p)) for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in model.named_modules()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "hooks": {
            name: [list(hooks.items()) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for name, m in model.named_modules()
        },
    }


def assert_same_state(now: dict[str, Any], before: dict[str, Any]) -> None:
    for what, was in before.items():
        assert list(now[what]) == list(was)
        for name, value in was.items():
            same = torch.equal(now[what][name], value) if isinstance(value, Tensor) else now[what][name] == value
            assert same, f"{what} of {name}"


def watched() -> Watched:
    model = Watched().to(DOUBLE)
    model(vectors(8, 5)).sum().backward()  # gradients, and batch-norm statistics
    model.second.requires_grad_(False)
    model.second.eval()
    model.body.drop.eval()
    model.second.register_forward_hook(hook)
    model.register_forward_pre_hook(pre_hook)
    return model


def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.0


def pre_hook(module: nn.Module, args: Any) -> None:
    return None


@pytest.mark.parametrize("compensate", [False, True])
def test_the_models_are_left_exactly_as_they_were(compensate: bool) -> None:
    models = [watched(), watched()]
    before = [state_of(m) for m in models]
    grad = torch.is_grad_enabled()
    zipped = run_zip(models, [[vectors(20, 5)], [vectors(20, 5)]], compensate=compensate)
    assert torch.is_grad_enabled() == grad
    for model, state in zip(models, before, strict=True):
        assert_same_state(state_of(model), state)
    mine = {p.data_ptr() for m in models for p in m.parameters()}
    assert not mine & {p.data_ptr() for p in zipped.parameters()}, "the joint network shares memory with the models"
    assert not any(module.training for module in zipped.modules())


def test_a_network_that_counts_its_calls_is_left_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = fc(4, 6, 5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x)

    models = [Counts(), Counts()]
    run_zip(models, [[vectors(20, 4)], [vectors(20, 4)]])
    assert [model.calls.item() for model in models] == [0, 0]


def test_the_data_are_left_as_they_were() -> None:
    data = [[vectors(10, 4)], [vectors(10, 4)]]
    before = copy.deepcopy(data)
    run_zip([fc(4, 6, 3), fc(4, 6, 3)], data)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, before, strict=True))


def test_an_empty_batch_among_others_is_skipped() -> None:
    models, x, y = [fc(4, 6, 5, 3), fc(4, 6, 5, 3)], vectors(20, 4), vectors(20, 4)
    wanted = run_zip(models, [[x], [y]])
    for data in ([x, x[:0]], [x[:0], x]):
        zipped = run_zip(models, [data, [y]])
        assert_close(zipped["a"](x), wanted["a"](x), 1e-9)


@pytest.mark.parametrize("name", ["spec", "order0", "order1", "weight", "0", "x-y"])
def test_tasks_may_have_any_name_that_task_takes(name: str) -> None:
    tasks = [tz.Task(each, fc(4, 6, 5, 3), [vectors(20, 4)]) for each in (name, "b")]
    zipped = tz.zip(tasks, share=0.5, progress=False)
    assert set(zipped) == {name, "b"}


@pytest.mark.parametrize("max_rows", ["auto", 100, None])
def test_sampled_rows_give_nearly_the_same(max_rows: Any) -> None:
    model, x = cnn(), images(60)
    zipped = run_zip([model, permuted(model)], [[x], [x]], max_rows=max_rows)
    assert_close(zipped["a"](x), model(x), 1e-6)


def test_float32() -> None:
    models, data, _ = uneven_cnn()
    wanted = run_zip(models, [[each] for each in data])
    single = [copy.deepcopy(m).float() for m in models]
    zipped = run_zip(single, [[each.float()] for each in data])
    for name, x in zip("ab", data, strict=True):
        assert zipped[name](x.float()).dtype == torch.float32
        assert_close(zipped[name](x.float()).double(), wanted[name](x), 1e-3)


def test_a_nearly_constant_unit_keeps_its_spread_in_float32() -> None:
    """A mean far above the spread: the variance must not drown in rounding, and no unit be scaled by noise."""
    model, x = fc(4, 6, 5, 3, dtype=torch.float32), vectors(200, 4).float()
    with torch.no_grad():
        model[0].weight[0] *= 1e-3
        model[0].bias[0] = 10.0
    zipped = run_zip([model, copy.deepcopy(model)], [[x], [x]])
    weight = zipped.materialize("a")[0].weight
    assert_close(weight[0], model[0].weight[0], 1e-2)


def test_a_threshold_below_every_difference_shares_nothing() -> None:
    models, data, _ = same_fc()
    zipped = run_zip(models, [[each] for each in data], share=tz.Threshold(1e-9))
    assert [record.shared for record in zipped.history.layers] == [0, 0, 0]
    assert_close(zipped["a"](data[0]), models[0](data[0]), 1e-12)


def test_a_threshold_of_zero_finds_equal_units() -> None:
    model, x = fc(4, 9, 7, 3, dtype=torch.float32), vectors(30, 4).float()
    zipped = run_zip([model, copy.deepcopy(model)], [[x], [x]], share=tz.Threshold(0.0))
    assert [record.shared for record in zipped.history.layers] == [9, 7, 0]


def test_shuffling_data_are_drawn_by_the_seed_and_the_callers_generator_stays() -> None:
    models, x, y = [fc(4, 6, 5, 3), fc(4, 6, 5, 3)], vectors(60, 4), vectors(60, 4)
    loaders = [torch.utils.data.DataLoader(each, batch_size=8, shuffle=True) for each in (x, y)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = run_zip(models, loaders, max_rows=20)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(77)
    second = run_zip(models, loaders, max_rows=20)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


# --- bad inputs: a clear error, and the models unchanged --------------------------------------------------------------


def rejected(tasks: Any, message: str, error: type[Exception] = tz.InputError, **options: Any) -> None:
    """`zip` raises, with a message that says so, and every model is as it was."""
    models = [task.model for task in tasks] if isinstance(tasks, list) else []
    before = [state_of(m) for m in models]
    with pytest.raises(error, match=message):
        tz.zip(tasks, **{"share": 1.0, "progress": False, **options})
    for model, state in zip(models, before, strict=True):
        assert_same_state(state_of(model), state)


def test_no_task() -> None:
    rejected([], "needs at least two tasks, got 0")


def test_one_task() -> None:
    rejected(fc_tasks()[:1], "needs at least two tasks, got 1")


@pytest.mark.parametrize("tasks", [5, None, "ab", (model for model in ())])
def test_what_is_no_list_of_tasks(tasks: Any) -> None:
    rejected(tasks, "tasks must be a list of taskzip.Task objects")


def test_models_instead_of_tasks() -> None:
    with pytest.raises(tz.InputError, match=r"tasks must be a list of taskzip.Task objects"):
        tz.zip([fc(4, 6, 3), fc(4, 6, 3)], share=1.0, balance={"a": 0.5, "b": 0.5})  # type: ignore[list-item]


def test_the_same_name_twice() -> None:
    a, b = fc_tasks()
    rejected([a, tz.Task("a", b.model, b.data)], "two tasks are called 'a'")


def test_no_layers_at_all() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    rejected([tz.Task(name, Scale(), [torch.ones(3, 4)]) for name in "ab"], r"can be zipped: factor \(read by mul\)")


@pytest.mark.parametrize("data", [[], [vectors(0, 4)], [(vectors(0, 4), torch.zeros(0))]])
def test_data_of_length_zero(data: list[Any]) -> None:
    a, b = fc_tasks()
    rejected([a, tz.Task("b", b.model, data)], "task 'b': the calibration data are empty")


def test_data_from_a_generator() -> None:
    with pytest.raises(tz.InputError, match="task 'a': data is a generator, which can be read only once"):
        tz.Task("a", fc(4, 6, 3), (vectors(4, 4) for _ in range(3)))


def test_one_bare_tensor_as_data() -> None:
    with pytest.raises(tz.InputError, match=r"task 'a': data is one tensor of shape \(20, 4\), not batches"):
        tz.Task("a", fc(4, 6, 3), vectors(20, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    tasks = fc_tasks()
    with torch.no_grad():
        tasks[1].model[2].bias[0] = value
    with pytest.raises(tz.InputError, match=r"task 'b': '2\.bias' has NaN or infinite values"):
        tz.zip(tasks, share=1.0, progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_data_that_are_not_finite(value: float) -> None:
    a, b = fc_tasks()
    bad = vectors(6, 4)
    bad[3, 2] = value
    rejected([tz.Task("a", a.model, [vectors(6, 4), bad]), b], "task 'a': batch 1 of the calibration data has NaN")


def test_an_activation_that_overflows_on_a_later_batch() -> None:
    a, b = fc_tasks()
    with torch.no_grad():
        a.model[0].weight.fill_(1e10)
    data = [vectors(6, 4), torch.full((2, 4), 1e300, dtype=DOUBLE)]
    rejected([tz.Task("a", a.model, data), b], "task 'a', layer '0': .* NaN or infinite")


def test_outputs_that_are_not_numbers() -> None:
    """The message must not say that the architecture was misunderstood."""
    a, b = fc_tasks()
    with torch.no_grad():
        a.model[0].weight.fill_(1e300)
        a.model[2].weight.fill_(1e300)
        a.model[4].weight[:, 0] = -1.0
    rejected([a, b], "task 'a': the network's own outputs are NaN")


def test_the_wrong_shape_of_data() -> None:
    a, b = fc_tasks()
    rejected(
        [a, tz.Task("b", b.model, [vectors(7, 5)])], r"task 'b': the network fails on batch 0 with inputs \(7, 5\)"
    )


def test_the_wrong_shape_of_a_later_batch() -> None:
    a, b = fc_tasks()
    data = [vectors(7, 4), vectors(7, 4), vectors(3, 9)]
    rejected([a, tz.Task("b", b.model, data)], r"task 'b': the network fails on batch 2 with inputs \(3, 9\)")


def test_data_of_another_type_than_the_weights() -> None:
    a, b = fc_tasks()
    data = [vectors(7, 4).float()]
    rejected([a, tz.Task("b", b.model, data)], r"task 'b': the network fails on batch 0 with inputs \(7, 4\): .*dtype")


@pytest.mark.parametrize("share", [-0.1, 1.5, 2, float("nan"), "half", None, True])
def test_a_share_outside_0_to_1(share: Any) -> None:
    rejected(fc_tasks(), f"share is {share!r}: give a fraction from 0 to 1", share=share)


@pytest.mark.parametrize("share", [-1, -0.5, 1.5, "all", True])
def test_a_share_of_a_layer_that_is_no_share(share: Any) -> None:
    rejected(fc_tasks(), f"share for layer '2' is {share!r}: give a fraction", share={"0": 0.5, "2": share})


def test_an_unknown_layer_name() -> None:
    rejected(fc_tasks(), "share names layer 'conv1'.*can be named are 0, 2, 4", share={"conv1": 0.5})
    rejected(fc_tasks(), "share names layer 'fc'", share=tz.Threshold({"fc": 0.1}))


def test_a_count_above_the_units() -> None:
    message = "share for layer '2' asks for 6 shared units, but the smaller network has 5"
    rejected(fc_tasks(), message, share={"0": 6, "2": 6})


def test_sharing_the_output_layer() -> None:
    rejected(fc_tasks(), "layer '4' cannot be shared .a: an output of the network", share={"4": 2})


def test_an_unknown_matching() -> None:
    rejected(fc_tasks(), "matching='best' is not known: choose one of 'optimal', 'greedy', 'random'", matching="best")


@pytest.mark.parametrize("balance", [0.0, 1.0, -0.5, 2, [0.5, 0.6], [1.0], [0.2, 0.3, 0.5], [0.5, float("nan")]])
def test_a_bad_balance(balance: Any) -> None:
    rejected(fc_tasks(), "must give each of the 2 tasks a weight above 0, summing to 1", balance=balance)


def test_a_balance_for_other_tasks() -> None:
    rejected(
        fc_tasks(),
        r"must name every task once: it names \['a', 'x'\], the tasks are \['a', 'b'\]",
        balance={"a": 0.5, "x": 0.5},
    )


@pytest.mark.parametrize("seed", [-1, "x", 0.5, None])
def test_a_seed_that_is_no_seed(seed: Any) -> None:
    rejected(fc_tasks(), "seed", seed=seed)


@pytest.mark.parametrize("balance", ["half", object()])
def test_a_balance_that_is_no_number(balance: Any) -> None:
    rejected(fc_tasks(), "balance", balance=balance)


def test_the_forms_of_balance_agree() -> None:
    models, data, _ = same_fc()
    results = [
        run_zip(models, [[each] for each in data], balance=balance)["a"](data[0])
        for balance in (0.3, np.float64(0.3), [0.3, 0.7], (0.3, 0.7), np.array([0.3, 0.7]), {"b": 0.7, "a": 0.3})
    ]
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("name", ["damping", "ridge"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "much"])
def test_a_bad_damping_or_ridge(name: str, value: Any) -> None:
    rejected(fc_tasks(), f"{name}={value!r} must be a number >= 0", **{name: value})


@pytest.mark.parametrize("max_rows", [0, -5, 2.5, "many", True])
def test_a_bad_number_of_rows(max_rows: Any) -> None:
    rejected(fc_tasks(), f"max_rows={max_rows!r} must be a positive number of rows", max_rows=max_rows)


def test_different_types_of_weights() -> None:
    a, b = fc_tasks()
    single = tz.Task("b", copy.deepcopy(b.model).float(), [vectors(5, 4).float()])
    rejected([a, single], "one dtype: 'a' has torch.float64; 'b' has torch.float32")
    mixed = tz.Task("b", nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3).to(DOUBLE)), [vectors(5, 4)])
    rejected([a, mixed], "'b' has torch.float32, torch.float64")


def test_a_parameter_without_a_shape_yet() -> None:
    a, _ = fc_tasks()
    lazy = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)).to(DOUBLE)
    with pytest.raises(tz.InputError, match=r"task 'b': parameter '0\.weight' has no shape yet"):
        tz.zip([a, tz.Task("b", lazy, [vectors(5, 4)])], share=1.0, progress=False)


def test_control_flow_that_depends_on_data() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else -self.layer(x)

    a, _ = fc_tasks()
    rejected([a, tz.Task("b", Moody(), [vectors(5, 4)])], "task 'b': Moody cannot be followed", tz.GraphError)
