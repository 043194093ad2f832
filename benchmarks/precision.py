"""What `--precision auto` takes, beside the speed of both precisions, on processors of many kinds.

    python -m benchmarks.precision

One machine stands for several: oneDNN and PyTorch are kept from instructions that other processors
lack (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY), with 1, 2 and 4 threads. In each, steps of train.py
are taken in fp32 and in bf16 by turns, on the same batches, and then `auto` is asked, three times.
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.harness import Result, parser, worker
from common import cli

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = ("default", "full")
LIMITS = {  # name: (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY); "": no limit
    "as it is": ("", ""),
    "AVX512 with bf16": ("AVX512_CORE_BF16", ""),
    "AVX512": ("AVX512_CORE", ""),
    "AVX2, oneDNN alone": ("AVX2", ""),
    "AVX2": ("AVX2", "avx2"),
}
TRIES = 3  # of auto
WARM_UP = 2  # steps that are not counted


def measure(model: str, threads: int, seconds: float) -> dict:
    """Milliseconds of a step in each precision, and what auto takes."""
    from data.batches import Batch
    from training.config import load
    from training.precision import Work, choose_precision
    from training.resume import RunSpec
    from training.setup import build
    from training.step import train_step
    from training.timing import StepTimer

    config = load(CONFIGS / f"{model}.toml")
    data = replace(config.data, source="stdlib")  # which is not downloaded
    train = replace(config.train, threads=threads)
    config = replace(config, device="cpu", data=data, train=train)
    with tempfile.TemporaryDirectory() as folder:
        states = {
            name: build(
                RunSpec(Path(folder) / name, replace(config, precision=name)), lambda _: None
            )
            for name in ("fp32", "bf16")
        }
    taken, number, until = {name: [] for name in states}, 0, math.inf
    while time.perf_counter() < until:
        for name, state in states.items():
            micro_batches: list[Batch] = state.batches(number, config.train.accumulation_steps)
            targets = state.batches.target_count(number)
            began = time.perf_counter()
            timer = StepTimer(state.device)
            train_step(state, state.loss_module, micro_batches, targets, number, timer)
            taken[name].append(time.perf_counter() - began)
        number += 1
        if number == WARM_UP:
            until = time.perf_counter() + seconds
    state = states["fp32"]
    work = Work.of(state.batches.examples, state.config.train.micro_batch_size)
    chosen, asked = [], []
    for _ in range(TRIES):
        began = time.perf_counter()
        precision, _ = choose_precision("auto", state.config.model, work, state.device)
        asked.append(time.perf_counter() - began)
        chosen.append(precision.name)
    # paired: each step's batch is the same in both, and a neighbour disturbs both
    ratios = [a / b for a, b in zip(taken["fp32"], taken["bf16"], strict=True)][WARM_UP:]
    found = {name: 1000 * median(times[WARM_UP:]) for name, times in taken.items()}
    return found | {"ratio": median(ratios), "chosen": chosen, "asked": max(asked)}


def main():
    options = parser(__doc__, rounds=1)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options.add_argument("--limits", nargs="+", choices=LIMITS, default=list(LIMITS))
    options.add_argument("--threads", nargs="+", type=int, default=[1, 2, 4])
    options.add_argument("--seconds", type=float, default=8.0, help="for each row")
    arguments = options.parse_args()
    if arguments.side:
        model, threads, seconds = arguments.side
        print(json.dumps(measure(model, int(threads), float(seconds))))
        return
    result = Result("precision", "What `--precision auto` takes")
    rows, worst, longest = [], 1.0, 0.0
    for model in arguments.models:
        for limit in arguments.limits:
            for threads in arguments.threads:
                found = limited(limit, model, threads, arguments.seconds)
                # of the speed of the better one, that of what was taken
                shares = {"bf16": min(1, found["ratio"]), "fp32": min(1, 1 / found["ratio"])}
                share = min(shares[name] for name in found["chosen"])
                worst, longest = min(worst, share), max(longest, found["asked"])
                rows.append(
                    [model, limit, threads, found["fp32"], found["bf16"], found["ratio"],
                     ", ".join(sorted(set(found["chosen"]))), f"{share:.0%}", found["asked"]]
                )  # fmt: skip
    result.table(
        "A step of training, and what auto takes",
        ["model", "instructions", "threads", "fp32, ms", "bf16, ms", "bf16 is faster by", "auto",
         "of the better one's speed", "asking, s"],
        rows,
    )  # fmt: skip
    result.claim("auto, of the better one's speed, in every row", worst, 0.97, unit="")
    result.claim("asking auto, at the longest", longest, 0.5, at_most=True, unit="s")
    result.finish(arguments.json)


def limited(limit: str, model: str, threads: int, seconds: float) -> dict:
    """A row's worker, kept from instructions."""
    names = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    environment = {name: value for name, value in zip(names, LIMITS[limit], strict=True) if value}
    print(f"{model}, {limit}, {threads} threads", file=sys.stderr, flush=True)
    return worker("precision", model, threads, seconds, environment=environment)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.precision", main))
