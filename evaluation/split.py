"""A split of a run's data, as evaluate.py reads it: as ids, and pairs as texts, too."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

from checkpoint.reader import Checkpoint
from checkpoint.run_data import data_config, was_imported
from common.errors import UnreadableError, UserError
from common.files import user_path
from data.batches import Examples
from data.config import DEFAULT_CACHE_DIR, DataConfig, as_paths
from data.dataset import Dataset, open_dataset, prepared_folder
from data.mixture import prepare, settings_of
from data.prepared.splitting import split_texts
from data.rng import permutation
from data.sources.builtin import named_files
from data.sources.records import Pair
from data.sources.source import name_data, open_source
from data.tokenizers.base import Tokenizer
from evaluation.memorization import Index, index_file, open_index
from model.config import ModelConfig

log = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Split:
    """A split as ids, and for pairs the texts of it and of training."""

    name: str
    trained_on: str  # the name of the training data
    kind: str
    examples: Examples
    size: int  # examples in all, of which a limit may leave but some
    pairs: list[Pair]
    known: list[Pair]
    start_token: bool  # whether documents begin with <start>
    slots: bool  # prompts and answers have placeholders for what they share
    index: Index | None  # of the training data


def read_split(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    shape: ModelConfig,
    split: str = "val",
    *,
    cache_dir: str = "",
    limit: int = 0,
    known: int | None = 0,
    memorization: bool = False,
) -> Split:
    """A split of a run's data, prepared as the run's own is. Raises UserError.

    split, cache_dir, limit: as evaluate.py has them. known: at most so many training pairs are read
    for look-ups, and none if there are more; None: all. memorization: with an index of the training
    data.
    """
    own, imported = split == "val", was_imported(checkpoint)
    if imported and (own or split == "test"):
        raise UserError(
            f"--split {split}: {checkpoint.run} was imported and has no data of its own; give a "
            "file with --split FILE"
        )
    if imported and memorization:
        raise UserError(
            f"--memorization: {checkpoint.run} was imported and has no data of its own; leave the "
            "flag out"
        )
    config = data_config(checkpoint, log)
    if cache_dir:
        config = replace(config, cache_dir=cache_dir)
    given = tokenizer if checkpoint.state.get("tokenizer_given") else None
    chosen = config if own else other_split(split, config)
    try:
        dataset = prepare(chosen, log, given if own else tokenizer)
    except UnreadableError:
        raise
    except UserError as error:
        message = with_flags(str(error), "" if own else config.kind)
        if imported and has_pairs(chosen):
            message = (
                f"--split {split}: has pairs, but {checkpoint.run} was imported and reads texts; "
                "give a file of texts, or train it on pairs first, with train.py --init_from"
            )
        raise UserError(message) from None
    now = dataset.fingerprint, dataset.tokenizer.fingerprint
    if own and now != (checkpoint.state.get("data"), checkpoint.state.get("tokenizer")):
        raise UserError(
            f"--split val: the data differs from what {checkpoint.path} was trained on, and may "
            "have in it what that was; give a file that training has not seen with --split FILE"
        )
    side = "val" if own else "train"
    encoded = dataset.val if own else dataset.train
    if encoded is None:
        raise UserError(
            "--split val: the run has no validation data (data.val_fraction = 0); give a file with "
            "--split FILE"
        )
    examples = Examples(encoded, config.seq_len or shape.max_len, tokenizer.pad_id)
    if encoded.starts is not None and not examples.count:
        raise UserError(
            f"--split {split}: every example is longer than the model's "
            f"{examples.seq_len} tokens; give another file"
        )
    log(f"data: {dataset.name} ({dataset.kind}): {encoded.describe()}")
    pairs, trained = [], []
    size = examples.evaluated + examples.are_windows  # and a stream's short window
    if dataset.kind == "pairs":
        pairs = [pair for its_side, pair in texts(chosen) if its_side == side]
        size = max(size, len(pairs))
        drawn = sorted(permutation(len(pairs), "evaluation")[: limit or None])
        pairs = [pairs[i] for i in drawn]
        if known != 0:
            all_known = (pair for its_side, pair in texts(config) if its_side == "train")
            trained = [*islice(all_known, known and known + 1)]
            if known and len(trained) > known:
                log(
                    f"note: without look-ups, which search over {known:,} pairs with --look_ups yes"
                )
                trained = []
            if not own and (seen := sum(map(set(trained).__contains__, pairs))):
                log(
                    f"note: {seen:,} of {len(pairs):,} pairs stand in the training data word for "
                    "word"
                )
    index = None
    if memorization:
        whole = dataset if own else prepare(config, lambda line: None, given)
        cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
        index = open_index(whole.train.ids, index_file(cache, whole))
    start, slots = dataset.start_token, dataset.slots
    return Split(
        dataset.name, data_name(config), dataset.kind, examples, size, pairs, trained, start, slots,
        index,
    )  # fmt: skip


def with_flags(message: str, kind: str) -> str:
    """What is wrong with data, with what evaluate.py, which has no settings of it, can do.

    kind: of the run's data, where a file is read as that; "" where the run's data itself is.
    """
    for setting, flag in {
        "set data.cache_dir to a writable folder": "give a writable folder with --cache_dir",
        "set data.cache_dir": "give another folder with --cache_dir",
    }.items():
        message = message.replace(setting, flag)
    if not kind:
        return message
    first, *fixes = message.replace("data.path = ", "--split ", 1).split("; ")
    known = [fix for fix in fixes if not re.search(r"\bdata\.\w|set it to", fix)]
    if known != fixes:
        known.append(f"give a file to read as {kind}, as the run's own data is")
    return "; ".join([first, *known])


def has_pairs(config: DataConfig) -> bool:
    """Whether files look like pairs, whatever kind they are to be read as."""
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    with contextlib.suppress(UserError):
        return open_source(replace(config, kind="auto"), lambda line: None, cache).kind == "pairs"
    return False


def data_name(config: DataConfig) -> str:
    """What a run's data is called, of a mixture all of it."""
    parts = (source.name or name_data(settings_of(config, source)) for source in config.sources)
    return " + ".join(parts) or name_data(config)


def other_split(split: str, config: DataConfig) -> DataConfig:
    """The settings that read a file, or the test split of a run's data, as its data is read."""
    path = split
    if split == "test":
        folder = test_folder(config)
        if folder is None:
            raise UserError(
                "--split test: the run's data has no test split; give a file with --split FILE"
            )
        path = str(folder / "test.nl")
    elif config.kind in ("auto", "pairs") and all(
        os.path.isfile(user_path(split) / f"dev.{end}") for end in ("nl", "cm")
    ):
        path = str(user_path(split) / "dev.nl")
        log(f"--split {split}: of the folder, dev.nl and dev.cm")
    return replace(config, path=path, sources=(), val_path="", val_fraction=0.0)


def test_folder(config: DataConfig) -> Path | None:
    """The folder that has a run's test.nl; None if there is none."""
    paths = as_paths(config.path)
    folder = user_path(paths[0]) if len(paths) == 1 else None
    if not paths and not config.sources:
        cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
        folder = named_files(config.source, cache, log)[0].parent
    return folder if folder is not None and (folder / "test.nl").is_file() else None


def texts(config: DataConfig) -> Iterator[tuple[str, Pair]]:
    """The pairs that settings read, with their sides."""
    if config.sources:
        for source in config.sources:
            yield from texts(settings_of(config, source))
        return
    if folder := prepared_folder(config, log):
        yield from decoded(open_dataset(folder))
        return
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    source = open_source(config, lambda line: None, cache)
    yield from cast(Iterator[tuple[str, Pair]], split_texts(source, config))


def decoded(dataset: Dataset) -> Iterator[tuple[str, Pair]]:
    """The pairs of a folder of prepared data, of which nothing else may be there."""
    if dataset.slots:
        raise UserError(
            f"data.path: {dataset.name} is prepared with data.slots, and has no arguments to put "
            "back; give its texts as data.path when training, or others with --split FILE"
        )
    for side, split in (("train", dataset.train), ("val", dataset.val)):
        if split is None or split.starts is None or split.prompts is None:
            continue
        for number, length in enumerate(split.prompts):
            start, end = int(split.starts[number]), int(split.starts[number + 1])
            ids = split.ids[start:end]
            prompt, completion = ids[: int(length) - 1], ids[int(length) : -1]
            yield side, (dataset.tokenizer.decode(prompt), dataset.tokenizer.decode(completion))
