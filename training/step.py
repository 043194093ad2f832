"""One optimizer step: forward and backward over the micro-batches, clip, check, update."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from common.device import Precision, to_device
from data.batches import NO_BATCH, Batch
from data.rng import derive_seed
from training.config import Config
from training.gradient_sum import PairwiseSum
from training.sharding import whole
from training.state import TrainState
from training.timing import StepTimer

Loss = Callable[..., torch.Tensor]  # a LossModule, or what torch.compile makes of one


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or infinite: the run stops before the update."""


@dataclass
class StepResult:
    """What one optimizer step did.

    loss: mean over the step's targets, in nats. grad_norm: before clipping. tokens: read by the
    model, without padding; padded_tokens: with it. flops: forward and backward, with the output
    projection only where it is taken. updated: False where fp16 skipped the update.
    """

    loss: float
    grad_norm: float
    tokens: int
    padded_tokens: int
    flops: int
    updated: bool


class MicroStepState(Protocol):
    """What a micro-batch needs of a run: a TrainState, or what tools/replay.py restores."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def scaler(self) -> torch.amp.GradScaler: ...


def train_step(
    state: TrainState,
    loss_module: Loss,
    micro_batches: Sequence[Batch],
    targets: int,
    step: int,
    timer: StepTimer,
) -> StepResult:
    """Moves the weights by one step. `loss_module` is state.loss_module, or that compiled.

    micro_batches: this process's share of the step's, which may be none. The loss is the mean over
    all `targets` tokens of the step, however it is cut into micro-batches, which are added up in
    pairs, whoever computes them (gradient_sum.py, gradient_exchange.py). Raises NonFiniteError; in
    fp16 a non-finite gradient under a finite loss only skips the update, of every optimizer, and
    halves the scale, until that falls below 1.
    """
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=state.precision.weights, device=state.device)
    in_pairs = state.in_pairs and not state.shards  # which are added up after each micro-batch
    summed = PairwiseSum(state.model.parameters(), pairs=in_pairs)
    first, parts = state.processes.index * state.share, count_parts(state, step)
    for micro, batch in enumerate(share_passes(state, micro_batches, step), first):
        summed.begin(total)
        if state.exchange and batch is micro_batches[-1]:
            state.exchange.begin(summed, parts)
        total += micro_step(state, loss_module, batch, targets, step, micro, timer.part)
    if state.exchange:
        with timer.part("exchange"):
            state.exchange.finish(summed, total, parts)
    else:
        summed.finish(total)
    if state.shards:
        total = state.shards.add_up(total)
    with timer.part("optimizer"):
        loss, norm = update(state, total).tolist()  # the only time that a GPU is waited for
    return finish_step(state, micro_batches, step, loss, norm)


def share_passes(state: TrainState, micro_batches: Sequence[Batch], step: int) -> Sequence[Batch]:
    """What this process runs forward and backward. Where it holds a part of the weights, that is as
    often as the first process: the others need its part also in an epoch's short last batch."""
    if not state.shards:
        return micro_batches
    accumulation = state.config.train.accumulation_steps
    most = min(state.share, state.batches.count_micro_batches(step, accumulation))
    return [*micro_batches, *[NO_BATCH] * (most - len(micro_batches))]


def count_parts(state: TrainState, step: int) -> int:
    """How many processes, the first ones, have micro-batches in this step."""
    if state.processes.count == 1:
        return 1
    accumulation = state.config.train.accumulation_steps
    return math.ceil(state.batches.count_micro_batches(step, accumulation) / state.share)


def update(state: TrainState, total: torch.Tensor) -> torch.Tensor:
    """Clips the gradient and moves the weights. Returns the loss `total` and the norm, (2,).

    Where either is not finite the optimizers skip the update, without anybody waiting for a look.
    """
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    clip = state.config.optimizer.grad_clip or math.inf
    parameters = list(state.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    result = torch.stack([total.to(norm.dtype), norm])
    found_inf = 1 - result.isfinite().all().float()
    for optimizer in state.optimizers:
        optimizer.found_inf = found_inf  # pyrefly: ignore[missing-attribute], fused ones have it
        optimizer.step()
    return result


def finish_step(
    state: TrainState, micro_batches: Sequence[Batch], step: int, loss: float, norm: float
) -> StepResult:
    """What comes after the update: whether there was one, and the scale of the next."""
    check_finite(state, loss, norm, step)  # the same numbers in all processes
    state.scaler.update()
    work = (
        sum(batch.tokens for batch in micro_batches),
        sum(batch.ids.size for batch in micro_batches),
        step_flops(state, micro_batches),
    )
    columns = zip(*state.processes.gather(work), strict=True)
    tokens, padded_tokens, flops = (int(sum(column)) for column in columns)
    return StepResult(loss, norm, tokens, padded_tokens, flops, updated=math.isfinite(norm))


def micro_step(
    state: MicroStepState,
    loss_module: Loss,
    batch: Batch,
    targets: int,
    step: int,
    micro: int,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Adds the gradients of one micro-batch. Returns its share of the step's loss, a scalar.

    part(name): a context that times a part of it.
    """
    with part("data"):
        inputs = to_device(batch.inputs, state.device)
    # dropout's numbers depend on this alone: there is no random state to save
    torch.manual_seed(derive_seed("dropout", state.config.seed, step, micro, 0))
    return forward_backward(state, loss_module, inputs, targets, part)


def forward_backward(
    state: MicroStepState,
    loss_module: Loss,
    inputs: Sequence[torch.Tensor | None],
    targets: int,
    part: Callable[[str], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Adds the gradients of `inputs`, of which `loss_module` is called. Returns their loss."""
    with part("forward"), state.precision.autocast(state.device):
        loss = loss_module(*inputs) / targets
    with part("backward"):
        state.scaler.scale(loss).backward()
    return loss.detach()


def step_flops(state: TrainState, micro_batches: Sequence[Batch]) -> int:
    """FLOPs of a step, forward and backward: logits are taken at the targets alone."""
    output = state.model.output.weight.numel()
    return sum(
        batch.ids.size * state.model.flops_per_token(batch.ids.shape[1])
        - 6 * output * (batch.ids.size - len(batch.targets))
        for batch in micro_batches
    )


def check_finite(state: TrainState, loss: float, norm: float, step: int):
    """Raises NonFiniteError where going on would spoil the weights."""
    problem = None
    if not math.isfinite(loss):
        problem = f"the loss is {loss}"
    elif not math.isfinite(norm):
        if state.scaler.is_enabled() and state.scaler.get_scale() / 2 >= 1:
            return
        problem = f"the gradient's norm is {norm}"
        if state.scaler.is_enabled():
            problem += " and the loss scale would fall below 1"
    if problem:
        raise NonFiniteError(f"step {step + 1}: {problem}")
