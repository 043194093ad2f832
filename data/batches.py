"""Token files to batches: batch(step) is a pure function of the seed and the step.

Data is visited in epochs, without replacement. An epoch is cut into batches of `batch_size`
examples, the last of which may be short, and accumulation cuts a batch into micro-batches; each of
several processes takes neighbouring ones. So neither the number of processes nor accumulation
changes what an optimizer step learns from, and a micro-batch is the same whoever takes it.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from data.prepared.token_files import Split
from data.rng import Permutation, derive_seed, permutation

# Of the windows of a stream: a function. 1, that of earlier versions, is an array of all of them.
ORDER = 2
AHEAD = 4096  # examples whose places are computed together: one costs as much as a hundred
POOL_BATCHES = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    ids: (B, T) int64, padded on the right. targets: (N,) int64, the tokens to predict.
    target_indices: (N,) int64, flat indices into B x T of the places that predict them; None: all.
    tokens: how many of the ids are no padding. documents: (D + 1,) int32, the flat index at which
    each document begins that is attended to alone, and B T; None: a row is one.
    """

    ids: np.ndarray
    targets: np.ndarray
    target_indices: np.ndarray | None
    tokens: int
    documents: np.ndarray | None = None

    @property
    def inputs(self) -> tuple[np.ndarray | None, ...]:
        """What a LossModule is called with."""
        return self.ids, self.targets, self.target_indices, self.documents


# what a process computes that takes part in a forward pass and has nothing to add: a loss of 0
NO_BATCH = Batch(*(np.zeros(shape, np.int64) for shape in ((1, 1), 0, 0)), tokens=0)


class Examples:
    """The examples of a split, by number: windows of a stream, or documents that fit.

    A stream's windows lie side by side; `shift` moves them all, so that from epoch to epoch the
    cuts fall elsewhere. `dropped` counts the documents longer than `seq_len`. `order` is 1 for runs
    that began with an array of the order. Documents packed in other ways are in data/packing.py.

    same_sizes: whether all arrays of a batch have the same size as those of another with as many
    examples.
    """

    def __init__(self, split: Split, seq_len: int, pad_id: int, order: int = ORDER):
        self.split, self.seq_len, self.pad_id, self.order = split, seq_len, pad_id, order
        self.dropped = 0
        self.are_windows = self.same_sizes = split.starts is None
        if split.starts is None:
            # one window is kept back, so that every shift below a window has room
            windows = (len(split.ids) - 1) // seq_len
            self.count = max(min(1, windows), (len(split.ids) - seq_len) // seq_len)
            self.shifts = max(1, min(seq_len, len(split.ids) - self.count * seq_len))
            return
        assert split.prompts is not None  # a split of documents has both
        lengths = np.diff(split.starts) - 1  # the last token of a document is only predicted
        self.kept = np.flatnonzero(lengths <= seq_len)
        self.lengths = lengths[self.kept]
        self.n_targets = self.lengths - split.prompts[self.kept] + 1
        self.count = len(self.kept)
        self.dropped = len(lengths) - self.count

    @property
    def evaluated(self) -> int:
        """How many of them a whole evaluation reads, but for a stream's short last window."""
        if self.are_windows:
            return (len(self.split.ids) - 1) // self.seq_len
        return self.count

    @property
    def tokens(self) -> int:
        """How many tokens an epoch reads."""
        return self.count * self.seq_len if self.are_windows else int(self.lengths.sum())

    def permuted(self, count: int, purpose: str, *numbers: int) -> Permutation | np.ndarray:
        """The numbers of `count` examples in an order that depends on the arguments alone.

        Of lines and pairs whole arrays are held anyway, and their order is sorted, too.
        """
        if self.are_windows and self.order > 1:
            return Permutation(count, purpose, *numbers)
        return permutation(count, purpose, *numbers)

    def batch(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> Batch:
        """The examples `chosen` (their numbers) as one batch; `shift`: of all, or of each (B,)."""
        if self.are_windows:
            return self.windows(shift + chosen * self.seq_len, self.seq_len)
        begins, prompts = self.split.starts, self.split.prompts
        assert begins is not None and prompts is not None  # a split of documents has both
        T = int(self.lengths[chosen].max(initial=1))
        tokens = np.full((len(chosen), T + 1), self.pad_id, dtype=np.int64)
        taken = np.zeros((len(chosen), T), dtype=bool)
        for row, number in enumerate(self.kept[chosen]):
            start, end = begins[number], begins[number + 1]
            tokens[row, : end - start] = self.split.ids[start:end]
            taken[row, prompts[number] - 1 : end - start - 1] = True
        target_indices = np.flatnonzero(taken)
        n = int(self.lengths[chosen].sum())
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:][taken], target_indices, n)

    def windows(self, starts: np.ndarray, T: int) -> Batch:
        """The windows of a stream that begin at `starts`, of T tokens each."""
        # the indices of every token at once: one gather from the memory-mapped file
        tokens = self.split.ids[starts[:, None] + np.arange(T + 1)].astype(np.int64)  # (B, T + 1)
        ids = np.ascontiguousarray(tokens[:, :-1])
        return Batch(ids, tokens[:, 1:].reshape(-1), None, ids.size)

    def rest(self) -> Batch | None:
        """What windows side by side leave of a stream, as a shorter one."""
        start = self.evaluated * self.seq_len
        left = len(self.split.ids) - 1 - start
        return self.windows(np.array([start]), left) if left > 0 else None

    def target_count(self, chosen: np.ndarray, shift: np.ndarray | int = 0) -> int:
        """How many tokens these examples ask to predict."""
        if self.are_windows:
            return len(chosen) * self.seq_len
        return int(self.n_targets[chosen].sum())

    def token_count(self, chosen: np.ndarray) -> int:
        """How many of the tokens of windows are no padding."""
        return len(chosen) * self.seq_len

    def targets_per_byte(self) -> float:
        """Tokens to predict for each byte of text: nats a token times this are nats a byte."""
        return self.split.targets_per_byte()


class Batches:
    """The training batches of a run, by optimizer step."""

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        if not examples.count:
            fix = "give more text, or lower it"
            if not examples.are_windows:  # each is longer, perhaps because it is the only one
                fix = 'raise it and model.max_len, or set data.kind = "stream" for a long text'
            raise UserError(
                f"data.path: nothing to train on: {examples.split.describe()}, and no example fits "
                f"data.seq_len = {examples.seq_len}; {fix}"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(examples.count / batch_size)
        self._ahead = -1, 0, np.empty(0, np.int64)  # epoch, place, and the examples from there on
        self._orders: dict[int, tuple[Permutation | np.ndarray, int]] = {}  # of the last two epochs

    def order(self, epoch: int) -> tuple[Permutation | np.ndarray, int]:
        """The examples of an epoch as they are visited, and which of its batches is the last cut,
        which may be short."""
        if found := self._orders.get(epoch):  # two threads may ask, for two epochs
            return found
        order = self.examples.permuted(self.examples.count, "order", self.seed, epoch)
        short = self.steps_per_epoch - 1
        if isinstance(order, np.ndarray) and not self.examples.are_windows:
            # examples of like length go together, so that little is padded
            batches = []
            for pool in cut(order, self.batch_size * POOL_BATCHES):
                by_length = pool[np.argsort(self.examples.lengths[pool], kind="stable")]
                batches += cut(by_length, self.batch_size)
            turn = permutation(len(batches), "turn", self.seed, epoch)
            order = np.concatenate([batches[i] for i in turn])
            short = int(np.flatnonzero(turn == short)[0])
        self._orders = dict([*self._orders.items()][-1:]) | {epoch: (order, short)}
        return order, short

    def take(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples at the places from `begin` to `end` (not included) of all epochs, one after
        the other, and the shift of each."""
        numbers, shifts = [], []
        while begin < end:
            epoch, first = divmod(begin, self.examples.count)
            rows = min(end - begin, self.examples.count - first)
            numbers.append(self.numbers(epoch, first, rows))
            shifts.append(np.full(rows, self.shift(epoch)))
            begin += rows
        return np.concatenate(numbers), np.concatenate(shifts)

    def numbers(self, epoch: int, first: int, rows: int) -> np.ndarray:
        """`rows` examples of an epoch from place `first` on, computed many at a time."""
        known, begin, ahead = self._ahead
        if known != epoch or not begin <= first <= first + rows <= begin + len(ahead):
            begin, last = first, min(self.examples.count, first + max(rows, AHEAD))
            ahead = self.order(epoch)[0][np.arange(first, last)]
            self._ahead = epoch, begin, ahead
        return ahead[first - begin : first - begin + rows]

    def shift(self, epoch: int) -> int:
        """By how many tokens an epoch's windows are moved."""
        if not self.examples.are_windows:
            return 0
        return derive_seed("shift", self.seed, epoch) % self.examples.shifts

    def place(self, step: int) -> tuple[int, int]:
        """Where the examples of optimizer step `step` (from 0) begin in all epochs, and end."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        short = self.order(epoch)[1]
        missing = self.steps_per_epoch * self.batch_size - self.examples.count
        begin = epoch * self.examples.count + batch * self.batch_size - missing * (batch > short)
        return begin, begin + self.batch_size - missing * (batch == short)

    def chosen(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a step, and the shift of each."""
        return self.take(*self.place(step))

    def rows(self, step: int) -> int:
        """How many examples a step has."""
        begin, end = self.place(step)
        return end - begin

    def target_count(self, step: int) -> int:
        """Tokens to predict in a step, over all its micro-batches: the loss's divisor."""
        if self.examples.same_sizes:  # each has as many
            return self.rows(step) * self.examples.seq_len
        return self.examples.target_count(*self.chosen(step))

    def count_micro_batches(self, step: int, accumulation: int) -> int:
        """How many micro-batches a step has: fewer where a short batch has not a row for each."""
        rows = self.rows(step)
        return math.ceil(rows / math.ceil(rows / accumulation))

    def __call__(
        self, step: int, accumulation: int = 1, process: int = 0, processes: int = 1
    ) -> list[Batch]:
        """The micro-batches of a step, at most `accumulation`; or one process's neighbouring ones.

        process: its number, from 0, of `processes`, which must divide `accumulation`.
        """
        chosen = self.chosen(step)
        size = math.ceil(len(chosen[0]) / accumulation)
        micro_batches = list(zip(*(cut(array, size) for array in chosen), strict=True))
        share = accumulation // processes
        mine = micro_batches[process * share : (process + 1) * share]
        return [self.examples.batch(rows, shift) for rows, shift in mine]


class Prefetch:
    """The next step's batches of a process, made by a thread while this step computes.

    depth: of so many steps, by as many threads, where data comes from elsewhere and each waits.
    """

    def __init__(
        self,
        batches: Batches,
        accumulation: int,
        process: int = 0,
        processes: int = 1,
        depth: int = 1,
    ):
        self.batches, self.cut = batches, (accumulation, process, processes)
        self.pool, self.depth = ThreadPoolExecutor(depth), depth
        self.pending: dict[int, Future[tuple[list[Batch], int]]] = {}

    def make(self, step: int) -> tuple[list[Batch], int]:
        return self.batches(step, *self.cut), self.batches.target_count(step)

    def __call__(self, step: int) -> tuple[list[Batch], int]:
        """The process's micro-batches of a step, and the number of targets of all.

        A process that a short batch does not reach has no micro-batches.
        """
        future = self.pending.pop(step, None) or self.pool.submit(self.make, step)
        result = future.result()
        for later in range(step + 1, step + 1 + self.depth):
            if later not in self.pending:
                self.pending[later] = self.pool.submit(self.make, later)
        return result

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)


def evaluation_batches(
    examples: Examples, batch_size: int, limit: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """Every target of a split once, in a fixed order; a stream's last window may be short.

    limit: only so many examples, always the same ones, drawn evenly; 0: all. process: its number,
    from 0, of `processes`, which deal the batches out in turn.
    """
    drawn_from = examples.evaluated
    drawn = min(limit or drawn_from, drawn_from)
    order = examples.permuted(drawn_from, "evaluation") if limit else None
    if not examples.are_windows:
        numbers = np.arange(drawn_from) if order is None else order[np.arange(drawn)]
        order = numbers[np.argsort(examples.lengths[numbers], kind="stable")]
    batches = math.ceil(drawn / batch_size)
    for batch in range(process, batches, processes):
        places = np.arange(batch * batch_size, min((batch + 1) * batch_size, drawn))
        yield examples.batch(places if order is None else order[places])
    wanted = examples.are_windows and not 0 < limit <= drawn_from
    if wanted and batches % processes == process and (rest := examples.rest()):
        yield rest


def cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of `size`, the last of which may be short."""
    return [array[i : i + size] for i in range(0, len(array), size)]
