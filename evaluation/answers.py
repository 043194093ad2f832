"""Answers to many prompts: the greedy one, several sampled ones, or those of a beam search."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from data.prompt_format import end_id, prompt_ids
from data.tokenizer import Tokenizer, clean_text
from generation.sampling import Sampling
from model import engines

Log = Callable[[str], object]


def answer(
    model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    rules: Sampling,
    *,
    count: int = 1,
    beams: int = 1,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> list[list[str]]:
    """`count` answers to each prompt of pairs, the best first.

    With beams > 1 those of a beam search; else the greedy one, and then others sampled by `rules`.
    Prompts of like length are answered together, and each as if it were alone. advance: called with
    the number of prompts that have been answered. model: the PyTorch decoder.
    """
    ids = [prompt_ids("pairs", tokenizer, clean_text(prompt)) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    end = end_id("pairs", tokenizer)
    longest = max(map(len, ids), default=0) + rules.max_new_tokens
    rows = engines.rows_at_once("torch", model, longest)
    size = max(1, rows // max(beams, count))
    answers: list[list[str]] = [[] for _ in ids]
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        batch = [ids[i] for i in chosen]
        if beams > 1:
            from generation.beams import search

            found = [[text for text, _ in row[:count]] for row in search(
                model, batch, beams, rules.max_new_tokens, end_id=end
            )]  # fmt: skip
        else:
            from generation.batched import generate

            greedy = replace(rules, greedy=True)
            found = [[row] for row in generate(model, batch, greedy, end_id=end)]
            for sample in range(1, count):
                samples = [sample] * len(batch)
                more = generate(model, batch, rules, seed=seed, samples=samples, end_id=end)
                for row, text in zip(found, more, strict=True):
                    row.append(text)
        for i, row in zip(chosen, found, strict=True):
            answers[i] = [tokenizer.decode(text) for text in row]
        advance(len(chosen))
    return answers
