"""One optimizer step: forward and backward over the micro-batches, clip, check, update."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from data.rng import key
from training.evaluation import to_device
from training.loss import loss_sum
from training.metrics import Clock
from training.setup import Training


class NonFinite(Exception):
    """A loss or a gradient that is not a number: the run stops before the update."""


@dataclass
class StepResult:
    """loss: mean over the step's targets, in nats. grad_norm: before clipping.

    tokens: read by the model, without padding; positions: with it. flops: forward and backward,
    with the output projection only where it is taken.
    """

    loss: float
    grad_norm: float
    tokens: int
    positions: int
    flops: int
    updated: bool


def train_step(t: Training, hidden, micro_batches, targets: int, step: int, clock: Clock):
    """Moves the weights by one step. `hidden` is the model's method, or that compiled.

    The loss is the mean over all `targets` tokens of the step, however it is cut into
    micro-batches. Raises NonFinite; in fp16 a non-finite gradient under a finite loss only skips
    the update, of every optimizer, and halves the scale, until that falls below 1.
    """
    for optimizer in t.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=t.device)
    for micro, batch in enumerate(micro_batches):
        total = total + micro_step(t, hidden, batch, targets, step, micro, clock.part)
    with clock.part("optimizer"):
        for optimizer in t.optimizers:
            t.scaler.unscale_(optimizer)
        clip = t.config.optimizer.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), clip)
        loss, norm = total.item(), norm.item()
        updated = math.isfinite(norm)
        check_finite(t, loss, norm, step)
        if updated:
            for optimizer in t.optimizers:
                t.scaler.step(optimizer)
        t.scaler.update()
    tokens = sum(batch.tokens for batch in micro_batches)
    positions = sum(batch.ids.size for batch in micro_batches)
    output = t.model.output.weight.numel()
    flops = sum(
        batch.ids.size * t.model.flops_per_token(batch.ids.shape[1])
        - 6 * output * (batch.ids.size - len(batch.targets))
        for batch in micro_batches
    )
    return StepResult(loss, norm, tokens, positions, flops, updated)


def micro_step(t, hidden, batch, targets: int, step: int, micro: int, part=nullcontext):
    """Adds the gradients of one micro-batch. Returns its share of the step's loss.

    t: a Training, or what training/replay.py restores of one. part(name): a context to time it.
    """
    with part("data"):
        inputs = to_device(batch, t.device)
    # dropout's numbers depend on this alone: there is no random state to save
    torch.manual_seed(key("dropout", t.config.seed, step, micro, 0))
    with part("forward"), t.precision.autocast(t.device):
        loss = loss_sum(t.model, *inputs, hidden) / targets
    with part("backward"):
        t.scaler.scale(loss).backward()
    return loss.detach()


def check_finite(t: Training, loss: float, norm: float, step: int):
    """Raises NonFinite where going on would spoil the weights."""
    what = None
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    elif not math.isfinite(norm):
        if t.scaler.is_enabled() and t.scaler.get_scale() / 2 >= 1:
            return
        what = f"the gradient's norm is {norm}"
        if t.scaler.is_enabled():
            what += " and the loss scale would fall below 1"
    if what:
        raise NonFinite(f"step {step + 1}: {what}")


def compiled(t: Training, micro_batches, targets: int, report):
    """`model.hidden` through torch.compile, tried on one batch; as it is where that fails."""
    report("compile: the first step takes a while")
    try:
        hidden = torch.compile(t.model.hidden)
        with t.precision.autocast(t.device):
            loss = loss_sum(t.model, *to_device(micro_batches[0], t.device), hidden)
            (loss / targets).backward()
        return hidden
    except Exception as error:  # whatever the compiler's many parts raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        report(f"compile: not on this machine ({reason}); going on without")
        torch._dynamo.reset()
        return t.model.hidden
    finally:
        t.model.zero_grad(set_to_none=True)
