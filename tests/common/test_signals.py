"""common/signals.py: the first signal asks, the second quits."""

import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

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
