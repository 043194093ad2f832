"""Several processes that train one model together, each with its own micro-batches of a step.

torchrun starts them (RANK, WORLD_SIZE, LOCAL_RANK and the address of the first are in the
environment), and torch.distributed connects them: NCCL on GPUs, Gloo on CPUs. What they add up has
the same bits for any number of them: each process's micro-batches are a node of the tree of
training/gradient_sum.py, and the nodes are added in that tree's order.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process, from 0, and how many there are."""

    index: int = 0
    count: int = 1

    def share(self, micro_batches: int) -> int:
        """How many of a step's micro-batches each process takes: a power of two.

        Raises UserError, which names the nearest numbers of micro-batches that can be shared so.
        """
        if self.count == 1:
            return micro_batches
        share, rest = divmod(micro_batches, self.count)
        if rest == 0 and share & (share - 1) == 0 and share:
            return share
        below = self.count * 2 ** max(0, share.bit_length() - 1)
        near = [n for n in (below, 2 * below) if n != micro_batches]
        raise UserError(
            f"train.accumulation_steps = {micro_batches}: {self.count} processes share the "
            "micro-batches of a step when each has 1, 2, 4 or another power of two; set it to "
            + " or ".join(map(str, near))
        )

    def add_up(self, tensors: Sequence[torch.Tensor], parts: int):
        """Replaces `tensors` by their sums over the first `parts` processes, in every process.

        The rest, whose turn a short batch does not reach, add nothing. All tensors have one dtype.
        Each process adds up one piece of all tensors, so that as much is sent as by a ring.
        """
        if self.count == 1:
            return
        size = sum(tensor.numel() for tensor in tensors)
        piece = -(-size // self.count)
        flat = tensors[0].new_zeros(piece * self.count)
        views = flat[:size].split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(views), [tensor.reshape(-1) for tensor in tensors])
        received = torch.empty_like(flat)
        dist.all_to_all_single(received, flat)
        dist.all_gather_into_tensor(flat, tree(received.view(self.count, piece)[:parts]))
        sums = [view.view_as(tensor) for view, tensor in zip(views, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), sums)

    def gather(self, values: Sequence[float], device: torch.device) -> list[list[float]]:
        """The numbers that each process gives, as many by each, in the order of processes."""
        if self.count == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=device)
        found = own.new_empty(self.count * len(values))
        dist.all_gather_into_tensor(found, own)
        return found.view(self.count, -1).tolist()


def tree(nodes: torch.Tensor) -> torch.Tensor:
    """The sum of (n, ...) over n, neighbours first, as training/gradient_sum.py adds them."""
    while len(nodes) > 1:
        pairs = nodes[0 : len(nodes) - 1 : 2] + nodes[1::2]
        nodes = torch.cat([pairs, nodes[-1:]]) if len(nodes) % 2 else pairs
    return nodes[0]


def connect(backend: str, timeout: timedelta) -> Processes:
    """The processes that torchrun started, connected; or this one alone.

    backend: "nccl" or "gloo". timeout: how long one of them waits for the others.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    dist.init_process_group(backend, timeout=timeout)
    return Processes(dist.get_rank(), count)
