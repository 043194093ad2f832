"""What `--compile` gives on a CPU, and after how many steps it has paid for its start.

    python -m benchmarks.compile_cost

The decoder in bf16 with and without torch.compile, on the models of benchmarks.train_throughput,
each in a process of its own with an empty cache of compiled code.
"""

import json
import os
import sys
import tempfile
import time
from statistics import median

import torch

from benchmarks.harness import Result, in_turns, parser
from benchmarks.harness import median as middle
from benchmarks.peers import MODELS, make
from common import cli

STEPS = {"4x128": 100, "full": 10}


def measure(name: str, compiled: bool) -> dict:
    """Seconds of the first step, and milliseconds of a later one."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    shape, rows, length = MODELS[name]
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length))
    step = make("bf16", shape, length, torch.device("cpu"), compiled=compiled)
    seconds = []
    for _ in range(STEPS[name] + 1):
        began = time.perf_counter()
        step(ids, targets)
        seconds.append(time.perf_counter() - began)
    return {"first": seconds[0], "ms": 1000 * median(seconds[3:])}


def main():
    arguments = parser(__doc__, rounds=2).parse_args()
    if arguments.side:
        name, compiled = arguments.side
        print(json.dumps(measure(name, compiled == "True")))
        return
    rows = []
    for name in STEPS:
        sides = {way: [name, way == "compiled"] for way in ("eager", "compiled")}
        found = in_turns("compile_cost", sides, arguments.rounds)
        first = {way: middle(runs, "first") for way, runs in found.items()}
        ms = {way: middle(runs, "ms") for way, runs in found.items()}
        saved = (ms["eager"] - ms["compiled"]) / 1000
        paid = (
            f"{(first['compiled'] - first['eager']) / saved:,.0f} steps" if saved > 0 else "never"
        )
        rows.append([name, ms["eager"], ms["compiled"], first["eager"], first["compiled"], paid])
    result = Result("compile_cost", "What --compile gives on a CPU")
    result.table(
        "bf16",
        ["model", "ms a step", "compiled", "first step, s", "compiled", "has paid after"],
        rows,
    )
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.compile_cost", main))
