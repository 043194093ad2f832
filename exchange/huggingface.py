"""Weights and settings in Hugging Face's form: ours out, GPT-2's in. NumPy; no torch.

Out, a decoder is one of two architectures of transformers, with the same logits:

    pre-norm with a final norm    GPT2LMHeadModel
    post-norm                     OPTForCausalLM with do_layer_norm_before = False

What these lack is folded into what they have. A fixed table of sines is a table of learned
positions. An embedding's scale is multiplied into it; the output's matrix is then another one. An
output's bias o goes into the last LayerNorm, whose normalised x adds up to 0 over its C numbers:
with g and b the norm's weight and bias, W (g x + b) + o = W' (x + 1) for W' = W diag(g) + u 1^T and
u = (W b + o - W g) / C.

Shapes: V = vocab_size, T = max_len, C = d_model, F = d_ff.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.safetensors_python import FORMATS, Tensor, in_file_order, read
from checkpoint.shards import INDEX
from common.errors import UnreadableError, UserError
from model.config import ModelConfig
from model.transformer_lite import create_positional_encoding

Arrays = Mapping[str, np.ndarray]

WEIGHTS = "model.safetensors"
OPT_EPS = 1e-5  # of OPT's norms, which is no setting
OPT_OFFSET = 2  # rows of OPT's table of positions before that of the first one


def layer_names(blocks: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The weight and the bias of each block of a layer, and what either is made of here."""
    return {
        f"{name}.{part}": tuple(f"{own}.{part}" for own in ours)
        for name, ours in blocks.items()
        for part in ("weight", "bias")
    }


GPT2_LAYER = layer_names(  # matrices as (inputs, outputs); queries, keys and values are one
    {
        "ln_1": ("norm1",),
        "attn.c_attn": ("self_attn.W_q", "self_attn.W_k", "self_attn.W_v"),
        "attn.c_proj": ("self_attn.W_o",),
        "ln_2": ("norm2",),
        "mlp.c_fc": ("feed_forward.linear1",),
        "mlp.c_proj": ("feed_forward.linear2",),
    }
)
OPT_LAYER = layer_names(  # matrices as (outputs, inputs), like ours
    {
        "self_attn.q_proj": ("self_attn.W_q",),
        "self_attn.k_proj": ("self_attn.W_k",),
        "self_attn.v_proj": ("self_attn.W_v",),
        "self_attn.out_proj": ("self_attn.W_o",),
        "self_attn_layer_norm": ("norm1",),
        "fc1": ("feed_forward.linear1",),
        "fc2": ("feed_forward.linear2",),
        "final_layer_norm": ("norm2",),
    }
)

# Out ----------------------------------------------------------------------------------------------


def architecture(config: ModelConfig, where: str) -> str:
    """The architecture of transformers that has this decoder, "gpt2" or "opt".

    Raises UserError, which begins with `where`, if there is none.
    """
    wrong = ""
    if config.norm != "layer":
        wrong = f'model.norm = "{config.norm}": GPT-2 and OPT have LayerNorm'
    elif config.embedding_norm:
        wrong = "model.embedding_norm = true: GPT-2 and OPT have no norm after the embedding"
    elif config.norm_first and not config.final_norm:
        wrong = "model.final_norm = false: GPT-2, which is pre-norm, has a final norm"
    elif not config.norm_first and config.final_norm:
        wrong = "model.final_norm = true: OPT, where it is post-norm, has no final norm"
    elif not config.norm_first and config.norm_eps != OPT_EPS:
        wrong = f"model.norm_eps = {config.norm_eps}: in OPT it is {OPT_EPS}"
    if wrong:
        raise UserError(f"{where}: {wrong}; use --format onnx, which takes every model")
    return "gpt2" if config.norm_first else "opt"


def is_tied(config: ModelConfig) -> bool:
    """Whether an export has one matrix for the embedding and the output projection."""
    return config.tie_embeddings and not config.scale_embedding


def settings(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What config.json of transformers says of a decoder of the architecture `kind`."""
    activation = "gelu_new" if config.activation == "gelu" else "relu"
    common = {
        "vocab_size": config.vocab_size,
        "activation_function": activation,
        "tie_word_embeddings": is_tied(config),
        "dtype": "float32",
    }
    if kind == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.max_len,
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.d_ff,
            "layer_norm_epsilon": config.norm_eps,
            "initializer_range": config.init_std,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.attention_dropout,
        }
    return common | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "max_position_embeddings": config.max_len,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "ffn_dim": config.d_ff,
        "do_layer_norm_before": False,
        "init_std": config.init_std,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "layerdrop": 0.0,
    }


def exported(config: ModelConfig, weights: Arrays, kind: str) -> dict[str, np.ndarray]:
    """The weights of the architecture `kind` by the names that transformers has for them."""
    embedding = weights["embed.weight"]
    output = weights.get("output.weight", embedding)
    if config.scale_embedding:
        embedding = (embedding * math.sqrt(config.d_model)).astype(embedding.dtype)
    positions = weights.get("pos_encoding")
    if positions is None:
        table = create_positional_encoding(config.max_len, config.d_model)
        positions = table.astype(embedding.dtype)
    last = "final_norm" if kind == "gpt2" else f"layers.{config.n_layers - 1}.norm2"
    bias = weights.get("output.bias")
    if bias is not None and bias.any():  # or that of an imported GPT-2, which is 0, would change it
        output, norm = folded(output, bias, weights[f"{last}.weight"], weights[f"{last}.bias"])
        weights = {**weights, f"{last}.weight": norm, f"{last}.bias": norm}
    if kind == "gpt2":
        layers, layer_parts = "transformer.h", GPT2_LAYER
        tensors = {"transformer.wte.weight": embedding, "transformer.wpe.weight": positions}
        for part in ("weight", "bias"):
            tensors[f"transformer.ln_f.{part}"] = weights[f"final_norm.{part}"]
    else:
        layers, layer_parts = "model.decoder.layers", OPT_LAYER
        tensors = {"model.decoder.embed_tokens.weight": embedding}
        padded = np.pad(positions, [(OPT_OFFSET, 0), (0, 0)])
        tensors["model.decoder.embed_positions.weight"] = padded
    for i in range(config.n_layers):
        for name, parts in layer_parts.items():
            own = [weight_or_zeros(config, weights, f"layers.{i}.{part}") for part in parts]
            if kind == "gpt2":
                own = [array.T for array in own]
            tensors[f"{layers}.{i}.{name}"] = np.concatenate(own, axis=-1)
    if not is_tied(config):
        tensors["lm_head.weight"] = output
    return tensors


def weight_or_zeros(config: ModelConfig, weights: Arrays, name: str) -> np.ndarray:
    """One of the weights; zeros for a bias that a model without biases lacks."""
    if name in weights:
        return weights[name]
    assert name.endswith(".bias") and not config.bias
    width = config.d_ff if "linear1" in name else config.d_model
    return np.zeros(width, weights["embed.weight"].dtype)


def folded(
    output: np.ndarray, bias: np.ndarray, weight: np.ndarray, norm_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An output projection (V, C) with its bias (V,) and those (C,) of the norm before it in it.

    Also the weight, and bias, that the norm then has; see above.
    """
    W, g, b = (array.astype(np.float64) for array in (output, weight, norm_bias))
    u = (W @ b + bias - W @ g) / len(g)
    return (W * g + u[:, None]).astype(output.dtype), np.ones_like(weight)


# In -----------------------------------------------------------------------------------------------

MAX_JSON = 1 << 24  # bytes of a config.json or an index
GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of the tanh approximation
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that older files have beside the weights
DIFFERENT = {  # settings of GPT-2 that this decoder has not, and what it has in their place
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

SETTINGS: dict[str, tuple[str, Any]] = {  # ours: GPT-2's, and what it is where config.json has none
    "vocab_size": ("vocab_size", 50257),
    "d_model": ("n_embd", 768),
    "n_heads": ("n_head", 12),
    "n_layers": ("n_layer", 12),
    "d_ff": ("n_inner", None),
    "max_len": ("n_positions", 1024),
    "dropout": ("resid_pdrop", 0.1),
    "attention_dropout": ("attn_pdrop", 0.1),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "init_std": ("initializer_range", 0.02),
    "tie_embeddings": ("tie_word_embeddings", True),
}
WORD = re.compile(r"\w+")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object that somebody else has written. Raises UserError, UnreadableError."""
    try:
        if not file.is_file():  # a device may never end
            raise UserError(f"{file}: no such file; give the folder of a model of transformers")
        with file.open("rb") as stream:
            content = stream.read(MAX_JSON + 1)
    except OSError as error:
        raise UnreadableError(error, file) from None
    try:
        value = json.loads(content) if len(content) <= MAX_JSON else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{file}: must hold a JSON object of at most {MAX_JSON >> 20} MB, but does not; "
            "download it again"
        )
    return value


def read_shape(folder: Path) -> ModelConfig:
    """The decoder that config.json of a GPT-2 describes. Raises UserError for another one."""
    file = folder / "config.json"
    given = read_json(file)
    if given.get("model_type") != "gpt2":
        raise UserError(
            f"{file}: model_type: is {given.get('model_type')!r:.80}, and only gpt2 can be "
            "imported; use a GPT-2"
        )
    for key, value in DIFFERENT.items():
        if given.get(key, value) is not value:
            raise UserError(
                f"{file}: {key}: is {given[key]!r:.80}, where the decoder here has {value}; use "
                "another model"
            )
    activation = given.get("activation_function", GELUS[0])
    if activation not in (*GELUS, "relu"):
        raise UserError(
            f"{file}: activation_function: is {activation!r:.80}, where the decoder here has "
            f"{' or '.join(GELUS)}, or relu; use another model"
        )
    values = {ours: given.get(key, default) for ours, (key, default) in SETTINGS.items()}
    if values["d_ff"] is None:
        values["d_ff"] = 4 * values["d_model"] if type(values["d_model"]) is int else 0
    values |= {"positions": "learned", "norm_first": True, "final_norm": True}
    values |= {"activation": "relu" if activation == "relu" else "gelu", "scale_embedding": False}
    try:
        config = ModelConfig(**values)
    except UserError as error:  # which has our names
        said = WORD.sub(lambda word: SETTINGS.get(word[0], word)[0], str(error))
        raise UserError(f"{file}: {said}; download it again") from None
    if config.vocab_size < 1:
        raise UserError(f"{file}: vocab_size: must be at least 1 (found 0); download it again")
    return config


def gpt2_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a GPT-2 of this shape consists of, without "transformer." before them."""
    C, F = config.d_model, config.d_ff
    matrices = {
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, F),
        "mlp.c_proj": (F, C),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.max_len, C),
    }
    for i in range(config.n_layers):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (C,), f"h.{i}.{name}.bias": (C,)}
        for name, shape in matrices.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, C)
    return shapes


def read_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a GPT-2 by name, as `gpt2_shapes` has them. Raises UserError."""
    file, index = folder / WEIGHTS, folder / (WEIGHTS + INDEX)
    by_file = read_index(index) if index.is_file() and not file.is_file() else {WEIGHTS: None}
    refuse_missing(folder, by_file)
    sizes = sum((folder / name).stat().st_size for name in by_file)
    if 2 * config.num_parameters() > sizes:  # the shortest numbers have two bytes
        raise UserError(
            f"{folder / 'config.json'}: describes {config.num_parameters():,} parameters, which do "
            f"not fit into the {sizes:,} bytes of {', '.join(by_file):.200}; download them again"
        )
    tensors: dict[str, Tensor] = {}
    for name, expected in by_file.items():
        found = read_file(folder / name)
        if expected is not None and found.keys() != expected:
            wrong = min(found.keys() ^ expected)
            raise UserError(
                f"{folder / name}: has other tensors than {index.name} lists ({wrong!r:.80}); "
                "download both again"
            )
        tensors |= found
    where = index if None not in by_file.values() else file
    return checked(tensors, config, where)


def read_index(file: Path) -> dict[str, set[str] | None]:
    """Which tensors each file holds. Raises UserError for files that are not beside the index."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        for name in weight_map.values()
    ):
        raise UserError(
            f"{file}: weight_map: must give for each tensor a .safetensors file in this folder; "
            "download it again"
        )
    return {
        name: {tensor for tensor, place in weight_map.items() if place == name}
        for name in dict.fromkeys(weight_map.values())
    }


def refuse_missing(folder: Path, names: Mapping[str, object]):
    """Raises UserError unless all these files are there; a pickle in their place is not read."""
    # Path.is_file raises where a name is too long
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if not missing and names:
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]}: a pickle, which can run any code when it is read; give what "
            "transformers makes of it, if you trust it: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('NEW')"
        )
    raise UserError(
        f"{folder / (missing or [WEIGHTS])[0]}: no such file; give a folder with all files of a "
        "model"
    )


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, their numbers still as bytes. Raises UserError."""
    try:
        return read(file.read_bytes())
    except OSError as error:
        raise UnreadableError(error, file) from None
    except ValueError as error:
        raise UserError(
            f"{file}: not a safetensors file: {error!s:.200}; download it again"
        ) from None


def checked(tensors: dict[str, Tensor], config: ModelConfig, file: Path) -> dict[str, Tensor]:
    """The tensors without "transformer." before their names, if they are those of `config`."""
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    shapes = gpt2_shapes(config)
    left_out = {name for name in named if name.endswith(MASKS)}
    if config.tie_embeddings:
        left_out.add("lm_head.weight")  # some files have it twice
    wrong = [f"{name} is missing" for name in shapes.keys() - named.keys()]
    wrong += [f"a GPT-2 has no {name:.80}" for name in named.keys() - shapes.keys() - left_out]
    for name in shapes.keys() & named.keys():
        shape, dtype = named[name].shape, named[name].dtype
        if shape != shapes[name]:
            wrong.append(f"{name} has shape {shape}, config.json says {shapes[name]}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            wrong.append(f"{name} is of type {dtype}")
    if wrong:
        raise UserError(f"{file}: {'; '.join(sorted(wrong)[:3])}; use another model")
    return {name: named[name] for name in shapes}


def to_float32(tensor: Tensor) -> np.ndarray:
    """A tensor of any floating-point type as float32; NumPy has no BF16."""
    kind = np.dtype(FORMATS[tensor.dtype]).newbyteorder("<")
    array = np.frombuffer(tensor.data, kind).reshape(tensor.shape)
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


class Imported:
    """The weights of a GPT-2 by our names; each is made when it is asked for."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Tensor]):
        self.config, self.tensors = config, tensors
        self.parts = {"embed.weight": ("wte.weight", 0, 1), "pos_encoding": ("wpe.weight", 0, 1)}
        for i in range(config.n_layers):
            for name, ours in GPT2_LAYER.items():
                for n, own in enumerate(ours):
                    self.parts[f"layers.{i}.{own}"] = (f"h.{i}.{name}", n, len(ours))
        for part in ("weight", "bias"):
            self.parts[f"final_norm.{part}"] = (f"ln_f.{part}", 0, 1)
        if not config.tie_embeddings:
            self.parts["output.weight"] = ("lm_head.weight", 0, 1)

    def kinds(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The dtype and the shape of each."""
        float32, found = np.dtype(np.float32), {}
        for name, (theirs, _, count) in self.parts.items():
            shape = self.tensors[theirs].shape
            shape = (*shape[:-1], shape[-1] // count)
            if theirs.startswith("h."):
                shape = shape[::-1]
            elif theirs in ("wte.weight", "lm_head.weight"):
                shape = (self.config.vocab_size, shape[1])
            found[name] = float32, shape
        if not self.config.tie_embeddings:
            found["output.bias"] = float32, (self.config.vocab_size,)
        return found

    def arrays(self) -> Iterator[np.ndarray]:
        """Each of them, in the order of a file."""
        for name, (_, shape) in (
            (name, self.kinds()[name]) for name in in_file_order(self.kinds())
        ):
            if name == "output.bias":  # GPT-2 has none
                yield np.zeros(shape, np.float32)
                continue
            theirs, n, count = self.parts[name]
            array = np.split(to_float32(self.tensors[theirs]), count, axis=-1)[n]
            yield array.T if theirs.startswith("h.") else array[: shape[0]]
