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

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        target_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood in nats, summed over `targets` (N,): float32 or float64, scalar.

        ids (B, T); target_indices (N,) are the flat places that predict the targets, None for all.
        Logits exist only there.
        """
        x = self.model.hidden(ids).flatten(0, 1)  # (B T, C)
        if target_indices is not None:
            x = x.index_select(0, target_indices)  # (N, C)
        return output_loss(x, self.model.output, targets)


@torch.compiler.disable  # it makes its own gradient, chunk by chunk: there is nothing to derive
def output_loss(x: torch.Tensor, output: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of hidden states (N, C) in front of the output projection."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(x, output.weight, output.bias, targets, dtype)
        return linear_cross_entropy(x, output.weight, output.bias, targets, dtype, None)


class LinearCrossEntropy(torch.autograd.Function):
    """`F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")`, chunk by chunk."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets, dtype):
        dbias = None if bias is None else torch.zeros_like(bias)
        gradients = [torch.empty_like(x), torch.zeros_like(weight), dbias]
        loss = linear_cross_entropy(x, weight, bias, targets, dtype, gradients)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, factor):  # pyrefly: ignore[bad-override], of one output one gradient comes
        dx, dweight, dbias = ctx.saved_tensors
        scaled = (g if g is None else g * factor.to(g.dtype) for g in (dx, dweight, dbias))
        return *scaled, None, None


def linear_cross_entropy(x, weight, bias, targets, dtype, gradients) -> torch.Tensor:
    """The summed loss of x (N, C), weight (V, C), targets (N,); products are taken in `dtype`.

    gradients: None, or [dx, dweight, dbias] to fill: the softmax less the one-hot targets, times
    the other factor of each product.
    """
    wide = torch.promote_types(dtype, torch.float32)  # of everything but the products
    rows = chunk_rows(x.device, len(weight))
    low_x, low_weight = x.to(dtype), weight.to(dtype)  # low precision
    low_bias = None if bias is None else bias.to(dtype)
    loss = torch.zeros((), dtype=wide, device=x.device)
    for start in range(0, len(x), rows):
        chunk, target = low_x[start : start + rows], targets[start : start + rows, None]
        logits = F.linear(chunk, low_weight, low_bias).to(wide)  # (rows, V)
        largest, wanted = logits.amax(-1), logits.gather(1, target).sum()
        P = logits.softmax(-1)
        # minus the log of the target's probability, by way of the largest one's, which is never 0;
        # one exponential a logit, where log_softmax and then exp take two
        loss += (largest - P.amax(-1).log()).sum() - wanted
        if gradients is None:
            continue
        dx, dweight, dbias = gradients
        dlogits = P.scatter_add_(1, target, -torch.ones_like(target, dtype=wide))
        if dbias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(dtype)
        dx[start : start + rows] = dlogits @ low_weight
        dweight += dlogits.T @ chunk
    return loss


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Rows whose logits a CPU's caches hold; on a GPU, few enough for its memory.

    But at least 256: each chunk adds to the gradient of the whole output matrix.
    """
    return max(256, (2**22 if device.type == "cpu" else 2**28) // vocab_size)
