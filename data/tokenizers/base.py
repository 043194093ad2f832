"""What every tokenizer has: ids, files, special tokens. Standard library only."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")  # of those made here; text never encodes to them
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell these, UTF-8 cannot hold them


def clean_text(text: str) -> str:
    """`text` with U+FFFD for lone surrogates (bytes of a command line that are not UTF-8)."""
    return SURROGATE.sub("\ufffd", text)


def cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Tokenizer(ABC):
    """What all tokenizers share: ids, files, and the fingerprint of these."""

    kind: str
    threads = 1  # that may encode at once and gain by it
    exact = True  # whether any text that has ids comes back as it was; False: it is tried
    vocab_size: int
    pad_id: int
    unk_id: int | None  # None: there is none; text with unknown characters is refused, or all known
    start_id: int
    end_id: int

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text."""
        ids = (self.pad_id, self.unk_id, self.start_id, self.end_id)
        return frozenset(i for i in ids if i is not None)

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

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of `before`, which ends in a whole character."""
        return self.decode(ids)

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
