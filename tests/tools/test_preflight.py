"""python -m tools.preflight: what it measures, and what it warns of."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.reader import list_steps
from tests.helpers import ROOT, refused, run, write_config
from tools.preflight import HEIGHT, WIDTH, duration, plot
from training.config import OptimizerConfig


def preflight(home: Path, *flags, **more) -> subprocess.CompletedProcess:
    """The program with the tiny configuration."""
    return subprocess.run(
        [sys.executable, "-m", "tools.preflight", "--config", home / "tiny.toml",
         "--runs_dir", home / "runs", *map(str, flags)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "", "COLUMNS": "100"}, timeout=120,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, **more,
    )  # fmt: skip


def remarks(result: subprocess.CompletedProcess, status: int) -> str:
    """What is wrong or noted, after a look at the exit status."""
    assert result.returncode == status, result.stdout + result.stderr
    assert result.stderr == ""
    found = result.stdout.partition("remarks\n")[2]
    kinds = [line.split()[0] for line in found.splitlines()]
    assert kinds == sorted(kinds, reverse=True)  # first what is wrong
    assert ("wrong:" in kinds) == bool(status)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the configuration and a short run called `one`."""
    folder = tmp_path_factory.mktemp("home")
    write_config(folder)
    result = run("train.py", "--config", "tiny.toml", "--name", "one", "--max_steps", 2, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_what_it_shows(home):
    result = preflight(home)
    assert "ln(" not in remarks(result, 0)
    shown = {
        name: value
        for name, value in re.findall(r"^  (\w.{19}) *(.*?)(?:  .*)?$", result.stdout, re.M)
    }
    shown = {name.strip(): value for name, value in shown.items()}
    assert shown["the run"].endswith(" s")
    assert float(shown["a step"].removesuffix(" ms")) > 0
    weights = float(shown["weights"].removesuffix(" MB"))
    assert weights == round(4 * int(shown["total"].replace(",", "")) / 1e6, 1)
    peak = float(shown["peak memory"].removesuffix(" MB"))
    assert peak > 4 * weights
    assert peak == max(
        float(shown[n].removesuffix(" MB")) for n in ("peak of a step", "of an evaluation")
    )
    assert float(shown["tokens a second"].replace(",", "")) > 0
    assert shown["micro-batch"] == "4"
    assert shown["an epoch"].endswith("tokens")
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())
    assert float(shown["at the first step"]) == pytest.approx(golden["loss/train 1"], rel=1e-3)
    newest = list_steps(home / "runs" / "one")[-1]
    size = sum(file.stat().st_size for file in newest.iterdir() if file.name != "MANIFEST.json")
    assert f"5 of {size / 1e6:.1f} MB" in result.stdout
    assert [path.name for path in (home / "runs").iterdir()] == ["one"]


def test_under_torchrun_it_measures_what_sending_takes(home):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "tools.preflight", "--config", home / "tiny.toml",
         "--runs_dir", home / "runs"], timeout=120, stdin=subprocess.DEVNULL,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("communication\n") == 1  # the first speaks for both
    assert result.stdout.index("communication\n") < result.stdout.index("no remarks")
    sent = float(re.search(r"sent by each +([\d.]+) MB", result.stdout)[1])
    weights = float(re.search(r"weights +([\d.]+) MB", result.stdout)[1])
    assert sent == pytest.approx(weights, abs=0.1)  # 2 (W - 1) / W of them
    rows = re.findall(r"^ +(\d+) +[\d.]+ ms +([\d.]+)% ", result.stdout, re.M)
    assert [number for number, _ in rows] == ["1", "2", "4", "8"]
    assert float(rows[0][1]) == 0 < float(rows[1][1]) < 100
    assert "16 and more: a step has 8 examples" in result.stdout


def test_settings_that_spoil_a_run(home):
    flags = "--optimizer.lr 0 --optimizer.warmup_steps 70 --max_steps 60 --data.val_fraction 0"
    flags += " --train.batch_size 500 --train.keep 1000000000"
    result = preflight(home, "--init_from", home / "runs" / "one", *flags.split())
    found = remarks(result, 1)
    assert "wrong: optimizer.lr = 0 trains nothing" in found
    assert "wrong: optimizer.warmup_steps = 70, but the run has 60 steps" in found
    assert re.search(r"wrong: .*runs: [\d,.]+ MB free, [\d,.]+ MB needed for checkpoints", found)
    assert "note: 60 epochs" in found
    assert "note: no validation data" in found
    assert re.search(r"note: train\.batch_size = 500 is more than all \d+ examples", found)
    assert "the weights are trained" in result.stdout
    assert "ln(" not in found


def test_data_that_does_not_fit_and_a_loss_that_is_none(home):
    lines = ["a" * 3 + "b" * (length % 25) for length in range(300)] + ["c" * 90] * 200
    (home / "lines.txt").write_text("\n".join(lines))
    flags = "--data.kind lines --train.batch_size 256 --train.accumulation_steps 1"
    flags += " --optimizer.lr 1e38 --optimizer.warmup_steps 0 --model.init_std 0.9"
    flags += " --optimizer.schedule_steps 9 --optimizer.schedule linear --optimizer.min_lr_ratio 0"
    found = remarks(preflight(home, "--data.path", home / "lines.txt", *flags.split()), 1)
    assert re.search(r"wrong: \d\d% of the examples are longer than 32 tokens and skipped", found)
    assert re.search(r"wrong: step [1-4]: the (loss|gradient's norm) is (nan|inf)", found)
    assert "wrong: the learning rate is 0 from step 9 of 40 on" in found
    assert re.search(r"note: \d\d% of the tokens computed are padding", found)
    assert [path.name for path in (home / "runs").iterdir()] == ["one"]


def bounded(size: int):
    """What a process does first that may have only so many bytes of data."""
    resource = pytest.importorskip("resource")
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is bounded on Linux only")
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def test_a_model_for_another_machine(home):
    flags = ["--model.d_ff", 2**18, "--model.n_layers", 3]
    found = remarks(preflight(home, *flags, preexec_fn=bounded(1_200_000_000)), 1)
    assert "wrong: the run needs more memory than there is, even with a micro-batch of 1" in found


def test_a_batch_for_another_machine(home):
    """59 windows of 32 tokens, 64 KiB of hidden units each; and the size that does fit."""
    flags = ["--model.d_ff", 16384, "--train.batch_size", 64, "--train.accumulation_steps", 1]
    result = preflight(home, *flags, preexec_fn=bounded(700_000_000))
    found = re.search(
        r"wrong: the run needs more memory than there is; train.accumulation_steps = (\d+) fits "
        r"\(micro-batch of (\d+)\)",
        remarks(result, 1),
    )
    assert found, result.stdout
    steps, size = map(int, found.groups())
    assert steps > 1 and steps * size == 64
    assert "  a micro-batch of 64 does not fit\n" in result.stdout
    assert f"with train.accumulation_steps = {steps}\nmemory\n" in result.stdout
    flags[-1] = steps  # which is true of a run
    assert "memory" not in remarks(preflight(home, *flags, preexec_fn=bounded(700_000_000)), 0)


def test_a_run_that_does_not_fit_is_told_of_the_program_that_finds_what_does(home):
    flags = ["--config", "tiny.toml", "--model.d_ff", 16384, "--train.batch_size", 64]
    flags += ["--train.accumulation_steps", 1, "--name", "full"]
    line = refused(run("train.py", *flags, cwd=home, preexec_fn=bounded(700_000_000)))
    assert line.startswith("train.py: out of memory (")
    assert line.endswith("; python -m tools.preflight finds the micro-batch that fits")
    shutil.rmtree(home / "runs" / "full")


def test_the_cost_of_a_run(home):
    result = preflight(home, "--price", 36_000, "--max_steps", 1000)
    seconds = re.search(r"^  the run +(?:(\d+) min )?([\d.]+) s ", result.stdout, re.M)
    seconds = 60 * float(seconds[1] or 0) + float(seconds[2])
    cost = re.search(r"^  its cost +([\d,.]+)  at 36,000 an hour$", result.stdout, re.M)[1]
    assert float(cost.replace(",", "")) == pytest.approx(10 * seconds, abs=6)
    assert "its cost" not in preflight(home).stdout
    for price in ("-1", "nan", "inf", "much"):
        assert "--price" in refused(preflight(home, f"--price={price}"))
    assert "--price FLOAT" in preflight(home, "--help").stdout


def test_bad_flags_are_refused_as_train_py_does(home):
    (home / "wrong.toml").write_text("[model]\nd_ff = 0\n")
    assert "d_ff = 0 must be" in refused(preflight(home, "--config", home / "wrong.toml"))
    assert "one exists" in refused(preflight(home, "--name", "one"))


# Parts --------------------------------------------------------------------------------------------


def heights(lines: list[str]) -> list[int]:
    """The rows, from the bottom, that the columns of a plot have their mark in."""
    grid = [line[6:].ljust(WIDTH) for line in lines[:HEIGHT]]
    columns = [[row[column] for row in reversed(grid)] for column in range(WIDTH)]
    assert all(column.count("*") == 1 for column in columns)
    return [column.index("*") for column in columns]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - 0.5 * done),
        ("cosine", lambda done: 0.75 + 0.25 * math.cos(math.pi * done)),
    ],
)
def test_the_plot_is_the_schedule(schedule, after):
    steps, warmup = 1181, 237
    config = OptimizerConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.5)
    lines = plot(config, steps, horizon=steps)
    for column, height in enumerate(heights(lines)):
        step = column * 20
        factor = (step + 1) / warmup if step < warmup else after((step - warmup) / (1181 - warmup))
        assert abs(height - 7 * factor) <= 0.5 + 1e-9, column
    assert lines[0].startswith("peak |")
    assert lines[HEIGHT - 1].startswith("   0 |")
    assert lines[-1].split() == ["1", "591", "1,181", "steps"]
    assert max(map(len, lines)) == WIDTH + 6


@pytest.mark.parametrize("steps", [1, 2, 59])
def test_the_plot_of_a_short_run(steps):
    config = OptimizerConfig(schedule="linear", warmup_steps=0, min_lr_ratio=0)
    rows = heights(plot(config, steps, horizon=steps))
    assert rows[0] == HEIGHT - 1
    assert rows == sorted(rows, reverse=True)


def test_durations():
    assert [duration(s) for s in (0.04, 59.2, 59.97, 247, 12_000)] == [
        "0.0 s", "59.2 s", "60.0 s", "4 min 7 s", "3 h 20 min",
    ]  # fmt: skip
