"""What Ctrl-C and SIGTERM do: leave at once, after a section, or after this step.

`handle_interrupts` turns them into KeyboardInterrupt for a whole program, `defer_interrupts` keeps
that out of a section that must not be cut, and `StopRequest` lets the training loop end by itself.
A second signal always quits at once. Standard library only.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """The handler that raises KeyboardInterrupt, at once or at the end of a deferred section."""

    def __init__(self):
        self.received: list[int] = []
        self.deferred = False

    def __call__(self, number: int, _frame: FrameType | None):
        self.received.append(number)
        for each in HANDLED:  # a second one quits at once
            signal.signal(each, signal.SIG_DFL)
        if not self.deferred:
            raise KeyboardInterrupt


INTERRUPT = Interrupt()


@contextlib.contextmanager
def handle_interrupts() -> Generator[Interrupt]:
    """While entered, a signal raises KeyboardInterrupt; the yielded object knows which came."""
    INTERRUPT.received.clear()
    handlers = {number: signal.signal(number, INTERRUPT) for number in HANDLED}
    try:
        yield INTERRUPT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_interrupts() -> Generator[None]:
    """The block is not interrupted, but at its end: PyTorch aborts if its loading is."""
    INTERRUPT.deferred = True
    try:
        yield
    finally:
        INTERRUPT.deferred = False
    if INTERRUPT.received:
        raise KeyboardInterrupt


class StopRequest:
    """While entered, `signal` is 0 until one arrives, and then its number."""

    def __init__(self):
        self.signal = 0
        self.handlers = {}

    def __enter__(self):
        for number in HANDLED:
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame: FrameType | None):
        if self.signal:  # the second: as if nobody had listened
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signal = number
        # print() could be interrupted inside itself and refuse to be entered again
        with contextlib.suppress(OSError):  # a reader that the same Ctrl-C has ended
            text = b"\nstopping: saving after this step (a second Ctrl-C quits at once)\n"
            os.write(sys.stderr.fileno(), text)
