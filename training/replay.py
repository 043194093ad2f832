"""Capsules: what a run leaves that stopped at a loss or gradient that is not finite.

    python -m training.replay runs/my-run/nonfinite_step_12

runs that step again and names the first module whose output or gradient is not finite. A capsule is
a checkpoint of the state before the update, with the step's batch and `capsule.json` beside it.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save as to_safetensors

from data.batches import Batch
from model.checkpoint import Checkpoint, CheckpointError
from model.transformer_full import TransformerDecoder
from training import cli
from training.checkpoint import publish
from training.config import Config
from training.device import Precision, choose_device, choose_precision, set_up
from training.run import CAPSULE, stored_config
from training.setup import restore_scaler
from training.step import micro_step

BATCH = "batch.safetensors"


def leave(t, run: Path, micro_batches: list[Batch], targets: int, why: str) -> Path:
    """Writes the capsule of the step that has just failed, and gives its folder. Raises OSError."""
    number = t.progress.step + 1
    note = {"step": t.progress.step, "targets": targets, "why": why, "seed": t.config.seed}
    arrays = {}
    for micro, batch in enumerate(micro_batches):
        parts = {"ids": batch.ids, "targets": batch.targets, "positions": batch.positions}
        arrays |= {f"{micro}/{name}": a for name, a in parts.items() if a is not None}
    path, others = run / f"nonfinite_step_{number}", 0
    while path.exists():  # of an earlier try, which may have had other settings
        others += 1
        path = run / f"nonfinite_step_{number}_{others}"
    files = {CAPSULE: json.dumps(note, indent=1).encode(), BATCH: to_safetensors(arrays)}
    return publish(path, {**t.checkpoint_files(), **files})


@dataclass
class Restored:
    """What `micro_step` needs of a run."""

    config: Config
    device: torch.device
    precision: Precision
    model: TransformerDecoder
    scaler: torch.amp.GradScaler


def restore(capsule: Checkpoint, device_name: str) -> Restored:
    """The run as it stood before the step."""
    config = stored_config(capsule)
    device = choose_device(device_name or config.device)
    precision, _ = choose_precision(config.precision, device)
    set_up(config.train, device)
    model = TransformerDecoder.from_config(config.model, precision.weights)
    model.load_weights(capsule.tensors("model.safetensors"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    restore_scaler(scaler, capsule)
    return Restored(config, device, precision, model.to(device).train(), scaler)


def read_batches(capsule: Checkpoint) -> list[Batch]:
    """The micro-batches of the step."""
    arrays = capsule.tensors(BATCH)
    batches = []
    while f"{len(batches)}/ids" in arrays:
        ids, targets, positions = (
            arrays.get(f"{len(batches)}/{name}") for name in ("ids", "targets", "positions")
        )
        batches.append(Batch(ids, targets, positions, ids.size))
    return batches


def check(path: Path, config: Config, note: dict, batches: list[Batch]):
    """Raises CheckpointError for a capsule that no run has written."""
    size = config.model.vocab_size
    whole = (
        isinstance(note.get("why"), str)
        and type(note.get("step")) is int
        and type(note.get("targets")) is int
        and note["targets"] > 0
        and bool(batches)
        and all(
            b.ids.ndim == 2
            and b.targets is not None
            and all(0 <= a.min(initial=0) and a.max(initial=0) < size for a in (b.ids, b.targets))
            and (b.positions is None or b.positions.max(initial=0) < b.ids.size)
            for b in batches
        )
    )
    if not whole:
        raise CheckpointError(f"{path}: {CAPSULE} or {BATCH} is not what a run writes")


class Watch:
    """Looks at what goes into and out of every module, and at the gradients that come back.

    found: what was not finite, in the order in which it was computed.
    """

    def __init__(self, model: torch.nn.Module):
        self.found: list[str] = []
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(self.entering(name))
                module.register_forward_hook(self.leaving(name))
        for name, parameter in model.named_parameters():
            parameter.register_hook(self.looking(f"{name}: its gradient"))

    def look(self, what: str, tensor):
        """Notes a tensor that is not finite, and where in it the first such number stands."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return
        wrong = ~torch.isfinite(tensor)
        if wrong.any():
            at = tuple(torch.nonzero(wrong)[0].tolist())
            self.found.append(
                f"{what} has {int(wrong.sum()):,} of {tensor.numel():,} values not finite, "
                f"the first {tensor[at].item()} at {at}"
            )

    def looking(self, what: str):
        return lambda gradient: self.look(what, gradient)

    def entering(self, name: str):
        parent, _, own = name.rpartition(".")
        if own.isdigit() or not parent:  # a list of layers computes nothing
            parent, own = "the decoder", name

        def hook(_module, inputs):
            for tensor in inputs:
                self.look(f"{parent}: what it gives to {own}", tensor)

        return hook

    def leaving(self, name: str):
        def hook(_module, _inputs, output):
            self.look(f"{name}: its output", output)
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(self.looking(f"{name}: the gradient of its output"))

        return hook


def replay(run: Restored, batches: list[Batch], step: int, targets: int) -> tuple[str, float]:
    """Runs the step up to its gradients. Returns what first was not finite, or "", and the loss."""
    for name, parameter in run.model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name}: the weights themselves are not finite", math.nan
    watch, loss = Watch(run.model), 0.0
    for micro, batch in enumerate(batches):
        part = micro_step(run, run.model.hidden, batch, targets, step, micro).item()
        loss += part
        if not math.isfinite(part):  # computed from hidden states that no hook found fault with
            watch.found.append("output: the loss of its logits is not finite")
        if watch.found:
            return f"micro-batch {micro + 1}: {watch.found[0]}", loss
    for name, parameter in run.model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not math.isfinite(gradient.norm().item()):
            largest = gradient.abs().max().item()
            return f"{name}: the norm of its gradient, whose largest value is {largest:.3g}", loss
    return "", loss


def main() -> int:
    parser = cli.Parser(
        prog="python -m training.replay", description="Runs a step again that was not finite."
    )
    parser.add_argument("capsule", type=Path, help="runs/NAME/nonfinite_step_N")
    parser.add_argument("--device", default="", help="another device than the run's")
    options = parser.parse_args()
    capsule = Checkpoint(options.capsule).verify()
    if not {CAPSULE, BATCH} <= capsule.manifest["files"].keys():
        raise CheckpointError(f"{options.capsule}: is no capsule: there is no {CAPSULE} in it")
    run = restore(capsule, options.device)
    note, batches = capsule.json(CAPSULE), read_batches(capsule)
    check(options.capsule, run.config, note, batches)
    shapes = ", ".join(str(np.shape(batch.ids)) for batch in batches)
    print(
        f"{options.capsule}: {cli.visible(note['why'])}\n"
        f"seed {note['seed']}, {run.precision.name} on {run.device}, micro-batches of {shapes}"
    )
    largest = max(run.model.named_parameters(), key=lambda item: item[1].abs().max().item())
    print(f"largest weight {largest[1].abs().max().item():.3g}, in {largest[0]}")
    first, loss = replay(run, batches, note["step"], note["targets"])
    if not first:
        eager = ", without torch.compile" if run.config.compile else ""
        print(f"loss {loss:.4f}, and everything is finite here{eager}: not reproduced")
        return 1
    print(f"first: {first}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m training.replay", main))
