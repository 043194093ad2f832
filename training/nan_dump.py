"""NaN dumps: what a run leaves that stopped at a loss or gradient that is not finite.

A dump is a checkpoint of the state before the update, with the step's batch and `nan_dump.json`
beside it. tools/replay.py runs the step again and finds where the first NaN or infinity came from.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from checkpoint.reader import NAN_DUMP_BATCH, Checkpoint, CheckpointError
from checkpoint.safetensors_python import write_arrays
from checkpoint.writer import Content, publish
from common.cli import quoted
from common.device import PRECISIONS, Precision, check_precision, choose_device
from data.batches import Batch
from model.cpu_layers import use_cpu_layers
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.checkpointer import SAVE_FAILURES, Checkpointer, explain_failure
from training.config import Config
from training.resume import stored_config
from training.setup import configure_torch
from training.state import TrainState, restore_scaler

NOTE = "nan_dump.json"
EARLIER_NOTE = "capsule.json"  # what it was called in version 0.1


@dataclass
class RestoredStep:
    """The step of a dump, ready to be run again by `micro_step`."""

    config: Config
    device: torch.device
    precision: Precision
    loss_module: LossModule
    scaler: torch.amp.GradScaler
    batches: list[Batch]
    step: int
    targets: int
    reason: str
    seed: int


def write_nan_dump(
    state: TrainState,
    saved: dict[str, Content],
    run: Path,
    micro_batches: Sequence[Batch],
    targets: int,
    reason: str,
) -> Path:
    """Writes the dump of the step that has just failed. Returns its folder. Raises OSError.

    saved: the files of a checkpoint of `state`.
    """
    step = state.progress.step
    note = {"step": step, "targets": targets, "why": reason, "seed": state.config.seed}
    arrays = {}
    for micro, batch in enumerate(micro_batches):
        parts: dict[str, np.ndarray | None] = {"ids": batch.ids, "targets": batch.targets}
        parts |= {"target_indices": batch.target_indices, "documents": batch.documents}
        arrays |= {f"{micro}/{name}": a for name, a in parts.items() if a is not None}
    path, earlier = run / f"nonfinite_step_{step + 1}", 0
    while path.exists():  # of an earlier try, which may have had other settings
        earlier += 1
        path = run / f"nonfinite_step_{step + 1}_{earlier}"
    files = {NOTE: json.dumps(note, indent=1).encode(), NAN_DUMP_BATCH: write_arrays(arrays)}
    return publish(path, {**saved, **files})


def explain_stop(
    checkpointer: Checkpointer, micro_batches: Sequence[Batch], targets: int, reason: str
) -> str:
    """Writes the dump, and returns what to tell the user in one line."""
    checkpointer.wait()
    try:
        if checkpointer.state.saves_together:
            raise OSError("no host has memory for it, as train.checkpoint_shards says")
        tensors = checkpointer.state.tensors()  # before what may fail here alone
        checkpointer.follow()
        state, run = checkpointer.state, checkpointer.run
        saved = state.checkpoint_files(tensors)
        path = write_nan_dump(state, saved, run, micro_batches, targets, reason)
        where = f"python -m tools.replay {quoted(path)} shows where it started"
    except SAVE_FAILURES as failure:
        where = f"no NaN dump could be written: {explain_failure(failure)}"
    return (
        f"{reason}: stopped before the update; {where}; lower optimizer.lr or use --precision "
        "fp32, and --resume from the last checkpoint"
    )


def restore_nan_dump(path: Path, device_name: str = "") -> RestoredStep:
    """Reads a dump and rebuilds the state before its step. Raises CheckpointError, UserError."""
    dump = Checkpoint(path).verify()
    notes = [name for name in (NOTE, EARLIER_NOTE) if name in dump.manifest["files"]]
    if not dump.is_nan_dump or not notes:
        raise CheckpointError(
            f"{path}: not a NaN dump (no {NOTE} in it); give a folder such as "
            "runs/NAME/nonfinite_step_12"
        )
    note, batches, config = dump.json(notes[0]), read_batches(dump), stored_config(dump)
    check_note(path, config, note, batches)
    device = choose_device(device_name or config.device)
    check_precision(config.precision, device)
    precision = PRECISIONS[config.precision]
    configure_torch(config.train, device)
    weights = dump.tensors("model.safetensors")
    model = TransformerDecoder.from_weights(config.model, weights, precision.weights, device)
    if device.type == "cpu":
        use_cpu_layers(model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    restore_scaler(scaler, dump)
    loss_module = LossModule(model).train()
    return RestoredStep(
        config, device, precision, loss_module, scaler, batches,
        note["step"], note["targets"], note["why"], note.get("seed", config.seed),
    )  # fmt: skip


def read_batches(dump: Checkpoint) -> list[Batch]:
    """The micro-batches of the step."""
    arrays = dump.tensors(NAN_DUMP_BATCH)
    batches = []
    while f"{len(batches)}/ids" in arrays:
        ids = arrays[f"{len(batches)}/ids"]
        targets, target_indices, positions, documents = (
            arrays.get(f"{len(batches)}/{name}")
            for name in ("targets", "target_indices", "positions", "documents")
        )
        # positions: what version 0.1 called the indices of the targets
        indices = positions if target_indices is None else target_indices
        # check_note refuses a batch without targets
        batches.append(Batch(ids, cast(np.ndarray, targets), indices, ids.size, documents))
    return batches


def check_note(path: Path, config: Config, note: dict, batches: list[Batch]):
    """Raises CheckpointError for a dump that no run has written."""
    size = config.model.vocab_size

    def fits(batch: Batch) -> bool:
        return (
            batch.ids.ndim == 2
            and batch.targets is not None
            and all(within(a, size) for a in (batch.ids, batch.targets))
            and (batch.target_indices is None or within(batch.target_indices, batch.ids.size))
            and (batch.documents is None or are_borders(batch.documents, batch.ids.size))
        )

    whole = (
        isinstance(note.get("why"), str)
        and type(note.get("step")) is int
        and type(note.get("targets")) is int
        and note["targets"] > 0
        and bool(batches)
        and all(map(fits, batches))
    )
    if not whole:
        raise CheckpointError(
            f"{path}: {NOTE} or {NAN_DUMP_BATCH} has missing or invalid values; use another dump"
        )


def within(numbers: np.ndarray, size: int) -> bool:
    """Whether all are from 0 to size - 1."""
    return bool(0 <= numbers.min(initial=0) and numbers.max(initial=0) < size)


def are_borders(documents: np.ndarray, size: int) -> bool:
    """Whether `documents` cuts `size` places into documents."""
    return (
        documents.dtype == np.int32
        and documents.ndim == 1
        and len(documents) > 1
        and documents[[0, -1]].tolist() == [0, size]
        and bool((np.diff(documents) > 0).all())
    )
