"""Texts to shards, recorded so often that a process which is killed has lost little of it.

What is unfinished is a folder with the tokenizer, the shards so far and progress.json: where in the
source all that is written ends. The same command goes on from there, and ends in the same bytes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.files import checksummed_json, read_checksummed_json, replace_synced
from data.prepared.encoding import Block, Encoder, blocks
from data.prepared.manifest import PROGRESS
from data.prepared.token_files import ShardWriter

MARK = 1 << 26  # characters of the source between two records


class Progress:
    """What an unfinished folder holds, as the last process that worked at it has recorded."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder
        self.content: dict[str, Any] = recorded(folder)
        if self.content.get("fingerprint") != fingerprint:
            self.content = {"fingerprint": fingerprint}

    def __getitem__(self, key: str) -> Any:
        """What has been recorded, or None."""
        return self.content.get(key)

    def record(self, **more):
        """Records more, when the disk has what it tells of. Raises OSError."""
        self.content |= more
        replace_synced(self.folder / PROGRESS, checksummed_json(self.content))

    def forget(self):
        """Has all written anew but the tokenizer."""
        for key in ("place", "shards", "held_out"):
            self.content.pop(key, None)


def recorded(folder: Path) -> dict[str, Any]:
    """What the record in a folder says; nothing where there is none, or it is damaged."""
    try:
        return read_checksummed_json(folder / PROGRESS)
    except (OSError, ValueError):
        return {}


def open_writers(
    folder: Path, names: Iterable[str], kind: str, dtype: str, progress: Progress
) -> dict[str, ShardWriter]:
    """The writer of each split, where the last process has recorded that it was."""
    kept = progress["shards"] or {}
    try:
        writers = {n: ShardWriter(folder, n, kind, dtype, kept.get(n, ())) for n in names}
    except (OSError, ValueError, KeyError, TypeError):  # somebody has removed a file of them
        progress.forget()
        writers = {name: ShardWriter(folder, name, kind, dtype) for name in names}
    known = {shard["name"] for writer in writers.values() for shard in writer.shards}
    for file in [*folder.glob("train-*"), *folder.glob("val-*")]:
        if file.stem not in known:  # begun after the record
            file.unlink()
    return writers


def write_shards(
    documents: Iterable,
    writers: dict[str, ShardWriter],
    encoder: Encoder,
    progress: Progress,
    read: Callable[[], int] = lambda: 0,
    total: int = 0,
):
    """Encodes documents, each with the name of its split, and writes them to its shards.

    documents: also has dictionaries, which are recorded when all before them is written. read:
    how many bytes of the source had been read by now, of `total`.
    """
    try:
        with Bar(total, encoder.kind) as bar:
            bar.begin(read())
            for item, found in encoder(blocks(documents, encoder.kind, read)):
                if found is not None:
                    writers[item.split].write(found)
                    bar.update(item, len(found.ids))
                    continue
                for writer in writers.values():
                    writer.sync()
                progress.record(**item, shards={n: w.shards for n, w in writers.items()})
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()


class Bar:
    """On a terminal how far it is, by bytes of the source, and how fast; nothing elsewhere."""

    def __init__(self, total: int, kind: str):
        self.documents = self.tokens = 0
        self.unit = "" if kind == "stream" else "documents, "
        self.began = time.monotonic()
        self.bar = tqdm(total=total or None, unit="B", unit_scale=True, leave=False, disable=None)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_):
        self.bar.close()

    def begin(self, read: int):
        """What an earlier process has read is there, but says nothing of this one's speed."""
        self.bar.initial = self.bar.n = read

    def update(self, block: Block, tokens: int):
        self.documents += block.documents
        self.tokens += tokens
        if self.bar.disable:
            return
        speed = self.tokens / max(1e-9, time.monotonic() - self.began)
        count = f"{self.documents:,} {self.unit}" if self.unit else ""
        self.bar.set_postfix_str(f"{count}{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(max(0, block.read - self.bar.n))


def marks(state: Callable[[], dict]) -> Callable[[str | tuple], Iterator[dict]]:
    """Told of each document, gives what is to be recorded now and then."""
    since = 0

    def mark(document: str | tuple) -> Iterator[dict]:
        nonlocal since
        since += len(document) if isinstance(document, str) else sum(map(len, document))
        if since >= MARK:
            since = 0
            yield state()

    return mark
