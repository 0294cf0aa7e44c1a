"""Layers along another axis than the units: (sample, unit) is then a row, and units change places while zipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graph.orders import Net
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.recalibration import least_squares
from taskzip.zipping.members import Member

DOUBLE = torch.float64
PLACES, WIDTH = 6, 8


def sequences(samples: int) -> Tensor:
    return torch.randn(samples, PLACES, 5, dtype=DOUBLE)


def token_mixing() -> nn.Module:
    """An MLP-Mixer."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + m.tokens(m.norm(x).transpose(1, 2)).transpose(1, 2)
        return m.out((x + m.channels(x)).mean(1))

    return Net(
        do,
        embed=nn.Linear(5, WIDTH),
        norm=nn.LayerNorm(WIDTH),
        tokens=nn.Sequential(nn.Linear(PLACES, 7), nn.GELU(), nn.Linear(7, PLACES)),
        channels=nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH)),
        out=nn.Linear(WIDTH, 3),
    )


def spatial_gating() -> nn.Module:
    """gMLP: one half of the channels, mixed over places, gates the other half."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x)
        u, v = m.inside(x).tanh().chunk(2, -1)
        x = x + m.outside(u * m.over(m.norm(v).transpose(1, 2)).transpose(1, 2))
        return m.out(x.mean(1))

    return Net(
        do,
        embed=nn.Linear(5, WIDTH),
        inside=nn.Linear(WIDTH, 14),
        norm=nn.LayerNorm(7),
        over=nn.Linear(PLACES, PLACES),
        outside=nn.Linear(7, WIDTH),
        out=nn.Linear(WIDTH, 3),
    )


def attention(m: nn.Module, x: Tensor, project: Callable[[Tensor, nn.Module], Tensor]) -> Tensor:
    x = m.embed(x)
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    k, v = project(k, m.keys), project(v, m.values)
    return m.out(m.back((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)).relu().mean(1))


def projected_keys() -> nn.Module:
    """Linformer: keys and values are projected over places, head by head and channel by channel."""
    return linformer(lambda m, x: attention(m, x, lambda k, layer: layer(k.mT).mT))


def heads_among_samples() -> nn.Module:
    """The same with the heads merged into the batch."""

    def project(k: Tensor, layer: nn.Module) -> Tensor:
        merged = k.reshape(-1, PLACES, 4)
        return layer(merged.mT).mT.reshape(-1, 2, 3, 4)

    return linformer(lambda m, x: attention(m, x, project))


def linformer(do: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    each = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "back")}
    projections = {name: nn.Linear(PLACES, 3) for name in ("keys", "values")}
    return Net(do, embed=nn.Linear(5, WIDTH), **each, **projections, out=nn.Linear(WIDTH, 3))


def over_places() -> nn.Module:
    """A convolution, then a linear layer over the places of each channel."""
    return Net(
        lambda m, x: m.out(m.over(m.conv(x.mT).relu()).tanh().mean(1)),
        conv=nn.Conv1d(5, WIDTH, 3),
        over=nn.Linear(PLACES - 2, 3),
        out=nn.Linear(3, 3),
    )


def channels_among_samples() -> nn.Module:
    """The same small convolution over every channel, with batch-norm: channels lie in the batch."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x).mT.relu()
        y = m.second(m.norm(m.first(x.reshape(-1, 1, PLACES))).relu())
        return m.out(m.after(y.reshape(-1, WIDTH, PLACES).mean(2)).relu())

    return Net(
        do,
        embed=nn.Linear(5, WIDTH),
        first=nn.Conv1d(1, 4, 3, padding=1, bias=False),
        norm=nn.BatchNorm1d(4),
        second=nn.Conv1d(4, 1, 3, padding=1),
        after=nn.Linear(WIDTH, 7),
        out=nn.Linear(7, 3),
    )


def channels_before_samples() -> nn.Module:
    """Channels and samples flattened into one axis, the channels outside."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x).permute(2, 0, 1).relu()
        y = m.second(m.first(x.reshape(-1, PLACES)).relu())
        return m.out(y.reshape(WIDTH, -1, 2).permute(1, 2, 0).mean(1))

    layers = {"first": nn.Linear(PLACES, 7), "second": nn.Linear(7, 2)}
    return Net(do, embed=nn.Linear(5, WIDTH), **layers, out=nn.Linear(WIDTH, 3))


def several_axes() -> nn.Module:
    """Units of two layers lie along two other axes of what a third one reads."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        pairs = m.one(x).tanh()[..., :, None] * m.other(x).tanh()[..., None, :]
        return m.out(m.over(pairs.permute(0, 2, 3, 1)).relu().sum(2).mT)

    layers = {"one": nn.Linear(5, WIDTH), "other": nn.Linear(5, 7), "over": nn.Linear(PLACES, 4)}
    return Net(do, **layers, out=nn.Linear(WIDTH, 3))


def called_over_two_widths() -> nn.Module:
    """One layer over the places of two sets of channels."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        a, b = (m.over(layer(x).relu().mT).relu() for layer in (m.one, m.other))
        return m.out(torch.cat([a, b], 1).mean(2))

    layers = {"one": nn.Linear(5, WIDTH), "other": nn.Linear(5, 7), "over": nn.Linear(PLACES, 4)}
    return Net(do, **layers, out=nn.Linear(WIDTH + 7, 3))


def called_over_both_axes() -> nn.Module:
    """One layer over channels and over places, of which there are as many."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.out(m.both(m.both(x).relu().mT).relu().mean(1))

    layers = {"embed": nn.Linear(5, PLACES), "both": nn.Linear(PLACES, PLACES)}
    return Net(do, **layers, out=nn.Linear(PLACES, 3))


def separable_in_time() -> nn.Module:
    """Channel-by-channel convolution, and a linear forecast over time that all channels share."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.each(m.embed(x).mT).relu()
        return m.out(m.trend(x).mT + m.season(x.tanh()).mT)

    layers = {"trend": nn.Linear(PLACES, 4), "season": nn.Linear(PLACES, 4)}
    each = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
    return Net(do, embed=nn.Linear(5, WIDTH), each=each, **layers, out=nn.Linear(WIDTH, 3))


ARCHITECTURES = [
    token_mixing,
    spatial_gating,
    projected_keys,
    heads_among_samples,
    over_places,
    channels_among_samples,
    channels_before_samples,
    several_axes,
    called_over_two_widths,
    called_over_both_axes,
    separable_in_time,
]


def reordered(model: nn.Module, x: Tensor) -> nn.Module:
    """The same function with the units of every space in another order."""
    structure, rng, other = tz.inspect(model, x), np.random.default_rng(7), copy.deepcopy(model)
    for index, space in enumerate(structure.spaces):
        structure.reorder(other, index, rng.permutation(len(space.units)))
    return other


@pytest.mark.parametrize(
    ("make", "options"),
    [*((each, {}) for each in ARCHITECTURES), (token_mixing, {"max_rows": 50}), (heads_among_samples, {"share": 0.5})],
)
def test_a_reordered_copy_is_found(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make().to(DOUBLE).eval()
    data = [sequences(10), sequences(10), sequences(4)]  # the last batch is smaller
    other = reordered(model, data[0])
    options = {"share": 1.0, "progress": False} | options
    zipped = tz.zip([tz.Task("a", model, data), tz.Task("b", other, data)], **options)
    x = sequences(20)
    with torch.no_grad():
        wanted = model(x)
        for task in "ab":
            torch.testing.assert_close(zipped[task](x), wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))
    assert sum(record.cost for record in zipped.history.layers) < 1e-9
    shared = sum(record.shared for record in zipped.history.layers)
    assert shared > 0


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_what_did_not_change_is_solved_again_unchanged(make: Callable[[], nn.Module]) -> None:
    """Least squares of every layer, in a network whose units have only been moved, gives the weights that it has."""
    torch.manual_seed(3)
    data = [sequences(30), sequences(12)]
    member, rng = Member(tz.Task("a", make().to(DOUBLE).eval(), data), 0), np.random.default_rng(1)
    for space, each in enumerate(member.structure.spaces):
        order = rng.permutation(len(each.units))
        member.place(space, space, order, np.arange(len(order)))
    layers = [layer for layer in member.structure.layers if layer.solvable]
    member.observer("auto", 0).survey(layers, {layer.name for layer in layers})
    for layer in layers:
        observer, rows = member.compared(layer, "auto", 0)
        statistics = observer.observe(layer, original=True, rows=rows)
        weights = member.weights(layer)
        solved = least_squares(statistics, weights, 1e-9, bias=layer.bias is not None)
        torch.testing.assert_close(solved, weights, rtol=1e-5, atol=1e-5, msg=lambda m, name=layer.name: f"{name}: {m}")


def test_the_layers_know_what_lies_beside() -> None:
    structure = tz.inspect(several_axes().to(DOUBLE), sequences(3))
    one, other, over, out = structure.layers
    assert (one.beside, other.beside) == ((), ())
    assert over.beside == (*one.spaces, *other.spaces)
    assert out.columns is not None and out.beside == over.spaces
