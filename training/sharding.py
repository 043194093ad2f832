"""A model of which each process holds a part: PyTorch's FSDP2, for what does not fit one card.

    shards = Shards(loss_module, device, precision, processes)  # before the optimizers are made
    loss_module(*inputs).backward()                             # by all processes, equally often
    tensors = shards.gather(tensors)                            # whole, in the first process

Every parameter is cut by rows, and so are its gradient and the optimizer's state: a parameter is a
DTensor, of which a process has its rows. The parts of a layer are put together before its forward
pass and again before its backward pass, and dropped after each; then each process gets its rows of
the gradient, summed over processes. Rajbhandari et al. (2020), "ZeRO"; Zhao et al. (2023), "FSDP".

The sum over processes is the library's, in an order that depends on their number: a run has the
same bits on as many processes, and losses that differ by rounding on others.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common.cli import explain_error, is_out_of_memory
from common.device import Precision
from common.errors import UserError
from common.processes import Processes, all_gather
from model.loss import LossModule
from model.transformer_full import TransformerDecoder


class Shards:
    """Cuts the parameters of `loss_module`, which may lie in host memory, to parts on `device`.

    Products in bf16 have layers gathered in bf16, so that no copy of a weight outlives its layer,
    as those of autocast would. Norms are gathered in float32, and so is what belongs to no layer:
    then all numbers are those of autocast.
    """

    def __init__(
        self, loss_module: LossModule, device: torch.device, precision: Precision, group: Processes
    ):
        self.loss_module, self.processes = loss_module, group
        self.device, self.precision = device, precision
        self.mesh = init_device_mesh(device.type, (group.count,))
        as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)  # what autocast does as it is
        in_layers = as_stored
        if precision.products != precision.weights:
            in_layers = MixedPrecisionPolicy(
                precision.products, reduce_dtype=precision.weights, cast_forward_inputs=False
            )
        for layer in loss_module.model.layers:
            norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
            for norm in norms if in_layers is not as_stored else ():
                fully_shard(norm, mesh=self.mesh, mp_policy=as_stored)
            fully_shard(layer, mesh=self.mesh, mp_policy=in_layers)
        # the rest: the output projection is read outside of its own forward, and may be tied
        fully_shard(loss_module, mesh=self.mesh, mp_policy=as_stored)
        for module in self.modules():
            # the loss is divided by all targets already; without the second, gloo's sums are wrong
            # (https://github.com/pytorch/pytorch/issues/162338)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def modules(self) -> list[FSDPModule]:
        """The modules whose parameters are gathered together."""
        return [m for m in self.loss_module.modules() if isinstance(m, FSDPModule)]

    def cut(self):
        """Makes all parameters of the model those that are cut: a forward pass without a backward
        pass leaves some of them whole."""
        for module in self.modules():
            module.reshard()

    def add_up(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number, (), over all processes, in their order."""
        found = value.new_empty(self.processes.count)
        all_gather(found, value.reshape(1))
        return found.sum()

    def gather(
        self, tensors: dict[str, torch.Tensor], owners: dict[str, int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Whole tensors in host memory: those of which this process is the owner.

        owners: processes by tensor; None: the first owns all. Called by all with the same names.
        Each has one whole tensor on its device at a time. Raises MemoryError where the host has no
        more, but only at the end: the others count on this process. Raises UserError where the
        device has not: nobody can go on then.
        """
        found: dict[str, torch.Tensor] = {}
        failure = None
        for name, tensor in tensors.items():
            part = tensor.detach()
            try:
                gathered = whole(part)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # no save that fails, after which training goes on: the others wait for this part
                raise UserError(f"{name}: {explain_error(error, 'train.py')}") from None
            owner = owners[name] if owners else 0
            if owner == self.processes.index and not failure:
                try:
                    found[name] = gathered.to("cpu", copy=gathered is part)
                except (MemoryError, RuntimeError) as error:
                    failure = error
                    found.clear()
        if failure:
            raise MemoryError(str(failure))
        return found

    def whole_model(self) -> TransformerDecoder | None:
        """The decoder as it is now, whole, for the first process to write samples; None in others.

        On its device where the weights take no more than half of what is free, else on the CPU.
        """
        self.cut()
        weights = self.gather(dict(self.loss_module.model.named_parameters()))
        if not self.processes.is_first:
            return None
        device, size = torch.device("cpu"), sum(tensor.nbytes for tensor in weights.values())
        if self.device.type == "cuda" and 2 * size <= torch.cuda.mem_get_info(self.device)[0]:
            device = self.device
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        config, dtype = self.loss_module.model.config, self.precision.weights
        return TransformerDecoder.from_weights(config, arrays, dtype, device)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part, put together in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that all have, cut as `like` is, if that is cut."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def on_whole_matrices(
    function: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    parts: Sequence[torch.Tensor],
    like: Sequence[DTensor],
    costs: Sequence[float],
) -> list[torch.Tensor]:
    """What `function` makes of matrices that are cut by rows, as parts again.

    parts: this process's rows of each. like: the parameters that are cut in the same way. function:
    whole matrices to as many of the same shapes. costs: what each takes. Every matrix is owned by
    one process, which gathers it, computes, and hands the rows back: nothing is computed twice.
    """
    mesh = like[0].device_mesh
    processes, own = mesh.size(), mesh.get_local_rank()
    owners = choose_owners(costs, processes)
    owned: dict[int, list[int]] = defaultdict(list)  # by process
    for index, owner in enumerate(owners):
        owned[owner].append(index)
    rows = [rows_of_each(len(p), processes) for p in like]
    widths = [p.shape[1] for p in like]

    def sizes(matrices: list[int], process: int) -> list[int]:
        return [rows[i][process] * widths[i] for i in matrices]

    group = mesh.get_group()
    sent = [sum(sizes(owned[process], own)) for process in range(processes)]
    got = [sum(sizes(owned[own], process)) for process in range(processes)]
    order = [i for process in range(processes) for i in owned[process]]
    outgoing = torch.cat([parts[i].reshape(-1) for i in order])
    incoming = outgoing.new_empty(sum(got))
    dist.all_to_all_single(incoming, outgoing, got, sent, group=group)
    pieces = [  # [process][matrix]
        chunk.split(sizes(owned[own], process)) for process, chunk in enumerate(incoming.split(got))
    ]
    matrices = [
        torch.cat(column).view(like[i].shape)
        for i, column in zip(owned[own], zip(*pieces, strict=True), strict=True)
    ]
    cut = [matrix.split(rows[i]) for i, matrix in zip(owned[own], function(matrices), strict=True)]
    by_process = [piece[process].reshape(-1) for process in range(processes) for piece in cut]
    incoming = torch.cat(by_process) if by_process else incoming  # who owns none sends nothing
    dist.all_to_all_single(outgoing, incoming, sent, got, group=group)
    results = dict(zip(order, outgoing.split([parts[i].numel() for i in order]), strict=True))
    return [results[i].view(part.shape) for i, part in enumerate(parts)]


def rows_of_each(rows: int, processes: int) -> list[int]:
    """How many rows of a tensor each process has, as FSDP2 cuts it: the last may have none."""
    most = -(-rows // processes)
    return [max(0, min(most, rows - i * most)) for i in range(processes)]


def choose_owners(costs: Sequence[float], processes: int) -> list[int]:
    """The process that owns each matrix: the dearest first, to whom has the least by then."""
    owners, load = [0] * len(costs), [0.0] * processes
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners
