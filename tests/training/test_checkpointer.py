"""training/checkpointer.py: what is published while training goes on, and when it is told."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from checkpoint.reader import Checkpoint, list_steps, read_best, step_path
from common.signals import StopRequest
from tests.helpers import write_config
from training.checkpointer import Checkpointer
from training.command_line import read_command_line
from training.nan_dump import explain_stop
from training.recorder import Recorder
from training.run_folder import locked
from training.setup import build


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A run in this process: its state, its checkpointer, and what that has said."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    spec = read_command_line(print, ["--config", "tiny.toml", "--name", "it"])
    state, said = build(spec, lambda _: None), []
    with (
        locked(spec.run, spec.continued) as folder,
        StopRequest() as stop,
        Recorder(state, spec, stop) as recorder,
    ):
        checkpointer = Checkpointer(state, spec, folder, said.append, recorder.flush)
        yield SimpleNamespace(
            state=state, checkpointer=checkpointer, said=said, run=spec.run, recorder=recorder
        )
        checkpointer.wait()


@pytest.fixture
def disk(monkeypatch):
    """A disk that does not answer a thread's fsync until `free` is set, or fails with `error`."""
    disk = SimpleNamespace(free=threading.Event(), reached=threading.Event(), error=None)
    fsync = os.fsync

    def slow(descriptor):
        if threading.current_thread() is not threading.main_thread():
            disk.reached.set()
            assert disk.free.wait(60)
            if disk.error:
                raise disk.error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    yield disk
    disk.free.set()


def test_a_checkpoint_is_of_the_moment_of_its_save(training, disk):
    state, checkpointer = training.state, training.checkpointer
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    checkpointer.save()
    with torch.no_grad():  # as steps do, in place
        for parameter in state.model.parameters():
            parameter += 1
    state.progress.step, state.progress.tokens = 7, 700
    assert disk.reached.wait(60)
    checkpointer.poll()
    assert training.said == [] and list_steps(training.run) == []  # not told before it is there
    disk.free.set()
    checkpointer.wait()
    path = step_path(training.run, 0)
    assert training.said == [f"saved {path}"] and checkpointer.failure == ""
    saved = Checkpoint(path).verify()
    assert (saved.step, saved.state["tokens"]) == (0, 0)
    for name, array in saved.tensors("model.safetensors").items():
        assert torch.equal(torch.from_numpy(array), before[name])


def test_poll_tells_when_it_has_ended(training):
    training.checkpointer.save()
    training.checkpointer.pending[1].result()
    training.checkpointer.poll()
    assert training.said == [f"saved {step_path(training.run, 0)}"]
    training.checkpointer.poll()
    assert len(training.said) == 1


def test_a_second_save_and_the_best_step_wait_for_the_first(training, disk):
    state, checkpointer = training.state, training.checkpointer
    checkpointer.save()
    state.progress.best_step, state.progress.best_val_loss = 0, 2.0
    assert not checkpointer.update_best(2.5)  # for which nothing has to be on disk
    assert training.said == []
    state.progress.step = 1
    threading.Timer(0.2, disk.free.set).start()
    checkpointer.save()
    assert training.said == [f"saved {step_path(training.run, 0)}"]
    assert checkpointer.update_best(1.5)
    assert training.said[1:] == [f"saved {step_path(training.run, 1)}"]
    assert read_best(training.run) == {"step": 1, "val_loss": 1.5}


def test_a_save_that_fails_is_told_and_is_never_the_best(training, disk):
    state, checkpointer = training.state, training.checkpointer
    disk.error = OSError(28, "No space left on device")
    disk.free.set()
    checkpointer.save()
    assert not checkpointer.update_best(1.5)
    assert read_best(training.run) is None and list_steps(training.run) == []
    assert checkpointer.failure.startswith("step 0 could not be saved: ")
    assert "No space left on device" in checkpointer.failure
    assert training.said == [
        f"{checkpointer.failure}; training continues, older checkpoints are unaffected"
    ]
    disk.error, state.progress.step = None, 1
    checkpointer.save()
    checkpointer.wait()
    assert checkpointer.failure == "" and [p.name for p in list_steps(training.run)] == [
        "step_00000001"
    ]


def test_a_bug_in_the_thread_is_raised(training, disk):
    disk.error = ZeroDivisionError("a bug")
    disk.free.set()
    training.checkpointer.save()
    with pytest.raises(ZeroDivisionError):
        training.checkpointer.wait()
    training.checkpointer.wait()  # it is over


@pytest.mark.parametrize(
    ("place", "error"),
    [("torch.Tensor.to", MemoryError()),
     ("torch.Tensor.to", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
     ("threading.Thread.start", RuntimeError("can't start new thread"))],
)  # fmt: skip
def test_without_memory_for_a_copy_training_waits(training, monkeypatch, place, error):
    real = torch.Tensor.to

    def full(*arguments, copy=True):
        if copy:
            raise error
        return real(*arguments)

    monkeypatch.setattr(place, full)
    training.checkpointer.save()
    assert training.checkpointer.pending is None
    assert training.said == [f"saved {step_path(training.run, 0)}"]
    Checkpoint(step_path(training.run, 0)).verify()


def test_a_nan_stop_waits_for_the_pending_save(training, disk):
    training.checkpointer.save()
    threading.Timer(0.2, disk.free.set).start()
    batch = training.state.batches(0, 1)
    assert "tools.replay" in explain_stop(training.checkpointer, batch, 1, "nan")
    assert training.said == [f"saved {step_path(training.run, 0)}"]


def test_what_was_logged_is_on_disk_before_its_checkpoint(training, disk):
    """Also what waited, because the disk was full: a resume needs it."""
    training.recorder.metrics.jsonl.write(b'{"step": 0, "loss/train": 1.0}\n')
    training.checkpointer.save()
    assert disk.reached.wait(60)
    assert (training.run / "metrics.jsonl").read_bytes().endswith(b'"loss/train": 1.0}\n')
    assert list_steps(training.run) == []
