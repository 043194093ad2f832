"""What the benchmarks share: sides that take turns in processes of their own, tables, and JSON.

A benchmark measures each side in a new process (`in_turns`), puts what it found into a `Result`,
and ends with `result.finish()`, which prints it and writes `benchmarks/results/MACHINE/NAME.json`.
From these files `python -m benchmarks.report` makes docs/benchmarks.md: no figure is typed.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

from common import cli
from common.device import processor
from common.errors import UserError

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "numpy", "sentencepiece", "transformers", "ctranslate2", "llama-cpp-python",
)  # fmt: skip


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
        path = out or RESULTS / folder_of(self.machine) / f"{self.name}.json"
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
    made.add_argument(
        "--rounds", type=at_least_one, default=rounds, help="of which medians are taken"
    )
    made.add_argument("--json", type=Path, help="where to write, instead of benchmarks/results")
    made.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    return made


def at_least_one(text: str) -> int:
    """A number of rounds."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (found {number})")
    return number


def in_turns(module: str, sides: dict[str, list], rounds: int) -> dict[str, list[dict]]:
    """What each side's worker printed, round by round: {side: one dictionary a round}."""
    found = {name: [] for name in sides}
    for number in range(rounds):
        for name, arguments in sides.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(worker(module, *arguments))
    return found


def worker(module: str, *arguments, environment: dict[str, str] | None = None) -> dict:
    """The last line of `python -m benchmarks.MODULE --side ARGUMENTS`, a JSON object.

    environment: variables that are set for it.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--side", *map(str, arguments)]
    done = subprocess.run(  # noqa: S603, ours
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
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
    """Processor, instructions, cores, memory, accelerator, versions, and the commit of the code."""
    found: dict = {"processor": processor()}
    if kind := family_and_model():
        found["family and model"] = kind
    found |= {"instructions": instructions(), "cores": cores()}
    if memory := total_memory():
        found["memory"] = f"{memory / 2**30:.0f} GiB"
    found |= {"system": platform.system(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found | {"commit": commit()}


def folder_of(machine: dict) -> str:
    """The name of a machine's folder: its accelerator, or processor, instructions and cores.

    A virtual machine may call its processor no more than "AMD EPYC": the numbers of its family and
    model tell one generation from the next. Results from before they were read have none.
    """
    parts = [machine.get("accelerator")]
    if not parts[0]:
        cores = machine.get("cores", 0)
        parts = [machine.get("processor", "unknown"), machine.get("family and model", "")]
        parts.append(machine.get("instructions", ""))
        parts.append(f"{cores} {'core' if cores == 1 else 'cores'}")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, parts)).lower()).strip("-")


def family_and_model() -> str:
    """The numbers by which x86 processors are told apart, "25 17"; "" where there are none."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ""
    found = [re.search(rf"^{key}\s*: (\d+)$", text, re.M) for key in ("cpu family", "model")]
    return " ".join(match[1] for match in found if match)


def instructions() -> str:
    """The widest vector instructions that matter to a product, and its types; "" if unknown."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text("utf-8", "replace").split())
    except OSError:
        return ""
    known = {
        "amx_tile": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI",
        "avx512f": "AVX512", "avx2": "AVX2", "asimd": "NEON",
    }  # fmt: skip
    return next((name for flag, name in known.items() if flag in flags), "")


def total_memory() -> int:
    """Bytes that the machine has; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def commit() -> str:
    """Of the code that was measured; "+" after it where files had been changed."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603, ours
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def cores() -> int:
    """As many as this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


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
