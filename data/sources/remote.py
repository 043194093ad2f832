"""Files in an object store or on the web, by addresses that fsspec understands.

They are read in blocks, by requests of their own: each has a time limit and is tried again with
growing pauses, so that a connection that is cut or hangs costs one block. block_cache.py keeps the
blocks. What a file is, is told by what its store says of it (its etag, say), without reading.
"""

import glob
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from common.errors import UnreadableError, UserError
from data.sources.block_cache import BlockCache
from data.sources.spool import spool

T = TypeVar("T")
BLOCK = 1 << 22  # bytes that are fetched at once
AHEAD = 8  # blocks that are fetched before they are asked for, where a file is read from its start
PIECE = 1 << 20  # bytes of a file in memory
# of a request: seconds that it may take, and that a listing may; how often it is tried where what
# is wrong may be the address, and where it is known; seconds before the second, and the most
TIMEOUT, LISTING = 30.0, 300.0
FIRST_TRIES, TRIES = 3, 8
PAUSE, MAX_PAUSE = 1.0, 30.0

VARIABLE = re.compile(r"\$\{(\w+)\}")
# what a store says of a file's content, or failing that of its time, by which a change is noticed
IDENTITY = (
    "sha256", "blob_id", "md5Hash", "content_md5", "Content-MD5", "ETag", "etag", "e_tag",
    "generation", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip


# Addresses ----------------------------------------------------------------------------------------


def has_magic(address: str) -> bool:
    """Whether an address is a pattern. On the web, a question mark begins a query."""
    if address.startswith("http"):
        return any(mark in urlsplit(address).path for mark in "*[")
    return glob.has_magic(address)


def name_of(address: str) -> PurePosixPath:
    """Where a file is in its store, for its name and suffix."""
    place = urlsplit(address).path if address.startswith("http") else address.split("://", 1)[1]
    return PurePosixPath(place)


def connect(address: str, where: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of an address, with ${NAME} from the environment.

    Raises UserError, which begins with `where`, if the system is not known or not installed.
    """
    missing = [name for name in VARIABLE.findall(address) if name not in os.environ]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not in the environment; set it there")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(
            f"{where}: fsspec is not installed; install it with pip install -e '.[remote]'"
        ) from None
    full = VARIABLE.sub(lambda match: os.environ[match[1]], address)
    try:
        # no lists of what was there: a file may be asked for again because it may have changed
        return url_to_fs(full, use_listings_cache=False)
    except ImportError as error:
        scheme = address.split("://")[0]
        more = "pip install -e '.[remote]'" if scheme in ("s3", "s3a", "http", "https") else ""
        raise UserError(
            f"{where}: a package for {scheme}:// is missing ({error}); install it"
            + (f" with {more}" if more else "")
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: {hidden(str(error), address)}; fix the address") from None


def hidden(text: str, address: str) -> str:
    """A text without what the environment's variables in an address stand for."""
    for name in VARIABLE.findall(address):
        if value := os.environ.get(name):
            text = text.replace(value, f"${{{name}}}")
    return text


# Failures -----------------------------------------------------------------------------------------


class Failure(UnreadableError):
    """What a store has refused, such as a file that it has not: trying again is of no use."""


def persist(
    action: Callable[[], T],
    where: str,
    address: str,
    log: Callable[[str], object],
    tries: int,
) -> T:
    """What `action` returns, which is tried again where that may help.

    Raises UnreadableError, which begins with `where`: what is kept here of it may be sound.
    """
    for number in range(1, tries + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each system has its own
            reason, fix = explain(error)
            reason = hidden(" ".join(reason.split())[:300], address)
            if fix or number == tries:
                often = "" if fix else f" after {number} tries"
                kind = UnreadableError if often else Failure
                problem = OSError(0, f"{reason}{often}")
                raise kind(problem, where, fix or "check the network and the address") from None
            if number == 1:
                log(f"note: {where}: {reason}; trying again")
            pause = min(MAX_PAUSE, PAUSE * 2.0 ** (number - 1))
            time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311, not a secret
    raise AssertionError


def explain(error: Exception) -> tuple[str, str]:
    """(what is wrong, what to do about it; "" where it may help to try again)."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # of HTTP, where this is said of every failure
        if type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError):
            error = cause if isinstance(cause, Exception) else error
    if isinstance(error, NotImplementedError):
        return "cannot be written", "give the address of an object store"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s", ""
    response: Any = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        said = f" ({error})" if "The specified" in str(error) else ""
        return f"there is no such file, folder or bucket{said}", "fix the address"
    name = type(error).__name__
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in name:
        said = f"{status} {getattr(error, 'message', '')}" if status else f"{error}"
        return (
            f"access refused ({said.strip() or name})",
            "set the credentials",
        )
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return f"refused with status {status}", "fix the address"
    if isinstance(error, ValueError) or name == "ParamValidationError":
        return str(error) or name, "fix the address"
    return str(error) or name, ""


# Files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """Where blocks of remote files are kept, and who is told of what."""

    folder: Path
    blocks: BlockCache
    log: Callable[[str], object]

    @classmethod
    def of(cls, cache: Path, gigabytes: float, log: Callable[[str], object]) -> "Store":
        """The store in the folder for prepared data."""
        cache = Path(cache)
        return cls(cache, BlockCache(cache / "remote", gigabytes * 1e9, log), log)


@dataclass(frozen=True)
class RemoteFile:
    """A file with what is asked of a local file's `Path`. As text it is its address."""

    address: str  # ${NAME} in it stands for a variable of the environment
    size: int
    identity: str  # of its content, as its store tells it
    store: Store = field(compare=False, repr=False)
    block: int = field(default_factory=lambda: BLOCK)  # bytes that are fetched at once

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return name_of(self.address).name

    @property
    def suffixes(self) -> list[str]:
        return name_of(self.address).suffixes

    @property
    def key(self) -> str:
        """Its folder in the cache of blocks: another one when its content changes."""
        told = f"{self.address}\n{self.size}\n{self.identity}\n{self.block}"
        return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()

    def open(self, mode: str = "rb", buffering: int = PIECE) -> io.BufferedReader:
        """Its bytes, from any place on."""
        assert mode == "rb"
        return io.BufferedReader(RemoteStream(self), buffering)

    def fetch(self, number: int) -> bytes:
        """One of its blocks. Raises UserError."""
        system, path = connect(self.address, self.address)
        first = number * self.block
        last = min(first + self.block, self.size)

        def get() -> bytes:
            data = system.cat_file(path, start=first, end=last, **limited(system, TIMEOUT))
            if len(data) != last - first:
                raise OSError(f"{len(data):,} bytes instead of {last - first:,}")
            return data

        return persist(get, self.address, self.address, self.store.log, TRIES)

    def stamp(self) -> tuple[int, str]:
        """(size, identity) of what is there now. Raises UserError."""
        _, path = connect(self.address, self.address)
        now = look(self.address, path, self.address, self.store.log, TRIES)
        return now.get("size") or 0, identify(now)


class RemoteStream(io.RawIOBase):
    """A remote file as bytes from its beginning to its end, or from any place on."""

    def __init__(self, file: RemoteFile):
        self.file, self.at, self.previous = file, 0, -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.file.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer) -> int:
        """Reads up to the end of a block. What goes on where it left off reads ahead."""
        if self.at >= self.file.size:
            return 0
        number, first = divmod(self.at, self.file.block)
        cache = self.file.store.blocks
        if number == self.previous + 1 and number:
            last = -(-self.file.size // self.file.block)
            cache.ahead(self.file, range(number, min(number + AHEAD, last)))
        self.previous = number
        data = cache.read(self.file, number, first, first + len(buffer))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def limited(system: Any, seconds: float) -> dict[str, float]:
    """The time limit of a call, where the system takes one; the others have their own."""
    return {"timeout": seconds} if getattr(system, "async_impl", False) else {}


def look(address: str, path: str, where: str, log, tries: int = FIRST_TRIES) -> dict:
    """What a store says of a file or a folder. Raises UserError."""
    system, _ = connect(address, where)
    get = lambda: system.info(path, **limited(system, TIMEOUT))  # noqa: E731
    return persist(get, where, address, log, tries)


def identify(info: dict) -> str:
    """What tells a file's content from others, of what its store says; "": nothing does."""
    lfs = info.get("lfs")
    known = {**info, **(lfs if isinstance(lfs, dict) else {})}
    name = next((name for name in IDENTITY if known.get(name)), "")
    return f"{name} {str(known[name]).strip(chr(34))}" if name else ""


def find(address: str, where: str, store: Store) -> dict[str, RemoteFile | Path]:
    """The files at an address, by their names below it: a file, a folder's, a pattern's.

    The name of a file that was itself given is "". One that cannot be read in pieces, or is not
    known by anything, is copied to the disk. Raises UserError, which begins with `where`.
    """
    system, path = connect(address, where)
    if has_magic(address):
        limit = limited(system, LISTING)
        listed = persist(
            lambda: system.glob(path, detail=True, **limit), where, address, store.log, FIRST_TRIES
        )
        listed = {name: info for name, info in listed.items() if info["type"] == "file"}
        if not listed:
            base = re.split(r"[*?[]", path)[0].rpartition("/")[0]
            if base and not address.startswith("http"):  # of which a folder need not be a page
                look(address, base, where, store.log)
            raise UserError(f"{where}: no file matches it; fix the pattern")
    else:
        info = look(address, path, where, store.log)
        if info["type"] == "file":
            return {"": as_file(address, path, info, where, store)}
        limit = limited(system, LISTING)
        listed = persist(
            lambda: system.find(path, detail=True, **limit), where, address, store.log, FIRST_TRIES
        )
    found = {}
    base = path.rstrip("/") + "/"
    for name, info in sorted(listed.items(), key=lambda item: PurePosixPath(item[0]).parts):
        shown = hidden(system.unstrip_protocol(name), address)
        if info.get("size") is None:  # a web server's list of files has only their names
            info = look(shown, name, where, store.log)
        found[name.removeprefix(base)] = as_file(shown, name, info, where, store)
    return found


def as_file(address: str, path: str, info: dict, where: str, store: Store) -> RemoteFile | Path:
    """A file that is read in pieces, or its copy. Raises UserError."""
    size, identity = info.get("size"), identify(info)
    if size is not None and identity and in_pieces(address, path, size, where, store):
        return RemoteFile(address, size, identity, store)
    system, _ = connect(address, where)
    store.log(f"{where}: the server does not send pieces; copying all of it to {store.folder}")

    def copy() -> Path:
        with system.open(path, "rb", block_size=0) as file:
            return spool(file, store.folder, name_of(address).name or "download")

    return persist(copy, where, address, store.log, FIRST_TRIES)


def in_pieces(address: str, path: str, size: int, where: str, store: Store) -> bool:
    """Whether a server sends a part of a file; stores do, not all on the web do."""
    if not address.startswith("http") or size < 2:
        return True
    system, _ = connect(address, where)

    def probe() -> bool:
        with system.open(path, "rb", size=size, cache_type="none", block_size=PIECE) as file:
            file.seek(1)
            try:
                return len(file.read(1)) == 1
            except ValueError:  # fsspec's, for a server that sends all of it
                return False

    return persist(probe, where, address, store.log, FIRST_TRIES)
