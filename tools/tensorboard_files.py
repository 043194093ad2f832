"""Compares TensorBoard's files with `metrics.jsonl`, and rebuilds them.

python -m tools.tensorboard_files check RUN      whether TensorBoard shows what it holds
python -m tools.tensorboard_files rebuild RUN    makes it so; the old files are renamed
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from pathlib import Path

from checkpoint.reader import place
from common import cli
from common.errors import UserError
from common.jsonl import read_records
from training.run_folder import refuse_if_busy
from training.tensorboard_files import find_difference, rebuild, recorded_points


def main() -> int:
    parser = cli.Parser(
        prog="python -m tools.tensorboard_files",
        description="Compares TensorBoard's files with metrics.jsonl, or rebuilds them from it.",
    )
    parser.add_argument("command", choices=("check", "rebuild"))
    parser.add_argument("run", type=Path, help="folder of a run")
    options = parser.parse_args()
    run = place(options.run)
    file, folder = run / "metrics.jsonl", run / "tensorboard"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the folder of a run, such as runs/NAME")
    records = read_records(file)
    wrong = find_difference(folder, records)
    if not wrong:
        print(
            f"{folder}: all {len(recorded_points(records)):,} points of metrics.jsonl, none twice"
        )
        return 0
    print(f"{folder}: {wrong}")
    if options.command == "check":
        return 1
    refuse_if_busy(run)
    for path in rebuild(folder, records):
        print(f"old file renamed to {path}")
    print(f"{folder}: rebuilt with all {len(recorded_points(records)):,} points of metrics.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m tools.tensorboard_files", main))
