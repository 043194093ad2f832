"""The step for CUDA graphs on CPU tensors: all of it but the recording itself.

Here a step is recorded as a list of PyTorch's operations, which replaying runs again on the same
tensors, as a CUDA graph does: whatever Python did in between is not done again.
"""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from generation import batched, cuda_decoder
from generation.batched import generate, prefill
from generation.cuda_decoder import BUCKET, CUDADecoder, borrow, give_back
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from tests.generation.test_batched import CONFIGS, PROMPTS, RULES, decoder, plain
from tests.generation.test_cpu_decoder import MORE

OPTIONS = {**CONFIGS, **MORE}
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.item.default"}


class Tape(TorchDispatchMode):
    """The operations of a function, in order, and their results. Refuses to have a number read."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert str(func) not in READS, f"{func}: the host waits for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if func._schema.returns and func._schema.returns[0].alias_info is None:
                kept, new = (r if isinstance(r, tuple) else (r,) for r in (result, again))
                for before, after in zip(kept, new, strict=True):
                    if isinstance(before, torch.Tensor) and before.numel():
                        before.copy_(after)

    def launches(self) -> Counter:
        """How often each operation is launched that is no view, and so would be a kernel."""
        return Counter(str(func) for func, _, _, _ in self.calls if not func.is_view)


class Recorder:
    """A `Capture`: what is replayed is what was recorded once."""

    def __init__(self, device=None):
        self.tapes = []

    def __call__(self, function):
        function()  # as on CUDA, once for real
        tape = Tape()
        with tape:
            result = function()
        self.tapes.append(tape)

        def replay():
            tape.replay()
            return result

        return replay


@pytest.fixture
def on_cuda(monkeypatch):
    """`generate` as on CUDA; the recorders that were made."""
    made = []

    class Listed(Recorder):
        def __init__(self, device):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(cuda_decoder, "is_supported", lambda model: not model.training)
    monkeypatch.setattr(cuda_decoder, "GraphCapture", Listed)
    cuda_decoder.kept.clear()
    return made


# Beside the module --------------------------------------------------------------------------------


def close(dtype, exact):
    """How far logits may be apart: by rounding in float32 and 64, in bfloat16 by some of it."""
    if dtype == torch.bfloat16:
        return {"rtol": 0, "atol": 0.05 * exact.float().std().item()}
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    return {"rtol": bound, "atol": bound}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.inference_mode()
def test_each_step_gives_the_modules_logits(options, dtype):
    """Rows of unequal lengths, beyond a bucket's end, some of them dropped on the way."""
    model = decoder(dtype, max_len=200, **options)
    dice = torch.Generator().manual_seed(4)
    texts = [torch.randint(40, (n,), generator=dice).tolist() for n in (1, 118, 30, 126, 7)]
    step = borrow(model, 5, 160, Recorder())
    caches = [step.cache, KVCache(model, 5, 160)]
    for cache in caches:
        prefill(model, cache, list(range(5)), [text[:-1] for text in texts])
    for turn in range(24):
        newest = torch.tensor([[text[-1]] for text in texts])
        found = step(newest, caches[0]).clone()
        expected = batched.module_step(model, newest, caches[1])
        assert caches[0].lengths == caches[1].lengths
        torch.testing.assert_close(found, expected, **close(dtype, expected))
        for text in texts:
            text.append(int(torch.randint(40, (), generator=dice)))
        if turn in (4, 15):  # the second longest, and later the longest: back to the first bucket
            row = 1 if turn == 4 else 3
            for cache in caches:
                cache.drop(row)
            texts[row] = texts[-1]
            texts.pop()
    assert list(step.recorded) == [(5, 128), (5, 256), (4, 256), (4, 128)]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_text_in_float64_is_that_of_the_definition(options, rules, on_cuda):
    """In a batch and alone, far beyond max_len."""
    model, rules = decoder(**options), replace(rules, max_new_tokens=20)
    alone = [plain(model, prompt, rules, seed=3) for prompt in PROMPTS]
    assert generate(model, PROMPTS, rules, seed=3) == alone
    assert generate(model, PROMPTS[1:2], rules, seed=3) == alone[1:2]
    assert len(on_cuda) == 1  # what is kept for six rows has room for one


@pytest.mark.parametrize("max_len", [1, 2, 3, 100])
def test_any_length_of_window(max_len, on_cuda):
    model = decoder(max_len=max_len)
    alone = [plain(model, prompt, RULES["sampled"]) for prompt in PROMPTS]
    assert generate(model, PROMPTS, RULES["sampled"]) == alone
    assert len(on_cuda) == 1


def test_a_long_text_goes_through_the_buckets_and_its_window_moves(on_cuda):
    model = decoder(max_len=150, positions="learned")
    rules = Sampling(top_k=20, max_new_tokens=180)
    assert generate(model, [[5], [7, 8]], rules) == [plain(model, p, rules) for p in ([5], [7, 8])]
    assert (
        len(on_cuda[0].tapes) == 2
    )  # of 128 and 256 keys, and no others when the window has moved


def test_rows_that_end_leave_the_others_as_they_are(on_cuda):
    model, rules = decoder(max_len=60), RULES["sampled"]
    end_id = generate(model, PROMPTS, rules)[2][4]
    expected = [plain(model, prompt, rules, end_id=end_id) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 2
    assert generate(model, PROMPTS, rules, end_id=end_id) == expected
    stops = [3, 3, 29, 4, 12, 11]
    heard = [[] for _ in PROMPTS]

    def on_token(row, token):
        heard[row].append(token)
        return len(heard[row]) == stops[row]

    whole = [plain(model, prompt, rules) for prompt in PROMPTS]
    assert generate(model, PROMPTS, rules, on_token=on_token) == heard
    assert heard == [row[:n] for row, n in zip(whole, stops, strict=True)]
    (decoder_kept,) = cuda_decoder.kept.values()
    assert set(decoder_kept.recorded) == {(6, 128), (4, 128), (2, 128), (1, 128)}


# What is recorded ---------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_layer_is_eleven_launches():
    """Norm, Q K V, their storing, attention, output, sum; norm, linear, GELU, linear, sum."""
    launches = []
    for layers in (1, 2):
        model = decoder(torch.float32, n_layers=layers, norm_first=True, activation="gelu")
        recorder = Recorder()
        step = borrow(model, 3, 12, recorder)
        step(torch.tensor([[1], [2], [3]]), step.cache)
        launches.append(recorder.tapes[0].launches())
    assert sum((launches[1] - launches[0]).values()) == 11, launches[1] - launches[0]
    assert launches[0].total() - 11 <= 10, launches[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.inference_mode()
def test_a_step_reads_no_number_and_has_one_shape(options):
    """On the meta device, whose tensors have no numbers, reading one raises."""
    model = decoder(torch.float32, max_len=200, **options).to("meta")
    step = borrow(model, 3, 150, lambda function: function)
    for R, S in (1, 128), (3, 256):
        inputs = torch.zeros(2, R, dtype=torch.int64, device="meta")
        logits = step.compute(inputs, R, S)
        assert logits.shape == (R, 40) and logits.device.type == "meta"


def test_the_recorder_itself_would_notice():
    constant = torch.tensor([1.0])
    with pytest.raises(AssertionError, match="host waits"):
        Recorder()(lambda: constant * float(constant))
    step = [1.0]
    replay = Recorder()(lambda: constant * step[0])
    step[0] = 2.0
    constant += 1
    assert replay().item() == 2.0  # the tensor's new number, and Python's old one


def test_a_step_that_cannot_be_recorded_is_the_modules(on_cuda, monkeypatch, capfd):
    model, rules = decoder(max_len=200), Sampling(top_k=20, max_new_tokens=140)
    expected = [plain(model, prompt, rules) for prompt in ([5], [7, 8])]
    for works in (0, 1):  # the first bucket's at once, or the second's after 128 tokens
        calls = []

        class Failing(Recorder):
            def __call__(self, function, calls=calls, works=works):
                calls.append(function)
                if len(calls) > works:
                    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
                return super().__call__(function)

        monkeypatch.setattr(cuda_decoder, "GraphCapture", Failing)
        assert generate(model, [[5], [7, 8]], rules) == expected
        assert capfd.readouterr().err == (
            "generating without CUDA graphs, more slowly: OutOfMemoryError: CUDA out of memory.\n"
        )
        assert len(calls) == works + 1 and not cuda_decoder.kept


# Between calls ------------------------------------------------------------------------------------


def test_a_second_call_records_nothing_and_reads_the_weights_as_they_are(on_cuda):
    model, rules = decoder(), RULES["sampled"]
    rules = replace(rules, max_new_tokens=15)
    before = generate(model, PROMPTS, rules)
    recorded = len(on_cuda[0].tapes)
    assert generate(model, PROMPTS, rules) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))  # no version counts
    after = generate(model, PROMPTS, rules)
    assert after == [plain(model, prompt, rules) for prompt in PROMPTS] != before
    assert len(on_cuda) == 1 and len(on_cuda[0].tapes) == recorded

    for parameter in model.parameters():  # elsewhere in memory
        parameter.data = parameter.data.clone()
    model.output.weight.data.zero_()
    assert generate(model, PROMPTS, rules) == [plain(model, prompt, rules) for prompt in PROMPTS]
    assert len(on_cuda) == 2
    generate(model, PROMPTS * 2, rules)  # more rows than there is room for
    assert len(on_cuda) == 3


def test_a_call_within_a_call_does_not_disturb_it(on_cuda):
    model, rules = decoder(), RULES["sampled"]
    alone = [plain(model, prompt, rules) for prompt in PROMPTS]
    assert generate(model, PROMPTS, rules) == alone  # by what the next call finds kept
    inner = []

    def on_token(row, token):
        if row == 1 and len(inner) < 5:
            inner.append(generate(model, PROMPTS[2:4], rules))

    assert generate(model, PROMPTS, rules, on_token=on_token) == alone
    assert inner == [alone[2:4]] * 5


def test_only_what_is_whole_and_small_is_kept(on_cuda, monkeypatch):
    def interrupted(row, token):
        raise KeyboardInterrupt

    model, rules = decoder(), RULES["greedy"]
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, rules, on_token=interrupted)
    assert not cuda_decoder.kept
    monkeypatch.setattr(cuda_decoder, "MAX_KEPT", 2 * 2 * 6 * 16 * BUCKET * 8 - 1)
    generate(model, PROMPTS, rules)
    assert not cuda_decoder.kept
    generate(model, PROMPTS[:5], rules)
    assert list(cuda_decoder.kept) == [model]


@torch.inference_mode()
def test_memory_goes_with_the_model_and_with_the_cache():
    model = decoder()
    step = borrow(model, 1, 5, lambda function: function)
    assert isinstance(step, CUDADecoder)
    cache, kept = weakref.ref(step.cache), weakref.ref(step)
    give_back(model, step)
    del step
    gc.disable()  # without cycles there is nothing to collect
    try:
        assert kept() is not None
        del model
        assert kept() is None and cache() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_what_cannot_be_read_is_refused():
    model = decoder()
    step = borrow(model, 2, 3, lambda function: function)
    with pytest.raises(ValueError, match="its own cache"):
        step(torch.tensor([[1], [2]]), KVCache(model, 2, 3))
    step.cache.lengths = [3, BUCKET]
    with pytest.raises(ValueError, match="128 places, and 129"):
        step(torch.tensor([[1], [2]]), step.cache)
    assert step.cache.lengths == [3, BUCKET]


def test_where_it_does_not_pay_or_not_hold_the_module_is_called():
    """On a CPU never; the rest is in tests/cuda."""
    assert not cuda_decoder.is_supported(decoder(torch.float32))
