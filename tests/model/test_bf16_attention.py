"""Attention: what is written out equals PyTorch's own, and is taken where it should be."""

import pytest
import torch
import torch.nn.functional as F

from model import bf16_attention as module
from model.bf16_attention import BF16Attention
from model.transformer_full import attention


def heads(B, H, T, D, dtype, seed=0):
    """Q, K, V and a gradient, laid out as the decoder has them: (B, T, H, D), transposed."""
    torch.manual_seed(seed)
    made = [torch.randn(B, T, H, D, dtype=torch.float64).to(dtype).transpose(1, 2) for _ in "QKVg"]
    return [x.requires_grad_() for x in made[:3]], made[3]


def passes(function, inputs, gradient):
    """Its output, and the gradients of its inputs."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, gradient.to(y.dtype))]


def own(Q, K, V):
    return F.scaled_dot_product_attention(Q, K, V, is_causal=True)


@pytest.mark.parametrize("T", [1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("scores", [1, 2**15, 2**22])
def test_equals_pytorchs_in_float64(T, scores, monkeypatch):
    """However it is cut into blocks of heads and of queries."""
    monkeypatch.setattr(module, "MAX_SCORES", scores)
    inputs, gradient = heads(2, 3, T, 8, torch.float64)
    for ours, theirs in zip(
        passes(BF16Attention.apply, inputs, gradient), passes(own, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_by_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    inputs, _ = heads(1, 2, 7, 3, torch.float64)
    assert torch.autograd.gradcheck(BF16Attention.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_types_are_as_close_as_pytorchs(dtype):
    """To float32 on the same numbers: at most twice as far off as PyTorch's kernel in that type."""
    inputs, gradient = heads(2, 2, 200, 32, dtype)
    exact = passes(own, [x.detach().float().requires_grad_() for x in inputs], gradient.float())
    for ours, theirs, true in zip(
        passes(BF16Attention.apply, inputs, gradient),
        passes(own, inputs, gradient),
        exact,
        strict=True,
    ):
        assert ours.dtype == dtype
        assert (ours - true).norm() <= 2 * (theirs - true).norm()


def test_a_token_sees_nothing_after_it():
    inputs, _ = heads(1, 2, 150, 8, torch.bfloat16)
    before = BF16Attention.apply(*inputs)
    with torch.no_grad():
        for x in inputs:
            x[:, :, 140:] = 100.0
    assert torch.equal(BF16Attention.apply(*inputs)[:, :, :140], before[:, :, :140])


@pytest.mark.parametrize("has_bf16", [True, False])
def test_which_is_taken(has_bf16, monkeypatch):
    """Ours in bf16 on a CPU that has it; else PyTorch's, and with a mask or dropout always."""
    monkeypatch.setattr(module, "HAS_FAST_PRODUCTS", has_bf16)
    mask = torch.ones(5, 5, dtype=torch.bool)

    def taken(dtype, *how):
        inputs, _ = heads(1, 2, 5, 4, dtype)
        y = attention(*inputs, *how)
        assert torch.isfinite(y).all()
        return "bf16attention" in str(y.grad_fn).lower().replace("_", "")  # or the operator

    assert not taken(torch.float32, None, 0.0, True)
    with torch.autocast("cpu", torch.float16):
        assert not taken(torch.float16, None, 0.0, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(torch.bfloat16, None, 0.0, True) == has_bf16
        assert not taken(torch.bfloat16, mask, 0.0, False)
        assert not taken(torch.bfloat16, None, 0.5, True)


def test_a_gradient_that_is_not_contiguous():
    inputs, _ = heads(2, 2, 9, 8, torch.float64)
    gradient = torch.ones((), dtype=torch.float64).expand(2, 2, 9, 8)
    for ours, theirs in zip(
        passes(BF16Attention.apply, inputs, gradient), passes(own, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_as_an_operator_it_is_the_same_bit_for_bit(monkeypatch):
    monkeypatch.setattr(module, "attend", BF16Attention.apply)
    inputs, gradient = heads(2, 2, 150, 8, torch.bfloat16)
    expected = passes(BF16Attention.apply, inputs, gradient)
    module.become_operator()
    operator = module.attend
    assert operator != BF16Attention.apply
    module.become_operator()  # which is no second one
    assert module.attend is operator
    for ours, theirs in zip(passes(operator, inputs, gradient), expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(operator, inputs)
