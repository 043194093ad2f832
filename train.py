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
from functools import partial
from typing import TYPE_CHECKING

from common import cli  # and nothing large, so that Ctrl-C is answered from the start
from common.signals import StopRequest, defer_interrupts

if TYPE_CHECKING:
    from training.resume import RunSpec

log = partial(print, flush=True)  # seen at once also where it goes into a pipe


def main() -> int:
    """Decides what is to be done, and does it. Returns the exit status."""
    from training.command_line import read_command_line

    spec = read_command_line(log)
    return 0 if spec is None else train(spec)


def train(spec: "RunSpec") -> int:
    """The loop. One pass more than there are steps: the last one only saves and evaluates."""
    # imported here, so that a mistake in the settings is told before PyTorch has loaded
    with defer_interrupts():
        from data.batches import Prefetch
        from training.checkpointer import Checkpointer
        from training.compile import compile_loss
        from training.cuda_graphs import choose_step
        from training.nan_dump import explain_stop
        from training.optimizer import set_lr
        from training.recorder import Recorder
        from training.run_folder import locked
        from training.schedule import evaluation_due, lr_factor
        from training.setup import build
        from training.step import NonFiniteError

    state = build(spec, log)
    config, progress = state.config, state.progress
    batches = Prefetch(state.batches, config.train.accumulation_steps)
    loss_module = state.loss_module
    if config.compile:
        loss_module = compile_loss(state, *batches(progress.step), log)
    with (
        locked(spec.run, spec.continued) as folder,
        StopRequest() as stop,
        Recorder(state, spec, stop) as recorder,
    ):
        checkpointer = Checkpointer(state, spec, folder, recorder.log, recorder.flush)
        take_step = choose_step(state, loss_module, recorder.log)
        micro_batches, targets = [], 0
        try:
            for step in range(progress.step, config.max_steps + 1):
                stopping = bool(stop.signal)  # once: a later signal waits for the next step
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
        except NonFiniteError as error:
            recorder.bar.close()
            told = explain_stop(checkpointer, micro_batches, targets, str(error))
            print(f"train.py: {told}", file=sys.stderr)
            return 1
        finally:
            batches.close()
        if not stop.signal:
            recorder.finish(checkpointer)
    if checkpointer.failure:
        fix = "continue from the last checkpoint with --resume"
        print(f"train.py: {checkpointer.failure}; {fix}", file=sys.stderr)
        return 1
    return 128 + stop.signal if stop.signal else 0


if __name__ == "__main__":
    sys.exit(cli.run("train.py", main))
