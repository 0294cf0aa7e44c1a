"""What it costs to do without weights from private to shared units, and what it saves.

`TASKZIP_DATA=... python benchmarks/cross.py [folder of trained networks]` prints a Markdown table for LeNet-5 on MNIST
and Fashion-MNIST: parameters and FLOPs of both tasks together relative to the two networks, and test errors right after
zipping, means over three draws of 4,000 calibration images. The networks are those of `taskzip reproduce`, trained if
they are not in the folder.
"""

import sys
from pathlib import Path
from statistics import mean

import taskzip as tz
from taskzip.experiments.networks import Shelf
from taskzip.experiments.pairs import Pair
from taskzip.zipped.flops import flops_per_sample

SHARES = {True: (0.5, 0.75, 0.9, 0.85, 0.95), False: (0.5, 0.75, 0.9)}
SEEDS = (0, 1, 2)


def main(folder: Path) -> None:
    """Print the table."""
    shelf = Shelf(folder, lambda said: print(said, file=sys.stderr))
    nets = shelf.trained("lenet5", "mnist", 0), shelf.trained("lenet5", "fashion", 0)
    pair = Pair(nets, ("mnist", "fashion"))
    image = pair.test[0][0][:1]
    parameters = sum(p.numel() for net in nets for p in net.parameters())
    flops = sum(flops_per_sample(net, image, net) for net in nets)
    print("| cross | share | parameters | FLOPs | digit | garment |\n|---|---|---|---|---|---|")
    print(f"| apart | | 100% | 100% | {' | '.join(f'{error:.2f}' for error in pair.before())} |", flush=True)
    for cross, shares in SHARES.items():
        for share in shares:
            made = [tz.zip(pair.calibration(s), share=share, cross=cross, progress=False, seed=s) for s in SEEDS]
            errors = [mean(each) for each in zip(*map(pair.errors, made), strict=True)]
            size = made[0].parameter_count() / parameters
            work = made[0].history.settings["flops"]["together"] / flops
            cells = [f"{size:.0%}", f"{work:.0%}", *(f"{error:.2f}" for error in errors)]
            print(f"| {cross} | {share} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reproduce/networks"))
