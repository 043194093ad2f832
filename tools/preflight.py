"""Estimates the memory, disk space and time of a run before it starts; nothing is saved.

python -m tools.preflight --config configs/full.toml --train.batch_size 64
"""

import contextlib
import math
import shutil
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common import cli
from common.memory import peak_memory, return_freed_memory
from data.config import DEFAULT_CACHE_DIR
from training.command_line import read_command_line
from training.config import OptimizerConfig
from training.schedule import lr_factor

PROGRAM = "python -m tools.preflight"
WIDTH, HEIGHT = 60, 8  # characters of the plot
STEPS, SECONDS = 12, 3.0  # so many steps are timed, or three if they take longer than that
SAMPLED = 10_000  # batches of an epoch that are looked at
Remarks = list[tuple[str, bool, str]]  # "wrong" (stops or spoils the run) or "note"; if; what

log = partial(print, flush=True)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        log(f"{PROGRAM}: {__doc__.splitlines()[0]} The flags are those of train.py.")
    lines: list[str] = []
    spec = read_command_line(lines.append)
    if spec is None:
        print(*lines, sep="\n")
        return 0
    lines[-1] = "preflight: trying a few steps, nothing is saved"  # for where the run is begun
    log(*lines, sep="\n")
    from training.setup import build  # here, because PyTorch takes its time

    state = build(spec, lambda line: log(f"  {cli.visible(line)}"))
    show_parameters(state)
    remarks = show_data(state) + show_learning_rate(state)
    measured, failure = try_steps(state)
    if measured:
        remarks += show_memory(state, measured) + show_time(state, measured)
        remarks += show_first_loss(state, spec, measured) + show_disk(state, spec)
    remarks.append(("wrong", bool(failure), failure))
    remarks = [(kind, text) for kind, applies, text in remarks if applies]
    log("remarks" if remarks else "no remarks")
    for kind, text in sorted(remarks, reverse=True):
        log(f"  {kind}: {text}")
    return int(any(kind == "wrong" for kind, _ in remarks))


def row(name: str, value: str, remark: str = ""):
    """A line of two or three columns."""
    log(f"  {name:<20}{value:>18}  {remark}".rstrip())


def megabytes(size: float) -> str:
    """12.3 MB, of 1e6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 7 s, 3 h 20 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def show_parameters(state):
    """How many, and where they are."""
    parts, tied = Counter(), state.config.model.tie_embeddings
    for name, parameter in state.model.named_parameters():  # a tied one stands under its first name
        parts[name.split(".")[0]] += parameter.numel()
    log("parameters")
    row("total", f"{state.model.num_parameters():,}")
    row("embedding", f"{parts['embed'] + parts['pos_encoding']:,}")
    row("layers", f"{parts['layers'] + parts['embed_norm'] + parts['final_norm']:,}", "and norms")
    row("output", f"{parts['output']:,}", "tied to the embedding" if tied else "")


def show_data(state) -> Remarks:
    """An epoch in steps and tokens, how often the run goes through it, and what is wasted."""
    examples, config, sizes = state.batches.examples, state.config, step_sizes(state)
    padding = 1 - sum(tokens for tokens, _ in sizes) / sum(padded for _, padded in sizes)
    is_stream = examples.split.starts is None
    tokens = examples.count * examples.seq_len if is_stream else int(examples.lengths.sum())
    epochs = config.max_steps / state.batches.steps_per_epoch
    vocabulary = config.model.vocab_size
    used = np.count_nonzero(np.bincount(state.dataset.train.ids[: 1 << 24]))
    dropped = examples.dropped / (examples.dropped + examples.count)
    log("data")
    row("an epoch", f"{tokens:,} tokens", f"{state.batches.steps_per_epoch:,} steps")
    row("the run", f"{epochs:,.1f} epochs", f"{config.max_steps:,} steps")
    row("padding", f"{padding:.1%}")
    row("skipped", f"{dropped:.1%}", f"{examples.dropped:,} examples are too long")
    row("vocabulary used", f"{used:,}", f"of {vocabulary:,}")
    too_long = f"{dropped:.0%} of the examples are longer than {config.seq_len} tokens and skipped"
    spare = (
        f"the training data uses {used:,} of {vocabulary:,} tokens; data.vocab_size can be lower"
    )
    size = config.train.batch_size
    whole = f"train.batch_size = {size} is more than all {examples.count} examples"
    return [
        ("wrong", dropped > 0.2, f"{too_long}; raise model.max_len"),
        ("note", padding > 0.2, f"{padding:.0%} of the tokens computed are padding"),
        ("note", epochs > 50, f"{epochs:,.0f} epochs: watch the validation loss for overfitting"),
        ("note", used < vocabulary / 2 and vocabulary - used > 500, spare),
        ("note", size > examples.count, whole),
        ("note", state.val is None, "no validation data, so no checkpoint is marked as the best"),
    ]


def step_sizes(state) -> list[tuple[int, int]]:
    """(tokens, tokens with padding) of the steps of the first epoch."""
    from data.batches import cut

    examples, sizes = state.batches.examples, []
    for chosen in state.batches.plan(0)[0][:SAMPLED]:
        if examples.split.starts is None:
            sizes.append((len(chosen) * examples.seq_len,) * 2)
            continue
        rows = math.ceil(len(chosen) / state.config.train.accumulation_steps)
        parts = [examples.lengths[part] for part in cut(chosen, rows)]
        sizes.append((sum(n.sum() for n in parts), sum(len(n) * n.max() for n in parts)))
    return sizes


def show_learning_rate(state) -> Remarks:
    """Its curve over the run, and what spoils it."""
    config, steps, horizon = state.config.optimizer, state.config.max_steps, state.config.horizon
    peaks = {"lr": config.lr} | ({"muon_lr": config.muon_lr} if config.name == "muon" else {})
    log("learning rate")
    for line in plot(config, steps, horizon):
        log(f"  {line}")
    row("peak", ", ".join(f"{peak:g}" for peak in peaks.values()), " and ".join(peaks))
    unrisen = f"optimizer.warmup_steps = {config.warmup_steps:,}, but the run has {steps:,} steps"
    stopped = horizon < steps and lr_factor(config, steps - 1, horizon) == 0
    return [
        *(
            ("wrong", not peak, f"optimizer.{key} = 0 trains nothing")
            for key, peak in peaks.items()
        ),
        ("wrong", config.warmup_steps >= steps, f"{unrisen}; lower it"),
        (
            "wrong",
            stopped,
            f"the learning rate is 0 from step {horizon:,} of {steps:,} on; raise schedule_steps",
        ),
    ]


def plot(config: OptimizerConfig, steps: int, horizon: int) -> list[str]:
    """The learning rate over `steps` as lines of text, as a share of its peak."""
    lines = [[" "] * WIDTH for _ in range(HEIGHT)]
    for column in range(WIDTH):
        step = round(column * (steps - 1) / (WIDTH - 1))
        height = round(min(1.0, lr_factor(config, step, horizon)) * (HEIGHT - 1))
        lines[HEIGHT - 1 - height][column] = "*"
    names = ["peak", *[""] * (HEIGHT - 2), "0"]
    text = [f"{n:>4} |{''.join(line).rstrip()}" for n, line in zip(names, lines, strict=True)]
    left = f"{'1':<{WIDTH // 2 - 3}}{(steps + 1) // 2:,}"
    return [*text, f"     +{'-' * WIDTH}", f"      {left}{f'{steps:,} steps':>{WIDTH - len(left)}}"]


@dataclass(frozen=True)
class Measured:
    """What was measured, in bytes and seconds."""

    first_loss: float
    growth: int  # of memory at its peak, on top of the weights
    available: int  # memory for that growth; 0: unknown
    steps: list[float]
    evaluation: float  # one, samples included


def try_steps(state) -> tuple[Measured | None, str]:
    """Takes the run's first steps and its longest; or says why that cannot be.

    They move the weights of this process, which are thrown away with it.
    """
    from common.device import memory_used
    from training.step import NonFiniteError, compile_loss

    available, begin = memory_available(state.device), state.progress.step
    loss_module = state.loss_module
    longest = int(np.argmax([padded for _, padded in step_sizes(state)]))
    try:
        with bounded_memory(state.device, available):
            if state.config.compile:
                micro_batches = state.batches(begin, state.config.train.accumulation_steps)
                loss_module = compile_loss(state, micro_batches, 1, log)
            forget_peak(state.device)
            before = memory_used(state.device)
            timed_step(state, loss_module, longest, still=True)
            first_loss, _ = timed_step(state, loss_module, begin)
            peak = peak_memory() if state.device.type == "cpu" else memory_used(state.device)
            seconds = []
            while len(seconds) < 3 or (len(seconds) < STEPS and sum(seconds) < SECONDS):
                seconds.append(timed_step(state, loss_module, begin + 1 + len(seconds))[1])
            evaluation = timed_evaluation(state)
    except NonFiniteError as error:
        return None, str(error)
    except (MemoryError, RuntimeError) as error:
        if not cli.is_out_of_memory(error):
            raise
        too_much = "a step needs more memory than there is; lower train.batch_size"
        return None, f"{too_much}, or raise train.accumulation_steps"
    return Measured(first_loss, max(0, peak - before), available, seconds, evaluation), ""


def timed_step(state, loss_module, step: int, still: bool = False) -> tuple[float, float]:
    """Loss and seconds of one step as train.py makes it; `still` moves no weights."""
    from common.device import synchronize
    from training.optimizer import set_lr
    from training.step import train_step
    from training.timing import StepTimer

    set_lr(
        state.optimizers,
        0 if still else lr_factor(state.config.optimizer, step, state.config.horizon),
    )
    micro_batches = state.batches(step, state.config.train.accumulation_steps)
    targets = state.batches.target_count(step)
    synchronize(state.device)
    began = time.perf_counter()  # without the batch: a thread makes it meanwhile
    result = train_step(state, loss_module, micro_batches, targets, step, StepTimer(state.device))
    synchronize(state.device)
    return result.loss, time.perf_counter() - began


def timed_evaluation(state) -> float:
    """Seconds of an evaluation, of which a part is made, drawn evenly; and of its samples."""
    from common.signals import StopRequest
    from evaluation.validation import evaluate
    from training.visuals import Sampler

    settings, validation = state.config.train, 0.0
    if state.val:
        windows = (len(state.val.split.ids) - 1) // state.val.seq_len
        count = windows if state.val.split.starts is None else state.val.count
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
            )
            validation = (time.perf_counter() - began) * count / part
    began = time.perf_counter()
    Sampler(state.dataset, state.config.sample, state.config.seed)(state.model)
    return validation + time.perf_counter() - began


def memory_available(device) -> int:
    """Bytes that can still be had; 0 where that is not known."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return 0


@contextlib.contextmanager
def bounded_memory(device, available: int):
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


def forget_peak(device):
    """Makes the next peak one of what follows, where that can be done."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return_freed_memory()  # what is kept would hide what is taken
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def show_memory(state, measured: Measured) -> Remarks:
    """Where the memory of a step goes, at the longest step of an epoch."""
    weights = sum(p.nbytes for p in state.model.parameters())
    states = [values for optimizer in state.optimizers for values in optimizer.state.values()]
    moments = sum(value.nbytes for values in states for value in values.values())
    log("memory")
    for name, size in (("weights", weights), ("gradients", weights), ("optimizer state", moments)):
        row(name, megabytes(size))
    if state.device.type in ("cpu", "cuda"):
        rest = max(0, measured.growth - weights - moments)
        row("activations", megabytes(rest), "and everything else, at the peak of the longest step")
        row("peak memory", megabytes(weights + measured.growth), "measured")
    if measured.available:
        row("available", megabytes(weights + measured.available))
    full = measured.growth > 0.8 * (measured.available or math.inf)
    return [("note", full, "a step takes more than 80% of the free memory; lower train.batch_size")]


def show_time(state, measured: Measured) -> Remarks:
    """How long the run will take, on a machine as busy as it is now."""
    from common.device import choose_precision

    begin, end, interval = (
        state.progress.step,
        state.config.max_steps,
        state.config.train.eval_interval,
    )
    evaluations = end // interval - begin // interval + (end % interval > 0) if interval else 1
    step = statistics.median(measured.steps)
    seconds = (end - begin) * step + evaluations * measured.evaluation
    log("time")
    row("a step", f"{1000 * step:,.1f} ms", f"median of {len(measured.steps)}")
    row("an evaluation", duration(measured.evaluation), "with its samples")
    row("the run", duration(seconds), f"{end - begin:,} steps, {evaluations:,} evaluations")
    bf16_is_faster = (
        choose_precision("auto", state.device)[0].name == "bf16" and state.precision.name == "fp32"
    )
    return [
        (
            "note",
            bf16_is_faster,
            f"this {state.device.type} has bf16; --precision bf16 may be faster",
        )
    ]


def show_first_loss(state, spec, measured: Measured) -> Remarks:
    """The first loss beside that of a model that knows nothing."""
    vocabulary, loss = state.config.model.vocab_size, measured.first_loss
    uniform, trained = math.log(vocabulary), bool(spec.resume or spec.weights)
    log("loss")
    row("at the first step", f"{loss:.4f}")
    remark = "not comparable: the weights are trained" if trained else "loss of a uniform guess"
    row(f"ln({vocabulary:,})", f"{uniform:.4f}", remark)
    far = f"the first loss is {loss:.2f}, not near ln({vocabulary:,}) = {uniform:.2f}"
    off = not trained and abs(loss / uniform - 1) > 0.1
    return [("note", off, f"{far}; check model.init_std and model.scale_embedding")]


def show_disk(state, spec) -> Remarks:
    """What the checkpoints take at most, and what there is."""
    size, number = sum(map(len, state.checkpoint_files().values())), state.config.train.keep + 2
    runs, cache = (
        spec.run.parent,
        Path(state.config.data.cache_dir or DEFAULT_CACHE_DIR).expanduser(),
    )
    free = shutil.disk_usage(runs).free
    log("disk")
    row("checkpoints", megabytes(number * size), f"{number} of {megabytes(size)}, at most")
    row("free for runs", megabytes(free), f"in {runs}")
    row("free for the cache", megabytes(shutil.disk_usage(cache).free), f"in {cache}")
    full = f"{runs}: {megabytes(free)} free, {megabytes(number * size)} needed for checkpoints"
    return [
        ("wrong", number * size > free, f"{full}; lower train.keep, or choose another --runs_dir")
    ]


if __name__ == "__main__":
    sys.exit(cli.run(PROGRAM, main))
