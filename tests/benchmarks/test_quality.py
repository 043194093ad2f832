"""How often answers are right: a tiny run, trained and evaluated as the large ones are."""

import json

import pytest

from benchmarks import quality
from benchmarks.harness import Result
from benchmarks.quality import best_look_up, own, run, tell
from common import cli
from tests.helpers import TINY, write_config


def test_a_run_is_trained_and_evaluated(tmp_path):
    lines = [json.dumps({"prompt": f"p {i}", "completion": f"def f{i}(a):"}) for i in range(60)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    config = write_config(tmp_path, tmp_path / "records.jsonl", TINY)
    ways = {
        "beams": ["--beams", "2", "--max_new_tokens", "8"],
        "reranked": ["--beams", "2", "--max_new_tokens", "8", "--rerank"],
    }
    flags = ["--config", config, "--max_steps", 2, "--train.eval_interval", 2]
    seconds, found = run(tmp_path / "runs", ways, *flags)
    assert seconds > 0
    assert [own(each)[0] for each in found.values()] == ["2 beams", "2 beams, reranked"]
    scores = found["beams"].scores
    for measure in ("argument F1", "parses", "char-BLEU"):
        look_ups = [scores[name][measure].value for name in scores if name != "2 beams"]
        assert len(look_ups) == 2 and best_look_up(found["beams"], measure) == max(look_ups) > 0
    result = Result("quality", "")
    tell(result, "tiny", seconds, found)
    (table,) = result.tables
    assert [row[0] for row in table["rows"]] == [
        "2 beams", "2 beams, reranked", "nearest neighbour", "most frequent",
    ]  # fmt: skip
    assert table["columns"][:3] == ["", "exact match", "name match"]
    assert "5 held-out pairs" in table["note"] and "step 2," in table["note"]
    measures = dict(zip(table["columns"], table["rows"][-1], strict=True))
    assert "(" not in measures["char-BLEU"] and " to " in measures["parses"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1 (found 0)"),
        (["--nl2bash", "nowhere"], "--nl2bash nowhere: no train.nl there; give nl2bash's folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality", *flags])
    assert cli.run("python -m benchmarks.quality", quality.main) == 2
    assert capsys.readouterr().err == f"python -m benchmarks.quality: {said}\n"
