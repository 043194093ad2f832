"""training/optimizer.py: which weights decay, the schedule, and a state that comes back whole."""

import math

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from training.config import OptimizerConfig
from training.optimizer import create_optimizers, load_state_tensors, state_tensors
from training.schedule import lr_factor


def decoder(**options):
    torch.manual_seed(0)
    config = ModelConfig(30, 16, 2, 2, 32, 8, **{"positions": "learned", **options})
    return TransformerDecoder.from_config(config)


def test_the_schedule():
    config = OptimizerConfig(warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert [lr_factor(config, s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_factor(config, 60, 110) == pytest.approx(0.55)
    assert lr_factor(config, 110, 110) == pytest.approx(0.1)
    assert lr_factor(config, 500, 110) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert lr_factor(config, 35, 110) == pytest.approx(quarter)
    linear = OptimizerConfig(warmup_steps=0, schedule="linear", min_lr_ratio=0.0)
    assert [lr_factor(linear, s, 100) for s in (0, 25, 100)] == [1.0, 0.75, 0.0]
    constant = OptimizerConfig(warmup_steps=2, schedule="constant")
    assert [lr_factor(constant, s, 5) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_has_one_optimizer_and_only_products_decay(name, tied):
    model = decoder(tie_embeddings=tied)
    groups = [
        (type(o).__name__, group["weight_decay"], parameter)
        for o in create_optimizers(model, OptimizerConfig(name=name, weight_decay=0.1))
        for group in o.param_groups
        for parameter in group["params"]
    ]
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names[id(p)] for _, _, p in groups) == sorted(names.values())
    for kind, decay, parameter in groups:
        full_name = names[id(parameter)]
        in_layer = full_name.startswith("layers.") and parameter.dim() == 2
        assert decay == (0.1 if in_layer or full_name == "output.weight" else 0.0), full_name
        assert kind == ("Muon" if name == "muon" and in_layer else "AdamW"), full_name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_comes_back_bit_for_bit(name):
    def steps(model, optimizers, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            loss = model(torch.randint(0, 30, (4, 8))).square().mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    config = OptimizerConfig(name=name, lr=1e-2)
    straight = decoder()
    optimizers = create_optimizers(straight, config)
    steps(straight, optimizers, range(3))
    arrays = {n: t.numpy().copy() for n, t in state_tensors(straight, optimizers).items()}
    weights = {n: p.detach().numpy().copy() for n, p in straight.named_parameters()}
    steps(straight, optimizers, range(3, 6))

    resumed = decoder()
    resumed.load_weights(weights)
    optimizers = create_optimizers(resumed, config)
    load_state_tensors(resumed, optimizers, arrays)
    steps(resumed, optimizers, range(3, 6))
    for (n, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy(), err_msg=n)
    assert {n.split("/")[0] for n in arrays} == {"exp_avg", "exp_avg_sq", "step"} | (
        {"momentum_buffer"} if name == "muon" else set()
    )
