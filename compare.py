"""Trains the same model in every engine, side by side, and writes a report.

python compare.py                                      microGPT in every engine, then mini.toml in
                                                       NumPy and PyTorch: about 80 seconds
python compare.py --engines numpy torch --steps 200 --config configs/lite.toml --data.path my_pairs
python compare.py --help

Same weights, same documents in the same order, no dropout; each engine in a process of its own, so
that its time and its memory are its own. The report is in runs/compare-*/report.md, with plots and
a TensorBoard run for each engine beside it.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from common import cli
from common.errors import UserError
from common.files import refuse_url, user_path
from common.signals import listen
from comparison import generation_speed, report
from comparison.job import Job, create
from comparison.results import JobResults
from comparison.trainers import BUILT_ON, LABELS
from data.sources.kinds import is_plain
from training.config import Config, load
from training.run_folder import check_run_name

DESCRIPTION = "Trains the same model in every engine, side by side, and writes a report."
ROOT = Path(__file__).parent
UNFUSED_STEPS = 30  # of the slowest engine; the rest is multiplied up, and the report says so
SECOND_STEPS = 100  # of mini.toml
SMALL = 20_000  # weights in the layers, up to which plain Python takes part without being asked
CONFIGS = ROOT / "configs"

Engine = Literal["unfused", "python", "numpy", "torch", "compiled", "cuda", "random", "stack"]


@dataclass(frozen=True)
class Data:
    """Text to train on instead of the configuration's."""

    path: str = ""
    """Your own file, folder or pattern."""
    source: Literal["", "stdlib", "stdlib_words", "names", "tinyshakespeare", "nl2bash"] = ""
    """A built-in source."""
    kind: Literal["auto", "stream", "lines", "documents", "pairs"] = "auto"
    """How path is read; auto: text as the configuration says, else by content."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    engines: tuple[Engine, ...] = ()
    """Engines to compare; random, stack: wrong gradients as controls. Default: by model size."""
    steps: int = 0
    """Optimizer steps; 0: 1,000 with microgpt.toml and 100 with mini.toml, 200 with --config."""
    config: str = ""
    """A TOML file to use instead of configs/microgpt.toml and mini.toml."""
    precision: Literal["auto", "fp32", "fp64"] = "auto"
    """auto: fp64 if plain Python (always fp64) takes part, else fp32."""
    data: Data = field(default_factory=Data)
    name: str = ""
    """Name of the report's folder in runs_dir; empty: compare- and the time."""
    runs_dir: str = "runs"
    """Folder for the report's folder."""

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"steps = {self.steps} must be 0 (default number) or more")
        if self.name:
            check_run_name(self.name)


def main() -> int:
    """Runs the comparison. Returns the exit status."""
    arguments = cli.parse(Arguments, DESCRIPTION)
    folder = new_folder(arguments)
    if arguments.config:
        refuse_url(arguments.config, f"--config {arguments.config}")
        wanted = {user_path(arguments.config): 200}
    else:
        wanted = {CONFIGS / "microgpt.toml": 1000, CONFIGS / "mini.toml": SECOND_STEPS}
    configs = [(file.stem, load(file), steps) for file, steps in wanted.items()]
    began, parts, measured, status = time.perf_counter(), [], [], 0
    try:
        for name, config, steps in configs:
            config = choose_data(config, arguments.data)
            engines = choose_engines(config, arguments.engines, bool(arguments.config))
            if engines:
                steps = arguments.steps or steps
                parts.append(plan(folder / name, config, steps, engines, arguments.precision))
                run_engines(parts[-1])
        if not arguments.config:
            measure_sizes(arguments.engines, measured)
    except KeyboardInterrupt:
        print("stopped: the report has what had finished", file=sys.stderr)
        status = 130
    finally:  # whatever happened, what was measured is not lost
        listen(signal.SIG_IGN)
        finish(folder, parts, measured)
    if not parts:  # stopped before anything was trained
        return status
    print(f"{folder / 'report.md'}: {time.perf_counter() - began:.0f} s in all")
    results = [pair for part in parts for pair in part.results.items()]
    failed = [engine for engine, result in results if "error" in result]
    return status or int(any(e in arguments.engines for e in failed) or len(failed) == len(results))


def new_folder(arguments: Arguments) -> Path:
    """The folder of this comparison: not made yet, so that nothing is left of what is refused."""
    name = arguments.name or time.strftime("compare-%Y%m%d-%H%M%S")
    folder = user_path(arguments.runs_dir) / name
    if folder.exists():
        raise UserError(f"--name {name}: {folder} exists already; choose another name")
    return folder


def choose_data(config: Config, data: Data) -> Config:
    """The configuration on the data asked for; what is no plain text is of the kind that it is."""
    if not data.path and not data.source:
        return config
    kind = data.kind
    if kind == "auto" and is_plain(data.path):
        kind = config.data.kind
    source = data.source or config.data.source
    return replace(config, data=replace(config.data, path=data.path, source=source, kind=kind))


def plan(
    folder: Path, config: Config, steps: int, engines: list[str], precision: str
) -> JobResults:
    """A part of the comparison: its job written, and no results yet."""
    if precision == "auto":
        precision = "fp64" if any(BUILT_ON[e] == "python" for e in engines) else "fp32"
    job = create(folder, folder.name, config, steps, precision, print)
    return JobResults(job, {engine: {} for engine in engines}, own_steps=config.max_steps)


def choose_engines(config: Config, asked: tuple[str, ...], everything: bool) -> list[str]:
    """The engines that train a configuration, in the order of LABELS.

    everything: those that are asked for may be any; else plain Python is left out of large models.
    """
    shape = config.model
    weights = shape.n_layers * (4 * shape.d_model**2 + 2 * shape.d_model * shape.d_ff)
    suited = [e for e in LABELS if weights <= SMALL or e in ("numpy", "torch", "cuda")]
    if asked:
        return [e for e in LABELS if e in asked and (everything or e in suited)]
    return [e for e in suited if e != "cuda" or has_cuda()]


@cache
def has_cuda() -> bool:
    """Whether PyTorch sees a GPU; asked in a process of its own, to keep this one small."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    command = [sys.executable, "-c", code]
    asked = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)  # noqa: S603, our own program
    return asked.returncode == 0


def run_engines(part: JobResults):
    """Trains every engine of a part in turn and takes in what it found."""
    for engine in part.results:
        part.results[engine] = {"engine": engine, "error": "stopped before it was done"}
        steps = min(part.job.steps, UNFUSED_STEPS) if engine == "unfused" else part.job.steps
        part.results[engine] = run_engine(part.job, engine, steps)


def run_engine(job: Job, engine: str, steps: int) -> dict:
    """One engine in a process of its own: its result, or {"error": one line}."""
    command = [sys.executable, "-m", "comparison.worker", str(job.folder.resolve()), engine]
    errors = job.folder / f"{engine}.log"
    with (
        tempfile.TemporaryDirectory() as cache,  # empty, so that compiling takes what it takes
        open(errors, "w") as log,
        subprocess.Popen(  # noqa: S603, our own program
            [*command, str(steps)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        ) as worker,
        tqdm(total=steps, desc=f"{job.name:9} {engine:9}", unit="step", ncols=100) as bar,
    ):
        assert worker.stdout is not None  # a pipe
        try:
            for line in worker.stdout:
                bar.update(1)
                bar.set_postfix_str(f"loss {float(line.split()[1]):.4f}", refresh=False)
        except BaseException:
            worker.kill()
            raise
    if worker.returncode == 0:
        return json.loads((job.folder / f"{engine}.json").read_text())
    why = f"exit status {worker.returncode}"
    if worker.returncode < 0:
        why = f"killed by signal {-worker.returncode}: out of memory?"
    why = (errors.read_text(errors="replace").strip().splitlines() or [why])[-1][:200]
    print(f"{engine}: {why} (see {errors})", file=sys.stderr)
    return {"engine": engine, "error": why}


def measure_sizes(asked: tuple[str, ...], found: list[dict]):
    """Adds to `found` how long untrained models of several sizes take to generate."""
    engines = [e for e in ("torch", "numpy", "python") if e in (asked or LABELS)]
    pairs = [(size, engine) for size in generation_speed.SIZES for engine in engines]
    for size, engine in tqdm(pairs, desc="sizes", unit="model", ncols=100):
        entry = {
            "size": size,
            "engine": engine,
            "parameters": generation_speed.shape(size).num_parameters(),
        }
        if (engine, size) in generation_speed.LEFT_OUT:
            found.append({**entry, "skipped": generation_speed.LEFT_OUT[engine, size]})
            continue
        tokens = generation_speed.FEWER.get((engine, size), generation_speed.TOKENS)
        command = [sys.executable, "-m", "comparison.generation_speed", engine, size, str(tokens)]
        done = subprocess.run(  # noqa: S603, our own program
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found.append(json.loads(done.stdout))
        else:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            found.append({**entry, "skipped": why})


def finish(folder: Path, parts: list[JobResults], measured: list[dict]):
    """Report, plots and TensorBoard runs of all that was finished."""
    from comparison import plots, tensorboard  # here, because they take a while to load

    for part in parts:
        for engine, result in part.results.items():
            part.results[engine] = result or {"engine": engine, "error": "stopped before it began"}
    if not parts:
        return
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have renamed or removed it meanwhile
    try:
        plots.draw(folder, parts)
    except ImportError:
        print(
            "no plots: matplotlib is not installed; run pip install -e '.[report]'", file=sys.stderr
        )
    except Exception as error:  # the report is worth more than its pictures
        print(f"no plots: {error}", file=sys.stderr)
    try:
        tensorboard.write(folder, parts)
    except Exception as error:
        print(f"no TensorBoard files: {error}", file=sys.stderr)
    report.write(folder, parts, measured)
    with contextlib.suppress(BrokenPipeError):
        print("\n" + report.terminal(parts))


if __name__ == "__main__":
    sys.exit(cli.run("compare.py", main))
