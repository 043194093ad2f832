"""Generating with the PyTorch decoder: a cache of keys and values, prefill, and decode.

    ids = generate(model, [[5, 6, 7], [8]], Sampling(top_k=50), end_id=3)

Prefill reads all of a prompt but its last token in one pass; then each decode step reads one token
of every row and chooses the next. A row gives what it gives alone, whatever stands beside it: in
float64 exactly, in narrower floats up to rounding.

Shapes: B rows, T tokens, L layers, H heads of width D, S places in the cache, V = vocab_size.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from model import decode_step
from model.choosing import choose_rows
from model.decode_step import DecodeStep
from model.decoding import check, number_samples
from model.sampling import Sampling, uniform, window

PAYS = 8  # new tokens from which it pays to lay out the weights anew: it costs a few steps


class KVCache:
    """Keys and values of the tokens each row has read, in memory allocated once.

    The decoder's forward pass, without gradients, calls `take` and then each layer's `extend`. A
    pass over several tokens needs an empty cache (prefill); a pass over one token adds it to each
    row at that row's own place (decode). `lengths` may be set by who knows that the end of a row
    was padding.
    """

    def __init__(self, model, rows: int, places: int, dtype: torch.dtype | None = None):
        config, like = model.config, model.embed.weight
        width = config.d_model // config.n_heads
        shape = (config.n_layers, rows, config.n_heads, places, width)  # (L, B, H, S, D)
        # zeros, because attention multiplies also what it masks, and 0 times NaN is NaN
        self.keys = torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * rows
        self.layers = [LayerCache(self, i) for i in range(config.n_layers)]
        self.mask = None  # (B, 1, 1, S): which keys each row's token sees; None: all, or causal

    @property
    def nbytes(self) -> int:
        """Bytes of memory: 2 L B H S D times the size of a number."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def take(self, table, T: int):
        """Makes room for T more tokens a row; their positions in `table`: (T, C) or (B, 1, C)."""
        first, last, B = min(self.lengths), max(self.lengths), len(self.lengths)
        if T > 1 and last > 0:
            raise ValueError(f"{T} tokens at once need an empty cache; this one holds {last}")
        if last + T > self.keys.shape[3]:
            raise ValueError(
                f"the cache has {self.keys.shape[3]} places, and {last + T} are needed"
            )
        self.lengths = [n + T for n in self.lengths]
        self.seen_keys = self.keys[:, :B, :, : last + T].unbind()  # L times (B, H, S, D)
        self.seen_values = self.values[:, :B, :, : last + T].unbind()
        self.new_keys = self.keys[:, :B, :, last : last + T].unbind()  # L times (B, H, T, D)
        self.new_values = self.values[:, :B, :, last : last + T].unbind()
        if first == last:  # the new tokens are the last ones of every row: no mask
            self.mask = self.places = None
            return table[last : last + T]
        rows, every = (torch.arange(n, device=table.device) for n in (B, last + 1))
        places = torch.tensor(self.lengths, device=table.device) - 1  # (B,)
        self.mask = (every <= places[:, None])[:, None, None]
        self.places = (rows, slice(None), places)
        return table[places][:, None]

    def drop(self, row: int):
        """Forgets a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.keys[:, row] = self.keys[:, last]
            self.values[:, row] = self.values[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.layer = cache, layer

    def extend(self, K, V):
        """Stores K and V (B, H, T, D) at the places taken; all that is stored: (B, H, S, D)."""
        cache, layer = self.cache, self.layer
        keys, values = cache.seen_keys[layer], cache.seen_values[layer]
        if cache.places is None:
            cache.new_keys[layer].copy_(K)
            cache.new_values[layer].copy_(V)
        else:
            keys[cache.places] = K[:, :, 0].type_as(keys)
            values[cache.places] = V[:, :, 0].type_as(values)
        return keys.type_as(K), values.type_as(V)  # a cache may be wider than what comes


@torch.inference_mode()
def generate(
    model,
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

    seed, samples: which random numbers decide (`sampling.uniform`); without `samples` a prompt is
    sample 0, and equal prompts are 0, 1, 2 and so on.
    on_token: called with (index of the prompt, id) for each new token; True ends that row.
    on_logits: called before it with (index, logits (V), id), the end included, for `explain`.
    A text longer than `model.max_len` is read through `sampling.window`. PyTorch's random state is
    not touched, and the model is left in the mode it was in. Raises UserError for an empty prompt,
    ids outside the vocabulary, and a model whose logits are not finite.
    """
    check(model, prompts)
    texts = [list(prompt) for prompt in prompts]
    samples = number_samples(prompts) if samples is None else samples
    rows = list(range(len(texts)))  # rows[b]: the prompt that row b of the cache goes on with
    longest = max(map(len, texts), default=0) + rules.max_new_tokens
    quick = rules.max_new_tokens >= PAYS and decode_step.suits(model)
    places = min(model.max_len, longest - 1)  # the last token is never read
    cache = KVCache(model, len(rows), places, decode_step.CACHE if quick else None)
    step = DecodeStep(model) if quick and rows else partial(plain_step, model)

    def finished(row: int, token: int) -> bool:
        if token == end_id:
            return True
        texts[row].append(token)
        stopped = on_token is not None and on_token(row, token)
        return bool(stopped) or len(texts[row]) - len(prompts[row]) == rules.max_new_tokens

    training = model.training
    model.eval()
    try:
        while rows:
            logits = next_logits(model, step, cache, [texts[row] for row in rows])
            numbers = [uniform(seed, samples[row], len(texts[row])) for row in rows]
            tokens = choose_rows(logits, rules, numbers)
            if on_logits is not None:
                for row, values, token in zip(rows, logits.tolist(), tokens, strict=True):
                    on_logits(row, values, token)
            done = [b for b, row in enumerate(rows) if finished(row, tokens[b])]
            for b in reversed(done):
                cache.drop(b)
                rows[b] = rows[-1]
                rows.pop()
    finally:
        model.train(training)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def plain_step(model, ids, cache: KVCache) -> torch.Tensor:
    """What a DecodeStep gives, by the module itself: on every device, in every precision."""
    return model(ids, cache=cache)[:, -1]


def next_logits(model, step, cache: KVCache, texts: list[list[int]]) -> torch.Tensor:
    """Logits (B, V) after each text, of which the cache holds all but the last token, or should."""
    seen = [window(len(text), model.max_len) for text in texts]
    stale = [b for b, n in enumerate(cache.lengths) if n != seen[b] - 1]  # new, or its window moved
    if stale:
        prefill(model, cache, stale, [texts[b][-seen[b] : -1] for b in stale])
    newest = torch.tensor([text[-1:] for text in texts], device=cache.keys.device)  # (B, 1)
    return step(newest, cache)


def prefill(model, cache: KVCache, rows: list[int], texts: list[list[int]]):
    """Reads whole texts into `rows` of the cache, whatever they held: each from place 0."""
    lengths = [len(text) for text in texts]
    T = max(lengths)
    # a part of the rows is read into a cache of its own; all of them need no second one
    own = cache
    if len(rows) < len(cache.lengths):
        own = KVCache(model, len(rows), T, cache.keys.dtype)
    if T > 0:
        ids = [text + [0] * (T - len(text)) for text in texts]  # no token sees what is on its right
        own.lengths = [0] * len(rows)
        model.hidden(torch.tensor(ids, device=cache.keys.device), cache=own)
    if own is not cache:
        cache.keys[:, rows, :, :T] = own.keys
        cache.values[:, rows, :, :T] = own.values
    for row, length in zip(rows, lengths, strict=True):
        cache.lengths[row] = length
