"""A training step replayed as two CUDA graphs: that of a micro-batch, and that of the update.

A small model leaves a GPU waiting for the CPU, which launches hundreds of kernels a step. A graph
is launched once, whatever is in it. It has its memory and its sizes for good, so it is for
micro-batches of one shape, those of a stream of text; a shorter one, at the end of an epoch, is
computed as ever.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from common.device import to_device
from common.errors import UserError
from data.batches import Batch
from data.rng import derive_seed
from training.compile import full_shape
from training.gradient_sum import PairwiseSum
from training.state import TrainState
from training.step import (
    Loss,
    StepResult,
    count_parts,
    finish_step,
    forward_backward,
    micro_step,
    train_step,
    update,
)
from training.timing import StepTimer

WARM_UP = 3  # steps before the capture: libraries initialise themselves, and kernels are chosen

TakeStep = Callable[[Sequence[Batch], int, int, StepTimer], StepResult]
Work = Callable[[], None]
Capture = Callable[[Work], Work]


def choose_step(state: TrainState, loss_module: Loss, log: Callable[[str], object]) -> TakeStep:
    """What takes a step of this run: `train_step`, or a GraphedStep where it is asked for and can.

    Called with the micro-batches, the number of targets, the step and the timer.
    """
    shape = full_shape(state)
    if state.config.train.cuda_graphs:
        why = find_obstacle(state)
        if shape and not why:
            return GraphedStep(state, loss_module, shape, log)
        log(f"cuda_graphs: not used ({why})")
    return partial(train_step, state, loss_module)


def find_obstacle(state: TrainState) -> str:
    """Why the steps of this run cannot be replayed; "" where they can."""
    config = state.config
    if state.shards:
        return "train.shard gathers the weights layer by layer"
    if state.precision.name == "fp16":
        return "fp16 looks at each step's gradient"
    if not full_shape(state):
        return "documents vary in length"
    if config.train.batch_size % config.train.accumulation_steps:
        return "train.accumulation_steps does not divide train.batch_size"
    if state.device.type != "cuda":
        return "there is no CUDA device"
    if config.train.checkpoint_activations and (
        config.model.dropout or config.model.attention_dropout
    ):
        return "activation checkpointing reads the random state that dropout draws from"
    return ""


def capture_cuda_graph(work: Work) -> Work:
    """A function that does again, on the GPU alone, what `work` would do now."""
    graph = torch.cuda.CUDAGraph()
    # the outer context: a capture that CUDA breaks leaves its own stream the current one
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        work()
    return graph.replay


def can_draw(device: torch.device) -> bool:
    """Whether dropout works, which PyTorch 2.11 refuses for good after a capture that CUDA broke.

    There "Offset increment outside graph capture" is all that a generator then says.
    """
    try:
        torch.rand(1, device=device).item()
    except RuntimeError:
        return False
    return True


class GraphedStep:
    """`train_step` for one run: the same arguments from the micro-batches on, the same result.

    Raises what it raises. The numbers are those of `train_step`, except that the optimizers read
    the learning rate from a float32 on the device. Gradients stay where they are, and are set to 0
    instead of None. Where the capture fails, a line says so and steps are computed as ever; where
    PyTorch cannot go on after it, UserError is raised.

    shape: the (B, T) that is captured. capture: makes a function that does the work again.
    """

    def __init__(
        self,
        state: TrainState,
        loss_module: Loss,
        shape: tuple[int, int],
        log: Callable[[str], object],
        capture: Capture = capture_cuda_graph,
    ):
        self.state, self.loss_module, self.log, self.capture = state, loss_module, log, capture
        self.shape, self.targets = shape, 0
        self.warm_up_left = WARM_UP
        self.replay_micro_step: Work | None = None
        self.replay_update: Work | None = None
        device = state.device
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.wanted = torch.zeros(self.ids.numel(), dtype=torch.int64, device=device)
        self.total = torch.zeros((), dtype=state.precision.weights, device=device)
        self.result = torch.zeros(2, dtype=state.precision.weights, device=device)
        self.sum = PairwiseSum(state.model.parameters(), in_place=True, pairs=state.in_pairs)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
                group["capturable"] = device.type == "cuda"

    def __call__(
        self, micro_batches: Sequence[Batch], targets: int, step: int, timer: StepTimer
    ) -> StepResult:
        self.zero_gradients()
        first = self.state.processes.index * self.state.share
        whole = bool(micro_batches) and all(  # none: a short batch has not reached this process
            b.ids.shape == self.shape and b.target_indices is None for b in micro_batches
        )
        if whole and self.warm_up_left == 0 and self.replay_update is None:
            self.capture_step(targets)
        if whole and self.replay_update and targets == self.targets:
            self.replay(micro_batches, step, first, timer)
        else:
            if whole and self.warm_up_left > 0:
                self.warm_up_left -= 1
            for micro, batch in enumerate(micro_batches, first):
                self.sum.begin(self.total)
                self.total += micro_step(
                    self.state, self.loss_module, batch, targets, step, micro, timer.part
                )
            self.finish_sum(step, timer)
            with timer.part("optimizer"):
                self.result.copy_(update(self.state, self.total))
        loss, norm = self.result.tolist()
        return finish_step(self.state, micro_batches, step, loss, norm)

    def zero_gradients(self):
        """Sets the loss and the gradients to 0, in place: the graphs know only that place."""
        self.total.zero_()
        gradients = [p.grad for p in self.state.model.parameters() if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def finish_sum(self, step: int, timer: StepTimer):
        """Adds up all micro-batches, those of the other processes too."""
        self.sum.finish(self.total)
        if self.state.exchange:
            with timer.part("exchange"):
                self.state.exchange.add_up(self.total, count_parts(self.state, step))

    def replay(self, micro_batches: Sequence[Batch], step: int, first: int, timer: StepTimer):
        """A step by its two graphs. first: the number of this process's first micro-batch."""
        assert self.replay_micro_step and self.replay_update
        for micro, batch in enumerate(micro_batches, first):
            self.sum.begin(self.total)
            with timer.part("data"):
                ids, wanted, *_ = to_device(batch.inputs, self.state.device)
                assert ids is not None and wanted is not None  # no batch lacks them
                self.ids.copy_(ids)
                self.wanted.copy_(wanted)
            torch.manual_seed(derive_seed("dropout", self.state.config.seed, step, micro, 0))
            with timer.part("forward_backward"):
                self.replay_micro_step()
        self.finish_sum(step, timer)
        with timer.part("optimizer"):
            self.replay_update()

    def capture_step(self, targets: int):
        """Makes both graphs, which moves nothing; or gives up for good."""
        self.warm_up_left = -1  # tried once
        try:
            micro_step = self.capture(lambda: self.add_micro_step(targets))
            self.replay_update = self.capture(self.add_update)
            self.replay_micro_step, self.targets = micro_step, targets
            self.log("cuda_graphs: each step is replayed as CUDA graphs from here on")
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["unknown"])[0][:100]
            if not can_draw(self.state.device):
                raise UserError(
                    f"--train.cuda_graphs: the capture failed ({reason}), and CUDA is unusable "
                    "after it; train without this flag"
                ) from None
            self.log(f"cuda_graphs: the capture failed ({reason}); continuing without")

    def add_micro_step(self, targets: int):
        """The work of a micro-batch that lies in `ids` and `wanted`."""
        inputs = [self.ids, self.wanted, None]
        self.total += forward_backward(self.state, self.loss_module, inputs, targets)

    def add_update(self):
        """The work after the last micro-batch."""
        self.result.copy_(update(self.state, self.total))
