"""evaluation.json: what is kept of it, whatever it has."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.report import publish, read_report

SCORE = {"value": 0.5, "low": 0.25, "high": 0.75}
FOUND = {
    "step": 7, "checkpoint": "step_00000007", "data": "mine", "loss": 1.5, "perplexity": 4.48,
    "bits_per_byte": 0.9, "scores": {"8 beams, reranked": {"exact match": SCORE}},
}  # fmt: skip
HOSTILE = [
    b"", b"[]", b"5", b"null", b"\xff", b'{"splits": 3}', b'{"splits": [1]}', b'{"splits": null}',
    b"[" * 100_000, b'{"splits": {"a": 3, "b": {}, "c": null}}',
    json.dumps({"splits": {"a": {**FOUND, "loss": "low"}, "b": {**FOUND, "step": 1.5}}}).encode(),
    json.dumps({"splits": {"a": {**FOUND, "scores": {"greedy": {"exact match": 1}}}}}).encode(),
    json.dumps({"splits": {"a": {**FOUND, "scores": [SCORE]}}}).encode(),
    json.dumps({"splits": {"a": {**FOUND, "step": 10**30}, "b": {**FOUND, "step": -1}}}).encode(),
    json.dumps({"splits": {"a": {**FOUND, "memorization": {"true": {"verbatim": {}}}}}}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_what_has_another_form_is_left_out(tmp_path, content):
    (tmp_path / "evaluation.json").write_bytes(content)
    assert read_report(tmp_path) == {}
    publish(tmp_path, "val", FOUND)
    assert (tmp_path / "damaged_evaluation.json_0").read_bytes() == content
    assert json.loads((tmp_path / "evaluation.json").read_bytes())["splits"] == {"val": FOUND}


def test_numbers_of_any_size_and_names_of_any_kind_are_shown(tmp_path):
    values = {"loss": float("inf"), "perplexity": float("nan"), "bits_per_byte": 1e300}
    strange = {**FOUND, **values, "scores": {"\ud800 \n/": {"\u202e": SCORE}}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"splits": {"\ud800": strange}}))
    publish(tmp_path, "val", FOUND)
    assert [*read_report(tmp_path)] == ["\ud800", "val"]


def test_what_can_be_read_of_a_damaged_file_is_kept(tmp_path, capsys):
    content = json.dumps({"splits": {"val": FOUND, "other": {**FOUND, "loss": "low"}}})
    (tmp_path / "evaluation.json").write_text(content)
    publish(tmp_path, "test", FOUND)
    assert [*read_report(tmp_path)] == ["val", "test"]
    assert (tmp_path / "damaged_evaluation.json_0").read_text() == content
    assert "was damaged, and is kept as damaged_evaluation.json_0" in capsys.readouterr().err
    publish(tmp_path, "test", FOUND)
    assert not (tmp_path / "damaged_evaluation.json_1").exists()


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    (tmp_path / "evaluation.tmp").mkdir()
    with pytest.raises(OSError) as found:
        publish(tmp_path, "val", FOUND)
    assert found.value.filename == str(tmp_path / "evaluation.json")


def test_splits_are_kept_and_shown_together(tmp_path):
    publish(tmp_path, "../other.jsonl", {**FOUND, "loss": 2.0})
    publish(tmp_path, "val", FOUND)
    found = read_report(tmp_path)
    assert [found["../other.jsonl"].loss, found["val"].loss] == [2.0, 1.5]
    assert found["val"].scores["8 beams, reranked"]["exact match"].value == 0.5
    (file,) = (tmp_path / "evaluation").iterdir()  # the earlier one is replaced
    events = EventAccumulator(str(file))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"{split}/{tag}"
        for split in ("val", ".._other.jsonl")
        for tag in ("loss", "perplexity", "bits_per_byte", "exact_match/8_beams_reranked")
    }
    assert events.Scalars("val/loss")[0].step == 7
