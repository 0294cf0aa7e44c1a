"""The command line: the demonstration's files and numbers, and how it ends when something is wrong."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from typer.testing import CliRunner, Result

import taskzip as tz
from taskzip.cli import app, main
from taskzip.datasets import digits, quarter_turns
from taskzip.models import SmallCNN

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
DEMO = sys.modules["taskzip.cli.demo"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that have learnt next to nothing are enough where no errors are looked at."""
    monkeypatch.setattr(DEMO, "EPOCHS", {"digit": 1, "turn": 1})
    monkeypatch.setattr(DEMO, "digits", lambda split: tuple(tensor[:100] for tensor in digits(split)))


def errors_in(output: str) -> dict[str, list[float]]:
    """Per task, the errors that were printed."""
    rows = re.findall(r"^ *(digit|turn) ((?: +\d+\.\d\d)+) *$", output, re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Result, Path]]:
    """The demo with fewer epochs, once for all tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DEMO, "EPOCHS", {"digit": 10, "turn": 4})
        out = tmp_path_factory.mktemp("demo") / "new" / "folder"
        yield run("demo", "--out", out, "--steps", "30"), out


def test_it_ends_well_and_writes_two_files(finished: tuple[Result, Path]):
    result, out = finished
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "joint.safetensors"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_networks_are_good_and_stay_good(finished: tuple[Result, Path]):
    found = errors_in(finished[0].stdout)
    assert list(found) == ["digit", "turn"]
    assert [len(errors) for errors in found.values()] == [3, 3]
    assert found["digit"][0] < 6 and found["turn"][0] < 15
    assert found["digit"][2] < found["digit"][0] + 5 and found["turn"][2] < found["turn"][0] + 8


def test_the_printed_errors_are_those_of_the_checkpoint(finished: tuple[Result, Path]):
    result, out = finished
    joint = tz.load(out / "joint.safetensors", {"digit": SmallCNN(10), "turn": SmallCNN(4)})
    images, labels = digits("test")
    turned, turns = quarter_turns(images)
    with torch.no_grad():
        for name, x, y in (("digit", images, labels), ("turn", turned, turns)):
            wrong = 100 * (joint[name](x).argmax(1) != y).double().mean().item()
            assert errors_in(result.stdout)[name][2] == pytest.approx(wrong, abs=0.006)


def test_it_tells_what_was_saved(finished: tuple[Result, Path]):
    result, out = finished
    size = (out / "joint.safetensors").stat().st_size
    assert f"{size:,} together" in " ".join(result.stdout.split())
    assert "34,574 parameters apart, 17,678 together" in result.stdout
    assert "gives identical outputs" in result.stdout


def test_it_fits_into_100_columns_and_has_no_progress_bar(finished: tuple[Result, Path]):
    result, out = finished
    lines = [line.replace(str(out), "runs/demo") for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 100
    assert result.stderr == ""
    assert "\x1b" not in result.output


def test_the_checkpoint_says_that_no_labels_were_used(finished: tuple[Result, Path]):
    with safetensors.safe_open(finished[1] / "joint.safetensors", framework="pt") as file:
        assert '"distill"' in file.metadata()["taskzip"]


@pytest.mark.usefixtures("short")
def test_the_same_seed_gives_the_same_file(tmp_path: Path):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run("demo", "--quiet", "--steps", "2", "--seed", seed, "--out", tmp_path / folder).exit_code == 0
    a, b, c = ((tmp_path / folder / "joint.safetensors").read_bytes() for folder in "abc")
    assert a == b
    assert a != c


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("arguments", [["demo", "--quiet"], ["demo", "-q"], ["-q", "demo"]])
def test_quiet_prints_nothing(tmp_path: Path, arguments: list[str]):
    result = run(*arguments, "--steps", "0", "--share", "0", "--out", tmp_path)
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "joint.safetensors").exists()


@pytest.mark.usefixtures("short")
def test_without_retraining_there_is_no_column_for_it(tmp_path: Path):
    result = run("demo", "--steps", "0", "--share", "0.5", "--out", tmp_path)
    assert result.exit_code == 0
    assert [len(errors) for errors in errors_in(result.stdout).values()] == [2, 2]


@pytest.mark.usefixtures("short")
def test_torch_is_left_as_it_was(tmp_path: Path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run("demo", "-q", "--steps", "1", "--out", tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"taskzip {tz.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help(arguments: list[str]):
    result = run(*arguments)
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "--quiet" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["bogus"],
        ["demo", "--bogus"],
        ["demo", "--share", "1.5"],
        ["demo", "--steps", "-1"],
        ["demo", "--seed", "x"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]):
    assert run(*arguments).exit_code == 2


def complaint(result: Result, code: int) -> str:
    """The one line on standard error."""
    assert result.exit_code == code
    assert result.stderr.startswith("taskzip: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_a_folder_that_cannot_be_written_is_found_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DEMO, "_train", lambda *_, **__: pytest.fail("it trained first"))
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(out) in complaint(run("demo", "--out", out), 1)


@pytest.mark.usefixtures("short")
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "demo.png"))

    monkeypatch.setattr(DEMO, "plot_zip", full)
    said = complaint(run("demo", "-q", "--steps", "0", "--out", tmp_path), 1)
    assert "No space left on device" in said
    assert "demo.png" in said


@pytest.mark.usefixtures("short")
def test_a_checkpoint_that_reads_differently_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tz, "load", lambda _, networks: networks)
    assert "other outputs" in complaint(run("demo", "-q", "--steps", "0", "--out", tmp_path), 1)


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    said = complaint(run("demo", "--out", tmp_path), 1)
    assert module in said
    assert "pip install 'taskzip[demo]'" in said


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("where", ["tz.zip", "tz.retrain", "plot_zip"])
def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"taskzip.{where[3:]}" if where.startswith("tz.") else f"taskzip.cli.demo.{where}", pressed)
    out = tmp_path / "out"
    assert complaint(run("demo", "--quiet", "--steps", "1", "--out", out), 130) == "taskzip: interrupted\n"
    if where == "plot_zip":
        assert [path.name for path in out.iterdir()] == ["joint.safetensors"]
        tz.load(out / "joint.safetensors", {"digit": SmallCNN(10), "turn": SmallCNN(4)})
    else:
        assert not out.exists()


@pytest.mark.usefixtures("short")
def test_ctrl_c_during_the_write_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pressed(part: Path, _: Path) -> None:
        assert Path(part).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", pressed)
    complaint(run("demo", "--quiet", "--steps", "0", "--out", tmp_path), 130)
    assert not list(tmp_path.iterdir())


def test_main_ends_the_process_with_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["taskzip", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert capsys.readouterr().out == f"taskzip {tz.__version__}\n"


def test_main_catches_ctrl_c_outside_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["taskzip.cli.app"], "app", pressed)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "taskzip: interrupted\n"
