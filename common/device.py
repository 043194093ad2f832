"""Device and precision, found or checked before anything depends on them. No torch at import."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from common.memory import resident_memory

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Precision:
    """What the parameters are stored in, and what matrix products are computed in."""

    name: Literal["fp32", "bf16", "fp16", "fp64"]
    weights_dtype: str
    products_dtype: str

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the parameters."""
        import torch

        return getattr(torch, self.weights_dtype)

    @property
    def products(self) -> torch.dtype:
        """The dtype of the matrix products."""
        import torch

        return getattr(torch, self.products_dtype)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context for forward passes."""
        import torch

        if self.products_dtype == self.weights_dtype:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.products)


PRECISIONS = {
    "fp32": Precision("fp32", "float32", "float32"),
    "bf16": Precision("bf16", "float32", "bfloat16"),
    "fp16": Precision("fp16", "float32", "float16"),
    "fp64": Precision("fp64", "float64", "float64"),
}


def choose_device(name: str) -> torch.device:
    """The device asked for, or the best there is. Raises UserError where it is not there."""
    import torch

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
    import torch

    if device.type == "mps" and name == "fp64":
        raise UserError("--precision fp64: mps has no float64; use --device cpu")
    if name != "auto":
        return PRECISIONS[name], "as requested"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PRECISIONS["bf16"], "auto: this GPU has bf16"
        return PRECISIONS["fp32"], "auto: this GPU has no bf16"
    if device.type == "cpu" and cpu_has_bf16():
        return PRECISIONS["bf16"], "auto: this CPU has bf16 instructions"
    if device.type == "cpu":
        return PRECISIONS["fp32"], "auto: this CPU has no bf16 instructions"
    return PRECISIONS["fp32"], f"auto: the default on {device.type}"


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    import torch

    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def matmul_flops(device: torch.device, precision: Precision, n: int = 0) -> float:
    """FLOP/s of a large matrix product here, n-cubed: what MFU is a share of. Median of 5."""
    import torch

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


def to_device(
    arrays: Sequence[np.ndarray | None], device: torch.device
) -> list[torch.Tensor | None]:
    """NumPy arrays as tensors there; None stays None. To a GPU they are copied asynchronously."""
    import torch

    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    if device.type != "cuda":
        return [None if tensor is None else tensor.to(device) for tensor in tensors]
    return [
        None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)
        for tensor in tensors
    ]


def synchronize(device: torch.device):
    """Waits for the device, so that a host clock can be read."""
    if device.type == "cpu":
        return
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_used(device: torch.device) -> int:
    """Bytes: the peak allocated on CUDA, else what this process has resident."""
    if device.type != "cuda":
        return resident_memory()
    import torch

    return torch.cuda.max_memory_allocated(device)
