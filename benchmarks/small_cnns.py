"""What own scales are worth with other activations than ReLU: small CNNs for digits and for their quarter turns.

`python benchmarks/small_cnns.py [--draws 4]`, two minutes; nothing is downloaded.

As many pairs of networks, trained here on scikit-learn's digits, zipped with the defaults and with `own_scale=False`,
not retrained: rise of the mean of both test errors, in points, mean and deviation over the pairs. "demo" are networks
of the class that the demo has, the others have 16 and 32 kernels, 64 units and that activation.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import taskzip as tz
from taskzip.datasets import batches, digits, quarter_turns
from taskzip.models import SmallCNN

EPOCHS = 15


def network(activation: type[nn.Module], classes: int) -> nn.Module:
    """Like the demo's, but larger."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), activation(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), activation(), nn.Linear(64, classes),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "demo": SmallCNN,
    "relu": partial(network, nn.ReLU),
    "gelu": partial(network, nn.GELU),
    "tanh": partial(network, nn.Tanh),
}


def trained(make: Callable[[int], nn.Module], x: torch.Tensor, y: torch.Tensor, seed: int) -> nn.Module:
    """Adam, batches of 64."""
    torch.manual_seed(seed)
    net = make(int(y.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def error(net: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Percent wrong."""
    return 100 * float((net(test[0]).argmax(1) != test[1]).float().mean())


def main() -> None:
    """Print a row for each activation and share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train, test = (((x, y), quarter_turns(x)) for x, y in (digits("train"), digits("test")))
    print("| networks | shared | without own scales | with them |\n|---|---|---|---|")
    for name in options.networks:
        pairs = [[trained(NETWORKS[name], *train[k], 2 * draw + k) for k in range(2)] for draw in range(options.draws)]
        for share in (1.0, 0.5):
            cells = []
            for own in (False, None):
                rises = []
                for seed, nets in enumerate(pairs):
                    tasks = [tz.Task("AB"[k], nets[k], batches(*train[k])) for k in range(2)]
                    zipped = tz.zip(tasks, share=share, own_scale=own, progress=False, seed=seed)
                    rises.append(
                        statistics.mean(error(zipped["AB"[k]], test[k]) - error(nets[k], test[k]) for k in range(2))
                    )
                cells.append(f"{statistics.mean(rises):+.2f} ± {statistics.stdev(rises):.2f}")
            print(f"| {name} | {share:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
