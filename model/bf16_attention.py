"""softmax(Q K^T / sqrt(D)) V of training in bf16 on a CPU, two to three times as fast.

PyTorch's own kernel has its products in float32, which a CPU with bf16 instructions computes at a
quarter of the speed, or else a slow backward pass. So it is written out here, as batched matrix
products in bf16 around a softmax in float32. In fp16, without such instructions, with dropout, and
with another mask than that of documents, PyTorch's kernel is used, in float32: bf16 products are
many times slower there.

Shapes: B sequences, H heads of width D, T tokens; N = B H.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.device import cpu_has_bf16

BLOCK = 128  # queries at a time: keys after the last of them are not looked at
MAX_SCORES = 2**19  # numbers at a time, for a CPU's caches
HAS_FAST_PRODUCTS = cpu_has_bf16()


class DocumentMask(NamedTuple):
    """A mask that is causal too: numbers (B, 1, T, T), -inf where a token may not look, else 0.

    Adding them is 25 times as fast as filling in what booleans hide.
    """

    added: torch.Tensor


def bf16_attention(Q, K, V, mask, dropout, causal):
    """What `scaled_dot_product_attention` gives, for (B, H, T, D) on a CPU under autocast.

    mask: may be a DocumentMask.
    """
    known = causal or isinstance(mask, DocumentMask)
    mask = mask.added if isinstance(mask, DocumentMask) else mask
    if known and not dropout and Q.dtype == torch.bfloat16 and HAS_FAST_PRODUCTS:
        return attend(Q, K, V, mask)
    with torch.autocast("cpu", enabled=False):
        Q, K, V = Q.float(), K.float(), V.float()
        return F.scaled_dot_product_attention(Q, K, V, mask, dropout, is_causal=causal)


def forward(
    Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, added: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention: products in the type of Q, K and V, the softmax in float32 at least.

    added: of a DocumentMask. Like FlashAttention (Dao et al., 2022) it goes block by block, and
    keeps nothing for the backward pass but its inputs: that computes the weights again.
    """
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (Q, K, V))  # (N, T, D)
    y = torch.empty_like(q)
    for heads, queries, keys, P in blocks(q, k, added):
        torch.bmm(P.to(v.dtype), v[heads, keys], out=y[heads, queries])
    return y.view(Q.shape)


def backward(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    added: torch.Tensor | None,
    dY: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of Q, K and V."""
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (Q, K, V))  # (N, T, D)
    dy, dq = dY.reshape(q.shape).contiguous(), torch.empty_like(q)
    # several blocks of queries see a key: what they give is summed in float32 at least
    dk, dv = (torch.zeros_like(k, dtype=accumulation_dtype(k)) for _ in range(2))
    for heads, queries, keys, P in blocks(q, k, added):
        dv[heads, keys] += torch.bmm(P.to(q.dtype).mT, dy[heads, queries])
        dP = torch.bmm(dy[heads, queries], v[heads, keys].mT).to(P.dtype)
        # of the softmax: P (dP - the sum of P dP over the keys)
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
        dS = dS.mul_(1 / math.sqrt(q.shape[-1])).to(q.dtype)
        torch.bmm(dS, k[heads, keys], out=dq[heads, queries])
        dk[heads, keys] += torch.bmm(dS.mT, q[heads, queries])
    dQ, dK, dV = (x.to(q.dtype).view(dY.shape) for x in (dq, dk, dv))
    return dQ, dK, dV


class BF16Attention(torch.autograd.Function):
    """`forward` with its `backward`."""

    @staticmethod
    def forward(ctx, Q, K, V, added=None):
        ctx.save_for_backward(Q, K, V, added)
        return forward(Q, K, V, added)

    @staticmethod
    def backward(ctx, dY):  # pyrefly: ignore[bad-override], of one output one gradient comes
        Q, K, V, added = ctx.saved_tensors
        return *backward(Q, K, V, added, dY), None


attend: Callable[..., torch.Tensor] = BF16Attention.apply


def become_operator():
    """Makes it an operator of PyTorch's: torch.compile then calls it and does not look into it.

    Otherwise it would unroll the blocks, for each length anew.
    """
    global attend
    attend = operator()


@cache
def operator() -> Callable[..., torch.Tensor]:
    """`forward` and `backward` as PyTorch's operators."""
    attend = torch.library.custom_op("triptych::bf16_attention", forward, mutates_args=())
    attend_backward = torch.library.custom_op(
        "triptych::bf16_attention_backward", backward, mutates_args=()
    )
    attend.register_fake(lambda Q, K, V, added=None: Q.new_empty(Q.shape))
    attend_backward.register_fake(
        lambda Q, K, V, added, dY: tuple(Q.new_empty(Q.shape) for _ in range(3))
    )
    attend.register_autograd(
        lambda ctx, dY: (*attend_backward(*ctx.saved_tensors, dY), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return attend


def blocks(q, k, added=None):
    """Slices of N heads, T queries and the keys that these see; their weights P, in float32."""
    N, T, D = q.shape
    count = max(1, MAX_SCORES // (min(T, BLOCK) * T))
    if added is not None:
        count = of_whole_sequences(count, N // len(added))
    later = torch.full((BLOCK, BLOCK), -math.inf, dtype=accumulation_dtype(q)).triu(1)
    for first in range(0, N, count):
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            heads, queries, keys = slice(first, first + count), slice(start, end), slice(end)
            S = torch.bmm(q[heads, queries], k[heads, keys].mT).to(later.dtype)
            S.mul_(1 / math.sqrt(D))
            if added is None:
                S[:, :, start:] += later[: end - start, : end - start]
            else:
                add_mask(S, added[:, :, queries, keys], first, N)
            yield heads, queries, keys, S.softmax(-1)


def of_whole_sequences(count: int, H: int) -> int:
    """At most `count` heads: those of some sequences, or an equal part of one's."""
    return count // H * H or max(n for n in range(1, count + 1) if H % n == 0)


def add_mask(S, added, first: int, N: int):
    """Adds (B, 1, T, S) to the scores S (n, T, S) of the heads from `first` on, of all N, in place.

    n is a number of `of_whole_sequences`.
    """
    H = N // len(added)
    sequences = added[first // H : -(-(first + len(S)) // H)]
    S.view(len(sequences), -1, *S.shape[1:]).add_(sequences)


def accumulation_dtype(x) -> torch.dtype:
    """The type of what is not a product."""
    return torch.promote_types(x.dtype, torch.float32)
