"""Text to token files: tokenised once, memory-mapped ever after.

A prepared data set is a folder in `data/cache/`, named by the hash of its source and of every
setting that shapes it: complete or absent, because it is built under a hidden name and renamed.

    manifest.json  tokenizer.json | tokenizer.model
    train.* val.*               token files, as data/token_files.py has them
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast, get_args

import numpy as np
from filelock import FileLock

from common.errors import MISSING, UnreadableError, UserError
from common.files import checksummed_json, hash_file, read_checksummed_json, user_path
from data.config import DEFAULT_CACHE_DIR, DataConfig, Kind
from data.prompt_format import are_pairs
from data.readers import Pair, Source, open_source
from data.slots import PLACEHOLDERS, Slots
from data.slots import VERSION as SLOTS_VERSION
from data.token_files import Split, open_split, write_documents, write_packed, write_stream
from data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from data.train_tokenizer import train_sentencepiece

FORMAT = 1  # of the token ids: another one is other data, on which no older run can be resumed
LAYOUT = 2  # of the folder: another one is prepared beside those of older versions
MAX_HELD_OUT = 10  # validation pairs that travel with every checkpoint

Log = Callable[[str], object]
Reader = Callable[[], Iterator[str]]  # of a stream


@dataclass(frozen=True)
class Dataset:
    """A prepared source: its tokenizer, its splits, and pairs held out to generate from."""

    name: str
    kind: Kind
    fingerprint: str
    tokenizer: Tokenizer
    tokenizer_given: bool  # not made from this source
    train: Split
    val: Split | None
    held_out: list[dict]
    slots: bool = False  # pairs have placeholders for their arguments


def prepare(config: DataConfig, log: Log = print, tokenizer: Tokenizer | None = None) -> Dataset:
    """Opens the data set of `config`, after preparing it if it is not in the cache yet.

    `tokenizer` is used in place of the one that `config` describes.
    """
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    source = open_source(config, log, cache)
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "kind": source.kind,
        "tokenizer": tokenizer.fingerprint if tokenizer else describe_tokenizer(config),
        "val_fraction": 0 if source.val else config.val_fraction,
    }
    if config.slots:
        check_slots(source)
        settings["slots"] = SLOTS_VERSION
    fingerprint = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
    folder = cache / f"{source.name}-{fingerprint}-{LAYOUT}"
    with writing(cache):
        is_there = (folder / "manifest.json").exists()  # and nothing need be written
        lock = nullcontext() if is_there else FileLock(f"{folder}.lock").acquire()
    with lock:  # two runs may prepare the same data at once
        if not (folder / "manifest.json").exists():
            with published_folder(folder) as unfinished:
                build(source, config, fingerprint, unfinished, log, tokenizer)
    return open_dataset(folder, tokenizer is not None)


def check_slots(source: Source):
    """Refuses argument slots for what has no prompts."""
    if source.kind != "pairs":
        raise UserError(
            f"data.slots = true: takes pairs, but {source.name} is {source.kind}; leave it out, or "
            "give prompts and completions"
        )


@contextmanager
def writing(cache: Path) -> Generator[None]:
    """Says what to do where a folder for prepared data cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{cache}: {reason}; set data.cache_dir to a writable folder") from None


@contextmanager
def published_folder(folder: Path) -> Generator[Path]:
    """A hidden folder that becomes `folder` when the block ends well, and vanishes otherwise."""
    prefix = f".{folder.name}-"
    for left in folder.parent.glob(prefix + "*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with writing(folder.parent):
        unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        if folder.exists():  # a folder without a manifest is nobody's
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except BrokenPipeError:
        raise  # of what is reported, not of what is written
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error} (nothing was kept); free some disk space, or set "
            "data.cache_dir to another folder"
        ) from None
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
    log: Log,
    tokenizer: Tokenizer | None = None,
):
    """Tokenizer, token files and manifest of a source, into an existing empty folder."""
    names = ["train", "val"] if source.val or config.val_fraction else ["train"]
    check_sides(source, config)
    readers = split_stream(source, config) if source.kind == "stream" else None
    tokenizer = tokenizer or make_tokenizer(config, source, readers, log)
    tokenizer.save(folder)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    manifest: dict = {
        "format": FORMAT,
        "name": source.name,
        "kind": source.kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "held_out": [],
        "splits": {},
        **({"slots": True} if config.slots else {}),
    }
    log(f"tokens: {' and '.join(names)} split of {source.name}")
    paths = {name: folder / name for name in names}
    if readers:
        for name, path in paths.items():
            manifest["splits"][name] = write_stream(readers[name](), tokenizer, path, dtype)
    elif source.kind == "documents":
        texts = split_documents(source, config)
        manifest["splits"] = write_packed(texts, tokenizer, paths, dtype)
    else:
        by_share = {}
        documents = collect_held_out(split_documents(source, config), by_share)
        sizes = dict.fromkeys(names, 0)
        if config.slots:
            documents = with_slots(documents, sizes)
        manifest["splits"] = write_documents(documents, tokenizer, paths, dtype)
        if config.slots:  # of the text that a placeholder stands for, too
            for name, counts in manifest["splits"].items():
                counts["bytes"] = sizes[name]
        if source.kind == "pairs":
            manifest["held_out"] = hold_out(by_share)
    check_not_empty(manifest["splits"], config, source)
    manifest["files"] = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_bytes(checksummed_json(manifest))


def check_not_empty(splits: dict, config: DataConfig, source: Source):
    """Refuses a split without a single token to predict."""
    for name, counts in splits.items():
        if counts["tokens"] < 2:
            if source.val:
                key = "data.val_path" if name == "val" else "data.path"
                raise UserError(
                    f"{key}: a text of one token leaves none to predict; give more text"
                )
            raise UserError(
                f"data.path: {source.name} leaves no text for the {name} split with "
                f"data.val_fraction = {config.val_fraction}; give more text"
                + (", or set data.val_fraction = 0 for no validation" if name == "val" else "")
            )


def check_sides(source: Source, config: DataConfig):
    """Refuses documents that all fall on one side of the split; the first few nearly always tell.

    Before anything is made of them, because an empty side has many other consequences.
    """
    if source.kind == "stream" or source.val or not config.val_fraction:
        return
    sides, different, count = set(), set(), 0
    for side, document in split_documents(source, config):
        sides.add(side)
        if len(sides) == 2:
            return
        count += 1
        if len(different) < 2:
            different.add(hash_fraction(document))
    missing = "train" if "val" in sides else "val"
    what = "prompts" if source.kind == "pairs" else source.kind
    why = f"none of its {count:,} {what} falls there; give more text"
    if len(different) == 1:
        why = f"all its {count:,} {what} are equal, and stay on one side; give different {what}"
    if count == 1:
        why = "it is a single document; give more"
        if source.kind == "lines":
            why = 'it is a single line, and so a single document; set data.kind = "stream"'
        if source.kind == "documents":
            why = 'it is a single document; set data.separator, or data.kind = "stream"'
    raise UserError(
        f"data.path: {source.name} leaves nothing for the {missing} split with data.val_fraction = "
        f"{config.val_fraction}: {why}, or set data.val_fraction = 0 for no validation"
    )


# Splitting ------------------------------------------------------------------------------------


def split_stream(source: Source, config: DataConfig) -> dict[str, Reader]:
    """Readers of the training part and of the last `val_fraction` of the characters."""
    if source.val:
        return {"train": source.train, "val": source.val}
    if not config.val_fraction:
        return {"train": source.train}
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

    return {"train": lambda: part(0, cut), "val": lambda: part(cut, total)}


def split_documents(source: Source, config: DataConfig) -> Iterator[tuple[str, str | Pair]]:
    """Each document with its side, in one pass: the hash of the normalised prompt decides.

    So a prompt never stands on both sides, however often it occurs, and a document stays on its
    side when others are added.
    """
    bound = 0 if source.val else config.val_fraction
    for document in source.train():
        yield "val" if bound and hash_fraction(document) < bound else "train", document
    for document in source.val() if source.val else ():
        yield "val", document


def hash_fraction(document: str | Pair) -> float:
    """Where a document falls in [0, 1): by its prompt, or by its text where there is none."""
    text = document if isinstance(document, str) else document[0] or document[1]
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") * 2.0**-64


def collect_held_out(documents: Iterable[tuple], by_share: dict) -> Iterator[tuple]:
    """The documents as they come; `by_share` gets what `hold_out` chooses from."""
    for name, document in documents:
        if name == "val":
            by_share.setdefault(hash_fraction(document), document)
            if len(by_share) > 100 * MAX_HELD_OUT:  # memory does not grow with the split
                for each in sorted(by_share)[MAX_HELD_OUT:]:
                    del by_share[each]
        yield name, document


def with_slots(
    documents: Iterable[tuple[str, Pair]], sizes: dict[str, int]
) -> Iterator[tuple[str, Pair]]:
    """Pairs with placeholders for their arguments; `sizes` gets each side's bytes without them."""
    for name, (prompt, completion) in documents:
        sizes[name] += len(completion.encode())
        slots = Slots(prompt)
        yield name, (slots.prompt, slots.hide(completion))


def hold_out(by_share: dict[float, tuple[str, str]]) -> list[dict]:
    """A few pairs with different prompts, spread over the split by their hash."""
    chosen = [pair for _, pair in sorted(by_share.items())[:MAX_HELD_OUT]]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]


# Tokenising -----------------------------------------------------------------------------------


def make_tokenizer(
    config: DataConfig, source: Source, readers: dict[str, Reader] | None, log: Log
) -> Tokenizer:
    """Characters of the whole source, or a SentencePiece model of its training part."""
    symbols = PLACEHOLDERS if config.slots else ""
    if config.tokenizer in ("bpe", "unigram"):
        log(f"tokenizer: training SentencePiece {config.tokenizer}, {config.vocab_size:,} tokens")
        if readers:
            texts = readers["train"]()
        else:
            sides = split_documents(source, config)
            if config.slots:
                sides = with_slots(cast(Iterator, sides), {"train": 0, "val": 0})
            documents = (document for name, document in sides if name == "train")
            pairs = source.kind == "pairs"
            # a document of another kind than pairs is its text
            texts = chain.from_iterable(documents) if pairs else cast(Iterator[str], documents)
        return train_sentencepiece(texts, config.tokenizer, config.vocab_size, log, symbols)
    characters = set(symbols)
    both = [source.train()] + ([source.val()] if source.val else [])
    for document in chain.from_iterable(both):
        characters.update(*((document,) if isinstance(document, str) else document))
    tokenizer = CharTokenizer(characters, config.tokenizer)
    log(f"tokenizer: {tokenizer.vocab_size:,} tokens (characters and special tokens)")
    return tokenizer


# Opening --------------------------------------------------------------------------------------


def open_dataset(folder: Path, tokenizer_given: bool = False) -> Dataset:
    """Memory-maps a prepared folder; checks sizes, and that every id is in the vocabulary."""
    try:
        manifest = read_checksummed_json(folder / "manifest.json")
        check_manifest(manifest)
        tokenizer = load_tokenizer(folder)
        dtype, vocab_size = np.dtype(manifest["dtype"]), int(manifest["vocab_size"])
        splits = {
            name: open_split(folder / name, counts, dtype, vocab_size)
            for name, counts in manifest["splits"].items()
        }
        check_files(folder, manifest["files"])
        if tokenizer.vocab_size != vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but manifest.json "
                f"says {vocab_size}"
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
            manifest.get("slots") is True,
        )
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"{error}; remove {folder} and it will be prepared again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in MISSING:
            raise UnreadableError(error, folder) from None
        raise UserError(
            f"{folder}: not a prepared data set ({type(error).__name__}: {error}); "
            "remove it and it will be prepared again"
        ) from None


def check_manifest(manifest: dict):
    """Raises ValueError unless a manifest is one that `build` could have written."""
    counts = [count for split in manifest["splits"].values() for count in split.values()]
    if not (
        manifest["dtype"] in ("<u2", "<u4")  # not of objects, say, which NumPy would map, too
        and manifest["kind"] in get_args(Kind)
        and isinstance(manifest["name"], str)
        and isinstance(manifest["fingerprint"], str)
        and are_pairs(manifest["held_out"])
        and all(type(count) is int for count in [manifest["vocab_size"], *counts])
    ):
        raise ValueError("a field of manifest.json is missing or of the wrong type")


def check_files(folder: Path, hashes: dict[str, str]):
    """Raises UserError naming the first file that is not as it was written."""
    for name, digest in hashes.items():
        if Path(name).name != name or hash_file(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged (its sha256 is not that of manifest.json)")
