"""Records by step, one JSON object a line: what `metrics.jsonl` holds. Standard library only."""

import contextlib
import json
import math
from pathlib import Path


def read_records(file: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that was cut while it was written."""
    found = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            record = parse_record(line)
            if record is not None:
                found.append(record)
    return found


def parse_record(line: str) -> dict | None:
    """The record of one line: {"step": int, name: finite number}; None for anything else."""
    with contextlib.suppress(ValueError, RecursionError, OverflowError, TypeError, LookupError):
        record = json.loads(line)
        if type(record["step"]) is int and 0 <= record["step"] < 2**63:
            return record if all(map(math.isfinite, record.values())) else None
    return None
