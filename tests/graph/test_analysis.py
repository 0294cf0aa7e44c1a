"""Whole networks: everything that may stand in the way of re-ordering units, a test per hazard, and random networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net, assert_orders_hold, call, movable
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import GraphError
from taskzip.graph import analyse

VECTORS = torch.randn(3, 5)
SEQUENCES = torch.randn(3, 4, 11)
IMAGES = torch.randn(3, 2, 8, 8)


def conv(read: int, units: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(read, units, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


# --- several readers, several writers -----------------------------------------------------------------------------


def test_residual_without_projection() -> None:
    model = Net(
        lambda m, x: m.out((m.second(F.relu(m.first(y := m.stem(x)))) + y).relu()),
        stem=conv(2, 6),
        first=conv(6, 7),
        second=conv(7, 6),
        out=conv(6, 3),
    )
    structure = assert_orders_hold(
        model,
        IMAGES,
        free=["stem", "first", "second"],
        moves={"stem.weight": 0, "first.weight": 1, "second.bias": 0, "out.weight": 1},
    )
    assert [layer.spaces for layer in structure.layers] == [(0,), (1,), (0,), ()]


def test_residual_with_projection() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.side = conv(2, 6, stride=2), conv(6, 5), conv(2, 5, 1, stride=2)
            self.bn_a, self.bn_b, self.bn_side = nn.BatchNorm2d(6), nn.BatchNorm2d(5), nn.BatchNorm2d(5)
            self.out = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn_b(self.b(self.bn_a(self.a(x)).relu()))
            y += self.bn_side(self.side(x))
            return self.out(y.relu_().mean((2, 3)))

    structure = assert_orders_hold(
        Block(),
        IMAGES,
        free=["a", "b", "side"],
        moves={"side.weight": 0, "out.weight": 1},
    )
    assert structure.layer("b").spaces == structure.layer("side").spaces != structure.layer("a").spaces
    assert structure.layer("b").batch_norm is not None
    assert structure.layer("b").columns is not None
    assert (
        structure.space_of(structure.layer("out").columns) == structure.space_of(structure.axes["b.weight"][0])
    ).all()


def test_units_that_meet_the_input_stay() -> None:
    model = Net(lambda m, x: m.out(x + m.f(x)), f=nn.Linear(5, 5), out=nn.Linear(5, 2))
    assert_orders_hold(model, VECTORS, pinned={"f": "add with a fixed order"})


def test_a_space_with_several_readers() -> None:
    model = Net(
        lambda m, x: (m.a(y := m.first(x).relu()), m.b(y), y.sum(1)),
        first=nn.Linear(5, 6),
        a=nn.Linear(6, 3),
        b=nn.Linear(6, 2),
    )
    assert_orders_hold(model, VECTORS, free=["first"], moves={"a.weight": 1, "b.weight": 1})


def test_several_heads() -> None:
    model = Net(
        lambda m, x: [m.heads[k](m.first(x).relu()) for k in "ab"],
        first=nn.Linear(5, 6),
        heads=nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 2)}),
    )
    structure = assert_orders_hold(model, VECTORS, pinned={"heads.a": "an output", "heads.b": "an output"})
    assert structure.layer("first").calls == 2  # once per head, with the same units


# --- concatenated, split, cut -------------------------------------------------------------------------------------


def test_concatenated_before_a_convolution() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([m.a(x).relu(), x, m.b(x)], 1)), a=conv(2, 4), b=conv(2, 6), out=conv(12, 3)
    )
    structure = assert_orders_hold(model, IMAGES, free=["a", "b"])
    assert structure.space_of(structure.layer("out").columns).tolist() == [0] * 4 + [-1] * 2 + [1] * 6


def test_concatenated_flattened_and_read_by_a_linear_layer() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([m.a(x).flatten(1), m.b(x).mean((2, 3))], dim=-1)),
        a=nn.Conv2d(2, 4, 7),
        b=conv(2, 6),
        out=nn.Linear(22, 3),
    )
    structure = assert_orders_hold(model, IMAGES, free=["a", "b"])
    assert structure.space_of(structure.layer("out").columns).tolist() == [0] * 16 + [1] * 6
    assert structure.spaces[0].positions(structure.layer("out").columns)[1].tolist() == [4, 5, 6, 7]


def test_dense_connections() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        found = [m.stem(x)]
        for layer in m.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        return m.out(torch.cat(found, 1).mean((2, 3)))

    layers = nn.ModuleList([conv(4, 3), conv(7, 3), conv(10, 3)])
    model = Net(do, stem=conv(2, 4), layers=layers, out=nn.Linear(13, 2))
    assert_orders_hold(model, IMAGES, free=["stem", "layers.0", "layers.1", "layers.2"])


def test_the_same_units_twice_in_one_concatenation() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([y := m.first(x), y.relu(), -y], 1)), first=nn.Linear(5, 4), out=nn.Linear(12, 3)
    )
    structure = assert_orders_hold(model, VECTORS, free=["first"])
    assert structure.spaces[0].positions(structure.layer("out").columns).tolist() == [
        [i, i + 4, i + 8] for i in range(4)
    ]


def test_concatenated_along_another_axis() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x), torch.stack([m.b(x)] * 2).mean(0)], 0)),
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 6),
        out=nn.Linear(6, 3),
    )
    structure = assert_orders_hold(model, VECTORS, free=["a", "b"], moves={"a.weight": 0, "b.bias": 0})
    assert len(structure.spaces) == 1


def test_split_and_joined_again() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([(s := m.first(x).split([2, 4], 1))[0], m.middle(s[1])], 1)),
        first=nn.Linear(5, 6),
        middle=nn.Linear(4, 5),
        out=nn.Linear(7, 3),
    )
    structure = assert_orders_hold(
        model, VECTORS, free=["middle"], partly={"first": "2 units, 4 units"}, moves={"first.weight": 0}
    )
    assert sorted(len(space.units) for space in structure.spaces) == [2, 4, 5]
    assert [rows.tolist() for rows in structure.parts(structure.layer("first")).values()] == [
        [[0], [1]],
        [[2], [3], [4], [5]],
    ]


@pytest.mark.parametrize(
    "halves", [lambda y: y.chunk(2, 1), lambda y: (y[:, :4], y[:, 4:]), lambda y: y.tensor_split(2, 1)]
)
def test_gated_halves(halves: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        value, gate = halves(m.first(x))
        return m.out(value * gate.sigmoid())

    model = Net(do, first=nn.Linear(5, 8), out=nn.Linear(4, 3))
    structure = assert_orders_hold(
        model, VECTORS, partly={"first": "4 units of 2 rows"}, moves={"first.weight": 0, "out.weight": 1}
    )
    assert structure.spaces[0].positions(structure.axes["first.bias"][0]).tolist() == [[i, i + 4] for i in range(4)]


def test_a_slice_of_units() -> None:
    model = Net(
        lambda m, x: m.out((y := m.first(x))[:, ::2]) + y[:, 4:].sum(), first=nn.Linear(5, 8), out=nn.Linear(4, 3)
    )
    four = "2 units, 2 units, 2 units, 2 units"
    structure = assert_orders_hold(model, VECTORS, partly={"first": four}, moves={"first.weight": 0})
    assert sorted(sorted(space.units.tolist()) for space in structure.spaces) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_a_slice_that_cuts_all_units_alike() -> None:
    model = Net(lambda m, x: m.out(m.first(x).flatten(1)[:, ::2]), first=nn.Conv2d(2, 4, 7), out=nn.Linear(8, 3))
    assert_orders_hold(model, IMAGES, free=["first"])


def test_a_slice_that_cuts_one_unit() -> None:
    model = Net(lambda m, x: m.out(m.first(x).flatten(1)[:, 1:]), first=nn.Conv2d(2, 4, 7), out=nn.Linear(15, 3))
    structure = assert_orders_hold(model, IMAGES, partly={"first": "3 units, 1 fixed"})
    assert movable(structure, "first.weight").tolist() == [False, True, True, True]


def test_one_unit_by_its_number() -> None:
    model = Net(
        lambda m, x: m.out(y := m.first(x)) + y[:, 2, None] * y[:, -1:], first=nn.Linear(5, 6), out=nn.Linear(6, 3)
    )
    structure = assert_orders_hold(model, VECTORS, partly={"first": "4 units, 2 fixed"})
    assert movable(structure, "first.weight").tolist() == [True, True, False, True, True, False]


def test_spatial_slices_keep_units_free() -> None:
    model = Net(
        lambda m, x: m.out(m.first(x)[..., 1:5, 0] + m.first(x)[:, :, 2, :4]), first=conv(2, 6), out=nn.Conv1d(6, 2, 1)
    )
    assert_orders_hold(model, IMAGES, free=["first"])


# --- groups of channels -------------------------------------------------------------------------------------------


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("shuffle", [shuffled, nn.ChannelShuffle(2), lambda x: F.relu(shuffled(x) / 2)])
def test_channel_shuffle_is_but_a_new_order(shuffle: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda m, x: m.out(shuffle(m.first(x))), first=conv(2, 6), out=conv(6, 3))
    assert_orders_hold(model, IMAGES, free=["first"], moves={"out.weight": 1})


def test_channel_shuffle_between_groups() -> None:
    model = Net(
        lambda m, x: m.out(m.second(shuffled(m.first(m.stem(x))))),
        stem=conv(2, 8),
        first=conv(8, 8, groups=2),
        second=conv(8, 8, groups=4),
        out=conv(8, 3),
    )
    assert_orders_hold(model, IMAGES, pinned={"first": "grouped"}, orders=4)


def test_shuffled_units_that_meet_themselves() -> None:
    model = Net(
        lambda m, x: m.out(torch.cat([(y := m.first(x)) + shuffled(y), m.side(x)], 1)),
        first=conv(2, 12),
        side=conv(2, 4),
        out=conv(16, 3),
    )
    assert_orders_hold(model, IMAGES, free=["side"], orders=4)


def test_shuffled_blocks_with_branches() -> None:
    """ShuffleNet: half of the units pass a block by, then all are shuffled."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            passing, worked = x.chunk(2, dim=1)
            x = shuffled(torch.cat([passing, block(worked).relu()], 1))
        return m.out(x)

    blocks = nn.ModuleList([conv(8, 8), conv(8, 8)])
    model = Net(do, stem=conv(2, 16), blocks=blocks, out=conv(16, 3))
    structure = assert_orders_hold(model, IMAGES, orders=4)
    assert movable(structure, "stem.weight").any() and movable(structure, "blocks.1.weight").all()


SPLIT: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda m, x: x.softmax(-1),
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "norm": lambda m, x: m.norm(x),
    "layer": lambda m, x: m.mix(x),
    "sorted": lambda m, x: x.sort(1)[0],
    "itself": lambda m, x: x * x[:, :1],
    "other axis": lambda m, x: x.transpose(1, 2).softmax(2).transpose(1, 2),
    "cat": lambda m, x: torch.cat([x[:, 1:], x[:, :1].relu()], 1),
    "batch norm": lambda m, x: m.batch(x),
    "expand": lambda m, x: (x[:, :, None] * x.sum(1)[:, None, None].expand(3, 3, 2, 4)).sum(2),
}


@pytest.mark.parametrize("op", SPLIT)
def test_what_sees_an_axis_in_parts(op: str) -> None:
    model = Net(
        lambda m, x: m.out(SPLIT[op](m, m.first(x).view(3, 3, 4)).flatten(1)),
        first=nn.Linear(5, 12),
        norm=nn.LayerNorm(4),
        batch=nn.BatchNorm1d(3),
        mix=nn.Linear(4, 4),
        out=nn.Linear(12, 2),
    )
    structure = assert_orders_hold(model, VECTORS, orders=4)
    rows = structure.axes["first.weight"][0]
    assert all(len(space.units) <= 3 for space in structure.spaces if space.positions(rows).size)


def test_part_of_a_split_axis() -> None:
    model = Net(
        lambda m, x: m.out((y := m.first(x).view(3, 2, 4))[:, 0] * y[:, 1]) + m.other(y[:, :, 1:3].flatten(1)),
        first=nn.Linear(5, 8),
        other=nn.Linear(4, 2),
        out=nn.Linear(4, 2),
    )
    structure = assert_orders_hold(model, VECTORS, moves={"first.weight": 0}, orders=4)
    assert sorted(len(space.units) for space in structure.spaces) == [2, 2]  # within and outside what is cut


def test_inverted_residual_with_squeeze_and_excitation() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        y = F.hardswish(m.depthwise(F.relu6(m.expand(x))))
        y = y * m.excite(m.squeeze(F.adaptive_avg_pool2d(y, 1)).relu_()).sigmoid()
        return m.out(m.project(y))

    model = Net(
        do,
        expand=conv(2, 6, 1),
        depthwise=conv(6, 6, groups=6),
        squeeze=conv(6, 3, 1),
        excite=conv(3, 6, 1),
        project=conv(6, 4, 1),
        out=conv(4, 2, 1),
    )
    assert_orders_hold(
        model,
        IMAGES,
        free=["expand", "squeeze", "excite", "project"],
        pinned={"depthwise": "grouped"},
        moves={"expand.weight": 0, "depthwise.weight": 0, "excite.weight": 0},
    )


# --- tied and repeated --------------------------------------------------------------------------------------------


def test_one_module_called_twice_on_different_units() -> None:
    model = Net(lambda m, x: m.out(m.b(m.b(m.a(x)).relu())), a=nn.Linear(5, 6), b=nn.Linear(6, 6), out=nn.Linear(6, 3))
    structure = assert_orders_hold(model, VECTORS, free=["a", "b"], moves={"b.weight": 1})
    assert structure.layer("b").calls == 2
    assert structure.layer("a").spaces == structure.layer("b").spaces == (0,)
    assert (structure.axes["b.weight"][0] == structure.axes["b.weight"][1]).all()


def test_one_module_called_twice_on_the_same_units() -> None:
    model = Net(lambda m, x: m.out(m.a(x).relu() + m.a(2 * x)), a=nn.Linear(5, 6), out=nn.Linear(6, 3))
    structure = assert_orders_hold(model, VECTORS, free=["a"])
    assert structure.layer("a").calls == 2
    assert structure.layer("a").reads_input


def test_two_modules_that_share_a_weight() -> None:
    model = Net(
        lambda m, x: m.out(m.a(x).relu() + m.b(x.abs())), a=nn.Linear(5, 6), b=nn.Linear(5, 6), out=nn.Linear(6, 3)
    )
    model.b.weight = model.a.weight
    structure = assert_orders_hold(model, VECTORS, pinned={"a": "its calls add different biases"}, moves={"b.bias": 0})
    assert [layer.name for layer in structure.layers] == ["a", "out"]
    assert not structure.layer("a").solvable

    model.b.bias = model.a.bias
    structure = assert_orders_hold(model, VECTORS, free=["a"])
    assert structure.layer("a").calls == 2


def test_a_weight_that_is_also_read_by_another_op() -> None:
    model = Net(lambda m, x: F.linear(m.code(x).relu(), m.code.weight.t()), code=nn.Linear(5, 6))
    structure = assert_orders_hold(
        model, VECTORS, pinned={"code": "its weight is also read by t"}, moves={"code.weight": 0, "code.bias": 0}
    )
    assert not structure.layer("code").solvable


def test_a_bias_that_is_also_read_by_another_layer() -> None:
    model = Net(lambda m, x: (m.out(m.a(x)), m.b(x).sum(1)), a=nn.Linear(5, 6), b=nn.Linear(5, 6), out=nn.Linear(6, 3))
    model.b.bias = model.a.bias
    assert_orders_hold(
        model,
        VECTORS,
        pinned={"a": "its bias is also read by b", "b": "its bias is also read by a"},
        moves={"a.weight": 0, "b.weight": 0},
    )


def test_a_bias_that_cannot_be_trained() -> None:
    class Fixed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight, self.bias.abs())

    structure = assert_orders_hold(
        nn.Sequential(Fixed(5, 6), nn.Linear(6, 2)),
        VECTORS,
        pinned={"0": "its bias is not a parameter"},
        moves={"0.bias": 0},
    )
    assert structure.layer("0").bias is None and not structure.layer("0").solvable


def test_a_weight_that_is_a_buffer_is_no_layer() -> None:
    model = Net(lambda m, x: m.out(F.linear(m.first(x), m.mix)), first=nn.Linear(5, 6), out=nn.Linear(4, 2))
    model.register_buffer("mix", torch.randn(4, 6))
    structure = assert_orders_hold(model, VECTORS, free=["first"], moves={"mix": 0})
    assert [layer.name for layer in structure.layers] == ["first", "out"]


def test_tied_embedding_and_head() -> None:
    model = Net(
        lambda m, x: m.head(m.hidden(m.table(x))),
        table=nn.Embedding(9, 6),
        hidden=nn.Linear(6, 6),
        head=nn.Linear(6, 9),
    )
    model.head.weight = model.table.weight
    structure = assert_orders_hold(
        model,
        torch.randint(9, (3, 4)),
        pinned={"table": "its weight is also read by embedding"},
        moves={"hidden.weight": 0},
    )
    assert (structure.axes["hidden.weight"][0] == structure.axes["hidden.weight"][1]).all()


def test_units_that_are_read_before_they_are_computed() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        state = m.start.expand(len(x), 6)
        for _ in range(2):
            state = m.second((m.first(state) + m.inputs(x)).relu())
        return m.out(state)

    model = Net(
        do,
        start=torch.randn(6),
        first=nn.Linear(6, 7),
        inputs=nn.Linear(5, 7),
        second=nn.Linear(7, 6),
        out=nn.Linear(6, 2),
    )
    structure = assert_orders_hold(
        model, VECTORS, free=["first", "inputs", "second"], moves={"second.bias": 0, "start": 0}
    )
    assert structure.layers[0].name == "first"  # it reads the units of the layer that runs last
    assert (structure.space_of(structure.layers[0].columns) == structure.layer("second").spaces).all()


# --- writing in place ---------------------------------------------------------------------------------------------

IN_PLACE: dict[str, tuple[Callable[..., object], str]] = {  # what is printed of the layer, or a part of the reason
    "a fixed value everywhere": (lambda m, x, y: y[0].fill_(0.5), "yes"),
    "some rows from others": (lambda m, x, y: y[:1].copy_(y[1:2].relu()), "yes"),
    "masked": (lambda m, x, y: y.masked_fill_(y < 0.1, 0.5), "yes"),
    "a view with a parameter": (lambda m, x, y: y.view(1, 3, 6)[0, 1:].add_(m.shift), "yes"),
    "units of another layer": (lambda m, x, y: y.mul_(m.other(x)), "yes"),
    "one unit": (lambda m, x, y: y[:, 0].zero_(), "yes, 5 units, 1 fixed"),
    "some units": (lambda m, x, y: y[:, 1:4].fill_(0.5), "yes, 3 units, 3 units"),
    "some units from others": (lambda m, x, y: y[:, :3].copy_(y[:, 3:].relu()), "yes, 3 units of 2 rows"),
    "some units from the input": (lambda m, x, y: y[:, 1:4].copy_(x[:, :3]), "yes, 3 units, 3 fixed"),
    "with a fixed order": (lambda m, x, y: y.t().add_(torch.arange(6.0)[:, None]), "add_ with a fixed order"),
    "a view in another shape": (lambda m, x, y: y.view(3, 2, 3)[:, 0].relu_(), "yes, 3 units, 3 units"),
    "heads": (lambda m, x, y: y.view(3, 2, 3).mul_(torch.arange(3.0)), "yes, 2 units of 3 rows"),
    "an op that is not known": (lambda m, x, y: y[1:].index_fill_(1, torch.tensor([2]), 0.0), "not known"),
}


@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place(op: str) -> None:
    write, expected = IN_PLACE[op]

    def do(m: nn.Module, x: Tensor) -> Tensor:
        y = m.first(x) + 0
        write(m, x, y)
        return m.out(y.tanh())

    read = {"a view with a parameter": {"shift": torch.randn(6)}, "units of another layer": {"other": nn.Linear(5, 6)}}
    model = Net(do, first=nn.Linear(5, 6), out=nn.Linear(6, 3), **read.get(op, {}))
    if expected == "yes":
        assert_orders_hold(model, VECTORS, free=["first"])
    elif expected.startswith("yes, "):
        assert_orders_hold(model, VECTORS, partly={"first": expected.removeprefix("yes, ")}, orders=4)
    else:
        assert_orders_hold(model, VECTORS, pinned={"first": expected})


def test_in_place_transposes() -> None:
    model = Net(
        lambda m, x: m.out(m.first(x).t_().unsqueeze_(0).squeeze_().t()), first=nn.Linear(5, 6), out=nn.Linear(6, 2)
    )
    assert_orders_hold(model, VECTORS, free=["first"])


def test_a_buffer_that_the_network_writes_to() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
            return self.out(y - self.mean)

    assert_orders_hold(Averaged(), VECTORS, free=["first"], moves={"mean": 0})


def test_a_buffer_that_the_network_replaces() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
            return self.out(y - self.mean)

    assert_orders_hold(Averaged(), VECTORS, moves={"mean": 0})


def test_an_input_that_the_network_writes_to() -> None:
    model = Net(lambda m, x: m.out(x.copy_(m.first(x)).sin()), first=nn.Linear(5, 5), out=nn.Linear(5, 2))
    assert_orders_hold(model, VECTORS, pinned={"first": "copy_ with a fixed order"})


# --- shapes -------------------------------------------------------------------------------------------------------


def linear_after_flatten(do: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda m, x: m.out(do(m.conv(x))), conv=nn.Conv2d(2, 6, 5), out=nn.Linear(96, 3))


FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(-1, 96),
    "reshape": lambda x: x.relu().reshape(len(x), -1),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "there and back": lambda x: x.flatten(1).unflatten(1, (6, 4, 4)).view(-1, 6, 16).flatten(1),
    "squeeze and unsqueeze": lambda x: x.unsqueeze(0).squeeze(0)[:, None].squeeze().flatten(-3),
    "moved axes": lambda x: x.movedim(1, -1).transpose(1, -1).swapaxes(2, 3).mT.flatten(1),
    "swapped axes": lambda x: x.swapaxes(1, 3).flatten(1),
    "viewed like another": lambda x: x.flatten(1).view_as(torch.zeros(len(x), 96)).ravel().view(-1, 96),
}


@pytest.mark.parametrize("do", FLATTENED)
def test_flattened(do: str) -> None:
    structure = assert_orders_hold(linear_after_flatten(FLATTENED[do]), IMAGES, free=["conv"])
    assert structure.spaces[0].positions(structure.layer("out").columns).shape == (6, 16)


@pytest.mark.parametrize("do", ["flatten", "view", "channels last", "squeeze and unsqueeze"])
def test_flattened_in_a_batch_of_one(do: str) -> None:
    assert_orders_hold(linear_after_flatten(FLATTENED[do]), IMAGES[:1], free=["conv"])


@pytest.mark.parametrize("do", ["flatten", "channels last", "swapped axes"])
def test_flattened_in_a_batch_as_large_as_the_channels(do: str) -> None:
    assert_orders_hold(linear_after_flatten(FLATTENED[do]), torch.randn(6, 2, 8, 8), free=["conv"])


def test_everything_has_the_same_size() -> None:
    model = Net(
        lambda m, x: m.out((m.norm(m.a(x)) * m.scale + m.b(x).mean(3, keepdim=True)).mean(1)),
        a=conv(4, 4),
        b=conv(4, 4),
        norm=nn.BatchNorm2d(4),
        scale=torch.randn(4, 1, 4),
        out=nn.Linear(4, 4),
    )
    assert_orders_hold(model, torch.randn(4, 4, 4, 4), free=["a", "b"], moves={"scale": 0})


def test_mixing_over_places_and_over_channels() -> None:
    model = Net(
        lambda m, x: m.out(F.gelu(m.back(F.gelu(m.places(m.channels(x).mT)))).mT).mean(1),
        channels=nn.Linear(11, 6),
        places=nn.Linear(4, 5),
        back=nn.Linear(5, 4),
        out=nn.Linear(6, 3),
    )
    assert_orders_hold(model, SEQUENCES, free=["channels", "places", "back"])


HEADS: dict[str, Callable[..., Tensor]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(4) > torch.ones(3, 1, 1, 1)),
    "by hand": lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhls,bhsd->bhld", torch.einsum("bhld,bhsd->bhls", q, k).masked_fill(torch.eye(4) > 0, -9.0).softmax(-1), v
    ),
    "three axes": lambda q, k, v: (
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1).bmm(v.flatten(0, 1)).view(v.shape)
    ),
}


def heads(x: Tensor, count: int = 3) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_move_as_wholes(kind: str) -> None:
    model = Net(
        lambda m, x: m.out(m.proj(HEADS[kind](*(heads(f(x)) for f in (m.q, m.k, m.v))).transpose(1, 2).flatten(2))),
        q=nn.Linear(11, 6),
        k=nn.Linear(11, 6),
        v=nn.Linear(11, 15),
        proj=nn.Linear(15, 8),
        out=nn.Linear(8, 2),
    )
    structure = assert_orders_hold(
        model,
        SEQUENCES,
        free=["proj"],
        partly={"q": "3 units of 2 rows", "k": "3 units of 2 rows", "v": "3 units of 5 rows"},
        moves={"q.weight": 0, "k.bias": 0, "v.weight": 0, "proj.weight": 1},
        orders=4,
    )
    assert structure.spaces[0].positions(structure.layer("proj").columns)[1].tolist() == [5, 6, 7, 8, 9]
    assert structure.spaces[0].positions(structure.axes["k.weight"][0])[1].tolist() == [2, 3]


def fused_unbind(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(3, 4, 3, 2, 5).permute(2, 0, 3, 1, 4).unbind(0)  # timm


def fused_chunk(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads(part, 2) for part in x.chunk(3, -1))


def fused_per_head(x: Tensor) -> tuple[Tensor, ...]:
    return heads(x, 2).chunk(3, dim=-1)


def fused_select(x: Tensor) -> tuple[Tensor, ...]:
    whole = x.view(3, 4, 3, 2, 5).permute(2, 0, 3, 1, 4)  # torchvision's Swin
    return whole[0] * 5**-0.5, whole[1], whole[2]


@pytest.mark.parametrize("parts", [fused_unbind, fused_chunk, fused_per_head, fused_select])
def test_fused_projections(parts: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    model = Net(
        lambda m, x: m.out(HEADS["by hand"](*parts(m.qkv(x))).transpose(1, 2).reshape(3, 4, 10)),
        qkv=nn.Linear(11, 30),
        out=nn.Linear(10, 2),
    )
    structure = assert_orders_hold(
        model, SEQUENCES, partly={"qkv": "2 units of 15 rows"}, moves={"qkv.weight": 0, "out.weight": 1}, orders=4
    )
    assert [len(space.units) for space in structure.spaces] == [2]


def test_a_bias_for_each_head_moves_with_it() -> None:
    model = Net(
        lambda m, x: m.out(((q := heads(m.q(x))) @ q.mT + m.bias).softmax(-1).matmul(q).transpose(1, 2).flatten(2)),
        q=nn.Linear(11, 6),
        bias=torch.randn(1, 3, 4, 4),
        out=nn.Linear(6, 2),
    )
    assert_orders_hold(model, SEQUENCES, moves={"q.weight": 0, "bias": 1, "out.weight": 1}, orders=4)


def test_a_constant_for_each_head_pins_it() -> None:
    model = Net(
        lambda m, x: m.out(
            ((q := heads(m.q(x))) @ q.mT * torch.arange(3.0)[:, None, None]).matmul(q).transpose(1, 2).flatten(2)
        ),
        q=nn.Linear(11, 6),
        out=nn.Linear(6, 2),
    )
    structure = assert_orders_hold(model, SEQUENCES, pinned={"q": "mul with a fixed order"})
    assert structure.spaces == ()


def test_heads_that_share_keys_are_not_known() -> None:
    model = Net(
        lambda m, x: F.scaled_dot_product_attention(
            heads(m.q(x), 4), heads(m.k(x), 2), heads(m.k(x), 2), enable_gqa=True
        ),
        q=nn.Linear(11, 12),
        k=nn.Linear(11, 6),
    )
    assert_orders_hold(model, SEQUENCES, pinned={"q": "share keys", "k": "share keys"})


@pytest.mark.parametrize("weights", [False, True])
def test_attention_of_torch(weights: bool) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    model = Net(
        lambda m, x: m.out(m.attention(y := m.first(x), y, y, need_weights=weights)[0]),
        first=nn.Linear(11, 12),
        attention=attention,
        out=nn.Linear(12, 2),
    )
    assert_orders_hold(
        model,
        SEQUENCES,
        free=["first", "attention.out_proj"],
        partly={"attention.in_proj_weight": "3 units of 12 rows"},
        moves={"attention.in_proj_weight": 0, "attention.out_proj.weight": 1},
        orders=4,
    )


def test_a_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.Sequential(nn.Linear(11, 8), layer, nn.Linear(8, 3))
    structure = assert_orders_hold(
        model,
        SEQUENCES,
        free=["0", "1.self_attn.out_proj", "1.linear1", "1.linear2"],
        partly={"1.self_attn.in_proj_weight": "2 units of 12 rows"},
        moves={"0.weight": 0, "1.self_attn.in_proj_bias": 0, "1.self_attn.out_proj.weight": 1},
    )
    assert structure.layer("1.self_attn.in_proj_weight").bias == "1.self_attn.in_proj_bias"
    assert {layer.spaces for layer in structure.layers if layer.name in ("0", "1.self_attn.out_proj", "1.linear2")} == {
        structure.layer("0").spaces
    }


# --- inputs and outputs of any form -------------------------------------------------------------------------------


@dataclass
class Answer:
    score: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Answer)


class Labels(dict):  # type: ignore[type-arg]
    """A dict with attributes, as some libraries return it."""


pytree.register_pytree_node(
    Labels,
    lambda d: (list(d.values()), list(d)),
    lambda values, names: Labels(zip(names, values, strict=True)),
    serialized_type_name="tests.Labels",
)

OUTPUTS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda y, h: (y, h.sum(1)),
    "nested": lambda y, h: {"y": [y, (h.mean(),)], "none": None, "number": 3},
    "dataclass": lambda y, h: Answer(y),
    "registered class": lambda y, h: Labels(score=y, loss=h.sum()),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs(form: str) -> None:
    make = OUTPUTS[form]
    model = Net(lambda m, x: make(m.out(h := m.first(x).relu()), h), first=nn.Linear(5, 6), out=nn.Linear(6, 3))
    assert_orders_hold(model, VECTORS, free=["first"], pinned={"out": "an output of the network"})


def test_units_that_are_given_out_stay() -> None:
    model = Net(lambda m, x: Answer(m.out(h := m.first(x)), h.relu()), first=nn.Linear(5, 6), out=nn.Linear(6, 3))
    assert_orders_hold(model, VECTORS, pinned={"first": "an output of the network"})


def test_a_parameter_and_an_input_that_are_given_out() -> None:
    model = Net(
        lambda m, x: (m.out(m.first(x) * m.scale), m.scale, x),
        first=nn.Linear(5, 6),
        scale=torch.randn(6),
        out=nn.Linear(6, 3),
    )
    assert_orders_hold(model, VECTORS, pinned={"first": "an output of the network"})


def test_inputs_by_name_and_a_forward_of_ones_own() -> None:
    model = Net(
        lambda m, a, flag=True, b=None: m.out(m.first(a) + m.second(b)) if flag else None,
        first=nn.Linear(5, 6),
        second=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    )
    batch = {"b": torch.randn(3, 4), "a": VECTORS}
    structure = assert_orders_hold(model, batch, forward=lambda m, batch: m(**batch), moves={"second.weight": 0})
    assert [layer.reads_input for layer in structure.layers] == [True, True, False]


def test_what_counts_as_the_networks_input() -> None:
    model = Net(
        lambda m, x: m.c(m.b((x[:, :3] * 2).sin().flatten(1)) + m.a(x)),
        a=nn.Linear(5, 6),
        b=nn.Linear(3, 6),
        c=nn.Linear(6, 2),
    )
    assert [layer.reads_input for layer in assert_orders_hold(model, VECTORS).layers] == [True, True, False]


# --- what torch.export makes of Python ----------------------------------------------------------------------------


def test_layers_in_another_gradient_mode_are_not_known() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        y = m.first(x)
        with torch.enable_grad():
            y = m.second(y)
        return m.out(y)

    model = Net(do, first=nn.Linear(5, 6), second=nn.Linear(6, 7), out=nn.Linear(7, 3))
    structure = assert_orders_hold(model, VECTORS, pinned={"first": "is not known"})
    assert [layer.name for layer in structure.layers] == ["first", "out"]


def test_no_grad_changes_nothing() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.out(m.first(x))

    assert_orders_hold(Net(do, first=nn.Linear(5, 6), out=nn.Linear(6, 3)), VECTORS, free=["first"])


def test_numbers_that_depend_on_the_data() -> None:
    model = Net(lambda m, x: m.out(m.first(x) * x.sum().item()), first=nn.Linear(5, 6), out=nn.Linear(6, 3))
    assert_orders_hold(model, VECTORS, pinned={"first": "the data decide"})


def test_sizes_that_depend_on_the_data() -> None:
    model = Net(
        lambda m, x: m.out((y := m.first(x))[x[:, 0] > 0].relu().sum(0) + y), first=nn.Linear(5, 6), out=nn.Linear(6, 3)
    )
    assert_orders_hold(model, VECTORS, pinned={"first": "the data decide on sizes"})


def test_control_flow_that_depends_on_the_data(capfd: pytest.CaptureFixture[str]) -> None:
    class Hesitant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = 2 * x
            return self.out(x)

    with pytest.raises(
        GraphError, match=r"Hesitant .* float32\[3, 5\].*\"if x.sum\(\) > 0:\" .*test_analysis.py:\d+\)\. Data-dep"
    ):
        analyse(Hesitant(), VECTORS, call)


def test_inputs_of_the_wrong_shape() -> None:
    with pytest.raises(GraphError, match=r"Linear cannot be followed .* float32\[3, 11\].*inputs of the wrong shape"):
        analyse(nn.Linear(5, 3), SEQUENCES[:, 0], call)


def test_a_network_without_layers() -> None:
    structure = analyse(nn.Identity(), VECTORS, call)
    assert structure.layers == structure.spaces == ()


def test_the_network_is_left_alone() -> None:
    model = nn.Sequential(conv(2, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 3)).eval()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    analyse(model, IMAGES, call)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])


# --- random networks ----------------------------------------------------------------------------------------------


class Random(nn.Module):
    """A chain of random steps over images, among them branches that meet again in random ways."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.made = nn.ModuleList()
        self.steps: list[Callable[[Tensor], Tensor]] = []
        channels = 2
        for _ in range(self.rng.integers(3, 7)):
            kinds = ["layer", "layer", "plain", "norm", "branch", *["cut"] * (channels > 3)]
            step, channels = getattr(self, self.rng.choice(kinds))(channels)
            self.steps.append(step)
        self.out = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.out(x.mean((2, 3)))

    def keep(self, module: nn.Module) -> nn.Module:
        self.made.append(module)
        return module

    def layer(self, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
        if self.rng.random() < 0.25:
            multiplier = int(self.rng.integers(1, 3))
            return self.keep(conv(channels, channels * multiplier, groups=channels)), channels * multiplier
        units = int(self.rng.integers(2, 5)) * 2
        return self.keep(conv(channels, units, int(self.rng.choice([1, 3])), bias=bool(self.rng.random() < 0.7))), units

    def plain(self, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
        ops: list[Callable[[Tensor], Tensor]] = [
            torch.relu,
            F.hardswish,
            lambda x: x.tanh_() + 0.1,
            lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
            lambda x: x.softmax(1) + x,
            lambda x: F.max_pool2d(x, 3, 1, 1),
            lambda x: x.flatten(1).unflatten(1, x.shape[1:]),
            lambda x: x.permute(2, 3, 0, 1).movedim((0, 1), (2, 3)),
            lambda x: x + x.cumsum(int(channels % 3 > 0)),
        ]
        return ops[self.rng.integers(len(ops))], channels

    def norm(self, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
        norms = [
            nn.BatchNorm2d(channels),
            nn.GroupNorm(1, channels),
            nn.PReLU(channels),
            nn.LayerNorm([channels, 4, 4]),
        ]
        return self.keep(norms[self.rng.integers(4)]), channels

    def branch(self, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
        one, units = self.layer(channels)
        kind = self.rng.integers(4)
        if kind == 0:
            return lambda x: torch.cat([x, one(x)], 1), channels + units
        if kind == 1:
            other = self.keep(conv(channels, units))
            return lambda x: one(x) + other(x).relu(), units
        if kind == 2:
            back = self.keep(conv(units, channels))
            return lambda x: x + back(one(x).relu()), channels
        other = self.keep(conv(channels, units, 1))
        return lambda x: one(x) * other(x).sigmoid().mean((2, 3), keepdim=True), units

    def cut(self, channels: int) -> tuple[Callable[[Tensor], Tensor], int]:
        half = channels // 2
        cuts: list[Callable[[Tensor], Tensor]] = [
            lambda x: x[:, :half] * x[:, -half:],
            lambda x: torch.cat([x[:, half:], x[:, :half].relu()], 1)[:, :half],
            lambda x: x.view(len(x), half, -1, 4, 4)[:, :, 0],
            lambda x: torch.stack(x[:, : 2 * half].chunk(2, 1), 2).amax(2),
        ]
        return cuts[self.rng.integers(4) if channels % 2 == 0 else 0], half


@pytest.mark.parametrize("seeds", [range(0, 8), range(8, 16), range(16, 24)])
def test_random_networks(seeds: range) -> None:
    structures = [assert_orders_hold(Random(seed), torch.randn(2, 2, 4, 4), orders=3) for seed in seeds]
    # They are not all pinned; what may be read by a part that is never called is.
    assert sum(len(structure.spaces) for structure in structures) >= 5
    assert sum(bool(layer.spaces) for structure in structures for layer in structure.layers) >= 5
