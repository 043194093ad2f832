"""What sending gradients takes: measured between the processes there are, estimated for others.

The model is that of Hockney (1994): a message of n bytes takes latency + n / bandwidth. A bucket
of gradients goes through all-to-all and all-gather, each of W - 1 messages of 1/W of it, so that a
step takes

    update + M/W micro-batches + 2 (W - 1) (buckets * latency + bytes / W / bandwidth)

It leaves out that sending overlaps with the last backward pass, where one message disturbs another
(several hosts, switches), and that all wait for the slowest.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common.device import synchronize
from common.processes import Processes, all_gather

SIZES = [2**16, 2**20, 2**22, 2**24]  # bytes of the buckets that are tried
TRIES = 7


@dataclass(frozen=True)
class Transport:
    """latency: seconds a message. bandwidth: bytes a second and process."""

    latency: float
    bandwidth: float

    def seconds(self, processes: int, buckets: int, size: int) -> float:
        """What sending `size` bytes in so many buckets takes."""
        one_way = buckets * self.latency + size / processes / self.bandwidth
        return 2 * (processes - 1) * one_way


def measure_transport(processes: Processes, device: torch.device) -> Transport:
    """Sends buckets of several sizes, as a step does, and fits a Transport to their times.

    Called by all; of each size the slowest process counts.
    """
    times = []
    for size in SIZES:
        flat = torch.zeros(size // 4 // processes.count * processes.count, device=device)
        received, piece, own = torch.empty_like(flat), len(flat) // processes.count, []
        for _ in range(TRIES):
            synchronize(device)
            began = time.perf_counter()
            dist.all_to_all_single(received, flat)
            all_gather(flat, received[:piece].clone())
            synchronize(device)
            own.append(time.perf_counter() - began)
        seconds = statistics.median(own)
        times.append(max(row[0] for row in processes.gather([seconds])))
    return fit(SIZES, times, processes.count)


def fit(sizes: list[int], times: list[float], processes: int) -> Transport:
    """The Transport whose relative errors are smallest, in the sense of least squares."""
    messages = 2 * (processes - 1)
    columns = np.array([[messages, messages * size / processes] for size in sizes])
    scaled = columns / np.array(times)[:, None]  # relative: else the largest alone would count
    latency, inverse = np.linalg.lstsq(scaled, np.ones(len(times)))[0]
    return Transport(max(float(latency), 0.0), 1 / max(float(inverse), 1e-15))
