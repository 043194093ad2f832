"""torch.compile in the loop: for which shapes, and what happens where it fails."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from common.cli import is_out_of_memory
from common.device import to_device
from data.batches import Batch
from model import bf16_attention
from model.loss import LossModule, softmax_loss
from training.state import TrainState
from training.step import Loss


class CompiledLoss:
    """A LossModule through torch.compile, called like it.

    shape: the (B, T) of ids that is compiled, with these sizes as constants. Any other, such as an
    epoch's last, shorter batch, goes through the module as it is: to torch.compile it would be a
    reason to give up constant sizes for good. None: all shapes, as one compilation for any size.
    """

    def __init__(self, module: LossModule, shape: tuple[int, int] | None):
        module.compile_softmax()
        bf16_attention.become_operator()
        self.module, self.shape = module, shape
        self.compiled = torch.compile(module, dynamic=shape is None)

    def __call__(self, ids: torch.Tensor, *targets: torch.Tensor | None) -> torch.Tensor:
        fits = self.shape is None or ids.shape == self.shape
        return (self.compiled if fits else self.module)(ids, *targets)


def compile_loss(
    state: TrainState,
    micro_batches: Sequence[Batch],
    targets: int,
    log: Callable[[str], object],
) -> Loss:
    """state.loss_module compiled, tried on one batch; or as it is where that fails.

    Raises what is raised where memory is full: that is no failure of the compiler.
    """
    log("compile: the first step takes longer")
    shape = full_shape(state)
    batch = micro_batches[0]
    if shape is not None and batch.ids.shape != shape:  # the last one of an epoch
        batch = state.batches.examples.batch(np.arange(shape[0]))
    reason, compiled = "", state.loss_module
    try:
        compiled = CompiledLoss(state.loss_module, shape)
        with state.precision.autocast(state.device):
            ids, *targets_and_indices = to_device(batch.inputs, state.device)
            assert ids is not None  # no batch lacks them
            loss = compiled(ids, *targets_and_indices)
            (loss / targets).backward()
    except Exception as error:  # whatever the compiler's many parts raise
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    finally:
        state.model.zero_grad(set_to_none=True)
    if not state.processes.largest(bool(reason)):
        return compiled
    reason = reason or "in another process"
    log(f"compile: torch.compile failed ({reason}); continuing without it")
    torch._dynamo.reset()
    state.loss_module.softmax_loss = softmax_loss
    return state.loss_module


def full_shape(state: TrainState) -> tuple[int, int] | None:
    """(B, T) of the micro-batches of a stream of text; None for documents, whose lengths vary."""
    examples = state.batches.examples
    if not examples.are_windows:
        return None
    rows = math.ceil(state.batches.rows(0) / state.config.train.accumulation_steps)
    return rows, examples.seq_len
