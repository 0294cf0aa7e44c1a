from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskzip.algebra.curvature import LayerStatistics
from taskzip.errors import InputError
from taskzip.graph import Layer, analyse
from taskzip.observing.answers import Answers
from taskzip.observing.observation import Observer
from taskzip.observing.suspension import Forwards
from taskzip.tasks.running import evaluating, run_batch
from taskzip.tasks.task import Task

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def observer(model: nn.Module, data: list[Any], *, network: nn.Module | None = None, **options: Any) -> Observer:
    task = Task("digits", model, data)
    samples, max_rows, seed = task.check_data(), options.get("max_rows"), options.get("seed", 0)
    network = network or model
    forwards = Forwards(task, network, network.get_parameter)
    return Observer(task, network, model, samples, max_rows, seed, Answers(), forwards)


def layer_of(model: nn.Module, batch: Any, index: int = 0) -> Layer:
    return analyse(model, batch, Task("digits", model, [batch]).run).layers[index]


def observe(
    model: nn.Module, data: list[Any], index: int = 0, changed: bool = False, **options: Any
) -> LayerStatistics:
    return observer(model, data, **options).observe(layer_of(model, data[0], index), original=changed)


def summed(rows: Tensor, answers: Tensor) -> LayerStatistics:
    statistics = LayerStatistics(rows.shape[1], answers.shape[1], torch.device("cpu"))
    statistics.update(rows.detach(), answers.detach())
    return statistics


def assert_same(given: LayerStatistics, wanted: LayerStatistics, rtol: float = 1e-9) -> None:
    for name in ("gram", "cross", "square"):
        torch.testing.assert_close(getattr(given, name), getattr(wanted, name), rtol=rtol, atol=1e-9)


# --- patches ------------------------------------------------------------------------------------------------------


def patches(x: Tensor, conv: Any) -> Tensor:
    """Rows that a convolution reads: it reads them itself, with a kernel for every tap that picks just that tap."""
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.kernel_size)]
    taps = x.shape[1] * math.prod(conv.kernel_size)
    pick = torch.eye(taps, dtype=x.dtype).reshape(taps, x.shape[1], *conv.kernel_size)
    return rows_of(run(x, pick, None, conv.stride, conv.padding, conv.dilation))


def rows_of(z: Tensor) -> Tensor:
    return z.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [
        (1, 1, 0, 1),
        (3, 1, 0, 1),
        (3, 2, 1, 1),
        (2, 3, 1, 1),
        (3, 1, 2, 2),
        ((2, 3), (1, 2), (1, 0), (2, 1)),
        ((5, 1), (2, 1), (2, 3), (1, 3)),
        (7, 1, 0, 1),
    ],
)
def test_patches_of_a_2d_convolution_are_those_of_unfold(kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    x = some(4, 3, 7, 8)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, dtype=DOUBLE)
    rows = F.unfold(x, kernel, dilation, padding, stride).mT.flatten(0, 1)
    assert_same(observe(conv, [x]), summed(rows, rows_of(conv(x))))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel, dilation", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 3), ((3, 2), (1, 2))])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_padding_by_name(padding: str, kernel: Any, dilation: Any) -> None:
    x = some(3, 2, 7, 8)
    conv = nn.Conv2d(2, 4, kernel, 1, padding, dilation, dtype=DOUBLE)
    assert_same(observe(conv, [x]), summed(patches(x, conv), rows_of(conv(x))))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    x = some(3, 2, 7, 8)
    conv = nn.Conv2d(2, 4, 3, 2, (2, 1), padding_mode=mode, dtype=DOUBLE)
    padded = F.pad(x, (1, 1, 2, 2), mode=mode)
    assert_same(observe(conv, [x]), summed(F.unfold(padded, 3, stride=2).mT.flatten(0, 1), rows_of(conv(x))))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation", [(1, 1, 0, 1), (3, 2, 1, 1), (2, 1, 2, 2), (3, 1, "same", 1)]
)
def test_patches_in_1_2_and_3_dimensions(dims: int, kernel: int, stride: int, padding: Any, dilation: int) -> None:
    x = some(3, 2, *(5, 6, 4)[:dims])
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(2, 4, kernel, stride, padding, dilation, dtype=DOUBLE)
    assert_same(observe(conv, [x]), summed(patches(x, conv), rows_of(conv(x))))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_sample_without_a_batch_axis(dims: int) -> None:
    x = some(2, *(5, 6, 4)[:dims])
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(2, 4, 3, 2, 1, dtype=DOUBLE)
    assert_same(observe(conv, [x]), summed(patches(x[None], conv), rows_of(conv(x)[None])))


@pytest.mark.parametrize("arrange", ["channels_last", "transposed", "expanded", "cut"])
def test_how_the_input_lies_in_memory_does_not_matter(arrange: str) -> None:
    x = {
        "channels_last": lambda: some(3, 2, 6, 6).to(memory_format=torch.channels_last),
        "transposed": lambda: some(3, 2, 6, 6).transpose(2, 3),
        "expanded": lambda: some(1, 1, 6, 1).expand(3, 2, 6, 6),
        "cut": lambda: some(5, 4, 9, 13)[1:4, 1:3, 2:8, ::2][..., :6],
    }[arrange]()
    for padding in (0, 1):
        conv = nn.Conv2d(2, 4, 3, padding=padding, dtype=DOUBLE)
        rows = F.unfold(x.contiguous(), 3, padding=padding).mT.flatten(0, 1)
        assert_same(observe(conv, [x]), summed(rows, rows_of(conv(x))))


def test_patches_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, conv = some(4, 3, 7, 8), nn.Conv2d(3, 5, 3, dtype=DOUBLE)
    whole = observe(conv, [x])
    monkeypatch.setattr("taskzip.observing.observation._CHUNK_ELEMENTS", 100)  # less than four patches
    assert_same(observe(conv, [x]), whole)


# --- linear layers, and the way to a layer ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (4,), (3, 5, 4), (2, 3, 5, 4)])
def test_a_linear_layer_reads_along_its_last_axis(shape: tuple[int, ...]) -> None:
    x, linear = some(*shape), nn.Linear(4, 3, dtype=DOUBLE)
    statistics = observe(linear, [x])
    assert_same(statistics, summed(x.reshape(-1, 4), linear(x).reshape(-1, 3)))
    assert statistics.rows == x.numel() / 4


def test_batches_of_any_size_add_up() -> None:
    x = some(20, 2, 6, 6)
    conv = nn.Conv2d(2, 4, 3, stride=2, dtype=DOUBLE)
    assert_same(observe(conv, list(x.split(6))), observe(conv, [x]))


def test_an_empty_batch_adds_nothing() -> None:
    x, linear = some(7, 4), nn.Linear(4, 3, dtype=DOUBLE)
    assert_same(observe(linear, [x, x[:0]]), observe(linear, [x]))
    conv, y = nn.Conv1d(2, 3, 2, dtype=DOUBLE), some(5, 2, 6)
    assert_same(observe(conv, [y, y[:0]], max_rows="auto"), observe(conv, [y]))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(DOUBLE)


def test_a_changed_network_is_read_against_the_original_answers() -> None:
    original, network, x = mlp(), mlp(), some(9, 4)
    layer = layer_of(original, x, 1)
    given = observer(original, [x], network=network).observe(layer, original=True)
    assert_same(given, summed(network[:2](x), original[:3](x)))


def test_samples_of_both_networks_belong_together() -> None:
    """Sampled rows: input and answer are of the same sample and place."""
    first, second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 2)
    original = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(50, 2)).to(DOUBLE)
    x = some(8, 1, 8, 8)
    layer = layer_of(original, x, 1)
    statistics = observer(original, list(x.split(3)), max_rows=60).observe(layer, original=True)
    weight = torch.cat([second.weight.flatten(1), second.bias[:, None]], dim=1)
    torch.testing.assert_close(statistics.cross, statistics.gram @ weight.mT)


def test_the_pass_stops_at_the_layer() -> None:
    class Fails(nn.Module):
        on = False

        def forward(self, x: Tensor) -> Tensor:
            if Fails.on:
                raise RuntimeError("nothing behind the layer is needed")
            return x

    model = nn.Sequential(nn.Linear(4, 6), Fails(), nn.Linear(6, 3)).to(DOUBLE)
    x = some(5, 4)
    layer = layer_of(model, x)
    Fails.on = True
    assert observer(model, [x]).observe(layer, original=True).rows == 5


class Twice(nn.Module):
    """One layer that runs twice, on the left and on the right input."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6, dtype=DOUBLE)
        self.act = nn.ReLU(inplace)
        self.out = nn.Linear(12, 3, dtype=DOUBLE)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(torch.cat([self.act(self.body(left)), self.act(self.body(right))], dim=1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_a_layer_that_is_called_twice(changed: bool, inplace: bool) -> None:
    model, left, right = Twice(inplace), some(7, 4), some(7, 4) + 2
    data = [((left[:3], right[:3]), None), ((left[3:], right[3:]), None)]
    assert layer_of(model, data[0]).calls == 2
    both = torch.cat([left, right])
    assert_same(observe(model, data, changed=changed), summed(both, model.body(both)))


@pytest.mark.parametrize("max_rows", [6, "auto"])
def test_rows_of_a_layer_that_is_called_twice(max_rows: Any) -> None:
    model, data = Twice(), [((some(50, 4), some(50, 4)), None)]
    statistics = observe(model, data, max_rows=max_rows)
    assert statistics.rows == pytest.approx(100)
    assert torch.linalg.matrix_rank(statistics.gram) == 5


def test_functional_calls_with_keywords() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(some(4, 2, 3, 3))
            self.matrix = nn.Parameter(some(3, 64))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(input=x, weight=self.kernel, padding=1, dilation=(1, 1))
            return F.linear(input=x.flatten(1), weight=self.matrix)

    model, x = Functional(), some(5, 2, 4, 4)
    z = F.conv2d(x, model.kernel, padding=1)
    assert_same(observe(model, [x]), summed(F.unfold(x, 3, padding=1).mT.flatten(0, 1), rows_of(z)))
    assert_same(observe(model, [x], 1), summed(z.flatten(1), model(x)))


# --- sampling -----------------------------------------------------------------------------------------------------


def test_sampling_is_unbiased() -> None:
    """The mean over many seeds comes close to the full sums, for batches of any size."""
    x = some(14, 1, 5, 5) + torch.linspace(-2, 2, 14, dtype=DOUBLE)[:, None, None, None]
    conv = nn.Conv2d(1, 2, 2, dtype=DOUBLE)
    data, layer = list(x.split([3, 10, 1])), layer_of(conv, x)
    full = observe(conv, data)
    seeds = 300
    sampled = [observer(conv, data, max_rows=20, seed=seed).observe(layer, original=False) for seed in range(seeds)]
    for name in ("gram", "cross", "square"):
        values = torch.stack([getattr(s, name) for s in sampled])
        error = values.mean(0) - getattr(full, name)
        spread = values.std(0) / seeds**0.5
        assert (error.abs() <= 5 * spread + 1e-9).all()
        assert values.std(0).max() > 0
    assert all(s.rows == pytest.approx(full.rows) for s in sampled)


@pytest.mark.parametrize("max_rows, used", [(3, 3), (10, 10), (1000, 96), (None, 96)])
def test_no_more_rows_than_asked_for(max_rows: Any, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    update = LayerStatistics.update

    def counted(self: LayerStatistics, rows: Tensor, answers: Tensor, weight: float = 1.0) -> None:
        seen.append((len(rows), weight))
        update(self, rows, answers, weight)

    monkeypatch.setattr(LayerStatistics, "update", counted)
    statistics = observe(nn.Conv2d(1, 2, 2, dtype=DOUBLE), [some(6, 1, 5, 5)], max_rows=max_rows)
    assert statistics.rows == pytest.approx(96)
    assert sum(rows for rows, _ in seen) == used
    assert all(weight == 96 / used for _, weight in seen)


def test_auto_is_50_rows_per_column() -> None:
    linear = nn.Linear(2, 3, dtype=DOUBLE)
    few, many = some(149, 2), some(4000, 2)
    assert_same(observe(linear, [few], max_rows="auto"), observe(linear, [few]))
    sampled = observe(linear, [many], max_rows="auto")
    assert sampled.rows == pytest.approx(4000)
    assert_same(sampled, observe(linear, [many], max_rows=150))
    assert not torch.allclose(sampled.gram, observe(linear, [many]).gram)


def test_the_seed_decides() -> None:
    linear, x = nn.Linear(3, 2, dtype=DOUBLE), some(200, 3)
    one, same, other = (observe(linear, [x], max_rows=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.gram, same.gram)
    assert not torch.allclose(one.gram, other.gram)


def test_the_random_state_of_torch_is_left_alone() -> None:
    linear, x = nn.Linear(3, 2, dtype=DOUBLE), some(200, 3)
    before = torch.get_rng_state()
    observe(linear, [x], max_rows=20)
    assert torch.equal(torch.get_rng_state(), before)


# --- types, modes, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_summed_in_full(dtype: torch.dtype, rtol: float) -> None:
    linear, x = nn.Linear(4, 3), torch.rand(3000, 4) + 1
    given = observe(linear.to(dtype), [x.to(dtype)])
    assert given.gram.dtype == torch.float64
    wanted = summed(x.double(), linear.double()(x.double()))
    assert_same(given, wanted, rtol)


def test_modes_and_gradients_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.9), nn.Linear(6, 3)).to(DOUBLE)
    model[1].eval()
    modes = [m.training for m in model.modules()]
    x = some(9, 4)
    reads = observe(model, [x], 1)
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    model.eval()
    assert_same(reads, summed(model[:3](x), model(x)))


def test_modes_are_put_back_after_an_error() -> None:
    model = mlp()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model, model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bad, reason", [(some(3, 5), "shapes cannot be multiplied"), (some(3, 4).float(), "dtype")])
def test_a_batch_that_the_network_does_not_take(bad: Tensor, reason: str) -> None:
    model = mlp()
    message = rf"task 'digits': the network fails on batch 1 with inputs \(3, {bad.shape[1]}\): .*{reason}"
    with pytest.raises(InputError, match=message):
        observe(model, [some(3, 4), bad])


def test_a_call_that_does_not_fit_the_network() -> None:
    task = Task("digits", mlp(), [{"x": some(3, 4)}])
    with pytest.raises(InputError, match=r"fails on batch 7 with inputs \(3, 4\): .*unexpected keyword argument 'x'"):
        run_batch(task, task.model, {"x": some(3, 4)}, 7)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_values_that_are_not_finite(index: int) -> None:
    model, x = mlp(), some(3, 4)
    layer = layer_of(model, x, index)
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    with pytest.raises(InputError, match=f"task 'digits', layer '{2 * index}': .* NaN or infinite"):
        observer(model, [x]).observe(layer, original=False)


@pytest.mark.parametrize("padding, stride", [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_images_of_different_sizes(padding: int, stride: int) -> None:
    """A fully convolutional network reads as many places as each batch has."""
    conv = nn.Conv2d(1, 2, 3, stride, padding, dtype=DOUBLE)
    data = [some(3, 1, 6, 7), some(2, 1, 9, 5)]
    rows = torch.cat([F.unfold(x, 3, 1, padding, stride).mT.flatten(0, 1) for x in data])
    answers = torch.cat([rows_of(conv(x)) for x in data])
    assert_same(observe(conv, data), summed(rows, answers))
