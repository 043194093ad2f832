"""Text to ids and back, exactly: one token a character, or SentencePiece pieces.

Imports the standard library only; NumPy and SentencePiece are loaded where they are needed, so that
a model of characters can be read without either. `python -m data.tokenizer bpe 2048` is how
`train_sentencepiece` trains in a process of its own: text on stdin, the model on stdout.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from model.config import UserError

SPECIALS = ("<pad>", "<unk>", "<start>", "<end>")  # ids 0 to 3; text never encodes to these
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell these, UTF-8 cannot hold them

# SentencePiece writes a space as U+2581, and so cannot tell the two apart. A private-use character
# makes room: U+2581 travels as ESCAPE + "b", and ESCAPE itself as ESCAPE + "e".
SPACE, ESCAPE = "\u2581", "\ue000"

SAMPLE_BYTES = 20_000_000  # of text that SentencePiece is trained on
PIECE_CHARS = 1000  # at most 4,000 bytes: SentencePiece skips lines over 4,192
MAX_JSON_BYTES = 1 << 24  # more than every character there is would take


def clean_text(text: str) -> str:
    """`text` with U+FFFD for lone surrogates (bytes of a command line that are not UTF-8)."""
    return SURROGATE.sub("\ufffd", text)


class Tokenizer(ABC):
    """What both tokenizers share: ids, files, and the fingerprint of these."""

    kind: str
    vocab_size: int
    pad_id: int
    unk_id: int | None  # None: text with unknown characters is refused
    start_id: int
    end_id: int

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


class CharTokenizer(Tokenizer):
    """One token a character, in the order of code points.

    Of kind "char", ids 0 to 3 are SPECIALS and the characters come after. Of kind "char_bos"
    (microGPT), the characters come first, and one special token after them starts, ends and pads.
    """

    def __init__(self, characters: Iterable[str], kind: str = "char"):
        self.kind = kind
        self.characters = "".join(sorted(set(clean_text("".join(characters)))))
        if not self.characters:
            raise UserError("there are no characters to learn from: is the text empty?")
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
                f"it knows {self.characters[:80]!r}"
            )
        return [self._ids.get(character, self.unk_id) for character in text]

    def encode_array(self, text: str):
        """The same as an int32 array (T,), many times faster."""
        import numpy as np

        codes = np.frombuffer(clean_text(text).encode("utf-32-le"), np.dtype("<u4"))
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if self.unk_id is None and (ids < 0).any():
            self.encode(text)  # which says what is unknown
        return ids

    @cached_property
    def _table(self):
        """Code point -> id; the last entry stands for all code points beyond."""
        import numpy as np

        unknown = -1 if self.unk_id is None else self.unk_id
        table = np.full(ord(self.characters[-1]) + 2, unknown, np.int32)
        table[[ord(character) for character in self._ids]] = list(self._ids.values())
        return table

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens have none."""
        special = {self.pad_id, self.unk_id, self.start_id, self.end_id}
        return "".join(self._tokens[i] for i in ids if i not in special)

    def token(self, i: int) -> str:
        """One token, for people to read."""
        return self._tokens[i]

    def files(self) -> dict[str, bytes]:
        stored = {"kind": self.kind, "characters": self.characters}
        return {"tokenizer.json": f"{json.dumps(stored)}\n".encode()}


class SentencePieceTokenizer(Tokenizer):
    """Pieces of words, and bytes for what the pieces lack: any text comes back as it was.

    `model` is the content of a SentencePiece model file of `train_sentencepiece`; another, which
    may change text, is refused with UserError.
    """

    kind = "sentencepiece"
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
        except (RuntimeError, IndexError, ValueError):  # what SentencePiece raises for other bytes
            exact = False
        if not exact:
            raise UserError("this is not a SentencePiece model trained by this project")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_escape(text))

    def encode_array(self, text: str):
        """The same as an int32 array (T,)."""
        import numpy as np

        return np.array(self.encode(text), np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Many texts at once, on all cores."""
        return self._processor.encode([_escape(t) for t in texts], num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
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


def _escape(text: str) -> str:
    return clean_text(text).replace(ESCAPE, f"{ESCAPE}e").replace(SPACE, f"{ESCAPE}b")


# Loading ------------------------------------------------------------------------------------------


def load_tokenizer(place: Path) -> CharTokenizer | SentencePieceTokenizer:
    """The tokenizer in a folder, or that file. Raises UserError for none or a damaged one."""
    for name, load in (("tokenizer.json", _load_characters), ("tokenizer.model", _load_model)):
        path = place if place.is_file() else place / name
        if path.is_file() and path.suffix == Path(name).suffix:
            try:
                return load(path)
            # KeyError and TypeError: JSON of another shape; RecursionError: JSON nested too deep
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path} is not a tokenizer ({error}): restore it from a copy, or train again"
                ) from None
    raise UserError(f"{place}: there is neither a tokenizer.json nor a tokenizer.model")


def _load_model(path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(path.read_bytes())


def _load_characters(path: Path) -> CharTokenizer:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    stored = json.loads(path.read_bytes())
    kind, characters = stored["kind"], stored["characters"]
    if kind not in ("char", "char_bos"):
        raise ValueError('"kind" is neither "char" nor "char_bos"')
    if not isinstance(characters, str):
        raise ValueError('"characters" is not a string')
    tokenizer = CharTokenizer(characters, kind)
    if tokenizer.characters != characters:
        raise ValueError('"characters" are not in order, each once')
    return tokenizer


# Training -----------------------------------------------------------------------------------------


def train_sentencepiece(
    texts: Iterable[str],
    model_type: str,
    vocab_size: int,
    report: Callable[[str], None] = print,
) -> SentencePieceTokenizer:
    """A "bpe" or "unigram" vocabulary for `texts`, of which it sees an even sample of 20 MB.

    The same texts give the same model. SentencePiece does not return to Python, where signals are
    answered, before it is done, so it runs in a process of its own, which is killed when this one
    is interrupted. Raises UserError if the text is empty or does not support `vocab_size`.
    """
    started = time.monotonic()
    sample = b"\n".join(_sample(texts, SAMPLE_BYTES))
    if not sample:
        raise UserError("there is no text to learn a vocabulary from: is the text empty?")
    trained = subprocess.run(  # noqa: S603, the command is our own
        [sys.executable, "-m", "data.tokenizer", model_type, str(vocab_size)],
        input=sample,
        capture_output=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    if trained.returncode or not trained.stdout:
        chatter = trained.stderr.decode("utf-8", "replace")
        raise UserError(_explain(chatter, vocab_size, trained.returncode))
    tokenizer = SentencePieceTokenizer(trained.stdout)
    seconds = time.monotonic() - started
    report(f"tokenizer: {tokenizer.vocab_size:,} pieces of {len(sample):,} bytes, {seconds:.1f} s")
    return tokenizer


def _sample(texts: Iterable[str], limit: int) -> list[bytes]:
    """At most `limit` bytes of `texts`, spread evenly, in memory that does not grow with them.

    It takes every piece until the limit is passed; then it drops every second one and goes on with
    every second, and so on.
    """
    kept, size, stride = [], 0, 1
    for number, piece in enumerate(_pieces(texts)):
        if number % stride == 0:
            kept.append(piece)
            size += len(piece) + 1
            if size > limit:
                kept = kept[::2]
                size = sum(len(piece) + 1 for piece in kept)
                stride *= 2
    return kept


def _pieces(texts: Iterable[str]) -> Iterator[bytes]:
    """Non-empty lines, cut where they are too long. So no piece holds a newline: it stays a byte.

    U+2585 is what the trainer marks unknown characters with; it would skip a line that has one.
    """
    for text in texts:
        for line in _escape(text).replace("\u2585", " ").split("\n"):
            for start in range(0, len(line), PIECE_CHARS):
                yield line[start : start + PIECE_CHARS].encode()


def _explain(chatter: str, vocab_size: int, status: int) -> str:
    """SentencePiece's failure as one line that names the key."""
    if found := re.search(r"too high \(\d+\).* <= (\d+)", chatter):
        fix = (
            f"set it to at most {found[1]}, or " if int(found[1]) >= 300 else ""
        )  # DataConfig's least
        fix += 'choose data.tokenizer = "char"'
        return f"data.vocab_size = {vocab_size} is more than the text supports: {fix}"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", chatter):
        fix = f"set it to at least {found[1]}"
        return f"data.vocab_size = {vocab_size} is too small for the text: {fix}"
    last = (chatter.strip().splitlines() or ["no message"])[-1][:200]
    return f"SentencePiece could not train on this text (exit status {status}: {last})"


def _train_from_stdin(model_type: str, vocab_size: str) -> None:
    """The process that trains. It ends with its parent, even when that is killed."""
    import sentencepiece

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sys.stdin.buffer.read().split(b"\n")),
        model_writer=model,
        model_type=model_type,
        vocab_size=int(vocab_size),
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        **dict(zip(("pad_piece", "unk_piece", "bos_piece", "eos_piece"), SPECIALS, strict=True)),
        # exact round trips
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,  # indentation
        num_threads=4,  # fixed: sums over threads decide ties, so their number is in the result
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    sys.stdout.buffer.write(model.getvalue())


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # always true on Windows
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    _train_from_stdin(*sys.argv[1:])
