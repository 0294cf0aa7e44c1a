"""Every task's own module tree, tied together by the blocks that tasks share, and how that came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from taskzip.copying import copy_of
from taskzip.errors import InputError
from taskzip.tasks import as_call, by_task
from taskzip.zipped.blocks import densify, installed, weights_of
from taskzip.zipped.joint import run_jointly


@dataclass(frozen=True)
class LayerRecord:
    """What zipping did to one layer.

    Attributes:
        name: of the layer, as the first task's network calls it.
        names: what every task calls it.
        units: per task, how many units it has.
        shared: how many of them are shared.
        cost: the summed functional difference d (eq. 12) of the pairs.
        before: parameters of the separate layers together.
        after: parameters of the zipped layer.
        note: why nothing could be shared, or "".
        relative_cost: `cost` over what it would be if the pre-activations of the units that can pair were lost, half
            their variance: a number that compares across layers and networks. None in checkpoints of before.
        groups: which tasks share how many units, most tasks first; none where a checkpoint does not say.
    """

    name: str
    names: tuple[str, ...]
    units: tuple[int, ...]
    shared: int
    cost: float
    before: int
    after: int
    note: str = ""
    relative_cost: float | None = None
    groups: tuple[tuple[tuple[str, ...], int], ...] = ()

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LayerRecord:
        """From JSON."""
        groups = tuple((tuple(tasks), units) for tasks, units in d.get("groups", ()))
        return cls(**{**d, "names": tuple(d["names"]), "units": tuple(d["units"]), "groups": groups})


@dataclass
class History:
    """How a joint network was made: the settings of `zip`, one record per layer, and what was done afterwards."""

    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    later: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> History:
        """From JSON."""
        return cls(d["settings"], list(map(LayerRecord.from_dict, d["layers"])), d["later"])


class JointNetwork(nn.Module):
    """One network for several tasks. `zipped["name"]` stands wherever that task's original network stood.

    A block that several tasks share is one `Parameter`, tied like any tied weight in torch: `parameters()` gives it
    once, gradients of all tasks add up in it, and `.to(...)`, `state_dict()`, `train()`, `eval()` and `copy.deepcopy`
    work as ever.
    """

    def __init__(self, networks: Mapping[str, nn.Module], history: History | None = None) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(networks)
        self.history = history or History()

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self.tasks:
            raise KeyError(f"no task {name!r} in this network: it has {', '.join(self.tasks)}")
        return self.tasks[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> JointNetwork:
        """Its networks may hold tensors with a gradient history."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy_of(self.__getstate__(), memo))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every task's output for the same input, or for one input each.

        A dict with the names of the tasks for keys has the input of each, as `export_onnx` takes it: a tensor, a tuple
        of positional arguments, or a dict of keyword arguments. All other arguments go to every network as they are.
        Networks that write into their input get copies.

        In eval mode, what the tasks have in common is computed once: from the input on, for as long as layers are fully
        shared and units have no scales of their own; and the shared units of all layers, where the networks were zipped
        with `cross=False`, without gradients. Its results stay in memory until the last task has taken them, and single
        small inputs are faster task by task. Gradients run through it once, for all tasks together: call `backward` on
        the sum of the losses.

        Raises:
            InputError: a dict by task that leaves tasks out.
        """
        inputs = by_task(args[0], list(self.tasks), "zipped(...)") if len(args) == 1 and not kwargs else {"": None}
        if "" in inputs:
            return run_jointly(self.tasks, dict.fromkeys(self.tasks, (args, kwargs)))
        return run_jointly(self.tasks, {name: as_call(each) for name, each in inputs.items()})

    def materialize(self, name: str) -> nn.Module:
        """A plain copy of one task's network: the original classes with dense weights, which needs no taskzip to run.

        Its hidden units lie in the order that zipping gave them; its outputs are those of `zipped[name]`.
        """
        network = copy_of(self[name])
        densify(network)
        return network

    def parameter_count(self, tasks: Sequence[str] | None = None) -> int:
        """Parameters that the given tasks (default: all) need, shared blocks counted once."""
        unknown = set(tasks or ()) - set(self.tasks)
        if unknown:
            raise InputError(f"no task {sorted(unknown)[0]!r} in this network: it has {', '.join(self.tasks)}.")
        chosen = self.tasks if tasks is None else tasks
        return sum({p: p.numel() for name in chosen for p in self.tasks[name].parameters()}.values())

    def layer_weights(self, *, pruned: bool = False) -> list[list[nn.Parameter]]:
        """The weight of every layer of every task, biases left out: a dense parameter, or blocks.

        Args:
            pruned: only of layers whose zeros are missing connections.
        """
        found = []
        for task, (of, network) in enumerate(self.tasks.items()):
            blocks, parameters = installed(network), dict(network.named_parameters(remove_duplicate=False))
            for name in filter(None, (layer.names[task] for layer in self.history.layers)):
                if pruned and not self._is_pruned(of, name):
                    continue
                weight = name if name in blocks or name in parameters else f"{name}.weight"
                found.append(weights_of(blocks[weight]) if weight in blocks else [parameters[weight]])
        return found

    def _is_pruned(self, task: str, layer: str) -> bool:
        """In checkpoints of before, every zero is a missing connection."""
        return layer in self.history.settings["pruned"][task] if "pruned" in self.history.settings else True

    def connection_count(self) -> int:
        """Weights of the layers, without missing connections: those that are 0 in pruned layers (Sec. 3.6)."""
        pruned = {p for weight in self.layer_weights(pruned=True) for p in weight}
        weights = {p for weight in self.layer_weights() for p in weight}
        return sum(int(p.count_nonzero()) if p in pruned else p.numel() for p in weights)

    def shared_parameter_count(self) -> int:
        """Parameters that more than one task uses."""
        uses: dict[nn.Parameter, int] = {}
        for network in self.tasks.values():
            for parameter in set(network.parameters()):
                uses[parameter] = uses.get(parameter, 0) + 1
        return sum(parameter.numel() for parameter, times in uses.items() if times > 1)
