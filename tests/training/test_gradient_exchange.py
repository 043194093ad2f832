"""training/gradient_exchange.py with real processes: the same bits for any number of them."""

import math
import os
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.multiprocessing

from common.errors import UserError
from common.processes import join
from tests.training.test_gradient_sum import SHAPES, parts
from tests.training.test_gradient_sum import tree as definition
from training.config import TrainConfig
from training.gradient_exchange import GradientExchange, tree
from training.gradient_sum import PairwiseSum


@pytest.mark.parametrize("count", range(1, 18))
def test_the_tree_over_processes_is_that_over_micro_batches(count):
    nodes = [node[0] for node in parts(count)]
    assert torch.equal(tree(torch.stack(nodes)), definition([[node] for node in nodes])[0])


def share(index: int, count: int, port: int, folder):
    """A process: backward passes that leave its micro-batches' numbers, and the sums of all."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    with join("test") as processes:
        processes.connect(torch.device("cpu"), timedelta(seconds=60))
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        exchange = GradientExchange(parameters, processes, bucket_bytes=1)  # a bucket each
        own_share = TrainConfig(accumulation_steps=12).share_of(count)
        for micro_batches in (12, 11, 5, 1):  # the last ones are short
            of_all = math.ceil(micro_batches / own_share)
            own = parts(micro_batches)[index * own_share : (index + 1) * own_share]
            for in_place in (False, True):
                loss, summed = torch.zeros(()), PairwiseSum(parameters, in_place)
                for parameter in parameters:  # one that no micro-batch has reached yet has none
                    parameter.grad = torch.zeros_like(parameter) if in_place and own else None
                for number, (*gradients, own_loss) in enumerate(own):
                    summed.begin(loss)
                    if number == len(own) - 1 and not in_place:
                        exchange.begin(summed, of_all)
                    pairs = zip(parameters, gradients, strict=True)
                    sum((p * g).sum() for p, g in pairs).backward()
                    loss += own_loss
                if in_place:
                    summed.finish(loss)
                    exchange.add_up(loss, of_all)
                else:
                    exchange.finish(summed, loss, of_all)
                found += [*(p.grad.clone() for p in parameters), loss]
        np.savez(folder / f"{index}.npz", *found)


@pytest.mark.parametrize("count", [3, 6])
def test_sums_are_the_same_for_any_number_of_processes(tmp_path, count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(share, (count, port, tmp_path), nprocs=count)
    for index in range(count):
        with np.load(tmp_path / f"{index}.npz") as file:
            found = iter(file.values())
            for micro_batches in (12, 12, 11, 11, 5, 5, 1, 1):
                for expected in definition(parts(micro_batches)):
                    np.testing.assert_array_equal(next(found), expected.numpy(), strict=True)


@pytest.mark.parametrize(
    ("count", "micro_batches", "near"),
    [
        (1, 5, None),
        (4, 8, None),
        (3, 12, None),
        (4, 6, "4 or 8"),
        (4, 12, "8 or 16"),
        (4, 1, "4"),
        (3, 8, "6 or 12"),
    ],
)
def test_which_numbers_of_micro_batches_are_shared(count, micro_batches, near):
    settings = TrainConfig(accumulation_steps=micro_batches)
    if near is None:
        assert settings.share_of(count) * count == micro_batches
    else:
        with pytest.raises(UserError, match=f"set it to {near}$"):
            settings.share_of(count)
