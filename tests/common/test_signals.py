"""common/signals.py: the first signal asks, the second Ctrl-C or SIGTERM quits."""

import os
import signal
import subprocess
import sys

import pytest

from common import cli
from common.signals import StopRequest, handle_interrupts
from tests.helpers import ROOT

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has none of these signals")

CODE = """
import time
from common.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.signal:
        time.sleep(0.01)
    print("asked", stop.signal, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_quits_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"asked {int(number)}\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=5)
    assert process.returncode == -number
    assert "saving" in said


@POSIX
def test_warnings_ask_for_one_stop_and_do_not_quit_when_they_are_repeated(capfd):
    """A closing terminal sends SIGHUP twice, a batch system SIGTERM after its warning."""
    names = ("SIGUSR1", "SIGUSR1", "SIGHUP", "SIGHUP", "SIGXCPU", "SIGUSR2", "SIGTERM")
    with StopRequest() as stop:
        for name in names:
            signal.raise_signal(getattr(signal, name))
        assert stop.signal == signal.SIGUSR1
    assert capfd.readouterr().err.count("stopping") == 1


@POSIX
def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_interrupts() as interrupt, StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal and not interrupt.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@POSIX
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM", "SIGINT"])
def test_a_program_that_takes_an_interrupt_for_its_end_still_tells_the_signal(name):
    """As `generate.py --interactive` does, and compare.py, which then writes its report."""
    number = getattr(signal, name)

    def main() -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            return 0
        return 1

    assert cli.run("x", main) == (0 if number == signal.SIGINT else 128 + number)


INTERRUPTED = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("common", "numpy", "tyro", "tqdm", "argparse"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
if sys.argv[1].endswith(".py"):
    runpy.run_path(sys.argv[1], run_name="__main__")
else:
    runpy.run_module(sys.argv[1], run_name="__main__")
"""


@POSIX
@pytest.mark.parametrize("program", ["train.py", "generate.py", "compare.py", "tools.replay"])
def test_ctrl_c_while_a_program_loads_has_no_traceback(program):
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, program], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")
