"""training/profiler.py through train.py: a trace of the steps asked for; nothing else changes."""

import gzip
import json
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from checkpoint.reader import Checkpoint, list_steps
from common.errors import UserError
from tests.helpers import command, losses, refused, run, write_config
from training.config import Config, TrainConfig, changes, check

FLAGS = ["--config", "tiny.toml", "--max_steps", 6, "--train.eval_interval", 4]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the configuration and a run of six steps called `plain`."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    result = run("train.py", *FLAGS, "--name", "plain", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def ranges(trace: Path) -> Counter:
    """How often each named range is in a trace; every part is inside a step."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e.get("cat") == "user_annotation"]
    steps = [e for e in named if e["name"].startswith("ProfilerStep#")]
    parts = [e for e in named if e["name"] in ("data", "forward", "backward", "optimizer")]
    for part in parts:
        inside = [s for s in steps if s["ts"] <= part["ts"] <= s["ts"] + s["dur"]]
        assert len(inside) == 1, part
    assert any(e["name"].startswith("aten::") for e in events)
    return Counter(e["name"] for e in (*steps, *parts))


def test_a_trace_has_the_steps_and_their_parts(home):
    flags = [*FLAGS, "--name", "traced", "--train.profile_steps", "3:5"]
    result = run("train.py", *flags, cwd=home)
    assert result.returncode == 0, result.stderr
    folder = home / "runs" / "traced"
    (trace,) = (folder / "profile").iterdir()
    assert trace.name == "steps_3_5.pt.trace.json.gz"
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("profile:")]
    assert f"runs/traced/profile/{trace.name}" in line and "perfetto" in line
    assert ranges(trace) == {
        **{f"ProfilerStep#{step}": 1 for step in (3, 4, 5)},
        "data": 3 * 3, "forward": 3 * 2, "backward": 3 * 2, "optimizer": 3,  # two micro-batches
    }  # fmt: skip
    plain = home / "runs" / "plain"
    assert losses(folder) == losses(plain)
    weights = [Checkpoint(list_steps(r)[-1]).read("model.safetensors") for r in (folder, plain)]
    assert weights[0] == weights[1]
    assert not (plain / "profile").exists()


def test_a_signal_leaves_no_trace_and_a_resume_records_what_is_left(home):
    flags = [*FLAGS, "--name", "cut", "--train.profile_steps", "2:101", "--max_steps", 100000]
    process = subprocess.Popen(
        command("train.py", *flags), cwd=home, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("saved ") and "step_00000004" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    assert process.returncode == 130
    folder = home / "runs" / "cut"
    assert not (folder / "profile").exists()
    step = Checkpoint(list_steps(folder)[-1]).step
    assert 4 <= step < 101
    more = ["--train.profile_steps", f"2:{step + 2}", "--max_steps", step + 4]
    result = run("train.py", "--resume", "--name", "cut", *more, cwd=home)
    assert result.returncode == 0, result.stderr
    assert f"changed: train.profile_steps: 2:101 -> 2:{step + 2}" in result.stdout
    (trace,) = (folder / "profile").iterdir()
    assert trace.name == f"steps_{step + 1}_{step + 2}.pt.trace.json.gz"
    found = ranges(trace)
    assert {name for name in found if "#" in name} == {
        f"ProfilerStep#{step + 1}", f"ProfilerStep#{step + 2}",
    }  # fmt: skip


def test_what_is_beyond_the_run_is_told_and_its_end_is_the_runs(home):
    flags = ["--config", "tiny.toml", "--max_steps", 3, "--train.profile_steps"]
    result = run("train.py", *flags, "4:5", "--name", "beyond", cwd=home)
    assert "no profile: train.profile_steps begins after the run's 3 steps" in result.stdout
    assert not (home / "runs" / "beyond" / "profile").exists()
    assert run("train.py", *flags, "3:50", "--name", "end", cwd=home).returncode == 0
    (trace,) = (home / "runs" / "end" / "profile").iterdir()
    assert trace.name == "steps_3_3.pt.trace.json.gz"


def test_a_trace_that_cannot_be_written_costs_nothing_else(home):
    flags = [*FLAGS, "--name", "full", "--train.profile_steps", "5:5"]
    assert run("train.py", *flags, "--max_steps", 4, cwd=home).returncode == 0
    (home / "runs" / "full" / "profile").write_text("in the way")
    result = run("train.py", "--resume", "--name", "full", "--extend", "--max_steps", 6, cwd=home)
    assert result.returncode == 0, result.stderr
    assert re.search(r"no profile: .*profile.*; training continues", result.stdout)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5", "profile_steps = '5' must be A:B, the first and the last step"),
        ("a:b", "must be A:B"),
        ("3:", "must be A:B"),
        ("-1:4", "must be A:B"),
        ("1:2:3", "must be A:B"),
        ("0:4", "with 1 <= A <= B"),
        ("5:4", "with 1 <= A <= B"),
        ("1:101", "at most 100 steps"),
        ("1:" + "9" * 5000, "must be A:B"),
    ],
)
def test_bad_values_are_named(value, says):
    with pytest.raises(UserError) as error:
        check({"train": {"profile_steps": value}}, "my.toml")
    assert str(error.value).startswith("my.toml: train.profile_steps = ")
    assert says in str(error.value) and len(str(error.value)) < 200


def test_a_bad_flag_is_one_line(home):
    line = refused(run("train.py", *FLAGS, "--train.profile_steps", "9:3", cwd=home))
    assert line.startswith("train.py: --train.profile_steps = '9:3' must be A:B with 1 <= A <= B")


def test_the_steps_and_what_a_resume_may_change():
    assert TrainConfig(profile_steps="1:100").profiled == (1, 100)
    assert TrainConfig().profiled == (0, 0)
    stored, wanted = Config(), Config(train=TrainConfig(profile_steps="3:4"))
    assert [(c.key, c.refused) for c in changes(stored, wanted, False)] == [
        ("train.profile_steps", "")
    ]
