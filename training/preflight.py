"""What a run will need and how long it will take, before it is begun; nothing is kept of it.

python -m training.preflight --config configs/full.toml --train.batch_size 64
"""

import contextlib
import ctypes
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

from data.sources import CACHE
from training import cli
from training.arguments import read_command_line
from training.config import OptimizerConfig
from training.memory import peak_memory
from training.schedule import lr_factor

PROGRAM = "python -m training.preflight"
WIDTH, HEIGHT = 60, 8  # characters of the plot
STEPS, SECONDS = 12, 3.0  # so many steps are timed, or three if they take longer than that
SAMPLED = 10_000  # batches of an epoch that are looked at
Remarks = list[tuple[str, bool, str]]  # "wrong" (stops or spoils the run) or "note"; if; what

say = partial(print, flush=True)


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        say(f"{PROGRAM}: {__doc__.splitlines()[0]} The flags are those of train.py.")
    said = []
    plan = read_command_line(said.append)
    if plan is None:
        print(*said, sep="\n")
        return 0
    said[-1] = "preflight: a few steps are tried, nothing is kept"  # for where the run is begun
    say(*said, sep="\n")
    from training.setup import build  # here, because PyTorch takes its time

    t = build(plan, lambda line: say(f"  {cli.visible(line)}"))
    show_parameters(t)
    remarks = show_data(t) + show_learning_rate(t)
    tried, failure = try_steps(t)
    if tried:
        remarks += show_memory(t, tried) + show_time(t, tried)
        remarks += show_first_loss(t, plan, tried) + show_disk(t, plan)
    remarks.append(("wrong", bool(failure), failure))
    remarks = [(kind, text) for kind, applies, text in remarks if applies]
    say("remarks" if remarks else "no remarks")
    for kind, text in sorted(remarks, reverse=True):
        say(f"  {kind}: {text}")
    return int(any(kind == "wrong" for kind, _ in remarks))


def row(name: str, value: str, remark: str = ""):
    """A line of two or three columns."""
    say(f"  {name:<20}{value:>18}  {remark}".rstrip())


def megabytes(size: float) -> str:
    """12.3 MB, of 1e6 bytes."""
    return f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 7 s, 3 h 20 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def show_parameters(t):
    """How many, and where they are."""
    parts, tied = Counter(), t.config.model.tie_embeddings
    for name, parameter in t.model.named_parameters():  # a tied one stands under its first name
        parts[name.split(".")[0]] += parameter.numel()
    say("parameters")
    row("total", f"{t.model.num_parameters():,}")
    row("embedding", f"{parts['embed'] + parts['pos_encoding']:,}")
    row("layers", f"{parts['layers'] + parts['embed_norm'] + parts['final_norm']:,}", "and norms")
    row("output", f"{parts['output']:,}", "more: its matrix is the embedding's" if tied else "")


def show_data(t) -> Remarks:
    """An epoch in steps and tokens, how often the run goes through it, and what is wasted."""
    examples, config, sizes = t.batches.examples, t.config, step_sizes(t)
    padding = 1 - sum(tokens for tokens, _ in sizes) / sum(positions for _, positions in sizes)
    is_stream = examples.split.starts is None
    tokens = examples.count * examples.seq_len if is_stream else int(examples.lengths.sum())
    epochs = config.max_steps / t.batches.steps_per_epoch
    vocabulary = config.model.vocab_size
    used = np.count_nonzero(np.bincount(t.dataset.train.ids[: 1 << 24]))
    dropped = examples.dropped / (examples.dropped + examples.count)
    say("data")
    row("an epoch", f"{tokens:,} tokens", f"{t.batches.steps_per_epoch:,} steps")
    row("the run", f"{epochs:,.1f} epochs", f"{config.max_steps:,} steps")
    row("padding", f"{padding:.1%}")
    row("left out", f"{dropped:.1%}", f"{examples.dropped:,} examples are too long")
    row("vocabulary used", f"{used:,}", f"of {vocabulary:,}")
    too_long = f"{dropped:.0%} of the examples are longer than {config.seq_len} tokens and left out"
    spare = f"the training data uses {used:,} of {vocabulary:,} tokens: fewer would do"
    whole = f"a batch of {config.train.batch_size} is more than all {examples.count} examples"
    return [
        ("wrong", dropped > 0.2, f"{too_long}: raise model.max_len"),
        ("note", padding > 0.2, f"{padding:.0%} of what is computed is padding"),
        ("note", epochs > 50, f"{epochs:,.0f} epochs: mind overfitting, in the validation loss"),
        ("note", used < vocabulary / 2 and vocabulary - used > 500, spare),
        ("note", config.train.batch_size > examples.count, whole),
        ("note", t.val is None, "no validation data, so there will be no best step"),
    ]


def step_sizes(t) -> list[tuple[int, int]]:
    """(tokens, positions with padding) of the steps of the first epoch."""
    from data.batches import cut

    examples, sizes = t.batches.examples, []
    for chosen in t.batches.plan(0)[0][:SAMPLED]:
        if examples.split.starts is None:
            sizes.append((len(chosen) * examples.seq_len,) * 2)
            continue
        rows = math.ceil(len(chosen) / t.config.train.accumulation_steps)
        parts = [examples.lengths[part] for part in cut(chosen, rows)]
        sizes.append((sum(n.sum() for n in parts), sum(len(n) * n.max() for n in parts)))
    return sizes


def show_learning_rate(t) -> Remarks:
    """Its curve over the run, and what spoils it."""
    config, steps, horizon = t.config.optimizer, t.config.max_steps, t.config.horizon
    peaks = {"lr": config.lr} | ({"muon_lr": config.muon_lr} if config.name == "muon" else {})
    say("learning rate")
    for line in plot(config, steps, horizon):
        say(f"  {line}")
    row("peak", ", ".join(f"{peak:g}" for peak in peaks.values()), " and ".join(peaks))
    unrisen = f"optimizer.warmup_steps = {config.warmup_steps:,}, but the run has {steps:,} steps"
    stopped = horizon < steps and lr_factor(config, steps - 1, horizon) == 0
    return [
        *(("wrong", not peak, f"optimizer.{key} = 0 moves nothing") for key, peak in peaks.items()),
        ("wrong", config.warmup_steps >= steps, unrisen),
        ("wrong", stopped, f"the learning rate is 0 from step {horizon:,} of {steps:,} on"),
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
class Tried:
    """What was measured, in bytes and seconds."""

    first_loss: float
    growth: int  # of memory at its peak, on top of the weights
    available: int  # memory for that growth; 0: unknown
    steps: list[float]
    evaluation: float  # one, samples included


def try_steps(t) -> tuple[Tried | None, str]:
    """Takes the run's first steps and its longest; or says why that cannot be.

    They move the weights of this process, which are thrown away with it.
    """
    from training.device import memory_used
    from training.step import NonFinite, compiled

    available, begin, hidden = memory_available(t.device), t.progress.step, t.model.hidden
    longest = int(np.argmax([positions for _, positions in step_sizes(t)]))
    try:
        with bounded_memory(t.device, available):
            if t.config.compile:
                hidden = compiled(t, t.batches(begin, t.config.train.accumulation_steps), 1, say)
            forget_peak(t.device)
            before = memory_used(t.device)
            timed_step(t, hidden, longest, still=True)
            first_loss, _ = timed_step(t, hidden, begin)
            peak = peak_memory() if t.device.type == "cpu" else memory_used(t.device)
            seconds = []
            while len(seconds) < 3 or (len(seconds) < STEPS and sum(seconds) < SECONDS):
                seconds.append(timed_step(t, hidden, begin + 1 + len(seconds))[1])
            evaluation = timed_evaluation(t)
    except NonFinite as error:
        return None, str(error)
    except (MemoryError, RuntimeError) as error:
        if not cli.is_out_of_memory(error):
            raise
        too_much = "a step needs more memory than there is: lower train.batch_size"
        return None, f"{too_much}, or raise train.accumulation_steps"
    return Tried(first_loss, max(0, peak - before), available, seconds, evaluation), ""


def timed_step(t, hidden, step: int, still: bool = False) -> tuple[float, float]:
    """Loss and seconds of one step as train.py makes it; `still` moves no weights."""
    from training.device import synchronize
    from training.metrics import Clock
    from training.optimizer import set_lr
    from training.step import train_step

    set_lr(t.optimizers, 0 if still else lr_factor(t.config.optimizer, step, t.config.horizon))
    micro_batches = t.batches(step, t.config.train.accumulation_steps)
    targets = t.batches.target_count(step)
    synchronize(t.device)
    began = time.perf_counter()  # without the batch: a thread makes it meanwhile
    result = train_step(t, hidden, micro_batches, targets, step, Clock(t.device))
    synchronize(t.device)
    return result.loss, time.perf_counter() - began


def timed_evaluation(t) -> float:
    """Seconds of an evaluation, of which a part is made, drawn evenly; and of its samples."""
    from training.evaluation import Sampler, evaluate
    from training.signals import StopRequest

    settings, validation = t.config.train, 0.0
    if t.val:
        windows = (len(t.val.split.ids) - 1) // t.val.seq_len
        count = windows if t.val.split.starts is None else t.val.count
        count = max(1, min(count, settings.eval_examples or count))
        part = min(count, 4 * settings.batch_size)
        for limit in (1, part):  # the first only warms up
            began = time.perf_counter()
            evaluate(t.model, t.val, settings.batch_size, limit, t.precision, StopRequest())
            validation = (time.perf_counter() - began) * count / part
    began = time.perf_counter()
    Sampler(t.dataset, t.config.sample, t.config.seed)(t.model)
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
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: what it keeps would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")


def show_memory(t, tried: Tried) -> Remarks:
    """Where the memory of a step goes, at the longest step of an epoch."""
    weights = sum(p.nbytes for p in t.model.parameters())
    states = [values for optimizer in t.optimizers for values in optimizer.state.values()]
    state = sum(value.nbytes for values in states for value in values.values())
    say("memory")
    for name, size in (("weights", weights), ("gradients", weights), ("optimizer state", state)):
        row(name, megabytes(size))
    if t.device.type in ("cpu", "cuda"):
        rest = max(0, tried.growth - weights - state)
        row("activations", megabytes(rest), "and all else at the peak, in the longest step")
        row("in all", megabytes(weights + tried.growth), "measured")
    if tried.available:
        row("there is", megabytes(weights + tried.available))
    full = tried.growth > 0.8 * (tried.available or math.inf)
    return [("note", full, "a step takes more than 80% of the free memory")]


def show_time(t, tried: Tried) -> Remarks:
    """How long the run will take, on a machine as busy as it is now."""
    from training.device import choose_precision

    begin, end, interval = t.progress.step, t.config.max_steps, t.config.train.eval_interval
    evaluations = end // interval - begin // interval + (end % interval > 0) if interval else 1
    step = statistics.median(tried.steps)
    seconds = (end - begin) * step + evaluations * tried.evaluation
    say("time")
    row("a step", f"{1000 * step:,.1f} ms", f"median of {len(tried.steps)}")
    row("an evaluation", duration(tried.evaluation), "with its samples")
    row("the run", duration(seconds), f"{end - begin:,} steps, {evaluations:,} evaluations")
    narrow = choose_precision("auto", t.device)[0].name == "bf16" and t.precision.name == "fp32"
    return [("note", narrow, f"this {t.device.type} has bf16: --precision bf16 may be faster")]


def show_first_loss(t, plan, tried: Tried) -> Remarks:
    """The first loss beside that of a model that knows nothing."""
    vocabulary, loss = t.config.model.vocab_size, tried.first_loss
    uniform, trained = math.log(vocabulary), bool(plan.resume or plan.weights)
    say("loss")
    row("at the first step", f"{loss:.4f}")
    remark = "not to be compared: the weights are trained" if trained else "a uniform guess"
    row(f"ln({vocabulary:,})", f"{uniform:.4f}", remark)
    far = f"the first loss is {loss:.2f}, not near ln({vocabulary:,}) = {uniform:.2f}"
    off = not trained and abs(loss / uniform - 1) > 0.1
    return [("note", off, f"{far}: look at model.init_std and scale_embedding")]


def show_disk(t, plan) -> Remarks:
    """What the checkpoints take at most, and what there is."""
    size, number = sum(map(len, t.checkpoint_files().values())), t.config.train.keep + 2
    runs, cache = plan.run.parent, Path(t.config.data.cache_dir or CACHE).expanduser()
    free = shutil.disk_usage(runs).free
    say("disk")
    row("checkpoints", megabytes(number * size), f"{number} of {megabytes(size)}, at most")
    row("free for runs", megabytes(free), f"in {runs}")
    row("free for the cache", megabytes(shutil.disk_usage(cache).free), f"in {cache}")
    full = f"{runs}: {megabytes(free)} free, {megabytes(number * size)} wanted for checkpoints"
    return [("wrong", number * size > free, f"{full}: lower train.keep, or choose --runs_dir")]


if __name__ == "__main__":
    sys.exit(cli.run(PROGRAM, main))
