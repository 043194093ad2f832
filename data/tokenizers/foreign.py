"""Tokenizers that others have trained: Hugging Face's, tiktoken's, and any SentencePiece model.

They encode as their files say, but no text encodes to a special token, not even one that spells it.
What they do not give back as it was, round_trip.py finds out. Their libraries are loaded where they
are needed, and none of them loads NumPy or torch.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from common.errors import UserError
from data.tokenizers.base import Tokenizer, clean_text, cores
from data.tokenizers.special_tokens import FLAGS, Roles, choose

if TYPE_CHECKING:
    import numpy as np

SETTINGS = "special_tokens.json"  # of ours, beside their files: what these do not say
LONG = 1 << 17  # characters from which a text is encoded in pieces
NEAR = 256  # characters on each side of a cut that must not depend on it
TRIES = 8  # places that are tried for a cut
WORD = re.compile(r"(?<=\w)(?= \w)|(?<=\S)(?=\n\w)|(?<=[\u3002\uff01\uff1f])(?=\w)")
MAX_VOCAB = 1 << 22  # tokens: four times the largest that are used


class ForeignTokenizer(Tokenizer):
    """What they share: special tokens by name, and texts that spell these.

    A subclass sets `vocab_size` and calls `_set_special` when it can encode.
    """

    exact = False
    threads = min(cores(), 16)  # more would wait for Python's lock
    name: str  # for people
    file: str  # where it is in a checkpoint
    roles: Roles
    _content: bytes
    _where: str

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts; Python's lock is not held meanwhile."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that have one."""

    def _set_special(
        self,
        roles: Roles,
        textless: Iterable[int],
        id_of: Callable[[str], int | None],
        spelled: Callable[[str], tuple[list[int], list[int]]],
    ) -> None:
        """Sets the ids of the special tokens, and of all that stand for no text.

        spelled: the ids of a token's name as a text, and the ids of its characters one by one.
        Raises UserError for a special token that text cannot do without.
        """
        where = self._where
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise UserError(
                f"{where}: its highest id is {self.vocab_size - 1:,}, and {MAX_VOCAB:,} "
                "tokens are the most that are read; give a smaller tokenizer"
            )
        self.roles = roles
        ids = {role: id_of(token) for role, token in roles.items() if token is not None}
        self.pad_id, self.start_id, self.end_id = (ids[r] or 0 for r in ("pad", "start", "end"))
        self.unk_id = ids.get("unk")
        self._textless = self.special_ids | frozenset(textless)
        self._apart: dict[int, list[int]] = {}  # special tokens that a text can spell: spelled out
        for i in sorted(self._textless - {self.unk_id}):
            whole, characters = spelled(self.token(i))
            if i not in whole:
                continue
            own = [FLAGS[role] for role in sorted(ids) if ids[role] == i]
            if i not in characters:
                self._apart[i] = characters
            elif own:
                raise UserError(
                    f"{where}: {own[0]} = {self.token(i)!r} is what texts are made of; set it to a "
                    "token that no text needs"
                )

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_array(self, text: str) -> "np.ndarray":
        import numpy as np

        return np.array(self.encode(text), np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Many texts at once, by this thread alone, which does not hold Python's lock meanwhile."""
        with failing_as(self._where, "cannot encode a text"):
            rows = self._encode([clean_text(text) for text in texts])
        if self._apart:
            for row in rows:
                if not self._apart.keys().isdisjoint(row):
                    row[:] = chain.from_iterable(self._apart.get(i, (i,)) for i in row)
        return rows

    def decode(self, ids: "Iterable[int | np.integer]") -> str:
        """The text of `ids`; special tokens have none, bytes that are not UTF-8 give U+FFFD."""
        known = [int(i) for i in ids if i not in self._textless and 0 <= i < self.vocab_size]
        with failing_as(self._where, "cannot decode"):
            return self._decode(known) if known else ""

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The same as what the whole text has more, because many drop a text's first space."""
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def files(self) -> dict[str, bytes]:
        settings = json.dumps(self._settings(), sort_keys=True)
        return {self.file: self._content, SETTINGS: f"{settings}\n".encode()}

    def _settings(self) -> dict:
        """What SETTINGS holds."""
        return {"special": dict(self.roles)}

    def describe(self) -> str:
        """What it is and what its special tokens are, for people."""
        words = {"start": "starts", "end": "ends", "pad": "pads", "unk": "stands for unknown text"}
        does: dict[str, list[str]] = {}
        for role, token in self.roles.items():
            if token is not None:
                does.setdefault(token, []).append(words[role])
        tokens = ", ".join(f"{token} {' and '.join(roles)}" for token, roles in does.items())
        return f"{self.name}, {self.vocab_size:,} tokens; {tokens}"


# Hugging Face's -----------------------------------------------------------------------------------


class HuggingFaceTokenizer(ForeignTokenizer):
    """A tokenizer.json of Hugging Face, by their library `tokenizers`.

    content: of the file; special: its special tokens by role, those that are not to be found by
    name; hints: what files beside it say. Raises UserError that begins with `where`.
    """

    kind, name, file = "huggingface", "tokenizer.json of Hugging Face", "tokenizer.json"

    def __init__(
        self,
        content: bytes,
        special: Roles | None = None,
        hints: Roles | None = None,
        where: str = "tokenizer.json",
    ):
        # its own threads would compete with ours, and warn where a process forks
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import tokenizers
        except ImportError:
            raise missing(where, "tokenizers") from None
        self._content, self._where = content, where
        what = f"tokenizers {tokenizers.__version__} cannot read it"
        fix = "install a newer one (pip install -U tokenizers), or restore the file from a copy"
        with silent_panics(), failing_as(where, what, fix):
            self._tokenizer = made = tokenizers.Tokenizer.from_str(content.decode())
            stored = json.loads(content)
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = True  # as text, which is what they are in a text
        if getattr(made.model, "dropout", None):
            made.model.dropout = None  # BPE's, of training: each time it would give other ids
        self.vocab_size = max(made.get_vocab().values(), default=-1) + 1
        added = made.get_added_tokens_decoder()
        listed = {token.content for token in added.values()}
        hints = {**(hints or {}), "unk": unknown_of(stored["model"])}
        roles = choose(special or {}, hints, listed, made.token_to_id, where)
        flagged = [i for i, token in added.items() if token.special]
        with failing_as(where, "cannot encode a text"):
            self._set_special(roles, flagged, made.token_to_id, self._spelled)
            # a text that spells the unknown token is found by its place in the text
            self._unk, unk = roles["unk"], [-1, -1]
            if self._unk is not None:
                whole, unk = self._spelled(self._unk)
                self._unk = self._unk if self.unk_id in whole else None
            self._unk_apart = unk

    def _spelled(self, token: str) -> tuple[list[int], list[int]]:
        def ids(text: str) -> list[int]:
            return [piece.id for piece in self._tokenizer.model.tokenize(text)]

        return ids(token), [i for character in token for i in ids(character)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows = [row.ids for row in self._tokenizer.encode_batch_fast(
            [text if len(text) <= LONG else "" for text in texts], add_special_tokens=False
        )]  # fmt: skip
        for n, text in enumerate(texts):
            if self._unk is not None and self._unk in text:
                rows[n] = self._encode_unknown(text)
            elif len(text) > LONG:
                rows[n] = [*chain.from_iterable(map(self._ids, self._pieces(text)))]
        return rows

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text in pieces with the same ids: tokenizers takes 400 bytes for a token.

        It is cut where a word begins, if the ids around show that nothing reaches across; where a
        tokenizer has something before each text, say, it is not cut.
        """
        start = 0
        while len(text) - start > LONG:
            for found in islice(WORD.finditer(text, start + LONG // 2), TRIES):
                at = found.start()
                left, right = text[at - NEAR : at], text[at : at + NEAR]
                if self._ids(left + right) == self._ids(left) + self._ids(right):
                    yield text[start:at]
                    start = at
                    break
            else:
                break
        yield text[start:]

    def _encode_unknown(self, text: str) -> list[int]:
        """The ids of a text in which the unknown token's name stands."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        parts = (
            self._unk_apart if i == self.unk_id and text[a:b].strip() == self._unk else [i]
            for i, (a, b) in zip(made.ids, made.offsets, strict=True)
        )
        return [*chain.from_iterable(parts)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token(self, i: int) -> str:
        """One token as its vocabulary has it: often U+0120 or U+2581 for a space."""
        return self._tokenizer.id_to_token(i) or f"<{i}>"


def unknown_of(model: dict) -> str | None:
    """The unknown token of a model in a tokenizer.json."""
    if isinstance(at := model.get("unk_id"), int) and isinstance(model.get("vocab"), list):
        return model["vocab"][at][0]  # Unigram's; tokenizers has checked that it is there
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None


# tiktoken's ---------------------------------------------------------------------------------------

PATTERNS = {  # how a text is cut into words, by the encoding's name
    "gpt2": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    ),
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}  # fmt: skip
PATTERNS |= dict.fromkeys(("r50k_base", "p50k_base"), PATTERNS["gpt2"])

END = "<|endoftext|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# the files that OpenAI publishes, by sha256: pattern, and the special tokens that no file has
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": (
        "gpt2", {END: 50256},
    ),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": (
        "gpt2", {END: 50256},
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k_base",
        {END: 100257, FIM[0]: 100258, FIM[1]: 100259, FIM[2]: 100260, "<|endofprompt|>": 100276},
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": (
        "o200k_base", {END: 199999, "<|endofprompt|>": 200018},
    ),
}  # fmt: skip


class TiktokenTokenizer(ForeignTokenizer):
    """Byte-pair merges of a .tiktoken file, by OpenAI's library `tiktoken`.

    content: of the file, a line for each token, its bytes in base64 and its id; pattern: how texts
    are cut into words, a name of PATTERNS or a regular expression, "" where the file is known;
    added: ids of special tokens, which the file does not have. Raises UserError that begins with
    `where`.
    """

    kind, name, file = "tiktoken", "tiktoken", "tokenizer.tiktoken"

    def __init__(
        self,
        content: bytes,
        special: Roles | None = None,
        pattern: str = "",
        added: Mapping[str, int] | None = None,
        where: str = "tokenizer.tiktoken",
    ):
        try:
            import tiktoken
        except ImportError:
            raise missing(where, "tiktoken") from None
        self._content, self._where = content, where
        ranks = ranks_of(content, where)
        known = KNOWN.get(hashlib.sha256(content).hexdigest())
        pattern = pattern or (known[0] if known else "")
        if not pattern:
            names = ", ".join(f'"{name}"' for name in PATTERNS)
            raise UserError(
                f"{where}: how it cuts texts into words is not known; set data.tokenizer_pattern "
                f"to {names} or a regular expression"
            )
        self._pattern = PATTERNS.get(pattern, pattern)
        free = len(ranks)
        while free in ranks.values():
            free += 1
        self._added = dict(added or (known[1] if known else {END: free}))
        if not known and added is None:  # those that are named are added
            for token in filter(None, (special or {}).values()):
                self._added.setdefault(token, max(free, *self._added.values()) + 1)
        if len({*ranks.values(), *self._added.values()}) < len(ranks) + len(self._added):
            raise UserError(f"{where}: an id stands for two tokens; restore the file from a copy")
        self.vocab_size = max(*ranks.values(), *self._added.values()) + 1
        self._bytes = {i: token for token, i in ranks.items()}
        self._names = {i: token for token, i in self._added.items()}
        roles = choose(special or {}, {}, self._added, self._added.get, where)
        self._set_special(roles, self._names, self._added.get, lambda token: ([], []))
        what = f"data.tokenizer_pattern = {pattern[:80]!r}"
        with silent_panics(), failing_as(where, what, "fix the regular expression"):
            self._encoding = tiktoken.Encoding(
                "theirs", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=self._added
            )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def token(self, i: int) -> str:
        """One token: its text, or <0xE2> for each byte of one that is not whole characters."""
        if i not in self._bytes:
            return self._names.get(i, f"<{i}>")
        try:
            return self._bytes[i].decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in self._bytes[i])

    def _settings(self) -> dict:
        return {**super()._settings(), "pattern": self._pattern, "added": self._added}


def looks_like_tiktoken(content: bytes) -> bool:
    """Whether a file begins with a token in base64 and its id, as Llama 3's tokenizer.model does.

    A SentencePiece model begins with an empty line.
    """
    token, _, number = content[:1000].partition(b"\n")[0].partition(b" ")
    return bool(token) and number.strip().isdigit()


def ranks_of(content: bytes, where: str) -> dict[bytes, int]:
    """{bytes of a token: its id} of a .tiktoken file. Raises UserError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{where}: line {number} is not a token in base64 and its id; restore the file "
                "from a copy"
            ) from None
    if lost := [i for i in range(256) if bytes([i]) not in ranks]:
        raise UserError(
            f"{where}: lacks {len(lost)} of the 256 bytes, such as 0x{lost[0]:02X}; restore the "
            "file from a copy"
        )
    low, high = min(ranks.values()), max(ranks.values())
    if low < 0 or high >= MAX_VOCAB or len(set(ranks.values())) < len(ranks):
        raise UserError(
            f"{where}: its ids, {low} to {high}, must be different numbers from 0 to "
            f"{MAX_VOCAB - 1:,}; restore the file from a copy"
        )
    return ranks


# SentencePiece's ----------------------------------------------------------------------------------


class ForeignSentencePieceTokenizer(ForeignTokenizer):
    """Any SentencePiece model: it normalises, prefixes and names as it has been trained to.

    content: of the file; special, hints: as for HuggingFaceTokenizer. Raises UserError that begins
    with `where`.
    """

    kind, name, file = "foreign_sentencepiece", "SentencePiece", "tokenizer.model"

    def __init__(
        self,
        content: bytes,
        special: Roles | None = None,
        hints: Roles | None = None,
        where: str = "tokenizer.model",
    ):
        import sentencepiece

        self._content, self._where = content, where
        made = self._processor = sentencepiece.SentencePieceProcessor()
        with failing_as(where, "not a SentencePiece model", "restore the file from a copy"):
            made.LoadFromSerializedProto(content)
            self.vocab_size = made.get_piece_size()
            made.decode(list(range(self.vocab_size)))  # each piece is text
            controls = {i for i in range(self.vocab_size) if made.is_control(i)}
            own = {"start": made.bos_id(), "end": made.eos_id(), "pad": made.pad_id()}
            own["unk"] = made.unk_id()
            hints = {
                **(hints or {}),
                **{role: made.id_to_piece(i) for role, i in own.items() if i >= 0},
            }
            # those that a text can spell score 0
            known = [made.id_to_piece(i) for i in range(self.vocab_size) if made.get_score(i) == 0]
        roles = choose(special or {}, hints, known, self._id_of, where)
        self._set_special(roles, controls, self._id_of, self._spelled)

    def _id_of(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return None if i < 0 or self._processor.id_to_piece(i) != token else i

    def _spelled(self, token: str) -> tuple[list[int], list[int]]:
        characters = []
        for character in token:
            known = self._id_of(character)
            if known is None:
                own = (self._id_of(f"<0x{byte:02X}>") for byte in character.encode())
                characters += [self._processor.unk_id() if i is None else i for i in own]
            else:
                characters.append(known)
        return self._processor.encode(token), characters

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token(self, i: int) -> str:
        """One piece as SentencePiece writes it: U+2581 for a space, <0x0A> for a byte."""
        return self._processor.id_to_piece(i)


# What libraries raise -----------------------------------------------------------------------------


def missing(where: str, library: str) -> UserError:
    """The error where a library is not installed."""
    return UserError(
        f"{where}: the library {library}, which it needs, is not installed; install it with pip "
        f"install -e '.[{library}]'"
    )


@contextlib.contextmanager
def failing_as(where: str, what: str, fix: str = "use another tokenizer") -> Generator[None]:
    """Raises what a library raises as UserError: of any type, a panic of Rust included."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # PanicException, which cannot be imported, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{where}: {what}: {error}; {fix}") from None


@contextlib.contextmanager
def silent_panics() -> Generator[None]:
    """Keeps off stderr what Rust writes there itself when it panics."""
    try:
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
