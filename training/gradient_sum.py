"""The gradient of a step: the sum over its micro-batches, in an order of its own.

Floating-point sums depend on their order. Here micro-batches are added two and two, their sums two
and two, and so on: ((0 + 1) + (2 + 3)) + ... . What one process adds up of 2^k neighbours is a node
of that tree, so that the tree, and every bit of its sum, is the same whoever computes its parts.
"""

from collections.abc import Iterable

import torch

Node = list[torch.Tensor]  # a sum of gradients, a tensor for each parameter, and of losses last


class PairwiseSum:
    """Adds up what backward passes leave in `.grad`, and their losses, like a binary counter.

    Two neighbours are added in `.grad` by the second's backward pass. A sum of two waits until its
    neighbour is there, a sum of four likewise: log2(n) - 1 sums at most, none for one or two.

    in_place: gradients stay where they are, for a CUDA graph that knows only that place; a sum that
    waits is a copy then. pairs: False adds one after the other, as runs did that began before.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], in_place: bool = False, pairs: bool = True
    ):
        self.parameters, self.in_place, self.pairs = list(parameters), in_place, pairs
        self.waiting: list[Node | None] = []  # at i: a sum of 2^(i + 1) micro-batches, or None
        self.count = 0

    def begin(self, loss: torch.Tensor):
        """Before a micro-batch's backward pass. loss: of those so far that are in `.grad`, ()."""
        if self.pairs and self.count and self.count % 2 == 0:
            self.put_away(loss)
        self.count += 1

    def put_away(self, loss: torch.Tensor):
        """Moves the sum of a pair out of `.grad`, to wait for its neighbour."""
        node = self.take(loss)
        for level, other in enumerate(self.waiting):
            if other is None:
                self.waiting[level] = node
                return
            torch._foreach_add_(node, other)  # a + b is b + a, to the bit
            self.waiting[level] = None
        self.waiting.append(node)

    def take(self, loss: torch.Tensor) -> Node:
        """What is in `.grad`, and the loss; both are 0 or None afterwards."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        node = [*gradients, loss]
        if self.in_place:
            node = [tensor.clone() for tensor in node]
            torch._foreach_zero_([*gradients, loss])
            return node
        for parameter in self.parameters:
            parameter.grad = None
        node[-1] = loss.clone()
        loss.zero_()
        return node

    def finish(self, loss: torch.Tensor):
        """After the last micro-batch: `.grad` and `loss` hold the sum of them all."""
        node = [*(p.grad for p in self.parameters if p.grad is not None), loss]
        for other in self.waiting:  # the small sums first: what a larger one would have waited for
            if other is not None:
                torch._foreach_add_(node, other)
        self.reset()

    def reset(self):
        """Makes it ready for the next step."""
        self.waiting, self.count = [], 0
