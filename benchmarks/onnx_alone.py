"""Run exported files in a process that knows only ONNX Runtime and NumPy, and print the memory that it took, as JSON.

`python benchmarks/onnx_alone.py joint.onnx [more.onnx] [--settings small] [--input x.npz] [--output y.npz]`

Inputs are arrays by the name of the input, and drawn where there is no file. All files are loaded before the first one
runs, as in a program that wants both tasks at any time. Memory is what Linux says of this process, in MB, with nothing
subtracted: VmRSS after the imports; VmHWM, its largest, after the last call; and VmRSS then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

SETTINGS = ("default", "small")


def options(settings: str) -> onnxruntime.SessionOptions:
    """`small` makes no copies of weights that are faster to read."""
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = 1
    if settings == "small":
        found.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        found.add_session_config_entry("session.disable_prepacking", "1")
        found.add_session_config_entry("optimization.disable_specified_optimizers", "ConvBNFusion")
    return found


def memory(what: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what))


def main() -> None:
    """Load, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--settings", choices=SETTINGS, default="default")
    parser.add_argument("--input", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--calls", type=int, default=11)
    asked = parser.parse_args()
    before = memory("VmRSS")
    sessions = [
        onnxruntime.InferenceSession(file, options(asked.settings), providers=["CPUExecutionProvider"])
        for file in asked.files
    ]
    rng = np.random.default_rng(0)
    needed = {each.name: each.shape for session in sessions for each in session.get_inputs()}
    given = dict(np.load(asked.input)) if asked.input else {}
    for name in needed.keys() - given.keys():
        sizes = [size if isinstance(size, int) else 1 for size in needed[name]]
        given[name] = rng.standard_normal(sizes).astype(np.float32)
    outputs, took = {}, []
    for _ in range(asked.calls):
        start = time.process_time()
        for session in sessions:
            names = [each.name for each in session.get_outputs()]
            feed = {each.name: given[each.name] for each in session.get_inputs()}
            outputs |= dict(zip(names, session.run(names, feed), strict=True))
        took.append(time.process_time() - start)
    peak, after = memory("VmHWM"), memory("VmRSS")
    assert not {"torch", "taskzip", "onnx"} & set(sys.modules)
    if asked.output:
        np.savez(asked.output, **outputs)
    print(json.dumps({"before": before, "peak": peak, "after": after, "ms": 1000 * statistics.median(took)}))


if __name__ == "__main__":
    main()
