"""What the sampling rules take of a step of a model of 124 M parameters, on a CPU.

    python -m benchmarks.sampling_cost [--rounds 3]

GPT-2's shape (12 layers, d 768, 12 heads, a vocabulary of 50,304) with random weights, one step and
one choice in turns. The choice is timed on logits of two kinds: peaked, the k-th most probable
token in proportion to 1/k^1.5, as a trained model's are; and flat, as this untrained model's are.
"""

import json
import statistics
import sys
import time

import torch

from benchmarks.harness import Result, in_turns, median, parser
from common import cli
from common.memory import keep_freed_memory
from generation.cpu_decoder import CACHE_DTYPE, CPUDecoder
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from generation.torch_sampling import sample_tokens
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

SHAPE = ModelConfig(
    50304, 768, 12, 12, 3072, 1024, 0.0, positions="learned", norm_first=True, final_norm=True,
    activation="gelu", scale_embedding=False, tie_embeddings=True,
)  # fmt: skip
RULES = {
    "greedy": Sampling(greedy=True),
    "top_k 50": Sampling(top_k=50),
    "top_k 50, top_p 0.9": Sampling(top_k=50, top_p=0.9),
    "top_p 0.9": Sampling(top_p=0.9),
    "top_k off, top_p 1": Sampling(),
}
BATCHES, PLACE, STEPS = (1, 16), 64, 10
BAR = 0.10  # of a step


@torch.inference_mode()
def measure(precision: str, batch: int) -> dict:
    """Milliseconds of a step, and of a choice by kind of logits and rules: medians."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    keep_freed_memory()  # as generate.py does
    torch.manual_seed(0)
    model = TransformerDecoder.from_config(SHAPE).to(dtype).eval()
    step, cache = CPUDecoder(model), KVCache(model, batch, PLACE + 1, CACHE_DTYPE)
    ids = torch.randint(0, SHAPE.vocab_size, (batch, 1))
    ranks = torch.rand(batch, SHAPE.vocab_size).argsort(-1) + 1.0
    peaked = (-1.5 * ranks.log()).to(dtype)
    seconds = {"step": []}
    for _ in range(STEPS + 2):
        for name, rules in RULES.items():
            for kind in "peaked", "flat":
                cache.lengths = [PLACE] * batch
                began = time.perf_counter()
                flat = step(ids, cache)
                middle = time.perf_counter()
                sample_tokens(peaked if kind == "peaked" else flat, rules, [0.5] * batch)
                seconds.setdefault(f"{kind}: {name}", []).append(time.perf_counter() - middle)
                seconds["step"].append(middle - began)
    warm = 2 * len(RULES) * 2
    found = {name: 1000 * statistics.median(s[2:]) for name, s in seconds.items()}
    return found | {"step": 1000 * statistics.median(seconds["step"][warm:])}


def main():
    arguments = parser(__doc__, rounds=3).parse_args()
    if arguments.side:
        precision, batch = arguments.side
        print(json.dumps(measure(precision, int(batch))))
        return
    sides = {f"{p}, batch {b}": [p, b] for p in ("fp32", "bf16") for b in BATCHES}
    found = in_turns("sampling_cost", sides, arguments.rounds)
    result = Result("sampling_cost", "What the sampling rules take of a step")
    parts = {side: {key: median(runs, key) for key in runs[0]} for side, runs in found.items()}
    for kind in "peaked", "flat":
        rows = [["the step itself", *(f"{part['step']:.1f} ms" for part in parts.values())]]
        for name in RULES:
            cells = ((part[f"{kind}: {name}"], part["step"]) for part in parts.values())
            rows.append([name, *(f"{ms:.2f} ms, {ms / step:.1%}" for ms, step in cells)])
        result.table(f"Logits: {kind}", ["rules", *parts], rows)
    for side, part in parts.items():
        name = max(RULES, key=lambda name, part=part: part[f"peaked: {name}"])
        share = part[f"peaked: {name}"] / part["step"]
        result.claim(
            f"the slowest rules ({name}), {side}: share of a step",
            100 * share,
            100 * BAR,
            True,
            "%",
        )
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.sampling_cost", main))
