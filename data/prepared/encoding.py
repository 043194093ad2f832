"""Texts to ids, a block at a time: by threads, and where there is much, by a process for each core.

Such a process is `python -m data.prepared.encoding FOLDER KIND DTYPE START`, with the tokenizer's
FOLDER: blocks of text on stdin, ids on stdout. It ends when its parent does, because its stdin
does.
"""

import gc
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, pairwise
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.memory import return_freed_memory
from common.signals import listen
from data.slots import hidden
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer

DOCUMENTS, CHARACTERS = 1 << 12, 1 << 18  # of a block: whichever is reached first
PATIENCE = 1 << 24  # characters that threads encode before it is worth it to start processes
TRIM_INTERVAL = 32  # pieces of work after which freed memory is given back
REQUEST, ANSWER = struct.Struct("<QQ"), struct.Struct("<bQQ")
ROOT = Path(__file__).resolve().parents[2]


class EndedError(UserError):
    """A process that encoded has been ended, by whom or what ever: what was done can go on."""


@dataclass(frozen=True)
class Block:
    """Texts of one split that are encoded at once: of pairs, prompt and completion in turn."""

    split: str
    texts: list[str]
    documents: int
    read: int  # bytes of the source that had been read by then


@dataclass(frozen=True)
class Encoded:
    """A block's ids, end to end; for all but a stream how many a document has, and a prompt."""

    ids: np.ndarray
    lengths: np.ndarray | None  # int64
    prompts: np.ndarray | None  # int32
    bytes: int  # of the text to predict, in UTF-8


def encode(
    kind: str, tokenizer: Tokenizer, texts: list[str], dtype: str, start_token: bool = True
) -> Encoded:
    """A block as `kind` lays it out: `prompt <start> completion <end>` for pairs, `<start> text
    <end>` for lines and documents, and of a stream the ids alone.

    Where a tokenizer has one token for both, documents have it once, after the text, and so they
    have any without `start_token`. "slots" are pairs with placeholders for their arguments, which
    count as the text that they stand for.
    """
    given = texts
    if kind == "slots":
        pairs = zip(texts[::2], texts[1::2], strict=True)
        texts = list(chain.from_iterable(hidden(pair) for pair in pairs))
    if kind == "stream":
        ids = [tokenizer.encode_array(text) for text in texts]
        return Encoded(np.concatenate(ids).astype(dtype), None, None, sizes(texts))
    if kind == "documents":
        has_start = start_token and tokenizer.start_id != tokenizer.end_id
        start = [tokenizer.start_id] if has_start else []
        rows = [tokenizer.encode_array(text) for text in texts]
        parts = chain.from_iterable((start, row, [tokenizer.end_id]) for row in rows)
        ids = np.concatenate([np.asarray(part, dtype) for part in parts])
        lengths = np.array([len(start) + len(row) + 1 for row in rows], "<i8")
        return Encoded(ids, lengths, None, sizes(texts))
    with garbage_collection_paused():
        rows = tokenizer.encode_batch(texts)
        for row, special in zip(rows, cycle((tokenizer.start_id, tokenizer.end_id))):
            row.append(special)
        lengths = np.fromiter(map(len, rows), "<i8").reshape(-1, 2)  # of prompts and completions
        ids = np.fromiter(chain.from_iterable(rows), dtype)
    return Encoded(ids, lengths.sum(1), lengths[:, 0].astype("<i4"), sizes(given[1::2]))


def sizes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


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


def blocks(
    documents: Iterable, kind: str, read: Callable[[], int] = lambda: 0
) -> Iterator[Block | dict]:
    """Documents of one split, about as many as are worth a thread's while.

    documents: (name of its split, text or pair); or a dictionary, before which comes all that
    waits. Of a stream, each piece is a block. read: how much of the source has been read by now.
    """
    waiting, room = {}, {}
    for item in documents:
        if isinstance(item, dict):
            for name, texts in waiting.items():
                yield Block(name, texts, count(kind, texts), read())
            waiting, room = {}, {}
            yield item
            continue
        name, document = item
        if kind in ("pairs", "slots"):
            texts = document
        else:
            texts = ("", document) if kind == "lines" else (document,)
        block = waiting.setdefault(name, [])
        block.extend(texts)
        room[name] = room.get(name, CHARACTERS) - sum(map(len, texts))
        if room[name] <= 0 or count(kind, block) == DOCUMENTS or kind == "stream":
            yield Block(name, waiting.pop(name), count(kind, block), read())
            del room[name]
    for name, texts in waiting.items():
        yield Block(name, texts, count(kind, texts), read())


def count(kind: str, texts: list[str]) -> int:
    return len(texts) // 2 if kind in ("lines", "pairs", "slots") else len(texts)


# Several at a time --------------------------------------------------------------------------------


class Encoder:
    """Encodes blocks, `jobs` at a time, in their order, and with few of them ahead.

    folder: where the tokenizer is saved, for the processes. start_token: as in `encode`.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        dtype: str,
        folder: Path,
        jobs: int,
        start_token: bool = True,
    ):
        self.kind, self.tokenizer, self.dtype, self.folder = kind, tokenizer, dtype, folder
        self.jobs, self.start_token, self.seen = jobs, start_token, 0
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.workers: list[Worker] = []
        self.lock = threading.Lock()
        self.closed = False

    def __call__(self, items: Iterable) -> Iterator[tuple]:
        """(item, its ids) of each block, (item, None) of what is none."""
        return ordered_map(self.work, items, self.jobs, self.close)

    def work(self, item) -> tuple:
        if not isinstance(item, Block):
            return item, None
        with self.lock:
            self.seen += sum(map(len, item.texts))
        if self.jobs == 1 or self.seen < PATIENCE:
            return item, encode(self.kind, self.tokenizer, item.texts, self.dtype, self.start_token)
        try:
            worker = self.idle.get_nowait()
        except queue.Empty:
            worker = self.start()
        found = worker.encode(item.texts)
        self.idle.put(worker)
        return item, found

    def start(self) -> "Worker":
        with self.lock:  # so that close() finds all that there are
            if self.closed:
                raise EndedError(ended(None))
            self.workers.append(Worker(self.kind, self.dtype, self.folder, self.start_token))
            return self.workers[-1]

    def close(self):
        """Ends the processes at once."""
        with self.lock:
            self.closed = True
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()


class Worker:
    """A process that encodes blocks, one after the other."""

    def __init__(self, kind: str, dtype: str, folder: Path, start_token: bool):
        self.dtype = dtype
        settings = [kind, dtype, "start" if start_token else "no-start"]
        self.process = subprocess.Popen(  # noqa: S603, the command is our own
            [sys.executable, "-m", __name__, str(folder.resolve()), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
        )

    def encode(self, texts: list[str]) -> Encoded:
        """Raises EndedError if the process has ended, and UserError for what it has refused."""
        assert self.process.stdin and self.process.stdout  # pipes, both
        try:
            for part in packed(texts):
                write_all(self.process.stdin, part)
            return unpacked(self.process.stdout, self.dtype)
        except (EOFError, BrokenPipeError):
            raise EndedError(ended(self.process.wait())) from None


def ended(status: int | None) -> str:
    why = f"signal {-status}" if status and status < 0 else f"exit status {status}"
    return (
        f"data.path: a process that turns it into tokens has been ended ({why}); free some memory, "
        "and run the same command again: it continues"
    )


def packed(texts: list[str]) -> tuple[bytes, bytes, bytes]:
    """Texts as bytes: how many, how long each is in characters, and all of them in UTF-8."""
    data = "".join(texts).encode("utf-8", "surrogatepass")
    lengths = np.fromiter(map(len, texts), "<i8")
    return REQUEST.pack(len(texts), len(data)), lengths.tobytes(), data


def write_all(pipe, data: bytes | memoryview):
    data = memoryview(data).cast("B")
    while data:
        data = data[pipe.write(data) :]


def read_all(pipe, size: int) -> bytearray:
    """Exactly so many bytes. Raises EOFError."""
    found = bytearray(size)
    view, done = memoryview(found), 0
    while done < size:
        if not (n := pipe.readinto(view[done:])):
            raise EOFError
        done += n
    return found


def unpacked(pipe, dtype: str) -> Encoded:
    """A process's answer. Raises EOFError, and UserError with what it says."""
    parts, size = [], 0
    for kind in (dtype, "<i8", "<i4"):  # as Encoded has them
        there, n, size = ANSWER.unpack(read_all(pipe, ANSWER.size))
        if there < 0:
            error = read_all(pipe, n).decode()
            raise UserError(error)
        parts.append(np.frombuffer(read_all(pipe, n), kind) if there else None)
    ids, lengths, prompts = parts
    return Encoded(ids, lengths, prompts, size)


def serve(folder: str, kind: str, dtype: str, start: str):
    """The process that encodes."""
    listen(signal.SIG_IGN)  # its parent ends it, and Ctrl-C reaches both
    tokenizer = load_tokenizer(Path(folder))
    stdin, stdout = open(0, "rb", 0), open(1, "wb", 0)  # noqa: SIM115, to the end
    while True:
        try:
            n, size = REQUEST.unpack(read_all(stdin, REQUEST.size))
            lengths = np.frombuffer(read_all(stdin, 8 * n), "<i8").tolist()
            text = read_all(stdin, size).decode("utf-8", "surrogatepass")
        except EOFError:
            return
        texts = [text[a:b] for a, b in pairwise(accumulate(lengths, initial=0))]
        try:
            found = encode(kind, tokenizer, texts, dtype, start == "start")
        except UserError as error:
            said = str(error).encode()
            write_all(stdout, ANSWER.pack(-1, len(said), 0) + said)
            continue
        for part in (found.ids, found.lengths, found.prompts):
            data = b"" if part is None else part.tobytes()
            write_all(stdout, ANSWER.pack(part is not None, len(data), found.bytes))
            write_all(stdout, data)


def ordered_map(
    work: Callable, items: Iterable, threads: int, stop: Callable = lambda: None
) -> Iterator:
    """work(item) of each, in their order; threads do it, and few are ahead: memory is bounded.

    stop: has what still runs at the end, of a signal, say, end soon.
    """
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
        finally:  # what has not been begun never is
            pool.shutdown(wait=False, cancel_futures=True)
            stop()


if __name__ == "__main__":
    try:
        serve(*sys.argv[1:])
    except BrokenPipeError:
        os._exit(1)
