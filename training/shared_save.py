"""A checkpoint that several processes write, each some files: for states that no host holds whole.

Tensors are dealt out to the processes. Each puts its own together in its host's memory and writes
them as a shard (checkpoint/shards.py). The first one makes the directory and writes all else, and
publishes it once everything is on disk.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from checkpoint.shards import INDEX, deal_out, index_json, shard_names
from checkpoint.writer import Content, finish, write_files
from common.errors import UnreadableError
from training.state import TrainState, tensor_file

Failures = list[OSError | MemoryError | UnreadableError]  # what costs a save, and no more


def save_together(state: TrainState, begin: Callable[[], Path | None]):
    """Publishes a checkpoint of `state`, of which each process holds a part. Called by all.

    begin: called in the first alone; makes the empty directory to write to (checkpoint/writer.py);
    None: there is nothing to write. Training waits until all is on disk. Raises OSError,
    MemoryError or UnreadableError in the first process, whoever could not write.
    """
    assert state.shards is not None
    processes = state.processes
    failures: Failures = []

    def begin_or_fail() -> str:
        try:
            hidden = begin()
        except (OSError, MemoryError, UnreadableError) as error:  # the others wait to be told
            failures.append(error)
            return ""
        return str(hidden.absolute()) if hidden else ""

    if hidden := processes.decide(begin_or_fail, processes.timeout):
        names, files = share_of_files(state, failures)
        try:
            entries = write_files(Path(hidden), {} if failures else files)
        except (OSError, MemoryError) as error:
            entries = {}
            failures.append(error)
        found = exchange(state, names, entries, failures)
        if processes.is_first:
            publish(Path(hidden), found, failures)
    if failures and processes.is_first:
        raise failures[0]


def share_of_files(
    state: TrainState, failures: Failures
) -> tuple[list[list[str]], dict[str, Content]]:
    """The files of tensors that each process writes, by process; and all of this one's files."""
    assert state.shards is not None
    processes = state.processes
    names: list[list[str]] = [[] for _ in range(processes.count)]
    shards, other = {}, {}
    for name, tensors in state.parts().items():
        sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
        dealt = deal_out(sizes, processes.count)
        owners = {key: process for process, keys in enumerate(dealt) for key in keys}
        own: dict = {}
        try:
            own = state.shards.gather(tensors, owners)
        except MemoryError as error:
            failures.append(error)
        writers = [process for process, keys in enumerate(dealt) if keys]
        for process, file in zip(writers, shard_names(name, dealt), strict=True):
            names[process].append(file)
            if process == processes.index:
                shards[file] = own
        other[name + INDEX] = index_json(name, dealt, sizes)
    if processes.is_first:
        return names, state.checkpoint_files(shards) | other
    return names, {file: tensor_file(own, copied=False) for file, own in shards.items()}


def exchange(
    state: TrainState,
    names: list[list[str]],
    entries: dict[str, dict],
    failures: Failures,
) -> dict[str, dict]:
    """What the manifest says of the files of all processes; notes which of them failed.

    As numbers: why a process failed (0: it has not), then of each file its size and hash.
    """
    most = max(map(len, names))
    problem = getattr(failures[0], "errno", None) or errno.ENOMEM if failures else 0
    numbers: list[float] = [problem]
    for name in names[state.processes.index] if entries else ():
        numbers += [entries[name]["bytes"], *bytes.fromhex(entries[name]["sha256"])]
    numbers += [0] * (1 + 33 * most - len(numbers))
    found = dict(entries)
    for process, row in enumerate(state.processes.gather(numbers)):
        problem, *rest = map(int, row)
        if problem and not failures:
            failures.append(OSError(problem, os.strerror(problem), f"rank {process}"))
        for place, name in enumerate(names[process]):
            size, *sha256 = rest[33 * place : 33 * (place + 1)]
            found[name] = {"bytes": size, "sha256": bytes(sha256).hex()}
    return found


def publish(hidden: Path, entries: dict[str, dict], failures: Failures):
    """Publishes the directory that all have written to, or removes it where one of them failed."""
    if not failures:
        try:
            finish(hidden, entries)
            return
        except OSError as error:
            failures.append(error)
    shutil.rmtree(hidden, ignore_errors=True)
