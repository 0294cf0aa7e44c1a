"""A tiny network per hazard of real architectures, and what must hold of every one of them when it is zipped."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import taskzip as tz
from taskzip.graph import OUTPUT, Layer, Structure
from taskzip.zipped.blocks import installed
from taskzip.zipping.assembly import install_blocks
from taskzip.zipping.settings import Settings
from taskzip.zipping.zipper import Zipper

DOUBLE = torch.float64


def conv(read: int, units: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(read, units, kernel, padding=kernel // 2, **options)


def images(samples: int) -> Tensor:
    return torch.randn(samples, 2, 5, 5, dtype=DOUBLE)


def grey(samples: int) -> Tensor:
    return torch.randn(samples, 1, 6, 6, dtype=DOUBLE)


def vectors(samples: int) -> Tensor:
    return torch.randn(samples, 5, dtype=DOUBLE)


def sequences(samples: int) -> Tensor:
    return torch.randn(samples, 4, 5, dtype=DOUBLE)


def words(samples: int) -> Tensor:
    return torch.randint(9, (samples, 4))


@dataclass(frozen=True)
class Hazard:
    """One network.

    Attributes:
        make: a fresh one.
        inputs: so many samples of what it reads.
        private: hidden layers that stay private, each with a part of the reason.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    private: Mapping[str, str] = field(default_factory=dict)


# --- the networks -------------------------------------------------------------------------------------------------


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def residual_with_projection() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled((m.b(m.a(x).relu()) + m.side(x)).relu())),
        a=conv(2, 5, stride=2),
        b=conv(5, 6),
        side=conv(2, 6, 1, stride=2),
        out=nn.Linear(6, 3),
    )


def residual_without_projection() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for first, second in ((m.first1, m.second1), (m.first2, m.second2)):
            x = (x + second(first(x).relu())).relu()
        return m.out(pooled(x))

    return Net(
        do,
        stem=conv(2, 6),
        first1=conv(6, 5),
        second1=conv(5, 6),
        first2=conv(6, 4, bias=False),
        second2=conv(4, 6, 1, bias=False),
        out=nn.Linear(6, 3),
    )


def batch_norm_and_residual() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.bn(m.stem(x)).relu()
        y = m.bn2(m.second(m.bn1(m.first(x)).relu()))
        x = (y + m.bn_side(m.side(x))).relu()
        return m.out(pooled(m.bn_last(x + m.last(x))))

    return Net(
        do,
        stem=conv(2, 4, bias=False),
        bn=nn.BatchNorm2d(4),
        first=conv(4, 5, bias=False),
        bn1=nn.BatchNorm2d(5),
        second=conv(5, 6, 1),
        bn2=nn.BatchNorm2d(6),
        side=conv(4, 6, 1, bias=False),
        bn_side=nn.BatchNorm2d(6),
        last=conv(6, 6, 1),
        bn_last=nn.BatchNorm2d(6),
        out=nn.Linear(6, 3),
    )


def concatenated_then_convolution() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled(m.joint(torch.cat([m.a(x).relu(), x, m.b(x).tanh()], 1)).relu())),
        a=conv(2, 4),
        b=conv(2, 5, 1),
        joint=conv(11, 6),
        out=nn.Linear(6, 3),
    )


def concatenated_flattened_then_linear() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.joint(torch.cat([m.a(x).relu().flatten(1), pooled(m.b(x))], 1)).relu()),
        a=nn.Conv2d(2, 4, 4),
        b=conv(2, 3),
        joint=nn.Linear(19, 6),
        out=nn.Linear(6, 3),
    )


def split_and_joined_again() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        passing, worked = m.first(x).relu().chunk(2, 1)
        return m.out(m.last(torch.cat([m.middle(worked).relu(), passing], 1)).relu())

    return Net(do, first=nn.Linear(5, 8), middle=nn.Linear(4, 3), last=nn.Linear(7, 6), out=nn.Linear(6, 3))


def gated_halves() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.last(F.glu(m.first(x), 1)).relu()),
        first=nn.Linear(5, 10),
        last=nn.Linear(5, 6),
        out=nn.Linear(6, 3),
    )


def depthwise() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled(m.project(m.depthwise(m.expand(x).relu()).relu()).relu())),
        expand=conv(2, 5, 1),
        depthwise=conv(5, 10, groups=5),
        project=conv(10, 4, 1),
        out=nn.Linear(4, 3),
    )


def grouped() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled(m.after(m.grouped(m.before(x).relu()).relu()).relu())),
        before=conv(2, 6),
        grouped=conv(6, 9, groups=3),
        after=conv(9, 5, 1),
        out=nn.Linear(5, 3),
    )


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def channel_shuffle() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = shuffled(m.stem(x).relu())
        passing, worked = m.wide(x).chunk(2, 1)
        return m.out(pooled(shuffled(torch.cat([passing, m.block(worked).relu()], 1))))

    return Net(do, stem=conv(2, 6), wide=conv(6, 8, 1), block=conv(4, 4), out=nn.Linear(8, 3))


def tied_modules() -> nn.Module:
    """Two modules that are one, and a bias that two layers would share if one of them could be."""
    model = Net(
        lambda m, x: m.out(m.again(m.middle(m.first(x).relu()).relu()).relu()),
        first=nn.Linear(5, 6),
        middle=nn.Linear(6, 6),
        out=nn.Linear(6, 3),
    )
    model.again = model.middle
    return model


def tied_parameters() -> nn.Module:
    """Two modules with one weight and one bias."""
    model = Net(
        lambda m, x: m.out(m.a(x).relu() + m.b(x.abs()).tanh()),
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 6),
        out=nn.Linear(6, 3),
    )
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    return model


def tied_embedding_and_head() -> nn.Module:
    model = Net(
        lambda m, x: m.head(m.second(m.first(y := m.table(x)).relu()) + y),
        table=nn.Embedding(9, 6),
        first=nn.Linear(6, 5),
        second=nn.Linear(5, 6),
        head=nn.Linear(6, 9),
    )
    model.head.weight = model.table.weight
    return model


def one_channel() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled(m.wide(torch.cat([m.narrow(y := m.first(x).relu()), y], 1)).relu())),
        first=conv(1, 5),
        narrow=conv(5, 1),
        wide=conv(6, 4, 1),
        out=nn.Linear(4, 3),
    )


def several_readers() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.a(y := m.first(x).relu()).relu() * m.b(y).sigmoid() + y.mean(1, keepdim=True)),
        first=nn.Linear(5, 7),
        a=nn.Linear(7, 6),
        b=nn.Linear(7, 6),
        out=nn.Linear(6, 3),
    )


def unknown_op() -> nn.Module:
    return Net(
        lambda m, x: m.out(torch.cat([m.last(m.middle(y := m.first(x).relu()).cumsum(1)), m.side(y)], 1)),
        first=nn.Linear(5, 7),
        middle=nn.Linear(7, 6),
        last=nn.Linear(6, 5),
        side=nn.Linear(7, 4),
        out=nn.Linear(9, 3),
    )


def recurrent_in_the_middle() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.side(y := m.first(x).relu()).tanh() + m.last(m.rnn(m.middle(y))[0][:, -1:])),
        first=nn.Linear(5, 7),
        middle=nn.Linear(7, 4),
        rnn=nn.GRU(4, 4, batch_first=True),
        last=nn.Linear(4, 6),
        side=nn.Linear(7, 6),
        out=nn.Linear(6, 3),
    )


def called_twice() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        y, z = (m.second(m.first(each).relu()).relu() for each in (x, 1 - x))
        return m.out(torch.cat([y, z], 1))

    return Net(do, first=nn.Linear(5, 7), second=nn.Linear(7, 6), out=nn.Linear(12, 3))


def read_before_it_is_written() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        state = m.start.expand(len(x), 6)
        for _ in range(2):
            state = m.second((m.first(state) + m.inputs(x)).relu()).tanh()
        return m.out(state)

    return Net(
        do,
        start=torch.randn(6),
        first=nn.Linear(6, 7),
        inputs=nn.Linear(5, 7),
        second=nn.Linear(7, 6),
        out=nn.Linear(6, 3),
    )


def gives_a_tuple() -> nn.Module:
    return Net(
        lambda m, x: (m.out(z := m.second(y := m.first(x).relu()).relu()), y.sum(1), (z.amax(1),)),
        first=nn.Linear(5, 7),
        second=nn.Linear(7, 6),
        out=nn.Linear(6, 3),
    )


@dataclass
class Answer:
    """A registered class, like the ModelOutput of some libraries."""

    score: Tensor
    spread: Tensor | None = None


torch.export.register_dataclass(Answer, serialized_type_name="tests.hazards.Answer")


def gives_a_dataclass() -> nn.Module:
    return Net(
        lambda m, x: Answer(m.out(y := m.first(x).relu()), y.std(1)),
        first=nn.Linear(5, 7),
        out=nn.Linear(7, 3),
    )


def several_heads() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = m.first(x).relu()
        return {name: head[1](head[0](y).relu()) for name, head in m.heads.items()}

    heads = {name: nn.ModuleList([nn.Linear(7, 4 + k), nn.Linear(4 + k, 2 + k)]) for k, name in enumerate("ab")}
    return Net(do, first=nn.Linear(5, 7), heads=nn.ModuleDict(heads))


def squeeze_and_excitation() -> nn.Module:
    return Net(
        lambda m, x: m.out(pooled((y := m.first(x).relu()) * m.excite(m.squeeze(gap(y)).relu()).sigmoid())),
        first=conv(2, 6),
        squeeze=conv(6, 3, 1),
        excite=conv(3, 6, 1),
        out=nn.Linear(6, 3),
    )


def gap(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def dense_connections() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        found = [m.stem(x).relu()]
        for layer in m.layers:
            found.append(layer(torch.cat(found, 1)).relu())
        return m.out(pooled(m.transition(torch.cat(found, 1)).relu()))

    layers = nn.ModuleList([conv(4, 3), conv(7, 3), conv(10, 3)])
    return Net(do, stem=conv(2, 4), layers=layers, transition=conv(13, 5, 1), out=nn.Linear(5, 3))


def inverted_bottleneck() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = F.hardswish(m.depthwise(F.relu6(m.bn(m.expand(x)))))
        y = y * m.excite(m.squeeze(gap(y)).relu()).sigmoid()
        return m.out(pooled(m.project(y) + x))

    return Net(
        do,
        stem=conv(2, 4),
        expand=conv(4, 8, 1, bias=False),
        bn=nn.BatchNorm2d(8),
        depthwise=conv(8, 8, groups=8),
        squeeze=conv(8, 3, 1),
        excite=conv(3, 8, 1),
        project=conv(8, 4, 1),
        out=nn.Linear(4, 3),
    )


def transformer_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3))


class Block(nn.Module):
    """Pre-norm, queries, keys and values in one layer, a scale per unit before each addition."""

    def __init__(self, width: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        samples, places, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(samples, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, places, width)
        x = x + self.scale * self.proj(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def pre_norm_transformer() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.norm(m.block(torch.cat([m.token.expand(len(x), 1, 6), m.embed(x)], 1) + m.place)[:, 0])),
        embed=nn.Linear(5, 6),
        token=torch.randn(1, 1, 6),
        place=torch.randn(1, 5, 6),
        block=Block(),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 3),
    )


def group_norm() -> nn.Module:
    return nn.Sequential(
        conv(2, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 4), nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(),
        nn.Linear(100, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


HAZARDS = {
    "residual with projection": Hazard(residual_with_projection, images),
    "residual without projection": Hazard(residual_without_projection, images),
    "batch-norm and residual": Hazard(batch_norm_and_residual, images),
    "concatenated, then convolution": Hazard(concatenated_then_convolution, images),
    "concatenated, flattened, then linear": Hazard(concatenated_flattened_then_linear, images),
    "split and joined again": Hazard(split_and_joined_again, vectors),
    "gated halves": Hazard(gated_halves, vectors),
    "depthwise": Hazard(depthwise, images, {"depthwise": "a grouped convolution"}),
    "grouped": Hazard(grouped, images, {"grouped": "a grouped convolution"}),
    "channel shuffle": Hazard(channel_shuffle, images),
    "tied modules": Hazard(tied_modules, vectors),
    "tied parameters": Hazard(tied_parameters, vectors),
    "tied embedding and head": Hazard(
        tied_embedding_and_head,
        words,
        {"table": "its weight is also read by"},
    ),
    "one channel": Hazard(one_channel, grey, {"narrow": "a single unit"}),
    "several readers": Hazard(several_readers, vectors),
    "unknown op": Hazard(unknown_op, vectors, {"middle": "cumsum goes along it"}),
    "recurrent in the middle": Hazard(recurrent_in_the_middle, sequences, {"middle": "op gru is not known"}),
    "called twice": Hazard(called_twice, vectors),
    "read before it is written": Hazard(read_before_it_is_written, vectors),
    "gives a tuple": Hazard(gives_a_tuple, vectors),
    "gives a dataclass": Hazard(gives_a_dataclass, vectors),
    "several heads": Hazard(several_heads, vectors),
    "squeeze and excitation": Hazard(squeeze_and_excitation, images),
    "dense connections": Hazard(dense_connections, images),
    "inverted bottleneck": Hazard(inverted_bottleneck, images, {"depthwise": "a grouped convolution"}),
    "transformer layer": Hazard(transformer_layer, sequences),
    "pre-norm transformer": Hazard(pre_norm_transformer, sequences),
    "group-norm": Hazard(group_norm, images),
}

NAMES = [
    pytest.param(name, marks=pytest.mark.filterwarnings("ignore:The tensor attributes"))
    if "recurrent" in name
    else name
    for name in HAZARDS
]
STREAMS = [
    "residual with projection",
    "residual without projection",
    "batch-norm and residual",
    "tied modules",
    "tied embedding and head",
    "read before it is written",
    "squeeze and excitation",
    "inverted bottleneck",
    "transformer layer",
    "pre-norm transformer",
]
"""Those with a space into which several layers write, or one layer twice."""

SAMPLES = 24


def network(name: str, seed: int) -> nn.Module:
    """A random network, with norms and statistics that differ from unit to unit, too."""
    torch.manual_seed(seed)
    model = HAZARDS[name].make().to(DOUBLE).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return model


def data(name: str, seed: int = 0, samples: int = SAMPLES) -> Tensor:
    torch.manual_seed(1000 + seed)
    return HAZARDS[name].inputs(samples)


@functools.cache
def structure_of(name: str) -> Structure:
    return tz.inspect(network(name, 0), data(name))


def reordered(name: str, model: nn.Module, seed: int) -> nn.Module:
    """The same function with the units of every space in another order."""
    model, rng, structure = copy.deepcopy(model), np.random.default_rng(seed), structure_of(name)
    for index, space in enumerate(structure.spaces):
        structure.reorder(model, index, rng.permutation(len(space.units)))
    return model


def zipped_of(name: str, models: Sequence[nn.Module], x: Sequence[Tensor], **options: Any) -> tz.ZippedModel:
    """Zip, with an analysis that is made once per architecture: nothing takes as long."""
    structure = structure_of(name)
    tasks = [tz.Task("abc"[t], model, [each]) for t, (model, each) in enumerate(zip(models, x, strict=True))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taskzip.zipping.members.analyse", lambda *_: structure)
        return tz.zip(tasks, **{"share": 1.0, "progress": False, "max_rows": None, **options})


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def assert_close(given: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(given, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def count(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


def hidden(name: str) -> Iterator[tuple[Layer, str]]:
    """All layers but those that give an output, and why they stay private, or ""."""
    for layer in structure_of(name).layers:
        if layer.pinned != OUTPUT:
            yield layer, HAZARDS[name].private.get(layer.name, "")


def rows_that_move(name: str, layer: Layer) -> int:
    return int((structure_of(name).space_of(layer.rows) >= 0).sum())


def saved_by_full_sharing(name: str) -> int:
    """All weights to units that move from inputs that move or are in a fixed order, and the biases of these."""
    structure, total = structure_of(name), 0
    shared = [layer for layer, private in hidden(name) if not private]
    spaces = {space for layer in shared for space in layer.spaces}
    for layer in shared:
        inputs = layer.inputs
        if layer.columns is not None:
            inputs = int(np.isin(structure.space_of(layer.columns), [*spaces, -1]).sum())
        total += rows_that_move(name, layer) * (inputs * layer.taps + (layer.bias is not None))
    return total


OPTIONS: list[dict[str, Any]] = [
    {},
    {"residual": "independent", "aligned": True},
    {"aligned": False, "compensate": False},
    {"residual": "independent", "aligned": False},
    {"aligned": True, "compensate": False},
    {"residual": "independent", "compensate": False},
    {"aligned": False},
]


def options_for(name: str, turn: int) -> dict[str, Any]:
    """Each hazard with other options, to save time: all of them with all hazards take minutes."""
    return OPTIONS[(list(HAZARDS).index(name) + turn) % len(OPTIONS)]


# --- a network and its re-ordered copies --------------------------------------------------------------------------


def assert_copy_is_found(name: str, options: dict[str, Any]) -> None:
    model, x, fresh = network(name, 1), data(name), data(name, 5)
    copy_ = reordered(name, model, 2)
    assert_close(outputs(copy_, x), outputs(model, x), 1e-10)
    zipped = zipped_of(name, [model, copy_], [x, x], **options)

    records = {record.name: record for record in zipped.history.layers}
    for layer, private in hidden(name):
        record = records[layer.name]
        assert private in record.note and bool(private) == bool(record.note), record
        assert record.shared == (0 if private else rows_that_move(name, layer)), record
        assert record.cost <= 1e-9, record
    for task in "ab":
        assert_close(outputs(zipped[task], x), outputs(model, x), 1e-8)
        assert_close(outputs(zipped[task], fresh), outputs(model, fresh), 1e-8)
    scales, biases = own_numbers(name, zipped)
    assert zipped.parameter_count() == 2 * count(model) - saved_by_full_sharing(name) + scales + biases
    assert zipped.shared_parameter_count() == saved_by_full_sharing(name) - biases


def own_numbers(name: str, zipped: tz.ZippedModel) -> tuple[int, int]:
    """Scales of both tasks, and biases of shared rows that have one, which are then not shared."""
    scales = biases = 0
    for layer in structure_of(name).layers:
        rows = [
            p.numel()
            for task in zipped
            for key, p in getattr(installed(zipped[task]).get(layer.weight), "named_parameters", list)()
            if ":" in key
        ]
        scales += sum(rows)
        biases += rows[0] if rows and layer.bias is not None else 0
    return scales, biases


@pytest.mark.parametrize("name", NAMES)
def test_a_reordered_copy_is_found_unit_by_unit(name: str) -> None:
    assert_copy_is_found(name, {} if name in STREAMS else options_for(name, 0))


@pytest.mark.parametrize("name", STREAMS)
def test_a_reordered_copy_is_found_in_a_stream_with_other_options(name: str) -> None:
    options = OPTIONS[1 + STREAMS.index(name) % (len(OPTIONS) - 1)]
    assert_copy_is_found(name, options)
    if "independent" not in options.values():
        assert_copy_is_found(name, {"residual": "independent", "compensate": STREAMS.index(name) % 2 == 0})


# --- networks that have nothing in common but their architecture ----------------------------------------------------


MOVED_BY_CUTTING: dict[tuple[str, int], dict[str, float]] = {}
"""Per hazard and number of tasks, by how much a weight changed when it was cut into blocks."""


@functools.cache
def strangers(name: str, tasks: int) -> tuple[list[nn.Module], list[Tensor], tz.ZippedModel]:
    """Three share a half, two by turns a half or everything."""
    models = [network(name, seed) for seed in range(tasks)]
    x = [data(name, seed, SAMPLES + seed) for seed in range(tasks)]
    share = 0.5 if tasks == 3 or list(HAZARDS).index(name) % 2 else 1.0
    moved = MOVED_BY_CUTTING[name, tasks] = {}

    def install(members: Sequence[Any], inputs: Any, groups: Any, scales: Any) -> None:
        before = [dense_of(name, member.network) for member in members]
        for t, scale in scales.items():
            key = inputs.layers[t].weight
            before[t][key] = before[t][key] * scale.view(-1, *(1,) * (before[t][key].dim() - 1))
        install_blocks(members, inputs, groups, scales)
        for member, was in zip(members, before, strict=True):
            for key, tensor in dense_of(name, member.network).items():
                if not torch.equal(tensor, was[key]):
                    moved[f"{member.task.name}: {key}"] = float((tensor - was[key]).abs().max())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taskzip.zipping.zipper.install_blocks", install)
        return models, x, zipped_of(name, models, x, share=share, **options_for(name, tasks))


def dense_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of all layers, put together where they are blocks."""
    names = [key for layer in structure_of(name).layers for key in (layer.weight, layer.bias) if key is not None]
    parts = {key: key.rpartition(".") for key in names}
    return {
        key: getattr(model.get_submodule(path), attribute).detach().clone()
        for key, (path, _, attribute) in parts.items()
    }


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_strangers_run_save_and_load(name: str, tasks: int, tmp_path: Path) -> None:
    models, x, zipped = strangers(name, tasks)
    for seed, model in enumerate(models):
        given = network(name, seed).state_dict()
        assert all(torch.equal(tensor, given[key]) for key, tensor in model.state_dict().items())
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {task: network(name, 7) for task in zipped})
    for task, each in zip(zipped, x, strict=True):
        now = outputs(zipped[task], each)
        assert all(torch.isfinite(y).all() for y in now)
        assert all(map(torch.equal, outputs(loaded[task], each), now))
        plain = zipped.materialize(task)
        assert_close(outputs(plain, each), now, 1e-12)
        assert count(plain) == count(models[0]) and not installed(plain)
        assert [type(module) for module in plain.modules()] == [type(module) for module in models[0].modules()]
    assert loaded.parameter_count() == zipped.parameter_count() < tasks * count(models[0])
    assert any(record.shared for record in zipped.history.layers)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(
    "tasks",
    [
        2,
        3,
    ],
)
def test_cutting_weights_into_blocks_changes_none_of_them(tasks: int) -> None:
    """What is tied was made equal before: every block is what merging made of it, for all who use it."""
    for name in HAZARDS:
        strangers(name, tasks)
    assert not {name: moved for (name, number), moved in MOVED_BY_CUTTING.items() if moved and number == tasks}


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_strangers_without_weights_from_private_to_shared_units(name: str, tasks: int, tmp_path: Path) -> None:
    """What is not there was 0 before the weights were cut; nothing is written twice, and all outputs hold together."""
    models = [network(name, seed) for seed in range(tasks)]
    x = [data(name, seed, SAMPLES + seed) for seed in range(tasks)]
    found = {}

    def install(members: Sequence[Any], inputs: Any, groups: Any, scales: Any) -> None:
        assert not scales
        before = [dense_of(name, member.network) for member in members]
        install_blocks(members, inputs, groups)
        for member, was in zip(members, before, strict=True):
            found.update({key: torch.equal(each, was[key]) for key, each in dense_of(name, member.network).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taskzip.zipping.zipper.install_blocks", install)
        zipped = zipped_of(name, models, x, share=0.5, cross=False)
    assert all(found.values())
    assert not any("@" in key for key, _ in zipped.named_parameters())
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {task: network(name, 7) for task in zipped})
    with torch.no_grad():
        together = zipped(x[0])
    for task, each in zip(zipped, x, strict=True):
        now = outputs(zipped[task], each)
        assert all(torch.isfinite(y).all() for y in now)
        assert all(map(torch.equal, outputs(loaded[task], each), now))
        assert_close(outputs(zipped.materialize(task), each), now, 1e-10)
        leaves = [leaf for leaf in pytree.tree_leaves(together[task]) if isinstance(leaf, Tensor)]
        assert_close(leaves, outputs(zipped[task], x[0]), 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_sharing_nothing_changes_nothing(name: str) -> None:
    models, x = [network(name, seed) for seed in range(2)], [data(name, seed) for seed in range(2)]
    zipped = zipped_of(name, models, x, share=0.0, **options_for(name, 4))
    for task, model, each in zip("ab", models, x, strict=True):
        assert all(map(torch.equal, outputs(zipped[task], each), outputs(model, each)))
    assert zipped.parameter_count() == count(*models)
    assert zipped.shared_parameter_count() == 0


SIZES: list[dict[str, Any]] = [
    {"share": 0.5},
    {"share": 0.6, "residual": "independent"},
    {"share": 0.5, "cross": False},
]


@pytest.mark.parametrize("name", NAMES)
def test_giving_units_their_sizes_back_changes_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In dense weights and in blocks, of which tasks have parts; what one task has alone is as it was."""
    models, x = [network(name, seed) for seed in range(3)], [data(name, seed) for seed in range(3)]
    options = SIZES[list(HAZARDS).index(name) % len(SIZES)]
    zipped = zipped_of(name, models, x, **options)
    monkeypatch.setattr(Zipper, "restore_scales", lambda self: None)
    scaled = zipped_of(name, models, x, **options)
    for task, each in zip(zipped, x, strict=True):
        assert_close(outputs(zipped[task], each), outputs(scaled[task], each), 1e-8)


# --- what is shared is one Parameter -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_one_task_moves_what_it_owns_and_nothing_else(name: str) -> None:
    _, x, cached = strangers(name, 3)
    zipped = copy.deepcopy(cached)
    before = {parameter: parameter.detach().clone() for parameter in zipped.parameters()}
    leaves = [y for y in pytree.tree_leaves(zipped["a"](x[0])) if isinstance(y, Tensor)]
    sum((y * torch.randn_like(y)).sum() for y in leaves).backward()
    torch.optim.SGD(zipped.parameters(), lr=0.1, weight_decay=0.1).step()  # the decay moves what is dead, too

    moved = {parameter for parameter, value in before.items() if not torch.equal(parameter, value)}
    assert moved == set(zipped["a"].parameters())
    holders: dict[nn.Parameter, set[str]] = {}
    for task in zipped:
        for parameter in zipped[task].parameters():
            holders.setdefault(parameter, set()).add(task)
    together = set()
    for task in zipped:
        for blocks in installed(zipped[task]).values():
            for key, parameter in blocks.named_parameters():
                owners, _, users = key.replace(":", "@").partition("@")
                assert holders[parameter] == set((users or owners).split("+"))
                together |= {parameter} if len(holders[parameter]) > 1 else set()
    assert together & moved
    assert {parameter for parameter, tasks in holders.items() if len(tasks) > 1} == together


# --- against the closed form ---------------------------------------------------------------------------------------


def noisy(name: str, model: nn.Module, seed: int) -> nn.Module:
    """A network whose every unit still does nearly the same."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return other


def read_by(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """What a module of the original network reads."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    outputs(model, x)
    hook.remove()
    (given,) = seen
    return given


def literal_rows(module: nn.Module, given: Tensor) -> list[np.ndarray]:
    """The vectors that a unit reads, one per sample and place, with a last 1 for the bias."""
    if isinstance(module, nn.Linear):
        return [np.append(each, 1.0) for each in given.reshape(-1, module.in_features).numpy()]
    edge, (high, wide) = module.padding[0], module.kernel_size
    padded = np.pad(given.numpy(), ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    return [
        np.append(sample[:, i : i + high, j : j + wide].ravel(), 1.0)
        for sample in padded
        for i in range(sample.shape[1] - high + 1)
        for j in range(sample.shape[2] - wide + 1)
    ]


def literal_curvature(model: nn.Module, layer: str, x: Tensor, balance: float, damping: float) -> np.ndarray:
    """Eq. 7 and 8 as they stand, damped."""
    rows = literal_rows(model.get_submodule(layer), read_by(model, layer, x))
    h = np.zeros((len(rows[0]), len(rows[0])))
    for row in rows:
        h += balance / len(x) * np.outer(row, row)
    return h + damping * np.mean([h[i, i] for i in range(len(h))]) * np.eye(len(h))


def weights_of(model: nn.Module, layer: str) -> np.ndarray:
    module = model.get_submodule(layer)
    return torch.cat([module.weight.flatten(1), module.bias[:, None]], 1).detach().numpy()


def places(given: np.ndarray, wanted: np.ndarray) -> list[int]:
    """Which row of `wanted` each row of `given` is."""
    found = [np.flatnonzero((np.abs(wanted - row) < 1e-12).all(1)) for row in given]
    assert all(len(each) == 1 for each in found)
    return [int(each[0]) for each in found]


def merged_by_hand(
    networks: Sequence[nn.Module], layer: str, x: Sequence[Tensor], units: Sequence[Sequence[int]], balance: float
) -> tuple[np.ndarray, list[float]]:
    """(sum H)^-1 (sum H w) for networks whose units correspond in their order, and for two of them d of each unit."""
    h = [literal_curvature(n, layer, each, balance, 1e-2) for n, each in zip(networks, x, strict=True)]
    w = [weights_of(n, layer) for n in networks]
    merged = np.array([
        np.linalg.inv(sum(h)) @ sum(each @ weights[row] for each, weights in zip(h, w, strict=True))
        for row in range(len(w[0]))
    ])  # fmt: skip
    metric = np.linalg.inv(np.linalg.inv(h[0]) + np.linalg.inv(h[1]))
    cost = [sum(0.5 * (w[0][row] - w[1][row]) @ metric @ (w[0][row] - w[1][row]) for row in rows) for rows in units]
    return merged, cost


def one_layer_zipped(
    name: str, layer: str, tasks: int, pairs: int, residual: str
) -> tuple[list[nn.Module], list[Any], tz.ZippedModel]:
    """Networks much like one another, their data, and re-ordered copies of them zipped in that layer alone."""
    model = network(name, 1)
    networks = [model, *(noisy(name, model, seed) for seed in range(1, tasks))]
    x = [data(name, seed, 12 + seed) for seed in range(tasks)]
    given = [reordered(name, each, seed) for seed, each in enumerate(networks)]
    options = {"compensate": False, "residual": residual}
    zipped = zipped_of(name, given, x, share={layer: pairs}, **options)
    return networks, x, zipped


@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize(("tasks", "pairs"), [(2, 6), (2, 3), (3, 6)])
def test_a_residual_layer_against_the_closed_form(tasks: int, pairs: int, residual: str) -> None:
    """Its inputs are aligned with nothing shared before, and are what the original networks gave."""
    name, layer = "residual without projection", "second1"
    networks, x, zipped = one_layer_zipped(name, layer, tasks, pairs, residual)
    merged, cost = merged_by_hand(networks, layer, x, [[row] for row in range(6)], 1 / tasks)

    shared = set(range(6)) if pairs == 6 else set(np.argsort(cost)[:pairs].tolist())
    for task, original in zip(zipped, networks, strict=True):
        plain, own = zipped.materialize(task), weights_of(original, layer)
        stream = places(plain.stem.bias.detach().numpy()[:, None], original.stem.bias.detach().numpy()[:, None])
        inner = places(plain.first1.bias.detach().numpy()[:, None], original.first1.bias.detach().numpy()[:, None])
        wanted = np.array([merged[row] if row in shared else own[row] for row in stream])
        weight, bias = wanted[:, :-1].reshape(6, 5, 3, 3)[:, inner], wanted[:, -1]
        np.testing.assert_allclose(plain.second1.weight.detach().numpy(), weight, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(plain.second1.bias.detach().numpy(), bias, rtol=1e-8, atol=1e-10)
    record = next(record for record in zipped.history.layers if record.name == layer)
    assert record.shared == pairs
    if tasks == 2:
        assert record.cost == pytest.approx(sum(cost[row] for row in shared), rel=1e-7)


@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize(("tasks", "pairs"), [(2, 3), (2, 2), (3, 3)])
def test_heads_against_the_closed_form(tasks: int, pairs: int, residual: str) -> None:
    """A head is the rows of its queries, keys and values; what it reads went through a layer-norm."""
    name, layer = "pre-norm transformer", "block.qkv"
    networks, x, zipped = one_layer_zipped(name, layer, tasks, pairs, residual)
    heads = [[6 * part + 2 * head + k for part in range(3) for k in range(2)] for head in range(3)]
    merged, cost = merged_by_hand(networks, layer, x, heads, 1 / tasks)

    shared = set(range(3)) if pairs == 3 else set(np.argsort(cost)[:pairs].tolist())
    for task, original in zip(zipped, networks, strict=True):
        plain, own = zipped.materialize(task), weights_of(original, layer)
        stream = places(plain.embed.bias.detach().numpy()[:, None], original.embed.bias.detach().numpy()[:, None])
        mixed, before = plain.block.proj.weight.detach().numpy(), original.block.proj.weight.detach().numpy()[stream]
        order = places(mixed.T[::2], before.T[::2])  # of the heads, two columns each
        wanted = np.empty((18, 7))
        for place, head in enumerate(order):
            for to, row in zip(heads[place], heads[head], strict=True):
                wanted[to] = merged[row] if head in shared else own[row]
        weight, bias = wanted[:, :-1][:, stream], wanted[:, -1]
        np.testing.assert_allclose(plain.block.qkv.weight.detach().numpy(), weight, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(plain.block.qkv.bias.detach().numpy(), bias, rtol=1e-8, atol=1e-10)
    record = next(record for record in zipped.history.layers if record.name == layer)
    assert record.shared == 6 * pairs
    if tasks == 2:
        assert record.cost == pytest.approx(sum(cost[head] for head in shared), rel=1e-7)


# --- compensation against literal least squares ---------------------------------------------------------------------

COMPENSATED = {
    "residual without projection": ("stem", ["first1", "second1", "out"]),
    "pre-norm transformer": ("embed", ["block.qkv", "block.proj", "block.up", "block.down", "head"]),
    "batch-norm and residual": ("stem", ["second", "last", "out"]),
    "split and joined again": ("first", ["middle", "last", "out"]),
}


@pytest.mark.parametrize("residual", ["coupled", "independent"])
@pytest.mark.parametrize("name", COMPENSATED)
def test_private_layers_behind_a_shared_one_give_the_original_answers(
    name: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns of what is solved lie in new orders; what it should answer lies in the original one."""
    monkeypatch.setattr(Settings, "relative", False)  # units as they are, so that weights can be compared
    shared, layers = COMPENSATED[name]
    models, x = [network(name, seed) for seed in range(2)], [data(name, seed, 16) for seed in range(2)]
    options = {"share": {shared: 0.5}, "residual": residual, "aligned": True, "own_scale": False}
    solved = zipped_of(name, models, x, ridge=0.1, **options)
    unsolved = zipped_of(name, models, x, compensate=False, **options)  # in the same orders
    for task, original, each in zip("ab", models, x, strict=True):
        after, before = solved.materialize(task), unsolved.materialize(task)
        for layer in layers:
            reads = np.array(literal_rows(after.get_submodule(layer), read_by(after, layer, each)))
            wanted = np.array(literal_rows(original.get_submodule(layer), read_by(original, layer, each)))
            order = places(weights_of(before, layer)[:, -1:], weights_of(original, layer)[:, -1:])
            answers = wanted @ weights_of(original, layer)[order].T
            gram = reads.T @ reads
            squares = np.diag(gram)
            ridge = 0.1 * np.diag(np.maximum(squares, 1e-2 * squares.mean()))
            given = np.linalg.solve(gram + ridge, reads.T @ answers + ridge @ weights_of(before, layer).T).T
            np.testing.assert_allclose(weights_of(after, layer), given, rtol=1e-7, atol=1e-9)
            assert np.abs(given - weights_of(before, layer)).max() > 1e-4


@pytest.mark.parametrize("balance", [0.5, 0.2])
def test_merged_units_of_a_residual_layer_keep_mean_and_spread(balance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "relative", False)  # moments are compared with those of units as they are
    name, layer = "residual without projection", "second1"
    models, x = [network(name, seed) for seed in range(2)], [data(name, seed, 16) for seed in range(2)]
    zipped = zipped_of(name, models, x, share={layer: 6}, balance=balance, own_scale=False)
    plain = [zipped.materialize(task) for task in "ab"]
    np.testing.assert_array_equal(*(np.sort(weights_of(each, layer), 1) for each in plain))  # each reads in its order
    moments = np.zeros((2, 2, 6))  # of the original and of the merged units, mean and variance
    for original, merged, each, alpha in zip(models, plain, x, (balance, 1 - balance), strict=True):
        order = places(weights_of(merged, "stem")[:, -1:], weights_of(original, "stem")[:, -1:])
        for k, (model, rows) in enumerate(((original, order), (merged, range(6)))):
            answers = np.array(literal_rows(model.get_submodule(layer), read_by(model, layer, each)))
            answers = answers @ weights_of(model, layer)[list(rows)].T
            moments[k] += alpha * np.stack([answers.mean(0), answers.var(0)])
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-8, atol=1e-10)
