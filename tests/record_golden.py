"""Writes tests/golden/losses.json anew: `python -m tests.record_golden`, when a change is meant."""

import json
import sys
import tempfile
from pathlib import Path

from common import cli
from tests.helpers import ROOT, losses, run, write_config


def main() -> int:
    cli.Parser(prog="python -m tests.record_golden", description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = run("train.py", "--config", write_config(folder), "--name", "golden", cwd=folder)
        if result.returncode:
            raise SystemExit(result.stderr)
        found = {
            f"{kind} {step}": loss for (kind, step), loss in losses(folder / "runs/golden").items()
        }
    golden = ROOT / "tests" / "golden" / "losses.json"
    golden.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{golden}: {len(found)} losses, the last {list(found.values())[-1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m tests.record_golden", main))
