"""Adam for the plain Python engine. Standard library only."""

import math
from itertools import chain


class Adam:
    """Adam (Kingma and Ba, 2015); the same numbers as torch.optim.AdamW.

    weight_decay is decoupled (Loshchilov and Hutter, 2019), and 0 is plain Adam. A gradient of None
    counts as 0. All rows lie in one list, which Python walks faster than many short ones.
    """

    def __init__(self, parameters, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
        self.parameters = list(parameters)
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        size = sum(map(len, self.parameters))
        self.exp_avg, self.exp_avg_sq = [0.0] * size, [0.0] * size
        self.steps = 0

    def step(self, lr: float):
        """One update; the corrections of the bias in the cheaper order of the paper's section 2."""
        self.steps += 1
        b1, b2, sqrt = self.beta1, self.beta2, math.sqrt
        c1, c2, correction = 1.0 - b1, 1.0 - b2, sqrt(1.0 - b2**self.steps)
        rate, eps = lr * correction / (1.0 - b1**self.steps), self.eps * correction
        data = list(chain.from_iterable([p.data for p in self.parameters]))
        grad = list(chain.from_iterable([p.grad or [0.0] * len(p) for p in self.parameters]))
        if self.weight_decay:
            data = [w - lr * self.weight_decay * w for w in data]
        self.exp_avg = [b1 * m + c1 * g for m, g in zip(self.exp_avg, grad, strict=True)]
        self.exp_avg_sq = [b2 * v + c2 * g * g for v, g in zip(self.exp_avg_sq, grad, strict=True)]
        moments = zip(data, self.exp_avg, self.exp_avg_sq, strict=True)
        data = [w - rate * m / (sqrt(v) + eps) for w, m, v in moments]
        start = 0
        for parameter in self.parameters:
            stop = start + len(parameter)
            parameter.data = data[start:stop]
            start = stop

    def zero_grad(self):
        """Forgets the gradients, which would otherwise add up over the steps."""
        for parameter in self.parameters:
            parameter.grad = None
