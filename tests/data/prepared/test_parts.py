"""Parts: a corpus in parts is the same data, each document once, whatever their number."""

import json
import shutil
import time
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from threading import Thread

import pytest
from filelock import FileLock

from common.errors import UserError
from data.config import DataConfig
from data.dataset import open_dataset, prepare, prepared_folder, verify
from data.prepared import building, parts
from data.prepared.parts import borders, merge, prepare_part
from data.sources.source import open_source
from data.tokenizers.load import named_tokenizer
from tests.data.tokenizers.foreign_files import sentencepiece_model
from tests.helpers import TEXT


def quiet(_):
    pass


@pytest.fixture(params=["few files", "many files", "pairs"])
def config(tmp_path, request):
    """Few files of many texts, many of a few, and pairs of which whole prompts are held out."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    count = 40 if request.param == "many files" else 3
    for number in range(count):
        rows = [{"text": f"Text {number} {i} of {'words ' * (i % 5)}"} for i in range(240 // count)]
        if request.param == "pairs":
            rows = [
                {"prompt": f"{number} {i}", "completion": row["text"]} for i, row in enumerate(rows)
            ]
        path = folder / f"{number:02}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[: 2 + 40 * number]))
    return DataConfig(path=str(folder), tokenizer="char", cache_dir=str(tmp_path / "cache"))


def facts(data) -> list:
    found = [data.name, data.kind, data.fingerprint, data.tokenizer.files(), data.held_out]
    for split in (data.train, data.val):
        found += [split.ids[:].tolist(), split.bytes]
        found += [None if a is None else a[:].tolist() for a in (split.starts, split.borders)]
        found += [None if split.prompts is None else split.prompts.tolist()]
    return found


@pytest.mark.parametrize("number", [1, 2, 5])
def test_it_is_the_same_data_whatever_the_number_of_parts(config, tmp_path, number):
    whole, to = facts(prepare(config, quiet)), tmp_path / "to"
    order = [1, *range(number, 1, -1)]  # the first makes the tokenizer, which others wait for
    ends = [prepare_part(config, to, part, number, quiet) for part in order]
    assert ends == [False] * (number - 1) + [True]
    assert facts(open_dataset(to)) == whole
    assert facts(prepare(replace(config, path=str(to)), quiet)) == whole
    assert prepare_part(config, to, 1, number, quiet)  # again, with nothing to do
    verify(to, quiet)
    (shard,) = [*to.glob("*/train-00000.ids")][:1]
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"train-00000.ids: damaged .its sha256.*remove"):
        verify(to, quiet)
    with pytest.raises(UserError, match=r"train-00000.ids: damaged"):
        open_dataset(to)


def test_parts_by_files_open_no_others(config, monkeypatch):
    source = open_source(config, quiet, config.cache_dir)
    cuts = borders(source.train, 4)
    whole, found, opened = list(source.train()), [], []
    original = type(source.train).of_file
    monkeypatch.setattr(
        type(source.train), "of_file",
        lambda self, number, tally: opened.append(number) or original(self, number, tally),
    )  # fmt: skip
    for begin, end in pairwise(cuts):
        found.append(list(source.train(replace(begin), end)))
    assert [*chain.from_iterable(found)] == whole and all(found)
    if len(source.train.parts) > 3:
        assert opened == list(range(len(source.train.parts)))


def test_parts_of_other_settings_are_not_mixed(config, tmp_path):
    to = tmp_path / "to"
    prepare_part(config, to, 1, 2, quiet)
    other = replace(config, val_fraction=0.3)
    with pytest.raises(UserError, match=r"1-of-2: of another corpus or other settings; give"):
        prepare_part(other, to, 1, 2, quiet)
    shutil.rmtree(to / "1-of-2")
    prepare_part(other, to, 1, 2, quiet)
    with pytest.raises(UserError, match=r"2-of-2: not of the same corpus as part 1 .fingerprint"):
        prepare_part(config, to, 2, 2, quiet)
    assert not (to / "manifest.json").exists()
    with pytest.raises(UserError, match="must have folders 1-of-N"):
        parts.count_parts(tmp_path)
    assert parts.count_parts(to) == 2


@pytest.mark.parametrize("name", ["mine.txt", "1-of-1/mine.txt", "train/x"])
def test_a_folder_with_other_files_is_left_as_it_is(config, tmp_path, name):
    file = tmp_path / "to" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(UserError, match=r"--to .*to: has other files in it .*; give an empty"):
        prepare_part(config, tmp_path / "to", 1, 1, quiet)
    assert [path for path in (tmp_path / "to").rglob("*") if path.is_file()] == [file]
    for folder in (config.path, f"{config.path}/to"):
        with pytest.raises(UserError, match=r"--to .*: is in data.path, .*; give a folder else"):
            prepare_part(config, Path(folder), 1, 1, quiet)


def test_what_is_begun_is_neither_lost_nor_read_as_text(config, tmp_path, monkeypatch):
    to, other = tmp_path / "to", replace(config, val_fraction=0.3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(building, "write_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare_part(config, to, 1, 2, quiet)
    begun = sorted(path for path in to.rglob("*"))
    with pytest.raises(UserError, match=r"\.1-of-2: of another corpus or other settings; give"):
        prepare_part(other, to, 1, 2, quiet)
    with pytest.raises(UserError, match=r"\.1-of-2: of another .*, and makes no tokenizer for"):
        prepare_part(other, to, 2, 2, quiet)
    assert begun == [path for path in sorted(to.rglob("*")) if path in begun]
    given = replace(config, path=str(to))
    for look in (verify, lambda *_: prepare(given, quiet)):
        with pytest.raises(UserError, match=r"its preparing was ended; give the same python -m"):
            look(to, quiet)
    said = []
    assert not prepare_part(config, to, 1, 2, said.append)
    assert "tokenizer: made before" in said
    with pytest.raises(UserError, match=r"1-of-2: of another .*, and makes no tokenizer for"):
        prepare_part(other, to, 2, 2, quiet)
    for look in (verify, lambda *_: prepare(given, quiet)):
        with pytest.raises(UserError, match=r"has 1 of 2 parts; run python -m tools.prepare with"):
            look(to, quiet)
    assert prepare_part(config, to, 2, 2, quiet)
    assert (to / "1-of-2").stat().st_mode & 0o777 == to.stat().st_mode & 0o777
    said.clear()
    prepare(given, said.append)
    assert said == [f"reading {to}, which is prepared: {open_dataset(to).kind}"]
    (to / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared data, but has 2 of 2 parts; run .* --merge if"):
        prepare(given, quiet)
    for wrong, why in ((config.path, "not prepared data: has"), (str(TEXT), "not a folder; give")):
        with pytest.raises(UserError, match=why):
            verify(Path(wrong), quiet)


def test_several_paths_are_texts_whatever_this_folder_is(config, tmp_path, monkeypatch):
    files = tuple(str(path) for path in sorted(Path(config.path).iterdir()))
    several = replace(config, path=files)
    prepare_part(config, tmp_path / "to", 1, 2, quiet)  # begun, not whole
    monkeypatch.chdir(tmp_path / "to")
    assert prepare(several, quiet).train.bytes == prepare(config, quiet).train.bytes
    prepare_part(config, tmp_path / "to", 2, 2, quiet)
    assert prepared_folder(several, quiet) is None


def test_what_a_given_tokenizer_loses_is_said(config, tmp_path):
    (tmp_path / "theirs.model").write_bytes(sentencepiece_model())
    config = replace(config, tokenizer_path=str(tmp_path / "theirs.model"))
    said = []
    prepare_part(config, tmp_path / "to", 1, 1, said.append, named_tokenizer(config))
    assert any(line.startswith("warning: ") and "runs of spaces" in line for line in said), said


def test_bytes_wait_for_no_tokenizer(config, tmp_path):
    config = replace(config, tokenizer="byte")
    assert not prepare_part(config, tmp_path / "to", 2, 2, quiet)
    assert prepare_part(config, tmp_path / "to", 1, 2, quiet)
    assert facts(open_dataset(tmp_path / "to")) == facts(prepare(config, quiet))


def test_who_waits_for_another_process_says_so(config, tmp_path):
    said, folder = [], tmp_path / "to" / "1-of-1"
    folder.parent.mkdir()
    with FileLock(f"{folder}.lock"):
        waiting = Thread(target=prepare_part, args=(config, folder.parent, 1, 1, said.append))
        waiting.start()
        while not any("another process" in line for line in said):
            time.sleep(0.01)
    waiting.join()
    assert f"{folder}: another process is preparing it; waiting for that" in said
    assert open_dataset(tmp_path / "to").train


def test_a_stream_is_not_prepared_in_parts(tmp_path):
    (tmp_path / "a.txt").write_text("a long text " * 99)
    config = DataConfig(path=str(tmp_path / "a.txt"), tokenizer="char", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="--part 1/2: one long text"):
        prepare_part(config, tmp_path / "to", 1, 2, quiet)
    assert prepare_part(config, tmp_path / "to", 1, 1, quiet)
    assert facts(open_dataset(tmp_path / "to")) == facts(prepare(config, quiet))
    assert not merge(tmp_path / "to", 3, quiet)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"kind": "lines"}, r"data.kind = lines: .* was prepared as documents; leave it out"),
        ({"val_path": "x"}, r"data.val_path = x: .* is prepared, with its own split; leave"),
    ],
)
def test_a_prepared_folder_is_used_as_it_is(tmp_path, more, said):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(99)))
    config = DataConfig(
        path=str(tmp_path / "a.jsonl"), tokenizer="char", cache_dir=str(tmp_path / "c")
    )
    prepare_part(config, tmp_path / "to", 1, 1, quiet)
    given = replace(config, path=str(tmp_path / "to"), vocab_size=400)
    assert prepare(given, quiet).fingerprint == prepare(config, quiet).fingerprint
    with pytest.raises(UserError, match=said):
        prepare(replace(given, **more), quiet)
    other = prepare(replace(config, tokenizer="char_bos"), quiet).tokenizer
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        prepare(given, quiet, other)
