"""Encoding: the same ids whoever encodes, by threads or processes, and few blocks ahead."""

import gc
import os
import signal
import threading

import numpy as np
import pytest

from common.errors import UserError
from data.prepared import encoding
from data.prepared.encoding import Block, Encoder, EndedError, blocks, encode, ordered_map
from data.tokenizers.char import CharTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from tests.helpers import TEXT

LINES = TEXT.read_text(encoding="utf-8").split("\n")
STRANGE = "\n\n".join(LINES) + "\u2581\r\n é\n" + "x" * 300


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of each kind one, with the folder where it is saved."""
    found = {}
    for kind in ("bpe", "unigram", "char_bos"):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "char_bos":
            tokenizer = CharTokenizer(STRANGE, kind)
        else:
            tokenizer = train_sentencepiece(LINES, kind, 320, lambda _: None)
        tokenizer.save(folder)
        found[kind] = tokenizer, folder
    return found


def gather(encoder: Encoder, items) -> dict:
    """All that comes, end to end: {split: (ids, lengths, prompts, bytes)}."""
    found = {}
    for item, each in encoder(items):
        ids, lengths, prompts, size = found.setdefault(item.split, ([], [], [], 0))
        ids += each.ids.tolist()
        lengths += [] if each.lengths is None else each.lengths.tolist()
        prompts += [] if each.prompts is None else each.prompts.tolist()
        found[item.split] = ids, lengths, prompts, size + each.bytes
    assert gc.isenabled()
    return found


# jobs, and from which character on processes do it
HOW = {"one": (1, 1 << 60), "threads": (3, 1 << 60), "processes": (2, 0), "both": (2, 2000)}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("how", HOW)
def test_a_stream_is_what_its_chunks_encode_to(tokenizers, kind, how, monkeypatch):
    tokenizer, folder = tokenizers[kind]
    jobs, patience = HOW[how]
    monkeypatch.setattr(encoding, "PATIENCE", patience)
    chunks = [STRANGE[i : i + 700] for i in range(0, len(STRANGE), 700)]
    encoder = Encoder("stream", tokenizer, "<u2", folder, jobs)
    found = gather(encoder, blocks((("train", chunk) for chunk in chunks), "stream"))
    expected = [i for chunk in chunks for i in tokenizer.encode(chunk)]
    assert found == {"train": (expected, [], [], len(STRANGE.encode()))}
    assert bool(encoder.workers) == (how in ("processes", "both"))
    assert all(worker.process.poll() is not None for worker in encoder.workers)


@pytest.mark.parametrize("how", HOW)
def test_pairs_of_two_splits_in_one_pass(tokenizers, how, monkeypatch):
    tokenizer, folder = tokenizers["bpe"]
    jobs, patience = HOW[how]
    monkeypatch.setattr(encoding, "PATIENCE", patience)
    monkeypatch.setattr(encoding, "DOCUMENTS", 7)
    given = [("val" if i % 5 == 0 else "train", (f"{i} {x}", x)) for i, x in enumerate(LINES * 3)]
    encoder = Encoder("pairs", tokenizer, "<u2", folder, jobs)
    found = gather(encoder, blocks(given, "pairs"))
    for name in ("train", "val"):
        pairs = [pair for side, pair in given if side == name]
        rows = [[*tokenizer.encode(p), 2, *tokenizer.encode(c), 3] for p, c in pairs]
        prompts = [len(tokenizer.encode(p)) + 1 for p, _ in pairs]
        size = sum(len(c.encode()) for _, c in pairs)
        ids = [i for row in rows for i in row]
        assert found[name] == (ids, [*map(len, rows)], prompts, size)


def test_a_refusal_comes_out_of_a_process_as_it_is(tokenizers, monkeypatch):
    tokenizer, folder = tokenizers["char_bos"]
    monkeypatch.setattr(encoding, "PATIENCE", 0)
    encoder = Encoder("documents", tokenizer, "<u2", folder, 2)
    with pytest.raises(UserError, match="the model has not seen these characters"):
        gather(encoder, blocks([("train", "x"), ("train", "\u4e2d")], "documents"))
    assert all(worker.process.poll() is not None for worker in encoder.workers)


def test_a_process_that_is_killed_is_told(tokenizers, monkeypatch):
    tokenizer, folder = tokenizers["bpe"]
    monkeypatch.setattr(encoding, "PATIENCE", 0)
    encoder = Encoder("lines", tokenizer, "<u2", folder, 2)

    def items():
        for number in range(1000):
            if number == 10:
                os.kill(encoder.workers[0].process.pid, signal.SIGKILL)
            yield Block("train", ["", "text"], 1, 0)

    with pytest.raises(EndedError, match=r"has been ended \(signal 9\).*run the same command"):
        gather(encoder, items())
    assert all(worker.process.poll() is not None for worker in encoder.workers)


def test_documents_are_between_the_special_tokens(tokenizers):
    for kind, start in (("bpe", [2]), ("char_bos", [])):
        tokenizer, _ = tokenizers[kind]
        texts = ["one", "é\n", "three " * 9]
        found = encode("documents", tokenizer, texts, "<u4")
        rows = [[*start, *tokenizer.encode(text), tokenizer.end_id] for text in texts]
        assert found.ids.tolist() == [i for row in rows for i in row]
        assert found.lengths.tolist() == [*map(len, rows)] and found.ids.dtype == np.dtype("<u4")


def test_documents_without_start_in_a_process(tokenizers, monkeypatch):
    tokenizer, folder = tokenizers["bpe"]
    monkeypatch.setattr(encoding, "PATIENCE", 0)
    encoder = Encoder("documents", tokenizer, "<u2", folder, 2, start_token=False)
    found = gather(encoder, blocks([("train", "one"), ("train", "two")], "documents"))
    rows = [[*tokenizer.encode(text), tokenizer.end_id] for text in ("one", "two")]
    assert encoder.workers and found["train"][0] == [*rows[0], *rows[1]]


def test_blocks_are_bounded_by_documents_and_by_characters(monkeypatch):
    monkeypatch.setattr(encoding, "DOCUMENTS", 4)
    monkeypatch.setattr(encoding, "CHARACTERS", 100)
    short = [("train", "x")] * 9
    assert [block.documents for block in blocks(short, "lines")] == [4, 4, 1]
    assert [block.texts for block in blocks(short, "documents")] == [["x"] * 4] * 2 + [["x"]]
    long = [("train", ("p" * 30, "c" * 30))] * 5
    assert [block.documents for block in blocks(long, "pairs")] == [2, 2, 1]


def test_a_dictionary_comes_after_all_that_was_before_it():
    record = {"place": 1}
    given = [("train", "a"), ("val", "b"), ("train", "c"), record, ("val", "d")]
    found = list(blocks(given, "documents", lambda: 5))
    assert found[2] is record and all(block.read == 5 for block in found if block is not record)
    assert [block.texts for block in found if block is not record] == [["a", "c"], ["b"], ["d"]]


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
