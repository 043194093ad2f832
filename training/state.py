"""The state of a run: what the loop works on, and what of it a checkpoint keeps and gives back."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
import torch

from checkpoint.reader import Checkpoint, read_best
from checkpoint.safetensors_python import in_file_order, pieces
from checkpoint.writer import Content
from common import cuda
from common.device import Precision, processor
from common.errors import UserError
from common.processes import Processes
from common.signals import StopRequest
from data.batches import ORDER, Batches, Examples
from data.dataset import Dataset
from evaluation.validation import evaluate
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.config import Config
from training.gradient_exchange import GradientExchange
from training.optimizer import state_tensors
from training.resume import RunSpec
from training.sharding import Shards


@dataclass
class Progress:
    """Where a run stands: the loop's counters, saved with every checkpoint."""

    step: int = 0
    tokens: int = 0  # read in training so far
    skipped: int = 0  # steps without an update, fp16 only
    best_step: int = 0
    best_val_loss: float | None = None


@dataclass
class TrainState:
    """What the loop works on."""

    config: Config  # resolved: no "auto" is left in it
    device: torch.device
    precision: Precision
    dataset: Dataset
    batches: Batches
    val: Examples | None
    loss_module: LossModule  # the decoder and its loss
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    progress: Progress
    cwd: str = field(default_factory=os.getcwd)  # from where the paths of `config` are found
    processes: Processes = field(default_factory=Processes)
    shards: Shards | None = None  # where each process holds a part of the weights
    in_pairs: bool = True  # how micro-batches are added up; a run that began otherwise goes on so

    @cached_property
    def exchange(self) -> GradientExchange | None:
        """What adds up gradients over processes; None where there is one, or FSDP2 adds them up."""
        if self.processes.count == 1 or self.shards:
            return None
        return GradientExchange(self.model.parameters(), self.processes)

    @property
    def share(self) -> int:
        """How many micro-batches of a step are this process's."""
        return self.config.train.share_of(self.processes.count)

    @property
    def model(self) -> TransformerDecoder:
        """The decoder alone, whatever wraps it."""
        return self.loss_module.model

    def config_json(self) -> bytes:
        """The resolved configuration, as a run and each of its checkpoints keep it."""
        return json.dumps(asdict(self.config), indent=1).encode()

    @property
    def saves_together(self) -> bool:
        """Whether each process writes its own files of a checkpoint."""
        return self.shards is not None and self.config.train.checkpoint_shards

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors of a checkpoint by file and name; of some, a process may hold a part."""
        if self.shards:
            self.shards.cut()
        return {
            "model.safetensors": {**dict(self.model.named_parameters())},
            "optimizer.safetensors": state_tensors(self.model, self.optimizers),
        }

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The whole tensors of a checkpoint by file and name.

        Called by all processes where each holds a part; all but the first get none of them.
        """
        parts = self.parts()
        if self.shards is None:
            return parts
        return {name: self.shards.gather(tensors) for name, tensors in parts.items()}

    def validate(self, stop: StopRequest) -> dict[str, float]:
        """The scalars of one evaluation, by all processes; {} without validation data.

        Raises Interrupted.
        """
        if self.val is None:
            return {}
        return evaluate(
            self.loss_module,
            self.val,
            self.config.train.micro_batch_size,
            self.config.train.eval_examples,
            self.precision,
            stop,
            self.processes,
            together=self.shards is not None,
        )

    def whole_model(self) -> TransformerDecoder | None:
        """The decoder for samples and pictures, which the first process makes.

        Called by all processes where each holds a part of it; None in all but the first.
        """
        return self.shards.whole_model() if self.shards else self.model

    def checkpoint_files(
        self, tensors: dict[str, dict[str, torch.Tensor]] | None = None, copied: bool = False
    ) -> dict[str, Content]:
        """Everything that going on needs, as the files of a checkpoint. tensors: `tensors()`.

        copied: as it is now, in the host's memory, whatever becomes of the tensors; else each of
        them is read when its turn comes to be written, and no more than one need be on the host.
        """
        tensors = self.tensors() if tensors is None else tensors
        copied = copied and not self.shards  # which have put them together there
        state = {
            **asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "data": self.dataset.fingerprint,
            "tokenizer": self.dataset.tokenizer.fingerprint,
            "tokenizer_given": self.dataset.tokenizer_given,
            "held_out": self.dataset.held_out,
            "validates": self.val is not None,
            "cwd": self.cwd,
            "micro_batches_in_pairs": self.in_pairs,
            "order": self.batches.examples.order,
            "versions": versions(self.device),
        }
        return {
            **{name: tensor_file(values, copied) for name, values in tensors.items()},
            "state.json": json.dumps(state, indent=1).encode(),
            "config.json": self.config_json(),
            **self.dataset.tokenizer.files(),
        }


def tensor_file(tensors: dict[str, torch.Tensor], copied: bool) -> Content:
    """A safetensors file of tensors by name; `copied` as in `TrainState.checkpoint_files`."""
    kinds = {
        name: (torch.empty(0, dtype=tensor.dtype).numpy().dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    ordered = (tensors[name].detach() for name in in_file_order(kinds))
    content = pieces(kinds, (tensor.to("cpu", copy=copied).numpy() for tensor in ordered))
    return list(content) if copied else content


def versions(device: torch.device) -> dict[str, str]:
    """The processor and the software of a run, and on CUDA its card, driver and libraries."""
    found = {"processor": processor()}
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    return found | {"numpy": np.__version__} | cuda.versions(device)


def restore_progress(spec: RunSpec) -> Progress:
    """The counters of the checkpoint, with the best step that is known by now."""
    assert spec.resume is not None  # what the progress is of
    known = Progress.__dataclass_fields__
    progress = Progress(**{k: v for k, v in spec.resume.state.items() if k in known})
    best = read_best(spec.run)
    if spec.is_new:  # the best so far is in another run
        progress.best_step, progress.best_val_loss = 0, None
    elif best is not None and best["step"] <= progress.step:
        progress.best_step, progress.best_val_loss = best["step"], best["val_loss"]
    return progress


def restore_order(spec: RunSpec) -> int:
    """The order of stream windows that the run began with, as data/batches.py numbers them."""
    if not spec.resume:
        return ORDER
    order = spec.resume.state.get("order", 1)  # earlier versions had one, and did not say so
    if order not in range(1, ORDER + 1):
        raise UserError(
            f"{spec.resume.path / 'state.json'}: order: must be from 1 to {ORDER} "
            f"(found {order!r:.80}); use the version of this project that wrote the checkpoint"
        )
    return order


def restore_scaler(scaler: torch.amp.GradScaler, checkpoint: Checkpoint):
    """The loss scale of a checkpoint that was made in fp16; another precision has none."""
    stored = checkpoint.state.get("scaler")
    if not scaler.is_enabled() or not stored:
        return
    if stored.keys() != scaler.state_dict().keys() or not all(
        isinstance(value, int | float) for value in stored.values()
    ):
        raise UserError(
            f"{checkpoint.path / 'state.json'}: scaler: must have the numbers "
            f"{', '.join(scaler.state_dict())} (found {stored!r:.80}); use another checkpoint"
        )
    scaler.load_state_dict(stored)
