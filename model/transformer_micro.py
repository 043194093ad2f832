"""The decoder in plain Python: to see every number. Standard library only.

    model = TransformerDecoderMicro(vocab_size=27, d_model=16, n_heads=4, n_layers=1)
    logits = model(ids)                                        # T ids -> T vectors of vocab_size
    model = TransformerDecoderMicro.from_checkpoint("runs/my-run")

Read it beside `transformer_full.py` (PyTorch) and `transformer_lite.py` (NumPy): the same classes
in the same order, with the same numbers at the same steps. It reads one sequence at a time, a list
of vectors, whose operations and their derivatives are in `torchmicro/vector.py`.

Shapes: T tokens, C = d_model, H heads of width D = C / H, S keys, V = vocab_size.
"""

import math
from dataclasses import asdict
from functools import partial
from itertools import compress, pairwise
from random import Random

from checkpoint.reader import Checkpoint
from common.errors import UserError
from generation import sampling, sequential
from model.config import ModelConfig, read_model_config
from torchmicro import nn as nn
from torchmicro.scalar import ScalarVector
from torchmicro.vector import Tape, Vector, concat


def create_positional_encoding(max_len: int, d_model: int) -> list[list[float]]:
    """The sinusoidal table (max_len, d_model). Vaswani et al. (2017), section 3.5.

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(the same).
    """
    frequency = [10000.0 ** (-i / d_model) for i in range(0, d_model, 2)]
    waves = (math.sin, math.cos)
    return [[wave(pos * f) for f in frequency for wave in waves] for pos in range(max_len)]


def create_norm(config: ModelConfig, vector) -> nn.Module:
    """LayerNorm with weight and bias, RMSNorm without weights, or nothing."""
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, config.norm_eps, vector)
    if config.norm == "rms":
        return nn.RMSNorm(config.norm_eps)
    return nn.Identity()


def document_positions(documents: list[int]) -> list[int]:
    """The place of each token in its document, where these begin and the last one ends."""
    return [place for begin, end in pairwise(documents) for place in range(end - begin)]


def document_mask(positions: list[int]) -> list[list[bool]]:
    """Where each token may look: in its document, up to itself."""
    return [
        [t - position <= s <= t for s in range(len(positions))]
        for t, position in enumerate(positions)
    ]


def attention(Q, K, V, mask, dropout):
    """softmax(Q K^T / sqrt(D)) V in one head, (T, D). Vaswani et al. (2017), equation 1."""
    T, S, scale = len(Q), len(K), len(Q[0]) ** -0.5
    if mask is None:  # causal: the queries are the last T of S; what a row does not name is hidden
        mask = [[True] * (S - T + t + 1) for t in range(T)]
    # how well each key fits each query, among those that it may look at
    scores = [q.dots(list(compress(K, row)), scale=scale) for q, row in zip(Q, mask, strict=True)]
    weights = dropout([row.softmax() for row in scores])  # each row adds up to 1
    return [w.mix(list(compress(V, row))) for w, row in zip(weights, mask, strict=True)]


class MultiHeadAttention(nn.Module):
    """Causal self-attention in several heads at once. Vaswani et al., 3.2.2."""

    def __init__(self, config: ModelConfig, vector, random):
        self.n_heads = config.n_heads
        self.dropout = nn.Dropout(config.attention_dropout, random)
        self.W_q = nn.Linear(config.d_model, config.d_model, config.bias, vector)
        self.W_k = nn.Linear(config.d_model, config.d_model, config.bias, vector)
        self.W_v = nn.Linear(config.d_model, config.d_model, config.bias, vector)
        self.W_o = nn.Linear(config.d_model, config.d_model, config.bias, vector)

    def forward(self, x, mask=None, cache=None):
        # (1) three projections, cut into heads
        Q = self.heads(self.W_q(x))  # (H, T, D)
        K = self.heads(self.W_k(x))  # (H, T, D)
        V = self.heads(self.W_v(x))  # (H, T, D)
        if cache is not None:
            K, V = cache.extend(K, V)  # (H, S, D)
        # (2) every query weighs the keys up to its own place: a lone query sees all it is given
        y = [attention(*head, mask, self.dropout) for head in zip(Q, K, V, strict=True)]
        # (3) heads side by side again, and the output projection
        return self.W_o([concat(parts) for parts in zip(*y, strict=True)])

    def heads(self, x):
        """(T, C) -> (H, T, D)."""
        D = len(x[0]) // self.n_heads
        return [[t.part(h * D, (h + 1) * D) for t in x] for h in range(self.n_heads)]


class FeedForward(nn.Module):
    """Two linear layers with a non-linearity between, at each position. Vaswani et al., 3.3."""

    def __init__(self, config: ModelConfig, vector):
        self.linear1 = nn.Linear(config.d_model, config.d_ff, config.bias, vector)
        self.linear2 = nn.Linear(config.d_ff, config.d_model, config.bias, vector)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU()

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout, a residual path and a norm."""

    def __init__(self, config: ModelConfig, vector, random):
        self.norm_first = config.norm_first
        self.self_attn = MultiHeadAttention(config, vector, random)
        self.feed_forward = FeedForward(config, vector)
        self.norm1 = create_norm(config, vector)
        self.norm2 = create_norm(config, vector)
        self.dropout1 = nn.Dropout(config.dropout, random)
        self.dropout2 = nn.Dropout(config.dropout, random)

    def forward(self, x, mask=None, cache=None):
        if self.norm_first:  # (4) pre-norm: the residual path runs through untouched
            x = nn.added(x, self.dropout1(self.self_attn(self.norm1(x), mask, cache)))
            return nn.added(x, self.dropout2(self.feed_forward(self.norm2(x))))
        # (5) post-norm: the sum is normalised
        x = self.norm1(nn.added(x, self.dropout1(self.self_attn(x, mask, cache))))
        return self.norm2(nn.added(x, self.dropout2(self.feed_forward(x))))


class TransformerDecoderMicro(nn.Module):
    """A decoder-only transformer. Further options are the fields of `ModelConfig`.

    unfused: each + and * is a record on the tape, instead of each operation on a vector.
    seed: of the initial weights and of dropout (`model.random`).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 16,
        n_heads: int = 4,
        n_layers: int = 1,
        d_ff: int = 64,
        dropout: float = 0.0,
        max_len: int = 16,
        *,
        unfused: bool = False,
        seed: int = 0,
        **options,
    ):
        config = ModelConfig(
            vocab_size, d_model, n_heads, n_layers, d_ff, max_len, dropout, **options
        )
        if config.vocab_size == 0:
            raise UserError("model.vocab_size = 0 must be at least 1")
        self.config = config
        self.max_len = config.max_len
        self.tape, self.random = Tape(), Random(seed)  # noqa: S311, not for secrets
        vector = partial(ScalarVector if unfused else Vector, tape=self.tape)
        self.embedding_scale = math.sqrt(d_model) if config.scale_embedding else 1.0
        self.embed = nn.Embedding(vocab_size, d_model, vector)
        if config.positions == "learned":
            self.pos_encoding = nn.Parameter(vector, max_len, d_model)
        else:  # it is given gradients too, which nobody reads
            self.pos_encoding = list(map(vector, create_positional_encoding(max_len, d_model)))
        self.embed_norm = create_norm(config, vector) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout, self.random)
        layers = (DecoderLayer(config, vector, self.random) for _ in range(n_layers))
        self.layers = nn.ModuleList(layers)
        self.final_norm = create_norm(config, vector) if config.final_norm else nn.Identity()
        bias = config.bias and not config.tie_embeddings
        self.output = nn.Linear(d_model, vocab_size, bias, vector)
        self.init_weights()
        if config.tie_embeddings:
            self.output.weight = self.embed.weight

    def init_weights(self):
        """As in `transformer_full`."""
        for name, parameter in self.named_parameters():
            if len(parameter.shape) == 2:
                scaled = self.config.norm_first and name.endswith(("W_o.weight", "linear2.weight"))
                std = self.config.init_std / (math.sqrt(2 * len(self.layers)) if scaled else 1.0)
                for row in parameter:
                    row.data = [self.random.gauss(0.0, std) for _ in row.data]

    def forward(self, ids, mask=None, target_indices=None, cache=None, documents=None):
        """Logits of the next token at each place of `ids`, a list of T: T vectors of V floats.

        mask: None for causal; else T lists of S booleans: where each token may look, at least one.
        target_indices: indices of the places where logits are wanted.
        cache: of `new_cache`; the ids then follow on those it has seen. No gradients.
        documents: the places where documents begin that are read as if each stood alone, and T
        last. None: one.
        """
        x = self.hidden(ids, mask, cache, documents)
        if target_indices is not None:
            x = [x[t] for t in target_indices]
        return self.output(x)  # (8) one score for each token of the vocabulary

    def hidden(self, ids, mask=None, cache=None, documents=None):
        """What the output projection reads: T ids -> (T, C). Arguments as in `forward`."""
        start = 0 if cache is None else cache.length
        stop = start + len(ids)
        if stop > self.max_len:
            raise UserError(
                f"{stop} tokens are more than model.max_len = {self.max_len}; shorten the text"
            )
        # (6) token embedding plus position
        x = [token * self.embedding_scale for token in self.embed(ids)]  # (T, C)
        positions = range(start, stop)
        if documents is not None:
            positions = document_positions(documents)
            mask = document_mask(positions)
        x = nn.added(x, [self.pos_encoding[position] for position in positions])
        x = self.dropout(self.embed_norm(x))
        # (7) the layers, one after another
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, cache.layers[i] if cache else None)
        return self.final_norm(x)

    def num_parameters(self) -> int:
        """Trained numbers; a tied matrix counts once, the sinusoidal table not at all."""
        return sum(map(len, self.parameters()))

    def new_cache(self) -> nn.KVCache:
        """An empty cache for `next_logits`."""
        return nn.KVCache(len(self.layers), self.config.n_heads)

    def next_logits(self, cache: nn.KVCache, ids: list[int]) -> list[float]:
        """The logits (V) after `ids`, which follow on what the cache has seen."""
        with self.tape.paused():
            return self.forward(ids, target_indices=[-1], cache=cache)[0].data

    def generate(self, tokens, start_id=2, end_id=3, max_len=64, temperature=1.0, top_k=50, seed=0):
        """Ids that follow `tokens` and `start_id`, as in `transformer_full`."""
        prompt = sequential.ids_of(tokens) + ([] if start_id is None else [start_id])
        rules = sampling.Sampling(temperature, top_k, max_new_tokens=max_len)
        return sequential.generate(self, [prompt], rules, seed=seed, end_id=end_id)[0]

    def load_weights(self, arrays):
        """Copies nested lists or arrays by parameter name (a tied matrix once) into this model."""
        own = dict(self.named_parameters())
        lists = {name: a.tolist() if hasattr(a, "tolist") else a for name, a in arrays.items()}
        wrong = [f"{name} is missing" for name in sorted(own.keys() - lists.keys())]
        wrong += [f"the model has no {name}" for name in sorted(lists.keys() - own.keys())]
        for name in sorted(own.keys() & lists.keys()):
            if not own[name].fits(lists[name]):
                wrong.append(f"{name} does not have the shape {own[name].shape}")
        if wrong:
            raise UserError(
                f"model.safetensors: {', '.join(wrong[:3])}; use weights of a model with the same "
                "config.json"
            )
        for name, parameter in own.items():
            parameter.load(lists[name])

    @classmethod
    def from_config(cls, config: ModelConfig, unfused=False, seed=0):
        """A freshly initialised decoder of this shape."""
        return cls(**asdict(config), unfused=unfused, seed=seed)

    @classmethod
    def from_checkpoint(cls, path) -> "TransformerDecoderMicro":
        """The decoder of a checkpoint, or of a run (its best step). Raises CheckpointError."""
        checkpoint = Checkpoint.find(path)
        model = cls.from_config(read_model_config(checkpoint))
        model.load_weights(checkpoint.lists("model.safetensors"))
        return model.eval()
