"""data/rng.py: a permutation as a function of the position."""

import math
import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rng import Permutation


def chi_square(counts: np.ndarray, expected: np.ndarray | float, freedom: int) -> float:
    """By how many standard deviations counts are farther from what is expected than chance is."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@given(st.integers(0, 5000), st.integers(0, 99))
def test_it_is_a_permutation(n, seed):
    assert sorted(Permutation(n, "order", seed)[np.arange(n)]) == list(range(n))


@pytest.mark.parametrize("power", [1, 2, 4, 8, 10, 16, 20])
def test_it_is_one_around_powers_of_two_and_squares(power):
    for n in (2**power - 1, 2**power, 2**power + 1):
        seen = np.zeros(n, bool)
        seen[Permutation(n, "order", 7)[np.arange(n)]] = True
        assert seen.all()


def test_a_position_is_the_same_alone_and_in_any_shape():
    order = Permutation(10**10, "order", 7)
    positions = np.array([[0, 5, 10**10 - 1], [123456789, 2**33, 0]])
    found = order[positions]
    assert found.dtype == np.int64 and found.shape == (2, 3) and len(order) == 10**10
    assert (found >= 0).all() and (found < 10**10).all()
    for position, number in zip(positions.flat, found.flat, strict=True):
        assert order[np.array([position])].tolist() == [number]


def test_it_is_the_same_on_every_machine_and_version():
    assert Permutation(10, "order", 7)[np.arange(10)].tolist() == [6, 9, 1, 4, 2, 3, 8, 0, 5, 7]
    assert Permutation(10**12, "order", 7)[np.arange(3)].tolist() == [
        697412636418,
        95384367248,
        7432050083,
    ]


def test_its_memory_does_not_grow_with_n():
    tracemalloc.start()
    Permutation(10**18, "order", 7)[np.arange(10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_each_order_of_a_few_is_equally_likely(n):
    draws = 6000
    found = Counter(tuple(Permutation(n, "order", s)[np.arange(n)].tolist()) for s in range(draws))
    counts = np.array([found[order] for order in permutations(range(n))])
    assert abs(chi_square(counts, draws / len(counts), len(counts) - 1)) < 4


@pytest.mark.parametrize("n", [7, 16, 30, 100, 1000])
def test_places_and_neighbours_are_those_of_chance(n):
    draws = 1500
    rows = np.array([Permutation(n, "order", s)[np.arange(n)] for s in range(draws)])
    bins = min(n, 20)
    block = np.arange(n) * bins // n
    landed = np.zeros((bins, bins))
    np.add.at(landed, (np.broadcast_to(block, rows.shape), block[rows]), 1)
    size = np.bincount(block)
    assert abs(chi_square(landed, draws * np.outer(size, size) / n, (bins - 1) ** 2)) < 4
    steps = np.bincount(((rows[:, 1:] - rows[:, :-1]) % n).ravel(), minlength=n)[1:]
    assert abs(chi_square(steps, steps.mean(), n - 2)) < 4
    # two orders, of two epochs or of two seeds, have no more in common than any two: one place
    common = (rows[1:] == rows[:-1]).sum(1)
    assert abs(common.mean() - 1) < 4 / math.sqrt(draws)
