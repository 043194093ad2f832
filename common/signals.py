"""What Ctrl-C, SIGTERM and their like do: leave at once, after a section, or after this step.

`handle_interrupts` turns them into KeyboardInterrupt for a whole program, `defer_interrupts` keeps
that out of a section that must not be cut, and `StopRequest` lets the training loop end by itself.
A second Ctrl-C or SIGTERM quits at once. Standard library only.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator
from types import FrameType

INSISTENT = (signal.SIGINT, signal.SIGTERM)
# a terminal that closes, a batch system's warning, its limit of processor time: these come more
# than once, and SIGTERM may follow, so that a second one is no wish to quit; Windows lacks them
WARNINGS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
HANDLED = (*INSISTENT, *(getattr(signal, name) for name in WARNINGS if hasattr(signal, name)))


def listen(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> dict:
    """Gives the signals to `handler`; returns the handlers before.

    One that is ignored stays so, as nohup has it of SIGHUP; but for Ctrl-C, which a shell lets a
    program ignore that it starts in the background.
    """
    heard = [n for n in HANDLED if n in INSISTENT or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class Interrupt:
    """The handler that raises KeyboardInterrupt, at once or at the end of a deferred section.

    launched: as StopRequest has it; what others wait for is not cut by a second signal.
    """

    def __init__(self):
        self.received: list[int] = []
        self.deferred = self.launched = False

    def __call__(self, number: int, _frame: FrameType | None):
        self.received.append(number)
        for each in () if self.launched else INSISTENT:  # a second one quits at once
            signal.signal(each, signal.SIG_DFL)
        if len(self.received) == 1 and not self.deferred:
            raise KeyboardInterrupt


INTERRUPT = Interrupt()


@contextlib.contextmanager
def handle_interrupts() -> Generator[Interrupt]:
    """While entered, a signal raises KeyboardInterrupt; the yielded object knows which came."""
    handlers = listen(INTERRUPT)
    try:
        yield INTERRUPT
    finally:
        INTERRUPT.received.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_interrupts() -> Generator[None]:
    """The block is interrupted at its end only: PyTorch aborts if its loading is, or goes on."""
    before, INTERRUPT.deferred = INTERRUPT.deferred, True
    try:
        yield
    finally:
        INTERRUPT.deferred = before
    if INTERRUPT.received and not before:
        raise KeyboardInterrupt


class StopRequest:
    """While entered, `signal` is 0 until one arrives, and then its number.

    launched: by a launcher, which passes signals on, perhaps twice, and kills what does not end: a
    second one does not quit then. silent: says nothing of it.
    """

    def __init__(self, launched: bool = False, silent: bool = False):
        self.launched, self.silent = launched, silent
        self.signal = 0
        self.insisted = False
        self.handlers = {}

    def __enter__(self):
        self.handlers = listen(self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame: FrameType | None):
        if (
            self.insisted and number in INSISTENT and not self.launched
        ):  # the second: as if nobody had listened
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.insisted |= number in INSISTENT
        if self.signal:
            return
        self.signal = number
        if self.silent:
            return
        again = "" if self.launched else " (a second Ctrl-C quits at once)"
        # print() could be interrupted inside itself and refuse to be entered again
        with contextlib.suppress(OSError):  # a reader that the same Ctrl-C has ended
            os.write(sys.stderr.fileno(), f"\nstopping: saving after this step{again}\n".encode())
