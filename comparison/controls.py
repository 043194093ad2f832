"""Whether what was trained is right: what the controls show, and the checks.

Sections of `comparison.report`: lists of blocks, paragraphs and tables.
"""

import math
import operator

from comparison.markdown import NONE, count, figure, plain, table
from comparison.results import JobResults, tenths
from comparison.trainers import LABELS

MEASURES = (
    "A wrong gradient is set beside the right one, that of the Python engine at the same weights, "
    "in two figures. Cosine: of the angle between the two, 1 in the same direction, 0 with nothing "
    "in common. Relative error: the length of their difference over that of the right gradient, 0 "
    "when exact."
)
WORDS = {
    "random": "**Random gradients**: a port that leaves the backward pass out. Its forward pass is "
    "right, and Adam is given dice, from which nothing can be learned. The dice have one size for "
    "all parameters, so that the error is large where the right gradient is small.",
    "stack": "**Stack order**: a backward pass that visits the nodes of the graph as an iterative "
    "stack hands them out. A node may then be taken from the stack before the last of its users "
    "has contributed, and what a later user adds never goes further. Whether that happens depends "
    "on the order in which inputs were pushed: with `h = 2w`, this walk gives `h*3 + h` the "
    "gradient dw = 2 in place of 8, and `h + h*3` the right 8, by luck. So which matrices come out "
    "right is an accident of the graph. Right is any order in which a node comes after all its "
    "users, such as creation reversed. Speed figures of microGPT ports reached with such gradients "
    "are not figures of training.",
}
GRAPHS = {"vector": "a node for each operation on a vector", "scalar": "a node for each + and *"}
PUSHED = {"": "in order", "reversed": "in reverse order"}
EXACT = 1e-9  # up to such a relative error a gradient is right


def controls(part: JobResults) -> list[str]:
    """What wrong gradients look like."""
    if not part.controls:
        return []
    rows = [
        [LABELS[e], *(f"{loss:.4f}" for loss in tenths(result))]
        for e, result in part.trained.items()
        if part.whole(result)
    ]
    guess = math.log(part.job.config.model.vocab_size)
    words = f"A guess that gives all tokens the same chance costs {guess:.4f}."
    stack = part.controls.get("stack")
    if stack and part.whole(stack) and operator.gt(*tenths(stack)):
        words += " The loss of the stack order falls too: only its gradients show what is wrong."
    head = ["engine", "mean loss of the first tenth of the steps", "of the last tenth"]
    blocks = [*([table(head, rows)] if rows else []), words, MEASURES]
    for engine, result in part.controls.items():
        blocks += [WORDS[engine], *gradients(engine, result["cosines"])]
    return blocks


def gradients(engine: str, cosines: dict) -> list[str]:
    """A table of a control's first gradients for each order in which inputs were pushed."""
    orders, blocks = {}, []
    for key in dict.fromkeys(key for at in cosines.values() for key in at):
        orders.setdefault(key.partition(" ")[2], []).append(key)
    for order, keys in orders.items():
        graphs = [GRAPHS.get(key.partition(" ")[0], key) for key in keys]
        if engine == "stack":
            lines = [f"Inputs pushed {PUSHED.get(order, order)}."]
            for key, graph in zip(keys, graphs, strict=True):
                right = [plain(n) for n, at in cosines.items() if at[key]["error"] < EXACT]
                listed = f": {', '.join(right)}" if right else ""
                which = f"{len(right)} of {len(cosines)} gradients are right{listed}."
                lines.append(f"With {plain(graph)} {which}")
            blocks.append(" ".join(lines))
        head = ["gradient of the first step"]
        for graph in graphs:
            head += [f"{graph}: cosine", "relative error"]
        rows = [
            [name, *(f"{at[key][what]:.4f}" for key in keys for what in ("cosine", "error"))]
            for name, at in cosines.items()
        ]
        blocks.append(table(head, rows))
    return blocks


def correctness(part: JobResults) -> list[str]:
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
    head = ["", *map(LABELS.__getitem__, engines), "at most"]
    return [f"Measured after training. {verdict}", table(head, [*rows, [*row, "below 0"]])]
