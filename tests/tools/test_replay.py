"""training/nan_dump.py, tools/replay.py: where a loss that is not finite begins."""

import subprocess
import sys

import numpy as np
import pytest

from checkpoint.reader import Checkpoint, list_steps
from tests.helpers import ROOT, losses, rewrite, run, write_config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the tiny configuration and a run of four steps called `first`."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    flags = ["--config", "tiny.toml", "--name", "first", "--max_steps", 4]
    assert run("train.py", *flags, cwd=folder).returncode == 0
    return folder


def replayed(*arguments, cwd):
    """`python -m tools.replay` from the project's folder."""
    paths = [str(cwd / argument) for argument in arguments]
    return subprocess.run(
        [sys.executable, "-m", "tools.replay", *paths], cwd=ROOT, capture_output=True, text=True
    )


def huge_output(weights, size=3e38):
    """Finite logits, and gradients that no float32 can hold."""
    weights["final_norm.weight"] *= np.float32(1e-38)
    weights["final_norm.bias"] *= np.float32(1e-38)
    weights["output.weight"][:] = np.where(weights["output.weight"] > 0, size, -size)


def large_output(weights):
    """Gradients that are finite each, and whose norm is not."""
    huge_output(weights, 1e37)


def huge_layer(weights):
    weights["layers.1.feed_forward.linear1.weight"][:] = 3e38


def not_a_number(weights):
    weights["layers.0.norm2.bias"][3] = np.nan


@pytest.mark.parametrize(
    ("edit", "why", "first"),
    [
        (huge_layer, "the loss is nan", "layers.1.feed_forward.linear1: its output has"),
        (huge_output, "the gradient's norm is", "final_norm: the gradient of its"),
        (large_output, "the gradient's norm is inf", "final_norm.weight: the norm of its gradient"),
        (not_a_number, "the loss is nan", "layers.0.norm2.bias: the weights themselves"),
    ],
)
def test_the_nan_dump_names_where_it_begins(home, edit, why, first):
    name = edit.__name__
    newest = Checkpoint(list_steps(home / "runs" / "first")[-1])
    rewrite(newest, home / "runs" / f"{name}-source", weights=edit)
    flags = ["--config", "tiny.toml", "--init_from", f"runs/{name}-source", "--name", name]
    result = run("train.py", *flags, cwd=home)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert f"step 1: {why}" in line
    assert f"python -m tools.replay runs/{name}/nonfinite_step_1" in line
    assert list_steps(home / "runs" / name), "the state before it is kept"
    assert not losses(home / "runs" / name)
    result = replayed(f"runs/{name}/nonfinite_step_1", cwd=home)
    assert result.returncode == 0, result.stderr
    assert f"step 1: {why}" in result.stdout
    assert f"first: {first}" in result.stdout.replace("micro-batch 1: ", "")


def test_a_second_try_leaves_a_second_nan_dump(home):
    flags = ["--config", "tiny.toml", "--name", "twice", "--optimizer.lr", "1e20"]
    assert run("train.py", *flags, cwd=home).returncode == 1
    assert run("train.py", "--resume", "--name", "twice", cwd=home).returncode == 1
    nan_dumps = sorted((home / "runs" / "twice").glob("nonfinite_step_*"))
    assert [path.name for path in nan_dumps] == ["nonfinite_step_2", "nonfinite_step_2_1"]
    one, other = (Checkpoint(path).verify() for path in nan_dumps)
    for file in one.manifest["files"]:
        assert one.read(file) == other.read(file), file
    assert one.step == 1


def test_what_is_no_nan_dump_is_refused(home):
    result = replayed("runs/first/checkpoints/step_00000004", cwd=home)
    assert result.returncode == 2
    assert "not a NaN dump" in result.stderr
    result = replayed("nowhere", cwd=home)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
