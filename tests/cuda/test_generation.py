"""Generating on a GPU: the CPU's text, by CUDA graphs where these are to be, without waiting."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from generation import batched, cuda_decoder
from generation.batched import generate, module_step, prefill
from generation.cuda_decoder import CaptureError, borrow
from generation.kv_cache import KVCache
from generation.sampling import Sampling, sample_token, uniform
from generation.torch_sampling import sample_tokens
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

SHAPE = ModelConfig(2000, 64, 4, 2, 128, 40, 0.0, init_std=0.3)
LONG = replace(SHAPE, max_len=300)  # beyond the first two buckets
OPTIONS = {
    "post-norm": {},
    "pre-norm, tied": {"norm_first": True, "final_norm": True, "tie_embeddings": True},
    "learned, no biases": {"positions": "learned", "bias": False, "activation": "gelu"},
    "rms": {"norm": "rms", "embedding_norm": True, "final_norm": True},
    "heads three wide": {"d_model": 12, "scale_embedding": False},  # no fused kernel has them
}
RULES = {
    "greedy": Sampling(greedy=True, max_new_tokens=60),
    "all": Sampling(temperature=0.9, max_new_tokens=60),
    "top_k": Sampling(top_k=50, max_new_tokens=60),
    "top_k, top_p": Sampling(top_k=50, top_p=0.9, max_new_tokens=60),
    "top_p": Sampling(top_p=0.9, max_new_tokens=60),
}
PROMPTS = [[5], [7, 8, 9], list(range(100, 130)), list(range(50)), [9, 9], [5]]


def decoder(dtype, shape=SHAPE, device="cuda", **options):
    torch.manual_seed(0)
    model = TransformerDecoder.from_config(replace(shape, **options), dtype)
    return model.to(device).eval()


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    cuda_decoder.kept.clear()


# The same text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_text_in_float64_is_the_cpus_in_any_batch(options, rules):
    """Far beyond max_len too, where windows are read again."""
    expected = generate(decoder(torch.float64, device="cpu", **options), PROMPTS, rules, seed=3)
    model = decoder(torch.float64, **options)
    assert generate(model, PROMPTS, rules, seed=3) == expected
    alone = [generate(model, [prompt], rules, seed=3)[0] for prompt in PROMPTS[:5]]
    assert alone == expected[:5]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_text_by_graphs_in_float32_is_the_modules(rules, monkeypatch, capfd):
    model, rules = decoder(torch.float32, LONG), replace(rules, max_new_tokens=140)
    texts = generate(model, PROMPTS, rules)
    # so that some rows end early, and the one of 50 tokens not before it is in the second bucket
    end_id = next(token for token in texts[0] if token not in texts[3][:90])
    by_graphs = generate(model, PROMPTS, rules, end_id=end_id)
    (kept,) = cuda_decoder.kept.values()
    assert {S for _, S in kept.recorded} >= {128, 256} and capfd.readouterr().err == ""
    again = generate(model, PROMPTS, rules, end_id=end_id)  # by what has been kept
    assert list(cuda_decoder.kept.values()) == [kept]
    monkeypatch.setattr(cuda_decoder, "is_supported", lambda model: False)
    assert generate(model, PROMPTS, rules, end_id=end_id) == by_graphs == again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.inference_mode()
def test_each_step_gives_the_modules_logits(options, dtype):
    """Rows of unequal lengths, beyond a bucket's end, dropped on the way."""
    model = decoder(dtype, LONG, **options)
    dice = torch.Generator().manual_seed(4)
    texts = [torch.randint(2000, (n,), generator=dice).tolist() for n in (1, 118, 30, 126, 7)]
    step = borrow(model, 5, 160)
    caches = [step.cache, KVCache(model, 5, 160)]
    for cache in caches:
        prefill(model, cache, list(range(5)), [text[:-1] for text in texts])
    for turn in range(24):
        newest = torch.tensor([[text[-1]] for text in texts])
        with cuda_decoder.attention_kernels(torch.device("cuda")):
            found = step(newest, caches[0]).float()
            expected = module_step(model, newest, caches[1]).float()
        # of 16 bits: the largest of 10,000 differences by rounding; a wrong key makes 1 std of it
        apart = 1e-4 if dtype == torch.float32 else 0.3 * expected.std().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=apart)
        for text in texts:
            text.append(int(torch.randint(2000, (), generator=dice)))
        if turn in (4, 15):
            row = 1 if turn == 4 else 3
            for cache in caches:
                cache.drop(row)
            texts[row] = texts[-1]
            texts.pop()
    assert list(step.recorded) == [(5, 128), (5, 256), (4, 256), (4, 128)]


def test_graphs_read_changed_weights_and_new_ones(monkeypatch):
    model, rules = decoder(torch.float32), RULES["top_k"]
    before = generate(model, PROMPTS, rules)
    for elsewhere in False, True:
        for parameter in model.parameters():
            data = parameter.data.clone() if elsewhere else parameter.data
            parameter.data = data.mul_(torch.linspace(0.5, 1.5, data.shape[-1], device="cuda"))
        by_graphs = generate(model, PROMPTS, rules)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_decoder, "is_supported", lambda model: False)
            assert generate(model, PROMPTS, rules) == by_graphs != before
        before = by_graphs


# How ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def recorded(model, rows: int):
    """A decoder that has taken its first steps, and the ids of its next."""
    step = borrow(model, rows, 100)
    ids = torch.arange(rows)[:, None]
    for _ in range(3):
        step(ids, step.cache)
    torch.cuda.synchronize()
    return step, ids


@torch.inference_mode()
def test_a_step_is_one_launch_and_the_host_waits_for_nothing():
    model = decoder(torch.bfloat16, n_layers=6, norm_first=True, activation="gelu", bias=False)
    step, ids = recorded(model, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(ids, step.cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step(ids, step.cache)
        torch.cuda.synchronize()
    names = [event.name for event in record.events()]
    assert sum(name.startswith("cudaGraphLaunch") for name in names) == 1
    assert not any(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names)
    kernels = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # eleven a layer, and some more where a product is split; ten before and after the layers
    assert 6 * 10 <= len(kernels) <= 6 * 15 + 16, sorted(e.name for e in kernels)


@pytest.mark.parametrize("name", ["greedy", "all", "top_k", "top_k, top_p"])
def test_choosing_a_token_makes_the_host_wait_once(name):
    logits = torch.randn(16, 50304, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    numbers = [uniform(1, row, 0) for row in range(16)]
    expected = sample_tokens(logits.cpu(), RULES[name], numbers)
    assert sample_tokens(logits, RULES[name], numbers) == expected
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_tokens(logits, RULES[name], numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in waits]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_are_those_of_the_definition(dtype, scale, name):
    dice = torch.Generator().manual_seed(5)
    logits = (torch.randn(8, 3001, generator=dice, dtype=torch.float64) * scale).to(dtype)
    logits[1] = torch.randint(-2, 3, (3001,), generator=dice).to(dtype)  # ties everywhere
    logits[2, ::3] = -torch.inf
    for turn in range(4):
        numbers = [uniform(turn, row, 0) for row in range(8)]
        numbers[3], numbers[4] = 0.0, 1 - 2**-53
        expected = [
            sample_token(row.tolist(), RULES[name], n)
            for row, n in zip(logits, numbers, strict=True)
        ]
        assert sample_tokens(logits.cuda(), RULES[name], numbers) == expected


@pytest.mark.parametrize("name", RULES)
def test_tokens_where_algorithms_have_to_be_deterministic(name):
    """As in the samples of a run with --train.deterministic: CUDA's cumsum raises there."""
    logits = torch.randn(4, 3001, generator=torch.Generator().manual_seed(6))
    numbers = [uniform(1, row, 0) for row in range(4)]
    expected = sample_tokens(logits, RULES[name], numbers)
    torch.use_deterministic_algorithms(True)
    try:
        assert sample_tokens(logits.cuda(), RULES[name], numbers) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_step_that_cannot_be_recorded_is_the_modules(monkeypatch, capfd):
    model, rules = decoder(torch.float32), RULES["top_k"]
    expected = generate(model, PROMPTS, rules)
    compute, calls = cuda_decoder.CUDADecoder.compute, []

    def failing(self, *arguments):
        logits = compute(self, *arguments)
        calls.append(torch.cuda.is_current_stream_capturing())
        if calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    cuda_decoder.kept.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_decoder.CUDADecoder, "compute", failing)
        assert generate(model, PROMPTS, rules) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("generating without CUDA graphs, more slowly: OutOfMemoryError")
    assert calls == [False, True]
    assert not cuda_decoder.kept
    assert generate(model, PROMPTS, rules) == expected  # and CUDA, and recording, work as before
    assert len(cuda_decoder.kept) == 1 and capfd.readouterr().err == ""


def test_calls_leave_neither_memory_nor_random_numbers_used():
    model, rules = decoder(torch.bfloat16), RULES["top_k"]
    state = torch.cuda.get_rng_state()
    held = []
    for rows in (1, 6, 1, 6, 1, 6):
        generate(model, PROMPTS[:rows], rules)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[3:] == [held[2]] * 3  # all has been recorded
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_where_graphs_do_not_hold_the_module_is_called():
    model = decoder(torch.float32)
    assert cuda_decoder.is_supported(model)
    with torch.autocast("cuda", torch.bfloat16):
        assert not cuda_decoder.is_supported(model)
    assert not cuda_decoder.is_supported(model.train())
    assert not cuda_decoder.is_supported(decoder(torch.float64))
    assert not cuda_decoder.is_supported(decoder(torch.float32, device="cpu"))
    assert batched.rows_at_once(model, 40) > 32


@torch.inference_mode()
def test_an_error_while_recording_is_told(monkeypatch):
    step = borrow(decoder(torch.float32), 1, 10)
    monkeypatch.setattr(step, "compute", lambda *arguments: torch.zeros(3) @ torch.zeros(4))
    with pytest.raises(CaptureError, match="RuntimeError: "):
        step(torch.tensor([[1]]), step.cache)
    assert step.cache.lengths == [0]
