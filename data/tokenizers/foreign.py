"""What tokenizers that others have trained share: special tokens, and texts that spell these.

They encode as their files say, but no text encodes to a special token, not even one that spells it.
What they do not give back as it was, round_trip.py finds out. Their libraries are loaded where they
are needed, and none of them loads NumPy or torch.
"""

import contextlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from common.errors import UserError
from data.tokenizers.base import Tokenizer, clean_text, cores
from data.tokenizers.special_tokens import FLAGS, Roles

if TYPE_CHECKING:
    import numpy as np

SETTINGS = "special_tokens.json"  # of ours, beside their files: what these do not say
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
