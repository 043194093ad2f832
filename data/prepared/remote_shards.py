"""Prepared data in an object store: its shards read in blocks, as far as a batch needs them.

Which batches come is known, so that the blocks of the next few steps are fetched while this one is
computed (data/batches.py). In an epoch's order neighbouring windows lie anywhere: blocks are small
where the cache on the disk cannot hold all of the data, and most are fetched for one window.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import UnreadableError, UserError
from common.files import read_checksummed_json, replace_synced
from data.prepared.encoding import ordered_map
from data.prepared.token_files import NAME, SUFFIXES, Shards, Split, file_sizes
from data.sources.remote import (
    BLOCK,
    FIRST_TRIES,
    LISTING,
    TIMEOUT,
    TRIES,
    Failure,
    RemoteFile,
    Store,
    connect,
    identify,
    limited,
    persist,
)

WHOLE_BLOCK = 1 << 20  # bytes fetched at once of data that the cache can hold
PART_BLOCK = 1 << 17  # and of what it cannot
SLOWEST = 1e6  # bytes a second of what is sent: less is taken for a stall
FETCHING = 8  # blocks at once while all of a file is read
SENT = "sent"  # stands in a hidden folder when all files of the folder have been sent


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of prepared data in an object store."""

    address: str
    store: Store

    def __str__(self) -> str:
        return self.address

    def broken(self, name: str, what: str, first: str = "remove it there, and ") -> UnreadableError:
        """What is wrong with a file in the store, which a new copy of it here does not mend."""
        again = f"prepare it again with python -m tools.prepare --to {self}"
        return UnreadableError(OSError(0, what), self.place(name).rstrip("/"), f"{first}{again}")

    def place(self, name: str) -> str:
        return f"{self.address.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """A small file. Raises UserError, and of it Failure where there is none."""
        address = self.place(name)
        system, path = connect(address, address)
        limit = limited(system, TIMEOUT)
        return persist(
            lambda: system.cat_file(path, **limit), address, address, self.store.log, FIRST_TRIES
        )

    def copy(self) -> Path | None:
        """A local folder with all but the shards, if this is one of prepared data.

        Raises UserError where the store cannot be reached.
        """
        try:
            connect(self.address, self.address)
        except UserError:  # open_source says so, and of which setting
            return None
        try:
            content = self.read("manifest.json")
        except Failure:
            return None
        if b'"splits":' not in content:
            return None
        folder = self.store.folder / f"prepared-{hashlib.sha256(content).hexdigest()[:16]}"
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (unfinished / "manifest.json").write_bytes(content)
            for name in read_checksummed_json(unfinished / "manifest.json")["files"]:
                if Path(name).name == name:
                    (unfinished / name).write_bytes(self.read(name))
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(unfinished, folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self}: manifest.json is damaged; write the folder again") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    # Writing ----------------------------------------------------------------------------------

    def mirror(self) -> Path:
        """The local folder in which it is prepared before it is sent.

        Raises UserError for what is no address.
        """
        connect(self.address, self.address)
        name = hashlib.sha256(self.address.rstrip("/").encode()).hexdigest()[:16]
        return self.store.folder / f"to-{name}"

    def send(self, file: Path):
        """Sends a file of the mirror, which is there whole or not at all. Raises UserError."""
        address = self.place(file.relative_to(self.mirror()).as_posix())
        system, path = connect(address, address)
        limit = limited(system, TIMEOUT + file.stat().st_size / SLOWEST)
        put = partial(system.put_file, str(file), path, **limit)
        persist(put, address, address, self.store.log, TRIES)

    def move_part(self, folder: Path):
        """Sends a part's files, its manifest last, and removes its shards here.

        So it goes on where it was ended: a shard that is not here any more has been sent.
        """
        shards = [file for file in sorted(folder.iterdir()) if NAME.match(file.name)]
        for file in tqdm(shards, "sending", unit="file", leave=False, disable=None):
            self.send(file)
            file.unlink()
        for name in read_checksummed_json(folder / "manifest.json")["files"]:
            self.send(folder / name)
        self.send(folder / "manifest.json")

    def refuse_half(self, folder: Path):
        """Removes a part here that has shards neither here nor there: somebody has removed them."""
        try:
            manifest = read_checksummed_json(folder / "manifest.json")
            shards = [s["name"] for split in manifest["splits"].values() for s in split]
        except (OSError, ValueError, KeyError):
            return
        there = {name.rpartition("/")[2] for name in self.names(f"{folder.name}/*")}
        names = {f"{shard}.{suffix}" for shard in shards for suffix in SUFFIXES[manifest["kind"]]}
        if names - there - {file.name for file in folder.iterdir()}:
            shutil.rmtree(folder)

    def names(self, pattern: str) -> list[str]:
        """The files that a pattern matches, by their names in it. Raises UserError."""
        address = self.place(pattern)
        system, path = connect(address, address)
        limit = limited(system, LISTING)
        found = persist(
            lambda: system.glob(path, **limit), address, address, self.store.log, FIRST_TRIES
        )
        return [name[len(path) - len(pattern) :] for name in sorted(found)]

    def fetch(self, name: str) -> bool:
        """Copies a small file into the mirror; False if there is none."""
        try:
            content = self.read(name)
        except Failure:
            return False
        file = self.mirror() / name
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_synced(file, content)
        return True

    def fetch_folder(self, name: str) -> bool:
        """Copies a folder that `send_folder` has sent into the mirror; False if there is none."""
        if not self.fetch(f".{name}/{SENT}"):
            return False
        unfinished = self.mirror() / f".{name}"
        for each in self.names(f"{name}/*"):
            (unfinished / Path(each).name).write_bytes(self.read(each))
        (unfinished / SENT).unlink()
        unfinished.rename(self.mirror() / name)
        return True

    def send_folder(self, folder: Path):
        """Sends a folder of small files, and then that it is there."""
        for file in sorted(folder.iterdir()):
            self.send(file)
        mark = self.mirror() / f".{folder.name}" / SENT
        mark.parent.mkdir(exist_ok=True)
        mark.write_bytes(b"\n")
        self.send(mark)

    # Reading ----------------------------------------------------------------------------------

    def listing(self) -> dict[str, dict] | None:
        """What the store says of each file below, by its name; None: it has no lists."""
        if self.address.startswith("http"):
            return None
        system, path = connect(self.address, self.address)
        find = partial(system.find, path, detail=True, **limited(system, LISTING))
        found = persist(find, self.address, self.address, self.store.log, FIRST_TRIES)
        return {name.removeprefix(path.rstrip("/") + "/"): info for name, info in found.items()}

    def files(
        self, kind: str, shards: list[dict], dtype: str, suffix: str, block: int = BLOCK
    ) -> list[RemoteFile]:
        """The files of shards. Raises UserError for one that is missing or has another size.

        What is kept of a file is not used for another that has been written in its place.
        """
        found, listing = [], self.listing()
        for shard in shards:
            name = f"{shard['name']}.{suffix}"
            size, identity = file_sizes(kind, shard, dtype)[suffix], shard["sha256"][suffix]
            if listing is not None:
                if name not in listing:
                    raise self.broken(name, "is missing in the bucket", "")
                identity += f" {identify(listing[name])}"
                if (there := listing[name]["size"]) != size:
                    raise self.broken(name, f"damaged ({there} bytes instead of {size})")
            found.append(RemoteFile(self.place(name), size, identity, self.store, block))
        return found


def runs(numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(begin, end, number) of each run of equal numbers."""
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for a, b in pairwise(cuts):
        if b > a:
            yield a, b, int(numbers[a])


class RemoteShards(Shards):
    """Shards in an object store. What one call needs is fetched at once, by several threads."""

    def fill(self, number: int, begin: int, out: np.ndarray):
        file, width = self.paths[number], self.dtype.itemsize
        while len(out):
            block, at = divmod(begin * width, file.block)
            n = min(len(out), (file.block - at) // width)
            data = file.store.blocks.read(file, block, at, at + n * width)
            out[:n] = np.frombuffer(data, self.dtype)
            begin, out = begin + n, out[n:]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            step = self.paths[0].block // self.dtype.itemsize if self.paths else 1
            self.ask(np.append(np.arange(begin, end, step), max(begin, end - 1)))
        else:
            self.ask(np.asarray(index, np.int64).ravel())
        return super().__getitem__(index)

    def ask(self, index: np.ndarray):
        """Has the blocks fetched that hold these numbers."""
        index = np.where(index < 0, index + len(self), index)
        numbers = np.searchsorted(self.first, index, "right") - 1
        for a, b, number in runs(numbers):
            if 0 <= number < len(self.paths):
                file = self.paths[number]
                places = (index[a:b] - self.first[number]) * self.dtype.itemsize // file.block
                file.store.blocks.ahead(file, (block for _, _, block in runs(places)))


def open_remote_split(
    folder: RemoteFolder, kind: str, shards: list[dict], dtype: np.dtype, vocab_size: int
) -> Split:
    """One split of prepared data in an object store; nothing of its ids is read yet."""
    for shard in shards:
        if shard["top"] >= vocab_size:
            problem = f"holds id {shard['top']}, and the vocabulary has {vocab_size}"
            raise folder.broken(f"{shard['name']}.ids", problem)
    tokens = [*accumulate((shard["tokens"] for shard in shards), initial=0)]
    documents = [*accumulate((shard["documents"] for shard in shards), initial=0)]
    total = sum(sum(file_sizes(kind, shard, dtype.str).values()) for shard in shards)
    block = WHOLE_BLOCK if total <= folder.store.blocks.limit / 2 else PART_BLOCK

    def files(suffix: str) -> list[RemoteFile]:
        return folder.files(kind, shards, dtype.str, suffix, block)

    def begins(suffix: str) -> RemoteShards:
        # of the files' ends, only the last one is taken
        first = [*documents[:-1], documents[-1] + 1]
        return RemoteShards(files(suffix), first, np.dtype("<i8"), tokens[:-1])

    ids = RemoteShards(files("ids"), tokens, dtype, limit=vocab_size)
    text_bytes = sum(shard["bytes"] for shard in shards)
    if kind == "stream":
        return Split(ids, None, None, text_bytes)
    if kind == "documents":
        return Split(ids, None, None, text_bytes, begins("borders"))
    starts = begins("starts")[:]  # training holds them, too
    prompts = RemoteShards(files("prompts"), documents, np.dtype("<i4"))[:]
    lengths = np.diff(starts)
    if not (starts[-1] == len(ids) and ((prompts >= 1) & (prompts < lengths)).all()):
        raise folder.broken("", "its starts do not fit its ids")
    return Split(ids, starts, prompts, text_bytes)


def verify_remote(folder: RemoteFolder, kind: str, shards: list[dict], dtype: str):
    """Checks the files of a split by their hashes, past the cache. Raises UserError naming one."""
    for suffix in SUFFIXES[kind]:
        files = folder.files(kind, shards, dtype, suffix)
        bar = tqdm(files, unit="file", leave=False, disable=None)
        for file, shard in zip(bar, shards, strict=True):
            digest = hashlib.sha256()
            for data in ordered_map(file.fetch, range(-(-file.size // file.block)), FETCHING):
                digest.update(data)
            if digest.hexdigest() != shard["sha256"][suffix]:
                wrong = "damaged (its sha256 is not that of manifest.json)"
                raise folder.broken(f"{shard['name']}.{suffix}", wrong)
