"""README.md of an exported model."""

import shutil

from checkpoint.reader import Checkpoint
from evaluation.report import publish
from exchange.model_card import model_card
from tests.exchange.helpers import PRE, save_run

SCORE = {"value": 0.51239, "low": 0.25, "high": 0.75}


def found(step: int) -> dict:
    return {
        "step": step, "checkpoint": f"step_{step:08}", "data": "mine", "loss": 1.5,
        "perplexity": 4.48, "bits_per_byte": 0.9, "settings": {"beams": 8},
        "scores": {"8 beams": {"exact match": SCORE, "BLEU": SCORE}, "a|b": {"BLEU": SCORE}},
    }  # fmt: skip


def test_what_was_evaluated_of_this_step_stands_in_it(tmp_path):
    save_run(tmp_path / "run", PRE, "pairs")
    checkpoint = Checkpoint.find(tmp_path / "run")
    before = model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode()
    assert "| validation loss (nats a token) | 1.2500 |" in before and "evaluate.py" not in before
    publish(tmp_path / "run", "val", found(6))  # another step's figures are not this one's
    assert model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode() == before
    publish(tmp_path / "run", "/home/someone/mine.jsonl", found(7))
    page = model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode()
    table = """## Evaluation

By `evaluate.py` on mine.jsonl: loss 1.5000, perplexity 4.480, 0.9000 bits a byte; beams 8.

|  | 8 beams | a\\|b |
| --- | --- | --- |
| exact match | 0.512 |  |
| BLEU | 0.512 | 0.512 |

## Use
"""
    assert table in page and "someone" not in page
    publish(tmp_path / "run", "val, 3 examples", found(7))
    publish(tmp_path / "run", "val", found(7))
    page = model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode()
    assert page.index("on val:") < page.index("on val, 3 examples:")


def test_a_checkpoint_that_stands_alone_has_its_own_figures(tmp_path):
    save_run(tmp_path / "run", PRE, "pairs")
    alone = tmp_path / "elsewhere" / "model"
    shutil.copytree(Checkpoint.find(tmp_path / "run").path, alone)
    publish(tmp_path, "val", found(7))  # of whatever lies around it
    checkpoint = Checkpoint.find(alone)
    assert checkpoint.run == alone
    assert "evaluate.py" not in model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode()
    publish(alone, "val", found(7))
    page = model_card(checkpoint, PRE, "pairs", "onnx", "use()").decode()
    assert page.count("By `evaluate.py` on val") == 1 and "\n# model\n" in page
