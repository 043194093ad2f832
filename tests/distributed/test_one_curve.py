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
SHORT = ["--max_steps", "16", "--train.eval_interval", "8"]
ROWS = {  # 8 micro-batches a step, dropout everywhere; each has a short last batch in its epochs
    "stream": [],
    "bf16": ["--precision", "bf16", *BOTH, *SHORT],
    "pairs": ["--data.path", "pairs.jsonl", *BOTH, *SHORT],
    "lines": ["--data.path", "lines.txt", "--data.kind", "lines", "--precision", "bf16", *SHORT],
    "checkpointed": ["--train.checkpoint_activations", "--train.batch_size", "21", *SHORT],
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


def launch(folders: list[Path], runs: list[list[str]]) -> list[str]:
    """Runs command lines of train.py on several processes. Returns what each prints.

    folders: where each process runs; those in another than the first's are of another host.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1"}
    together |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = []
    for rank, folder in enumerate(folders):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank - folders.index(folder))}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", json.dumps(runs)],
            cwd=folder,
            env={**os.environ, **together, **who},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        started.append(process)
    said = [process.communicate(timeout=240)[0] for process in started]
    # a run that fails ends its process
    failed = [f"exit status: {p.returncode}\n" if p.returncode else "" for p in started]
    return [text + status for text, status in zip(said, failed, strict=True)]


def start(folder: Path, processes: int, runs: list[list[str]]):
    """The same where all goes well."""
    said = launch([folder] * processes, runs)
    for rank, text in enumerate(said):
        assert f"statuses: {json.dumps([0] * len(runs))}" in text, f"rank {rank}: {text}"
        assert rank == 0 or len(text.splitlines()) == 1, f"rank {rank} speaks: {text}"


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
    for row, more in ROWS.items():
        steps = 16 if "--max_steps" in more else 40
        assert len(curve(runs / f"{row}-4")) >= steps + 2, "a step is not logged"


def test_resumed_on_other_numbers_of_processes(runs):
    straight, moved = curve(runs / "stream-1"), curve(runs / "moved")
    by_step = {record["step"]: record for record in straight if "loss/train" in record}
    for record in moved:
        if "loss/train" in record:
            assert record == by_step[record["step"]]
    ends = [Checkpoint(list_steps(runs / name)[-1]) for name in ("stream-1", "moved")]
    for file in FILES:
        assert ends[0].read(file) == ends[1].read(file), file


def test_another_hosts_files_must_be_the_same(runs, home, tmp_path):
    """Its data, and the run that is continued."""
    for name in ("pairs.jsonl", "lines.txt"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    write_config(tmp_path, Path("pairs.jsonl"))
    pairs = home / "here" / "pairs.jsonl"
    pairs.parent.mkdir()
    write_config(pairs.parent, Path("pairs.jsonl"))
    pairs.write_text(
        (home / "pairs.jsonl").read_text("utf-8") + '\n{"prompt": "a", "completion": "b"}'
    )
    told = "".join(launch([pairs.parent, tmp_path], [flags("differs")]))
    assert told.count("train.py: ") == 1, told
    assert "train.py: rank 1 of 2: data.path: the data or its tokenizer differs" in told

    longer = ["--resume", "runs/moved", "--extend", "--max_steps", "50"]
    told = "".join(launch([home, tmp_path], [longer]))
    assert told.count("train.py: ") == 1, told
    assert "train.py: rank 1 of 2: runs/moved/checkpoints/step_00000040: not whole here" in told


def test_a_loss_that_is_not_finite_stops_all(home):
    """The dump has the micro-batches of all processes."""
    more = ["--optimizer.lr", "1e30", "--optimizer.grad_clip", "0", "--optimizer.warmup_steps", "0"]
    said = launch([home] * 2, [flags("nan", *more)])
    assert all("exit status: 1" in text for text in said), said
    assert "".join(said).count("stopped before the update") == 1
    (dump,) = (home / "runs/nan").glob("nonfinite_step_*")
    assert "7/ids" in Checkpoint(dump).verify().tensors("batch.safetensors")
