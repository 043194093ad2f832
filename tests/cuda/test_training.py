"""Training on a GPU: the CPU's losses, equal bits twice, skipped steps, CUDA graphs, a NaN dump."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from checkpoint.reader import Checkpoint, list_steps
from tests.helpers import ROOT, rewrite, run, write_config
from training.compile import CompiledLoss, compile_loss
from training.config import load
from training.cuda_graphs import WARM_UP, GraphedStep, choose_step
from training.resume import RunSpec
from training.setup import build
from training.step import train_step
from training.timing import StepTimer


@pytest.fixture
def make(tmp_path):
    """A function that builds the tiny run on the GPU, whose epochs end in a short batch."""
    torch._dynamo.reset()  # after eight compilations it would compile no more
    yield (lambda **changes: make_in(tmp_path, **changes))
    torch.use_deterministic_algorithms(False)


def make_in(folder, optimizer="adamw", device="cuda", dropout=0.1, **changes):
    config = load(write_config(folder))
    train_settings = {k: changes.pop(k) for k in list(changes) if hasattr(config.train, k)}
    config = replace(
        config,
        device=device,
        optimizer=replace(config.optimizer, name=optimizer),
        model=replace(config.model, dropout=dropout),
        train=replace(config.train, **train_settings),
        **changes,
    )
    return build(RunSpec(folder / "run", config), lambda _: None)


def train(state, steps, call=None):
    found = []
    call = call or (lambda *inputs: train_step(state, state.loss_module, *inputs))
    for number in range(steps):
        micro_batches = state.batches(number, state.config.train.accumulation_steps)
        targets = state.batches.target_count(number)
        found.append(call(micro_batches, targets, number, StepTimer(state.device)).loss)
    return found


def weights(state):
    return [p.detach().clone() for p in state.model.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_the_cpus(make, optimizer):
    expected = train(make(device="cpu", dropout=0.0, optimizer=optimizer, precision="fp32"), 20)
    found = train(make(dropout=0.0, optimizer=optimizer, precision="fp32"), 20)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[-1] == pytest.approx(expected[-1], abs=1e-3)
    low = train(make(dropout=0.0, optimizer=optimizer, precision="bf16"), 20)
    assert low[-1] == pytest.approx(expected[-1], abs=2e-2)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_steps_are_the_same_twice(make, checkpoint_activations, precision):
    options = {"deterministic": True, "precision": precision, "optimizer": "muon"}
    found = []
    for recompute in (False, checkpoint_activations):
        state = make(checkpoint_activations=recompute, **options)
        found.append((train(state, 5), weights(state)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fp16_skips_a_step_and_halves_the_scale(make, optimizer):
    state = make(precision="fp16", optimizer=optimizer)
    train(state, 1)
    before, scale = weights(state), state.scaler.get_scale()
    hook = state.model.embed.weight.register_hook(lambda gradient: gradient * torch.inf)
    train(state, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))
    assert state.scaler.get_scale() == scale / 2
    hook.remove()
    train(state, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))


def test_a_step_waits_for_the_gpu_once(make):
    state = make(precision="bf16", optimizer="muon")
    train(state, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(state, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in caught]  # loss and norm, in one copy


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_one_compilation_for_all_batches(make, checkpoint_activations):
    torch._dynamo.reset()
    counters.clear()
    options = {"precision": "bf16", "dropout": 0.0, "optimizer": "muon"}
    expected = train(make(**options), 12)
    state = make(checkpoint_activations=checkpoint_activations, **options)
    accumulation = state.config.train.accumulation_steps
    compiled = compile_loss(state, state.batches(0, accumulation), 1, lambda _: None)
    assert isinstance(compiled, CompiledLoss)
    found = train(state, 12, lambda *inputs: train_step(state, compiled, *inputs))
    assert found == pytest.approx(expected, abs=2e-2)
    assert counters["stats"]["unique_graphs"] <= 3
    assert sum(counters["graph_break"].values()) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_are_the_steps(make, optimizer, compiled, precision):
    options = {"precision": precision, "optimizer": optimizer, "deterministic": True}
    found, said = [], []
    for cuda_graphs in (False, True):
        state = make(cuda_graphs=cuda_graphs, **options)
        loss_module = state.loss_module
        if compiled:
            micro_batches = state.batches(0, state.config.train.accumulation_steps)
            loss_module = compile_loss(state, micro_batches, 1, lambda _: None)
        call = choose_step(state, loss_module, said.append)
        assert isinstance(call, GraphedStep) == cuda_graphs
        found.append(train(state, WARM_UP + 12, call))
    assert said == ["cuda_graphs: each step is replayed as CUDA graphs from here on"]
    # the optimizers read the learning rate from a float32, and otherwise from a Python number
    assert found[1] == pytest.approx(found[0], abs=1e-4 if precision == "fp32" else 1e-2)


def test_steps_with_activation_checkpointing_are_replayed(make):
    """Without dropout: there is then no random state to look at, which a capture forbids."""
    options = {"precision": "bf16", "dropout": 0.0, "checkpoint_activations": True}
    found, said = [], []
    for cuda_graphs in (False, True):
        state = make(cuda_graphs=cuda_graphs, **options)
        found.append(train(state, WARM_UP + 6, choose_step(state, state.loss_module, said.append)))
    assert said == ["cuda_graphs: each step is replayed as CUDA graphs from here on"]
    assert found[1] == pytest.approx(found[0], abs=1e-2)


BROKEN_CAPTURE = """
import torch
from training.cuda_graphs import can_draw, capture_cuda_graph
x = torch.zeros(1, device="cuda")
assert can_draw(x.device)
try:
    capture_cuda_graph(lambda: x.item())
except RuntimeError as error:
    print(type(error).__name__)
assert torch.cuda.current_stream() == torch.cuda.default_stream()
print("draws" if can_draw(x.device) else "does not draw", (x + 1).item())
"""


def test_what_a_broken_capture_leaves():
    """The stream that was current, and all that computes but dropout."""
    result = subprocess.run(
        [sys.executable, "-c", BROKEN_CAPTURE], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    error, after = result.stdout.splitlines()
    assert error in ("AcceleratorError", "RuntimeError")
    assert after in ("draws 1.0", "does not draw 1.0")  # the latter in PyTorch 2.11


def test_replaying_launches_a_step_in_a_few_calls(make):
    counts = {}
    for cuda_graphs in (False, True):
        state = make(cuda_graphs=cuda_graphs, precision="bf16", optimizer="muon", batch_size=4)
        call = choose_step(state, state.loss_module, lambda _: None)
        train(state, WARM_UP + 2, call)
        with torch.profiler.profile() as profile:
            train(state, 1, call)
        launches = ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernel")
        events = profile.key_averages()
        counts[cuda_graphs] = sum(e.count for e in events if e.key.startswith(launches))
    assert 0 < 3 * counts[True] < counts[False], counts


def program(name: str, *arguments, folder):
    """`python -m NAME` from the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "", "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--train.checkpoint_activations"]])
def test_a_run_stopped_and_resumed_is_the_same_run(tmp_path, flags):
    config = write_config(tmp_path)
    flags = ["--config", config, "--steps", 12, "--device", "cuda", "--precision", "bf16", *flags]
    result = program("tools.verify_resume", *flags, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the same bit for bit" in result.stdout


def test_a_nan_dump_is_replayed(tmp_path):
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--device", "cuda"]
    first = run("train.py", *flags, "--name", "first", "--max_steps", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr

    def huge(weights):
        weights["layers.1.feed_forward.linear1.weight"][:] = 3e38

    newest = Checkpoint(list_steps(tmp_path / "runs" / "first")[-1])
    rewrite(newest, tmp_path / "runs" / "source", weights=huge)
    stopped = run("train.py", *flags, "--init_from", "runs/source", "--name", "nan", cwd=tmp_path)
    assert stopped.returncode == 1
    (line,) = stopped.stderr.strip().splitlines()
    assert "step 1: the loss is nan" in line
    replayed = program("tools.replay", tmp_path / "runs/nan/nonfinite_step_1", folder=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    assert "step 1: the loss is nan" in replayed.stdout
    assert "first: " in replayed.stdout and "linear1" in replayed.stdout
