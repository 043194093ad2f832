"""What stands for the recorder and the checkpointer in the processes that record and save nothing.

The first of several processes writes and speaks for all. The others do what all must do: compute
their share of an evaluation, and stop with the rest.
"""

from common.signals import StopRequest
from evaluation.validation import Interrupted
from training.checkpointer import Checkpointer
from training.resume import RunSpec
from training.shared_save import save_together
from training.state import TrainState
from training.step import StepResult
from training.timing import StepTimer


class FollowingCheckpointer(Checkpointer):
    """One that leaves all of it to the first process, but for the parts that it holds itself."""

    def __init__(self, state: TrainState, spec: RunSpec):
        self.state, self.failure = state, ""
        self.first_step = state.progress.step if spec.is_new else None

    def save(self):
        if self.state.saves_together:
            save_together(self.state, lambda: None)  # the first process begins it
        elif self.state.shards:
            self.state.tensors()

    def poll(self):
        pass

    def wait(self):
        pass


class FollowingRecorder:
    """A Recorder that shows nothing, and evaluates its share."""

    def __init__(self, state: TrainState, stop: StopRequest):
        self.state, self.stop = state, stop
        self.timer = StepTimer(state.device)
        self.timer.on = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log(self, text: str):
        pass

    def evaluate(self, checkpointer: Checkpointer) -> bool:
        """False if a signal came meanwhile, to whichever process."""
        try:
            self.state.validate(self.stop)
        except Interrupted:
            return False
        self.state.whole_model()
        return True

    def begin_step(self):
        pass

    def end_step(self, result: StepResult, lr: float):
        pass

    def finish(self, checkpointer: Checkpointer):
        pass
