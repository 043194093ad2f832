"""One decode step on a CPU, put together by hand from a decoder's weights.

    step = DecodeStep(model)        # while the weights stay as they are
    logits = step(ids, cache)       # (B, 1) -> (B, V), as model(ids, cache=cache)[:, -1]

With one token a row a step is bound by reading the weights, and by the calls between products. So
the weights are laid out as oneDNN reads them fastest, and Q, K and V are one product. Attention is
in float32 in any case: its kernel is many times slower in bfloat16.

Shapes: B rows, L layers, H heads of width D, C = H D, S keys, V = vocab_size.
"""

import torch
import torch.nn.functional as F

ROWS = 16  # whose layout is asked for: it is the fastest from 1 row to 32, that for 1 row is not
CACHE = torch.float32  # what a KVCache for a DecodeStep stores


def suits(model) -> bool:
    """Whether a DecodeStep can stand in for the module: on a CPU, in float32 or bfloat16.

    In float64 a row must give the same in any batch, which the module's plain products do. Under
    autocast the module decides what is narrowed.
    """
    weight = model.embed.weight
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native())


class Product:
    """x W^T + b of one linear layer, or of several side by side, from a packed copy of W."""

    def __init__(self, *linears):
        weight, self.bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            weight = torch.cat([linear.weight for linear in linears])
            self.bias = None if self.bias is None else torch.cat([m.bias for m in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.product = torch.ops.mkldnn._linear_pointwise.default  # here: not every build has it

    def __call__(self, x):
        # oneDNN could add a residual or apply ReLU as well, but setting that up takes longer
        return self.product(x, self.weight, self.bias, "none", [], "")


class StepLayer:
    """`DecoderLayer` for one token a row."""

    def __init__(self, layer):
        attention, feed_forward = layer.self_attn, layer.feed_forward
        self.norm_first, self.n_heads = layer.norm_first, attention.n_heads
        self.qkv = Product(attention.W_q, attention.W_k, attention.W_v)
        self.out = Product(attention.W_o)
        self.up, self.down = Product(feed_forward.linear1), Product(feed_forward.linear2)
        relu = isinstance(feed_forward.activation, torch.nn.ReLU)
        self.activation = torch.relu_ if relu else feed_forward.activation.forward
        self.norm1, self.norm2 = layer.norm1.forward, layer.norm2.forward

    def attend(self, x, mask, cache):
        """Attention and its output projection: (B, C) -> (B, C)."""
        qkv = self.qkv(x).to(CACHE).view(len(x), 3, self.n_heads, 1, -1)
        Q, K, V = qkv.unbind(1)  # (B, H, 1, D)
        K, V = cache.extend(K, V)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(Q, K, V, mask)
        return self.out(y.reshape(x.shape).type_as(x))

    def feed_forward(self, x):
        return self.down(self.activation(self.up(x)))

    def __call__(self, x, mask, cache):
        if self.norm_first:
            x = self.attend(self.norm1(x), mask, cache).add_(x)
            return self.feed_forward(self.norm2(x)).add_(x)
        x = self.norm1(self.attend(x, mask, cache).add_(x))
        return self.norm2(self.feed_forward(x).add_(x))


class DecodeStep:
    """A decoder that reads one token of each row. Holds a second copy of all weights it multiplies.

    The copy is of the weights as they are now: make a new one when they have changed.
    """

    def __init__(self, model):
        self.embed, self.positions = model.embed.weight, model.pos_encoding
        self.scale = model.embedding_scale
        self.embed_norm, self.final_norm = model.embed_norm.forward, model.final_norm.forward
        self.layers = [StepLayer(layer) for layer in model.layers]
        self.output = Product(model.output)

    def __call__(self, ids, cache):
        """Logits (B, V) after `ids` (B, 1), which follow on what the KVCache has seen."""
        table = cache.take(self.positions, 1)  # (1, C) or (B, 1, C)
        x = F.embedding(ids, self.embed) * self.scale + table  # (B, 1, C)
        x = self.embed_norm(x[:, 0])
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, cache.mask, layer_cache)
        return self.output(self.final_norm(x))
