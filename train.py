"""Trains a transformer decoder: configuration -> loop -> checkpoints.

python train.py                                        configs/default.toml, about two minutes
python train.py --config configs/mini.toml --device cuda --model.d_model 256
python train.py --resume                               goes on with the newest run
python train.py --help
"""

import sys
from functools import partial

from training import cli  # and nothing large, so that Ctrl-C is answered from the start

say = partial(print, flush=True)  # seen at once also where it goes into a pipe


def main() -> int:
    """Decides what is to be done, and does it. Returns the exit status."""
    from training.arguments import read_command_line

    plan = read_command_line(say)
    return 0 if plan is None else train(plan)


def train(plan) -> int:
    """The loop. One pass more than there are steps: the last one only saves and evaluates."""
    # imported here, so that a mistake in the settings is told before PyTorch has loaded
    with cli.held():
        from training.optimizer import set_lr
        from training.recorder import Recorder
        from training.run import locked
        from training.schedule import lr_factor
        from training.setup import Prefetch, build
        from training.signals import StopRequest
        from training.step import NonFinite, compiled, train_step

    t = build(plan, say)
    config, progress = t.config, t.progress
    batches = Prefetch(t.batches, config.train.accumulation_steps)
    hidden = t.model.hidden
    if config.compile:
        hidden = compiled(t, *batches(progress.step), say)
    with locked(plan), StopRequest() as stop, Recorder(t, plan, stop) as recorder:
        try:
            for step in range(progress.step, config.max_steps + 1):
                stopping = bool(stop.signal)  # once: a later signal waits for the next step
                if stopping or recorder.save_due(step):
                    recorder.save()  # before the evaluation, so that nothing is lost in it
                done = recorder.evaluate() if recorder.evaluation_due(step) else True
                if stopping or not done or step == config.max_steps:
                    break

                lr = set_lr(t.optimizers, lr_factor(config.optimizer, step, config.horizon))
                recorder.begin_step()
                with recorder.clock.part("data"):
                    micro_batches, targets = batches(step)
                result = train_step(t, hidden, micro_batches, targets, step, recorder.clock)
                progress.step, progress.tokens = step + 1, progress.tokens + result.tokens
                progress.skipped += not result.updated
                recorder.end_step(result, lr)
        except NonFinite as error:
            print(f"train.py: {recorder.give_up(error, micro_batches, targets)}", file=sys.stderr)
            return 1
        finally:
            batches.close()
        if not stop.signal:
            recorder.finish()
    if recorder.failed_save:
        fix = "make room, and --resume goes on from the last one"
        print(f"train.py: {recorder.failed_save}: {fix}", file=sys.stderr)
        return 1
    return 128 + stop.signal if stop.signal else 0


if __name__ == "__main__":
    sys.exit(cli.run("train.py", main))
