"""What is looked at while a model trains: validation loss, samples, attention maps.

None of it touches training: evaluation draws nothing at random, and sampling takes its numbers from
a hash, so a run evaluated more often has the same losses bit for bit.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from data.batches import Batch, Examples, evaluation_batches
from data.prompts import end_id, prompt_ids
from model.generation import generate
from model.sampling import Sampling
from training.loss import loss_sum

SAMPLES, FREE_LINES = 3, 10  # written at each evaluation: pairs, lines


class Interrupted(Exception):
    """A signal came in the middle of an evaluation; nothing of it is kept."""


def to_device(batch: Batch, device: torch.device) -> list[torch.Tensor | None]:
    """ids, targets and positions as tensors there."""
    arrays = (batch.ids, batch.targets, batch.positions)
    if device.type != "cuda":
        return [None if a is None else torch.from_numpy(a).to(device) for a in arrays]
    return [
        None if a is None else torch.from_numpy(a).pin_memory().to(device, non_blocking=True)
        for a in arrays
    ]


@torch.no_grad()
def evaluate(model, examples: Examples, batch_size: int, limit: int, precision, stop) -> dict:
    """Loss in nats a token over the validation examples (`limit` of them, 0: all).

    Returns the scalars to log: loss/val, perplexity/val, bits_per_byte/val.
    """
    device = next(model.parameters()).device
    total, targets = 0.0, 0
    model.eval()
    for batch in evaluation_batches(examples, batch_size, limit):
        if stop.signal:
            raise Interrupted
        with precision.autocast(device):
            total += loss_sum(model, *to_device(batch, device)).item()
        targets += len(batch.targets)
    model.train()
    loss = total / targets
    return {
        "loss/val": loss,
        "perplexity/val": math.exp(min(loss, 700)),
        "bits_per_byte/val": loss * examples.split.targets_per_byte() / math.log(2),
    }


class Sampler:
    """Text written by the model as it is now: after held-out prompts, or freely."""

    def __init__(self, dataset, rules: Sampling, seed: int):
        self.dataset, self.rules, self.seed = dataset, rules, seed
        if dataset.kind == "pairs":
            self.rules = replace(rules, greedy=True)  # what it thinks, rather than what it might
            held_out = dataset.held_out[:SAMPLES]
            self.shown = [(pair["prompt"], pair["completion"]) for pair in held_out]
        else:
            self.shown = [("", "")] * (FREE_LINES if dataset.kind == "lines" else 1)

    def __call__(self, model) -> list[str]:
        """One text for each of `shown`. Leaves the model in the mode it was in."""
        kind, tokenizer = self.dataset.kind, self.dataset.tokenizer
        prompts = [prompt_ids(kind, tokenizer, prompt) for prompt, _ in self.shown]
        end = end_id(kind, tokenizer)
        rows = generate(model, prompts, self.rules, seed=self.seed, end_id=end)
        return [tokenizer.decode(row) for row in rows]

    def lines(self, texts: list[str]) -> list[str]:
        """For people: the text, for pairs with its prompt and the true completion."""
        if self.dataset.kind != "pairs":
            return texts
        return [
            f"{prompt}\n  wrote: {text}\n  true:  {true}"
            for (prompt, true), text in zip(self.shown, texts, strict=True)
        ]


def example_ids(examples: Examples, longest: int = 32) -> np.ndarray:
    """The ids (1, T) of one validation example, for its attention maps."""
    batch = next(evaluation_batches(examples, 1))
    if examples.split.starts is not None:  # the shortest come first; one from the middle says more
        middle = np.argsort(examples.lengths, kind="stable")[examples.count // 2 :][:1]
        batch = examples.batch(middle)
    return batch.ids[:1, :longest]
