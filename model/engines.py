"""The three engines by name: what each can be asked for, and its decoder with given weights.

Imports are made where they are needed: with "numpy" there is no torch, with "python" no NumPy
either.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from checkpoint.reader import Checkpoint
from common.errors import UserError
from common.memory import keep_freed_memory
from common.signals import defer_interrupts
from model.config import ModelConfig

Engine = Literal["torch", "numpy", "python"]
WEIGHTS = "model.safetensors"
MARGIN = 1.05  # how much faster bf16 has to be than fp32, whose text is the other engines' too


def check_options(engine: Engine, device: str, precision: str, compiled: bool = False):
    """Raises UserError for what only torch has."""
    if engine == "torch":
        return
    if compiled:
        raise UserError(f"--compile: the {engine} engine is not compiled; leave it out")
    if device not in ("auto", "cpu"):
        raise UserError(
            f"--device {device}: the {engine} engine computes on the CPU; use --device cpu"
        )
    if precision not in ("auto", "fp32", "fp64"):
        has = "fp32 and fp64" if engine == "numpy" else "fp64"
        raise UserError(
            f"--precision {precision}: the {engine} engine has only {has}; use --precision fp64"
        )


def choose_precision(
    engine: Engine, config: ModelConfig, device: str, precision: str, compiled: bool = False
) -> tuple[str, str]:
    """The precision asked for, or for "auto" the fastest at reading a token; and why, for people.

    It is measured on a CPU, in about a quarter of a second; compiled: as in `generator`.
    """
    if precision != "auto":
        return precision, "as requested"
    if engine != "torch":
        name = "fp32" if engine == "numpy" else "fp64"
        return name, f"auto: the fastest of the {engine} engine"
    with defer_interrupts():
        from common.device import choose_device
        from generation.measure import seconds_of_a_token

        place = choose_device(device)
    if place.type != "cpu":
        import torch

        if place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "auto: this GPU has bf16"
        return "fp32", f"auto: the default on {place.type}"
    kind = decoder_class(engine)
    fp32, bf16 = (
        seconds_of_a_token(kind, config, name, compiled) for name in ("float32", "bfloat16")
    )
    if fp32 > MARGIN * bf16:
        return "bf16", f"auto: measured to be {fp32 / bf16:.2f} times as fast as fp32"
    return "fp32", f"auto: bf16 is measured to be {fp32 / bf16:.2f} times as fast"


def read_weights(engine: Engine, checkpoint: Checkpoint) -> dict:
    """The weights by name: arrays, or nested lists for "python". Raises CheckpointError."""
    return checkpoint.lists(WEIGHTS) if engine == "python" else checkpoint.tensors(WEIGHTS)


def load_model(engine: Engine, config: ModelConfig, weights: dict, device: str, precision: str):
    """The engine's decoder with the weights that `read_weights` gave. Raises UserError."""
    if engine == "python":
        model = decoder_class(engine).from_config(config)
        model.load_weights(weights)
    elif engine == "numpy":
        dtype = {"fp32": "float32", "fp64": "float64"}[precision]
        model = decoder_class(engine).from_config(config, dtype)
        model.load_weights(weights)
    else:
        keep_freed_memory()  # which each token would have cleared anew
        kind = decoder_class(engine)  # first, because it says what is missing
        from common.device import PRECISIONS, check_precision, choose_device

        place = choose_device(device)
        check_precision(precision, place)
        dtype = PRECISIONS[precision].products
        model = kind.from_weights(config, weights, dtype, place)
    return model.eval()


def decoder_class(engine: Engine) -> type:
    """The engine's decoder. Raises UserError where what it is built on is not installed."""
    try:
        if engine == "python":
            from model.transformer_micro import TransformerDecoderMicro as Decoder
        elif engine == "numpy":
            from model.transformer_lite import TransformerDecoderLite as Decoder
        else:
            with defer_interrupts():
                from model.transformer_full import TransformerDecoder as Decoder
    except ModuleNotFoundError as error:
        raise UserError(
            f"--engine {engine}: {error.name} is not installed; install it with pip install "
            f"{error.name}, or use --engine python, which needs no packages"
        ) from None
    return Decoder


def generator(
    engine: Engine, compiled: bool = False, beams: int = 1, order: Callable | None = None
) -> Callable[..., list[list[int]]]:
    """The `generate` of the engine: many prompts at once with torch, one by one with the others.

    compiled: as in `generation.batched.generate`; beams: above 1, that of a beam search, with
    `order` as in `generation.beams.generate`; all for torch alone.
    """
    if beams > 1:
        from generation.beams import generate

        return partial(generate, beams=beams, order=order)
    if engine == "torch":
        from generation.batched import generate

        return partial(generate, compiled=compiled)
    from generation.sequential import generate

    return generate


def rows_at_once(engine: Engine, model, longest: int) -> int:
    """How many texts of up to `longest` tokens to give to `generator` at a time."""
    if engine != "torch":
        return 1
    from generation.batched import rows_at_once

    return rows_at_once(model, longest)
