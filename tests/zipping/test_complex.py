"""Networks with complex weights: these stay private, all of their numbers, and the rest is zipped around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz


class Spectral(nn.Module):
    """Real, complex, and real again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.before = nn.Linear(16, 12), nn.Linear(12, 16)
        self.mix = nn.Linear(9, 12, dtype=torch.cfloat)
        self.after, self.out = nn.Linear(12, 10), nn.Linear(10, 3)
        self.register_buffer("turn", torch.polar(torch.ones(9), torch.rand(9)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft(self.before(self.first(x).relu()).relu()) * self.turn
        return self.out(self.after(self.mix(x).abs()).relu())


class Wholly(nn.Module):
    """All of its weights are complex, its outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(16, 8, dtype=torch.cfloat), nn.Linear(8, 3, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x.to(torch.cfloat)).tanh())


class Convolved(nn.Module):
    """A complex convolution in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv1d(1, 6, 3), nn.Linear(5, 3)
        self.mix = nn.Conv1d(6, 5, 3, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.first(x[:, None]).relu().to(torch.cfloat)).abs().mean(2))


@pytest.mark.parametrize("kind", [Spectral, Wholly, Convolved])
@pytest.mark.filterwarnings("ignore:nothing could be shared")
def test_complex_weights_stay_private(kind: type[nn.Module], tmp_path: Path) -> None:
    data = [torch.randn(32, 16) for _ in range(3)]
    models = [kind().eval() for _ in "ab"]
    tasks = [tz.Task(name, model, data) for name, model in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    for layer in zipped.history.layers:
        own = zipped["a"].get_submodule(layer.name).weight
        assert not own.is_complex() or (layer.shared == 0 and layer.note in ("a: complex numbers", ""))
    for model, task in zip(models, "ab", strict=True):
        for name, parameter in model.named_parameters():
            if parameter.is_complex():
                given = zipped[task].get_parameter(name)
                assert torch.equal(given.abs().sum().round(decimals=3), parameter.abs().sum().round(decimals=3))
    assert zipped.summary()
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {name: kind() for name in "ab"})
    assert torch.equal(loaded["b"](data[0]), zipped["b"](data[0]))


@pytest.mark.parametrize("kind", [Spectral, Convolved])
def test_a_copy_answers_as_before(kind: type[nn.Module]) -> None:
    data = [torch.randn(32, 16) for _ in range(3)]
    model = kind().eval()
    zipped = tz.zip([tz.Task(name, model, data) for name in "ab"], share=1.0, progress=False)
    assert zipped.shared_parameter_count() > 0
    torch.testing.assert_close(zipped["b"](data[0]), model(data[0]), rtol=1e-3, atol=1e-3)


def test_imaginary_parts_that_are_not_finite_are_refused() -> None:
    model = Spectral().eval()
    with torch.no_grad():
        model.mix.weight[0, 0] = complex(0.0, float("nan"))
    with pytest.raises(tz.InputError, match=r"'mix\.weight' has NaN or infinite values"):
        tz.zip([tz.Task(name, model, [torch.randn(8, 16)]) for name in "ab"], share=1.0, progress=False)
