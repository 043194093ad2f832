"""The measures of an answer, and what people are shown of them."""

import numpy as np
import pytest

from evaluation import signatures
from evaluation.scores import Score, kind_of, marked, measure, side_by_side, table


def test_signatures():
    true = "def read(self, n=-1, *rest, key: int, **more) -> bytes:"
    assert signatures.arguments(true) == ["self", "n", "key", "*rest", "**more"]
    assert signatures.name_match("async def read(x):", true)
    assert not signatures.name_match("def write(self, n=-1):", true)
    assert not signatures.name_match("def read(", true)
    assert signatures.argument_f1("def f(self, n, x)", true) == pytest.approx(2 * 2 / (3 + 5))
    assert signatures.argument_f1("def f():", "def g():") == 1
    assert signatures.argument_f1("def f(", "def g():") == 0
    for text in ("", "x = 1", "def f(): pass; x = 1", "class A:", "def f(a, a):\0", "def f(" * 999):
        assert signatures.parse(text) is None
    assert signatures.parse("def f(a='\\d')") is not None


def test_kinds_are_told_by_name_or_by_looks():
    assert kind_of(["def f():"], "nl2bash_paper") == "bash"
    assert kind_of(["def f(a):", "async def g():", "x"], "mine") == "python"
    assert kind_of(["ls", "def"], "mine") == "text"
    assert kind_of(["find it"], "dev", "nl2bash") == "bash"
    commands = ["find . -name x", "sudo ls -l | wc", "x"]
    assert kind_of(commands, "mine") == "bash"
    prose = ["Find -x", "find all files", "sort - as it is - of", "time and again", "a 'b", ""]
    assert kind_of(prose, "mine") == "text"
    assert kind_of(["find . -name x", "def f():"], "mine") == "text"  # neither are most


def test_measures_are_means_over_the_first_answers_and_the_best():
    pytest.importorskip("sacrebleu")
    true = ["ls -l x", "find . -name a", "wc", "cat f"]
    answers = [
        ["ls -l x", "ls"],
        ["ls", "find . -name b"],
        ["wc -l | sort", "wc"],
        ["cat 'f", "touch"],
    ]
    found = measure("bash", answers, true)
    values = {name: score.value for name, score in found.items()}
    assert values.pop("BLEU") > values.pop("char-BLEU") > 0  # of few tokens
    assert values == {
        "exact match": 0.25,
        "exact match, top-2": 0.5,
        "template match": 0.25,
        "template match, top-2": 0.75,
        "NLC2CMD": pytest.approx((1 - 1 - 0.5 - 1) / 4),
        "NLC2CMD, top-2": pytest.approx((1 + 1 + 1 - 1) / 4),
        "NLC2CMD, aligned": pytest.approx((1 - 1 + 0 - 1) / 4),
        "NLC2CMD, aligned, top-2": pytest.approx((1 + 1 + 1 - 1) / 4),
        "bash -n": 0.75,
    }
    assert all(score.low <= score.value <= score.high for score in found.values())
    alone = measure("text", [["a"], ["b"]], ["a", "b"], bleu=False)
    assert alone == {"exact match": Score(1.0, 1.0, 1.0)}


def test_without_bash_its_row_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = measure("bash", [["ls -l"]], ["ls -l"], bleu=False)
    assert found["template match"].value == 1 and "bash -n" not in found


def test_a_table_for_people():
    shown = table(
        {
            "us": {"a": Score(0.5, 0.25, 0.75), "b": Score(50, 40, 60, digits=1)},
            "them": {"a": Score(0, 0, 0)},
        }
    )
    assert shown.splitlines() == [
        "   us                      them",
        "a  0.500 (0.250 to 0.750)  0.000 (0.000 to 0.000)",
        "b  50.0 (40.0 to 60.0)",
    ]


def test_words_that_differ_are_marked():
    assert marked("ls -l /x", "ls -a /x") == ["`ls` **`-l`** `/x`", "`ls` **`-a`** `/x`"]
    assert marked("a | b", "a") == ["`a` **`\\| b`**", "`a`"]
    assert marked("find . -name x", "ls -l") == ["**`find . -name x`**", "**`ls -l`**"]
    assert marked("`x`", "") == ["**`` `x` ``**", ""]
    shown = side_by_side(["a *b*\n|c"], ["x"], ["y"])
    assert shown.splitlines()[2] == r"| a \*b\* \|c | **`x`** | **`y`** |"


def test_scores_are_python_numbers():
    score = measure("text", [["a"]], ["a"], bleu=False)["exact match"]
    assert not any(isinstance(v, np.generic) for v in (score.value, score.low, score.high))
