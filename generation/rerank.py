"""Several answers put in order by minimum Bayes risk: first the one most like all the others.

    choose(["find . -name x", "find / -name x", "ls"], [0.4, 0.4, 0.2], 2)

A model's most probable text need not be a likely one: a hundred others may say the same in other
words. So each answer counts as what the true one might be, with its probability, and the one is
taken that is most like them on average (Kumar and Byrne 2004). Standard library only.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from data.slots import Slots

Utility = Callable[[str, str], float]  # how alike two texts are, 0 to 1


def likeness(a: str, b: str) -> float:
    """F1 of the words that two texts share, and of the pairs of neighbouring words: their mean."""
    first, second = (re.findall(r"\w+|[^\w\s]", text) for text in (a, b))
    scores = [f1(Counter(first), Counter(second))]
    if len(first) > 1 or len(second) > 1:
        scores.append(f1(Counter(pairwise(first)), Counter(pairwise(second))))
    return sum(scores) / len(scores)


def f1(a: Counter, b: Counter) -> float:
    """2 |A and B| / (|A| + |B|), 1 of two empty ones."""
    size = a.total() + b.total()
    return 2 * (a & b).total() / size if size else 1.0


def weights(scores: Sequence[float]) -> list[float]:
    """Probabilities of texts by their log probabilities, which add up to 1."""
    most = max(scores, default=0.0)
    found = [math.exp(score - most) for score in scores]
    return [weight / sum(found) for weight in found]


def shares(texts: Sequence[str], totals: Sequence[float], slots: Slots) -> list[float]:
    """The weights of a model's texts, which it has found with these log probabilities.

    Square roots of probabilities, because a model is surer than it is right; and half of that for
    a text with a placeholder that the prompt lacks.
    """
    pairs = zip(texts, weights([total / 2 for total in totals]), strict=True)
    return [weight / 2 if slots.lacks(text) else weight for text, weight in pairs]


def choose(
    texts: Sequence[str], weights: Sequence[float], count: int, utility: Utility = likeness
) -> list[str]:
    """The `count` different texts one of which is most like the true answer, the best guess first.

    weights: how probable each is to be the true one; of equal texts they are added. Each further
    text is the one by which the best of all those chosen gains the most, on average: five texts
    that say the same are but one guess. Of equal ones the earlier comes first.
    """
    probability: dict[str, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        probability[text] = probability.get(text, 0.0) + weight
    alike = {text: [utility(text, true) for true in probability] for text in probability}
    best, chosen = [0.0] * len(probability), []
    while len(chosen) < min(count, len(probability)):
        left = [text for text in probability if text not in chosen]
        gains = {
            text: sum(
                p * max(have, new)
                for p, have, new in zip(probability.values(), best, alike[text], strict=True)
            )
            for text in left
        }
        chosen.append(max(left, key=gains.__getitem__))
        best = [max(pair) for pair in zip(best, alike[chosen[-1]], strict=True)]
    return chosen
