"""Around the loop's steps: checkpoints, evaluations, log entries, and what is shown."""

import contextlib
import math
import sys
import time

import numpy as np
import torch
from torch.utils.tensorboard import summary
from tqdm import tqdm

from model.checkpoint import list_steps, read_best, step_of, step_path
from model.config import UserError
from training import cli
from training.checkpoint import prune, replace_synced, save, set_aside, set_best
from training.device import matmul_flops, memory_used
from training.evaluation import Interrupted, Sampler, evaluate, example_ids
from training.metrics import Clock, Metrics, attention_maps, colour, tile
from training.replay import leave
from training.run import Plan
from training.setup import Training
from training.signals import StopRequest
from training.step import NonFinite, StepResult

QUIET = 5.0  # seconds between log lines where there is no terminal


class Recorder:
    """Saves, evaluates and logs the run `t`; shows a bar on a terminal, plain lines elsewhere."""

    def __init__(self, t: Training, plan: Plan, stop: StopRequest):
        self.t, self.plan, self.stop = t, plan, stop
        self.failed_save = self.failed_log = ""
        self.first_step = t.progress.step
        self.texts = []  # of the last evaluation
        self.shown_at = -QUIET
        self.steps = self.tokens = self.positions = self.flops = 0  # since the last log entry
        self.bar = tqdm(
            total=t.config.max_steps,
            initial=t.progress.step,
            disable=None,  # only on a terminal
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
        )
        replace_synced(plan.run / "config.json", t.config_json())
        self.set_passed_over_aside()
        resumed_at = t.progress.step if plan.goes_on else None
        redo_val = t.val is not None and self.evaluation_due(t.progress.step)
        self.metrics = Metrics(plan.run, t.config, resumed_at, redo_val, self.say)
        self.sampler = Sampler(t.dataset, t.config.sample, t.config.seed)
        self.peak_flops = matmul_flops(t.device, t.precision)
        if not resumed_at:  # also where a resume at step 0 hides what stood there
            self.show_positions()
        self.clock = Clock(t.device)

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        self.bar.close()
        # a full disk has been told about once
        with contextlib.suppress(OSError) if failure else contextlib.nullcontext():
            self.metrics.close()

    def say(self, text: str):
        """A line for people that leaves the progress bar whole; a reader who has gone is a stop."""
        try:
            if self.bar.disable:
                print(cli.visible(text), flush=True)
            else:
                self.bar.write(cli.visible(text), file=sys.stdout)
        except BrokenPipeError:
            cli.mute()
            self.stop.signal = self.stop.signal or 13  # SIGPIPE, which Windows does not name

    # Checkpoints ----------------------------------------------------------------------------------

    def save(self):
        """Publishes a checkpoint of this step; a failure costs this one only."""
        step = self.t.progress.step
        with self.clock.pause():
            try:
                self.metrics.flush()
                path = save(self.plan.run, step, self.t.checkpoint_files())
                self.failed_save = ""
            except OSError as error:
                self.failed_save = f"step {step} could not be saved: {error}"
                self.say(f"{self.failed_save}; the older checkpoints are as they were")
                return
            with contextlib.suppress(OSError):  # Windows: somebody reads in an old one
                prune(self.plan.run, self.t.config.train.keep)
        self.say(f"saved {path}")

    def give_up(self, error: NonFinite, micro_batches, targets: int) -> str:
        """Leaves a capsule of the step that was not finite. Returns what to tell, in one line."""
        self.bar.close()
        try:
            path = leave(self.t, self.plan.run, micro_batches, targets, str(error))
            where = f"python -m training.replay {path} shows where it begins"
        except (OSError, MemoryError) as failure:
            where = f"its state could not be kept: {failure}"
        return (
            f"{error}: stopped before the update; {where}; lower optimizer.lr, or use "
            "--precision fp32, and --resume from the last checkpoint"
        )

    def set_passed_over_aside(self):
        """Moves the damaged steps that a resume has passed over out of the way, the best too."""
        progress, best = self.t.progress, read_best(self.plan.run)
        run, known = self.plan.run, progress.best_val_loss is not None
        for path in list_steps(run):
            if step_of(path) > progress.step:
                set_aside(path)
        if best is None and (run / "checkpoints" / "best.json").exists():
            self.say(f"{run / 'checkpoints' / 'best.json'}: damaged, and written again")
        elif best is None or best["step"] <= progress.step:
            return
        if known and step_path(run, progress.best_step).is_dir():
            set_best(run, progress.best_step, progress.best_val_loss)
        else:
            (run / "checkpoints" / "best.json").unlink()

    # Evaluations ----------------------------------------------------------------------------------

    def evaluation_due(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        return step == self.t.config.max_steps or due(step, self.t.config.train.eval_interval)

    def save_due(self, step: int) -> bool:
        """Whether the state after `step` steps is saved; a run's first is: no kill is too early."""
        if step == self.first_step and self.plan.is_new:
            return True
        return self.evaluation_due(step) or due(step, self.t.config.train.save_interval)

    def evaluate(self) -> bool:
        """Validation loss, samples and attention maps of the weights as they are.

        False if a signal came meanwhile: nothing of it is kept, and a resume does it again.
        """
        t, step = self.t, self.t.progress.step
        with self.clock.pause():
            try:
                values = self.validate() if t.val else {}
            except Interrupted:
                return False
            try:
                texts = self.texts = self.sampler(t.model)
            except UserError as error:  # logits that are not finite: the next step will tell more
                texts = self.texts = []
                self.say(f"no sample: {error}")
            samples = as_markdown(self.sampler.lines(texts))
            self.metrics.board.add(summary.text("samples", samples), step)
            self.show_attention(step)
            if texts:
                self.say(f"sample: {self.sampler.lines(texts)[0].strip()}")
            self.log(step, values)
        return True

    def validate(self) -> dict:
        """The scalars of one evaluation; moves `best` if it is strictly better."""
        t, settings, progress = self.t, self.t.config.train, self.t.progress
        values = evaluate(
            t.model, t.val, settings.batch_size, settings.eval_examples, t.precision, self.stop
        )
        loss, best = values["loss/val"], progress.best_val_loss
        is_best = math.isfinite(loss) and (best is None or loss < best)
        if is_best and self.failed_save:  # the best is always one that can be had
            is_best = False
        if is_best:
            try:
                set_best(self.plan.run, progress.step, loss)
                progress.best_step, progress.best_val_loss = progress.step, loss
            except OSError as error:
                self.say(f"the best step could not be noted: {error}")
                is_best = False
        earlier = "" if best is None else f" (best: {best:.4f} at {progress.best_step:,})"
        self.say(
            f"step {progress.step:,}: validation loss {loss:.4f}, "
            f"{values['bits_per_byte/val']:.3f} bits per byte"
            + (" (best so far)" if is_best else earlier)
        )
        return values

    def show_attention(self, step: int):
        """Attention maps of a validation example: a row a layer, a column a head."""
        if self.t.val is None:
            return
        ids = torch.from_numpy(example_ids(self.t.val)).to(self.t.device)
        self.t.model.eval()
        maps = attention_maps(self.t.model, ids)
        self.t.model.train()
        picture = tile(maps, scale=max(1, 128 // ids.shape[1]))
        self.metrics.board.add(summary.image("attention", picture, dataformats="HWC"), step)

    def show_positions(self):
        """The table of positions, once: a row a position, a column a dimension."""
        table = self.t.model.pos_encoding.detach().float().cpu().numpy()
        span = float(np.abs(table).max()) or 1.0
        picture = colour(0.5 + table / (2 * span)).repeat(2, 0).repeat(2, 1)
        self.metrics.board.add(summary.image("positional encoding", picture, dataformats="HWC"))

    # Log entries ----------------------------------------------------------------------------------

    def logged(self, step: int) -> bool:
        """Whether the step that makes it `step` is logged."""
        interval = self.t.config.train.log_interval
        return step in (1, self.t.config.max_steps) or step % interval == 0

    def begin_step(self):
        """Before a step: on a GPU, parts are timed only in steps that are logged."""
        self.clock.on = self.t.device.type == "cpu" or self.logged(self.t.progress.step + 1)

    def end_step(self, result: StepResult, lr: float):
        """After a step: the bar, and a log entry if one is due."""
        t, step = self.t, self.t.progress.step
        self.steps += 1
        self.tokens += result.tokens
        self.positions += result.positions
        self.flops += result.flops
        self.bar.update()
        if not result.updated:
            scale = t.scaler.get_scale()
            self.say(f"step {step}: gradient not finite, skipped; loss scale {scale:g}")
        if due(step, t.config.train.histogram_interval) and result.updated:
            with self.clock.pause():
                self.metrics.histograms(step, t.model)
        if not self.logged(step):
            return
        seconds = self.clock.training()
        speed = self.tokens / seconds
        flops = self.flops / seconds
        self.log(
            step,
            {
                "loss/train": result.loss,
                "perplexity/train": float(np.exp(min(result.loss, 700.0))),
                "lr": lr,
                "grad_norm": result.grad_norm,
                "tokens": t.progress.tokens,
                "epoch": step / t.batches.steps_per_epoch,
                "speed/tokens_per_second": speed,
                "speed/tflops": flops / 1e12,
                "speed/mfu": flops / self.peak_flops,
                "padding": 1 - self.tokens / self.positions,
                "memory/megabytes": memory_used(t.device) / 1e6,
                **({"fp16/scale": t.scaler.get_scale()} if t.scaler.is_enabled() else {}),
                **self.clock.shares(),
            },
        )
        left = (t.config.max_steps - step) * seconds / self.steps
        self.show_step(step, f"loss {result.loss:.4f}, {speed:,.0f} tokens/s", left)
        self.steps = self.tokens = self.positions = self.flops = 0
        self.clock.restart()

    def log(self, step: int, values: dict[str, float]):
        """A log entry. If it cannot be written training goes on, and it is written later."""
        if values:
            self.metrics.scalars(step, values)
        else:
            self.metrics.try_flush()
        if self.metrics.failure and not self.failed_log:
            self.say(f"{self.metrics.failure}: log entries wait until they can be written")
        self.failed_log = self.metrics.failure

    def show_step(self, step: int, text: str, left: float):
        """The bar's text, or a plain line at most every few seconds."""
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() - self.shown_at >= QUIET or step == self.t.config.max_steps:
            self.shown_at = time.monotonic()
            self.say(f"step {step:,}/{self.t.config.max_steps:,}: {text}, {minutes(left)} left")

    def finish(self):
        """The end of a whole run: samples, the best loss, and what to type next."""
        t, run = self.t, self.plan.run
        self.bar.close()
        gap = "\n" if t.dataset.kind == "lines" else "\n\n"
        self.say("\n" + gap.join(self.sampler.lines(self.texts)) + "\n")
        best = read_best(run)
        if best:
            print(f"best validation loss {best['val_loss']:.4f} at step {best['step']}\n")
        if not list_steps(run) or self.failed_save:
            return
        prompt = ' --prompt "..."' if t.dataset.kind == "pairs" and not t.dataset.held_out else ""
        print(
            f"next:\n  tensorboard --logdir {run.parent}\n"
            f"  python generate.py --checkpoint {run}{prompt}\n"
            f"  python train.py --resume {run} --extend --max_steps {2 * t.config.max_steps}"
        )


def due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is due after `step` steps; 0: never."""
    return bool(step and interval and step % interval == 0)


def as_markdown(texts: list[str]) -> str:
    """Texts as TensorBoard shows them unchanged."""
    return "\n\n".join("\n".join(f"    {line}" for line in t.splitlines()) for t in texts)


def minutes(seconds: float) -> str:
    """4:07"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
