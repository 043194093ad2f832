"""What only a GPU can show. Without one these tests are skipped; with one pytest runs them."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="tests/cuda needs a CUDA device"))
