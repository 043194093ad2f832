"""Text to ids and back, exactly: one token a character, or SentencePiece pieces.

Imports the standard library only; NumPy and SentencePiece are loaded where they are needed, so that
a model of characters can be read without either.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UnreadableError, UserError

if TYPE_CHECKING:
    import numpy as np

SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")  # ids 0 to 3; text never encodes to these
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell these, UTF-8 cannot hold them

# SentencePiece writes a space as U+2581, and so cannot tell the two apart. A private-use character
# makes room: U+2581 travels as ESCAPE + "b", and ESCAPE itself as ESCAPE + "e".
SPACE, ESCAPE = "\u2581", "\ue000"

LINES = 2048  # of a stream encoded at a time, so that few lists of ids are alive at once
MAX_JSON_BYTES = 1 << 24  # more than every character there is would take


def clean_text(text: str) -> str:
    """`text` with U+FFFD for lone surrogates (bytes of a command line that are not UTF-8)."""
    return SURROGATE.sub("\ufffd", text)


def cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Tokenizer(ABC):
    """What both tokenizers share: ids, files, and the fingerprint of these."""

    kind: str
    threads = 1  # that may encode at once and gain by it
    vocab_size: int
    pad_id: int
    unk_id: int | None  # None: text with unknown characters is refused
    start_id: int
    end_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UserError for what has none."""

    @abstractmethod
    def encode_array(self, text: str) -> "np.ndarray":
        """The same as an int32 array (T,), faster."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts."""

    @abstractmethod
    def decode(self, ids: "Iterable[int | np.integer]") -> str:
        """The text of `ids`; special tokens have none."""

    @abstractmethod
    def token(self, i: int) -> str:
        """One token, for people to read."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """All that is needed to load it again: file name -> content."""

    def save(self, folder: Path) -> None:
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @property
    def fingerprint(self) -> str:
        """Hex hash of the files."""
        parts = [
            part for name, content in self.files().items() for part in (name.encode(), content)
        ]
        return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


class CharTokenizer(Tokenizer):
    """One token a character, in the order of code points.

    Of kind "char", ids 0 to 3 are SPECIALS and the characters come after. Of kind "char_bos"
    (microGPT), the characters come first, and one special token after them starts, ends and pads.
    """

    def __init__(self, characters: Iterable[str], kind: str = "char"):
        self.kind = kind
        self.characters = "".join(sorted(set(clean_text("".join(characters)))))
        if not self.characters:
            raise UserError("data.path: the text is empty; give a file with text in it")
        if kind == "char":
            self.pad_id, self.unk_id, self.start_id, self.end_id = range(4)
            self._tokens = [*SPECIALS, *self.characters]
        else:
            self.pad_id = self.start_id = self.end_id = len(self.characters)
            self.unk_id = None
            self._tokens = [*self.characters, "<start>"]
        self.vocab_size = len(self._tokens)
        self._ids = {token: i for i, token in enumerate(self._tokens) if len(token) == 1}

    def encode(self, text: str) -> list[int]:
        """Raises UserError for unknown characters if there is no id for them."""
        text = clean_text(text)
        if self.unk_id is None and not self._ids.keys() >= set(text):
            unknown = "".join(sorted(set(text) - self._ids.keys()))
            raise UserError(
                f"{unknown[:20]!r}: the model has not seen these characters; "
                f"use only {self.characters[:80]!r}"
            )
        unknown = -1 if self.unk_id is None else self.unk_id  # -1: there is none, as seen above
        return [self._ids.get(character, unknown) for character in text]

    def encode_array(self, text: str) -> "np.ndarray":
        """The same as an int32 array (T,), many times faster."""
        import numpy as np

        codes = np.frombuffer(clean_text(text).encode("utf-32-le"), np.dtype("<u4"))
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if self.unk_id is None and (ids < 0).any():
            self.encode(text)  # which says what is unknown
        return ids

    @cached_property
    def _table(self) -> "np.ndarray":
        """Code point -> id; the last entry stands for all code points beyond."""
        import numpy as np

        unknown = -1 if self.unk_id is None else self.unk_id
        table = np.full(ord(self.characters[-1]) + 2, unknown, np.int32)
        table[[ord(character) for character in self._ids]] = list(self._ids.values())
        return table

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: "Iterable[int | np.integer]") -> str:
        """The text of `ids`; special tokens have none."""
        special = {self.pad_id, self.unk_id, self.start_id, self.end_id}
        return "".join(self._tokens[i] for i in ids if i not in special)

    def token(self, i: int) -> str:
        """One token, for people to read."""
        return self._tokens[i]

    def files(self) -> dict[str, bytes]:
        stored = {"kind": self.kind, "characters": self.characters}
        return {"tokenizer.json": f"{json.dumps(stored)}\n".encode()}


class SentencePieceTokenizer(Tokenizer):
    """Pieces of words, and bytes for what the pieces lack: any text comes back as it was.

    `model` is the content of a SentencePiece model file of `train_sentencepiece`; another, which
    may change text, is refused with UserError.
    """

    kind = "sentencepiece"
    threads = min(cores(), 16)  # more would wait for Python's lock
    pad_id, unk_id, start_id, end_id = range(4)

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        probe = f"  a{SPACE}{ESCAPE}\n<start>\r \0 "
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size = self._processor.get_piece_size()
            self.decode(range(self.vocab_size))  # each piece is text
            named = [self.token(i) for i in range(4)] == list(SPECIALS)
            exact = named and self.decode(self.encode(probe)) == probe
            # BPE's scores are ranks, whole numbers; those of unigram are log probabilities
            self._by_merges = all(
                self._processor.get_score(i).is_integer() and "\n" not in self.token(i)
                for i in range(self.vocab_size)
            )
        except (RuntimeError, IndexError, ValueError):  # what SentencePiece raises for other bytes
            exact = False
        if not exact:
            raise UserError("not a SentencePiece model that this project has trained")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(escape(text))

    def encode_array(self, text: str) -> "np.ndarray":
        """The same as an int32 array (T,), twice as fast for a long text.

        No merge of BPE crosses a newline, which no piece holds, so lines are encoded one by one. A
        unigram model is given all at once: it chooses by float32 sums, which round by what stood
        before.
        """
        import numpy as np

        if not self._by_merges:
            return np.array(self.encode(text), np.int32)
        lines, newline, parts = escape(text).split("\n"), self._processor.encode("\n"), []
        for start in range(0, len(lines), LINES):
            rows = self._processor.encode(lines[start : start + LINES], num_threads=1)
            for row in rows:
                row += newline
            parts.append(np.fromiter(chain.from_iterable(rows), np.int32))
        ids = np.concatenate(parts)
        return ids[: len(ids) - len(newline)]  # the last line has no end

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Many texts at once, by this thread alone, which does not hold Python's lock meanwhile."""
        return self._processor.encode([escape(text) for text in texts], num_threads=1)

    def decode(self, ids: "Iterable[int | np.integer]") -> str:
        """The text of `ids`; special tokens have none, bytes that are not UTF-8 give U+FFFD."""
        text = self._processor.decode([int(i) for i in ids if i >= len(SPECIALS)])
        # a space that comes as bytes, because the training text had none, still reads U+2581
        text = text.replace(SPACE, " ")
        return text.replace(f"{ESCAPE}b", SPACE).replace(f"{ESCAPE}e", ESCAPE)

    def token(self, i: int) -> str:
        """One piece as SentencePiece writes it: U+2581 for a space, <0x0A> for a byte."""
        return self._processor.id_to_piece(i)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


def escape(text: str) -> str:
    """`text` as SentencePiece is given it: with U+2581 apart from a space."""
    if text.isascii():  # quickly told
        return text
    return clean_text(text).replace(ESCAPE, f"{ESCAPE}e").replace(SPACE, f"{ESCAPE}b")


# Loading ------------------------------------------------------------------------------------------


def load_tokenizer(place: Path) -> CharTokenizer | SentencePieceTokenizer:
    """The tokenizer in a folder, or that file. Raises UserError for none or a damaged one."""
    for name, load in (("tokenizer.json", _load_characters), ("tokenizer.model", _load_model)):
        path = place if place.is_file() else place / name
        if path.is_file() and path.suffix == Path(name).suffix:
            try:
                return load(path)
            except OSError as error:
                raise UnreadableError(error, path) from None
            # KeyError and TypeError: JSON of another shape; RecursionError: JSON nested too deep
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}: not a tokenizer ({error}); restore it from a copy, or train again"
                ) from None
    if place.is_file():
        raise UserError(f"{place}: must be a .json or .model file")
    raise UserError(
        f"{place}: neither tokenizer.json nor tokenizer.model is here; give a folder with one"
    )


def _load_model(path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(path.read_bytes())


def _load_characters(path: Path) -> CharTokenizer:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    stored = json.loads(path.read_bytes())
    if not isinstance(stored, dict) or not stored.keys() >= {"kind", "characters"}:
        raise ValueError("not one that this project has made")
    kind, characters = stored["kind"], stored["characters"]
    if kind not in ("char", "char_bos"):
        raise ValueError('"kind" is neither "char" nor "char_bos"')
    if not isinstance(characters, str):
        raise ValueError('"characters" is not a string')
    tokenizer = CharTokenizer(characters, kind)
    if tokenizer.characters != characters:
        raise ValueError('"characters" are not in order, each once')
    return tokenizer
