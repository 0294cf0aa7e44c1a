"""Zip two VGG-16 (138 M parameters each) with 64 images of 224x224: where the time goes, and the memory.

`python benchmarks/vgg16_pair.py [--images 64] [--batch 16] [--save]`

The weights are random, as torchvision draws them: they cost what trained ones cost. For every layer the table gives the
seconds of each step, those of all processors together ("cpu": twice the total, were there nothing else to do on two
cores), and the peak memory of the process up to its end.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

import taskzip as tz
from taskzip.models import VGG16

STEPS = {
    "observe": "reading",
    "survey": "surveying",
    "least_squares": "solving",
    "functional_difference": "difference",
    "match": "matching",
    "merge_weights": "merging",
    "match_spread": "spread",
    "install_blocks": "blocks",
}


def peak() -> float:
    """The largest memory (RSS) of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stopwatch:
    """Seconds of each step by layer; a layer begins when it is first read."""

    def __init__(self) -> None:
        self.layer = ""
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.running: list[float] = []
        """Per step that has begun, the seconds that steps within it took: they count as theirs."""
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
            if name == "observe" and not self.running:
                self.begin(args[1].name)
            start = time.perf_counter()
            self.running.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[STEPS[name]] += whole - self.running.pop()
                if self.running:
                    self.running[-1] += whole

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
    for name in ("observe", "survey"):
        watch.follow(sys.modules["taskzip.observing.observation"].Observer, name)
    start = time.perf_counter()
    zipped = tz.zip(tasks, share=1.0, progress=False)
    watch.begin("end")
    print(f"zipped in {(time.perf_counter() - start) / 60:.1f} minutes, peak memory {peak():.2f} GB")
    print(zipped.summary())
    if options.save:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            zipped.save(Path(folder) / "joint.safetensors")
            loaded = tz.load(Path(folder) / "joint.safetensors", {name: VGG16() for name in zipped})
            same = all(torch.equal(loaded[t.name](t.data[0][:1]), zipped[t.name](t.data[0][:1])) for t in tasks)
            print(
                f"saved and loaded in {time.perf_counter() - start:.0f} s, {'equal' if same else 'NOT EQUAL'}; "
                f"peak memory {peak():.2f} GB"
            )


if __name__ == "__main__":
    main()
