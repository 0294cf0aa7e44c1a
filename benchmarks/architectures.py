"""What the analysis finds in architectures that people use: one row each, and a check that it is right.

    python benchmarks/architectures.py [--zip] [names ...]

Needs torchvision, timm and transformers (none of which the package needs). Weights are random; norms and their
statistics are drawn, so that a wrong order shows. The columns:

    seconds     of the analysis, torch.export included
    free        share of the layers' weights of which the rows or the columns may be re-ordered
    rows        share of which the rows may be
    shareable   share of the layers' weights that lie in rows that `tz.zip` can share
    hidden      the same, with the weights of output layers left out
    change      largest change of an output, relative to the largest output, in float64, after all spaces were put in
                random orders
    wrong       the same where one layer is left out of the orders: the least of five, to show that it would be seen

With --zip, two instances from different seeds are zipped with share=0.5, on 16 images of 64x64 (or what is the least):

    seconds     of zipping
    apart       parameters of the two networks, in millions, and then of the joint one
    loads       whether the file gives the very same outputs again
    plain       largest difference of a materialized copy's outputs from the joint network's, relative
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import taskzip as tz
from taskzip.graph import OUTPUT, Structure, analyse

Made = tuple[nn.Module, Any]


SIZE = 224
"""Of images; smaller for zipping."""


def torchvision(name: str, least: int = 64, **options: Any) -> Callable[[], Made]:
    """A torchvision model."""

    def make() -> Made:
        size = max(SIZE, least)
        import_torchvision()
        from torchvision import models

        if name.startswith("vit"):
            options["image_size"] = size
        return models.get_model(name, weights=None, **options), torch.randn(2, 3, size, size)

    return make


def timm(name: str) -> Callable[[], Made]:
    """A timm model."""

    def make() -> Made:
        import_torchvision()
        import timm as library

        sized = {"img_size": SIZE} if name.startswith("vit") else {}
        return library.create_model(name, pretrained=False, **sized), torch.randn(2, 3, SIZE, SIZE)

    return make


def hugging_face(name: str, **options: Any) -> Callable[[], Made]:
    """A transformers model from a small config; nothing is downloaded."""

    def make() -> Made:
        import_torchvision()
        import transformers as library

        config = getattr(library, name.split("For")[0] + "Config")(**options)
        model = getattr(library, name)(config)
        if "Image" in name:
            return model, {"pixel_values": torch.randn(2, 3, 64, 64)}
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 8:] = 0
        return model, {"input_ids": torch.randint(90, (2, 12)), "attention_mask": mask}

    return make


_kept = []


def import_torchvision() -> None:
    """Import it, for the others too, which import it themselves."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        define_detection_operators()


def define_detection_operators() -> None:
    """What `import torchvision` looks for and its CUDA build cannot register beside a CPU build of torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]


TORCHVISION = [
    *("alexnet", "vgg16_bn", "resnet18", "resnet50", "wide_resnet50_2", "densenet121", "mobilenet_v2"),
    *("mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_1"),
    *("convnext_tiny", "vit_b_16", "swin_t"),
]
TEXT = {"vocab_size": 90, "max_position_embeddings": 32}

MODELS: dict[str, Callable[[], Made]] = {
    **{name: torchvision(name) for name in TORCHVISION},
    "googlenet": torchvision("googlenet", init_weights=False),
    "inception_v3": torchvision("inception_v3", least=96, init_weights=False),
    **{f"timm {name}": timm(name) for name in ("resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224")},
    "hf ResNet": hugging_face(
        "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 2, 1]
    ),
    "hf ViT": hugging_face(
        "ViTForImageClassification",
        image_size=64,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    ),
    "hf BERT": hugging_face(
        "BertForSequenceClassification",
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        **TEXT,
    ),
    "hf DistilBERT": hugging_face(
        "DistilBertForSequenceClassification", dim=48, n_layers=2, n_heads=4, hidden_dim=96, **TEXT
    ),
}


def call(model: nn.Module, batch: Any) -> Any:
    """How each of them is called."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def drawn(model: nn.Module, batch: Any) -> nn.Module:
    """Biases, norms, scales and the like are all alike when new: draw them around where they are.

    Statistics are those of the batch, without which the signal dies on its way and no wrong order would be seen.
    """
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() < 2 or (tensor == tensor.flatten()[0]).all():
                tensor.add_(0.1 * torch.randn_like(tensor))
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train().momentum = 1.0
        call(model, batch)
    return model.eval()


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors that it gives."""
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(call(model, batch)) if isinstance(leaf, Tensor)]


def changes(model: nn.Module, structure: Structure, batch: Any) -> tuple[float, float]:
    """How much the outputs change in random orders, and at the least where one layer is left out of them."""
    batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
    model.double()
    before = outputs(model, batch)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(space.units)) for space in structure.spaces]
    for index, order in enumerate(orders):
        structure.reorder(model, index, order)
    right = change(before, outputs(model, batch))
    before = outputs(model, batch)
    some = rng.permutation([layer.weight for layer in structure.layers if moves(structure, layer.weight)])[:5]
    wrong = []
    for weight in some:
        tensor = dict(model.named_parameters())[weight]
        kept = tensor.data.clone()
        only = replace(structure, axes={weight: structure.axes[weight]})
        for index, order in enumerate(orders):
            only.reorder(model, index, order)
        wrong.append(change(before, outputs(model, batch)))
        tensor.data = kept
    return right, min(wrong)


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change, relative to the largest output."""
    return max(float((y - x).abs().max() / x.abs().max()) for x, y in zip(before, after, strict=True))


def moves(structure: Structure, weight: str) -> bool:
    """Whether its rows or its columns lie in a space."""
    return any(ids is not None and (structure.space_of(ids) >= 0).any() for ids in structure.axes[weight][:2])


def shares(structure: Structure) -> list[float]:
    """The shares of the layers' weights whose rows or columns can move, whose rows can, and in shareable layers."""
    found = np.zeros(5)
    for layer in structure.layers:
        rows, columns = (
            np.zeros(count, bool) if ids is None else structure.space_of(ids) >= 0
            for count, ids in zip((layer.units, layer.inputs), structure.axes[layer.weight][:2], strict=True)
        )
        weights = layer.units * layer.inputs
        shared = sum(part.size for part in structure.parts(layer).values()) * layer.inputs
        hidden = weights * (layer.pinned != OUTPUT)
        found += layer.taps * np.array(
            [weights, hidden, (rows[:, None] | columns).sum(), rows.sum() * layer.inputs, shared]
        )
    return (found[[2, 3, 4, 4]] / found[[0, 0, 0, 1]]).tolist()


def zipped(make: Callable[[], Made]) -> str:
    """Zip two instances, save, load and materialize; what came of it."""
    models, batches = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        model, batch = make()
        parts = [pytree.tree_map_only(Tensor, enlarged(seed * 10 + k), batch) for k in range(2)]
        models.append(drawn(model.eval(), parts[0]))
        batches.append(parts)
    tasks = [tz.Task(name, model, data, forward=call) for name, model, data in zip("ab", models, batches, strict=True)]
    start = time.perf_counter()
    joint = tz.zip(tasks, share=0.5, progress=False)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        joint.save(Path(folder) / "joint.safetensors")
        loaded = tz.load(Path(folder) / "joint.safetensors", {"a": make()[0], "b": make()[0]})
    same, apart = True, 0.0
    for name, data in zip("ab", batches, strict=True):
        given = outputs(joint[name], data[0])
        same &= all(torch.equal(x, y) for x, y in zip(given, outputs(loaded[name], data[0]), strict=True))
        apart = max(apart, change(given, outputs(joint.materialize(name), data[0])))
    before = sum(p.numel() for model in models for p in model.parameters())
    counts = f"{before / 1e6:8.2f} {joint.parameter_count() / 1e6:8.2f}"
    return f"{seconds:7.1f} {counts} {'yes' if same else 'NO':>6} {apart:7.0e}"


def enlarged(seed: int) -> Callable[[Tensor], Tensor]:
    """Other inputs of the same kind, 8 samples a batch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.repeat(4, *[1] * (x.dim() - 1))
        return torch.randn(8, *x.shape[1:], generator=generator)

    return draw


def main(names: list[str]) -> None:
    """Print a row for each of these, or for all."""
    global SIZE
    torch.set_num_threads(1)
    if "--zip" in names:
        SIZE = 64
        print(f"{'architecture':28} seconds    apart together  loads   plain")
        for name in [name for name in names if name != "--zip"] or MODELS:
            print(f"{name:28} {zipped(MODELS[name])}", flush=True)
        return
    print(f"{'architecture':28} seconds layers spaces   free   rows shareable hidden  change  wrong")
    for name, make in MODELS.items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        model, batch = make()
        model = drawn(model.eval(), batch)
        start = time.perf_counter()
        structure = analyse(model, batch, call)
        seconds = time.perf_counter() - start
        free, rows, shareable, hidden = shares(structure)
        found = f"{seconds:7.1f} {len(structure.layers):6} {len(structure.spaces):6}"
        right, wrong = changes(model, structure, batch)
        print(
            f"{name:28} {found} {free:6.1%} {rows:6.1%} {shareable:9.1%} {hidden:6.1%} {right:7.0e} {wrong:6.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
