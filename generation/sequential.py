"""Generating with an engine that reads one sequence at a time. Standard library only.

    ids = generate(model, [[5, 6, 7], [8]], Sampling(top_k=50), end_id=3)

It means what `generation.batched.generate` means, for one prompt after the other. A model has
`config`, `max_len`, `training`, `train()` and `eval()` as in PyTorch; `new_cache()`, an object with
`length` and `clear()`; and `next_logits(cache, ids)`, the logits (V) after `ids`, which follow on
the `length` tokens that the cache has read.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from operator import index
from typing import Protocol, TypeVar, cast

from common.errors import UserError
from generation.sampling import Sampling, sample_token, uniform, window


class Shape(Protocol):
    """What is asked here of a model's `config`."""

    @property
    def vocab_size(self) -> int: ...


class AnyDecoder(Protocol):
    """What is asked here of the decoder of any engine."""

    training: bool

    @property
    def config(self) -> Shape: ...
    @property
    def max_len(self) -> int: ...
    def train(self, mode: bool = True) -> object: ...
    def eval(self) -> object: ...


class Cache(Protocol):
    """What a decoder has read."""

    @property
    def length(self) -> int: ...
    def clear(self) -> object: ...


C = TypeVar("C", bound=Cache)


class SequentialDecoder(AnyDecoder, Protocol[C]):
    """A decoder that reads one sequence at a time, and has caches of its own kind."""

    def new_cache(self) -> C: ...
    def next_logits(self, cache: C, ids: list[int]) -> list[float]: ...


def generate(
    model: SequentialDecoder[C],
    prompts: Sequence[Sequence[int]],
    rules: Sampling,
    *,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    end_id: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_logits: Callable[[int, list[float], int], None] | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, up to `end_id` (not included) or rules.max_new_tokens of them.

    Arguments and errors are those of `generation.batched.generate`, but a prompt is done before the
    next one begins.
    """
    check_prompts(model, prompts)
    samples = number_samples(prompts) if samples is None else samples
    cache = model.new_cache()
    rows = []
    training = model.training
    model.eval()
    try:
        for row, prompt in enumerate(prompts):
            text = list(prompt)
            rows.append(text)
            stopped = False
            while not stopped and len(text) - len(prompt) < rules.max_new_tokens:
                logits = logits_after(model, cache, text)
                token = sample_token(logits, rules, uniform(seed, samples[row], len(text)))
                if on_logits is not None:
                    on_logits(row, logits, token)
                if token == end_id:
                    break
                text.append(token)
                stopped = on_token is not None and on_token(row, token)
            cache.clear()
    finally:
        model.train(training)
    return [text[len(prompt) :] for text, prompt in zip(rows, prompts, strict=True)]


def logits_after(model: SequentialDecoder[C], cache: C, text: list[int]) -> list[float]:
    """Logits (V) after `text`, of which the cache holds all but the last token, or should."""
    seen = window(len(text), model.max_len)
    if cache.length != seen - 1:  # a new text, or its window moved
        cache.clear()
    logits = model.next_logits(cache, text[len(text) - seen + cache.length :])
    if any(map(math.isnan, logits)) or not math.isfinite(max(logits)):
        raise UserError(
            "the logits are not finite (training diverged); lower optimizer.lr, or use an earlier "
            "checkpoint"
        )
    return logits


def check_prompts(model: AnyDecoder, prompts: Sequence[Sequence[int]]):
    """Raises UserError for prompts that the model cannot read."""
    for i, prompt in enumerate(prompts):
        prompt = ids_of(prompt, f"prompt {i}")
        if not prompt:
            raise UserError(f"prompt {i} has no tokens; start it with start_id")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise UserError(
                f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, "
                f"but the model's vocabulary ends at {model.config.vocab_size - 1}; use the "
                "tokenizer of the model's checkpoint"
            )


def ids_of(tokens: object, name: str = "tokens") -> list[int]:
    """A prompt as a list of Python's integers. Raises UserError for what is no list of ids."""
    try:
        return [index(token) for token in cast(Iterable, tokens)]
    except TypeError:
        raise UserError(
            f"{name} = {tokens!r:.60} must be a list of ids, one prompt's, such as [5, 6, 7]"
        ) from None


def number_samples(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt, how many equal ones stand before it."""
    counters = defaultdict(count)
    return [next(counters[tuple(prompt)]) for prompt in prompts]
