"""SentencePiece models as train_sentencepiece.py trains them: exact for any text.

NumPy and SentencePiece are loaded where they are needed.
"""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from common.errors import UserError
from data.tokenizers.base import SPECIALS, Tokenizer, clean_text, cores

if TYPE_CHECKING:
    import numpy as np

# SentencePiece writes a space as U+2581, and so cannot tell the two apart. A private-use character
# makes room: U+2581 travels as ESCAPE + "b", and ESCAPE itself as ESCAPE + "e".
SPACE, ESCAPE = "\u2581", "\ue000"

LINES = 2048  # of a stream encoded at a time, so that few lists of ids are alive at once


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
