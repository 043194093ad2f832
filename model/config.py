"""The shape of the decoder, for every engine. Standard library only.

`ModelConfig` is what `[model]` in a TOML file holds, what a checkpoint's `config.json` stores and
what each engine is built from.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

# Beyond the largest models there are. An engine would build a larger one until memory is full.
MOST = {"vocab_size": 2**24, "d_model": 2**16, "n_heads": 2**16, "n_layers": 2**12, "d_ff": 2**18}
MOST |= {"max_len": 2**17}

IGNORED = -100  # the target of a place whose loss is not taken, as in PyTorch


class UserError(ValueError):
    """Something the user can mend. The scripts print it as one line and exit with status 2."""

    def __init__(self, message=""):
        # part of it may be what a file holds, which must not command a terminal or fill it
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 1200 else f"{text[:800]} ... {text[-300:]}")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The defaults are those of Vaswani et al. (2017), post-norm."""

    vocab_size: int = 0
    """Number of tokens; 0 takes it from the tokenizer."""
    d_model: int = 256
    """Width C of the residual stream."""
    n_heads: int = 4
    """Attention heads H; each is d_model / n_heads wide."""
    n_layers: int = 6
    """Decoder layers."""
    d_ff: int = 1024
    """Inner width of the feed-forward block."""
    max_len: int = 128
    """The longest sequence the model can hold, in tokens."""
    dropout: float = 0.1
    """Dropout on the embedding and on both residual branches."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights; above 0, SDPA on a CPU leaves its fast path."""
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Position table: fixed sines (Vaswani et al., 3.5) or trained."""
    norm: Literal["layer", "rms", "none"] = "layer"
    """LayerNorm with weight and bias, RMSNorm without weights, or nothing."""
    norm_first: bool = False
    """Normalise before each block (pre-norm) instead of after it, as in torch.nn."""
    final_norm: bool = False
    """One more norm in front of the output projection: pre-norm models want it."""
    embedding_norm: bool = False
    """A norm right after the embedding (microGPT)."""
    norm_eps: float = 1e-5
    """Added to the variance before the root."""
    activation: Literal["relu", "gelu"] = "relu"
    """Of the feed-forward block; gelu is the tanh form, which every engine can compute."""
    bias: bool = True
    """Biases in the linear layers."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    scale_embedding: bool = True
    """Multiply the token embedding by sqrt(d_model) (Vaswani et al., 3.4)."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the output projection."""

    def __post_init__(self):
        wrong = wrong_types(self)
        if wrong:
            raise UserError("; ".join(wrong))
        for name, most in MOST.items():
            value = getattr(self, name)
            if value > most:
                wrong.append(f"{name} = {value} must be at most {most}")
            elif value < 1 and name != "vocab_size":
                wrong.append(f"{name} = {value} must be at least 1")
        if self.vocab_size < 0:
            wrong.append(f"vocab_size = {self.vocab_size} must be 0 (from the tokenizer) or more")
        if self.n_heads >= 1 and self.d_model % self.n_heads:
            wrong.append(
                f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}: "
                f"try d_model = {-(-self.d_model // self.n_heads) * self.n_heads}"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            wrong.append(f"d_model = {self.d_model} must be even for sinusoidal positions")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{name} = {getattr(self, name)} must be at least 0 and below 1")
        for name in ("norm_eps", "init_std"):
            if not 0 < getattr(self, name) < 1:
                wrong.append(f"{name} = {getattr(self, name)} must be between 0 and 1")
        if self.norm == "none" and (self.norm_first or self.final_norm or self.embedding_norm):
            wrong.append('norm = "none" leaves nothing for norm_first, final_norm, embedding_norm')
        if wrong:
            raise UserError("; ".join(wrong))


def numbers_at_least(config: ModelConfig) -> int:
    """Numbers in the matrices of a decoder: fewer are not in its weights."""
    layer = 4 * config.d_model**2 + 2 * config.d_model * config.d_ff
    rows = config.vocab_size * (1 if config.tie_embeddings else 2)
    rows += config.max_len if config.positions == "learned" else 0
    return config.n_layers * layer + rows * config.d_model


def wrong_types(config) -> list[str]:
    """What is wrong with a dataclass's fields of type int, float, bool or Literal."""
    wrong = []
    for field in fields(config):
        value, words = getattr(config, field.name), get_args(field.type)
        if words and value not in words:
            wrong.append(f"{field.name} = {value!r} must be one of {', '.join(words)}")
        elif field.type in (int, bool) and type(value) is not field.type:
            wrong.append(f"{field.name} = {value!r} must be of type {field.type.__name__}")
        elif field.type is float and type(value) not in (int, float):
            wrong.append(f"{field.name} = {value!r} must be a number")
    return wrong
