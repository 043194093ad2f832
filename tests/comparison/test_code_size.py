"""comparison/footprint.py: its counts against counts made in other ways."""

import re
from pathlib import Path

import numpy as np
import pytest

from comparison import code_size
from tests.helpers import ROOT

SOURCE = '''"""A module.

Of several lines.
"""

import os  # counted

# not counted
class A:
    """Not counted."""

    field: int = 0
    """Nor this."""

    def f(self):
        text = """counted

        all of it but the blank one"""
        return [
            text,
            # not this
        ]
'''


def test_code_lines():
    # the blank line within a string is a part of the program
    assert code_size.code_lines(SOURCE) == 10
    assert code_size.code_lines("") == 0


@pytest.mark.parametrize("engine", code_size.FILES)
def test_code_is_counted_again_line_by_line(engine):
    files, lines = code_size.counted(engine)
    assert {str(path.relative_to(ROOT)) for path in files} >= {code_size.FILES[engine][0]}
    again = 0
    for path in files:
        inside = False
        for line in map(str.strip, path.read_text().splitlines()):
            quotes = len(re.findall('"""', line))
            if inside or line.startswith(('"""', 'r"""')):
                inside ^= quotes == 1
            else:
                again += bool(line) and not line.startswith("#")
    assert lines == again
    pieces = code_size.lines_by_definition(engine)
    assert {"attention", "MultiHeadAttention", "DecoderLayer", "TransformerDecoder"} <= set(pieces)
    assert sum(pieces.values()) < code_size.code_lines(files[0].read_text())


def test_dependencies_are_all_that_is_required():
    assert code_size.dependencies("python") == code_size.dependencies("unfused") == []
    ((name, version, size),) = code_size.dependencies("numpy")
    assert (name, version) == ("numpy", np.__version__)
    folder = Path(np.__file__).parent
    there = [*folder.rglob("*"), *folder.parent.glob("numpy.libs/*")]
    assert size == pytest.approx(sum(p.stat().st_size for p in there if p.is_file()), rel=0.3)
    found = {name: size for name, _, size in code_size.dependencies("torch")}
    assert found["torch"] == max(found.values()) > 1e7
    assert {"sympy", "mpmath", "jinja2", "markupsafe"} <= set(found)  # the last by way of others
    assert not {"pytest", "tensorboard", "pydantic"} & set(found)
