"""A training step of lite.toml's model in float32: NumPy beside PyTorch, eager, on a CPU.

    python -m benchmarks.lite_step

Random ids, 64 pairs of 32 tokens, half of them to predict, dropout 0, Adam; neither side ever holds
all logits. The sides take turns, each time in a new process; what is printed are medians.
"""

import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Result, in_turns, parser, spread
from benchmarks.harness import median as middle
from common import cli
from comparison.trainers import Adam, create, timed_step
from model.config import IGNORE_INDEX
from training.config import load

CONFIG = Path(__file__).parent.parent / "configs" / "lite.toml"
VOCABULARY, PAIRS, LENGTH = 9500, 64, 32
WARM_UP, STEPS = 3, 10
PARTS = ("forward", "backward", "update", "step")
ENGINES = {"torch": "PyTorch, eager", "numpy": "NumPy (TorchLite)"}


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
    return dict(zip(PARTS, [*parts, total], strict=True))


def main() -> int:
    options = parser(__doc__).parse_args()
    if options.side:
        print(json.dumps(measure(*options.side)))
        return 0
    found = in_turns("lite_step", {"torch": ["torch"], "numpy": ["numpy"]}, options.rounds)
    result = Result("lite_step", "A training step of `lite.toml` in float32: NumPy beside PyTorch")
    rows = [
        [ENGINES[engine], *(middle(runs, part) for part in PARTS), spread(runs, "step")]
        for engine, runs in found.items()
    ]
    columns = ["engine", *(f"{part} [ms]" for part in PARTS), "step, from to"]
    result.table("", columns, rows, f"Medians of {options.rounds} processes a side.")
    ratio = middle(found["numpy"], "step") / middle(found["torch"], "step")
    result.claim("the time of a NumPy step over PyTorch's", ratio, 2.0, at_most=True)
    result.finish(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.lite_step", main))
