"""model/loss.py against torch.nn.functional.cross_entropy, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from model import loss as module
from model.config import ModelConfig
from model.loss import LossModule
from model.transformer_full import TransformerDecoder


def decoder(dtype, **options):
    torch.manual_seed(0)
    config = ModelConfig(23, 16, 2, 1, 32, 8, 0.0, **options)
    return TransformerDecoder.from_config(config, dtype)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"bias": False}])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_it_is_cross_entropy_with_its_gradients(options, chunk_rows, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: chunk_rows)
    model = decoder(torch.float64, **options)
    ids = torch.randint(0, 23, (3, 8))
    target_indices = torch.tensor([0, 3, 4, 9, 17, 23])
    targets = torch.randint(0, 23, (6,))
    expected = (
        F.cross_entropy(model(ids, target_indices=target_indices), targets, reduction="sum") / 7
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = LossModule(model)(ids, targets, target_indices) / 7
    found.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(
            LossModule(model)(ids, targets, target_indices) / 7, expected.detach()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_give_nearly_the_same(dtype):
    model = decoder(torch.float32)
    ids, targets = torch.randint(0, 23, (3, 8)), torch.randint(0, 23, (24,))
    exact = LossModule(model)(ids, targets)
    with torch.autocast("cpu", dtype):
        low = LossModule(model)(ids, targets)
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() != exact.item(), "nothing was in low precision"
    assert low.item() == pytest.approx(exact.item(), rel=0.01)
    assert model.output.weight.grad.dtype == torch.float32
