"""What every command line of the project shares: flags from a dataclass, errors in one line."""

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

from common import cuda
from common.errors import UserError
from common.signals import handle_interrupts

ANSI = re.compile("\x1b\\[[0-9;]*m")
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# how tyro calls a part of the settings, and what it says of flags
PART = re.compile(r"Error parsing (?:Arguments|sampling|settings)?\.?(\w*): ")
CHOICE = re.compile(r"[Ii]nvalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.")
T = TypeVar("T")

# what PyTorch and the libraries below it say, in RuntimeErrors, where memory is full
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|std::bad_alloc|OUT_OF_MEMORY"
    r"|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED|CU[A-Z]+_STATUS_ALLOC_FAILED"
    r"|ALLOCATION_FAILED|CUFFT_ALLOC_FAILED|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"
    r"|NVML_SUCCESS == .*CUDACachingAllocator",  # it failed to say by how much
    re.DOTALL,
)
# what a program's user can do about it
LESS_MEMORY = {
    "train.py": "lower train.batch_size, raise train.accumulation_steps or add "
    "--train.checkpoint_activations; python -m tools.preflight finds the micro-batch that fits",
    "generate.py": "write fewer texts at once (--num_samples) or shorter ones (--max_new_tokens), "
    "or use a smaller model",
}
# other ways in which the machine fails a program: what torch says, and what to do
MACHINE = {
    "no kernel image is available": "this PyTorch has no code for this GPU; install one that has "
    f"it ({cuda.INSTALL}), or use --device cpu",
    "devices are busy or unavailable": "another process has this GPU for itself; wait until it "
    "ends, or use another --device",
    "driver on your system is too old": "update the NVIDIA driver, or use --device cpu",
    "Found no NVIDIA driver": "install the NVIDIA driver, or use --device cpu",
}


def parse(
    arguments: type[T], description: str, default: T | None = None, argv: list[str] | None = None
) -> T:
    """An instance of the dataclass `arguments`: the command line on top of `default`.

    A wrong flag ends the program with status 2 and the nearest flag's name.
    """
    import tyro  # here, because it takes a tenth of a second, which not every program has to spend

    default = arguments() if default is None else default
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                arguments, description=description, default=default, args=argv, use_underscores=True
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UserError(unboxed(output.getvalue())) from None


def unboxed(box: str) -> str:
    """What tyro says in a box, in a line: what is wrong, and the nearest flag if it names one."""
    box = ANSI.sub("", box)
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rules = [i for i, line in enumerate(lines) if line.startswith("──")] or [len(lines)]
    text = " ".join(lines[: rules[0]])
    if part := PART.match(text):  # our own checks name fields, and the user gave flags
        table = f"{part[1]}." if part[1] else ""
        text = re.sub(r"(^|; )([\w.]+ = )", rf"\1--{table}\2", text[part.end() :])
    text = CHOICE.sub(r"\2 \1: must be one of \3", text.removeprefix("Error parsing "))
    text = text.replace("invalid literal for int() with base 10:", "must be an integer, not")
    text = text.replace("could not convert string to float:", "must be a number, not")
    near = [line for line in lines[rules[0] + 1 :] if line.startswith("--")]
    if near:
        text += f"; see {near[0]}"
    elif text.startswith("Unrecognized options"):
        text += "; see --help"
    return text or " ".join(box.split())


class Parser(argparse.ArgumentParser):
    """argparse for small programs: a wrong flag is one line. Subparsers are of the same kind."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(program: str, main: Callable[[], int | None]) -> int:
    """Calls main() and returns its exit status: 2 and one line on stderr for a user's mistake.

    Ctrl-C and SIGTERM unwind the program, so that nothing half made is left: 130 and 143.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed ones are None
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no error
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    with handle_interrupts() as interrupt:
        try:
            return main() or 0
        except UserError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader, `head` say, has gone: nothing more can be said
            mute()
            return 141
        except BaseException as error:
            # half an import, say, may make something else of an interrupt
            if interrupt.received or isinstance(error, KeyboardInterrupt):
                return 128 + (interrupt.received or [signal.SIGINT])[0]
            if not (reason := explain_error(error, program)):
                raise
            print(f"{program}: {reason}", file=sys.stderr)
            return 2


def explain_error(error: BaseException, program: str = "") -> str:
    """What the machine, not the program, is to be blamed for, in one line; "" for a bug."""
    first = (str(error).splitlines() or [""])[0]
    # an allocator's next sentences say which process has what, and which variable to try
    first = re.split(r"(?<=\.) (?=Including|Process|Of the|If reserved|See )", first)[0][:200]
    if is_out_of_memory(error):
        advice = LESS_MEMORY.get(program, "use a smaller model or fewer examples at once")
        return f"out of memory ({first.rstrip('. ')}); {advice}"
    if isinstance(error, RuntimeError):
        for said, advice in MACHINE.items():
            if said in str(error):
                return f"{first.rstrip('. ')}; {advice}"
    if isinstance(error, OSError):  # a full disk, a path that cannot be
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = error.strerror or first or type(error).__name__
        return f"{where}{what}" + ("; free some disk space and try again" if full else "")
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full, of the machine or of its GPU; PyTorch's own is a RuntimeError."""
    if isinstance(error, RuntimeError):
        return bool(OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError)


def mute():
    """Sends stdout nowhere, so that what is still buffered raises nothing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text: str) -> str:
    """Text without control characters, which could command a terminal: as \\x1b and the like."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
