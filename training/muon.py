"""torch.optim.Muon with all matrices of one shape updated at once, and in float32 where asked.

One by one, a model of 12 layers has 1,656 kernel launches an update, most of them on matrices too
small to keep a GPU, or the cores of a CPU, busy. Batched it has 56. PyTorch's own always multiplies
in bfloat16, which many CPUs only emulate.

Shapes: n matrices of R rows and C columns.
"""

import math
from collections import defaultdict

import torch
from torch.distributed.tensor import DTensor

from training.sharding import on_whole_matrices


class Muon(torch.optim.Muon):
    """torch.optim.Muon.

    products: the dtype in which matrices are orthogonalised.
    found_inf: None, or a number on the device, as torch.optim.AdamW(fused=True) takes it: where it
    is not 0 the update is skipped, and nobody waits to look at it. lr may be a tensor.
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, params, products: torch.dtype = torch.bfloat16, **options):
        super().__init__(params, **options)
        self.products = products

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("closure: not supported; call step() alone")
        for group in self.param_groups:
            self.update_in_batches(group)

    def update_in_batches(self, group: dict):
        """What torch.optim.Muon does for each matrix by itself."""
        if group["adjust_lr_fn"] != "match_rms_adamw":
            raise ValueError(f"adjust_lr_fn = {group['adjust_lr_fn']}: only match_rms_adamw")
        parameters, gradients, momenta = [], [], []
        self._init_group(group, parameters, gradients, momenta)
        lr, skipped = group["lr"], None
        if self.found_inf is not None:
            skipped = self.found_inf != 0
            lr = torch.where(skipped, 0.0, lr)
        if isinstance(parameters[0], DTensor):
            self.update_parts(group, lr, skipped, parameters, gradients, momenta)
            return
        by_shape = defaultdict(list)
        for entry in zip(parameters, gradients, momenta, strict=True):
            R, C = entry[0].shape
            by_shape[min(R, C), max(R, C)].append(entry)
        for shape, entries in by_shape.items():
            self.update_batch(group, lr, skipped, shape, *zip(*entries, strict=True))

    def update_batch(
        self,
        group: dict,
        lr: float | torch.Tensor,
        skipped: torch.Tensor | None,
        shape: tuple[int, int],
        parameters,
        gradients,
        momenta,
    ):
        """Moves parameters of one shape (R, C), R <= C; some are stored as (C, R)."""
        tall = [p.shape != shape for p in parameters]
        G, M = (  # (n, R, C)
            torch.stack([x.T if t else x for x, t in zip(matrices, tall, strict=True)])
            for matrices in (gradients, momenta)
        )
        if skipped is not None:
            G = torch.where(skipped, M, G)  # which leaves the momentum as it is
        M.lerp_(G, 1 - group["momentum"])
        update = G.lerp(M, group["momentum"]) if group["nesterov"] else M
        update = orthogonalise(update.to(self.products), *newton_schulz(group))
        update = update.to(G.dtype) * (-0.2 * math.sqrt(shape[1]) * lr)
        torch._foreach_copy_(momenta, turned(M, tall))
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, turned(update, tall))

    def update_parts(
        self,
        group: dict,
        lr: float | torch.Tensor,
        skipped: torch.Tensor | None,
        parameters: list[DTensor],
        gradients: list[DTensor],
        momenta: list[DTensor],
    ):
        """Moves parameters of which each process has some rows.

        All but orthogonalising is number by number, and done on those rows. That takes whole
        matrices, each of which one process gathers.
        """
        P, G, M = (
            [tensor.to_local() for tensor in tensors]
            for tensors in (parameters, gradients, momenta)
        )
        if skipped is not None:
            G = [torch.where(skipped, m, g) for m, g in zip(M, G, strict=True)]
        torch._foreach_lerp_(M, G, 1 - group["momentum"])
        updates = torch._foreach_lerp(G, M, group["momentum"]) if group["nesterov"] else M

        def orthogonalised(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
            return orthogonalise_each(matrices, *newton_schulz(group))

        updates = on_whole_matrices(
            orthogonalised,
            [update.to(self.products) for update in updates],
            parameters,
            [min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape)) for p in parameters],
        )
        updates = [
            update.to(p.dtype) * (-0.2 * math.sqrt(max(whole.shape)) * lr)
            for update, p, whole in zip(updates, P, parameters, strict=True)
        ]
        torch._foreach_mul_(P, 1 - lr * group["weight_decay"])
        torch._foreach_add_(P, updates)


def newton_schulz(group: dict) -> tuple[tuple[float, float, float], int, float]:
    """What `orthogonalise` takes besides a batch."""
    return group["ns_coefficients"], group["ns_steps"], group["eps"]


def orthogonalise_each(
    matrices: list[torch.Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> list[torch.Tensor]:
    """`orthogonalise` of matrices of any shapes, those of one shape together."""
    by_shape = defaultdict(list)
    for place, matrix in enumerate(matrices):
        by_shape[min(matrix.shape), max(matrix.shape)].append(place)
    results = [*matrices]
    for shape, places in by_shape.items():
        tall = [matrices[i].shape != shape for i in places]
        batch = torch.stack(
            [matrices[i].T if t else matrices[i] for i, t in zip(places, tall, strict=True)]
        )
        batch = orthogonalise(batch, coefficients, steps, eps)
        for place, matrix in zip(places, turned(batch, tall), strict=True):
            results[place] = matrix
    return results


def turned(batch: torch.Tensor, tall: list[bool]) -> list[torch.Tensor]:
    """The matrices of a batch (n, R, C), those that are tall as (C, R)."""
    return [x.T if t else x for x, t in zip(batch.unbind(), tall, strict=True)]


def orthogonalise(
    batch: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """About U V^T of each matrix U S V^T of a batch (n, R, C), R <= C.

    Newton-Schulz iterations of a quintic polynomial. Jordan et al. (2024), "Muon".
    """
    a, b, c = coefficients
    X = batch / batch.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        A = X @ X.mT  # (n, R, R)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X
