"""A run's folder: its name, its lock, and what may be in it. No torch."""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock, Timeout

from checkpoint.reader import Checkpoint, list_steps, step_path
from checkpoint.writer import newest_complete
from common.errors import UserError
from common.files import write_synced
from common.jsonl import read_records

# what a run has written before its first checkpoint
RUN_FILES = {".lock", ".owner", "config.json", "config.tmp", "metrics.jsonl", "metrics.tmp"}
RUN_FILES |= {"checkpoints", "tensorboard"}
EARLIER_LOG = "earlier_metrics.jsonl_"  # and a number: the log of a run that never saved


def check_run_name(name: str):
    """Refuses a run name that could leave the folder of runs, or hide in it."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
        raise UserError(
            f"--name {name[:210]!r}: must be at most 200 letters, digits, '.', '_' and '-', and "
            "not start with '.' or '-'"
        )


def name_run(runs_dir: Path, name: str, stem: str) -> Path:
    """The folder of a new run: as named, or after the configuration's file and the time."""
    if name:
        check_run_name(name)
        if not is_free(runs_dir / name):
            if (runs_dir / name / ".lock").exists():
                refuse_if_busy(runs_dir / name)
            raise UserError(
                f"--name {name}: {runs_dir / name} exists; add --resume to continue it, "
                "or choose another name"
            )
        return runs_dir / name
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, run = 1, runs_dir / base
    while run.exists():
        number += 1
        run = runs_dir / f"{base}-{number}"
    return run


def is_free(run: Path) -> bool:
    """Whether a new run may have this folder: none is there, or one that never saved anything.

    What this project has not made is somebody's, wherever in the folder it lies.
    """
    if not run.exists():
        return True
    try:
        names = {p.name for p in run.iterdir() if not p.name.startswith(EARLIER_LOG)}
        saved = [p.name for p in (run / "checkpoints").glob("[!.]*")]
        shown = [p.name for p in (run / "tensorboard").glob("*")]
    except OSError:  # a file, say
        return False
    return (
        names <= RUN_FILES
        and (not names or ".lock" in names)
        and set(saved) <= {"best.json", "best.tmp"}
        and all(name.startswith("events.out.") for name in shown)
    )


class RunFolder:
    """A run's folder while it trains: locked, and found again when somebody renames or removes it.

    path: where it was when it was last looked for.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lock = FileLock(path / ".lock", blocking=False)
        self.descriptor = -1  # of the folder, which stays the same under any name

    def hold(self):
        """Makes it what a run needs, with a note whose it is. Raises OSError."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        write_synced(self.path / ".owner", str(os.getpid()).encode())
        if os.name != "nt":  # Windows renames and removes no folder in which a file is open
            self.descriptor = os.open(self.path, os.O_RDONLY)

    def follow(self) -> bool:
        """Whether it is not where it was: `path` is then where it is, or a new one, made here.

        Raises OSError.
        """
        if self.descriptor < 0 or is_same(self.path, self.descriptor):
            return False
        found = path_of(self.descriptor)
        if found == self.path.resolve():  # a file system whose inodes change their numbers
            return False
        if found:
            inside = found.is_relative_to(Path.cwd())
            self.path = found.relative_to(Path.cwd()) if inside else found
            return True
        number, free = 1, self.path
        while free.exists():
            number += 1
            free = self.path.with_name(f"{self.path.name}-{number}")
        new = RunFolder(free)
        free.mkdir(parents=True)
        try:
            new.lock.acquire()
            new.hold()
        except OSError:  # the next save tries again
            new.release()
            shutil.rmtree(free, ignore_errors=True)
            raise
        self.release()
        self.path, self.lock, self.descriptor = new.path, new.lock, new.descriptor
        return True

    def release(self):
        """Leaves it to others."""
        self.lock.release()
        if self.descriptor >= 0:
            os.close(self.descriptor)


def is_same(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder is the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def path_of(descriptor: int) -> Path | None:
    """The name that an open folder has by now; None if it has none, or the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "darwin":
            import fcntl

            name = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
            found = Path(os.fsdecode(name))
        else:
            found = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return found if found.is_dir() else None
    return None


@contextlib.contextmanager
def locked(run: Path, continued: Checkpoint | None) -> Generator[RunFolder]:
    """The run's folder, made if it is new, and nobody else's while the block runs.

    continued: the checkpoint from which the run that has this folder goes on; None: a new run.
    """
    folder = RunFolder(run)
    lock = folder.lock
    try:
        if continued is None:
            run.mkdir(exist_ok=True)
        if continued is not None or is_free(run):  # a lock is left in no other folder
            lock.acquire()
        check_unchanged(run, continued)
        if continued is None:
            clear(run)
        folder.hold()
    except Timeout:
        raise UserError(busy(run)) from None
    except OSError as error:
        lock.release()
        raise UserError(
            f"--runs_dir: {error.filename or run}: {error.strerror}; choose a writable folder"
        ) from None
    except BaseException:
        lock.release()
        raise
    try:
        yield folder
    finally:
        run = path_of(folder.descriptor) or folder.path  # which was renamed, perhaps, or removed
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            if folder.descriptor < 0 or is_same(run, folder.descriptor):
                (run / ".owner").unlink(missing_ok=True)
                if continued is None and is_free(run) and not read_records(run / "metrics.jsonl"):
                    clear(run)  # nothing happened: the name is free again
                    (run / ".lock").unlink(missing_ok=True)
                    run.rmdir()
        folder.release()


def check_unchanged(run: Path, continued: Checkpoint | None):
    """Raises UserError where another process came between reading the folder and locking it."""
    if continued is None:
        if not is_free(run):
            raise UserError(
                f"{run}: another process has just started this run; choose another name"
            )
    elif list_steps(run)[-1:] != [step_path(run, continued.step)]:
        newest = newest_complete(run, lambda _: None)  # damaged steps are still in their place
        if newest.path.name != continued.path.name:
            raise UserError(f"{run}: another process has continued this run; resume again")


def clear(run: Path):
    """Removes what a run that never saved has left, but for its lock; its log is set aside."""
    log, number = run / "metrics.jsonl", 0
    if read_records(log):
        while (aside := run / f"{EARLIER_LOG}{number}").exists():
            number += 1
        log.rename(aside)
    for name in sorted(RUN_FILES - {".lock"}):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_if_busy(run: Path):
    """Raises UserError if a process is writing to this run: what is read would change below us."""
    try:
        FileLock(run / ".lock", blocking=False).acquire().lock.release()
    except Timeout:
        raise UserError(busy(run)) from None
    except OSError:
        pass  # a folder that cannot be written is told about later


def busy(run: Path) -> str:
    """Who holds a run's lock, and what to do."""
    try:
        owner = "process " + (run / ".owner").read_text(encoding="utf-8")
    except OSError:
        owner = "another process"
    return f"{run}: in use by {owner}; wait until it ends, stop it, or choose another --name"
