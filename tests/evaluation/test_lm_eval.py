"""The adapter for lm-evaluation-harness: a task file of ours, run by the harness itself."""

import json
import math

import pytest
import torch

from data.tokenizers.char import CharTokenizer
from generation.batched import generate
from generation.sampling import Sampling
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

pytest.importorskip("lm_eval")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from evaluation.lm_eval import Decoder

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz ?.\n")
CHOICES = """
task: ours_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: ours_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
DOCS = [
    {"question": "who is it?", "choices": ["me", "you and them"], "answer": 0},
    {"question": "a", "choices": ["b c", "d", "eee"], "answer": 2},
    {"question": "where is the end of this that is too long to be read", "choices": ["x", "y"],
     "answer": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = dict(d_model=16, n_heads=2, n_layers=1, d_ff=16, max_len=24, init_std=0.5)
    config = ModelConfig(vocab_size=TOKENIZER.vocab_size, **shape)
    return TransformerDecoder.from_config(config, torch.float64).requires_grad_(False).eval()


def log_probability(model, read: list[int], said: list[int]) -> float:
    """Token by token, each with as much in front of it as the window takes of the text."""
    text = [*read, *said]
    logits = model(torch.tensor([text[:-1][-24:]]))[0].log_softmax(-1)
    return sum(float(logits[i - len(said), t]) for i, t in enumerate(said))


def test_the_harness_runs_tasks_of_ours(tmp_path, model):
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(f"{json.dumps(doc)}\n" for doc in DOCS))
    (tmp_path / "choices.yaml").write_text(CHOICES.format(file=file))
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(file=file))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        Decoder(model, TOKENIZER, "pairs"),
        tasks=["ours_choices", "ours_rolling"],
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    right = []
    for doc in DOCS:
        read = [*TOKENIZER.encode(doc["question"]), TOKENIZER.start_id]
        values = [log_probability(model, read, TOKENIZER.encode(c)) for c in doc["choices"]]
        right.append(values.index(max(values)) == doc["answer"])
    assert found["ours_choices"]["acc,none"] == pytest.approx(sum(right) / len(DOCS))
    total = size = 0
    for doc in DOCS:
        ids = TOKENIZER.encode(doc["question"])
        for first in range(0, len(ids), 24):  # windows side by side, the last one filled up
            end = min(first + 24, len(ids))
            read = [TOKENIZER.start_id, *ids][max(0, end - 24) : end]
            logits = model(torch.tensor([read]))[0].log_softmax(-1)
            said = ids[first:end]
            total += sum(float(logits[i - len(said), t]) for i, t in enumerate(said))
        size += len(doc["question"].encode())
    bits = -total / size / math.log(2)
    assert found["ours_rolling"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-9)


def test_scores_are_those_of_each_text_alone(model):
    decoder = Decoder(model, TOKENIZER, "stream")
    pairs = [("to be or", " not"), ("x", "yz"), ("a long text that leaves the window", " of it")]
    scores = decoder.score([decoder.encode(*pair) for pair in pairs])
    for (context, said), (value, greedy) in zip(pairs, scores, strict=True):
        read, ids = TOKENIZER.encode(context), TOKENIZER.encode(said)
        assert value == pytest.approx(log_probability(model, read, ids), abs=1e-10)
        window = [*read, *ids][:-1][-24:]
        best = model(torch.tensor([window]))[0, -len(ids) :].argmax(-1).tolist()
        assert greedy == (best == ids)


@pytest.mark.parametrize(
    "kind, read",
    [
        ("stream", TOKENIZER.encode("\n")),
        ("documents", [TOKENIZER.start_id]),
        ("pairs", [TOKENIZER.start_id]),
    ],
)
@pytest.mark.parametrize("said", ["x", "xyz"])
def test_after_an_empty_context_all_of_a_continuation_is_scored(model, kind, read, said):
    assert Decoder(model, TOKENIZER, kind).encode("", said) == (read, TOKENIZER.encode(said))


def test_generating_stops_before_a_text(model):
    decoder = Decoder(model, TOKENIZER, "stream")

    class Request:
        def __init__(self, *args):
            self.args = args

    prompt = TOKENIZER.encode("to be")
    (ids,) = generate(model, [prompt], Sampling(greedy=True, max_new_tokens=12))
    whole = TOKENIZER.decode(ids)
    said = decoder.generate_until([
        Request("to be", {"until": ["\0"], "max_gen_toks": 12}),
        Request("to be", {"until": [whole[5:7]], "max_gen_toks": 12}),
    ])  # fmt: skip
    assert said == [whole, whole[: whole.index(whole[5:7])]]
