"""Real disks that fail under train.py: at each call of a save, without room, without rights."""

import shutil
import signal
from functools import partial
from pathlib import Path

from checkpoint.reader import Checkpoint, CheckpointError, list_steps
from tests.faults.campaign import (
    TINY,
    Skip,
    Tally,
    campaign,
    ended,
    finished,
    one_line,
    same_run,
    start,
)
from tests.faults.crash import OFTEN, examine, reported
from tests.faults.shim import CHANGES, Disk, attempt, build, calls, disk, faulty
from tests.helpers import TINY as TEXT
from tests.helpers import run, write_config

# each of the few steps is saved and evaluated, so that every save is followed by best.json's
STEPS = ["--max_steps", "5", "--train.save_interval", "1", "--train.eval_interval", "1"]
FAULTY = ["--name", "faulty", *STEPS]
SAVE = {"from": "/.step_00000002", "until": "/.step_00000003"}  # one save, and all up to the next
IN_SAVE = 8  # of its fsyncs are of the save itself: six files, their directory, its parent
LEAST = 36  # disk calls of a save: fewer, and the shim does not see them all


@campaign("syscalls", "2", "SIGKILL at every disk call of a save, then --resume", "kills", 1000, 1)
def syscalls(tally: Tally, count: int, folder: Path, dice):
    """A run is killed before the n-th disk call from a save on, up to the next save; n = 1, 2, ...

    It is resumed and killed again, and at the end compared with a run that nobody has killed.
    Each n twice in a row: every other step sets best.json, which keeps the next save's pruning
    from removing anything. With a small `count` the n are random.
    """
    write_config(folder, text=TEXT.replace("eval_interval = 20", "eval_interval = 2"))
    library, killed, beyond = build(folder), folder / "runs" / "killed", 0
    while tally.tried < count and beyond < 2:
        at = tally.tried // 2 + 1 if count > LEAST else dice.randint(1, LEAST)
        steps = list_steps(killed)
        step = int(steps[-1].name.removeprefix("step_")) + 1 if steps else 1
        save = {"from": f"/.step_{step:08d}", "until": f"/.step_{step + 1:08d}"}
        environment = faulty(library, folder, **save, at=at, how="kill")
        flags = ["--name", "killed", *OFTEN]
        flags += ["--resume"] if steps else []
        process = start("train.py", *TINY, *flags, cwd=folder, env=environment)
        with ended(process):
            process.wait(120)
        tally.tried += 1
        found = calls(library)
        if process.returncode != -signal.SIGKILL or not found:
            said = (folder / "output.txt").read_text()[-300:]
            tally.lost.append(f"call {at}: exit status {process.returncode}: {said}")
            return
        examine(tally, killed, folder)
        beyond = beyond + 1 if len(found) < at else 0  # then it came as far as the next save
        if len(found) < at <= LEAST:
            tally.lost.append(f"only {len(found)} calls in a save")
    ending = ["--name", "killed", "--max_steps", str(step + 1)]
    finished(run("train.py", "--resume", *ending, cwd=folder))
    ending = ["--name", "whole", *OFTEN, "--max_steps", str(step + 1)]
    horizon = ["--optimizer.schedule_steps", "100000"]
    finished(run("train.py", *TINY, *ending, *horizon, cwd=folder))
    tally.counts["steps equal to those of a run in one piece, bit for bit"] = step + 1
    if different := same_run(killed, folder / "runs" / "whole"):
        tally.lost.append(f"after all kills: {different}")


@campaign("fsync", "4", "fsync fails, at every place of a save", "faults", 36, 1)
def fsync(tally: Tally, count: int, folder: Path, dice):
    """Each fsync from the save of step 2 to the next save fails once, with EIO.

    Where it is of the save, the save has failed and is reported; whatever it is of, the run goes
    on or stops with one line, and ends with the bits of one on a good disk.
    """
    write_config(folder)
    library = build(folder)
    good = faulty(library, folder, **SAVE, kinds="fsync,")
    finished(attempt(folder, "--name", "straight", *STEPS, environment=good))
    every = len(calls(library))  # best.json's and metrics.jsonl's are among them
    assert every > IN_SAVE, f"only {every}: the shim does not see them all"
    places = dice.sample(range(IN_SAVE), count) if count < IN_SAVE else range(count)
    for at in (1 + place % every for place in places):
        shutil.rmtree(folder / "runs" / "faulty", ignore_errors=True)
        environment = faulty(library, folder, **SAVE, kinds="fsync,", at=at, how="once", errno=5)
        result = attempt(folder, *FAULTY, environment=environment)
        tally.tried += 1
        found, failed = calls(library), "step 2 could not be saved" in result.stdout
        if len(found) < at:
            tally.lost.append(f"there was no fsync {at}: {result.stderr} {found}")
            continue
        label = f"fsync {at}, of {Path(found[at - 1][1]).name}"
        if at <= IN_SAVE and (not failed or result.returncode):
            tally.undetected.append(f"{label}: not told or not gone on: {result.returncode}")
        if failed and any("step_00000002" in path for path in reported(result.stdout)):
            tally.undetected.append(f"{label}: said to be saved")
        if failed and (folder / "runs/faulty/checkpoints/step_00000002").exists():
            tally.undetected.append(f"{label}: what could not be saved is there")
        tally.counts["saves that failed and were reported"] += failed
        judge(tally, folder / "runs" / "faulty", result, label)
        go_on(tally, folder, result, label)


def judge(tally: Tally, run_folder: Path, result, label: str):
    """The end of a run on a bad disk: 0, or one line that says why; and no checkpoint is damaged.

    A run that comes to its end without its last checkpoint says so with status 1.
    """
    said = result.stdout + result.stderr
    unsaved = result.returncode == 1 and "could not be saved" in result.stdout
    if "Traceback" in said:
        tally.undetected.append(f"{label}: a traceback: {said.strip().splitlines()[-1]}")
    elif result.returncode:
        if wrong := one_line(result, 1 if unsaved else 2):
            tally.undetected.append(f"{label}: {wrong}")
    elif result.stderr:
        tally.undetected.append(f"{label}: on stderr: {result.stderr[:200]}")
    tally.counts["runs that came to their end"] += not result.returncode
    tally.counts["runs that stopped with one line"] += result.returncode == 2
    steps = list_steps(run_folder)
    for path in steps:
        try:
            Checkpoint(path).verify()
        except CheckpointError as error:
            tally.lost.append(f"{label}: unreadable: {error}")
    for path in reported(result.stdout)[-1:]:
        if Path(path).name not in [step.name for step in steps]:
            tally.lost.append(f"{label}: reported, and not there: {path}")


def go_on(tally: Tally, folder: Path, result, label: str, small: Disk | None = None, flags=()):
    """The run "faulty", brought to its end on a good disk, against "straight"."""
    faulty = (small.seen if small else folder) / "runs" / "faulty"
    if result.returncode:
        resume = ["--resume"] if list_steps(faulty) else []
        inside = small.inside if small else []
        again = attempt(folder, *FAULTY, *flags, *resume, inside=inside)
        if again.returncode:
            tally.lost.append(f"{label}: does not go on: {again.stderr.strip()[-300:]}")
            return
    if different := same_run(faulty, folder / "runs" / "straight"):
        tally.lost.append(f"{label}: {different}")


@campaign("full_disk", "3", "no space left, anywhere in the life of train.py", "faults", 60, 1)
def full_disk(tally: Tally, count: int, folder: Path, dice):
    """One call that takes room fails, or all from it on, or half a write is made; no file may be
    larger than so much; a small disk is full. Afterwards there is room, and the run goes on."""
    library = build(folder)
    write_config(folder)
    good = faulty(library, folder, kinds=CHANGES)
    finished(attempt(folder, "--name", "straight", *STEPS, environment=good))
    whole = calls(library)
    data = sum(path.startswith(str(folder.resolve() / "cache")) for _, path in whole)  # comes first
    if data < 5 or len(whole) < LEAST:
        tally.lost.append(f"only {data} and {len(whole)} calls")
    tries = {
        "one call": partial(at_a_call, "once"),
        "all calls from one on": partial(at_a_call, "on"),
        "half a write and all calls after it": partial(at_a_call, "short"),
        "every file": at_a_size,
        "a small disk": on_a_small_disk,
    }
    for number in range(count):
        name = list(tries)[number % len(tries)] if count > len(tries) else dice.choice([*tries])
        shutil.rmtree(folder / "cache", ignore_errors=True)
        shutil.rmtree(folder / "runs" / "faulty", ignore_errors=True)
        # in every other try where data is prepared, which is a small part of all calls
        at = dice.randint(1, data if number % 2 else len(whole))
        try:
            tries[name](tally, folder, library, at, dice)
        except Skip:  # there are the other ways
            tally.counts["left out, because this user may not mount"] += 1
            continue
        tally.tried += 1
        tally.counts[f"of {name}"] += 1


def at_a_call(how: str, tally: Tally, folder: Path, library: Path, at: int, dice):
    """The calls that change the disk fail, where and how it is told."""
    environment = faulty(library, folder, kinds=CHANGES, at=at, how=how, errno=28)
    result = attempt(folder, *FAULTY, environment=environment)
    label = f"call {at}, {how}: {(calls(library)[at - 1 :] or ['none'])[0]}"
    judge(tally, folder / "runs" / "faulty", result, label)
    go_on(tally, folder, result, label)


def at_a_size(tally: Tally, folder: Path, _library, _at, dice):
    """No file may grow beyond a size."""
    import resource  # here: Windows has none

    size = int(10 ** dice.uniform(0, 5.4))
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    result = attempt(folder, *FAULTY, preexec_fn=limit)
    judge(tally, folder / "runs" / "faulty", result, f"at most {size} bytes")
    go_on(tally, folder, result, f"at most {size} bytes")


def on_a_small_disk(tally: Tally, folder: Path, _library, _at, dice):
    """The run and its data are on a disk that is full some time."""
    size = 4096 * dice.randint(2, 450)
    with disk(folder, f"size={size}") as small:
        flags = [
            f"--runs_dir={small.place / 'runs'}", f"--data.cache_dir={small.place / 'cache'}"
        ]  # fmt: skip
        result = attempt(folder, *FAULTY, *flags, inside=small.inside)
        label = f"disk of {size} bytes"
        judge(tally, small.seen / "runs" / "faulty", result, label)
        small.remount("size=64m")
        go_on(tally, folder, result, label, small, flags)


@campaign("read_only", "5", "train.py on a disk that is read-only", "starts", 12, 2)
def read_only(tally: Tally, count: int, folder: Path, dice):
    """A new run, one to be resumed, and data to be prepared: refused before there is a step 0."""
    write_config(folder)
    with disk(folder, "size=16m") as other:
        old = ["--runs_dir", other.place / "runs", "--name", "old"]
        finished(attempt(folder, *old, "--max_steps", "1", inside=other.inside))
        other.remount("ro")
        starts = {
            "a new run": ["--runs_dir", other.place / "runs", "--name", "new"],
            "a resumed run": [*old, "--resume", "--extend", "--max_steps", "5"],
            "a new folder of runs": ["--runs_dir", other.place / "more", "--name", "new"],
            "data to prepare": ["--data.cache_dir", other.place / "cache", "--name", "new"],
        }
        before = snapshot(other.seen), snapshot(folder / "runs")
        for number in range(count):
            name = list(starts)[number % len(starts)]
            result = attempt(folder, *starts[name], inside=other.inside)
            tally.tried += 1
            if wrong := one_line(result):
                tally.undetected.append(f"{name}: {wrong}")
            if "saved" in result.stdout:
                tally.undetected.append(f"{name}: refused late: {result.stdout[-200:]}")
            if (snapshot(other.seen), snapshot(folder / "runs")) != before:
                tally.lost.append(f"{name}: something was left behind")


def snapshot(folder: Path) -> dict[str, int]:
    """What a folder holds: each path and when it was changed last."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
