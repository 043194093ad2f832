"""1,000 microGPT steps, whole processes: the engines beside a floor and beside the reference.

    python -m benchmarks.microgpt --names names.txt --straight_line PATH --reference PATH

names: one name a line. straight_line: a program without any framework that takes the names and the
number of steps, the floor of what NumPy can do. reference: a faithful copy of Karpathy's
microgpt.py, of which the first 100 steps are timed and multiplied by ten. Rounds alternate; what is
printed is the median, the range, the peak of resident memory, and the ratios.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import cli

EXAMPLE = Path(__file__).parent.parent / "examples" / "microgpt.py"
REFERENCE_STEPS = 100


def whole(command: list[str]) -> tuple[float, int, str]:
    """Seconds from start to end of a process, its peak memory in bytes, and its output."""
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)  # noqa: S603, what the user named
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return seconds, usage.ru_maxrss * unit, output.read()


def reference(script: Path, names: Path) -> float:
    """Seconds of the reference's first 100 steps."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(names, Path(folder) / "input.txt")  # where it looks for them
        command = [sys.executable, "-u", str(script.resolve())]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:  # noqa: S603, ours
            assert process.stdout is not None  # a pipe
            said, began = b"", None
            while f"step {REFERENCE_STEPS:4d} /".encode() not in said:
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise SystemExit(f"{script}: ended before step {REFERENCE_STEPS}")
                said += piece
                if began is None and b"num params" in said:
                    began = time.perf_counter()
            process.kill()
            assert began is not None  # it tells its size before the first step
            return time.perf_counter() - began


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--straight_line", type=Path, help="the floor's program")
    parser.add_argument("--reference", type=Path, help="a copy of microgpt.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    names = str(arguments.names)
    ours = [sys.executable, str(EXAMPLE), "--names", names, "--samples", "0"]
    sides = {
        "numpy engine": [*ours, "--engine", "numpy"],
        "python engine": [*ours, "--unfused_steps", "0"],
    }
    if arguments.straight_line:
        sides["straight line"] = [sys.executable, str(arguments.straight_line), names]
    found = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, command in sides.items():
            found[name].append(whole(command))
    seconds = {name: statistics.median(run[0] for run in runs) for name, runs in found.items()}
    print(
        f"Python {platform.python_version()}, {platform.machine()}, medians of {arguments.rounds}"
    )
    if arguments.reference:
        rounds = [reference(arguments.reference, arguments.names) for _ in range(3)]
        seconds["reference"] = statistics.median(rounds) * 1000 / REFERENCE_STEPS
        print(f"reference      {seconds['reference']:8.2f} s  (10 times its first 100 steps)")
    for name, runs in found.items():
        line = f"{name:14} {seconds[name]:8.3f} s  "
        line += f"({min(r[0] for r in runs):.3f} to {max(r[0] for r in runs):.3f}) "
        line += f"{max(r[1] for r in runs) / 1e6:6.1f} MB"
        if "straight line" in seconds:
            line += f"  {seconds[name] / seconds['straight line']:6.2f} x the straight line's time"
        if "reference" in seconds:
            line += f"  {seconds['reference'] / seconds[name]:5.0f} x as fast as the reference"
        print(line)
        last = [text for text in runs[-1][2].splitlines() if text.startswith("step 1000")]
        print(f"{'':14} {last[0] if last else ''}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds}, indent=1))


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.microgpt", main))
