"""Pictures of a comparison: losses over each other, speed, memory.

    draw(folder, parts)    losses-<name>.png of each part, speed.png, memory.png, overview.png

matplotlib is imported where it is used, so that without it only `draw` raises ImportError.
"""

import math
from pathlib import Path
from textwrap import fill

import numpy as np

from comparison.markdown import figure as number
from comparison.results import JobResults, step_s
from comparison.trainers import CONTROLS, LABELS

COLOURS = {  # Okabe and Ito's, which people with any colour vision can tell apart
    "unfused": "#CC79A7",
    "python": "#009E73",
    "numpy": "#E69F00",
    "torch": "#0072B2",
    "compiled": "#56B4E9",
    "cuda": "#000000",
    "random": "#7F7F7F",
    "stack": "#D55E00",
}
LOOK = {
    "figure.dpi": 100,
    "font.size": 13,  # still read when a picture of 1,600 is shown 900 wide
    "axes.titlesize": 14,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 12,
    "legend.edgecolor": "none",
    "lines.solid_capstyle": "butt",
    "figure.constrained_layout.use": True,
}
FAINT = {"color": "#E0E0E0", "linewidth": 0.6, "zorder": 1}


def draw(folder: Path, parts: list[JobResults]) -> list[Path]:
    """Writes the pictures, and gives their paths. Raises ImportError without matplotlib."""
    from matplotlib import rc_context

    parts = [part for part in parts if part.trained]
    with rc_context(LOOK):
        files = []
        for part in parts:
            figure = new(11, 5.5)
            draw_losses(figure.subplots(), part)
            files.append(save(figure, folder / f"losses-{part.job.name}.png"))
        if parts:
            files += [draw_bars(folder / f"{name}.png", name, parts) for name in BARS]
            files.append(draw_overview(folder / "overview.png", parts[0]))
    return files


def draw_bars(file: Path, name: str, parts: list[JobResults]) -> Path:
    """Speed or memory, the parts side by side."""
    most = max(len(shown(part)) for part in parts)
    figure = new(8 * len(parts), 1.2 + 0.65 * most)
    panels = np.ravel(figure.subplots(1, len(parts)))
    for axes, part in zip(panels, parts, strict=True):
        title, value = BARS[name]
        bars(axes, {e: value(r) for e, r in shown(part).items()})
        axes.set_ylim(most - 0.5, -0.5)  # as thick in each panel
        axes.set_title(f"{part.job.name}: {title}")
    return save(figure, file)


def draw_overview(file: Path, part: JobResults) -> Path:
    """Losses, speed and memory of one part side by side, for the README."""
    figure = new(16, 5)
    panels = figure.subplots(1, 3, width_ratios=(1.5, 1, 0.8))
    draw_losses(panels[0], part)
    for axes, (title, value) in zip(panels[1:], BARS.values(), strict=True):
        bars(axes, {e: value(r) for e, r in shown(part).items()})
        axes.set_title(title)
    panels[2].set_yticklabels([])  # the engines are those of the panel beside it
    return save(figure, file)


def new(width: float, height: float):
    """An empty figure, in inches; without any of pyplot's state."""
    from matplotlib.figure import Figure

    return Figure((width, height))


def save(figure, file: Path) -> Path:
    """Writes a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(file))
    return file


def draw_losses(axes, part: JobResults):
    """Smoothed curves; where they coincide, each leaves an edge of the one beneath it."""
    window = max(1, part.job.steps // 10)
    means = {e: trailing_mean(r["losses"], window) for e, r in part.trained.items()}
    whole = [engine for engine, result in part.proper.items() if part.whole(result)]
    for engine in whole[:1] if window > 1 else ():  # behind all, the losses as they were
        axes.plot(range(1, part.job.steps + 1), part.proper[engine]["losses"], **FAINT)
    for engine, result in part.trained.items():
        steps = range(1, result["steps"] + 1)
        style = {"color": COLOURS[engine], "linewidth": 2.0, "zorder": 5.0}
        if engine in CONTROLS:
            style |= {"linestyle": "--", "zorder": 2.0}
        elif engine in whole:  # those that ended early lie on top
            above = len(whole) - 1 - whole.index(engine)
            style |= {"linewidth": 2 + 3 * above, "zorder": 4 - above / 10}
        label = LABELS[engine] + ("" if part.whole(result) else f" ({result['steps']:,} steps)")
        axes.plot(steps, means[engine], label=label, **style)
    low, high = min(map(min, means.values())), max(map(max, means.values()))
    if (
        -math.inf < low < high < math.inf
    ):  # so that the loss of a single step does not press the curves flat
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    over = f", mean of {window} steps" if window > 1 else ""
    axes.set_title(f"{part.job.name}: training loss{over}")
    axes.set_xlabel("step")
    for line in axes.legend().get_lines():
        line.set_linewidth(min(4.0, line.get_linewidth()))


def trailing_mean(losses: list[float], window: int) -> np.ndarray:
    """The mean of each loss and those before it: the same however long the curve goes on."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


BARS = {
    "speed": ("training steps a second", lambda result: 1 / step_s(result)),
    "memory": ("peak memory, MB", lambda result: result["peak_bytes"] / 1e6),
}


def shown(part: JobResults) -> dict[str, dict]:
    """Those that have a bar: the engines proper, or the controls if there is nothing else."""
    return part.proper or part.trained


def bars(axes, values: dict[str, float]):
    """A bar for each engine with its value at its end, on a logarithmic scale; 0: not known."""
    known = [value for value in values.values() if value > 0] or [1.0]
    start = min(known) / 3  # a bar has no length on such a scale: what counts is where it ends
    for i, (engine, value) in enumerate(values.items()):
        axes.barh(i, max(value - start, 0), 0.6, left=start, color=COLOURS[engine])
        axes.text(max(value, start), i, f" {number(value) if value else 'not known'}", va="center")
    axes.set_xscale("log")
    axes.set_xlim(start, max(known) * (max(known) / start) ** 0.3)
    axes.set_xlabel("logarithmic scale")
    axes.set_yticks(range(len(values)), [fill(LABELS[e], 18) for e in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.tick_params("x", which="both", length=0, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
