"""What benchmarks/gpu.py runs its plan with: processes, a clock, and what is written.

A machine that is lent for a few minutes may be taken back at any moment. So each process has a time
limit, and results.json is written anew, whole, with everything that is found. No step stops the
others, unless it says so.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.harness import ROOT, shorter
from common.files import replace_synced
from common.signals import defer_interrupts

SECONDS = 530  # of the whole plan
LEAST = 0.5  # of a step's time: with less left it is not begun
LOG_BYTES, LOG_OF_A_PROCESS = 8_000_000, 200_000
LAST_LINES = 20  # of a process that failed, in results.json
Command = list[str]
Note = Callable[[list[dict]], dict]  # makes one object of those that a process has found


# Processes ----------------------------------------------------------------------------------------


class Process:
    """A command in a process group of its own; all it prints goes to a file, in which we look.

    A line that starts with a brace is a JSON object that it has found.
    """

    def __init__(self, name: str, command: Command, environment: dict[str, str], file: Path):
        self.name, self.command, self.file, self.began = name, command, file, time.monotonic()
        with file.open("wb") as output:
            self.popen = subprocess.Popen(  # noqa: S603, ours
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment, process_group=0,
            )  # fmt: skip

    def ended(self) -> bool:
        return self.popen.poll() is not None

    def tell(self, line: str):
        """A line on its stdin; "" closes it."""
        assert self.popen.stdin is not None  # a pipe
        with contextlib.suppress(OSError):  # it has ended
            if line:
                self.popen.stdin.write(f"{line}\n".encode())
                self.popen.stdin.flush()
            else:
                self.popen.stdin.close()

    def found(self) -> list[dict]:
        """The objects so far."""
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        objects = []
        for line in lines:
            if line.startswith("{") and line.endswith("}\n"):
                with contextlib.suppress(ValueError):
                    objects.append(json.loads(line))
        return objects

    def kill(self):
        """Ends it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.tell("")


def ending(status: int) -> str:
    """An exit status in words."""
    return f"ended with status {status}" if status >= 0 else f"ended by signal {-status}"


# The script ---------------------------------------------------------------------------------------


class Stop(Exception):
    """The rest of the plan is pointless: why."""


@dataclass
class Step:
    """A part of the plan. at, seconds: when it should begin, and how long it may take."""

    name: str
    at: float
    seconds: float
    run: Callable[["Bench"], None]


@dataclass
class Bench:
    """One go: the clock, the processes, and what has been found."""

    out: Path
    scratch: Path
    device: str = "cuda"
    tiny: bool = False
    nanogpt: str = ""
    shakespeare: str = ""
    seconds: float = SECONDS
    began: float = field(default_factory=time.monotonic)
    results: dict = field(default_factory=dict)
    step: dict = field(default_factory=dict)  # the one that runs, of results["steps"]
    until: float = 0.0  # when it has to be at its end
    processes: list[Process] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)  # objects of a running process in results
    logged: int = 0

    # What is written --------------------------------------------------------------------------

    def write(self):
        """results.json as of now: the old one stays until the new one is on the disk."""
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        content = json.dumps(self.results, indent=1).encode()
        with contextlib.suppress(OSError):  # a disk that is full now may not be later
            replace_synced(self.out / "results.json", content)

    def log(self, text: str):
        """Text for log.txt, of which there is only so much; and for those who watch."""
        print(text, flush=True)
        self.append(f"{text}\n".encode())

    def append(self, content: bytes):
        left = LOG_BYTES - self.logged
        self.logged += len(content)
        with contextlib.suppress(OSError), (self.out / "log.txt").open("ab") as file:
            file.write(content[: max(0, left)])

    def part(self, name: str, status: str, **more):
        """What has become of a part of the step."""
        self.step["parts"][name] = {"status": status, **more}
        self.write()

    def skip(self, name: str, why: str):
        self.log(f"    {name}: skipped ({why})")
        self.part(name, "skipped", why=why)

    # Processes --------------------------------------------------------------------------------

    def start(self, name: str, command: Command, waits: bool = False) -> Process:
        """A process; waits: for lines on its stdin, which is empty otherwise."""
        environment = {
            **os.environ,
            "TMPDIR": str(self.scratch),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "compiled"),
            # side by side on few cores; and what a GPU computes needs no threads of the CPU
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        file = self.scratch / f"output_{len(self.processes)}.txt"
        with defer_interrupts():  # or it would run on, and nobody knew of it
            process = Process(name, command, environment, file)
            self.processes.append(process)
        if not waits:
            process.tell("")
        return process

    def wait(self, process: Process, objects: int, until: float) -> bool:
        """Until it has found so many objects; False if it ended, or the time did, before."""
        while len(process.found()) < objects:
            if process.ended():
                return len(process.found()) >= objects
            if time.monotonic() > min(until, self.until):
                return False
            time.sleep(0.02)
        return True

    def finish(self, process: Process, note: Note | None = None, incomplete=False):
        """Notes a process that has ended, or is ended here because its time is over.

        incomplete: others of its queue should have followed, and there is no time for them.
        """
        killed = incomplete or not process.ended()
        process.kill()
        passed = round(time.monotonic() - process.began, 1)
        output = process.file.read_bytes()
        self.append(f"\n=== {process.name}: {shlex.join(process.command)}\n".encode())
        half = LOG_OF_A_PROCESS // 2
        self.append(output if len(output) <= 2 * half else output[:half] + output[-half:])
        found = (note or merged)(process.found())
        self.seen.pop(process.name, None)
        status = "ok" if process.popen.returncode == 0 and found.get("ok", True) else "failed"
        status = "killed" if killed else status
        why, more = "", {}
        if status != "ok":
            why = f"not done after {passed:.0f} s" if killed else ending(process.popen.returncode)
            if status == "failed" and process.popen.returncode == 0:
                why = "not what it has to be"
            lines = output.decode(errors="replace").splitlines()
            more = {"why": why, "last_lines": [line[:300] for line in lines[-LAST_LINES:]]}
        self.log(f"    {process.name}: {status}, {passed:.0f} s {why}".rstrip())
        self.part(process.name, status, seconds=passed, found=found, **more)

    def alone(self, name: str, command: Command, seconds: float = 1e9):
        """A process from its start to its end."""
        self.together({name: [command]}, seconds)

    def look(self, process: Process, note: Note | None = None):
        """Notes what a process that goes on has found by now."""
        objects = process.found()
        if len(objects) > self.seen.get(process.name, 0):
            self.seen[process.name] = len(objects)
            self.part(process.name, "running", found=(note or merged)(objects))

    def together(self, queues: dict[str, list[Command]], seconds: float = 1e9):
        """Processes side by side; those of one queue, of one name, one after another."""
        until = min(self.until, time.monotonic() + seconds)
        if until < time.monotonic() + 1:
            for name in queues:
                self.skip(name, "no time left in this step")
            return
        waiting = {name: list(commands) for name, commands in queues.items()}
        running = {name: self.start(name, commands.pop(0)) for name, commands in waiting.items()}
        while running:
            over = time.monotonic() > until
            for name, process in list(running.items()):
                if not process.ended() and not over:
                    self.look(process)
                elif process.popen.returncode == 0 and waiting[name] and not over:
                    process.kill()  # what it may have left
                    running[name] = self.start(name, waiting[name].pop(0))
                else:
                    right = process.ended() and process.popen.returncode == 0
                    self.finish(running.pop(name), incomplete=right and bool(waiting[name]))
            time.sleep(0.02)

    def in_turns(
        self, sides: dict[str, Command], rounds: int, seconds: float, last: tuple[str, ...] = ()
    ):
        """Sides that get ready beside each other and then work alone, in turns of `seconds`.

        One that is not ready after two thirds of the step's time is left out. last: sides that are
        profiled after the last round, beside each other.
        """
        running = {name: self.start(name, command, waits=True) for name, command in sides.items()}
        begin_by = time.monotonic() + (self.until - time.monotonic()) * 2 / 3
        ready = {}
        for name, process in running.items():
            ready[name] = self.wait(process, 1, begin_by)
            self.log(f"    {name}: {'ready' if ready[name] else 'not ready'}")
            self.look(process, turns)
        for name in list(running):
            if not ready[name]:  # it would be in the way of the others
                self.finish(running.pop(name), turns)

        def answered(name: str, count: int, limit: float):
            ready[name] = self.wait(running[name], count, time.monotonic() + limit)
            self.look(running[name], turns)

        for number in range(rounds):
            for name, process in running.items():
                if ready[name]:
                    process.tell(str(seconds))
                    answered(name, number + 2, 3 * seconds + 10)
        profiled = [name for name in last if ready[name]]
        for name in profiled:
            running[name].tell("profile")
        for name in profiled:
            answered(name, rounds + 2, 40)
        for process in running.values():
            process.tell("")
        for name, process in running.items():  # one that cannot go on is not waited for
            while ready[name] and not process.ended() and time.monotonic() < self.until:
                time.sleep(0.02)
            self.finish(process, turns)

    def close(self):
        """Nothing that was started goes on."""
        for process in self.processes:
            if not process.ended():
                process.kill()


def merged(objects: list[dict]) -> dict:
    found = {}
    for each in objects:
        found |= each
    return found


def turns(objects: list[dict]) -> dict:
    """What a side said when it was ready, its turns, and its profile."""
    found = {"turns": [each for each in objects if "tokens_per_second" in each]}
    return merged([each for each in objects if "tokens_per_second" not in each]) | found


# Running it ---------------------------------------------------------------------------------------


def run_plan(bench: Bench, steps: list[Step]) -> int:
    """All steps. Returns 0 where each is ok or skipped, 1 otherwise."""
    bench.results |= {"status": "running", "date": date.today().isoformat(), "steps": []}
    command = ["bash", "benchmarks/gpu.sh", *map(shorter, sys.argv[1:])]
    bench.results |= {"command": shlex.join(command), "device": bench.device, "tiny": bench.tiny}
    try:
        for step in steps:
            run_step(bench, step)
        bench.results["status"] = "done"
    except Stop as why:
        bench.results["status"] = f"stopped: {why}"
        print(f"benchmarks.gpu: {why}", file=sys.stderr)
    except BaseException as error:
        bench.results["status"] = f"cut off in {bench.step.get('name', 'nothing')}"
        bench.step["status"] = f"cut off ({type(error).__name__})"
        for part in bench.step.get("parts", {}).values():
            part["status"] = "cut off" if part["status"] == "running" else part["status"]
        raise
    finally:
        bench.close()
        bench.write()
    right = all(step["status"] in ("ok", "skipped") for step in bench.results["steps"])
    return 0 if right and bench.results["status"] == "done" else 1


def run_step(bench: Bench, step: Step):
    """One step, if there is time for it."""
    now = time.monotonic() - bench.began
    bench.step = {"name": step.name, "status": "running", "began": round(now, 1), "parts": {}}
    bench.results["steps"].append(bench.step)
    left = bench.seconds - now
    if left < LEAST * step.seconds:
        bench.step |= {
            "status": "skipped",
            "why": f"only {max(0.0, left):.0f} s of {bench.seconds:g} left",
        }
        bench.log(f"{now:5.0f} s  {step.name}: skipped, {bench.step['why']}")
        return bench.write()
    # what earlier steps have left over is its as well, and never more than there is
    limit = min(left, max(step.seconds, step.at + step.seconds - now))
    bench.until = time.monotonic() + limit
    bench.log(f"{now:5.0f} s  {step.name}: {limit:.0f} s at most")
    bench.write()
    try:
        step.run(bench)
    except Stop as why:
        bench.step |= {"status": "failed", "why": str(why)}
        raise
    except Exception as error:  # a mistake in the step: the others go on
        bench.part("the step itself", "failed", why=f"{type(error).__name__}: {error}"[:500])
    statuses = {part["status"] for part in bench.step["parts"].values()}
    if statuses == {"skipped"}:
        bench.step["status"] = "skipped"
        bench.step["why"] = "; ".join(part["why"] for part in bench.step["parts"].values())
    else:
        bench.step["status"] = "ok" if statuses <= {"ok", "skipped"} else "failed"
    bench.step["seconds"] = round(time.monotonic() - bench.began - now, 1)
    bench.write()
