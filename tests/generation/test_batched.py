"""Generation with a cache against the plain definition: read the window, sample_token, append."""

import pytest
import torch

from common.errors import UserError
from generation import batched
from generation.batched import generate, rows_at_once
from generation.kv_cache import KVCache
from generation.sampling import Sampling, sample_token, uniform, window
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

SMALL = {"d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 32, "init_std": 0.4}
CONFIGS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "final_norm": True, "activation": "gelu"},
    "learned": {"positions": "learned", "norm_first": True},
    "microgpt": {
        "positions": "learned",
        "norm": "rms",
        "norm_first": True,
        "embedding_norm": True,
        "bias": False,
        "scale_embedding": False,
    },
    "tied": {"tie_embeddings": True, "norm_first": True, "final_norm": True},
    "no norm": {"norm": "none", "init_std": 0.1},
}
RULES = {
    "greedy": Sampling(greedy=True, max_new_tokens=30),
    "sampled": Sampling(temperature=1.5, top_k=20, top_p=0.95, max_new_tokens=30),
}
PROMPTS = [[5], [7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8], list(range(30)), [9, 9], list(range(12))]


def decoder(dtype=torch.float64, max_len=12, **options):
    torch.manual_seed(0)
    config = ModelConfig(40, max_len=max_len, **{**SMALL, **options})
    return TransformerDecoder.from_config(config, dtype).eval()


@torch.no_grad()
def plain(model, prompt, rules, seed=0, sample=0, end_id=None):
    """Without a cache or a batch: the definition."""
    ids = list(prompt)
    while len(ids) - len(prompt) < rules.max_new_tokens:
        seen = ids[-window(len(ids), model.max_len) :]
        logits = model(torch.tensor([seen]))[0, -1].tolist()
        token = sample_token(logits, rules, uniform(seed, sample, len(ids)))
        if token == end_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_batch_gives_what_each_prompt_gives_alone_without_a_cache(options, rules):
    """Prompts of unequal length, some beyond max_len, and all generated far beyond it."""
    model = decoder(**options)
    alone = [plain(model, prompt, rules, seed=3) for prompt in PROMPTS]
    assert generate(model, PROMPTS, rules, seed=3) == alone
    assert len({tuple(row) for row in alone}) == len(PROMPTS)  # or it would say little


@pytest.mark.parametrize("max_len", [1, 2, 3, 100])
def test_any_length_of_window(max_len):
    model = decoder(max_len=max_len)
    alone = [plain(model, prompt, RULES["sampled"]) for prompt in PROMPTS]
    assert generate(model, PROMPTS, RULES["sampled"]) == alone


def test_rows_end_at_the_end_token_or_when_told_and_the_others_go_on(monkeypatch):
    model, rules = decoder(max_len=60), RULES["sampled"]
    prefills = []
    prefill = batched.prefill
    monkeypatch.setattr(batched, "prefill", lambda *a: prefills.append(a[2]) or prefill(*a))
    free = generate(model, PROMPTS, rules)
    end_id = free[2][4]
    expected = [plain(model, prompt, rules, end_id=end_id) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 2
    assert generate(model, PROMPTS, rules, end_id=end_id) == expected

    heard = [[] for _ in PROMPTS]

    def on_token(row, token):
        heard[row].append(token)
        return row in (0, 3) and len(heard[row]) == 3 + row

    stopped = generate(model, PROMPTS, rules, on_token=on_token)
    assert stopped == heard
    assert stopped == [row[: {0: 3, 3: 6}.get(i)] for i, row in enumerate(free)]
    # once in each of the three calls, with nothing to read for a prompt of one token: from then on
    # the cache serves whoever is left
    assert prefills == [list(range(1, len(PROMPTS)))] * 3


def test_samples_of_one_prompt_and_going_on_from_what_was_written():
    model, rules = decoder(), RULES["sampled"]
    several = generate(model, [[5, 6]] * 4, rules, seed=1)
    assert several == [plain(model, [5, 6], rules, 1, sample) for sample in range(4)]
    assert len({tuple(row) for row in several}) == 4
    assert generate(model, [[5, 6]] * 2, rules, seed=1, samples=[3, 1]) == [several[3], several[1]]
    assert generate(model, [[5, 6]], rules, seed=2)[0] != several[0]
    assert generate(model, [[5, 6, *several[0][:20]]], rules, seed=1)[0][:10] == several[0][20:]


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_no_path_sees_the_future(options):
    """Whole, prefilled, decoded token by token and beside a longer row: the same logits."""
    model = decoder(**options)
    ids = torch.randint(40, (1, 9), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 40

    def whole(ids):
        return model(ids)

    def prefilled(ids):
        return model(ids, cache=KVCache(model, 1, 9))

    def decoded(ids):
        cache = KVCache(model, 1, 9)
        return torch.cat([model(token, cache=cache) for token in ids.split(1, dim=1)], dim=1)

    def masked(ids):
        cache = KVCache(model, 2, 12)
        model(torch.arange(6).view(2, 3), cache=cache)
        cache.lengths = [0, 3]  # the first row's prompt was all padding
        pairs = [torch.cat([token, token]) for token in ids.split(1, dim=1)]
        return torch.cat([model(pair, cache=cache)[:1] for pair in pairs], dim=1)

    with torch.no_grad():
        expected = whole(ids)
        for path in (whole, prefilled, decoded, masked):
            before, after = path(ids), path(changed)
            torch.testing.assert_close(before, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
            assert ((after[:, 5:] - before[:, 5:]).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
def test_the_cache_is_as_large_as_arithmetic_says_and_refuses_misuse():
    model = decoder(torch.float32)
    cache = KVCache(model, 3, 10)
    assert cache.nbytes == 2 * 2 * 3 * 4 * 10 * 4 * 4  # keys and values, L, B, H, S, D, float32
    assert KVCache(decoder(torch.bfloat16), 3, 10).nbytes == cache.nbytes / 2
    model(torch.zeros(3, 6, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="empty cache"):
        model(torch.zeros(3, 2, dtype=torch.int64), cache=cache)
    for _ in range(4):
        model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="10 places, and 11"):
        model(torch.zeros(3, 1, dtype=torch.int64), cache=cache)


def test_training_is_not_disturbed():
    model = decoder(torch.float32, dropout=0.5).train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, RULES["sampled"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.layers[0].dropout1.training
    assert generate(model.eval(), PROMPTS, RULES["sampled"]) == first  # no dropout in either
    assert not model.training
    model.train()(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())

    def interrupted(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, RULES["sampled"], on_token=interrupted)
    assert model.training


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_follows_the_same_path(autocast):
    """Each greedy token is within bfloat16's rounding of the largest logit in float64."""
    exact = decoder()
    model = decoder().to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rows = generate(model, PROMPTS[:3], Sampling(greedy=True, max_new_tokens=4))
    for prompt, row in zip(PROMPTS, rows, strict=False):
        logits = exact(torch.tensor([[*prompt, *row[:-1]]]))[0, len(prompt) - 1 :]
        short = logits.amax(-1) - logits.gather(1, torch.tensor(row)[:, None])[:, 0]
        assert len(row) == 4 and (short < 0.1 * logits.std()).all()


def test_the_method_of_the_decoder():
    model = decoder()
    rules = Sampling(top_k=50, max_new_tokens=8)
    assert model.generate([5, 6], max_len=8) == plain(model, [5, 6, 2], rules, end_id=3)
    greedy = plain(model, [5, 6], Sampling(greedy=True, max_new_tokens=64), end_id=3)
    assert model.generate([5, 6], start_id=None, temperature=0) == greedy
    assert model.generate((), max_len=1)[:1] == plain(model, [2], rules)[:1]


def test_as_many_rows_at_once_as_half_of_the_memory_holds():
    model = decoder(torch.float32, max_len=100)
    assert rows_at_once(model, 50) == 32  # a CPU
    row = 50 * 16 * 4 * (4 * 2 + 16) + 32 * 40  # L = 2, C = 16, V = 40
    held = {2 * row * n - short: rows_at_once(model, 50, 2 * row * n - short)
            for n in (1, 8, 9, 512, 10**6) for short in (0, 1)}  # fmt: skip
    assert list(held.values()) == [1, 1, 8, 4, 8, 8, 512, 256, 512, 512]
    most = 2 * 8 * (2 * row - 32 * 40)  # a text has no more places than the model
    assert rows_at_once(model, 10**9, most) == rows_at_once(model, 100, most) <= 8
    exact = decoder(max_len=100)
    assert rows_at_once(exact, 50, 64 * row) < rows_at_once(model, 50, 64 * row)
    cache = KVCache(model, 512, 50)
    assert cache.nbytes < 512 * row  # what is counted for a row is more than its keys and values


def test_what_cannot_be_read_is_refused():
    model, rules = decoder(), RULES["greedy"]
    assert generate(model, [], rules) == []
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(model, [[1], []], rules)
    for ids in ([[1, 2], [3]], [1.5], "12", 3, [None]):
        with pytest.raises(UserError, match=r"prompt 0 = .* must be a list of ids"):
            generate(model, [ids], rules)
    for ids in ([40], [-1]):
        with pytest.raises(UserError, match="vocabulary ends at 39"):
            generate(model, [ids], rules)
    for wrong in (torch.nan, torch.inf):
        with torch.no_grad():
            model.output.bias[7] = wrong
        for rules in RULES.values():
            with pytest.raises(UserError, match="not finite"):
                generate(model, [[1]], rules)
