"""docs/side_by_side.py: the document is up to date, and what it copies is what is asked for."""

import ast
import re
import runpy
import shutil
from types import SimpleNamespace

import pytest

from comparison.trainers import StackOrder
from tests.helpers import ROOT, refused, run
from torchmicro.vector import Tape, Vector

SCRIPT = "docs/side_by_side.py"
side_by_side = SimpleNamespace(**runpy.run_path(str(ROOT / SCRIPT)))  # docs is no package

SOURCE = '''\
"""A module."""

@cache
def first(x):
    # why
    return x  # \\f


class Outer:
    """With a method."""

    def method(self, x):
        x = first(x)

        if x:
            y = first(
                2
            )
            return y
        while first(x):
            x = first(0)
        return x

    class Inner:
        def method(self):
            return 1
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    return tmp_path


@pytest.fixture
def copy(tmp_path):
    """What the script reads and writes, where it can be changed."""
    files = {file for files in side_by_side.ENGINES.values() for file in files}
    for file in {*files, SCRIPT, side_by_side.TEMPLATE, side_by_side.DOCUMENT}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def test_document_is_up_to_date(tmp_path):
    result = run(SCRIPT, "--check", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_template_resolves_and_covers_every_topic():
    text = side_by_side.document(ROOT)
    assert "{{" not in text and "}}" not in text
    _, _, table = text.partition("| --- |")
    rows = {row.split("]")[0][3:]: row.split(" | ") for row in table.splitlines()[1:] if row}
    topics = ["Embedding", "Softmax", "Attention", "Dropout", "Layer norm", "Decoder layer"]
    topics += ["The tape and backward", "Linear", "Cross-entropy", "Adam", "Generation"]
    assert {*topics} <= rows.keys()
    for topic, row in rows.items():
        assert f"\n## {topic}\n" in text and len(row) == 4 and all("`" in cell for cell in row[1:])
    for file in re.findall(r"\]\(\.\./([^)]*)\)", text):
        assert (ROOT / file).is_file()
    for code in re.findall(r"```python\n(.*?)\n```", text, re.DOTALL):
        ast.parse(f"def method():\n while True:\n  {code.replace(chr(10), chr(10) + '  ')}")


@pytest.mark.parametrize(("loss_of", "stack"), [(lambda h: h * 3 + h, 2), (lambda h: h + h * 3, 8)])
def test_what_it_says_of_a_walk_by_a_stack(loss_of, stack):
    walk, w = StackOrder.__new__(StackOrder), Vector([1.0], Tape())
    walk.loss, walk.model = loss_of(w * 2), w  # all it asks of a model is the tape
    walk.backward()
    assert w.grad == [stack]
    w.grad = None
    loss_of(w * 2).backward()
    assert w.grad == [8]


def test_change_of_a_source_is_noticed_and_mended(copy):
    document, source = copy / side_by_side.DOCUMENT, copy / "torchlite/functional.py"
    assert side_by_side.main([], copy) == 0
    before, text = document.read_bytes(), source.read_text(encoding="utf-8")
    source.write_text("# a line above what is shown\n" + text, encoding="utf-8")
    assert side_by_side.main(["--check"], copy) == 0
    source.write_text(text.replace("def layer_norm(x:", "def layer_norm(z:"), encoding="utf-8")
    result = run(copy / SCRIPT, "--check", cwd=copy)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "python docs/side_by_side.py" in result.stderr
    assert document.read_bytes() == before  # --check writes nothing
    assert side_by_side.main([], copy) == 0 and side_by_side.main(["--check"], copy) == 0
    assert "def layer_norm(z:" in document.read_text(encoding="utf-8")
    document.unlink()
    assert side_by_side.main(["--check"], copy) == 1


def test_definitions_are_found(root):
    def extract(name):
        return side_by_side.extract(root, "a.py", name)

    assert extract("first") == "@cache\ndef first(x):\n    # why\n    return x  # \\f"
    assert extract("Outer").startswith('class Outer:\n    """With')
    assert extract("Outer").endswith("return 1")
    assert extract("Outer.method").startswith("def method(self, x):\n    x = first(x)\n\n    if x:")
    assert extract("Outer.method").endswith("\n    return x")
    assert extract("Outer.Inner.method") == "def method(self):\n    return 1"


def test_statements_are_found(root):
    def extract(text):
        return side_by_side.extract(root, "a.py", "Outer.method", text)

    assert extract("= first(") == ("x = first(x)\n# ...\ny = first(\n    2\n)\n# ...\nx = first(0)")
    assert extract("while") == "while first(x):\n    x = first(0)"
    assert extract("x = first(x)") == "x = first(x)"
    assert extract("return y") == "return y"


@pytest.mark.parametrize(
    ("file", "name", "text", "expected"),
    [
        ("a.py", "second", None, "a.py has no second"),
        ("a.py", "method", None, "a.py has no method; is it Outer.method?"),
        ("a.py", "Outer.methd", None, "is it Outer.method?"),
        ("a.py", "first", "raise", "a.py: no statement of first has 'raise' in its first line"),
        ("b.py", "first", None, "b.py cannot be read"),
    ],
)
def test_unknown_is_refused(root, file, name, text, expected):
    with pytest.raises(side_by_side.TemplateError, match=re.escape(expected)):
        side_by_side.extract(root, file, name, text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{{model/transformer_lite.py:atention}}", "no atention; is it attention?"),
        ("{{model/transformer_lite.py attention}}", "not a placeholder"),
        ("see {{table}}", "not a placeholder"),
        ("{{train.py:main}}", "train.py is of none of the engines"),
    ],
)
def test_faulty_line_of_the_template_is_named(copy, line, expected):
    (copy / side_by_side.TEMPLATE).write_text(f"# Title\n\n{line}\n")
    message = refused(run(copy / SCRIPT, cwd=copy))
    assert message.startswith("error: docs/side_by_side.in.md:3: ") and expected in message
