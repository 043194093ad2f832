"""What text is learned from, and how it becomes ids. Standard library only."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from common.errors import refuse
from common.files import is_address

DEFAULT_CACHE_DIR = Path(__file__).parent / "cache"  # what an empty data.cache_dir means
Kind = Literal["stream", "lines", "documents", "pairs"]
SourceName = Literal[
    "stdlib", "stdlib_words", "names", "tinyshakespeare", "nl2bash", "nl2bash_paper"
]
SOURCES: tuple[str, ...] = get_args(SourceName)
# a password, or a key in a query, that stands in an address; not ${NAME}, which stands for one
SECRET = re.compile(
    r"://[^/?#@]*:(?!\$\{)[^/?#]*@"
    r"|[?&][^=&]*(sig|token|secret|passw|credential|key)[^=&]*=(?!\$\{)", re.IGNORECASE,
)  # fmt: skip


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture; what is None is as `DataConfig` has it."""

    weight: float
    """Share of an epoch's tokens, relative to the other sources' weights."""
    path: str | tuple[str, ...] = ""
    """As data.path."""
    source: SourceName | None = None
    """As data.source; not path."""
    name: str = ""
    """What it is called in logs and metrics; empty: by its file or built-in source."""
    val_path: str = ""
    """As data.val_path."""
    kind: Literal["auto", "stream", "lines", "documents", "pairs"] | None = None
    text_key: str | None = None
    prompt_key: str | None = None
    completion_key: str | None = None
    separator: str | None = None
    encoding: str | None = None
    errors: Literal["strict", "replace"] | None = None
    skip_bad: bool | None = None
    val_fraction: float | None = None

    def __post_init__(self):
        wrong = []
        if not 0 < self.weight < math.inf:
            wrong.append(f"weight = {self.weight} must be above 0 and finite")
        if self.path in ("", ()) and self.source is None:
            wrong.append('path = "" must be a path, or source = the name of a built-in source')
        if self.path and self.source:
            wrong.append(f"source = {self.source!r} cannot be with a path; leave one of them out")
        if self.name and not re.fullmatch(r"[\w.-]{1,40}", self.name):
            wrong.append(f"name = {self.name[:60]!r} must be 1 to 40 letters, digits, _, . or -")
        refuse(wrong + wrong_reading(self))


@dataclass(frozen=True)
class DataConfig:
    """The text, the tokenizer and the split."""

    source: SourceName = "stdlib"
    """Built-in source: stdlib* come from this Python's library, the others are downloaded once."""
    path: str | tuple[str, ...] = ""
    """Your own file, folder, pattern or address, or several, or - for standard input (docs/data.md:
    what is read); not source."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture, in TOML only: [[data.sources]], each with a weight and a path or source."""
    val_path: str = ""
    """Validation data of the same kind; empty: split off as val_fraction says."""
    kind: Literal["auto", "stream", "lines", "documents", "pairs"] = "auto"
    """stream: one text; lines: each a document; documents: texts of any length, packed; pairs:
    prompt, completion; auto: by content."""
    text_key: str = "text"
    """Where records have their text: a column, or a key of JSON, dotted for a nested one."""
    prompt_key: str = "prompt"
    """Where records have their prompt; "a,b": both, with an empty line between them."""
    completion_key: str = "completion"
    """Where records have their completion."""
    slots: bool = False
    """Pairs: numbered placeholders for the names, numbers and quoted texts of a prompt."""
    separator: str = ""
    """What stands between the documents of a text file, such as <|endoftext|>; empty: nothing."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill sequences. concat: one after another, cut anywhere, nothing padded;
    best_fit: whole where they fit, with a little padding."""
    mask_documents: bool = False
    """Attention and positions end where a document does: each is learned as if it stood alone."""
    start_token: bool = True
    """Begin documents with <start>; False: with nothing but the <end> of the one before."""
    encoding: str = "utf-8"
    """Encoding of text, by Python's name for it; one with UTF-16's byte-order mark is known."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are no characters of the encoding: refused, or U+FFFD in their place."""
    skip_bad: bool = False
    """Leave out records and archives' members that cannot be read, and say how many."""
    tokenizer: Literal["bpe", "unigram", "char", "char_bos", "byte"] = "bpe"
    """bpe, unigram: SentencePiece; char: characters; char_bos: with one special token; byte."""
    tokenizer_path: str = ""
    """Trained tokenizer to use, anybody's: tokenizer.json, .model or .tiktoken, or its folder."""
    tokenizer_pattern: str = ""
    """How a .tiktoken file cuts words: gpt2, cl100k_base, o200k_base, or a regular expression."""
    bos_token: str = ""
    """With tokenizer_path: the token that starts a text; empty: found, else end_token."""
    end_token: str = ""
    """With tokenizer_path: the token that ends a text; empty: found."""
    pad_token: str = ""
    """With tokenizer_path: the token that pads; empty: found, else end_token."""
    unk_token: str = ""
    """With tokenizer_path: the token of what is unknown; empty: found, else none."""
    vocab_size: int = 2048
    """Vocabulary size of bpe and unigram; the others ignore it."""
    seq_len: int = 0
    """Tokens in a training sequence, at most model.max_len; 0: model.max_len."""
    val_fraction: float = 0.1
    """Fraction held out for validation if there is no validation file; 0: no validation."""
    cache_dir: str = ""
    """Folder for prepared data; empty: data/cache in this repository."""
    remote_cache_gb: float = 10.0
    """At most so many GB of remote files are kept in the folder for prepared data."""

    def __post_init__(self):
        wrong = []
        if self.vocab_size < 300:  # 256 bytes, four special tokens, and room for some pieces
            wrong.append(f"vocab_size = {self.vocab_size} must be at least 300 (256 are bytes)")
        if self.seq_len < 0:
            wrong.append(f"seq_len = {self.seq_len} must be 0 (model.max_len) or more")
        if not 0.1 <= self.remote_cache_gb < math.inf:
            wrong.append(f"remote_cache_gb = {self.remote_cache_gb} must be at least 0.1")
        wrong += [
            f"{name} = {value!r} is of another tokenizer; set data.tokenizer_path, or leave it out"
            for name, value in self.given_tokens().items()
            if not self.tokenizer_path
        ]
        if self.kind not in ("auto", "documents"):
            wrong += self.for_documents_alone(self.kind)
        if self.path == ():
            wrong.append('path = () must be "", a path or a list of paths')
        if self.sources and self.slots:
            wrong.append("slots = true cannot be with [[data.sources]]; leave one of them out")
        if self.sources and (self.path or self.val_path):
            key = "path" if self.path else "val_path"
            wrong.append(
                f"{key} = {getattr(self, key)!r} cannot be with [[data.sources]], each of which "
                "has its own; leave one of them out"
            )
        refuse(wrong + wrong_reading(self))

    def given_tokens(self) -> dict[str, str]:
        """What is set of the settings that only somebody else's tokenizer has."""
        names = ("tokenizer_pattern", "bos_token", "end_token", "pad_token", "unk_token")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def for_documents_alone(self, kind: str) -> list[str]:
        """What is wrong where data is of another kind: the settings that only documents have."""
        given = {
            f'packing = "{self.packing}"': self.packing != "concat",
            "mask_documents = true": self.mask_documents,
            "start_token = false": not self.start_token,
        }
        return [
            f'{setting} is for documents, and this is of kind "{kind}"; remove it, or set '
            'data.kind = "documents"'
            for setting, is_given in given.items()
            if is_given
        ]


def wrong_reading(config: DataConfig | SourceConfig) -> list[str]:
    """What is wrong with the settings that data and a source of a mixture share."""
    wrong, fraction, encoding = [], config.val_fraction, config.encoding
    if fraction is not None and not 0 <= fraction < 1:
        wrong.append(f"val_fraction = {fraction} must be at least 0 and below 1")
    try:
        b" ".decode("utf-8" if encoding is None else encoding)
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        wrong.append(f'encoding = {encoding!r} must be one that Python has, as "latin-1"')
    for name in ("text_key", "prompt_key", "completion_key"):
        key = getattr(config, name)
        if key is not None and not key.strip(" ,"):
            wrong.append(f'{name} = "" must be the name of a key')
    for path in (*as_paths(config.path), config.val_path):
        if found := SECRET.search(path):
            wrong.append(
                f"path = {path[: found.start()]}...: the address holds a password or a key, which "
                "would be kept with the run; set a variable of the environment to it, and write "
                "${NAME} in its place"
            )
    return wrong


def has_addresses(config: DataConfig) -> bool:
    """Whether data that is trained on, of one source or of several, is read from elsewhere."""
    return any(is_address(p) for part in (config, *config.sources) for p in as_paths(part.path))


def as_paths(path: str | Sequence[str]) -> tuple[str, ...]:
    """The paths of data.path, which may be one, several or ""."""
    if isinstance(path, str):
        return (path,) if path else ()
    return tuple(path)
