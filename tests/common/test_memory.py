"""Memory of a process: how much of it kernels of many shapes keep."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

CODE = """
import sys
import torch
from common.memory import limit_kernel_caches, resident_memory
torch.set_num_threads(1)
if sys.argv[1] == "limited":
    limit_kernel_caches()
b = torch.zeros(256, 512, dtype=torch.bfloat16)
before = resident_memory()
for rows in range(64, 564):
    torch.zeros(rows, 256, dtype=torch.bfloat16) @ b
print((resident_memory() - before) >> 20)
"""


def grown(how: str) -> int:
    """Megabytes after products of 500 shapes."""
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_kernels_of_many_shapes_are_not_all_kept(monkeypatch):
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    if (unlimited := grown("unlimited")) < 100:
        pytest.skip("kernels of this processor take little memory")
    assert grown("limited") < unlimited / 2
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1024")  # what a user sets is kept
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    assert grown("limited") > unlimited / 2
