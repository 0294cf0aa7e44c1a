"""Table 1 of the paper: two networks on MNIST, all hidden units shared, before and after light retraining."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import taskzip as tz
from taskzip.experiments.networks import Kind, Shelf
from taskzip.experiments.pairs import Pair

NAMES: dict[Kind, str] = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}


class Paper(NamedTuple):
    """What the paper's Table 1 says: errors in percent, and iterations of retraining."""

    error_a: float
    error_b: float
    retrained: float
    iterations: int


PAPER: dict[tuple[Kind, bool], Paper] = {
    ("lenet300", False): Paper(1.57, 1.60, 1.64, 550),
    ("lenet300", True): Paper(1.80, 1.81, 1.83, 800),
    ("lenet5", False): Paper(0.89, 0.95, 0.93, 600),
    ("lenet5", True): Paper(1.27, 1.28, 1.29, 1200),
}


class Row(NamedTuple):
    """Test errors in percent of one pair; after zipping and retraining those of A and of B."""

    kind: Kind
    sparse: bool
    before: tuple[float, float]
    zipped: tuple[float, float]
    retrained: tuple[float, float]


def run(shelf: Shelf, out: Path) -> str:
    """Write table1.md and return what stands in it.

    Args:
        shelf: for the trained and the pruned networks.
        out: folder of the file.

    Raises:
        InputError: MNIST is absent.
        OSError: the file cannot be written.
    """
    rows = []
    for kind, sparse in PAPER:
        rows.append(row(shelf, kind, sparse))
        shelf.say(_line(rows[-1]))
    table = "\n".join([*_head(), *map(_line, rows)])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table1.md").write_text(table + "\n")
    return table


def row(shelf: Shelf, kind: Kind, sparse: bool) -> Row:
    """Zip two networks of a kind fully, with the library's defaults; then retrain with labels.

    As many iterations as in the paper, which spreads them over the layers (line 10 of Algorithm 1).
    """
    networks = [shelf.pruned(kind, "mnist", seed) if sparse else shelf.trained(kind, "mnist", seed) for seed in (0, 1)]
    pair = Pair((networks[0], networks[1]), ("mnist", "mnist"))
    zipped = tz.zip(pair.calibration(seed=0), share=1.0, progress=False)
    retrained = pair.retrained(zipped, PAPER[kind, sparse].iterations, "labels", seed=0)
    return Row(kind, sparse, pair.before(), pair.errors(zipped), pair.errors(retrained))


def _head() -> list[str]:
    titles = ["", "A", "B", "zipped", "mean rise", "iterations", "retrained", "mean rise"]
    paper = ["paper: A", "B", "retrained", "rise"]
    return [f"| {' | '.join([*titles, *paper])} |", "|---" * (len(titles) + len(paper)) + "|"]


def _line(row: Row) -> str:
    paper = PAPER[row.kind, row.sparse]
    before, zipped, retrained = (sum(each) / 2 for each in (row.before, row.zipped, row.retrained))
    cells = [
        f"{NAMES[row.kind]}, {'sparse' if row.sparse else 'dense'}",
        *(f"{error:.2f}" for error in row.before),
        " / ".join(f"{error:.2f}" for error in row.zipped),
        f"{zipped - before:+.2f}",
        str(paper.iterations),
        " / ".join(f"{error:.2f}" for error in row.retrained),
        f"{retrained - before:+.2f}",
        *(f"{error:.2f}" for error in paper[:3]),
        f"{paper.retrained - (paper.error_a + paper.error_b) / 2:+.2f}",
    ]
    return f"| {' | '.join(cells)} |"
