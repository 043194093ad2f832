"""A source to a prepared folder: its tokenizer, its texts as ids in shards, its manifest.

    manifest.json  tokenizer's files, as in a checkpoint
    train-* val-*               shards of token files, as token_files.py has them

It is complete or absent, because it is built under a hidden name and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UnreadableError, UserError
from common.files import checksummed_json, hash_file, read_checksummed_json, replace_synced
from data.config import DataConfig
from data.prepared.encoding import Encoder, EndedError
from data.prepared.splitting import (
    WHOLE,
    Share,
    check_sides,
    collect_held_out,
    count_characters,
    hash_fraction,
    hold_out,
    split_texts,
)
from data.prepared.writing import PROGRESS, Progress, marks, open_writers, recorded, write_shards
from data.slots import PLACEHOLDERS, hidden
from data.slots import VERSION as SLOTS_VERSION
from data.sources.readers import Place
from data.sources.records import Pair
from data.sources.source import Source
from data.tokenizers.base import Tokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.char import CharTokenizer
from data.tokenizers.foreign import ForeignTokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.round_trip import warning
from data.tokenizers.train_sentencepiece import train_sentencepiece

FORMAT = 1  # of the token ids: another one is other data, on which no older run can be resumed
LAYOUT = 3  # of the folder: another one is prepared beside those of older versions
Log = Callable[[str], object]


def fingerprint_of(source: Source, config: DataConfig, tokenizer: Tokenizer | None) -> str:
    """Hex hash of all that makes the token ids."""
    settings = {
        "format": FORMAT,
        "source": source.fingerprint,
        "kind": source.kind,
        "tokenizer": tokenizer.fingerprint if tokenizer else describe_tokenizer(config),
        "val_fraction": 0 if source.val else config.val_fraction,
    }
    if not config.start_token:  # otherwise the same as before there was this setting
        settings["start_token"] = False
    check_slots(source, config)
    if config.slots:
        settings["slots"] = SLOTS_VERSION
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


def describe_tokenizer(config: DataConfig) -> list:
    """The settings that shape a tokenizer made here."""
    return [config.tokenizer, config.vocab_size if config.tokenizer in ("bpe", "unigram") else 0]


def check_round_trip(tokenizer: Tokenizer | None, source: Source, log: Log):
    """Says what a tokenizer of others is, and loses. Raises UserError where that is nearly all."""
    if isinstance(tokenizer, ForeignTokenizer):
        log(f"tokenizer: {tokenizer.describe()}")
        if found := warning(tokenizer, source.train()):
            log(found)


def check_slots(source: Source, config: DataConfig):
    """Refuses argument slots for what has no prompts."""
    if config.slots and source.kind != "pairs":
        raise UserError(
            f"data.slots = true: takes pairs, but {source.name} is {source.kind}; leave it out, or "
            "give prompts and completions"
        )


# The folder ---------------------------------------------------------------------------------------


@contextmanager
def writing(cache: Path, key: str = "data.cache_dir") -> Generator[None]:
    """Says what to do where the folder for prepared data that a setting names cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{cache}: {reason}; set {key} to a writable folder") from None


@contextmanager
def building(
    folder: Path, fingerprint: str, log: Log, key: str = "data.cache_dir"
) -> Generator[Path | None]:
    """A hidden folder that becomes `folder` when the block ends well; None if that is there.

    It may hold what a process that was ended had made of the same. What has been recorded stays
    for the next one, unless the block ends because the source or the settings are wrong.
    """
    with writing(folder.parent, key):
        is_there = (folder / "manifest.json").exists()  # and nothing need be written
        lock = nullcontext() if is_there else acquired(FileLock(f"{folder}.lock"), folder, log)
    with lock:  # two runs may prepare the same data at once
        refuse_other(folder, fingerprint, key)
        if (folder / "manifest.json").exists():
            yield None
            return
        unfinished = folder.with_name(f".{folder.name}")
        with writing(folder.parent, key):
            if Progress(unfinished, fingerprint)["tokenizer"] is None:
                shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(exist_ok=True)
        keep = True
        try:
            yield unfinished
            (unfinished / PROGRESS).unlink(missing_ok=True)
            if folder.exists():  # a folder without a manifest is nobody's
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
        except (BrokenPipeError, EndedError, UnreadableError):
            raise  # BrokenPipeError: of what is reported; UnreadableError: as of a lost network
        except UserError:
            keep = False
            raise
        except OSError as error:
            kept = (unfinished / PROGRESS).exists()
            raise UserError(
                f"{folder}: {error.strerror or error} "
                f"({'what is done is kept for the next time' if kept else 'nothing was kept'}); "
                f"free some disk space, or set {key} to another folder"
            ) from None
        finally:
            if not (keep and (unfinished / PROGRESS).exists()):
                shutil.rmtree(unfinished, ignore_errors=True)


def refuse_other(folder: Path, fingerprint: str, key: str, why: str = ""):
    """Refuses a folder that is there, finished or not, of another corpus or other settings."""
    for file in (folder / "manifest.json", folder.with_name(f".{folder.name}") / PROGRESS):
        found = fingerprint
        with suppress(OSError, ValueError, KeyError):  # not there, or not whole yet
            found = read_checksummed_json(file)["fingerprint"]
        if found != fingerprint:
            raise UserError(
                f"{file.parent}: of another corpus or other settings{why}; give those again, or "
                f"another {key}, or remove it"
            )


def acquired(lock: FileLock, folder: Path, log: Log):
    """A lock that is held now; whoever has to wait for it is told."""
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        log(f"{folder}: another process is preparing it; waiting for that")
        return lock.acquire()


def sweep(source: Source, unfinished: Path):
    """Removes what is unfinished of earlier contents of the same files, unless it is worked at."""
    for other in unfinished.parent.glob(f".{source.name}-*-{LAYOUT}"):
        known = recorded(other).get("source")
        lock = FileLock(f"{other.parent / other.name[1:]}.lock", blocking=False)
        if other != unfinished and known != source.fingerprint:
            with suppress(Timeout, OSError), lock:
                shutil.rmtree(other, ignore_errors=True)


# What is in it ------------------------------------------------------------------------------------


def build(
    source: Source,
    config: DataConfig,
    fingerprint: str,
    folder: Path,
    log: Log,
    tokenizer: Tokenizer | None = None,
    jobs: int = 0,
    share: Share | None = None,
):
    """Tokenizer, shards and manifest of a source, into a folder that is empty or `building`'s.

    share: the places between which to read, for one of several machines; None: everything.
    """
    if (folder / "manifest.json").exists():  # it has only not been published
        return
    names = ["train", "val"] if source.val or config.val_fraction else ["train"]
    progress = Progress(folder, fingerprint)
    if progress["tokenizer"] is None:
        check_sides(source, config)
        characters = count_characters(source, config)
        tokenizer = tokenizer or make_tokenizer(config, source, characters, log)
        if config.slots and tokenizer.unk_id in tokenizer.encode(PLACEHOLDERS):
            raise UserError(
                "data.slots = true: the tokenizer at data.tokenizer_path has no tokens for "
                "placeholders; use one that was made with data.slots, or leave one of them out"
            )
        tokenizer.save(folder)
        progress.record(
            source=source.fingerprint, characters=characters, tokenizer=tokenizer.fingerprint
        )
    else:
        tokenizer = tokenizer or load_tokenizer(folder)
        log("tokenizer: made before")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    writers = open_writers(folder, names, source.kind, dtype, progress)
    place = Place(**progress["place"]) if progress["place"] else replace((share or WHOLE)[0][0])
    known = [(pair["prompt"], pair["completion"]) for pair in progress["held_out"] or []]
    held_out: dict[float, Pair] = {hash_fraction(pair): pair for pair in known}
    done = sum(shard["tokens"] for writer in writers.values() for shard in writer.shards)
    log(
        f"tokens: {' and '.join(names)} split of {source.name}"
        + (f", {done:,} of them made before" if done else "")
    )
    readers = [reader for reader in (source.train, source.val) if reader]

    def read() -> int:
        return place.read() + sum(sum(reader.sizes) for reader in readers[: place.reader])

    mark = marks(lambda: {"place": place.state(), "held_out": hold_out(held_out)})
    documents = split_texts(source, config, progress["characters"], place, share, mark)
    if source.kind == "pairs":
        documents = collect_held_out(documents, held_out)
    layout = "slots" if config.slots else source.kind
    jobs, start_token = jobs or tokenizer.threads, config.start_token
    encoder = Encoder(layout, tokenizer, dtype, folder, jobs, start_token)
    total = sum(sum(reader.sizes) for reader in readers)
    write_shards(documents, writers, encoder, progress, read, total)
    source.refuse_changes()
    if share is None:
        check_not_empty({name: w.shards for name, w in writers.items()}, config, source)
    manifest = {
        "format": FORMAT,
        "name": source.name,
        "kind": source.kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "start_token": start_token,
        "held_out": hold_out(held_out),
        "splits": {name: writer.shards for name, writer in writers.items()},
        "files": {name: hash_file(folder / name) for name in tokenizer.files()},
        **({"slots": True} if config.slots else {}),
    }
    replace_synced(folder / "manifest.json", checksummed_json(manifest))


def check_not_empty(splits: dict[str, list[dict]], config: DataConfig, source: Source):
    """Refuses a split without a single token to predict."""
    for name, shards in splits.items():
        if sum(shard["tokens"] for shard in shards) < 2:
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


def make_tokenizer(config: DataConfig, source: Source, characters: int, log: Log) -> Tokenizer:
    """Characters of the whole source, or a SentencePiece model of its training part."""
    symbols = PLACEHOLDERS if config.slots else ""
    if config.tokenizer in ("bpe", "unigram"):
        log(f"tokenizer: training SentencePiece {config.tokenizer}, {config.vocab_size:,} tokens")
        texts = split_texts(source, config, characters)
        if source.kind == "stream":  # its training part comes first
            texts = takewhile(lambda text: text[0] == "train", texts)
        documents = (document for side, document in texts if side == "train")
        # a document of another kind than pairs is its text
        texts = documents
        if source.kind == "pairs":
            texts = chain.from_iterable(map(hidden, documents) if config.slots else documents)
        return train_sentencepiece(texts, config.tokenizer, config.vocab_size, log, symbols)
    if config.tokenizer == "byte":
        return ByteTokenizer()
    alphabet = set(symbols)
    both = [source.train()] + ([source.val()] if source.val else [])
    for document in chain.from_iterable(both):
        alphabet.update(*((document,) if isinstance(document, str) else document))
    tokenizer = CharTokenizer(alphabet, config.tokenizer)
    log(f"tokenizer: {tokenizer.vocab_size:,} tokens (characters and special tokens)")
    return tokenizer
