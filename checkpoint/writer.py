"""Writing checkpoints so that each is complete or absent. No torch.

The protocol: files go to a hidden directory, each flushed and fsynced; the manifest with their
sizes and hashes comes last; the directory is fsynced, renamed to `step_N`, and its parent fsynced.
Only then is the step a checkpoint. Whatever interrupts this leaves the older ones as they were.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from checkpoint.reader import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    list_steps,
    read_best,
    step_path,
)
from common.files import (
    checksummed_json,
    replace_synced,
    set_aside,
    sync_directory,
    write_synced,
)


def save(run: Path, step: int, files: dict[str, bytes]) -> Path:
    """Publishes `files` as the checkpoint of `step`. Raises OSError when anything fails."""
    target = step_path(run, step)
    if target.exists():
        try:
            return Checkpoint(target).verify().path  # a resumed run has come to a step it has
        except CheckpointError:
            set_aside(target)
    return publish(target, files)


def publish(target: Path, files: dict[str, bytes]) -> Path:
    """Makes `target` a directory of `files` with their manifest. Raises OSError; then it is not."""
    hidden = target.with_name(f".{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a save that was interrupted
    if hidden.is_file():
        hidden.unlink()
    hidden.mkdir(parents=True)
    try:
        for name, content in files.items():
            write_synced(hidden / name, content)
        entries = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        write_synced(hidden / MANIFEST, checksummed_json({"format": FORMAT, "files": entries}))
        sync_directory(hidden)
        os.rename(hidden, target)
        try:
            sync_directory(target.parent)
        except OSError:
            os.rename(target, hidden)  # a save that may not last is none
            raise
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return target


def set_best(run: Path, step: int, val_loss: float):
    """Points best.json at a published step. Raises OSError."""
    replace_synced(
        Path(run) / "checkpoints/best.json", checksummed_json({"step": step, "val_loss": val_loss})
    )


def prune(run: Path, keep: int):
    """Removes all but the newest `keep` checkpoints and the best one, and what kills have left."""
    best, folder = read_best(run), Path(run) / "checkpoints"
    for pattern in (".step_*", ".removed_*"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    if best is None and (folder / "best.json").exists():
        return  # damaged: the best could be any of them
    for path in list_steps(run)[:-keep]:
        if best is None or path != step_path(run, best["step"]):
            # hidden first, so that what is left of an interrupted removal is no checkpoint
            hidden = path.with_name(f".removed_{path.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def newest_complete(run: Path, log: Callable[[str], object] = print) -> Checkpoint:
    """The newest checkpoint of a run that verifies; says which ones it skips."""
    for path in reversed(list_steps(run)):
        try:
            return Checkpoint(path).verify()
        except CheckpointError as error:
            log(f"skipped: {error.problem}")
    raise CheckpointError(f"{run}: no complete checkpoint to resume from; start a new run")
