"""Text to token files: tokenised once, memory-mapped ever after.

A prepared data set is a folder in `data/cache/`, named by the hash of its source and of every
setting that shapes it: complete or absent, because it is built under a hidden name and renamed.

    manifest.json  tokenizer's files, as in a checkpoint
    train-* val-*               shards of token files, as data/prepared/token_files.py has them
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import get_args

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from common.errors import MISSING, UnreadableError, UserError, refuse
from common.files import (
    checksummed_json,
    hash_file,
    is_address,
    read_checksummed_json,
    refuse_no_file,
    replace_synced,
    user_path,
)
from data.config import DEFAULT_CACHE_DIR, DataConfig, Kind, as_paths
from data.prepared.encoding import Encoder, EndedError
from data.prepared.remote_shards import RemoteFolder, open_remote_split, verify_remote
from data.prepared.token_files import Split, check_shard, check_shards, check_sizes, open_split
from data.prepared.writing import PROGRESS, Progress, marks, open_writers, recorded, write_shards
from data.prompt_format import are_pairs
from data.slots import PLACEHOLDERS, hidden
from data.slots import VERSION as SLOTS_VERSION
from data.sources.paths import split_suffix
from data.sources.readers import Pair, Place, Source, open_source
from data.sources.remote import Store, has_magic, name_of
from data.tokenizers.load import (
    ByteTokenizer,
    CharTokenizer,
    ForeignTokenizer,
    Tokenizer,
    load_tokenizer,
)
from data.tokenizers.round_trip import warning
from data.tokenizers.special_tokens import FLAGS
from data.tokenizers.train_sentencepiece import train_sentencepiece

FORMAT = 1  # of the token ids: another one is other data, on which no older run can be resumed
LAYOUT = 3  # of the folder: another one is prepared beside those of older versions
MAX_HELD_OUT = 10  # validation pairs that travel with every checkpoint

SMALL = 1 << 26  # tokens that are checked by their hashes whenever they are opened

Log = Callable[[str], object]
# where to begin and to end in the texts, and in those for validation; None: at their end
Share = Sequence[tuple[Place, Place | None]]
WHOLE: Share = [(Place(), None)] * 2


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
    start_token: bool  # data.start_token, as it was when this was prepared
    slots: bool = field(default=False, kw_only=True)  # pairs have placeholders for arguments

    @property
    def has_start(self) -> bool:
        """Whether each document begins with a token of its own that nothing is to predict."""
        return self.start_token and self.tokenizer.start_id != self.tokenizer.end_id


def prepare(
    config: DataConfig,
    log: Log = print,
    tokenizer: Tokenizer | None = None,
    jobs: int = 0,
    source: Source | None = None,
) -> Dataset:
    """Opens the data set of `config`, after preparing it if it is not in the cache yet.

    `tokenizer` is used in place of the one that `config` describes. jobs: how many processes or
    threads encode; 0: as many as are of use. source: that of `config`, if it is open already.
    """
    if folder := prepared_folder(config, log):
        return open_given(folder, config, tokenizer)
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    source = source or open_source(config, log, cache)
    if isinstance(tokenizer, ForeignTokenizer):
        log(f"tokenizer: {tokenizer.describe()}")
        if found := warning(tokenizer, source.train()):
            log(found)
    fingerprint = fingerprint_of(source, config, tokenizer)
    folder = cache / f"{source.name}-{fingerprint}-{LAYOUT}"
    with building(folder, fingerprint) as unfinished:
        if unfinished:
            sweep(source, unfinished)
            build(source, config, fingerprint, unfinished, log, tokenizer, jobs)
    return open_dataset(folder, tokenizer is not None)


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


def check_slots(source: Source, config: DataConfig):
    """Refuses argument slots for what has no prompts."""
    if config.slots and source.kind != "pairs":
        raise UserError(
            f"data.slots = true: takes pairs, but {source.name} is {source.kind}; leave it out, or "
            "give prompts and completions"
        )


@contextmanager
def writing(cache: Path, key: str = "data.cache_dir") -> Generator[None]:
    """Says what to do where the folder for prepared data that a setting names cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{cache}: {reason}; set {key} to a writable folder") from None


@contextmanager
def building(folder: Path, fingerprint: str, key: str = "data.cache_dir") -> Generator[Path | None]:
    """A hidden folder that becomes `folder` when the block ends well; None if that is there.

    It may hold what a process that was ended had made of the same. What has been recorded stays
    for the next one, unless the block ends because the source or the settings are wrong.
    """
    with writing(folder.parent, key):
        is_there = (folder / "manifest.json").exists()  # and nothing need be written
        lock = nullcontext() if is_there else FileLock(f"{folder}.lock").acquire()
    with lock:  # two runs may prepare the same data at once
        if (folder / "manifest.json").exists():
            yield None
            return
        unfinished = folder.with_name(f".{folder.name}")
        with writing(folder.parent, key):
            if Progress(unfinished, fingerprint)["tokenizer"] is None:
                shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(0o700, exist_ok=True)
        keep = True
        try:
            yield unfinished
            (unfinished / PROGRESS).unlink(missing_ok=True)
            if folder.exists():  # a folder without a manifest is nobody's
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
        except (BrokenPipeError, EndedError):
            raise  # BrokenPipeError: of what is reported, not of what is written
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


def sweep(source: Source, unfinished: Path):
    """Removes what is unfinished of earlier contents of the same files, unless it is worked at."""
    for other in unfinished.parent.glob(f".{source.name}-*-{LAYOUT}"):
        known = recorded(other).get("source")
        lock = FileLock(f"{other.parent / other.name[1:]}.lock", blocking=False)
        if other != unfinished and known != source.fingerprint:
            with suppress(Timeout, OSError), lock:
                shutil.rmtree(other, ignore_errors=True)


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


def check_sides(source: Source, config: DataConfig):
    """Refuses documents that all fall on one side of the split; the first few nearly always tell.

    Before anything is made of them, because an empty side has many other consequences.
    """
    if source.kind == "stream" or source.val or not config.val_fraction:
        return
    sides, different, count = set(), set(), 0
    for side, document in split_texts(source, config):
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


def count_characters(source: Source, config: DataConfig) -> int:
    """How long a stream is of which the end is held out; 0 where that is of no interest."""
    splits = source.kind == "stream" and not source.val and config.val_fraction
    return sum(map(len, source.train())) if splits else 0


def split_texts(
    source: Source,
    config: DataConfig,
    characters: int = 0,
    place: Place | None = None,
    share: Share | None = None,
    mark: Callable[[str | Pair], Iterable[dict]] = lambda _: (),
) -> Iterator:
    """(its side, text or pair) of each document or piece of a stream, in one pass from `place` on.

    A stream of so many `characters` is cut in one place. For others the hash of the normalised
    prompt decides, so that a prompt never stands on both sides, however often it occurs, and a
    document stays on its side when others are added. After each comes what `mark` makes of it.
    """
    place = place or Place()
    bound = 0 if source.val else config.val_fraction
    cut = characters - round(characters * bound)
    for is_val, item in read_all(source, place, share or WHOLE):
        if is_val or not bound or source.kind != "stream":
            side = is_val or (bound and hash_fraction(item) < bound)
            yield "val" if side else "train", item
        else:
            end = min(max(0, cut - place.characters), len(item))
            place.characters += len(item)
            for side, piece in (("train", item[:end]), ("val", item[end:])):
                if piece:
                    yield side, piece
        yield from mark(item)


def read_all(source: Source, place: Place, share: Share) -> Iterator[tuple[bool, str | Pair]]:
    """(whether it is of the files for validation, item) of all from `place` on."""
    for number, reader in enumerate(filter(None, (source.train, source.val))):
        if number < place.reader:
            continue
        begin, end = share[number]
        if number > place.reader:
            place.reader, place.file, place.item = number, begin.file, begin.item
            place.tally = begin.tally
        for item in reader(place, end):
            yield number == 1, item


def hash_fraction(document: str | Pair) -> float:
    """Where a document falls in [0, 1): by its prompt, or by its text where there is none."""
    text = document if isinstance(document, str) else document[0] or document[1]
    normalised = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") * 2.0**-64


def collect_held_out(documents: Iterable, by_share: dict[float, Pair]) -> Iterator:
    """The documents as they come; `by_share` gets what `hold_out` chooses from."""
    for item in documents:
        if not isinstance(item, dict) and item[0] == "val":
            by_share.setdefault(hash_fraction(item[1]), item[1])
            if len(by_share) > 100 * MAX_HELD_OUT:  # memory does not grow with the split
                for each in sorted(by_share)[MAX_HELD_OUT:]:
                    del by_share[each]
        yield item


def hold_out(by_share: dict[float, tuple[str, str]]) -> list[dict]:
    """A few pairs with different prompts, spread over the split by their hash."""
    chosen = [pair for _, pair in sorted(by_share.items())[:MAX_HELD_OUT]]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in chosen]


# Tokenising -----------------------------------------------------------------------------------


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


def named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer at data.tokenizer_path, if that is given."""
    path = config.tokenizer_path
    if not path:
        return None
    refuse_no_file(path, f"data.tokenizer_path = {path}")
    tokens = {role: getattr(config, flag.removeprefix("data.")) for role, flag in FLAGS.items()}
    try:
        given = {role: token for role, token in tokens.items() if token}
        return load_tokenizer(user_path(path), given, config.tokenizer_pattern)
    except UserError as error:
        raise UserError(f"data.tokenizer_path: {error}") from None


# Opening --------------------------------------------------------------------------------------


def open_dataset(folder: Path | RemoteFolder, tokenizer_given: bool = False) -> Dataset:
    """Memory-maps a prepared folder, or opens one in an object store.

    What is small is checked by its hashes. Of what is large, sizes are, and each id when it is
    read; `python -m tools.prepare --verify` checks all of it.
    """
    remote = folder if isinstance(folder, RemoteFolder) else None
    folder = local_copy(folder)
    with explained(folder):
        manifest = read_checksummed_json(folder / "manifest.json")
        check_manifest(manifest)
        tokenizer = load_tokenizer(folder)
        dtype, vocab_size = np.dtype(manifest["dtype"]), int(manifest["vocab_size"])
        shards = list(chain.from_iterable(manifest["splits"].values()))
        whole = sum(shard["tokens"] for shard in shards) <= SMALL
        splits = {
            name: open_remote_split(remote, manifest["kind"], shards, dtype, vocab_size)
            if remote
            else open_split(folder, manifest["kind"], shards, dtype, vocab_size, whole)
            for name, shards in manifest["splits"].items()
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
            manifest.get("start_token", True),
            slots=manifest.get("slots") is True,
        )


@contextmanager
def explained(folder: Path) -> Generator[None]:
    """Says what to do about a prepared folder that is not as it was written."""
    try:
        yield
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


def check_manifest(manifest: dict, is_part: bool = False):
    """Raises ValueError unless a manifest is one that `build` could have written."""
    if not (
        manifest["dtype"] in ("<u2", "<u4")  # not of objects, say, which NumPy would map, too
        and manifest["kind"] in get_args(Kind)
        and isinstance(manifest["name"], str)
        and isinstance(manifest["fingerprint"], str)
        and are_pairs(manifest["held_out"])
        and isinstance(manifest.get("start_token", True), bool)
        and type(manifest["vocab_size"]) is int
        and manifest["splits"].keys() <= {"train", "val"}
        and (is_part or all(manifest["splits"].values()))
    ):
        raise ValueError("a field of manifest.json is missing or of the wrong type")
    for shards in manifest["splits"].values():
        check_shards(manifest["kind"], shards)


def check_files(folder: Path, hashes: dict[str, str]):
    """Raises UserError naming the first file that is not as it was written."""
    for name, digest in hashes.items():
        if Path(name).name != name or hash_file(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged (its sha256 is not that of manifest.json)")


def verify(folder: Path | RemoteFolder, log: Log = print):
    """Checks every file of a prepared folder by its hash. Raises UserError naming the first."""
    remote = folder if isinstance(folder, RemoteFolder) else None
    folder = local_copy(folder)
    with explained(folder):
        manifest = read_checksummed_json(folder / "manifest.json")
        check_manifest(manifest)
        check_files(folder, manifest["files"])
        dtype, vocab_size = np.dtype(manifest["dtype"]), manifest["vocab_size"]
        for name, shards in manifest["splits"].items():
            if remote:
                verify_remote(remote, manifest["kind"], shards, manifest["dtype"])
            else:
                for shard in tqdm(shards, name, unit="shard", leave=False, disable=None):
                    check_sizes(folder, manifest["kind"], shard, dtype)
                    check_shard(folder, manifest["kind"], shard, dtype, vocab_size)
            tokens = sum(shard["tokens"] for shard in shards)
            log(f"{name}: {len(shards):,} shards, {tokens:,} tokens: every hash is right")


def local_copy(folder: Path | RemoteFolder) -> Path:
    """A folder with manifest and tokenizer. Raises UserError."""
    if isinstance(folder, Path):
        return folder
    if copied := folder.copy():
        return copied
    raise UserError(f"{folder}: has no manifest.json of prepared data; fix the address")


# A prepared folder as data.path -------------------------------------------------------------------


def prepared_folder(config: DataConfig, log: Log) -> Path | RemoteFolder | None:
    """The folder that data.path names if it is one of prepared data."""
    paths = as_paths(config.path)
    if len(paths) == 1 and is_address(paths[0]):
        may_be = not has_magic(paths[0]) and not split_suffix(name_of(paths[0]).name)[0]
        folder = RemoteFolder(paths[0], store_of(config, log))
        return folder if may_be and folder.copy() else None
    folder = user_path(paths[0]) if len(paths) == 1 else Path()
    try:
        manifest = (folder / "manifest.json").read_bytes() if paths else b""
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    return folder if b'"splits":' in manifest else None


def store_of(config: DataConfig, log: Log) -> Store:
    """Where the blocks of remote files are kept."""
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    return Store.of(cache, config.remote_cache_gb, log)


def open_given(
    folder: Path | RemoteFolder, config: DataConfig, tokenizer: Tokenizer | None
) -> Dataset:
    """A prepared folder as it is: its splits and its tokenizer are those it was prepared with."""
    data = open_dataset(folder, tokenizer is not None)
    if config.kind not in ("auto", data.kind):
        raise UserError(
            f"data.kind = {config.kind}: {folder} was prepared as {data.kind}; leave it out"
        )
    if data.kind != "documents":
        refuse([f"data.{fault}" for fault in config.for_documents_alone(data.kind)])
    if data.start_token and not config.start_token:
        raise UserError(
            f"data.start_token = false: {folder} was prepared with <start>; leave it out, or give "
            "the texts as data.path"
        )
    if config.slots and not data.slots:
        raise UserError(
            f"data.slots = true: {folder} was prepared without; leave it out, or give the texts"
        )
    if config.val_path:
        raise UserError(
            f"data.val_path = {config.val_path}: {folder} is prepared, with its own split; leave "
            "it out, or give the texts as data.path"
        )
    if tokenizer and tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"data.path = {folder}: is prepared with another tokenizer than the one that was given "
            "or the checkpoint has; give the texts, to be prepared with that"
        )
    return data
