"""What all engines of a comparison are given: the same weights, documents, order, and rules.

A job is a folder: `job.json` and `weights.safetensors` (float64). `python -m comparison.worker`
trains one engine on it, in a process of its own; what that found is in `<engine>.json`.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from checkpoint.safetensors_python import write_arrays
from data.batches import Batch
from data.dataset import Dataset, Log
from data.mixture import make_batches, open_examples, prepare
from data.prompt_format import end_id, prompt_ids, unread
from data.rng import derive_seed
from data.slots import Slots, readable
from model.config import IGNORE_INDEX
from model.transformer_lite import TransformerDecoderLite
from torchlite import nn
from training.config import Config
from training.schedule import lr_factor

SAMPLES = 20  # texts that each engine writes after training


@dataclass(frozen=True)
class Job:
    """One part of a comparison: a configuration and how it is trained. `config` is resolved."""

    name: str
    folder: Path
    config: Config
    dataset: Dataset
    precision: str
    steps: int
    documents: int
    parameters: int

    def text(self, ids: list[int]) -> str:
        """What the ids of a sample say."""
        text = self.dataset.tokenizer.decode(ids)
        return readable(text) if self.dataset.slots else text


def create(folder: Path, name: str, config: Config, steps: int, precision: str, log: Log) -> Job:
    """Prepares the data, draws the weights, and writes the job's folder. Raises UserError."""
    dataset = prepare(config.data, log)
    tokenizer = dataset.tokenizer
    shape = replace(config.model, vocab_size=tokenizer.vocab_size, dropout=0.0)
    shape = replace(shape, attention_dropout=0.0)
    config = replace(config, model=shape, max_steps=steps)
    examples = open_examples(dataset, "train", config.seq_len, config=config.data, log=log)
    assert examples is not None  # nothing is prepared without a training side
    batches = make_batches(examples, config.train.batch_size, config.seed)
    # how a run of its own would begin, so that nobody starts from special weights
    nn.manual_seed(derive_seed("weights", config.seed))
    model = TransformerDecoderLite.from_config(shape, "float64")
    weights = {name: p.data for name, p in model.named_parameters()}
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(write_arrays(weights))
    optimizer, kind = config.optimizer, dataset.kind
    asked = [Slots(text, dataset.slots).prompt for text in prompts(dataset)]
    starts = [prompt_ids(kind, tokenizer, text, dataset.start_token) for text in asked]
    if note := unread(starts, tokenizer, shape.max_len):
        log(note)
    content = {
        "model": asdict(shape),
        "precision": precision,
        "adam": [optimizer.beta1, optimizer.beta2, optimizer.eps],
        "lr": [optimizer.lr * lr_factor(optimizer, step, config.horizon) for step in range(steps)],
        "batches": [[row for part in batches(step) for row in rows(part)] for step in range(steps)],
        "sampling": asdict(config.sample),
        "seed": config.seed,
        "prompts": starts,
        "end_id": end_id(kind, tokenizer),
    }
    (folder / "job.json").write_text(json.dumps(content))
    parameters = sum(array.size for array in weights.values())
    return Job(name, folder, config, dataset, precision, steps, examples.count, parameters)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) for each sequence, up to its last target: nothing after it has any effect.

    Documents of a row that are seen alone are sequences of their own.
    """
    B, T = batch.ids.shape
    targets = np.full(B * T, IGNORE_INDEX, np.int64)
    targets[slice(None) if batch.target_indices is None else batch.target_indices] = batch.targets
    borders = np.arange(B + 1) * T if batch.documents is None else batch.documents
    found = []
    for start, end in pairwise(borders.tolist()):
        ids, predicted = batch.ids.reshape(-1)[start:end], targets[start:end]
        if len(places := np.flatnonzero(predicted != IGNORE_INDEX)):  # not of padding
            n = int(places[-1]) + 1
            found.append((ids[:n].tolist(), predicted[:n].tolist()))
    return found


def prompts(dataset: Dataset) -> list[str]:
    """What the samples begin with: held-out prompts for pairs, else nothing."""
    if dataset.kind == "pairs":
        return [pair["prompt"] for pair in dataset.held_out[:SAMPLES]]
    return [""] * (SAMPLES if dataset.kind == "lines" else 3)
