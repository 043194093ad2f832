"""What only a GPU can show: skipped without one, with one a part of plain pytest."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="tests/cuda needs a CUDA device"))
