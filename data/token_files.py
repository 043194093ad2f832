"""Token files: documents or one long text as ids, written once and memory-mapped ever after.

train.ids      the token ids, little-endian, uint16 or uint32, end to end
train.starts   documents only: int64, where each begins, and the end of the last
train.prompts  documents only: int32, how many of its ids are prompt and <start>
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.config import UserError

CHUNK = 4096  # documents tokenised at a time


@dataclass(frozen=True)
class Split:
    """One side of a data set: `ids`, and for documents where each starts and its prompt ends."""

    ids: np.ndarray
    starts: np.ndarray | None
    prompts: np.ndarray | None
    bytes: int  # of the text to predict, in UTF-8

    def describe(self) -> str:
        """Its size, for people."""
        if self.starts is None:
            return f"{len(self.ids):,} tokens"
        return f"{len(self.starts) - 1:,} examples, {len(self.ids):,} tokens"

    def targets_per_byte(self) -> float:
        """Tokens to predict for each byte of text: nats a token times this are nats a byte."""
        targets = len(self.ids) if self.starts is None else len(self.ids) - int(self.prompts.sum())
        return targets / max(1, self.bytes)


# Writing ----------------------------------------------------------------------------------------


def write_stream(texts: Iterable[str], tokenizer, path: Path, dtype: str) -> dict:
    """Writes the ids of one long text. Returns its counts."""
    tokens = size = 0
    with open(f"{path}.ids", "wb") as file, progress("B") as bar:
        for text in texts:
            ids = tokenizer.encode_array(text).astype(dtype)
            file.write(ids.tobytes())
            n = len(text.encode())
            tokens, size = tokens + len(ids), size + n
            bar.update(n)
    return {"tokens": tokens, "bytes": size}


def write_documents(documents: Iterable, tokenizer, path: Path, dtype: str) -> dict:
    """Writes documents as `prompt <start> completion <end>`, lines as `<start> text <end>`."""
    tokens = size = count = 0
    documents = iter(documents)
    with (
        open(f"{path}.ids", "wb") as ids_file,
        open(f"{path}.starts", "wb") as starts_file,
        open(f"{path}.prompts", "wb") as prompts_file,
        progress("") as bar,
    ):
        starts_file.write(np.zeros(1, "<i8").tobytes())
        while chunk := list(islice(documents, CHUNK)):
            pairs = [("", d) if isinstance(d, str) else d for d in chunk]
            prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
            completions = tokenizer.encode_batch([completion for _, completion in pairs])
            rows = [
                [*p, tokenizer.start_id, *c, tokenizer.end_id]
                for p, c in zip(prompts, completions, strict=True)
            ]
            ends = tokens + np.cumsum([len(row) for row in rows], dtype="<i8")
            ids_file.write(np.fromiter(chain.from_iterable(rows), dtype).tobytes())
            starts_file.write(ends.tobytes())
            prompts_file.write(np.array([len(p) + 1 for p in prompts], "<i4").tobytes())
            tokens, count = int(ends[-1]), count + len(rows)
            size += sum(len(completion.encode()) for _, completion in pairs)
            bar.update(len(rows))
    return {"tokens": tokens, "documents": count, "bytes": size}


def progress(unit: str) -> tqdm:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(unit=unit or "example", unit_scale=bool(unit), leave=False, disable=None)


# Opening ----------------------------------------------------------------------------------------


def open_split(path: Path, counts: dict, dtype: np.dtype, vocab_size: int) -> Split:
    """One split's memory-mapped files. Raises UserError naming the file that is wrong."""
    ids = open_array(Path(f"{path}.ids"), dtype, counts["tokens"])
    for start in range(0, len(ids), 1 << 24):
        top = int(ids[start : start + (1 << 24)].max())
        if top >= vocab_size:
            raise UserError(f"{path}.ids: holds id {top}, the vocabulary has {vocab_size}")
    if "documents" not in counts:
        return Split(ids, None, None, counts["bytes"])
    n = counts["documents"]
    starts = open_array(Path(f"{path}.starts"), np.dtype("<i8"), n + 1)
    prompts = open_array(Path(f"{path}.prompts"), np.dtype("<i4"), n)
    lengths = np.diff(starts)
    if starts[0] != 0 or starts[-1] != len(ids) or not ((prompts >= 1) & (prompts < lengths)).all():
        raise UserError(f"{path}.starts: does not fit {path}.ids")
    return Split(ids, starts, prompts, counts["bytes"])


def open_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A memory-mapped file of exactly `count` numbers."""
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes where {count * dtype.itemsize} are due")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
