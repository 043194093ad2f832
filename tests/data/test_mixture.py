"""data/mixture.py: shares that are counted, one tokenizer, epochs of each source's own."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.batches import Batches, Examples
from data.config import DataConfig, SourceConfig, has_addresses
from data.mixture import MixedBatches, MixedExamples, Mixture, dealt, make_batches, open_examples
from data.mixture import prepare as prepare_mixture
from data.prepared.token_files import Split
from tests.data.test_batches import documents

LINES = [f"{'ab' * (n % 7)} {n} is a number" for n in range(300)]


def quiet(_: str):
    pass


def windows(first: int, count: int, seq_len: int = 4) -> Examples:
    """A stream of `count` windows, whose ids begin with `first`."""
    ids = np.arange(first, first + (count + 1) * seq_len, dtype=np.uint32)
    return Examples(Split(ids, None, None, len(ids)), seq_len, 0)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.integers(0, 10**14))
def test_every_source_has_had_its_share_at_any_time(weights, begin):
    before = dealt(begin, weights)
    for count in range(begin, begin + 50):
        after = dealt(count + 1, weights)
        assert sum(before) == count and min(before) >= 0
        turns = [b - a for a, b in zip(before, after, strict=True)]
        assert sorted(turns) == [0] * (len(weights) - 1) + [1]  # one example, of one source
        for got, weight in zip(before, weights, strict=True):
            off = abs(got - Fraction(count * weight, sum(weights)))
            assert off < 2 and (off < 1 or len(weights) > 3)
        before = after


def test_the_share_of_a_batch_is_counted_and_not_drawn():
    parts = {"a": windows(0, 400), "b": windows(10_000, 50), "c": windows(20_000, 10)}
    shares = [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    batches = MixedBatches(MixedExamples(parts, shares), 10, 3)
    for step in (0, 1, 17, 10**9):
        (batch,) = batches(step)
        assert batch.ids.shape == (10, 4) and batch.target_indices is None
        assert np.bincount(batch.ids[:, 0] // 10_000).tolist() == [7, 2, 1]
        np.testing.assert_array_equal(batch.ids.reshape(-1) + 1, batch.targets)
        assert batches.target_count(step) == 40


def test_every_source_goes_through_epochs_of_its_own():
    parts = {"a": windows(0, 20), "b": windows(10_000, 7)}
    batches = MixedBatches(MixedExamples(parts, [Fraction(1, 2)] * 2), 6, 3)
    taken = np.concatenate([batches.chosen(step)[0] for step in range(140)])
    for first, count in ((0, 20), (20, 7)):
        own = taken[(taken >= first) & (taken < first + count)] - first
        epochs = own[: len(own) // count * count].reshape(-1, count)
        assert len(epochs) == 420 // count
        assert (np.sort(epochs) == np.arange(count)).all(), "an epoch that is not each once"
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)
    assert batches.steps_per_epoch == 5  # as many examples as both have, 27


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(0, 500))
def test_a_micro_batch_is_the_same_whoever_takes_it(batch_size, share, processes, step):
    rows = [(2, n % 9) for n in range(40)]
    pairs = [Examples(documents(rows[:n]), 12, 0) for n in (40, 11)]
    streams = [windows(0, 30), windows(10_000, 9)]
    for each in (pairs, streams):
        examples = MixedExamples(
            dict(zip("ab", each, strict=True)), [Fraction(1, 3), Fraction(2, 3)]
        )
        batches, again = (make_batches(examples, batch_size, 5) for _ in range(2))
        again(step + 999)  # a batch depends on its step alone
        alone = batches(step, share * processes)
        shared = [again(step, share * processes, n, processes) for n in range(processes)]
        flat = [batch for of_one in shared for batch in of_one]
        assert [b.ids.tolist() for b in flat] == [b.ids.tolist() for b in alone]
        assert sum(len(b.targets) for b in alone) == batches.target_count(step)
        assert len(alone) == batches.count_micro_batches(step, share * processes)
        assert sum(len(b.ids) for b in alone) == batch_size == batches.rows(step)
        for batch in alone:
            places = slice(None) if batch.target_indices is None else batch.target_indices
            np.testing.assert_array_equal(batch.ids.reshape(-1)[places] + 1, batch.targets)


def test_shares_of_pairs_are_of_tokens():
    short = Examples(documents([(0, 2)] * 50), 40, 0)
    long = Examples(documents([(0, 20)] * 50), 40, 0)
    examples = MixedExamples({"short": short, "long": long}, [Fraction(3, 4), Fraction(1, 4)])
    batches, tokens = MixedBatches(examples, 30, 1), np.zeros(2)
    for step in range(60):
        chosen = batches.chosen(step)[0]
        np.add.at(tokens, (chosen >= 50).astype(int), examples.lengths[chosen])
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.005)


@pytest.fixture
def mixture(tmp_path) -> DataConfig:
    """A text, packed documents and a built-in name for either, one tokenizer for both."""
    (tmp_path / "book.txt").write_text("\n".join(LINES[:100]))
    texts = [json.dumps({"text": line}) for line in LINES]
    (tmp_path / "web.jsonl").write_text("\n".join(texts))
    sources = (
        SourceConfig(0.3, path=str(tmp_path / "book.txt")),
        SourceConfig(0.1, path=str(tmp_path / "web.jsonl"), name="pages"),
    )
    return DataConfig(sources=sources, tokenizer="char", cache_dir=str(tmp_path / "cache"))


def test_a_mixture_is_prepared_once_whatever_the_weights(mixture, tmp_path):
    said = []
    data = prepare_mixture(mixture, said.append)
    assert isinstance(data, Mixture) and data.kind == "documents" and not data.tokenizer_given
    assert [source.name for source in data.sources] == ["book", "pages"]
    assert [source.kind for source in data.sources] == ["stream", "documents"]
    assert data.weights == (Fraction(3, 4), Fraction(1, 4))
    assert sum(line.startswith("tokens:") for line in said) == 2
    known = sorted(path.name for path in (tmp_path / "cache").iterdir())
    first, second = mixture.sources
    other = replace(mixture, sources=(replace(first, weight=9.0), second))
    said.clear()
    heavier = prepare_mixture(other, said.append)
    assert not any(line.startswith("tok") for line in said), "something was made anew"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == known
    assert heavier.fingerprint != data.fingerprint  # a resume on it is refused
    assert prepare_mixture(mixture, quiet).fingerprint == data.fingerprint
    # both sides, end to end, and each text with the tokenizer of all
    assert len(data.train.ids) == sum(len(source.train.ids) for source in data.sources)
    cut = len(data.sources[0].train.ids)
    np.testing.assert_array_equal(
        data.train.ids[cut - 3 : cut + 2],
        [*data.sources[0].train.ids[-3:], *data.sources[1].train.ids[:2]],
    )
    assert data.tokenizer.decode(data.sources[1].train.ids[:60].tolist()).startswith(" 0 is")
    val = open_examples(data, "val", 8)
    assert isinstance(val, MixedExamples) and list(val.parts) == ["book", "pages"]


def test_pairs_and_lines_are_mixed_and_pairs_held_out_of_all(mixture, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    for name in ("a", "b"):
        pairs = [{"prompt": f"{name}{n}", "completion": str(n)} for n in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    sources = (
        SourceConfig(1, path=str(tmp_path / "lines.txt"), kind="lines"),
        SourceConfig(1, path=str(tmp_path / "a.jsonl")),
        SourceConfig(1, path=str(tmp_path / "b.jsonl"), val_fraction=0.5),
    )
    data = prepare_mixture(replace(mixture, sources=sources), quiet)
    assert data.kind == "pairs" and len(data.held_out) == 10
    assert {pair["prompt"][0] for pair in data.held_out} == {"a", "b"}
    examples = open_examples(data, "train", 40)
    assert examples is not None
    batches = make_batches(examples, 12, 1)
    for step in range(3):
        assert sum(len(b.targets) for b in batches(step, 4)) == batches.target_count(step)
    split = data.train
    assert split.starts is not None and split.starts[-1] == len(split.ids)
    with pytest.raises(UserError, match="a is pairs, web is documents; give sources that are all"):
        web = SourceConfig(1, path=str(tmp_path / "web.jsonl"))
        prepare_mixture(replace(mixture, sources=(sources[1], web)), quiet)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_documents_of_a_mixture_are_packed_and_seen_alone(tmp_path, packing):
    """Each row is one of its source's own, and says where its documents begin."""
    sources = []
    for name in ("a", "b"):
        rows = [{"text": f"{name} " * (1 + n % 97)} for n in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append(SourceConfig(1, path=str(tmp_path / f"{name}.jsonl")))
    config = DataConfig(
        sources=tuple(sources), tokenizer="char", packing=packing, mask_documents=True,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data = prepare_mixture(config, quiet)
    examples = open_examples(data, "train", 16, config=config, log=quiet)
    assert examples is not None
    batches = make_batches(examples, 8, 1)
    start, end = data.tokenizer.start_id, data.tokenizer.end_id
    for step in range(4):
        parts = batches(step, 2)
        assert sum(len(part.targets) for part in parts) == batches.target_count(step)
        for part in parts:
            assert part.documents is not None
            borders = part.documents.tolist()
            assert borders == sorted(set(borders)) and borders[-1] == part.ids.size
            begins = set(borders[:-1])
            assert begins >= set(range(0, part.ids.size, 16))  # none goes over a row's end
            ids = part.ids.reshape(-1)
            assert begins >= set(np.flatnonzero(ids == start).tolist())
            letters = {data.tokenizer.decode(row)[:1].strip() for row in part.ids.tolist()}
            assert letters <= {"", "a", "b"} and end not in (start, data.tokenizer.pad_id)
    rows = np.concatenate([batches(step)[0].ids for step in range(4)])
    told = [set(data.tokenizer.decode(row).split()) for row in rows.tolist()]
    assert sum("a" in row for row in told) == sum("b" in row for row in told) == 16


def test_a_prepared_folder_is_a_source_and_its_tokenizer_that_of_all(mixture, tmp_path):
    data = prepare_mixture(mixture, quiet)
    (folder,) = (tmp_path / "cache").glob("web-*/")
    first, second = mixture.sources
    ready = replace(mixture, sources=(first, replace(second, path=str(folder))), tokenizer="bpe")
    assert prepare_mixture(ready, quiet).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "/nowhere.txt"}, r"^data.sources.0: data.path = /nowhere.txt: no such file"),
        ({"name": "pages"}, r"^data.sources: 0 and 1 are both called pages; give each a name$"),
        ({"kind": "pairs"}, r"^data.sources.0: .*book.txt"),
    ],
)
def test_a_source_that_cannot_be_is_named(mixture, change, said):
    first, second = mixture.sources
    with pytest.raises(UserError, match=said):
        prepare_mixture(replace(mixture, sources=(replace(first, **change), second)), quiet)


def test_a_source_without_an_example_is_named():
    parts = {"a": windows(0, 20), "b": Examples(Split(np.arange(3), None, None, 3), 4, 0)}
    with pytest.raises(UserError, match=r"^data.sources.1: data.path: nothing to train on"):
        make_batches(MixedExamples(parts, [Fraction(1, 2)] * 2), 6, 3)
    assert isinstance(make_batches(parts["a"], 6, 3), Batches)


def test_addresses_are_seen_in_every_source():
    away, here = SourceConfig(1, path=("a.txt", "s3://b/c.txt")), SourceConfig(1, path="a.txt")
    assert has_addresses(DataConfig(sources=(here, away)))
    assert has_addresses(DataConfig(path="https://a.example/b.txt"))
    assert not has_addresses(DataConfig(sources=(here,))) and not has_addresses(DataConfig())
