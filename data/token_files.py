"""Token files: documents or one long text as ids, written once and memory-mapped ever after.

train.ids      the token ids, little-endian, uint16 or uint32, end to end
train.starts   lines and pairs: int64, where each begins, and the end of the last
train.prompts  lines and pairs: int32, how many of its ids are prompt and <start>
train.borders  packed documents: int64, where each begins, and the end of the last
"""

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.memory import return_freed_memory
from data.tokenizer import Tokenizer

DOCUMENTS, CHARACTERS = 1 << 12, 1 << 18  # tokenised at a time: whichever is reached first
TRIM_INTERVAL = 32  # pieces of work after which freed memory is given back
CHECK_SIZE = 1 << 20  # numbers checked at a time


@dataclass(frozen=True)
class Split:
    """One side of a data set: `ids`, and for lines and pairs where each starts and its prompt ends.

    Packed documents are one stream; `borders` has where each begins, and the end of the last.
    """

    ids: np.ndarray
    starts: np.ndarray | None
    prompts: np.ndarray | None
    bytes: int  # of the text to predict, in UTF-8
    borders: np.ndarray | None = None

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


# Writing ----------------------------------------------------------------------------------------


def write_stream(texts: Iterable[str], tokenizer: Tokenizer, path: Path, dtype: str) -> dict:
    """Writes the ids of one long text. Returns its counts."""

    def encode(text: str):
        return tokenizer.encode_array(text).astype(dtype), len(text.encode())

    tokens = size = 0
    with open(f"{path}.ids", "wb") as file, progress("B") as bar, garbage_collection_paused():
        for ids, n in ordered_map(encode, texts, tokenizer.threads):
            file.write(ids)
            tokens, size = tokens + len(ids), size + n
            bar.update(n)
    return {"tokens": tokens, "bytes": size}


def write_packed(
    texts: Iterable[tuple], tokenizer: Tokenizer, paths: dict[str, Path], dtype: str
) -> dict[str, dict]:
    """Writes documents as `<start> text <end>`, one after another, to be read as one stream.

    A tokenizer with one token for both has it once, after the text. texts: (name of its split,
    text); paths: where each split goes. Returns the counts of each split, {name: dict}.
    """
    start = [] if tokenizer.start_id == tokenizer.end_id else [tokenizer.start_id]

    def encode(block: tuple[str, list]):
        name, pairs = block
        rows = [tokenizer.encode_array(text) for _, text in pairs]
        parts = chain.from_iterable((start, row, [tokenizer.end_id]) for row in rows)
        ids = np.concatenate([np.asarray(part, dtype) for part in parts])
        lengths = np.array([len(start) + len(row) + 1 for row in rows], "<i8")
        return name, ids, lengths, sum(len(text.encode()) for _, text in pairs)

    counts = {name: {"tokens": 0, "borders": 0, "bytes": 0} for name in paths}
    with ExitStack() as stack, progress("B") as bar:
        files = {
            (name, what): stack.enter_context(open(f"{path}.{what}", "wb"))
            for name, path in paths.items()
            for what in ("ids", "borders")
        }
        for name in paths:
            files[name, "borders"].write(np.zeros(1, "<i8").data)
        for name, ids, lengths, size in ordered_map(encode, blocks(texts), tokenizer.threads):
            count = counts[name]
            files[name, "ids"].write(ids)
            files[name, "borders"].write(count["tokens"] + lengths.cumsum())
            count["tokens"] += len(ids)
            count["borders"] += len(lengths)
            count["bytes"] += size
            bar.update(size)
    return counts


def write_documents(
    documents: Iterable[tuple], tokenizer: Tokenizer, paths: dict[str, Path], dtype: str
) -> dict[str, dict]:
    """Writes documents as `prompt <start> completion <end>`, lines as `<start> text <end>`.

    documents: (name of its split, document); paths: where each split goes. Returns the counts of
    each split, {name: dict}.
    """

    def encode(block: tuple[str, list]):
        name, pairs = block
        rows = tokenizer.encode_batch([text for pair in pairs for text in pair])
        for row, special in zip(rows, cycle((tokenizer.start_id, tokenizer.end_id))):
            row.append(special)
        lengths = np.fromiter(map(len, rows), "<i8").reshape(-1, 2)  # of prompts and completions
        size = sum(len(completion.encode()) for _, completion in pairs)
        return name, np.fromiter(chain.from_iterable(rows), dtype), lengths, size

    counts = {name: {"tokens": 0, "documents": 0, "bytes": 0} for name in paths}
    with ExitStack() as stack, progress("") as bar:
        files = {
            (name, what): stack.enter_context(open(f"{path}.{what}", "wb"))
            for name, path in paths.items()
            for what in ("ids", "starts", "prompts")
        }
        for name in paths:
            files[name, "starts"].write(np.zeros(1, "<i8").data)
        stack.enter_context(garbage_collection_paused())
        for name, ids, lengths, size in ordered_map(encode, blocks(documents), tokenizer.threads):
            count = counts[name]
            files[name, "ids"].write(ids)
            files[name, "starts"].write(count["tokens"] + lengths.sum(1).cumsum())
            files[name, "prompts"].write(lengths[:, 0].astype("<i4"))
            count["tokens"] += len(ids)
            count["documents"] += len(lengths)
            count["bytes"] += size
            bar.update(len(lengths))
    return counts


def blocks(documents: Iterable[tuple]) -> Iterator[tuple[str, list]]:
    """Documents of one split, as pairs, about as many as are worth a thread's while."""
    waiting, room = {}, {}
    for name, document in documents:
        pair = ("", document) if isinstance(document, str) else document
        block = waiting.setdefault(name, [])
        block.append(pair)
        room[name] = room.get(name, CHARACTERS) - len(pair[0]) - len(pair[1])
        if room[name] <= 0 or len(block) == DOCUMENTS:
            yield name, waiting.pop(name)
            del room[name]
    yield from waiting.items()


def ordered_map(work: Callable, items: Iterable, threads: int) -> Iterator:
    """work(item) of each, in their order; threads do it, and few are ahead: memory is bounded."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for number, item in enumerate(items):
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads + 1:  # one is ready when a thread is
                    yield waiting.popleft().result()
                    if number % TRIM_INTERVAL == 0:
                        return_freed_memory()
            while waiting:
                yield waiting.popleft().result()
        finally:  # of a signal, say: what runs ends soon, the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def garbage_collection_paused() -> Generator[None]:
    """No search for cycles meanwhile: among lists of ids it would take a tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def progress(unit: str) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(unit=unit or "example", unit_scale=bool(unit), leave=False, disable=None)


# Opening ----------------------------------------------------------------------------------------


def open_split(path: Path, counts: dict, dtype: np.dtype, vocab_size: int) -> Split:
    """One split's memory-mapped files. Raises UserError naming the file that is wrong."""
    ids = open_array(Path(f"{path}.ids"), dtype, counts["tokens"])
    with open(f"{path}.ids", "rb") as file:  # read, because what is mapped counts as this process's
        while len(piece := np.fromfile(file, dtype, CHECK_SIZE)):
            if (top := int(piece.max())) >= vocab_size:
                raise UserError(f"{path}.ids: holds id {top}, the vocabulary has {vocab_size}")
    if "borders" in counts:
        borders = open_array(Path(f"{path}.borders"), np.dtype("<i8"), counts["borders"] + 1)
        if borders[0] != 0 or borders[-1] != len(ids):
            raise UserError(f"{path}.borders: damaged (does not fit {path}.ids)")
        return Split(ids, None, None, counts["bytes"], borders)
    if "documents" not in counts:
        return Split(ids, None, None, counts["bytes"])
    n = counts["documents"]
    starts = open_array(Path(f"{path}.starts"), np.dtype("<i8"), n + 1)
    prompts = open_array(Path(f"{path}.prompts"), np.dtype("<i4"), n)
    fits = starts[0] == 0 and starts[-1] == len(ids)
    for first in range(0, n, CHECK_SIZE):
        known = prompts[first : first + CHECK_SIZE]
        lengths = np.diff(starts[first : first + CHECK_SIZE + 1])
        fits = fits and ((known >= 1) & (known < lengths)).all()
    if not fits:
        raise UserError(f"{path}.starts: damaged (does not fit {path}.ids)")
    return Split(ids, starts, prompts, counts["bytes"])


def open_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A memory-mapped file of exactly `count` numbers."""
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise UserError(f"{path}: damaged ({size} bytes instead of {count * dtype.itemsize})")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
