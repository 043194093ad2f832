"""A NumPy array that remembers how it was computed, so that gradients can be taken.

    x = Tensor([[1.0, 2.0]], requires_grad=True)
    y = (x * x).sum()
    y.backward()
    x.grad                                   # [[2. 4.]]

Every operation appends one entry to a tape: its output, its inputs, and a function that turns the
output's gradient into the inputs'. An operation can only use what exists already, so the tape
stands in topological order as it is, and walking it backwards meets each tensor after everything
that was computed from it. No sort, no recursion, no set of visited nodes.

Names and rules are PyTorch's; the gradients are checked against it in tests/test_torchlite.py.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

FREED = ()  # the tape of a tensor whose gradient has been taken
_recording = True
_default_dtype: np.dtype = np.dtype(np.float32)


@contextmanager
def no_grad() -> Generator[None]:
    """Nothing is recorded inside: for evaluation, generation and the optimizer."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def recording() -> bool:
    """Whether operations are recorded here."""
    return _recording


@contextmanager
def default_dtype(dtype: str | type | np.dtype) -> Generator[None]:
    """Inside, tensors made of Python numbers, and new parameters, are of this dtype."""
    global _default_dtype
    before, _default_dtype = _default_dtype, np.dtype(dtype)
    try:
        yield
    finally:
        _default_dtype = before


def get_default_dtype() -> np.dtype:
    """float32, unless `default_dtype` says otherwise."""
    return _default_dtype


def in_place(operation):
    """x += y and the like: x + y, but a leaf's numbers are moved, which only no_grad allows."""

    def method(x, other):
        if not x.requires_grad or x.tape is not None:
            return operation(x, other)
        if _recording:
            raise RuntimeError("a leaf that requires a gradient changes in place under no_grad()")
        x.data[...] = operation(x, other).data
        return x

    return method


class Tensor:
    """An array of floats, `data`, with `grad`, the gradient of what backward() was called on.

    Leaves are made with requires_grad=True and keep their gradient, which adds up over several
    backward passes until it is set to None. What is computed from them is on a tape.
    """

    __slots__ = ("data", "grad", "requires_grad", "tape")
    __array_ufunc__ = None  # so that array * tensor is the tensor's business

    def __init__(self, data, requires_grad=False, dtype=None):
        if dtype is None:
            is_float = isinstance(data, np.ndarray | np.floating) and data.dtype.kind == "f"
            dtype = data.dtype if is_float else _default_dtype
        self.data = np.asarray(data, dtype)
        self.grad = None
        self.requires_grad = requires_grad
        self.tape = None

    # What it is ---------------------------------------------------------------------------------

    @property
    def shape(self):
        return self.data.shape

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def dtype(self):
        return self.data.dtype

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        return f"Tensor({self.data}{', requires_grad=True' if self.requires_grad else ''})"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype, copy=copy)

    def item(self) -> float:
        """The only number of a tensor of one element."""
        return self.data.item()

    def detach(self) -> "Tensor":
        """The same array, without a history."""
        return Tensor(self.data)

    # The chain rule -----------------------------------------------------------------------------

    def backward(self, gradient=None, retain_graph=False):
        """Adds to each leaf's `grad` the gradient of this tensor, and frees the tape.

        gradient: array of this tensor's shape; may be left out for a tensor of one element.
        Raises RuntimeError if the tape has been freed, or there is none.
        """
        if self.tape is FREED:
            raise RuntimeError(
                "backward: the tape of this tensor was freed by an earlier backward(); compute it "
                "again, or pass retain_graph=True to the earlier call"
            )
        if not self.requires_grad:
            raise RuntimeError(
                "backward: nothing this tensor was computed from requires a gradient"
            )
        if gradient is None:
            if self.data.size != 1:
                raise RuntimeError(f"backward: a tensor of shape {self.shape} needs a gradient")
            gradient = np.ones_like(self.data)
        gradient = np.asarray(gradient, self.dtype)
        if gradient.shape != self.shape:
            raise RuntimeError(
                f"backward: a gradient of shape {gradient.shape} for a tensor of shape {self.shape}"
            )
        if self.tape is None:
            return accumulate(self, gradient, gradient)
        self.grad, tape = gradient, self.tape
        for output, inputs, derivative in reversed(tape):
            if not retain_graph:
                output.tape = FREED
            g = output.grad
            if g is None:  # not on the way to this tensor
                continue
            output.grad = None
            for x, dx in zip(inputs, derivative(g), strict=True):
                if x.requires_grad:
                    if x.grad is None and x.tape is not None:
                        x.grad = dx
                    else:
                        accumulate(x, dx, g)

    # Arithmetic: NumPy's broadcasting forward, sums over what was broadcast backward --------------

    def __add__(self, other):
        a = self.data.shape
        if not isinstance(other, Tensor):
            other = constant(other, self)
            return record(self.data + other, (self,), lambda g: (unbroadcast(g, a),))
        b = other.data.shape
        return record(
            self.data + other.data, (self, other), lambda g: (unbroadcast(g, a), unbroadcast(g, b))
        )

    def __sub__(self, other):
        if not isinstance(other, Tensor):
            return self + -constant(other, self)
        a, b = self.data.shape, other.data.shape
        return record(
            self.data - other.data, (self, other), lambda g: (unbroadcast(g, a), unbroadcast(-g, b))
        )

    def __mul__(self, other):
        a = self.data
        if not isinstance(other, Tensor):
            other = constant(other, self)
            return record(a * other, (self,), lambda g: (unbroadcast(g * other, a.shape),))
        b = other.data
        return record(
            a * b,
            (self, other),
            lambda g: (unbroadcast(g * b, a.shape), unbroadcast(g * a, b.shape)),
        )

    def __truediv__(self, other):
        other = as_tensor(other, self)
        a, b = self.data, other.data
        y = a / b
        return record(
            y,
            (self, other),
            lambda g: (unbroadcast(g / b, a.shape), unbroadcast(-g * y / b, b.shape)),
        )

    def __pow__(self, exponent: float):
        x, n = self.data, float(exponent)  # a NumPy number would widen float32 to its own dtype
        return record(x**n, (self,), lambda g: (g * n * x ** (n - 1.0) if n else np.zeros_like(g),))

    def __neg__(self):
        return record(-self.data, (self,), lambda g: (-g,))

    __radd__, __rmul__ = __add__, __mul__
    __iadd__, __isub__, __imul__ = in_place(__add__), in_place(__sub__), in_place(__mul__)

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return as_tensor(other, self) / self

    def __rmatmul__(self, other):
        return as_tensor(other, self) @ self

    def __matmul__(self, other):
        other = as_tensor(other, self)
        a, b = self.data, other.data

        def backward(g):
            # a vector is a matrix of one row on the left, of one column on the right
            A = a[None] if a.ndim == 1 else a
            B = b[:, None] if b.ndim == 1 else b
            g = np.expand_dims(g, -1) if b.ndim == 1 else g
            g = np.expand_dims(g, -2) if a.ndim == 1 else g
            return (
                unbroadcast(g @ B.swapaxes(-1, -2), A.shape).reshape(a.shape),
                unbroadcast(A.swapaxes(-1, -2) @ g, B.shape).reshape(b.shape),
            )

        return record(a @ b, (self, other), backward)

    def exp(self):
        y = np.exp(self.data)
        return record(y, (self,), lambda g: (g * y,))

    def log(self):
        x = self.data
        return record(np.log(x), (self,), lambda g: (g / x,))

    def sqrt(self):
        y = np.sqrt(self.data)
        return record(y, (self,), lambda g: (g * 0.5 / y,))

    def tanh(self):
        y = np.tanh(self.data)
        return record(y, (self,), lambda g: (g * (1.0 - y * y),))

    # Sums and shapes ----------------------------------------------------------------------------

    def sum(self, axis=None, keepdims=False):
        shape = self.data.shape

        def backward(g):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, shape),)

        return record(self.data.sum(axis=axis, keepdims=keepdims), (self,), backward)

    def mean(self, axis=None, keepdims=False):
        total, size = self.sum(axis, keepdims), self.data.size
        return total * (total.data.size / size if size else math.nan)

    def reshape(self, *shape):
        before = self.data.shape
        return record(self.data.reshape(*shape), (self,), lambda g: (g.reshape(before),))

    def transpose(self, axis1: int, axis2: int):
        """Two axes exchanged, as in PyTorch (NumPy's swapaxes)."""
        return record(
            self.data.swapaxes(axis1, axis2), (self,), lambda g: (g.swapaxes(axis1, axis2),)
        )

    def __getitem__(self, index):
        """NumPy's indexing, with slices or arrays of integers; what is taken twice adds up."""
        x = self.data

        def backward(g):
            gradient = np.zeros_like(x)
            np.add.at(gradient, index, g)
            return (gradient,)

        return record(x[index], (self,), backward)


def record(data, inputs: tuple, backward) -> Tensor:
    """The result of an operation: a Tensor of `data`, on the tape if an input needs a gradient.

    backward(g): the gradient of each input, in order, from that of the output. Each is a new array,
    a view, or g itself, even more than once: nobody writes into a gradient on its way.
    """
    output = Tensor.__new__(Tensor)
    output.data, output.grad, tape, needed = data, None, None, False
    if _recording:
        for x in inputs:
            if x.requires_grad:
                needed = True
                if x.tape is not tape and x.tape is not None:
                    tape = x.tape if tape is None else join(tape, x.tape)
        if needed:
            tape = [] if tape is None else tape
            if isinstance(tape, list):  # not FREED
                tape.append((output, inputs, backward))
    output.tape, output.requires_grad = tape, needed
    return output


def join(tape, other):
    """One tape of two. They knew nothing of each other, so either may stand first.

    From here on they are one graph: a backward() through any part of it frees all of it.
    """
    if tape is FREED or other is FREED:
        return FREED  # no gradient can be taken through it: backward() says so
    if len(tape) < len(other):
        tape, other = other, tape
    for entry in other:
        entry[0].tape = tape
    tape += other
    return tape


def accumulate(x: Tensor, gradient, g):
    """Adds to the gradient of `x`. A leaf's is its own, not a view or another tensor's array."""
    if x.grad is not None:
        x.grad = x.grad + gradient
    else:
        x.grad = gradient.copy() if gradient is g or gradient.base is not None else gradient


def constant(value, like: Tensor):
    """A number, or an array of the other operand's dtype: something without a gradient."""
    # NumPy's own numbers are floats too, but would widen a float32
    return value if type(value) in (int, float) else np.asarray(value, like.data.dtype)


def as_tensor(value, like: Tensor) -> Tensor:
    """A number or an array as a Tensor of the other operand's dtype."""
    return value if isinstance(value, Tensor) else Tensor(np.asarray(value, like.data.dtype))


def unbroadcast(g, shape: tuple):
    """The gradient of an input of `shape` that was broadcast to the shape of `g`: summed up."""
    if g.shape == shape:
        return g
    added = g.ndim - len(shape)
    stretched = [added + i for i, n in enumerate(shape) if n == 1 != g.shape[added + i]]
    return g.sum(axis=(*range(added), *stretched)).reshape(shape)
