"""How far the engines' logits, gradients and losses are apart.

    python -m comparison.parity                       every configuration, and 200 microGPT steps
    python -m comparison.parity --steps 1000

Each configuration in configs/ (its vocabulary cut to 300 for the plain-Python engine's sake, and
the sequences to 12 tokens) in float64 through all three engines; lite.toml whole in float32 through
PyTorch and NumPy; and microgpt.toml trained in float64. What is printed is the largest difference
over the largest logit, over the largest of all gradients, and in nats.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import random
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from common import cli
from comparison.trainers import Adam, create
from model.config import IGNORE_INDEX, ModelConfig
from model.transformer_full import TransformerDecoder
from training.config import load

CONFIGS = Path(__file__).parent.parent / "configs"
ENGINES = ("python", "numpy", "torch")
MAX_PARAMETERS = 20_000_000
PLAIN = Adam(0.85, 0.99, 1e-8)


def initial_weights(shape: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights as training begins with, every norm and bias moved a little off its 1 or 0."""
    torch.manual_seed(seed)
    model = TransformerDecoder.from_config(shape, torch.float64)
    with torch.no_grad():
        return {
            name: (p + 0.02 * torch.randn_like(p)).numpy() for name, p in model.named_parameters()
        }


def random_rows(shape: ModelConfig, count: int, length: int, dice: random.Random):
    """`count` sequences of up to `length` tokens, some of their targets ignored."""
    rows = []
    for i in range(count):
        n = min(length - i, shape.max_len)
        ids, targets = ([dice.randrange(shape.vocab_size) for _ in range(n)] for _ in range(2))
        rows.append((ids, [IGNORE_INDEX] * (i % 3) + targets[i % 3 :]))
    return rows


def apart(shape: ModelConfig, engines, precision: str, rows) -> tuple[float, float]:
    """The largest difference of logits and of gradients between any two engines, relative."""
    weights, logits, gradients = initial_weights(shape), {}, {}
    for engine in engines:
        trainer = create(engine, shape, weights, PLAIN, precision)
        logits[engine] = np.array(trainer.logits(rows[0][0]), np.float64)
        trainer.forward(trainer.batch(rows))
        trainer.backward()
        gradients[engine] = {n: np.array(g, np.float64) for n, g in trainer.gradients().items()}
    names = weights.keys()
    assert all(g.keys() == names for g in gradients.values())
    largest = max(np.abs(g).max() for g in gradients[engines[-1]].values())
    pairs = list(combinations(engines, 2))
    of_logits = max(np.abs(logits[a] - logits[b]).max() for a, b in pairs)
    of_gradients = max(
        np.abs(gradients[a][n] - gradients[b][n]).max() for a, b in pairs for n in names
    )
    return of_logits / np.abs(logits[engines[-1]]).max(), of_gradients / largest


def losses_apart(shape: ModelConfig, steps: int) -> tuple[float, dict[str, list[float]]]:
    """The largest difference of a loss over `steps` steps of one random word, and all losses."""
    weights, losses = initial_weights(shape), {}
    for engine in ENGINES:
        trainer = create(engine, shape, weights, PLAIN)
        dice = random.Random(1)  # noqa: S311, not for secrets
        losses[engine] = []
        for step in range(steps):
            rows = random_rows(shape, 1, dice.randrange(3, 12), dice)
            losses[engine].append(trainer.forward(trainer.batch(rows)))
            trainer.backward()
            trainer.update(0.01 * (1 - step / steps))
    pairs = combinations(ENGINES, 2)
    return max(
        abs(x - y) for a, b in pairs for x, y in zip(losses[a], losses[b], strict=True)
    ), losses


def main():
    parser = cli.Parser(prog="python -m comparison.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps} must be at least 1")
    dice = random.Random(0)  # noqa: S311, not for secrets
    print("float64, python, numpy and torch                logits  gradients")
    for file in sorted(CONFIGS.glob("*.toml")):
        config = load(file).model
        shape = replace(config, vocab_size=300, dropout=0.0, attention_dropout=0.0)
        if replace(config, vocab_size=300).num_parameters() > MAX_PARAMETERS:
            print(f"  {file.name:40} left out: plain Python has an object for each number")
            continue
        found = apart(shape, ENGINES, "fp64", random_rows(shape, 3, 12, dice))
        print(f"  {file.name:40} {found[0]:11.1e} {found[1]:10.1e}")
    shape = replace(load(CONFIGS / "lite.toml").model, vocab_size=9500, dropout=0.0)
    found = apart(shape, ("numpy", "torch"), "fp32", random_rows(shape, 64, 100, dice))
    print(f"float32, numpy and torch\n  {'lite.toml, whole':40} {found[0]:11.1e} {found[1]:10.1e}")
    shape = replace(load(CONFIGS / "microgpt.toml").model, vocab_size=27)
    largest, _ = losses_apart(shape, arguments.steps)
    print(f"float64, losses of {arguments.steps} steps of microgpt.toml: {largest:.1e} nats apart")


if __name__ == "__main__":
    sys.exit(cli.run("python -m comparison.parity", main))
