"""What every command line of the project shares: flags from a dataclass, errors in one line."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from common import cuda
from common.errors import FULL, UserError
from common.files import user_path
from common.signals import INTERRUPT, handle_interrupts

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# how tyro calls a part of the settings, and what it says of flags
PART = re.compile(r"Error parsing (?:Arguments|sampling|settings)?\.?([\w.]*): ")
CHOICE = re.compile(r"[Ii]nvalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.")
NUMBERS = {  # what Python and argparse say of numbers: in plain words
    "invalid literal for int() with base 10:": "must be a whole number, found",
    "could not convert string to float:": "must be a number, found",
    "invalid int value:": "must be a whole number, found",
    "invalid float value:": "must be a number, found",
}
RULE = re.compile(r"^ *-{9,} *$", re.MULTILINE)  # between the parts of an error of tyro's
NARROWEST = 40  # columns of --help: tyro does not end in fewer than 5
YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0"}
T = TypeVar("T")

# what PyTorch and the libraries below it say, in RuntimeErrors, where memory is full
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|allocate memory|std::bad_alloc|OUT_OF_MEMORY"
    r"|CU(BLAS|DNN)_STATUS_NOT_INITIALIZED|CU[A-Z]+_STATUS_ALLOC_FAILED"
    r"|ALLOCATION_FAILED|CUFFT_ALLOC_FAILED|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"
    r"|NVML_SUCCESS == .*CUDACachingAllocator"  # it failed to say by how much
    r"|could not (create|execute) a (primitive|memory)",  # oneDNN, which has no other words for it
    re.DOTALL,
)
# what a program's user can do about it
LESS_MEMORY = {
    "train.py": "lower train.batch_size, raise train.accumulation_steps or add "
    "--train.checkpoint_activations; python -m tools.preflight finds the micro-batch that fits",
    "generate.py": "write fewer texts at once (--num_samples) or shorter ones (--max_new_tokens), "
    "or use a smaller model",
    "evaluate.py": "lower --batch_size or --beams, or use a smaller model",
    "a save": "free some memory",
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
    argv = sys.argv[1:] if argv is None else argv
    helps, output = not {"-h", "--help"}.isdisjoint(argv), io.StringIO()
    # an error is laid out without colours, without lines of characters that a terminal may lack
    # (what is no terminal has neither), and without a break
    wide = max(NARROWEST, shutil.get_terminal_size().columns) if helps else 10_000
    shown = sys.stdout if helps else output
    try:
        with columns(wide), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(output):
            return tyro.cli(
                arguments, description=description, default=default, args=argv, use_underscores=True
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        box = output.getvalue()
        raise UserError(explain_stray(box, argv, arguments) or unboxed(box)) from None


@contextlib.contextmanager
def columns(number: int) -> Generator[None]:
    """Has whatever asks for the width of the terminal told this one."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def explain_stray(box: str, argv: list[str], arguments: Any) -> str:
    """What a value that belongs to no flag was meant for, and how to give it; "" if unknown."""
    if "Unrecognized options" not in box:
        return ""
    words = [word for argument in argv for word in argument.split("=", 1) if word]
    names = {field.name for field in dataclasses.fields(arguments)}
    stray = {w for w in words if re.search(rf"(options: |, ){re.escape(w)}(,| *$)", box, re.M)}
    for before, value in zip(["", *words], words, strict=False):
        if value not in stray:
            continue  # it was taken
        # a flag that there is not is stray itself
        if before.startswith("--") and before not in stray and value.lower() in YES_OR_NO:
            table, dot, name = before[2:].rpartition(".")
            off = f"--{table}{dot}no-{name.removeprefix('no_')}"
            return f"{before}: takes no value, found {value!r}; give {before}, or {off} for no"
        flags = ("config",) if value.endswith(".toml") else ("checkpoint", "resume")
        for flag in names.intersection(flags):
            if flag == "config" or os.path.isdir(user_path(value)):  # False for what no name can be
                return f"{value}: belongs to no flag; give --{flag} {quoted(value)}"
    return ""


def unboxed(box: str) -> str:
    """What tyro says in a box, in a line: what is wrong, and the nearest flag if it names one."""
    parts = [" ".join(line.strip() for line in part.splitlines()) for part in RULE.split(box)]
    text = parts[min(1, len(parts) - 1)].strip()  # after the title
    if part := PART.match(text):  # our own checks name fields, and the user gave flags
        table = f"{part[1]}." if part[1] else ""
        text = re.sub(r"(^|; )([\w.]+ = )", rf"\1--{table}\2", text[part.end() :])
    text = CHOICE.sub(r"\2 \1: must be one of \3", text.removeprefix("Error parsing "))
    text = plain_numbers(text)
    near = re.search(r"^ +(--\S.*?)(  |$)", RULE.sub("", box), re.MULTILINE)
    if near:
        text += f"; see {near[1].strip()}"
    elif text.startswith("Unrecognized options"):
        text += "; see --help"
    return text


def plain_numbers(text: str) -> str:
    """What is said of a wrong number, in plain words."""
    for said, plain in NUMBERS.items():
        text = text.replace(said, plain)
    return text


def quoted(path: Path | str) -> str:
    """A path in a command that people are to paste: for the shell, and for our own flags."""
    text = f"{'./' if str(path)[:1] in '-~' else ''}{path}"
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


class Parser(argparse.ArgumentParser):
    """argparse for small programs: a wrong flag is one line. Subparsers are of the same kind."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register("type", Path, user_path)

    def error(self, message: str) -> NoReturn:
        message = plain_numbers(message.removeprefix("argument "))
        raise UserError(message)


def run(program: str, main: Callable[[], int | None]) -> int:
    """Calls main() and returns its exit status: 2 and one line on stderr for a user's mistake.

    A signal n of `common.signals` unwinds the program, so that nothing half made is left: 128 + n.
    One of several processes that fails does not return, but ends with its status.
    """
    try:
        status = run_alone(program, main)
    except BaseException as error:
        if not INTERRUPT.launched:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        status = code if isinstance(code, int) else int(code is not None)
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
    if status and INTERRUPT.launched:
        # Threads that still send for PyTorch may let go of tensors, for which they need Python's
        # lock. Up to Python 3.13, who asks for that while the interpreter ends is unwound, which
        # C++ answers with abort(): a launcher would be told of SIGABRT, not of this status.
        flush()
        os._exit(status)
    return status


def run_alone(program: str, main: Callable[[], int | None]) -> int:
    """The exit status of a process that may be the only one; raises what is a bug."""
    for name in ("stdin", "stdout", "stderr"):  # closed ones are None
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no error
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    with handle_interrupts() as interrupt:
        try:
            status = main() or 0
            # main() may take a Ctrl-C for the end of its work, but no other signal
            if interrupt.received and interrupt.received[0] != signal.SIGINT:
                status = 128 + interrupt.received[0]
        except UserError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader, `head` say, has gone: nothing more can be said
            mute(sys.stdout)
            return 141
        except BaseException as error:
            # half an import, say, may make something else of an interrupt
            if interrupt.received or isinstance(error, KeyboardInterrupt):
                status = 128 + (interrupt.received or [signal.SIGINT])[0]
            elif reason := explain_error(error, program):
                print(f"{program}: {reason}", file=sys.stderr)
                return 2
            else:
                raise
        if status > 128:
            flush()
        return status


def flush():
    """Writes what is left; what cannot be, to a terminal that has closed, changes no status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            mute(stream)


def explain_error(error: BaseException, program: str = "") -> str:
    """What the machine, not the program, is to be blamed for, in one line; "" for a bug."""
    first = (str(error).splitlines() or [""])[0]
    # an allocator's next sentences say which process has what, and which variable to try
    first = re.split(r"(?<=\.) (?=Including|Process|Of the|If reserved|See )", first)[0][:200]
    if is_out_of_memory(error):
        advice = LESS_MEMORY.get(program, "use a smaller model or fewer examples at once")
        detail = f" ({first.rstrip('. ')})" if first else ""  # Python's MemoryError has none
        return f"out of memory{detail}; {advice}"
    if isinstance(error, RuntimeError):
        for said, advice in MACHINE.items():
            if said in str(error):
                return f"{first.rstrip('. ')}; {advice}"
    if isinstance(error, OSError):  # a full disk, a path that cannot be
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in FULL
        what = error.strerror or first or type(error).__name__
        return f"{where}{what}" + ("; free some disk space and try again" if full else "")
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full, of the machine or of its GPU; PyTorch's own is a RuntimeError."""
    if isinstance(error, RuntimeError):
        return bool(OUT_OF_MEMORY.search(str(error)))
    return isinstance(error, MemoryError)


def mute(stream: TextIO):
    """Sends stdout or stderr nowhere, so that what is still buffered raises nothing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def visible(text: str) -> str:
    """Text without control characters, which could command a terminal: as \\x1b and the like."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
