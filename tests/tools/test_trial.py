"""tools/trial.py: what a run takes at its peak, and the micro-batch that fits."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.memory import keep_freed_memory
from tests.helpers import write_config
from tools.trial import Memory, attempt, bounded_memory, kept, release, try_run
from training.command_line import read_command_line
from training.setup import build

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"


@pytest.fixture
def state(tmp_path):
    """The tiny run, put together: eight examples a step in two micro-batches."""
    flags = ["--config", write_config(tmp_path), "--runs_dir", tmp_path / "runs"]
    spec = read_command_line(lambda line: None, list(map(str, flags)))
    return build(spec, lambda line: None)


def fails_above(state, rows: int) -> list:
    """From now on more than `rows` at once do not fit. The list gets what each failure held."""
    held = []

    def hook(module, inputs):
        if len(inputs[0]) > rows:
            array = np.ones(1000)
            held.append(weakref.ref(array))
            raise RuntimeError(FULL)

    state.loss_module.register_forward_pre_hook(hook)
    return held


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (9, ""),
        (3, "train.accumulation_steps = 4 fits (micro-batch of 2)"),
        (1, "train.accumulation_steps = 8 fits (micro-batch of 1)"),
    ],
)
def test_the_micro_batch_is_halved_until_it_fits(state, rows, says):
    held, lines = fails_above(state, rows), []
    measured, failure = try_run(state, lines.append)
    assert measured is not None
    assert says in failure and bool(says) == bool(failure)
    assert len(lines) == len(held) == {9: 0, 3: 1, 1: 2}[rows]
    assert (
        f"accumulation_steps = {state.config.train.accumulation_steps} fits" in failure or not says
    )
    assert measured.first_loss == pytest.approx(3.87, abs=0.05)  # of weights that have not moved
    taken = range(1, 1 + len(measured.steps))
    assert measured.tokens == sum(batch.tokens for step in taken for batch in state.batches(step))


def test_what_never_fits(state):
    held = fails_above(state, 0)
    measured, failure = try_run(state, lambda line: None)
    assert measured is None and len(held) == 3
    assert failure == (
        "the run needs more memory than there is, even with a micro-batch of 1; use a smaller "
        "model or --train.checkpoint_activations"
    )


def test_an_attempt_that_failed_holds_nothing(state):
    """An exception holds its frames, and those hold tensors."""
    held = fails_above(state, 0)
    state.loss_module.eval()  # as an evaluation leaves it that fails
    for parameter in state.model.parameters():  # as a step leaves them that fails at its end
        parameter.grad = torch.ones_like(parameter)
    assert attempt(state, 0, lambda line: None) == (None, True, "")
    release(state)
    assert state.loss_module.training
    assert [reference() for reference in held] == [None]
    assert kept(state) == (sum(p.nbytes for p in state.model.parameters()), 0, 0)


def test_another_error_is_none_of_memory(state):
    state.loss_module.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_run(state, lambda line: None)


def test_the_peak_of_an_evaluation_counts(state):
    """It was read before the evaluation, which may take more than a step."""
    size = 200_000_000

    def hook(module, inputs):
        if not module.training:
            np.ones(size // 8)

    keep_freed_memory()  # as a run does: what is freed stays with the process
    state.loss_module.register_forward_pre_hook(hook)
    memory = try_run(state, lambda line: None)[0].memory
    assert memory.evaluation > 0.9 * size > memory.step
    assert memory.peak == memory.evaluation
    assert memory.weights == memory.gradients and memory.optimizer > 2 * memory.weights
    assert memory.activations == memory.step - 2 * memory.weights - memory.optimizer > 0


def test_the_stages_of_memory():
    memory = Memory(10, 10, 20, step=100, evaluation=70, before=10, available=0, reserved=0)
    assert (memory.activations, memory.peak) == (60, 100)


def test_the_bound_on_memory_is_lifted_afterwards():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(SimpleNamespace(type="cpu"), 10**9):
        assert resource.getrlimit(resource.RLIMIT_DATA) != before
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
