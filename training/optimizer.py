"""Optimizers, and their state by parameter name."""

import numpy as np
import torch
from torch import nn

from common.device import PRECISIONS, Precision
from common.errors import UserError
from training.config import OptimizerConfig
from training.muon import Muon
from training.sharding import part_like


def create_optimizers(
    model: nn.Module, config: OptimizerConfig, precision: Precision = PRECISIONS["bf16"]
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon in front of it where it is asked for. Each group has its peak in "peak_lr".

    precision: Muon multiplies in bfloat16 where the run multiplies in 16 bits, else in float32.

    Weight decay is for the matrices that multiply; vectors and embeddings have none. Muon takes
    the matrices inside the layers: the embedding and the output projection are tables of rows, not
    maps between hidden states (Jordan et al., 2024).
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden, output, rest = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("layers."):
            hidden.append(parameter)
        elif parameter.dim() == 2 and id(parameter) not in tables and name != "pos_encoding":
            output.append(parameter)
        else:
            rest.append(parameter)
    optimizers = []
    if config.name == "muon":
        muon = Muon(
            hidden,
            products=torch.bfloat16 if precision.products.itemsize == 2 else torch.float32,
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        muon.param_groups[0]["peak_lr"] = config.muon_lr
        optimizers.append(muon)
    decayed = output if config.name == "muon" else hidden + output
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for group in adamw.param_groups:
        group["peak_lr"] = config.lr
    return [*optimizers, adamw]


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Sets every group to its peak times `factor`. Returns AdamW's learning rate."""
    lr = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["peak_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):  # which a CUDA graph reads
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
    return lr


def state_tensors(model: nn.Module, optimizers) -> dict[str, torch.Tensor]:
    """The optimizers' state, where it is, named `exp_avg/<parameter>` and so on."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(model: nn.Module, optimizers, arrays: dict[str, np.ndarray]):
    """Puts back what `state_tensors` gave. Raises UserError where it does not fit the model."""
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, array in arrays.items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters.get(parameter_name)
        value = torch.from_numpy(array).clone()
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            raise UserError(
                f"optimizer.safetensors: {name} of shape {tuple(value.shape)} does not fit the "
                "model; use another checkpoint"
            )
        # fused optimizers keep even their step count on the device
        dtype = parameter.dtype if value.dim() else value.dtype  # the run may go on in float64
        value = value.to(parameter.device, dtype)
        value = part_like(value, parameter) if value.dim() else value
        owner[id(parameter)].state[parameter][key] = value
