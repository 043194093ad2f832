"""Our tokenizers as Hugging Face's: the same ids for thousands of texts, and the texts back."""

import random

import pytest

from data.tokenizers.char import CharTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from exchange.tokenizers_json import to_tokenizers
from tests.helpers import ROOT

ODD = [" ", "  ", "\n", "\t", "\r", "\0", "a", "b", "ab", "self", "\u2581", "\ue000", "\u00e9"]
ODD += ["\u4e2d", "\U0001f600", "<", "<0x41>", "<0x0A>", "<start>", "<unk>", "100"]


def texts() -> list[str]:
    """Paragraphs of the project's own pages and code, and what no page says."""
    files = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "data").rglob("*.py")])
    real = [text for file in files for text in file.read_text("utf-8").split("\n\n")]
    dice = random.Random(0)
    for letters in (ODD, ["a", "b", " "]):  # the second: many ways to cut the same
        real += ["".join(dice.choices(letters, k=dice.randrange(30))) for _ in range(1000)]
    return real


TEXTS = texts()


@pytest.mark.parametrize("size", [400, 3000])
def test_bpe(size):
    ours = train_sentencepiece(TEXTS, "bpe", size)
    theirs = to_tokenizers(ours, "stream")
    assert len(TEXTS) > 3000
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text


def test_unigram():
    """Of ways to cut a text that are as probable, each may take another."""
    ours = train_sentencepiece(TEXTS[::4], "unigram", 400)
    theirs = to_tokenizers(ours, "stream")
    same = 0
    for text in TEXTS:
        ids, found = ours.encode(text), theirs.encode(text).ids
        same += ids == found
        assert theirs.decode(ids) == theirs.decode(found) == ours.decode(found) == text
    assert same > 0.9 * len(TEXTS)


@pytest.mark.parametrize("kind", ["char", "char_bos"])
def test_characters(kind):
    ours = CharTokenizer("".join(TEXTS), kind)
    theirs = to_tokenizers(ours, "stream")
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text


def test_characters_that_are_unknown():
    few = CharTokenizer("abc")
    assert to_tokenizers(few, "stream").encode("axb").ids == few.encode("axb")
    with pytest.raises(Exception, match=r"\[UNK\] token"):
        to_tokenizers(CharTokenizer("abc", "char_bos"), "stream").encode("axb")


def test_framing():
    """The token that starts stands where the data has it."""
    ours = CharTokenizer("ab")
    for kind, tokens in {
        "pairs": ["a", "<start>"],
        "lines": ["<start>", "a"],
        "documents": ["<start>", "a"],
        "stream": ["a"],
    }.items():
        assert to_tokenizers(ours, kind).encode("a").tokens == tokens
    assert to_tokenizers(ours, "documents", start_token=False).encode("a").tokens == ["<end>", "a"]
