"""Whether a resumed run is the same as one that was never stopped, for any configuration.

python -m tools.verify_resume --steps 40 --config configs/mini.toml --model.dropout 0.2
python -m tools.verify_resume --processes 4 --resume_processes 2 --train.accumulation_steps 4
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint.reader import Checkpoint, list_steps, step_path
from common import cli, cuda
from common.errors import UserError
from common.jsonl import read_records
from training.command_line import read_command_line, underscored

PROGRAM = "python -m tools.verify_resume"
DESCRIPTION = """Checks that a resumed run equals one that was never stopped: trains a few steps,
trains them again with a SIGKILL in the middle and a resume, compares every loss, tensor and
counter bit for bit, and names the first difference. With --processes the runs are torchrun's, and
the SIGKILL goes to all of it. All other flags go to train.py (see its --help). Both runs are
removed unless something differs or fails. Exit status: 0 equal, 1 different, else that of the
train.py that failed."""
SCRIPT = Path(__file__).parent.parent / "train.py"
# torchrun gives each worker a session of its own, so that each leaves its process ID before it
# becomes train.py; of $$$$ torchrun makes $$
NAMED = ["sh", "-c", 'echo $$$$ >> "$0" && exec "$@"']
EXACT = ("lr", "loss/train", "grad_norm", "loss/val")  # of a step, what comes first first


class Failed(Exception):
    """A train.py that did not do what it should: what it said, and its exit status."""


@dataclass
class Compared:
    """What was compared, and the first difference in words ("" where there is none)."""

    losses: int = 0
    validations: int = 0
    tensors: int = 0
    difference: str = ""


def main() -> int:
    options, flags = read_flags(sys.argv[1:])
    folder = Path(tempfile.mkdtemp(prefix="verify_resume-"))
    keep = False
    try:
        flags = flags_of_both(flags, options, folder)
        if flags is None:
            return 0
        train_all(flags, options, folder)
        found = compare(folder / "straight", folder / "stopped", options.steps)
        keep = bool(found.difference)
    except Failed as error:
        said, status = error.args
        print(said, file=sys.stderr)
        keep = any(folder.glob("*/checkpoints/step_*"))  # something to look at
        if keep:
            print(f"{PROGRAM}: the runs are kept in {folder}", file=sys.stderr)
        return status
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if found.difference:
        print(f"NOT equal; first difference: {found.difference}\nboth runs are kept in: {folder}")
        return 1
    print(
        f"{options.steps} steps{on(options.processes)}, stopped after {options.stop_at} and "
        f"resumed{on(options.resume_processes, options.processes)}: "
        f"{found.losses} training losses, {found.validations} validation losses, "
        f"{found.tensors} tensors: the same bit for bit"
    )
    return 0


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those for train.py."""
    parser = cli.Parser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="steps to train (default: 40)")
    parser.add_argument(
        "--stop_at", type=int, default=0, help="steps before the kill (default: half of --steps)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="of both runs, until the kill (default: 1)"
    )
    parser.add_argument(
        "--resume_processes", type=int, default=1, help="of the resume (default: 1)"
    )
    options, flags = parser.parse_known_args([underscored(flag) for flag in argv])
    if options.steps < 2:
        raise UserError(f"--steps {options.steps} must be at least 2")
    if options.processes < 1:
        raise UserError(f"--processes {options.processes} must be at least 1")
    if options.resume_processes < 1:
        raise UserError(f"--resume_processes {options.resume_processes} must be at least 1")
    options.stop_at = options.stop_at or options.steps // 2
    if not 0 < options.stop_at < options.steps:
        raise UserError(f"--stop_at {options.stop_at} must be from 1 to {options.steps - 1}")
    for flag in flags:
        name = flag.partition("=")[0]
        if name in ("--resume", "--name", "--extend"):
            raise UserError(f"{name}: this program starts both runs itself; leave it out")
    return options, flags


def flags_of_both(flags: list[str], options, folder: Path) -> list[str] | None:
    """What both runs are given: the user's flags, and ours, which win. None: nothing to train.

    The learning rate is that of the whole run the user has in mind, however few steps are made.
    """
    flags = [*flags, "--runs_dir", str(folder)]
    plan = read_command_line(lambda line: None, flags)
    if plan is None:
        return None
    for processes in (options.processes, options.resume_processes):
        plan.config.train.share_of(processes)  # refuses what cannot be shared out
    if not plan.config.train.deterministic and is_cuda(plan.config.device):
        print("on CUDA both runs get --train.deterministic: else the order of sums is free")
        flags.append("--train.deterministic")
    stop_at, interval = options.stop_at, plan.config.train.eval_interval or options.stop_at
    ours = {
        "max_steps": options.steps,
        "optimizer.schedule_steps": plan.config.horizon,
        "train.log_interval": 1,
        "train.save_interval": stop_at,
        "train.eval_interval": min(interval, stop_at),  # also on either side of the stop
    }
    return [*flags, *(part for key, value in ours.items() for part in (f"--{key}", str(value)))]


def is_cuda(device: str) -> bool:
    """Whether train.py would compute on CUDA. Its context, which takes memory, is not made here."""
    if device != "auto":
        return device.startswith("cuda")
    return cuda.probe()[0]


def train_all(flags: list[str], options, folder: Path):
    """The run that is not stopped, and the one that is, each start of train.py in processes."""
    steps, stop_at, stopped = options.steps, options.stop_at, folder / "stopped"
    middle, first, then = step_path(stopped, stop_at), options.processes, options.resume_processes
    with progress(f"straight: {steps} steps{on(first)}"):
        train([*flags, "--name", "straight"], folder, first)
    with progress(f"stopped: killed after the checkpoint of step {stop_at}"):
        train([*flags, "--name", "stopped"], folder, first, kill_at=middle)
    for path in list_steps(stopped):  # steps made while the signal was on its way
        if path > middle:
            shutil.rmtree(path)
    with progress(f"resumed: {steps - stop_at} steps{on(then, first)}"):  # with its own settings
        train(["--resume", str(middle), "--runs_dir", str(folder)], folder, then)


def on(processes: int, usual: int = 1) -> str:
    """ " on 2 processes", where they are not as many as usual."""
    ending = "" if processes == 1 else "es"
    return "" if processes == usual else f" on {processes} process{ending}"


@contextlib.contextmanager
def progress(what: str):
    """A line that says what is done, and when it is, how long it took."""
    print(what, end=" ... ", flush=True)
    began = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


def train(flags: list[str], folder: Path, processes: int, kill_at: Path | None = None):
    """One start of train.py; killed, all of it, as soon as it says that it has saved `kill_at`."""
    command, workers = [sys.executable, str(SCRIPT), *flags], folder / "workers.txt"
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", "--no_python"]
        command = [*launcher, *NAMED, str(workers), *command]
        workers.write_text("", encoding="ascii")
    with open(folder / "stderr.txt", "w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(  # noqa: S603, our own program
            command, stdin=subprocess.DEVNULL, stderr=errors,
            stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        assert process.stdout is not None  # a pipe
        said = ""
        try:
            for line in process.stdout:
                said = line.strip() or said
                if kill_at and line.startswith("saved ") and kill_at.name in line:
                    return
        finally:
            if kill_at or sys.exc_info()[0]:
                process.kill()
                if processes > 1:
                    kill_all(workers)
                    process.stdout.read()  # which ends when the last of them has
            status = process.wait()
            process.stdout.close()
        errors.seek(0)
        said = errors.read().strip() or said
    own = [line for line in said.splitlines() if line.startswith("train.py: ")]
    if processes > 1 and own:  # torchrun tells of it, too, at length
        said = "\n".join(own)
    if kill_at or status:
        status = 128 - status if status < 0 else status or 1  # below 0: minus a signal
        raise Failed(said or f"train.py: ended with exit status {status}", status)


def kill_all(workers: Path):
    """SIGKILL to the processes whose IDs are in a file, a line each."""
    for number in workers.read_text(encoding="ascii").split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


# Comparing ----------------------------------------------------------------------------------------


def compare(straight: Path, stopped: Path, steps: int) -> Compared:
    """Both runs' metrics step by step, then the tensors and counters of their last checkpoints."""
    found = Compared()
    records = [by_step(run) for run in (straight, stopped)]
    for key in sorted(records[0].keys() | records[1].keys()):
        step, tag = key[0], EXACT[key[1]]
        found.losses += tag == "loss/train"
        found.validations += tag == "loss/val"
        note(found, f"{tag} of step {step}", *(r.get(key, "none") for r in records))
    if not found.difference and found.losses != steps:
        found.difference = f"metrics.jsonl has {found.losses} training losses of {steps}"
    last = [Checkpoint(list_steps(run)[-1]) for run in (straight, stopped)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = [checkpoint.tensors(name) for checkpoint in last]
        for key in sorted(tensors[0].keys() | tensors[1].keys()):
            found.tensors += 1
            compare_tensors(found, f"{name}, {key}", *(t.get(key) for t in tensors))
    states = [checkpoint.state for checkpoint in last]
    for key in states[0].keys() | states[1].keys():
        note(found, f"state.json, {key}", *(state.get(key, "none") for state in states))
    return found


def by_step(run: Path) -> dict[tuple[int, int], float]:
    """The values of a run that have to be the same, by step and place in EXACT."""
    found = {}
    for record in read_records(run / "metrics.jsonl"):
        for place, tag in enumerate(EXACT):
            if tag in record:
                found[record["step"], place] = record[tag]
    return found


def compare_tensors(found: Compared, name: str, a, b):
    """Notes where two arrays differ in dtype, shape or the bits of a number."""
    kinds = ["none" if t is None else f"{t.dtype} {t.shape}" for t in (a, b)]
    if kinds[0] != kinds[1]:
        note(found, name, *kinds)
    elif a.tobytes() != b.tobytes():
        size = a.dtype.itemsize
        bits = [np.frombuffer(t.tobytes(), np.uint8).reshape(-1, size) for t in (a, b)]
        place = int(np.flatnonzero((bits[0] != bits[1]).any(1))[0])
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, a.shape))
        note(found, f"{name}[{index}]", a.flat[place].item(), b.flat[place].item(), same=False)


def note(found: Compared, name: str, a: object, b: object, *, same: bool | None = None):
    """Keeps the first difference."""
    if not found.difference and not (a == b if same is None else same):
        found.difference = f"{name}: {a} straight, {b} resumed"


if __name__ == "__main__":
    sys.exit(cli.run(PROGRAM, main))
