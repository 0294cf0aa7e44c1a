"""What originals teach follows from output, loss and targets, is said, and can be set."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz
from taskzip.tasks.labels import class_axis, label_loss
from taskzip.training.distillation import distillation_loss, teaching

LABELS = {n: torch.arange(4) % n for n in (2, 3)}


def task(**options: Any) -> tz.Task:
    return tz.Task("t", nn.Linear(2, 2), [torch.zeros(1, 2)], **options)


@pytest.mark.parametrize(
    "output, targets, options, said",
    [
        (torch.randn(4, 3), LABELS[3], {}, "class probabilities along axis 1"),
        (torch.randn(4, 3), None, {}, "values"),  # it may be an embedding
        (torch.randn(4, 3), None, {"loss": F.cross_entropy}, "class probabilities along axis 1"),
        (
            torch.randn(4, 3),
            None,
            {"loss": partial(F.cross_entropy, label_smoothing=0.1)},
            "class probabilities along axis 1",
        ),
        (torch.randn(4, 3).log_softmax(1), None, {"loss": nn.NLLLoss()}, "class probabilities along axis 1"),
        (torch.randn(4, 3).softmax(1), LABELS[3], {}, "values"),
        (torch.randn(4, 3), torch.randn(4, 3).softmax(1), {}, "class probabilities along axis 1"),
        (torch.randn(4, 3), torch.randn(4, 3), {}, "values"),
        (torch.randn(4, 3), LABELS[3] + 5, {}, "values"),  # counts, not classes
        (torch.randn(4, 1), LABELS[2], {}, "values"),
        (torch.randn(4, 1), None, {"loss": nn.CrossEntropyLoss()}, "values"),
        (torch.randn(4), torch.randn(4), {}, "values"),
        (torch.randn(4), LABELS[3], {}, "values"),
        (torch.randn(4, 6, 3), torch.zeros(4, 6).long(), {}, "class probabilities along axis 2"),
        (torch.randn(4, 3, 6), torch.zeros(4, 6).long(), {}, "class probabilities along axis 1"),
        (torch.randn(4, 6, 3), None, {}, "values"),
        (torch.randn(4, 3, 5, 5), torch.zeros(4, 5, 5).long(), {}, "class probabilities along axis 1"),
        (torch.randn(4, 5, 5, 3), torch.zeros(4, 5, 5).int(), {}, "class probabilities along axis 3"),
        (torch.randn(4, 3, 5, 5), None, {"loss": F.cross_entropy}, "class probabilities along axis 1"),
        ({"logits": torch.randn(4, 6, 6)}, torch.zeros(4, 6).long(), {}, "class probabilities along axis 2 of logits"),
        ({"logits": torch.randn(4, 6, 3)}, None, {}, "class probabilities along axis 2 of logits"),
        ({"logits": torch.randn(4, 3, 5, 5)}, None, {}, "class probabilities along axis 1 of logits"),
        ({"logits": torch.randn(4, 1)}, None, {}, "values of logits"),
        (torch.randn(4, 3), None, {"loss": nn.BCEWithLogitsLoss()}, "answers of yes or no"),
        (torch.randn(4), None, {"loss": F.binary_cross_entropy_with_logits}, "answers of yes or no"),
        (torch.randn(4, 3), LABELS[3], {"loss": F.mse_loss}, "values"),
        (torch.randn(4, 3), LABELS[3], {"loss": lambda y, t: y.sum()}, "values"),
        ((torch.randn(4, 3), torch.randn(4, 7)), LABELS[3], {}, "values of 0, values of 1"),
        (
            (torch.randn(4, 3), torch.randn(4, 7)),
            (LABELS[3], torch.randn(4, 7)),
            {},
            "class probabilities along axis 1 of 0, values of 1",
        ),
        ({"a": torch.randn(4, 3), "n": torch.arange(4), "none": torch.zeros(4, 0)}, None, {}, "values of a"),
        (torch.randn(4, 3), None, {"teach": -1}, "class probabilities along axis 1"),
        (torch.randn(4, 3), LABELS[3], {"teach": "values"}, "values"),
        (torch.randn(4, 3), LABELS[3], {"teach": "binary"}, "answers of yes or no"),
        (torch.randn(4, 3), LABELS[3], {"teach": F.l1_loss}, "l1_loss"),
        (torch.randn(4, 3, dtype=torch.cfloat), None, {}, "values"),
    ],
)
def test_what_is_taught(output: Any, targets: Any, options: Any, said: str) -> None:
    assert str(teaching(task(**options), [(output, targets)])) == said


def literal(kind: str, y: Tensor, t: Tensor, axis: int) -> float:
    y, t = y.double(), t.double()
    if kind == "classes":
        p, q = t.softmax(axis), y.softmax(axis)
        return float((p * (p.log() - q.log())).sum(axis).mean())
    p, q = t.sigmoid(), y.sigmoid()
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


@pytest.mark.parametrize(
    "teach, shape", [(1, (5, 3)), (-1, (5, 4, 3)), (1, (5, 3, 2, 2)), ("binary", (5, 3)), ("binary", (5,))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_divergences_are_those_of_the_book(teach: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, t = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    expected = literal("binary" if teach == "binary" else "classes", y, t, teach if teach != "binary" else 0)
    assert float(distillation_loss(task(teach=teach), y, t)) == pytest.approx(expected, rel=1e-4)
    assert float(distillation_loss(task(teach=teach), t, t)) == pytest.approx(0, abs=1e-6)


def test_errors_of_values_are_relative() -> None:
    for t in (torch.randn(50, 2) * 10 + 3, torch.randn(50), torch.randn(50, 2, dtype=torch.cfloat)):
        expected = 4 / float((t - t.mean()).abs().square().mean())
        assert float(distillation_loss(task(), t + 2, t)) == pytest.approx(expected, rel=1e-4)
    imaginary = torch.zeros(5, 1, dtype=torch.cfloat)
    assert float(distillation_loss(task(), imaginary + 2j, imaginary)) == pytest.approx(4)


@pytest.mark.parametrize(
    "taught, expected", [(torch.full((4, 2), 3.0), 1 / 9), (torch.zeros(4, 2), 1.0), (torch.full((1, 1), 2.0), 0.25)]
)
def test_a_teacher_who_never_changes(taught: Tensor, expected: float) -> None:
    assert float(distillation_loss(task(), taught + 1, taught)) == pytest.approx(expected)


def test_what_is_masked_by_infinities_adds_nothing() -> None:
    taught = torch.randn(4, 3)
    taught[0, 1] = -torch.inf
    y = (taught + torch.randn(4, 3)).requires_grad_()
    for teach in (1, "values"):
        (gradient,) = torch.autograd.grad(distillation_loss(task(teach=teach), y, taught), y)
        assert gradient.isfinite().all() and gradient[0, 1] == 0 and gradient.any()


def test_outputs_of_other_forms_are_refused() -> None:
    with pytest.raises(tz.InputError, match=r"\(4, 1\) and \(4,\): outputs to distil must be of one form"):
        distillation_loss(task(), torch.randn(4, 1), torch.randn(4))
    with pytest.raises(tz.InputError, match="teach=2 is no axis of an output of shape"):
        distillation_loss(task(teach=2), torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("teach", ["classes", True, None, 1.5])
def test_what_cannot_be_taught(teach: Any) -> None:
    with pytest.raises(tz.InputError, match=r"teach=.* is not known: choose 'auto', 'values', 'binary', the axis"):
        task(teach=teach)


class Net(nn.Module):
    """Outputs of any form, of inputs [n, 6]."""

    def __init__(self, form: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.form = form
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 1 if form in ("[n, 1]", "[n]") else 12)

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.body(x))
        if self.form == "[n]":
            return y.flatten()
        if self.form == "tokens":
            return y.unflatten(1, (4, 3))
        if self.form == "map":
            return y.view(-1, 3, 2, 2)
        return (y[:, :5], {"more": y[:, 5:], "number": y.argmax(1)}) if self.form == "several" else y


@pytest.mark.parametrize("form", ["[n, 1]", "[n]", "[n, k]", "tokens", "map", "several"])
def test_whatever_is_taught_is_learned(form: str) -> None:
    models = [Net(form, seed).eval() for seed in (0, 1)]
    data = [torch.randn(32, 6) for _ in range(6)]
    tasks = [tz.Task(name, model, data) for name, model in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=1.0, progress=False)

    def far() -> float:
        with torch.no_grad():
            return sum(float(distillation_loss(t, zipped[t.name](x), t.model(x))) for t in tasks for x in data)

    before = far()
    tz.retrain(zipped, tasks, steps=60, loss="distill", progress=False)
    assert far() < 0.8 * before
    assert zipped.history.later[-1]["teaches"]["a"].startswith("values")


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, axis", [((4, 3), 1), ((4, 3, 6), 1), ((4, 6, 3), 2), ((4, 3, 5, 5), 1), ((4, 5, 5, 3), 3)]
)
def test_the_default_loss_finds_the_classes(shape: tuple[int, ...], axis: int) -> None:
    output = torch.randn(shape)
    targets = torch.randint(3, shape[:axis] + shape[axis + 1 :])
    assert class_axis(output, targets) == axis
    torch.testing.assert_close(label_loss(task(), output, targets), F.cross_entropy(output.movedim(axis, 1), targets))
    soft = torch.randn(shape).softmax(axis)
    expected = F.cross_entropy(output.movedim(axis, 1), soft.movedim(axis, 1))
    torch.testing.assert_close(label_loss(task(), output, soft), expected)


@pytest.mark.parametrize(
    "output, targets",
    [
        ((4, 1), torch.randn(4, 1)),
        ((4,), torch.randn(4)),
        ((4, 1), LABELS[2]),
        ((4, 3), torch.randn(4, 3)),
        ((4, 3), LABELS[3][:3]),
    ],
)
def test_labels_that_are_no_classes_need_a_loss(output: Any, targets: Tensor) -> None:
    with pytest.raises(tz.InputError, match=r"no class numbers for an output of .*: give the task its loss"):
        label_loss(task(), torch.randn(output), targets)


def test_a_loss_that_fails_names_the_shapes() -> None:
    with pytest.raises(
        tz.InputError, match=r"its loss fails on an output of float32\[4, 3\] and targets of float32\[4, 2\]"
    ):
        label_loss(task(loss=F.binary_cross_entropy_with_logits), torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(tz.InputError, match=r"a tuple, has 2 tensors that may be the answer \(0, 1\)"):
        label_loss(task(), (torch.randn(4, 3), torch.randn(4, 3)), LABELS[3])
