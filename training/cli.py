"""What every command line of the project shares: flags from a dataclass, errors in one line."""

import os
import sys

import tyro

from model.config import UserError


def parse(arguments: type, description: str, default=None, argv: list[str] | None = None):
    """An instance of the dataclass `arguments`: the command line on top of `default`.

    A wrong flag ends the program with status 2 and the nearest flag's name.
    """
    default = arguments() if default is None else default
    return tyro.cli(
        arguments, description=description, default=default, args=argv, use_underscores=True
    )


def run(program: str, main) -> int:
    """Calls main() and returns its exit status: 2 and one line on stderr for a user's mistake."""
    try:
        return main() or 0
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has gone: nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
