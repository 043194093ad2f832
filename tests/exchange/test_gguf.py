"""GGUF: what is in the file, by its own reader; and logits and text in llama.cpp, if it is here."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.reader import Checkpoint
from common.errors import UserError
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from exchange.gguf import refuse_unlike
from model.transformer_full import TransformerDecoder
from tests.exchange.helpers import CHARACTERS, PRE, SMALL, exchanged, save_run
from tests.exchange.test_import import save_gpt2
from tests.helpers import ROOT

gguf = pytest.importorskip("gguf")
WIDE = replace(PRE, d_model=32)  # ggml computes in blocks of 32
TEXTS = [
    "The loss of a step.",
    "  a\n\n\tb  caf\u00e9 \u4e2d \U0001f600 x",
    "def f(x):\n    return x",
    "<end>",
]


def export(folder, monkeypatch, name="run"):
    out = folder / "out"
    assert exchanged(monkeypatch, "export", folder / name, out, "--format", "gguf") == 0
    return out / "model.gguf"


def field(reader, key: str):
    return reader.get_field(key).contents()


def test_the_file_has_the_weights_and_the_tokenizer(tmp_path, monkeypatch):
    tokenizer = train_sentencepiece([(ROOT / "docs" / "training.md").read_text()], "bpe", 400)
    save_run(tmp_path / "run", WIDE, "lines", tokenizer)
    reader = gguf.GGUFReader(export(tmp_path, monkeypatch))
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = Checkpoint.find(tmp_path / "run").tensors("model.safetensors")
    stacked = [weights[f"layers.1.self_attn.W_{part}.weight"] for part in "qkv"]
    assert np.array_equal(tensors["blk.1.attn_qkv.weight"], np.concatenate(stacked))
    assert np.array_equal(tensors["output.weight"], weights["embed.weight"])
    assert len(tensors) == 4 + 1 + 2 * 12
    assert field(reader, "general.architecture") == "gpt2"
    assert field(reader, "gpt2.context_length") == WIDE.max_len
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens == [tokenizer.token(i) for i in range(400)]
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert field(reader, "tokenizer.ggml.eos_token_id") == 3
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: llama-cpp-python\n")


def test_a_tokenizer_that_it_has_not_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", PRE, "lines")
    reader = gguf.GGUFReader(export(tmp_path, monkeypatch))
    assert "note: llama.cpp has no tokenizer like that" in capsys.readouterr().out
    assert field(reader, "tokenizer.ggml.model") == "no_vocab"
    assert field(reader, "gpt2.vocab_size") == CHARACTERS.vocab_size


@pytest.mark.parametrize(
    ("config", "why"),
    [(SMALL, "model.norm_first = false"), (replace(PRE, activation="relu"), "model.activation")],
)
def test_what_it_has_no_architecture_for_is_refused(config, why):
    with pytest.raises(UserError, match=f"^run: {why}.*; use --format huggingface or onnx"):
        refuse_unlike(config, "run")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte", "gpt2"])
def test_llama_cpp_reads_text_alike_and_computes_the_same(kind, tmp_path, monkeypatch):
    """As far as its table of gelu goes, which has 16 bits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if kind == "gpt2":
        save_gpt2(tmp_path / "theirs", n_embd=32, initializer_range=0.1)
        assert exchanged(monkeypatch, "import", tmp_path / "theirs", tmp_path / "run") == 0
    else:
        text = (ROOT / "docs" / "training.md").read_text()
        made = ByteTokenizer() if kind == "byte" else train_sentencepiece([text], "bpe", 400)
        save_run(tmp_path / "run", replace(WIDE, max_len=64), "stream", made)
    file = export(tmp_path, monkeypatch)
    model = llama_cpp.Llama(str(file), logits_all=True, verbose=False, n_ctx=64)
    ours = TransformerDecoder.from_checkpoint(tmp_path / "run")
    tokenizer = load_tokenizer(Checkpoint.find(tmp_path / "run").path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert model.detokenize(ids).decode() == text
        ids = ids[: ours.max_len]
        model.reset()
        model.eval(ids)
        with torch.no_grad():
            expected = ours(torch.tensor([ids]))[0].numpy()
        found = np.array(model.scores[: len(ids)])
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()
