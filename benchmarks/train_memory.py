"""Peak memory of training full.toml's model, beside its peers; and what saving memory costs.

    python -m benchmarks.train_memory --nanogpt PATH      PATH: a checkout of karpathy/nanoGPT

The most that was resident in a process of its own that trains on batches of 32 x 128 random ids,
PyTorch included. Accumulation cuts the same batch into four micro-batches.
"""

import json
import sys
import time
from statistics import median

import torch

from benchmarks.harness import Result, in_turns, parser, spread
from benchmarks.harness import median as middle
from benchmarks.peers import MODELS, PEERS, make
from common import cli
from common.device import choose_device
from common.memory import peak_memory

STEPS = 8
WAYS = {  # name: (side, recompute, accumulation)
    "Triptych, bf16": ("bf16", False, 1),
    "Triptych, bf16, --train.accumulation_steps 4": ("bf16", False, 4),
    "Triptych, bf16, --train.checkpoint_activations": ("bf16", True, 1),
    "Triptych, bf16, both": ("bf16", True, 4),
    "Triptych, fp32": ("fp32", False, 1),
    PEERS["nanogpt"]: ("nanogpt", False, 1),
    PEERS["gpt2-fp32"]: ("gpt2-fp32", False, 1),
    PEERS["gpt2-bf16"]: ("gpt2-bf16", False, 1),
}


def measure(side: str, recompute: bool, accumulation: int, checkout: str) -> dict:
    """Peak megabytes, those before the model was made, and the median time of a step."""
    device = choose_device("cpu")
    shape, rows, length = MODELS["full"]
    if side.startswith("gpt2"):
        import transformers  # noqa: F401, so that it counts as what is there before
    before = peak_memory()
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length))
    how = {"recompute": recompute, "accumulation": accumulation} if side in ("bf16", "fp32") else {}
    step, seconds = make(side, shape, length, device, checkout, **how), []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(ids, targets)
        seconds.append(time.perf_counter() - began)
    return {"peak": peak_memory() / 1e6, "before": before / 1e6, "ms": 1e3 * median(seconds[3:])}


def main():
    options = parser(__doc__, rounds=3)
    options.add_argument("--nanogpt", default="", help="a checkout of nanoGPT to compare with")
    arguments = options.parse_args()
    if arguments.side:
        side, recompute, accumulation, checkout = arguments.side
        print(json.dumps(measure(side, recompute == "True", int(accumulation), checkout)))
        return
    ways = {k: v for k, v in WAYS.items() if v[0] != "nanogpt" or arguments.nanogpt}
    sides = {name: [*way, arguments.nanogpt] for name, way in ways.items()}
    found = in_turns("train_memory", sides, arguments.rounds)
    peak = {name: middle(runs, "peak") for name, runs in found.items()}
    ms = {name: middle(runs, "ms") for name, runs in found.items()}
    plain = "Triptych, bf16"

    def over(name: str) -> str:
        return f"{ms[name] / ms[plain]:.2f} x"

    result = Result("train_memory", "Memory of training")
    result.table(
        "full.toml, 9,000 pieces, batch 32 x 128, CPU",
        ["", "peak MB", "spread", "of it PyTorch and imports", "ms a step", "time over the first"],
        [
            [name, peak[name], spread(runs, "peak"), middle(runs, "before"), ms[name], over(name)]
            for name, runs in found.items()
        ],
    )
    for peer in ("nanogpt", "gpt2-fp32"):
        if PEERS[peer] in peak:
            ratio = peak[plain] / peak[PEERS[peer]]
            result.claim(f"peak memory in bf16 over {PEERS[peer]}'s", ratio, 1.0, at_most=True)
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.train_memory", main))
