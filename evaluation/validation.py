"""The validation loss of a model while it trains.

It does not touch training: nothing is drawn at random, so a run evaluated more often has the same
losses bit for bit.
"""

import math

import torch

from common.device import Precision, to_device
from common.signals import StopRequest
from data.batches import Examples, evaluation_batches
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
) -> dict[str, float]:
    """Loss in nats a token over the validation examples (`limit` of them, 0: all).

    batch_size: examples in a forward pass; as many as in one of training need no more memory.
    Returns the scalars to log: loss/val, perplexity/val, bits_per_byte/val. Raises Interrupted.
    """
    device = next(loss_module.parameters()).device
    total, targets = 0.0, 0
    loss_module.eval()
    for batch in evaluation_batches(examples, batch_size, limit):
        if stop.signal:
            raise Interrupted
        with precision.autocast(device):
            total += loss_module(*to_device(batch.inputs, device)).item()
        targets += len(batch.targets)
    loss_module.train()
    loss = total / targets
    return {
        "loss/val": loss,
        "perplexity/val": math.exp(min(loss, 700)),
        "bits_per_byte/val": loss * examples.split.targets_per_byte() / math.log(2),
    }
