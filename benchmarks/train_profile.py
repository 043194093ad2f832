"""Where a training step's time goes, by kind of operation; and what products alone would allow.

python -m benchmarks.train_profile --model full --precision bf16
"""

import argparse
from collections import Counter

import torch
from torch.profiler import profile

from benchmarks.train_throughput import MODELS, ours
from training.config import TrainConfig
from training.device import PRECISIONS, choose_device, matmul_flops, set_up

KINDS = {  # the first that a name contains
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "casts and copies": ("aten::copy_",),
    "softmax of the loss": ("log_softmax", "aten::exp", "gather", "scatter"),
    "norms": ("layer_norm", "rms_norm"),
    "activation": ("relu", "gelu", "clamp_min", "threshold"),
    "optimizer": ("fused_adamw", "Optimizer", "vector_norm"),
}
STEPS = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="full")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    arguments = parser.parse_args()
    device = choose_device("cpu")
    set_up(TrainConfig(), device)
    shape, batch, length = MODELS[arguments.model]
    ids, targets = torch.randint(0, shape.vocab_size, (2, batch, length))
    step = ours(shape, arguments.precision, device)
    for _ in range(3):
        step(ids, targets)
    with profile() as record:
        for _ in range(STEPS):
            step(ids, targets)
    milliseconds = Counter()
    for event in record.key_averages():
        kinds = (k for k, names in KINDS.items() if any(name in event.key for name in names))
        milliseconds[next(kinds, "other")] += event.self_cpu_time_total / 1e3 / STEPS
    total = sum(milliseconds.values())
    print(f"{arguments.model}, {arguments.precision}: {total:.0f} ms a step")
    for kind, spent in milliseconds.most_common():
        print(f"  {kind:20} {spent:7.1f} ms  {spent / total:4.0%}")
    for name in ("fp32", "bf16"):
        print(
            f"a large product in {name}: {matmul_flops(device, PRECISIONS[name]) / 1e9:.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
