"""Reruns the step of a NaN dump, and names the first module that gave a NaN or infinity.

    python -m tools.replay runs/my-run/nonfinite_step_12

The folder is a NaN dump (training/nan_dump.py), which a run leaves when it stops at such a step.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import sys
from pathlib import Path

import numpy as np
import torch

from common import cli
from training.nan_dump import RestoredStep, restore_nan_dump
from training.step import micro_step


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
                self.look(f"{parent}: its input to {own}", tensor)

        return hook

    def leaving(self, name: str):
        def hook(_module, _inputs, output):
            self.look(f"{name}: its output", output)
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(self.looking(f"{name}: the gradient of its output"))

        return hook


def replay(run: RestoredStep) -> tuple[str, float]:
    """Runs the step up to its gradients. Returns what first was not finite, or "", and the loss."""
    model = run.loss_module.model
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"{name}: the weights themselves are not finite", math.nan
    watch, loss = Watch(model), 0.0
    for micro, batch in enumerate(run.batches):
        part = micro_step(run, run.loss_module, batch, run.targets, run.step, micro).item()
        loss += part
        if not math.isfinite(part):  # computed from hidden states that no hook found fault with
            watch.found.append("output: the loss of its logits is not finite")
        if watch.found:
            return f"micro-batch {micro + 1}: {watch.found[0]}", loss
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not math.isfinite(gradient.norm().item()):
            largest = gradient.abs().max().item()
            return f"{name}: the norm of its gradient, whose largest value is {largest:.3g}", loss
    return "", loss


def main() -> int:
    parser = cli.Parser(
        prog="python -m tools.replay",
        description="Reruns the step of a NaN dump, and names where the first NaN came from.",
    )
    parser.add_argument("nan_dump", type=Path, help="folder runs/NAME/nonfinite_step_N")
    parser.add_argument("--device", default="", help="device to use instead of the run's")
    options = parser.parse_args()
    run = restore_nan_dump(options.nan_dump, options.device)
    shapes = ", ".join(str(np.shape(batch.ids)) for batch in run.batches)
    print(
        f"{options.nan_dump}: {cli.visible(run.reason)}\n"
        f"seed {run.seed}, {run.precision.name} on {run.device}, micro-batches of {shapes}"
    )
    parameters = run.loss_module.model.named_parameters()
    name, largest = max(
        ((n, p.abs().max().item()) for n, p in parameters), key=lambda item: item[1]
    )
    print(f"largest weight {largest:.3g}, in {name}")
    first, loss = replay(run)
    if not first:
        eager = ", without torch.compile" if run.config.compile else ""
        print(f"not reproduced: loss {loss:.4f}, and everything is finite here{eager}")
        return 1
    print(f"first: {first}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m tools.replay", main))
