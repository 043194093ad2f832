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
from data.rng import derive_seed, permutation
from data.token_files import Split

POOL_BATCHES = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    ids: (B, T) int64, padded on the right. targets: (N,) int64, the tokens to predict.
    target_indices: (N,) int64, flat indices into B x T of the places that predict them; None: all.
    tokens: how many of the ids are no padding.
    """

    ids: np.ndarray
    targets: np.ndarray
    target_indices: np.ndarray | None
    tokens: int

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What a LossModule is called with."""
        return self.ids, self.targets, self.target_indices


# what a process computes that takes part in a forward pass and has nothing to add: a loss of 0
NO_BATCH = Batch(*(np.zeros(shape, np.int64) for shape in ((1, 1), 0, 0)), tokens=0)


class Examples:
    """The examples of a split, by number: windows of a stream, or documents that fit.

    A stream's windows lie side by side; `shift` moves them all, so that from epoch to epoch the
    cuts fall elsewhere. `dropped` counts the documents longer than `seq_len`.
    """

    def __init__(self, split: Split, seq_len: int, pad_id: int):
        self.split, self.seq_len, self.pad_id = split, seq_len, pad_id
        self.dropped = 0
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

    def batch(self, chosen: np.ndarray, shift: int = 0) -> Batch:
        """The examples `chosen` (their numbers) as one batch."""
        if self.split.starts is None:
            starts = shift + chosen * self.seq_len
            # the indices of every token at once: one gather from the memory-mapped file
            window = starts[:, None] + np.arange(self.seq_len + 1)
            tokens = self.split.ids[window].astype(np.int64)  # (B, T + 1)
            ids = np.ascontiguousarray(tokens[:, :-1])
            return Batch(ids, tokens[:, 1:].reshape(-1), None, ids.size)
        prompts = self.split.prompts
        assert prompts is not None  # a split of documents has both
        T = int(self.lengths[chosen].max(initial=1))
        tokens = np.full((len(chosen), T + 1), self.pad_id, dtype=np.int64)
        taken = np.zeros((len(chosen), T), dtype=bool)
        for row, number in enumerate(self.kept[chosen]):
            start, end = self.split.starts[number], self.split.starts[number + 1]
            tokens[row, : end - start] = self.split.ids[start:end]
            taken[row, prompts[number] - 1 : end - start - 1] = True
        target_indices = np.flatnonzero(taken)
        n = int(self.lengths[chosen].sum())
        return Batch(tokens[:, :-1].copy(), tokens[:, 1:][taken], target_indices, n)

    def target_count(self, chosen: np.ndarray) -> int:
        """How many tokens these examples ask to predict."""
        if self.split.starts is None:
            return len(chosen) * self.seq_len
        return int(self.n_targets[chosen].sum())


class Batches:
    """The training batches of a run, by optimizer step."""

    def __init__(self, examples: Examples, batch_size: int, seed: int):
        if not examples.count:
            fix = "give more text, or lower it"
            if examples.split.starts is not None:  # each is longer, perhaps because it is the only
                fix = 'raise it and model.max_len, or set data.kind = "stream" for a long text'
            raise UserError(
                f"data.path: nothing to train on: {examples.split.describe()}, and no example fits "
                f"data.seq_len = {examples.seq_len}; {fix}"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.steps_per_epoch = math.ceil(examples.count / batch_size)
        self._plans: dict[int, tuple[list[np.ndarray], int]] = {}  # of the last two epochs

    def plan(self, epoch: int) -> tuple[list[np.ndarray], int]:
        """The examples of each batch of an epoch, and the shift of its windows."""
        if found := self._plans.get(epoch):  # two threads may ask, for two epochs
            return found
        order = permutation(self.examples.count, "order", self.seed, epoch)
        shift = 0
        if self.examples.split.starts is None:
            shift = derive_seed("shift", self.seed, epoch) % self.examples.shifts
            batches = cut(order, self.batch_size)
        else:  # examples of like length go together, so that little is padded
            batches = []
            for pool in cut(order, self.batch_size * POOL_BATCHES):
                by_length = pool[np.argsort(self.examples.lengths[pool], kind="stable")]
                batches += cut(by_length, self.batch_size)
            turn = permutation(len(batches), "turn", self.seed, epoch)
            batches = [batches[i] for i in turn]
        self._plans = dict([*self._plans.items()][-1:]) | {epoch: (batches, shift)}
        return batches, shift

    def chosen(self, step: int) -> tuple[np.ndarray, int]:
        """The examples of optimizer step `step` (from 0) and their shift."""
        batches, shift = self.plan(step // self.steps_per_epoch)
        return batches[step % self.steps_per_epoch], shift

    def target_count(self, step: int) -> int:
        """Tokens to predict in a step, over all its micro-batches: the loss's divisor."""
        return self.examples.target_count(self.chosen(step)[0])

    def count_micro_batches(self, step: int, accumulation: int) -> int:
        """How many micro-batches a step has: fewer where a short batch has not a row for each."""
        rows = len(self.chosen(step)[0])
        return math.ceil(rows / math.ceil(rows / accumulation))

    def __call__(
        self, step: int, accumulation: int = 1, process: int = 0, processes: int = 1
    ) -> list[Batch]:
        """The micro-batches of a step, at most `accumulation`; or one process's neighbouring ones.

        process: its number, from 0, of `processes`, which must divide `accumulation`.
        """
        chosen, shift = self.chosen(step)
        micro_batches = cut(chosen, math.ceil(len(chosen) / accumulation))
        share = accumulation // processes
        mine = micro_batches[process * share : (process + 1) * share]
        return [self.examples.batch(rows, shift) for rows in mine]


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
    is_stream = examples.split.starts is None
    ids, T = examples.split.ids, examples.seq_len
    count = (len(ids) - 1) // T if is_stream else examples.count
    chosen = permutation(count, "evaluation")[:limit] if limit else np.arange(count)
    if not is_stream:
        chosen = chosen[np.argsort(examples.lengths[chosen], kind="stable")]
    batches = cut(chosen, batch_size)
    for rows in batches[process::processes]:
        yield examples.batch(rows)
    tail = np.asarray(ids[count * T :], dtype=np.int64) if is_stream else ()
    if len(tail) > 1 and not 0 < limit <= count and len(batches) % processes == process:
        yield Batch(tail[None, :-1].copy(), tail[1:].copy(), None, len(tail) - 1)


def cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive pieces of `size`, the last of which may be short."""
    return [array[i : i + size] for i in range(0, len(array), size)]
