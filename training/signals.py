"""Ctrl-C and SIGTERM: the first asks for a stop at the next step, the second quits at once."""

import contextlib
import os
import signal
import sys


class StopRequest:
    """While entered, `signal` is 0 until one arrives, and then its number."""

    def __init__(self):
        self.signal = 0
        self.handlers = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.signal:  # the second: as if nobody had listened
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal = number
        # print() could be interrupted inside itself and refuse to be entered again
        with contextlib.suppress(OSError):  # a reader that the same Ctrl-C has ended
            os.write(sys.stderr.fileno(), b"\nstopping: saving after this step (again: quit)\n")
