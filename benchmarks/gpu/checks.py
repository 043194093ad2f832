"""The checks of benchmarks/gpu.py that start train.py: a line, a JSON object, for what is found.

    python -m benchmarks.gpu.checks losses FOLDER cuda --config configs/default.toml

Each takes a folder for its runs, the device, and flags of train.py. "ok" says whether what was
found is what has to be found.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.time_to_quality import summary
from common import cli
from common.errors import UserError

FIRST, LATER, BF16 = 1e-5, 1e-3, 0.02  # nats: of the first loss, of step 20, of bf16 at step 20
LOOKED_AT = 20  # the step
PUBLISHED = 1.4697  # validation loss, nats: nanoGPT's README of train_shakespeare_char.py


class Failed(Exception):
    """A program did not do what it should: what it said last."""


def say(**found):
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def start(program: str, *arguments: str, errors: int | None = None) -> subprocess.Popen:
    """A program of the project. What it prints is printed here; errors: where stderr goes."""
    command = [sys.executable, *program.split(), *arguments]
    return subprocess.Popen(  # noqa: S603, ours
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=errors, text=True
    )


def finish(process: subprocess.Popen, status: int = 0):
    """Waits for it. Raises Failed where it ends with another status."""
    found = process.wait()
    if found != status:
        assert isinstance(process.args, list)  # as `start` gives them
        raise Failed(f"{' '.join(map(str, process.args[1:3]))} ended with {found}, not {status}")


def records(run: Path) -> list[dict]:
    """What metrics.jsonl has by now; a last line that is half written is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def values(run: Path, key: str) -> list[float]:
    return [record[key] for record in records(run) if key in record]


def losses(folder: Path, device: str, *flags: str):
    """The losses of a CPU in float32 beside those of the device, in float32 and in bf16."""
    sides = {"expected": ("cpu", "fp32"), "fp32": (device, "fp32"), "bf16": (device, "bf16")}
    runs = {}
    for name, (where, precision) in sides.items():
        more = ["--device", where, "--precision", precision, "--name", name]
        more += ["--runs_dir", str(folder), "--train.log_interval", "1"]
        runs[name] = start("train.py", *flags, *more)
    for run in runs.values():
        finish(run)
    curves = {name: values(folder / name, "loss/train") for name in sides}
    expected, step = curves["expected"], min(LOOKED_AT, len(curves["expected"])) - 1
    found = {
        "first": abs(curves["fp32"][0] - expected[0]),
        "later": abs(curves["fp32"][step] - expected[step]),
        "bf16": abs(curves["bf16"][step] - expected[step]),
    }
    ok = found["first"] <= FIRST and found["later"] <= LATER and found["bf16"] <= BF16
    say(**found, step=step + 1, curves=curves, ok=ok)


def full(folder: Path, device: str, *flags: str):
    """A model that no memory holds: one line, and status 2."""
    more = ["--device", device, "--runs_dir", str(folder), "--name", "full"]
    process = start("train.py", *flags, *more, errors=subprocess.PIPE)
    _, said = process.communicate()
    lines = said.strip().splitlines()
    right = process.returncode == 2 and len(lines) == 1 and "out of memory" in lines[0]
    say(status=process.returncode, said=lines[-5:], ok=right)


def stop(folder: Path, device: str, *flags: str):
    """Ctrl-C after a few steps, and a resume that leaves no step out."""
    run = folder / "stop"
    more = ["--device", device, "--runs_dir", str(folder), "--name", run.name]
    more += ["--train.log_interval", "1", "--train.eval_interval", "0"]
    process = start("train.py", *flags, *more)
    while len(records(run)) < 3 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    finish(process, 128 + signal.SIGINT)
    stopped = records(run)[-1]["step"]
    finish(start("train.py", "--resume", str(run), "--max_steps", str(stopped + 3)))
    steps = [record["step"] for record in records(run) if "loss/train" in record]
    ok = steps == list(range(1, stopped + 4))
    say(stopped=stopped, resumed_to=steps[-1], ok=ok)


def train(folder: Path, device: str, *flags: str):
    """A run as a user makes it: trained, resumed, generated from; and what preflight said of it."""
    run = folder / "run"
    where = ["--device", device, "--runs_dir", str(folder)]
    finish(start("train.py", *flags, *where, "--name", run.name))
    speeds = values(run, "speed/tokens_per_second")
    say(
        steps=records(run)[-1]["step"], epochs=values(run, "epoch")[-1],
        peak_memory=1e6 * values(run, "memory/megabytes")[-1], tokens_per_second=max(speeds),
        mfu=max(values(run, "speed/mfu")), validation_losses=values(run, "loss/val"),
        training_losses=values(run, "loss/train"),
    )  # fmt: skip
    # the speed is known by now, so that these may run beside each other
    preflight = subprocess.Popen(  # noqa: S603, ours
        [sys.executable, "-m", "tools.preflight", *flags, *where], cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    last = records(run)[-1]["step"] + 2
    finish(start("train.py", "--resume", str(run), "--extend", "--max_steps", str(last)))
    say(resumed_to=records(run)[-1]["step"])
    more = ["--prompt", "def ", "--max_new_tokens", "16", "--device", device, "--precision", "bf16"]
    finish(start("generate.py", "--checkpoint", str(run), *more))
    say(generated=True)
    said, _ = preflight.communicate()
    print(said, flush=True)
    estimate = re.search(r"peak memory +([\d,.]+) MB", said)
    found = 1e6 * float(estimate[1].replace(",", "")) if estimate else None
    say(estimated_memory=found, ok=preflight.returncode in (0, 1) and found is not None)


def shakespeare(folder: Path, device: str, *flags: str):
    """How long a run takes to nanoGPT's published validation loss."""
    run, began = folder / "shakespeare", time.monotonic()
    more = ["--device", device, "--runs_dir", str(folder), "--name", run.name]
    process, evaluated, reached = start("train.py", *flags, *more), [], False
    while True:
        ended = process.poll() is not None  # before the look, so that none is missed
        entries = records(run)
        places = [i for i, entry in enumerate(entries) if "loss/val" in entry]
        for place in places[len(evaluated) :]:
            entry, so_far = entries[place], summary(entries[: place + 1])
            evaluated.append([entry["step"], entry["loss/val"]])
            say(evaluated=evaluated, seconds_of_all=so_far["seconds"])
            if entry["loss/val"] <= PUBLISHED and not reached:
                reached = True
                passed = time.monotonic() - began
                say(
                    step=entry["step"], seconds=so_far["seconds"],
                    seconds_since_the_start_of_the_process=passed,
                )  # fmt: skip
        if ended:
            break
        time.sleep(0.05)
    finish(process)
    say(best=min(loss for _, loss in evaluated), reached=reached)


CHECKS = {
    "losses": losses, "full": full, "stop": stop, "train": train, "shakespeare": shakespeare,
}  # fmt: skip


def main() -> int:
    name, folder, device, *flags = sys.argv[1:] if len(sys.argv) > 3 else ["", "", ""]
    if name not in CHECKS:
        raise UserError(
            f"{name or 'no arguments'}: give one of {', '.join(CHECKS)}, FOLDER, DEVICE"
        )
    try:
        CHECKS[name](Path(folder), device, *flags)
    except Failed as error:
        print(f"benchmarks.gpu.checks: {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.gpu.checks", main))
