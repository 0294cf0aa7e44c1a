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
    assert any("12,000" in line for line in table)  # the narrow columns stay whole: 6 * 1200 weights, scales and biases


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


def cells(zipped: tz.ZippedModel) -> list[str]:
    """What stands under cost."""
    lines = zipped.summary().splitlines()
    return [line.split()[-3] for line in lines if re.match(r" \d ", line)]


def test_the_cost_compares_across_layers_and_units_of_measurement():
    """It is the change of what a layer answers, relative to its variance: 0 for a copy, the same at another scale."""
    first, second = perceptron(3), perceptron(4)
    larger = [copy.deepcopy(model) for model in (first, second)]
    with torch.no_grad():
        for model in larger:
            model[0].weight *= 100
            model[0].bias *= 100
            model[2].weight /= 100
    options = {"share": 1.0, "progress": False, "compensate": False, "spread": False}
    data = [torch.randn(64, 6) for _ in range(2)]
    made = []
    for models in ((first, second), larger, (first, copy.deepcopy(first))):
        tasks = [tz.Task(name, model.eval(), [x]) for name, model, x in zip(("a", "b"), models, data, strict=True)]
        made.append(tz.zip(tasks, **options))
    usual, scaled, copied = made
    relative = [record.relative_cost for record in usual.history.layers]
    assert cells(usual) == [*(f"{100 * cost:.1f}%" for cost in relative[:2]), "-"]
    assert all(1e-3 < cost < 2 for cost in relative[:2])
    assert scaled.history.layers[0].cost == pytest.approx(1e4 * usual.history.layers[0].cost, rel=1e-3)
    assert scaled.history.layers[0].relative_cost == pytest.approx(relative[0], rel=1e-3)
    assert cells(copied) == ["0.0%", "0.0%", "-"]
    assert usual.summary().count("in percent of their variance") == 1


def test_the_cost_is_the_change_of_the_outputs():
    """Two layers that read the same data: merged weights against each task's own, by hand."""
    data = torch.randn(200, 6).double()
    models = [perceptron(3).double(), perceptron(3).double()]
    tasks = [tz.Task(name, model.eval(), [data]) for name, model in zip(("a", "b"), models, strict=True)]
    options = {"spread": False, "compensate": False, "damping": 0.0, "max_rows": None}
    zipped = tz.zip(tasks, share={"0": 1.0}, progress=False, **options)
    changed = variance = 0.0
    for name, model in zip("ab", models, strict=True):
        now, before = zipped[name][0](data).detach(), model[0](data).detach()
        # Units have moved: those that are closest to what they were are the same.
        apart = (now[:, :, None] - before[:, None]).square().mean(0)
        changed += float(apart[torch.arange(8), order_of(zipped[name], model)].sum())
        variance += float(before.var(0, correction=0).sum())
    assert zipped.history.layers[0].relative_cost == pytest.approx(changed / variance, rel=1e-5)


def order_of(now: nn.Module, before: nn.Module) -> torch.Tensor:
    """Which unit stands where: the next layer reads it by weights that are what they were."""
    columns = (now[2].weight.sum(0)[:, None] - before[2].weight.sum(0)).abs()
    return columns.argmin(1)


def test_checkpoints_of_before_show_the_bare_sum():
    zipped = tz.zip(two_tasks(perceptron(3), perceptron(4)), share=1.0, progress=False)
    history = zipped.history.as_dict()
    for record in history["layers"]:
        del record["relative_cost"]
    zipped.history = type(zipped.history).from_dict(history)
    assert cells(zipped)[0] == f"{zipped.history.layers[0].cost:.3g}"
    assert "percent of their variance" not in zipped.summary()
