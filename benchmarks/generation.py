"""Generating against GPT-2 of `transformers`: the same size, machine and rules.

    python -m benchmarks.generation [--rounds 4]
    python -m benchmarks.generation --device cuda --model gpt2_124m [--seconds 120]

About 9 M parameters of random weights, a vocabulary of 9,000, prompts of 16 tokens, 128 new ones
with top_k 50. Each side is called as its users call it, `generate` from prompt to tokens, and has
written once before it is timed; ours lays out its weights anew in each call. Beside it stands what
the machine would allow, and where our time goes.

With --device or --model both sides alone are measured, in bf16, with top_k 50 and with all tokens
to choose from; transformers once with its default cache and once with its static one, for which it
compiles itself. A side that takes longer than --seconds is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.profiler import profile

from benchmarks import peers
from benchmarks.harness import RESULTS, ROOT, Result, in_turns, median, parser, spread, worker
from common import cli
from common.device import memory_used, synchronize
from common.memory import keep_freed_memory
from generation import cuda_decoder
from generation.batched import generate
from generation.cpu_decoder import CPUDecoder, PackedFeedForward, PackedLinear
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

PROMPT, NEW, TOP_K, MAX_LEN = 16, 128, 50, 256
BATCHES, CUDA_BATCHES = (1, 16), (1, 16, 64)
MODELS = {
    "full": replace(peers.FULL, max_len=MAX_LEN),
    "gpt2_124m": peers.GPT,
    "tiny": peers.MODELS["tiny"][0],
}
SIDES = {  # of --device and --model: what each is called in a table
    "ours": "ours",
    "transformers": "transformers",
    "transformers-static": "transformers, static cache",
}
CUDA_BAR, CUDA_TOKENS = 3, 1200  # times the better transformers; tokens/s at batch 1, gpt2_124m
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


@dataclass(frozen=True)
class Task:
    """What both sides write: how many tokens of what model, in how many rows, and where."""

    model: str = "full"
    device: str = "cpu"
    batches: tuple[int, ...] = BATCHES
    new: int = NEW
    top_k: int = TOP_K

    @property
    def shape(self) -> ModelConfig:
        return MODELS[self.model]

    def prompts(self, batch: int) -> torch.Tensor:
        """Random ids (batch, PROMPT) on the device."""
        ids = torch.randint(1, self.shape.vocab_size, (batch, PROMPT))
        return ids.to(self.device)


Write = Callable[[torch.Tensor], list[list[int]]]


def ours(precision: str, task: Task, compiled=False) -> tuple[TransformerDecoder, Write]:
    """Our decoder with random weights, and a function that writes after prompts."""
    keep_freed_memory()  # as generate.py does
    torch.manual_seed(0)
    model = TransformerDecoder.from_config(task.shape).to(task.device, DTYPES[precision]).eval()
    rules = Sampling(top_k=task.top_k, max_new_tokens=task.new)
    return model, lambda prompts: generate(model, prompts.tolist(), rules, compiled=compiled)


def transformers(precision: str, task: Task, cache: str | None = None):
    """The same of `transformers`, with a GPT-2 of the same layers and widths.

    cache: its `cache_implementation`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = task.shape
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_len, n_embd=config.d_model,
            n_layer=config.n_layers, n_head=config.n_heads, n_inner=config.d_ff,
            tie_word_embeddings=config.tie_embeddings, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.to(task.device, DTYPES[precision]).eval()  # pyrefly: ignore[bad-argument-type], untyped
    if task.device == "cuda":  # cuDNN's makes a plan for each length: slower for them as for us
        torch.backends.cuda.enable_cudnn_sdp(False)
    how = {} if cache is None else {"cache_implementation": cache}

    def write(prompts: torch.Tensor) -> list[list[int]]:
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=task.top_k,
            use_cache=True, min_new_tokens=task.new, max_new_tokens=task.new, pad_token_id=0, **how,
        )[:, PROMPT:].tolist()  # fmt: skip

    return model, write


def measure(side: str, precision: str, task: Task) -> dict:
    """Tokens per second at each batch: medians of several calls."""
    kind, _, cache = side.partition("-")
    if kind == "ours":
        model, write = ours(precision, task)
    else:
        model, write = transformers(precision, task, cache or None)
    found: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    found |= timed(side, write, task)
    device = torch.device(task.device)
    found["memory"] = memory_used(device)
    if kind == "ours" and device.type == "cuda":  # 0: something kept it from recording
        found["graphs"] = sum(len(kept.recorded) for kept in cuda_decoder.kept.values())
    return found


def timed(side: str, write: Write, task: Task) -> dict[str, float]:
    """Tokens per second at each batch, and the seconds of its first call."""
    found, device = {}, torch.device(task.device)
    for batch in task.batches:
        prompts = task.prompts(batch)
        seconds = []
        for _ in range(4):
            synchronize(device)
            began = time.perf_counter()
            rows = write(prompts)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
            if {len(row) for row in rows} != {task.new}:
                raise RuntimeError(
                    f"{side} wrote {[len(row) for row in rows]} tokens, not {task.new}"
                )
        found[str(batch)] = batch * task.new / statistics.median(seconds[1:])
        found[f"first call {batch}"] = seconds[0]
    return found


def measure_apart(side: str, precision: str, task: Task, seconds: float) -> dict:
    """`measure` in a process of its own; {"error": why} where it fails or takes longer."""
    command = [sys.executable, "-m", "benchmarks.generation", "--side", side, precision]
    command += ["--model", task.model, "--device", task.device, "--new", str(task.new)]
    command += ["--top_k", str(task.top_k), "--batches", *map(str, task.batches)]
    try:
        done = subprocess.run(  # noqa: S603, ours
            command, capture_output=True, text=True, cwd=ROOT, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {seconds:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


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
    model, _ = ours(precision, Task())
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
        down = {cast(PackedFeedForward, layer.feed_forward).linear2 for layer in step.layers}
        seconds = []
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
    task, found = Task(), {}
    _, write = ours(precision, task)
    for batch in BATCHES:
        prompts = task.prompts(batch)
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
    made = parser(__doc__, rounds=4)
    made.add_argument("--model", choices=MODELS, default="full")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--batches", type=int, nargs="+", help="rows at a time")
    made.add_argument("--new", type=int, default=NEW, help="new tokens")
    made.add_argument("--top_k", type=int, default=TOP_K, help=argparse.SUPPRESS)
    made.add_argument("--seconds", type=float, default=300, help="that a side may take")
    arguments = made.parse_args()
    usual = CUDA_BATCHES if arguments.device == "cuda" else BATCHES
    batches = tuple(arguments.batches or usual)
    task = Task(arguments.model, arguments.device, batches, arguments.new, arguments.top_k)
    if arguments.side:
        kind, precision = arguments.side
        special = {"limits": limits, "shares": shares}
        found = special[kind](precision) if kind in special else measure(kind, precision, task)
        print(json.dumps(found))
        return
    if task != Task():
        out = arguments.json or RESULTS / f"generation_{task.device}_{task.model}.json"
        beside(task, arguments.rounds, arguments.seconds).finish(out)
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


def beside(task: Task, rounds: int, seconds: float) -> Result:
    """Both sides in bf16, in turns, with top_k and without."""
    where = "a GPU" if task.device == "cuda" else "a CPU"
    result = Result("generation", f"Generating on {where} against transformers: {task.model}")
    for top_k, rules in (task.top_k, f"top_k {task.top_k}"), (0, "all tokens"):
        runs = defaultdict(list)
        for number in range(rounds):
            for side in SIDES:
                print(f"round {number + 1} of {rounds}: {side}, {rules}", file=sys.stderr)
                if not any("error" in run for run in runs[side]):
                    some = replace(task, top_k=top_k)
                    runs[side].append(measure_apart(side, "bf16", some, seconds))
        failed = {side: r[-1]["error"] for side, r in runs.items() if "error" in r[-1]}
        right = {side: r for side, r in runs.items() if side not in failed}
        theirs = [side for side in right if side != "ours"]
        rows = []
        for batch in map(str, task.batches):
            best = max((median(right[side], batch) for side in theirs), default=0.0)
            for side, found in right.items():
                speed = median(found, batch)
                rows.append(
                    [SIDES[side], batch, speed, spread(found, batch),
                     f"{speed / best:.2f}" if best else "", median(found, f"first call {batch}")]
                )  # fmt: skip
            if task.device == "cuda" and "ours" in right:
                speed = median(right["ours"], batch)
                if best:
                    text = f"{rules}, batch {batch}, against the better transformers"
                    result.claim(text, speed / best, CUDA_BAR)
                if batch == "1" and task.model == "gpt2_124m":
                    result.claim(f"{rules}, batch 1", speed, CUDA_TOKENS, unit="tokens/s")
        notes = [f"{SIDES[side]}: {why}." for side, why in failed.items()]
        notes += [f"{SIDES[s]}: {median(r, 'memory') / 1e6:,.0f} MB." for s, r in right.items()]
        if task.device == "cuda" and "ours" in right:
            notes.append(f"CUDA graphs recorded: {median(right['ours'], 'graphs'):.0f}.")
        result.table(
            f"Tokens per second, {rules}",
            ["side", "batch", "tokens/s", "least to most", "times the better transformers",
             "first call, s"],
            rows,
            " ".join(notes),
        )  # fmt: skip
    return result


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
