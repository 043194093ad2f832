"""The PyTorch decoder reading one token a row on a CPU, as fast as it can.

    decoder = CPUDecoder(model)        # while the weights stay as they are
    logits = decoder(ids, cache)       # (B, 1) -> (B, V), as model(ids, cache=cache)[:, -1]

With one token a row a step is bound by reading the weights, and by the calls between products. So
the weights are laid out as oneDNN reads them fastest, and Q, K and V are one product. What comes
after what is the model's own `DecoderLayer.forward`: only its parts are replaced. Attention is in
float32 in any case: its kernel is many times slower in bfloat16.

Shapes: B rows, L layers, H heads of width D, C = H D, S keys, V = vocab_size.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from generation.kv_cache import CachedModel, KVCache, LayerCache

LAYOUT_ROWS = 16  # the layout asked for: the fastest from 1 row to 32, which that for 1 row is not
CACHE_DTYPE = torch.float32  # what a KVCache for a CPUDecoder stores


class Attention(Protocol):
    """What is asked here of a `MultiHeadAttention`."""

    n_heads: int
    W_q: nn.Linear
    W_k: nn.Linear
    W_v: nn.Linear
    W_o: nn.Linear


class FeedForward(Protocol):
    """What is asked here of a `FeedForward`."""

    linear1: nn.Linear
    linear2: nn.Linear
    activation: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


class Layer(Protocol):
    """What is asked here of a `DecoderLayer`."""

    norm_first: bool
    self_attn: Attention
    feed_forward: FeedForward
    norm1: nn.Module
    norm2: nn.Module

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache
    ) -> torch.Tensor: ...


class Decoder(CachedModel, Protocol):
    """What is asked here of a `TransformerDecoder`; its layers are as `Layer` says."""

    training: bool

    @property
    def pos_encoding(self) -> torch.Tensor: ...
    @property
    def embedding_scale(self) -> float: ...
    @property
    def embed_norm(self) -> nn.Module: ...
    @property
    def final_norm(self) -> nn.Module: ...
    @property
    def layers(self) -> nn.ModuleList: ...
    @property
    def output(self) -> nn.Linear: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def is_supported(model: CachedModel) -> bool:
    """Whether a CPUDecoder can stand in for the module: on a CPU, in float32 or bfloat16.

    In float64 a row must give the same in any batch, which the module's plain products do. Under
    autocast the module decides what is computed in low precision.
    """
    weight = model.embed.weight
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bf16())


class PackedLinear:
    """x W^T + b of one linear layer, or of several side by side, from a packed copy of W."""

    def __init__(self, *linears: nn.Linear):
        weight, self.bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            weight = torch.cat([linear.weight for linear in linears])
            if self.bias is not None:
                self.bias = torch.cat([linear.bias for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LAYOUT_ROWS)
        self.product = torch.ops.mkldnn._linear_pointwise.default  # here: not every build has it

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # oneDNN could add a residual or apply ReLU as well, but setting that up takes longer
        return self.product(x, self.weight, self.bias, "none", [], "")


class PackedAttention:
    """`MultiHeadAttention` for one token a row."""

    def __init__(self, attention: Attention):
        self.n_heads = attention.n_heads
        self.qkv = PackedLinear(attention.W_q, attention.W_k, attention.W_v)
        self.output = PackedLinear(attention.W_o)

    def __call__(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: LayerCache
    ) -> torch.Tensor:
        qkv = self.qkv(x).to(CACHE_DTYPE).view(len(x), 3, self.n_heads, 1, -1)
        Q, K, V = qkv.unbind(1)  # (B, H, 1, D)
        K, V = cache.extend(K, V)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(Q, K, V, mask)
        return self.output(y.reshape(x.shape).type_as(x))


class PackedFeedForward:
    """`FeedForward`."""

    def __init__(self, feed_forward: FeedForward):
        self.linear1 = PackedLinear(feed_forward.linear1)
        self.linear2 = PackedLinear(feed_forward.linear2)
        relu = isinstance(feed_forward.activation, nn.ReLU)
        self.activation = torch.relu_ if relu else feed_forward.activation.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.activation(self.linear1(x)))


class OneTokenLayer:
    """`DecoderLayer`, whose forward pass runs on the parts given: (B, C) -> (B, C)."""

    def __init__(self, layer: Layer, self_attn: Callable, feed_forward: Callable):
        self.norm_first = layer.norm_first
        self.self_attn, self.feed_forward = self_attn, feed_forward
        self.norm1, self.norm2 = layer.norm1.forward, layer.norm2.forward
        self.dropout1 = self.dropout2 = unchanged
        self.layer_forward: Callable[..., torch.Tensor] = type(layer).forward

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None, cache) -> torch.Tensor:
        return self.layer_forward(self, x, mask, cache)


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """Dropout while generating."""
    return x


class CPUDecoder:
    """A decoder that reads one token of each row. Holds a second copy of all weights it multiplies.

    The copy is of the weights as they are now: make a new one when they have changed.
    """

    def __init__(self, model: Decoder):
        self.embed, self.positions = model.embed.weight, model.pos_encoding
        self.scale = model.embedding_scale
        self.embed_norm, self.final_norm = model.embed_norm.forward, model.final_norm.forward
        layers = [cast(Layer, layer) for layer in model.layers]
        self.layers = [
            OneTokenLayer(
                layer, PackedAttention(layer.self_attn), PackedFeedForward(layer.feed_forward)
            )
            for layer in layers
        ]
        self.output = PackedLinear(model.output)

    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after `ids` (B, 1), which follow on what the KVCache has seen."""
        table = cache.reserve(self.positions, 1)  # (1, C) or (B, 1, C)
        x = F.embedding(ids, self.embed) * self.scale + table  # (B, 1, C)
        x = self.embed_norm(x[:, 0])
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, cache.mask, layer_cache)
        return self.output(self.final_norm(x))
