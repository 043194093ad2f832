"""The recipes of docs/data.md, and the table in README "Your own data", on small files."""

import gzip
import io
import json
import shlex
import sys
import zipfile

import pytest

from data.sources.source import open_source
from tests.data.sources.test_remote import s3 as s3
from tests.docs.test_documents import commands
from tests.helpers import ROOT
from training.command_line import read_command_line

NAMES = ["Tom", "Lily", "Ben", "Mia", "Max", "Sue", "Tim", "Amy", "Sam", "Zoe"]
STORIES = [f"Once upon a time, {name} was {i}.\n\nThe end." for i, name in enumerate(NAMES)]
ALPACA = [{"instruction": s, "input": "", "output": "Yes."} for s in STORIES]
TURN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
FINEWEB = {
    "id": "<urn:uuid:0>", "dump": "CC-MAIN-2024-10", "url": "http://a.example", "file_path": "s3://a",
    "language": "en", "language_score": 0.9, "token_count": 12, "score": 3.1, "int_score": 3,
}  # fmt: skip


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def make_published(folder):
    """What a person has downloaded, in the names and forms it is published in."""
    for name, count in (("train", 10), ("valid", 3)):
        text = "\n<|endoftext|>\n".join(STORIES[:count])
        (folder / f"TinyStoriesV2-GPT4-{name}.txt").write_text(text + "\n<|endoftext|>\n")
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        rows = [{"text": story} for story in STORIES[:5]]
        parquet(folder / "data" / f"{name}-2d5a1467fff1081b.parquet", rows)
    for number in range(2):
        rows = [{"text": story, **FINEWEB} for story in STORIES]
        parquet(folder / "sample" / "10BT" / f"{number:03}_00000.parquet", rows)
    rows = [*ALPACA, {"instruction": "Add.", "input": "1, 2", "output": "3"}]
    (folder / "alpaca_data.json").write_text(json.dumps(rows, indent=4))


def opened(command: str, folder, monkeypatch):
    """The source of a train.py command that is typed in `folder`."""
    monkeypatch.chdir(folder)
    words = [str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(command)]
    spec = read_command_line(lambda line: None, [*words[2:], "--runs_dir", str(folder / "runs")])
    assert spec is not None
    source = open_source(spec.config.data, lambda line: None, folder / "cache")
    return source, list(source.train()), list(source.val()) if source.val else None


RECIPES = {
    "configs/tinystories.toml": ("documents", STORIES, STORIES[:3]),
    "data/train-*.parquet": ("documents", STORIES[:5] * 2, STORIES[:5]),
    "sample/10BT/*.parquet": ("documents", STORIES * 2, None),
    "alpaca_data.json": ("pairs", [(s, "Yes.") for s in STORIES] + [("Add.\n\n1, 2", "3")], None),
}  # fmt: skip


def test_recipes(tmp_path, monkeypatch):
    make_published(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.split("## Recipes\n")[1].split("\n## ")[0]
    found = [command for command in commands(section) if command.startswith("python train.py")]
    assert len(found) == len(RECIPES)
    for command in found:
        key = next(word for word in reversed(RECIPES) if word in command)
        source, train, val = opened(command, tmp_path, monkeypatch)
        assert (source.kind, train, val) == RECIPES[key], command


# README -------------------------------------------------------------------------------------------


def make_own(folder, s3):
    """A file or a folder for each row of the table."""
    texts = [{"text": story} for story in STORIES]
    pairs = [{"prompt": story, "completion": "Yes."} for story in STORIES]
    lines = "".join(json.dumps(row) + "\n" for row in texts)
    (folder / "book.txt").write_text("".join(STORIES))
    (folder / "list.txt").write_text("one\ntwo\n")
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    (folder / "corpus.jsonl").write_text(lines)
    (folder / "table.csv").write_text("text,n\n" + "".join(f"{n},{n}\n" for n in ("one", "two")))
    parquet(folder / "table.parquet", texts)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "chats.jsonl").write_text(json.dumps({"messages": TURN}) + "\n")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.md").write_text(STORIES[0])
    (folder / "texts" / "b.txt").write_text(STORIES[1])
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with zipfile.ZipFile(folder / "corpus.zip", "w") as archive:
        archive.writestr("a/b.txt", STORIES[0])
    s3.pipe("bucket/corpus/a.jsonl", lines.encode())


OWN = {
    "book.txt": ("stream", ["".join(STORIES)]),
    "list.txt": ("lines", ["one", "two"]),
    "texts": ("documents", STORIES[:2]),
    "stories.txt": ("documents", STORIES),
    "corpus.jsonl": ("documents", STORIES),
    "table.csv": ("documents", ["one", "two"]),
    "table.parquet": ("documents", STORIES),
    "corpus/**/*.jsonl.gz": ("documents", STORIES),
    "corpus.zip": ("documents", STORIES[:1]),
    "s3://bucket/corpus/*.jsonl": ("documents", STORIES),
    "-": ("stream", ["".join(STORIES)]),
    "pairs.jsonl": ("pairs", [(story, "Yes.") for story in STORIES]),
    "chats.jsonl": ("pairs", [("Why?", "Because.")]),
}


def test_every_row_of_the_table(tmp_path, monkeypatch, s3):
    make_own(tmp_path, s3)
    stdin = io.TextIOWrapper(io.BytesIO("".join(STORIES).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Your own data\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    given = [span.replace("\\|", "|") for row in rows for span in row.strip("| ").split("`")[1::2]]
    assert {shlex.split(flags)[0] for flags in given} == OWN.keys()
    for flags in given:
        source, train, _ = opened(f"python train.py --data.path {flags}", tmp_path, monkeypatch)
        assert (source.kind, train) == OWN[shlex.split(flags)[0]], flags
