"""TensorBoard's files cut and flipped: the curves are those of metrics.jsonl again."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint.reader import list_steps
from common.jsonl import read_records
from tests.faults.campaign import Tally, campaign
from tests.faults.corruption import copy_run, flipped
from tests.helpers import ROOT, metrics, run
from training.tensorboard_files import PATTERN, find_difference, rebuild


@campaign("tensorboard", "11", "a TensorBoard file cut or flipped", "files", 100, 4)
def tensorboard(tally: Tally, count: int, folder: Path, dice):
    """Rebuilt, the curves are those of metrics.jsonl; after a resume by train.py as well.

    TensorBoard's own EventAccumulator says what the curves are.
    """
    stopped = copy_run(folder, "stopped")
    shutil.rmtree(list_steps(stopped)[-1])  # so that there are steps to go on with
    for number in range(count):
        run_folder = folder / "runs" / "drawn"
        shutil.copytree(stopped, run_folder)
        (file,) = (run_folder / "tensorboard").glob(PATTERN)
        content, kind = file.read_bytes(), dice.choice(["cut", "flipped", "missing", "zeros"])
        if kind == "missing":
            file.unlink()
        else:
            cut = content[: dice.randrange(len(content))]
            start, size = len(cut), min(dice.randrange(1, 5000), len(content) - len(cut))
            zeros = cut + bytes(size) + content[start + size :]
            file.write_bytes({"cut": cut, "flipped": flipped(content, dice), "zeros": zeros}[kind])
        tally.tried += 1
        tally.counts[kind] += 1
        if number % 12 == 0:
            program = ["train.py", "--resume", "--name", "drawn"]
            tally.counts["resumed by train.py"] += 1
            result = run(*program, cwd=folder)
        elif number % 12 == 1:
            tally.counts["rebuilt by tools.tensorboard_files"] += 1
            result = run_module("tools.tensorboard_files", "rebuild", run_folder)
        else:
            result = None
            redraw(run_folder)
        what = f"{kind}, try {number}"
        if result and result.returncode:
            tally.lost.append(f"{what}: {result.args}: {result.stdout} {result.stderr}"[:500])
        if different := not_shown(run_folder):
            tally.lost.append(f"{what}: {different}")
        shutil.rmtree(run_folder)


def redraw(run_folder: Path):
    """What `python -m tools.tensorboard_files rebuild` does, in this process."""
    records = read_records(run_folder / "metrics.jsonl")
    if find_difference(run_folder / "tensorboard", records):
        rebuild(run_folder / "tensorboard", records)


def run_module(*arguments) -> subprocess.CompletedProcess:
    """`python -m` a module of the project."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def not_shown(run_folder: Path) -> str:
    """A point that TensorBoard has twice, or not as metrics.jsonl has it; "" if there is none."""
    board = EventAccumulator(str(run_folder / "tensorboard"), {"scalars": 0})
    board.Reload()
    shown = [(t, e.step, e.value) for t in board.Tags()["scalars"] for e in board.Scalars(t)]
    due = [
        (tag, record["step"], float(np.float32(value)))
        for record in metrics(run_folder)
        for tag, value in record.items()
        if tag != "step"
    ]
    odd = sorted(set(shown) ^ set(due)) or [p for p in shown if shown.count(p) > 1]
    return f"{odd[:2]}, {len(odd)} such" if odd else ""
