"""Where text comes from: a source by name, or your own file or folder.

Every source is a file, or two that go line by line: one's own, or what data/builtin.py makes or
downloads. Nothing here holds more of it in memory than a chunk or a line.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import UserError
from common.files import user_path
from data.builtin import NAMED, named_files
from data.config import DataConfig, Kind
from data.tokenizer import SURROGATE

Pair = tuple[str, str]  # (prompt, completion)

VERSION = "1"  # goes into every fingerprint: raise it when the same bytes come to give other text
CHUNK = 1 << 20  # bytes of a stream read at a time
JSONL_HELP = 'each line must be {"prompt": "...", "completion": "..."}'
PAIRS_HELP = f"use a .jsonl file ({JSONL_HELP}) or a folder with train.nl and train.cm"


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
    natural: Kind
    if config.path:
        path = user_path(config.path)
        train = _own_files(path, "data.path", "train")
        name = re.sub(r"[^\w-]", "_", path.resolve().stem)[:40] or "data"
        if path.is_dir() and any((path / file).exists() for file in ("dev.nl", "dev.cm")):
            val = _own_files(path, "data.path", "dev")
        where, natural = f"data.path = {path}", "pairs" if _holds_pairs(train) else "stream"
    else:
        name, natural = config.source, NAMED[config.source][0]
        train = named_files(name, cache, log)
        where = f"data.source = {name}"
    kind = natural if config.kind == "auto" else config.kind
    if config.val_path:
        val = _own_files(user_path(config.val_path), "data.val_path", "dev")
    log(f"reading {name} as {kind}: {', '.join(str(file) for file in train + val)}")
    _check(train, kind, where)
    if val:
        _check(val, kind, f"data.val_path = {config.val_path}" if config.val_path else where)
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


def _own_files(path: Path, key: str, split: str) -> tuple[Path, ...]:
    """One file, or the two that hold the pairs of a folder."""
    files, fix = (path,), "fix the path"
    if os.path.isdir(path):
        files = (path / f"{split}.nl", path / f"{split}.cm")
        fix = f"a folder must have {split}.nl and {split}.cm"
    for file in files:
        if not os.path.isfile(file):
            what = "no such file" if file == path else f"there is no {file}"
            raise UserError(f"{key} = {path}: {what}; {fix}")
    return files


def _holds_pairs(files: tuple[Path, ...]) -> bool:
    return len(files) == 2 or files[0].suffix.lower() == ".jsonl"


def _check(files: tuple[Path, ...], kind: str, where: str) -> None:
    """Refuse files that cannot be of this kind, cannot be opened or hold nothing."""
    if kind == "pairs" and not _holds_pairs(files):
        raise UserError(f'{where}: not pairs, but data.kind = "pairs"; {PAIRS_HELP}')
    if kind != "pairs" and _holds_pairs(files):
        raise UserError(
            f'{where}: pairs, but data.kind = "{kind}"; set data.kind = "pairs" or "auto"'
        )
    try:
        counts = [_count_lines(file) for file in files] if len(files) == 2 else [1]
        if len(set(counts)) > 1:
            raise UserError(
                f"{where}: {files[0].name} has {counts[0]} lines but {files[1].name} has "
                f"{counts[1]}; make line i of one belong to line i of the other"
            )
        empty = next(_reader(files, kind)(), None) is None
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror}); give a file that can be read"
        ) from None
    if empty:
        raise UserError(f"{where}: the file is empty; give a file with text in it")


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
