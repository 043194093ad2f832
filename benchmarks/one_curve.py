"""Whether a run is the same on 1, 2, 4 and 8 processes, to the bit: every loss, every weight.

    python -m benchmarks.one_curve                        some ten minutes on two cores
    python -m benchmarks.one_curve --counts 1 2 --rows stream

Each row is a kind of run, 40 steps of 8 micro-batches with dropout, and each start is one of
torchrun's. "killed" is killed with all its processes at step 14 on two processes, resumed and
killed on four, and resumed on one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import ROOT, Result, parser
from common import cli
from common.errors import UserError
from tools.verify_resume import compare

STEPS = 40
COUNTS = (1, 2, 4, 8)
MUON = ["--optimizer.name", "muon", "--optimizer.muon_lr", "0.02"]
PAIRS = ["--data.path", "pairs.jsonl"]
LINES = ["--data.path", "lines.txt", "--data.kind", "lines"]
ROWS = {  # each epoch ends in a short batch, and that of 37 pairs leaves processes without any
    "stream, fp32, AdamW": [],
    "stream, fp32, Muon": MUON,
    "stream, bf16, AdamW": ["--precision", "bf16"],
    "stream, bf16, Muon": ["--precision", "bf16", *MUON],
    "pairs, fp32, AdamW": PAIRS,
    "pairs, bf16, Muon": [*PAIRS, "--precision", "bf16", *MUON],
    "lines, fp32, Muon": [*LINES, *MUON],
    "stream, activation checkpointing": ["--train.checkpoint_activations"],
}
SETTINGS = f"""
max_steps = {STEPS}
device = "cpu"
precision = "fp32"
[model]
d_model = 64
n_heads = 4
n_layers = 2
d_ff = 128
max_len = 32
dropout = 0.1
[data]
path = "text.txt"
tokenizer = "char"
cache_dir = "cache"
[optimizer]
warmup_steps = 5
[train]
batch_size = 8
accumulation_steps = 8
eval_interval = 10
log_interval = 1
threads = 1
[sample]
max_new_tokens = 8
"""


def prepare(folder: Path):
    """The configuration and the data of all rows."""
    text = (ROOT / "tests" / "text.txt").read_text("utf-8")
    words = text.split()
    pairs = [(" ".join(words[i : i + 3]), words[i + 3]) for i in range(0, 4 * 41, 4)]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs]
    (folder / "settings.toml").write_text(SETTINGS, "utf-8")
    (folder / "text.txt").write_text(text, "utf-8")
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "lines.txt").write_text("\n".join(" ".join(pair) for pair in pairs), "utf-8")


def train(folder: Path, count: int, flags: list[str], kill_after: str = "") -> Path:
    """A run on `count` processes. Killed with all of them when it says that it saved that step."""
    name = flags[flags.index("--name") + 1]
    print(f"{name}, {count} processes", file=sys.stderr, flush=True)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    with open(folder / "stderr.txt", "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(  # noqa: S603, ours
            [sys.executable, "-m", *launcher, str(ROOT / "train.py"), *flags],
            cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None  # a pipe
        for line in process.stdout:
            if kill_after and f"saved runs/{name}/checkpoints/step_{kill_after}" in line:
                kill_all(process.pid)
        status = process.wait()
        errors.seek(0)
        if status and not kill_after:
            raise UserError(f"--counts {count}: train.py failed: {errors.read()[-2000:]}")
    return folder / "runs" / name


def kill_all(launcher: int):
    """SIGKILL for a launcher and the processes that it has started, as a machine's failure is."""
    command = ["ps", "-o", "pid=", "--ppid", str(launcher)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603, ours
    for pid in [launcher, *map(int, listed.stdout.split())]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def outcome(one: Path, other: Path) -> str:
    """What was equal, or the first difference."""
    found = compare(one, other, STEPS)
    return found.difference or f"equal: {found.losses} losses, {found.tensors} tensors"


def main():
    options = parser(__doc__, rounds=1)
    options.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    options.add_argument("--rows", nargs="+", default=[], help="those whose name has such a word")
    arguments = options.parse_args()
    rows = {
        name: flags
        for name, flags in ROWS.items()
        if not arguments.rows or any(word in name for word in arguments.rows)
    }
    table, wrong, compared = [], 0, 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        for number, (row, flags) in enumerate(rows.items()):
            common = ["--config", "settings.toml", *flags]
            runs = {
                count: train(folder, count, [*common, "--name", f"run{number}-{count}"])
                for count in arguments.counts
            }
            first, *others = runs.values()
            found = [outcome(first, other) for other in others]
            name = f"run{number}-killed"
            often = ["--name", name, "--train.save_interval", "7", "--resume", "auto"]
            train(folder, 2, [*common, *often], kill_after="00000014")
            train(folder, 4, [*common, *often], kill_after="00000028")
            found.append(outcome(first, train(folder, 1, [*common, *often])))
            table.append([row, *found])
            compared += len(found)
            wrong += sum(not text.startswith("equal") for text in found)
    result = Result("one_curve", "One curve on any number of processes")
    result.table(
        f"{STEPS} steps of 8 micro-batches against one process, Gloo, a thread a process",
        [
            "",
            *(f"{count} processes" for count in arguments.counts[1:]),
            "killed on 2, 4; ends on 1",
        ],
        table,
    )
    result.claim(f"of {compared} runs, those that differ in a bit", wrong, 0, at_most=True, unit="")
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.one_curve", main))
