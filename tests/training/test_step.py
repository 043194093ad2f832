"""training/step.py in process: accumulation, and what is not finite."""

from dataclasses import replace

import pytest
import torch

from common.device import PRECISIONS
from tests.helpers import write_config
from training.config import load
from training.resume import RunSpec
from training.setup import build
from training.step import NonFiniteError, train_step
from training.timing import StepTimer


@pytest.fixture
def make(tmp_path):
    """A function that builds the tiny run with other settings."""

    def build_with(precision="fp32", optimizer="adamw", **train):
        config = load(write_config(tmp_path))
        config = replace(
            config,
            precision=precision,
            optimizer=replace(config.optimizer, name=optimizer),
            train=replace(config.train, **train),
        )
        return build(RunSpec(tmp_path / "run", config), lambda _: None)

    return build_with


def step(t, number):
    micro_batches = t.batches(number, t.config.train.accumulation_steps)
    targets = t.batches.target_count(number)
    return train_step(t, t.loss_module, micro_batches, targets, number, StepTimer(t.device))


def weights(t):
    return {name: p.detach().clone() for name, p in t.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_is_the_large_batch(make):
    """Up to rounding: the loss is the mean over all the step's tokens, however it is cut."""
    found = []
    for accumulation_steps in (1, 2, 3, 8):
        t = make("fp64", accumulation_steps=accumulation_steps)
        t.model.eval()  # dropout's numbers depend on the micro-step
        results = [step(t, number) for number in range(6)]
        found.append((weights(t), [(r.loss, r.grad_norm, r.tokens) for r in results]))
    for other_weights, other_results in found[1:]:
        assert torch.tensor(other_results) == pytest.approx(torch.tensor(found[0][1]), abs=1e-12)
        for name, weight in found[0][0].items():
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(make, precision, optimizer):
    t = make(precision, optimizer)
    step(t, 0)
    before = weights(t)
    t.model.layers[1].norm1.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match="step 2: the gradient's norm is"):
        step(t, 1)
    assert same(before, weights(t))


def test_a_loss_that_is_not_finite_stops_before_the_update(make):
    t = make()
    with torch.no_grad():
        t.model.output.bias[3] = torch.nan
    before = weights(t)
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        step(t, 0)
    assert all(torch.equal(before[n], w) for n, w in weights(t).items() if n != "output.bias")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_skips_every_optimizer_and_halves_the_scale(make, optimizer):
    t = make("fp16", optimizer)
    step(t, 0)
    before, scale = weights(t), t.scaler.get_scale()
    # AdamW's parameters alone: a scaler by itself would let Muon move
    hook = t.model.embed.weight.register_hook(lambda gradient: gradient * torch.inf)
    assert not step(t, 1).updated
    assert same(before, weights(t))
    assert t.scaler.get_scale() == scale / 2
    hook.remove()
    assert step(t, 2).updated
    assert not same(before, weights(t))


def test_fp16_stops_when_the_scale_would_fall_below_1(make):
    t = make("fp16")
    step(t, 0)
    t.scaler.update(1.0)
    t.model.embed.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match="loss scale would fall below 1"):
        step(t, 1)


def test_low_precisions_train_to_about_the_same_loss(make):
    losses = {}
    for precision in PRECISIONS:
        t = make(precision)
        losses[precision] = [step(t, number).loss for number in range(12)][-1]
    for precision, loss in losses.items():
        assert loss == pytest.approx(losses["fp32"], rel=0.05), precision
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_no_bit_and_are_not_kept(make, precision):
    kept, found = [], []
    for recompute in (False, True):
        t = make(precision, checkpoint_activations=recompute)
        assert t.config.train.checkpoint_activations == recompute and t.model.training
        sizes = []  # of what is kept for the backward pass outside of recomputed layers
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            step(t, 0)
        kept.append(sum(sizes))
        found.append([step(t, number).loss for number in range(1, 4)] + [weights(t)])
    assert found[0][:-1] == found[1][:-1]
    assert same(found[0][-1], found[1][-1])
    assert kept[1] < kept[0] / 2
