"""What text is learned from, and how it becomes ids. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import UserError

DEFAULT_CACHE_DIR = Path(__file__).parent / "cache"  # what an empty data.cache_dir means
Kind = Literal["stream", "lines", "pairs"]
SourceName = Literal["stdlib", "stdlib_words", "names", "tinyshakespeare", "nl2bash"]
SOURCES: tuple[str, ...] = get_args(SourceName)


@dataclass(frozen=True)
class DataConfig:
    """The text, the tokenizer and the split."""

    source: SourceName = "stdlib"
    """A source by name: the stdlib ones are read from this Python, the others downloaded once."""
    path: str = ""
    """Your own .txt, .jsonl or folder of train.nl train.cm dev.nl dev.cm; wins over source."""
    val_path: str = ""
    """A validation file of the same kind; without it the split is made by val_fraction."""
    kind: Literal["auto", "stream", "lines", "pairs"] = "auto"
    """One long text, a document a line, or prompt and completion; auto: by the file's name."""
    tokenizer: Literal["bpe", "unigram", "char", "char_bos"] = "bpe"
    """SentencePiece BPE or unigram, characters, or microGPT's characters with one special token."""
    tokenizer_path: str = ""
    """A tokenizer of your own: a tokenizer.model or tokenizer.json, or the folder it is in."""
    vocab_size: int = 2048
    """Size of a SentencePiece vocabulary; characters count themselves."""
    seq_len: int = 0
    """Tokens in a training window, at most model.max_len; 0: as long as the model can hold."""
    val_fraction: float = 0.1
    """Share held out for validation where no validation file is given; 0: no validation."""
    cache_dir: str = ""
    """Where prepared data is kept; empty: data/cache in the clone."""

    def __post_init__(self):
        wrong = []
        if self.vocab_size < 300:  # 256 bytes, four special tokens, and room for some pieces
            wrong.append(f"vocab_size = {self.vocab_size} must be at least 300 (256 are bytes)")
        if self.seq_len < 0:
            wrong.append(f"seq_len = {self.seq_len} must be 0 (model.max_len) or more")
        if not 0 <= self.val_fraction < 1:
            wrong.append(f"val_fraction = {self.val_fraction} must be at least 0 and below 1")
        if wrong:
            raise UserError("; ".join(wrong))
