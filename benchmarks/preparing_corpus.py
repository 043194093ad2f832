"""Preparing a corpus of many gigabytes: the memory of all processes together, and the speed.

    python -m benchmarks.preparing_corpus --megabytes 10000
    python -m benchmarks.preparing_corpus --datasets PATH    # beside datasets.map

The text is that of `benchmarks.preparing`, a file of Python's standard library a document, written
as .jsonl.zst and as parquet to a temporary folder, which is removed again. `tools.prepare` makes
token files of each, its tokenizer's training included, while its processes' proportional memory
(PSS) is added up several times a second. With `datasets` (pip install datasets, or in a folder of
its own, PATH), encoding is timed beside `datasets.map` with a fast tokenizer of as many tokens, on
the same documents with as many processes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.harness import ROOT, Result, in_turns, median, parser, spread
from benchmarks.preparing import LIMIT, MB, VOCAB_SIZE, texts, write
from common import cli
from data.tokenizers.base import cores
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece

ROWS = 2000  # documents of a row group
FILE = 500 * MB  # bytes of text of a file
SAMPLE = 400  # documents that the tokenizers of the comparison learn from
BAR = 1.5  # times datasets.map


def documents(size: int) -> Iterator[str]:
    """Texts of so many bytes together."""
    for text in texts():
        yield text
        if (size := size - len(text.encode())) <= 0:
            return


def files(size: int) -> Iterator[tuple[int, Iterator[str]]]:
    """The documents of each file, with its number."""
    found = documents(size)
    for number in range(-(-size // FILE)):
        yield number, until(found, FILE)


def until(found: Iterator[str], size: int) -> Iterator[str]:
    for text in found:
        yield text
        if (size := size - len(text.encode())) <= 0:
            return


def write_jsonl(folder: Path, size: int):
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    for number, found in files(size):
        with zstd.open(folder / f"{number:04}.jsonl.zst", "wt", encoding="utf-8") as file:
            for text in found:
                file.write(json.dumps({"text": text}) + "\n")


def write_parquet(folder: Path, size: int):
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema({"text": pa.string()})
    for number, found in files(size):
        path = folder / f"{number:04}.parquet"
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            while rows := list(islice(found, ROWS)):
                writer.write_table(pa.table({"text": rows}, schema), ROWS)


FORMS = {".jsonl.zst": write_jsonl, "parquet": write_parquet}


def prepare(folder: Path, cache: Path) -> dict:
    """Seconds and peak memory in MB of tools.prepare on what is in a folder."""
    flags = ["--data.path", folder, "--data.cache_dir", cache, "--data.vocab_size", VOCAB_SIZE]
    command = [sys.executable, "-m", "tools.prepare", *map(str, flags)]
    began, peak, most = time.perf_counter(), 0.0, 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603, ours
    while process.poll() is None:
        family = [process.pid, *children_of(process.pid)]
        peak, most = max(peak, sum(map(pss, family))), max(most, len(family))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(process.returncode)
    return {"seconds": time.perf_counter() - began, "peak": peak / MB, "processes": most}


def children_of(parent: int) -> list[int]:
    """The processes that any thread of a process has started."""
    found = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += [int(number) for number in file.read_text().split()]
    return found


def pss(process: int) -> int:
    """Bytes of a process, of shared ones its share. 0 if it has ended."""
    try:
        said = Path(f"/proc/{process}/smaps_rollup").read_text()
        return int(said.split("Pss:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


# Beside datasets.map ------------------------------------------------------------------------------


def measure(side: str, folder: str):
    """Prints how long one side takes to encode and write the documents of a folder."""
    place = Path(folder)
    if side == "ours":
        with open(place / "documents.jsonl", encoding="utf-8") as file:
            given = [json.loads(line)["text"] for line in file]
        with tempfile.TemporaryDirectory(dir=place) as made:
            tokenizer = load_tokenizer(place)
            began = time.perf_counter()
            write(given, "documents", tokenizer, Path(made))
            seconds = time.perf_counter() - began
    else:
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=str(place / "fast.json"))
        rows = Dataset.from_json(str(place / "documents.jsonl"), cache_dir=str(place / "datasets"))
        began = time.perf_counter()
        rows.map(
            lambda batch: {"ids": fast(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True, num_proc=cores(), remove_columns=rows.column_names,
            load_from_cache_file=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds}))


def compare(result: Result, folder: Path, megabytes: int, rounds: int):
    """The table beside datasets.map, and the claim."""
    from tokenizers import ByteLevelBPETokenizer

    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for text in documents(megabytes * MB):
            file.write(json.dumps({"text": text}) + "\n")
    sample = list(islice(texts(), SAMPLE))
    train_sentencepiece(sample, "bpe", VOCAB_SIZE, lambda _: None).save(folder)
    fast = ByteLevelBPETokenizer()
    fast.train_from_iterator(sample, VOCAB_SIZE, show_progress=False)
    fast.save(str(folder / "fast.json"))
    sides = {"ours": ["ours", folder], "datasets.map": ["datasets", folder]}
    found = in_turns("preparing_corpus", sides, rounds)
    base = median(found["datasets.map"], "seconds")
    rows = [
        [side, megabytes / median(runs, "seconds"), spread(runs, "seconds", ".2f"),
         base / median(runs, "seconds")]
        for side, runs in found.items()
    ]  # fmt: skip
    note = f"BPE of {VOCAB_SIZE:,} tokens each, {cores()} cores; start of the processes included."
    columns = ["side", "MB of text a second", "seconds", "times datasets.map"]
    result.table(f"Encoding and writing, {megabytes} MB of documents", columns, rows, note)
    ratio = base / median(found["ours"], "seconds")
    result.claim("encoding, times datasets.map", ratio, BAR)


def main():
    options = parser(__doc__, rounds=3)
    options.add_argument("--megabytes", type=int, default=200, help="of text to prepare")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options.add_argument("--compared", type=int, default=60, help="MB to compare the encoding on")
    options.add_argument("--folder", type=Path, help="where to work; a temporary one")
    options.add_argument("--datasets", help='compare with it; its folder, or "" if it is installed')
    arguments = options.parse_args()
    if arguments.side:
        return measure(*arguments.side)
    result = Result("preparing_corpus", "Preparing a corpus of many files")
    rows, most = [], 0.0
    for name in arguments.forms:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            corpus = Path(folder, "corpus")
            corpus.mkdir()
            print(f"writing {arguments.megabytes} MB as {name}", file=sys.stderr, flush=True)
            FORMS[name](corpus, arguments.megabytes * MB)
            size = sum(path.stat().st_size for path in corpus.iterdir()) / MB
            found = prepare(corpus, Path(folder, "cache"))
            speed = arguments.megabytes / found["seconds"]
            rows.append([name, size, found["seconds"], speed, found["peak"], found["processes"]])
            most = max(most, found["peak"])
    columns = ["form", "MB on disk", "seconds", "MB of text a second", "peak PSS, MB", "processes"]
    note = "From the files to the token files: hashed, the tokenizer trained, encoded, checked."
    result.table(f"Preparing {arguments.megabytes:,} MB of documents", columns, rows, note)
    result.claim("memory of preparing, all processes", most, LIMIT, at_most=True, unit="MB")
    if arguments.datasets is not None:
        paths = filter(None, (arguments.datasets, os.environ.get("PYTHONPATH")))
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            compare(result, Path(folder), arguments.compared, arguments.rounds)
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.preparing_corpus", main))
