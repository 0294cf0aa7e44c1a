"""Draw docs/images/overview.png: two small networks and the joint one that `taskzip.zip` makes of them.

Nothing is invented: the networks are trained on scikit-learn's digits, the lines are their weights (the stronger, the
darker; those of the first layer summed over the pixels of a row), and the joint network is the result of a zip.

    python docs/images/make_overview.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

import taskzip as tz
from taskzip.datasets import batches, digits, quarter_turns
from taskzip.models import LeNet300
from taskzip.report.plots import FIRST, SHARED, save_figure

SECOND = "#5b9bd5"  # the plots' light blue is too pale for thin lines
HIDDEN = (12, 9)
SHARE = 2 / 3
CLASSES = {"digit": 10, "turn": 4}
COLOUR = {"digit": FIRST, "turn": SECOND}
Points = list[tuple[float, float]]


def main() -> None:
    """Train, zip, draw."""
    torch.set_num_threads(1)  # faster for networks this small
    torch.manual_seed(0)
    images, labels = digits("train")
    data = {"digit": (images, labels), "turn": quarter_turns(images)}
    models = {name: train(LeNet300(64, CLASSES[name], HIDDEN), *data[name]) for name in CLASSES}
    tasks = [tz.Task(name, models[name], batches(*data[name])) for name in CLASSES]
    zipped = tz.zip(tasks, share=SHARE, progress=False)

    figure = Figure(figsize=(10, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100), ylim=(0, 46))
    axes.axis("off")
    image = images[labels == 4][0, 0]
    draw_separate(axes, models["digit"], "digit", image, bottom=25.5)
    draw_separate(axes, models["turn"], "turn", image.rot90(1), bottom=1.5)
    axes.annotate("", (56.5, 21.5), (50, 21.5), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "#444444"})
    axes.text(53, 23, "zip", ha="center", fontsize=13, family="monospace")
    draw_joint(axes, zipped, image)
    path = Path(__file__).parent / "overview.png"
    save_figure(figure, path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(200).save(path, optimize=True)  # a third of the size


def train(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """A few epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        for x, y in batches(images, labels, size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def draw_separate(axes: Axes, model: nn.Module, task: str, image: Tensor, bottom: float) -> None:
    """One network in one colour, from left to right."""
    middle = bottom + 8.5
    inputs = draw_image(axes, image, 3, middle)
    columns = [inputs, *(column(x, n, middle) for x, n in ((17, HIDDEN[0]), (27, HIDDEN[1]), (37, CLASSES[task])))]
    for weights, left, right in zip(strengths(model), columns, columns[1:], strict=False):
        colours = [[COLOUR[task]] * len(left)] * len(right)
        draw_weights(axes, weights, left, right, colours)
    for points in columns[1:]:
        draw_units(axes, points, COLOUR[task])
    question = {"digit": "which digit is it?", "turn": "which way up is it?"}[task]
    axes.text(39.5, middle, question.replace(" is", "\nis"), va="center", fontsize=9)
    count = sum(p.numel() for p in model.parameters())
    title(axes, 3, bottom + 18.1, task, f"{count:,} parameters")


def draw_joint(axes: Axes, zipped: tz.ZippedModel, image: Tensor) -> None:
    """Both tasks in one network: units and weights of the one, of both, of the other."""
    middle, step = 21.5, 1.75
    shared = [record.shared for record in zipped.history.layers]
    inputs = draw_image(axes, image, 59, middle)
    places: dict[str, list[Points]] = {name: [inputs] for name in zipped}
    owned: dict[str, list[int]] = {name: [len(inputs)] for name in zipped}  # how many of them, the first, are shared
    for x, units, both in ((73, HIDDEN[0], shared[0]), (83, HIDDEN[1], shared[1])):
        points = column(x, 2 * units - both, middle, step)
        private = units - both
        places["digit"].append(points[private : private + both] + points[:private])
        places["turn"].append(points[private : private + both] + points[private + both :])
        for name in zipped:
            owned[name].append(both)
    for name, centre in (("digit", middle + 6.5), ("turn", middle - 10)):
        places[name].append(column(92, CLASSES[name], centre, step))
        owned[name].append(0)
    for name in reversed(list(zipped)):
        for layer, weights in enumerate(strengths(zipped[name])):
            left, right = places[name][layer], places[name][layer + 1]
            reads, rows = owned[name][layer], owned[name][layer + 1]
            colours = [
                [SHARED if unit < rows and source < reads else COLOUR[name] for source in range(len(left))]
                for unit in range(len(right))
            ]
            draw_weights(axes, weights, left, right, colours)
    for name in zipped:
        for points, both in zip(places[name][1:], owned[name][1:], strict=True):
            draw_units(axes, points[both:], COLOUR[name])
            draw_units(axes, points[:both], SHARED)
        axes.text(94, places[name][-1][0][1] / 2 + places[name][-1][-1][1] / 2, name, va="center", fontsize=10)
    before, after = sum(r.before for r in zipped.history.layers), zipped.parameter_count()
    title(axes, 59, 43.6, "joint", f"{after:,} parameters instead of {before:,}")
    for x, what, colour in ((59, "only digit", FIRST), (72, "both", SHARED), (80, "only turn", SECOND)):
        draw_units(axes, [(x + 0.8, 1.6)], colour)
        axes.text(x + 2.2, 1.6, what, va="center", fontsize=9.5)


def title(axes: Axes, x: float, y: float, name: str, parameters: str) -> None:
    """A name in bold, and how large the network is."""
    axes.text(x, y, name, fontsize=12, fontweight="bold")
    axes.text(x + 7, y, parameters, fontsize=10, color="#444444")


def strengths(model: nn.Module) -> list[Tensor]:
    """|W| of every layer, [units, inputs], relative to its largest; the first one is summed over each row of pixels."""
    found = [layer.weight.detach().abs() for layer in (model.fc1, model.fc2, model.fc3)]  # type: ignore[union-attr]
    found[0] = found[0].unflatten(1, (8, 8)).sum(2)
    return [weights / weights.max() for weights in found]


def column(x: float, count: int, middle: float, step: float = 1.42) -> Points:
    """Places of units, one above the other, from the top."""
    return [(x, middle + step * ((count - 1) / 2 - i)) for i in range(count)]


def draw_image(axes: Axes, image: Tensor, x: float, middle: float, side: float = 8) -> Points:
    """Draw an image; returns where its rows end at the right."""
    axes.imshow(image, cmap="gray_r", extent=(x, x + side, middle - side / 2, middle + side / 2), aspect="auto")
    axes.add_patch(Rectangle((x, middle - side / 2), side, side, fill=False, color="#444444", lw=0.8))
    return [(x + side, middle + side / 2 - (i + 0.5) * side / 8) for i in range(8)]


def draw_weights(axes: Axes, weights: Tensor, left: Points, right: Points, colours: Sequence[Sequence[str]]) -> None:
    """A line per weight, the stronger the darker."""
    lines, tints = [], []
    for unit, end in enumerate(right):
        for source, start in enumerate(left):
            lines.append((start, end))
            tints.append(to_rgba(colours[unit][source], 0.06 + 0.84 * float(weights[unit, source]) ** 1.3))
    axes.add_collection(LineCollection(lines, colors=tints, linewidths=0.9, zorder=1))


def draw_units(axes: Axes, points: Points, colour: str) -> None:
    """A disc per unit."""
    x, y = [p[0] for p in points], [p[1] for p in points]
    axes.scatter(x, y, s=46, color=colour, edgecolor="white", linewidth=0.8, zorder=2)


if __name__ == "__main__":
    main()
