"""The validation loss of a model while it trains.

It does not touch training: nothing is drawn at random, so a run evaluated more often has the same
losses bit for bit.
"""

import math

import torch

from common.device import Precision, to_device
from common.processes import Processes
from common.signals import StopRequest
from data.batches import NO_BATCH, Examples, evaluation_batches
from model.loss import LossModule


class Interrupted(Exception):
    """A signal came in the middle of an evaluation; nothing of it is kept."""


@torch.no_grad()
def evaluate(
    loss_module: LossModule,
    examples: Examples,
    batch_size: int,
    limit: int,
    precision: Precision,
    stop: StopRequest,
    processes: Processes | None = None,
    together: bool = False,
) -> dict[str, float]:
    """Loss in nats a token over the validation examples (`limit` of them, 0: all).

    batch_size: examples in a forward pass; as many as in one of training need no more memory.
    processes: those that share the batches, if there are several. together: a forward pass takes
    all of them, because each holds a part of the weights. Returns the scalars to log:
    loss/val, perplexity/val, bits_per_byte/val, the same in each process. Raises Interrupted in all
    where one of them has got a signal.
    """
    device = next(loss_module.parameters()).device
    processes = processes or Processes()
    found: list[float] = []  # of each batch its loss, summed over its targets, and their number
    loss_module.eval()
    batches = evaluation_batches(examples, batch_size, limit, processes.index, processes.count)
    agree = processes.largest if together else int
    while True:
        batch = next(batches, None)
        if agree(2 if stop.signal else batch is not None) != 1:
            break
        batch = batch or NO_BATCH
        with precision.autocast(device):
            loss = loss_module(*to_device(batch.inputs, device)).item()
        found += loss, len(batch.targets)
    loss_module.train()
    if processes.largest(stop.signal):
        raise Interrupted
    most = processes.largest(len(found))
    by_process = processes.gather(found + [0.0] * (most - len(found)))
    # batch after batch, as one process adds them, whoever has computed them
    total = sum(row[i] for i in range(0, most, 2) for row in by_process)
    targets = sum(row[i] for i in range(1, most, 2) for row in by_process)
    loss = total / targets
    return {
        "loss/val": loss,
        "perplexity/val": math.exp(min(loss, 700)),
        "bits_per_byte/val": loss * examples.split.targets_per_byte() / math.log(2),
    }
