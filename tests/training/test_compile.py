"""--compile: how many compilations there are, and a run that goes on where there is no compiler."""

import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers import losses, run, write_config
from training import compile as module
from training.compile import CompiledLoss, compile_loss, full_shape
from training.config import load
from training.resume import RunSpec
from training.setup import build
from training.step import train_step
from training.timing import StepTimer

PAIRS = {"source": "stdlib", "path": "", "tokenizer": "bpe", "vocab_size": 512}


@pytest.fixture
def make(tmp_path):
    """A function that builds the tiny run, on a stream or on pairs."""
    torch._dynamo.reset()
    counters.clear()

    def build_with(pairs=False, precision="fp32", **train):
        config = load(write_config(tmp_path))
        config = replace(
            config,
            precision=precision,
            train=replace(config.train, **train),
            data=replace(config.data, **PAIRS) if pairs else config.data,
            # torch.compile draws dropout's numbers in its own order
            model=replace(config.model, max_len=64, dropout=0.0),
        )
        return build(RunSpec(tmp_path / "run", config), lambda _: None)

    return build_with


def train(state, loss_module, steps):
    """Losses of the first steps, and the shapes of their batches."""
    accumulation, found, shapes = state.config.train.accumulation_steps, [], set()
    for number in range(steps):
        micro_batches = state.batches(number, accumulation)
        shapes |= {batch.ids.shape for batch in micro_batches}
        targets = state.batches.target_count(number)
        timer = StepTimer(state.device)
        found.append(train_step(state, loss_module, micro_batches, targets, number, timer).loss)
    return found, shapes


@pytest.mark.parametrize(
    ("pairs", "precision", "checkpoint_activations"),
    [(False, "fp32", False), (False, "bf16", True), (True, "fp32", False), (True, "bf16", False)],
)
def test_the_model_is_one_graph_whatever_shapes_come(
    make, pairs, precision, checkpoint_activations
):
    options = {"precision": precision, "checkpoint_activations": checkpoint_activations}
    expected, _ = train(plain := make(pairs, **options), plain.loss_module, 8)
    state = make(pairs, **options)
    compiled = compile_loss(state, *first_batch(state), lambda _: None)
    assert isinstance(compiled, CompiledLoss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, shapes = train(state, compiled, 8)
    assert len(shapes) > 1
    # the model, and the softmax of the loss: of one size of chunk, and then of any
    assert counters["stats"]["unique_graphs"] <= 3, counters
    assert sum(counters["graph_break"].values()) == 1, "the loss alone stands between graphs"
    # 0 is what a model of which nothing is compiled would have
    assert counters["stats"]["calls_captured"] > 20
    assert found == pytest.approx(expected, rel=1e-3 if precision == "bf16" else 1e-5)


def first_batch(state):
    return state.batches(0, state.config.train.accumulation_steps), state.batches.target_count(0)


def test_a_shorter_batch_does_not_end_constant_sizes(make):
    """(D1) A torch.compile left to itself would go over to sizes that vary, for good."""
    state = make()
    shape = full_shape(state)
    compiled = CompiledLoss(state.loss_module, shape)
    called = []
    compiled.compiled = lambda *inputs: called.append(inputs[0].shape) or state.loss_module(*inputs)
    _, shapes = train(state, compiled, state.batches.steps_per_epoch + 1)
    assert len(shapes) > 1 and set(called) == {shape}


def test_full_memory_is_not_taken_for_a_failing_compiler(make, monkeypatch):
    state = make()

    class Full:
        def __init__(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, "CompiledLoss", Full)
    with pytest.raises(torch.OutOfMemoryError):
        compile_loss(state, *first_batch(state), lambda _: None)


def test_without_a_compiler_the_run_goes_on(tmp_path, monkeypatch):
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--max_steps", "6"]
    for name in ("CC", "CXX"):
        monkeypatch.setitem(os.environ, name, str(tmp_path / "no-such-compiler"))
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = run("train.py", *flags, "--name", "plain", cwd=tmp_path)
    compiled = run("train.py", *flags, "--name", "compiled", "--compile", cwd=tmp_path)
    assert plain.returncode == compiled.returncode == 0, compiled.stderr
    said = [line for line in compiled.stdout.splitlines() if line.startswith("compile:")]
    assert len(said) == 2
    assert "continuing without it" in said[1]
    assert "Traceback" not in compiled.stdout + compiled.stderr
    assert losses(tmp_path / "runs/compiled") == losses(tmp_path / "runs/plain")
