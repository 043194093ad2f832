"""What of a text stands word for word in the training data: the longest run of tokens, where, how
often.

    index = open_index(dataset.train.ids, dataset.tokenizer.vocab_size, file)
    found = index.longest(ids)          # found.length tokens from found.start on

The index is a suffix array (Manber and Myers 1993) in segments: in each the places of a million
tokens of the data in the order of the 32 tokens that begin there. It is built once, a segment at a
time, takes 8 bytes a token of disk, and is memory-mapped. A run is looked for by bisection in each
segment, and its tokens beyond 32 are compared one by one, so that the answer is exact.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from checkpoint.reader import Checkpoint
from checkpoint.run_data import data_config, was_imported
from common.cli import visible
from common.errors import UserError
from common.files import user_path
from data.config import DEFAULT_CACHE_DIR
from data.dataset import Dataset
from data.mixture import prepare
from data.tokenizers.base import Tokenizer

Log = Callable[[str], object]

DEPTH = 32  # tokens by which places are in order
SEGMENT = 1 << 20  # places that are put in order together: about 250 MB of memory
PIECE = 1 << 16  # places whose tokens beyond DEPTH are compared at a time


class Tokens(Protocol):
    """What is asked here of the ids of a split."""

    def __len__(self) -> int: ...
    def __getitem__(self, index, /) -> Any: ...


@dataclass(frozen=True)
class Run:
    """The longest run of tokens of a text that stands in the data, the first of equal ones."""

    start: int
    """In the text, counted in tokens."""
    length: int
    """In tokens; 0: not one of them stands there."""
    count: int
    """How often it stands in the data."""
    place: int
    """The first of these, counted in tokens; -1: none."""


def open_index(ids: Tokens, file: Path, segment: int = SEGMENT) -> "Index":
    """The index of `ids` in `file`, which is made first if it is not there.

    Raises UserError for a file that is no such index, or cannot be written.
    """
    try:
        if not file.exists():
            build(ids, file, segment)
        places = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: not an index ({error}); remove it to make it again") from None
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror or error}; free some disk space, or use another cache_dir"
        ) from None
    whole = places.shape == (len(ids),) and places.dtype == np.int64
    pieces = range(0, len(ids), SEGMENT) if whole else ()
    if not whole or any(not in_range(places[i : i + SEGMENT], len(ids)) for i in pieces):
        raise UserError(f"{file}: damaged, or of other data; remove it to make it again")
    return Index(ids, places, segment)


def in_range(places: np.ndarray, count: int) -> bool:
    return int(places.min()) >= 0 and int(places.max()) < count


def build(ids: Tokens, file: Path, segment: int):
    """Writes the index: whole, or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            header = {"descr": "<i8", "fortran_order": False, "shape": (len(ids),)}
            np.lib.format.write_array_header_1_0(out, header)
            starts = range(0, len(ids), segment)
            for first in tqdm(starts, desc="index of the data", leave=False, disable=None):
                out.write((first + order(ids, first, min(segment, len(ids) - first))).data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def order(ids: Tokens, first: int, count: int) -> np.ndarray:
    """The places `first` to first + count, from 0, in the order of the tokens there: (count,)."""
    tokens = np.zeros(count + DEPTH, np.uint64)
    known = np.asarray(ids[first : first + count + DEPTH])
    tokens[: len(known)] = known.astype(np.uint64) + np.uint64(1)  # 0: the end of the data
    pairs = tokens[:-1] << np.uint64(32) | tokens[1:]  # of ids below 2^32 - 1
    return np.lexsort([pairs[i : i + count] for i in range(DEPTH - 2, -1, -2)])


def index_file(cache: Path, dataset: Dataset) -> Path:
    """Where the index of a data set's training split is kept."""
    return cache / f"{dataset.name}-{dataset.fingerprint}.memorization.npy"


class Index:
    """The places of all tokens of some data, segment by segment in order."""

    def __init__(self, ids: Tokens, places: np.ndarray, segment: int):
        self.ids = ids
        self.segments = [places[i : i + segment] for i in range(0, len(places), segment)]

    def longest(self, text: Sequence[int]) -> Run:
        """The longest run of `text` in the data."""
        text, start, length = list(text), 0, 0
        for i in range(len(text)):
            if len(text) - i <= length:
                break
            found = max((self.match(places, text[i:]) for places in self.segments), default=0)
            if found > length:
                start, length = i, found
        if not length:
            return Run(0, 0, 0, -1)
        places = [self.find(places, text[start : start + length]) for places in self.segments]
        firsts = [int(found.min()) for found in places if len(found)]
        return Run(start, length, sum(map(len, places)), min(firsts))

    def match(self, places: np.ndarray, text: list[int]) -> int:
        """How many of the first tokens of `text` stand somewhere in a segment in a row."""
        head = text[:DEPTH]
        at = bisect_left(range(len(places)), head, key=lambda i: self.read(places[i], len(head)))
        near = [i for i in (at - 1, at) if 0 <= i < len(places)]
        length = max(common(head, self.read(places[i], len(head))) for i in near)
        if length < DEPTH:
            return length
        found = self.find(places, head)
        while length < len(text) and len(found := self.having(found, length, text[length])):
            length += 1
        return length

    def find(self, places: np.ndarray, run: list[int]) -> np.ndarray:
        """The places of a segment at which a run stands, in no order."""
        head = run[:DEPTH]

        def read(i: int) -> list[int]:
            return self.read(places[i], len(head))

        low = bisect_left(range(len(places)), head, key=read)
        found = np.asarray(places[low : bisect_right(range(len(places)), head, lo=low, key=read)])
        for i in range(DEPTH, len(run)):
            found = self.having(found, i, run[i])
        return found

    def having(self, places: np.ndarray, offset: int, token: int) -> np.ndarray:
        """Those of some places that have a token at an offset."""
        kept = []
        for i in range(0, len(places), PIECE):
            piece = places[i : i + PIECE]
            piece = piece[piece + offset < len(self.ids)]
            kept.append(piece[self.ids[piece + offset] == token])
        return np.concatenate(kept) if kept else places

    def read(self, place: np.integer, count: int) -> list[int]:
        """Up to `count` tokens of the data from a place on."""
        return self.ids[int(place) : int(place) + count].tolist()


def common(a: list[int], b: list[int]) -> int:
    """How many of their first elements are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def shares(index: Index, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of texts, but for empty ones: the mean share of their longest runs, and of whole texts."""
    found = [index.longest(text).length / len(text) for text in texts if len(text)]
    if not found:
        return {"longest_run": 0.0, "verbatim": 0.0}
    return {"longest_run": sum(found) / len(found), "verbatim": found.count(1.0) / len(found)}


class Memory:
    """A run's training data, in which texts are looked for."""

    def __init__(self, dataset: Dataset, index: Index):
        self.index, self.tokenizer, self.train = index, dataset.tokenizer, dataset.train

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Tokenizer, log: Log) -> "Memory":
        """The data of a checkpoint's run, prepared again if need be. Raises UserError."""
        if was_imported(checkpoint):
            raise UserError(
                f"--memorization: {checkpoint.run} was imported and has no data of its own; leave "
                "the flag out"
            )
        config = data_config(checkpoint, log)
        given = tokenizer if checkpoint.state.get("tokenizer_given") else None
        dataset = prepare(config, log, given)
        now = dataset.fingerprint, dataset.tokenizer.fingerprint
        if now != (checkpoint.state.get("data"), checkpoint.state.get("tokenizer")):
            raise UserError(
                f"--memorization: the data differs from what {checkpoint.path} was trained on; "
                "restore it, or leave the flag out"
            )
        cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
        return cls(dataset, open_index(dataset.train.ids, index_file(cache, dataset)))

    def look_up(self, ids: Sequence[int]) -> dict:
        """The longest run of a text, for programs; `example`: from 1, of lines and documents."""
        run = self.index.longest(ids)
        text = self.tokenizer.decode(ids[run.start : run.start + run.length])
        found = {"tokens": run.length, "of": len(ids), "text": text, "count": run.count}
        return found | {"place": run.place, "example": self.example(run.place)}

    def example(self, place: int) -> int | None:
        """The number of the document that a place is in; None of a stream."""
        borders = self.train.starts if self.train.borders is None else self.train.borders
        if borders is None or place < 0:
            return None
        return bisect_right(range(len(borders)), place, key=lambda i: int(borders[i]))

    def describe(self, ids: Sequence[int], colour: bool) -> str:
        """The same in a line for people, the run itself in red on a terminal."""
        found = self.look_up(ids)
        if not found["count"]:
            return "word for word in the training data: nothing"
        text = visible(found["text"].replace("\n", "\\n"))
        where = f"example {found['example']:,}" if found["example"] else f"token {found['place']:,}"
        return (
            f"word for word in the training data: {found['tokens']} of {found['of']} tokens, "
            f"{found['count']:,} times, first in {where}: "
            + (f"\x1b[31m{text}\x1b[0m" if colour else text)
        )
