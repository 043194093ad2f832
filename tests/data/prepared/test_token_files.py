"""Token files: shards that read as one array, written on from where another ended."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.prepared import token_files
from data.prepared.encoding import Encoded
from data.prepared.token_files import Shards, ShardWriter, check_shards, open_split

U2 = np.dtype("<u2")


def encoded(rows: list[list[int]], prompts=None, is_stream=False) -> Encoded:
    ids = np.array([i for row in rows for i in row], U2)
    lengths = np.array([len(row) for row in rows], "<i8")
    lengths = None if is_stream else lengths
    return Encoded(ids, lengths, None if prompts is None else np.array(prompts, "<i4"), len(rows))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """An array, and the same in files of 5, 0, 9 and 6 numbers."""
    folder = tmp_path_factory.mktemp("shards")
    whole, first = np.arange(20, dtype=U2) ** 2, np.array([0, 5, 5, 14, 20])
    paths = [folder / f"{i}.ids" for i in range(4)]
    for path, begin, end in zip(paths, first, first[1:], strict=False):
        whole[begin:end].tofile(path)
    return whole, Shards(paths, first.tolist(), U2)


@given(begin=st.integers(-25, 25), end=st.integers(-25, 25))
@settings(max_examples=100, deadline=None)
def test_a_slice_is_that_of_the_whole(shards, begin, end):
    whole, parts = shards
    found = parts[begin:end]
    assert found.tolist() == whole[begin:end].tolist() and found.dtype == U2


@given(index=st.lists(st.integers(0, 19), max_size=12))
@settings(max_examples=100, deadline=None)
def test_an_index_array_of_any_shape_gathers(shards, index):
    whole, parts = shards
    for shape in ((-1,), (1, -1), (len(index), 1, 1)):
        at = np.array(index, np.int64).reshape(shape)
        assert np.array_equal(parts[at], whole[at]) and parts[at].shape == at.shape
    for i in index:
        assert parts[i] == whole[i] and parts[i - 20] == whole[i]
    assert len(parts) == 20


@pytest.mark.parametrize("limit", [4, 1000])
def test_packed_documents_in_shards_are_what_they_are_in_one(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", limit)
    rows = [list(range(i, i + n)) for i, n in enumerate([1, 3, 2, 9, 1, 1, 2])]
    writer = ShardWriter(tmp_path, "train", "documents", "<u2")
    for row in rows:
        writer.write(encoded([row]))
    writer.close()
    sizes = [shard["tokens"] for shard in writer.shards]
    assert sizes == ([4, 2, 9, 4] if limit == 4 else [19])
    check_shards("documents", writer.shards)
    assert max(shard["top"] for shard in writer.shards) == 11
    for whole in (True, False):
        split = open_split(tmp_path, "documents", writer.shards, U2, 50, whole)
        ends = np.cumsum([0, *map(len, rows)]).tolist()
        assert split.ids[:].tolist() == [i for row in rows for i in row]
        assert split.borders[:].tolist() == ends and len(split.borders) == len(ends)
        assert [split.borders[i] for i in range(-1, 3)] == [ends[i] for i in range(-1, 3)]
        assert split.count(3) == 3 and split.bytes == 7
        assert split.describe() == "7 documents, 19 tokens"


def test_pairs_in_shards_have_their_starts_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 7)
    writer = ShardWriter(tmp_path, "val", "pairs", "<u4")
    for number in range(5):
        writer.write(encoded([[number, 2, 9, 3], [2, 5, 3]], [2, 1]))
    writer.close()
    assert len(writer.shards) == 5
    # of uint32 they would be as many bytes again
    with pytest.raises(UserError, match=r"val-00000.ids: damaged \(14 bytes instead of 28\)"):
        open_split(tmp_path, "pairs", writer.shards, np.dtype("<u4"), 50, True)
    split = open_split(tmp_path, "pairs", writer.shards, U2, 50, True)
    assert split.starts.tolist() == [0, *np.cumsum([4, 3] * 5)]
    assert split.prompts.tolist() == [2, 1] * 5


def test_a_writer_goes_on_where_another_was_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 10)
    blocks = [encoded([[i] * (1 + i % 4)] * 2) for i in range(9)]

    def write(folder, stop_at):
        folder.mkdir()
        writer = ShardWriter(folder, "train", "documents", "<u2")
        for number, block in enumerate(blocks):
            writer.write(block)
            if number == stop_at:
                writer.sync()
                recorded = [dict(shard) for shard in writer.shards]
                for lost in blocks[number + 1 :]:  # written, and not recorded
                    writer.write(lost)
                writer.abandon()
                for path in folder.iterdir():
                    if path.stem not in {shard["name"] for shard in recorded}:
                        path.unlink()
                writer = ShardWriter(folder, "train", "documents", "<u2", recorded)
                for block in blocks[number + 1 :]:
                    writer.write(block)
                break
        writer.close()
        return writer.shards, {p.name: p.read_bytes() for p in folder.iterdir()}

    whole = write(tmp_path / "whole", None)
    assert len(whole[0]) > 3
    for stop_at in range(len(blocks)):
        assert write(tmp_path / str(stop_at), stop_at) == whole


def test_what_is_recorded_and_not_there_is_noticed(tmp_path):
    writer = ShardWriter(tmp_path, "train", "stream", "<u2")
    writer.write(encoded([[1, 2, 3]], is_stream=True))
    writer.sync()
    (tmp_path / "train-00000.ids").write_bytes(b"12345")
    with pytest.raises(ValueError, match="shorter"):
        ShardWriter(tmp_path, "train", "stream", "<u2", writer.shards)


def test_damage_that_opening_does_not_look_for_is_told_when_it_is_read(tmp_path):
    writer = ShardWriter(tmp_path, "train", "stream", "<u2")
    writer.write(encoded([[1, 2, 3, 4]], is_stream=True))
    writer.close()
    path = tmp_path / "train-00000.ids"

    def opened(content: bytes, whole: bool):
        path.write_bytes(content)
        return open_split(tmp_path, "stream", writer.shards, U2, 5, whole)

    good = path.read_bytes()
    bad = good[:4] + b"\5\0" + good[6:]
    with pytest.raises(UserError, match=r"train-00000.ids: damaged .its sha256"):
        opened(bad, True)
    split = opened(bad, False)
    assert split.ids[:2].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"train-00000.ids: damaged .holds id 5, the voc.*; remove"):
        split.ids[np.array([2])]
    split = opened(good, False)
    assert split.ids[:].tolist() == [1, 2, 3, 4]
    path.write_bytes(good[:6])  # while it is open
    assert split.ids[1:3].tolist() == [2, 3]
    with pytest.raises(UserError, match=r"train-00000.ids: damaged .it has been cut"):
        split.ids[np.array([0, 3])]
    split = opened(good, False)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00000.ids: damaged .*No such file"):
        split.ids[:2]
