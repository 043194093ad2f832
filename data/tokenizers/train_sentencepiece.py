"""A SentencePiece vocabulary learned from text of any size.

`train_sentencepiece` trains in a process of its own, `python -m data.tokenizers.train_sentencepiece
bpe 2048`: text on stdin, the model on stdout.
"""

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.tokenizers.base import SPECIALS
from data.tokenizers.sentencepiece import SentencePieceTokenizer, escape

SAMPLE_BYTES = 20_000_000  # of text that SentencePiece is trained on
PIECE_CHARS = 1000  # at most 4,000 bytes: SentencePiece skips lines over 4,192


def train_sentencepiece(
    texts: Iterable[str],
    model_type: str,
    vocab_size: int,
    log: Callable[[str], object] = print,
    symbols: str = "",
) -> SentencePieceTokenizer:
    """A "bpe" or "unigram" vocabulary for `texts`, of which it sees an even sample of 20 MB.

    symbols: characters that are a piece each, alone, whether or not they occur.
    The same texts give the same model. SentencePiece does not return to Python, where signals are
    answered, before it is done, so it runs in a process of its own, which is killed when this one
    is interrupted. Raises UserError if the text is empty or does not support `vocab_size`.
    """
    started = time.monotonic()
    sample = b"\n".join(_sample(texts, SAMPLE_BYTES))
    if not sample:
        raise UserError("data.path: the text is empty; give a file with text in it")
    trained = subprocess.run(  # noqa: S603, the command is our own
        [sys.executable, "-m", __name__, model_type, str(vocab_size), symbols],
        input=sample,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    if trained.returncode or not trained.stdout:
        chatter = trained.stderr.decode("utf-8", "replace")
        raise UserError(_explain(chatter, vocab_size, trained.returncode))
    tokenizer = SentencePieceTokenizer(trained.stdout)
    seconds = time.monotonic() - started
    log(f"tokenizer: {tokenizer.vocab_size:,} tokens from {len(sample):,} bytes, {seconds:.1f} s")
    return tokenizer


def _sample(texts: Iterable[str], limit: int) -> list[bytes]:
    """At most `limit` bytes of `texts`, spread evenly, in memory that does not grow with them.

    It takes every piece until the limit is passed; then it drops every second one and goes on with
    every second, and so on.
    """
    kept, size, stride, number = [], 0, 1, 0
    for pieces in _pieces(texts):
        i = -number % stride
        while i < len(pieces):
            kept.append(pieces[i].encode())
            size += len(kept[-1]) + 1
            if size > limit:
                kept = kept[::2]
                size = sum(len(piece) + 1 for piece in kept)
                stride *= 2
            i += stride - (number + i) % stride
        number += len(pieces)
    return kept


def _pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    """Each text's lines, cut where they are too long. So no piece holds a newline: it stays a byte.

    U+2585 is what the trainer marks unknown characters with; it would skip a line that has one.
    """
    for text in texts:
        lines = escape(text).replace("\u2585", " ").split("\n")
        if len(max(lines, key=len)) > PIECE_CHARS:
            starts = ((line, i) for line in lines for i in range(0, len(line), PIECE_CHARS))
            lines = [line[i : i + PIECE_CHARS] for line, i in starts]
        yield [line for line in lines if line]


def _explain(chatter: str, vocab_size: int, status: int) -> str:
    """SentencePiece's failure as one line that names the key."""
    if found := re.search(r"too high \(\d+\).* <= (\d+)", chatter):
        fix = (
            f"set it to at most {found[1]}, or " if int(found[1]) >= 300 else ""
        )  # DataConfig's least
        fix += 'choose data.tokenizer = "char"'
        return f"data.vocab_size = {vocab_size} is more than the text supports; {fix}"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", chatter):
        fix = f"set it to at least {found[1]}"
        return f"data.vocab_size = {vocab_size} is too small for the text; {fix}"
    last = (chatter.strip().splitlines() or ["no message"])[-1][:200]
    return (
        f"data.tokenizer: SentencePiece failed on this text (exit status {status}: {last}); "
        'choose data.tokenizer = "char"'
    )


def _train_from_stdin(model_type: str, vocab_size: str, symbols: str) -> None:
    """The process that trains. It ends with its parent, even when that is killed."""
    import sentencepiece

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    model = io.BytesIO()
    more: dict[str, Any] = {"user_defined_symbols": list(symbols)} if symbols else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line.removesuffix(b"\n") for line in sys.stdin.buffer),
        model_writer=model,
        model_type=model_type,
        vocab_size=int(vocab_size),
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=SPECIALS[0],
        unk_piece=SPECIALS[1],
        bos_piece=SPECIALS[2],
        eos_piece=SPECIALS[3],
        **more,
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
