"""benchmarks/time_to_quality.py: what it reads from a run, and that both sides are judged alike."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.time_to_quality import STEPS, learning_rate, summary, validation_loss
from common.device import PRECISIONS
from data.batches import Examples
from data.config import DataConfig
from data.dataset import prepare
from evaluation.validation import evaluate
from model.config import ModelConfig
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from tests.helpers import TEXT


def test_the_time_of_a_run_is_the_sum_over_its_log_entries():
    records = [
        {"step": 1, "tokens": 100, "speed/tokens_per_second": 50.0},
        {"step": 10, "tokens": 1000, "speed/tokens_per_second": 300.0},
        {"step": 10, "loss/val": 1.5},
    ]
    assert summary(records) == {"seconds": 5.0, "loss": 1.5, "steps": 10}


def test_nanogpts_learning_rate_rises_and_falls_to_a_tenth():
    assert learning_rate(0) == pytest.approx(1e-3 / 101)
    assert learning_rate(100) == pytest.approx(1e-3)
    assert learning_rate(1050) == pytest.approx(5.5e-4)
    assert learning_rate(STEPS) == pytest.approx(1e-4)


def test_a_peers_model_is_judged_by_the_same_targets(tmp_path):
    class Peer(torch.nn.Module):  # takes ids without the special tokens, and gives the mean loss
        def forward(self, ids, targets):
            logits = ours(ids + first)[..., first:]
            return logits, torch.nn.functional.cross_entropy(logits.mT, targets)

    data = prepare(
        DataConfig(path=str(TEXT), tokenizer="char", cache_dir=str(tmp_path)), lambda line: None
    )
    first, size = 4, data.tokenizer.vocab_size
    torch.manual_seed(0)
    ours = TransformerDecoder.from_config(ModelConfig(size, 16, 2, 1, 32, 64, 0.0)).double()
    with torch.no_grad():  # what the peer has no place for is never predicted
        ours.output.bias[:first] = -math.inf
    running = SimpleNamespace(signal=0)
    expected = evaluate(
        LossModule(ours), Examples(data.val, 64, 0), 7, 0, PRECISIONS["fp64"], running
    )
    assert validation_loss(Peer(), data, first) == pytest.approx(expected["loss/val"], rel=1e-6)
