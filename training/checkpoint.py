"""Writing checkpoints so that each is complete or absent. No torch.

The protocol: files go to a hidden directory, each flushed and fsynced; the manifest with their
sizes and hashes comes last; the directory is fsynced, renamed to `step_N`, and its parent fsynced.
Only then is the step a checkpoint. Whatever interrupts this leaves the older ones as they were.
Reading is in `model/checkpoint.py`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from model.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    list_steps,
    read_best,
    seal,
    step_path,
)


def save(run: Path, step: int, files: dict[str, bytes]) -> Path:
    """Publishes `files` as the checkpoint of `step`. Raises OSError when anything fails."""
    target = step_path(run, step)
    if target.exists():
        try:
            return Checkpoint(target).verify().path  # a resumed run has come to a step it has
        except CheckpointError:
            set_aside(target)
    hidden = target.parent / f".{target.name}"
    shutil.rmtree(hidden, ignore_errors=True)  # of a save that was interrupted
    hidden.mkdir(parents=True)
    try:
        for name, content in files.items():
            write_synced(hidden / name, content)
        entries = {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        }
        write_synced(hidden / MANIFEST, seal({"format": FORMAT, "files": entries}))
        sync_directory(hidden)
        os.rename(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    sync_directory(target.parent)
    return target


def set_aside(damaged: Path) -> Path:
    """Moves a damaged checkpoint out of the way, without losing what may be left of it."""
    number = 0
    while (aside := damaged.with_name(f"damaged_{damaged.name}_{number}")).exists():
        number += 1
    os.rename(damaged, aside)
    return aside


def set_best(run: Path, step: int, val_loss: float):
    """Points best.json at a published step."""
    file = Path(run) / "checkpoints" / "best.json"
    write_synced(
        file.with_suffix(".tmp"), json.dumps({"step": step, "val_loss": val_loss}).encode()
    )
    os.replace(file.with_suffix(".tmp"), file)
    sync_directory(file.parent)


def prune(run: Path, keep: int):
    """Removes all but the newest `keep` checkpoints and the best one, and what kills have left."""
    best = read_best(run)
    for pattern in (".step_*", ".removed_*"):
        for left in (Path(run) / "checkpoints").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for path in list_steps(run)[:-keep]:
        if best is None or path != step_path(run, best["step"]):
            # hidden first, so that what is left of an interrupted removal is no checkpoint
            hidden = path.with_name(f".removed_{path.name}")
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def newest_complete(run: Path, report=print) -> Checkpoint:
    """The newest checkpoint of a run that verifies; says which ones it passes over."""
    for path in reversed(list_steps(run)):
        try:
            return Checkpoint(path).verify()
        except CheckpointError as error:
            report(f"passed over: {error}")
    raise CheckpointError(f"{run}: no complete checkpoint to resume from: start a new run")


def write_synced(path: Path, content: bytes):
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path):
    """Waits until the disk has a directory's entries. Windows cannot, and needs it less."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
