"""Whether what was trained is right: what the controls show, and the checks.

Sections of `comparison.report`: lists of blocks, paragraphs and tables.
"""

import math

from comparison.part import Part, tenths
from comparison.text import NONE, count, figure, plain, table
from comparison.trainers import LABELS

GRAPHS = {"vector": "each operation on a vector", "scalar": "each + and *"}


def controls(part: Part) -> list[str]:
    """What wrong gradients look like."""
    blocks = []
    if part.controls:
        head = ["engine", "mean loss of the first tenth of the steps", "of the last tenth"]
        rows = [
            [LABELS[e], *(f"{loss:.4f}" for loss in tenths(result))]
            for e, result in part.trained.items()
            if part.whole(result)
        ]
        guess = math.log(part.job.config.model.vocab_size)
        blocks += [
            table(head, rows),
            f"A guess that gives all tokens the same chance costs {guess:.4f}.",
        ]
    for engine, result in part.controls.items():
        cosines = result["cosines"]
        blocks += [WORDS[engine], *(exactly(cosines) if engine == "stack" else [])]
        head = ["gradient of the first step"]
        for what in GRAPHS.values():
            head += [f"a node for {what}: cosine", "relative error"]
        rows = [
            [name, *(f"{at[size][k]:.4f}" for size in GRAPHS for k in ("cosine", "error"))]
            for name, at in cosines.items()
        ]
        blocks.append(table(head, rows))
    return blocks


WORDS = {
    "random": "**Random gradients**: a port that leaves the backward pass out. Its forward pass is "
    "right, and Adam is given dice, from which nothing can be learned. Cosine: of the angle to the "
    "right gradient, 1 in the same direction, 0 with nothing in common. Relative error: the length "
    "of the difference over that of the right gradient, 0 when exact.",
    "stack": "**Stack order**: a backward pass that takes the nodes of the graph as an iterative "
    "stack hands them out. A node then passes its gradient on before all its users have given it "
    "theirs, and what those add later never reaches what stands in front of it. Right is any order "
    "in which a node comes after all its users, such as creation reversed. The 20.6 s of Python "
    "and the 1.48 s of Rust in the comparison by hand were reached with such gradients.",
}


def exactly(cosines: dict) -> list[str]:
    """Which of the stack order's gradients are right."""
    line = "How a reader sees it: the loss falls all the same, so look at the gradients."
    for size, what in GRAPHS.items():
        right = [plain(name) for name, at in cosines.items() if at[size]["error"] < 1e-9]
        line += f" With a node for {plain(what)} {len(right)} of {len(cosines)} are right"
        line += f": {', '.join(right)}, behind everything else." if right else "."
    return [line]


def correctness(part: Part) -> list[str]:
    """Each check in each engine: what was measured, and a mark where that is too much."""
    engines = {e: r for e, r in part.proper.items() if "checks" in r}
    found = {}
    for engine, result in engines.items():
        for check in result["checks"]:
            found.setdefault(check["name"], {})[engine] = check
    failed, rows = 0, []
    for name, checks in found.items():
        row = [name]
        for engine in engines:
            check = checks.get(engine)
            row.append(NONE if check is None else figure(check["value"], 2))
            if check and check["of"]:
                row[-1] += f" of {check['of']:,}"
            if check and not check["value"] <= check["limit"]:  # NaN fails
                row[-1] += " FAILS"
                failed += 1
        limits = dict.fromkeys(figure(check["limit"], 1) for check in checks.values())
        rows.append([*row, " / ".join(limits)])
    row = ["loss falls: mean of the last tenth of the steps minus the first"]
    for result in engines.values():
        first, last = tenths(result)
        row.append(f"{last - first:.4f}" if part.whole(result) else "stopped early")
        if part.whole(result) and not last < first:
            row[-1] += " FAILS"
            failed += 1
    if not rows:
        return []
    verdict = f"{count(failed, 'check')} failed." if failed else "All checks passed."
    head = ["", *map(LABELS.get, engines), "at most"]
    return [f"Measured after training. {verdict}", table(head, [*rows, [*row, "below 0"]])]
