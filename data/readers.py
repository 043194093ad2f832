"""Where text comes from: a source by name, or your own file or folder.

Every source is a file, or two that go line by line: one's own, or what data/builtin.py makes or
downloads. Nothing here holds more of it in memory than a chunk or a line.
"""

import codecs
import contextlib
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from common.errors import UserError
from common.files import has_old_lines, refuse_binary, refuse_no_file, user_path
from data.builtin import NAMED, named_files
from data.config import DataConfig, Kind
from data.tokenizer import SURROGATE

Pair = tuple[str, str]  # (prompt, completion)

VERSION = "1"  # goes into every fingerprint: raise it when the same bytes come to give other text
CHUNK = 1 << 20  # bytes of a stream read at a time
AS_IT_IS = 'or set data.kind = "stream" or "lines" to train on the text as it is'
JSONL_HELP = f'each line must be {{"prompt": "...", "completion": "..."}}, {AS_IT_IS}'
HEAD = 1 << 20  # bytes by which a file is judged
ROWS = 10  # lines of as many columns each that make a table

# how files of text begin that is no prose, and how they are called
MARKUP = re.compile(r"\s*(<(!doctype|html|head|body|svg)\b|<\?xml|\{\\rtf)", re.IGNORECASE)
JSON = re.compile(r'\s*[\[{]\s*["{]')
ENDINGS = {
    ".csv": "a table", ".tsv": "a table", ".json": "JSON", ".rtf": "markup",
    ".html": "markup", ".htm": "markup", ".xml": "markup",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Text to learn from, as readers that can be started any number of times.

    They give chunks of text for a stream, one document at a time for lines, `Pair`s for pairs.
    """

    name: str  # for people and for the cache folder's name
    kind: Kind
    train: Callable[[], Iterator]
    val: Callable[[], Iterator] | None  # None: split by val_fraction
    fingerprint: str  # hex hash of all that the readers give


def open_source(config: DataConfig, log: Callable[[str], object], cache: Path) -> Source:
    """The source that `config` names, checked as far as its first text; `cache` keeps what is made.

    Raises UserError for a file that is missing, unreadable, empty, or not of the kind asked for.
    What only reading to the end can find, the readers raise it for, with the line or the byte.
    """
    val: tuple[Path, ...] = ()
    where_val = ""
    if config.path:
        where = where_val = f"data.path = {config.path}"
        train = _own_files(config.path, where, "train")
        path = user_path(config.path)
        name = re.sub(r"[^\w-]", "_", path.resolve().stem)[:40] or "data"
        if path.is_dir() and any((path / file).exists() for file in ("dev.nl", "dev.cm")):
            val = _own_files(config.path, where, "dev")
            _choose_kind(val, config.kind, where, log)
        kind = _choose_kind(train, config.kind, where, log)
    else:
        name, where = config.source, f"data.source = {config.source}"
        train = named_files(name, cache, log)
        natural = NAMED[name][0]
        kind = natural if config.kind == "auto" else config.kind
        if "pairs" in (kind, natural) and kind != natural:
            raise UserError(f'{where}: {natural}, but data.kind = "{kind}"; set it to "auto"')
    if config.val_path:
        where_val = f"data.val_path = {config.val_path}"
        val = _own_files(config.val_path, where_val, "dev")
        own = _choose_kind(val, config.kind, where_val, log)
        if "pairs" in (kind, own) and kind != own:
            raise UserError(
                f"{where_val}: looks like {own}, but what is trained on is {kind}; give files of "
                "one kind, or set data.kind"
            )
    log(f"reading {name} as {kind}: {', '.join(str(file) for file in train + val)}")
    _check(train, kind, where)
    if val:
        _check(val, kind, where_val)
    return Source(
        name,
        kind,
        _reader(train, kind),
        _reader(val, kind) if val else None,
        _fingerprint(f"{VERSION} {kind} {len(train)}", train + val),
    )


def _fingerprint(settings: str, files: tuple[Path, ...]) -> str:
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _own_files(path: str, where: str, split: str) -> tuple[Path, ...]:
    """One file, or the two that hold the pairs of a folder."""
    refuse_no_file(path, where)
    place = user_path(path)
    if not place.is_dir():
        return (place,)
    files = (place / f"{split}.nl", place / f"{split}.cm")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(
                f"{where}: there is no {file}; a folder must have {split}.nl and {split}.cm"
            )
    return files


def is_plain(path: str) -> bool:
    """Whether a path is a file of text that looks like nothing but text."""
    place = user_path(path)
    try:
        return place.is_file() and not _looks_like(place, _head(place))
    except OSError:
        return False


def _choose_kind(
    files: tuple[Path, ...], kind: str, where: str, log: Callable[[str], object]
) -> Kind:
    """The kind that one's own files are read as: `kind`, or where that is "auto", by content.

    Raises UserError for what is not text, and for text that is no prose unless `kind` is given.
    """
    try:
        heads = [_head(file) for file in files]
    except OSError as error:
        raise _unreadable(where, error) from None
    for file, head in zip(files, heads, strict=True):
        refuse_binary(head, where if len(files) == 1 else f"{where}: {file.name}")
    looks = "JSON lines" if len(files) == 2 else _looks_like(files[0], heads[0])
    if (looks or kind in ("lines", "pairs")) and any(map(has_old_lines, heads)):
        raise UserError(f"{where}: its lines end in \\r alone; save it with \\n or \\r\\n")
    if kind == "auto":
        if looks and looks != "JSON lines":
            raise UserError(
                f"{where}: looks like {looks}, which is not read as prose; give JSON lines "
                f'({{"prompt": "...", "completion": "..."}}), {AS_IT_IS}'
            )
        return "pairs" if looks else "stream"
    if len(files) == 2 and kind != "pairs":
        raise UserError(f'{where}: a folder of pairs, but data.kind = "{kind}"; set it to "auto"')
    if looks and kind != "pairs":
        log(f'note: {where} looks like {looks}; it is read as text, because data.kind = "{kind}"')
    return cast(Kind, kind)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def _looks_like(path: Path, head: bytes) -> str:
    """What text is that is not meant to be read as prose, by name and first bytes; "": prose."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "JSON lines"
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(head)
    if not text.strip():
        return ""
    lines = [line for line in text.split("\n") if line.strip()][:20]
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(lines[0]), dict):
            return "JSON lines"
    if MARKUP.match(text):
        return "markup"
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


def _check(files: tuple[Path, ...], kind: str, where: str) -> None:
    """Refuse files that cannot be opened or hold nothing, and two that do not belong together."""
    try:
        counts = [_count_lines(file) for file in files] if len(files) == 2 else [1]
        if len(set(counts)) > 1:
            raise UserError(
                f"{where}: {files[0].name} has {counts[0]} lines but {files[1].name} has "
                f"{counts[1]}; make line i of one belong to line i of the other"
            )
        empty = not any("".join(piece).strip() for piece in _reader(files, kind)())
    except OSError as error:
        raise _unreadable(where, error) from None
    if empty:
        raise UserError(f"{where}: is empty or white space only; give a file with text in it")


# Readers ------------------------------------------------------------------------------------------


def _reader(files: tuple[Path, ...], kind: str) -> Callable[[], Iterator]:
    if len(files) == 2:
        return partial(_read_parallel, *files)
    readers = {"stream": _read_stream, "lines": _read_lines, "pairs": _read_jsonl}
    return partial(readers[kind], files[0])


def _read_stream(path: Path) -> Iterator[str]:
    """The whole text, \\r\\n as it stands, in chunks that need not end at a line."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with path.open("rb") as file:
        while True:
            data = file.read(CHUNK)
            done += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object is what the decoder still held, and always ends where we are
                raise _not_utf8(path, done - len(error.object) + error.start) from None
            if text:
                yield text
            if not data:
                return


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end); only \\n or \\r\\n ends a line."""
    number = offset = 0
    with path.open("rb") as file:
        while data := file.read(CHUNK) + file.readline():  # whole lines, many at once
            try:
                text = data.decode("utf-8" if offset else "utf-8-sig")
            except UnicodeDecodeError as error:
                # error.object lacks the mark that utf-8-sig took off
                taken = len(data) - len(error.object)
                raise _not_utf8(path, offset + taken + error.start) from None
            for line in text.removesuffix("\n").split("\n"):
                number += 1
                yield number, line.removesuffix("\r")
            offset += len(data)


def _not_utf8(path: Path, offset: int) -> UserError:
    return UserError(f"{path}: not UTF-8 at byte {offset}; save it as UTF-8")


def _read_lines(path: Path) -> Iterator[str]:
    for _, line in _numbered_lines(path):
        if line.strip():
            yield line


def _read_jsonl(path: Path) -> Iterator[Pair]:
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number}: this line is not JSON; {JSONL_HELP}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: this line is not a JSON object; {JSONL_HELP}")
        for key in ("prompt", "completion"):
            if key not in record:
                raise UserError(f'{path}:{number}: "{key}" is missing; {JSONL_HELP}')
            if not isinstance(record[key], str):
                raise UserError(f'{path}:{number}: "{key}" is not a string; {JSONL_HELP}')
            if SURROGATE.search(record[key]):
                raise UserError(
                    f'{path}:{number}: "{key}" holds half a surrogate pair (\\ud800 to \\udfff), '
                    "which is not a character; remove it"
                )
        yield record["prompt"].rstrip("\r\n"), record["completion"].rstrip("\r\n")


def _read_parallel(prompts: Path, completions: Path) -> Iterator[Pair]:
    lines = zip(_numbered_lines(prompts), _numbered_lines(completions), strict=True)
    for (_, prompt), (_, completion) in lines:
        if prompt or completion:
            yield prompt, completion


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
