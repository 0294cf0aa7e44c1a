"""Plots: whole PNG files, whatever is shared, and nothing of matplotlib's global state touched."""

import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import taskzip as tz
from taskzip.report import plots

ERRORS = {"before": {"left": 1.0, "right": 2.0}, "zipped": {"left": 1.5, "right": 0.0}}


@pytest.fixture(scope="module")
def zipped() -> tz.ZippedModel:
    return joint(0.5)


def joint(share: float, names: tuple[str, ...] = ("left", "right")) -> tz.ZippedModel:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3 + i)).eval() for i in range(len(names))]
    tasks = [tz.Task(name, m, [torch.randn(64, 6)]) for name, m in zip(names, models, strict=True)]
    return tz.zip(tasks, share=share, progress=False)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("errors", [None, ERRORS])
def test_a_png_for_any_share(tmp_path: Path, share: float, errors: plots.Errors | None):
    path = tmp_path / "plot.png"
    plots.plot_zip(joint(share), path, errors=errors)
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert picture[..., :3].std() > 0.05  # not blank
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_bars_of_the_units_add_up(zipped: tz.ZippedModel):
    axes = Figure().add_subplot()
    plots.draw_sharing(axes, zipped)
    bars = [(round(p.get_x(), 6), round(p.get_width(), 6)) for p in axes.patches]
    assert bars[:3] == [(0, 33.333333), (33.333333, 33.333333), (66.666667, 33.333333)]  # 4 alone, 4 shared, 4 alone
    assert [text.get_text() for text in axes.texts] == ["4", "4", "4", "3", "4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    assert axes.get_xlabel()


@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "b", "c", "d", "e", "f", "g")])
def test_many_tasks_fit_as_well(tmp_path: Path, names: tuple[str, ...]):
    zipped = joint(0.5, names)
    plots.plot_zip(zipped, tmp_path / "plot.png")
    for record in zipped.history.layers:
        owned = plots.owned_units(zipped, record)
        assert sum(units for owners, units in owned.items() if len(owners) > 1) == record.shared
        for task, units in zip(names, record.units, strict=True):
            assert sum(n for owners, n in owned.items() if task in owners) == units


def test_bars_of_the_parameters_are_the_records(zipped: tz.ZippedModel):
    axes = Figure().add_subplot()
    plots.draw_parameters(axes, zipped.history.layers, (9, 8))
    records = zipped.history.layers
    assert [p.get_width() for p in axes.patches] == [n for r in records for n in (r.before, r.after)]


def test_bars_of_the_errors_stand_by_task():
    axes = Figure().add_subplot()
    plots.draw_errors(axes, ERRORS)
    assert [p.get_height() for p in axes.patches] == [1.0, 2.0, 1.5, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["left", "right"]
    assert axes.get_ylabel()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stages_get_darker(count: int):
    shades = [sum(matplotlib.colors.to_rgb(colour)) for colour in plots._shades(count)]
    assert len(shades) == count
    assert shades == sorted(shades, reverse=True)


def test_the_users_matplotlib_is_left_alone(tmp_path: Path, zipped: tz.ZippedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    settings = matplotlib.rcParams.copy()  # a dict of them would look the backend up
    plots.plot_zip(zipped, tmp_path / "plot.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams.copy() == settings


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, zipped: tz.ZippedModel, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plot.png"
    path.write_text("old")

    def torn(figure: Figure, file: Path, **_: object) -> None:
        Path(file).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        plots.plot_zip(zipped, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, zipped: tz.ZippedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(tz.InputError, match=r"pip install 'taskzip\[plot\]'"):
        plots.plot_zip(zipped, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
