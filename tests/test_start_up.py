"""What generate.py loads: nothing that a first token would wait for in vain."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.test_generate import save_run

# loading torch comes first, so that what it loads by itself is not held against generate.py
CODE = """
import json, runpy, sys
import torch
before = set(sys.modules)
sys.argv = ["generate.py", "--checkpoint", sys.argv[1], "--device", "cpu"]
try:
    runpy.run_path("generate.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "sympy", "pandas")
HEAVY += ("tensorboard", "torch.utils.tensorboard", "pydantic", "matplotlib", "rich", "tqdm")


@pytest.mark.parametrize("kind", ["pairs", "lines"])
def test_generating_loads_nothing_it_does_not_use(tmp_path, kind):
    save_run(tmp_path / "run", kind)
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "model.generation" in loaded and "training.device" in loaded
    heavy = [m for m in loaded if any(m == name or m.startswith(f"{name}.") for name in HEAVY)]
    assert not heavy
