"""What an output holds, and retraining of networks whose outputs are packed in other ways than as a tensor."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outputs_of_models import PACKINGS, Model, Plain, token_batches
from torch import nn

import taskzip as tz
from taskzip.tasks.outputs import answers, named_tensors, own_loss

X, Y = torch.randn(4, 3), torch.randn(4, 2)
Two = namedtuple("Two", ["x", "y"])


@pytest.mark.parametrize(
    "output, names",
    [
        (X, [""]),
        ((X, (Y, 3)), ["0", "1.0"]),
        ({"a": X, "b": [Y]}, ["a", "b.0"]),
        (Two(X, Y), ["x", "y"]),
        (SimpleNamespace(a=X, _b=Y), ["a"]),
        (Plain(X, (Y,)), ["logits", "hidden_states.0"]),
        ("text", []),
        (nn.Linear(2, 2), []),
    ],
)
def test_the_tensors_of_an_output(output: Any, names: list[str]) -> None:
    assert [name for name, _ in named_tensors(output)] == names


def test_objects_that_refer_to_themselves_end() -> None:
    output = SimpleNamespace(x=X)
    output.me = output
    assert [name for name, _ in named_tensors(output)] == ["x"]


@pytest.mark.parametrize(
    "output, names",
    [
        ({"loss": X.sum(), "logits": Y, "hidden_states": (X,)}, ["logits"]),
        ({"start_logits": Y, "end_logits": Y, "loss": X.sum()}, ["start_logits", "end_logits"]),
        ({"last_hidden_state": X, "hidden_states": (X,), "past_key_values": (X, X)}, ["last_hidden_state"]),
        ({"last_hidden_state_of_all": X, "decoder_attentions": (X,), "loss": X}, ["last_hidden_state_of_all"]),
        ((X.sum(), Y), ["1"]),
        ((torch.arange(3), Y, X.to(torch.cfloat)), ["1", "2"]),
        (torch.arange(3), []),
    ],
)
def test_which_tensors_are_answers(output: Any, names: list[str]) -> None:
    assert list(answers(output)) == names


def test_the_loss_of_a_network() -> None:
    assert own_loss(X) is None and own_loss((X, Y)) is None and own_loss({"loss": None}) is None
    assert own_loss({"loss": X}) == X.mean() and own_loss(SimpleNamespace(loss=X.sum())) == X.sum()


@pytest.mark.parametrize(
    "packing, pooled, loss",
    [
        *((each, True, "distill") for each in PACKINGS),
        *((each, False, "labels") for each in PACKINGS),
        ("unknown", False, "distill"),
        ("registered", True, "labels"),
    ],
)
def test_models_are_zipped_and_retrained(packing: str, pooled: bool, loss: Any) -> None:
    models = [Model(packing, seed, pooled=pooled).eval() for seed in (0, 1)]
    data = token_batches(2, pooled=pooled)[:1]  # one batch is watched on itself, so that to learn it is enough
    tasks = [tz.Task(name, model, data) for name, model in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    assert any(record.shared for record in zipped.history.layers)

    @torch.no_grad()
    def far() -> float:
        pairs = [
            (zipped[t](**b).logits if packing != "dict" else zipped[t](**b)["logits"], b) for t in "ab" for b in data
        ]
        if loss == "labels":
            return sum(float(F.cross_entropy(y.flatten(0, -2), b["labels"].flatten())) for y, b in pairs)
        wanted = [Model("dict", seed, pooled=pooled)(**b)["logits"] for seed in (0, 1) for b in data]
        return sum(
            float(F.kl_div(y.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="sum"))
            for (y, _), w in zip(pairs, wanted, strict=True)
        )

    before = far()
    tz.retrain(zipped, tasks, steps=40, loss=loss, step_size=3e-2, progress=False)
    assert far() < (0.97 if loss == "labels" else 0.8) * before
    record = zipped.history.later[-1]
    said = f"class probabilities along axis {1 if pooled else 2} of logits"
    assert record["teaches"] == ({} if loss == "labels" else {"a": said, "b": said})


@pytest.mark.parametrize("given", ["logits", "whole"])
def test_with_a_forward_and_labels_beside(given: str) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        output = model(batch[0]["input_ids"])
        return output.logits if given == "logits" else output

    data = [({"input_ids": b["input_ids"]}, b["labels"]) for b in token_batches(2)]
    tasks = [tz.Task(t, Model("registered", i).eval(), data, forward=forward) for i, t in enumerate("ab")]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    for loss in ("labels", "distill"):
        tz.retrain(zipped, tasks, steps=8, loss=loss, progress=False)
        held_out = zipped.history.later[-1]["held_out_loss"]
        assert held_out["after"] <= held_out["before"]
    assert tz.measure(zipped, tasks, dict.fromkeys("ab", data))["a"]["samples"] == 48


def test_losses_of_torch_get_the_answer_and_others_the_output() -> None:
    data = token_batches(2)
    seen = []

    def own(output: Any, targets: Any) -> torch.Tensor:
        seen.append(output)
        return F.cross_entropy(output.logits, targets)

    for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy, own):
        tasks = [tz.Task(t, Model("unknown", i).eval(), data, loss=loss) for i, t in enumerate("ab")]
        tz.retrain(tz.zip(tasks, share=1.0, progress=False), tasks, steps=2, progress=False)
    assert seen and all("logits" in output for output in seen)


def test_an_output_without_tensors_is_refused() -> None:
    class Secret:
        __slots__ = ("tensor",)

    class Net(Model):
        def forward(self, input_ids: torch.Tensor, labels: Any = None) -> Any:
            super().forward(input_ids)
            return Secret()

    tasks = [tz.Task(t, Net("dict", i).eval(), token_batches(0)) for i, t in enumerate("ab")]
    with pytest.raises(tz.InputError, match="task 'a': its output, a Secret, holds no tensor"):
        tz.zip(tasks, share=1.0, progress=False)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=5
    )
    models = [transformers.BertForSequenceClassification(config).eval() for _ in "ab"]
    tasks = [tz.Task(t, model, token_batches(1)) for t, model in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    for loss in ("labels", "distill"):
        tz.retrain(zipped, tasks, steps=4, loss=loss, progress=False)
