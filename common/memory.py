"""Memory of this process: what is kept of it, and how much was used. No torch at import."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
KERNELS = 128  # several times those of a step, which all have to fit


def keep_freed_memory():
    """Lets glibc keep what is freed, for the next step to take again.

    By default it hands large blocks back to the kernel, which clears each page when it is wanted
    again: 78,000 page faults in a step of full.toml, a tenth of its time. Elsewhere than on Linux
    with glibc this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # 32 MiB, the most that is allowed
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never


def limit_kernel_caches():
    """Has PyTorch and oneDNN keep the CPU kernels of KERNELS shapes, not of 1,024 each.

    In bfloat16 each shape has kernels and buffers of its own, and batches of texts have many: 150
    steps of the default run took 1.5 GB, and now 0.75 in as much time. To be called before anything
    is computed, for it is read once; LRU_CACHE_CAPACITY and ONEDNN_PRIMITIVE_CACHE_CAPACITY win.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def return_freed_memory():
    """Lets glibc hand what is free back to the kernel, where threads have left holes.

    Elsewhere than on Linux with glibc this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(cuda: bool = False) -> int:
    """Bytes: the most that was resident in this process; on CUDA, the most allocated there."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    try:  # of this program alone; getrusage also counts the process it was forked from
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return _peak_by_getrusage()


def resident_memory() -> int:
    """Bytes resident in this process now; where the system does not tell (macOS), its peak."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_by_getrusage()


def _peak_by_getrusage() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
