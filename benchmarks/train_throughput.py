"""Training throughput beside nanoGPT, GPT-2 of transformers and torch.nn.TransformerEncoder.

    python -m benchmarks.train_throughput --nanogpt PATH      PATH: a checkout of karpathy/nanoGPT
    python -m benchmarks.train_throughput --nanogpt PATH --device cuda --models gpt2_124m

The sides train on the same random ids with dropout 0, in turns, each time in a new process. What
is compared are medians: on a CPU, of the precision that `--precision auto` takes there and of the
faster of each peer's ways. On CUDA the model FLOPs utilisation is given too: 6 FLOPs for each
weight and 12 C for each pair of layer and key a token, over the rate of an 8192-cubed bf16 product.
"""

import json
import sys
import time

import torch

from benchmarks.harness import Result, in_turns, parser, spread
from benchmarks.harness import median as middle
from benchmarks.peers import MODELS, PEERS, make
from common import cli
from common.device import PRECISIONS, choose_device, matmul_flops, synchronize
from model.transformer_full import TransformerDecoder
from training.precision import Work, choose_precision

BARS = {"4x128": 1.3, "full": 1.5}
GPU_BARS = {"nanogpt": 1.2, "mfu": 0.5}
WARM_UP = 3


def measure(side: str, name: str, checkout: str, seconds: float, device_name: str) -> dict:
    """Tokens per second of one side, in this process."""
    device = choose_device(device_name)
    shape, rows, length = MODELS[name]
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length), device=device)
    step = make(side, shape, length, device, checkout)

    def speed(steps: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(steps):
            step(ids, targets)
        synchronize(device)
        return steps * ids.numel() / (time.perf_counter() - began)

    speed(WARM_UP)
    steps = max(WARM_UP, round(seconds * speed(WARM_UP) / ids.numel()))
    found = {"tokens_per_second": speed(steps)}
    if device.type == "cuda":
        with torch.device("meta"):
            flops = TransformerDecoder.from_config(shape).flops_per_token(length)
        rate = matmul_flops(device, PRECISIONS["bf16"], 8192)
        found["mfu"] = found["tokens_per_second"] * flops / rate
    return found


def main():
    options = parser(__doc__)
    options.add_argument("--nanogpt", default="", help="a checkout of nanoGPT to compare with")
    options.add_argument("--models", nargs="+", choices=MODELS, default=["4x128", "full"])
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    options.add_argument("--seconds", type=float, default=4.0, help="for each side of a round")
    options.add_argument("--device", default="auto")
    arguments = options.parse_args()
    if arguments.side:
        side, name, checkout, seconds, device = arguments.side
        print(json.dumps(measure(side, name, checkout, float(seconds), device)))
        return
    device = choose_device(arguments.device)
    peers = [
        name
        for name in arguments.peers
        if (arguments.nanogpt or not name.startswith("nanogpt"))
        and (device.type == "cpu" or name != "nanogpt-compiled")  # which "nanogpt" is there
    ]
    result = Result("train_throughput", "Training throughput")
    for name in arguments.models:
        compare(result, name, ["bf16", "fp32", *peers], arguments, device)
    result.finish(arguments.json)


def compare(result: Result, name: str, sides: list[str], arguments, device):
    """One model's table, and its bars."""
    shape, rows, length = MODELS[name]
    more = (name, arguments.nanogpt, arguments.seconds, device)
    found = in_turns("train_throughput", {s: [s, *more] for s in sides}, arguments.rounds)
    speeds = {side: middle(runs, "tokens_per_second") for side, runs in found.items()}
    mfu = {side: middle(runs, "mfu") for side, runs in found.items() if "mfu" in runs[0]}
    base = next((s for s in ("nanogpt", "gpt2-fp32") if s in speeds), "fp32")
    table = []
    for side, runs in found.items():
        cells = [PEERS.get(side, f"**Triptych, {side}**"), speeds[side]]
        cells += [spread(runs, "tokens_per_second"), f"{speeds[side] / speeds[base]:.2f} x"]
        table.append(cells + ([f"{mfu[side]:.1%}"] if mfu else []))
    result.table(
        f"{name}: {shape.n_layers} layers x {shape.d_model}, vocabulary {shape.vocab_size:,}, "
        f"batch {rows} x {length}, {device.type}",
        ["", "tokens/s", "spread", f"over {PEERS.get(base, base)}"] + (["MFU"] if mfu else []),
        table,
    )
    if device.type == "cuda":
        if "nanogpt" in speeds:
            ratio = speeds["bf16"] / speeds["nanogpt"]
            result.claim(f"{name}, over nanoGPT compiled", ratio, GPU_BARS["nanogpt"])
        result.claim(f"{name}, model FLOPs utilisation", mfu["bf16"], GPU_BARS["mfu"], unit="")
    if device.type == "cpu" and name in BARS:
        own, why = choose_precision("auto", shape, Work(rows, length, 1.0), device)
        result.tables[-1]["note"] = f"Precision: {own.name} ({why})."
        for peer in ("nanogpt", "gpt2"):
            best = max(
                (s for s in speeds if s.startswith(peer)), key=speeds.__getitem__, default=""
            )
            if best:
                text = f"{name}, {own.name} as auto takes it, over {PEERS[best]}"
                result.claim(text, speeds[own.name] / speeds[best], BARS[name])


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.train_throughput", main))
