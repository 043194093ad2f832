"""Operations on tensors, each with its gradient beside it. Names and meaning as in PyTorch.

What a transformer does often is fused: one entry on the tape, forward and backward by hand, in
place of a dozen. tests/test_torchlite_functional.py compares every one with PyTorch's.

Shapes: N any leading dimensions, C the last one; B sequences, H heads, T queries, S keys, D wide.
"""

import math
from functools import lru_cache

import numpy as np

from torchlite.tensor import Tensor, record, recording

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715
CHUNK = 1 << 18  # numbers of a large array that are worked on at a time: they stay in the cache
LOGITS = 1 << 21  # logits of a large vocabulary that exist at a time
ALL = slice(None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x: (N, C_in), weight: (C_out, C_in), bias: (C_out,) -> (N, C_out)."""
    W, shape = weight.data, x.data.shape
    rows = x.data if x.data.ndim == 2 else x.data.reshape(-1, shape[-1])
    y = rows @ W.T
    if bias is not None:
        y += bias.data

    def backward(g):
        g = g.reshape(len(rows), len(W))
        dx = (g @ W).reshape(shape) if x.requires_grad else None
        dW = g.T @ rows
        return (dx, dW) if bias is None else (dx, dW, g.sum(0))

    y = y.reshape(*shape[:-1], len(W))
    return record(y, (x, weight) if bias is None else (x, weight, bias), backward)


def embedding(ids, weight: Tensor) -> Tensor:
    """Rows of a table. ids: integers (N), weight: (V, C) -> (N, C)."""
    ids = np.asarray(ids)
    if ids.size and ids.min() < 0:  # NumPy would count from the end
        raise IndexError(f"embedding: id {ids.min()} is below 0")

    def backward(g):
        return (add_rows(ids.reshape(-1), g.reshape(-1, weight.shape[1]), weight.shape),)

    return record(weight.data[ids], (weight,), backward)


def add_rows(ids, rows, shape: tuple):
    """Zeros (V, C), with each row (C,) added at its id; an id that comes twice counts twice."""
    total = np.zeros(shape, rows.dtype)
    if len(ids) < 64:
        np.add.at(total, ids, rows)
    else:  # sums of neighbours are faster: equal ids are brought together
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
        total[ids[first]] = np.add.reduceat(rows[order], first, axis=0)
    return total


def relu(x: Tensor) -> Tensor:
    """max(x, 0); at 0 the gradient is 0, as in PyTorch."""
    y = np.maximum(x.data, 0)
    return record(y, (x,), lambda g: (g * (y > 0),))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi by tanh. Hendrycks and Gimpel (2016), section 2; PyTorch's "tanh" form."""
    a = x.data
    t = np.asarray(a * a)  # in place from here on: large arrays are moved often enough
    t *= GELU_CUBE
    t += 1.0
    t *= a
    t *= GELU_SCALE
    np.tanh(t, out=t)
    y = t + 1.0
    y *= a
    y *= 0.5

    def backward(g):
        inner = a * a  # the derivative of what tanh is taken of
        inner *= 3.0 * GELU_CUBE * GELU_SCALE
        inner += GELU_SCALE
        slope = np.asarray(t * t)
        np.subtract(1.0, slope, out=slope)
        slope *= inner
        slope *= a
        slope += t
        slope += 1.0
        slope *= 0.5
        slope *= g
        return (slope,)

    return record(y, (x,), backward)


def dropout(x: Tensor, p: float, training: bool, rng: np.random.Generator) -> Tensor:
    """Zeroes each number with probability p and divides the others by 1 - p."""
    kept = dropout_mask(x.data, p if training else 0.0, rng)
    return x if kept is None else record(x.data * kept, (x,), lambda g: (g * kept,))


def dropout_mask(like, p: float, rng: np.random.Generator):
    """0 with probability p, else 1 / (1 - p), in the shape of `like`; None where p is 0."""
    if p == 0.0:
        return None
    return (rng.random(like.shape, np.float32) >= p) * like.dtype.type(1.0 / (1.0 - p))


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) over its sum. The largest is taken off first, so that no exp overflows."""
    y = x.data - x.data.max(axis=axis, keepdims=True, initial=-np.inf)  # of nothing: -inf
    y = np.exp(y, out=y)
    y /= y.sum(axis=axis, keepdims=True)
    return record(
        y, (x,), lambda g: (y * (g - (g * y).sum(axis=axis, keepdims=True)),)
    )  # the Jacobian is diag(y) - y y^T


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """log(softmax(x)), without the logarithm of a number that has become 0."""
    y = x.data - x.data.max(axis=axis, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=axis, keepdims=True))
    return record(y, (x,), lambda g: (g - np.exp(y) * g.sum(axis=axis, keepdims=True),))


def cross_entropy(
    logits: Tensor, targets, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """-log softmax(logits)[target], mean or sum over the targets that are not ignored.

    logits: (N, V), targets: integers (N,). The mean over no targets at all is NaN, as in PyTorch.
    """
    rows, targets = targets_left(targets, len(logits), ignore_index)
    divisor = {"mean": len(targets), "sum": 1}[reduction]
    gradient = logits.data[rows]
    if rows is ALL:
        gradient = gradient.copy()
    loss, step = 0.0, max(1, CHUNK // max(1, gradient.shape[1]))
    for i in range(0, len(gradient), step):
        loss += softmax_minus_onehot(gradient[i : i + step], targets[i : i + step])

    def backward(g):
        part = gradient * (g / max(1, divisor))
        if rows is ALL:
            return (part,)
        full = np.zeros_like(logits.data)
        full[rows] = part
        return (full,)

    loss = loss / divisor if divisor else math.nan
    return record(np.asarray(loss, logits.dtype), (logits,), backward)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets, ignore_index=-100, reduction="mean"
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), targets), a chunk of rows at a time.

    x: (N, C), weight: (V, C), bias: (V,), targets: integers (N,). The logits of a large vocabulary
    are the largest array of a step: here they never exist at once, and the gradient, which needs
    nothing but them, is made with them.
    """
    rows, targets = targets_left(targets, len(x), ignore_index)
    divisor = {"mean": len(targets), "sum": 1}[reduction]
    chosen, W = x.data[rows], weight.data
    inputs = (x, weight) if bias is None else (x, weight, bias)
    needed = recording() and any(t.requires_grad for t in inputs)
    loss, step = 0.0, max(1, LOGITS // max(1, len(W)))
    dchosen, dW, db = np.empty_like(chosen), np.zeros_like(W), np.zeros(len(W), W.dtype)
    for i in range(0, len(chosen), step):
        part = chosen[i : i + step]
        logits = part @ W.T
        if bias is not None:
            logits += bias.data
        loss += softmax_minus_onehot(logits, targets[i : i + step])
        if needed:
            np.matmul(logits, W, out=dchosen[i : i + step])
            dW += logits.T @ part
            if bias is not None:
                db += logits.sum(0)
    dx = dchosen
    if rows is not ALL:
        dx = np.zeros_like(x.data)
        dx[rows] = dchosen
    gradients = (dx, dW, db)[: len(inputs)]

    def backward(g):
        share = g / max(1, divisor)
        return tuple(d * share for d in gradients)

    loss = loss / divisor if divisor else math.nan
    return record(np.asarray(loss, W.dtype), inputs, backward)


def targets_left(targets, N: int, ignore_index: int):
    """Which of N rows have a target that is not ignored (ALL, where all do), and those targets."""
    targets, rows = np.asarray(targets), ALL
    if targets.shape != (N,):
        raise ValueError(f"cross_entropy: targets of shape {targets.shape} for {N} rows")
    if ignore_index >= 0 or targets.min(initial=0) < 0:
        rows = np.flatnonzero(targets != ignore_index)
        targets = targets[rows]
        if targets.min(initial=0) < 0:
            raise IndexError(f"cross_entropy: target {targets.min()} is below 0")
    return rows, targets


def softmax_minus_onehot(logits, targets) -> float:
    """The summed loss of logits (N, V), which become their own gradient: softmax - onehot."""
    places = np.arange(len(targets))
    logits -= logits.max(1, keepdims=True)
    loss = -logits[places, targets].sum(dtype=np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(1, keepdims=True)
    logits /= total
    logits[places, targets] -= 1
    return float(loss + np.log(total).sum(dtype=np.float64))


def mean(a):
    """Mean over the last axis, which is kept. ndarray.mean is three times as slow on small ones."""
    return a.sum(-1, keepdims=True) / a.shape[-1]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; var divides by C, not C - 1.

    Ba, Kiros and Hinton (2016), equation 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"layer_norm: a weight of shape {weight.shape} for {x.shape}")
    centred = x.data - mean(x.data)
    scale = (mean(centred * centred) + eps) ** -0.5
    normal = centred * scale

    def backward(g):
        over = tuple(range(g.ndim - 1))
        gn = g * weight.data
        # neither a shift nor a stretch of x changes the result, so both are taken out
        dx = gn - mean(gn) - normal * mean(gn * normal)
        return scale * dx, (g * normal).sum(over), g.sum(over)

    return record(normal * weight.data + bias.data, (x, weight, bias), backward)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) [* weight] over the last axis. Zhang and Sennrich (2019), eq. 4."""
    a = x.data
    scale = (mean(a * a) + eps) ** -0.5
    normal = a * scale

    def backward(g):
        gn = g if weight is None else g * weight.data
        dx = scale * (gn - normal * mean(gn * normal))
        return (dx,) if weight is None else (dx, (g * normal).sum(tuple(range(g.ndim - 1))))

    if weight is None:
        return record(normal, (x,), backward)
    return record(normal * weight.data, (x, weight), backward)


@lru_cache(maxsize=256)
def causal_mask(T: int, S: int, dtype):
    """(T, S) to add: -inf where query t would see a key after its own place among the last T."""
    mask = np.triu(np.full((T, S), -np.inf, dtype), 1 + S - T)
    mask.setflags(write=False)  # it is shared
    return mask


def additive(mask, dtype):
    """A mask as numbers to add: of booleans, 0 where True and -inf where False."""
    mask = np.asarray(mask)
    if mask.dtype.kind not in "bf":
        raise TypeError(f"a mask is of booleans or floats, not {mask.dtype}")
    if mask.dtype == bool:
        mask = np.where(mask, 0.0, -np.inf)
    return mask.astype(dtype, copy=False)


def scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask=None, dropout_p: float = 0.0, is_causal=False, rng=None
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, an entry for each step. Vaswani et al. (2017), equation 1.

    Q: (..., T, D), K: (..., S, D), V: (..., S, E) -> (..., T, E). mask: None, booleans (True: may
    be seen) or numbers that are added to the scores. is_causal: query t sees the first t + 1 keys.
    As one entry, its gradient by hand, it is `attention` in model/transformer_lite.py.
    """
    T, S = Q.shape[-2], K.shape[-2]
    hidden = np.zeros((T, S), Q.dtype)
    for part in (np.tri(T, S, dtype=bool) if is_causal else None, mask):
        hidden = hidden if part is None else hidden + additive(part, Q.dtype)
    blind = (hidden == -np.inf).all(-1, keepdims=True)  # queries that may see nothing get 0
    scores = (Q * Q.shape[-1] ** -0.5) @ K.transpose(-1, -2) + np.where(blind, 0, hidden)
    weights = softmax(scores) * ~blind
    if dropout_p:
        weights = dropout(weights, dropout_p, True, rng or np.random.default_rng())
    return weights @ V
