"""Start-up: the first text of generate.py and the first step of train.py, timed from outside.

    python -m benchmarks.start_up

A model of configs/default.toml, trained for a few steps into a temporary folder, writes freely, its
output read from a pipe as it comes. Everything has been read once before, so the disk is warm. What
loading PyTorch alone takes stands beside it; what is loaded is from `python -X importtime`.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, Result, in_turns, median, parser, spread
from common import cli
from common.errors import UserError

BAR = 2.5  # seconds
LARGEST = 10
PACKAGES = ("torch", "torch._dynamo", "sympy", "numpy", "tensorboard", "pydantic", "tyro")
SIDES = {
    "import torch": "torch",
    "generate.py": "generate torch",
    "generate.py --engine numpy": "generate numpy",
    "generate.py --engine python": "generate python",
    "train.py": "train",
}


def train_flags(folder: Path, name: str, steps: int) -> list[str]:
    """A run of the default configuration; its evaluations are kept small."""
    flags = {"max_steps": steps, "runs_dir": folder / "runs", "name": name}
    flags |= {"data.cache_dir": folder / "cache", "train.log_interval": 1, "train.eval_interval": 0}
    return [
        "train.py",
        *(str(part) for key, value in flags.items() for part in (f"--{key}", value)),
    ]


def generate_flags(folder: Path, engine: str) -> list[str]:
    flags = ["--checkpoint", folder / "runs" / "model", "--prompt", "Return the absolute path."]
    return ["generate.py", *map(str, flags), "--engine", engine, "--max_new_tokens", "16"]


def first_bytes(arguments: list[str]) -> dict[str, float]:
    """Seconds from starting Python to the first byte of stderr and of stdout, and to the end."""
    began = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603, ours
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None and process.stdout is not None  # pipes
    found = {}
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stderr, selectors.EVENT_READ, "line")
        waiting.register(process.stdout, selectors.EVENT_READ, "text")
        while waiting.get_map():
            for key, _ in waiting.select():
                if os.read(key.fd, 1 << 16):
                    found.setdefault(key.data, time.perf_counter() - began)
                else:
                    waiting.unregister(key.fileobj)
    if process.wait():
        raise UserError(f"{' '.join(arguments)} failed with status {process.returncode}")
    return {**found, "end": time.perf_counter() - began}


def first_step(folder: Path) -> dict[str, float]:
    """Seconds from starting train.py to the first entry of its log, after step 1."""
    name = f"run-{time.monotonic_ns()}"
    log = folder / "runs" / name / "metrics.jsonl"
    began = time.perf_counter()
    command = [sys.executable, *train_flags(folder, name, 1)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603, ours
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    if process.wait():
        raise UserError(f"train.py failed with status {process.returncode}")
    return {"text": seconds, "end": time.perf_counter() - began}


def measure(what: str, folder: str, engine: str = "torch"):
    """Prints one side's times."""
    if what == "torch":
        found = first_bytes(["-c", "import torch; print(torch.__version__)"])
    elif what == "train":
        found = first_step(Path(folder))
    else:
        found = first_bytes(generate_flags(Path(folder), engine))
    print(json.dumps(found))


def imports(arguments: list[str]) -> tuple[list[tuple[str, float]], list[int]]:
    """Modules with their own milliseconds, the slowest first; how many of each of PACKAGES."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603, ours
    rows = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    times = [
        (name.strip(), int(own.split(":")[1]) / 1000)
        for own, _, name in rows
        if own.split(":")[1].strip().isdigit()
    ]
    counts = [sum(f"{n}.".startswith(f"{package}.") for n, _ in times) for package in PACKAGES]
    return sorted(times, key=lambda pair: -pair[1]), counts


def loaded(result: Result, folder: Path):
    """The tables of what is imported."""
    programs = {
        "import torch": ["-c", "import torch"],
        "generate.py": generate_flags(folder, "torch"),
        "train.py": train_flags(folder, "imports", 1),
    }
    found = {name: imports(arguments) for name, arguments in programs.items()}
    slowest = found["generate.py"][0][:LARGEST]
    columns = ["module", "milliseconds of its own"]
    result.table("generate.py: the slowest imports", columns, [[n, ms] for n, ms in slowest])
    rows = [[name, len(times), *counts] for name, (times, counts) in found.items()]
    note = (
        "torch counts its compiler, torch._dynamo, too: PyTorch's optimizers load it, and sympy "
        "with it, when the first one is made."
    )
    result.table("Modules loaded", ["program", "all", *PACKAGES], rows, note)


def main():
    options = parser(__doc__)
    arguments = options.parse_args()
    if arguments.side:
        return measure(*arguments.side)
    result = Result("start_up", "Start-up and first token")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *train_flags(Path(folder), "model", 20)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # noqa: S603, ours
        sides = {name: [side.split()[0], folder, *side.split()[1:]] for name, side in SIDES.items()}
        in_turns("start_up", sides, 1)  # so that the disk is warm
        found = in_turns("start_up", sides, arguments.rounds)
        rows = [
            [
                name,
                median(runs, "line") if "line" in runs[0] else "",
                median(runs, "text"),
                spread(runs, "text", ".2f"),
                median(runs, "end"),
            ]
            for name, runs in found.items()
        ]
        columns = ["program", "first line, s", "first text or step, s", "range", "end, s"]
        result.table("From the start of the process", columns, rows)
        first = median(found["generate.py"], "text")
        result.claim("generate.py: first token", first, BAR, at_most=True, unit="s")
        loaded(result, Path(folder))
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.start_up", main))
