"""What must hold in any engine, measured in each.

A check is {"name", "value", "limit", "of"}: it passes if the value is at most the limit. `of` is
how many there are of what is counted, if something is.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

from comparison.trainers import BUILT_ON
from model.config import ModelConfig

WIDTH = 64


def run(trainer, engine: str, job: dict, batch, folder: Path) -> list[dict]:
    """All checks, on the weights as they are after training."""
    config, dice = ModelConfig(**job["model"]), Random(job["seed"])  # noqa: S311, not for secrets
    wide = BUILT_ON[engine] == "python" or job["precision"] == "fp64"
    numbers = [dice.gauss(0.0, 10.0) for _ in range(WIDTH)]
    softmax, scaled = operations(trainer, engine, numbers)
    intermediates, gradients = graph(trainer, engine, batch)
    reached = sum(any(row) for row in gradients)
    ids = [dice.randrange(config.vocab_size) for _ in range(min(8, config.max_len))]
    return [
        check(
            "softmax sums to 1: |sum - 1|", abs(math.fsum(softmax) - 1.0), 1e-12 if wide else 1e-5
        ),
        check("softmax is at least 0: how far below", max(0.0, -min(softmax)), 0.0),
        check("RMSNorm's scale: |mean square - 1|", abs(mean_square(scaled) - 1.0), 1e-5),
        check("causal: change before a changed token", leak(trainer, ids, config), 0.0),
        check(
            "intermediate values that are NaN or infinite", *not_finite(intermediates, -math.inf)
        ),
        check("gradients that are NaN or infinite", *not_finite(gradients)),
        check("parameters that no gradient reaches", len(gradients) - reached, 0, len(gradients)),
        check("save and load: change of the logits", round_trip(trainer, engine, ids, folder), 0.0),
    ]


def check(name: str, value: float, limit: float = 0, of: int = 0) -> dict:
    return {"name": name, "value": float(value), "limit": limit, "of": of}


def mean_square(numbers: list[float]) -> float:
    return math.fsum(x * x for x in numbers) / len(numbers)


def not_finite(rows: list[list[float]], but: float = math.nan) -> tuple[int, int, int]:
    """How many numbers are NaN or infinite, how many may be, and how many there are.

    but: is no fault; -inf among scores is what a mask is made of.
    """
    wrong = sum(not math.isfinite(x) and x != but for row in rows for x in row)
    return wrong, 0, sum(map(len, rows))


def operations(trainer, engine: str, numbers: list[float]) -> tuple[list[float], list[float]]:
    """softmax(numbers) and rms_norm(numbers), by the engine's own operations."""
    if BUILT_ON[engine] == "python":
        from torchmicro.scalar import ScalarVector
        from torchmicro.vector import Tape, Vector

        x = (ScalarVector if engine == "unfused" else Vector)(numbers, Tape())
        return list(x.softmax().data), list(x.rms_norm(1e-5).data)
    if engine == "numpy":
        from torchlite import functional as F
        from torchlite.tensor import Tensor

        x = Tensor(numbers, dtype=trainer.model.embed.weight.dtype)
        return F.softmax(x).data.tolist(), F.rms_norm(x).data.tolist()
    import torch
    from torch.nn import functional as F

    like = trainer.model.embed.weight
    x = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return F.softmax(x, -1).tolist(), F.rms_norm(x, (WIDTH,), eps=1e-5).tolist()


def leak(trainer, ids: list[int], config: ModelConfig) -> float:
    """The largest change of a logit in front of the last token, when that token changes."""
    other = [*ids[:-1], (ids[-1] + 1) % config.vocab_size]
    before, after = trainer.logits(ids)[:-1], trainer.logits(other)[:-1]
    return largest_difference(before, after)


def largest_difference(a, b) -> float:
    """Of two lists of lists, or arrays."""
    pairs = ((x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    return max((abs(float(x) - float(y)) for x, y in pairs), default=0.0)


def graph(trainer, engine: str, batch) -> tuple[list[list[float]], list[list[float]]]:
    """All numbers of a forward pass, operation by operation, and the gradients by parameter."""
    outputs = []
    if BUILT_ON[engine] == "python":
        trainer.forward(batch)
        outputs = [list(numbers(record[1].data)) for record in trainer.model.tape.records]
    elif engine == "numpy":
        trainer.forward(batch)
        outputs = [output.data.reshape(-1).tolist() for output, _, _ in trainer.loss.tape]
    else:
        hooks = [
            module.register_forward_hook(
                lambda _, __, output: outputs.append(output.detach().flatten().tolist())
            )
            for module in trainer.model.modules()
        ]
        trainer.loss_module = trainer.eager  # a compiled one has no hooks to call
        trainer.forward(batch)
        for hook in hooks:
            hook.remove()
    trainer.backward()
    gradients = [list(numbers(g)) for g in trainer.gradients().values()]
    trainer.optimizer.zero_grad()
    return outputs, gradients


def nested(array):
    """An array, or what is nested lists already, as nested lists."""
    return array.tolist() if hasattr(array, "tolist") else array


def numbers(array) -> Iterator[float]:
    """The numbers of an array, of nested lists, or of a number."""
    array = nested(array)
    if isinstance(array, list):
        for part in array:
            yield from numbers(part)
    else:
        yield array


def round_trip(trainer, engine: str, ids: list[int], folder: Path) -> float:
    """The largest change of a logit after the weights were written to a file and read again."""
    file = folder / f"{engine}.safetensors"
    before = trainer.logits(ids)
    if BUILT_ON[engine] == "python":
        from checkpoint import safetensors_python

        file.write_bytes(safetensors_python.write(trainer.weights()))
        read = safetensors_python.read(file.read_bytes())
    else:
        from safetensors.numpy import load_file, save_file

        save_file({n: array.copy() for n, array in trainer.weights().items()}, file)
        read = load_file(file)
    trainer.model.load_weights(read)
    return largest_difference(before, trainer.logits(ids))
