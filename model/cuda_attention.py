"""`MultiHeadAttention` as a GPU computes it fastest: the same numbers in fewer, larger calls.

    use_cuda_attention(model, cudnn=True)     # after model.to("cuda")

Q, K and V are one product with the three weights side by side; their names stay as they are, and
so do checkpoints. Documents that are read as if each stood alone are sequences of their own to
FlashAttention, in half precision: what a mask would hide is not computed. Elsewhere a mask is used.
`tests/model/test_cuda_attention.py` compares it with the decoder's own.

Shapes: B sequences, T tokens, C = d_model, H heads of width D = C / H, S keys.
"""

import contextlib
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.transformer_full import MultiHeadAttention, TransformerDecoder, document_mask

# What PyTorch may take, the first that can: cuDNN's kernel is the faster one on Hopper,
# in half precision. It makes a plan for each new shape, which takes longer than it saves there.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def use_cuda_attention(model: TransformerDecoder, cudnn: bool, merged: bool = True):
    """Has the layers of a decoder attend this way. cudnn: by cuDNN where it can.

    merged: Q, K and V in one product. Its weights, side by side, are a copy that the backward pass
    keeps, which weights that are gathered layer by layer must not leave behind.
    """
    for layer in model.layers:
        attention = cast(MultiHeadAttention, layer.get_submodule("self_attn"))
        attention.forward = partial(forward, attention, cudnn, merged)
    model.document_mask = partial(mask_documents, model)


class Documents(NamedTuple):
    """Takes a mask's place: where each document begins in the flattened batch, (N + 1,) int32."""

    borders: torch.Tensor


def mask_documents(
    model: TransformerDecoder, documents: torch.Tensor, positions: torch.Tensor
) -> "Documents | torch.Tensor":
    """What the layers' attention takes: documents by their borders, or a mask (B, 1, T, T)."""
    if has_kernel(model, documents.device):
        return Documents(documents)
    return document_mask(documents, positions)


def has_kernel(model: TransformerDecoder, device: torch.device) -> bool:
    """Whether FlashAttention takes sequences of these heads, in this precision, on this GPU."""
    D = model.config.d_model // model.config.n_heads
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.is_autocast_enabled("cuda")
        and not (model.training and model.config.attention_dropout)
        and D % 8 == 0
        and D <= 256
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


def prefers_cudnn(device: torch.device, fixed_shapes: bool) -> bool:
    """Whether cuDNN's attention is the faster one: on Hopper, for one shape."""
    return (
        device.type == "cuda"
        and fixed_shapes
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device)[0] == 9
        and not torch.are_deterministic_algorithms_enabled()  # which it is not
    )


def forward(attention: MultiHeadAttention, cudnn: bool, merged: bool, x, mask=None, cache=None):
    """`MultiHeadAttention.forward` of `attention`: (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    linears = attention.W_q, attention.W_k, attention.W_v
    if merged:
        weight = torch.cat([linear.weight for linear in linears])  # (3 C, C)
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias for linear in linears])
        QKV = F.linear(x, weight, bias).view(B, T, 3, attention.n_heads, -1)
        if isinstance(mask, Documents):
            Q, K, V = QKV.unbind(2)  # (B, T, H, D)
            return attention.W_o(attend_alone(Q, K, V, mask))
        Q, K, V = QKV.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D)
    elif isinstance(mask, Documents):
        Q, K, V = (W(x).view(B, T, attention.n_heads, -1) for W in linears)
        return attention.W_o(attend_alone(Q, K, V, mask))
    else:
        Q, K, V = (W(x).view(B, T, attention.n_heads, -1).transpose(1, 2) for W in linears)
    if cache is not None:
        K, V = cache.extend(K, V)  # (B, H, S, D)
    dropout = attention.dropout if attention.training else 0.0
    causal = mask is None and (cache is None or T > 1)
    fixed = cudnn and mask is None and cache is None
    with sdpa_kernel(CUDNN_FIRST, set_priority=True) if fixed else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(Q, K, V, mask, dropout, is_causal=causal)
    return attention.W_o(y.transpose(1, 2).reshape(B, T, C))


def attend_alone(Q, K, V, documents: Documents) -> torch.Tensor:
    """Causal attention in each document: (B, T, H, D) -> (B, T, C). In half precision alone."""
    from torch.nn.attention.varlen import varlen_attn  # here, because it takes a second

    B, T, _, _ = Q.shape
    q, k, v = (x.flatten(0, 1) for x in (Q, K, V))  # (B T, H, D)
    borders, causal = documents.borders, (-1, 0)  # any number of keys before a query, none after
    y = varlen_attn(q, k, v, borders, borders, T, T, window_size=causal)
    return cast(torch.Tensor, y).reshape(B, T, -1)
