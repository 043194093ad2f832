"""How the cost of a token of training grows with the model and with the context.

    python -m benchmarks.cost

Forward and backward pass over about 4,096 tokens (fewer in large models), each point in a process
of its own. The times are fitted, in relative error, by a + b N + c L C T: something for every
token, the N weights that multiply, and the T keys of attention in L layers of width C.
"""

import json
import sys
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from benchmarks.harness import Result, in_turns, parser
from benchmarks.harness import median as middle
from benchmarks.peers import GPT
from common import cli
from common.device import PRECISIONS, choose_device, cpu_has_bf16
from model.cpu_layers import use_cpu_layers
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.config import TrainConfig
from training.setup import configure_torch

SIZES = {  # name: (layers, width); heads are 32 to 64 wide
    "0.1 M": (2, 64), "0.8 M": (4, 128), "3 M": (4, 256), "11 M": (6, 384), "25 M": (8, 512),
    "124 M": (12, 768),
}  # fmt: skip
VOCABULARY, LARGE_VOCABULARY = 256, 50304  # the second for the largest, as it ships
CONTEXT, CONTEXTS, OF_CONTEXTS = 256, (64, 128, 256, 512, 1024, 2048, 4096), "3 M"


def shape_of(size: str, context: int):
    layers, width = SIZES[size]
    vocab_size = LARGE_VOCABULARY if size == "124 M" else VOCABULARY
    heads = max(2, width // 64)
    return replace(
        GPT, vocab_size=vocab_size, d_model=width, n_heads=heads, n_layers=layers, d_ff=4 * width,
        max_len=context,
    )  # fmt: skip


def measure(size: str, context: int) -> dict:
    """Microseconds a token; and what the fit needs to know."""
    device = choose_device("cpu")
    precision = PRECISIONS["bf16" if cpu_has_bf16() else "fp32"]  # one for all sizes
    configure_torch(TrainConfig(), device)
    shape = shape_of(size, context)
    model = TransformerDecoder.from_config(shape)
    use_cpu_layers(model)
    loss_module = LossModule(model)
    tokens = 1024 if size == "124 M" else 4096
    ids, targets = torch.randint(0, shape.vocab_size, (2, max(1, tokens // context), context))
    seconds = []
    for _ in range(6):
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        with precision.autocast(device):
            loss = loss_module(ids, targets.flatten())
        loss.backward()
        seconds.append(time.perf_counter() - began)
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return {
        "us": 1e6 * median(seconds[2:]) / ids.numel(), "parameters": model.num_parameters(),
        "multiplied": multiplied, "keys": shape.n_layers * shape.d_model * context,
        "flops": model.flops_per_token(context), "precision": precision.name,
    }  # fmt: skip


def fit(points: list[dict]) -> np.ndarray:
    """a, b, c of us = a + b multiplied + c keys, none below 0, least relative squares."""
    columns = np.array([[1.0, p["multiplied"], p["keys"]] for p in points])
    columns /= np.array([[p["us"]] for p in points])
    left = [0, 1, 2]
    while True:  # a term that comes out negative is left out
        found = np.zeros(3)
        found[left] = np.linalg.lstsq(columns[:, left], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            return found
        left.remove(int(found.argmin()))


def main():
    options = parser(__doc__, rounds=3)
    arguments = options.parse_args()
    if arguments.side:
        size, context = arguments.side
        print(json.dumps(measure(size, int(context))))
        return
    places = [(size, CONTEXT) for size in SIZES]
    places += [(OF_CONTEXTS, context) for context in CONTEXTS if context != CONTEXT]
    found = in_turns("cost", {str(p): list(p) for p in places}, arguments.rounds)
    points = [{**found[str(p)][0], "us": middle(found[str(p)], "us")} for p in places]
    a, b, c = fit(points)
    rows, errors = [], []
    for (_, context), p in zip(places, points, strict=True):
        fitted = a + b * p["multiplied"] + c * p["keys"]
        errors.append(abs(fitted / p["us"] - 1))
        rows.append([f"{p['parameters']:,}", context, p["us"], fitted])
        rows[-1] += [f"{fitted / p['us'] - 1:+.0%}", p["flops"] / p["us"] / 1e3]
    result = Result("cost", "What a token of training costs")
    result.table(
        f"forward and backward, {points[0]['precision']}, CPU",
        ["parameters", "context", "µs a token", "fitted", "off by", "GFLOP/s"],
        rows,
        f"Fitted: {a:.2f} µs + {1e6 * b:.3f} µs for a million weights that multiply + "
        f"{1e6 * c:.3f} µs for a million of layers x width x context; off by "
        f"{np.median(errors):.0%} in the middle, {max(errors):.0%} at most.",
    )
    by_size = [(p["parameters"], p) for p in points[: len(SIZES)]]
    line = [(n, a + b * p["multiplied"] + c * p["keys"]) for n, p in by_size]
    result.plot(
        f"Cost by size, context {CONTEXT}", "parameters", "µs a token",
        {"measured": [(n, p["us"]) for n, p in by_size], "fitted": line}, "xy",
    )  # fmt: skip
    by_context = sorted(
        (q[1], p) for q, p in zip(places, points, strict=True) if q[0] == OF_CONTEXTS
    )
    line = [(t, a + b * p["multiplied"] + c * p["keys"]) for t, p in by_context]
    result.plot(
        f"Cost by context, {OF_CONTEXTS} parameters", "context, tokens", "µs a token",
        {"measured": [(t, p["us"]) for t, p in by_context], "fitted": line}, "x",
    )  # fmt: skip
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.cost", main))
