"""torchlite/tensor.py against PyTorch: every operation, its value and each input's gradient.

The other parts of TorchLite are tested beside this file: its tape in test_torchlite_tensor.py.
"""

import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

from torchlite.tensor import Tensor, default_dtype, get_default_dtype

ARITHMETIC = [operator.add, operator.sub, operator.mul, operator.truediv]


def numbers(*shapes, seed=0, positive=False) -> list[np.ndarray]:
    """An array of each shape, of sizes from 0.5 to 2: far from where a quotient or ReLU breaks."""
    dice = np.random.default_rng([seed, len(shapes)])
    size = [dice.uniform(0.5, 2.0, shape) for shape in shapes]
    return size if positive else [a * dice.choice((-1.0, 1.0), a.shape) for a in size]


def close(a, b, tolerance=1e-10):
    """Same shape, and equal up to the tolerance, NaN for NaN."""
    a, b = np.asarray(a), b.detach().numpy() if isinstance(b, torch.Tensor) else np.asarray(b)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradients(function, arrays, weights=None) -> tuple:
    """(value, gradients, weights) of a function of tensors; the weights make it one number."""
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    y = function(*inputs)
    if weights is None:
        weights = np.random.default_rng(1).normal(size=y.shape)
    y.backward(weights)
    for x in inputs:
        assert x.grad.shape == x.shape
        assert x.grad.dtype == x.dtype == y.dtype
    return y.data, [x.grad for x in inputs], weights


def compare(ours, theirs, *arrays):
    """Ours in float64 against PyTorch's and against differences; in float32 nothing is float64."""
    value, mine, weights = gradients(ours, arrays)
    inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    y = theirs(*inputs)
    y.backward(torch.tensor(weights))
    close(value, y)
    for gradient, x in zip(mine, inputs, strict=True):
        close(gradient, x.grad)
    against_differences(ours, arrays, mine, weights)
    single, narrow, _ = gradients(ours, [a.astype(np.float32) for a in arrays], weights)
    assert single.dtype == np.float32
    for a, b in zip([single, *narrow], [value, *mine], strict=True):
        close(a, b, 1e-3)


def against_differences(function, arrays, mine, weights, h=1e-5):
    """The slope of each input along a random direction, by central differences."""
    for i, gradient in enumerate(mine):
        if gradient.size == 0:
            continue
        direction = np.random.default_rng(i).normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [a + sign * h * direction if j == i else a for j, a in enumerate(arrays)]
            ends.append((function(*map(Tensor, moved)).data * weights).sum())
        slope = (gradient * direction).sum()
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-6, abs=1e-7)


# What is written the same in both libraries: what to compute, and the inputs' shapes.
OPERATIONS = {
    "negative": (lambda x: -x, (2, 3)),
    "square": (lambda x: x**2, (2, 3)),
    "cube": (lambda x: x**3.0, (4,)),
    "power 1": (lambda x: x**1, (4,)),
    "power 0": (lambda x: x**0, (4,)),
    "inverse": (lambda x: x**-1, (2, 3)),
    "exp": (lambda x: x.exp(), (2, 3)),
    "tanh": (lambda x: x.tanh(), (2, 3)),
    "tanh of a number": (lambda x: x.tanh(), ()),
    "same twice": (lambda x: x * x + x / x - x, (3,)),
    "sum": (lambda x: x.sum(), (2, 3)),
    "sum of a number": (lambda x: x.sum(), ()),
    "sum of nothing": (lambda x: x.sum(), (0, 3)),
    "sum 0": (lambda x: x.sum(0), (2, 3, 4)),
    "sum -1 kept": (lambda x: x.sum(-1, keepdims=True), (2, 3, 4)),
    "sum (0, -1)": (lambda x: x.sum((0, -1)), (2, 3, 4)),
    "sum (-2, 0) kept": (lambda x: x.sum((-2, 0), keepdims=True), (2, 3, 4)),
    "sum all kept": (lambda x: x.sum((0, 1), keepdims=True), (2, 3)),
    "sum over none": (lambda x: x.sum(1), (2, 0, 3)),
    "mean": (lambda x: x.mean(), (2, 3)),
    "mean of nothing": (lambda x: x.mean(), (0, 3)),
    "mean of no rows": (lambda x: x.mean(0), (0, 3)),
    "mean of empty rows": (lambda x: x.mean(1), (0, 3)),
    "mean -1": (lambda x: x.mean(-1), (2, 3, 4)),
    "mean 1 kept": (lambda x: x.mean(1, keepdims=True), (2, 3, 4)),
    "mean (0, -1)": (lambda x: x.mean((0, -1)), (2, 3, 4)),
    "reshape": (lambda x: x.reshape(6, 2), (3, 4)),
    "reshape -1": (lambda x: x.reshape(2, -1, 3), (3, 4)),
    "reshape tuple": (lambda x: x.reshape((4, 3)), (3, 4)),
    "reshape nothing": (lambda x: x.reshape(-1, 4), (0, 2, 4)),
    "reshape to a number": (lambda x: x.reshape(()), (1, 1)),
    "transpose": (lambda x: x.transpose(1, 2), (2, 3, 4)),
    "transpose -1": (lambda x: x.transpose(0, -1), (2, 3, 4)),
    "transpose, reshape": (lambda x: x.transpose(1, 2).reshape(2, 12), (2, 3, 4)),
    "transpose nothing": (lambda x: x.transpose(0, 1), (0, 3)),
    "row": (lambda x: x[1], (3, 4)),
    "last": (lambda x: x[-1], (3,)),
    "number": (lambda x: x[1, 2], (3, 4)),
    "slice": (lambda x: x[1:3], (4, 2)),
    "steps": (lambda x: x[:, ::2], (3, 5)),
    "empty slice": (lambda x: x[2:2], (4, 2)),
    "ellipsis": (lambda x: x[..., 1], (2, 3, 4)),
    "new axis": (lambda x: x[:, None], (2, 3)),
    "rows": (lambda x: x[[2, 0]], (3, 4)),
    "rows twice": (lambda x: x[[2, 0, 2, 2]], (3, 4)),
    "places": (lambda x: x[[0, 1, 0], [2, 2, 2]], (3, 4)),
    "slice and rows": (lambda x: x[:, [1, 1, 0]], (3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pytorchs(name):
    function, *shapes = OPERATIONS[name]
    compare(function, function, *numbers(*shapes))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 2)])
def test_operations_on_positive_numbers(shape):
    (x,) = numbers(shape, positive=True)
    for function in (
        lambda x: x.log(),
        lambda x: x.sqrt(),
        lambda x: x**0.5,
        lambda x: x**-1.5,
        lambda x: (x * 3 - x.log()).sqrt(),
    ):
        compare(function, function, x)


def test_power_0_is_flat_at_0_too():
    zero = Tensor(np.zeros(3), requires_grad=True)
    (zero**0).sum().backward()
    np.testing.assert_array_equal(zero.grad, 0.0)


def test_an_array_of_places_and_a_mask_as_index():
    (x,) = numbers((3, 4))
    rows, some = np.array([1, 1, 2]), np.array([True, False, True])
    for index in (rows, np.array([[2, 0], [0, 1]]), some, x > 0):
        compare(lambda x, i=index: x[i], lambda x, i=index: x[torch.tensor(i)], x)


@settings(max_examples=60, deadline=None)
@given(
    mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_dims=4, max_side=3),
    st.sampled_from(ARITHMETIC),
)
def test_arithmetic_broadcasts_any_two_shapes(shapes, function):
    compare(function, function, *numbers(*shapes.input_shapes))


BROADCAST = [
    ((2, 1, 1), (4, 1)), ((1,), (3, 1, 2)), ((), (2, 3)), ((3, 1), (0,)), ((2, 1, 3, 1), (4, 1, 5)),
    ((1, 1), ()), ((2, 1, 1), (1, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("function", ARITHMETIC)
@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_broadcasting(shapes, function):
    compare(function, function, *numbers(*shapes))
    compare(function, function, *numbers(*reversed(shapes)))


OTHERS = {
    "int": 3,
    "float": -1.5,
    "float64": np.float64(2.5),
    "float32": np.float32(2.5),
    "array": np.array([[1.5], [2.5]]),
    "float32 array": np.array([1.5, 2.5, -3.5], np.float32),
    "longer array": np.array([[[1.5]], [[2.5]]]),
    "integers": np.array([1, 2, 4]),
}


@pytest.mark.parametrize("function", ARITHMETIC)
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_numbers_and_arrays_on_either_side(function, other):
    """A result is of the tensor's dtype, whatever the number's or the array's."""
    (x,) = numbers((2, 3))
    its = torch.tensor(other, dtype=torch.float64)
    compare(lambda x: function(x, other), lambda x: function(x, its), x)
    compare(lambda x: function(other, x), lambda x: function(its, x), x)


@pytest.mark.parametrize("exponent", [np.float64(2.0), np.int64(2), np.array(2.0)])
def test_an_exponent_of_numpy_does_not_widen(exponent):
    compare(lambda x: x**exponent, lambda x: x**2.0, *numbers((3,)))


def test_an_exponent_is_one_number():
    x = Tensor(np.ones(3), requires_grad=True)
    for exponent in (np.ones(3), Tensor(np.ones(3))):
        with pytest.raises(TypeError):
            x**exponent


MATRICES = [
    ((3,), (3,)), ((3,), (3, 2)), ((2, 3), (3,)), ((2, 3), (3, 4)), ((3,), (5, 3, 2)),
    ((5, 2, 3), (3,)), ((5, 2, 3), (3, 4)), ((2, 3), (5, 3, 4)), ((2, 1, 3, 4), (5, 4, 2)),
    ((1, 3, 4), (6, 4, 2)), ((6, 3, 4), (1, 4, 2)), ((1, 1), (1, 1)), ((0, 3), (3, 4)),
    ((2, 0, 3), (3, 4)), ((2, 3), (3, 0)), ((2, 0), (0, 4)), ((1, 3, 4), (0, 4, 2)), ((0,), (0,)),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), MATRICES, ids=str)
def test_matrix_products(a, b):
    compare(operator.matmul, operator.matmul, *numbers(a, b))


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3,)), ((2, 2, 3), (3, 2))], ids=str)
def test_matrix_products_with_an_array(shapes):
    a, b = numbers(*shapes)
    compare(lambda x: x @ b, lambda x: x @ torch.tensor(b), a)
    compare(lambda x: a @ x, lambda x: torch.tensor(a) @ x, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_tensor_keeps_the_dtype_of_an_array_of_floats(dtype):
    assert Tensor(np.ones(2, dtype)).dtype == dtype
    assert Tensor(dtype(1)).dtype == dtype
    for data in (1, [1.5], np.ones(2), np.ones(2, np.float32)):
        assert Tensor(data, dtype=dtype).dtype == dtype


def test_other_numbers_become_the_default_dtype():
    for data in (1, 2.5, [1, 2], [[1.5]], np.arange(3), np.bool_(True)):
        assert Tensor(data).dtype == np.float32
        with default_dtype("float64"):
            assert Tensor(data).dtype == np.float64
    with pytest.raises(RuntimeError, match="inside"), default_dtype(np.float64):
        raise RuntimeError("inside")
    assert get_default_dtype() == np.float32


def test_what_a_tensor_says_of_itself():
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert (x.shape, x.ndim, len(x), x.dtype) == ((2, 2), 2, 2, np.float32)
    assert "requires_grad" in repr(x) and "requires_grad" not in repr(x.detach())
    assert x[1, 0].item() == x.sum().item() - 7.0 == 3.0
    with pytest.raises(ValueError, match="size 1"):
        x.item()
    assert x.detach().data is x.data
    assert not x.detach().requires_grad
