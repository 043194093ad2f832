"""Beam search: the most probable texts that a few kept in each step lead to. With PyTorch.

    texts = search(model, [[5, 6, 7], [8]], beams=5, max_new_tokens=64, end_id=3)

In each step every text that is kept is continued by every token, and the `beams` most probable of
all continuations are kept. One that ends is set aside with its score, its log probability divided
by the number of its tokens, the end counted, to the power of the length penalty: 1 gives the mean,
0 prefers short texts (Wu et al. 2016). The search of a prompt is over when `beams` have ended and
the score of the best text that is kept is below the worst of theirs.

Nothing is drawn at random. Sums are in float64, and of equal ones the text that was better before,
and then the lower id, comes first. A prompt gives the texts that it gives alone: in float64
always, in lower precision up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from common.errors import UserError
from generation import cpu_decoder
from generation.batched import BatchedDecoder, module_step, next_logits
from generation.cpu_decoder import CACHE_DTYPE, CPUDecoder
from generation.cuda_decoder import attention_kernels
from generation.kv_cache import KVCache
from generation.sampling import MAX_BEAMS, Sampling
from generation.sequential import check_prompts
from generation.torch_sampling import check_finite

# of a prompt's ids and of what a search has found, texts and scores, to the texts in order
Order = Callable[[tuple[int, ...], list[tuple[list[int], float]]], list[list[int]]]


@dataclass
class Hypotheses:
    """What the search has found for one prompt."""

    kept: list[tuple[list[int], float]]  # texts with the prompt, and their log probability
    ended: list[tuple[list[int], float]] = field(default_factory=list)  # without it, and the score


@torch.inference_mode()
def search(
    model: BatchedDecoder,
    prompts: Sequence[Sequence[int]],
    beams: int,
    max_new_tokens: int,
    *,
    end_id: int | None = None,
    length_penalty: float = 1.0,
    ended_first: bool = False,
) -> list[list[tuple[list[int], float]]]:
    """Up to `beams` texts for each prompt, best first: new ids without `end_id`, and the score.

    With a length penalty of 1 the score is the mean log probability of a token, in nats, with 0 the
    text's own. A text that has not ended after max_new_tokens is taken as it is; with ended_first
    after all that have, for it often repeats itself, and is the surer of it. Raises UserError for
    what `batched.generate` does.
    """
    if not 1 <= beams <= MAX_BEAMS:
        raise UserError(f"beams = {beams} must be 1 to {MAX_BEAMS}")
    check_prompts(model, prompts)
    found = [Hypotheses([(list(prompt), 0.0)]) for prompt in prompts]
    longest = max(map(len, prompts), default=0) + max_new_tokens
    places = min(model.max_len, longest - 1)
    dtype, step = None, partial(module_step, model)
    if cpu_decoder.is_supported(model):
        dtype, step = CACHE_DTYPE, CPUDecoder(model)
    # what is kept goes from one to the other and back
    cache, spare = (KVCache(model, len(found) * beams, places, dtype) for _ in range(2))
    cache.lengths = [0] * len(found)
    training = model.training
    model.eval()
    try:
        with attention_kernels(cache.keys.device):
            active, new = list(range(len(found))), 0
            while active and new < max_new_tokens:
                texts = [text for i in active for text, _ in found[i].kept]
                logits = next_logits(model, step, cache, texts)
                check_finite(logits.amax(-1))
                new += 1
                length = new**length_penalty
                parents, still, row = [], [], 0
                best = logits.double().log_softmax(-1)
                best, ids = (t.cpu() for t in best.topk(min(2 * beams, best.shape[-1]), -1))
                for i in active:
                    n = len(found[i].kept)
                    rows = slice(row, row + n)
                    origins = extend(found[i], best[rows], ids[rows], beams, new, length, end_id)
                    if origins:
                        parents += [row + origin for origin in origins]
                        still.append(i)
                    row += n
                active = still
                copy_rows(cache, parents, spare)
                cache, spare = spare, cache
    finally:
        model.train(training)
    results, limit = [], max_new_tokens**length_penalty
    for hypotheses, prompt in zip(found, prompts, strict=True):
        unfinished = [(t[len(prompt) :], s / limit) for t, s in hypotheses.kept]
        ranked = hypotheses.ended + unfinished  # each from the best on
        if not ended_first:
            ranked = sorted(ranked, key=lambda each: -each[1])
        results.append(ranked[:beams])
    return results


def with_log_probabilities(
    found: Sequence[tuple[list[int], float]], max_new_tokens: int
) -> list[tuple[list[int], float]]:
    """What a search with a length penalty of 1 has found, scores as log probabilities, in nats.

    Texts that had not ended are left out, unless none had.
    """
    # a score is the mean of a text's tokens and, if it has ended, the end
    whole = [each for each in found if len(each[0]) < max_new_tokens] or found
    return [(ids, score * min(len(ids) + 1, max_new_tokens)) for ids, score in whole]


def extend(
    found: Hypotheses,
    log_probabilities: torch.Tensor,
    ids: torch.Tensor,
    beams: int,
    new: int,
    length: float,
    end_id: int | None,
) -> list[int]:
    """One step of a prompt: which of the kept texts each of those kept now goes on from.

    log_probabilities, ids: (n, K) the K most probable tokens after each of the n kept texts, of
    which K = 2 beams are enough: at most every second one is an end. new: tokens of a text so far,
    with this one; length: what divides their log probability. [] where the search is over, with
    `kept` empty.
    """
    totals = torch.tensor([total for _, total in found.kept], dtype=torch.float64)
    totals = (totals[:, None] + log_probabilities).flatten()
    order = totals.argsort(descending=True, stable=True)[: 2 * beams].tolist()
    before, width, kept, origins = found.kept, ids.shape[1], [], []
    for rank, place in enumerate(order):
        origin, token = place // width, int(ids.flatten()[place])
        text, total = before[origin][0], float(totals[place])
        if token == end_id:
            if rank < beams:  # only those that would be kept
                found.ended.append((text[len(text) - new + 1 :], total / length))
        elif len(kept) < beams:
            kept.append(([*text, token], total))
            origins.append(origin)
    found.ended = sorted(found.ended, key=lambda each: -each[1])[:beams]
    over = len(found.ended) == beams and (not kept or kept[0][1] / length <= found.ended[-1][1])
    found.kept = [] if over else kept
    return [] if over else origins


def copy_rows(source: KVCache, rows: list[int], target: KVCache):
    """Fills `target` with these rows of `source`, each as often as it is named."""
    target.lengths = [source.lengths[row] for row in rows]
    used = max(target.lengths, default=0)
    target.kv[:, :, : len(rows), :, :used] = source.kv[:, :, rows, :, :used]


def generate(
    model: BatchedDecoder,
    prompts: Sequence[Sequence[int]],
    rules: Sampling,
    *,
    beams: int,
    samples: Sequence[int],
    end_id: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    order: Order | None = None,
    **_,
) -> list[list[int]]:
    """`batched.generate` with a beam search: sample 0 of a prompt is its best text, 1 the next.

    Of the rules only max_new_tokens counts. on_token is called when all has been found. order: puts
    what a search has found in another order.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    limit = rules.max_new_tokens
    found = search(model, distinct, beams, limit, end_id=end_id, ended_first=True)
    texts = {}
    for prompt, several in zip(distinct, found, strict=True):
        texts[prompt] = order(prompt, several) if order else [ids for ids, _ in several]
    rows = []
    for row, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        several = texts[tuple(prompt)]
        ids = several[sample % len(several)]
        end = next((i for i, t in enumerate(ids, 1) if on_token and on_token(row, t)), len(ids))
        rows.append(ids[:end])
    return rows
