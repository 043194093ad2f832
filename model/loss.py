"""The loss of training: cross-entropy summed over the tokens to predict.

    loss_module = LossModule(model)
    loss = loss_module(ids, targets, target_indices) / number_of_targets

The loop divides by the number of targets of the whole optimizer step, so that accumulation and
several processes give the mean over all its tokens, and not a mean of means.

The output projection is part of it. With a large vocabulary the logits are the largest tensor of a
step by far (4,096 tokens x 9,500 entries: 156 MB in float32, and as much for their gradient), and
moving them costs more than computing them. So they are made, used and dropped a chunk of rows at a
time, and the gradient, which needs nothing but the same logits, is made with them.

Shapes: B sequences, T tokens, C = d_model, N targets, V = vocab_size.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from model.transformer_full import TransformerDecoder


class LossModule(nn.Module):
    """A decoder and its loss in one module: what the loop calls, and what gets compiled or wrapped.

    A wrapper for several devices acts in `forward` alone: with a method of the wrapped model the
    gradients of DistributedDataParallel would stay unsynchronised without a word.
    """

    def __init__(self, model: "TransformerDecoder"):
        super().__init__()
        self.model = model
        self.softmax_loss: SoftmaxLoss = softmax_loss

    def compile_softmax(self):
        """Has the part between the products compiled: a GPU then reads the logits twice, not ten
        times. Any number of rows is one compilation, whichever comes first."""
        compiled = torch.compile(fused_softmax_loss)

        def softmax_loss(logits, target, with_gradient: bool):
            if len(logits) > 1:  # a size of 1 is always a constant
                torch._dynamo.mark_dynamic(logits, 0)
                torch._dynamo.mark_dynamic(target, 0)
            return compiled(logits, target, with_gradient)

        self.softmax_loss = softmax_loss

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        target_indices: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood in nats, summed over `targets` (N,): float32 or float64, scalar.

        ids (B, T); target_indices (N,) are the flat places that predict the targets, None for all.
        Logits exist only there. documents: as in the decoder's `forward`.
        """
        x = self.model.hidden(ids, documents=documents).flatten(0, 1)  # (B T, C)
        if target_indices is not None:
            x = x.index_select(0, target_indices)  # (N, C)
        return output_loss(x, self.model.output, targets, self.softmax_loss)


@torch.compiler.disable  # it makes its own gradient, chunk by chunk: there is nothing to derive
def output_loss(
    x: torch.Tensor, output: nn.Linear, targets: torch.Tensor, softmax_loss: "SoftmaxLoss"
) -> torch.Tensor:
    """The summed loss of hidden states (N, C) in front of the output projection."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(
                x, output.weight, output.bias, targets, dtype, softmax_loss
            )
        loss, _ = linear_cross_entropy(
            x, output.weight, output.bias, targets, dtype, softmax_loss, with_gradients=False
        )
        return loss


class LinearCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")`, chunk by chunk."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, dtype, softmax_loss):
        loss, gradients = linear_cross_entropy(
            x, weight, bias, targets, dtype, softmax_loss, with_gradients=True
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, factor):  # pyrefly: ignore[bad-override], of one output one gradient comes
        scaled = (g if g is None else g * factor.to(g.dtype) for g in ctx.saved_tensors)
        return *scaled, None, None, None


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    dtype: torch.dtype,
    softmax_loss: "SoftmaxLoss",
    with_gradients: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The summed loss of x (N, C), weight (V, C), bias (V,), targets (N,), and its gradients.

    Products are taken in `dtype`. The gradients of x, weight and bias are the softmax less the
    one-hot targets times the other factor of each product; [] if they are not wanted.
    """
    rows = chunk_rows(x.device, len(weight), len(x))
    low_x, low_weight = x.to(dtype), weight.to(dtype)  # low precision
    low_bias = None if bias is None else bias.to(dtype)
    loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    dx = torch.empty_like(x) if with_gradients else None
    dweight = dbias = None
    for start in range(0, max(1, len(x)), rows):  # once at least, for gradients of 0
        chunk, target = low_x[start : start + rows], targets[start : start + rows, None]
        logits = F.linear(chunk, low_weight, low_bias)  # (rows, V)
        share, dlogits = softmax_loss(logits, target, with_gradients)
        loss += share
        if dx is None or dlogits is None:
            continue
        if bias is not None:
            dbias = add_up(dbias, dlogits.sum(0, dtype=loss.dtype), bias)
        dlogits = dlogits.to(dtype)
        dx[start : start + rows] = dlogits @ low_weight
        dweight = add_up(dweight, wide_product(dlogits.T, chunk), weight)
    return loss, [] if dx is None else [dx, dweight, dbias]


def add_up(total: torch.Tensor | None, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """total + part, in place; the first part begins a total of the dtype of `like`."""
    return part.to(like.dtype) if total is None else total.add_(part)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for a gradient that sums over all tokens: in fp16 it could pass the largest, 65,504.

    On CUDA the result of fp16 and bf16 comes in float32, in which such products are summed anyway.
    """
    if a.dtype in (torch.float16, torch.bfloat16) and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


# logits (rows, V) and targets (rows, 1) to their summed loss, in float32 at least, and the
# gradient of the logits where it is wanted, in the dtype of either
SoftmaxLoss = Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]


def softmax_loss(logits, target, with_gradient: bool):
    """The cross-entropy of a chunk, operation by operation: one exponential a logit."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, wanted = logits.amax(-1), logits.gather(1, target).sum()
    P = logits.softmax(-1)
    # minus the log of the target's probability, by way of the largest one's, which is never 0;
    # log_softmax and then exp would take two exponentials
    loss = (largest - P.amax(-1).log()).sum() - wanted
    if not with_gradient:
        return loss, None
    # of a number, not of a tensor: that one's deterministic form on CUDA would copy from the host
    return loss, P.scatter_(1, target, -1.0, reduce="add")


def fused_softmax_loss(logits, target, with_gradient: bool):
    """`softmax_loss` for torch.compile, which makes two passes over the logits of it.

    One takes the largest logit and the sum of the exponentials of each row, one writes the
    gradient. Targets are found by comparison: a scatter would be a pass of its own.
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = values.amax(-1, keepdim=True)
    exponentials = (values - largest).exp()
    total = exponentials.sum(-1, keepdim=True)
    loss = (total.log() + largest - values.gather(1, target)).sum()
    if not with_gradient:
        return loss, None
    hot = torch.arange(logits.shape[-1], device=logits.device) == target  # (rows, V)
    return loss, (exponentials / total - hot.to(values.dtype)).to(logits.dtype)


def chunk_rows(device: torch.device, vocab_size: int, count: int) -> int:
    """Rows whose logits a CPU's caches hold; on a GPU, few enough for its memory.

    But at least 256: each chunk adds to the gradient of the whole output matrix. On a GPU they are
    about equal, in 128s, the tiles of its products.
    """
    if device.type != "cuda":
        return max(256, 2**22 // vocab_size)
    memory = torch.cuda.get_device_properties(device).total_memory
    return equal_rows(count, max(256, min(2**29, memory // 64) // vocab_size))


def equal_rows(count: int, limit: int) -> int:
    """Rows of about equal chunks of at most `limit` rows, a multiple of 128, that make `count`."""
    if count <= limit:
        return max(1, count)
    chunks = math.ceil(count / max(128, limit // 128 * 128))
    return math.ceil(count / chunks / 128) * 128
