"""The default run: validation loss, training time, and how often its signatures are right.

    python -m benchmarks.default_run --before PATH      PATH: a checkout of an earlier version

`python train.py` runs as it stands, here and in the checkout, in turns. Times are of training
alone: no start-up, no evaluation, no saving. Then each held-out docstring is answered greedily by
the run's best checkpoint, and the answer compared with the true signature: equal as a whole, or
with the same name. A name is what stands between `def` and `(`.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, Result, parser, worker
from benchmarks.time_to_quality import summary
from common import cli
from common.errors import UserError

LOSS, SHARE = 2.05, 2 / 3  # nats a token, and of the training time before
BATCH = 32


def run(checkout: Path, seed: int, folder: Path) -> dict:
    """`python train.py` of a checkout: its seconds, loss, steps, and answers."""
    command = [sys.executable, "train.py", "--runs_dir", str(folder), "--name", "run"]
    command += ["--seed", str(seed)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)  # noqa: S603, ours
    if done.returncode:
        raise UserError(f"train.py: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    whole = time.perf_counter() - began
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = summary([json.loads(line) for line in lines])
    return found | {"whole": whole} | worker("default_run", folder / "run")


def score(path: Path) -> dict:
    """How many of the held-out pairs a run answers as they are, and with the right name."""
    from checkpoint.reader import Checkpoint
    from data.dataset import prepare
    from data.tokenizers.load import load_tokenizer
    from generation.batched import generate
    from generation.sampling import Sampling
    from model.transformer_full import TransformerDecoder
    from training.config import check

    checkpoint = Checkpoint.find(path)
    config = check(checkpoint.config, str(path))
    tokenizer = load_tokenizer(checkpoint.path)
    val = prepare(config.data, lambda line: None, tokenizer=tokenizer).val
    assert val is not None and val.starts is not None and val.prompts is not None  # pairs
    prompts, true = [], []
    for start, end, length in zip(val.starts[:-1], val.starts[1:], val.prompts, strict=True):
        if end - start <= config.seq_len:
            prompts.append(val.ids[start : start + length].tolist())
            true.append(tokenizer.decode(val.ids[start + length : end - 1].tolist()))
    model = TransformerDecoder.from_checkpoint(path)
    rules = Sampling(greedy=True, max_new_tokens=64)
    wrote = []
    for first in range(0, len(prompts), BATCH):
        rows = generate(model, prompts[first : first + BATCH], rules, end_id=tokenizer.end_id)
        wrote += map(tokenizer.decode, rows)
    return {
        "pairs": len(true),
        "exact": sum(a == b for a, b in zip(wrote, true, strict=True)),
        "names": sum(name(a) == name(b) for a, b in zip(wrote, true, strict=True)),
    }


def name(signature: str) -> str:
    """Of the function or class; the whole text where it is not a definition."""
    found = re.match(r"\s*(?:async )?(?:def|class) (\w+)", signature)
    return found.group(1) if found else signature


def report(sides: dict[str, list[dict]]) -> Result:
    """The table of all runs, and the bars."""
    result = Result("default_run", "The default run")
    rows = []
    for side, runs in sides.items():
        for found in runs:
            shares = (
                f"{found[key]} ({found[key] / found['pairs']:.1%})" for key in ("exact", "names")
            )
            rows.append(
                [side, str(found["seed"]), found["steps"], f"{found['loss']:.4f}", *shares,
                 found["seconds"], found["whole"]]
            )  # fmt: skip
    pairs = next(iter(sides.values()))[0]["pairs"]
    result.table(
        "",
        [
            "",
            "seed",
            "steps",
            "validation loss",
            "exact",
            "name",
            "training, s",
            "whole process, s",
        ],
        rows,
        f"{pairs} held-out pairs, answered greedily by the best checkpoint.",
    )
    now = sides["now"]
    worst = max(found["loss"] for found in now)
    result.claim(f"loss of the worst of {len(now)} runs", worst, LOSS, True, "nats")
    if before := sides.get("before"):
        ratio = middle(now, "seconds") / middle(before, "seconds")
        result.claim("training time over that before, medians", ratio, SHARE, True)
        for key, words in (("exact", "exact signatures"), ("names", "right names")):
            result.claim(f"{words} over before", middle(now, key) / middle(before, key), 1)
    return result


def middle(runs: list[dict], key: str) -> float:
    return statistics.median(found[key] for found in runs)


def main():
    options = parser(__doc__, rounds=3)
    options.add_argument("--before", type=Path, help="a checkout to compare with")
    arguments = options.parse_args()
    if arguments.side:
        print(json.dumps(score(Path(arguments.side[0]))))
        return 0
    checkouts = {"now": ROOT}
    if arguments.before:
        if not (arguments.before / "train.py").is_file():
            raise UserError(
                f"--before {arguments.before}: no train.py there; give a checkout of this project"
            )
        checkouts = {"before": arguments.before.resolve(), **checkouts}
    sides = {side: [] for side in checkouts}
    for number in range(arguments.rounds):
        for side, checkout in checkouts.items():
            print(f"round {number + 1} of {arguments.rounds}: {side}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                found = run(checkout, 1337 + number, Path(folder))
            sides[side].append(found | {"seed": 1337 + number})
    report(sides).finish(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.default_run", main))
