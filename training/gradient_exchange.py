"""The gradients of several processes added up, while the backward pass still runs.

What a process has added up of its micro-batches is a node of the tree of gradient_sum.py; here the
nodes of all processes are added in that tree's order. So the sum has the same bits for any number
of processes, which an all-reduce does not promise.

Parameters are put into buckets, the last ones first, because their gradients are there first. Each
process gets its piece of every process's bucket (all-to-all), adds them up, and hands the sum round
(all-gather): as much is sent as by the usual ring.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from common.processes import Processes, all_gather
from training.gradient_sum import Node, PairwiseSum

BUCKET = 25 * 2**20  # bytes, what DistributedDataParallel takes
ALIGNMENT = 16  # numbers: products may depend on how their factors lie in memory


class Bucket:
    """Some parameters' gradients, one after another in memory: `flat`.

    received: a piece of each process's `flat`, one after another.
    """

    def __init__(self, shapes: Sequence[torch.Size], like: torch.Tensor, processes: int):
        sizes = [-(-shape.numel() // ALIGNMENT) * ALIGNMENT for shape in shapes]
        self.piece = -(-sum(sizes) // (processes * ALIGNMENT)) * ALIGNMENT
        self.flat = like.new_zeros(processes * self.piece)
        self.received = torch.empty_like(self.flat)
        parts = self.flat[: sum(sizes)].split(sizes)
        self.views = [
            part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)
        ]
        self.work: dist.Work | None = None
        self.missing = len(shapes)  # gradients that are not there yet


class GradientExchange:
    """The sums over all processes of the gradients of `parameters`, and of the loss.

    For each step: `begin` before the last backward pass, `finish` after it; or `add_up` alone.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        processes: Processes,
        bucket_bytes: int = BUCKET,
    ):
        self.parameters, self.processes = list(parameters), processes
        self.buckets: list[Bucket] = []
        self.place: list[tuple[Bucket, int]] = [None] * len(self.parameters)  # pyrefly: ignore
        self.make_buckets(bucket_bytes)
        self.waiting: list[Node] = []
        self.active, self.launched, self.parts = False, 0, 0
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p, i=index: self.collect(i, p))

    def make_buckets(self, bucket_bytes: int):
        """Shares out the parameters; the loss is the last entry of the last bucket."""
        groups, size = [[]], 0
        for index in reversed(range(len(self.parameters))):
            parameter = self.parameters[index]
            # the first one is small: the sooner something is under way
            limit = bucket_bytes if len(groups) > 1 else bucket_bytes // 25
            if groups[-1] and size + parameter.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(index)
            size += parameter.nbytes
        for group in groups:
            shapes = [self.parameters[index].shape for index in group]
            if group is groups[-1]:
                shapes.append(torch.Size([]))
            bucket = Bucket(shapes, self.parameters[0].detach(), self.processes.count)
            for entry, index in enumerate(group):
                self.place[index] = (bucket, entry)
            self.buckets.append(bucket)
        self.loss = self.buckets[-1].views[-1]
        self.buckets[-1].missing -= 1

    def begin(self, summed: PairwiseSum, parts: int):
        """Before the last backward pass: each gradient is sent as soon as it is there.

        summed: what waits in it is added, so that nothing is left for its `finish`. parts: how many
        processes, the first ones, have micro-batches in this step, which may be a short one.
        """
        self.waiting = [node for node in summed.waiting if node is not None]
        self.active, self.parts = True, parts

    def collect(self, index: int, parameter: torch.nn.Parameter):
        """Called by the backward pass when the gradient of parameter `index` is complete."""
        if not self.active:
            return
        assert parameter.grad is not None
        for node in self.waiting:  # the small sums first, as PairwiseSum.finish does
            parameter.grad.add_(node[index])
        self.put(index, parameter.grad)
        parameter.grad = None
        while self.launched < len(self.buckets) - 1 and not self.buckets[self.launched].missing:
            self.launch()

    def put(self, index: int, gradient: torch.Tensor):
        """Copies a gradient into its bucket."""
        bucket, entry = self.place[index]
        bucket.views[entry].copy_(gradient)
        bucket.missing -= 1

    def launch(self):
        """Sends the next bucket; the one before it has had time, and is added up and handed round.

        All processes do this in the same order, whichever gradients come first.
        """
        bucket = self.buckets[self.launched]
        bucket.work = dist.all_to_all_single(bucket.received, bucket.flat, async_op=True)
        if self.launched:
            self.hand_round(self.buckets[self.launched - 1])
        self.launched += 1

    def hand_round(self, bucket: Bucket):
        """Adds up this process's piece of a bucket, and begins to hand the sum to all."""
        assert bucket.work is not None
        bucket.work.wait()
        nodes = bucket.received.view(self.processes.count, bucket.piece)[: self.parts]
        bucket.work = all_gather(bucket.flat, tree(nodes), async_op=True)

    def finish(self, summed: PairwiseSum, loss: torch.Tensor, parts: int):
        """After the last backward pass: `.grad` and `loss` are the sums over all processes.

        A process that has no micro-batch in this step has not called `begin`.
        """
        for node in self.waiting:
            loss += node[-1]
        summed.reset()
        self.exchange(loss, parts)
        for index, parameter in enumerate(self.parameters):
            bucket, entry = self.place[index]
            parameter.grad = bucket.views[entry]

    def add_up(self, loss: torch.Tensor, parts: int):
        """Replaces `.grad` and `loss`, which are sums by now, by those over all processes."""
        gradients = [parameter.grad for parameter in self.parameters]
        for index, gradient in enumerate(gradients):
            if gradient is not None:  # a process without a micro-batch has none
                self.put(index, gradient)
        self.exchange(loss, parts)
        for parameter, (bucket, entry) in zip(self.parameters, self.place, strict=True):
            if parameter.grad is None:  # all take the same step
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(bucket.views[entry])

    def exchange(self, loss: torch.Tensor, parts: int):
        """Sends what has not been sent, and waits for all sums."""
        self.loss.copy_(loss)
        self.parts = parts
        while self.launched < len(self.buckets):
            self.launch()
        self.hand_round(self.buckets[-1])
        for bucket in self.buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work, bucket.missing = None, len(bucket.views)
        self.buckets[-1].missing -= 1  # the loss, which is put there at the end
        loss.copy_(self.loss)
        self.waiting, self.active, self.launched = [], False, 0


def tree(nodes: torch.Tensor) -> torch.Tensor:
    """The sum of (n, ...) over n, neighbours first, as gradient_sum.py adds micro-batches."""
    while len(nodes) > 1:
        pairs = nodes[0 : len(nodes) - 1 : 2] + nodes[1::2]
        nodes = torch.cat([pairs, nodes[-1:]]) if len(nodes) % 2 else pairs
    return nodes[0]
