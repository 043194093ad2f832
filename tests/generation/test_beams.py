"""Beam search against all texts there are, and against transformers'."""

import itertools

import pytest
import torch

from common.errors import UserError
from generation import batched, beams
from generation.sampling import Sampling
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from tests.helpers import as_gpt2

END = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=8, d_model=16, n_heads=2, n_layers=2, d_ff=16, max_len=24, init_std=0.5)
    return TransformerDecoder.from_config(ModelConfig(**shape), torch.float64).eval()


def score(model, prompt: list[int], text: list[int]) -> float:
    """The mean log probability of a text after a prompt, the end included if it came."""
    logits = model.requires_grad_(False)(torch.tensor([prompt + text]))[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(text) - 1)
    return sum(float(logits[i, t]) for i, t in zip(places, text, strict=True)) / len(text)


def test_with_enough_beams_it_finds_the_best_of_all_texts(model):
    """Of up to two tokens: 7 that go on, and so at most 7 kept."""
    prompt = [1, 5]
    texts = [[END], *([a, END] for a in range(8) if a != END)]
    texts += [[a, b] for a, b in itertools.product(range(8), repeat=2) if END not in (a, b)]
    best = sorted(((score(model, prompt, t), t) for t in texts), reverse=True)[:10]
    (found,) = beams.search(model, [prompt], 60, 2, end_id=END)
    for (value, text), (ids, got) in zip(best, found, strict=False):
        assert ids == [t for t in text if t != END]
        assert got == pytest.approx(value, abs=1e-12)


def test_one_beam_is_greedy(model):
    prompts = [[1, 5], [7, 7, 2, 0], [4]]
    greedy = batched.generate(model, prompts, Sampling(greedy=True, max_new_tokens=30), end_id=END)
    found = beams.search(model, prompts, 1, 30, end_id=END)
    assert [row[0][0] for row in found] == greedy  # past the end of the window, too


def test_a_prompt_gives_what_it_gives_alone(model):
    prompts = [[1, 5], [7, 7, 2, 0], [4], [5, 5, 5, 5, 5, 1, 0]]
    together = beams.search(model, prompts, 4, 12, end_id=END)
    alone = [beams.search(model, [p], 4, 12, end_id=END)[0] for p in prompts]
    assert [[ids for ids, _ in row] for row in together] == [[i for i, _ in row] for row in alone]
    assert all(a >= b for row in together for (_, a), (_, b) in itertools.pairwise(row))
    assert all(len({tuple(ids) for ids, _ in row}) == len(row) == 4 for row in together)


@pytest.mark.parametrize("count", [2, 5])
def test_it_is_transformers_beam_search(count):
    """On the same weights the same texts in the same order, with the same scores."""
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = dict(vocab_size=12, d_model=16, n_heads=2, n_layers=2, d_ff=16, max_len=40)
    shape |= dict(positions="learned", norm_first=True, final_norm=True, tie_embeddings=True)
    config = ModelConfig(**shape, scale_embedding=False, activation="gelu", init_std=0.5)
    ours = TransformerDecoder.from_config(config, torch.float64).eval()
    theirs = as_gpt2(ours)
    for prompt in ([1, 5], [7, 7, 2, 0], [4], [9, 11, 10]):
        (found,) = beams.search(ours, [prompt], count, 12, end_id=END)
        said = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=count,
            num_return_sequences=count, max_new_tokens=12, do_sample=False, eos_token_id=END,
            pad_token_id=END, length_penalty=1.0, early_stopping=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        texts = [row[len(prompt) :].tolist() for row in said.sequences]
        texts = [row[: row.index(END)] if END in row else row for row in texts]
        assert texts == [ids for ids, _ in found]
        assert said.sequences_scores.tolist() == pytest.approx([score for _, score in found])


def test_what_cannot_be_searched_is_refused(model):
    with pytest.raises(UserError, match="beams = 0 must be 1"):
        beams.search(model, [[1]], 0, 5)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        beams.search(model, [[]], 2, 5)
    assert beams.search(model, [], 2, 5) == []
    without_end = beams.search(model, [[1, 2]], 3, 6)
    assert [len(ids) for ids, _ in without_end[0]] == [6, 6, 6]


def test_a_length_penalty_of_0_gives_log_probabilities(model):
    (found,) = beams.search(model, [[5, 4]], 5, 4, end_id=END, length_penalty=0.0)
    assert [total for _, total in found] == sorted((total for _, total in found), reverse=True)
    for text, total in found:
        whole = text if len(text) == 4 else [*text, END]
        assert total == pytest.approx(score(model, [5, 4], whole) * len(whole))


def test_texts_that_have_ended_come_first(model):
    (found,) = beams.search(model, [[5, 4]], 60, 3, end_id=END)
    (first,) = beams.search(model, [[5, 4]], 60, 3, end_id=END, ended_first=True)
    whole = [len(ids) < 3 for ids, _ in first]
    assert whole == sorted(whole, reverse=True) and 0 < sum(whole) < len(whole) == len(found)
    for several in (first[: sum(whole)], first[sum(whole) :]):
        assert several == sorted(several, key=lambda each: -each[1])
    ended = [each for each in found if len(each[0]) < 3]
    assert all(each in first for each in ended) and found != first


def test_scores_of_whole_texts(model):
    (found,) = beams.search(model, [[5, 4]], 60, 3, end_id=END)
    rows = beams.with_log_probabilities(found, 3)
    assert [ids for ids, _ in rows] == [ids for ids, _ in found if len(ids) < 3] != []
    for text, total in rows:
        whole = [*text, END]
        assert total == pytest.approx(score(model, [5, 4], whole) * len(whole))
    cut = [each for each in found if len(each[0]) == 3]  # where none has ended all are taken
    for text, total in beams.with_log_probabilities(cut, 3):
        assert total == pytest.approx(score(model, [5, 4], text) * 3)
