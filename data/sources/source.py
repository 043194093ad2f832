"""Where text comes from: a source by name, or your own files, folders and patterns.

Every source is files: one's own, or what builtin.py makes or downloads. paths.py finds and opens
them, kinds.py says what they are, text.py and records.py read what is in them; nothing holds more
of it in memory than a chunk, a line or a document.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, refuse
from common.files import is_address, user_path
from data.config import DataConfig, Kind, as_paths
from data.sources.builtin import NAMED, named_files
from data.sources.kinds import choose_kind
from data.sources.paths import ARCHIVES, RECORDS, File, Files, find_files, split_suffix
from data.sources.readers import Reader, check_reader
from data.sources.records import COLUMNAR
from data.sources.remote import RemoteFile, Store, has_magic, name_of

VERSION = "1"  # goes into every fingerprint: raise it when the same bytes come to give other text
SHOWN = 5  # files that are named of all that are read
# settings that change what is read
SHAPING = (
    "text_key", "prompt_key", "completion_key", "separator", "encoding", "errors", "skip_bad",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Text to learn from, as readers that can be started any number of times, at any place.

    They give chunks of text for a stream, one text at a time for lines and documents, `Pair`s for
    pairs.
    """

    name: str  # for people and for the cache folder's name
    kind: Kind
    train: Reader
    val: Reader | None  # None: split by val_fraction
    fingerprint: str  # hex hash of all that the readers give
    stamps: dict[
        File, tuple[int, int | str]
    ]  # size and time of change of each file before it was hashed

    def refuse_changes(self):
        """Raises UserError if a file has changed since `fingerprint` was made."""
        for path, stamp in self.stamps.items():
            if stamp_of(path) != stamp:
                raise UserError(
                    f"{path}: changed while it was read; run the same command again when nobody "
                    "writes to it"
                )


def open_source(config: DataConfig, log: Callable[[str], object], cache: Path) -> Source:
    """The source that `config` names, checked as far as its first text; `cache` keeps what is made.

    Raises UserError for a file that is missing, unreadable, empty, or not of the kind asked for.
    What only reading to the end can find, the readers raise it for, with the line or the byte.
    """
    val, store = Files(""), Store.of(cache, config.remote_cache_gb, log)
    if given := as_paths(config.path):
        train = _own_files(given, "data.path", "train", config.kind, store)
        name = name_data(config)
        path = user_path(given[0])
        if len(given) == 1 and any((path / file).exists() for file in ("dev.nl", "dev.cm")):
            val = _own_files(given, "data.path", "dev", config.kind, store)
            choose_kind(val, config, log)
        kind = choose_kind(train, config, log)
    else:
        name = config.source
        paths = named_files(name, cache, log)
        train = Files(f"data.source = {name}", paths[:2], len(paths) > 1, len(paths) == 1)
        if len(paths) > 2:
            val = Files(train.where, paths[2:], parallel=True)
        natural = NAMED[name][0]
        kind = natural if config.kind == "auto" else config.kind
        if "pairs" in (kind, natural) and kind != natural:
            raise UserError(f'{train.where}: {natural}, but data.kind = "{kind}"; set it to "auto"')
    if config.val_path:
        val = _own_files((config.val_path,), "data.val_path", "dev", config.kind, store)
        own = choose_kind(val, config, log)
        if ("pairs" in (kind, own) and kind != own) or (kind, own) == ("stream", "documents"):
            raise UserError(
                f"{val.where}: looks like {own}, but what is trained on is {kind}; give files of "
                "one kind, or set data.kind"
            )
    if kind != "documents":  # which was found by content
        refuse([f"data.{fault}" for fault in config.for_documents_alone(kind)])
        if config.separator:  # not refused: older runs have it in their settings
            log(f"note: data.separator = {config.separator!r} is ignored: {name} is read as {kind}")
    files = train.paths + val.paths
    more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
    log(f"reading {name} as {kind}: {', '.join(map(str, files[:SHOWN]))}{more}")
    readers = [Reader(part, kind, config, log) for part in (train, val) if part.paths]
    for reader in readers:
        check_reader(reader)
    settings = f"{VERSION} {kind} {len(train.paths)}{_shape(train, val, kind, config)}"
    held_out = readers[1] if len(readers) == 2 else None
    stamps = {
        path: (path.size, path.identity) if isinstance(path, RemoteFile) else stamp_of(path)
        for path in files
    }
    return Source(name, kind, readers[0], held_out, _fingerprint(settings, files), stamps)


def stamp_of(path: File) -> tuple[int, int | str]:
    """What changes when a file does."""
    if isinstance(path, RemoteFile):
        return path.stamp()
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def name_data(config: DataConfig) -> str:
    """What data is called: by its source, its first file, or where a pattern begins."""
    if not (given := as_paths(config.path)):
        return config.source
    path = given[0]
    if is_address(path):
        place = name_of(path)
        while has_magic(f"x://{place}"):
            place = place.parent
        return re.sub(r"[^\w-]", "_", place.stem)[:40] or "data"
    place = user_path(path)
    while glob.has_magic(str(place)) and not os.path.lexists(place):
        place = place.parent
    return re.sub(r"[^\w-]", "_", place.resolve().stem)[:40] or "data"


def _shape(train: Files, val: Files, kind: str, config: DataConfig) -> str:
    """What else than the files' bytes makes the text, for the fingerprint.

    "" for all that could be read before there were such settings, so that its runs are resumed.
    """
    forms = [split_suffix(file.name) for file in train.paths + val.paths]
    forms = [(s if s in RECORDS | ARCHIVES else "", compression) for s, compression in forms]
    given = {key: getattr(config, key) for key in SHAPING}
    given = {key: value for key, value in given.items() if value != getattr(DataConfig, key)}
    new = kind == "documents" or any(c or s in ARCHIVES | COLUMNAR.keys() for s, c in forms)
    new = new or not all(files.parallel or len(files.paths) < 2 for files in (train, val))
    return f" {json.dumps([forms, given])}" if new or given else ""


def _fingerprint(settings: str, files: tuple[File, ...]) -> str:
    """Of the bytes of files; of remote ones, of what their store says of these."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for path in files:
        if isinstance(path, RemoteFile):
            told = f"{path.size} {path.identity}"
            digest.update(hashlib.blake2b(told.encode()).digest())
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _own_files(given: tuple[str, ...], key: str, split: str, kind: str, store: Store) -> Files:
    """The files at the paths that a setting gives, each once; or the two of a folder of pairs."""
    where, found = f"{key} = {', '.join(given)}", []
    for path in given:
        place, one = user_path(path), f"{key} = {path}"
        pair = (place, place.with_suffix(".cm"))
        named = len(given) == 1 and place.suffix == ".nl" and kind in ("auto", "pairs")
        if named and all(map(os.path.isfile, pair)):
            return Files(one, pair, parallel=True)
        names = [f"{name}.{end}" for name in ("train", "dev") for end in ("nl", "cm")]
        if len(given) == 1 and any(os.path.isfile(place / name) for name in names):
            pair = (place / f"{split}.nl", place / f"{split}.cm")
            for file in pair:
                if not os.path.isfile(file):
                    raise UserError(
                        f"{one}: there is no {file}; a folder must have {split}.nl and {split}.cm"
                    )
            return Files(one, pair, parallel=True)
        found += find_files(path, one, kind, store)
    found = tuple(dict.fromkeys(found))
    first = given[0] if is_address(given[0]) else str(user_path(given[0]))
    alone = [*map(str, found)] == [first] or (
        len(found) == 1 and not isinstance(found[0], RemoteFile) and found[0].parent == store.folder
    )  # the latter: a copy of it
    alone = alone and split_suffix(found[0].name)[0] not in ARCHIVES
    return Files(where, found, alone=alone)
