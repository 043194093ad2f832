"""The decoder in PyTorch: an `nn.Module` for training on CPU or CUDA.

    model = TransformerDecoder(vocab_size=9500, d_model=256, n_heads=4, n_layers=6)
    logits = model(ids)                                        # (B, T) -> (B, T, vocab_size)
    model = TransformerDecoder.from_checkpoint("runs/my-run")  # in a notebook

Read it beside `transformer_lite.py` and `transformer_micro.py`: same classes, order and numbers.
Whoever changes attention, feed-forward or positions changes `cpu_decoder.py` and `cuda_decoder.py`
of `generation/` as well, which have them for one token a row, and `cpu_layers.py` and
`cuda_attention.py` here; the tests of these compare them with this.

Shapes: B sequences, T tokens, C = d_model, H heads of width D = C / H, S keys, V = vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from checkpoint.reader import Checkpoint, check_fit
from common.errors import UserError
from generation import batched, sampling, sequential
from model.bf16_attention import bf16_attention
from model.config import ModelConfig, read_model_config


def create_positional_encoding(max_len: int, d_model: int) -> torch.Tensor:
    """The sinusoidal table (max_len, d_model) in float64. Vaswani et al. (2017), section 3.5.

    PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) = cos(the same).
    """
    position = torch.arange(max_len, dtype=torch.float64)[:, None]
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    table = torch.empty(max_len, d_model, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


def create_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm with weight and bias, RMSNorm without weights, or nothing."""
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps)
    if config.norm == "rms":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps, elementwise_affine=False)
    return nn.Identity()


def document_positions(documents: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """The place (B, T) of each token in its document, where these begin at flat places (D + 1,)."""
    place = torch.arange(B * T, dtype=documents.dtype, device=documents.device)
    begins = documents[torch.searchsorted(documents, place, right=True) - 1]
    return (place - begins).view(B, T).long()


def document_mask(documents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Block-diagonal and causal: (B, 1, T, T), True where a token may look, in its document."""
    place = torch.arange(positions.shape[1], device=positions.device)
    keys, queries, begins = place, place[:, None], (place - positions)[:, :, None]
    return ((begins <= keys) & (keys <= queries))[:, None]


def attention(Q, K, V, mask, dropout, causal):
    """softmax(Q K^T / sqrt(D)) V in each head, (B, H, T, D). Vaswani et al. (2017), equation 1."""
    if Q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return bf16_attention(Q, K, V, mask, dropout, causal)  # the same, faster there
    return F.scaled_dot_product_attention(Q, K, V, mask, dropout, is_causal=causal)


class MultiHeadAttention(nn.Module):
    """Causal self-attention in several heads at once. Vaswani et al., 3.2.2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
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
        # (2) every query weighs the keys up to its own place; one that follows on a cache sees all
        dropout = self.dropout if self.training else 0.0
        y = attention(Q, K, V, mask, dropout, causal=mask is None and (cache is None or T > 1))
        # (3) heads side by side again, and the output projection
        return self.W_o(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two linear layers with a non-linearity between, at each position. Vaswani et al., 3.3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.linear2 = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU("tanh")

    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout, a residual path and a norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
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


class NothingDrawn(TorchFunctionMode):
    """Where what torch.nn would fill with random numbers stays as it was allocated."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class TransformerDecoder(nn.Module):
    """A decoder-only transformer. Further options are the fields of `ModelConfig`."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        n_heads: int = 4,
        n_layers: int = 6,
        d_ff: int = 1024,
        dropout: float = 0.1,
        max_len: int = 128,
        **options,
    ):
        super().__init__()
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
            self.pos_encoding = nn.Parameter(torch.empty(max_len, d_model))
        else:
            table = create_positional_encoding(max_len, d_model).to(torch.get_default_dtype())
            self.register_buffer("pos_encoding", table, persistent=False)
        self.embed_norm = create_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(n_layers))
        # makes what the layers' attention takes for a mask
        self.document_mask: Callable[..., object] = document_mask
        self.final_norm = create_norm(config) if config.final_norm else nn.Identity()
        self.output = nn.Linear(d_model, vocab_size, bias=config.bias and not config.tie_embeddings)
        self.init_weights()
        if config.tie_embeddings:
            self.output.weight = self.embed.weight

    def init_weights(self):
        """Every matrix from N(0, init_std^2); biases 0; norms 1 and 0, as torch.nn makes them.

        In a pre-norm model the residual path adds up 2 n_layers outputs, so the matrices that
        write to it are scaled down by sqrt(2 n_layers), which keeps its variance (GPT-2, 2.3).
        With these the first loss is close to ln(vocab_size) in either order of the norms.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scaled = self.config.norm_first and name.endswith(("W_o.weight", "linear2.weight"))
                std = self.config.init_std / (math.sqrt(2 * len(self.layers)) if scaled else 1.0)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids, mask=None, target_indices=None, cache=None, documents=None):
        """Logits (B, T, V) of the next token at each place of `ids` (B, T), int64.

        mask: None for causal; else as in `torch.nn.functional.scaled_dot_product_attention`.
        target_indices: flat indices (N,) into B x T where logits are wanted: they come as (N, V).
        cache: a KVCache of `generation`; the ids then follow on those it has seen. No gradients.
        documents: flat places (D + 1,), int32, where documents begin that are read as if each stood
        alone, and B T last; each row begins one. None: a row is one.
        """
        x = self.hidden(ids, mask, cache, documents)
        if target_indices is not None:
            x = x.flatten(0, 1).index_select(0, target_indices)  # (N, C)
        return self.output(x)  # (8) one score for each token of the vocabulary

    def hidden(self, ids, mask=None, cache=None, documents=None):
        """What the output projection reads: (B, T) -> (B, T, C). Arguments as in `forward`."""
        T = ids.shape[1]
        if T > self.max_len:
            raise UserError(
                f"{T} tokens are more than model.max_len = {self.max_len}; shorten the text"
            )
        # (6) token embedding plus position
        if cache is None:
            table, layer_caches = self.pos_encoding[:T], [None] * len(self.layers)
        else:
            table, layer_caches = cache.reserve(self.pos_encoding, T), cache.layers
            mask = cache.mask
        if documents is not None:
            positions = document_positions(documents, *ids.shape)
            table = F.embedding(positions, self.pos_encoding)  # (B, T, C)
            mask = self.document_mask(documents, positions)
        x = self.embed(ids) * self.embedding_scale + table  # (B, T, C)
        x = self.dropout(self.embed_norm(x))
        # (7) the layers, one after another
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = layer(x, mask, layer_cache)
        return self.final_norm(x)

    def num_parameters(self) -> int:
        """Trained numbers; a tied matrix counts once, the sinusoidal table not at all."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """FLOPs of one forward and backward pass a token, in sequences of `length` tokens.

        6 for each weight that is multiplied (2 forward, 4 backward) and 12 C for each pair of
        layer and key. PaLM (Chowdhery et al., 2022), appendix B; the causal half is not taken off.
        """
        multiplied = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * multiplied + 12 * len(self.layers) * self.config.d_model * length

    def generate(self, tokens, start_id=2, end_id=3, max_len=64, temperature=1.0, top_k=50, seed=0):
        """Ids that follow `tokens` (a list of ids) and `start_id`, up to `end_id`, at most max_len.

        start_id None: `tokens` stand alone. For all the options see `generation.batched`.
        """
        prompt = sequential.ids_of(tokens) + ([] if start_id is None else [start_id])
        rules = sampling.Sampling(temperature, top_k, max_new_tokens=max_len)
        return batched.generate(self, [prompt], rules, seed=seed, end_id=end_id)[0]

    def load_weights(self, arrays):
        """Copies arrays by parameter name (a tied matrix once) into this model."""
        own = dict(self.named_parameters())
        check_fit(own, arrays)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(torch.from_numpy(arrays[name]))

    @classmethod
    def from_config(cls, config: ModelConfig, dtype=torch.float32) -> "TransformerDecoder":
        """A freshly initialised decoder of this shape, on the CPU."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that the sinusoidal table is exact in float64 too
        try:
            return cls(**asdict(config))
        finally:
            torch.set_default_dtype(before)

    @classmethod
    def from_weights(
        cls, config: ModelConfig, arrays, dtype=torch.float32, device="cpu"
    ) -> "TransformerDecoder":
        """A decoder of this shape with `arrays` (see `load_weights`), which takes no random number.

        Those that `from_config` draws take longer than reading the arrays, which overwrite them.
        """
        model = cls.without_weights(config, dtype)
        model.load_weights(arrays)
        return model.to(device)

    @classmethod
    def without_weights(cls, config: ModelConfig, dtype=torch.float32) -> "TransformerDecoder":
        """A decoder of this shape whose matrices are whatever was in memory; no random number."""
        with NothingDrawn():
            return cls.from_config(config, dtype)

    @classmethod
    def from_checkpoint(cls, path, dtype=torch.float32) -> "TransformerDecoder":
        """The decoder of a checkpoint, or of a run (its best step). Raises CheckpointError."""
        checkpoint = Checkpoint.find(path)
        config = read_model_config(checkpoint)
        return cls.from_weights(config, checkpoint.tensors("model.safetensors"), dtype).eval()
