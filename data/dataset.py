"""A prepared data set: text is tokenised once, and memory-mapped ever after.

It is a folder in `data/cache/`, named by the hash of its source and of every setting that shapes
it. data/prepared/ has what makes such a folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError, refuse
from common.files import is_address, read_checksummed_json, user_path
from data.config import DEFAULT_CACHE_DIR, DataConfig, Kind, as_paths
from data.prepared.building import (
    LAYOUT,
    build,
    building,
    check_round_trip,
    fingerprint_of,
    sweep,
    writing,
)
from data.prepared.manifest import check_files, check_manifest, explained, what_is_begun
from data.prepared.remote_shards import RemoteFolder, open_remote_split, verify_remote
from data.prepared.token_files import Split, check_shard, check_sizes, open_split
from data.sources.paths import split_suffix
from data.sources.remote import Store, has_magic, name_of
from data.sources.source import Source, open_source
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer

SMALL = 1 << 26  # tokens that are checked by their hashes whenever they are opened
Log = Callable[[str], object]


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
        data = open_given(folder, config, tokenizer)
        log(f"reading {folder}, which is prepared: {data.kind}")
        return data
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    source = source or open_source(config, log, cache)
    check_round_trip(tokenizer, source, log)
    fingerprint = fingerprint_of(source, config, tokenizer)
    folder = cache / f"{source.name}-{fingerprint}-{LAYOUT}"
    with building(folder, fingerprint, log) as unfinished:
        if unfinished:
            sweep(source, unfinished)
            build(source, config, fingerprint, unfinished, log, tokenizer, jobs)
    return open_dataset(folder, tokenizer is not None)


# Opening ------------------------------------------------------------------------------------------


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
    """The folder that data.path names if it is one of prepared data. Raises UserError where that
    is begun, but not whole."""
    paths = as_paths(config.path)
    if len(paths) == 1 and is_address(paths[0]):
        may_be = not has_magic(paths[0]) and not split_suffix(name_of(paths[0]).name)[0]
        folder = RemoteFolder(paths[0], store_of(config, log))
        return folder if may_be and folder.copy() else None
    if len(paths) != 1:
        return None
    folder = user_path(paths[0])
    try:
        manifest = (folder / "manifest.json").read_bytes()
    except OSError:
        manifest = b""
    except ValueError:  # a NUL in the name
        return None
    if b'"splits":' in manifest:
        return folder
    if begun := what_is_begun(folder):
        raise UserError(f"data.path = {folder}: prepared data, but {begun}")
    return None


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
