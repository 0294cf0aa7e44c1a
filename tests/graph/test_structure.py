"""Spaces, re-ordering, and the printed table."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from graph.orders import Net, call
from torch import Tensor, nn

from taskzip.graph import Layer, Structure, analyse
from taskzip.graph.structure import Scales, Space


def linear(name: str, **options: object) -> Layer:
    given = {"kind": "linear", "units": 4, "inputs": 6, "kernel": (), "calls": 1, "spaces": (), "columns": None}
    given |= {"rows": np.empty(0, np.int64), "reads_input": False, "pinned": "", "bias": None} | options
    return Layer(name=name, weight=f"{name}.weight", **given)  # type: ignore[arg-type]


def test_positions_of_units() -> None:
    space = Space(np.array([7, 3]))
    assert space.positions(np.array([3, 7, 3, 9, 7])).tolist() == [[1, 4], [0, 2]]
    assert space.positions(np.array([1, 9])).shape == (2, 0)
    assert space.positions(np.empty(0, np.int64)).shape == (2, 0)


@pytest.mark.parametrize("wholes", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0, 1, 1, 0, 0, 1]])
def test_the_nearest_order_in_which_wholes_keep_together(wholes: list[int]) -> None:
    space, rng = Space(np.arange(6), np.array(wholes)), np.random.default_rng(0)
    for _ in range(20):
        wanted = rng.permutation(6)
        order = space.allowed(wanted)
        assert sorted(order) == list(range(6))
        pairs = {(wholes[place], wholes[unit]) for place, unit in enumerate(order)}
        assert len(pairs) == len(set(wholes))  # each whole stands where one whole stood
        assert space.allowed(order).tolist() == order.tolist()
        assert wholes[order[0]] == wholes[wanted[0]] and order[0] == wanted[0]


def test_any_order_is_allowed_where_units_are_free() -> None:
    assert Space(np.arange(3)).allowed([2, 0, 1]).tolist() == [2, 0, 1]


def test_the_space_of_each_column() -> None:
    structure = Structure((), (Space(np.array([7, 3])), Space(np.array([4, 5]))), {}, Scales((), {}, ()))
    assert structure.space_of(np.array([3, 5, 9, 7, 4])).tolist() == [0, 1, -1, 0, 1]


def test_order_says_which_unit_comes_to_which_place() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    first, second = model[0].weight.clone(), model[1].weight.clone()
    structure = analyse(model, torch.randn(2, 2), call)
    structure.reorder(model, 0, [2, 0, 1])
    assert torch.equal(model[0].weight, first[[2, 0, 1]])
    assert torch.equal(model[1].weight, second[:, [2, 0, 1]])


def test_columns_behind_a_flatten_move_in_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2))
    weight = model[2].weight.clone()
    structure = analyse(model, torch.randn(2, 1, 3, 3), call)
    structure.reorder(model, 0, np.array([1, 2, 0]))
    assert torch.equal(model[2].weight, weight[:, [*range(4, 12), *range(4)]])


def test_parameters_stay_the_same_objects() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    model[0].weight.requires_grad_(False)
    optimiser = torch.optim.SGD(model[2].parameters())
    before = {name: (id(t), t.requires_grad, t.dtype) for name, t in model.state_dict(keep_vars=True).items()}
    analyse(model, torch.randn(2, 2), call).reorder(model, 0, [2, 0, 1])
    assert before == {name: (id(t), t.requires_grad, t.dtype) for name, t in model.state_dict(keep_vars=True).items()}
    assert optimiser.param_groups[0]["params"][0] is model[2].weight


def test_two_orders_one_after_the_other() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    before = model[0].weight.clone()
    structure = analyse(model, torch.randn(2, 2), call)
    structure.reorder(model, 0, [3, 1, 0, 2])
    structure.reorder(model, 0, np.argsort([3, 1, 0, 2]))
    assert torch.equal(model[0].weight, before)


def test_a_layer_by_name() -> None:
    structure = Structure((linear("a"), linear("b")), (), {}, Scales((), {}, ()))
    assert structure.layer("b") is structure.layers[1]
    with pytest.raises(StopIteration):
        structure.layer("c")


@pytest.mark.parametrize(
    ("rows", "spaces", "said"),
    [
        ([10, 11, 12], (0,), "yes"),
        ([10, 11, 12, 10, 11, 12], (0,), "yes, 3 units of 2 rows"),
        ([99, 10, 11, 12, 98], (0,), "yes, 3 units, 2 fixed"),
        ([10, 20, 11, 21, 12], (0, 1), "yes, 3 units, 2 units"),
        ([20, 21, 10, 11, 12, 20, 21], (1, 0), "yes, 2 units of 2 rows, 3 units"),
        ([20, 10, 10, 11, 99, 11, 12, 12, 21], (1, 0), "yes, 2 units, 3 units of 2 rows, 1 fixed"),
    ],
)
def test_how_a_layer_can_be_shared(rows: list[int], spaces: tuple[int, ...], said: str) -> None:
    layer = linear("a", rows=np.array(rows), units=len(rows), spaces=spaces)
    structure = Structure((layer,), (Space(np.array([10, 11, 12])), Space(np.array([20, 21]))), {}, Scales((), {}, ()))
    assert structure.sharing(layer) == said
    assert structure.sharing(linear("b", pinned="a single unit")) == "a single unit"


def test_the_rows_of_each_unit() -> None:
    """In the order in which the units lie in their space at present, the rows of each ascending."""
    layer = linear("a", rows=np.array([21, 11, 20, 10, 11, 10, 99]), units=7, spaces=(1, 0))
    structure = Structure((layer,), (Space(np.array([10, 11])), Space(np.array([20, 21]))), {}, Scales((), {}, ()))
    parts = structure.parts(layer)
    assert list(parts) == [1, 0]
    assert parts[0].tolist() == [[3, 5], [1, 4]]
    assert parts[1].tolist() == [[2], [0]]


def test_taps() -> None:
    assert linear("a").taps == 1
    assert linear("a", kernel=(3, 5)).taps == 15


# --- printing -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.head = nn.Conv2d(8, 12, 1), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.branch(x)
        return self.head(torch.cat([x, self.wide(x).relu()], 1).mean((2, 3)))


def test_the_table_of_a_network() -> None:
    assert str(analyse(Residual(), torch.randn(2, 3, 6, 6), call)) == "\n".join(
        [
            "layer   kind        units  reads               space  shareable",
            "stem    conv2d 3x3      8  3 inputs            s0     yes",
            "branch  conv2d 3x3      8  8 of s0             s0     yes",
            "wide    conv2d 1x1     12  8 of s0             s1     yes",
            "head    linear          5  8 of s0 + 12 of s1  -      an output of the network",
        ]
    )


def test_long_names_and_reasons_are_folded() -> None:
    layers = [
        linear("encoder.layers.11.self_attention.output.dense_projection", pinned="a reason that takes " * 8 + "space"),
        linear("x", columns=np.arange(60), spaces=(2,), rows=np.array([6, 7]), units=2),
    ]
    spaces = tuple(Space(np.array([3 * i, 3 * i + 1])) for i in range(20))
    printed = str(Structure(tuple(layers), spaces, {}, Scales((), {}, ())))
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() and line for line in lines)
    assert [line[:28].strip() for line in lines[1:4]] == [
        "encoder.layers.11.self_",
        "attention.output.dense_",
        "projection",
    ]
    words = printed.split()
    assert words.count("reason") == 8 and words.count("2") == 21 and "s19" in printed


def test_a_network_without_layers_prints_the_head() -> None:
    assert str(Structure((), (), {}, Scales((), {}, ()))) == "layer  kind  units  reads  space  shareable"


# --- speed --------------------------------------------------------------------------------------------------------


def test_wide_layers_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 512, 3, padding=1),
            nn.Flatten(),
            nn.Linear(512 * 49, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.Linear(4096, 9),
        )
    start = time.perf_counter()
    structure = analyse(model, torch.empty(2, 3, 7, 7, device="meta"), call)
    for space in structure.spaces:
        for axes in structure.axes.values():
            for ids in axes:
                if ids is not None:
                    space.positions(ids)
    assert time.perf_counter() - start < 3
    assert [layer.spaces for layer in structure.layers] == [(0,), (1,), (2,), ()]
    assert structure.spaces[0].positions(structure.axes["2.weight"][1]).shape == (512, 49)


def test_a_net_of_tests_is_read_like_any_other() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale), a=nn.Linear(5, 6), b=nn.Linear(6, 2), scale=torch.randn(6))
    assert set(analyse(model, torch.randn(3, 5), call).axes) == {"a.weight", "a.bias", "b.weight", "b.bias", "scale"}
