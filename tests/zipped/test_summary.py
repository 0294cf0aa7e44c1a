"""The summary: totals that are right, in at most 100 columns."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import taskzip as tz


def two_tasks(*models: nn.Module) -> list[tz.Task]:
    return [
        tz.Task(name, model.eval(), [torch.randn(64, 6)]) for name, model in zip(("left", "right"), models, strict=True)
    ]


def perceptron(outputs: int, widths: tuple[int, int] = (8, 7)) -> nn.Sequential:
    a, b = widths
    return nn.Sequential(nn.Linear(6, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, outputs))


def numbers(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)]


def costs(zipped: tz.ZippedModel) -> list[str]:
    """The rows of the second table."""
    lines = zipped.summary().splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith(" task")) + 2 :][: len(zipped) + 2]


def count(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_totals_are_those_of_the_networks(share: float):
    models = perceptron(3), perceptron(4, (8, 5))
    zipped = tz.zip(two_tasks(*models), share=share, progress=False)
    lines = zipped.summary().splitlines()
    total = next(line for line in lines if line.startswith(" all parameters"))
    assert numbers(lines[0]) == [count(*models), zipped.parameter_count()]
    assert numbers(total)[:2] == [count(*models), zipped.parameter_count()]
    assert f"({zipped.parameter_count() / count(*models):.0%})" in total


def test_layers_add_up_and_say_what_they_share():
    zipped = tz.zip(two_tasks(perceptron(3), perceptron(4, (8, 5))), share={"0": 6, "2": 0.4}, progress=False)
    rows = {line.split()[0]: line for line in zipped.summary().splitlines()[1:] if re.match(r" \d ", line)}
    assert rows["0"].split()[1:3] == ["8", "6"]
    assert rows["2"].split()[1:5] == ["7", "/", "5", "2"]
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows.values()) == zipped.parameter_count()
    assert sum(int(row.split()[-2].replace(",", "")) for row in rows.values()) == count(
        perceptron(3), perceptron(4, (8, 5))
    )


def test_batch_norm_counts_once_per_task():
    models = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    zipped = tz.zip(two_tasks(*models), share=1.0, progress=False)
    assert numbers(zipped.summary().splitlines()[0]) == [count(*models), count(*models) - 6 * 8 - 8]


def test_at_most_100_columns_even_with_long_names():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 1200)
            self.outer = nn.Linear(1200, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x).relu())

    def nested() -> nn.Module:
        model: nn.Module = Deep()
        for _ in range(20):
            model = nn.ModuleDict({"encoder": model})
        path = ".".join(["encoder"] * 20)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = model

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.body.get_submodule(path)(x)

        return Outer()

    model = nested()
    zipped = tz.zip(two_tasks(model, copy.deepcopy(model)), share=1.0, progress=False)
    table = [line for line in zipped.summary().splitlines() if "stays private" not in line]
    assert max(map(len, table)) <= 100
    assert any("8,400" in line for line in table)  # the narrow columns stay whole: 6 * 1200 + 1200 parameters


def test_bytes_are_those_of_the_file(tmp_path: Path):
    models = [nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3)]
    zipped = tz.zip(two_tasks(*models), share=0.5, progress=False)
    rows = costs(zipped)
    # 8 * 7 and n * 9 parameters, 4 * 8 values and a counter of 8 bytes in batch-norm
    assert [numbers(row)[-1] for row in rows[:3]] == [432, 468, 900]
    zipped.save(tmp_path / "joint.safetensors")
    file = (tmp_path / "joint.safetensors").read_bytes()
    stored = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert rows[3].endswith(f" {stored} ({stored / 900:.0%})") and stored == 900 - 4 * (4 * 7)
    assert [numbers(row)[-1] for row in costs(zipped.half())[:3]] == [220, 238, 458]


def test_flops_are_those_recorded_and_absent_where_none_were():
    models = perceptron(3), perceptron(4, (8, 5))
    zipped = tz.zip(two_tasks(*models), share=0.5, progress=False)
    first = 2 * (6 * 8 + 8 * 7 + 7 * 3)
    second = 2 * (6 * 8 + 8 * 5 + 5 * 4)
    assert [numbers(row)[0] for row in costs(zipped)] == [first, second, first + second, first + second]
    assert "FLOPs for one sample, a multiply-add is 2; together: of zipped(x)" in zipped.summary()
    del zipped.history.settings["flops"]
    assert "FLOPs" not in zipped.summary() and len(costs(zipped)) == 4
