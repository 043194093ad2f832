"""What the benchmarks share: sides that take turns in processes of their own, tables, and JSON.

A benchmark measures each side in a new process (`in_turns`), puts what it found into a `Result`,
and ends with `result.finish()`, which prints it and writes `benchmarks/results/NAME.json`. From
these files `python -m benchmarks.report` makes docs/benchmarks.md: no figure is typed.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

from common import cli
from common.errors import UserError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "sentencepiece", "transformers")


@dataclass
class Result:
    """What a benchmark found, as docs/benchmarks.md shows it."""

    name: str
    title: str
    command: str = ""
    date: str = ""
    machine: dict = field(default_factory=dict)
    claims: list[dict] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)
    plots: list[dict] = field(default_factory=list)

    def claim(self, text: str, measured: float, bar: float, at_most: bool = False, unit: str = "x"):
        """A bar and what was measured against it: at least, or at most, `bar`."""
        met = measured <= bar if at_most else measured >= bar
        self.claims.append(
            {"claim": text, "measured": measured, "bar": bar, "at_most": at_most, "unit": unit,
             "met": met}
        )  # fmt: skip

    def table(self, title: str, columns: list[str], rows: list[list], note: str = ""):
        """Cells are strings, or numbers that are shown with three digits."""
        self.tables.append({"title": title, "columns": columns, "rows": rows, "note": note})

    def plot(self, title: str, x: str, y: str, series: dict[str, list], log: str = ""):
        """series: {name: [(x, y), ...]}. log: the axes that are logarithmic, such as "xy"."""
        points = {name: [list(point) for point in line] for name, line in series.items()}
        self.plots.append({"title": title, "x": x, "y": y, "series": points, "log": log})

    def finish(self, out: Path | None = None):
        """Prints everything, and writes it to `out`, or among the results."""
        if not self.machine:  # else it says already where, when and how it was measured
            module = f"benchmarks.{self.name}"
            self.command = shlex.join(["python", "-m", module, *map(shorter, sys.argv[1:])])
            self.date, self.machine = date.today().isoformat(), machine()
        print(text_of(asdict(self)))
        path = out or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        print(f"written to {os.path.relpath(path)}")


def shorter(argument: str) -> str:
    """A path outside the project as PATH: where something lies on this machine is nobody's."""
    inside = not os.path.isabs(argument) and not argument.startswith("..")
    return argument if inside else "PATH"


def parser(documentation: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has; a worker's own come after --side."""
    made = cli.Parser(description=documentation.splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds, help="of which medians are taken")
    made.add_argument("--json", type=Path, help="where to write, instead of benchmarks/results")
    made.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    return made


def in_turns(module: str, sides: dict[str, list], rounds: int) -> dict[str, list[dict]]:
    """What each side's worker printed, round by round: {side: one dictionary a round}."""
    found = {name: [] for name in sides}
    for number in range(rounds):
        for name, arguments in sides.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(worker(module, *arguments))
    return found


def worker(module: str, *arguments) -> dict:
    """The last line of `python -m benchmarks.MODULE --side ARGUMENTS`, a JSON object."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--side", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: S603, ours
    if done.returncode == 2:  # it has said what is wrong
        sys.exit(2)
    if done.returncode:
        raise UserError(f"{shlex.join(command[1:])} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def spread(runs: list[dict], key: str, form: str = ",.0f") -> str:
    """The least and the most of several runs, for people."""
    values = [run[key] for run in runs]
    return f"{min(values):{form}} to {max(values):{form}}"


def machine() -> dict:
    """Processor, cores, accelerator and versions."""
    found = {"processor": processor(), "cores": cores()}
    found |= {"system": platform.system(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def cores() -> int:
    """As many as this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def text_of(result: dict) -> str:
    """A result in Markdown: the machine, each table, each claim."""
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [f"## {result['title']}", "", f"`{result['command']}`, {result['date']}: {about}", ""]
    for table in result["tables"]:
        lines += [f"**{table['title']}**", ""] if table["title"] else []
        lines += [row(table["columns"]), "|---" * len(table["columns"]) + "|"]
        lines += [row(map(cell, cells)) for cells in table["rows"]] + [""]
        lines += [table["note"], ""] if table["note"] else []
    if result["claims"]:
        lines += ["| bar | measured | |", "|---|---|---|"]
    for claim in result["claims"]:
        bound = f"at {'most' if claim['at_most'] else 'least'} {claim['bar']:g} {claim['unit']}"
        measured = f"{cell(claim['measured'])} {claim['unit']}"
        met = "met" if claim["met"] else "**missed**"
        lines.append(row([f"{claim['claim']}: {bound}", measured, met]))
    return "\n".join(lines).rstrip() + "\n"


def row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def cell(value) -> str:
    """Text as it is; a number with three digits, and thousands apart."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"
