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
from data.mixture import MixedExamples
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
    loss/val, perplexity/val, bits_per_byte/val, the same in each process; of a mixture also
    loss/val/SOURCE for each. Raises Interrupted in all where one of them has got a signal.
    """
    if isinstance(examples, MixedExamples):
        losses = {}
        for (name, part), share in zip(examples.parts.items(), examples.shares, strict=True):
            own = limit and max(1, round(limit * share))
            values = evaluate(
                loss_module, part, batch_size, own, precision, stop, processes, together
            )
            losses[name] = values["loss/val"]
        return mixed(examples, losses)
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
    return scalars(total / targets, examples.split.targets_per_byte())


def scalars(loss: float, targets_per_byte: float) -> dict[str, float]:
    """What is logged of a validation loss, in nats a token."""
    return {
        "loss/val": loss,
        "perplexity/val": math.exp(min(loss, 700)),
        "bits_per_byte/val": loss * targets_per_byte / math.log(2),
    }


def mixed(examples: MixedExamples, losses: dict[str, float]) -> dict[str, float]:
    """The scalars of a mixture, of its sources' losses: what a token costs where they have their
    shares, as in training, however large their validation splits are."""
    loss = size = 0.0
    for (name, part), share in zip(examples.parts.items(), examples.shares, strict=True):
        loss += float(share) * losses[name]
        size += float(share) / part.split.targets_per_byte()
    return scalars(loss, 1 / size) | {f"loss/val/{name}": own for name, own in losses.items()}
