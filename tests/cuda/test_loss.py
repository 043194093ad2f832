"""model/loss.py on a GPU beside cross-entropy in float64: chunks, targets, bias, precisions."""

import pytest
import torch
import torch.nn.functional as F

from model import loss as module

SIZES = (1500, 64, 1003)  # rows, width, vocabulary


def problem(bias: bool):
    torch.manual_seed(0)
    N, C, V = SIZES
    output = torch.nn.Linear(C, V, bias=bias).cuda()
    x = torch.randn(N, C, device="cuda", requires_grad=True)
    return x, output, torch.randint(0, V, (N,), device="cuda")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
def test_loss_and_gradients(bias, compiled, dtype, bound, monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 640)  # the last chunk has 220
    x, output, targets = problem(bias)
    form = torch.compile(module.fused_softmax_loss) if compiled else module.softmax_loss
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = module.output_loss(x, output, targets, form)
    loss.backward()
    found = [loss.detach(), x.grad, output.weight.grad] + ([output.bias.grad] if bias else [])
    exact = output.double()
    for parameter in (x, *exact.parameters()):
        parameter.grad = None
    wide = x.detach().double().requires_grad_()
    expected = F.cross_entropy(exact(wide), targets, reduction="sum")
    expected.backward()
    right = [expected.detach(), wide.grad, exact.weight.grad] + ([exact.bias.grad] if bias else [])
    for a, b in zip(found, right, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() < bound * b.norm()


def test_fp16_does_not_overflow_where_a_target_is_frequent():
    output = torch.nn.Linear(64, 97).cuda()
    x = torch.ones(65_536, 64, device="cuda", requires_grad=True)
    targets = torch.full((65_536,), 3, device="cuda")
    with torch.autocast("cuda", torch.float16):
        module.output_loss(x, output, targets, module.softmax_loss).backward()
    gradient = output.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 60_000


def test_the_compiled_softmax_moves_less():
    """Kernels between the two products of a chunk: a few, where operation by operation many."""
    x, output, targets = problem(bias=False)
    counts = []
    for form in (torch.compile(module.fused_softmax_loss), module.softmax_loss):
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
                module.output_loss(x, output, targets, form).backward()
                torch.cuda.synchronize()
        counts.append(sum(e.count for e in p.key_averages()))
    assert counts[0] < counts[1], counts
