"""How often answers are right: a tiny run, trained and evaluated as the large ones are."""

import json

from benchmarks.harness import Result
from benchmarks.quality import best_look_up, own, run, tell
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
