"""FLOPs are counted by running, against formulas by hand; a multiply-add is two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.zipped.flops import count_flops


def perceptron(outputs: int, inputs: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, outputs)).eval()


def conv_net(outputs: int) -> nn.Sequential:
    """Kernels of 3x3 over 8x8 places, then, two steps apart, over 3x3; and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, outputs),
    ).eval()


def zipped_pair(models: list[nn.Module], data: list[Tensor], share: float, **options: bool) -> tz.ZippedModel:
    tasks = [tz.Task(name, model, [x]) for name, model, x in zip("ab", models, data, strict=True)]
    return tz.zip(tasks, share=share, progress=False, **options)


def flops(zipped: tz.ZippedModel) -> dict[str, object]:
    return zipped.history.settings["flops"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_linear_layers(share: float):
    zipped = zipped_pair([perceptron(3), perceptron(4)], [torch.randn(32, 6)] * 2, share)
    a, b = (2 * (6 * 8 + 8 * 7 + 7 * n) for n in (3, 4))
    assert flops(zipped)["tasks"] == {"a": a, "b": b}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_convolutions(share: float):
    """A weight that is put together from blocks costs what a dense one does."""
    zipped = zipped_pair([conv_net(3), conv_net(5)], [torch.randn(16, 2, 8, 8)] * 2, share)
    a, b = (2 * (64 * 4 * (2 * 9) + 9 * 6 * (4 * 9) + 54 * n) for n in (3, 5))
    assert flops(zipped)["tasks"] == {"a": a, "b": b}


def test_together_is_what_the_forward_of_the_joint_network_takes(monkeypatch: pytest.MonkeyPatch):
    """Whatever it computes once counts once, because it is run and not added up."""

    def head_of_both(zipped: tz.ZippedModel, x: Tensor) -> dict[str, Tensor]:
        hidden = zipped["a"][:-1](x)
        return {name: zipped[name][-1](hidden) for name in zipped}

    monkeypatch.setattr(tz.ZippedModel, "forward", head_of_both)
    zipped = zipped_pair([perceptron(3), perceptron(4)], [torch.randn(32, 6), torch.randn(20, 6)], 1.0)
    assert flops(zipped)["together"] == 2 * (6 * 8 + 8 * 7 + 7 * 3 + 7 * 4)


@pytest.mark.parametrize("options", [{}, {"cross": False}, {"batch_norm": "fold"}, {"aligned": True}])
def test_those_of_the_originals_are_the_same_whatever_zip_does(options: dict[str, object]):
    models = [conv_net(3), nn.Sequential(*conv_net(5), nn.BatchNorm1d(5)).eval()]
    given = [2 * (64 * 4 * (2 * 9) + 9 * 6 * (4 * 9) + 54 * n) for n in (3, 5)]
    tasks = [tz.Task(name, model, [torch.randn(16, 2, 8, 8)]) for name, model in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=0.5, progress=False, **options)
    assert flops(zipped)["originals"] == dict(zip("ab", given, strict=True))
    apart = next(line for line in zipped.summary().splitlines() if line.startswith(" all, apart"))
    assert apart.split()[2] == f"{sum(given):,}"
    fewer = list(flops(zipped)["tasks"].values()) != given
    assert fewer == ("cross" in options) == ("FLOPs of one task of the joint network by itself" in zipped.summary())


def test_a_common_trunk_counts_once():
    zipped = zipped_pair([conv_net(3), conv_net(5)], [torch.randn(16, 2, 8, 8)] * 2, 1.0, own_scale=False)
    assert flops(zipped)["together"] == 2 * (64 * 4 * (2 * 9) + 9 * 6 * (4 * 9) + 54 * 3 + 54 * 5)


def test_networks_for_batches_of_one_size():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(x.reshape(32, 6)).relu())

    zipped = zipped_pair([Sized(), Sized()], [torch.randn(32, 6)] * 2, 0.0)
    each = dict.fromkeys("ab", 2 * (48 + 24))
    assert flops(zipped) == {"originals": each, "tasks": each, "together": 4 * (48 + 24)}


def test_tasks_with_other_inputs_have_none_together():
    zipped = zipped_pair([perceptron(3), perceptron(3, 5)], [torch.randn(32, 6), torch.randn(32, 5)], 0.5)
    assert flops(zipped)["together"] is None
    first, second = flops(zipped)["tasks"].values()
    assert f"{first + second} (100%)" in zipped.summary() and "each on its own input" in zipped.summary()


def test_inputs_that_only_look_alike_have_none_together():
    def words(vocabulary: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(vocabulary, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    data = [torch.arange(9).reshape(3, 3).flip(0), torch.arange(4).reshape(2, 2).repeat(1, 2)[:, :3]]
    zipped = zipped_pair([words(9), words(4)], data, 0.5)
    each = dict.fromkeys("ab", 2 * 3 * (6 * 8 + 8 * 2))
    assert flops(zipped) == {"originals": each, "tasks": each, "together": None}


def test_a_forward_of_its_own_is_called_for_each_task():
    tasks = [
        tz.Task(n, perceptron(3), [{"x": torch.randn(32, 6)}], forward=lambda m, batch: m(batch["x"]).softmax(1))
        for n in "ab"
    ]
    zipped = tz.zip(tasks, share=0.5, progress=False)
    each = dict.fromkeys("ab", 2 * (6 * 8 + 8 * 7 + 7 * 3))
    assert flops(zipped) == {"originals": each, "tasks": each, "together": None}


def test_they_survive_saving(tmp_path: Path):
    zipped = zipped_pair([perceptron(3), perceptron(4)], [torch.randn(32, 6)] * 2, 0.5)
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {"a": perceptron(3), "b": perceptron(4)})
    assert flops(loaded) == flops(zipped) and loaded.summary() == zipped.summary()


def test_attention_counts_whatever_kernel_runs_it():
    query = torch.randn(2, 4, 5, 8)
    assert count_flops(nn.Identity(), lambda: F.scaled_dot_product_attention(query, query, query)) == 2 * 2 * (
        2 * 4 * 5 * 5 * 8
    )
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    tokens = 2 * 5
    by_hand = tokens * 16 * 48 + 2 * (2 * 4 * 5 * 5 * 4) + tokens * 16 * 16 + 2 * (tokens * 16 * 32)
    assert count_flops(layer, lambda: layer(torch.randn(2, 5, 16))) == 2 * by_hand


def test_recurrent_layers_count():
    layer = nn.LSTM(8, 6).eval()
    assert count_flops(layer, lambda: layer(torch.randn(3, 2, 8))) == 2 * 3 * 2 * (8 + 6) * 4 * 6


def test_counting_leaves_everything_as_it_was():
    def state() -> list[object]:
        grads = [p.requires_grad for p in network.parameters()]
        kernels = [
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
        ]
        return [grads, kernels, network.training, torch.is_grad_enabled()]

    def failing() -> None:
        assert not any(p.requires_grad for p in network.parameters())
        raise RuntimeError

    network = perceptron(3).train()
    network[0].weight.requires_grad = False
    before = state()
    with pytest.raises(RuntimeError):
        count_flops(network, failing)
    assert state() == before
