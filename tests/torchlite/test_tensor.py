"""The tape of torchlite/tensor.py: what is recorded, who owns a gradient, what is freed."""

import gc
import random
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
import torch

from tests.torchlite.test_gradients import numbers
from torchlite import functional as F
from torchlite import tensor
from torchlite.tensor import Tensor, no_grad


def leaf(*shape, seed=0) -> Tensor:
    return Tensor(numbers(shape, seed=seed)[0], requires_grad=True)


# Adding up ----------------------------------------------------------------------------------------


def test_a_tensor_used_many_times_adds_up():
    x = Tensor([3.0], requires_grad=True)
    y = x * x
    z = y + y * x + y  # 2x^2 + x^3, by way of a tensor that is used three times itself
    (z + x - x).backward()
    assert x.grad.tolist() == [4 * 3.0 + 3 * 9.0]


@pytest.mark.parametrize("seed", range(20))
def test_any_graph_is_pytorchs(seed):
    """Random operations on random earlier results; some of them are not used for the loss."""
    dice = random.Random(seed)
    arrays = numbers(*[(2, 2)] * 3, seed=seed)
    mine = [Tensor(a, requires_grad=i != 2) for i, a in enumerate(arrays)]
    its = [torch.tensor(a, requires_grad=i != 2) for i, a in enumerate(arrays)]
    for _ in range(25):
        i, j, kind = dice.randrange(len(mine)), dice.randrange(len(mine)), dice.randrange(6)
        for values in (mine, its):
            a, b = values[i], values[j]
            values.append(
                [a + b, a - b, (a * b).tanh(), a.transpose(0, 1), a.tanh() @ b, b[[0, 0]]][kind]
            )
    for values in (mine, its):
        loss = (values[-1] * values[0]).sum() + values[-2].sum()
        loss.backward()
    for a, b in zip(mine[:2], its[:2], strict=True):
        expected = np.zeros((2, 2)) if b.grad is None else b.grad.numpy()
        np.testing.assert_allclose(np.zeros((2, 2)) if a.grad is None else a.grad, expected, 1e-9)
    assert mine[2].grad is None
    assert all(t.grad is None for t in mine[3:])


def test_gradients_of_leaves_add_up_over_backward_passes():
    x = leaf(3)
    for times in (1, 2, 3):
        (x * 2.0).sum().backward()
        assert x.grad.tolist() == [2.0 * times] * 3
    x.grad = None
    x.sum().backward()
    assert x.grad.tolist() == [1.0] * 3


def test_a_leaf_itself_can_be_asked():
    x = Tensor([2.0], requires_grad=True)
    x.backward()
    x.backward()
    assert x.grad.tolist() == [2.0]


# Whose memory it is -------------------------------------------------------------------------------

SHARING = {
    "a + b": lambda a, b: a + b,
    "a + a": lambda a, b: a + a + b,
    "a - b": lambda a, b: a - b,
    "reshape": lambda a, b: a.reshape(9) + b.reshape(9),
    "transpose": lambda a, b: a.transpose(0, 1) + b,
    "one is a view of the other": lambda a, b: a + a.transpose(0, 1) + b.reshape(3, 3),
    "index": lambda a, b: a[0] + b[:, 1],
    "sums": lambda a, b: a.sum(0) + b.sum(1),
    "matmul": lambda a, b: a @ b,
    "linear": lambda a, b: F.linear(a, b),
    "attention": lambda a, b: F.scaled_dot_product_attention(a, a, b),
    "layer norm": lambda a, b: F.layer_norm(a, b[0], b[1]),
    "dropout": lambda a, b: F.dropout(a, 0.0, True, None) + b,
}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("whole", [True, False], ids=["sum", "given"])
def test_a_leafs_gradient_is_its_own_memory(name, whole):
    a, b = leaf(3, 3), leaf(3, 3, seed=1)
    y = SHARING[name](a, b)
    given = np.ones(y.shape)
    if whole:
        y.sum().backward(retain_graph=True)
    else:
        y.backward(given, retain_graph=True)
    values = [t.data.copy() for t in (a, b)]
    expected = b.grad.copy()
    a.grad[...] = 77.0  # raises where it is a view that cannot be written
    np.testing.assert_array_equal(b.grad, expected)
    np.testing.assert_array_equal(given, 1.0)
    for t, value in zip((a, b), values, strict=True):
        np.testing.assert_array_equal(t.data, value)
    b.grad[...] = -1.0
    assert (a.grad == 77.0).all()
    a.grad = b.grad = None
    y.sum().backward()
    np.testing.assert_array_equal(b.grad, expected)


def test_a_gradient_that_is_kept_is_not_added_to_in_place():
    x = leaf(2)
    x.sum().backward()
    kept = x.grad
    x.sum().backward()
    assert kept.tolist() == [1.0, 1.0]


# Several graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 5), (5, 1)])
def test_graphs_that_join(lengths, swapped):
    """Two tapes become one, whichever is longer and whichever comes first in the sum."""
    x, y = Tensor([2.0], requires_grad=True), Tensor([3.0], requires_grad=True)
    a, b = x * 5.0, y * 7.0
    for _ in range(lengths[0] - 1):
        a = a * 1.0
    for _ in range(lengths[1] - 1):
        b = b * 1.0
    before = a * b  # joined once
    after = (b + before if swapped else before + b) + x * a
    assert a.tape is b.tape is before.tape is after.tape
    assert len(after.tape) == sum(lengths) + 4  # each operation once
    after.backward()
    assert x.grad.tolist() == [5.0 * 21.0 + 2 * 5.0 * 2.0]
    assert y.grad.tolist() == [7.0 * 10.0 + 7.0]


def test_many_graphs_join():
    leaves = [Tensor([float(i)], requires_grad=True) for i in range(50)]
    parts = [x * x for x in leaves]
    while len(parts) > 1:  # in pairs, so that tapes of all lengths meet
        parts = [sum(parts[i : i + 2], start=0.0) for i in range(0, len(parts), 2)]
    parts[0].backward()
    assert [x.grad.item() for x in leaves] == [2.0 * i for i in range(50)]


def test_graphs_apart_know_nothing_of_each_other():
    x = Tensor([2.0], requires_grad=True)
    a, b = x * 3.0, x * 5.0
    a.backward()
    assert x.grad.tolist() == [3.0]
    b.backward()
    assert x.grad.tolist() == [8.0]


def test_only_what_leads_to_the_result_is_reached():
    x, y = leaf(2), leaf(2)
    a = x * 2.0
    b = (a * y).sum()
    (a * a).sum()  # after b on the tape, and of no use to it
    b.backward()
    np.testing.assert_allclose(y.grad, x.data * 2.0)
    np.testing.assert_allclose(x.grad, y.data * 2.0)


# What cannot be asked for -------------------------------------------------------------------------


def test_a_second_backward_is_an_error_that_says_what_to_do():
    x = leaf(2)
    h = x * 2.0
    y = h.sum()
    y.backward()
    for freed in (y, h.sum(), h * x, x * 2.0 + h, h + x * 2.0, h.detach() * h):
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            freed.backward(np.ones(freed.shape))
    assert x.grad.tolist() == [2.0, 2.0]
    (h.detach() * x).sum().backward()  # cut off, it is a number like any other


def test_retain_graph_counts_again():
    x = leaf(2)
    h = x * 2.0
    y, z = h.sum(), (h * h).sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    assert x.grad.tolist() == [4.0, 4.0]
    x.grad = None
    z.backward()
    np.testing.assert_allclose(x.grad, 8.0 * x.data)
    with pytest.raises(RuntimeError, match="freed"):
        y.backward()


def test_a_total_of_losses_can_be_summed_but_not_differentiated():
    x, total = leaf(2), 0.0
    for step in range(3):
        loss = (x * x).sum() * step
        loss.backward()
        total = total + loss
    assert total.item() == pytest.approx(3 * (x.data**2).sum())
    with pytest.raises(RuntimeError, match="freed"):
        total.backward()


def test_a_gradient_is_needed_where_there_is_more_than_one_number():
    x = leaf(2, 3)
    y = x * 1.0
    with pytest.raises(RuntimeError, match=r"\(2, 3\) needs a gradient"):
        y.backward()
    with pytest.raises(RuntimeError, match=r"shape \(3,\) for a tensor of shape \(2, 3\)"):
        y.backward(np.ones(3))
    y.backward(np.full((2, 3), 4.0))  # a refusal has freed nothing
    assert x.grad.tolist() == [[4.0] * 3] * 2
    z = Tensor(np.ones((1, 1)), requires_grad=True)
    (z * 2.0).backward()
    assert z.grad.tolist() == [[2.0]]


def test_there_is_nothing_to_do_without_a_leaf():
    for constant in (Tensor([1.0]), Tensor([1.0]) * 2.0, leaf(1).detach() + 1.0):
        assert not constant.requires_grad
        with pytest.raises(RuntimeError, match="requires a gradient"):
            constant.backward()


def test_no_grad_records_nothing_nests_and_ends_with_an_exception():
    x = leaf(2)
    with no_grad():
        with no_grad():
            assert not (x * 2.0).requires_grad
        assert not tensor.recording()
        y = F.linear(x.reshape(1, 2), x.reshape(1, 2))
        assert y.tape is None and not y.requires_grad
        inside = Tensor([1.0], requires_grad=True)
    assert tensor.recording()
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert tensor.recording()
    (x * 2.0 * y.data + inside).sum().backward()
    assert inside.grad.tolist() == [2.0]


def test_constants_are_not_recorded():
    y = Tensor([1.0]) * 2.0 + 1.0
    assert y.tape is None
    x = Tensor([1.0], requires_grad=True)
    z = (Tensor([1.0]) * 2.0) * x
    assert len(z.tape) == 1


# Deep and often -----------------------------------------------------------------------------------


def test_a_chain_of_100_000_operations():
    assert sys.getrecursionlimit() < 100_000
    x = Tensor([1.0], requires_grad=True)
    y = x
    for _ in range(100_000):
        y = y + x
    y.backward()
    assert x.grad.tolist() == [100_001.0]


def test_a_deep_graph_that_is_left_is_freed():
    x = Tensor([1.0], requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y * 1.0
    arrays = [weakref.ref(y.data), weakref.ref(y.tape[0][0].data)]
    del y
    gc.collect()
    assert [array() for array in arrays] == [None, None]


def test_after_backward_nothing_but_names_keeps_results_alive():
    x = leaf(4)
    h = x * 2.0
    y = (h * h).tanh()
    inner = weakref.ref(y.data)
    loss = y.sum()
    gc.disable()  # counting references is enough: no circle is left to be found
    try:
        loss.backward()
        del y
        assert inner() is None
    finally:
        gc.enable()
    assert loss.item() and h.shape == (4,)  # these are still there


def test_memory_does_not_grow_with_steps():
    W, x = leaf(50, 50), Tensor(np.ones((20, 50)))

    def step():
        W.grad = None
        h = x
        for _ in range(5):
            h = F.relu(F.linear(h, W))
        h.mean().backward()

    step()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        step()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            step()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert grown < W.data.nbytes  # a single array that every step left would be 200 of these


# In place -----------------------------------------------------------------------------------------


def test_a_leaf_changes_in_place_under_no_grad_only():
    x = Tensor([1.0, 2.0], requires_grad=True)
    array, same = x.data, x
    with no_grad():
        x -= 0.5 * Tensor([1.0, 2.0])
        x *= 3.0
        x += 1.0
    assert x is same and x.data is array
    assert x.data.tolist() == [2.5, 4.0]
    with pytest.raises(RuntimeError, match="no_grad"):
        x += 1.0
    y = x * 2.0
    y += x  # not a leaf: a new tensor, with its history
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_numpy_reads_a_tensor():
    assert np.asarray(Tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
