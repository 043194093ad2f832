"""A trace of a few steps (`--train.profile_steps A:B`), by torch.profiler: what ran when.

It is written to the run's folder when step B is done, whole or not at all: what a signal or an
error cuts short is dropped, and a resume that starts inside A:B records the rest of it.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from training.config import Config


class StepProfiler:
    """Records the steps that `config` asks for. Steps are counted from 1, as they are logged.

    log: gets a line for people.
    """

    def __init__(
        self, config: Config, device: torch.device, run: Path, log: Callable[[str], object]
    ):
        self.first, last = config.train.profiled
        self.last = min(last, config.max_steps)
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self.folder, self.log = run / "profile", log
        self.profile: profile | None = None
        self.begun = 0  # the first step of this trace
        self.step = contextlib.ExitStack()  # the range around the step that is running
        if self.last < self.first:
            log(
                f"no profile: train.profile_steps begins after the run's {config.max_steps:,} steps"
            )

    @property
    def on(self) -> bool:
        """Whether a trace is being recorded."""
        return self.profile is not None

    def begin_step(self, step: int):
        """Before step `step`."""
        if not self.first <= step <= self.last:
            return
        if self.profile is None:
            self.profile, self.begun = profile(activities=self.activities), step
            self.profile.start()
        # the name by which TensorBoard's profiler knows a step
        self.step.enter_context(record_function(f"ProfilerStep#{step}"))

    def end_step(self, step: int):
        """After step `step`; writes the trace after the last one."""
        self.step.close()
        if self.profile is None or step < self.last:
            return
        done, self.profile = self.profile, None
        done.stop()
        name = f"steps_{self.begun}_{step}.pt.trace.json.gz"
        hidden = self.folder / f".{name}"
        try:
            self.folder.mkdir(exist_ok=True)
            done.export_chrome_trace(str(hidden))
            os.replace(hidden, self.folder / name)
            self.log(f"profile: {self.folder / name}; open it at https://ui.perfetto.dev")
        except (OSError, RuntimeError) as error:  # it is only what is shown
            with contextlib.suppress(OSError):
                hidden.unlink()
            self.log(f"no profile: {error}; training continues")

    def close(self):
        """Drops a trace that has not come to its last step."""
        self.step.close()
        if self.profile is not None:
            self.profile.stop()
            self.profile = None
