"""Trains the same model in every engine, side by side, and writes a report.

python compare.py                                      microGPT in every engine, then mini.toml in
                                                       NumPy and PyTorch: about a minute
python compare.py --engines numpy torch --steps 200 --config configs/lite.toml --data.path my_pairs
python compare.py --help

Same weights, same documents in the same order, no dropout; each engine in a process of its own, so
that its time and its memory are its own. The report is in runs/compare-*/report.md, with plots and
a TensorBoard run for each engine beside it.
"""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from comparison import report, sizes
from comparison.job import Job, create
from comparison.trainers import CONTROLS, LABELS
from model.config import UserError
from training import cli
from training.config import Config, load

DESCRIPTION = "Trains the same model in every engine, side by side, and writes a report."
ROOT = Path(__file__).parent
UNFUSED_STEPS = 30  # of the slowest engine; the rest is multiplied up, and the report says so
SECOND_STEPS = 100  # of mini.toml
SMALL = 20_000  # parameters up to which plain Python takes part without being asked

Engine = Literal["unfused", "python", "numpy", "torch", "compiled", "cuda", "random", "stack"]


@dataclass(frozen=True)
class Data:
    """The text, in place of the configuration's."""

    path: str = ""
    """Your own .txt, .jsonl or folder."""
    source: Literal["", "stdlib", "stdlib_words", "names", "tinyshakespeare", "nl2bash"] = ""
    """A source by name."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    engines: tuple[Engine, ...] = ()
    """Which take part; random and stack are controls with wrong gradients. Default: all that suit
    the size of the model."""
    steps: int = 0
    """Optimizer steps; 0: 1,000 of microGPT and 100 of mini.toml, or 200 of another --config."""
    config: str = ""
    """A TOML file to compare in place of the two."""
    precision: Literal["auto", "fp32", "fp64"] = "auto"
    """Plain Python always computes in fp64. auto: fp64 where it takes part, else fp32."""
    data: Data = field(default_factory=Data)
    name: str = ""
    """Of the folder in runs_dir; empty: compare- and the time."""
    runs_dir: str = "runs"
    """Where the report goes."""

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"steps = {self.steps} must be 0 (as many as suit) or more")
        if Path(self.name).name != self.name:
            raise UserError(f"name = {self.name!r} must be a folder's name, without a path")


def main() -> int:
    """Runs the comparison. Returns the exit status."""
    arguments = cli.parse(Arguments, DESCRIPTION)
    wanted = [("microgpt", 1000), ("mini", SECOND_STEPS)]
    configs = [(load(ROOT / "configs" / f"{name}.toml"), name, n) for name, n in wanted]
    if arguments.config:
        configs = [(load(Path(arguments.config)), Path(arguments.config).stem, 200)]
    folder = new_folder(arguments)
    began, parts, measured, status = time.perf_counter(), [], [], 0
    try:
        for config, name, steps in configs:
            with_data = choose_data(config, arguments.data)
            part = plan(folder / name, name, with_data, arguments.steps or steps, arguments)
            if part is not None:
                parts.append(part)
                run_engines(part)
                if any("error" in part.results.get(e, ()) for e in arguments.engines):
                    status = 1  # by default an engine that is not there is a row of the report
        if not arguments.config:
            measured = measure_sizes(arguments)
    except KeyboardInterrupt:
        print("stopped: the report has what was finished", file=sys.stderr)
        status = 130
    finish(folder, parts, measured)
    print(f"{folder / 'report.md'}: {time.perf_counter() - began:.0f} s in all")
    return status


def new_folder(arguments: Arguments) -> Path:
    """The folder of this comparison: not made yet, so that nothing is left of what is refused."""
    name = arguments.name or time.strftime("compare-%Y%m%d-%H%M%S")
    folder = Path(arguments.runs_dir) / name
    if folder.exists():
        raise UserError(f"--name {name}: {folder} exists already; choose another")
    return folder


def choose_data(config: Config, data: Data) -> Config:
    """The configuration on the data asked for."""
    if data.path:
        return replace(config, data=replace(config.data, path=data.path))
    if data.source:
        return replace(config, data=replace(config.data, source=data.source, path=""))
    return config


def plan(folder: Path, name: str, config: Config, steps: int, arguments: Arguments):
    """A part of the comparison, its job written; None where none of the engines is asked for."""
    second = not arguments.config and name == "mini"
    suited = ("numpy", "torch", "cuda") if second else tuple(LABELS)
    if not arguments.engines and not has_cuda():
        suited = tuple(engine for engine in suited if engine != "cuda")
    engines = [e for e in LABELS if e in (arguments.engines or suited)]
    if second and arguments.engines:
        engines = [e for e in engines if e in suited]
    if not engines:
        return None
    on_python = any(e in engines for e in ("unfused", "python", *CONTROLS))
    precision = arguments.precision
    if precision == "auto":
        precision = "fp64" if on_python and not second else "fp32"
    job = create(folder, name, config, steps, precision, print)
    if not arguments.engines and job.parameters > SMALL:
        engines = [e for e in engines if e in ("numpy", "torch", "cuda")]
    return report.Part(job, {engine: {} for engine in engines}, own_steps=config.max_steps)


@cache
def has_cuda() -> bool:
    """Whether PyTorch sees a GPU; asked in a process of its own, to keep this one small."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return not subprocess.run([sys.executable, "-c", code], check=False).returncode  # noqa: S603


def run_engines(part: report.Part):
    """Trains every engine of a part in turn and takes in what it found."""
    for engine in part.results:
        steps = min(part.job.steps, UNFUSED_STEPS) if engine == "unfused" else part.job.steps
        part.results[engine] = run_engine(part.job, engine, steps)


def run_engine(job: Job, engine: str, steps: int) -> dict:
    """One engine in a process of its own: its result, or {"error": one line}."""
    command = [sys.executable, "-m", "comparison.worker", str(job.folder.resolve()), engine]
    errors = job.folder / f"{engine}.log"
    with (
        open(errors, "w") as log,
        subprocess.Popen(  # noqa: S603, our own program
            [*command, str(steps)], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as worker,
        tqdm(total=steps, desc=f"{job.name:9} {engine:9}", unit="step", ncols=100) as bar,
    ):
        try:
            for line in worker.stdout:
                bar.update(1)
                bar.set_postfix_str(f"loss {float(line.split()[1]):.4f}", refresh=False)
        except BaseException:
            worker.kill()
            raise
    if worker.returncode == 0:
        return json.loads((job.folder / f"{engine}.json").read_text())
    lines = errors.read_text(errors="replace").strip().splitlines() or ["no reason given"]
    print(f"{engine}: {lines[-1][:200]} (see {errors})", file=sys.stderr)
    return {"engine": engine, "error": lines[-1][:200]}


def measure_sizes(arguments: Arguments) -> list[dict]:
    """How long untrained models of several sizes take to generate, in the three engines."""
    engines = [e for e in ("torch", "numpy", "python") if e in (arguments.engines or LABELS)]
    pairs = [(size, engine) for size in sizes.SIZES for engine in engines]
    found = []
    for size, engine in tqdm(pairs, desc="sizes", unit="model", ncols=100):
        entry = {"size": size, "engine": engine, "parameters": sizes.parameters(size)}
        if (engine, size) in sizes.LEFT_OUT:
            found.append({**entry, "skipped": sizes.LEFT_OUT[engine, size]})
            continue
        tokens = sizes.FEWER.get((engine, size), sizes.TOKENS)
        command = [sys.executable, "-m", "comparison.sizes", engine, size, str(tokens)]
        done = subprocess.run(  # noqa: S603, our own program
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            found.append(json.loads(done.stdout))
        else:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            found.append({**entry, "skipped": why})
    return found


def finish(folder: Path, parts: list[report.Part], measured: list[dict]):
    """Report, plots and TensorBoard runs of all that was finished."""
    from comparison import board, plots  # here, because they take a while to load

    for part in parts:
        for engine in [e for e, result in part.results.items() if not result]:
            del part.results[engine]  # not begun, or interrupted
    parts = [part for part in parts if part.results]
    with contextlib.suppress(BrokenPipeError):
        print("\n" + report.terminal(parts))
    try:
        plots.draw(folder, parts)
    except ImportError:
        print("no plots: matplotlib is missing; pip install -e '.[report]'", file=sys.stderr)
    board.write(folder, parts)
    report.write(folder, parts, measured)


if __name__ == "__main__":
    sys.exit(cli.run("compare.py", main))
