"""Files that are there whole or not at all, and files that notice when they were changed.

The standard library only. Checkpoints, prepared data and metrics are written with these. And what
is wrong with files that people give, before they are read.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

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
    if not stat.S_ISREG(file.stat().st_mode):  # a device may never end
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
    write_hashed(path, [content])


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """The same for pieces that are made while it is written; returns its size and its sha256."""
    size, digest = 0, hashlib.sha256()
    try:
        with open(path, "wb", opener=no_follow) as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a failed write does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from None
    return size, digest.hexdigest()


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
        self.file = open(path, "a+b", 0, opener=no_follow)  # noqa: SIM115, closed in close()
        self.size = os.fstat(self.file.fileno()).st_size

    def keep_at(self, path: Path):
        """Its name by now, where it is written anew if somebody has removed it. Raises OSError."""
        self.path = path
        if path.exists():
            return
        self.file.seek(0)
        written = self.file.read(self.size)
        path.parent.mkdir(exist_ok=True)
        write_synced(path, written)
        self.file.close()
        self.file = open(path, "a+b", 0, opener=no_follow)  # noqa: SIM115
        self.partial, self.size = False, len(written)

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


# Files that people give ---------------------------------------------------------------------------


FILE = "file://"


def user_path(path: Path | str) -> Path:
    """A path that a user wrote, with ~ as the home folder: no shell expands it in --flag=~/x.

    file:// before an absolute path is dropped.

    A Path is left alone: it has been through here, or it is the program's own.
    """
    return path if isinstance(path, Path) else Path(os.path.expanduser(path.removeprefix(FILE)))


URL = re.compile(r"[A-Za-z][\w+.-]+://")

# how files begin that hold no text
BINARY = {
    b"\x1f\x8b": "a gzip file", b"PK\3\4": "a zip file", b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file", b"\x28\xb5\x2f\xfd": "a zstd file", b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file", b"%PDF": "a PDF", b"SQLite format 3\0": "an SQLite database",
    b"\xff\xfe\0\0": "in UTF-32", b"\xff\xfe": "in UTF-16", b"\xfe\xff": "in UTF-16",
}  # fmt: skip
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # what no 8-bit encoding has in its texts


def is_address(path: str) -> bool:
    """Whether a path, as it was given, is one of an object store or of the web."""
    return bool(URL.match(path)) and not path.startswith(FILE)


def refuse_url(path: str, where: str):
    """Raises UserError, which begins with `where`, if a path, as it was given, is a URL.

    A `Path` would drop one of its slashes.
    """
    if is_address(path):
        raise UserError(f"{where}: a URL is not a file; download it and give the file's path")


def refuse_no_file(path: str, where: str, once: bool = False):
    """Raises UserError, which begins with `where`, for a path that no file or folder has.

    once: it is read only once, so that it may be a pipe.
    """
    place = user_path(path)
    refuse_url(path, where)
    if os.path.isfile(place) or os.path.isdir(place):
        return
    if not once and (path == "-" or os.path.exists(place)):
        raise UserError(
            f"{where}: a pipe or a device cannot be read twice; write it to a file and give its "
            "path"
        )
    if not os.path.exists(place):
        from_here = "" if os.path.isabs(place) else f" in {os.getcwd()}"
        raise UserError(f"{where}: no such file{from_here}; fix the path")


def refuse_binary(head: bytes, where: str):
    """Raises UserError, which begins with `where`, if a file that begins so cannot be text."""
    what = next((name for magic, name in BINARY.items() if head.startswith(magic)), "")
    if 10 * head.count(0) > len(head):
        what = what or "a binary file or in UTF-16 (many of its bytes are 0)"
    try:
        codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        if CONTROL.search(head):
            what = what or "a binary file (it has control characters)"
    if what:
        raise UserError(f"{where}: is {what}, not UTF-8 text; save its text as UTF-8")


def has_old_lines(head: bytes) -> bool:
    """Whether lines end in \\r alone, as nothing here reads them, where a file begins so."""
    return b"\r" in head.rstrip(b"\r") and b"\n" not in head
