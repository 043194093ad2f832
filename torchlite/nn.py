"""Modules: parameters and the layers made of them. Names and initial weights as in PyTorch.

`KVCache`, which torch.nn has not, is what a decoder needs to generate.
"""

import math
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np

from torchlite import functional as F
from torchlite import tensor
from torchlite.tensor import Tensor

generator = np.random.default_rng()  # of initial weights and dropout


def manual_seed(seed: int):
    """Restarts what initial weights and dropout draw from."""
    global generator
    generator = np.random.default_rng(seed)


class Parameter(Tensor):
    """A tensor that is trained: of the default dtype, whatever it is made from."""

    __slots__ = ()

    def __init__(self, data):
        super().__init__(buffer(data).data, requires_grad=True)


def buffer(data) -> Tensor:
    """A tensor of the default dtype that is not trained."""
    return Tensor(np.array(data, tensor.get_default_dtype()))


class Module:
    """Something with parameters. They are found among the attributes, lists included."""

    training = True
    forward: Callable[..., Tensor]

    def __call__(self, *args, **kwargs) -> Tensor:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, "Module | Parameter"]]:
        """The parameters and modules directly in this one, by name; in a list by number.

        Its own parameters come first, whatever was set first, as in PyTorch.
        """
        for name, value in sorted(
            vars(self).items(), key=lambda v: not isinstance(v[1], Parameter)
        ):
            if isinstance(value, Module | Parameter):
                yield name, value
            elif isinstance(value, list):
                for i, part in enumerate(value):
                    if isinstance(part, Module | Parameter):
                        yield f"{name}.{i}", part

    def named_parameters(self, remove_duplicate=True) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter), each one once, or a shared one under every name it has."""
        seen = set()
        stack: list[tuple[str, Module | Parameter]] = [("", self)]
        while stack:
            name, part = stack.pop()
            if isinstance(part, Parameter):
                if id(part) not in seen or not remove_duplicate:
                    seen.add(id(part))
                    yield name, part
            else:
                inside = [(f"{name}.{n}".lstrip("."), child) for n, child in part.children()]
                stack += reversed(inside)

    def parameters(self) -> list[Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def modules(self) -> Iterator["Module"]:
        """This module and all inside it."""
        yield self
        for _, child in self.children():
            if isinstance(child, Module):
                yield from child.modules()

    def train(self, mode: bool = True) -> Self:
        """Dropout on, or with mode=False off."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        return self.train(False)

    def zero_grad(self):
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters; a shared one under each of its names, as in PyTorch."""
        return {n: p.data.copy() for n, p in self.named_parameters(remove_duplicate=False)}

    def load_state_dict(self, state: dict):
        """Puts back what state_dict gave. Raises ValueError for names or shapes that do not fit."""
        own = dict(self.named_parameters(remove_duplicate=False))
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(f"load_state_dict: missing {missing}, unknown {unknown}")
        for name, parameter in own.items():
            if np.shape(state[name]) != parameter.shape:
                raise ValueError(
                    f"load_state_dict: {name} is {np.shape(state[name])}, not {parameter.shape}"
                )
        for name, parameter in own.items():
            parameter.data[...] = state[name]


class Identity(Module):
    """Nothing."""

    def forward(self, x):
        return x


class Linear(Module):
    """x W^T + b."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        bound = 1.0 / math.sqrt(in_features)
        self.weight = Parameter(generator.uniform(-bound, bound, (out_features, in_features)))
        self.bias = Parameter(generator.uniform(-bound, bound, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A table with a row for each id."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        self.weight = Parameter(generator.normal(size=(num_embeddings, embedding_dim)))

    def forward(self, ids) -> Tensor:
        return F.embedding(ids, self.weight)


class LayerNorm(Module):
    """Each vector to mean 0 and variance 1, then stretched and shifted by what is learned."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5):
        self.eps = eps
        self.weight = Parameter(np.ones(normalized_shape))
        self.bias = Parameter(np.zeros(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Each vector to mean square 1."""

    def __init__(self, normalized_shape: int, eps=None, elementwise_affine: bool = True):
        self.eps = float(np.finfo(tensor.get_default_dtype()).eps) if eps is None else eps
        self.weight = Parameter(np.ones(normalized_shape)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Module):
    """The tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Dropout(Module):
    """In training, zeroes each number with probability p and divides the others by 1 - p."""

    def __init__(self, p: float = 0.5):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p = {p} must be at least 0 and below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, generator)


class KVCache:
    """Keys and values of the tokens that were read, layer by layer."""

    def __init__(self, n_layers: int):
        self.layers = [LayerCache() for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.layers[0].length

    def clear(self):
        """Forgets them all."""
        for layer in self.layers:
            layer.length = 0


class LayerCache:
    """One layer's part of a cache."""

    length = 0

    def extend(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the newest keys and values, (B, H, T, D), and returns all: (B, H, S, D)."""
        if self.length:
            K = Tensor(np.concatenate((self.K.data, K.data), axis=2))
            V = Tensor(np.concatenate((self.V.data, V.data), axis=2))
        self.K, self.V, self.length = K, V, K.shape[2]
        return K, V
