"""Runs of version 0.1 are resumed, generated from, listed and replayed.

tests/fixtures/version_0_1 holds a run of 8 steps on tests/text.txt and a NaN dump, both written by
that version, and what it did with them (expected.json): the four steps that followed when it
resumed the run, and the text it wrote greedily.
"""

import json
import shutil
import subprocess
import sys

import pytest

from checkpoint.reader import Checkpoint
from tests.helpers import ROOT, TEXT, losses, run

FIXTURE = ROOT / "tests" / "fixtures" / "version_0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
STEP = "runs/run/checkpoints/step_00000008"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(FIXTURE, folder / "runs")
    shutil.copy(TEXT, folder / "text.txt")
    return folder


def module(*arguments, cwd):
    """`python -m` a module of the project; the last argument is a path in `cwd`."""
    command = [sys.executable, "-m", *arguments[:-1], str(cwd / arguments[-1])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_is_listed_and_verified(home):
    listed = module("checkpoint", "list", "runs/run", cwd=home)
    assert listed.returncode == 0, listed.stderr
    steps = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert steps == ["0", "4", "8"]
    assert f"{EXPECTED['validation']['8']:.4f}" in listed.stdout
    assert module("checkpoint", "verify", "runs/run", cwd=home).returncode == 0
    assert module("tools.tensorboard_files", "check", "runs/run", cwd=home).returncode == 0


@pytest.mark.parametrize("engine", ["torch", "numpy", "python"])
def test_it_is_generated_from(home, engine):
    flags = ["--checkpoint", STEP, "--greedy", "--device", "cpu", "--engine", engine]
    result = run("generate.py", *flags, cwd=home)
    assert result.stdout.rstrip("\n") == EXPECTED["greedy"], result.stderr


def test_it_is_resumed(home):
    result = run("train.py", "--resume", "runs/run", "--extend", "--max_steps", 12, cwd=home)
    assert result.returncode == 0, result.stderr
    found = losses(home / "runs" / "run")
    # dropout draws other numbers than it did: the same weights, data and learning rates all the
    # same, whose losses differ by more than that from step to step
    for step, loss in EXPECTED["losses after step 8"].items():
        assert found["loss/train", int(step)] == pytest.approx(loss, rel=2e-3)
    for step, loss in EXPECTED["validation"].items():
        close = 1e-5 if int(step) <= 8 else 2e-3
        assert found["loss/val", int(step)] == pytest.approx(loss, rel=close)
    resumed = Checkpoint(home / "runs/run/checkpoints/step_00000012").state
    assert resumed["order"] == 1, "the next resume would visit the data in another order"


def test_its_nan_dump_is_replayed_and_not_resumed(home):
    result = module("tools.replay", "runs/nonfinite_step_2", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "first: micro-batch 1: " in result.stdout
    result = run("train.py", "--resume", "runs/nonfinite_step_2", cwd=home)
    assert result.returncode == 2 and "NaN dump" in result.stderr
