"""Memory of this process: what is kept of it, and how much was used. Standard library only."""

import contextlib
import ctypes
import sys
from pathlib import Path


def keep_freed_memory():
    """Lets glibc keep what is freed, for the next step to take again.

    By default it hands large blocks back to the kernel, which clears each page when it is wanted
    again: 78,000 page faults in a step of full.toml, a tenth of its time. Elsewhere than on Linux
    with glibc this does nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: 32 MiB, the most that is allowed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never


def peak_memory(cuda: bool = False) -> int:
    """Bytes: the most that was resident in this process; on CUDA, the most allocated there."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    try:  # of this program alone; getrusage also counts the process it was forked from
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        try:
            import resource  # not on Windows
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
