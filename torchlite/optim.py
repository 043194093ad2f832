"""AdamW and gradient clipping, number for number as in PyTorch."""

import math

import numpy as np

BLOCK = 1 << 15  # weights that are updated at a time: all that belongs to them stays in the cache


class AdamW:
    """Adam with decoupled weight decay. Loshchilov and Hutter (2019), algorithm 2.

    The weights of all parameters are moved into one array, side by side, of which each parameter's
    `data` becomes a view: so small parameters are updated together, in a dozen NumPy calls, and
    not a dozen for each. One without a gradient stands still, as in PyTorch. A step writes into
    arrays that a tape may still need: go backward first.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.parameters = list(parameters)
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError("AdamW: a parameter is given twice")
        if len({p.dtype for p in self.parameters}) > 1:
            raise ValueError("AdamW: parameters of several dtypes; make an optimizer for each")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.weights = np.concatenate([p.data.reshape(-1) for p in self.parameters])
        self.exp_avg = np.zeros_like(self.weights)
        self.exp_avg_sq = np.zeros_like(self.weights)
        self.runs = []  # (start, neighbours, how often each moved): small ones go together
        start = run_start = 0
        for p in self.parameters:
            size = p.data.size
            p.data = self.weights[start : start + size].reshape(p.shape)
            if not self.runs or start + size - run_start > BLOCK:
                self.runs.append((start, [], []))
                run_start = start
            self.runs[-1][1].append(p)
            self.runs[-1][2].append(0)
            start += size

    def zero_grad(self):
        """Forgets all gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self):
        """Moves every parameter by its gradient."""
        for start, parameters, steps in self.runs:
            self.attach(start, parameters)
            flat = [p.grad.reshape(-1) for p in parameters if p.grad is not None]
            if len(flat) == len(parameters) and min(steps) == max(steps):
                steps[:] = [steps[0] + 1] * len(steps)
                self.update(start, flat[0] if len(flat) == 1 else np.concatenate(flat), steps[0])
                continue
            for i, p in enumerate(parameters):  # some stood still, now or before: each for itself
                if p.grad is not None:
                    steps[i] += 1
                    self.update(start, p.grad.reshape(-1), steps[i])
                start += p.data.size

    def attach(self, start: int, parameters: list):
        """Takes in weights that were given a new array since: by hand, a copy, or an optimizer."""
        for p in parameters:
            end = start + p.data.size
            if p.data.base is not self.weights:
                self.weights[start:end] = p.data.reshape(-1)
                p.data = self.weights[start:end].reshape(p.shape)
            start = end

    def update(self, start: int, gradient, step: int):
        """One update of the weights from `start` on, their `step`-th."""
        beta1, beta2 = self.betas
        # both averages begin at 0 and are corrected for it: Kingma and Ba (2015), section 2
        root = math.sqrt(1.0 - beta2**step)
        size, eps = self.lr * root / (1.0 - beta1**step), self.eps * root
        for i in range(0, len(gradient), BLOCK):
            g = gradient[i : i + BLOCK]
            own = slice(start + i, start + i + len(g))
            w, m, v = self.weights[own], self.exp_avg[own], self.exp_avg_sq[own]
            if self.weight_decay:
                w *= 1.0 - self.lr * self.weight_decay
            m += (1.0 - beta1) * (g - m)
            v *= beta2
            v += (1.0 - beta2) * g * g
            divisor = np.sqrt(v)
            divisor += eps
            np.divide(m, divisor, out=divisor)
            divisor *= size
            w -= divisor


def clip_grad_norm_(parameters, max_norm: float) -> float:
    """Scales all gradients so that their common 2-norm is at most max_norm. Returns the norm."""
    reached = [p for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(p.grad, p.grad)) for p in reached))
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1.0:  # as in PyTorch, a norm of NaN makes every gradient NaN
        for p in reached:
            p.grad *= factor
    return norm
