"""Generating one sequence at a time against the batched batched of PyTorch: the same ids."""

import subprocess
import sys

import pytest
import torch

from common.errors import UserError
from generation import batched, sequential
from generation.sampling import Sampling, sample_token, uniform
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from tests.helpers import ROOT

PROMPTS = [[5], [7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8], list(range(30)), [9, 9], [5]]
RULES = {
    "greedy": Sampling(greedy=True, max_new_tokens=25),
    "sampled": Sampling(temperature=1.5, top_k=20, top_p=0.95, max_new_tokens=25),
}


class OneByOne:
    """The decoder in PyTorch, behind what `sequential` asks of an engine."""

    def __init__(self, model):
        self.model, self.config, self.max_len = model, model.config, model.max_len
        self.reads = []  # how many tokens each call had to read

    training = property(lambda self: self.model.training)

    def train(self, mode=True):
        self.model.train(mode)

    def eval(self):
        self.model.eval()

    def new_cache(self):
        return Cache(self.model)

    @torch.no_grad()
    def next_logits(self, cache, ids):
        self.reads.append(len(ids))
        return self.model(torch.tensor([ids]), cache=cache.cache)[0, -1].tolist()


class Cache:
    """One row of PyTorch's cache."""

    def __init__(self, model):
        self.cache = batched.KVCache(model, 1, model.max_len)

    length = property(lambda self: self.cache.lengths[0])

    def clear(self):
        self.cache.lengths = [0]


def decoder(max_len=12, **options):
    torch.manual_seed(0)
    small = {"d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 32, "init_std": 0.4}
    config = ModelConfig(40, max_len=max_len, **{**small, **options})
    return TransformerDecoder.from_config(config, torch.float64).eval()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("max_len", [1, 2, 3, 12, 100])
def test_it_gives_what_the_batch_gives(max_len, rules):
    model = decoder(max_len)
    rows = batched.generate(model, PROMPTS, rules, seed=3)
    assert sequential.generate(OneByOne(model), PROMPTS, rules, seed=3) == rows
    assert len({tuple(row) for row in rows}) >= len(PROMPTS) - (rules.greedy or max_len == 1) * 3


def test_samples_ends_and_stops_mean_the_same():
    model, rules = decoder(60), RULES["sampled"]
    several = {"samples": [3, 1, 0, 0, 2, 7], "seed": 2}
    assert sequential.generate(OneByOne(model), PROMPTS, rules, **several) == batched.generate(
        model, PROMPTS, rules, **several
    )
    free = batched.generate(model, PROMPTS, rules)
    end_id = free[2][4]
    ended = sequential.generate(OneByOne(model), PROMPTS, rules, end_id=end_id)
    assert ended == batched.generate(model, PROMPTS, rules, end_id=end_id) != free

    heard = [[] for _ in PROMPTS]

    def on_token(row, token):
        heard[row].append(token)
        return row in (0, 3) and len(heard[row]) == 3 + row

    stopped = sequential.generate(OneByOne(model), PROMPTS, rules, on_token=on_token)
    assert stopped == heard == [row[: {0: 3, 3: 6}.get(i)] for i, row in enumerate(free)]


@pytest.mark.parametrize("which", ["one by one", "batch"])
def test_on_logits_hears_what_each_token_was_chosen_from(which):
    model, rules = decoder(60), RULES["sampled"]
    generate = sequential.generate if which == "one by one" else batched.generate
    engine = OneByOne(model) if which == "one by one" else model
    end_id = batched.generate(model, PROMPTS, rules)[2][4]
    heard, calls = [[] for _ in PROMPTS], [[] for _ in PROMPTS]

    def on_logits(row, logits, token):
        assert type(logits) is list and len(logits) == 40 and type(logits[0]) is float
        position = len(PROMPTS[row]) + len(heard[row])
        sample = 1 if row == 5 else 0  # the second [5]
        assert token == sample_token(logits, rules, uniform(0, sample, position))
        heard[row].append(token)
        calls[row].append("logits")

    def on_token(row, token):
        assert heard[row][-1] == token
        calls[row].append("token")

    rows = generate(engine, PROMPTS, rules, end_id=end_id, on_token=on_token, on_logits=on_logits)
    ended = [row + [end_id] * (len(row) < rules.max_new_tokens) for row in rows]
    assert heard == ended and any(end_id in row for row in heard)
    for row, new in zip(calls, rows, strict=True):
        assert row[: 2 * len(new)] == ["logits", "token"] * len(new)


def test_a_cache_is_filled_once_in_half_a_window_and_each_token_read_once_else():
    engine = OneByOne(decoder(12))
    sequential.generate(engine, [[1, 2, 3], [4]], Sampling(max_new_tokens=20))
    one = [1]
    three_read = [3, *9 * one, 6, *6 * one, 6, *2 * one]
    assert engine.reads == [*three_read, *12 * one, 6, *6 * one, 6]


def test_the_model_is_left_in_the_mode_it_was_in():
    model = decoder(dropout=0.5)
    expected = sequential.generate(OneByOne(model), PROMPTS, RULES["sampled"])
    model.train()
    assert sequential.generate(OneByOne(model), PROMPTS, RULES["sampled"]) == expected
    assert model.training and model.layers[0].dropout1.training

    def interrupted(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sequential.generate(OneByOne(model), PROMPTS, RULES["sampled"], on_token=interrupted)
    assert model.training


def test_what_cannot_be_read_is_refused():
    model, rules = decoder(), RULES["greedy"]
    assert sequential.generate(OneByOne(model), [], rules) == []
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        sequential.generate(OneByOne(model), [[1], []], rules)
    for ids in ([[1, 2], [3]], [1.5], "12", 3, [None]):
        with pytest.raises(UserError, match=r"prompt 0 = .* must be a list of ids"):
            sequential.generate(OneByOne(model), [ids], rules)
    for ids in ([40], [-1]):
        with pytest.raises(UserError, match="vocabulary ends at 39"):
            sequential.generate(OneByOne(model), [ids], rules)
    for wrong in (torch.nan, torch.inf):
        with torch.no_grad():
            model.output.bias[7] = wrong
        for rules in RULES.values():
            with pytest.raises(UserError, match="not finite"):
                sequential.generate(OneByOne(model), [[1]], rules)
    with torch.no_grad():  # a token that never comes is no error, in either
        model.output.bias[7] = -torch.inf
    rows = sequential.generate(OneByOne(model), PROMPTS, rules)
    assert rows == batched.generate(model, PROMPTS, rules) and all(7 not in row for row in rows)
    with torch.no_grad():
        model.output.bias[:] = -torch.inf
    for generate, engine in (sequential.generate, OneByOne(model)), (batched.generate, model):
        with pytest.raises(UserError, match="not finite"):
            generate(engine, [[1]], rules)


def test_it_needs_the_standard_library_alone():
    code = (
        "import sys, generation.sequential, checkpoint.safetensors_python, checkpoint.reader;"
        "print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
