"""Nearest neighbours against the formula, BLEU against sacrebleu, intervals against theory."""

import math
import subprocess
import sys

import numpy as np
import pytest

from evaluation.similarity import Neighbours, bleu_counts, corpus_bleu, features, interval
from tests.helpers import ROOT

TEXTS = [
    "Find all files in /tmp", "find all directories", "list files", "Delete files of 5 days",
    "count the lines of a file", "print the 5 largest files", "list files", "", "!!",
]  # fmt: skip


def brute_force(query: str) -> np.ndarray:
    """The sum of both cosines with each of TEXTS, by the formula on dense vectors."""
    total = np.zeros(len(TEXTS))
    for kind in range(2):
        rows = [[*features(text)][kind] for text in TEXTS]
        names = sorted({feature for row in rows for feature in row})
        n = len(TEXTS)
        idf = [math.log((1 + n) / (1 + sum(f in row for row in rows))) + 1 for f in names]
        matrix = np.array([[row[f] for f in names] for row in rows]) * idf
        vector = np.array([[*features(query)][kind][f] for f in names]) * idf
        lengths = np.linalg.norm(matrix, axis=1) * np.linalg.norm(vector)
        total += matrix @ vector / np.where(lengths == 0, 1, lengths)
    return total


def test_neighbours_are_those_of_the_formula():
    nearest = Neighbours(TEXTS)
    for query in (*TEXTS, "find files larger than 5 days", "largest directory", "nothing alike"):
        scores = brute_force(query)
        order = sorted(range(len(TEXTS)), key=lambda i: (-round(scores[i], 6), i))
        for k in (1, 3, len(TEXTS), 20):
            assert nearest(query, k) == order[:k]
    assert nearest("list files", 2) == [2, 6]  # equal ones in their order


def test_features_are_words_and_what_stands_in_them():
    words, characters = features("ab, ab")
    assert words == {"ab": 2, ",": 1}
    assert characters == {" ab": 2, "ab ": 2, " ab ": 2, " , ": 1}


def test_a_word_is_not_copied_for_each_of_its_characters():
    """Of this one that would be many minutes."""
    code = "from evaluation.similarity import features; print(*map(len, features('x' * 3 * 10**6)))"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=100)
    assert said.split() == ["1", "9"]  # one word; of 3 to 5 characters where it begins, on, ends


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predicted = ["find . -name x", "ls -l | wc -l", "cat f", "", "a b c d e f"]
    true = ["find . -type f -name x", "ls -l | wc", "cat f", "x", "a b c x e f"]
    for characters, name in ((True, "char"), (False, "13a")):
        counts = bleu_counts(predicted, true, characters)
        theirs = sacrebleu.corpus_bleu(predicted, [true], tokenize=name).score
        assert corpus_bleu(counts.sum(0)) == pytest.approx(theirs, abs=1e-9)


def test_an_interval_is_that_of_a_mean():
    draws = np.random.default_rng(3)
    values = draws.normal(2.0, 1.0, 400)[:, None]
    low, high = interval(values)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)
    assert interval(values) == (low, high)  # drawn the same way each time
    assert interval(np.ones((5, 1))) == (1, 1)
