"""The tokenizer that a folder or a file holds, whoever has trained it.

Imports the standard library only; NumPy, SentencePiece and other libraries are loaded where they
are needed, so that a model of characters or bytes can be read without any of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import UnreadableError, UserError
from common.files import refuse_no_file, user_path
from data.config import DataConfig
from data.tokenizers.base import Tokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.char import CharTokenizer
from data.tokenizers.foreign import MAX_VOCAB, SETTINGS
from data.tokenizers.foreign_sentencepiece import ForeignSentencePieceTokenizer
from data.tokenizers.huggingface import HuggingFaceTokenizer
from data.tokenizers.sentencepiece import SentencePieceTokenizer
from data.tokenizers.special_tokens import FLAGS, Roles, hints_beside
from data.tokenizers.tiktoken import PATTERNS, TiktokenTokenizer, looks_like_tiktoken

MODELS = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")  # one of them, in this order
TOKENIZER_FILES = (*MODELS, SETTINGS)  # all that a checkpoint may have
MAX_BYTES = 1 << 27  # four times the largest that are used


def named_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer at data.tokenizer_path, if that is given."""
    path = config.tokenizer_path
    if not path:
        return None
    refuse_no_file(path, f"data.tokenizer_path = {path}")
    tokens = {role: getattr(config, flag.removeprefix("data.")) for role, flag in FLAGS.items()}
    try:
        given = {role: token for role, token in tokens.items() if token}
        return load_tokenizer(user_path(path), given, config.tokenizer_pattern)
    except UserError as error:
        raise UserError(f"data.tokenizer_path: {error}") from None


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
