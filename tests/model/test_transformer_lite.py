"""model/transformer_lite.py against model/transformer_full.py: logits, and every gradient.

What else it does, generation and checkpoints among it, is in test_transformer_lite_use.py.
"""

import itertools
import random
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from model.transformer_lite import TransformerDecoderLite, attention
from tests.helpers import ROOT
from tests.torchlite.test_gradients import compare, numbers
from torchlite import functional as F
from training.config import load

SHIPPED = {path.stem: load(path).model for path in sorted((ROOT / "configs").glob("*.toml"))}
SMALL = {"vocab_size": 23, "d_model": 12, "n_heads": 3, "n_layers": 2, "d_ff": 20, "max_len": 9}
OPTIONS = {
    "positions": ("sinusoidal", "learned"),
    "norm": ("layer", "rms", "none"),
    "norm_first": (False, True),
    "final_norm": (False, True),
    "embedding_norm": (False, True),
    "norm_eps": (1e-5, 1e-2),
    "activation": ("relu", "gelu"),
    "bias": (False, True),
    "scale_embedding": (False, True),
    "tie_embeddings": (False, True),
    "n_heads": (1, 3, 6),
    "n_layers": (1, 2),
    "d_ff": (20, 7),
}


NORMED = ("norm_first", "final_norm", "embedding_norm")  # what takes a norm to be possible


def covering(seed=0) -> list[dict]:
    """Choices that together have every possible pair of values of any two options."""
    dice = random.Random(seed)
    chosen, seen = [], set()
    while len(chosen) < 60:  # the best of some random ones, until there is nothing left to gain
        tried = []
        for _ in range(60):
            choice = {name: dice.choice(values) for name, values in OPTIONS.items()}
            if choice["norm"] == "none":
                choice |= dict.fromkeys(NORMED, False)
            tried.append(choice)
        best = max(tried, key=lambda choice: len(pairs(choice) - seen))
        if not pairs(best) - seen:
            return chosen
        chosen.append(best)
        seen |= pairs(best)
    return chosen


def pairs(choice: dict) -> set:
    return set(itertools.combinations(choice.items(), 2))


CHOICES = covering()


def decoders(dtype="float64", seed=0, dropout=0.0, spread=0.3, **options) -> tuple:
    """(lite, full) of the same shape with the same weights, none of them as they were made."""
    config = ModelConfig(**{**SMALL, "dropout": dropout, **options})
    torch.manual_seed(seed)  # or the weights would depend on the tests before
    full = TransformerDecoder.from_config(config, getattr(torch, dtype))
    lite = TransformerDecoderLite.from_config(config, dtype)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter += spread * torch.randn_like(parameter)
    lite.load_weights({name: p.detach().numpy() for name, p in full.named_parameters()})
    return lite, full


def tokens(config: ModelConfig, B=3, T=None, seed=0) -> np.ndarray:
    """Ids (B, T), some of them more than once."""
    T = config.max_len if T is None else T
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


def same(mine, its, tolerance=1e-12, least=0.0):
    """Equal relative to the largest number (or to `least`), of one dtype, NaN nowhere."""
    mine, its = np.asarray(mine), its.detach().numpy()
    assert mine.shape == its.shape and mine.dtype == its.dtype
    assert np.isfinite(mine).all()
    assert np.abs(mine - its).max() <= tolerance * max(np.abs(its).max(), least)


def same_gradients(lite, full, tolerance=1e-11, floor=1e-4):
    """Every gradient, relative to its largest number, or to a share of the largest there is.

    For the bias of the keys changes nothing, so that its gradient is rounding alone.
    """
    largest = max(p.grad.abs().max().item() for p in full.parameters())
    for (name, a), (its_name, b) in zip(
        lite.named_parameters(), full.named_parameters(), strict=True
    ):
        assert name == its_name
        assert a.grad.dtype == a.dtype
        same(a.grad, b.grad, tolerance, floor * largest)


def backward(lite, full, ids, **more):
    """The logits of both, and gradients of the same weighted sum of them."""
    y, its = lite(ids, **more), full(torch.tensor(ids), **torches(more))
    g = np.random.default_rng(1).normal(size=y.shape)
    y.backward(g)
    its.backward(torch.tensor(g, dtype=its.dtype))
    return y.data, its


def torches(more: dict) -> dict:
    return {name: torch.tensor(value) for name, value in more.items()}


# The same numbers ---------------------------------------------------------------------------------


def test_the_choices_cover_every_pair_of_options():
    elsewhere = {"dropout", "attention_dropout", "init_std"}  # no part of what is computed here
    assert {field.name for field in fields(ModelConfig)} == {*OPTIONS, *SMALL, *elsewhere}
    seen = set().union(*map(pairs, CHOICES))
    for (a, values), (b, others) in itertools.combinations(OPTIONS.items(), 2):
        for x, y in itertools.product(values, others):
            if not (x == "none" and b in NORMED and y):
                assert ((a, x), (b, y)) in seen


@pytest.mark.parametrize("choice", CHOICES, ids=range(len(CHOICES)))
def test_logits_and_every_gradient_are_those_of_pytorch(choice):
    lite, full = decoders(**choice)
    y, its = backward(lite, full, tokens(lite.config))
    same(y, its)
    same_gradients(lite, full)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_loss_of_each_shipped_shape(name):
    """As it is trained: hidden states, then linear_cross_entropy with some positions ignored."""
    shape = {**asdict(SHIPPED[name]), "vocab_size": 50, "n_layers": 2, "dropout": 0.0}
    shape["attention_dropout"] = 0.0
    shape |= {"d_ff": min(shape["d_ff"], 128), "max_len": 16}
    # without norms, weights far from their initial ones give gradients of 50,000
    lite, full = decoders(**shape, spread=0.3 if shape["norm"] != "none" else 0.01)
    ids = tokens(lite.config, T=12)
    targets = np.where(tokens(lite.config, T=12, seed=1) < 20, -100, 7).reshape(-1)
    x = lite.hidden(ids).reshape(-1, lite.config.d_model)
    loss = F.linear_cross_entropy(x, lite.output.weight, lite.output.bias, targets)
    its = TF.cross_entropy(full(torch.tensor(ids)).flatten(0, 1), torch.tensor(targets))
    loss.backward()
    its.backward()
    same(loss.data, its)
    same_gradients(lite, full, 1e-9)  # post-norm shapes of two layers magnify rounding


def test_float32_on_the_lite_shape():
    shape = {**asdict(SHIPPED["lite"]), "vocab_size": 500, "dropout": 0.0}
    config = ModelConfig(**shape)
    full = TransformerDecoder.from_config(config)
    lite = TransformerDecoderLite.from_config(config)
    lite.load_weights({name: p.detach().numpy() for name, p in full.named_parameters()})
    y, its = backward(lite, full, tokens(config, B=4, T=48))
    same(y, its, 1e-4)
    same_gradients(lite, full, 1e-4, floor=1.0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_twenty_steps_of_adamw_are_pytorchs(norm_first):
    from torchlite import optim

    lite, full = decoders(norm_first=norm_first, tie_embeddings=True, positions="learned")
    ours = optim.AdamW(lite.parameters(), lr=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW(full.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(20):
        ids, targets = tokens(lite.config, seed=step), tokens(lite.config, seed=step + 99).ravel()
        x = lite.hidden(ids).reshape(-1, lite.config.d_model)
        F.linear_cross_entropy(x, lite.output.weight, lite.output.bias, targets).backward()
        TF.cross_entropy(full(torch.tensor(ids)).flatten(0, 1), torch.tensor(targets)).backward()
        norm = optim.clip_grad_norm_(lite.parameters(), 0.5)
        its_norm = torch.nn.utils.clip_grad_norm_(full.parameters(), 0.5)
        assert norm == pytest.approx(its_norm.item(), rel=1e-7)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(lite.parameters(), full.parameters(), strict=True):
        same(a.data, b, 1e-7)


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("B", [1, 2])
def test_any_length_up_to_the_longest(B, T):
    lite, full = decoders()
    ids = tokens(lite.config, B, T)
    same(*backward(lite, full, ids))
    same_gradients(lite, full)


def test_masks_take_the_place_of_the_causal_one():
    lite, full = decoders()
    ids, dice = tokens(lite.config, T=7), np.random.default_rng(2)
    causal = np.tri(7, dtype=bool)
    np.testing.assert_array_equal(lite(ids, mask=causal).data, lite(ids).data)
    own = np.eye(7, dtype=bool)
    for mask in (
        np.ones((7, 7), dtype=bool),
        own | (dice.random((7, 7)) < 0.5),
        own | (dice.random((3, 1, 7, 7)) < 0.5),  # one for each sequence
        own | (dice.random((1, 3, 7, 7)) < 0.5),  # one for each head
        dice.normal(size=(7, 7)),
        np.where(causal, dice.normal(size=(3, 1, 7, 7)), -np.inf),
    ):
        lite.zero_grad()
        full.zero_grad()
        same(*backward(lite, full, ids, mask=mask))
        same_gradients(lite, full)


def test_positions_asked_for_are_the_same_logits_and_gradients():
    lite, full = decoders()
    ids, flat = tokens(lite.config, T=7), np.array([0, 5, 20, 5])
    same(*backward(lite, full, ids, target_indices=flat))
    same_gradients(lite, full)
    every = lite(ids).data
    np.testing.assert_allclose(
        lite(ids, target_indices=flat).data, every.reshape(21, -1)[flat], 1e-12
    )
    np.testing.assert_allclose(lite(ids, target_indices=[-1]).data, every[-1:, -1], 1e-12)


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_attention_written_out_is_pytorchs(kind):
    causal = kind == "causal"
    mask = np.tri(5, dtype=bool) if kind == "boolean" else numbers((5, 5))[0]
    mask = None if causal else mask
    compare(
        lambda Q, K, V: attention(Q, K, V, mask, 0.0, causal),
        lambda Q, K, V: TF.scaled_dot_product_attention(
            Q, K, V, None if causal else torch.tensor(mask), is_causal=causal
        ),
        *numbers((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    )
