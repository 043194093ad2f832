"""docs/benchmarks.md from the figures that the benchmarks wrote: `python -m benchmarks.report`.

With --check nothing is written, and the exit status is 1 if the document is not what they give.
"""

import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, cell, row, text_of
from common import cli

DOCUMENT = ROOT / "docs" / "benchmarks.md"
ORDER = (
    "gpu", "precision", "train_throughput", "train_profile", "compile_cost", "default_run",
    "quality", "time_to_quality", "train_memory", "cost", "lite_step", "generation",
    "generation_peers",
    "decode_cost", "sampling_cost", "start_up", "preparing", "loader", "packing",
    "distributed", "one_curve",
)  # fmt: skip
HEAD = """# Benchmarks

Made by `python -m benchmarks.report` from what the commands below wrote
(`benchmarks/results/MACHINE/NAME.json`); no figure is typed by hand. Peers run beside ours in the
same run, in turns, each side in a process of its own; figures are medians. A figure is of the
machine that it stands under, and of the commit that was measured or kept it; compare ratios.
"""
NO_GPU = """**Nothing has been measured on a GPU yet.** `benchmarks/gpu.md` says what will do it.
"""


def results() -> list[dict]:
    """All that was written, in the order of the document; "folder" is the machine's."""
    found = [
        {**json.loads(file.read_text(encoding="utf-8")), "folder": file.parent.name}
        for file in sorted(RESULTS.glob("*/*.json"))
    ]
    rank = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda result: rank.get(result["name"], len(rank)))


def document(found: list[dict]) -> str:
    """The whole of docs/benchmarks.md."""
    parts = [HEAD]
    if "gpu" not in (result["name"] for result in found):
        parts.append(NO_GPU)
    parts.append(bars(found))
    for result in found:
        parts.append(text_of(result))
        parts += [
            f"![{p['title']}]({plot_file(result, i)})\n" for i, p in enumerate(result["plots"])
        ]
    return "\n".join(parts)


def bars(found: list[dict]) -> str:
    """Each bar with what every machine has measured against it."""
    machines = sorted({result["folder"]: about(result["machine"]) for result in found}.items())
    measured: dict[tuple[str, str], dict[str, str]] = {}
    for result in found:
        for claim in result["claims"]:
            bound = f"at {'most' if claim['at_most'] else 'least'} {claim['bar']:g} {claim['unit']}"
            mark = "" if claim["met"] else " (missed)"
            shown = f"{cell(claim['measured'])} {claim['unit']}".strip() + mark
            key = (claim["claim"], bound.strip())
            measured.setdefault(key, {})[result["folder"]] = shown
    lines = ["## All bars", "", row(["bar", "", *(name for _, name in machines)])]
    lines.append("|---" * (2 + len(machines)) + "|")
    for key, by_machine in measured.items():
        lines.append(row([*key, *(by_machine.get(folder, "") for folder, _ in machines)]))
    return "\n".join([*lines, ""])


def about(machine: dict) -> str:
    """A machine in a few words."""
    if machine.get("accelerator"):
        return machine["accelerator"]
    return ", ".join(
        str(part)
        for part in (
            machine["processor"], machine.get("family and model"), machine.get("instructions"),
            f"{machine['cores']} cores",
        )
        if part
    )  # fmt: skip


def plot_file(result: dict, number: int) -> str:
    return f"benchmarks/{result['folder']}/{result['name']}{f'_{number + 1}' if number else ''}.png"


def draw(plot: dict, file: Path):
    """One plot, a line with points for each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, points in plot["series"].items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
    axes.set(title=plot["title"], xlabel=plot["x"], ylabel=plot["y"])
    for axis in plot["log"]:
        getattr(axes, f"set_{axis}scale")("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    # nothing of the time or version, so that the same figures give the same file
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    options = cli.Parser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="only compare; 1 if it differs")
    check = options.parse_args().check
    found = results()
    text = document(found)
    if check:
        same = DOCUMENT.exists() and DOCUMENT.read_text(encoding="utf-8") == text
        print("as the results give it" if same else f"{DOCUMENT}: not what the results give")
        return int(not same)
    DOCUMENT.write_text(text, encoding="utf-8")
    for result in found:
        for number, plot in enumerate(result["plots"]):
            draw(plot, DOCUMENT.parent / plot_file(result, number))
    claims = [claim for result in found for claim in result["claims"]]
    print(
        row(
            [
                str(DOCUMENT.relative_to(ROOT)),
                f"{sum(c['met'] for c in claims)} of {len(claims)} bars met",
            ]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.report", main))
