"""Token files: documents or one long text as ids, in shards, written once and read at any place.

NAME.ids      the token ids, little-endian, uint16 or uint32, end to end
NAME.starts   lines and pairs: int64, where each begins in NAME.ids, and the end of the last
NAME.prompts  lines and pairs: int32, how many of its ids are prompt and <start>
NAME.borders  packed documents: int64, where each begins in NAME.ids, and the end of the last

NAME is train-00000, train-00001 ... and val-00000 ...: shards, each of which ends with a document.
A split is its shards one after the other, so that windows of a stream may cross their ends.
"""

import contextlib
import hashlib
import io
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UserError
from common.files import hash_file
from data.prepared.encoding import Encoded

SHARD_TOKENS = 1 << 28  # of a shard, unless a single document has more
CHECK_SIZE = 1 << 20  # numbers checked at a time
SUFFIXES = {
    "stream": ("ids",),
    "documents": ("ids", "borders"),
    "lines": ("ids", "starts", "prompts"),
    "pairs": ("ids", "starts", "prompts"),
}
COUNTS = ("tokens", "documents", "bytes", "top")  # of a shard; top: its highest id
# in the folder itself, or in that of one of the machines that prepare it together
NAME = re.compile(r"(\d+-of-\d+/)?(train|val)-\d{5,9}")


class Shards:
    """Numbers in several files as one array, as far as it is asked for.

    It answers len(), a slice without a step, an integer, and an int64 index array of any shape. A
    run of neighbours is one read: nothing is mapped, so that memory does not grow with what has
    been read, and a file that is cut meanwhile is an error and no crash.
    first: where each file begins, and the end of the last; added: what is added to a file's
    numbers. Raises UserError for a number that is not below `limit`, if that is not 0.
    """

    def __init__(
        self,
        paths: Sequence[Any],  # of Path, or what a subclass reads
        first: Sequence[int],
        dtype: np.dtype,
        added: Sequence[int] = (),
        limit: int = 0,
    ):
        self.paths, self.first, self.dtype, self.limit = paths, list(first), dtype, limit
        self.added = added
        self.files: list[io.FileIO | None] = [None] * len(paths)
        self.lock = threading.Lock()  # of the place in a file; several threads make batches

    def __len__(self) -> int:
        return self.first[-1]

    def file(self, number: int) -> io.FileIO:
        """One of the files, opened when it is read first. Raises UserError if it has gone."""
        found = self.files[number]
        if found is None:
            try:
                found = io.FileIO(self.paths[number])
            except OSError as error:
                raise damaged(self.paths[number], str(error.strerror)) from None
            self.files[number] = found
        return found

    def read(self, begin: int, out: np.ndarray):
        """Fills `out` with neighbours from `begin` on."""
        while len(out):
            number = bisect_right(self.first, begin) - 1
            n = min(len(out), self.first[number + 1] - begin)
            self.fill(number, begin - self.first[number], out[:n])
            if self.limit and (top := int(out[:n].max())) >= self.limit:
                what = f"holds id {top}, the vocabulary has {self.limit}"
                raise damaged(self.paths[number], what)
            if self.added:
                out[:n] += self.added[number]
            begin, out = begin + n, out[n:]

    def fill(self, number: int, begin: int, out: np.ndarray):
        """Fills `out` with neighbours in one file from its number `begin` on."""
        part, done = out.data.cast("B"), 0
        with self.lock:
            file = self.file(number)
            file.seek(begin * self.dtype.itemsize)
            while done < len(part):
                if not (got := file.readinto(part[done:])):
                    raise damaged(self.paths[number], "it has been cut")
                done += got

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            found = np.empty(max(0, end - begin), self.dtype)
            self.read(begin, found)
            return found
        if isinstance(index, int | np.integer):  # a tenth of the time of what follows
            found = np.empty(1, self.dtype)
            self.read(int(index) + (len(self) if index < 0 else 0), found)
            return found[0]
        index = np.asarray(index, np.int64)
        places = np.where(index < 0, index + len(self), index).ravel()
        found = np.empty(places.size, self.dtype)
        breaks = np.flatnonzero(np.diff(places) != 1) + 1
        for a, b in pairwise([0, *breaks.tolist(), places.size] if places.size else []):
            self.read(int(places[a]), found[a:b])
        return found.reshape(index.shape)


@dataclass(frozen=True)
class Split:
    """One side of a data set: `ids`, and for lines and pairs where each starts and its prompt ends.

    Packed documents are one stream; `borders` has where each begins, and the end of the last.
    """

    ids: np.ndarray | Shards
    starts: np.ndarray | None
    prompts: np.ndarray | None
    bytes: int  # of the text to predict, in UTF-8
    borders: np.ndarray | Shards | None = None

    def describe(self) -> str:
        """Its size, for people."""
        if self.borders is not None:
            return f"{len(self.borders) - 1:,} documents, {len(self.ids):,} tokens"
        if self.starts is None:
            return f"{len(self.ids):,} tokens"
        return f"{len(self.starts) - 1:,} examples, {len(self.ids):,} tokens"

    def count(self, token: int) -> int:
        """How often a token occurs."""
        pieces = range(0, len(self.ids), CHECK_SIZE)
        return sum(int(np.count_nonzero(self.ids[i : i + CHECK_SIZE] == token)) for i in pieces)

    def targets_per_byte(self) -> float:
        """Tokens to predict for each byte of text: nats a token times this are nats a byte."""
        targets = len(self.ids) - (0 if self.prompts is None else int(self.prompts.sum()))
        return targets / max(1, self.bytes)


def file_sizes(kind: str, shard: dict, dtype: str) -> dict[str, int]:
    """{suffix: bytes} of a shard's files, by its counts."""
    n = shard["documents"]
    sizes = {
        "ids": shard["tokens"] * np.dtype(dtype).itemsize,
        "starts": 8 * (n + 1),
        "prompts": 4 * n,
        "borders": 8 * (n + 1),
    }
    return {suffix: sizes[suffix] for suffix in SUFFIXES[kind]}


# Writing ----------------------------------------------------------------------------------------


class ShardWriter:
    """Writes the shards of one split, one after the other.

    shards: what another process had written of them, as its own `shards` were after `sync`; the
    writer goes on from there, in the last one if that is not closed. Raises OSError, and
    ValueError where the files hold less than that.
    """

    def __init__(
        self, folder: Path, split: str, kind: str, dtype: str, shards: Sequence[dict] = ()
    ):
        self.folder, self.split, self.kind, self.dtype = folder, split, kind, dtype
        self.shards = [dict(shard) for shard in shards]
        self.files: dict[str, BinaryIO] = {}
        for shard in self.shards:
            for suffix, size in file_sizes(kind, shard, dtype).items():
                path = folder / f"{shard['name']}.{suffix}"
                if path.stat().st_size < size:
                    raise ValueError(f"{path} is shorter than it was")
                if "sha256" not in shard:
                    os.truncate(path, size)
                    self.files[suffix] = open(path, "ab")  # noqa: SIM115, closed in close()

    def write(self, block: Encoded):
        """Adds documents, or a piece of a stream, to the shard, or to a new one."""
        shard = self.shards[-1] if self.files else None
        if shard is None or (shard["tokens"] and shard["tokens"] + len(block.ids) > SHARD_TOKENS):
            self.close()
            shard = self.begin()
        self.files["ids"].write(block.ids.data)
        if block.lengths is not None:
            ends = shard["tokens"] + block.lengths.cumsum()
            self.files["borders" if self.kind == "documents" else "starts"].write(ends.data)
            shard["documents"] += len(ends)
        if block.prompts is not None:
            self.files["prompts"].write(block.prompts.data)
        shard["tokens"] += len(block.ids)
        shard["bytes"] += block.bytes
        shard["top"] = max(shard["top"], int(block.ids.max(initial=0)))

    def begin(self) -> dict:
        shard = {"name": f"{self.split}-{len(self.shards):05}", **dict.fromkeys(COUNTS, 0)}
        for suffix in SUFFIXES[self.kind]:
            file = open(self.folder / f"{shard['name']}.{suffix}", "wb")  # noqa: SIM115, in close()
            self.files[suffix] = file
            if suffix in ("starts", "borders"):
                file.write(bytes(8))  # the first begins at 0
        self.shards.append(shard)
        return shard

    def sync(self):
        """Waits until the disk has what was written."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        """Ends the shard: it gets its hashes."""
        self.sync()
        self.abandon()
        if self.shards and "sha256" not in self.shards[-1]:
            shard = self.shards[-1]
            paths = {suffix: f"{shard['name']}.{suffix}" for suffix in SUFFIXES[self.kind]}
            shard["sha256"] = {s: hash_file(self.folder / path) for s, path in paths.items()}

    def abandon(self):
        """Closes the files as they are."""
        while self.files:
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                self.files.popitem()[1].close()


# Opening ----------------------------------------------------------------------------------------


def check_shards(kind: str, shards: list[dict]):
    """Raises ValueError unless these are what `ShardWriter` could have written, by their form."""
    for shard in shards:
        if not (
            NAME.fullmatch(shard["name"])
            and all(type(shard[count]) is int and shard[count] >= 0 for count in COUNTS)
            and shard["tokens"] > 0
            and shard["sha256"].keys() == set(SUFFIXES[kind])
        ):
            raise ValueError("a shard in manifest.json is not as it must be")


def open_split(
    folder: Path, kind: str, shards: list[dict], dtype: np.dtype, vocab_size: int, whole: bool
) -> Split:
    """One split: mapped where it is one shard that was checked, else read as it is asked for.

    Raises UserError naming the file that is wrong.
    whole: they are checked to the last byte; else their sizes are, and the ids when they are read.
    """
    for shard in shards:
        path, top = folder / f"{shard['name']}.ids", shard["top"]
        if top >= vocab_size:
            raise UserError(f"{path}: holds id {top}, the vocabulary has {vocab_size}")
        check_sizes(folder, kind, shard, dtype)
        if whole:
            check_shard(folder, kind, shard, dtype, vocab_size)
    tokens = np.cumsum([0] + [shard["tokens"] for shard in shards])
    documents = np.cumsum([0] + [shard["documents"] for shard in shards])

    def paths(suffix: str) -> list[Path]:
        return [folder / f"{shard['name']}.{suffix}" for shard in shards]

    def begins(suffix: str) -> np.ndarray | Shards:
        """Where documents begin in the split, and the end of the last."""
        if len(shards) == 1:
            return np.memmap(paths(suffix)[0], "<i8", mode="r")
        # of the files' ends, only the last one is taken
        first = [*documents[:-1].tolist(), int(documents[-1]) + 1]
        return Shards(paths(suffix), first, np.dtype("<i8"), tokens[:-1].tolist())

    if whole and len(shards) == 1:
        ids = np.memmap(paths("ids")[0], dtype, mode="r")
    else:
        ids = Shards(paths("ids"), tokens.tolist(), dtype, limit=vocab_size)
    text_bytes = sum(shard["bytes"] for shard in shards)
    if kind == "stream":
        return Split(ids, None, None, text_bytes)
    for shard in shards:
        check_borders(folder, kind, shard)
    if kind == "documents":
        return Split(ids, None, None, text_bytes, begins("borders"))
    starts = begins("starts")[:]  # training holds them, too
    if len(shards) == 1:
        prompts = np.memmap(paths("prompts")[0], "<i4", mode="r")
    else:
        prompts = np.concatenate([np.fromfile(path, "<i4") for path in paths("prompts")])
    return Split(ids, starts, prompts, text_bytes)


def check_sizes(folder: Path, kind: str, shard: dict, dtype: np.dtype):
    """Raises UserError naming the first file of a shard that has another size."""
    for suffix, size in file_sizes(kind, shard, dtype.str).items():
        path = folder / f"{shard['name']}.{suffix}"
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path}: damaged ({found} bytes instead of {size})")


def check_shard(folder: Path, kind: str, shard: dict, dtype: np.dtype, vocab_size: int):
    """Raises UserError naming the first file of a shard that is not as it was written."""
    for suffix in SUFFIXES[kind]:
        path, digest, top = folder / f"{shard['name']}.{suffix}", hashlib.sha256(), 0
        with open(path, "rb", 0) as file:  # read, for what is mapped counts as this process's
            while piece := file.read(CHECK_SIZE):
                digest.update(piece)
                if suffix == "ids" and not len(piece) % dtype.itemsize:
                    top = max(top, int(np.frombuffer(piece, dtype).max()))
        if digest.hexdigest() != shard["sha256"][suffix]:
            raise UserError(f"{path}: damaged (its sha256 is not that of manifest.json)")
        if top >= vocab_size:
            raise UserError(f"{path}: holds id {top}, the vocabulary has {vocab_size}")


def check_borders(folder: Path, kind: str, shard: dict):
    """Raises UserError unless what says where a shard's documents are fits its ids."""
    suffix = "borders" if kind == "documents" else "starts"
    path, n = folder / f"{shard['name']}.{suffix}", shard["documents"]
    begins = np.memmap(path, "<i8", mode="r")
    fits = begins[0] == 0 and begins[-1] == shard["tokens"]
    if kind != "documents" and n:
        prompts = np.memmap(path.with_suffix(".prompts"), "<i4", mode="r")
        for first in range(0, n, CHECK_SIZE):
            known = prompts[first : first + CHECK_SIZE]
            lengths = np.diff(begins[first : first + CHECK_SIZE + 1])
            fits = fits and ((known >= 1) & (known < lengths)).all()
    if not fits:
        raise UserError(f"{path}: damaged (does not fit {path.with_suffix('.ids').name})")


def damaged(path: Any, what: str) -> UserError:
    # in an object store nothing is prepared again for being gone
    fix = (
        f"remove {path.parent}, and it will be prepared again"
        if isinstance(path, Path)
        else "write it again"
    )
    return UserError(f"{path}: damaged ({what}); {fix}")
