"""comparison/text.py, part.py, plots.py: figures, tables and curves as people read them."""

import pytest

from comparison import plots, text
from comparison.part import Part


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
    assert text.figure(value) == shown


def test_markdown_shows_text_as_it_stands():
    assert text.plain("a|b*c_d _e_ `f` <g>\n[h](i)") == r"a\|b\*c_d \_e\_ \`f\` \<g>␤[h\](i)"


def test_durations():
    shown = [text.duration(s) for s in (0.0123, 0.5, 89, 91, 7200, 200_000)]
    assert shown == ["12.3 ms", "0.500 s", "89.0 s", "1.52 min", "2.00 h", "2.31 days"]


def test_tables_set_figures_to_the_right():
    shown = text.table(["", "a|b", "words"], [["first", "1,234", "one"], ["2", "–", "2"]])
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
    part = Part(None, {e: {"steps": len(x), "losses": x} for e, x in losses.items()})
    assert [part.gap(step) for step in (1, 2, 3)] == [7.5, 0.5, None]
