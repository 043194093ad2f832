"""One decoder, three engines: the same logits, gradients, losses and texts."""

import random
from dataclasses import replace

import numpy as np
import pytest

from comparison.checks import numbers
from comparison.parity import ENGINES, apart, initial_weights, losses_apart, random_rows
from comparison.trainers import Adam, StackOrder, create
from comparison.worker import compare
from generation import sequential
from generation.batched import generate
from generation.sampling import Sampling
from model.config import ModelConfig
from tests.helpers import ROOT
from training.config import load

SMALL = {"vocab_size": 40, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 40, "max_len": 16}
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
MICROGPT = replace(load(ROOT / "configs" / "microgpt.toml").model, vocab_size=27)
NO_NORMS = {"norm": "none", "activation": "relu"}


def shrunk(config: ModelConfig) -> ModelConfig:
    """A configuration's options in a size that plain Python trains in a moment."""
    return replace(config, **SMALL, dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_gives_the_same_logits_and_gradients(file):
    dice = random.Random(3)
    shape = shrunk(load(file).model)
    logits, gradients = apart(shape, ENGINES, "fp64", random_rows(shape, 4, 10, dice))
    assert 0 < logits < 1e-12  # 1e-9 is what is promised
    assert 0 < gradients < 1e-12


@pytest.mark.parametrize(
    "options",
    [NO_NORMS, {"tie_embeddings": True, "norm_eps": 1e-3}, {"embedding_norm": True, "bias": False}],
    ids=["no-norms", "tied", "embedding-norm"],
)
def test_options_that_no_configuration_has_alone(options):
    shape = ModelConfig(**SMALL, dropout=0.0, **options)
    rows = random_rows(shape, 4, 10, random.Random(4))
    logits, gradients = apart(shape, (*ENGINES, "unfused"), "fp64", rows)
    assert max(logits, gradients) < 1e-12


def test_float32_of_lite_toml_in_numpy_and_pytorch():
    shape = replace(load(ROOT / "configs" / "lite.toml").model, vocab_size=2000, dropout=0.0)
    rows = random_rows(shape, 16, 60, random.Random(5))
    logits, gradients = apart(shape, ("numpy", "torch"), "fp32", rows)
    assert 0 < logits < 1e-5  # 1e-4 is what is promised
    assert 0 < gradients < 1e-5


def test_losses_stay_the_same_step_by_step():
    largest, losses = losses_apart(MICROGPT, 100)
    assert largest < 1e-12  # 1e-10 is what is promised, over 1,000 steps
    assert np.mean(losses["torch"][:10]) != np.mean(losses["torch"][-10:])


def test_a_difference_would_be_seen(monkeypatch):
    """The comparison itself: a gradient off by a thousandth of one weight is found."""
    from comparison.trainers import NumpyTrainer

    right = NumpyTrainer.gradients

    def off(self):
        found = {name: g.copy() for name, g in right(self).items()}
        found["output.weight"][3, 2] *= 1.001
        return found

    monkeypatch.setattr(NumpyTrainer, "gradients", off)
    shape = shrunk(MICROGPT)
    _, gradients = apart(shape, ENGINES, "fp64", random_rows(shape, 2, 8, random.Random(6)))
    assert gradients > 1e-9


@pytest.mark.parametrize(
    "rules",
    [Sampling(greedy=True), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6)],
    ids=["greedy", "temperature", "top_k", "top_p"],
)
def test_texts_are_the_same_in_float64(rules):
    shape = shrunk(load(ROOT / "configs" / "default.toml").model)
    weights = initial_weights(shape, 7)
    prompts = [[1], [5, 6, 7], [5, 6, 7], list(range(20))]  # the last is longer than the model
    rules = replace(rules, max_new_tokens=24)
    texts = []
    for engine in ENGINES:
        model = create(engine, shape, weights, Adam(0.9, 0.99, 1e-8)).model
        write = generate if engine == "torch" else sequential.generate
        texts.append(write(model, prompts, rules, seed=2, end_id=3))
    assert texts[0] == texts[1] == texts[2]
    assert all(texts[0][:3])  # something was written


def test_stack_order_is_wrong_where_nodes_have_several_users():
    """The control of compare.py; which matrices it spares depends on what is pushed first."""
    rows = random_rows(MICROGPT, 1, 9, random.Random(8))
    weights = initial_weights(MICROGPT)
    found = []
    for kind in (
        lambda: create("python", MICROGPT, weights, Adam(0.9, 0.99, 1e-8)),
        lambda: StackOrder(MICROGPT, weights, Adam(0.9, 0.99, 1e-8), unfused=True),
    ):
        trainer = kind()
        trainer.forward(trainer.batch(rows))
        trainer.backward()
        found.append({name: list(numbers(g)) for name, g in trainer.gradients().items()})
    cosines = {name: compare(found[0][name], found[1][name])["cosine"] for name in found[0]}
    assert cosines["output.weight"] > 0.99
    assert all(abs(cosines[name]) < 0.7 for name in cosines if "self_attn" in name)
