"""A token a character."""

import json
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from common.errors import UserError
from data.tokenizers.base import SPECIALS, Tokenizer, clean_text

if TYPE_CHECKING:
    import numpy as np


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
