"""common/processes.py with real processes: decisions, numbers, and what is told of a failure."""

import json
import os
import socket
import subprocess
import sys

import pytest

from common.errors import UserError
from common.processes import Processes, join
from tests.helpers import ROOT

PROGRAM = """
import atexit, json, os, sys, time
from datetime import timedelta
import torch
from common import cli
from common.errors import UserError
from common.processes import join

def main():
    with join("program") as processes:
        found = {"decided": processes.decide(lambda: {"by": processes.index})}
        order = sys.argv[1]
        if sys.argv[2] == "nothing to do":  # the first, which has the store, leaves before the rest
            time.sleep(processes.index)
            return processes.decide(lambda: 0)
        if sys.argv[2] == "killed early" and processes.index == processes.count - 1:
            os.kill(os.getpid(), 9)
        if sys.argv[2] == "interrupted" and processes.is_first:
            raise KeyboardInterrupt
        def turn():
            with open(order, "a") as file:
                file.write(f"{processes.index} ")
            return processes.index
        found["own"] = processes.first_on_host(turn)
        if sys.argv[2] == "interrupted" and processes.index == processes.count - 1:
            raise KeyboardInterrupt
        seconds = 3 if sys.argv[2] in ("hangs", "killed early") else 60
        processes.connect(torch.device("cpu"), timedelta(seconds=seconds))
        found["gathered"] = processes.gather([processes.index, 0.1 * processes.index])
        found["largest"] = processes.largest(10 - processes.index)
        print(json.dumps(found), flush=True)
        processes.step = 7
        fault, last = sys.argv[2], processes.index == processes.count - 1
        if fault == "error" and last:
            raise UserError("data.path = x: no such file; give another")
        if fault == "all":
            atexit.register(print, "the interpreter's own end", file=sys.stderr)
            raise UserError("data.path = x: no such file; give another")
        if fault == "memory" and last:
            torch.empty(10**15)
        if fault == "killed" and last:
            os.kill(os.getpid(), 9)
        if fault == "busy" and last:
            os.kill(os.getpid(), 9)
        if fault == "busy" and processes.index == 1:
            time.sleep(3)
        if fault == "hangs" and last:
            time.sleep(9)
            os._exit(0)
        processes.largest(0)

sys.exit(cli.run("program", main))
"""


def start(count: int, arguments: list[str]) -> list[tuple[int, str, str]]:
    """Runs PROGRAM as so many processes of one host. Returns status, stdout and stderr of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    together |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(count)
    ]
    return [
        (*process.communicate(timeout=120)[::-1], process.returncode)[::-1] for process in started
    ]


def test_they_decide_and_gather(tmp_path):
    done = start(3, [str(tmp_path / "order"), "none"])
    assert [status for status, _, _ in done] == [0, 0, 0], done
    for rank, (_, said, _) in enumerate(done):
        assert json.loads(said) == {
            "decided": {"by": 0},
            "own": rank,
            "gathered": [[0, 0], [1, 0.1], [2, 0.2]],
            "largest": 10,
        }
    assert (tmp_path / "order").read_text()[0] == "0"


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("error", "rank 2 of 3: data.path = x: no such file; give another"),
        ("memory", "rank 2 of 3: out of memory"),
        ("killed", "rank 2 of 3 has gone, at step 7; continue from the last checkpoint"),
        # one that computes meanwhile, and cannot know, is not missing
        ("busy", "rank 2 of 3 has gone, at step 7; continue from the last checkpoint"),
        ("killed early", "rank 2 of 3 has not answered for 3 s, at step 0; continue from"),
        ("hangs", "rank 2 of 3 has not answered for 3 s, at step 7; continue from"),
    ],
)
def test_a_failure_is_told_once_with_its_rank(tmp_path, fault, line):
    done = start(3, [str(tmp_path / "order"), fault])
    told = "".join(error for _, _, error in done)
    assert told.count(f"program: {line}") == 1, told
    assert told.count("program: ") == 1, told
    assert "Traceback" not in told
    assert all(status for status, _, _ in done[:2])


def test_one_that_is_interrupted_while_all_start_ends_all_in_silence(tmp_path):
    done = start(3, [str(tmp_path / "order"), "interrupted"])
    assert all(status for status, _, _ in done), done
    assert "program: " not in "".join(error for _, _, error in done)


def test_what_is_wrong_in_all_is_told_once(tmp_path):
    done = start(2, [str(tmp_path / "order"), "all"])
    assert [status for status, _, _ in done] == [2, 2]
    told = "".join(error for _, _, error in done)
    assert told.count("no such file") == 1
    # in which one of Gloo's threads, if it still has a tensor to let go of, calls abort()
    assert "the interpreter's own end" not in told


def test_the_host_of_the_store_leaves_last(tmp_path):
    done = start(3, [str(tmp_path / "order"), "nothing to do"])
    assert [(status, error) for status, _, error in done] == [(0, "")] * 3


def test_who_is_interrupted_lets_nobody_wait(tmp_path):
    done = start(2, [str(tmp_path / "order"), "interrupted"])
    assert done[0][0] == 130
    assert done[1][0] == 1
    assert "Traceback" not in done[1][2]


def test_a_process_alone_does_nothing():
    alone = Processes()
    assert alone.is_first
    assert alone.decide(lambda: 3) == 3
    assert alone.first_on_host(lambda: 4) == 4
    assert alone.gather([1, 2]) == [[1, 2]]
    assert alone.largest(5) == 5


def test_an_environment_that_says_half_of_it(monkeypatch):
    assert join("program").count == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK = None: must be a whole number; start"):
        join("program")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR = None: must be set; start"):
        join("program")
