"""One training step in each engine, in the same three parts, so that they can be compared.

    trainer = create("numpy", config, weights, Adam(0.9, 0.999, 1e-8))
    batch = trainer.batch([(ids, targets)])
    loss = trainer.forward(batch)
    trainer.backward()
    trainer.update(lr)

A row is (ids, targets), two lists of the same length; where there is nothing to predict the target
is -100. The loss is the mean over all targets of a batch. The optimizer is Adam, without weight
decay or clipping. Each engine is imported only where it is used.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Protocol

from common.memory import keep_freed_memory
from model.config import IGNORE_INDEX, ModelConfig
from model.engines import Engine, load_model

if TYPE_CHECKING:
    from torchmicro.vector import Vector

Rows = list[tuple[list[int], list[int]]]

LABELS = {  # in the order of the report
    "unfused": "Python, a node for each + and *",
    "python": "Python, fused",
    "numpy": "NumPy (TorchLite)",
    "torch": "PyTorch, CPU, eager",
    "compiled": "PyTorch, CPU, compiled",
    "cuda": "PyTorch, CUDA",
    "random": "control: random gradients",
    "stack": "control: stack-order backward",
}
BUILT_ON: dict[str, Engine] = {"unfused": "python", "random": "python", "stack": "python"}
BUILT_ON |= {"python": "python", "numpy": "numpy"}
BUILT_ON |= {"torch": "torch", "compiled": "torch", "cuda": "torch"}


@dataclass(frozen=True)
class Adam:
    """What Adam is told besides the learning rate."""

    beta1: float
    beta2: float
    eps: float


class Trainer(Protocol):
    """What every engine's trainer does in a step; a batch is what its own `batch` makes."""

    def forward(self, batch) -> float: ...
    def backward(self) -> None: ...
    def update(self, lr: float) -> None: ...


class PythonTrainer:
    """The plain-Python engine; `unfused` makes each + and * a node."""

    def __init__(self, config: ModelConfig, weights: dict, adam: Adam, unfused: bool = False):
        from model.transformer_micro import TransformerDecoderMicro
        from torchmicro import optim, vector

        self.model = TransformerDecoderMicro.from_config(config, unfused)
        self.model.load_weights(weights)
        self.mean = vector.mean
        self.optimizer = optim.Adam(self.model.parameters(), adam.beta1, adam.beta2, adam.eps)
        self.loss: Vector | None = None
        self.nodes = 0

    def batch(self, rows: Rows) -> list[tuple[list[int], list[int], list[int]]]:
        """Rows as `forward` takes them: (ids, places, targets) each."""
        batch = []
        for ids, targets in rows:
            places = [t for t, target in enumerate(targets) if target != IGNORE_INDEX]
            batch.append((ids, places, [targets[t] for t in places]))
        return batch

    def forward(self, batch) -> float:
        """The loss; what `backward` needs is kept."""
        losses = []
        for ids, places, targets in batch:
            logits = self.model(ids, target_indices=places)
            losses += [x.cross_entropy(y) for x, y in zip(logits, targets, strict=True)]
        self.loss = self.mean(losses)
        self.nodes = len(self.model.tape)
        return self.loss.data[0]

    def backward(self):
        assert self.loss is not None  # forward() comes first
        self.loss.backward()

    def update(self, lr: float):
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        self.loss = None

    def gradients(self) -> dict:
        """Nested lists by parameter name."""
        return self.model.gradients()

    def weights(self) -> dict:
        return self.model.state_dict()

    def logits(self, ids: list[int]) -> list[list[float]]:
        """(T, V) for one sequence."""
        with self.model.tape.paused():
            return [x.data for x in self.model(ids)]


class RandomGradients(PythonTrainer):
    """What a port without a backward pass does: forward is right, gradients are dice."""

    dice = Random(0)  # noqa: S311, not for secrets

    def backward(self):
        self.model.tape.records.clear()
        for row in self.model.parameters():
            row.grad = [self.dice.gauss(0.0, 0.01) for _ in row.data]


class StackOrder(PythonTrainer):
    """The "stack-based backward": nodes are visited as a stack gives them, and so often too early.

    A node passes its gradient on when it is first taken from the stack. If more of its users come
    later, what they add to it is never passed on. Whether they do is an accident of the order in
    which inputs are pushed: of `h * 3 + h` and `h + h * 3` one comes out right.
    """

    reverse = False  # push the inputs of a node in reverse

    def backward(self):
        from torchmicro.vector import inputs_of

        assert self.loss is not None  # forward() comes first
        records = {id(record[1]): record for record in self.model.tape.records}
        self.loss.grad = [1.0]
        stack, visited = list(getattr(self.loss, "values", [self.loss])), set()
        while stack:
            node = stack.pop()
            record = records.get(id(node))
            if record is None or id(node) in visited:
                continue
            visited.add(id(node))
            backward, output, inputs = record
            if output.grad:
                backward(output, *inputs)
            inputs = list(inputs_of(record))
            stack += inputs[::-1] if self.reverse else inputs
        self.model.tape.records.clear()


CONTROLS = {"random": RandomGradients, "stack": StackOrder}


class NumpyTrainer:
    """The NumPy engine, on TorchLite."""

    def __init__(self, config: ModelConfig, weights: dict, adam: Adam, precision: str):
        from torchlite import functional, optim

        keep_freed_memory()  # as train.py does
        self.F = functional
        self.model = load_model("numpy", config, weights, "cpu", precision).train()
        self.optimizer = optim.AdamW(
            self.model.parameters(), betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=0.0
        )
        self.nodes = 0

    def batch(self, rows):
        return padded(rows)

    def forward(self, batch) -> float:
        ids, target_indices, targets = batch
        x = self.model.hidden(ids)  # (B, T, C)
        x = x.reshape(-1, x.shape[-1])
        if len(target_indices) < len(x):
            x = x[target_indices]
        output = self.model.output
        self.loss = self.F.linear_cross_entropy(x, output.weight, output.bias, targets)
        assert self.loss.tape is not None  # its weights require gradients
        self.nodes = len(self.loss.tape)
        return self.loss.item()

    def backward(self):
        self.loss.backward()

    def update(self, lr: float):
        self.optimizer.lr = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict:
        """Arrays by parameter name."""
        return {name: p.grad for name, p in self.model.named_parameters()}

    def weights(self) -> dict:
        return {name: p.data for name, p in self.model.named_parameters()}

    def logits(self, ids: list[int]):
        import numpy as np

        return self.model(np.array([ids])).data[0]


class TorchTrainer:
    """The PyTorch engine, eager or compiled."""

    def __init__(self, config, weights, adam: Adam, precision: str, device: str, compiled=False):
        import torch

        from common.device import choose_device, synchronize
        from model.loss import LossModule

        keep_freed_memory()
        self.torch, self.device = torch, choose_device(device)
        self.model = load_model("torch", config, weights, device, precision).train()
        self.eager = LossModule(self.model)
        self.loss_module = torch.compile(self.eager, dynamic=True) if compiled else self.eager
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=0.0,
            fused=True,
        )
        self.wait = lambda: synchronize(self.device)

    def batch(self, rows):
        return [self.torch.from_numpy(array).to(self.device) for array in padded(rows)]

    def forward(self, batch) -> float:
        ids, target_indices, targets = batch
        total = self.loss_module(
            ids, targets, target_indices if len(target_indices) < ids.numel() else None
        )
        self.loss = total / len(targets)
        return self.loss.item()

    @property
    def nodes(self) -> int:
        """Nodes of autograd's graph behind the last loss, those of the weights included."""
        found, stack = set(), [self.loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in found:
                found.add(node)
                stack += [following for following, _ in node.next_functions]
        return len(found)

    def backward(self):
        self.loss.backward()
        self.wait()

    def update(self, lr: float):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()

    def gradients(self) -> dict:
        """Arrays by parameter name."""
        return {name: p.grad.cpu().numpy() for name, p in self.model.named_parameters()}

    def weights(self) -> dict:
        return {name: p.detach().cpu().numpy() for name, p in self.model.named_parameters()}

    def logits(self, ids: list[int]):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids], device=self.device))[0].cpu().numpy()


def timed_step(trainer: Trainer, batch, lr: float) -> tuple[float, list[float]]:
    """One training step: its loss, and the seconds of forward pass, backward pass and update."""
    clock = time.perf_counter
    marks = [clock()]
    loss = trainer.forward(batch)
    marks.append(clock())
    trainer.backward()
    marks.append(clock())
    trainer.update(lr)
    marks.append(clock())
    return loss, [after - before for before, after in pairwise(marks)]


def padded(rows: Rows):
    """ids (B, T), target_indices (N,), targets (N,), int64."""
    import numpy as np

    T = max(len(ids) for ids, _ in rows)
    ids = np.array([ids + [0] * (T - len(ids)) for ids, _ in rows])
    targets = np.array([t + [IGNORE_INDEX] * (T - len(t)) for _, t in rows]).reshape(-1)
    target_indices = np.flatnonzero(targets != IGNORE_INDEX)
    return ids, target_indices, targets[target_indices]


def create(engine: str, config: ModelConfig, weights: dict, adam: Adam, precision: str = "fp64"):
    """The trainer of an engine, by its name in LABELS. weights: lists or arrays by name."""
    if engine in ("python", "unfused"):
        return PythonTrainer(config, weights, adam, unfused=engine == "unfused")
    if engine in CONTROLS:
        return CONTROLS[engine](config, weights, adam)
    if engine == "numpy":
        return NumpyTrainer(config, weights, adam, precision)
    device = "cuda" if engine == "cuda" else "cpu"
    return TorchTrainer(config, weights, adam, precision, device, compiled=engine == "compiled")
