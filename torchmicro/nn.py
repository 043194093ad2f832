"""Layers for the plain-Python decoder: what `torch.nn` is to the other. Standard library only.

    linear = Linear(3, 2, bias=True, vector=partial(Vector, tape=Tape()))
    y = linear(x)  # x: a list of T vectors of 3 floats; y: T vectors of 2

`vector` makes the vectors of a layer, and so decides what everything is computed with: `Vector` of
`vector.py`, or `ScalarVector` of `scalar.py`.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Self


class Parameter(list):
    """The rows of a trained matrix, or the one row of a trained vector; `shape` tells which."""

    def __init__(self, vector: Callable, *shape: int):
        self.shape = shape
        n_rows = shape[0] if len(shape) == 2 else 1
        super().__init__(vector([0.0] * shape[-1]) for _ in range(n_rows))

    def nested(self, rows: list[list[float]]):
        """Rows as lists in the shape of this parameter."""
        return rows if len(self.shape) == 2 else rows[0]

    def rows(self, nested):
        """The reverse of `nested`."""
        return nested if len(self.shape) == 2 else [nested]

    def fits(self, nested) -> bool:
        """Whether nested lists of numbers have the shape of this parameter."""
        rows, width = self.rows(nested), self.shape[-1]
        return (
            isinstance(rows, list)
            and len(rows) == len(self)
            and all(isinstance(row, list) and len(row) == width for row in rows)
            and not any(isinstance(number, list) for row in rows for number in row)
        )

    def load(self, nested):
        """Copies nested lists of this shape."""
        for row, new in zip(self, self.rows(nested), strict=True):
            row.data = list(map(float, new))


class Module:
    """A layer with parameters and layers of its own: its attributes."""

    training = True
    forward: Callable[..., list]

    def __call__(self, *args, **options) -> list:
        return self.forward(*args, **options)

    def modules(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """This module and those inside it, each with the start of its parameters' names."""
        yield prefix, self
        for name, part in vars(self).items():
            if isinstance(part, Module):
                yield from part.modules(f"{prefix}{name}.")

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Each parameter with its name in PyTorch's state dict; one used in two places once."""
        seen = set()
        for prefix, module in self.modules():
            for name, part in vars(module).items():
                if isinstance(part, Parameter) and id(part) not in seen:
                    seen.add(id(part))
                    yield prefix + name, part

    def parameters(self) -> list:
        """The rows of all parameters, for an optimizer."""
        return [row for _, parameter in self.named_parameters() for row in parameter]

    def state_dict(self) -> dict:
        """Every parameter by name, as nested lists."""
        return {
            name: parameter.nested([list(row.data) for row in parameter])
            for name, parameter in self.named_parameters()
        }

    def gradients(self) -> dict:
        """The gradient of every parameter by name, as nested lists; 0 where none has come."""
        return {
            name: parameter.nested([list(row.grad or [0.0] * len(row)) for row in parameter])
            for name, parameter in self.named_parameters()
        }

    def train(self, mode: bool = True) -> Self:
        """With dropout, or without: `train(False)`, `eval()`."""
        for _, module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        return self.train(False)


class ModuleList(Module, list):
    """Layers one after another, named by their numbers."""

    def modules(self, prefix=""):
        yield prefix, self
        for i, module in enumerate(self):
            yield from module.modules(f"{prefix}{i}.")


class Linear(Module):
    """x W^T + b for each of T vectors."""

    def __init__(self, n_in: int, n_out: int, bias: bool, vector: Callable):
        self.weight = Parameter(vector, n_out, n_in)
        self.bias = Parameter(vector, n_out) if bias else None

    def forward(self, x):
        bias = self.bias[0] if self.bias else None
        return [t.dots(self.weight, bias) for t in x]


class Embedding(Module):
    """A trained vector for each id."""

    def __init__(self, n_ids: int, width: int, vector: Callable):
        self.weight = Parameter(vector, n_ids, width)

    def forward(self, ids: list[int]):
        for i in ids:
            if not 0 <= i < len(self.weight):  # -1 would be the last one
                raise IndexError(f"id {i} is not one of the {len(self.weight)} that are embedded")
        return [self.weight[i] for i in ids]


class LayerNorm(Module):
    """Each vector to mean 0 and variance 1, then times a weight and plus a bias."""

    def __init__(self, width: int, eps: float, vector: Callable):
        self.weight, self.bias = Parameter(vector, width), Parameter(vector, width)
        self.weight.load([1.0] * width)
        self.eps = eps

    def forward(self, x):
        return [t.layer_norm(self.weight[0], self.bias[0], self.eps) for t in x]


class RMSNorm(Module):
    """Each vector to mean square 1."""

    def __init__(self, eps: float):
        self.eps = eps

    def forward(self, x):
        return [t.rms_norm(self.eps) for t in x]


class Identity(Module):
    """Nothing."""

    def forward(self, x):
        return x


class ReLU(Module):
    """max(0, x)."""

    def forward(self, x):
        return [t.relu() for t in x]


class GELU(Module):
    """The tanh form."""

    def forward(self, x):
        return [t.gelu() for t in x]


class Dropout(Module):
    """While training, each number 0 with probability `rate`, the others larger for it."""

    def __init__(self, rate: float, random: Random):
        self.rate, self.random = rate, random

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        return [t.dropout(self.rate, self.random) for t in x]


def added(x, y):
    """x + y at each of T places."""
    return [a + b for a, b in zip(x, y, strict=True)]


class KVCache:
    """Keys and values of the tokens read so far, in each layer."""

    def __init__(self, n_layers: int, n_heads: int):
        self.layers = [LayerCache(n_heads) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self.layers[0].K[0])

    def clear(self):
        """Forgets them all."""
        for layer in self.layers:
            layer.clear()


class LayerCache:
    """One layer's part of a cache: lists of vectors (H, S, D)."""

    def __init__(self, n_heads: int):
        self.n_heads = n_heads
        self.clear()

    def clear(self):
        self.K, self.V = ([[] for _ in range(self.n_heads)] for _ in range(2))

    def extend(self, K, V):
        """Stores K and V (H, T, D) of the next T tokens; all that is stored: (H, S, D)."""
        for stored, new in ((self.K, K), (self.V, V)):
            for mine, head in zip(stored, new, strict=True):
                mine += head
        return self.K, self.V
