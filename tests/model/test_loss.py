"""model/loss.py against torch.nn.functional.cross_entropy, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 1003])
def test_the_fused_form_is_the_plain_one(dtype, vocabulary):
    torch.manual_seed(0)
    logits = (5 * torch.randn(37, vocabulary)).to(dtype)
    target = torch.randint(0, vocabulary, (37, 1))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, target[:, 0], reduction="sum")
    expected.backward()
    wide = torch.promote_types(dtype, torch.float32)
    error = 10 * torch.finfo(wide).eps
    for form in (module.softmax_loss, module.fused_softmax_loss):
        loss, gradient = form(logits, target, True)
        assert loss.dtype == wide and form(logits, target, False)[1] is None
        torch.testing.assert_close(form(logits, target, False)[0], loss, rtol=0, atol=0)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=error, atol=0)
        allowed = torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=allowed, atol=1e-6)
    assert gradient.dtype == dtype, "the fused form writes what the products read"


def test_fp16_does_not_overflow_where_a_target_is_frequent():
    """65,536 rows of one target: the sum passes fp16's largest number, 65,504."""
    model = decoder(torch.float32)
    x = torch.ones(65_536, 16, requires_grad=True)
    targets = torch.full((65_536,), 3)
    with torch.autocast("cpu", torch.float16):
        module.output_loss(x, model.output, targets, module.softmax_loss).backward()
    gradient = model.output.weight.grad
    assert gradient.isfinite().all()
    low = F.linear(torch.ones(1, 16).half(), model.output.weight.half(), model.output.bias.half())
    P = low[0].float().softmax(0).double()
    P[3] -= 1
    torch.testing.assert_close(gradient[:, 5].double(), 65_536 * P, rtol=2e-3, atol=0)
    assert gradient.abs().max() > 60_000


@pytest.mark.parametrize("count", [1, 5, 128, 4097, 16_384, 65_536, 65_537])
@pytest.mark.parametrize("limit", [256, 5336, 10_672])
def test_chunks_on_a_gpu_are_about_equal(count, limit):
    rows = module.equal_rows(count, limit)
    sizes = [min(rows, count - start) for start in range(0, count, rows)]
    assert sum(sizes) == count and max(sizes) <= limit
    assert len(sizes) == 1 or rows % 128 == 0
    fewest = -(-count // (limit // 128 * 128))
    assert len(sizes) <= max(1, fewest)
    if len(sizes) > 1:  # the last makes up for the rounding of the others
        assert max(sizes) - min(sizes) < 128 * len(sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_the_output_gradient_is_summed_in_float32(dtype):
    """Shapes and dtypes alone: there need be no GPU."""
    with FakeTensorMode():
        a, b = (torch.empty(s, dtype=dtype, device="cuda") for s in ((30, 20), (20, 7)))
        product = module.wide_product(a, b)
    assert (product.shape, product.dtype) == ((30, 7), torch.float32)


def test_no_target_is_a_loss_of_0_with_gradients_of_0():
    model = decoder(torch.float32)
    x = torch.ones(0, 16, requires_grad=True)
    loss = module.output_loss(x, model.output, torch.ones(0, dtype=int), module.softmax_loss)
    loss.backward()
    assert loss.item() == 0
    assert not model.output.weight.grad.any() and not model.output.bias.grad.any()
