"""Numbers, tables and the machine as text. No torch, no NumPy."""

import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path

from common.device import processor

NONE = "–"


def figure(x: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where it can be read so."""
    if x is None:
        return NONE
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if not 1e-3 <= abs(x) < 1e7:
        return f"{x:.{digits - 1}e}"
    return f"{x:,.{max(0, digits - 1 - math.floor(math.log10(abs(x))))}f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size:
            return f"{figure(seconds / size)} {unit}"
    return f"{figure(seconds)} s" if seconds >= 0.1 else f"{figure(seconds * 1e3)} ms"


def count(n: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


MARKUP = re.compile(r"[\\`*<|~$]|(?<!\w)_|_(?!\w)|\](?=[(\[])|&(?=[\w#])")
FIGURE = re.compile(r"[~-]?\d|–|nan|-?inf")


def plain(text: str) -> str:
    """Text that Markdown shows as it stands, in one line."""
    text = "".join(c if c.isprintable() else "␤" if c == "\n" else "\ufffd" for c in text)
    return MARKUP.sub(r"\\\g<0>", text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; columns of figures, the first one apart, are set to the right."""
    cells = [[plain(cell) for cell in row] for row in (head, *rows)]
    columns = list(zip(*cells, strict=True))
    figures = [sum(1 for cell in column[1:] if FIGURE.match(cell)) for column in columns]
    right = [i > 0 and 2 * n > len(rows) for i, n in enumerate(figures)]
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * (n - 1) + (":" if r else "-") for n, r in zip(widths, right, strict=True)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            c.rjust(n) if r else c.ljust(n) for c, n, r in zip(row, widths, right, strict=True)
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def picture(folder: Path, name: str) -> list[str]:
    """A link to a picture in the folder, if there is one."""
    file = folder / f"{name}.png"
    return [f"![{name}]({file.name.replace(' ', '%20')})"] if file.exists() else []


def machine() -> list[str]:
    """The computer and what runs on it, a line each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        f"{processor()}, {count(cores or 1, 'core')}",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"PyTorch {version('torch')}, NumPy {version('numpy')}",
    ]


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
