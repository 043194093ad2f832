"""Answers without a model, to be better than: those of the nearest prompts, and the most frequent.

They can also join a model's answers as candidates, put in order by minimum Bayes risk.
"""

from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

from data.slots import Slots, readable
from data.sources.records import Pair
from evaluation.answers import Choose
from evaluation.commands import nlc2cmd
from evaluation.scores import Kind
from evaluation.similarity import Neighbours
from generation import rerank


def look_ups(
    prompts: Sequence[str], known: Sequence[Pair], count: int, slots: bool
) -> dict[str, list[list[str]]]:
    """What is answered without a model: the nearest prompts' answers, and the most frequent.

    With slots also the answers of the prompts nearest without their arguments, with those of the
    prompt in their place.
    """
    found = {"nearest neighbour": nearest(prompts, known, count, False)}
    if slots:
        found["nearest, its slots filled"] = nearest(prompts, known, count, True)
    frequent = [text for text, _ in Counter(text for _, text in known).most_common(count)]
    return found | {"most frequent": [frequent] * len(prompts)}


def nearest(
    prompts: Sequence[str], known: Sequence[Pair], count: int, slots: bool
) -> list[list[str]]:
    """Up to `count` different answers for each prompt, those of the nearest ones that are known."""
    neighbours = Neighbours([readable(Slots(prompt, slots).prompt) for prompt, _ in known])
    answers = []
    for prompt in tqdm(prompts, desc="look-up", unit="prompt", leave=False, disable=None):
        own, found = Slots(prompt, slots), {}
        for i in neighbours(readable(own.prompt), 4 * count):
            its_prompt, its_answer = known[i]
            found[own.show(Slots(its_prompt, slots).hide(its_answer))] = True
        answers.append([*found][:count])
    return answers


def chooser(near: Sequence[Sequence[str]], kind: Kind, count: int) -> Choose:
    """What orders a model's answers, and those of neighbours, by minimum Bayes risk.

    near: what the neighbours of each prompt are answered with, the nearest first; together they
    have the weight of all the model's, by their ranks.
    """

    def choose(number: int, texts: list[str], shares: list[float]) -> list[str]:
        others = near[number]
        ranks = [1 / rank for rank in range(1, len(others) + 1)]
        shares = shares + [sum(shares) * share / sum(ranks) for share in ranks]
        return rerank.choose([*texts, *others], shares, count, utility(kind))

    return choose


def utility(kind: Kind) -> rerank.Utility:
    """How alike two answers are, 0 to 1: by their words, and for Bash by what they call, too."""
    if kind != "bash":
        return rerank.likeness
    return lambda a, b: (rerank.likeness(a, b) + (1 + nlc2cmd(a, b)) / 2) / 2
