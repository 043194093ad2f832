"""How alike texts are: the nearest neighbour by tf-idf, BLEU, and how sure a mean is."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import numpy as np

GRAMS = (3, 4, 5)  # characters in a row, blanks at both ends of a word counted
SAMPLES = 1000  # of a bootstrap
CONFIDENCE = 0.95


# The nearest neighbour ----------------------------------------------------------------------------


def features(text: str) -> Iterable[Counter]:
    """How often a text has each word, and each few characters of a word."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    yield Counter(words)
    yield Counter(
        word[i : i + n]
        for word in (f" {word} " for word in words)
        for n in GRAMS
        for i in range(len(word) + 1 - n)
    )


class Neighbours:
    """Texts among which those nearest to another are found: by the cosine of tf-idf vectors.

    The mean of two cosines, one of words and one of characters (Salton and Buckley 1988; idf as
    scikit-learn smooths it). Ties go to the earlier text. Memory: 12 bytes for each word and each
    few characters of a text.
    """

    def __init__(self, texts: Sequence[str]):
        self.count = len(texts)
        counted = [[*features(text)] for text in texts]
        self.indices = [TfIdf([row[kind] for row in counted]) for kind in range(2)]

    def __call__(self, text: str, k: int) -> list[int]:
        """The numbers of the k nearest texts, nearest first."""
        scores = np.zeros(self.count, np.float32)
        for index, counts in zip(self.indices, features(text), strict=True):
            index.add_cosines(counts, scores)
        k = min(k, self.count)
        nearest = np.argpartition(-scores, k - 1)[:k] if k < self.count else np.arange(k)
        least = scores[nearest].min()
        nearest = np.flatnonzero(scores >= least)  # and all that tie with the last of them
        return nearest[np.argsort(-scores[nearest], kind="stable")][:k].tolist()


class TfIdf:
    """An inverted index: for each feature the texts that have it, with their weights."""

    def __init__(self, rows: Sequence[Counter]):
        frequency = Counter(feature for row in rows for feature in row)
        self.idf = {f: math.log((1 + len(rows)) / (1 + n)) + 1 for f, n in frequency.items()}
        postings: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for number, row in enumerate(rows):
            for feature, weight in self.weigh(row).items():
                places, weights = postings[feature]
                places.append(number)
                weights.append(weight)
        self.postings = {
            feature: (np.array(places, np.int64), np.array(weights, np.float32))
            for feature, (places, weights) in postings.items()
        }

    def weigh(self, row: Counter) -> dict[str, float]:
        """A vector of length 1; features that no text has are left out."""
        weights = {f: n * self.idf[f] for f, n in row.items() if f in self.idf}
        length = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {feature: weight / length for feature, weight in weights.items()}

    def add_cosines(self, row: Counter, scores: np.ndarray):
        """Adds the cosine with each text to `scores` (N,)."""
        for feature, weight in self.weigh(row).items():
            places, weights = self.postings[feature]
            scores[places] += weight * weights


# BLEU ---------------------------------------------------------------------------------------------


def bleu_counts(predicted: Sequence[str], true: Sequence[str], characters: bool) -> np.ndarray:
    """What BLEU is made of, for each text: (N, 10) n-grams found and had, and both lengths.

    sacrebleu's (Post 2018), of its words or of characters.
    """
    from sacrebleu.metrics.bleu import BLEU  # which few need

    metric = BLEU(tokenize="char" if characters else "13a", effective_order=True)
    rows = []
    for text, reference in zip(predicted, true, strict=True):
        score = metric.sentence_score(text, [reference])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, np.int64).reshape(-1, 10)


def corpus_bleu(counts: np.ndarray) -> float:
    """BLEU, 0 to 100, of summed counts (10,), as sacrebleu smooths it by default."""
    from sacrebleu.metrics.bleu import BLEU

    found, had, lengths = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return BLEU.compute_bleu(found, had, *lengths, smooth_method="exp").score


def has_sacrebleu() -> bool:
    """Whether it is installed."""
    return find_spec("sacrebleu") is not None


# How sure a mean is -------------------------------------------------------------------------------


def interval(values: np.ndarray, statistic=lambda sums, n: sums[:, 0] / n) -> tuple[float, float]:
    """Between which values a statistic lies with 95 % confidence, by the bootstrap (Efron 1979).

    values: (N, K), what is summed over examples. statistic: of sums (S, K) and N to (S,), by
    default the mean. The examples drawn are always the same.
    """
    N, draws = len(values), np.random.default_rng(0)
    sums = np.stack([values[draws.integers(0, N, N)].sum(0) for _ in range(SAMPLES)])
    low, high = np.quantile(statistic(sums, N), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
