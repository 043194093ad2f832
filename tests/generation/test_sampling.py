"""Choosing a token by the rules, against those of `transformers`; PyTorch's against the plain."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.errors import UserError
from generation import torch_sampling
from generation.sampling import Sampling, explain, keep, sample_token, uniform, window
from generation.torch_sampling import candidates, sample_tokens, weigh

# multiples of 1/4, so that equal logits are frequent
vocabularies = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=40)
rules = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.5, 1.0, 1.7, 100.0]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(1e-3, 1.0)),
)


def warped(logits, rules):
    """Ids kept by the warpers, and how close the kept probability is to top_p without a token."""
    scores = torch.tensor([logits], dtype=torch.float64)
    scores = TemperatureLogitsWarper(rules.temperature)(None, scores)
    if rules.top_k:
        scores = TopKLogitsWarper(rules.top_k)(None, scores)
    reached = scores.softmax(-1).sort(descending=True).values.cumsum(-1)
    margin = (reached - rules.top_p).abs().min().item()
    if rules.top_p < 1:
        scores = TopPLogitsWarper(rules.top_p)(None, scores)
    return scores.isfinite()[0].nonzero().flatten().tolist(), margin


@settings(max_examples=300, deadline=None)
@given(vocabularies, rules)
def test_the_kept_set_is_that_of_transformers(logits, rules):
    expected, margin = warped(logits, rules)
    assume(rules.top_p == 1 or margin > 1e-9)  # nearer, rounding decides
    kept = keep(logits, rules)
    assert kept == sorted(kept)
    # top-p may cut between equal logits, where transformers takes any of them and we the lowest ids
    assert sorted(logits[i] for i in kept) == sorted(logits[i] for i in expected)
    least = min(logits[i] for i in kept)
    assert [i for i in kept if logits[i] > least] == [i for i in expected if logits[i] > least]
    tied = [i for i, logit in enumerate(logits) if logit == least]
    assert [i for i in kept if logits[i] == least] == tied[: sum(i in kept for i in tied)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 40), rules)
def test_pytorch_keeps_and_chooses_the_same(data, size, rules):
    logits = data.draw(
        st.lists(
            st.lists(
                st.integers(-20, 20).map(lambda n: n / 4) | st.floats(-9, 9, width=32),
                min_size=size,
                max_size=size,
            ),
            min_size=1,
            max_size=4,
        )
    )
    numbers = [uniform(size, 0, row) for row in range(len(logits))]
    rows = torch.tensor(logits, dtype=torch.float64)
    ids, weights = candidates(rows, rules)
    for row, i, w in zip(logits, ids, weights, strict=True):
        kept = keep(row, rules)
        assert i.tolist() == sorted(i.tolist())
        assert set(i[w > 0].tolist()) <= set(kept)
        assert all(
            math.exp((row[k] - max(row)) / rules.temperature) < 1e-300
            for k in set(kept) - set(i[w > 0].tolist())
        )
    expected = [
        sample_token(row, rules, number) for row, number in zip(logits, numbers, strict=True)
    ]
    assert sample_tokens(rows, rules, numbers) == expected
    assert sample_tokens(rows, rules, numbers, on_device=True) == expected


def test_tokens_come_as_often_as_the_softmax_says():
    logits = [0.3, -1.0, 2.0, 0.3, -9.0]
    kept = Sampling(temperature=0.7, top_k=4)
    numbers = [(i + 0.5) / 10_000 for i in range(10_000)]
    drawn = [sample_token(logits, kept, number) for number in numbers]
    expected = torch.tensor([logits[:4]], dtype=torch.float64).div(0.7).softmax(-1) * 10_000
    for token, often in enumerate(expected[0].tolist()):
        assert abs(drawn.count(token) - often) <= 1
    assert drawn == sorted(drawn)  # in the order of ids


def explained(logits, rules, token):
    """The definition of `explain`, from the softmax and the kept sets, in the order of fields."""
    temperature = 1.0 if rules.deterministic else rules.temperature
    p = torch.tensor(logits, dtype=torch.float64).div(temperature).softmax(-1)
    every = list(range(len(logits)))
    after_k = every if rules.deterministic else keep(logits, replace(rules, top_p=1.0))
    after_p = every if rules.deterministic else keep(logits, rules)
    kept = keep(logits, rules)
    above = [i for i in every if (logits[i], -i) > (logits[token], -token)]
    return [
        p[token].item(),
        (p[token] / p[kept].sum()).item() if token in kept else 0.0,
        len(above) + 1,
        torch.special.entr(p).sum().item() / math.log(2),
        len(every) - len(after_k),
        (p.sum() - p[after_k].sum()).item(),
        len(after_k) - len(after_p),
        (p[after_k].sum() - p[after_p].sum()).item(),
    ]


@settings(max_examples=200, deadline=None)
@given(vocabularies, rules | st.just(Sampling(greedy=True, top_k=3, temperature=9)), st.data())
def test_an_explanation_is_what_its_fields_say(logits, rules, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    why = explain(logits, rules, token)
    assert list(vars(why).values()) == pytest.approx(explained(logits, rules, token), abs=1e-12)
    kept = sum(explain(logits, rules, token).drawn for token in range(len(logits)))
    assert kept == pytest.approx(1)


def test_what_is_drawn_comes_as_often_as_explained():
    logits = [0.3, -1.0, 2.0, 0.3, -9.0]
    for rules in Sampling(temperature=0.7, top_k=4, top_p=0.9), Sampling(greedy=True):
        drawn = [sample_token(logits, rules, (i + 0.5) / 10_000) for i in range(10_000)]
        for token in range(5):
            expected = explain(logits, rules, token).drawn * 10_000
            assert abs(drawn.count(token) - expected) <= 1


def test_an_explanation_at_the_edges():
    certain = explain([0.0, -math.inf, -1e4], Sampling(), 0)
    assert (certain.probability, certain.rank, certain.entropy) == (1.0, 1, 0.0)
    assert math.copysign(1, certain.entropy) == 1
    assert explain([0.0] * 8, Sampling(), 5).entropy == 3.0
    assert explain([0.0] * 8, Sampling(), 5).rank == 6
    for temperature in (1e-310, 1e300):
        assert explain([-50.0, 80.0, 79.0], Sampling(temperature), 1).rank == 1
    removed = explain([0.0, 0.0, 0.0, 0.0], Sampling(top_k=1, top_p=0.5), 3)  # all four tie
    assert (removed.top_k_removed, removed.top_p_removed, removed.drawn) == (0, 2, 0.0)
    assert removed.top_p_probability == 0.5
    with pytest.raises(ValueError):
        explain([0.0], Sampling(), 1)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_equal_logits_in_narrow_floats(dtype, on_device):
    logits = torch.randn(8, 9000, generator=torch.Generator().manual_seed(1)).to(dtype)
    rules = Sampling(temperature=0.8, top_k=50, top_p=0.9)
    numbers = [uniform(1, row, 0) for row in range(8)]
    expected = [
        sample_token(row.tolist(), rules, n) for row, n in zip(logits, numbers, strict=True)
    ]
    assert sample_tokens(logits, rules, numbers, on_device) == expected
    if dtype == torch.bfloat16:
        assert max(len(keep(row.tolist(), Sampling(top_k=50))) for row in logits) > 50


LARGE = {  # name: (logits of a large vocabulary, top_p, whether all must be sorted)
    "peaked": (lambda dice: torch.randn(3, 5000, generator=dice) * 4, 0.9, False),
    "flat": (lambda dice: torch.randn(3, 5000, generator=dice) * 0.1, 0.9, True),
    "a wide tie at the border": (
        lambda dice: torch.randint(-9, 9, (3, 5000), generator=dice) * 1.5, 0.5, False,
    ),
    "a tie of half of them": (
        lambda dice: torch.randint(-2, 0, (3, 5000), generator=dice) * 1.0, 0.9, True,
    ),
    "all equal": (lambda dice: torch.full((3, 2048), 0.7), 0.25, True),
    "narrow": (lambda dice: (torch.randn(3, 5000, generator=dice) * 4).bfloat16(), 0.8, False),
}  # fmt: skip


@pytest.mark.parametrize("make, top_p, whole", LARGE.values(), ids=LARGE)
def test_top_p_of_a_large_vocabulary_sorts_it_only_where_it_must(make, top_p, whole, monkeypatch):
    sizes, beyond = [], torch_sampling.dropped_by_top_p
    monkeypatch.setattr(
        torch_sampling,
        "dropped_by_top_p",
        lambda v, *a, **k: sizes.append(v.shape[-1]) or beyond(v, *a, **k),
    )
    logits = make(torch.Generator().manual_seed(3))
    for temperature in 0.8, 1.0:
        rules = Sampling(temperature, top_p=top_p)
        for row in logits.split(1):
            ids, weights = candidates(row, rules)
            assert (sizes[-1] == row.numel()) == whole
            assert ids[weights > 0].tolist() == keep(row[0].tolist(), rules)
    numbers = [0.0, 0.5, 1 - 2**-53]
    expected = [
        sample_token(row.tolist(), rules, n) for row, n in zip(logits, numbers, strict=True)
    ]
    assert sample_tokens(logits, rules, numbers) == expected


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_draw_among_all_of_a_large_vocabulary(scale, dtype, on_device, monkeypatch):
    """Also where the number is as near to a border as float64 can tell: then that decides."""
    again, draw = [], torch_sampling.draw
    monkeypatch.setattr(torch_sampling, "draw", lambda *a: again.append(len(a[0])) or draw(*a))
    dice = torch.Generator().manual_seed(5)
    logits = (torch.randn(40, 3001, generator=dice, dtype=torch.float64) * scale).to(dtype)
    rules = Sampling(0.7)
    numbers = [uniform(2, row, 0) for row in range(40)]
    for row in range(0, 40, 2):
        weights = weigh(logits[row : row + 1], logits[row : row + 1].amax(-1, True), 0.7)
        reached = weights.cumsum(-1)[0]
        numbers[row] = float(reached[70 * row] / reached[-1]) + 1e-12 * (row % 4 - 1)
    numbers[1], numbers[3] = 0.0, 1 - 2**-53
    expected = [
        sample_token(row.tolist(), rules, n) for row, n in zip(logits, numbers, strict=True)
    ]
    assert sample_tokens(logits, rules, numbers, on_device) == expected
    if on_device:  # in float64 only those are in doubt whose number is at a border
        assert again == [1] * 22
    else:
        assert again == [40] if dtype == torch.float64 else 20 <= len(again) <= 40


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("temperature", [1e-310, 1e-300, 1e-45, 1e-20, 1e-3, 1e20, 1e300])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_any_temperature_over_a_large_vocabulary(temperature, top_p, on_device):
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(6)) * 5
    logits[:, ::7] = -math.inf  # tokens that never come
    rules, numbers = Sampling(temperature, top_p=top_p), [0.0, 0.3, 0.7, 1 - 2**-53]
    expected = [
        sample_token(row.tolist(), rules, n) for row, n in zip(logits, numbers, strict=True)
    ]
    assert sample_tokens(logits, rules, numbers, on_device) == expected


VOCABULARY = 50304
KINDS = {  # name: logits (B, VOCABULARY)
    "peaked": lambda dice: torch.randn(3, VOCABULARY, generator=dice) * 4,
    "flat": lambda dice: torch.randn(3, VOCABULARY, generator=dice) * 0.01,
    "all equal": lambda dice: torch.full((3, VOCABULARY), -3.25),
    "tied": lambda dice: torch.randint(-3, 4, (3, VOCABULARY), generator=dice) * 0.5,
    "bfloat16": lambda dice: (torch.randn(3, VOCABULARY, generator=dice) * 4).bfloat16(),
    "float64": lambda dice: torch.randn(3, VOCABULARY, generator=dice, dtype=torch.float64),
    "one that can come": lambda dice: torch.full((3, VOCABULARY), -math.inf).scatter(
        1, torch.tensor([[0], [511], [50303]]), 2.0
    ),
}
ON_CUDA = {
    "greedy": Sampling(greedy=True),
    "all": Sampling(0.8),
    "top_k": Sampling(top_k=50),
    "top_k, top_p": Sampling(0.7, 50, 0.9),
}


@pytest.fixture
def copies(monkeypatch):
    """The shapes that were copied to the CPU, each with whether it was packed."""
    made, copy = [], torch_sampling.to_cpu

    def counted(*tensors, packed):
        made.append((tensors[0].shape, packed))
        return copy(*tensors, packed=packed)

    monkeypatch.setattr(torch_sampling, "to_cpu", counted)
    return made


@pytest.mark.parametrize("rules", ON_CUDA.values(), ids=ON_CUDA)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_cuda_does_chooses_the_same_with_one_small_copy(make, rules, copies):
    logits = make(torch.Generator().manual_seed(7))
    for numbers in ([0.0, 0.3, 1 - 2**-53], [uniform(3, row, 0) for row in range(3)]):
        expected = [
            sample_token(row.tolist(), rules, n) for row, n in zip(logits, numbers, strict=True)
        ]
        copies.clear()
        found = sample_tokens(logits, rules, numbers, on_device=True)
        assert found == expected and all(type(token) is int for token in found)
        assert all(packed for _, packed in copies)
        tied = (KINDS[name] for name in ("all equal", "tied", "one that can come"))
        wide = rules.top_k and make in tied
        if not wide:  # else more tie with the last of top-k than are looked at
            (shape,) = [shape for shape, _ in copies]
            assert shape.numel() <= 3 * (rules.top_k + torch_sampling.EXTRA_CANDIDATES or 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_cuda_the_host_waits_for_nothing_but_the_copy(dtype):
    """On tensors that have a device and no numbers: where one is read, this raises."""
    logits = torch.empty(5, VOCABULARY, dtype=dtype, device="meta")
    numbers = torch.empty(5, 1, dtype=torch.float64, device="meta")
    tensors = [*torch_sampling.search_blocks(logits, numbers, 0.8, in_float64=True)]
    for tensor in (*tensors, *logits.topk(64), *logits.max(-1)):
        assert tensor.device.type == "meta" and len(tensor) == 5
    with pytest.raises(RuntimeError, match="meta"):
        bool(logits.isfinite().all())


@pytest.mark.parametrize("rules", ON_CUDA.values(), ids=ON_CUDA)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, None])
def test_what_cuda_does_finds_logits_that_are_no_numbers(wrong, rules):
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(8))
    if wrong is None:
        logits[1] = -math.inf
    else:
        logits[1, 40000] = wrong
    for on_device in (False, True):
        with pytest.raises(UserError, match="not finite"):
            sample_tokens(logits, rules, [0.0, 0.5, 0.9], on_device)


@pytest.mark.parametrize("tied", [2, 20, 900])
def test_all_that_tie_with_the_last_of_top_k_stay(tied):
    logits = torch.arange(1000.0).flip(0).repeat(2, 1)  # the second row without ties
    logits[0, 30 : 30 + tied] = logits[0, 30]
    rules = Sampling(1e4, top_k=31)
    ids, weights = candidates(logits, rules)
    for row, i, w in zip(logits, ids, weights, strict=True):
        assert i[w > 0].tolist() == keep(row.tolist(), rules)
    assert (weights > 0).sum(-1).tolist() == [30 + tied, 31]


@pytest.mark.parametrize("rules", [Sampling(greedy=True), Sampling(temperature=0, top_k=3)])
def test_greedy_is_the_lowest_id_of_the_largest(rules):
    logits = [1.0, 4.0, 2.0, 4.0]
    assert keep(logits, rules) == [1]
    assert sample_token(logits, rules, 0.99) == 1
    assert sample_tokens(torch.tensor([logits, logits[::-1]]), rules, [0.99, 0.99]) == [1, 0]


def test_a_number_on_the_border_takes_the_token_after_it():
    logits, rules = [0.0, -1e9, 0.0, 0.0, 0.0], Sampling()
    assert [sample_token(logits, rules, n / 4) for n in range(4)] == [0, 2, 3, 4]
    rows = torch.tensor([logits] * 4, dtype=torch.float64)
    assert sample_tokens(rows, rules, [n / 4 for n in range(4)]) == [0, 2, 3, 4]


@pytest.mark.parametrize("temperature", [1e-310, 1e-3, 1e300])
def test_no_temperature_overflows(temperature):
    logits, rules = [-50.0, 80.0, 79.0], Sampling(temperature=temperature)
    chosen = sample_token(logits, rules, 0.9)
    assert chosen == (2 if temperature == 1e300 else 1)
    assert sample_tokens(torch.tensor([logits], dtype=torch.float64), rules, [0.9]) == [chosen]


def test_uniform_is_what_it_was_and_fills_the_unit_interval():
    golden = {
        (0, 0, 0): 0.5109475436833134,
        (1337, 2, 17): 0.9909743113421953,
        (-5, 0, 1): 0.6418344181786527,
        (2**70, 1, 10**6): 0.7756508603277152,
    }
    assert {place: uniform(*place) for place in golden} == golden
    numbers = sorted(uniform(7, sample, position) for sample in range(40) for position in range(50))
    assert all(abs(x - i / 2000) < 0.04 for i, x in enumerate(numbers))  # Kolmogorov-Smirnov
    assert len(set(numbers)) == 2000


def test_the_window_grows_to_the_end_and_falls_to_its_later_half():
    assert [window(n, 8) for n in range(1, 16)] == [1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5]
    for max_len in range(1, 12):
        sizes = [window(n, max_len) for n in range(1, 60)]
        assert max(sizes) == max_len and min(sizes) == 1
        for before, after in pairwise(sizes):
            assert after == (before + 1 if before < max_len else max(1, max_len // 2))


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("max_new_tokens", 0),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"^{field} = {value} must be"):
        Sampling(**{field: value})
