"""What a person sees of a run while it trains: the bar or lines, log entries, evaluations."""

import contextlib
import errno
import math
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import summary
from tqdm import tqdm

from checkpoint.reader import list_steps, read_best
from common import cli
from common.device import datasheet_flops, forget_peak, matmul_flops, memory_scalars
from common.errors import UserError
from common.files import replace_synced
from common.signals import StopRequest
from data.prompt_format import unread
from evaluation.validation import Interrupted
from training.checkpointer import Checkpointer
from training.metrics import Metrics
from training.profiler import StepProfiler
from training.resume import RunSpec
from training.schedule import due, evaluation_due, log_due, schedule_faults
from training.state import TrainState, versions
from training.step import StepResult
from training.timing import StepTimer
from training.visuals import Sampler, as_markdown, attention_image, positions_image

LINE_INTERVAL = 5.0  # seconds between lines where there is no terminal
SIGPIPE = 13  # which Windows does not name


class Recorder:
    """Logs and evaluates the run `state`; shows a bar on a terminal, plain lines elsewhere."""

    def __init__(self, state: TrainState, spec: RunSpec, stop: StopRequest):
        self.state, self.spec, self.stop = state, spec, stop
        config, step = state.config, state.progress.step
        self.failure = ""  # why log entries could not be written, told once
        self.texts: list[str] = []  # of the last evaluation
        self.line_shown_at = -LINE_INTERVAL
        self.bar = tqdm(
            total=config.max_steps,
            initial=step,
            disable=None,  # only on a terminal
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
        )
        replace_synced(spec.run / "config.json", state.config_json())
        resumed_at = None if spec.is_new else step
        redo_val = state.val is not None and evaluation_due(config, step)
        self.metrics = Metrics(spec.run, config, resumed_at, redo_val, self.log)
        self.sampler = Sampler(state.dataset, config.sample, config.seed)
        for fault in schedule_faults(config):
            self.log(f"note: {fault}")
        tokenizer = state.dataset.tokenizer
        if note := unread(self.sampler.prompts, tokenizer, config.model.max_len):
            self.log(f"samples: {note}")
        count = state.processes.count  # each has such a device
        self.peak_flops = matmul_flops(state.device, state.precision) * count
        self.datasheet_flops = datasheet_flops(state.device, state.precision) * count
        forget_peak(state.device)
        machine = as_markdown([f"{key}: {value}" for key, value in versions(state.device).items()])
        # TensorBoard unfolds two groups of texts: this one and the samples
        text = summary.text("configuration/machine", machine)
        self.metrics.events.add(text, resumed_at or 0)
        table_is_whole = not (state.shards and config.model.positions == "learned")
        # also where a resume at step 0 hides what stood there
        if not resumed_at and table_is_whole:
            self.add_image("positional encoding", positions_image(state.model), 0)
        self.profiler = StepProfiler(config, state.device, spec.run, self.log)
        self.timer = StepTimer(state.device)

    def __enter__(self):
        return self

    def flush(self, run: Path):
        """All of it on disk, in the folder that the run has by now. Raises OSError."""
        if not (run / "config.json").exists():
            replace_synced(run / "config.json", self.state.config_json())
        self.metrics.flush(run)

    def __exit__(self, failure, *_):
        self.bar.close()
        self.profiler.close()
        # a full disk has been told about once
        with contextlib.suppress(OSError) if failure else contextlib.nullcontext():
            self.metrics.close()

    def log(self, text: str):
        """A line for people that leaves the bar whole. A reader who has gone asks for a stop.

        A terminal that has closed does not: that is what SIGHUP is for.
        """
        try:
            if self.bar.disable:
                print(cli.visible(text), flush=True)
            else:
                self.bar.write(cli.visible(text), file=sys.stdout)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            cli.mute(sys.stdout)
            if error.errno == errno.EPIPE:
                self.stop.signal = self.stop.signal or SIGPIPE

    # Evaluations ----------------------------------------------------------------------------------

    def evaluate(self, checkpointer: Checkpointer) -> bool:
        """Validation loss, samples and attention maps of the weights as they are.

        False if a signal came meanwhile: nothing of it is kept, and a resume does it again.
        """
        state, step = self.state, self.state.progress.step
        with self.timer.pause():
            try:
                values = self.validate(checkpointer)
            except Interrupted:
                return False
            model = state.whole_model()
            assert model is not None  # this is the first process
            try:
                self.texts = self.sampler(model)
            except UserError as error:  # logits that are not finite: the next step will tell more
                self.texts = []
                self.log(f"no sample: {error}")
            shown = self.sampler.lines(self.texts)
            self.metrics.events.add(summary.text("samples", as_markdown(shown)), step)
            if state.val is not None:
                image = attention_image(model, state.val)
                self.add_image("attention", image, step)
            if shown:
                self.log(f"sample: {shown[0].strip()}")
            self.add_scalars(step, values)
        return True

    def validate(self, checkpointer: Checkpointer) -> dict[str, float]:
        """The scalars of one evaluation; {} without validation data. Raises Interrupted."""
        state, values = self.state, self.state.validate(self.stop)
        if not values:
            return {}
        loss, step = values["loss/val"], state.progress.step
        best_step, best = state.progress.best_step, state.progress.best_val_loss
        remark = "" if best is None else f" (best: {best:.4f} at {best_step:,})"
        if checkpointer.update_best(loss):
            remark = " (best so far)"
        bits, own = values["bits_per_byte/val"], "loss/val/"
        parts = [f"{k.removeprefix(own)} {v:.4f}" for k, v in values.items() if k.startswith(own)]
        of_each = f" ({', '.join(parts)})" if parts else ""
        self.log(
            f"step {step:,}: validation loss {loss:.4f}{of_each}, {bits:.3f} bits per byte{remark}"
        )
        return values

    def add_image(self, tag: str, image, step: int):
        """A picture (h, w, 3) for TensorBoard."""
        self.metrics.events.add(summary.image(tag, image, dataformats="HWC"), step)

    # Steps ----------------------------------------------------------------------------------------

    def begin_step(self):
        """Before a step: on a GPU, parts are timed only in steps that are logged."""
        step = self.state.progress.step + 1
        self.timer.on = self.state.device.type == "cpu" or log_due(self.state.config, step)
        with self.timer.pause():
            self.profiler.begin_step(step)
        self.timer.traced = self.profiler.on

    def end_step(self, result: StepResult, lr: float):
        """After a step: the bar, and a log entry if one is due."""
        state, step = self.state, self.state.progress.step
        with self.timer.pause():
            self.profiler.end_step(step)
        self.timer.count_step(result.tokens, result.padded_tokens, result.flops)
        self.bar.update()
        if not result.updated:
            scale = state.scaler.get_scale()
            self.log(f"step {step}: gradient not finite, update skipped; loss scale {scale:g}")
        histograms_due = due(step, state.config.train.histogram_interval) and not state.shards
        if histograms_due and result.updated:
            with self.timer.pause():
                self.metrics.histograms(step, state.model)
        if not log_due(state.config, step):
            return
        timer, seconds = self.timer, self.timer.training_seconds()
        speed, flops = timer.tokens / seconds, timer.flops / seconds
        self.add_scalars(
            step,
            {
                "loss/train": result.loss,
                "perplexity/train": math.exp(min(result.loss, 700.0)),
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens": state.progress.tokens,
                "epoch": step / state.batches.steps_per_epoch,
                "speed/tokens_per_second": speed,
                "speed/tflops": flops / 1e12,
                "speed/mfu": flops / self.peak_flops,
                **(
                    {"speed/mfu_datasheet": flops / sheet}
                    if (sheet := self.datasheet_flops)
                    else {}
                ),
                "padding": 1 - timer.tokens / timer.padded_tokens,
                **memory_scalars(state.device),
                **({"fp16/scale": state.scaler.get_scale()} if state.scaler.is_enabled() else {}),
                **timer.shares(),
            },
        )
        left = (state.config.max_steps - step) * seconds / timer.steps
        self.show_progress(step, f"loss {result.loss:.4f}, {speed:,.0f} tokens/s", left)
        timer.restart()

    def add_scalars(self, step: int, values: dict[str, float]):
        """A log entry. If it cannot be written training goes on, and it is written later."""
        if values:
            self.metrics.scalars(step, values)
        else:
            self.metrics.try_flush()
        if self.metrics.failure and not self.failure:
            self.log(
                f"{self.metrics.failure}; log entries are kept in memory until they can be written"
            )
        self.failure = self.metrics.failure

    def show_progress(self, step: int, text: str, seconds_left: float):
        """The bar's text, or a plain line at most every few seconds."""
        last = self.state.config.max_steps
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() - self.line_shown_at >= LINE_INTERVAL or step == last:
            self.line_shown_at = time.monotonic()
            self.log(f"step {step:,}/{last:,}: {text}, {minutes(seconds_left)} left")

    def finish(self, checkpointer: Checkpointer):
        """The end of a whole run: samples, the best loss, and what to type next."""
        state, run = self.state, checkpointer.run
        self.bar.close()
        gap = "\n" if state.dataset.kind == "lines" else "\n\n"
        self.log("\n" + gap.join(self.sampler.lines(self.texts)) + "\n")
        best = read_best(run)
        if best:
            print(f"best validation loss {best['val_loss']:.4f} at step {best['step']}\n")
        if not list_steps(run) or checkpointer.failure:
            return
        has_prompts = state.dataset.kind != "pairs" or state.dataset.held_out
        prompt = "" if has_prompts else ' --prompt "..."'
        print(
            f"next:\n  tensorboard --logdir {cli.quoted(run.parent)}\n"
            f"  python generate.py --checkpoint {cli.quoted(run)}{prompt}\n"
            f"  python train.py --resume {cli.quoted(run)} --extend "
            f"--max_steps {2 * state.config.max_steps}"
        )


def minutes(seconds: float) -> str:
    """4:07"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
