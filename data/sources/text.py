"""Bytes to characters: a text in pieces, by lines, or whole; and what cannot be one is refused."""

import codecs
from collections.abc import Iterator

from common.errors import UserError
from data.sources.paths import Part, Tally

CHUNK = 1 << 20  # bytes read at a time
MAX_TEXT = 1 << 28  # characters of a line or a document, which is held in memory
MARK = "\udc80"  # half of a surrogate pair, which no decoder gives: stands where a byte is wrong
codecs.register_error("triptych.mark", lambda error: (MARK, error.end))


def codec(head: bytes, encoding: str) -> str:
    """What a text that begins so is decoded with: `encoding`, unless a byte-order mark tells."""
    if codecs.lookup(encoding).name != "utf-8":
        return encoding
    is_wide = head.startswith(codecs.BOM_UTF32_LE)  # which begins as UTF-16 does
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not is_wide:
        return "utf-16"
    return "utf-8-sig"


def chunks(part: Part, tally: Tally, skips: bool = False) -> Iterator[str]:
    """The whole text, \\r\\n as it stands, in pieces that need not end at a line.

    skips: leave MARK where a byte is wrong and data.skip_bad is set, for `is_whole` to see.
    Otherwise raises UserError with the line and the byte of what cannot be decoded.
    """
    config = tally.config
    name = codec(part.head, config.encoding)
    replaces = config.errors == "replace"
    strict = not replaces and not (skips and config.skip_bad)
    decoder = codecs.getincrementaldecoder(name)("strict" if strict else "triptych.mark")
    done, line = 0, 1
    while True:
        data = part.stream.read(CHUNK)
        done += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # error.object is what the decoder still held, and always ends where we are
            offset = done - len(error.object) + error.start
            line += error.object[: error.start].decode(error.encoding, "replace").count("\n")
            what = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16"}.get(name, name)
            raise UserError(
                f"{part.place}:{line}: not {what} at byte {offset}; save it as UTF-8, or set "
                'data.encoding, or data.errors = "replace" to read on'
            ) from None
        if replaces and MARK in text:
            if not tally.replaced:
                tally.where = f"{part.place}:{line + text[: text.index(MARK)].count(chr(10))}"
            tally.replaced += text.count(MARK)
            text = text.replace(MARK, "\ufffd")
        if text:
            yield text
            line += text.count("\n")
        if not data:
            return


def is_whole(text: str, place: str, tally: Tally) -> bool:
    """Whether all of a text was characters; else it is left out, as data.skip_bad says."""
    wrong = tally.config.skip_bad and MARK in text
    if wrong:
        tally.skip(place, "has bytes that are no characters of its encoding", "correct it")
    return not wrong


def numbered_lines(part: Part, tally: Tally, skips: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end); only \\n or \\r\\n ends a line. skips: as `chunks`."""
    number, begun, length = 1, [], 0
    for text in chunks(part, tally, skips):
        first, *lines = text.split("\n")
        begun.append(first)
        length += len(first)
        if lines:
            yield number, "".join(begun).removesuffix("\r")
            for line in lines[:-1]:
                number += 1
                yield number, line.removesuffix("\r")
            number, begun, length = number + 1, lines[-1:], len(lines[-1])
        refuse_long(length, f"{part.place}:{number}")
    if line := "".join(begun):
        yield number, line.removesuffix("\r")


def whole(part: Part, tally: Tally) -> Iterator[str]:
    """All of a text. Raises UserError for one that is too long to be a document."""
    pieces, length = [], 0
    for text in chunks(part, tally, skips=True):
        pieces.append(text)
        length += len(text)
        refuse_long(length, part.place)
    if is_whole(text := "".join(pieces), part.place, tally):
        yield text


def separated(part: Part, tally: Tally) -> Iterator[str]:
    """The texts that stand between data.separator, without the ends of lines around it."""
    mark, rest, number = tally.config.separator, "", 1
    for text in chunks(part, tally, skips=True):
        *texts, rest = (rest + text).split(mark)
        tally.separators += len(texts)
        for text in texts:
            if is_whole(text, f"{part.place}: text {number:,}", tally):
                yield text.strip("\r\n")
            number += 1
        refuse_long(len(rest), part.place)
    if is_whole(rest, f"{part.place}: text {number:,}", tally):
        yield rest.strip("\r\n")


def refuse_long(length: int, place: str):
    """Raises UserError for a line or a document that would fill the memory."""
    if length > MAX_TEXT:
        raise UserError(
            f"{place}: longer than {MAX_TEXT:,} characters, too long for a line or a document; "
            'split it, or set data.kind = "stream"'
        )
