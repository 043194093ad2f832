"""Several processes under torchrun that lose one, in which one hangs, that are to stop."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from checkpoint.reader import list_steps, step_of
from tests.faults.campaign import (
    TINY,
    Skip,
    Tally,
    campaign,
    ended,
    finished,
    same_run,
    wait_for,
)
from tests.faults.crash import OFTEN, compare
from tests.faults.disk import IN_SAVE, STEPS
from tests.faults.shim import build, faulty
from tests.helpers import TINY as TEXT
from tests.helpers import metrics, run, torchrun, workers, write_config

FOUR = TEXT.replace("accumulation_steps = 2", "accumulation_steps = 4")  # one for each of four
# but for the first step and before evaluations
SELDOM = ["--train.save_interval", "100000", "--max_steps", "100000"]
TIMEOUT = 8  # seconds, of those that wait for one that hangs
AT_ONCE = 30  # seconds in which all are to be gone
WAIT = 120  # seconds for a start on a busy machine


def prepare(folder: Path) -> Path:
    """`folder` with a configuration that four processes can share."""
    if not sys.platform.startswith("linux"):
        raise Skip("needs Linux's /proc")
    folder.mkdir(exist_ok=True)
    write_config(folder, text=FOUR.replace("eval_interval = 20", "eval_interval = 2"))
    return folder


@contextlib.contextmanager
def launched(folder: Path, processes: int, *arguments, restarts: int = 0, environment=None):
    """A torchrun of train.py; what they say is in `folder`/output.txt. None of it is left behind.

    Yields it, and a function that returns what it has said.
    """
    file, left = folder / "output.txt", {}
    command = torchrun(processes, "train.py", *TINY, *arguments, restarts=restarts)
    one_thread = {**(environment or os.environ), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    with open(file, "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=one_thread, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    with ended(process):
        try:
            yield process, file.read_text
        finally:
            left = workers(process.pid)
            process.kill()
            for number in left.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def steps_begun(said: str) -> bool:
    return "\nstep " in said


def alive(numbers) -> list[int]:
    """Which of these process IDs are of processes that have not ended."""
    left = []
    for number in numbers:
        with contextlib.suppress(OSError):
            left += [number] * bool(Path(f"/proc/{number}/cmdline").read_bytes())
    return left


@campaign("ranks", "22", "SIGKILL at a random instant of one of 2 or 4 processes, with restarts",
          "kills", full=100, quick=1)  # fmt: skip
def ranks(tally: Tally, count: int, folder: Path, dice):
    """Half of them on two processes, half on four; each half in one torchrun that restarts.

    The run saves at every step, and is compared with one of one process that nobody has killed.
    """
    for number, processes in enumerate((2, 4)[:count]):
        place = prepare(folder / str(processes))
        kill_often(tally, place, processes, (count + 1 - number) // 2, dice)
        compare(tally, place / "runs" / "killed", place)


def kill_often(tally: Tally, place: Path, processes: int, tries: int, dice):
    """One torchrun, of which a process is killed again and again, and which then is stopped."""
    flags, before = ["--name", "killed", "--resume", "auto", *OFTEN], set()
    with launched(place, processes, *flags, restarts=tries) as (torchrun, said):

        def restarted() -> bool:
            there = set(workers(torchrun.pid).values())
            return len(there) == processes and not there & before

        for _ in range(tries):
            wait_for(restarted, torchrun, WAIT)
            start = len(said())
            if dice.random() < 0.7:
                wait_for(lambda n=start: steps_begun(said()[n:]), torchrun, WAIT)
                time.sleep(dice.random() * 0.5)
            else:  # anywhere, the start included
                time.sleep(dice.random() * 4)
            now = workers(torchrun.pid)
            os.kill(now[dice.randrange(processes)], signal.SIGKILL)
            before = set(now.values())
            tally.tried += 1
            tally.counts["before a step was made"] += not steps_begun(said()[start:])
        wait_for(restarted, torchrun, WAIT)
        start = len(said())
        wait_for(lambda: steps_begun(said()[start:]), torchrun, WAIT)
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(AT_ONCE)
        output = said()
    examine(tally, output.partition(" death signal")[0], processes)


def examine(tally: Tally, said: str, processes: int):
    """No start went back behind what was reported; each loss is told once, and nothing else is.

    What several say at once may stand in one line.
    """
    saved, events = 0, re.finditer(r"saved \S+step_(\d{8})|resuming \S+ from step ([\d,]+)", said)
    for event in events:
        if event[1]:
            saved = int(event[1])
        elif int(event[2].replace(",", "")) < saved:
            tally.lost.append(f"{processes} processes: reported {saved}, {event[0]}")
    gone = rf"train\.py: rank \d of {processes} has gone, at step [\d,]+; continue from the last"
    told = len(re.findall(gone, said))
    tally.counts["told by the others"] += told
    if told != said.count("train.py: ") or "Traceback" in said:
        lines = [line for line in said.splitlines() if "train.py: " in line or "Error" in line]
        tally.undetected.append(f"{processes} processes: {lines}")


@campaign("hangs", "23", "one of 2 or 4 processes hangs", "hangs", full=10, quick=1)
def hangs(tally: Tally, count: int, folder: Path, dice):
    """SIGSTOP; every other one wakes up as soon as it is missed. The run then goes on, unhurt."""
    place, more = prepare(folder), ["--train.collective_timeout", TIMEOUT]
    flags = ["--name", "killed", "--resume", "auto", *OFTEN, *more]
    for number in range(count):
        processes = dice.choice((2, 4)) if count > 1 else 2
        with launched(place, processes, *flags) as (torchrun, said):
            wait_for(lambda: steps_begun(said()), torchrun, WAIT)
            time.sleep(dice.random() * 0.5)
            ids, rank = workers(torchrun.pid), dice.randrange(processes)
            os.kill(ids[rank], signal.SIGSTOP)
            tally.tried += 1
            label = f"rank {rank} of {processes}"
            line = rf"\ntrain.py: {label} has not answered for {TIMEOUT} s, at step [\d,]+; "
            until = time.monotonic() + TIMEOUT + AT_ONCE
            while "\ntrain.py: " not in said() and time.monotonic() < until:
                time.sleep(0.05)
            if number % 2 == 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ids[rank], signal.SIGCONT)
            torchrun.wait(2 * AT_ONCE)  # torchrun gives one that hangs 30 seconds
            if left := alive(ids.values()):
                tally.undetected.append(f"{label}: {len(left)} are left")
            told = said().count("\ntrain.py: ")
            if told != 1 or not re.search(line, said()) or not torchrun.returncode:
                tally.undetected.append(f"{label}: told {told} times: {said()[:3000]}")
    compare(tally, place / "runs" / "killed", place)


@campaign("stopped_ranks", "24", "SIGTERM or SIGINT to torchrun, to one process, to all",
          "signals", full=30, quick=1)  # fmt: skip
def stopped_ranks(tally: Tally, count: int, folder: Path, dice):
    """Wherever the signal goes: one checkpoint, no step lost, all gone within 30 seconds."""
    place = prepare(folder)
    run_folder = place / "runs" / "killed"
    flags = ["--name", "killed", "--resume", "auto", *SELDOM]
    for number in range(count):
        processes = dice.choice((2, 4)) if count > 1 else 2
        with launched(place, processes, *flags) as (torchrun, said):
            if number and dice.random() < 0.2:  # while it starts, too
                wait_for(lambda n=processes: len(workers(torchrun.pid)) == n, torchrun, WAIT)
                time.sleep(dice.random() * 4)
            else:
                wait_for(lambda: steps_begun(said()), torchrun, WAIT)
                time.sleep(dice.random() * 0.5)
            ids, name = workers(torchrun.pid), dice.choice(("SIGTERM", "SIGINT"))
            whom = ("one process", "torchrun", "all")[number % 3]
            targets = {
                "one process": [ids[dice.randrange(processes)]],
                "torchrun": [torchrun.pid],
                "all": [torchrun.pid, *ids.values()],
            }[whom]
            began = time.monotonic()
            for target in targets:
                os.kill(target, getattr(signal, name))
            label = f"{name} to {whom} of {processes}"
            tally.tried += 1
            tally.counts[f"to {whom}"] += 1
            try:
                torchrun.wait(AT_ONCE)
            except subprocess.TimeoutExpired:
                tally.undetected.append(f"{label}: not gone within {AT_ONCE} s")
            took = round(1000 * (time.monotonic() - began))
            what = "ms at most to the end of all"
            tally.counts[what] = max(took, tally.counts[what])
            if left := alive(ids.values()):
                tally.undetected.append(f"{label}: {len(left)} processes are left")
            judge_stop(tally, run_folder, said(), label)
    compare(tally, run_folder, place)


def judge_stop(tally: Tally, run_folder: Path, said: str, label: str):
    """One save of its own at most, no step saved twice, and none that was logged is lost."""
    saves = [int(step) for step in re.findall(r"saved \S+step_(\d{8})", said)]
    if len(set(saves)) != len(saves) or sum(step % 2 for step in saves) > 1:  # the others evaluate
        tally.undetected.append(f"{label}: saved {saves}")
    if "\ntrain.py: " in said:  # a stop is no failure
        tally.undetected.append(f"{label}: {said[:3000]}")
    steps, trained = list_steps(run_folder), [0]
    if (run_folder / "metrics.jsonl").exists():
        trained += [record["step"] for record in metrics(run_folder) if "loss/train" in record]
    if (step_of(steps[-1]) if steps else 0) != max(trained):
        tally.lost.append(f"{label}: after step {max(trained)}, saved are {steps[-1:]}")


@campaign("rank_disk", "25", "the first of two processes cannot save", "faults", full=8, quick=1)
def rank_disk(tally: Tally, count: int, folder: Path, dice):
    """An fsync of a save fails for want of room: of the last one, or of one before.

    That costs the save; it is told by an exit status of 1 if it was the last one.
    """
    place = prepare(folder)
    library, straight = build(folder), place / "runs" / "straight"
    finished(run("train.py", *TINY, "--name", "straight", *STEPS, cwd=place))
    for number in range(count):
        step, at = (5, 2)[number % 2], dice.randint(1, IN_SAVE)
        save = {"from": f"/.step_{step:08d}", "kinds": "fsync,", "how": "once", "errno": 28}
        environment = faulty(library, folder, **save, at=at)
        flags, label = ["--name", f"full{number}", *STEPS], f"fsync {at} of step {step}"
        with launched(place, 2, *flags, environment=environment) as (torchrun, said):
            wait_for(lambda: len(workers(torchrun.pid)) == 2, torchrun, WAIT)
            ids = workers(torchrun.pid)
            torchrun.wait(WAIT)
            output = said()
        tally.tried += 1
        told = output.count(f"step {step} could not be saved")
        if told != (2 if step == 5 else 1) or bool(torchrun.returncode) != (step == 5):
            tally.undetected.append(f"{label}: {torchrun.returncode}, told {told} times: {output}")
        if step == 5 and "exitcode: 1)" not in output and "exitcode  : 1 " not in output:
            tally.undetected.append(f"{label}: another exit status: {output}")
        if alive(ids.values()):
            tally.undetected.append(f"{label}: processes are left")
        if step == 5:
            finished(run("train.py", "--resume", "--name", f"full{number}", cwd=place))
        if different := same_run(straight, place / "runs" / f"full{number}"):
            tally.lost.append(f"{label}: {different}")
