"""evaluation.json in a run's folder: what evaluate.py has found, by split; and TensorBoard's copy.

The file may come with a run from anywhere: what in it has another form is left out.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from common.files import replace_synced

NAME = "evaluation.json"
FORMAT = 1


@dataclass(frozen=True)
class Score:
    """A measure of all answers, and its interval of 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """What was found on one split."""

    step: Annotated[int, Field(ge=0, lt=2**63)]
    checkpoint: str
    data: str
    loss: float
    perplexity: float
    bits_per_byte: float
    settings: dict = field(default_factory=dict)
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)  # by system, by measure
    memorization: dict[str, dict[str, float]] = field(default_factory=dict)  # of which texts


_FORM = TypeAdapter(Found)


def read_report(run: Path) -> dict[str, Found]:
    """What a run's evaluation.json has, by split; empty where it has nothing or is damaged."""
    try:
        splits = json.loads((run / NAME).read_bytes())["splits"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    found = {}
    for split, content in splits:
        try:
            found[split] = _FORM.validate_python(content)
        except ValidationError:
            continue
    return found


def publish(run: Path, split: str, found: dict) -> Path:
    """Puts what was found on a split into evaluation.json and TensorBoard. Returns the file."""
    splits = read_report(run) | {split: _FORM.validate_python(found)}
    filled = {
        name: {key: value for key, value in asdict(found).items() if value != {}}
        for name, found in splits.items()
    }
    content = {"format": FORMAT, "splits": filled}
    replace_synced(run / NAME, f"{json.dumps(content, indent=1)}\n".encode())
    _show_in_tensorboard(run / "evaluation", splits)
    return run / NAME


def _show_in_tensorboard(folder: Path, splits: dict[str, Found]):
    """All that evaluation.json has, as a run of its own beside that of training."""
    from torch.utils.tensorboard import SummaryWriter

    before = [*folder.glob("events.out.tfevents.*")]
    with SummaryWriter(folder) as writer:
        for split, found in splits.items():
            values = {key: getattr(found, key) for key in ("loss", "perplexity", "bits_per_byte")}
            for texts, shares in found.memorization.items():
                values |= {f"memorization_{key}/{texts}": share for key, share in shares.items()}
            for system, scores in found.scores.items():
                values |= {f"{key}/{system}": score.value for key, score in scores.items()}
            for tag, value in values.items():
                parts = (split, *tag.split("/", 1))  # which TensorBoard takes for folders
                clean = (re.sub(r"[^\w.-]+", "_", part) for part in parts)
                writer.add_scalar("/".join(clean), value, found.step)
    for file in before:
        file.unlink()
