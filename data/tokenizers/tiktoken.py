"""The .tiktoken files of OpenAI, and of others that use the format."""

import base64
import hashlib
from collections.abc import Mapping

from common.errors import UserError
from data.tokenizers.foreign import (
    MAX_VOCAB,
    ForeignTokenizer,
    failing_as,
    missing,
    silent_panics,
)
from data.tokenizers.special_tokens import Roles, choose

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
