"""A decoder as a file of llama.cpp, of its architecture gpt2. Needs the package `gguf`."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.tokenizers.base import Tokenizer
from data.tokenizers.sentencepiece import SentencePieceTokenizer
from exchange import huggingface
from exchange.tokenizers_json import is_bpe, processor, to_tokenizers
from model.config import ModelConfig

LAYER = {  # what llama.cpp calls the parts of a layer of GPT-2
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
REST = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}


def write_gguf(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    kind: str,
    name: str,
    where: str,
    file: Path,
    start_token: bool = True,
) -> str:
    """Writes the file; returns a note on its tokenizer, "" if it has all of it.

    kind, start_token: of the data. name: of the model. Raises UserError, which begins with `where`.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            "--format gguf: needs the package gguf, which is not installed; install it with pip "
            "install gguf"
        ) from None
    refuse_unlike(config, where)
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    note = add_tokenizer(writer, tokenizer)
    if not note:
        add_special_tokens(writer, tokenizer, kind, start_token)
    tensors = {}
    for key, array in huggingface.exported(config, weights, "gpt2").items():
        is_linear = array.ndim == 2 and ".h." in key
        rows = array.T if is_linear else array  # (outputs, inputs), as ours
        tensors[theirs(key)] = np.ascontiguousarray(rows, np.float32)
    for key, array in tensors.items():
        writer.add_tensor(key, array)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:  # NumPy's tofile() says how much it has written, but not why
        raise full(file) if error.errno is None else error from None
    check_whole(file, tensors)
    return note


def full(file: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def check_whole(file: Path, tensors: Mapping[str, np.ndarray]):
    """Raises OSError unless the file has these tensors: NumPy's tofile() drops a last error."""
    import gguf

    try:
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        whole = all(np.array_equal(found[n], a, equal_nan=True) for n, a in tensors.items())
    except (ValueError, IndexError, KeyError):  # what the reader raises for half a file
        whole = False
    if not whole:
        raise full(file)


def refuse_unlike(config: ModelConfig, where: str):
    """Raises UserError for a decoder that llama.cpp has no architecture for."""
    wrong = ""
    if huggingface.architecture(config, where) != "gpt2":
        wrong = "model.norm_first = false: llama.cpp has no post-norm decoder of this kind"
    elif config.activation != "gelu":
        wrong = f'model.activation = "{config.activation}": its gpt2 has gelu'
    if wrong:
        raise UserError(f"{where}: {wrong}; use --format huggingface or onnx")


def theirs(key: str) -> str:
    """The name that llama.cpp has for a tensor of GPT2LMHeadModel."""
    block, _, part = key.removeprefix("transformer.").rpartition(".")
    if block.startswith("h."):
        _, i, block = block.split(".", 2)
        return f"blk.{i}.{LAYER[block]}.{part}"
    return f"{REST[block]}.{part}"


def add_tokenizer(writer, tokenizer: Tokenizer) -> str:
    """The tokenizer, where llama.cpp has its like; else a note that the file takes ids alone."""
    import gguf

    trained = processor(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else None
    if trained is None or not is_bpe(trained):
        return add_byte_level(writer, tokenizer)
    ids = range(len(trained))
    types = {tokenizer.unk_id: gguf.TokenType.UNKNOWN}
    types |= {i: gguf.TokenType.CONTROL for i in (0, 2, 3)}
    types |= {i: gguf.TokenType.BYTE for i in ids if trained.is_byte(i)}
    writer.add_tokenizer_model("llama")  # SentencePiece's BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list([trained.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([trained.get_score(i) for i in ids])
    writer.add_token_types([types.get(i, gguf.TokenType.NORMAL) for i in ids])
    writer.add_add_space_prefix(False)
    writer.add_unk_token_id(tokenizer.unk_id)
    return ""


def add_byte_level(writer, tokenizer: Tokenizer) -> str:
    """The same for one that merges bytes, in words cut as GPT-2 cuts them."""
    import gguf

    made = {}
    with contextlib.suppress(UserError):  # some have no such form
        made = json.loads(to_tokenizers(tokenizer, "stream").to_str())
    if not merges_bytes(made):
        writer.add_tokenizer_model("no_vocab")
        return "llama.cpp has no tokenizer like that of this run; give it ids, not text"
    tokens = {i: token for token, i in made["model"]["vocab"].items()}
    tokens |= {token["id"]: token["content"] for token in made["added_tokens"]}
    control = {token["id"] for token in made["added_tokens"] if token["special"]}
    types = [
        gguf.TokenType.UNUSED if i not in tokens
        else gguf.TokenType.CONTROL if i in control
        else gguf.TokenType.NORMAL
        for i in range(tokenizer.vocab_size)
    ]  # fmt: skip
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in made["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"[UNUSED{i}]") for i in range(tokenizer.vocab_size)])
    writer.add_token_types(types)
    # it has to have one; this one is of no text
    writer.add_token_merges(merges or [f"{tokens[tokenizer.start_id]} {tokens[tokenizer.end_id]}"])
    return ""


def merges_bytes(made: dict) -> bool:
    """Whether a tokenizer.json is one of GPT-2's kind, or has no merges, and so needs no words."""
    cut, model = made.get("pre_tokenizer") or {}, made.get("model", {})
    steps = cut.get("pretokenizers", [cut])
    if any(s.get("type") != "ByteLevel" or s.get("add_prefix_space", True) for s in steps):
        return False
    in_words = any(step.get("use_regex", True) for step in steps)
    is_plain = model.get("type") == "BPE" and made.get("normalizer") is None
    return is_plain and (in_words or not model.get("merges"))


def add_special_tokens(writer, tokenizer: Tokenizer, kind: str, start_token: bool):
    """Those that start, end and pad; whether one stands before each text."""
    writer.add_bos_token_id(tokenizer.start_id if start_token else tokenizer.end_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(kind in ("lines", "documents"))
    writer.add_add_eos_token(False)
