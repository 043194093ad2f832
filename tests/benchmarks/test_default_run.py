"""benchmarks/default_run.py: the answers it counts, one by one and by a whole program."""

import json
from collections import Counter

from benchmarks.default_run import name, report, score
from checkpoint.reader import Checkpoint
from data.dataset import prepare
from data.tokenizers.load import load_tokenizer
from model.transformer_full import TransformerDecoder
from tests.helpers import run, write_config
from training.config import check


def test_the_name_of_a_signature():
    assert name("def walk(top, topdown=True):") == "walk"
    assert name("    async def get(self):") == "get"
    assert name("class Path(PurePath):") == "Path"
    assert name("walk") == "walk"


def test_exact_answers_and_names_are_counted(tmp_path):
    """Of a model that has learned half of each answer: the name, not always the argument."""
    pairs = [
        {"prompt": f"{verb} the {noun} {n}", "completion": f"def {verb}({noun}{n % 2}):"}
        for verb in ("get", "set")
        for noun in ("a", "b")
        for n in range(60)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    config = write_config(tmp_path, file)
    flags = ("--data.kind", "pairs", "--max_steps", 150, "--data.val_fraction", 0.2)
    done = run("train.py", "--config", config, *flags, "--name", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = score(tmp_path / "runs" / "r")

    checkpoint = Checkpoint.find(tmp_path / "runs" / "r")
    tokenizer = load_tokenizer(checkpoint.path)
    val = prepare(check(checkpoint.config, "r").data, print, tokenizer=tokenizer).val
    held_out = {
        tokenizer.decode(val.ids[start : start + length - 1].tolist())
        for start, length in zip(val.starts, val.prompts, strict=False)
    }
    model, expected = TransformerDecoder.from_checkpoint(checkpoint.path), Counter()
    for pair in pairs:
        if pair["prompt"] in held_out:
            ids = model.generate(tokenizer.encode(pair["prompt"]), top_k=1, max_len=30)
            answer = tokenizer.decode(ids)
            expected["pairs"] += 1
            expected["exact"] += answer == pair["completion"]
            expected["names"] += answer.startswith(pair["completion"].split("(")[0] + "(")
    assert found == expected
    assert 0 < found["exact"] < found["names"] <= found["pairs"] == len(held_out)


def test_the_bars_are_about_the_medians_and_the_worst():
    def side(*runs):
        return [
            {"seed": i, "steps": 9, "loss": loss, "seconds": seconds, "whole": 50.0,
             "pairs": 10, "exact": exact, "names": 4}
            for i, (loss, seconds, exact) in enumerate(runs)
        ]  # fmt: skip

    now = side((2.0, 10, 3), (2.06, 11, 4), (2.0, 30, 4))
    claims = report({"before": side((2.1, 20, 2)), "now": now}).claims
    assert [claim["measured"] for claim in claims] == [2.06, 11 / 20, 2, 1]
    assert [claim["met"] for claim in claims] == [False, True, True, True]
    assert len(report({"now": now}).claims) == 1
