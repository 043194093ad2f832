"""Sources: what the readers give, what is refused and how."""

import json
import subprocess
import sys

import pytest

from common.errors import UserError
from data import readers
from data.config import DataConfig
from data.readers import open_source


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
    monkeypatch.setattr(readers, "CHUNK", 5)  # cuts inside characters
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
    (tmp_path / "dev.cm").write_text("3\n4\n")
    message = refusal(opened, tmp_path, tmp_path)
    assert "dev.nl has 1 lines" in message and "dev.cm has 2" in message


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
        ("text.txt", b"a", "pairs", "train.nl"),
        ("text.jsonl", b"{}", "stream", 'data.kind = "pairs"'),
        ("text.jsonl", b"{}", "lines", 'data.kind = "pairs"'),
    ],
)
def test_refused_at_once(tmp_path, name, content, kind, expected):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(opened, path, tmp_path, kind=kind)
    assert "data.path" in message and str(path) in message and expected in message


@pytest.mark.parametrize("path", ["missing.txt", "missing/", "nul\0.txt", "x" * 5000, "~nobody/x"])
def test_no_such_file(tmp_path, path):
    assert "data.path" in refusal(opened, path, tmp_path)


def test_folder_without_pairs(tmp_path):
    assert "train.nl" in refusal(opened, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"not JSON", "not JSON"),
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
    monkeypatch.setattr(readers, "CHUNK", 4)
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + before + b"ab" + bad)
    message = refusal(lambda: list(opened(path, tmp_path, kind=kind).train()))
    assert str(path) in message and f"byte {len(mark + before) + 2};" in message


def test_no_heavy_import():
    code = "import sys, data.builtin, data.tokenizer; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
