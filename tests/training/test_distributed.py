"""training/distributed.py with real processes: sums whose bits do not depend on their number."""

from datetime import timedelta

import pytest
import torch
import torch.multiprocessing

from common.errors import UserError
from tests.training.test_gradient_sum import parts
from tests.training.test_gradient_sum import tree as definition
from training.distributed import Processes, connect, tree


@pytest.mark.parametrize("count", range(1, 18))
def test_the_tree_over_processes_is_that_over_micro_batches(count):
    nodes = [node[0] for node in parts(count)]
    assert torch.equal(tree(torch.stack(nodes)), definition([[node] for node in nodes])[0])


def share(index: int, count: int, port: int, folder):
    """A process: adds up its micro-batches' numbers, and then those of all."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    processes = connect("gloo", timedelta(seconds=60))
    assert processes == Processes(index, count)
    found = []
    for micro_batches in (12, 11, 5):  # the last ones are short
        share = processes.share(12)
        nodes = parts(micro_batches)
        own = nodes[index * share : (index + 1) * share]
        node = definition(own) if own else [torch.zeros_like(t) for t in nodes[0]]
        node = [t.clone() for t in node]
        processes.add_up(node, -(-micro_batches // share))
        found.append(node)
    gathered = processes.gather([index, 0.1 * index], torch.device("cpu"))
    torch.save((found, gathered), folder / f"{count}_{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("count", [3, 6])
def test_sums_are_the_same_for_any_number_of_processes(tmp_path, count):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(share, (count, port, tmp_path), nprocs=count)
    for index in range(count):
        found, gathered = torch.load(tmp_path / f"{count}_{index}.pt")
        for micro_batches, node in zip((12, 11, 5), found, strict=True):
            expected = definition(parts(micro_batches))
            assert all(torch.equal(a, b) for a, b in zip(node, expected, strict=True))
        assert gathered == [[i, 0.1 * i] for i in range(count)]


@pytest.mark.parametrize(
    ("count", "micro_batches", "near"),
    [(1, 5, None), (4, 8, None), (3, 12, None), (4, 6, "4 or 8"), (4, 12, "8 or 16"), (4, 1, "4")],
)
def test_which_numbers_of_micro_batches_are_shared(count, micro_batches, near):
    processes = Processes(0, count)
    if near is None and count > 1:
        assert processes.share(micro_batches) * count == micro_batches
    elif near:
        with pytest.raises(UserError, match=f"set it to {near}"):
            processes.share(micro_batches)
