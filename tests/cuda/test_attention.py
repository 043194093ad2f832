"""PyTorch's four attention kernels on this GPU, and ours on top of them, beside float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import ModelConfig
from model.cuda_attention import CUDNN_FIRST, use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder

B, H, D = 2, 3, 64


def heads(dtype, *lengths):
    """(B, H, T, D) for each length, with gradients."""
    torch.manual_seed(0)
    return [torch.randn(B, H, T, D).to("cuda", dtype).requires_grad_() for T in lengths]


def passes(inputs, gradient, dtype, **how):
    """Output and gradients, in float64."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = F.scaled_dot_product_attention(*inputs, **how)
    y.backward(gradient.to(dtype))
    return [x.double() for x in (y.detach(), *(x.grad for x in inputs))]


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        # with respect to Q and K it is 0 for one token, but for the order of two sums
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-3


@pytest.mark.parametrize("backend", CUDNN_FIRST, ids=lambda b: b.name)
@pytest.mark.parametrize("T", [1024, 333, 1])
def test_each_kernel_is_attention(backend, T):
    inputs = heads(torch.bfloat16, T, T, T)
    gradient = torch.randn(B, H, T, D, device="cuda")
    expected = passes(inputs, gradient, torch.float64, is_causal=True)
    try:
        with sdpa_kernel(backend):
            found = passes(inputs, gradient, torch.bfloat16, is_causal=True)
    except RuntimeError as error:
        if not re.search("No available kernel|No viable backend", str(error)):
            raise
        pytest.skip(f"{backend.name} does not take T = {T} on this GPU")
    check(found, expected)


@pytest.mark.parametrize(
    "backend", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], ids=lambda b: b.name
)
def test_a_decode_with_a_mask(backend):
    """One query a row, and rows that have read 7 and 128 of 128 keys."""
    Q, K, V = heads(torch.bfloat16, 1, 128, 128)
    mask = torch.arange(128, device="cuda") < torch.tensor([[7], [128]], device="cuda")
    mask = mask[:, None, None]
    with torch.no_grad(), sdpa_kernel(backend):
        found = F.scaled_dot_product_attention(Q, K, V, mask)
        expected = F.scaled_dot_product_attention(*(x.double() for x in (Q, K, V)), mask)
    check([found.double()], [expected])


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("length", [256, 333])
def test_a_decoder_with_it_is_the_plain_one(cudnn, length):
    """Loss and gradients in bf16, beside the plain decoder in float64."""
    models = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        config = ModelConfig(97, 128, 2, 2, 256, 512, 0.0, activation="gelu")
        models.append(TransformerDecoder.from_config(config, dtype).to("cuda"))
    plain, ours = models
    ours.load_state_dict(plain.state_dict())
    use_cuda_attention(ours, cudnn)
    ids = torch.randint(0, 97, (4, length), device="cuda")
    targets = torch.randint(0, 97, (4 * length,), device="cuda")
    expected = LossModule(plain)(ids, targets)
    with torch.autocast("cuda", torch.bfloat16):
        found = LossModule(ours)(ids, targets)
    for loss in (expected, found):
        loss.backward()
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        # that of K's bias is 0: the softmax does not see what all keys have in common
        assert (a.grad - b.grad).norm() < 5e-2 * a.grad.norm() + 1e-3, name
