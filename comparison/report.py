"""What a comparison found, for people: every figure measured, or worked out from what was.

    write(folder, parts, sizes)    folder/report.md, with the pictures that lie beside it
    terminal(parts)                a short table for the end of the command

A section is a list of blocks, paragraphs and tables, between which a blank line stands.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from comparison import code_size, config_table, controls, markdown, samples
from comparison.markdown import NONE, count, duration, figure, plain, table
from comparison.results import JobResults, parts_of_a_step, step_s
from comparison.trainers import BUILT_ON, LABELS

TOKENS = 50  # for so many the table of sizes gives times


def write(folder: Path, parts: list[JobResults], sizes: list[dict]) -> Path:
    """Writes folder/report.md.

    sizes: what `comparison.generation_speed` printed, or why it was skipped.
    """
    blocks = ["# One decoder in several engines: what was measured"]
    blocks += [*markdown.picture(folder, "overview"), "## What was compared", *compared(parts)]
    for part in parts:
        name = part.job.name
        sections = {
            "results": results(part),
            "losses": markdown.picture(folder, f"losses-{name}") + losses(part),
            "samples": samples.section(part),
            "controls": controls.controls(part),
            "correctness": controls.correctness(part),
            "an epoch, and a whole training": estimates(part),
        }
        for title, found in sections.items():
            blocks += [f"## {plain(name)}: {title}", *found] if found else []
    pictures = markdown.picture(folder, "speed") + markdown.picture(folder, "memory")
    blocks += ["## Speed and memory", *pictures] if pictures else []
    if engines := code_size.columns(e for part in parts for e in part.proper):
        blocks += ["## How the engines work", *code_size.how_they_work(engines)]
        blocks += ["## Code and dependencies", *code_size.size_table(engines)]
    blocks += ["## Sizes", *by_size(sizes)] if sizes else []
    blocks += ["## Shipped configurations", *config_table.section()]
    file = folder / "report.md"
    file.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return file


def terminal(parts: list[JobResults]) -> str:
    """The results in at most 100 columns."""
    head = ["", "training [s]", "steps/s", "speed-up", "final loss", "memory [MB]", "nodes"]
    rows, notes = [], []
    for part in parts:
        rows.append([f"{part.job.name[:20]}, {part.job.steps:,} steps", *head[1:]])
        for engine, result in part.results.items():
            if "error" in result:
                rows.append([LABELS[engine], "failed", *[NONE] * 5])
                notes.append(f"{part.job.name}, {LABELS[engine]}: {result['error']}")
                continue
            cells = summary(part, result)
            if not part.whole(result):
                cells[0] = "~" + cells[0]
                notes.append(f"~ {LABELS[engine]}: from {count(result['steps'], 'step')}")
            rows.append([LABELS[engine], *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join(line[:100] for line in [*lines, *notes])


def summary(part: JobResults, result: dict) -> list[str]:
    """Seconds to train, steps a second, speed-up, final loss, peak memory, nodes, as text."""
    return [
        figure(part.train_s(result)),
        figure(1 / step_s(result)),
        f"{figure(part.speed_up(result))} x",
        f"{result['losses'][-1]:.4f}" if part.whole(result) else NONE,
        figure(result["peak_bytes"] / 1e6) if result["peak_bytes"] else NONE,
        f"{result['nodes']:,.0f}",
    ]


# Sections ---------------------------------------------------------------------------------------


def compared(parts: list[JobResults]) -> list[str]:
    """The machine, and what each part's engines were given."""
    devices = {r["device"] for p in parts for r in p.trained.values() if r.get("device")}
    lines = [*markdown.machine(), *sorted(devices)]
    rows = [["configuration", *(part.job.name for part in parts)]]
    for title, value in {
        "d_model / heads / layers / d_ff / length": lambda job: config_table.dimensions(
            job.config.model
        ),
        "parameters": lambda job: f"{job.parameters:,}",
        "data": lambda job: f"{job.dataset.name} ({job.dataset.kind})",
        "documents to train on": lambda job: (
            f"{job.documents:,}" + (" windows" if job.dataset.train.starts is None else "")
        ),
        "vocabulary": lambda job: f"{job.config.model.vocab_size:,}",
        "documents a step": lambda job: f"{job.config.train.batch_size:,}",
        "steps": lambda job: f"{job.steps:,}",
    }.items():
        rows.append([title, *(value(part.job) for part in parts)])
    rows.append(["precision", *(precision(p.job.precision, p.trained) for p in parts)])
    return [
        "\n".join(f"- {plain(line)}" for line in lines),
        table(rows[0], rows[1:]),
        "The engines start from the same weights and are given the same documents in the same "
        "order. The optimizer is Adam, no weight decay, no clipping, dropout 0. Each engine "
        "trains in a process of its own, one after the other: its time and its peak memory (of "
        "the whole process, with Python and all libraries) are its own.",
    ]


def precision(name: str, engines: Iterable[str]) -> str:
    """The floats that were computed with; plain Python has its own alone."""
    on_python = any(BUILT_ON[engine] == "python" for engine in engines)
    return name + (" (plain Python: fp64)" if on_python and name != "fp64" else "")


def results(part: JobResults) -> list[str]:
    """Time, speed, loss, nodes and memory; then where the time of a step goes."""
    first, second, notes = [], [], []
    for engine, result in part.trained.items():
        name, steps = LABELS[engine], result["steps"]
        cells = summary(part, result)
        if not part.whole(result):
            cells[0] += " (extrapolated)"
            notes.append(
                f"{plain(name)}: extrapolated from {count(steps, 'step')} to {part.job.steps:,}, "
                f"in proportion to the tokens; its loss was {result['losses'][-1]:.4f} when it "
                "ended. Compare it with the others at that step."
            )
        first.append([name, *cells])
        times = parts_of_a_step(result)
        whole, backward = sum(times.values()), times["backward"]
        second.append([
            name,
            *(figure(times[name] * 1e3) for name in ("forward", "backward", "update")),
            figure(whole * 1e3),
            f"{backward / whole:.0%}",
            figure(backward / result["nodes"] * 1e6),
            figure(result["start_s"]),
            figure(result["warm_up_s"]) if engine == "compiled" else NONE,
        ])  # fmt: skip
    columns = ["engine", "time to train [s]", "steps/s", "speed-up", "final loss"]
    pieces = ["forward [ms]", "backward [ms]", "update [ms]", "a step [ms]"]
    failed = [[LABELS[e], r["error"]] for e, r in part.results.items() if "error" in r]
    blocks = [table(["not measured", "because"], failed)] if failed else []
    if not first:
        return blocks
    return [
        table([*columns, "peak memory [MB]", "graph nodes a step"], first),
        *notes,
        *blocks,
        "The time to train is that of the steps alone; speed-up is over the slowest engine. Where "
        "the time of a step goes, and what comes once, before the first step:",
        table(
            [
                "engine",
                *pieces,
                "backward's share",
                "backward per node [µs]",
                "start-up [s]",
                "compiling [s]",
            ],
            second,
        ),
        "Nodes are counted in each engine's own graph: records on the tape of the Python and "
        "NumPy engines; in PyTorch nodes of autograd, of which a compiled region is one.",
    ]


def losses(part: JobResults) -> list[str]:
    """The losses at some steps, and how far the engines are apart over all of them."""
    end = max((result["steps"] for result in part.trained.values()), default=0)
    steps = {1, *range(50, 501, 50), *range(600, 1001, 100), *range(1500, end, 500)}
    steps |= set(range(0, end, max(1, end // 10))) if end < 100 else set()
    steps |= {result["steps"] for result in part.trained.values()}
    rows = []
    for step in sorted(step for step in steps if 0 < step <= end):
        at = [r["losses"][step - 1 : step] for r in part.trained.values()]
        cells = [f"{loss[0]:.4f}" if loss else NONE for loss in at]
        rows.append([f"{step:,}", *cells, figure(part.gap(step), 2)])
    gaps = {s: gap for s in range(1, end + 1) if (gap := part.gap(s)) is not None}
    head = ["step", *map(LABELS.__getitem__, part.trained), "largest difference"]
    blocks = [table(head, rows)]
    if not gaps:
        return blocks if rows else []
    worst, gradients = max(gaps, key=gaps.__getitem__), part.gradient_gap()
    lines = [
        f"The largest difference between the engines (controls apart) over all {len(gaps):,} "
        f"steps: {figure(gaps[worst], 2)}, at step {worst:,}."
    ]
    if gradients is not None:
        lines.append(
            f"The largest difference of the first step's gradients, over all parameters: "
            f"{figure(gradients, 2)} of the largest gradient."
        )
    return [*blocks, " ".join(lines)]


def estimates(part: JobResults) -> list[str]:
    """What an epoch and the configuration's own training would take."""
    steps = math.ceil(part.job.documents / part.job.config.train.batch_size)
    own = part.own_steps or part.job.steps
    rows = [
        [LABELS[e], figure(step_s(r) * 1e3), *(duration(step_s(r) * n) for n in (steps, own))]
        for e, r in part.proper.items()
    ]
    epoch, training = f"an epoch ({steps:,} steps)", f"a whole training ({own:,} steps)"
    words = "Multiplied: the time of a step, measured, by the steps of an epoch of the data and "
    words += f"by the {own:,} of the configuration. Evaluations and checkpoints are not in it."
    return [words, table(["engine", "a step [ms]", epoch, training], rows)] if rows else []


def by_size(sizes: list[dict]) -> list[str]:
    """Generation with untrained models of several sizes."""
    engines = [e for e in LABELS if any(entry["engine"] == e for entry in sizes)]
    numbers = {entry["size"]: entry["parameters"] for entry in sizes if "parameters" in entry}
    smallest = next(iter(numbers.values()), None)
    rows, notes = {}, []
    for entry in sizes:
        size, engine = entry["size"], entry["engine"]
        n = numbers.get(size)
        first = [f"{n:,}", f"{figure(n / smallest)} x", figure(n * 4 / 1e6)] if n else [NONE] * 3
        row = rows.setdefault(size, first + [NONE] * 2 * len(engines))
        about = f"- {plain(LABELS[engine])}, {entry['size']}: "
        if why := entry.get("skipped") or entry.get("error"):
            notes.append(f"{about}not measured, {plain(why)}")
            continue
        milliseconds = figure(entry["generate_s"] * TOKENS / entry["tokens"] * 1e3)
        if entry["tokens"] != TOKENS:
            milliseconds += " (extrapolated)"
            notes.append(f"{about}extrapolated from {count(entry['tokens'], 'token')}")
        at = 3 + 2 * engines.index(engine)
        row[at : at + 2] = milliseconds, figure(entry["peak_bytes"] / 1e6)
    head = ["d_model / heads / layers / length", "parameters", "factor", "weights in fp32 [MB]"]
    for engine in engines:
        head += [f"{LABELS[engine]}: {TOKENS} tokens [ms]", "peak memory [MB]"]
    body = [[size.replace("/", " / "), *row] for size, row in rows.items()]
    floats = precision("fp32", {entry["engine"] for entry in sizes if "generate_s" in entry})
    words = (
        f"Untrained models generate {TOKENS} tokens, one sequence, in {floats}. The factor is that "
        "of the parameters over the first row's. Memory is the most that the whole process held."
    )
    return [words, table(head, body), *(["\n".join(notes)] if notes else [])]
