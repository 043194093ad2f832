"""microGPT, number for number: the same documents, random numbers, losses and names.

    python examples/microgpt.py --names names.txt              one name a line
    python examples/microgpt.py --names names.txt --engine numpy

Karpathy's microGPT (2026) trains 4,192 parameters on one name a step, in 200 lines of Python with
an autograd of scalars. Here the decoder of `model/transformer_micro.py` does: `random` is seeded
and used in the same order as there, so what is printed is the same too. At the end it says how
many nodes the graph of a step has, and how much of the time goes into the backward pass: with a
node for each operation on a vector (as the run was made), and with one for each + and *.
"""

import math
import os
import random
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project is run from its clone
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices this small only suffer from threads

from common import cli
from comparison.trainers import Adam, create, timed_step
from model.config import ModelConfig

WIDTH, LENGTH, STD = 16, 16, 0.08
TEMPERATURE = 0.5
LAYER = "layers.0."
ORDER = {  # the order in which microGPT draws its matrices; their names here and there
    "embed.weight": "wte",
    "pos_encoding": "wpe",
    "output.weight": "lm_head",
    LAYER + "self_attn.W_q.weight": "attn_wq",
    LAYER + "self_attn.W_k.weight": "attn_wk",
    LAYER + "self_attn.W_v.weight": "attn_wv",
    LAYER + "self_attn.W_o.weight": "attn_wo",
    LAYER + "feed_forward.linear1.weight": "mlp_fc1",
    LAYER + "feed_forward.linear2.weight": "mlp_fc2",
}


def microgpt(vocab_size: int) -> ModelConfig:
    """Its shape; configs/microgpt.toml says the same."""
    return ModelConfig(
        vocab_size, WIDTH, 4, 1, 4 * WIDTH, LENGTH, 0.0, positions="learned", norm="rms",
        norm_first=True, embedding_norm=True, bias=False, init_std=STD, scale_embedding=False,
    )  # fmt: skip


def initial_weights(vocab_size: int) -> dict:
    """Nested lists by name, drawn in microGPT's order."""
    inner = (4 * WIDTH, WIDTH)
    shapes = {"wte": (vocab_size, WIDTH), "wpe": (LENGTH, WIDTH), "lm_head": (vocab_size, WIDTH)}
    shapes |= {"mlp_fc1": inner, "mlp_fc2": inner[::-1]}
    weights = {}
    for name, theirs in ORDER.items():
        rows, columns = shapes.get(theirs, (WIDTH, WIDTH))
        weights[name] = [[random.gauss(0, STD) for _ in range(columns)] for _ in range(rows)]
    return weights


def row_of(document: list[int]) -> tuple[list[int], list[int]]:
    """(ids, targets) of a document with its special token on both sides."""
    n = min(LENGTH, len(document) - 1)
    return document[:n], document[1 : n + 1]


def train(trainer, documents, steps: int, report) -> list[float]:
    """Seconds of all forward passes, backward passes and updates."""
    seconds = [0.0, 0.0, 0.0]
    for step in range(steps):
        batch = trainer.batch([row_of(documents[step % len(documents)])])
        loss, spent = timed_step(trainer, batch, 0.01 * (1 - step / steps))
        seconds = [a + b for a, b in zip(seconds, spent, strict=True)]
        report(step, loss)
    return seconds


def sample(model, special: int) -> list[int]:
    """One name as ids: `random.choices` decides, as in microGPT."""
    cache, token, ids = model.new_cache(), special, []
    for _ in range(LENGTH):
        logits = [x / TEMPERATURE for x in model.next_logits(cache, [token])]
        largest = max(logits)
        exps = [math.exp(x - largest) for x in logits]
        *_, total = accumulate(exps)  # left to right: from Python 3.12 on, sum() is more exact
        weights = [e / total for e in exps]
        token = random.choices(range(len(logits)), weights)[0]  # noqa: S311, as in microGPT
        if token == special:
            break
        ids.append(token)
    return ids


def graph(name: str, nodes: list[int], seconds: list[float]):
    """One line about the graph."""
    share = seconds[1] / sum(seconds)
    print(
        f"{name:8} {sum(nodes) / len(nodes):8,.0f} nodes a step, {share:4.0%} of the time in "
        f"backward, {1000 * sum(seconds) / len(nodes):.2f} ms a step"
    )


def main() -> int:
    parser = cli.Parser(prog="examples/microgpt.py", description=__doc__.splitlines()[0])
    named = "a text file with a name on each line"
    parser.add_argument("--names", type=Path, required=True, help=named)
    parser.add_argument("--steps", type=int, default=1000, help="training steps (1000)")
    parser.add_argument("--engine", choices=("python", "numpy"), default="python")
    parser.add_argument("--samples", type=int, default=20, help="names to write at the end (20)")
    slow = "steps to repeat with a node for each + and * (10; they are slow), 0: none"
    parser.add_argument("--unfused_steps", type=int, default=10, help=slow)
    arguments = parser.parse_args()
    if min(arguments.steps - 1, arguments.samples, arguments.unfused_steps) < 0:
        parser.error("--steps must be at least 1, --samples and --unfused_steps at least 0")
    try:
        text = arguments.names.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        parser.error(f"--names {arguments.names}: {reason}; give {named}")
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if not names:
        parser.error(f"--names {arguments.names}: no names in it; write one on each line")

    random.seed(42)
    random.shuffle(names)
    characters = sorted(set("".join(names)))
    index, special = {c: i for i, c in enumerate(characters)}, len(characters)
    config = microgpt(len(characters) + 1)
    weights = initial_weights(config.vocab_size)
    used = names[: arguments.steps]
    documents = [[special, *(index[c] for c in name), special] for name in used]
    adam = Adam(0.85, 0.99, 1e-8)
    trainer = create(arguments.engine, config, as_given(weights, arguments.engine), adam)
    print(f"num docs: {len(names)}")
    print(f"vocab size: {config.vocab_size}")
    print(f"num params: {trainer.model.num_parameters()}")

    nodes = []

    def report(step: int, loss: float):
        nodes.append(trainer.nodes)
        print(f"step {step + 1:4d} / {arguments.steps:4d} | loss {loss:.4f}")

    seconds = train(trainer, documents, arguments.steps, report)
    print("\n--- inference (new, hallucinated names) ---")
    for i in range(arguments.samples):
        name = "".join(characters[t] for t in sample(trainer.model, special))
        print(f"sample {i + 1:2d}: {cli.visible(name)}")
    print("\n--- graph ---")
    graph(arguments.engine, nodes, seconds)
    steps = min(arguments.unfused_steps, arguments.steps)
    if arguments.engine == "python" and steps > 0:
        other, unfused = create("unfused", config, weights, adam), []
        seconds = train(other, documents, steps, lambda *_: unfused.append(other.nodes))
        graph("unfused", unfused, seconds)
    return 0


def as_given(weights: dict, engine: str) -> dict:
    """Arrays for NumPy, which plain Python does without."""
    if engine == "python":
        return weights
    import numpy as np

    return {name: np.array(rows) for name, rows in weights.items()}


if __name__ == "__main__":
    sys.exit(cli.run("examples/microgpt.py", main))
