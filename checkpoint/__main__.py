"""Verifies and lists checkpoints, without torch.

python -m checkpoint verify PATH    what is whole of a step, a run or a NaN dump
python -m checkpoint list RUN       its steps: when, how large, validation loss
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
import time
from pathlib import Path

from checkpoint.reader import (
    NAN_DUMPS,
    Checkpoint,
    CheckpointError,
    list_steps,
    place,
    read_best,
    step_of,
)
from common import cli
from common.errors import UnreadableError
from common.jsonl import read_records


def verify(path: Path) -> bool:
    """Prints file by file what is whole of a step or a NaN dump, or of all that a run has."""
    steps = [path]
    if (path / "checkpoints").is_dir():
        steps = [*list_steps(path), *sorted(path.glob(NAN_DUMPS))]
        if not steps:
            raise CheckpointError(
                f"{path}: has no checkpoint yet; wait until train.py has saved one"
            )
    whole = [verify_step(step) for step in steps]
    best = path / "checkpoints" / "best.json"
    if best.exists() and read_best(path) is None:
        print(f"damaged  {best}: the next --resume rewrites it")
        return False
    return all(whole)


def verify_step(path: Path) -> bool:
    """Prints what is whole of one step."""
    try:
        checkpoint = Checkpoint(path)
    except UnreadableError as error:
        print(f"unread   {error.problem}")
        return False
    except CheckpointError as error:
        print(f"damaged  {error.problem}")
        return False
    wrong = []
    for name in checkpoint.manifest["files"]:
        try:
            checkpoint.read(name)
        except UnreadableError as error:
            wrong.append(f"unread   {error.problem}")
        except CheckpointError as error:
            wrong.append(f"damaged  {error.problem}")
    if not wrong:
        print(f"whole    {path}: {len(checkpoint.manifest['files'])} files, {megabytes(path)}")
    for text in wrong:
        print(text)
    return not wrong


def print_steps(run: Path):
    """Prints the steps of a run: when each was saved, its size, its validation loss."""
    if not (run / "checkpoints").is_dir():
        raise CheckpointError(
            f"{run}: not a run (no checkpoints folder); give a folder such as runs/NAME"
        )
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
    """The size of the files in a directory, or why it cannot be read."""
    try:
        return f"{sum(f.stat().st_size for f in path.iterdir() if f.is_file()) / 1e6:,.1f} MB"
    except OSError as error:
        return str(error.strerror)


def main() -> int:
    parser = cli.Parser(prog="python -m checkpoint", description="Verifies and lists checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="compare every file with its sha256")
    verifying.add_argument("path", type=Path, help="folder of a checkpoint, NaN dump or run")
    listing = commands.add_parser("list", help="list the checkpoints of a run")
    listing.add_argument("path", type=Path, metavar="run", help="folder of a run")
    options = parser.parse_args()
    options.path = place(options.path)
    if not options.path.is_dir():
        raise CheckpointError(
            f"{options.path}: no such run or checkpoint; give a folder such as runs/NAME"
        )
    if options.command == "verify":
        return int(not verify(options.path))
    print_steps(options.path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m checkpoint", main))
