"""What a token costs the further a text goes, to 4,096, and what the cache's memory is, on a CPU.

    python -m benchmarks.decode_cost [--rounds 3]

full.toml's layers with max_len 4,096 and random weights write one text of 4,096 tokens, in float32.
Beside it stands one pass over the whole text, which is what each token would cost without a cache.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import ROOT, Result, in_turns, parser
from common import cli
from generation.batched import generate
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from model.transformer_full import TransformerDecoder
from training.config import load

LONGEST, BUCKET, ROWS = 4096, 256, 16
WHOLE = (256, 512, 1024, 2048, 4096)  # lengths at which the text is read again as a whole


def decoder() -> TransformerDecoder:
    torch.manual_seed(0)
    shape = load(ROOT / "configs" / "full.toml").model
    return TransformerDecoder.from_config(
        replace(shape, vocab_size=9000, max_len=LONGEST, dropout=0.0)
    ).eval()


def cached() -> dict:
    """Milliseconds a token: the mean of each stretch of BUCKET tokens."""
    model, times = decoder(), []
    generate(model, [[1]], Sampling(top_k=50, max_new_tokens=32))  # warm up
    rules = Sampling(top_k=50, max_new_tokens=LONGEST - 1)
    began = time.perf_counter()
    generate(model, [[1]], rules, on_token=lambda row, token: times.append(time.perf_counter()))
    ends = [began, *times[BUCKET - 1 :: BUCKET], times[-1]]  # the first token was the prompt
    sizes = [BUCKET] * (len(ends) - 2) + [len(times) % BUCKET]
    return {
        "ms": [1000 * (b - a) / n for a, b, n in zip(ends[:-1], ends[1:], sizes, strict=True) if n]
    }


@torch.inference_mode()
def whole() -> dict:
    """Milliseconds of one pass over a whole text, for its last token alone, at each of WHOLE."""
    model, found = decoder(), []
    for length in WHOLE:
        ids = torch.randint(0, 9000, (1, length))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            model(ids, target_indices=torch.tensor([length - 1]))
            seconds.append(time.perf_counter() - began)
        found.append(1000 * min(seconds))
    return {"ms": found}


def memory() -> dict:
    """Bytes by which this process grows with a cache, and what arithmetic says."""
    model = decoder()
    config = model.config
    before = resident()
    cache = KVCache(model, ROWS, LONGEST)
    grown = resident() - before
    # keys and values, layers, rows, places, width, bytes of a float32
    bytes_said = 2 * config.n_layers * ROWS * LONGEST * config.d_model * 4
    return {"grown": grown, "said": bytes_said, "nbytes": cache.nbytes}


def resident() -> int:
    """Bytes of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main():
    arguments = parser(__doc__, rounds=3).parse_args()
    if arguments.side:
        print(json.dumps({"cached": cached, "whole": whole, "memory": memory}[arguments.side[0]]()))
        return
    found = in_turns(
        "decode_cost", {k: [k] for k in ("cached", "whole", "memory")}, arguments.rounds
    )
    ms, again = (
        [
            statistics.median(values)
            for values in zip(*(run["ms"] for run in found[side]), strict=True)
        ]
        for side in ("cached", "whole")
    )
    places = [min(BUCKET * (i + 1), LONGEST) for i in range(len(ms))]
    slope, start = statistics.linear_regression(places, ms)
    straight = statistics.correlation(places, ms) ** 2
    result = Result("decode_cost", "What a token costs the further a text goes")
    rows = []
    for length, one_pass in zip(WHOLE, again, strict=True):
        upto = [value for place, value in zip(places, ms, strict=True) if place <= length]
        total = sum(upto) * BUCKET / 1000
        rows.append([f"{length:,}", upto[-1], start + slope * length, total, one_pass])
    result.table(
        "One text, float32",
        ["tokens", "ms a token there", "by the fitted line", "seconds to there",
         "ms a token if the whole text were read again"],
        rows,
        f"Means of {BUCKET} tokens, medians of {arguments.rounds} rounds. The line: {start:.2f} ms "
        f"and {1000 * slope:.3f} ms for each 1,000 tokens that stand before (r^2 {straight:.3f}): "
        "a step reads the weights and the keys and values of what stands before.",
    )  # fmt: skip
    held = found["memory"][0]
    result.table(
        f"Memory of the cache: {ROWS} texts of {LONGEST:,} tokens, float32",
        ["by arithmetic, MB", "as KVCache.nbytes says, MB", "growth of the process, MB"],
        [[held[key] / 1e6 for key in ("said", "nbytes", "grown")]],
    )
    doubled = sum(ms) / sum(ms[: len(ms) // 2])
    result.claim(
        "time of 4,096 tokens against 2,048 (linear: 2, each pass anew: 4 and more)",
        doubled,
        3,
        at_most=True,
    )
    result.claim(
        "memory of the cache against arithmetic", held["grown"] / held["said"], 1.02, at_most=True
    )
    result.plot(
        "Time of a token by its place in the text", "tokens before it", "ms",
        {"with the cache": list(zip(places, ms, strict=True)),
         "the whole text read again": list(zip(WHOLE, again, strict=True))}, log="xy",
    )  # fmt: skip
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.decode_cost", main))
