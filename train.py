"""Trains a transformer decoder: configuration -> loop -> checkpoints.

python train.py                                        configs/default.toml, a minute or two
python train.py --config configs/mini.toml --device cuda --model.d_model 256
python train.py --resume                               continues the newest run
python train.py --help
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from common import cli  # and nothing large, so that Ctrl-C is answered from the start
from common.processes import Processes, join
from common.signals import StopRequest, defer_interrupts

if TYPE_CHECKING:
    from training.resume import RunSpec

log = partial(print, flush=True)  # seen at once also where it goes into a pipe


def main() -> int:
    """Decides what is to be done, and does it. Returns the exit status."""
    from training.command_line import read_for_all

    with join("train.py") as processes:
        spec = read_for_all(processes, log)
        return 0 if spec is None else train(spec, processes)


def train(spec: "RunSpec", processes: Processes) -> int:
    """The loop. One pass more than there are steps: the last one only saves and evaluates.

    All of `processes` are in it. The first one alone writes and speaks.
    """
    # imported here, so that a mistake in the settings is told before PyTorch has loaded
    with defer_interrupts():
        from checkpoint.reader import step_path
        from checkpoint.writer import is_saved
        from common.errors import UserError
        from data.batches import Prefetch
        from data.config import has_addresses
        from training.checkpointer import Checkpointer
        from training.compile import compile_loss
        from training.cuda_graphs import choose_step
        from training.follower import FollowingCheckpointer, FollowingRecorder
        from training.nan_dump import explain_stop
        from training.optimizer import set_lr
        from training.recorder import Recorder
        from training.run_folder import locked
        from training.schedule import evaluation_due, lr_factor
        from training.setup import build
        from training.step import NonFiniteError

    is_first = processes.is_first
    tell = log if is_first else lambda _: None
    state = build(spec, tell, processes)
    config, progress = state.config, state.progress
    accumulation = config.train.accumulation_steps
    depth = 8 if has_addresses(config.data) else 1
    batches = Prefetch(state.batches, accumulation, processes.index, processes.count, depth)
    loss_module = state.loss_module
    if config.compile:
        first_micro_batch = state.batches(progress.step, accumulation, 0, accumulation)
        loss_module = compile_loss(state, first_micro_batch, 1, tell)
    with (
        locked(spec.run, spec.continued) if is_first else nullcontext() as folder,
        StopRequest(launched=processes.is_launched, silent=not is_first) as stop,
        Recorder(state, spec, stop) if is_first else FollowingRecorder(state, stop) as recorder,
    ):
        checkpointer = FollowingCheckpointer(state, spec)
        if isinstance(recorder, Recorder) and folder:
            checkpointer = Checkpointer(state, spec, folder, recorder.log, recorder.flush)
        take_step = choose_step(state, loss_module, recorder.log)
        try:
            for step in range(progress.step, config.max_steps + 1):
                checkpointer.poll()
                processes.step = step
                # once: a later signal waits for the next step
                stopping = processes.largest(stop.signal) > 0
                if stopping or checkpointer.due(step):  # before the evaluation: nothing is lost
                    with recorder.timer.pause():
                        checkpointer.save()
                if evaluation_due(config, step) and not recorder.evaluate(checkpointer):
                    break  # a signal came in the middle of it
                if stopping or step == config.max_steps:
                    break

                lr = set_lr(state.optimizers, lr_factor(config.optimizer, step, config.horizon))
                recorder.begin_step()
                with recorder.timer.part("data"):
                    micro_batches, targets = batches(step)
                result = take_step(micro_batches, targets, step, recorder.timer)
                progress.step, progress.tokens = step + 1, progress.tokens + result.tokens
                progress.skipped += not result.updated
                recorder.end_step(result, lr)
        except UserError:  # of data that cannot be read now, from an object store, say
            if processes.count == 1 and not is_saved(step_path(spec.run, progress.step)):
                checkpointer.save()
            raise
        except NonFiniteError as error:
            if isinstance(recorder, Recorder):
                recorder.bar.close()
                everything = state.batches(progress.step, accumulation)  # of all processes
                targets = state.batches.target_count(progress.step)
                told = explain_stop(checkpointer, everything, targets, str(error))
                print(f"train.py: {told}", file=sys.stderr)
            elif state.shards and not state.saves_together:
                state.tensors()  # its part of the NaN dump
            processes.largest(1)  # a launcher ends all as soon as one has ended
            return 1
        finally:
            batches.close()
            checkpointer.wait()
        signal_number = processes.largest(stop.signal)
        if not signal_number:
            recorder.finish(checkpointer)
    if checkpointer.failure:
        fix = "continue from the last checkpoint with --resume"
        print(f"train.py: {checkpointer.failure}; {fix}", file=sys.stderr)
    if processes.largest(bool(checkpointer.failure)):  # also waits for the first to finish
        return 1
    signal_number = signal_number or stop.signal
    return 128 + signal_number if signal_number else 0


if __name__ == "__main__":
    sys.exit(cli.run("train.py", main))
