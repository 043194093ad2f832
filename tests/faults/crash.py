"""SIGKILL to a real train.py: what was saved is there, and going on changes no bit."""

import shutil
import time
from pathlib import Path

from checkpoint.reader import Checkpoint, CheckpointError, list_steps, step_of
from tests.faults.campaign import (
    TINY,
    Tally,
    campaign,
    ended,
    finished,
    home,
    same_run,
    start,
    wait_for,
)
from tests.helpers import run

OFTEN = ["--train.save_interval", "1", "--max_steps", "100000", "--train.keep", "2"]


def reported(output: str) -> list[str]:
    """The checkpoints that a run said it has saved, in whole lines."""
    lines = output.split("\n")[:-1]
    return [line.removeprefix("saved ") for line in lines if line.startswith("saved ")]


@campaign("kills", "1", "SIGKILL at a random instant of train.py, then --resume", "kills", 500, 1)
def kills(tally: Tally, count: int, folder: Path, dice):
    """A run that saves at every step is killed, looked through, resumed and killed again.

    At the end the whole of it is compared with a run that nobody has killed.
    """
    home(folder)
    killed = folder / "runs" / "killed"
    while tally.tried < count:
        if tally.tried < count / 2 and dice.random() < 0.05:
            shutil.rmtree(killed, ignore_errors=True)  # so that beginnings are tried, too
        resume = ["--resume"] if list_steps(killed) else []
        process = start("train.py", *TINY, "--name", "killed", *OFTEN, *resume, cwd=folder)
        with ended(process):
            if dice.random() < 0.1:  # anywhere, the start included
                time.sleep(dice.random() * 4)
            else:
                wait_for(lambda: "\nstep " in (folder / "output.txt").read_text(), process)
                time.sleep(dice.random() * 0.3)
            process.kill()
        tally.tried += 1
        examine(tally, killed, folder)
    if list_steps(killed):
        compare(tally, killed, folder)


def examine(tally: Tally, killed: Path, folder: Path):
    """What a kill has left: every checkpoint whole, the last that was reported among them."""
    tally.counts["inside a save"] += any((killed / "checkpoints").glob(".step_*"))
    steps = list_steps(killed)
    tally.counts["before the first save"] += not steps
    for path in steps:
        try:
            Checkpoint(path).verify()
        except CheckpointError as error:
            tally.lost.append(f"kill {tally.tried}: unreadable: {error}")
    for path in reported((folder / "output.txt").read_text())[-1:]:
        if folder / path not in steps:
            tally.lost.append(f"kill {tally.tried}: reported, and not there: {path}")


def compare(tally: Tally, killed: Path, folder: Path):
    """The killed run, brought to an end, against one in a single piece of as many steps.

    One step more than was saved: a kill in a save leaves that step's loss, which a resume redoes.
    """
    steps = str(step_of(list_steps(killed)[-1]) + 1)
    ending = ["--max_steps", steps, "--optimizer.schedule_steps", "100000"]
    finished(run("train.py", "--resume", "--name", "killed", "--max_steps", steps, cwd=folder))
    finished(run("train.py", *TINY, "--name", "whole", *ending, cwd=folder, timeout=3000))
    tally.counts["steps equal to those of a run in one piece, bit for bit"] = int(steps)
    if different := same_run(killed, folder / "runs" / "whole"):
        tally.lost.append(f"after all kills: {different}")
