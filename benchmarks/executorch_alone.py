"""Run methods of ExecuTorch files in a process that knows only ExecuTorch, and torch for the numbers in and out.

`python benchmarks/executorch_alone.py input.pt joint.pte:forward [more.pte:method] [--calls 1] [--output output.pt]`

`input.pt` holds the list of tensors with which all methods are called. All are loaded before the first one runs, as in
a program that wants both tasks at any time; then they take turns. It prints JSON: memory, as Linux says of this
process, in kB with nothing subtracted (VmRSS after the imports; VmHWM, its largest, after the last call; VmRSS then);
and the median CPU time of each method, in seconds. `output.pt` holds the list of outputs of each, by `file:method`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

warnings.simplefilter("ignore")
from executorch.runtime import Runtime  # noqa: E402


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    """Load, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("methods", nargs="+", help="file:method")
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    before = memory("VmRSS")
    inputs = torch.load(asked.input, weights_only=True)
    programs, loaded = {}, {}
    for each in asked.methods:
        file, _, method = each.rpartition(":")
        programs[file] = programs.get(file) or Runtime.get().load_program(file)
        loaded[each] = programs[file].load_method(method)
    outputs: dict[str, list[torch.Tensor]] = {}
    took: dict[str, list[float]] = {each: [] for each in loaded}
    for _ in range(asked.calls):
        for each, method in loaded.items():
            start = time.process_time()
            outputs[each] = method.execute(inputs)
            took[each].append(time.process_time() - start)
    peak, after = memory("VmHWM"), memory("VmRSS")
    assert "taskzip" not in sys.modules
    if asked.output:
        torch.save(outputs, asked.output)
    seconds = {each: statistics.median(times) for each, times in took.items()}
    print(json.dumps({"before": before, "peak": peak, "after": after, "seconds": seconds}))


if __name__ == "__main__":
    main()
