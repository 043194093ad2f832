"""evaluation.json in a run's folder: what evaluate.py has found, by split; and TensorBoard's copy.

The file may come with a run from anywhere: what in it has another form is left out.
"""

import contextlib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from common.errors import UnreadableError, UserError
from common.files import replace_synced, set_aside

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
    return _read(run)[0]


def _read(run: Path) -> tuple[dict[str, Found], bool]:
    """The same, and whether something of the file is not in it."""
    try:
        splits = json.loads((run / NAME).read_bytes())["splits"].items()
    except FileNotFoundError:
        return {}, False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, True
    found = {}
    for split, content in splits:
        with contextlib.suppress(ValidationError):
            found[split] = _FORM.validate_python(content)
    return found, len(found) < len(splits)


def refuse_unwritable(run: Path):
    """Raises UserError where `publish` would replace a folder, or the file of another version."""
    file = run / NAME
    for folder in (file, file.with_suffix(".md")):
        if folder.is_dir():
            raise UserError(f"{folder}: a folder, where a file is to be written; rename it")
    try:
        stored = json.loads(file.read_bytes())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnreadableError(error, file) from None
    except (ValueError, RecursionError):
        return
    if isinstance(stored, dict) and stored.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{file}: of another version of this project (format {stored['format']!r:.20}); use "
            "that, or rename the file"
        )


def is_limited(split: str) -> bool:
    """Whether what was found is of some of a split's examples, by the name that it has here."""
    return bool(re.search(r", \d+ examples$", split))


def publish(run: Path, split: str, found: dict) -> Path:
    """Puts what was found on a split into evaluation.json and TensorBoard. Returns the file.

    A file with something that cannot be read is kept under another name.
    """
    splits, is_damaged = _read(run)
    if is_damaged:
        aside = set_aside(run / NAME)
        print(f"note: {run / NAME} was damaged, and is kept as {aside.name}", file=sys.stderr)
    splits[split] = _FORM.validate_python(found)
    filled = {
        name: {key: value for key, value in asdict(found).items() if value != {}}
        for name, found in splits.items()
    }
    content = {"format": FORMAT, "splits": filled}
    try:
        replace_synced(run / NAME, f"{json.dumps(content, indent=1)}\n".encode())
    except OSError as error:  # which names the file that was to become it
        raise OSError(error.errno, error.strerror, str(run / NAME)) from None
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
