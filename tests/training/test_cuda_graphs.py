"""training/cuda_graphs.py with a capture that needs no GPU: the work itself, done again.

What is replayed, from which places and in which order is the same; tests/cuda has the real one.
"""

from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from tests.helpers import write_config
from training import cuda_graphs as module
from training.compile import full_shape
from training.config import load
from training.cuda_graphs import WARM_UP, GraphedStep, choose_step, find_obstacle
from training.optimizer import set_lr
from training.resume import RunSpec
from training.setup import build, recompute_layers
from training.step import NonFiniteError, train_step
from training.timing import StepTimer


@pytest.fixture
def make(tmp_path):
    """A function that builds the tiny run, whose epochs end in a short batch."""

    def build_with(optimizer="muon", **changes):
        config = load(write_config(tmp_path))
        config = replace(config, optimizer=replace(config.optimizer, name=optimizer), **changes)
        return build(RunSpec(tmp_path / "run", config), lambda _: None)

    return build_with


def use_tensor_lr(state):
    """float32, as a graph reads it."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])


def take(state, call, step, *before):
    set_lr(state.optimizers, 1 / (1 + step))
    micro_batches = state.batches(step, state.config.train.accumulation_steps)
    targets = state.batches.target_count(step)
    return call(*before, micro_batches, targets, step, StepTimer(state.device))


def weights(state):
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def recorder(log):
    """A capture that notes what is captured and what is replayed."""

    def capture(work):
        log.append("capture")

        def replay():
            log.append("replay")
            work()

        return replay

    return capture


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_are_the_same_bit_for_bit(make, optimizer, precision):
    plain, graphed = (make(optimizer, precision=precision) for _ in range(2))
    use_tensor_lr(plain)
    log, said = [], []
    step = GraphedStep(
        graphed, graphed.loss_module, full_shape(graphed), said.append, recorder(log)
    )
    shapes, whole = set(), 0
    for number in range(plain.batches.steps_per_epoch + 3):  # over the end of an epoch
        found = [b.ids.shape for b in plain.batches(number, 2)]
        shapes |= set(found)
        whole += set(found) == {step.shape}
        expected = take(plain, train_step, number, plain, plain.loss_module)
        assert take(graphed, step, number) == expected
        for name, weight in weights(plain).items():
            assert torch.equal(weight, graphed.model.get_parameter(name)), (number, name)
            gradients = [s.model.get_parameter(name).grad for s in (plain, graphed)]
            torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert len(shapes) > 1, "no shorter batch was met"
    assert log.count("capture") == 2 and said == [
        "cuda_graphs: each step is replayed as CUDA graphs from here on"
    ]
    # two micro-batches and an update, in all steps of whole batches but the first
    assert log.count("replay") == 3 * (whole - WARM_UP)


def test_only_the_replay_reads_the_batch(make):
    """A capture does not compute: what it would have left in the gradients does no harm."""
    state = make()
    step = GraphedStep(state, state.loss_module, full_shape(state), lambda _: None, recorder([]))
    for number in range(WARM_UP):
        take(state, step, number)
    before = weights(state)
    step.capture_step(state.batches.target_count(0))
    assert all(torch.equal(w, before[n]) for n, w in weights(state).items())


def test_a_failing_capture_is_one_line_and_training_goes_on(make):
    plain, graphed = make(), make()
    use_tensor_lr(plain)
    said = []

    def capture(work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    step = GraphedStep(graphed, graphed.loss_module, full_shape(graphed), said.append, capture)
    for number in range(WARM_UP + 3):
        expected = take(plain, train_step, number, plain, plain.loss_module)
        assert take(graphed, step, number) == expected
    assert said == [
        "cuda_graphs: the capture failed (CUDA error: operation not permitted when stream is "
        "capturing); continuing without"
    ]


def test_a_capture_that_breaks_cuda_ends_the_run(make, monkeypatch):
    state = make()
    monkeypatch.setattr(module, "can_draw", lambda device: False)

    def capture(work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    step = GraphedStep(state, state.loss_module, full_shape(state), lambda _: None, capture)
    for number in range(WARM_UP):
        take(state, step, number)
    with pytest.raises(UserError, match=r"--train.cuda_graphs: the capture failed \(CUDA error"):
        take(state, step, WARM_UP)


def test_a_gradient_that_is_not_finite_stops_before_the_update(make):
    state = make()
    step = GraphedStep(state, state.loss_module, full_shape(state), lambda _: None, recorder([]))
    for number in range(WARM_UP + 1):
        take(state, step, number)
    before = weights(state)
    state.model.layers[1].norm1.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteError, match=f"step {WARM_UP + 2}: the gradient's norm is"):
        take(state, step, WARM_UP + 1)
    assert all(torch.equal(w, before[n]) for n, w in weights(state).items())


@pytest.mark.parametrize(
    ("precision", "settings", "why"),
    [
        ("fp32", {}, "there is no CUDA device"),
        ("fp16", {}, "fp16 looks at each step's gradient"),
        (
            "fp32",
            {"accumulation_steps": 3},
            "train.accumulation_steps does not divide train.batch_size",
        ),
    ],
)
def test_where_it_cannot_be_used_a_line_says_so(make, precision, settings, why):
    said = []
    state = make(precision=precision)
    train = replace(state.config.train, cuda_graphs=True, **settings)
    state.config = replace(state.config, train=train)
    call = choose_step(state, state.loss_module, said.append)
    assert call.func is train_step
    assert said == [f"cuda_graphs: not used ({why})"]


def test_what_keeps_a_run_on_cuda_from_it(make):
    """torch.utils.checkpoint reads the random state before each layer, which a capture forbids."""
    state = replace(make(), device=torch.device("cuda"))
    assert not find_obstacle(state)
    train = replace(state.config.train, checkpoint_activations=True)
    state.config = replace(state.config, train=train)
    assert "random state" in find_obstacle(state)
    state.config = replace(state.config, model=replace(state.config.model, dropout=0.0))
    assert not find_obstacle(state)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_looks_at_random_numbers_where_some_are_drawn(dropout, monkeypatch):
    model = TransformerDecoder.from_config(ModelConfig(23, 24, 3, 2, 40, 16, dropout))
    recompute_layers(model)
    looks, get_rng_state = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: looks.append(1) or get_rng_state())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert bool(looks) == bool(dropout)
