"""What every command line of the project shares: flags from a dataclass, errors in one line."""

import os
import re
import sys

from model.config import UserError

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def parse(arguments: type, description: str, default=None, argv: list[str] | None = None):
    """An instance of the dataclass `arguments`: the command line on top of `default`.

    A wrong flag ends the program with status 2 and the nearest flag's name.
    """
    import tyro  # here, because it takes a tenth of a second, which not every program has to spend

    default = arguments() if default is None else default
    return tyro.cli(
        arguments, description=description, default=default, args=argv, use_underscores=True
    )


def run(program: str, main) -> int:
    """Calls main() and returns its exit status: 2 and one line on stderr for a user's mistake."""
    for name in ("stdin", "stdout", "stderr"):  # closed ones are None
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no error
        stream.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has gone: nothing more can be said
        mute()
        return 141
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print(
            f"{program}: out of memory: lower train.batch_size, raise train.accumulation_steps, "
            f"or choose a smaller model ({str(error).splitlines()[0][:150]})",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # a full disk, a path that cannot be
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def mute():
    """Sends stdout nowhere, so that what is still buffered raises nothing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def visible(text: str) -> str:
    """Text without control characters, which could command a terminal: as \\x1b and the like."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
