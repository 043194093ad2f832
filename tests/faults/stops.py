"""A run that is asked to stop, and one that a second process wants to have."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from checkpoint.reader import list_steps
from tests.faults.campaign import (
    TINY,
    Skip,
    Tally,
    campaign,
    ended,
    home,
    one_line,
    same_run,
    start,
    wait_for,
)
from tests.faults.crash import OFTEN, compare
from tests.helpers import TINY as TEXT
from tests.helpers import losses, run, write_config

HANG = 10  # seconds, in which there is room for hundreds of steps and saves
AT_ONCE = 2000  # milliseconds, from a signal to the end of a program that has nothing to save


def needs_signals():
    """Windows ends a process where others send it a signal, and cannot halt one."""
    if not hasattr(signal, "SIGSTOP"):
        raise Skip("needs POSIX signals")


@campaign("second", "6", "a second train.py on a run that is being trained", "starts", 30, 3)
def second(tally: Tally, count: int, folder: Path, dice):
    """The first is halted at a random moment, so that it cannot end meanwhile, and then goes on."""
    needs_signals()
    flags = ["--train.save_interval", "1"]
    home(folder, *flags)
    first = folder / "runs" / "first"
    while tally.tried < count:
        shutil.rmtree(first, ignore_errors=True)
        process = start("train.py", *TINY, "--name", "first", *flags, cwd=folder)
        with ended(process):
            wait_for(lambda: "saved" in (folder / "output.txt").read_text(), process)
            time.sleep(dice.random() * 0.1)
            process.send_signal(signal.SIGSTOP)
            ways = {
                "--resume": ["--resume"],  # of the newest run, and that is this one
                "the same new name": ["--name", "first"],
                "--resume of its folder": ["--resume", first],
                "--resume of its newest step": ["--resume", list_steps(first)[-1]],
                "--resume --name": ["--resume", "--name", "first"],
            }
            for name, way in list(ways.items())[: count - tally.tried]:
                refused(tally, name, run("train.py", *TINY, *way, cwd=folder), process.pid)
            process.send_signal(signal.SIGCONT)
            process.wait(60)
        if process.returncode:
            tally.lost.append(f"the first ended with {process.returncode}")
        elif different := same_run(first, folder / "runs" / "straight"):
            tally.lost.append(f"the first is another: {different}")


def refused(tally: Tally, name: str, result, holder: int):
    """Counts a start that is to be refused in one line that names the process `holder`."""
    tally.tried += 1
    if wrong := one_line(result):
        tally.undetected.append(f"{name}: {wrong}")
    elif f"process {holder}" not in result.stderr:
        tally.undetected.append(f"{name}: does not name process {holder}: {result.stderr.strip()}")


@campaign("signals", "7", "SIGTERM or SIGINT at a random moment of train.py", "signals", 100, 1)
def signals(tally: Tally, count: int, folder: Path, dice):
    """A run that saves at every step and evaluates at every second is stopped and resumed.

    At the end the whole of it is compared with a run that nobody has stopped.
    """
    needs_signals()
    write_config(folder, text=TEXT.replace("eval_interval = 20", "eval_interval = 2"))
    killed = folder / "runs" / "killed"  # as compare() calls it
    while tally.tried < count:
        resume = ["--resume"] if list_steps(killed) else []
        process = start("train.py", *TINY, "--name", "killed", *OFTEN, *resume, cwd=folder)
        with ended(process):
            first = " " if dice.random() < 0.2 else "\nstep "  # 0.2: while PyTorch loads, too
            wait_for(lambda: first in (folder / "output.txt").read_text(), process)  # noqa: B023
            time.sleep(dice.random() * (2 if first == " " else 0.3))
            stop(tally, process, dice, HANG, "to the end of a run")
        tally.tried += 1
        output = (folder / "output.txt").read_text()
        if process.returncode > 0 and "stopping: saving" in output:
            tally.counts["answered with a save"] += 1
        if "Traceback" in output:
            tally.undetected.append(f"a traceback: {output.splitlines()[-1]}")
        steps, trained = list_steps(killed), [0]
        if (killed / "metrics.jsonl").exists():
            trained += [step for kind, step in losses(killed) if kind == "loss/train"]
        if (int(steps[-1].name.removeprefix("step_")) if steps else 0) != max(trained):
            tally.lost.append(f"stopped after step {max(trained)}, saved are {steps[-1:]}")
    if list_steps(killed):
        compare(tally, killed, folder)


def stop(tally: Tally, process, dice, limit: float, what: str):
    """Sends SIGTERM or SIGINT to a process or to its group; it must end in time, and say why."""
    number = dice.choice((signal.SIGTERM, signal.SIGINT))
    began = time.monotonic()
    (os.killpg if os.getpgid(process.pid) == process.pid else os.kill)(process.pid, number)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        tally.undetected.append(f"{number.name}: not gone within {limit:g} s {what}")
        return
    if process.returncode != 128 + number:
        tally.undetected.append(f"{number.name}: exit status {process.returncode} {what}")
    took, name = round(1000 * (time.monotonic() - began)), f"ms at most from a signal {what}"
    tally.counts[name] = max(took, tally.counts[name])


@campaign("preparing", "7", "SIGTERM or SIGINT while data is prepared", "signals", 24, 1)
def preparing(tally: Tally, count: int, folder: Path, dice):
    """The text is large: SentencePiece learns from it for many seconds, and takes some to encode.

    Every other time the whole process group gets the signal, as from a terminal.
    """
    if not Path("/proc/self/stat").exists():
        raise Skip("needs /proc, to see what becomes of SentencePiece's process")
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(60000)]
    with open(folder / "large.txt", "w") as text:
        for _ in range(120000):
            text.write(" ".join(dice.choices(words, k=20)) + "\n")
    write_config(folder, folder / "large.txt")
    moments = (  # tokenizer, kind of text, from which line on, for how many seconds at most
        ("unigram", "stream", "tokenizer: training", 4),
        ("bpe", "stream", "tokens: train", 0.8),
        ("bpe", "lines", "tokens: train", 0.8),
        ("char", "lines", "reading", 1.2),
    )
    for number in range(count):
        tokenizer, kind, line, seconds = moments[number % len(moments)]
        flags = ["--data.tokenizer", tokenizer, "--data.kind", kind, "--name", "never"]
        alone = dice.random() < 0.5
        process = start("train.py", *TINY, *flags, cwd=folder, start_new_session=not alone)
        with ended(process):
            wait_for(lambda: line in (folder / "output.txt").read_text(), process)  # noqa: B023
            time.sleep(dice.random() * seconds)
            children = children_of(process.pid)
            stop(tally, process, dice, HANG, "while data is prepared")
        tally.tried += 1
        tally.counts["in SentencePiece's training"] += bool(children)
        look_around(tally, folder, children)
    slowest = max((n for name, n in tally.counts.items() if name.startswith("ms ")), default=0)
    if slowest > AT_ONCE and count > 10:  # a few tries are a test, and no test asserts a time
        tally.undetected.append(f"gone after {slowest} ms only")


def children_of(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(file.parent.name))
    return found


def look_around(tally: Tally, folder: Path, children: list[int]):
    """What a stop while data is prepared must leave: no process, no run, no traceback, and of the
    cache nothing but what the same command goes on from."""
    said = (folder / "output.txt").read_text()
    if "Traceback" in said:
        tally.undetected.append(f"a traceback: {said.splitlines()[-1]}")
    cache = [path for path in (folder / "cache").iterdir() if path.suffix != ".lock"]
    cached = [path.name for path in cache if not (path / "progress.json").exists()]
    for path in cache:
        shutil.rmtree(path)
    if cached or (folder / "runs" / "never").exists():
        tally.lost.append(f"left behind: {cached}, {[*(folder / 'runs').iterdir()]}")
    time.sleep(0.3)  # in which a process notices that its parent has gone
    for child in children:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                tally.undetected.append(f"SentencePiece's process {child} is still there")
