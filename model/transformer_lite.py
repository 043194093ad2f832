"""The decoder in NumPy, on TorchLite: to see every operation, forward and backward.

    model = TransformerDecoderLite(vocab_size=9500, d_model=128, n_heads=4, n_layers=3)
    logits = model(ids)                                        # (B, T) -> (B, T, vocab_size)
    model = TransformerDecoderLite.from_checkpoint("runs/my-run")

Read it beside `transformer_full.py` and `transformer_micro.py`: same classes, order and numbers.

Shapes: B sequences, T tokens, C = d_model, H heads of width D = C / H, S keys, V = vocab_size.
"""

import math
from dataclasses import asdict

import numpy as np

from checkpoint.reader import Checkpoint, check_fit
from common.errors import UserError
from generation import sampling, sequential
from model.config import ModelConfig, read_model_config
from torchlite import functional as F
from torchlite import nn
from torchlite.tensor import default_dtype, no_grad, record


def create_positional_encoding(max_len: int, d_model: int) -> np.ndarray:
    """The sinusoidal table (max_len, d_model) in float64. Vaswani et al. (2017), section 3.5.

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(the same).
    """
    position = np.arange(max_len, dtype=np.float64)[:, None]
    frequency = 10000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    table = np.empty((max_len, d_model))
    table[:, 0::2] = np.sin(position * frequency)
    table[:, 1::2] = np.cos(position * frequency)
    return table


def create_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm with weight and bias, RMSNorm without weights, or nothing."""
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps)
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps, elementwise_affine=False)
    return nn.Identity()


def document_positions(documents: np.ndarray, B: int, T: int) -> np.ndarray:
    """The place (B, T) of each token in its document, where these begin at flat places (D + 1,)."""
    place = np.arange(B * T)
    begins = documents[np.searchsorted(documents, place, side="right") - 1]
    return (place - begins).reshape(B, T)


def document_mask(positions: np.ndarray) -> np.ndarray:
    """Block-diagonal and causal: (B, 1, T, T), True where a token may look, in its document."""
    place = np.arange(positions.shape[1])
    keys, queries, begins = place, place[:, None], (place - positions)[:, :, None]
    return ((begins <= keys) & (keys <= queries))[:, None]


def attention(Q, K, V, mask, dropout, causal):
    """softmax(Q K^T / sqrt(D)) V in each head, (B, H, T, D). Vaswani et al. (2017), equation 1.

    All of it is one entry on the tape: the way forward, and then the way back.
    """
    q, k, v, scale = Q.data, K.data, V.data, Q.shape[-1] ** -0.5
    scores = (q * scale) @ k.swapaxes(-1, -2)  # (B, H, T, S): how well each key fits each query
    if causal:
        mask = F.causal_mask(q.shape[2], k.shape[2], q.dtype)
    if mask is not None:
        scores = scores + F.additive(mask, q.dtype)  # -inf where a query may not look
    scores -= scores.max(-1, keepdims=True)
    weights = np.exp(scores, out=scores)
    weights /= weights.sum(-1, keepdims=True)  # each row adds up to 1
    kept = F.dropout_mask(weights, dropout, nn.generator)
    used = weights if kept is None else weights * kept

    def backward(g):
        dV = used.swapaxes(-1, -2) @ g
        dused = g @ v.swapaxes(-1, -2)
        dweights = dused if kept is None else dused * kept
        # through the softmax, whose Jacobian is diag(w) - w w^T in each row
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
        return dscores @ k, dscores.swapaxes(-1, -2) @ q, dV

    return record(used @ v, (Q, K, V), backward)


class MultiHeadAttention(nn.Module):
    """Causal self-attention in several heads at once. Vaswani et al., 3.2.2."""

    def __init__(self, config: ModelConfig):
        self.n_heads = config.n_heads
        self.dropout = config.attention_dropout
        self.W_q = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.W_k = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.W_v = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.W_o = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        # (1) three projections, cut into heads
        Q = self.W_q(x).reshape(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        K = self.W_k(x).reshape(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        V = self.W_v(x).reshape(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            K, V = cache.extend(K, V)  # (B, H, S, D)
        # (2) every query weighs the keys up to its own place: a lone query sees all it is given
        dropout = self.dropout if self.training else 0.0
        y = attention(Q, K, V, mask, dropout, causal=mask is None and T > 1)
        # (3) heads side by side again, and the output projection
        return self.W_o(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with a non-linearity between, at each position. Vaswani et al., 3.3."""

    def __init__(self, config: ModelConfig):
        self.linear1 = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.linear2 = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU()

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout, a residual path and a norm."""

    def __init__(self, config: ModelConfig):
        self.norm_first = config.norm_first
        self.self_attn = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.norm1 = create_norm(config)
        self.norm2 = create_norm(config)
        self.dropout1 = nn.Dropout(config.dropout)
        self.dropout2 = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        if self.norm_first:  # (4) pre-norm: the residual path runs through untouched
            x = x + self.dropout1(self.self_attn(self.norm1(x), mask, cache))
            return x + self.dropout2(self.feed_forward(self.norm2(x)))
        # (5) post-norm: the sum is normalised
        x = self.norm1(x + self.dropout1(self.self_attn(x, mask, cache)))
        return self.norm2(x + self.dropout2(self.feed_forward(x)))


class TransformerDecoderLite(nn.Module):
    """A decoder-only transformer. Further options are the fields of `ModelConfig`."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        n_heads: int = 4,
        n_layers: int = 3,
        d_ff: int = 1024,
        dropout: float = 0.1,
        max_len: int = 128,
        **options,
    ):
        config = ModelConfig(
            vocab_size, d_model, n_heads, n_layers, d_ff, max_len, dropout, **options
        )
        if config.vocab_size == 0:
            raise UserError("model.vocab_size = 0 must be at least 1")
        self.config = config
        self.max_len = config.max_len
        self.embedding_scale = math.sqrt(d_model) if config.scale_embedding else 1.0
        self.embed = nn.Embedding(vocab_size, d_model)
        if config.positions == "learned":
            self.pos_encoding = nn.Parameter(np.zeros((max_len, d_model)))
        else:
            self.pos_encoding = nn.buffer(create_positional_encoding(max_len, d_model))
        self.embed_norm = create_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.layers = [DecoderLayer(config) for _ in range(n_layers)]
        self.final_norm = create_norm(config) if config.final_norm else nn.Identity()
        self.output = nn.Linear(d_model, vocab_size, bias=config.bias and not config.tie_embeddings)
        self.init_weights()
        if config.tie_embeddings:
            self.output.weight = self.embed.weight

    def init_weights(self):
        """As in `transformer_full`."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scaled = self.config.norm_first and name.endswith(("W_o.weight", "linear2.weight"))
                std = self.config.init_std / (math.sqrt(2 * len(self.layers)) if scaled else 1.0)
                parameter.data[...] = nn.generator.normal(0.0, std, parameter.shape)
            elif name.endswith("bias"):
                parameter.data[...] = 0.0

    def forward(self, ids, mask=None, target_indices=None, cache=None, documents=None):
        """Logits (B, T, V) of the next token at each place of `ids` (B, T), integers.

        mask: None for causal; else True where a query may look, or numbers added to the scores.
        target_indices: flat indices (N,) into B x T where logits are wanted: they come as (N, V).
        cache: an `nn.KVCache`; the ids then follow on those it has seen. No gradients.
        documents: flat places (D + 1,) where documents begin that are read as if each stood alone,
        and B T last; each row begins one. None: a row is one.
        """
        x = self.hidden(ids, mask, cache, documents)
        if target_indices is not None:
            x = x.reshape(-1, self.config.d_model)[target_indices]  # (N, C)
        return self.output(x)  # (8) one score for each token of the vocabulary

    def hidden(self, ids, mask=None, cache=None, documents=None):
        """What the output projection reads: (B, T) -> (B, T, C). Arguments as in `forward`."""
        start = 0 if cache is None else cache.length
        stop = start + ids.shape[1]
        if stop > self.max_len:
            raise UserError(
                f"{stop} tokens are more than model.max_len = {self.max_len}; shorten the text"
            )
        # (6) token embedding plus position
        table = self.pos_encoding[start:stop]  # (T, C)
        if documents is not None:
            positions = document_positions(documents, *ids.shape)
            table, mask = self.pos_encoding[positions], document_mask(positions)  # (B, T, C)
        x = self.embed(ids) * self.embedding_scale + table  # (B, T, C)
        x = self.dropout(self.embed_norm(x))
        # (7) the layers, one after another
        layer_caches = [None] * len(self.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = layer(x, mask, layer_cache)
        return self.final_norm(x)

    def num_parameters(self) -> int:
        """Trained numbers; a tied matrix counts once, the sinusoidal table not at all."""
        return sum(p.data.size for p in self.parameters())

    def new_cache(self) -> nn.KVCache:
        """An empty cache for `next_logits`."""
        return nn.KVCache(len(self.layers))

    def next_logits(self, cache: nn.KVCache, ids: list[int]) -> list[float]:
        """The logits (V) after `ids`, which follow on what the cache has seen."""
        with no_grad(), np.errstate(over="ignore", invalid="ignore"):  # generate() checks them
            return self(np.array([ids]), target_indices=[-1], cache=cache).data[0].tolist()

    def generate(self, tokens, start_id=2, end_id=3, max_len=64, temperature=1.0, top_k=50, seed=0):
        """Ids that follow `tokens` and `start_id`, as in `transformer_full`."""
        prompt = sequential.ids_of(tokens) + ([] if start_id is None else [start_id])
        rules = sampling.Sampling(temperature, top_k, max_new_tokens=max_len)
        return sequential.generate(self, [prompt], rules, seed=seed, end_id=end_id)[0]

    def load_weights(self, arrays):
        """Copies arrays by parameter name (a tied matrix once) into this model."""
        own = dict(self.named_parameters())
        check_fit(own, arrays)
        for name, parameter in own.items():
            parameter.data[...] = arrays[name]

    @classmethod
    def from_config(cls, config: ModelConfig, dtype="float32") -> "TransformerDecoderLite":
        """A freshly initialised decoder of this shape."""
        with default_dtype(dtype):
            return cls(**asdict(config))

    @classmethod
    def from_checkpoint(cls, path, dtype="float32") -> "TransformerDecoderLite":
        """The decoder of a checkpoint, or of a run (its best step). Raises CheckpointError."""
        checkpoint = Checkpoint.find(path)
        model = cls.from_config(read_model_config(checkpoint), dtype)
        model.load_weights(checkpoint.tensors("model.safetensors"))
        return model.eval()
