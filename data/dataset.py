"""Text to token files: tokenised once, memory-mapped ever after.

A prepared data set is a folder in `data/cache/`, named by the hash of its source and of every
setting that shapes it: complete or absent, because it is built under a hidden name and renamed.

    manifest.json  tokenizer.json | tokenizer.model
    train.ids  val.ids          the token ids, little-endian, uint16 or uint32, end to end
    train.starts  val.starts    documents only: int64, where each begins, and the end of the last
    train.prompts  val.prompts  documents only: int32, how many of its ids are prompt and <start>
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from data.config import DataConfig
from data.sources import CACHE, Source, open_source
from data.tokenizer import CharTokenizer, load_tokenizer, train_sentencepiece
from model.config import UserError

FORMAT = 1
CHUNK = 4096  # documents tokenised at a time
HELD_OUT = 10  # validation pairs that travel with every checkpoint

Report = Callable[[str], None]


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


@dataclass(frozen=True)
class Dataset:
    """A prepared source: its tokenizer, its splits, and pairs held out to generate from."""

    name: str
    kind: str  # "stream", "lines" or "pairs"
    fingerprint: str
    tokenizer: object
    tokenizer_given: bool  # not made from this source
    train: Split
    val: Split | None
    held_out: list[dict]


def prepare(config: DataConfig, report: Report = print, tokenizer=None) -> Dataset:
    """Opens the data set of `config`, after preparing it if it is not in the cache yet.

    `tokenizer` is used in place of the one that `config` describes.
    """
    cache = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else CACHE
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{cache}: {reason}: set data.cache_dir to a folder that can be written"
        ) from None
    source = open_source(config, report, cache)
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "kind": source.kind,
        "tokenizer": tokenizer.fingerprint if tokenizer else describe_tokenizer(config),
        "val_fraction": 0 if source.val else config.val_fraction,
    }
    fingerprint = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    folder = cache / f"{source.name}-{fingerprint}"
    with FileLock(f"{folder}.lock"):  # two runs may prepare the same data at once
        if not (folder / "manifest.json").exists():
            with built_at(folder) as unfinished:
                build(source, config, fingerprint, unfinished, report, tokenizer)
    return open_dataset(folder, tokenizer is not None)


@contextmanager
def built_at(folder: Path) -> Iterator[Path]:
    """A hidden folder that becomes `folder` when the block ends well, and vanishes otherwise."""
    prefix = f".{folder.name}-"
    for left in folder.parent.glob(prefix + "*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        if folder.exists():  # a folder without a manifest is nobody's
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except BrokenPipeError:
        raise  # of what is reported, not of what is written
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}: nothing was kept") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def describe_tokenizer(config: DataConfig) -> list:
    """The settings that shape a tokenizer made here."""
    return [config.tokenizer, config.vocab_size if config.tokenizer in ("bpe", "unigram") else 0]


def build(
    source: Source,
    config: DataConfig,
    fingerprint: str,
    folder: Path,
    report: Report,
    tokenizer=None,
):
    """Tokenizer, token files and manifest of a source, into an existing empty folder."""
    is_stream = source.kind == "stream"
    train, val = split_stream(source, config) if is_stream else split_documents(source, config)
    tokenizer = tokenizer or make_tokenizer(config, source, train, report)
    tokenizer.save(folder)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    manifest = {
        "format": FORMAT,
        "name": source.name,
        "kind": source.kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "held_out": [],
        "splits": {},
    }
    write = write_stream if is_stream else write_documents
    for name, texts in (("train", train), ("val", val)):
        if texts is not None:
            report(f"tokens: {name} split of {source.name}")
            counts = write(texts(), tokenizer, folder / name, dtype)
            manifest["splits"][name] = counts
    check_not_empty(manifest["splits"], config, source)
    if source.kind == "pairs" and val is not None:
        manifest["held_out"] = hold_out(val())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check_not_empty(splits: dict, config: DataConfig, source: Source):
    """Refuses a split without a single token to predict."""
    for name, counts in splits.items():
        if counts["tokens"] < 2:
            what = "data.val_path" if source.val and name == "val" else "data.path"
            raise UserError(
                f"{what}: {source.name} leaves no text for the {name} split with "
                f"data.val_fraction = {config.val_fraction}: give more text"
                + (", or set data.val_fraction = 0 for no validation" if name == "val" else "")
            )


# Splitting ------------------------------------------------------------------------------------


def split_stream(source: Source, config: DataConfig):
    """Readers of the training part and of the last `val_fraction` of the characters."""
    if source.val or not config.val_fraction:
        return source.train, source.val
    total = sum(map(len, source.train()))
    cut = total - round(total * config.val_fraction)

    def part(start: int, end: int) -> Iterator[str]:
        seen = 0
        for text in source.train():
            piece = text[max(0, start - seen) : max(0, end - seen)]
            seen += len(text)
            if piece:
                yield piece
            if seen >= end:
                return

    return lambda: part(0, cut), lambda: part(cut, total)


def split_documents(source: Source, config: DataConfig):
    """Readers of the documents on either side: the hash of the normalised prompt decides.

    So a prompt never stands on both sides, however often it occurs, and a document stays on its
    side when others are added.
    """
    if source.val or not config.val_fraction:
        return source.train, source.val
    bound = config.val_fraction
    return (
        lambda: (d for d in source.train() if share(d) >= bound),
        lambda: (d for d in source.train() if share(d) < bound),
    )


def share(document) -> float:
    """Where a document falls in [0, 1): by its prompt, or by its text where there is none."""
    text = document if isinstance(document, str) else document[0] or document[1]
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def hold_out(pairs: Iterable[tuple[str, str]]) -> list[dict]:
    """A few pairs with different prompts, spread over the split by their hash."""
    by_share = {}
    for pair in pairs:
        by_share.setdefault(share(pair), pair)
        if len(by_share) > 100 * HELD_OUT:  # memory does not grow with the split
            by_share = dict(sorted(by_share.items())[:HELD_OUT])
    chosen = [pair for _, pair in sorted(by_share.items())[:HELD_OUT]]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]


# Tokenising -----------------------------------------------------------------------------------


def make_tokenizer(config: DataConfig, source: Source, train, report: Report):
    """Characters of the whole source, or a SentencePiece model of its training part."""
    if config.tokenizer in ("bpe", "unigram"):
        report(f"tokenizer: training SentencePiece {config.tokenizer} of {config.vocab_size:,}")
        texts = train() if source.kind != "pairs" else chain.from_iterable(train())
        return train_sentencepiece(texts, config.tokenizer, config.vocab_size, report)
    characters = set()
    readers = [source.train()] + ([source.val()] if source.val else [])
    for document in chain.from_iterable(readers):
        characters.update(*((document,) if isinstance(document, str) else document))
    tokenizer = CharTokenizer(characters, config.tokenizer)
    report(f"tokenizer: {tokenizer.vocab_size:,} characters and special tokens")
    return tokenizer


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


# Opening --------------------------------------------------------------------------------------


def open_dataset(folder: Path, tokenizer_given: bool = False) -> Dataset:
    """Memory-maps a prepared folder; checks sizes, and that every id is in the vocabulary."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        tokenizer = load_tokenizer(folder)
        dtype, vocab_size = np.dtype(manifest["dtype"]), int(manifest["vocab_size"])
        splits = {
            name: open_split(folder / name, counts, dtype, vocab_size)
            for name, counts in manifest["splits"].items()
        }
        if tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the manifest {vocab_size}"
            )
        return Dataset(
            manifest["name"],
            manifest["kind"],
            manifest["fingerprint"],
            tokenizer,
            tokenizer_given,
            splits["train"],
            splits.get("val"),
            manifest["held_out"],
        )
    except UserError as error:
        raise UserError(f"{error}; remove {folder} and it is prepared again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not a prepared data set ({type(error).__name__}: {error}); "
            "remove it and it is prepared again"
        ) from None


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
