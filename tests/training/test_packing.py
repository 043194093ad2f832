"""Runs on packed documents, in process: what a step learns, an evaluation, a NaN dump, a resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.reader import CheckpointError
from common.signals import StopRequest
from comparison.job import rows
from data.batches import evaluation_batches
from model.loss import LossModule
from tests.helpers import write_config
from tools.trial import step_sizes
from training.compile import full_shape
from training.config import changes, load
from training.cuda_graphs import find_obstacle
from training.nan_dump import restore_nan_dump, write_nan_dump
from training.resume import RunSpec
from training.setup import build
from training.step import train_step
from training.timing import StepTimer
from training.visuals import example_ids

LAYOUTS = [
    {"mask_documents": True},
    {"mask_documents": True, "start_token": False},
    {"packing": "best_fit"},
    {"packing": "best_fit", "mask_documents": True},
]
MASKED = [layout for layout in LAYOUTS if layout.get("mask_documents")]


@pytest.fixture
def make(tmp_path):
    """A function that builds the tiny run in float64 on documents that are packed some way."""
    path = tmp_path / "texts.jsonl"
    texts = [f"Text {i} of {i * i} words. " * (i % 5) for i in range(150)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def build_with(accumulation_steps=2, **layout):
        config = load(write_config(tmp_path, path))
        config = replace(
            config,
            precision="fp64",
            model=replace(config.model, dropout=0.0),
            data=replace(config.data, **layout),
            train=replace(config.train, accumulation_steps=accumulation_steps),
        )
        return build(RunSpec(tmp_path / "run", config), lambda _: None)

    return build_with


def take(t, number=0):
    micro_batches = t.batches(number, t.config.train.accumulation_steps)
    targets = t.batches.target_count(number)
    return train_step(t, t.loss_module, micro_batches, targets, number, StepTimer(t.device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulation_is_the_large_batch(make, layout):
    results = [take(make(n, **layout)) for n in (1, 4)]
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-12)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, abs=1e-12)


@pytest.mark.parametrize("layout", MASKED)
def test_a_step_and_an_evaluation_are_those_of_documents_alone(make, layout):
    t = make(**layout)
    assert t.val is not None

    def alone(batches):
        """The loss of each document as a sequence of its own, summed, and their targets."""
        found = [row for batch in batches for row in rows(batch)]
        assert len(found) > sum(len(batch.ids) for batch in batches)
        total = 0.0
        with torch.no_grad():
            for ids, targets in found:
                places = torch.tensor([i for i, y in enumerate(targets) if y >= 0])
                wanted = torch.tensor(targets)[places]
                total += LossModule(t.model)(torch.tensor([ids]), wanted, places).item()
        return total, sum(y >= 0 for _, targets in found for y in targets)

    total, count = alone(t.batches(0, 2))
    assert count == t.batches.target_count(0)
    assert take(t).loss == pytest.approx(total / count, abs=1e-12)
    total, count = alone([*evaluation_batches(t.val, 4)])
    found = t.validate(StopRequest())
    assert found["loss/val"] == pytest.approx(total / count, abs=1e-12)
    bits = total / np.log(2) / t.val.split.bytes
    assert found["bits_per_byte/val"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_differ_from_batch_to_batch(make, layout):
    t = make(**layout)
    assert full_shape(t) is None and find_obstacle(t) == "documents vary in length"
    filled = sum(tokens for tokens, _ in step_sizes(t)) / sum(size for _, size in step_sizes(t))
    assert 0.9 < filled <= 1 and (filled == 1) == ("packing" not in layout)
    assert 1 <= example_ids(t.val).shape[1] <= 32


def test_what_is_seen_may_not_change_on_resuming(make):
    config = make().config
    for layout in LAYOUTS:
        wanted = replace(config, data=replace(config.data, **layout))
        refused = {c.key for c in changes(config, wanted, extend=False) if c.refused}
        assert refused == {f"data.{key}" for key in layout if key != "start_token"}


def test_a_nan_dump_has_the_documents(make, tmp_path):
    t = make(packing="best_fit", mask_documents=True)
    micro_batches, targets = t.batches(0, 2), t.batches.target_count(0)

    def dump(batches):
        return write_nan_dump(
            t, t.checkpoint_files(), tmp_path, batches, targets, "the loss is nan"
        )

    restored = restore_nan_dump(dump(micro_batches))
    for ours, theirs in zip(restored.batches, micro_batches, strict=True):
        for a, b in zip(ours.inputs, theirs.inputs, strict=True):
            np.testing.assert_array_equal(a, b)
    for wrong in ([0, 3], [0, 5, 5, 128], [1, 128]):
        spoilt = [replace(b, documents=np.array(wrong, np.int32)) for b in micro_batches]
        with pytest.raises(CheckpointError, match="missing or invalid values"):
            restore_nan_dump(dump(spoilt))
