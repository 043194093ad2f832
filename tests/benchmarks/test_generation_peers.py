"""Generating beside llama.cpp and CTranslate2, on a tiny model; and what the report says."""

import pytest
import torch

from benchmarks import generation_peers
from benchmarks.generation import Task, transformers
from benchmarks.generation_peers import OURS, PEERS, gpt2, measure, report
from benchmarks.harness import Result

TINY = Task("tiny", batches=(1, 3), new=9)
MODULES = {"llama_cpp": ("llama_cpp", "gguf"), "ctranslate2": ("ctranslate2",)}
SIDES = [side for peer in ({"": OURS} | PEERS).values() for side in peer.values()]


def needs(kind: str):
    for name in MODULES.get(kind, ()):
        pytest.importorskip(name)


@pytest.mark.parametrize("kind, dtype", SIDES, ids=map(" ".join, SIDES))
def test_every_side_writes_as_many_tokens(kind, dtype):
    needs(kind)
    found = measure(kind, dtype, TINY)
    assert found["1"] > 0 and found["3"] > 0


@pytest.mark.parametrize("kind, dtype", [("llama_cpp", "F32"), ("ctranslate2", "float32")])
def test_what_is_converted_is_the_model(kind, dtype, tmp_path, monkeypatch):
    """Greedily, as far as the largest logit stands out, a peer writes what transformers writes."""
    needs(kind)
    task = Task("tiny", batches=(2,), new=9, top_k=1)
    model = gpt2(task)
    for parameter in model.parameters():  # so that logits stand out
        torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(generation_peers, "gpt2", lambda task: model)
    monkeypatch.setattr("transformers.GPT2LMHeadModel", lambda config: model)
    prompts = task.prompts(2)
    expected = transformers("fp32", task)[1](prompts)
    write = getattr(generation_peers, kind)(dtype, task, tmp_path)
    assert write(prompts) == expected


def test_the_bars_and_what_is_left_out():
    sides = [*OURS, *(s for name, peer in PEERS.items() if name != "llama_cpp" for s in peer)]
    found = {side: [{"1": 100.0, "16": 1000.0}] for side in sides}
    found["ours bf16, --compile"] = [{"1": 300.0, "16": 1100.0}]
    result = Result("generation_peers", "")
    report(result, found, ["llama_cpp"])
    (table,) = result.tables
    assert len(table["rows"]) == 2 * len(sides) and "not installed: llama_cpp." in table["note"]
    met = {claim["claim"]: claim["met"] for claim in result.claims}
    assert met == {
        "fp32, --compile, batch 1, against transformers fp32": False,
        "fp32, --compile, batch 16, against transformers fp32": False,
        "fp32, --compile, batch 16, against CTranslate2 float32": False,
        "bf16, --compile, batch 1, against transformers bf16": True,
        "bf16, --compile, batch 16, against transformers bf16": False,
        "bf16, --compile, batch 16, against CTranslate2 int8": False,
    }
