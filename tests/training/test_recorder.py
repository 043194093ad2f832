"""training/recorder.py, timing.py: what of a run is evaluated, logged and timed."""

from dataclasses import replace

import pytest

from common.signals import StopRequest
from tests.helpers import metrics, write_config
from training.checkpointer import Checkpointer
from training.command_line import read_command_line
from training.config import TrainConfig, load
from training.recorder import Recorder
from training.resume import keep_resolved
from training.run_folder import locked
from training.setup import build
from training.step import StepResult


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


def test_a_step_is_logged_as_shares_of_the_measured_and_the_promised_rate(spec):
    state = build(spec, lambda line: None)
    result = StepResult(1.0, 1.0, tokens=10, padded_tokens=10, flops=10**9, updated=True)
    with locked(spec.run, spec.continued), StopRequest() as stop, Recorder(state, spec, stop) as r:
        r.peak_flops = 2e12
        for step, r.datasheet_flops in ((1, 0.0), (2, 4e12)):  # a card that is not known, and one
            state.progress.step = step
            r.end_step(result, 1e-3)
    unknown, known = metrics(spec.run)
    assert "speed/mfu_datasheet" not in unknown
    assert known["speed/mfu"] == pytest.approx(known["speed/tflops"] / 2)
    assert known["speed/mfu_datasheet"] == pytest.approx(known["speed/tflops"] / 4)


def test_prompts_of_samples_that_are_not_read_whole_are_counted(spec, capsys):
    state = build(spec, lambda line: None)
    pairs = [{"prompt": prompt, "completion": "a"} for prompt in ("a" * 32, "\u0436a", "a")]
    state.dataset = replace(state.dataset, kind="pairs", held_out=pairs)
    with locked(spec.run, spec.continued), StopRequest() as stop, Recorder(state, spec, stop):
        said = capsys.readouterr().out
    assert "1 of 3 prompts longer than the model's window of 32 tokens" in said
    assert "1 of the prompts' 38 tokens are <unk>" in said


def test_a_resume_keeps_the_precision_that_auto_became(tmp_path):
    """On a GPU without bf16 it was measured, and would be again, with another result perhaps."""
    wanted = load(write_config(tmp_path))
    stored = replace(wanted, precision="fp16", device="cuda:1")
    kept = keep_resolved(stored, replace(wanted, precision="auto", device="auto"))
    assert (kept.precision, kept.device) == ("fp16", "cuda:1")
    assert keep_resolved(stored, wanted).precision == "fp32"  # asked for


def test_an_evaluation_takes_no_more_rows_than_a_step(spec):
    """Else a run whose steps fit into memory, thanks to accumulation, dies in its evaluation."""
    state = build(spec, lambda line: None)
    rows = {True: set(), False: set()}  # by whether the model trains
    state.loss_module.register_forward_pre_hook(
        lambda module, inputs: rows[module.training].add(len(inputs[0]))
    )
    with (
        locked(spec.run, spec.continued) as folder,
        StopRequest() as stop,
        Recorder(state, spec, stop) as r,
    ):
        r.validate(Checkpointer(state, spec, folder, r.log, r.flush))
    for batch in state.batches(0, state.config.train.accumulation_steps):
        rows[True].add(len(batch.ids))
    assert max(rows[False]) == max(rows[True]) == 3
