"""Writing: what a process that was ended has made is gone on from, to the same bytes."""

import json
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UnreadableError, UserError
from data.config import DataConfig
from data.dataset import prepare
from data.prepared import building, encoding, token_files, writing
from data.sources import text
from tests.helpers import TEXT


class Killed(BaseException):
    """Stands for a SIGKILL: nobody catches it, and nothing is recorded after it."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Records, shards and blocks as small as the texts here."""
    monkeypatch.setattr(writing, "MARK", 900)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 500)
    monkeypatch.setattr(encoding, "CHARACTERS", 300)
    monkeypatch.setattr(text, "CHUNK", 500)


def make(folder, kind: str) -> DataConfig:
    """A source of a kind in two files, of which the second has its own length."""
    folder.mkdir()
    lines = TEXT.read_text(encoding="utf-8").split("\n")
    texts = [f"{i} {line}" for i in range(3) for line in lines]
    for number, part in enumerate((texts[:50], texts[50:])):
        if kind in ("pairs", "documents"):
            rows = [{"prompt": f"{i} {t}", "completion": t, "text": f"{t}\n{i}"}
                    for i, t in enumerate(part) if t.strip()]  # fmt: skip
            rows.insert(1, {})  # that is left out
            keys = ("text",) if kind == "documents" else ("prompt", "completion")
            lines = [json.dumps({key: row[key] for key in keys if key in row}) for row in rows]
            (folder / f"{number}.jsonl").write_text("\n".join(lines))
        else:
            (folder / f"{number}.txt").write_text("\n".join(part))
    tokenizer = "bpe" if kind == "documents" else "char"
    return DataConfig(
        path=str(folder), kind=kind, cache_dir=f"{folder}-cache", tokenizer=tokenizer,
        vocab_size=320, skip_bad=True,
    )  # fmt: skip


def files(config: DataConfig) -> dict[str, bytes]:
    """All that a cache holds of these texts, but for the lock."""
    found = Path(config.cache_dir).glob("*texts*/**/*")
    return {str(p.relative_to(config.cache_dir)): p.read_bytes() for p in found if p.is_file()}


@contextmanager
def killed(owner: type, method: str, times: int, error: BaseException | type = Killed):
    """The block, in which a process is killed when a method has been called so often."""
    before, left = getattr(owner, method), [times]

    def last(self, *arguments, **more):
        before(self, *arguments, **more)
        left[0] -= 1
        if not left[0]:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, last)
        yield


# the files of a record have been written, and the record, or not
@pytest.mark.parametrize("owner", [(writing.Progress, "record"), (token_files.ShardWriter, "sync")])
@pytest.mark.parametrize("kind", ["stream", "lines", "documents", "pairs"])
def test_ended_at_every_record_it_ends_in_the_same_bytes(tmp_path, kind, owner):
    config, said = make(tmp_path / "texts", kind), []
    prepare(config, said.append)
    whole, notes = files(config), [line for line in said if "skipped" in line]
    assert sum("train-" in name and name.endswith(".ids") for name in whole) > 3
    assert not any("progress" in name for name in whole)
    shutil.rmtree(config.cache_dir)
    for tries in range(100):
        said.clear()
        with suppress(Killed), killed(*owner, 1 + (tries % 2 if owner[1] == "record" else tries)):
            prepare(config, said.append)
            break
    assert tries > 3 and files(config) == whole
    assert [line for line in said if "skipped" in line] == notes


def test_work_is_kept_where_a_source_cannot_be_read_for_now(tmp_path):
    config, said = make(tmp_path / "texts", "documents"), []
    prepare(config, said.append)
    whole = files(config)
    shutil.rmtree(config.cache_dir)
    lost = UnreadableError(OSError(0, "unreachable"), "s3://bucket", "check the network")
    with pytest.raises(UnreadableError), killed(writing.Progress, "record", 5, lost):
        prepare(config, lambda _: None)
    said.clear()
    prepare(config, said.append)
    assert any("of them made before" in line for line in said) and files(config) == whole


def test_what_was_made_of_another_content_is_removed(tmp_path, monkeypatch):
    config = make(tmp_path / "texts", "lines")

    def stop(*_):
        raise Killed

    monkeypatch.setattr(building, "write_shards", stop)
    with pytest.raises(Killed):
        prepare(config, lambda _: None)
    cache = tmp_path / "texts-cache"
    (old,) = cache.glob(".texts-*")
    with pytest.raises(Killed):  # other settings, of the same content
        prepare(replace(config, val_fraction=0.2), lambda _: None)
    assert old.exists() and len([*cache.glob(".texts-*")]) == 2
    with open(tmp_path / "texts" / "0.txt", "a") as file:
        file.write("more")
    with pytest.raises(Killed):
        prepare(config, lambda _: None)
    (new,) = cache.glob(".texts-*")
    assert new != old


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    config = make(tmp_path / "texts", "lines")
    write = building.write_shards

    def change(*arguments):
        write(*arguments)
        with open(tmp_path / "texts" / "1.txt", "a") as file:
            file.write("more")

    monkeypatch.setattr(building, "write_shards", change)
    with pytest.raises(UserError, match=r"1.txt: changed while it was read; run"):
        prepare(config, lambda _: None)
    assert not files(config)


@pytest.mark.parametrize("damage", ["remove", "cut", "record"])
def test_an_unfinished_folder_that_was_damaged_is_made_anew(tmp_path, damage):
    config = make(tmp_path / "texts", "documents")
    prepare(config, lambda _: None)
    whole = files(config)
    shutil.rmtree(config.cache_dir)
    with pytest.raises(Killed), killed(writing.Progress, "record", 5):
        prepare(config, lambda _: None)
    (folder,) = (tmp_path / "texts-cache").glob(".texts-*")
    if damage == "remove":
        (folder / "train-00001.borders").unlink()
    elif damage == "cut":
        (folder / "train-00000.ids").write_bytes(b"12")
    else:
        (folder / "progress.json").write_bytes(b"{")
    prepare(config, lambda _: None)
    assert files(config) == whole
