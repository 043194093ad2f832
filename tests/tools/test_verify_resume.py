"""python -m tools.verify_resume: the same where it is the same, and not where it is not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT, refused, write_config
from tools.verify_resume import Compared, compare_tensors, flags_of_both, read_flags
from training.command_line import read_command_line


def verify(home: Path, *flags, project: Path = ROOT) -> subprocess.CompletedProcess:
    """The program of `project` with the tiny configuration; its temporary files are in `home`."""
    return subprocess.run(
        [sys.executable, "-m", "tools.verify_resume", "--config", home / "tiny.toml",
         *map(str, flags)],
        cwd=project, env={**os.environ, "PYTHONPATH": "", "TMPDIR": str(home / "temporary")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def kept(home: Path) -> list[Path]:
    """The folders that it has left."""
    return list((home / "temporary").glob("verify_resume-*"))


@pytest.fixture
def home(tmp_path):
    write_config(tmp_path)
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_a_resumed_run_is_the_same(home):
    result = verify(home, "--steps", 8, "--stop_at", 3)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for line, what in zip(lines, ("straight: 8 steps", "stopped: ", "resumed: 5 "), strict=False):
        assert re.fullmatch(rf"{what}.* \.\.\. \d+ s", line)
    assert re.fullmatch(
        r"8 steps, stopped after 3 and resumed: 8 training losses, 3 validation losses, "
        r"\d\d+ tensors: the same bit for bit",
        lines[-1],
    )
    assert not kept(home)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell called sh")
def test_on_several_processes_the_kill_goes_to_all(home):
    result = verify(home, "--steps", 8, "--stop_at", 3, "--processes", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("straight: 8 steps on 2 processes ... ")
    assert lines[2].startswith("resumed: 5 steps on 1 process ... ")
    assert lines[-1].startswith("8 steps on 2 processes, stopped after 3 and resumed on 1 process:")
    assert lines[-1].endswith("tensors: the same bit for bit")
    assert not kept(home)


def test_a_compiled_run_of_one_long_text_is_the_same_too(home):
    result = verify(home, "--steps", 14, "--stop_at", 10, "--compile")  # an epoch has 8 steps
    assert result.returncode == 0, result.stdout + result.stderr
    assert "14 training losses" in result.stdout and "the same bit for bit" in result.stdout


def test_dropout_that_does_not_follow_the_step_is_noticed(home):
    project = home / "project"
    parts = (
        "checkpoint", "common", "configs", "data", "evaluation", "generation", "model", "tools",
        "torchlite", "torchmicro", "training",
    )  # fmt: skip
    for part in parts:
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("cache"))
    shutil.copy(ROOT / "train.py", project)
    step = project / "training" / "step.py"
    broken, times = re.subn(
        r'torch\.manual_seed\(derive_seed\("dropout".*\)', "pass", step.read_text(encoding="utf-8")
    )
    assert times == 1
    step.write_text(broken, encoding="utf-8")
    result = verify(home, "--steps", 8, project=project)
    assert result.returncode == 1, result.stdout + result.stderr
    numbers = r"\d\.\d+ straight, \d\.\d+ resumed"
    assert re.search(rf"first difference: loss/train of step 5: {numbers}", result.stdout)
    assert kept(home) == [Path(result.stdout.rpartition(": ")[2].strip())]


def test_what_train_py_refuses_and_what_we_do(home):
    assert "--steps 1 must" in refused(verify(home, "--steps", 1))
    assert "--stop_at 40 must" in refused(verify(home, "--stop-at", 40))
    assert "--resume_processes 0 must" in refused(verify(home, "--resume_processes", 0))
    assert "train.accumulation_steps = 2: 3 pro" in refused(verify(home, "--processes", 3))
    assert "'many'" in refused(verify(home, "--steps", "many"))
    assert "--resume: this program starts both runs" in refused(verify(home, "--resume=x"))
    assert "nowhere.toml: no such file" in refused(verify(home, "--config", "nowhere.toml"))
    assert refused(verify(home, "--data.path", "nowhere")).startswith("train.py: data.path")
    assert not kept(home)


@pytest.mark.parametrize(
    ("device", "more", "added"),
    [("cpu", [], False), ("cuda", [], True), ("cuda:1", ["--train.no_deterministic"], True),
     ("cuda", ["--train.deterministic"], False)],
)  # fmt: skip
def test_on_cuda_both_runs_are_deterministic(home, capsys, device, more, added):
    """Attention's backward pass adds with atomics there: no two runs are the same without it."""
    options, flags = read_flags(["--config", str(home / "tiny.toml"), "--device", device, *more])
    flags = flags_of_both(flags, options, home / "runs")
    plan = read_command_line(lambda line: None, flags)
    assert plan.config.train.deterministic == (device != "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == added and all("--train.deterministic" in line for line in lines)


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, np.nan], [1.0, np.nan], ""),
        ([[1.0, 0.0]], [[1.0, -0.0]], "x[0, 1]: 0.0 straight, -0.0 resumed"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], "x[1, 1]: 4.0 straight, 5.0 resumed"),
        (2.0, 3.0, "x[]: 2.0 straight, 3.0 resumed"),
        ([1.0], [1.0, 2.0], "x: float32 (1,) straight, float32 (2,) resumed"),
        ([1.0], None, "x: float32 (1,) straight, none resumed"),
    ],
)
def test_tensors_are_compared_by_their_bits(a, b, difference):
    found = Compared()
    a, b = (None if value is None else np.array(value, np.float32) for value in (a, b))
    compare_tensors(found, "x", a, b)
    assert found.difference.startswith(difference)
    assert bool(found.difference) == bool(difference)
