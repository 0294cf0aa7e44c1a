"""Stand-ins for what models of Hugging Face return, known to torch's pytree or not, and other packings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass
class Unknown(OrderedDict):
    """As `ModelOutput`: a dataclass and an ordered dict of what is not None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Registered(Unknown):
    """The same, which pytree knows."""


pytree.register_pytree_node(
    Registered,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Registered(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.Registered",
)


@dataclass
class Plain:
    """A dataclass and nothing else."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    loss: Tensor | None = None


PACKINGS: dict[str, Callable[..., Any]] = {
    "unknown": Unknown,
    "registered": Registered,
    "dataclass": Plain,
    "dict": lambda **found: {k: v for k, v in found.items() if v is not None},
    "object": SimpleNamespace,
}


class Model(nn.Module):
    """Token classes [B, T, 5], or with `pooled` classes [B, 5], of token numbers [B, T]."""

    def __init__(self, packing: str, seed: int, *, pooled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.packing, self.pooled = packing, pooled
        self.hidden, self.more, self.head = nn.Linear(11, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = F.relu(self.hidden(F.one_hot(input_ids, 11).float()))
        if self.pooled:
            hidden = hidden.mean(1)
        logits = self.head(F.relu(self.more(hidden)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return PACKINGS[self.packing](loss=loss, logits=logits, hidden_states=(1e3 * input_ids.float(),))


def token_batches(seed: int, *, pooled: bool = True, labels: bool = True) -> list[dict[str, Tensor]]:
    """Six batches of eight sequences of six tokens; what is asked for depends on the tokens."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(6):
        ids = torch.randint(11, (8, 6), generator=g)
        wanted = ids.sum(1) % 5 if pooled else ids % 5
        found.append({"input_ids": ids} | ({"labels": wanted} if labels else {}))
    return found
