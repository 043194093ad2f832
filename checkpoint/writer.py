"""Writing checkpoints so that each is complete or absent. No torch.

The protocol: files go to a hidden directory, each flushed and fsynced; the manifest with their
sizes and hashes comes last; the directory is fsynced, renamed to `step_N`, and its parent fsynced.
Only then is the step a checkpoint. Whatever interrupts this leaves the older ones as they were.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
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
    write_hashed,
    write_synced,
)

Content = bytes | Iterable[bytes | memoryview]  # of a file: all of it, or in pieces, made in turn


def pieces_of(content: Content) -> Iterable[bytes | memoryview]:
    """A file's content in pieces, in either form."""
    return [content] if isinstance(content, bytes) else content


def save(run: Path, step: int, files: Mapping[str, Content]) -> Path:
    """Publishes `files` as the checkpoint of `step`. Raises OSError when anything fails."""
    target = step_path(run, step)
    return target if is_saved(target) else publish(target, files)


def is_saved(target: Path) -> bool:
    """Whether a resumed run has come to a step that it has; one that is damaged is set aside."""
    if not target.exists():
        return False
    try:
        Checkpoint(target).verify()
    except CheckpointError:
        set_aside(target)
        return False
    return True


def publish(target: Path, files: Mapping[str, Content]) -> Path:
    """Makes `target` a directory of `files` with their manifest. Raises OSError; then it is not."""
    hidden = begin(target)
    try:
        return finish(hidden, write_files(hidden, files))
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


# The steps of it, for several processes: one begins, then all write files of their own, then one
# finishes with the entries of them all; where one fails, the hidden directory is removed.


def begin(target: Path) -> Path:
    """Makes the hidden, empty directory that is to be `target`. Raises OSError."""
    hidden = target.with_name(f".{target.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a save that was interrupted
    if hidden.is_file():
        hidden.unlink()
    hidden.mkdir(parents=True)
    return hidden


def write_files(hidden: Path, files: Mapping[str, Content]) -> dict[str, dict]:
    """Writes files, each fsynced; returns what the manifest says of each. Raises OSError."""
    entries = {}
    for name, content in files.items():
        size, sha256 = write_hashed(hidden / name, pieces_of(content))
        entries[name] = {"bytes": size, "sha256": sha256}
    return entries


def finish(hidden: Path, entries: dict[str, dict]) -> Path:
    """Writes the manifest of all files that were written and publishes them. Raises OSError."""
    target = hidden.with_name(hidden.name.removeprefix("."))
    write_synced(hidden / MANIFEST, checksummed_json({"format": FORMAT, "files": entries}))
    sync_directory(hidden)
    os.rename(hidden, target)
    try:
        sync_directory(target.parent)
    except OSError:
        os.rename(target, hidden)  # a save that may not last is none
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
