"""training/precision.py: what `auto` measures and takes; a resume keeps it."""

import json
import re
from dataclasses import replace

import pytest
import torch

from checkpoint.reader import Checkpoint, list_steps
from common.device import PRECISIONS
from model.config import ModelConfig
from tests.helpers import rewrite, run, write_config
from training import precision as module
from training.config import load
from training.precision import Work, choose_precision, faster, measure
from training.resume import RunSpec
from training.setup import build

CPU = torch.device("cpu")
SHAPE = ModelConfig(97, 32, 2, 3, 64, 32, 0.1)
WORK = Work(4, 16, 1.0)


@pytest.mark.parametrize("name", PRECISIONS)
def test_what_is_asked_for_is_not_measured(name, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    assert choose_precision(name, SHAPE, WORK, CPU)[0] is PRECISIONS[name]


@pytest.mark.parametrize("name", PRECISIONS)
def test_that_16_bits_are_slow_here_is_said(name, monkeypatch):
    monkeypatch.setattr(module, "SLOW", 0)
    said = choose_precision(name, SHAPE, WORK, CPU)[1]
    slow = re.fullmatch(r"as requested, but slow on this processor: .* take \d+ times .*", said)
    assert bool(slow) == (name in ("bf16", "fp16"))
    monkeypatch.setattr(module, "SLOW", float("inf"))
    assert choose_precision(name, SHAPE, WORK, CPU)[1] == "as requested"


@pytest.mark.parametrize(
    ("low", "ratio", "name", "why"),
    [
        ("bf16", 2.0, "bf16", "measured to be 2.00 times as fast as fp32"),
        ("bf16", 1.01, "fp32", "bf16 is measured to be only 1.01 times as fast"),
        ("bf16", 0.5, "fp32", "measured to be 2.00 times as fast as bf16"),
        ("fp16", 1.6, "fp16", "measured to be 1.60 times as fast as fp32"),
        ("fp16", 1.4, "fp32", "fp16 is measured to be only 1.40 times as fast"),
    ],
)
def test_the_faster_one_wins(low, ratio, name, why):
    assert faster(low, ratio) == (PRECISIONS[name], f"auto: {why}")


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        replace(SHAPE, vocab_size=50_304, norm_first=True, final_norm=True, tie_embeddings=True),
        replace(SHAPE, n_layers=1, bias=False, positions="learned", attention_dropout=0.1),
    ],
)
@pytest.mark.parametrize("work", [WORK, Work(1, 1, 1.0), Work(512, 32, 0.01)])
def test_a_layer_and_the_loss_are_measured_in_each(shape, work, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "FLOPS", 1e7)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = measure(shape, work, CPU, ("fp32", "bf16"))
    assert found.keys() == {"fp32", "bf16"} and min(found.values()) > 0
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers have moved"


def test_the_work_is_that_of_a_micro_batch(tmp_path):
    config = load(write_config(tmp_path))
    state = build(RunSpec(tmp_path / "run", config), lambda _: None)
    assert Work.of(state.batches.examples, 4) == Work(4, 32, 1.0)
    data = replace(config.data, path="", source="stdlib", tokenizer="bpe", vocab_size=512)
    model = replace(config.model, max_len=64)
    config = replace(config, data=data, model=model)
    state = build(RunSpec(tmp_path / "run", config), lambda _: None)
    examples = state.batches.examples
    work = Work.of(examples, 4)
    assert work.length == examples.lengths.mean() // 1
    assert work.targets == pytest.approx(examples.n_targets.sum() / examples.lengths.sum())
    assert 0 < work.targets < 1


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_run_is_in_what_was_measured(tmp_path, name, monkeypatch):
    found = {"fp32": 1.0, "bf16": 1.0, name: 0.5}
    monkeypatch.setattr(module, "measure", lambda *_: found)
    config = replace(load(write_config(tmp_path)), precision="auto")
    said = []
    state = build(RunSpec(tmp_path / "run", config), said.append)
    assert state.precision.name == state.config.precision == name
    line = next(line for line in said if line.startswith("precision: "))
    assert line.startswith(f"precision: {name} (auto: measured to be 2.00 times as fast as ")


def test_a_resume_keeps_it_and_notes_another_processor(tmp_path, monkeypatch):
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--precision", "auto", "--max_steps", "2", "--name", "first"]
    first = run("train.py", *flags, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "precision: " in first.stdout and "measured" in first.stdout
    chosen = json.loads((tmp_path / "runs/first/config.json").read_text())["precision"]
    assert chosen in ("fp32", "bf16")
    resume = ["train.py", "--resume", "--extend", "--precision", "auto", "--max_steps", "4"]
    again = run(*resume, "--name", "first", cwd=tmp_path)
    assert f"precision: {chosen} (as requested" in again.stdout, again.stderr
    assert json.loads((tmp_path / "runs/first/config.json").read_text())["precision"] == chosen

    def elsewhere(state):
        state["versions"]["processor"] = "another"

    newest = Checkpoint(list_steps(tmp_path / "runs/first")[-1])
    moved = rewrite(newest, tmp_path / "runs" / "moved", state=elsewhere)
    other = {"fp32": "bf16", "bf16": "fp32"}[chosen]
    for ratio, noted in ((1.05, False), (2.0, True)):
        monkeypatch.setattr(module, "measure", lambda *_, r=ratio: {chosen: r, other: 1.0})
        checkpoint, said = Checkpoint(moved), []
        config = replace(load(tmp_path / "tiny.toml"), precision=chosen)
        build(RunSpec(tmp_path / "runs" / "moved", config, resume=checkpoint), said.append)
        notes = [line for line in said if "on this processor" in line]
        assert bool(notes) == noted, said
        assert not notes or f"--precision {other}" in notes[0]

    def without(state):
        state["versions"] = "none that could be read"

    checkpoint = Checkpoint(rewrite(newest, tmp_path / "runs" / "nameless", state=without))
    said = []
    build(RunSpec(tmp_path / "runs" / "nameless", config, resume=checkpoint), said.append)
    assert not [line for line in said if "on this processor" in line]
