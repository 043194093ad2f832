"""Reverse-mode autograd on Python's floats: a tape of operations on vectors. Standard library only.

    tape = Tape()
    x, w = Vector([1.0, -2.0], tape), Vector([0.5, 3.0], tape)
    loss = (x + w).relu().dots([w])  # three records on the tape
    loss.backward()                  # x.grad, w.grad; the tape is empty again

Each operation is written as it runs, so the tape is in topological order: walked backwards, it
meets every vector after all of its users, when its gradient is complete. That takes no sort, no
recursion and no visited set. A record is a tuple of

    backward  a function, called as backward(output, *inputs): adds to the gradients of the inputs
    output    the vector that the operation gave
    inputs    what it was called with: vectors, lists of vectors, and numbers it kept for later

One record stands for a whole operation on a vector, such as a linear layer for one token;
`torchmicro/scalar.py` has the same operations with a record for every + and *.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from operator import add, itemgetter, mul
from random import Random

GELU_SLOPE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715  # Hendrycks and Gimpel (2016)


class Tape:
    """What was computed, in the order in which it was computed. `len(tape)`: records."""

    def __init__(self):
        self.records = []
        self.record = self.records.append  # called by every operation with its record

    def __len__(self) -> int:
        return len(self.records)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Nothing is recorded inside the `with`; all else stays until the next `backward()`."""
        before, self.record = self.record, lambda record: None
        try:
            yield
        finally:
            self.record = before

    def backward(self, results: list, gradients: list):
        """Adds to the gradients of all that the results were made from, and frees the tape.

        gradients: one for each result. Raises RuntimeError if the tape has no record of the last.
        """
        if not any(output is results[-1] for _, output, _ in reversed(self.records)):
            raise RuntimeError(
                "not on the tape: freed by an earlier backward(), or computed while it was paused"
            )
        for result, gradient in zip(results, gradients, strict=True):
            result.grad = gradient
        try:
            for backward, output, inputs in reversed(self.records):
                if output.grad:  # else nothing that is asked for depends on it
                    backward(output, *inputs)
        finally:  # what an interrupted pass leaves must not be counted in the next one
            self.records.clear()


def inputs_of(record):
    """The vectors (or scalars) that went into a record, without the numbers it kept."""
    given = [each if isinstance(each, list) else [each] for each in record[2]]
    return [each for each in chain.from_iterable(given) if hasattr(each, "grad")]


class Vector:
    """A vector of floats, its gradient (None: nothing has reached it), and its tape.

    Each operation is followed by its derivative, a method called on the operation's result. Lists
    are replaced, never changed in place: several vectors may share one as their gradient.
    """

    __slots__ = ("data", "grad", "tape")
    grad: list[float]

    def __init__(self, data: list[float], tape: Tape, backward: Callable | None = None, *inputs):
        self.data = data
        # a derivative runs only where a gradient has come
        self.grad = None  # pyrefly: ignore[bad-assignment]
        self.tape = tape
        if backward is not None:
            tape.record((backward, self, inputs))

    def __len__(self) -> int:
        return len(self.data)

    def backward(self, gradient: list[float] | None = None):
        """Adds to `.grad` of all that this was made from. gradient: of this; default: ones."""
        self.tape.backward([self], [gradient or [1.0] * len(self.data)])

    def accumulate(self, gradient: list[float]):
        """Gradients of several uses add up."""
        grad = self.grad
        self.grad = gradient if grad is None else list(map(add, grad, gradient))

    def __add__(self, other):
        data = [a + b for a, b in zip(self.data, other.data, strict=True)]
        return Vector(data, self.tape, Vector.add_backward, self, other)

    def add_backward(self, a, b):
        a.accumulate(self.grad)
        b.accumulate(self.grad)

    def __mul__(self, factor: float):
        if factor == 1.0:
            return self
        data = [factor * v for v in self.data]
        return Vector(data, self.tape, Vector.mul_backward, self, factor)

    def mul_backward(self, x, factor):
        x.accumulate([factor * g for g in self.grad])

    def dots(self, rows: list["Vector"], bias: "Vector | None" = None, scale: float = 1.0):
        """scale (row . x) + bias for each of N rows: a linear layer, or a query's scores. (N,)"""
        x = self.data
        assert len(rows[0].data) == len(x)  # map() stops at the shorter one
        data = [sum(map(mul, row.data, x)) for row in rows]
        if scale != 1.0:
            data = [scale * v for v in data]
        if bias is not None:
            data = list(map(add, data, bias.data))
        return Vector(data, self.tape, Vector.dots_backward, self, rows, bias, scale)

    def dots_backward(self, x, rows, bias, scale):
        grad, data, used, weights = self.grad, x.data, [], []
        if bias is not None:
            bias.accumulate(grad)
        for row, g in zip(rows, grad, strict=True):
            if g:  # behind a ReLU most are 0
                g *= scale
                before = row.grad
                if before is None:
                    row.grad = [g * v for v in data]
                else:
                    row.grad = [b + g * v for b, v in zip(before, data)]  # noqa: B905
                used.append(g)
                weights.append(row.data)
        if used:
            x.accumulate([sum(map(mul, used, column)) for column in zip(*weights)])  # noqa: B905

    def mix(self, rows: list["Vector"]):
        """The sum of N rows, each times its weight in this vector (N,): what attention gives."""
        weights = self.data
        assert len(rows) == len(weights)
        columns = zip(*[row.data for row in rows], strict=True)
        data = [sum(map(mul, weights, column)) for column in columns]
        return Vector(data, self.tape, Vector.mix_backward, self, rows)

    def mix_backward(self, weights, rows):
        grad = self.grad
        weights.accumulate([sum(map(mul, grad, row.data)) for row in rows])
        for row, w in zip(rows, weights.data, strict=True):
            row.accumulate([w * g for g in grad])

    def softmax(self):
        largest = max(self.data)
        data = [math.exp(v - largest) for v in self.data]
        total = sum(data)
        return Vector([v / total for v in data], self.tape, Vector.softmax_backward, self)

    def softmax_backward(self, x):
        mean = sum(map(mul, self.grad, self.data))
        x.accumulate([p * (g - mean) for p, g in zip(self.data, self.grad, strict=True)])

    def relu(self):
        data = [0.0 if v <= 0.0 else v for v in self.data]  # so written, NaN stays NaN
        return Rectified(data, self.tape, Vector.relu_backward, self)

    def relu_backward(self, x):  # the derivative at 0 is 0, as in PyTorch
        x.accumulate([g if v else 0.0 for g, v in zip(self.grad, self.data, strict=True)])

    def gelu(self):
        """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the tanh form, as in GPT-2."""
        tanh = [math.tanh(GELU_SLOPE * (v + GELU_CUBE * v * v * v)) for v in self.data]
        data = [0.5 * v * (1.0 + t) for v, t in zip(self.data, tanh, strict=True)]
        return Vector(data, self.tape, Vector.gelu_backward, self, tanh)

    def gelu_backward(self, x, tanh):
        slopes = [
            0.5 * (1.0 + t + v * (1.0 - t * t) * GELU_SLOPE * (1.0 + 3.0 * GELU_CUBE * v * v))
            for v, t in zip(x.data, tanh, strict=True)
        ]
        x.accumulate(list(map(mul, self.grad, slopes)))

    def rms_norm(self, eps: float):
        """x / sqrt(mean(x^2) + eps). Zhang and Sennrich (2019), without weights."""
        x = self.data
        scale = (sum(map(mul, x, x)) / len(x) + eps) ** -0.5
        return Vector([scale * v for v in x], self.tape, Vector.rms_norm_backward, self, scale)

    def rms_norm_backward(self, x, scale):
        y, grad = self.data, self.grad
        mean = sum(map(mul, grad, y)) / len(y)
        x.accumulate([scale * (g - mean * v) for g, v in zip(grad, y, strict=True)])

    def layer_norm(self, weight: "Vector", bias: "Vector", eps: float):
        """weight (x - mean) / sqrt(variance + eps) + bias. Ba et al. (2016); biased variance."""
        x, n = self.data, len(self.data)
        mean = sum(x) / n
        centred = [v - mean for v in x]
        scale = (sum(map(mul, centred, centred)) / n + eps) ** -0.5
        normal = [scale * v for v in centred]
        data = list(map(add, map(mul, weight.data, normal), bias.data))
        inputs = (self, weight, bias, normal, scale)
        return Vector(data, self.tape, Vector.layer_norm_backward, *inputs)

    def layer_norm_backward(self, x, weight, bias, normal, scale):
        weight.accumulate(list(map(mul, self.grad, normal)))
        bias.accumulate(self.grad)
        grad, n = list(map(mul, self.grad, weight.data)), len(normal)
        mean, slope = sum(grad) / n, sum(map(mul, grad, normal)) / n
        x.accumulate([scale * (g - mean - slope * v) for g, v in zip(grad, normal, strict=True)])

    def part(self, start: int, stop: int):
        """The elements from start to stop, such as those of one head."""
        return Vector(self.data[start:stop], self.tape, Vector.part_backward, self, start, stop)

    def part_backward(self, x, start, stop):
        grad = x.grad or [0.0] * len(x.data)
        mine = map(add, grad[start:stop], self.grad)
        x.grad = [*grad[:start], *mine, *grad[stop:]]

    def join(self, others: Sequence["Vector"]):
        """This vector and the others, end to end."""
        parts = [self, *others]
        data = chain.from_iterable([part.data for part in parts])
        return Vector(list(data), self.tape, Vector.join_backward, parts)

    def join_backward(self, parts):
        start = 0
        for part in parts:
            stop = start + len(part.data)
            part.accumulate(self.grad[start:stop])
            start = stop

    def dropout(self, rate: float, random: Random):
        """Each element 0 with probability `rate`, else divided by 1 - rate. (Inverted dropout.)"""
        factors = [0.0 if random.random() < rate else 1.0 / (1.0 - rate) for _ in self.data]
        data = list(map(mul, self.data, factors))
        return Vector(data, self.tape, Vector.dropout_backward, self, factors)

    def dropout_backward(self, x, factors):
        x.accumulate(list(map(mul, self.grad, factors)))

    def cross_entropy(self, target: int):
        """-log softmax(x)[target], in nats. (1,)"""
        if target < 0:  # an ignored target is -100, which Python would take from the end
            raise IndexError(f"target {target} is not one of {len(self)} classes")
        largest = max(self.data)
        exps = [math.exp(v - largest) for v in self.data]
        total = sum(exps)
        loss = math.log(total) + largest - self.data[target]
        inputs = (self, target, exps, total)
        return Vector([loss], self.tape, Vector.cross_entropy_backward, *inputs)

    def cross_entropy_backward(self, x, target, exps, total):
        scale = self.grad[0] / total
        grad = [scale * v for v in exps]
        grad[target] -= self.grad[0]
        x.accumulate(grad)


class Rectified(Vector):
    """What a ReLU gives: mostly zeros, which a linear layer skips, forwards and backwards.

    Where it is 0, its gradient is left at 0 too: so is the ReLU's derivative, which comes next.
    """

    __slots__ = ()

    def dots(self, rows, bias=None, scale=1.0):
        live = [j for j, v in enumerate(self.data) if v]
        if len(live) < 2 or scale != 1.0:  # itemgetter gives tuples from two items on
            return Vector.dots(self, rows, bias, scale)
        pick = itemgetter(*live)
        x, weights = pick(self.data), [pick(row.data) for row in rows]
        data = [sum(map(mul, row, x)) for row in weights]
        if bias is not None:
            data = list(map(add, data, bias.data))
        inputs = (self, rows, bias, live, x, weights)
        return Vector(data, self.tape, Rectified.dots_backward, *inputs)

    # never called through an instance: its record holds it and what it takes
    def dots_backward(  # pyrefly: ignore[bad-override]
        self, x, rows, bias, live, numbers, weights
    ):
        if bias is not None:
            bias.accumulate(self.grad)
        for row, g in zip(rows, self.grad, strict=True):
            row.grad = grad = list(row.grad or [0.0] * len(x.data))  # a new list, so in place
            for j, v in zip(live, numbers):  # noqa: B905
                grad[j] += g * v
        grad = [0.0] * len(x.data)
        for j, column in zip(live, zip(*weights, strict=True), strict=True):
            grad[j] = sum(map(mul, self.grad, column))
        x.accumulate(grad)


def concat(parts: Sequence[Vector]) -> Vector:
    """The parts end to end, as one vector."""
    return parts[0].join(parts[1:])


def mean(vectors: list[Vector]) -> Vector:
    """The mean of vectors, element by element, such as that of losses."""
    return reduce(add, vectors) * (1.0 / len(vectors))
