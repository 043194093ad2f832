"""The configurations in `configs/`: how many numbers each trains, and what memory these take.

Counted from the shape, without a model. `tests/test_report.py` counts those of models.
"""

from contextlib import suppress
from dataclasses import replace

from common.errors import UserError
from comparison.code_size import ROOT
from comparison.markdown import NONE, figure, table
from data.tokenizers.base import SPECIALS
from data.tokenizers.byte import ByteTokenizer
from model.config import ModelConfig
from training.config import Config, load

CHARACTERS = {"stdlib_words": 26, "names": 26, "tinyshakespeare": 65}  # by source
MARKS = {"char": len(SPECIALS), "char_bos": 1}  # special tokens, by tokenizer


def section() -> list[str]:
    """A section of `comparison.report`."""
    rows = []
    for file in sorted((ROOT / "configs").glob("*.toml")):
        with suppress(UserError):  # a file someone is still writing must not cost the report
            rows.append(row(file.name, load(file)))
    rows.sort(key=lambda cells: int(cells[3].replace(",", "")) if cells[3] != NONE else 0)
    words = (
        "What each configuration trains, counted and not measured; MB of 10^6 bytes in float32. "
        "Training with Adam takes four numbers for each parameter: the weight, its gradient, and "
        "the averages of the gradient and of its square. What the activations take, which grows "
        "with the batch, is not in it."
    )
    shape = "d_model / heads / layers / d_ff / length"
    head = ["file", shape, "vocabulary", "parameters", "weights [MB]"]
    return [words, table([*head, "weights, gradients, averages [MB]"], rows)] if rows else []


def row(name: str, config: Config) -> list[str]:
    """A configuration's shape, vocabulary, parameters and memory."""
    size = vocabulary(config)
    if not size:
        return [name, dimensions(config.model), "the data's", *[NONE] * 3]
    n = replace(config.model, vocab_size=size).num_parameters()
    cells = [f"{size:,}", f"{n:,}", figure(n * 4 / 1e6), figure(n * 16 / 1e6)]
    return [name, dimensions(config.model), *cells]


def dimensions(shape: ModelConfig) -> str:
    """What a shape is called by in tables."""
    return " / ".join(
        map(str, (shape.d_model, shape.n_heads, shape.n_layers, shape.d_ff, shape.max_len))
    )


def vocabulary(config: Config) -> int:
    """Tokens that the model knows; 0 where only the data can tell."""
    data = config.data
    if data.tokenizer_path:
        return 0
    if data.tokenizer == "byte":
        return ByteTokenizer.vocab_size
    if data.tokenizer in MARKS:
        characters = 0 if data.path else CHARACTERS.get(data.source, 0)
        return characters and characters + MARKS[data.tokenizer]
    return data.vocab_size
