"""The shape of the decoder, for every engine. Standard library only.

`ModelConfig` is what `[model]` in a TOML file holds, what a checkpoint's `config.json` stores and
what each engine is built from.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from checkpoint.reader import Checkpoint, CheckpointError
from common.errors import UserError, refuse

# Beyond the largest models there are. An engine would build a larger one until memory is full.
MAX_SIZES = {
    "vocab_size": 2**24,
    "d_model": 2**16,
    "n_heads": 2**16,
    "n_layers": 2**12,
    "d_ff": 2**18,
    "max_len": 2**17,
}

IGNORE_INDEX = -100  # the target of a place whose loss is not taken, as in PyTorch


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
    """Longest sequence (context length), in tokens."""
    dropout: float = 0.1
    """Dropout on the embedding and on both residual branches."""
    attention_dropout: float = 0.0
    """Dropout on the attention weights; above 0, attention on a CPU is much slower."""
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Position embedding: fixed sines (Vaswani et al., 3.5) or trained."""
    norm: Literal["layer", "rms", "none"] = "layer"
    """LayerNorm with weight and bias, RMSNorm without weights, or no norm."""
    norm_first: bool = False
    """Normalise before each block (pre-norm) instead of after it, as in torch.nn."""
    final_norm: bool = False
    """One more norm before the output projection, for pre-norm models."""
    embedding_norm: bool = False
    """A norm right after the embedding (microGPT)."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation of the feed-forward block; gelu is the tanh approximation."""
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
        refuse(wrong)
        for name, most in MAX_SIZES.items():
            value = getattr(self, name)
            if value > most:
                wrong.append(f"{name} = {value} must be at most {most}")
            elif value < 1 and name != "vocab_size":
                wrong.append(f"{name} = {value} must be at least 1")
        if self.vocab_size < 0:
            wrong.append(f"vocab_size = {self.vocab_size} must be 0 (from the tokenizer) or more")
        if self.n_heads >= 1 and self.d_model % self.n_heads:
            unit = math.lcm(self.n_heads, 2 if self.positions == "sinusoidal" else 1)
            wrong.append(
                f"d_model = {self.d_model} is not a multiple of n_heads = {self.n_heads}; "
                f"try d_model = {-(-self.d_model // unit) * unit}"
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
            wrong.append(
                'norm = "none" has no norm to place; set norm_first, final_norm and embedding_norm '
                "to false"
            )
        refuse(wrong)

    def num_parameters(self) -> int:
        """Trained numbers of a decoder of this shape; a tied matrix counts once."""
        C, F, V, bias = self.d_model, self.d_ff, self.vocab_size, self.bias
        norm = 2 * C if self.norm == "layer" else 0  # a weight and a bias each
        layer = 4 * C * (C + bias)  # queries, keys, values, output
        layer += F * (C + bias) + C * (F + bias)  # feed-forward
        layer += 2 * norm
        positions = self.max_len * C if self.positions == "learned" else 0
        output = 0 if self.tie_embeddings else V * (C + bias)
        norms = norm * (self.embedding_norm + self.final_norm)
        return V * C + positions + self.n_layers * layer + norms + output


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The shape of a checkpoint's decoder, of a size that its weights can have.

    Raises CheckpointError.
    """
    file, values = checkpoint.path / "config.json", checkpoint.config["model"]
    unknown = sorted(values.keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise CheckpointError(
            f"{file}: model.{unknown[0]}: unknown to this version; use the version that wrote it"
        )
    try:
        config = ModelConfig(**values)
    except (UserError, TypeError) as error:
        raise CheckpointError(f"{file}: model.{error}; use another checkpoint") from None
    size = checkpoint.size_of("model.safetensors")
    if config.num_parameters() > size:  # said before memory is taken for it
        raise CheckpointError(
            f"{file}: model: describes {config.num_parameters()} parameters, which do not fit "
            f"into the {size} bytes of model.safetensors; use another checkpoint"
        )
    return config


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
