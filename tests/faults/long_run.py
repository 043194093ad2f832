"""An hour of training, evaluated, saved, stopped and resumed all the while: nothing grows."""

import os
import signal
import statistics
import time
from pathlib import Path

from checkpoint.reader import Checkpoint, list_steps
from tests.faults.campaign import TINY, Skip, Tally, campaign, ended, home, start, wait_for
from tests.helpers import losses, metrics
from training.tensorboard_files import find_difference

LEG = 600  # seconds between a stop and the next
GROWTH = 20.0  # MB an hour that are no growth yet: one evaluation more or less in memory
OFTEN = ["--train.save_interval", "500", "--train.histogram_interval", "1000"]
OFTEN += [
    "--train.eval_interval",
    "1000",
    "--train.log_interval",
    "100",
    "--max_steps",
    "100000000",
]


@campaign("long", "long run", "training, evaluated, saved and resumed all the while",
          "seconds", full=3600, quick=4)  # fmt: skip
def long_run(tally: Tally, count: int, folder: Path, dice):
    """Memory and file descriptors are read every half second, in legs of ten minutes."""
    if not os.path.isdir("/proc/self/fd"):
        raise Skip("no /proc to read memory and file descriptors from")
    home(folder)
    run_folder, slopes, began = folder / "runs" / "long", [], time.monotonic()
    while (left := count - (time.monotonic() - began)) > 0:
        more = ["--resume"] if run_folder.exists() else []
        process = start("train.py", *TINY, "--name", "long", *OFTEN, *more, cwd=folder)
        with ended(process):
            said = folder / "output.txt"
            wait_for(lambda said=said: "\nstep " in said.read_text(), process)
            samples = watch(process, min(LEG, left))
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        if process.returncode != 128 + signal.SIGTERM:
            tally.lost.append(f"ended with {process.returncode}: {said.read_text()[-300:]}")
        slopes += [look_at(tally, samples)] if len(samples) > 60 else []
        tally.counts["stops and resumes"] += 1
        check(tally, run_folder)
    tally.tried = round(time.monotonic() - began)
    tally.counts["steps"] = Checkpoint(list_steps(run_folder)[-1]).step
    tally.counts["validations"] = sum(kind == "loss/val" for kind, _ in losses(run_folder))
    if slopes:
        slope = statistics.median(slopes)
        change = "more" if slope > 0 else "less"
        tally.counts[f"kB an hour {change} memory, the median of legs"] = abs(round(1000 * slope))
        if slope > GROWTH:
            tally.lost.append(f"memory grows by {slope:.1f} MB an hour")


def watch(process, seconds: float) -> list[tuple[float, float, int]]:
    """(seconds, MB of resident memory, open file descriptors) of a process, twice a second."""
    samples, began = [], time.monotonic()
    while (now := time.monotonic() - began) < seconds and process.poll() is None:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        samples.append((now, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, descriptors))
        time.sleep(0.5)
    return samples


def look_at(tally: Tally, samples) -> float:
    """The slope of memory in MB an hour, without the first tenth; descriptors must not grow."""
    settled = samples[len(samples) // 10 :]
    slope = statistics.linear_regression([s[0] for s in settled], [s[1] for s in settled]).slope
    third = len(settled) // 3
    # the fewest: a save has some open for a moment
    first, last = (min(s[2] for s in part) for part in (settled[:third], settled[-third:]))
    if last > first:
        tally.lost.append(f"{first} file descriptors at first, {last} at the end")
    return slope * 3600


def check(tally: Tally, run_folder: Path):
    """The newest checkpoint is whole, and TensorBoard shows what metrics.jsonl holds."""
    Checkpoint(list_steps(run_folder)[-1]).verify()
    if wrong := find_difference(run_folder / "tensorboard", metrics(run_folder)):
        tally.lost.append(f"TensorBoard: {wrong}")
    steps = [record["step"] for record in metrics(run_folder) if "loss/train" in record]
    if steps != sorted(set(steps)):
        tally.lost.append("a step stands twice in metrics.jsonl, or out of order")
