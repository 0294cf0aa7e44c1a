"""One test per kind of op: the units on both sides of it stay free, or are pinned for the right reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net, assert_orders_hold, movable
from torch import Tensor, nn

from taskzip.graph import Structure

VECTORS = torch.randn(3, 5)
SEQUENCES = torch.randn(3, 4, 11)
IMAGES = torch.randn(3, 2, 8, 8)
VOLUMES = torch.randn(2, 2, 5, 5, 5)


def between_linear(middle: Callable[..., Tensor], units: int = 6, read: int = 6, **members: nn.Module | Tensor) -> Net:
    """linear -> middle -> linear."""
    return Net(
        lambda m, x: m.after(middle(m, m.before(x))), before=nn.Linear(5, units), after=nn.Linear(read, 4), **members
    )


def between_conv(middle: Callable[..., Tensor], units: int = 6, read: int = 6, **members: nn.Module | Tensor) -> Net:
    """convolution -> middle -> convolution -> mean over the image."""
    return Net(
        lambda m, x: m.after(middle(m, m.before(x))).mean((2, 3)),
        before=nn.Conv2d(2, units, 3),
        after=nn.Conv2d(read, 4, 1),
        **members,
    )


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    layers = (nn.Linear(5, 7, bias), nn.ReLU(), nn.Linear(7, 6, bias), nn.ReLU(), nn.Linear(6, 4, bias))
    structure = assert_orders_hold(
        nn.Sequential(*layers), VECTORS, free=["0", "2"], pinned={"4": "an output of the network"}
    )
    assert [layer.bias for layer in structure.layers] == [f"{n}.bias" if bias else None for n in (0, 2, 4)]
    assert [layer.reads_input for layer in structure.layers] == [True, False, False]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), nn.Conv1d(6, 5, 3, stride=2, padding=1), SEQUENCES),
    "2d": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), IMAGES),
    "3d": (nn.Conv3d(2, 6, 3), nn.Conv3d(6, 5, 2, dilation=2), VOLUMES),
    "stride and padding": (nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 3, padding=(2, 1)), IMAGES),
    "same": (nn.Conv2d(2, 6, 5, padding="same"), nn.Conv2d(6, 5, 3, padding="same", dilation=2), IMAGES),
    "circular": (nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), IMAGES),
    "reflect": (nn.Conv1d(4, 6, 3), nn.Conv1d(6, 5, 3, padding=1, padding_mode="reflect"), SEQUENCES),
    "no bias": (nn.Conv2d(2, 6, 3, bias=False), nn.Conv2d(6, 5, 3, bias=False), IMAGES),
    "no batch": (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), IMAGES[0]),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: str) -> None:
    first, second, inputs = CONVOLUTIONS[kind]
    structure = assert_orders_hold(nn.Sequential(first, nn.ReLU(), second), inputs, free=["0"], pinned={"2": "output"})
    assert structure.layer("0").kind == f"conv{first.weight.dim() - 2}d"
    assert structure.layer("0").kernel == first.kernel_size


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    model = Net(
        lambda m, x: m.out(m.up(m.conv(x)).relu()),
        conv=nn.Conv2d(2, 6, 3),
        up=nn.ConvTranspose2d(6, 8, 2, stride=2, groups=groups),
        out=nn.Conv2d(8, 3, 1),
    )
    if groups == 1:
        structure = assert_orders_hold(model, IMAGES, free=["conv"], moves={"up.weight": 1, "out.weight": 1})
        assert [layer.name for layer in structure.layers] == ["conv", "out"]  # it is none of the layers to share
    else:
        moves = {"conv.weight": 0, "up.weight": 0, "up.bias": 0, "out.weight": 1}
        assert_orders_hold(model, IMAGES, partly={"conv": "2 units of 3 rows"}, moves=moves)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_rows_follow_the_units_that_they_read(multiplier: int) -> None:
    depthwise = nn.Conv2d(6, 6 * multiplier, 3, groups=6)
    model = between_conv(lambda m, x: m.dw(x).relu(), read=6 * multiplier, dw=depthwise)
    structure = assert_orders_hold(
        model,
        IMAGES,
        free=["before"],
        pinned={"dw": "a grouped convolution"},
        moves={"dw.weight": 0, "after.weight": 1},
    )
    assert not structure.layer("dw").solvable
    assert structure.spaces[0].positions(structure.axes["after.weight"][1]).shape == (6, multiplier)


def test_depthwise_with_a_multiplier_in_a_residual_moves_units_in_blocks() -> None:
    model = Net(
        lambda m, x: m.out((m.dw(m.conv(x)) + m.side(x)).relu()),
        conv=nn.Conv2d(2, 3, 1),
        dw=nn.Conv2d(3, 6, 1, groups=3),
        side=nn.Conv2d(2, 6, 1),
        out=nn.Conv2d(6, 2, 1),
    )
    assert_orders_hold(
        model,
        IMAGES,
        free=["conv"],
        pinned={"dw": "a grouped convolution"},
        partly={"side": "3 units of 2 rows"},
        moves={"conv.weight": 0, "side.weight": 0},
    )


def test_groups_of_a_convolution_move_as_wholes() -> None:
    model = between_conv(lambda m, x: m.grouped(x.relu()), units=9, read=12, grouped=nn.Conv2d(9, 12, 3, groups=3))
    structure = assert_orders_hold(
        model,
        IMAGES,
        pinned={"grouped": "grouped"},
        partly={"before": "3 units of 3 rows"},
        moves={"before.weight": 0, "grouped.weight": 0, "after.weight": 1},
        orders=4,
    )
    assert structure.spaces[0].positions(structure.axes["before.weight"][0]).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]
    assert structure.spaces[0].positions(structure.axes["grouped.bias"][0])[1].tolist() == [4, 5, 6, 7]
    assert not movable(structure, "grouped.weight", 1).any()


def test_groups_over_a_fixed_order() -> None:
    model = Net(lambda m, x: m.out(m.grouped(x)), grouped=nn.Conv1d(4, 6, 3, groups=2), out=nn.Conv1d(6, 2, 1))
    structure = assert_orders_hold(model, SEQUENCES, pinned={"grouped": "grouped"})
    assert structure.spaces == ()


def test_groups_within_groups() -> None:
    model = Net(  # groups of four rows, which fall into groups of two
        lambda m, x: m.out(m.fine(m.coarse(m.first(x)).relu())),
        first=nn.Conv2d(2, 8, 1),
        coarse=nn.Conv2d(8, 8, 1, groups=2),
        fine=nn.Conv2d(8, 12, 1, groups=4),
        out=nn.Conv2d(12, 2, 1),
    )
    structure = assert_orders_hold(model, IMAGES, moves={"first.weight": 0, "fine.weight": 0}, orders=4)
    assert [len(space.units) for space in structure.spaces] == [2]


def test_groups_that_overlap() -> None:
    model = Net(  # groups of two and of three rows: only all six together
        lambda m, x: m.out(m.b(m.a(m.first(x)).relu())),
        first=nn.Conv2d(2, 12, 1),
        a=nn.Conv2d(12, 12, 1, groups=6),
        b=nn.Conv2d(12, 12, 1, groups=4),
        out=nn.Conv2d(12, 2, 1),
    )
    structure = assert_orders_hold(model, IMAGES, moves={"first.weight": 0}, orders=4)
    assert [len(space.units) for space in structure.spaces] == [2]


def test_a_convolution_of_one_input_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    assert_orders_hold(model, IMAGES[:, :1], free=["0"])


def test_a_convolution_of_one_unit() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 1, 3), nn.Conv2d(1, 5, 1), nn.Conv2d(5, 2, 1))
    assert_orders_hold(model, IMAGES, free=["0", "2"], pinned={"1": "a single unit"})


def test_functional_layers_are_found_by_their_weight() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 5))
            self.kernel = nn.Parameter(torch.randn(4, 6))
            self.shift = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w, self.shift).relu(), weight=self.kernel)

    structure = assert_orders_hold(Functional(), VECTORS, free=["w"])
    assert structure.layer("w").bias == "shift"
    assert structure.layer("kernel").bias is None


def test_a_subclass_of_conv2d() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(2 * input).relu()

    assert_orders_hold(nn.Sequential(Scaled(2, 6, 3), Scaled(6, 3, 3)), IMAGES, free=["0"])


def test_a_computed_weight_is_no_layer() -> None:
    model = between_linear(
        lambda m, x: F.linear(x, m.w.tanh(), m.b).relu(), read=7, w=torch.randn(7, 6), b=torch.randn(7)
    )
    structure = assert_orders_hold(model, VECTORS, free=["before"], moves={"w": 0, "b": 0, "after.weight": 1})
    assert [layer.name for layer in structure.layers] == ["before", "after"]


def test_a_weight_without_an_axis_of_units_is_not_known() -> None:
    model = Net(lambda m, x: F.linear(m.before(x), m.w), before=nn.Linear(5, 6), w=torch.randn(6))
    assert_orders_hold(model, VECTORS, pinned={"before": "without an axis of units"})


def test_embedding() -> None:
    model = Net(
        lambda m, x: m.out(m.hidden(m.table(x))), table=nn.Embedding(9, 6), hidden=nn.Linear(6, 5), out=nn.Linear(5, 2)
    )
    structure = assert_orders_hold(model, torch.randint(9, (3, 4)), free=["hidden"], moves={"table.weight": 1})
    assert not structure.layer("hidden").reads_input  # it reads units, which can move


def test_an_embedding_of_numbers_that_units_give() -> None:
    model = Net(
        lambda m, x: m.out(m.table((m.before(x) > 0).long())),
        before=nn.Linear(5, 6),
        table=nn.Embedding(2, 4),
        out=nn.Linear(4, 2),
    )
    assert_orders_hold(model, VECTORS, pinned={"before": "an output"})


def test_a_product_with_a_parameter_is_read_like_a_layer() -> None:
    model = between_linear(lambda m, x: x @ m.w, read=7, w=torch.randn(6, 7))
    assert_orders_hold(model, VECTORS, free=["before"], moves={"w": 0, "after.weight": 1})


@pytest.mark.parametrize(
    "product",
    [
        lambda m, x: (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x),
        lambda m, x: torch.bmm(torch.bmm(m.q(x), m.k(x).transpose(1, 2)), m.v(x)),
        lambda m, x: m.v(x) @ torch.mm(m.v(x)[0].t(), m.v(x)[0]),
        lambda m, x: m.v(x) @ m.w,
        lambda m, x: m.v(x)[:, None] * (m.w @ m.v(x).mT)[..., None, None],
    ],
)
def test_products_of_activations(product: Callable[..., Tensor]) -> None:
    model = Net(
        lambda m, x: product(m, x).sin().sum(-1),
        q=nn.Linear(11, 6),
        k=nn.Linear(11, 6),
        v=nn.Linear(11, 5),
        w=torch.randn(5),
    )
    assert_orders_hold(model, SEQUENCES)


def test_attention_of_one_head_leaves_the_units_of_queries_and_keys_alike() -> None:
    model = Net(
        lambda m, x: m.out((m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x)),
        q=nn.Linear(11, 6),
        k=nn.Linear(11, 6),
        v=nn.Linear(11, 5),
        out=nn.Linear(5, 3),
    )
    assert_orders_hold(model, SEQUENCES, free=["q", "k", "v"], moves={"q.weight": 0, "k.bias": 0})


# --- element by element -------------------------------------------------------------------------------------------

POINTWISE: dict[str, Callable[..., Tensor]] = {
    "relu": lambda m, x: x.relu(),
    "in-place relu": lambda m, x: F.relu(x, inplace=True),
    "gelu": lambda m, x: F.gelu(x),
    "hardswish": lambda m, x: F.hardswish(x, inplace=True),
    "sigmoid": lambda m, x: x.sigmoid(),
    "silu": lambda m, x: F.silu(x),
    "softplus": lambda m, x: F.softplus(x),
    "leaky relu": lambda m, x: F.leaky_relu(x, 0.3),
    "log sigmoid": lambda m, x: F.logsigmoid(x),
    "rrelu": lambda m, x: F.rrelu(x),
    "elu, selu, celu": lambda m, x: F.elu(F.selu(F.celu(x))),
    "mish, hardsigmoid": lambda m, x: F.mish(F.hardsigmoid(x)),
    "relu6, softsign": lambda m, x: F.softsign(F.relu6(x)),
    "clamp": lambda m, x: x.clamp(-1, 0.5),
    "clamp_": lambda m, x: x.clamp_(min=0.1),
    "scalars": lambda m, x: (2 * x - 1) / 3,
    "itself": lambda m, x: x * x.sigmoid() + x,
    "where": lambda m, x: torch.where(x > 0, x, 0.1),
    "where of two": lambda m, x: torch.where(x > 0, x.tanh(), torch.zeros_like(x)),
    "masked_fill": lambda m, x: x.masked_fill(x < 0.2, 0.0),
    "maximum": lambda m, x: torch.max(x, -x),
    "dropout": lambda m, x: F.dropout(x, 0.5, m.training),
    "alpha dropout": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "other types": lambda m, x: x.float().to(torch.float64).type_as(x),
    "copies": lambda m, x: x.clone().contiguous().detach(),
    "other names": lambda m, x: torch.divide(torch.multiply(x, x), 3),
    "tensors of one element": lambda m, x: (
        torch.where(x > 0, 0.2, x).masked_fill_(x < 0.1, 0.3).add_(torch.tensor(2.0))
    ),
    "in-place without a tag": lambda m, x: F.threshold(x, 0.1, 0.2, inplace=True),
    "full_like": lambda m, x: x + torch.full_like(x, 2.0),
}


@pytest.mark.parametrize("op", POINTWISE)
def test_pointwise(op: str) -> None:
    assert_orders_hold(between_linear(POINTWISE[op]), VECTORS, free=["before"])


@pytest.mark.parametrize("op", ["in-place relu", "hardswish", "where of two", "alpha dropout"])
def test_pointwise_over_channels(op: str) -> None:
    assert_orders_hold(between_conv(POINTWISE[op]), IMAGES, free=["before"])


def test_feature_dropout() -> None:
    assert_orders_hold(between_conv(lambda m, x: m.drop(x), drop=nn.Dropout2d()), IMAGES, free=["before"])


def test_prelu_with_a_slope_per_channel() -> None:
    wide = nn.Conv2d(
        2, 6, 3
    )  # as many channels as columns of the image: the slopes lie along the channels all the same
    model = nn.Sequential(wide, nn.PReLU(6), nn.Conv2d(6, 3, 1))
    assert_orders_hold(model, IMAGES, free=["0"], moves={"1.weight": 0})


def test_prelu_with_one_slope() -> None:
    assert_orders_hold(nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 2)), VECTORS, free=["0"])


class Constant(nn.Module):
    """Adds a constant per channel, which is kept in one of the ways that there are."""

    def __init__(self, kept: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        value = torch.randn(shape)
        if kept == "parameter":
            self.value = nn.Parameter(value)
        elif kept == "attribute":
            self.value = value.double()
        else:
            self.register_buffer("value", value, persistent=kept == "persistent buffer")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


@pytest.mark.parametrize("kept", ["parameter", "persistent buffer"])
def test_constants_that_a_checkpoint_keeps_follow_the_units(kept: str) -> None:
    model = between_conv(lambda m, x: m.add(x), add=Constant(kept, (6, 1, 1)))
    assert_orders_hold(model, IMAGES, free=["before"], moves={"add.value": 0})


@pytest.mark.parametrize("kept", ["non-persistent buffer", "attribute"])
def test_other_constants_pin(kept: str) -> None:
    model = between_conv(lambda m, x: m.add(x), add=Constant(kept, (6, 1, 1)))
    assert_orders_hold(model, IMAGES, pinned={"before": "add with a fixed order"})


def test_a_constant_for_all_units_pins_nothing() -> None:
    model = between_conv(lambda m, x: m.add(x) + torch.ones(6, 6), add=Constant("attribute", (1, 6, 6)))
    assert_orders_hold(model, IMAGES, free=["before"])


def test_a_parameter_over_a_fixed_order_stays() -> None:
    model = Net(lambda m, x: m.out(x * m.scale), scale=torch.randn(5), out=nn.Linear(5, 3))
    structure = assert_orders_hold(model, VECTORS)
    assert structure.spaces == ()
    assert structure.layer("out").reads_input


# --- norms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conv", "norm", "inputs"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), SEQUENCES),
        (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), IMAGES),
        (nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), VOLUMES),
        (nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), VECTORS),
    ],
)
def test_batch_norm(conv: nn.Module, norm: nn.Module, inputs: Tensor) -> None:
    after = type(conv)(6, 3, 1) if inputs.dim() > 2 else nn.Linear(6, 3)
    model = nn.Sequential(conv, norm, nn.ReLU(), after)
    structure = assert_orders_hold(model, inputs, free=["0"], moves={"1.running_mean": 0, "1.running_var": 0})
    batch_norm = structure.layer("0").batch_norm
    assert batch_norm is not None
    assert (batch_norm.mean, batch_norm.variance, batch_norm.eps) == ("1.running_mean", "1.running_var", 1e-5)


def test_batch_norm_behind_a_flatten() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.BatchNorm1d(6 * 36), nn.Linear(6 * 36, 3))
    structure = assert_orders_hold(model, IMAGES, free=["0"], moves={"2.weight": 0, "3.weight": 1})
    assert structure.layer("0").batch_norm is None  # its statistics are not per unit


def test_batch_norm_that_is_not_over_the_units() -> None:
    model = nn.Sequential(nn.Linear(11, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    structure = assert_orders_hold(model, SEQUENCES, free=["0"])  # axis 1 are the four steps of the sequence
    assert structure.layer("0").batch_norm is None


def test_batch_norm_without_statistics_of_its_own() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    structure = assert_orders_hold(nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.Conv2d(6, 3, 1)), IMAGES, free=["0"])
    assert structure.layer("0").batch_norm is None


@pytest.mark.parametrize(
    "do",
    [
        lambda m, x: m.out(m.norm(m.a(x)) + m.norm(m.b(x))),
        lambda m, x: m.out(m.norm(y := m.a(x)) + y + m.b(x)),
        lambda m, x: m.out(m.norm(m.a(x)) + m.norm.running_mean[:, None, None] + m.b(x)),
    ],
)
def test_batch_norm_that_serves_more_than_one_layer(do: Callable[..., Tensor]) -> None:
    model = Net(do, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 6, 3), norm=nn.BatchNorm2d(6), out=nn.Conv2d(6, 2, 1))
    structure = assert_orders_hold(model, IMAGES, moves={"norm.running_mean": 0})
    assert structure.layer("a").batch_norm is None
    assert structure.layer("b").batch_norm is None


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6)])
def test_layer_norm_over_the_units(norm: nn.Module) -> None:
    assert_orders_hold(nn.Sequential(nn.Linear(11, 6), norm, nn.Linear(6, 3)), SEQUENCES, free=["0"])


def test_layer_norm_over_channels_and_places() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.LayerNorm([6, 6, 6]), nn.Conv2d(6, 3, 1))
    structure = assert_orders_hold(model, IMAGES, free=["0"], moves={"1.weight": 0})
    assert structure.axes["1.weight"][1] is not None
    assert (structure.space_of(structure.axes["1.weight"][1]) < 0).all()


@pytest.mark.parametrize("groups", [1, 6])
def test_group_norm_of_one_group_or_one_channel_each(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(groups, 6), nn.Conv2d(6, 3, 1))
    assert_orders_hold(model, IMAGES, free=["0"], moves={"1.weight": 0})


def groups_of(structure: Structure, layer: str) -> list[list[int]]:
    """Per space of a layer, the whole of each of its units."""
    wholes = [structure.spaces[space].wholes for space in structure.layer(layer).spaces]
    return [[] if each is None else each.tolist() for each in wholes]


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_of_a_group_norm_move_as_wholes_and_units_inside(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(groups, 6), nn.Conv2d(6, 3, 1))
    how = {"0": f"in {groups} groups that keep together"}
    structure = assert_orders_hold(model, IMAGES, partly=how, moves={"0.weight": 0}, orders=5)
    assert groups_of(structure, "0") == [np.arange(groups).repeat(6 // groups).tolist()]


def test_groups_within_groups_of_norms_stay_in_the_larger_ones() -> None:
    norms = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8), nn.GroupNorm(4, 8), nn.GroupNorm(1, 8), nn.GroupNorm(8, 8)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), *norms, nn.Conv2d(8, 3, 1))
    structure = assert_orders_hold(model, IMAGES, moves={"0.weight": 0}, orders=5)
    assert groups_of(structure, "0") == [[0, 0, 1, 1]] * 2


def test_groups_of_norms_that_overlap_stay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.GroupNorm(2, 12), nn.GroupNorm(3, 12), nn.Conv2d(12, 3, 1))
    structure = assert_orders_hold(model, IMAGES, orders=5)
    assert [len(space.units) for space in structure.spaces if space.wholes is None] == [4, 2, 2, 4]


def test_a_group_norm_over_layers_end_to_end() -> None:
    """Groups of one layer change places with each other, not with those of the other; a mixed one stays."""
    model = Net(
        lambda m, x: m.out(m.norm(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Conv2d(2, 5, 3),
        b=nn.Conv2d(2, 7, 3),
        norm=nn.GroupNorm(6, 12),
        out=nn.Conv2d(12, 3, 1),
    )
    how = {"a": "4 units, in 2 groups that keep together, 1 fixed"}
    structure = assert_orders_hold(model, IMAGES, orders=5, partly=how)
    assert groups_of(structure, "b") == [[0, 0, 1, 1, 2, 2]]


def test_a_group_norm_over_a_shuffle_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ChannelShuffle(2), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 1))
    structure = assert_orders_hold(model, IMAGES, orders=5)
    assert groups_of(structure, "0") == [[0, 1, 2, 3] * 2]


def test_a_group_norm_over_units_that_lie_flat() -> None:
    """Each channel is many elements: in one group, or in several, which then keep their order."""
    inside = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.GroupNorm(3, 54), nn.Linear(54, 2))
    assert groups_of(assert_orders_hold(inside, IMAGES[..., :5, :5], orders=5), "0") == [[0, 0, 1, 1, 2, 2]]
    across = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.GroupNorm(4, 24), nn.Linear(24, 2))
    assert_orders_hold(across, IMAGES[..., :4, :4])


def test_a_group_norm_partly_over_units_that_stay() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(m.conv(x))
        return torch.cat([m.out(x), x[:, :3].cumsum(1)], 1)

    layers = {"conv": nn.Conv2d(2, 8, 3), "norm": nn.GroupNorm(4, 8), "out": nn.Conv2d(8, 3, 1)}
    structure = assert_orders_hold(Net(do, **layers), IMAGES, orders=5)
    assert groups_of(structure, "conv") == [[0, 0, 1, 1]]


def test_instance_norm() -> None:
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    assert_orders_hold(nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.Conv2d(6, 3, 1)), IMAGES, free=["0"])


def test_response_norm_over_neighbouring_channels_pins() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.LocalResponseNorm(3), nn.Conv2d(6, 3, 1))
    assert_orders_hold(model, IMAGES, pinned={"0": "slides along it"})


# --- pooling, reductions, padding, resizing -----------------------------------------------------------------------


SPATIAL: dict[str, Callable[..., Tensor]] = {
    "max pool": lambda m, x: F.max_pool2d(x, 2),
    "max pool with indices": lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
    "average pool": lambda m, x: F.avg_pool2d(x, 3, stride=1),
    "adaptive average pool": lambda m, x: F.adaptive_avg_pool2d(x, 2),
    "adaptive max pool": lambda m, x: F.adaptive_max_pool2d(x, (2, 3)),
    "norm pool": lambda m, x: F.lp_pool2d(x.abs() + 1, 2, 2),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda m, x: F.interpolate(x, (5, 7), mode="bilinear"),
    "zero padding": lambda m, x: F.pad(x, (1, 0, 2, 1)),
    "circular padding": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "cropping": lambda m, x: F.pad(x, (-1, -1)),
    "roll and flip": lambda m, x: x.roll((1, 2), (2, 3)).flip(2),
    "cumulative sum": lambda m, x: x.cumsum(2),
    "sort": lambda m, x: x.sort(-1)[0],
    "tiles": lambda m, x: x.repeat(1, 1, 2, 1),
    "global mean": lambda m, x: x.mean((2, 3), keepdim=True),
    "max over rows": lambda m, x: x.max(2, keepdim=True)[0],
    "standard deviation": lambda m, x: x.std(3, keepdim=True) + x.var((2, 3), keepdim=True),
}


@pytest.mark.parametrize("op", SPATIAL)
def test_ops_along_the_image(op: str) -> None:
    assert_orders_hold(between_conv(SPATIAL[op]), IMAGES, free=["before"])


@pytest.mark.parametrize(
    ("pool", "inputs"),
    [
        (nn.Sequential(nn.Conv1d(4, 6, 3), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(3), nn.Conv1d(6, 2, 1)), SEQUENCES),
        (nn.Sequential(nn.Conv3d(2, 6, 3), nn.AvgPool3d(2), nn.Upsample(scale_factor=2), nn.Conv3d(6, 2, 1)), VOLUMES),
    ],
)
def test_ops_along_lines_and_volumes(pool: nn.Module, inputs: Tensor) -> None:
    assert_orders_hold(pool, inputs, free=["0"])


@pytest.mark.parametrize(
    "reduce", [lambda x: x.mean((2, 3)), lambda x: x.amax((-1, -2)), lambda x: x.sum(3).norm(dim=2)]
)
def test_global_pooling_before_a_linear_layer(reduce: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda m, x: m.out(reduce(m.conv(x))), conv=nn.Conv2d(2, 6, 3), out=nn.Linear(6, 3))
    assert_orders_hold(model, IMAGES, free=["conv"])


OVER_UNITS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda m, x: x.softmax(-1),
    "log softmax": lambda m, x: F.log_softmax(x, 1),
    "mean": lambda m, x: x - x.mean(-1, keepdim=True),
    "mean of all": lambda m, x: x - x.mean(),
    "largest": lambda m, x: x / x.abs().amax(1, keepdim=True),
    "norm": lambda m, x: F.normalize(x, dim=1),
    "logsumexp": lambda m, x: x - x.logsumexp(1, True),
    "broadcast": lambda m, x: x * x.sum(1, keepdim=True).expand(-1, 6) + x[:1].expand_as(x),
}


@pytest.mark.parametrize("op", OVER_UNITS)
def test_ops_that_see_all_units_alike(op: str) -> None:
    assert_orders_hold(between_linear(OVER_UNITS[op]), VECTORS, free=["before"])


NOT_ALIKE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "cumulative sum": (lambda m, x: x.cumsum(1), "cumsum goes along it"),
    "in-place cumulative sum": (lambda m, x: x.cumsum_(1), "cumsum_ goes along it"),
    "sort": (lambda m, x: x.sort(1)[0], "sort goes along it"),
    "flip": (lambda m, x: x + x.flip(1), "flip goes along it"),
    "roll": (lambda m, x: x + x.roll(1, 1), "roll goes along it"),
    "roll of all": (lambda m, x: x + x.roll(1), "roll goes along it"),
    "fft": (lambda m, x: torch.fft.fft(x).abs(), "op fft_fft is not known"),
    "chosen by units": (lambda m, x: x + x[:, (x[0] > 0).long()], "chosen by number"),
    "upper half": (lambda m, x: x.triu(), "cuts a corner off"),
    "gathered": (lambda m, x: x + x.gather(1, (x > 0).long()), "chosen by number"),
    "argmax": (lambda m, x: x + x.argmax(1, keepdim=True), "gives the numbers of units"),
    "max with index": (lambda m, x: x + x.max(1, keepdim=True)[1], "gives the numbers of units"),
    "shifted by padding": (lambda m, x: x + F.pad(x, (1, -1)), "padding along units"),
    "reflected": (lambda m, x: x + F.pad(x, (2, 2), mode="reflect")[:, :6], "padding along units"),
    "unbind": (lambda m, x: torch.stack(x.unbind(1)[::-1], 1), "unbind takes units one by one"),
    "weights by number": (lambda m, x: x * torch.arange(6), "mul with a fixed order"),
    "a buffer to write to": (lambda m, x: torch.sum(x, 1, True, out=x.new_empty(3, 1)) + x, "op sum is not known"),
    "as strided": (lambda m, x: x.as_strided((3, 6), (6, 1)), "op as_strided is not known"),
    "other type of view": (lambda m, x: x.view(torch.int32).double()[:, :6] / 2**31, "mixes units"),
}


@pytest.mark.parametrize("op", NOT_ALIKE)
def test_ops_that_tell_units_apart(op: str) -> None:
    do, reason = NOT_ALIKE[op]
    assert_orders_hold(between_linear(do), VECTORS, pinned={"before": reason})


def test_units_that_meet_their_mirror_image_move_in_pairs() -> None:
    model = between_linear(lambda m, x: x + x[:, [5, 4, 3, 2, 1, 0]])
    structure = assert_orders_hold(model, VECTORS, partly={"before": "3 units of 2 rows"}, moves={"after.weight": 1})
    assert structure.parts(structure.layer("before"))[0].tolist() == [[0, 5], [1, 4], [2, 3]]


def test_pixel_shuffle_moves_the_units_of_a_new_channel_together() -> None:
    model = between_conv(lambda m, x: F.pixel_shuffle(x, 2).relu(), units=12, read=3)
    structure = assert_orders_hold(model, IMAGES, partly={"before": "3 units of 4 rows"}, moves={"after.weight": 1})
    assert structure.spaces[0].positions(structure.axes["before.bias"][0])[1].tolist() == [4, 5, 6, 7]


def test_pixel_unshuffle_repeats_units() -> None:
    model = between_conv(lambda m, x: F.pixel_unshuffle(x, 2), units=3, read=12)
    assert_orders_hold(model, IMAGES, free=["before"], moves={"after.weight": 1})


@pytest.mark.parametrize("do", [lambda x: F.glu(x, 1), lambda x: F.glu(x.flatten(2), -2)[..., None]])
def test_glu(do: Callable[[Tensor], Tensor]) -> None:
    model = between_conv(lambda m, x: do(x), units=8, read=4)
    moves = {"before.weight": 0, "after.weight": 1}
    assert_orders_hold(model, IMAGES, partly={"before": "4 units of 2 rows"}, moves=moves)


def test_units_taken_in_an_order_that_is_written_down() -> None:
    model = between_linear(lambda m, x: x[:, [5, 0, -2, 1, 2, 3]].sin())
    assert_orders_hold(model, VECTORS, free=["before"])
    model = between_linear(lambda m, x: torch.index_select(x, 1, torch.tensor([0, 0, 3, 3, 5])), read=5)
    structure = assert_orders_hold(model, VECTORS)  # units 0 and 3 are taken twice, 5 once, the others not at all
    assert sorted(sorted(space.units.tolist()) for space in structure.spaces) == [[0, 3], [1, 2, 4]]


@pytest.mark.parametrize("index", [[0, 1, 1, 0], [0, 2, 1, 3, 3, 2]])
def test_units_taken_several_times_and_tied(index: list[int]) -> None:
    """Where units have become one, they are alike only if their places are taken in the same order."""
    model = Net(
        lambda m, x: m.out((y := m.first(x))[:, index]) + m.side((y * y.roll(0, 0)).unflatten(1, (2, 2)).prod(2)),
        first=nn.Linear(5, 4),
        out=nn.Linear(len(index), 3),
        side=nn.Linear(2, 3),
    )
    assert_orders_hold(model, VECTORS, orders=4)


def test_one_unit_taken_by_a_number_that_is_written_down() -> None:
    model = between_linear(lambda m, x: x * x[:, [2]] + x[:, torch.tensor(3)].sum())
    structure = assert_orders_hold(model, VECTORS)
    assert movable(structure, "before.weight").sum() < 6


def test_an_order_that_is_written_to_before_it_is_used() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        order = torch.tensor([5, 4, 3, 2, 1, 0])
        order[:3] = torch.tensor([3, 4, 5])
        return x[:, order]

    assert_orders_hold(between_linear(do), VECTORS, pinned={"before": "chosen by number"})


def test_rows_of_a_table_chosen_by_number() -> None:
    """The position bias of Swin: a table of heads, looked up by places."""
    numbers = torch.randint(7, (16,))
    model = Net(
        lambda m, x: m.out((m.first(x)[:, :, None] + m.table[numbers].view(4, 4, -1)).sum(2)),
        first=nn.Linear(11, 6),
        table=torch.randn(7, 6),
        out=nn.Linear(6, 2),
    )
    assert_orders_hold(model, SEQUENCES, free=["first"], moves={"table": 1})


def test_places_chosen_by_number() -> None:
    model = between_conv(lambda m, x: x[:, :, torch.tensor([[0], [2]]), torch.tensor([1, 3, 5])])
    assert_orders_hold(model, IMAGES, free=["before"])
    model = between_conv(lambda m, x: x[torch.tensor([0, 2]), :, torch.tensor([1, 3])][..., None])
    assert_orders_hold(model, IMAGES, free=["before"])
    model = between_conv(lambda m, x: x.gather(2, torch.ones(3, 6, 2, 6, dtype=torch.long)))
    assert_orders_hold(model, IMAGES, pinned={"before": "gather with a fixed order"})


EINSUMS: dict[str, Callable[..., Tensor]] = {
    "matrix": lambda m, x: torch.einsum("bi, oi -> bo", x, m.w),
    "sum and outer": lambda m, x: torch.einsum("bi,bj,oj->bo", x, x, m.w),
    "free batch": lambda m, x: torch.einsum("bi,bi,oi->bo", x, x, m.w),
}


@pytest.mark.parametrize("op", EINSUMS)
def test_einsum(op: str) -> None:
    model = between_linear(EINSUMS[op], read=7, w=torch.randn(7, 6))
    assert_orders_hold(model, VECTORS, free=["before"], moves={"w": 1, "after.weight": 1})


@pytest.mark.parametrize("equation", ["...i,oi->...o", "bi,oi", "bb,oi->bo"])
def test_einsums_that_are_not_plain(equation: str) -> None:
    units = 3 if equation[1] == "b" else 6
    model = between_linear(lambda m, x: torch.einsum(equation, x, m.w), units=units, read=7, w=torch.randn(7, units))
    assert_orders_hold(model, VECTORS, pinned={"before": "einsum"})


def test_addmm_and_baddbmm() -> None:
    model = between_linear(lambda m, x: torch.addmm(m.b, x, m.w).relu(), read=7, w=torch.randn(6, 7), b=torch.randn(7))
    assert_orders_hold(model, VECTORS, free=["before"], moves={"w": 0, "b": 0, "after.weight": 1})
    model = between_linear(
        lambda m, x: torch.baddbmm(m.b, x[None], m.w[None])[0], read=7, w=torch.randn(6, 7), b=torch.randn(1, 1, 7)
    )
    assert_orders_hold(model, VECTORS, free=["before"], moves={"b": 2, "after.weight": 1})


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_a_recurrent_network_is_not_known() -> None:
    model = Net(
        lambda m, x: m.out(m.rnn(m.before(x))[0]),
        before=nn.Linear(11, 6),
        rnn=nn.GRU(6, 5, batch_first=True),
        out=nn.Linear(5, 2),
    )
    assert_orders_hold(model, SEQUENCES, pinned={"before": "op gru is not known"})


def test_channels_padded_with_zeros_stay_free() -> None:
    model = Net(  # the shortcut of ResNets for CIFAR, option A of the paper
        lambda m, x: m.out((F.pad(y := m.a(x).relu(), (0, 0, 0, 0, 1, 2)) + m.b(y)).relu()),
        a=nn.Conv2d(2, 4, 1),
        b=nn.Conv2d(4, 7, 1),
        out=nn.Conv2d(7, 2, 1),
    )
    structure = assert_orders_hold(model, IMAGES, free=["a"], partly={"b": "4 units, 3 fixed"}, moves={"a.weight": 0})
    assert movable(structure, "b.weight").tolist() == [False, True, True, True, True, False, False]


def test_keys_that_several_heads_of_queries_read() -> None:
    """Grouped queries: each head of keys is repeated, and moves with the queries that read it."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(q.shape) for t in (k, v))
        return m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(5, 18), "k": nn.Linear(5, 6), "v": nn.Linear(5, 6), "out": nn.Linear(18, 2)}
    how = {"q": "2 units of 9 rows", "k": "2 units of 3 rows", "v": "2 units of 3 rows"}
    assert_orders_hold(Net(do, **layers), torch.randn(2, 4, 5), partly=how)


def test_copies_of_one_element_beside_its_units() -> None:
    """Only the copies stay where they are."""
    model = Net(
        lambda m, x: m.out(m.first(x)[..., None].expand(-1, 6, 3).reshape(-1, 18).tanh()),
        first=nn.Linear(4, 6),
        out=nn.Linear(18, 2),
    )
    assert_orders_hold(model, torch.randn(3, 4), free=["first"])
