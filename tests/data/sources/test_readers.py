"""Sources: what the readers give, what is refused and how."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from common.errors import UserError
from data.config import DataConfig
from data.sources import text as text_module
from data.sources.source import open_source

JSONL = b'{"prompt": "p", "completion": "c, d"}\n' * 12
TABLE = b"prompt,completion\n" + b'"one, two",three\n' * 12


def opened(path, cache, **settings):
    return open_source(DataConfig(path=str(path), **settings), lambda line: None, cache)


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files --------------------------------------------------------------------------------------------


def test_stream_gives_every_character(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 5)  # cuts inside characters
    text = "a\r\nb\rc\n\n  é▁\u2028𝄞\0\ufeff" * 20 + " "
    path = tmp_path / "my text.v2.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = opened(path, tmp_path)
    assert (source.name, source.kind, source.val) == ("my_text_v2", "stream", None)
    for _ in range(2):  # a reader starts afresh
        chunks = list(source.train())
        assert "".join(chunks) == text and len(chunks) > 10


def test_lines(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffone\r\n\n \t\n  two \nth\rr\u2028ee\n\r\nfour".encode())
    source = opened(path, tmp_path, kind="lines")
    assert list(source.train()) == ["one", "  two ", "th\rr\u2028ee", "four"]


def test_jsonl(tmp_path):
    path = tmp_path / "pairs.JSONL"
    records = [
        {"prompt": " a\nb \n", "completion": "c\t\r\n", "other": [1]},
        {"completion": "", "prompt": "𝄞"},
    ]
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    source = opened(path, tmp_path)
    assert source.kind == "pairs"
    assert list(source.train()) == [(" a\nb ", "c\t"), ("𝄞", "")]


def test_folder_of_pairs(tmp_path):
    for name, text in {"train.nl": "a\n\nb \n", "train.cm": "1\r\n\r\n 2"}.items():
        (tmp_path / name).write_bytes(text.encode())
    assert opened(tmp_path, tmp_path).val is None
    (tmp_path / "dev.nl").write_text("c\n")
    assert "dev.cm" in refusal(opened, tmp_path, tmp_path)
    (tmp_path / "dev.cm").write_text("3\n")
    source = opened(tmp_path, tmp_path)
    assert list(source.train()) == [("a", "1"), ("b ", " 2")]
    assert list(source.val()) == [("c", "3")]
    for kind in ("stream", "lines"):
        assert "a folder of pairs" in refusal(opened, tmp_path, tmp_path, kind=kind)
    (tmp_path / "dev.cm").write_bytes(gzip.compress(b"3\n"))
    assert "dev.cm: is a gzip file" in refusal(opened, tmp_path, tmp_path)
    (tmp_path / "dev.cm").write_text("3\n4\n")
    message = refusal(opened, tmp_path, tmp_path)
    assert "dev.nl has 1 lines" in message and "dev.cm has 2" in message
    for name in ("dev.nl", "dev.cm"):
        (tmp_path / name).unlink()
    (tmp_path / "train.cm").write_bytes(b"1\n\n\xff")
    assert "train.cm:3: not UTF-8" in refusal(opened, tmp_path, tmp_path, skip_bad=True)
    said = []
    config = DataConfig(path=str(tmp_path), errors="replace")
    assert list(open_source(config, said.append, tmp_path).train())[1] == ("b ", "\ufffd")
    assert said[-1].startswith("note: 1 places are not utf-8")
    assert said[-1].endswith(f"the first at {tmp_path / 'train.cm'}:3")


def test_val_path(tmp_path):
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("one\ntwo\n")
    val.write_text("three\n")
    source = opened(train, tmp_path, kind="lines", val_path=str(val))
    assert list(source.val()) == ["three"]
    assert source.fingerprint != opened(train, tmp_path, kind="lines").fingerprint
    val.unlink()
    assert "data.val_path" in refusal(opened, train, tmp_path, val_path=str(val))
    pairs = tmp_path / "c.jsonl"
    pairs.write_text('{"prompt": "", "completion": ""}')
    assert "data.val_path" in refusal(opened, train, tmp_path, val_path=str(pairs))


def test_fingerprint_follows_content_and_kind_only(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    hashes = [opened(path, tmp_path).fingerprint for path in (first, second)]
    assert hashes[0] == hashes[1]
    assert opened(first, tmp_path, kind="lines").fingerprint != hashes[0]
    second.write_text("Same")
    assert opened(second, tmp_path).fingerprint != hashes[0]


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        ("empty.txt", b"", "auto", "is empty"),
        ("mark.txt", b"\xef\xbb\xbf", "auto", "is empty"),
        ("blank.txt", b"\n \r\n", "lines", "is empty"),
        ("blank.jsonl", b"\n\n", "auto", "is empty"),
        ("space.txt", b" \n\t\r\n", "auto", "is empty or white space"),
        ("table.csv", b"", "auto", "is empty"),
        ("old.txt", b"a\rb\rc\r", "lines", "lines end in \\r alone"),
        ("old.jsonl", JSONL.replace(b"\n", b"\r"), "auto", "lines end in \\r alone"),
        ("a.txt", gzip.compress(b"text", mtime=0), "auto", "is a gzip file, not UTF-8 text"),
        ("a.jsonl", b"PAR1\x15\0", "auto", "is a Parquet file"),
        ("a.txt", b"\xff\xfe\0\0" + "text".encode("utf-32-le"), "stream", "is in UTF-32"),
        ("a.txt", "a long text".encode("utf-16-le"), "lines", "or in UTF-16"),
        ("a.bin", bytes(range(1, 256)), "auto", "is a binary file"),
        ("a.bin", b"\7\0\x2a\0" * 99, "stream", "is a binary file"),  # ids of 16 bits: valid UTF-8
        ("a.csv", b"a,b\n1,2\n", "auto", "looks like a table with the keys a, b; name one with"),
        ("a.jsonl", b'{"a": 1}', "auto", "looks like JSON lines with the keys a; name one with"),
        ("a", TABLE, "auto", "looks like a table"),
        ("a.txt", TABLE.replace(b",", b"\t"), "auto", "looks like a table"),
        ("a.json", b'{"a": [1,\n2]}', "auto", "looks like JSON"),
        ("a.html", b"Some text, long\n" * 20, "auto", "looks like markup"),
        ("a", b"\xef\xbb\xbf\n <!DOCTYPE html><p>Text", "auto", "looks like markup"),
        ("a.txt", b"{\\rtf1\\ansi Text}", "auto", "looks like markup"),
    ],
)
def test_refused_at_once(tmp_path, name, content, kind, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(opened, path, tmp_path, kind=kind)
    assert "data.path" in message and str(path) in message and expected in message


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected"),
    [
        ("a.ndjson", JSONL, "auto", "pairs"),
        ("a.jsonl.txt", JSONL, "auto", "pairs"),
        ("a.json", b"\xef\xbb\xbf\n" + JSONL, "auto", "pairs"),
        ("a.csv", JSONL, "pairs", "pairs"),
        ("a.csv", TABLE, "auto", "pairs"),
        ("a.json", b"[" + JSONL[:-1].replace(b"\n", b",\n") + b"]", "auto", "pairs"),
        ("a.jsonl", JSONL, "lines", "lines"),  # a given kind is taken at its word
        ("a.csv", TABLE, "lines", "lines"),
        ("a.html", b"<html>", "stream", "stream"),
        ("a.txt", b"<|endoftext|>One, two\n[Illustration: it]\n{{x}}", "auto", "stream"),
        ("a.txt", b"Yes, said he,\nand left.\n" * 20, "auto", "stream"),
        ("old.txt", b"a\rb\rc\r", "auto", "stream"),
    ],
)
def test_the_kind_is_known_by_the_content_unless_it_is_given(
    tmp_path, name, content, kind, expected
):
    (tmp_path / name).write_bytes(content)
    said = []
    source = open_source(DataConfig(path=str(tmp_path / name), kind=kind), said.append, tmp_path)
    assert source.kind == expected and next(source.train())
    noted = kind in ("stream", "lines")
    assert ("looks like" in said[0] and f'data.kind = "{kind}"' in said[0]) == noted
    train = tmp_path / "train.txt"
    train.write_bytes(JSONL if expected == "pairs" else b"text")
    beside = opened(train, tmp_path, kind=kind, val_path=str(tmp_path / name))
    assert beside.kind == expected and next(beside.val()) == next(source.train())


def test_a_validation_file_of_another_kind(tmp_path):
    pairs, text, table = (tmp_path / name for name in ("a.ndjson", "b.txt", "c"))
    pairs.write_bytes(JSONL)
    text.write_text("text")
    table.write_bytes(TABLE)
    for train, val, expected in (
        (text, pairs, "looks like pairs"),
        (pairs, text, "looks like stream"),
        (text, table, "looks like a table"),
    ):
        message = refusal(opened, train, tmp_path, val_path=str(val))
        assert message.startswith(f"data.val_path = {val}: ") and expected in message
    words = DataConfig(source="stdlib_words", kind="pairs")
    assert "data.source = stdlib_words: lines" in refusal(open_source, words, print, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("-", "a pipe or a device cannot be read twice"),
        (os.devnull, "a pipe or a device cannot be read twice"),
        ("pipe", "a pipe or a device cannot be read twice"),
        ("nowhere.txt", "no such file in "),
    ],
)
def test_no_file_is_refused_with_the_cause(tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    if path == "pipe":
        os.mkfifo(path)
    (tmp_path / "a.txt").write_text("text")
    assert refusal(opened, path, tmp_path).startswith(f"data.path = {path}: {expected}")
    message = refusal(opened, "a.txt", tmp_path, val_path=path)
    assert message.startswith(f"data.val_path = {path}: {expected}")


@pytest.mark.parametrize("path", ["missing.txt", "missing/", "nul\0.txt", "x" * 5000, "~nobody/x"])
def test_no_such_file(tmp_path, path):
    assert "data.path" in refusal(opened, path, tmp_path)


def test_folder_without_pairs(tmp_path):
    assert "train.nl" in refusal(opened, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not JSON", "not JSON; each line must be"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"prompt": "a"}', '"completion" is missing'),
        (b'{"prompt": "a", "completion": null}', '"completion" is not a string'),
        (b'{"prompt": "\\ud800", "completion": "a"}', "surrogate"),
    ],
)
def test_jsonl_line_refused(tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    message = refusal(list, opened(path, tmp_path).train())
    assert message.startswith(f"{path}:3: ") and expected in message


@pytest.mark.parametrize("kind", ["stream", "lines"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xc3"])
@pytest.mark.parametrize("before", [b"", b"ok\n", "é\n".encode() * 3, b"x" * 4095 + b"\n"])
def test_not_utf8_names_the_byte(tmp_path, monkeypatch, kind, mark, bad, before):
    monkeypatch.setattr(text_module, "CHUNK", 4)
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + before + b"ab" + bad)
    message = refusal(lambda: list(opened(path, tmp_path, kind=kind).train()))
    assert str(path) in message and f"byte {len(mark + before) + 2};" in message


def test_no_heavy_import():
    code = "import sys, data.sources.__main__, data.tokenizers.load\n"
    code += "print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
