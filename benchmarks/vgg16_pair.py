"""Zip two VGG-16 (138 M parameters each) with 64 images of 224x224: where the time goes, and the memory.

`python benchmarks/vgg16_pair.py [--images 64] [--batch 16] [--save]`

The weights are random, as torchvision draws them: they cost what trained ones cost. For every layer the table gives the
seconds of each step, those of all processors together ("cpu": twice the total, were there nothing else to do on two
cores), and the peak memory of the process up to its end.
"""

import argparse
import resource
import sys
import time
from collections import defaultdict

import torch
from torch import nn

import taskzip as tz

STEPS = {
    "observe": "reading",
    "least_squares": "solving",
    "functional_difference": "difference",
    "match": "matching",
    "merge_weights": "merging",
    "match_spread": "spread",
    "install_blocks": "blocks",
}


class VGG16(nn.Module):
    """Laid out as torchvision's `vgg16`: `features`, `classifier`."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(4096, classes),
        )  # fmt: skip
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def peak() -> float:
    """The largest memory (RSS) of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stopwatch:
    """Seconds of each step by layer; a layer begins when it is first read."""

    def __init__(self) -> None:
        self.layer = ""
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        print(
            f"{'layer':<16}"
            + "".join(f"{step:>11}" for step in (*STEPS.values(), "other", "total", "cpu"))
            + "  peak GB",
            flush=True,
        )

    def follow(self, module: object, name: str) -> None:
        """Time a function of taskzip wherever it is called."""
        function = getattr(module, name)

        def timed(*args, **kwargs):
            if name == "observe":
                self.begin(args[1].name)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[STEPS[name]] += time.perf_counter() - start

        setattr(module, name, timed)

    def begin(self, layer: str) -> None:
        """A layer is read: if it is another one than before, that is done."""
        if layer == self.layer:
            return
        whole = time.perf_counter() - self.start
        other = whole - sum(self.seconds.values())
        columns = [*(self.seconds[step] for step in STEPS.values()), other, whole, time.process_time() - self.cpu]
        print(f"{self.layer or 'checks':<16}" + "".join(f"{s:11.1f}" for s in columns) + f"{peak():9.2f}", flush=True)
        self.layer, self.start, self.cpu = layer, time.perf_counter(), time.process_time()
        self.seconds.clear()


def main() -> None:
    """Zip, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--save", action="store_true", help="save and load the result too")
    options = parser.parse_args()
    tasks = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        data = torch.randn(options.images, 3, 224, 224).split(options.batch)
        tasks.append(tz.Task(name, VGG16().eval(), data))
    watch = Stopwatch()
    for module in [m for name, m in sys.modules.items() if name.startswith("taskzip.")]:
        for name in STEPS:
            if getattr(module, name, None) is not None and callable(getattr(module, name)):
                watch.follow(module, name)
    watch.follow(sys.modules["taskzip.observation"].Observer, "observe")
    start = time.perf_counter()
    zipped = tz.zip(tasks, share=1.0, progress=False)
    watch.begin("end")
    print(f"zipped in {(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak():.2f} GB")
    print(zipped.summary())


if __name__ == "__main__":
    main()
