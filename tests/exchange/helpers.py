"""Runs to export, and `python -m exchange` in this process."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import writer
from checkpoint.safetensors_python import write_arrays
from common import cli
from data.tokenizers.base import Tokenizer
from data.tokenizers.char import CharTokenizer
from exchange import __main__ as exchange
from model.config import ModelConfig

SMALL = ModelConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=2, d_ff=24, max_len=24)
PRE = replace(SMALL, norm_first=True, final_norm=True, activation="gelu", tie_embeddings=True)
CHARACTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .,\n")
PAIRS = [{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(3)]


def random_weights(config: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights of which none is 0 or 1, as biases and norms of a new model are."""
    from model.transformer_lite import TransformerDecoderLite

    dice = np.random.default_rng(1)
    own = TransformerDecoderLite.from_config(config).named_parameters()
    return {name: dice.normal(0.1, 0.5, p.data.shape).astype(dtype) for name, p in own}


def save_run(run: Path, config: ModelConfig, kind: str, tokenizer: Tokenizer = CHARACTERS) -> Path:
    """A run with one step of random weights, with the figures that a log has."""
    config = replace(config, vocab_size=tokenizer.vocab_size)
    files = {
        "model.safetensors": write_arrays(random_weights(config)),
        "config.json": json.dumps({"model": asdict(config), "data": {"kind": kind}}).encode(),
        "state.json": json.dumps({"step": 7, "tokens": 700, "held_out": PAIRS}).encode(),
        **tokenizer.files(),
    }
    writer.save(run, 7, files)
    (run / "metrics.jsonl").write_text('{"step": 7, "loss/val": 1.25}\n')
    return run


def exchanged(monkeypatch, *arguments) -> int:
    """The exit status of `python -m exchange`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["exchange", *map(str, arguments)])
    return cli.run("python -m exchange", exchange.main)


def ids_of(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """The ids of a text as a batch of one."""
    return torch.tensor([tokenizer.encode(text)])
