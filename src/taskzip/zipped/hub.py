"""Joint networks as folders, in the way of the Hugging Face Hub: weights, config.json and a model card."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from taskzip.errors import CheckpointError
from taskzip.files import filling
from taskzip.zipped.card import class_name, model_card
from taskzip.zipped.checkpoint import FORMAT, Network, read, save
from taskzip.zipped.network import JointNetwork
from taskzip.zipped.sizes import bytes_apart, bytes_together

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

LIBRARY = "taskzip"


def save_pretrained(zipped: JointNetwork, folder: str | Path, source: str | None = None) -> None:
    """Write a folder with weights, config and card, all or nothing.

    Args:
        zipped: the joint network.
        folder: a new one, or one that was written by this before; other files in it stay.
        source: where the card says that the network is loaded from; default the name of the folder.

    Raises:
        CheckpointError: the folder cannot be written, or is of something else; what stood there before still stands.
    """
    target = Path(folder).resolve()
    _check_place(folder, target)
    try:
        with filling(target) as part:
            save(zipped, part / WEIGHTS, called=Path(folder) / WEIGHTS)
            (part / CONFIG).write_text(json.dumps(_config(zipped), indent=2) + "\n", encoding="utf-8")
            (part / CARD).write_text(model_card(zipped, source or target.name), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror}. Is the folder writable, and has it room?"
        ) from error


def read_pretrained(
    kind: type[Network],
    folder_or_repo: str | Path,
    models: Mapping[str, nn.Module],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Network:
    """See `taskzip.from_pretrained`; `kind` is the class of the joint network."""
    folder = Path(folder_or_repo)
    if isinstance(folder_or_repo, Path) or folder.exists() or not _is_repo(folder_or_repo):
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file, not a folder: taskzip.load reads it.")
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no folder {folder_or_repo}; a repository on the Hub is called 'owner/name'."
            )
    else:
        folder = _downloaded(str(folder_or_repo), revision, token)
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}: save or download it again.")
    zipped = read(kind, folder / WEIGHTS, models)
    if _as_json(config.get("history")) != _as_json(zipped.history.as_dict()):
        raise CheckpointError(
            f"{folder}: {CONFIG} and {WEIGHTS} are not of the same network, so that one of them was replaced: save or "
            f"download them again."
        )
    return zipped


def push_to_hub(
    zipped: JointNetwork,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a network zipped by taskzip",
) -> str:
    """See `ZippedModel.push_to_hub`."""
    hub = _huggingface_hub(f"pushing to {repo_id}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "joint"
        save_pretrained(zipped, folder, source=repo_id)
        try:
            api = hub.HfApi(token=token, library_name=LIBRARY, library_version=version("taskzip"))
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url)
        except Exception as error:  # huggingface_hub raises its own errors, those of httpx, and the system's
            raise CheckpointError(
                f"cannot push to {repo_id}: {_reason(error)}. Are you online, and logged in (hf auth login) as one who "
                f"may write there?"
            ) from error


def _check_place(folder: str | Path, target: Path) -> None:
    """Refuse to replace files that `save_pretrained` did not write: a project has a README.md, too."""
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {folder}: there is no folder {target.parent}.")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot write {folder}: it is a file, not a folder.")
    taken = [name for name in (WEIGHTS, CONFIG, CARD) if (target / name).exists()]
    if not taken:
        return
    try:
        _read_config(target)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot write {folder}: it has a {taken[0]} that save_pretrained did not write: choose another folder."
        ) from error
    blocked = next((name for name in taken if (target / name).is_dir()), None)
    if blocked:
        raise CheckpointError(f"cannot write {folder}: its {blocked} is a folder: choose another folder.")


def _config(zipped: JointNetwork) -> dict[str, Any]:
    tasks = {
        name: {"class": class_name(network), "bytes": bytes_apart(network)} for name, network in zipped.tasks.items()
    }
    return {
        "library_name": LIBRARY,
        "taskzip_version": version("taskzip"),
        "format": FORMAT,
        "tasks": tasks,
        "parameters": zipped.parameter_count(),
        "bytes": bytes_together(zipped),
        "history": zipped.history.as_dict(),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}: it is not a folder that save_pretrained wrote, or not all of it."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is torn or not JSON: save or download it again.") from error
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise CheckpointError(f"{path} is not of taskzip: choose a folder that save_pretrained wrote.")
    return config


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _is_repo(name: str | Path) -> bool:
    """Whether this can be a repository on the Hub; `./folder` and `../folder` cannot."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None


def _downloaded(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    hub = _huggingface_hub(f"there is no folder {repo_id}, and downloading it from the Hugging Face Hub")
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # as in push_to_hub
        raise CheckpointError(
            f"there is no folder {repo_id}, and it cannot be downloaded from the Hugging Face Hub: {_reason(error)}."
        ) from error


def _huggingface_hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{what} needs huggingface_hub, which is not installed: pip install 'taskzip[hub]'"
        ) from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
