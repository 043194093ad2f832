"""How long an untrained model of a given size takes to generate, in one engine: a process each.

    python -m comparison.generation_speed numpy 128/8/4/64 50

The second argument is d_model/heads/layers/max_len, the third how many tokens.

Prints one line of JSON.
"""

import json
import sys
import time
from typing import cast

from common.memory import peak_memory
from generation.sampling import Sampling
from model.config import ModelConfig
from model.engines import Engine, decoder_class, generator

VOCABULARY = 65
TOKENS = 50
SIZES = ("32/4/1/8", "128/8/4/64", "256/8/6/128", "512/8/6/128")
FEWER = {("python", "256/8/6/128"): 10}  # measured on so many, because each takes so long
LEFT_OUT = {("python", "512/8/6/128"): "19 million numbers as Python objects: left out"}


def shape(size: str) -> ModelConfig:
    """A character model of a size."""
    d_model, heads, layers, max_len = map(int, size.split("/"))
    return ModelConfig(
        VOCABULARY, d_model, heads, layers, 4 * d_model, max_len, 0.0, positions="learned",
        norm_first=True, final_norm=True, activation="gelu", scale_embedding=False,
    )  # fmt: skip


def main(engine: Engine, size: str, tokens: int) -> dict:
    """Times the generation of `tokens` tokens; making the model is counted apart."""
    began = time.perf_counter()
    model = decoder_class(engine).from_config(shape(size)).eval()
    generate = generator(engine)
    generate(model, [[1]], Sampling(max_new_tokens=2))  # what the first call alone has to do
    made = time.perf_counter()
    generate(model, [[1]], Sampling(max_new_tokens=tokens))
    return {
        "engine": engine,
        "size": size,
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "start_s": made - began,
        "generate_s": time.perf_counter() - made,
        "peak_bytes": peak_memory(),
    }


if __name__ == "__main__":
    engine = cast(Engine, sys.argv[1])  # by compare.py
    print(json.dumps(main(engine, sys.argv[2], int(sys.argv[3]))))
