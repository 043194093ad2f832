"""Every promise of reliability tried with real faults: `python -m tests.faults`.

python -m tests.faults                          everything, about three hours
python -m tests.faults --only kills flips       these
python -m tests.faults --only kills --count 50  fewer
python -m tests.faults --quick                  as the test suite does it
python -m tests.faults --list
"""

import argparse
import importlib
import pkgutil
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tests.faults
from common import cli
from common.errors import UserError
from tests.faults.campaign import CAMPAIGNS, Campaign, Skip, Tally, log

HEAD = ("promise", "what was tried", "times", "lost", "undetected", "of which", "took")


def load() -> dict[str, Campaign]:
    """All campaigns, by name, in the order of the promises they try."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if module.name != "__main__":
            try:
                importlib.import_module(f"tests.faults.{module.name}")
            except ModuleNotFoundError as error:
                raise UserError(
                    f"{error.name} is not installed: pip install -e '.[dev,report]'"
                ) from None
    return dict(sorted(CAMPAIGNS.items(), key=lambda item: order(item[1].items)))


def order(items: str) -> tuple:
    """Where a campaign stands in the table: by its first number; without one at the end."""
    first = items.split(",")[0].split("-")[0].strip()
    return (0, int(first), items) if first.isdigit() else (1, 0, items)


def row(campaign: Campaign, tally: Tally, seconds: float) -> str:
    """A campaign's row of the table, in Markdown."""
    counts = ", ".join(f"{n:,} {name}" for name, n in sorted(tally.counts.items()) if n)
    took = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
    cells = (
        campaign.items, campaign.what, f"{tally.tried:,} {campaign.unit}", str(len(tally.lost)),
        str(len(tally.undetected)), counts, took,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = cli.Parser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these campaigns")
    parser.add_argument("--count", type=int, default=0, help="tries of each; 0: its own number")
    parser.add_argument("--quick", action="store_true", help="as few as the test suite makes")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--out", default="", help="file for the table, written as it grows")
    parser.add_argument("--list", action="store_true", help="name the campaigns and leave")
    options = parser.parse_args()
    known = load()
    if options.list:
        for each in known.values():
            print(f"{each.name:14} {each.items:8} {each.full:>6} {each.unit}: {each.what}")
        return 0
    if options.count < 0:
        raise UserError(f"--count {options.count} must be at least 0")
    for name in options.only:
        if name not in known:
            raise UserError(f"--only {name}: no such campaign; there are {', '.join(known)}")
    chosen = [each for name, each in known.items() if name in (options.only or known)]
    return conduct(chosen, options)


def conduct(chosen: list[Campaign], options) -> int:
    """Runs the campaigns one after the other and prints the table. 1 if anything went wrong."""
    rows, failed = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"], False
    for each in chosen:
        count = options.count or (each.quick if options.quick else each.full)
        log(f"{each.name}: {each.what}, {count} {each.unit}")
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{each.name}-"))
        began = time.monotonic()
        try:
            tally = each(folder, count, options.seed)
        except Skip as reason:
            log(f"{each.name}: not on this machine: {reason}")
            rows.append(f"| {each.items} | {each.what} | skipped: {reason} | | | | |")
            continue
        for text in tally.failed:
            log(f"{each.name}: FAILED: {text}")
        if tally.failed:
            log(f"{each.name}: left as it is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        failed |= bool(tally.failed) or not tally.tried
        rows.append(row(each, tally, time.monotonic() - began))
        if options.out:
            Path(options.out).write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(cli.run("python -m tests.faults", main))
