"""What text is learned from, and how it becomes ids. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import refuse

DEFAULT_CACHE_DIR = Path(__file__).parent / "cache"  # what an empty data.cache_dir means
Kind = Literal["stream", "lines", "pairs"]
SourceName = Literal["stdlib", "stdlib_words", "names", "tinyshakespeare", "nl2bash"]
SOURCES: tuple[str, ...] = get_args(SourceName)


@dataclass(frozen=True)
class DataConfig:
    """The text, the tokenizer and the split."""

    source: SourceName = "stdlib"
    """Built-in source: stdlib* come from this Python's library, the others are downloaded once."""
    path: str = ""
    """Your own file of text or JSON lines, or folder with train.nl, train.cm; overrides source."""
    val_path: str = ""
    """A validation file of the same kind; empty: split off as val_fraction says."""
    kind: Literal["auto", "stream", "lines", "pairs"] = "auto"
    """stream: one text; lines: a document a line; pairs: prompt, completion; auto: by content."""
    tokenizer: Literal["bpe", "unigram", "char", "char_bos"] = "bpe"
    """bpe, unigram: SentencePiece; char: characters; char_bos: with one special token."""
    tokenizer_path: str = ""
    """Trained tokenizer to use: a tokenizer.model or tokenizer.json, or its folder."""
    vocab_size: int = 2048
    """Vocabulary size of bpe and unigram; char and char_bos ignore it."""
    seq_len: int = 0
    """Tokens in a training sequence, at most model.max_len; 0: model.max_len."""
    val_fraction: float = 0.1
    """Fraction held out for validation if there is no validation file; 0: no validation."""
    cache_dir: str = ""
    """Folder for prepared data; empty: data/cache in this repository."""

    def __post_init__(self):
        wrong = []
        if self.vocab_size < 300:  # 256 bytes, four special tokens, and room for some pieces
            wrong.append(f"vocab_size = {self.vocab_size} must be at least 300 (256 are bytes)")
        if self.seq_len < 0:
            wrong.append(f"seq_len = {self.seq_len} must be 0 (model.max_len) or more")
        if not 0 <= self.val_fraction < 1:
            wrong.append(f"val_fraction = {self.val_fraction} must be at least 0 and below 1")
        refuse(wrong)
