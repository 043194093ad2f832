"""Documents packed in each way, and line by line: loss per byte after the same number of tokens.

    python -m benchmarks.packing

The corpus is the docstrings of this Python's standard library, each a document. A side trains the
same small model from the same weights on as many tokens, padding not counted; line by line, each
document is a padded row, and what is longer than a row is left out. All are judged alike: each held
out document alone, in pieces where it is longer, and only bytes of text are counted.
"""

import ast
import json
import math
import sys
import sysconfig
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import Result, in_turns, median, parser, spread
from common import cli
from data.batches import Batches, Examples, evaluation_batches
from data.config import DataConfig
from data.dataset import Dataset, prepare
from data.packing import open_examples
from data.prepared.token_files import Split
from data.sources.builtin import SKIPPED
from model.config import ModelConfig
from training.config import OptimizerConfig, TrainConfig

SEQ_LEN, BATCH = 256, 16  # windows of a step; line by line, about as many tokens
SHAPE = ModelConfig(
    d_model=128, n_heads=4, n_layers=4, d_ff=512, max_len=SEQ_LEN, positions="learned",
    norm_first=True, final_norm=True, dropout=0.0,
)  # fmt: skip
DATA = DataConfig(path="docstrings.jsonl", vocab_size=2048)
LAYOUTS = {  # name: how documents are packed; None: line by line
    "line by line": None,
    "concat": DATA,
    "concat, masked": replace(DATA, mask_documents=True),
    "best_fit": replace(DATA, packing="best_fit"),
    "best_fit, masked": replace(DATA, packing="best_fit", mask_documents=True),
}
TOKENS = 1_200_000
WARM_UP = 0.05  # of the tokens
SEED = 1


def write_docstrings(path: Path):
    """JSON lines of text: each docstring of the standard library once."""
    found = {}  # keeps the order
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if SKIPPED & set(file.relative_to(root).parts):  # tests and what is not of the library
            continue
        with warnings.catch_warnings(action="ignore"):
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                found[text] = True
    lines = (json.dumps({"text": text}) + "\n" for text in found)
    path.write_text("".join(lines), encoding="utf-8")


def open_data(folder: Path) -> tuple[Dataset, DataConfig]:
    """The prepared docstrings, and where they lie."""
    path, cache = str(folder / str(DATA.path)), str(folder / "cache")
    config = replace(DATA, path=path, cache_dir=cache)
    return prepare(config, lambda _: None), config


def padded(split: Split, seq_len: int, pad_id: int) -> Examples:
    """Each document a row: as lines are, with those left out that are longer."""
    assert split.borders is not None  # of documents
    starts = np.asarray(split.borders[:])
    firsts = np.ones(len(starts) - 1, np.int32)  # <start> is not predicted
    return Examples(Split(split.ids, starts, firsts, split.bytes), seq_len, pad_id)


def open_layout(name: str, folder: Path) -> tuple[Dataset, Batches]:
    """The training batches of a side, of about BATCH x SEQ_LEN tokens."""
    (dataset, config), layout, rows = open_data(folder), LAYOUTS[name], BATCH
    if layout is None:
        examples = padded(dataset.train, SEQ_LEN, dataset.tokenizer.pad_id)
        rows = round(BATCH * SEQ_LEN * examples.count / examples.tokens)
    else:
        layout = replace(layout, path=config.path, cache_dir=config.cache_dir)
        examples = open_examples(dataset, "train", layout, SEQ_LEN, lambda _: None)
        assert examples is not None  # nothing is prepared without
    return dataset, Batches(examples, rows, SEED)


def train(name: str, folder: Path, tokens: int) -> dict:
    """Trains one side, and judges it."""
    import torch

    from common.device import PRECISIONS, choose_device, cpu_has_bf16, to_device
    from model.cpu_layers import use_cpu_layers
    from model.loss import LossModule
    from model.transformer_full import TransformerDecoder
    from training.optimizer import create_optimizers, set_lr
    from training.setup import configure_torch

    device = choose_device("cpu")
    configure_torch(TrainConfig(), device)
    precision = PRECISIONS["bf16" if cpu_has_bf16() else "fp32"]
    dataset, batches = open_layout(name, folder)
    shape = replace(SHAPE, vocab_size=dataset.tokenizer.vocab_size)
    torch.manual_seed(SEED)
    model = TransformerDecoder.from_config(shape, precision.weights)
    use_cpu_layers(model)
    loss_module = LossModule(model)
    optimizers = create_optimizers(model, OptimizerConfig(lr=2e-3), precision)

    def total_loss(examples: Examples) -> float:
        """Nats, summed over all targets."""
        with torch.no_grad(), precision.autocast(device):
            made = evaluation_batches(examples, BATCH)
            return sum(loss_module(*to_device(batch.inputs, device)).item() for batch in made)

    seen = places = step = 0
    began = time.perf_counter()
    while seen < tokens:
        share = seen / tokens
        set_lr(optimizers, min(share / WARM_UP, 1) * (1 - 0.9 * share))
        (batch,), targets = batches(step), batches.target_count(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with precision.autocast(device):
            loss = loss_module(*to_device(batch.inputs, device)) / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen, places, step = seen + batch.tokens, places + batch.ids.size, step + 1
    seconds = time.perf_counter() - began
    loss_module.eval()
    alone = replace(open_data(folder)[1], packing="best_fit", mask_documents=True)
    val = open_examples(dataset, "val", alone, SEQ_LEN, lambda _: None)
    assert val is not None and dataset.val is not None
    short = padded(dataset.val, SEQ_LEN, dataset.tokenizer.pad_id)
    return {
        "tokens_per_second": seen / seconds,
        "padding": 1 - seen / places,
        "epochs": step / batches.steps_per_epoch,
        "all": total_loss(val) / math.log(2) / dataset.val.bytes,
        "short": total_loss(short) / math.log(2) / count_bytes(dataset, short),
    }


def count_bytes(dataset: Dataset, short: Examples) -> int:
    """Of the text of the documents that are rows."""
    starts, ids = short.split.starts, short.split.ids
    assert starts is not None
    texts = (ids[starts[i] + 1 : starts[i + 1] - 1].tolist() for i in short.kept)
    return sum(len(dataset.tokenizer.decode(text).encode()) for text in texts)


def cuts(dataset: Dataset, config: DataConfig, seq_len: int) -> list:
    """Of one length of windows: how many documents each layout cuts or leaves out, and the fill."""
    split, said = dataset.train, []
    assert split.borders is not None
    borders = np.asarray(split.borders[:])
    first, last = borders[:-1] // seq_len, (borders[1:] - 2) // seq_len
    best_fit = replace(config, packing="best_fit")
    examples = open_examples(dataset, "train", best_fit, seq_len, said.append)
    assert examples is not None  # nothing is prepared without
    rows = padded(split, seq_len, 0)
    longer = rows.dropped / (len(borders) - 1)
    left_out = 1 - rows.tokens / (len(split.ids) - len(borders) + 1)
    filled = examples.tokens / (examples.count * seq_len)
    percent = [f"{share:.1%}" for share in (longer, (first != last).mean(), longer, left_out)]
    return [f"{seq_len:,}", *percent, f"{filled:.2%}"]


def main():
    made = parser(__doc__, rounds=1)
    made.add_argument("--tokens", type=int, default=TOKENS, help="that each side trains on")
    arguments = made.parse_args()
    if arguments.side:
        name, folder, tokens = arguments.side
        print(json.dumps(train(name, Path(folder), int(tokens))))
        return
    result = Result("packing", "Documents packed, and line by line")
    with tempfile.TemporaryDirectory() as folder:
        write_docstrings(Path(folder, str(DATA.path)))
        dataset, config = open_data(Path(folder))  # once, before anything is timed
        sides = {name: [name, folder, str(arguments.tokens)] for name in LAYOUTS}
        found = in_turns("packing", sides, arguments.rounds)
        shares = [cuts(dataset, config, seq_len) for seq_len in (128, 256, 512, 1024)]
        about = f"{dataset.train.describe()}, {dataset.train.bytes:,} bytes"
    rows, key = [], "tokens_per_second"
    for name, runs in found.items():
        bits = [f"{median(runs, which):.3f}" for which in ("all", "short")]
        padding, epochs = f"{median(runs, 'padding'):.1%}", f"{median(runs, 'epochs'):.1f}"
        rows.append([name, *bits, padding, epochs, median(runs, key), spread(runs, key)])
    result.table(
        f"{arguments.tokens:,} tokens in windows of {SEQ_LEN}",
        ["", "bits per byte", "of documents no longer", "padding", "epochs", "tokens/s", "range"],
        rows,
        f"Trained on {about}; judged on the documents held out, each alone.",
    )
    result.table(
        "What is cut",
        ["windows of", "longer", "cut by concat", "by best_fit", "tokens left out by lines",
         "best_fit fills"],
        shares,
        "Shares of the documents, and of the tokens; `best_fit` cuts what is longer, and no other.",
    )  # fmt: skip
    lines, best = found["line by line"], found["best_fit, masked"]
    result.claim(
        "bits per byte, best_fit masked of line by line",
        median(best, "all") / median(lines, "all"), 1, at_most=True,
    )  # fmt: skip
    result.claim(
        "the same, of documents no longer than a window",
        median(best, "short") / median(lines, "short"), 1.01, at_most=True,
    )  # fmt: skip
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.packing", main))
