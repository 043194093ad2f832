"""Of which kind one's own files are, by their names and by how they begin."""

import codecs
import contextlib
import csv
import json
import re
from collections.abc import Callable

from common.errors import UserError
from common.files import has_old_lines, refuse_binary, user_path
from data.config import DataConfig, Kind, as_paths
from data.sources.paths import HEAD, Files, Part, Tally, open_parts, split_suffix
from data.sources.records import COLUMNAR, kind_of, records
from data.sources.text import codec

AS_IT_IS = 'or set data.kind = "stream" or "lines" to train on the text as it is'
ROWS = 10  # lines of as many columns each that make a table
DEFAULT = DataConfig()

# how files of text begin that is no prose, and how they are called
MARKUP = re.compile(r"\s*(<(!doctype|html|head|body|svg)\b|<\?xml|\{\\rtf)", re.IGNORECASE)
JSON = re.compile(r'\s*[\[{]\s*["{]')
ENDINGS = {
    ".csv": "a table", ".tsv": "a table", ".json": "JSON", ".rtf": "markup",
    ".html": "markup", ".htm": "markup", ".xml": "markup",
}  # fmt: skip


def is_plain(path: str | tuple[str, ...]) -> bool:
    """Whether a path is one file of text that looks like nothing but text."""
    place = user_path("".join(as_paths(path)[:1]))
    try:
        with place.open("rb") as file:
            suffix, compression = split_suffix(place.name)
            plain = suffix not in COLUMNAR and not compression and len(as_paths(path)) == 1
            return plain and not looks_like(suffix, file.read(HEAD))
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


def choose_kind(files: Files, config: DataConfig, log: Callable[[str], object]) -> Kind:
    """The kind that one's own files are read as: data.kind, or where that is "auto", by content.

    Raises UserError for what is not text, and for text that is no prose unless a kind is given.
    """
    kind, found = config.kind, {}
    separable = not config.separator  # or some file is a text that it may divide
    for path in files.paths:
        try:
            for part in open_parts(path, kind, Tally(config)):
                found.setdefault(_natural_kind(part, files, config, log), part.place)
                is_member = part.place != str(path)
                separable = (
                    separable
                    or is_member
                    or not holds_records(part, looks_like(part.suffix, part.head, config))
                )
                break  # the others of an archive are taken to be like it
        except OSError as error:
            raise unreadable(files.where, error) from None
    if files.parallel:
        if kind not in ("auto", "pairs"):
            raise UserError(
                f'{files.where}: a folder of pairs, but data.kind = "{kind}"; set it to "auto"'
            )
        return "pairs"
    if found and not separable and kind in ("auto", "documents") and "pairs" not in found:
        raise UserError(
            f"data.separator = {config.separator!r}: stands between the documents of a text, and "
            f"{files.where} has records; leave it out"
        )
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
    refuse_bytes(part, config, where)
    looks = "JSON lines" if files.parallel else looks_like(part.suffix, part.head, config)
    if (looks or kind in ("lines", "pairs")) and has_old_lines(part.head):
        raise UserError(f"{where}: its lines end in \\r alone; save it with \\n or \\r\\n")
    if kind != "auto":
        if looks and kind in ("stream", "lines") and not files.parallel:
            said = f'it is read as text, because data.kind = "{kind}"'
            log(f"note: {where} looks like {looks}; {said}")
        return kind
    if files.parallel:
        return "pairs"
    if not holds_records(part, looks):
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


def refuse_bytes(part: Part, config: DataConfig, where: str):
    """Refuses what cannot be text, unless an encoding is given, which is taken at its word."""
    decoded_as = codec(part.head, config.encoding)
    if part.suffix not in COLUMNAR and decoded_as == "utf-8-sig":
        refuse_binary(part.head, where)


def holds_records(part: Part, looks: str) -> bool:
    """Whether a part is read record by record, and not as text."""
    if looks == "a table":
        return part.suffix in (".csv", ".tsv")
    return looks in ("JSON lines", "JSON records", *COLUMNAR.values())


def looks_like(suffix: str, head: bytes, config: DataConfig = DEFAULT) -> str:
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


def unreadable(where: str, error: OSError) -> UserError:
    return UserError(f"{where}: cannot be read ({error.strerror}); give a file that can be read")
