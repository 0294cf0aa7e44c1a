"""Checkpoints load again bit for bit, or fail with one clear sentence and change nothing."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import taskzip as tz


def net(seed: int, width: int = 8, inputs: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def data(inputs: int = 10) -> torch.Tensor:
    return torch.randn(30, inputs, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def zipped() -> tz.ZippedModel:
    tasks = [tz.Task("a", net(0), [data()]), tz.Task("b", net(1, width=9, inputs=7), [data(7)])]
    return tz.zip(tasks, share=0.5, progress=False)


@pytest.fixture
def path(zipped: tz.ZippedModel, tmp_path: Path) -> Path:
    zipped.save(tmp_path / "joint.safetensors")
    return tmp_path / "joint.safetensors"


def fresh() -> dict[str, nn.Module]:
    return {"a": net(7), "b": net(8, width=9, inputs=7)}


def test_loads_bit_identical_into_fresh_networks_and_leaves_them_alone(zipped: tz.ZippedModel, path: Path) -> None:
    networks = fresh()
    states = {n: {k: v.clone() for k, v in net.state_dict().items()} for n, net in networks.items()}
    loaded = tz.load(path, networks)
    for name, x in (("a", data()), ("b", data(7))):
        assert torch.equal(loaded[name](x), zipped[name](x))
        assert all(torch.equal(v, states[name][k]) for k, v in networks[name].state_dict().items())
        assert not set(loaded[name].parameters()) & set(networks[name].parameters())
    assert loaded.parameter_count() == zipped.parameter_count()
    assert loaded.summary() == zipped.summary()
    assert loaded.history == zipped.history
    assert not loaded.training


def test_a_loaded_network_can_be_retrained_and_saved_again(path: Path, tmp_path: Path) -> None:
    loaded = tz.load(path, fresh())
    tasks = [tz.Task("a", net(0), [data()]), tz.Task("b", net(1, width=9, inputs=7), [data(7)])]
    tz.retrain(loaded, tasks, steps=2, loss="distill", progress=False)
    loaded.save(tmp_path / "again.safetensors")
    again = tz.load(tmp_path / "again.safetensors", fresh())
    assert torch.equal(again["a"](data()), loaded["a"](data()))
    assert again.history.later[0]["retrained"] == 2


def test_every_block_is_stored_once_and_the_file_says_how_it_was_made(zipped: tz.ZippedModel, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        about = file.metadata()["taskzip"]
    buffers = sum(buffer.numel() for buffer in zipped.buffers())
    assert stored == zipped.parameter_count() + buffers
    assert '"matching": "optimal"' in about and '"share": 0.5' in about and "Sequential" in about


def test_dtype_and_frozen_parameters_survive(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    import copy

    half = copy.deepcopy(zipped).half()
    half.save(tmp_path / "half.safetensors")
    assert next(tz.load(tmp_path / "half.safetensors", fresh()).parameters()).dtype == torch.float16


def test_weights_tied_inside_a_network_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.middle, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.again = self.middle

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            return self.head(self.again(self.middle(x).relu()).relu())

    zipped = tz.zip([tz.Task(n, Tied(i), [data(5)]) for i, n in enumerate("ab")], share=1.0, progress=False)
    zipped.save(tmp_path / "tied.safetensors")
    loaded = tz.load(tmp_path / "tied.safetensors", {"a": Tied(5), "b": Tied(6)})
    assert loaded.parameter_count() == zipped.parameter_count()
    assert torch.equal(loaded["a"](data(5)), zipped["a"](data(5)))


def test_modules_called_like_the_blocks_of_weights(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.res_blocks = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.res_blocks[1](self.res_blocks[0](x).relu())

    zipped = tz.zip([tz.Task(n, Residual(i), [data(5)]) for i, n in enumerate("ab")], share=0.5, progress=False)
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {"a": Residual(5), "b": Residual(6)})
    assert torch.equal(loaded["b"](data(5)), zipped["b"](data(5)))


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"a": net(0)}, "holds the tasks a, b, but networks were given for a"),
        ({"a": net(0), "c": net(1)}, "but networks were given for a, c"),
        ({"a": net(0, width=5), "b": net(8, width=9, inputs=7)}, "task 'a'.*'0.bias' is 5, in the file 8"),
        ({"a": nn.Linear(2, 2), "b": net(8, width=9, inputs=7)}, "task 'a'.*is absent, in the file 8"),
    ],
)
def test_networks_that_do_not_fit(path: Path, networks: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(tz.CheckpointError, match=message):
        tz.load(path, networks)


def test_absent_torn_and_foreign_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(tz.CheckpointError, match="there is no file"):
        tz.load(tmp_path / "nowhere.safetensors", fresh())
    whole = path.read_bytes()
    for size in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(tz.CheckpointError, match="torn or not a safetensors file"):
            tz.load(path, fresh())
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(tz.CheckpointError, match="not a taskzip checkpoint"):
        tz.load(foreign, fresh())
    save_file({"x": torch.zeros(1)}, foreign, metadata={"taskzip": '{"format": 99}'})
    with pytest.raises(tz.CheckpointError, match="format 99"):
        tz.load(foreign, fresh())


def test_unwritable_places_leave_nothing_behind(zipped: tz.ZippedModel, tmp_path: Path) -> None:
    with pytest.raises(tz.CheckpointError, match="there is no folder"):
        zipped.save(tmp_path / "no" / "such" / "folder.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(tz.CheckpointError, match="cannot write"):
        zipped.save(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["taken"]


def test_a_full_disk_leaves_the_old_file_whole(zipped: tz.ZippedModel, path: Path) -> None:
    before = path.read_bytes()
    child = os.fork()
    if not child:  # a limit on file size is the nearest thing to a full disk; only for this process
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            zipped.save(path)
        except tz.CheckpointError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_interrupted_while_writing_leaves_nothing(zipped: tz.ZippedModel, path: Path, monkeypatch) -> None:
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskzip.zipped.checkpoint.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zipped.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_loads_bit_identical_for_a_single_sample(zipped: tz.ZippedModel, path: Path) -> None:
    """Where a tensor starts in memory can decide on the last bit of a product with one row."""
    loaded = tz.load(path, fresh())
    for row in data().split(1):
        assert torch.equal(loaded["a"](row), zipped["a"](row))


def test_settings_from_numpy_are_saved(tmp_path: Path) -> None:
    tasks = [tz.Task("a", net(0), [data()]), tz.Task("b", net(1), [data()])]
    zipped = tz.zip(tasks, share={"0": np.int64(3), "3": np.float32(0.5)}, seed=np.int64(2), progress=False)
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {"a": net(3), "b": net(4)})
    assert loaded.history.settings["share"] == {"share": {"0": 3, "3": 0.5}}


@pytest.mark.parametrize(
    "about",
    [
        '{"format": "1"}',
        '{"format": 1}',
        '{"format": 1, "tasks": [1], "aliases": {}}',
        '{"format": 1, "tasks": {"a": 3}}',
    ],
)
def test_damaged_metadata(tmp_path: Path, about: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors", metadata={"taskzip": about})
    with pytest.raises(tz.CheckpointError, match="bad"):
        tz.load(tmp_path / "bad.safetensors", {"a": net(0)})


def test_a_block_of_the_wrong_shape(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    key = next(key for key in tensors if "weight_blocks.a+b" in key)
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(tz.CheckpointError, match=r"damaged: .*weight_blocks"):
        tz.load(path, fresh())


def test_a_class_instead_of_a_network(path: Path) -> None:
    with pytest.raises(tz.CheckpointError, match="give instances, not classes"):
        tz.load(path, {"a": nn.Linear, "b": net(0)})  # type: ignore[dict-item]


def test_saves_through_a_symbolic_link_readable_by_others(zipped: tz.ZippedModel, path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(path)
    path.write_bytes(b"")
    zipped.save(str(tmp_path / "link.safetensors"))
    assert (tmp_path / "link.safetensors").is_symlink()
    tz.load(path, fresh())
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(tz.CheckpointError, match="there is no folder"):
        zipped.save(plain / "x.safetensors")


def test_interrupted_between_tensors_leaves_nothing(zipped: tz.ZippedModel, path: Path, monkeypatch) -> None:
    before = path.read_bytes()

    def half(_: object, part: Path, **__: object) -> None:
        part.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("taskzip.zipped.checkpoint.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        zipped.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_the_system_says_is_passed_on(zipped: tz.ZippedModel, path: Path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("taskzip.zipped.checkpoint.save_file", full)
    with pytest.raises(tz.CheckpointError, match=r"cannot write .*: No space left on device\. Is the folder writable"):
        zipped.save(path)
