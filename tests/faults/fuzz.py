"""Fuzzing everything that is read: a value, or one line that says why not, and in good time.

    python -m tests.faults.fuzz again FILE      reads an input that was kept, in full view

The reading is done in a process of its own, under a limit on its address space, which says every
second what it has done. When it dies, or says nothing for long, the input it held is kept.
"""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from common.errors import UserError
from common.memory import peak_memory
from tests.faults import fuzz_checkpoints, fuzz_targets  # noqa: F401, which register theirs
from tests.faults.campaign import Skip, Tally, campaign, ended
from tests.faults.fuzz_inputs import TARGETS, Target
from tests.helpers import ROOT

SILENCE = 20  # seconds after which the process counts as hanging
SLOW = 5  # seconds that one input may take
TURN = 2  # seconds that a target has before it is another's turn
LONGEST = 2000  # characters of a message
ADDRESS_SPACE = 4 << 30  # bytes of address space
FRAMES = 1000  # Python's own limit of calls in each other, which hypothesis raises
SCRATCH = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108, a folder of our own in it

# what malloc frees goes back to the kernel, or a later input would be seen to take nothing
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Slow(BaseException):
    """An input takes too long. No Exception, so that the code under test does not catch it."""


@campaign("fuzz", "21", "near-valid input to everything that reads", "seconds", 600, 5)
def fuzz(tally: Tally, count: int, folder: Path, dice):
    """`count` seconds of it, of which every target has its share."""
    if os.name != "posix":
        raise Skip("no POSIX signals")
    deaths = 0
    while tally.tried < count and deaths < 10:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=SCRATCH) as place:
            arguments = [place, str(dice.getrandbits(32)), str(count - tally.tried)]
            died = watch(tally, folder, arguments)
        tally.tried += round(time.monotonic() - began) if died else count - tally.tried
        if died:
            tally.undetected.append(died)
            deaths += 1


def watch(tally: Tally, folder: Path, arguments: list[str]) -> str:
    """Runs a process that fuzzes, and counts what it says. How it died, "" if it did not."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.faults.fuzz", str(folder)]
    target, reason = "the start", f"nothing for {SILENCE} s"
    with open(folder / "stderr.txt", "w") as stderr:
        process = subprocess.Popen(
            command + arguments, bufsize=0, cwd=ROOT, env=os.environ | MALLOC,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    with ended(process):
        while select.select([process.stdout], [], [], SILENCE)[0]:
            line = process.stdout.readline()
            if not line:
                reason = f"exit status {process.wait()}" if process.wait() else ""
                break
            report = json.loads(line)
            target = report["target"]
            tally.counts.update(report["counts"])
            tally.undetected.extend(report["undetected"])
    if not reason:
        return ""
    said = (folder / "stderr.txt").read_text(errors="replace").splitlines()
    last = [line for line in said if "rror" in line][-1:]
    return f"{target}: {reason} {last}: {keep(folder, target, Path(arguments[0], 'input'))}"


def keep(folder: Path, target: str, file: Path) -> str:
    """Copies an input to where it stays, and says where that is and how it begins."""
    if not file.exists():
        return "no input yet"
    name, _, content = file.read_bytes().partition(b"\0")
    kept = folder / "kept"
    kept.mkdir(exist_ok=True)
    place = kept / f"{len(list(kept.iterdir()))},{target},{name.decode()}"
    place.write_bytes(content)
    return f"{place} ({len(content)} bytes: {content[:60]!r})"


# In the process -----------------------------------------------------------------------------------


class Worker:
    """Feeds the targets by turns, and says what came of it."""

    def __init__(self, folder: Path, place: Path):
        self.folder, self.place = folder, place
        self.failed = Counter()  # of each kind
        self.told = 0.0

    def work(self, number: int, seconds: float):
        """Rounds of inputs, each of the target that has had the least time."""
        targets = {}
        for name, make in TARGETS.items():
            (self.place / name).mkdir()
            targets[name] = make(self.place / name)
        until = time.monotonic() + seconds
        spent, rounds = dict.fromkeys(targets, 0.0), Counter()
        while (began := time.monotonic()) < until:
            name = min(spent, key=spent.get)
            rounds[name] += 1
            dice = random.Random(f"{number} {name} {rounds[name]}")
            self.turn(name, targets[name], dice.getrandbits(64), min(until, began + TURN))
            spent[name] += time.monotonic() - began

    def turn(self, name: str, target: Target, number: int, until: float):
        """Up to 100 inputs of one target."""
        report = {"target": name, "counts": Counter(), "undetected": []}
        self.tell(report)  # before the first input, so that it is known whose it is

        @seed(number)
        @settings(
            max_examples=100, phases=[Phase.generate], database=None, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(target.inputs)
        def examples(drawn):
            if time.monotonic() < until:
                self.attempt(target, *drawn, report)

        examples()
        self.tell(report)

    def attempt(self, target: Target, name: str, content: bytes, report: dict):
        """One input. Of each kind of failure two are kept."""
        file, whose = self.place / "input", report["target"]
        file.write_bytes(name.encode() + b"\0" + content)
        wrong = attempt(target, name, content)
        report["counts"][whose] += 1
        kind = f"{whose}: {wrong.split(': ')[0]}"
        self.failed[kind] += bool(wrong)
        if wrong and self.failed[kind] <= 2:
            report["undetected"].append(f"{whose}: {wrong}: {keep(self.folder, whose, file)}")
        if time.monotonic() > self.told + 1:
            self.tell(report)

    def tell(self, report: dict):
        """A line for the parent; what it has been told is not told again."""
        print(json.dumps(report), flush=True)
        self.told = time.monotonic()
        report["counts"], report["undetected"] = Counter(), []


def attempt(target: Target, name: str, content: bytes) -> str:
    """What is wrong with how an input was read, its kind before ": "; "" if nothing is."""
    wrong = ""
    before, frames = new_peak(), sys.getrecursionlimit()
    sys.setrecursionlimit(FRAMES)
    try:
        signal.setitimer(signal.ITIMER_REAL, SLOW, 0.5)  # again, if it is lost in a callback
        try:
            target.feed(name, content)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except UserError as error:
        wrong = unfit(str(error))
    except Slow:
        wrong = f"more than {SLOW} s"
    except Exception as error:
        wrong = f"{type(error).__name__} at {origin(error)}: {str(error)[:150]}"
    grown = peak_memory() - before
    sys.setrecursionlimit(frames)
    if not wrong and grown > 2 * len(content) + target.slack:
        wrong = f"memory beyond twice the input and {target.slack >> 20} MB: {grown >> 20} MB"
    return wrong


def unfit(message: str) -> str:
    """Why a message is not the line that a user should read; "" if it is."""
    if len(message) > LONGEST:
        return f"a message of more than {LONGEST} characters: {message[:150]!r}"
    return "" if message.isprintable() else f"a message of control characters: {message[:150]!r}"


def origin(error: Exception) -> str:
    """The last line of the project that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))]
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}"


def new_peak() -> int:
    """Begins the peak of memory anew, from what is resident now, and gives that.

    Where the kernel does not let us, it is the old peak: then only what exceeds that is seen.
    """
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_memory()


def stop(*_):
    raise Slow


def again(file: Path):
    """Reads a kept input once more, with the traceback that it may give."""
    _, whose, name = file.name.split(",")
    with tempfile.TemporaryDirectory() as place:
        print(TARGETS[whose](Path(place)).feed(name, file.read_bytes()))


def main(arguments: list[str]):
    if arguments[0] == "again":
        again(Path(arguments[1]))
        return
    import resource  # not on Windows

    resource.setrlimit(
        resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE)
    )  # a runaway ends in a MemoryError
    signal.signal(signal.SIGALRM, stop)
    folder, place, number, seconds = arguments
    Worker(Path(folder), Path(place)).work(int(number), float(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
