"""A folder that is there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from common.errors import FULL, UserError
from common.files import sync_directory


@contextlib.contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """A hidden folder, to be filled, which is `target` where the block ends well.

    Where it does not, or the disk is full, nothing is left of it. Raises UserError if something
    has this name, and OSError.
    """
    refuse_taken(target)
    hidden = target.with_name(f".{target.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill has left
    try:
        hidden.mkdir(parents=True)
        yield hidden
        for place, _, names in os.walk(hidden):
            for name in names:
                sync_file(Path(place, name))
            sync_directory(Path(place))
        refuse_taken(target)  # by somebody else, meanwhile
        os.rename(hidden, target)
        sync_directory(target.parent)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError):
            explain(error, hidden, target)
        raise


def explain(error: OSError, hidden: Path, target: Path):
    """Raises what an error says in words of the folder that was to be made, with what to do."""
    file = str(error.filename or hidden).replace(str(hidden), str(target))  # a write() names none
    if error.errno in FULL:
        raise OSError(error.errno, error.strerror, file) from None
    if Path(file).is_relative_to(target):
        raise UserError(f"{file}: {error.strerror}; choose a folder that can be written") from None


def refuse_taken(folder: Path):
    """Raises UserError unless a folder may be made here; an empty one may be taken."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists; choose another name, or remove it")


def sync_file(file: Path):
    """Waits until the disk has a file. Raises OSError that names it."""
    with file.open("rb+") as stream:
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from None
