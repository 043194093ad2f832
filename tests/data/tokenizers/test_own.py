"""Tokenizers: exact round trips for any text, files that load again, and files that must not."""

import io
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.tokenizers import train_sentencepiece as module
from data.tokenizers.base import SPECIALS, clean_text
from data.tokenizers.char import CharTokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.sentencepiece import SentencePieceTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from tests.helpers import ROOT

TEXT = [
    "def add(self, other):\n    return self.value + other.value\n",
    "List all files in the current folder that are larger than 10 MB\tand were <changed> today.",
    "Übergröße, naïve café — 東京 \ue000 \u2581 \ufeff <start> <0x0A> <unk>",
] * 8
AWKWARD = ["", " ", "  two  spaces  ", "a\u2581 b \u2581\u2581", "\ue000b\ue000e\u2581\ue000\ue000"]
AWKWARD += ["\0", "\n\r\n\r\t\x0b\x85\u2028", "\ufeff", "\ufffd\u2585\u2047", "<start><end><unk>"]
AWKWARD += ["<0x0A><0xFF>", "𝄞👩‍👩‍👧e\u0301\u00e9", "\U0010ffff\ue001"]
anything = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab \n\u2581\ue000be<0x>_")


def examples(test):
    for text in AWKWARD:
        test = example(text)(test)
    return test


def trained(kind):
    return train_sentencepiece(iter(TEXT), kind, 315, lambda line: None)


@pytest.fixture(scope="module")
def pieces():
    return {kind: trained(kind) for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def spaceless():
    """Models that have no piece for the space, nor for most characters."""
    text = ["".join(TEXT[:2]).replace(" ", "")]
    return {kind: train_sentencepiece(text, kind, 300) for kind in ("bpe", "unigram")}


@pytest.fixture(scope="module")
def folders(pieces, tmp_path_factory):
    """A folder for each kind of tokenizer, as a checkpoint holds it."""
    made = {"char": CharTokenizer("hello"), "char_bos": CharTokenizer("hello", "char_bos")}
    folders = {}
    for kind, tokenizer in (made | pieces).items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        tokenizer.save(folders[kind])
    return folders


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(deadline=None, max_examples=300)
@given(text=anything)
@examples
def test_pieces_round_trip(pieces, spaceless, kind, text):
    for tokenizer in (pieces[kind], spaceless[kind]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(len(SPECIALS) <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.encode_batch([text, "x", text])[::2] == [ids, ids]


@pytest.mark.parametrize("kind", ["char", "char_bos"])
@settings(deadline=None)
@given(text=anything)
@examples
def test_characters_round_trip(kind, text):
    tokenizer = CharTokenizer(text + "!", kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert not set(ids) & {tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id}


@settings(deadline=None)
@given(text=st.text())
def test_unknown_characters(text):
    tokenizer = CharTokenizer("abc")
    ids = tokenizer.encode(text)
    assert ids == [4 + "abc".index(c) if c in ("a", "b", "c") else 1 for c in text]
    assert tokenizer.encode_array(text).tolist() == ids


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_lone_surrogates_become_replacement_characters(pieces, kind):
    text = "a\ud800b\udcff\udc00"
    assert clean_text(text) == "a\ufffdb\ufffd\ufffd"
    for tokenizer in (pieces[kind], CharTokenizer("ab\ufffd")):
        assert tokenizer.decode(tokenizer.encode(text)) == clean_text(text)
        assert tokenizer.decode(tokenizer.encode_array(text).tolist()) == clean_text(text)
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == clean_text(text)


# Ids ----------------------------------------------------------------------------------------------


def test_ids_of_char():
    tokenizer = CharTokenizer({"c", "a", "b"})
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer.vocab_size == 7 and tokenizer.encode("abcd") == [4, 5, 6, 1]
    assert [tokenizer.token(i) for i in range(7)] == [*SPECIALS, "a", "b", "c"]
    assert tokenizer.decode([2, 4, 0, 1, 6, 3]) == "ac"


def test_ids_of_char_bos():
    tokenizer = CharTokenizer(chr(c) for c in range(ord("a"), ord("z") + 1))
    assert tokenizer.vocab_size == 30
    tokenizer = CharTokenizer(tokenizer.characters, "char_bos")
    assert tokenizer.vocab_size == 27 and tokenizer.unk_id is None
    assert tokenizer.start_id == tokenizer.end_id == tokenizer.pad_id == 26
    assert tokenizer.encode("az") == [0, 25] and tokenizer.decode([26, 0, 26]) == "a"
    for encode in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(UserError, match=r"'!É�'") as caught:
            encode("a!É\ud800")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_pieces(pieces, kind):
    tokenizer = pieces[kind]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id) == (
        0,
        1,
        2,
        3,
    )
    assert [tokenizer.token(i) for i in range(5)] == [*SPECIALS, "<0x00>"]
    assert tokenizer.vocab_size == 315
    assert tokenizer.token(tokenizer.encode("\n")[0]) == "<0x0A>"
    ids = tokenizer.encode("self")
    assert len(ids) < 4  # it has learned something
    assert tokenizer.decode([2, 0, *ids, 1, 3]) == "self"
    assert tokenizer.decode([4 + 0xFF, *ids]) == "\ufffdself"


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "char_bos", "bpe", "unigram"])
def test_saved_tokenizer_loads(folders, kind):
    first, second = load_tokenizer(folders[kind]), load_tokenizer(folders[kind])
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == second.vocab_size
    assert first.encode("hello") == second.encode("hello")
    assert first.kind == (kind if "char" in kind else "sentencepiece")
    everyone = [load_tokenizer(folder).fingerprint for folder in folders.values()]
    assert everyone.count(first.fingerprint) == 1


def test_characters_load_with_the_standard_library_alone(folders):
    code = (
        "import sys; from pathlib import Path; from data.tokenizers.load import load_tokenizer;"
        "print(load_tokenizer(Path(sys.argv[1])).encode('hello'))"
    )
    command = [sys.executable, "-S", "-c", code, folders["char"]]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[5, 4, 6, 6, 7]"


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"kind": [], "characters": "ab"}',
        b'{"kind": "words", "characters": "ab"}',
        b'{"kind": "char", "characters": ["a", "b"]}',
        b'{"kind": "char", "characters": ""}',
        b'{"kind": "char", "characters": "ba"}',
        b'{"kind": "char", "characters": "aab"}',
        b'{"kind": "char", "characters": "a\\ud800"}',
    ],
)
def test_malformed_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert str(tmp_path / "tokenizer.json") in refused(tmp_path)


def test_missing_or_huge_json_is_refused(tmp_path):
    assert "neither" in refused(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)  # sparse
    assert "larger than" in refused(tmp_path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional={"kind": values, "characters": values}) | values)
def test_random_json_loads_or_is_refused(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("json")
    (folder / "tokenizer.json").write_text(json.dumps(value))
    refused(folder)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_damaged_model_is_refused_or_works(folders, tmp_path, kind):
    model = (folders[kind] / "tokenizer.model").read_bytes()
    no_text = model.replace(b"\n\x01u", b"\n\x01\xff")  # the piece "u"
    hopeless = [b"", b"text", model[: len(model) // 2], model[100:], no_text]
    damaged = [
        model[:place] + bytes([model[place] ^ 0x84]) + model[place + 1 :]
        for place in range(0, len(model), len(model) // 100)
    ]
    for content in hopeless + damaged:
        (tmp_path / "tokenizer.model").write_bytes(content)
        try:
            tokenizer = load_tokenizer(tmp_path)
        except UserError as error:
            assert str(tmp_path / "tokenizer.model") in str(error)
        else:
            assert content not in hopeless
            tokenizer.decode(tokenizer.encode("hello \n▁"))


def test_model_that_changes_text_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=68, minloglevel=2
    )
    with pytest.raises(UserError):
        SentencePieceTokenizer(model.getvalue())


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(pieces, kind):
    assert trained(kind).fingerprint == pieces[kind].fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabulary_that_does_not_fit(kind):
    with pytest.raises(UserError, match=r"data.vocab_size = 5000 .* at most \d+") as caught:
        train_sentencepiece(TEXT, kind, 5000)
    largest = int(str(caught.value).split("at most ")[1].split(",")[0])
    fits = train_sentencepiece(TEXT, kind, largest, lambda line: None)
    assert fits.vocab_size == largest
    with pytest.raises(UserError, match=r"data.vocab_size = 290 .* at least \d+"):
        train_sentencepiece(TEXT, kind, 290)
    with pytest.raises(UserError, match=r'data.tokenizer = "char"'):
        train_sentencepiece(["a"], kind, 300)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "\n"]])
def test_nothing_to_train_on(texts):
    with pytest.raises(UserError, match="empty"):
        train_sentencepiece(texts, "bpe", 300)
    if not any(texts):
        with pytest.raises(UserError, match="empty"):
            CharTokenizer(texts)


def test_pieces_to_train_on():
    texts = ["one\n\ntwo \u2581", "x" * 1500 + "\u2585", "é" * 1000]
    first, *others = module._pieces(texts)
    assert first == ["one", "two \ue000b"]
    assert others == [["x" * 1000, "x" * 500 + " "], ["é" * 1000]]


def test_sample_is_even_and_bounded():
    texts = [f"{i:04d}" for i in range(10_000)]
    assert module._sample(texts, 1_000_000) == [text.encode() for text in texts]
    numbers = [int(piece) for piece in module._sample(texts, 5_000)]
    assert 500 <= len(numbers) <= 1000
    assert {b - a for a, b in pairwise(numbers)} == {16}
    assert numbers[0] == 0 and numbers[-1] >= 9984


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_training(tmp_path, number):
    """The trainer, a child, does not outlive its parent, which goes at once."""
    code = (
        "import random, signal, subprocess, sys\n"
        "from data.tokenizers.train_sentencepiece import train_sentencepiece\n"
        # a shell's background job, as these tests may be, has Ctrl-C ignored, and its children too
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = subprocess.Popen\n"
        "def popen(*a, **k):\n"
        "    child = real(*a, **k)\n"
        "    open(sys.argv[1], 'w').write(f'{child.pid}\\n')\n"
        "    return child\n"
        "subprocess.Popen = popen\n"
        "r = random.Random(0)\n"
        "words = (''.join(r.choices('abcdefghijklmnopqrstuvwxyz', k=9)) for _ in range(600_000))\n"
        "train_sentencepiece(words, 'unigram', 20_000)\n"
    )
    note = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", code, note], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    time.sleep(1.0)  # it is inside the trainer now
    child = int(note.read_text())
    assert parent.poll() is None, "training must still be running for this test to mean anything"
    started = time.monotonic()
    parent.send_signal(number)
    parent.communicate()
    assert parent.returncode
    while _runs(child):
        assert time.monotonic() - started < 2.0
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    ps = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return ps.stdout.strip()[:1] not in ("", "Z")  # a zombie is gone, too
