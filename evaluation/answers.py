"""Answers to many prompts: the greedy one, several sampled ones, or those of a beam search."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from data.prompt_format import end_id, prompt_ids
from data.slots import Slots
from data.tokenizers.base import Tokenizer, clean_text
from generation.rerank import shares
from generation.sampling import Sampling
from model import engines

# of a prompt by its number: its candidates and how probable each is, to answers, the best first
Choose = Callable[[int, list[str], list[float]], list[str]]


def answer(
    model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    rules: Sampling,
    *,
    count: int = 1,
    beams: int = 1,
    seed: int = 0,
    slots: bool = False,
    choose: Choose | None = None,
    advance: Callable[[int], object] = lambda prompts: None,
) -> list[list[str]]:
    """`count` answers to each prompt of pairs, the best first.

    With beams > 1 those of a beam search; else the greedy one, and then others sampled by `rules`.
    Prompts of like length are answered together, and each as if it were alone. advance: called with
    the number of prompts that have been answered. model: the PyTorch decoder. slots: it reads and
    writes placeholders; an answer with one that the prompt lacks comes after the others, or has
    half the weight. choose: makes answers of all beams that have ended, or of all samples.
    """
    asked = [Slots(clean_text(prompt), slots) for prompt in prompts]
    ids = [prompt_ids("pairs", tokenizer, each.prompt) for each in asked]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    end, limit = end_id("pairs", tokenizer), rules.max_new_tokens
    longest = max(map(len, ids), default=0) + limit
    rows = engines.rows_at_once("torch", model, longest)
    size = max(1, rows // max(beams, count))
    answers: list[list[str]] = [[] for _ in ids]
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        batch = [ids[i] for i in chosen]
        if beams > 1:
            from generation.beams import search, with_log_probabilities

            found = search(model, batch, beams, limit, end_id=end, ended_first=True)
            if choose is not None:
                found = [with_log_probabilities(row, limit) for row in found]
        else:
            from generation.batched import generate

            greedy = replace(rules, greedy=True)
            found = [[(row, 0.0)] for row in generate(model, batch, greedy, end_id=end)]
            for sample in range(1, count):
                samples = [sample] * len(batch)
                more = generate(model, batch, rules, seed=seed, samples=samples, end_id=end)
                for row, text in zip(found, more, strict=True):
                    row.append((text, 0.0))
        for i, row in zip(chosen, found, strict=True):
            written = [(tokenizer.decode(text), score) for text, score in row]
            if beams > 1:  # a stable sort; of samples, the greedy one stays the first
                written.sort(key=lambda each, i=i: asked[i].lacks(each[0]))
            texts = [asked[i].show(text) for text, _ in written]
            if choose is not None:
                raw, totals = zip(*written, strict=True)
                texts = choose(i, texts, shares(raw, totals, asked[i]))
            answers[i] = texts[:count]
        advance(len(chosen))
    return answers
