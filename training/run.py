"""Which run this is: a new one, or one that goes on; its folder, lock and settings. No torch."""

import contextlib
import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from model.checkpoint import Checkpoint, CheckpointError, list_steps, newest_run, step_path
from model.config import UserError
from training import config as configuration
from training.checkpoint import newest_complete, write_synced
from training.config import Change, Config

# what a run has written before its first checkpoint
OURS = {".lock", ".owner", "config.json", "config.tmp", "metrics.jsonl", "metrics.tmp"}
OURS |= {"checkpoints", "tensorboard"}
EARLIER = "earlier_metrics.jsonl_"  # and a number: the log of a run that never saved
CAPSULE = "capsule.json"  # in the folders that training/replay.py reads


@dataclass(frozen=True)
class Plan:
    """What train.py is about to do."""

    run: Path
    config: Config
    resume: Checkpoint | None = None  # goes on from this step
    weights: Checkpoint | None = None  # starts anew from these weights
    changes: tuple[Change, ...] = ()
    is_new: bool = True  # the run's folder must not exist yet

    @property
    def goes_on(self) -> bool:
        """Whether the run's folder, with its metrics, is the one that is resumed."""
        return not self.is_new


def find_resume(runs_dir: Path, path: str | None, name: str, report):
    """The run and the checkpoint that `--resume [path]` means, and whether it forks the run.

    Without a path: the newest complete checkpoint of the run called `name`, or of the newest run.
    A step given by path is that one or an error; it never falls back to another, and if it is not
    the newest, what follows is a run of its own.
    """
    if path is None:
        if name:
            check_run_name(name)
        run = runs_dir / name if name else newest_run(runs_dir)
        if run is None:
            raise UserError(f"--resume: no run with a checkpoint in {runs_dir}: start one first")
        if not run.is_dir():
            raise UserError(f"--resume: {run}: no such run")
        refuse_if_busy(run)
        return run, newest_complete(run, report), False
    given = Path(path)
    if not given.exists():
        raise UserError(f"--resume {given}: no such checkpoint or run")
    if (given / "checkpoints").is_dir():
        refuse_if_busy(given)
        return given, newest_complete(given, report), False
    checkpoint = Checkpoint(given).verify()
    if CAPSULE in checkpoint.manifest["files"]:
        raise UserError(f"--resume {given}: a capsule: look into it with python -m training.replay")
    run = given.resolve().parent.parent
    with contextlib.suppress(ValueError):  # Windows: on another drive
        run = Path(os.path.relpath(run))
    return run, checkpoint, list_steps(run)[-1:] != [step_path(run, checkpoint.step)]


def plan_resume(stored: Config, wanted: Config, extend: bool) -> tuple[Config, list[Change]]:
    """The settings of a resumed run and what changes. Raises UserError if any must not."""
    found = configuration.changes(stored, wanted, extend)
    refused = [f"{c.key} {c.before!r} -> {c.after!r}: {c.refused}" for c in found if c.refused]
    if refused:
        raise UserError(f"--resume: {'; '.join(refused)}; to start anew use --init_from")
    return configuration.resumed(stored, wanted, extend), found


def keep_resolved(stored: Config, wanted: Config) -> Config:
    """`wanted` with what a run has settled once: a setting left to "auto" does not change it."""
    settled = {}
    for key in ("device", "precision"):
        if getattr(wanted, key) == "auto":
            settled[key] = getattr(stored, key)
    if wanted.data.kind == "auto":
        settled["data"] = replace(wanted.data, kind=stored.data.kind)
    if wanted.model.vocab_size == 0:
        settled["model"] = replace(wanted.model, vocab_size=stored.model.vocab_size)
    if wanted.train.threads == 0:
        settled["train"] = replace(wanted.train, threads=stored.train.threads)
    return replace(wanted, **settled)


def stored_config(checkpoint: Checkpoint) -> Config:
    """The checked configuration that a checkpoint carries."""
    checkpoint.model_config()  # of a size that its weights can have
    return configuration.check(checkpoint.config, str(checkpoint.path / "config.json"))


def is_finished(run: Path, checkpoint: Checkpoint, max_steps: int) -> bool:
    """Whether a run at its last step has had its last evaluation, which comes after the save."""
    if checkpoint.step > max_steps:
        return True
    if not checkpoint.state.get("validates"):
        return True
    records = read_records(run / "metrics.jsonl")
    return any("loss/val" in r and r["step"] == checkpoint.step for r in records)


def read_records(file: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that was cut while it was written."""
    found = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            record = parsed(line)
            if record is not None:
                found.append(record)
    return found


def parsed(line: str) -> dict | None:
    """The record of one line; None for anything else."""
    with contextlib.suppress(ValueError, RecursionError, OverflowError, TypeError, LookupError):
        record = json.loads(line)
        if type(record["step"]) is int and 0 <= record["step"] < 2**63:
            return record if all(map(math.isfinite, record.values())) else None
    return None


def check_run_name(name: str):
    """Refuses a run name that could leave the folder of runs, or hide in it."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise UserError(
            f"--name {name[:210]!r}: only letters, digits, '.', '_' and '-', no '.' in front, "
            "and at most 200 of them"
        )


def name_run(runs_dir: Path, name: str, stem: str) -> Path:
    """The folder of a new run: as named, or after the configuration's file and the time."""
    if name:
        check_run_name(name)
        if not is_free(runs_dir / name):
            if (runs_dir / name / ".lock").exists():
                refuse_if_busy(runs_dir / name)
            raise UserError(
                f"--name {name}: {runs_dir / name} exists: add --resume to go on with it, "
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
        names = {p.name for p in run.iterdir() if not p.name.startswith(EARLIER)}
        saved = [p.name for p in (run / "checkpoints").glob("[!.]*")]
        shown = [p.name for p in (run / "tensorboard").glob("*")]
    except OSError:  # a file, say
        return False
    return (
        names <= OURS
        and (not names or ".lock" in names)
        and set(saved) <= {"best.json", "best.tmp"}
        and all(name.startswith("events.out.") for name in shown)
    )


@contextlib.contextmanager
def locked(plan: Plan):
    """The run's folder, made if it is new, and nobody else's while the block runs."""
    lock = FileLock(plan.run / ".lock", blocking=False)
    owner = plan.run / ".owner"
    try:
        if plan.is_new:
            plan.run.mkdir(exist_ok=True)
        if not plan.is_new or is_free(plan.run):  # a lock is left in no other folder
            lock.acquire()
        check_still(plan)
        if plan.is_new:
            clear(plan.run)
        (plan.run / "checkpoints").mkdir(exist_ok=True)
        write_synced(owner, str(os.getpid()).encode())
    except Timeout:
        raise UserError(busy(plan.run)) from None
    except OSError as error:
        lock.release()
        raise UserError(
            f"{error.filename or plan.run}: {error.strerror}: choose a folder that can be written "
            "with --runs_dir"
        ) from None
    except BaseException:
        lock.release()
        raise
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            if plan.is_new and is_free(plan.run) and not read_records(plan.run / "metrics.jsonl"):
                clear(plan.run)  # nothing happened: the name is free again
                (plan.run / ".lock").unlink(missing_ok=True)
                plan.run.rmdir()
        lock.release()


def check_still(plan: Plan):
    """Raises UserError where another process was there between the plan and the lock."""
    if plan.is_new and not is_free(plan.run):
        raise UserError(f"{plan.run}: another process has just begun this run")
    if plan.goes_on and list_steps(plan.run)[-1:] != [step_path(plan.run, plan.resume.step)]:
        newest = newest_complete(plan.run, lambda _: None)  # what was passed over is still there
        if newest.path.name != plan.resume.path.name:
            raise UserError(f"{plan.run}: another process has gone on with it: --resume again")


def clear(run: Path):
    """Removes what a run that never saved has left, but for its lock; its log is set aside."""
    log, number = run / "metrics.jsonl", 0
    if read_records(log):
        while (aside := run / f"{EARLIER}{number}").exists():
            number += 1
        log.rename(aside)
    for name in sorted(OURS - {".lock"}):
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
    return f"{run}: in use by {owner}: wait for it, stop it, or choose another --name"


def load_weights_of(path: str) -> Checkpoint:
    """The checkpoint that `--init_from` names: a step, or a run's best."""
    try:
        return Checkpoint.find(path).verify()
    except CheckpointError as error:
        raise UserError(f"--init_from {error}") from None
