"""The device and the precision of a run, found or checked before anything depends on them."""

import contextlib
import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.config import UserError
from model.narrow_attention import cpu_has_bf16
from training.memory import keep_freed_memory

if TYPE_CHECKING:  # it loads pydantic, which generating has no use for
    from training.config import TrainConfig


@dataclass(frozen=True)
class Precision:
    """`weights` is the dtype the parameters have, `products` that of the matrix products."""

    name: str
    weights: torch.dtype
    products: torch.dtype

    def autocast(self, device: torch.device):
        """The context for forward passes."""
        if self.products == self.weights:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.products)


PRECISIONS = {
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16),
    "fp16": Precision("fp16", torch.float32, torch.float16),
    "fp64": Precision("fp64", torch.float64, torch.float64),
}


def choose_device(name: str) -> torch.device:
    """The device asked for, or the best there is. Raises UserError where it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if (device.index or 0) >= count[device.type]:
        why = "this PyTorch was built without CUDA" if not torch.version.cuda else "none was found"
        raise UserError(
            f"--device {name}: not on this machine"
            + (f" ({why})" if device.type == "cuda" else "")
            + "; use --device cpu"
        )
    return device


def choose_precision(name: str, device: torch.device) -> tuple[Precision, str]:
    """The precision asked for, or the fastest that trains as well; and why, for people."""
    if device.type == "mps" and name == "fp64":
        raise UserError("--precision fp64: mps has no float64; use --device cpu")
    if name != "auto":
        return PRECISIONS[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PRECISIONS["bf16"], "auto: this GPU has bf16"
        return PRECISIONS["fp32"], "auto: this GPU has no bf16"
    if device.type == "cpu" and cpu_has_bf16():
        return PRECISIONS["bf16"], "auto: this CPU has bf16 instructions"
    if device.type == "cpu":
        return PRECISIONS["fp32"], "auto: this CPU has no bf16 instructions"
    return PRECISIONS["fp32"], f"auto: what {device.type} does best"


def set_up(config: "TrainConfig", device: torch.device):
    """Threads and algorithms. One thread and two give different bits, so they are recorded."""
    if device.type == "cpu":
        keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)


def matmul_flops(device: torch.device, precision: Precision, n: int = 0) -> float:
    """FLOP/s of a large matrix product here, n-cubed: what MFU is a share of. Median of 5."""
    n = n or (4096 if device.type == "cuda" else 1024)
    a = torch.ones(n, n, device=device, dtype=precision.products).normal_()
    seconds = []
    for _ in range(7):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[2:])


def synchronize(device: torch.device):
    """Waits for the device, so that a host clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_used(device: torch.device) -> int:
    """Bytes: the peak allocated on CUDA, else this process's resident memory (macOS: its peak)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
