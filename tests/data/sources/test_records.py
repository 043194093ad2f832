"""Records: JSON, tables, Parquet and Arrow; encodings; what is refused or skipped."""

import gzip
import json
import sys

import pytest

from data.config import DataConfig
from data.sources import records, text
from data.sources.source import open_source
from tests.data.sources.test_readers import opened, refusal

STORIES = ["One day.\n\nThe end.", "Zwei, é.", 'A "quoted",\ttext']


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# JSON ---------------------------------------------------------------------------------------------


def test_texts_of_json_lines(tmp_path):
    rows = [{"id": i, "text": story} for i, story in enumerate(STORIES)]
    source = opened(write(tmp_path / "a.jsonl", lines([*rows, {"text": " \n"}])), tmp_path)
    assert (source.kind, list(source.train())) == ("documents", STORIES)
    nested = [{"meta": {"body": story}, "text": "no"} for story in STORIES]
    for rows, key in ((nested, "meta.body"), ([{"a.b": s} for s in STORIES], "a.b")):
        path = write(tmp_path / "b.jsonl", lines(rows))
        source = opened(path, tmp_path, text_key=key)
        assert (source.kind, list(source.train())) == ("documents", STORIES)


def test_messages_of_one_turn_are_pairs(tmp_path):
    turn = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.\n"}]
    source = opened(write(tmp_path / "a.jsonl", lines([{"messages": turn}] * 2)), tmp_path)
    assert (source.kind, list(source.train())) == ("pairs", [("Why?", "Because.")] * 2)
    rows = [{"messages": turn}, {"messages": turn * 2}, {"messages": turn[:1]}]
    path = write(tmp_path / "b.jsonl", lines(rows))
    message = refusal(list, opened(path, tmp_path).train())
    assert message.startswith(f'{path}:2: "messages" are not one of "user"')
    said = []
    source = open_source(DataConfig(path=str(path), skip_bad=True), said.append, tmp_path)
    assert len(list(source.train())) == 1
    assert "note: skipped 2: " in said[-1] and f"{path}:3 (" in said[-1]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_an_array_of_records(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    rows = [{"instruction": "Add", "input": i % 2 * "1, 2", "output": f"é{i}"} for i in range(9)]
    path = write(tmp_path / "alpaca.json", "\ufeff " + json.dumps(rows, indent=indent) + "\n")
    keys = {"prompt_key": "instruction,input", "completion_key": "output"}
    source = opened(path, tmp_path, **keys)
    assert source.kind == "pairs"
    asked = ["Add", "Add\n\n1, 2"]
    assert list(source.train()) == [(asked[i % 2], f"é{i}") for i in range(9)]
    for harm in (path.read_bytes()[:-9], path.read_bytes().replace(b'"input"', b"input", 5)):
        damaged = write(tmp_path / "b.json", harm)
        message = refusal(lambda p=damaged: list(opened(p, tmp_path, **keys).train()))
        assert message.startswith(f"{damaged}: not an array of JSON records (after record ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("not JSON", "this line is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"txt": "a"}', '"text" is missing'),
        ('{"text": null}', '"text" is not a string'),
        ('{"text": "\\udfff"}', '"text" holds half a surrogate pair'),
    ],
)
def test_a_bad_line_is_refused_or_skipped(tmp_path, line, expected):
    good = '{"text": "good"}\n'
    path = write(tmp_path / "a.jsonl", good + (line + "\n") * 7 + good)
    message = refusal(list, opened(path, tmp_path).train())
    assert message.startswith(f"{path}:2: {expected}")
    assert "set data.skip_bad = true to leave it out" in message
    said = []
    source = open_source(DataConfig(path=str(path), skip_bad=True), said.append, tmp_path)
    assert [list(source.train()) for _ in range(2)] == [["good", "good"]] * 2
    (note,) = (said_line for said_line in said if "skipped" in said_line)
    assert note.startswith(f"note: skipped 7: the first: {path}:2 ({expected}")
    assert f"{path}:6 " in note and f"{path}:7 " not in note


def test_it_is_said_where_all_records_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"txt": "a"}\n' * 300)
    message = refusal(opened, path, tmp_path, kind="documents", skip_bad=True)
    shown = f'300; the first: {path}:1 ("text" is missing)'
    assert message.startswith(f"data.path = {path}: all records were skipped ({shown})")


@pytest.mark.parametrize(
    ("name", "content", "kind", "place"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n', "auto", ":2"),
        ("a.json", b'[{"text": "one"}, {"text": "\xff"}, {"text": "two"}]', "auto", ": record 2"),
        ("a.csv", b"text,n\none,1\nx,\xff\ntwo,2\n", "auto", ":3"),
        ("a.txt", b"one\n\xff\ntwo\n", "lines", ":2"),
        ("a.txt", b"one|\xff|two", "documents", ": text 2"),
        ("folder", b"\xff", "auto", "/b.txt"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_what_cannot_be_decoded_is_skipped_too(
    tmp_path, monkeypatch, name, content, kind, place, chunk
):
    monkeypatch.setattr(text, "CHUNK", chunk)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        for file, each in ("a.txt", b"one"), ("b.txt", content), ("c.txt", b"two"):
            write(path / file, each)
    else:
        write(path, content)
    settings = {"kind": kind, "separator": "|" if b"|" in content else ""}
    message = refusal(lambda: list(opened(path, tmp_path, **settings).train()))
    assert "not UTF-8 at byte" in message
    said = []
    config = DataConfig(path=str(path), skip_bad=True, **settings)
    source = open_source(config, said.append, tmp_path)
    assert [list(source.train()) for _ in range(2)] == [["one", "two"]] * 2
    what = "has bytes that are no characters of its encoding"
    assert said[-1] == f"note: skipped 1: {path}{place} ({what})"


# Separated text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n----\n"])
def test_texts_between_a_separator(tmp_path, monkeypatch, chunk, separator):
    monkeypatch.setattr(text, "CHUNK", chunk)
    stories = [*STORIES, "a < | b"]
    whole = separator.join(f"{story}\n" for story in stories) + separator
    path = write(tmp_path / "TinyStories-train.txt", whole)
    source = opened(path, tmp_path, separator=separator)
    assert (source.kind, list(source.train())) == ("documents", stories)
    assert opened(path, tmp_path).kind == "stream"
    source = opened(path, tmp_path, separator="<|end|>")
    message = refusal(list, source.train())
    assert message.startswith("data.separator = '<|end|>': does not occur in data.path = ")


def test_a_separator_for_records_is_refused_at_once(tmp_path):
    texts = write(tmp_path / "a.txt", "one|two")
    path = write(tmp_path / "b.jsonl", '{"text": "c"}')
    for kind in ("auto", "documents"):
        message = refusal(opened, path, tmp_path, kind=kind, separator="|")
        assert message == (
            "data.separator = '|': stands between the documents of a text, and data.path = "
            f"{path} has records; leave it out"
        )
    both = DataConfig(path=(str(texts), str(path)), separator="|")
    assert list(open_source(both, print, tmp_path).train()) == ["one", "two", "c"]


@pytest.mark.parametrize("kind", ["stream", "lines", "pairs"])
def test_a_separator_that_is_ignored_is_said_to_be(tmp_path, kind):
    """Earlier runs have it in their settings, and can be resumed; command_line.py refuses it."""
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}\n' * 3)
    config, said = DataConfig(path=str(path), kind=kind, separator="|"), []
    open_source(config, said.append, tmp_path)
    assert f"note: data.separator = '|' is ignored: a is read as {kind}" in said


# Tables -------------------------------------------------------------------------------------------


def test_a_table_with_a_named_column(tmp_path):
    rows = "id,body,n\r\n" + "".join(
        f'{i},"{story.replace(chr(34), 2 * chr(34))}",x\r\n' for i, story in enumerate(STORIES)
    )
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbf" + rows.encode())
    assert "with the keys id, body, n; name one" in refusal(opened, path, tmp_path)
    source = opened(path, tmp_path, text_key="body")
    assert (source.kind, list(source.train())) == ("documents", STORIES)
    path = write(tmp_path / "a.tsv", "prompt\tcompletion\n" + "a b\tc, d\n" * 2)
    source = opened(path, tmp_path)
    assert (source.kind, list(source.train())) == ("pairs", [("a b", "c, d")] * 2)
    assert list(opened(path, tmp_path, kind="lines").train())[1] == "a b\tc, d"


@pytest.mark.parametrize(
    ("row", "expected"),
    [("a,b,c", "3 columns, and the first line has 2"), ('"a"b,c', "not a row of a table")],
)
def test_a_bad_row_is_refused_or_skipped(tmp_path, row, expected):
    path = write(tmp_path / "a.csv", f"text,n\none,1\n{row}\ntwo,2\n")
    message = refusal(list, opened(path, tmp_path).train())
    assert message.startswith(f"{path}:3: {expected}")
    assert list(opened(path, tmp_path, skip_bad=True).train()) == ["one", "two"]
    endless = write(tmp_path / "b.csv", 'text\none\n"two\nthree\n')
    assert "not a row of a table" in refusal(list, opened(endless, tmp_path).train())


# Parquet and Arrow --------------------------------------------------------------------------------


def columnar(path, table, rows=2):
    pa = pytest.importorskip("pyarrow")
    if path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, path, row_group_size=rows)
        return path
    new = pa.ipc.new_file if "file" in path.name else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_parquet_and_arrow(tmp_path, name):
    pa = pytest.importorskip("pyarrow")
    ids = list(range(3))
    path = columnar(tmp_path / name, pa.table({"id": ids, "text": STORIES}))
    source = opened(path, tmp_path)
    assert (source.kind, list(source.train())) == ("documents", STORIES)
    nested = columnar(tmp_path / name, pa.table({"id": ids, "m": [{"t": s} for s in STORIES]}))
    assert "with the keys id, m; name one" in refusal(opened, path, tmp_path)
    assert list(opened(nested, tmp_path, text_key="m.t").train()) == STORIES
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = columnar(tmp_path / name, pa.table({"messages": [turn] * 3}))
    assert list(opened(path, tmp_path).train()) == [("a", "b")] * 3
    path = columnar(tmp_path / name, pa.table({"text": ["one", None, "two"]}))
    message = refusal(list, opened(path, tmp_path).train())
    assert message.startswith(f'{path}: row 2: "text" is not a string')
    assert list(opened(path, tmp_path, skip_bad=True).train()) == ["one", "two"]
    assert "is not read as stream" in refusal(opened, path, tmp_path, kind="stream")


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_damaged_parquet_and_arrow_are_one_line(tmp_path, name):
    pa = pytest.importorskip("pyarrow")
    texts = [f"{i * i} " * 99 for i in range(999)]
    path = columnar(tmp_path / name, pa.table({"text": texts}), 100)
    whole = path.read_bytes()
    middle = len(whole) // 2
    harmed = [whole[:middle], whole[:-30] + b"\xff" * 30, b"PAR1", b"plain text", whole[:-7]]
    for content in harmed[:4] if name == "stream.arrow" else harmed:
        path.write_bytes(content)
        if name == "stream.arrow" and content == harmed[1]:
            continue  # the end of the last text: no format has a checksum of it
        message = refusal(lambda: list(opened(path, tmp_path).train()))
        assert message.startswith(f"{path}: cut short or damaged after row "), (content, message)
    path.write_bytes(b"")
    assert str(path) in refusal(opened, path, tmp_path)


def test_parquet_in_something_else_and_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet.gz", gzip.compress(b"PAR1"))
    pytest.importorskip("pyarrow")
    assert "is not read out of an archive or another compression" in refusal(opened, path, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -e '.[parquet]'" in refusal(
        opened, write(tmp_path / "a.parquet", b"PAR1"), tmp_path
    )


# Encodings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_encodings(tmp_path, monkeypatch, encoding, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    rows = [{"text": story} for story in STORIES]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    settings = {"encoding": encoding} if encoding == "latin-1" else {}
    path = write(tmp_path / "a.jsonl", whole.encode(encoding))
    assert list(opened(path, tmp_path, **settings).train()) == STORIES
    assert "".join(opened(path, tmp_path, kind="stream", **settings).train()) == whole
    table = "text,n\r\n" + "".join(f"é{i},{i}\r\n" for i in range(20))
    path = write(tmp_path / "a.csv", table.encode(encoding))
    assert list(opened(path, tmp_path, **settings).train()) == [f"é{i}" for i in range(20)]


def test_what_cannot_be_decoded(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\nth\xffr\xe9e\xc3")
    message = refusal(opened, path, tmp_path)
    assert message.startswith(f"{path}:3: not UTF-8 at byte 10; save it as UTF-8, or set")
    said = []
    config = DataConfig(path=str(path), errors="replace")
    source = open_source(config, said.append, tmp_path)
    assert "".join(source.train()) == "one\ntwo\nth\ufffdr\ufffde\ufffd"
    assert said[-1] == f"note: 3 places are not utf-8: U+FFFD stands there, the first at {path}:3"
    given = (str(write(tmp_path / "good.txt", "good")), str(path))
    config = DataConfig(path=given, errors="replace")
    list(open_source(config, said.append, tmp_path).train())
    assert said[-1].endswith(f"the first at {path}:3")
    path = write(tmp_path / "b.txt", b"\xff\xfe" + "one\ntwo".encode("utf-16-le") + b"\x00\xdca\0")
    assert ":2: not UTF-16 at byte 16" in refusal(opened, path, tmp_path)


# What they hold -----------------------------------------------------------------------------------


def test_a_document_is_bounded(tmp_path, monkeypatch):
    for module in (text, records):
        monkeypatch.setattr(module, "MAX_TEXT", 1000)
    monkeypatch.setattr(text, "CHUNK", 100)
    long = "a" * 2000
    cases = {"a.jsonl": f'{{"text": "{long}"}}', "b.txt": long, "c.json": f'[{{"text": "{long}"}}]'}
    cases["d.csv"] = f"text\n{long}"
    for name, content in cases.items():
        path = write(tmp_path / name, content)
        kind = "documents"
        message = refusal(lambda p=path, k=kind: list(opened(p, tmp_path, kind=k).train()))
        assert str(path) in message and ("longer than 1,000" in message or "not an" in message)
