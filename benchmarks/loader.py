"""The loader against the model: tokens a second of batches alone, and of training on them.

    python -m benchmarks.loader

Batches come from prepared token files, as train.py has them, epoch after epoch; the training side
takes the same ones and makes optimizer steps of them. Tokens are places of a batch, padding too.

Then 10^10 tokens, in sparse files that take no room: how long it takes from opening them to the
first batch and to that of step 10^9, what memory that holds, and batches of windows from anywhere.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, Result, in_turns, median, parser, spread
from common import cli
from common.memory import resident_memory
from data.batches import Batches, Examples
from data.config import DataConfig
from data.dataset import prepare
from data.prepared.token_files import open_split
from model.config import ModelConfig
from training.config import OptimizerConfig, TrainConfig, load

DEFAULT, FULL = (load(ROOT / "configs" / name) for name in ("default.toml", "full.toml"))
PAIRS = DataConfig(source="stdlib", vocab_size=2048)
# a stream of characters, of text that everyone has: this project's README over and over
STREAM = DataConfig(path="text.txt", tokenizer="char", val_fraction=0.0)
SHAPE = ModelConfig(d_model=128, n_heads=4, n_layers=4, d_ff=512, max_len=64, positions="learned")
MODELS = {  # name: (model, its optimizers, data, batch size)
    "4 x 128, batch 12 x 64": (SHAPE, OptimizerConfig(), STREAM, 12),
    "default.toml, batch 32": (DEFAULT.model, DEFAULT.optimizer, PAIRS, DEFAULT.train.batch_size),
    "full.toml, batch 32 x 128": (FULL.model, FULL.optimizer, PAIRS, FULL.train.batch_size),
}
BAR = 100
LARGE, SHARD = 10**10, 1 << 28  # tokens
LARGE_BATCH, LARGE_LENGTH = 32, 1024
SECONDS = 3.0  # for each side of a round
SEED = 1


def open_data(name: str, folder: Path):
    """The prepared data of a model, and its batches."""
    shape, _, data, batch_size = MODELS[name]
    if data.path:
        data = replace(data, path=str(folder / str(data.path)))
    dataset = prepare(replace(data, cache_dir=str(folder / "cache")), lambda _: None)
    examples = Examples(dataset.train, shape.max_len, dataset.tokenizer.pad_id)
    return dataset, Batches(examples, batch_size, SEED)


def sparse_shards(folder: Path) -> list[dict]:
    """Shards of LARGE tokens, all 0, in files without content; as manifest.json would have them."""
    shards = []
    for begin in range(0, LARGE, SHARD):
        name, tokens = f"train-{len(shards):05}", min(SHARD, LARGE - begin)
        with open(folder / f"{name}.ids", "wb") as file:
            file.truncate(2 * tokens)
        shards.append({"name": name, "tokens": tokens, "documents": 0, "bytes": tokens, "top": 0})
    return shards


def measure_large(folder: Path):
    """Prints what it takes to begin with LARGE tokens."""
    held, began = private_memory(), time.perf_counter()
    split = open_split(folder, "stream", sparse_shards(folder), np.dtype("<u2"), 50257, False)
    batches = Batches(Examples(split, LARGE_LENGTH, 0), LARGE_BATCH, SEED)
    batches(0)
    first, work = time.perf_counter() - began, loading(batches)
    began = time.perf_counter()
    batches(10**9)
    far = time.perf_counter() - began
    tokens, step, began = 0, 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS:
        tokens += work(step)
        step += 1
    result = {"first_s": first, "far_s": far, "megabytes": (private_memory() - held) / 1e6}
    print(json.dumps(result | {"tokens_per_second": tokens / seconds}))


def private_memory() -> int:
    """Bytes of this process that no file stands behind; elsewhere than on Linux, all resident."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resident_memory()


def loading(batches: Batches):
    """A function that makes the batches of a step, and its divisor. Returns the tokens."""

    def step(number: int) -> int:
        micro_batches, _ = batches(number), batches.target_count(number)
        return sum(batch.ids.size for batch in micro_batches)

    return step


def training(name: str, dataset, batches: Batches):
    """A function that loads a step's batches and trains on them. Returns the tokens."""
    import torch

    from common.device import choose_device, to_device
    from model.cpu_layers import use_cpu_layers
    from model.loss import LossModule
    from model.transformer_full import TransformerDecoder
    from training.optimizer import create_optimizers
    from training.precision import Work, choose_precision
    from training.setup import configure_torch

    device = choose_device("cpu")
    configure_torch(TrainConfig(), device)
    shape, optimizer_config, _, _ = MODELS[name]
    shape = replace(shape, vocab_size=dataset.tokenizer.vocab_size)
    work = Work.of(batches.examples, batches.batch_size)
    precision, _ = choose_precision("auto", shape, work, device)
    model = TransformerDecoder.from_config(shape, precision.weights)
    use_cpu_layers(model)
    loss_module = LossModule(model)
    optimizers = create_optimizers(model, optimizer_config, precision)

    def step(number: int) -> int:
        micro_batches, targets = batches(number), batches.target_count(number)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for batch in micro_batches:
            with precision.autocast(device):
                loss = loss_module(*to_device(batch.inputs, device)) / targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return sum(batch.ids.size for batch in micro_batches)

    return step


def measure(side: str, name: str, folder: str):
    """Prints the tokens per second of one side."""
    if side == "large":
        return measure_large(Path(folder))
    dataset, batches = open_data(name, Path(folder))
    work = loading(batches) if side == "loader" else training(name, dataset, batches)
    for step in range(3):  # warm up
        work(step)
    tokens, step, began = 0, 3, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS:
        tokens += work(step)
        step += 1
    epochs = step / batches.steps_per_epoch
    print(json.dumps({"tokens_per_second": tokens / seconds, "epochs": epochs}))


def main():
    arguments = parser(__doc__, rounds=3).parse_args()
    if arguments.side:
        return measure(*arguments.side)
    result = Result("loader", "The loader against the model")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        Path(folder, "text.txt").write_text(readme * (2_000_000 // len(readme)), encoding="utf-8")
        for name in MODELS:
            open_data(name, Path(folder))  # prepared once, before anything is timed
            sides = {f"{name}: {side}": [side, name, folder] for side in ("loader", "training")}
            loader, model = in_turns("loader", sides, arguments.rounds).values()
            key = "tokens_per_second"
            fast, slow = median(loader, key), median(model, key)
            ratio, epochs = fast / slow, median(loader, "epochs")
            rows.append([name, fast, spread(loader, key), epochs, slow, spread(model, key), ratio])
            result.claim(f"{name}: batches, of what training takes", ratio, BAR)
        (large,) = in_turns("loader", {"large": ["large", "", folder]}, arguments.rounds).values()
    columns = ["model", "batches, tokens/s", "range", "epochs"]
    result.table("", [*columns, "training, tokens/s", "range", "times"], rows)
    first, far, held = (median(large, key) for key in ("first_s", "far_s", "megabytes"))
    result.claim("10^10 tokens: from opening to the first batch", first, 3, at_most=True, unit="s")
    result.claim("10^10 tokens: memory held for data", held, 200, at_most=True, unit="MB")
    fast = median(large, "tokens_per_second")
    result.table(
        f"10^10 tokens, batch {LARGE_BATCH} x {LARGE_LENGTH}",
        ["first batch, s", "batch of step 10^9, s", "memory, MB", "batches, tokens/s", "range"],
        [[first, far, held, fast, spread(large, "tokens_per_second")]],
    )
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.loader", main))
