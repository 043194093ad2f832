"""training/gradient_sum.py: the tree of its sums, to the bit, however it is cut."""

import math

import pytest
import torch

from training.gradient_sum import PairwiseSum

SHAPES = ((3, 4), (5,))


def parts(count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """Gradients of micro-batches and, last, their losses: numbers whose sums round."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (*SHAPES, ())
    return [[torch.randn(s, generator=generator) * 10**n for s in shapes] for n in range(count)]


def tree(nodes: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The sum by its definition: the largest power of two on the left."""
    if len(nodes) == 1:
        return nodes[0]
    half = 2 ** math.floor(math.log2(len(nodes) - 1))
    return [a + b for a, b in zip(tree(nodes[:half]), tree(nodes[half:]), strict=True)]


def add_up(nodes, **how) -> list[torch.Tensor]:
    """The same by a PairwiseSum, with gradients that a backward pass leaves."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    loss, summed = torch.zeros(()), PairwiseSum(parameters, **how)
    most = 0
    for _ in range(2):  # it is ready for the next step afterwards
        loss.zero_()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if how.get("in_place") else None
        for *gradients, own_loss in nodes:
            summed.begin(loss)
            sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True)).backward()
            loss += own_loss
            most = max(most, sum(node is not None for node in summed.waiting))
        summed.finish(loss)
    assert most <= max(0, math.ceil(math.log2(len(nodes))) - 1), "more is kept than is needed"
    return [*(p.grad for p in parameters), loss]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("count", range(1, 18))
def test_it_is_the_tree(count, in_place):
    nodes = parts(count)
    assert same(add_up(nodes, in_place=in_place), tree(nodes))


@pytest.mark.parametrize(("count", "share"), [(8, 1), (8, 2), (8, 4), (12, 4), (6, 2), (16, 4)])
def test_neighbours_that_are_a_power_of_two_are_a_node_of_it(count, share):
    """So several processes, each with `share` of them, have the sum that one process has."""
    nodes = parts(count)
    sums = [add_up(nodes[first : first + share]) for first in range(0, count, share)]
    assert same(tree(sums), add_up(nodes))


def test_without_pairs_it_is_one_after_the_other():
    nodes = parts(7)
    expected = nodes[0]
    for node in nodes[1:]:
        expected = [a + b for a, b in zip(expected, node, strict=True)]
    assert same(add_up(nodes, pairs=False), expected)
    assert not same(add_up(nodes), expected), "the order makes no difference with these numbers"
    assert same(add_up(nodes[:3]), tree(nodes[:3])), "up to three, both orders are one"
    assert same(add_up(nodes[:3]), add_up(nodes[:3], pairs=False))
