"""One curve on any number of processes: every loss and every weight, to the bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.reader import Checkpoint, list_steps
from tests.helpers import ROOT, TEXT, metrics, write_config

FILES = ("model.safetensors", "optimizer.safetensors")
BOTH = ["--optimizer.name", "muon", "--optimizer.muon_lr", "0.02"]
ROWS = {  # 8 micro-batches a step, dropout everywhere; each has a short last batch in its epochs
    "stream": [],
    "bf16": ["--precision", "bf16", *BOTH],
    "pairs": ["--data.path", "pairs.jsonl", *BOTH],
    "lines": ["--data.path", "lines.txt", "--data.kind", "lines", "--precision", "bf16"],
    "checkpointed": ["--train.checkpoint_activations", "--train.batch_size", "21"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data of all rows."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    words = TEXT.read_text("utf-8").split()
    # 37 examples: in an epoch's last batch two processes of four have no micro-batch
    pairs = [(" ".join(words[i : i + 3]), words[i + 3]) for i in range(0, 4 * 41, 4)]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "lines.txt").write_text("\n".join(" ".join(pair) for pair in pairs), "utf-8")
    return folder


def start(folder: Path, processes: int, runs: list[list[str]]) -> str:
    """Runs command lines of train.py on several processes. Returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "tests.distributed.worker", json.dumps(runs)]
    started = [
        subprocess.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    for rank, text in enumerate(said):
        assert f"statuses: {json.dumps([0] * len(runs))}" in text, f"rank {rank}: {text}"
        assert rank == 0 or len(text.splitlines()) == 1, f"rank {rank} speaks: {text}"
    return said[0]


def flags(name: str, *more: str) -> list[str]:
    return ["--config", "tiny.toml", "--train.accumulation_steps", "8", "--name", name, *more]


def curve(run: Path) -> list[dict]:
    """What a run has logged, without what depends on the clock or the machine."""
    clock = ("speed/", "time/", "memory/")
    return [
        {key: value for key, value in record.items() if not key.startswith(clock)}
        for record in metrics(run)
    ]


def check_equal(one: Path, other: Path):
    """Both runs have logged the same, and end in the same weights and optimizer state."""
    assert curve(one) == curve(other)
    last, last_other = (Checkpoint(list_steps(run)[-1]) for run in (one, other))
    for file in FILES:
        assert last.read(file) == last_other.read(file), file


@pytest.fixture(scope="module")
def runs(home):
    """All rows on one, two and four processes, and one stopped and resumed on other numbers."""
    for count in (1, 2, 4):
        rows = [flags(f"{row}-{count}", *more) for row, more in ROWS.items()]
        if count == 2:
            rows.append(flags("moved", "--max_steps", "25", "--optimizer.schedule_steps", "40"))
        if count == 4:  # from two to four processes, and then to one
            rows.append(["--resume", "runs/moved", "--max_steps", "31"])
        start(home, count, rows)
    start(home, 1, [["--resume", "runs/moved", "--max_steps", "40"]])
    return home / "runs"


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("row", ROWS)
def test_equal_to_the_bit(runs, row, count):
    check_equal(runs / f"{row}-1", runs / f"{row}-{count}")


def test_the_rows_are_what_they_say(runs):
    last = [curve(runs / f"{row}-1")[-1]["loss/val"] for row in ROWS]
    assert len(set(last)) == len(ROWS)
    for row in ROWS:
        assert len(curve(runs / f"{row}-4")) >= 42, "a step is not logged"


def test_resumed_on_other_numbers_of_processes(runs):
    straight, moved = curve(runs / "stream-1"), curve(runs / "moved")
    by_step = {record["step"]: record for record in straight if "loss/train" in record}
    for record in moved:
        if "loss/train" in record:
            assert record == by_step[record["step"]]
    ends = [Checkpoint(list_steps(runs / name)[-1]) for name in ("stream-1", "moved")]
    for file in FILES:
        assert ends[0].read(file) == ends[1].read(file), file
