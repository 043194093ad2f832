"""The learning rate as a function of the step."""

import math

from training.config import OptimizerConfig


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
