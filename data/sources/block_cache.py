"""Blocks of remote files, kept on the disk: bounded in size, shared by all processes of a host.

A block is a file, followed by its own hash: written under another name and renamed, so that it is
there whole or not at all, and one that a power cut has damaged is fetched again. What was used
longest ago is removed first.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

HASH = 16  # bytes at the end of a block's file
THREADS = 16  # that fetch at once: a store answers many as fast as one
RECENT = 8  # blocks that stay in memory, so that a full disk costs time and nothing else
WAITING = 256  # blocks that may wait to be read ahead
MEASURED = 100  # the folder is measured whenever a part of its limit like this has been written
ROOM = 1 << 30  # bytes that are left free on the disk for others, such as checkpoints


class Blocks(Protocol):
    """What blocks are fetched of."""

    @property
    def key(self) -> str:
        """Names what it is, and as it is: the same content always, in all processes."""
        ...

    def fetch(self, number: int, /) -> bytes:
        """One block. Raises UserError where that cannot be done."""
        ...


class BlockCache:
    """Reads blocks by their number. Any number of threads and processes may do so at once."""

    def __init__(self, folder: Path, limit: float, log: Callable[[str], object]):
        """limit: bytes on the disk, of all processes together. The folder may not be there yet."""
        self.folder, self.limit, self.log = folder, limit, log
        self.lock = threading.Lock()
        self.recent: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self.whole: set[tuple[str, int]] = set()  # on the disk, as this process has seen
        self.pending: dict[tuple[str, int], Future] = {}
        self.work: SimpleQueue = SimpleQueue()
        self.threads = 0
        self.written = limit  # bytes since the folder was measured: as much as there may be
        self.stores = True

    def read(self, blocks: Blocks, number: int, first: int = 0, last: int | None = None) -> bytes:
        """The bytes [first, last) of a block. Raises UserError where it cannot be fetched."""
        place = blocks.key, number
        for _ in range(2):
            with self.lock:
                if (block := self.recent.get(place)) is not None:
                    self.recent.move_to_end(place)
                    return block[first:last]
                stored = place in self.whole
            if stored and (found := self.stored(place, first, last)) is not None:
                return found
            wait(self.begin(blocks, number))
        return blocks.fetch(number)[first:last]  # nothing could be kept

    def ahead(self, blocks: Blocks, numbers: Iterable[int]):
        """Has blocks fetched that will be read soon, in this order, as far as there is room."""
        for number in numbers:
            place = blocks.key, number
            with self.lock:
                known = place in self.whole or place in self.recent
                if len(self.pending) >= WAITING:
                    return
            if not known:
                self.begin(blocks, number)

    def begin(self, blocks: Blocks, number: int) -> Future:
        """Has a thread load a block, once for all who ask meanwhile."""
        place = blocks.key, number
        with self.lock:
            if found := self.pending.get(place):
                return found
            future = self.pending[place] = Future()
            self.work.put((blocks, place, future))
            if self.threads < min(THREADS, len(self.pending)):
                self.threads += 1
                # a daemon, because a program that ends does not wait for a store
                threading.Thread(target=self.serve, name="blocks", daemon=True).start()
        return future

    def serve(self):
        while True:
            blocks, place, future = self.work.get()
            try:
                self.load(blocks, place)
            except BaseException as error:
                outcome = error
            else:
                outcome = None
            with self.lock:
                del self.pending[place]
            if outcome is None:
                future.set_result(None)
            else:
                future.set_exception(outcome)

    def load(self, blocks: Blocks, place: tuple[str, int]):
        """Brings a block into memory, from the disk or from where it comes."""
        found, kept = b"", True
        with contextlib.suppress(OSError):
            found = self.path(place).read_bytes()
        block = found[:-HASH]
        if not found or hashed(block) != found[-HASH:]:
            block = blocks.fetch(place[1])
            kept = self.store(place, block)
        with self.lock:
            if kept:
                self.whole.add(place)
            self.recent[place] = block
            while len(self.recent) > RECENT:
                self.recent.popitem(last=False)

    # The disk ---------------------------------------------------------------------------------

    def path(self, place: tuple[str, int]) -> Path:
        return self.folder / place[0] / str(place[1])

    def stored(self, place: tuple[str, int], first: int, last: int | None) -> bytes | None:
        """The bytes [first, last) of a block that is on the disk; None: it is no more."""
        path = self.path(place)
        try:
            with path.open("rb", 0) as file:
                end = os.fstat(file.fileno()).st_size - HASH
                file.seek(first)
                found = file.read(max(0, min(end, end if last is None else last) - first))
            os.utime(path)  # when it was used
            return found
        except OSError:  # another process has removed it, say
            with self.lock:
                self.whole.discard(place)
            return None

    def store(self, place: tuple[str, int], block: bytes) -> bool:
        """Writes a block's file; False where the disk has no room for it."""
        path = self.path(place)
        part = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            with self.lock:
                self.written += len(block) + HASH
                if self.written > self.limit / MEASURED:
                    self.written = 0
                    self.make_room()
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < ROOM:
                raise OSError(None, f"less than {ROOM >> 30} GiB free")
            try:
                with part.open("wb") as file:
                    file.writelines((block, hashed(block)))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            if self.stores:  # said once
                self.stores = False
                self.log(
                    f"note: {self.folder}: {error.strerror or error}: what is fetched is not kept; "
                    "free some disk space, or set data.cache_dir"
                )
            return False
        return True

    def make_room(self):
        """Removes what was used longest ago, until a tenth of the limit is free."""
        found = []
        for folder in self.folder.glob("*/"):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= 0.9 * self.limit:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size


def hashed(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=HASH).digest()


def wait(future: Future):
    """Waits for a block, but not beyond the program's end."""
    while True:
        try:
            return future.result(1)
        except TimeoutError:  # none that fetch() raises, which are UserErrors
            if not threading.main_thread().is_alive():
                raise
