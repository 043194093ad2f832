"""Estimates the memory, disk space and time of a run before it starts; nothing is saved.

python -m tools.preflight --config configs/full.toml --train.batch_size 64
python -m tools.preflight --resume runs/my-run --price 2.5
torchrun --standalone --nproc_per_node=4 -m tools.preflight --train.accumulation_steps 4
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import math
import os
import shutil
import statistics
import sys
from collections import Counter
from functools import partial

import numpy as np

from checkpoint.writer import pieces_of
from common import cli
from common.errors import UserError
from common.files import user_path
from common.processes import Processes, join
from data.config import DEFAULT_CACHE_DIR
from data.mixture import MixedBatches, Mixture, dealt
from training.command_line import read_for_all
from training.config import OptimizerConfig
from training.schedule import lr_factor, schedule_faults

PROGRAM = "python -m tools.preflight"
WIDTH, HEIGHT = 60, 8  # characters of the plot
LARGEST = 1024  # processes that are estimated for
Remarks = list[tuple[str, bool, str]]  # "wrong" (stops or spoils the run) or "note"; if; what

log = partial(print, flush=True)


def main() -> int:
    parser = cli.Parser(prog=PROGRAM, add_help=False, allow_abbrev=False)
    parser.add_argument("--price", type=float, default=0.0)
    options, flags = parser.parse_known_args()
    with join(PROGRAM) as processes, contextlib.ExitStack() as stack:
        if not processes.is_first:  # which computes, and leaves the speaking to the first
            nobody = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nobody))
        if not 0 <= options.price < math.inf:
            raise UserError(f"--price {options.price} must be at least 0: what an hour costs")
        return estimate(options.price, flags, processes)


def estimate(price: float, flags: list[str], processes: Processes) -> int:
    """Tries the run and prints what it found. Returns the exit status, the same in each process."""
    if {"-h", "--help"} & set(flags):
        log(f"{PROGRAM}: {__doc__.splitlines()[0]} The flags are those of train.py, and")
        log("--price FLOAT: what an hour of this machine costs; the run's cost is printed.")
    lines: list[str] = []
    spec = read_for_all(processes, lines.append, flags)
    if spec is None:
        print(*lines, sep="\n")
        return 0
    # for where the run is begun
    lines[-1:] = ["preflight: trying a few steps, nothing is saved"]
    log(*lines, sep="\n")
    from tools.trial import step_sizes, try_run  # here, because PyTorch takes its time
    from training.setup import build

    state = build(spec, lambda line: log(f"  {cli.visible(line)}"), processes)
    show_parameters(state)
    remarks = show_data(state, step_sizes(state)) + show_learning_rate(state)
    measured, failure = try_run(state, log)
    if measured:
        if failure:
            log(f"with train.accumulation_steps = {state.config.train.accumulation_steps}")
        remarks += show_memory(state, measured.memory)
        if processes.count > 1:
            show_communication(state, measured)
        if processes.is_first:
            remarks += show_time(state, measured, price)
            remarks += show_first_loss(state, spec, measured) + show_disk(state, spec)
    remarks.append(("wrong", bool(failure), failure))
    remarks = [(kind, text) for kind, applies, text in remarks if applies]
    log("remarks" if remarks else "no remarks")
    for kind, text in sorted(remarks, reverse=True):
        log(f"  {kind}: {text}")
    wrong = int(any(kind == "wrong" for kind, _ in remarks))
    return processes.largest(wrong)


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


def show_data(state, sizes: list[tuple[int, int]]) -> Remarks:
    """An epoch in steps and tokens, how often the run goes through it, and what is wasted.

    sizes: (tokens, tokens with padding) of its steps.
    """
    examples, config = state.batches.examples, state.config
    padding = 1 - sum(tokens for tokens, _ in sizes) / sum(padded for _, padded in sizes)
    epochs = config.max_steps / state.batches.steps_per_epoch
    vocabulary = config.model.vocab_size
    sources = state.dataset.sources if isinstance(state.dataset, Mixture) else (state.dataset,)
    looked_at = [source.train.ids[: (1 << 24) // len(sources)] for source in sources]
    used = np.count_nonzero(np.bincount(np.concatenate(looked_at)))
    dropped = examples.dropped / (examples.dropped + examples.count)
    log("data")
    row("an epoch", f"{examples.tokens:,} tokens", f"{state.batches.steps_per_epoch:,} steps")
    row("the run", f"{epochs:,.1f} epochs", f"{config.max_steps:,} steps")
    if isinstance(state.batches, MixedBatches):
        read = dealt(config.max_steps * state.batches.batch_size, state.batches.weights)
        parts = zip(examples.parts.items(), examples.shares, read, strict=True)
        for (name, part), share, number in parts:
            epochs_of = f"{number / part.count:,.1f} epochs"
            row(f"of {name}", epochs_of, f"{float(share):.1%} of the tokens")
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


def show_learning_rate(state) -> Remarks:
    """Its curve over the run, and what spoils it."""
    config, steps, horizon = state.config.optimizer, state.config.max_steps, state.config.horizon
    peaks = {"lr": config.lr} | ({"muon_lr": config.muon_lr} if config.name == "muon" else {})
    log("learning rate")
    for line in plot(config, steps, horizon):
        log(f"  {line}")
    row("peak", ", ".join(f"{peak:g}" for peak in peaks.values()), " and ".join(peaks))
    return [("wrong", True, fault) for fault in schedule_faults(state.config)]


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


def show_memory(state, memory) -> Remarks:
    """Where the memory of the run goes, stage by stage. `memory` is a Memory of tools/trial.py."""
    train = state.config.train
    log("memory")
    row("micro-batch", f"{train.micro_batch_size:,}", f"of {train.batch_size:,} examples a step")
    row("weights", megabytes(memory.weights))
    row("gradients", megabytes(memory.gradients))
    row("optimizer state", megabytes(memory.optimizer))
    if state.device.type in ("cpu", "cuda"):
        row("activations", megabytes(memory.activations), "and what else the longest step takes")
        row("peak of a step", megabytes(memory.step), "all of these")
        row("of an evaluation", megabytes(memory.evaluation), "with its samples")
        several = state.processes.count > 1
        row("peak memory", megabytes(memory.peak), "measured" + ", in rank 0" * several)
        largest = state.processes.largest(memory.peak)
        if several:
            row("of the largest rank", megabytes(largest))
    if memory.reserved:
        row("reserved", megabytes(memory.reserved), "what PyTorch took of the GPU for it")
    if memory.available:
        row("available", megabytes(memory.before + memory.available))
    full = memory.peak - memory.before > 0.8 * (memory.available or math.inf)
    more = "raise train.accumulation_steps"
    return [("note", full, f"the run takes more than 80% of the free memory; {more}")]


def show_time(state, measured, price: float) -> Remarks:
    """How long the run will take, on a machine as busy as it is now; price: of an hour."""
    from training.precision import Work, choose_precision

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
    row("tokens a second", f"{measured.tokens / sum(measured.steps):,.0f}")
    row("an evaluation", duration(measured.evaluation), "with its samples")
    row("the run", duration(seconds), f"{end - begin:,} steps, {evaluations:,} evaluations")
    if price:
        row("its cost", f"{seconds / 3600 * price:,.2f}", f"at {price:,g} an hour")
    config, own = state.config, state.precision.name
    other, why = state.precision, ""
    if own in ("fp32", "bf16"):
        work = Work.of(state.batches.examples, config.train.micro_batch_size)
        other, why = choose_precision("auto", config.model, work, state.device)
    return [("note", other.name != own, f"--precision {other.name} may be faster ({why})")]


def show_communication(state, measured):
    """What the processes send, what it takes, and what a step would take with other numbers."""
    from tools.communication import measure_transport  # here, because PyTorch takes its time

    transport = measure_transport(state.processes, state.device)
    count, train, exchange = state.processes.count, state.config.train, state.exchange
    size, buckets = sum(bucket.flat.nbytes for bucket in exchange.buckets), len(exchange.buckets)
    whole, tokens = sum(measured.steps), measured.tokens / len(measured.steps)
    waited, update = measured.parts["exchange"], measured.parts["optimizer"] / len(measured.steps)
    log("communication")
    row(
        "processes", f"{count:,}", f"{state.share} of {train.accumulation_steps} micro-batches each"
    )
    row("sent by each", megabytes(2 * (count - 1) / count * size), f"a step, in {buckets} buckets")
    row("waiting for it", f"{waited / whole:.1%}", "of a step, for the slowest process, too")
    row("latency", f"{1e6 * transport.latency:,.0f} µs", "a message, fitted to 4 sizes sent here")
    row("bandwidth", f"{transport.bandwidth / 1e6:,.0f} MB/s", "a process, the same")
    # a step's work is the same however it is cut, so a micro-batch's time tells that of all
    work = (statistics.median(measured.steps) - waited / len(measured.steps) - update) * count
    log("other numbers of processes: a model, not measured: devices and network like those tried")
    log("here, sending never hidden behind computing, nothing of hosts, switches and stragglers")
    log(f"  {'processes':>9}{'a step':>14}{'of it sending':>15}{'tokens/s':>14}{'times one':>11}")
    number = 1
    while number <= min(LARGEST, train.batch_size):
        sending = transport.seconds(number, buckets, size)
        step = update + work / number + sending
        figures = f"{1000 * step:>11,.1f} ms{sending / step:>15.1%}{tokens / step:>14,.0f}"
        log(f"  {number:>9,}{figures}{(update + work) / step:>11.1f}")
        number *= 2
    if number <= LARGEST:
        log(f"  {number:>9,} and more: a step has {train.batch_size} examples (train.batch_size)")


def show_first_loss(state, spec, measured) -> Remarks:
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
    files, number = state.checkpoint_files().values(), state.config.train.keep + 2
    size = sum(len(piece) for content in files for piece in pieces_of(content))
    runs, cache = spec.run.parent, user_path(state.config.data.cache_dir or DEFAULT_CACHE_DIR)
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
