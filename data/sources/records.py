"""Records of JSON, tables, Parquet and Arrow, one at a time, and the text or the pair in each."""

import csv
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.config import DataConfig, Kind
from data.sources.paths import Part, Tally
from data.sources.text import MAX_TEXT, chunks, is_whole, numbered_lines
from data.tokenizers.base import SURROGATE

Pair = tuple[str, str]  # (prompt, completion)
ROWS = 1024  # of a row group, made Python's own at a time
COLUMNAR = {".parquet": "Parquet", ".arrow": "Arrow"}
WHITE = " \t\r\n"


class WrongError(ValueError):
    """What is wrong with a record, without its place."""


def records(part: Part, looks: str, tally: Tally) -> Iterator[tuple[str, Any]]:
    """(its place for people, record) of each record of a part that `looks` like something.

    Raises UserError for what is none, unless data.skip_bad has it left out.
    """
    if part.suffix in COLUMNAR:
        return columnar(part, tally.config)
    if looks == "a table" and part.suffix in (".csv", ".tsv"):
        return table(part, tally)
    if looks == "JSON records":
        return json_array(part, tally)
    return json_lines(part, tally)


def json_lines(part: Part, tally: Tally) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(part, tally, skips=True):
        place = f"{part.place}:{number}"
        if line.strip() and is_whole(line, place, tally):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                tally.skip(place, "this line is not JSON", describe(tally.config))
                continue
            yield place, record


def json_array(part: Part, tally: Tally) -> Iterator[tuple[str, Any]]:
    """The elements of one array, a piece of the file at a time."""
    decoder, pieces = json.JSONDecoder(), chunks(part, tally, skips=True)
    text, at, number = next(pieces, "").lstrip().removeprefix("["), 0, 0
    while True:
        while at < len(text) and text[at] in WHITE + ",":
            at += 1
        try:
            if text[at : at + 1] == "]":
                return
            record, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            # a record may go on in what has not been read: twice as much, so that a long one is
            # not begun too often
            more, wanted = [], max(1, len(text) - at)
            while wanted > 0 and (piece := next(pieces, "")):
                more.append(piece)
                wanted -= len(piece)
            if not more or len(text) - at > MAX_TEXT:
                raise UserError(
                    f"{part.place}: not an array of JSON records (after record {number:,}); "
                    "correct it, or give JSON lines"
                ) from None
            text, at = text[at:] + "".join(more), 0
            continue
        number, begin, at = number + 1, at, end
        place = f"{part.place}: record {number:,}"
        if is_whole(text[begin:end], place, tally):
            yield place, record


def table(part: Part, tally: Tally) -> Iterator[tuple[str, Any]]:
    """The rows of a table with a header, as {column: text}."""
    csv.field_size_limit(MAX_TEXT)
    lines = (line + "\n" for _, line in numbered_lines(part, tally, skips=True))
    rows = csv.reader(lines, delimiter="\t" if part.suffix == ".tsv" else ",", strict=True)
    names, fix = None, "correct it"
    while True:
        place = f"{part.place}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            tally.skip(place, f"not a row of a table ({error})", fix)
            continue
        if row is None:
            return
        if names is None:
            names = row
        elif not is_whole("".join(row), place, tally):
            continue
        elif len(row) == len(names):
            yield place, dict(zip(names, row, strict=True))
        elif row:
            tally.skip(place, f"{len(row)} columns, and the first line has {len(names)}", fix)


def columnar(part: Part, config: DataConfig) -> Iterator[tuple[str, Any]]:
    """The rows of Parquet or Arrow with the columns that are asked for, a row group at a time."""
    what = COLUMNAR[part.suffix]
    try:
        import pyarrow as pa
        from pyarrow import ipc, parquet
    except ImportError:
        raise UserError(
            f"{part.place}: pyarrow, which reads {what}, is not installed; install it with pip "
            "install -e '.[parquet]'"
        ) from None
    if part.path is None:
        raise UserError(
            f"{part.place}: {what} is not read out of an archive or another compression; give the "
            "file as it is, which is compressed itself"
        )
    known = [key for keys in (config.text_key, config.prompt_key, config.completion_key)
             for key in split_keys(keys)] + ["messages"]  # fmt: skip
    number = 0
    try:
        is_parquet = part.suffix == ".parquet"
        batches = (
            parquet_batches(part, parquet, known) if is_parquet else arrow_batches(part, ipc, known)
        )
        for batch in batches:
            batch.validate(full=True)  # or a wrong length in a damaged file would end the process
            for first in range(0, batch.num_rows, ROWS):
                for record in batch.slice(first, ROWS).to_pylist():
                    number += 1
                    yield f"{part.place}: row {number:,}", record
    except (pa.ArrowException, OSError, MemoryError) as error:  # MemoryError: of a wrong length
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{part.place}: cut short or damaged after row {number:,} ({first}); restore it from "
            "its source"
        ) from None


def parquet_batches(part: Part, parquet: Any, known: list[str]) -> Iterator:
    """A few rows at a time, of one row group after the other."""
    # of a remote file, only what is asked for is fetched
    path, size = (part.path, 0) if isinstance(part.path, Path) else (part.stream, 1 << 20)
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=size) as file:
        columns = wanted(file.schema_arrow.names, known)
        for group in range(file.num_row_groups):
            yield from file.iter_batches(ROWS, [group], columns, use_threads=False)


def arrow_batches(part: Part, ipc: Any, known: list[str]) -> Iterator:
    """Of Arrow's two formats, the one with a footer or the stream."""
    if part.head.startswith(b"ARROW1"):
        with ipc.open_file(part.stream) as file:
            for i in range(file.num_record_batches):
                batch = file.get_batch(i)
                yield batch.select(wanted(batch.schema.names, known))
    else:
        with ipc.open_stream(part.stream) as stream:
            for batch in stream:
                yield batch.select(wanted(batch.schema.names, known))


def wanted(names: list[str], known: list[str]) -> list[str]:
    """The columns that hold what is asked for; all of them where none does, to be named."""
    kept = [name for name in names if name in known or name in [k.split(".")[0] for k in known]]
    return kept or names


# What is in a record ------------------------------------------------------------------------------


@cache
def split_keys(keys: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in keys.split(",") if key.strip())


def find(record: dict, key: str) -> Any:
    """What stands under a key, dotted for a nested one. Raises KeyError."""
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(key)
        value = value[name]
    return value


def has(record: dict, keys: str) -> bool:
    try:
        return all(find(record, key) is not None for key in split_keys(keys))
    except KeyError:
        return False


def kind_of(record: Any, config: DataConfig) -> Kind | None:
    """What a record is by its keys; None: neither a text nor a pair."""
    if not isinstance(record, dict):
        return None
    named = config.text_key != DataConfig.text_key
    if named and has(record, config.text_key):
        return "documents"
    if has(record, config.prompt_key) and has(record, config.completion_key):
        return "pairs"
    if isinstance(record.get("messages"), list):
        return "pairs"
    return "documents" if has(record, config.text_key) else None


def text_of(record: dict, keys: str) -> str:
    """The texts under these keys, with an empty line between them. Raises WrongError."""
    texts = [string_of(record, key) for key in split_keys(keys)]
    return texts[0] if len(texts) == 1 else "\n\n".join(filter(None, texts))


def string_of(record: dict, key: str) -> str:
    """Raises WrongError."""
    try:
        text = find(record, key)
    except KeyError:
        raise WrongError(f'"{key}" is missing') from None
    if not isinstance(text, str):
        raise WrongError(f'"{key}" is not a string')
    if not text.isascii() and SURROGATE.search(text):
        raise WrongError(
            f'"{key}" holds half a surrogate pair (\\ud800 to \\udfff), which is not a character'
        )
    return text


def as_document(record: Any, config: DataConfig) -> str:
    """Raises WrongError."""
    if not isinstance(record, dict):
        raise WrongError("not a JSON object")
    return text_of(record, config.text_key)


def as_pair(record: Any, config: DataConfig) -> Pair:
    """Of two keys, or of the messages of one turn each. Raises WrongError."""
    if not isinstance(record, dict):
        raise WrongError("not a JSON object")
    messages = record.get("messages")
    if isinstance(messages, list) and not has(record, config.prompt_key):
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages]
        if roles != ["user", "assistant"]:
            raise WrongError('"messages" are not one of "user" and one of "assistant"')
        prompt, completion = (text_of(message, "content") for message in messages)
    else:
        prompt, completion = (
            text_of(record, config.prompt_key),
            text_of(record, config.completion_key),
        )
    return prompt.rstrip("\r\n"), completion.rstrip("\r\n")


def describe(config: DataConfig, kind: str = "pairs") -> str:
    """What each record must be, and what else can be done, for an error."""
    if kind == "documents":
        return f'each must have {{"{config.text_key}": "..."}}; set data.text_key to its name'
    keys = [*split_keys(config.prompt_key), *split_keys(config.completion_key)]
    form = ", ".join(f'"{key}": "..."' for key in keys)
    return (
        f'each line must be {{{form}}}, or set data.kind = "stream" or "lines" to train on the '
        "text as it is"
    )
