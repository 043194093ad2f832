"""generation/rerank.py: the answer most like the others, then the ones that add most to it."""

from itertools import combinations

import pytest

from generation.rerank import choose, likeness, weights

TEXTS = ["find . -name a", "find . -name a -print", "ls -l", "find / -name a", "ls -l | sort"]
SHARES = [0.15, 0.2, 0.3, 0.2, 0.15]


def test_likeness_is_of_words_and_of_pairs_of_them():
    assert likeness("", "") == likeness("a b", "a  b") == 1.0
    assert likeness("a", "b") == likeness("", "b") == 0.0
    assert likeness("a b c", "a b d") == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert likeness("ls", "ls -l") == pytest.approx((2 / 4 + 0) / 2)
    assert likeness("ls -l", "ls") == likeness("ls", "ls -l")


def test_weights_are_probabilities():
    assert weights([-1.0, -1.0, -2000.0]) == [0.5, 0.5, 0.0]
    assert weights([]) == []


def test_the_first_has_the_least_risk_and_is_not_the_most_probable():
    """Against the definition, computed in full."""
    expected = {
        a: sum(w * likeness(a, b) for b, w in zip(TEXTS, SHARES, strict=True)) for a in TEXTS
    }
    first = choose(TEXTS, SHARES, 1)
    assert first == [max(TEXTS, key=expected.__getitem__)] != ["ls -l"]


def test_five_that_say_the_same_are_one_guess():
    """The two chosen are at most 1 - 1/e worse than the best two (Nemhauser et al. 1978)."""

    def value(chosen):
        return sum(
            w * max(likeness(a, b) for a in chosen) for b, w in zip(TEXTS, SHARES, strict=True)
        )

    two = choose(TEXTS, SHARES, 2)
    assert {text.split()[0] for text in two} == {"find", "ls"}
    assert value(two) >= 0.63 * max(map(value, combinations(TEXTS, 2)))
    everything = choose([*TEXTS, TEXTS[0]], [*SHARES, 0.1], 9)
    assert sorted(everything) == sorted(TEXTS) and everything[:2] == choose(
        TEXTS, [0.25, *SHARES[1:]], 2
    )


def test_equal_ones_keep_their_order():
    assert choose(["a", "b", "c"], [0.2, 0.4, 0.4], 3) == ["b", "c", "a"]
    assert choose([], [], 5) == []
    assert choose(["x y", "x z"], [0.5, 0.5], 2, utility=lambda a, b: float(a == b)) == [
        "x y",
        "x z",
    ]
