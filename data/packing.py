"""Documents packed otherwise than one after another: whole where they fit, or each seen alone.

    train = open_examples(dataset, "train", config, seq_len, log)

Where documents have no <start>, the <end> of the one before them begins them, so that their first
token is learned, too.

Best fit is the best-fit decreasing of Ding et al. 2024, "Fewer Truncations Improve Language
Modeling" (arXiv 2404.10830): the longest document first, each into the fullest window that it fits
into. What is longer than a window is cut into full windows and a rest, so that nothing is left out.
Which document goes where is a function of their lengths and of seq_len, found once and kept beside
the prepared data:

    manifest.json   how many there are of all, and the files' hashes
    train.pieces    int64, the index among the ids at which each piece begins, window by window
    train.sizes     int32, how many places it takes: as many as it has tokens to predict
    train.windows   int64, the first piece of each window, and the number of pieces
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import MISSING, UnreadableError, UserError
from common.files import (
    checksummed_json,
    hash_file,
    read_checksummed_json,
    replace_synced,
    user_path,
)
from data.batches import ORDER, Batch, Examples
from data.config import DEFAULT_CACHE_DIR, DataConfig
from data.dataset import Dataset
from data.prepared.building import building, writing
from data.prepared.manifest import check_files
from data.prepared.token_files import Split

VERSION = 1  # of what goes where: another one is other batches, found beside those of older ones
BLOCK = 1 << 18  # documents that are packed together: memory does not grow with the data
FILES = {"pieces": np.dtype("<i8"), "sizes": np.dtype("<i4"), "windows": np.dtype("<i8")}

Log = Callable[[str], object]


def open_examples(
    dataset: Dataset,
    side: str,
    config: DataConfig,
    seq_len: int,
    log: Log,
    order: int = ORDER,
) -> Examples | None:
    """The examples of a side, "train" or "val", packed as `config` says; None where it has none.

    order: as in data/batches.py. Raises UserError.
    """
    split = getattr(dataset, side)
    if split is None:
        return None
    given = split, seq_len, dataset.tokenizer.pad_id
    if config.packing == "best_fit":
        plan = open_plan(dataset, side, config, seq_len, log)
        return BestFit(*given, plan, config.mask_documents, order)
    if config.mask_documents:
        return Masked(*given, dataset.has_start, order)
    return Examples(*given, order)


# Cut anywhere, each document seen alone -----------------------------------------------------------


class Masked(Examples):
    """Windows of documents one after another, none of which sees those before it.

    has_start: whether each begins with a token that nothing is to predict.
    """

    def __init__(
        self, split: Split, seq_len: int, pad_id: int, has_start: bool, order: int = ORDER
    ):
        super().__init__(split, seq_len, pad_id, order)
        assert split.borders is not None  # of documents
        self.borders, self.has_start, self.same_sizes = split.borders, has_start, False

    def beginnings(self, starts: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin in windows: (N,) rows, (N,) places from 1 to T."""
        earlier = 0 if self.has_start else 1  # the <end> before begins a document
        first = search(self.borders, starts + 1 + earlier)
        last = search(self.borders, starts + T + 1 + earlier)
        rows = np.repeat(np.arange(len(starts)), last - first)
        return rows, self.borders[ranges(first, last - first)] - earlier - starts[rows]

    def windows(self, starts: np.ndarray, T: int) -> Batch:
        batch = super().windows(starts, T)
        (rows, places), indices = self.beginnings(starts, T), None
        inside = places < T
        documents = flat_documents(len(starts), T, (rows * T + places)[inside])
        if self.has_start:  # which is not predicted: a document alone has nothing before it
            indices = np.delete(np.arange(batch.ids.size), rows * T + places - 1)
        targets = batch.targets if indices is None else batch.targets[indices]
        return Batch(batch.ids, targets, indices, batch.tokens, documents)

    def target_count(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> int:
        count = len(chosen) * self.seq_len
        if not self.has_start:
            return count
        return count - len(self.beginnings(shift + chosen * self.seq_len, self.seq_len)[0])

    def targets_per_byte(self) -> float:
        starts = len(self.borders) - 1 if self.has_start else 1
        return (len(self.split.ids) - starts) / max(1, self.split.bytes)


def flat_documents(B: int, T: int, inside: np.ndarray) -> np.ndarray:
    """`Batch.documents` of B rows of T; inside: the flat places where more than the rows begin."""
    return np.unique(np.concatenate([np.arange(B + 1) * T, inside])).astype(np.int32)


def search(ordered, values: np.ndarray) -> np.ndarray:
    """`np.searchsorted(ordered, values)`, of what can only be asked for numbers by their index."""
    low, high = np.zeros_like(values), np.full_like(values, len(ordered))
    while (open_ := low < high).any():
        middle = (low + high) // 2
        before = ordered[np.minimum(middle, len(ordered) - 1)] < values
        low = np.where(open_ & before, middle + 1, low)
        high = np.where(open_ & ~before, middle, high)
    return low


def ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] numbers), first[1], ...: all in one array."""
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(count.sum())


# Best fit -----------------------------------------------------------------------------------------


class BestFit(Examples):
    """Windows of whole documents as far as they fit, padded on the right.

    plan: the arrays of the split's files. masked: no document sees those before it.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        pad_id: int,
        plan: dict[str, np.ndarray],
        masked: bool,
        order: int = ORDER,
    ):
        super().__init__(split, seq_len, pad_id, order)
        self.pieces, self.sizes, self.first = plan["pieces"], plan["sizes"], plan["windows"]
        self.masked, self.same_sizes = masked, False
        self.count = len(self.first) - 1
        self.shifts = 1  # what stands in a window stays in it

    def pieces_of(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of windows, one window after the other; (B,) how many each has."""
        count = self.first[chosen + 1] - self.first[chosen]
        return ranges(self.first[chosen], count), count

    def batch(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> Batch:
        (pieces, count), T = self.pieces_of(chosen), self.seq_len
        sizes, rows = self.sizes[pieces].astype(np.int64), np.repeat(np.arange(len(chosen)), count)
        ends = np.cumsum(sizes)
        filled = np.bincount(rows, sizes, len(chosen)).astype(np.int64)  # places of each row
        places = rows * T + ends - sizes - (np.cumsum(filled) - filled)[rows]
        indices, source = ranges(places, sizes), ranges(self.pieces[pieces], sizes)
        ids = np.full(len(chosen) * T, self.pad_id, np.int64)
        ids[indices] = self.split.ids[source]
        targets = self.split.ids[source + 1].astype(np.int64)
        documents = None
        if self.masked:
            padding = (np.arange(len(chosen)) * T + filled)[filled < T]
            documents = flat_documents(len(chosen), T, np.concatenate([places, padding]))
        return Batch(ids.reshape(-1, T), targets, indices, len(targets), documents)

    @property
    def evaluated(self) -> int:
        return self.count

    def rest(self) -> Batch | None:
        return None

    def target_count(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> int:
        return int(self.sizes[self.pieces_of(chosen)[0]].sum(dtype=np.int64))

    def token_count(self, chosen: np.ndarray) -> int:
        return self.target_count(chosen)

    @property
    def tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    def targets_per_byte(self) -> float:
        return self.tokens / max(1, self.split.bytes)


def best_fit(sizes: np.ndarray, T: int) -> np.ndarray:
    """The window of each piece of `sizes` (N,), from 1 to T, by best-fit decreasing; int64, (N,).

    Pieces of one size are placed together, and windows with as much left are filled together: a
    window with r places left takes r // size of them before another one has less. So it takes
    about as many rounds as there are sizes, however many pieces.
    """
    order, numbers = np.argsort(-sizes, kind="stable"), np.empty(len(sizes), np.int64)
    left: list[list[np.ndarray]] = [[] for _ in range(T + 1)]  # the windows by places left
    waiting = np.zeros(T + 1, np.int64)  # how many these are
    opened = 0
    if not len(sizes):
        return numbers

    def put(windows: np.ndarray, places: int):
        if len(windows) and places:
            left[places].append(windows)
            waiting[places] += len(windows)

    descending, first = np.unique(-sizes[order], return_index=True)
    for size, items in zip(-descending, np.split(order, first[1:]), strict=True):
        while len(items):
            enough = np.flatnonzero(waiting[size:])
            if len(enough):
                places = int(size + enough[0])
                windows = np.concatenate(left[places])
                left[places], waiting[places] = [], 0
            else:
                places = T
                windows = opened + np.arange(-(-len(items) // (T // size)))
                opened += len(windows)
            each = places // size
            taken = windows[: -(-len(items) // each)]
            put(windows[len(taken) :], places)
            now, items = items[: each * len(taken)], items[each * len(taken) :]
            numbers[now] = np.repeat(taken, each)[: len(now)]
            put(taken[:-1], places - each * size)
            put(taken[-1:], places - (len(now) - each * (len(taken) - 1)) * size)
    return numbers


def open_plan(
    dataset: Dataset, side: str, config: DataConfig, seq_len: int, log: Log
) -> dict[str, np.ndarray]:
    """Memory-maps the files of a side, after making those of both if they are not in the cache."""
    splits = {"train": dataset.train} | ({"val": dataset.val} if dataset.val else {})
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    folder = cache / f"{dataset.name}-{dataset.fingerprint}-best_fit-{seq_len}-{VERSION}"
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with building(folder, dataset.fingerprint, log) as unfinished:
        if unfinished:
            manifest: dict = {"splits": {}}
            for name, split in splits.items():
                log(f"packing: {name} split of {dataset.name} into windows of {seq_len}")
                path = unfinished / name
                manifest["splits"][name] = write_plan(split, path, seq_len, dataset.has_start)
            files = sorted(unfinished.iterdir())
            manifest["files"] = {path.name: hash_file(path) for path in files}
            replace_synced(unfinished / "manifest.json", checksummed_json(manifest))
    try:
        manifest = read_checksummed_json(folder / "manifest.json")
        check_files(folder, manifest["files"])
        counts = manifest["splits"][side]
        plan = read_plan(folder / side, splits[side], counts)
        filled = counts["places"] / (counts["windows"] * seq_len)
    except UserError as error:
        raise UserError(f"{error}; remove {folder} and documents will be packed again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno not in MISSING:
            raise UnreadableError(error, folder) from None
        raise UserError(
            f"{folder}: does not say how documents are packed ({type(error).__name__}: {error}); "
            "remove it and they will be packed again"
        ) from None
    log(
        f"packing: best_fit, {side}: {counts['windows']:,} windows, {filled:.2%} filled; "
        f"{counts['cut'] / counts['documents']:.1%} of the documents are cut, being longer"
    )
    return plan


def write_plan(split: Split, path: Path, T: int, has_start: bool) -> dict[str, int]:
    """Writes the files of one split. Returns its counts."""
    assert split.borders is not None  # of documents
    documents = len(split.borders) - 1
    counts = {"documents": documents, "tokens": len(split.ids), "cut": 0, "places": 0}
    counts |= {"pieces": 0, "windows": 0}
    with ExitStack() as stack, tqdm(total=documents, leave=False, disable=None) as bar:
        files = {what: stack.enter_context(open(f"{path}.{what}", "wb")) for what in FILES}
        files["windows"].write(np.zeros(1, FILES["windows"]).data)
        for start in range(0, documents, BLOCK):
            borders = np.asarray(split.borders[start : start + BLOCK + 1])
            begins = np.maximum(0, borders[:-1] - (0 if has_start else 1))
            sizes = borders[1:] - 1 - begins  # the last token is only predicted
            full, rest = sizes // T, sizes % T
            short = np.flatnonzero(rest)
            # the full windows of what is longer, and then the windows of what is shorter
            numbers = full.sum() + best_fit(rest[short], T)
            order = np.argsort(numbers, kind="stable")  # in a window, documents as they came
            long = np.flatnonzero(full)
            places = ranges(np.zeros(len(long), np.int64), full[long]) * T
            found = {
                "pieces": [
                    np.repeat(begins[long], full[long]) + places,
                    (begins + full * T)[short][order],
                ],
                "sizes": [np.full(full.sum(), T), rest[short][order]],
            }
            in_window = [np.ones(full.sum(), np.int64), np.bincount(numbers)[full.sum() :]]
            found["windows"] = [counts["pieces"] + np.cumsum(np.concatenate(in_window))]
            for what, parts in found.items():
                files[what].write(np.concatenate(parts).astype(FILES[what]).data)
            counts["cut"] += int((sizes > T).sum())
            counts["places"] += int(sizes.sum())
            counts["pieces"] += sum(map(len, found["sizes"]))
            counts["windows"] += len(found["windows"][0])
            bar.update(len(sizes))
    return counts


def read_plan(path: Path, split: Split, counts: dict) -> dict[str, np.ndarray]:
    """The memory-mapped files of one split. Raises UserError naming the file that is wrong."""
    assert split.borders is not None  # of documents
    lengths = {**counts, "sizes": counts["pieces"], "windows": counts["windows"] + 1}
    plan: dict[str, np.ndarray] = {
        what: np.memmap(f"{path}.{what}", dtype, mode="r") for what, dtype in FILES.items()
    }
    fits = all(len(plan[what]) == lengths[what] for what in FILES)
    fits = fits and counts["documents"] == len(split.borders) - 1
    fits = fits and counts["tokens"] == len(split.ids)
    if not fits or plan["windows"][-1] != counts["pieces"]:
        raise UserError(f"{path}.windows: damaged (does not fit the prepared data)")
    return plan
