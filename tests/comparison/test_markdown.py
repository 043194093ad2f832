"""What a report says without a run: figures, tables, curves, configurations, and how they work."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from comparison import code_size, config_table, controls, markdown, plots, report
from comparison.results import JobResults, parts_of_a_step, step_s
from comparison.trainers import StackOrder
from model.transformer_lite import TransformerDecoderLite
from tests.helpers import ROOT
from torchmicro.vector import Tape, Vector
from training.config import load


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (100, "100"),
        (1234.5, "1,234"),
        (12.345, "12.3"),
        (0.012345, "0.0123"),
        (2.5e-9, "2.50e-09"),
        (1.5e9, "1.50e+09"),
        (float("nan"), "nan"),
        (None, "–"),
    ],
)
def test_figures(value, shown):
    assert markdown.figure(value) == shown


def test_markdown_shows_text_as_it_stands():
    assert markdown.plain("a|b*c_d _e_ `f` <g>\n[h](i)") == r"a\|b\*c_d \_e\_ \`f\` \<g>␤[h\](i)"


def test_durations():
    shown = [markdown.duration(s) for s in (0.0123, 0.5, 89, 91, 7200, 200_000)]
    assert shown == ["12.3 ms", "0.500 s", "89.0 s", "1.52 min", "2.00 h", "2.31 days"]


def test_tables_set_figures_to_the_right():
    shown = markdown.table(["", "a|b", "words"], [["first", "1,234", "one"], ["2", "–", "2"]])
    assert shown.splitlines() == [
        r"|       |  a\|b | words |",
        "| ----- | ----: | ----- |",
        "| first | 1,234 | one   |",
        "| 2     |     – | 2     |",
    ]


def test_smoothing_is_the_mean_of_the_last_losses():
    losses = [3.0, 1.0, 2.0, 6.0]
    assert plots.trailing_mean(losses, 2).tolist() == [3.0, 2.0, 1.5, 4.0]
    assert plots.trailing_mean(losses[:2], 2).tolist() == [3.0, 2.0]


def test_the_gap_is_between_the_furthest_of_the_engines():
    losses = {"unfused": [9.0], "python": [2.0, 2.0], "numpy": [1.5, 1.5], "stack": [30.0, 30.0]}
    part = JobResults(None, {e: {"steps": len(x), "losses": x} for e, x in losses.items()})
    assert [part.gap(step) for step in (1, 2, 3)] == [7.5, 0.5, None]


def test_gradients_are_compared_with_the_largest():
    gradients = {
        "python": {"w": [[1.0, -4.0]], "b": [0.5]},
        "numpy": {"w": [[1.0, -4.0]], "b": [0.7]},
        "stack": {"w": [[9.0, 9.0]], "b": [9.0]},
    }
    results = {e: {"gradients": g} for e, g in gradients.items()}
    assert JobResults(None, results).gradient_gap() == pytest.approx(0.2 / 4)
    assert JobResults(None, {**results, "numpy": {}}).gradient_gap() is None  # too many to keep


def test_the_parts_of_a_step_are_a_step():
    result = {"seconds": {"forward": 1.0, "backward": 2.0}, "share": 0.25, "of_steps": 8}
    assert parts_of_a_step(result) == {"forward": 0.5, "backward": 1.0}
    assert step_s(result) == 1.5  # not 3 s by the steps that were run: these had half the tokens


@pytest.mark.parametrize("later_user_first, gradient", [(False, 8.0), (True, 2.0)])
def test_the_stack_order_is_right_by_luck(later_user_first, gradient):
    tape = Tape()
    w = Vector([5.0], tape)
    h = w * 2.0
    loss = h * 3.0 + h if later_user_first else h + h * 3.0
    walk = StackOrder.__new__(StackOrder)
    walk.model, walk.loss = SimpleNamespace(tape=tape), loss
    walk.backward()
    assert w.grad == [gradient]
    assert "`h*3 + h` the gradient dw = 2 in place of 8, and `h + h*3`" in controls.WORDS["stack"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.toml"))])
def test_parameters_are_those_of_the_model(name):
    config = load(ROOT / "configs" / f"{name}.toml")
    model = TransformerDecoderLite(**{**vars(config.model), "vocab_size": 31})
    assert replace(config.model, vocab_size=31).num_parameters() == model.num_parameters()


def test_shipped_configurations():
    _, shown = config_table.section()
    rows = {cells[1]: cells for cells in (line.split() for line in shown.splitlines())}
    assert set(rows) > {path.name for path in (ROOT / "configs").glob("*.toml")}
    assert rows["lite.toml"][-6:-1] == ["3,431,068", "|", "13.7", "|", "54.9"]
    assert rows["full.toml"][-6:-1] == ["9,612,060", "|", "38.4", "|", "154"]
    assert "4,192" in rows["microgpt.toml"] and "809,246" in rows["mini.toml"]
    assert "1,284,672" in rows["default.toml"] and "811,077" in rows["tinyshakespeare.toml"]


def test_report_and_board_need_no_torch():
    code = "import sys, comparison.tensorboard, comparison.plots, comparison.report\n"
    code += "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_how_every_engine_works_is_told():
    assert all(set(by) == set(code_size.FILES) for by in code_size.WORKS.values())
    assert code_size.columns(["compiled", "cuda", "unfused", "random"]) == [
        "unfused", "python", "torch",
    ]  # fmt: skip
    for engine in code_size.FILES:
        shown, _, files = code_size.how_they_work([engine])
        assert len(shown.splitlines()) == 2 + len(code_size.WORKS)
        named = [ROOT / file for file in files.split("`")[1::2]]
        assert named == code_size.counted(engine)[0]


def test_plain_python_has_its_own_precision():
    assert report.precision("fp32", ["numpy", "torch"]) == "fp32"
    assert report.precision("fp32", ["numpy", "stack"]) == "fp32 (plain Python: fp64)"
    assert report.precision("fp64", ["python"]) == "fp64"
