"""data/packing.py: nothing left out, whole where it fits, and each document seen alone."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data import packing
from data.batches import Batches, Examples, evaluation_batches
from data.config import DataConfig
from data.dataset import prepare
from data.packing import BestFit, Masked, best_fit, open_examples, read_plan, search, write_plan
from data.prepared.token_files import Split
from data.prompt_format import prompt_ids
from tests.data.test_batches import epoch_targets


def quiet(_):
    pass


def both(data, config, seq_len, log=quiet):
    """The examples of training and of validation."""
    return [open_examples(data, side, config, seq_len, log) for side in ("train", "val")]


class Numbers:
    """An array that can only be asked for what token files of several parts answer."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        if not isinstance(index, slice):
            index = np.asarray(index)
            assert index.dtype == np.int64
        return self.array[index]


def packed(lengths: list[int]) -> Split:
    """Documents of these lengths; every id in the file is different."""
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(borders[-1], dtype=np.uint32)
    return Split(Numbers(ids), None, None, int(borders[-1]), Numbers(borders))


def predicted(lengths: list[int], has_start: bool) -> list[int]:
    """All that is to be predicted: without a <start>, only the first of all tokens is not."""
    firsts = set(np.cumsum([0, *lengths]).tolist()) if has_start else {0}
    return [i for i in range(sum(lengths)) if i not in firsts]


def best_fit_examples(folder, split, seq_len, has_start=True, masked=False) -> BestFit:
    counts = write_plan(split, folder / "train", seq_len, has_start)
    plan = read_plan(folder / "train", split, counts)
    return BestFit(split, seq_len, 0, plan, masked)


def check_batch(batch, borders: list[int], has_start: bool, masked: bool):
    """That each target follows on its place, and that what is seen alone is of one document."""
    flat = batch.ids.reshape(-1)
    places = np.arange(flat.size) if batch.target_indices is None else batch.target_indices
    np.testing.assert_array_equal(flat[places] + 1, batch.targets)
    if not masked:
        assert batch.documents is None
        return
    assert batch.documents.dtype == np.int32 and batch.documents[-1] == flat.size
    assert set(range(0, flat.size, batch.ids.shape[1])) <= set(batch.documents.tolist())
    belongs = {}  # each token as it is read for a target, without <start> the <end> before, too
    for number, (a, b) in enumerate(pairwise(borders)):
        belongs |= dict.fromkeys(range(a - (0 if has_start else 1), b - 1), number)
    for a, b in pairwise(batch.documents.tolist()):
        read = [int(flat[p]) for p in range(a, b) if p in set(places.tolist())]
        assert len({belongs[i] for i in read}) <= 1
        assert read == list(range(read[0], read[0] + len(read))) if read else True
        # it begins where its document does, or the row or the window of best fit that cuts it
        T, begins = batch.ids.shape[1], [max(0, c - (0 if has_start else 1)) for c in borders]
        assert not read or a % T == 0 or (read[0] - begins[belongs[read[0]]]) % T == 0


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 16), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_masked_windows(lengths, seq_len, batch_size, has_start, seed):
    split = packed(lengths)
    borders = split.borders.array.tolist()
    examples = Masked(split, seq_len, 0, has_start)
    evaluated = []
    for batch in evaluation_batches(examples, batch_size):
        check_batch(batch, borders, has_start, masked=True)
        evaluated += batch.targets.tolist()
    assert evaluated == predicted(lengths, has_start)
    assert len(evaluated) == round(examples.targets_per_byte() * split.bytes)
    if len(split.ids) > seq_len:
        seen = epoch_targets(Batches(examples, batch_size, seed), 1, 4, 2)
        assert len(seen) == len(set(seen)) and set(seen) <= set(evaluated)


@settings(deadline=None, max_examples=30)
@given(
    LENGTHS, st.integers(1, 16), st.integers(1, 5), st.booleans(), st.booleans(),
    st.integers(0, 99), st.sampled_from([4, 1 << 18]),
)  # fmt: skip
def test_best_fit_in_epochs(
    tmp_path_factory, lengths, seq_len, batch_size, has_start, masked, seed, block
):
    split = packed(lengths)
    borders = split.borders.array.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        folder = tmp_path_factory.mktemp("plan")
        examples = best_fit_examples(folder, split, seq_len, has_start, masked)
    evaluated = []
    for batch in evaluation_batches(examples, batch_size):
        assert batch.ids.shape[1] == seq_len and batch.tokens == len(batch.targets)
        check_batch(batch, borders, has_start, masked)
        evaluated += batch.targets.tolist()
    assert sorted(evaluated) == predicted(lengths, has_start)
    assert len(evaluated) == examples.tokens == round(examples.targets_per_byte() * split.bytes)
    batches = Batches(examples, batch_size, seed)
    for epoch in (0, 1):
        assert sorted(epoch_targets(batches, epoch, 4, 2)) == predicted(lengths, has_start)
    # a document is cut only if no window holds it
    window = {}
    for number in range(examples.count):
        batch = examples.batch(np.array([number]))
        window |= dict.fromkeys(batch.targets.tolist(), number)
    for a, b in pairwise(borders):
        targets = [i for i in range(a, b) if i in window]
        if len(targets) <= seq_len:
            assert len({window[i] for i in targets}) == 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_best_fit_decreasing(T, sizes):
    """The windows have as much left as where pieces are placed one by one."""
    sizes = np.array([min(size, T) for size in sizes], np.int64)
    left = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [room for room in left if room >= size]
        if fitting:
            left.remove(min(fitting))
        left.append((min(fitting) if fitting else T) - size)
    windows = best_fit(sizes, T)
    filled = np.bincount(windows, sizes).astype(int)
    assert sorted(T - filled) == sorted(left)


def test_best_fit_of_many_documents_takes_few_windows():
    sizes = np.random.default_rng(0).lognormal(5, 1, 200_000).astype(np.int64) % 1024 + 1
    filled = np.bincount(best_fit(sizes, 1024), sizes)
    assert filled.max() <= 1024 and filled.sum() / (1024 * len(filled)) > 0.999


@given(st.lists(st.integers(0, 30), min_size=1), st.lists(st.integers(-1, 31), max_size=9))
def test_search_is_numpys(ordered, values):
    ordered, values = np.sort(np.array(ordered, np.int64)), np.array(values, np.int64)
    np.testing.assert_array_equal(search(Numbers(ordered), values), ordered.searchsorted(values))


# Prepared data ------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    texts = [f"Text {i} of some words.\n" * (i % 7 + 1) for i in range(200)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(path=str(path), tokenizer="char", cache_dir=str(tmp_path / "cache"))


def test_what_stands_where_is_found_once(config):
    config = replace(config, packing="best_fit")
    data, said = prepare(config, quiet), []
    train, val = both(data, config, 64, said.append)
    assert isinstance(train, BestFit) and isinstance(val, BestFit)
    assert sum("into windows of 64" in line for line in said) == 2
    filled = [line for line in said if line.startswith("packing: best_fit, train: ")]
    assert len(filled) == 1 and "% filled" in filled[0]
    files = [Path(array.filename) for array in (val.pieces, train.first)]
    kept = {file: file.read_bytes() for file in files}
    said.clear()
    again, _ = both(data, config, 64, said.append)
    np.testing.assert_array_equal(again.pieces, train.pieces)
    assert not any("into windows" in line for line in said)
    assert {p: p.read_bytes() for p in kept} == kept
    other, _ = both(data, config, 32, said.append)  # another length has files of its own
    assert other.count > train.count


def test_files_that_were_damaged_are_refused_with_the_fix(config):
    config = replace(config, packing="best_fit")
    data = prepare(config, quiet)
    train, _ = both(data, config, 64, quiet)
    folder = Path(train.pieces.filename).parent
    pieces = np.fromfile(folder / "train.pieces", "<i8")
    (pieces + 1).tofile(folder / "train.pieces")
    with pytest.raises(UserError, match=rf"train.pieces: damaged.*remove {folder}"):
        both(data, config, 64, quiet)
    pieces[:-1].tofile(folder / "train.pieces")
    with pytest.raises(UserError, match=rf"train.pieces: damaged.*remove {folder}"):
        both(data, config, 64, quiet)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{folder}: does not say .*; remove it"):
        both(data, config, 64, quiet)


def test_documents_without_start(config):
    before, data = prepare(config, quiet), prepare(replace(config, start_token=False), quiet)
    assert data.fingerprint != before.fingerprint
    assert before.has_start and before.start_token and not data.has_start and not data.start_token
    start, end = data.tokenizer.start_id, data.tokenizer.end_id
    assert data.train.ids.tolist() == [i for i in before.train.ids.tolist() if i != start]
    assert data.train.bytes == before.train.bytes
    assert prompt_ids("documents", data.tokenizer, "Te", data.start_token)[0] == end
    # the tokens to predict are the text and its <end>, of all documents or of all but the first
    for settings_ in ({}, {"packing": "best_fit"}):
        masked = replace(config, mask_documents=True, **settings_)
        with_start, _ = both(before, masked, 64, quiet)
        without, _ = both(data, replace(masked, start_token=False), 64, quiet)
        a, b = (round(x.targets_per_byte() * x.split.bytes) for x in (with_start, without))
        assert a == b + 1


def test_a_prepared_folder_is_as_it_was_prepared(config, tmp_path):
    folders = []
    for start_token in (True, False):
        cache = tmp_path / f"{start_token}"
        prepare(replace(config, start_token=start_token, cache_dir=str(cache)), quiet)
        folders += [file.parent for file in cache.glob("*/manifest.json")]
    given = [replace(config, path=str(folder)) for folder in folders]
    assert [prepare(each, quiet).start_token for each in given] == [True, False]
    assert not prepare(replace(given[1], start_token=False), quiet).start_token
    with pytest.raises(UserError, match=r"^data.start_token = false: .* was prepared with <start>"):
        prepare(replace(given[0], start_token=False), quiet)


def test_concat_is_as_before(config):
    data = prepare(config, quiet)
    train, _ = both(data, config, 64, quiet)
    assert type(train) is Examples and train.same_sizes
    assert train.batch(np.arange(2)).inputs[2:] == (None, None)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"packing": "best_fit"}, 'packing = "best_fit" is for documents, and this is of kind'),
        ({"mask_documents": True}, "mask_documents = true is for documents, and this is of kind"),
        ({"start_token": False}, "start_token = false is for documents, and this is of kind"),
    ],
)
def test_what_only_documents_have_is_refused_elsewhere(config, tmp_path, settings_, said):
    for kind in ("stream", "lines", "pairs"):
        with pytest.raises(UserError, match=f'{said} "{kind}"; remove it'):
            replace(config, kind=kind, **settings_)
    text = tmp_path / "book.txt"
    text.write_text("A book. " * 100)
    with pytest.raises(UserError, match=f'^data.{said} "stream"; remove it'):
        prepare(replace(config, path=str(text), **settings_), quiet)
