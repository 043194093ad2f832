"""data/token_files.py: the same files whoever encodes, by threads or not, and few blocks ahead."""

import gc
import threading

import numpy as np
import pytest

from data import token_files
from data.token_files import blocks, ordered_map, write_documents, write_stream
from data.train_tokenizer import train_sentencepiece
from tests.helpers import TEXT

LINES = TEXT.read_text(encoding="utf-8").split("\n")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        kind: train_sentencepiece(LINES, kind, 320, lambda _: None) for kind in ("bpe", "unigram")
    }


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_stream_is_what_its_chunks_encode_to(tokenizers, kind, threads, tmp_path, monkeypatch):
    tokenizer = tokenizers[kind]
    monkeypatch.setattr(tokenizer, "threads", threads, raising=False)
    text = "\n\n".join(LINES) + "\u2581\r\n é\n" + "x" * 300
    chunks = [text[i : i + 700] for i in range(0, len(text), 700)]
    counts = write_stream(iter(chunks), tokenizer, tmp_path / "train", "<u2")
    expected = [i for chunk in chunks for i in tokenizer.encode(chunk)]
    assert np.fromfile(tmp_path / "train.ids", "<u2").tolist() == expected
    assert counts == {"tokens": len(expected), "bytes": len(text.encode())}
    assert gc.isenabled()


@pytest.mark.parametrize("threads", [1, 3])
def test_documents_of_two_splits_in_one_pass(tokenizers, threads, tmp_path, monkeypatch):
    tokenizer = tokenizers["bpe"]
    monkeypatch.setattr(tokenizer, "threads", threads, raising=False)
    monkeypatch.setattr(token_files, "DOCUMENTS", 7)
    given = [("val" if i % 5 == 0 else "train", (f"{i} {x}", x)) for i, x in enumerate(LINES * 3)]
    paths = {name: tmp_path / name for name in ("train", "val")}
    counts = write_documents(iter(given), tokenizer, paths, "<u2")
    for name, path in paths.items():
        pairs = [pair for side, pair in given if side == name]
        rows = [[*tokenizer.encode(p), 2, *tokenizer.encode(c), 3] for p, c in pairs]
        prompts = [len(tokenizer.encode(p)) + 1 for p, _ in pairs]
        assert np.fromfile(f"{path}.ids", "<u2").tolist() == [i for row in rows for i in row]
        assert np.fromfile(f"{path}.prompts", "<i4").tolist() == prompts
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        assert np.fromfile(f"{path}.starts", "<i8").tolist() == ends
        size = sum(len(c.encode()) for _, c in pairs)
        assert counts[name] == {"tokens": ends[-1], "documents": len(pairs), "bytes": size}


def test_blocks_are_bounded_by_documents_and_by_characters(monkeypatch):
    monkeypatch.setattr(token_files, "DOCUMENTS", 4)
    monkeypatch.setattr(token_files, "CHARACTERS", 100)
    short = [("train", "x")] * 9
    assert [len(block) for _, block in blocks(short)] == [4, 4, 1]
    long = [("train", ("p" * 30, "c" * 30))] * 5
    assert [len(block) for _, block in blocks(long)] == [2, 2, 1]


def test_few_are_ahead_and_their_order_stays():
    taken, gate = [], threading.Event()

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def work(i):
        if i % 2 == 0:  # the others overtake it
            gate.wait(0.01)
        return i

    for done, i in enumerate(ordered_map(work, items(), 3)):
        assert i == done
        assert len(taken) - done <= 3 + 2


def test_an_error_of_a_thread_is_raised_and_the_rest_not_begun():
    begun = []

    def work(i):
        begun.append(i)
        if i == 5:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        list(ordered_map(work, iter(range(1000)), 2))
    assert len(begun) < 20
