"""What is a function of the step: the learning rate, and when to evaluate and save."""

import math

from training.config import Config, OptimizerConfig


def lr_factor(config: OptimizerConfig, step: int, horizon: int) -> float:
    """The share of the peak learning rate at optimizer step `step`, counted from 0.

    Linear warm-up, then constant, or linear or half a cosine (Loshchilov and Hutter, 2017) down
    to `min_lr_ratio` at `horizon`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, horizon - config.warmup_steps)
    done = min(1.0, done)
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left


def schedule_faults(config: Config) -> list[str]:
    """How the learning rate's schedule spoils a run of so many steps: a sentence a fault."""
    optimizer, steps, horizon = config.optimizer, config.max_steps, config.horizon
    peaks = ("lr", "muon_lr") if optimizer.name == "muon" else ("lr",)
    found = [
        f"optimizer.{key} = 0 trains nothing; raise it"
        for key in peaks
        if not getattr(optimizer, key)
    ]
    if optimizer.warmup_steps >= steps:
        found.append(
            f"optimizer.warmup_steps = {optimizer.warmup_steps:,}, but the run has {steps:,} "
            "steps; lower it"
        )
    if horizon < steps and lr_factor(optimizer, steps - 1, horizon) == 0:
        found.append(
            f"the learning rate is 0 from step {horizon:,} of {steps:,} on; raise "
            "optimizer.schedule_steps"
        )
    return found


def due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps is due after `step` steps; 0: never."""
    return bool(step and interval and step % interval == 0)


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the state after `step` steps is evaluated."""
    return step == config.max_steps or due(step, config.train.eval_interval)


def save_due(config: Config, step: int) -> bool:
    """Whether the state after `step` steps is saved: also in front of each evaluation."""
    return evaluation_due(config, step) or due(step, config.train.save_interval)


def log_due(config: Config, step: int) -> bool:
    """Whether the step that makes it `step` gets a log entry."""
    return step in (1, config.max_steps) or step % config.train.log_interval == 0
