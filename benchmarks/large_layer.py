"""Matching and merging one 4096 x 4096 layer (d = 4,097 with the bias), as in VGG's fc7: seconds per step.

`python benchmarks/large_layer.py [units]`
"""

import sys
import time

import torch

from taskzip.algebra.curvature import damped
from taskzip.algebra.difference import functional_difference
from taskzip.algebra.matching import match
from taskzip.algebra.merging import merge_weights


def main(units: int) -> None:
    """Time each step once and print a table."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    w = [draw(units, units + 1).double() / units**0.5 for _ in range(2)]
    mix = draw(units + 1, units + 1) / units**0.5
    h = []
    for _ in range(2):
        x = (draw(2 * units, units + 1) @ mix).relu().double()
        h.append(damped(x.mT @ x / len(x), 1e-2))
    seconds: dict[str, float] = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        print(f"{name:<42}{seconds[name]:8.1f} s", flush=True)
        return result

    d = timed("functional difference, all pairs", lambda: functional_difference(*w, *h))
    timed("greedy matching, all units", lambda: match(d, method="greedy"))
    timed("greedy matching, half the units", lambda: match(d, count=units // 2, method="greedy"))
    timed("optimal matching, half the units", lambda: match(d, count=units // 2))
    pairs = timed("optimal matching, all units", lambda: match(d))
    timed("merging", lambda: merge_weights([w[0][pairs.a], w[1][pairs.b]], h))
    whole = seconds["functional difference, all pairs"] + seconds["optimal matching, all units"] + seconds["merging"]
    print(f"{'difference + optimal matching + merging':<42}{whole:8.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
