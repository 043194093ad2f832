"""Mixtures: several sources that are trained on at once, each for its share of the tokens.

Every source is prepared by itself, so that other weights prepare nothing anew, with one tokenizer
that has learned from all. Whose turn it is is counted, not drawn: after any number of examples each
source has had its share but for less than two (`dealt`), and goes through epochs of its own.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import chain, zip_longest
from typing import Any, get_args

import numpy as np

from common.errors import UnreadableError, UserError
from common.files import (
    checksummed_json,
    hash_file,
    read_checksummed_json,
    replace_synced,
    user_path,
)
from data import dataset as single
from data import packing
from data.batches import ORDER, Batch, Batches, Examples
from data.config import DEFAULT_CACHE_DIR, DataConfig, Kind, SourceConfig
from data.dataset import Dataset, Log
from data.prepared.building import LAYOUT, building, describe_tokenizer, make_tokenizer, writing
from data.prepared.manifest import check_files, explained
from data.prepared.splitting import MAX_HELD_OUT, check_sides, count_characters, split_texts
from data.prepared.token_files import Shards, Split
from data.rng import derive_seed
from data.sources.source import Source, open_source
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer

WINDOWS = ("stream", "documents")  # kinds whose examples are windows


@dataclass(frozen=True)
class Mixture(Dataset):
    """Several prepared sources. `train` and `val` are theirs, one after the other."""

    sources: tuple[Dataset, ...]
    weights: tuple[Fraction, ...]  # shares of the tokens, 1 in all


# Preparing --------------------------------------------------------------------------------------


def prepare(
    config: DataConfig, log: Log = print, tokenizer: Tokenizer | None = None, jobs: int = 0
) -> Dataset:
    """Opens the data set of `config`, a mixture or a single one, after preparing what is not there.

    `tokenizer` is used in place of the one that `config` describes. jobs: as in data/dataset.py.
    """
    if not config.sources:
        return single.prepare(config, log, tokenizer, jobs)
    parts = [settings_of(config, source) for source in config.sources]
    opened = [named(i, open_part, part, log, tokenizer) for i, part in enumerate(parts)]
    names = [given.name or each.name for given, each in zip(config.sources, opened, strict=True)]
    check_names(names)
    kind = common_kind(names, [each.kind for each in opened])
    ready = [each.tokenizer for each in opened if isinstance(each, Dataset)]
    learned = tokenizer or (ready or [None])[0]
    unread = [each if isinstance(each, Source) else None for each in opened]
    learned = learned or learn_tokenizer(config, parts, list(filter(None, unread)), log)
    sources = tuple(
        replace(
            named(i, single.prepare, part, log, learned, jobs, source),
            name=name,
            tokenizer_given=tokenizer is not None,
        )
        for i, (name, part, source) in enumerate(zip(names, parts, unread, strict=True))
    )
    for source in sources:
        if source.slots:  # whose arguments are gone
            raise UserError(
                f"data.sources: {source.name} is prepared with data.slots, which takes one source; "
                "leave the others out, or give its texts"
            )
    val = [source.val for source in sources if source.val]
    total = sum(exact(source.weight) for source in config.sources)
    weights = tuple(exact(source.weight) / total for source in config.sources)
    described = [[s.fingerprint, str(w)] for s, w in zip(sources, weights, strict=True)]
    dealt_out = zip_longest(*(source.held_out for source in sources))
    held_out = [pair for pairs in dealt_out for pair in pairs if pair is not None]
    return Mixture(
        " + ".join(names), kind, digest(described), learned, tokenizer is not None,
        joined([source.train for source in sources]),
        joined(val) if val else None,
        held_out[:MAX_HELD_OUT], all(source.start_token for source in sources), sources, weights,
    )  # fmt: skip


def settings_of(config: DataConfig, source: SourceConfig) -> DataConfig:
    """The settings of a source as those of data of its own."""
    given: dict[str, Any] = {k: v for k, v in asdict(source).items() if v is not None}
    del given["weight"], given["name"]
    return replace(config, **given, sources=())


def open_part(config: DataConfig, log: Log, tokenizer: Tokenizer | None) -> Source | Dataset:
    """A source, open to be read; or as it was prepared, if it is a folder of that."""
    if folder := single.prepared_folder(config, log):
        return single.open_given(folder, config, tokenizer)
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    return open_source(config, log, cache)


def named(number: int, work, *arguments):
    """work(*arguments), whose errors name the source."""
    try:
        return work(*arguments)
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"data.sources.{number}: {error}") from None


def check_names(names: list[str]):
    """Refuses two sources of one name, which would share a curve."""
    for name in names:
        if names.count(name) > 1:
            numbers = [str(i) for i, other in enumerate(names) if other == name]
            raise UserError(
                f"data.sources: {' and '.join(numbers)} are both called {name}; give each a name"
            )


def common_kind(names: list[str], kinds: list[Kind]) -> Kind:
    """What the mixture is read as, where all sources are windows, or none: the richer kind."""
    windows = [kind in WINDOWS for kind in kinds]
    if any(windows) and not all(windows):
        told = ", ".join(f"{name} is {kind}" for name, kind in zip(names, kinds, strict=True))
        raise UserError(
            f"data.sources: {told}; give sources that are all windows ({', '.join(WINDOWS)}) or "
            "none, or set data.kind"
        )
    return max(kinds, key=get_args(Kind).index)  # stream, lines, documents, pairs


def exact(weight: float) -> Fraction:
    """A weight as it is written: 0.1 is a tenth, which no binary number is."""
    return Fraction(repr(weight))


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def learn_tokenizer(
    config: DataConfig, parts: list[DataConfig], sources: list[Source], log: Log
) -> Tokenizer:
    """One tokenizer made of all sources, by their size: other weights need no other one."""
    each = list(zip(sources, parts, strict=True))
    made_of = [[source.fingerprint, source.kind, part.val_fraction] for source, part in each]
    fingerprint = digest([made_of, describe_tokenizer(config)])
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    folder = cache / f"tokenizer-{fingerprint}-{LAYOUT}"

    def texts(side: str) -> Iterator[str]:
        for source, part in each:
            split = split_texts(source, part, count_characters(source, part))
            documents = (document for own, document in split if own == side)
            yield from chain.from_iterable(documents) if source.kind == "pairs" else documents

    with building(folder, fingerprint, log) as unfinished:
        if unfinished:
            for i, (source, part) in enumerate(each):
                named(i, check_sides, source, part)
            readers: list[Any] = [lambda *_: texts("train"), lambda *_: texts("val")]
            whole = Source("mixture", "lines", readers[0], readers[1], fingerprint, {})
            make_tokenizer(config, whole, 0, log).save(unfinished)
            files = {path.name: hash_file(path) for path in sorted(unfinished.iterdir())}
            replace_synced(unfinished / "manifest.json", checksummed_json({"files": files}))
    with explained(folder):
        check_files(folder, read_checksummed_json(folder / "manifest.json")["files"])
        return load_tokenizer(folder)


# Reading ----------------------------------------------------------------------------------------


class Joined(Shards):
    """Arrays one after the other as one, in the place of files."""

    def __init__(self, parts: list[np.ndarray | Shards]):
        first = np.cumsum([0, *map(len, parts)]).tolist()
        super().__init__([], first, np.result_type(*(part.dtype for part in parts)))
        self.parts = parts

    def read(self, begin: int, out: np.ndarray):
        while len(out):
            number = bisect_right(self.first, begin) - 1
            at, n = begin - self.first[number], min(len(out), self.first[number + 1] - begin)
            out[:n] = self.parts[number][at : at + n]
            begin, out = begin + n, out[n:]


def joined(splits: list[Split]) -> Split:
    """Splits one after the other. Where packed documents begin is left out."""
    ids = Joined([split.ids for split in splits])
    size, starts, prompts = sum(split.bytes for split in splits), [], []
    for split, begin in zip(splits, ids.first, strict=False):
        if split.starts is None or split.prompts is None:
            return Split(ids, None, None, size)
        starts.append(split.starts[:-1] + begin)
        prompts.append(split.prompts)
    return Split(ids, np.concatenate([*starts, [len(ids)]]), np.concatenate(prompts), size)


class MixedExamples(Examples):
    """The examples of several sources, numbered through: those of the first, of the second, ...

    shares: of the tokens, 1 in all.
    """

    def __init__(self, parts: dict[str, Examples], shares: list[Fraction]):
        self.parts, first = parts, next(iter(parts.values()))
        self.seq_len, self.pad_id, self.order = first.seq_len, first.pad_id, first.order
        self.shares = [share / sum(shares) for share in shares]
        each = list(parts.values())
        self.are_windows = first.are_windows
        self.same_sizes = all(part.same_sizes for part in each)
        self.dropped = sum(part.dropped for part in each)
        self.begins = np.cumsum([0, *(part.count for part in each)])
        self.count = int(self.begins[-1])
        if not self.are_windows:
            self.lengths = np.concatenate([part.lengths for part in each])
            self.n_targets = np.concatenate([part.n_targets for part in each])

    @property
    def evaluated(self) -> int:
        return sum(part.evaluated for part in self.parts.values())

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts.values())

    def of_parts(
        self, chosen: np.ndarray, shift: np.ndarray | int = 0
    ) -> Iterator[tuple[Examples, np.ndarray, np.ndarray]]:
        """Each source that has some of the examples, their numbers in it, and their shifts."""
        owner = np.searchsorted(self.begins, chosen, "right") - 1
        shift = np.broadcast_to(shift, chosen.shape)
        for number, part in enumerate(self.parts.values()):
            own = owner == number
            if own.any():
                yield part, chosen[own] - self.begins[number], shift[own]

    def batch(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> Batch:
        found = [part.batch(own, moved) for part, own, moved in self.of_parts(chosen, shift)]
        return stack(found, self.pad_id)

    def target_count(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> int:
        return sum(part.target_count(own, by) for part, own, by in self.of_parts(chosen, shift))

    def token_count(self, chosen: np.ndarray) -> int:
        return sum(part.token_count(own) for part, own, _ in self.of_parts(chosen))


def stack(batches: list[Batch], pad_id: int) -> Batch:
    """The rows of all batches as one, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    T = max(batch.ids.shape[1] for batch in batches)
    rows = [
        np.pad(b.ids, [(0, 0), (0, T - b.ids.shape[1])], constant_values=pad_id) for b in batches
    ]
    targets, indices, documents, first = [], [], [], 0
    for batch in batches:
        B, width = batch.ids.shape
        places = np.arange(B * width) if batch.target_indices is None else batch.target_indices
        indices.append((first + places // width) * T + places % width)
        targets.append(batch.targets)
        if batch.documents is not None:  # of windows, which are all as long
            documents.append(first * T + batch.documents[:-1])
        first += B
    all_predict = all(batch.target_indices is None for batch in batches)
    return Batch(
        np.concatenate(rows),
        np.concatenate(targets),
        None if all_predict else np.concatenate(indices),
        sum(batch.tokens for batch in batches),
        np.concatenate([*documents, [first * T]]).astype(np.int32) if documents else None,
    )


class MixedBatches(Batches):
    """The training batches of a mixture. They are all full: epochs are the sources' own.

    `steps_per_epoch` read as many examples as all sources have.
    """

    examples: MixedExamples  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(self, examples: MixedExamples, batch_size: int, seed: int):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(examples.count / batch_size)
        parts = list(examples.parts.values())
        self.sources = []
        for i, (part, share) in enumerate(zip(parts, examples.shares, strict=True)):
            # those of like length that go together are about as many as a batch takes
            size = max(1, round(batch_size * share))
            self.sources.append(named(i, Batches, part, size, derive_seed("source", seed, i)))
        # of examples: the shorter those of a source are, the more of them make its share
        each = zip(parts, examples.shares, strict=True)
        weights = [share * part.count / part.tokens for part, share in each]
        scale = math.lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * scale) for weight in weights]

    def chosen(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a step, source after source, and the shift of each."""
        before = dealt(step * self.batch_size, self.weights)
        after = dealt((step + 1) * self.batch_size, self.weights)
        numbers, shifts = [], []
        for i, source in enumerate(self.sources):
            if before[i] < after[i]:
                own, shift = source.take(before[i], after[i])
                numbers.append(own + self.examples.begins[i])
                shifts.append(shift)
        return np.concatenate(numbers), np.concatenate(shifts)

    def rows(self, step: int) -> int:
        return self.batch_size


def dealt(count: int, weights: list[int]) -> list[int]:
    """How many of the first `count` examples are each source's: a function, whatever `count` is.

    The sources, the heaviest first, are parted in two as near to halves as can be, each half gets
    its share to the nearest whole number, and is parted again. One more example goes to one source
    more. A part of several sources has at most two thirds of what is parted, so that the halves of
    examples that rounding costs at each level never add up to two.
    """
    found = [0] * len(weights)

    def part(count: int, sources: list[int]):
        if len(sources) == 1:
            found[sources[0]] = count
            return
        total, first = sum(weights[i] for i in sources), 0
        sums = [first := first + weights[i] for i in sources[:-1]]
        cut = min(range(len(sums)), key=lambda i: abs(2 * sums[i] - total))
        mine = (2 * count * sums[cut] + total) // (2 * total)
        part(mine, sources[: cut + 1])
        part(count - mine, sources[cut + 1 :])

    part(count, sorted(range(len(weights)), key=lambda i: -weights[i]))
    return found


def make_batches(examples: Examples, batch_size: int, seed: int) -> Batches:
    """The training batches of a single source or of a mixture. Raises UserError."""
    if isinstance(examples, MixedExamples):
        return MixedBatches(examples, batch_size, seed)
    return Batches(examples, batch_size, seed)


def open_examples(
    data: Dataset,
    side: str,
    seq_len: int,
    order: int = ORDER,
    config: DataConfig = DataConfig(),  # noqa: B008, it is frozen
    log: Log = print,
) -> Examples | None:
    """The examples of a side of a data set, "train" or "val"; None where it has none.

    config: how documents are packed.
    """
    if isinstance(data, Mixture):
        found = [
            (source.name, open_examples(source, side, seq_len, order, config, log))
            for source in data.sources
        ]
        parts = {name: examples for name, examples in found if examples is not None}
        shares = [w for w, (_, examples) in zip(data.weights, found, strict=True) if examples]
        return MixedExamples(parts, shares) if parts else None
    return packing.open_examples(data, side, config, seq_len, log, order)
