"""What the engines wrote after training, and how much of it stands in the data.

section(part)    a section of `comparison.report`: a list of blocks, paragraphs and tables
"""

from collections.abc import Sequence

from comparison.job import prompts
from comparison.markdown import NONE, count, figure, plain, table
from comparison.results import JobResults
from comparison.trainers import LABELS
from data.prepared.token_files import Split

WIDE = 100  # samples whose columns have up to so many characters together stand side by side
DOCUMENT = {"lines": "line", "pairs": "completion"}


def section(part: JobResults) -> list[str]:
    """Who wrote the same, what of it is new, how fast it was written, and the texts."""
    if not part.trained:
        return []
    texts = {e: tuple(map(part.job.text, r["samples"])) for e, r in part.trained.items()}
    whole = ended(part)
    words = "Each engine writes with the weights it trained, and the same random numbers."
    if len(whole) > 1:
        rows = list(zip(*(texts[e] for e in whole), strict=True))
        same = sum(len(set(row)) == 1 for row in rows)
        words += (
            f" The {len(whole)} engines that trained to the end, controls apart, wrote the same "
            f"text in {same} of {len(rows)}."
        )
    return [words, *novelty(part), *side_by_side(part, texts)]


def ended(part: JobResults) -> list[str]:
    """The engines proper that trained to the end."""
    return [engine for engine, result in part.proper.items() if part.whole(result)]


def novelty(part: JobResults) -> list[str]:
    """How many samples are in the data, and how fast they were written."""
    data, rows = part.job.dataset, []
    for engine, result in part.trained.items():
        written, limit = result["samples"], part.job.config.sample.max_new_tokens
        tokens = sum(len(ids) + (len(ids) < limit) for ids in written)  # an end is chosen as well
        seen = [holds(data.train, ids) for ids in written]
        unseen = [not s and holds(data.val, ids) for s, ids in zip(seen, written, strict=True)]
        cells = [sum(seen), sum(unseen), len(written) - sum(seen) - sum(unseen)]
        rows.append(
            [names(part, [engine]), *map(str, cells), figure(tokens / result["generate_s"])]
        )
    speed = "generation after training [tokens/s]"
    timed = "PyTorch generates all samples at once, the others one after the other."
    if data.train.starts is None:  # of whose tokens a sample is any part
        return [timed, table(["engine", speed], [[row[0], row[-1]] for row in rows])]
    document = DOCUMENT[data.kind]
    words = (
        f"Counted are the samples that are, token by token, a whole {document} of the training "
        f"data, or one of the held-out data, which no engine was shown, or neither. {timed}"
    )
    if data.val is None:
        rows = [[name, seen, NONE, *rest] for name, seen, _, *rest in rows]
    head = ["engine", "in the training data", "in the held-out data", "in neither", speed]
    return [words, table(head, rows)]


def holds(split: Split | None, ids: Sequence[int]) -> bool:
    """Whether the ids are all that a document of the split has between its start and its end."""
    if split is None or split.starts is None:
        return False
    begins = split.starts[:-1] + split.prompts  # the start is counted as a part of the prompt
    places = begins[split.starts[1:] - begins == len(ids) + 1]
    for i, token in enumerate(ids):
        places = places[split.ids[places + i] == token]
    return len(places) > 0


def side_by_side(part: JobResults, texts: dict[str, tuple[str, ...]]) -> list[str]:
    """Every sample, and equal ones once: short ones in a table, long ones under each other."""
    whole = ended(part)
    order = [*whole, *(engine for engine in texts if engine not in whole)]
    columns = {}
    for engine in order:
        columns.setdefault(texts[engine], []).append(engine)
    asked = prompts(part.job.dataset)
    longest = max((len(text) for wrote in columns for text in wrote), default=0)
    if longest * len(columns) <= WIDE and not any(asked):
        rows = [[str(i), *map(shown, row)] for i, row in enumerate(zip(*columns, strict=True), 1)]
        return [table(["", *(names(part, who) for who in columns.values())], rows)]
    blocks = []
    for i in range(len(texts[order[0]])):
        by = {}
        for engine in order:
            by.setdefault(texts[engine][i], []).append(engine)
        lines = [f"- {plain(names(part, who))}: {plain(shown(text))}" for text, who in by.items()]
        prompt = f", after: {plain(asked[i])}" if asked[i] else ""
        blocks += [f"Sample {i + 1}{prompt}", "\n".join(lines)]
    return blocks


def shown(text: str) -> str:
    """A sample, visible also where nothing was written."""
    return text or "(empty)"


def names(part: JobResults, engines: list[str]) -> str:
    """Engines for people; all that trained to the end together in one word."""
    whole, found = ended(part), []
    if len(whole) > 1 and engines[: len(whole)] == whole:
        found, engines = (
            [f"all {len(whole)} engines that trained to the end"],
            engines[len(whole) :],
        )
    for engine in engines:
        result = part.results[engine]
        early = "" if part.whole(result) else f" ({count(result['steps'], 'step')})"
        found.append(LABELS[engine] + early)
    return "; ".join(found)
