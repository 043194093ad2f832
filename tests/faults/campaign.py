"""What every campaign shares: its entry in the table, its tally, and real runs to break.

A campaign tries one promise many times, with real faults on real programs. `full` tries are what
`python -m tests.faults` makes; the test suite makes `quick` ones of the same.
"""

import atexit
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.reader import Checkpoint, list_steps
from tests.helpers import command, losses, run, write_config


class Skip(Exception):
    """What this machine lacks for a campaign."""


@dataclass
class Tally:
    """The tries of one campaign, and everything that went wrong in them.

    lost: what should have survived and did not. undetected: what should have been noticed or
    refused and was not, tracebacks and hangs included. counts: what else there is to know, by name.
    """

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    undetected: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    @property
    def failed(self) -> list[str]:
        return self.lost + self.undetected


@dataclass(frozen=True)
class Campaign:
    """One promise: `run(tally, count, folder, dice)` tries it about `count` times in `folder`."""

    name: str  # for --only
    items: str  # of the list of promises that the table shows
    what: str
    unit: str  # of the tries
    full: int
    quick: int
    run: Callable

    def __call__(self, folder: Path, count: int, seed: int = 0) -> Tally:
        tally = Tally()
        self.run(tally, count, folder, random.Random(f"{self.name} {seed}"))
        return tally


CAMPAIGNS: dict[str, Campaign] = {}


def campaign(name: str, items: str, what: str, unit: str, full: int, quick: int):
    """Registers the decorated function as a campaign."""

    def register(function):
        assert name not in CAMPAIGNS
        CAMPAIGNS[name] = Campaign(name, items, what, unit, full, quick, function)
        return function

    return register


# Real runs ----------------------------------------------------------------------------------------

TINY = ["--config", "tiny.toml"]


_MADE: dict[tuple, Path] = {}  # homes by the flags of their run, to be copied


def home(folder: Path, *straight) -> Path:
    """`folder` with tiny.toml, its data prepared, and an uninterrupted run called "straight".

    straight: further flags of that run. A home with the same flags is made once and copied.
    """
    if straight not in _MADE:
        made = Path(tempfile.mkdtemp(prefix="faults-home-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        settings = write_config(made)  # with a cache that is found from a copy, too
        settings.write_text(settings.read_text().replace(str(made / "cache"), "cache"))
        finished(run("train.py", *TINY, "--name", "straight", *straight, cwd=made))
        _MADE[straight] = made
    shutil.copytree(_MADE[straight], folder, dirs_exist_ok=True)
    return folder


def finished(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """`result`, if the program ended as it should; else AssertionError with what it said."""
    assert result.returncode == 0, (result.args, result.returncode, result.stdout, result.stderr)
    return result


def start(script: str, *arguments, cwd: Path, **more) -> subprocess.Popen:
    """A script as a process that goes on beside us; what it says is in `cwd`/output.txt."""
    with open(cwd / "output.txt", "w") as output:
        return subprocess.Popen(
            command(script, *arguments), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, **more,
        )  # fmt: skip


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """The block, and after it the end of `process`, whatever happened."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 60):
    """Waits until `condition()`; AssertionError if the process ends first, or time runs out."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.002)


def last_files(run_folder: Path) -> dict[str, bytes]:
    """Weights and optimizer state of a run's newest checkpoint, verified."""
    checkpoint = Checkpoint(list_steps(run_folder)[-1]).verify()
    return {n: checkpoint.read(n) for n in ("model.safetensors", "optimizer.safetensors")}


def same_run(a: Path, b: Path, but: tuple = ()) -> str:
    """What differs between two runs, losses (`but` those) and final tensors; "" if no bit does."""
    one, other = losses(a), losses(b)
    for key in sorted((one.keys() | other.keys()) - set(but), key=str):
        if one.get(key) != other.get(key):
            return f"{key[0]} of step {key[1]}: {one.get(key)} and {other.get(key)}"
    one, other = last_files(a), last_files(b)
    return ", ".join(name for name in one if one[name] != other[name])


def one_line(result: subprocess.CompletedProcess, status: int = 2) -> str:
    """Why `result` is no proper refusal (one line on stderr, `status`); "" if it is one."""
    said = result.stdout + result.stderr
    if "Traceback" in said:
        return "a traceback: " + said.strip().splitlines()[-1]
    if result.returncode != status:
        return f"exit status {result.returncode}: {result.stderr.strip()[-200:]}"
    lines = result.stderr.strip().splitlines()
    return "" if len(lines) == 1 else f"{len(lines)} lines on stderr: {lines[:3]}"


def log(text: str):
    """A line of progress, for campaigns that take long."""
    print(text, file=sys.stderr, flush=True)
