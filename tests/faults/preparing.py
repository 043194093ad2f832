"""Preparing data: killed at any moment, twice at once, on changing texts, on a full disk."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.faults.campaign import Skip, Tally, campaign, ended, one_line
from tests.faults.shim import disk
from tests.faults.stops import children_of
from tests.helpers import ROOT

# tools.prepare with shards, blocks and records as small as the texts here, and processes at once
CODE = """
import sys
from common import cli
from data.prepared import encoding, token_files, writing
from tools import prepare
encoding.PATIENCE, encoding.CHARACTERS = 0, 1 << 13
writing.MARK, token_files.SHARD_TOKENS = 1 << 16, 1 << 15
sys.exit(cli.run("python -m tools.prepare", prepare.main))
"""
JOBS = ["--jobs", "2", "--data.vocab_size", "400"]
LONGEST = 60  # seconds that a try may take
GONE = 5.0  # seconds that the processes may live on whose parent was killed


def write_corpus(folder: Path, dice) -> Path:
    """Documents in three files, one of them compressed."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    words = ["".join(dice.choices("abcdefghijklmnopqrst", k=5)) for _ in range(3000)]
    for number, opener in enumerate((open, gzip.open, open)):
        rows = [{"text": " ".join(dice.choices(words, k=dice.randint(1, 400)))} for _ in range(400)]
        name = f"{number}.jsonl" + (".gz" if opener is gzip.open else "")
        with opener(corpus / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return corpus


def start(folder: Path, cache: Path, inside=()) -> subprocess.Popen:
    flags = ["--data.path", str(folder / "corpus"), "--data.cache_dir", str(cache), *JOBS]
    return subprocess.Popen(
        [*inside, sys.executable, "-c", CODE, *flags], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    with ended(process):
        output, errors = process.communicate(timeout=LONGEST)
    return subprocess.CompletedProcess("", process.returncode, output, errors)


def files(cache: Path) -> dict[str, bytes]:
    """All that a cache holds but its locks."""
    found = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(cache)): path.read_bytes() for path in found}


def prepared(tally: Tally, folder: Path) -> tuple[dict[str, bytes], float]:
    """What an undisturbed process makes, and in how many seconds."""
    began = time.monotonic()
    result = finished(start(folder, folder / "straight"))
    assert result.returncode == 0, result.stderr
    whole = files(folder / "straight")
    tally.counts["shards in each"] = sum(name.endswith(".ids") for name in whole)
    return whole, time.monotonic() - began


@campaign("prepare_kills", "26", "SIGKILL while data is prepared by 2 processes", "kills", 200, 2)
def prepare_kills(tally: Tally, count: int, folder: Path, dice):
    """The same command goes on each time, and ends in the bytes of one that nobody has killed."""
    if not Path("/proc/self/stat").exists():
        raise Skip("needs /proc, to see what becomes of the processes that encode")
    write_corpus(folder, dice)
    (whole, seconds), cache = prepared(tally, folder), folder / "cache"
    while tally.tried < count:
        process = start(folder, cache)
        with ended(process):
            try:
                process.wait(dice.uniform(0.2, 1.2) * seconds)
            except subprocess.TimeoutExpired:
                children = children_of(process.pid)
                process.kill()
                tally.tried += 1
                tally.counts["with processes that encode"] += bool(children)
                tally.counts["after a record"] += any(cache.glob(".*/progress.json"))
                look_around(tally, children)
            else:
                compare(tally, finished(process), cache, whole)
    compare(tally, finished(start(folder, cache)), cache, whole)


def compare(tally: Tally, result, cache: Path, whole: dict[str, bytes]):
    """Whether a process has ended well, and in these bytes; the cache is empty afterwards."""
    tally.counts["ended in the same bytes"] += 1
    if result.returncode:
        tally.lost.append(f"exit status {result.returncode}: {result.stderr.strip()[-300:]}")
    elif (found := files(cache)) != whole:
        names = [n for n in found.keys() | whole.keys() if found.get(n) != whole.get(n)]
        tally.lost.append(f"other bytes: {sorted(names)[:5]}")
    shutil.rmtree(cache)


def look_around(tally: Tally, children: list[int]):
    """The processes that encode end with the one that was killed."""
    until = time.monotonic() + GONE
    alive = children
    while alive and time.monotonic() < until:
        alive = [child for child in alive if is_alive(child)]
        time.sleep(0.01)
    if alive:
        tally.undetected.append(f"still there: {alive}")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@campaign(
    "prepare_faults", "27", "preparing: a full disk, a process killed, texts that change, twice at "
    "once", "faults", 60, 2,
)  # fmt: skip
def prepare_faults(tally: Tally, count: int, folder: Path, dice):
    """Each ends well, or in one line; and then the same command ends in the right bytes."""
    write_corpus(folder, dice)
    whole, seconds = prepared(tally, folder)
    tries = {
        "a full disk": on_a_small_disk,
        "a process that encodes killed": worker_killed,
        "texts that change": changing,
        "two at once": two_at_once,
    }
    for number in range(count):
        name = list(tries)[number % len(tries)]
        try:
            tries[name](tally, folder, whole, seconds, dice)
        except Skip:  # there are the others
            tally.counts["left out, because this user may not mount"] += 1
            continue
        tally.tried += 1
        tally.counts[f"of {name}"] += 1


def two_at_once(tally: Tally, folder: Path, whole, seconds, dice):
    """The second waits for the first, and finds what it has made."""
    cache = folder / "cache"
    one, other = start(folder, cache), start(folder, cache)
    results = [finished(one), finished(other)]
    made = sum("tokens: train" in result.stdout for result in results)
    if made != 1 or any(result.returncode for result in results):
        tally.lost.append(f"{made} have prepared: {[result.stderr for result in results]}")
    compare(tally, results[0], cache, whole)


def changing(tally: Tally, folder: Path, whole, seconds, dice):
    """A byte of a file changes, its size and time do not: it is not taken for what it was."""
    cache, file = folder / "cache", folder / "corpus" / "0.jsonl"
    content, stat = file.read_bytes(), file.stat()
    at = content.index(b'"text": "', dice.randrange(len(content) // 2)) + 9
    changed = content[:at] + (b"x" if content[at : at + 1] != b"x" else b"y") + content[at + 1 :]
    process = start(folder, cache)
    with ended(process):
        late = dice.random() < 0.3  # when all is prepared; else meanwhile
        time.sleep(0 if late else dice.uniform(0.3, 1) * seconds)
        result = finished(process) if late else None
        file.write_bytes(changed)
        if late:
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        result = result or finished(process)
    if result.returncode:
        tally.counts["refused, for they changed meanwhile"] += 1
        if wrong := one_line(result) or ("" if "changed while" in result.stderr else "?"):
            tally.undetected.append(f"{wrong}: {result.stderr[-200:]}")
    again = finished(start(folder, cache))
    if again.returncode:
        tally.lost.append(f"after a change: {again.stderr[-300:]}")
    other = {name: data for name, data in files(cache).items() if name not in whole}
    if not any(name.endswith("manifest.json") for name in other):
        tally.undetected.append("changed texts are taken for what they were")
    file.write_bytes(content)
    compare_among(tally, finished(start(folder, cache)), cache, whole)


def compare_among(tally: Tally, result, cache: Path, whole: dict[str, bytes]):
    """The same where the cache also has what was made of other texts."""
    name = next(iter(whole)).split("/")[0]
    for other in cache.iterdir():
        if other.is_dir() and other.name != name:
            shutil.rmtree(other)
    compare(tally, result, cache, whole)


def worker_killed(tally: Tally, folder: Path, whole, seconds, dice):
    """One line says so, and the same command goes on."""
    cache, process = folder / "cache", start(folder, folder / "cache")
    with ended(process):
        until = time.monotonic() + LONGEST
        while process.poll() is None and time.monotonic() < until:
            children = [c for c in children_of(process.pid) if encodes(c)]
            if children and dice.random() < 0.3:
                os.kill(dice.choice(children), signal.SIGKILL)
                break
            time.sleep(0.01)
        result = finished(process)
    if result.returncode:
        tally.counts["told that a process was killed"] += 1
        if wrong := one_line(result) or ("" if "has been ended" in result.stderr else "?"):
            tally.undetected.append(f"{wrong}: {result.stderr[-200:]}")
    compare(tally, finished(start(folder, cache)), cache, whole)


def encodes(process: int) -> bool:
    try:
        return b"data.prepared.encoding" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def on_a_small_disk(tally: Tally, folder: Path, whole, seconds, dice):
    """The disk of the cache is full some time; when it has room, the same command goes on."""
    needed = sum(len(content) for content in whole.values())
    with disk(folder, f"size={4096 * dice.randint(8, needed // 4096)}") as small:
        result = finished(start(folder, small.place / "cache", small.inside))
        if wrong := one_line(result):
            tally.undetected.append(f"a full disk: {wrong}")
        small.remount("size=64m")
        again = finished(start(folder, small.place / "cache", small.inside))
        compare(tally, again, small.seen / "cache", whole)
