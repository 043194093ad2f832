"""Time to quality: a validation loss of 1.88 on tinyshakespeare, by character, at context 64.

    python -m benchmarks.time_to_quality --nanogpt PATH      PATH: a checkout of karpathy/nanoGPT

nanoGPT trains by its README's recipe for a CPU, ours is `train.py --config configs/speedrun.toml`
as it stands, once for each seed. Times are of training alone: no start-up, no evaluation, no
saving. Either recipe is evaluated once, at its end: on every target of the last tenth of the text,
in the same windows side by side.
"""

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import ROOT, Result, parser, worker
from common import cli
from common.errors import UserError
from common.files import user_path
from training.config import Config, load

CONFIG = ROOT / "configs" / "speedrun.toml"
QUALITY = 1.88  # nats a character
CONTEXT = 64
BATCH, STEPS, WARM_UP, PEAK, LEAST = 12, 2000, 100, 1e-3, 1e-4  # of nanoGPT's recipe


def with_data(path: str) -> Config:
    """configs/speedrun.toml, on the text at `path` if one is given."""
    config = load(CONFIG)
    return replace(config, data=replace(config.data, path=path)) if path else config


def splits(path: str):
    """The prepared text: training and validation ids, as ours are trained and evaluated on."""
    from data.dataset import prepare

    return prepare(with_data(path).data, lambda line: print(line, file=sys.stderr))


# nanoGPT's recipe -------------------------------------------------------------------------------


def nanogpt(checkout: Path, seed: int, path: str) -> dict:
    """Trains nanoGPT's own model with its own optimizer; its loop, in our words."""
    import numpy as np
    import torch

    data = splits(path)
    assert data.val is not None  # the configuration holds some out
    first = int(min(data.train.ids[:].min(), data.val.ids[:].min()))  # it has no special tokens
    ids = np.asarray(data.train.ids, dtype=np.uint16) - first
    torch.manual_seed(seed)
    model, optimizer = create(checkout, data.tokenizer.vocab_size - first)

    def batch():
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        return [  # inputs, and one further on the targets
            torch.stack([torch.from_numpy(ids[i : i + CONTEXT].astype(np.int64)) for i in begin])
            for begin in (starts, starts + 1)
        ]

    began = time.perf_counter()
    x, y = batch()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        _, loss = model(x, y)
        x, y = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # it logs every step
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": validation_loss(model, data, first), "steps": STEPS}


def create(checkout: Path, vocab_size: int):
    """The model of its recipe for a CPU, and the optimizer as it configures it."""
    from benchmarks.peers import nanogpt_module  # here, because it loads PyTorch

    module = nanogpt_module(checkout)
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "bias": False}
    with contextlib.redirect_stdout(sys.stderr):
        config = module.GPTConfig(block_size=CONTEXT, vocab_size=vocab_size, **shape)
        model = module.GPT(config)
        return model, model.configure_optimizers(0.1, PEAK, (0.9, 0.99), "cpu")


def learning_rate(step: int) -> float:
    """A linear rise, then half a cosine."""
    if step < WARM_UP:
        return PEAK * (step + 1) / (WARM_UP + 1)
    done = (step - WARM_UP) / (STEPS - WARM_UP)
    return LEAST + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK - LEAST)


def validation_loss(model, data, first: int) -> float:
    """Nats a character over the whole split, in the windows of training/evaluation.py."""
    import torch

    from data.batches import Examples, evaluation_batches

    total = count = 0
    model.eval()
    with torch.no_grad():
        for batch in evaluation_batches(Examples(data.val, CONTEXT, 0), 128):
            targets = torch.from_numpy(batch.targets - first).view(batch.ids.shape)
            _, loss = model(torch.from_numpy(batch.ids - first), targets)
            total += loss.item() * len(batch.targets)
            count += len(batch.targets)
    return total / count


# Ours -------------------------------------------------------------------------------------------


def ours(seed: int, path: str) -> dict:
    """A whole run of train.py, and what its metrics.jsonl says of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--config", str(CONFIG), "--seed", str(seed)]
        command += ["--runs_dir", folder, "--name", "run", *(["--data.path", path] if path else [])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)  # noqa: S603, ours
        if done.returncode:
            raise UserError(f"train.py: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return summary([json.loads(line) for line in lines])


def summary(records: list[dict]) -> dict:
    """Seconds of training, final loss and steps of a run's log entries.

    An entry has the tokens read so far, and those read per second since the entry before, without
    the time for evaluating and saving.
    """
    seconds, tokens = 0.0, 0
    for record in records:
        if "speed/tokens_per_second" in record:
            seconds += (record["tokens"] - tokens) / record["speed/tokens_per_second"]
            tokens = record["tokens"]
    return {"seconds": seconds, "loss": records[-1]["loss/val"], "steps": records[-1]["step"]}


# Both -------------------------------------------------------------------------------------------


def whole(function, *arguments) -> dict:
    """What `function` finds, with the seconds from its process's start to its end."""
    began = time.perf_counter()
    return {**function(*arguments), "whole": time.perf_counter() - began}


def report(runs: list[dict], peer: list[dict]) -> Result:
    """The table of all runs, and the two bars."""
    rows = [
        [name, str(run["seed"]), run["steps"], f"{run['loss']:.4f}", run["seconds"], run["whole"]]
        for name, side in (("nanoGPT's for a CPU", peer), ("configs/speedrun.toml", runs))
        for run in sorted(side, key=lambda run: run["seed"])
    ]
    columns = ["recipe", "seed", "steps", "validation loss", "training, s", "whole process, s"]
    note = (
        f"tinyshakespeare by character, context {CONTEXT}, the whole last tenth. Medians of the "
        f"training time: {', '.join(f'{middle(side):.1f} s' for side in (peer, runs) if side)}. "
        "It leaves start-up, evaluation and saving out."
    )
    result = Result("time_to_quality", f"Time to a validation loss of {QUALITY}")
    result.table("", columns, rows, note)
    worst = max(run["loss"] for run in runs)
    result.claim(f"loss of the worst of {len(runs)} seeds", worst, QUALITY, True, "nats")
    if peer:
        ratio = middle(peer) / middle(runs)
        result.claim("training time of nanoGPT's recipe over ours, medians", ratio, 4)
    return result


def middle(runs: list[dict]) -> float:
    return statistics.median(run["seconds"] for run in runs)


def main():
    options = parser(__doc__, rounds=2)
    options.add_argument("--nanogpt", help="a checkout of nanoGPT to compare with")
    options.add_argument("--data", default="", help="the text as a file; else it is downloaded")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments = options.parse_args()
    if arguments.side:
        checkout, seed, path = arguments.side
        print(json.dumps(nanogpt(Path(checkout), int(seed), path)))
        return 0
    checkout = user_path(arguments.nanogpt).resolve() if arguments.nanogpt else None
    if checkout and not (checkout / "model.py").is_file():
        raise UserError(f"--nanogpt {checkout}: no model.py in it: give a checkout of nanoGPT")
    # a path is meant from where the command was typed
    path = str(user_path(arguments.data).resolve()) if arguments.data else ""
    splits(path)  # prepared once, so that no run's time has it
    runs, peer = [], []
    for number in range(arguments.rounds):
        if checkout:
            seed = number + 1
            peer.append(whole(worker, "time_to_quality", checkout, seed, path) | {"seed": seed})
        for seed in arguments.seeds[number :: arguments.rounds]:
            print(f"round {number + 1}: seed {seed}", file=sys.stderr, flush=True)
            runs.append(whole(ours, seed, path) | {"seed": seed})
    report(runs, peer).finish(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.time_to_quality", main))
