"""Generating against GPT-2 of `transformers`: the same size, machine and rules, on a CPU.

    python -m benchmarks.generation [--rounds 4]

About 9 M parameters of random weights, a vocabulary of 9,000, prompts of 16 tokens, 128 new ones
with top_k 50. Each side is called as its users call it, `generate` from prompt to tokens, and has
written once before it is timed; ours lays out its weights anew in each call. Beside it stands what
the machine would allow, and where our time goes.
"""

import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace

import torch
from torch.profiler import profile

from benchmarks.harness import ROOT, Result, in_turns, median, parser, spread, worker
from common import cli
from common.memory import keep_freed_memory
from generation.batched import generate
from generation.cpu_decoder import CPUDecoder, PackedLinear
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from model.transformer_full import TransformerDecoder
from training.config import load

VOCABULARY, PROMPT, NEW, TOP_K, MAX_LEN = 9000, 16, 128, 50, 256
BATCHES = (1, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {("fp32", 1): 2, ("fp32", 16): 2, ("bf16", 1): 3, ("bf16", 16): 4}  # times transformers
LARGE = 2**28  # bytes that no cache holds
KINDS = {  # the first of which a name has a part
    "linear layers": ("_linear_pointwise",),
    "laying out their weights": ("_reorder_linear_weight", "aten::cat"),
    "attention": ("scaled_dot_product",),
    "norms": ("layer_norm",),
    "prefill": ("aten::addmm",),
    "sampling": (
        "topk", "sort", "gather", "cumsum", "exp", "amax", "sum", "masked_fill", "aten::eq",
        "aten::lt", "aten::abs", "aten::ne", "_double", "aten::div", "aten::sub", "any", "all",
    ),
    "copies, the cache's among them": ("copy_", "index_put", "fill_", "index"),
}  # fmt: skip


def shape():
    """full.toml's model, of this vocabulary and length."""
    model = load(ROOT / "configs" / "full.toml").model
    return replace(model, vocab_size=VOCABULARY, max_len=MAX_LEN, dropout=0.0)


def ours(precision: str):
    """Our decoder with random weights, and a function that writes after prompts."""
    keep_freed_memory()  # as generate.py does
    torch.manual_seed(0)
    model = TransformerDecoder.from_config(shape()).to(DTYPES[precision]).eval()
    rules = Sampling(top_k=TOP_K, max_new_tokens=NEW)
    return model, lambda prompts: generate(model, prompts.tolist(), rules)


def transformers(precision: str):
    """The same of `transformers`, with a GPT-2 of the same layers and widths."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = shape()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=MAX_LEN, n_embd=config.d_model,
            n_layer=config.n_layers, n_head=config.n_heads, n_inner=config.d_ff,
            tie_word_embeddings=config.tie_embeddings, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.to(DTYPES[precision]).eval()  # pyrefly: ignore[bad-argument-type], wrapped untyped

    def write(prompts):
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=TOP_K,
            use_cache=True, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0,
        )[:, PROMPT:]  # fmt: skip

    return model, write


def measure(side: str, precision: str) -> dict:
    """Tokens per second at each batch: medians of several calls."""
    model, write = {"ours": ours, "transformers": transformers}[side](precision)
    found: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    for batch in BATCHES:
        prompts = torch.randint(1, VOCABULARY, (batch, PROMPT))
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            rows = write(prompts)
            seconds.append(time.perf_counter() - began)
            if {len(row) for row in rows} != {NEW}:
                raise RuntimeError(f"{side} wrote {[len(row) for row in rows]} tokens, not {NEW}")
        found[str(batch)] = batch * NEW / statistics.median(seconds[1:])
    return found


def bandwidth(nbytes: int) -> float:
    """Bytes per second that are read of an array of this size, again and again."""
    array, seconds = torch.ones(nbytes // 4), []
    for _ in range(max(10, 2**28 // nbytes)):
        began = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds)


@torch.inference_mode()
def limits(precision: str) -> dict:
    """What a step reads, how fast that can be read, and what the linear layers alone allow."""
    model, _ = ours(precision)
    config, step = model.config, CPUDecoder(model)
    products = [
        product
        for layer in step.layers
        for part in (layer.self_attn, layer.feed_forward)
        for product in vars(part).values()
        if isinstance(product, PackedLinear)
    ]
    products.append(step.output)
    weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, torch.nn.Linear))
    found = {"weights": weights, "memory": bandwidth(LARGE), "cache": bandwidth(weights)}
    for batch in BATCHES:
        kv = KVCache(model, batch, PROMPT + NEW // 2, torch.float32).nbytes  # half of the way
        narrow, wide = (
            torch.randn(batch, n).to(DTYPES[precision]) for n in (config.d_model, config.d_ff)
        )
        down, seconds = {vars(layer.feed_forward)["linear2"] for layer in step.layers}, []
        for _ in range(100):
            began = time.perf_counter()
            for product in products:
                product(wide if product in down else narrow)
            seconds.append(time.perf_counter() - began)
        found[f"products {batch}"] = batch / statistics.median(seconds)
        found[f"kv {batch}"] = kv
    return found


def shares(precision: str) -> dict:
    """Where the time of a call goes, by kind of operation: shares for each batch."""
    _, write = ours(precision)
    found = {}
    for batch in BATCHES:
        prompts = torch.randint(1, VOCABULARY, (batch, PROMPT))
        write(prompts)
        with profile() as record:
            began = time.perf_counter()
            write(prompts)
            seconds = time.perf_counter() - began
        spent: dict[str, float] = defaultdict(float)
        for event in record.key_averages():
            kinds = (k for k, names in KINDS.items() if any(name in event.key for name in names))
            spent[next(kinds, "other operations")] += event.self_cpu_time_total / 1e6
        spent["Python between operations"] = max(0.0, seconds - sum(spent.values()))
        total = sum(spent.values())
        found[str(batch)] = {kind: value / total for kind, value in spent.items()}
    return found


def main():
    arguments = parser(__doc__, rounds=4).parse_args()
    if arguments.side:
        kind, *rest = arguments.side
        print(
            json.dumps(
                {"limits": limits, "shares": shares}.get(kind, lambda p: measure(kind, p))(*rest)
            )
        )
        return
    sides = {f"{side} {p}": [side, p] for p in DTYPES for side in ("transformers", "ours")}
    found = in_turns("generation", sides, arguments.rounds)
    result = Result("generation", "Generating on a CPU against transformers")
    compare(result, found)
    bound(result, found, {p: worker("generation", "limits", p) for p in DTYPES})
    profiles = {p: worker("generation", "shares", p) for p in DTYPES}
    columns = [(p, str(batch)) for p in DTYPES for batch in BATCHES]
    kinds = Counter()
    for p, batch in columns:
        kinds.update(profiles[p][batch])
    rows = [
        [kind, *(f"{profiles[p][batch].get(kind, 0):.0%}" for p, batch in columns)]
        for kind, _ in kinds.most_common()
    ]
    result.table(
        "Where our time goes (torch.profiler, which itself slows what is short)",
        ["kind", *(f"{p}, batch {batch}" for p, batch in columns)],
        rows,
    )  # fmt: skip
    result.finish(arguments.json)


def compare(result: Result, found: dict):
    """The table of both sides, and the bars."""
    rows, counts = [], {side: runs[0]["parameters"] for side, runs in found.items()}
    for batch in map(str, BATCHES):
        best = {p: median(found[f"transformers {p}"], batch) for p in DTYPES}
        for side, runs in found.items():
            base = best["fp32"] if side.endswith("fp32") else max(best.values())
            speed = median(runs, batch)
            rows.append([side, batch, speed, spread(runs, batch), f"{speed / base:.2f}"])
            bar = BARS[side.split()[1], int(batch)]
            if side.startswith("ours"):
                against = "fp32" if side.endswith("fp32") else "the better of fp32 and bf16"
                text = f"{side}, batch {batch}, against transformers' {against}"
                result.claim(text, speed / base, bar)
    result.table(
        "Tokens per second",
        ["side", "batch", "tokens/s", "least to most", "times transformers"],
        rows,
        f"Parameters: ours {counts['ours fp32']:,}, theirs {counts['transformers fp32']:,}; "
        f"{torch.get_num_threads()} threads. fp32 is compared with fp32, bf16 with the better of "
        "their two.",
    )


def bound(result: Result, found: dict, limit: dict):
    """What the machine allows, and how much of it is reached."""
    rows = []
    for precision, figures in limit.items():
        for batch in BATCHES:
            nbytes = figures["weights"] + figures[f"kv {batch}"]
            memory, cache = (batch * figures[k] / nbytes for k in ("memory", "cache"))
            alone = figures[f"products {batch}"]
            reached = median(found[f"ours {precision}"], str(batch))
            megabytes = f"{figures['weights'] / 1e6:.1f} + {figures[f'kv {batch}'] / 1e6:.1f}"
            rows.append(
                [precision, str(batch), megabytes, memory, cache, alone, reached,
                 f"{reached / memory:.0%}", f"{reached / alone:.0%}"]
            )  # fmt: skip
    speeds = ", ".join(
        f"{p}: {f['memory'] / 1e9:.1f} GB/s of memory ({LARGE / 1e6:.0f} MB), "
        f"{f['cache'] / 1e9:.1f} GB/s of an array as large as the weights"
        for p, f in limit.items()
    )
    result.table(
        "The limit: tokens per second if reading were all",
        ["weights", "batch", "MB a step, weights + keys and values", "read from memory",
         "read as an array of this size", "linear layers alone", "reached", "of memory's limit",
         "of the linear layers'"],
        rows,
        f"Read: {speeds}. More than 100 % of memory's limit: the weights stay in the cache.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.generation", main))
