"""Which layers of several networks belong together: by order, name or mapping; and networks that differ in depth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph.orders import Net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import Layer, Structure
from taskzip.zipping.correspondence import correspond

DOUBLE = torch.float64


def layer(name: str) -> Layer:
    return Layer(
        name=name,
        weight=f"{name}.weight",
        bias=None,
        kind="linear",
        units=4,
        inputs=6,
        kernel=(),
        calls=1,
        rows=np.empty(0, np.int64),
        spaces=(),
        columns=None,
        reads_input=False,
        pinned="",
    )


def structure(letters: str) -> Structure:
    return Structure(tuple(layer(name) for name in letters), (), {})


def together(how: Any, *networks: str) -> list[str]:
    """Networks as words, their layers as letters; a joint layer as the letters of all tasks, "-" for none."""
    names = ["one", "two", "three", "four"][: len(networks)]
    joint = correspond(names, [structure(letters) for letters in networks], how)
    return ["".join(each[t].name if t in each else "-" for t in range(len(networks))) for each in joint]


# --- by order and by name ------------------------------------------------------------------------------------------


def test_by_order() -> None:
    assert together("order", "abc", "xyz") == ["ax", "by", "cz"]
    assert together("order", "abc", "x", "pq") == ["axp", "b-q", "c--"]
    assert together("order", "a", "abc") == ["aa", "-b", "-c"]
    assert together("order", "abc", "cba") == ["ac", "bb", "ca"]


def test_by_name() -> None:
    assert together("name", "abc", "abc") == ["aa", "bb", "cc"]
    assert together("name", "abcd", "bd") == ["a-", "bb", "c-", "dd"]
    assert together("name", "ab", "xy") == ["a-", "b-", "-x", "-y"]
    assert together("name", "abe", "bce", "ade") == ["a-a", "bb-", "-c-", "--d", "eee"]


def test_by_default_the_order_decides_for_the_same_kinds_and_else_likeness() -> None:
    assert together(None, "abc", "cab") == ["ac", "ba", "cb"]
    assert together(None, "abc", "ac") == ["aa", "b-", "cc"]
    assert together(None, "ac", "abc") == ["aa", "-b", "cc"]
    assert together(None, "abc", "ac", "abc") == ["aaa", "b-b", "ccc"]
    assert together(None, "abc", "bc", "xbcz") == ["a-x", "bbb", "ccc", "--z"]


@st.composite
def networks(draw: st.DrawFn) -> list[str]:
    letters = "".join(draw(st.permutations("abcdefgh")))
    picks = draw(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=2, max_size=4))
    words = ["".join(itertools.compress(letters, pick)) for pick in picks]
    return words if any(words) else [letters, *words[1:]]


@given(networks())
def test_names_keep_the_order_of_every_network(words: list[str]) -> None:
    joint = together("name", *words)
    for t, word in enumerate(words):
        assert "".join(each[t] for each in joint if each[t] != "-") == word
    for each in joint:
        assert len(set(each) - {"-"}) == 1
    names = ["".join(set(each) - {"-"}) for each in joint]
    assert len(set(names)) == len(names)


@given(networks())
def test_likeness_keeps_the_order_of_every_network_and_does_not_depend_on_theirs(words: list[str]) -> None:
    joint = together(None, *words)
    for t, word in enumerate(words):
        assert "".join(each[t] for each in joint if each[t] != "-") == word
    turned = together(None, *words[::-1])
    assert {each[::-1] for each in turned} == set(joint)


@given(networks(), st.integers(0, 2**16))
def test_a_mapping_does_what_the_names_do(words: list[str], seed: int) -> None:
    """With other names in each network, and a dict that says which is which."""
    others = [word.translate({ord(c): ord(c) + 0x100 * t for c in word}) for t, word in enumerate(words)]
    tasks = ["one", "two", "three", "four"]
    how = {
        first: {tasks[t]: chr(ord(first) + 0x100 * t) for t in range(1, len(words)) if first in words[t]}
        for first in np.random.default_rng(seed).permutation(list(words[0])).tolist()
    }
    joint = together(how, *others)
    plain = ["".join("-" if c == "-" else chr(ord(c) - 0x100 * t) for t, c in enumerate(each)) for each in joint]
    for t, word in enumerate(words):
        assert "".join(each[t] for each in plain if each[t] != "-") == word
    for first in words[0]:
        (each,) = (each for each in plain if each[0] == first)
        assert each == "".join(first if first in word else "-" for word in words)


def test_one_order_for_names_that_cross() -> None:
    with pytest.raises(tz.InputError, match=r"against the order .* run: 'one' waits at 'a'; 'two' waits at 'b'"):
        together("name", "abc", "bac")
    with pytest.raises(tz.InputError, match=r"'one' waits at 'a'; 'two' waits at 'b'; 'three' waits at 'c'"):
        together("name", "ab", "bc", "ca")  # each two agree, all three do not
    assert together("name", "ab", "bc", "ac") == ["a-a", "bb-", "-cc"]


def test_nothing_to_zip() -> None:
    with pytest.raises(tz.InputError, match="no linear or convolution layers"):
        together(None, "", "")
    assert together(None, "", "ab") == ["-a", "-b"]


# --- by a mapping --------------------------------------------------------------------------------------------------


def test_a_mapping_of_two_tasks() -> None:
    assert together({"a": "x", "b": "y"}, "ab", "xy") == ["ax", "by"]
    assert together({"b": "x"}, "abc", "xyz") == ["a-", "bx", "c-", "-y", "-z"]
    assert together({"a": "z"}, "abc", "xyz") == ["-x", "-y", "az", "b-", "c-"]
    assert together({"b": {"two": "x"}}, "ab", "x") == ["a-", "bx"]
    assert together({}, "ab", "x") == ["a-", "b-", "-x"]
    assert together({"a": "b"}, "ab", "ab") == ["-a", "ab", "b-"]


def test_a_mapping_of_three_tasks() -> None:
    how = {"a": {"two": "p"}, "b": {"three": "y", "two": "q"}}
    assert together(how, "ab", "pq", "xy") == ["ap-", "--x", "bqy"]
    assert together({"a": {"three": "x"}}, "a", "p", "x") == ["a-x", "-p-"]


def test_a_mapping_that_crosses() -> None:
    with pytest.raises(tz.InputError, match=r"'one' waits at 'a'; 'two' waits at 'x'.* Name other pairs in `layers`"):
        together({"a": "y", "b": "x"}, "ab", "xy")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"q": "x"}, r"layers names layer 'q'; the layers of task 'one' are a, b\."),
        ({"a": "q"}, r"layers\['a'\] names layer 'q'; the layers of task 'two' are x, y\."),
        ({"a": {"two": "q"}}, r"layers\['a'\] names layer 'q'; the layers of task 'two' are x, y\."),
        ({"a": {"six": "x"}}, r"layers\['a'\] names task 'six': known are two\."),
        ({"a": {"one": "b"}}, r"layers\['a'\] names task 'one': known are two\."),
        ({"a": "x", "b": "x"}, r"layers gives layer 'x' of task 'two' two partners\."),
        ({"a": 3}, r"layers\['a'\] must be a layer name or a dict by task name, not 3\."),
        ({"a": None}, r"layers\['a'\] must be a layer name or a dict by task name, not None\."),
        ({"a": {"two": 3}}, r"layers\['a'\] names layer 3; the layers of task 'two' are x, y\."),
        ({3: "x"}, r"layers names layer 3; the layers of task 'one' are a, b\."),
    ],
)
def test_a_mapping_that_cannot_be_used(how: Mapping[Any, Any], message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        together(how, "ab", "xy")


def test_a_name_alone_does_not_say_of_which_of_three_tasks() -> None:
    with pytest.raises(
        tz.InputError, match=r"layers\['a'\] = 'x' does not say of which task: with 3 tasks give a dict"
    ):
        together({"a": "x"}, "ab", "xy", "xy")


# --- zipping networks that differ ----------------------------------------------------------------------------------


def fc(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for reads, units in itertools.pairwise(widths):
        layers += [nn.Linear(reads, units), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(DOUBLE)


def vectors(samples: int, width: int = 5) -> Tensor:
    return torch.randn(samples, width, dtype=DOUBLE)


def run_zip(models: Sequence[nn.Module], x: Sequence[Tensor], **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task("abc"[t], model, [each]) for t, (model, each) in enumerate(zip(models, x, strict=True))]
    zipped = tz.zip(tasks, **{"share": 1.0, "progress": False, "max_rows": None, **options})
    for task, each in zip(zipped, x, strict=True):
        assert torch.isfinite(zipped[task](each)).all()
        assert (zipped.materialize(task)(each) - zipped[task](each)).abs().max() < 1e-12
    return zipped


def shared(zipped: tz.ZippedModel) -> dict[tuple[str, ...], int]:
    return {record.names: record.shared for record in zipped.history.layers}


def count(*models: nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


def test_three_layers_and_five_by_default() -> None:
    """Hidden layers with hidden layers that read the same, the output with the output."""
    models, x = [fc(5, 8, 6, 3), fc(5, 7, 6, 6, 5, 2)], [vectors(40), vectors(50)]
    zipped = run_zip(models, x, own_scale=False)
    assert shared(zipped) == {("0", "0"): 7, ("2", "2"): 6, ("", "4"): 0, ("", "6"): 0, ("4", "8"): 0}
    notes = {record.names: record.note for record in zipped.history.layers}
    assert notes["", "4"] == notes["", "6"] == "no other network has such a layer"
    assert notes["4", "8"] == ""  # an output is nothing to explain
    by_name = run_zip(models, x, layers="name")
    notes = {record.names: record.note for record in by_name.history.layers}
    assert notes["4", "4"] == "a: an output of the network" and notes["", "8"] == ""
    saved = 7 * 5 + 7 + 6 * 7 + 6
    assert zipped.parameter_count() == count(*models) - saved
    assert [record.units for record in zipped.history.layers] == [(8, 7), (6, 6), (0, 6), (0, 5), (3, 2)]
    assert [record.before for record in zipped.history.layers][2:4] == [6 * 6 + 6, 6 * 5 + 5]
    assert "stays private" in zipped.summary()


def test_three_layers_and_five_by_a_mapping() -> None:
    models, x = [fc(5, 8, 6, 3), fc(5, 7, 6, 6, 5, 2)], [vectors(40), vectors(50)]
    zipped = run_zip(models, x, layers={"0": "0", "2": "2", "4": "8"}, share=0.5)
    assert shared(zipped) == {("0", "0"): 4, ("2", "2"): 3, ("", "4"): 0, ("", "6"): 0, ("4", "8"): 0}
    assert zipped.history.settings["layers"] == {"0": "0", "2": "2", "4": "8"}
    with pytest.warns(tz.TaskzipWarning, match="nothing could be shared"):
        assert run_zip(models, x, layers={}).parameter_count() == count(*models)


def test_a_layer_whose_partner_reads_what_is_private_stays_private() -> None:
    models, x = [fc(5, 8, 6, 3), fc(5, 7, 6, 6, 5, 2)], [vectors(40), vectors(50)]
    zipped = run_zip(models, x, layers={"0": "0", "2": "4"})
    assert shared(zipped)["0", "0"] == 7
    (record,) = (record for record in zipped.history.layers if record.names == ("2", "4"))
    assert record.shared == 0 and "no inputs in common" in record.note


def test_a_deeper_copy_shares_what_it_copies() -> None:
    """The same layers, and two more behind them."""
    model, x = fc(5, 8, 6, 3), vectors(60)
    deeper = fc(5, 8, 6, 4, 3, 2)
    with torch.no_grad():
        order, other = torch.randperm(8), torch.randperm(6)
        deeper[0].weight.copy_(model[0].weight[order])
        deeper[0].bias.copy_(model[0].bias[order])
        deeper[2].weight.copy_(model[2].weight[other][:, order])
        deeper[2].bias.copy_(model[2].bias[other])
    for how in (None, "name", "order", {"0": "0", "2": "2"}):
        zipped = run_zip([deeper, model] if how == "order" else [model, deeper], [x, x], layers=how)
        assert [record.shared for record in zipped.history.layers][:2] == [8, 6]
        assert max(record.cost for record in zipped.history.layers) < 1e-10
        wanted = [deeper, model] if how == "order" else [model, deeper]
        for task, original in zip("ab", wanted, strict=True):
            assert (zipped[task](x) - original(x)).abs().max() < 1e-8


def residual(blocks: Sequence[str], width: int = 6) -> Net:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks.values():
            x = x + block[1](block[0](x.relu()).relu())
        return m.out(x.relu().mean((2, 3)))

    def conv(read: int, units: int) -> nn.Conv2d:
        return nn.Conv2d(read, units, 3, padding=1)

    made = {name: nn.ModuleList([conv(width, 5), conv(5, width)]) for name in blocks}
    model = Net(do, stem=conv(2, width), blocks=nn.ModuleDict(made), out=nn.Linear(width, 3)).to(DOUBLE)
    return model


@pytest.mark.parametrize("way", ["coupled", "independent"])
def test_residual_networks_of_different_depth(way: str) -> None:
    models = [residual("pqr"), residual("pr", 7), residual("q", 5)]
    x = [torch.randn(12 + t, 2, 4 + t, 5, dtype=DOUBLE) for t in range(3)]
    zipped = run_zip(models, x, share=0.6, residual=way)
    found = shared(zipped)
    assert found["stem", "stem", "stem"] >= 3
    assert found["blocks.p.0", "blocks.p.0", ""] == 3 and found["blocks.p.1", "blocks.p.1", ""] == 4
    assert found["blocks.q.0", "", "blocks.q.0"] == 3 and found["blocks.q.1", "", "blocks.q.1"] == 3
    assert found["out", "out", "out"] == 0
    assert zipped.parameter_count() < count(*models)


@pytest.mark.parametrize("way", ["coupled", "independent"])
def test_a_block_more_that_does_nothing(way: str) -> None:
    """Two copies, one with a block that adds nothing: everything else is found."""
    model, deeper = residual("pq"), residual("paq")
    x = torch.randn(30, 2, 4, 4, dtype=DOUBLE)
    with torch.no_grad():
        for name, parameter in deeper.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if ".a.1" in name else model.state_dict().get(name, parameter))
    structure, rng = tz.inspect(deeper, x), np.random.default_rng(1)
    for index, space in enumerate(structure.spaces):
        structure.reorder(deeper, index, rng.permutation(len(space.units)))
    zipped = run_zip([deeper, model], [x, x], residual=way, own_scale=False)
    for task in "ab":
        assert (zipped[task](x) - model(x)).abs().max() < 1e-8
    assert max(record.cost for record in zipped.history.layers) < 1e-10
    own = count(deeper.blocks["a"]) + 2 * count(model.out)
    assert zipped.parameter_count() == count(model) - count(model.out) + own


class Pooled(nn.Module):
    """For images of any size; `flat` reads every pixel of the last map instead."""

    def __init__(self, channels: int, flat: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.flat = flat
        self.hidden, self.out = nn.Linear(6 * max(flat, 1), 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.out(self.hidden(x.flatten(1) if self.flat else x.mean((2, 3))).relu())


def test_other_channels_and_other_sizes_of_images() -> None:
    x = [torch.randn(14, 1, 4, 4, dtype=DOUBLE), torch.randn(11, 3, 5, 6, dtype=DOUBLE)]
    models = [Pooled(1).to(DOUBLE), Pooled(3).to(DOUBLE)]
    zipped = run_zip(models, x, own_scale=False)
    assert [record.shared for record in zipped.history.layers] == [5, 6, 7, 0]
    assert count(*models) - zipped.parameter_count() == 5 * 9 + 5 + 6 * 45 + 6 + 7 * 6 + 7  # one channel in common

    flat = [Pooled(1, 16).to(DOUBLE), Pooled(3, 30).to(DOUBLE)]
    zipped = run_zip(flat, x)
    assert [record.shared for record in zipped.history.layers] == [5, 6, 0, 0]
    assert "no inputs in common" in zipped.history.layers[2].note


def test_share_names_joint_layers() -> None:
    models, x = [fc(5, 8, 6, 3), fc(5, 7, 6, 6, 5, 2)], [vectors(40), vectors(50)]

    def numbers(share: Any, **options: Any) -> list[int]:
        return [record.shared for record in run_zip(models, x, share=share, **options).history.layers]

    assert numbers({"0": 3, "2": 0.5}) == numbers({"[02]": 3}) == numbers({"?": 3}) == [3, 3, 0, 0, 0]
    with pytest.raises(tz.InputError, match=r"share names layer 'x\.\*'; the layers that can be named are 0, 2, 4\."):
        numbers({"x.*": 0.5})
    with pytest.raises(tz.InputError, match=r"share names layer '8'; the layers that can be named are 0, 2, 4\."):
        numbers({"0": 3, "8": 0})
    with pytest.raises(tz.InputError, match=r"layer '4' cannot be shared .a: an output of the network"):
        numbers({"4": 1})
    with pytest.warns(tz.TaskzipWarning, match="one unit"):
        assert numbers({"0": 1, "2": 0.5}) == [1, 3, 0, 0, 0]
    assert numbers({"0": 3}, retrain=tz.Retraining({"*": 1}, loss="distill"))[0] == 3
    models, x = models[::-1], x[::-1]
    with pytest.raises(tz.InputError, match=r"layer '6' cannot be shared .no other network has such a layer"):
        numbers({"0": 3, "6": 1})


def test_layers_that_are_called_alike_but_do_not_correspond() -> None:
    """The second network's blocks.1 is one that the first does not have; the first's blocks.1 is its blocks.2."""
    models, x = [residual("01"), residual("012")], [torch.randn(9, 2, 4, 4, dtype=DOUBLE)] * 2
    blocks = {"0": "0", "1": "2"}
    how = {f"blocks.{a}.{k}": f"blocks.{b}.{k}" for a, b in blocks.items() for k in range(2)}
    zipped = run_zip(models, x, layers=how | {"stem": "stem", "out": "out"}, share={"stem": 3, "blocks.1.1": 2})
    assert shared(zipped)["blocks.1.1", "blocks.2.1"] == 2
    assert shared(zipped)["", "blocks.1.1"] == 0


def test_networks_of_different_depth_are_saved_and_loaded(tmp_path: Path) -> None:
    models, x = [fc(5, 8, 6, 3), fc(5, 7, 6, 6, 5, 2), fc(5, 4, 3)], [vectors(40), vectors(50), vectors(30)]
    zipped = run_zip(models, x, layers={"0": {"b": "0", "c": "0"}, "2": {"b": "2"}}, share=0.5)
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {"a": fc(5, 8, 6, 3), "b": fc(5, 7, 6, 6, 5, 2), "c": fc(5, 4, 3)})
    for task, each in zip("abc", x, strict=True):
        assert torch.equal(loaded[task](each), zipped[task](each))
    assert loaded.history == zipped.history
    assert loaded.history.settings["layers"] == {"0": {"b": "0", "c": "0"}, "2": {"b": "2"}}


@pytest.mark.parametrize("how", ["names", 3, True, ["0"], ("order",)])
def test_what_is_no_way_to_correspond(how: Any) -> None:
    with pytest.raises(tz.InputError, match=r"layers=.* is not known: choose one of None, 'order', 'name'"):
        run_zip([fc(5, 6, 3), fc(5, 6, 3)], [vectors(9), vectors(9)], layers=how)
