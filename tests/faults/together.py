"""Several processes at once, on one run's name, on one data cache, on one checkpoint."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from checkpoint.reader import list_steps
from tests.faults.campaign import (
    TINY,
    Tally,
    campaign,
    ended,
    home,
    one_line,
    same_run,
    start,
    wait_for,
)
from tests.faults.crash import OFTEN
from tests.faults.stops import needs_signals
from tests.helpers import command, write_config


def at_once(folder: Path, *commands: list) -> list[subprocess.CompletedProcess]:
    """Several train.py started at once, each to its end."""
    environment = {**os.environ, "PYTHONPATH": ""}
    started = [
        subprocess.Popen(
            command("train.py", *TINY, *arguments), cwd=folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for arguments in commands
    ]  # fmt: skip
    ends = []
    for process in started:
        with ended(process):
            output, errors = process.communicate(timeout=120)
        ends.append(subprocess.CompletedProcess("", process.returncode, output, errors))
    return ends


@campaign("same_name", "concurrency", "two train.py at once with the same new name", "pairs", 20, 1)
def same_name(tally: Tally, count: int, folder: Path, dice):
    """One of them trains, whole, and the other is refused."""
    home(folder)
    for _ in range(count):
        shutil.rmtree(folder / "runs" / "new", ignore_errors=True)
        ends = at_once(folder, *[["--name", "new"]] * 2)
        tally.tried += 1
        ends.sort(key=lambda result: result.returncode)
        if ends[0].returncode:
            tally.lost.append(f"none has trained: {[result.stderr for result in ends]}")
            continue
        if wrong := one_line(ends[1]):
            tally.undetected.append(f"the other one: {wrong}")
        tally.counts["refused when PyTorch had loaded"] += "device:" in ends[1].stdout
        if different := same_run(folder / "runs" / "new", folder / "runs" / "straight"):
            tally.lost.append(f"the one that has trained: {different}")


@campaign(
    "same_data", "concurrency", "two train.py at once that prepare the same data", "pairs", 20, 1
)
def same_data(tally: Tally, count: int, folder: Path, dice):
    """Both train, to the same bits, and one has prepared, which takes it a while."""
    words = ["".join(dice.choices("abcdefghij", k=5)) for _ in range(200_000)]
    (folder / "text.txt").write_text("\n".join(words))
    write_config(folder, folder / "text.txt")
    kind = ["--data.tokenizer", "bpe", "--data.vocab_size", "500", "--data.val_fraction", "0.01"]
    runs = [folder / "runs" / name for name in ("a", "b")]
    for _ in range(count):
        for place in (folder / "cache", *runs):
            shutil.rmtree(place, ignore_errors=True)
        ends = at_once(folder, *(["--name", run.name, *kind] for run in runs))
        tally.tried += 1
        prepared = sum("tokens: train" in result.stdout for result in ends)
        if prepared != 1:
            tally.undetected.append(f"{prepared} have prepared the data")
        failed = [result.stderr.strip()[-300:] for result in ends if result.returncode]
        if wrong := failed or same_run(*runs):
            tally.lost.append(str(wrong))


@campaign(
    "reading",
    "concurrency",
    "generate.py while train.py saves and prunes each step",
    "texts",
    100,
    4,
)
def reading(tally: Tally, count: int, folder: Path, dice):
    """With and without validation: the best step moves on, or there is none but the newest."""
    needs_signals()
    write_config(folder)
    for validates in (True, False):
        settings = ["--data.val_fraction", "0.1" if validates else "0"]
        flags = [*OFTEN, "--train.keep", "1", "--train.eval_interval", "1", *settings]
        name = f"writing-{validates}"
        process = start("train.py", *TINY, "--name", name, *flags, cwd=folder)
        with ended(process):
            wait_for(lambda: "\nstep " in (folder / "output.txt").read_text(), process)
            for _ in range(count // 2):
                engine = ("python", "numpy", "torch")[tally.tried % 3]
                write(tally, folder, name, engine, dice.uniform(0.1, 0.5))
            assert process.poll() is None, "train.py ended early"
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        newest = list_steps(folder / "runs" / name)[-1].name
        tally.counts["steps saved meanwhile"] += int(newest.removeprefix("step_"))
        if process.returncode != 128 + signal.SIGTERM:
            tally.lost.append(f"train.py ended with {process.returncode}")


def write(tally: Tally, folder: Path, name: str, engine: str, moment: float):
    """One text of a run that goes on; from a moment on the writer is often too slow for it."""
    flags = ["--checkpoint", f"runs/{name}", "--engine", engine, "--max_new_tokens", "4"]
    process = subprocess.Popen(
        command("generate.py", *flags, "--prompt", "The "), cwd=folder, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with ended(process):
        time.sleep(moment)
        for _ in range(12):
            process.send_signal(signal.SIGSTOP)
            wait_for_step(folder / "runs" / name)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        output, errors = process.communicate(timeout=120)
    tally.tried += 1
    tally.counts[f"with {engine}"] += 1
    tally.counts["whose first checkpoint was removed"] += "skipped: " in errors
    if process.returncode or not output.strip():
        tally.lost.append(f"{engine}: exit status {process.returncode}: {errors.strip()[-200:]}")


def wait_for_step(run_folder: Path):
    """Waits until a run has published another checkpoint, and removed the one before."""
    seen, until = list_steps(run_folder), time.monotonic() + 5
    while set(seen) & set(list_steps(run_folder)[-1:]) and time.monotonic() < until:
        time.sleep(0.01)
