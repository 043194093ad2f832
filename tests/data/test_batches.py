"""data/batches.py: every example exactly once an epoch, however it is cut."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.batches import Batches, Examples, evaluation_batches
from data.prepared.token_files import Split


def stream(n: int) -> Split:
    return Split(np.arange(n, dtype=np.uint16), None, None, n)


def documents(shapes: list[tuple[int, int]]) -> Split:
    """Documents of (prompt, completion) ids each; every id in the file is different."""
    lengths = [p + 1 + c + 1 for p, c in shapes]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    prompts = np.array([p + 1 for p, _ in shapes], np.int32)
    return Split(np.arange(starts[-1], dtype=np.uint32), starts, prompts, 1)


def epoch_targets(batches: Batches, epoch: int, accumulation: int, processes: int) -> list[int]:
    """All targets that all processes see in an epoch."""
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    seen = []
    for step in steps:
        of_step = []
        for process in range(processes):
            micro_batches = batches(step, accumulation, process, processes)
            assert len(micro_batches) <= accumulation // processes
            for batch in micro_batches:
                of_step += batch.targets.tolist()
        assert len(of_step) == batches.target_count(step)
        seen += of_step
    return seen


@settings(deadline=None, max_examples=60)
@given(
    st.integers(9, 400), st.integers(1, 8), st.integers(1, 20), st.integers(1, 4),
    st.integers(1, 4), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_a_stream_in_epochs(n, seq_len, batch_size, share, processes, epoch, seed):
    batches = Batches(Examples(stream(n), seq_len, 0), batch_size, seed)
    seen = epoch_targets(batches, epoch, share * processes, processes)
    assert len(seen) == len(set(seen)), "a token is predicted twice"
    assert max(seen) < n
    assert len(seen) > n - 1 - 2 * seq_len, "too much is left out"
    for batch in batches(epoch * batches.steps_per_epoch):
        np.testing.assert_array_equal(batch.ids.reshape(-1) + 1, batch.targets)
        assert batch.target_indices is None


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=80),
    st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
def test_documents_in_epochs(shapes, batch_size, share, processes, epoch, seed):
    split = documents(shapes)
    examples = Examples(split, 12, 0)
    fit = [i for i, (p, c) in enumerate(shapes) if p + 1 + c <= 12]
    assert examples.dropped == len(shapes) - len(fit)
    if not fit:
        with pytest.raises(UserError, match="no example fits"):
            Batches(examples, batch_size, seed)
        return
    batches = Batches(examples, batch_size, seed)
    seen = epoch_targets(batches, epoch, share * processes, processes)
    # the targets are the ids after <start>: completion and <end>, and nothing of the prompt
    expected = [
        t for i in fit for t in range(split.starts[i] + split.prompts[i], split.starts[i + 1])
    ]
    assert sorted(seen) == expected


def test_positions_point_at_the_token_before_the_target():
    split = documents([(3, 4), (0, 2), (5, 1)])
    (batch,) = Batches(Examples(split, 20, 0), 3, 0)(0)
    flat = batch.ids.reshape(-1)
    np.testing.assert_array_equal(flat[batch.target_indices] + 1, batch.targets)


def test_batches_depend_on_seed_and_step_alone():
    def first(seed, step, warm=()):
        batches = Batches(Examples(stream(1000), 8, 0), 5, seed)
        for other in warm:
            batches(other)
        return batches(step)[0].ids.tolist()

    assert first(1, 30) == first(1, 30, warm=(0, 1, 99, 29))
    assert first(1, 30) != first(2, 30)
    assert first(1, 30) != first(1, 31)
    per_epoch = Batches(Examples(stream(1000), 8, 0), 5, 1).steps_per_epoch
    assert first(1, 3) != first(1, 3 + per_epoch), "two epochs in the same order"


def test_the_order_is_the_same_on_every_machine_and_version():
    batches = Batches(Examples(stream(100), 4, 0), 6, 1337)
    assert batches(0)[0].ids[:, 0].tolist() == [2, 6, 30, 46, 50, 18]
    of_earlier_runs = Batches(Examples(stream(100), 4, 0, order=1), 6, 1337)
    assert of_earlier_runs(0)[0].ids[:, 0].tolist() == [18, 26, 34, 62, 50, 42]
    pairs = Examples(documents([(3, n % 9) for n in range(40)]), 12, 0)
    assert Batches(pairs, 4, 1337).chosen(3)[0].tolist() == [9, 27, 0, 18]


def test_a_step_far_away_costs_no_more_than_the_first(tmp_path):
    tokens = 10**10
    with open(tmp_path / "ids", "wb") as file:
        file.truncate(2 * tokens)  # sparse
    ids = np.memmap(tmp_path / "ids", np.uint16, mode="r")
    tracemalloc.start()
    batches = Batches(Examples(Split(ids, None, None, tokens), 128, 0), 32, 7)
    for step in (0, 10**9, 10**9 + 1):
        assert batches(step)[0].ids.shape == (32, 128)
    (batch,) = evaluation_batches(batches.examples, 32, limit=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.ids.shape == (32, 128)
    assert peak < 10_000_000, "something is held of each of 78 million windows"


def test_a_micro_batch_is_the_same_whoever_takes_it():
    batches = Batches(Examples(stream(1000), 8, 0), 12, 1)
    (whole,) = batches(3)
    for accumulation in (2, 4, 8, 24):
        alone = batches(3, accumulation)
        np.testing.assert_array_equal(np.concatenate([b.ids for b in alone]), whole.ids)
        for processes in (2, accumulation):
            shared = [batches(3, accumulation, n, processes) for n in range(processes)]
            taken = [batch.ids.tolist() for batches_of_one in shared for batch in batches_of_one]
            assert taken == [batch.ids.tolist() for batch in alone]


def test_evaluation_sees_every_target_once():
    for n in (2, 8, 9, 10, 100):
        targets = [t for b in evaluation_batches(Examples(stream(n), 8, 0), 3) for t in b.targets]
        assert targets == list(range(1, n))
    split = documents([(3, 4), (0, 2), (5, 1), (30, 1)])
    examples = Examples(split, 20, 0)
    targets = [t for b in evaluation_batches(examples, 2) for t in b.targets]
    assert len(targets) == 5 + 3 + 2
    assert len(set(targets)) == len(targets)


def test_a_limited_evaluation_is_an_even_draw_and_always_the_same():
    split = documents([(0, i) for i in range(1, 101)])
    examples = Examples(split, 200, 0)

    def drawn(limit):
        return [t for b in evaluation_batches(examples, 8, limit) for t in b.targets]

    assert drawn(10) == drawn(10)
    assert sum(len(b.ids) for b in evaluation_batches(examples, 8, 10)) == 10
    assert 250 < len(drawn(10)) < 850, "10 of 100 documents of 2 to 101 targets, not the shortest"
    windows = Examples(stream(801), 8, 0)
    assert sum(len(b.ids) for b in evaluation_batches(windows, 3, 7)) == 7
    assert sum(len(b.ids) for b in evaluation_batches(windows, 3, 1000)) == 100


def test_like_lengths_are_batched_together():
    dice = np.random.default_rng(0)
    shapes = [(int(a), int(b)) for a, b in dice.geometric(0.05, (3000, 2)).clip(1, 60)]
    batches = Batches(Examples(documents(shapes), 128, 0), 32, 0)
    full = padded = 0
    for step in range(batches.steps_per_epoch):
        for batch in batches(step, accumulation=2):
            full += batch.ids.size
            padded += int((batch.ids == 0).sum())
    assert padded / full < 0.1


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match=r"data.path: nothing to train on: 8 tokens.*seq_len = 8"):
        Batches(Examples(stream(8), 8, 0), 1, 0)
    assert Batches(Examples(stream(9), 8, 0), 1, 0)(0)[0].targets.tolist() == list(range(1, 9))
