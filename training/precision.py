"""`--precision auto`: measured on this machine, with what a step of this model is made of.

Processors have bf16 instructions and are slower with them, or faster in large products alone. So a
layer and a part of the loss are taken forward and backward in each precision, for a few tenths of a
second; the faster one wins. What wins stands in the run's configuration, so a resume keeps it.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from common.device import PRECISIONS, Precision, matmul_flops, synchronize
from data.batches import Examples
from model.config import ModelConfig
from model.cpu_layers import use_cpu_layers
from model.loss import output_loss, softmax_loss
from model.transformer_full import TransformerDecoder

SECONDS = 0.35  # for all passes; at least one of each is counted
FLOPS = 2e9  # of a layer's pass: about 10 ms of two cores in fp32
# how much faster low precision has to be: fp16 worth the scaling and the steps that overflow
MARGINS = {"bf16": 1.02, "fp16": 1.5}
CLEAR = 4  # times as fast by a rough look: nothing more is measured
SLOW = 2  # times as long as in fp32, from which it is said of a precision that was asked for
NOTED = 1.1  # how much faster another precision has to be for a resume to mention it
LEAST_LENGTH = 64  # tokens of a sequence, where a whole one would take too long
MOST_VOCABULARY = 4096  # of the loss that is tried: a larger one takes as much longer

Log = Callable[[str], object]


@dataclass(frozen=True)
class Work:
    """What a micro-batch is to the model: sequences, their usual length, targets a token."""

    rows: int
    length: int
    targets: float

    @classmethod
    def of(cls, examples: Examples, micro_batch_size: int) -> "Work":
        """That of a run's micro-batches."""
        rows = min(micro_batch_size, examples.count)
        if examples.are_windows:
            return cls(rows, examples.seq_len, 1.0)
        tokens = examples.tokens
        return cls(rows, max(1, tokens // examples.count), int(examples.n_targets.sum()) / tokens)


def choose_precision(
    name: str, shape: ModelConfig, work: Work, device: torch.device
) -> tuple[Precision, str]:
    """The precision asked for, or the fastest that trains as well; and why, for people."""
    if name != "auto":
        return PRECISIONS[name], "as requested" + slowness(PRECISIONS[name], device)
    if device.type == "mps":
        return PRECISIONS["fp32"], "auto: the default on mps"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return PRECISIONS["bf16"], "auto: this GPU has bf16"
    low = "bf16" if device.type == "cpu" else "fp16"
    seconds = measure(shape, work, device, ("fp32", low))
    return faster(low, seconds["fp32"] / seconds[low])


def slowness(own: Precision, device: torch.device) -> str:
    """What to say of 16 bits on a CPU that has no instructions for them; "" where it has."""
    if device.type != "cpu" or own.products.itemsize != 2:
        return ""
    ratio = matmul_flops(device, PRECISIONS["fp32"], 256) / matmul_flops(device, own, 256)
    if ratio < SLOW:
        return ""
    return f", but slow on this processor: its products take {ratio:.0f} times as long as in fp32"


def note_faster(own: Precision, shape: ModelConfig, work: Work, device: torch.device, log: Log):
    """A line where a run goes on, on another processor, in what is now the slower precision."""
    if device.type != "cpu" or own.name not in ("fp32", "bf16"):
        return
    seconds = measure(shape, work, device, ("fp32", "bf16"))
    other = min(seconds, key=lambda name: seconds[name])
    ratio = seconds[own.name] / seconds[other]
    if ratio > NOTED:
        log(
            f"precision: {own.name} as before; {other} is measured to be {ratio:.2f} times as fast "
            f"on this processor, and would give another curve (--precision {other})"
        )


def faster(low: str, ratio: float) -> tuple[Precision, str]:
    """The precision to take where low precision is `ratio` times as fast as fp32; and why."""
    if ratio > MARGINS[low]:
        return PRECISIONS[low], f"auto: measured to be {ratio:.2f} times as fast as fp32"
    if ratio > 1:
        return PRECISIONS["fp32"], f"auto: {low} is measured to be only {ratio:.2f} times as fast"
    return PRECISIONS["fp32"], f"auto: measured to be {1 / ratio:.2f} times as fast as {low}"


def measure(
    shape: ModelConfig, work: Work, device: torch.device, names: tuple[str, ...]
) -> dict[str, float]:
    """Seconds of a token, forward and backward, in each precision, by turns.

    All layers are taken to be as the one that is tried, and all targets as those of a part.
    """
    began = time.perf_counter()
    rough = {name: rough_seconds(shape, work, device, PRECISIONS[name]) for name in names}
    clear = max(rough.values()) > CLEAR * min(rough.values())
    if clear or time.perf_counter() > began + SECONDS / 2:  # whole passes would take seconds
        return rough
    passes = {name: Passes(shape, work, device, PRECISIONS[name], FLOPS) for name in names}
    found = {name: ([], []) for name in names}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws some
        for number in itertools.count():
            for name, of in passes.items():
                layer, loss = of.layer(), of.loss()
                if number:  # the first one makes kernels ready
                    found[name][0].append(layer)
                    found[name][1].append(loss)
            if number and time.perf_counter() > began + SECONDS:
                break
    # the least: whatever else runs on the machine only adds
    return {
        name: shape.n_layers * min(layer) + work.targets * min(loss)
        for name, (layer, loss) in found.items()
    }


def rough_seconds(
    shape: ModelConfig, work: Work, device: torch.device, precision: Precision
) -> float:
    """The same of a tenth of the work, once: what is emulated would take seconds otherwise."""
    passes = Passes(shape, work, device, precision, FLOPS / 10)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        passes.layer(), passes.loss()  # which makes kernels ready
        return shape.n_layers * passes.layer() + work.targets * passes.loss()


class Passes:
    """One layer's pass and the loss's, of random numbers; each gives its seconds a token.

    flops: of a pass, about; fewer sequences and, where that is not enough, shorter ones are taken.
    """

    def __init__(
        self,
        shape: ModelConfig,
        work: Work,
        device: torch.device,
        precision: Precision,
        flops: float,
    ):
        self.device, self.precision = device, precision
        V = min(shape.vocab_size, MOST_VOCABULARY)
        self.vocabulary_share = V / shape.vocab_size
        small = replace(shape, n_layers=1, vocab_size=V)
        model = TransformerDecoder.without_weights(small, precision.weights)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)  # what was in memory could be slow, such as denormal numbers
        model.to(device)
        if device.type == "cpu":
            use_cpu_layers(model)
        self.run_layer, self.output = model.layers[0], model.output
        C = shape.d_model
        tokens = int(flops / (6 * (4 * C * C + 2 * C * shape.d_ff) + 12 * C * work.length))
        length = min(work.length, max(LEAST_LENGTH if flops == FLOPS else 1, tokens))
        rows = max(1, min(work.rows, tokens // length))
        count = int(min(work.rows * work.length * work.targets, flops / (6 * C * V)))
        generator = torch.Generator().manual_seed(0)  # not the run's own random numbers

        def vectors(*sizes: int) -> torch.Tensor:
            x = torch.randn(*sizes, generator=generator, dtype=precision.weights)
            return x.to(device).requires_grad_()

        self.x, self.hidden = vectors(rows, length, C), vectors(max(1, count), C)
        self.targets = torch.randint(V, (max(1, count),), generator=generator).to(device)

    def layer(self) -> float:
        """Forward and backward of a layer."""
        tokens = self.x.shape[0] * self.x.shape[1]
        return self.seconds(lambda: self.run_layer(self.x).sum()) / tokens

    def loss(self) -> float:
        """Forward and backward of the output projection and its loss."""
        loss = partial(output_loss, self.hidden, self.output, self.targets, softmax_loss)
        return self.seconds(loss) / len(self.targets) / self.vocabulary_share

    def seconds(self, forward: Callable[[], torch.Tensor]) -> float:
        """How long a pass takes."""
        synchronize(self.device)
        began = time.perf_counter()
        with self.precision.autocast(self.device):
            value = forward()
        value.backward()
        synchronize(self.device)
        return time.perf_counter() - began
