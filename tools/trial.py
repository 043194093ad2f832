"""Steps and an evaluation of a run, tried: the memory and the time that they take.

Where they do not fit into memory, the micro-batch is halved until they do. What is tried moves the
weights of this process, which are thrown away with it.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import cli
from common.device import forget_peak, memory_used, synchronize
from common.memory import peak_memory, return_freed_memory
from common.signals import StopRequest
from data.batches import cut
from evaluation.validation import evaluate
from training.compile import compile_loss
from training.optimizer import set_lr
from training.schedule import lr_factor
from training.state import TrainState
from training.step import Loss, NonFiniteError, StepResult, train_step
from training.timing import StepTimer
from training.visuals import Sampler

STEPS, SECONDS = 12, 3.0  # so many steps are timed, or three if they take longer than that
SAMPLED = 10_000  # batches of an epoch that are looked at

Log = Callable[[str], object]


@dataclass(frozen=True)
class Memory:
    """Bytes, of tensors where it says nothing else."""

    weights: int
    gradients: int
    optimizer: int
    step: int  # all of it, at the peak of the longest step
    evaluation: int  # and of an evaluation, samples included
    before: int  # before the first step
    available: int  # for what a run takes beyond that; 0: unknown
    reserved: int  # CUDA: what torch has taken of the card, at its peak

    @property
    def peak(self) -> int:
        """The most that the run takes."""
        return max(self.step, self.evaluation)

    @property
    def activations(self) -> int:
        """What a step takes beyond what it keeps, at its peak."""
        return max(0, self.step - self.weights - self.gradients - self.optimizer)


@dataclass(frozen=True)
class Measured:
    """What was measured, in seconds. tokens: of the steps that were timed."""

    first_loss: float
    memory: Memory
    steps: list[float]
    tokens: int
    evaluation: float  # one, samples included
    parts: dict[str, float]  # of all steps timed; of a GPU only what it is waited for


def try_run(state: TrainState, log: Log) -> tuple[Measured | None, str]:
    """Measures the run's first steps, its longest and an evaluation; or says why that cannot be.

    Where they do not fit into memory, says with how many accumulation steps they do, which
    `state` has afterwards; what is measured is then of those. Of several processes, one that has
    too little memory ends all with an error that says so.
    """
    if state.processes.count > 1:
        try:
            return measure(state, memory_available(state.device), log), ""
        except NonFiniteError as error:  # the same in all
            return None, str(error)
    available, failure = memory_available(state.device), ""
    with bounded_memory(state.device, available):
        while True:
            measured, full, problem = attempt(state, available, log)
            train = state.config.train
            if not full:
                break
            release(state)
            failure = "the run needs more memory than there is"
            if train.micro_batch_size == 1:
                less = "" if train.checkpoint_activations else " or --train.checkpoint_activations"
                return None, f"{failure}, even with a micro-batch of 1; use a smaller model{less}"
            more = min(2 * train.accumulation_steps, train.batch_size)
            log(f"  a micro-batch of {train.micro_batch_size} does not fit")
            state.config = replace(state.config, train=replace(train, accumulation_steps=more))
    if failure and measured:
        fits = f"train.accumulation_steps = {train.accumulation_steps} fits"
        return measured, f"{failure}; {fits} (micro-batch of {train.micro_batch_size})"
    return measured, problem


def attempt(state: TrainState, available: int, log: Log) -> tuple[Measured | None, bool, str]:
    """What was measured, whether memory was full, and what else is wrong.

    An exception holds the frames that it came through, and they hold tensors: here it ends.
    """
    try:
        return measure(state, available, log), False, ""
    except NonFiniteError as error:
        return None, False, str(error)
    except (MemoryError, RuntimeError) as error:
        if not cli.is_out_of_memory(error):
            raise
    return None, True, ""


def release(state: TrainState):
    """Gives back what a step that failed has left, so that the next has all memory there is."""
    state.loss_module.train()  # an evaluation that failed leaves it as it was then
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
    if state.config.compile:
        torch._dynamo.reset()  # of eight sizes the compiler takes no more
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()


def measure(state: TrainState, available: int, log: Log) -> Measured:
    """Takes the longest step, an evaluation, and the run's first steps, in this order.

    The longest step moves no weights. Raises NonFiniteError, and whatever a full memory raises.
    """
    begin, loss_module, device = state.progress.step, state.loss_module, state.device
    longest = int(np.argmax([padded for _, padded in step_sizes(state)]))
    if state.config.compile:
        micro_batches = state.batches(begin, state.config.train.accumulation_steps)
        loss_module = compile_loss(state, micro_batches, 1, log)
    before = sum(kept(state))
    with peak_of(device) as step_peak:
        timed_step(state, loss_module, longest, still=True)
    at_rest = sum(kept(state))
    with peak_of(device) as evaluation_peak:
        evaluation = timed_evaluation(state)
    memory = Memory(
        *kept(state),
        step=before + step_peak[0],
        evaluation=at_rest + evaluation_peak[0],
        before=before,
        available=available,
        reserved=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
    )
    first, _ = timed_step(state, loss_module, begin)
    seconds, tokens, timer = [], 0, StepTimer(device)

    def enough() -> bool:
        return len(seconds) >= 3 and (len(seconds) >= STEPS or sum(seconds) >= SECONDS)

    while not state.processes.largest(enough()):
        result, took = timed_step(state, loss_module, begin + 1 + len(seconds), timer=timer)
        seconds.append(took)
        tokens += result.tokens
    return Measured(first.loss, memory, seconds, tokens, evaluation, timer.seconds)


def kept(state: TrainState) -> tuple[int, int, int]:
    """Bytes of what is kept from step to step: weights, gradients, the optimizers' state."""
    parameters = list(state.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [values for optimizer in state.optimizers for values in optimizer.state.values()]
    moments = [value for values in states for value in values.values()]
    weights, slopes, averages = (
        sum(tensor.nbytes for tensor in tensors) for tensors in (parameters, gradients, moments)
    )
    return weights, slopes, averages


def step_sizes(state: TrainState) -> list[tuple[int, int]]:
    """(tokens, tokens with padding) of the steps of the first epoch."""
    examples, sizes = state.batches.examples, []
    for step in range(min(SAMPLED, state.batches.steps_per_epoch)):
        if examples.are_windows:
            sizes.append((state.batches.rows(step) * examples.seq_len,) * 2)
            continue
        chosen = state.batches.chosen(step)[0]
        rows = math.ceil(len(chosen) / state.config.train.accumulation_steps)
        parts = [examples.lengths[part] for part in cut(chosen, rows)]
        sizes.append((sum(n.sum() for n in parts), sum(len(n) * n.max() for n in parts)))
    return sizes


def timed_step(
    state: TrainState,
    loss_module: Loss,
    step: int,
    still: bool = False,
    timer: StepTimer | None = None,
) -> tuple[StepResult, float]:
    """One step as train.py makes it, and its seconds; `still` moves no weights.

    timer: gets the seconds of its parts.
    """
    factor = 0 if still else lr_factor(state.config.optimizer, step, state.config.horizon)
    set_lr(state.optimizers, factor)
    accumulation, processes = state.config.train.accumulation_steps, state.processes
    micro_batches = state.batches(step, accumulation, processes.index, processes.count)
    targets = state.batches.target_count(step)
    synchronize(state.device)
    began = time.perf_counter()  # without the batch: a thread makes it meanwhile
    timer = timer or StepTimer(state.device)
    result = train_step(state, loss_module, micro_batches, targets, step, timer)
    synchronize(state.device)
    return result, time.perf_counter() - began


def timed_evaluation(state: TrainState) -> float:
    """Seconds of an evaluation, of which a part is made, drawn evenly; and of its samples."""
    settings, validation = state.config.train, 0.0
    if state.val:
        count = state.val.evaluated
        count = max(1, min(count, settings.eval_examples or count))
        part = min(count, 4 * settings.micro_batch_size)
        for limit in (1, part):  # the first only warms up
            began = time.perf_counter()
            evaluate(
                state.loss_module,
                state.val,
                settings.micro_batch_size,
                limit,
                state.precision,
                StopRequest(),
                state.processes,
            )
            validation = (time.perf_counter() - began) * count / part
    began = time.perf_counter()
    if state.processes.is_first:
        Sampler(state.dataset, state.config.sample, state.config.seed)(state.model)
    return validation + time.perf_counter() - began


def memory_available(device: torch.device) -> int:
    """Bytes that can still be had; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return 0


@contextlib.contextmanager
def bounded_memory(device: torch.device, available: int) -> Generator[None]:
    """On Linux, what does not fit fails in the block, where the kernel would kill something."""
    if device.type != "cpu" or not available:  # known only on Linux
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    bound = min(b for b in (held + available, *before) if b != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def peak_of(device: torch.device) -> Generator[list[int]]:
    """The yielded list has one number when the block ends: by how many bytes memory grew in it."""
    forget_peak(device)
    return_freed_memory()  # what is kept would hide what is taken
    with contextlib.suppress(OSError):  # Linux: the peak of what is resident
        Path("/proc/self/clear_refs").write_text("5")
    before, growth = memory_used(device), []
    yield growth
    peak = peak_memory() if device.type == "cpu" else memory_used(device)
    growth.append(max(0, peak - before))
