"""What answers are measured by, for each kind of answer, and the table of it."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np

from evaluation import commands, signatures
from evaluation.similarity import bleu_counts, corpus_bleu, interval

Kind = str  # "bash", "python" or "text"
PYTHON = re.compile(r"(async )?def \w+\(")


@dataclass(frozen=True)
class Score:
    """A measure over all examples, with the interval in which it lies with 95 % confidence."""

    value: float
    low: float
    high: float
    digits: int = 3
    """Shown behind the point."""

    def __str__(self) -> str:
        value, low, high = (f"{x:.{self.digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"


# for each kind of answer: measures of a predicted and a true answer, and those of the predicted one
PAIRED: dict[Kind, dict[str, Callable[[str, str], float]]] = {
    "bash": {
        "exact match": commands.exact_match,
        "template match": commands.template_match,
        "NLC2CMD": commands.nlc2cmd,
        "NLC2CMD, aligned": commands.nlc2cmd_aligned,
    },
    "python": {
        "exact match": commands.exact_match,
        "name match": signatures.name_match,
        "argument F1": signatures.argument_f1,
    },
    "text": {"exact match": commands.exact_match},
}
ALONE: dict[Kind, dict[str, Callable[[str], float]]] = {
    "bash": {"bash -n": commands.bash_parses},
    "python": {"parses": lambda answer: signatures.parse(answer) is not None},
    "text": {},
}


def kind_of(answers: Sequence[str], *names: str) -> Kind:
    """What answers are: by the names of their data and of the training data, or as most look."""
    if any(name.startswith("nl2bash") for name in names):
        return "bash"
    looks = Counter(
        "python" if PYTHON.match(a) else "bash" if commands.looks_like_command(a) else "text"
        for a in answers
    )
    return next((kind for kind, n in looks.items() if 2 * n > len(answers)), "text")


def measure(
    kind: Kind, answers: Sequence[Sequence[str]], true: Sequence[str], bleu: bool = True
) -> dict[str, Score]:
    """The scores of several answers to each prompt, the best first, by name.

    The first alone counts; in those that end in "top-N", for N answers, the best of them.
    """
    first = [several[0] for several in answers]
    most = max(map(len, answers))
    found = {}
    for name, score in PAIRED[kind].items():
        found[name] = mean([score(*pair) for pair in zip(first, true, strict=True)])
        if most > 1:
            best = best_of(score)
            if name.startswith("NLC2CMD"):
                best = partial(commands.nlc2cmd_best, score=score)
            values = [best(several, t) for several, t in zip(answers, true, strict=True)]
            found[f"{name}, top-{most}"] = mean(values)
    for characters in (True, False) if bleu else ():
        counts = bleu_counts(first, true, characters)
        low, high = interval(counts, lambda sums, _: np.array([*map(corpus_bleu, sums)]))
        name = "char-BLEU" if characters else "BLEU"
        found[name] = Score(corpus_bleu(counts.sum(0)), low, high, digits=1)
    for name, check in ALONE[kind].items():
        if check is commands.bash_parses and not commands.has_bash():
            continue
        known = {answer: check(answer) for answer in dict.fromkeys(first)}
        found[name] = mean([known[answer] for answer in first])
    return found


def best_of(score: Callable[[str, str], float]) -> Callable[[Sequence[str], str], float]:
    """A measure of several answers: that of the best one."""
    return lambda several, true: max(score(answer, true) for answer in several)


def mean(values: Sequence[float]) -> Score:
    """A mean with its interval."""
    array = np.array(values, np.float64)[:, None]
    return Score(float(array.mean()), *interval(array))


def table(columns: dict[str, dict[str, Score]]) -> str:
    """Scores by what was measured, side by side, for people."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    rows = [["", *columns]]
    rows += [
        [n, *(str(scores[n]) if n in scores else "" for scores in columns.values())] for n in names
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# Side by side -------------------------------------------------------------------------------------


def side_by_side(prompts: Sequence[str], true: Sequence[str], answers: Sequence[str]) -> str:
    """Examples as a table in Markdown, the words in which two answers differ in bold."""
    lines = ["| prompt | true | answer |", "|---|---|---|"]
    for prompt, wanted, answer in zip(prompts, true, answers, strict=True):
        lines.append(f"| {escape(prompt)} | {' | '.join(marked(wanted, answer))} |")
    return "\n".join(lines) + "\n"


def marked(a: str, b: str) -> list[str]:
    """Two texts word by word, runs in bold that the other does not have in this place."""
    from difflib import SequenceMatcher

    words = a.split(), b.split()
    same: tuple[set[int], set[int]] = set(), set()
    for block in SequenceMatcher(None, *words, autojunk=False).get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    sides = []
    for side, kept in zip(words, same, strict=True):
        runs = groupby(range(len(side)), kept.__contains__)
        marks = [("" if has else "**", " ".join(side[i] for i in run)) for has, run in runs]
        sides.append(" ".join(f"{mark}{code(run)}{mark}" for mark, run in marks))
    return sides


def code(text: str) -> str:
    """Words as code in a table: with as many backticks as they need, and no bare |."""
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return ticks + space + text.replace("|", "\\|") + space + ticks


def escape(text: str) -> str:
    """Text in a table of Markdown that is shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$!])", r"\\\1", " ".join(text.split()))
