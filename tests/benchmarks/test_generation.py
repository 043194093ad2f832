"""Generating beside transformers, on a tiny model: what runs on a GPU, all but the GPU."""

import pytest

from benchmarks import generation
from benchmarks.generation import Task, beside, measure, measure_apart

TINY = Task("tiny", batches=(1, 3), new=9)


def test_a_side_is_measured_in_a_process_of_its_own():
    found = measure_apart("ours", "bf16", TINY, seconds=120)
    assert found["1"] > 0 and found["3"] > 0 and found["parameters"] > 1000


def test_a_side_that_fails_or_takes_too_long_says_so():
    assert measure_apart("ours", "bf16", TINY, seconds=0.01) == {"error": "more than 0.01 s"}
    assert "KeyError" in measure_apart("ours", "fp7", TINY, seconds=120)["error"]


@pytest.mark.parametrize("side", generation.SIDES)
def test_both_sides_write_as_many_tokens(side):
    found = measure(side, "fp32", TINY)
    assert found["1"] > 0 and found["first call 3"] > 0 and "graphs" not in found


def test_the_table_leaves_out_what_failed(monkeypatch):
    """Here in this process, for speed."""

    def here(side, precision, task, seconds):
        if side == "transformers-static":
            return {"error": "no compiler"}
        return measure(side, precision, task)

    monkeypatch.setattr(generation, "measure_apart", here)
    result = beside(TINY, rounds=1, seconds=1)
    assert [table["title"][-10:] for table in result.tables] == [", top_k 50", "all tokens"]
    for table in result.tables:
        sides = [(row[0], row[1]) for row in table["rows"]]
        assert sides == [(s, b) for b in ("1", "3") for s in ("ours", "transformers")]
        assert [row[4] for row in table["rows"]][1::2] == ["1.00", "1.00"]
        assert "transformers, static cache: no compiler." in table["note"]
    assert result.claims == []  # which are of a GPU
