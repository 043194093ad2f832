"""ONNX: any model, texts of any length, in onnxruntime."""

from dataclasses import replace

import pytest
import torch

from exchange.onnx import write_onnx
from model.transformer_full import TransformerDecoder
from tests.exchange.helpers import CHARACTERS, PRE, SMALL, exchanged, random_weights, save_run

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def test_logits_at_any_length(tmp_path):
    """For a model that neither GPT-2 nor OPT can be, too: microGPT's norms."""
    for config in (PRE, replace(SMALL, norm="rms", embedding_norm=True, bias=False)):
        weights = random_weights(config)
        write_onnx(config, weights, tmp_path)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        ours = TransformerDecoder.from_weights(config, weights).eval()
        for shape in ((1, 1), (3, 7), (2, config.max_len)):
            ids = torch.randint(config.vocab_size, shape)
            (logits,) = session.run(["logits"], {"ids": ids.numpy()})
            with torch.no_grad():
                expected = ours(ids)
            assert (torch.tensor(logits) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_run_is_exported_with_its_tokenizer(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", replace(PRE, n_layers=1), "lines")
    out = tmp_path / "out"
    assert exchanged(monkeypatch, "export", tmp_path / "run", out, "--format", "onnx") == 0
    names = {"model.onnx", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    (ids, logits) = (
        onnxruntime.InferenceSession(out / "model.onnx").get_inputs()[0],
        onnxruntime.InferenceSession(out / "model.onnx").get_outputs()[0],
    )
    assert ids.shape == ["batch", "length"]
    assert logits.shape == ["batch", "length", CHARACTERS.vocab_size]
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 5  # and nothing of the exporter's
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: onnx\n")
