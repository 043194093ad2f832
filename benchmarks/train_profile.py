"""Where a training step's time goes, by kind of operation: the plain way to write it, and ours.

    python -m benchmarks.train_profile --model full

"plain" is the same decoder under the same autocast as it is usually trained: PyTorch's attention,
all logits at once into F.cross_entropy, AdamW that is not fused, and freed memory handed back.
"""

import argparse
import json
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch.profiler import profile

from benchmarks.harness import Result, in_turns, parser
from benchmarks.harness import median as middle
from benchmarks.peers import CLIP, MODELS, make
from common import cli
from common.device import PRECISIONS, choose_device, matmul_flops
from model import transformer_full

KINDS = {  # the first that a name contains
    "attention": (
        "scaled_dot_product",
        "BF16Attention",
        "ShortAttention",
        "aten::bmm",
        "aten::baddbmm",
        "_softmax_backward_data",
    ),
    "matrix products": ("aten::mm", "aten::addmm"),
    "casts and copies": ("aten::copy_",),
    "softmax": ("softmax", "nll_loss", "aten::exp", "amax", "gather", "scatter"),
    "norms": ("layer_norm", "rms_norm"),
    "activation": ("relu", "gelu", "clamp_min", "threshold"),
    "optimizer": ("_fused_adamw", "_foreach", "Optimizer", "vector_norm"),
}
WARM_UP, STEPS = 3, 5


def plain(shape, precision_name: str, device):
    """The decoder trained without any of this project's tricks."""

    def attention(Q, K, V, mask, dropout, causal):
        return F.scaled_dot_product_attention(Q, K, V, mask, dropout, is_causal=causal)

    transformer_full.attention = attention
    precision = PRECISIONS[precision_name]
    model = transformer_full.TransformerDecoder.from_config(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)

    def step(ids, targets):
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast(device):
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def measure(side: str, name: str, precision: str) -> dict:
    """Milliseconds a step by kind, and in all."""
    device = choose_device("cpu")
    shape, rows, length = MODELS[name]
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length))
    if side == "plain":
        step = plain(shape, precision, device)
    else:
        step = make(precision, shape, length, device)
    for _ in range(WARM_UP):
        step(ids, targets)
    with profile() as record:
        for _ in range(STEPS):
            step(ids, targets)
    spent = Counter(dict.fromkeys(KINDS, 0.0))
    for event in record.key_averages():
        kinds = (k for k, names in KINDS.items() if any(name in event.key for name in names))
        spent[next(kinds, "other")] += event.self_cpu_time_total / 1e3 / STEPS
    return {**spent, "all": sum(spent.values())}


def main():
    options = parser(__doc__, rounds=3)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--models", nargs="+", choices=MODELS, default=["full", "4x128"])
    options.add_argument("--precision", choices=PRECISIONS, default="bf16")
    arguments = options.parse_args()
    if arguments.side:
        print(json.dumps(measure(*arguments.side)))
        return
    result = Result("train_profile", "Where a training step's time goes")
    device = choose_device("cpu")
    rates = {name: matmul_flops(device, PRECISIONS[name]) / 1e9 for name in ("fp32", "bf16")}
    for name in arguments.models:
        sides = {side: [side, name, arguments.precision] for side in ("plain", "ours")}
        found = in_turns("train_profile", sides, arguments.rounds)
        ms = {s: {k: middle(runs, k) for k in runs[0]} for s, runs in found.items()}
        kinds = sorted(ms["ours"], key=lambda kind: -ms["plain"][kind])
        result.table(
            f"{name} in {arguments.precision}, milliseconds a step",
            ["", "plain PyTorch", "Triptych", "share of it"],
            [
                [k, ms["plain"][k], ms["ours"][k], f"{ms['ours'][k] / ms['ours']['all']:.0%}"]
                for k in kinds
            ],
        )
    rated = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    result.tables[-1]["note"] = f"A large matrix product here runs at {rated}."
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.train_profile", main))
