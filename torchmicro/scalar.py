"""The operations of `vector.py` written out: a record on the tape for every + and *.

    tape = Tape()
    x, w = ScalarVector([1.0, -2.0], tape), ScalarVector([0.5, 3.0], tape)
    loss = (x + w).relu().dots([w])  # seven records, where `Vector` has three
    loss.backward()

`Value` is one number that knows its gradient, as in Karpathy's micrograd, though without a graph to
sort: the tape has the order. `ScalarVector` is a vector of them, with the methods of `Vector`.
Seven derivatives are all there is to believe here; every other operation is made of these. The
price is a step some seventeen times as slow. Standard library only.
"""

import math
from collections.abc import Iterable
from functools import reduce
from operator import add
from random import Random

from torchmicro.vector import GELU_CUBE, GELU_SLOPE, Tape


class Value:
    """A number, its gradient, and its tape. Each operation is followed by its derivative."""

    __slots__ = ("data", "grad", "tape")

    def __init__(self, data: float, tape: Tape, backward=None, *inputs):
        self.data = data
        self.grad = 0.0
        self.tape = tape
        if backward is not None:
            tape.record((backward, self, inputs))

    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other, self.tape)
        return Value(self.data + other.data, self.tape, Value.add_backward, self, other)

    def add_backward(self, a, b):
        a.grad += self.grad
        b.grad += self.grad

    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other, self.tape)
        return Value(self.data * other.data, self.tape, Value.mul_backward, self, other)

    def mul_backward(self, a, b):
        a.grad += self.grad * b.data
        b.grad += self.grad * a.data

    def __pow__(self, power: float):
        return Value(self.data**power, self.tape, Value.pow_backward, self, power)

    def pow_backward(self, x, power):
        x.grad += self.grad * power * x.data ** (power - 1)

    def exp(self):
        return Value(math.exp(self.data), self.tape, Value.exp_backward, self)

    def exp_backward(self, x):
        x.grad += self.grad * self.data

    def log(self):
        return Value(math.log(self.data), self.tape, Value.log_backward, self)

    def log_backward(self, x):
        x.grad += self.grad / x.data

    def tanh(self):
        return Value(math.tanh(self.data), self.tape, Value.tanh_backward, self)

    def tanh_backward(self, x):
        x.grad += self.grad * (1.0 - self.data**2)

    def relu(self):
        """max(0, x)."""
        return Value(max(self.data, 0.0), self.tape, Value.relu_backward, self)

    def relu_backward(self, x):
        x.grad += self.grad if self.data > 0.0 else 0.0


def total(values: Iterable[Value]) -> Value:
    """The sum, from left to right."""
    return reduce(add, values)


class ScalarVector:
    """A vector of values. Its operations take and give what those of `Vector` do."""

    __slots__ = ("tape", "values")

    def __init__(self, data: Iterable, tape: Tape):
        self.values = [v if isinstance(v, Value) else Value(v, tape) for v in data]
        self.tape = tape

    @property
    def data(self) -> list[float]:
        return [v.data for v in self.values]

    @data.setter
    def data(self, data: list[float]):
        for value, number in zip(self.values, data, strict=True):
            value.data = number

    @property
    def grad(self) -> list[float]:
        return [v.grad for v in self.values]

    @grad.setter
    def grad(self, grad: list[float] | None):
        for value, number in zip(self.values, grad or [0.0] * len(self), strict=True):
            value.grad = number

    def __len__(self) -> int:
        return len(self.values)

    def backward(self, gradient: list[float] | None = None):
        self.tape.backward(self.values, gradient or [1.0] * len(self))

    def new(self, values: Iterable[Value]) -> "ScalarVector":
        return ScalarVector(values, self.tape)

    def __add__(self, other):
        return self.new(a + b for a, b in zip(self.values, other.values, strict=True))

    def __mul__(self, factor: float):
        return self if factor == 1.0 else self.new(v * factor for v in self.values)

    def times(self, other) -> Value:
        """The dot product."""
        return total(a * b for a, b in zip(self.values, other.values, strict=True))

    def dots(self, rows, bias=None, scale=1.0):
        products = self.new(row.times(self) for row in rows) * scale
        return products if bias is None else products + bias

    def mix(self, rows):
        columns = zip(*[row.values for row in rows], strict=True)
        return self.new(self.times(self.new(column)) for column in columns)

    def softmax(self):
        largest = max(self.data)
        exps = [(v + -largest).exp() for v in self.values]
        divisor = total(exps)
        return self.new(e * divisor**-1 for e in exps)

    def relu(self):
        return self.new(v.relu() for v in self.values)

    def gelu(self):
        return self.new(
            v * 0.5 * (((v + v * v * v * GELU_CUBE) * GELU_SLOPE).tanh() + 1.0) for v in self.values
        )

    def rms_norm(self, eps):
        scale = (self.times(self) * (1.0 / len(self)) + eps) ** -0.5
        return self.new(v * scale for v in self.values)

    def layer_norm(self, weight, bias, eps):
        mean = total(self.values) * (1.0 / len(self))
        normal = self.new(v + mean * -1.0 for v in self.values).rms_norm(eps)
        weighted = self.new(a * b for a, b in zip(normal.values, weight.values, strict=True))
        return weighted + bias

    def part(self, start, stop):
        return self.new(self.values[start:stop])

    def join(self, others):
        return self.new(v for part in [self, *others] for v in part.values)

    def dropout(self, rate, random: Random):
        return self.new(
            v * (0.0 if random.random() < rate else 1.0 / (1.0 - rate)) for v in self.values
        )

    def cross_entropy(self, target):
        if target < 0:
            raise IndexError(f"target {target} is not one of {len(self)} classes")
        largest = max(self.data)
        logarithm = total((v + -largest).exp() for v in self.values).log()
        return self.new([logarithm + (self.values[target] + -largest) * -1.0])
