"""How fast training is, and where the time of a step goes."""

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

from common.device import synchronize


class StepTimer:
    """Seconds and work since the last log entry; seconds are kept for each part of a step.

    A CPU's parts are timed always. A GPU works asynchronously, so its parts are only known where
    the program waits for it, which costs time: `on` says whether this step is worth it. `traced`
    says whether a profiler records this step, in whose trace the parts are ranges.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on = True
        self.traced = False
        self.restart()

    def restart(self):
        """Begins a new stretch of training."""
        self.seconds: dict[str, float] = {}
        self.steps = self.tokens = self.padded_tokens = self.flops = 0
        self.paused = 0.0
        self.began = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Times a part of the step."""
        with record_function(name) if self.traced else nullcontext():
            if not self.on:
                yield
                return
            synchronize(self.device)
            began = time.perf_counter()
            yield
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def pause(self) -> Generator[None]:
        """Takes evaluating and saving out of the time training takes."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def count_step(self, tokens: int, padded_tokens: int, flops: int):
        """Adds the work of one step."""
        self.steps += 1
        self.tokens += tokens
        self.padded_tokens += padded_tokens
        self.flops += flops

    def training_seconds(self) -> float:
        """Seconds of training since restart(), without the pauses."""
        synchronize(self.device)
        return time.perf_counter() - self.began - self.paused

    def shares(self) -> dict[str, float]:
        """The timed parts as shares of their sum."""
        total = sum(self.seconds.values()) or 1.0
        return {f"time/{name}": value / total for name, value in self.seconds.items()}
