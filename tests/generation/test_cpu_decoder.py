"""The step put together by hand against the module: the same logits, and the same greedy text."""

import pytest
import torch

from generation import batched, cpu_decoder
from generation.batched import generate
from generation.cpu_decoder import CPUDecoder
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from tests.generation.test_batched import CONFIGS, PROMPTS, RULES, decoder, plain

MORE = {  # beyond CONFIGS: every option once the other way
    "no biases": {"bias": False, "norm_first": True},
    "rms, post-norm": {"norm": "rms", "embedding_norm": True, "final_norm": True},
    "gelu, unscaled": {"activation": "gelu", "scale_embedding": False, "tie_embeddings": True},
    "one head": {"n_heads": 1},
}
WIDE = 1e-5  # of float32, in logits of order 1


@pytest.fixture
def steps(monkeypatch):
    """The steps that were made."""
    made = []

    class Counted(CPUDecoder):
        def __init__(self, model):
            super().__init__(model)
            made.append(self)

    monkeypatch.setattr(batched, "CPUDecoder", Counted)
    return made


@pytest.mark.parametrize("options", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
@torch.inference_mode()
def test_it_gives_the_logits_of_the_module_without_a_cache(options):
    model = decoder(torch.float32, **options)
    assert cpu_decoder.is_supported(model)
    step, rows = CPUDecoder(model), torch.randint(40, (3, 9))
    cache = KVCache(model, 3, 9)
    alone = torch.stack([step(ids, cache) for ids in rows.split(1, dim=1)], dim=1)
    torch.testing.assert_close(alone, model(rows), rtol=WIDE, atol=WIDE)
    # rows of unequal lengths: of the second only two tokens are there
    cache = KVCache(model, 2, 9)
    model(rows[:2, :5], cache=cache)
    cache.lengths = [5, 2]
    found = step(torch.tensor([[3], [4]]), cache)
    for row, length, token in (0, 5, 3), (1, 2, 4):
        text = torch.cat([rows[row, :length], torch.tensor([token])])
        torch.testing.assert_close(found[row], model(text[None])[0, -1], rtol=WIDE, atol=WIDE)


@pytest.mark.parametrize("options", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
def test_greedy_text_in_float32_is_that_of_the_plain_uncached_path(options, steps):
    model = decoder(torch.float32, **options)
    alone = [plain(model, prompt, RULES["greedy"]) for prompt in PROMPTS]
    assert generate(model, PROMPTS, RULES["greedy"]) == alone
    assert [generate(model, [prompt], RULES["greedy"])[0] for prompt in PROMPTS] == alone
    assert len(steps) == 1 + len(PROMPTS)


def test_sampled_text_is_the_same_by_the_step_and_by_the_module(monkeypatch):
    model = decoder(torch.float32)
    by_step = generate(model, PROMPTS, RULES["sampled"], seed=5)
    monkeypatch.setattr(cpu_decoder, "is_supported", lambda model: False)
    assert generate(model, PROMPTS, RULES["sampled"], seed=5) == by_step


def test_changed_weights_are_read_anew(steps):
    model, rules = decoder(torch.float32), RULES["greedy"]
    before = generate(model, PROMPTS, rules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))  # no version counts
    after = generate(model, PROMPTS, rules)
    assert after == [plain(model, prompt, rules) for prompt in PROMPTS] != before
    assert len(steps) == 2


def test_where_it_does_not_pay_or_not_hold_the_module_is_called(steps, monkeypatch):
    generate(decoder(torch.float64), PROMPTS, RULES["greedy"])
    with torch.autocast("cpu", torch.bfloat16):
        generate(decoder(torch.float32), PROMPTS, RULES["greedy"])
    generate(
        decoder(torch.float32), PROMPTS, Sampling(max_new_tokens=batched.MIN_TOKENS_TO_PACK - 1)
    )
    assert steps == []
    generate(decoder(torch.float32), PROMPTS, Sampling(max_new_tokens=batched.MIN_TOKENS_TO_PACK))
    assert len(steps) == 1
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    generate(decoder(torch.float32), PROMPTS, RULES["greedy"])
    assert len(steps) == 1


def test_bfloat16_stays_within_its_rounding():
    """Each greedy token is within bfloat16's rounding of the largest logit in float64."""
    exact, model = decoder(), decoder().to(torch.bfloat16)
    rows = generate(model, PROMPTS[:3], Sampling(greedy=True, max_new_tokens=9))
    for prompt, row in zip(PROMPTS, rows, strict=False):
        text = [*prompt, *row[: 12 - len(prompt)]]  # as far as the first window goes
        logits = exact(torch.tensor([text[:-1]]))[0, len(prompt) - 1 :]
        chosen = torch.tensor(text[len(prompt) :])[:, None]
        short = logits.amax(-1) - logits.gather(1, chosen)[:, 0]
        assert (short < 0.1 * logits.std()).all()
