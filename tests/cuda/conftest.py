"""What only a GPU can show: skipped without one, with one a part of plain pytest."""

import os
from pathlib import Path

import pytest
import torch

# PyTorch looks once in a process, at its first product, whether cuBLAS may be deterministic: for
# tests of --train.deterministic, whatever has run before
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="tests/cuda needs a CUDA device"))
