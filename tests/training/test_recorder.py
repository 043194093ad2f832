"""training/recorder.py, timing.py: what of a run is evaluated, logged and timed."""

import pytest

from common.signals import StopRequest
from tests.helpers import write_config
from training.checkpointer import Checkpointer
from training.command_line import read_command_line
from training.config import TrainConfig
from training.recorder import Recorder
from training.run_folder import locked
from training.setup import build


@pytest.fixture
def spec(tmp_path):
    """A run of the tiny configuration, eight examples a step in micro-batches of three."""
    file = write_config(tmp_path)
    flags = ["--config", file, "--runs_dir", tmp_path / "runs", "--name", "one"]
    flags += ["--train.accumulation_steps", 3]
    return read_command_line(lambda line: None, list(map(str, flags)))


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "size"), [(32, 1, 32), (32, 5, 7), (8, 3, 3), (4, 9, 1)]
)
def test_the_size_of_a_micro_batch(batch_size, accumulation_steps, size):
    assert TrainConfig(batch_size, accumulation_steps).micro_batch_size == size


def test_an_evaluation_takes_no_more_rows_than_a_step(spec):
    """Else a run whose steps fit into memory, thanks to accumulation, dies in its evaluation."""
    state = build(spec, lambda line: None)
    rows = {True: set(), False: set()}  # by whether the model trains
    state.loss_module.register_forward_pre_hook(
        lambda module, inputs: rows[module.training].add(len(inputs[0]))
    )
    with locked(spec.run, spec.continued), StopRequest() as stop, Recorder(state, spec, stop) as r:
        r.validate(Checkpointer(state, spec, r.log, r.metrics.flush))
    for batch in state.batches(0, state.config.train.accumulation_steps):
        rows[True].add(len(batch.ids))
    assert max(rows[False]) == max(rows[True]) == 3
