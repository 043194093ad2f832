"""Layers as a CPU trains them fastest: the same functions in fewer passes over memory.

    use_cpu_layers(model)

Parameters and checkpoints stay as they are. In bf16, attention to short sequences keeps its weights
for the backward pass; dropout draws four decisions at a time. With a cache, another mask than that
of documents or attention dropout, without gradients and in torch.compile the decoder's own form is
taken, with which `tests/model/test_cpu_layers.py` compares this one.

Shapes: B sequences, T tokens, C = d_model, H heads of width D = C / H, N = B H.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import bf16_attention
from model.bf16_attention import (
    MAX_SCORES,
    DocumentMask,
    accumulation_dtype,
    add_mask,
    of_whole_sequences,
)
from model.transformer_full import MultiHeadAttention, TransformerDecoder, document_mask

MAX_LENGTH = 128  # tokens: beyond, the weights would take much memory


def use_cpu_layers(model: TransformerDecoder):
    """Has the layers of a decoder train this way."""
    forms: dict[type[nn.Module], Callable[..., torch.Tensor]]
    forms = {MultiHeadAttention: attention, nn.Dropout: dropout}
    for module in model.modules():
        if type(module) in forms:
            module.forward = partial(forms[type(module)], module)
    model.document_mask = partial(mask_documents, model.pos_encoding.dtype)


def is_plain() -> bool:
    """Whether the decoder's own form will do: for torch.compile, and without gradients."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


# Attention ----------------------------------------------------------------------------------------


def mask_documents(
    dtype: torch.dtype, documents: torch.Tensor, positions: torch.Tensor
) -> DocumentMask:
    """`document_mask` as numbers of this type to add."""
    allowed = document_mask(documents, positions)
    return DocumentMask(torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -math.inf))


def attention(module: MultiHeadAttention, x, mask=None, cache=None):
    """`MultiHeadAttention.forward` of `module`: (B, T, C) -> (B, T, C)."""
    added = mask.added if isinstance(mask, DocumentMask) else None
    if added is not None and not torch.is_autocast_enabled("cpu"):
        mask = added  # as PyTorch's own attention takes it
    special = cache is not None or (module.training and module.dropout > 0)
    special = special or (mask is not None and added is None)
    if special or is_plain() or not is_bf16() or x.shape[1] > MAX_LENGTH:
        return MultiHeadAttention.forward(module, x, mask, cache)
    linears = module.W_q, module.W_k, module.W_v
    weight = torch.cat([linear.weight for linear in linears])  # (3 C, C)
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    return module.W_o(ShortAttention.apply(F.linear(x, weight, bias), module.n_heads, added))


def is_bf16() -> bool:
    """Whether products are in bf16, and fast there."""
    return (
        bf16_attention.HAS_FAST_PRODUCTS
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class ShortAttention(torch.autograd.Function):
    """Causal attention: QKV (B, T, 3 C) -> (B, T, C), some heads at a time.

    All tensors are of one type, in which the weights P are kept; sums are in float32 at least.
    added: of a DocumentMask, or None.
    """

    @staticmethod
    def forward(ctx, QKV, n_heads, added=None):
        B, T, _ = QKV.shape
        qkv = QKV.view(B, T, 3, n_heads, -1).permute(2, 0, 3, 1, 4).reshape(3, B * n_heads, T, -1)
        q, k, v = qkv.unbind()  # (N, T, D)
        P, y = q.new_empty(len(q), T, T), torch.empty_like(q)
        later = q.new_full((T, T), -math.inf).triu(1)
        if added is not None:
            added = added.to(q.dtype)
        for heads in parts(P, n_heads if added is not None else 1):
            scaled = {"beta": 1 if added is None else 0, "alpha": 1 / math.sqrt(q.shape[-1])}
            S = torch.baddbmm(later, q[heads], k[heads].mT, **scaled)
            if added is not None:
                add_mask(S, added, heads.start, len(P))
            torch.softmax(S, -1, out=P[heads])
            torch.bmm(P[heads], v[heads], out=y[heads])
        ctx.save_for_backward(qkv, P)
        return y.view(B, n_heads, T, -1).transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    def backward(ctx, dY):  # pyrefly: ignore[bad-override], of one output one gradient comes
        qkv, P = ctx.saved_tensors
        q, k, v = qkv.unbind()
        dq, dk, dv = (dqkv := torch.empty_like(qkv)).unbind()
        (B, T, C), D = dY.shape, q.shape[-1]
        dy = dY.reshape(B, T, C // D, D).transpose(1, 2).reshape(q.shape)
        scaled = {"beta": 0, "alpha": 1 / math.sqrt(D)}
        for heads in parts(P):
            torch.bmm(P[heads].mT, dy[heads], out=dv[heads])
            dP = torch.bmm(dy[heads], v[heads].mT)
            # of the softmax: P (dP - the sum of P dP over the keys)
            dS = torch._softmax_backward_data(dP, P[heads], -1, P.dtype)
            torch.baddbmm(dq[heads], dS, k[heads], **scaled, out=dq[heads])
            torch.baddbmm(dk[heads], dS.mT, q[heads], **scaled, out=dk[heads])
        return dqkv.view(3, B, -1, T, D).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C), None, None


def parts(P, H: int = 1):
    """Slices of the N heads whose weights P (N, T, T) are computed at a time.

    H: heads of a sequence, where the parts are to be of whole sequences, or equal parts of one.
    """
    count = of_whole_sequences(max(1, MAX_SCORES // P.shape[-1] ** 2), H)
    return [slice(first, first + count) for first in range(0, len(P), count)]


# Dropout ------------------------------------------------------------------------------------------


def dropout(module: nn.Dropout, x):
    """`nn.Dropout.forward`, of other random numbers, and 8 times as fast."""
    if torch.compiler.is_compiling() or not module.training or module.p == 0:
        return nn.Dropout.forward(module, x)
    return x * dropout_mask(x.shape, module.p, accumulation_dtype(x))


def dropout_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """1 / (1 - p) with probability 1 - p, else 0, from PyTorch's random state.

    16 random bits decide, so 1 - p is a multiple of 2^-16, the nearest one above 0.
    """
    kept = max(1, round((1 - p) * 2**16))
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[:count].view(shape)  # from -2^15 to 2^15 - 1
    mask = torch.ge(bits, 2**15 - kept, out=torch.empty(shape, dtype=dtype))
    return mask.mul_(2**16 / kept)  # a multiplication by booleans would be slower
