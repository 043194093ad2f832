"""README.md of an exported model: what it is, how good it is, how it is loaded."""

from pathlib import Path

from checkpoint.reader import Checkpoint
from common.jsonl import read_records
from data.config import as_paths
from evaluation.report import Found, is_limited, read_report
from model.config import ModelConfig

MEASURES = {  # scalars of a run's log, by what people call them
    "loss/val": "validation loss (nats a token)",
    "perplexity/val": "validation perplexity",
    "bits_per_byte/val": "bits a byte of validation text",
}
READS = {
    "pairs": "It reads a prompt, then the token that starts an answer, and writes the answer.",
    "lines": "Each text it knows is a line: it reads the token that starts one, and goes on.",
    "documents": "It reads the token that starts a text, and goes on with what is given of it.",
    "stream": "It goes on with whatever text it is given, and has no token that ends one.",
}


def model_card(
    checkpoint: Checkpoint, config: ModelConfig, kind: str, library: str, example: str
) -> bytes:
    """The page, in the form of Hugging Face's model cards, for a model that learned data of `kind`.

    library: which loads it, by its name on the Hub. example: how, a few lines of Python.
    """
    data, state = checkpoint.config["data"], checkpoint.state
    source = ", ".join(as_paths(data.get("path") or "")) or data.get("source", "unknown data")
    trained = ("trained on", f"{source} ({kind})")
    if "imported_from" in state:
        trained = ("imported from", str(state["imported_from"]))
    norms = "pre-norm" if config.norm_first else "post-norm"
    rows = [
        ("parameters", f"{config.num_parameters():,}"),
        (
            "layers x width, heads, inner width",
            f"{config.n_layers} x {config.d_model}, {config.n_heads}, {config.d_ff}",
        ),
        ("norms, activation, positions", f"{norms}, {config.activation}, {config.positions}"),
        ("context", f"{config.max_len:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        trained,
        ("optimizer steps", f"{checkpoint.step:,}"),
        ("tokens seen", f"{state.get('tokens', 0):,}"),
        *figures(checkpoint),
    ]
    name = checkpoint.run.name.replace("\n", " ")
    table = "\n".join(f"| {what} | {cell(value)} |" for what, value in rows)
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---

# {name}

A decoder-only transformer. {READS.get(kind, "")}

| | |
|---|---|
{table}

{evaluation(checkpoint)}## Use

```python
{example.strip()}
```
""".encode()


def figures(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What the run's log says of this step."""
    records = read_records(checkpoint.run / "metrics.jsonl")
    found = {k: v for r in records if r.get("step") == checkpoint.step for k, v in r.items()}
    return [
        (name, f"{found[key]:.4f}")
        for key, name in MEASURES.items()
        if isinstance(found.get(key), float)
    ]


def evaluation(checkpoint: Checkpoint) -> str:
    """What evaluate.py has found of this step, a table a split; empty if it has not been run.

    First what was found on whole splits.
    """
    found = sorted(read_report(checkpoint.run).items(), key=lambda item: is_limited(item[0]))
    tables = [scores(split, f) for split, f in found if f.step == checkpoint.step]
    return "".join(["## Evaluation\n\n", *tables]) if tables else ""


def scores(split: str, found: Found) -> str:
    """One split's table. A split that is a file goes by its name, without its folders."""
    measures = list(dict.fromkeys(key for column in found.scores.values() for key in column))
    rows = [["", *found.scores], ["---"] * (1 + len(found.scores))]
    for key in measures:
        columns = found.scores.values()
        rows.append([key, *(f"{c[key].value:.3f}" if key in c else "" for c in columns)])
    settings = ", ".join(f"{key} {value}" for key, value in found.settings.items())
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows] if measures else []
    lines = [f"By `evaluate.py` on {cell(Path(split).name)}: loss {found.loss:.4f}, "
             f"perplexity {found.perplexity:.3f}, {found.bits_per_byte:.4f} bits a byte"
             + (f"; {cell(settings)}." if settings else "."), "", *lines]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n\n"


def cell(text: str) -> str:
    """A text as a cell of a table in Markdown."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", r"\|")
