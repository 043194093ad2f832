"""Writing checkpoints so that each is complete or absent. No torch.

The protocol: files go to a hidden directory, each flushed and fsynced; the manifest with their
sizes and hashes comes last; the directory is fsynced, renamed to `step_N`, and its parent fsynced.
Only then is the step a checkpoint. Whatever interrupts this leaves the older ones as they were.
Reading is in `model/checkpoint.py`.

    python -m training.checkpoint verify PATH    what is whole of a step, a run or a capsule
    python -m training.checkpoint list RUN       its steps: when, how large, validation loss
"""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from data.sealed import seal
from model.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    list_steps,
    read_best,
    step_of,
    step_path,
)
from training import cli

CAPSULES = "nonfinite_step_*"  # what stopped runs leave; training/replay.py reads them


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
        write_synced(hidden / MANIFEST, seal({"format": FORMAT, "files": entries}))
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


def set_aside(damaged: Path) -> Path:
    """Moves a damaged file or directory out of the way, without losing what may be left of it."""
    number = 0
    while (aside := damaged.with_name(f"damaged_{damaged.name}_{number}")).exists():
        number += 1
    os.rename(damaged, aside)
    return aside


def set_best(run: Path, step: int, val_loss: float):
    """Points best.json at a published step. Raises OSError."""
    replace_synced(Path(run) / "checkpoints/best.json", seal({"step": step, "val_loss": val_loss}))


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


def newest_complete(run: Path, report=print) -> Checkpoint:
    """The newest checkpoint of a run that verifies; says which ones it passes over."""
    for path in reversed(list_steps(run)):
        try:
            return Checkpoint(path).verify()
        except CheckpointError as error:
            report(f"passed over: {error}")
    raise CheckpointError(f"{run}: no complete checkpoint to resume from: start a new run")


# Files on the disk --------------------------------------------------------------------------------


def write_synced(path: Path, content: bytes):
    """Writes a file and waits until the disk has it. Raises OSError that names it."""
    try:
        with open(path, "wb", opener=itself) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # of a write it does not say where
        raise OSError(error.errno, error.strerror, str(path)) from None


def itself(path: str, flags: int) -> int:
    """Opens a file, but not what it may link to: a run of somebody else's can hold any link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def replace_synced(path: Path, content: bytes):
    """Gives a file new content, all of it or none. Raises OSError."""
    beside = path.with_suffix(".tmp")
    write_synced(beside, content)
    os.replace(beside, path)
    sync_directory(path.parent)


def sync_directory(path: Path):
    """Waits until the disk has a directory's entries. Windows cannot, and needs it less."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


# The command line ---------------------------------------------------------------------------------


def verify(path: Path) -> bool:
    """Prints file by file what is whole of a step or a capsule, or of all that a run has."""
    steps = [path]
    if (path / "checkpoints").is_dir():
        steps = [*list_steps(path), *sorted(path.glob(CAPSULES))]
        if not steps:
            raise CheckpointError(f"{path}: has no checkpoint yet")
    whole = [verify_step(step) for step in steps]
    best = path / "checkpoints" / "best.json"
    if best.exists() and read_best(path) is None:
        print(f"damaged  {best}: a resume writes it again")
        return False
    return all(whole)


def verify_step(path: Path) -> bool:
    """Prints what is whole of one step."""
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError as error:
        print(f"damaged  {error}")
        return False
    wrong = []
    for name in checkpoint.manifest["files"]:
        try:
            checkpoint.read(name)
        except CheckpointError as error:
            wrong.append(str(error))
    if not wrong:
        print(f"whole    {path}: {len(checkpoint.manifest['files'])} files, {megabytes(path)}")
    for text in wrong:
        print(f"damaged  {text}")
    return not wrong


def show(run: Path):
    """Prints the steps of a run: when each was saved, its size, its validation loss."""
    from training.run import read_records

    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run}: is no run: it has no folder of checkpoints")
    records = read_records(run / "metrics.jsonl")
    losses = {r["step"]: r["loss/val"] for r in records if "loss/val" in r}
    best = read_best(run)
    print(f"{'step':>10}  {'saved':19}  {'size':>10}  validation loss")
    for path in list_steps(run):
        step = step_of(path)
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        loss = f"{losses[step]:.4f}" if step in losses else "-"
        mark = "  best" if best and best["step"] == step else ""
        print(f"{step:>10,}  {saved:19}  {megabytes(path):>10}  {loss}{mark}")


def megabytes(path: Path) -> str:
    """The size of the files in a directory."""
    return f"{sum(f.stat().st_size for f in path.iterdir() if f.is_file()) / 1e6:,.1f} MB"


def main() -> int:
    parser = cli.Parser(
        prog="python -m training.checkpoint", description="Looks through checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="compare every file with its hash")
    verifying.add_argument("path", type=Path, help="a step's folder, or a run's for all its steps")
    listing = commands.add_parser("list", help="the steps of a run")
    listing.add_argument("path", type=Path, metavar="run", help="a run's folder")
    options = parser.parse_args()
    if not options.path.is_dir():
        raise CheckpointError(f"{options.path}: no such run or checkpoint")
    if options.command == "verify":
        return int(not verify(options.path))
    show(options.path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m training.checkpoint", main))
