"""What every test of the analysis ends in: orders drawn at random for all spaces leave the outputs as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.graph import Structure, analyse

Forward = Callable[[nn.Module, Any], Any]


class Net(nn.Module):
    """Modules and what to do with them: `Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 2))`.

    Tensors become parameters.
    """

    def __init__(self, do: Callable[..., Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.do = do
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.do(self, *inputs, **named)


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def assert_orders_hold(
    model: nn.Module,
    batch: Any,
    *,
    free: Sequence[str] = (),
    pinned: Mapping[str, str] | None = None,
    partly: Mapping[str, str] | None = None,
    moves: Mapping[str, int] | None = None,
    forward: Forward = call,
    orders: int = 2,
) -> Structure:
    """Analyse a network in float64, put all spaces into random orders, and compare the outputs.

    Args:
        model, batch, forward: as for `analyse`; floats are made float64, and what is initialised to 0 or 1 is drawn.
        free: layers whose units must all be free.
        pinned: layers that must be pinned, each with a part of the reason.
        partly: layers that can be shared in a special way, each with what is printed of it after "yes".
        moves: names of tensors, each with an axis, all of whose indices must be able to move.
        orders: how many random orders to try.
    """
    model = _drawn(model.double().eval())
    batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
    structure = analyse(model, batch, forward)
    state = {name: tensor.clone() for name, tensor in _tensors(model).items()}
    wanted = _outputs(model, batch, forward)
    rng = np.random.default_rng(0)
    for _ in range(orders):
        for name, tensor in _tensors(model).items():
            tensor.data = state[name].clone()
        for index, space in enumerate(structure.spaces):
            structure.reorder(model, index, rng.permutation(len(space.units)))
        for given, expected in zip(_outputs(model, batch, forward), wanted, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9, msg=lambda m: f"{m}\n{structure}")

    for name in free:
        layer = structure.layer(name)
        assert structure.sharing(layer) == "yes", f"{name} is pinned\n{structure}"
    for name, reason in (pinned or {}).items():
        found = structure.layer(name)
        assert reason in found.pinned and found.pinned and not found.spaces, f"{name}\n{structure}"
    for name, how in (partly or {}).items():
        assert structure.sharing(structure.layer(name)) == f"yes, {how}", f"{name}\n{structure}"
    for name, dim in (moves or {}).items():
        assert movable(structure, name, dim).all(), f"{name} does not move along axis {dim}\n{structure}"
    return structure


def movable(structure: Structure, name: str, dim: int = 0) -> np.ndarray:
    """Which indices of an axis lie in a space."""
    ids = structure.axes[name][dim]
    assert ids is not None, f"axis {dim} of {name} has no units"
    return structure.space_of(ids) >= 0


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _drawn(model: nn.Module) -> nn.Module:
    """Norms, slopes and statistics are all alike when new, and would hide a wrong order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in _tensors(model).values():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
                if tensor.dim() > 1:
                    tensor.sub_(1)
    return model


def _outputs(model: nn.Module, batch: Any, forward: Forward) -> list[Tensor]:
    with torch.no_grad():  # on copies, as a network may write into its inputs
        leaves = pytree.tree_leaves(forward(model, pytree.tree_map_only(Tensor, torch.clone, batch)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
