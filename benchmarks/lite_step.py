"""A training step of lite.toml's model in float32: NumPy beside PyTorch, eager, on a CPU.

    python -m benchmarks.lite_step

Random ids, 64 pairs of 32 tokens, half of them to predict, dropout 0, Adam; neither side ever holds
all logits. The sides take turns, each time in a new process; what is printed are medians.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from comparison.trainers import Adam, create, timed_step
from model.config import IGNORE_INDEX
from training.config import load

CONFIG = Path(__file__).parent.parent / "configs" / "lite.toml"
VOCABULARY, PAIRS, LENGTH = 9500, 64, 32
WARM_UP, STEPS = 3, 10


def measure(engine: str) -> dict[str, float]:
    """Milliseconds of a step, and of its parts: medians."""
    import numpy as np

    from model.transformer_lite import TransformerDecoderLite
    from torchlite import nn

    dice = random.Random(0)  # noqa: S311, not for secrets
    shape = replace(load(CONFIG).model, vocab_size=VOCABULARY, dropout=0.0)
    nn.manual_seed(0)
    model = TransformerDecoderLite.from_config(shape)
    weights = {name: np.array(p.data) for name, p in model.named_parameters()}
    trainer = create(engine, shape, weights, Adam(0.9, 0.98, 1e-8), "fp32")
    rows = []
    for _ in range(PAIRS):
        ids, after = ([dice.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(2))
        rows.append((ids, [IGNORE_INDEX] * (LENGTH // 2) + after[LENGTH // 2 :]))
    batch, times = trainer.batch(rows), []
    for _ in range(WARM_UP + STEPS):
        _, seconds = timed_step(trainer, batch, 1e-3)
        times.append([1000 * s for s in seconds])
    parts = [statistics.median(part) for part in zip(*times[WARM_UP:], strict=True)]
    total = statistics.median(map(sum, times[WARM_UP:]))
    return dict(zip(("forward", "backward", "update", "step"), [*parts, total], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side)))
        return
    found = {"torch": [], "numpy": []}
    for _ in range(arguments.rounds):
        for engine, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.lite_step", "--side", engine]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603, ours
            runs.append(json.loads(done.stdout))
    steps = {}
    print(f"{os.cpu_count()} cores; milliseconds, medians of {arguments.rounds} processes")
    for engine, runs in found.items():
        medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        steps[engine] = medians["step"]
        spread = f"({min(r['step'] for r in runs):.0f} to {max(r['step'] for r in runs):.0f})"
        parts = "  ".join(f"{part} {ms:6.1f}" for part, ms in medians.items())
        print(f"{engine:6} {parts} {spread}")
    print(f"NumPy takes {steps['numpy'] / steps['torch']:.2f} times as long as PyTorch")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
