"""Layers whose rows move with hidden units are found, whether the graph knew of them or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph._layers import Reading
from taskzip.zipping.members import Member


class Mixer(nn.Module):
    """A linear layer over places, between layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.tokens = nn.Linear(5, 5)
        self.channels = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.tokens(x.transpose(1, 2)).transpose(1, 2).relu()
        return self.out(self.channels(x).relu().mean(1))


def tasks() -> list[tz.Task]:
    return [tz.Task(name, Mixer(), [torch.randn(16, 5, 3) for _ in range(4)]) for name in "ab"]


def test_rows_that_move_unknown_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "_beside", lambda self, uses, space_of: ())
    with pytest.warns(tz.TaskzipWarning, match="moves what tokens, channels are applied to"):
        member = Member(tasks()[0], 0)
    assert [layer.name for layer in member.structure.layers if not layer.solvable] == ["tokens", "channels"]


def test_sound_networks_are_quiet() -> None:
    member = Member(tasks()[0], 0)
    assert all(layer.solvable for layer in member.structure.layers)


def test_a_layer_that_is_not_solved_again_costs_no_more_than_leaving_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network and itself, fully shared: nothing is lost, for all that is left out."""
    monkeypatch.setattr(Reading, "_beside", lambda self, uses, space_of: ())
    first, _ = tasks()
    with pytest.warns(tz.TaskzipWarning, match="tokens"):
        zipped = tz.zip([first, tz.Task("b", first.model, first.data)], share=1.0, progress=False)
    x = first.data[0]
    with torch.no_grad():
        assert torch.allclose(zipped["b"](x), first.model(x), atol=1e-5)


def test_units_that_were_misread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Member, "original_rows", lambda self, layer: None)
    with pytest.raises(tz.GraphError, match="task 'a', layer 'embed': its units stand in another order"):
        Member(tasks()[0], 0)
