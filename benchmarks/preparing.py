"""Preparing text with SentencePiece: its speed beside the library's own, and its memory.

    python -m benchmarks.preparing

The text is Python's standard library, repeated with other vowels and digits each time. Speed:
encoding and writing token files, and all of `data.dataset.prepare` but the tokenizer's training
(which also reads, hashes, parses, splits and checks), against SentencePiece's own
`encode(list, num_threads=cores)`, which writes nothing, on the same strings in memory. Memory: the
peak of a process that prepares a small text and one four times as large, with that training.
"""

import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path

from benchmarks.harness import Result, in_turns, median, parser, spread, worker
from common import cli
from data.config import DataConfig, Kind
from data.dataset import prepare
from data.prepared.encoding import Encoder
from data.prepared.writing import Progress, open_writers, write_shards
from data.sources.text import CHUNK
from data.tokenizers.base import cores
from data.tokenizers.load import load_tokenizer
from data.tokenizers.sentencepiece import SentencePieceTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece

KINDS = {"stream": "text.txt", "lines": "text.txt", "pairs": "pairs.jsonl"}
SIDES = {
    "library": "SentencePiece alone",
    "write": "encoded and written",
    "prepare": "all of preparing",
}
VOCAB_SIZE = 8192
MB = 1_000_000
LIMIT = 1000  # MB that preparing may hold


def texts() -> Iterator[str]:
    """The sources of the standard library, without end, each time round a little different."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(folder.rglob("*.py")) if "site-packages" not in f.parts]
    vowels, digits = "aeiou", "0123456789"
    for turn in count():
        a, b = turn % len(vowels), turn % len(digits)
        other = vowels[a:] + vowels[:a] + digits[b:] + digits[:b]
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace").translate(
                str.maketrans(vowels + digits, other)
            )


def write_texts(folder: Path, megabytes: int):
    """text.txt of so many megabytes, and pairs.jsonl: every second line after the one before."""
    size = 0
    with (
        open(folder / "text.txt", "w", encoding="utf-8") as text,
        open(folder / "pairs.jsonl", "w", encoding="utf-8") as pairs,
    ):
        for each in texts():
            text.write(each)
            lines = list(filter(str.strip, each.splitlines()))
            for prompt, completion in list(pairwise(lines))[::2]:
                pairs.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
            size += len(each.encode())
            if size >= megabytes * MB:
                return


def strings(folder: Path, kind: str) -> list[str]:
    """What there is to encode, as a list in memory."""
    with open(folder / KINDS[kind], encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")
    if kind == "pairs":
        records = map(json.loads, filter(None, lines))
        return [text for record in records for text in record.values()]
    return lines if kind == "stream" else [line for line in lines if line.strip()]


def measure(side: str, folder: str, kind: Kind):
    """Prints the megabytes of text a second of one side, and this process's peak memory."""
    place = Path(folder)
    tokenizer = None if side == "training" else load_tokenizer(place / "tokenizer.model")
    size, given = 0, []
    if side in ("library", "write"):
        given = strings(place, kind)
        size = sum(len(text.encode()) for text in given)
    with tempfile.TemporaryDirectory(dir=place) as cache:
        config = DataConfig(
            path=str(place / KINDS[kind]), kind=kind, vocab_size=VOCAB_SIZE, cache_dir=cache
        )
        began = time.perf_counter()
        if side == "library":
            assert isinstance(tokenizer, SentencePieceTokenizer)  # train_sentencepiece's
            tokenizer._processor.encode(given, num_threads=cores())
        elif side == "write":
            write(given, kind, tokenizer, Path(cache))
        else:
            prepare(config, lambda _: None, tokenizer)
        seconds = time.perf_counter() - began
    found = {"seconds": seconds, "bytes": size, "peak": peak(), "child": child_peak()}
    print(json.dumps(found))


def write(given: list[str], kind: str, tokenizer, folder: Path):
    """Encodes strings and writes them as token files."""
    if kind == "stream":
        text = "\n".join(given)
        documents: Iterable = (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))
    else:
        documents = given if kind != "pairs" else zip(given[::2], given[1::2], strict=True)
    tokenizer.save(folder)
    progress = Progress(folder, "")
    writers = open_writers(folder, ["train"], kind, "<u2", progress)
    encoder = Encoder(kind, tokenizer, "<u2", folder, tokenizer.threads)
    write_shards((("train", document) for document in documents), writers, encoder, progress)


def peak() -> float:
    """The most memory that this process had, in MB; `ru_maxrss` may be of who started it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / MB
    except (OSError, IndexError):
        return float("nan")


def child_peak() -> float:
    """The most memory that a process started from here had, in MB."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / MB


def speed(result: Result, folder: Path, rounds: int):
    """The table of speeds, and a claim for each kind."""
    rows, size = [], 0.0
    for kind in KINDS:
        sides = {f"{kind}, {side}": [side, folder, kind] for side in SIDES}
        found = dict(zip(SIDES, in_turns("preparing", sides, rounds).values(), strict=True))
        base, size = median(found["library"], "seconds"), found["library"][0]["bytes"] / MB
        for side, runs in found.items():
            seconds = median(runs, "seconds")
            cells = [size / seconds, spread(runs, "seconds", ".2f"), base / seconds]
            rows.append([kind, SIDES[side], *cells])
        ratio = base / median(found["write"], "seconds")
        result.claim(f"{kind}: encoding and writing, of the library's encoding alone", ratio, 0.9)
    columns = ["data", "side", "MB of text a second", "seconds", "of the library's"]
    note = f"BPE of {VOCAB_SIZE:,} pieces, {cores()} cores; the tokenizer is given."
    result.table(f"Speed, about {size:.0f} MB of text", columns, rows, note)


def memory(result: Result, sizes: list[int]):
    """The table of peaks, and the claim."""
    rows, most = [], 0.0
    for megabytes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_texts(Path(folder), megabytes)
            for kind in KINDS:
                print(f"memory: {megabytes} MB, {kind}", file=sys.stderr, flush=True)
                file = Path(folder) / KINDS[kind]
                found = worker("preparing", "training", folder, kind)
                peaks = found["peak"], found["child"]
                rows.append([kind, file.stat().st_size / MB, *peaks, found["seconds"]])
                most = max(most, sum(peaks))
    columns = ["data", "MB on disk", "peak, MB", "peak of the tokenizer's training, MB", "seconds"]
    note = "The tokenizer is trained in a process of its own, on a sample of 20 MB at most."
    result.table("Resident memory of preparing, from text to token files", columns, rows, note)
    result.claim("memory of preparing, both processes", most, LIMIT, at_most=True, unit="MB")


def main():
    options = parser(__doc__, rounds=3)
    options.add_argument("--megabytes", type=int, default=24, help="of text to time")
    options.add_argument("--sizes", type=int, nargs="*", default=[40, 160], help="MB, for memory")
    arguments = options.parse_args()
    if arguments.side:
        return measure(*arguments.side)
    result = Result("preparing", "Preparing text with SentencePiece")
    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder), arguments.megabytes)
        part = Path(folder, "text.txt").read_text(encoding="utf-8")[: 4 * MB]
        train_sentencepiece([part], "bpe", VOCAB_SIZE, lambda _: None).save(Path(folder))
        speed(result, Path(folder), arguments.rounds)
    memory(result, arguments.sizes)
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.preparing", main))
