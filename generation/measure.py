"""How long the PyTorch decoder takes to read a token on this CPU, before it is loaded."""

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from generation.batched import compiled_decoder
from generation.cpu_decoder import CACHE_DTYPE, CPUDecoder, is_supported
from generation.kv_cache import KVCache

STEPS, WARM_UP = 24, 4  # tokens that are read, and how many of them are not counted
SECONDS = 0.5  # after which no further token is read: what is emulated would take many
LAYERS = (1, 3)  # of the decoders that are tried: each further layer takes as long


@torch.inference_mode()
def seconds_of_a_token(decoder: Any, config: Any, dtype: str, compiled: bool = False) -> float:
    """Of one row, with a decoder of that class and ModelConfig, all of whose weights are equal.

    compiled: as in `generation.batched.generate`.
    """
    few, more = (
        step_seconds(decoder, replace(config, n_layers=n), dtype, compiled) for n in LAYERS
    )
    layer = max(0.0, more - few) / (LAYERS[1] - LAYERS[0])
    return few + (config.n_layers - LAYERS[0]) * layer


def step_seconds(decoder: Any, config: Any, dtype: str, compiled: bool) -> float:
    """The median over some tokens."""
    model = decoder.without_weights(config, getattr(torch, dtype)).eval()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    packed = is_supported(model)
    whole = compiled_decoder(model) if compiled and packed else None
    places = min(STEPS, config.max_len)
    if whole is not None:
        cache, step = KVCache(model, 1, places), whole
    elif packed:
        cache, step = KVCache(model, 1, places, CACHE_DTYPE), CPUDecoder(model)
    else:
        cache, step = KVCache(model, 1, places), lambda ids, cache: model(ids, cache=cache)
    ids, seconds = torch.zeros(1, 1, dtype=torch.int64), []
    for _ in range(places):
        began = time.perf_counter()
        step(ids, cache)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > SECONDS:
            break
    return median(seconds[WARM_UP:] or seconds)
