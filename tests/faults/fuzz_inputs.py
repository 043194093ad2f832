"""What fuzzing needs: near-valid input by hypothesis, and the list of what reads it.

An input is the name of a file and its bytes, so that each can be kept and read again. Reading may
give a value or raise UserError; everything else is judged in `fuzz.py`.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from common.files import checksummed_json

MB = 1 << 20


@dataclass(frozen=True)
class Target:
    """`feed(name, content)` reads a file that `inputs` drew: pairs of its name and its bytes.

    slack: bytes that may be taken besides twice the input, for Python's own objects (a number or a
    list in JSON takes up to a hundred times its text, so what is parsed whole is kept small here).
    """

    inputs: st.SearchStrategy
    feed: Callable[[str, bytes], object]
    slack: int = 8 * MB


TARGETS: dict[str, Callable[[Path], Target]] = {}  # by what the table calls them


def target(name: str):
    """Registers the decorated function, which makes a target in an empty folder."""

    def register(function):
        TARGETS[name] = function
        return function

    return register


def quiet(*_):
    """Takes what would be reported."""


# Inputs -------------------------------------------------------------------------------------------

# JSON that stands where something else should; much of it is not even JSON
ODD = [
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "-0",
    "NaN",
    "Infinity",
    "1e400",
    "[]",
    "{}",
    "[1]",
    "[[]]",
]
ODD += ["2", "3", "7", str(2**31), str(2**40), str(2**63), str(2**64), "1" * 500, "1" * 5000]
ODD += ['""', '"x"', '"<u2"', '"O"', '"S0"', '"i4,i4"', '"F64"', '"BOOL"', '"lines"', '"pairs"']
ODD += [
    '"\\ud800"',
    '"\\u0000"',
    '"a\\nb"',
    '"\\u001b[2J"',
    '".."',
    '"/dev/zero"',
    '"%s"' % ("y" * 9000),
]
ODD += ["[" * 300 + "]" * 300, "[" * 900 + "]" * 900, '{"a":' * 100 + "1" + "}" * 100]
WORDS = [odd.encode() for odd in [*ODD, "[" * 5000]] + [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\0",
    b"\r\n",
]
WORDS += [bytes([byte]) for byte in b"{}[]\",:\\#= \n\t'._-+e"] + ["\u2581\ue000b".encode()]
pieces = st.sampled_from(WORDS) | st.binary(max_size=8)


@st.composite
def mangled(draw, content: bytes) -> bytes:
    """`content` with a few places of it changed."""
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 20))
        change = draw(st.sampled_from(["put", "replace", "replace", "drop", "double", "cut"]))
        middle = draw(pieces) if change in ("put", "replace") else b""
        if change == "double":
            middle = content[at : at + length] * draw(st.integers(2, 40))
        after = at if change == "put" else len(content) if change == "cut" else at + length
        content = content[:at] + middle + content[after:]
    return content


def places(value) -> list[tuple]:
    """Every (container, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inside = [places(value[key]) for key in keys if isinstance(value[key], dict | list)]
    return sum(inside, found)


@st.composite
def edited(draw, value) -> bytes:
    """A JSON object or list, most of it as it was, some values odd, gone, or under another key."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(value) or [(value, None)]))
        odd = draw(st.integers(0, len(ODD) - 1))
        action = draw(st.sampled_from(["set"] * 6 + ["drop", "rename", "number"]))
        if key is None:
            break
        if action == "number":
            container[key] = draw(st.integers() | st.floats())
        elif action == "rename" and isinstance(container, dict):
            container[f"@{odd}"] = container.pop(key)
        elif action == "drop":
            del container[key]
        else:
            container[key] = f"@{odd}"
    text = json.dumps(value)
    for number, odd in enumerate(ODD):
        text = text.replace(f'"@{number}"', odd)
    return text.encode()


def like(content: bytes, *names: str) -> st.SearchStrategy:
    """Files called by one of `names` whose bytes are more or less `content`; JSON as JSON, too."""
    inputs = mangled(content) | st.binary(max_size=200)
    with contextlib.suppress(ValueError):
        inputs = edited(json.loads(content)) | edited(json.loads(content)) | inputs
    return named(inputs, *names)


def named(inputs: st.SearchStrategy, *names: str) -> st.SearchStrategy:
    """`inputs` as files called by one of `names`."""
    return st.tuples(st.sampled_from(names), inputs)


def resealed(content: bytes) -> bytes:
    """A manifest with the hash that it should have, if it can have one."""
    try:
        manifest = json.loads(content)
        manifest.pop("sha256", None)
        return checksummed_json(manifest)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return content
