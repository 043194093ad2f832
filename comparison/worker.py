"""Trains one engine on a job, in a process of its own: so its time and its memory are its own.

    python -m comparison.worker FOLDER ENGINE STEPS

Prints a line for each step, and writes FOLDER/ENGINE.json: losses, seconds, peak memory, nodes,
samples, the gradients of the first step, and what `checks` measured.
"""

import json
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()

from common.errors import UserError  # noqa: E402
from common.memory import peak_memory  # noqa: E402
from comparison import checks  # noqa: E402, the clock runs from the first line on
from comparison.trainers import (  # noqa: E402
    BUILT_ON,
    CONTROLS,
    Adam,
    PythonTrainer,
    create,
    timed_step,
)
from generation.sampling import Sampling  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.engines import generator  # noqa: E402

COMPARED = 1_000_000  # up to so many parameters, the gradients of the first step are kept


def main(folder: Path, engine: str, steps: int) -> dict:
    """All that is measured of one engine."""
    job = json.loads((folder / "job.json").read_text())
    config = ModelConfig(**job["model"])
    weights = read_weights(folder / "weights.safetensors", engine)
    trainer = create(engine, config, weights, Adam(*job["adam"]), job["precision"])
    batches = [trainer.batch(rows) for rows in job["batches"][:steps]]
    result: dict = {"engine": engine, "steps": steps}
    result["parameters"] = trainer.model.num_parameters()
    result["of_steps"] = len(job["batches"])
    result["share"] = tokens(job["batches"][:steps]) / tokens(job["batches"])  # of the job's work
    del job["batches"]  # as Python's numbers they are large
    if engine == "cuda":
        result["device"] = sys.modules["torch"].cuda.get_device_name()
    result["imported"] = [name for name in ("torch", "numpy") if name in sys.modules]
    result["start_s"] = time.perf_counter() - STARTED
    began = time.perf_counter()
    if engine == "compiled":  # what is compiled in the first steps is no part of the others
        for batch in batches[:3]:
            trainer.forward(batch)
            trainer.backward()
            trainer.optimizer.zero_grad()
    result["warm_up_s"] = time.perf_counter() - began
    result |= train(trainer, batches, job["lr"])
    result["peak_bytes"] = peak_memory(engine == "cuda")
    began = time.perf_counter()
    result["samples"] = samples(trainer, engine, job)
    result["generate_s"] = time.perf_counter() - began
    if engine in CONTROLS:
        result["cosines"] = cosines(config, weights, engine, batches[0])
        return result
    result["checks"] = checks.run(trainer, engine, job, batches[0], folder)
    if result["parameters"] <= COMPARED:
        fresh = create(engine, config, weights, Adam(*job["adam"]), job["precision"])
        fresh.forward(batches[0])
        fresh.backward()
        result["gradients"] = {name: checks.nested(g) for name, g in fresh.gradients().items()}
    return result


def samples(trainer, engine: str, job: dict) -> list[list[int]]:
    """What the model writes; nothing where its training diverged, which the losses show."""
    rules = Sampling(**job["sampling"])
    try:
        return generator(BUILT_ON[engine])(
            trainer.model, job["prompts"], rules, seed=job["seed"], end_id=job["end_id"]
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return []


def train(trainer, batches: list, lrs: list[float]) -> dict:
    """Losses, and the seconds of each part of the steps."""
    losses, nodes = [], []
    seconds = {"forward": 0.0, "backward": 0.0, "update": 0.0}
    for step, batch in enumerate(batches):
        loss, spent = timed_step(trainer, batch, lrs[step])
        losses.append(loss)
        for part, s in zip(seconds, spent, strict=True):
            seconds[part] += s
        print(step + 1, loss, flush=True)
    for batch in batches[:5]:  # counted apart, because counting takes time too
        trainer.forward(batch)
        nodes.append(trainer.nodes)
        trainer.backward()
        trainer.optimizer.zero_grad()
    return {"losses": losses, "seconds": seconds, "nodes": sum(nodes) / len(nodes)}


def tokens(batches: list) -> int:
    """How many the rows have together."""
    return sum(len(ids) for rows in batches for ids, _ in rows)


def cosines(config: ModelConfig, weights: dict, engine: str, batch) -> dict:
    """How far a control's gradients of the first step point where the right ones do.

    By parameter, with a node for each operation on a vector ("vector"), and with one for each + and
    * ("scalar"); of the stack order also with the inputs of a node pushed in reverse.
    """

    def gradients(kind, unfused, reverse=False):
        trainer = kind(config, weights, Adam(0.9, 0.999, 1e-8), unfused)
        trainer.reverse = reverse
        trainer.forward(batch)
        trainer.backward()
        return {name: list(checks.numbers(g)) for name, g in trainer.gradients().items()}

    right, wrong = gradients(PythonTrainer, False), {}
    for unfused, size in enumerate(("vector", "scalar")):
        wrong[size] = gradients(CONTROLS[engine], bool(unfused))
        if engine == "stack":
            wrong[f"{size} reversed"] = gradients(CONTROLS[engine], bool(unfused), reverse=True)
    return {
        name: {size: compare(right[name], g[name]) for size, g in wrong.items()} for name in right
    }


def compare(right: list[float], wrong: list[float]) -> dict:
    """The cosine between two gradients, and the length of their difference over the right one's."""
    product = sum(a * b for a, b in zip(right, wrong, strict=True))
    lengths = [sum(a * a for a in g) ** 0.5 for g in (right, wrong)]
    apart = sum((a - b) ** 2 for a, b in zip(right, wrong, strict=True)) ** 0.5
    return {
        "cosine": product / (lengths[0] * lengths[1]) if all(lengths) else 0.0,
        "error": apart / lengths[0] if lengths[0] else 0.0,
    }


def read_weights(file: Path, engine: str) -> dict:
    """What the engine's decoder loads: read without NumPy for plain Python."""
    from checkpoint import safetensors_python

    plain = BUILT_ON[engine] == "python"
    read = safetensors_python.read if plain else safetensors_python.read_arrays
    return read(file.read_bytes())


if __name__ == "__main__":
    folder, engine, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        result = main(folder, engine, steps)
    except UserError as error:  # such as a device that is not there
        sys.exit(str(error))
    (folder / f"{engine}.json").write_text(json.dumps(result))
