"""A weight put together from blocks, and modules that use it without knowing (design 2.1, 2.3).

The weights from input group g_in to output group g_out are one Parameter; the tasks in g_in and g_out use it. A block
that several tasks use is the same Parameter in each of their networks, like any tied weight in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.zipped.apart import apart_forward
from taskzip.zipped.products import Row, forward_in_blocks


@dataclass(frozen=True)
class BlockSpec:
    """One block: its name, its shape, and how many of its inputs this task has (the other task's may be larger)."""

    name: str
    shape: tuple[int, ...]
    inputs: int | None = None


@dataclass(frozen=True)
class RowSpec:
    """Units that the same tasks own: blocks side by side, then put into the order in which the task's inputs lie.

    Behind the blocks come so many `absent` inputs, which these units do not read. Where they have a `scale`, what they
    give is multiplied by this vector of the task's own, before its bias is added.
    """

    blocks: tuple[BlockSpec, ...]
    order: tuple[int, ...] | None = None
    absent: int = 0
    scale: str | None = None

    @property
    def inputs(self) -> int:
        """How many inputs there are, with those that are not read."""
        return self.absent + sum(b.shape[1] if b.inputs is None else b.inputs for b in self.blocks)

    def read(self) -> tuple[int, ...]:
        """Which inputs the units read, in the order of the blocks."""
        order = range(self.inputs) if self.order is None else self.order
        places = sorted(range(len(order)), key=order.__getitem__)
        return tuple(places[: len(places) - self.absent])


@dataclass(frozen=True)
class BlocksSpec:
    """How one task's weight is put together: groups of rows one below the other, then in the order of the task's units.

    Where they are `apart`, a layer of torch computes each group by itself, from the inputs that it reads. Plain data,
    for the checkpoint.
    """

    rows: tuple[RowSpec, ...]
    order: tuple[int, ...] | None = None
    apart: bool = False

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the blocks make up."""
        rows = sum(row.blocks[0].shape[0] for row in self.rows)
        first = self.rows[0].blocks
        if len(first[0].shape) == 1:
            return (rows,)
        return (rows, self.rows[0].inputs, *first[0].shape[2:])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters by name: blocks and scales."""
        found = {block.name: block.shape for row in self.rows for block in row.blocks}
        return found | {row.scale: row.blocks[0].shape[:1] for row in self.rows if row.scale is not None}

    @property
    def is_one_block(self) -> bool:
        """Whether there is nothing to put together."""
        first = self.rows[0]
        return len(self.rows) == len(first.blocks) == 1 and first.order is None and self.order is None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> BlocksSpec:
        """From JSON."""
        return cls(
            tuple(
                RowSpec(
                    tuple(BlockSpec(b["name"], tuple(b["shape"]), b["inputs"]) for b in row["blocks"]),
                    None if row["order"] is None else tuple(row["order"]),
                    row.get("absent", 0),
                    row.get("scale"),
                )
                for row in d["rows"]
            ),
            None if d["order"] is None else tuple(d["order"]),
            d.get("apart", False),
        )


class Blocks(nn.Module):
    """One task's view of a zipped weight or bias; calling it gives the dense tensor.

    Its parameters are called after tasks, so that all other names here start with an underscore, which theirs do not.
    """

    def __init__(self, spec: BlocksSpec, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._spec = spec
        for name in spec.shapes:
            self.register_parameter(name, parameters[name])
        device = next(self.parameters()).device
        for i, each in enumerate([*(row.order for row in spec.rows), spec.order]):
            order = None if each is None else torch.tensor(each, device=device)
            self.register_buffer(f"_order{i}", order, persistent=False)
        weights = spec.apart and len(spec.dense_shape) > 1
        for i, row in enumerate(spec.rows if weights else ()):
            reads = row.read()
            if list(reads) != list(range(reads[0], reads[0] + len(reads))):
                self.register_buffer(f"_read{i}", torch.tensor(reads, device=device), persistent=False)
        self._prepare()

    def _prepare(self) -> None:
        """What every call needs: at batch 1 a small layer takes no longer than looking it up."""
        rows = self._spec.rows
        first = rows[0].blocks[0]
        self._single = self._spec.is_one_block
        self._whole = first.name if self._single and first.inputs is None and not rows[0].absent else None
        self._plan = [([(b.name, b.inputs) for b in row.blocks], f"_order{i}") for i, row in enumerate(rows)]
        self._last_order = f"_order{len(rows)}"
        self._shape = self._spec.dense_shape
        self._groups = [row.blocks[0].shape[0] for row in rows]
        self._scales = [row.scale for row in rows] if any(row.scale for row in rows) else []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self) -> Tensor:
        """The dense weight, [units, inputs, *kernel], or the bias, [units]."""
        return self._scaled(self._together(), None, 0)

    def _together(self) -> Tensor:
        """The same, but for the scales of units."""
        if self._whole is not None:
            return self._part(self._whole, None)
        rows = [_row(*each, row.absent) for each, row in zip(self._rows(), self._spec.rows, strict=True)]
        return self._ordered(rows[0] if len(rows) == 1 else torch.cat(rows), 0)

    def _scaled(self, given: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        """What units give along a dimension, each with the scale that is the task's own, and then the bias."""
        if not self._scales:
            return given
        given = _plain(given)
        known = {name: self._part(name, None) for name in self._scales if name is not None}
        like = next(iter(known.values()))
        parts = [
            like.new_ones(n) if name is None else known[name]
            for name, n in zip(self._scales, self._groups, strict=True)
        ]
        scale = self._ordered(parts[0] if len(parts) == 1 else torch.cat(parts), 0)
        behind = (1,) * ((given.dim() if dim >= 0 else 0) - dim - 1)
        scale = scale.to(given.dtype).view(-1, *behind)
        if bias is None:
            return given * scale
        bias = bias.to(given.dtype).view(-1, *behind)
        # What graphs are made of should be plain.
        return given * scale + bias if torch.compiler.is_compiling() else torch.addcmul(bias, given, scale)

    def _quantised(self) -> bool:
        return self._whole is not None and is_quantised(self._part(self._whole, None))

    def _rows(self) -> list[Row]:
        """The blocks of each group of rows, and the order into which their columns are put."""
        buffers = self._buffers
        return [([self._part(name, inputs) for name, inputs in parts], buffers[order]) for parts, order in self._plan]

    def _order(self) -> Tensor | None:
        return self._buffers[self._last_order]

    def _grouped(self) -> list[Tensor]:
        """The weights of each group of units from the inputs that it reads, or its biases."""
        return [_row(blocks, None) for blocks, _ in self._rows()]

    def _reads(self) -> list[tuple[int, int] | Tensor | None]:
        """Which inputs each group reads: a start and a length, numbers, or None for all."""
        return [self._reads_of(i, row) for i, row in enumerate(self._spec.rows)]

    def _ordered(self, units: Tensor, dim: int) -> Tensor:
        """What lies group by group, in the order of the task's units."""
        order = self._order()
        return units if order is None else units.index_select(dim, order)

    def _reads_of(self, i: int, row: RowSpec) -> tuple[int, int] | Tensor | None:
        if f"_read{i}" in self._buffers:
            return self._buffers[f"_read{i}"]
        return (row.read()[0], row.inputs - row.absent) if row.absent else None

    def _part(self, name: str, inputs: int | None) -> Tensor:
        parameter: Any = self._parameters[name]
        if not self._single:
            parameter = _plain(parameter)  # quantised tensors cannot be put together
        return parameter if inputs is None else parameter[:, :inputs]

    def extra_repr(self) -> str:
        """The blocks with their shapes, for print(network)."""
        return ", ".join(f"{name}: {'x'.join(map(str, p.shape))}" for name, p in self.named_parameters())


def is_quantised(tensor: Tensor) -> bool:
    """Whether it is of a class of its own, such as torchao's, that has numbers of 8 bits for instance."""
    return type(tensor).dequantize is not Tensor.dequantize


def _plain(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if is_quantised(tensor) else tensor


def _row(blocks: list[Tensor], order: Tensor | None, absent: int = 0) -> Tensor:
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    if absent:
        whole = torch.cat([whole, whole.new_zeros(len(whole), absent, *whole.shape[2:])], dim=1)
    return whole if order is None else whole.index_select(1, order)


def _unordered(values: Tensor, order: Tensor | None) -> Tensor:
    """What `index_select` with that order would give these."""
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


class Zipped:
    """Mixed into the class of a module whose weights are put together from blocks; `zipped_attributes` names them."""

    zipped_attributes: tuple[str, ...] = ()
    original_class: type[nn.Module]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be kept and never used, such as the weights that a quantiser puts into a module."""
        if name in self.zipped_attributes:
            raise InputError(
                f"the {name} of this {self.original_class.__name__} is put together from blocks and cannot be set: set "
                f"its blocks, {name}_blocks, or take a plain copy of the network, zipped.materialize(task)."
            )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.original_class, self.zipped_attributes), self.__dict__


_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def zipped_class(original: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the module's own class in which the attributes are computed: its forward stays the user's.

    Torch's own linear layers and convolutions, though, may compute groups of units one by one, or multiply with the
    blocks one by one where that is faster.
    """
    if (original, attributes) not in _classes:
        computed: dict[str, Any] = {attribute: _computed(attribute) for attribute in attributes}
        if "weight" in attributes and (forward := forward_in_blocks(original)):
            computed["forward"] = apart_forward(original, forward)
        computed |= {"zipped_attributes": attributes, "original_class": original, "__module__": __name__}
        _classes[original, attributes] = type(f"Zipped{original.__name__}", (Zipped, original), computed)
    return _classes[original, attributes]


def _computed(attribute: str) -> property:
    name = f"{attribute}_blocks"
    return property(lambda module: module._modules[name].forward())


def _new(original: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    cls = zipped_class(original, attributes)
    return cls.__new__(cls)


def install(network: nn.Module, name: str, blocks: Blocks) -> None:
    """Replace the parameter `name` of a network by blocks, in every module that has it."""
    parameter = network.get_parameter(name)
    for module in list(network.modules()):
        for attribute in [a for a, p in module._parameters.items() if p is parameter]:
            original, attributes = _origin(module)
            module._parameters[attribute] = None  # keeps its place among the module's parameters
            module.add_module(f"{attribute}_blocks", blocks)
            module.__class__ = zipped_class(original, (*attributes, attribute))


def densify(network: nn.Module) -> None:
    """Turn all blocks of a network back into ordinary parameters, in place."""
    made: dict[nn.Module, nn.Parameter] = {}
    for module in list(network.modules()):
        original, attributes = _origin(module)
        for attribute in attributes:
            blocks = module._modules.pop(f"{attribute}_blocks")
            assert blocks is not None
            if blocks not in made:
                grad = any(p.requires_grad for p in blocks.parameters())
                dense = blocks().detach().clone(memory_format=torch.contiguous_format)
                made[blocks] = nn.Parameter(dense, requires_grad=grad)
            module.__class__ = original
            module.register_parameter(attribute, made[blocks])


def has_own_scale(network: nn.Module, weight: str, bias: str | None) -> bool:
    """Whether units of a layer can have a scale: one of torch's own, with real weights, which its bias is added to."""
    path, _, name = weight.rpartition(".")
    module = network.get_submodule(path)
    if name != "weight" or bias not in (None, f"{path}.bias" if path else "bias"):
        return False
    return not network.get_parameter(weight).is_complex() and forward_in_blocks(original_class(module)) is not None


def installed(network: nn.Module) -> dict[str, Blocks]:
    """All zipped parameters of a network: name -> blocks; tied ones go by the first of their names."""
    found: dict[Blocks, str] = {}
    for path, module in network.named_modules():
        for attribute in _origin(module)[1]:
            blocks = module._modules[f"{attribute}_blocks"]
            assert isinstance(blocks, Blocks)
            found.setdefault(blocks, f"{path}.{attribute}" if path else attribute)
    return {name: blocks for blocks, name in found.items()}


def _origin(module: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    if isinstance(module, Zipped):
        return module.original_class, module.zipped_attributes
    return type(module), ()


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before zipping."""
    return _origin(module)[0]


def spec_of(blocks: Blocks) -> BlocksSpec:
    """How a task's weight is put together."""
    return blocks._spec


def weights_of(blocks: Blocks) -> list[nn.Parameter]:
    """The blocks themselves, without the scales of units."""
    return [parameter for name, parameter in blocks.named_parameters() if name not in blocks._scales]


def along(blocks: Blocks, units: Tensor, inputs: Tensor) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
    """Every block with what belongs to it of something known for each unit and each input of the dense weight."""
    order = _unordered(units, blocks._order())
    for (parts, name), each in zip(blocks._plan, order.split(blocks._groups), strict=True):
        columns, start = _unordered(inputs, blocks._buffers[name]), 0
        for block, few in parts:
            parameter = blocks._parameters[block]
            assert parameter is not None
            width = 0 if parameter.dim() == 1 else parameter.shape[1] if few is None else few
            yield parameter, each, columns[start : start + width]
            start += width


def scale_name(owners: Sequence[str], user: str) -> str:
    """`A+B:A` for what A multiplies the units of A and B by."""
    return f"{'+'.join(owners)}:{user}"


def block_name(owners: Sequence[str], users: Sequence[str]) -> str:
    """`A+B` for units of A and B over inputs of both, `A+B@A` for the same units over inputs that only A has."""
    rows = "+".join(owners)
    return rows if tuple(owners) == tuple(users) else f"{rows}@{'+'.join(users)}"
