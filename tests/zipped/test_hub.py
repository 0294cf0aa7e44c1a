"""Folders in the way of the Hugging Face Hub: they load again, say what they are, and are whole or not there."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import taskzip as tz

FILES = ["README.md", "config.json", "model.safetensors"]


def net(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, outputs))


def data() -> torch.Tensor:
    return torch.randn(30, 10, generator=torch.Generator().manual_seed(5))


TASKS = [tz.Task("digit", net(0).eval(), [data()]), tz.Task("turn", net(1, 4).eval(), [data()])]
ZIPPED = tz.zip(TASKS, share=0.5, progress=False)


def fresh() -> dict[str, nn.Module]:
    return {"digit": net(7), "turn": net(8, 4)}


@pytest.fixture
def zipped() -> tz.ZippedModel:
    return copy.deepcopy(ZIPPED)


@pytest.fixture
def folder(zipped: tz.ZippedModel, tmp_path: Path) -> Path:
    zipped.save_pretrained(tmp_path / "joint")
    return tmp_path / "joint"


@pytest.fixture
def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def card(zipped: tz.ZippedModel, folder: Path) -> str:
    zipped.save_pretrained(folder)
    return (folder / "README.md").read_text()


# --- a folder -----------------------------------------------------------------------------------------------------


def test_a_folder_loads_again_without_huggingface_hub(zipped: tz.ZippedModel, folder: Path, without_hub: None) -> None:
    assert names(folder) == FILES and names(folder.parent) == ["joint"]
    for place in (folder, str(folder)):
        loaded = tz.from_pretrained(place, fresh())
        assert all(torch.equal(loaded[name](data()), zipped[name](data())) for name in zipped)
        assert loaded.history == zipped.history and loaded.summary() == zipped.summary()


def test_the_weights_are_an_ordinary_checkpoint(zipped: tz.ZippedModel, folder: Path) -> None:
    zipped.save(folder.parent / "joint.safetensors")
    assert (folder / "model.safetensors").read_bytes() == (folder.parent / "joint.safetensors").read_bytes()


def test_a_relative_folder_of_two_names_is_no_repository(
    folder: Path, monkeypatch: pytest.MonkeyPatch, without_hub: None
) -> None:
    monkeypatch.chdir(folder.parents[1])
    tz.from_pretrained(f"{folder.parent.name}/joint", fresh())


def test_saving_again_replaces_the_three_files_and_keeps_others(zipped: tz.ZippedModel, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    tz.retrain(zipped, TASKS, steps=2, loss="distill", progress=False)
    zipped.save_pretrained(folder)
    assert names(folder) == sorted([*FILES, "notes.txt"])
    loaded = tz.from_pretrained(folder, fresh())
    assert torch.equal(loaded["turn"](data()), zipped["turn"](data()))
    assert loaded.history.later == zipped.history.later


def test_config_says_what_it_is(zipped: tz.ZippedModel, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "taskzip" and config["taskzip_version"] == tz.__version__
    assert config["tasks"]["turn"] == {
        "class": "torch.nn.modules.container.Sequential",
        "bytes": 4 * (11 * 8 + 9 * 6 + 7 * 4),
    }
    assert config["parameters"] == zipped.parameter_count() and config["bytes"] == 4 * zipped.parameter_count()
    assert config["history"]["settings"]["share"] == {"share": 0.5}


# --- its card -----------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_merged_from_what_and_how(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    text = card(zipped, tmp_path / "joint")
    before, after = 2 * (11 * 8 + 9 * 6) + 7 * 3 + 7 * 4, zipped.parameter_count()
    assert text.startswith("---\nlibrary_name: taskzip\ntags:\n- taskzip\n- merge\n- multi-task\n- pytorch\n---\n")
    assert "# digit + turn\n" in text and f"{after:,} parameters instead of {before:,}" in text
    flops = 2 * (10 * 8 + 8 * 6 + 6 * 3)
    assert (
        f"| digit | `torch.nn.modules.container.Sequential` | {4 * (11 * 8 + 9 * 6 + 7 * 3)} | {flops} | 30 |" in text
    )
    assert '| `matching` | `"optimal"` |' in text and '| `share` | `{"share": 0.5}` |' in text
    assert re.search(r"^\| 0 \| 8 \| 4 \| [\d.]+% \| 176 \| 144 \|  \|$", text, re.MULTILINE)
    assert "| 4 | 3 / 4 | 0 | - | 49 | 49 |  |" in text and "Not measured." in text
    assert 'tz.from_pretrained("joint", {"digit": Sequential(...), "turn": Sequential(...)})' in text


def test_the_front_matter_is_yaml(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    front = yaml.safe_load(card(zipped, tmp_path / "joint").split("---\n")[1])
    assert front == {"library_name": "taskzip", "tags": ["taskzip", "merge", "multi-task", "pytorch"]}


def test_the_card_says_what_was_measured_and_whether_it_still_holds(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(6))
    held_out = {task.name: [(x, task.model(x).argmax(1))] for task in TASKS}  # the original networks are always right
    found = tz.measure(zipped, TASKS, held_out)
    reached = 100 * float((zipped["digit"](x).argmax(1) == held_out["digit"][0][1]).double().mean())
    assert found["digit"] == {
        "metric": "accuracy in percent",
        "before": 100.0,
        "after": pytest.approx(reached),
        "samples": 200,
    }
    assert reached < 100
    row = f"| digit | accuracy in percent | 200 | 100.00 | {reached:.2f} | {100 - reached:.2f} |"
    text = card(zipped, tmp_path / "joint")
    assert row in text and "was retrained" not in text
    said = f"digit 100.00 to {reached:.2f} (accuracy in percent; 200 samples)"
    assert said in zipped.summary().replace("\n ", "")
    tz.retrain(zipped, TASKS, steps=2, loss="distill", progress=False)
    text = card(zipped, tmp_path / "joint")
    assert row in text and "measured before the network was retrained for the last time" in text
    assert 'Then retrained: 2 (loss: "distill", ' in text and said not in zipped.summary().replace("\n ", "")
    tz.measure(zipped, TASKS, held_out, metric=lambda output, targets: -1.0)
    text = card(zipped, tmp_path / "joint")
    assert "| turn | <lambda> | 200 | -1.00 | -1.00 | 0.00 |" in text and "for the last time" not in text


def test_the_card_of_a_search_has_its_certificate(tmp_path: Path) -> None:
    held_out = {task.name: [(data(), task.model(data()).argmax(1))] for task in TASKS}
    zipped = tz.zip(TASKS, share=tz.MaxDrop(50, held_out, confidence=None, evaluations=2), progress=False)
    text = card(zipped, tmp_path / "joint")
    assert "Measured on held-out data while the sharing was searched for. MaxDrop(50), as measured" in text


def test_a_name_with_a_bar_does_not_break_the_tables(tmp_path: Path) -> None:
    zipped = tz.zip([tz.Task(n, named("a|b", i), [data()]) for i, n in enumerate("ab")], share=1.0, progress=False)
    assert "| a\\|b | 8 | 8 |" in card(zipped, tmp_path / "joint")


def named(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(10, 8))
    model.add_module("relu", nn.ReLU())
    model.add_module("out", nn.Linear(8, 3))
    return model.eval()


def test_a_checkpoint_of_before_has_a_card_too(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    del zipped.history.settings["flops"]
    assert "| not counted | 30 |" in card(zipped, tmp_path / "joint")


# --- what can be wrong with a folder ------------------------------------------------------------------------------


def test_absent_and_torn_files(folder: Path, without_hub: None) -> None:
    with pytest.raises(tz.CheckpointError, match=r"there is no folder .*nowhere; a repository"):
        tz.from_pretrained(folder / "nowhere", fresh())
    with pytest.raises(tz.CheckpointError, match=r"there is no folder \./nowhere"):
        tz.from_pretrained("./nowhere", fresh())
    with pytest.raises(tz.CheckpointError, match=r"is a file, not a folder: taskzip\.load reads it"):
        tz.from_pretrained(folder / "model.safetensors", fresh())
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(tz.CheckpointError, match=r"model\.safetensors is torn"):
        tz.from_pretrained(folder, fresh())
    weights.unlink()
    with pytest.raises(tz.CheckpointError, match=r"has no model\.safetensors: save or download"):
        tz.from_pretrained(folder, fresh())
    weights.write_bytes(whole)
    text = config.read_bytes()
    for torn in (text[:-10], b"", b"\xff"):
        config.write_bytes(torn)
        with pytest.raises(tz.CheckpointError, match=r"config\.json is torn or not JSON"):
            tz.from_pretrained(folder, fresh())
    for foreign in ("[]", '{"model_type": "bert"}'):
        config.write_text(foreign)
        with pytest.raises(tz.CheckpointError, match=r"config\.json is not of taskzip"):
            tz.from_pretrained(folder, fresh())
    config.unlink()
    with pytest.raises(tz.CheckpointError, match=r"has no config\.json"):
        tz.from_pretrained(folder, fresh())


def test_networks_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(tz.CheckpointError, match=r"task 'turn'.*'4\.bias' is 3, in the file 4"):
        tz.from_pretrained(folder, {"digit": net(7), "turn": net(8)})


def test_files_of_two_networks(zipped: tz.ZippedModel, folder: Path) -> None:
    """As a process that was killed between replacing two files would leave them."""
    config = (folder / "config.json").read_bytes()
    tz.retrain(zipped, TASKS, steps=1, loss="distill", progress=False)
    zipped.save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    with pytest.raises(tz.CheckpointError, match=r"config\.json and model\.safetensors are not of the same network"):
        tz.from_pretrained(folder, fresh())


# --- nothing half-written -----------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_of_weights(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("place", "failing"),
    [("taskzip.zipped.checkpoint.save_file", full_of_weights), ("pathlib.Path.write_text", full)],
)
def test_a_full_disk_leaves_what_was_there(
    zipped: tz.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, place: str, failing: Any
) -> None:
    target = tmp_path / "joint"
    if exists:
        zipped.save_pretrained(target)
    before = {path.name: path.read_bytes() for path in target.glob("*")}
    tz.retrain(zipped, TASKS, steps=1, loss="distill", progress=False)
    monkeypatch.setattr(place, failing)
    with pytest.raises(tz.CheckpointError, match=r"cannot write [^.]*joint.*: No space left on device\. Is the folder"):
        zipped.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in target.glob("*")} == before
    assert names(tmp_path) == (["joint"] if exists else [])


def test_interrupted_while_writing_leaves_nothing(
    zipped: tz.ZippedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskzip.zipped.hub.model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zipped.save_pretrained(tmp_path / "joint")
    assert names(tmp_path) == []


def test_a_readme_of_something_else_is_not_replaced(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(tz.CheckpointError, match=r"it has a README\.md that save_pretrained did not write"):
        zipped.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(tz.CheckpointError, match=r"it has a config\.json that save_pretrained did not write"):
        zipped.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project" and names(tmp_path) == ["README.md", "config.json"]


def test_places_that_cannot_be_written(zipped: tz.ZippedModel, folder: Path) -> None:
    with pytest.raises(tz.CheckpointError, match="there is no folder"):
        zipped.save_pretrained(folder / "no" / "such")
    with pytest.raises(tz.CheckpointError, match="it is a file, not a folder"):
        zipped.save_pretrained(folder / "README.md")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(tz.CheckpointError, match=r"its model\.safetensors is a folder"):
        zipped.save_pretrained(folder)


# --- the Hub ------------------------------------------------------------------------------------------------------


class Hub(SimpleNamespace):
    """What huggingface_hub has, without a network: repositories are folders in memory."""

    def __init__(self) -> None:
        super().__init__(repos={}, calls=[])

    def HfApi(self, **about: Any) -> Hub:
        self.calls.append(("HfApi", about))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", repo_id, options))
        self.repos.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self.repos[repo_id] |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, *, revision: Any, token: Any, allow_patterns: list[str]) -> str:
        if repo_id not in self.repos:
            raise FileNotFoundError("Got: ConnectError: Name or service not known\nAn error happened while trying.")
        self.calls.append(("snapshot_download", revision, token))
        self.place.mkdir()
        for name in set(self.repos[repo_id]) & set(allow_patterns):
            (self.place / name).write_bytes(self.repos[repo_id][name])
        return str(self.place)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()
    hub.place = tmp_path / "snapshot"
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_pushed_and_loaded_from_the_hub(zipped: tz.ZippedModel, hub: Hub) -> None:
    assert zipped.push_to_hub("me/joint", private=True, token="t") == "https://huggingface.co/me/joint/commit/1"
    assert sorted(hub.repos["me/joint"]) == FILES
    assert hub.calls[0] == ("HfApi", {"token": "t", "library_name": "taskzip", "library_version": tz.__version__})
    assert hub.calls[1] == ("create_repo", "me/joint", {"private": True, "exist_ok": True})
    assert b'tz.from_pretrained("me/joint", ' in hub.repos["me/joint"]["README.md"]
    loaded = tz.from_pretrained("me/joint", fresh(), revision="main", token=False)
    assert hub.calls[-1] == ("snapshot_download", "main", False) and names(hub.place) == FILES[1:]
    assert torch.equal(loaded["turn"](data()), zipped["turn"](data()))


def test_what_the_hub_refuses(zipped: tz.ZippedModel, hub: Hub) -> None:
    with pytest.raises(
        tz.CheckpointError, match=r"there is no folder me/none, and it cannot be downloaded .*ConnectErr"
    ):
        tz.from_pretrained("me/none", fresh())

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("403 Forbidden: you have no right to write here.\nRequest ID: 1")

    hub.create_repo = refused
    with pytest.raises(tz.CheckpointError, match=r"cannot push to me/joint: 403 .* write here\. Are you online"):
        zipped.push_to_hub("me/joint")


def test_without_the_extra(zipped: tz.ZippedModel, without_hub: None) -> None:
    with pytest.raises(tz.CheckpointError, match=r"pushing to me/joint needs .*: pip install 'taskzip\[hub\]'"):
        zipped.push_to_hub("me/joint")
    with pytest.raises(tz.CheckpointError, match=r"there is no folder me/joint, .* pip install 'taskzip\[hub\]'"):
        tz.from_pretrained("me/joint", fresh())
