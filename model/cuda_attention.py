"""`MultiHeadAttention` as a GPU computes it fastest: the same numbers in fewer, larger calls.

    use_cuda_attention(model, cudnn=True)     # after model.to("cuda")

Q, K and V are one product with the three weights side by side; their names stay as they are, and
so do checkpoints. `tests/model/test_cuda_attention.py` compares it with the decoder's own.

Shapes: B sequences, T tokens, C = d_model, H heads of width D = C / H, S keys.
"""

import contextlib
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.transformer_full import MultiHeadAttention, TransformerDecoder

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
        Q, K, V = QKV.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D)
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
