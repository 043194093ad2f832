"""The compiled step against the module and the definitions; and what happens without a compiler."""

import random
import shutil

import pytest
import torch

from common.errors import UserError
from generation import batched, compiled_decoder
from generation.batched import generate
from generation.compiled_decoder import CompiledDecoder
from generation.kv_cache import KVCache
from generation.sampling import Sampling, sample_token
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from tests.generation.test_batched import CONFIGS, PROMPTS, RULES, decoder, plain
from tests.generation.test_cpu_decoder import MORE, WIDE

SHAPES = {  # beyond those of CONFIGS: widths that fill vectors and panels, and that fill none
    "wide": {"d_model": 256, "n_heads": 2, "d_ff": 512, "activation": "gelu"},
    "odd": {"d_model": 33, "n_heads": 3, "d_ff": 65, "positions": "learned"},
    "narrow": {"d_model": 6, "n_heads": 3, "d_ff": 1, "norm_first": True},
}
NAMES, OPTIONS = zip(*{**CONFIGS, **MORE}.items(), strict=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A folder for this test run, so that what is tested was compiled now."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(compiled_decoder, "CACHE", folder)
    load = compiled_decoder.load
    load.cache_clear()
    yield folder
    load.cache_clear()


@pytest.fixture
def library():
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    found = compiled_decoder.load()
    assert found is not None
    return found


def shaped(**options):
    """A decoder of a vocabulary that is more than a panel and no multiple of one."""
    torch.manual_seed(0)
    config = ModelConfig(150, n_layers=2, max_len=30, init_std=0.06, **options)
    return TransformerDecoder.from_config(config, torch.float32).eval()


def logits_of(step, model, rows):
    """After each token of each row (B, T): (B, T, V)."""
    cache = KVCache(model, *rows.shape)
    return torch.stack([step(ids, cache) for ids in rows.split(1, dim=1)], dim=1)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@torch.inference_mode()
def test_it_gives_the_logits_of_the_module_without_a_cache(library, options):
    model = decoder(torch.float32, **options)
    step, rows = CompiledDecoder(model, library), torch.randint(40, (3, 9))
    torch.testing.assert_close(logits_of(step, model, rows), model(rows), rtol=WIDE, atol=WIDE)
    # rows of unequal lengths: of the second only two tokens are there
    cache = KVCache(model, 2, 9)
    model(rows[:2, :5], cache=cache)
    cache.lengths = [5, 2]
    found = step(torch.tensor([[3], [4]]), cache)
    assert cache.lengths == [6, 3]
    for row, length, token in (0, 5, 3), (1, 2, 4):
        text = torch.cat([rows[row, :length], torch.tensor([token])])
        torch.testing.assert_close(found[row], model(text[None])[0, -1], rtol=WIDE, atol=WIDE)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_every_width_and_number_of_rows(library, options):
    model, rows = shaped(**options), torch.randint(150, (11, 30))
    step, expected = CompiledDecoder(model, library), model(rows)
    for B in (1, 2, 3, 4, 7, 11):
        found = logits_of(step, model, rows[:B])
        torch.testing.assert_close(found, expected[:B], rtol=WIDE, atol=WIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_row_gives_the_same_bits_in_any_batch_and_with_any_number_of_threads(library, dtype):
    model, rows = shaped(**SHAPES["wide"]).to(dtype), torch.randint(150, (9, 20))
    step, threads = CompiledDecoder(model, library), torch.get_num_threads()
    together = logits_of(step, model, rows)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            for row in range(9):
                assert logits_of(step, model, rows[row : row + 1])[0].equal(together[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_bfloat16_stays_within_its_rounding(library, options):
    """Of inputs, and of keys and values: what the weights are is the same on both sides."""
    model, rows = shaped(**options).to(torch.bfloat16), torch.randint(150, (5, 30))
    found = logits_of(CompiledDecoder(model, library), model, rows)
    expected = model.float()(rows)
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert (found - expected).abs().mean() < 0.01 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
@torch.inference_mode()
def test_processors_with_narrower_vectors(monkeypatch, instructions, dtype):
    flags = set(compiled_decoder.instructions().split())
    if not {"avx2", "fma", "movbe"} <= flags or shutil.which("c++") is None:
        pytest.skip("no such processor, or no C++ compiler")
    theirs = [flag.replace("native", instructions) for flag in compiled_decoder.FLAGS]
    monkeypatch.setattr(compiled_decoder, "FLAGS", theirs)
    narrow = compiled_decoder.load()
    assert narrow.panel() == {"x86-64": 16, "x86-64-v3": 32}[instructions]
    for options in SHAPES.values():
        model, rows = shaped(**options).to(dtype), torch.randint(150, (5, 30))
        found = logits_of(CompiledDecoder(model, narrow), model, rows)
        expected = model.float()(rows)
        near = WIDE if dtype == torch.float32 else 0.05 * expected.std()
        torch.testing.assert_close(found, expected, rtol=WIDE, atol=float(near))


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_greedy_text_is_that_of_the_plain_uncached_path(library, options, monkeypatch):
    model = decoder(torch.float32, **options)
    alone = [plain(model, prompt, RULES["greedy"]) for prompt in PROMPTS]
    monkeypatch.delattr(batched, "CPUDecoder")  # which would have been asked otherwise
    assert generate(model, PROMPTS, RULES["greedy"], compiled=True) == alone
    one_by_one = [generate(model, [p], RULES["greedy"], compiled=True)[0] for p in PROMPTS]
    assert one_by_one == alone


@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_sampled_text_is_that_of_the_other_step(library, top_p):
    model = decoder(torch.float32)
    rules = Sampling(temperature=1.5, top_k=20, top_p=top_p, max_new_tokens=30)
    explained = []
    found = generate(
        model, PROMPTS, rules, seed=5, compiled=True,
        on_logits=lambda row, logits, token: explained.append((len(logits), token)),
    )  # fmt: skip
    assert found == generate(model, PROMPTS, rules, seed=5)
    assert len(explained) == sum(map(len, found)) and {n for n, _ in explained} == {40}


def test_top_k_takes_the_token_that_its_definition_takes(library):
    step, dice = CompiledDecoder(decoder(torch.float32), library), random.Random(0)
    torch.manual_seed(0)
    for case in range(300):
        V, B = dice.choice([2, 3, 65, 300, 9000]), dice.choice([1, 5])
        k = dice.randint(1, min(V - 1, 400))
        logits = torch.randn(B, V + 7)[:, :V] * dice.choice([0.1, 1, 5])
        if case % 2:
            logits = (2 * logits).round() / 2  # many that are equal
        if case % 5 == 0:
            logits[:, 1::3] = -torch.inf
        rules = Sampling(top_k=k, temperature=dice.choice([1e-40, 0.1, 1, 3, 1e40]))
        numbers = [dice.choice([0.0, dice.random(), 1 - 2**-53]) for _ in range(B)]
        found = step.sample_tokens(logits, rules, numbers)
        rows = zip(logits.tolist(), numbers, strict=True)
        assert found == [sample_token(row, rules, number) for row, number in rows], (case, rules)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(library, wrong):
    step, logits = CompiledDecoder(decoder(torch.float32), library), torch.zeros(3, 500)
    logits[1, 77] = wrong
    with pytest.raises(UserError, match="not finite"):
        step.sample_tokens(logits, Sampling(top_k=5), [0.5] * 3)


@torch.inference_mode()
def test_a_full_cache_is_refused(library):
    model = decoder(torch.float32)
    step, cache = CompiledDecoder(model, library), KVCache(model, 1, 2)
    for _ in range(2):
        step(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match="2 places, and 3 are needed"):
        step(torch.tensor([[1]]), cache)


def test_it_is_compiled_once_for_each_processor(library, cache, monkeypatch):
    first, there = compiled_decoder.compiled(), sorted(cache.iterdir())
    made = first.stat().st_mtime_ns
    assert compiled_decoder.compiled() == first and first.stat().st_mtime_ns == made
    monkeypatch.setattr(compiled_decoder, "instructions", lambda: "flags: other")
    second = compiled_decoder.compiled()
    assert second not in there and sorted(cache.iterdir()) == sorted([*there, second])
    second.unlink()


@pytest.mark.parametrize(
    "compiler, message",
    [
        ("no-such-compiler -x", "no C++ compiler (no-such-compiler); install one, or set CXX"),
        ("false", "false failed (status 1); set CXX to a C++ compiler that has OpenMP"),
    ],
)
def test_without_a_compiler_a_line_says_so_and_the_text_is_the_same(
    compiler, message, monkeypatch, capsys
):
    monkeypatch.setenv("CXX", compiler)
    model = decoder(torch.float32)
    for _ in range(2):
        found = generate(model, PROMPTS, RULES["greedy"], compiled=True)
        assert found == generate(model, PROMPTS, RULES["greedy"])
    line = f"--compile: {message}; generating without it, more slowly\n"
    assert capsys.readouterr().err == line  # once


def test_in_float64_and_for_few_tokens_nothing_is_compiled(monkeypatch):
    monkeypatch.delattr(compiled_decoder, "load")
    few = Sampling(max_new_tokens=batched.MIN_TOKENS_TO_PACK - 1)
    for model, rules in (decoder(), RULES["greedy"]), (decoder(torch.float32), few):
        found = generate(model, PROMPTS, rules, compiled=True)
        assert found == generate(model, PROMPTS, rules)
