"""model/transformer_lite.py in use: cached reading, dropout, weights, checkpoints."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save as to_safetensors

from checkpoint.reader import CheckpointError
from checkpoint.writer import save
from common.errors import UserError
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from model.transformer_lite import TransformerDecoderLite
from tests.helpers import ROOT
from tests.model.test_transformer_lite import CHOICES, SHIPPED, decoders, same, tokens
from torchlite import nn
from torchlite.tensor import no_grad

# Reading on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("prefill", [1, 4, 12])
def test_cached_reading_is_the_full_pass(name, prefill):
    shape = {**asdict(SHIPPED[name]), "vocab_size": 40, "d_ff": 64, "n_layers": 2, "max_len": 12}
    lite, _ = decoders(**shape)
    ids = tokens(lite.eval().config, B=1)[0]
    with no_grad():
        full = lite(ids[None]).data[0]
    cache = lite.new_cache()
    for _ in range(2):  # the second time in a cache that was used before
        at = prefill
        found = [lite.next_logits(cache, ids[:prefill].tolist())]
        while at < 12:
            step = 1 if at % 2 else min(2, 12 - at)
            found.append(lite.next_logits(cache, ids[at : at + step].tolist()))
            at += step
            np.testing.assert_allclose(found[-1], full[at - 1], rtol=1e-9, atol=1e-9)
        assert cache.length == 12
        np.testing.assert_allclose(found[0], full[prefill - 1], rtol=1e-9, atol=1e-9)
        assert len(found[0]) == 40 and type(found[0][0]) is float
        cache.clear()


def test_generated_text_is_that_of_the_full_model():
    """With every argument, and with none: its window of 12 tokens moves on, too."""
    lite, full = decoders(max_len=12, vocab_size=80)
    for more in (
        {},
        {"end_id": None},
        {"end_id": None, "start_id": None, "max_len": 5},
        {"temperature": 0.0, "end_id": None, "max_len": 20},
        {"temperature": 2.0, "top_k": 3, "seed": 4},
    ):
        mine = lite.generate([3, 5], **more)
        assert mine == full.generate([3, 5], **more)
        assert mine  # not an empty text
    assert lite.training


def test_what_it_is_without_being_told_is_the_lite_shape():
    assert TransformerDecoderLite(9500).config == replace(SHIPPED["lite"], vocab_size=9500)


def test_too_many_tokens_are_refused():
    lite, _ = decoders()
    with pytest.raises(UserError, match=r"10 tokens are more than model.max_len = 9"):
        lite(np.zeros((1, 10), int))
    cache = lite.new_cache()
    lite.next_logits(cache, [1] * 8)
    with pytest.raises(UserError, match=r"10 tokens are more than model.max_len = 9"):
        lite.next_logits(cache, [1, 1])
    assert cache.length == 8
    assert lite.next_logits(cache, [1])


@pytest.mark.parametrize("bad", [-1, 23])
def test_ids_outside_the_vocabulary_are_refused(bad):
    lite, full = decoders()
    for ids in ([[1, bad]], [[bad, 1]]):
        with pytest.raises(IndexError):
            lite(np.array(ids))
        with pytest.raises(IndexError):
            full(torch.tensor(ids))


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{"dropout": 0.3}, {"attention_dropout": 0.3}], ids=str)
def test_dropout_changes_training_and_nothing_else(where):
    lite, _ = decoders(**where)
    still, _ = decoders()
    ids = tokens(lite.config)
    nn.manual_seed(1)
    first, second = lite(ids).data, lite(ids).data
    assert (first != second).any()
    nn.manual_seed(1)
    np.testing.assert_array_equal(lite(ids).data, first)
    lite.eval()
    np.testing.assert_array_equal(lite(ids).data, lite(ids).data)
    np.testing.assert_array_equal(lite(ids).data, still(ids).data)


def test_dropout_is_where_pytorch_has_it():
    """Not the same dice, but as many numbers are dropped, in places of the same shapes."""
    lite, full = decoders(dropout=0.5, attention_dropout=0.25)
    mine = [m.p for m in lite.modules() if isinstance(m, nn.Dropout)]
    its = [m.p for m in full.modules() if isinstance(m, torch.nn.Dropout)]
    assert mine == its == [0.5] * 5
    ids = tokens(lite.config, B=64)
    spread = [np.std([step(i) for i in range(30)], axis=0).mean() for step in (
        lambda i: lite(ids).data,
        lambda i: full(torch.tensor(ids)).detach().numpy(),
    )]  # fmt: skip
    assert spread[0] == pytest.approx(spread[1], rel=0.05)


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES[:12], ids=range(12))
def test_names_and_shapes_are_those_of_pytorch(choice):
    lite, full = decoders(**choice)
    for remove in (True, False):
        mine = [(n, p.shape) for n, p in lite.named_parameters(remove_duplicate=remove)]
        its = full.named_parameters(remove_duplicate=remove)
        assert mine == [(n, tuple(p.shape)) for n, p in its]
    assert list(lite.state_dict()) == list(full.state_dict())


def test_weights_of_another_model_are_refused_and_change_nothing():
    lite, _ = decoders()
    before = lite.state_dict()
    for other, message in (
        (decoders(d_ff=21)[0], r"linear1"),
        (decoders(n_layers=1)[0], r"layers\.1"),
        (decoders(tie_embeddings=True)[0], r"output"),
    ):
        with pytest.raises(UserError, match=message):
            lite.load_weights({name: p.data for name, p in other.named_parameters()})
    for name, array in lite.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(UserError, match=r"vocab_size = 0 must be at least 1"):
        TransformerDecoderLite(0)


@pytest.mark.parametrize("name", SHIPPED)
def test_sizes_of_the_shipped_configurations(name):
    config = ModelConfig(**{**asdict(SHIPPED[name]), "vocab_size": 301})
    sizes = [
        m.from_config(config).num_parameters() for m in (TransformerDecoderLite, TransformerDecoder)
    ]
    assert sizes[0] == sizes[1]


def test_initial_weights_are_of_pytorchs_distributions():
    nn.manual_seed(0)
    config = ModelConfig(
        vocab_size=500, d_model=128, n_layers=8, d_ff=512, norm_first=True, positions="learned"
    )
    lite = TransformerDecoderLite.from_config(config)
    full = TransformerDecoder.from_config(config)
    for (name, mine), (_, its) in zip(
        lite.named_parameters(), full.named_parameters(), strict=True
    ):
        assert mine.dtype == np.float32
        its = its.detach().numpy()
        if mine.ndim == 2:
            assert mine.data.std() == pytest.approx(its.std(), rel=0.05), name
            assert mine.data.mean() == pytest.approx(0.0, abs=0.001), name
        else:
            np.testing.assert_array_equal(mine.data, its)


def test_reading_a_checkpoint_that_was_written_in_training(tmp_path):
    _, full = decoders("float32", tie_embeddings=True)
    weights = {name: p.detach().numpy() for name, p in full.named_parameters()}
    files = {
        "model.safetensors": to_safetensors(weights),
        "state.json": b'{"step": 3}',
        "config.json": json.dumps({"model": asdict(full.config), "data": {}}).encode(),
    }
    path = save(tmp_path, 3, files)
    ids = tokens(full.config)
    for place, dtype in ((path, "float32"), (tmp_path, "float32"), (tmp_path, "float64")):
        lite = TransformerDecoderLite.from_checkpoint(place, dtype)
        assert not lite.training and lite.config == full.config
        assert lite(ids).dtype == dtype
        y = TransformerDecoder.from_checkpoint(place, getattr(torch, dtype))(torch.tensor(ids))
        same(lite(ids).data, y, 1e-5 if dtype == "float32" else 1e-12)
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        TransformerDecoderLite.from_checkpoint(path)


def test_importing_it_does_not_import_torch():
    code = (
        "import sys, numpy, model.transformer_lite as lite\n"
        "decoder = lite.TransformerDecoderLite(9, 4, 2, 1, 4)\n"
        "decoder(numpy.zeros((1, 2), int)).sum().backward()\n"
        "decoder.generate([1, 2], max_len=3)\n"
        "print(sorted({'torch', 'pydantic', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout == "[]\n"
