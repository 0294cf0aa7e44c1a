"""Checkpoints: one safetensors file with every block once, and in its metadata the structure and how it was made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from taskzip.copying import borrowing, uncompiled
from taskzip.errors import CheckpointError
from taskzip.zipped.blocks import Blocks, BlocksSpec, install, installed, original_class, spec_of
from taskzip.zipped.folding import can_fold, forget_batch_norms
from taskzip.zipped.network import History, JointNetwork

FORMAT = 3
_READS = (2, 3)
"""Formats; the third knows scales of units."""

_KEY = "taskzip"


Network = TypeVar("Network", bound=JointNetwork)


def save(zipped: JointNetwork, path: str | Path, called: str | Path | None = None) -> None:
    """Write a joint network to one file, all or nothing.

    Args:
        zipped: the joint network.
        path: the file.
        called: what errors call it, if not by its path.

    Raises:
        CheckpointError: the file cannot be written; whatever stood at `path` before still stands.
    """
    tensors, aliases = _once(zipped)
    folded = zipped.history.settings.get("folded", {})
    about = {
        "format": FORMAT,
        "tasks": {
            name: _structure_of(network) | {"folded": folded.get(name, [])} for name, network in zipped.tasks.items()
        },
        "aliases": aliases,
        "history": zipped.history.as_dict(),
    }
    target = Path(path).resolve()  # writes to where a symbolic link points, instead of replacing the link
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {target.parent}.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata={_KEY: json.dumps(about)})  # from where they lie, without a copy in memory
        part.chmod(mode)  # safetensors puts another file in its place, which others may not read
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {called or path}: {_reason(error)}. Is the folder writable, and has it room?"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def read(kind: type[Network], path: str | Path, networks: Mapping[str, nn.Module]) -> Network:
    """See `taskzip.load`; `kind` is the class of the joint network."""
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            raise CheckpointError(
                f"network {name!r} must be a torch nn.Module, not {network!r}: give instances, not classes."
            )
    about, tensors = _read(Path(path))
    try:
        return _build(kind, path, about, tensors, networks)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # metadata that taskzip did not write
        raise CheckpointError(f"{path} has damaged metadata ({type(error).__name__}: {error}).") from error


def _build(
    kind: type[Network],
    path: str | Path,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
) -> Network:
    if sorted(networks) != sorted(about["tasks"]):
        given = ", ".join(networks) or "none"
        raise CheckpointError(
            f"{path} holds the tasks {', '.join(about['tasks'])}, but networks were given for {given}."
        )
    joint = {}
    for name, structure in about["tasks"].items():
        network = borrowing(uncompiled(networks[name]))  # `_fill` replaces all tensors
        if all(can_fold(network, layer, norm) for layer, norm in structure["folded"]):
            forget_batch_norms(network, structure["folded"])
        _check_fit(path, name, network, structure)
        joint[name] = _skeleton(network, structure)
    zipped = kind(joint, History.from_dict(about["history"]))
    _fill(zipped, tensors, about["aliases"], {name: _device(networks[name]) for name in joint})
    return zipped.eval()


def _reason(error: OSError | SafetensorError) -> str:
    """What the operating system says."""
    if isinstance(error, OSError):
        return str(error.strerror)
    code = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(code[1])) if code else str(error)


def _once(zipped: JointNetwork) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    aliases = {}
    for key, tensor in zipped.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{key} is not a tensor but a {type(tensor).__name__}: such extra state cannot be saved."
            )
        if type(tensor.detach()) is not Tensor:
            raise CheckpointError(
                f"{key} is a {type(tensor).__name__}, which a checkpoint cannot hold: save the network before it is "
                f"quantised."
            )
        if id(tensor) in first:
            aliases[key] = first[id(tensor)]
        else:
            first[id(tensor)] = key
            tensors[key] = tensor.detach().cpu().contiguous()
    seen: set[int] = set()
    for (
        key,
        tensor,
    ) in tensors.items():  # views of one another are two tensors to torch, but one to safetensors
        start = tensor.untyped_storage().data_ptr()
        if start in seen:
            tensors[key] = tensor.clone()
        seen.add(start)
    return tensors, aliases


def _structure_of(network: nn.Module) -> dict[str, Any]:
    """Which parameters are blocks, and the dense shapes of everything, by the names of the original architecture."""
    blocks, original = installed(network), original_class(network)
    inside = {id(p) for b in blocks.values() for p in b.parameters()}
    tensors = network.state_dict(keep_vars=True)
    shapes = {k: shape for k, shape in _shapes(network).items() if id(tensors[k]) not in inside}
    shapes |= {name: list(spec_of(block).dense_shape) for name, block in blocks.items()}
    return {
        "class": f"{original.__module__}.{original.__qualname__}",
        "shapes": shapes,
        "blocks": {name: spec_of(block).as_dict() for name, block in blocks.items()},
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(about, dict) or "format" not in about:
                raise CheckpointError(f"{path} is a safetensors file, but not a taskzip checkpoint.")
            if about["format"] not in _READS:
                raise CheckpointError(
                    f"{path} has format {about['format']}, this taskzip reads 2 and 3: read it with the version that "
                    f"wrote it, or zip again."
                )
            # Cloned into memory as torch aligns it: where a tensor starts decides on the last bit of some products.
            return about, {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is torn or not a safetensors file: {error}.") from error


def _check_fit(path: str | Path, name: str, network: nn.Module, structure: Mapping[str, Any]) -> None:
    given = _shapes(network)
    saved = structure["shapes"]
    for key in sorted(saved.keys() | given.keys()):
        if saved.get(key) != given.get(key):
            raise CheckpointError(
                f"{path}, task {name!r}: the network given ({type(network).__name__}) does not fit the one saved "
                f"({structure['class']}): {key!r} is {_shape(given.get(key))}, in the file {_shape(saved.get(key))}."
            )


def _shapes(network: nn.Module) -> dict[str, list[int]]:
    """The shapes of a network's tensors; tied ones go by the first of their names."""
    first: dict[int, str] = {}
    state = network.state_dict(keep_vars=True)
    return {k: list(t.shape) for k, t in state.items() if first.setdefault(id(t), k) == k}


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a scalar"


def _skeleton(network: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """The network with blocks in the right places, in place."""
    for name, spec in structure["blocks"].items():
        blocks = BlocksSpec.from_dict(spec)
        trained = network.get_parameter(name).requires_grad
        empty = {each: nn.Parameter(torch.empty(shape), trained) for each, shape in blocks.shapes.items()}
        install(network, name, Blocks(blocks, empty))
    return network


def _fill(
    zipped: JointNetwork,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    devices: Mapping[str, torch.device],
) -> None:
    parameters: dict[str, nn.Parameter] = {}
    for key, present in list(zipped.state_dict(keep_vars=True).items()):
        source = aliases.get(key, key)
        found = tuple(tensors[source].shape) if source in tensors else "absent"
        if found != tuple(present.shape):
            raise CheckpointError(f"the checkpoint is damaged: {source!r} is {found}, not {tuple(present.shape)}.")
        tensor = tensors[source].to(devices[key.split(".")[1]])
        path, _, name = key.rpartition(".")
        module = zipped.get_submodule(path)
        if isinstance(present, nn.Parameter):
            module._parameters[name] = parameters.setdefault(source, nn.Parameter(tensor, present.requires_grad))
        else:
            module._buffers[name] = tensor
    for network in zipped.tasks.values():
        for blocks in installed(network).values():
            blocks.to(next(blocks.parameters()).device)


def _device(network: nn.Module) -> torch.device:
    return next(iter(network.state_dict().values()), torch.empty(0)).device
