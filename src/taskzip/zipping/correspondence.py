"""Which layers of several networks belong together: by what they are, by order, by name, or as the caller says.

What has no partner stays private.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from taskzip.errors import InputError
from taskzip.graph import Layer, Structure
from taskzip.zipping.likeness import aligned

Layers = Literal["order", "name"] | Mapping[str, str | Mapping[str, str]]
"""How layers correspond; a mapping goes from the first task's layers to those of the second, or of others by task."""


class JointLayers(dict[int, Layer]):
    """One layer of the joint network: per task that has it, by its number, its own layer.

    Attributes:
        name: as the first of the tasks calls it that has it.
        alone: whether it is that of one network only, and not the first, so that its name may be another layer's.
    """

    def __init__(self, layers: Mapping[int, Layer]) -> None:
        super().__init__(layers)
        self.name = layers[min(layers)].name
        self.alone = len(layers) == 1 and 0 not in layers

    def renumbered(self, order: Sequence[int]) -> JointLayers:
        """The same where task `order[k]` has the number k."""
        found = JointLayers({k: self[t] for k, t in enumerate(order) if t in self})
        found.name, found.alone = self.name, self.alone
        return found


def correspond(names: Sequence[str], networks: Sequence[Structure], how: Layers | None) -> list[JointLayers]:
    """Put the layers of several networks in correspondence.

    Args:
        names: of the tasks.
        networks: their structures, layers in the order in which they run.
        how: "order": the first with the first, and so on; "name": those of the same name; or a mapping. By default by
            order where the networks have the same kinds of layers in the same order, else by what the layers are: kind,
            kernel, what they read and write, size and name (`likeness`).

    Returns:
        Joint layers in an order that keeps that of every network.

    Raises:
        InputError: names that do not exist, or a correspondence that runs against the order of the layers.
    """
    layers = [network.layers for network in networks]
    if not any(layers):
        raise InputError("the networks have no linear or convolution layers: there is nothing to zip.")
    if isinstance(how, Mapping):
        keys = _mapped(names, layers, how)
    elif how == "name":
        keys = [[layer.name for layer in each] for each in layers]
    elif how == "order" or len({tuple(map(_kind, each)) for each in layers}) == 1:
        keys = [[str(k) for k in range(len(each))] for each in layers]
    else:
        keys = aligned(networks)
    return _merged(names, layers, keys)


def _kind(layer: Layer) -> tuple[str, bool, bool]:
    return layer.form, bool(layer.pinned), layer.reads_input


def _mapped(names: Sequence[str], networks: Sequence[Sequence[Layer]], how: Mapping[str, object]) -> list[list[str]]:
    """Per layer a key; those with the same key correspond."""
    keys = [[f"{t}:{layer.name}" for layer in layers] for t, layers in enumerate(networks)]
    places = [{layer.name: k for k, layer in enumerate(layers)} for layers in networks]
    for first, others in how.items():
        _known("layers", names[0], first, places[0])
        if isinstance(others, str):
            if len(names) != 2:
                raise InputError(
                    f"layers[{first!r}] = {others!r} does not say of which task: with {len(names)} tasks give a dict "
                    f"by task name."
                )
            others = {names[1]: others}
        if not isinstance(others, Mapping):
            raise InputError(f"layers[{first!r}] must be a layer name or a dict by task name, not {others!r}.")
        for task, other in others.items():
            if task not in names[1:]:
                raise InputError(f"layers[{first!r}] names task {task!r}: known are {', '.join(names[1:])}.")
            t = names.index(task)
            _known(f"layers[{first!r}]", task, other, places[t])
            place = places[t][other]
            if not keys[t][place].startswith(f"{t}:"):
                raise InputError(f"layers gives layer {other!r} of task {task!r} two partners.")
            keys[t][place] = keys[0][places[0][first]]
    return keys


def _known(where: str, task: str, name: object, known: Mapping[str, int]) -> None:
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{where} names layer {name!r}; the layers of task {task!r} are {', '.join(known)}.")


def _merged(
    names: Sequence[str], networks: Sequence[Sequence[Layer]], keys: Sequence[Sequence[str]]
) -> list[JointLayers]:
    """All layers in one order: a joint layer comes when it is next in every network that has it."""
    at = [0] * len(networks)
    joint: list[JointLayers] = []
    while any(k < len(each) for k, each in zip(at, keys, strict=True)):
        waiting = {t: keys[t][k] for t, k in enumerate(at) if k < len(keys[t])}
        key = next((key for key in waiting.values() if _is_next(key, keys, at, waiting)), None)
        if key is None:
            listed = "; ".join(f"{names[t]!r} waits at {networks[t][at[t]].name!r}" for t in waiting)
            raise InputError(
                f"the correspondence of layers runs against the order in which they run: {listed}. Name other pairs in "
                f"`layers`."
            )
        joint.append(JointLayers({t: networks[t][at[t]] for t, each in waiting.items() if each == key}))
        for t in joint[-1]:
            at[t] += 1
    return joint


def _is_next(key: str, keys: Sequence[Sequence[str]], at: Sequence[int], waiting: Mapping[int, str]) -> bool:
    return all(waiting.get(t) == key or key not in each[at[t] :] for t, each in enumerate(keys))
