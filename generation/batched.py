"""Generating with the PyTorch decoder: a cache of keys and values, prefill, and decode.

    ids = generate(model, [[5, 6, 7], [8]], Sampling(top_k=50), end_id=3)

Prefill reads all of a prompt but its last token in one pass; then each decode step reads one token
of every row and chooses the next. A row gives what it gives alone, whatever stands beside it: in
float64 exactly, in lower precision up to rounding.

Shapes: B rows, T tokens, L layers, H heads of width D, S places in the cache, V = vocab_size.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from generation import cpu_decoder, cuda_decoder
from generation.cpu_decoder import CACHE_DTYPE, CPUDecoder, Decoder
from generation.cuda_decoder import CaptureError, CUDADecoder, attention_kernels
from generation.kv_cache import KVCache
from generation.sampling import Sampling, uniform, window
from generation.sequential import AnyDecoder, check_prompts, number_samples
from generation.torch_sampling import sample_tokens

if TYPE_CHECKING:
    from generation.compiled_decoder import CompiledDecoder

# new tokens from which it pays to lay out the weights anew, or to record a step: a few steps' time
MIN_TOKENS_TO_PACK = 8
ROWS, MAX_CUDA_ROWS = 32, 512  # see rows_at_once

Step = Callable[[torch.Tensor, KVCache], torch.Tensor]


class BatchedDecoder(Decoder, AnyDecoder, Protocol):
    """What is asked here of a `TransformerDecoder`."""

    def __call__(self, ids: torch.Tensor, *, cache: KVCache) -> torch.Tensor: ...
    def hidden(self, ids: torch.Tensor, *, cache: KVCache) -> torch.Tensor: ...


@torch.inference_mode()
def generate(
    model: BatchedDecoder,
    prompts: Sequence[Sequence[int]],
    rules: Sampling,
    *,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    end_id: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_logits: Callable[[int, list[float], int], None] | None = None,
    compiled: bool = False,
) -> list[list[int]]:
    """The new ids of each prompt, up to `end_id` (not included) or rules.max_new_tokens of them.

    seed, samples: which random numbers decide (`sampling.uniform`); without `samples` a prompt is
    sample 0, and equal prompts are 0, 1, 2 and so on.
    on_token: called with (index of the prompt, id) for each new token; True ends that row.
    on_logits: called before it with (index, logits (V), id), the end included, for `explain`.
    compiled: on a CPU in float32 and bfloat16, decode by what a C++ compiler makes of a step, if
    there is one: `compiled_decoder`.
    A text longer than `model.max_len` is read through `sampling.window`. PyTorch's random state is
    not touched, and the model is left in the mode it was in. On CUDA a cache of up to
    `cuda_decoder.MAX_KEPT` bytes stays allocated for the next call. Raises UserError for an empty
    prompt, ids outside the vocabulary, and a model whose logits are not finite.
    """
    check_prompts(model, prompts)
    texts = [list(prompt) for prompt in prompts]
    samples = number_samples(prompts) if samples is None else samples
    rows = list(range(len(texts)))  # rows[b]: the prompt that row b of the cache goes on with
    longest = max(map(len, texts), default=0) + rules.max_new_tokens
    places = min(model.max_len, longest - 1)  # the last token is never read
    worth = bool(rows) and rules.max_new_tokens >= MIN_TOKENS_TO_PACK
    recorded, choose = None, sample_tokens
    if worth and cuda_decoder.is_supported(model):
        recorded = cuda_decoder.borrow(model, len(rows), places)
        cache, step = recorded.cache, partial(recorded_step, model, recorded)
    elif worth and cpu_decoder.is_supported(model):
        decoder = compiled_decoder(model) if compiled else None
        if decoder is None:
            cache, step = KVCache(model, len(rows), places, CACHE_DTYPE), CPUDecoder(model)
        else:
            cache, step = KVCache(model, len(rows), places), decoder
            choose = decoder.sample_tokens
    else:
        cache, step = KVCache(model, len(rows), places), partial(module_step, model)

    def finished(row: int, token: int) -> bool:
        if token == end_id:
            return True
        texts[row].append(token)
        stopped = on_token is not None and on_token(row, token)
        return bool(stopped) or len(texts[row]) - len(prompts[row]) == rules.max_new_tokens

    training = model.training
    model.eval()
    try:
        with attention_kernels(cache.keys.device):
            while rows:
                logits = next_logits(model, step, cache, [texts[row] for row in rows])
                numbers = [uniform(seed, samples[row], len(texts[row])) for row in rows]
                tokens = choose(logits, rules, numbers)
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
    if recorded is not None:
        cuda_decoder.give_back(model, recorded)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def rows_at_once(model: BatchedDecoder, longest: int, free: int | None = None) -> int:
    """How many texts of up to `longest` tokens to give to `generate` at a time.

    32 on a CPU, which gains little from more. On CUDA as many as half of the free memory holds, as
    a power of two, 512 at most: a step reads the weights once, for however many rows. A row takes
    its keys and values, twice while prompts are read; 16 vectors of d_model a token of a prompt;
    its logits, which sampling has in float64 several times; and in float64 all scores of a layer.

    free: bytes of memory; None: what the device has.
    """
    weight, config = model.embed.weight, model.config
    if free is None:
        if weight.device.type != "cuda":
            return ROWS
        free, _ = torch.cuda.mem_get_info(weight.device)
        # what PyTorch holds without using it is free as well
        free += torch.cuda.memory_reserved(weight.device)
        free -= torch.cuda.memory_allocated(weight.device)
    places = min(longest, model.max_len)
    row = places * config.d_model * weight.element_size() * (4 * config.n_layers + 16)
    row += 32 * config.vocab_size
    if weight.dtype == torch.float64:
        row += 2 * 8 * config.n_heads * places**2
    rows = max(1, min(MAX_CUDA_ROWS, free // 2 // row))
    return 1 << (rows.bit_length() - 1)


def compiled_decoder(model: BatchedDecoder) -> "CompiledDecoder | None":
    """A CompiledDecoder; None where none can be made, which is said once."""
    from generation.compiled_decoder import CompiledDecoder, load  # what it needs, few need

    library = load()
    return None if library is None else CompiledDecoder(model, library)


def module_step(model: BatchedDecoder, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """What a CPUDecoder gives, by the module itself: on every device, in every precision."""
    return model(ids.to(cache.keys.device), cache=cache)[:, -1]


def recorded_step(
    model: BatchedDecoder, decoder: CUDADecoder, ids: torch.Tensor, cache: KVCache
) -> torch.Tensor:
    """The decoder's step; the module's, from the first one on that could not be recorded."""
    if not decoder.failed:
        try:
            return decoder(ids, cache)
        except CaptureError as error:
            print(f"generating without CUDA graphs, more slowly: {error}", file=sys.stderr)
    return module_step(model, ids, cache)


def next_logits(
    model: BatchedDecoder, step: Step, cache: KVCache, texts: list[list[int]]
) -> torch.Tensor:
    """Logits (B, V) after each text, of which the cache holds all but the last token, or should."""
    seen = [window(len(text), model.max_len) for text in texts]
    stale = [b for b, n in enumerate(cache.lengths) if n != seen[b] - 1]  # new, or its window moved
    if stale:
        prefill(model, cache, stale, [texts[b][-seen[b] : -1] for b in stale])
    newest = torch.tensor([text[-1:] for text in texts])  # (B, 1), where each step wants it
    return step(newest, cache)


def prefill(model: BatchedDecoder, cache: KVCache, rows: list[int], texts: list[list[int]]):
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
