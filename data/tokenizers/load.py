"""Text to ids and back: characters, bytes, and whatever a tokenizer's files hold.

Imports the standard library only; NumPy, SentencePiece and other libraries are loaded where they
are needed, so that a model of characters or bytes can be read without any of them.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UnreadableError, UserError
from data.tokenizers.base import SPECIALS, SURROGATE, Tokenizer, clean_text, cores
from data.tokenizers.foreign import (
    MAX_VOCAB,
    PATTERNS,
    SETTINGS,
    ForeignSentencePieceTokenizer,
    ForeignTokenizer,
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    looks_like_tiktoken,
)
from data.tokenizers.sentencepiece import ESCAPE, SPACE, SentencePieceTokenizer, escape
from data.tokenizers.special_tokens import FLAGS, Roles, hints_beside

if TYPE_CHECKING:
    import numpy as np

__all__ = [  # what other folders take from here
    "ESCAPE", "SPACE", "SPECIALS", "SURROGATE", "TOKENIZER_FILES", "ByteTokenizer", "CharTokenizer",
    "ForeignTokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "TiktokenTokenizer",
    "Tokenizer", "clean_text", "cores", "escape", "load_tokenizer", "tokenizer_from_files",
]  # fmt: skip

MODELS = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")  # one of them, in this order
TOKENIZER_FILES = (*MODELS, SETTINGS)  # all that a checkpoint may have
MAX_BYTES = 1 << 27  # four times the largest that are used


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


class ByteTokenizer(Tokenizer):
    """A token a byte of UTF-8, whose value is its id; then `<pad>`, `<start>` and `<end>`."""

    kind = "byte"
    vocab_size = 259
    pad_id, start_id, end_id = 256, 257, 258
    unk_id = None  # any text is bytes

    def encode(self, text: str) -> list[int]:
        return [*clean_text(text).encode()]

    def encode_array(self, text: str) -> "np.ndarray":
        """The same as an int32 array (T,), many times faster."""
        import numpy as np

        return np.frombuffer(clean_text(text).encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: "Iterable[int | np.integer]") -> str:
        """The text of `ids`; special tokens have none, bytes that are not UTF-8 give U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")

    def token(self, i: int) -> str:
        """One token: a character of ASCII, or <0xE2> for a byte of another."""
        if i >= 256:
            return ("<pad>", "<start>", "<end>")[i - 256]
        return chr(i) if i < 128 else f"<0x{i:02X}>"

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": b'{"kind": "byte"}\n'}


# Loading ------------------------------------------------------------------------------------------


def load_tokenizer(place: Path, special: Roles | None = None, pattern: str = "") -> Tokenizer:
    """The tokenizer in a folder, or that file. Raises UserError for none or a damaged one.

    special, pattern: of somebody else's, what its files do not say: tokens by role, and
    data.tokenizer_pattern.
    """
    path = find_tokenizer(place)
    try:
        content = read(path)
        settings = path.with_name(SETTINGS)
        stored = read(settings) if settings.is_file() else b""
    except OSError as error:
        raise UnreadableError(error, path) from None
    return from_content(path, content, stored, special or {}, pattern)


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that has these `files()`: the same one in another process."""
    name = next(name for name in MODELS if name in files)
    return from_content(Path(name), files[name], files.get(SETTINGS, b""))


def find_tokenizer(place: Path) -> Path:
    """The file of a tokenizer that a path stands for. Raises UserError."""
    if place.is_file():
        if place.suffix not in (".json", ".model", ".tiktoken"):
            raise UserError(f"{place}: must be a .json, .model or .tiktoken file")
        return place
    for name in MODELS:
        if (place / name).is_file():
            return place / name
    alone = [*place.glob("*.tiktoken"), *place.glob("*.model")] if place.is_dir() else []
    if len(alone) == 1 and alone[0].is_file():
        return alone[0]
    raise UserError(f"{place}: neither {' nor '.join(MODELS)} is here; give a folder with one")


def read(path: Path) -> bytes:
    """A file's content. Raises OSError, or UserError if it is too large to be a tokenizer's."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES} bytes; give a tokenizer")
    return path.read_bytes()


def from_content(
    path: Path, content: bytes, stored: bytes, special: Roles | None = None, pattern: str = ""
) -> Tokenizer:
    """A tokenizer from a file that was read, and from its SETTINGS, b"" without."""
    where, settings = str(path), {}
    try:
        if stored:
            settings = read_settings(stored)
        own = None if looks_like_tiktoken(content) else own_tokenizer(path, content)
    # KeyError and TypeError: JSON of another shape; RecursionError: JSON nested too deep
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a tokenizer ({error}); restore it from a copy, or train again"
        ) from None
    if own is not None:
        if special or pattern:
            flag = next((FLAGS[role] for role in special or {}), "data.tokenizer_pattern")
            raise UserError(f"{flag}: {path} was trained here and has its own; leave it out")
        return own
    roles = {**settings.get("special", {}), **(special or {})}
    hints = {} if stored else hints_beside(path)
    if looks_like_tiktoken(content) or path.suffix == ".tiktoken":
        known = path.stem if path.stem in PATTERNS else ""
        pattern = pattern or settings.get("pattern", "") or known
        return TiktokenTokenizer(content, roles, pattern, settings.get("added"), where)
    if pattern:
        raise UserError(f"data.tokenizer_pattern: {path} has its own; leave it out")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(content, roles, hints, where)
    return ForeignSentencePieceTokenizer(content, roles, hints, where)


def own_tokenizer(path: Path, content: bytes) -> Tokenizer | None:
    """The tokenizer of a file that this project has made; None for somebody else's.

    Raises ValueError, KeyError, TypeError and RecursionError for what is neither.
    """
    if path.suffix == ".model":
        try:
            return SentencePieceTokenizer(content)
        except UserError:
            return None
    stored = json.loads(content)
    if isinstance(stored, dict) and "model" in stored and "kind" not in stored:
        return None
    if stored == {"kind": "byte"}:
        return ByteTokenizer()
    if not isinstance(stored, dict) or not stored.keys() >= {"kind", "characters"}:
        raise ValueError("neither one that this project has made, nor one of Hugging Face")
    kind, characters = stored["kind"], stored["characters"]
    if kind not in ("char", "char_bos"):
        raise ValueError('"kind" is neither "char" nor "char_bos"')
    if not isinstance(characters, str):
        raise ValueError('"characters" is not a string')
    tokenizer = CharTokenizer(characters, kind)
    if tokenizer.characters != characters:
        raise ValueError('"characters" are not in order, each once')
    return tokenizer


def read_settings(stored: bytes) -> dict:
    """The content of SETTINGS, checked. Raises ValueError and RecursionError."""
    settings = json.loads(stored)
    tables = settings if isinstance(settings, dict) else {"special": None}
    special, added = tables.get("special", {}), tables.get("added", {})
    if not (
        isinstance(special, dict)
        and isinstance(added, dict)
        and special.keys() <= FLAGS.keys()
        and all(token is None or isinstance(token, str) for token in special.values())
        and isinstance(settings.get("pattern", ""), str)
        and all(type(i) is int and 0 <= i < MAX_VOCAB for i in added.values())
    ):
        raise ValueError(f"{SETTINGS} is not one that this project has made")
    return settings
