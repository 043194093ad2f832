"""The checkpoints of a run: saving and pruning them, and which one is the best.

A save copies the state to the host's memory; a thread writes the copy while training goes on. There
is one such save at a time, and nothing is said to be saved, or the best, before it is on disk.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from checkpoint.reader import list_steps, read_best, step_of, step_path
from checkpoint.writer import Content, begin, is_saved, prune, save, set_best
from common import cli
from common.errors import UnreadableError
from common.files import set_aside
from training.resume import RunSpec
from training.run_folder import RunFolder
from training.schedule import save_due
from training.shared_save import save_together
from training.state import TrainState

# what a save may end with that is no bug; of RuntimeErrors, PyTorch's when memory is full
SAVE_FAILURES = (OSError, MemoryError, RuntimeError, UnreadableError)


def in_background(call: Callable[[], Path]) -> Future[Path]:
    """What a thread of its own makes of a call. Raises RuntimeError if none can be started."""
    future = Future()

    def work():
        try:
            future.set_result(call())
        except BaseException as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=work).start()
    return future


def explain_failure(error: Exception) -> str:
    """Why a save failed, in one line. Raises the error again if it is a bug."""
    if isinstance(error, UnreadableError):
        return error.problem
    if not (why := cli.explain_error(error, "a save")):
        raise error
    return why


class Checkpointer:
    """Saves `state` into the run's folder. A save that fails costs that save only.

    log: gets lines for people. before_save: puts on disk what a checkpoint builds on, into the
    run's folder (the configuration, the metrics).
    """

    def __init__(
        self,
        state: TrainState,
        spec: RunSpec,
        folder: RunFolder,
        log: Callable[[str], object],
        before_save: Callable[[Path], object],
    ):
        self.state, self.folder, self.log = state, folder, log
        self.before_save = before_save
        self.failure = ""  # why the last save that has ended failed
        self.pending: tuple[int, Future[Path]] | None = None  # the step that is being written
        self.first_step = state.progress.step if spec.is_new else None
        self.set_aside_damaged()

    @property
    def run(self) -> Path:
        """Where the run's folder was when it was last looked for."""
        return self.folder.path

    def set_aside_damaged(self):
        """Renames the damaged steps that a resume skipped, and corrects best.json."""
        progress, best_file = self.state.progress, self.run / "checkpoints" / "best.json"
        for path in list_steps(self.run):
            if step_of(path) > progress.step:
                set_aside(path)
        best = read_best(self.run)
        if best is None and best_file.exists():
            self.log(f"{best_file}: damaged; rewriting it")
        elif best is None or best["step"] <= progress.step:
            return
        known = progress.best_val_loss
        if known is not None and step_path(self.run, progress.best_step).is_dir():
            set_best(self.run, progress.best_step, known)
        else:
            best_file.unlink()

    def due(self, step: int) -> bool:
        """Whether to save the state after `step` steps; a new run saves its first state too."""
        return step == self.first_step or save_due(self.state.config, step)

    def save(self):
        """Copies the state of this step, and has it published while training goes on.

        Where memory is too full for a copy, training waits for the publication.
        """
        if self.state.saves_together:
            self.save_together()
            return
        self.wait()
        step, path = self.state.progress.step, None
        try:
            tensors = self.state.tensors()  # before what may fail here alone
            self.follow()
            self.before_save(self.run)
            publish = partial(self.publish, self.run, step)
            try:
                files = self.state.checkpoint_files(tensors, copied=True)
                self.pending = step, in_background(partial(publish, files))
            except (MemoryError, RuntimeError):  # PyTorch's, or a thread's; a bug comes again
                files = {}
                path = publish(self.state.checkpoint_files(tensors))
        except SAVE_FAILURES as error:
            self.tell_failed(step, error)
        if path:
            self.tell_saved(path)

    def save_together(self):
        """Has all processes write a checkpoint of this step, and waits until it is published."""
        step = self.state.progress.step

        def begin_step() -> Path | None:
            self.follow()
            self.before_save(self.run)
            target = step_path(self.run, step)
            return None if is_saved(target) else begin(target)

        try:
            save_together(self.state, begin_step)
        except SAVE_FAILURES as error:
            self.tell_failed(step, error)
        else:
            self.prune(self.run)
            self.tell_saved(step_path(self.run, step))

    def publish(self, run: Path, step: int, files: Mapping[str, Content]) -> Path:
        """Publishes a checkpoint, and removes those that are no longer kept."""
        path = save(run, step, files)
        self.prune(run)
        return path

    def prune(self, run: Path):
        """Removes the checkpoints that are no longer kept."""
        # Windows: somebody reads in an old one
        with contextlib.suppress(OSError, MemoryError, UnreadableError):
            prune(run, self.state.config.train.keep)

    def poll(self):
        """Tells of the pending save if it has ended."""
        if self.pending and self.pending[1].done():
            self.wait()

    def wait(self):
        """Waits until no save is pending, and tells how it has ended."""
        if not self.pending:
            return
        step, saving = self.pending
        try:
            path = saving.result()
        except SAVE_FAILURES as error:
            self.tell_failed(step, error)
        else:
            self.tell_saved(path)
        finally:
            self.pending = None

    def tell_saved(self, path: Path):
        self.failure = ""
        self.log(f"saved {path}")

    def tell_failed(self, step: int, error: Exception):
        self.failure = f"step {step} could not be saved: {explain_failure(error)}"
        self.log(f"{self.failure}; training continues, older checkpoints are unaffected")

    def follow(self):
        """Finds the run's folder again where somebody has renamed or removed it meanwhile."""
        before, progress = self.run, self.state.progress
        if not self.folder.follow():
            return
        self.log(f"{before}: renamed or removed while it trains; the run is now in {self.run}")
        if not step_path(self.run, progress.best_step).is_dir():
            progress.best_step, progress.best_val_loss = 0, None

    def update_best(self, val_loss: float) -> bool:
        """Points best.json at this step if its validation loss is strictly the lowest so far."""
        progress, best = self.state.progress, self.state.progress.best_val_loss
        if not math.isfinite(val_loss) or (best is not None and val_loss >= best):
            return False
        self.wait()
        if self.failure:  # a step that could not be saved is never the best
            return False
        try:
            set_best(self.run, progress.step, val_loss)
        except (OSError, MemoryError) as error:
            self.log(f"best.json could not be updated: {error}; training continues")
            return False
        progress.best_step, progress.best_val_loss = progress.step, val_loss
        return True
