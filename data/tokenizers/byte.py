"""A token a byte."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from data.tokenizers.base import Tokenizer, clean_text

if TYPE_CHECKING:
    import numpy as np


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
