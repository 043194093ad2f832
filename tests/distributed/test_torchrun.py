"""A real torchrun: it begins again when it has lost a process, and passes signals on."""

import os
import signal
import subprocess
import sys

import pytest

from checkpoint.reader import list_steps, step_of
from tests.distributed.test_one_curve import check_equal
from tests.faults.campaign import ended, finished, wait_for
from tests.helpers import metrics, run, torchrun, workers, write_config

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FLAGS = ["--config", "tiny.toml", "--train.log_interval", "10"]
NEVER_DONE = ["--max_steps", "1000000", "--optimizer.schedule_steps", "400"]


@pytest.fixture
def output(tmp_path):
    """Where what they say goes, beside the tiny configuration."""
    write_config(tmp_path)
    return tmp_path / "output.txt"


def begin(output, *arguments, restarts: int = 0) -> subprocess.Popen:
    """train.py on two processes, until one has logged a step."""
    with open(output, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            torchrun(2, "train.py", *FLAGS, *arguments, restarts=restarts),
            cwd=output.parent, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_for(lambda: "\nstep 1/" in output.read_text("utf-8"), process, 120)
    return process


def test_one_that_is_killed_costs_a_restart_and_no_bit(output):
    flags = ["--max_steps", "400", "--name", "killed", "--resume", "auto"]
    with ended(begin(output, *flags, restarts=1)) as process:
        wait_for(lambda: "step_00000020" in output.read_text("utf-8"), process)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        assert process.wait(120) == 0, output.read_text("utf-8")
    said = output.read_text("utf-8")
    assert said.count("train.py: rank 1 of 2 has gone, at step ") == 1, said
    assert said.count("resuming runs/killed from step ") == 1, said
    assert "Traceback" not in said
    finished(run("train.py", *FLAGS, *flags[:2], "--name", "straight", cwd=output.parent))
    check_equal(output.parent / "runs" / "straight", output.parent / "runs" / "killed")


def test_a_signal_to_the_launcher_saves_once_and_ends_all(output):
    with ended(begin(output, *NEVER_DONE, "--name", "stopped")) as process:
        ids = workers(process.pid).values()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    assert not any(os.path.exists(f"/proc/{number}") for number in ids)
    said, folder = output.read_text("utf-8"), output.parent / "runs" / "stopped"
    after = said.partition("stopping: saving after this step")[2]
    assert after.count("saved ") == 1, said
    assert "train.py: " not in said  # nobody misses anybody
    assert step_of(list_steps(folder)[-1]) >= max(record["step"] for record in metrics(folder))
