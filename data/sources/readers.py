"""Where text comes from: a source by name, or your own files, folders and patterns.

Every source is files: one's own, or what builtin.py makes or downloads. paths.py finds and opens
them, text.py and records.py read what is in them; nothing holds more of it in memory than a chunk,
a line or a document.
"""

import codecs
import contextlib
import csv
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from common.errors import UserError, refuse
from common.files import has_old_lines, is_address, refuse_binary, user_path
from data.config import DataConfig, Kind, as_paths
from data.sources.builtin import NAMED, named_files
from data.sources.paths import (
    ARCHIVES,
    HEAD,
    RECORDS,
    File,
    Part,
    Tally,
    find_files,
    open_parts,
    size_of,
    split_suffix,
)
from data.sources.records import (
    COLUMNAR,
    Pair,
    WrongError,
    as_document,
    as_pair,
    describe,
    kind_of,
    records,
)
from data.sources.remote import RemoteFile, Store, has_magic, name_of
from data.sources.text import chunks, codec, numbered_lines, separated, whole

VERSION = "1"  # goes into every fingerprint: raise it when the same bytes come to give other text
AS_IT_IS = 'or set data.kind = "stream" or "lines" to train on the text as it is'
ROWS = 10  # lines of as many columns each that make a table
SHOWN = 5  # files that are named of all that are read
# settings that change what is read
SHAPING = (
    "text_key", "prompt_key", "completion_key", "separator", "encoding", "errors", "skip_bad",
)  # fmt: skip
DEFAULT = DataConfig()

# how files of text begin that is no prose, and how they are called
MARKUP = re.compile(r"\s*(<(!doctype|html|head|body|svg)\b|<\?xml|\{\\rtf)", re.IGNORECASE)
JSON = re.compile(r'\s*[\[{]\s*["{]')
ENDINGS = {
    ".csv": "a table", ".tsv": "a table", ".json": "JSON", ".rtf": "markup",
    ".html": "markup", ".htm": "markup", ".xml": "markup",
}  # fmt: skip


@dataclass
class Place:
    """Where a pass over a source has come to. It begins there, and moves on with what it gives."""

    reader: int = 0  # of the source: train, val
    file: int = 0  # of the reader's
    item: int = 0  # of that file's chunks, texts or pairs
    characters: int = 0  # of a stream: before that
    tally: dict = field(default_factory=dict)  # what had been left out before that file
    read: Callable[[], int] = field(default=lambda: 0, compare=False)  # bytes, as on the disk

    def state(self) -> dict:
        """What `Place(**state)` is the same place with."""
        return {
            "reader": self.reader, "file": self.file, "item": self.item,
            "characters": self.characters, "tally": self.tally,
        }  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Text to learn from, as readers that can be started any number of times, at any place.

    They give chunks of text for a stream, one text at a time for lines and documents, `Pair`s for
    pairs.
    """

    name: str  # for people and for the cache folder's name
    kind: Kind
    train: "Reader"
    val: "Reader | None"  # None: split by val_fraction
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


@dataclass(frozen=True)
class Files:
    """What one setting names: files to be read one after the other, or two line by line."""

    where: str  # the setting, as it was given, for errors
    paths: tuple[File, ...] = ()
    parallel: bool = False  # line i of one file belongs to line i of the other
    alone: bool = False  # one file, by its own name

    def place(self, name: str) -> str:
        """Where an error is that one of the files has."""
        return self.where if len(self.paths) == 1 else f"{self.where}: {name}"


def open_source(config: DataConfig, log: Callable[[str], object], cache: Path) -> Source:
    """The source that `config` names, checked as far as its first text; `cache` keeps what is made.

    Raises UserError for a file that is missing, unreadable, empty, or not of the kind asked for.
    What only reading to the end can find, the readers raise it for, with the line or the byte.
    """
    val, store = Files(""), Store.of(cache, config.remote_cache_gb, log)
    if given := as_paths(config.path):
        train = _own_files(given, "data.path", "train", config.kind, store)
        name = _name(given[0])
        path = user_path(given[0])
        if len(given) == 1 and any((path / file).exists() for file in ("dev.nl", "dev.cm")):
            val = _own_files(given, "data.path", "dev", config.kind, store)
            _choose_kind(val, config, log)
        kind = _choose_kind(train, config, log)
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
        own = _choose_kind(val, config, log)
        if ("pairs" in (kind, own) and kind != own) or (kind, own) == ("stream", "documents"):
            raise UserError(
                f"{val.where}: looks like {own}, but what is trained on is {kind}; give files of "
                "one kind, or set data.kind"
            )
    if kind != "documents":  # which was found by content
        refuse([f"data.{fault}" for fault in config.for_documents_alone(kind)])
    files = train.paths + val.paths
    more = f" and {len(files) - SHOWN:,} more" if len(files) > SHOWN else ""
    log(f"reading {name} as {kind}: {', '.join(map(str, files[:SHOWN]))}{more}")
    readers = [Reader(part, kind, config, log) for part in (train, val) if part.paths]
    for reader in readers:
        _check(reader)
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


def _name(path: str) -> str:
    """What data is called that stands at a path: by its file, or by where a pattern begins."""
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


def is_plain(path: str | tuple[str, ...]) -> bool:
    """Whether a path is one file of text that looks like nothing but text."""
    place = user_path("".join(as_paths(path)[:1]))
    try:
        with place.open("rb") as file:
            suffix, compression = split_suffix(place.name)
            plain = suffix not in COLUMNAR and not compression and len(as_paths(path)) == 1
            return plain and not _looks_like(suffix, file.read(HEAD))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def _choose_kind(files: Files, config: DataConfig, log: Callable[[str], object]) -> Kind:
    """The kind that one's own files are read as: data.kind, or where that is "auto", by content.

    Raises UserError for what is not text, and for text that is no prose unless a kind is given.
    """
    kind, found = config.kind, {}
    for path in files.paths:
        try:
            for part in open_parts(path, kind, Tally(config)):
                found.setdefault(_natural_kind(part, files, config, log), part.place)
                break  # the others of an archive are taken to be like it
        except OSError as error:
            raise _unreadable(files.where, error) from None
    if files.parallel:
        if kind not in ("auto", "pairs"):
            raise UserError(
                f'{files.where}: a folder of pairs, but data.kind = "{kind}"; set it to "auto"'
            )
        return "pairs"
    if kind != "auto":
        return kind
    if "pairs" in found and len(found) > 1:
        other = next(name for looks, name in found.items() if looks != "pairs")
        raise UserError(
            f"{files.where}: {found['pairs']} has pairs, but {other} has not; give files of one "
            "kind, or set data.kind"
        )
    if "pairs" in found:
        return "pairs"
    return "stream" if files.alone and not config.separator and "text" in found else "documents"


def _natural_kind(
    part: Part, files: Files, config: DataConfig, log: Callable[[str], object]
) -> str:
    """What a text or table is by its content: "documents", "pairs" or "text"."""
    where, kind = files.place(part.place), config.kind
    if part.suffix in COLUMNAR and kind in ("stream", "lines"):
        what = COLUMNAR[part.suffix]
        raise UserError(f'{where}: {what} is not read as {kind}; set data.kind = "auto"')
    _refuse_binary(part, config, where)
    looks = "JSON lines" if files.parallel else _looks_like(part.suffix, part.head, config)
    if (looks or kind in ("lines", "pairs")) and has_old_lines(part.head):
        raise UserError(f"{where}: its lines end in \\r alone; save it with \\n or \\r\\n")
    if kind != "auto":
        if looks and kind in ("stream", "lines") and not files.parallel:
            said = f'it is read as text, because data.kind = "{kind}"'
            log(f"note: {where} looks like {looks}; {said}")
        return kind
    if files.parallel:
        return "pairs"
    if not _holds_records(part, looks):
        if looks:
            raise UserError(
                f"{where}: looks like {looks}, which is not read as prose; give JSON lines "
                f'({{"prompt": "...", "completion": "..."}} or {{"text": "..."}}), {AS_IT_IS}'
            )
        return "text"
    for _, record in records(part, looks, Tally(config)):
        if found := kind_of(record, config):
            return found
        if isinstance(record, dict):
            keys = ", ".join(map(str, record))[:200]
            raise UserError(
                f"{where}: looks like {looks} with the keys {keys}; name one with data.text_key, "
                f"or two with data.prompt_key and data.completion_key, {AS_IT_IS}"
            )
        break
    return "pairs"


def _refuse_binary(part: Part, config: DataConfig, where: str):
    """Refuses what cannot be text, unless an encoding is given, which is taken at its word."""
    decoded_as = codec(part.head, config.encoding)
    if part.suffix not in COLUMNAR and decoded_as == "utf-8-sig":
        refuse_binary(part.head, where)


def _holds_records(part: Part, looks: str) -> bool:
    """Whether a part is read record by record, and not as text."""
    if looks == "a table":
        return part.suffix in (".csv", ".tsv")
    return looks in ("JSON lines", "JSON records", *COLUMNAR.values())


def _looks_like(suffix: str, head: bytes, config: DataConfig = DEFAULT) -> str:
    """What text is that is not meant to be read as prose, by name and first bytes; "": prose."""
    if suffix in (".jsonl", ".ndjson"):
        return "JSON lines"
    if suffix in COLUMNAR:
        return COLUMNAR[suffix]
    decoder = codecs.getincrementaldecoder(codec(head, config.encoding))("replace")
    text = decoder.decode(head)
    if not text.strip():
        return ""
    lines = [line for line in text.split("\n") if line.strip()][:20]
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(lines[0]), dict):
            return "JSON lines"
    if MARKUP.match(text):
        return "markup"
    if suffix == ".json" and re.match(r"\s*\[\s*\{", text):
        return "JSON records"
    if JSON.match(text):
        return "JSON"
    if suffix in ENDINGS:
        return ENDINGS[suffix]
    for delimiter in "\t,;":
        with contextlib.suppress(csv.Error):
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
            if len(widths) >= ROWS and widths[0] > 1 and len(set(widths)) == 1:
                return "a table"
    return ""


def _unreadable(where: str, error: OSError) -> UserError:
    return UserError(f"{where}: cannot be read ({error.strerror}); give a file that can be read")


def _check(reader: "Reader") -> None:
    """Refuse files that cannot be opened or hold nothing, and two that do not belong together."""
    files = reader.files
    try:
        if files.parallel:
            first, second = (sum(1 for _ in reader.lines(path)) for path in files.paths)
            if first != second:
                names = [path.name for path in files.paths]
                raise UserError(
                    f"{files.where}: {names[0]} has {first} lines but {names[1]} has {second}; "
                    "make line i of one belong to line i of the other"
                )
        empty = not any("".join(piece).strip() for piece in reader())
    except OSError as error:
        raise _unreadable(files.where, error) from None
    if empty:
        raise UserError(f"{files.where}: is empty or white space only; give a file with text in it")


# Reading ------------------------------------------------------------------------------------------


class Reader:
    """Reads files from their beginning each time it is called.

    What was left out or replaced is told at the end of the first pass.
    """

    def __init__(self, files: Files, kind: Kind, config: DataConfig, log: Callable[[str], object]):
        self.files, self.kind, self.config, self.log = files, kind, config, log
        self.told = False
        # the two files of parallel ones are read as one
        self.parts = [files.paths] if files.parallel else [(path,) for path in files.paths]
        self.sizes = [sum(map(size_of, part)) for part in self.parts]
        self.before = [0, *accumulate(self.sizes)]

    def __call__(self, place: Place | None = None, end: Place | None = None) -> Iterator:
        """All from `place` on, and not from `end` on; files before and after are not opened."""
        place = place or Place()
        first, skipped = place.file, place.item
        whole = end is None and (bool(place.tally) or not (first or skipped))
        end = end or Place(file=len(self.parts))
        tally = Tally(self.config, **place.tally)
        for number in range(first, len(self.parts)):
            place.tally, place.file, place.item = tally.counts(), number, 0
            place.read = lambda: self.before[place.file] + tally.position()
            if (number, 0) == (end.file, end.item):
                return
            for item in self.of_file(number, tally):
                place.item += 1
                if number > first or place.item > skipped:
                    yield item
                if (number, place.item) == (end.file, end.item):
                    return
        place.tally, place.file, place.item = tally.counts(), len(self.parts), 0
        if not self.told:
            self.told = True
            self.tell(tally, whole)

    def of_file(self, number: int, tally: Tally) -> Iterator:
        """What one file holds, or the two that are read line by line."""
        if self.files.parallel:
            yield from self.parallel()
            return
        for part in open_parts(self.files.paths[number], self.config.kind, tally):
            yield from self.read(part, tally)

    def tell(self, tally: Tally, whole: bool):
        """What a pass has found. Raises UserError for a separator that a whole one has not."""
        for note in tally.notes():
            self.log(note)
        mark = self.config.separator
        if whole and self.kind == "documents" and mark and not tally.separators:
            raise UserError(
                f"data.separator = {mark!r}: does not occur in {self.files.where}; give what "
                "stands between its texts, or leave it out"
            )

    def read(self, part: Part, tally: Tally) -> Iterator:
        """The texts or pairs of one part."""
        try:
            _refuse_binary(part, self.config, part.place)
        except UserError as error:
            if not self.config.skip_bad:
                raise
            tally.skip(part.place, str(error).removeprefix(f"{part.place}: "), "")
            return iter(())
        if self.kind == "stream":
            return chunks(part, tally)
        if self.kind == "lines":
            return (line for _, line in numbered_lines(part, tally) if line.strip())
        looks = _looks_like(part.suffix, part.head, self.config)
        if self.kind == "pairs" or _holds_records(part, looks):
            return self.of_records(part, looks, tally)
        texts = separated(part, tally) if self.config.separator else iter([whole(part, tally)])
        return filter(str.strip, texts)

    def of_records(self, part: Part, looks: str, tally: Tally) -> Iterator[str | Pair]:
        take = as_pair if self.kind == "pairs" else as_document
        for place, record in records(part, looks, tally):
            try:
                found = take(record, self.config)
            except WrongError as error:
                tally.skip(place, str(error), describe(self.config, self.kind))
                continue
            if not isinstance(found, str) or found.strip():
                yield found

    def lines(self, path: File) -> Iterator[str]:
        tally = Tally(self.config)
        for part in open_parts(path, self.config.kind, tally):
            yield from (line for _, line in numbered_lines(part, tally))

    def parallel(self) -> Iterator[Pair]:
        prompts, completions = self.files.paths
        for prompt, completion in zip(self.lines(prompts), self.lines(completions), strict=True):
            if prompt or completion:
                yield prompt, completion
