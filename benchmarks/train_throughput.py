"""Training throughput against nanoGPT: the same model, batch and machine.

    python -m benchmarks.train_throughput --nanogpt PATH      PATH: a checkout of karpathy/nanoGPT

The sides train on random ids with dropout 0, in turns, each time in a new process; what is printed
is the median of the rounds and the ratio of the medians. nanoGPT runs as its own train.py would:
in float32 on a CPU, where it has no autocast.
"""

import argparse
import contextlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from training.config import OptimizerConfig, TrainConfig, load
from training.device import choose_device, choose_precision, set_up, synchronize
from training.loss import loss_sum
from training.optimizer import create_optimizers

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = {  # name: (our shape, batch, length)
    "4x128": (
        ModelConfig(
            65, 128, 4, 4, 512, 64, 0.0, positions="learned", norm_first=True, final_norm=True,
            activation="gelu", bias=False, scale_embedding=False, tie_embeddings=True,
        ), 12, 64,
    ),
    "full": (replace(load(CONFIGS / "full.toml").model, vocab_size=9000, dropout=0.0), 32, 128),
}  # fmt: skip


def ours(shape: ModelConfig, precision_name: str, device):
    """A function that trains one step on (ids, targets)."""
    precision, _ = choose_precision(precision_name, device)
    model = TransformerDecoder.from_config(shape, precision.weights).to(device)
    optimizers = create_optimizers(model, OptimizerConfig())

    def step(ids, targets):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with precision.autocast(device):
            loss = loss_sum(model, ids, targets.flatten(), None) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return step


def nanogpt(checkout: Path, shape: ModelConfig, device):
    """The same with nanoGPT's model and optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=shape.max_len, vocab_size=shape.vocab_size, n_layer=shape.n_layers,
        n_head=shape.n_heads, n_embd=shape.d_model, dropout=0.0, bias=False,
    )  # fmt: skip
    model = module.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)

    def step(ids, targets):
        _, loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def tokens_per_second(step, ids, targets, steps: int, device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step(ids, targets)
    synchronize(device)
    return steps * ids.numel() / (time.perf_counter() - began)


def measure(side: str, name: str, checkout: str, seconds: float, device_name: str):
    """Prints the tokens per second of one side; runs in a process of its own."""
    device = choose_device(device_name)
    shape, batch, length = MODELS[name]
    ids, targets = torch.randint(0, shape.vocab_size, (2, batch, length), device=device)
    if side == "nanogpt":
        with contextlib.redirect_stdout(sys.stderr):
            step = nanogpt(Path(checkout), shape, device)
    else:
        set_up(TrainConfig(), device)  # as train.py does
        step = ours(shape, side, device)
    tokens_per_second(step, ids, targets, 3, device)  # warm up
    speed = tokens_per_second(step, ids, targets, 3, device)
    steps = max(3, round(seconds * speed / ids.numel()))
    print(tokens_per_second(step, ids, targets, steps, device))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each side of a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        measure(*arguments.side, arguments.nanogpt, arguments.seconds, arguments.device)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    command = [sys.executable, "-m", "benchmarks.train_throughput", "--device", arguments.device]
    command += ["--nanogpt", arguments.nanogpt, "--seconds", str(arguments.seconds)]
    sides = arguments.precisions + (["nanogpt"] if arguments.nanogpt else [])
    found = {}
    for name in arguments.models:
        speeds = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side in sides:
                worker = [*command, "--side", side, name]
                result = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603, ours
                speeds[side].append(float(result.stdout))
        base = statistics.median(speeds.get("nanogpt", [float("nan")]))
        for side, values in speeds.items():
            middle = statistics.median(values)
            found[f"{name} {side}"] = {"tokens_per_second": values, "times_nanogpt": middle / base}
            print(
                f"{name:6} {side:8} {middle:9,.0f} tokens/s  ({min(values):,.0f} to "
                f"{max(values):,.0f})  {middle / base:5.2f} x nanoGPT"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
