"""What never changes a bit: where a run is stopped, how often, what is looked at; and overflow."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np

from checkpoint.reader import Checkpoint, list_steps, step_path
from tests.faults.campaign import (
    TINY,
    Tally,
    campaign,
    ended,
    finished,
    home,
    last_files,
    one_line,
    same_run,
    start,
    wait_for,
)
from tests.helpers import ROOT, losses, metrics, rewrite, run

# dropout and accumulation are on in all of them
NUMBERS = (("bf16", "muon"), ("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon"))
KEEP_ALL = ["--train.save_interval", "1", "--train.keep", "1000"]


def numbers(precision: str, optimizer: str) -> list[str]:
    return ["--precision", precision, "--optimizer.name", optimizer]


def copy_up_to(source: Path, step: int, target: Path):
    """The folder of a run as it was at `step`, but for a metrics.jsonl that knows more."""
    shutil.copytree(source, target)
    for path in list_steps(target):
        if path > step_path(target, step):
            shutil.rmtree(path)


@campaign("resume", "12", "resume at a random step, fp32 and bf16, dropout, accumulation",
          "resumes", full=80, quick=1)  # fmt: skip
def resume(tally: Tally, count: int, folder: Path, dice):
    """20 random steps for each of four kinds of run: every loss, the weights, the moments."""
    for precision, optimizer in NUMBERS:
        place = home(folder / f"{precision}-{optimizer}", *KEEP_ALL, *numbers(precision, optimizer))
        straight = place / "runs" / "straight"
        for _ in range(max(1, count // len(NUMBERS))):
            step, name = dice.randrange(1, 40), f"resumed{tally.tried}"
            copy_up_to(straight, step, place / "runs" / name)
            said = finished(run("train.py", "--resume", "--name", name, cwd=place)).stdout
            assert f"from step {step}" in said, said
            if different := same_run(straight, place / "runs" / name):
                tally.lost.append(f"{precision} {optimizer}, resumed at {step}: {different}")
            shutil.rmtree(place / "runs" / name)
            tally.tried += 1
            if tally.tried == count:
                return


@campaign("row", "13", "killed and resumed again and again", "kills in a row", full=10, quick=1)
def row(tally: Tally, count: int, folder: Path, dice):
    """One run, killed `count` times on its way; in the end not a bit differs."""
    flags = [*numbers("bf16", "muon"), "--max_steps", str(10 * count)]
    home(folder, *flags)
    often = [*TINY, "--name", "killed", *flags, "--train.save_interval", "3"]
    log = folder / "runs" / "killed" / "metrics.jsonl"
    for number in range(count):
        more = ["--resume"] if number else []
        with ended(start("train.py", *often, *more, cwd=folder)) as process:
            lines = dice.randrange(10 * number + 3, 10 * number + 10)
            wait_for(lambda n=lines: log.exists() and log.read_bytes().count(b"\n") > n, process)
            process.kill()
        tally.tried += 1
    finished(run("train.py", "--resume", "--name", "killed", cwd=folder))
    if different := same_run(folder / "runs" / "straight", folder / "runs" / "killed"):
        tally.lost.append(different)


@campaign("intervals", "14", "other intervals of evaluation, logging, saving, sampling",
          "runs", full=20, quick=1)  # fmt: skip
def intervals(tally: Tally, count: int, folder: Path, dice):
    """The losses that both runs log, and the final tensors, are the same bit for bit."""
    home(folder)
    straight = folder / "runs" / "straight"
    for number in range(count):
        flags = {f"--train.{name}_interval": dice.randrange(0, 9) for name in ("eval", "save")}
        flags["--train.log_interval"] = dice.randrange(1, 9)
        flags["--train.histogram_interval"] = dice.randrange(0, 5)
        flags["--train.keep"], flags["--train.eval_examples"] = dice.randrange(1, 5), 3
        flags["--sample.max_new_tokens"] = dice.randrange(1, 30)
        flags["--sample.temperature"] = dice.choice([0, 0.5, 2])
        words = [str(word) for pair in flags.items() for word in pair]
        finished(run("train.py", *TINY, "--name", f"other{number}", *words, cwd=folder))
        other = folder / "runs" / f"other{number}"
        one, two = losses(straight), losses(other)
        shared = [key for key in one.keys() & two.keys() if key[0] == "loss/train"]
        assert shared, "no loss to compare"
        if last_files(straight) != last_files(other) or any(one[k] != two[k] for k in shared):
            tally.lost.append(f"another curve or other weights with {flags}")
        tally.tried += 1


@campaign("overflow", "15", "fp16 gradients that overflow: skipped, or the run stops",
          "runs", full=16, quick=1)  # fmt: skip
def overflow(tally: Tally, count: int, folder: Path, dice):
    """A loss scale of 2^40 or so overflows; it halves until gradients fit float16 again."""
    for number in range(count):
        place = folder / str(number)
        optimizer, exponent = dice.choice(["adamw", "muon"]), dice.randrange(34, 45)
        home(place, *numbers("fp16", optimizer), "--max_steps", "8", "--train.eval_interval", "0")
        checkpoint = Checkpoint(list_steps(place / "runs" / "straight")[0])

        def scaled(state, exponent=exponent):
            state["scaler"]["scale"] = 2.0**exponent

        for name in ("scaled", "stopped"):
            rewrite(checkpoint, place / "runs" / name, state=scaled)
        more = ["--resume", "--train.save_interval", "1", "--train.keep", "99"]
        said = finished(run("train.py", *more, "--name", "scaled", cwd=place)).stdout
        tally.tried += 1
        tally.counts["skipped steps"] += skipped(tally, place / "runs" / "scaled", exponent, said)
        below_one(tally, checkpoint, place)
        if number == 0 == count - 1:
            return  # "resume" and "row" have shown as much of other runs
        stop = dice.randrange(1, 8)
        finished(run("train.py", *more, "--name", "stopped", "--max_steps", stop, cwd=place))
        finished(run("train.py", "--resume", "--name", "stopped", "--max_steps", 8, cwd=place))
        runs = place / "runs"  # the stopped one has an evaluation more
        if different := same_run(runs / "scaled", runs / "stopped", but=[("loss/val", stop)]):
            tally.lost.append(f"{optimizer}, 2^{exponent}, resumed at {stop}: {different}")


def skipped(tally: Tally, run_folder: Path, exponent: int, said: str) -> int:
    """Looks at each step that was skipped: nothing moved, the scale halved, it was counted."""
    steps = [Checkpoint(path) for path in list_steps(run_folder)]
    number = said.count("gradient not finite, update skipped")
    for before, after in list(pairwise(steps))[:number]:
        for name in ("model.safetensors", "optimizer.safetensors"):
            old, new = before.tensors(name), after.tensors(name)
            # an optimizer's averages begin as zeros, in a step that is skipped too
            moved = [key for key, value in new.items() if (value != old.get(key, 0)).any()]
            if moved or not old.keys() <= new.keys():
                tally.lost.append(f"{name} moved in the skipped step {after.step}: {moved[:3]}")
        if after.state["scaler"]["scale"] != 2.0 ** (exponent - after.step):
            tally.lost.append(f"scale {after.state['scaler']['scale']} after {after.step} skips")
        if after.state["skipped"] != after.step:
            tally.lost.append(f"{after.state['skipped']} counted of {after.step} skips")
    if not number:
        tally.lost.append(f"nothing was skipped at a scale of 2^{exponent}")
    return number


def below_one(tally: Tally, checkpoint: Checkpoint, place: Path):
    """An overflow at a scale of 1 stops the run before the update."""

    def small(state):
        state["scaler"]["scale"] = 1.0

    def huge(weights):
        weights["layers.0.norm1.weight"][:] = 6e4

    rewrite(checkpoint, place / "runs" / "small", weights=huge, state=small)
    result = run("train.py", "--resume", "--name", "small", cwd=place)
    if wrong := one_line(result, status=1):
        tally.undetected.append(f"a scale below 1: {wrong}")


@campaign("nonfinite", "16", "weights that make a loss or gradient NaN or infinite, fp32 and bf16",
          "runs", full=40, quick=1)  # fmt: skip
def nonfinite(tally: Tally, count: int, folder: Path, dice):
    """The run stops before the update, keeps its checkpoint, and leaves a NaN dump that replays."""
    home(folder)
    source = Checkpoint(step_path(folder / "runs" / "straight", 20))
    tensors = sorted(source.tensors("model.safetensors"))
    for number in range(count):
        name, value = dice.choice(tensors), dice.choice([np.nan, np.inf, -np.inf])
        place, precision = dice.random(), dice.choice(["fp32", "bf16"])

        def poison(weights, name=name, value=value, place=place):
            flat = weights[name].reshape(-1)
            flat[:: max(1, int(place * flat.size))] = value

        start_at = rewrite(source, folder / "runs" / f"poisoned{number}", weights=poison)
        case = f"{value} in {name}, {precision}"
        flags = ["--resume", start_at.parent.parent, "--precision", precision]
        result = run("train.py", *flags, cwd=folder)
        tally.tried += 1
        if wrong := one_line(result, status=1):
            tally.undetected.append(f"{case}: {wrong}")
            continue
        look_at_nan_dump(tally, start_at, case)


def look_at_nan_dump(tally: Tally, checkpoint: Path, case: str):
    """The state is as it was, no later step was recorded, and replaying finds the place."""
    import subprocess
    import sys

    run_folder = checkpoint.parent.parent
    before = Checkpoint(checkpoint).verify().read("model.safetensors")
    if list_steps(run_folder)[-1:] != [checkpoint]:
        tally.lost.append(f"{case}: there is a later checkpoint, or none")
    if any(record["step"] > 20 for record in metrics(run_folder)):
        tally.undetected.append(f"{case}: a step was recorded")
    nan_dumps = list(run_folder.glob("nonfinite_step_21"))
    if not nan_dumps or Checkpoint(nan_dumps[0]).verify().read("model.safetensors") != before:
        tally.lost.append(f"{case}: no NaN dump, or of other weights")
        return
    command = [sys.executable, "-m", "tools.replay", str(nan_dumps[0])]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode or "first: " not in said.stdout:
        tally.lost.append(f"{case}: not replayed: {said.stdout} {said.stderr}")
    tally.counts["replayed"] += "first: " in said.stdout
