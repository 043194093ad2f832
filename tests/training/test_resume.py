"""training/resume.py, run_folder.py, checkpointer.py: whose a run's folder is, and what stays."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint.reader import Checkpoint, list_steps, read_best, step_path
from checkpoint.run_data import there_or_here
from common.cli import explain_error
from common.errors import UserError
from common.jsonl import parse_record, read_records
from data.sources.paths import find_files
from data.sources.remote import Store
from tests.helpers import ROOT, command, losses, metrics, refused, run, write_config
from training.resume import find_resume
from training.run_folder import is_free, locked
from training.tensorboard_files import find_difference

FLAGS = ["--config", "tiny.toml"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the configuration, the cache and a whole run called `straight`."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    flags = [*FLAGS, "--name", "straight", "--train.histogram_interval", 10]
    assert run("train.py", *flags, cwd=folder).returncode == 0
    return folder


@pytest.mark.parametrize(
    "theirs",
    ["checkpoints/model.pt", "checkpoints/keep_this/x", "tensorboard/notes.txt", "a.jpg",
     "config.json", "checkpoints/damaged_step_00000007_0/state.json"],
)  # fmt: skip
def test_nothing_of_somebody_elses_is_touched(home, theirs):
    folder = home / "runs" / "theirs"
    file = folder / theirs
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert "theirs" in refused(run("train.py", *FLAGS, "--name", "theirs", cwd=home))
    assert [path for path in folder.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"
    shutil.rmtree(folder)


def test_a_run_that_never_saved_is_free_and_its_log_is_kept(home):
    folder = home / "runs" / "begun"
    (folder / "checkpoints" / ".step_00000000").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/train": 2.0}\n')
    assert is_free(folder)
    result = run("train.py", *FLAGS, "--name", "begun", "--max_steps", 2, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "2.0" in (folder / "earlier_metrics.jsonl_0").read_text()
    assert {step for _, step in losses(folder)} == {1, 2}
    assert not is_free(folder)


def test_a_damaged_best_json_costs_no_checkpoint(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "best")
    folder = home / "runs" / "best"
    best = read_best(folder)
    file = folder / "checkpoints" / "best.json"
    file.write_bytes(file.read_bytes().replace(b'"step": ', b'"step": 1'))
    flags = ["--resume", "--name", "best", "--extend", "--max_steps", 46]
    result = run("train.py", *flags, "--train.keep", 1, "--train.save_interval", 1, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "best.json: damaged; rewriting it" in result.stdout
    assert step_path(folder, best["step"]).is_dir()
    assert read_best(folder)["val_loss"] <= best["val_loss"]


def test_a_resume_that_another_has_overtaken_is_refused(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "overtaken")
    folder = home / "runs" / "overtaken"
    shutil.rmtree(step_path(folder, 40))
    _, checkpoint, _ = find_resume(home / "runs", str(folder), "", print)
    shutil.copytree(step_path(home / "runs" / "straight", 40), step_path(folder, 40))
    with (
        pytest.raises(UserError, match="another process has continued this run"),
        locked(folder, checkpoint),
    ):
        pass
    assert len(list_steps(folder)) == 3


def test_curves_beyond_float32_and_a_lost_record_rebuild_nothing(home):
    flags = [*FLAGS, "--name", "steep", "--max_steps", 6, "--train.eval_interval", 3]
    flags += ["--optimizer.lr", 30, "--optimizer.warmup_steps", 0]
    assert run("train.py", *flags, "--optimizer.schedule", "constant", cwd=home).returncode == 0
    folder = home / "runs" / "steep"
    assert any(record.get("perplexity/train", 0) > 1e39 for record in metrics(folder))
    assert find_difference(folder / "tensorboard", metrics(folder)) == ""
    (folder / "metrics.jsonl").unlink()
    more = ["--resume", "--name", "steep", "--extend", "--max_steps", 8]
    result = run("train.py", *more, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "rebuilt" not in result.stdout
    assert "tensorflow" not in result.stderr.lower()


def test_lines_that_cannot_be_read_are_kept_aside(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "lines")
    file = home / "runs" / "lines" / "metrics.jsonl"
    before = file.read_text().splitlines()
    file.write_text("\n".join([before[0], "[" * 100_000, '{"step": 1e999}', *before[1:]]) + "\n")
    flags = ["--resume", "--name", "lines", "--extend", "--max_steps", 42]
    result = run("train.py", *flags, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "metrics.jsonl: 2 lines cannot be read" in result.stdout
    assert "[" * 100_000 in (file.parent / "damaged_metrics.jsonl_0").read_text()
    assert losses(file.parent).items() >= losses(home / "runs" / "straight").items()


@pytest.mark.parametrize(
    "line",
    ["", "[]", "3", '{"step": "x"}', '{"step": -1}', '{"step": 1.5}', '{"step": 1, "a": "b"}',
     '{"step": 1, "a": NaN}', f'{{"step": 1, "a": 1{"0" * 400}}}', f'{{"step": 1{"0" * 30}}}'],
)  # fmt: skip
def test_what_is_no_record(line):
    assert parse_record(line) is None


def test_stored_paths_are_found_from_where_the_run_was_started(tmp_path):
    started = tmp_path / "a [1]"  # whose own name is no pattern
    (started / "corpus").mkdir(parents=True)
    (started / "corpus" / "one.txt").write_text("one")
    for path in ("corpus", "corpus/one.txt", str(tmp_path), "nowhere", "none/*"):
        there = os.path.join(started, path)
        assert there_or_here(path, str(started)) == (there if os.path.exists(there) else path)
    found = there_or_here("**/*.txt", str(started))
    assert find_files(found, "data.path", "auto", Store.of(tmp_path, 1, print)) == [
        started / "corpus" / "one.txt"
    ]


def test_a_fork_begins_with_a_checkpoint(home):
    source = step_path(home / "runs" / "straight", 20)
    flags = ["--resume", source, "--name", "fork", "--max_steps", 100_000, "--extend"]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=subprocess.PIPE, text=True
    )
    while "step 21/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Checkpoint(list_steps(home / "runs" / "fork")[0]).verify().step == 20


def test_a_resume_keeps_the_histograms_of_its_step(home):
    shutil.copytree(home / "runs" / "straight", home / "runs" / "histograms")
    flags = ["--resume", "--name", "histograms", "--extend", "--max_steps", 50]
    assert run("train.py", *flags, cwd=home).returncode == 0
    board = EventAccumulator(str(home / "runs/histograms/tensorboard"), {"histograms": 0})
    board.Reload()
    steps = [event.step for event in board.Histograms("weights/embed.weight")]
    assert steps == [10, 20, 30, 40, 50]


def test_a_last_save_that_fails_is_told_on_stderr(home):
    steps = home / "runs" / "blocked" / "checkpoints"
    flags = [*FLAGS, "--name", "blocked", "--max_steps", 4]
    assert run("train.py", *flags, cwd=home).returncode == 0
    (steps / ".step_00000006").symlink_to(home / "cache", target_is_directory=True)  # in the way
    more = ["--resume", "--name", "blocked", "--extend", "--max_steps", 6]
    result = run("train.py", *more, cwd=home)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert "step 6 could not be saved" in line
    assert "--resume" in line
    assert "next:" not in result.stdout
    assert read_best(home / "runs" / "blocked")["step"] == 4
    assert read_records(home / "runs" / "blocked" / "metrics.jsonl")[-1]["step"] == 6


def test_only_a_full_memory_is_called_one():
    assert "out of memory" in explain_error(
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    )
    assert "out of memory" in explain_error(
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
    )
    assert "out of memory" in explain_error(MemoryError())
    assert explain_error(RuntimeError("CUDA error: an illegal memory access was encountered")) == ""
    assert (
        explain_error(OSError(28, "No space left", "x"))
        == "x: No space left; free some disk space and try again"
    )
    assert explain_error(OSError()) == "OSError"


@pytest.mark.parametrize(
    "program",
    [
        "checkpoint.__main__",
        "data.sources.__main__",
        "tools.replay",
        "tools.tensorboard_files",
        "tools.verify_resume",
    ],
)
def test_wrong_arguments_are_one_line(program, monkeypatch):
    import importlib

    monkeypatch.setattr("sys.argv", [program, "--nonsense", "x", "y"])
    with pytest.raises(UserError) as error:
        importlib.import_module(program).main()
    assert "\n" not in str(error.value)


def test_a_nan_dump_is_nothing_to_resume_from(home):
    flags = [*FLAGS, "--name", "steeper", "--optimizer.lr", 1e20]
    assert run("train.py", *flags, cwd=home).returncode == 1
    nan_dump = home / "runs" / "steeper" / "nonfinite_step_2"
    assert "tools.replay" in refused(run("train.py", "--resume", nan_dump, cwd=home))
    shown = json.loads((nan_dump / "nan_dump.json").read_text())
    assert shown["step"] == 1


FULL_MEMORY = """
import resource, sys, torch
from pathlib import Path
from checkpoint.reader import list_steps
from common import cli
from common.signals import StopRequest
from training.checkpointer import SAVE_FAILURES, Checkpointer, explain_failure
from training.command_line import read_command_line
from training.nan_dump import explain_stop
from training.recorder import Recorder
from training.run_folder import locked
from training.setup import build

unlimited = resource.getrlimit(resource.RLIMIT_AS)


def limit(free):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + free, unlimited[1]))


spec = read_command_line(print, sys.argv[1:])
state = build(spec, print)
with (
    locked(spec.run, spec.continued) as folder,
    StopRequest() as stop,
    Recorder(state, spec, stop) as recorder,
):
    checkpointer = Checkpointer(state, spec, folder, recorder.log, recorder.flush)
    batch = state.batches(0, 1)
    for free in (2**23, 2**25, 2**26):  # the weights are 100 MB
        limit(free)
        checkpointer.save()
        checkpointer.wait()
        assert not checkpointer.failure
        print(explain_stop(checkpointer, batch, 1, "nan"))
        for allocate in (torch.empty, bytes):
            try:
                allocate(2**29)
            except SAVE_FAILURES as error:
                print(allocate.__name__, explain_failure(error))
        state.progress.step += 1
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
step = list_steps(spec.run)[-1]
from checkpoint.reader import Checkpoint
limit(2**26)
sys.exit(cli.run("train.py", lambda: Checkpoint(step).tensors("model.safetensors") and 0))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory, and /proc")
def test_a_save_needs_no_memory_for_its_tensors(home):
    """They are written one after the other, as they are; full memory has its line elsewhere."""
    flags = [*FLAGS, "--name", "full", "--model.d_ff", 200_000]
    result = subprocess.run(
        [sys.executable, "-c", FULL_MEMORY, *map(str, flags)], cwd=home, capture_output=True,
        text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("train.py: out of memory") and result.stderr.count("\n") == 1
    said = result.stdout
    assert [said.count(f"saved runs/full/checkpoints/step_0000000{i}") for i in range(3)] == [1] * 3
    assert said.count("tools.replay runs/full/nonfinite_step_") == 3
    assert said.count("bytes out of memory; free some memory") == 3
    assert said.count("empty out of memory (") == 3
