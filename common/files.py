"""Files that are there whole or not at all, and files that notice when they were changed.

The standard library only. Checkpoints, prepared data and metrics are written with these.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path


def user_path(path: Path | str) -> Path:
    """A path that a user wrote, with ~ as the home folder: no shell expands it in --flag=~/x.

    A Path is left alone: it has been through here, or it is the program's own.
    """
    return path if isinstance(path, Path) else Path(os.path.expanduser(path))


# JSON files with a checksum -----------------------------------------------------------------------


def checksummed_json(content: dict) -> bytes:
    """The bytes of a JSON file that holds `content` and its own sha256."""
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json({**content, "sha256": digest})


def canonical_json(content: dict) -> bytes:
    """The one spelling of `content`, so that every changed byte of a file is noticed."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_checksummed_json(file: Path) -> dict:
    """What `checksummed_json` wrote, without the hash.

    Raises OSError, and ValueError for a damaged file. The hash detects accidents, not attackers:
    whoever can change a file can change its hash.
    """
    if file.exists() and not file.is_file():  # a device may never end
        raise ValueError("not a regular file")
    content = file.read_bytes()
    try:
        stored = json.loads(content)
        del stored["sha256"]
        whole = checksummed_json(stored) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("damaged, or not written by this project") from None
    if not whole:
        raise ValueError("damaged: it does not match its own sha256")
    return stored


def hash_file(path: Path) -> str:
    """Hex sha256 of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Durable writes -----------------------------------------------------------------------------------


def write_synced(path: Path, content: bytes):
    """Writes a file and waits until the disk has it. Raises OSError that names it."""
    try:
        with open(path, "wb", opener=no_follow) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a failed write does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from None


def no_follow(path: str, flags: int) -> int:
    """An `opener` that refuses symbolic links: a run from somebody else can hold any link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def replace_synced(path: Path, content: bytes):
    """Gives a file new content, all of it or none. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path):
    """Waits until the disk has a directory's entries. Windows cannot, and needs it less."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def set_aside(damaged: Path) -> Path:
    """Renames a damaged file or directory to `damaged_NAME_N`, so that nothing in it is lost."""
    number = 0
    while (aside := damaged.with_name(f"damaged_{damaged.name}_{number}")).exists():
        number += 1
    os.rename(damaged, aside)
    return aside


class AppendFile:
    """A file that grows by whole records. What cannot be written yet waits in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting = bytearray()
        self.partial = False  # whether half of a record may stand at the end
        self.file = open(path, "ab", 0, opener=no_follow)  # noqa: SIM115, closed in close()
        self.size = os.fstat(self.file.fileno()).st_size

    def write(self, record: bytes):
        """Takes a record; flush() writes it."""
        self.waiting += record

    def flush(self, sync: bool = False):
        """Writes what waits: all of it, or OSError and nothing. sync: until the disk has it."""
        try:
            if self.partial:
                self.truncate()
            rest = memoryview(bytes(self.waiting))
            self.partial = bool(rest)
            while rest:
                rest = rest[self.file.write(rest) :]
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self.truncate()
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.partial = False
        self.size += len(self.waiting)
        self.waiting.clear()

    def truncate(self):
        """Takes off what may be half a record. Raises OSError."""
        self.file.truncate(self.size)
        self.partial = False

    def close(self):
        try:
            self.flush()
        finally:
            self.file.close()
