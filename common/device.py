"""Device and precision, found or checked before anything depends on them. No torch at import."""

from __future__ import annotations

import contextlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common import cuda
from common.errors import UserError
from common.memory import resident_memory

if TYPE_CHECKING:
    import numpy as np
    import torch


PRODUCT_SECONDS = 0.15  # of a product on a CPU: one in fp16 may take 15 times as long


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


def choose_device(name: str, local_index: int | None = None) -> torch.device:
    """The device asked for, or the best there is. Raises UserError where it is not there.

    local_index: of one of several processes on this host, each of which has a GPU of its own. A
    CUDA device with an index becomes the current one, which is where kernels and memory go that
    nobody has named a device for.
    """
    import torch

    if name == "auto":
        problem = cuda.find_problem(0)
        if not problem.why:
            return torch.device("cuda") if local_index is None else own_gpu(local_index)
        if not problem.is_absent and not local_index:
            print(f"--device auto: no cuda: {problem.why}; {problem.fix}", file=sys.stderr)
        mps = torch.backends.mps.is_available() and local_index is None
        return torch.device("mps" if mps else "cpu")
    # torch would read an index as one signed byte: 256 as 0, and 128 as -128
    parts = re.fullmatch(r"(cpu|cuda|mps)(?::(0|[1-9][0-9]{0,5}))?", name)
    if not parts:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda, cuda:1 or mps")
    kind, index = parts[1], int(parts[2] or 0)
    if local_index is not None and kind == "cuda":
        if parts[2]:
            raise UserError(
                f"--device {name}: each of several processes has its own GPU; use --device cuda"
            )
        return own_gpu(local_index)
    if local_index is not None and kind == "mps":
        raise UserError("--device mps: several processes cannot share it; use --device cpu")
    if kind == "cuda":
        problem = cuda.find_problem(index)
        if problem.why:
            raise UserError(f"--device {name}: not on this machine ({problem.why}); {problem.fix}")
        if parts[2]:
            torch.cuda.set_device(index)
    elif index or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: not on this machine; use --device cpu")
    return torch.device(name)


def own_gpu(local_index: int) -> torch.device:
    """The GPU of one of several processes on this host. Raises UserError where there is none."""
    import torch

    problem = cuda.find_problem(local_index)
    if problem.why:
        raise UserError(
            f"--device cuda: no GPU {local_index} for process {local_index} of this host "
            f"({problem.why}); start as many as there are GPUs (--nproc_per_node=gpu)"
        )
    torch.cuda.set_device(local_index)
    return torch.device("cuda", local_index)


def check_precision(name: str, device: torch.device):
    """Raises UserError for a precision that the device lacks."""
    if device.type == "mps" and name == "fp64":
        raise UserError("--precision fp64: mps has no float64; use --device cpu")


@cache
def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    import torch

    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def matmul_flops(device: torch.device, precision: Precision, n: int = 0) -> float:
    """FLOP/s of a large matrix product here, n-cubed: what MFU is a share of.

    The median of 5, of 1024-cubed or of the largest that takes no second in all; on CUDA the mean
    of 20 without a pause, after a tenth of a second in which the card takes up its clock.
    """
    import torch

    if device.type == "cuda":
        n = n or product_size(torch.cuda.mem_get_info(device)[0], precision.products.itemsize)
        return 2 * n**3 / cuda_product_seconds(device, precision, n)
    rate = 0.0
    for size in (n,) if n else (128, 256, 512, 1024):
        if rate and 2 * size**3 / rate > PRODUCT_SECONDS:
            break
        a = torch.linspace(-1, 1, size**2, device=device).reshape(size, size)
        a = a.to(precision.products)
        seconds = []
        for _ in range(7):
            synchronize(device)
            began = time.perf_counter()
            a @ a
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        rate = 2 * size**3 / statistics.median(seconds[2:])
    return rate


def product_size(free: int, itemsize: int) -> int:
    """n of the product that is timed on CUDA: its three matrices take a quarter of what is free."""
    return next((n for n in (8192, 4096, 2048) if 3 * n * n * itemsize <= free / 4), 1024)


def cuda_product_seconds(device: torch.device, precision: Precision, n: int) -> float:
    """Seconds of an n-cubed product, by CUDA's own clock. What it takes of memory is given back."""
    import torch

    products = 20
    with torch.cuda.device(device):
        a, b = (torch.empty(n, n, device=device, dtype=precision.products) for _ in range(2))
        result = torch.empty_like(a)
        a.normal_()
        b.normal_()
        torch.mm(a, b, out=result)  # makes cuBLAS ready
        torch.cuda.synchronize()
        warm = time.perf_counter() + 0.1
        while time.perf_counter() < warm:
            torch.mm(a, b, out=result)
            torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(products):
            torch.mm(a, b, out=result)
        end.record()
        end.synchronize()
        milliseconds = start.elapsed_time(end)
        del a, b, result
        torch.cuda.empty_cache()
    return milliseconds / 1000 / products


def datasheet_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s that the data sheet of this card has for such products; 0: not known here."""
    if device.type != "cuda":
        return 0.0
    import torch

    return cuda.datasheet_flops(torch.cuda.get_device_name(device), precision.name)


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


def forget_peak(device: torch.device):
    """On CUDA, makes the next peak of memory one of what follows."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def memory_scalars(device: torch.device) -> dict[str, float]:
    """What a log entry says of memory. On CUDA also the peaks of what tensors and torch took."""
    values = {"memory/megabytes": memory_used(device) / 1e6}
    if device.type == "cuda":
        import torch

        values["memory/allocated_megabytes"] = torch.cuda.max_memory_allocated(device) / 1e6
        values["memory/reserved_megabytes"] = torch.cuda.max_memory_reserved(device) / 1e6
    return values
