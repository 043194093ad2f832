"""A step of several processes: ours, DistributedDataParallel's, and with a bare all-reduce.

    python -m benchmarks.distributed                      two processes of one thread each, Gloo
    python -m benchmarks.distributed --processes 4 --d_model 256

All sides train the same decoder on the same micro-batches with the same optimizer, in turns and in
the same processes. Ours adds gradients in an order that does not depend on the number of processes.
A bare all-reduce is one of all gradients after the backward pass: what has to be sent, and nothing
that hides it.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import ROOT, Result, parser
from common import cli
from common.device import to_device
from common.errors import UserError
from common.processes import join
from data.config import DataConfig
from model.config import ModelConfig
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.config import Config, OptimizerConfig, TrainConfig
from training.optimizer import create_optimizers
from training.resume import RunSpec
from training.setup import build
from training.state import TrainState
from training.step import train_step
from training.timing import StepTimer

LENGTH = 128  # tokens of an example
SHARES = (1, 4)  # micro-batches of each process in a step
STEPS = 6  # of a side's turn, of which the first is not timed
SIDES = ("ours", "ddp", "all-reduce")
TEXT = (ROOT / "tests" / "text.txt").read_text("utf-8")

Step = Callable[[int], float]  # the number of a step -> its loss


def settings(folder: Path, d_model: int, layers: int, rows: int, micro_batches: int) -> Config:
    """A decoder of so many micro-batches a step, on a text made of the tests' one."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text(TEXT * 60, "utf-8")
    return Config(
        device="cpu",
        precision="fp32",
        model=ModelConfig(
            d_model=d_model,
            n_heads=8,
            n_layers=layers,
            d_ff=4 * d_model,
            max_len=LENGTH,
            dropout=0.0,  # which is drawn otherwise by each side
        ),
        data=DataConfig(path=str(text), tokenizer="char", cache_dir=str(folder)),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(
            batch_size=rows * micro_batches, accumulation_steps=micro_batches, threads=1
        ),
    )


def ours(state: TrainState) -> Step:
    """The step of train.py."""
    timer = StepTimer(state.device)
    cut = state.config.train.accumulation_steps, state.processes.index, state.processes.count

    def step(number: int) -> float:
        targets = state.batches.target_count(number)
        micro_batches = state.batches(number, *cut)
        return train_step(state, state.loss_module, micro_batches, targets, number, timer).loss

    return step


def usual(state: TrainState, ddp: bool) -> Step:
    """The step that others write, on the batches of `state` and a copy of its model."""
    model = TransformerDecoder.from_config(state.config.model, torch.float32)
    model.load_state_dict(state.model.state_dict())
    parameters, count = list(model.parameters()), state.processes.count
    (optimizer,) = create_optimizers(model, state.config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = state.optimizers[0].param_groups[0]["lr"]
    loss_module = LossModule(model)
    wrapped = DistributedDataParallel(loss_module, gradient_as_bucket_view=True) if ddp else None
    cut = state.config.train.accumulation_steps, state.processes.index, count

    def step(number: int) -> float:
        targets = state.batches.target_count(number)
        optimizer.zero_grad(set_to_none=not ddp)
        micro_batches = state.batches(number, *cut)
        total = torch.zeros(())
        for micro, batch in enumerate(micro_batches):
            if wrapped:
                wrapped.require_backward_grad_sync = micro == len(micro_batches) - 1
            inputs = to_device(batch.inputs, state.device)
            # it takes the mean over the processes
            loss = (wrapped or loss_module)(*inputs) / targets * (count if ddp else 1)
            loss.backward()
            total += loss.detach() / (count if ddp else 1)
        if not ddp:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            parts = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients)])  # noqa: B905
        torch.nn.utils.clip_grad_norm_(parameters, state.config.optimizer.grad_clip)
        optimizer.step()
        dist.all_reduce(total)
        return total.item()

    return step


def measure(folder: Path, d_model: int, layers: int, rows: int, rounds: int) -> list[dict]:
    """Milliseconds of a step of each side, round by round, for each of SHARES."""
    found = []
    with join("benchmarks.distributed") as processes:
        for share in SHARES:
            config = settings(folder, d_model, layers, rows, share * processes.count)
            # connected once: what is built after it is of processes that are
            state = build(RunSpec(folder, config), lambda _: None, processes)
            sides = {"ours": ours(state), "ddp": usual(state, True)}
            sides["all-reduce"] = usual(state, False)
            numbers = itertools.count()
            ms = {side: [] for side in SIDES}
            losses = {}
            for _ in range(rounds):
                first = [next(numbers) for _ in range(STEPS)]
                for side, step in sides.items():
                    dist.barrier()
                    taken = []
                    for number in first:
                        began = time.perf_counter()
                        losses[side] = step(number)  # of the last step, the same for all
                        taken.append(1e3 * (time.perf_counter() - began))
                    ms[side].append(median(taken[1:]))
            parameters = state.model.num_parameters()
            found.append({"share": share, "ms": ms, "losses": losses, "parameters": parameters})
    return found


def start(count: int, flags: list[str]) -> list[dict]:
    """The same program as `count` processes. Returns what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "benchmarks.distributed", *flags]
    started = [
        subprocess.Popen(  # noqa: S603, ours
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError(f"--processes {count}: one of them failed, see above")
    return json.loads(said[0].splitlines()[-1])


def main():
    options = parser(__doc__, rounds=5)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--d_model", type=int, default=512)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--examples", type=int, default=4, help="of a micro-batch")
    arguments = options.parse_args()
    if arguments.side:
        found = measure(
            Path(arguments.side[0]),
            arguments.d_model,
            arguments.layers,
            arguments.examples,
            arguments.rounds,
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--side", folder, "--rounds", str(arguments.rounds)]
        flags += ["--d_model", str(arguments.d_model), "--layers", str(arguments.layers)]
        flags += ["--examples", str(arguments.examples)]
        found = start(arguments.processes, flags)
    result = Result("distributed", "Several processes")
    rows = []
    for run in found:
        ms = {side: median(run["ms"][side]) for side in SIDES}
        paired = zip(run["ms"]["ours"], run["ms"]["ddp"], strict=True)
        ratio = median(own / other for own, other in paired)
        each = f"{run['share']} micro-batch{'es' if run['share'] > 1 else ''} a process"
        rows.append([each, ms["ours"], ms["ddp"], ms["all-reduce"], f"{ratio:.2f} x"])
        bar = 1.15 if run["share"] == 1 else 1.05
        result.claim(f"a step over DistributedDataParallel's, {each}", ratio, bar, at_most=True)
    result.table(
        f"{found[0]['parameters']:,} parameters, micro-batches of {arguments.examples} x {LENGTH}, "
        f"fp32, {arguments.processes} processes of one thread, Gloo",
        ["", "ms a step", "DistributedDataParallel", "bare all-reduce", "over the first peer"],
        rows,
    )
    result.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.distributed", main))
