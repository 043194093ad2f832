"""A real torchrun: it begins again when it has lost a process, and passes signals on."""

import os
import signal
import sys

import pytest

from checkpoint.reader import list_steps, step_of
from tests.distributed.test_one_curve import check_equal
from tests.faults.campaign import finished, wait_for
from tests.faults.ranks import alive, launched, steps_begun
from tests.helpers import metrics, run, workers, write_config

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FLAGS = ["--config", "tiny.toml", "--train.log_interval", "10"]


@pytest.fixture
def home(tmp_path):
    write_config(tmp_path)
    return tmp_path


def test_one_that_is_killed_costs_a_restart_and_no_bit(home):
    flags = [*FLAGS, "--max_steps", "400"]
    again = ["--name", "killed", "--resume", "auto"]
    with launched(home, 2, *flags, *again, restarts=1) as (torchrun, said):
        wait_for(lambda: "step_00000020" in said(), torchrun, 120)
        os.kill(workers(torchrun.pid)[1], signal.SIGKILL)
        assert torchrun.wait(120) == 0, said()
    assert said().count("train.py: rank 1 of 2 has gone, at step ") == 1, said()
    assert said().count("resuming runs/killed from step ") == 1, said()
    assert "Traceback" not in said()
    finished(run("train.py", *flags, "--name", "straight", cwd=home))
    check_equal(home / "runs" / "straight", home / "runs" / "killed")


def test_a_signal_to_the_launcher_saves_once_and_ends_all(home):
    with launched(home, 2, *FLAGS, "--max_steps", "1000000", "--name", "stopped") as (
        torchrun,
        said,
    ):
        wait_for(lambda: steps_begun(said()), torchrun, 120)
        ids = workers(torchrun.pid).values()
        torchrun.send_signal(signal.SIGTERM)
        assert torchrun.wait(60) != 0
        assert not alive(ids)
    after, folder = (
        said().partition("stopping: saving after this step")[2],
        home / "runs" / "stopped",
    )
    assert after.count("saved ") == 1, said()
    assert "train.py: " not in said()  # nobody misses anybody
    assert step_of(list_steps(folder)[-1]) >= max(record["step"] for record in metrics(folder))


@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_what_the_first_one_answers_alone_ends_all(home, flag):
    # as on hosts that may join again: the first process has the store
    own = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with launched(home, 2, *FLAGS, flag, environment=own) as (torchrun, said):
        assert torchrun.wait(60) == 0, said()
    assert said().count("max_steps") and "train.py: " not in said()
